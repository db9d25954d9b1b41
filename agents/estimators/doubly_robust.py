"""Value estimates that weight what a reward model leaves unexplained: wrong only where model and weights both are.

    V̂ = mean_i [ Σ_a π(a | x_i, q_i) q̂(x_i, q_i, a) + w̃_i (r_i − q̂(x_i, q_i, a_i)) ]

The methods differ in the weight w̃ that they make of ``w = π(a | x, q) / π₀(a | x, q)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from agents.estimators.base import Remarks
from agents.estimators.direct import ModelBased
from agents.estimators.look import Fitted, Look, fit_rewards, look_at
from agents.estimators.weighting import ActionWeighting, Evidence, check_share, sub_gaussian
from offprompts_env.config import check_number
from offprompts_env.types import FloatArray, LoggedDataset, Policy


@dataclass(frozen=True)
class DR(ModelBased, ActionWeighting):
    """Doubly robust: ``w̃ = w`` (Dudík, Langford and Li, ICML 2011).

    Unbiased where π₀ > 0 wherever π > 0, whatever the model, if it is fitted on other rounds: cross-fitting is the
    default. The settings are `rewards`, `n_draws` and `folds`, those of :class:`agents.DM`.
    """

    def _fit(self, log: LoggedDataset, seed: int) -> Fitted:
        return fit_rewards(self.rewards, log, self.folds, seed)

    def _look(self, policy: Policy, log: LoggedDataset, seed: int) -> Look:
        return look_at(policy, log, self._fit(log, seed), n_draws=self.n_draws, seed=seed)


@dataclass(frozen=True)
class SNDR(DR):
    """Self-normalised doubly robust: ``w̃ = w / mean(w)``; consistent, and NaN where all weights are 0."""

    normalised: ClassVar[bool] = True


@dataclass(frozen=True)
class SwitchDR(DR):
    """Switch to the model alone where weights are large: ``w̃ = w 1{w ≤ τ}`` (Wang, Agarwal and Dudík, ICML 2017).

    Attributes:
        tau: τ ≥ 0; 0 is :class:`agents.DM`, infinity :class:`DR`.
    """

    tau: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_level("tau", self.tau)

    def _weights(self, evidence: Evidence) -> FloatArray:
        return np.where(evidence.ratio <= self.tau, evidence.ratio, 0.0)

    def _remarks(self, evidence: Evidence, weights: FloatArray) -> Remarks:
        return {"switched": float((evidence.ratio > self.tau).sum())}, ()


@dataclass(frozen=True)
class DRos(DR):
    """Doubly robust with optimistic shrinkage: ``w̃ = λ w / (w² + λ)`` (Su et al., ICML 2020).

    Attributes:
        shrinkage: λ ≥ 0; 0 is :class:`agents.DM`, infinity :class:`DR`. No weight is above ``√λ / 2``.
    """

    shrinkage: float = 100.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_level("shrinkage", self.shrinkage)

    def _weights(self, evidence: Evidence) -> FloatArray:
        ratio = evidence.ratio
        if self.shrinkage == 0:
            return np.zeros_like(ratio)
        return ratio / (ratio**2 / self.shrinkage + 1)


@dataclass(frozen=True)
class SubGaussianDR(DR):
    """Doubly robust with weights ``w / (1 − λ + λ w)``; see :class:`agents.SubGaussianIS`.

    Attributes:
        shrinkage: λ in [0, 1]; 0 is :class:`DR`.
    """

    shrinkage: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("shrinkage", self.shrinkage)

    def _weights(self, evidence: Evidence) -> FloatArray:
        return sub_gaussian(evidence.ratio, self.shrinkage)


def _check_level(name: str, value: float) -> None:
    """Check a setting that may also be infinite."""
    if value != float("inf"):
        check_number(name, value, 0)
