"""How accurate value estimators are: what they make of independent logs of a population whose truth is known."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import agents
from agents.closed_form import expected_similarity
from agents.estimators.look import fit_rewards
from agents.sentences import KnownSentences
from benchmarks.rows import Result
from benchmarks.settings.population import Population
from offprompts_env.collecting import collect
from offprompts_env.errors import ConfigError, OffPromptsError
from offprompts_env.rng import integer_seed
from offprompts_env.sampling import row_parts
from offprompts_env.simulator import GaussianOutputs, OutputModel
from offprompts_env.types import Estimate, FloatArray, LoggedDataset, Policy

# Numbers of an (n, A, d_o) array that are held at once.
_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class SlopeIS:
    """:class:`agents.IS`, its clip chosen on the log itself by :func:`agents.slope`.

    Attributes:
        clips: candidates beside no clip.
    """

    clips: tuple[float, ...] = (2.0, 5.0, 10.0, 20.0, 50.0)

    def estimate(
        self,
        policy: Policy,
        log: LoggedDataset,
        *,
        generator: OutputModel | None = None,
        logging_policy: Policy | None = None,
        seed: int = 0,
    ) -> Estimate:
        """See :class:`agents.Estimator`."""
        candidates = [agents.IS(clip=clip) for clip in (None, *self.clips)]
        return agents.slope(candidates, policy, log, logging_policy=logging_policy, seed=seed).estimate


@dataclass(frozen=True)
class ExactDensity:
    """Density of logged sentences under the logging policy in closed form, of a Gaussian generator and kernel.

    ``π₀(s | x, q) = Σ_a π₀(a | x, q) E[K(s, s') | q, a]``, see :mod:`agents.closed_form`.
    """

    def fit_many(
        self,
        logs: Sequence[LoggedDataset],
        *,
        kernel: agents.Kernel,
        generators: Sequence[OutputModel],
        logging_policies: Sequence[Policy],
        seeds: Sequence[int] | None = None,
    ) -> list[FloatArray]:
        """Return the density at the logged sentences (n,) of each log.

        Raises:
            ConfigError: another generator or kernel.
        """
        return [
            self._fit(log, kernel, generator, policy)
            for log, generator, policy in zip(logs, generators, logging_policies, strict=True)
        ]

    def _fit(
        self, log: LoggedDataset, kernel: agents.Kernel, generator: OutputModel, logging_policy: Policy
    ) -> FloatArray:
        if not (isinstance(generator, GaussianOutputs) and isinstance(kernel, agents.GaussianKernel)):
            raise ConfigError(
                f"density: expected a Gaussian generator and kernel, got {type(generator).__name__} and {kernel!r}; "
                "use agents.MonteCarloDensity"
            )
        sentences, density = KnownSentences(generator), np.empty(len(log))
        for rows in row_parts(len(log), log.n_prompts * sentences.output_dim, _AT_ONCE):
            contexts = log.contexts.take(rows)
            similarity = expected_similarity(kernel, log.output[rows], sentences.means(contexts), sentences.noise_std)
            density[rows] = np.einsum("na,na->n", logging_policy.probabilities(contexts), similarity)
        return np.maximum(density, np.finfo(np.float32).tiny)


def draw_logs(population: Population, n: int, count: int, seed: int) -> list[LoggedDataset]:
    """Return `count` independent logs of `n` rounds each, one after the other of a single recording."""
    everything = collect(population.simulator, population.logging, n * count, seed=seed, progress=False)
    return [everything.take(slice(start, start + n)) for start in range(0, n * count, n)]


def accuracy(
    estimators: Sequence[agents.Estimator], population: Population, *, n: int, logs: int, seed: int, resamples: int
) -> list[Result]:
    """Return what each estimator makes of the same logs of `population`.

    Args:
        estimators: what is compared. Their reward models are fitted to all logs as one problem, clusters once.
        population: whose target policy is valued.
        n: rounds of a log.
        logs: how many.
        seed: of the logs, and of what estimators fit and draw: ``integer_seed(seed, "estimate", i)`` with log i.
        resamples: of the bootstrap of :class:`agents.IS`.
    """
    started = time.process_time()
    drawn = draw_logs(population, n, logs, seed)
    seeds = [integer_seed(seed, "estimate", index) for index in range(logs)]
    prepared = _Shared(estimators, population, drawn, seeds)
    shared = time.process_time() - started
    variance = float(np.concatenate([log.reward for log in drawn]).var(dtype=np.float64))
    samples = [_Sample() for _ in estimators]
    for index, log in enumerate(drawn):
        started = time.process_time()
        ready = prepared.of(index)
        shared += time.process_time() - started
        for estimator, sample in zip(ready, samples, strict=True):
            started = time.process_time()
            sample.add(estimator, population, log, seeds[index], resamples)
            sample.seconds += time.process_time() - started
    truth = population.references["target"]
    return [
        sample.result(truth, population.references, {**population.distance, "reward_variance": variance}, shared)
        for sample in samples
    ]


class _Sample:
    """What one estimator made of the logs: numbers only, since an estimate holds a term for each round."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.intervals: list[tuple[float, float]] = []
        self.bootstrapped: list[tuple[float, float]] = []
        self.sizes: list[float] = []
        self.failures, self.seconds = 0, 0.0

    def add(
        self, estimator: agents.Estimator, population: Population, log: LoggedDataset, seed: int, resamples: int
    ) -> None:
        try:
            found = estimator.estimate(
                population.target,
                log,
                generator=population.simulator.outputs,
                logging_policy=population.logging,
                seed=seed,
            )
        except OffPromptsError:
            self.failures += 1
            return
        if not np.isfinite(found.value):
            self.failures += 1
            return
        self.values.append(found.value)
        self.intervals.append(found.interval)
        self.sizes.append(found.effective_sample_size)
        if type(estimator) is agents.IS:
            self.bootstrapped.append(found.bootstrap(n_resamples=resamples, seed=seed).interval)

    def result(
        self, truth: float, references: Mapping[str, float], known: Mapping[str, float], shared: float
    ) -> Result:
        measures = summary(np.array(self.values), np.array(self.intervals).reshape(-1, 2), truth)
        measures["ess"] = _mean(np.array(self.sizes))
        measures["failures"] = float(self.failures)
        if self.bootstrapped:
            measures["bootstrap_coverage"] = _coverage(np.array(self.bootstrapped), truth)
        return Result(
            measures["mean"],
            measures["bias_se"],
            references,
            seconds=self.seconds,
            shared_seconds=shared,
            measures={**measures, **known},
        )


def summary(values: FloatArray, intervals: FloatArray, truth: float) -> dict[str, float]:
    """Return the measures of estimates `values` (R,) of `truth` with `intervals` (R, 2).

    "truth", "mean", "bias" and "variance" (unbiased) of the estimates with "bias_se", "mse" with "mse_se", "coverage"
    of the intervals, and their mean "width". NaN where there are too few estimates.
    """
    squared = np.square(values - truth)
    return {
        "truth": truth,
        "mean": _mean(values),
        "bias": _mean(values) - truth,
        "bias_se": _error(values),
        "variance": _error(values) ** 2 * len(values),
        "mse": _mean(squared),
        "mse_se": _error(squared),
        "coverage": _coverage(intervals, truth),
        "width": _mean(intervals[:, 1] - intervals[:, 0]),
    }


def _mean(values: FloatArray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _error(values: FloatArray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def _coverage(intervals: FloatArray, truth: float) -> float:
    # An interval of a NaN standard error covers nothing.
    return _mean(((intervals[:, 0] <= truth) & (truth <= intervals[:, 1])).astype(np.float64))


class _Ready:
    """Reward models that are already fitted, in the place of the regression that an estimator would fit."""

    def __init__(self, rewards: Any, folds: int | None, logs: Sequence[LoggedDataset], seeds: Sequence[int]) -> None:
        asked = _Asked()
        for log, seed in zip(logs, seeds, strict=True):
            fit_rewards(asked, log, folds, seed)
        models = rewards.fit_many(asked.logs, seeds=asked.seeds)
        self._models = dict(zip(asked.seeds, models, strict=True))

    def fit_many(self, logs: Sequence[LoggedDataset], *, seeds: Sequence[int] | None = None) -> list[Any]:
        """Return the models that were fitted with these `seeds`: each names a log, and a fold of it."""
        return [self._models[seed] for seed in seeds or ()]


class _Asked:
    """Writes down what regressions are asked for."""

    def __init__(self) -> None:
        self.logs: list[LoggedDataset] = []
        self.seeds: list[int] = []

    def fit_many(self, logs: Sequence[LoggedDataset], *, seeds: Sequence[int] | None = None) -> list[None]:
        self.logs.extend(logs)
        self.seeds.extend(seeds or ())
        return [None] * len(logs)


class _Shared:
    """Estimators with what they have in common made once: reward models and densities of a log, clusters."""

    def __init__(
        self,
        estimators: Sequence[agents.Estimator],
        population: Population,
        logs: Sequence[LoggedDataset],
        seeds: Sequence[int],
    ) -> None:
        self._population, self._logs, self._seeds = population, logs, seeds
        self._rewards: Callable[..., _Ready] = functools.cache(self._fit_rewards)
        self._clusters: Callable[..., agents.KnownClusters] = functools.cache(self._fit_clusters)
        self._density: Callable[..., agents.KnownDensity] = functools.lru_cache(maxsize=4)(self._fit_density)
        self._estimators = [self._with_models(estimator) for estimator in estimators]

    def of(self, index: int) -> list[Any]:
        """Return the estimators of one log."""
        return [
            replace(own, density=self._density(own.density, own.kernel or agents.GaussianKernel(own.tau), index))
            if isinstance(own, agents.KernelIS)
            else own
            for own in self._estimators
        ]

    def _with_models(self, estimator: Any) -> Any:
        if {"rewards", "folds"} <= set(getattr(estimator, "__dataclass_fields__", ())):
            estimator = replace(estimator, rewards=self._rewards(estimator.rewards, estimator.folds))
        if isinstance(estimator, agents.MIPS):
            estimator = replace(estimator, clusters=self._clusters(estimator.clusters))
        return estimator

    def _fit_rewards(self, rewards: Any, folds: int | None) -> _Ready:
        return _Ready(rewards, folds, self._logs, self._seeds)

    def _fit_clusters(self, clusters: agents.PromptClustering) -> agents.KnownClusters:
        # One seed for all logs: the prompts are the same, and so is what is known of them.
        generators = [self._population.simulator.outputs]
        found = clusters.fit_many(self._logs[:1], generators=generators, seeds=self._seeds[:1])
        return agents.KnownClusters(tuple(found))

    def _fit_density(self, density: agents.LoggingDensity, kernel: agents.Kernel, index: int) -> agents.KnownDensity:
        found = density.fit_many(
            [self._logs[index]],
            kernel=kernel,
            generators=[self._population.simulator.outputs],
            logging_policies=[self._population.logging],
            seeds=[self._seeds[index]],
        )
        return agents.KnownDensity(tuple(found))
