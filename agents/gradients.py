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

from agents.distributions import ActionDistribution as ActionDistribution, by_scores as by_scores, invert as invert


def _averaged(policy: ActionDistribution, actions: Tensor, weight: Tensor) -> Tensor:
    """Return the score loss as a mean over the batch, (W,)."""
    return policy.score_loss(actions, weight / weight.shape[-1])


def online(policy: ActionDistribution, actions: Tensor, reward: Tensor, ratio: Tensor | float = 1.0) -> Tensor:
    """REINFORCE on the environment: ``w = r``, ``a ~ π``.

    Args:
        policy: π.
        actions: drawn from π, or from an earlier policy (W, B).
        reward: observed for them (W, B).
        ratio: π over the policy they were drawn from.
    """
    return policy.score_loss(actions, ratio * reward)


def regression(policy: ActionDistribution, actions: Tensor, predicted: Tensor) -> Tensor:
    """Regression-based: ``w = q̂(x, q, a)``, ``a ~ π``. Unbiased if q̂ is.

    Args:
        policy: π.
        actions: drawn from π (W, B).
        predicted: q̂ for them (W, B).
    """
    return _averaged(policy, actions, predicted)


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
    return _averaged(policy, actions, weight * reward)


def doubly_robust(
    policy: ActionDistribution,
    logged: Tensor,
    propensity: Tensor,
    residual: Tensor,
    sampled: Tensor,
    predicted: Tensor,
    clip: float,
) -> Tensor:
    """Doubly robust: :func:`importance_sampling` of ``r − q̂(x, q, a)`` plus :func:`regression` on q̂.

    Unbiased with any q̂ where the clip does not bite (Dudík, Langford, Li, 2011); "hybrid" in the released code.

    Args:
        policy: π.
        logged: prompts of the log (W, B).
        propensity: π₀ of them (W, B).
        residual: logged reward minus q̂ for the logged prompt (W, B).
        sampled: drawn from π (W, B).
        predicted: q̂ for them (W, B).
        clip: upper bound of the weight.
    """
    corrected = importance_sampling(policy, logged, propensity, residual, clip)
    return corrected + regression(policy, sampled, predicted)


def two_stage(
    policy: ActionDistribution,
    clusters: Tensor,
    propensity: Tensor,
    residual: Tensor,
    values: Tensor,
    clip: float,
) -> Tensor:
    """POTEC: importance sampling of ``r − q̂(x, q, a)`` between clusters of prompts, plus q̂'s part in closed form.

    ``w(x, c) (r − q̂(x, q, a)) ∇ log π(c) + E_{c ~ π}[v(x, c) ∇ log π(c)]`` with ``w = min(π(c) / π₀(c), clip)`` and v
    the prediction for what the second stage chooses in a cluster (Saito, Yao, Joachims, ICLR 2025, arXiv 2402.06151).
    Unbiased for any second stage where q̂ is off by the same amount for all prompts of a cluster and the clip does not
    bite.

    Args:
        policy: first stage, over clusters.
        clusters: those of the logged prompts (W, B).
        propensity: ``π₀(c | x, q) = Σ_{a ∈ c} π₀(a | x, q)`` of them (W, B).
        residual: logged reward minus q̂ for the logged prompt (W, B).
        values: v of every cluster (W, B, C).
        clip: upper bound of the weight.
    """
    corrected = importance_sampling(policy, clusters, propensity, residual, clip)
    return corrected + policy.value_loss(values / values.shape[-2])


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
    return policy.score_loss(actions, weight * reward)


def kernel_doubly_robust(
    policy: ActionDistribution,
    actions: Tensor,
    similarity: Tensor,
    density: Tensor,
    residual: Tensor,
    predicted: Tensor,
    clip: float,
    ratio: Tensor | float = 1.0,
) -> Tensor:
    """DSO, hybrid: :func:`kernel_importance_sampling` of ``r − r̂(x, q, s)`` plus ``w = r̂(x, q, s')``.

    Unbiased with any r̂ as far as :func:`kernel_importance_sampling` is.

    Args:
        policy: π.
        actions: drawn from π, or from an earlier policy (W, B).
        similarity: K(s, s') (W, B).
        density: logging marginal density at s, smoothed by the same kernel (W, B).
        residual: logged reward minus r̂ for the logged sentence (W, B).
        predicted: r̂ for s' (W, B).
        clip: upper bound of the weight.
        ratio: π over the policy the actions were drawn from.
    """
    corrected = kernel_importance_sampling(policy, actions, similarity, density, residual, clip, ratio)
    return corrected + online(policy, actions, predicted, ratio)


def cloning(policy: ActionDistribution, actions: Tensor) -> Tensor:
    """Behaviour cloning: negative mean log-likelihood of the logged prompts (W, B)."""
    return -policy.log_probability(actions).mean(-1)


def imitation(policy: ActionDistribution, target: Tensor) -> Tensor:
    """Cross-entropy to the pmf `target` (W, B, A) of another policy, ``−mean Σ_a target(a) log π(a)``."""
    return -(target * torch.log_softmax(policy.logits, -1)).sum(-1).mean(-1)


# Below it a sum of squares counts as zero: far under anything that rounds of a log give.
_TINY = 1e-30


def counterfactual_risk(
    policy: ActionDistribution,
    actions: Tensor,
    propensity: Tensor,
    reward: Tensor,
    clip: float,
    penalty: float,
    rounds: Tensor | float,
    mean: Tensor | float,
    deviation: Tensor | float,
) -> Tensor:
    """Counterfactual risk minimisation: ``mean(u) − λ √(Var(u) / n)``, ``u = min(π(a) / π₀(a), clip) r``, a logged.

    Swaminathan and Joachims (JMLR 2015). The root of a variance is no sum over rounds; it is bounded, as by them, by
    one that touches it at an earlier policy: ``√Var(u) ≤ (mean((u − mean)²) + deviation²) / (2 deviation)``. So ``w =
    1{π / π₀ < clip} (π / π₀) r (1 − λ (u − mean) / (√n deviation))``: the gradient of the objective itself where mean
    and deviation are those of the policy at hand. None of n numbers is farther than √n deviations from their mean, so
    moments that missed the rounds that matter, as with rare rewards, count for no more than that; moments without any
    variance give no penalty.

    Args:
        policy: π.
        actions: logged (W, B).
        propensity: π₀ of them (W, B).
        reward: logged (W, B).
        clip: upper bound of the ratio.
        penalty: λ.
        rounds: n, (W, 1) or one for all.
        mean: of u over the log at an earlier policy, (W, 1).
        deviation: standard deviation of u over the log at that policy, (W, 1).
    """
    ratio = policy.probability(actions) / propensity
    spread, root = torch.as_tensor(deviation), torch.as_tensor(rounds).sqrt()
    excess = (ratio.clamp_max(clip) * reward - mean) / spread.clamp_min(_TINY)
    excess = torch.where(spread > _TINY, excess.clamp(-root, root), 0.0)
    weight = (ratio < clip) * ratio * reward * (1 - penalty / root * excess)
    return -(weight * policy.log_probability(actions)).mean(-1)


def translated_importance_sampling(
    policy: ActionDistribution,
    actions: Tensor,
    propensity: Tensor,
    reward: Tensor,
    shift: Tensor | float,
    clip: float,
) -> Tensor:
    """BanditNet: ``w = min(π(a) / π₀(a), clip) (r − shift)``, a logged (Joachims, Swaminathan, de Rijke, ICLR 2018).

    The shift is the Lagrange multiplier of the constraint that the ratios have a given mean, so the maximiser over all
    shifts is that of the self-normalised estimate.

    Args:
        policy: π.
        actions: logged (W, B).
        propensity: π₀ of them (W, B).
        reward: logged (W, B).
        shift: subtracted from every reward, (W, 1) or one for all.
        clip: upper bound of the ratio.
    """
    return importance_sampling(policy, actions, propensity, reward - shift, clip)


def logarithmic_smoothing(
    policy: ActionDistribution, actions: Tensor, propensity: Tensor, reward: Tensor, smoothing: Tensor | float
) -> Tensor:
    """Logarithmic smoothing: the gradient of ``mean(log(1 + λ u) / λ)``, ``u = (π(a) / π₀(a)) r``, a logged.

    Sakhi, Aouali, Alquier, Chopin (NeurIPS 2024, arXiv 2405.14335), who take rewards ≥ 0: there it is a lower bound of
    importance sampling. For rewards of both signs it is continued as an odd function of u, so ``w = u / (1 + λ |u|)``.

    Args:
        policy: π.
        actions: logged (W, B).
        propensity: π₀ of them (W, B).
        reward: logged (W, B).
        smoothing: λ ≥ 0, (W, 1) or one for all; 0 is importance sampling.
    """
    utility = policy.probability(actions) / propensity * reward
    return -(utility / (1 + smoothing * utility.abs()) * policy.log_probability(actions)).mean(-1)


def exponential_smoothing(
    policy: ActionDistribution, actions: Tensor, propensity: Tensor, reward: Tensor, exponent: float
) -> Tensor:
    """Exponential smoothing: ``w = π(a) / π₀(a)^α · r``, a logged (Aouali et al., ICML 2023, arXiv 2305.15877).

    Args:
        policy: π.
        actions: logged (W, B).
        propensity: π₀ of them (W, B).
        reward: logged (W, B).
        exponent: α in [0, 1]; 1 is importance sampling.
    """
    return -(policy.probability(actions) / propensity**exponent * reward * policy.log_probability(actions)).mean(-1)


def optimal_baseline(
    policy: ActionDistribution, actions: Tensor, propensity: Tensor, reward: Tensor, clip: float
) -> Tensor:
    """β-IPS: ``w = min(π(a) / π₀(a), clip) (r − β)``, a logged, with the β that minimises the gradient's variance.

    ``β = E[v r] / E[v]``, ``v = ‖(π / π₀) ∇ log π(a)‖²`` (Gupta, Jeunen, Oosterhuis, de Rijke, RecSys 2024, arXiv
    2405.05736), the norm taken in the space of logits. Each round's β is estimated from the other rounds of its batch:
    a baseline that never saw the round leaves the gradient unbiased, where the clip does not bite.

    Args:
        policy: π.
        actions: logged (W, B).
        propensity: π₀ of them (W, B).
        reward: logged (W, B).
        clip: upper bound of the ratio.
    """
    chosen = policy.probability(actions)
    ratio = (chosen / propensity).clamp_max(clip)
    share = ratio.square() * (1 - 2 * chosen + policy.pmf.square().sum(-1))
    scored = share * reward
    others = share.sum(-1, keepdim=True) - share
    # Alone in its batch, or where no other round counts, a round has no baseline.
    baseline = torch.where(others > _TINY, (scored.sum(-1, keepdim=True) - scored) / others.clamp_min(_TINY), 0.0)
    return -(ratio * (reward - baseline) * policy.log_probability(actions)).mean(-1)


def weighted_log_likelihood(policy: ActionDistribution, actions: Tensor, weight: Tensor) -> Tensor:
    """Weighted log-likelihood: ``−mean(g log π(a))``, a logged; convex in the logits where every g ≥ 0.

    Args:
        policy: π.
        actions: logged (W, B).
        weight: g, which depends on the log alone (W, B).
    """
    return -(weight * policy.log_probability(actions)).mean(-1)


class _LogConvolved(torch.autograd.Function):
    """``log Σ_j share_j softmax(logits)[neighbour_j]`` given the softmax."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, pmf: Tensor, neighbours: Tensor, shares: Tensor) -> Tensor:
        parts = shares * pmf.gather(-1, neighbours)
        total = parts.sum(-1).clamp_min(torch.finfo(pmf.dtype).tiny)
        ctx.save_for_backward(pmf, neighbours, parts / total[..., None])
        return total.log()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None, None]:
        pmf, neighbours, posterior = ctx.saved_tensors
        own = slope[..., None]
        return (pmf * -own).scatter_add_(-1, neighbours, posterior * own), None, None, None


def convolved_importance_sampling(
    policy: ActionDistribution, neighbours: Tensor, shares: Tensor, propensity: Tensor, reward: Tensor, clip: float
) -> Tensor:
    """Policy Convolution: importance sampling between policies smoothed over neighbours (arXiv 2310.15433).

    ``min(π̃(a) / π̃₀(a), clip) r ∇ log π̃(a)``, a logged, ``π̃(a) = Σ_j share_j π(neighbour_j)``. Biased by what rewards
    differ among neighbours, with ratios far nearer 1.

    Args:
        policy: π.
        neighbours: prompts near the logged ones (W, B, k).
        shares: what they count, 0 for a place that is not used (W, B, k).
        propensity: π̃₀ of the logged prompts, smoothed alike (W, B).
        reward: logged (W, B).
        clip: upper bound of the ratio.
    """
    logarithm: Tensor = _LogConvolved.apply(policy.logits, policy.pmf, neighbours, shares)  # type: ignore[no-untyped-call]
    ratio = (logarithm.detach().exp() / propensity).clamp_max(clip)
    return -(ratio * reward * logarithm).mean(-1)
