"""Policies over prompts while they are learned: pmfs of a batch, draws from them, and derivatives in their logits.

Symbols: ``W`` worlds, ``B`` rounds of a batch, ``A`` prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from agents.training import BatchT, Gradient


def _logarithm(probability: Tensor) -> Tensor:
    # A probability that underflowed has weight zero in every method; its logarithm only has to be a number.
    return probability.clamp_min(torch.finfo(probability.dtype).tiny).log()


class _LogProbability(torch.autograd.Function):
    """``log softmax(logits)[action]`` given the softmax; backward writes one matrix instead of autograd's three."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, pmf: Tensor, actions: Tensor) -> Tensor:
        ctx.save_for_backward(pmf, actions)
        chosen = pmf.gather(-1, actions[..., None])[..., 0]
        return _logarithm(chosen)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        pmf, actions = ctx.saved_tensors
        return (pmf * -slope[..., None]).scatter_add_(-1, actions[..., None], slope[..., None]), None, None


class ActionDistribution:
    """``π(· | x, q) = softmax(logits)`` for a batch.

    Attributes:
        logits: (W, B, A).
        pmf: the probabilities, without gradient.
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.pmf = torch.softmax(logits.detach(), -1)

    def sample(self, uniforms: Tensor) -> Tensor:
        """Return the prompts at which the cumulative pmf passes `uniforms` (W, B), by inversion, (W, B) int64."""
        return invert(self.pmf, uniforms)

    def probability(self, actions: Tensor) -> Tensor:
        """Return ``π(a)``, without gradient, (W, B)."""
        return self.pmf.gather(-1, actions[..., None])[..., 0]

    def log_probability(self, actions: Tensor) -> Tensor:
        """Return ``log π(a)``, differentiable in the logits, (W, B)."""
        log_probability: Tensor = _LogProbability.apply(self.logits, self.pmf, actions)  # type: ignore[no-untyped-call]
        return log_probability

    def score_loss(self, actions: Tensor, weight: Tensor) -> Tensor:
        """Return ``−Σ_i w_i log π(a_i)`` of `actions` (W, B) with a `weight` (W, B) that is held fixed, (W,)."""
        return -(weight * self.log_probability(actions)).sum(-1)

    def value_loss(self, values: Tensor) -> Tensor:
        """Return ``−Σ_i Σ_a π(a) v_ia`` of `values` (W, B, A), (W,)."""
        return -(torch.softmax(self.logits, -1) * values).sum((-2, -1))


class _NotedSoftmax(ActionDistribution):
    """A softmax that notes the losses taken of it, so that their derivative can be written down at the end."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__(logits)
        self._factors: list[Tensor] = []
        self._chosen: list[tuple[Tensor, Tensor]] = []

    def log_probability(self, actions: Tensor) -> Tensor:
        raise TypeError("a surrogate by scores: expected score and value losses only; differentiate others by autograd")

    def score_loss(self, actions: Tensor, weight: Tensor) -> Tensor:
        self._factors.append(weight[..., None])
        self._chosen.append((actions[..., None], -weight[..., None]))
        return -(weight * _logarithm(self.probability(actions))).sum(-1)

    def value_loss(self, values: Tensor) -> Tensor:
        expected = (self.pmf * values).sum(-1, keepdim=True)
        self._factors.append(expected - values)
        return -expected.sum((-2, -1))

    def slope(self) -> Tensor:
        """Return ``Σ w (π − 1{a}) + Σ π (E_π[v] − v)``, the derivative of all losses, (W, B, A), over the pmf."""
        slope = self.pmf.mul_(sum(self._factors[1:], start=self._factors[0]))
        for actions, weight in self._chosen:
            slope.scatter_add_(-1, actions, weight)
        return slope


def by_scores(surrogate: Callable[[ActionDistribution, BatchT], Tensor]) -> Gradient[BatchT]:
    """Return losses and their derivative without autograd, which takes as long as the arithmetic at this size.

    Args:
        surrogate: ``(policy, batch)`` to losses (W,): a sum of what :meth:`ActionDistribution.score_loss` and
            :meth:`ActionDistribution.value_loss` give.
    """

    def gradient(logits: Tensor, batch: BatchT) -> tuple[Tensor, Tensor]:
        policy = _NotedSoftmax(logits)
        return surrogate(policy, batch), policy.slope()

    return gradient


# Prompts from which on blocks are worth their overhead.
_MANY = 512


def invert(pmf: Tensor, uniforms: Tensor) -> Tensor:
    """Return the first index whose cumulative probability exceeds the uniform, (...) for `pmf` (..., A).

    A cumulative sum is one addition after the other. Where prompts are many, only the sums of blocks of about √A are
    accumulated, and then the prompts of the one block that the uniform falls in.
    """
    if pmf.shape[-1] < _MANY:
        return _exceeding(pmf.cumsum(-1), uniforms[..., None])[0][..., 0]
    blocks = _in_blocks(pmf)
    mass, width = blocks.sum(-1), blocks.shape[-1]
    cumulative = mass.cumsum(-1)
    block, target = _exceeding(cumulative, uniforms[..., None])
    own = blocks.gather(-2, block[..., None].expand(*block.shape, width))[..., 0, :].cumsum(-1)
    left = (target - (cumulative - mass).gather(-1, block)).clamp_min_(0)
    # Sums in another order round otherwise: what is left stays below its block's own, so an index with mass is found.
    left = torch.minimum(left, own[..., -1:] * (1 - torch.finfo(own.dtype).eps))
    inside = torch.searchsorted(own, left, right=True).clamp_max_(width - 1)
    return (block * width + inside)[..., 0]


def _exceeding(cumulative: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first index where `cumulative` (..., k) exceeds `shares` of its last number, and these, (..., 1)."""
    # The last number is near one, not one: scaling by it keeps the index within the catalogue.
    target = shares * cumulative[..., -1:]
    return torch.searchsorted(cumulative, target, right=True).clamp_max_(cumulative.shape[-1] - 1), target


def _in_blocks(pmf: Tensor) -> Tensor:
    """Return `pmf` (..., A) as blocks (..., ⌈A / k⌉, k) with k near √A: a view if such a k divides A."""
    count = pmf.shape[-1]
    root = math.isqrt(count)
    width = next((width for width in range(root, 2 * root) if count % width == 0), root)
    short = -count % width
    return (pad(pmf, (0, short)) if short else pmf).view(*pmf.shape[:-1], -1, width)
