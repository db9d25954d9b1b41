"""Feeds: where the batches of the policy gradients come from.

Logged rounds, logged rounds with sentences of other prompts, and rounds of the environment. A batch that needs an
answer to the policy's own prompts (a sentence, a reward) either gets it within its step, where answers are cheap
tensors, or was answered with a block of others, with prompts of the policy at the block's first step.

Symbols: ``W`` worlds, ``B`` rounds of a batch, ``A`` prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from agents.gradients import ActionDistribution
from agents.kernels import generate
from agents.networks import StackedMLP, homogeneous
from agents.training import BLOCK, StackedLogs, normals, stack_draws, uniforms, world_streams
from offprompts_env.sampling import MATRIX_AT_ONCE
from offprompts_env.simulator import GaussianOutputs, LinearReward, OutputModel, Simulator
from offprompts_env.types import Contexts


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of logged rounds.

    Attributes:
        inputs: ``[x, q, 1]``, (W, B, d + 1).
        rows: where the rounds are in the stacked columns, (W, B).
        uniforms: to draw prompts with, (W, B).
    """

    inputs: Tensor
    rows: Tensor
    uniforms: Tensor


class LoggedRounds:
    """Feed of logged rounds drawn with replacement.

    Args:
        stack: the logs.
        seeds: one a log.
        label: name of the streams.
        batch_size: ``B``.
        parts: draw only from these rows of each log, rather than from all.
    """

    def __init__(
        self,
        stack: StackedLogs,
        seeds: Sequence[int],
        label: str,
        batch_size: int,
        parts: Sequence[Tensor] | None = None,
    ) -> None:
        self._stack, self._batch_size, self._parts = stack, batch_size, parts
        self._rows = world_streams(seeds, label, "batches")
        self._uniforms = world_streams(seeds, label, "actions")

    def block(self, steps: int, network: StackedMLP) -> list[Batch]:
        """Return batches for at most `steps` steps."""
        shape = (min(steps, BLOCK), self._batch_size)
        rows = self._stack.rows(self._rows, *shape, self._parts)
        drawn = uniforms(self._uniforms, *shape)
        return [Batch(*batch) for batch in zip(self._stack.inputs[rows], rows, drawn, strict=True)]


class SentenceBatch(Protocol):
    """Logged rounds with sentences of prompts that the policy would choose."""

    @property
    def inputs(self) -> Tensor:
        """``[x, q, 1]``, (W, B, d + 1)."""
        ...

    @property
    def rows(self) -> Tensor:
        """Where the rounds are in the stacked columns, (W, B)."""
        ...

    @property
    def blur(self) -> Tensor:
        """Standard normals for the kernel, (W, B, d_o)."""
        ...

    def draw(self, policy: ActionDistribution) -> tuple[Tensor, Tensor, Tensor | float]:
        """Return prompts (W, B), their sentences (W, B, d_o), and π over the policy the prompts were drawn from."""
        ...


class _GaussianWorlds:
    """Generators with ``s = base(q) + effects[a] + noise``, for the logged rounds of W worlds."""

    def __init__(self, stack: StackedLogs, generators: Sequence[GaussianOutputs]) -> None:
        self._stack = stack
        pairs = list(zip(generators, stack.logs, strict=True))
        self.base = StackedLogs.join([generator.base(log.contexts) for generator, log in pairs])
        self.effects = StackedLogs.join([generator.effects for generator in generators])
        self.std = torch.from_numpy(np.stack([generator.noise_std for generator in generators]))[:, None]

    def mean(self, rows: Tensor, actions: Tensor) -> Tensor:
        return self.base[rows] + self.effects[self._stack.prompt_rows(actions)]


@dataclass(frozen=True, slots=True)
class _FreshSentences:
    """A batch whose prompts are drawn from the policy of its own step."""

    inputs: Tensor
    rows: Tensor
    uniforms: Tensor
    noise: Tensor
    blur: Tensor
    worlds: _GaussianWorlds

    def draw(self, policy: ActionDistribution) -> tuple[Tensor, Tensor, Tensor | float]:
        actions = policy.sample(self.uniforms)
        return actions, self.worlds.mean(self.rows, actions) + self.noise, 1.0


class FreshFeed:
    """Feed of batches for Gaussian generators: sentences cost next to nothing, so each step has its own."""

    def __init__(
        self,
        stack: StackedLogs,
        seeds: Sequence[int],
        generators: Sequence[GaussianOutputs],
        label: str,
        batch_size: int,
    ) -> None:
        self._rounds = LoggedRounds(stack, seeds, label, batch_size)
        self._gaussian = _GaussianWorlds(stack, generators)
        self._noise = world_streams(seeds, label, "outputs")
        self._blur = world_streams(seeds, label, "blur")

    def block(self, steps: int, network: StackedMLP) -> list[SentenceBatch]:
        """Return batches for at most `steps` steps."""
        rounds = self._rounds.block(steps, network)
        shape = (len(rounds), rounds[0].rows.shape[1], self._gaussian.base.shape[1])
        noise = normals(self._noise, *shape) * self._gaussian.std
        blur = normals(self._blur, *shape)
        return [
            _FreshSentences(batch.inputs, batch.rows, batch.uniforms, own, other, self._gaussian)
            for batch, own, other in zip(rounds, noise, blur, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class _PreparedSentences:
    """A batch whose prompts were drawn, with probability `proposal`, from the policy of an earlier step."""

    inputs: Tensor
    rows: Tensor
    actions: Tensor
    sentences: Tensor
    proposal: Tensor
    blur: Tensor

    def draw(self, policy: ActionDistribution) -> tuple[Tensor, Tensor, Tensor | float]:
        return self.actions, self.sentences, policy.probability(self.actions) / self.proposal


class PreparedFeed:
    """Feed of batches for any generator: sentences for a block of steps are asked for at once.

    Args:
        stack: the logs.
        seeds: one a log.
        generators: one a log.
        label: name of the streams.
        batch_size: ``B``.
        refresh: steps of a block.
        share: sentences asked for, as a share of the rounds of a block; below 1 they are drawn with replacement.
    """

    def __init__(
        self,
        stack: StackedLogs,
        seeds: Sequence[int],
        generators: Sequence[OutputModel],
        label: str,
        *,
        batch_size: int,
        refresh: int,
        share: float,
    ) -> None:
        self._stack, self._generators = stack, generators
        self._batch_size, self._refresh, self._share = batch_size, refresh, share
        names = ("batches", "actions", "outputs", "blur", "reuse")
        self._rows, self._uniforms, self._outputs, self._blur, self._reuse = (
            world_streams(seeds, label, name) for name in names
        )

    def block(self, steps: int, network: StackedMLP) -> list[SentenceBatch]:
        """Return batches for at most `steps` steps."""
        steps = min(steps, self._refresh)
        slots = steps * self._batch_size
        asked = max(1, round(self._share * slots))
        rows = self._stack.rows(self._rows, 1, asked)[0]
        actions, proposal = propose(network, self._stack.inputs[rows], uniforms(self._uniforms, 1, asked)[0])
        local = (rows - self._stack.offsets[:, None]).numpy()
        sentences = torch.from_numpy(
            np.stack(
                [
                    generate(generator, log.contexts, own, chosen, rng)
                    for generator, log, own, chosen, rng in zip(
                        self._generators, self._stack.logs, local, actions.numpy(), self._outputs, strict=True
                    )
                ]
            )
        )
        if asked == slots:
            index = torch.arange(slots).expand(len(rows), slots)
        else:
            index = stack_draws(lambda rng: rng.integers(asked, size=(1, slots)), self._reuse)[0]
        blur = normals(self._blur, steps, self._batch_size, sentences.shape[-1])
        world = torch.arange(len(rows))[:, None]
        batches: list[SentenceBatch] = []
        for step in range(steps):
            pick = (world, index[:, step * self._batch_size : (step + 1) * self._batch_size])
            own = rows[pick]
            batches.append(
                _PreparedSentences(
                    self._stack.inputs[own], own, actions[pick], sentences[pick], proposal[pick], blur[step]
                )
            )
        return batches


def propose(network: StackedMLP, inputs: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Draw prompts from the policies as they are now.

    Args:
        network: the policies.
        inputs: (W, m, d + 1).
        drawn: uniforms (W, m).

    Returns:
        prompts and their probabilities, (W, m) each.
    """
    head = ActionDistribution if network.head is None else network.head
    size = max(1, MATRIX_AT_ONCE // (network.worlds * getattr(head, "width", network.sizes[-1])))
    actions, proposal = [], []
    for part, uniform in zip(torch.split(inputs, size, dim=1), torch.split(drawn, size, dim=1), strict=True):
        policy = head(network.forward(part))
        actions.append(policy.sample(uniform))
        proposal.append(policy.probability(actions[-1]))
    return torch.cat(actions, dim=1), torch.cat(proposal, dim=1)


class OnlineBatch(Protocol):
    """Rounds of the environment."""

    @property
    def inputs(self) -> Tensor:
        """``[x, q, 1]``, (W, B, d + 1)."""
        ...

    def play(self, policy: ActionDistribution) -> tuple[Tensor, Tensor, Tensor | float]:
        """Return prompts (W, B), their rewards (W, B), and π over the policy the prompts were drawn from."""
        ...


@dataclass(frozen=True, slots=True)
class _LinearRounds:
    """Rounds whose reward is ``intercept + weights · effects[a]``, noise included."""

    inputs: Tensor
    uniforms: Tensor
    weights: Tensor
    intercept: Tensor
    effects: Tensor
    first_prompt: Tensor

    def play(self, policy: ActionDistribution) -> tuple[Tensor, Tensor, Tensor | float]:
        actions = policy.sample(self.uniforms)
        moved = (self.weights * self.effects[actions + self.first_prompt]).sum(-1)
        return actions, self.intercept + moved, 1.0


@dataclass(frozen=True, slots=True)
class _PlayedRounds:
    """Rounds that were played with prompts drawn, with probability `proposal`, from the policy of an earlier step."""

    inputs: Tensor
    actions: Tensor
    reward: Tensor
    proposal: Tensor

    def play(self, policy: ActionDistribution) -> tuple[Tensor, Tensor, Tensor | float]:
        return self.actions, self.reward, policy.probability(self.actions) / self.proposal


class _OnlineFeed:
    """What the two feeds of online rounds share: fresh contexts."""

    def __init__(self, simulators: Sequence[Simulator], seeds: Sequence[int], label: str, batch_size: int) -> None:
        self._simulators, self._batch_size = simulators, batch_size
        names = ("contexts", "actions", "outputs", "rewards")
        self._contexts, self._uniforms, self._outputs, self._rewards = (
            world_streams(seeds, label, name) for name in names
        )

    def _fresh(self, n: int) -> tuple[list[Contexts], Tensor]:
        contexts = [
            simulator.contexts.sample(n, rng) for simulator, rng in zip(self._simulators, self._contexts, strict=True)
        ]
        return contexts, torch.from_numpy(np.stack([homogeneous([part.context, part.query]) for part in contexts]))


class LinearFeed(_OnlineFeed):
    """Feed of rounds of simulators that are linear in Gaussian outputs: played without leaving PyTorch."""

    def block(self, steps: int, network: StackedMLP) -> list[OnlineBatch]:
        """Return batches for at most `steps` steps."""
        steps = min(steps, BLOCK)
        contexts, inputs = self._fresh(steps * self._batch_size)
        effects, weights, intercept = [], [], []
        for simulator, part, output_rng, reward_rng in zip(
            self._simulators, contexts, self._outputs, self._rewards, strict=True
        ):
            generator, reward = simulator.outputs, simulator.rewards
            if not (isinstance(generator, GaussianOutputs) and isinstance(reward, LinearReward)):
                raise TypeError("linear rounds: expected a GaussianOutputs and a LinearReward")
            own = np.asarray(reward.weights(part), dtype=np.float32)
            noise = output_rng.standard_normal(own.shape, dtype=np.float32) * generator.noise_std
            mean = np.einsum("nd,nd->n", own, generator.base(part) + noise)
            effects.append(generator.effects)
            weights.append(own)
            intercept.append(simulator.noise.draw(mean, reward_rng))
        n_prompts = len(effects[0])
        first_prompt = torch.arange(0, len(effects) * n_prompts, n_prompts)[:, None]
        stacked = StackedLogs.join(effects)
        drawn = uniforms(self._uniforms, steps, self._batch_size)
        columns = [inputs, torch.from_numpy(np.stack(weights)), torch.from_numpy(np.stack(intercept))]
        split = [torch.split(column, self._batch_size, dim=1) for column in columns]
        return [
            _LinearRounds(own, drawn[step], weight, fixed, stacked, first_prompt)
            for step, (own, weight, fixed) in enumerate(zip(*split, strict=True))
        ]


class PlayedFeed(_OnlineFeed):
    """Feed of rounds of any simulator, played for a block of steps at once."""

    def __init__(
        self, simulators: Sequence[Simulator], seeds: Sequence[int], label: str, batch_size: int, refresh: int
    ) -> None:
        super().__init__(simulators, seeds, label, batch_size)
        self._refresh = refresh

    def block(self, steps: int, network: StackedMLP) -> list[OnlineBatch]:
        """Return batches for at most `steps` steps."""
        n = min(steps, self._refresh) * self._batch_size
        contexts, inputs = self._fresh(n)
        actions, proposal = propose(network, inputs, uniforms(self._uniforms, 1, n)[0])
        reward = torch.from_numpy(
            np.stack(
                [
                    simulator.play(part, chosen, output_rng, reward_rng).reward
                    for simulator, part, chosen, output_rng, reward_rng in zip(
                        self._simulators, contexts, actions.numpy(), self._outputs, self._rewards, strict=True
                    )
                ]
            )
        )
        split = [torch.split(column, self._batch_size, dim=1) for column in (inputs, actions, reward, proposal)]
        return [_PlayedRounds(*batch) for batch in zip(*split, strict=True)]
