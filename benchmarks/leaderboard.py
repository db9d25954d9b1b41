"""The leaderboard in the docs, from the committed summary of the reference runs alone.

    python -m benchmarks leaderboard --update --out runs   # the summary, from rows
    python -m benchmarks leaderboard                       # docs/leaderboard.md and the blocks of README.md
    python -m benchmarks leaderboard --check               # do they agree?

A block in README.md begins with ``<!-- leaderboard:NAME -->`` and ends with ``<!-- end -->``; NAME is a sweep, or
``published``.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import published, reference
from benchmarks.claims import is_short
from benchmarks.methods import TITLES
from benchmarks.pages.tables import REFERENCES
from benchmarks.published import number
from benchmarks.reference import Line
from benchmarks.rows import Row, read_rows
from benchmarks.summaries import grouped
from benchmarks.sweeps import SWEEPS
from offprompts_env.errors import ConfigError, DataError, unknown_name

ROOT = Path(__file__).parents[1]
DOCS = Path("docs/leaderboard.md")
README = Path("README.md")

_BLOCK = re.compile(r"(<!-- leaderboard:(\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
_MARK = re.compile(r"<!-- leaderboard:\S+ -->")

_HEAD = """\
# Leaderboard

<!-- Written by `python -m benchmarks leaderboard` from benchmarks/results/summary.csv: change that, not this. -->

Reference runs of the sweeps that `python -m benchmarks list` shows, at the published schedules. A cell is the mean ±
standard error over worlds (MovieLens: over logs, of means over learning seeds); of several that learn from the
log alone the best of a point is bold. IQM is the interquartile mean over all points and worlds of the sweep with its
95% bootstrap interval, and orders the learners; where not all of them were run at all points, the first point does.
Seconds are processor time of learning one run, worlds batched, without what runs share (logging policy, regressions,
densities). A score is the optimality, 0 for uniform and 1 for the best
prompt each time; on MovieLens the improvement over no prompt; for estimators the mean squared error over the variance
of logged rewards, where less is better.
"""


def board(lines: Sequence[Line]) -> str:
    """Return the page."""
    parts = [_HEAD]
    for sweep, own in grouped(lines, lambda line: line.sweep).items():
        parts.append(f"## {sweep}\n\n{sweep_table(own)}\n\n{_provenance(own)}\n")
        if sweep == "data_size":
            parts.append(f"### Beside the published table\n\n{_published(own)}\n")
    if not lines:
        parts.append("There are no reference runs yet.\n")
    return "\n".join(parts)


def _less_is_better(sweep: str) -> bool:
    return sweep.startswith("estimators")


def sweep_table(lines: Sequence[Line]) -> str:
    """Return the table of one sweep: learners by points, or points by learners where there are more points."""
    points = list(dict.fromkeys(line.point for line in lines if line.point))
    cells = {(line.point, line.learner): line for line in lines}
    whole = {line.learner: line for line in lines if not line.point or len(points) == 1}
    less = _less_is_better(lines[0].sweep)
    # Over other points than those of its neighbours, a mean over points ranks nobody.
    common = all((point, name) in cells for point in points for name in whole)

    def rank(name: str) -> tuple[float, str]:
        value = whole[name].iqm if common else cells[points[0], name].mean if (points[0], name) in cells else math.inf
        return value if less or value == math.inf else -value, name

    learners = sorted(whole, key=rank)
    best = {point: _best([line for line in lines if line.point == point], less=less) for point in points}
    shown = {key: _mean(line, bold=line == best.get(key[0]), less=less) for key, line in cells.items()}
    if len(points) > len(learners):
        head = ["point", *(TITLES.get(name, name) for name in learners)]
        body = [[point, *(shown.get((point, name), "") for name in learners)] for point in points]
    else:
        head = ["learner", *(["IQM"] if common else []), *points, "seconds"]
        body = [
            [
                TITLES.get(name, name),
                *([_interval(whole[name], less=less)] if common else []),
                *(shown.get((point, name), "") for point in points),
                f"{whole[name].seconds:.1f}",
            ]
            for name in learners
        ]
    rows = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _best(lines: Sequence[Line], *, less: bool) -> Line | None:
    """Return the best of those that learn from the log alone; none where there is but one, which beats nobody."""
    learned = [line for line in lines if line.learner not in REFERENCES]
    if len(learned) < 2:
        return None
    return min(learned, key=lambda line: (line.mean if less else -line.mean, line.learner))


def _decimals(value: float, *, less: bool) -> int:
    # Squared errors may be small: three digits that say something.
    return max(3, 2 - math.floor(math.log10(abs(value)))) if less and value else 3


def _mean(line: Line, *, bold: bool, less: bool) -> str:
    decimals = _decimals(line.mean, less=less)
    error = "" if math.isnan(line.standard_error) else f" ± {number(line.standard_error, decimals)}"
    shown = f"{number(line.mean, decimals)}{error}"
    return f"**{shown}**" if bold else shown


def _interval(line: Line, *, less: bool) -> str:
    decimals = _decimals(line.iqm, less=less)
    shown = number(line.iqm, decimals)
    if math.isnan(line.iqm_low):
        return shown
    return f"{shown} [{number(line.iqm_low, decimals)}, {number(line.iqm_high, decimals)}]"


def _provenance(lines: Sequence[Line]) -> str:
    cells = [line for line in lines if line.point]
    counts = sorted({line.worlds for line in cells})
    worlds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    runs = sum(line.runs for line in cells)
    versions = " or ".join(sorted({line.versions for line in cells}))
    commits = " ".join(sorted({commit for line in cells for commit in line.commit.split()})) or "unknown"
    return f"{worlds} worlds a cell, {runs:,} runs; {versions}; commit {commits}."


def _published(lines: Sequence[Line]) -> str:
    cells = [
        published.against(line.learner, round(line.x), line.worlds, line.mean, line.standard_error)
        for line in lines
        if line.point and line.worlds > 1 and line.x in published.PUBLISHED.get(line.learner, ())
    ]
    return published.markdown(published.table_order(cells))


def filled(text: str, lines: Sequence[Line]) -> str:
    """Return a text with its blocks made anew.

    Raises:
        DataError: a block does not end, or the summary has no lines of its sweep.
    """
    sweeps = grouped(lines, lambda line: line.sweep)
    if len(_MARK.findall(text)) != len(_BLOCK.findall(text)):
        raise DataError("expected `<!-- end -->` behind each `<!-- leaderboard:NAME -->`, got one without; write it")

    def block(match: re.Match[str]) -> str:
        name = match[2]
        if name not in {"published", *sweeps}:
            raise DataError(str(unknown_name("block", f"leaderboard:{name}", ["published", *sweeps])))
        made = _published(sweeps.get("data_size", [])) if name == "published" else sweep_table(sweeps[name])
        return f"{match[1]}{made}\n{match[4]}"

    return _BLOCK.sub(block, text)


def pages(lines: Sequence[Line], root: Path = ROOT) -> dict[Path, str]:
    """Return what the files under `root` that show the summary should hold."""
    readme = root / README
    made = {root / DOCS: board(lines)}
    if readme.exists():
        made[readme] = filled(readme.read_text(encoding="utf-8"), lines)
    return made


def differences(made: Mapping[Path, str], root: Path = ROOT) -> list[str]:
    """Return the lines in which files differ from what they should hold: ``-`` is there, ``+`` should be."""
    found: list[str] = []
    for path, text in made.items():
        held = path.read_text(encoding="utf-8") if path.exists() else ""
        names = (f"{path.relative_to(root)} (file)", f"{path.relative_to(root)} (from the summary)")
        found += difflib.unified_diff(held.splitlines(), text.splitlines(), *names, n=0, lineterm="")
    return found


def update(out: Path, summary: Path = reference.SUMMARY, *, sweeps: Sequence[str] = (), force: bool = False) -> str:
    """Put the rows of a folder of results into the summary, and say what was done.

    Args:
        out: the folder.
        summary: the file.
        sweeps: which to take; none named: those of which every run is there.
        force: also if the summary loses worlds.

    Raises:
        DataError: the folder has no such rows of full schedules, or the summary would lose worlds and `force` is not
            given.
    """
    rows = read_rows(out)
    full = [row for row in rows if not is_short(row)]
    notes = [f"{len(rows) - len(full)} rows of short schedules (--quick) are left out"] if len(full) < len(rows) else []
    taken: list[Row] = []
    for sweep, own in grouped(full, lambda row: row.sweep).items():
        missing = _missing(sweep, own)
        if sweep in sweeps or (not sweeps and missing == 0):
            taken += [row for row in own if row.learner in _built_in(sweep)]
        elif not sweeps:
            notes.append(f"{sweep} is left out: {missing} of its runs are missing; --update {sweep} takes it as it is")
    new = reference.lines_of(taken)
    if not new:
        raise DataError(
            f"{out}: expected a sweep of full schedules, got none; run one without --quick"
            + "".join(f"; {note}" for note in notes)
        )
    reference.write_summary(reference.joined(reference.read_summary(summary), new, force=force), summary)
    said = f"{len(new)} lines of {', '.join(dict.fromkeys(line.sweep for line in new))}: {summary}"
    return "\n".join([said, *notes])


def _built_in(sweep: str) -> set[str]:
    """Return the names of the project's own learners in a sweep: users' agents are no reference."""
    return {name for point in SWEEPS[sweep].points for name in point.methods} if sweep in SWEEPS else set()


def _missing(sweep: str, rows: Sequence[Row]) -> float:
    """Return how many runs of a sweep are not among `rows`; of one that is not known, all."""
    there = {row.id for row in rows}
    return sum(run.id not in there for run in SWEEPS[sweep].runs()) if sweep in SWEEPS else math.inf


def _do(chosen: argparse.Namespace) -> int:
    if chosen.force and chosen.update is None:
        raise ConfigError("--force: expected --update beside it; nothing else is refused")
    if chosen.update is not None:
        summary = chosen.root / "benchmarks/results/summary.csv"
        print(update(chosen.out, summary, sweeps=chosen.update, force=chosen.force))
    made = pages(reference.read_summary(chosen.root / "benchmarks/results/summary.csv"), chosen.root)
    found = differences(made, chosen.root)
    if chosen.check:
        said = "docs and summary disagree: python -m benchmarks leaderboard" if found else "docs and summary agree"
        print("\n".join([*found, said]))
        return 1 if found else 0
    for path, text in made.items():
        reference.write_text(path, text)
    print("docs written" if found else "nothing to change")
    return 0


def add_command(commands: Any) -> None:
    """Add ``leaderboard`` to the command line."""
    command = commands.add_parser("leaderboard", help="the table of the reference runs in the docs")
    kind = command.add_mutually_exclusive_group()
    kind.add_argument("--update", nargs="*", metavar="SWEEP",
                      help="first summarise the rows of --out: of these sweeps, or of all that are whole")  # fmt: skip
    kind.add_argument("--check", action="store_true", help="change nothing; fail if docs and summary disagree")
    command.add_argument("--out", type=Path, default=Path("runs"), help="folder of the results (default: runs)")
    command.add_argument("--force", action="store_true", help="also if the summary loses worlds")
    command.set_defaults(do=_do, root=ROOT)
