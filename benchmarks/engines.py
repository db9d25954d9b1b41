"""Where tasks run: on the cores of one machine with joblib, or on a Ray or a Dask cluster."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from joblib import Parallel, delayed, parallel_config

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Failure:
    """What became of a task that raised, or whose worker died.

    Attributes:
        message: one line.
        trace: the whole traceback, where there is one.
    """

    message: str
    trace: str = ""


class Engine(Protocol):
    """Runs tasks, in any order and in other processes."""

    def run(self, work: Callable[[T], R], tasks: Sequence[T]) -> Iterator[tuple[int, R | Failure]]:
        """Yield (index of the task, what `work` returned or why it did not) as tasks end."""
        ...


def guarded(work: Callable[[T], R], index: int, task: T) -> tuple[int, R | Failure]:
    """Return what `work` makes of a task, or why it failed: an error of one task is no error of the others."""
    try:
        return index, work(task)
    except Exception as error:
        return index, Failure(f"{type(error).__name__}: {error}", traceback.format_exc())


@dataclass(frozen=True)
class Joblib:
    """Worker processes on this machine, one thread each.

    Attributes:
        workers: how many; -1 is one a core.
    """

    workers: int = -1

    def run(self, work: Callable[[T], R], tasks: Sequence[T]) -> Iterator[tuple[int, R | Failure]]:
        """See :class:`Engine`."""
        with parallel_config(backend="loky", n_jobs=self.workers, inner_max_num_threads=1):
            pool: Any = Parallel(return_as="generator_unordered", pre_dispatch="2*n_jobs", batch_size=1)
            yield from pool(delayed(guarded)(work, index, task) for index, task in enumerate(tasks))
