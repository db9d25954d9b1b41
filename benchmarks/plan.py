"""What a sweep is made of: settings, points, and one run for each learner, world and seed.

A sweep is immutable, and a run in it is named by what it is: ``data_size/n=500/world=3/learner=dso``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Protocol

from benchmarks.methods import Method
from benchmarks.rows import Result
from benchmarks.store import Store, digest


class Setting(Protocol):
    """Where learners are compared: a frozen configuration."""

    def perform(self, method: Method, units: Sequence[tuple[int, int]], store: Store) -> list[Result]:
        """Run `method` for each unit, (seed of the world or log, seed of learning), as one problem."""
        ...

    def score(self, result: Result) -> float:
        """Return what figures show of a result."""
        ...

    def quick(self) -> Setting:
        """Return a form that takes a small part of the time and keeps the shape of the figures."""
        ...


@dataclass(frozen=True)
class Point:
    """A setting with the learners that are compared in it.

    Attributes:
        name: ``n=500``; several things that are varied are separated by ``/``.
        x: where it is on the axis.
        setting: the setting.
        methods: learners by name.
    """

    name: str
    x: float
    setting: Setting
    methods: Mapping[str, Method] = field(hash=False)


@dataclass(frozen=True)
class Sweep:
    """Points that make a figure.

    Attributes:
        name: first part of the id of its runs.
        title: of the figure.
        axis: what is varied.
        points: in order.
        worlds: number of worlds, or of logs (seeds 0, 1, 2, ...).
        seeds: number of learning seeds in each.
        world_name: what a world is called in ids.
        chunk: runs that are learned as one problem.
        quick_worlds: number of worlds of the quick form, at most.
        quick_seeds: number of learning seeds of the quick form, at most.
    """

    name: str
    title: str
    axis: str
    points: tuple[Point, ...]
    worlds: int
    seeds: int = 1
    world_name: str = "world"
    chunk: int = 5
    quick_worlds: int = 3
    quick_seeds: int = 2

    def runs(self) -> list[Run]:
        """Return the runs; of those of a point, worlds change fastest."""
        units = list(product(range(self.worlds), range(self.seeds)))
        return [
            Run(self, point, name, world, seed)
            for point in self.points
            for name in point.methods
            for world, seed in units
        ]


@dataclass(frozen=True)
class Run:
    """One learner in one world of a point.

    Attributes:
        sweep: it belongs to.
        point: of the sweep.
        learner: name in the point's methods.
        world: seed of the world, or of the log.
        seed: of learning.
    """

    sweep: Sweep
    point: Point
    learner: str
    world: int
    seed: int

    @property
    def id(self) -> str:
        """``data_size/n=500/world=3/learner=dso``."""
        seed = f"/seed={self.seed}" if self.sweep.seeds > 1 else ""
        return f"{self.sweep.name}/{self.point.name}/{self.sweep.world_name}={self.world}{seed}/learner={self.learner}"

    @property
    def method(self) -> Method:
        """The learner with all its settings."""
        return self.point.methods[self.learner]

    @property
    def key(self) -> str:
        """Digest of everything the result depends on."""
        return digest("result", self.point.setting, self.method, self.world, self.seed)
