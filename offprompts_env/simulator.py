"""The world behind an environment: four replaceable parts and the simulator that composes them.

    x, q ~ ContextSource    a ~ policy    s ~ OutputModel(q, a)    r ~ noise(RewardModel(x, q, s))

Any object with the methods of a protocol is a part. Truth and noise are separate: parts give noiseless means and draws
of outputs, and observation noise is added around the mean in :meth:`RewardNoise.draw` and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np

from offprompts_env.config import check_kind
from offprompts_env.errors import ConfigError, DimensionError, NumericalError, unknown_name
from offprompts_env.rng import stream
from offprompts_env.sampling import check_policy, inverse_cdf, pmf_by_parts, row_parts, sample_actions
from offprompts_env.types import (
    Contexts,
    Estimate,
    FloatArray,
    IntArray,
    Outputs,
    Policy,
    PromptSet,
    check_actions,
    check_rewards,
)

RewardKind = Literal["continuous", "binary"]


@runtime_checkable
class ContextSource(Protocol):
    """Draws who asks about what."""

    @property
    def context_dim(self) -> int:
        """``d_x``."""
        ...

    @property
    def query_dim(self) -> int:
        """``d_q``."""
        ...

    def sample(self, n: int, rng: np.random.Generator) -> Contexts:
        """Draw n independent rounds."""
        ...


@runtime_checkable
class OutputModel(Protocol):
    """The frozen generator: what it answers to a query under a prompt. It never sees the user."""

    @property
    def output_dim(self) -> int:
        """``d_o``."""
        ...

    @property
    def prompts(self) -> PromptSet:
        """The catalogue that actions index."""
        ...

    def sample(self, contexts: Contexts, actions: IntArray, rng: np.random.Generator) -> Outputs:
        """Draw one output a round.

        What is random in row i depends on the state of `rng` and on i, never on the actions of any row. So the same
        generator state gives common random numbers across policies.
        """
        ...


@runtime_checkable
class EnumerableOutputs(OutputModel, Protocol):
    """An output model whose output, given query and prompt, is one of K with equal chances, such as frozen sentences.

    Then ``E[r | x, q, a] = 1/K Σ_k r(x, q, s_k)`` is a finite sum.
    """

    @property
    def outcomes(self) -> int:
        """K."""
        ...

    def outcome(self, contexts: Contexts, actions: IntArray, k: int) -> Outputs:
        """Return output k of each round, 0 ≤ k < K."""
        ...


@runtime_checkable
class DealtOutputs(OutputModel, Protocol):
    """An output model whose played outputs depend on those played before, such as sentences without replacement.

    Played rounds come from :meth:`deal`; learners and evaluations call ``sample``, which stays a function of its
    arguments and leaves alone what is dealt next.
    """

    def deal(self, contexts: Contexts, actions: IntArray, rng: np.random.Generator) -> Outputs:
        """Draw one output a round, to be played."""
        ...

    def restart(self) -> None:
        """Forget what was dealt."""
        ...

    def remember(self, contexts: Contexts, actions: IntArray, outputs: Outputs) -> None:
        """Take `outputs` (n) as dealt, in this order."""
        ...


@runtime_checkable
class GaussianOutputs(OutputModel, Protocol):
    """An output model whose output is ``base(q) + effects[a] + Normal(0, diag(noise_std²))``."""

    @property
    def effects(self) -> FloatArray:
        """What each prompt adds to the mean, (A, d_o)."""
        ...

    @property
    def noise_std(self) -> FloatArray:
        """Standard deviation of each output dimension, (d_o,)."""
        ...

    def base(self, contexts: Contexts) -> FloatArray:
        """The part of the mean that no prompt changes, (n, d_o)."""
        ...


@runtime_checkable
class RewardModel(Protocol):
    """The user's noiseless reaction ``E[r | x, q, s]``; under binary rewards a probability."""

    @property
    def kind(self) -> RewardKind:
        """Whether the mean is that of a continuous or of a binary reward."""
        ...

    def mean(self, contexts: Contexts, outputs: Outputs) -> FloatArray:
        """Return the noiseless reward, (n,)."""
        ...


@runtime_checkable
class LinearReward(RewardModel, Protocol):
    """A reward model that reads the output through ``weights(x, q) · s``, behind a logistic link if binary."""

    def weights(self, contexts: Contexts) -> FloatArray:
        """Return what multiplies the output, (n, d_o)."""
        ...


@dataclass(frozen=True, slots=True)
class RewardNoise:
    """Observation noise: ``Normal(mean, std²)`` for a continuous, ``Bernoulli(mean)`` for a binary reward."""

    kind: RewardKind = "continuous"
    std: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(RewardKind):
            raise unknown_name("reward type", self.kind, get_args(RewardKind))
        if not (np.isfinite(self.std) and self.std >= 0):
            raise ConfigError(f"reward_std: expected a finite number ≥ 0, got {self.std}")

    def variates(self, n: int, rng: np.random.Generator) -> FloatArray:
        """Draw what :meth:`apply` turns into n rewards: standard normals, or uniforms for a binary reward; float32."""
        if self.kind == "binary":
            return rng.random(n, dtype=np.float32)
        return rng.standard_normal(n, dtype=np.float32)

    def apply(self, mean: FloatArray, variates: FloatArray) -> FloatArray:
        """Return the rewards observed around the noiseless `mean` given :meth:`variates`, elementwise, float32."""
        if self.kind == "binary":
            return (variates < mean).astype(np.float32)
        return np.asarray(mean + np.float32(self.std) * variates, dtype=np.float32)

    def draw(self, mean: FloatArray, rng: np.random.Generator) -> FloatArray:
        """Return observed rewards around the noiseless `mean` (n,), float32."""
        return self.apply(mean, self.variates(len(mean), rng))


@dataclass(frozen=True, slots=True, eq=False)
class Rounds:
    """What happened in n rounds.

    Attributes:
        contexts: who asked about what.
        actions: prompts used, (n,).
        outputs: what the model answered.
        expected_reward: ``E[r | x, q, s]``, (n,).
        reward: what was observed, (n,).
    """

    contexts: Contexts
    actions: IntArray
    outputs: Outputs
    expected_reward: FloatArray
    reward: FloatArray


# Outputs that a generator is asked for at once where rewards have no closed form.
_OUTPUTS_AT_ONCE = 1 << 14


class Simulator:
    """Composes the parts; knows the truth.

    Args:
        contexts: source of users and queries.
        outputs: the frozen generator with its prompts.
        rewards: noiseless reaction.
        reward_std: standard deviation of the observation noise of a continuous reward.

    Raises:
        ConfigError: a part lacks a method of its protocol.
        DimensionError: parts disagree about a dimension.
    """

    def __init__(
        self, contexts: ContextSource, outputs: OutputModel, rewards: RewardModel, *, reward_std: float = 1.0
    ) -> None:
        check_parts(contexts=contexts, outputs=outputs, rewards=rewards)
        self.contexts, self.outputs, self.rewards = contexts, outputs, rewards
        self.noise = RewardNoise(rewards.kind, reward_std)
        self._check_dimensions()
        if self.exact:
            self._check_closed_form()

    def _check_dimensions(self) -> None:
        """Find parts that do not fit when they are put together; an output is not drawn, since it may be costly."""
        rng = np.random.default_rng(0)
        probe = self.contexts.sample(1, rng)
        found = (probe.context.shape[1], probe.query.shape[1])
        if found != (self.contexts.context_dim, self.contexts.query_dim):
            raise DimensionError(
                f"contexts: expected dimensions {(self.contexts.context_dim, self.contexts.query_dim)} as declared, "
                f"got {found} from sample()"
            )
        if isinstance(self.outputs, GaussianOutputs):
            effects = self.outputs.effects.shape
            if effects != (self.n_prompts, self.outputs.output_dim):
                raise DimensionError(
                    f"outputs: expected effects of shape ({self.n_prompts}, {self.outputs.output_dim}), got {effects}"
                )
            self.outputs.base(probe)
        if isinstance(self.rewards, LinearReward):
            try:
                found_dim = self.rewards.weights(probe).shape[1]
            except ValueError as error:
                raise DimensionError(
                    f"rewards: cannot read contexts with d_x={found[0]} and d_q={found[1]}: {error}"
                ) from error
            if found_dim != self.outputs.output_dim:
                raise DimensionError(
                    f"rewards: expected to read outputs of dimension {self.outputs.output_dim}, but the reward model "
                    f"reads {found_dim}; build both with the same output dimension"
                )

    def _check_closed_form(self) -> None:
        """Find parts whose closed form is not what they draw: a subclass that overrides only one of the two."""
        outputs, rewards = self.outputs, self.rewards
        if not (isinstance(outputs, GaussianOutputs) and isinstance(rewards, LinearReward)):
            return
        rng = np.random.default_rng(0)
        probe = self.contexts.sample(8, rng)
        # Under the same randomness two prompts differ by their effects, whatever the noise is.
        first, last = (np.full(8, action) for action in (0, self.n_prompts - 1))
        drawn = [outputs.sample(probe, actions, np.random.default_rng(1)).embedding for actions in (first, last)]
        effect = outputs.effects[last] - outputs.effects[first]
        if not np.allclose(drawn[1] - drawn[0], effect, rtol=1e-3, atol=1e-4 * np.abs(drawn).max()):
            raise ConfigError(
                f"outputs: {type(outputs).__name__} has effects and base(), a closed form, but sample() draws "
                "something else; change both alike, or pass an object with sample() only"
            )
        value = np.einsum("nd,nd->n", rewards.weights(probe), drawn[0])
        value = logistic(value) if rewards.kind == "binary" else value
        if not np.allclose(rewards.mean(probe, Outputs(drawn[0])), value, rtol=1e-3, atol=1e-3 * np.abs(value).max()):
            raise ConfigError(
                f"rewards: {type(rewards).__name__} has weights(), a closed form, but mean() is something else; "
                "change both alike, or pass an object with mean() only"
            )

    @property
    def prompts(self) -> PromptSet:
        """The catalogue that actions index."""
        return self.outputs.prompts

    @property
    def n_prompts(self) -> int:
        """``A``."""
        return len(self.prompts)

    @property
    def reproducible(self) -> bool:
        """Whether the same seed gives the same rounds; not where sentences come from a server that ignores seeds."""
        return bool(getattr(self.outputs, "reproducible", True))

    @property
    def served_by(self) -> Mapping[str, Any]:
        """What a server says of the language model behind it; empty for one in process, or none."""
        found: Mapping[str, Any] = getattr(self.outputs, "served_by", {})
        return found

    @property
    def exact(self) -> bool:
        """Whether expected rewards of all prompts are computed without sampling outputs."""
        return isinstance(self.outputs, GaussianOutputs) and isinstance(self.rewards, LinearReward)

    def play(
        self, contexts: Contexts, actions: IntArray, output_rng: np.random.Generator, reward_rng: np.random.Generator
    ) -> Rounds:
        """Play `actions` (n,) in `contexts`: generate, react, add noise."""
        actions = check_actions(actions, self.n_prompts, len(contexts))
        draw = self.outputs.deal if isinstance(self.outputs, DealtOutputs) else self.outputs.sample
        outputs = draw(contexts, actions, output_rng)
        expected = self._mean(contexts, outputs)
        return Rounds(contexts, actions, outputs, expected, self.noise.draw(expected, reward_rng))

    def restart(self) -> None:
        """Forget what was played, where the outputs depend on it (:class:`DealtOutputs`)."""
        if isinstance(self.outputs, DealtOutputs):
            self.outputs.restart()

    def _mean(self, contexts: Contexts, outputs: Outputs) -> FloatArray:
        """Return the noiseless reward, (n,), after checking what a reward model of the caller's own gave."""
        mean = check_rewards(self.rewards.mean(contexts, outputs))
        if mean.shape != (len(contexts),):
            raise DimensionError(f"rewards: expected {len(contexts)} means, one a round, got shape {mean.shape}")
        if self.rewards.kind == "binary" and len(mean) and not (mean.min() >= 0 and mean.max() <= 1):
            row = int(np.argmax((mean < 0) | (mean > 1)))
            raise NumericalError(
                f"rewards: expected probabilities in [0, 1] for a binary reward, got {mean[row]} in row {row}; put the "
                "mean through a logistic function, or make kind 'continuous'"
            )
        return mean

    def expected_rewards(self, contexts: Contexts, *, n_samples: int = 16, seed: int = 0) -> FloatArray:
        """Return ``E[r | x, q, a]`` for all prompts, (n, A).

        Closed form where :attr:`exact`. With ``w = weights(x, q)``, ``m_a = base(q) + effects[a]`` and noise standard
        deviations ``σ``, a continuous reward has ``w · m_a``; a binary one has ``E[logistic(w · m_a + ‖w ∘ σ‖ Z)]``
        with Z standard normal, by 32-node Gauss–Hermite quadrature. Where outputs can
        be enumerated (:class:`EnumerableOutputs`) it is their mean, exact too. Otherwise the mean over `n_samples`
        outputs of each prompt, drawn with the stream ``("expected_rewards", i)`` of `seed` for sample i.
        """
        outputs, rewards = self.outputs, self.rewards
        if isinstance(outputs, GaussianOutputs) and isinstance(rewards, LinearReward):
            weights = np.asarray(rewards.weights(contexts), dtype=np.float64)
            fixed = np.einsum("nd,nd->n", weights, outputs.base(contexts))
            # The part that no prompt changes rides along as one more column: a single pass over the (n, A) result.
            effects = np.column_stack([outputs.effects, np.ones(self.n_prompts)])
            means = np.column_stack([weights, fixed]) @ effects.T
            if rewards.kind == "binary":
                spread = np.linalg.norm(weights * outputs.noise_std, axis=1)
                return _logistic_normal_mean(means, spread)
            return np.asarray(means)
        total = np.zeros((len(contexts), self.n_prompts))
        size = max(1, _OUTPUTS_AT_ONCE // self.n_prompts)
        enumerable = outputs if isinstance(outputs, EnumerableOutputs) else None
        repeats = n_samples if enumerable is None else enumerable.outcomes
        for sample in range(repeats):
            rng = stream(seed, "expected_rewards", sample)
            for start in range(0, len(contexts), size):
                rows = slice(start, min(start + size, len(contexts)))
                everyone = contexts.take(rows).repeat(self.n_prompts)
                actions = np.tile(np.arange(self.n_prompts), len(everyone) // self.n_prompts)
                if enumerable is None:
                    drawn = outputs.sample(everyone, actions, rng)
                else:
                    drawn = enumerable.outcome(everyone, actions, sample)
                total[rows] += self._mean(everyone, drawn).reshape(-1, self.n_prompts)
        return total / repeats

    def policy_value(
        self,
        policy: Policy,
        *,
        contexts: Contexts | None = None,
        n: int | None = None,
        seed: int = 0,
        confidence: float = 0.95,
    ) -> Estimate:
        """Return ``V(π) = E[r]`` under `policy`, without observation noise.

        Where :attr:`exact`, the term of a context is ``Σ_a π(a | x, q) E[r | x, q, a]``; otherwise an action and an
        output are drawn in each context and the term is ``E[r | x, q, s]``. Where outputs can be enumerated
        (:class:`EnumerableOutputs`) only the action is drawn, and the term is ``1/K Σ_k r(x, q, s_k)``. The contexts,
        the uniforms behind the actions and the randomness of the outputs depend on `seed` only, so two policies are
        compared under common random numbers: ``a.minus(b)`` of two estimates is their paired difference.

        Args:
            policy: any policy over this simulator's prompts.
            contexts: rounds to average over; by default `n` of them from the context source.
            n: number of rounds, by default 10,000 where exact and 2,000 where outputs are drawn.
            seed: names the evaluation.
            confidence: of the interval.

        Raises:
            ConfigError: not a policy.
            DimensionError: the policy is over other prompts.
        """
        check_policy(policy, self.prompts, "this simulator")
        if contexts is None:
            rounds = n if n is not None else (10_000 if self.exact else 2_000)
            contexts = self.evaluation_contexts(rounds, seed)
        if self.exact:
            terms: FloatArray = np.empty(len(contexts))
            for rows, part, pmf in pmf_by_parts(policy, contexts):
                terms[rows] = np.einsum("na,na->n", pmf, self.expected_rewards(part))
        else:
            actions = self._common_actions(policy, contexts, seed)
            outputs = self.outputs
            if isinstance(outputs, EnumerableOutputs):
                every = (outputs.outcome(contexts, actions, k) for k in range(outputs.outcomes))
                terms = np.mean([self._mean(contexts, output) for output in every], axis=0)
            else:
                drawn = outputs.sample(contexts, actions, stream(seed, "evaluation", "outputs"))
                terms = self._mean(contexts, drawn)
        return Estimate.of_mean(terms, confidence=confidence)

    def evaluation_contexts(self, n: int, seed: int = 0) -> Contexts:
        """Return the `n` rounds over which :meth:`policy_value` averages by default."""
        return self.contexts.sample(n, stream(seed, "evaluation", "contexts"))

    def oracle(self, contexts: Contexts, *, n_samples: int = 16, seed: int = 0) -> IntArray:
        """Return the prompt with the largest expected reward in each context, (n,)."""
        best = np.empty(len(contexts), dtype=np.int64)
        for rows in row_parts(len(contexts), self.n_prompts):
            best[rows] = self.expected_rewards(contexts.take(rows), n_samples=n_samples, seed=seed).argmax(axis=1)
        return best

    def _common_actions(self, policy: Policy, contexts: Contexts, seed: int) -> IntArray:
        rng = stream(seed, "evaluation", "actions")
        if hasattr(policy, "sample"):
            return sample_actions(policy, contexts, rng)[0]
        uniforms = rng.random(len(contexts))
        actions = np.empty(len(contexts), dtype=np.int64)
        for rows, _, pmf in pmf_by_parts(policy, contexts):
            actions[rows] = inverse_cdf(pmf, uniforms[rows])
        return actions


def check_parts(
    *,
    contexts: ContextSource | None = None,
    prompts: PromptSet | None = None,
    outputs: OutputModel | None = None,
    rewards: RewardModel | None = None,
) -> None:
    """Check that the parts that are given have the methods of their protocols.

    Raises:
        ConfigError: one lacks some, and the message names them; or prompts beside an output model with its own.
    """
    if prompts is not None and not isinstance(prompts, PromptSet):
        raise ConfigError(f"prompts: expected a PromptSet, got {type(prompts).__name__}; make one of embeddings")
    if prompts is not None and outputs is not None:
        raise ConfigError("prompts: an output model of your own brings its own prompts; pass outputs= alone")
    for name, part, protocol in (
        ("contexts", contexts, ContextSource),
        ("outputs", outputs, OutputModel),
        ("rewards", rewards, RewardModel),
    ):
        if part is not None:
            check_kind(name, part, protocol, "add what is missing")


def _logistic_normal_mean(location: FloatArray, scale: FloatArray, nodes: int = 32) -> FloatArray:
    """Return ``E[logistic(location + scale · Z)]``, Z standard normal; `location` (n, A), `scale` (n,)."""
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    total = np.zeros(location.shape)
    for point, weight in zip(points, weights / weights.sum(), strict=True):
        total += weight * logistic(location + (scale * point)[:, None])
    return total


def logistic(z: FloatArray) -> FloatArray:
    """Return ``1 / (1 + exp(−z))`` without overflow."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * z)))
