"""The look of the HTML pages: one self-contained document, its tables and its pictures.

No script and no request: figures are part of the page. It follows the reader's light or dark mode, and a table that is
wider than the screen scrolls in a box of its own.
"""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_TYPES = {".svg": "image/svg+xml", ".png": "image/png"}

# Of figures: as wide as the one they were set in, so that no label outgrows its place.
_FONTS = "DejaVu Sans, Verdana, Helvetica, Arial, sans-serif"

STYLE = """
:root { color-scheme: light dark; --text: #1c2128; --soft: #5b6470; --line: #d8dde3; --page: #fff; --card: #f6f7f9;
  --link: #0b5cad; --good: #16794a; --bad: #b3372f; --mark: #e4f1e9; --off: #fbeed9; --shade: #0002; --warn: #9a5b00; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7eb; --soft: #a0a8b3; --line: #363d47; --page: #14171b;
  --card: #1c2026; --link: #7db7f2; --good: #63d297; --bad: #ff8f85; --mark: #1d3a2b; --off: #42320f;
  --shade: #fff2; --warn: #f0b45c; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 1rem; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: var(--text);
  background: var(--page); max-width: 62rem; margin: 0 auto; padding: 2rem 1rem 4rem; overflow-wrap: break-word; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.35rem; line-height: 1.25; margin: 3.5rem 0 .5rem; padding-top: 1rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2rem 0 .4rem; } h4 { font-size: 1rem; margin: 1.6rem 0 .2rem; }
p { margin: 0 0 .8rem; max-width: 46rem; } a { color: var(--link); text-underline-offset: .15em; }
.lead { font-size: 1.05rem; } .note, .taste, figcaption { color: var(--soft); font-size: .9rem; }
.warning { border-left: 3px solid var(--warn); padding-left: .75rem; }
nav ol { columns: 18rem; column-gap: 2rem; margin: .5rem 0 0; padding-left: 1.4rem; }
nav li { break-inside: avoid; padding: .2rem 0; }
.figures { columns: 26rem; column-gap: 2.5rem; margin: 1.5rem 0 0; }
figure { margin: 0; padding-bottom: 1.8rem; break-inside: avoid; } .figures h4 { margin: 0 0 .4rem; }
figure img { display: block; width: 100%; height: auto; }
figcaption { margin-top: .4rem; max-width: 46rem; } img { max-width: 100%; }
img.paper { background: #fff; border-radius: .4rem; max-width: 46rem; }
.wide { overflow-x: auto; margin: .4rem 0 1.4rem; background: linear-gradient(to left, var(--page) 30%, transparent)
  right / 2.5rem 100% no-repeat local, linear-gradient(to left, var(--shade), transparent) right / .9rem 100% no-repeat
  scroll; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { text-align: right; padding: .32rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:not([scope=row]) { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page);
  padding-left: 0; }
th[scope=row] { font-weight: 500; } tr.quiet > * { color: var(--soft); }
td.best { background: var(--mark); } td.off { background: var(--off); } td b { font-weight: 700; }
.error { color: var(--soft); font-size: .85em; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; margin: 1rem 0; }
dt { color: var(--soft); } dd { margin: 0; min-width: 0; }
details { margin: .6rem 0; border: 1px solid var(--line); border-radius: .5rem; padding: 0 .9rem; }
summary { cursor: pointer; padding: .55rem 0; font-weight: 500; }
pre { font: .8rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; background: var(--card); padding: .7rem .8rem; border-radius: .4rem; margin: .4rem 0 1rem; }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.taste { margin: 0 0 .8rem; } .movie { border-top: 1px solid var(--line); padding: .9rem 0; }
.movie h3, .movie h5 { font-size: .95rem; margin: 0 0 .4rem; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem 1.5rem; } .sides p { margin: 0; }
.label { font-size: .88rem; color: var(--soft); margin-bottom: .2rem !important; }
.gain { color: var(--good); font-weight: 600; } .loss { color: var(--bad); font-weight: 600; }
kbd { font: inherit; color: var(--text); border: 1px solid var(--line); border-radius: .3rem; padding: 0 .35rem; }
@media (max-width: 40rem) { body { padding-top: 1.2rem; } h1 { font-size: 1.5rem; } th, td { padding: .32rem .45rem; }
  .sides, dl { grid-template-columns: 1fr; } dl { gap: 0; } dd { margin-bottom: .5rem; } }
@media print { .wide { overflow: visible; } details { border: 0; padding: 0; } }
"""


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what stands in it.
        error: what stands behind it in small print, ``± 0.015``.
        mark: "best" of its column, or "off", not what was expected; or neither.
    """

    text: str
    error: str = ""
    mark: Literal["", "best", "off"] = ""


def document(title: str, body: str) -> str:
    """Return the whole page around `body`, which is HTML; `title` is text."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def number(value: float, digits: int = 3, *, signed: bool = False) -> str:
    """Return `value` with a true minus sign, which is as wide as a plus; NaN is a dash."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    text = f"{value:{'+' if signed else ''},.{digits}f}"
    return text.replace("-", "" if float(text.replace(",", "")) == 0 else "−")


def measured(value: float, error: float, digits: int = 3, *, best: bool = False) -> Cell:
    """Return the cell ``mean ± standard error``; without the error where it is not known (one world)."""
    behind = f"± {number(error, digits)}" if math.isfinite(error) else ""
    return Cell(number(value, digits), behind, "best" if best and math.isfinite(value) else "")


def table(
    head: Sequence[str], body: Sequence[Sequence[Cell | str]], *, caption: str = "", quiet: Collection[int] = ()
) -> str:
    """Return a table in a box that scrolls; the first column names the rows.

    Args:
        head: names of the columns.
        body: rows of cells.
        caption: what the table shows.
        quiet: rows that stand back: they are there to compare with.
    """
    columns = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
    rows = []
    for index, (first, *rest) in enumerate(body):
        css = _class("quiet" if index in quiet else "")
        cells = "".join(_cell(cell) for cell in rest)
        rows.append(f'<tr{css}><th scope="row">{html.escape(_plain(first))}</th>{cells}</tr>')
    # Above the box, not in it: words must not scroll away.
    above = f'<p class="note">{html.escape(caption)}</p>' if caption else ""
    inside = f"<thead><tr>{columns}</tr></thead><tbody>{''.join(rows)}</tbody>"
    label = html.escape(caption or "Table")
    # Reachable by keyboard, or those without a pointer could not scroll it.
    return f'{above}<div class="wide" tabindex="0" role="region" aria-label="{label}"><table>{inside}</table></div>'


def _plain(cell: Cell | str) -> str:
    return cell if isinstance(cell, str) else cell.text


def _cell(cell: Cell | str) -> str:
    shown = Cell(cell) if isinstance(cell, str) else cell
    text = html.escape(shown.text)
    text = f"<b>{text}</b>" if shown.mark else text
    behind = f' <span class="error">{html.escape(shown.error)}</span>' if shown.error else ""
    return f"<td{_class(shown.mark)}>{text}{behind}</td>"


def _class(names: str) -> str:
    return f' class="{names}"' if names else ""


def data_uri(path: Path) -> str:
    """Return an SVG or PNG file as a URI that holds all of it."""
    content = path.read_bytes()
    held = lean(content.decode()).encode() if path.suffix == ".svg" else content
    return f"data:{_TYPES[path.suffix]};base64,{base64.b64encode(held).decode()}"


def lean(svg: str) -> str:
    """Return a figure of matplotlib's in half the bytes: a tenth of a point is finer than any screen shows.

    Glyphs and markers are not touched where they are scaled: only coordinates of paths and places are rounded.
    """
    svg = re.sub(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(?<= d=")[^"]*', lambda found: " ".join(_rounded(found[0]).split()), svg)
    svg = re.sub(r'(?<= [xy]=")[^"]*', lambda found: _rounded(found[0]), svg)
    svg = re.sub(r"font-family: [^;\"]*; ", "", svg).replace("<svg ", f'<svg font-family="{_FONTS}" ', 1)
    return re.sub(r">\s+<", "><", svg).strip()


def _rounded(numbers: str) -> str:
    return re.sub(r"-?\d+\.\d{2,}", lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), numbers)


def picture(light: Path, dark: Path | None, title: str, caption: str) -> str:
    """Return a figure that follows the reader's light or dark mode.

    Args:
        light: SVG or PNG file for a light page.
        dark: the same for a dark one.
        title: above it.
        caption: below it, and the words for those who do not see it.
    """
    other = f'<source media="(prefers-color-scheme: dark)" srcset="{data_uri(dark)}">' if dark else ""
    image = f'<img src="{data_uri(light)}" alt="{html.escape(f"{title}. {caption}")}">'
    shown = f"<picture>{other}{image}</picture><figcaption>{html.escape(caption)}</figcaption>"
    return f"<figure><h4>{html.escape(title)}</h4>{shown}</figure>"


def details(summary: str, inside: str) -> str:
    """Return `inside`, which is HTML, folded under `summary`, which is text."""
    return f"<details><summary>{html.escape(summary)}</summary>{inside}</details>"


def anchor(text: str) -> str:
    """Return `text` as an id: letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
