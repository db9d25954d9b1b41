"""The field's surrogates against their objectives, by autograd on plain expressions and by enumeration."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from agents import gradients
from agents.gradients import ActionDistribution

RNG = np.random.default_rng(0)
CONTEXTS, PROMPTS = 2, 3
P_CONTEXT = torch.tensor([0.3, 0.7], dtype=torch.float64)
REWARD = torch.tensor(RNG.normal(size=(CONTEXTS, PROMPTS)))
LOGGING = torch.tensor(RNG.dirichlet([2, 2, 2], size=CONTEXTS))
LOGITS = torch.tensor(RNG.normal(size=(CONTEXTS, PROMPTS)))
POLICY = torch.softmax(LOGITS, -1)

# A log of nine rounds over five prompts, one world.
ROUNDS = 9
Z = torch.tensor(RNG.normal(size=(1, ROUNDS, 5)))
A = torch.tensor(RNG.integers(5, size=(1, ROUNDS)))
P0 = torch.tensor(RNG.uniform(0.05, 0.9, size=(1, ROUNDS)))
R = torch.tensor(RNG.normal(size=(1, ROUNDS)))


def gradient(value: Callable[[Tensor], Tensor], logits: Tensor = Z) -> Tensor:
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad(value(leaf).sum(), leaf)[0]


def of_surrogate(loss: Callable[[ActionDistribution], Tensor], logits: Tensor = Z) -> Tensor:
    return -gradient(lambda z: loss(ActionDistribution(z)), logits)


def ratio(z: Tensor) -> Tensor:
    return torch.softmax(z, -1).gather(-1, A[..., None])[..., 0] / P0


def cell(*values: Tensor | float) -> Tensor:
    return torch.stack([torch.as_tensor(value) for value in values]).view(1, -1)


def true_gradient(value: Tensor = REWARD) -> Tensor:
    return gradient(lambda z: (P_CONTEXT[:, None] * torch.softmax(z, -1) * value).sum(), LOGITS)


def expectation(loss: Callable[[ActionDistribution, int, int], Tensor]) -> Tensor:
    """Expected gradient over one logged round (x, a)."""
    total = torch.zeros_like(LOGITS)
    for x, a in itertools.product(range(CONTEXTS), range(PROMPTS)):
        own = of_surrogate(lambda p, x=x, a=a: loss(p, x, a), LOGITS[x].view(1, 1, -1))
        total[x] += P_CONTEXT[x] * LOGGING[x, a] * own[0, 0]
    return total


@pytest.mark.parametrize("clip", [1e9, 0.4])
def test_counterfactual_risk_is_the_gradient_of_its_objective(clip):
    penalty = 0.7

    def objective(z: Tensor) -> Tensor:
        utility = ratio(z).clamp_max(clip) * R
        return utility.mean() - penalty * utility.std(correction=0)

    utility = ratio(Z).clamp_max(clip) * R
    assert ((ratio(Z) > clip).any() and (ratio(Z) < clip).any()) or clip == 1e9
    found = of_surrogate(
        lambda p: gradients.counterfactual_risk(
            p,
            A,
            P0,
            R,
            clip,
            penalty * ROUNDS**0.5,
            ROUNDS,
            utility.mean(-1, keepdim=True),
            utility.std(-1, correction=0, keepdim=True),
        )
    )
    torch.testing.assert_close(found, gradient(objective))


def test_counterfactual_risk_is_a_bound_that_touches():
    """At other policies than the one of the moments its variance term is never too small."""
    then = ratio(Z) * R
    mean, deviation = then.mean(), then.std(correction=0)
    for scale in (0.0, 0.5, 1.0, 2.0):
        now = ratio(scale * Z) * R
        bound = ((now - mean).square().mean() + deviation**2) / (2 * deviation)
        assert bound >= now.std(correction=0) - 1e-12
        if scale == 1.0:
            torch.testing.assert_close(bound, now.std(correction=0))


@pytest.mark.parametrize(("penalty", "deviation"), [(0.0, 1.0), (3.0, 0.0)])
def test_counterfactual_risk_without_penalty_or_variance_is_importance_sampling(penalty, deviation):
    constant = torch.zeros_like(R) if deviation == 0 else R
    args = (A, P0, constant)
    found = of_surrogate(lambda p: gradients.counterfactual_risk(p, *args, 1e9, penalty, ROUNDS, 0.0, deviation))
    torch.testing.assert_close(found, of_surrogate(lambda p: gradients.importance_sampling(p, *args, 1e9)))


@pytest.mark.parametrize(("deviation", "factor"), [(0.0, 1.0), (1e-20, 1 - 0.2), (1e6, 1.0)])
def test_moments_that_missed_the_rounds_that_pay_do_not_drown_the_others(deviation, factor):
    """A round is at most √n deviations off, so that it never counts for more than ``1 ± λ`` of itself."""
    args = (A, P0, R.abs())
    found = of_surrogate(lambda p: gradients.counterfactual_risk(p, *args, 1e9, 0.2, ROUNDS, 0.0, deviation))
    plain = of_surrogate(lambda p: gradients.importance_sampling(p, *args, 1e9))
    torch.testing.assert_close(found, factor * plain, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("shift", [-3.0, 0.0, 1.5])
def test_a_translation_leaves_the_gradient_unbiased(shift):
    found = expectation(
        lambda p, x, a: gradients.translated_importance_sampling(
            p, cell(a), cell(LOGGING[x, a]), cell(REWARD[x, a]), shift, 1e9
        )
    )
    torch.testing.assert_close(found, true_gradient())


def test_logarithmic_smoothing_is_the_gradient_of_its_objective():
    reward = R.abs()
    found = of_surrogate(lambda p: gradients.logarithmic_smoothing(p, A, P0, reward, 0.3))
    torch.testing.assert_close(found, gradient(lambda z: ((1 + 0.3 * ratio(z) * reward).log() / 0.3).mean()))
    negative = of_surrogate(lambda p: gradients.logarithmic_smoothing(p, A, P0, -reward, 0.3))
    torch.testing.assert_close(negative, -found)
    plain = of_surrogate(lambda p: gradients.logarithmic_smoothing(p, A, P0, R, 0.0))
    torch.testing.assert_close(plain, of_surrogate(lambda p: gradients.importance_sampling(p, A, P0, R, 1e9)))


def test_exponential_smoothing_is_the_gradient_of_its_objective():
    found = of_surrogate(lambda p: gradients.exponential_smoothing(p, A, P0, R, 0.4))
    torch.testing.assert_close(found, gradient(lambda z: (ratio(z) * P0**0.6 * R).mean()))
    plain = of_surrogate(lambda p: gradients.exponential_smoothing(p, A, P0, R, 1.0))
    torch.testing.assert_close(plain, of_surrogate(lambda p: gradients.importance_sampling(p, A, P0, R, 1e9)))
    expected = expectation(
        lambda p, x, a: gradients.exponential_smoothing(p, cell(a), cell(LOGGING[x, a]), cell(REWARD[x, a]), 0.4)
    )
    torch.testing.assert_close(expected, true_gradient(LOGGING**0.6 * REWARD))


def test_the_optimal_baseline_leaves_the_gradient_unbiased():
    """Every batch of two rounds: each round's baseline comes from the other one."""
    total = torch.zeros_like(LOGITS)
    cells = list(itertools.product(range(CONTEXTS), range(PROMPTS)))
    for (x, a), (y, b) in itertools.product(cells, cells):
        chance = P_CONTEXT[x] * LOGGING[x, a] * P_CONTEXT[y] * LOGGING[y, b]
        own = of_surrogate(
            lambda p, x=x, a=a, y=y, b=b: gradients.optimal_baseline(
                p, cell(a, b), cell(LOGGING[x, a], LOGGING[y, b]), cell(REWARD[x, a], REWARD[y, b]), 1e9
            ),
            torch.stack([LOGITS[x], LOGITS[y]])[None],
        )
        total[x] += chance * own[0, 0]
        total[y] += chance * own[0, 1]
    torch.testing.assert_close(total, true_gradient())


def test_the_optimal_baseline_is_the_least_squares_one():
    weight = ratio(Z)
    score = torch.zeros_like(Z).scatter_(-1, A[..., None], 1.0) - torch.softmax(Z, -1)
    share = weight.square() * score.square().sum(-1)
    baseline = ((share * R).sum() - share * R) / (share.sum() - share)
    expected = (weight * (R - baseline))[..., None] * score / ROUNDS
    torch.testing.assert_close(of_surrogate(lambda p: gradients.optimal_baseline(p, A, P0, R, 1e9)), expected)


def test_the_optimal_baseline_of_a_constant_is_the_constant_and_one_round_has_none():
    flat = of_surrogate(lambda p: gradients.optimal_baseline(p, A, P0, torch.full_like(R, 7.0), 1e9))
    torch.testing.assert_close(flat, torch.zeros_like(flat))
    first = slice(0, 1)
    args = (A[:, first], P0[:, first], R[:, first])
    alone = of_surrogate(lambda p: gradients.optimal_baseline(p, *args, 1e9), Z[:, first])
    plain = of_surrogate(lambda p: gradients.importance_sampling(p, *args, 1e9), Z[:, first])
    torch.testing.assert_close(alone, plain)


def test_weighted_log_likelihood_is_largest_where_the_weighted_log_says():
    """Its gradient vanishes at ``π ∝ π₀ g``."""
    weight = REWARD.exp()
    best = (LOGGING * weight).log()
    total = torch.zeros_like(LOGITS)
    for x, a in itertools.product(range(CONTEXTS), range(PROMPTS)):
        own = of_surrogate(
            lambda p, x=x, a=a: gradients.weighted_log_likelihood(p, cell(a), cell(weight[x, a])),
            best[x].view(1, 1, -1),
        )
        total[x] += P_CONTEXT[x] * LOGGING[x, a] * own[0, 0]
    torch.testing.assert_close(total, torch.zeros_like(total))
    plain = of_surrogate(lambda p: gradients.weighted_log_likelihood(p, A, torch.ones_like(R)))
    torch.testing.assert_close(plain, of_surrogate(lambda p: gradients.cloning(p, A)))


NEAR = torch.tensor([[0, 1, 0], [1, 2, 0], [2, 0, 1]])
SHARE = torch.tensor([[0.75, 0.25, 0.0], [0.5, 0.5, 0.0], [0.5, 0.25, 0.25]], dtype=torch.float64)


def smoothed(pmf: Tensor) -> Tensor:
    return (pmf[:, NEAR] * SHARE).sum(-1)


def test_policy_convolution_expectation_is_the_gradient_of_its_value():
    logging = smoothed(LOGGING)
    found = expectation(
        lambda p, x, a: gradients.convolved_importance_sampling(
            p, NEAR[a].view(1, 1, -1), SHARE[a].view(1, 1, -1), cell(logging[x, a]), cell(REWARD[x, a]), 1e9
        )
    )
    expected = gradient(
        lambda z: (P_CONTEXT[:, None] * LOGGING * smoothed(torch.softmax(z, -1)) / logging * REWARD).sum(), LOGITS
    )
    torch.testing.assert_close(found, expected)


def test_policy_convolution_of_one_prompt_is_importance_sampling_and_of_all_says_nothing():
    one = of_surrogate(
        lambda p: gradients.convolved_importance_sampling(p, A[..., None], torch.ones(1, ROUNDS, 1), P0, R, 0.4)
    )
    torch.testing.assert_close(one, of_surrogate(lambda p: gradients.importance_sampling(p, A, P0, R, 0.4)))
    everything = torch.arange(5).expand(1, ROUNDS, 5)
    shares = torch.full((1, ROUNDS, 5), 0.2, dtype=torch.float64)
    flat = of_surrogate(
        lambda p: gradients.convolved_importance_sampling(p, everything, shares, torch.full_like(P0, 0.2), R, 1e9)
    )
    torch.testing.assert_close(flat, torch.zeros_like(flat))


def test_no_weight_no_gradient_and_no_nan():
    impossible = torch.tensor([[[0.0, -1e4]]])
    action, one = torch.tensor([[1]]), torch.ones(1, 1)
    for loss in (
        lambda p: gradients.counterfactual_risk(p, action, one, one, 200.0, 1.0, 1.0, 0.0, 0.0),
        lambda p: gradients.translated_importance_sampling(p, action, one, one, 0.5, 200.0),
        lambda p: gradients.logarithmic_smoothing(p, action, one, one, 0.1),
        lambda p: gradients.exponential_smoothing(p, action, one, one, 0.5),
        lambda p: gradients.optimal_baseline(p, action, one, one, 200.0),
        lambda p: gradients.convolved_importance_sampling(p, action[..., None], one[..., None], one, one, 200.0),
    ):
        torch.testing.assert_close(of_surrogate(loss, impossible), torch.zeros_like(impossible))
