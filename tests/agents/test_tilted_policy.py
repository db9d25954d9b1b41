from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import agents
from agents.networks import MLP
from agents.sentences import WithPrompts, known_sentences
from offprompts_env.errors import ConfigError, DimensionError
from offprompts_env.sampling import sample_actions
from offprompts_env.types import Contexts, Policy, PromptSet

NETWORKS = agents.SentenceRewardSearch((agents.NetworkEnsemble(hidden=(8,), steps=60),))
POLYNOMIALS = agents.SentenceRewardSearch((agents.PolynomialRidge(2),))


def contexts_of(n: int) -> Contexts:
    return Contexts(np.zeros((n, 5)), np.zeros((n, 5)))


def tilt(n_prompts: int = 12) -> MLP:
    rng = np.random.default_rng(0)
    return MLP(tuple(rng.standard_normal(shape).astype(np.float32) for shape in ((11, 6), (7, n_prompts))))


@pytest.fixture(scope="module")
def means(simulator, log):
    known = known_sentences(simulator.outputs, 5, 5)
    learned = agents.SentenceRegression().fit(log.query, log.action, log.output, log.prompts.embeddings)
    return {
        "known": known,
        "learned": learned,
        "with prompts": WithPrompts(known, log.prompts.embeddings),
    }


def test_the_pmf_is_the_formula(log):
    scores = np.linspace(-2, 3, 12, dtype=np.float32)
    policy = agents.TiltedPolicy(lambda contexts: np.tile(scores, (len(contexts), 1)), 1.5, tilt())
    contexts = log.contexts.take(slice(50))
    inputs = np.concatenate([contexts.context, contexts.query, np.ones((50, 1))], axis=1)
    first, last = policy.network.layers
    hidden = np.maximum(inputs @ first.astype(np.float64), 0)
    weights = np.exp(1.5 * scores + np.column_stack([hidden, np.ones(50)]) @ last)
    expected = weights / weights.sum(axis=1, keepdims=True)
    assert isinstance(policy, Policy)
    assert policy.n_prompts == 12
    np.testing.assert_allclose(policy.probabilities(contexts), expected, rtol=2e-3, atol=1e-7)


def test_without_scores_or_without_a_tilt_it_is_the_other_part_alone(log):
    contexts = log.contexts.take(slice(20))

    def scores(contexts):
        return np.tile(np.arange(12, dtype=np.float32), (len(contexts), 1))

    flat = MLP(tuple(np.zeros_like(layer) for layer in tilt().layers))
    alone, scored = agents.NeuralPolicy(tilt()), agents.SoftmaxPolicy(scores, 12, beta=0.5)
    pairs = [(agents.TiltedPolicy(scores, 0.0, tilt()), alone), (agents.TiltedPolicy(scores, 0.5, flat), scored)]
    for tilted, expected in pairs:
        np.testing.assert_allclose(tilted.probabilities(contexts), expected.probabilities(contexts), rtol=1e-5)


def test_scores_are_not_written_to():
    held = np.ones((3, 12), dtype=np.float32)
    contexts = contexts_of(3)
    agents.TiltedPolicy(lambda contexts: held, 2.0, tilt()).probabilities(contexts)
    assert (held == 1).all()


def test_extreme_scores_do_not_overflow():
    policy = agents.TiltedPolicy(lambda contexts: np.tile(np.linspace(-1e5, 1e5, 12), (len(contexts), 1)), 1e3, tilt())
    pmf = policy.probabilities(contexts_of(2))
    np.testing.assert_array_equal(pmf, np.eye(12)[[11, 11]])


def test_it_samples_from_its_pmf(log):
    policy = agents.TiltedPolicy(lambda contexts: np.zeros((len(contexts), 12), dtype=np.float32), 0.0, tilt())
    contexts = log.contexts.take(slice(1)).repeat(20_000)
    actions, propensities = sample_actions(policy, contexts, np.random.default_rng(0))
    pmf = policy.probabilities(contexts)
    np.testing.assert_allclose(propensities, pmf[np.arange(20_000), actions], rtol=1e-6)
    assert np.abs(np.bincount(actions, minlength=12) / 20_000 - pmf[0]).max() < 0.02


@pytest.mark.parametrize("sentences", ["known", "learned", "with prompts"])
@pytest.mark.parametrize("rewards", [NETWORKS, POLYNOMIALS], ids=["networks", "polynomials"])
@pytest.mark.filterwarnings("ignore::agents.TrainingWarning")
def test_it_loads_back_with_the_same_bits(sentences, rewards, means, log, tmp_path):
    data = log
    if sentences == "with prompts":
        data = replace(log, output=np.concatenate([log.output, log.prompts.embeddings[log.action]], axis=1))
    scores = agents.SentenceScores(rewards.fit(data), means[sentences], pessimism=0.5)
    policy = agents.TiltedPolicy(scores, 2.5, tilt(), log.prompts.fingerprint)
    again = agents.load_policy(policy.save(tmp_path / "p"), log.prompts)
    assert type(again) is agents.TiltedPolicy
    assert (again.beta, again.catalogue, again.scores.pessimism) == (2.5, log.prompts.fingerprint, 0.5)
    assert again.scores.rewards.validation == scores.rewards.validation
    assert np.array_equal(again.probabilities(log.contexts), policy.probabilities(log.contexts))
    with pytest.raises(DimensionError, match="fingerprint"):
        agents.load_policy(tmp_path / "p", PromptSet(log.prompts.embeddings + 1))


def test_scores_of_a_function_do_not_save(tmp_path):
    policy = agents.TiltedPolicy(lambda contexts: np.zeros((len(contexts), 12)), 1.0, tilt())
    with pytest.raises(ConfigError, match=r"TiltedPolicy\.save: expected scores of a reward model .*BehaviorCloning"):
        policy.save(tmp_path / "p")
