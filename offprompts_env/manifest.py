"""The JSON side of a log: what the manifest says, and how whole files get to disk."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from offprompts_env.columns import REPAIR, decode
from offprompts_env.errors import DataError, StorageError
from offprompts_env.types import LogMetadata

FORMAT = "offprompts-log"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PROMPTS = "prompts.safetensors"
# Begins the line of the notes about a served model.
_SERVED = "served model: "
_SHARD = re.compile(r"shard-\d{6,}\.parquet")


@dataclass(frozen=True, slots=True)
class Shard:
    """One Parquet file.

    Attributes:
        file: name in the directory.
        rows: number of rounds.
        bytes: size of the file.
        sha256: checksum of the file, hexadecimal.
    """

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Recording:
    """One opening of the log for writing.

    Attributes:
        first_row: number of rows that were there before.
        seed: seed of the recording.
        batch_size: rounds a batch, where the rows depend on it.
        versions: package name to version.
    """

    first_row: int
    seed: int | None
    batch_size: int | None
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What ``manifest.json`` says.

    Attributes:
        env_id, env_config, notes: as in :class:`offprompts_env.types.LogMetadata`.
        prompt_texts: texts of the catalogue, where prompts are text.
        prompt_fingerprint: :attr:`offprompts_env.types.PromptSet.fingerprint`.
        prompt_sha256: checksum of the file with the embeddings of the catalogue, hexadecimal.
        columns: column name to type, e.g. ``float32[5]``, ``int16``, ``float64`` or ``string``.
        recordings: who wrote which rows.
        shards: the flushed rows, in order.
    """

    env_id: str | None
    env_config: Mapping[str, Any]
    notes: str
    prompt_texts: tuple[str, ...] | None
    prompt_fingerprint: str
    prompt_sha256: str
    columns: Mapping[str, str]
    recordings: tuple[Recording, ...]
    shards: tuple[Shard, ...] = ()

    @property
    def rows(self) -> int:
        """Number of flushed rounds."""
        return sum(shard.rows for shard in self.shards)

    @property
    def stamp(self) -> dict[str, str]:
        """What marks the next shard as the one that follows these."""
        return {"first_row": str(self.rows), "prompts": self.prompt_fingerprint}

    @property
    def metadata(self) -> LogMetadata:
        """Provenance; seed and versions are those of the first recording."""
        first = self.recordings[0]
        return LogMetadata(self.env_id, dict(self.env_config), first.seed, dict(first.versions), self.notes)


def served_note(said: Mapping[str, Any]) -> str:
    """Return the line of a log's notes that keeps what a server said of the model that wrote its sentences."""
    return _SERVED + json.dumps(dict(said), sort_keys=True)


def served_in(notes: str) -> str | None:
    """Return what :func:`served_note` kept in `notes`, None where there is no such line."""
    return next((line.removeprefix(_SERVED) for line in notes.splitlines() if line.startswith(_SERVED)), None)


def find_manifest(root: Path, *, warn: bool = True) -> Manifest | None:
    """Return the manifest in `root` with the shards it does not name yet, or None if there is none.

    Shards that it does not name are named in a warning if `warn`, for nothing vouches for what they hold.

    Raises:
        StorageError: it is damaged, of a newer format version, or not that of a log; its numbers of rows contradict
            each other; or a shard that it does not name is not the next one.
    """
    file = root / MANIFEST
    if not file.is_file():
        return None
    # Looked up first: of the shards that are there now, a writer at work has named all but the last one afterwards.
    present = {entry.name for entry in root.iterdir() if is_shard(entry)}
    manifest, rows = _parse_manifest(file, read_bytes(file))
    named = manifest
    while (following := root / shard_name(len(manifest.shards))).is_file():
        manifest = replace(manifest, shards=(*manifest.shards, _recover(following, manifest)))
    if strays := sorted(present - {shard.file for shard in manifest.shards}):
        raise StorageError(
            f"{following}: expected this shard before {strays[0]}, it is missing; restore it from a copy, or move the "
            "shards after it away to do without their rows"
        )
    # Both are consistent: the entries may have been lost that the shards themselves make up for.
    if rows not in (None, named.rows, manifest.rows):
        raise StorageError(f"{file}: expected 'rows' to be {named.rows}, the sum over its shards, got {rows}; {REPAIR}")
    adopted = [shard.file for shard in manifest.shards[len(named.shards) :]]
    if adopted and warn:
        warnings.warn(
            f"{root}: read {', '.join(adopted)} ({manifest.rows - named.rows} rows) that {MANIFEST} does not name, as "
            "after a kill or while a recording goes on; they continue the log, but have no checksum, so damage to "
            "them would go unnoticed",
            stacklevel=4,
        )
    return manifest


def _recover(file: Path, manifest: Manifest) -> Shard:
    """Return the entry of a whole shard that was written just before a kill, after the last manifest."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = read_bytes(file)
    decode(content, manifest.columns, file)
    found = pq.read_schema(pa.BufferReader(content)).metadata or {}
    expected = manifest.stamp
    actual = {key: found.get(key.encode(), b"").decode() for key in expected}
    if actual != expected:
        raise StorageError(f"{file}: expected the shard that follows the manifest, {expected}, got {actual}; {REPAIR}")
    rows = pq.read_metadata(pa.BufferReader(content)).num_rows
    return Shard(file.name, rows, len(content), hashlib.sha256(content).hexdigest())


def count_rows(file: Path) -> int:
    """Return the number of rows of a shard, from its footer alone.

    Raises:
        StorageError: it is no Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(file).num_rows)
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"{file}: expected a Parquet file, cannot read it: {error}; {REPAIR}") from error


def check_rows(file: Path, shard: Shard, rows: int) -> None:
    """Raise :class:`StorageError` where `file` has another number of `rows` than the manifest says."""
    if rows != shard.rows:
        raise StorageError(f"{file}: expected {shard.rows} rows as in {MANIFEST}, got {rows}; {REPAIR}")


def _parse_manifest(file: Path, content: bytes) -> tuple[Manifest, Any]:
    """Return what the manifest says, and apart from it its total number of rows."""
    try:
        raw = json.loads(content)
    except ValueError as error:
        raise StorageError(f"{file}: expected JSON, cannot read it: {error}; {REPAIR}") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise StorageError(f"{file}: expected the manifest of a log (format {FORMAT!r}); pass a directory with a log")
    version = raw.get("version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise StorageError(
            f"{file}: expected format version {FORMAT_VERSION} or older, got {version!r}; "
            "upgrade with: pip install -U offprompts-env"
        )
    try:
        texts = raw["prompt_texts"]
        manifest = Manifest(
            env_id=raw["env_id"],
            env_config=raw["env_config"],
            notes=raw["notes"],
            prompt_texts=None if texts is None else tuple(texts),
            prompt_fingerprint=raw["prompt_fingerprint"],
            prompt_sha256=raw["prompt_sha256"],
            columns=raw["columns"],
            recordings=tuple(Recording(**entry) for entry in raw["recordings"]),
            shards=tuple(Shard(**entry) for entry in raw["shards"]),
        )
    except (KeyError, TypeError) as error:
        raise StorageError(f"{file}: incomplete: {type(error).__name__} {error}; {REPAIR}") from error
    for index, shard in enumerate(manifest.shards):
        # Any other name could reach out of the directory, or name a shard twice.
        if shard.file != shard_name(index):
            raise StorageError(
                f"{file}: expected names of shards in order, here {shard_name(index)!r}, got {shard.file!r}; {REPAIR}"
            )
        if type(shard.rows) is not int or shard.rows < 0:
            raise StorageError(f"{file}: expected a number of rows of {shard.file}, got {shard.rows!r}; {REPAIR}")
    return manifest, raw.get("rows")


def manifest_bytes(manifest: Manifest) -> bytes:
    """Return the content of ``manifest.json``."""
    content = {"format": FORMAT, "version": FORMAT_VERSION, "rows": manifest.rows, **asdict(manifest)}
    return (json.dumps(content, indent=1) + "\n").encode()


def json_text(value: Mapping[str, Any]) -> str:
    """Return `value` as canonical JSON; tuples and lists come out alike.

    Raises:
        DataError: it does not fit into JSON.
    """
    try:
        return json.dumps(dict(value), sort_keys=True)
    except (TypeError, ValueError) as error:
        raise DataError(f"metadata: expected a config, seed and versions that fit into JSON: {error}") from error


def shard_name(index: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{index:06d}.parquet"


def is_ours(entry: Path) -> bool:
    """Say whether a log would have a file of that name."""
    name = entry.name.removeprefix(".").removesuffix(".tmp")
    return name in (MANIFEST, PROMPTS) or _SHARD.fullmatch(name) is not None


def is_shard(entry: Path) -> bool:
    """Say whether a file has the name of a shard."""
    return _SHARD.fullmatch(entry.name) is not None


def has_shards(root: Path) -> bool:
    """Say whether a directory holds rows of a log."""
    return any(map(is_shard, root.iterdir()))


def remove_log(root: Path) -> None:
    """Remove the files of a log and no other ones."""
    # The last shard goes first: what a kill leaves behind is a log that misses shards, never one with rows mixed up.
    remove_files(sorted(filter(is_shard, root.iterdir()), reverse=True))
    remove_files([root / MANIFEST, root / PROMPTS, *root.glob(".*.tmp")])


def remove_files(files: Iterable[Path]) -> None:
    """Remove those of `files` that belong to a log."""
    for file in files:
        if is_ours(file):
            file.unlink(missing_ok=True)


def read_bytes(file: Path, sha256: str | None = None) -> bytes:
    """Return the content of a file of a log.

    Raises:
        StorageError: it is missing, unreadable, or has another checksum than `sha256`.
    """
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise StorageError(f"{file}: expected this file of the log, it is missing; {REPAIR}") from error
    except OSError as error:
        raise StorageError(f"{file}: cannot read: {error}; {REPAIR}") from error
    if sha256 is not None and (actual := hashlib.sha256(content).hexdigest()) != sha256:
        raise StorageError(f"{file}: damaged: expected SHA-256 {sha256}, got {actual} ({len(content)} bytes); {REPAIR}")
    return content


def lock_directory(root: Path) -> int | None:
    """Make the directory and take its lock, which ends with the process; None where the system has no such locks.

    Raises:
        StorageError: the directory cannot be made, or another writer has it.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{root}: expected a directory or nothing there, cannot make one: {error}") from error
    if os.name != "posix":
        return None
    import fcntl

    descriptor = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise StorageError(
            f"{root}: expected to be the only writer, but another one has this log open; close it first"
        ) from error
    return descriptor


def unlock(descriptor: int) -> None:
    """Let go of a lock of :func:`lock_directory`."""
    import fcntl

    # Closing alone would leave the lock with processes that were forked meanwhile.
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def write_atomic(file: Path, content: bytes | memoryview) -> None:
    """Write a file that is there as a whole, also after a power cut, or not at all."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with temporary.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        directory = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
