"""Figures of how accurate estimators are: squared error, bias, variance and coverage."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.figures.drawing import Palette, Sketch, title
from benchmarks.figures.marks import height, legend, panels, places, scale
from benchmarks.figures.sheets import Sheet, settings_in_words, worlds_in_words
from benchmarks.summaries import LEVEL, grouped, over_worlds

PANELS = {"mse": "mean squared error", "bias": "|bias|", "variance": "variance", "coverage": "coverage of 95% interval"}
"""Names among the measures of a row, and what their panels are called."""


def accuracy(sheet: Sheet) -> Sketch | None:
    """Four panels over the axis, one line an estimator; nothing where rows lack the measures."""
    if not any(set(PANELS) <= set(row.result.measures) for row in sheet.rows):
        return None

    def draw(figure: Any, colours: Palette) -> None:
        axes = panels(figure, len(PANELS), x=sheet.axis, common=False)
        for axis, (name, label) in zip(axes, PANELS.items(), strict=True):
            for learner in colours.ordered(sheet.learners):
                x, y = _measured(sheet, learner, name)
                style = colours.styles[learner]
                axis.plot(x, y, color=style.colour, linestyle=style.line, marker=style.marker, label=style.title,
                          markersize=4.5, linewidth=1.2)  # fmt: skip
            if name == "coverage":
                axis.axhline(LEVEL, color=colours.ink, linewidth=0.9, linestyle="--")
                axis.set_ylim(top=1.02)
            else:
                axis.set_yscale("log")
            scale(axis, places(sheet.rows))
            axis.tick_params(labelsize=9)
            axis.set_title(label)
        legend(figure, axes, colours)

    return Sketch(
        "accuracy",
        sheet.heading("accuracy of the estimators"),
        f"Over many logs of one world, then averaged over {worlds_in_words(sheet.rows)}: mean squared error, absolute "
        "bias and variance on logarithmic scales, and the share of 95% intervals that hold the true value (dashed: "
        "95%). The bias is what logs show of it: an unbiased estimator's is about 0.8 standard errors of its mean over "
        f"logs, not 0.{settings_in_words(sheet.rows)}",
        height(len(PANELS), [title(name) for name in sheet.learners]),
        draw,
    )


def _measured(sheet: Sheet, learner: str, name: str) -> tuple[list[float], list[float]]:
    """Return places on the axis and the mean over worlds of a measure, of its size for a bias."""
    own = [row for row in sheet.rows if row.learner == learner and np.isfinite(row.x)]
    x, y = [], []
    for place, rows in grouped(own, lambda row: row.x).items():
        values = over_worlds(rows, lambda row: abs(row.result.measures.get(name, np.nan))).values()
        if values:
            x.append(place)
            y.append(float(np.mean(list(values))))
    return x, y
