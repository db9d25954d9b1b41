"""The published data-size table beside ours, cell by cell.

    python -m benchmarks published --out runs

Our worlds are those of the preset ``paper_code``, seeds 0, 1, 2, ...; a value is the optimality
``(V(π) − V(uniform)) / (V(oracle) − V(uniform))``, mean ± standard error over worlds. The published worlds were drawn
by another generator: a cell agrees if the means differ by at most two combined standard errors.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import claims
from benchmarks.methods import TITLES
from benchmarks.pages import markup
from benchmarks.rows import Row, read_rows
from benchmarks.summaries import comparable, grouped, over_worlds, standard_error, summaries

SIZES = (500, 1000, 2000, 4000, 8000)

# Mean and standard error over 20 worlds; data-size sweep of Kiyohara et al., RecSys 2025 (arXiv 2504.02646).
PUBLISHED: Mapping[str, Mapping[int, tuple[float, float]]] = {
    "logging": dict.fromkeys(SIZES, (0.041, 0.004)),
    "regression": dict(
        zip(SIZES, [(0.019, 0.016), (0.038, 0.016), (0.037, 0.031), (0.093, 0.027), (0.133, 0.031)], strict=True)
    ),
    "is": dict(
        zip(SIZES, [(0.139, 0.007), (0.143, 0.007), (0.157, 0.005), (0.181, 0.007), (0.217, 0.008)], strict=True)
    ),
    "dr": dict(
        zip(SIZES, [(0.016, 0.016), (0.134, 0.016), (0.191, 0.009), (0.228, 0.009), (0.245, 0.009)], strict=True)
    ),
    "potec": dict(
        zip(SIZES, [(0.003, 0.015), (0.040, 0.012), (0.067, 0.013), (0.117, 0.016), (0.173, 0.018)], strict=True)
    ),
    "dso": dict(
        zip(SIZES, [(0.262, 0.015), (0.337, 0.018), (0.397, 0.016), (0.436, 0.021), (0.458, 0.019)], strict=True)
    ),
    "greedy": dict(
        zip(SIZES, [(0.002, 0.011), (0.036, 0.010), (0.051, 0.009), (0.097, 0.014), (0.150, 0.018)], strict=True)
    ),
    "online": dict.fromkeys(SIZES, (0.705, 0.010)),
}
"""Learner to number of logged rounds to (mean, standard error)."""

WITHOUT_LOG = ("logging", "online")
"""What no number of logged rounds changes: one cell each."""

LIMIT = 2.0
"""Combined standard errors beyond which a cell is off."""


@dataclass(frozen=True)
class Comparison:
    """One learner at one data size.

    Attributes:
        learner: name in :data:`PUBLISHED`.
        n: logged rounds.
        worlds: number of ours.
        mean: of our optimality over worlds.
        standard_error: of that mean.
        published_mean: what the paper's code reached.
        published_standard_error: of that.
        short: ours is of a share of the published schedules (``--quick``), and no replication.
    """

    learner: str
    n: int
    worlds: int
    mean: float
    standard_error: float
    published_mean: float
    published_standard_error: float
    short: bool = False

    @property
    def deviation(self) -> float:
        """Difference of the means in combined standard errors."""
        return (self.mean - self.published_mean) / math.hypot(self.standard_error, self.published_standard_error)

    @property
    def off(self) -> bool:
        """Whether the means differ by more than :data:`LIMIT`."""
        return abs(self.deviation) > LIMIT

    def __str__(self) -> str:
        return (
            f"{TITLES[self.learner]:<20} {self.n:>6} {self.worlds:>7}  {markup.number(self.mean):>6} ± "
            f"{markup.number(self.standard_error)}   {markup.number(self.published_mean):>6} ± "
            f"{markup.number(self.published_standard_error)}   {_signed(self.deviation):>6}"
        )


HEADER = f"{'learner':<20} {'n':>6} {'worlds':>7}  {'here':>14}   {'published':>14}   {'dev/se':>6}"

# Why a cell may be off although the method is the published one: what was measured, not what is hoped.
_REGRESSION = (
    "what rests on the prompt-reward regression, and the logging policy too, lies one to two standard errors above the "
    "published means at nearly every size; all cells share their worlds. Why was not found, and nothing was tuned"
)
REASONS: Mapping[tuple[str, int], str] = {
    ("greedy", 2000): _REGRESSION,
    ("dr", 2000): _REGRESSION,
    ("potec", 2000): _REGRESSION,
    ("regression", 8000): _REGRESSION,
}
"""What is known of cells that are off, by (learner, n)."""


def against(learner: str, n: int, worlds: int, mean: float, standard_error: float, short: bool = False) -> Comparison:
    """Put a mean of ours beside the published one.

    Raises:
        KeyError: nothing was published for this learner and size.
    """
    return Comparison(learner, n, worlds, mean, standard_error, *PUBLISHED[learner][n], short)


def compare(rows: Iterable[Row]) -> list[Comparison]:
    """Return the cells that rows of the sweep ``data_size`` give, of two worlds or more, in the order of the table."""
    own = [row for row in rows if row.sweep == "data_size" and row.x in PUBLISHED.get(row.learner, ())]
    short = {(row.learner, row.point) for row in own if claims.is_short(row)}
    return table_order(
        against(
            one.learner,
            round(one.x),
            one.worlds,
            one.mean.value,
            one.standard_error,
            short=(one.learner, one.point) in short,
        )
        for one in summaries(own)
        if one.worlds > 1
    )


def table_order(found: Iterable[Comparison]) -> list[Comparison]:
    """Return cells in the order of the table; of a learner that no log changes only the one with the most worlds."""
    ordered = sorted(found, key=lambda one: (list(PUBLISHED).index(one.learner), one.n))
    kept = [one for one in ordered if one.learner not in WITHOUT_LOG]
    for learner in reversed(WITHOUT_LOG):
        own = [one for one in ordered if one.learner == learner]
        kept = [*([max(own, key=lambda one: one.worlds)] if own else []), *kept]
    return kept


def verdict(cells: Sequence[Comparison]) -> list[str]:
    """Say how many cells are off, how many would be by chance, and what is known of them."""
    if not cells:
        return ["no cell has two worlds yet: run the sweep data_size"]
    off = [cell for cell in cells if cell.off]
    above = sum(cell.deviation > 0 for cell in cells)
    by_chance = math.erfc(LIMIT / math.sqrt(2)) * len(cells)
    said = [
        f"{len(off)} of {len(cells)} cells are more than {LIMIT:g} combined standard errors off; {by_chance:.1f} would "
        f"be by chance. {above} lie above the published mean, {len(cells) - above} below; cells share their worlds, so "
        "they are not independent."
    ]
    by_reason: dict[str, list[str]] = {}
    for cell in off:
        reason = REASONS.get((cell.learner, cell.n), "not explained")
        named = f"{TITLES[cell.learner]}, n = {cell.n} ({_signed(cell.deviation)})"
        by_reason.setdefault(reason, []).append(named)
    said += [f"{'; '.join(own)}: {reason}." for reason, own in by_reason.items()]
    if any(cell.short for cell in cells):
        said.append("Some cells are of a share of the published schedules (--quick): they are no replication.")
    return said


def together(rows: Iterable[Row]) -> str:
    """Say how far all cells together are off, over the worlds that they share.

    The mean over cells is taken in each world, so what cells of one world have in common is in the standard error. The
    published cells share worlds too, of which only the cells' own errors are known: they count as if all moved as one,
    which is the most they can.
    """
    own = [row for row in rows if row.sweep == "data_size" and row.x in PUBLISHED.get(row.learner, ())]
    cells = grouped(own, lambda row: (row.learner, row.point, round(row.x)))
    kept = {(one.learner, one.n) for one in compare(own)}
    gaps, errors = [], []
    for (learner, _, n), some in cells.items():
        if (learner, n) in kept:
            mean, error = PUBLISHED[learner][n]
            gaps.append({world: score - mean for world, score in over_worlds(some).items()})
            errors.append(error)
    common = sorted(set.intersection(*map(set, gaps))) if gaps else []
    if len(common) < 2:
        return "The cells have fewer than two worlds in common."
    by_world = [sum(gap[world] for gap in gaps) / len(gaps) for world in common]
    mean, ours, theirs = sum(by_world) / len(common), standard_error(by_world), sum(errors) / len(errors)
    return (
        f"All {len(gaps)} cells together, over the {len(common)} worlds they share: "
        f"{markup.number(mean, signed=True)} ± {markup.number(ours)}, and ± {markup.number(theirs)} at most of the "
        f"published side: {_signed(mean / math.hypot(ours, theirs))} combined standard errors."
    )


def text(cells: Sequence[Comparison]) -> str:
    """Return the comparison for a terminal."""
    return "\n".join([HEADER, *map(str, cells), "", *verdict(cells)])


def markdown(cells: Sequence[Comparison]) -> str:
    """Return the comparison as a table of learners by sizes, cells that are off in bold, and the verdict."""
    sizes = sorted({cell.n for cell in cells})
    held = {(cell.learner, cell.n): cell for cell in cells}
    lines = ["| learner | " + " | ".join(f"n = {n:,}" for n in sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
    for learner in dict.fromkeys(cell.learner for cell in cells):
        shown = [_cell(held.get((learner, n))) for n in sizes]
        lines.append(f"| {TITLES[learner]} | " + " | ".join(shown) + " |")
    first, *others = verdict(cells)
    return "\n".join([*(lines if cells else []), "", first, *([""] if others else []), *(f"- {one}" for one in others)])


def _cell(cell: Comparison | None) -> str:
    if cell is None:
        return ""
    shown = f"{number(cell.mean)} ± {number(cell.standard_error)} ({_signed(cell.deviation)})"
    return f"**{shown}**" if cell.off else shown


def number(value: float, decimals: int = 3) -> str:
    """Return a number as the paper writes it: nothing before the point where that is 0."""
    return re.sub(r"^(−?)0\.", r"\1.", markup.number(value, decimals))


def _signed(value: float) -> str:
    return markup.number(value, 1, signed=True)


def _print(chosen: argparse.Namespace) -> int:
    rows = comparable(read_rows(chosen.out))
    cells = compare(rows)
    print(markdown(cells) if chosen.markdown else text(cells))
    print(f"\n{together(rows)}" if cells else "")
    print("\nWhat else the paper says:\n")
    print("\n".join(("- " if chosen.markdown else "") + str(claim) for claim in claims.claims(rows)))
    return 0


def add_command(commands: Any) -> None:
    """Add ``published`` to the command line."""
    command = commands.add_parser("published", help="the published numbers beside those of a folder of results")
    command.add_argument("--out", type=Path, default=Path("runs"), help="folder of the results (default: runs)")
    command.add_argument("--markdown", action="store_true", help="as Markdown")
    command.set_defaults(do=_print)
