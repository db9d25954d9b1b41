"""The published data-size table, on worlds of the same process."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.published import METHODS, PUBLISHED, REASONS, SIZES, Cell, compare, verdict
from benchmarks.rows import append_row, read_rows

CELL = Cell("is", 500, 2, 0.13, 0.01, *PUBLISHED["is"][500], -0.7, 10.5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::agents.TrainingWarning")
def test_published_means_are_within_two_standard_errors_but_for_cells_with_a_reason():
    cells = compare(20, SIZES, list(PUBLISHED), print)
    assert len(cells) == len(SIZES) * len(METHODS) + 2
    wrong = [cell for cell in cells if abs(cell.deviation) > 2 and (cell.learner, cell.n) not in REASONS]
    assert not wrong, verdict(cells)
    assert max(abs(cell.deviation) for cell in cells) < 3, verdict(cells)


def test_every_learner_has_a_published_number_at_every_size():
    assert set(PUBLISHED) == {*METHODS, "logging", "online"}
    assert all(set(column) == set(SIZES) for column in PUBLISHED.values())


def test_known_cells_are_read_back_and_not_computed_again(tmp_path):
    path, other = tmp_path / "cells.csv", replace(CELL, worlds=3, n=1000)
    assert read_rows(path, Cell) == []
    for cell in (CELL, other):
        append_row(path, cell)
    assert read_rows(path, Cell) == [CELL, other]
    assert compare(2, [500], ["is"], pytest.fail, read_rows(path, Cell)) == [CELL]


def test_the_verdict_names_the_cells_that_are_off():
    lines = verdict([CELL, replace(CELL, learner="dr", deviation=-2.5)]).splitlines()
    assert lines[0].startswith("1 of 2 cells")
    assert lines[1].startswith("dr ")
    assert lines[1].endswith("not explained")
    assert len(lines) == 2
    known = verdict([replace(CELL, learner="greedy", n=2000, deviation=2.2)])
    assert "regression" in known
