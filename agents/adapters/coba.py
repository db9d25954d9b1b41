"""Learners of coba as agents, and worlds and logs of this project as environments of coba's experiments.

Run ``Experiment(Environments(coba_environment(simulator, 10_000)), [LinUCBLearner(), RandomLearner()]).run()``: coba
plays, and its `Result` compares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import gymnasium as gym
import numpy as np

from agents.adapters.base import Adapter, features
from agents.adapters.storage import Stored, read_pickled, reviving, write_agent
from offprompts_env.config import check_integer, check_kind
from offprompts_env.errors import (
    ActionError,
    ConfigError,
    StorageError,
    foreign,
    missing_dependency,
)
from offprompts_env.rng import stream
from offprompts_env.sampling import check_probabilities
from offprompts_env.simulator import Simulator
from offprompts_env.types import Contexts, FloatArray, LoggedDataset, PromptSet

Vector = tuple[float, ...]

# Rounds that are drawn at once: where a language model answers, each alone.
_CLOSED_FORM_ROUNDS, _LOG_ROUNDS = 256, 4096
# Looks that show whether a learner's probabilities change when they are asked for.
_PROBES = 8


@runtime_checkable
class Learner(Protocol):
    """What coba 8 asks of a learner whose probabilities can be told."""

    def score(self, context: Any, actions: Any, action: Any) -> float:
        """Return the probability of `action`."""
        ...

    def predict(self, context: Any, actions: Any) -> Any:
        """Return an action, its probability, and what ``learn`` takes beside them."""
        ...

    def learn(self, context: Any, action: Any, reward: float, probability: float, **rest: Any) -> None:
        """Learn from a round."""
        ...


class Coba(Adapter):
    """A learner of coba; its pmf is what its ``score`` says.

    Actions are drawn here, from that pmf, and never by the learner. One that must draw to tell a probability has none:
    Thompson sampling and Corral are refused.

    Args:
        learner: such as ``coba.LinUCBLearner()``, with ``score``, ``predict`` and ``learn``.
        prompts: the catalogue.
        embeddings: a prompt is its embedding, so that a learner generalises over prompts; else it is one-hot, (A,).

    Raises:
        ConfigError: no such learner, or one that must draw; equal embeddings of two prompts.
        MissingDependencyError: coba is not installed.
    """

    def __init__(self, learner: Learner, prompts: PromptSet, *, embeddings: bool = False) -> None:
        super().__init__(prompts)
        _check_learner(learner)
        self.learner, self._embeddings, self._dimension = learner, embeddings, 0
        self._actions = _actions(prompts, embeddings)
        self._probed, self._rests = False, True
        # coba's own learners make the whole pmf for each score: asked once it takes 1/A of the time. A class that is
        # derived from one may choose in another way, which only its score knows.
        self._pmf_of = getattr(learner, "_pmf", None) if type(learner).__module__.startswith("coba.") else None

    def probabilities(self, contexts: Contexts) -> FloatArray:
        """Return the pmf, (n, A) float64.

        Raises:
            AgentError: the learner raised.
            ConfigError: its probabilities change from one look to the next.
            DataError: it gave no pmf.
            DimensionError: contexts of another dimension than it learned from.
        """
        check_kind("contexts", contexts, Contexts, "of an observation take Contexts.of(observation)")
        rows = self._described(contexts)
        with foreign(f"{type(self.learner).__name__}.score raised in {len(rows)} rounds"):
            if not self._probed:
                self._probe(rows[:_PROBES])
            # One by one, since a learner of coba takes a context at a time; but each context once.
            known = {row: self._pmf(row) for row in dict.fromkeys(rows)}
            pmf = np.array([known[row] for row in rows]) if rows else np.empty((0, self.n_prompts))
        return check_probabilities(pmf, len(rows), self.n_prompts)

    def _described(self, contexts: Contexts) -> list[Vector]:
        return [tuple(row) for row in features(contexts, self._dimension or None).tolist()]

    def _pmf(self, context: Vector) -> Sequence[float]:
        if self._pmf_of is None:
            return [self.learner.score(context, self._actions, action) for action in self._actions]
        return _split(self._pmf_of(context, self._actions))[0]

    def _probe(self, contexts: list[Vector]) -> None:
        for context in contexts:
            if not np.array_equal(self._pmf(context), self._pmf(context)):
                raise _draws(self.learner)
        self._probed = True

    def learn(self, log: LoggedDataset) -> None:
        """Learn from each round in turn, with the logged propensity.

        Raises:
            AgentError: the learner raised.
            DimensionError: a log over another catalogue, or of other dimensions.
            PropensityError: a propensity is unknown.
        """
        self._check_log(log)
        propensities = log.require_propensities("Coba").tolist()
        contexts = self._described(log.contexts)
        with foreign(f"{type(self.learner).__name__}.learn raised on {len(log)} rounds"):
            # One by one: what a learner of coba learns from a round depends on those before it.
            for context, index, reward, propensity in zip(
                contexts, log.action.tolist(), log.reward.tolist(), propensities, strict=True
            ):
                rest = self._rest(context)
                self.learner.learn(context, self._actions[index], reward, propensity, **rest)
        self._dimension = len(contexts[0])

    def _rest(self, context: Vector) -> Mapping[str, Any]:
        """Return what the learner says for its ``learn``; one that once says nothing is not asked again."""
        if not self._rests:
            return {}
        if self._pmf_of is not None:
            rest = _split(self._pmf_of(context, self._actions))[1]
        else:
            from coba.safety import SafeLearner

            rest = SafeLearner(self.learner).predict(context, self._actions)[2]
        self._rests = bool(rest)
        return rest

    def save(self, path: str | Path) -> Path:
        """Write the agent into the directory `path`, as a pickle.

        Raises:
            StorageError: it cannot be written; a learner of Vowpal Wabbit cannot once it has acted.
        """
        import cloudpickle  # type: ignore[import-untyped, unused-ignore]  # Gymnasium brings it; LinUCB holds a module

        try:
            content = cloudpickle.dumps(self.learner)
        except Exception as error:
            raise StorageError(
                f"agent: {type(self.learner).__name__} cannot be pickled: {error}; for a learner of Vowpal Wabbit use "
                "agents.adapters.VowpalWabbit, which saves"
            ) from error
        settings = {"embeddings": self._embeddings, "dimension": self._dimension}
        return write_agent(Stored("Coba", "coba", content, self.prompts, settings), path)

    @classmethod
    def load(cls, path: str | Path, *, trusted: bool = False) -> Coba:
        """Read an agent that :meth:`save` wrote.

        Args:
            path: the directory.
            trusted: the file is a pickle, which can run any code; say that you know who wrote it.

        Raises:
            StorageError: not such a directory, damaged, or not `trusted`.
        """
        _require_coba()
        stored, learner = read_pickled(path, "Coba", trusted=trusted)
        with reviving(path):
            agent = cls(learner, stored.prompts, embeddings=bool(stored.settings["embeddings"]))
            agent._dimension = int(stored.settings["dimension"])
        return agent


def _require_coba() -> Any:
    try:
        import coba
    except ImportError as error:
        raise missing_dependency("coba", "coba", "agents.adapters.Coba") from error
    return coba


def _check_learner(learner: Learner) -> None:
    coba = _require_coba()
    from coba.primitives import Learner as Base

    check_kind("learner", learner, Learner, "pass a learner of coba, such as coba.LinUCBLearner()")
    if type(learner).score is Base.score:
        raise ConfigError(
            f"learner: expected one whose score tells probabilities, but {type(learner).__name__} has none; add it, "
            "or wrap what it does with agents.adapters.FunctionAgent"
        )
    inner: Any = learner
    while isinstance(inner, coba.MisguidedLearner):
        inner = inner._learner
    if isinstance(inner, coba.LinTSLearner | coba.CorralLearner):
        raise _draws(inner)


def _draws(learner: object) -> ConfigError:
    return ConfigError(
        f"learner: expected one that tells its probabilities without drawing, but those of {type(learner).__name__} "
        "are another draw at each look; use one with a pmf, such as coba.LinUCBLearner or coba.BanditEpsilonLearner"
    )


def _split(given: Any) -> tuple[Sequence[float], Mapping[str, Any]]:
    """Return a pmf, and what came with it for ``learn``."""
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], Mapping):
        return given
    return given, {}


def _actions(prompts: PromptSet, embeddings: bool) -> list[Vector]:
    rows = prompts.embeddings if embeddings else np.eye(len(prompts))
    actions = [tuple(row) for row in rows.tolist()]
    if len(set(actions)) < len(actions):
        raise ConfigError(
            "embeddings: expected another one for each prompt, got two that are equal, which coba cannot tell apart; "
            "pass embeddings=False"
        )
    return actions


def coba_environment(
    world: Simulator | gym.Env[Any, Any],
    n: int,
    *,
    seed: int = 0,
    embeddings: bool = False,
    expected: bool = False,
) -> CobaEnvironment:
    """Return n rounds of `world` for coba's ``Environments``.

    Args:
        world: a simulator, or an environment of this project, whose simulator is then played.
        n: rounds.
        seed: names the rounds: all learners meet the same, with the same luck.
        embeddings: a prompt is its embedding, a tuple (d_e); else one-hot, (A,).
        expected: rewards are ``E[r | x, q, a]`` and not observed ones.

    Raises:
        ConfigError: no such world, or equal embeddings of two prompts.
    """
    check_integer("n", n, 1)
    check_integer("seed", seed, 0)
    inner: Any = getattr(world, "unwrapped", None)
    simulator: Any = world if isinstance(world, Simulator) else getattr(inner, "simulator", None)
    check_kind("world", simulator, Simulator, "pass a simulator or an environment made with gym.make('OffPrompts-...')")
    return CobaEnvironment(simulator, n, seed, embeddings, expected)


class CobaEnvironment:
    """Rounds of a simulator, made while coba reads them; see :func:`coba_environment`."""

    def __init__(self, simulator: Simulator, n: int, seed: int, embeddings: bool, expected: bool) -> None:
        self._simulator, self._n, self._seed, self._expected = simulator, n, seed, expected
        self._embeddings, self._actions = embeddings, _actions(simulator.prompts, embeddings)

    @property
    def params(self) -> dict[str, Any]:
        """What coba notes of it."""
        return {
            "env_type": "OffPrompts", "n_prompts": self._simulator.n_prompts, "n": self._n, "seed": self._seed,
            "embeddings": self._embeddings, "expected": self._expected, "prompts": self._simulator.prompts.fingerprint,
        }  # fmt: skip

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the rounds, always the same: ``context``, ``actions`` and ``rewards``, a function of an action."""
        index = {action: number for number, action in enumerate(self._actions)}
        size = _CLOSED_FORM_ROUNDS if self._simulator.exact else 1
        for start in range(0, self._n, size):
            batch = _Batch(self._simulator, self._seed, start // size, size, self._expected)
            for row, context in enumerate(features(batch.contexts)[: self._n - start].tolist()):
                yield {
                    "context": tuple(context),
                    "actions": list(self._actions),
                    "rewards": _Rewards(batch, row, index),
                }


class _Batch:
    """Rounds that are drawn together; what a prompt would have earned in them is found out when first asked."""

    def __init__(self, simulator: Simulator, seed: int, number: int, size: int, expected: bool) -> None:
        self._simulator, self._seed, self._number, self._expected = simulator, seed, number, expected
        self.contexts = simulator.contexts.sample(size, self._stream("contexts"))
        self._known: dict[int, FloatArray] = {}

    def _stream(self, part: str) -> np.random.Generator:
        return stream(self._seed, "coba", part, self._number)

    def rewards(self, prompt: int) -> FloatArray:
        """Return what `prompt` earns in each round."""
        if self._expected and not self._known:
            means = self._simulator.expected_rewards(self.contexts, seed=self._seed)
            self._known = dict(enumerate(means.T))
        if prompt not in self._known:
            # From the same state of the streams, so that a round has the same luck under every prompt.
            actions = np.full(len(self.contexts), prompt)
            played = self._simulator.play(self.contexts, actions, self._stream("outputs"), self._stream("rewards"))
            self._known[prompt] = played.reward
        return self._known[prompt]


class _Rewards:
    """What each action would have earned in a round."""

    def __init__(self, batch: _Batch, row: int, index: Mapping[Vector, int]) -> None:
        self._batch, self._row, self._index = batch, row, index

    def __call__(self, action: Sequence[float]) -> float:
        try:
            prompt = self._index[tuple(action)]
        except (KeyError, TypeError) as error:
            raise ActionError(
                f"action: expected one of the round's {len(self._index)} actions, got {action!r:.80}; choose from "
                "interaction['actions']"
            ) from error
        return float(self._batch.rewards(prompt)[self._row])


class CobaLog:
    """A logged dataset as an environment of coba, for ``SequentialCB(learn="off", eval="ips")`` and the like.

    Args:
        log: a propensity that is unknown is left out of its round.
        embeddings: as for :func:`coba_environment`.

    Raises:
        ConfigError: not a log, or equal embeddings of two prompts.
    """

    def __init__(self, log: LoggedDataset, *, embeddings: bool = False) -> None:
        check_kind("log", log, LoggedDataset, "read a recorded one with LoggedDataset.load(path)")
        self._log, self._embeddings, self._actions = log, embeddings, _actions(log.prompts, embeddings)

    @property
    def params(self) -> dict[str, Any]:
        """What coba notes of it."""
        return {
            "env_type": "OffPromptsLog", "n_prompts": self._log.n_prompts, "n": len(self._log),
            "embeddings": self._embeddings, "prompts": self._log.prompts.fingerprint,
        }  # fmt: skip

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the rounds: ``context``, ``actions``, ``action``, ``reward`` and ``probability``."""
        for start in range(0, len(self._log), _LOG_ROUNDS):
            part = self._log.take(slice(start, start + _LOG_ROUNDS))
            for context, action, reward, propensity in zip(
                features(part.contexts).tolist(), part.action.tolist(), part.reward.tolist(), part.propensity.tolist(),
                strict=True,
            ):  # fmt: skip
                known = {} if np.isnan(propensity) else {"probability": propensity}
                actions = list(self._actions)
                yield {
                    "context": tuple(context),
                    "actions": actions,
                    "action": actions[action],
                    "reward": reward,
                } | known
