"""Run what a selection asks for and the results do not hold yet."""

from __future__ import annotations

import functools
import platform
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import agents
from benchmarks.engines import Engine, Failure
from benchmarks.methods import Method
from benchmarks.plan import Run, Setting
from benchmarks.results import Result, Results, Row, read_rows
from benchmarks.store import JSON, Store


@dataclass(frozen=True)
class Task:
    """Runs of one learner at one point, learned as one problem.

    Attributes:
        setting: of the point.
        method: the learner.
        units: (seed of the world or log, seed of learning) of each run.
        keys: of their results.
        store: folder of what is shared.
        again: forget results that the store has.
        label: what the task is called in messages.
    """

    setting: Setting
    method: Method
    units: tuple[tuple[int, int], ...]
    keys: tuple[str, ...]
    store: Path
    again: bool
    label: str


def perform(task: Task) -> list[Result]:
    """Return the results of a task's runs; those that the store holds are not computed again."""
    # At these sizes the published regressions overfit, and say so every time.
    warnings.simplefilter("ignore", agents.TrainingWarning)
    store = Store(task.store)
    if task.again:
        store.forget("results", task.keys)

    def make(missing: list[int]) -> list[dict[str, object]]:
        found = task.setting.perform(task.method, [task.units[index] for index in missing], store)
        return [result.to_json() for result in found]

    kept = store.many("results", task.keys, make, JSON)
    return [Result.from_json(one.value) for one in kept]


def tasks_of(runs: Sequence[Run], store: Path, *, again: bool = False) -> list[tuple[Task, list[Run]]]:
    """Return the tasks that give the results of `runs`, each with its runs; equal runs of two sweeps are one."""
    unique = {run.key: run for run in runs}

    def problem(run: Run) -> tuple[str, str, str, int]:
        place = (run.world * run.sweep.seeds + run.seed) // run.sweep.chunk
        return run.sweep.name, run.point.name, run.learner, place

    tasks = []
    for (sweep, point, learner, _), group in groupby(unique.values(), problem):
        own = list(group)
        task = Task(
            own[0].point.setting,
            own[0].method,
            tuple((run.world, run.seed) for run in own),
            tuple(run.key for run in own),
            store,
            again,
            f"{sweep}/{point}/{learner}, {own[0].sweep.world_name}s {own[0].world} to {own[-1].world}",
        )
        tasks.append((task, own))
    return tasks


@dataclass
class Outcome:
    """What came of a sweep.

    Attributes:
        known: runs whose rows were there.
        new: rows that were written.
        failures: label of a task, and why it failed.
    """

    known: int
    new: int
    failures: list[tuple[str, Failure]]


def run_all(
    runs: Sequence[Run],
    out: Path,
    engine: Engine,
    *,
    again: bool = False,
    report: Callable[[Task, int, int], None] | None = None,
) -> Outcome:
    """Run what `out` does not hold yet, and append its rows there.

    Args:
        runs: what is wanted.
        out: folder of the results.
        engine: runs the tasks.
        again: run all of them, also those that are known.
        report: called after each task with it, the number of runs done, and that of all to do.

    Raises:
        StorageError: another process writes there, or the disk is full; what was finished is kept.
    """
    with Results(out) as results:
        held = {row.id: row.key for row in read_rows(out)}
        wanted = [run for run in runs if again or held.get(run.id) != run.key]
        by_key = {key: list(group) for key, group in _grouped(wanted)}
        tasks = tasks_of(wanted, out / "store", again=again)
        outcome = Outcome(len(runs) - len(wanted), 0, [])
        for index, found in engine.run(perform, [task for task, _ in tasks]):
            task, own = tasks[index]
            if isinstance(found, Failure):
                outcome.failures.append((task.label, found))
            else:
                rows = [
                    _row(run, result) for first, result in zip(own, found, strict=True) for run in by_key[first.key]
                ]
                results.append(rows)
                outcome.new += len(rows)
            if report is not None:
                report(task, outcome.new, len(wanted))
        results.merge()
    return outcome


def _grouped(runs: Sequence[Run]) -> Iterator[tuple[str, list[Run]]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.key, []).append(run)
    yield from groups.items()


def _row(run: Run, result: Result) -> Row:
    return Row(
        id=run.id,
        sweep=run.sweep.name,
        point=run.point.name,
        x=run.point.x,
        world=run.world,
        seed=run.seed,
        learner=run.learner,
        score=run.point.setting.score(result),
        key=run.key,
        config=f"{run.point.setting!r}; {run.method!r}",
        result=result,
        versions=_versions(),
        commit=_commit(),
        device=_device(),
        finished=datetime.now(UTC).isoformat(timespec="microseconds"),
    )


@functools.cache
def _versions() -> dict[str, str]:
    packages = ("offprompts-env", "torch", "transformers", "numpy", "gymnasium")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


@functools.cache
def _commit() -> str:
    """Return the commit of the source tree, marked if changed since; nothing where there is no such tree."""
    asked = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(
            asked, cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _device() -> str:
    return f"cpu {platform.machine()}"


def elapsed(since: float) -> str:
    """Return the time since `since` (``time.monotonic()``) in words."""
    seconds = round(time.monotonic() - since)
    return f"{seconds} s" if seconds < 120 else f"{seconds / 60:.0f} min"
