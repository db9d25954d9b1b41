"""Policies, each defined by its probability mass function over prompts.

Every policy here saves to a directory and loads back with the same bits, except those made of a caller's own function;
see :mod:`agents.records`. Symbols: ``n`` rounds, ``A`` prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agents.networks import MLP
from agents.records import Record, Recordable, kinds, load_record, recorded, revive, save_record
from offprompts_env.config import check_integer, check_number
from offprompts_env.errors import ConfigError, NumericalError
from offprompts_env.sampling import check_policy
from offprompts_env.simulator import Simulator
from offprompts_env.types import Contexts, FloatArray, IntArray, Policy, PromptSet

Scores = Callable[[Contexts], FloatArray]
"""A score for every prompt, (n, A): a reward model, or any function."""

_STEM = "policy"


def softmax(logits: FloatArray) -> FloatArray:
    """Return ``exp(logits) / Σ exp(logits)`` along the last axis, without overflow."""
    shifted: FloatArray = logits - logits.max(axis=-1, keepdims=True)
    np.exp(shifted, out=shifted)
    shifted /= shifted.sum(axis=-1, keepdims=True)
    return shifted


def greedy(scores: FloatArray) -> FloatArray:
    """Return the pmf that puts everything on the first largest score of each row, (n, A).

    Raises:
        NumericalError: a score is NaN.
    """
    pmf, rows, best = np.zeros(scores.shape, dtype=np.float32), np.arange(len(scores)), scores.argmax(axis=1)
    # To NumPy the first NaN of a row is its largest number.
    unknown = np.isnan(scores[rows, best])
    if unknown.any():
        raise NumericalError(f"scores: got NaN in row {int(np.argmax(unknown))}; check the reward model and its inputs")
    pmf[rows, best] = 1
    return pmf


class Saves:
    """Gives a policy its ``save``."""

    def save(self: Policy, path: str | Path) -> Path:
        """Write this policy into the directory `path`; see :func:`save_policy`."""
        return save_policy(self, path)


@recorded("policy")
class UniformPolicy(Saves):
    """``π(a) = 1 / A``.

    Args:
        n_prompts: ``A``.
        catalogue: fingerprint of the prompts, where they are known.
    """

    def __init__(self, n_prompts: int, catalogue: str | None = None) -> None:
        check_integer("n_prompts", n_prompts, 1)
        self.n_prompts, self.catalogue = n_prompts, catalogue

    def probabilities(self, contexts: Contexts) -> FloatArray:
        """Return 1 / A everywhere, (n, A)."""
        return np.full((len(contexts), self.n_prompts), 1 / self.n_prompts, dtype=np.float32)

    def sample(self, contexts: Contexts, rng: np.random.Generator) -> tuple[IntArray, FloatArray]:
        """Draw prompts without the matrix."""
        n = len(contexts)
        return rng.integers(self.n_prompts, size=n), np.full(n, 1 / self.n_prompts)

    def to_record(self) -> Record:
        """Return what it is made of."""
        return Record("UniformPolicy", {"n_prompts": self.n_prompts, "catalogue": self.catalogue})

    @classmethod
    def from_record(cls, record: Record) -> UniformPolicy:
        """Inverse of :meth:`to_record`."""
        return cls(**record.settings)


@recorded("policy")
class ConstantPolicy(Saves):
    """Always the same prompt.

    Args:
        action: the prompt.
        n_prompts: ``A``.
        catalogue: fingerprint of the prompts, where they are known.
    """

    def __init__(self, action: int, n_prompts: int, catalogue: str | None = None) -> None:
        check_integer("n_prompts", n_prompts, 1)
        check_integer("action", action, 0, n_prompts - 1)
        self.action, self.n_prompts, self.catalogue = action, n_prompts, catalogue

    def probabilities(self, contexts: Contexts) -> FloatArray:
        """Return 1 in the column of the prompt, (n, A)."""
        pmf = np.zeros((len(contexts), self.n_prompts), dtype=np.float32)
        pmf[:, self.action] = 1
        return pmf

    def sample(self, contexts: Contexts, rng: np.random.Generator) -> tuple[IntArray, FloatArray]:
        """Return the prompt and 1."""
        return np.full(len(contexts), self.action, dtype=np.int64), np.ones(len(contexts))

    def to_record(self) -> Record:
        """Return what it is made of."""
        settings = {"action": self.action, "n_prompts": self.n_prompts, "catalogue": self.catalogue}
        return Record("ConstantPolicy", settings)

    @classmethod
    def from_record(cls, record: Record) -> ConstantPolicy:
        """Inverse of :meth:`to_record`."""
        return cls(**record.settings)


@recorded("policy")
class SoftmaxPolicy(Saves):
    """``π(a | x, q) ∝ exp(β · score(x, q, a))``.

    Args:
        scores: a reward model or any function from contexts to scores (n, A).
        n_prompts: ``A``.
        beta: β, inverse temperature; 0 is uniform, negative prefers low scores.
        catalogue: fingerprint of the prompts, where they are known.
    """

    def __init__(self, scores: Scores, n_prompts: int, beta: float = 1.0, catalogue: str | None = None) -> None:
        check_integer("n_prompts", n_prompts, 1)
        check_number("beta", beta)
        self.scores, self.n_prompts, self.beta, self.catalogue = scores, n_prompts, beta, catalogue

    def probabilities(self, contexts: Contexts) -> FloatArray:
        """Return the pmf, (n, A)."""
        return softmax(self.beta * self.scores(contexts))

    def to_record(self) -> Record:
        """Return what it is made of."""
        return _with_scores("SoftmaxPolicy", self.scores, {"beta": self.beta}, self.n_prompts, self.catalogue)

    @classmethod
    def from_record(cls, record: Record) -> SoftmaxPolicy:
        """Inverse of :meth:`to_record`."""
        settings = dict(record.settings)
        return cls(_scores_of(settings.pop("scores"), record.tensors), **settings)


@recorded("policy")
class EpsilonGreedyPolicy(Saves):
    """The best-scored prompt with probability ``1 − ε``, else a uniform one: ``π(a) = (1 − ε) 1{a = a*} + ε / A``.

    Args:
        scores: a reward model or any function from contexts to scores (n, A); the first largest wins.
        n_prompts: ``A``.
        epsilon: ε in [0, 1]; 0 is greedy.
        catalogue: fingerprint of the prompts, where they are known.
    """

    def __init__(self, scores: Scores, n_prompts: int, epsilon: float = 0.0, catalogue: str | None = None) -> None:
        check_integer("n_prompts", n_prompts, 1)
        check_number("epsilon", epsilon, 0)
        if epsilon > 1:
            raise ConfigError(f"epsilon: expected a probability, got {epsilon}")
        self.scores, self.n_prompts, self.epsilon, self.catalogue = scores, n_prompts, epsilon, catalogue

    def probabilities(self, contexts: Contexts) -> FloatArray:
        """Return the pmf, (n, A)."""
        pmf = greedy(self.scores(contexts))
        pmf *= 1 - self.epsilon
        pmf += self.epsilon / self.n_prompts
        return pmf

    def to_record(self) -> Record:
        """Return what it is made of."""
        settings = {"epsilon": self.epsilon}
        return _with_scores("EpsilonGreedyPolicy", self.scores, settings, self.n_prompts, self.catalogue)

    @classmethod
    def from_record(cls, record: Record) -> EpsilonGreedyPolicy:
        """Inverse of :meth:`to_record`."""
        settings = dict(record.settings)
        return cls(_scores_of(settings.pop("scores"), record.tensors), **settings)


@recorded("policy")
@dataclass(frozen=True, eq=False)
class NeuralPolicy(Saves):
    """Softmax over the outputs of a perceptron on ``[x, q]``.

    Attributes:
        network: (d_x + d_q) → hidden → A.
        catalogue: fingerprint of the prompts, where they are known.
    """

    network: MLP
    catalogue: str | None = None

    @property
    def n_prompts(self) -> int:
        """``A``."""
        return self.network.sizes[-1]

    def logits(self, contexts: Contexts) -> FloatArray:
        """Return unnormalised log-probabilities, (n, A)."""
        return self.network(np.concatenate([contexts.context, contexts.query], axis=1))

    def probabilities(self, contexts: Contexts) -> FloatArray:
        """Return the pmf, (n, A)."""
        return softmax(self.logits(contexts))

    def tempered(self, beta: float) -> NeuralPolicy:
        """Return ``π_β(a | x, q) ∝ π(a | x, q)^β``; β = 0 is uniform, 1 this policy, larger ones are greedier.

        Raises:
            ConfigError: `beta` is no number ≥ 0, or too large for these weights.
        """
        check_number("beta", beta, 0)
        *hidden, last = self.network.layers
        with np.errstate(over="ignore"):
            scaled = (last * beta).astype(np.float32)
        if not np.isfinite(scaled).all():
            raise ConfigError(
                f"beta: expected weights that stay below 3e38, got {beta!r}; take the greedy policy for ∞"
            )
        return NeuralPolicy(MLP((*hidden, scaled)), self.catalogue)

    def to_record(self) -> Record:
        """Return what it is made of."""
        return Record("NeuralPolicy", {"catalogue": self.catalogue}, self.network.tensors())

    @classmethod
    def from_record(cls, record: Record) -> NeuralPolicy:
        """Inverse of :meth:`to_record`."""
        return cls(MLP.from_tensors(record.tensors), **record.settings)


@recorded("policy")
@dataclass(frozen=True, eq=False)
class TiltedPolicy(Saves):
    """``π(a | x, q) ∝ exp(β · score(x, q, a) + f(x, q)_a)``: a scored policy, tilted by a network.

    Attributes:
        scores: a reward model or any function from contexts to scores (n, A).
        beta: β, inverse temperature of the scores.
        network: f, (d_x + d_q) → hidden → A.
        catalogue: fingerprint of the prompts, where they are known.
    """

    scores: Scores
    beta: float
    network: MLP
    catalogue: str | None = None

    @property
    def n_prompts(self) -> int:
        """``A``."""
        return self.network.sizes[-1]

    def probabilities(self, contexts: Contexts) -> FloatArray:
        """Return the pmf, (n, A)."""
        tilt = self.network(np.concatenate([contexts.context, contexts.query], axis=1))
        tilt += np.float32(self.beta) * self.scores(contexts)
        return softmax(tilt)

    def to_record(self) -> Record:
        """Return what it is made of."""
        scored = _with_scores("TiltedPolicy", self.scores, {"beta": self.beta}, self.n_prompts, self.catalogue)
        return Record(scored.kind, scored.settings, {**scored.tensors, **self.network.tensors("tilt.")})

    @classmethod
    def from_record(cls, record: Record) -> TiltedPolicy:
        """Inverse of :meth:`to_record`."""
        scores = _scores_of(record.settings["scores"], record.tensors)
        network = MLP.from_tensors(record.tensors, "tilt.")
        return cls(scores, record.settings["beta"], network, record.settings["catalogue"])


class OraclePolicy:
    """The prompt with the largest expected reward: the best there is, for comparison; it reads the truth.

    Args:
        simulator: whose truth.
        n_samples: outputs a prompt where the truth is sampled; see :meth:`Simulator.expected_rewards`. A maximum over
            noisy means looks better than it is, so evaluate with another seed.
        seed: of those samples.
    """

    def __init__(self, simulator: Simulator, *, n_samples: int = 16, seed: int = 0) -> None:
        self._simulator, self._n_samples, self._seed = simulator, n_samples, seed
        self.n_prompts, self.catalogue = simulator.n_prompts, simulator.prompts.fingerprint

    def probabilities(self, contexts: Contexts) -> FloatArray:
        """Return 1 in the column of the best prompt, (n, A)."""
        return greedy(self._simulator.expected_rewards(contexts, n_samples=self._n_samples, seed=self._seed))


def _with_scores(
    kind: str, scores: Scores, settings: Mapping[str, Any], n_prompts: int, catalogue: str | None
) -> Record:
    if not isinstance(scores, Recordable):
        raise ConfigError(
            f"{kind}.save: expected scores of a reward model of this package, got {type(scores).__name__}; "
            "save what your function is made of yourself, or clone the policy with agents.BehaviorCloning"
        )
    inner = scores.to_record()
    own = {**settings, "n_prompts": n_prompts, "catalogue": catalogue}
    return Record(kind, {**own, "scores": {"kind": inner.kind, **inner.settings}}, inner.tensors)


def _scores_of(settings: Mapping[str, Any], tensors: Mapping[str, FloatArray]) -> Scores:
    rest = dict(settings)
    scores: Scores = revive(Record(rest.pop("kind"), rest, tensors), "reward model")
    return scores


def save_policy(policy: Policy, path: str | Path) -> Path:
    """Write `policy` into the directory `path`, which is made if need be.

    Raises:
        ConfigError: the policy is made of something that cannot be written, such as a function.
        StorageError: the directory cannot be written.
    """
    if not isinstance(policy, Recordable):
        raise ConfigError(
            f"save_policy: expected one of {', '.join(kinds('policy'))}, got {type(policy).__name__}, which has no "
            "to_record(); clone it with agents.BehaviorCloning to get one that saves"
        )
    return save_record(policy.to_record(), path, what="policy", stem=_STEM)


def load_policy(path: str | Path, prompts: PromptSet | None = None) -> Policy:
    """Read a policy that :func:`save_policy` wrote.

    Args:
        path: the directory.
        prompts: the catalogue it is to act on; checked against the one it was made for.

    Raises:
        StorageError: not such a directory, damaged, or of a newer format version.
        DimensionError: the policy is over another catalogue.
    """
    policy: Policy = load_record(path, what="policy", stem=_STEM)
    if prompts is not None:
        check_policy(policy, prompts, "the catalogue")
    return policy
