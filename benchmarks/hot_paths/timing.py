"""A figure of the speed table, and how the time of some work is taken."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Figure:
    """One row of the table.

    Attributes:
        name: what was measured.
        value: how fast, in `unit`.
        unit: of value, target and limit.
        better: whether a higher or a lower value is better.
        target: what the project promises.
        limit: what the machine could reach, measured in the same run.
        limit_is: what that limit is.
    """

    name: str
    value: float
    unit: str
    better: Literal["higher", "lower"]
    target: float
    limit: float
    limit_is: str

    @property
    def met(self) -> bool:
        """Whether the target is reached."""
        return self.value >= self.target if self.better == "higher" else self.value <= self.target

    @property
    def share(self) -> float:
        """Share of the limit reached."""
        return self.value / self.limit if self.better == "higher" else self.limit / self.value


def seconds(work: Callable[[], object], repeat: int = 5) -> float:
    """Return the shortest wall time of `repeat` runs of `work`, after one run that is not counted."""
    work()
    best = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def fastest(make: Callable[[], Callable[[], object]], repeat: int) -> float:
    """Return the shortest wall time of what `make` makes: fresh work each time, where work learns."""
    best = float("inf")
    for _ in range(repeat):
        work = make()
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def matmul_flops() -> float:
    """Return float32 FLOP/s of a large matrix product on one core."""
    import torch

    torch.set_num_threads(1)
    a = torch.rand(1024, 1024)
    return 2 * 1024**3 / seconds(lambda: a @ a, 9)
