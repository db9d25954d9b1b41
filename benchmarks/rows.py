"""Results as rows of a CSV file, written one by one: a run that was interrupted goes on where it stopped."""

from __future__ import annotations

import csv
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RowT = TypeVar("RowT", bound="DataclassInstance")


def read_rows(path: Path, kind: type[RowT]) -> list[RowT]:
    """Read the rows of an earlier run, dataclasses of int, float and str; none where there is no such file."""
    if not path.exists():
        return []
    kinds = {f.name: {"int": int, "float": float, "str": str}[str(f.type)] for f in fields(kind)}
    with path.open(newline="", encoding="utf-8") as file:
        return [kind(**{name: kinds[name](value) for name, value in row.items()}) for row in csv.DictReader(file)]


def append_row(path: Path, row: DataclassInstance) -> None:
    """Write `row` behind what `path` holds."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(row)])
        if new:
            writer.writeheader()
        writer.writerow(asdict(row))
