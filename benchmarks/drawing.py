"""What all figures share: their record, their colours and markers, their look."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Drawing:
    """A figure that was drawn.

    Attributes:
        sweep: whose rows it shows.
        name: of the file, without its ending: the sweep's name and the kind, ``data_size_optimality``.
        title: one line.
        caption: what is shown, over how many worlds, and what bands and bars are.
        path: the file in the first of the formats asked for; other formats lie beside it.
    """

    sweep: str
    name: str
    title: str
    caption: str
    path: Path
