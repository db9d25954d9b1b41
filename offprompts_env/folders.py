"""Folders that are there whole or not at all, and files that are what they were."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from offprompts_env.errors import StorageError


def check_replaceable(out: Path, marker: str, what: str) -> None:
    """Raise unless `out` is new, an empty folder, or `what` it is to be, which holds a file called `marker`.

    Raises:
        StorageError: it is something else, which must not be lost.
    """
    if out.exists() and not (out / marker).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise StorageError(f"expected {out} to be {what}, an empty folder or new, and it is none; choose another path")


@contextmanager
def replaced(out: Path) -> Iterator[Path]:
    """Give an empty folder to fill; afterwards it takes the place of `out`, which stays as it was if filling fails."""
    made = out.with_name(f".{out.name}.{os.getpid()}.new")
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    made.mkdir(parents=True)
    try:
        yield made
        if out.exists():
            out.replace(old)
        made.replace(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.replace(out)
        raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(folder: Path, *, besides: str) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of every file in `folder` but the one called `besides`, by relative name."""
    return {
        path.relative_to(folder).as_posix(): {"sha256": sha256_of(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / besides
    }


def difference(path: Path, expected: Mapping[str, Any]) -> str | None:
    """Return how the file at `path` differs from what :func:`checksums` said of it; None where it does not."""
    wanted = f"expected {expected['bytes']} bytes with SHA-256 {expected['sha256']}"
    if not path.is_file():
        return f"{wanted}, found no file"
    size = path.stat().st_size
    found = sha256_of(path) if size == expected["bytes"] else "not computed"
    return None if found == expected["sha256"] else f"{wanted}, found {size} bytes with SHA-256 {found}"
