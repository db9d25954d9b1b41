"""The command line, in processes of its own: exit codes, messages, interrupts."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

import benchmarks.sweeps
from benchmarks.__main__ import main
from benchmarks.rows import Results, read_rows
from benchmarks.running import run_all
from tests.benchmarks.test_running import Here
from tests.benchmarks.tiny_setting import TinySetting, computed, runs, sweep

DRIVER = """
import sys
from benchmarks import __main__, sweeps
from tests.benchmarks.tiny_setting import TinySetting, sweep
sweeps.SWEEPS["tiny"] = sweep(TinySetting({marks!r}, {fault!r}), worlds=3)
raise SystemExit(__main__.main(sys.argv[1:]))
"""
ROOT = Path(__file__).parents[2]
Start = Callable[[str, Sequence[str]], subprocess.Popen[str]]


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    (tmp_path / "marks").mkdir()
    return tmp_path / "marks"


@pytest.fixture
def tiny(marks: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The sweep `tiny` among the others, run without processes; return its marks."""
    monkeypatch.setitem(benchmarks.sweeps.SWEEPS, "tiny", sweep(TinySetting(str(marks))))  # type: ignore[arg-type]
    monkeypatch.setattr("benchmarks.__main__.Joblib", Here)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return marks


@pytest.fixture
def start(marks: Path) -> Iterator[Start]:
    """Start the command line on the sweep `tiny` with a fault; what a failed test leaves is killed."""
    begun = []

    def started(fault: str, arguments: Sequence[str]) -> subprocess.Popen[str]:
        code = DRIVER.format(marks=str(marks), fault=fault)
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], cwd=ROOT, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        begun.append(process)
        return process

    yield started
    for process in begun:
        process.kill()
        process.communicate()


def until(marks: Path, pattern: str) -> list[Path]:
    deadline = time.monotonic() + 60
    while not (found := list(marks.glob(pattern))):
        assert time.monotonic() < deadline, pattern
        time.sleep(0.05)
    return found


def ended(processes: Iterator[int]) -> bool:
    """Whether all are gone, ten seconds on at most."""
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in processes if psutil.pid_exists(pid)], timeout=10)
    return not alive


def test_a_worker_that_always_dies_fails_its_task_alone(tmp_path: Path, marks: Path, start: Start) -> None:
    out = tmp_path / "out"
    process = start("die", ["run", "tiny", "--out", str(out), "--workers", "2"])
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "2 new rows, 0 were there, 1 tasks failed" in said
    [line] = [line for line in errors.splitlines() if line.startswith("failed:")]
    assert "tiny/n=1/one, worlds 1 to 1: its worker process died, twice" in line
    assert "fewer --workers" in line
    assert sorted(row.world for row in read_rows(out)) == [0, 2]
    assert computed(marks) == [(0, 0), (2, 0)]


@pytest.mark.parametrize(("number", "whole_group"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_an_interrupt_stops_the_workers_and_keeps_rows(
    tmp_path: Path, marks: Path, start: Start, number: signal.Signals, whole_group: bool
) -> None:
    out = tmp_path / "out"
    process = start("wait", ["run", "tiny", "--out", str(out), "--workers", "2"])
    [waiting] = until(marks, "waiting-*")
    until(out / "rows", "000002.parquet")
    if whole_group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted: what was finished is kept, the same command goes on from there" in errors
    assert "Traceback" not in errors
    assert ended(iter([int(waiting.name.removeprefix("waiting-"))]))
    assert sorted(row.world for row in read_rows(out)) == [0, 2]
    (marks / "go").touch()
    assert run_all(runs(TinySetting(str(marks), "wait")), out, Here()).new == 1
    assert computed(marks) == [(0, 0), (1, 0), (2, 0)]


def test_an_interrupt_while_workers_start_is_as_quiet(tmp_path: Path, marks: Path, start: Start) -> None:
    process = start("wait", ["run", "tiny", "--out", str(tmp_path / "out"), "--workers", "2"])
    found: list[int] = []
    deadline = time.monotonic() + 60
    while not found and time.monotonic() < deadline:
        children = psutil.Process(process.pid).children()
        found = [child.pid for child in children if "LokyProcess" in " ".join(child.cmdline())]
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert found
    assert process.returncode == 130
    assert errors.strip() == "interrupted: what was finished is kept, the same command goes on from there"
    assert ended(iter(found))


def test_a_killed_sweep_leaves_no_workers_and_resumes(tmp_path: Path, marks: Path, start: Start) -> None:
    out = tmp_path / "out"
    process = start("wait", ["run", "tiny", "--out", str(out), "--workers", "2"])
    [waiting] = until(marks, "waiting-*")
    until(out / "rows", "000002.parquet")
    process.kill()
    process.communicate(timeout=30)
    assert ended(iter([int(waiting.name.removeprefix("waiting-"))]))
    # One that a worker finished and that was never written.
    (out / "rows" / "000002.parquet").unlink()
    (marks / "go").touch()
    assert run_all(runs(TinySetting(str(marks), "wait")), out, Here()).new == 2
    assert len(read_rows(out)) == 3
    assert computed(marks) == [(0, 0), (1, 0), (2, 0)]


def test_run_says_where_rows_are_and_what_is_next(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "tiny", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[0] == f"3 new rows, 0 were there, 0 tasks failed: {tmp_path / 'out'}"
    assert said.splitlines()[-1] == (
        f"next: python -m benchmarks figures --out {tmp_path / 'out'}, or report --out {tmp_path / 'out'}"
    )


def test_rows_of_another_version_are_mentioned(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    main(["run", "tiny", "--out", str(out)])
    rows = read_rows(out)
    with Results(out) as results:
        results.append([replace(rows[0], versions={"offprompts-env": "0.0.1"}, finished="9")])
    assert main(["run", "tiny", "--out", str(out)]) == 0
    assert "1 rows were made by offprompts-env 0.0.1 and count as known; --again makes them anew" in (
        capsys.readouterr().out
    )


def test_a_dry_run_runs_nothing(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["run", "tiny", "--out", str(out), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "3 runs to do in 3 tasks, 0 are there" in said
    assert "no rows yet" in said
    assert not out.exists()
    main(["run", "tiny/n=1/world=0", "--out", str(out)])
    capsys.readouterr()
    main(["run", "tiny", "--out", str(out), "--dry-run", "--engine", "ray", "--workers", "2"])
    said = capsys.readouterr().out
    assert "2 runs to do in 2 tasks, 1 are there" in said
    assert "about 0 s with 2 processes" in said
    assert computed(tiny) == [(0, 0)]


def test_a_failure_is_one_line_and_exit_code_1(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = sweep(TinySetting(str(tiny), "raise"))
    monkeypatch.setitem(benchmarks.sweeps.SWEEPS, "tiny", broken)  # type: ignore[arg-type]
    assert main(["run", "tiny", "--out", str(tmp_path / "out")]) == 1
    errors = capsys.readouterr().err
    assert "failed: tiny/n=1/one, worlds 1 to 1: ValueError: as asked (" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere"], "unknown sweep 'nowhere'"),
        (["run", "tiny", "--workers", "0"], "--workers: expected a positive number"),
        (["run", "tiny", "--worlds", "0"], "--worlds: expected a positive number"),
        (["run", "tiny", "--address", "auto"], "give --engine ray or --engine dask too"),
        (["run", "tiny", "--agent", "nothing"], "--agent: expected MODULE:FUNCTION"),
        (["run", "tiny", "--name", "my/own"], "--name: expected letters, digits"),
        (["list", "tiny/n=7"], "no run matches 'tiny/n=7'"),
    ],
)
def test_bad_usage_is_exit_code_2(
    tiny: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_exit_code_1(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").touch()
    assert main(["run", "tiny", "--out", str(tmp_path / "out")]) == 1
    assert "expected a folder that can be written" in capsys.readouterr().err


def test_list_shows_sweeps_and_runs(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    assert "3 runs  Tiny (1 points, 3 worlds)" in capsys.readouterr().out
    assert main(["list", "tiny/n=1/world=2"]) == 0
    assert capsys.readouterr().out == "tiny/n=1/world=2/learner=one\n"


def test_a_reader_that_has_seen_enough_gets_no_trace() -> None:
    command = f"{sys.executable} -m benchmarks list data_size | head -n 1"
    found = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "data_size/n=500/world=0/learner=logging\n"
    assert found.stderr == ""
