"""Writing frozen sentence tables; :mod:`offprompts_env.text.frozen` says what they are, and reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from offprompts_env.config import check_integer
from offprompts_env.errors import DataError, DimensionError
from offprompts_env.folders import check_replaceable, checksums, replaced
from offprompts_env.text.cache import sample_generator, stored_embeddings, table_series
from offprompts_env.text.frozen import FORMAT_VERSION, MANIFEST, FrozenTable
from offprompts_env.text.prompted import TextOutputModel, query_texts
from offprompts_env.types import Array, Contexts, FloatArray, IntArray

if TYPE_CHECKING:
    from offprompts_env.text.store import SentenceStore

# Sentences asked for at once: an export that is stopped loses so many, if it has a store, and all otherwise.
_AT_ONCE = 2048


def freeze(
    outputs: TextOutputModel,
    queries: Contexts,
    path: str | Path,
    *,
    samples: int,
    seed: int = 0,
    pairs: Array | None = None,
    no_prompt: Mapping[str, Sequence[str]] | None = None,
    store: SentenceStore | None = None,
    facts: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FrozenTable:
    """Write the table of `outputs` into the folder `path`, and return it as read back.

    Args:
        outputs: what writes and embeds the sentences.
        queries: one row for each query, with texts.
        path: folder; a table that is there is replaced when the new one is complete.
        samples: K; one where the model is deterministic.
        seed: of the :class:`~offprompts_env.text.cache.SampleTable` that it is equal to.
        pairs: (n_q, A) of bool, which (query, prompt) to cover; None for all of them.
        no_prompt: reference sentences of each query, where rewards need them.
        store: sentences on disk; what is there is not written again, and an export that was stopped goes on.
        facts: what to say about the model; JSON-able.
        progress: is called with sentences done and sentences in all.

    Raises:
        DataError: `queries` have no texts, or a text twice; or no (query, prompt) is to be covered.
        DimensionError: `pairs` has another shape.
        ConfigError: `samples` is not positive.
        StorageError: the folder is something else, or cannot be written.
    """
    check_integer("samples", samples, 1)
    samples = 1 if outputs.deterministic else samples
    out = Path(path)
    check_replaceable(out, MANIFEST, "a table of frozen sentences")
    texts = query_texts(queries)
    if len(set(texts)) != len(texts):
        raise DataError(f"queries: expected each once, got {len(texts) - len(set(texts))} twice or more")
    n_prompts = len(outputs.prompts)
    covered = np.ones((len(texts), n_prompts), dtype=bool) if pairs is None else np.asarray(pairs)
    if covered.shape != (len(texts), n_prompts) or covered.dtype != bool:
        raise DimensionError(f"pairs: expected bools ({len(texts)}, {n_prompts}), got {covered.dtype} {covered.shape}")
    if not covered.any():
        raise DataError(
            "pairs: expected at least one (query, prompt) to cover, got none; pass pairs=None for all of them"
        )
    asked, chosen = (column.repeat(samples) for column in np.nonzero(covered))
    index = np.tile(np.arange(samples), len(asked) // samples)
    sentences: list[str] = []
    embeddings: list[FloatArray] = []
    for start in range(0, len(asked), _AT_ONCE):
        rows = slice(start, start + _AT_ONCE)
        requests = outputs.requests(queries.take(asked[rows]), chosen[rows])
        written = frozen_sentences(outputs, requests, index[rows].tolist(), seed, store)
        sentences += written
        embeddings.append(outputs.embed(written) if store is None else stored_embeddings(store, outputs, written))
        if progress is not None:
            progress(len(sentences), len(asked))
    described: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "facts": written_by(outputs) | dict(facts or {}),
        "samples": samples,
        "seed": seed,
        "queries": len(texts),
        "prompts": n_prompts,
        "pairs": len(asked) // samples,
    }
    with replaced(out) as folder:
        _write_parts(folder, outputs, queries, (asked, chosen, index), sentences, no_prompt or {})
        np.save(folder / "embeddings.npy", np.concatenate(embeddings).astype(np.float32), allow_pickle=False)
        (folder / "CARD.md").write_text(_card(described), encoding="utf-8")
        described["files"] = checksums(folder, besides=MANIFEST)
        (folder / MANIFEST).write_text(json.dumps(described, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return FrozenTable.load(out)


def written_by(outputs: TextOutputModel) -> dict[str, Any]:
    """Return what `outputs` knows of how it writes: fingerprints, templates and decoding as they are, not as asked for.

    JSON-able. A server is known by what it lists.
    """
    facts: dict[str, Any] = {"fingerprint": outputs.fingerprint}
    formatter, model = getattr(outputs, "formatter", None), getattr(outputs, "language_model", None)
    if formatter is not None:
        facts |= {name: getattr(formatter, name) for name in ("template", "template_without_prompt")}
    if (decoding := getattr(model, "decoding", None)) is not None:
        facts["decoding"] = decoding.to_mapping()
    if getattr(model, "chat_template", False):
        facts["chat_template"] = True
    if (encoder := getattr(outputs, "encoder_fingerprint", None)) is not None:
        facts["encoder"] = encoder
    if served := getattr(outputs, "served_by", None):
        facts["served_by"] = dict(served)
    return facts


def frozen_sentences(
    outputs: TextOutputModel, requests: Sequence[str], samples: Sequence[int], seed: int, store: SentenceStore | None
) -> list[str]:
    """Return the sentences that a sample table with this seed would hold, through `store` where there is one."""

    def write(rows: Sequence[int]) -> list[str]:
        generators = [sample_generator(outputs.fingerprint, seed, samples[row], requests[row]) for row in rows]
        return outputs.write([requests[row] for row in rows], generators)

    if store is None:
        return write(range(len(requests)))
    return store.complete(outputs.fingerprint, table_series(seed), requests, samples, write)


def _write_parts(
    folder: Path,
    outputs: TextOutputModel,
    queries: Contexts,
    rows: tuple[IntArray, IntArray, IntArray],
    sentences: list[str],
    no_prompt: Mapping[str, Sequence[str]],
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = query_texts(queries)
    asked, chosen, index = rows
    names = pa.DictionaryArray.from_arrays(pa.array(asked, pa.int32()), pa.array(texts, pa.string()))
    known = [(text, k, sentence) for text in texts for k, sentence in enumerate(no_prompt.get(text, ()))]
    columns: dict[str, dict[str, Any]] = {
        "sentences": {
            "query": names,
            "prompt": pa.array(chosen, pa.int32()),
            "sample": pa.array(index, pa.int32()),
            "sentence": pa.array(sentences, pa.string()),
        },
        "queries": {"query": pa.array(texts, pa.string()), "vector": _list_array(queries.query)},
        "prompts": {
            "prompt": pa.array(outputs.prompts.texts, pa.string()),
            "vector": _list_array(outputs.prompts.embeddings),
        },
        "no_prompt": {
            "query": pa.array([row[0] for row in known], pa.string()),
            "sample": pa.array([row[1] for row in known], pa.int32()),
            "sentence": pa.array([row[2] for row in known], pa.string()),
        },
    }
    for name, content in columns.items():
        pq.write_table(pa.table(content), folder / f"{name}.parquet", compression="zstd")


def _list_array(matrix: FloatArray) -> Any:
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(matrix, dtype=np.float32).ravel(), pa.float32())
    return pa.FixedSizeListArray.from_arrays(flat, matrix.shape[1])


def _card(described: Mapping[str, Any]) -> str:
    pairs, whole = described["pairs"], described["queries"] * described["prompts"]
    covered = "every (query, prompt)" if pairs == whole else f"{pairs:,} of {whole:,} (query, prompt)"
    told = {
        name: value if isinstance(value, str) and "\n" not in value else json.dumps(value, ensure_ascii=False)
        for name, value in described["facts"].items()
    }
    facts = "\n".join(f"- {name}: {value}" for name, value in told.items())
    return f"""# Frozen sentences

{described["samples"]} sentences of {covered}: {described["queries"]:,} queries, {described["prompts"]:,} prompts.
Each was drawn independently from the language model below, with randomness derived from the model, the seed
{described["seed"]}, the request and the number of the sentence.

## What wrote them

{facts}

## Use

    gym.make("OffPrompts-MovieLens-v0", sentences="THIS FOLDER")

needs no language model. Rewards, values and the oracle are those of the table: expectations over the
{described["samples"]} sentences, not over the model; for a smooth reward they differ from the model's by a standard
error of about `sd / sqrt({described["samples"]})` in each (query, prompt).

`table.json` has a SHA-256 of every file. Sentences about movies of MovieLens come under its licence.
"""
