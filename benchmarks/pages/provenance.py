"""Where rows come from: how much of a sweep is there, what was it run with, when, and how long did it take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from benchmarks.plan import Sweep
from benchmarks.rows import Row
from benchmarks.sweeps import SWEEPS, quick


@dataclass(frozen=True)
class Gap:
    """Runs that a sweep asks for and that are not there.

    Attributes:
        point: name.
        learner: name.
        there: number of its runs that are.
        planned: number of all.
    """

    point: str
    learner: str
    there: int
    planned: int


@dataclass(frozen=True)
class Coverage:
    """How much of a sweep its rows are.

    Attributes:
        runs: rows.
        worlds: distinct worlds.
        seeds: distinct learning seeds.
        form: "full" or "quick", "mixed" where points are of either; "other" where the settings are of neither (of an
            older version, or a user's own).
        planned: runs of that form (mixed: of the one that more rows have); none of "other" are known.
        gaps: what is missing.
    """

    runs: int
    worlds: int
    seeds: int
    form: str
    planned: int
    gaps: tuple[Gap, ...]

    @property
    def missing(self) -> int:
        """Number of planned runs that are not there."""
        return sum(gap.planned - gap.there for gap in self.gaps)


def coverage(rows: Sequence[Row]) -> Coverage:
    """Return how much of its sweep `rows` are; all are of one sweep, and there is one at least."""
    forms = {}
    if rows[0].sweep in SWEEPS:
        full = SWEEPS[rows[0].sweep]
        forms = {"full": full, "quick": quick(full)}
    fitting = dict.fromkeys(forms, 0)
    for row in rows:
        # A setting may be its own quick form: then it is the full one.
        form = next((name for name, sweep in forms.items() if _fits(row, sweep)), None)
        if form is not None:
            fitting[form] += 1
    best = max(fitting, key=lambda name: fitting[name], default="other")
    found = Coverage(len(rows), len({row.world for row in rows}), len({row.seed for row in rows}), "other", 0, ())
    if not fitting.get(best):
        return found
    planned = forms[best].runs()
    there = {row.id for row in rows}
    cells = Counter((run.point.name, run.learner) for run in planned)
    held = Counter((run.point.name, run.learner) for run in planned if run.id in there)
    gaps = tuple(Gap(*cell, held[cell], count) for cell, count in cells.items() if held[cell] < count)
    mixed = all(fitting.values())
    return replace(found, form="mixed" if mixed else best, planned=len(planned), gaps=gaps)


def _fits(row: Row, sweep: Sweep) -> bool:
    return any(point.name == row.point and row.config.startswith(f"{point.setting!r}; ") for point in sweep.points)


@dataclass(frozen=True)
class ProcessorTime:
    """How long rows took.

    Attributes:
        learning: seconds of learning; a run that two sweeps share counts once.
        shared: seconds of what runs share (logging policies, regressions, densities): of each point and world the most
            that one run reports, which is a lower bound.
    """

    learning: float
    shared: float


def processor_time(rows: Iterable[Row]) -> ProcessorTime:
    """Return how long `rows` took."""
    unique = {row.key: row for row in rows}.values()
    shared: dict[tuple[str, int, int], float] = {}
    for row in unique:
        place = row.config.split("; ")[0], row.world, row.seed
        shared[place] = max(shared.get(place, 0.0), row.result.shared_seconds)
    return ProcessorTime(sum(row.result.seconds for row in unique), sum(shared.values()))


def versions(rows: Iterable[Row]) -> dict[str, list[str]]:
    """Return package to its versions in `rows`, by name."""
    found: dict[str, set[str]] = {}
    for row in rows:
        for package, version in row.versions.items():
            found.setdefault(package, set()).add(version)
    return {package: sorted(found[package]) for package in sorted(found)}
