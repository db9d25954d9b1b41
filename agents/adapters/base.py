"""What all adapters share: an agent of another library is its pmf at this moment, and how it learns.

An adapter is a :class:`~offprompts_env.types.Policy` and an :class:`~offprompts_env.types.Agent` at once: it acts in
``op.collect``, in an own loop, in ``python -m benchmarks --agent``, and is estimated like any other policy. What the
foreign code returns is checked here, where it enters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from offprompts_env.config import check_kind, check_number
from offprompts_env.errors import ConfigError, DimensionError
from offprompts_env.sampling import check_catalogue, sample_actions
from offprompts_env.types import Contexts, FloatArray, IntArray, LoggedDataset, PromptSet, check_actions


class Adapter(ABC):
    """An agent of another library.

    Attributes:
        prompts: the catalogue it chooses from.

    Args:
        prompts: the catalogue.

    Raises:
        ConfigError: not a catalogue.
    """

    def __init__(self, prompts: PromptSet) -> None:
        check_kind("prompts", prompts, PromptSet, "of an environment pass env.unwrapped.simulator.prompts")
        self.prompts = prompts

    @property
    def n_prompts(self) -> int:
        """``A``."""
        return len(self.prompts)

    @property
    def catalogue(self) -> str:
        """Fingerprint of the prompts."""
        return self.prompts.fingerprint

    @abstractmethod
    def probabilities(self, contexts: Contexts) -> FloatArray:
        """Return with which probability the agent draws each prompt now, (n, A).

        Raises:
            DimensionError: contexts of another dimension than the agent knows.
        """

    def act(self, contexts: Contexts, rng: np.random.Generator) -> tuple[IntArray, FloatArray]:
        """Draw prompts (n,) from the pmf of this moment; return them with their probabilities (n,)."""
        return sample_actions(self, contexts, rng)

    def learn(self, log: LoggedDataset) -> None:  # noqa: B027  (an agent that is fixed does nothing)
        """Learn from rounds that were played; a fixed agent does nothing.

        Raises:
            DimensionError: a log over another catalogue, or of other dimensions.
        """

    @abstractmethod
    def save(self, path: str | Path) -> Path:
        """Write the agent into the directory `path`, which is made if need be; the class's ``load`` reads it.

        Raises:
            StorageError: it cannot be written.
        """

    def _check_log(self, log: LoggedDataset) -> None:
        """Raise unless `log` is one over this catalogue."""
        check_kind("log", log, LoggedDataset, "read a recorded one with LoggedDataset.load(path)")
        check_catalogue("log", log.prompts.fingerprint, self.prompts)


def features(contexts: Contexts, expected: int | None = None) -> FloatArray:
    """Return ``[x, q]`` as float64, (n, d_x + d_q): what most libraries take for a context.

    Raises:
        DimensionError: not the `expected` number of columns.
    """
    joined = np.concatenate([contexts.context, contexts.query], axis=1, dtype=np.float64)
    if expected is not None and joined.shape[1] != expected:
        raise DimensionError(
            f"contexts: expected d_x + d_q = {expected}, as the agent was made for, got {joined.shape[1]}; "
            "use it in the world that it learned in"
        )
    return joined


def smoothed(actions: npt.ArrayLike, n_prompts: int, epsilon: float, n: int) -> FloatArray:
    """Return ``(1 − ε) 1{a = a_i} + ε / A``, (n, A) float64, of what a deterministic agent chose.

    Without ε a log of such an agent says nothing about any other prompt: no weight is finite, no other policy can be
    estimated.

    Args:
        actions: chosen prompts (n,).
        n_prompts: ``A``.
        epsilon: ε in [0, 1].
        n: number of rounds.

    Raises:
        ActionError: not n prompt indices.
    """
    chosen = check_actions(actions, n_prompts, n)
    pmf = np.full((n, n_prompts), epsilon / n_prompts)
    pmf[np.arange(n), chosen] += 1 - epsilon
    return pmf


def check_epsilon(epsilon: float) -> float:
    """Return ε, or raise :class:`ConfigError` unless it is in [0, 1]."""
    check_number("epsilon", epsilon, 0)
    if epsilon > 1:
        raise ConfigError(f"epsilon: expected a probability, got {epsilon}; 0.05 is usual")
    return epsilon


def check_arms(found: int, prompts: PromptSet, library: str) -> None:
    """Raise :class:`DimensionError` unless a foreign agent of `library` has an arm for each prompt."""
    if found != len(prompts):
        raise DimensionError(
            f"{library}: expected an agent with {len(prompts)} arms, one a prompt, got {found}; make it with "
            f"{len(prompts)}"
        )
