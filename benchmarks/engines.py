"""Where tasks run: on the cores of one machine with joblib, or on a Ray or a Dask cluster.

An engine yields what became of each task, in the order in which tasks end. An error of one task is no error of the
others, and neither is the death of its worker: such a task is tried once more, alone to blame if it dies again.
"""

from __future__ import annotations

import os
import signal
import sys
import sysconfig
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Protocol, TypeVar

from joblib import cpu_count
from joblib.externals.loky import ProcessPoolExecutor

from offprompts_env.errors import ConfigError

T = TypeVar("T")
R = TypeVar("R")

THREADS: Mapping[str, str] = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1"
)
"""Environment of workers: one thread each, so that results do not depend on the number of cores either."""

ATTEMPTS = 2
"""How often a task is tried whose worker dies; one that raises is not tried again."""

DIED = (
    "its worker process died, twice: killed from outside, out of memory, or a crash in native code; see that memory "
    "suffices (fewer --workers), then run the same command again: it makes only what is missing"
)


@dataclass(frozen=True)
class Failure:
    """What became of a task that raised, or whose worker died.

    Attributes:
        message: one line.
        trace: the whole traceback, where there is one.
        kind: name of the error's class.
    """

    message: str
    trace: str = ""
    kind: str = ""


class Engine(Protocol):
    """Runs tasks, in any order and in other processes."""

    @property
    def workers(self) -> int:
        """How many processes; -1 is one a core."""
        ...

    def run(self, work: Callable[[T], R], tasks: Sequence[T]) -> Iterator[tuple[int, R | Failure]]:
        """Yield (index of the task, what `work` returned or why it did not) as tasks end.

        Closing the iterator stops what still runs.
        """
        ...


def guarded(work: Callable[[T], R], task: T) -> R | Failure:
    """Return what `work` makes of a task, or why it failed: an error of one task is no error of the others."""
    try:
        return work(task)
    except Exception as error:
        return failure(error)


def failure(error: BaseException) -> Failure:
    """Return `error` as a record that crosses processes."""
    kind = type(error).__name__
    message = " ".join(f"{kind}: {error}".split())
    return Failure(message, "".join(traceback.format_exception(error)), kind)


def processes(workers: int) -> int:
    """Return the number of processes that `workers` means here.

    Raises:
        ConfigError: it means none.
    """
    if workers == 0 or workers < -1:
        raise ConfigError(f"--workers: expected a positive number, or -1 for one a core, got {workers}")
    return int(cpu_count()) if workers == -1 else workers


def search_path() -> list[str]:
    """Return where Python finds modules here beyond its own installation: `benchmarks` and own agents."""
    own = [Path(place) for place in sysconfig.get_paths().values()]
    entries = dict.fromkeys(Path(entry or ".").resolve() for entry in sys.path)
    return [str(e) for e in entries if e.exists() and not any(e.is_relative_to(place) for place in own)]


def _settle() -> None:
    """Make this worker leave interrupts to the main process, and end with it however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def no_interrupts_for_children() -> Iterator[None]:
    """Let processes that start meanwhile never see Ctrl-C, not even before they settle; it reaches this one after."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # Started later by the first pool, Python's tracker of semaphores would let interrupts through again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _pool() -> Any:
    # loky starts a fresh interpreter with the search path and the working directory of this one.
    return ProcessPoolExecutor(max_workers=1, env=dict(THREADS), initializer=_settle)


@dataclass(frozen=True)
class Joblib:
    """Worker processes on this machine.

    Each is a pool of its own of joblib's executor, loky: what a dying process takes with it is the one task it had.

    Attributes:
        workers: how many; -1 is one a core.
    """

    workers: int = -1

    def run(self, work: Callable[[T], R], tasks: Sequence[T]) -> Iterator[tuple[int, R | Failure]]:
        """See :class:`Engine`.

        Raises:
            ConfigError: the number of workers.
        """
        waiting = deque((index, 1) for index in range(len(tasks)))
        free = [_pool() for _ in range(min(processes(self.workers), len(tasks)))]
        running: dict[Future[Any], tuple[Any, int, int]] = {}
        try:
            while waiting or running:
                while waiting and free:
                    pool, (index, attempt) = free.pop(), waiting.popleft()
                    with no_interrupts_for_children():
                        running[pool.submit(guarded, work, tasks[index])] = pool, index, attempt
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    pool, index, attempt = running.pop(future)
                    error = future.exception()
                    if not isinstance(error, BrokenProcessPool):
                        free.append(pool)
                        yield index, future.result() if error is None else failure(error)
                        continue
                    _stop(pool)
                    free.append(_pool())
                    if attempt < ATTEMPTS:
                        waiting.appendleft((index, attempt + 1))
                    else:
                        yield index, Failure(DIED)
            while free:
                # Idle, it ends by itself and takes its semaphores along; killed, it would be said to leak them.
                free.pop().shutdown(wait=True)
        finally:
            for pool in [*free, *(pool for pool, _, _ in running.values())]:
                _stop(pool)


def _stop(pool: Any) -> None:
    # A pool whose process is gone already may say so in its own way.
    with suppress(OSError, RuntimeError, AttributeError):
        pool.shutdown(wait=True, kill_workers=True)
