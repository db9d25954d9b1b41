"""Figures of learners over a whole sweep: interquartile means, performance profiles, probabilities of improvement."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.aggregate import Aggregate, Improvement, aggregates, improvement, profiles
from benchmarks.figures.drawing import Palette, Sketch, title
from benchmarks.figures.marks import height, legend, panels, point_with_bar
from benchmarks.figures.sheets import Sheet, scores_in_words, settings_in_words, worlds_in_words

HERO = "dso"
"""The learner that others are compared with, where it is among them; else the best."""

_DRAWN = "95% intervals of a bootstrap over worlds"


def interquartile_means(sheet: Sheet) -> Sketch:
    """The interquartile mean of each learner with its interval, the best on top."""
    found = aggregates(sheet.rows)
    points = len({row.point for row in sheet.rows})

    def label(one: Aggregate, colours: Palette) -> str:
        return colours.styles[one.learner].title + (f" ({one.points}/{points} points)" if one.points < points else "")

    def draw(figure: Any, colours: Palette) -> None:
        (axis,) = panels(figure, 1, x=f"interquartile mean of {sheet.unit}")
        for place, one in enumerate(reversed(found)):
            point_with_bar(axis, place, one.iqm, colours, one.learner)
        axis.set_yticks(range(len(found)), [label(one, colours) for one in reversed(found)])
        axis.set_ylim(-0.6, len(found) - 0.4)
        axis.locator_params(axis="x", nbins=6)

    return Sketch(
        "iqm",
        sheet.heading("interquartile means"),
        f"Mean of the middle half of the scores {_where(points)}, over {worlds_in_words(sheet.rows)}; bars are "
        f"{_DRAWN}.{scores_in_words(sheet.rows)}{settings_in_words(sheet.rows)}",
        0.8 + 0.28 * len(found),
        draw,
    )


def performance_profiles(sheet: Sheet) -> Sketch:
    """The share of scores above each threshold, a line for each learner."""
    scores = np.array([row.score for row in sheet.rows if np.isfinite(row.score)])
    points = len({row.point for row in sheet.rows})
    margin = 0.02 * max(float(np.ptp(scores)), 1e-6)
    found = {one.learner: one for one in profiles(sheet.rows, np.linspace(scores.min() - margin, scores.max(), 80))}

    def draw(figure: Any, colours: Palette) -> None:
        (axis,) = panels(figure, 1, x=f"{sheet.unit} τ", y="share of scores above τ")
        for learner in colours.ordered(found):
            one, style = found[learner], colours.styles[learner]
            axis.plot(one.thresholds, one.share, color=style.colour, linestyle=style.line, label=style.title)
            axis.fill_between(one.thresholds, one.low, one.high, color=style.colour, alpha=0.14, linewidth=0)
        legend(figure, [axis], colours)

    return Sketch(
        "profile",
        sheet.heading("performance profiles"),
        f"Share of the scores {_where(points)} that are above τ, over {worlds_in_words(sheet.rows)}; further up and to "
        f"the right is better. Bands are pointwise {_DRAWN}."
        + scores_in_words(sheet.rows)
        + settings_in_words(sheet.rows),
        height(1, [title(name) for name in found]),
        draw,
    )


def improvements(sheet: Sheet) -> Sketch | None:
    """The probability that one learner beats each other one; nothing if it shares no world with any."""
    scored = {row.learner for row in sheet.rows if np.isfinite(row.score)}
    hero = HERO if HERO in scored else aggregates(sheet.rows)[0].learner
    found = _over(sheet, hero, scored - {hero})
    if not found:
        return None

    def draw(figure: Any, colours: Palette) -> None:
        (axis,) = panels(figure, 1, x=f"P({title(hero)} is better)")
        for place, one in enumerate(found):
            point_with_bar(axis, place, one.probability, colours, one.over)
        axis.axvline(0.5, color=colours.ink, linewidth=0.8)
        axis.set_yticks(range(len(found)), [f"over {colours.styles[one.over].title}" for one in found])
        axis.set_ylim(-0.6, len(found) - 0.4)
        axis.set_xlim(-0.03, 1.03)

    return Sketch(
        "improvement",
        sheet.heading(f"probability that {title(hero)} is better"),
        f"Probability that a score of {title(hero)} is higher than one of each other learner at the same point "
        f"(Mann-Whitney, ties half), mean over points, over {worlds_in_words(sheet.rows)}; bars are {_DRAWN}."
        + scores_in_words(sheet.rows)
        + settings_in_words(sheet.rows),
        0.8 + 0.28 * len(found),
        draw,
    )


def _where(points: int) -> str:
    return f"at all {points} points" if points > 1 else "at the one point"


def _over(sheet: Sheet, hero: str, others: set[str]) -> list[Improvement]:
    """Return the comparisons with those others that share a world of a point with `hero`, the weakest last."""

    def cells(learner: str) -> set[tuple[str, int]]:
        return {(row.point, row.world) for row in sheet.rows if row.learner == learner and np.isfinite(row.score)}

    found = [improvement(sheet.rows, hero, other) for other in sorted(others) if cells(hero) & cells(other)]
    return sorted(found, key=lambda one: one.probability.value)
