"""Observations in another form: one flat vector, or with the text of the query."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space

from offprompts_env.config import check_integer
from offprompts_env.errors import ConfigError
from offprompts_env.rng import stream
from offprompts_env.types import Array, Contexts, FloatArray

Observation = dict[str, Any]

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Letters of Latin scripts with their accents, punctuation, currencies: basic Latin to Extended-B, and Additional.
_BLOCKS = ((0x20, 0x250), (0x1E00, 0x1F00), (0x2010, 0x2060), (0x20A0, 0x20C1))
LATIN = "".join(chr(code) for low, high in _BLOCKS for code in range(low, high) if chr(code).isprintable())
# Rounds that are looked at for the longest text, and what lengths are rounded up to a multiple of.
_PROBE, _LENGTHS = 1024, 64


def keyed(space: spaces.Space[Any]) -> dict[str, spaces.Space[Any]]:
    """Return the parts of an observation, context and query first.

    Raises:
        ConfigError: not a Dict space with the keys ``context`` and ``query``.
    """
    if not isinstance(space, spaces.Dict) or not {"context", "query"} <= set(space.spaces):
        raise ConfigError(
            f"env: expected observations of a Dict space with the keys 'context' and 'query', got {space}; wrap an "
            "environment of this project, and flatten last"
        )
    return {key: space.spaces[key] for key in dict.fromkeys(("context", "query", *space.spaces))}


def _boxes(space: spaces.Space[Any]) -> dict[str, spaces.Box[Any]]:
    """Return the parts of an observation in the order in which they are flattened."""
    found: dict[str, spaces.Box[Any]] = {}
    for key, part in keyed(space).items():
        if not isinstance(part, spaces.Box):
            raise ConfigError(
                f"env: expected a Box at {key!r}, got a {type(part).__name__} space; take the wrapper that adds it off"
            )
        found[key] = part
    return found


def _size(*parts: spaces.Box[Any]) -> int:
    return sum(int(np.prod(part.shape)) for part in parts)


def _flat_space(parts: dict[str, spaces.Box[Any]]) -> spaces.Box[Any]:
    return spaces.Box(-np.inf, np.inf, (_size(*parts.values()),), np.float32)


def _flatten(observation: Observation, keys: Iterable[str]) -> FloatArray:
    return np.concatenate([observation[key].ravel() for key in keys], dtype=np.float32)


class FlatObservation(gym.ObservationWrapper[FloatArray, np.int64, Observation], RecordConstructorArgs):
    """Shows ``[x, q]`` as one vector, for agents that know no Dict observations.

    The order is: context, query, then other boxes that a wrapper has added, row by row, in the order of the space. For
    context and query alone that is also the order of Gymnasium's ``FlattenObservation``, which sorts keys by name;
    with ``candidates`` it is not, since Gymnasium puts them first.

    The rounds, rewards and infos stay the same. ``op.collect`` and the recorders need the keys: record inside, as in
    ``FlatObservation(RecordLoggedData(env, path))``.

    Attributes:
        context_dim: d_x, where the query begins.
        query_dim: d_q.

    Args:
        env: an environment of this project.

    Raises:
        ConfigError: observations without ``context`` and ``query``, or with something that is not a box.
    """

    def __init__(self, env: gym.Env[Observation, np.int64]) -> None:
        RecordConstructorArgs.__init__(self)
        gym.ObservationWrapper.__init__(self, env)
        parts = _boxes(env.observation_space)
        self._keys, self.context_dim, self.query_dim = tuple(parts), _size(parts["context"]), _size(parts["query"])
        self.observation_space = _flat_space(parts)

    def observation(self, observation: Observation) -> FloatArray:
        """Return the parts side by side, (d_x + d_q,) float32."""
        return _flatten(observation, self._keys)


class FlatVectorObservation(VectorWrapper[FloatArray, Array, Observation, Array, FloatArray]):
    """Shows ``[x, q]`` of a batch as one matrix; the sibling of :class:`FlatObservation`, in the same order.

    Unlike Gymnasium's vector observation wrappers it takes environments that reset in the same step, and flattens
    ``final_obs`` in the infos as well.

    Attributes:
        context_dim: d_x, where the query begins.
        query_dim: d_q.

    Args:
        env: a vector environment of this project, or one of Gymnasium's around environments of this project.

    Raises:
        ConfigError: as for :class:`FlatObservation`.
    """

    def __init__(self, env: VectorEnv[Observation, Array, FloatArray]) -> None:
        if isinstance(env, gym.Env):
            raise ConfigError("env: expected a vector environment, got a single one; flatten it with FlatObservation")
        VectorWrapper.__init__(self, env)
        parts = _boxes(env.single_observation_space)
        self._keys, self.context_dim, self.query_dim = tuple(parts), _size(parts["context"]), _size(parts["query"])
        self.single_observation_space = _flat_space(parts)
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[FloatArray, dict[str, Any]]:
        """Begin the rounds; observations are (num_envs, d_x + d_q) float32."""
        observation, infos = self.env.reset(seed=seed, options=options)
        return self._flat(observation), infos

    def step(self, actions: Array) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, dict[str, Any]]:
        """Play one prompt in each round; ``final_obs`` is flat like the observations."""
        observation, reward, terminated, truncated, infos = self.env.step(actions)
        if "final_obs" in infos:
            infos = {**infos, "final_obs": self._flat_final(infos["final_obs"])}
        return self._flat(observation), reward, terminated, truncated, infos

    def _flat(self, observation: Observation) -> FloatArray:
        rows = [observation[key].reshape(len(observation[key]), -1) for key in self._keys]
        return np.concatenate(rows, axis=1, dtype=np.float32)

    def _flat_final(self, final: Any) -> Array:
        if not isinstance(final, np.ndarray):
            return self._flat(final)
        # Gymnasium's own vector environments: one observation a sub-environment, None where a round goes on.
        flat = np.full(len(final), None, dtype=object)
        for index, one in enumerate(final):
            if one is not None:
                flat[index] = _flatten(one, self._keys)
        return flat


class _Characters(dict[int, str]):
    """What becomes of a character, worked out when it first occurs; for :meth:`str.translate`."""

    def __init__(self, valid: frozenset[str]) -> None:
        super().__init__()
        self._valid = valid

    def __missing__(self, code: int) -> str:
        character = chr(code)
        found = character if character in self._valid else " " if character.isspace() else REPLACEMENT
        self[code] = found
        return found


class TextObservation(gym.Wrapper[Observation, np.int64, Observation, np.int64], RecordConstructorArgs):
    """Adds the text of the query to the observation, and a description of the user where the environment has one.

    New keys are ``query_text`` and, in worlds whose context source has a method ``describe``, ``user_text``: both Text
    spaces over the same characters. What a space cannot hold is changed, never refused: text is composed (Unicode NFC),
    white space outside of `charset` becomes a blank, any other character outside of it becomes ``�``, and what is
    longer than the space allows is cut. The info keeps the text as it is.

    The rounds stay the same and the keys are kept, so ``op.collect`` and the recorders work around it; they store the
    text of the info. ``op.collect`` then steps the environment one by one.

    Args:
        env: an environment of this project whose rounds have text.
        charset: the characters of the spaces besides ``�`` and the blank; by default letters of Latin scripts with
            their accents, digits, punctuation and currencies. For other scripts pass your own.
        max_length: characters a text at most; None for the longest of 1,024 rounds, rounded up to a multiple of 64.

    Raises:
        ConfigError: rounds without text, no such environment, or a wrong argument.
    """

    def __init__(
        self, env: gym.Env[Observation, np.int64], *, charset: str = LATIN, max_length: int | None = None
    ) -> None:
        RecordConstructorArgs.__init__(self, charset=charset, max_length=max_length)
        gym.Wrapper.__init__(self, env)
        if not isinstance(charset, str):
            raise ConfigError(f"charset: expected the characters as one string, got {type(charset).__name__}")
        if max_length is not None:
            check_integer("max_length", max_length, 1)
        shown = keyed(env.observation_space)
        self._source = getattr(getattr(env.unwrapped, "simulator", None), "contexts", None)
        if self._source is None:
            raise ConfigError(f"env: expected an environment of this project, got {env.unwrapped}")
        rounds: Contexts = self._source.sample(_PROBE, stream(0, "text observation"))
        if rounds.query_text is None:
            raise ConfigError(f"env: expected rounds with text, but the queries of {env.unwrapped} are vectors only")
        characters = frozenset(charset) | {REPLACEMENT, " "}
        self._table = _Characters(characters)
        self._describe = getattr(self._source, "describe", None)
        texts = {"query_text": list(rounds.query_text)}
        if self._describe is not None:
            texts["user_text"] = [self._describe(rounds, row) for row in range(_PROBE)]
        self._lengths = {
            name: max_length or -(-max(map(len, found)) // _LENGTHS) * _LENGTHS for name, found in texts.items()
        }
        added = {name: spaces.Text(length, min_length=0, charset=characters) for name, length in self._lengths.items()}
        self.observation_space = spaces.Dict({**shown, **added})

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin a round."""
        observation, info = self.env.reset(seed=seed, options=options)
        return self._with_text(observation, info), info

    def step(self, action: np.int64) -> tuple[Observation, Any, bool, bool, dict[str, Any]]:
        """Play a prompt."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._with_text(observation, info), reward, terminated, truncated, info

    def clean(self, text: str, length: int) -> str:
        """Return `text` as the spaces can hold it."""
        return unicodedata.normalize("NFC", text).translate(self._table)[:length]

    def _with_text(self, observation: Observation, info: dict[str, Any]) -> Observation:
        texts = {"query_text": info["query_text"]}
        if self._describe is not None:
            texts["user_text"] = self._describe(Contexts.of(observation, info), 0)
        return {**observation, **{name: self.clean(text, self._lengths[name]) for name, text in texts.items()}}
