"""Sweeps of no training: what is run, what is known, and what becomes of faults."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engines import Failure, guarded
from benchmarks.methods import Logging
from benchmarks.plan import Point, Sweep
from benchmarks.progress import Progress
from benchmarks.rows import Result, Results, read_rows
from benchmarks.running import Outcome, plan, run_all, tasks_of
from benchmarks.store import JSON, Store, StoreError, digest
from offprompts_env.errors import StorageError
from tests.benchmarks.tiny_setting import TinySetting, computed, runs, sweep


@dataclass(frozen=True)
class Here:
    """An engine without processes, as a user may write one."""

    workers: int = 1

    def run(self, work: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        for index, task in enumerate(tasks):
            yield index, guarded(work, task)


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    (tmp_path / "marks").mkdir()
    return tmp_path / "marks"


def go(out: Path, setting: TinySetting, *, again: bool = False, worlds: int = 3) -> Outcome:
    return run_all(runs(setting, worlds), out, Here(), again=again)


def values(out: Path) -> dict[str, float]:
    return {row.id: row.score for row in read_rows(out)}


ALL = {f"tiny/n=1/world={world}/learner=one": float(world) for world in range(3)}


def test_a_sweep_gives_a_row_a_run_with_its_provenance(tmp_path: Path, marks: Path) -> None:
    outcome = go(tmp_path / "out", TinySetting(str(marks)))
    assert (outcome.new, outcome.failures, values(tmp_path / "out")) == (3, [], ALL)
    row = read_rows(tmp_path / "out")[0]
    assert row.versions["offprompts-env"]
    assert "TinySetting" in row.config
    assert row.finished > "2026"
    assert row.result.wall_seconds >= 0


def test_what_is_known_is_not_run_again_unless_asked(tmp_path: Path, marks: Path) -> None:
    setting = TinySetting(str(marks))
    go(tmp_path / "out", setting)
    second = go(tmp_path / "out", setting)
    assert (second.new, len(second.plan.known)) == (0, 3)
    assert computed(marks) == [(0, 0), (1, 0), (2, 0)]
    third = go(tmp_path / "out", setting, again=True)
    assert (third.new, third.plan.replaced, len(computed(marks))) == (3, 3, 6)
    assert values(tmp_path / "out") == ALL


@dataclass(frozen=True)
class Sharing(TinySetting):
    """Rests on a stage that all its runs share."""

    def perform(self, method: Any, units: Sequence[tuple[int, int]], store: Store) -> list[Result]:
        store.one(
            "stage", digest("shared"), lambda: super(Sharing, self).perform(method, [(9, 9)], store)[0].value, JSON
        )
        return super().perform(method, units, store)


def test_again_makes_anew_what_runs_share_once(tmp_path: Path, marks: Path) -> None:
    setting = Sharing(str(marks))
    go(tmp_path / "out", setting)
    time.sleep(0.02)  # ticks of a file system are coarse
    go(tmp_path / "out", setting, again=True)
    assert computed(marks) == sorted(2 * [(0, 0), (1, 0), (2, 0), (9, 9)])


def test_rows_of_another_setting_are_replaced_and_come_back_from_the_store(tmp_path: Path, marks: Path) -> None:
    setting = TinySetting(str(marks))
    go(tmp_path / "out", setting)
    other = go(tmp_path / "out", replace(setting, scale=2.0))
    assert (other.new, other.plan.replaced) == (3, 3)
    assert values(tmp_path / "out") == {name: 2 * value for name, value in ALL.items()}
    go(tmp_path / "out", setting)
    assert values(tmp_path / "out") == ALL
    assert len(computed(marks)) == 6


def test_equal_runs_of_two_sweeps_are_computed_once(tmp_path: Path, marks: Path) -> None:
    setting = TinySetting(str(marks))
    both = [*sweep(setting).runs(), *sweep(setting, name="other").runs()]
    outcome = run_all(both, tmp_path / "out", Here())
    assert (outcome.new, len(computed(marks)), len(values(tmp_path / "out"))) == (6, 3, 6)


def test_tasks_hold_a_chunk_of_one_learner_each(tmp_path: Path) -> None:
    point = Point("n=1", 1.0, TinySetting(""), {"one": Logging(), "two": Logging()})
    tasks = tasks_of(Sweep("tiny", "", "", (point,), worlds=3, chunk=2).runs()[:3], tmp_path)
    assert [task.units for task, _ in tasks] == [((0, 0), (1, 0)), ((2, 0),)]
    assert tasks[1][0].label == "tiny/n=1/one, worlds 2 to 2"


def test_a_failure_leaves_the_others_and_a_file_that_says_more(tmp_path: Path, marks: Path) -> None:
    outcome = go(tmp_path / "out", TinySetting(str(marks), "raise"))
    [(label, failure, file)] = outcome.failures
    assert (outcome.new, label, failure.message) == (2, "tiny/n=1/one, worlds 1 to 1", "ValueError: as asked")
    assert "Traceback" in file.read_text()
    assert "TinySetting" in file.read_text()
    assert sorted(values(tmp_path / "out").values()) == [0.0, 2.0]
    # A task of the same name that succeeds takes the file away.
    go(tmp_path / "out", TinySetting(str(marks)))
    assert not file.exists()
    assert values(tmp_path / "out") == ALL


@dataclass(frozen=True)
class Unscored(TinySetting):
    """Cannot score the result of its world with the fault."""

    fault: str = "score"

    def perform(self, *given: Any) -> list[Result]:
        return TinySetting(self.marks).perform(*given)

    def score(self, result: Result) -> float:
        return result.value / (result.value - self.world)


def test_a_result_that_cannot_be_scored_fails_its_task_alone(tmp_path: Path, marks: Path) -> None:
    outcome = go(tmp_path / "out", Unscored(str(marks)))
    [(label, failure, file)] = outcome.failures
    assert (outcome.new, label, failure.kind) == (2, "tiny/n=1/one, worlds 1 to 1", "ZeroDivisionError")
    assert "in score" in file.read_text()
    # What was learned is in the store: the same command scores it again.
    assert (go(tmp_path / "out", Unscored(str(marks))).new, len(computed(marks))) == (0, 3)


def test_a_store_that_cannot_be_written_stops_the_sweep(tmp_path: Path, marks: Path) -> None:
    (tmp_path / "out" / "store").mkdir(parents=True)
    (tmp_path / "out" / "store" / "stage").touch()
    with pytest.raises(StoreError, match=r"cannot be written.*what was finished is kept"):
        go(tmp_path / "out", TinySetting(str(marks), "storage"))
    assert sorted(values(tmp_path / "out").values()) == [0.0]
    assert computed(marks) == [(0, 0)]


def test_a_full_disk_keeps_what_was_finished_and_computes_nothing_twice(
    tmp_path: Path, marks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting, write = TinySetting(str(marks)), os.fsync

    def full(handle: int) -> None:
        if len(computed(marks)) == 2:
            raise OSError(28, "No space left on device")
        write(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left on device; free some space, then run the same command"):
            go(tmp_path / "out", setting)
    assert list(values(tmp_path / "out").values()) == [0.0]
    assert not list((tmp_path / "out" / "rows").glob(".*.tmp"))
    assert go(tmp_path / "out", setting).new == 2
    assert values(tmp_path / "out") == ALL
    assert computed(marks) == [(0, 0), (1, 0), (2, 0)]


@pytest.mark.parametrize("size", [0, 4, 600])
def test_a_file_cut_short_is_made_good_from_the_store(tmp_path: Path, marks: Path, size: int) -> None:
    out, setting = tmp_path / "out", TinySetting(str(marks))
    go(out, setting)
    [file] = (out / "rows").glob("*.parquet")
    content = file.read_bytes()
    assert len(content) > 600
    file.write_bytes(content[:size])
    with pytest.warns(UserWarning, match=r"cannot be read .*makes only those anew.*It was moved to"):
        outcome = go(out, setting)
    assert (outcome.new, values(out), len(computed(marks))) == (3, ALL, 3)
    assert [file.read_bytes() for file in (out / "damaged").iterdir()] == [content[:size]]


def test_rows_that_were_never_written_are_found_in_the_store(tmp_path: Path, marks: Path) -> None:
    out, setting = tmp_path / "out", TinySetting(str(marks))
    go(out, setting)
    for file in (out / "rows").glob("*.parquet"):
        file.unlink()
    assert (go(out, setting).new, len(computed(marks))) == (3, 3)


def test_provenance_is_of_who_computed_not_of_who_wrote(
    tmp_path: Path, marks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, setting = tmp_path / "out", TinySetting(str(marks))
    monkeypatch.setattr("benchmarks.running._commit", lambda: "before")
    go(out, setting)
    for file in (out / "rows").glob("*.parquet"):
        file.unlink()
    monkeypatch.setattr("benchmarks.running._commit", lambda: "after")
    go(out, setting)
    assert {row.commit for row in read_rows(out)} == {"before"}


def test_rows_of_another_version_count_and_are_said_to(tmp_path: Path, marks: Path) -> None:
    setting = TinySetting(str(marks))
    go(tmp_path / "out", setting)
    rows = read_rows(tmp_path / "out")
    old = [replace(rows[0], versions={"offprompts-env": "0.0.1"}), *rows[1:]]
    assert plan(runs(setting), old).other_versions == {"0.0.1": 1}
    assert len(plan(runs(setting), old).known) == 3


def test_two_sweeps_in_one_folder(tmp_path: Path, marks: Path) -> None:
    with Results(tmp_path / "out"), pytest.raises(StorageError, match="only sweep that writes here"):
        go(tmp_path / "out", TinySetting(str(marks)))
    assert go(tmp_path / "out", TinySetting(str(marks))).new == 3


def test_progress_hears_of_failures_too(tmp_path: Path, marks: Path) -> None:
    heard: list[tuple[str, int, bool]] = []

    class Ear(Progress):
        def ended(self, label: str, learner: str, runs: int, seconds: float | None) -> None:
            heard.append((label[-1], runs, seconds is None))

    run_all(runs(TinySetting(str(marks), "raise")), tmp_path / "out", Here(), progress=Ear())
    assert heard == [("0", 1, False), ("1", 1, True), ("2", 1, False)]


def test_an_interrupt_closes_the_engine_and_lets_others_write(tmp_path: Path, marks: Path) -> None:
    closed = []

    class Stopped(Here):
        def run(self, work: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
            try:
                yield 0, guarded(work, tasks[0])
                yield 1, Failure("none")
            finally:
                closed.append(True)

    class Interrupting(Progress):
        def ended(self, label: str, learner: str, runs: int, seconds: float | None) -> None:
            raise KeyboardInterrupt

    setting = TinySetting(str(marks))
    with pytest.raises(KeyboardInterrupt):
        run_all(runs(setting), tmp_path / "out", Stopped(), progress=Interrupting())
    assert closed == [True]
    assert go(tmp_path / "out", setting).new == 2
