"""The published data-size table, on worlds of the same process."""

from __future__ import annotations

import pytest

from benchmarks.published import compare


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::agents.TrainingWarning")
def test_published_means_are_within_two_standard_errors():
    cells = compare(10, [500, 8000], ["logging", "online", "is", "dso"], print)
    assert len(cells) == 6
    wrong = [str(cell) for cell in cells if abs(cell.deviation) > 2]
    assert not wrong, "\n".join(wrong)
