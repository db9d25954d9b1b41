"""The Parquet side of a log: which columns its rows have, and their encoding.

Vectors are FixedSizeList<float32>; actions take the smallest integer type that fits the catalogue. All encodings are
lossless: byte-stream-split and zstd for floating point numbers, dictionaries for integers and text.
"""

from __future__ import annotations

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


def concatenate(parts: Sequence[LoggedDataset], metadata: LogMetadata) -> LoggedDataset:
    """Return the rows of `parts`, which have the same columns and prompts, as one dataset."""
    columns = {name: np.concatenate([_values(part, name) for part in parts]) for name in column_types(parts[0])}
    return make_dataset(columns, parts[0].prompts, metadata)


def _values(log: LoggedDataset, name: str) -> Array:
    return np.asarray(log.oracle.expected_reward if name == _ORACLE and log.oracle else getattr(log, name))


def make_dataset(columns: Mapping[str, Array], prompts: PromptSet, metadata: LogMetadata) -> LoggedDataset:
    """Return the dataset of `columns`; the oracle's column goes to its separate field."""
    rest = {name: values for name, values in columns.items() if name != _ORACLE}
    oracle = Oracle(columns[_ORACLE]) if _ORACLE in columns else None
    return LoggedDataset(**rest, prompts=prompts, oracle=oracle, metadata=metadata)


def count_characters(log: LoggedDataset) -> int:
    """Return the amount of text in `log`, or say which row is not text that a file can hold."""
    total = 0
    for name in ("sentence", "query_text"):
        texts = getattr(log, name)
        if texts is None:
            continue
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"{name}: expected text, got {text!r} in row {row}; record '' where there is none")
            total += len(text)
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:
            row = next(row for row, text in enumerate(texts) if _is_broken(text))
            raise DataError(
                f"{name}: expected valid Unicode, got {texts[row][:80]!r} in row {row} with a lone surrogate; "
                "replace it before recording"
            ) from error
    return total


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
    arrays = []
    for column in schema:
        values = np.concatenate([_values(part, column.name) for part in parts])
        if values.ndim == 2:
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), type=column.type))
        elif values.dtype == object:
            arrays.append(pa.array(values, type=column.type))
        else:
            arrays.append(pa.array(values.astype(column.type.to_pandas_dtype(), copy=False)))
    floats = {name: kind for name, kind in types.items() if kind.startswith("float")}
    leaves = {name: f"{name}.list.element" if _VECTOR.fullmatch(kind) else name for name, kind in floats.items()}
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table(arrays, schema=schema.with_metadata(stamp)),
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
        table = pq.read_table(pa.BufferReader(content))
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"{file}: expected a Parquet file, cannot read it: {error}; {REPAIR}") from error
    schema, expected = table.schema.remove_metadata(), _arrow_schema(types)
    if schema != expected:
        raise StorageError(f"{file}: expected columns ({_one_line(expected)}), got ({_one_line(schema)}); {REPAIR}")
    columns: dict[str, Array] = {}
    for name, kind in types.items():
        vector = _VECTOR.fullmatch(kind)
        if kind == "float32[0]":
            columns[name] = np.empty((table.num_rows, 0), dtype=np.float32)
        elif vector:
            flat = table.column(name).combine_chunks().flatten()
            columns[name] = flat.to_numpy(zero_copy_only=False).reshape(-1, int(vector[1]))
        else:
            columns[name] = table.column(name).to_numpy()
    columns["action"] = columns["action"].astype(np.int64, copy=False)
    return columns


def _one_line(schema: pa.Schema) -> str:
    return ", ".join(f"{column.name}: {column.type}" for column in schema)
