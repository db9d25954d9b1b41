"""Kernels and densities against closed forms: with Gaussian outputs the blurred kernel's expectation is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import agents
import offprompts_env as op
from agents.kernels import blurred, draw_actions
from offprompts_env.errors import ConfigError, DataError
from offprompts_env.simulator import Simulator
from offprompts_env.synthetic import SyntheticConfig
from offprompts_env.types import FloatArray, LoggedDataset


def closed_form(kernel: agents.GaussianKernel, simulator: Simulator, log: LoggedDataset) -> FloatArray:
    """Density of uniform prompts: a Gaussian kernel of width τ d blurred by variance v has width √(τ²d² + v)."""
    generator, d = simulator.outputs, log.output.shape[1]
    width = (kernel.tau * d) ** 2
    variance = float(generator.noise_std[0]) ** 2 + 2 * kernel.output_noise**2
    means = generator.base(log.contexts)[:, None] + generator.effects
    squared = np.square(log.output[:, None] - means).sum(-1)
    peak = (1 + variance / width) ** (-d / 2) / (math.sqrt(2 * math.pi) * kernel.tau)
    return (peak * np.exp(-0.5 * squared / (width + variance))).mean(1)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_kernels_integrate_to_one_in_one_dimension(tau):
    line = torch.linspace(-40, 40, 400_001, dtype=torch.float64)[:, None]
    for kernel in (agents.GaussianKernel(tau), agents.UniformKernel(tau)):
        assert torch.trapezoid(kernel(line), line[:, 0]).item() == pytest.approx(1, abs=1e-4)


def test_distances_are_divided_by_the_dimension():
    difference = torch.tensor([[3.0, 4.0]])
    assert agents.GaussianKernel(2.0)(difference).item() == pytest.approx(
        math.exp(-(2.5**2) / 8) / (2 * math.sqrt(2 * math.pi))
    )
    assert agents.UniformKernel(1.0)(difference).item() == pytest.approx(1 / 6)
    assert agents.UniformKernel(0.8)(difference).item() == 0


def test_blur_adds_the_noise_of_both_sentences():
    kernel = agents.GaussianKernel(1.0, output_noise=0.7)
    noise = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = blurred(kernel, torch.full((1, 1), 0.4), torch.zeros(1, 1), noise).mean().item()
    variance = 1 + 2 * 0.7**2
    assert found == pytest.approx(math.exp(-0.5 * 0.4**2 / variance) / math.sqrt(2 * math.pi * variance), rel=5e-3)


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_monte_carlo_density_is_unbiased(tau, simulator, log):
    kernel, part = agents.GaussianKernel(tau), log.take(slice(300))
    truth = closed_form(kernel, simulator, part)
    (density,) = agents.MonteCarloDensity(400).fit_many(
        [part], kernel=kernel, generators=[simulator.outputs], logging_policies=[agents.UniformPolicy(12)]
    )
    # The kernel is at most its peak, so one draw's variance is at most mean · peak.
    error = np.sqrt(truth * float(kernel(torch.zeros(1, 5))) / 400)
    z = (density - truth) / error
    assert np.abs(z).max() < 5
    assert abs(z.mean()) < 5 / math.sqrt(len(z))


def test_network_density_learns_the_closed_form():
    # One dimension each, so that the network's own error is small.
    simulator = SyntheticConfig(n_prompts=4, context_dim=1, query_dim=1, prompt_dim=1, output_dim=1, seed=1).build()
    kernel, policy = agents.GaussianKernel(1.0, output_noise=0.5), agents.UniformPolicy(4)
    log = op.collect(simulator, policy, 2_000)
    truth = closed_form(kernel, simulator, log)
    for budget in (None, 20_000):
        (found,) = agents.NetworkDensity(steps=4_000, learning_rate=3e-3, max_sentences=budget).fit_many(
            [log], kernel=kernel, generators=[simulator.outputs], logging_policies=[policy]
        )
        assert np.corrcoef(found, truth)[0, 1] > 0.95
        assert found.mean() == pytest.approx(truth.mean(), rel=0.05)


def test_actions_are_drawn_from_the_pmf(simulator, log):
    policy = agents.SoftmaxPolicy(lambda contexts: contexts.context @ np.ones((5, 12)) * np.arange(12), 12, beta=0.1)
    rows = np.repeat([3, 0, 7, 3], 20_000)
    actions = draw_actions(policy, log.contexts, rows, np.random.default_rng(0))
    pmf = policy.probabilities(log.contexts.take(slice(8)))
    for row, count in ((3, 40_000), (0, 20_000), (7, 20_000)):
        found = np.bincount(actions[rows == row], minlength=12) / count
        assert np.abs(found - pmf[row]).max() < 5 * 0.5 / math.sqrt(count)


def test_wrong_input(simulator, log):
    arguments = {"kernel": agents.GaussianKernel(), "generators": [], "logging_policies": []}
    with pytest.raises(ConfigError, match="generators: expected 1"):
        agents.NetworkDensity(steps=1).fit_many([log], **arguments)
    with pytest.raises(ConfigError, match="n_samples"):
        agents.MonteCarloDensity(0)
    with pytest.raises(DataError, match="one value a round"):
        agents.KnownDensity((np.ones(3),)).fit_many([log], **arguments)
