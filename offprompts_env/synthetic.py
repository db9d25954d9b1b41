"""The synthetic benchmark: vectors stand for sentences, and every expected reward has a closed form.

Data-generating process of Kiyohara, Cao, Saito and Joachims (RecSys 2025, arXiv 2504.02646):

    (x, q) ~ Normal(0, L Lᵀ)                L (d_x+d_q)², uniform on [-1, 1]
    e_a    ~ Normal(0, I)                   or a Gaussian mixture
    o      = g (q M + f(e_a N)) + noise     M, N standard normal; noise standard deviation `output_std`
    E[r]   = (x C + q Q) · o / ((d_x + d_q) · k · 5)    C, Q standard normal; k output dimensions are read

`f` is a mapping of :data:`MAPPINGS`. The gain g is 1. The research code released with the paper differs in two ways,
which the preset ``paper_code`` repeats: g = 2 (it adds a draw around the output to the output), and C = M, Q = N (it
reseeds one global generator before each part).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, get_args

import numpy as np

from offprompts_env.config import Config, check_integer, check_number
from offprompts_env.errors import ConfigError, DimensionError, unknown_name
from offprompts_env.rng import stream
from offprompts_env.simulator import (
    ContextSource,
    OutputModel,
    RewardKind,
    RewardModel,
    Simulator,
    check_parts,
    logistic,
)
from offprompts_env.types import Contexts, FloatArray, IntArray, Outputs, PromptSet


def _rational(z: FloatArray, offset: float) -> FloatArray:
    # The pole at z = -1 - 2b is part of the published mapping; the clip bounds it, and a hit on the pole itself is +5.
    with np.errstate(divide="ignore", invalid="ignore"):
        value = (z + offset) / (1 + 2 * offset + z)
    return np.asarray(np.clip(np.nan_to_num(value, nan=5.0, posinf=5.0, neginf=-5.0), -5, 5))


def _power(z: FloatArray, offset: float) -> FloatArray:
    inside = np.where(np.abs(z) < 5, z, 0.0)
    return np.asarray(0.25 * inside * np.abs((inside**2 - 9) * (inside**2 - 25)) ** 0.2)


def _exponential(z: FloatArray, offset: float) -> FloatArray:
    # 25 z / (1 + e^z + e^-z), written without overflow.
    decay = np.exp(-np.abs(z))
    return np.asarray(25 * z * decay / (decay + 1 + decay**2))


MAPPINGS: Mapping[str, Callable[[FloatArray, float], FloatArray]] = {
    "linear": lambda z, offset: z,
    "trigonometric": lambda z, offset: 5 * np.sin(z),
    "sigmoid": lambda z, offset: 5 * logistic(z),
    "rational": _rational,
    "power": _power,
    "exponential": _exponential,
}
"""What a prompt does to the output, elementwise in ``z = scale · e_a N``; only "rational" reads the offset b:
``(z + b) / (1 + 2b + z)`` clipped to [-5, 5]."""


@dataclass(frozen=True)
class SyntheticConfig(Config):
    """Settings of the synthetic benchmark; all are JSON-able and are keyword arguments of the environment.

    Attributes:
        n_prompts: number of prompts ``A``.
        context_dim: ``d_x``.
        query_dim: ``d_q``.
        prompt_dim: ``d_e``.
        output_dim: ``d_o``.
        mapping: name in :data:`MAPPINGS`.
        mapping_scale: factor on z.
        mapping_offset: b of the rational mapping.
        output_std: standard deviation of the output noise.
        confounded_dims: this many last output dimensions are pure noise, which no prompt moves but the reward reads.
        reward_dims: the reward reads only this many first output dimensions; None reads all.
        prompt_clusters: prompts come from a mixture of this many Gaussians with standard normal centres; None for one
            standard normal.
        cluster_std: standard deviation within a cluster.
        reward_type: "continuous", or "binary" through a logistic link.
        reward_std: standard deviation of the noise of a continuous reward.
        output_gain: g, factor on the mean output.
        shared_matrices: draw the matrices of the reward from the same stream as those of the output, so that
            C = M and Q = N wherever shapes agree.
        seed: names the world: matrices and prompts.
    """

    n_prompts: int = 1000
    context_dim: int = 5
    query_dim: int = 5
    prompt_dim: int = 5
    output_dim: int = 5
    mapping: str = "trigonometric"
    mapping_scale: float = 1.0
    mapping_offset: float = 1.0
    output_std: float = 1.0
    confounded_dims: int = 0
    reward_dims: int | None = None
    prompt_clusters: int | None = None
    cluster_std: float = 0.1
    reward_type: RewardKind = "continuous"
    reward_std: float = 1.0
    output_gain: float = 1.0
    shared_matrices: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_prompts", "context_dim", "query_dim", "prompt_dim", "output_dim"):
            check_integer(name, getattr(self, name), 1)
        check_integer("seed", self.seed, 0)
        check_integer("confounded_dims", self.confounded_dims, 0, self.output_dim)
        if self.reward_dims is not None:
            check_integer("reward_dims", self.reward_dims, 1, self.output_dim)
        if self.prompt_clusters is not None:
            check_integer("prompt_clusters", self.prompt_clusters, 1)
        for name in ("output_std", "reward_std", "cluster_std"):
            check_number(name, getattr(self, name), 0)
        for name in ("mapping_scale", "mapping_offset", "output_gain"):
            check_number(name, getattr(self, name))
        if self.mapping not in MAPPINGS:
            raise unknown_name("mapping", self.mapping, MAPPINGS)
        if self.reward_type not in get_args(RewardKind):
            raise unknown_name("reward_type", self.reward_type, get_args(RewardKind))

    @classmethod
    def preset(cls, name: str, **settings: Any) -> Self:
        """Return a named configuration, with `settings` on top: "default", or "paper_code" (see the module).

        Raises:
            ConfigError: unknown preset or setting.
        """
        presets: dict[str, dict[str, Any]] = {
            "default": {},
            "paper_code": {"output_gain": 2.0, "shared_matrices": True},
        }
        if name not in presets:
            raise unknown_name("preset", name, presets)
        return cls.from_settings(presets[name] | settings)

    def build(
        self,
        *,
        contexts: ContextSource | None = None,
        prompts: PromptSet | None = None,
        outputs: OutputModel | None = None,
        rewards: RewardModel | None = None,
    ) -> Simulator:
        """Return the simulator of this world; a part that is given takes the place of the built-in one.

        Raises:
            ConfigError: a given part lacks a method.
            DimensionError: a given part does not fit the others; the message names both dimensions.
        """
        check_parts(contexts=contexts, prompts=prompts, outputs=outputs, rewards=rewards)
        source = GaussianContexts.draw(self) if contexts is None else contexts
        # The other parts take the dimensions of a part that was given, so one can be replaced without repeating them.
        config = replace(self, context_dim=source.context_dim, query_dim=source.query_dim)
        model = AdditiveOutputs.draw(config, prompts) if outputs is None else outputs
        if model.output_dim != config.output_dim:
            config = replace(
                config,
                output_dim=model.output_dim,
                confounded_dims=min(config.confounded_dims, model.output_dim),
                reward_dims=None if config.reward_dims is None else min(config.reward_dims, model.output_dim),
            )
        reward = BilinearReward.draw(config) if rewards is None else rewards
        return Simulator(source, model, reward, reward_std=self.reward_std)


class GaussianContexts:
    """Jointly normal users and queries with mean 0 and covariance ``L Lᵀ``.

    Args:
        factor: L, (d_x + d_q, d_x + d_q).
        context_dim: ``d_x``; the other coordinates are the query.
    """

    def __init__(self, factor: FloatArray, context_dim: int) -> None:
        factor = np.asarray(factor, dtype=np.float32)
        if factor.ndim != 2 or factor.shape[0] != factor.shape[1] or not 0 < context_dim < len(factor):
            raise DimensionError(
                f"contexts: expected a square factor with more than context_dim={context_dim} rows, got {factor.shape}"
            )
        self.factor = factor
        self._transposed = np.ascontiguousarray(factor.T)
        self.context_dim, self.query_dim = context_dim, len(factor) - context_dim

    @classmethod
    def draw(cls, config: SyntheticConfig) -> Self:
        """Draw L uniformly on [-1, 1]."""
        d = config.context_dim + config.query_dim
        return cls(stream(config.seed, "world", "contexts").uniform(-1, 1, (d, d)), config.context_dim)

    def sample(self, n: int, rng: np.random.Generator) -> Contexts:
        """Draw n rounds."""
        joint = rng.standard_normal((n, len(self.factor)), dtype=np.float32) @ self._transposed
        return Contexts(joint[:, : self.context_dim], joint[:, self.context_dim :])


def draw_prompts(config: SyntheticConfig) -> FloatArray:
    """Draw prompt embeddings, (A, d_e): standard normal, or from a Gaussian mixture."""
    rng = stream(config.seed, "world", "prompts")
    shape = (config.n_prompts, config.prompt_dim)
    if config.prompt_clusters is None:
        return rng.standard_normal(shape)
    centres = rng.standard_normal((config.prompt_clusters, config.prompt_dim))
    member = rng.integers(config.prompt_clusters, size=config.n_prompts)
    return np.asarray(centres[member] + config.cluster_std * rng.standard_normal(shape))


class AdditiveOutputs:
    """Outputs ``o = g (q M + f(e_a N)) + Normal(0, output_std²)``, the last dimensions pure noise if confounded.

    Args:
        prompts: catalogue, (A, d_e).
        query_matrix: g M with confounded columns 0, (d_q, d_o).
        effects: g f(e_a N) with confounded columns 0, (A, d_o).
        output_std: standard deviation of the noise.
    """

    def __init__(self, prompts: PromptSet, query_matrix: FloatArray, effects: FloatArray, output_std: float) -> None:
        self.prompts = prompts
        self.query_matrix = np.asarray(query_matrix, dtype=np.float32)
        self.effects = np.asarray(effects, dtype=np.float32)
        if self.effects.shape != (len(prompts), self.query_matrix.shape[1]):
            raise DimensionError(
                f"outputs: expected effects ({len(prompts)}, {self.query_matrix.shape[1]}), got {self.effects.shape}"
            )
        self.output_dim: int = self.effects.shape[1]
        self.noise_std = np.full(self.output_dim, output_std, dtype=np.float32)

    @classmethod
    def draw(cls, config: SyntheticConfig, prompts: PromptSet | None = None) -> Self:
        """Draw M and N, and the prompts where they are not given."""
        # The drawn embeddings act in double precision; a set holds them in single.
        embeddings = draw_prompts(config) if prompts is None else prompts.embeddings
        rng = stream(config.seed, "world", "outputs")
        query_matrix = rng.standard_normal((config.query_dim, config.output_dim))
        prompt_matrix = rng.standard_normal((embeddings.shape[1], config.output_dim))
        z = config.mapping_scale * (embeddings @ prompt_matrix)
        effects = MAPPINGS[config.mapping](z, config.mapping_offset)
        moved = np.arange(config.output_dim) < config.output_dim - config.confounded_dims
        gain = config.output_gain * moved
        catalogue = PromptSet(embeddings) if prompts is None else prompts
        return cls(catalogue, gain * query_matrix, gain * effects, config.output_std)

    def base(self, contexts: Contexts) -> FloatArray:
        """Return ``g q M``, (n, d_o)."""
        if contexts.query.shape[1] != len(self.query_matrix):
            raise DimensionError(
                f"outputs: expected queries of dimension {len(self.query_matrix)}, got {contexts.query.shape[1]}"
            )
        return contexts.query @ self.query_matrix

    def mean(self, contexts: Contexts, actions: IntArray) -> FloatArray:
        """Return ``E[o | q, a]``, (n, d_o)."""
        return self.base(contexts) + self.effects[actions]

    def noise(self, n: int, rng: np.random.Generator) -> FloatArray:
        """Draw the output noise of n rounds, (n, d_o)."""
        return rng.standard_normal((n, self.output_dim), dtype=np.float32) * self.noise_std

    def sample(self, contexts: Contexts, actions: IntArray, rng: np.random.Generator) -> Outputs:
        """Draw one output a round."""
        return Outputs(self.mean(contexts, actions) + self.noise(len(contexts), rng))


class BilinearReward:
    """Mean reward ``w · o`` with ``w = (x C + q Q) / ((d_x + d_q) · k · 5)``, through a logistic link if binary.

    Args:
        context_matrix: C, (d_x, d_o); columns the reward does not read are 0.
        query_matrix: Q, (d_q, d_o).
        normaliser: what the bilinear form is divided by.
        kind: "continuous" or "binary".
    """

    def __init__(
        self, context_matrix: FloatArray, query_matrix: FloatArray, normaliser: float, kind: RewardKind = "continuous"
    ) -> None:
        if np.shape(context_matrix)[1:] != np.shape(query_matrix)[1:]:
            raise DimensionError(
                f"rewards: expected matrices with as many columns, got {np.shape(context_matrix)} and "
                f"{np.shape(query_matrix)}"
            )
        if not normaliser > 0:
            raise ConfigError(f"rewards: expected a normaliser > 0, got {normaliser}")
        self.context_matrix = np.asarray(context_matrix / normaliser, dtype=np.float32)
        self.query_matrix = np.asarray(query_matrix / normaliser, dtype=np.float32)
        self.kind = kind

    @classmethod
    def draw(cls, config: SyntheticConfig) -> Self:
        """Draw C and Q."""
        rng = stream(config.seed, "world", "outputs" if config.shared_matrices else "rewards")
        context_matrix = rng.standard_normal((config.context_dim, config.output_dim))
        query_matrix = rng.standard_normal((config.query_dim, config.output_dim))
        k = config.output_dim if config.reward_dims is None else config.reward_dims
        read = np.arange(config.output_dim) < k
        normaliser = (config.context_dim + config.query_dim) * k * 5
        return cls(context_matrix * read, query_matrix * read, normaliser, config.reward_type)

    def weights(self, contexts: Contexts) -> FloatArray:
        """Return w, (n, d_o)."""
        found = (contexts.context.shape[1], contexts.query.shape[1])
        if found != (len(self.context_matrix), len(self.query_matrix)):
            raise DimensionError(
                f"rewards: expected context and query of dimensions "
                f"{(len(self.context_matrix), len(self.query_matrix))}, got {found}"
            )
        return contexts.context @ self.context_matrix + contexts.query @ self.query_matrix

    def mean(self, contexts: Contexts, outputs: Outputs) -> FloatArray:
        """Return the noiseless reward, (n,)."""
        value = np.einsum("nd,nd->n", self.weights(contexts), outputs.embedding)
        return logistic(value) if self.kind == "binary" else value
