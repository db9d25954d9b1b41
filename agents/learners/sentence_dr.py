"""The sentence-level direct method made doubly robust, as far as held-out rounds say that it pays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from torch import Tensor

from agents.kernels import GaussianKernel
from agents.learners.base import Callback
from agents.learners.cloning import BehaviorCloning
from agents.learners.exact import ExactPG, KernelWeights
from agents.learners.sentence import SentenceModels
from agents.policies import NeuralPolicy, TiltedPolicy
from agents.pools import Gains
from agents.sentences import SentenceScores, WithPrompts
from agents.training import StackedLogs, world_streams
from agents.worlds import Worlds
from offprompts_env.config import check_number
from offprompts_env.errors import ConfigError, DataError, unknown_name
from offprompts_env.sampling import pmf_by_parts
from offprompts_env.types import FloatArray, IntArray, LoggedDataset

Residual = Literal["kernel", "action"]

Mix = tuple[float, float]
"""Shares (λ, μ) of the model and of weighted residuals."""

# Factor on β without residuals: nothing is left to learn.
_GREEDY = 1e3
# Rounds from which a reward model that has any use predicts.
_ENOUGH = 1_000


@dataclass(frozen=True)
class SentenceDR(ExactPG):
    """Doubly robust on sentences: the direct method, corrected by weighted residuals as far as the log says it pays.

    A policy ``softmax(λ β r̂(x, q, E[s | q, a]) + f(x, q)_a)``, f a network, climbs

        J(π) = mean_i Σ_a π(a | x_i, q_i) (λ r̂(x_i, q_i, E[s | q_i, a]) + μ w(i, a) (r_i − λ r̂(x_i, q_i, s_i)))

    with ``w(i, a) = min(K̄(s_i, a) / π₀(s_i | x_i, q_i), clip)`` (kernel importance weights) or ``min(1{a = a_i} /
    π₀(a_i), clip)`` (those of prompts, which see what a sentence's embedding hides). (λ, μ) = (1, 0) is the direct
    method, (1, 1) doubly robust (Dudík, Langford, Li, 2011: unbiased without clip if either r̂ or the weights are
    right), (0, 1) weights alone.

    Residuals cost variance and a wrong r̂ misleads, so the mix is chosen on held-out rounds: each is tried on the
    others, and the first wins whose doubly robust value there is within `tolerance` standard errors (of the paired
    difference) of the best one's. Where 1,000 rounds were not enough for r̂ to predict held-out rewards better than
    their mean does, only mixes with the smallest share of it are looked at: it is wrong, whatever noisy weights say;
    of fewer rounds that is no evidence. Then all rounds are learned from. Where no residuals are mixed in, J is
    greatest at the prompt with the best prediction, and β is so large that the policy is there from the start.

    Attributes:
        models: how r̂ and the prompts' sentences are made.
        residual: which weights.
        mixes: pairs (λ, μ) that are tried, those that are to win ties first.
        tolerance: see above; 0 takes the best.
        train_fraction: share of the rounds that the mixes are tried on; the others choose.
        sharpness: β, in units of one over the standard deviation of a round's scores over prompts.
        tau: bandwidth of the kernel.
        output_noise: see :class:`agents.GaussianKernel`.
        clip: upper bound of the weight.
        cloning: how a missing logging policy is estimated, for kernel weights.
    """

    steps: int = 2_000
    models: SentenceModels = field(default_factory=SentenceModels)
    residual: Residual = "kernel"
    mixes: tuple[Mix, ...] = ((1.0, 0.0), (1.0, 0.3), (1.0, 1.0), (0.0, 1.0))
    tolerance: float = 1.0
    train_fraction: float = 0.7
    sharpness: float = 10.0
    tau: float = 2.0
    output_noise: float = 1.0
    clip: float = 200.0
    cloning: BehaviorCloning = field(default_factory=BehaviorCloning)

    label: ClassVar[str] = "sentence DR"

    def __post_init__(self) -> None:
        super().__post_init__()
        GaussianKernel(self.tau, self.output_noise)
        if self.residual not in get_args(Residual):
            raise unknown_name("residual", self.residual, get_args(Residual))
        if not self.mixes or not all(_is_mix(mix) for mix in self.mixes):
            raise ConfigError(
                f"mixes: expected pairs of finite shares ≥ 0 of the model and of residuals, not both 0, got "
                f"{self.mixes}; ((1, 0), (1, 1)) compares the direct method with the doubly robust one"
            )
        check_number("tolerance", self.tolerance, 0)
        for name in ("clip", "sharpness", "train_fraction"):
            check_number(name, getattr(self, name), 0, strict=True)
        if self.train_fraction >= 1:
            raise ConfigError(f"train_fraction: expected a share in (0, 1), got {self.train_fraction}")

    def _learn(self, worlds: Worlds, callbacks: Sequence[Callback]) -> list[TiltedPolicy]:  # type: ignore[override]
        if self.residual == "kernel":
            policies = tuple(worlds.logging_policies_or_clones("agents.SentenceDR", self.cloning))
            worlds = replace(worlds, logging_policies=policies)
        else:
            # Looked up once, so that what is assumed of them is said once.
            known = np.split(worlds.logged_propensities("agents.SentenceDR"), np.cumsum(worlds.stack.sizes)[:-1])
            logs = [replace(log, propensity=own) for log, own in zip(worlds.stack.logs, known, strict=True)]
            worlds = replace(worlds, stack=StackedLogs(logs))
        chosen = [self.mixes[0]] * worlds.stack.worlds
        if len(self.mixes) > 1:
            names = world_streams(worlds.seeds, self.label, "split")
            parts = worlds.stack.split(names, self.train_fraction)
            if min(len(rows) for rows in parts[1]) < 2:
                raise DataError(
                    f"{self.label}: expected at least 2 held-out rounds to choose a mix by, got {len(parts[1][0])} of "
                    f"{worlds.stack.sizes[0]}; record more rounds, or give one mix"
                )
            learn, judge = (_rows_of(worlds, rows) for rows in parts)
            chosen = self._choose(learn, judge)
        return self._tilted(worlds, [chosen], callbacks)[0]

    def _choose(self, learn: Worlds, judge: Worlds) -> list[Mix]:
        tried = self._tilted(learn, [[mix] * learn.stack.worlds for mix in self.mixes], ())
        values = [self._held_out(judge, policies) for policies in tried]
        chosen = []
        for world in range(judge.stack.worlds):
            wrong = len(learn.stack.logs[world]) >= _ENOUGH and not _predicts(tried[0][world])
            most = min(model for model, _ in self.mixes) if wrong else np.inf
            own = {mix: terms[world] for mix, terms in zip(self.mixes, values, strict=True) if mix[0] <= most}
            best = max(own.values(), key=lambda terms: float(terms.mean()))
            for mix, terms in own.items():
                lost = best - terms
                if lost.mean() <= self.tolerance * lost.std(ddof=1) / np.sqrt(len(lost)):
                    chosen.append(mix)
                    break
        return chosen

    def _tilted(
        self, worlds: Worlds, mixes: Sequence[Sequence[Mix]], callbacks: Sequence[Callback]
    ) -> list[list[TiltedPolicy]]:
        """Return one policy a world for each of `mixes`, which has one pair a world."""
        scores, times, logs = self.models.fit_many(worlds), len(mixes), worlds.stack.logs
        sharp = [self._beta(own, log) for own, log in zip(scores, logs, strict=True)]
        # The mixes of a world stand side by side and draw the same rows, so that what they share is made once.
        sides = [(world, own[world]) for world in range(len(logs)) for own in mixes]
        betas = [model * sharp[world] * (1.0 if residual else _GREEDY) for world, (model, residual) in sides]
        predicted = [own.logged(log) for own, log in zip(scores, logs, strict=True)]
        scored = _kept(lambda world, rows: scores[world](logs[world].contexts.take(rows)))
        weights = _kept(self._weights(worlds, scores))

        def gains(index: int, rows: IntArray) -> FloatArray:
            world, (model, residual) = sides[index]
            matrix = np.float32(model) * scored(world, rows)
            if residual:
                left = logs[world].reward[rows] - np.float32(model) * predicted[world][rows]
                matrix += weights(world, rows) * (np.float32(residual) * left)[:, None]
            return matrix

        def prior(index: int, rows: IntArray) -> FloatArray:
            return scored(sides[index][0], rows) * np.float32(betas[index])

        stack = StackedLogs([logs[world] for world, _ in sides])
        stacked = Worlds(stack, None, None, tuple(worlds.seeds[world] for world, _ in sides))

        def wrap(policies: Sequence[NeuralPolicy]) -> list[TiltedPolicy]:
            return [
                TiltedPolicy(scores[world], beta, policy.network, policy.catalogue)
                for (world, _), beta, policy in zip(sides, betas, policies, strict=True)
            ]

        watched = [_wrapped(callback, wrap) for callback in callbacks]
        learned = wrap(self._minimise(stacked, self._exact(stacked, gains, prior), watched))
        return [learned[mix::times] for mix in range(times)]

    def _beta(self, scores: SentenceScores, log: LoggedDataset) -> float:
        probe = scores(log.contexts.take(slice(0, 100)))
        spread = float(probe.std(axis=1).mean())
        return self.sharpness / spread if spread > 0 else 0.0

    def _weights(self, worlds: Worlds, scores: Sequence[SentenceScores]) -> Gains:
        if self.residual == "kernel":
            sentences = [
                own.sentences.sentences if isinstance(own.sentences, WithPrompts) else own.sentences for own in scores
            ]
            kernel = GaussianKernel(self.tau, self.output_noise)
            return KernelWeights(worlds, kernel, sentences, worlds.logging_policies or (), self.clip)
        stack, propensity = worlds.stack, worlds.propensities("agents.SentenceDR").numpy()

        def weights(world: int, rows: IntArray) -> FloatArray:
            matrix = np.zeros((len(rows), stack.n_prompts), dtype=np.float32)
            own = propensity[int(stack.offsets[world]) + rows]
            matrix[np.arange(len(rows)), stack.logs[world].action[rows]] = np.minimum(1 / own, self.clip)
            return matrix

        return weights

    def _held_out(self, worlds: Worlds, policies: Sequence[TiltedPolicy]) -> list[FloatArray]:
        """Return the terms of the doubly robust value of each policy in its world."""
        scores = [policy.scores for policy in policies if isinstance(policy.scores, SentenceScores)]
        weights = self._weights(worlds, scores)
        found: list[FloatArray] = []
        for world, (log, policy, own) in enumerate(zip(worlds.stack.logs, policies, scores, strict=True)):
            terms: FloatArray = np.empty(len(log))
            residual = log.reward - own.logged(log)
            for rows, contexts, pmf in pmf_by_parts(policy, log.contexts):
                index = np.arange(rows.start, rows.stop)
                terms[rows] = np.einsum("na,na->n", pmf, own(contexts), dtype=np.float64)
                terms[rows] += np.einsum("na,na->n", pmf, weights(world, index), dtype=np.float64) * residual[rows]
            found.append(terms)
        return found


def _kept(make: Gains) -> Gains:
    """Return `make`, which keeps what it made last and gives it again for the same rows."""
    last: tuple[int, IntArray, FloatArray] | None = None

    def give(world: int, rows: IntArray) -> FloatArray:
        nonlocal last
        if last is None or last[0] != world or not np.array_equal(last[1], rows):
            # The old matrix is let go of first.
            last = None
            last = world, rows, make(world, rows)
        return last[2]

    return give


def _is_mix(mix: Sequence[float]) -> bool:
    return len(mix) == 2 and bool(np.isfinite(mix).all()) and min(mix) >= 0 and max(mix) > 0


def _predicts(policy: TiltedPolicy) -> bool:
    """Return whether the reward model of `policy` explains a hundredth of the variance of held-out rewards."""
    scores = policy.scores
    found = scores.rewards.validation if isinstance(scores, SentenceScores) else {"error": 0.0, "baseline": 1.0}
    return found["error"] < 0.99 * found["baseline"]


def _rows_of(worlds: Worlds, rows: Sequence[Tensor]) -> Worlds:
    logs = [log.take(own) for log, own in zip(worlds.stack.logs, worlds.stack.local(rows), strict=True)]
    return replace(worlds, stack=StackedLogs(logs))


def _wrapped(callback: Callback, wrap: Callable[[Sequence[NeuralPolicy]], list[Any]]) -> Callback:
    return Callback(callback.every, lambda step, policies: callback.on_step(step, wrap(policies)))
