"""The speed of sweeps beside what they run: tasks, rows, and the store."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq
from joblib.externals.loky import ProcessPoolExecutor

from benchmarks.engines import Joblib
from benchmarks.hot_paths.timing import Figure, seconds
from benchmarks.methods import Logging, Method
from benchmarks.plan import Point, Sweep
from benchmarks.rows import Result, Results, Row, read_rows, rows_bytes
from benchmarks.running import run_all
from benchmarks.store import Store


@dataclass(frozen=True)
class _Nothing:
    """A setting that costs nothing."""

    def perform(self, method: Method, units: Sequence[tuple[int, int]], store: Store) -> list[Result]:
        return [Result(0.0, 0.0) for _ in units]

    def score(self, result: Result) -> float:
        return result.value

    def quick(self) -> _Nothing:
        return self


def _echo(number: int) -> int:
    return number


def _rows(n: int) -> list[Row]:
    curve = tuple(float(step) for step in range(10))
    result = Result(0.5, 0.01, {"uniform": 0.0, "oracle": 1.0}, tuple(range(10)), curve)
    row = Row(
        "", "speed", "n=1", 1.0, 0, 0, "dso", 0.5, "0" * 32, "setting; " * 40, result, {"torch": "2"}, "", "cpu", ""
    )
    return [replace(row, id=f"speed/n=1/world={world}/learner=dso", world=world) for world in range(n)]


def sweeping(tasks: int = 300, rows: int = 5_000) -> list[Figure]:
    """What a run costs beside its learner: one task a run on one worker; rows appended one by one and read at once."""
    point = Point("n=1", 1.0, _Nothing(), {"logging": Logging()})
    sweep = Sweep("speed", "nothing", "nothing", (point,), tasks, chunk=1)
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(max_workers=1) as pool:
        few, many = Path(folder) / "few", Path(folder) / "many"

        def overhead(runs: int, out: Path) -> float:
            started = time.perf_counter()
            run_all(sweep.runs()[:runs], out, Joblib(1))
            return time.perf_counter() - started

        # The start of the worker, which imports torch, is in both.
        run = (overhead(tasks, many) - overhead(1, few)) / (tasks - 1)
        bare = seconds(lambda: [pool.submit(_echo, index).result() for index in range(tasks)], 3) / tasks
        held, own = _rows(rows), Path(folder) / "rows"
        with Results(own) as results:
            append = seconds(lambda: results.append(held[:1]), 50)
        file, content = Path(folder) / "bytes", rows_bytes(held[:1])
        write = seconds(lambda: file.write_bytes(content), 50)
        with Results(Path(folder) / "all") as results:
            results.append(held)
        read = seconds(lambda: read_rows(Path(folder) / "all"), 3)
        (whole,) = (Path(folder) / "all" / "rows").glob("*.parquet")
        table = seconds(lambda: pq.read_table(whole).to_pylist(), 3)
    return [
        Figure("a run's overhead in a sweep", 1e3 * run, "ms", "lower", 50, 1e3 * bare, "sending a number to a worker"),
        Figure("appending a row", 1e3 * append, "ms", "lower", 20, 1e3 * write, "writing its bytes, not synced"),
        Figure("reading 5,000 rows", 1e3 * read, "ms", "lower", 1000, 1e3 * table, "pyarrow alone, to Python objects"),
    ]
