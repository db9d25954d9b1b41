"""Wrappers change what is shown or how a prompt is named, never the rounds."""

from __future__ import annotations

import itertools
import math
import unicodedata
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import offprompts_env as op
from offprompts_env.envs import PromptEnv
from offprompts_env.errors import (
    ActionError,
    AgentError,
    ConfigError,
    PropensityError,
    ResetNeededError,
)
from offprompts_env.movielens.parts import MovieLensContexts
from offprompts_env.recording import RecordLoggedData, RecordVectorLoggedData
from offprompts_env.simulator import Simulator
from offprompts_env.synthetic import SyntheticConfig
from offprompts_env.types import Contexts
from offprompts_env.wrappers import (
    ActionMask,
    CandidatePrompts,
    FlatObservation,
    FlatVectorObservation,
    TextObservation,
    VectorActionMask,
)

A = 12
EVEN = np.arange(A) % 2 == 0


def synthetic(**settings: Any) -> gym.Env:
    return gym.make("OffPrompts-Synthetic-v0", n_prompts=A, **settings)


def movielens() -> gym.Env:
    return gym.make("OffPrompts-MovieLens-v0", n_prompts=A)


def titled(*titles: str) -> PromptEnv:
    """A world whose queries have these titles."""
    base = SyntheticConfig(n_prompts=A).build()
    d_x, d_q, n = base.contexts.context_dim, base.contexts.query_dim, len(titles)
    taste, features = np.eye(3, d_x), [f"genre {index}" for index in range(d_x)]
    contexts = MovieLensContexts(np.arange(3), taste, np.arange(n), titles, np.eye(n, d_q), features)
    return PromptEnv(Simulator(contexts, base.outputs, base.rewards))


def vector(num_envs: int = 4, **settings: Any) -> gym.vector.VectorEnv:
    return gym.make_vec("OffPrompts-Synthetic-v0", num_envs, n_prompts=A, **settings)


def half(contexts: Contexts) -> np.ndarray:
    """Even prompts for users whose first feature is positive, odd ones for the others."""
    return np.where(contexts.context[:, :1] > 0, EVEN, ~EVEN)


WRAPPED = {
    "flat": lambda: FlatObservation(synthetic()),
    "text": lambda: TextObservation(titled("Heat (1995)", "Amélie (2001)")),
    "mask": lambda: ActionMask(synthetic(), np.ones(A)),
    "candidates": lambda: CandidatePrompts(synthetic(), 5),
    "candidates with embeddings": lambda: CandidatePrompts(synthetic(), 5, embeddings=True),
    "flat candidates": lambda: FlatObservation(CandidatePrompts(synthetic(), 5, embeddings=True)),
    "text and candidates": lambda: CandidatePrompts(TextObservation(titled("Heat", "Big")), 5, embeddings=True),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_gymnasium_checker_passes(name: str) -> None:
    with warnings.catch_warnings():
        # Gymnasium says of any wrapped environment that it is wrapped, and of unbounded boxes that they are unbounded.
        warnings.simplefilter("ignore")
        check_env(WRAPPED[name](), skip_render_check=True)


@pytest.mark.parametrize("name", [name for name in WRAPPED if "text" not in name])
def test_stable_baselines_checker_passes(name: str) -> None:
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Its advice to flatten the matrix of embeddings, which FlatObservation does.
        warnings.filterwarnings("ignore", message=".*unconventional shape.*")
        checker.check_env(WRAPPED[name](), skip_render_check=True)


@pytest.mark.parametrize("name", [name for name in WRAPPED if "text" not in name] + ["titles"])
def test_specs_make_the_same_environment_again(name: str) -> None:
    env = TextObservation(movielens()) if name == "titles" else WRAPPED[name]()
    again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    assert again.observation_space == env.observation_space
    assert again.action_space == env.action_space
    assert type(again) is type(env)
    if name != "titles":
        assert play(again, 1) == play(env, 1)


def play(env: gym.Env, seed: int, rounds: int = 5) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    for index, action in enumerate(np.random.default_rng(seed).integers(5, size=rounds)):
        observation, info = env.reset(seed=seed if index == 0 else None)
        parts = observation if isinstance(observation, dict) else {"": observation}
        assert env.observation_space.contains(observation)
        after, reward, terminated, truncated, info = env.step(action)
        assert env.observation_space.contains(after)
        assert (terminated, truncated) == (True, False)
        shown = tuple(
            sorted((key, value if isinstance(value, str) else value.tobytes()) for key, value in parts.items())
        )
        rows.append((shown, reward, info["expected_reward"], tuple(info.get("candidates", ()))))
    return rows


@pytest.mark.parametrize("name", WRAPPED)
def test_seeds_name_the_rounds(name: str) -> None:
    assert play(WRAPPED[name](), 3) == play(WRAPPED[name](), 3)
    assert play(WRAPPED[name](), 3) != play(WRAPPED[name](), 4)


# Flat observations


def test_flat_is_context_then_query_as_gymnasium_flattens() -> None:
    env, ours, theirs = synthetic(), FlatObservation(synthetic()), gym.wrappers.FlattenObservation(synthetic())
    (observation, _), (flat, _), (other, _) = (each.reset(seed=2) for each in (env, ours, theirs))
    assert flat.dtype == np.float32
    assert ours.context_dim + ours.query_dim == len(flat)
    assert (flat[: ours.context_dim] == observation["context"]).all()
    assert (flat[ours.context_dim :] == observation["query"]).all()
    assert (flat == other).all()


def test_flat_puts_what_is_added_last() -> None:
    env = CandidatePrompts(synthetic(), 3, embeddings=True)
    flat, _ = FlatObservation(env).reset(seed=2)
    observation, _ = env.reset(seed=2)
    assert (flat == np.concatenate([observation[key].ravel() for key in ("context", "query", "candidates")])).all()


def test_flat_batches_are_the_batches() -> None:
    plain, flat = vector(), FlatVectorObservation(vector())
    (shown, _), (seen, _) = plain.reset(seed=1), flat.reset(seed=1)
    for _ in range(3):
        assert seen.dtype == np.float32
        assert flat.observation_space.contains(seen)
        assert (seen == np.concatenate([shown["context"], shown["query"]], axis=1)).all()
        actions = np.arange(4)
        before = seen
        shown, reward, *_ = plain.step(actions)
        seen, same, terminated, _, infos = flat.step(actions)
        assert (reward == same).all()
        assert terminated.all()
        assert (infos["final_obs"] == before).all()


def test_gymnasiums_own_vector_wrapper_refuses_same_step_resets() -> None:
    # The reason why FlatVectorObservation exists.
    with pytest.raises(ValueError, match="SAME_STEP"):
        gym.wrappers.vector.FlattenObservation(vector())


@pytest.mark.parametrize("mode", ["SameStep", "NextStep", "Disabled"])
def test_flat_batches_of_gymnasiums_vector_environments(mode: str) -> None:
    envs = FlatVectorObservation(vector(vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode}))
    before, _ = envs.reset(seed=1)
    after, _, _, _, infos = envs.step(np.arange(4))
    assert envs.observation_space.contains(after)
    assert ("final_obs" in infos) == (mode == "SameStep")
    if mode == "SameStep":
        assert (np.stack(infos["final_obs"]) == before).all()


def test_stable_baselines_learns_on_flat_observations() -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    model = sb3.DQN("MlpPolicy", FlatObservation(synthetic()), gamma=0.0, learning_starts=10, seed=0)
    model.learn(40)
    action, _ = model.predict(FlatObservation(synthetic()).reset(seed=0)[0])
    assert 0 <= action < A


# Text


def test_text_is_that_of_the_query_and_the_user() -> None:
    env = TextObservation(movielens())
    for seed in range(20):
        observation, info = env.reset(seed=seed)
        assert observation["query_text"] == unicodedata.normalize("NFC", info["query_text"])
        assert observation["user_text"].startswith("likes ")
        assert env.observation_space.contains(observation)


@pytest.mark.parametrize(
    ("title", "shown"),
    [
        ("Wall-E (2008)", "Wall-E (2008)"),
        ("Ame\N{COMBINING ACUTE ACCENT}lie — «1»", "Amélie — «1»"),
        ("Tab\there\u00a0now", "Tab here now"),
        ("七人の侍 (1954)", "���� (1954)"),
        ("x" * 100, "x" * 64),
        ("", ""),
    ],
)
def test_text_fits_its_space(title: str, shown: str) -> None:
    env = TextObservation(titled(title), max_length=64)
    observation, info = env.reset(seed=0)
    assert observation["query_text"] == shown
    assert info["query_text"] == title
    assert env.observation_space.contains(observation)
    assert env.step(0)[0]["query_text"] == shown


def test_text_of_other_scripts() -> None:
    env = TextObservation(titled("七人の侍"), charset="七人の侍")
    assert env.reset(seed=0)[0]["query_text"] == "七人の侍"
    assert env.observation_space["query_text"].max_length == 64


def test_text_keeps_the_keys_that_recording_needs(tmp_path: Any) -> None:
    with RecordLoggedData(TextObservation(titled("Heat")), tmp_path) as recorder:
        observation, info = recorder.reset(seed=0)
        recorder.step(np.int64(1))
        log = recorder.dataset()
    assert log.query_text[0] == info["query_text"]
    assert (log.query[0] == observation["query"]).all()


# Masks


def test_mask_is_in_the_infos_and_samples() -> None:
    env = ActionMask(synthetic(), half)
    for seed in range(6):
        observation, info = env.reset(seed=seed)
        expected = EVEN if observation["context"][0] > 0 else ~EVEN
        assert (info["action_mask"] == expected).all()
        assert info["action_mask"].dtype == np.int8
        assert (env.action_masks() == expected).all()
        assert env.action_masks().dtype == bool
        action = env.action_space.sample(mask=info["action_mask"])
        assert (env.step(action)[-1]["action_mask"] == expected).all()


def test_excluded_prompts_leave_the_round_open() -> None:
    env, plain = ActionMask(synthetic(), EVEN), synthetic()
    env.reset(seed=0)
    plain.reset(seed=0)
    with pytest.raises(ActionError, match="6 allowed prompts, got 3"):
        env.step(np.int64(3))
    assert env.step(np.int64(4))[1] == plain.step(np.int64(4))[1]
    with pytest.raises(ResetNeededError):
        env.step(np.int64(3))


@pytest.mark.parametrize("action", [A, -1, 1.0, "1", True])
def test_what_is_no_prompt_is_refused_as_ever(action: object) -> None:
    env = ActionMask(synthetic().unwrapped, EVEN)
    env.reset(seed=0)
    with pytest.raises(ActionError, match="expected an i"):
        env.step(action)


def test_masks_are_copies() -> None:
    env = ActionMask(synthetic(), EVEN)
    _, info = env.reset(seed=0)
    info["action_mask"][:] = 1
    env.action_masks()[:] = True
    with pytest.raises(ActionError):
        env.step(np.int64(1))


def test_vector_mask() -> None:
    envs, plain = VectorActionMask(vector(8), half), vector(8)
    observation, infos = envs.reset(seed=0)
    plain.reset(seed=0)
    for _ in range(3):
        mask = infos["action_mask"]
        assert (mask == half(Contexts.of(observation))).all()
        assert (envs.action_masks() == mask).all()
        with pytest.raises(ActionError, match=r"in row \d, got .* excluded"):
            envs.step(mask.argmin(axis=1))
        observation, reward, _, _, infos = envs.step(mask.argmax(axis=1))
        assert (infos["final_info"]["action_mask"] == mask).all()
        assert (reward == plain.step(mask.argmax(axis=1))[1]).all()


def test_vector_mask_around_gymnasiums_vector_environment() -> None:
    envs = VectorActionMask(vector(vectorization_mode="sync", vector_kwargs={"autoreset_mode": "SameStep"}), EVEN)
    envs.reset(seed=0)
    with pytest.raises(ActionError, match="in row 1"):
        envs.step(np.array([0, 1, 2, 4]))
    assert envs.step(np.array([0, 2, 2, 4]))[-1]["action_mask"].shape == (4, A)


def test_maskable_ppo_keeps_to_the_mask() -> None:
    contrib = pytest.importorskip("sb3_contrib")
    from sb3_contrib.common.maskable.utils import get_action_masks

    env = ActionMask(synthetic(), half)
    model = contrib.MaskablePPO("MultiInputPolicy", env, gamma=0.0, n_steps=32, batch_size=16, n_epochs=1, seed=0)
    # An excluded prompt would raise.
    model.learn(64)
    for seed in range(5):
        observation, _ = env.reset(seed=seed)
        action, _ = model.predict(observation, action_masks=get_action_masks(env))
        assert env.action_masks()[action]


@pytest.mark.parametrize(
    "mask",
    [
        np.ones(A - 1),
        np.zeros(A),
        np.full(A, 2),
        np.full(A, np.nan),
        ["a"] * A,
        [[1], [1, 0]],
        None,
    ],
)
@pytest.mark.parametrize(
    "wrap", [lambda mask: ActionMask(synthetic(), mask), lambda mask: VectorActionMask(vector(), mask)]
)
def test_wrong_masks(wrap: Any, mask: Any) -> None:
    with pytest.raises(ConfigError, match="mask: expected"):
        wrap(mask)


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (lambda contexts: np.ones(A), ConfigError),
        (lambda contexts: np.zeros((len(contexts), A)), ConfigError),
        (lambda contexts: {}["no such user"], AgentError),
    ],
)
def test_wrong_mask_functions(function: Any, error: type[Exception]) -> None:
    for env in (ActionMask(synthetic(), function), VectorActionMask(vector(), function)):
        with pytest.raises(error, match="mask"):
            env.reset(seed=0)


# Candidates


def test_candidates_do_not_move_the_rounds() -> None:
    plain, env = synthetic(), CandidatePrompts(synthetic(), 4)
    seen = []
    for index in range(30):
        (shown, _), (same, info) = (each.reset(seed=5 if index == 0 else None) for each in (plain, env))
        candidates = info["candidates"]
        assert len(set(candidates.tolist())) == 4
        assert all((shown[key] == same[key]).all() for key in shown)
        expected = plain.step(candidates[2])
        actual = env.step(np.int64(2))
        assert expected[1] == actual[1]
        assert (actual[-1]["candidates"] == candidates).all()
        seen.append(candidates)
    assert len(np.unique(np.stack(seen), axis=0)) == 30
    # Uniform: each of 12 prompts is expected 10 times in 120 places.
    assert np.bincount(np.concatenate(seen), minlength=A).max() < 24


def test_candidates_without_a_seed_differ() -> None:
    first, second = (tuple(CandidatePrompts(synthetic(), A).reset()[1]["candidates"]) for _ in range(2))
    assert first != second


def test_candidates_show_their_embeddings() -> None:
    env = CandidatePrompts(synthetic(), 3, embeddings=True)
    observation, info = env.reset(seed=0)
    assert (observation["candidates"] == env.unwrapped.simulator.prompts.embeddings[info["candidates"]]).all()
    assert env.observation_space.contains(observation)


@pytest.mark.parametrize("action", [3, -1, 1.0, "1", True, [0, 1], None])
def test_what_is_no_slot_is_refused_and_leaves_the_round_open(action: object) -> None:
    env = CandidatePrompts(synthetic(), 3)
    env.reset(seed=0)
    with pytest.raises(ActionError, match="expected a slot"):
        env.step(action)
    env.step(np.int64(0))
    with pytest.raises(ResetNeededError):
        env.step(np.int64(0))


def test_the_recorder_inside_sees_prompts(tmp_path: Any) -> None:
    recorder = RecordLoggedData(synthetic(), tmp_path)
    env = CandidatePrompts(recorder, 4)
    played = []
    for index in range(5):
        _, info = env.reset(seed=0 if index == 0 else None)
        recorder.record_propensity(env.propensity(0.25))
        env.step(np.int64(1))
        played.append(info["candidates"][1])
    log = recorder.dataset()
    env.close()
    assert log.action.tolist() == played
    assert log.propensity.tolist() == [1 / A] * 5


@pytest.mark.parametrize("uniform", [True, False])
def test_propensities_of_slots_weight_without_bias(uniform: bool) -> None:
    # All sets of 2 out of 4 prompts, and a policy that compares what it is offered: the better one with chance 0.9.
    n_prompts, k = 4, 2
    env = CandidatePrompts(gym.make("OffPrompts-Synthetic-v0", n_prompts=n_prompts), k)
    reward, target, quality = np.array([1.0, 4.0, 2.0, 8.0]), np.array([0.1, 0.2, 0.3, 0.4]), [3, 1, 4, 2]
    sets = list(itertools.combinations(range(n_prompts), k))
    estimate = naive = weight = 0.0
    marginal, given = np.zeros(n_prompts), np.zeros(n_prompts)
    for offered in sets:
        best = max(offered, key=lambda prompt: quality[prompt])
        for prompt in offered:
            p = 0.5 if uniform else 0.9 if prompt == best else 0.1
            chance = p / len(sets)
            marginal[prompt] += chance
            given[prompt] = env.propensity(p)
            estimate += chance * target[prompt] / env.propensity(p) * reward[prompt]
            weight += chance * target[prompt] / env.propensity(p)
            naive += chance * target[prompt] / p * reward[prompt]
    assert math.isclose(weight, 1)
    assert math.isclose(estimate, target @ reward)
    assert math.isclose(naive, target @ reward * k / n_prompts)
    # It is the marginal only where the slot does not depend on what else is offered.
    assert np.allclose(marginal, given) == uniform


def test_propensities_of_slots_are_checked() -> None:
    env = CandidatePrompts(synthetic(), 3)
    assert env.propensity([1.0, 0.5]).tolist() == [0.25, 0.125]
    assert np.isnan(env.propensity(np.nan))
    for wrong in (0, 1.5, -1, "a"):
        with pytest.raises(PropensityError):
            env.propensity(wrong)


# What cannot be wrapped


@pytest.mark.parametrize(
    "wrap",
    [
        lambda: FlatObservation(FlatObservation(synthetic())),
        lambda: FlatObservation(TextObservation(titled("Heat"))),
        lambda: FlatObservation(gym.make("CartPole-v1")),
        lambda: FlatVectorObservation(synthetic()),
        lambda: FlatVectorObservation(gym.make_vec("CartPole-v1", 2)),
        lambda: TextObservation(synthetic()),
        lambda: TextObservation(gym.make("CartPole-v1")),
        lambda: TextObservation(titled("Heat"), max_length=0),
        lambda: TextObservation(titled("Heat"), charset=["a"]),
        lambda: TextObservation(FlatObservation(titled("Heat"))),
        lambda: ActionMask(gym.make("Pendulum-v1"), [1]),
        lambda: VectorActionMask(synthetic(), EVEN),
        lambda: VectorActionMask(vector(vectorization_mode="sync"), EVEN),
        lambda: CandidatePrompts(synthetic(), 0),
        lambda: CandidatePrompts(synthetic(), A + 1),
        lambda: CandidatePrompts(synthetic(), 2.0),
        lambda: CandidatePrompts(CandidatePrompts(synthetic(), 3), 2),
        lambda: CandidatePrompts(FlatObservation(synthetic()), 3, embeddings=True),
        lambda: CandidatePrompts(gym.make("CartPole-v1"), 2),
    ],
)
def test_what_does_not_fit_says_so(wrap: Any) -> None:
    with pytest.raises(ConfigError, match="expected"):
        wrap()


def test_action_masks_need_a_round() -> None:
    for env in (ActionMask(synthetic(), EVEN), VectorActionMask(vector(), EVEN)):
        with pytest.raises(ResetNeededError):
            env.action_masks()


# Collecting


class Uniform:
    n_prompts = A

    def probabilities(self, contexts: Contexts) -> np.ndarray:
        return np.full((len(contexts), A), 1 / A)


class Allowed(Uniform):
    def probabilities(self, contexts: Contexts) -> np.ndarray:
        return half(contexts) / half(contexts).sum(axis=1, keepdims=True)


def test_collecting_with_text_gives_the_log_of_the_rounds() -> None:
    log = op.collect(TextObservation(titled("Heat")), Uniform(), 5, seed=0)
    assert len(log) == 5
    assert all(isinstance(text, str) for text in log.query_text)


def test_collecting_with_a_mask() -> None:
    log = op.collect(ActionMask(synthetic(), half), Allowed(), 20, seed=0)
    assert half(log.contexts)[np.arange(20), log.action].all()
    assert np.allclose(log.propensity, 2 / A)
    batch = op.collect(VectorActionMask(vector(4), half), Allowed(), 20, seed=0)
    assert half(batch.contexts)[np.arange(20), batch.action].all()


@pytest.mark.parametrize(
    ("wrap", "error", "message"),
    [
        (lambda: FlatObservation(synthetic()), ConfigError, "record inside the wrapper"),
        (lambda: FlatVectorObservation(vector()), ConfigError, "record inside the wrapper"),
        (lambda: ActionMask(synthetic(), half), ActionError, "excluded"),
        (lambda: VectorActionMask(vector(), half), ActionError, "excluded"),
        (lambda: CandidatePrompts(synthetic(), 2), ConfigError, "expected actions that are prompts, .*record inside"),
        (lambda: CandidatePrompts(synthetic(), A), ConfigError, "expected actions that are prompts, .*record inside"),
    ],
)
def test_collecting_what_cannot_be_collected_says_so(wrap: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        op.collect(wrap(), Uniform(), 50, seed=0)


@pytest.mark.parametrize(
    ("record", "wrap"),
    [
        (RecordLoggedData, lambda: FlatObservation(synthetic())),
        (RecordVectorLoggedData, lambda: FlatVectorObservation(vector())),
    ],
)
def test_recording_outside_of_a_flat_wrapper_says_so(tmp_path: Any, record: Any, wrap: Any) -> None:
    recorder = record(wrap(), tmp_path)
    with pytest.raises(ConfigError, match="record inside"):
        recorder.reset(seed=0)
    recorder.close()


def test_recording_outside_of_candidates_says_so(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="expected actions that are prompts"):
        RecordLoggedData(CandidatePrompts(synthetic(), 2), tmp_path)


def test_recording_inside_of_a_flat_wrapper(tmp_path: Any) -> None:
    env = FlatObservation(RecordLoggedData(synthetic(), tmp_path))
    flat, _ = env.reset(seed=0)
    env.step(np.int64(3))
    env.close()
    log = op.LoggedDataset.load(tmp_path)
    assert (np.concatenate([log.context[0], log.query[0]]) == flat).all()
