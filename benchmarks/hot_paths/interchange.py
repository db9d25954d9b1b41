"""The speed of taking logs out to other tools' formats and bringing them in."""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path

import numpy as np

import offprompts_env as op
from benchmarks.hot_paths.timing import Figure, seconds
from offprompts_env.interchange import (
    from_huggingface,
    from_json_lines,
    from_parquet,
    to_huggingface,
    to_json_lines,
    to_parquet,
)


def interchange(rows: int = 1 << 19) -> list[Figure]:
    """Rows a second in and out of Parquet, JSON lines and Hugging Face datasets."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        numbers, sentences = make_log(rows, sentences=False), make_log(rows, sentences=True)
        return [
            *_parquet("numbers", numbers, Path(folder)),
            *_parquet("with sentences", sentences, Path(folder)),
            *_json_lines(sentences.take(slice(0, rows // 8)), Path(folder)),
            *_huggingface(sentences),
        ]


def make_log(rows: int, *, sentences: bool) -> op.LoggedDataset:
    """Return a log of ten floats, action, propensity and reward a row, and a sentence of 60 characters if wished."""
    rng = np.random.default_rng(0)
    words = [f"A film number {i} that you may like, or {i % 977} others".ljust(60, ".") for i in range(rows)]
    return op.LoggedDataset(
        context=rng.standard_normal((rows, 5), dtype=np.float32),
        query=rng.standard_normal((rows, 5), dtype=np.float32),
        action=rng.integers(1000, size=rows),
        propensity=1 - rng.random(rows),
        reward=rng.standard_normal(rows, dtype=np.float32),
        output=np.empty((rows, 0), dtype=np.float32),
        prompts=op.PromptSet(rng.standard_normal((1000, 5))),
        sentence=np.array(words, dtype=object) if sentences else None,
    )


def _parquet(name: str, log: op.LoggedDataset, folder: Path) -> list[Figure]:
    import pyarrow.parquet as pq

    file, bare = folder / "log.parquet", folder / "bare.parquet"
    n = len(log)
    written = n / seconds(lambda: to_parquet(log, file), 3)
    read = n / seconds(lambda: from_parquet(file), 3)
    table = pq.read_table(file)
    plain = ["action"]
    writing = n / seconds(lambda: pq.write_table(table, bare, use_dictionary=plain, write_statistics=False), 3)
    reading = n / seconds(lambda: pq.read_table(file), 3)
    return [
        Figure(f"to Parquet, {name}", written, "rows/s", "higher", 1e6, writing, "writing its table with pyarrow"),
        Figure(f"from Parquet, {name}", read, "rows/s", "higher", 1e6, reading, "reading its table with pyarrow"),
    ]


def _json_lines(log: op.LoggedDataset, folder: Path) -> list[Figure]:
    file = folder / "log.jsonl"
    n = len(log)
    written = n / seconds(lambda: to_json_lines(log, file), 3)
    read = n / seconds(lambda: from_json_lines(file, log.prompts), 3)
    lines = file.read_bytes().splitlines()
    records = [json.loads(line) for line in lines]
    writing = n / seconds(lambda: [json.dumps(record) for record in records], 3)
    reading = n / seconds(lambda: [json.loads(line) for line in lines], 3)
    return [
        Figure("to JSON lines", written, "rows/s", "higher", 2e5, writing, "json.dumps of its lines"),
        Figure("from JSON lines", read, "rows/s", "higher", 5e4, reading, "json.loads of its lines"),
    ]


def _huggingface(log: op.LoggedDataset) -> list[Figure]:
    dataset = to_huggingface(log)
    n = len(log)
    made = n / seconds(lambda: to_huggingface(log), 3)
    read = n / seconds(lambda: from_huggingface(dataset), 3)
    table = dataset.data.table
    texts = table.column("sentence")
    objects = n / seconds(lambda: texts.to_numpy(), 3)
    words = log.sentence if log.sentence is not None else np.empty(0)

    def to_arrow() -> object:
        import pyarrow as pa

        return pa.array(words, type=pa.large_string())

    return [
        Figure("to a Hugging Face dataset", made, "rows/s", "higher", 1e6, n / seconds(to_arrow, 3),
               "its sentences into Arrow"),
        Figure("from a Hugging Face dataset", read, "rows/s", "higher", 1e6, objects, "its sentences out of Arrow"),
    ]  # fmt: skip
