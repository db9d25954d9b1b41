"""Value estimates that weight logged rewards by the ratio of the policies' probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from agents.estimators.base import OfflineEstimator, Remarks, clipped, float64, support, weighted_estimate
from agents.estimators.look import Fitted, Look, look_at
from agents.worlds import Worlds
from offprompts_env.config import check_number
from offprompts_env.errors import ConfigError
from offprompts_env.types import Estimate, FloatArray, LoggedDataset, Policy


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What the log and a policy say of each other, columns (n,).

    Attributes:
        chosen: ``π(a_i | x_i, q_i)``.
        propensity: ``π₀(a_i | x_i, q_i)``.
        reward: ``r_i``.
        expected: ``Σ_a π(a | x_i, q_i) q̂(x_i, q_i, a)``; 0 without a reward model.
        predicted: ``q̂(x_i, q_i, a_i)``; 0 without a reward model.
    """

    chosen: FloatArray
    propensity: FloatArray
    reward: FloatArray
    expected: FloatArray
    predicted: FloatArray

    @property
    def ratio(self) -> FloatArray:
        """``π(a_i | x_i, q_i) / π₀(a_i | x_i, q_i)``."""
        return self.chosen / self.propensity


@dataclass(frozen=True)
class ActionWeighting(OfflineEstimator):
    """What estimators that weight by the ratio of the policies' probabilities share.

    A method is its configuration and what it overrides of :meth:`_weights`, :meth:`_baseline` and :meth:`_remarks`.

    Attributes:
        normalised: divide by the mean weight.
    """

    asks_logging_policy: ClassVar[bool] = True
    normalised: ClassVar[bool] = False

    def _estimate(self, policy: Policy, log: LoggedDataset, given: Worlds, seed: int) -> Estimate:
        propensity = given.logged_propensities(self._label)
        look = self._look(policy, log, seed)
        evidence = Evidence(look.chosen, propensity, float64(log.reward), look.expected, look.predicted)
        weights = self._weights(evidence)
        baseline, predicted = self._baseline(evidence, weights)
        return weighted_estimate(
            evidence.ratio,
            weights,
            evidence.reward - predicted,
            baseline,
            normalised=self.normalised,
            remedy="use KernelIS or DM, or a policy closer to the logging policy",
            doubt="the propensities are wrong, or the policy chooses prompts that the logging policy never does",
            own=self._remarks(evidence, weights),
            shown=support(look.average, log),
        )

    def _fit(self, log: LoggedDataset, seed: int) -> Fitted:
        """Return reward models, where the method has any."""
        return ()

    def _look(self, policy: Policy, log: LoggedDataset, seed: int) -> Look:
        return look_at(policy, log, self._fit(log, seed))

    def _weights(self, evidence: Evidence) -> FloatArray:
        """Return what is made of the ratios, (n,)."""
        return evidence.ratio

    def _baseline(self, evidence: Evidence, weights: FloatArray) -> tuple[FloatArray | float, FloatArray | float]:
        """Return what is added in every round, and what rewards are measured from."""
        return evidence.expected, evidence.predicted

    def _remarks(self, evidence: Evidence, weights: FloatArray) -> Remarks:
        """Return diagnostics and warnings of the method's own."""
        return {}, ()


@dataclass(frozen=True)
class IS(ActionWeighting):
    """Importance sampling: ``V̂ = mean_i w_i r_i``, ``w = min(π(a | x, q) / π₀(a | x, q), clip)``.

    Unbiased without clip where π₀ > 0 wherever π > 0 (Horvitz and Thompson, 1952).

    Attributes:
        clip: upper bound of the weight, or None.
    """

    clip: float | None = None

    def __post_init__(self) -> None:
        if self.clip is not None:
            check_number("clip", self.clip, 0, strict=True)

    def _weights(self, evidence: Evidence) -> FloatArray:
        return np.minimum(evidence.ratio, np.inf if self.clip is None else self.clip)

    def _remarks(self, evidence: Evidence, weights: FloatArray) -> Remarks:
        return clipped(evidence.ratio, weights, self.clip)


@dataclass(frozen=True)
class SNIPS(IS):
    """Self-normalised importance sampling: ``V̂ = Σ_i w_i r_i / Σ_i w_i`` (Swaminathan and Joachims, NeurIPS 2015).

    Consistent, with a bias of order 1/n; it moves with the rewards when a constant is added to them, and stays within
    their range. NaN, and a warning, where all weights are 0.

    Attributes:
        clip: upper bound of the weight, or None.
    """

    normalised: ClassVar[bool] = True


@dataclass(frozen=True)
class SubGaussianIS(ActionWeighting):
    """Importance sampling with weights ``w / (1 − λ + λ w)``, the harmonic mean of w and 1.

    Bounded by 1/λ and differentiable in π (Metelli, Russo and Restelli, NeurIPS 2021, with s = −1).

    Attributes:
        shrinkage: λ in [0, 1]; 0 is :class:`IS`, 1 ignores the policy.
    """

    shrinkage: float = 0.05

    def __post_init__(self) -> None:
        check_share("shrinkage", self.shrinkage)

    def _weights(self, evidence: Evidence) -> FloatArray:
        return sub_gaussian(evidence.ratio, self.shrinkage)


@dataclass(frozen=True)
class ExponentialSmoothing(ActionWeighting):
    """Importance sampling with weights ``π(a | x, q) / π₀(a | x, q)^α`` (Aouali et al., ICML 2023, arXiv 2305.15877).

    The power is on the propensity alone, as in the paper, not on the ratio.

    Attributes:
        exponent: α in [0, 1]; 1 is :class:`IS`. Below, values of rewards ≥ 0 are underestimated.
    """

    exponent: float = 0.7

    def __post_init__(self) -> None:
        check_share("exponent", self.exponent)

    def _weights(self, evidence: Evidence) -> FloatArray:
        return evidence.chosen / evidence.propensity**self.exponent


@dataclass(frozen=True)
class LogarithmicSmoothing(ActionWeighting):
    """Logarithmic smoothing: ``V̂ = mean_i log(1 + λ u_i) / λ``, ``u = w r`` (Sakhi et al., NeurIPS 2024).

    For rewards ≥ 0, as in the paper (arXiv 2405.14335, with costs −r), it is pessimistic: at most what :class:`IS`
    gives. It is continued as an odd function of u, which draws negative u towards 0.

    Attributes:
        smoothing: λ ≥ 0; 0 is :class:`IS`, and None is ``1 / √n``, as in the released code.
    """

    smoothing: float | None = None

    def __post_init__(self) -> None:
        if self.smoothing is not None:
            check_number("smoothing", self.smoothing, 0)

    def _weights(self, evidence: Evidence) -> FloatArray:
        utility = np.abs(evidence.ratio * evidence.reward)
        scaled = utility * (len(utility) ** -0.5 if self.smoothing is None else self.smoothing)
        # log(1 + z) / z, which is 1 at z = 0.
        return evidence.ratio * np.divide(np.log1p(scaled), scaled, out=np.ones_like(scaled), where=scaled > 0)

    def _remarks(self, evidence: Evidence, weights: FloatArray) -> Remarks:
        if evidence.reward.min() >= 0:
            return {}, ()
        return {}, (
            "some rewards are negative, and logarithmic smoothing is pessimistic for rewards ≥ 0 only; add a constant "
            "to the rewards, and subtract it from the value",
        )


@dataclass(frozen=True)
class BetaIPS(ActionWeighting):
    """Importance sampling around the best constant: ``V̂ = β + mean_i w_i (r_i − β)`` (Gupta et al., RecSys 2024).

    ``β* = E[(w² − w) r] / E[w² − w]`` has the least variance (arXiv 2405.05736). It is estimated as
    ``Σ_i (w_i² − w̄ w_i) r_i / Σ_i (w_i² − w̄ w_i)``: with the mean weight w̄ in the place of its expectation 1 the
    denominator is the variance of the weights, so that weights that happen to be small do not divide by nearly nothing.
    A constant is unbiased; one estimated from the same rounds has a bias of order 1/n.

    Attributes:
        beta: β, or None to estimate β*.
    """

    beta: float | None = None

    def __post_init__(self) -> None:
        if self.beta is not None:
            check_number("beta", self.beta)

    def _baseline(self, evidence: Evidence, weights: FloatArray) -> tuple[float, float]:
        beta = optimal_baseline(weights, evidence.reward) if self.beta is None else self.beta
        return beta, beta

    def _remarks(self, evidence: Evidence, weights: FloatArray) -> Remarks:
        return {"beta": self._baseline(evidence, weights)[0]}, ()


def optimal_baseline(weights: FloatArray, reward: FloatArray) -> float:
    """Return β*, see :class:`BetaIPS`; 0 where the weights do not vary, and any constant is as good."""
    spread = (weights - weights.mean()) * weights
    total = float(spread.sum())
    return float((spread * reward).sum()) / total if total > 1e-12 * float(weights @ weights) else 0.0


def sub_gaussian(ratio: FloatArray, shrinkage: float) -> FloatArray:
    """Return ``w / (1 − λ + λ w)``, and 1 where λ = 1."""
    return np.ones_like(ratio) if shrinkage == 1 else ratio / (1 - shrinkage + shrinkage * ratio)


def check_share(name: str, value: float) -> None:
    """Raise :class:`ConfigError` unless `value` is in [0, 1]."""
    check_number(name, value, 0)
    if value > 1:
        raise ConfigError(f"{name}: expected a number from 0 to 1, got {value!r}")
