"""What regressions of rewards are trained on: batches, the errors of what is predicted for them, and their feeds.

Symbols: ``W`` networks that are trained together, ``B`` rounds of a batch, ``d`` inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from agents.networks import StackedMLP
from agents.training import BLOCK, Feed, StackedLogs, stack_draws


@dataclass(frozen=True, slots=True)
class RegressionBatch:
    """Inputs (W, B, d + 1) and what is to be predicted, (W, B, 1)."""

    inputs: Tensor
    target: Tensor


def squared_error(outputs: Tensor, batch: RegressionBatch) -> Tensor:
    """Return the mean of ``(output − target)²`` over the batch, (W,)."""
    return (outputs - batch.target).square().mean((1, 2))


def squared_error_gradient(outputs: Tensor, batch: RegressionBatch) -> tuple[Tensor, Tensor]:
    """Return :func:`squared_error` and its derivative by hand: autograd would double the time of so small a step."""
    residual = outputs - batch.target
    return residual.square().mean((1, 2)), residual * (2 / residual.shape[1])


class RegressionRounds:
    """Feed of rounds drawn with replacement from a part of the rows for each of W networks.

    Args:
        stack: the logs.
        inputs: of every row, (Σn, d + 1).
        target: what is to be predicted in every row, (Σn,).
        parts: rows that each network is trained on.
        rngs: one a network.
        batch_size: ``B``.
    """

    def __init__(
        self,
        stack: StackedLogs,
        inputs: Tensor,
        target: Tensor,
        parts: Sequence[Tensor],
        rngs: Sequence[np.random.Generator],
        batch_size: int,
    ) -> None:
        self._stack, self._inputs, self._target, self._parts = stack, inputs, target, parts
        self._rngs, self._batch_size = rngs, batch_size

    def block(self, steps: int, network: StackedMLP) -> list[RegressionBatch]:
        """Return batches for at most `steps` steps."""
        rows = self._stack.rows(self._rngs, min(steps, BLOCK), self._batch_size, self._parts)
        return [RegressionBatch(x, y) for x, y in zip(self._inputs[rows], self._target[rows][..., None], strict=True)]


@dataclass(frozen=True, slots=True)
class ContrastBatch:
    """Inputs (W, 2 B, d + 1) of logged rounds, then of the same rounds with other prompts; targets (W, B, 1)."""

    inputs: Tensor
    target: Tensor


def pessimistic_error(outputs: Tensor, batch: ContrastBatch, pessimism: float) -> Tensor:
    """Return :func:`squared_error` plus `pessimism` times how far other prompts are predicted above logged ones, (W,).

    The excess is ``mean_i q̂(x_i, q_i, a'_i) − q̂(x_i, q_i, a_i)``, a' uniform: what was never tried looks bad (released
    code of arXiv 2504.02646; Kumar et al., "Conservative Q-Learning", 2020).
    """
    logged, others = outputs.chunk(2, dim=1)
    return (logged - batch.target).square().mean((1, 2)) + pessimism * (others - logged).mean((1, 2))


def pessimistic_error_gradient(outputs: Tensor, batch: ContrastBatch, pessimism: float) -> tuple[Tensor, Tensor]:
    """Return :func:`pessimistic_error` and its derivative, by hand."""
    logged, others = outputs.chunk(2, dim=1)
    residual, excess = logged - batch.target, (others - logged).mean((1, 2))
    share = pessimism / residual.shape[1]
    slope = torch.cat([residual * (2 / residual.shape[1]) - share, torch.full_like(others, share)], dim=1)
    return residual.square().mean((1, 2)) + pessimism * excess, slope


class Contrasts:
    """Feed of logged rounds, each beside the same round with a uniform prompt.

    Args:
        rounds: the logged rounds, their inputs ``[x, q, e_a, 1]``.
        stack: the logs.
        rngs: one a world, of the other prompts.
        batch_size: ``B``, that of `rounds`.
    """

    def __init__(
        self, rounds: Feed[RegressionBatch], stack: StackedLogs, rngs: Sequence[np.random.Generator], batch_size: int
    ) -> None:
        self._rounds, self._stack, self._rngs, self._batch_size = rounds, stack, rngs, batch_size

    def block(self, steps: int, network: StackedMLP) -> list[ContrastBatch]:
        """Return batches for at most `steps` steps."""
        batches = self._rounds.block(steps, network)
        shape, stack = (len(batches), self._batch_size), self._stack
        prompts = stack_draws(lambda rng: rng.integers(stack.n_prompts, size=shape), self._rngs)
        d = stack.inputs.shape[1] - 1
        contrasts = []
        for batch, drawn in zip(batches, prompts, strict=True):
            own, embeddings = batch.inputs, stack.embeddings[stack.prompt_rows(drawn)]
            others = torch.cat([own[..., :d], embeddings, own[..., -1:]], dim=-1)
            contrasts.append(ContrastBatch(torch.cat([own, others], dim=1), batch.target))
        return contrasts
