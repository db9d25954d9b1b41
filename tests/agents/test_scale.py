"""A hundred thousand prompts: no matrix of all rounds and prompts is ever asked for, and steps look at few prompts."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

import agents
import offprompts_env as op
from agents.estimators.weighting import IS, SNIPS
from agents.hierarchical import TreeSoftmax
from agents.kernels import draw_actions
from offprompts_env.rng import stream
from offprompts_env.sampling import MATRIX_AT_ONCE, chosen_probabilities, inverse_cdf, pick, sample_actions
from offprompts_env.simulator import Simulator
from offprompts_env.synthetic import SyntheticConfig
from offprompts_env.types import Contexts, FloatArray, LoggedDataset

A, N = 100_000, 60


class Spy:
    """A policy, and scores, that refuse to make more of a matrix at once than is allowed."""

    n_prompts = A

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, contexts: Contexts) -> FloatArray:
        assert len(contexts) * A <= MATRIX_AT_ONCE
        self.rows += len(contexts)
        return np.sin(contexts.context[:, :1] * np.arange(A, dtype=np.float32))

    def probabilities(self, contexts: Contexts) -> FloatArray:
        scores = self(contexts) + 2
        return np.asarray(scores / scores.sum(axis=1, keepdims=True))


@pytest.fixture(scope="module")
def simulator() -> Simulator:
    return SyntheticConfig(n_prompts=A).build()


@pytest.fixture(scope="module")
def log(simulator: Simulator) -> LoggedDataset:
    return op.collect(simulator, agents.UniformPolicy(A), N, progress=False)


def test_the_matrix_of_this_test_would_be_too_large():
    assert N * A > 2 * MATRIX_AT_ONCE


@pytest.mark.parametrize(
    "make",
    [
        lambda spy: spy,
        lambda spy: agents.SoftmaxPolicy(spy, A),
        lambda spy: agents.EpsilonGreedyPolicy(spy, A, epsilon=0.1),
    ],
)
@pytest.mark.parametrize(
    "use",
    [
        lambda policy, log, s: sample_actions(policy, log.contexts, stream(0, "test")),
        lambda policy, log, s: chosen_probabilities(policy, log.contexts, log.action),
        lambda policy, log, s: op.collect(s, policy, N, batch_size=N, progress=False),
        lambda policy, log, s: draw_actions(policy, log.contexts, np.arange(N), stream(0, "test")),
        lambda policy, log, s: IS().estimate(policy, log),
        lambda policy, log, s: SNIPS().estimate(policy, log),
        lambda policy, log, s: s.policy_value(policy, contexts=log.contexts),
    ],
)
def test_policies_are_asked_part_by_part(use, make, simulator, log):
    spy = Spy()
    use(make(spy), log, simulator)
    assert spy.rows >= N


def test_parts_draw_what_the_whole_matrix_would(log):
    policy = agents.SoftmaxPolicy(lambda contexts: contexts.context @ np.eye(5, 7), 7)
    drawn, found = sample_actions(policy, log.contexts, stream(3, "test"))
    pmf = policy.probabilities(log.contexts)
    whole = inverse_cdf(pmf, stream(3, "test").random(N))
    np.testing.assert_array_equal(drawn, whole)
    np.testing.assert_array_equal(found, pick(pmf, whole))


def test_a_policy_in_two_levels_looks_at_few_prompts(simulator, log):
    learned = agents.ImportanceSamplingPG(steps=30, tree=TreeSoftmax()).fit(log)
    groups, members = learned.tree.members.shape
    assert max(groups, members) < 320
    assert sum(layer.size for layer in learned.network.layers) < 2_200
    contexts = log.contexts.take(np.arange(10_000) % N)
    learned.chosen(contexts.take(slice(1)), np.zeros(1, dtype=int))
    tracemalloc.start()
    actions, propensities = sample_actions(learned, contexts, stream(0, "test"))
    again = chosen_probabilities(learned, contexts, actions)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6
    np.testing.assert_allclose(propensities, again)


def test_a_step_in_two_levels_holds_no_row_of_all_prompts(log):
    head, sizes = TreeSoftmax().head([log.prompts.embeddings]), []
    outputs = torch.randn(1, 32, head.n_outputs, requires_grad=True)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            found = function(*arguments, **(keywords or {}))
            sizes.extend(part.numel() for part in torch.utils._pytree.tree_leaves(found) if torch.is_tensor(part))
            return found

    with Watch():
        policy = head(outputs)
        actions = policy.sample(torch.rand(1, 32))
        policy.log_probability(actions).sum().backward()
    # One entry a prompt's dimension of each round's group; the table of all prompts is only read.
    assert max(sizes) <= 32 * head.width
    assert max(sizes) < 32 * A / 50
