"""A report as text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from agents.inspection.needs import Judgement
from agents.inspection.propensities import Check
from agents.inspection.rewards import LEVELS

if TYPE_CHECKING:
    from agents.inspection.report import LogReport

_WIDTH, _LABEL = 100, 14
_REMEDIES = {
    "propensities": "propensities, or logging_policy=",
    "outputs": "output embeddings in the log",
    "generator": "generator=",
}


def describe(report: LogReport) -> str:
    """Return `report` as lines of at most 100 characters."""
    lines: list[str] = []
    for label, content in (*_provenance(report), *_prompts(report), *_propensities(report), *_rewards(report)):
        lines += _wrapped(label, content)
    lines.append("")
    lines += [line for finding in report.findings for line in _finding(finding.level, finding.about, finding.message)]
    if not report.findings:
        lines.append("nothing odd was found")
    lines.append("")
    lines += _methods("learners", report.learners)
    lines += _methods("estimators", report.estimators)
    return "\n".join(lines)


def _wrapped(label: str, content: str) -> list[str]:
    return textwrap.wrap(
        content, _WIDTH, initial_indent=f"{label:<{_LABEL}}", subsequent_indent=" " * _LABEL, break_long_words=False
    )


def _finding(level: str, about: str, message: str) -> list[str]:
    return textwrap.wrap(f"{level}: {about}: {message}", _WIDTH, subsequent_indent="    ", break_long_words=False)


def _provenance(report: LogReport) -> Iterator[tuple[str, str]]:
    shape = report.shape
    vectors = f"context {shape.context}, query {shape.query}, output {shape.output} numbers"
    optional = ", ".join(shape.columns) or "no optional columns"
    yield "log", f"{shape.rounds:,} rounds of {shape.prompts:,} prompts; {vectors}; {optional}"
    if report.env_id is None:
        yield "from", "elsewhere: no environment is recorded with it" + (f"; {report.notes}" if report.notes else "")
    else:
        by = ", ".join(f"{name} {version}" for name, version in list(report.versions.items())[:1])
        yield "from", f"{report.env_id}, seed {report.seed}" + (f", {by}" if by else "")


def _prompts(report: LogReport) -> Iterator[tuple[str, str]]:
    support = report.support
    yield (
        "prompts",
        f"{support.logged:,} logged, {support.never:,} never; as varied as {support.effective:.1f} equally frequent "
        f"ones; the most frequent tenth has {support.top_tenth:.1%} of the rounds; the rarest logged one "
        f"{support.fewest:,}, the median {support.median:,.0f} rounds",
    )
    for prompt in support.top:
        name = "" if prompt.text is None else f" {prompt.text!r:.50}"
        share = prompt.rounds / report.shape.rounds
        yield "", f"{prompt.index}{name}: {prompt.rounds:,} rounds ({share:.1%}), mean reward {prompt.mean_reward:.4g}"


def _propensities(report: LogReport) -> Iterator[tuple[str, str]]:
    found = report.propensities
    if not found.known:
        yield "propensities", "unknown"
        return
    unknown = f", unknown in {found.unknown:,} rounds" if found.unknown else ""
    yield (
        "propensities",
        f"{found.minimum:.3g} to {found.maximum:.3g}, median {found.median:.3g}; {found.distinct:,} different{unknown}",
    )
    yield (
        "",
        f"the weight 1/(A p) of a uniform policy averages {found.mean_weight:.4f} "
        f"({found.mean_weight_z:+.1f} standard errors from 1)",
    )
    yield "", f"rounds of each prompt against its propensities: {_check(found.counts)}"
    yield "", f"contexts of each prompt against its propensities: {_check(found.balance)}"
    best = (
        ""
        if found.best is None
        else f"; for prompt {found.best} alone, the best one so far, {found.effective_best:,.0f}"
    )
    yield "worth", f"for a uniform policy {found.effective_uniform:,.0f} rounds (effective sample size){best}"


def _check(check: Check | None) -> str:
    if check is None or not check.tests:
        return "not testable" if check is None else "too few rounds to tell"
    skipped = f" ({check.untested:,} more have too few rounds)" if check.untested else ""
    return f"{check.tests:,} tests, p = {check.p_value:.2g} for the worst, all counted{skipped}"


def _rewards(report: LogReport) -> Iterator[tuple[str, str]]:
    paid = report.rewards
    yield (
        "reward",
        f"{paid.mean:.4g} ± {paid.standard_error:.2g} on average, the value of the logging policy; standard deviation "
        f"{paid.deviation:.3g}; {paid.kind}, {paid.distinct:,} different values from {paid.minimum:.4g} to "
        f"{paid.maximum:.4g}",
    )
    if paid.kind in ("discrete", "continuous"):
        found = ", ".join(f"{level:.0%} {value:.3g}" for level, value in zip(LEVELS, paid.quantiles, strict=True))
        yield "", f"quantiles: {found}"
    yield "", f"second half less the first: {paid.drift:+.3g} ({paid.drift_z:+.1f} standard errors)"


def _methods(title: str, judged: Mapping[str, Judgement]) -> Iterator[str]:
    groups: dict[str, list[str]] = {}
    for name, judgement in judged.items():
        groups.setdefault(_condition(judgement), []).append(name)
    yield f"{title} that this log allows"
    for condition, names in sorted(groups.items(), key=lambda group: (group[0] != "", group[0])):
        yield from textwrap.wrap(
            f"{condition or 'as it is'}: {', '.join(names)}",
            _WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False,
        )  # fmt: skip


def _condition(judgement: Judgement) -> str:
    if judgement.verdict == "clones":
        return "with a logging policy, else one cloned from the log"
    return "" if not judgement.lacks else f"only with {' and '.join(_REMEDIES[name] for name in judgement.lacks)}"
