"""Gymnasium environments: thin shells over a :class:`~offprompts_env.simulator.Simulator`.

One round is one episode. ``reset`` shows who asks about what; ``step`` plays a prompt and ends the episode with
``terminated=True``. The vector environments are native: a batch of rounds is one call of the simulator, and the next
rounds begin in the same step, so that no row is a dummy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from offprompts_env.config import Config, check_integer
from offprompts_env.errors import ActionError, ConfigError, ResetNeededError, unknown_name
from offprompts_env.printing import printable
from offprompts_env.simulator import (
    ContextSource,
    GaussianOutputs,
    LinearReward,
    OutputModel,
    RewardModel,
    Rounds,
    Simulator,
)
from offprompts_env.synthetic import SyntheticConfig
from offprompts_env.types import Contexts, FloatArray, PromptSet, check_actions, check_rewards

if TYPE_CHECKING:
    from offprompts_env.movielens.parts import MovieLensConfig

Observation = dict[str, FloatArray]

# Contexts are drawn ahead in blocks that grow to this many rounds: one vectorised draw serves many resets.
_LARGEST_BLOCK = 1024


class _Streams:
    """The random streams of one environment: contexts, outputs and rewards never share numbers."""

    def __init__(self, np_random: np.random.Generator) -> None:
        children = np_random.bit_generator.seed_seq.spawn(3)  # type: ignore[attr-defined]
        self.contexts, self.outputs, self.rewards = (np.random.default_rng(child) for child in children)


class _Block(Protocol):
    """Rounds drawn ahead."""

    contexts: Contexts

    def play(self, row: int, action: int) -> tuple[Mapping[str, Any], float, float]:
        """Play one row: what `info` says of the output, the expected reward, the reward."""


class _GeneralBlock:
    """Rounds of any simulator, played one by one."""

    def __init__(self, simulator: Simulator, contexts: Contexts, streams: _Streams) -> None:
        self.simulator, self.contexts, self.streams = simulator, contexts, streams

    def play(self, row: int, action: int) -> tuple[Mapping[str, Any], float, float]:
        rounds = self.simulator.play(
            self.contexts.take(slice(row, row + 1)), np.array([action]), self.streams.outputs, self.streams.rewards
        )
        said: dict[str, Any] = {"output": rounds.outputs.embedding[0]}
        if rounds.outputs.text is not None:
            said["sentence"] = rounds.outputs.text[0]
        return said, float(rounds.expected_reward[0]), float(rounds.reward[0])


class _ClosedFormBlock:
    """Rounds of an exact simulator: all but the prompt's effect is computed for the block at once.

    With output ``o = b + e_a`` (b the base with its noise) the mean reward is ``w · b + w · e_a``. The numbers drawn
    are those of :class:`_GeneralBlock`, so both play the same rounds, as long as no round is reset before its step.
    """

    def __init__(self, simulator: Simulator, contexts: Contexts, streams: _Streams) -> None:
        outputs, rewards = simulator.outputs, simulator.rewards
        if not (isinstance(outputs, GaussianOutputs) and isinstance(rewards, LinearReward)):
            raise ConfigError("a closed-form block needs Gaussian outputs and a linear reward")
        n = len(contexts)
        noise = streams.outputs.standard_normal((n, outputs.output_dim), dtype=np.float32) * outputs.noise_std
        self.contexts = contexts
        self.noise = simulator.noise
        self.binary = rewards.kind == "binary"
        self.effects = outputs.effects
        self.base = outputs.base(contexts) + noise
        self.weights = rewards.weights(contexts)
        self.fixed = check_rewards(np.einsum("nd,nd->n", self.weights, self.base)).tolist()
        self.variates = self.noise.variates(n, streams.rewards)

    def play(self, row: int, action: int) -> tuple[Mapping[str, Any], float, float]:
        effect = self.effects[action]
        mean = self.fixed[row] + float(self.weights[row].dot(effect))
        if self.binary:
            mean = 0.5 * (1 + math.tanh(0.5 * mean))
            return {"output": self.base[row] + effect}, mean, float(self.variates[row] < mean)
        return {"output": self.base[row] + effect}, mean, mean + self.noise.std * float(self.variates[row])


def _spaces(simulator: Simulator) -> tuple[spaces.Dict, spaces.Discrete]:
    source = simulator.contexts
    observation = spaces.Dict(
        {
            "context": spaces.Box(-np.inf, np.inf, (source.context_dim,), np.float32),
            "query": spaces.Box(-np.inf, np.inf, (source.query_dim,), np.float32),
        }
    )
    return observation, spaces.Discrete(simulator.n_prompts)


# What info says of a round before a prompt is chosen.
_ABOUT = ("user_id", "item_id", "query_text")


class _Marked:
    """An environment that says of itself whether a seed gives the same rounds again.

    An id is registered once, for language models that keep to a seed and for those that do not.
    """

    simulator: Simulator
    _spec: EnvSpec | None = None

    @property
    def spec(self) -> EnvSpec | None:
        """As registered, and marked as nondeterministic where this very environment is."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        if spec is not None and not self.simulator.reproducible:
            spec = replace(spec, nondeterministic=True)
        self._spec = spec


class PromptEnv(_Marked, gym.Env[Any, Any]):
    """One-step environment over any simulator.

    Args:
        simulator: the world.
        config: JSON-able settings that make this environment again; recorded in the manifest of a log.
        render_mode: "ansi" shows the last round as text.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 1}  # noqa: RUF012  (Gymnasium's own interface)

    def __init__(
        self, simulator: Simulator, *, config: Mapping[str, Any] | None = None, render_mode: str | None = None
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise unknown_name("render_mode", render_mode, self.metadata["render_modes"])
        self.simulator = simulator
        self.config = dict(config or {})
        self.render_mode = render_mode
        self.observation_space, self.action_space = _spaces(simulator)
        self._n_prompts = simulator.n_prompts
        self._make_block = _ClosedFormBlock if simulator.exact else _GeneralBlock
        self._drawn_from: np.random.Generator | None = None
        self._shown: str | None = None
        self._open = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin a round: draw a user and a query."""
        super().reset(seed=seed)
        if self.np_random is not self._drawn_from:
            self._drawn_from = self.np_random
            self._streams = _Streams(self.np_random)
            self._draw(1)
        else:
            self._row += 1
            if self._row == self._rows:
                self._draw(min(4 * self._rows, _LARGEST_BLOCK))
        self._open = True
        return self._observe(), self._about()

    def _draw(self, rows: int) -> None:
        contexts = self.simulator.contexts.sample(rows, self._streams.contexts)
        self._block: _Block = self._make_block(self.simulator, contexts, self._streams)
        self._context, self._query = contexts.context, contexts.query
        self._texts = [(name, getattr(contexts, name)) for name in _ABOUT if getattr(contexts, name) is not None]
        self._row, self._rows = 0, rows

    def _observe(self) -> Observation:
        # Copies: what an agent does to an observation must not reach the round.
        return {"context": self._context[self._row].copy(), "query": self._query[self._row].copy()}

    def _about(self) -> dict[str, Any]:
        return {name: column[self._row] for name, column in self._texts}

    def step(self, action: np.int64 | int) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Play a prompt and end the round.

        Args:
            action: prompt index in [0, A).

        Returns:
            The round's observation again, the reward, ``terminated=True``, ``truncated=False``, and an info with
            ``output`` (d_o,), ``sentence`` and ``prompt`` where there is text, ids and query text where they exist, and
            ``expected_reward``, the reward without observation noise.

        Raises:
            ResetNeededError: no round is open.
            ActionError: not an integer, or not in [0, A).
        """
        if not self._open:
            raise ResetNeededError(
                "step: expected an open round, found none; call reset() first, and again after each step"
            )
        index = self._check_action(action)
        said, expected, reward = self._block.play(self._row, index)
        self._open = False
        info = self._about()
        info.update(said)
        info["expected_reward"] = expected
        if self.simulator.prompts.texts is not None:
            info["prompt"] = self.simulator.prompts.texts[index]
        if self.render_mode is not None:
            self._shown = self._describe(index, info, reward)
        return self._observe(), reward, True, False, info

    def _check_action(self, action: object) -> int:
        if isinstance(action, int | np.integer) and not isinstance(action, bool):
            if 0 <= action < self._n_prompts:
                return int(action)
            raise ActionError(
                f"action: expected an index in [0, {self._n_prompts}), got {action}; pass the index of a prompt"
            )
        if isinstance(action, np.ndarray) and action.size == 1:
            return int(check_actions(action.reshape(1), self._n_prompts, 1)[0])
        raise ActionError(
            f"action: expected an integer in [0, {self._n_prompts}), got {action!r} of type {type(action).__name__}; "
            "pass the index of a prompt"
        )

    def render(self) -> str | None:
        """Return the last round as readable text; None before the first step or without a render mode."""
        if self.render_mode is None:
            gym.logger.warn('render() needs a render mode: make the environment with render_mode="ansi"')
            return None
        return self._shown if self._shown is not None else "no round played yet\n"

    def _describe(self, action: int, info: Mapping[str, Any], reward: float) -> str:
        def vector(values: FloatArray) -> str:
            return "(" + " ".join(f"{value:+.2f}" for value in values) + ")"

        describe = getattr(self.simulator.contexts, "describe", None)
        user = f"{info['user_id']}, " if "user_id" in info else ""
        user += describe(self._block.contexts, self._row) if describe else vector(self._context[self._row])
        said = {
            "user": user,
            "query": info.get("query_text", vector(self._query[self._row])),
            "prompt": f'{action} "{info["prompt"]}"' if "prompt" in info else str(action),
            "output": info.get("sentence", vector(info["output"])),
            "reward": f"{reward:+.3f} (expected {info['expected_reward']:+.3f})",
        }
        # One line each, whatever is in a title or a sentence.
        return "".join(f"{name:<8}{printable(text, lines=False)}\n" for name, text in said.items())


class PromptVectorEnv(_Marked, VectorEnv[Any, Any, Any]):
    """Native batch of one-step environments over any simulator.

    Every step ends all rounds and begins the next ones (same-step autoreset): the observations returned are the next
    rounds', and ``infos`` has ``final_obs`` (a dict of batched arrays) and ``final_info``: ``output``, ``sentence``,
    ``prompt``, ids, ``query_text`` and ``expected_reward`` of the finished ones, each with a leading batch dimension.

    Args:
        num_envs: rounds in a batch.
        simulator: the world.
        config: JSON-able settings that make this environment again.
        autoreset_mode: only same-step; Gymnasium's other modes make every second row of a one-step episode a dummy.
        render_mode: None; render a single environment instead.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(
        self,
        num_envs: int,
        simulator: Simulator,
        *,
        config: Mapping[str, Any] | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        render_mode: str | None = None,
    ) -> None:
        check_integer("num_envs", num_envs, 1)
        if autoreset_mode not in (AutoresetMode.SAME_STEP, "same_step", "SameStep", AutoresetMode.SAME_STEP.value):
            raise ConfigError(
                f"autoreset_mode: expected same_step, got {autoreset_mode!r}; for another mode use "
                'gym.make_vec(..., vectorization_mode="sync", vector_kwargs={"autoreset_mode": ...})'
            )
        if render_mode is not None:
            raise ConfigError("render_mode: a vector environment does not render; use gym.make for that")
        self.num_envs = num_envs
        self.simulator = simulator
        self.config = dict(config or {})
        self.render_mode = None
        self.single_observation_space, self.single_action_space = _spaces(simulator)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        texts = simulator.prompts.texts
        self._texts = None if texts is None else np.array(texts, dtype=object)
        self._contexts: Contexts | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin `num_envs` rounds.

        Args:
            seed: one integer for the whole batch.
            options: ignored.
        """
        if seed is not None and not isinstance(seed, int | np.integer):
            raise ConfigError(f"seed: expected one integer for the whole batch, got {seed!r}")
        super().reset(seed=seed)
        if seed is not None or self._contexts is None:
            self._streams = _Streams(self.np_random)
        self._contexts = self.simulator.contexts.sample(self.num_envs, self._streams.contexts)
        return self._observe(self._contexts), self._about(self._contexts)

    def step(self, actions: np.ndarray) -> tuple[Observation, FloatArray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Play one prompt in each round and begin the next rounds; see the class for what `infos` holds."""
        if self._contexts is None:
            raise ResetNeededError("step: expected open rounds; call reset() first")
        rounds = self.simulator.play(self._contexts, actions, self._streams.outputs, self._streams.rewards)
        self._contexts = self.simulator.contexts.sample(self.num_envs, self._streams.contexts)
        everywhere = np.ones(self.num_envs, dtype=bool)
        infos = self._about(self._contexts)
        infos["final_obs"] = self._observe(rounds.contexts)
        infos["_final_obs"] = everywhere
        infos["final_info"] = self._finished(rounds)
        infos["_final_info"] = everywhere
        reward = rounds.reward.astype(np.float64)
        return self._observe(self._contexts), reward, everywhere.copy(), np.zeros(self.num_envs, dtype=bool), infos

    def _finished(self, rounds: Rounds) -> dict[str, Any]:
        final = self._about(rounds.contexts)
        final["output"] = rounds.outputs.embedding
        if rounds.outputs.text is not None:
            final["sentence"] = rounds.outputs.text
        if self._texts is not None:
            final["prompt"] = self._texts[rounds.actions]
        final["expected_reward"] = rounds.expected_reward
        return final

    @staticmethod
    def _observe(contexts: Contexts) -> Observation:
        # Copies, as of a single environment: what an agent does to an observation must not reach the round.
        return {"context": contexts.context.copy(), "query": contexts.query.copy()}

    @staticmethod
    def _about(contexts: Contexts) -> dict[str, Any]:
        return {name: getattr(contexts, name) for name in _ABOUT if getattr(contexts, name) is not None}


def _check_settings(config: type[Config], settings: Mapping[str, Any], *more: str) -> None:
    """Raise :class:`ConfigError` for a keyword argument that the environment does not have."""
    valid = {*config.names(), "contexts", "prompts", "outputs", "rewards", "render_mode", *more}
    for name in settings:
        if name not in valid:
            raise unknown_name("setting", name, valid)


def _own(parts: Mapping[str, object | None]) -> dict[str, str]:
    """Return the classes of the caller's own parts: a log must not claim to come from the built-in ones."""
    return {
        name: f"{type(part).__module__}.{type(part).__qualname__}" for name, part in parts.items() if part is not None
    }


def _synthetic(
    preset: str,
    contexts: ContextSource | None,
    prompts: PromptSet | None,
    outputs: OutputModel | None,
    rewards: RewardModel | None,
    settings: dict[str, Any],
) -> tuple[Simulator, dict[str, Any]]:
    _check_settings(SyntheticConfig, settings, "preset")
    config = SyntheticConfig.preset(preset, **settings)
    parts: dict[str, Any] = {"contexts": contexts, "prompts": prompts, "outputs": outputs, "rewards": rewards}
    return config.build(**parts), config.to_json() | _own(parts)


def _movielens(
    contexts: ContextSource | None,
    prompts: PromptSet | None,
    outputs: OutputModel | None,
    rewards: RewardModel | None,
    settings: dict[str, Any],
) -> tuple[Simulator, dict[str, Any]]:
    from offprompts_env.movielens.parts import MovieLensConfig

    _check_settings(MovieLensConfig, settings)
    config: MovieLensConfig = MovieLensConfig.from_settings(settings)
    parts: dict[str, Any] = {"contexts": contexts, "prompts": prompts, "outputs": outputs, "rewards": rewards}
    return config.build(**parts), config.to_json() | _own(parts)


class SyntheticEnv(PromptEnv):
    """Prompt selection with vectors in the place of sentences; every expected reward has a closed form.

    ## Description
    A user with features x asks about an item with features q. A policy picks one of many prompts, each known by an
    embedding. A frozen generator answers with a vector o, and the user's reaction depends on x, q and o. The user's
    taste decides which prompt is best: a good policy personalises.

    ## Action Space
    `Discrete(n_prompts)`: the index of a prompt.

    ## Observation Space
    `Dict(context=Box(d_x), query=Box(d_q))`, float32, jointly normal.

    ## Rewards
    `(x C + q Q) · o / ((d_x + d_q) · d_o · 5)` plus normal noise; or, with `reward_type="binary"`, a coin whose
    probability is the logistic function of that number.

    ## Starting State
    A user and a query are drawn from their joint distribution.

    ## Episode End
    Every episode ends after one step with `terminated=True`.

    ## Arguments
    All fields of :class:`~offprompts_env.synthetic.SyntheticConfig` as keyword arguments, and:
    `preset`: "default" (the stated equations) or "paper_code" (the process behind the published numbers);
    `contexts`, `prompts`, `outputs`, `rewards`: own parts: a :class:`~offprompts_env.types.PromptSet`, and objects like
    the protocols in :mod:`offprompts_env.simulator`;
    `render_mode`: "ansi".

    ## Reproducibility
    `seed` names the world (its matrices and prompts); `reset(seed=...)` names the rounds. The same pair gives the same
    rounds bit for bit on the same machine; contexts, outputs and rewards have streams of their own.

    ## Data and Licence
    No data; Apache-2.0.

    ## Citation
    Kiyohara, Cao, Saito, Joachims: An Off-Policy Learning Approach for Steering Sentence Generation towards
    Personalization. RecSys 2025. arXiv 2504.02646.

    ## Version History
    - v0: first release.
    """

    def __init__(
        self,
        *,
        preset: str = "default",
        contexts: ContextSource | None = None,
        prompts: PromptSet | None = None,
        outputs: OutputModel | None = None,
        rewards: RewardModel | None = None,
        render_mode: str | None = None,
        **settings: Any,
    ) -> None:
        simulator, config = _synthetic(preset, contexts, prompts, outputs, rewards, settings)
        super().__init__(simulator, config=config, render_mode=render_mode)


class SyntheticVectorEnv(PromptVectorEnv):
    """Native vector form of :class:`SyntheticEnv`, with the same arguments and `num_envs`."""

    def __init__(
        self,
        num_envs: int,
        *,
        preset: str = "default",
        contexts: ContextSource | None = None,
        prompts: PromptSet | None = None,
        outputs: OutputModel | None = None,
        rewards: RewardModel | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        render_mode: str | None = None,
        **settings: Any,
    ) -> None:
        simulator, config = _synthetic(preset, contexts, prompts, outputs, rewards, settings)
        super().__init__(num_envs, simulator, config=config, autoreset_mode=autoreset_mode, render_mode=render_mode)


class MovieLensEnv(PromptEnv):
    """A frozen language model describes a movie, steered by a keyword; a simulated MovieLens user reacts.

    ## Description
    A user with a taste x asks about a movie. A policy picks a keyword; the language model writes a sentence about the
    movie under the prompt "title + keyword"; a DistilBERT model trained on MovieLens ratings says how probably
    this user likes the movie so described. All runs on the embedded bundle, without download or GPU; any causal
    language model takes its place by `language_model=`.

    ## Action Space
    `Discrete(n_prompts)`: the index of a keyword.

    ## Observation Space
    `Dict(context=Box(d_x), query=Box(d_q))`, float32: the user's taste in genres and eras, and the movie's encoding.

    ## Rewards
    `10 · (P(like | user, sentence) − P(like | user, sentences without a prompt))` plus normal noise of standard
    deviation 0.05; or, with `reward_type="binary"`, a coin of probability `P(like | user, sentence)`.

    ## Starting State
    A user and a movie are drawn uniformly and independently.

    ## Episode End
    Every episode ends after one step with `terminated=True`.

    ## Arguments
    All fields of :class:`~offprompts_env.movielens.parts.MovieLensConfig` as keyword arguments, and:
    `contexts`, `prompts`, `outputs`, `rewards`: own parts: a :class:`~offprompts_env.types.PromptSet`, and objects like
    the protocols in :mod:`offprompts_env.simulator`;
    `render_mode`: "ansi".

    ## Reproducibility
    The world is the bundle, whose files are checked against their checksums. `reset(seed=...)` names the rounds: users,
    movies, the tokens drawn by the language model, and rewards. The same seed gives the same rounds bit for bit on the
    same machine.

    ## Data and Licence
    Titles, user vectors and models of the embedded bundle are derived from MovieLens latest-small and come under its
    conditions: research use, acknowledgement, no endorsement, no commercial use. See LICENSE-MOVIELENS.txt
    in the bundle.

    ## Citation
    Kiyohara, Cao, Saito, Joachims: An Off-Policy Learning Approach for Steering Sentence Generation towards
    Personalization. RecSys 2025. arXiv 2504.02646.
    Harper, Konstan: The MovieLens Datasets: History and Context. ACM TiiS 5(4), 2015.

    ## Version History
    - v0: first release.
    """

    def __init__(
        self,
        *,
        contexts: ContextSource | None = None,
        prompts: PromptSet | None = None,
        outputs: OutputModel | None = None,
        rewards: RewardModel | None = None,
        render_mode: str | None = None,
        **settings: Any,
    ) -> None:
        simulator, config = _movielens(contexts, prompts, outputs, rewards, settings)
        super().__init__(simulator, config=config, render_mode=render_mode)


class MovieLensVectorEnv(PromptVectorEnv):
    """Native vector form of :class:`MovieLensEnv`, with the same arguments and `num_envs`."""

    def __init__(
        self,
        num_envs: int,
        *,
        contexts: ContextSource | None = None,
        prompts: PromptSet | None = None,
        outputs: OutputModel | None = None,
        rewards: RewardModel | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        render_mode: str | None = None,
        **settings: Any,
    ) -> None:
        simulator, config = _movielens(contexts, prompts, outputs, rewards, settings)
        super().__init__(num_envs, simulator, config=config, autoreset_mode=autoreset_mode, render_mode=render_mode)
