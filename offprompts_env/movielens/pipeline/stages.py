"""Stages of a build that are kept on disk, each under a key of what it was made from."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from offprompts_env.errors import StorageError

#: Enters every key; raise it when the code of a stage changes what the stage makes.
VERSION = 2


class Stages:
    """The finished stages in the folder ``work``.

    ``keys`` maps each stage that was asked for to its key; what enters a build from outside gets a key from its
    content. ``quiet`` hides what `say` and `progress` show; `command` is who says it.
    """

    def __init__(self, work: Path, quiet: bool, command: str = "build-assets") -> None:
        self.work, self.quiet, self.command = work, quiet, command
        self.keys: dict[str, str] = {}

    def folder(self, name: str, needs: Sequence[str], settings: object, make: Callable[[Path], None]) -> Path:
        """Return the folder of the finished stage `name`, made by `make` unless it is there already."""
        key = self.keys[name] = digest((VERSION, name, [self.keys[need] for need in needs], settings))
        folder = self.work / f"{name}-{key[:16]}"
        if folder.is_dir():
            return folder
        self.say(name)
        unfinished = self.work / f".{name}-{key[:16]}.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        make(unfinished)
        unfinished.replace(folder)
        return folder

    def say(self, text: str) -> None:
        """Say what happens, on standard error."""
        if not self.quiet:
            print(f"{self.command}: {text}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[float | None], None]]:
        """Show a bar of `total` steps; the body gets a function to be called after every step, with the loss."""
        from tqdm import tqdm

        with tqdm(total=total, desc=what, disable=self.quiet, mininterval=1.0) as bar:

            def step(loss: float | None) -> None:
                if loss is not None:
                    bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
                bar.update()

            yield step


def digest(value: object) -> str:
    """Return a SHA-256 of nested records, arrays and plain values."""
    found = hashlib.sha256()

    def add(part: object) -> None:
        if isinstance(part, np.ndarray):
            found.update(f"{part.dtype}{part.shape}".encode())
            found.update(np.ascontiguousarray(part).tobytes())
        elif hasattr(part, "__dataclass_fields__"):
            found.update(type(part).__name__.encode())
            for name in sorted(part.__dataclass_fields__):
                found.update(name.encode())
                add(getattr(part, name))
        elif isinstance(part, list | tuple):
            found.update(f"[{len(part)}".encode())
            for inner in part:
                add(inner)
        else:
            found.update(f"{type(part).__name__}:{part!r}".encode())

    add(value)
    return found.hexdigest()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the work folder for one build; the lock goes with the process, also when it is killed."""
    import fcntl

    with (folder / ".building").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StorageError(f"another build is using {folder}; wait for it, or pass another work folder") from error
        yield


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread, so that sums are in one order and a seed gives the same bundle wherever it runs."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
