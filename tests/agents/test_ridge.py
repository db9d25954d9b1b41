"""Ridge regression against explicit refits and formulas, polynomials against their features."""

from __future__ import annotations

import numpy as np
import pytest

from agents.ridge import Polynomial, fit_ridge, interactions
from offprompts_env.errors import ConfigError
from offprompts_env.types import FloatArray

RNG = np.random.default_rng(0)
N = 25
FEATURES = RNG.normal(size=(N, 4)) * np.array([1.0, 20.0, 0.1, 3.0]) + np.array([0.0, 5.0, -7.0, 100.0])
TARGETS = np.column_stack(
    [
        FEATURES @ np.array([1.0, -0.1, 4.0, 0.0]) + RNG.normal(size=N),
        RNG.normal(size=N),
    ]
)


def refit(features: FloatArray, targets: FloatArray, penalties: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Penalised least squares with a free intercept, from the normal equations: weights (p, t) and intercept (t,)."""
    design = np.column_stack([features, np.ones(len(features))])
    solved = np.linalg.solve(design.T @ design + np.diag([*penalties, 0.0]), design.T @ targets)
    return solved[:-1], solved[-1]


def leave_one_out(penalty: float) -> FloatArray:
    """Predict each round from an explicit refit on the others, coefficients in units of the whole log's spread."""
    scaled = penalty * FEATURES.var(axis=0)
    predicted = np.empty_like(TARGETS)
    for i in range(N):
        others = np.arange(N) != i
        weights, intercept = refit(FEATURES[others], TARGETS[others], scaled)
        predicted[i] = FEATURES[i] @ weights + intercept
    return predicted


def test_leave_one_out_is_that_of_explicit_refits():
    fit = fit_ridge(FEATURES, TARGETS)
    expected = leave_one_out(fit.penalty)
    np.testing.assert_allclose(fit.leave_one_out, expected, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(fit.noise, np.mean((expected - TARGETS) ** 2, axis=0))
    weights, intercept = refit(FEATURES, TARGETS, fit.penalty * FEATURES.var(axis=0))
    np.testing.assert_allclose(fit.weights, weights, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(fit.intercept, intercept, rtol=1e-6)


def test_the_penalty_has_the_smallest_error_of_explicit_refits():
    def error(penalty: float) -> float:
        return float(np.mean((leave_one_out(penalty) - TARGETS) ** 2))

    penalty = fit_ridge(FEATURES, TARGETS).penalty
    step = 10 ** (8 / 32)
    assert 1e-2 < penalty < 1e6
    assert error(penalty) < min(error(penalty * step), error(penalty / step))
    assert error(penalty) < min(error(1e-2), error(1e6))


def test_draws_have_the_posterior_covariance():
    fit = fit_ridge(FEATURES, TARGETS)
    centred = FEATURES - FEATURES.mean(axis=0)
    precision = centred.T @ centred + fit.penalty * np.diag(FEATURES.var(axis=0))
    np.testing.assert_allclose(fit.spread @ fit.spread.T, np.linalg.inv(precision), rtol=1e-6, atol=1e-12)
    draws = fit.draws(40_000, np.random.default_rng(1))
    unit = np.sqrt(np.diag(np.linalg.inv(precision)))
    for target in range(2):
        found = np.cov(draws[..., target] / (unit * np.sqrt(fit.noise[target])), rowvar=False)
        np.testing.assert_allclose(found, np.linalg.inv(precision) / np.outer(unit, unit), atol=0.03)
        assert np.abs(draws[..., target].mean(axis=0) / unit).max() < 0.05 * np.sqrt(fit.noise[target])


@pytest.mark.parametrize("level", [0.0, 0.3, 1e4])
def test_a_constant_feature_has_no_weight_and_changes_nothing(level):
    plain = fit_ridge(FEATURES, TARGETS)
    fit = fit_ridge(np.column_stack([FEATURES, np.full(N, level)]), TARGETS)
    assert (fit.weights[-1] == 0).all()
    assert (fit.draws(3, np.random.default_rng(0))[:, -1] == 0).all()
    np.testing.assert_allclose(fit.weights[:-1], plain.weights, rtol=1e-8)
    np.testing.assert_allclose(fit.leave_one_out, plain.leave_one_out)


def test_constant_targets_are_predicted_without_noise():
    fit = fit_ridge(FEATURES, np.full((N, 1), 0.3))
    np.testing.assert_allclose(fit.leave_one_out, 0.3, rtol=1e-12)
    np.testing.assert_allclose(fit.weights, 0, atol=1e-12)
    assert fit.noise[0] < 1e-20


@pytest.mark.parametrize(("rounds", "features"), [(6, 10), (30, 100), (40, 400)])
def test_more_features_than_rounds(rounds, features):
    rng = np.random.default_rng(3)
    wide, noise = rng.normal(size=(rounds, features)), rng.normal(size=(rounds, 1))
    fit = fit_ridge(wide, noise)
    assert all(np.isfinite(part).all() for part in (fit.weights, fit.leave_one_out, fit.noise, fit.spread))
    penalties = np.full(features, fit.penalty) * wide.var(axis=0)
    for i in range(rounds):
        others = np.arange(rounds) != i
        weights, intercept = refit(wide[others], noise[others], penalties)
        np.testing.assert_allclose(fit.leave_one_out[i], wide[i] @ weights + intercept, rtol=1e-6, atol=1e-8)
    # Noise cannot be predicted, however well it is fitted.
    assert fit.noise[0] > 0.8 * noise.var()


def test_interactions_by_hand():
    context, sentence = np.array([[2.0, 3.0]]), np.array([[5.0, 7.0]])
    np.testing.assert_array_equal(interactions(context, sentence, 1), [[2, 3, 5, 7]])
    np.testing.assert_array_equal(
        interactions(context, sentence, 2), [[2, 3, 5, 7, 2 * 5, 2 * 7, 3 * 5, 3 * 7, 25, 35, 49]]
    )
    with pytest.raises(ConfigError, match="degree"):
        interactions(context, sentence, 3)


@pytest.mark.parametrize("degree", [1, 2])
def test_polynomials_are_their_features_times_weights(degree):
    n, m, d_c, d_o = 4, 3, 3, 2
    context, sentences = RNG.normal(size=(n, d_c)), RNG.normal(size=(n, m, d_o))
    features = interactions(np.repeat(context, m, axis=0), sentences.reshape(-1, d_o), degree)
    weights = RNG.normal(size=(2, features.shape[1]))
    polynomial = Polynomial.of_weights(np.full(2, 0.7), weights, d_c, d_o, degree)
    for member in range(2):
        expected = (0.7 + features @ weights[member]).reshape(n, m)
        found = polynomial(context.astype(np.float32), sentences.astype(np.float32), member)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
