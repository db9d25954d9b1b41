"""Derivatives of score losses that are written down, against autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from agents import gradients
from agents.distributions import ActionDistribution, by_scores
from agents.training import differentiate

W, B, A = 3, 7, 11
GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def prompts() -> Tensor:
    return torch.randint(A, (W, B), generator=GENERATOR)


@dataclass(frozen=True)
class Rounds:
    inputs: Tensor
    logged: Tensor
    sampled: Tensor
    positive: Tensor
    reward: Tensor
    predicted: Tensor
    values: Tensor


ROUNDS = Rounds(normal(W, B, 2), prompts(), prompts(), normal(W, B).exp(), normal(W, B), normal(W, B), normal(W, B, A))
SURROGATES: dict[str, Callable[[ActionDistribution, Rounds], Tensor]] = {
    "online": lambda p, b: gradients.online(p, b.sampled, b.reward, b.positive),
    "regression": lambda p, b: gradients.regression(p, b.sampled, b.predicted),
    "importance sampling": lambda p, b: gradients.importance_sampling(p, b.logged, b.positive / A, b.reward, 1.5),
    "doubly robust": lambda p, b: gradients.doubly_robust(
        p, b.logged, b.positive / A, b.reward, b.sampled, b.predicted, 1.5
    ),
    "doubly robust, where both prompts are one": lambda p, b: gradients.doubly_robust(
        p, b.logged, b.positive / A, b.reward, b.logged, b.predicted, 1.5
    ),
    "kernel": lambda p, b: gradients.kernel_importance_sampling(
        p, b.sampled, b.positive, b.positive.flip(0), b.reward, 1.5, p.probability(b.sampled) * A
    ),
    "kernel doubly robust": lambda p, b: gradients.kernel_doubly_robust(
        p, b.sampled, b.positive, b.positive.flip(0), b.reward, b.predicted, 1.5
    ),
    "two stages": lambda p, b: gradients.two_stage(p, b.logged, b.positive / A, b.reward, b.values, 1.5),
    "translated": lambda p, b: gradients.translated_importance_sampling(
        p, b.logged, b.positive / A, b.reward, 0.3, 1.5
    ),
}


@pytest.mark.parametrize("surrogate", SURROGATES.values(), ids=SURROGATES)
def test_derivatives_by_scores_are_those_of_autograd(surrogate):
    logits = normal(W, B, A)
    before = logits.clone()
    by_autograd = differentiate(lambda z, batch: surrogate(ActionDistribution(z), batch))(logits, ROUNDS)
    found = by_scores(surrogate)(logits, ROUNDS)
    for name, expected, own in zip(("losses", "slope"), by_autograd, found, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12, msg=name)
    assert torch.equal(logits, before)


def test_what_is_no_score_loss_is_refused_rather_than_left_out():
    with pytest.raises(TypeError, match="score and value losses only"):
        by_scores(lambda p, b: gradients.cloning(p, b.logged))(normal(W, B, A), ROUNDS)
