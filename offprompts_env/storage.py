"""Logged datasets on disk: a directory of Parquet shards, a safetensors file with the prompts, and a JSON manifest.

    log/
      manifest.json             what the log is, and its shards with rows, bytes and SHA-256
      prompts.safetensors       embeddings of the prompt catalogue, (A, d_e)
      shard-000000.parquet      rows: vectors as FixedSizeList<float32>, one column a field of LoggedDataset
      shard-000001.parquet ...

Every file is written under a temporary name, synced and renamed, the shard before the manifest that names it. So at any
moment the directory holds whole files only, and a shard that the manifest does not name yet is the next in the sequence
and is found by its name; a warning says so, as there is no checksum of it.
"""

from __future__ import annotations

import errno
import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, get_args

import numpy as np

from offprompts_env.columns import (
    REPAIR,
    Batches,
    check_texts,
    column_types,
    count_characters,
    decode,
    encode,
    make_dataset,
)
from offprompts_env.config import identity
from offprompts_env.errors import ConfigError, DataError, StorageError, unknown_name
from offprompts_env.manifest import (
    FORMAT,
    MANIFEST,
    PROMPTS,
    Manifest,
    Recording,
    Shard,
    check_rows,
    count_rows,
    find_manifest,
    has_shards,
    is_ours,
    json_text,
    lock_directory,
    manifest_bytes,
    read_bytes,
    remove_files,
    remove_log,
    served_in,
    shard_name,
    unlock,
    write_atomic,
)
from offprompts_env.types import Array, LoggedDataset, LogMetadata, PromptSet

Mode = Literal["refuse", "append", "overwrite"]

SHARD_ROWS = 1 << 18
# A shard is flushed early once it holds this much text, so that long sentences do not pile up in memory.
_SHARD_CHARACTERS = 1 << 26
# So is all there is when the last shard, or the opening of the log, is this many seconds ago. The age of the first row
# does not count, so that a batch that took minutes is on disk at once.
_SHARD_SECONDS = 10.0


def read_manifest(path: str | Path) -> Manifest:
    """Return the manifest of the log at `path`, with the shards that it does not name yet.

    Raises:
        StorageError: there is no dataset, it has a newer format version, or a file is damaged.

    Warns:
        UserWarning: there are shards that the manifest on disk does not name, so that they have no checksum.
    """
    manifest = find_manifest(Path(path))
    if manifest is None:
        raise StorageError(
            f"{path}: expected a dataset directory with a {MANIFEST}, found none; "
            "pass the directory that LoggedDataset.save, collect or a recording wrapper wrote"
        )
    return manifest


def load(path: str | Path) -> LoggedDataset:
    """Read a whole log.

    Raises:
        StorageError: there is no dataset at `path`, it has no rows, is of a newer format version, or a file of it is
            missing or damaged; the message names the file, and the expected and the actual checksum or number of rows.

    Warns:
        UserWarning: there are shards that the manifest on disk does not name, so that they have no checksum.
    """
    root = Path(path)
    manifest = read_manifest(root)
    if manifest.rows == 0:
        raise StorageError(f"{root}: expected at least one flushed row, found none; record some rounds first")
    prompts = read_prompts(root, manifest)
    columns: dict[str, Array] = {}
    start = 0
    for shard in manifest.shards:
        for name, values in read_shard(root, shard, manifest).items():
            if name not in columns:
                columns[name] = np.empty((manifest.rows, *values.shape[1:]), dtype=values.dtype)
            columns[name][start : start + shard.rows] = values
        start += shard.rows
    return make_dataset(columns, prompts, manifest.metadata)


def iter_batches(path: str | Path, rows: int) -> Iterator[LoggedDataset]:
    """Read a log in batches of `rows` rounds, the last one possibly smaller; one shard is in memory at a time.

    Raises:
        ConfigError: `rows` is not positive.
        StorageError: as :func:`load`, when the damaged file is reached.
    """
    root = Path(path)
    manifest = read_manifest(root)
    shards = ({name: np.array(v) for name, v in read_shard(root, s, manifest).items()} for s in manifest.shards)
    yield from in_batches(shards, rows, read_prompts(root, manifest), manifest.metadata)


def in_batches(
    shards: Iterable[Mapping[str, Array]], rows: int, prompts: PromptSet, metadata: LogMetadata
) -> Iterator[LoggedDataset]:
    """Yield the rows of `shards`, columns by name, in batches of `rows` rounds, the last one possibly smaller."""
    if rows < 1:
        raise ConfigError(f"rows: expected at least 1, got {rows}")
    left: Mapping[str, Array] = {}
    for fresh in shards:
        columns = {name: np.concatenate([left[name], values]) for name, values in fresh.items()} if left else fresh
        held = len(columns["action"])
        for start in range(0, held - rows + 1, rows):
            part = {name: values[start : start + rows] for name, values in columns.items()}
            yield make_dataset(part, prompts, metadata)
        left = {name: values[held - held % rows :] for name, values in columns.items()}
    if left and len(left["action"]):
        yield make_dataset(left, prompts, metadata)


def save(log: LoggedDataset, path: str | Path, *, mode: Mode = "refuse", shard_rows: int = SHARD_ROWS) -> Path:
    """Write `log` as a directory that :func:`load` reads back exactly; return the directory.

    Raises:
        StorageError: there is something at `path` already and `mode` does not allow it, or the disk is full.
        DataError: the metadata is not JSON-able, or a text is not valid Unicode.
    """
    with ShardWriter(path, log.prompts, log.metadata, mode=mode, shard_rows=shard_rows) as writer:
        writer.append(log)
    return writer.path


class ShardWriter:
    """Writes a log batch by batch. A kill at any moment leaves every flushed shard readable.

    Use it as a context manager, or call :meth:`close`; rows are on disk after :meth:`flush` and when a shard is full.

    Args:
        path: directory; made if need be.
        prompts: the catalogue that actions index.
        metadata: provenance of the rows to come; the attribute may be replaced until the first flush.
        mode: what to do where there are rows already: refuse, append to them, or overwrite them.
        shard_rows: a shard is flushed when it has at least this many rows, or with the first rows that come ten seconds
            or more after the shard before, so that a kill costs at most ten seconds and the batch at hand.
        batch_size: kept in the manifest, for recordings whose rows depend on it.

    Raises:
        StorageError: `mode` forbids to write here, another process is writing here, a shard to append to is missing or
            cut short, or the disk is full.
        DataError: appending to a log of another environment, or the metadata is not JSON-able.
    """

    def __init__(
        self,
        path: str | Path,
        prompts: PromptSet,
        metadata: LogMetadata | None = None,
        *,
        mode: Mode = "refuse",
        shard_rows: int = SHARD_ROWS,
        batch_size: int | None = None,
    ) -> None:
        if mode not in get_args(Mode):
            raise unknown_name("mode", mode, get_args(Mode))
        if shard_rows < 1:
            raise ConfigError(f"shard_rows: expected at least 1, got {shard_rows}")
        self.path, self.prompts = Path(path), prompts
        self.metadata = metadata if metadata is not None else LogMetadata()
        self._shard_rows, self.batch_size = shard_rows, batch_size
        self._pending = Batches()
        self._pending_rows = self._pending_characters = 0
        self._shard_written = time.monotonic()
        self._registered = False
        json_text(asdict(self.metadata))
        # While the interpreter ends is too late for this import, but not for writing the last rows.
        import pyarrow.parquet  # noqa: F401

        self._lock = lock_directory(self.path)
        self._closed = False
        try:
            self._manifest = self._existing(mode)
        except BaseException:
            self._release()
            raise

    def _existing(self, mode: Mode) -> Manifest | None:
        """Return the log to append to, or None with the directory cleared for a new one."""
        try:
            existing = find_manifest(self.path, warn=mode != "overwrite")
        except StorageError:
            if mode != "overwrite" or FORMAT not in (self.path / MANIFEST).read_text(errors="replace"):
                raise
            remove_log(self.path)
            return None
        if existing is None:
            foreign = [entry.name for entry in self.path.iterdir() if not is_ours(entry)]
            if foreign:
                raise StorageError(
                    f"{self.path}: expected an empty directory or a log, found other files ({', '.join(foreign[:3])}); "
                    "choose another path"
                )
            if mode != "overwrite" and has_shards(self.path):
                raise StorageError(
                    f"{self.path}: expected an empty directory or a log, found shards of a log without its {MANIFEST}; "
                    "restore that file from a copy, pass mode='overwrite' to lose the shards, or choose another path"
                )
        if existing is None or existing.rows == 0 or mode == "overwrite":
            remove_log(self.path)
            return None
        if mode == "refuse":
            raise StorageError(
                f"{self.path}: expected no log here, found one of {existing.rows} rows; pass mode='append' to continue "
                "it (in collect, n counts the rows already there), mode='overwrite' to replace it, or another path"
            )
        metadata = self.metadata
        for name, expected, actual in (
            ("environment", existing.env_id, metadata.env_id),
            ("environment config", json_text(identity(existing.env_config)), json_text(identity(metadata.env_config))),
            ("prompt fingerprint", existing.prompt_fingerprint, self.prompts.fingerprint),
        ):
            if expected != actual:
                raise DataError(
                    f"{self.path}: cannot append, expected {name} {expected} as recorded, got {actual}; "
                    "record into another directory"
                )
        first, now = served_in(existing.notes), served_in(metadata.notes)
        if first is not None and now is not None and first != now:
            raise DataError(
                f"{self.path}: cannot append, expected the model that the server had when the log was begun, {first}, "
                f"got {now} under the same name; serve the first one again, or record into another directory"
            )
        # Better now than after hours of recording into a log that cannot be read.
        for shard in existing.shards:
            file = self.path / shard.file
            found = file.stat().st_size if file.is_file() else None
            if found != shard.bytes:
                raise StorageError(
                    f"{file}: cannot append to a damaged log, expected a shard of {shard.bytes} bytes, "
                    f"{'found none' if found is None else f'got {found}'}; {REPAIR}"
                )
            check_rows(file, shard, count_rows(file))
        remove_files(self.path.glob(".*.tmp"))
        return existing

    @property
    def manifest(self) -> Manifest | None:
        """What is on disk; None before the first flush of a new log."""
        return self._manifest

    @property
    def flushed_rows(self) -> int:
        """Rows that are safe on disk."""
        return 0 if self._manifest is None else self._manifest.rows

    @property
    def rows(self) -> int:
        """Rows on disk and in memory."""
        return self.flushed_rows + self._pending_rows

    def append(self, batch: LoggedDataset) -> None:
        """Add the rows of `batch`; its prompts and metadata are taken to be those of the writer.

        Raises:
            DataError: the columns differ from those of the rows before, or a text is not valid Unicode.
            StorageError: a shard could not be written; the rows stay in memory, and :meth:`flush` tries again.
        """
        self._require_open()
        columns = column_types(batch)
        expected: Mapping[str, str] | None = None if self._manifest is None else self._manifest.columns
        if self._pending.parts:
            expected = column_types(self._pending.parts[0])
        if expected is not None and dict(expected) != columns:
            raise DataError(
                f"{self.path}: cannot append, expected columns {json_text(expected)}, got {json_text(columns)}; "
                "record the same columns in every batch"
            )
        check_texts(batch)
        step = self._shard_rows
        parts = [batch] if len(batch) <= step else [batch.take(slice(i, i + step)) for i in range(0, len(batch), step)]
        for part in parts:
            self._pending.append(part)
        self._pending_rows += len(batch)
        self._pending_characters += count_characters(batch)
        aged = time.monotonic() - self._shard_written >= _SHARD_SECONDS
        if aged or self._pending_rows >= self._shard_rows or self._pending_characters >= _SHARD_CHARACTERS:
            self._write_shards(partial=aged)

    def flush(self) -> None:
        """Put all rows on disk.

        Raises:
            StorageError: the disk is full or fails; the message says how many rows are safe.
        """
        self._require_open()
        self._write_shards(partial=True)

    def _shard_end(self) -> int | None:
        """Return how many pending batches fill the next shard, or None if they do not."""
        rows = characters = 0
        for end, part in enumerate(self._pending.parts, start=1):
            rows, characters = rows + len(part), characters + count_characters(part)
            if rows >= self._shard_rows or characters >= _SHARD_CHARACTERS:
                return end
        return None

    def _write_shards(self, partial: bool) -> None:
        while self._pending.parts:
            end = self._shard_end()
            if end is None and not partial:
                return
            try:
                self._write_shard(len(self._pending.parts) if end is None else end)
            except OSError as error:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                raise StorageError(
                    f"{self.path}: cannot write: {'the disk is full' if full else error}; {self.flushed_rows} rows are "
                    f"safe on disk, {self._pending_rows} are in memory only; free some space and flush again, or "
                    "reopen later with mode='append'"
                ) from error

    def _write_shard(self, end: int) -> None:
        parts, left = self._pending.parts[:end], self._pending.parts[end:]
        if self._manifest is None:
            write_atomic(self.path / PROMPTS, _prompts_content(self.prompts))
        manifest = self._manifest if self._registered and self._manifest is not None else self._register(parts[0])
        content = encode(parts, manifest.columns, manifest.stamp)
        rows = sum(len(part) for part in parts)
        shard = Shard(shard_name(len(manifest.shards)), rows, len(content), hashlib.sha256(content).hexdigest())
        write_atomic(self.path / shard.file, content)
        manifest = replace(manifest, shards=(*manifest.shards, shard))
        write_atomic(self.path / MANIFEST, manifest_bytes(manifest))
        pending = Batches(left)
        # What is left is of the batch that filled this shard, so it is no older.
        self._shard_written = time.monotonic()
        # In one statement without a call: Ctrl-C lands before it, and the same shard is written again, or after it.
        self._manifest, self._pending = manifest, pending
        self._pending_rows = sum(map(len, left))
        self._pending_characters = sum(map(count_characters, left))

    def _register(self, first: LoggedDataset) -> Manifest:
        """Note this recording in the manifest before its first shard."""
        metadata, manifest = self.metadata, self._manifest
        recording = Recording(self.flushed_rows, metadata.seed, self.batch_size, metadata.versions)
        if manifest is None:
            manifest = Manifest(
                env_id=metadata.env_id,
                env_config=metadata.env_config,
                notes=metadata.notes,
                prompt_texts=self.prompts.texts,
                prompt_fingerprint=self.prompts.fingerprint,
                prompt_sha256=hashlib.sha256(_prompts_content(self.prompts)).hexdigest(),
                columns=column_types(first),
                recordings=(),
            )
        manifest = replace(manifest, recordings=(*manifest.recordings, recording))
        write_atomic(self.path / MANIFEST, manifest_bytes(manifest))
        self._manifest, self._registered = manifest, True
        return manifest

    def close(self) -> None:
        """Flush and let go of the directory; closing twice does nothing."""
        if self._closed:
            return
        try:
            self.flush()
        finally:
            self._release()

    def _require_open(self) -> None:
        if self._closed:
            raise StorageError(f"{self.path}: expected an open writer, got a closed one; reopen with mode='append'")

    def _release(self) -> None:
        self._closed = True
        if self._lock is not None:
            unlock(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What could not be written a moment ago is not tried again, or the second error would hide the first.
        if isinstance(error, StorageError):
            self._release()
        else:
            self.close()


def read_shard(root: Path, shard: Shard, manifest: Manifest) -> dict[str, Array]:
    """Return the columns of a shard by name; raises as :func:`load`."""
    file = root / shard.file
    columns = decode(read_bytes(file, shard.sha256), manifest.columns, file)
    check_rows(file, shard, len(columns["action"]))
    return columns


def _prompts_content(prompts: PromptSet) -> bytes:
    from safetensors.numpy import save as safetensors_bytes

    return safetensors_bytes({"embeddings": np.ascontiguousarray(prompts.embeddings)})


def read_prompts(root: Path, manifest: Manifest) -> PromptSet:
    """Return the catalogue of the log at `root`; raises as :func:`load`."""
    from safetensors import SafetensorError
    from safetensors.numpy import load as safetensors_arrays

    file = root / PROMPTS
    try:
        prompts = PromptSet(
            safetensors_arrays(read_bytes(file, manifest.prompt_sha256))["embeddings"], manifest.prompt_texts
        )
    except (SafetensorError, KeyError, ValueError) as error:
        raise StorageError(f"{file}: expected the prompt embeddings, cannot read them: {error}; {REPAIR}") from error
    if prompts.fingerprint != manifest.prompt_fingerprint:
        raise StorageError(
            f"{file}: expected prompts with fingerprint {manifest.prompt_fingerprint}, got {prompts.fingerprint}; "
            f"{REPAIR}"
        )
    return prompts
