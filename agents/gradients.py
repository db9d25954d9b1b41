"""One pure surrogate per method: the loss whose gradient is the method's policy-gradient estimate.

All are score-function estimates: ``∇J ≈ Σ_i w_i ∇ log π(a_i | x_i, q_i)`` with a weight w that is a number, not a
function of the policy's parameters. The methods differ in w and in where a comes from. Each function returns the
negative, to be minimised, one loss a world (W,).

Source of the methods and of their scaling: Kiyohara, Cao, Saito, Joachims, RecSys 2025 (arXiv 2504.02646) and the code
released with it, which sums over the batch for online and kernel methods and averages for the others.

Symbols: ``W`` worlds, ``B`` rounds of a batch, ``A`` prompts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _LogProbability(torch.autograd.Function):
    """``log softmax(logits)[action]`` given the softmax; backward writes one matrix instead of autograd's three."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, pmf: Tensor, actions: Tensor) -> Tensor:
        ctx.save_for_backward(pmf, actions)
        chosen = pmf.gather(-1, actions[..., None])[..., 0]
        # A probability that underflowed has weight zero in every method; its logarithm only has to be a number.
        return chosen.clamp_min(torch.finfo(pmf.dtype).tiny).log()

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


def invert(pmf: Tensor, uniforms: Tensor) -> Tensor:
    """Return the first index whose cumulative probability exceeds the uniform, (...) for `pmf` (..., A)."""
    cumulative = pmf.cumsum(-1)
    # Rounding may leave the last sum below the uniform: scaling by it keeps the index within the catalogue.
    target = uniforms[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, target, right=True)[..., 0].clamp_max_(pmf.shape[-1] - 1)


def online(policy: ActionDistribution, actions: Tensor, reward: Tensor, ratio: Tensor | float = 1.0) -> Tensor:
    """REINFORCE on the environment: ``w = r``, ``a ~ π``.

    Args:
        policy: π.
        actions: drawn from π, or from an earlier policy (W, B).
        reward: observed for them (W, B).
        ratio: π over the policy they were drawn from.
    """
    return -(ratio * reward * policy.log_probability(actions)).sum(-1)


def regression(policy: ActionDistribution, actions: Tensor, predicted: Tensor) -> Tensor:
    """Regression-based: ``w = q̂(x, q, a)``, ``a ~ π``. Unbiased if q̂ is.

    Args:
        policy: π.
        actions: drawn from π (W, B).
        predicted: q̂ for them (W, B).
    """
    return -(predicted * policy.log_probability(actions)).mean(-1)


def importance_sampling(
    policy: ActionDistribution, actions: Tensor, propensity: Tensor, reward: Tensor, clip: float
) -> Tensor:
    """Importance sampling: ``w = min(π(a) / π₀(a), clip) r``, a logged. Unbiased where the clip does not bite.

    Args:
        policy: π.
        actions: logged (W, B).
        propensity: π₀ of them (W, B).
        reward: logged (W, B).
        clip: upper bound of the weight.
    """
    weight = (policy.probability(actions) / propensity).clamp_max(clip)
    return -(weight * reward * policy.log_probability(actions)).mean(-1)


def kernel_importance_sampling(
    policy: ActionDistribution,
    actions: Tensor,
    similarity: Tensor,
    density: Tensor,
    reward: Tensor,
    clip: float,
    ratio: Tensor | float = 1.0,
) -> Tensor:
    """DSO: importance sampling in the space of sentences, ``w = min(K(s, s') / π₀(s | x, q), clip) r``.

    s is the logged sentence, ``a ~ π``, and s' is generated with a. Unbiased for the policy whose sentences are blurred
    by the kernel, where the clip does not bite.

    Args:
        policy: π.
        actions: drawn from π, or from an earlier policy (W, B).
        similarity: K(s, s') (W, B).
        density: logging marginal density at s, smoothed by the same kernel (W, B).
        reward: logged (W, B).
        clip: upper bound of the weight.
        ratio: π over the policy the actions were drawn from.
    """
    weight = (ratio * similarity / density).clamp_max(clip)
    return -(weight * reward * policy.log_probability(actions)).sum(-1)


def cloning(policy: ActionDistribution, actions: Tensor) -> Tensor:
    """Behaviour cloning: negative mean log-likelihood of the logged prompts (W, B)."""
    return -policy.log_probability(actions).mean(-1)
