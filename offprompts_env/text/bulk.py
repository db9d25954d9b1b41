"""Writing many sentences ahead of time: a plan of shards, engines that write them, one store that keeps them.

Sentences are those that a :class:`~offprompts_env.text.cache.SampleTable` of the plan's seed would write when asked, so
an environment with this store and as many slots asks its language model nothing more.

Workers write and embed; the process that began the run is the only one that puts into the store, a shard at a time. So
a worker that dies costs its current shard, which another one gets; a run that is stopped costs the shards under way;
and the same call goes on with what is missing. A shard that the store could not take (full disk) ends the run and stays
held by the store object: the next :func:`plan` over it puts it first.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import get_context
from typing import Any, Protocol

from offprompts_env.config import check_integer
from offprompts_env.errors import ModelError, missing_dependency
from offprompts_env.text.cache import table_series
from offprompts_env.text.freezing import frozen_sentences
from offprompts_env.text.prompted import TextOutputModel
from offprompts_env.text.store import SentenceStore
from offprompts_env.text.tokens import TokenCount, counting
from offprompts_env.types import FloatArray

MakeOutputs = Callable[[], TextOutputModel]

# A shard that loses so many workers is given up: it is likely what kills them.
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Shard:
    """A part of the work that is written and kept as a whole: (request, sample) pairs, n of them."""

    number: int
    requests: tuple[str, ...]
    samples: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What to write.

    Attributes:
        model: fingerprint of the language model.
        seed: of the sample table.
        requests: different requests.
        samples: K of each.
        shards: what is missing, in shards.
    """

    model: str
    seed: int
    requests: int
    samples: int
    shards: tuple[Shard, ...]

    def bare(self) -> Plan:
        """Return it without the shards: what a worker has to know besides its own."""
        return replace(self, shards=())

    @property
    def missing(self) -> int:
        """Sentences still to write."""
        return sum(len(shard.samples) for shard in self.shards)

    @property
    def found(self) -> int:
        """Sentences that are in the store already."""
        return self.requests * self.samples - self.missing


@dataclass(frozen=True, slots=True)
class BulkReport:
    """What a run did.

    Attributes:
        found: sentences that were there before.
        written: sentences written.
        seconds: wall time.
        characters_in: of the requests that were answered, each sentence counting its request.
        characters_out: of the sentences.
        counted: tokens that the language model has read and written, sentences that were thrown away included; None
            where it does not count them all. Those of a shard that lost its worker are not known.
        lost_workers: workers that died, each at the cost of its shard.
        references: how many of the sentences are references without a prompt, which somebody else wrote.
    """

    found: int
    written: int
    seconds: float
    characters_in: int
    characters_out: int
    counted: TokenCount | None
    lost_workers: int
    references: int = 0

    @classmethod
    def of_nothing(cls) -> BulkReport:
        """Return that of a run that had nothing to do."""
        return cls(0, 0, 0.0, 0, 0, TokenCount(), 0)

    def __add__(self, other: BulkReport) -> BulkReport:
        """Return what two runs, one after the other, did."""
        both = self.counted is not None and other.counted is not None
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "counted"}
        return BulkReport(**sums, counted=self.counted + other.counted if both else None)  # type: ignore[operator]

    @property
    def sentences_per_second(self) -> float:
        """Throughput; 0 where nothing was written."""
        return self.written / self.seconds if self.written else 0.0

    @property
    def tokens_in(self) -> int:
        """Tokens read: counted, or else a quarter of the characters, as is usual in English."""
        return self.characters_in // 4 if self.counted is None else self.counted.read

    @property
    def tokens_out(self) -> int:
        """Tokens written, as :attr:`tokens_in`."""
        return self.characters_out // 4 if self.counted is None else self.counted.written

    def to_json(self) -> dict[str, Any]:
        """Return it JSON-able."""
        return {
            **asdict(self),
            "counted": self.counted is not None,
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "sentences_per_second": self.sentences_per_second,
        }


def plan(
    outputs: TextOutputModel,
    requests: Sequence[str],
    store: SentenceStore,
    *,
    samples: int,
    seed: int = 0,
    shard_size: int = 1024,
) -> Plan:
    """Return what is missing in `store` of `samples` sentences of each request, in shards.

    Samples of one request stay together, and requests in the order given: a language model reads what they share once.

    Args:
        outputs: what will write them.
        requests: full requests; those given twice count once.
        store: where they will be kept.
        samples: K; one where the model is deterministic.
        seed: of the sample table.
        shard_size: sentences a shard, about.

    Raises:
        ConfigError: a number is out of range.
        StorageError: the store cannot be read, or cannot take what it still holds of an earlier run.
    """
    check_integer("samples", samples, 1)
    check_integer("shard_size", shard_size, 1)
    check_integer("seed", seed, 0)
    store.save()
    kept = 1 if outputs.deterministic else samples
    unique = list(dict.fromkeys(requests))
    each = max(1, shard_size // kept)
    shards: list[Shard] = []
    for start in range(0, len(unique), each):
        names = [request for request in unique[start : start + each] for _ in range(kept)]
        index = list(range(kept)) * (len(names) // kept)
        missing = store.missing(outputs.fingerprint, table_series(seed), names, index)
        if missing:
            shards.append(Shard(len(shards), tuple(names[i] for i in missing), tuple(index[i] for i in missing)))
    return Plan(outputs.fingerprint, seed, len(unique), kept, tuple(shards))


@dataclass(frozen=True, eq=False)
class Written:
    """A shard's sentences; embeddings (n, d_o) and the encoder's fingerprint where it has one; tokens if counted."""

    sentences: list[str]
    encoder: str | None
    embeddings: FloatArray | None
    tokens: TokenCount | None


class WorkerLostError(Exception):
    """A worker died while it wrote."""


class Worker(Protocol):
    """Writes one shard at a time."""

    def write(self, shard: Shard, planned: Plan) -> Written:
        """Return what a shard asks for.

        Raises:
            ModelError: the worker has another model than the plan.
            WorkerLostError: it died; another one may try.
        """
        ...

    def close(self) -> None:
        """Stop it."""
        ...


class Engine(Protocol):
    """Makes workers."""

    @property
    def workers(self) -> int:
        """How many write at once."""
        ...

    def prepare(self) -> None:
        """Do, once and first, what all workers need."""
        ...

    def start(self, make: MakeOutputs) -> Worker:
        """Return a new worker that writes with what `make` makes."""
        ...


@dataclass(frozen=True)
class Here:
    """Write in this process; for a model that uses all cores, an accelerator, or a server."""

    workers: int = 1

    def prepare(self) -> None:
        """Nothing."""

    def start(self, make: MakeOutputs) -> Worker:
        """Return a worker that is this process."""
        return _Inside(make())


@dataclass(frozen=True)
class Processes:
    """Write in processes of this machine, one thread each; every one loads the model."""

    workers: int = 2

    def __post_init__(self) -> None:
        check_integer("workers", self.workers, 1)

    def prepare(self) -> None:
        """Nothing."""

    def start(self, make: MakeOutputs) -> Worker:
        """Return a worker in a new process."""
        return _InProcess(make)


@dataclass(frozen=True)
class RayCluster:
    """Write in actors of a Ray cluster (extra ``ray``).

    Attributes:
        workers: actors.
        address: of the cluster, ``"auto"`` for the one this machine belongs to; None starts one here.
        num_gpus: accelerators an actor.
    """

    workers: int = 2
    address: str | None = None
    num_gpus: float = 0

    def __post_init__(self) -> None:
        check_integer("workers", self.workers, 1)

    def prepare(self) -> None:
        """Connect to the cluster, or start one.

        Raises:
            MissingDependencyError: Ray is not installed.
        """
        try:
            import ray
        except ImportError as error:
            raise missing_dependency("ray", "ray", "generating on a Ray cluster") from error
        if ray.is_initialized():
            return
        if self.address is None:
            ray.init(log_to_driver=False, num_cpus=self.workers, include_dashboard=False, _node_ip_address="127.0.0.1")
        else:
            ray.init(address=self.address, log_to_driver=False)

    def start(self, make: MakeOutputs) -> Worker:
        """Return a worker that is an actor."""
        return _Actor(make, self.num_gpus)


class _Inside:
    def __init__(self, outputs: TextOutputModel) -> None:
        self.outputs = outputs

    def write(self, shard: Shard, planned: Plan) -> Written:
        if self.outputs.fingerprint != planned.model:
            raise ModelError(
                f"bulk generation: expected a worker with the model {planned.model} of the plan, got one with "
                f"{self.outputs.fingerprint}; load the same weights and settings everywhere"
            )
        sentences, tokens = counting(
            self.outputs,
            lambda: frozen_sentences(self.outputs, shard.requests, shard.samples, planned.seed, None),
        )
        encoder = getattr(self.outputs, "encoder_fingerprint", None)
        return Written(sentences, encoder, None if encoder is None else self.outputs.embed(sentences), tokens)

    def close(self) -> None:
        pass


_in_worker: _Inside


def _begin(make: MakeOutputs) -> None:
    global _in_worker
    import torch

    torch.set_num_threads(1)
    _in_worker = _Inside(make())


def _write_in_worker(shard: Shard, planned: Plan) -> Written:
    return _in_worker.write(shard, planned)


class _InProcess:
    """A pool of one: a process that dies breaks its own pool only."""

    def __init__(self, make: MakeOutputs) -> None:
        # A forked copy of a process that has run torch may hang.
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_begin, initargs=(make,))

    def write(self, shard: Shard, planned: Plan) -> Written:
        try:
            return self._pool.submit(_write_in_worker, shard, planned.bare()).result()
        except (BrokenProcessPool, CancelledError) as error:
            raise WorkerLostError from error

    def close(self) -> None:
        for process in list((self._pool._processes or {}).values()):
            process.terminate()
        self._pool.shutdown(wait=False, cancel_futures=True)


class _Actor:
    def __init__(self, make: MakeOutputs, num_gpus: float) -> None:
        import ray

        self._ray = ray

        class Remote:
            def __init__(self, make: MakeOutputs) -> None:
                _begin(make)

            def write(self, shard: Shard, planned: Plan) -> Written:
                return _write_in_worker(shard, planned)

        self._actor: Any = ray.remote(num_gpus=num_gpus)(Remote).remote(make)

    def write(self, shard: Shard, planned: Plan) -> Written:
        try:
            written: Written = self._ray.get(self._actor.write.remote(shard, planned.bare()))
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from error
        except self._ray.exceptions.RayError as error:
            raise WorkerLostError from error
        return written

    def close(self) -> None:
        self._ray.kill(self._actor)


def generate(
    planned: Plan,
    make: MakeOutputs,
    store: SentenceStore,
    engine: Engine | None = None,
    *,
    progress: Callable[[BulkReport], None] | None = None,
) -> BulkReport:
    """Write what is missing of a plan.

    Args:
        planned: from :func:`plan`.
        make: makes the output model; picklable where other processes call it.
        store: keeps the sentences.
        engine: who writes; this process by default.
        progress: is called after each shard with what was done so far.

    Raises:
        ModelError: a shard lost its worker three times, or a worker has another model than the plan.
        OffPromptsError: what the model or the store raised; shards that were complete are kept.
    """
    run = _Run(planned, store, progress)
    if planned.shards:
        engine = engine or Here()
        engine.prepare()
        run.with_workers(engine, make)
    return run.report()


class _Run:
    """The state that the threads of one run share; each has one worker and waits for it."""

    def __init__(self, planned: Plan, store: SentenceStore, progress: Callable[[BulkReport], None] | None) -> None:
        self.plan, self.store, self.progress = planned, store, progress
        self.left: queue.SimpleQueue[Shard] = queue.SimpleQueue()
        for shard in planned.shards:
            self.left.put(shard)
        self.tries: dict[int, int] = {}
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        self.failure: Exception | None = None
        self.workers: set[Worker] = set()
        self.start = time.perf_counter()
        self.done, self.lost, self.read, self.wrote = 0, 0, 0, 0
        self.tokens = TokenCount()

    def report(self) -> BulkReport:
        seconds = time.perf_counter() - self.start
        counted = self.tokens if self.tokens.sentences >= self.done else None
        return BulkReport(self.plan.found, self.done, seconds, self.read, self.wrote, counted, self.lost)

    def with_workers(self, engine: Engine, make: MakeOutputs) -> None:
        if engine.workers == 1:
            self._work(engine, make)
        else:
            threads = [
                threading.Thread(target=self._work, args=(engine, make), daemon=True)
                for _ in range(min(engine.workers, len(self.plan.shards)))
            ]
            for thread in threads:
                thread.start()
            try:
                while any(thread.is_alive() for thread in threads) and not self.stopped.is_set():
                    time.sleep(0.02)
            finally:
                # After Ctrl-C or an error, a worker that is closed gives its thread back at once.
                self.stopped.set()
                for worker in list(self.workers):
                    worker.close()
                for thread in threads:
                    thread.join()
        if self.failure is not None:
            raise self.failure

    def _work(self, engine: Engine, make: MakeOutputs) -> None:
        worker: Worker | None = None
        try:
            while not self.stopped.is_set():
                try:
                    shard = self.left.get_nowait()
                except queue.Empty:
                    return
                if worker is None:
                    worker = engine.start(make)
                    self.workers.add(worker)
                try:
                    written = worker.write(shard, self.plan)
                except WorkerLostError as error:
                    self._closed(worker)
                    worker = None
                    if not self.stopped.is_set():
                        self._try_again(shard, error)
                else:
                    self._keep(shard, written)
        except Exception as error:
            self.failure = self.failure or error
            self.stopped.set()
        finally:
            if worker is not None:
                self._closed(worker)

    def _closed(self, worker: Worker) -> None:
        self.workers.discard(worker)
        worker.close()

    def _keep(self, shard: Shard, written: Written) -> None:
        with self.lock:
            sentences = written.sentences
            self.store.put(self.plan.model, table_series(self.plan.seed), shard.requests, shard.samples, sentences)
            if written.encoder is not None and written.embeddings is not None:
                self.store.put_embeddings(written.encoder, sentences, written.embeddings)
            self.done += len(sentences)
            self.read += sum(map(len, shard.requests))
            self.wrote += sum(map(len, sentences))
            self.tokens += written.tokens or TokenCount()
            if self.progress is not None:
                self.progress(self.report())

    def _try_again(self, shard: Shard, error: WorkerLostError) -> None:
        with self.lock:
            self.lost += 1
            self.tries[shard.number] = self.tries.get(shard.number, 0) + 1
            if self.tries[shard.number] >= _ATTEMPTS:
                raise ModelError(
                    f"bulk generation: shard {shard.number} lost its worker {_ATTEMPTS} times, first request "
                    f"{shard.requests[0]!r:.120}; is there enough memory for {len(shard.samples)} sentences at once? "
                    "Take smaller shards or fewer workers, and run it again: what was complete is kept"
                ) from error
            self.left.put(shard)
