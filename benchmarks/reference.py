"""The committed summary of the reference runs: one line for each sweep, point and learner, and one for a whole sweep.

A CSV file, sorted and with fixed digits, so that equal rows give equal bytes.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.aggregate import aggregates
from benchmarks.claims import is_short
from benchmarks.rows import Row
from benchmarks.summaries import comparable, grouped, in_order, summaries
from offprompts_env.errors import DataError, StorageError
from offprompts_env.manifest import write_atomic

SUMMARY = Path(__file__).parent / "results" / "summary.csv"
"""Where it is."""


@dataclass(frozen=True)
class Line:
    """What the reference runs of a learner reached.

    Attributes:
        sweep: name.
        point: name; empty: all points of the sweep.
        x: on the axis; NaN where there is none.
        learner: name.
        worlds: number of worlds, or logs; of all points the smallest.
        runs: rows.
        mean: over worlds, in the unit of :attr:`benchmarks.rows.Row.score`; of all points the mean of their means.
        standard_error: of the mean, over worlds; NaN for all points.
        iqm: interquartile mean, of all scores.
        iqm_low: lower end of its 95% bootstrap interval.
        iqm_high: upper end.
        seconds: mean processor time of learning.
        shared_seconds: mean processor time of what the learner shares with others.
        config: digest of setting and learner.
        versions: of packages.
        commit: of the source tree.
    """

    sweep: str
    point: str
    x: float
    learner: str
    worlds: int
    runs: int
    mean: float
    standard_error: float
    iqm: float
    iqm_low: float
    iqm_high: float
    seconds: float
    shared_seconds: float
    config: str
    versions: str
    commit: str

    @property
    def cell(self) -> str:
        """What the line is of, in words."""
        return "/".join(part for part in (self.sweep, self.point, f"learner={self.learner}") if part)


_KINDS: Mapping[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": lambda text: float(text) if text else math.nan,
}
_DIGITS = {"x": "g", "seconds": ".2f", "shared_seconds": ".2f"}


def lines_of(rows: Iterable[Row]) -> list[Line]:
    """Summarise rows, without those of short schedules (``--quick``); points in order, learners by name."""
    held = comparable([row for row in rows if not is_short(row)])
    found: list[Line] = []
    for sweep, own in grouped(in_order(held), lambda row: row.sweep).items():
        by_point = grouped(own, lambda row: row.point)
        for point, some in by_point.items():
            found += _lines(sweep, point, some)
        if len(by_point) > 1:
            found += _lines(sweep, "", own)
    return found


def _lines(sweep: str, point: str, rows: Sequence[Row]) -> list[Line]:
    """Return one line a learner over all of `rows`, those of a point or of a sweep."""
    by_learner = grouped(rows, lambda row: row.learner)
    errors = {one.learner: one.standard_error for one in summaries(rows)} if point else {}
    found = []
    for one in sorted(aggregates(rows), key=lambda one: one.learner):
        own = [row for row in by_learner[one.learner] if math.isfinite(row.score)]
        line = Line(
            sweep=sweep,
            point=point,
            x=own[0].x if point else math.nan,
            learner=one.learner,
            worlds=one.worlds,
            runs=len(own),
            mean=one.mean.value,
            standard_error=errors.get(one.learner, math.nan),
            iqm=one.iqm.value,
            iqm_low=one.iqm.low,
            iqm_high=one.iqm.high,
            seconds=sum(row.result.seconds for row in own) / len(own),
            shared_seconds=sum(row.result.shared_seconds for row in own) / len(own),
            config=_digest({row.config for row in own}),
            versions=_versions(own),
            commit=" ".join(sorted({row.commit for row in own} - {""})),
        )
        found.append(line)
    return found


def _digest(configs: set[str]) -> str:
    return hashlib.sha256("\n".join(sorted(configs)).encode()).hexdigest()[:12]


def _versions(rows: Sequence[Row]) -> str:
    packages = sorted({name for row in rows for name in row.versions})
    found = {name: sorted({row.versions[name] for row in rows if name in row.versions}) for name in packages}
    return "; ".join(f"{name} {' and '.join(versions)}" for name, versions in found.items())


def joined(known: Sequence[Line], new: Sequence[Line], *, force: bool = False) -> list[Line]:
    """Return the summary with the sweeps of `new` in place of those it knew; other sweeps stay.

    Raises:
        DataError: a cell would have fewer worlds or runs than it had, or be gone, and `force` is not given.
    """
    replaced = {line.sweep for line in new}
    counts = {(line.sweep, line.point, line.learner): (line.worlds, line.runs) for line in new}
    lost = []
    for line in known:
        worlds, runs = counts.get((line.sweep, line.point, line.learner), (0, 0))
        if line.sweep in replaced and (worlds < line.worlds or runs < line.runs):
            lost.append(f"{line.cell}: {worlds} worlds and {runs} runs, had {line.worlds} and {line.runs}")
    if lost and not force:
        shown = "\n  ".join([*lost[:5], *([f"and {len(lost) - 5} more"] if len(lost) > 5 else [])])
        raise DataError(
            f"expected at least the worlds that the summary has, got fewer of {len(lost)} lines:\n  {shown}\n"
            "run what is missing (python -m benchmarks run), or replace the summary with --force"
        )
    kept = [line for line in known if line.sweep not in replaced]
    return sorted([*kept, *new], key=lambda line: line.sweep)


def summary_text(lines: Iterable[Line]) -> str:
    """Return the content of the file."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(f.name for f in fields(Line))
    writer.writerows([_text(f.name, getattr(line, f.name)) for f in fields(Line)] for line in lines)
    return buffer.getvalue()


def _text(name: str, value: str | float) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else format(value, _DIGITS.get(name, "z.6f"))
    return str(value)


def write_text(path: Path, text: str) -> None:
    """Write a file, as a whole or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text.encode())
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written: {error}; what was there is untouched. Make it writable, or free some space"
        ) from error


def write_summary(lines: Iterable[Line], path: Path = SUMMARY) -> None:
    """Write the file, as :func:`write_text` does."""
    write_text(path, summary_text(lines))


def read_summary(path: Path = SUMMARY) -> list[Line]:
    """Return the lines of the file; none where there is no file.

    Raises:
        DataError: it is no such summary.
    """
    if not path.exists():
        return []
    names = [f.name for f in fields(Line)]
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if header != names:
            raise DataError(f"{path}: expected the columns {names}, got {header}; {_ADVICE}")
        return [_line(path, number, names, values) for number, values in enumerate(reader, 2)]


_ADVICE = "write it again from the rows of the reference runs: python -m benchmarks leaderboard --update"


def _line(path: Path, number: int, names: Sequence[str], values: Sequence[str]) -> Line:
    try:
        held = zip(fields(Line), values, strict=True)
        return Line(**{f.name: _KINDS[str(f.type)](value) for f, value in held})
    except ValueError as error:
        raise DataError(
            f"{path}, line {number}: expected {len(names)} values as in the header ({error}); {_ADVICE}"
        ) from error
