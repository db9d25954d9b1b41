"""Settings of no training at all, which fail in every way a sweep can meet. In a file: workers import it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.methods import Logging, Method
from benchmarks.plan import Point, Run, Sweep
from benchmarks.rows import Result
from benchmarks.store import JSON, Store, digest


@dataclass(frozen=True)
class TinySetting:
    """Gives the world's number; leaves a mark in `marks` for each computation.

    Attributes:
        marks: folder.
        fault: "raise", "die" (always), "die once", "storage", "wait" until a file ``go`` is in `marks`.
        world: the world with the fault.
        scale: of the results.
    """

    marks: str
    fault: str = ""
    world: int = 1
    scale: float = 1.0

    def perform(self, method: Method, units: Sequence[tuple[int, int]], store: Store) -> list[Result]:
        marks = Path(self.marks)
        for world, seed in units:
            if self.fault and world == self.world:
                self._fail(marks, store)
            (marks / f"{world}-{seed}-{time.time_ns()}").touch()
        return [Result(self.scale * world + seed, 0.0, {"uniform": 0.0}) for world, seed in units]

    def _fail(self, marks: Path, store: Store) -> None:
        if self.fault == "raise":
            raise ValueError("as asked")
        if self.fault == "storage":
            store.one("stage", digest("blocked"), lambda: 1, JSON)
        if self.fault == "die" or (self.fault == "die once" and not (marks / "died").exists()):
            (marks / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "wait":
            (marks / f"waiting-{os.getpid()}").touch()
            while not (marks / "go").exists():
                time.sleep(0.05)

    def score(self, result: Result) -> float:
        return result.value

    def quick(self) -> TinySetting:
        return self


def computed(marks: Path) -> list[tuple[int, int]]:
    """Return (world, seed) of each computation so far."""
    names = sorted(file.name for file in marks.iterdir() if file.name.count("-") == 2)
    return [(int(name.split("-")[0]), int(name.split("-")[1])) for name in names]


def sweep(setting: TinySetting, worlds: int = 3, learners: Sequence[str] = ("one",), name: str = "tiny") -> Sweep:
    """Return a sweep of one point, a task a world."""
    methods = {learner: Logging() for learner in learners}
    return Sweep(name, "Tiny", "nothing", (Point("n=1", 1.0, setting, methods),), worlds=worlds, chunk=1)


def runs(setting: TinySetting, worlds: int = 3) -> list[Run]:
    """Return the runs of :func:`sweep`."""
    return sweep(setting, worlds).runs()
