"""Behaviour cloning: the logging policy, estimated from what it chose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from agents import gradients
from agents.feeds import Batch
from agents.gradients import ActionDistribution
from agents.learners.base import Callback, Objective, OfflinePolicyGradient, StreamedWorld, Worlds
from agents.policies import NeuralPolicy
from agents.streaming import HELD_OUT_ROWS
from agents.training import world_streams
from offprompts_env.config import check_integer, check_number
from offprompts_env.errors import ConfigError
from offprompts_env.rng import integer_seed
from offprompts_env.sampling import chosen_probabilities
from offprompts_env.types import Contexts, IntArray


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
