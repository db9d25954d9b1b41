"""Figures from rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.drawing import Drawing
from benchmarks.results import Row

__all__ = ["Drawing", "draw_all"]


def draw_all(
    rows: Sequence[Row], folder: Path, *, dark: bool = False, formats: Sequence[str] = ("svg",)
) -> list[Drawing]:
    """Draw every figure that `rows` give, the sweeps in their order.

    Args:
        rows: from :func:`benchmarks.results.read_rows`.
        folder: where the files go, made if need be; a name is the same every time.
        dark: light text, for a dark page; the background is transparent either way.
        formats: endings that matplotlib knows: "svg", "png", "pdf".
    """
    return []
