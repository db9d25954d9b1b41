"""Behaviour cloning: off-line, the logging policy estimated from what it chose; on-line, a copy of a policy at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from agents import gradients
from agents.feeds import Batch
from agents.gradients import ActionDistribution
from agents.learners.base import Callback, Objective, OfflinePolicyGradient, PolicyGradient
from agents.networks import StackedMLP, homogeneous
from agents.policies import NeuralPolicy
from agents.streaming import HELD_OUT_ROWS
from agents.training import BLOCK, check_seeds, check_simulators, world_streams
from agents.worlds import StreamedWorld, Worlds
from offprompts_env.config import check_integer, check_number
from offprompts_env.errors import ConfigError, DimensionError
from offprompts_env.rng import integer_seed
from offprompts_env.sampling import (
    MATRIX_AT_ONCE,
    check_policy,
    check_probabilities,
    chosen_probabilities,
    sample_actions,
)
from offprompts_env.simulator import Simulator
from offprompts_env.types import Contexts, IntArray, Policy


@dataclass(frozen=True)
class BehaviorCloning(OfflinePolicyGradient):
    """Maximum likelihood of the logged prompts, :func:`agents.gradients.cloning`: an estimate of the logging policy.

    With many prompts and few rounds the likelihood is soon fitted to the rounds themselves, so the policy is the one of
    all those looked at under which held-out rounds are likeliest.

    Attributes:
        train_fraction: share of the rounds that is trained on; 1 holds nothing out and gives the last policy.
        look_every: steps between two looks at the held-out rounds.
        patience: looks without improvement after which a world is done.
    """

    train_fraction: float = 0.8
    look_every: int = 200
    patience: int = 10

    label: ClassVar[str] = "behaviour cloning"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("train_fraction", self.train_fraction, 0, strict=True)
        if self.train_fraction > 1:
            raise ConfigError(f"train_fraction: expected a share in (0, 1], got {self.train_fraction}")
        check_integer("look_every", self.look_every, 1)
        check_integer("patience", self.patience, 1)

    def _objective(self, worlds: Worlds, parts: Sequence[Tensor] | None = None) -> Objective[Batch]:
        def loss(policy: ActionDistribution, batch: Batch) -> Tensor:
            return gradients.cloning(policy, worlds.stack.action[batch.rows])

        return Objective.of(self._rounds(worlds, parts), loss)

    def _learn(self, worlds: Worlds, callbacks: Sequence[Callback]) -> list[NeuralPolicy]:
        stack = worlds.stack
        parts, held_out = stack.split(world_streams(worlds.seeds, self.label, "split"), self.train_fraction)
        objective = self._objective(worlds, parts)
        if not all(len(rows) for rows in held_out):
            return self._minimise(worlds, objective, callbacks)
        rounds = [
            (log.contexts.take(rows), log.action[rows])
            for log, rows in zip(stack.logs, stack.local(held_out), strict=True)
        ]
        best = _Likeliest(rounds, self.patience)
        last = self._minimise(worlds, objective, (Callback(self.look_every, best.look), *callbacks))
        best.look(self.steps, last)
        return best.policies

    def _learn_stream(self, world: StreamedWorld, callbacks: Sequence[Callback]) -> NeuralPolicy:
        kept, held_out = world.log.split(self.train_fraction, seed=integer_seed(world.seed, self.label, "split"))
        if len(held_out) == 0:
            return self._minimise_stream(world, kept, callbacks)
        rest = held_out.head(HELD_OUT_ROWS)
        best = _Likeliest([(rest.contexts, rest.action)], self.patience)
        last = self._minimise_stream(world, kept, (Callback(self.look_every, best.look), *callbacks))
        best.look(self.steps, [last])
        return best.policies[0]


class _Likeliest:
    """Keeps the policy of each world under which the prompts of its held-out `rounds` are likeliest."""

    def __init__(self, rounds: Sequence[tuple[Contexts, IntArray]], patience: int) -> None:
        self._rounds, self._patience = rounds, patience
        self._likelihood, self._idle = [-np.inf] * len(rounds), [0] * len(rounds)
        self.policies: list[NeuralPolicy] = []

    def look(self, step: int, policies: list[NeuralPolicy]) -> bool:
        self.policies = self.policies or list(policies)
        for world, (policy, rounds) in enumerate(zip(policies, self._rounds, strict=True)):
            # A world that is done stays as it is, as it would alone, while others of the stack go on.
            if self._idle[world] >= self._patience:
                continue
            chances = np.maximum(chosen_probabilities(policy, *rounds), np.finfo(np.float32).tiny)
            likelihood = float(np.log(chances).mean())
            self._idle[world] += 1
            if likelihood > self._likelihood[world]:
                self._likelihood[world], self.policies[world], self._idle[world] = likelihood, policy, 0
        return min(self._idle) >= self._patience


@dataclass(frozen=True)
class OnlineCloning(PolicyGradient):
    """A neural copy of a policy at hand, from fresh contexts of a simulator; no sentence is written, no reward paid.

    It makes any policy one that saves, loads and is fast, whatever it is made of. It minimises the cross-entropy to the
    policy's pmf, :func:`agents.gradients.imitation`, or, for policies that draw without making their pmf, an unbiased
    estimate of that from one prompt a round, :func:`agents.gradients.cloning`.

    Attributes:
        draw: learn from drawn prompts rather than from the pmf.
    """

    draw: bool = False

    label: ClassVar[str] = "online cloning"

    def fit(
        self, policy: Policy, simulator: Simulator, *, seed: int = 0, callback: Callback | None = None
    ) -> NeuralPolicy:
        """Clone `policy` on ``steps · batch_size`` contexts of `simulator`.

        Raises:
            DimensionError: the policy is over other prompts than the simulator's.
            NumericalError: training diverged, or the policy gives NaN.
        """
        return self.fit_many([policy], [simulator], seeds=[seed], callback=callback)[0]

    def fit_many(
        self,
        policies: Sequence[Policy],
        simulators: Sequence[Simulator],
        *,
        seeds: Sequence[int] | None = None,
        callback: Callback | None = None,
    ) -> list[NeuralPolicy]:
        """Clone a policy in each simulator as one batched problem."""
        check_simulators(simulators)
        if len(policies) != len(simulators):
            raise ConfigError(f"policies: expected {len(simulators)}, one a simulator, got {len(policies)}")
        for policy, simulator in zip(policies, simulators, strict=True):
            check_policy(policy, simulator.prompts, "the simulator")
        shapes = [(s.contexts.context_dim, s.contexts.query_dim, s.n_prompts) for s in simulators]
        if len(set(shapes)) != 1:
            raise DimensionError(f"simulators: expected the same d_x, d_q and number of prompts in all, got {shapes}")
        chosen, (d_x, d_q, n_prompts) = check_seeds(simulators, seeds), shapes[0]
        feed = _Demonstrations(policies, simulators, chosen, self)

        def loss(policy: ActionDistribution, batch: _Demonstration) -> Tensor:
            if self.draw:
                return gradients.cloning(policy, batch.shown)
            return gradients.imitation(policy, batch.shown)

        catalogues = [simulator.prompts.fingerprint for simulator in simulators]
        callbacks = () if callback is None else (callback,)
        objective = Objective.of(feed, loss)
        return self._optimise(d_x + d_q, catalogues, n_prompts, objective, chosen, self.label, callbacks)


@dataclass(frozen=True, slots=True)
class _Demonstration:
    """Inputs ``[x, q, 1]`` (W, B, d + 1), and what the policies do there: prompts (W, B), or pmfs (W, B, A)."""

    inputs: Tensor
    shown: Tensor


class _Demonstrations:
    """Feed of fresh contexts, with what the policies do in them."""

    def __init__(
        self,
        policies: Sequence[Policy],
        simulators: Sequence[Simulator],
        seeds: Sequence[int],
        config: OnlineCloning,
    ) -> None:
        self._policies, self._simulators, self._config = policies, simulators, config
        self._contexts = world_streams(seeds, config.label, "contexts")
        self._actions = world_streams(seeds, config.label, "actions")

    def block(self, steps: int, network: StackedMLP) -> list[_Demonstration]:
        """Return batches for at most `steps` steps."""
        batch_size, draw = self._config.batch_size, self._config.draw
        width = 1 if draw else self._simulators[0].n_prompts
        steps = max(1, min(steps, BLOCK, MATRIX_AT_ONCE // (len(self._policies) * batch_size * width)))
        inputs, shown = [], []
        for policy, simulator, rng, actions in zip(
            self._policies, self._simulators, self._contexts, self._actions, strict=True
        ):
            contexts = simulator.contexts.sample(steps * batch_size, rng)
            inputs.append(homogeneous([contexts.context, contexts.query]))
            if draw:
                shown.append(sample_actions(policy, contexts, actions)[0])
            else:
                pmf = check_probabilities(policy.probabilities(contexts), len(contexts), width)
                shown.append(np.asarray(pmf, dtype=np.float32))
        columns = (torch.split(torch.from_numpy(np.stack(column)), batch_size, dim=1) for column in (inputs, shown))
        return [_Demonstration(*batch) for batch in zip(*columns, strict=True)]
