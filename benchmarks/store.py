"""What is computed once and reused: artefacts named by a digest of everything they were made from.

A stage (logging policies, logs, reward models, results, ...) is a folder, an artefact a folder in it, named by its key.
An artefact is there as a whole or not at all; one that cannot be read is made again.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

import agents
from offprompts_env.errors import DataError, StorageError
from offprompts_env.types import Array, LoggedDataset, PromptSet

T = TypeVar("T")

# Part of every key: raise it when what a stage computes changes without a change of its settings.
STAGES_VERSION = 1


class StoreError(StorageError):
    """The store cannot be read or written: what one task meets there, all others would meet too."""


class StoreWarning(UserWarning):
    """An artefact could not be used, and is made again."""


def digest(*parts: object) -> str:
    """Return a name for what was made from `parts`, by their ``repr``: equal for equal frozen configurations.

    Raises:
        DataError: a part shows its address in memory, which the next process would not find again.
    """
    text = repr((*parts, STAGES_VERSION, _torch()))
    if " at 0x" in text:
        raise DataError(
            f"expected parts whose repr shows their settings, such as frozen dataclasses, got {text}; "
            "give the class a __repr__"
        )
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@functools.cache
def _torch() -> str:
    return version("torch")


@dataclass(frozen=True)
class Codec(Generic[T]):
    """How an artefact is written into a folder of its own, and read back.

    Attributes:
        write: ``(artefact, folder)``; the folder exists.
        read: ``folder`` to artefact.
    """

    write: Callable[[T, Path], object]
    read: Callable[[Path], T]


def policies(prompts: PromptSet | None = None) -> Codec[Any]:
    """Return the codec of policies over `prompts`."""
    return Codec(agents.save_policy, lambda folder: agents.load_policy(folder, prompts))


REWARDS: Codec[agents.PromptRewards] = Codec(lambda model, folder: model.save(folder), agents.load_rewards)
"""Prompt-level reward models."""

LOGS: Codec[LoggedDataset] = Codec(
    lambda log, folder: log.save(folder / "log"), lambda f: LoggedDataset.load(f / "log")
)
"""Logs."""

VALUES: Codec[Array] = Codec(
    lambda values, folder: save_file({"values": np.ascontiguousarray(values)}, folder / "values.safetensors"),
    lambda folder: load_file(folder / "values.safetensors")["values"],
)
"""Arrays."""


def _write_json(value: object, folder: Path) -> None:
    (folder / "value.json").write_text(json.dumps(value), encoding="utf-8")


JSON: Codec[Any] = Codec(_write_json, lambda folder: json.loads((folder / "value.json").read_text(encoding="utf-8")))
"""What JSON can hold."""


@dataclass(frozen=True)
class Kept(Generic[T]):
    """An artefact.

    Attributes:
        value: itself.
        seconds: processor time that making it took, the artefacts made with it sharing equally.
    """

    value: T
    seconds: float


class Store:
    """A folder of artefacts, which any number of processes may use at once.

    Args:
        root: the folder, made if need be.
        since: what was made before, of :meth:`now`, is made again when it is asked for.
    """

    def __init__(self, root: Path, since: int = 0) -> None:
        self.root, self.since = root, since

    def many(
        self, stage: str, keys: Sequence[str], make: Callable[[list[int]], Sequence[T]], codec: Codec[T]
    ) -> list[Kept[T]]:
        """Return one artefact a key; those that are not there are made together, by one process of all that ask.

        Args:
            stage: its name.
            keys: from :func:`digest`.
            make: the positions in `keys` to their artefacts.
            codec: of the artefacts.

        Raises:
            StoreError: the folder cannot be read or written.
        """
        found = {index: self._read(stage, key, codec, alone=False) for index, key in enumerate(keys)}
        if any(kept is None for kept in found.values()):
            missing = [index for index, kept in found.items() if kept is None]
            with self._locked(stage, [keys[index] for index in missing]):
                # Another process may have made them while this one waited.
                found |= {index: self._read(stage, keys[index], codec, alone=True) for index in missing}
                missing = [index for index in missing if found[index] is None]
                if missing:
                    started = time.process_time()
                    made = make(missing)
                    seconds = (time.process_time() - started) / len(missing)
                    for index, value in zip(missing, made, strict=True):
                        self._write(stage, keys[index], value, seconds, codec)
                        found[index] = Kept(value, seconds)
        return [kept for _, kept in sorted(found.items()) if kept is not None]

    def one(self, stage: str, key: str, make: Callable[[], T], codec: Codec[T]) -> Kept[T]:
        """Return the artefact `key`, made if it is not there."""
        return self.many(stage, [key], lambda _: [make()], codec)[0]

    def now(self) -> int:
        """Return the time of the file system that the store is on, in nanoseconds: what machines that share it share.

        Raises:
            StoreError: the folder cannot be written.
        """
        mark = self.root / ".now"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            mark.touch()
            return mark.stat().st_mtime_ns
        except OSError as error:
            raise _unwritable(mark, error) from error

    def _read(self, stage: str, key: str, codec: Codec[T], *, alone: bool) -> Kept[T] | None:
        folder = self.root / stage / key
        if not folder.exists():
            return None
        try:
            if (folder / "cost.json").stat().st_mtime_ns < self.since:
                return None
            seconds = json.loads((folder / "cost.json").read_text(encoding="utf-8"))["seconds"]
            return Kept(codec.read(folder), float(seconds))
        except Exception as error:
            if isinstance(error, MemoryError) or _of_the_system(error):
                raise StoreError(
                    f"{folder}: cannot be read: {error}; what it holds may be whole, so it is kept: see to the cause, "
                    "then run the same command again"
                ) from error
            # Only who holds the lock may remove it: another process may be putting a whole one in its place.
            if alone:
                warnings.warn(f"{folder}: cannot be read ({error}); it is made again", StoreWarning, stacklevel=2)
                shutil.rmtree(folder, ignore_errors=True)
            return None

    def _write(self, stage: str, key: str, value: T, seconds: float, codec: Codec[T]) -> None:
        folder, unfinished = self.root / stage / key, self.root / stage / f".{key}.unfinished"
        try:
            # What a killed process left.
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            codec.write(value, unfinished)
            (unfinished / "cost.json").write_text(json.dumps({"seconds": seconds}), encoding="utf-8")
            # One of before stays until there is a whole one to take its place.
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.replace(folder)
        except (OSError, pa.ArrowException, SafetensorError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise _unwritable(folder, error) from error

    @contextmanager
    def _locked(self, stage: str, keys: Sequence[str]) -> Iterator[None]:
        with ExitStack() as stack:
            try:
                (self.root / stage).mkdir(parents=True, exist_ok=True)
                # In one order everywhere, so that two processes never wait for one another.
                for key in sorted(keys):
                    stack.enter_context(FileLock(self.root / stage / f".{key}.lock"))
            except OSError as error:
                raise _unwritable(self.root / stage, error) from error
            yield


def _of_the_system(error: Exception) -> bool:
    """Return whether a file could not be reached, which says nothing about what is in it."""
    return isinstance(error, OSError) and error.errno in {
        errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT,
    }  # fmt: skip


def _unwritable(folder: Path, error: Exception) -> StoreError:
    return StoreError(
        f"{folder}: cannot be written: {error}; free some space or choose another folder with --out, then run the same "
        "command again: what was finished is kept"
    )
