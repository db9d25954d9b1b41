"""Cosine rewards: the taste space against direct refits, equations by hand, and exact values where prompts speak."""

from __future__ import annotations

import json

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import agents
import offprompts_env as op
from offprompts_env.errors import ActionError, ConfigError, DataError, DimensionError
from offprompts_env.movielens.bundle import MANIFEST, Bundle, BundleInfo, write_manifest
from offprompts_env.movielens.cosine import CosineLikes, EchoedPrompts, PromptCosineReward, TasteSpace
from offprompts_env.movielens.parts import MovieLensConfig
from offprompts_env.simulator import EnumerableOutputs, RewardModel
from offprompts_env.text.freezing import freeze
from offprompts_env.text.language_model import CausalLM
from offprompts_env.types import Contexts, Outputs, PromptSet
from tests.tiny_bundle import KEYWORDS, TITLES, make_tiny_bundle, write_csv

ID = "OffPrompts-MovieLens-v0"
GENRES = ("Drama", "War", "Drama|War", "Drama", "War", "War")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> str:
    """The tiny bundle, with movies that differ."""
    folder = make_tiny_bundle(tmp_path_factory.mktemp("cosine") / "bundle")
    rows = [(200 + i, title, GENRES[i], 1965 + 2 * i) for i, title in enumerate(TITLES)]
    write_csv(folder / "items.csv", ("item_id", "title", "genres", "year"), rows)
    described = json.loads((folder / MANIFEST).read_text())
    for name in ("files", "format_version"):
        described.pop(name)
    (folder / MANIFEST).unlink()
    write_manifest(folder, BundleInfo(**described))
    return str(folder)


@pytest.fixture
def mute(monkeypatch) -> None:
    """No language model can write."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a language model wrote")

    monkeypatch.setattr(CausalLM, "generate", refuse)


@pytest.fixture
def echo(bundle, mute) -> op.Simulator:
    return MovieLensConfig(bundle=bundle, simulator="prompt-cosine").build()


def users(vectors) -> Contexts:
    context = np.asarray(vectors, dtype=np.float32)
    return Contexts(context, np.zeros((len(context), 1), dtype=np.float32))


def plain_space(k: int = 2) -> TasteSpace:
    return TasteSpace(tuple("abc"[:k]), np.arange(k), np.zeros(k, np.float32), np.eye(k, dtype=np.float32), np.ones(k))


class TestTasteSpace:
    def planted(self, n=60, noise=0.3):
        rng = np.random.default_rng(0)
        features = (rng.random((n, 3)) < 0.4).astype(float)
        states = features[:, :2] @ rng.normal(size=(2, 8)) + noise * rng.normal(size=(n, 8)) + 5
        return states, features

    def test_told_features_are_found_and_others_are_not(self):
        states, features = self.planted()
        space = TasteSpace.fit(states, features, ("told", "too", "silent"), np.array([2, 0, 4]))
        assert space.explained[:2].min() > 0.8
        assert space.explained[2] < 0.2
        found = space.of_states(states)
        assert found.dtype == np.float32
        for column in range(2):
            assert np.corrcoef(found[:, column], features[:, column])[0, 1] > 0.9

    def test_penalty_has_the_smallest_error_of_refits_without_each_movie(self):
        states, features = self.planted(n=25, noise=1.0)
        space = TasteSpace.fit(states, features, "abc", np.arange(3))
        target = (features - features.mean(0)) / features.std(0)
        largest = np.linalg.eigvalsh(np.cov(states.T, bias=True) * len(states))[-1]

        def weights(rows, penalty):
            centred = states[rows] - states[rows].mean(0)
            inside = centred.T @ (target[rows] - target[rows].mean(0))
            return np.linalg.solve(centred.T @ centred + penalty * np.eye(8), inside)

        def error(penalty):
            off = []
            for row in range(25):
                others = np.arange(25) != row
                predicted = target[others].mean(0) + (states[row] - states[others].mean(0)) @ weights(others, penalty)
                off.append(np.square(predicted - target[row]))
            return np.mean(off, axis=0)

        tried = [largest * 10.0**power for power in range(-7, 1)]
        errors = [error(penalty) for penalty in tried]
        best = int(np.argmin([own.sum() for own in errors]))
        assert 0 < best < len(tried) - 1
        np.testing.assert_allclose(space.weights, weights(np.full(25, True), tried[best]), rtol=1e-3, atol=1e-5)
        baseline = [np.square(target[np.arange(25) != row].mean(0) - target[row]) for row in range(25)]
        np.testing.assert_allclose(space.explained, 1 - errors[best] / np.mean(baseline, axis=0), atol=1e-9)

    def test_cosine_is_that_of_vectors_and_zero_for_nothing(self):
        context = users([[3, 4], [3, 4], [0, 0], [1, 0], [-2, -2]])
        tastes = np.array([[4, 3], [0, 0], [1, 1], [-5, 0], [-1, -1]], dtype=np.float32)
        np.testing.assert_allclose(plain_space().cosine(context, tastes), [24 / 25, 0, 0, -1, 1], atol=1e-6)
        assert np.abs(plain_space().cosine(context, tastes)).max() <= 1

    def test_only_shared_features_of_a_user_count(self):
        space = TasteSpace(
            ("a", "b"), np.array([2, 0]), np.zeros(2, np.float32), np.eye(2, dtype=np.float32), np.ones(2)
        )
        one, other = users([[1, 7, 2]]), users([[1, -9, 2]])
        tastes = np.array([[2, 1]], dtype=np.float32)
        assert space.cosine(one, tastes) == space.cosine(other, tastes) == pytest.approx(1)

    def test_wrong_input(self):
        with pytest.raises(DataError, match="at least 3 movies"):
            TasteSpace.fit(np.eye(2), np.eye(2), "ab", np.arange(2))
        with pytest.raises(DataError, match="differ between them"):
            TasteSpace.fit(np.eye(4), np.ones((4, 1)), "a", np.arange(1))
        with pytest.raises(DimensionError, match="users of at least 2 dimensions"):
            plain_space().cosine(users([[1]]), np.ones((1, 2)))
        with pytest.raises(DimensionError, match=r"tastes \(2, 2\)"):
            plain_space().cosine(users([[1, 1], [1, 2]]), np.ones((1, 2)))

    def test_users_and_items_need_common_features(self, tmp_path):
        with pytest.raises(ConfigError, match="at least 2 features that describe users and items alike, got 0"):
            TasteSpace.of_bundle(Bundle.open(make_tiny_bundle(tmp_path / "alike")))


class TestSentences:
    def test_reward_is_the_gain_in_cosine(self, bundle):
        simulator = MovieLensConfig(bundle=bundle, simulator="sentence-cosine", reward_scale=4).build()
        reward = simulator.rewards
        assert isinstance(reward.model, CosineLikes)
        opened = Bundle.open(bundle)
        space = TasteSpace.of_bundle(opened)
        assert space.names == ("Drama", "War", "1970s")
        rng = np.random.default_rng(0)
        contexts = simulator.contexts.sample(9, rng)
        outputs = simulator.outputs.sample(contexts, np.arange(9) % 8, rng)
        found = reward.mean(contexts, outputs)

        def cosine(user, text):
            taste = space.of_states(opened.reward_encoder.encode([text]))[0]
            return user @ taste / np.linalg.norm(user) / np.linalg.norm(taste)

        for row, (user, query, text) in enumerate(
            zip(contexts.context, contexts.query_text, outputs.text, strict=True)
        ):
            without = np.mean([cosine(user, told) for told in opened.no_prompt_sentences[query]])
            assert found[row] == pytest.approx(2 * (cosine(user, text) - without), abs=1e-3)
        assert np.abs(found).max() <= 4

    def test_binary_reward_is_a_probability(self, bundle):
        simulator = MovieLensConfig(bundle=bundle, simulator="sentence-cosine", reward_type="binary").build()
        contexts = simulator.contexts.sample(30, np.random.default_rng(0))
        rounds = simulator.play(contexts, np.arange(30) % 8, np.random.default_rng(1), np.random.default_rng(2))
        assert 0 <= rounds.expected_reward.min() < 0.5 < rounds.expected_reward.max() <= 1
        assert set(rounds.reward) == {0, 1}

    def test_frozen_sentences_are_judged_alike(self, bundle, tmp_path):
        live = MovieLensConfig(bundle=bundle, simulator="sentence-cosine").build()
        titles = live.contexts.rounds(np.zeros(6, dtype=np.int64), np.arange(6))
        told = {title: live.rewards.unprompted.about([title])[0] for title in TITLES}
        freeze(live.outputs, titles, tmp_path / "table", samples=2, no_prompt=told)
        replay = MovieLensConfig(bundle=bundle, simulator="sentence-cosine", sentences=tmp_path / "table").build()
        contexts = replay.contexts.sample(9, np.random.default_rng(0))
        outputs = replay.outputs.sample(contexts, np.arange(9) % 8, np.random.default_rng(1))
        expected = live.rewards.mean(contexts, outputs)
        np.testing.assert_allclose(replay.rewards.mean(contexts, outputs), expected, atol=1e-4)
        assert expected.std() > 0


class TestPrompts:
    def test_output_is_the_prompt(self):
        prompts = PromptSet(np.arange(6, dtype=np.float32).reshape(3, 2), ("a", "b", "c"))
        outputs = EchoedPrompts(prompts)
        assert isinstance(outputs, EnumerableOutputs)
        assert outputs.outcomes == 1
        assert outputs.output_dim == 2
        answered = outputs.sample(users(np.ones((4, 2))), np.array([2, 0, 2, 1]), np.random.default_rng(0))
        assert answered.text.tolist() == ["c", "a", "c", "b"]
        np.testing.assert_array_equal(answered.embedding, prompts.embeddings[[2, 0, 2, 1]])
        with pytest.raises(ActionError):
            outputs.sample(users(np.ones((1, 2))), np.array([3]), np.random.default_rng(0))
        with pytest.raises(DataError, match="prompts with texts"):
            EchoedPrompts(PromptSet(prompts.embeddings))

    def test_expected_rewards_are_those_of_every_prompt_played(self, echo):
        contexts = echo.contexts.sample(15, np.random.default_rng(0))
        exact = echo.expected_rewards(contexts)
        assert exact.shape == (15, len(KEYWORDS))
        for action in range(echo.n_prompts):
            rngs = np.random.default_rng(action), np.random.default_rng(action + 50)
            played = echo.play(contexts, np.full(15, action), *rngs)
            np.testing.assert_allclose(played.expected_reward, exact[:, action], atol=1e-6)
        np.testing.assert_array_equal(echo.oracle(contexts), exact.argmax(axis=1))
        assert np.abs(exact).max() <= echo.rewards.scale / 2
        assert exact.std(axis=1).min() > 0

    def test_expected_rewards_are_the_cosine(self, bundle, echo):
        opened = Bundle.open(bundle)
        space = TasteSpace.of_bundle(opened)
        states = space.of_states(opened.reward_encoder.encode(list(KEYWORDS)))
        tastes = states - states.mean(axis=0)
        contexts = echo.contexts.sample(7, np.random.default_rng(0))
        inner = contexts.context[:, space.columns] @ tastes.T
        lengths = np.linalg.norm(contexts.context, axis=1)[:, None] * np.linalg.norm(tastes, axis=1)
        np.testing.assert_allclose(echo.expected_rewards(contexts), 5 * inner / lengths, atol=1e-3)

    def test_truth_is_exact(self, echo):
        truth = op.Truth.enumerated(echo, users=5, movies=6)
        exact = echo.expected_rewards(truth.contexts)
        np.testing.assert_allclose(truth.score, exact, atol=1e-6)
        best = exact.max(axis=1).mean()
        assert truth.oracle().value == pytest.approx(best, abs=1e-5)
        assert truth.references()["no prompt"].value == 0
        uniform = agents.UniformPolicy(echo.n_prompts)
        assert truth.value(uniform).value == pytest.approx(exact.mean(), abs=1e-5)
        optimal = agents.OraclePolicy(echo)
        assert echo.policy_value(optimal, contexts=truth.contexts).value == pytest.approx(best, abs=1e-5)

    def test_the_carrier_is_taken_out(self, bundle):
        opened = Bundle.open(bundle)
        space, encoder = TasteSpace.of_bundle(opened), opened.reward_encoder
        reward = PromptCosineReward(space, 3, encoder, carrier="w3 w4 {text} w5", catalogue=KEYWORDS)
        assert isinstance(reward, RewardModel)
        np.testing.assert_allclose(reward.tastes(KEYWORDS).mean(axis=0), 0, atol=1e-5)
        carried = space.of_states(encoder.encode([f"w3 w4 {word} w5" for word in (*KEYWORDS, "w9")]))
        np.testing.assert_allclose(reward.tastes(["w9"])[0], carried[-1] - carried[:-1].mean(axis=0), atol=1e-4)

    def test_binary_reward_and_reference(self, bundle, mute):
        simulator = MovieLensConfig(bundle=bundle, simulator="prompt-cosine", reward_type="binary").build()
        contexts = simulator.contexts.sample(10, np.random.default_rng(0))
        means = simulator.expected_rewards(contexts)
        continuous = MovieLensConfig(bundle=bundle, simulator="prompt-cosine").build().expected_rewards(contexts)
        np.testing.assert_allclose(10 * (means - simulator.rewards.reference(contexts)[:, None]), continuous, atol=1e-5)

    def test_own_keywords_are_prompts_too(self, bundle, mute):
        own = MovieLensConfig(bundle=bundle, simulator="prompt-cosine", keywords=("w30", "w31 w20")).build()
        assert own.expected_rewards(own.contexts.sample(3, np.random.default_rng(0))).shape == (3, 2)

    @pytest.mark.parametrize(
        "setting",
        [{"language_model": "somewhere"}, {"cache_slots": 2}, {"output_dim": 2}, {"decoding": {"greedy": True}}],
    )
    def test_nothing_is_written_so_nothing_says_how(self, bundle, setting):
        with pytest.raises(
            ConfigError, match=f"{next(iter(setting))}: expected nothing beside simulator='prompt-cosine'"
        ):
            MovieLensConfig(bundle=bundle, simulator="prompt-cosine", **setting)

    def test_wrong_input(self, bundle):
        opened = Bundle.open(bundle)
        parts = (TasteSpace.of_bundle(opened), 3, opened.reward_encoder)
        with pytest.raises(ConfigError, match="did you mean 'binary'"):
            PromptCosineReward(*parts, carrier="{text}", catalogue=KEYWORDS, kind="binery")
        for wrong in ({"carrier": "none"}, {"catalogue": ()}):
            with pytest.raises(ConfigError, match="a carrier with"):
                PromptCosineReward(*parts, **{"carrier": "{text}", "catalogue": KEYWORDS, **wrong})
        reward = PromptCosineReward(*parts, carrier="{text}", catalogue=KEYWORDS)
        with pytest.raises(DataError, match="no text"):
            reward.mean(users([[1, 2, 3]]), Outputs(np.ones((1, 2), np.float32)))


@pytest.mark.parametrize("name", ["sentence-cosine", "prompt-cosine"])
def test_environment_logs_and_comes_back(bundle, name, tmp_path):
    env = gym.make(ID, bundle=bundle, simulator=name)
    check_env(env.unwrapped, skip_render_check=True)
    log = op.collect(env, agents.UniformPolicy(len(KEYWORDS)), 40, path=tmp_path / "log", seed=0, progress=False)
    read = op.LoggedDataset.load(tmp_path / "log")
    np.testing.assert_array_equal(read.reward, log.reward)
    again = gym.make(read.metadata.env_id, **read.metadata.env_config)
    repeated = op.collect(again, agents.UniformPolicy(len(KEYWORDS)), 40, seed=0, progress=False)
    np.testing.assert_array_equal(repeated.reward, log.reward)


def test_unknown_name_is_told(bundle):
    with pytest.raises(ConfigError, match="did you mean 'prompt-cosine'"):
        MovieLensConfig(bundle=bundle, simulator="promt-cosine")


@pytest.fixture(scope="module")
def shipped() -> Bundle:
    return Bundle.open()


@pytest.fixture(scope="module")
def space(shipped) -> TasteSpace:
    return TasteSpace.of_bundle(shipped)


def test_sentences_of_the_shipped_bundle_tell_all_features(space):
    assert len(space.names) == 26
    assert space.explained.min() > 0.6
    assert space.explained.mean() > 0.8


def test_keywords_of_the_shipped_bundle_point_to_their_feature(shipped, space):
    words = [entry for entry in shipped.keywords if entry.group in space.names]
    reward = PromptCosineReward(
        space, 28, shipped.reward_encoder, carrier=shipped.encoder("prompt").text_format,
        catalogue=[entry.text for entry in shipped.keywords],
    )  # fmt: skip
    top = reward.tastes([entry.text for entry in words]).argmax(axis=1)
    right = np.mean([space.names[place] == entry.group for place, entry in zip(top, words, strict=True)])
    assert len(words) > 900
    assert right > 0.95
