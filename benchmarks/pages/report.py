"""One self-contained HTML page of a result set, from rows alone.

    python -m benchmarks report --out runs --to report.html

What was run, the figures, the tables behind them, the published numbers beside ours, and what real users were shown.
"""

from __future__ import annotations

import argparse
import html
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.claims import Claim, claims
from benchmarks.figures import draw_all, sheets_of
from benchmarks.figures.drawing import Drawing, title
from benchmarks.figures.estimators import PANELS
from benchmarks.pages.markup import anchor, details, document, number, picture, table
from benchmarks.pages.provenance import Coverage, coverage, processor_time, versions
from benchmarks.pages.stories import Side, Story, stories_html
from benchmarks.pages.tables import (
    REFERENCES,
    beside_published,
    learner_order,
    lower_is_better,
    means,
    numbers,
    over_the_sweep,
    score_name,
    worlds_in_words,
)
from benchmarks.progress import duration
from benchmarks.published import compare, verdict
from benchmarks.rows import ResultsWarning, Row, read_rows
from benchmarks.summaries import comparable, grouped, in_order, summaries
from benchmarks.sweeps import SWEEPS
from offprompts_env.errors import DataError, StorageError
from offprompts_env.manifest import write_atomic

_OVER_WORLDS = "Mean ± standard error over worlds."


@dataclass(frozen=True)
class _Figure:
    """A drawing in both of its forms."""

    light: Drawing
    dark: Drawing | None


def write_report(rows: Sequence[Row], path: Path) -> None:
    """Write the page.

    Args:
        rows: from :func:`benchmarks.rows.read_rows`.
        path: of the page; its folder is made if need be.

    Raises:
        DataError: there are no rows.
        StorageError: the page cannot be written.
        MissingDependencyError: matplotlib is not there.
    """
    page = report(rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, page.encode())
    except OSError as error:
        raise StorageError(f"{path}: expected a place where the page can be written, got {error}") from error


def report(rows: Sequence[Row]) -> str:
    """Return the page; see :func:`write_report`."""
    if not rows:
        raise DataError("expected rows, got none; run a sweep first, such as `python -m benchmarks run data_size`")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResultsWarning)
        held = in_order(comparable(rows))
    notes = [str(one.message) for one in caught if issubclass(one.category, ResultsWarning)]
    sweeps = _in_sweep_order(grouped(held, lambda row: row.sweep))
    covered = {name: coverage(own) for name, own in sweeps.items()}
    with tempfile.TemporaryDirectory() as folder:
        drawn = _draw(held, Path(folder))
        parts = [
            _sweep(name, own, covered[name], [one for one in drawn if one.light.sweep == name])
            for name, own in sweeps.items()
        ]
    checked = _claims(held)
    contents = {"what-was-run": "What was run"} | {anchor(name): _sweep_title(name) for name in sweeps}
    contents |= {"claims": "What the paper says"} if checked else {}
    inside = "\n".join(part for part in [_what_was_run(held, sweeps, covered, notes), *parts, checked] if part)
    return document("Benchmark report", f"{_head(held, sweeps, contents)}\n<main>\n{inside}\n</main>")


def _in_sweep_order(groups: Mapping[str, list[Row]]) -> dict[str, list[Row]]:
    known = [name for name in SWEEPS if name in groups]
    return {name: groups[name] for name in [*known, *(name for name in groups if name not in SWEEPS)]}


def _sweep_title(name: str) -> str:
    return SWEEPS[name].title if name in SWEEPS else name


def _world_name(name: str) -> str:
    return SWEEPS[name].world_name if name in SWEEPS else "world"


def _draw(rows: Sequence[Row], folder: Path) -> list[_Figure]:
    sheets = sheets_of(rows)
    light = draw_all(sheets, folder / "light")
    dark = {drawing.name: drawing for drawing in draw_all(sheets, folder / "dark", dark=True)}
    return [_Figure(drawing, dark.get(drawing.name)) for drawing in light]


def _plural(count: int, name: str) -> str:
    return f"{count:,} {name}{'' if count == 1 else 's'}"


def _head(rows: Sequence[Row], sweeps: Mapping[str, Sequence[Row]], contents: Mapping[str, str]) -> str:
    learners, last = len({row.learner for row in rows}), max(row.finished for row in rows)
    links = "".join(f'<li><a href="#{name}">{html.escape(text)}</a></li>' for name, text in contents.items())
    said = (
        f"{_plural(len(rows), 'run')} of {_plural(len(sweeps), 'sweep')} with {_plural(learners, 'learner')}, the last "
        f"finished {_moment(last)}. Every number and figure here is made from the rows of these runs."
    )
    return (
        f'<header><h1>Benchmark report</h1><p class="lead">{html.escape(said)}</p></header>'
        f'<nav aria-label="Contents"><ol>{links}</ol></nav>'
    )


def _moment(iso: str) -> str:
    """Return ``2026-11-22 21:40 UTC``."""
    return f"{iso[:16].replace('T', ' ')} UTC"


def _what_was_run(
    rows: Sequence[Row],
    sweeps: Mapping[str, Sequence[Row]],
    covered: Mapping[str, Coverage],
    notes: Sequence[str],
) -> str:
    body = []
    for name, own in sweeps.items():
        found = covered[name]
        worlds = worlds_in_words([found.worlds], _world_name(name))
        seeds = f" × {_plural(found.seeds, 'seed')}" if found.seeds > 1 else ""
        missing = "–" if found.form == "other" else f"{found.missing:,}"
        points, learners = len({row.point for row in own}), len({row.learner for row in own})
        time = duration(processor_time(own).learning)
        body.append([name, f"{found.runs:,}", missing, f"{points}", f"{learners}", worlds + seeds, found.form, time])
    head = ["sweep", "runs", "missing", "points", "learners", "worlds", "schedules", "processor time"]
    said = "".join(f'<p class="warning">{html.escape(note)}</p>' for note in notes)
    return f'<section id="what-was-run"><h2>What was run</h2>{said}{table(head, body)}{_provenance(rows)}</section>'


def _provenance(rows: Sequence[Row]) -> str:
    times, first, last = processor_time(rows), *(edge(row.finished for row in rows) for edge in (min, max))
    commits = sorted({row.commit for row in rows if row.commit})
    facts = {
        "Finished": f"{_moment(first)} to {_moment(last)}",
        "Processor time": f"{duration(times.learning)} of learning, and at least {duration(times.shared)} of what "
        "runs share: logging policies, regressions, densities",
        "Commit": ", ".join(commits) or "not known",
        "Device": ", ".join(sorted({row.device for row in rows})),
        "Versions": "; ".join(f"{name} {', '.join(found)}" for name, found in versions(rows).items()),
    }
    return f"<dl>{''.join(f'<dt>{name}</dt><dd>{html.escape(text)}</dd>' for name, text in facts.items())}</dl>"


def _sweep(name: str, rows: Sequence[Row], covered: Coverage, drawn: Sequence[_Figure]) -> str:
    world_name = _world_name(name)
    parts = [
        f"<h2>{html.escape(_sweep_title(name))}</h2>",
        f"<p>{html.escape(_introduction(name, rows, covered))}</p>",
        _unfinished(name, covered),
        _figures(drawn),
        _headed("Means", means(rows, world_name) if summaries(rows) else ""),
        _accuracy(rows),
        _headed("Over the whole sweep", over_the_sweep(rows, world_name)),
        _published(rows) if name == "data_size" else "",
        _stories(rows),
        _further(rows),
        details("Settings and learners in full", _configurations(rows)),
    ]  # fmt: skip
    return f'<section id="{anchor(name)}">{"".join(parts)}</section>'


def _figures(drawn: Sequence[_Figure]) -> str:
    shown = [
        picture(one.light.path, one.dark.path if one.dark else None, one.light.title, one.light.caption)
        for one in drawn
    ]
    return f'<div class="figures">{"".join(shown)}</div>' if shown else ""


def _headed(heading: str, inside: str) -> str:
    return f"<h3>{html.escape(heading)}</h3>{inside}" if inside else ""


def _introduction(name: str, rows: Sequence[Row], covered: Coverage) -> str:
    several = len({row.point for row in rows}) > 1
    varied = f"Varied: {SWEEPS[name].axis}. " if name in SWEEPS and several else ""
    quick = {
        "quick": " These are the quick schedules: they show the shape, not the published numbers.",
        "mixed": " Some points are of the quick schedules: do not compare them with the others.",
    }.get(covered.form, "")
    meaning = {
        "optimality": "The score is the optimality: 0 is the uniform policy, 1 the best possible one.",
        "improvement over no prompt": "The score is the mean reward, which is measured against sentences that were "
        "written without a prompt.",
    }.get(score_name(rows), "")
    if lower_is_better(rows):
        meaning = "The score is the mean squared error of the estimates over the variance of rewards: small is good."
    return f"{varied}{meaning}{quick}".strip()


def _unfinished(name: str, covered: Coverage) -> str:
    if not covered.missing:
        return ""
    said = f"{covered.missing:,} of {_plural(covered.planned, 'planned run')} are not here."
    flag = " --quick" if covered.form == "quick" else ""
    command = f"<p>To run them: <code>python -m benchmarks run {html.escape(name)}{flag}</code></p>"
    body = [[gap.point, title(gap.learner), f"{gap.there} of {gap.planned}"] for gap in covered.gaps]
    return details(said, command + table(["point", "learner", "runs here"], body))


def _published(rows: Sequence[Row]) -> str:
    cells = compare(rows)
    if not cells:
        return ""
    first, *others = verdict(cells)
    short = "<p>Some cells are of a share of the published schedules: they are no replication.</p>"
    parts = [
        "<h3>Beside the published table</h3>",
        f"<p>{html.escape(first)}</p>",
        short if any(cell.short for cell in cells) else "",
        beside_published(cells),
        details("What is known of the cells that are off", _listed(others)) if others else "",
    ]
    return "".join(parts)


def _listed(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"


def _claims(rows: Sequence[Row]) -> str:
    found = [claim for claim in claims(rows) if claim.holds is not None]
    if not found:
        return ""
    holding = sum(claim.holds is True for claim in found)
    said = f"<p>Statements that hold on these rows: {holding} of {len(found)}.</p>"
    return f'<section id="claims"><h2>What the paper says</h2>{said}{"".join(map(_claim, found))}</section>'


def _claim(claim: Claim) -> str:
    says = claim.says[:1].upper() + claim.says[1:]
    css = "gain" if claim.holds else "loss"
    rests = f"Taken to hold if {claim.test}. Here: {claim.figures}."
    head = f'<h4>{html.escape(says)}: <span class="{css}">{html.escape(claim.outcome)}</span></h4>'
    return f'{head}<p class="note">{html.escape(rests)}</p>'


def _stories(rows: Sequence[Row]) -> str:
    """Return what users were shown: by the best learner in the open, by the others folded."""
    told = {row.learner: found for row in rows if (found := _told(row))}
    if not told:
        return ""
    means_of = {one.learner: one.mean.value for one in summaries(rows) if one.learner in told}
    best, *others = sorted(told, key=lambda name: (name in REFERENCES, -means_of.get(name, float("-inf"))))
    note = (
        "Users and movies are drawn at random, not picked. The reward is that of the sentence, against one written "
        "without a prompt."
    )
    folded = "".join(details(f"The same under {title(name)}", _shown(name, told[name])) for name in others)
    return f'<h3>What users were shown</h3><p class="note">{note}</p>{_shown(best, told[best])}{folded}'


def _shown(learner: str, told: Sequence[Story]) -> str:
    gain = sum(story.after.reward - story.before.reward for story in told) / len(told)
    said = f"{title(learner)} beside the logging policy: {number(gain, 2, signed=True)} on average over these rounds."
    return f"<p>{html.escape(said)}</p>{stories_html(told, ('logged', 'learned'), level=4)}"


def _told(row: Row) -> list[Story]:
    held = row.result.details.get("stories", ()) if isinstance(row.result.details, Mapping) else ()
    return [Story(one["user"], one["taste"], one["movie"], Side(**one["before"]), Side(**one["after"])) for one in held]


def _accuracy(rows: Sequence[Row]) -> str:
    """Return the tables behind the figure of estimators' accuracy."""
    if not lower_is_better(rows):
        return ""
    return "".join(
        _headed(heading[:1].upper() + heading[1:], numbers(rows, _measure(name, absolute=name == "bias"), _OVER_WORLDS))
        for name, heading in PANELS.items()
    )


def _further(rows: Sequence[Row]) -> str:
    """Return the numbers that no figure rests on, folded."""
    shown = PANELS if lower_is_better(rows) else {}
    measures = dict.fromkeys(chain.from_iterable(row.result.measures for row in rows))
    parts = {name: numbers(rows, _measure(name), _OVER_WORLDS) for name in measures if name not in shown}
    learning = "Seconds a run, mean ± standard error; the runs of a point are learned together."
    parts["processor time of learning"] = numbers(rows, lambda row: row.result.seconds, learning, 1)
    if any(row.result.sentences for row in rows):
        asked = "Sentences a run that the language model was asked for, mean ± standard error."
        parts["sentences"] = numbers(rows, lambda row: float(row.result.sentences), asked, 0)
    inside = "".join(
        f"<h4>{html.escape(name[:1].upper() + name[1:])}</h4>{part}" for name, part in parts.items() if part
    )
    return details("Time and further numbers", inside)


def _measure(name: str, *, absolute: bool = False) -> Callable[[Row], float]:
    def number_of(row: Row) -> float:
        value = row.result.measures.get(name, float("nan"))
        return abs(value) if absolute else value

    return number_of


def _configurations(rows: Sequence[Row]) -> str:
    points: dict[str, dict[str, None]] = {}
    methods: dict[str, dict[str, None]] = {}
    for row in rows:
        setting, _, method = row.config.partition("; ")
        points.setdefault(row.point, {})[setting] = None
        methods.setdefault(row.learner, {})[method] = None

    def listed(heading: str, found: Mapping[str, Mapping[str, None]]) -> str:
        shown = "\n".join(f"{name}: {text}" for name, texts in found.items() for text in texts)
        return f"<h4>{heading}</h4><pre>{html.escape(shown)}</pre>"

    ordered = {title(name): methods[name] for name in learner_order(rows)}
    return listed("Points", points) + listed("Learners", ordered)


def _command(chosen: argparse.Namespace) -> int:
    path = chosen.to or chosen.out / "report.html"
    write_report(read_rows(chosen.out), path)
    print(f"written: {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


def add_command(commands: Any) -> None:
    """Add ``report`` to the command line."""
    command = commands.add_parser("report", help="one HTML page of a folder of results")
    command.add_argument("--out", type=Path, default=Path("runs"), help="folder of the results (default: runs)")
    command.add_argument("--to", type=Path, metavar="FILE", help="the page (default: report.html in that folder)")
    command.set_defaults(do=_command)
