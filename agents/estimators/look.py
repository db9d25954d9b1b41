"""One look at a policy: all that estimators need of its probabilities, from a single pass over them.

A row of the pmf is made once and dropped; what stays is a few numbers a round and one a prompt. For 10,000 rounds and
1,000 prompts the pmf of a network is most of the time of an estimate.

Symbols: ``n`` rounds, ``A`` prompts, ``m`` draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from agents.clustering import PromptClusters
from agents.kernels import draw_actions
from agents.policies import NeuralPolicy
from agents.rewards import FittedRewards, FittedSentenceRewards
from offprompts_env.errors import DataError, NumericalError
from offprompts_env.rng import integer_seed, stream
from offprompts_env.sampling import check_probabilities, chosen_probabilities, row_parts
from offprompts_env.types import Contexts, FloatArray, IntArray, LoggedDataset, Policy

# An evaluation of a model for all prompts at once is this much cheaper than one for a prompt that was drawn.
_CHEAPER = 8
# Numbers of the pmf that are held at once: 4 MiB of float32 stay in the cache from one step to the next.
_AT_ONCE = 1 << 20
# Rounds and prompts that a model is asked for at once.
_ASKED_AT_ONCE = 1 << 12


class PromptModel(Protocol):
    """A reward model of prompts, such as :class:`agents.PromptRewards`."""

    def __call__(self, contexts: Contexts) -> FloatArray:
        """Return predicted rewards of all prompts, (n, A)."""
        ...

    def chosen(self, contexts: Contexts, actions: IntArray) -> FloatArray:
        """Return predicted rewards of `actions`, (n,)."""
        ...


Fitted = Sequence[tuple[Any, PromptModel]]
"""Rows of a log, and the model that predicts their rewards; the rows are all of the log, each once."""


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """What a policy does in the rounds of a log.

    Attributes:
        chosen: ``π(a_i | x_i, q_i)`` of the logged prompt, or of its cluster where there are clusters, (n,).
        average: ``mean_i π(a | x_i, q_i)``, (A,).
        expected: ``Σ_a π(a | x_i, q_i) q̂(x_i, q_i, a)``, (n,); 0 without models.
        predicted: ``q̂(x_i, q_i, a_i)``, (n,); 0 without models.
    """

    chosen: FloatArray
    average: FloatArray
    expected: FloatArray
    predicted: FloatArray


def look_at(
    policy: Policy,
    log: LoggedDataset,
    models: Fitted = (),
    *,
    n_draws: int | None = None,
    seed: int = 0,
    clusters: PromptClusters | None = None,
) -> Look:
    """Look at `policy` in the rounds of `log`.

    Args:
        policy: over the log's prompts.
        log: the rounds.
        models: q̂, and the rounds they are for.
        n_draws: the expectation over prompts is the mean of q̂ over that many, drawn from the policy by systematic
            sampling; it is exact with None, and where there are so few prompts that this takes no longer.
        seed: of the draws, which are common to all policies.
        clusters: look at the probability of the logged prompt's cluster.

    Raises:
        DataError: `policy` does not give distributions.
        NumericalError: it gives NaN, or a model does.
    """
    exact = n_draws is None or log.n_prompts <= _CHEAPER * n_draws
    if clusters is None and not (models and exact) and hasattr(policy, "sample") and hasattr(policy, "chosen"):
        return _look_by_sampling(policy, log, models, n_draws or 1, seed)
    n = len(log)
    chosen = np.empty(n)
    expected: FloatArray = np.zeros(n)
    predicted: FloatArray = np.zeros(n)
    average, drawn = np.zeros(log.n_prompts), np.empty((n, n_draws or 1), dtype=np.int64)
    offsets = stream(seed, "systematic sampling").random(n)
    members = None if clusters is None else np.eye(clusters.n_clusters, dtype=np.float32)[:, clusters.labels]
    for where, part, masses, total, model in _parts(policy, log, models):
        actions = log.action[where]
        average += (1 / total) @ masses
        own = np.arange(len(actions))
        if clusters is None or members is None:
            mass = masses[own, actions]
        else:
            mass = np.einsum("na,na->n", masses, members[clusters.labels[actions]])
        chosen[where] = mass / total
        if model is None:
            continue
        if exact:
            rewards = model(part)
            expected[where] = np.einsum("na,na->n", masses, rewards) / total
            predicted[where] = rewards[own, actions]
        else:
            drawn[where] = systematic(masses, offsets[where], n_draws or 1)
    if models and not exact:
        expected, predicted = _predictions(models, log, drawn)
    for column in (expected, predicted):
        check_predictions(column)
    return Look(chosen, average / n, expected, predicted)


def _look_by_sampling(policy: Policy, log: LoggedDataset, models: Fitted, n_draws: int, seed: int) -> Look:
    """Look at a policy that draws prompts and tells their probability without its pmf, as among very many prompts."""
    chosen = chosen_probabilities(policy, log.contexts, log.action)
    drawn, average = draw_prompts(policy, log, n_draws, seed)
    expected, predicted = _predictions(models, log, drawn)
    for column in (expected, predicted):
        check_predictions(column)
    return Look(chosen, average, expected, predicted)


def _predictions(models: Fitted, log: LoggedDataset, drawn: IntArray) -> tuple[FloatArray, FloatArray]:
    """Return the mean prediction for `drawn` prompts (n, m), and that for the logged one, (n,) each."""
    expected, predicted = np.zeros(len(log)), np.zeros(len(log))
    asked, everything = np.column_stack([drawn, log.action]), np.arange(len(log))
    for rows, model in models:
        for span in row_parts(len(everything[rows]), asked.shape[1], _ASKED_AT_ONCE):
            where = everything[rows][span]
            contexts = log.contexts.take(where).repeat(asked.shape[1])
            rewards = model.chosen(contexts, asked[where].ravel()).reshape(len(where), -1)
            expected[where], predicted[where] = rewards[:, :-1].mean(axis=1, dtype=np.float64), rewards[:, -1]
    return expected, predicted


def _parts(
    policy: Policy, log: LoggedDataset, models: Fitted
) -> Iterator[tuple[IntArray, Contexts, FloatArray, FloatArray, PromptModel | None]]:
    """Yield rows of the log, their contexts, their pmf up to a factor, its total, and the model for them."""
    everything = np.arange(len(log))
    pieces: Sequence[tuple[Any, PromptModel | None]] = models or ((slice(None), None),)
    for rows, model in pieces:
        index, contexts = everything[rows], log.contexts.take(rows)
        for span in row_parts(len(index), log.n_prompts, _AT_ONCE):
            part = contexts.take(span)
            yield index[span], part, *_masses(policy, part), model


def _masses(policy: Policy, contexts: Contexts) -> tuple[FloatArray, FloatArray]:
    """Return the pmf up to a factor (n, A), and the total of each row (n,)."""
    if isinstance(policy, NeuralPolicy):
        # What is a distribution by construction is not scaled and checked as one: that would be a tenth of the time.
        masses = policy.logits(contexts)
        masses -= masses.max(axis=1, keepdims=True)
        np.exp(masses, out=masses)
        total = masses.sum(axis=1)
        if not np.isnan(total).any():
            return masses, total
    pmf = check_probabilities(policy.probabilities(contexts), len(contexts), policy.n_prompts)
    return pmf, pmf.sum(axis=1)


def check_predictions(predicted: FloatArray) -> None:
    """Raise :class:`NumericalError` if a reward model predicted NaN or infinity, (n,)."""
    if not np.isfinite(predicted).all():
        row = int(np.argmin(np.isfinite(predicted)))
        raise NumericalError(
            f"reward model: expected finite predictions, got {predicted[row]} in row {row}; fit it again, with a lower "
            "learning_rate if training diverged"
        )


def systematic(pmf: FloatArray, offsets: FloatArray, n_draws: int) -> IntArray:
    """Draw prompts at evenly spaced points of the cumulative probability, (n, m): a mean over them is unbiased.

    Prompt a appears ``⌊m π(a)⌋`` or ``⌈m π(a)⌉`` times, so little is left to chance where few prompts have most of the
    probability.

    Args:
        pmf: (n, A), up to a factor of each row.
        offsets: (n,) in [0, 1).
        n_draws: ``m``.
    """
    # Two levels, blocks of prompts and prompts of a block: a running sum over all prompts is slow, one over the totals
    # of blocks and over the few blocks that are hit is not.
    n, n_prompts = pmf.shape
    balanced = math.isqrt(n_prompts // n_draws)
    width = next((size for size in range(max(balanced, 8), 65) if n_prompts % size == 0), n_prompts)
    blocks = pmf.reshape(-1, width)
    totals = torch.from_numpy((blocks @ np.ones(width, pmf.dtype)).reshape(n, -1))
    shares = torch.from_numpy((np.arange(n_draws) + offsets[:, None]) / n_draws).to(totals.dtype)
    index, target = _invert(totals, shares * totals.sum(dim=1, keepdim=True))
    hit = torch.from_numpy(blocks)[(index + torch.arange(n)[:, None] * totals.shape[1]).flatten()]
    within, _ = _invert(hit, target.reshape(-1, 1))
    return (index * width + within.reshape(n, -1)).numpy()


def _invert(masses: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Find where the running sum of `masses` (k, b) passes `target` (k, m).

    Returns:
        index of the mass that is hit, and how much of it lies before the target, (k, m) each.
    """
    cumulative = torch.cumsum(masses, dim=1)
    total = cumulative[:, -1:]
    # Rounding must not carry a target past the last positive mass.
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, target, right=True)
    return index, target - (cumulative.gather(1, index) - masses.gather(1, index))


def draw_prompts(policy: Policy, log: LoggedDataset, n_draws: int, seed: int) -> tuple[IntArray, FloatArray]:
    """Draw prompts of `policy` for every round of `log`.

    A policy that can sample without its pmf does so, and how often it chooses each prompt is then that of the draws.

    Returns:
        prompts (n, m), and ``mean_i π(a | x_i, q_i)``, (A,).
    """
    n, rng = len(log), stream(seed, "simulated prompts")
    if hasattr(policy, "sample"):
        drawn = draw_actions(policy, log.contexts, np.repeat(np.arange(n), n_draws), rng)
        return drawn.reshape(n, n_draws), np.bincount(drawn, minlength=log.n_prompts) / len(drawn)
    offsets, drawn, average = rng.random(n), np.empty((n, n_draws), dtype=np.int64), np.zeros(log.n_prompts)
    for rows, _, masses, total, _ in _parts(policy, log, ()):
        drawn[rows] = systematic(masses, offsets[rows], n_draws)
        average += (1 / total) @ masses
    return drawn, average / n


ModelT = TypeVar("ModelT", covariant=True)


class RewardSource(Protocol[ModelT]):
    """What gives a reward model for each log: a regression, or models that are already fitted."""

    def fit_many(self, logs: Sequence[LoggedDataset], *, seeds: Sequence[int] | None = None) -> Sequence[ModelT]:
        """Return one model a log."""
        ...


def fit_rewards(
    rewards: RewardSource[ModelT], log: LoggedDataset, folds: int | None, seed: int
) -> list[tuple[Any, ModelT]]:
    """Fit the reward models of a log, and say which rounds each is for.

    With K `folds` each round is predicted by a model that did not see it (cross-fitting; Chernozhukov et al., 2018), so
    that the noise of a reward is not also in its prediction. Models that are already fitted stay as they are.

    Raises:
        DataError: fewer than two rounds a fold.
    """
    if folds is None or isinstance(rewards, FittedRewards | FittedSentenceRewards):
        (model,) = rewards.fit_many([log], seeds=[seed])
        return [(slice(None), model)]
    n = len(log)
    if n < 2 * folds:
        raise DataError(
            f"cross-fitting: expected at least {2 * folds} rounds, two a fold, got {n}; record more rounds, ask for "
            "fewer folds, or pass a model that was fitted on another log as agents.FittedRewards((model,))"
        )
    parts = [np.sort(part) for part in np.array_split(stream(seed, "cross-fitting").permutation(n), folds)]
    models = rewards.fit_many(
        [log.take(np.delete(np.arange(n), part)) for part in parts],
        seeds=[integer_seed(seed, "cross-fitting", fold) for fold in range(folds)],
    )
    return list(zip(parts, models, strict=True))
