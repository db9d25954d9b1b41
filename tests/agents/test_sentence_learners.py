"""Learners in the space of sentences: by enumeration, by networks, and one that a researcher adds."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import numpy as np
import pytest

import agents
import offprompts_env as op
from agents.feeds import LoggedRounds
from agents.gradients import ActionDistribution
from agents.sentences import AffineSentences, LearnedSentences, WithPrompts
from agents.worlds import Worlds
from offprompts_env.errors import ConfigError, DataError, DimensionError, NumericalError
from offprompts_env.synthetic import SyntheticConfig
from offprompts_env.types import Contexts, IntArray, LoggedDataset, Outputs

RIDGE = agents.SentenceRewardSearch((agents.PolynomialRidge(1), agents.PolynomialRidge(2)))
MODELS = agents.SentenceModels(RIDGE)
GREEDY = agents.SentenceGreedy(MODELS)
UNIFORM = agents.UniformPolicy(12)
SHORT = 60
NETWORKS = [agents.SentencePG(models=MODELS, steps=SHORT), agents.ExactDSO(steps=SHORT)]
each = pytest.mark.parametrize("learner", [GREEDY, *NETWORKS], ids=lambda learner: type(learner).__name__)


class Black:
    """A generator of which nothing is known but its samples; it keeps what it was asked for."""

    def __init__(self, inner, broken: bool = False):
        self.inner, self.broken = inner, broken
        self.asked, self.calls = [], 0
        self.output_dim, self.prompts = inner.output_dim, inner.prompts

    def sample(self, contexts: Contexts, actions: IntArray, rng: np.random.Generator) -> Outputs:
        self.asked.extend(zip(map(tuple, contexts.query.tolist()), actions.tolist(), strict=True))
        self.calls += 1
        outputs = self.inner.sample(contexts, actions, rng)
        return Outputs(outputs.embedding * np.nan) if self.broken else outputs


def optimality(simulator, policy) -> float:
    """Share of the way from the uniform policy to the best one."""
    contexts = simulator.evaluation_contexts(2_000)
    low, best, value = (
        simulator.policy_value(own, contexts=contexts).value
        for own in (agents.UniformPolicy(simulator.n_prompts), agents.OraclePolicy(simulator), policy)
    )
    return (value - low) / (best - low)


def same(left, right, contexts) -> bool:
    return np.array_equal(left.probabilities(contexts), right.probabilities(contexts))


def test_the_direct_method_is_near_the_oracle_and_its_network_near_it(simulator, log):
    greedy = agents.SentenceGreedy().fit(log, generator=simulator.outputs)
    assert optimality(simulator, greedy) > 0.98
    assert isinstance(greedy.scores.sentences, AffineSentences)
    contexts = simulator.evaluation_contexts(200)
    assert (greedy.probabilities(contexts) == np.eye(12)[greedy.scores(contexts).argmax(axis=1)]).all()
    network = agents.SentencePG(models=MODELS, steps=600, learning_rate=5e-3).fit(log, generator=simulator.outputs)
    assert optimality(simulator, network) > 0.95


def test_exact_dso_beats_the_logging_policy(simulator, log):
    learner = agents.ExactDSO(steps=600, learning_rate=5e-3)
    policy = learner.fit(log, generator=simulator.outputs, logging_policy=UNIFORM)
    assert optimality(simulator, policy) > 0.65
    learned = learner.fit(log, logging_policy=UNIFORM)
    assert optimality(simulator, learned) > 0.65


def test_the_log_alone_is_enough_for_the_direct_method(simulator, log):
    policy = GREEDY.fit(log)
    inner = policy.scores.sentences
    assert isinstance(inner.sentences if isinstance(inner, WithPrompts) else inner, LearnedSentences)
    assert optimality(simulator, policy) > 0.97
    unknown = replace(log, propensity=np.full(len(log), np.nan))
    with warnings.catch_warnings():
        warnings.simplefilter("error", agents.AssumptionWarning)
        assert same(GREEDY.fit(unknown), policy, log.contexts)


@pytest.mark.parametrize(("budget", "asks"), [(0, 4), (1, 4), (3, 4), (10, 1), (10, 4), (200, 4)])
def test_a_budget_of_sentences_is_kept(simulator, log, budget, asks):
    generator = Black(simulator.outputs)
    part = log.take(slice(200))
    learner = agents.SentenceGreedy(replace(MODELS, budget=budget, asks=asks))
    policy = learner.fit(part, generator=generator)
    assert len(generator.asked) == budget
    assert generator.calls == min(asks, budget)
    known = set(map(tuple, part.query.tolist()))
    assert {query for query, _ in generator.asked} <= known
    assert same(learner.fit(part, generator=Black(simulator.outputs)), policy, log.contexts)


def test_sentences_that_are_asked_for_are_of_promising_prompts_and_help():
    """Half of the prompts were never logged: only the generator can tell what they would say."""
    simulator = SyntheticConfig.preset("paper_code", n_prompts=12, reward_std=0.2, seed=4).build()
    log = op.collect(simulator, agents.UniformPolicy(12), 3_000, seed=6)
    known = log.take(log.action < 6)
    values = []
    for budget in (0, 1_500):
        generator = Black(simulator.outputs)
        models = replace(MODELS, budget=budget, prompt_embedding=False)
        policy = agents.SentenceGreedy(models).fit(known, generator=generator)
        values.append(optimality(simulator, policy))
    asked = np.bincount([action for _, action in generator.asked], minlength=12)
    best = np.bincount(simulator.oracle(known.contexts), minlength=12)
    assert asked[6:].sum() > 0
    assert np.corrcoef(asked, best)[0, 1] > 0.5
    assert values[1] > values[0] + 0.2


def test_deficient_support_costs_nothing_where_sentences_are_known(simulator, log):
    known = log.take(log.action < 6)
    policy = GREEDY.fit(known, generator=simulator.outputs)
    assert optimality(simulator, policy) > 0.95
    contexts = simulator.evaluation_contexts(500)
    assert policy.probabilities(contexts)[:, 6:].sum() > 50
    only = op.collect(simulator, agents.ConstantPolicy(3, 12), 500, seed=1)
    assert optimality(simulator, GREEDY.fit(only, generator=simulator.outputs)) > 0.8


def test_binary_rewards():
    simulator = SyntheticConfig.preset("paper_code", n_prompts=12, reward_type="binary", seed=3).build()
    log = op.collect(simulator, UNIFORM, 3_000, seed=5)
    assert set(np.unique(log.reward)) == {0, 1}
    assert optimality(simulator, GREEDY.fit(log, generator=simulator.outputs)) > 0.7


@each
@pytest.mark.filterwarnings("ignore::agents.TrainingWarning")
def test_one_prompt(learner):
    simulator = SyntheticConfig(n_prompts=1).build()
    log = op.collect(simulator, agents.UniformPolicy(1), 50)
    for generator in (simulator.outputs, Black(simulator.outputs)):
        policy = learner.fit(log, generator=generator, logging_policy=agents.UniformPolicy(1))
        assert (policy.probabilities(log.contexts) == 1).all()


@each
def test_a_world_learns_the_same_alone_and_in_a_stack(learner):
    simulators = [SyntheticConfig.preset("paper_code", n_prompts=12, seed=seed).build() for seed in range(2)]
    logs = [op.collect(own, UNIFORM, 90 + 13 * seed, seed=seed) for seed, own in enumerate(simulators)]
    for wrap in (lambda generator: generator, Black):
        generators = [wrap(own.outputs) for own in simulators]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", agents.TrainingWarning)
            together = learner.fit_many(logs, generators=generators, logging_policies=[UNIFORM] * 2, seeds=[7, 8])
            for world in range(2):
                alone = learner.fit(logs[world], generator=generators[world], logging_policy=UNIFORM, seed=7 + world)
                assert same(alone, together[world], logs[world].contexts)


@each
def test_the_oracle_is_never_read(learner, simulator, log):
    class Trap:
        def __getattr__(self, name: str):
            raise AssertionError("a learner read the oracle")

    trapped = replace(log)
    object.__setattr__(trapped, "oracle", Trap())
    first, again = (
        learner.fit(data, generator=simulator.outputs, logging_policy=UNIFORM, seed=1) for data in (log, trapped)
    )
    assert same(first, again, log.contexts)
    assert isinstance(learner, agents.Learner)


def test_the_embedding_of_the_prompt_is_read_where_it_predicts_better(simulator, log):
    """An encoder that loses the sentence: all that is left is the prompt."""
    rng = np.random.default_rng(0)
    lost = replace(log, output=rng.normal(size=log.output.shape))
    kept = GREEDY.fit(log).scores.sentences
    read = GREEDY.fit(lost).scores.sentences
    assert isinstance(read, WithPrompts)
    never = agents.SentenceGreedy(replace(MODELS, prompt_embedding=False)).fit(lost)
    assert not isinstance(never.scores.sentences, WithPrompts)
    forced = agents.SentenceGreedy(replace(MODELS, prompt_embedding=True)).fit(log, generator=simulator.outputs)
    assert isinstance(forced.scores.sentences, WithPrompts)
    assert kept.n_prompts == 12


def test_pessimism_and_exploration(simulator, log):
    part = log.take(slice(300))
    plain = GREEDY.fit(part, generator=simulator.outputs)
    careful = agents.SentenceGreedy(replace(MODELS, pessimism=2.0), epsilon=0.3).fit(part, generator=simulator.outputs)
    assert (careful.scores(part.contexts) < plain.scores(part.contexts)).all()
    pmf = careful.probabilities(part.contexts)
    np.testing.assert_allclose(pmf.min(axis=1), 0.3 / 12, rtol=1e-5)
    np.testing.assert_allclose(pmf.max(axis=1), 0.7 + 0.3 / 12, rtol=1e-5)


def test_policies_save_and_load(simulator, log, tmp_path):
    for learner in (GREEDY, *NETWORKS):
        policy = learner.fit(log, generator=simulator.outputs, logging_policy=UNIFORM)
        again = agents.load_policy(policy.save(tmp_path / type(learner).__name__), log.prompts)
        assert same(again, policy, log.contexts)


def test_constant_rewards_are_told(simulator, log):
    flat = replace(log, reward=np.full(len(log), 0.3))
    with pytest.warns(agents.TrainingWarning, match="cannot tell sentences apart"):
        policy = GREEDY.fit(flat, generator=simulator.outputs)
    np.testing.assert_allclose(policy.scores(log.contexts), 0.3, rtol=1e-4)


def test_a_missing_logging_policy_is_cloned_and_told(simulator, log):
    learner = agents.ExactDSO(steps=5, cloning=agents.BehaviorCloning(steps=SHORT))
    with pytest.warns(agents.AssumptionWarning, match=r"agents\.ExactDSO: no logging policy"):
        learner.fit(log, generator=simulator.outputs)


def squared_weights(policy: ActionDistribution, actions, propensity, reward):
    """A surrogate of a method that nobody needs: importance sampling whose weights are squared."""
    weight = (policy.probability(actions) / propensity).square()
    return -(weight * reward * policy.log_probability(actions)).mean(-1)


@dataclass(frozen=True)
class SquaredPG(agents.OfflinePolicyGradient):
    label = "squared PG"

    def _objective(self, worlds: Worlds) -> agents.Objective[LoggedRounds]:
        columns = (worlds.stack.action, worlds.propensities("SquaredPG"), worlds.stack.reward)
        return agents.Objective.of(
            self._rounds(worlds),
            lambda policy, batch: squared_weights(policy, *(column[batch.rows] for column in columns)),
        )


def test_a_method_is_one_surrogate_and_one_config(simulator, log, tmp_path):
    learner = SquaredPG(steps=400, learning_rate=5e-3)
    policy = learner.fit(log)
    assert optimality(simulator, policy) > 0.6
    parts = [log.take(slice(0, 100)), log.take(slice(100, 250))]
    together = replace(learner, steps=20).fit_many(parts, seeds=[3, 4])
    assert same(replace(learner, steps=20).fit(parts[1], seed=4), together[1], log.contexts)
    assert same(agents.load_policy(policy.save(tmp_path), log.prompts), policy, log.contexts)
    tree = replace(learner, steps=20, tree=agents.TreeSoftmax())
    assert tree.fit(log).n_prompts == 12
    with pytest.raises(DimensionError, match="12 prompts"):
        learner.fit(log, logging_policy=agents.UniformPolicy(5))


def without_outputs(log: LoggedDataset) -> LoggedDataset:
    return replace(log, output=log.output[:, :0])


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda s, log: agents.SentenceModels(budget=-1), ConfigError, "budget"),
        (lambda s, log: agents.SentenceModels(asks=0), ConfigError, "asks"),
        (lambda s, log: agents.SentenceModels(pessimism=float("nan")), ConfigError, "pessimism"),
        (lambda s, log: agents.SentenceGreedy(epsilon=1.5), ConfigError, "epsilon"),
        (lambda s, log: agents.SentenceGreedy(epsilon=-0.1), ConfigError, "epsilon"),
        (lambda s, log: agents.ExactDSO(tau=0.0), ConfigError, "bandwidth > 0"),
        (lambda s, log: agents.ExactDSO(clip=0.0), ConfigError, "clip"),
        (lambda s, log: agents.ExactDSO(output_noise=-1.0), ConfigError, "output_noise"),
        (lambda s, log: agents.SentencePG(steps=0), ConfigError, "steps"),
        (lambda s, log: GREEDY.fit(without_outputs(log)), DataError, "log has no outputs"),
        (lambda s, log: NETWORKS[0].fit(without_outputs(log)), DataError, "a sentence-level method: the log has no"),
        (lambda s, log: NETWORKS[1].fit(without_outputs(log), logging_policy=UNIFORM), DataError, "log has no outputs"),
        (lambda s, log: GREEDY.fit(log.take(slice(2)), generator=s.outputs), DataError, "at least 3 rounds"),
        (lambda s, log: agents.SentenceGreedy().fit(log.take(slice(8))), DataError, "at least 10 rounds, got 8"),
        (
            lambda s, log: agents.SentenceGreedy(replace(MODELS, budget=5)).fit(log),
            ConfigError,
            "a budget of sentences asks the frozen generator",
        ),
        (
            lambda s, log: agents.SentenceGreedy(replace(MODELS, budget=5)).fit(
                log, generator=Black(s.outputs, broken=True)
            ),
            NumericalError,
            "finite output embeddings",
        ),
        (
            lambda s, log: GREEDY.fit(replace(log, output=log.output[:, :3]), generator=s.outputs),
            DimensionError,
            "outputs of dimension 3",
        ),
        (lambda s, log: NETWORKS[1].fit(log, logging_policy=agents.UniformPolicy(5)), DimensionError, "12 prompts"),
        (
            lambda s, log: GREEDY.fit(log).probabilities(Contexts(log.context, log.query[:, :2])),
            DimensionError,
            "expected",
        ),
        (
            lambda s, log: replace(NETWORKS[0], tree=agents.TreeSoftmax()).fit(log),
            ConfigError,
            "learn with tree=None",
        ),
        (
            lambda s, log: agents.ExactDSO(tau=0.01, output_noise=0.0).fit(
                replace(log, output=log.output + 1e4), generator=s.outputs, logging_policy=UNIFORM
            ),
            NumericalError,
            "wider kernel",
        ),
    ],
)
def test_wrong_input(act, error, words, simulator, log):
    with pytest.raises(error) as caught:
        act(simulator, log)
    assert words in str(caught.value)
