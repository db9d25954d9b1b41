"""Runs on vectors: worlds of the published synthetic process, their logs, and what learners share.

Everything is named by the settings and the seed of its world, so a world's logging policy is made once for all numbers
of rounds, a log's regression once for all learners.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

import agents
from benchmarks.methods import QUICK, Effort, Method
from benchmarks.rows import Result
from benchmarks.settings.worlds import BenchWorlds
from benchmarks.store import JSON, LOGS, Kept, Store, digest, policies
from offprompts_env.collecting import collect
from offprompts_env.simulator import OutputModel, Simulator
from offprompts_env.synthetic import SyntheticConfig
from offprompts_env.types import Contexts, Estimate, IntArray, LoggedDataset, Policy


@dataclass(frozen=True)
class VectorSetting:
    """A synthetic process of the preset ``paper_code``, and how many rounds of it are logged.

    Attributes:
        n: logged rounds.
        prompts: number of prompts.
        noise: standard deviation of the reward's noise.
        extra: further settings of :class:`offprompts_env.synthetic.SyntheticConfig`, (name, value).
        effort: share of the published schedules.
        contexts: rounds over which policies are valued.
        curve_contexts: rounds over which they are valued while they are trained.
    """

    n: int = 8000
    prompts: int = 1000
    noise: float = 1.0
    extra: tuple[tuple[str, Any], ...] = ()
    effort: Effort = field(default_factory=Effort)
    contexts: int = 10_000
    curve_contexts: int = 1_000

    def __post_init__(self) -> None:
        # Equal settings have equal keys, which 1 and 1.0 would not give.
        object.__setattr__(self, "noise", float(self.noise))

    def build(self, seed: int) -> Simulator:
        """Return the world with this seed."""
        settings = {"n_prompts": self.prompts, "reward_std": self.noise, **dict(self.extra), "seed": seed}
        return SyntheticConfig.preset("paper_code", **settings).build()

    @property
    def process(self) -> VectorSetting:
        """The setting without what changes neither worlds nor the policies that record."""
        return replace(self, n=0)

    def recorder(self, policy: Policy, seed: int) -> Policy:
        """Return the policy that records the log of a world, given the fitted one."""
        return policy

    def generator(self, simulator: Simulator) -> OutputModel:
        """Return the generator as learners see it."""
        return simulator.outputs

    def seen(self, log: LoggedDataset) -> LoggedDataset:
        """Return a log as learners see it."""
        return log

    def score(self, result: Result) -> float:
        """Return the optimality ``(V(π) − V(uniform)) / (V(oracle) − V(uniform))``."""
        low, high = result.references["uniform"], result.references["oracle"]
        return (result.value - low) / (high - low)

    def quick(self) -> VectorSetting:
        """Return the setting with a tenth of the steps."""
        return replace(self, effort=QUICK)

    def perform(self, method: Method, units: Sequence[tuple[int, int]], store: Store) -> list[Result]:
        """Run `method` in the worlds of `units`, (seed of the world, seed of learning) each, as one problem."""
        return _Worlds(self, units, store).perform(self.effort.of(method))


def logging_policies(setting: VectorSetting, seeds: Sequence[int], store: Store) -> list[Policy]:
    """Return what records the logs of the worlds `seeds`: the very policies of the sweeps over learners."""
    return _Worlds(setting, [(seed, 0) for seed in seeds], store).logging


class _Worlds(BenchWorlds):
    """The worlds of a setting, with what is shared in the store."""

    def __init__(self, setting: VectorSetting, units: Sequence[tuple[int, int]], store: Store) -> None:
        self.setting = setting
        seeds = [world for world, _ in units]
        simulators = [setting.build(seed) for seed in seeds]
        generators = [setting.generator(simulator) for simulator in simulators]
        super().__init__(units, store, simulators, generators, seeds, setting.n)

    def keys(self, stage: str, *parts: object) -> list[str]:
        """See :class:`BenchWorlds`."""
        return self._keys(stage, self.setting, *parts)

    def _keys(self, *parts: object) -> list[str]:
        return [digest(*parts, seed) for seed in self.seeds]

    @cached_property
    def logging(self) -> list[Policy]:
        """See :class:`BenchWorlds`."""
        regression = self.setting.effort.of(agents.PromptRewardRegression())

        def make(missing: list[int]) -> list[agents.SoftmaxPolicy]:
            return agents.logging_policies(
                [self.simulators[i] for i in missing], regression=regression, seeds=[self.seeds[i] for i in missing]
            )

        keys = self._keys("logging", self.setting.process, regression)
        fitted = self.share(self.store.many("logging", keys, make, policies()))
        return [self.setting.recorder(policy, seed) for policy, seed in zip(fitted, self.seeds, strict=True)]

    def skylines(self, learner: agents.OnlinePG) -> list[Kept[Policy]]:
        """See :class:`BenchWorlds`."""

        def make(missing: list[int]) -> Sequence[Policy]:
            return learner.fit_many([self.simulators[i] for i in missing], seeds=[self.seeds[i] for i in missing])

        return self.store.many("skyline", self._keys("skyline", self.setting.process, learner), make, policies())

    @cached_property
    def references(self) -> list[Mapping[str, float]]:
        """See :class:`BenchWorlds`."""
        return [{name: own for name, own in held.items() if "(curve)" not in name} for held in self._owned]

    @cached_property
    def _owned(self) -> list[dict[str, float]]:
        """Values of the policies that the environment owns, over all evaluation rounds and over those of the curve."""
        skyline = self.setting.effort.of(agents.OnlinePG())
        logging, online = self.logging, [kept.value for kept in self.skylines(skyline)]

        def of(index: int) -> dict[str, float]:
            simulator = self.simulators[index]
            owned: dict[str, Policy] = {
                "uniform": agents.UniformPolicy(simulator.n_prompts),
                "logging": logging[index],
                "oracle": agents.OraclePolicy(simulator),
                "online": online[index],
            }
            values = {name: self.value(index, policy).value for name, policy in owned.items()}
            few = {f"{name} (curve)": self._quickly(index, owned[name]) for name in ("uniform", "oracle")}
            return values | few

        keys = self._keys("references", self.setting.process, skyline)
        return [
            kept.value for kept in self.store.many("references", keys, lambda missing: [of(i) for i in missing], JSON)
        ]

    def value(self, index: int, policy: Policy) -> Estimate:
        """See :class:`BenchWorlds`."""
        return self.simulators[index].policy_value(policy, n=self.setting.contexts)

    def _quickly(self, index: int, policy: Policy) -> float:
        return self.simulators[index].policy_value(policy, n=self.setting.curve_contexts).value

    def glance(self, index: int, policy: Policy) -> float:
        """See :class:`BenchWorlds`."""
        low, high = (self._owned[index][f"{name} (curve)"] for name in ("uniform", "oracle"))
        return (self._quickly(index, policy) - low) / (high - low)

    def evaluation(self, index: int) -> Contexts:
        """See :class:`BenchWorlds`."""
        return self.simulators[index].evaluation_contexts(self.setting.contexts)

    def of_actions(self, index: int, actions: IntArray) -> Estimate:
        """See :class:`BenchWorlds`."""
        rewards = self.simulators[index].expected_rewards(self.evaluation(index))
        return Estimate.of_mean(rewards[np.arange(len(actions)), actions])

    @cached_property
    def logs(self) -> list[LoggedDataset]:
        """See :class:`BenchWorlds`."""
        logging = self.logging

        def make(missing: list[int]) -> list[LoggedDataset]:
            return [
                collect(self.simulators[i], logging[i], self.setting.n, seed=self.seeds[i], progress=False)
                for i in missing
            ]

        logs = self.share(self.store.many("logs", self.keys("log"), make, LOGS))
        return [self.setting.seen(log) for log in logs]
