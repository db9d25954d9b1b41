"""The MovieLens parts: what they compute, what they share, how they replace each other, and what they refuse."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from offprompts_env.config import identity
from offprompts_env.errors import BundleError, ConfigError, DataError, DimensionError, ModelError
from offprompts_env.movielens.bundle import Bundle
from offprompts_env.movielens.parts import MovieLensConfig, MovieLensContexts
from offprompts_env.movielens.rewards import LikeReward, UnpromptedSentences
from offprompts_env.simulator import ContextSource, OutputModel, RewardModel, Simulator
from offprompts_env.text.cache import SampleTable
from offprompts_env.text.decoding import Decoding
from offprompts_env.text.language_model import CausalLM, row_uniforms
from offprompts_env.types import Contexts, Outputs, PromptSet
from tests import tiny_bundle, tiny_models


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    return str(tiny_bundle.make_tiny_bundle(tmp_path_factory.mktemp("parts") / "tiny"))


@pytest.fixture(scope="module")
def simulator(where):
    return MovieLensConfig(bundle=where).build()


@pytest.fixture(scope="module")
def own_models(tmp_path_factory):
    """Directories of a language model and of an encoder that are not the bundle's."""
    folder = tmp_path_factory.mktemp("own")
    tokens = tiny_models.tokenizer([f"w{i}" for i in range(50)])
    tiny_models.gpt2(vocab_size=53).save_pretrained(folder / "gpt2")
    tiny_models.distilbert(vocab_size=53, dim=12).save_pretrained(folder / "bert")
    for name in ("gpt2", "bert"):
        tokens.save_pretrained(folder / name)
    return folder


def rng(seed=0):
    return np.random.default_rng(seed)


def play(simulator, n=12, seed=0):
    contexts = simulator.contexts.sample(n, rng(seed))
    actions = rng(seed).integers(simulator.n_prompts, size=n)
    return simulator.play(contexts, actions, rng(seed + 1), rng(seed + 2))


def test_the_parts_are_parts(simulator):
    assert isinstance(simulator.contexts, ContextSource)
    assert isinstance(simulator.outputs, OutputModel)
    assert isinstance(simulator.rewards, RewardModel)
    assert not simulator.exact
    assert simulator.prompts.texts == tiny_bundle.KEYWORDS
    rounds = play(simulator)
    assert rounds.contexts.context.shape == (12, 3)
    assert rounds.contexts.query.shape == (12, 3)
    assert rounds.outputs.embedding.shape == (12, 4)
    assert simulator.prompts.embeddings.shape == (8, 2)
    assert rounds.expected_reward.std() > 0
    assert np.abs(rounds.reward - rounds.expected_reward).max() < 0.05 * 6


def test_same_seed_same_rounds_bit_for_bit(where, simulator):
    first, again = play(simulator), play(MovieLensConfig(bundle=where).build())
    play(simulator, seed=9)
    warm = play(simulator)
    for other in (again, warm):
        assert first.outputs.text.tolist() == other.outputs.text.tolist()
        np.testing.assert_array_equal(first.outputs.embedding, other.outputs.embedding)
        np.testing.assert_array_equal(first.reward, other.reward)
    assert play(simulator, seed=9).outputs.text.tolist() != first.outputs.text.tolist()


def test_users_and_movies_are_uniform_and_independent(simulator):
    drawn = simulator.contexts.sample(6000, rng())
    table = np.zeros((5, 6))
    np.add.at(table, (drawn.user_id - 100, drawn.item_id - 200), 1)
    # Thirty cells of 200 expected; the 0.9999 quantile of chi-square with 29 degrees of freedom is 66.2.
    assert ((table - 200) ** 2 / 200).sum() < 66.2
    row = 17
    assert drawn.query_text[row] == tiny_bundle.TITLES[drawn.item_id[row] - 200]


def test_expected_reward_is_the_stated_equation(where):
    bundle = Bundle.open(where)
    simulator = MovieLensConfig(bundle=where, reward_scale=3.0).build()
    rounds = play(simulator)
    like, encoder = bundle.simulator, bundle.reward_encoder
    p = like.probability(rounds.contexts.context, encoder.encode(rounds.outputs.text.tolist()))
    reference = np.stack(
        [
            [
                like.probability(rounds.contexts.context[i : i + 1], encoder.encode([sentence]))[0]
                for sentence in bundle.no_prompt_sentences[rounds.contexts.query_text[i]]
            ]
            for i in range(12)
        ]
    ).mean(axis=1)
    np.testing.assert_allclose(rounds.expected_reward, 3.0 * (p - reference), atol=1e-4)

    binary = play(MovieLensConfig(bundle=where, reward_type="binary").build())
    np.testing.assert_allclose(binary.expected_reward, p, atol=1e-5)
    assert set(binary.reward.tolist()) <= {0.0, 1.0}


def test_collaborative_rewards_depend_on_user_movie_and_sentence(where):
    bundle = Bundle.open(where)
    simulator = MovieLensConfig(bundle=where, simulator="collaborative", reward_type="binary").build()
    rounds = play(simulator)
    states = bundle.reward_encoder.encode(rounds.outputs.text.tolist())
    contexts = rounds.contexts
    expected = bundle.collaborative.probability(contexts.context, contexts.item_id, states)
    np.testing.assert_allclose(rounds.expected_reward, expected, atol=1e-5)
    mean = simulator.rewards.mean
    moved = {
        "user": mean(replace(contexts, context=-contexts.context), rounds.outputs),
        "movie": mean(replace(contexts, item_id=None), rounds.outputs),
        "sentence": mean(contexts, rounds.outputs.take(slice(None, None, -1))),
    }
    for what, value in moved.items():
        assert np.abs(value - rounds.expected_reward).max() > 0.01, what
    continuous = play(MovieLensConfig(bundle=where, simulator="collaborative").build())
    assert continuous.expected_reward.min() < 0 < continuous.expected_reward.max()


def test_a_sentence_is_encoded_once(where):
    simulator = MovieLensConfig(bundle=where, reward_type="binary").build()
    encoder = simulator.outputs.encoder.encoder
    assert simulator.rewards.model.encoder is encoder
    calls = []
    forward = encoder.model.forward
    encoder.model.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    play(simulator)
    assert len(calls) == 1


def test_reference_does_not_depend_on_who_came_before(where):
    one, other = (MovieLensConfig(bundle=where).build() for _ in range(2))
    contexts = one.contexts.sample(40, rng())
    for row in range(39, -1, -1):
        other.rewards.reference(contexts.take([row]))
    np.testing.assert_allclose(one.rewards.reference(contexts), other.rewards.reference(contexts), atol=1e-7)
    for title in tiny_bundle.TITLES:
        np.testing.assert_array_equal(one.rewards._reference_states[title], other.rewards._reference_states[title])


class EchoModel:
    fingerprint = "echo"
    deterministic = False

    def __init__(self):
        self.asked = []

    def generate(self, prompts, rng):
        self.asked += prompts
        uniforms = row_uniforms(rng, len(prompts), 1)[:, 0]
        return [f"{prompt} {u:.6f}" for prompt, u in zip(prompts, uniforms, strict=True)]


def test_unprompted_sentences():
    model = EchoModel()
    first = UnpromptedSentences({"a": ["x", "y", "z"], "b": ["x"]}, model, tiny_bundle.FORMATTER, 2)
    assert first.about(["a", "c", "a"])[::2] == [("x", "y"), ("x", "y")]
    assert len(model.asked) == 2
    second = UnpromptedSentences({}, EchoModel(), tiny_bundle.FORMATTER, 2)
    assert second.about(["d", "c"])[1] == first.about(["c"])[0]
    # Too few known sentences are not mixed with written ones.
    assert first.about(["b"])[0] == second.about(["b"])[0]
    assert len(set(first.about(["c"])[0])) == 2


def test_n_prompts_and_own_keywords(where):
    assert MovieLensConfig(bundle=where, n_prompts=3).build().prompts.texts == tiny_bundle.KEYWORDS[:3]
    own = MovieLensConfig(bundle=where, keywords=["w9", "w30 w31"]).build()
    assert own.prompts.texts == ("w9", "w30 w31")
    assert own.prompts.embeddings.shape == (2, 2)
    assert play(own).outputs.text[0]


def test_dimensions(where):
    smaller = MovieLensConfig(bundle=where, output_dim=2, query_dim=1, prompt_dim=1).build()
    rounds = play(smaller)
    assert (rounds.outputs.embedding.shape, rounds.contexts.query.shape) == ((12, 2), (12, 1))
    assert smaller.prompts.embeddings.shape == (8, 1)
    with pytest.raises(ConfigError, match=r"output_dim: expected at most 4, .* got 5"):
        MovieLensConfig(bundle=where, output_dim=5).build()


def test_decoding_is_laid_over_the_bundles(where):
    assert MovieLensConfig(bundle=where).build().outputs.language_model.decoding == Decoding(8, temperature=0.9)
    greedy = MovieLensConfig(bundle=where, decoding={"greedy": True}).build().outputs
    assert greedy.language_model.decoding == Decoding(8, temperature=0.9, greedy=True)
    contexts = Contexts(np.zeros((4, 3)), np.zeros((4, 3)), query_text=np.array(["w1 w2"] * 4, dtype=object))
    assert len(set(greedy.sample(contexts, np.zeros(4, dtype=int), rng()).text)) == 1


def test_own_language_model_and_encoders(where, own_models):
    config = MovieLensConfig(
        bundle=where,
        language_model=own_models / "gpt2",
        sentence_encoder=str(own_models / "bert"),
        query_encoder=str(own_models / "bert"),
        prompt_encoder=str(own_models / "bert"),
        template="w1 {query} w2 {prompt}",
        template_without_prompt="w1 {query}",
        decoding={"max_new_tokens": 6},
        query_dim=2,
    )
    simulator = config.build()
    rounds = play(simulator)
    assert rounds.contexts.query.shape == (12, 2)
    assert rounds.outputs.embedding.shape == (12, 4)
    assert simulator.outputs.language_model.model.config.model_type == "gpt2"
    # Its own unprompted sentences, not the bundle's, are the reference.
    shipped = Bundle.open(where).no_prompt_sentences
    title = tiny_bundle.TITLES[0]
    written = simulator.rewards.unprompted.about([title])[0]
    assert written != shipped[title]
    assert written == config.build().rewards.unprompted.about([title])[0]


def test_cache_slots(where):
    simulator = MovieLensConfig(bundle=where, cache_slots=2).build()
    assert isinstance(simulator.outputs, SampleTable)
    for seed in range(5):
        play(simulator, n=60, seed=seed)
    assert simulator.outputs.generated <= 6 * 8 * 2 < simulator.outputs.requested == 300
    # The reference is still the bundle's.
    assert simulator.rewards.unprompted.about([tiny_bundle.TITLES[0]])[0] == tuple(
        Bundle.open(where).no_prompt_sentences[tiny_bundle.TITLES[0]]
    )


def test_further_arguments_of_loading_reach_the_model_and_the_log(where, own_models):
    given = {"attn_implementation": "eager"}
    config = MovieLensConfig(bundle=where, language_model=str(own_models / "gpt2"), model_kwargs=given)
    assert config.build().outputs.language_model.model.config._attn_implementation == "eager"
    assert identity(config.to_json())["model_kwargs"] == given


def test_config_survives_json(where):
    config = MovieLensConfig(bundle=where, keywords=("a",), decoding={"top_k": 3, "stop": ["."]})
    assert MovieLensConfig.from_settings(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_prompt": 3}, "did you mean 'n_prompts'"),
        ({"n_prompts": 0}, "n_prompts: expected an integer ≥ 1"),
        ({"n_prompts": True}, "n_prompts"),
        ({"keywords": []}, "at least one prompt"),
        ({"keywords": ["a", " \t"]}, "position 1"),
        ({"keywords": ["a", "b", "a"]}, "keywords: expected each prompt once, got 'a' twice"),
        ({"keywords": "funny"}, "expected a list of prompts"),
        ({"keywords": ["a", 3]}, "position 1"),
        ({"simulator": "distillbert"}, "did you mean 'distilbert'"),
        ({"reward_type": "binry"}, "did you mean 'binary'"),
        ({"pooling": "max"}, "pooling"),
        ({"reward_std": -1.0}, "reward_std"),
        ({"reward_std": float("nan")}, "reward_std"),
        ({"reward_scale": 0}, "reward_scale"),
        ({"cache_slots": 0}, "cache_slots"),
        ({"baseline_samples": 0}, "baseline_samples"),
        ({"decoding": {"temprature": 1}}, "did you mean 'temperature'"),
        ({"decoding": {"temperature": "hot"}}, "temperature: expected a finite number ≥ 0, got 'hot'"),
        ({"decoding": {"max_new_tokens": 2.5}}, "max_new_tokens: expected an integer ≥ 1, got 2.5"),
        ({"decoding": 3}, "decoding: expected names and values"),
        ({"template": 5}, "template: expected text or None, got 5"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"n_prompts": np.int64(3)}, r"n_prompts: .* make it a Python number with \.item\(\)"),
        ({"decoding": {"top_p": 2}}, "top_p"),
        ({"pad_token": "x"}, "set language_model"),
        ({"model_kwargs": {"attn_implementation": "eager"}}, "expected a directory or hub id as language_model"),
        ({"model_kwargs": {"a": 1}, "language_model": "vllm:m"}, "expected a directory or hub id as language_model"),
        ({"model_kwargs": {"dtype": "auto"}, "language_model": "m"}, "pass dtype="),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        MovieLensConfig.from_settings(settings)


def test_what_only_building_finds(where, tmp_path, own_models):
    with pytest.raises(ConfigError, match="expected at most 8, the number of keywords, got 9"):
        MovieLensConfig(bundle=where, n_prompts=9).build()
    with pytest.raises(ConfigError, match="template"):
        MovieLensConfig(bundle=where, template="{prompt}").build()
    with pytest.raises(BundleError, match=r"bundle\.json"):
        MovieLensConfig(bundle=str(tmp_path)).build()
    with pytest.raises(ModelError, match="expected a directory at"):
        MovieLensConfig(bundle=where, language_model="./nowhere").build()
    bare = tmp_path / "bare"
    tiny_models.gpt2().save_pretrained(bare)
    tiny_models.tokenizer(pad=False).save_pretrained(bare)
    with pytest.raises(ModelError, match=r"pass pad_token='\[eos\]'"):
        MovieLensConfig(bundle=where, language_model=str(bare)).build()
    assert MovieLensConfig(
        bundle=where, language_model=str(bare), pad_token="[eos]", decoding={"max_new_tokens": 4}
    ).build()


class Vectors:
    """An output model without text."""

    output_dim = 2
    prompts = PromptSet(np.eye(3))

    def sample(self, contexts, actions, rng):
        return Outputs(rng.normal(size=(len(contexts), 2)))


class FirstCoordinate:
    kind = "continuous"

    def mean(self, contexts, outputs):
        return outputs.embedding[:, 0]


def test_own_parts_take_the_place_of_ours(where):
    config = MovieLensConfig(bundle=where)
    source = MovieLensContexts(np.array([1]), np.ones((1, 3)), np.array([2]), ["w8 w9"], np.zeros((1, 5)))
    own_users = config.build(contexts=source)
    rounds = play(own_users)
    # A title that the bundle does not know gets unprompted sentences of its own.
    assert rounds.contexts.query_text.tolist() == ["w8 w9"] * 12
    assert np.isfinite(rounds.expected_reward).all()

    vectors = config.build(outputs=Vectors(), rewards=FirstCoordinate())
    assert isinstance(vectors, Simulator)
    rounds = play(vectors)
    np.testing.assert_array_equal(rounds.expected_reward, rounds.outputs.embedding[:, 0])


def test_parts_that_do_not_fit(where):
    config = MovieLensConfig(bundle=where)
    with pytest.raises(DataError, match="outputs have no text"):
        config.build(outputs=Vectors())
    wide = MovieLensContexts(np.array([1]), np.ones((1, 7)), np.array([2]), ["w8 w9"], np.zeros((1, 5)))
    with pytest.raises(DimensionError, match="dimension 3, but the context source has 7"):
        config.build(contexts=wide)

    class Mute:
        context_dim, query_dim = 3, 3

        def sample(self, n, rng):
            return Contexts(np.zeros((n, 3)), np.zeros((n, 3)))

    with pytest.raises(DataError, match="query_text"):
        config.build(contexts=Mute())
    with pytest.raises(DimensionError, match="as many user ids as vectors"):
        MovieLensContexts(np.array([1, 2]), np.ones((1, 7)), np.array([2]), ["w8 w9"], np.zeros((1, 5)))


def test_describe(simulator):
    contexts = simulator.contexts.sample(1, rng())
    assert "likes" in simulator.contexts.describe(contexts, 0)
    plain = MovieLensContexts(np.array([1]), np.ones((1, 2)), np.array([2]), ["w8 w9"], np.zeros((1, 5)))
    assert plain.describe(plain.sample(1, rng()), 0) == "+1.00 +1.00"


def test_like_reward_refuses_unknown_kinds(simulator):
    reward = simulator.rewards
    with pytest.raises(ConfigError, match="did you mean 'binary'"):
        LikeReward(reward.model, reward.unprompted, kind="binry")
    with pytest.raises(ConfigError, match="reward_scale"):
        LikeReward(reward.model, reward.unprompted, scale=-1.0)


def test_global_state_is_left_alone(where):
    before = torch.get_rng_state().tolist(), torch.get_num_threads()
    play(MovieLensConfig(bundle=where).build())
    assert (torch.get_rng_state().tolist(), torch.get_num_threads()) == before


def test_policy_values_share_random_numbers(simulator):
    class Fixed:
        n_prompts = 8

        def __init__(self, action):
            self.action = action

        def probabilities(self, contexts):
            return np.eye(8)[np.full(len(contexts), self.action)]

    first, again, other = (simulator.policy_value(Fixed(a), n=40, seed=3) for a in (0, 0, 1))
    np.testing.assert_array_equal(first.terms, again.terms)
    assert first.minus(other).standard_error < np.hypot(first.standard_error, other.standard_error) * 1.2
    table = simulator.expected_rewards(simulator.contexts.sample(2, rng()), n_samples=2)
    assert table.shape == (2, 8)


def test_causal_lm_of_the_bundle_needs_no_setting(simulator):
    assert isinstance(simulator.outputs.language_model, CausalLM)
