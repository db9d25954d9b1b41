"""The report of a log."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from agents.inspection.findings import Finding, findings
from agents.inspection.needs import ESTIMATORS, LEARNERS, Given, Judgement, judge
from agents.inspection.propensities import Propensities, propensities
from agents.inspection.rewards import Rewards, rewards
from offprompts_env.config import check_kind
from offprompts_env.types import LoggedDataset

_OPTIONAL = ("sentence", "query_text", "user_id", "item_id")


@dataclass(frozen=True, slots=True)
class Shape:
    """How large a log is.

    Attributes:
        rounds: ``n``.
        prompts: ``A``.
        context, query, output, embedding: dimensions of the vectors of a round, and of a prompt.
        prompt_texts: whether prompts are text.
        columns: those of the optional columns that there are.
    """

    rounds: int
    prompts: int
    context: int
    query: int
    output: int
    embedding: int
    prompt_texts: bool
    columns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as logged.

    Attributes:
        index, text: of the catalogue.
        rounds: how often it was logged.
        mean_reward: of these rounds.
    """

    index: int
    text: str | None
    rounds: int
    mean_reward: float


@dataclass(frozen=True, slots=True)
class Support:
    """Which prompts a log shows.

    Attributes:
        logged, never: how many were and were not.
        fewest, median: rounds of the rarest logged prompt, and of the median one.
        effective: ``exp(entropy)`` of the prompts' shares: as many equally frequent ones would be as varied.
        top_tenth: share of rounds of the most frequent tenth of all prompts.
        top: the most frequent ones.
    """

    logged: int
    never: int
    fewest: int
    median: float
    effective: float
    top_tenth: float
    top: tuple[Prompt, ...]


@dataclass(frozen=True, slots=True)
class LogReport:
    """What a log holds, whether it can be believed, and what it allows. ``str`` shows it, :meth:`to_json` keeps it.

    Attributes:
        shape: how large it is.
        env_id, seed, versions, notes: where it comes from; all empty for a log from elsewhere.
        support: which prompts it shows.
        propensities: how they were chosen.
        rewards: what they paid.
        findings: what is odd, problems first.
        learners, estimators: by the names of the command line, what the log allows without anything beside it.
    """

    shape: Shape
    env_id: str | None
    seed: int | None
    versions: Mapping[str, str]
    notes: str
    support: Support
    propensities: Propensities
    rewards: Rewards
    findings: tuple[Finding, ...]
    learners: Mapping[str, Judgement]
    estimators: Mapping[str, Judgement]

    @property
    def problems(self) -> tuple[Finding, ...]:
        """The findings that make results wrong."""
        return tuple(finding for finding in self.findings if finding.level == "problem")

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-able records; what is unknown or infinite is None."""
        found: dict[str, Any] = plain(asdict(self))
        return found

    def __str__(self) -> str:
        from agents.inspection.text import describe

        return describe(self)


def inspect_log(log: LoggedDataset) -> LogReport:
    """Look at `log`: a few seconds for a million rounds.

    Args:
        log: read a recorded one with ``LoggedDataset.load(path)``.

    Raises:
        ConfigError: not a log.
    """
    check_kind("log", log, LoggedDataset, "read a recorded one with LoggedDataset.load(path)")
    chosen, paid = propensities(log), rewards(log.reward)
    given = Given(propensities=chosen.unknown == 0, outputs=log.output.shape[1] > 0)
    return LogReport(
        shape=_shape(log),
        env_id=log.metadata.env_id,
        seed=log.metadata.seed,
        versions=dict(log.metadata.versions),
        notes=log.metadata.notes,
        support=_support(log),
        propensities=chosen,
        rewards=paid,
        findings=findings(log, chosen, paid),
        learners={name: judge(method, given) for name, method in LEARNERS.items()},
        estimators={name: judge(method, given) for name, method in ESTIMATORS.items()},
    )


def _shape(log: LoggedDataset) -> Shape:
    return Shape(
        rounds=len(log),
        prompts=log.n_prompts,
        context=log.context.shape[1],
        query=log.query.shape[1],
        output=log.output.shape[1],
        embedding=log.prompts.embeddings.shape[1],
        prompt_texts=log.prompts.texts is not None,
        columns=tuple(name for name in _OPTIONAL if getattr(log, name) is not None),
    )


def _support(log: LoggedDataset, shown: int = 3) -> Support:
    counts = np.bincount(log.action, minlength=log.n_prompts)
    paid = np.bincount(log.action, log.reward, log.n_prompts) / np.maximum(counts, 1)
    logged = counts[counts > 0]
    shares, texts = logged / len(log), log.prompts.texts
    order = np.argsort(-counts, kind="stable")
    top = [int(prompt) for prompt in order[:shown] if counts[prompt]]
    return Support(
        logged=len(logged),
        never=log.n_prompts - len(logged),
        fewest=int(logged.min()),
        median=float(np.median(logged)),
        effective=float(np.exp(-(shares * np.log(shares)).sum())),
        top_tenth=float(counts[order[: math.ceil(log.n_prompts / 10)]].sum() / len(log)),
        top=tuple(Prompt(a, None if texts is None else texts[a], int(counts[a]), float(paid[a])) for a in top),
    )


def plain(value: Any) -> Any:
    """Return `value` as JSON knows it: records and lists of such, and None for what is unknown or infinite."""
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
