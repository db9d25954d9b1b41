"""The bandwidth of a kernel on sentences, from a log and the generator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np

from agents.estimators.base import noted
from agents.estimators.sentence import SentenceDM
from agents.kernels import GaussianKernel, Kernel, NetworkDensity, draw_actions, generate
from agents.learners.base import Callback, OfflineLearner
from agents.learners.dso import DSO
from agents.policies import NeuralPolicy
from agents.rewards import FittedSentenceRewards, SentenceRewardSource
from agents.sentence_rewards import SentenceRewardSearch
from agents.training import StackedLogs
from agents.tuning.crossvalidation import held_out_estimates, one_standard_error
from agents.tuning.record import Tuning, distinct
from agents.worlds import Worlds
from offprompts_env.config import check_integer
from offprompts_env.errors import ConfigError, DataError
from offprompts_env.rng import stream
from offprompts_env.simulator import OutputModel
from offprompts_env.types import LoggedDataset, Policy

# Rounds whose sentences are compared to find the scale of distances.
_COMPARED = 2_000


def median_distance(
    log: LoggedDataset, *, generator: OutputModel, logging_policy: Policy, output_noise: float = 0.0, seed: int = 0
) -> float:
    """Return the median of ``δ = ‖s − s'‖ / d_o``, s logged, s' the generator's for the same user and item.

    The prompt of s' is drawn from the logging policy anew, and noise is added as the kernels do: this is the scale on
    which a bandwidth is wide, so wide that all sentences of a round are alike.

    Args:
        log: logged rounds, of which at most 2,000 are compared.
        generator: asked for one sentence a compared round.
        logging_policy: what recorded the log.
        output_noise: standard deviation of the noise added to each of both sentences.
        seed: of the rounds, prompts, sentences and noise.

    Raises:
        DataError: half of the sentences are the same as the logged ones, so there is no scale.
    """
    rng = stream(seed, "bandwidth", "distances")
    rows = np.sort(rng.permutation(len(log))[:_COMPARED])
    drawn = generate(generator, log.contexts, rows, draw_actions(logging_policy, log.contexts, rows, rng), rng)
    noise = math.sqrt(2) * output_noise * rng.standard_normal(drawn.shape)
    scale = float(np.median(np.linalg.norm(log.output[rows] - drawn + noise, axis=1)) / drawn.shape[1])
    if scale == 0:
        raise DataError(
            "bandwidth: expected sentences that differ from prompt to prompt, but half of those simulated are the same "
            "as the logged ones; check the generator, or pass candidates="
        )
    return scale


def bandwidths(scale: float) -> tuple[float, ...]:
    """Return the grid ``scale · 2^-k``, k = 0 … 4, to two digits: from a kernel that sees nothing to a narrow one."""
    return tuple(float(f"{scale * 0.5**k:.2g}") for k in range(5))


class TakesKernel(Protocol):
    """A learner or estimator with a kernel: a frozen dataclass with the settings `tau` and `kernel`."""

    @property
    def tau(self) -> float:
        """Bandwidth of the Gaussian kernel."""
        ...

    @property
    def kernel(self) -> Kernel | None:
        """The kernel, if not that."""
        ...


ConfigT = TypeVar("ConfigT", bound=TakesKernel)


def with_tau(config: ConfigT, tau: float) -> ConfigT:
    """Return `config` with another bandwidth, of its kernel where it has one of its own.

    Raises:
        ConfigError: its kernel has no bandwidth `tau`.
    """
    kernel: Any = config.kernel
    if kernel is None:
        return replace(config, tau=tau)  # type: ignore[type-var]
    if not hasattr(kernel, "tau"):
        raise ConfigError(f"kernel: expected one with a bandwidth tau, got {type(kernel).__name__}")
    return replace(config, kernel=replace(kernel, tau=tau))  # type: ignore[type-var]


def short(learner: DSO) -> DSO:
    """Return `learner` on a schedule that is long enough to tell bandwidths apart.

    1,500 of the 20,000 published gradient steps at four times the rate, 3,000 of the 10,000 steps of a density network
    at five times the rate; other schedules, and budgets of sentences, in proportion.
    """
    budget = learner.max_sentences
    density = learner.density
    if isinstance(density, NetworkDensity):
        steps = max(1, round(0.3 * density.steps))
        density = replace(density, steps=steps, learning_rate=5 * density.learning_rate)
    return replace(
        learner,
        steps=max(1, round(0.075 * learner.steps)),
        learning_rate=4 * learner.learning_rate,
        max_sentences=None if budget is None else max(1, round(0.075 * budget)),
        density=density,
    )


_QUICK = short(DSO())
# Its form is chosen by validation: perceptrons of a fixed schedule either follow the noise of a fold or miss the form.
_REWARDS: SentenceRewardSource = SentenceRewardSearch()


@dataclass(frozen=True)
class _Judges:
    """Gives a direct method whose reward model is fitted on the held-out rounds of a fold, once for all candidates."""

    rewards: SentenceRewardSource
    n_samples: int
    seed: int
    notes: list[str]

    def __call__(self, held_out: LoggedDataset) -> SentenceDM:
        with noted(self.notes):
            (model,) = self.rewards.fit_many([held_out], seeds=[self.seed])
        return SentenceDM(FittedSentenceRewards((model,)), self.n_samples)


def choose_tau(
    log: LoggedDataset,
    *,
    generator: OutputModel,
    logging_policy: Policy | None = None,
    learner: DSO = _QUICK,
    candidates: Sequence[float] | None = None,
    rewards: SentenceRewardSource = _REWARDS,
    folds: int = 2,
    n_samples: int = 4,
    seed: int = 0,
) -> Tuning[float]:
    """Choose the bandwidth of :class:`agents.DSO` by what is learned with it.

    For each candidate a policy is learned, on a short schedule, from all folds of the log but one; it is worth what a
    reward model of sentences that was fitted on that one fold predicts for it. Model and policy see different rounds,
    so what one owes to its luck the other does not repay. Importance sampling on the held-out rounds would be unbiased,
    but with many prompts its noise is many times what there is to tell apart.

    The grid is ``median distance · 2^-k``, k = 0 … 4; see :func:`median_distance`. The widest kernel wins whose
    policies are behind the best ones by no more than the standard error of the paired difference.

    Args:
        log: logged rounds.
        generator: asked for sentences by `learner`, and for `n_samples` a round and candidate.
        logging_policy: what recorded the log; cloned from it where not given.
        learner: all that is not to be tuned, on a schedule that is :func:`short`; its `tau` does not matter.
        candidates: bandwidths to choose from.
        rewards: the regression on sentences that judges.
        folds: parts of the log.
        n_samples: simulated sentences a round.
        seed: of everything random.

    Raises:
        ConfigError: a bandwidth ≤ 0, no candidate, or fewer than two folds.
        DataError: fewer than two rounds a fold, a log without outputs, or sentences that are all the same.
    """
    check_integer("n_samples", n_samples, 1)
    worlds = Worlds(StackedLogs([log]), (generator,), None if logging_policy is None else (logging_policy,), (seed,))
    (policy,) = worlds.logging_policies_or_clones("agents.choose_tau", learner.cloning)
    if candidates is None:
        noise = GaussianKernel().output_noise if learner.kernel is None else learner.kernel.output_noise
        scale = median_distance(log, generator=generator, logging_policy=policy, output_noise=noise, seed=seed)
        candidates = bandwidths(scale)
    if len(candidates) == 0:
        raise ConfigError("candidates: expected at least one bandwidth, got none")
    taus = tuple(sorted(candidates, reverse=True))
    notes: list[str] = []
    found = held_out_estimates(
        [with_tau(learner, tau) for tau in taus],
        log,
        _Judges(rewards, n_samples, seed, notes),
        folds=folds,
        generator=generator,
        logging_policy=policy,
        seed=seed,
    )
    index, columns = one_standard_error(found)
    return Tuning(
        method=f"{folds}-fold cross-validation of bandwidths by a reward model of sentences, one-standard-error rule",
        candidates=taus,
        names=tuple(f"tau={tau:g}" for tau in taus),
        estimates=tuple(found),
        columns=columns,
        index=index,
        rounds=len(log),
        seed=seed,
        warnings=distinct(notes, found[index].warnings),
    )


@dataclass(frozen=True)
class TunedDSO(OfflineLearner[NeuralPolicy]):
    """DSO with the bandwidth that :func:`choose_tau` finds in each log, so that nobody has to guess it.

    The search takes about as long as `learner` itself with its published schedules: :func:`short` ones, for five
    bandwidths and two folds.

    Attributes:
        learner: all settings but the bandwidth.
        candidates: bandwidths to choose from; None is the grid of :func:`choose_tau`.
        rewards: the regression on sentences that judges.
        folds: parts of the log in the search.
    """

    learner: DSO = field(default_factory=DSO)
    candidates: tuple[float, ...] | None = None
    rewards: SentenceRewardSource = _REWARDS
    folds: int = 2

    def __post_init__(self) -> None:
        check_integer("folds", self.folds, 2)
        if self.candidates is not None:
            object.__setattr__(self, "candidates", tuple(self.candidates))

    def _learn(self, worlds: Worlds, callbacks: Sequence[Callback]) -> list[NeuralPolicy]:
        logs, generators = worlds.stack.logs, worlds.require_generators("agents.TunedDSO")
        known = worlds.logging_policies_or_clones("agents.TunedDSO", self.learner.cloning)
        taus = [
            choose_tau(
                log,
                generator=generator,
                logging_policy=policy,
                learner=short(self.learner),
                candidates=self.candidates,
                rewards=self.rewards,
                folds=self.folds,
                seed=seed,
            ).chosen
            for log, generator, policy, seed in zip(logs, generators, known, worlds.seeds, strict=True)
        ]
        if callbacks and len(set(taus)) > 1:
            raise ConfigError(
                f"agents.TunedDSO: a callback sees all worlds at once, but these learn one after the other, with "
                f"bandwidths {taus}; fit the logs one by one"
            )
        learned: dict[int, NeuralPolicy] = {}
        for tau in dict.fromkeys(taus):
            own = [world for world, found in enumerate(taus) if found == tau]
            policies = with_tau(self.learner, tau).fit_many(
                [logs[world] for world in own],
                generators=[generators[world] for world in own],
                logging_policies=[known[world] for world in own],
                seeds=[worlds.seeds[world] for world in own],
                callback=next(iter(callbacks), None),
            )
            learned.update(zip(own, policies, strict=True))
        return [learned[world] for world in range(len(logs))]
