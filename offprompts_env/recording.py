"""Wrappers that record what happens in an environment, whoever acts in it; :mod:`offprompts_env.collecting` drives one.

A row is one round: what was shown, the prompt, the probability with which it was drawn, the output, the reward, and the
expected reward in the oracle field. Both wrappers record the environment as they see it, so one that sits outside an
observation wrapper records the transformed observation.
"""

from __future__ import annotations

import math
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, SupportsFloat

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper

from offprompts_env.columns import make_dataset
from offprompts_env.errors import ConfigError, PropensityError, ResetNeededError, StorageError
from offprompts_env.manifest import served_note
from offprompts_env.sampling import check_policy, chosen_probabilities
from offprompts_env.simulator import DealtOutputs, Simulator
from offprompts_env.storage import SHARD_ROWS, Mode, ShardWriter, load
from offprompts_env.types import (
    Array,
    Contexts,
    FloatArray,
    IntArray,
    LoggedDataset,
    LogMetadata,
    Policy,
    PromptSet,
    check_actions,
    check_rewards,
)

Observation = dict[str, FloatArray]

# What the environments say in `info`, and the column it becomes: before a prompt is chosen, and after.
_ABOUT = ("user_id", "item_id", "query_text")
_SAID = ("output", "sentence", "expected_reward")
_DTYPES: Mapping[str, Any] = {
    "context": np.float32,
    "query": np.float32,
    "user_id": np.int64,
    "item_id": np.int64,
    "query_text": object,
    "action": np.int64,
    "propensity": np.float64,
    "output": np.float32,
    "sentence": object,
    "reward": np.float32,
    "expected_reward": np.float32,
}
# Rows are handed to the writer in chunks of at least this many, or after this many seconds.
_CHUNK_ROWS, _CHUNK_SECONDS = 1024, 1.0


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that make and store a log."""
    from importlib import metadata as packages

    versions = {}
    for name in ("offprompts-env", "gymnasium", "numpy", "pyarrow", "torch", "transformers"):
        try:
            versions[name] = packages.version(name)
        except packages.PackageNotFoundError:
            continue
    return versions


def describe(env: Any, seed: int | None) -> tuple[PromptSet, LogMetadata]:
    """Return the catalogue of an environment of this project and the provenance of what is recorded in it.

    Raises:
        ConfigError: the environment has no simulator, its sub-environments have different prompts, or a wrapper changed
            what actions are.
    """
    simulators, config = simulators_of(env)
    prompts: PromptSet = simulators[0].prompts
    if any(simulator.prompts.fingerprint != prompts.fingerprint for simulator in simulators[1:]):
        raise ConfigError("env: expected sub-environments over one catalogue of prompts, got different ones")
    space = env.single_action_space if isinstance(env, VectorEnv) else env.action_space
    if getattr(space, "n", None) != len(prompts) or any(
        getattr(layer, "renames_actions", False) for layer in layers(env)
    ):
        # A wrapper's action would be taken for the prompt of that number.
        raise ConfigError(
            f"env: expected actions that are prompts, one of {len(prompts)}, got {space} of {env}; record inside the "
            "wrapper that changes them"
        )
    env_id = None if env.spec is None else env.spec.id
    notes = [] if simulators[0].reproducible else [_about_repeating(simulators[0])]
    if served := simulators[0].served_by:
        notes.append(served_note(served))
    return prompts, LogMetadata(env_id, config, seed, package_versions(), "\n".join(notes))


def simulators_of(env: Any) -> tuple[Sequence[Simulator], Mapping[str, Any]]:
    """Return the simulators of an environment of this project, several of a vector of single ones, and its config.

    Raises:
        ConfigError: the environment has no simulator.
    """
    base = env.unwrapped
    # Gymnasium's own vector environments hold single ones, each with a simulator of the same settings.
    of = getattr(base, "get_attr", None) if isinstance(base, VectorEnv) else None
    try:
        return (of("simulator"), of("config")[0]) if of else ((base.simulator,), base.config)
    except AttributeError as error:
        raise ConfigError(
            f"env: expected an environment of this project with a simulator and a config, got {base}; "
            "make one with gym.make('OffPrompts-...')"
        ) from error


def _about_repeating(simulator: Simulator) -> str:
    if isinstance(simulator.outputs, DealtOutputs):
        return "sentences without replacement: collect repeats such a log, reset(seed) does not"
    return "not reproducible: its language model does not keep to seeds"


def layers(env: Any) -> Iterator[Any]:
    """Yield an environment and what it wraps, the outermost first."""
    yield env
    while hasattr(env, "env"):
        env = env.env
        yield env


def shown_columns(observation: Any, info: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is known before a prompt is chosen, as copies: an agent may change what it was shown.

    Raises:
        ConfigError: the observation has lost its keys.
    """
    try:
        vectors = {name: np.array(observation[name]) for name in ("context", "query")}
    except (KeyError, IndexError, TypeError) as error:
        raise ConfigError(
            "env: expected observations with the keys 'context' and 'query', got "
            f"{type(observation).__name__}; record inside the wrapper that changes them"
        ) from error
    return vectors | {name: info[name] for name in _ABOUT if name in info}


def said_columns(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return what came of a prompt; vectors are copies."""
    return {name: np.copy(info[name]) if name == "output" else info[name] for name in _SAID if name in info}


def as_column(values: list[Any], name: str) -> Array:
    """Return the values of rows as one array of the type that the column `name` has."""
    return np.array(values, dtype=_DTYPES[name])


class _Sink:
    """Rows on their way to the writer."""

    def __init__(self, writer: ShardWriter, join: Callable[[list[Any], str], Array]) -> None:
        self.writer = writer
        self._join = join
        self._held: list[dict[str, Any]] = []
        self._rows = 0
        self._since = time.monotonic()

    def add(self, row: dict[str, Any], count: int = 1) -> None:
        if self._held and row.keys() != self._held[0].keys():
            self.hand_over()
        self._held.append(row)
        self._rows += count
        if self._rows >= _CHUNK_ROWS or time.monotonic() - self._since > _CHUNK_SECONDS:
            self.hand_over()

    def hand_over(self) -> None:
        self._since = time.monotonic()
        if not self._held:
            return
        names = self._held[0]
        columns = {name: self._join([row[name] for row in self._held], name) for name in names}
        self._held, self._rows = [], 0
        self.writer.append(make_dataset(columns, self.writer.prompts, LogMetadata()))

    def flush(self) -> None:
        self.hand_over()
        self.writer.flush()

    def close(self) -> None:
        try:
            self.hand_over()
        finally:
            self.writer.close()


class _Recorder:
    """What both wrappers have in common."""

    _sink: _Sink
    _finalizer: weakref.finalize[..., Any]
    _n_prompts: int
    _policy: Policy | None
    _shown: dict[str, Any] | None

    def _begin(
        self, env: Any, path: str | Path, policy: Policy | None, shard_rows: int, mode: Mode, seed: int | None,
        join: Callable[[list[Any], str], Array],
    ) -> None:  # fmt: skip
        prompts, provenance = describe(env, seed)
        self._n_prompts, self._policy = len(prompts), policy
        if policy is not None and not isinstance(policy, Policy):
            raise ConfigError(
                f"policy: expected an object with 'probabilities' and 'n_prompts', got {type(policy).__name__}; "
                "for anything else call record_propensity before each step"
            )
        if policy is not None:
            check_policy(policy, prompts, "env")
        self._sink = _Sink(ShardWriter(path, prompts, provenance, mode=mode, shard_rows=shard_rows), join)
        manifest = self._sink.writer.manifest
        self._before = () if manifest is None else tuple(recording.seed for recording in manifest.recordings)
        # Runs also when the wrapper is forgotten or the interpreter ends.
        self._finalizer = weakref.finalize(self, self._sink.close)

    @property
    def path(self) -> Path:
        """The directory of the log."""
        return self._sink.writer.path

    def flush(self) -> None:
        """Put all rows so far on disk.

        Raises:
            StorageError: the disk is full; the rows stay in memory, so this can be called again. Or the recorder is
                closed.
        """
        self._expect_open()
        self._sink.flush()

    def dataset(self) -> LoggedDataset:
        """Return all that has been recorded so far, also by earlier recordings that this one appends to."""
        if self._finalizer.alive:
            self._sink.flush()
        return load(self.path)

    def _expect_open(self) -> None:
        """Raise where rows would go nowhere."""
        if not self._finalizer.alive:
            raise StorageError(
                f"{self.path}: expected an open recorder, but the recorder is closed and rounds would be lost; make a "
                f"new one with {type(self).__name__}(env, path, mode='append')"
            )

    def _expect_round(self) -> None:
        """Raise for a propensity that no row would get."""
        self._expect_open()
        if self._shown is None:
            raise ResetNeededError(
                "record_propensity: expected an open round, found none, and no row would get this propensity; call it "
                "between reset() and step(), once for each step"
            )

    def _named(self, seed: Any) -> None:
        """Note the seed of the first reset, unless the caller gave one."""
        writer = self._sink.writer
        if writer.metadata.seed is None and isinstance(seed, int | np.integer):
            writer.metadata = replace(writer.metadata, seed=int(seed))
        if seed is not None and seed in self._before:
            warnings.warn(
                f"{self.path} already has rows recorded with seed {seed}; the same seed shows the "
                "same rounds again, so reset with another one",
                stacklevel=3,
            )

    def _policy_propensity(self, contexts: Contexts, actions: IntArray) -> FloatArray:
        """Return with which probability the policy draws `actions` now."""
        if self._policy is None:
            return np.full(len(contexts), np.nan)
        n = len(contexts)
        actions = check_actions(actions, self._n_prompts, n)
        propensity = chosen_probabilities(self._policy, contexts, actions)
        if not (propensity > 0).all():
            row = int(np.argmin(propensity > 0))
            raise PropensityError(
                f"propensity: expected actions drawn from the policy, but it gives probability {propensity[row]} to "
                f"action {actions[row]}; draw from this policy, or call record_propensity before the step"
            )
        return propensity


class RecordLoggedData(gym.Wrapper[Observation, np.int64, Observation, np.int64], RecordConstructorArgs, _Recorder):
    """Records every round of an environment as a logged dataset on disk.

    Rows are on disk after :meth:`flush`, after :meth:`close` or the end of the program, when a shard is full, and while
    rounds go on about every ten seconds.

    Where the propensity comes from: from `policy`, evaluated just before the step; or from whoever acts, who calls
    :meth:`record_propensity` on this object between reset and step, however many wrappers lie outside of it; else it
    is unknown, NaN. It belongs to the open round: a reset in place of the step drops the round, and it with the round.

    Args:
        env: an environment of this project, in any wrappers that keep the observation's keys.
        path: directory of the log.
        policy: what the actions are drawn from.
        shard_rows: rows a Parquet file.
        mode: what to do where there is a log already: refuse, append, or overwrite.
        seed: noted in the manifest; by default the seed of the first reset.

    Raises:
        StorageError: `mode` forbids to write there.
        DataError: appending to the log of another environment.
        ConfigError: not an environment of this project.
    """

    def __init__(
        self,
        env: gym.Env[Observation, np.int64],
        path: str | Path,
        *,
        policy: Policy | None = None,
        shard_rows: int = SHARD_ROWS,
        mode: Mode = "refuse",
        seed: int | None = None,
    ) -> None:
        if isinstance(env, VectorEnv):
            raise ConfigError(
                "env: expected a single environment, got a vector environment; record it with RecordVectorLoggedData"
            )
        RecordConstructorArgs.__init__(
            self, path=str(path), policy=policy, shard_rows=shard_rows, mode=mode, seed=seed, _disable_deepcopy=True
        )
        gym.Wrapper.__init__(self, env)
        self._begin(env, path, policy, shard_rows, mode, seed, as_column)
        self._shown = None
        self._given: float | None = None

    def record_propensity(self, propensity: float) -> None:
        """State the probability with which the action of the next step was drawn; it overrides that of the policy.

        Call it between :meth:`reset` and :meth:`step`; a further reset forgets it together with the round.

        Raises:
            ResetNeededError: no round is open that it could belong to.
            StorageError: the recorder is closed.
            PropensityError: not in (0, 1], nor NaN for unknown.
        """
        self._expect_round()
        self._given = float(check_propensities(propensity, ())[()])

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin a round.

        Raises:
            StorageError: the recorder is closed.
        """
        self._expect_open()
        observation, info = self.env.reset(seed=seed, options=options)
        self._named(seed)
        self._shown = shown_columns(observation, info)
        self._given = None
        return observation, info

    def step(self, action: np.int64) -> tuple[Observation, SupportsFloat, bool, bool, dict[str, Any]]:
        """Play a prompt and record the round.

        Raises:
            StorageError: the recorder is closed, or the disk is full.
            ResetNeededError: no round is open.
            PropensityError: the policy gives the action probability 0.
            NumericalError: the reward is NaN or infinite; this round is not recorded, those before it are kept.
        """
        self._expect_open()
        if self._shown is None:
            raise ResetNeededError("step: expected an open round; call reset() first")
        shown, given = self._shown, self._given
        propensity = given if given is not None else self._propensity(shown, action)
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._shown = self._given = None
        if not math.isfinite(float(reward)):
            check_rewards(np.array([reward]))
        chosen = np.asarray(action).item()
        self._sink.add({**shown, "action": chosen, "propensity": propensity, "reward": reward, **said_columns(info)})
        return observation, reward, terminated, truncated, info

    def _propensity(self, shown: Mapping[str, Any], action: Any) -> float:
        if self._policy is None:
            return math.nan
        contexts = Contexts(**{name: as_column([value], name) for name, value in shown.items()})
        return float(self._policy_propensity(contexts, np.asarray(action).reshape(1))[0])

    def close(self) -> None:
        """Flush, let go of the directory, and close the environment."""
        try:
            self._finalizer()
        finally:
            super().close()


class RecordVectorLoggedData(VectorWrapper[Observation, np.ndarray, Observation, np.ndarray, FloatArray], _Recorder):
    """Records every round of a vector environment; the sibling of :class:`RecordLoggedData`, with its arguments.

    It works around the native vector environments and around Gymnasium's ``SyncVectorEnv`` and ``AsyncVectorEnv``.
    Under next-step autoreset every second step only resets; such steps are no rounds and are not recorded.
    """

    def __init__(
        self,
        env: VectorEnv[Observation, np.ndarray, FloatArray],
        path: str | Path,
        *,
        policy: Policy | None = None,
        shard_rows: int = SHARD_ROWS,
        mode: Mode = "refuse",
        seed: int | None = None,
    ) -> None:
        if isinstance(env, gym.Env):
            raise ConfigError(
                "env: expected a vector environment, got a single environment; record it with RecordLoggedData"
            )
        VectorWrapper.__init__(self, env)
        self._begin(env, path, policy, shard_rows, mode, seed, lambda rows, _: np.concatenate(rows))
        self._shown = None
        self._given: FloatArray | None = None

    def record_propensity(self, propensity: npt.ArrayLike) -> None:
        """State the probabilities with which the actions of the next step were drawn, (num_envs,).

        Call it between :meth:`reset` or the step before and :meth:`step`; a further reset forgets them together with
        the rounds.

        Raises:
            ResetNeededError: no rounds are open that they could belong to.
            StorageError: the recorder is closed.
            PropensityError: a value is not in (0, 1], nor NaN for unknown.
        """
        self._expect_round()
        self._given = check_propensities(propensity, (self.num_envs,))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin a round in every sub-environment.

        Raises:
            StorageError: the recorder is closed.
        """
        self._expect_open()
        observation, infos = self.env.reset(seed=seed, options=options)
        self._named(seed)
        self._shown, self._given = shown_columns(observation, infos), None
        self._resetting = np.zeros(self.num_envs, dtype=bool)
        return observation, infos

    def step(self, actions: np.ndarray) -> tuple[Observation, FloatArray, FloatArray, FloatArray, dict[str, Any]]:
        """Play one prompt in each sub-environment and record the rounds.

        Raises:
            StorageError: the recorder is closed, or the disk is full.
            ResetNeededError: no rounds are open.
            PropensityError: the policy gives an action probability 0.
            NumericalError: a reward is NaN or infinite; these rounds are not recorded, those before them are kept.
        """
        self._expect_open()
        if self._shown is None:
            raise ResetNeededError("step: expected open rounds; call reset() first")
        shown, given, chosen, played = self._shown, self._given, np.array(actions), ~self._resetting
        propensity = given if given is not None else self._propensities(shown, chosen, played)
        observation, reward, terminated, truncated, infos = self.env.step(actions)
        said = said_columns(infos.get("final_info", infos))
        row = {**shown, "action": chosen, "propensity": propensity, "reward": np.array(reward), **said}
        if self.metadata.get("autoreset_mode") == AutoresetMode.NEXT_STEP:
            self._resetting = played & np.logical_or(terminated, truncated)
        self._shown, self._given = shown_columns(observation, infos), None
        if self.metadata.get("autoreset_mode") == AutoresetMode.DISABLED and np.logical_or(terminated, truncated).all():
            self._shown = None
        check_rewards(row["reward"][played])
        if played.all():
            self._sink.add(row, self.num_envs)
        elif played.any():
            self._sink.add({name: values[played] for name, values in row.items()}, int(played.sum()))
        return observation, reward, terminated, truncated, infos

    def _propensities(self, shown: Mapping[str, Any], actions: IntArray, played: Array) -> FloatArray:
        propensity = np.full(self.num_envs, np.nan)
        if self._policy is not None and played.any():
            contexts = Contexts(**{name: np.asarray(values)[played] for name, values in shown.items()})
            propensity[played] = self._policy_propensity(contexts, actions[played])
        return propensity

    def close(self, **kwargs: Any) -> None:
        """Flush, let go of the directory, and close the environments."""
        try:
            self._finalizer()
        finally:
            super().close(**kwargs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_propensities(propensity: npt.ArrayLike, shape: tuple[int, ...]) -> FloatArray:
    """Return `propensity` as float64 of `shape`.

    Raises:
        PropensityError: another shape, or a value that is neither in (0, 1] nor NaN for unknown.
    """
    try:
        given = np.asarray(propensity)
    except ValueError as error:
        raise PropensityError(f"propensity: expected one number a round, got {propensity!r}") from error
    if given.dtype.kind not in "fiu":
        raise PropensityError(f"propensity: expected numbers in (0, 1], got {propensity!r}")
    if given.shape != shape:
        raise PropensityError(f"propensity: expected shape {shape}, one number a round, got {given.shape}")
    array = given.astype(np.float64)
    valid = np.isnan(array) | ((array > 0) & (array <= 1))
    if not valid.all():
        raise PropensityError(
            f"propensity: expected a probability in (0, 1], got {array[~valid].flat[0]}; "
            "pass the probability with which the action was drawn"
        )
    return array
