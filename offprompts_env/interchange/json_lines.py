"""Logged datasets from and to JSON lines, as services log them: one JSON object a round.

Lines are parsed by Python's own parser: it is the slow part, but Arrow's crashes on deeply nested input, and a log may
hold whatever its users sent.
"""

from __future__ import annotations

import gzip
import json
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Unpack, cast

import numpy as np
import numpy.typing as npt

from offprompts_env.columns import check_texts
from offprompts_env.errors import DataError, StorageError
from offprompts_env.interchange.common import whole_file
from offprompts_env.interchange.files import Files, find_files
from offprompts_env.interchange.header import choose_prompts
from offprompts_env.interchange.tables import Block, Columns, Fields, distinct_prompts, join, resolve
from offprompts_env.types import Array, LoggedDataset, LogMetadata, PromptSet

if TYPE_CHECKING:
    import pyarrow as pa

# Bytes of a line; what is longer is no log of rounds.
LONGEST_LINE = 1 << 24
_ROWS = 1 << 14
_DECODE = json.JSONDecoder().decode


def from_json_lines(
    files: Files,
    prompts: PromptSet | Sequence[str] | None = None,
    *,
    embeddings: npt.ArrayLike | None = None,
    metadata: LogMetadata | None = None,
    **columns: Unpack[Columns],
) -> LoggedDataset:
    """Make a dataset from files with one JSON object a line; ``.gz`` files are unpacked, blank lines skipped.

    Columns are keys, or paths into nested objects: ``context="user.features"``. A key that is absent or null is unknown
    as a propensity, and an error elsewhere. Keys that are not needed may hold anything.

    Args:
        files: a file, a directory, a glob pattern, or paths; see :func:`offprompts_env.interchange.files.find_files`.
        prompts: the catalogue, or its texts together with `embeddings`; None takes the distinct texts of the action
            key, sorted, one-hot unless `embeddings` are passed, which reads the files twice.
        embeddings: (A, d_e), where `prompts` are texts.
        metadata: provenance.
        columns: which key is what; see :class:`offprompts_env.interchange.tables.Columns`.

    Raises:
        StorageError: a file is missing, or cannot be unpacked.
        DataError: a line is no JSON object, a key is missing, or a value has the wrong type, length or range; the
            message names key, line (counted from 1) and file, expected and actual.
        ActionError: an action is not in the catalogue.
        ConfigError: `columns` has an unknown field.

    Warns:
        UserWarning: two files have the same content.
    """
    found = find_files(files, ".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
    wanted = Fields.of(columns)
    catalogue = choose_prompts(
        prompts, embeddings, None, lambda: distinct_prompts(_blocks(found, wanted, actions_only=True), embeddings)
    )
    return join(_blocks(found, wanted), catalogue, metadata if metadata is not None else LogMetadata(), str(files))


def to_json_lines(log: LoggedDataset, path: str | Path) -> Path:
    """Write one JSON object a round, packed if `path` ends with ``.gz``; return the path.

    Its keys are those of the dataset, ``prompt`` with the text of the action, and ``expected_reward`` for the oracle.
    An unknown propensity is null. ``from_json_lines(path, log.prompts)`` reads the same numbers back. A
    file at `path` is replaced when the new one is whole.

    Raises:
        DataError: a text is not valid Unicode.
        StorageError: the file cannot be written.

    Warns:
        UserWarning: prompt embeddings and provenance are not in the file.
    """
    target = Path(path)
    check_texts(log)
    with whole_file(target) as handle:
        if target.suffix == ".gz":
            # Without name and time, so that the same log gives the same bytes.
            with gzip.GzipFile(filename="", fileobj=handle, mode="wb", mtime=0) as packed:
                _write(log, cast(BinaryIO, packed))
        else:
            _write(log, handle)
    warnings.warn(
        f"{target}: lines hold rounds only, without prompt embeddings and provenance; pass prompts=log.prompts when "
        "you read it, or use to_parquet",
        stacklevel=2,
    )
    return target


# ------------------------------------------------------------------------------------------------------------ reading


def _blocks(files: Sequence[Path], wanted: Fields, *, actions_only: bool = False) -> Iterator[Block]:
    import pyarrow as pa

    for file in files:
        lines = _lines(file)
        while read := list(islice(lines, _ROWS)):
            numbers, rows = zip(*read, strict=True)
            place = partial(_place, file, numbers)
            keys = {key for names in set(map(tuple, rows)) for key in names}
            # Paths into nested objects are taken for columns of that name from here on.
            names = sorted(keys | {name for name in wanted.named() if "." in name and _is_path(name, rows)})
            schema = pa.schema([(name, pa.null()) for name in names])
            layout = resolve(schema, wanted, f"{file} (lines {numbers[0]} to {numbers[-1]})")
            if actions_only:
                layout = {"action": layout["action"]}
            sources = {source for found in layout.values() for source in found}
            table = pa.table({source: _array(source, rows, keys, place) for source in sources})
            yield Block(table, layout, place)


def _place(file: Path, numbers: Sequence[int], row: int) -> str:
    return f"line {numbers[row]} of {file}"


def _lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line numbers, from 1, and the objects there."""
    number = 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as handle:
            for number, line in enumerate(iter(partial(handle.readline, LONGEST_LINE + 1), b""), start=1):
                if not line.isspace():
                    yield number, _parse(line, number, file)
    except (OSError, EOFError, zlib.error) as error:
        raise StorageError(f"{file}: cannot read after line {number}: {error}; restore it from a copy") from error


def _parse(line: bytes, number: int, file: Path) -> dict[str, Any]:
    if len(line) > LONGEST_LINE:
        raise DataError(
            f"expected at most {LONGEST_LINE:,} bytes, got more in line {number} of {file}; write one object a line"
        )
    try:
        found = _DECODE(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"expected a JSON object, cannot read line {number} of {file}: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"expected a JSON object, got {_short(found)} in line {number} of {file}")
    return found


def _is_path(name: str, rows: Sequence[dict[str, Any]]) -> bool:
    first, *rest = name.split(".")
    for row in rows:
        value = row.get(first)
        for part in rest:
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            return True
    return False


def _array(source: str, rows: Sequence[dict[str, Any]], keys: set[str], place: Callable[[int], str]) -> pa.Array:
    """Return what all rows have at a key or path, null where there is nothing."""
    values: list[Any]
    if source in keys:
        values = [row.get(source) for row in rows]
    else:
        first, *rest = source.split(".")
        values = [row.get(first) for row in rows]
        for part in rest:
            values = [value.get(part) if isinstance(value, dict) else None for value in values]
    return _as_array(source, values, place)


def _as_array(source: str, values: list[Any], place: Callable[[int], str]) -> pa.Array:
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, TypeError, UnicodeEncodeError):
        pass
    # Something does not fit: say what and where.
    given = next(value for value in values if value is not None)
    for row, value in enumerate(values):
        try:
            pa.array([given, value])
        except (pa.ArrowException, OverflowError, TypeError, UnicodeEncodeError) as error:
            raise DataError(
                f"{source}: expected values of one kind, such as {_short(given)}, got {_short(value)} in {place(row)}; "
                "repair or drop that line"
            ) from error
    raise DataError(f"{source}: expected values of one kind in the lines from {place(0)} on; repair or drop some")


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


# ------------------------------------------------------------------------------------------------------------ writing


def _write(log: LoggedDataset, handle: BinaryIO) -> None:
    encode = json.JSONEncoder(ensure_ascii=False).encode
    prompts = None if log.prompts.texts is None else np.array([encode(t) for t in log.prompts.texts], dtype=object)
    for start in range(0, len(log), _ROWS):
        handle.write(_as_lines(log.take(slice(start, start + _ROWS)), prompts, encode))


def _as_lines(log: LoggedDataset, prompts: Array | None, encode: Callable[[str], str]) -> memoryview:
    """Return the lines of a batch: columns become text and are joined in Arrow, not a row at a time."""
    import pyarrow as pa
    import pyarrow.compute as pc

    pieces: list[Any] = []

    def add(text: str) -> None:
        pieces.append(pa.scalar(text, pa.large_string()))

    def add_column(name: str, values: pa.Array) -> None:
        add(f'{", " if pieces else "{"}"{name}": ')
        pieces.append(pc.fill_null(values.cast(pa.large_string()), "null"))

    def add_vector(name: str, matrix: Array) -> None:
        add(f'{", " if pieces else "{"}"{name}": [')
        for i, column in enumerate(matrix.T):
            if i:
                add(", ")
            pieces.append(pa.array(np.ascontiguousarray(column)).cast(pa.large_string()))
        add("]")

    add_vector("context", log.context)
    add_vector("query", log.query)
    add_column("action", pa.array(log.action))
    if prompts is not None:
        add_column("prompt", pa.array(prompts[log.action], pa.large_string()))
    add_column("propensity", pa.array(log.propensity, mask=np.isnan(log.propensity)))
    add_column("reward", pa.array(log.reward))
    add_vector("output", log.output)
    for name in ("sentence", "query_text"):
        if (texts := getattr(log, name)) is not None:
            add_column(name, pa.array([encode(text) for text in texts], pa.large_string()))
    for name in ("user_id", "item_id"):
        if (ids := getattr(log, name)) is not None:
            add_column(name, pa.array(ids))
    if log.oracle is not None:
        expected = log.oracle.expected_reward
        add_column("expected_reward", pa.array(expected, mask=~np.isfinite(expected)))
    add("}\n")
    lines = pc.binary_join_element_wise(*pieces, pa.scalar("", pa.large_string()))
    _, offsets, content = lines.buffers()
    first, last = np.frombuffer(offsets, dtype=np.int64)[[lines.offset, lines.offset + len(lines)]]
    return memoryview(content)[first:last]
