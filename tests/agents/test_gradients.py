"""Surrogates against the true policy gradient, by enumerating every draw of a tiny discrete world."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from agents import gradients
from agents.gradients import ActionDistribution, invert
from agents.kernels import DensityBatch, density_error, density_error_gradient
from agents.regression import (
    ContrastBatch,
    RegressionBatch,
    pessimistic_error,
    pessimistic_error_gradient,
    squared_error,
    squared_error_gradient,
)
from agents.training import differentiate

# Two contexts, three prompts, two sentences: everything below is exact.
CONTEXTS, PROMPTS, SENTENCES = 2, 3, 2
RNG = np.random.default_rng(0)
P_CONTEXT = torch.tensor([0.3, 0.7], dtype=torch.float64)
P_SENTENCE = torch.tensor(RNG.dirichlet([1, 1], size=(CONTEXTS, PROMPTS)))  # p(s | x, a)
REWARD = torch.tensor(RNG.normal(size=(CONTEXTS, SENTENCES)))  # r(x, s)
MEAN = (P_SENTENCE * REWARD[:, None]).sum(-1)  # E[r | x, a]
LOGGING = torch.tensor(RNG.dirichlet([2, 2, 2], size=CONTEXTS))
LOGITS = torch.tensor(RNG.normal(size=(CONTEXTS, PROMPTS)))


def true_gradient() -> Tensor:
    logits = LOGITS.clone().requires_grad_()
    value = (P_CONTEXT[:, None] * torch.softmax(logits, -1) * MEAN).sum()
    return torch.autograd.grad(value, logits)[0]


def surrogate_gradient(x: int, loss: object) -> Tensor:
    """Gradient of a one-round surrogate in context x with respect to all logits."""
    logits = LOGITS.clone().requires_grad_()
    value = loss(ActionDistribution(logits[x].view(1, 1, -1)))  # type: ignore[operator]
    return torch.autograd.grad(value.sum(), logits)[0]


def cell(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value).view(1, 1)


POLICY = torch.softmax(LOGITS, -1)


def test_online_expectation_is_the_policy_gradient():
    total = torch.zeros_like(LOGITS)
    for x, a, s in itertools.product(range(CONTEXTS), range(PROMPTS), range(SENTENCES)):
        chance = P_CONTEXT[x] * POLICY[x, a] * P_SENTENCE[x, a, s]
        total -= chance * surrogate_gradient(
            x, lambda p, x=x, a=a, s=s: gradients.online(p, cell(a), cell(REWARD[x, s]))
        )
    torch.testing.assert_close(total, true_gradient())


def test_online_with_an_earlier_policy_is_corrected_by_the_ratio():
    total = torch.zeros_like(LOGITS)
    for x, a in itertools.product(range(CONTEXTS), range(PROMPTS)):
        ratio = cell(POLICY[x, a] / LOGGING[x, a])
        chance = P_CONTEXT[x] * LOGGING[x, a]
        total -= chance * surrogate_gradient(
            x, lambda p, x=x, a=a, ratio=ratio: gradients.online(p, cell(a), cell(MEAN[x, a]), ratio)
        )
    torch.testing.assert_close(total, true_gradient())


def test_regression_expectation_is_the_policy_gradient_of_a_true_model():
    total = torch.zeros_like(LOGITS)
    for x, a in itertools.product(range(CONTEXTS), range(PROMPTS)):
        chance = P_CONTEXT[x] * POLICY[x, a]
        total -= chance * surrogate_gradient(x, lambda p, x=x, a=a: gradients.regression(p, cell(a), cell(MEAN[x, a])))
    torch.testing.assert_close(total, true_gradient())


def test_importance_sampling_expectation_is_the_policy_gradient():
    total = torch.zeros_like(LOGITS)
    for x, a, s in itertools.product(range(CONTEXTS), range(PROMPTS), range(SENTENCES)):
        chance = P_CONTEXT[x] * LOGGING[x, a] * P_SENTENCE[x, a, s]
        total -= chance * surrogate_gradient(
            x,
            lambda p, x=x, a=a, s=s: gradients.importance_sampling(
                p, cell(a), cell(LOGGING[x, a]), cell(REWARD[x, s]), clip=1e9
            ),
        )
    torch.testing.assert_close(total, true_gradient())


PREDICTED = torch.tensor(RNG.normal(size=(CONTEXTS, PROMPTS)))  # q̂(x, a), any


def test_doubly_robust_expectation_is_the_policy_gradient_with_any_model():
    total = torch.zeros_like(LOGITS)
    rounds = itertools.product(range(CONTEXTS), range(PROMPTS), range(SENTENCES), range(PROMPTS))
    for x, a, s, sampled in rounds:
        chance = P_CONTEXT[x] * LOGGING[x, a] * P_SENTENCE[x, a, s] * POLICY[x, sampled]
        total -= chance * surrogate_gradient(
            x,
            lambda p, x=x, a=a, s=s, sampled=sampled: gradients.doubly_robust(
                p,
                cell(a),
                cell(LOGGING[x, a]),
                cell(REWARD[x, s] - PREDICTED[x, a]),
                cell(sampled),
                cell(PREDICTED[x, sampled]),
                clip=1e9,
            ),
        )
    torch.testing.assert_close(total, true_gradient())


def test_doubly_robust_has_no_noise_from_the_log_under_a_true_model_of_a_noiseless_reward():
    zero = cell(0.0)
    for a, sampled in itertools.product(range(PROMPTS), range(PROMPTS)):
        found = surrogate_gradient(
            0,
            lambda p, a=a, sampled=sampled: gradients.doubly_robust(
                p, cell(a), cell(LOGGING[0, a]), zero, cell(sampled), cell(MEAN[0, sampled]), clip=200.0
            ),
        )
        plain = surrogate_gradient(0, lambda p, b=sampled: gradients.regression(p, cell(b), cell(MEAN[0, b])))
        torch.testing.assert_close(found, plain)


CLUSTERS = torch.tensor([0, 1, 0])  # of the three prompts


@pytest.mark.parametrize("second", ["greedy", "stochastic"])
def test_two_stage_expectation_is_the_first_stages_policy_gradient(second):
    """With q̂ off by the same amount for all prompts of a cluster, whatever the second stage."""
    offset = torch.tensor(RNG.normal(size=(CONTEXTS, 2)))
    predicted = MEAN + offset[:, CLUSTERS]
    chosen = torch.zeros(CONTEXTS, 2, PROMPTS, dtype=torch.float64)  # π(a | x, c)
    for x, c in itertools.product(range(CONTEXTS), range(2)):
        members = torch.nonzero(c == CLUSTERS)[:, 0]
        if second == "greedy":
            chosen[x, c, members[predicted[x, members].argmax()]] = 1
        else:
            chosen[x, c, members] = torch.softmax(predicted[x, members], -1)
    logits = LOGITS[:, :2].clone().requires_grad_()
    value = torch.einsum("x,xc,xca,xa->", P_CONTEXT, torch.softmax(logits, -1), chosen, MEAN)
    truth = torch.autograd.grad(value, logits)[0]
    values = torch.einsum("xca,xa->xc", chosen, predicted)
    marginal = torch.stack([LOGGING[:, c == CLUSTERS].sum(-1) for c in range(2)], -1)
    total = torch.zeros_like(truth)
    for x, a, s in itertools.product(range(CONTEXTS), range(PROMPTS), range(SENTENCES)):
        c = int(CLUSTERS[a])
        policy = LOGITS[:, :2].clone().requires_grad_()
        loss = gradients.two_stage(
            ActionDistribution(policy[x].view(1, 1, -1)),
            cell(c),
            cell(marginal[x, c]),
            cell(REWARD[x, s] - predicted[x, a]),
            values[x].view(1, 1, -1),
            clip=1e9,
        )
        chance = P_CONTEXT[x] * LOGGING[x, a] * P_SENTENCE[x, a, s]
        total -= chance * torch.autograd.grad(loss.sum(), policy)[0]
    torch.testing.assert_close(total, truth)


@pytest.mark.parametrize("stale", [False, True])
def test_kernel_importance_sampling_expectation_is_the_policy_gradient(stale):
    """The kernel 1{s = s'} blurs nothing, so DSO estimates the true gradient; also with prompts of another policy."""
    density = torch.einsum("xa,xas->xs", LOGGING, P_SENTENCE)
    proposal = torch.tensor(RNG.dirichlet([3, 3, 3], size=CONTEXTS)) if stale else POLICY
    total = torch.zeros_like(LOGITS)
    for x, s, a, drawn in itertools.product(range(CONTEXTS), range(SENTENCES), range(PROMPTS), range(SENTENCES)):
        chance = P_CONTEXT[x] * density[x, s] * proposal[x, a] * P_SENTENCE[x, a, drawn]
        total -= chance * surrogate_gradient(
            x,
            lambda p, x=x, s=s, a=a, drawn=drawn: gradients.kernel_importance_sampling(
                p,
                cell(a),
                cell(float(s == drawn)),
                cell(density[x, s]),
                cell(REWARD[x, s]),
                clip=1e9,
                ratio=cell(POLICY[x, a] / proposal[x, a]),
            ),
        )
    torch.testing.assert_close(total, true_gradient())


@pytest.mark.parametrize("stale", [False, True])
def test_kernel_doubly_robust_expectation_is_the_policy_gradient_with_any_model(stale):
    density = torch.einsum("xa,xas->xs", LOGGING, P_SENTENCE)
    proposal = torch.tensor(RNG.dirichlet([3, 3, 3], size=CONTEXTS)) if stale else POLICY
    predicted = torch.tensor(RNG.normal(size=(CONTEXTS, SENTENCES)))  # r̂(x, s), any
    total = torch.zeros_like(LOGITS)
    for x, s, a, drawn in itertools.product(range(CONTEXTS), range(SENTENCES), range(PROMPTS), range(SENTENCES)):
        chance = P_CONTEXT[x] * density[x, s] * proposal[x, a] * P_SENTENCE[x, a, drawn]
        total -= chance * surrogate_gradient(
            x,
            lambda p, x=x, s=s, a=a, drawn=drawn: gradients.kernel_doubly_robust(
                p,
                cell(a),
                cell(float(s == drawn)),
                cell(density[x, s]),
                cell(REWARD[x, s] - predicted[x, s]),
                cell(predicted[x, drawn]),
                clip=1e9,
                ratio=cell(POLICY[x, a] / proposal[x, a]),
            ),
        )
    torch.testing.assert_close(total, true_gradient())


def test_cloning_expectation_is_the_difference_of_the_policies():
    total = torch.zeros_like(LOGITS)
    for x, a in itertools.product(range(CONTEXTS), range(PROMPTS)):
        total += P_CONTEXT[x] * LOGGING[x, a] * surrogate_gradient(x, lambda p, a=a: gradients.cloning(p, cell(a)))
    torch.testing.assert_close(total, P_CONTEXT[:, None] * (POLICY - LOGGING))


def test_imitation_is_the_expectation_of_cloning():
    for x in range(CONTEXTS):
        found = surrogate_gradient(x, lambda p, x=x: gradients.imitation(p, LOGGING[x].view(1, 1, -1)))
        torch.testing.assert_close(found[x], POLICY[x] - LOGGING[x])
        assert (found[1 - x] == 0).all()


def test_weights_are_clipped():
    args = (cell(1), cell(1e-6), cell(2.0))
    clipped = surrogate_gradient(0, lambda p: gradients.importance_sampling(p, *args, clip=200.0))
    plain = surrogate_gradient(0, lambda p: -200.0 * 2.0 * p.log_probability(cell(1)))
    torch.testing.assert_close(clipped, plain)


def test_sums_and_means_over_the_batch():
    logits, actions = torch.randn(1, 8, 4), torch.randint(4, (1, 8))
    policy, ones = ActionDistribution(logits), torch.ones(1, 8)
    log_likelihood = torch.log_softmax(logits, -1).gather(-1, actions[..., None]).sum()
    torch.testing.assert_close(gradients.online(policy, actions, ones)[0], -log_likelihood)
    torch.testing.assert_close(gradients.regression(policy, actions, ones)[0], -log_likelihood / 8)


def test_log_probability_gradient_by_finite_differences():
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    actions = torch.randint(5, (2, 3))
    assert torch.autograd.gradcheck(lambda z: ActionDistribution(z).log_probability(actions), (logits,))


def test_log_probability_of_an_impossible_prompt_is_finite():
    policy = ActionDistribution(torch.tensor([[[0.0, -1e4]]]))
    assert torch.isfinite(policy.log_probability(torch.tensor([[1]]))).all()


def test_inversion_covers_the_catalogue_exactly():
    pmf = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0]).expand(1, 1000, 6)
    drawn = invert(pmf, torch.arange(1000).view(1, 1000) / 1000)
    assert torch.bincount(drawn[0], minlength=6).tolist() == [0, 250, 0, 500, 250, 0]
    assert invert(pmf[:, :1], torch.tensor([[1 - 2**-24]])).item() == 4


@pytest.mark.parametrize("prompts", [7, 511, 512, 1000, 1009])
def test_inversion_draws_the_prompt_whose_interval_holds_the_uniform(prompts):
    """Also where most prompts are impossible, for uniforms at both ends and all the numbers between."""
    rng = np.random.default_rng(prompts)
    weights = rng.random((3, 50, prompts)) ** 8 * (rng.random((3, 50, prompts)) < 0.1)
    weights[..., prompts // 2] += 1e-3
    pmf = torch.from_numpy(weights / weights.sum(-1, keepdims=True)).float()
    uniforms = torch.from_numpy(rng.random((3, 50), dtype=np.float32))
    uniforms[0, 0], uniforms[0, 1], uniforms[1] = 0.0, 1 - 2**-24, 1 - 2**-24
    drawn = invert(pmf, uniforms)[..., None]
    upper = pmf.double().cumsum(-1).gather(-1, drawn)[..., 0]
    chance = pmf.gather(-1, drawn)[..., 0]
    assert (chance > 0).all()
    assert (uniforms < upper + 1e-6).all()
    assert (uniforms > upper - chance - 1e-6).all()


def test_inversion_of_nan_stays_within_the_catalogue():
    drawn = invert(torch.full((2, 3, 1000), torch.nan), torch.rand(2, 3))
    assert ((drawn >= 0) & (drawn < 1000)).all()


def test_pessimistic_gradient_by_hand_is_that_of_autograd():
    outputs, batch = torch.randn(3, 14, 1), ContrastBatch(torch.empty(0), torch.randn(3, 7, 1))
    surrogate, by_hand = (partial(f, pessimism=0.3) for f in (pessimistic_error, pessimistic_error_gradient))
    for expected, found in zip(differentiate(surrogate)(outputs, batch), by_hand(outputs, batch), strict=True):
        torch.testing.assert_close(found, expected)
    plain = squared_error(outputs[:, :7], RegressionBatch(torch.empty(0), batch.target))
    excess = (outputs[:, 7:] - outputs[:, :7]).mean((1, 2))
    torch.testing.assert_close(pessimistic_error(outputs, batch, 0.3), plain + 0.3 * excess)


@pytest.mark.parametrize(
    ("surrogate", "by_hand", "batch"),
    [
        (squared_error, squared_error_gradient, RegressionBatch(torch.empty(0), torch.randn(3, 7, 1))),
        (density_error, density_error_gradient, DensityBatch(torch.empty(0), torch.rand(3, 7, 1))),
    ],
)
def test_gradients_by_hand_are_those_of_autograd(surrogate, by_hand, batch):
    outputs = torch.randn(3, 7, 1)
    for expected, found in zip(differentiate(surrogate)(outputs, batch), by_hand(outputs, batch), strict=True):
        torch.testing.assert_close(found, expected)
