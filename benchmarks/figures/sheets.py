"""What a figure says of the rows of a sweep: its title, axis, unit, panels, and the words of its caption."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.rows import Row
from benchmarks.summaries import Interval, Summary, grouped, in_order, mean_interval, optimality, over_worlds, summaries
from benchmarks.sweeps import SWEEPS


@dataclass(frozen=True)
class Sheet:
    """The rows of one sweep, in order.

    Attributes:
        sweep: name.
        rows: at least one.
        title: of the sweep.
        axis: what is varied.
        unit: what a score is.
        panels: name of a panel to its points: what is varied besides the axis.
    """

    sweep: str
    rows: tuple[Row, ...]
    title: str
    axis: str
    unit: str
    panels: dict[str, tuple[str, ...]]

    @property
    def learners(self) -> list[str]:
        """Names, in the order of the alphabet."""
        return sorted({row.learner for row in self.rows})

    @property
    def summaries(self) -> list[Summary]:
        """Means of the scores."""
        return summaries(self.rows)

    def heading(self, of: str) -> str:
        """Return the title of a figure of this sweep that shows `of`."""
        subject = self.title.removesuffix(f": {self.unit}").replace(":", ",")
        return f"{subject}: {of}"

    def at(self, points: Iterable[str]) -> list[Row]:
        """Return the rows of some points."""
        wanted = set(points)
        return [row for row in self.rows if row.point in wanted]


def sheet(rows: Iterable[Row]) -> Sheet:
    """Return the sheet of the rows of one sweep."""
    held = tuple(in_order(rows))
    sweep, known = held[0].sweep, SWEEPS.get(held[0].sweep)
    places = {row.point: row.x for row in held}
    panels: dict[str, tuple[str, ...]] = {}
    for point, x in places.items():
        panel = _panel(point, x)
        panels[panel] = (*panels.get(panel, ()), point)
    return Sheet(
        sweep,
        held,
        known.title if known else sweep.replace("_", " "),
        known.axis if known else next(iter(places)).split("=")[0],
        _unit(held),
        panels,
    )


def _panel(point: str, x: float) -> str:
    """Return what a point's name says besides the place on the axis: ``uniform kernel``."""
    rest = [part for part in point.split("/") if not _is_number(part.rpartition("=")[2], x)]
    return in_words(rest)


def in_words(parts: Sequence[str]) -> str:
    """Return parts of a point's name as the title of a panel: ``uniform kernel``, a line each; numbers as ``n=500``."""
    lines = []
    for part in parts:
        name, _, value = part.rpartition("=")
        lines.append(part if not name or value[:1].isdigit() else f"{value} {name}" if len(parts) > 1 else value)
    return "\n".join(wrapped for line in lines for wrapped in textwrap.wrap(line, 24))


def _is_number(text: str, x: float) -> bool:
    try:
        return bool(np.isclose(float(text), x))
    except ValueError:
        return False


def _unit(rows: Sequence[Row]) -> str:
    if all(_is_optimality(row) for row in rows):
        return "optimality"
    if any("no prompt" in row.result.references for row in rows):
        return "improvement over no prompt"
    return "score"


def _is_optimality(row: Row) -> bool:
    return bool(np.isclose(row.score, optimality(row), rtol=1e-6, atol=1e-9))


def reference(rows: Iterable[Row], name: str) -> Interval | None:
    """Return what a policy of the environment's own is worth, on the scale of the scores, over worlds; or nothing."""

    def score(row: Row) -> float:
        owned = row.result.references
        if name not in owned:
            return float("nan")
        if _is_optimality(row):
            return (owned[name] - owned["uniform"]) / (owned["oracle"] - owned["uniform"])
        return owned[name] - owned.get("no prompt", 0.0)

    found = over_worlds(rows, score)
    return mean_interval(list(found.values())) if found else None


def worlds_in_words(rows: Iterable[Row]) -> str:
    """Return over how many worlds means are: ``20 worlds``, ``3 to 20 worlds``, ``5 logs of 5 learning seeds each``."""
    cells = grouped(rows, lambda row: (row.point, row.learner))
    worlds = {len({row.world for row in own}) for own in cells.values()}
    seeds = {len(own) for cell in cells.values() for own in grouped(cell, lambda row: row.world).values()}
    first = next(iter(cells.values()))[0]
    name = re.search(r"/(\w+)=\d+(/seed=\d+)?/learner=", first.id)
    text = f"{_range(worlds)} {name.group(1) if name else 'world'}{'' if worlds == {1} else 's'}"
    return text if seeds == {1} else f"{text} of {_range(seeds)} learning seeds each"


def scores_in_words(rows: Iterable[Row]) -> str:
    """Return what counts as one score in aggregates, as a sentence; nothing where it is a run."""
    seeds = {len(own) for own in grouped(rows, lambda row: (row.point, row.learner, row.world)).values()}
    return "" if seeds == {1} else " A score is the mean over the learning seeds of one of them."


def _range(numbers: set[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


_CONSTANTS = {
    "n": "{} logged rounds",
    "rounds": "{} logged rounds",
    "prompts": "{} prompts",
    "noise": "reward noise of standard deviation {}",
}


def settings_in_words(rows: Iterable[Row]) -> str:
    """Return what all rows have in common of what sweeps vary, and whether training was cut short; as sentences."""
    settings = {row.config.split("; ")[0] for row in rows}
    said = []
    for name, words in _CONSTANTS.items():
        values = {found for setting in settings for found in re.findall(rf"[(, ]{name}=([\d.]+)", setting)}
        if len(values) == 1:
            said.append(words.format(f"{float(values.pop()):,g}"))
    text = f" {'; '.join(said)}." if said else ""
    shares = {float(share) for setting in settings for share in re.findall(r"Effort\(steps=([\d.e-]+)", setting)}
    if shares - {1.0}:
        amounts = " or ".join(f"{share:.0%}" for share in sorted(shares))
        text += f" Quick form: {amounts} of the published gradient steps."
    if any(setting.startswith("TextSetting(") for setting in settings):
        text += " All are valued with the same users, movies and sentences, whose own error is in no interval."
    return text
