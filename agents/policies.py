"""Policies, each defined by its probability mass function over prompts.

Every policy here saves to a directory and loads back with the same bits, except those made of a caller's own function:
``policy.json`` says what it is, and names ``policy-<checksum>.safetensors`` beside it. Symbols: ``n`` rounds, ``A``
prompts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from safetensors.numpy import load as deserialise
from safetensors.numpy import save as serialise

from agents.networks import MLP
from offprompts_env.config import check_integer, check_number
from offprompts_env.errors import ConfigError, OffPromptsError, StorageError, unknown_name
from offprompts_env.manifest import write_atomic
from offprompts_env.sampling import check_policy
from offprompts_env.simulator import Simulator
from offprompts_env.types import Contexts, FloatArray, IntArray, Policy, PromptSet

Scores = Callable[[Contexts], FloatArray]
"""A score for every prompt, (n, A): a reward model, or any function."""

FORMAT_VERSION = 1
_DESCRIPTION = "policy.json"


@dataclass(frozen=True)
class Record:
    """What a policy or a score model is made of, ready to be written.

    Attributes:
        kind: name of its class.
        settings: JSON-able.
        tensors: arrays by name.
    """

    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, FloatArray] = field(default_factory=dict)


@runtime_checkable
class Recordable(Protocol):
    """Something that can be written to a file and read back."""

    def to_record(self) -> Record:
        """Return what it is made of."""
        ...


def softmax(logits: FloatArray) -> FloatArray:
    """Return ``exp(logits) / Σ exp(logits)`` along the last axis, without overflow."""
    shifted: FloatArray = logits - logits.max(axis=-1, keepdims=True)
    np.exp(shifted, out=shifted)
    shifted /= shifted.sum(axis=-1, keepdims=True)
    return shifted


def greedy(scores: FloatArray) -> FloatArray:
    """Return the pmf that puts everything on the first largest score of each row, (n, A)."""
    pmf = np.zeros(scores.shape, dtype=np.float32)
    pmf[np.arange(len(scores)), scores.argmax(axis=1)] = 1
    return pmf


class Saves:
    """Gives a policy its ``save``."""

    def save(self: Policy, path: str | Path) -> Path:
        """Write this policy into the directory `path`; see :func:`save_policy`."""
        return save_policy(self, path)


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

    def to_record(self) -> Record:
        """Return what it is made of."""
        return Record("NeuralPolicy", {"catalogue": self.catalogue}, self.network.tensors())

    @classmethod
    def from_record(cls, record: Record) -> NeuralPolicy:
        """Inverse of :meth:`to_record`."""
        return cls(MLP.from_tensors(record.tensors), **record.settings)


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
    # Reward models are policies' scores, and make policies: the one circle of this package is cut here.
    from agents.rewards import PromptRewards

    rest = dict(settings)
    if (kind := rest.pop("kind")) != "PromptRewards":
        raise unknown_name("score model", kind, ["PromptRewards"])
    return PromptRewards.from_record(Record(kind, rest, tensors))


_POLICIES: Mapping[str, Callable[[Record], Policy]] = {
    "UniformPolicy": UniformPolicy.from_record,
    "ConstantPolicy": ConstantPolicy.from_record,
    "SoftmaxPolicy": SoftmaxPolicy.from_record,
    "EpsilonGreedyPolicy": EpsilonGreedyPolicy.from_record,
    "NeuralPolicy": NeuralPolicy.from_record,
}


def save_policy(policy: Policy, path: str | Path) -> Path:
    """Write `policy` into the directory `path`, which is made if need be.

    Raises:
        ConfigError: the policy is made of something that cannot be written, such as a function.
        StorageError: the directory cannot be written.
    """
    if not isinstance(policy, Recordable):
        raise ConfigError(
            f"save_policy: expected one of {', '.join(sorted(_POLICIES))}, got {type(policy).__name__}, which has no "
            "to_record(); clone it with agents.BehaviorCloning to get one that saves"
        )
    record, directory = policy.to_record(), Path(path)
    content = serialise(dict(record.tensors))
    checksum = hashlib.sha256(content).hexdigest()
    weights = f"policy-{checksum[:16]}.safetensors"
    description = {
        "format_version": FORMAT_VERSION,
        "kind": record.kind,
        "settings": record.settings,
        "weights": weights,
        "sha256": checksum,
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomic(directory / weights, content)
        # The policy that was here before stays whole until this one is.
        write_atomic(directory / _DESCRIPTION, (json.dumps(description, indent=2) + "\n").encode())
        for old in directory.glob("policy-*.safetensors"):
            if old.name != weights:
                old.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"policy: cannot write to {directory}: {error}; free some space or choose another path"
        ) from error
    return directory


def load_policy(path: str | Path, prompts: PromptSet | None = None) -> Policy:
    """Read a policy that :func:`save_policy` wrote.

    Args:
        path: the directory.
        prompts: the catalogue it is to act on; checked against the one it was made for.

    Raises:
        StorageError: not such a directory, damaged, or of a newer format version.
        DimensionError: the policy is over another catalogue.
    """
    directory = Path(path)
    try:
        description = json.loads((directory / _DESCRIPTION).read_text(encoding="utf-8"))
        version = description["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"policy: expected a directory that save_policy wrote, with {_DESCRIPTION}, at {directory}, but {error!r}"
        ) from error
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise StorageError(
            f"policy: {directory} has format version {version}, this package reads up to {FORMAT_VERSION}; "
            "upgrade with: pip install -U offprompts-env"
        )
    if description.get("kind") not in _POLICIES:
        raise unknown_name("policy", description.get("kind"), _POLICIES)
    try:
        content = (directory / description["weights"]).read_bytes()
        expected, actual = description["sha256"], hashlib.sha256(content).hexdigest()
        make, record = _POLICIES[description["kind"]], Record(description["kind"], description["settings"])
        policy = make(replace(record, tensors=deserialise(content))) if actual == expected else None
    except OffPromptsError:
        raise
    except Exception as error:
        raise StorageError(
            f"policy: the files in {directory} do not fit together or are damaged: "
            f"{type(error).__name__}: {error}; save the policy again"
        ) from error
    if policy is None:
        raise StorageError(
            f"policy: {directory / description['weights']} is damaged: expected SHA-256 {expected}, got {actual}; "
            "save the policy again"
        )
    if prompts is not None:
        check_policy(policy, prompts, "the catalogue")
    return policy
