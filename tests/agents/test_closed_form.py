"""Kernel weights without sampling against sampling, quadrature and enumeration."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import agents
from agents.closed_form import expected_similarity, kernel_weights
from agents.kernels import blurred
from agents.sentences import KnownSentences
from offprompts_env.errors import DataError, NumericalError
from offprompts_env.types import Contexts


class Fixed:
    """Sentences around the same means in every round."""

    def __init__(self, means, noise_std):
        self.table = np.asarray(means, dtype=np.float32)
        self.n_prompts, self.output_dim = self.table.shape
        self.noise_std = np.asarray(noise_std, dtype=np.float32)

    def means(self, contexts):
        return np.broadcast_to(self.table, (len(contexts), *self.table.shape))


class Same:
    """The same pmf in every round."""

    def __init__(self, pmf):
        self.pmf = np.asarray(pmf, dtype=np.float64)
        self.n_prompts = len(self.pmf)

    def probabilities(self, contexts):
        return np.tile(self.pmf, (len(contexts), 1))


def rounds(n: int) -> Contexts:
    return Contexts(np.zeros((n, 1)), np.zeros((n, 1)))


@pytest.mark.parametrize("output_noise", [0.0, 0.8])
@pytest.mark.parametrize("tau", [0.4, 1.5])
def test_expected_similarity_is_the_mean_of_sampled_ones(tau, output_noise):
    rng = np.random.default_rng(0)
    kernel = agents.GaussianKernel(tau, output_noise)
    logged, means = rng.normal(size=(2, 3)).astype(np.float32), rng.normal(size=(2, 2, 3)).astype(np.float32)
    noise_std = np.array([0.5, 1.0, 0.0], dtype=np.float32)
    n = 100_000
    drawn = torch.from_numpy(means[:, :, None] + noise_std * rng.standard_normal((n, 3), dtype=np.float32))
    blur = torch.from_numpy(rng.standard_normal((n, 3), dtype=np.float32))
    sampled = blurred(kernel, torch.from_numpy(logged)[:, None, None], drawn, blur).double()
    error = sampled.std(-1).numpy() / math.sqrt(n)
    found = expected_similarity(kernel, logged, means, noise_std)
    assert found.shape == (2, 2)
    assert (np.abs(found - sampled.mean(-1).numpy()) < 4.5 * error).all()


def test_expected_similarity_is_the_integral_in_one_dimension():
    kernel, noise = agents.GaussianKernel(0.7, output_noise=0.3), 0.9
    logged, means = np.array([[0.2], [-1.0]], np.float32), np.array([[[0.0], [2.0]], [[0.5], [-3.0]]], np.float32)
    line = np.linspace(-15, 15, 30_001)
    # The sum of the three noises is one normal variate.
    spread = math.sqrt(noise**2 + 2 * 0.3**2)
    density = np.exp(-0.5 * (line / spread) ** 2) / (math.sqrt(2 * math.pi) * spread)
    expected = np.empty((2, 2))
    for i in range(2):
        for a in range(2):
            similarity = kernel(torch.from_numpy(logged[i, 0] - means[i, a, 0] - line)[:, None]).numpy()
            expected[i, a] = np.trapezoid(similarity * density, line)
    np.testing.assert_allclose(
        expected_similarity(kernel, logged, means, np.array([noise], np.float32)), expected, rtol=1e-5
    )


def test_without_any_noise_it_is_the_kernel():
    rng = np.random.default_rng(0)
    kernel = agents.GaussianKernel(0.6, output_noise=0.0)
    logged, means = rng.normal(size=(3, 4)).astype(np.float32), rng.normal(size=(3, 5, 4)).astype(np.float32)
    found = expected_similarity(kernel, logged, means, np.zeros(4, np.float32))
    expected = kernel(torch.from_numpy(logged[:, None] - means)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_means_far_from_the_origin_do_not_lose_digits_that_matter():
    kernel = agents.GaussianKernel(1.0)
    offset = np.float32(100)
    logged, means = np.array([[0.5, 0.0]], np.float32), np.array([[[0.0, 0.0], [1.0, -2.0]]], np.float32)
    near, far = (
        expected_similarity(kernel, logged + shift, means + shift, np.ones(2, np.float32)) for shift in (0, offset)
    )
    np.testing.assert_allclose(far, near, rtol=1e-5)


def test_weights_average_to_one_under_the_logging_policy(simulator, log):
    sentences, part = KnownSentences(simulator.outputs), log.take(slice(200))
    for policy in (agents.UniformPolicy(12), Same(np.arange(12) / 66)):
        for tau in (0.3, 1.0, 5.0):
            weights = kernel_weights(agents.GaussianKernel(tau), part.output, part.contexts, sentences, policy)
            mean = (policy.probabilities(part.contexts) * weights).sum(axis=1)
            np.testing.assert_allclose(mean, 1, rtol=1e-5)
    # A kernel that is far wider than all sentences cannot tell prompts apart.
    wide = kernel_weights(agents.GaussianKernel(1e4), part.output, part.contexts, sentences, agents.UniformPolicy(12))
    np.testing.assert_allclose(wide, 1, rtol=1e-3)


def test_weights_in_closed_form():
    kernel, sentences = agents.GaussianKernel(0.5), Fixed([[0.0], [1.0], [3.0]], [0.7])
    logged, pmf = np.array([[0.4], [2.0]], np.float32), np.array([0.5, 0.25, 0.25])
    similarity = expected_similarity(kernel, logged, sentences.means(rounds(2)), sentences.noise_std)
    np.testing.assert_allclose(
        kernel_weights(kernel, logged, rounds(2), sentences, Same(pmf)),
        similarity / (similarity @ pmf)[:, None],
        rtol=1e-5,
    )


def test_one_prompt_has_weight_one():
    weights = kernel_weights(
        agents.GaussianKernel(0.5), np.array([[2.0]], np.float32), rounds(1), Fixed([[0.0]], [1.0]), Same([1.0])
    )
    np.testing.assert_allclose(weights, 1)


def test_prompts_that_were_never_logged_have_weights_of_their_neighbours():
    """Deficient support: the weight is that of what the sentence is like."""
    sentences = Fixed([[0.0], [0.1], [6.0]], [0.5])
    weights = kernel_weights(
        agents.GaussianKernel(0.5), np.array([[0.0]], np.float32), rounds(1), sentences, Same([1.0, 0.0, 0.0])
    )
    assert weights[0, 0] == pytest.approx(1)
    assert weights[0, 1] == pytest.approx(1, abs=0.01)
    assert weights[0, 2] < 1e-3


@pytest.mark.parametrize(
    ("logged", "means", "pmf", "error", "words"),
    [
        ([[0.0]], [[0.0], [np.nan]], [0.5, 0.5], NumericalError, "finite means of all prompts, got NaN"),
        ([[0.0], [1e3]], [[0.0], [1.0]], [0.5, 0.5], NumericalError, "row 1 is so far from those of all prompts"),
        ([[0.0]], [[1e3], [0.0]], [1.0, 0.0], NumericalError, "wider kernel than tau=1"),
        ([[0.0]], [[0.0], [1.0]], [np.nan, 0.5], NumericalError, "check the policy"),
        ([[0.0]], [[0.0], [1.0]], [0.7, 0.5], DataError, "sum to 1"),
        ([[0.0]], [[0.0], [1.0]], [1.0], DataError, "expected shape"),
    ],
)
def test_wrong_input(logged, means, pmf, error, words):
    logged = np.asarray(logged, np.float32)
    with pytest.raises(error) as caught:
        kernel_weights(agents.GaussianKernel(1.0), logged, rounds(len(logged)), Fixed(means, [1.0]), Same(pmf))
    assert words in str(caught.value)
