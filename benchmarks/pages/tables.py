"""Tables of a result set, as HTML: means of learners at points, aggregates over a sweep, the published numbers.

All numbers are those of :mod:`benchmarks.summaries`, :mod:`benchmarks.aggregate` and :mod:`benchmarks.published`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from benchmarks.aggregate import Aggregate, aggregates, improvement
from benchmarks.figures.drawing import title
from benchmarks.figures.sheets import reference
from benchmarks.methods import TITLES
from benchmarks.pages.markup import Cell, measured, number, table
from benchmarks.published import Comparison
from benchmarks.rows import Row
from benchmarks.summaries import (
    Interval,
    Summary,
    compared,
    grouped,
    in_order,
    mean_interval,
    optimality,
    over_worlds,
    standard_error,
    summaries,
)

REFERENCES = ("uniform", "logging", "online", "oracle")
"""What no learner from a log is: it stands beside them, and is never called the best."""

Line = list[Cell | str]

RIVALS = ("logging", "dso")
"""Learners that the others are compared with over a whole sweep."""


def learner_order(rows: Iterable[Row]) -> list[str]:
    """Return the learners of `rows`: known ones as they are listed, then a user's own."""
    places = {name: place for place, name in enumerate(TITLES)}
    return sorted(dict.fromkeys(row.learner for row in rows), key=lambda name: places.get(name, len(places)))


def lower_is_better(rows: Iterable[Row]) -> bool:
    """Return whether scores are errors, as those of estimators are."""
    return any("mse" in row.result.measures for row in rows)


def score_name(rows: Sequence[Row]) -> str:
    """Return what the scores of `rows`, of one sweep, are."""
    if lower_is_better(rows):
        return "relative squared error"
    if any("no prompt" in row.result.references for row in rows):
        return "improvement over no prompt"
    if all(math.isclose(row.score, optimality(row), abs_tol=1e-9) for row in rows if math.isfinite(row.score)):
        return "optimality"
    return "score"


def _who(rows: Sequence[Row]) -> str:
    return "estimator" if lower_is_better(rows) else "learner"


def digits_for(values: Iterable[float]) -> int:
    """Return digits behind the point that show three of a typical value: three, or more where all are small."""
    sizes = sorted(abs(value) for value in values if math.isfinite(value) and value)
    if not sizes:
        return 3
    return max(3, min(8, 2 - math.floor(math.log10(sizes[len(sizes) // 2]))))


def worlds_in_words(counts: Iterable[int], name: str = "world") -> str:
    """Return ``20 worlds``, or ``3 to 20 worlds`` where counts differ."""
    low, high = min(counts := list(counts)), max(counts)
    return f"{high} {name}{'s' if high > 1 else ''}" if low == high else f"{low} to {high} {name}s"


def _score_digits(rows: Sequence[Row], values: Iterable[float]) -> int:
    """Return digits of scores: three, as the published table has, where the scale is known."""
    return 3 if score_name(rows) in ("optimality", "improvement over no prompt") else digits_for(values)


def means(rows: Sequence[Row], world_name: str = "world") -> str:
    """Return the table ``mean ± standard error`` of `rows`, of one sweep: learners by points, or points by bandwidths.

    A sweep with one learner and points that vary in several things, ``tau=1/kernel=uniform``, has the first of these
    for columns and the others for rows.
    """
    found = summaries(rows)
    learners, points = learner_order(rows), list(dict.fromkeys(one.point for one in found))
    caption = _means_caption(found, rows, world_name)
    if len(learners) == 1 and all("/" in point for point in points):
        return _folded(found, caption, rows)
    best = _best_of_points(found, lower_is_better(rows))
    held = {(one.learner, one.point): one for one in found}
    most, digits = max(one.worlds for one in found), _score_digits(rows, (one.mean.value for one in found))
    body: list[Line] = [
        [title(name), *(_mean_cell(held.get((name, point)), best, most, digits) for point in points)]
        for name in learners
    ]
    quiet = [index for index, name in enumerate(learners) if name in REFERENCES]
    owned = _owned(rows, learners, points, digits)
    quiet += range(len(body), len(body) + len(owned))
    return table([_who(rows), *points], body + owned, caption=caption, quiet=quiet)


def _owned(rows: Sequence[Row], learners: Sequence[str], points: Sequence[str], digits: int) -> list[Line]:
    """Return lines of the policies that the environment owns, where their values are not 0 and 1 by definition."""
    if score_name(rows) != "improvement over no prompt":
        return []
    lines: list[Line] = []
    for name in ("uniform", "best single", "oracle"):
        values = [reference([row for row in rows if row.point == point], name) for point in points]
        if name not in learners and any(values):
            lines.append([name, *(number(float("nan") if one is None else one.value, digits) for one in values)])
    return lines


def _means_caption(found: Sequence[Summary], rows: Sequence[Row], world_name: str) -> str:
    counts = [one.worlds for one in found]
    mixed = "; a cell from fewer than the most says from how many" if min(counts) < max(counts) else ""
    error = " ± standard error over" if max(counts) > 1 else " of"
    learned = any(one.learner not in REFERENCES for one in found)
    mark = "; marked: the smallest" if lower_is_better(rows) else "; marked: the best that learns from the log alone"
    mark = mark if learned else ""
    return f"Mean {score_name(rows)}{error} {worlds_in_words(counts, world_name)}{mixed}{mark}."


def _best_of_points(found: Sequence[Summary], lower: bool) -> set[tuple[str, str]]:
    best = set()
    for point, own in grouped_summaries(found).items():
        learned = [one for one in own if one.learner not in REFERENCES]
        if len(learned) > 1:
            best.add((_best(learned, lower).learner, point))
    return best


def grouped_summaries(found: Iterable[Summary]) -> dict[str, list[Summary]]:
    """Return summaries by point, in order."""
    groups: dict[str, list[Summary]] = {}
    for one in found:
        groups.setdefault(one.point, []).append(one)
    return groups


def _best(found: Sequence[Summary], lower: bool) -> Summary:
    return (min if lower else max)(found, key=lambda one: one.mean.value)


def _mean_cell(one: Summary | None, best: set[tuple[str, str]], most: int, digits: int) -> Cell:
    if one is None:
        return Cell("–")
    cell = measured(one.mean.value, one.standard_error, digits, best=(one.learner, one.point) in best)
    behind = f"{cell.error} ({one.worlds})".strip() if one.worlds < most else cell.error
    return Cell(cell.text, behind, cell.mark)


def _folded(found: Sequence[Summary], caption: str, rows: Sequence[Row]) -> str:
    most, digits = max(one.worlds for one in found), _score_digits(rows, (one.mean.value for one in found))
    best = {(one.learner, one.point) for one in [_best(found, lower_is_better(rows))]}
    held = {tuple(one.point.split("/", 1)): one for one in found}
    columns, kinds = (list(dict.fromkeys(key[side] for key in held)) for side in (0, 1))
    body: list[Line] = [
        [kind.replace("/", " · "), *(_mean_cell(held.get((column, kind)), best, most, digits) for column in columns)]
        for kind in kinds
    ]
    return table([title(found[0].learner), *columns], body, caption=caption)


def numbers(rows: Sequence[Row], of: Callable[[Row], float], caption: str, digits: int | None = None) -> str:
    """Return the table of any number of `rows`, of one sweep: mean over worlds ± standard error, learners by points.

    Args:
        rows: of the sweep.
        of: the number; NaN where a row has none.
        caption: what it is.
        digits: behind the point; by the size of the means if not given.
    """
    learners, points = learner_order(rows), list(dict.fromkeys(row.point for row in in_order(rows)))
    held: dict[tuple[str, str], tuple[float, float]] = {}
    for place, own in grouped(rows, lambda row: (row.learner, row.point)).items():
        values = list(over_worlds(own, of).values())
        if values:
            held[place] = mean_interval(values).value, standard_error(values)
    if not held:
        return ""
    shown = digits_for(mean for mean, _ in held.values()) if digits is None else digits

    def cell(learner: str, point: str) -> Cell | str:
        return measured(*held.get((learner, point), (float("nan"), float("nan"))), shown)

    head, body = [_who(rows), *points], [[title(name), *(cell(name, point) for point in points)] for name in learners]
    if len(points) > 8 and len(learners) < len(points):
        head = ["point", *map(title, learners)]
        body = [[point, *(cell(name, point) for name in learners)] for point in points]
    return table(head, body, caption=caption)


def over_the_sweep(rows: Sequence[Row], world_name: str = "world") -> str:
    """Return the table of aggregates over all points of the one sweep of `rows`, best interquartile mean first.

    Nothing where no point has two learners: there points or budgets are compared. Nothing for estimators either: their
    errors at points of a sweep are of different sizes.
    """
    found = aggregates(rows)
    if len(found) < 2 or lower_is_better(rows) or not compared(rows):
        return ""
    rivals = [name for name in RIVALS if name in {one.learner for one in found}]
    gaps = any(math.isfinite(one.gap.value) for one in found)
    digits = _score_digits(rows, (one.iqm.value for one in found))
    head = ["learner", "interquartile mean", "median", *(["optimality gap"] if gaps else [])]
    head += [f"P(better than {title(name)})" for name in rivals]
    body: list[Line] = [
        [
            title(one.learner),
            *(_interval(number_, digits) for number_ in _aggregate_numbers(one, gaps)),
            *(_against(rows, one.learner, rival) for rival in rivals),
        ]
        for one in found
    ]
    quiet = [index for index, one in enumerate(found) if one.learner in REFERENCES]
    points = worlds_in_words([one.points for one in found], "point")
    worlds = worlds_in_words([one.worlds for one in found], world_name)
    caption = (
        f"Over {points} and {worlds}, with 95% intervals from a bootstrap over {world_name}s: mean of the middle half "
        f"of all scores, median of the points' means"
        f"{', mean distance to an optimality of 1' if gaps else ''}"
        f"{', and the probability that a score is higher than one of the other learner' if rivals else ''}."
    )
    return table(head, body, caption=caption, quiet=quiet)


def _aggregate_numbers(one: Aggregate, gaps: bool) -> list[Interval]:
    return [one.iqm, one.median, *([one.gap] if gaps else [])]


def _interval(found: Interval, digits: int) -> Cell:
    known = math.isfinite(found.low) and math.isfinite(found.high)
    return Cell(
        number(found.value, digits), f"[{number(found.low, digits)}, {number(found.high, digits)}]" if known else ""
    )


def _against(rows: Sequence[Row], learner: str, over: str) -> Cell:
    if learner == over or not _common(rows, learner, over):
        return Cell("–")
    return _interval(improvement(rows, learner, over).probability, 2)


def _common(rows: Sequence[Row], learner: str, over: str) -> bool:
    places = {
        name: {(row.point, row.world) for row in rows if row.learner == name and math.isfinite(row.score)}
        for name in (learner, over)
    }
    return bool(places[learner] & places[over])


def beside_published(cells: Sequence[Comparison]) -> str:
    """Return the published numbers beside ours, one line a cell; those that are off stand out."""
    body: list[Line] = [
        [
            f"{title(one.learner)}, n = {one.n:,}",
            measured(one.mean, one.standard_error),
            measured(one.published_mean, one.published_standard_error),
            Cell(number(one.deviation, 1, signed=True), mark="off" if one.off else ""),
        ]
        for one in cells
    ]
    caption = (
        "Optimality, mean ± standard error over worlds, and the difference in combined standard errors; marked: more "
        "than two. The published worlds were drawn by another generator."
    )
    return table(["learner and logged rounds", "here", "published", "difference"], body, caption=caption)
