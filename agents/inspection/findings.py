"""What a reader must know before trusting a log: each finding is one sentence with its numbers and a remedy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from agents.inspection.propensities import Check, Propensities
from agents.inspection.rewards import Rewards, count_distinct
from offprompts_env.types import Array, FloatArray, IntArray, LoggedDataset

Level = Literal["problem", "note"]

# Chance that a sound log is called unsound by one family of tests.
_SURE = 1e-4
# Standard errors beyond which something is no chance.
_FAR = 5.0
# Means, in standard deviations, and standard deviations beyond which features should be scaled.
_UNSCALED = 3.0


@dataclass(frozen=True, slots=True)
class Finding:
    """Something odd.

    Attributes:
        level: a problem makes results wrong; a note may be as intended.
        about: the column or columns.
        message: what was seen, what it means, and what to do.
    """

    level: Level
    about: str
    message: str


def findings(log: LoggedDataset, chosen: Propensities, paid: Rewards) -> tuple[Finding, ...]:
    """Return what is odd about `log`, problems first."""
    found = [*_of_propensities(log, chosen), *_of_rewards(log, paid), *_of_actions(log), *_of_columns(log)]
    found += [*_of_sentences(log), *_of_rows(log)]
    return tuple(sorted(found, key=lambda finding: finding.level != "problem"))


def _problem(about: str, message: str) -> Finding:
    return Finding("problem", about, message)


def _note(about: str, message: str) -> Finding:
    return Finding("note", about, message)


def _of_propensities(log: LoggedDataset, chosen: Propensities) -> Iterator[Finding]:
    if chosen.unknown:
        yield _note(
            "propensity",
            f"unknown in {chosen.unknown:,} of {len(log):,} rounds: how prompts were chosen must be assumed or "
            "estimated (agents.BehaviorCloning), and estimates are right only if all that decided is in the context",
        )
    if chosen.known == 0:
        return
    if chosen.minimum == 1 and len(np.unique(log.action)) > 1:
        yield _problem(
            "propensity",
            "all are 1 though prompts vary: either the choice followed a fixed rule, so that the log says nothing of "
            "any other prompt, or 1 stands for unknown; then leave the column out",
        )
        return
    if log.n_prompts > 1 and chosen.distinct == 1 and abs(chosen.mean_weight_z) > _FAR:
        yield _problem(
            "propensity",
            f"all are {chosen.minimum:g}, but 1/A is {1 / log.n_prompts:g} for {log.n_prompts} prompts: no policy "
            "with the same probability for what it chose can be that one, unless it never tries some prompts",
        )
    elif abs(chosen.mean_weight_z) > _FAR:
        yield _of_weight(chosen)
    # One wrong column shows in both: the clearer one is said.
    checks = [check for check in (chosen.counts, chosen.balance) if check is not None and check.tests]
    if checks:
        yield from _of_check(min(checks, key=lambda check: check.p_value), log)
    if chosen.effective_uniform < 30:
        yield _note(
            "propensity",
            f"{chosen.known:,} rounds are worth {chosen.effective_uniform:.0f} for a uniform policy: few propensities "
            f"as small as {chosen.minimum:.2g} carry all the weight",
        )


def _of_weight(chosen: Propensities) -> Finding:
    said = f"1 / (A p) averages {chosen.mean_weight:.3f} instead of 1 ({chosen.mean_weight_z:+.1f} standard errors): "
    if chosen.mean_weight > 1:
        return _problem("propensity", said + "they are too small; no logging policy can have had them")
    return _problem(
        "propensity",
        said + "prompts were never or hardly ever tried in some contexts, so that the value of other policies is not "
        "in this log, or the propensities are too large",
    )


def _of_check(check: Check, log: LoggedDataset) -> Iterator[Finding]:
    if check.p_value >= _SURE:
        return
    worst = check.worst[0]
    name, where = prompt_name(log, worst.prompt), "" if worst.where is None else f" where {worst.where}"
    cause = "they are too small there" if worst.where is None else (
        "they do not say how prompts depended on the context, or rows were shuffled"
    )  # fmt: skip
    yield _problem(
        "propensity",
        f"the {worst.rounds:,} rounds of {name}{where} stand for {worst.implied:.2f} times all rounds there "
        f"({worst.z:+.1f} standard errors, the most of {check.tests:,} sums): {cause}; importance weights are wrong",
    )


def _of_rewards(log: LoggedDataset, paid: Rewards) -> Iterator[Finding]:
    if paid.kind == "constant":
        yield _problem("reward", f"all are {paid.mean:g}: there is nothing to learn; check how they were recorded")
        return
    if paid.top_share > 0.25:
        yield _note(
            "reward",
            f"one round in a thousand makes {paid.top_share:.0%} of the variance (normal: 1%), up to "
            f"{paid.maximum:g} and down to {paid.minimum:g}: intervals are too short; cap rewards or take logarithms",
        )
    if abs(paid.drift_z) > _FAR:
        yield _note(
            "reward",
            f"the second half pays {paid.drift:+.3g} against the first ({paid.drift_z:+.1f} standard errors): the "
            "world, the users or the logging policy changed",
        )
    for name, column in (("propensity", log.propensity), *_columns(log)):
        if np.array_equal(np.asarray(column, dtype=np.float32), log.reward):
            yield _problem("reward", f"the same as {name} in every round: a column was taken for another one")


def _of_actions(log: LoggedDataset) -> Iterator[Finding]:
    n, shares = len(log), np.bincount(log.action, minlength=log.n_prompts) / len(log)
    if shares.max() == 1:
        yield _problem(
            "action", f"always {prompt_name(log, int(shares.argmax()))}: the log says nothing of any other prompt"
        )
        return
    unlogged = int((shares == 0).sum())
    if unlogged:
        yield _note(
            "action",
            f"{unlogged:,} of {log.n_prompts:,} prompts were never logged: what they pay can only be extrapolated",
        )
    half = n // 2
    difference = _half_difference(log.action, half, log.n_prompts)
    if difference > _FAR:
        yield _note(
            "action",
            f"prompts differ between the halves of the log ({difference:+.1f} standard deviations from chance): the "
            "logging policy changed, it learns, or rows are sorted",
        )
    repeats, expected = float((log.action[1:] == log.action[:-1]).mean()), float((shares**2).sum())
    z = (repeats - expected) / math.sqrt(expected * (1 - expected) / max(n - 1, 1))
    if z > _FAR:
        yield _note(
            "action",
            f"the prompt of the row before comes again in {repeats:.1%} of rows, {expected:.1%} by chance: rows are "
            "sorted, rounds of a user come in a row, or prompts were not drawn afresh in each round",
        )


def _half_difference(action: IntArray, half: int, n_prompts: int) -> float:
    """Return how far the two halves' prompts differ, in standard deviations of χ² without a difference."""
    if half < 2:
        return 0.0
    first, second = (np.bincount(part, minlength=n_prompts) for part in (action[:half], action[half:]))
    # Rare prompts are one: χ² is for counts that are not small.
    total = first + second
    rare = total < 10
    both = np.array([np.append(part[~rare], part[rare].sum()) for part in (first, second)], dtype=np.float64)
    both = both[:, both.sum(axis=0) > 0]
    freedom = both.shape[1] - 1
    if freedom == 0:
        return 0.0
    expected = both.sum(axis=1, keepdims=True) * both.sum(axis=0) / both.sum()
    return float((((both - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


def _columns(log: LoggedDataset) -> Iterator[tuple[str, FloatArray]]:
    for name in ("context", "query"):
        yield from ((f"{name}_{index}", column) for index, column in enumerate(getattr(log, name).T))


def _of_columns(log: LoggedDataset) -> Iterator[Finding]:
    varies = False
    for name in ("context", "query", "output"):
        matrix = getattr(log, name)
        if not matrix.shape[1]:
            continue
        constant = matrix.min(axis=0) == matrix.max(axis=0)
        varies |= name != "output" and not constant.all()
        if constant.all():
            yield _note(name, f"the same {'zeros' if not matrix.any() else 'numbers'} in every round: it says nothing")
        elif constant.any():
            names = [f"{name}_{index}" for index in np.flatnonzero(constant)]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            yield _note(name, f"{', '.join(names[:3])}{more} never vary: leave them out")
    yield from _of_scales(log)
    if not varies:
        yield _problem("context", "neither context nor query varies: no policy can be personal, only the best prompt")


def _of_scales(log: LoggedDataset) -> Iterator[Finding]:
    """Networks take features as they are: what is far from zero or wide drowns the others, or stops learning."""
    far = []
    for name, column in _columns(log):
        mean, spread = float(column.mean(dtype=np.float64)), float(column.std(dtype=np.float64))
        if spread > 0 and (abs(mean) > _UNSCALED * max(spread, 1) or spread > _UNSCALED):
            far.append(f"{name} ({mean:.3g} ± {spread:.2g})")
    if far:
        yield _problem(
            "context",
            f"{', '.join(far[:3])}{f' and {len(far) - 3} more' if len(far) > 3 else ''} are far from 0 ± 1: learners "
            "with networks take numbers as they are and hardly learn from these; subtract the mean, divide by the "
            "deviation (logarithms where there is a long tail), and do the same wherever the policy is used",
        )


def _of_sentences(log: LoggedDataset) -> Iterator[Finding]:
    if log.sentence is None:
        return
    codes, texts = _codes(log.sentence)
    counts = np.bincount(codes, minlength=len(texts))
    empty = int(counts[[not text.strip() for text in texts]].sum())
    if empty:
        yield _note("sentence", f"{empty:,} are empty: what users reacted to was not recorded, or not generated")
    # Pairs of a sentence and a prompt; a sentence in several pairs came of several prompts.
    pairs = np.unique(codes.astype(np.int64) * log.n_prompts + log.action)
    prompts = np.bincount(pairs // log.n_prompts, minlength=len(texts))
    tried = len(np.unique(log.action))
    common = int(counts.argmax())
    if tried > 1 and prompts[common] > 1 and counts[common] > len(log) / 2:
        yield _problem(
            "sentence",
            f"{counts[common] / len(log):.0%} are {texts[common]!r:.60}, under {prompts[common]:,} prompts: the prompt "
            "does not reach the generator",
        )
    elif tried > 1 and (share := float(counts[prompts > 1].sum()) / len(log)) > 0.5:
        yield _note("sentence", f"{share:.0%} of rounds show one that several prompts gave: prompts hardly change it")


def _codes(texts: Array) -> tuple[IntArray, Array]:
    """Return which of the different `texts` each is (n,), and these."""
    import pandas as pd

    codes, different = pd.factorize(texts)
    return codes, np.asarray(different, dtype=object)


def _of_rows(log: LoggedDataset) -> Iterator[Finding]:
    n = len(log)
    seen = count_distinct(_digest([log.context, log.query]))
    numbers = [log.context, log.query, log.output, log.action[:, None], log.reward[:, None]]
    whole = _digest([*numbers, np.nan_to_num(log.propensity, nan=-1.0)[:, None]])
    repeated = n - count_distinct(whole)
    # Where users and items have few features the same round is bound to come again.
    if repeated and seen > n / 2:
        yield _note("rows", f"{repeated:,} repeat another one to the last digit: they may have been logged twice")
    if log.user_id is not None:
        users, counts = np.unique(log.user_id, return_counts=True)
        if len(users) < n:
            yield _note(
                "user_id",
                f"{len(users):,} users make {n:,} rounds, the busiest one {counts.max():,}: rounds of one user are not "
                "independent, so that standard errors are too small",
            )


def _digest(columns: list[Array]) -> IntArray:
    """Return a 64-bit checksum of each row, (n,): sorting these is far faster than sorting rows."""
    rng, total = np.random.default_rng(0), np.zeros(len(columns[0]), dtype=np.uint64)
    for matrix in columns:
        for column in matrix.T:
            # Adding 0 makes −0 the same as 0.
            bits = (np.asarray(column, dtype=np.float64) + 0.0).view(np.uint64)
            mixed = (bits ^ (bits >> np.uint64(29))) * rng.integers(1 << 62, dtype=np.uint64, endpoint=False)
            total += mixed ^ (mixed >> np.uint64(32))
    return total


def prompt_name(log: LoggedDataset, prompt: int) -> str:
    """Return how a prompt is called in messages."""
    return f"prompt {prompt}" if log.prompts.texts is None else f"prompt {prompt} ({log.prompts.texts[prompt]!r:.40})"
