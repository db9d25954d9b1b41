"""What prompts would say, known and learned, against explicit features; and policies that are built on it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

import agents
from agents import sentences as module
from agents.records import revive
from agents.ridge import interactions
from agents.sentence_rewards import predict, side_by_side
from agents.sentences import (
    AffineSentences,
    KnownSentences,
    LearnedSentences,
    SentenceMeans,
    WithPrompts,
    known_sentences,
)
from offprompts_env.errors import ConfigError, DataError, DimensionError, NumericalError
from offprompts_env.types import Contexts, FloatArray, LoggedDataset, PromptSet

RNG = np.random.default_rng(0)
A, D_X, D_Q, D_E, D_O = 6, 2, 3, 2, 4
PROMPTS = PromptSet(RNG.normal(size=(A, D_E)))


@dataclass
class Bent:
    """A Gaussian generator with any base."""

    curve: float = 0.0
    level: float = 0.5
    prompts = PROMPTS
    output_dim = D_O

    def __post_init__(self):
        rng = np.random.default_rng(1)
        self.matrix = rng.normal(size=(D_Q, D_O))
        self.effects = rng.normal(size=(A, D_O)).astype(np.float32)
        self.noise_std = np.array([0.1, 0.2, 0.3, 0.0], dtype=np.float32)

    def base(self, contexts):
        linear = contexts.query @ self.matrix + self.level
        return linear + self.curve * np.maximum(contexts.query[:, :1] - 8, 0)

    def sample(self, contexts, actions, rng):
        raise AssertionError("the closed form is known")


def rounds(n: int, seed: int = 5) -> Contexts:
    rng = np.random.default_rng(seed)
    return Contexts(rng.normal(size=(n, D_X)), rng.normal(size=(n, D_Q)))


def means_by_features(model: LearnedSentences, contexts: Contexts) -> FloatArray:
    """``φ(q, e_a) W`` of every pair, one by one; offsets of queries that are known."""
    known = {tuple(row): offset for row, offset in zip(model.queries, model.query_offsets, strict=True)}
    expected = np.empty((len(contexts), A, D_O))
    for i, query in enumerate(contexts.query):
        for a, embedding in enumerate(model.embeddings):
            features = interactions(query[None].astype(float), embedding[None].astype(float), 2)
            expected[i, a] = (features @ model.weights)[0] + model.offsets[a] + known.get(tuple(query), 0)
    return expected


def bilinear(query: FloatArray, action: FloatArray, seed: int = 2) -> FloatArray:
    """Means that are linear in the query, in the embedding, in their products, and have an offset a prompt."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(D_Q + D_E + D_Q * D_E, D_O))
    embedding = PROMPTS.embeddings[action]
    products = (query[:, :, None] * embedding[:, None, :]).reshape(len(query), -1)
    offsets = rng.normal(size=(A, D_O))
    return np.concatenate([query, embedding, products], axis=1) @ weights + offsets[action]


def test_known_sentences_are_the_generators_means(simulator):
    contexts = simulator.evaluation_contexts(20)
    generator = simulator.outputs
    for means in (KnownSentences(generator), known_sentences(generator, 5, 5)):
        assert (means.n_prompts, means.output_dim) == (12, 5)
        assert isinstance(means, SentenceMeans)
        np.testing.assert_array_equal(means.noise_std, generator.noise_std)
        found = means.means(contexts)
        for a in range(12):
            np.testing.assert_allclose(found[:, a], generator.mean(contexts, np.full(20, a)), atol=1e-5)


def test_an_affine_base_is_found_and_saves():
    means = known_sentences(Bent(), D_X, D_Q)
    assert isinstance(means, AffineSentences)
    contexts = rounds(30)
    np.testing.assert_allclose(means.means(contexts), KnownSentences(Bent()).means(contexts), atol=1e-5)
    again = revive(means.to_record(), "sentence means")
    np.testing.assert_array_equal(again.means(contexts), means.means(contexts))
    np.testing.assert_array_equal(again.noise_std, means.noise_std)


def test_a_base_that_bends_far_out_is_not_taken_for_an_affine_one():
    means = known_sentences(Bent(curve=1.0), D_X, D_Q)
    assert isinstance(means, KnownSentences)
    far = Contexts(np.zeros((1, D_X)), np.full((1, D_Q), 12.0))
    np.testing.assert_allclose(means.means(far)[0] - Bent().base(far) - Bent().effects, 4.0, atol=1e-5)
    with pytest.raises(ConfigError, match=r"affine.*SentencePG"):
        means.to_record()


@pytest.mark.parametrize("part", ["effects", "noise_std", "level"])
def test_a_generator_that_is_not_finite_is_told(part):
    generator = Bent()
    setattr(generator, part, np.nan if part == "level" else getattr(generator, part) + np.inf)
    with pytest.raises(NumericalError, match="expected finite base, effects and noise"):
        known_sentences(generator, D_X, D_Q)


@pytest.mark.parametrize("repeats", [True, False])
def test_learned_means_are_those_of_explicit_features(repeats):
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(5 if repeats else 200, D_Q)).astype(np.float32)
    query = queries[rng.integers(len(queries), size=200)] if repeats else queries
    # The last prompt was never logged.
    action = rng.integers(A - 1, size=200)
    sentence = bilinear(query, action) + 0.3 * rng.normal(size=(200, D_O))
    model = agents.SentenceRegression().fit(query, action, sentence, PROMPTS.embeddings)
    assert len(model.queries) == (5 if repeats else 0)
    assert (np.abs(model.query_offsets).max(initial=0) > 0) == repeats
    probe = Contexts(np.zeros((8, D_X)), np.concatenate([query[:4], query[:1], rng.normal(size=(3, D_Q))]))
    np.testing.assert_allclose(model.means(probe), means_by_features(model, probe), atol=2e-4)
    again = revive(model.to_record(), "sentence means")
    np.testing.assert_array_equal(again.means(probe), model.means(probe))
    assert again.explained == model.explained


def test_offsets_of_prompts_never_logged_are_the_common_one():
    rng = np.random.default_rng(0)
    query, action = rng.normal(size=(100, D_Q)).astype(np.float32), rng.integers(A - 1, size=100)
    model = agents.SentenceRegression().fit(query, action, bilinear(query, action), PROMPTS.embeddings)
    level = model.offsets[A - 1]
    residual = bilinear(query, action) - interactions(query, PROMPTS.embeddings[action], 2) @ model.weights - level
    for a in range(A - 1):
        own = residual[action == a]
        np.testing.assert_allclose(model.offsets[a] - level, own.sum(axis=0) / (len(own) + 3.0), atol=1e-4)


def test_a_query_is_known_whatever_the_sign_of_its_zeros():
    query = np.repeat(np.array([[0.0, 1.0, 2.0], [3.0, -1.0, 0.0]], np.float32), 30, axis=0)
    action = np.tile(np.arange(A), 10)
    sentence = bilinear(query, action) + np.repeat([[5.0], [-5.0]], 30, axis=0) * np.ones(D_O)
    model = agents.SentenceRegression().fit(query, action, sentence, PROMPTS.embeddings)
    probe = Contexts(np.zeros((2, D_X)), np.array([[0.0, 1.0, 2.0], [-0.0, 1.0, 2.0]]))
    np.testing.assert_array_equal(model.means(probe)[0], model.means(probe)[1])
    assert np.abs(model.query_offsets).max() > 0


def test_a_bilinear_generator_is_recovered():
    rng = np.random.default_rng(0)
    query, action = rng.normal(size=(3_000, D_Q)).astype(np.float32), rng.integers(A, size=3_000)
    sentence = bilinear(query, action) + 0.2 * rng.normal(size=(3_000, D_O))
    model = agents.SentenceRegression().fit(query, action, sentence, PROMPTS.embeddings)
    contexts = rounds(20)
    found = model.means(contexts)
    for a in range(A):
        expected = bilinear(contexts.query, np.full(20, a))
        assert np.sqrt(np.mean((found[:, a] - expected) ** 2)) < 0.05 * expected.std()
    np.testing.assert_allclose(model.noise_std, 0.2, rtol=0.1)


def test_the_share_explained_is_leave_one_out():
    rng = np.random.default_rng(0)
    query, action = rng.normal(size=(40, D_Q)).astype(np.float32), rng.integers(A, size=40)
    noise = agents.SentenceRegression().fit(query, action, rng.normal(size=(40, D_O)), PROMPTS.embeddings)
    exact = agents.SentenceRegression().fit(query, action, query @ rng.normal(size=(D_Q, D_O)), PROMPTS.embeddings)
    assert noise.explained < 0.2
    assert exact.explained > 0.99
    constant = agents.SentenceRegression().fit(query, action, np.ones((40, D_O)), PROMPTS.embeddings)
    assert np.isnan(constant.explained)
    np.testing.assert_allclose(constant.means(rounds(3)), 1, rtol=1e-6)


def test_prompts_are_appended():
    means = WithPrompts(known_sentences(Bent(), D_X, D_Q), PROMPTS.embeddings)
    contexts = rounds(7)
    found = means.means(contexts)
    assert found.shape == (7, A, D_O + D_E) == (7, means.n_prompts, means.output_dim)
    np.testing.assert_array_equal(found[..., :D_O], means.sentences.means(contexts))
    for row in found:
        np.testing.assert_array_equal(row[:, D_O:], PROMPTS.embeddings)
    np.testing.assert_array_equal(means.noise_std, [*Bent().noise_std, 0, 0])
    again = revive(means.to_record(), "sentence means")
    np.testing.assert_array_equal(again.means(contexts), found)


def logged(n: int = 60) -> LoggedDataset:
    rng = np.random.default_rng(0)
    contexts, action = rounds(n), rng.integers(A, size=n)
    output = Bent().base(contexts) + Bent().effects[action] + 0.1 * rng.normal(size=(n, D_O))
    return LoggedDataset(
        context=contexts.context,
        query=contexts.query,
        action=action,
        propensity=np.full(n, 1 / A),
        reward=contexts.context[:, 0] * output[:, 1] + 0.1 * rng.normal(size=n),
        output=output,
        prompts=PROMPTS,
    )


NETWORKS = agents.NetworkEnsemble(hidden=(8,), folds=3, steps=40, batch_size=16, look_every=10)


def scores(source, *, appended: bool = False, learned: bool = False, pessimism: float = 0.0) -> agents.SentenceScores:
    log = logged()
    if appended:
        joined = replace(log, output=np.concatenate([log.output, PROMPTS.embeddings[log.action]], axis=1))
        (rewards,) = source.fit_many([joined])
    else:
        (rewards,) = source.fit_many([log])
    sentences: SentenceMeans = known_sentences(Bent(), D_X, D_Q)
    if learned:
        sentences = agents.SentenceRegression().fit(log.query, log.action, log.output, PROMPTS.embeddings)
    return agents.SentenceScores(
        rewards, WithPrompts(sentences, PROMPTS.embeddings) if appended else sentences, pessimism
    )


@pytest.mark.parametrize("source", [agents.PolynomialRidge(2), NETWORKS], ids=["polynomial", "networks"])
def test_scores_are_predictions_at_mean_sentences(source, monkeypatch):
    contexts = rounds(9)
    own = scores(source, pessimism=0.7)
    means, inputs = own.sentences.means(contexts), side_by_side(contexts)
    expected = np.empty((9, A))
    for i in range(9):
        for a in range(A):
            expected[i, a] = predict(own.rewards, inputs[i : i + 1], means[i : i + 1, a : a + 1], 0.7)[0, 0]
    found = own(contexts)
    assert own.n_prompts == A
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(module, "_BLOCK", 2 * A * 128)
    np.testing.assert_allclose(own(contexts), found, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(own.of_member(1, contexts), own.rewards.member(1, inputs, means), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("appended", [False, True])
def test_scores_of_the_logged_sentences(appended):
    log = logged()
    own = scores(agents.PolynomialRidge(1), appended=appended)
    sentence = np.concatenate([log.output, PROMPTS.embeddings[log.action]], axis=1) if appended else log.output
    expected = predict(own.rewards, side_by_side(log.contexts), sentence[:, None])[:, 0]
    np.testing.assert_array_equal(own.logged(log), expected)


@pytest.mark.parametrize("source", [agents.PolynomialRidge(1), agents.PolynomialRidge(2), NETWORKS])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("appended", [False, True])
def test_greedy_policies_load_back_with_the_same_bits(source, learned, appended, tmp_path):
    own = scores(source, appended=appended, learned=learned, pessimism=0.3)
    policy = agents.EpsilonGreedyPolicy(own, A, 0.1, PROMPTS.fingerprint)
    agents.save_policy(policy, tmp_path)
    again = agents.load_policy(tmp_path, PROMPTS)
    contexts = rounds(50)
    np.testing.assert_array_equal(again.scores(contexts), own(contexts))
    np.testing.assert_array_equal(again.probabilities(contexts), policy.probabilities(contexts))
    assert again.scores.rewards.validation == own.rewards.validation
    np.testing.assert_array_equal(again.scores.of_member(2, contexts), own.of_member(2, contexts))


def test_policies_on_a_base_that_bends_do_not_save(tmp_path):
    own = agents.SentenceScores(scores(agents.PolynomialRidge(1)).rewards, KnownSentences(Bent(curve=1.0)))
    with pytest.raises(ConfigError, match=r"base\(q\) is affine"):
        agents.save_policy(agents.EpsilonGreedyPolicy(own, A), tmp_path)


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda: agents.SentenceRegression(prompt_shrinkage=0.0), ConfigError, "prompt_shrinkage"),
        (lambda: agents.SentenceRegression(query_shrinkage=-1.0), ConfigError, "query_shrinkage"),
        (lambda: agents.SentenceRegression(sweeps=0), ConfigError, "sweeps"),
        (
            lambda: agents.SentenceRegression().fit(
                np.zeros((2, D_Q)), np.zeros(2, int), np.zeros((2, D_O)), PROMPTS.embeddings
            ),
            DataError,
            "at least 3 with embeddings",
        ),
        (
            lambda: agents.SentenceRegression().fit(
                np.zeros((9, D_Q)), np.zeros(9, int), np.zeros((9, 0)), PROMPTS.embeddings
            ),
            DataError,
            "record a log with outputs",
        ),
        (
            lambda: scores(agents.PolynomialRidge(1))(Contexts(np.full((2, D_X), np.nan), np.zeros((2, D_Q)))),
            NumericalError,
            "row 0; check the contexts and the generator",
        ),
        (
            lambda: scores(agents.PolynomialRidge(1))(Contexts(np.zeros((2, D_X)), np.zeros((2, D_Q + 1)))),
            DimensionError,
            "context and query of 5 dimensions together, got 6",
        ),
        (
            lambda: scores(agents.PolynomialRidge(1), learned=True)(Contexts(np.zeros((2, D_X)), np.zeros((2, 1)))),
            DimensionError,
            "queries of dimension 3, got 1",
        ),
    ],
)
def test_wrong_input(act, error, words):
    with pytest.raises(error) as caught:
        act()
    assert words in str(caught.value)
