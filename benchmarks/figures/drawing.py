"""What all figures share: their record, their colours and markers, their look, and how they are written."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.methods import TITLES
from offprompts_env.errors import ConfigError, missing_dependency
from offprompts_env.manifest import write_atomic

WIDTH = 5.2
"""Of every figure, in inches: text stays readable where a phone shows it at two thirds."""


@dataclass(frozen=True)
class Drawing:
    """A figure that was drawn.

    Attributes:
        sweep: whose rows it shows.
        name: the sweep's name and the kind, ``data_size_scores``; files of a dark figure end in ``-dark``.
        title: one line.
        caption: what is shown, over how many worlds, and what bands and bars are.
        path: the file in the first of the formats asked for; other formats lie beside it.
    """

    sweep: str
    name: str
    title: str
    caption: str
    path: Path


@dataclass(frozen=True)
class Style:
    """How a learner is drawn.

    Attributes:
        title: display name.
        colour: of lines and markers.
        marker: matplotlib's name.
        line: matplotlib's name; dashed for what is no offline learner.
        order: place in legends.
    """

    title: str
    colour: str
    marker: str
    line: str
    order: int


@dataclass(frozen=True)
class Palette:
    """Colours of one figure.

    Attributes:
        styles: by learner.
        ink: of text and axes.
        dark: on a dark page.
    """

    styles: dict[str, Style]
    ink: str
    dark: bool

    def ordered(self, learners: Iterable[str]) -> list[str]:
        """Return `learners` in the order of legends."""
        return sorted(set(learners), key=lambda name: self.styles[name].order)


@dataclass(frozen=True)
class Sketch:
    """A figure that is yet to be drawn.

    Attributes:
        kind: last part of its name.
        title: one line.
        caption: see :class:`Drawing`.
        height: in inches.
        draw: puts it on a matplotlib figure.
    """

    kind: str
    title: str
    caption: str
    height: float
    draw: Callable[[Any, Palette], None]


# Okabe and Ito's and Paul Tol's colours, which people with any common colour blindness tell apart; markers differ too.
_FIXED = {
    "uniform": ("#999999", "|", ":"),
    "logging": ("#777777", "d", "--"),
    "no prompt": ("#999999", "|", ":"),
    "best single": ("#117733", "_", "-."),
    "oracle": ("#555555", "*", ":"),
    "online": ("#555555", "*", "-."),
    "dso": ("#D55E00", "o", "-"),
    "exact-dso": ("#882255", "D", "-"),
    "sentence-greedy": ("#0072B2", "s", "-"),
    "sentence-pg": ("#5D4BB5", "p", "-"),
    "sentence-dr": ("#44AA99", "h", "-"),
    "regression": ("#E69F00", "^", "-"),
    "is": ("#56B4E9", "v", "-"),
    "dr": ("#009E73", "P", "-"),
    "potec": ("#CC79A7", "X", "-"),
    "greedy": ("#999933", "<", "-"),
}
# Those that no fixed learner has come first.
_FURTHER = (
    "#AA4499", "#8C5109", "#7A9CC6", "#C9A400", "#117733", "#44AA99", "#5D4BB5", "#4B7A0F",
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255",
)  # fmt: skip
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*", "d")


def palette(learners: Iterable[str], *, dark: bool = False) -> Palette:
    """Return the colours of `learners`: fixed for those of this project, further ones in the order of names."""
    names = sorted(set(learners))
    known = list(TITLES)
    unknown = [name for name in names if name not in _FIXED]
    taken = {_FIXED[name][0] for name in names if name in _FIXED}
    free = [colour for colour in _FURTHER if colour not in taken] or list(_FURTHER)
    styles = {}
    for name in names:
        place = unknown.index(name) if name in unknown else 0
        further = free[place % len(free)], _MARKERS[place % len(_MARKERS)], "-"
        colour, marker, line = _FIXED.get(name, further)
        order = known.index(name) if name in known else len(known) + place
        styles[name] = Style(title(name), _lighter(colour) if dark else colour, marker, line, order)
    return Palette(styles, "#e8e8e8" if dark else "#222222", dark)


def title(learner: str) -> str:
    """Return what a learner is called in figures and tables."""
    return TITLES.get(learner, learner)


def _lighter(colour: str) -> str:
    """Return a colour a third of the way to white, for a dark page."""
    channels = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(c + (255 - c) * 0.35):02x}" for c in channels)


def write(sketch: Sketch, colours: Palette, folder: Path, stem: str, formats: Sequence[str]) -> Path:
    """Draw `sketch` and return the file in the first of `formats`.

    Raises:
        ConfigError: a format that matplotlib does not know.
        MissingDependencyError: matplotlib is missing.
    """
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise missing_dependency("matplotlib", "plots", "figures") from error
    with mpl.rc_context(_look(colours)):
        figure = Figure(figsize=(WIDTH, sketch.height), layout=ConstrainedLayoutEngine(w_pad=0.07, h_pad=0.07))
        known = FigureCanvasAgg(figure).get_supported_filetypes()
        if not formats or set(formats) - set(known):
            raise ConfigError(
                f"formats: expected some of {', '.join(sorted(known))}, got {', '.join(formats) or 'none'}"
            )
        sketch.draw(figure, colours)
        for form in formats:
            # Without a date, so that the same rows give the same file.
            undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(form)
            buffer = io.BytesIO()
            figure.savefig(buffer, format=form, transparent=True, metadata=undated, dpi=160)
            write_atomic(folder / f"{stem}.{form}", buffer.getvalue())
    return folder / f"{stem}.{formats[0]}"


def _look(colours: Palette) -> Any:
    ink = colours.ink
    return {
        "font.size": 11, "axes.titlesize": 10.5, "legend.fontsize": 10, "font.family": "sans-serif",
        "text.color": ink, "axes.edgecolor": ink, "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
        "grid.color": "#888888", "grid.alpha": 0.25, "grid.linewidth": 0.6,
        "lines.linewidth": 1.6, "lines.markersize": 5.5, "legend.frameon": False, "legend.handlelength": 2.4,
        "xtick.minor.bottom": False, "ytick.minor.left": False,
        # Text stays text: small files, the page's size, and a screen reader finds it.
        "svg.fonttype": "none", "svg.hashsalt": "offprompts",
    }  # fmt: skip
