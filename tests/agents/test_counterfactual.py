from __future__ import annotations

import tracemalloc
import warnings
from dataclasses import replace

import numpy as np
import pytest

import agents
import offprompts_env as op
from agents.learners.convolution import convolved_propensities, nearest
from agents.training import StackedLogs, world_streams
from offprompts_env.errors import ConfigError, DataError, PropensityError
from offprompts_env.simulator import Simulator
from offprompts_env.synthetic import SyntheticConfig
from offprompts_env.types import LoggedDataset

SHORT = 60
QUICK = [
    agents.CRM(steps=SHORT),
    agents.BanditNet(steps=SHORT),
    agents.LogarithmicSmoothingPG(steps=SHORT),
    agents.ExponentialSmoothingPG(steps=SHORT),
    agents.BetaIPSPG(steps=SHORT),
    agents.WeightedLogLikelihood(steps=SHORT, power=0.5),
    agents.PolicyConvolutionPG(steps=SHORT, neighbourhood=agents.TreeNeighbours(3)),
]
each = pytest.mark.parametrize("learner", QUICK, ids=lambda learner: type(learner).__name__)


def identical(left: agents.NeuralPolicy, right: agents.NeuralPolicy) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(left.network.layers, right.network.layers, strict=True))


def worlds(n_prompts: int) -> list[LoggedDataset]:
    simulators = [SyntheticConfig.preset("paper_code", n_prompts=n_prompts, seed=seed).build() for seed in range(3)]
    return [
        op.collect(simulator, agents.UniformPolicy(n_prompts), 90 + 13 * seed, seed=seed)
        for seed, simulator in enumerate(simulators)
    ]


@each
@pytest.mark.parametrize("n_prompts", [7, 300])
def test_a_world_learns_the_same_alone_and_in_a_stack(learner, n_prompts):
    logs, logging = worlds(n_prompts), agents.UniformPolicy(n_prompts)
    together = learner.fit_many(logs, logging_policies=[logging] * 3, seeds=[7, 8, 9])
    for world, seed in enumerate([7, 8, 9]):
        assert identical(learner.fit(logs[world], logging_policy=logging, seed=seed), together[world])
    assert not identical(together[0], together[1])


@each
def test_a_seed_names_a_run_and_the_oracle_is_never_read(learner, log):
    class Trap:
        def __getattr__(self, name: str):
            raise AssertionError("a learner read the oracle")

    def fit(data: LoggedDataset, seed: int) -> agents.NeuralPolicy:
        return learner.fit(data, logging_policy=agents.UniformPolicy(12), seed=seed)

    bare = replace(log, output=log.output[:, :0])
    object.__setattr__(bare, "oracle", Trap())
    first = fit(log, 1)
    assert identical(first, fit(bare, 1))
    assert not identical(first, fit(log, 2))
    assert isinstance(learner, agents.Learner)


@pytest.mark.parametrize(
    "learner",
    [
        agents.CRM(steps=800, learning_rate=5e-3),
        agents.BanditNet(steps=800, learning_rate=5e-3),
        agents.LogarithmicSmoothingPG(steps=800, learning_rate=5e-3),
        agents.ExponentialSmoothingPG(steps=800, learning_rate=5e-3),
        agents.BetaIPSPG(steps=800, learning_rate=5e-3),
        agents.WeightedLogLikelihood(steps=800, learning_rate=5e-3, temperature=0.5),
        agents.PolicyConvolutionPG(steps=800, learning_rate=5e-3, neighbourhood=agents.KernelNeighbours(0.5, k=4)),
    ],
    ids=lambda learner: type(learner).__name__,
)
def test_learners_beat_the_logging_policy_in_an_easy_world(learner, simulator: Simulator, log):
    uniform = simulator.policy_value(agents.UniformPolicy(12)).value
    best = simulator.policy_value(agents.OraclePolicy(simulator)).value
    policy = learner.fit(log, logging_policy=agents.UniformPolicy(12))
    assert simulator.policy_value(policy).value > uniform + 0.35 * (best - uniform)


@each
def test_one_prompt_and_constant_rewards(learner):
    simulator = SyntheticConfig(n_prompts=1).build()
    log = op.collect(simulator, agents.UniformPolicy(1), 50)
    flat = replace(log, reward=np.zeros(50))
    for data in (log, flat):
        policy = learner.fit(data, logging_policy=agents.UniformPolicy(1))
        assert (policy.probabilities(log.contexts) == 1).all()


def test_a_penalty_keeps_closer_to_the_logging_policy(log):
    """The more the variance counts, the smaller are the weights of what is learned."""
    spreads = []
    for penalty in (0.0, 20.0):
        policy = agents.CRM(steps=600, learning_rate=5e-3, penalty=penalty).fit(log)
        chances = policy.probabilities(log.contexts)[np.arange(len(log)), log.action]
        spreads.append(float(np.std(chances * 12 * log.reward)))
    assert spreads[1] < 0.8 * spreads[0]


def test_bandit_net_returns_the_translation_that_is_best_on_held_out_rounds(log):
    settings = {"steps": 200, "learning_rate": 5e-3}
    alone = [agents.BanditNet(shifts=(shift,), **settings).fit(log, seed=3) for shift in (-1.0, 0.0, 1.0)]
    together = agents.BanditNet(shifts=(-1.0, 0.0, 1.0), **settings).fit(log, seed=3)
    found = [identical(together, policy) for policy in alone]
    assert sum(found) == 1
    (rows,) = StackedLogs([log]).split(world_streams([3], "BanditNet", "split"), 0.8)[1]
    rest = log.take(rows.numpy())
    values = []
    for policy in alone:
        weight = policy.probabilities(rest.contexts)[np.arange(len(rest)), rest.action] * 12
        values.append(float(weight @ rest.reward / weight.sum()))
    assert found.index(True) == int(np.argmax(values))


def test_a_callback_sees_one_policy_a_world(log):
    seen = []
    callback = agents.Callback(20, lambda step, policies: seen.append(len(policies)))
    agents.BanditNet(steps=40).fit_many([log, log], callback=callback)
    assert seen == [2, 2]


def test_weights_alone_need_no_propensities(log):
    unknown = replace(log, propensity=np.full(len(log), np.nan))
    learner = agents.WeightedLogLikelihood(steps=SHORT)
    with warnings.catch_warnings():
        warnings.simplefilter("error", agents.AssumptionWarning)
        assert identical(learner.fit(unknown), learner.fit(log))
    for other in (agents.WeightedLogLikelihood(steps=SHORT, power=1.0), *QUICK[:5]):
        with pytest.raises(PropensityError, match=type(other).__name__):
            other.fit(unknown)
        with pytest.warns(agents.AssumptionWarning, match=f"agents.{type(other).__name__}.*unknown in 2000 of 2000"):
            other.fit(unknown, logging_policy=agents.UniformPolicy(12))
    with pytest.warns(agents.AssumptionWarning, match=r"agents\.PolicyConvolutionPG: no logging policy"):
        agents.PolicyConvolutionPG(steps=5, cloning=agents.BehaviorCloning(steps=SHORT)).fit(unknown)


def test_weighted_log_likelihood_finds_the_tilted_logging_policy():
    """``π ∝ π₀^(1−α) exp(r / (T σ_r))`` in a world with one context, two prompts and no noise."""
    rng = np.random.default_rng(0)
    action = (rng.random(4000) < 0.3).astype(int)
    log = LoggedDataset(
        context=np.zeros((4000, 1)),
        query=np.zeros((4000, 1)),
        action=action,
        propensity=np.where(action == 1, 0.3, 0.7),
        reward=action.astype(float),
        output=np.zeros((4000, 0)),
        prompts=op.PromptSet(np.eye(2)),
    )
    odds = action.mean() / (1 - action.mean())
    for power in (0.0, 1.0):
        learner = agents.WeightedLogLikelihood(steps=1500, learning_rate=3e-3, temperature=2.0, power=power)
        found = learner.fit(log).probabilities(log.contexts.take(slice(1)))[0]
        expected = odds * (0.7 / 0.3) ** power * np.exp(1 / (2.0 * log.reward.std()))
        assert np.log(found[1] / found[0]) == pytest.approx(np.log(expected), abs=0.1)


def test_the_nearest_are_found_whole_or_in_parts(monkeypatch):
    points = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    distance = np.square(points[:, None] - points).sum(-1)
    index, squared = nearest(points, 6)
    np.testing.assert_array_equal(index[:, 0], np.arange(40))
    np.testing.assert_allclose(squared, np.sort(distance, axis=1)[:, :6], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(distance, index, 1), squared, atol=1e-5)
    monkeypatch.setattr("offprompts_env.sampling.MATRIX_AT_ONCE", 40 * 7)
    np.testing.assert_array_equal(nearest(points, 6)[0], index)
    assert nearest(points, 100)[0].shape == (40, 40)
    copies = nearest(np.zeros((5, 2), np.float32), 2)[0]
    np.testing.assert_array_equal(copies[:, 0], np.arange(5))


def test_neighbourhoods():
    points = np.array([[0.0], [0.1], [1.0], [5.0]], np.float32)
    ball = agents.BallNeighbours(0.5, k=3).of(points)
    np.testing.assert_allclose(ball.share[:, 0], [0.5, 0.5, 1.0, 1.0])
    assert set(ball.index[0][ball.share[0] > 0]) == {0, 1}
    kernel = agents.KernelNeighbours(0.5, k=2).of(points)
    near = np.exp(-0.5 * (0.1 / 0.5) ** 2)
    np.testing.assert_allclose(kernel.share[0], [1 / (1 + near), near / (1 + near)], rtol=1e-5)
    tree = agents.TreeNeighbours(2).of(points)
    assert [set(tree.index[a][tree.share[a] > 0]) for a in range(4)] == [{0, 1}, {0, 1}, {2, 3}, {2, 3}]
    single = agents.NearestNeighbours(1).of(points)
    np.testing.assert_array_equal(single.index, np.arange(4)[:, None])
    uneven = agents.TreeNeighbours(2).of(np.arange(5.0, dtype=np.float32)[:, None])
    members = {frozenset(uneven.index[a][uneven.share[a] > 0].tolist()) for a in range(5)}
    assert members == {frozenset({0, 1}), frozenset({2}), frozenset({3, 4})}
    assert agents.TreeNeighbours(2).of(np.zeros((7, 2), np.float32)).index.shape == (7, 2)
    for kind in (ball, kernel, tree, single, uneven):
        np.testing.assert_allclose(kind.share.sum(1), 1, rtol=1e-6)


def test_neighbours_of_many_prompts_need_no_matrix_of_all_pairs():
    points = np.random.default_rng(0).normal(size=(6_000, 5)).astype(np.float32)
    tracemalloc.start()
    agents.NearestNeighbours(10).of(points)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20 < points.shape[0] ** 2 * 8


def test_convolved_propensities_by_hand(simulator, log):
    class Table:
        n_prompts = 12

        def probabilities(self, contexts):
            return np.tile(np.arange(12) / 66, (len(contexts), 1))

    near = agents.NearestNeighbours(3).of(log.prompts.embeddings)
    found = convolved_propensities(Table(), log, near)
    expected = [np.mean([b / 66 for b in near.index[a]]) for a in log.action]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    with pytest.raises(PropensityError, match="and its neighbours"):
        convolved_propensities(
            agents.ConstantPolicy(0, 12), log, agents.NearestNeighbours(1).of(log.prompts.embeddings)
        )


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: agents.CRM(penalty=-1.0), "penalty"),
        (lambda: agents.CRM(clip=0.0), "clip"),
        (lambda: agents.BanditNet(shifts=()), "at least one translation"),
        (lambda: agents.BanditNet(shifts=(float("nan"),)), "shifts"),
        (lambda: agents.BanditNet(train_fraction=1.0), "train_fraction"),
        (lambda: agents.BanditNet(clip=-1.0), "clip"),
        (lambda: agents.LogarithmicSmoothingPG(smoothing=-0.1), "smoothing"),
        (lambda: agents.ExponentialSmoothingPG(exponent=1.1), "1 is importance sampling"),
        (lambda: agents.ExponentialSmoothingPG(exponent=-0.1), "exponent"),
        (lambda: agents.BetaIPSPG(clip=0.0), "clip"),
        (lambda: agents.WeightedLogLikelihood(temperature=0.0), "temperature"),
        (lambda: agents.WeightedLogLikelihood(power=2.0), "power"),
        (lambda: agents.WeightedLogLikelihood(clip=0.0), "clip"),
        (lambda: agents.PolicyConvolutionPG(clip=0.0), "clip"),
        (lambda: agents.NearestNeighbours(0), "k: expected"),
        (lambda: agents.BallNeighbours(-1.0), "radius"),
        (lambda: agents.KernelNeighbours(0.0), "tau"),
        (lambda: agents.TreeNeighbours(0), "k: expected"),
        (lambda: agents.CRM(steps=0), "steps"),
    ],
)
def test_wrong_settings(act, words):
    with pytest.raises(ConfigError, match=words):
        act()


def test_a_log_too_small_to_choose_a_translation(log):
    with pytest.raises(DataError, match="record more rounds"):
        agents.BanditNet(steps=5).fit(log.take(slice(2)))
