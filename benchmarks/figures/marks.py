"""What figures are drawn with: panels, scales, lines with bands, points with bars, references, one legend."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterable, Sequence
from math import ceil
from typing import Any

import numpy as np

from benchmarks.figures.drawing import Palette
from benchmarks.figures.sheets import reference
from benchmarks.rows import Row
from benchmarks.summaries import Interval, mean_interval
from offprompts_env.types import Array


def places(rows: Iterable[Row]) -> list[float]:
    """Return where points with a number are on the axis."""
    return sorted({row.x for row in rows if np.isfinite(row.x)})


def height(n_panels: int, labels: Collection[str]) -> float:
    """Return inches for panels in two columns, and for a legend of `labels`."""
    return (3.3 if n_panels == 1 else 0.5 + 2.0 * ceil(n_panels / 2)) + 0.23 * ceil(len(labels) / _columns(labels))


def _columns(labels: Iterable[str]) -> int:
    """Return the columns of a legend that stay within the width of a figure."""
    return 3 if max((len(label) for label in labels), default=0) <= 12 else 2


def panels(
    figure: Any,
    n: int,
    *,
    columns: int = 2,
    x: str = "",
    y: str = "",
    common: bool = True,
    heights: Sequence[float] | None = None,
) -> list[Any]:
    """Return `n` axes in `columns`, labelled at the edges: `x` below, `y` at the left.

    Args:
        figure: matplotlib's.
        n: number of axes.
        columns: at most.
        x: what is shown to the right.
        y: what is shown upwards.
        common: one vertical scale for all.
        heights: of the rows, relative to one another; None for equal ones.
    """
    columns = min(columns, n)
    made = figure.subplots(ceil(n / columns), columns, sharex=True, sharey=common, squeeze=False, height_ratios=heights)
    held = made.ravel().tolist()
    for index, axis in enumerate(held):
        if index % columns == 0:
            axis.set_ylabel(y)
        if index + columns >= n:
            axis.set_xlabel(textwrap.fill(x, 36 if columns == 1 else 26))
    for index in range(n, len(held)):
        held[index].set_visible(False)
        # The panel above it stands at the bottom now.
        held[index - columns].tick_params(labelbottom=True)
    return list(held[:n])


def scale(axis: Any, at: Sequence[float]) -> None:
    """Put ticks where the points are; a logarithmic axis where that spaces them more evenly."""
    if not at:
        return
    if at[0] > 0 and _spread(np.log(at)) < _spread(np.array(at)):
        axis.set_xscale("log", base=2)
        axis.minorticks_off()
    axis.set_xticks(at, [short(place) for place in at])


def _spread(at: Array) -> float:
    """Return how unequal the steps between places are, relative to their mean."""
    steps = np.diff(at)
    return float(steps.std() / steps.mean()) if len(steps) > 1 else 0.0


def short(number: float) -> str:
    """Return a number as ticks show it: 500, 2k."""
    return f"{number / 1000:g}k" if number >= 1000 else f"{number:g}"


def view(numbers: Iterable[float]) -> tuple[float, float]:
    """Return the ends of an axis that shows all `numbers`; an interval over few worlds may reach far beyond them."""
    held = np.array(list(numbers), dtype=float)
    held = held[np.isfinite(held)]
    margin = 0.06 * max(float(np.ptp(held)), 1e-6)
    return float(held.min() - margin), float(held.max() + margin)


def interval(scores: Sequence[float]) -> Interval:
    """Return the mean of independent scores with its 95% interval, whose ends are NaN with fewer than three.

    Student's interval over two reaches 12.7 standard errors: a figure that it fills shows nothing else.
    """
    found = mean_interval(scores)
    return found if len(scores) > 2 else Interval(found.value, np.nan, np.nan)


def worth(rows: Iterable[Row], names: Iterable[str]) -> list[float]:
    """Return the scores of rows, and what the policies `names` of the environment's own are worth."""
    held = list(rows)
    found = [reference([row for row in held if row.point == point], name)
             for name in names for point in dict.fromkeys(row.point for row in held)]  # fmt: skip
    return [row.score for row in held] + [one.value for one in found if one is not None]


def legend(figure: Any, axes: Sequence[Any], colours: Palette) -> None:
    """Put one legend for all `axes` below them."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    order = {style.title: style.order for style in colours.styles.values()}
    labels = sorted(found, key=lambda label: order.get(label, len(order) + 99))
    if labels:
        figure.legend([found[label] for label in labels], labels, loc="outside lower center", ncols=_columns(found))


def line(
    axis: Any,
    x: Sequence[float],
    means: Sequence[Interval],
    colours: Palette,
    learner: str,
    *,
    bars: bool = False,
    marked: bool = True,
) -> None:
    """Draw means over `x` with their intervals, as a band or as bars."""
    style = colours.styles[learner]
    values, low, high = (np.array([getattr(one, end) for one in means]) for end in ("value", "low", "high"))
    axis.plot(
        x, values, color=style.colour, linestyle=style.line, marker=style.marker if marked else "", label=style.title,
        zorder=2.1 if style.line == "-" else 2.0,
    )  # fmt: skip
    if bars:
        axis.vlines(x, low, high, color=style.colour, linewidth=1.2)
    else:
        axis.fill_between(x, low, high, color=style.colour, alpha=0.18, linewidth=0)


def reference_lines(
    axis: Any, rows: Sequence[Row], names: Iterable[str], colours: Palette, *, upright: bool = False
) -> None:
    """Draw what the environment's own policies are worth, from what rows say of them."""
    at = places(rows)
    for name in names:
        style = colours.styles[name]
        look = {"color": style.colour, "linestyle": style.line, "label": style.title, "linewidth": 1.4, "zorder": 1.9}
        found = reference(rows, name)
        if found is None:
            continue
        if upright:
            axis.axvline(found.value, **look)
        elif len(at) < 2:
            axis.axhline(found.value, **look)
        else:
            held = [reference([row for row in rows if row.x == place], name) for place in at]
            axis.plot(at, [np.nan if one is None else one.value for one in held], **look)


def point_with_bar(axis: Any, place: float, mean: Interval, colours: Palette, learner: str) -> None:
    """Draw a mean with its interval, lying."""
    style = colours.styles[learner]
    axis.hlines(place, mean.low, mean.high, color=style.colour, linewidth=2.2)
    axis.plot([mean.low, mean.high], [place, place], "|", color=style.colour, markersize=8)
    axis.plot(mean.value, place, color=style.colour, marker=style.marker, markersize=4.5)
