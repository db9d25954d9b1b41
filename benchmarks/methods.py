"""The learners that sweeps compare, by name, beside what is no learner but belongs into every figure."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import agents
from agents.worlds import Worlds
from offprompts_env.config import check_number
from offprompts_env.errors import ConfigError
from offprompts_env.rng import stream
from offprompts_env.types import Agent, LoggedDataset, Policy, PromptSet

T = TypeVar("T")


@dataclass(frozen=True)
class Logging:
    """The logging policy itself."""


@dataclass(frozen=True)
class Skyline:
    """What may play in the environment, which no offline learner may.

    Attributes:
        learner: with all its settings.
    """

    learner: agents.OnlinePG = field(default_factory=agents.OnlinePG)


@dataclass(frozen=True)
class Greedy(agents.OfflineLearner[agents.EpsilonGreedyPolicy]):
    """The prompt with the highest predicted reward.

    Attributes:
        rewards: the prediction.
    """

    rewards: Any = field(default_factory=agents.PromptRewardRegression)

    def _learn(self, worlds: Worlds, callbacks: Sequence[agents.Callback]) -> Sequence[agents.EpsilonGreedyPolicy]:
        models = self.rewards.fit_many(worlds.stack.logs, seeds=worlds.seeds)
        return [agents.EpsilonGreedyPolicy(model, model.n_prompts) for model in models]


@dataclass(frozen=True)
class Shuffled(agents.OfflineLearner[Policy]):
    """A learner that sees every prompt with the embedding of another, so that these say nothing of what prompts do.

    What it loses by that is what it owes to the embeddings.

    Attributes:
        learner: with all its settings.
    """

    learner: agents.Learner

    def _learn(self, worlds: Worlds, callbacks: Sequence[agents.Callback]) -> Sequence[Policy]:
        logs = [_shuffled(log, seed) for log, seed in zip(worlds.stack.logs, worlds.seeds, strict=True)]
        return self.learner.fit_many(
            logs,
            generators=worlds.generators,
            logging_policies=worlds.logging_policies,
            seeds=worlds.seeds,
            callback=callbacks[0] if callbacks else None,
        )


def _shuffled(log: LoggedDataset, seed: int) -> LoggedDataset:
    order = stream(seed, "benchmarks", "shuffled embeddings").permutation(log.n_prompts)
    return replace(log, prompts=replace(log.prompts, embeddings=log.prompts.embeddings[order]))


@dataclass(frozen=True)
class Own:
    """A user's learner, agent or policy, or on settings of estimators an estimator.

    Attributes:
        spec: ``module:function``; the function is called with the prompts (:class:`offprompts_env.PromptSet`) and a
            seed, and returns an offline learner (``fit``), an agent that learns while it acts (``act``, ``learn``), a
            policy (``probabilities``), or an estimator (``estimate``).
        source: digest of the file that the function is in, so that a changed one is another agent; what that file
            imports is not seen.
    """

    spec: str
    source: str = ""

    @classmethod
    def of(cls, spec: str) -> Own:
        """Find the function that `spec` names.

        Raises:
            ConfigError: there is none.
        """
        # A callable of no module of its own, such as a partial, counts as written where it was found.
        module = inspect.getmodule(_factory(spec)) or sys.modules[spec.partition(":")[0]]
        file = inspect.getsourcefile(module)
        source = b"" if file is None else Path(file).read_bytes()
        return cls(spec, hashlib.sha256(source).hexdigest()[:16])

    def make(self, prompts: PromptSet, seed: int) -> agents.Learner | Agent | Policy | agents.Estimator:
        """Call the function.

        Raises:
            ConfigError: it gave something else.
        """
        made = _factory(self.spec)(prompts, seed)
        if isinstance(made, Agent | Policy | agents.Estimator) or callable(getattr(made, "fit", None)):
            return made  # type: ignore[no-any-return]
        raise ConfigError(
            f"{self.spec}: expected a learner (fit), an agent (act, learn), a policy (n_prompts, probabilities) or an "
            f"estimator (estimate), got {type(made).__name__}; see agents.Learner, offprompts_env.Agent, "
            "offprompts_env.Policy, agents.Estimator"
        )


def _factory(spec: str) -> Callable[[PromptSet, int], Any]:
    name, separator, function = spec.partition(":")
    if not separator or not name or not function:
        raise ConfigError(f"--agent: expected MODULE:FUNCTION, such as mypackage.mine:make_agent, got {spec!r}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        made = getattr(importlib.import_module(name), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"--agent {spec}: {error}; expected a module that Python finds from here ({Path.cwd()}) with a function "
            f"{function}(prompts, seed)"
        ) from error
    if not callable(made):
        raise ConfigError(f"--agent {spec}: expected a function, got {type(made).__name__}")
    return made  # type: ignore[no-any-return]


Method = agents.Learner | Logging | Skyline | Own | agents.Estimator
"""What a sweep runs: on settings of learners all but an estimator, on settings of estimators these alone."""

PAPER: Mapping[str, Method] = {
    "logging": Logging(),
    "regression": agents.RegressionPG(),
    "is": agents.ImportanceSamplingPG(),
    "dr": agents.DoublyRobustPG(),
    "potec": agents.POTEC(),
    "dso": agents.DSO(),
    "greedy": Greedy(),
    "online": Skyline(),
}
"""The learners of the published figures, with the published schedules."""

BEYOND: Mapping[str, Method] = {
    "exact-dso": agents.ExactDSO(),
    "sentence-greedy": agents.SentenceGreedy(),
}
"""Learners of this project that the sweeps put beside them."""

TITLES: Mapping[str, str] = {
    "uniform": "uniform",
    "logging": "logging policy",
    "regression": "regression PG",
    "is": "IS PG",
    "dr": "DR PG",
    "potec": "POTEC",
    "dso": "DSO",
    "greedy": "greedy on regression",
    "online": "online (skyline)",
    "exact-dso": "exact DSO",
    "sentence-greedy": "SentenceGreedy",
    "sentence-pg": "SentencePG",
    "sentence-dr": "SentenceDR",
    "sentence-dr-action": "SentenceDR, prompt weights",
    "sentence-greedy+e": "SentenceGreedy, prompt seen",
    "sentence-dr+e": "SentenceDR, prompt seen",
    "oracle": "oracle",
}
"""How learners are called in figures and tables; others by their own names."""


# Settings of learners of which less effort takes a share, where they are set.
_SHARED_OUT = ("steps", "max_sentences", "budget")


@dataclass(frozen=True)
class Effort:
    """How much of the published schedules is run.

    Attributes:
        steps: share of the gradient steps of everything that is trained, and of the sentences that a generator with a
            price is asked for.
        learning_rate: factor on the step size.
    """

    steps: float = 1.0
    learning_rate: float = 1.0

    def __post_init__(self) -> None:
        check_number("steps", self.steps, 0, strict=True)
        check_number("learning_rate", self.learning_rate, 0, strict=True)

    def of(self, configuration: T) -> T:
        """Return `configuration` with this much effort in it, and in what it is made of."""
        if (self.steps, self.learning_rate) == (1.0, 1.0) or not is_dataclass(configuration):
            return configuration
        changed: dict[str, Any] = {}
        for f in fields(configuration):
            value = getattr(configuration, f.name)
            if f.name in _SHARED_OUT and f.init and value:
                changed[f.name] = max(1, round(value * self.steps))
            elif f.name == "learning_rate" and f.init:
                changed[f.name] = value * self.learning_rate
            elif f.init and is_dataclass(value) and not isinstance(value, type):
                changed[f.name] = self.of(value)
        return replace(configuration, **changed) if changed else configuration  # type: ignore[type-var]


# The order of the learners stays, their distances do not quite.
QUICK = Effort(steps=0.1, learning_rate=5.0)
"""A tenth of the steps, each five times as long."""
