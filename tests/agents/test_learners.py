from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest

import agents
import offprompts_env as op
from agents.networks import MLP
from offprompts_env.envs import PromptEnv
from offprompts_env.errors import ConfigError, DataError, DimensionError, NumericalError, PropensityError
from offprompts_env.simulator import Simulator
from offprompts_env.synthetic import SyntheticConfig
from offprompts_env.types import Contexts, IntArray, LoggedDataset, Outputs, PromptSet

SHORT = 60
QUICK_REWARDS = agents.PromptRewardRegression(steps=SHORT)
QUICK_DENSITY = agents.NetworkDensity(steps=SHORT)
QUICK_CLONING = agents.BehaviorCloning(steps=SHORT)
QUICK = [
    agents.RegressionPG(steps=SHORT, rewards=QUICK_REWARDS),
    agents.ImportanceSamplingPG(steps=SHORT),
    agents.DSO(steps=SHORT, density=QUICK_DENSITY, cloning=QUICK_CLONING),
    agents.DSO(
        steps=SHORT, density=agents.MonteCarloDensity(5), kernel=agents.UniformKernel(2.0), cloning=QUICK_CLONING
    ),
    QUICK_CLONING,
    agents.DoublyRobustPG(steps=SHORT, rewards=QUICK_REWARDS),
    agents.DSO(
        steps=SHORT,
        density=QUICK_DENSITY,
        cloning=QUICK_CLONING,
        rewards=agents.SentenceRewardRegression(steps=SHORT),
    ),
    agents.RegressionPG(steps=SHORT, rewards=agents.PromptRewardRegression(steps=SHORT, pessimism=0.1)),
]


class Black:
    """An output model of which nothing is known but its samples; it counts what it is asked for."""

    def __init__(self, inner, broken: bool = False):
        self.inner, self.asked, self.calls, self.broken = inner, 0, 0, broken
        self.output_dim, self.prompts = inner.output_dim, inner.prompts

    def sample(self, contexts: Contexts, actions: IntArray, rng: np.random.Generator) -> Outputs:
        self.asked += len(contexts)
        self.calls += 1
        outputs = self.inner.sample(contexts, actions, rng)
        return Outputs(outputs.embedding * np.nan) if self.broken else outputs


def weights(policy) -> list[np.ndarray]:
    return list(policy.network.layers)


def identical(left, right) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(weights(left), weights(right), strict=True))


def worlds(n: int, n_prompts: int = 20) -> tuple[list[Simulator], list[LoggedDataset]]:
    simulators = [SyntheticConfig.preset("paper_code", n_prompts=n_prompts, seed=seed).build() for seed in range(n)]
    logs = [
        op.collect(simulator, agents.UniformPolicy(n_prompts), 90 + 13 * seed, seed=seed)
        for seed, simulator in enumerate(simulators)
    ]
    return simulators, logs


@pytest.mark.filterwarnings("ignore::agents.TrainingWarning")
@pytest.mark.parametrize("learner", QUICK, ids=lambda learner: type(learner).__name__)
@pytest.mark.parametrize("n_prompts", [7, 20, 300])
def test_a_world_learns_the_same_alone_and_in_a_stack(learner, n_prompts):
    simulators, logs = worlds(3, n_prompts)
    generators = [simulator.outputs for simulator in simulators]
    logging = [agents.UniformPolicy(n_prompts)] * 3
    together = learner.fit_many(logs, generators=generators, logging_policies=logging, seeds=[7, 8, 9])
    for world, seed in enumerate([7, 8, 9]):
        alone = learner.fit(logs[world], generator=generators[world], logging_policy=logging[world], seed=seed)
        assert identical(alone, together[world])
    assert not identical(together[0], together[1])


def test_online_learns_the_same_alone_and_in_a_stack():
    simulators, _ = worlds(2)
    hidden = [Simulator(s.contexts, Black(s.outputs), s.rewards) for s in simulators]
    for group in (simulators, hidden):
        together = agents.OnlinePG(steps=SHORT, refresh=7).fit_many(group, seeds=[4, 5])
        assert identical(agents.OnlinePG(steps=SHORT, refresh=7).fit(group[1], seed=5), together[1])


@pytest.mark.filterwarnings("ignore::agents.TrainingWarning")
@pytest.mark.parametrize("learner", QUICK, ids=lambda learner: type(learner).__name__)
def test_a_seed_names_a_run_and_the_oracle_is_never_read(learner, simulator, log):
    class Trap:
        def __getattr__(self, name: str):
            raise AssertionError("a learner read the oracle")

    trapped = replace(log)
    object.__setattr__(trapped, "oracle", Trap())
    first, again = (learner.fit(data, generator=simulator.outputs, seed=1) for data in (log, trapped))
    assert identical(first, again)
    assert not identical(first, learner.fit(log, generator=simulator.outputs, seed=2))
    assert isinstance(learner, agents.Learner)


def test_learners_beat_the_logging_policy_in_an_easy_world(simulator, log):
    uniform = simulator.policy_value(agents.UniformPolicy(12)).value
    best = simulator.policy_value(agents.OraclePolicy(simulator)).value
    rewards = agents.PromptRewardRegression(steps=3_000, learning_rate=3e-3)
    learners = [
        agents.RegressionPG(steps=1_000, learning_rate=5e-3, rewards=rewards),
        agents.ImportanceSamplingPG(steps=1_000, learning_rate=5e-3),
        agents.DoublyRobustPG(steps=1_000, learning_rate=5e-3, rewards=rewards),
        agents.DSO(steps=1_000, learning_rate=5e-3, density=agents.MonteCarloDensity(50)),
        agents.DSO(
            steps=1_000,
            learning_rate=5e-3,
            density=agents.MonteCarloDensity(50),
            rewards=agents.SentenceRewardRegression(steps=3_000, learning_rate=3e-3),
        ),
    ]
    for learner in learners:
        policy = learner.fit(log, generator=simulator.outputs, logging_policy=agents.UniformPolicy(12))
        assert simulator.policy_value(policy).value > uniform + 0.4 * (best - uniform), learner
    online = agents.OnlinePG(steps=1_000, learning_rate=5e-3).fit(simulator)
    assert simulator.policy_value(online).value > uniform + 0.7 * (best - uniform)


@pytest.mark.filterwarnings("ignore::agents.TrainingWarning")
def test_doubly_robust_is_between_its_two_parts(log):
    """Importance sampling where the model says nothing, regression where it leaves nothing unexplained."""
    model = QUICK_REWARDS.fit(log)
    layers = [*model.network.layers[:-1], np.zeros_like(model.network.layers[-1])]
    silent = agents.FittedRewards((replace(model, network=MLP(tuple(layers))),))
    exact = replace(log, reward=model.chosen(log.contexts, log.action))

    class LikeIS(agents.DoublyRobustPG):
        label = "IS PG"

    class LikeRegression(agents.DoublyRobustPG):
        label = "regression PG"

    pairs = [
        (LikeIS(steps=SHORT, rewards=silent).fit(log), QUICK[1].fit(log)),
        (
            LikeRegression(steps=SHORT, rewards=agents.FittedRewards((model,))).fit(exact),
            agents.RegressionPG(steps=SHORT, rewards=agents.FittedRewards((model,))).fit(log),
        ),
    ]
    for found, expected in pairs:
        for left, right in zip(weights(found), weights(expected), strict=True):
            np.testing.assert_allclose(left, right, atol=1e-4)


def test_hybrid_dso_is_dso_under_a_model_that_says_nothing(simulator, log):
    uniform = agents.UniformPolicy(12)
    settings = {"steps": SHORT, "density": agents.MonteCarloDensity(5)}
    silent = agents.FittedSentenceRewards((lambda contexts, outputs: np.zeros(len(contexts)),))
    hybrid = agents.DSO(**settings, rewards=silent).fit(log, generator=simulator.outputs, logging_policy=uniform)
    plain = agents.DSO(**settings).fit(log, generator=simulator.outputs, logging_policy=uniform)
    for left, right in zip(weights(hybrid), weights(plain), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)


@pytest.mark.filterwarnings("ignore::agents.TrainingWarning")
def test_hybrid_dso_takes_any_model_of_sentences(simulator, log):
    """A perceptron is evaluated inside PyTorch, anything else outside: with the same policy, up to rounding."""
    model = agents.SentenceRewardRegression(steps=SHORT).fit(log)
    found = [
        agents.DSO(
            steps=SHORT, density=agents.MonteCarloDensity(5), rewards=agents.FittedSentenceRewards((rewards,))
        ).fit(log, generator=simulator.outputs, logging_policy=agents.UniformPolicy(12))
        for rewards in (model, lambda contexts, outputs: model(contexts, outputs))
    ]
    for left, right in zip(*map(weights, found), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-4)


def test_cloning_recovers_the_logging_policy(simulator):
    network = agents.OnlinePG(steps=300, learning_rate=2e-3).fit(simulator)
    log = op.collect(simulator, network, 4_000, seed=1)
    cloned = agents.BehaviorCloning(steps=1_500, learning_rate=2e-3).fit(log)
    contexts = simulator.evaluation_contexts(500)
    gap = np.abs(cloned.probabilities(contexts) - network.probabilities(contexts)).sum(1).mean() / 2
    assert gap < 0.15


@pytest.mark.parametrize("draw", [False, True])
def test_online_cloning_copies_a_policy(simulator, draw):
    def scores(contexts: Contexts) -> np.ndarray:
        return contexts.context[:, :1] * np.linspace(-2, 2, 12) + contexts.query[:, 1:2] * np.cos(np.arange(12))

    policy = agents.SoftmaxPolicy(scores, 12)
    learner = agents.OnlineCloning(steps=2_500, learning_rate=3e-3, draw=draw)
    contexts = simulator.evaluation_contexts(500)
    target = policy.probabilities(contexts)
    gap = np.abs(learner.fit(policy, simulator).probabilities(contexts) - target).sum(1).mean() / 2
    far = np.abs(learner.fit(agents.UniformPolicy(12), simulator).probabilities(contexts) - target).sum(1).mean() / 2
    assert gap < 0.25 * far


@pytest.mark.parametrize("draw", [False, True])
def test_online_cloning_learns_the_same_alone_and_in_a_stack(draw):
    simulators, _ = worlds(2)
    policies = [agents.ConstantPolicy(3, 20), agents.UniformPolicy(20)]
    learner = agents.OnlineCloning(steps=SHORT, draw=draw)
    together = learner.fit_many(policies, simulators, seeds=[4, 5])
    assert identical(learner.fit(policies[1], simulators[1], seed=5), together[1])


def test_unknown_propensities_need_a_logging_policy(simulator, log):
    unknown = replace(log, propensity=np.full(len(log), np.nan))
    learner = agents.ImportanceSamplingPG(steps=SHORT)
    with pytest.raises(PropensityError, match="BehaviorCloning"):
        learner.fit(unknown)
    with pytest.warns(agents.AssumptionWarning, match="unknown in 2000 of 2000 rounds; those of logging_policy="):
        given = learner.fit(unknown, logging_policy=agents.UniformPolicy(12))
    assert identical(given, learner.fit(log))
    with pytest.warns(agents.AssumptionWarning, match="cloned from the log with BehaviorCloning") as caught:
        QUICK[2].fit(unknown, generator=simulator.outputs)
    assert len(caught) == 1


def test_nothing_is_assumed_where_the_log_says_it(simulator, log):
    with warnings.catch_warnings():
        warnings.simplefilter("error", agents.AssumptionWarning)
        agents.ImportanceSamplingPG(steps=SHORT).fit(log)
        QUICK[2].fit(log, generator=simulator.outputs, logging_policy=agents.UniformPolicy(12))


def test_a_budget_of_sentences_is_kept(simulator, log):
    generator = Black(simulator.outputs)
    density = agents.NetworkDensity(steps=100, max_sentences=500)
    learner = agents.DSO(steps=200, refresh=50, max_sentences=1_000, density=density)
    learner.fit(log, generator=generator, logging_policy=agents.UniformPolicy(12))
    assert generator.asked == 1_500
    assert generator.calls == 5


def test_any_generator_learns_as_well_as_a_gaussian_one(simulator, log):
    density = agents.MonteCarloDensity(50)
    settings = {"steps": 800, "learning_rate": 5e-3, "density": density}
    uniform = agents.UniformPolicy(12)
    fresh = agents.DSO(**settings).fit(log, generator=simulator.outputs, logging_policy=uniform)
    ahead = agents.DSO(**settings, refresh=20).fit(log, generator=Black(simulator.outputs), logging_policy=uniform)
    values = [simulator.policy_value(policy).value for policy in (uniform, fresh, ahead)]
    assert values[2] > values[0] + 0.8 * (values[1] - values[0])


def test_callback_watches_and_stops(log):
    seen = []

    def on_step(step, policies):
        seen.append((step, policies[0].probabilities(log.contexts.take(slice(3))).copy()))
        return step == 40

    callback = agents.Callback(every=20, on_step=on_step)
    policy = agents.ImportanceSamplingPG(steps=100).fit(log, callback=callback)
    assert [step for step, _ in seen] == [20, 40]
    np.testing.assert_array_equal(policy.probabilities(log.contexts.take(slice(3))), seen[-1][1])
    assert not np.array_equal(seen[0][1], seen[1][1])


@pytest.mark.filterwarnings("ignore::agents.TrainingWarning")
def test_one_prompt():
    simulator = SyntheticConfig(n_prompts=1).build()
    log = op.collect(simulator, agents.UniformPolicy(1), 50)
    for learner in QUICK:
        policy = learner.fit(log, generator=simulator.outputs)
        assert (policy.probabilities(log.contexts) == 1).all()


def other_catalogue(log: LoggedDataset) -> LoggedDataset:
    return replace(log, prompts=PromptSet(log.prompts.embeddings + 1))


def without_outputs(log: LoggedDataset) -> LoggedDataset:
    return replace(log, output=log.output[:, :0])


@pytest.mark.filterwarnings("ignore::agents.TrainingWarning")
def test_a_log_without_outputs_is_enough_for_prompts(log):
    bare = without_outputs(log)
    assert identical(QUICK[1].fit(bare), QUICK[1].fit(log))
    QUICK[0].fit(bare)


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda s, log: agents.DSO(tau=0.0), ConfigError, "bandwidth > 0, got 0.0"),
        (lambda s, log: agents.DSO(tau=float("nan")), ConfigError, "bandwidth"),
        (lambda s, log: agents.DSO(tau="a"), ConfigError, "bandwidth > 0, got 'a'"),
        (lambda s, log: QUICK[2].fit(log, generator=s), ConfigError, "lacks output_dim, sample; of a simulator pass"),
        (lambda s, log: QUICK[1].fit("log"), ConfigError, "expected a LoggedDataset, got 'log' of type str; read"),
        (lambda s, log: QUICK[1].fit(log, logging_policy=3), ConfigError, "int lacks n_prompts, probabilities"),
        (lambda s, log: agents.logging_policy(PromptEnv(s)), ConfigError, "pass env.unwrapped.simulator"),
        (lambda s, log: agents.online_logging_policy(PromptEnv(s)), ConfigError, "expected a Simulator"),
        (lambda s, log: agents.online_logging_policy(s, online=3), ConfigError, "online: expected a OnlinePG, got 3"),
        (lambda s, log: agents.online_logging_policy(s, beta=-1.0), ConfigError, "beta: expected a finite number ≥ 0"),
        (
            lambda s, log: agents.OnlinePG().fit(PromptEnv(s)),
            ConfigError,
            "expected a Simulator, got <offprompts_env.envs.Pr",
        ),
        (lambda s, log: agents.UniformKernel(-1.0), ConfigError, "bandwidth"),
        (lambda s, log: agents.GaussianKernel(1.0, output_noise=-1.0), ConfigError, "output_noise"),
        (lambda s, log: agents.DSO(refresh=0), ConfigError, "refresh"),
        (lambda s, log: agents.DSO(max_sentences=0), ConfigError, "max_sentences"),
        (lambda s, log: agents.NetworkDensity(max_sentences=-1), ConfigError, "max_sentences"),
        (lambda s, log: agents.ImportanceSamplingPG(clip=0.0), ConfigError, "clip"),
        (lambda s, log: agents.DoublyRobustPG(clip=-1.0), ConfigError, "clip"),
        (
            lambda s, log: agents.DoublyRobustPG().fit(replace(log, propensity=np.full(len(log), np.nan))),
            PropensityError,
            "agents.DoublyRobustPG",
        ),
        (lambda s, log: agents.ImportanceSamplingPG(steps=0), ConfigError, "steps"),
        (lambda s, log: agents.ImportanceSamplingPG(learning_rate=0.0), ConfigError, "learning_rate"),
        (lambda s, log: agents.ImportanceSamplingPG(hidden=(0,)), ConfigError, "hidden"),
        (lambda s, log: agents.Callback(0, lambda step, policies: None), ConfigError, "every"),
        (lambda s, log: QUICK[2].fit(log), ConfigError, "pass generator="),
        (lambda s, log: QUICK[0].fit_many([]), DataError, "at least one log"),
        (lambda s, log: QUICK[1].fit_many([log], seeds=[1, 2]), ConfigError, "seeds: expected 1"),
        (lambda s, log: QUICK[1].fit_many([log, worlds(1)[1][0]]), DimensionError, "log 1"),
        (lambda s, log: QUICK[1].fit(log, logging_policy=agents.UniformPolicy(5)), DimensionError, "12 prompts"),
        (lambda s, log: QUICK[1].fit_many([log], logging_policies=[]), ConfigError, "logging_policies: expected 1"),
        (
            lambda s, log: QUICK[2].fit(other_catalogue(log), generator=s.outputs),
            DimensionError,
            "fingerprint",
        ),
        (
            lambda s, log: QUICK[2].fit(replace(log, output=log.output[:, :3]), generator=s.outputs),
            DimensionError,
            "outputs of dimension 3",
        ),
        (lambda s, log: QUICK[2].fit(without_outputs(log), generator=s.outputs), DataError, "log has no outputs; use"),
        (lambda s, log: agents.SentenceRewardRegression().fit(without_outputs(log)), DataError, "log has no outputs"),
        (
            lambda s, log: QUICK[1].fit(
                replace(log, propensity=np.full(len(log), np.nan)), logging_policy=agents.ConstantPolicy(0, 12)
            ),
            PropensityError,
            "did not record this log",
        ),
        (lambda s, log: QUICK[2].fit(log, generator=Black(s.outputs, broken=True)), NumericalError, "generator"),
        (lambda s, log: agents.PromptRewardRegression().fit(log.take(slice(1))), DataError, "at least 2 rounds"),
        (
            lambda s, log: agents.PromptRewardRegression(steps=300, learning_rate=1e30).fit(log),
            NumericalError,
            "lower learning_rate",
        ),
        (lambda s, log: agents.PromptRewardRegression(train_fraction=1.5), ConfigError, "train_fraction"),
        (lambda s, log: agents.PromptRewardRegression(hidden=()), ConfigError, "hidden"),
        (
            lambda s, log: agents.RegressionPG(rewards=agents.FittedRewards(())).fit(log),
            ConfigError,
            "models: expected 1",
        ),
        (
            lambda s, log: agents.DSO(steps=5, density=agents.KnownDensity((np.zeros(len(log)),))).fit(
                log, generator=s.outputs, logging_policy=agents.UniformPolicy(12)
            ),
            DataError,
            "> 0",
        ),
        (lambda s, log: agents.OnlineCloning().fit(agents.UniformPolicy(5), s), DimensionError, "12 prompts"),
        (lambda s, log: agents.OnlineCloning().fit(3, s), ConfigError, "int lacks n_prompts"),
        (lambda s, log: agents.OnlineCloning().fit_many([], [s]), ConfigError, "policies: expected 1"),
        (
            lambda s, log: agents.OnlineCloning().fit(agents.UniformPolicy(12), PromptEnv(s)),
            ConfigError,
            "expected a Simulator",
        ),
        (
            lambda s, log: agents.OnlineCloning().fit(
                agents.SoftmaxPolicy(lambda contexts: np.full((len(contexts), 12), np.nan), 12), s
            ),
            NumericalError,
            "check the policy",
        ),
        (
            lambda s, log: agents.OnlinePG().fit_many([s, SyntheticConfig(n_prompts=3).build()]),
            DimensionError,
            "simulators",
        ),
    ],
)
def test_wrong_input(act, error, words, simulator, log):
    with pytest.raises(error) as caught:
        act(simulator, log)
    assert words in str(caught.value)
