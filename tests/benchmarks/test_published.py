"""The published data-size table beside rows."""

from __future__ import annotations

import argparse
import math
import warnings
from dataclasses import replace

import pytest

from benchmarks import published
from benchmarks.engines import Joblib
from benchmarks.methods import QUICK
from benchmarks.published import (
    PUBLISHED,
    REASONS,
    SIZES,
    WITHOUT_LOG,
    compare,
    markdown,
    number,
    text,
    together,
    verdict,
)
from benchmarks.rows import Results, read_rows
from benchmarks.running import run_all
from benchmarks.sweeps import SWEEPS, select
from tests.benchmarks.some_rows import SETTING, row


def cell(learner, n, scores, **settings):
    return [row(learner, world, score, point=f"n={n}", x=float(n), **settings) for world, score in enumerate(scores)]


def around(learner, n, deviation):
    """Rows as precise as the published mean, `deviation` combined standard errors above it."""
    mean, error = PUBLISHED[learner][n]
    return cell(learner, n, [mean + deviation * math.sqrt(2) * error + side * error for side in (-1, 1)])


@pytest.mark.slow
def test_published_means_are_within_two_standard_errors_but_for_cells_with_a_reason(tmp_path):
    patterns = [f"data_size/n={n}/*/learner={name}" for n in (500, 8000) for name in ("logging", "is", "dso")]
    outcome = run_all(select(patterns, worlds=10), tmp_path, Joblib())
    assert not outcome.failures
    cells = compare(read_rows(tmp_path))
    assert [(one.learner, one.n, one.worlds) for one in cells] == [
        ("logging", 500, 10), ("is", 500, 10), ("is", 8000, 10), ("dso", 500, 10), ("dso", 8000, 10),
    ]  # fmt: skip
    assert not [one for one in cells if one.off and (one.learner, one.n) not in REASONS], text(cells)


def test_the_sweep_has_every_learner_and_size_of_the_table():
    for point in SWEEPS["data_size"].points:
        assert set(PUBLISHED) <= set(point.methods)
    assert {point.x for point in SWEEPS["data_size"].points} == set(SIZES)
    assert all(set(column) == set(SIZES) for column in PUBLISHED.values())
    assert all(n in PUBLISHED[learner] for learner, n in REASONS)


def test_a_comparison_counts_combined_standard_errors():
    (found,) = compare(cell("is", 500, [0.10, 0.16]))
    assert (found.learner, found.n, found.worlds) == ("is", 500, 2)
    assert (found.mean, found.standard_error) == pytest.approx((0.13, 0.03))
    assert (found.published_mean, found.published_standard_error) == (0.139, 0.007)
    assert found.deviation == pytest.approx((0.13 - 0.139) / math.hypot(0.03, 0.007))
    assert not found.off
    assert not found.short


@pytest.mark.parametrize(
    ("rows", "cells"),
    [
        ([], []),
        (cell("is", 500, [0.1]), []),
        (cell("is", 750, [0.1, 0.2]), []),
        (cell("mine", 500, [0.1, 0.2]), []),
        (cell("is", 500, [0.1, 0.2], sweep="prompts"), []),
        ([replace(one, x=math.nan) for one in cell("is", 500, [0.1, 0.2])], []),
        # What no log changes stands once, with all its worlds.
        (
            [*cell("logging", 500, [0.1, 0.2]), *cell("logging", 1000, [0.1, 0.2, 0.3])],
            [("logging", 1000)],
        ),
        (
            [*cell("dso", 500, [0.1, 0.2]), *cell("online", 500, [0.1, 0.2]), *cell("logging", 500, [0.1, 0.2])],
            [("logging", 500), ("online", 500), ("dso", 500)],
        ),
    ],
)
def test_cells_are_those_of_the_table(rows, cells):
    assert [(one.learner, one.n) for one in compare(rows)] == cells


@pytest.mark.parametrize(("deviation", "off"), [(1.9, False), (-1.9, False), (2.1, True), (-2.1, True)])
def test_a_cell_is_off_beyond_two_standard_errors(deviation, off):
    (found,) = compare(around("dr", 500, deviation))
    assert found.deviation == pytest.approx(deviation)
    assert found.off == off


def test_the_verdict_names_the_cells_that_are_off_and_what_is_known():
    first, *others = verdict(compare([*around("is", 500, 1), *around("dr", 500, -2.5), *around("greedy", 2000, 2.2)]))
    assert first.startswith("2 of 3 cells are more than 2 combined standard errors off; 0.1 would be by chance.")
    assert "2 lie above the published mean, 1 below" in first
    assert others[0] == "DR PG, n = 500 (−2.5): not explained."
    assert others[1].startswith("greedy on regression, n = 2000 (+2.2): what rests on the prompt-reward regression")
    assert verdict([]) == ["no cell has two worlds yet: run the sweep data_size"]


def test_cells_together_are_judged_by_the_worlds_they_share():
    # Both cells lie .01 and .03 above the published means, in the same two of their three worlds.
    low, high = PUBLISHED["is"][500][0], PUBLISHED["is"][8000][0]
    rows = [*cell("is", 500, [low + 0.01, low + 0.03, low + 9]), *cell("is", 8000, [high + 0.01, high + 0.03])]
    deviation = 0.02 / math.hypot(0.01, (0.007 + 0.008) / 2)
    assert together(rows) == (
        "All 2 cells together, over the 2 worlds they share: +0.020 ± 0.010, and ± 0.007 at most of the published "
        f"side: +{deviation:.1f} combined standard errors."
    )
    # The logging policy counts once, however many sizes there are.
    assert "All 1 cells" in together([*cell("logging", 500, [0.1, 0.2]), *cell("logging", 1000, [0.1, 0.2])])
    assert together(rows[2:4]) == together([]) == "The cells have fewer than two worlds in common."


def test_short_schedules_are_no_replication():
    quick = SETTING.replace("Effort(steps=1.0, learning_rate=1.0)", repr(QUICK))
    (found,) = compare([*cell("is", 500, [0.1, 0.2]), row("is", 2, 0.1, setting=quick)])
    assert found.short
    assert "no replication" in verdict([found])[-1]


def test_the_table_holds_all_cells_and_bold_ones_are_off():
    cells = compare([*around("is", 500, 1), *around("is", 8000, 2.5), *around("logging", 500, 0)])
    lines = markdown(cells).splitlines()
    assert lines[:4] == [
        "| learner | n = 500 | n = 8,000 |",
        "|---|---|---|",
        "| logging policy | .041 ± .004 (+0.0) |  |",
        "| IS PG | .149 ± .007 (+1.0) | **.245 ± .008 (+2.5)** |",
    ]
    assert text(compare(around("is", 500, -2.5))).splitlines()[1].endswith("  −2.5")
    assert lines[5].startswith("1 of 3 cells")
    assert lines[7].startswith("- IS PG, n = 8000 (+2.5)")
    assert len(text(cells).splitlines()) == 1 + 3 + 1 + 2


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0411, ".041"), (-0.0051, "−.005"), (-0.0001, ".000"), (1, "1.000"), (-1.5, "−1.500")]
)
def test_numbers(value, shown):
    assert number(value) == shown


def test_the_command_prints_table_verdict_and_statements(tmp_path, capsys):
    with Results(tmp_path) as results:
        results.append([*around("is", 500, 1), *around("logging", 500, 3)])
    parser = argparse.ArgumentParser()
    published.add_command(parser.add_subparsers())
    for flags, table in (([], "logging policy          500"), (["--markdown"], "| logging policy |")):
        chosen = parser.parse_args(["published", "--out", str(tmp_path), *flags])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert chosen.do(chosen) == 0
        said = capsys.readouterr().out
        assert table in said
        assert "1 of 2 cells" in said
        assert "with 10 prompts DR is ahead: not enough rows" in said


def test_what_no_log_changes_is_published_alike_at_all_sizes():
    assert all(len(set(PUBLISHED[learner].values())) == 1 for learner in WITHOUT_LOG)
