import json
import os
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

import agents
import offprompts_env as op
from offprompts_env.errors import (
    ActionError,
    ConfigError,
    DataError,
    DimensionError,
    MissingDependencyError,
    OffPromptsError,
    PropensityError,
    StorageError,
)
from offprompts_env.interchange import minari as ours
from offprompts_env.interchange.minari import from_minari, to_minari
from offprompts_env.types import LoggedDataset, LogMetadata, PromptSet
from tests.test_storage import assert_same, logs, make_log

minari = pytest.importorskip("minari")
pytest.importorskip("h5py")

pytestmark = pytest.mark.filterwarnings("ignore:the environment Some-v0")


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Minari's directory of datasets: never that of whoever runs this."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


# ------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("rows", [7, 10_000])
def test_round_trip(monkeypatch: pytest.MonkeyPatch, text: bool, rows: int) -> None:
    monkeypatch.setattr(ours, "EPISODE_ROWS", rows)
    log = make_log(text=text)
    dataset = to_minari(log, "bandits/log-v0", oracle=True)
    assert (dataset.total_episodes, dataset.total_steps) == (8 if rows == 7 else 1, 50)
    assert_same(from_minari(dataset, oracle=True), log)
    assert_same(from_minari("bandits/log-v0"), replace(log, oracle=None))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(log=logs())
def test_any_log_comes_back(tmp_path: Path, log: LoggedDataset) -> None:
    number = len(list(tmp_path.iterdir()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = to_minari(log, "any-v0", root=tmp_path / str(number), oracle=log.oracle is not None)
    assert_same(from_minari(dataset, oracle=log.oracle is not None), log)


def test_the_truth_stays_at_home_unless_asked_for() -> None:
    dataset = to_minari(make_log(), "log-v0")
    assert "expected_reward" not in dataset[0].infos
    with pytest.raises(DataError, match="expected 'expected_reward' in infos, it is missing; pass oracle=False"):
        from_minari(dataset, oracle=True)
    assert from_minari(to_minari(make_log(), "log-v1", oracle=True)).oracle is None


def test_what_minari_shows(root: Path) -> None:
    log = make_log(20, text=False)
    log = replace(log, sentence=np.array([f"☃ {i}" for i in range(20)], dtype=object))
    dataset = to_minari(log, "some/where-v3")
    assert dataset.spec.dataset_id == "some/where-v3"
    assert list(minari.list_local_datasets()) == ["some/where-v3"]
    assert list(root.iterdir()) == [root / "some"]
    assert [entry.name for entry in (root / "some").iterdir()] == ["where-v3"]
    episode = minari.load_dataset("some/where-v3")[0]
    # One more observation and info than steps, as in every Minari dataset; what came of step t is at t + 1.
    np.testing.assert_array_equal(episode.observations["context"], np.vstack([log.context, log.context[-1:]]))
    assert dataset.observation_space.contains({name: values[-1] for name, values in episode.observations.items()})
    np.testing.assert_array_equal(episode.actions, log.action)
    np.testing.assert_array_equal(episode.rewards, log.reward)
    np.testing.assert_array_equal(episode.infos["propensity"][1:], log.propensity)
    assert [text.decode() for text in episode.infos["sentence"]] == ["", *log.sentence]
    assert episode.terminations.all()
    assert not episode.truncations.any()
    assert dataset.action_space == gym.spaces.Discrete(7)


def test_texts_are_plain_unless_hdf5_cannot_hold_them() -> None:
    log = make_log(4)
    log = replace(log, query_text=np.array(["Wall·E", "", '"quoted"', "[1]"], dtype=object))
    infos = to_minari(log, "log-v0")[0].infos
    assert infos["query_text"][3] == b'"quoted"'
    # The sentences of this log have NUL characters.
    assert [json.loads(text) for text in infos["sentence"][1:]] == log.sentence.tolist()


def test_the_directory_is_the_users_choice(tmp_path: Path, root: Path) -> None:
    log = replace(make_log(), oracle=None)
    dataset = to_minari(log, "my/log-v0", root=tmp_path / "mine")
    assert Path(dataset.storage.data_path) == tmp_path / "mine" / "my" / "log-v0" / "data"
    assert not root.exists()
    assert_same(from_minari("my/log-v0", root=tmp_path / "mine"), log)


def test_a_part_of_a_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "EPISODE_ROWS", 10)
    log = replace(make_log(), oracle=None)
    dataset = to_minari(log, "log-v0")
    kept = dataset.filter_episodes(lambda episode: episode.id in (1, 3))
    assert_same(from_minari(kept), log.take(np.r_[10:20, 30:40]))


# ---------------------------------------------------------------------------------------------- the environment behind


@pytest.mark.parametrize("env_id", ["OffPrompts-Synthetic-v0", "OffPrompts-MovieLens-v0"])
def test_the_environment_can_be_recovered(env_id: str) -> None:
    env = gym.make(env_id, n_prompts=11) if "Synthetic" in env_id else gym.make(env_id)
    n_prompts = int(env.action_space.n)
    log = op.collect(env, agents.UniformPolicy(n_prompts), 3, seed=0, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = to_minari(log, "log-v0")
    again = dataset.recover_environment()
    assert again.unwrapped.simulator.prompts.fingerprint == log.prompts.fingerprint
    assert again.unwrapped.config == env.unwrapped.config
    assert dataset.observation_space == env.observation_space
    assert dataset.action_space == env.action_space
    assert_same(from_minari("log-v0"), replace(log, oracle=None))


def test_an_environment_that_cannot_be_recovered_is_said() -> None:
    with pytest.warns(UserWarning, match="environment Some-v0 of the log cannot be recovered") as caught:
        dataset = to_minari(make_log(), "log-v0")
    assert caught[0].filename == __file__
    assert dataset.env_spec is None
    env = gym.make("OffPrompts-Synthetic-v0", prompts=PromptSet(np.eye(5)))
    log = op.collect(env, agents.UniformPolicy(5), 12, progress=False)
    with pytest.warns(UserWarning, match=r"it has parts of its own \(prompts\)"):
        dataset = to_minari(log, "log-v1")
    assert from_minari(dataset).metadata == log.metadata


# ------------------------------------------------------------------------------------- datasets that a collector made


def tree_map(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """As jax's, for dicts and leaves: all that Minari's episodes use of jax."""
    if isinstance(tree, dict):
        return {key: tree_map(function, tree[key], *(other[key] for other in rest)) for key in tree}
    return function(tree, *rest)


@pytest.fixture
def no_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    jax, tree_util = types.ModuleType("jax"), types.ModuleType("jax.tree_util")
    tree_util.tree_map = tree_map  # type: ignore[attr-defined]
    jax.tree_util = tree_util  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jax", jax)
    monkeypatch.setitem(sys.modules, "jax.tree_util", tree_util)


class KeepSaid(minari.StepDataCallback):
    """What a user writes to keep what only `step` says: infos of reset and step need the same keys."""

    def __call__(self, env: Any, **kwargs: Any) -> Any:
        data = super().__call__(env, **kwargs)
        info, blank = data["info"], np.zeros(env.unwrapped.simulator.outputs.output_dim, np.float32)
        data["info"] = {
            "output": info.get("output", blank),
            "expected_reward": info.get("expected_reward", 0.0),
            "propensity": 0.125,
        }
        return data


def play(**how: Any) -> tuple[Any, dict[str, list[Any]], gym.Env[Any, Any]]:
    """Collect 10 rounds; return the dataset, what was really played, and the environment."""
    env = minari.DataCollector(gym.make("OffPrompts-Synthetic-v0", n_prompts=8), **how)
    played: dict[str, list[Any]] = {name: [] for name in ("context", "query", "action", "reward", "output", "expected")}
    for seed in range(10):
        shown, _ = env.reset(seed=seed)
        action = seed % 8
        _, reward, _, _, info = env.step(action)
        for name, value in (*shown.items(), ("action", action), ("reward", reward), ("output", info["output"])):
            played[name].append(value)
        played["expected"].append(info["expected_reward"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return env.create_dataset("collected-v0"), played, env


@pytest.mark.usefixtures("no_jax")
def test_a_collected_dataset() -> None:
    dataset, played, env = play()
    prompts = env.unwrapped.simulator.prompts
    with pytest.raises(DataError, match=r"pass prompts=env.unwrapped.simulator.prompts"):
        from_minari(dataset)
    log = from_minari(dataset, prompts)
    for name in ("context", "query", "action"):
        np.testing.assert_array_equal(getattr(log, name), played[name])
    np.testing.assert_array_equal(log.reward, np.float32(played["reward"]))
    assert np.isnan(log.propensity).all()
    assert log.output.shape == (10, 0)
    assert log.metadata == LogMetadata("OffPrompts-Synthetic-v0", {"n_prompts": 8})
    assert_same(from_minari("collected-v0", prompts), log)


@pytest.mark.usefixtures("no_jax")
def test_a_collected_dataset_with_infos() -> None:
    dataset, played, env = play(step_data_callback=KeepSaid, record_infos=True)
    log = from_minari(dataset, env.unwrapped.simulator.prompts, oracle=True)
    np.testing.assert_array_equal(log.output, played["output"])
    np.testing.assert_array_equal(log.propensity, np.full(10, 0.125))
    assert log.oracle is not None
    np.testing.assert_array_equal(log.oracle.expected_reward, np.float32(played["expected"]))


# ------------------------------------------------------------------------------------------------------- wrong input


def foreign(**changes: Any) -> Any:
    """A dataset of three rounds that another program wrote."""
    fields: dict[str, Any] = {
        "observations": {"context": np.ones((4, 2), np.float32), "query": np.ones((4, 1), np.float32)},
        "actions": np.array([0, 1, 2]),
        "rewards": np.ones(3),
        "terminations": np.ones(3, bool),
        "truncations": np.zeros(3, bool),
        "infos": {"propensity": np.array([0.5, 0.25, 1.0])},
    }
    spaces = {
        "observation_space": gym.spaces.Dict(context=gym.spaces.Box(-9, 9, (2,)), query=gym.spaces.Box(-9, 9, (1,)))
    }
    spaces["action_space"] = gym.spaces.Discrete(3)
    spaces |= {name: changes.pop(name) for name in list(spaces) if name in changes}
    fields |= changes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        buffers = [minari.data_collector.EpisodeBuffer(**fields)]
        return minari.create_dataset_from_buffers("foreign-v0", buffers, **spaces)


PROMPTS = PromptSet(np.eye(3))


def test_a_dataset_of_another_program() -> None:
    log = from_minari(foreign(), PROMPTS)
    np.testing.assert_array_equal(log.propensity, [0.5, 0.25, 1.0])
    assert (log.context.shape, log.query.shape, log.metadata) == ((3, 2), (3, 1), LogMetadata())


FOREIGN: dict[str, tuple[dict[str, Any], type[OffPromptsError], str]] = {
    "long": ({"terminations": np.array([0, 0, 1], bool)}, DataError, "episode 0: expected every step to terminate"),
    "cut off": ({"truncations": np.array([0, 0, 1], bool)}, DataError, "episode 0: expected every step to terminate"),
    "flat": (
        {"observations": np.ones((4, 2), np.float32), "observation_space": gym.spaces.Box(-9, 9, (2,))},
        DataError,
        "expected observations with the keys context and query, got ndarray",
    ),
    "short infos": ({"infos": {"propensity": np.ones(2)}}, DataError, "expected 4 values of propensity .* got 2"),
    "probability": ({"infos": {"propensity": np.full(3, 1.5)}}, PropensityError, "got 1.5 in row 0"),
    "ids": ({"infos": {"user_id": np.array([0.5, 1, 2])}}, DataError, "expected integers of user_id in infos"),
    "sentences": ({"infos": {"sentence": np.ones(3)}}, DataError, "sentence: expected text"),
    "prompts": ({"action_space": gym.spaces.Discrete(4)}, DimensionError, r"expected actions Discrete\(3\)"),
    "start": ({"action_space": gym.spaces.Discrete(3, start=1)}, DimensionError, r"got Discrete\(3, start=1\)"),
    "action": ({"actions": np.array([0, 1, 7])}, ActionError, r"\[0, 3\), got 7 in row 2"),
    "nan": ({"rewards": np.array([1.0, np.nan, 1])}, DataError, "reward: expected finite numbers"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_what_is_wrong_with_a_dataset(case: str) -> None:
    changes, error, words = FOREIGN[case]
    dataset = foreign(**changes)
    with pytest.raises(error, match=words):
        from_minari(dataset, PROMPTS)


def change_metadata(**changes: Any) -> Callable[[Path], None]:
    def change(data: Path) -> None:
        file = data / "metadata.json"
        content = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))

    return change


def cut(name: str) -> Callable[[Path], None]:
    return lambda data: os.truncate(data / name, 40)


DAMAGE: dict[str, tuple[Callable[[Path], None], type[OffPromptsError], str]] = {
    "no prompts": (lambda data: (data / "prompts.safetensors").unlink(), StorageError, "prompts.safetensors: expected"),
    "half prompts": (cut("prompts.safetensors"), StorageError, "prompts.safetensors: expected the prompts of the log"),
    "half rows": (cut("main_data.hdf5"), StorageError, "expected whole episodes, cannot read them"),
    "no metadata": (lambda data: (data / "metadata.json").unlink(), StorageError, "expected a Minari dataset"),
    "half metadata": (cut("metadata.json"), StorageError, "expected a Minari dataset, cannot read it"),
    "no spaces": (change_metadata(action_space=None), DataError, "but action_space is missing"),
    "part": (change_metadata(offprompts={"version": 1}), StorageError, "expected 'offprompts' .* to be whole"),
    "newer": (
        change_metadata(offprompts={"version": 2, "prompt_fingerprint": "", "json_texts": [], "metadata": {}}),
        StorageError,
        "expected format version 1 .* upgrade",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(root: Path, case: str) -> None:
    change, error, words = DAMAGE[case]
    to_minari(make_log(), "log-v0")
    change(root / "log-v0" / "data")
    with pytest.raises(error, match=words):
        from_minari("log-v0")


def test_reading_makes_no_environment(root: Path) -> None:
    """Minari would import whatever class the file names; a data file must not choose what code runs."""
    to_minari(make_log(), "log-v0")
    spec = json.loads(gym.spec("OffPrompts-Synthetic-v0").to_json()) | {"entry_point": "antigravity:fly"}
    change_metadata(observation_space=None, env_spec=json.dumps(spec))(root / "log-v0" / "data")
    with pytest.raises(DataError, match="observation_space is missing"):
        from_minari("log-v0")
    assert "antigravity" not in sys.modules


CALLS: dict[str, tuple[Callable[[], object], type[OffPromptsError], str]] = {
    "version": (lambda: to_minari(make_log(), "log"), ConfigError, "dataset_id: expected .* got 'log'"),
    "escape": (lambda: to_minari(make_log(), "../log-v0"), ConfigError, "dataset_id: expected"),
    "no oracle": (
        lambda: to_minari(replace(make_log(), oracle=None), "x-v0", oracle=True),
        DataError,
        "oracle: expected a log with expected rewards",
    ),
    "twice": (lambda: to_minari(make_log(), "log-v0"), StorageError, "expected no dataset of that name, there is one"),
    "unknown": (lambda: from_minari("none-v0"), StorageError, "none-v0.* expected a Minari dataset, cannot read it"),
    "malformed": (lambda: from_minari("none"), ConfigError, "dataset_id: expected"),
    "other": (lambda: from_minari(3), DataError, "expected a MinariDataset or the id of one, got int"),  # type: ignore[arg-type]
    "other prompts": (lambda: from_minari("log-v0", PROMPTS), DimensionError, "expected prompts with fingerprint"),
    "surrogate": (
        lambda: to_minari(replace(make_log(1), sentence=np.array(["\ud800"], dtype=object)), "x-v0"),
        DataError,
        "sentence: expected valid Unicode",
    ),
    "metadata": (
        lambda: to_minari(replace(make_log(1), metadata=LogMetadata(env_config={"a": object()})), "x-v0"),
        DataError,
        "metadata: expected a config",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_what_is_wrong_with_a_call(root: Path, case: str) -> None:
    call, error, words = CALLS[case]
    to_minari(make_log(), "log-v0")
    with pytest.raises(error, match=words):
        call()
    assert [entry.name for entry in root.iterdir()] == ["log-v0"]


def test_a_full_disk_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ours, "_write_prompts", full)
    with pytest.raises(StorageError, match=r"cannot write: .*No space left"):
        to_minari(make_log(), "log-v0")
    assert list(root.iterdir()) == []


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'offprompts-env\[minari\]'"):
        to_minari(make_log(), "log-v0")
