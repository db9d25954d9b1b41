"""Runs on vectors: worlds of the published synthetic process, their logs, and what learners share.

Everything is named by the settings and the seed of its world, so a world's logging policy is made once for all numbers
of rounds, a log's regression once for all learners.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

import agents
from benchmarks.methods import QUICK, Effort, Logging, Method, Own, Skyline
from benchmarks.results import Result
from benchmarks.store import JSON, LOGS, REWARDS, VALUES, Kept, Store, digest, policies
from offprompts_env.collecting import collect
from offprompts_env.rng import stream
from offprompts_env.simulator import OutputModel, Simulator
from offprompts_env.synthetic import SyntheticConfig
from offprompts_env.types import Agent, Estimate, LoggedDataset, Policy

CURVE_POINTS = 10
"""Looks at a policy while it is trained."""

BATCH = 32
"""Rounds after which an agent that learns while it acts is shown what came of them."""


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

    def build(self, seed: int) -> Simulator:
        """Return the world with this seed."""
        settings = {"n_prompts": self.prompts, "reward_std": float(self.noise), **dict(self.extra), "seed": seed}
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


class _Worlds:
    """The worlds of a setting, with what is shared in the store."""

    def __init__(self, setting: VectorSetting, units: Sequence[tuple[int, int]], store: Store) -> None:
        self.setting, self.units, self.store = setting, list(units), store
        self.seeds = [world for world, _ in units]
        self.simulators = [setting.build(seed) for seed in self.seeds]
        self.generators = [setting.generator(simulator) for simulator in self.simulators]
        self.shared = np.zeros(len(units))
        """Processor seconds of what was shared, so far."""

    def _share(self, kept: Sequence[Kept[Any]]) -> list[Any]:
        self.shared += [one.seconds for one in kept]
        return [one.value for one in kept]

    def _keys(self, *parts: object) -> list[str]:
        return [digest(*parts, seed) for seed in self.seeds]

    @cached_property
    def logging(self) -> list[Policy]:
        regression = self.setting.effort.of(agents.PromptRewardRegression())

        def make(missing: list[int]) -> list[agents.SoftmaxPolicy]:
            return agents.logging_policies(
                [self.simulators[i] for i in missing], regression=regression, seeds=[self.seeds[i] for i in missing]
            )

        keys = self._keys("logging", self.setting.process, regression)
        fitted = self._share(self.store.many("logging", keys, make, policies()))
        return [self.setting.recorder(policy, seed) for policy, seed in zip(fitted, self.seeds, strict=True)]

    def skylines(self, learner: agents.OnlinePG) -> list[Kept[Policy]]:
        """What `learner` reaches by playing."""

        def make(missing: list[int]) -> Sequence[Policy]:
            return learner.fit_many([self.simulators[i] for i in missing], seeds=[self.seeds[i] for i in missing])

        return self.store.many("skyline", self._keys("skyline", self.setting.process, learner), make, policies())

    @cached_property
    def references(self) -> list[dict[str, float]]:
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
            values = {name: self._value(index, policy).value for name, policy in owned.items()}
            few = {f"{name} (curve)": self._value(index, owned[name], True).value for name in ("uniform", "oracle")}
            return values | few

        keys = self._keys("references", self.setting.process, skyline)
        return [
            kept.value for kept in self.store.many("references", keys, lambda missing: [of(i) for i in missing], JSON)
        ]

    def _value(self, index: int, policy: Policy, curve: bool = False) -> Estimate:
        n = self.setting.curve_contexts if curve else self.setting.contexts
        return self.simulators[index].policy_value(policy, n=n)

    @cached_property
    def logs(self) -> list[LoggedDataset]:
        logging = self.logging

        def make(missing: list[int]) -> list[LoggedDataset]:
            return [
                collect(self.simulators[i], logging[i], self.setting.n, seed=self.seeds[i], progress=False)
                for i in missing
            ]

        logs = self._share(self.store.many("logs", self._keys("log", self.setting), make, LOGS))
        return [self.setting.seen(log) for log in logs]

    def _regression(self, regression: agents.PromptRewardRegression) -> agents.FittedRewards:
        logs = self.logs

        def make(missing: list[int]) -> Sequence[agents.PromptRewards]:
            return regression.fit_many([logs[i] for i in missing], seeds=[self.seeds[i] for i in missing])

        keys = self._keys("rewards", self.setting, regression)
        return agents.FittedRewards(tuple(self._share(self.store.many("rewards", keys, make, REWARDS))))

    def _density(self, density: agents.LoggingDensity, kernel: agents.Kernel) -> agents.KnownDensity:
        logs, logging = self.logs, self.logging

        def make(missing: list[int]) -> Sequence[Any]:
            return density.fit_many(
                [logs[i] for i in missing],
                kernel=kernel,
                generators=[self.generators[i] for i in missing],
                logging_policies=[logging[i] for i in missing],
                seeds=[self.seeds[i] for i in missing],
            )

        keys = self._keys("density", self.setting, density, kernel)
        return agents.KnownDensity(tuple(self._share(self.store.many("density", keys, make, VALUES))))

    def _with_shared(self, learner: Any) -> Any:
        """Return `learner` with the regression and the density that other learners of this log have too."""
        names = {f.name for f in fields(learner)}
        if "rewards" in names and isinstance(learner.rewards, agents.PromptRewardRegression):
            learner = replace(learner, rewards=self._regression(learner.rewards))
        if "density" in names and isinstance(learner.density, agents.NetworkDensity | agents.MonteCarloDensity):
            kernel = agents.GaussianKernel(learner.tau) if learner.kernel is None else learner.kernel
            learner = replace(learner, density=self._density(learner.density, kernel))
        return learner

    def perform(self, method: Method) -> list[Result]:
        """Return what `method` reaches in each world."""
        if isinstance(method, Own):
            return [self._own(method, index) for index in range(len(self.units))]
        if isinstance(method, Logging):
            return [self._judged(index, policy) for index, policy in enumerate(self.logging)]
        if isinstance(method, Skyline):
            kept = self.skylines(method.learner)
            return [self._judged(index, one.value, seconds=one.seconds) for index, one in enumerate(kept)]
        return self._learn(method)

    def _learn(self, method: agents.Learner) -> list[Result]:
        logging, logs, learner = self.logging, self.logs, self._with_shared(method)
        curves: list[tuple[int, list[float]]] = []

        def look(step: int, learned: Sequence[Policy]) -> None:
            curves.append((step, [self._curve(index, policy) for index, policy in enumerate(learned)]))

        every = max(1, getattr(method, "steps", CURVE_POINTS) // CURVE_POINTS)
        started = time.process_time()
        found = learner.fit_many(
            logs,
            generators=self.generators,
            logging_policies=logging,
            seeds=self.seeds,
            callback=agents.Callback(every, look),
        )
        seconds = (time.process_time() - started) / len(found)
        return [
            self._judged(
                index,
                policy,
                curve_steps=tuple(step for step, _ in curves),
                curve=tuple(values[index] for _, values in curves),
                seconds=seconds,
            )
            for index, policy in enumerate(found)
        ]

    def _curve(self, index: int, policy: Policy) -> float:
        low, high = (self.references[index][f"{name} (curve)"] for name in ("uniform", "oracle"))
        return (self._value(index, policy, True).value - low) / (high - low)

    def _judged(self, index: int, policy: Policy | Estimate, **rest: Any) -> Result:
        value = policy if isinstance(policy, Estimate) else self._value(index, policy)
        references = {name: own for name, own in self.references[index].items() if "(curve)" not in name}
        shared = float(self.shared[index])
        return Result(value.value, value.standard_error, references, shared_seconds=shared, **rest)

    def _own(self, method: Own, index: int) -> Result:
        simulator, (world, seed) = self.simulators[index], self.units[index]
        made = method.make(simulator.prompts, seed)
        started = time.process_time()
        policy = self._made(made, index)
        seconds = time.process_time() - started
        if isinstance(policy, Policy):
            return self._judged(index, policy, seconds=seconds)
        contexts = simulator.evaluation_contexts(self.setting.contexts)
        actions, _ = policy.act(contexts, stream(world, "benchmarks", "own agent"))
        rewards = simulator.expected_rewards(contexts)[np.arange(len(contexts)), actions]
        return self._judged(index, Estimate.of_mean(rewards), seconds=seconds)

    def _made(self, made: Any, index: int) -> Any:
        """Let what a user's function made learn: a learner from the log, an agent from as many rounds of its own."""
        if callable(getattr(made, "fit", None)):
            return made.fit(
                self.logs[index],
                generator=self.generators[index],
                logging_policy=self.logging[index],
                seed=self.units[index][1],
            )
        if isinstance(made, Agent):
            collect(
                self.simulators[index], made, self.setting.n, seed=self.seeds[index], batch_size=BATCH, progress=False
            )
        return made
