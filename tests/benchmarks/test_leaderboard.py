"""The summary of the reference runs, and the docs made from it."""

from __future__ import annotations

import argparse
import math
import random
from dataclasses import replace

import pytest

from benchmarks import leaderboard, reference
from benchmarks.aggregate import aggregates
from benchmarks.leaderboard import board, differences, filled, pages, sweep_table, update
from benchmarks.methods import QUICK
from benchmarks.reference import joined, lines_of, read_summary, summary_text, write_summary
from benchmarks.rows import Results
from benchmarks.sweeps import SWEEPS
from offprompts_env.errors import ConfigError, DataError, StorageError
from tests.benchmarks.some_rows import SETTING, grid, row

QUICKLY = SETTING.replace("Effort(steps=1.0, learning_rate=1.0)", repr(QUICK))
ROWS = grid({"is": [[0.1, 0.2], [0.2, 0.3]], "dso": [[0.3, 0.5], [0.5, 0.5]]}, seconds=2.0, shared_seconds=1.0)
LINES = lines_of(ROWS)


def command(*arguments, root):
    parser = argparse.ArgumentParser()
    leaderboard.add_command(parser.add_subparsers())
    chosen = parser.parse_args(["leaderboard", *arguments])
    chosen.root = root
    return chosen.do(chosen)


def out(folder, rows):
    with Results(folder) as results:
        results.append(rows)
    return str(folder)


# --- the repository --------------------------------------------------------------------------------------------------


def test_the_docs_hold_what_the_summary_says():
    assert not differences(pages(read_summary())), "python -m benchmarks leaderboard"


def test_the_committed_summary_is_written_as_it_would_be_again():
    assert reference.SUMMARY.read_text(encoding="utf-8") == summary_text(read_summary())


# --- the summary -----------------------------------------------------------------------------------------------------


def test_lines_are_means_over_worlds():
    cell = next(line for line in LINES if (line.point, line.learner) == ("n=500", "dso"))
    assert (cell.sweep, cell.x, cell.worlds, cell.runs) == ("data_size", 500, 2, 2)
    assert (cell.mean, cell.standard_error, cell.iqm) == pytest.approx((0.4, 0.1, 0.4))
    assert (cell.seconds, cell.shared_seconds, cell.versions, cell.commit) == (2, 1, "python 3.11", "abc")


def test_a_sweep_has_a_line_over_all_points():
    (whole,) = (line for line in LINES if not line.point and line.learner == "dso")
    (same,) = (one for one in aggregates(ROWS) if one.learner == "dso")
    assert (whole.worlds, whole.runs, whole.mean) == (2, 4, pytest.approx(0.45))
    assert (whole.iqm, whole.iqm_low, whole.iqm_high) == (same.iqm.value, same.iqm.low, same.iqm.high)
    assert math.isnan(whole.x)
    assert math.isnan(whole.standard_error)
    assert [line.cell for line in LINES] == [
        "data_size/n=500/learner=dso", "data_size/n=500/learner=is",
        "data_size/n=1000/learner=dso", "data_size/n=1000/learner=is",
        "data_size/learner=dso", "data_size/learner=is",
    ]  # fmt: skip
    assert [line.point for line in lines_of(ROWS[::2])] == ["n=500", "n=500"]


def test_equal_rows_give_equal_bytes():
    shuffled = list(ROWS)
    random.Random(0).shuffle(shuffled)
    assert summary_text(lines_of(shuffled)) == summary_text(LINES)


def test_provenance_of_all_rows_is_kept():
    other = replace(row("is", 9), versions={"python": "3.12"}, commit="def")
    (line,) = lines_of([row("is", 0), other])
    assert (line.versions, line.commit) == ("python 3.11 and 3.12", "abc def")
    (changed,) = lines_of([row("is", 0, config="is(2)")])
    assert changed.config != line.config


def test_the_file_is_read_as_it_was_written(tmp_path):
    file = tmp_path / "a" / "summary.csv"
    assert read_summary(file) == []
    write_summary(LINES, file)
    again = read_summary(file)
    assert summary_text(again) == file.read_text(encoding="utf-8") == summary_text(LINES)
    assert [line.cell for line in again] == [line.cell for line in LINES]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("sweep,", "swept,"), "expected the columns .*leaderboard --update"),
        (lambda text: "", "expected the columns"),
        (lambda text: text + "data_size,n=500\n", "line 8: expected 16 values"),
        (lambda text: text.replace(",500,", ",many,", 1), "line 2: .*many"),
    ],
)
def test_another_file_is_refused(tmp_path, change, message):
    file = tmp_path / "summary.csv"
    file.write_text(change(summary_text(LINES)), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_summary(file)


MORE = grid({"is": [[0.1, 0.2], [0.2, 0.3], [0.2, 0.2]], "dso": [[0.3, 0.5], [0.5, 0.5], [0.1, 0.1]]})
OTHER = [row("is", 0, sweep="noise", point="noise=0", x=0.0)]


@pytest.mark.parametrize(
    ("rows", "lost"),
    [
        (ROWS, None),
        (MORE, None),
        ([*MORE, *OTHER], None),
        # Sweeps that the folder does not have stay as they are.
        (OTHER, None),
        (ROWS[:-1], "data_size/n=1000/learner=dso: 1 worlds and 1 runs, had 2 and 2"),
        ([one for one in MORE if one.learner == "is"], "data_size/n=500/learner=dso: 0 worlds and 0 runs, had 2 and 2"),
        ([one for one in MORE if one.point == "n=500"], "data_size/n=1000/learner=is: 0 worlds"),
    ],
)
def test_a_summary_never_loses_worlds_unasked(rows, lost):
    new = lines_of(rows)
    sweeps = {line.sweep for line in new}
    expected = sorted([*new, *(line for line in LINES if line.sweep not in sweeps)], key=lambda line: line.sweep)
    if lost:
        with pytest.raises(DataError, match=lost.replace("=", ".")) as caught:
            joined(LINES, new)
        assert "--force" in str(caught.value)
    assert joined(LINES, new, force=bool(lost)) == expected


def test_learning_seeds_count_as_runs():
    two = [row("is", world, seed=seed) for world in range(2) for seed in range(2)]
    assert [(line.worlds, line.runs) for line in lines_of(two)] == [(2, 4)]
    with pytest.raises(DataError, match="2 worlds and 3 runs, had 2 and 4"):
        joined(lines_of(two), lines_of(two[:-1]))


# --- the docs --------------------------------------------------------------------------------------------------------


def test_a_table_ranks_learners_and_marks_the_best():
    assert sweep_table(LINES).splitlines()[:2] == [
        "| learner | IQM | n=500 | n=1000 | seconds |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    dso, other = sweep_table(LINES).splitlines()[2:]
    assert dso.startswith("| DSO | .500 [")
    assert dso.endswith("| **.400 ± .100** | **.500 ± .000** | 2.0 |")
    assert other.endswith("| .150 ± .050 | .250 ± .050 | 2.0 |")


def test_only_what_learns_from_the_log_alone_is_the_best():
    rows = grid({"is": [[0.1], [0.2]], "dso": [[0.3], [0.5]], "online": [[0.7], [0.7]], "logging": [[0.6], [0.6]]})
    table = sweep_table(lines_of(rows))
    assert table.count("**") == 2
    assert "| **.400 ± .100** |" in table
    assert "**" not in sweep_table(lines_of([one for one in rows if one.learner != "is"]))


def test_learners_of_other_points_are_ranked_by_the_first_one():
    scores = {("dso", "n=500"): 0.2, ("dso", "n=1000"): 0.9, ("is", "n=500"): 0.4, ("dr", "n=1000"): 0.99}
    rows = [
        row(name, world, score + 0.01 * world, point=point, x=float(point[2:]))
        for (name, point), score in scores.items()
        for world in range(2)
    ]
    table = sweep_table(lines_of(rows)).splitlines()
    assert table[0] == "| learner | n=500 | n=1000 | seconds |"
    assert [line.split(" | ")[0] for line in table[2:]] == ["| IS PG", "| DSO", "| DR PG"]


def test_less_is_better_for_estimators():
    rows = [
        row(name, world, score + world * 1e-4, sweep="estimators_n")
        for name, score in (("DR", 2e-4), ("IS", 0.5))
        for world in range(2)
    ]
    best, other = sweep_table(lines_of(rows)).splitlines()[2:]
    assert "| **.000250 ± .000050** |" in best
    assert best.startswith("| DR |")
    assert "| .500 ± .000 |" in other


def test_many_points_of_few_learners_stand_on_end():
    rows = [row("dso", world, 0.5, sweep="kernel", point=f"tau={tau}", x=tau) for tau in (1.0, 2.0) for world in (0, 1)]
    assert sweep_table(lines_of(rows)).splitlines() == [
        "| point | DSO |", "| --- | --- |", "| tau=1.0 | .500 ± .000 |", "| tau=2.0 | .500 ± .000 |",
    ]  # fmt: skip


def test_one_world_has_no_interval():
    assert "| IS PG | .500 | .500 | 0.0 |" in sweep_table(lines_of([row("is")]))


def test_the_page_has_every_sweep_and_the_published_numbers():
    page = board([*LINES, *lines_of(OTHER)])
    assert "## data_size" in page
    assert "## noise" in page
    assert "| IS PG | .150 ± .050 (+0.2) | **.250 ± .050 (+2.1)** |" in page
    assert "2 worlds a cell, 8 runs; python 3.11; commit abc." in page
    assert "no reference runs yet" in board([])


TEXT = "before\n<!-- leaderboard:data_size -->\nold\n<!-- end -->\nafter\n"


def test_blocks_are_made_anew_and_nothing_else():
    made = filled(TEXT, LINES)
    assert made == TEXT.replace("old", sweep_table(LINES))
    assert filled(made, LINES) == made
    assert "n = 500" in filled(TEXT.replace("data_size", "published"), LINES)
    assert filled("no blocks", LINES) == "no blocks"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT.replace("data_size", "data_sise"), "data_size"),
        (TEXT.replace("<!-- end -->", ""), "<!-- end -->"),
        (TEXT.replace("<!-- end -->", "") + TEXT, "<!-- end -->"),
    ],
)
def test_blocks_that_cannot_be_made_are_refused(text, message):
    with pytest.raises(DataError, match=message):
        filled(text, LINES)


# --- the command -----------------------------------------------------------------------------------------------------


def test_docs_follow_the_rows_and_the_check_sees_when_they_do_not(tmp_path, capsys):
    root = tmp_path / "tree"
    root.mkdir()
    (root / "README.md").write_text(TEXT, encoding="utf-8")
    folder = out(tmp_path / "runs", [*ROWS, *(row("is", world, sweep="noise", setting=QUICKLY) for world in (0, 1))])
    assert command("--update", "data_size", "--out", folder, root=root) == 0
    assert "2 rows of short schedules (--quick) are left out" in capsys.readouterr().out
    assert command("--check", root=root) == 0
    assert command(root=root) == 0
    assert "nothing to change" in capsys.readouterr().out
    for name in ("docs/leaderboard.md", "README.md"):
        page = root / name
        page.write_text(page.read_text(encoding="utf-8").replace(".400", ".401"), encoding="utf-8")
        assert command("--check", root=root) == 1
        said = capsys.readouterr().out
        assert f"--- {name} (file)" in said
        assert "-| DSO | .500" in said
        assert "+| DSO | .500" in said
        assert command(root=root) == 0
        assert command("--check", root=root) == 0
    (root / "docs/leaderboard.md").unlink()
    assert command("--check", root=root) == 1


def test_fewer_worlds_are_taken_by_force_alone(tmp_path):
    command("--update", "data_size", "--out", out(tmp_path / "all", ROWS), root=tmp_path)
    held = (tmp_path / "benchmarks/results/summary.csv").read_bytes()
    fewer = out(tmp_path / "fewer", ROWS[:-1])
    with pytest.raises(DataError, match="--force"):
        command("--update", "data_size", "--out", fewer, root=tmp_path)
    assert (tmp_path / "benchmarks/results/summary.csv").read_bytes() == held
    assert command("--update", "data_size", "--force", "--out", fewer, root=tmp_path) == 0
    assert (tmp_path / "benchmarks/results/summary.csv").read_bytes() != held


def test_a_sweep_with_runs_missing_is_taken_by_name_alone(tmp_path):
    whole = [run for sweep in ("noise", "failures") for run in SWEEPS[sweep].runs()]
    rows = [
        replace(row(run.learner, run.world, 0.5, sweep=run.sweep.name, point=run.point.name), id=run.id)
        for run in whole[:-1]
    ]
    folder, summary = tmp_path / "runs", tmp_path / "summary.csv"
    out(folder, [*rows, row("own", sweep="noise", point="noise=1")])
    assert "failures is left out: 1 of its runs are missing; --update failures takes it" in update(folder, summary)
    assert {line.sweep for line in read_summary(summary)} == {"noise"}
    assert "own" not in {line.learner for line in read_summary(summary)}
    assert "left out" not in update(folder, summary, sweeps=["failures"])
    assert {line.sweep for line in read_summary(summary)} == {"noise", "failures"}


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "benchmarks").write_text("a file", encoding="utf-8")
    with pytest.raises(StorageError, match=r"summary\.csv: cannot be written"):
        command("--update", "data_size", "--out", out(tmp_path / "runs", ROWS), root=tmp_path)


def test_what_cannot_be_summarised_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected --update beside it"):
        command("--force", root=tmp_path)
    with pytest.raises(DataError, match="expected a sweep of full schedules, got none"):
        update(tmp_path / "nothing", tmp_path / "summary.csv")
    out(tmp_path / "quick", [row("is", setting=QUICKLY)])
    with pytest.raises(DataError, match="run one without --quick; 1 rows of short schedules"):
        update(tmp_path / "quick", tmp_path / "summary.csv")
    assert not (tmp_path / "summary.csv").exists()
