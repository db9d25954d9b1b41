"""The Parquet side of a log: which columns its rows have, and their encoding.

Vectors are FixedSizeList<float32>; actions take the smallest integer type that fits the catalogue. All encodings are
lossless: byte-stream-split and zstd for floating point numbers, dictionaries for integers and text.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from offprompts_env.errors import DataError, StorageError
from offprompts_env.types import Array, LoggedDataset, LogMetadata, Oracle, PromptSet

if TYPE_CHECKING:
    import pyarrow as pa

REPAIR = "restore it from a copy, or record the log again"
_ORACLE = "expected_reward"
_TEXTS = ("sentence", "query_text")
_VECTOR = re.compile(r"float32\[(\d+)\]")


def column_types(log: LoggedDataset) -> dict[str, str]:
    """Return the columns of `log`: name to type, e.g. ``float32[5]``, ``int16``, ``float64`` or ``string``."""
    types = {name: f"float32[{getattr(log, name).shape[1]}]" for name in ("context", "query", "output")}
    types["action"] = next(t for t in ("int8", "int16", "int32", "int64") if log.n_prompts <= np.iinfo(t).max + 1)
    types |= {"propensity": "float64", "reward": "float32"}
    optional = {"user_id": "int64", "item_id": "int64", "query_text": "string", "sentence": "string"}
    types |= {name: kind for name, kind in optional.items() if getattr(log, name) is not None}
    if log.oracle is not None:
        types[_ORACLE] = "float32"
    return types


def value_bytes(kind: str) -> int:
    """Return the memory that a value of a column of type `kind` takes, a text being taken for 1 KiB."""
    if kind == "string":
        return 1 << 10
    if vector := _VECTOR.fullmatch(kind):
        return 4 * int(vector[1])
    # Whatever integer an action is stored as, it is an int64 in memory.
    return 8 if kind.startswith("int") else np.dtype(kind).itemsize


def concatenate(parts: Sequence[LoggedDataset], metadata: LogMetadata) -> LoggedDataset:
    """Return the rows of `parts`, which have the same columns and prompts, as one dataset."""
    columns = {name: np.concatenate([_values(part, name) for part in parts]) for name in column_types(parts[0])}
    return make_dataset(columns, parts[0].prompts, metadata)


class Batches:
    """Batches in order, to be joined later; runs of small ones are joined at once, as each costs kilobytes."""

    _RUN = 256
    _SMALL = 256

    def __init__(self, parts: list[LoggedDataset] | None = None) -> None:
        self.parts = parts if parts is not None else []
        self._loose = 0

    def append(self, part: LoggedDataset) -> None:
        """Add a batch at the end."""
        self.parts.append(part)
        self._loose = self._loose + 1 if len(part) < self._SMALL else 0
        if self._loose == self._RUN:
            self.parts[-self._RUN :] = [concatenate(self.parts[-self._RUN :], part.metadata)]
            self._loose = 0


def _values(log: LoggedDataset, name: str) -> Array:
    return np.asarray(log.oracle.expected_reward if name == _ORACLE and log.oracle else getattr(log, name))


def make_dataset(columns: Mapping[str, Array], prompts: PromptSet, metadata: LogMetadata) -> LoggedDataset:
    """Return the dataset of `columns`; the oracle's column goes to its separate field."""
    rest = {name: values for name, values in columns.items() if name != _ORACLE}
    oracle = Oracle(columns[_ORACLE]) if _ORACLE in columns else None
    return LoggedDataset(**rest, prompts=prompts, oracle=oracle, metadata=metadata)


def check_texts(log: LoggedDataset) -> None:
    """Raise :class:`DataError` for a row whose sentence or query is not text that a file can hold."""
    for name in _TEXTS:
        texts = getattr(log, name)
        if texts is None:
            continue
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"{name}: expected text, got {text!r} in row {row}; record '' where there is none")
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:
            row = next(row for row, text in enumerate(texts) if _is_broken(text))
            raise DataError(
                f"{name}: expected valid Unicode, got {texts[row][:80]!r} in row {row} with a lone surrogate; "
                "replace it before recording"
            ) from error


def count_characters(log: LoggedDataset) -> int:
    """Return the amount of text in `log`."""
    columns = (getattr(log, name) for name in _TEXTS)
    return sum(sum(map(len, texts)) for texts in columns if texts is not None)


def _is_broken(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _arrow_schema(columns: Mapping[str, str]) -> pa.Schema:
    """Return the Arrow schema; a vector of dimension 0 has no column."""
    import pyarrow as pa

    def arrow_type(kind: str) -> pa.DataType:
        vector = _VECTOR.fullmatch(kind)
        if vector:
            return pa.list_(pa.field("element", pa.float32(), nullable=False), int(vector[1]))
        # Offsets of 64 bits: a shard may hold more than 2 GiB of text.
        return pa.large_string() if kind == "string" else pa.type_for_alias(kind)

    stored = {name: kind for name, kind in columns.items() if kind != "float32[0]"}
    return pa.schema([pa.field(name, arrow_type(kind), nullable=False) for name, kind in stored.items()])


def encode(parts: Sequence[LoggedDataset], types: Mapping[str, str], stamp: Mapping[str, str]) -> memoryview:
    """Return the rows of `parts` as the bytes of a Parquet file with columns `types`, marked with `stamp`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _arrow_schema(types)
    arrays = [
        _to_arrow(np.concatenate([_values(part, column.name) for part in parts]), types[column.name], column.type)
        for column in schema
    ]
    floats = {name: kind for name, kind in types.items() if kind.startswith("float")}
    leaves = {name: f"{name}.list.element" if _VECTOR.fullmatch(kind) else name for name, kind in floats.items()}
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.Table.from_arrays(arrays, schema=schema.with_metadata(stamp)),
        sink,
        compression="zstd",
        compression_level=1,
        use_dictionary=[name for name in schema.names if name not in floats],
        column_encoding=dict.fromkeys((leaves[name] for name in floats if name in schema.names), "BYTE_STREAM_SPLIT"),
        write_statistics=False,
    )
    return memoryview(sink.getvalue())


def decode(content: bytes, types: Mapping[str, str], file: Path) -> dict[str, Array]:
    """Return the columns of a Parquet file whose bytes are `content`; `file` is for messages.

    Raises:
        StorageError: this is not a Parquet file, or not one with columns `types`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(pa.BufferReader(content)).read()
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"{file}: expected a Parquet file, cannot read it: {error}; {REPAIR}") from error
    schema, expected = table.schema.remove_metadata(), _arrow_schema(types)
    if schema != expected:
        raise StorageError(f"{file}: expected columns ({_one_line(expected)}), got ({_one_line(schema)}); {REPAIR}")
    columns = {name: _from_arrow(table, name, kind) for name, kind in types.items()}
    columns["action"] = columns["action"].astype(np.int64, copy=False)
    return columns


# Buffers instead of pyarrow's own conversions, because those import pandas, which takes longer than writing a shard.


def _to_arrow(values: Array, kind: str, arrow_type: pa.DataType) -> pa.Array:
    import pyarrow as pa

    if kind == "string":
        encoded = [text.encode() for text in values]
        offsets = np.zeros(len(values) + 1, dtype=np.int64)
        np.cumsum([len(text) for text in encoded], out=offsets[1:])
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))]
        return pa.Array.from_buffers(arrow_type, len(values), buffers)
    if values.ndim == 2:
        flat = pa.Array.from_buffers(pa.float32(), values.size, [None, pa.py_buffer(values.ravel())])
        return pa.FixedSizeListArray.from_arrays(flat, type=arrow_type)
    return pa.Array.from_buffers(arrow_type, len(values), [None, pa.py_buffer(values.astype(kind, copy=False))])


def _from_arrow(table: pa.Table, name: str, kind: str) -> Array:
    vector = _VECTOR.fullmatch(kind)
    if vector and vector[1] == "0":
        return np.empty((table.num_rows, 0), dtype=np.float32)
    array = table.column(name).combine_chunks()
    if kind == "string":
        offsets = np.frombuffer(
            array.buffers()[1], dtype=np.int64, count=len(array) + 1, offset=8 * array.offset
        ).tolist()
        content = array.buffers()[2].to_pybytes() if array.buffers()[2] is not None else b""
        texts = np.empty(len(array), dtype=object)
        texts[:] = [content[i:j].decode() for i, j in itertools.pairwise(offsets)]
        return texts
    if vector:
        array = array.flatten()
    dtype = np.dtype("float32" if vector else kind)
    values = np.frombuffer(array.buffers()[1], dtype=dtype, count=len(array), offset=dtype.itemsize * array.offset)
    return values.reshape(-1, int(vector[1])) if vector else values


def _one_line(schema: pa.Schema) -> str:
    return ", ".join(f"{column.name}: {column.type}" for column in schema)
