"""Figures from rows alone: which ones a sweep gets, and the command that draws them.

python -m benchmarks figures [--out runs] [--to FOLDER] [--format svg png] [--dark]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures.aggregates import improvements, interquartile_means, performance_profiles
from benchmarks.figures.drawing import Drawing, Sketch, palette, write
from benchmarks.figures.estimators import accuracy
from benchmarks.figures.scores import LINES, against_sentences, at_points, boxes, curves, over_axis
from benchmarks.figures.sheets import Sheet, sheet
from benchmarks.rows import Row, read_rows
from benchmarks.summaries import comparable, compared, grouped
from benchmarks.sweeps import SWEEPS
from offprompts_env.errors import DataError, StorageError

__all__ = ["Drawing", "add_command", "draw_all", "sheets_of"]


def sheets_of(rows: Iterable[Row]) -> list[tuple[Sheet, list[Sketch]]]:
    """Return the sweeps of `rows`, from :func:`benchmarks.rows.read_rows`, in their order, with what is to be drawn."""
    by_sweep = grouped(_scored(comparable(rows)), lambda row: row.sweep)
    known = list(SWEEPS)
    names = sorted(by_sweep, key=lambda name: (known.index(name) if name in known else len(known), name))
    shown = [sheet(by_sweep[name]) for name in names]
    return [(one, sketches(one)) for one in shown]


def draw_all(
    sheets: Iterable[tuple[Sheet, Sequence[Sketch]]],
    folder: Path,
    *,
    dark: bool = False,
    formats: Sequence[str] = ("svg",),
) -> list[Drawing]:
    """Draw what there is to be drawn.

    Args:
        sheets: from :func:`sheets_of`; for light and dark figures alike.
        folder: where the files go, made if need be; a name is the same every time.
        dark: light text, for a dark page; the background is transparent either way.
        formats: endings that matplotlib knows: "svg", "png", "pdf".

    Raises:
        ConfigError: an unknown format.
        MissingDependencyError: matplotlib is missing.
        StorageError: the folder cannot be written.
    """
    drawings = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for shown, sketched in sheets:
            colours = palette([*shown.learners, *LINES, "best single", "oracle"], dark=dark)
            for sketch in sketched:
                stem = f"{shown.sweep}_{sketch.kind}"
                path = write(sketch, colours, folder, stem + ("-dark" if dark else ""), formats)
                drawings.append(Drawing(shown.sweep, stem, sketch.title, sketch.caption, path))
    except OSError as error:
        raise StorageError(
            f"{folder}: expected a folder where figures can be written, got {error}; free some space, or choose "
            "another one with --to"
        ) from error
    return drawings


def _scored(rows: Iterable[Row]) -> list[Row]:
    """Return what figures can show: estimators that never gave a number have no score, but measures."""
    return [row for row in rows if np.isfinite(row.score) or row.result.measures]


def sketches(shown: Sheet) -> list[Sketch]:
    """Return the figures that a sweep gets."""
    one_point_a_panel = all(len(points) == 1 for points in shown.panels.values())
    if shown.sweep.startswith("estimators"):
        found: list[Sketch | None] = [accuracy(shown)]
    elif shown.unit == "improvement over no prompt":
        found = [boxes(shown) if one_point_a_panel else None, against_sentences(shown), curves(shown)]
    else:
        found = [over_axis(shown) or at_points(shown), against_sentences(shown), curves(shown)]
    if compared(shown.rows) and not shown.sweep.startswith("estimators"):
        found += [interquartile_means(shown), performance_profiles(shown), improvements(shown)]
    return [sketch for sketch in found if sketch is not None]


def add_command(commands: Any) -> None:
    """Add ``figures`` to the commands of ``python -m benchmarks``."""
    parser = commands.add_parser("figures", help="draw the figures of what was run")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the results (default: runs)")
    parser.add_argument("--to", type=Path, help="folder of the figures (default: OUT/figures)")
    parser.add_argument("--format", nargs="+", default=["svg"], metavar="ENDING", help="svg, png, pdf (default: svg)")
    parser.add_argument("--dark", action="store_true", help="light text, for dark pages")
    parser.set_defaults(do=_do)


def _do(chosen: argparse.Namespace) -> int:
    rows = read_rows(chosen.out)
    if not rows:
        raise DataError(f"{chosen.out}: expected rows of a sweep, got none; run one first: python -m benchmarks run")
    folder = chosen.to or chosen.out / "figures"
    for drawing in draw_all(sheets_of(rows), folder, dark=chosen.dark, formats=chosen.format):
        print(f"{drawing.path}: {drawing.title}")
    return 0


def main() -> int:
    """Run the command alone: ``python -m benchmarks.figures figures``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures")
    add_command(parser.add_subparsers(required=True))
    chosen = parser.parse_args()
    return int(chosen.do(chosen))


if __name__ == "__main__":
    raise SystemExit(main())
