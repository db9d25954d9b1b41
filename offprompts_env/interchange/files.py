"""Which files are meant, each of them once."""

from __future__ import annotations

import glob
import hashlib
import warnings
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from offprompts_env.errors import DataError, StorageError

# A directory, a file, a glob pattern, or several files in the order of their rows.
Files = str | Path | Sequence[str | Path]


def find_files(files: Files, *suffixes: str) -> list[Path]:
    """Return the files that `files` names.

    Args:
        files: a file; a directory, for all files with one of `suffixes` in it and below, by path, without those whose
            name or folder starts with ``.`` or ``_``; a glob pattern, ``**`` included, by path; or paths in order.
        suffixes: such as ``.parquet``.

    Raises:
        StorageError: there is none, or one is not an ordinary file.
        DataError: a file is named twice, perhaps through a link.

    Warns:
        UserWarning: two files have the same content, so that their rows count twice.
    """
    if isinstance(files, str | Path):
        found = _expand(Path(files), suffixes)
        if not found:
            raise StorageError(
                f"{files}: expected a file, a directory with {' or '.join(suffixes)} files, or a pattern that matches "
                "some, found none; check the path"
            )
    else:
        found = [Path(file) for file in files]
        if not found:
            raise StorageError("files: expected at least one path, got an empty list; pass the files to read")
    for file in found:
        # A pipe or a device would be waited for without end.
        if not file.is_file():
            raise StorageError(f"{file}: expected a file, found {'something else' if file.exists() else 'none'}")
    _check_once(found)
    return found


def _expand(path: Path, suffixes: Sequence[str]) -> list[Path]:
    if path.is_dir():
        below = (file for file in path.rglob("*") if file.name.endswith(tuple(suffixes)) and file.is_file())
        return sorted(f for f in below if not any(part[0] in "._" for part in f.relative_to(path).parts))
    if path.exists():
        return [path]
    return sorted(Path(match) for match in glob.glob(str(path), recursive=True))  # noqa: PTH207  (absolute patterns)


def _check_once(files: Sequence[Path]) -> None:
    seen: dict[Path, Path] = {}
    for file in files:
        if (other := seen.setdefault(file.resolve(), file)) is not file:
            raise DataError(
                f"{file}: expected every file once, but it is {other} again; name it once, or its rows count twice"
            )
    # Only files of equal size can have equal content, so that hardly any is read for this.
    by_size = sorted(files, key=lambda file: file.stat().st_size)
    for size, group in groupby(by_size, key=lambda file: file.stat().st_size):
        same = list(group) if size else []
        contents: dict[str, Path] = {}
        for file in same if len(same) > 1 else []:
            with file.open("rb") as handle:
                other = contents.setdefault(hashlib.file_digest(handle, "sha256").hexdigest(), file)
            if other is not file:
                warnings.warn(
                    f"{file} has the same content as {other}, so their rows count twice; leave a copy out",
                    stacklevel=4,
                )
