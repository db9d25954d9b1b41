"""Frozen sentence tables: K sentences of each (query, prompt) in a folder, and a world that needs no language model.

    table.json              what it is, and a checksum of every other file
    sentences.parquet       query, prompt, sample, sentence; prompts by number
    embeddings.npy          one row a sentence, (R, d_o) float32
    queries.parquet         query, vector
    prompts.parquet         prompt, vector
    no_prompt.parquet       query, sample, sentence: references of a continuous reward
    CARD.md                 the same for people

A table is what a :class:`~offprompts_env.text.cache.SampleTable` with as many slots and the same seed would write:
replaying it with replacement gives, for the same random numbers, the very sentences of that table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from offprompts_env.config import check_integer
from offprompts_env.errors import ConfigError, DataError, StorageError
from offprompts_env.folders import difference, sha256_of
from offprompts_env.text.prompted import query_texts, text_column
from offprompts_env.types import Array, Contexts, FloatArray, IntArray, Outputs, PromptSet, check_actions

if TYPE_CHECKING:
    from offprompts_env.text.encoder import Encoder
    from offprompts_env.text.language_model import Randomness

FORMAT_VERSION = 1
MANIFEST = "table.json"

# Files that a table is read from; each must have its checksum in the manifest.
_FILES = ("sentences.parquet", "embeddings.npy", "queries.parquet", "prompts.parquet", "no_prompt.parquet")

# Sentences of a table that are encoded together.
_BLOCK = 64


@dataclass(frozen=True, eq=False)
class FrozenTable:
    """K sentences of each covered (query, prompt).

    Attributes:
        prompts: the catalogue, with texts.
        queries: query texts, n_q of them.
        query_vectors: (n_q, d_q).
        first: row of the first of the K sentences of each (query, prompt), (n_q, A); −1 where it is not covered. The
            others follow it.
        samples: K.
        sentences: R of them.
        embeddings: (R, d_o).
        no_prompt: reference sentences of each query.
        facts: what is known of the model that wrote it.
        checksum: SHA-256 of ``table.json``, which has those of all other files.
    """

    prompts: PromptSet
    queries: tuple[str, ...]
    query_vectors: FloatArray
    first: IntArray
    samples: int
    sentences: Array
    embeddings: FloatArray
    no_prompt: Mapping[str, tuple[str, ...]]
    facts: Mapping[str, Any]
    checksum: str

    @property
    def complete(self) -> bool:
        """Whether every (query, prompt) is covered."""
        return bool((self.first >= 0).all())

    def leading(self, n_prompts: int) -> FrozenTable:
        """Return the table of the first prompts only.

        Raises:
            ConfigError: there are fewer.
        """
        if not 1 <= n_prompts <= len(self.prompts):
            raise ConfigError(f"n_prompts: expected 1 to {len(self.prompts)}, what the table has, got {n_prompts}")
        texts = None if self.prompts.texts is None else self.prompts.texts[:n_prompts]
        prompts = PromptSet(self.prompts.embeddings[:n_prompts], texts)
        return FrozenTable(**{**vars(self), "prompts": prompts, "first": self.first[:, :n_prompts]})

    @classmethod
    def load(cls, path: str | Path) -> FrozenTable:
        """Read the table in the folder `path`, after checking every file.

        Raises:
            StorageError: there is none, a file is missing or differs from its checksum, files do not fit together, or
                the format is newer.
        """
        import pyarrow.parquet as pq

        folder = Path(path)
        try:
            described = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            version, files = int(described["format_version"]), described["files"]
            facts, pairs, samples = described["facts"], int(described["pairs"]), int(described["samples"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"frozen sentences: expected a folder with {MANIFEST} at {folder}, but {error!r}; make one with "
                "'offprompts freeze', or check the path"
            ) from error
        if version > FORMAT_VERSION:
            raise StorageError(
                f"frozen sentences: {folder} has format version {version}, this package reads up to {FORMAT_VERSION}; "
                "update offprompts-env"
            )
        if unlisted := [name for name in _FILES if name not in files]:
            raise StorageError(
                f"frozen sentences: expected {MANIFEST} in {folder} to list {', '.join(_FILES)}, but it lacks "
                f"{', '.join(unlisted)}; download or export it again"
            )
        for name, expected in files.items():
            if (found := difference(folder / name, expected)) is not None:
                raise StorageError(f"frozen sentences: {folder / name}: {found}; download or export it again")
        tables = {
            name: pq.read_table(folder / f"{name}.parquet") for name in ("sentences", "queries", "prompts", "no_prompt")
        }
        queries = tuple(tables["queries"]["query"].to_pylist())
        texts = tuple(tables["prompts"]["prompt"].to_pylist())
        embeddings = np.load(folder / "embeddings.npy", allow_pickle=False)
        rows = (len(tables["sentences"]), len(embeddings))
        if rows != (pairs * samples,) * 2:
            raise StorageError(
                f"frozen sentences: expected {pairs} × {samples} sentences and embeddings in {folder}, got {rows[0]} "
                f"and {rows[1]}; download or export it again"
            )
        first = np.full((len(queries), len(texts)), -1, dtype=np.int64)
        place = {query: row for row, query in enumerate(queries)}
        asked = tables["sentences"]["query"].combine_chunks().to_pylist()[::samples]
        chosen = tables["sentences"]["prompt"].to_numpy()[::samples]
        first[[place[query] for query in asked], chosen] = samples * np.arange(pairs)
        known: dict[str, tuple[str, ...]] = {}
        for query, sentence in zip(*(tables["no_prompt"][c].to_pylist() for c in ("query", "sentence")), strict=True):
            known[query] = (*known.get(query, ()), sentence)
        return cls(
            PromptSet(_vectors(tables["prompts"]), texts),
            queries,
            _vectors(tables["queries"]),
            first,
            samples,
            text_column(tables["sentences"]["sentence"].to_pylist()),
            embeddings,
            known,
            facts,
            sha256_of(folder / MANIFEST),
        )


def checksum_of(path: str | Path) -> str:
    """Return the checksum of the table in the folder `path`; see :class:`FrozenTable`.

    Raises:
        StorageError: there is none.
    """
    manifest = Path(path) / MANIFEST
    if not manifest.is_file():
        raise StorageError(
            f"frozen sentences: expected a folder with {MANIFEST} at {path}, found none; make one with "
            "'offprompts freeze', or check the path"
        )
    return sha256_of(manifest)


class FrozenSentences:
    r"""Replays a frozen table: an output model without a language model.

    *With replacement* a round draws one of the K sentences of its (query, prompt) uniformly, with the i-th uniform of
    the generator for row i: ``P(s_k) = 1/K``, independent over rounds given the table.

    *Without replacement* the K sentences of a (query, prompt) come in a random order before any comes again: of the
    m that are left in the current pass, each has the chance ``1/m``. Every single draw still has ``P(s_k) = 1/K``, but
    draws of one (query, prompt) depend on each other: the mean reward of n ≤ K of them has the variance
    ``Var_k[r(s_k)] / n · (K − n) / (K − 1)`` around the mean of the table, none for n = K; and over tables, the K draws
    of a pass are K independent sentences of the model, which those with replacement are not.

    That holds for what is *played* (:meth:`deal`): rounds of an environment, recordings. :meth:`sample`, which
    learners and evaluations call, always draws with replacement, is a function of its arguments, and leaves the
    passes alone. What is left of a pass is kept by this object, whoever plays (a vector environment is one object),
    until :meth:`restart`. So ``reset(seed=...)`` alone does not repeat rounds, and the environment says that it is not
    reproducible. A log of :func:`~offprompts_env.collect` is: each begins with a restart, and one that is continued
    with what its rows used up.

    Args:
        table: the sentences.
        replacement: whether what is played is drawn with replacement.
    """

    deterministic = False

    def __init__(self, table: FrozenTable, *, replacement: bool = True) -> None:
        self.table, self.replacement = table, replacement
        self._place = {query: row for row, query in enumerate(table.queries)}
        self._left: dict[int, list[int]] = {}

    @property
    def prompts(self) -> PromptSet:
        """The catalogue that actions index."""
        return self.table.prompts

    @property
    def output_dim(self) -> int:
        """``d_o``."""
        return int(self.table.embeddings.shape[1])

    @property
    def outcomes(self) -> int:
        """K."""
        return self.table.samples

    @property
    def fingerprint(self) -> str:
        """Checksum of the table."""
        return self.table.checksum

    @property
    def reproducible(self) -> bool:
        """Whether the same random numbers give the same rounds when played."""
        return self.replacement

    def restart(self) -> None:
        """Begin every pass anew."""
        self._left.clear()

    def sample(self, contexts: Contexts, actions: IntArray, rng: np.random.Generator) -> Outputs:
        """Draw one sentence a round, with replacement.

        Raises:
            DataError: contexts have no query text, or the table does not cover a (query, prompt).
            ActionError: an action is not a prompt.
        """
        first = self._first(contexts, actions)
        return self._outputs(first + (rng.random(len(first)) * self.table.samples).astype(np.int64))

    def deal(self, contexts: Contexts, actions: IntArray, rng: np.random.Generator) -> Outputs:
        """Draw one sentence a round to be played: the next of its pass without replacement.

        Raises:
            DataError: as :meth:`sample`.
            ActionError: the same.
        """
        if self.replacement:
            return self.sample(contexts, actions, rng)
        first = self._first(contexts, actions)
        uniforms = rng.random(len(first))
        rows = np.empty_like(first)
        for index, (start, uniform) in enumerate(zip(first.tolist(), uniforms.tolist(), strict=True)):
            left = self._left.get(start)
            if not left:
                left = self._left[start] = list(range(self.table.samples))
            drawn = start + left[int(uniform * len(left))]
            rows[index] = drawn
            self._take(start, left, self.table.sentences[drawn])
        return self._outputs(rows)

    def remember(self, contexts: Contexts, actions: IntArray, outputs: Outputs) -> None:
        """Take the sentences in `outputs` as dealt, in this order: what is dealt next goes on from there.

        Raises:
            DataError: a sentence is not one that was left of its (query, prompt); or as :meth:`sample`.
        """
        if outputs.text is None:
            raise DataError("outputs: expected the sentences that were dealt, got none; pass outputs with text")
        for row, start in enumerate(self._first(contexts, actions).tolist()):
            left = self._left.get(start) or list(range(self.table.samples))
            self._left[start] = left
            self._take(start, left, outputs.text[row])

    def _take(self, start: int, left: list[int], sentence: str) -> None:
        """Strike the first one equal to `sentence`: what is left is then known from the texts dealt, copies or not."""
        for place, k in enumerate(left):
            if self.table.sentences[start + k] == sentence:
                del left[place]
                return
        raise DataError(
            f"frozen sentences: expected one of the {len(left)} sentences that were left of their pass, got "
            f"{sentence!r}; remember rounds of this table, played without replacement, from the first one on"
        )

    def outcome(self, contexts: Contexts, actions: IntArray, k: int) -> Outputs:
        """Return sentence k of each round.

        Raises:
            ConfigError: k is not in [0, K).
            DataError: as :meth:`sample`.
        """
        check_integer("k", k, 0, self.table.samples - 1)
        return self._outputs(self._first(contexts, actions) + k)

    def _outputs(self, rows: IntArray) -> Outputs:
        return Outputs(self.table.embeddings[rows], self.table.sentences[rows])

    def _first(self, contexts: Contexts, actions: IntArray) -> IntArray:
        actions = check_actions(actions, len(self.prompts), len(contexts))
        texts = query_texts(contexts)
        places = np.fromiter((self._place.get(text, -1) for text in texts), dtype=np.int64, count=len(texts))
        rows = self.table.first[places, actions]
        wrong = np.flatnonzero((places < 0) | (rows < 0))
        if len(wrong):
            row = int(wrong[0])
            prompt = int(actions[row])
            name = "" if self.prompts.texts is None else f" {self.prompts.texts[prompt]!r}"
            raise DataError(
                f"frozen sentences: expected sentences about {texts[row]!r:.200} with prompt {prompt}{name}, but the "
                f"table has none ({len(wrong)} such rounds); export the product of queries and prompts, or such a log"
            )
        return rows


class FrozenStates:
    """An encoder that encodes each sentence of a table once, and always among the same neighbours.

    A matrix product rounds differently in batches of another shape. As sentences are encoded by fixed blocks of rows
    of the table, what a state is depends neither on who asked for it first nor on what was asked with it.

    Args:
        encoder: encodes; also texts that are not in the table.
        table: the sentences.
    """

    def __init__(self, encoder: Encoder, table: FrozenTable) -> None:
        self.encoder, self.table = encoder, table
        self._row = {text: row for row, text in reversed(list(enumerate(table.sentences.tolist())))}
        self._blocks: dict[int, FloatArray] = {}

    @property
    def dim(self) -> int:
        """Length of a state."""
        return self.encoder.dim

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """Return one state a text, (n, dim) float32."""
        rows = [self._row.get(text, -1) for text in texts]
        states = np.empty((len(rows), self.dim), dtype=np.float32)
        for position, row in enumerate(rows):
            if row >= 0:
                states[position] = self._block(row // _BLOCK)[row % _BLOCK]
        foreign = [position for position, row in enumerate(rows) if row < 0]
        if foreign:
            states[foreign] = self.encoder.encode([texts[position] for position in foreign])
        return states

    def _block(self, number: int) -> FloatArray:
        if number not in self._blocks:
            sentences = self.table.sentences[number * _BLOCK : (number + 1) * _BLOCK]
            self._blocks[number] = self.encoder.encode(sentences.tolist())
        return self._blocks[number]


class Unwritten:
    """Stands for the language model of a frozen table: whatever is not in the table cannot be written any more."""

    deterministic = True

    def __init__(self, fingerprint: str) -> None:
        self.fingerprint = fingerprint

    def generate(self, prompts: Sequence[str], rng: Randomness) -> list[str]:
        """Refuse.

        Raises:
            DataError: always.
        """
        raise DataError(
            f"frozen sentences: expected {prompts[0]!r:.200} to be answered in the table, found fewer sentences "
            "without a prompt than baseline_samples; ask for fewer, or export more"
        )


def _vectors(table: Any) -> FloatArray:
    column = table["vector"].combine_chunks()
    return np.asarray(column.flatten()).reshape(len(column), -1)
