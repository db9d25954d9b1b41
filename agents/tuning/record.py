"""What every way of tuning gives: the candidates, what was found of each, and the one that was chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Generic, TypeVar

import numpy as np

from offprompts_env.errors import ConfigError
from offprompts_env.types import Estimate, FloatArray

T = TypeVar("T", covariant=True)


@dataclass(frozen=True, eq=False)
class Tuning(Generic[T]):
    """Candidates with what a log says of them, one of them chosen; prints as a table.

    Attributes:
        method: how it was chosen.
        candidates: what there was to choose from.
        names: of the candidates.
        estimates: one a candidate.
        columns: further numbers by name, one a candidate (C,) each.
        index: of the chosen candidate.
        rounds: of the log.
        seed: of splits and of whatever was fitted.
        warnings: what a reader must know before trusting the choice.
    """

    method: str
    candidates: tuple[T, ...]
    names: tuple[str, ...]
    estimates: tuple[Estimate, ...] = field(repr=False)
    columns: Mapping[str, FloatArray]
    index: int
    rounds: int
    seed: int
    warnings: tuple[str, ...] = ()

    @property
    def chosen(self) -> T:
        """The chosen candidate."""
        return self.candidates[self.index]

    @property
    def estimate(self) -> Estimate:
        """The estimate of the chosen candidate."""
        return self.estimates[self.index]

    def __str__(self) -> str:
        values = [np.array([estimate.value for estimate in self.estimates])]
        errors = [np.array([estimate.standard_error for estimate in self.estimates])]
        numbers = [*values, *errors, *self.columns.values()]
        header = ["candidate", "value", "s.e.", *self.columns]
        rows = [[name, *(f"{column[i]:.4f}" for column in numbers)] for i, name in enumerate(self.names)]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            ("> " if place == self.index + 1 else "  ")
            + "  ".join(
                [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
            )
            for place, row in enumerate([header, *rows])
        ]
        notes = [f"warning: {note}" for note in self.warnings]
        return "\n".join([f"{self.method}; {self.rounds} rounds, seed {self.seed}", *lines, *notes])


def distinct(*groups: Sequence[str]) -> tuple[str, ...]:
    """Return the strings of all groups, each once, in the order of their first appearance."""
    return tuple(dict.fromkeys(note for group in groups for note in group))


def names_of(candidates: Sequence[object]) -> tuple[str, ...]:
    """Return what to call frozen configurations: their class and the settings in which those of a class differ.

    Raises:
        ConfigError: no candidate.
    """
    if len(candidates) == 0:
        raise ConfigError("candidates: expected at least one, got none")
    found: list[str] = []
    for candidate in candidates:
        kin = [other for other in candidates if type(other) is type(candidate)]
        settings = [f.name for f in fields(candidate)] if is_dataclass(candidate) else []
        differing = [name for name in settings if len({repr(getattr(other, name)) for other in kin}) > 1]
        inner = ", ".join(f"{name}={getattr(candidate, name)!r}" for name in differing)
        found.append(f"{type(candidate).__name__}({inner})")
    return tuple(found)
