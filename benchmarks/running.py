"""Run what a selection asks for and the results do not hold yet."""

from __future__ import annotations

import functools
import platform
import re
import subprocess
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, Self

import agents
from benchmarks.engines import Engine, Failure, guarded, processes
from benchmarks.methods import Method
from benchmarks.plan import Run, Setting
from benchmarks.progress import Progress
from benchmarks.rows import Result, Results, Row, read_rows
from benchmarks.store import JSON, Codec, Store, StoreError

PACKAGE = "offprompts-env"


@dataclass(frozen=True)
class Task:
    """Runs of one learner at one point, learned as one problem.

    Attributes:
        setting: of the point.
        method: the learner.
        units: (seed of the world or log, seed of learning) of each run.
        keys: of their results.
        store: folder of what is shared.
        since: what the store has from before, results and what they share, is made again; 0 keeps all.
        label: what the task is called in messages.
    """

    setting: Setting
    method: Method
    units: tuple[tuple[int, int], ...]
    keys: tuple[str, ...]
    store: Path
    since: int
    label: str


@dataclass(frozen=True)
class Made:
    """A result with where it comes from, which is kept with it: rows may be written by a later version.

    Attributes:
        result: what a run gave.
        versions, commit, device: as in :class:`benchmarks.rows.Row`.
    """

    result: Result
    versions: Mapping[str, str]
    commit: str
    device: str

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Inverse of ``dataclasses.asdict``."""
        return cls(**{**value, "result": Result.from_json(value["result"])})


_MADE: Codec[Made] = Codec(
    lambda made, folder: JSON.write(asdict(made), folder), lambda folder: Made.from_json(JSON.read(folder))
)


@dataclass(frozen=True)
class Done:
    """What came of a task.

    Attributes:
        made: one a run.
        seconds: wall time; None where the store held some of it.
    """

    made: tuple[Made, ...]
    seconds: float | None


def perform(task: Task) -> Done:
    """Return the results of a task's runs; those that the store holds are not computed again."""
    # At these sizes the published regressions overfit, and say so every time.
    warnings.simplefilter("ignore", agents.TrainingWarning)
    store, started, computed = Store(task.store, task.since), time.monotonic(), 0

    def make(missing: list[int]) -> list[Made]:
        nonlocal computed
        computed = len(missing)
        found = task.setting.perform(task.method, [task.units[index] for index in missing], store)
        wall = (time.monotonic() - started) / len(missing)
        return [Made(replace(result, wall_seconds=wall), _versions(), _commit(), _device()) for result in found]

    kept = store.many("results", task.keys, make, _MADE)
    whole = computed == len(task.keys)
    return Done(tuple(one.value for one in kept), time.monotonic() - started if whole else None)


@dataclass(frozen=True)
class Plan:
    """What is to be done for a selection of runs.

    Attributes:
        wanted: runs that are not known.
        known: rows that are.
        replaced: number of rows of other settings, or made anew, that new ones take the place of.
        seconds: processor seconds of a run, by learner, in the rows that are there.
    """

    wanted: tuple[Run, ...]
    known: tuple[Row, ...]
    replaced: int
    seconds: Mapping[str, float]

    @property
    def other_versions(self) -> dict[str, int]:
        """Number of known rows by the version of this package that made them, where that is another one."""
        found = Counter(row.versions.get(PACKAGE, "unknown") for row in self.known)
        return {name: count for name, count in found.items() if name != version(PACKAGE)}


def plan(runs: Sequence[Run], rows: Sequence[Row], *, again: bool = False) -> Plan:
    """Return what of `runs` the `rows` hold, and what is to be done."""
    held = {row.id: row for row in rows}
    keys = {run.id: run.key for run in runs}
    known = {} if again else {name: held[name] for name, key in keys.items() if name in held and held[name].key == key}
    wanted = tuple(run for run in runs if run.id not in known)
    spent: dict[str, list[float]] = {}
    for row in rows:
        spent.setdefault(row.learner, []).append(row.result.seconds)
    seconds = {learner: sum(all_) / len(all_) for learner, all_ in spent.items()}
    return Plan(wanted, tuple(known.values()), sum(run.id in held for run in wanted), seconds)


def tasks_of(runs: Sequence[Run], store: Path, *, since: int = 0) -> list[tuple[Task, list[Run]]]:
    """Return the tasks that give the results of `runs`, each with its runs; equal runs of two sweeps are one."""
    unique: dict[str, Run] = {}
    for run in runs:
        unique.setdefault(run.key, run)

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
            since,
            f"{sweep}/{point}/{learner}, {own[0].sweep.world_name}s {own[0].world} to {own[-1].world}",
        )
        tasks.append((task, own))
    return tasks


@dataclass
class Outcome:
    """What came of a sweep.

    Attributes:
        plan: what was to be done.
        new: rows that were written.
        failures: label of a task, why it failed, and the file that says more.
    """

    plan: Plan
    new: int = 0
    failures: list[tuple[str, Failure, Path]] = field(default_factory=list)


def run_all(
    runs: Sequence[Run], out: Path, engine: Engine, *, again: bool = False, progress: Progress | None = None
) -> Outcome:
    """Run what `out` does not hold yet, and append its rows there.

    Args:
        runs: what is wanted.
        out: folder of the results.
        engine: runs the tasks.
        again: run all of them, also those that are known, and make anew what they share.
        progress: is told of each task.

    Raises:
        StorageError: another process writes there, or the disk is full; what was finished is kept.
    """
    out = out.resolve()  # workers may have another working directory
    shown = progress or Progress()
    with Results(out) as results:
        outcome = Outcome(plan(runs, read_rows(out), again=again))
        since = Store(out / "store").now() if again else 0
        tasks = tasks_of(outcome.plan.wanted, out / "store", since=since)
        waiting = Counter(run.learner for _, own in tasks for run in own)
        shown.start(waiting, outcome.plan.seconds, processes(engine.workers))
        try:
            _run_tasks(tasks, outcome, results, engine, shown)
        finally:
            shown.close()
        results.merge()
    return outcome


def _run_tasks(
    tasks: Sequence[tuple[Task, list[Run]]], outcome: Outcome, results: Results, engine: Engine, progress: Progress
) -> None:
    by_key: dict[str, list[Run]] = {}
    for run in outcome.plan.wanted:
        by_key.setdefault(run.key, []).append(run)
    with closing(engine.run(perform, [task for task, _ in tasks])) as endings:  # type: ignore[type-var]
        for index, found in endings:
            task, own = tasks[index]
            pairs = [(run, place) for place, first in enumerate(own) for run in by_key[first.key]]
            trace = results.root / "failures" / f"{re.sub(r'[^A-Za-z0-9_.=+-]+', '_', task.label)}.txt"
            # A setting that cannot score a result fails this task alone.
            rows = found if isinstance(found, Failure) else guarded(functools.partial(_rows, pairs), found)
            if isinstance(rows, Failure):
                if rows.kind == StoreError.__name__:
                    raise StoreError(rows.message.removeprefix(f"{rows.kind}: "))
                _note(trace, task, rows)
                outcome.failures.append((task.label, rows, trace))
            else:
                results.append(rows)
                outcome.new += len(rows)
                trace.unlink(missing_ok=True)
            seconds = None if isinstance(found, Failure) else found.seconds
            progress.ended(task.label, own[0].learner, len(own), seconds)


def _note(file: Path, task: Task, failed: Failure) -> None:
    try:
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"{task.label}\n{task!r}\n\n{failed.message}\n\n{failed.trace}", encoding="utf-8")
    except OSError as error:
        warnings.warn(f"{file}: cannot be written: {error}; {failed.message}\n{failed.trace}", stacklevel=2)


def _rows(pairs: Sequence[tuple[Run, int]], done: Done) -> list[Row]:
    return [_row(run, done.made[place]) for run, place in pairs]


def _row(run: Run, made: Made) -> Row:
    return Row(
        id=run.id,
        sweep=run.sweep.name,
        point=run.point.name,
        x=run.point.x,
        world=run.world,
        seed=run.seed,
        learner=run.learner,
        score=run.point.setting.score(made.result),
        key=run.key,
        config=f"{run.point.setting!r}; {run.method!r}",
        result=made.result,
        versions=made.versions,
        commit=made.commit,
        device=made.device,
        finished=datetime.now(UTC).isoformat(timespec="microseconds"),
    )


@functools.cache
def _versions() -> dict[str, str]:
    packages = (PACKAGE, "torch", "transformers", "numpy", "gymnasium")
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
