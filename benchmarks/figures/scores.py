"""Figures of scores: over the axis of a sweep, at its points, while learning, as boxes, against sentences asked for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import ceil
from typing import Any

import numpy as np

from benchmarks.figures.drawing import Palette, Sketch, title
from benchmarks.figures.marks import (
    height,
    interval,
    legend,
    line,
    panels,
    places,
    point_with_bar,
    reference_lines,
    scale,
    short,
    view,
    worth,
)
from benchmarks.figures.sheets import Sheet, in_words, reference, settings_in_words, worlds_in_words
from benchmarks.rows import Row
from benchmarks.summaries import Interval, grouped, over_worlds, summaries
from offprompts_env.rng import stream

LINES = ("logging", "online")
"""References that are lines in every figure of scores, whether or not they are among the learners."""

_FEW = ", of three worlds or more"


def over_axis(sheet: Sheet) -> Sketch | None:
    """Scores over what is varied, one line a learner, one panel for what else is varied; nothing without an axis."""
    if all(len(places(sheet.at(points))) < 2 for points in sheet.panels.values()):
        return None
    many = len(sheet.panels) > 1
    drawn = [name for name in LINES if name not in sheet.learners and reference(sheet.rows, name) is not None]

    def draw(figure: Any, colours: Palette) -> None:
        axes = panels(figure, len(sheet.panels), x=sheet.axis, y=sheet.unit)
        for axis, (name, points) in zip(axes, sheet.panels.items(), strict=True):
            rows = sheet.at(points)
            found = summaries(rows)
            for learner in colours.ordered(one.learner for one in found):
                own = [one for one in found if one.learner == learner and np.isfinite(one.x)]
                line(axis, [one.x for one in own], [interval(one.scores) for one in own], colours, learner, bars=many)
            reference_lines(axis, rows, drawn, colours)
            scale(axis, places(rows))
            axis.set_title(name)
        axes[0].set_ylim(view(worth(sheet.rows, drawn)))
        legend(figure, axes, colours)

    spread = "bars" if many else "bands"
    return Sketch(
        "scores",
        sheet.heading(sheet.unit),
        f"Mean {sheet.unit} over {worlds_in_words(sheet.rows)}; {spread} are 95% intervals of the mean{_FEW}."
        + settings_in_words(sheet.rows),
        height(len(sheet.panels), [title(name) for name in (*sheet.learners, *drawn)]),
        draw,
    )


def at_points(sheet: Sheet) -> Sketch:
    """Scores point by point, a panel each: for what has no axis."""
    found = sheet.summaries
    points = list(grouped(sheet.rows, lambda row: row.point))

    def draw(figure: Any, colours: Palette) -> None:
        names = colours.ordered(one.learner for one in found)[::-1]
        for axis, point in zip(panels(figure, len(points), x=sheet.unit), points, strict=True):
            for one in (one for one in found if one.point == point):
                point_with_bar(axis, names.index(one.learner), interval(one.scores), colours, one.learner)
            axis.set_yticks(range(len(names)), [colours.styles[name].title for name in names])
            axis.set_ylim(-0.6, len(names) - 0.4)
            axis.set_xlim(view(worth(sheet.rows, ())))
            axis.set_title(in_words(point.split("/")) if len(points) > 1 else "")

    return Sketch(
        "scores",
        sheet.heading(sheet.unit),
        f"Mean {sheet.unit} over {worlds_in_words(sheet.rows)}; bars are 95% intervals of the mean{_FEW}."
        + settings_in_words(sheet.rows),
        0.9 + ceil(len(points) / 2) * (0.5 + 0.23 * len(sheet.learners)),
        draw,
    )


def curves(sheet: Sheet) -> Sketch | None:
    """Scores while learning, a panel for each point, or the last ones if there are many; nothing without curves."""
    rows = [row for row in sheet.rows if len(row.result.curve) > 1]
    points = list(grouped(rows, lambda row: row.point))
    few = len(points) <= 6 or len(points) == len(sheet.panels)
    points = [point for point in points if few or point in {own[-1] for own in sheet.panels.values()}]
    rows = [row for row in rows if row.point in points]
    if not points:
        return None

    def draw(figure: Any, colours: Palette) -> None:
        axes = panels(figure, len(points), x="gradient steps", y=sheet.unit)
        for axis, point in zip(axes, points, strict=True):
            at = [row for row in rows if row.point == point]
            by_learner = grouped(at, lambda row: row.learner)
            for learner in colours.ordered(by_learner):
                steps, means = _curve(by_learner[learner])
                line(axis, steps, means, colours, learner, marked=False)
            axis.set_title(in_words(point.split("/")) if len(points) > 1 else "")
            axis.xaxis.set_major_formatter(lambda step, _: short(step))
            axis.locator_params(axis="x", nbins=4)
        axes[0].set_ylim(view(value for row in rows for value in row.result.curve))
        legend(figure, axes, colours)

    learners = {row.learner for row in rows}
    which = "" if few else f" Only at the largest {sheet.axis}."
    return Sketch(
        "curves",
        sheet.heading("learning curves"),
        f"Mean {sheet.unit} of the policy while it is trained, over {worlds_in_words(rows)}; bands are 95% intervals "
        f"of the mean{_FEW}. Curves are valued on fewer rounds than final scores.{which}{settings_in_words(rows)}",
        height(len(points), [title(name) for name in learners]),
        draw,
    )


def _curve(rows: Sequence[Row]) -> tuple[list[int], list[Interval]]:
    steps = sorted({step for row in rows for step in row.result.curve_steps})
    means = []
    for step in steps:
        at = over_worlds(rows, partial(_at_step, step))
        means.append(interval(list(at.values())) if at else Interval(np.nan, np.nan, np.nan))
    return steps, means


def _at_step(step: int, row: Row) -> float:
    steps = row.result.curve_steps
    return row.result.curve[steps.index(step)] if step in steps else float("nan")


def boxes(sheet: Sheet) -> Sketch:
    """All runs of each learner, with a box: for a sweep of few worlds and many learning seeds."""
    names = ("best single", "oracle")
    counts = [len({row.learner for row in sheet.at(points)}) for points in sheet.panels.values()]

    def draw(figure: Any, colours: Palette) -> None:
        # Panels may have other learners than their neighbours: each has places of its own.
        heights = [0.6 + count for count in counts]
        axes = panels(figure, len(sheet.panels), columns=1, x=sheet.unit, common=False, heights=heights)
        for axis, (panel, points) in zip(axes, sheet.panels.items(), strict=True):
            rows = [row for row in sheet.at(points) if np.isfinite(row.score)]
            by_learner = grouped(rows, lambda row: row.learner)
            order = colours.ordered(by_learner)[::-1]
            for place, learner in enumerate(order):
                _box(axis, place, [row.score for row in by_learner[learner]], colours.styles[learner].colour, colours)
            axis.set_yticks(range(len(order)), [colours.styles[name].title for name in order])
            axis.set_ylim(-0.6, len(order) - 0.4)
            axis.axvline(0, color=colours.ink, linewidth=0.8)
            reference_lines(axis, rows, [n for n in names if n not in by_learner], colours, upright=True)
            axis.set_title(panel if len(sheet.panels) > 1 else "")
        legend(figure, axes, colours)

    return Sketch(
        "runs",
        sheet.heading(sheet.unit),
        f"Each dot is one run, over {worlds_in_words(sheet.rows)}; boxes hold the middle half, the line in them is the "
        "median, whiskers reach to the outermost run within 1.5 box lengths." + settings_in_words(sheet.rows),
        1.4 + 0.3 * len(counts) + 0.34 * sum(counts),
        draw,
    )


def _box(axis: Any, place: int, scores: Sequence[float], colour: str, colours: Palette) -> None:
    line = {"color": colour, "linewidth": 1.3}
    axis.boxplot(
        [scores], positions=[place], orientation="horizontal", widths=0.6, showfliers=False, manage_ticks=False,
        boxprops=line, whiskerprops=line, capprops=line, medianprops={"color": colours.ink, "linewidth": 1.6},
    )  # fmt: skip
    jitter = stream(0, "benchmarks", "jitter").uniform(-0.2, 0.2, len(scores))
    axis.plot(scores, place + jitter, "o", color=colour, markersize=3.5, alpha=0.6, markeredgewidth=0)


def against_sentences(sheet: Sheet) -> Sketch | None:
    """Scores against the sentences that a run asked for; nothing where none asked for any."""
    if not any(row.result.sentences > 0 for row in sheet.rows):
        return None
    names = ("best single", "oracle")

    def draw(figure: Any, colours: Palette) -> None:
        (axis,) = panels(figure, 1, x="sentences asked for by a run", y=sheet.unit)
        scored = [row for row in sheet.rows if np.isfinite(row.score)]
        lines = grouped(scored, lambda row: row.learner)
        for learner in colours.ordered(lines):
            cells = grouped(lines[learner], lambda row: row.point).values()
            asked = sorted(((_sentences(own), interval(list(over_worlds(own).values()))) for own in cells),
                           key=lambda pair: pair[0])  # fmt: skip
            line(axis, [x for x, _ in asked], [mean for _, mean in asked], colours, learner, bars=True)
        reference_lines(axis, sheet.rows, [name for name in names if name not in lines], colours)
        most = max(row.result.sentences for row in scored)
        axis.set_xscale("symlog", linthresh=1000)
        axis.set_xlim(-200, 1.5 * max(most, 1000))
        ticks = [0, *(10**power for power in range(3, 9) if 10**power <= 1.5 * most)]
        axis.set_xticks(ticks, [short(tick) for tick in ticks])
        axis.set_ylim(view(worth(sheet.rows, names)))
        legend(figure, [axis], colours)

    return Sketch(
        "sentences",
        sheet.heading(f"{sheet.unit} against sentences"),
        f"Mean {sheet.unit} over {worlds_in_words(sheet.rows)} against the number of sentences that one run asked the "
        "language model for, beyond those of the log (logarithmic above 1,000); bars are 95% intervals of the "
        f"mean{_FEW}." + settings_in_words(sheet.rows),
        height(1, [title(name) for name in {*sheet.learners, *names}]),
        draw,
    )


def _sentences(rows: Sequence[Row]) -> float:
    return float(np.mean([row.result.sentences for row in rows]))
