from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

import agents
import offprompts_env as op
from agents.tuning.bandwidth import with_tau
from agents.tuning.crossvalidation import split
from agents.tuning.record import names_of
from agents.tuning.slope import agreement, overlap
from offprompts_env.errors import ConfigError, DataError, DimensionError
from offprompts_env.rng import stream
from offprompts_env.types import Estimate, LoggedDataset

UNIFORM = agents.UniformPolicy(12)
CLIPS = [agents.IS(clip=clip) for clip in (1.5, 100.0, 6.0)]


@dataclass(frozen=True)
class Shifted:
    """An estimator that is off by a known bias, with known noise: rewards of the log, each multiplied and moved."""

    bias: float = 0.0
    scale: float = 1.0

    def estimate(self, policy, log, *, generator=None, logging_policy=None, seed=0):
        return Estimate.of_mean(self.scale * (log.reward - log.reward.mean()) + log.reward.mean() + self.bias)


@dataclass(frozen=True)
class Always:
    """A learner of one policy, whatever the log; it notes what it was fitted on."""

    action: int
    fitted: list = None  # type: ignore[assignment]

    def fit_many(self, logs, *, generators=None, logging_policies=None, seeds=None, callback=None):
        if self.fitted is not None:
            self.fitted.extend(logs)
        return [agents.ConstantPolicy(self.action, logs[0].n_prompts) for _ in logs]

    def fit(self, log, **rest):
        return self.fit_many([log])[0]


@pytest.mark.parametrize(
    ("values", "widths", "slope", "plus"),
    [
        ([1.0], [1.0], 0, 0),
        ([0.0, 0.0, 0.0], [3.0, 2.0, 1.0], 2, 2),
        ([0.0, 9.0, 0.0], [1.0, 0.5, 0.1], 0, 0),
        ([0.0, 2.9, 0.0], [1.0, 0.5, 0.1], 1, 0),
        ([0.0, 1.9, 1.5], [1.0, 0.5, 0.1], 2, 2),
        ([0.0, 1.0, 3.0], [1.0, 0.5, 0.1], 1, 1),
        ([5.0, 5.0], [0.0, 0.0], 1, 1),
    ],
)
def test_lepski_by_hand(values, widths, slope, plus):
    values, widths = np.array(values), np.array(widths)
    assert overlap(values, widths) == slope
    assert agreement(values, widths) == plus


def test_slope_takes_the_least_variable_estimator_that_agrees(log):
    wide = Shifted(scale=10.0)
    harmless, harmful = Shifted(bias=0.01), Shifted(bias=100.0, scale=0.1)
    chosen = agents.slope([harmful, harmless, wide], UNIFORM, log)
    assert chosen.candidates == (wide, harmless, harmful)
    assert chosen.chosen is harmless
    assert chosen.estimate.value == pytest.approx(log.reward.mean() + 0.01, rel=1e-5)
    assert agents.slope([harmful], UNIFORM, log).chosen is harmful


def test_slope_over_clips_finds_the_bias_of_a_low_one(simulator, log):
    """Large clips agree, the low one is biased beyond chance: the policy plays one good prompt always."""
    scores = simulator.expected_rewards(simulator.evaluation_contexts(500)).mean(axis=0)
    best = agents.ConstantPolicy(int(scores.argmax()), 12)
    positive = replace(log, reward=log.reward + 10)
    chosen = agents.slope(CLIPS, best, positive)
    assert chosen.chosen == agents.IS(clip=100.0)
    assert abs(chosen.estimate.value - 10 - simulator.policy_value(best).value) < 4 * chosen.estimate.standard_error
    text = str(chosen)
    assert "> IS(clip=100.0)" in text
    assert "half-width" in text
    assert text.count("> ") == 1


def test_slope_over_bandwidths_refuses_the_one_that_sees_nothing(simulator, log):
    """So wide a kernel gives every round the weight 1, hence every policy the mean reward."""
    kernel = agents.GaussianKernel(output_noise=0.0)
    base = agents.KernelIS(kernel=kernel, density=agents.MonteCarloDensity(60), n_samples=8)
    candidates = [with_tau(base, tau) for tau in (0.3, 0.6, 1e3)]
    arguments = {"generator": simulator.outputs, "logging_policy": UNIFORM}
    _, best = extremes(simulator)
    found = agents.slope(candidates, best, log, **arguments)
    assert found.estimates[-1].value == pytest.approx(log.reward.mean(), rel=1e-3)
    assert found.index == 1
    truth = simulator.policy_value(best).value
    assert abs(found.estimate.value - truth) < abs(found.estimates[-1].value - truth)


def test_slope_of_constant_rewards_takes_any_that_agrees(log):
    flat = replace(log, reward=np.full(len(log), 2.0))
    found = agents.slope([agents.IS(), agents.SNIPS()], UNIFORM, flat)
    assert found.estimate.value == pytest.approx(2.0, rel=1e-6)


def test_slope_needs_intervals(log):
    with pytest.raises(DataError, match=r"IS\(\) on 1 rounds; record more"):
        agents.slope([agents.IS()], UNIFORM, log.take(slice(1)))


def test_folds_are_a_partition():
    parts = split(23, 5, seed=1)
    assert sorted(np.concatenate(parts).tolist()) == list(range(23))
    assert {len(part) for part in parts} == {4, 5}
    assert any(not np.array_equal(a, b) for a, b in zip(parts, split(23, 5, seed=2), strict=True))


def test_cross_validation_of_learners_pools_held_out_terms(log):
    """A learner that always plays one prompt is worth what importance sampling says on the whole log."""
    learners = [Always(action) for action in range(12)]
    found = agents.cross_validate(learners, log, folds=4)
    for learner, estimate in zip(learners, found.estimates, strict=True):
        whole = agents.IS().estimate(learner.fit(log), log)
        assert estimate.value == pytest.approx(whole.value)
        assert estimate.standard_error == pytest.approx(whole.standard_error)
        np.testing.assert_allclose(estimate.terms, whole.terms)
    values = [estimate.value for estimate in found.estimates]
    behind = found.columns["behind best"] <= found.columns["s.e. of that"]
    assert found.index == int(np.argmax(behind))
    assert behind[int(np.argmax(values))]


def test_a_learner_never_sees_the_fold_it_is_judged_on(log):
    part, fitted = log.take(slice(20)), []
    agents.cross_validate([Always(0, fitted)], part, folds=5)
    assert len(fitted) == 5
    held_out = [
        set(range(20)) - {int(np.flatnonzero((part.context == x).all(1))[0]) for x in own.context} for own in fitted
    ]
    assert sorted(row for rows in held_out for row in rows) == list(range(20))
    assert all(own.oracle is None for own in fitted)


def test_ties_go_to_the_first(log):
    found = agents.cross_validate([Always(3), Always(3)], log)
    assert found.index == 0
    assert found.columns["behind best"].tolist() == [0.0, 0.0]
    flat = replace(log, reward=np.zeros(len(log)))
    assert agents.cross_validate([Always(a) for a in range(3)], flat).index == 0
    assert agents.cross_validate_estimators(CLIPS, UNIFORM, flat).index == 0
    assert agents.select_policy({"a": UNIFORM, "b": UNIFORM}, flat).index == 0


def test_cross_validation_finds_a_learning_rate(simulator, log):
    learners = [agents.ImportanceSamplingPG(steps=200, learning_rate=rate) for rate in (1e-7, 5e-3)]
    found = agents.cross_validate(learners, log, folds=3)
    assert found.chosen.learning_rate == 5e-3
    again = agents.cross_validate(learners, log, folds=3)
    assert [e.value for e in again.estimates] == [e.value for e in found.estimates]
    assert "ImportanceSamplingPG(learning_rate=0.005)" in str(found)


def test_folds_of_a_learner_are_one_batched_problem(log):
    """Each fold's policy is the one that the learner gives alone."""
    learner, part = agents.ImportanceSamplingPG(steps=30), log.take(slice(100))
    (estimate,) = agents.cross_validate([learner], part, folds=3, seed=4).estimates
    terms = np.empty(100)
    for rows in split(100, 3, 4):
        policy = learner.fit(part.take(np.setdiff1d(np.arange(100), rows)), seed=4)
        terms[rows] = agents.IS().estimate(policy, part.take(rows), seed=4).terms
    np.testing.assert_allclose(estimate.terms, terms)


def test_cross_validation_of_estimators_finds_the_unbiased_one(log):
    """On-policy the validator is the mean of the rewards; candidates are it, one with bias and one with variance."""
    candidates = [Shifted(bias=2.0), Shifted(), Shifted(bias=-1.0)]
    found = agents.cross_validate_estimators(candidates, UNIFORM, log, splits=8)
    assert found.chosen == Shifted()
    assert found.columns["squared distance"][0] == pytest.approx(4, rel=0.2)
    assert found.estimate.value == pytest.approx(log.reward.mean(), rel=1e-5)


def test_cross_validated_distances_by_hand(log):
    """Equal variances split a log in halves; a candidate without variance gets two rounds only."""
    part = log.take(slice(40))
    same = agents.cross_validate_estimators([agents.IS()], UNIFORM, part, splits=3, seed=5)
    rng = stream(5, "cross-validation", "splits")
    expected = []
    for _ in range(3):
        order = rng.permutation(40)
        expected.append((part.reward[order[:20]].mean() - part.reward[order[20:]].mean()) ** 2)
    assert same.columns["squared distance"][0] == pytest.approx(np.mean(expected), rel=1e-4)
    assert same.columns["s.e. of that"][0] == pytest.approx(np.std(expected, ddof=1) / np.sqrt(3), rel=1e-4)
    assert len(agents.cross_validate_estimators([Shifted(scale=0.0)], UNIFORM, part).candidates) == 1


def extremes(simulator: op.Simulator) -> tuple[agents.ConstantPolicy, agents.OraclePolicy]:
    scores = simulator.expected_rewards(simulator.evaluation_contexts(500)).mean(axis=0)
    return agents.ConstantPolicy(int(scores.argmin()), 12), agents.OraclePolicy(simulator)


def test_a_candidate_without_a_value_is_never_chosen(log):
    """Self-normalised weights that are all zero give NaN, which is no best value and no least distance."""
    unseen = log.take(log.action != 5)
    never = agents.ConstantPolicy(5, 12)
    chosen = agents.cross_validate_estimators([agents.SNIPS(), Shifted(bias=0.5)], never, unseen)
    assert chosen.index == 1
    found = agents.cross_validate([Always(5), Always(2)], unseen, estimator=agents.SNIPS())
    assert (found.index, np.isnan(found.estimates[0].value)) == (1, True)
    with pytest.raises(DataError, match="value of at least one candidate"):
        agents.cross_validate_estimators([agents.SNIPS()], never, unseen)
    with pytest.raises(DataError, match="value of at least one candidate"):
        agents.cross_validate([Always(5)], unseen, estimator=agents.SNIPS())


def test_a_surely_better_policy_is_selected_and_a_worse_one_is_not(simulator, log):
    worst, best = extremes(simulator)
    found = agents.select_policy({"worst": worst, "best": best}, log, logging_policy=UNIFORM)
    assert found.chosen is best
    assert found.names[found.index] == "best"
    gain = agents.IS().estimate(best, log).minus(Estimate.of_mean(log.reward))
    # Two candidates at 95% at once: 1.96 standard errors each, one-sided.
    assert found.columns["lower bound"][2] == pytest.approx(gain.value - 1.959964 * gain.standard_error)
    kept = agents.select_policy({"worst": worst}, log, logging_policy=UNIFORM)
    assert kept.chosen is UNIFORM
    assert agents.select_policy({"worst": worst}, log).chosen is None
    assert kept.estimate.value == pytest.approx(log.reward.mean())
    assert "> logging policy" in str(kept)


def test_more_confidence_or_more_candidates_ask_for_more(simulator, log):
    _, best = extremes(simulator)
    bounds = [
        agents.select_policy({str(i): best for i in range(m)}, log, confidence=confidence).columns["lower bound"][1]
        for m, confidence in ((1, 0.5), (1, 0.95), (5, 0.95), (5, 0.999))
    ]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] == pytest.approx(agents.IS().estimate(best, log).value - log.reward.mean())


def test_a_policy_that_the_log_never_played_is_not_selected(log):
    """Its estimate is exactly 0, with no standard error, above rewards that are all negative."""
    bad = replace(log.take(log.action != 3), reward=-np.ones(int((log.action != 3).sum())))
    found = agents.select_policy({"never played": agents.ConstantPolicy(3, 12)}, bad, logging_policy=UNIFORM)
    assert found.columns["improvement"][1] == pytest.approx(1)
    assert found.columns["lower bound"][1] == -np.inf
    assert found.chosen is UNIFORM


def test_names_say_what_differs():
    assert names_of(CLIPS) == ("IS(clip=1.5)", "IS(clip=100.0)", "IS(clip=6.0)")
    assert names_of([agents.IS(), agents.DM()]) == ("IS()", "DM()")
    assert names_of([agents.IS()]) == ("IS()",)


def one_term(log: LoggedDataset) -> object:
    class Single:
        def estimate(self, policy, log, **rest):
            return Estimate.of_mean(np.ones(1))

    return agents.select_policy({"a": UNIFORM}, log, estimator=Single())


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda log: agents.slope([], UNIFORM, log), ConfigError, "expected at least one"),
        (lambda log: agents.cross_validate([], log), ConfigError, "expected at least one"),
        (lambda log: agents.cross_validate_estimators([], UNIFORM, log), ConfigError, "expected at least one"),
        (lambda log: agents.select_policy({}, log), ConfigError, "expected at least one"),
        (lambda log: agents.cross_validate([Always(0)], log, folds=1), ConfigError, "folds"),
        (lambda log: agents.cross_validate([Always(0)], log.take(slice(9))), DataError, "got 9 rounds; record more"),
        (lambda log: agents.cross_validate_estimators(CLIPS, UNIFORM, log, splits=1), ConfigError, "splits"),
        (
            lambda log: agents.cross_validate_estimators(CLIPS, UNIFORM, log.take(slice(3))),
            DataError,
            "at least 4 rounds to split in two, got 3",
        ),
        (lambda log: agents.select_policy({"a": UNIFORM}, log, confidence=1.0), ConfigError, "confidence"),
        (lambda log: agents.select_policy({"a": UNIFORM}, log, confidence=0.0), ConfigError, "confidence"),
        (lambda log: agents.select_policy({"a": agents.UniformPolicy(3)}, log), DimensionError, "12 prompts"),
        (one_term, DimensionError, "same rounds"),
    ],
)
def test_wrong_input(act, error, words, log):
    with pytest.raises(error, match=words):
        act(log)
