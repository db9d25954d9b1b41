"""Lines of Vowpal Wabbit's text format for contextual bandits, ``action:cost:probability |name index:value ...``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from offprompts_env.errors import DataError
from offprompts_env.types import FloatArray, IntArray

if TYPE_CHECKING:
    import pyarrow as pa

# A feature index is a column: a hashed or mistyped one would take all memory.
_LARGEST_INDEX = 1 << 16
_LARGEST = float(np.finfo(np.float32).max)
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rounds of a file: labels, features, and where they were."""

    action: IntArray
    cost: FloatArray
    propensity: FloatArray
    context: FloatArray
    query: FloatArray
    line: IntArray


def show(text: bytes) -> str:
    """Return `text` as a message shows it."""
    shown = text.decode("utf-8", "replace")
    return repr(shown if len(shown) <= 60 else shown[:60] + "…")


def wrong(file: Path, line: int, what: str, text: bytes) -> DataError:
    """Return the error for a `line` of `file` that has `text` where `what` is expected."""
    return DataError(f"{file}:{line}: {what}, got {show(text)}")


def parse_lines(block: bytes, lines: IntArray, names: tuple[str, str], file: Path) -> Rows:
    """Return the rounds of `block`, whose lines have the numbers `lines` in the file."""
    rows = _parse_alike(block, lines, names)
    return _parse_each(block, lines, names, file) if rows is None else rows


_OF_NUMBERS = b"0123456789.+-eE"
_TO_SPACES = bytes.maketrans(b":|", b"  ")
_ALIKE = re.compile(rb"[^ :|]+:[^ :|]+:[^ :|]+(?: \|[^ :|]*(?: [^ :|]+:[^ :|]+)*)+")


def _parse_alike(block: bytes, lines: IntArray, names: tuple[str, str]) -> Rows | None:
    """Return the rounds of `block` where all lines have the same features in the same order, else None.

    Such lines differ in numbers only, so a CSV reader can take them as a table. None also means that something is wrong
    that reading line by line will name.
    """
    import pyarrow as pa
    import pyarrow.csv as csv

    first, _, _ = block.partition(b"\n")
    marks = (first + b"\n").translate(None, _OF_NUMBERS)
    if not _ALIKE.fullmatch(first) or block.translate(None, _OF_NUMBERS) != marks * len(lines):
        return None
    layout = _layout(first, names)
    if layout is None:
        return None
    fixed, numbers = layout
    types = {"0": pa.int64(), "1": pa.float32(), "2": pa.float64()}
    types |= {str(column): pa.string() for column in fixed}
    types |= {str(column): pa.float32() for features in numbers.values() for column in features.values()}
    try:
        table = csv.read_csv(
            pa.BufferReader(block.translate(_TO_SPACES)),
            read_options=csv.ReadOptions(
                use_threads=False, block_size=len(block) + 1, column_names=[str(i) for i in range(len(types))]
            ),
            parse_options=csv.ParseOptions(
                delimiter=" ", quote_char=False, double_quote=False, ignore_empty_lines=False
            ),
            convert_options=csv.ConvertOptions(column_types=types, null_values=[], check_utf8=False),
        )
    except pa.ArrowInvalid:
        return None
    return _of_table(table, lines, fixed, numbers, names)


def _layout(first: bytes, names: tuple[str, str]) -> tuple[dict[int, str], dict[str, dict[int, int]]] | None:
    """Return which columns are the same text in all lines like `first`, and of each namespace {index: column}."""
    fixed: dict[int, str] = {}
    numbers: dict[str, dict[int, int]] = {}
    column = 3
    for section in first.split(b"|")[1:]:
        name, *features = section.decode("ascii", "replace").split(" ")
        if name in numbers or name not in (*names, ""):
            return None
        numbers[name] = {}
        # Between a number and a name there are " |", of which a splitter makes an empty column.
        fixed |= {column: "", column + 1: name}
        column += 2
        for feature in filter(None, features):
            word = feature.partition(":")[0]
            index = _index(word, name)
            if index is None or index in numbers[name]:
                return None
            fixed[column], numbers[name][index] = word, column + 1
            column += 2
    return fixed, numbers


def _index(word: str, name: str) -> int | None:
    """Return the index of a feature ``c3`` or ``3`` of namespace ``c``, or None if it is named otherwise."""
    digits = word if name.isdigit() else word.removeprefix(name)
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 9) or int(digits) >= _LARGEST_INDEX:
        return None
    return int(digits)


def _of_table(
    table: pa.Table, lines: IntArray, fixed: dict[int, str], numbers: dict[str, dict[int, int]], names: tuple[str, str]
) -> Rows | None:
    import pyarrow.compute as pc

    if table.num_rows != len(lines):
        return None
    if not all(pc.all(pc.equal(table.column(column), text)).as_py() for column, text in fixed.items()):
        return None
    matrices = []
    for name in names:
        features = numbers.get(name, {})
        matrix = np.zeros((len(lines), max(features, default=-1) + 1), dtype=np.float32)
        for index, column in features.items():
            matrix[:, index] = table.column(column).to_numpy()
        matrices.append(matrix)
    action, cost, propensity = (table.column(i).to_numpy() for i in range(3))
    if not all(np.isfinite(values).all() for values in (cost, propensity, *matrices)):
        return None
    return Rows(action - 1, cost, propensity, matrices[0], matrices[1], lines)


class Cells:
    """Features of rows that need not have the same ones."""

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._indices: list[int] = []
        self._values: list[float] = []

    def add(self, row: int, features: list[tuple[int, float]]) -> None:
        """Note features (index, value) of a row."""
        for index, value in features:
            self._rows.append(row)
            self._indices.append(index)
            self._values.append(value)

    def matrix(self, n: int) -> FloatArray:
        """Return all (n, d); what was not added is 0, and what was added twice is summed, as Vowpal Wabbit does."""
        matrix = np.zeros((n, max(self._indices, default=-1) + 1), dtype=np.float32)
        np.add.at(matrix, (self._rows, self._indices), self._values)
        return matrix


def _parse_each(block: bytes, lines: IntArray, names: tuple[str, str], file: Path) -> Rows:
    """Return the rounds of `block` line by line, as lines may have different features; empty ones are left out."""
    labels: list[tuple[int, float, float]] = []
    cells = {name: Cells() for name in names}
    there: list[int] = []
    for line, number in zip(block.split(b"\n"), lines.tolist(), strict=False):
        if not line.strip():
            continue
        label, bar, rest = line.partition(b"|")
        if not bar:
            raise wrong(file, number, "expected features after '|'", line)
        for name, features in sections(bar + rest, number, names, file):
            if features:
                cells[name].add(len(there), features)
        labels.append(_read_label(label, number, file))
        there.append(number)
    action, cost, propensity = zip(*labels, strict=True) if labels else ((), (), ())
    return Rows(
        action=np.array(action, dtype=np.int64) - 1,
        cost=np.array(cost, dtype=np.float32),
        propensity=np.array(propensity, dtype=np.float64),
        context=cells[names[0]].matrix(len(there)),
        query=cells[names[1]].matrix(len(there)),
        line=np.array(there, dtype=np.int64),
    )


def _read_label(text: bytes, line: int, file: Path) -> tuple[int, float, float]:
    labels = [part for part in text.split() if not part.startswith(b"'")]
    fields = labels[0].split(b":") if len(labels) == 1 else []
    if len(fields) not in (2, 3) or not fields[0].isdigit() or len(fields[0]) > 18:
        raise wrong(file, line, "expected one label action:cost:probability", text)
    probability = _number(fields[2], line, file) if len(fields) == 3 else np.nan
    return int(fields[0]), _number(fields[1], line, file), probability


def sections(
    text: bytes, line: int, names: tuple[str, ...], file: Path
) -> Iterator[tuple[str, list[tuple[int, float]]]]:
    """Yield the namespaces of ``|name index:value ...``, with their features."""
    for section in text.split(b"|")[1:]:
        # A name follows the bar at once; after a space there are features without one.
        name = section.split(b" ", 1)[0].strip().decode("utf-8", "replace")
        words = section.split() if section[:1].isspace() else section.split()[1:]
        if words and name not in names:
            expected = " or ".join(map(repr, names))
            raise wrong(
                file, line, f"expected features in namespace {expected} (pass the names of yours)", b"|" + section
            )
        yield name, [_feature(word, name, line, file) for word in words]


def _feature(word: bytes, name: str, line: int, file: Path) -> tuple[int, float]:
    before, colon, value = word.partition(b":")
    index = _index(before.decode("utf-8", "replace"), name)
    if index is None:
        raise wrong(
            file, line, f"expected features named by an index below {_LARGEST_INDEX}, as in '{name}0:1.5'", word
        )
    return index, _number(value, line, file) if colon else 1.0


def _number(text: bytes, line: int, file: Path) -> float:
    word = text.decode("ascii", "replace")
    # Python takes more for numbers than a file should hold, such as "1_000"; what is finite has to be so as a float.
    if not _NUMBER.fullmatch(word) or abs(value := float(word)) > _LARGEST:
        raise wrong(file, line, "expected a finite number", text)
    return value
