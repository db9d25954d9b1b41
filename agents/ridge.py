"""Ridge regression of the reward on polynomials of context and sentence, its penalty chosen by exact leave-one-out.

Symbols: ``n`` rounds, ``m`` sentences a round, ``d_c = d_x + d_q``, ``d_o`` the output dimension, ``p`` features.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from offprompts_env.config import check_integer
from offprompts_env.errors import ConfigError
from offprompts_env.types import FloatArray

# Below it one minus a leverage is rounding.
_LEAST = 1e-12
# Penalties tried, as multiples of the noise variance over the prior variance of a standardised coefficient.
_PENALTIES = np.geomspace(1e-2, 1e6, 33)


@dataclass(frozen=True, eq=False)
class RidgeFit:
    """Bayesian linear regression of t targets on standardised features.

    With prior ``w ~ N(0, σ²/λ I)`` and noise σ², the posterior is ``N(w̄, σ² (FᵀF + λI)⁻¹)``; λ minimises the exact
    leave-one-out error ``mean_i ((y_i − f_i·w̄) / (1 − h_ii))²``, h the leverages (Allen, 1974).

    Attributes:
        weights: w̄ (p, t), for raw features, the intercept apart.
        intercept: (t,).
        centre: mean of the raw features, which draws turn about, (p,).
        penalty: λ.
        leave_one_out: predictions of each round by the others, (n, t).
        noise: σ² of each target, the mean squared leave-one-out residual, (t,).
        spread: square root of the posterior covariance over σ², ``(FᵀF + λI)^(−1/2)`` for raw features, (p, p).
    """

    weights: FloatArray
    intercept: FloatArray
    centre: FloatArray
    penalty: float
    leave_one_out: FloatArray = field(repr=False)
    noise: FloatArray
    spread: FloatArray = field(repr=False)

    def draws(self, count: int, rng: np.random.Generator) -> FloatArray:
        """Return `count` posterior draws minus w̄, (count, p, t); each moves the intercept by ``−centre · draw``."""
        normals = rng.standard_normal((count, self.spread.shape[1], len(self.noise)))
        return np.asarray(self.spread @ (normals * np.sqrt(self.noise)))


def shift_and_scale(columns: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return mean and standard deviation of `columns` (n, p), (p,) float64 each.

    A column that varies by no more than rounding says nothing: its scale is infinite, which keeps what is divided by it
    at zero.
    """
    shift, scale = (np.asarray(part(columns, axis=0, dtype=np.float64)) for part in (np.mean, np.std))
    return shift, np.where(scale > 1e-6 * (1 + np.abs(shift)), scale, np.inf)


def fit_ridge(features: FloatArray, targets: FloatArray) -> RidgeFit:
    """Fit `targets` (n, t) on raw `features` (n, p), one penalty for all; see :class:`RidgeFit`."""
    n = len(targets)
    shift, scale = shift_and_scale(features)
    standard = (features - shift) / scale
    level = targets.mean(axis=0)
    values, vectors = np.linalg.eigh(standard.T @ standard)
    values = np.maximum(values, 0)
    rotated = standard @ vectors
    aligned = rotated.T @ (targets - level)
    squared = np.square(rotated)
    best = (np.inf, 0.0, targets)
    for penalty in _PENALTIES.tolist():
        shrunk = 1 / (values + penalty)
        left = targets - level - rotated @ (shrunk[:, None] * aligned)
        # With more features than rounds a round has nearly all the leverage on itself; its remainder still counts.
        residual = left / np.maximum(1 - 1 / n - squared @ shrunk, _LEAST)[:, None]
        error = float(np.mean(np.square(residual)))
        if error < best[0]:
            best = (error, penalty, residual)
    _, penalty, residual = best
    shrunk = 1 / (values + penalty)
    weights = (vectors @ (shrunk[:, None] * aligned)) / scale[:, None]
    return RidgeFit(
        weights=weights,
        intercept=level - shift @ weights,
        centre=shift,
        penalty=penalty,
        leave_one_out=targets - residual,
        noise=np.mean(np.square(residual), axis=0),
        spread=vectors * np.sqrt(shrunk) / scale[:, None],
    )


# Most features of a polynomial: the decomposition of their products takes time with the cube, here a minute.
MOST_FEATURES = 4096


def n_interactions(d_c: int, d_o: int, degree: int) -> int:
    """Return p, the number of features of :func:`interactions`."""
    return d_c + d_o + (d_c * d_o + d_o * (d_o + 1) // 2 if degree == 2 else 0)


def interactions(context: FloatArray, sentence: FloatArray, degree: int) -> FloatArray:
    """Return polynomial features (n, p) of `context` (n, d_c) and `sentence` (n, d_o).

    Degree 1: both. Degree 2: also every product of a sentence component with a context component or with another
    sentence component. Products of context components are left out: no prompt changes them.

    Raises:
        ConfigError: more than :data:`MOST_FEATURES`.
    """
    check_integer("degree", degree, 1, 2)
    count = n_interactions(context.shape[1], sentence.shape[1], degree)
    if count > MOST_FEATURES:
        raise ConfigError(
            f"polynomial: expected at most {MOST_FEATURES:,} features, got {count:,} of dimensions "
            f"{context.shape[1]} and {sentence.shape[1]} at degree {degree}; reduce the embeddings first, for instance "
            "with offprompts_env.text.encoder.PCAEncoder, or use degree 1 or agents.NetworkEnsemble"
        )
    columns = [context, sentence]
    if degree == 2:
        first, second = np.triu_indices(sentence.shape[1])
        columns.append((context[:, :, None] * sentence[:, None, :]).reshape(len(context), -1))
        columns.append(sentence[:, first] * sentence[:, second])
    return np.concatenate(columns, axis=1)


@dataclass(frozen=True, eq=False)
class Polynomial:
    """``b + u·c + v·s + cᵀ B s + sᵀ C s`` for context c and sentence s, R of them at once.

    Attributes:
        level: b, (R,).
        context: u, (R, d_c).
        sentence: v, (R, d_o).
        cross: B, (R, d_c, d_o); zeros at degree 1.
        square: C, (R, d_o, d_o), symmetric; zeros at degree 1.
    """

    level: FloatArray
    context: FloatArray
    sentence: FloatArray
    cross: FloatArray
    square: FloatArray

    @classmethod
    def of_weights(cls, level: FloatArray, weights: FloatArray, d_c: int, d_o: int, degree: int) -> Polynomial:
        """Return the polynomials of `level` (R,) and coefficient vectors `weights` (R, p) of :func:`interactions`."""
        count = len(weights)
        u, v, rest = weights[:, :d_c], weights[:, d_c : d_c + d_o], weights[:, d_c + d_o :]
        cross: FloatArray = np.zeros((count, d_c, d_o))
        square: FloatArray = np.zeros((count, d_o, d_o))
        if degree == 2:
            cross = rest[:, : d_c * d_o].reshape(count, d_c, d_o)
            first, second = np.triu_indices(d_o)
            square[:, first, second] = rest[:, d_c * d_o :]
            square = (square + square.transpose(0, 2, 1)) / 2
        return cls(*(part.astype(np.float32) for part in (level, u, v, cross, square)))

    def __call__(self, context: FloatArray, sentences: FloatArray, member: int) -> FloatArray:
        """Return the values (n, m) of one `member` for `context` (n, d_c) and `sentences` (n, m, d_o)."""
        fixed = context @ self.context[member] + self.level[member]
        slope = self.sentence[member] + context @ self.cross[member]
        values: FloatArray = np.einsum("nmo,no->nm", sentences, slope)
        values += fixed[:, None]
        if self.square[member].any():
            values += np.einsum("nmo,nmo->nm", sentences @ self.square[member], sentences)
        return values
