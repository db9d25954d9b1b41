"""Engines for more than one machine: Ray and Dask, on an existing cluster or on one that is started here.

Machines of a cluster need the same Python environment and a folder of results that all of them reach under one path.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.engines import (
    ATTEMPTS,
    DIED,
    THREADS,
    Failure,
    failure,
    guarded,
    no_interrupts_for_children,
    processes,
    search_path,
)
from offprompts_env.errors import ConfigError, missing_dependency

T = TypeVar("T")
R = TypeVar("R")

# Tasks are a few kilobytes, their results as many: what they share goes through files.
_OBJECT_STORE = 100 * 1024**2


# Ray prints the reason of a refusal itself and raises no more than that it could not connect.
_HINTS = {"Ray": " (where it asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN here too)", "Dask": ""}


def _environment() -> dict[str, str]:
    return {**THREADS, "PYTHONPATH": os.pathsep.join(search_path())}


def _unreachable(engine: str, address: str, error: BaseException) -> ConfigError:
    return ConfigError(
        f"--address {address}: expected a running {engine} cluster, got {type(error).__name__}: {error}; "
        f"start one{_HINTS[engine]}, or leave --address out to use this machine"
    )


@dataclass(frozen=True)
class Ray:
    """A Ray cluster.

    Attributes:
        workers: processes of a cluster that is started here; -1 is one a core. An existing one has its own.
        address: of an existing cluster, ``HOST:6379`` or ``auto``.
    """

    workers: int = -1
    address: str | None = None

    def run(self, work: Callable[[T], R], tasks: Sequence[T]) -> Iterator[tuple[int, R | Failure]]:
        """See :class:`benchmarks.engines.Engine`.

        Raises:
            MissingDependencyError: Ray is not installed.
            ConfigError: no cluster answers at the address.
        """
        try:
            import ray
        except ImportError as error:
            raise missing_dependency("ray", "ray", "the engine ray") from error
        with self._connected(ray):
            remote: Any = ray.remote(num_cpus=1, max_retries=ATTEMPTS - 1)(guarded)
            waiting = {remote.remote(work, task): index for index, task in enumerate(tasks)}
            try:
                while waiting:
                    for done in ray.wait(list(waiting), num_returns=1)[0]:
                        yield waiting.pop(done), _ray_result(ray, done)
            finally:
                for reference in waiting:
                    ray.cancel(reference, force=True)

    @contextmanager
    def _connected(self, ray: Any) -> Iterator[None]:
        # Ray puts a handler of its own in place of ours.
        on_terminate = signal.getsignal(signal.SIGTERM)
        place = {"address": self.address} if self.address else {
            "num_cpus": processes(self.workers), "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE, "address": "local",
        }  # fmt: skip
        try:
            if self.address not in (None, "auto"):
                _knock(self.address)
            ray.init(**place, log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": _environment()})
        except (OSError, RuntimeError, ValueError) as error:
            if self.address is None:
                raise
            raise _unreachable("Ray", self.address, error) from error
        try:
            with suppress(ValueError):  # not in the main thread
                signal.signal(signal.SIGTERM, on_terminate)
            yield
        finally:
            ray.shutdown()


def _knock(address: str) -> None:
    """Raise OSError where nothing listens; Ray itself would try for minutes."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    socket.create_connection((host, int(port)), timeout=10).close()


def _ray_result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError) as error:
        return Failure(DIED, str(error))
    except Exception as error:
        return failure(error)


@dataclass(frozen=True)
class Dask:
    """A Dask cluster.

    Attributes:
        workers: processes of a cluster that is started here; -1 is one a core. An existing one has its own; give its
            workers one thread each (``dask worker --nthreads 1``).
        address: of an existing scheduler, ``tcp://HOST:8786``.
    """

    workers: int = -1
    address: str | None = None

    def run(self, work: Callable[[T], R], tasks: Sequence[T]) -> Iterator[tuple[int, R | Failure]]:
        """See :class:`benchmarks.engines.Engine`.

        Raises:
            MissingDependencyError: Dask is not installed.
            ConfigError: no scheduler answers at the address.
        """
        try:
            import distributed
        except ImportError as error:
            raise missing_dependency("distributed", "dask", "the engine dask") from error
        with self._connected(distributed) as client:
            suspects = []
            for index, found in _submitted(distributed, client, work, dict(enumerate(tasks))):
                if isinstance(found, Failure) and found.message == DIED:
                    suspects.append(index)
                else:
                    yield index, found
            # Dask blames a death on all tasks that the worker held, run or not: each gets a worker to itself.
            for index in suspects:
                yield from _submitted(distributed, client, work, {index: tasks[index]})

    @contextmanager
    def _connected(self, distributed: Any) -> Iterator[Any]:
        import dask

        if self.address is not None:
            try:
                client = distributed.Client(self.address, timeout=30)
            except (OSError, ValueError) as error:
                raise _unreachable("Dask", self.address, error) from error
            with client:
                client.register_plugin(_fresh_modules(search_path(), str(Path.cwd())))
                yield client
            return
        with ExitStack() as stack:
            stack.enter_context(dask.config.set({"distributed.scheduler.allowed-failures": 0}))
            # Started first, as it lets interrupts through again where it is started.
            resource_tracker.ensure_running()
            with no_interrupts_for_children():
                cluster = distributed.LocalCluster(
                    n_workers=processes(self.workers), threads_per_worker=1, host="127.0.0.1", dashboard_address=None,
                    silence_logs="CRITICAL", env=_environment(),
                )  # fmt: skip
            stack.enter_context(cluster)
            yield stack.enter_context(distributed.Client(cluster))


def _submitted(
    distributed: Any, client: Any, work: Callable[[T], R], tasks: Mapping[int, T]
) -> Iterator[tuple[int, R | Failure]]:
    job = _job()
    futures = {
        client.submit(job, pickle.dumps((guarded, work, task)), pure=False): index for index, task in tasks.items()
    }
    try:
        endings: Any = distributed.as_completed(list(futures))
        for done in endings:
            yield futures.pop(done), _dask_result(distributed, done)
    finally:
        if futures:
            with suppress(Exception):  # the cluster may be what ended
                client.cancel(list(futures), force=True)


def _dask_result(distributed: Any, future: Any) -> Any:
    try:
        return pickle.loads(future.result())
    except distributed.scheduler.KilledWorker as error:
        return Failure(DIED, str(error))
    except Exception as error:
        return failure(error)


def _job() -> Callable[[bytes], bytes]:
    # A function in a function crosses by value, and bytes stay bytes until a worker has them: a scheduler of others
    # reads what it hands on, and cannot import our modules.
    def job(content: bytes) -> bytes:
        import pickle

        guard, work, task = pickle.loads(content)
        return pickle.dumps(guard(work, task))

    return job


def _fresh_modules(paths: list[str], project: str) -> Any:
    """Return a plugin for workers of an existing cluster, which live longer than a sweep.

    They are told where modules are, and forget those of the project at hand: an agent that was changed since they first
    imported it would otherwise run in its old form.
    """
    from distributed import WorkerPlugin

    class FreshModules(WorkerPlugin):
        name = f"offprompts-{os.getpid()}-{id(paths)}"

        def setup(self, worker: Any) -> None:
            import sys
            import sysconfig
            from pathlib import Path

            sys.path += [path for path in paths if path not in sys.path]
            # The project may be a home folder with Python itself in it.
            installed = [Path(place) for place in sysconfig.get_paths().values()]
            for name, module in list(sys.modules.items()):
                file = Path(getattr(module, "__file__", None) or "")
                foreign = {"site-packages", "dist-packages"} & {*file.parts} or any(map(file.is_relative_to, installed))
                if file.is_relative_to(project) and not foreign and name != "__main__":
                    del sys.modules[name]

    return FreshModules()
