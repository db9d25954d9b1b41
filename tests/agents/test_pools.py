"""Gradients with exact expectations over prompts, by finite differences and against the sampled method."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import agents
from agents import pools
from agents.gradients import ActionDistribution, kernel_importance_sampling
from agents.kernels import blurred
from agents.networks import StackedMLP
from agents.pools import GainBatch, GainFeed, expected_gain, expected_gain_gradient
from agents.training import BLOCK, StackedLogs, differentiate
from agents.worlds import Worlds
from offprompts_env.synthetic import AdditiveOutputs
from offprompts_env.types import LoggedDataset, PromptSet

RNG = np.random.default_rng(0)
W, B, A = 2, 3, 4


def batch(prior: bool = False) -> GainBatch:
    gains = torch.from_numpy(np.random.default_rng(1).normal(size=(W, B, A)))
    shift = torch.from_numpy(np.random.default_rng(2).normal(size=(W, B, A)))
    return GainBatch(torch.zeros(W, B, 1), gains, shift) if prior else GainBatch(torch.zeros(W, B, 1), gains)


LOGITS = torch.from_numpy(RNG.normal(size=(W, B, A)))


@pytest.mark.parametrize("prior", [False, True])
def test_expected_gain_is_the_mean_over_prompts(prior):
    own = batch(prior)
    pmf = np.exp((LOGITS + own.prior).numpy())
    pmf /= pmf.sum(axis=-1, keepdims=True)
    expected = -(pmf * own.gains.numpy()).sum(axis=-1).mean(axis=-1)
    np.testing.assert_allclose(expected_gain(LOGITS, own), expected)
    np.testing.assert_allclose(expected_gain_gradient(LOGITS, own)[0], expected)


@pytest.mark.parametrize("prior", [False, True])
def test_the_gradient_by_hand_is_that_of_autograd_and_of_finite_differences(prior):
    own = batch(prior)
    _, slope = expected_gain_gradient(LOGITS, own)
    torch.testing.assert_close(slope, differentiate(expected_gain)(LOGITS, own)[1])
    step = 1e-6
    for index in np.ndindex(W, B, A):
        moved = [LOGITS.clone(), LOGITS.clone()]
        for logits, sign in zip(moved, (1, -1), strict=True):
            logits[index] += sign * step
        losses = [expected_gain(logits, own).sum().item() for logits in moved]
        assert slope[index].item() == pytest.approx((losses[0] - losses[1]) / (2 * step), abs=1e-8)


def test_equal_gains_and_one_prompt_move_nothing():
    flat = GainBatch(torch.zeros(W, B, 1), torch.full((W, B, A), 3.0, dtype=torch.float64))
    torch.testing.assert_close(expected_gain_gradient(LOGITS, flat)[1], torch.zeros_like(LOGITS))
    one = GainBatch(torch.zeros(W, B, 1), torch.rand(W, B, 1))
    loss, slope = expected_gain_gradient(torch.rand(W, B, 1), one)
    assert (slope == 0).all()
    torch.testing.assert_close(loss, -one.gains.mean((1, 2)))


def small_world(n: int = 6) -> tuple[LoggedDataset, AdditiveOutputs]:
    """A log of one-dimensional sentences of three prompts, and its generator."""
    prompts = PromptSet(np.array([[0.0], [1.0], [2.0]]))
    generator = AdditiveOutputs(prompts, np.array([[0.5]]), np.array([[-1.0], [0.3], [1.5]]), 0.6)
    rng = np.random.default_rng(3)
    log = LoggedDataset(
        context=rng.normal(size=(n, 1)),
        query=rng.normal(size=(n, 1)),
        action=rng.integers(3, size=n),
        propensity=np.full(n, 1 / 3),
        reward=rng.normal(size=n),
        output=rng.normal(size=(n, 1)),
        prompts=prompts,
    )
    return log, generator


class Uneven:
    """Pmfs that depend on the round."""

    n_prompts = 3

    def probabilities(self, contexts):
        logits = contexts.context * np.array([0.0, 1.0, -0.5])
        return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def test_exact_dso_is_the_expectation_of_dso_over_prompts_and_noise():
    """Every prompt is enumerated, and all noise integrated: of the generator and of the blur, density included."""
    log, generator = small_world()
    policy, learner = Uneven(), agents.ExactDSO(tau=0.8, output_noise=0.5, clip=1e9)
    worlds = Worlds(StackedLogs([log]), (generator,), (policy,), (0,))
    objective = learner._objective(worlds)
    network = StackedMLP(1, (2, 1, 3))
    (first, *_) = objective.feed.block(1, network)
    # The rounds of the batch, found by their contexts.
    rows = [int(np.flatnonzero(log.context[:, 0] == x)[0]) for x in first.inputs[0, :, 0].numpy()]
    n = len(rows)

    kernel = agents.GaussianKernel(0.8, 0.5)
    nodes, shares = np.polynomial.hermite_e.hermegauss(20)
    shares = shares / shares.sum()
    first_noise, second_noise = (part.ravel() for part in np.meshgrid(nodes, nodes))
    share = np.outer(shares, shares).ravel()
    means = generator.base(log.contexts)[:, None] + generator.effects
    similarity = np.empty((len(log), 3, len(share)))
    for a in range(3):
        drawn = means[:, a, None] + 0.6 * first_noise[:, None]
        blur = torch.from_numpy(second_noise[:, None])
        for i in range(len(log)):
            similarity[i, a] = blurred(kernel, torch.tensor(log.output[i]), torch.from_numpy(drawn[i]), blur).numpy()
    density = np.einsum("na,nas,s->n", policy.probabilities(log.contexts), similarity, share)

    logits = torch.from_numpy(np.random.default_rng(4).normal(size=(1, n, 3)))
    distribution = ActionDistribution(logits)
    expected = torch.zeros_like(logits)
    columns = [torch.from_numpy(np.asarray(column[rows], np.float64))[None] for column in (density, log.reward)]
    for a in range(3):
        for s, chance in enumerate(share):
            leaf = logits.clone().requires_grad_()
            actions = torch.full((1, n), a)
            near = torch.from_numpy(similarity[rows, a, s])[None]
            loss = kernel_importance_sampling(ActionDistribution(leaf), actions, near, *columns, 1e9)
            slope = torch.autograd.grad(loss.sum(), leaf)[0]
            expected += chance * distribution.pmf[..., a, None] * slope
    found = objective.gradient(logits, GainBatch(first.inputs, first.gains.double()))[1]
    # The sampled method sums over the rounds of a batch, the exact one averages.
    torch.testing.assert_close(n * found, expected, rtol=1e-4, atol=1e-6)


def logs(*sizes: int) -> list[LoggedDataset]:
    return [
        LoggedDataset(
            context=np.arange(n)[:, None],
            query=np.zeros((n, 1)),
            action=np.zeros(n, int),
            propensity=np.full(n, 0.2),
            reward=np.zeros(n),
            output=np.zeros((n, 0)),
            prompts=PromptSet(np.eye(5)),
        )
        for n in sizes
    ]


class Makes:
    """Rows of G that name the world, the round and the prompt; counts what is held at once."""

    def __init__(self, worlds=()):
        self.worlds, self.asked = worlds, []

    def __call__(self, world, rows):
        self.asked.append((world, rows.copy()))
        return (1_000 * world + rows[:, None] + np.arange(5) / 10).astype(np.float32)


def test_batches_hold_the_rows_of_their_rounds():
    makes, prior = Makes(), Makes()
    feed = GainFeed(StackedLogs(logs(7, 40)), [1, 2], "test", 6, makes, prior)
    blocks = [feed.block(10, None), feed.block(10_000, None)]
    assert [len(block) for block in blocks] == [10, BLOCK]
    assert [(world, len(rows)) for world, rows in makes.asked] == [(0, 7), (1, 40)]
    for batch in [*blocks[0], *list(blocks[1])[:3]]:
        rows = batch.inputs[..., 0]
        assert rows.shape == (2, 6)
        expected = rows[..., None] + torch.tensor([[[0.0]], [[1_000.0]]]) + torch.arange(5) / 10
        torch.testing.assert_close(batch.gains, expected)
        torch.testing.assert_close(batch.prior, expected)
    seen = torch.cat([batch.inputs[1, :, 0] for batch in blocks[1]])
    assert set(seen.int().tolist()) == set(range(40))


def test_a_log_larger_than_the_pool_is_drawn_in_pools(monkeypatch):
    monkeypatch.setattr(pools, "_POOL", 5 * 12)
    makes = Makes()
    feed = GainFeed(StackedLogs(logs(30)), [1], "test", 4, makes)
    covered: set[int] = set()
    for turn in range(12):
        block = feed.block(1_000, None)
        world, rows = makes.asked[turn]
        assert (world, len(rows), len(set(rows.tolist()))) == (0, 12, 12)
        # Each row of a pool is used eight times on average.
        assert len(block) == 8 * 12 // 4
        for batch in block:
            own = batch.inputs[0, :, 0]
            assert set(own.int().tolist()) <= set(rows.tolist())
            torch.testing.assert_close(batch.gains[0, :, 0], own)
        covered |= set(rows.tolist())
    assert len(makes.asked) == 12
    assert covered == set(range(30))


@pytest.mark.parametrize("pool", [5 * 12, 5 * 35, 1 << 20])
def test_a_world_gets_the_same_batches_alone_and_in_a_stack(monkeypatch, pool):
    """Also where the log of one world fits the pool and that of another does not."""
    monkeypatch.setattr(pools, "_POOL", pool)
    own = logs(30, 50)
    both = GainFeed(StackedLogs(own), [1, 2], "test", 4, Makes())
    together = [batch for _ in range(6) for batch in both.block(20, None)]
    for world in range(2):
        feed = GainFeed(StackedLogs([own[world]]), [world + 1], "test", 4, Makes())
        alone = [batch for _ in range(6) for batch in feed.block(20, None)]
        for left, right in zip(alone, together, strict=False):
            assert torch.equal(left.inputs[0], right.inputs[world])
            assert torch.equal(left.gains[0] + 1_000 * world, right.gains[world])


def test_learners_learn_the_same_in_pools_alone_and_in_a_stack(monkeypatch, simulator, log):
    monkeypatch.setattr(pools, "_POOL", 12 * 50)
    learner = agents.ExactDSO(steps=60, batch_size=16)
    parts = [log.take(slice(0, 90)), log.take(slice(90, 300))]
    uniform = agents.UniformPolicy(12)
    together = learner.fit_many(parts, generators=[simulator.outputs] * 2, logging_policies=[uniform] * 2, seeds=[3, 4])
    for part, seed, policy in zip(parts, [3, 4], together, strict=True):
        alone = learner.fit(part, generator=simulator.outputs, logging_policy=uniform, seed=seed)
        for left, right in zip(alone.network.layers, policy.network.layers, strict=True):
            np.testing.assert_array_equal(left, right)
    monkeypatch.undo()
    whole = replace(learner).fit(parts[0], generator=simulator.outputs, logging_policy=uniform, seed=3)
    assert not np.array_equal(whole.network.layers[0], together[0].network.layers[0])
