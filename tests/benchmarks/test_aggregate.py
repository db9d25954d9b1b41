import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from benchmarks import aggregate, summaries
from benchmarks.rows import ResultsWarning
from offprompts_env.errors import DataError
from tests.benchmarks.some_rows import grid, row

SCORES = np.random.default_rng(0).normal(0.5, 0.2, (2, 20, 5))


def both(first=SCORES[0], second=SCORES[1]):
    return grid({"dso": first, "is": second})


def test_a_summary_is_the_mean_over_worlds_with_students_interval():
    scores = [0.1, 0.4, 0.35]
    (found,) = summaries.summaries([row(world=w, score=s) for w, s in enumerate(scores)])
    t = stats.ttest_1samp(scores, 0).confidence_interval(0.95)
    assert (found.sweep, found.point, found.x, found.learner, found.worlds, found.runs) == (
        "data_size", "n=500", 500.0, "dso", 3, 3,
    )  # fmt: skip
    assert found.standard_error == pytest.approx(stats.sem(scores))
    assert (found.mean.value, found.mean.low, found.mean.high) == pytest.approx((np.mean(scores), t.low, t.high))


def test_learning_seeds_are_averaged_within_a_world_first():
    # Three seeds of one log are not three logs.
    held = [row(world=0, seed=s, score=v) for s, v in enumerate((0.0, 0.3, 0.6))] + [row(world=1, score=0.9)]
    (found,) = summaries.summaries(held)
    assert found.scores == pytest.approx((0.3, 0.9))
    assert (found.worlds, found.runs) == (2, 4)
    assert found.mean.value == pytest.approx(0.6)


def test_one_world_has_a_mean_and_no_interval():
    held = [row(), row("is", score=0.2)]
    for one in summaries.summaries(held):
        assert math.isnan(one.standard_error)
        assert math.isnan(one.mean.low)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = aggregate.aggregates(held)
        compared = aggregate.improvement(held, "dso", "is")
    assert [(one.iqm.value, math.isnan(one.iqm.low)) for one in found] == [(0.5, True), (0.2, True)]
    assert (compared.probability.value, math.isnan(compared.probability.low)) == (1.0, True)


def test_scores_that_are_not_finite_are_no_scores():
    held = [row(world=0, score=0.2), row(world=1, score=math.nan), row("is", score=math.inf)]
    (found,) = summaries.summaries(held)
    assert (found.learner, found.worlds, found.runs, found.mean.value) == ("dso", 1, 1, 0.2)
    assert [one.learner for one in aggregate.aggregates(held)] == ["dso"]


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([("n=1000", 1000.0), ("n=500", 500.0)], ["n=500", "n=1000"]),
        ([("case=b", math.nan), ("case=a", math.nan), ("one", 1.0)], ["one", "case=a", "case=b"]),
        ([("prompts=100/k=2", math.nan), ("prompts=20/k=10", math.nan)], ["prompts=20/k=10", "prompts=100/k=2"]),
    ],
)
def test_points_stand_in_the_order_of_the_axis_then_of_the_numbers_in_their_names(points, expected):
    held = [row(point=point, x=x) for point, x in points]
    assert [one.point for one in summaries.summaries(held)] == expected


def test_rows_of_another_setting_are_left_out_with_a_warning():
    old = [row(world=w, setting="quick", finished="2025") for w in range(4)]
    new = [row(world=w, finished="2026") for w in (1, 2)]
    other = [row("is", world=0, setting="quick", finished="2025"), row(point="n=1000", x=1000.0, setting="quick")]
    changed = [row("dr", world=0, config="DR(steps=1)", finished="2025"), row("dr", world=1, config="DR(steps=2)")]
    with pytest.warns(ResultsWarning, match="6 rows have another setting"):
        kept = summaries.comparable([*old, *new, *other, *changed])
    assert kept == [*new, other[1], changed[1]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert summaries.comparable(kept) == kept


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (7, 1), (20, 5), (3, 3)])
def test_the_interquartile_mean_is_scipys_trimmed_mean(shape):
    scores = np.random.default_rng(1).normal(size=shape)
    assert aggregate.interquartile_mean(scores) == pytest.approx(stats.trim_mean(scores, 0.25, axis=None))
    holes = np.append(scores, [[np.nan] * shape[1]], axis=0)
    assert aggregate.interquartile_mean(np.stack([holes, holes])) == pytest.approx(
        [stats.trim_mean(scores, 0.25, axis=None)] * 2
    )


def test_the_aggregates_of_a_full_sweep():
    found = {one.learner: one for one in aggregate.aggregates(both())}
    scores, one = SCORES[0], found["dso"]
    assert (one.points, one.worlds) == (5, 20)
    assert one.mean.value == pytest.approx(scores.mean())
    assert one.median.value == pytest.approx(np.median(scores.mean(axis=0)))
    assert one.gap.value == pytest.approx(1 - np.minimum(scores, 1).mean())
    for interval in (one.mean, one.median, one.iqm, one.gap):
        assert interval.low < interval.value < interval.high
    values = [one.iqm.value for one in aggregate.aggregates(both())]
    assert values == sorted(values, reverse=True)


def test_the_bootstrap_interval_of_a_mean_is_that_of_the_means_own_spread():
    scores = SCORES[0][:, :1]
    (one,) = aggregate.aggregates(grid({"dso": scores}))
    half = 1.96 * scores.std() / math.sqrt(len(scores))
    # The percentiles of 2,000 draws have an error of some 3% of the half width.
    assert one.mean.low == pytest.approx(scores.mean() - half, abs=0.1 * half)
    assert one.mean.high == pytest.approx(scores.mean() + half, abs=0.1 * half)


def test_worlds_are_drawn_for_all_points_at_once():
    # Five copies of a point are one point; drawn apart, the interval would shrink by the root of five.
    column = SCORES[0][:, :1]
    (one,), (five,) = (aggregate.aggregates(grid({"dso": np.repeat(column, k, axis=1)})) for k in (1, 5))
    assert (five.mean.low, five.mean.high) == pytest.approx((one.mean.low, one.mean.high))


def test_a_half_finished_sweep_is_aggregated_over_what_is_there():
    table = [[0.1, 0.5], [0.2, None], [None, None], [0.3, 0.7]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (one,) = aggregate.aggregates(grid({"dso": table}))
        (shape,) = aggregate.profiles(grid({"dso": table}), np.array([0.25]))
    assert (one.points, one.worlds) == (2, 2)
    assert one.mean.value == pytest.approx((0.2 + 0.6) / 2)
    assert one.iqm.value == pytest.approx(stats.trim_mean([0.1, 0.5, 0.2, 0.3, 0.7], 0.25))
    assert shape.share == pytest.approx([3 / 5])


def test_the_gap_needs_the_values_of_uniform_and_oracle():
    (one,) = aggregate.aggregates([row(world=w, references={}) for w in range(3)])
    assert math.isnan(one.gap.value)
    (one,) = aggregate.aggregates([row(value=3.0, references={"uniform": 1.0, "oracle": 5.0})])
    assert one.gap.value == pytest.approx(0.5)


def test_a_profile_is_the_share_of_runs_above_each_threshold():
    thresholds = np.linspace(-0.5, 1.5, 9)
    (first, second) = aggregate.profiles(both(), thresholds)
    assert (first.learner, second.learner) == ("dso", "is")
    assert first.share == pytest.approx([(SCORES[0] > t).mean() for t in thresholds])
    assert (first.low <= first.share).all()
    assert (first.share <= first.high).all()
    assert (first.high[3:6] > first.low[3:6]).all()


def test_the_probability_of_improvement_is_mann_whitneys_averaged_over_points():
    first, second = np.round(SCORES, 1)
    found = aggregate.improvement(both(first, second), "dso", "is")
    expected = [stats.mannwhitneyu(first[:, p], second[:, p]).statistic / 400 for p in range(5)]
    assert (found.points, found.worlds) == (5, 20)
    assert found.probability.value == pytest.approx(np.mean(expected))
    assert found.probability.low < found.probability.value < found.probability.high
    difference = stats.ttest_1samp((first - second).mean(axis=1), 0).confidence_interval(0.95)
    assert (found.difference.low, found.difference.high) == pytest.approx((difference.low, difference.high))
    back = aggregate.improvement(both(first, second), "is", "dso")
    assert back.probability.value == pytest.approx(1 - found.probability.value)
    assert back.probability.low == pytest.approx(1 - found.probability.high)


def test_learners_are_compared_in_common_worlds():
    # World 2 of "is" and the second point of "dso" have no counterpart; with them "is" would win some.
    held = grid({"dso": [[0.5, None], [0.6, None], [None, None]], "is": [[0.1, 1], [0.55, 1], [0.9, 1]]})
    found = aggregate.improvement(held, "dso", "is")
    assert (found.points, found.worlds) == (1, 2)
    assert found.probability.value == pytest.approx(3 / 4)
    assert found.difference.value == pytest.approx((0.4 + 0.05) / 2)
    with pytest.raises(DataError, match="dso and dr: expected a world of a point that both were run in"):
        aggregate.improvement(held, "dso", "dr")


def test_equal_learners_improve_with_probability_one_half():
    assert aggregate.improvement(both(SCORES[0], SCORES[0]), "dso", "is").probability.value == 0.5


def test_aggregates_do_not_depend_on_the_order_of_the_rows():
    held = both()
    assert aggregate.aggregates(held) == aggregate.aggregates(held[::-1])
    assert summaries.summaries(held) == summaries.summaries(held[::-1])


@pytest.mark.parametrize(
    "work",
    [aggregate.aggregates, lambda held: aggregate.profiles(held, np.zeros(1)),
     lambda held: aggregate.improvement(held, "dso", "dso")],
)  # fmt: skip
def test_sweeps_are_aggregated_one_at_a_time(work):
    held = [row(), replace(row(), sweep="noise")]
    with pytest.raises(DataError, match=r"expected rows of one sweep, got \['data_size', 'noise'\]"):
        work(held)
