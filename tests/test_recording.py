import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import FlattenObservation, RecordEpisodeStatistics, TransformReward

from offprompts_env.collecting import collect
from offprompts_env.envs import PromptEnv, PromptVectorEnv
from offprompts_env.errors import (
    ActionError,
    ConfigError,
    DataError,
    DimensionError,
    NumericalError,
    PropensityError,
    ResetNeededError,
    StorageError,
)
from offprompts_env.recording import RecordLoggedData, RecordVectorLoggedData
from offprompts_env.simulator import Simulator
from offprompts_env.storage import read_manifest
from offprompts_env.synthetic import SyntheticConfig
from offprompts_env.types import Contexts, FloatArray, IntArray, LoggedDataset, Outputs, PromptSet
from tests.test_storage import assert_same, fast_disk  # noqa: F401

SMALL = {"n_prompts": 6, "context_dim": 2, "query_dim": 3, "prompt_dim": 2, "output_dim": 4}


class TiltedPolicy:
    """Prefers prompts by the sign of the first context feature; probabilities are all different."""

    def __init__(self, n_prompts: int = 6) -> None:
        self.n_prompts = n_prompts

    def probabilities(self, contexts: Contexts) -> FloatArray:
        scores = np.sign(contexts.context[:, :1]) * np.arange(1, self.n_prompts + 1)
        weights = np.exp(0.3 * scores)
        return np.asarray(weights / weights.sum(axis=1, keepdims=True))


class CountingAgent:
    """Learns which prompts it has seen, and shifts to the rare ones."""

    def __init__(self, n_prompts: int = 6) -> None:
        self.counts = np.zeros(n_prompts)
        self.batches: list[LoggedDataset] = []

    def act(self, contexts: Contexts, rng: np.random.Generator) -> tuple[IntArray, FloatArray]:
        weights = 1 / (1 + self.counts)
        pmf = weights / weights.sum()
        actions = rng.choice(len(pmf), size=len(contexts), p=pmf)
        return actions, pmf[actions]

    def learn(self, log: LoggedDataset) -> None:
        assert log.oracle is None
        self.batches.append(log)
        self.counts += np.bincount(log.action, minlength=len(self.counts))


class TextContexts:
    """Users and titles with ids and text."""

    context_dim, query_dim = 2, 1

    def sample(self, n: int, rng: np.random.Generator) -> Contexts:
        users, items = rng.integers(5, size=n), rng.integers(9, size=n)
        titles = np.array([f"Fïlm {item} (199{item})\x00" for item in items], dtype=object)
        return Contexts(np.stack([users, users**2], axis=1), items[:, None], users, items, titles)


class TextOutputs:
    """Sentences that say which title and prompt made them; the noise is in the text as well."""

    output_dim = 2
    prompts = PromptSet(np.eye(3), ("funny", "sad", "old"))

    def sample(self, contexts: Contexts, actions: IntArray, rng: np.random.Generator) -> Outputs:
        luck = rng.random(len(contexts))
        texts = [
            f"{title} is {self.prompts.texts[action]} {u:.3f}"
            for title, action, u in zip(contexts.query_text, actions, luck, strict=True)
        ]
        return Outputs(np.stack([luck, actions], axis=1), np.array(texts, dtype=object))


class TextRewards:
    kind = "binary"

    def mean(self, contexts: Contexts, outputs: Outputs) -> FloatArray:
        return np.asarray(outputs.embedding[:, 0])


def text_world() -> Simulator:
    return Simulator(TextContexts(), TextOutputs(), TextRewards())


def make_env(**settings: Any) -> gym.Env[Any, Any]:
    return gym.make("OffPrompts-Synthetic-v0", **{**SMALL, **settings})


def make_vector(kind: str, num_envs: int = 5) -> gym.vector.VectorEnv[Any, Any, Any]:
    if kind == "native":
        return gym.make_vec("OffPrompts-Synthetic-v0", num_envs=num_envs, **SMALL)
    mode = AutoresetMode[kind]
    return gym.make_vec(
        "OffPrompts-Synthetic-v0",
        num_envs=num_envs,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": mode},
        **SMALL,
    )


def assert_consistent(log: LoggedDataset, world: Simulator, *, reward_std: float = 1.0) -> None:
    """Every row is a round of this world: its expected reward is that of its context and output."""
    assert log.oracle is not None
    expected = world.rewards.mean(log.contexts, log.outputs)
    np.testing.assert_allclose(log.oracle.expected_reward, expected, rtol=1e-4, atol=1e-5)
    noise = log.reward - log.oracle.expected_reward
    assert np.abs(noise).max() < 6 * reward_std
    assert len(np.unique(log.context, axis=0)) == len(log)


# ------------------------------------------------------------------------------------------------ the single wrapper


def test_wrapper_records_what_happened(tmp_path: Path) -> None:
    env = RecordLoggedData(make_env(), tmp_path / "log")
    seen: list[dict[str, Any]] = []
    observation, _ = env.reset(seed=7)
    for action in [0, np.int64(5), np.array(3), 2]:
        shown = {name: values.copy() for name, values in observation.items()}
        observation["context"][:] = np.nan  # what an agent does to its observation stays with the agent
        _, reward, _, _, info = env.step(action)
        seen.append({**shown, "action": int(action), "reward": reward, "output": info["output"].copy(), **info})
        info["output"][:] = np.nan
        observation, _ = env.reset()
    env.close()
    env.close()
    log = LoggedDataset.load(tmp_path / "log")
    assert len(log) == 4
    for name in ("context", "query", "action"):
        np.testing.assert_array_equal(getattr(log, name), np.array([row[name] for row in seen]))
    np.testing.assert_array_equal(log.reward, np.array([row["reward"] for row in seen], dtype=np.float32))
    assert log.oracle is not None
    assert_consistent(log, env.unwrapped.simulator)
    assert np.isnan(log.propensity).all()
    assert log.metadata.env_id == "OffPrompts-Synthetic-v0"
    assert log.metadata.env_config == SyntheticConfig(**SMALL).to_json()
    assert log.metadata.seed == 7
    assert log.metadata.versions["numpy"] == np.__version__
    assert log.prompts.fingerprint == env.unwrapped.simulator.prompts.fingerprint
    again = gym.make(log.metadata.env_id, **log.metadata.env_config)
    assert again.unwrapped.simulator.prompts.fingerprint == log.prompts.fingerprint


def play(env: gym.Env[Any, Any], n: int, *, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    env.reset(seed=seed)
    for _ in range(n):
        env.step(rng.integers(6))
        env.reset()


def test_propensity_of_a_policy(tmp_path: Path) -> None:
    policy = TiltedPolicy()
    with RecordLoggedData(make_env(), tmp_path / "log", policy=policy) as env:
        play(env, 20)
        log = env.dataset()
    expected = policy.probabilities(log.contexts)[np.arange(20), log.action]
    np.testing.assert_allclose(log.propensity, expected, rtol=1e-14)


def test_propensity_of_the_caller_passes_outer_wrappers(tmp_path: Path) -> None:
    recorder = RecordLoggedData(make_env(), tmp_path / "log", policy=TiltedPolicy())
    outer = RecordEpisodeStatistics(FlattenObservation(recorder))
    outer.reset(seed=0)
    for propensity in (0.25, 1, np.float32(0.1), math.nan):
        outer.get_wrapper_attr("record_propensity")(propensity)
        outer.step(1)
        outer.reset()
    recorder.record_propensity(0.5)
    outer.reset()  # a new round forgets what was said of the last one
    outer.step(1)
    outer.close()
    log = LoggedDataset.load(tmp_path / "log")
    np.testing.assert_array_equal(log.propensity[:4], [0.25, 1, np.float32(0.1), np.nan])
    assert log.propensity[4] == pytest.approx(TiltedPolicy().probabilities(log.contexts)[4, 1], rel=1e-14)


@pytest.mark.parametrize("wrong", [0, -0.5, 1.0000001, math.inf, "a", None, [0.5]])
def test_wrong_propensities_are_errors_at_once(tmp_path: Path, wrong: Any) -> None:
    with RecordLoggedData(make_env(), tmp_path / "log") as env:
        env.reset(seed=0)
        with pytest.raises(PropensityError, match="propensity: expected"):
            env.record_propensity(wrong)
    with RecordVectorLoggedData(make_vector("native", 2), tmp_path / "vector") as envs:
        envs.reset(seed=0)
        with pytest.raises(PropensityError, match="propensity: expected"):
            envs.record_propensity([0.5, wrong])
        with pytest.raises(PropensityError, match=r"expected shape \(2,\), one number a round, got \(\)"):
            envs.record_propensity(0.5)


def test_a_propensity_without_a_round_is_an_error(tmp_path: Path) -> None:
    with RecordLoggedData(make_env(), tmp_path / "log") as env:
        for _ in range(2):  # before the first reset, and after a step
            with pytest.raises(ResetNeededError, match=r"record_propensity: .* between reset\(\) and step\(\)"):
                env.record_propensity(0.5)
            env.reset(seed=0)
            env.record_propensity(0.25)
            env.step(np.int64(1))
        np.testing.assert_array_equal(env.dataset().propensity, [0.25, 0.25])
    for kind in ("native", "SAME_STEP", "NEXT_STEP", "DISABLED"):
        with RecordVectorLoggedData(make_vector(kind, 2), tmp_path / kind) as envs:
            with pytest.raises(ResetNeededError, match=r"record_propensity: .* between reset\(\) and step\(\)"):
                envs.record_propensity([0.5, 0.5])
            envs.reset(seed=0)
            envs.record_propensity([0.5, 0.25])
            envs.step(np.array([1, 2]))
            if kind == "DISABLED":
                with pytest.raises(ResetNeededError, match="no row would get this propensity"):
                    envs.record_propensity([0.5, 0.25])
                with pytest.raises(ResetNeededError, match=r"call reset\(\) first"):
                    envs.step(np.array([1, 2]))
            np.testing.assert_array_equal(envs.dataset().propensity, [0.5, 0.25])


@pytest.mark.parametrize("opened", [False, True])
def test_a_closed_recorder_records_nothing_and_says_so(tmp_path: Path, opened: bool) -> None:
    env = RecordLoggedData(make_env(), tmp_path / "log")
    play(env, 3)
    envs = RecordVectorLoggedData(make_vector("native", 2), tmp_path / "vector")
    envs.reset(seed=0)
    envs.step(np.zeros(2, dtype=int))
    for recorder, action, name in ((env, 1, "RecordLoggedData"), (envs, np.ones(2, dtype=int), "RecordVectorLoggedD")):
        if opened:
            recorder.reset()
        recorder.close()
        words = rf"the recorder is closed.* {name}.*mode='append'"
        with pytest.raises(StorageError, match=words):
            recorder.step(action)
        with pytest.raises(StorageError, match=words):
            recorder.reset()
        with pytest.raises(StorageError, match=words):
            recorder.record_propensity(0.5)
        with pytest.raises(StorageError, match=words):
            recorder.flush()
        recorder.close()
    assert len(env.dataset()) == 3
    assert len(envs.dataset()) == 2


def test_slow_rounds_are_on_disk_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with RecordLoggedData(make_env(), tmp_path / "log") as env:
        for row in range(3):
            env.reset(seed=row)
            now += 12
            env.step(np.int64(0))
            assert read_manifest(tmp_path / "log").rows == row + 1


def test_wrapper_modes(tmp_path: Path) -> None:
    with RecordLoggedData(make_env(), tmp_path / "log", seed=11) as env:
        play(env, 5)
        first = env.dataset()
    assert first.metadata.seed == 11
    with pytest.raises(StorageError, match="mode='append'"):
        RecordLoggedData(make_env(), tmp_path / "log")
    with RecordLoggedData(make_env(), tmp_path / "log", mode="append") as env:
        play(env, 3, seed=1)
    assert len(LoggedDataset.load(tmp_path / "log")) == 8
    assert_same(LoggedDataset.load(tmp_path / "log").take(slice(5)), first)
    assert [recording.seed for recording in read_manifest(tmp_path / "log").recordings] == [11, 1]
    with (
        RecordLoggedData(make_env(), tmp_path / "log", mode="append") as env,
        pytest.warns(UserWarning, match="already has rows recorded with seed 1"),
    ):
        env.reset(seed=1)
    with pytest.raises(DataError, match="environment config"):
        RecordLoggedData(make_env(reward_std=2.0), tmp_path / "log", mode="append")
    with RecordLoggedData(make_env(reward_std=2.0), tmp_path / "log", mode="overwrite") as env:
        play(env, 2)
    assert len(LoggedDataset.load(tmp_path / "log")) == 2


def test_wrapper_misuse(tmp_path: Path) -> None:
    with RecordLoggedData(make_env(), tmp_path / "a", policy=TiltedPolicy()) as env:
        with pytest.raises(ResetNeededError, match=r"call reset\(\) first"):
            env.step(np.int64(0))
        env.reset(seed=0)
        with pytest.raises(ActionError, match=r"\[0, 6\), got 6"):
            env.step(np.int64(6))
        env.step(np.int64(0))  # the round is still open, and only this step is recorded
        with pytest.raises(ResetNeededError):
            env.step(np.int64(0))
        assert len(env.dataset()) == 1
    assert len(env.dataset()) == 1
    with pytest.raises(DimensionError, match="expected 6 prompts as in env, got 9"):
        RecordLoggedData(make_env(), tmp_path / "b", policy=TiltedPolicy(9))
    with pytest.raises(ConfigError, match="expected an object with 'probabilities' and 'n_prompts', got CountingAgent"):
        RecordLoggedData(make_env(), tmp_path / "b", policy=CountingAgent())
    with pytest.raises(ConfigError, match="expected an environment of this project"):
        RecordLoggedData(gym.make("CartPole-v1"), tmp_path / "b")
    with (
        RecordLoggedData(FlattenObservation(make_env()), tmp_path / "b") as env,
        pytest.raises(ConfigError, match="keys 'context' and 'query', got ndarray"),
    ):
        env.reset(seed=0)

    class Never(TiltedPolicy):
        def probabilities(self, contexts: Contexts) -> FloatArray:
            return np.eye(6)[np.zeros(len(contexts), dtype=int)]

    with RecordLoggedData(make_env(), tmp_path / "c", policy=Never()) as env:
        env.reset(seed=0)
        with pytest.raises(PropensityError, match=r"gives probability 0\.0 to action 3"):
            env.step(np.int64(3))


def test_a_nan_reward_costs_no_other_round(tmp_path: Path) -> None:
    env = RecordLoggedData(TransformReward(make_env(), lambda r: math.nan if r > 1 else r), tmp_path / "log")
    lost = 0
    for seed in range(40):
        env.reset(seed=seed)
        try:
            env.step(np.int64(0))
        except NumericalError:
            lost += 1
    assert 0 < lost < 40
    assert len(env.dataset()) == 40 - lost
    env.close()
    envs = RecordVectorLoggedData(VectorReward(make_vector("native")), tmp_path / "vector")
    envs.reset(seed=0)
    envs.step(np.zeros(5, dtype=int))
    with pytest.raises(NumericalError, match="got nan in row 4"):
        envs.step(np.full(5, 3))
    envs.step(np.ones(5, dtype=int))
    assert envs.dataset().action.tolist() == [0] * 5 + [1] * 5
    assert_consistent(envs.dataset(), envs.unwrapped.simulator)
    envs.close()


class VectorReward(gym.vector.VectorWrapper):
    """Spoils the last reward when prompt 3 is played."""

    def step(self, actions: Any) -> Any:
        observation, reward, *rest = self.env.step(actions)
        return observation, np.append(reward[:-1], math.nan if actions[-1] == 3 else reward[-1]), *rest


def test_wrappers_name_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="got a vector environment; record it with RecordVectorLoggedData"):
        RecordLoggedData(make_vector("native"), tmp_path / "log")
    with pytest.raises(ConfigError, match="got a single environment; record it with RecordLoggedData"):
        RecordVectorLoggedData(make_env(), tmp_path / "log")
    assert not (tmp_path / "log").exists()


def test_wrapper_keeps_text_and_ids(tmp_path: Path) -> None:
    with RecordLoggedData(PromptEnv(text_world(), config={"a": 1}), tmp_path / "log", policy=TiltedPolicy(3)) as env:
        env.reset(seed=0)
        for _ in range(30):
            env.step(np.int64(1))
            env.reset()
        log = env.dataset()
    assert log.metadata.env_id is None
    assert log.prompts.texts == ("funny", "sad", "old")
    assert log.sentence is not None
    assert log.query_text is not None
    assert log.user_id is not None
    assert log.item_id is not None
    for i in range(30):
        assert log.query_text[i] == f"Fïlm {log.item_id[i]} (199{log.item_id[i]})\x00"
        assert log.sentence[i] == f"{log.query_text[i]} is sad {log.output[i, 0]:.3f}"
        assert tuple(log.context[i]) == (log.user_id[i], log.user_id[i] ** 2)


def test_wrapper_is_in_the_spec(tmp_path: Path) -> None:
    with RecordLoggedData(make_env(), tmp_path / "log") as env:
        assert env.spec is not None
        wrapper = env.spec.additional_wrappers[-1]
        assert wrapper.name == "RecordLoggedData"
        assert wrapper.kwargs is not None
        assert wrapper.kwargs["path"] == str(tmp_path / "log")


# ------------------------------------------------------------------------------------------------ the vector wrapper


@pytest.mark.parametrize("kind", ["native", "SAME_STEP", "NEXT_STEP", "DISABLED"])
def test_vector_wrapper_records_rounds_and_no_dummies(tmp_path: Path, kind: str) -> None:
    policy = TiltedPolicy()
    envs = make_vector(kind)
    with RecordVectorLoggedData(envs, tmp_path / "log", policy=policy, shard_rows=12) as recorder:
        observation, _ = recorder.reset(seed=3)
        rows: list[tuple[Any, ...]] = []
        for step in range(8):
            shown = {name: values.copy() for name, values in observation.items()}
            for values in observation.values():
                values[:] = 0  # the recorder has its own copy; so has Gymnasium's environment, not the native one
            actions = (np.arange(5) + step) % 6
            if kind == "native":
                recorder.unwrapped._contexts.context[:] = shown["context"]
                recorder.unwrapped._contexts.query[:] = shown["query"]
            observation, reward, terminated, _, _ = recorder.step(actions)
            if kind != "NEXT_STEP" or step % 2 == 0:
                assert terminated.all()
                rows += [(shown["context"][i], shown["query"][i], actions[i], reward[i]) for i in range(5)]
            if kind == "DISABLED":
                observation, _ = recorder.reset()
            actions[:] = 0
        log = recorder.dataset()
    assert len(log) == len(rows) == (20 if kind == "NEXT_STEP" else 40)
    for column, values in zip((log.context, log.query, log.action, log.reward), zip(*rows, strict=True), strict=True):
        np.testing.assert_array_equal(column, np.array(values, dtype=column.dtype))
    expected = policy.probabilities(log.contexts)[np.arange(len(log)), log.action]
    np.testing.assert_allclose(log.propensity, expected, rtol=1e-14)
    assert_consistent(log, SyntheticConfig(**SMALL).build())
    assert log.metadata.env_id == "OffPrompts-Synthetic-v0"
    assert log.metadata.seed == 3
    assert envs.closed


def test_vector_wrapper_around_processes(tmp_path: Path) -> None:
    envs = gym.make_vec(
        "OffPrompts-Synthetic-v0",
        num_envs=2,
        vectorization_mode="async",
        vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
        **SMALL,
    )
    with RecordVectorLoggedData(envs, tmp_path / "log") as recorder:
        recorder.reset(seed=0)
        for _ in range(3):
            recorder.step(np.array([1, 2]))
        assert_consistent(recorder.dataset(), SyntheticConfig(**SMALL).build())


def test_vector_propensity_of_the_caller(tmp_path: Path) -> None:
    with RecordVectorLoggedData(make_vector("native", 3), tmp_path / "log") as recorder:
        recorder.reset(seed=0)
        recorder.record_propensity([0.1, 0.2, math.nan])
        recorder.step(np.array([1, 2, 3]))
        recorder.step(np.array([1, 2, 3]))
        np.testing.assert_array_equal(recorder.dataset().propensity, [0.1, 0.2, *[np.nan] * 4])


def test_vector_wrapper_misuse(tmp_path: Path) -> None:
    with RecordVectorLoggedData(make_vector("native", 3), tmp_path / "a", policy=TiltedPolicy()) as recorder:
        with pytest.raises(ResetNeededError):
            recorder.step(np.zeros(3, dtype=int))
        recorder.reset(seed=0)
        with pytest.raises(ActionError):
            recorder.step(np.array([0, 1, 6]))
        recorder.step(np.array([0, 1, 5]))
        assert recorder.dataset().action.tolist() == [0, 1, 5]
    worlds = [lambda: make_env(seed=0), lambda: make_env(seed=1)]
    with pytest.raises(ConfigError, match="one catalogue of prompts"):
        RecordVectorLoggedData(gym.vector.SyncVectorEnv(worlds), tmp_path / "b")
    with pytest.raises(ConfigError, match="expected an environment of this project"):
        RecordVectorLoggedData(gym.make_vec("CartPole-v1", num_envs=2), tmp_path / "b")


def test_vector_wrapper_keeps_text_and_ids(tmp_path: Path) -> None:
    for name, envs in (
        ("native", PromptVectorEnv(4, text_world())),
        ("sync", gym.vector.SyncVectorEnv([lambda: PromptEnv(text_world())] * 4, autoreset_mode="SameStep")),
        ("next", gym.vector.SyncVectorEnv([lambda: PromptEnv(text_world())] * 4, autoreset_mode="NextStep")),
    ):
        with RecordVectorLoggedData(envs, tmp_path / name, policy=TiltedPolicy(3)) as recorder:
            recorder.reset(seed=0)
            for _ in range(6):
                recorder.step(np.array([0, 1, 2, 0]))
            log = recorder.dataset()
        assert len(log) == (12 if name == "next" else 24)
        for i in range(len(log)):
            prompt = ("funny", "sad", "old", "funny")[i % 4]
            assert log.sentence[i] == f"{log.query_text[i]} is {prompt} {log.output[i, 0]:.3f}"
            assert tuple(log.context[i]) == (log.user_id[i], log.user_id[i] ** 2)


# ----------------------------------------------------------------------------------------------------------- collect


class Halved(gym.ActionWrapper[Any, Any, Any]):
    """A foreign wrapper that changes what an action does."""

    def action(self, action: Any) -> Any:
        return action // 2


class OwnStep(PromptEnv):
    """A subclass that steps in its own way."""

    def step(self, action: Any) -> Any:
        observation, _, terminated, truncated, info = super().step(action)
        return observation, 1.0, terminated, truncated, info


ENVS = {
    "simulator": lambda: SyntheticConfig(**SMALL).build(),
    "text simulator": text_world,
    "env": make_env,
    "text env": lambda: PromptEnv(text_world()),
    "foreign wrapper": lambda: TransformReward(make_env(), lambda r: r),
    "own step": lambda: OwnStep(SyntheticConfig(**SMALL).build()),
    "vector": lambda: make_vector("native"),
    "sync": lambda: make_vector("SAME_STEP"),
    "next step": lambda: make_vector("NEXT_STEP"),
}


@pytest.mark.filterwarnings("ignore:.*nothing was recorded")
@pytest.mark.parametrize("kind", ENVS)
def test_collect_is_named_by_its_seed(tmp_path: Path, kind: str) -> None:
    """In memory or on disk, at once, in pieces, or with small shards: the rows are the same."""
    policy = TiltedPolicy(3 if "text" in kind else 6)
    env = ENVS[kind]()
    size = 5
    log = collect(env, policy, 37, seed=4, batch_size=size)
    assert len(log) == 37
    assert_same(collect(env, policy, 37, tmp_path / "a", seed=4, batch_size=size, shard_rows=3), log)
    assert_same(collect(ENVS[kind](), policy, 37, seed=4, batch_size=size), log)
    assert_same(collect(env, policy, 50, seed=4, batch_size=size).take(slice(37)), log)
    for n in (1, 14, 15, 16, 16, 37, 20):
        pieces = collect(env, policy, n, tmp_path / "b", seed=4, batch_size=size, mode="append")
    assert_same(pieces, log)
    assert_same(collect(env, policy, 37, tmp_path / "b", seed=4, mode="append"), log)
    other = collect(env, policy, 37, seed=5, batch_size=size)
    assert not (other.context == log.context).all()
    assert not (other.action == log.action).all()
    pmf = policy.probabilities(log.contexts)
    np.testing.assert_allclose(log.propensity, pmf[np.arange(37), log.action], rtol=1e-14)
    assert log.metadata.seed == 4
    assert (log.sentence is not None) == ("text" in kind)
    if "text" not in kind:
        assert_consistent(log, SyntheticConfig(**SMALL).build(), reward_std=np.inf)


def test_n_counts_the_rows_already_there(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    log = collect(make_env(), TiltedPolicy(), 20, tmp_path / "log", batch_size=5)
    with pytest.raises(StorageError, match=r"mode='append' .*n counts the rows already there"):
        collect(make_env(), TiltedPolicy(), 10, tmp_path / "log", batch_size=5)
    assert not recwarn
    for n in (10, 20):
        with pytest.warns(UserWarning, match=rf"nothing was recorded, the log has 20 rows already and n={n} counts"):
            assert_same(collect(make_env(), TiltedPolicy(), n, tmp_path / "log", mode="append"), log)
    assert len(collect(make_env(), TiltedPolicy(), 21, tmp_path / "log", mode="append")) == 21
    assert not recwarn


def test_collect_batches_share_no_randomness() -> None:
    log = collect(make_env(), TiltedPolicy(), 4000, batch_size=100)
    assert len(np.unique(log.context, axis=0)) == 4000
    # Within a batch and across batches, reward noise, output noise and contexts do not correlate.
    assert log.oracle is not None
    noise = log.reward - log.oracle.expected_reward
    columns = np.column_stack([log.context[:, 0], log.output[:, 0], noise, np.roll(noise, 100), log.action])
    correlation = np.corrcoef(columns.T)
    assert abs(correlation[2]).max() == pytest.approx(1)
    assert np.abs(np.delete(correlation[2], 2)).max() < 0.06


def test_collect_plays_the_wrappers_that_change_things() -> None:
    log = collect(Halved(make_env()), TiltedPolicy(), 200)
    assert log.action.max() == 5  # what the agent chose
    world = SyntheticConfig(**SMALL).build()
    residual = log.output - world.outputs.mean(log.contexts, log.action // 2)
    assert np.abs(residual).max() < 6
    scaled = collect(TransformReward(make_env(), lambda r: 0 * r + 3), TiltedPolicy(), 10)
    np.testing.assert_array_equal(scaled.reward, 3)
    np.testing.assert_array_equal(collect(OwnStep(world), TiltedPolicy(), 10).reward, 1)


def test_collect_through_env_and_simulator_is_the_same() -> None:
    direct = collect(SyntheticConfig(**SMALL).build(), TiltedPolicy(), 10)
    through = collect(make_env(), TiltedPolicy(), 10)
    np.testing.assert_array_equal(through.reward, direct.reward)
    assert direct.metadata.env_id is None
    assert through.metadata.env_id == "OffPrompts-Synthetic-v0"


@pytest.mark.parametrize("kind", ["simulator", "foreign wrapper", "vector", "sync"])
def test_agents_learn_while_they_are_recorded(kind: str) -> None:
    agent = CountingAgent()
    log = collect(ENVS[kind](), agent, 23, batch_size=5)
    assert [len(batch) for batch in agent.batches] == [5, 5, 5, 5, 3]
    counts = np.zeros(6)
    for start in range(0, 23, 5):
        pmf = (1 / (1 + counts)) / (1 / (1 + counts)).sum()
        rows = slice(start, min(start + 5, 23))
        np.testing.assert_allclose(log.propensity[rows], pmf[log.action[rows]], rtol=1e-12)
        counts += np.bincount(log.action[rows], minlength=6)


def test_default_batches_waste_nothing() -> None:
    class Counting(TextOutputs):
        drawn = 0

        def sample(self, contexts: Contexts, actions: IntArray, rng: np.random.Generator) -> Outputs:
            self.drawn += len(contexts)
            return super().sample(contexts, actions, rng)

    outputs = Counting()
    world = Simulator(TextContexts(), outputs, TextRewards())
    for n in (1, 10, 256, 257, 300, 1000):
        outputs.drawn = 0
        assert len(collect(world, TiltedPolicy(3), n)) == n
        assert outputs.drawn < n + 4


def test_round_by_round_in_small_memory(tmp_path: Path) -> None:
    """Batches of one round, as agents that learn after each round have them."""
    log = collect(make_env(), TiltedPolicy(), 1500, batch_size=1)
    assert_same(collect(make_env(), TiltedPolicy(), 1500, tmp_path / "log", batch_size=1, shard_rows=700), log)
    assert [shard.rows for shard in read_manifest(tmp_path / "log").shards] == [700, 700, 100]


def test_collect_misuse(tmp_path: Path) -> None:
    policy = TiltedPolicy()
    path = tmp_path / "log"
    first = collect(make_env(), policy, 10, path, seed=1, batch_size=4)
    for arguments, error, words in (
        ({"n": 0}, ConfigError, "n: expected an integer ≥ 1, got 0"),
        ({"seed": -1}, ConfigError, "seed: expected an integer ≥ 0, got -1"),
        ({"batch_size": 0}, ConfigError, "batch_size: expected an integer ≥ 1, got 0"),
        ({"env": 3}, ConfigError, "env: expected an environment, .* got int"),
        ({"env": gym.make("CartPole-v1")}, ConfigError, "environment of this project"),
        ({"policy": 3}, ConfigError, "policy: expected an object with 'probabilities'.* got int"),
        ({"policy": TiltedPolicy(5)}, DimensionError, "expected 6 prompts as in env, got 5"),
        ({"env": make_vector("native"), "batch_size": 6}, ConfigError, "expected 5, the number of sub-environments"),
        ({"env": FlattenObservation(make_env())}, ConfigError, "keys 'context' and 'query'"),
        ({"path": path}, StorageError, "found one of 10 rows"),
        ({"path": path, "mode": "append", "seed": 2}, ConfigError, "seed=1 and batch_size=4 as recorded, got seed=2"),
        ({"path": path, "mode": "append", "seed": 1, "batch_size": 5}, ConfigError, "got seed=1 and batch_size=5"),
        ({"path": path, "mode": "append", "env": make_env(n_prompts=7)}, DimensionError, "expected 7 prompts"),
        ({"path": path, "mode": "append", "env": make_env(reward_std=3.0)}, DataError, "environment config"),
    ):
        with pytest.raises(error, match=words):
            collect(**{"env": make_env(), "policy": policy, "n": 20, **arguments})
    assert_same(LoggedDataset.load(path), first)
    first.save(tmp_path / "saved")
    with pytest.raises(ConfigError, match="a log that collect has begun"):
        collect(make_env(), policy, 20, tmp_path / "saved", seed=1, mode="append")


@pytest.mark.parametrize(
    ("actions", "propensities", "error", "words"),
    [
        ([0, 1, 6], [1, 1, 1], ActionError, "6 in row 2"),
        ([0, 1], [1, 1, 1], ActionError, "expected 3"),
        ([0.0, 1.0, 2.0], [1, 1, 1], ActionError, "float64"),
        ([0, 1, 2], [1, 1], PropensityError, r"expected shape \(3,\)"),
        ([0, 1, 2], [0.5, 0, 1], PropensityError, "got 0.0"),
    ],
)
def test_agents_are_checked(actions: Any, propensities: Any, error: type[Exception], words: str) -> None:
    class Wrong:
        def act(self, contexts: Contexts, rng: np.random.Generator) -> Any:
            return actions, propensities

    with pytest.raises(error, match=words):
        collect(make_env(), Wrong(), 3, batch_size=3)


class OneArgument:
    def act(self, observation: Any) -> Any:
        return 0


class ThreeArguments:
    def act(self, contexts: Contexts, rng: np.random.Generator, epsilon: float) -> Any:
        return 0


class OnlyActions:
    def act(self, contexts: Contexts, rng: np.random.Generator) -> Any:
        return np.zeros(len(contexts), dtype=int)


class NoMethod:
    act = 3


@pytest.mark.parametrize(
    ("agent", "words"),
    [
        (
            OneArgument(),
            r"got OneArgument.act\(observation: Any\).*too many positional arguments; change its arguments",
        ),
        (ThreeArguments(), "missing a required argument: 'epsilon'"),
        (CountingAgent, r"got CountingAgent.act\(self, .*pass an instance, not the class"),
        (OnlyActions(), r"OnlyActions.act returned ndarray; return both, each of shape \(2,\)"),
        (NoMethod(), "NoMethod.act is 3"),
    ],
)
def test_agents_are_told_the_signature(agent: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=r"act\(contexts, rng\) -> \(actions, propensities\)") as caught:
        collect(make_env(), agent, 2, batch_size=2)
    assert re.search(words, str(caught.value))


def test_agents_may_have_more_arguments() -> None:
    class Optional(CountingAgent):
        def act(self, contexts: Contexts, rng: np.random.Generator, *, greedy: bool = False) -> Any:
            return list(super().act(contexts, rng))

    assert len(collect(make_env(), Optional(), 7)) == 7


def test_progress_is_shown_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    collect(make_env(), TiltedPolicy(), 10)
    assert capsys.readouterr().err == ""
    collect(make_env(), TiltedPolicy(), 10, progress=True)
    assert "10/10" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- interruptions


@pytest.fixture
def alarm() -> Iterator[None]:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(os.name != "posix", reason="needs timers that interrupt")
@pytest.mark.usefixtures("alarm")
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:.*nothing was recorded", "ignore:.*no checksum"
)
def test_ctrl_c_and_go_on(tmp_path: Path) -> None:
    """Interrupted at many moments, resumed with the same call: the log is that of a recording left alone."""
    env, policy, n = make_env(), TiltedPolicy(), 20_000
    whole = collect(env, policy, n, seed=2, batch_size=64)
    interrupted = 0
    # Python drops an interrupt that lands in a destructor; that recording then runs through, and another one is made.
    for path in (tmp_path / f"log {i}" for i in range(20)):
        for attempt in range(200):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.004 * (3 + attempt))
                log = collect(env, policy, n, path, seed=2, batch_size=64, mode="append", shard_rows=512)
                signal.setitimer(signal.ITIMER_REAL, 0)
                break
            except KeyboardInterrupt:
                interrupted += 1
        assert_same(log, whole)
        if interrupted > 3:
            return
    pytest.fail(f"interrupted only {interrupted} times")


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from tests.test_recording import make_env, TiltedPolicy
from offprompts_env.collecting import collect
collect(make_env(), TiltedPolicy(), 10_000_000, {path!r}, seed=2, batch_size=64, mode="append", shard_rows=256)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs kill -9")
@pytest.mark.filterwarnings("ignore:.*no checksum")
def test_kill_9_in_the_middle_of_a_recording(tmp_path: Path) -> None:
    path = tmp_path / "log"
    root = str(Path(__file__).parents[1])
    for delay in (0.05, 0.11):
        before = read_manifest(path).rows if path.exists() else 0
        process = subprocess.Popen([sys.executable, "-c", SCRIPT.format(root=root, path=str(path))])
        deadline = time.monotonic() + 30
        while not (path.exists() and list(path.glob("shard*")) and read_manifest(path).rows > before):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(delay)
        flushed = read_manifest(path).rows
        process.send_signal(signal.SIGKILL)
        process.wait()
        log = LoggedDataset.load(path)
        assert len(log) >= flushed > before
        assert_same(log, collect(make_env(), TiltedPolicy(), len(log), seed=2, batch_size=64))
    n = len(log) + 100
    more = collect(make_env(), TiltedPolicy(), n, path, seed=2, mode="append")
    assert_same(more, collect(make_env(), TiltedPolicy(), n, seed=2, batch_size=64))


FORGETFUL = """
import sys
sys.path.insert(0, {root!r})
from tests.test_recording import make_env, play
from offprompts_env.recording import RecordLoggedData
env = RecordLoggedData(make_env(), {path!r})
play(env, 7)
raise SystemExit("no close")
"""


def test_a_forgotten_close_loses_nothing(tmp_path: Path) -> None:
    code = FORGETFUL.format(root=str(Path(__file__).parents[1]), path=str(tmp_path / "log"))
    subprocess.run([sys.executable, "-c", code], check=False, stderr=subprocess.DEVNULL)
    assert len(LoggedDataset.load(tmp_path / "log")) == 7


class _Scribbler:
    """Plays prompt 0, and overwrites what it was shown."""

    def act(self, contexts, rng):
        contexts.context[:] = 0
        contexts.query[:] = 0
        return np.zeros(len(contexts), dtype=np.int64), np.ones(len(contexts))


def test_what_an_agent_does_to_what_it_was_shown_reaches_no_round():
    world = SyntheticConfig(n_prompts=5, reward_std=0.0).build()
    log = collect(world, _Scribbler(), 20, seed=0, progress=False)
    assert np.abs(log.context).min() > 0
    np.testing.assert_allclose(log.reward, world.rewards.mean(log.contexts, log.outputs), rtol=1e-5)
    envs = gym.make_vec("OffPrompts-Synthetic-v0", num_envs=8, n_prompts=5, reward_std=0.0)
    shown, _ = envs.reset(seed=0)
    kept = {name: values.copy() for name, values in shown.items()}
    shown["context"][:] = 0
    infos = envs.step(np.zeros(8, dtype=np.int64))[-1]
    np.testing.assert_array_equal(infos["final_obs"]["context"], kept["context"])


def test_an_agent_that_learns_is_taught_every_256_rounds():
    taught = []

    class Learner(_Scribbler):
        def learn(self, log):
            taught.append(len(log))

    collect(SyntheticConfig(n_prompts=5).build(), Learner(), 600, progress=False)
    assert taught == [256, 256, 88]
