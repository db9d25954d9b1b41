"""Policies in two levels, against enumeration of small catalogues."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import agents
import offprompts_env as op
from agents import gradients
from agents.hierarchical import HierarchicalPolicy, PromptTree, TreeSoftmax
from agents.networks import MLP, StackedMLP
from agents.training import world_streams
from offprompts_env.errors import ConfigError
from offprompts_env.rng import stream
from offprompts_env.sampling import chosen_probabilities, sample_actions
from offprompts_env.simulator import Simulator
from offprompts_env.synthetic import SyntheticConfig
from offprompts_env.types import Contexts, LoggedDataset

RNG = np.random.default_rng(0)
TREE = TreeSoftmax()


def contexts(n: int) -> Contexts:
    rng = np.random.default_rng(1)
    return Contexts(rng.normal(size=(n, 2)), rng.normal(size=(n, 1)))


def policy(n_prompts: int, n_groups: int | None = None, k: int = 3) -> HierarchicalPolicy:
    tree = PromptTree.arrange(np.random.default_rng(n_prompts).normal(size=(n_prompts, k)), n_groups)
    (network,) = StackedMLP.initialise((3, 8, 2 * k), world_streams([n_prompts], "test")).unstack()
    return HierarchicalPolicy(MLP(tuple(4 * layer for layer in network.layers)), "known", tree=tree)


@pytest.mark.parametrize(("n_prompts", "n_groups"), [(1, None), (2, 1), (7, 3), (12, 12), (12, 5), (100, None), (5, 9)])
def test_a_tree_holds_every_prompt_once(n_prompts, n_groups):
    tree = policy(n_prompts, n_groups).tree
    sizes = (tree.members >= 0).sum(axis=1)
    assert len(sizes) == min(n_prompts, n_groups or round(n_prompts**0.5))
    assert sizes.max() - sizes.min() <= 1
    assert sorted(tree.members[tree.members >= 0]) == list(range(n_prompts))
    group, position = tree.place
    np.testing.assert_array_equal(tree.members[group, position], np.arange(n_prompts))
    for own, centre in zip(tree.members, tree.centres, strict=True):
        np.testing.assert_allclose(tree.features[own[own >= 0]].mean(axis=0), centre, atol=1e-5)


def test_groups_are_of_similar_prompts():
    points = np.repeat(np.array([[0.0, 0], [10, 0], [0, 10], [10, 10]]), 6, axis=0) + RNG.normal(size=(24, 2))
    tree = PromptTree.arrange(points[(mixed := RNG.permutation(24))], 4)
    assert sorted(tuple(sorted(mixed[own] // 6)) for own in tree.members) == [(c,) * 6 for c in range(4)]


@pytest.mark.parametrize(("n_prompts", "n_groups"), [(1, None), (2, 1), (7, 3), (12, 12), (30, None)])
def test_the_pmf_is_the_product_of_two_softmaxes(n_prompts, n_groups):
    own = policy(n_prompts, n_groups)
    z = own.network(np.concatenate([contexts(4).context, contexts(4).query], axis=1)).astype(float)
    expected = np.zeros((4, n_prompts))
    for row, group in itertools.product(range(4), range(own.tree.n_groups)):
        scores = np.exp(own.tree.centres @ z[row, :3])
        members = own.tree.members[group][own.tree.members[group] >= 0]
        within = np.exp(own.tree.features[members] @ z[row, 3:])
        expected[row, members] = scores[group] / scores.sum() * within / within.sum()
    np.testing.assert_allclose(own.probabilities(contexts(4)), expected, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(own.logits(contexts(4)), np.log(expected), atol=1e-3)


@pytest.mark.parametrize(("n_prompts", "n_groups"), [(1, None), (7, 3), (30, None)])
def test_training_and_rest_agree_with_the_pmf(n_prompts, n_groups):
    own, rounds = policy(n_prompts, n_groups), contexts(5)
    pmf = own.probabilities(rounds)
    head = TreeSoftmax(n_groups).head([np.random.default_rng(n_prompts).normal(size=(n_prompts, 3))])
    z = torch.from_numpy(own.network(np.concatenate([rounds.context, rounds.query], axis=1)))[None]
    for prompt in range(n_prompts):
        actions = np.full(5, prompt)
        np.testing.assert_allclose(own.chosen(rounds, actions), pmf[:, prompt], rtol=1e-4)
        np.testing.assert_array_equal(chosen_probabilities(own, rounds, actions), own.chosen(rounds, actions))
        found = head(z).probability(torch.full((1, 5), prompt))
        np.testing.assert_allclose(found[0].numpy(), pmf[:, prompt], rtol=1e-4)
        np.testing.assert_allclose(head(z).log_probability(torch.full((1, 5), prompt)).exp(), found)


def test_draws_follow_the_pmf():
    own, n = policy(10, 3), 40_000
    rounds = contexts(1).repeat(n)
    pmf = own.probabilities(contexts(1))[0]
    actions, propensities = sample_actions(own, rounds, stream(0, "test"))
    np.testing.assert_allclose(propensities, pmf[actions], rtol=1e-4)
    head = TreeSoftmax(3).head([np.random.default_rng(10).normal(size=(10, 3))])
    z = torch.from_numpy(own.network(np.concatenate([rounds.context, rounds.query], axis=1)))[None]
    evenly = (torch.arange(n) + 0.5)[None] / n
    drawn = head(z).sample(evenly)[0].numpy()
    np.testing.assert_allclose(np.bincount(drawn, minlength=10) / n, pmf, atol=2e-4)
    np.testing.assert_allclose(np.bincount(actions, minlength=10) / n, pmf, atol=0.01)


def test_draws_stay_within_the_catalogue():
    head = TreeSoftmax(3).head([np.random.default_rng(0).normal(size=(7, 2))] * 2)
    for scale in (0.0, 1.0, 1e4):
        z = scale * torch.randn(2, 500, 4)
        for uniforms in (torch.zeros(2, 500), torch.full((2, 500), 1 - 2**-24), torch.rand(2, 500)):
            drawn = head(z).sample(uniforms)
            assert drawn.min() >= 0
            assert (head(z).probability(drawn) > 0).all()


def test_log_probability_gradient_by_finite_differences():
    head = TreeSoftmax(3).head([np.random.default_rng(w).normal(size=(7, 2)) for w in range(2)])
    head.features, head.centres = head.features.double(), head.centres.double()
    z = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    actions = torch.arange(7).expand(2, 7)
    assert torch.autograd.gradcheck(lambda own: head(own).log_probability(actions), (z,))


def test_the_expected_surrogate_is_the_policy_gradient():
    """Every prompt with its probability, for the regression surrogate of a true model."""
    head = TreeSoftmax(3).head([np.random.default_rng(0).normal(size=(7, 2))])
    head.features, head.centres = head.features.double(), head.centres.double()
    reward = torch.randn(7, dtype=torch.float64)
    z = torch.randn(1, 1, 4, dtype=torch.float64, requires_grad=True)
    everything = torch.arange(7)
    spread = z.expand(1, 7, 4)
    value = (head(spread).log_probability(everything[None]).exp()[0] * reward).sum()
    (expected,) = torch.autograd.grad(value, z)
    total = torch.zeros_like(z)
    for prompt in range(7):
        actions = torch.full((1, 1), prompt)
        chance = head(z.detach()).probability(actions)
        loss = gradients.regression(head(z), actions, reward[actions])
        total -= chance * torch.autograd.grad(loss.sum(), z)[0]
    torch.testing.assert_close(total, expected)


def test_it_saves_and_loads_with_the_same_bits(tmp_path):
    own = policy(30)
    again = agents.load_policy(own.save(tmp_path / "policy"))
    assert isinstance(again, HierarchicalPolicy)
    assert (again.n_prompts, again.catalogue) == (30, "known")
    np.testing.assert_array_equal(again.probabilities(contexts(5)), own.probabilities(contexts(5)))
    for seed in range(3):
        pairs = zip(*(p.sample(contexts(50), stream(seed, "test")) for p in (own, again)), strict=True)
        assert all(np.array_equal(left, right) for left, right in pairs)


LEARNERS = [
    agents.ImportanceSamplingPG(steps=60, tree=TREE),
    agents.RegressionPG(steps=60, rewards=agents.PromptRewardRegression(steps=60), tree=TREE),
    agents.DSO(steps=60, density=agents.MonteCarloDensity(5), tree=TREE),
    agents.BehaviorCloning(steps=60, tree=TREE),
]


@pytest.mark.filterwarnings("ignore::agents.TrainingWarning")
@pytest.mark.parametrize("learner", LEARNERS, ids=lambda learner: type(learner).__name__)
def test_a_world_learns_the_same_alone_and_in_a_stack(learner, simulator: Simulator, log: LoggedDataset):
    given = {"generators": [simulator.outputs] * 2, "logging_policies": [agents.UniformPolicy(12)] * 2}
    together = learner.fit_many([log, log.take(slice(900))], **given, seeds=[7, 8])
    alone = learner.fit(log, generator=simulator.outputs, logging_policy=agents.UniformPolicy(12), seed=7)
    assert isinstance(alone, HierarchicalPolicy)
    assert alone.catalogue == simulator.prompts.fingerprint
    for left, right in zip(alone.network.layers, together[0].network.layers, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-5)
    assert not np.array_equal(together[0].network.layers[0], together[1].network.layers[0])


def test_sentences_of_any_generator_are_asked_for_its_own_prompts(simulator: Simulator, log: LoggedDataset):
    class Black:
        def __init__(self, inner):
            self.output_dim, self.prompts, self.sample = inner.output_dim, inner.prompts, inner.sample

    learner = agents.DSO(steps=60, refresh=7, density=agents.MonteCarloDensity(5), tree=TREE)
    found = learner.fit(log, generator=Black(simulator.outputs), logging_policy=agents.UniformPolicy(12))
    assert isinstance(found, HierarchicalPolicy)


def test_it_learns_where_embeddings_say_it_all():
    simulator = SyntheticConfig.preset("paper_code", n_prompts=200, mapping="linear", reward_std=0.02, seed=3).build()
    uniform = agents.UniformPolicy(200)
    log = op.collect(simulator, uniform, 4_000, seed=5)
    rewards = agents.PromptRewardRegression(steps=2_000, learning_rate=3e-3)
    learned = agents.RegressionPG(steps=800, learning_rate=1e-2, rewards=rewards, tree=TREE).fit(log)
    base, value, best = (
        simulator.policy_value(own).value for own in (uniform, learned, agents.OraclePolicy(simulator))
    )
    assert value > base + 0.4 * (best - base)


def test_wrong_input(simulator: Simulator, log: LoggedDataset):
    with pytest.raises(ConfigError, match="n_groups"):
        TreeSoftmax(0)
    head = TREE.head([log.prompts.embeddings])
    for name in ("pmf", "logits"):
        with pytest.raises(ConfigError, match="tree=None"):
            getattr(head(torch.zeros(1, 2, head.n_outputs)), name)
