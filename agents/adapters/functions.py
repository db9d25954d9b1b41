"""Any callable as an agent: a function that chooses, or one that gives a pmf."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from agents.adapters.base import Adapter, check_epsilon, smoothed
from offprompts_env.config import check_kind
from offprompts_env.errors import ConfigError, DataError, foreign
from offprompts_env.sampling import check_probabilities
from offprompts_env.types import Contexts, FloatArray, LoggedDataset, PromptSet

Learn = Callable[[LoggedDataset], None]


class FunctionAgent(Adapter):
    """An agent made of functions; see :meth:`choosing` and :meth:`drawing`, which make it.

    Args:
        prompts: the catalogue.
        probabilities: ``f(contexts) -> pmf (n, A)``.
        learn: ``f(log)``; None for an agent that is fixed.
    """

    def __init__(
        self, prompts: PromptSet, probabilities: Callable[[Contexts], npt.ArrayLike], learn: Learn | None = None
    ) -> None:
        super().__init__(prompts)
        for name, function in (("probabilities", probabilities), ("learn", learn)):
            if function is not None and not callable(function):
                raise ConfigError(f"{name}: expected a function, got {type(function).__name__}")
        self._probabilities, self._learn = probabilities, learn

    @classmethod
    def drawing(
        cls, prompts: PromptSet, function: Callable[[Contexts], npt.ArrayLike], *, learn: Learn | None = None
    ) -> FunctionAgent:
        """Return an agent that draws from the pmf (n, A) which `function` gives for n contexts."""
        return cls(prompts, function, learn)

    @classmethod
    def choosing(
        cls,
        prompts: PromptSet,
        function: Callable[[Contexts], npt.ArrayLike],
        *,
        epsilon: float = 0.05,
        learn: Learn | None = None,
    ) -> FunctionAgent:
        """Return an agent that plays what `function` chooses for n contexts, (n,), and with probability ε any prompt.

        Args:
            prompts: the catalogue.
            function: must choose the same for the same contexts; one with randomness of its own gives a pmf.
            epsilon: ε; see :func:`agents.adapters.base.smoothed`.
            learn: as for the class.
        """
        check_epsilon(epsilon)

        def probabilities(contexts: Contexts) -> FloatArray:
            return smoothed(function(contexts), len(prompts), epsilon, len(contexts))

        return cls(prompts, probabilities, learn)

    def probabilities(self, contexts: Contexts) -> FloatArray:
        """Return the pmf, (n, A).

        Raises:
            AgentError: the function raised.
            DataError: it gave no pmf.
            ActionError: it chose no prompt.
        """
        check_kind("contexts", contexts, Contexts, "of an observation take Contexts.of(observation)")
        with foreign(f"the agent's function raised in {len(contexts)} rounds"):
            given = self._probabilities(contexts)
        try:
            pmf = np.asarray(given, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise DataError(f"probabilities: expected numbers (n, A), got {type(given).__name__}") from error
        return check_probabilities(pmf, len(contexts), self.n_prompts)

    def learn(self, log: LoggedDataset) -> None:
        """Call the function that learns, if there is one."""
        self._check_log(log)
        if self._learn is not None:
            with foreign(f"the agent's function that learns raised on {len(log)} rounds"):
                self._learn(log)

    def save(self, path: str | Path) -> Path:
        """Raise :class:`ConfigError`: a function cannot be written safely."""
        raise ConfigError(
            "FunctionAgent.save: expected an agent of a library, got functions; save what they are made of yourself, "
            "or clone what they do with agents.BehaviorCloning and save that"
        )
