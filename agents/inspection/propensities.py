"""What can be tested of propensities when only that of the chosen prompt is recorded.

With the right ones, and a logging policy that tries every prompt everywhere, for every prompt a and function f ≥ 0

    E[Σ_i 1{a_i = a} f(x_i, q_i) / p_i | contexts] = Σ_i f(x_i, q_i)
    Var[...] = Σ_i f(x_i, q_i)² (1 / π₀(a | x_i, q_i) − 1), estimated by Σ_i 1{a_i = a} f(x_i, q_i)² (1 − p_i) / p_i²

f = 1 counts rounds: a prompt shown k times must stand for all n of them. f = 1{a feature is above, or not above, its
mean} says whether the propensities explain which contexts a prompt was shown in, as balance checks do in causal
inference (Imai and Ratkovic, 2014). Only sums that are too *large* are tested: these come of propensities that are too
small and of nothing else. Sums are also too small where a prompt is hardly ever tried and rounds that would weigh much
have not come up, which their own variance then does not show; and where some propensities are too large, those of other
prompts are too small. The sum over all prompts for f = 1 is the weight of a uniform policy, 1 on average; a logging
policy that never tries some prompts makes it smaller.

Symbols: ``n`` rounds, ``A`` prompts, ``p`` propensity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agents.inspection.rewards import count_distinct
from offprompts_env.types import Array, FloatArray, LoggedDataset

# A sum is tested when its weighted rounds say as much as this many equally weighted ones: below, it is not normal.
_ENOUGH = 30
# Features are tested until this many numbers were looked at: a second of work.
_NUMBERS = 1 << 26
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Deviation:
    """A prompt whose rounds and propensities contradict each other.

    Attributes:
        prompt: its index.
        where: which rounds were looked at, such as ``context_0 > 0.5``; None for all.
        rounds: how often it was logged there.
        implied: its weighted rounds as a share of all rounds there; 1 if all is well.
        z: how far above 1 that is, in standard errors.
    """

    prompt: int
    where: str | None
    rounds: int
    implied: float
    z: float


@dataclass(frozen=True, slots=True)
class Check:
    """A family of one-sided tests: a prompt's weighted rounds are more than there are.

    Attributes:
        tests: how many there were.
        untested: sums of too few rounds for one.
        p_value: of the largest deviation, times the number of tests (Bonferroni); NaN without a test.
        worst: the largest deviations.
    """

    tests: int
    untested: int
    p_value: float
    worst: tuple[Deviation, ...]


@dataclass(frozen=True, slots=True)
class Propensities:
    """What a log says of how its prompts were chosen; all but `known` and `unknown` is NaN or None if nothing is known.

    Attributes:
        known, unknown: numbers of rounds.
        minimum, median, maximum: of the known ones.
        distinct: number of different values.
        mean_weight: mean of ``1 / (A p)``.
        mean_weight_z: how far it is from 1, in standard errors.
        counts: whether a prompt stands for more rounds than there are.
        balance: the same where a feature is above, or not above, its mean.
        effective_uniform: effective sample size ``(Σ w)² / Σ w²`` of the rounds for a policy that draws uniformly.
        effective_best: that for a policy that always takes `best`.
        best: the prompt with the best weighted mean reward among those with enough rounds, or None.
    """

    known: int
    unknown: int
    minimum: float = math.nan
    median: float = math.nan
    maximum: float = math.nan
    distinct: int = 0
    mean_weight: float = math.nan
    mean_weight_z: float = math.nan
    counts: Check | None = None
    balance: Check | None = None
    effective_uniform: float = math.nan
    effective_best: float = math.nan
    best: int | None = None


def propensities(log: LoggedDataset) -> Propensities:
    """Look at the propensities of `log`; rounds without one are left out, as if they were lacking by chance."""
    found = np.isfinite(log.propensity)
    known = int(found.sum())
    if known == 0:
        return Propensities(0, len(log))
    part = log if known == len(log) else log.take(found)
    p, action, n_prompts = part.propensity, part.action, part.n_prompts
    weight = 1 / p
    total, square = (np.bincount(action, column, n_prompts) for column in (weight, weight**2))
    size = np.divide(total**2, square, out=np.zeros(n_prompts), where=square > 0)
    enough: Array = size >= _ENOUGH
    mean = float(weight.mean()) / n_prompts
    # Where every propensity is 1 there is nothing to test: that is said by itself.
    tested = bool((p < 1).any())
    best = _best(part, weight, total, enough)
    return Propensities(
        known=known,
        unknown=len(log) - known,
        minimum=float(p.min()),
        median=float(np.median(p)),
        maximum=float(p.max()),
        distinct=count_distinct(p),
        mean_weight=mean,
        mean_weight_z=_z(mean - 1, float(weight.std()) / n_prompts / math.sqrt(known)),
        counts=_counts(part) if tested else None,
        balance=_balance(part) if tested else None,
        effective_uniform=float(total.sum() ** 2 / square.sum()),
        effective_best=math.nan if best is None else float(size[best]),
        best=best,
    )


def _z(distance: float, error: float) -> float:
    # Constant weights have no spread; what is left of the distance then is rounding or is certain.
    if abs(distance) < 1e-6:
        return 0.0
    return distance / error if error > 1e-12 else math.copysign(math.inf, distance)


def _best(log: LoggedDataset, weight: FloatArray, total: Array, enough: Array) -> int | None:
    if not enough.any():
        return None
    paid = np.bincount(log.action, weight * log.reward, log.n_prompts)
    return int(np.argmax(np.where(enough, paid / np.maximum(total, 1e-300), -np.inf)))


def _counts(log: LoggedDataset) -> Check:
    everything = np.ones(len(log), dtype=bool)
    return _check(log, [(None, everything)])


def _balance(log: LoggedDataset) -> Check:
    columns = [*_named("context", log.context), *_named("query", log.query)]
    parts: list[tuple[str | None, Array]] = []
    for name, column in columns[: max(1, _NUMBERS // len(log))]:
        middle = float(column.mean(dtype=np.float64))
        high = column > middle
        if high.any() and not high.all():
            parts += [(f"{name} > {middle:.3g}", high), (f"{name} ≤ {middle:.3g}", ~high)]
    return _check(log, parts)


def _named(name: str, matrix: FloatArray) -> list[tuple[str, FloatArray]]:
    return [(f"{name}_{index}", column) for index, column in enumerate(matrix.T)]


def _check(log: LoggedDataset, parts: Sequence[tuple[str | None, Array]]) -> Check:
    """Test the sums of every prompt over `parts`, which are names of rounds and a mask of them (n,)."""
    tests, untested, found = 0, 0, []
    # Part by part: all at once would hold several copies of the log.
    for where, mask in parts:
        action, p = log.action[mask], log.propensity[mask]
        total, square, variance = (
            np.bincount(action, column, log.n_prompts) for column in (1 / p, p**-2.0, (1 - p) / p**2)
        )
        enough = (total**2 >= _ENOUGH * square) & (variance > 0)
        n = len(action)
        # On the scale of square roots a count is nearly normal, with the same spread, also where it is small.
        z = np.full(log.n_prompts, -np.inf)
        z[enough] = 2 * (total[enough] - np.sqrt(n * total[enough])) / np.sqrt(variance[enough])
        tests, untested = tests + int(enough.sum()), untested + int((~enough).sum())
        rounds = np.bincount(action, minlength=log.n_prompts)
        for prompt in np.argsort(-z)[:_SHOWN]:
            if enough[prompt]:
                implied = float(total[prompt] / n)
                found.append(Deviation(int(prompt), where, int(rounds[prompt]), implied, float(z[prompt])))
    worst = tuple(sorted(found, key=lambda deviation: -deviation.z)[:_SHOWN])
    return Check(tests, untested, min(1.0, tests * _above(worst[0].z)) if worst else math.nan, worst)


def _above(z: float) -> float:
    """Return the probability that a standard normal is above `z`."""
    return math.erfc(z / math.sqrt(2)) / 2
