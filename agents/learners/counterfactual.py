"""The field's standard learners from logged prompts: importance sampling, each tamed in its own way.

All need propensities, or the logging policy. They differ in what becomes of the weights: a penalty on their variance
(:class:`CRM`), a translated reward (:class:`BanditNet`, :class:`BetaIPSPG`), a smoother function of them
(:class:`LogarithmicSmoothingPG`, :class:`ExponentialSmoothingPG`), or none that depends on the policy
(:class:`WeightedLogLikelihood`). The schedules are those of the other policy gradients, so that they compare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from agents import gradients
from agents.feeds import Batch, LoggedRounds
from agents.gradients import ActionDistribution
from agents.learners.base import Callback, Objective, OfflinePolicyGradient
from agents.networks import StackedMLP
from agents.policies import NeuralPolicy
from agents.training import StackedLogs, world_streams
from agents.worlds import Worlds
from offprompts_env.config import check_number
from offprompts_env.errors import ConfigError, DataError
from offprompts_env.sampling import MATRIX_AT_ONCE, chosen_probabilities
from offprompts_env.types import Contexts, FloatArray, IntArray

# Rounds from which the moments of a policy's weighted rewards are taken, once a block of steps.
_MOMENT_ROUNDS = 1024


@dataclass(frozen=True, slots=True)
class Logged:
    """What a log says of the rounds of a batch.

    Attributes:
        actions: logged prompts (W, B).
        propensity: π₀ of them (W, B).
        reward: (W, B).
        rounds: number of rounds of each log, (W, 1).
    """

    actions: Tensor
    propensity: Tensor
    reward: Tensor
    rounds: Tensor


@dataclass(frozen=True)
class _LoggedGradient(OfflinePolicyGradient):
    """A policy gradient that is a function of a batch of logged rounds and the policy."""

    def _surrogate(self, policy: ActionDistribution, logged: Logged) -> Tensor:
        """Return the loss of a batch, one a world (W,)."""
        raise NotImplementedError

    def _objective(self, worlds: Worlds) -> Objective[Batch]:
        look_up = _look_up(worlds, f"agents.{type(self).__name__}")

        def loss(policy: ActionDistribution, batch: Batch) -> Tensor:
            return self._surrogate(policy, look_up(batch.rows))

        return Objective.of(self._rounds(worlds), loss)


def _look_up(worlds: Worlds, label: str) -> Callable[[Tensor], Logged]:
    """Return what gives the logged columns of stacked rows (W, B)."""
    stack, propensity = worlds.stack, worlds.propensities(label)
    rounds = torch.tensor(stack.sizes, dtype=torch.float32)[:, None]
    return lambda rows: Logged(stack.action[rows], propensity[rows], stack.reward[rows], rounds)


@dataclass(frozen=True)
class LogarithmicSmoothingPG(_LoggedGradient):
    """Policy gradient of the logarithmically smoothed value, :func:`agents.gradients.logarithmic_smoothing`.

    Attributes:
        smoothing: λ ≥ 0; None is ``1 / √n``.
    """

    smoothing: float | None = None

    label: ClassVar[str] = "logarithmic smoothing PG"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.smoothing is not None:
            check_number("smoothing", self.smoothing, 0)

    def _surrogate(self, policy: ActionDistribution, logged: Logged) -> Tensor:
        smoothing = logged.rounds.rsqrt() if self.smoothing is None else self.smoothing
        return gradients.logarithmic_smoothing(policy, logged.actions, logged.propensity, logged.reward, smoothing)


@dataclass(frozen=True)
class ExponentialSmoothingPG(_LoggedGradient):
    """Policy gradient with exponentially smoothed propensities, :func:`agents.gradients.exponential_smoothing`.

    Attributes:
        exponent: α in [0, 1].
    """

    exponent: float = 0.7

    label: ClassVar[str] = "exponential smoothing PG"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("exponent", self.exponent, 0)
        if self.exponent > 1:
            raise ConfigError(f"exponent: expected a number in [0, 1], got {self.exponent}; 1 is importance sampling")

    def _surrogate(self, policy: ActionDistribution, logged: Logged) -> Tensor:
        return gradients.exponential_smoothing(policy, logged.actions, logged.propensity, logged.reward, self.exponent)


@dataclass(frozen=True)
class BetaIPSPG(_LoggedGradient):
    """Importance-sampling policy gradient with the optimal baseline, :func:`agents.gradients.optimal_baseline`.

    Attributes:
        clip: upper bound of the weight π(a) / π₀(a).
    """

    clip: float = 200.0

    label: ClassVar[str] = "β-IPS PG"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("clip", self.clip, 0, strict=True)

    def _surrogate(self, policy: ActionDistribution, logged: Logged) -> Tensor:
        return gradients.optimal_baseline(policy, logged.actions, logged.propensity, logged.reward, self.clip)


@dataclass(frozen=True)
class WeightedLogLikelihood(OfflinePolicyGradient):
    """Maximum likelihood of the logged prompts, each with a weight, :func:`agents.gradients.weighted_log_likelihood`.

    ``g = min(exp((r − r̄) / (T σ_r)) / π₀(a)^α, clip)``, divided by its mean: positive, so the objective is concave in
    the logits, whatever the rewards. With noise that is the same in all rounds the maximiser is ``π ∝ π₀^(1−α)
    exp(E[r | x, q, a] / (T σ_r))``, because the noise cancels. Weighted log-likelihoods in place of importance-sampling
    objectives, whose landscape is flat where there are many prompts, are the proposal of Aouali and Sakhi (arXiv
    2509.03456); exponential weights are those of advantage-weighted regression (arXiv 1910.00177).

    Attributes:
        temperature: T > 0, in standard deviations of the logged rewards; small weights few rounds.
        power: α in [0, 1]; 0 improves on the logging policy and needs no propensities, 1 does without it.
        clip: upper bound of the weight before it is divided by its mean.
    """

    temperature: float = 1.0
    power: float = 0.0
    clip: float = 1e4

    label: ClassVar[str] = "weighted log-likelihood"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("temperature", self.temperature, 0, strict=True)
        check_number("power", self.power, 0)
        check_number("clip", self.clip, 0, strict=True)
        if self.power > 1:
            raise ConfigError(f"power: expected a number in [0, 1], got {self.power}")

    def _objective(self, worlds: Worlds) -> Objective[Batch]:
        stack = worlds.stack
        propensity = worlds.propensities("agents.WeightedLogLikelihood with power > 0") if self.power else None
        weights = []
        for log, offset in zip(stack.logs, stack.offsets.tolist(), strict=True):
            reward = log.reward.astype(np.float64)
            spread = reward.std() or 1.0
            exponent = (reward - reward.mean()) / (self.temperature * spread)
            if propensity is not None:
                exponent -= self.power * np.log(propensity[offset : offset + len(log)].numpy())
            # Clipped in logarithms: the exponential itself may overflow.
            weight = np.exp(np.minimum(exponent, np.log(self.clip)))
            weights.append((weight / weight.mean()).astype(np.float32))
        weight = StackedLogs.join(weights)

        def loss(policy: ActionDistribution, batch: Batch) -> Tensor:
            return gradients.weighted_log_likelihood(policy, stack.action[batch.rows], weight[batch.rows])

        return Objective.of(self._rounds(worlds), loss)


@dataclass(frozen=True, slots=True)
class _MomentBatch:
    """Logged rounds with the moments (W, 1) of weighted rewards under the policy at the start of their block."""

    inputs: Tensor
    rows: Tensor
    mean: Tensor
    deviation: Tensor


class _MomentRounds:
    """Feed of logged rounds with moments of ``u = min(π / π₀, clip) r``, refreshed with each block of steps."""

    def __init__(
        self, rounds: LoggedRounds, worlds: Worlds, label: str, logged: Callable[[Tensor], Logged], clip: float
    ) -> None:
        self._rounds, self._stack, self._logged, self._clip = rounds, worlds.stack, logged, clip
        self._draws = world_streams(worlds.seeds, label, "moments")

    def block(self, steps: int, network: StackedMLP) -> list[_MomentBatch]:
        rows = self._stack.rows(self._draws, 1, _MOMENT_ROUNDS)[0]
        size = max(16, MATRIX_AT_ONCE // (network.worlds * network.sizes[-1]) // 16 * 16)
        utility = []
        for part in torch.split(rows, size, dim=1):
            logged = self._logged(part)
            ratio = ActionDistribution(network.forward(self._stack.inputs[part])).probability(logged.actions)
            utility.append((ratio / logged.propensity).clamp_max(self._clip) * logged.reward)
        deviation, mean = torch.std_mean(torch.cat(utility, dim=1), dim=1, correction=0, keepdim=True)
        return [_MomentBatch(batch.inputs, batch.rows, mean, deviation) for batch in self._rounds.block(steps, network)]


@dataclass(frozen=True)
class CRM(OfflinePolicyGradient):
    """Counterfactual risk minimisation, :func:`agents.gradients.counterfactual_risk`.

    The moments that its bound touches at are taken from 1,024 logged rounds every 250 steps.

    Attributes:
        penalty: λ ≥ 0 before ``√(Var / n)``; 0 is clipped importance sampling.
        clip: upper bound of the weight π(a) / π₀(a).
    """

    penalty: float = 1.0
    clip: float = 200.0

    label: ClassVar[str] = "CRM"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("penalty", self.penalty, 0)
        check_number("clip", self.clip, 0, strict=True)

    def _objective(self, worlds: Worlds) -> Objective[_MomentBatch]:
        look_up = _look_up(worlds, "agents.CRM")

        def loss(policy: ActionDistribution, batch: _MomentBatch) -> Tensor:
            logged = look_up(batch.rows)
            return gradients.counterfactual_risk(
                policy,
                logged.actions,
                logged.propensity,
                logged.reward,
                self.clip,
                self.penalty,
                logged.rounds,
                batch.mean,
                batch.deviation,
            )

        feed = _MomentRounds(self._rounds(worlds), worlds, self.label, look_up, self.clip)
        return Objective.of(feed, loss)


@dataclass(frozen=True)
class BanditNet(OfflinePolicyGradient):
    """Importance sampling of translated rewards, :func:`agents.gradients.translated_importance_sampling`.

    One policy is trained for each translation of the grid, all as one batched problem; the one with the largest
    self-normalised estimate ``Σ w r / Σ w`` on held-out rounds is returned. So the time is that of as many policies.

    Attributes:
        shifts: grid of translations, in standard deviations of the logged rewards above their mean.
        clip: upper bound of the weight π(a) / π₀(a).
        train_fraction: share of the rounds that is trained on; the rest chooses among the grid.
    """

    shifts: tuple[float, ...] = (-0.5, 0.0, 0.5)
    clip: float = 200.0
    train_fraction: float = 0.8

    label: ClassVar[str] = "BanditNet"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "shifts", tuple(self.shifts))
        if not self.shifts:
            raise ConfigError("shifts: expected at least one translation, got none; (0.0,) subtracts the mean reward")
        for shift in self.shifts:
            check_number("shifts", shift)
        check_number("clip", self.clip, 0, strict=True)
        check_number("train_fraction", self.train_fraction, 0, strict=True)
        if self.train_fraction >= 1:
            raise ConfigError(f"train_fraction: expected a share in (0, 1), got {self.train_fraction}")

    def _learn(self, worlds: Worlds, callbacks: Sequence[Callback]) -> list[NeuralPolicy]:
        propensity = torch.split(worlds.propensities("agents.BanditNet"), worlds.stack.sizes)
        copies = len(self.shifts)
        index = [world for world in range(worlds.stack.worlds) for _ in range(copies)]
        stack = StackedLogs([worlds.stack.logs[world] for world in index])
        grid = Worlds(stack, None, None, tuple(worlds.seeds[world] for world in index))
        known = torch.cat([propensity[world] for world in index])
        moments = [(float(log.reward.mean()), float(log.reward.std())) for log in worlds.stack.logs]
        shift = torch.tensor([[mean + own * std] for mean, std in moments for own in self.shifts])
        parts, held_out = stack.split(world_streams(grid.seeds, self.label, "split"), self.train_fraction)
        if not all(len(rows) for rows in held_out):
            raise DataError(
                f"{self.label}: expected held-out rounds to choose a translation with, got none of "
                f"{min(stack.sizes)}; record more rounds or lower train_fraction"
            )

        def loss(policy: ActionDistribution, batch: Batch) -> Tensor:
            rows = batch.rows
            return gradients.translated_importance_sampling(
                policy, stack.action[rows], known[rows], stack.reward[rows], shift, self.clip
            )

        rounds = [
            _Held(log.contexts.take(own), log.action[own], log.reward[own], known[rows].numpy())
            for log, own, rows in zip(stack.logs, stack.local(held_out), held_out, strict=True)
        ]

        def chosen(policies: Sequence[NeuralPolicy]) -> list[NeuralPolicy]:
            values = [held.self_normalised(policy, self.clip) for policy, held in zip(policies, rounds, strict=True)]
            best = np.reshape(values, (-1, copies)).argmax(axis=1)
            return [policies[world * copies + place] for world, place in enumerate(best)]

        def watch(callback: Callback) -> Callback:
            return Callback(callback.every, lambda step, policies: callback.on_step(step, chosen(policies)))

        objective = Objective.of(self._rounds(grid, parts), loss)
        return chosen(self._minimise(grid, objective, [watch(callback) for callback in callbacks]))


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """Held-out rounds of a log."""

    contexts: Contexts
    action: IntArray
    reward: FloatArray
    propensity: FloatArray

    def self_normalised(self, policy: NeuralPolicy, clip: float) -> float:
        """Return ``Σ w r / Σ w``, or minus infinity where no weight counts."""
        weights = np.minimum(chosen_probabilities(policy, self.contexts, self.action) / self.propensity, clip)
        total = float(weights.sum())
        return float(weights @ self.reward) / total if total > 0 else -np.inf
