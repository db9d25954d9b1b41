"""What an offline learner or estimator is given, checked once: logs, generators, logging policies, seeds.

Symbols: ``W`` worlds.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from agents.streaming import Window
from agents.training import AssumptionWarning, StackedLogs, check_one_each
from offprompts_env.config import check_kind
from offprompts_env.errors import ConfigError, DimensionError, PropensityError
from offprompts_env.sampling import check_catalogue, check_policy, chosen_probabilities
from offprompts_env.simulator import OutputModel
from offprompts_env.streaming import LogStream
from offprompts_env.types import FloatArray, LoggedDataset, Policy

if TYPE_CHECKING:
    from agents.learners.base import Learner


@dataclass(frozen=True, eq=False)
class Worlds:
    """What an offline learner or estimator is given, for W worlds.

    Attributes:
        stack: the logs.
        generators: one a log, where given.
        logging_policies: one a log, where given.
        seeds: one a log.
        streamed: the log of which the one in `stack` is a window, where it is one.
    """

    stack: StackedLogs
    generators: tuple[OutputModel, ...] | None
    logging_policies: tuple[Policy, ...] | None
    seeds: tuple[int, ...]
    streamed: StreamedWorld | None = None

    def __post_init__(self) -> None:
        logs = self.stack.logs
        check_one_a_log(logs, self.generators, self.logging_policies)
        for log, policy in zip(logs, self.logging_policies or (), strict=bool(self.logging_policies)):
            check_policy(policy, log.prompts, "the log")
        for generator in self.generators or ():
            check_kind("generator", generator, OutputModel, "of a simulator pass simulator.outputs")
        if self.generators:
            self.stack.require_outputs("a method with a generator")
        for log, generator in zip(logs, self.generators or (), strict=bool(self.generators)):
            check_catalogue("generator", generator.prompts.fingerprint, log.prompts)
            if generator.output_dim != log.output.shape[1]:
                raise DimensionError(
                    f"generator: expected outputs of dimension {log.output.shape[1]} as in the log, "
                    f"got {generator.output_dim}; use the generator and encoder that the log was recorded with"
                )

    def require_generators(self, label: str) -> tuple[OutputModel, ...]:
        """Return the generators, or raise :class:`ConfigError` if there are none."""
        if self.generators is None:
            raise ConfigError(
                f"{label} asks the frozen generator for sentences of prompts that were not logged: pass generator=, "
                "for instance env.unwrapped.simulator.outputs"
            )
        return self.generators

    def propensities(self, label: str) -> Tensor:
        """Return :meth:`logged_propensities` for training, (Σn,) float32; none rounds to 0."""
        found = np.maximum(self.logged_propensities(label), np.finfo(np.float32).tiny)
        return torch.from_numpy(found.astype(np.float32))

    def logged_propensities(self, label: str) -> FloatArray:
        """Return π₀ of the logged prompts, (Σn,) float64: as recorded, or of the logging policy where a log has none.

        The second is an assumption, so it is stated in an :class:`agents.AssumptionWarning`.

        Raises:
            PropensityError: unknown, and no logging policy; or the logging policy never chooses a logged prompt.
        """
        columns, unknown = [], []
        for log, policy in zip(self.stack.logs, self.logging_policies or [None] * self.stack.worlds, strict=True):
            missing = int(np.isnan(log.propensity).sum())
            if policy is not None and missing:
                columns.append(estimated_propensities(policy, log))
                unknown.append(f"{missing} of {len(log)}")
            else:
                columns.append(log.require_propensities(label))
        if unknown:
            assume(
                f"{label}: propensities are unknown in {', '.join(unknown)} rounds; those of logging_policy= were "
                "taken for all rounds, as if it had recorded the log. Where it did not, results are biased"
            )
        return np.concatenate(columns)

    def logging_policies_or_clones(self, label: str, cloning: Learner) -> Sequence[Policy]:
        """Return the logging policies, or clones of them by `cloning`, as an :class:`agents.AssumptionWarning` says."""
        if self.logging_policies is not None:
            return self.logging_policies
        clones = self.streamed.clones(cloning) if self.streamed else cloning.fit_many(self.stack.logs, seeds=self.seeds)
        assume_cloned(label, cloning)
        return clones


def check_one_a_log(
    logs: Sequence[object], generators: Sequence[OutputModel] | None, logging_policies: Sequence[Policy] | None
) -> None:
    """Raise :class:`ConfigError` unless generators and logging policies are None or one a log."""
    for name, parts in (("generators", generators), ("logging_policies", logging_policies)):
        check_one_each(name, parts, logs)


@dataclass(frozen=True, eq=False)
class StreamedWorld:
    """What an offline learner is given with a log that is larger than memory.

    Attributes:
        log: on disk.
        generator: where given.
        logging_policy: where given.
        seed: names the run.
    """

    log: LogStream
    generator: OutputModel | None
    logging_policy: Policy | None
    seed: int
    _clones: list[Policy] = field(default_factory=list)

    def window(self, window: Window) -> Worlds:
        """Return what the learner is given with a window."""
        return Worlds(
            StackedLogs([window.log]),
            None if self.generator is None else (self.generator,),
            None if self.logging_policy is None else (self.logging_policy,),
            (window.seed,),
            self,
        )

    def clones(self, cloning: Learner) -> list[Policy]:
        """Return the logging policy as `cloning` finds it in the whole log, once for all windows."""
        if not self._clones:
            self._clones.extend(cloning.fit_many([self.log], seeds=[self.seed]))
        return self._clones


def assume(message: str) -> None:
    """Warn of an assumption, seen from where :meth:`OfflineLearner.fit` was called as far as warnings can tell."""
    warnings.warn(message, AssumptionWarning, stacklevel=3)


def assume_cloned(label: str, cloning: Learner) -> None:
    """Warn that `cloning` stands in for a logging policy."""
    assume(
        f"{label}: no logging policy was given; one was cloned from the log with {type(cloning).__name__} and "
        "taken for the true one. Pass logging_policy= if it is known"
    )


def estimated_propensities(logging_policy: Policy, log: LoggedDataset) -> FloatArray:
    """Return π₀ of the logged prompts under a `logging_policy` that is said to have recorded them, (n,).

    Raises:
        PropensityError: it gives a logged prompt probability 0.
    """
    found = chosen_probabilities(logging_policy, log.contexts, log.action)
    if not (found > 0).all():
        row = int(np.argmin(found > 0))
        raise PropensityError(
            f"logging_policy: gives the logged prompt {log.action[row]} of row {row} probability {found[row]}, so it "
            "did not record this log; pass the policy that did, or clone one with agents.BehaviorCloning"
        )
    return found
