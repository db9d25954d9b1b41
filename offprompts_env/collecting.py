"""Recording what a policy or an agent does: :func:`collect`.

Rounds come in batches. All that is random in batch k is drawn from the streams ``("collect", part, k)`` of the seed,
and every batch is played as a whole, so that a log of n rows is the first n rows of an endless one which the seed and
the batch size name. That is why an interrupted recording goes on as if nothing had happened, and why a second call with
the same arguments and ``mode="append"`` costs no more than reading, and says so in a warning.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv
from gymnasium.wrappers.common import OrderEnforcing, PassiveEnvChecker

from offprompts_env.columns import Batches, concatenate, make_dataset
from offprompts_env.config import check_integer
from offprompts_env.envs import PromptEnv, PromptVectorEnv
from offprompts_env.errors import ConfigError, foreign
from offprompts_env.recording import (
    as_column,
    check_propensities,
    describe,
    package_versions,
    said_columns,
    shown_columns,
    simulators_of,
)
from offprompts_env.rng import integer_seed, stream
from offprompts_env.sampling import check_policy, sample_actions
from offprompts_env.simulator import DealtOutputs, Simulator
from offprompts_env.storage import SHARD_ROWS, Mode, ShardWriter, load
from offprompts_env.types import (
    Agent,
    Contexts,
    FloatArray,
    IntArray,
    LoggedDataset,
    LogMetadata,
    Oracle,
    Outputs,
    Policy,
    PromptSet,
    check_actions,
)

Act = Callable[[Contexts, np.random.Generator], tuple[IntArray, FloatArray]]

_SIGNATURE = "act(contexts, rng) -> (actions, propensities)"

# Rounds a batch: of a closed-form world, and at most where a language model answers or an environment is stepped.
_CLOSED_FORM_BATCH, _LARGEST_BATCH = 4096, 256
# Rounds after which an agent that learns is taught, where the environment does not say.
_LESSON = 256
# Entries of the (batch, A) matrix of a policy's probabilities that are held at once: 32 MiB of float64.
_LARGEST_MATRIX = 1 << 22


def collect(
    env: gym.Env[Any, Any] | VectorEnv[Any, Any, Any] | Simulator,
    policy: Policy | Agent,
    n: int,
    path: str | Path | None = None,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    mode: Mode = "refuse",
    progress: bool | None = None,
    shard_rows: int = SHARD_ROWS,
) -> LoggedDataset:
    """Record n rounds of `policy` in `env`.

    An environment of this project is played through its simulator in batches, also with the wrappers that ``gym.make``
    adds by itself; one with other wrappers, or of another class, is stepped with them. A vector environment has
    `num_envs` rounds in a batch.

    Args:
        env: an environment, a vector environment, or a simulator.
        policy: anything with ``probabilities``, or an agent with ``act``; an agent's ``learn`` is called with each
            batch once played, without the oracle. The propensity recorded is that with which the action was drawn.
        n: rows of the log, those that are there already included; a log of n rows or more is left and returned as it
            is, with a warning that nothing was recorded.
        path: directory of the log; without one it stays in memory.
        seed: names the recording. The environment's own state does not matter.
        batch_size: rounds a batch. The rows depend on it; by default that of the log appended to, else 4,096 in a
            closed-form world (fewer above 1,024 prompts) and otherwise n in equal parts of at most 256; for an agent
            that learns, which is taught after each batch, at most 256.
        mode: where there is a log already: refuse; append what is missing to n rows, exactly as if the recording had
            not been interrupted (an agent goes on from the state it is in); or overwrite it.
        progress: show a progress bar; by default when on a terminal.
        shard_rows: rows a Parquet file.

    Returns:
        The log, read back from `path` where there is one. After an error or Ctrl-C the rows so far are there; a kill
        costs those of the last ten seconds and of the batch at hand.

    Raises:
        ConfigError: a wrong argument, or appending with another seed or batch size than the log has.
        StorageError: `mode` forbids to write, or the disk is full.
        DataError: appending to a log of another environment.
    """
    check_integer("n", n, 1)
    check_integer("seed", seed, 0)
    if batch_size is not None:
        check_integer("batch_size", batch_size, 1)
    player = _player(env, seed)
    act = _act(policy, player.prompts)
    fixed = player.batch_size
    if fixed is not None and batch_size not in (None, fixed):
        raise ConfigError(f"batch_size: expected {fixed}, the number of sub-environments, got {batch_size}")
    size = fixed or batch_size
    learn = getattr(policy, "learn", None) if hasattr(policy, "act") else None
    if path is None:
        memory = Batches()
        _deal_anew(env)
        _record(player, act, learn, memory.append, range(n), size or _default(player, n, learn), progress)
        return concatenate(memory.parts, player.metadata)
    with ShardWriter(path, player.prompts, player.metadata, mode=mode, shard_rows=shard_rows) as writer:
        size = _agreed_size(writer, size, seed) or _default(player, n, learn)
        writer.batch_size = size
        if writer.rows < n:
            _deal_anew(env, path, writer.rows // size * size)
            _record(player, act, learn, writer.append, range(writer.rows, n), size, progress)
        else:
            warnings.warn(
                f"{path}: nothing was recorded, the log has {writer.rows} rows already and n={n} counts the rows "
                f"already there; for k rows more pass n={writer.rows} + k",
                stacklevel=2,
            )
    return load(path)


def _deal_anew(env: Any, path: str | Path | None = None, rows: int = 0) -> None:
    """Bring what `env` deals to where the first `rows` of the log in `path` leave it; see :class:`DealtOutputs`."""
    simulators = (env,) if isinstance(env, Simulator) else simulators_of(env)[0]
    dealt = [simulator.outputs for simulator in simulators if isinstance(simulator.outputs, DealtOutputs)]
    for outputs in dealt:
        outputs.restart()
    if path is None or not (rows and dealt):
        return
    played = load(path)
    for first, outputs in enumerate(dealt):
        # Sub-environments of a vector take turns.
        part = played.take(np.arange(first, rows, len(dealt)))
        outputs.remember(part.contexts, part.action, Outputs(part.output, part.sentence))


def _default(player: _Player, n: int, learn: object | None) -> int:
    size = player.default_batch(n)
    return size if learn is None else min(size, _LESSON)


def _agreed_size(writer: ShardWriter, size: int | None, seed: int) -> int | None:
    """Return the batch size of the log that is continued, or `size` where there is none."""
    if writer.manifest is None:
        return size
    for recording in writer.manifest.recordings:
        if recording.batch_size is None:
            raise ConfigError(
                f"{writer.path}: expected a log that collect has begun, got one written by a recording wrapper or by "
                "save; record into another directory"
            )
        if (seed, size or recording.batch_size) != (recording.seed, recording.batch_size):
            raise ConfigError(
                f"{writer.path}: expected to continue with seed={recording.seed} and batch_size={recording.batch_size} "
                f"as recorded, got seed={seed} and batch_size={size}; pass the same ones, or record into another "
                "directory"
            )
        size = recording.batch_size
    return size


class _Player(Protocol):
    """Plays numbered batches of rounds."""

    prompts: PromptSet
    metadata: LogMetadata

    @property
    def batch_size(self) -> int | None:
        """Rounds a batch, where the environment decides that."""

    def default_batch(self, n: int) -> int:
        """Rounds a batch where neither the caller nor the environment says."""

    def play(self, index: int, size: int, act: Act) -> LoggedDataset:
        """Play batch `index` of `size` rounds."""


def _record(
    player: _Player,
    act: Act,
    learn: Callable[[LoggedDataset], None] | None,
    keep: Callable[[LoggedDataset], None],
    rows: range,
    size: int,
    progress: bool | None,
) -> None:
    """Play the batches that hold `rows` and keep those rows."""
    from tqdm import tqdm

    hidden = None if progress is None else not progress
    with tqdm(total=rows.stop, initial=rows.start, unit="row", disable=hidden) as bar:
        for index in range(rows.start // size, -(-rows.stop // size)):
            batch = player.play(index, size, act)
            first, last = max(rows.start - index * size, 0), min(rows.stop - index * size, size)
            kept = batch if (first, last) == (0, size) else batch.take(slice(first, last))
            keep(kept)
            if learn is not None:
                with foreign(f"{_name(learn)} raised after row {index * size + last - 1}; the rows so far are kept"):
                    learn(replace(kept, oracle=None))
            bar.update(len(kept))


def _name(method: Callable[..., Any]) -> str:
    owner = getattr(method, "__self__", None)
    return f"{type(owner).__name__}.{method.__name__}" if owner is not None else getattr(method, "__name__", "agent")


def _equal_parts(n: int) -> int:
    return -(-n // -(-n // _LARGEST_BATCH))


class _SimulatorPlayer:
    def __init__(self, simulator: Simulator, metadata: LogMetadata, batch_size: int | None, seed: int) -> None:
        self.simulator, self.prompts, self.metadata = simulator, simulator.prompts, metadata
        self.batch_size, self.seed = batch_size, seed

    def default_batch(self, n: int) -> int:
        if not self.simulator.exact:
            return _equal_parts(n)
        return max(1, min(_CLOSED_FORM_BATCH, _LARGEST_MATRIX // len(self.prompts)))

    def play(self, index: int, size: int, act: Act) -> LoggedDataset:
        def rng(part: str) -> np.random.Generator:
            return stream(self.seed, "collect", part, index)

        contexts = self.simulator.contexts.sample(size, rng("contexts"))
        # A copy: what an agent does to what it was shown must not reach the round.
        shown = replace(contexts, context=contexts.context.copy(), query=contexts.query.copy())
        actions, propensities = act(shown, rng("actions"))
        rounds = self.simulator.play(contexts, actions, rng("outputs"), rng("rewards"))
        return LoggedDataset(
            context=contexts.context,
            query=contexts.query,
            action=rounds.actions,
            propensity=propensities,
            reward=rounds.reward,
            output=rounds.outputs.embedding,
            prompts=self.prompts,
            sentence=rounds.outputs.text,
            user_id=contexts.user_id,
            item_id=contexts.item_id,
            query_text=contexts.query_text,
            oracle=Oracle(rounds.expected_reward),
            metadata=self.metadata,
        )


class _EnvPlayer:
    def __init__(self, env: gym.Env[Any, Any], seed: int) -> None:
        self.env, self.seed, self.batch_size = env, seed, None
        self.prompts, self.metadata = describe(env, seed)

    def default_batch(self, n: int) -> int:
        return _equal_parts(n)

    def play(self, index: int, size: int, act: Act) -> LoggedDataset:
        rng = stream(self.seed, "collect", "actions", index)
        env_seed: int | None = integer_seed(self.seed, "collect", "env", index)
        rows = []
        for _ in range(size):
            shown = shown_columns(*self.env.reset(seed=env_seed))
            env_seed = None
            contexts = Contexts(**{name: as_column([value], name) for name, value in shown.items()})
            actions, propensities = act(contexts, rng)
            _, reward, _, _, info = self.env.step(actions[0])
            rows.append(shown | said_columns(info) | {
                "action": actions[0], "propensity": propensities[0], "reward": reward,
            })  # fmt: skip
        columns = {name: as_column([row[name] for row in rows], name) for name in rows[0]}
        return make_dataset(columns, self.prompts, self.metadata)


class _VectorEnvPlayer:
    def __init__(self, env: VectorEnv[Any, Any, Any], seed: int) -> None:
        self.env, self.seed, self.batch_size = env, seed, env.num_envs
        self.prompts, self.metadata = describe(env, seed)

    def default_batch(self, n: int) -> int:
        return self.batch_size

    def play(self, index: int, size: int, act: Act) -> LoggedDataset:
        # A reset before every step: whatever the autoreset mode, the step is a round and not a reset.
        shown = shown_columns(*self.env.reset(seed=integer_seed(self.seed, "collect", "env", index)))
        actions, propensities = act(Contexts(**shown), stream(self.seed, "collect", "actions", index))
        _, reward, _, _, infos = self.env.step(actions)
        said = said_columns(infos.get("final_info", infos))
        columns = shown | said | {"action": actions, "propensity": propensities, "reward": reward}
        return make_dataset(columns, self.prompts, self.metadata)


def _player(env: gym.Env[Any, Any] | VectorEnv[Any, Any, Any] | Simulator, seed: int) -> _Player:
    if isinstance(env, Simulator):
        return _SimulatorPlayer(env, LogMetadata(seed=seed, versions=package_versions()), None, seed)
    inner: Any = env
    while type(inner) in (OrderEnforcing, PassiveEnvChecker):
        inner = inner.env
    for native in (PromptEnv, PromptVectorEnv):
        # A subclass that steps in its own way is not its simulator.
        if isinstance(inner, native) and type(inner).step is native.step and type(inner).reset is native.reset:
            metadata = describe(env, seed)[1]
            return _SimulatorPlayer(inner.simulator, metadata, getattr(inner, "num_envs", None), seed)
    if isinstance(env, VectorEnv):
        return _VectorEnvPlayer(env, seed)
    if isinstance(env, gym.Env):
        return _EnvPlayer(env, seed)
    raise ConfigError(
        f"env: expected an environment, a vector environment or a simulator, got {type(env).__name__}; "
        "make one with gym.make('OffPrompts-...')"
    )


def _check_signature(agent: Any, act: Any) -> None:
    """Raise where `act` cannot be called with contexts and a generator."""
    name = agent.__name__ if isinstance(agent, type) else type(agent).__name__
    if not callable(act):
        raise ConfigError(f"policy: expected an agent with the method {_SIGNATURE}, but {name}.act is {act!r}")
    try:
        signature = inspect.signature(act)
    except (TypeError, ValueError):
        return  # a builtin, say, that does not tell
    try:
        signature.bind(None, None)
    except TypeError as error:
        hint = "pass an instance, not the class" if isinstance(agent, type) else "change its arguments"
        raise ConfigError(
            f"policy: expected an agent with the method {_SIGNATURE}, got {name}.act{signature}: {error}; {hint}"
        ) from error


def _act(policy: Policy | Agent, prompts: PromptSet) -> Act:
    own = getattr(policy, "act", None)
    if own is not None:
        _check_signature(policy, own)

        def act(contexts: Contexts, rng: np.random.Generator) -> tuple[IntArray, FloatArray]:
            with foreign(f"{_name(own)} raised in a batch of {len(contexts)} rounds; the rows before it are kept"):
                result = own(contexts, rng)
            # Two bare actions would unpack as well.
            if not isinstance(result, tuple | list) or len(result) != 2:
                raise ConfigError(
                    f"policy: expected {_SIGNATURE}, but {type(policy).__name__}.act returned {type(result).__name__}"
                    f"{f' of {len(result)}' if isinstance(result, tuple | list) else ''}; return both, each of shape "
                    f"({len(contexts)},): the prompts, and the probabilities with which they were drawn"
                )
            actions, propensities = result
            actions = check_actions(actions, len(prompts), len(contexts))
            return actions, check_propensities(propensities, (len(contexts),))

        return act
    if not isinstance(policy, Policy):
        raise ConfigError(
            f"policy: expected an object with 'probabilities' and 'n_prompts', or an agent with 'act', got "
            f"{type(policy).__name__}"
        )
    check_policy(policy, prompts, "env")

    def draw(contexts: Contexts, rng: np.random.Generator) -> tuple[IntArray, FloatArray]:
        name = type(policy).__name__
        with foreign(f"{name} raised in a batch of {len(contexts)} rounds; the rows before it are kept"):
            return sample_actions(policy, contexts, rng)

    return draw
