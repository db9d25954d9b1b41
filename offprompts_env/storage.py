"""Logged datasets on disk: a directory of Parquet shards, a safetensors file with the prompts, and a JSON manifest.

    log/
      manifest.json             what the log is, and its shards with rows, bytes and SHA-256
      prompts.safetensors       embeddings of the prompt catalogue, (A, d_e)
      shard-000000.parquet      rows: vectors as FixedSizeList<float32>, one column a field of LoggedDataset
      shard-000001.parquet ...

Every file is written under a temporary name, synced and renamed, the shard before the manifest that names it. So at any
moment the directory holds whole files only, and a shard that the manifest does not name yet is the next in the sequence
and is found by its name. The encodings are lossless: byte-stream-split and zstd for floating point numbers,
dictionaries for integers and text.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import numpy as np

from offprompts_env.errors import ConfigError, DataError, StorageError, unknown_name
from offprompts_env.types import Array, LoggedDataset, LogMetadata, Oracle, PromptSet

if TYPE_CHECKING:
    import pyarrow as pa

Mode = Literal["refuse", "append", "overwrite"]

FORMAT = "offprompts-log"
FORMAT_VERSION = 1
SHARD_ROWS = 1 << 18
_REPAIR = "restore it from a copy, or record the log again"
_ORACLE = "expected_reward"
_MANIFEST = "manifest.json"
_PROMPTS = "prompts.safetensors"
_SHARD = re.compile(r"shard-\d{6,}\.parquet")
_VECTOR = re.compile(r"float32\[(\d+)\]")
# A shard is flushed early once it holds this much text, so that long sentences do not pile up in memory.
_SHARD_CHARACTERS = 1 << 26


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
        columns: column name to type, e.g. ``float32[5]``, ``int16``, ``float64`` or ``string``.
        recordings: who wrote which rows.
        shards: the flushed rows, in order.
    """

    env_id: str | None
    env_config: Mapping[str, Any]
    notes: str
    prompt_texts: tuple[str, ...] | None
    prompt_fingerprint: str
    columns: Mapping[str, str]
    recordings: tuple[Recording, ...]
    shards: tuple[Shard, ...] = ()

    @property
    def rows(self) -> int:
        """Number of flushed rounds."""
        return sum(shard.rows for shard in self.shards)

    @property
    def metadata(self) -> LogMetadata:
        """Provenance; seed and versions are those of the first recording."""
        first = self.recordings[0]
        return LogMetadata(self.env_id, dict(self.env_config), first.seed, dict(first.versions), self.notes)


def read_manifest(path: str | Path) -> Manifest:
    """Return the manifest of the log at `path`, with the shards that it does not name yet.

    Raises:
        StorageError: there is no dataset, it has a newer format version, or a file is damaged.
    """
    manifest = _find_manifest(Path(path))
    if manifest is None:
        raise StorageError(
            f"{path}: expected a dataset directory with a {_MANIFEST}, found none; "
            "pass the directory that LoggedDataset.save, collect or a recording wrapper wrote"
        )
    return manifest


def load(path: str | Path) -> LoggedDataset:
    """Read a whole log.

    Raises:
        StorageError: there is no dataset at `path`, it has no rows, is of a newer format version, or a file of it is
            missing or damaged; the message names the file, and the expected and the actual checksum.
    """
    root = Path(path)
    manifest = read_manifest(root)
    if manifest.rows == 0:
        raise StorageError(f"{root}: expected at least one flushed row, found none; record some rounds first")
    prompts = _read_prompts(root, manifest)
    columns: dict[str, Array] = {}
    start = 0
    for shard in manifest.shards:
        for name, values in _read_shard(root, shard, manifest).items():
            if name not in columns:
                columns[name] = np.empty((manifest.rows, *values.shape[1:]), dtype=values.dtype)
            columns[name][start : start + shard.rows] = values
        start += shard.rows
    return _dataset(columns, prompts, manifest.metadata)


def iter_batches(path: str | Path, rows: int) -> Iterator[LoggedDataset]:
    """Read a log in batches of `rows` rounds, the last one possibly smaller; one shard is in memory at a time.

    Raises:
        ConfigError: `rows` is not positive.
        StorageError: as :func:`load`, when the damaged file is reached.
    """
    if rows < 1:
        raise ConfigError(f"rows: expected at least 1, got {rows}")
    root = Path(path)
    manifest = read_manifest(root)
    prompts = _read_prompts(root, manifest)
    left: dict[str, Array] = {}
    for shard in manifest.shards:
        fresh = _read_shard(root, shard, manifest)
        columns = {name: np.concatenate([left[name], v]) if left else v for name, v in fresh.items()}
        held = len(columns["action"])
        for start in range(0, held - rows + 1, rows):
            part = {name: values[start : start + rows] for name, values in columns.items()}
            yield _dataset(part, prompts, manifest.metadata)
        left = {name: values[held - held % rows :] for name, values in columns.items()}
    if left and len(left["action"]):
        yield _dataset(left, prompts, manifest.metadata)


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
        metadata: provenance of the rows to come.
        mode: what to do where there are rows already: refuse, append to them, or overwrite them.
        shard_rows: a shard is flushed when it has at least this many rows.
        batch_size: kept in the manifest, for recordings whose rows depend on it.

    Raises:
        StorageError: `mode` forbids to write here, another process is writing here, or the disk is full.
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
        self._metadata = metadata if metadata is not None else LogMetadata()
        self._shard_rows, self._batch_size = shard_rows, batch_size
        self._pending: list[tuple[LoggedDataset, int]] = []
        self._registered = False
        _json_text(self._metadata.env_config)
        self._lock = _lock(self.path)
        self._closed = False
        try:
            self._manifest = self._existing(mode)
        except BaseException:
            self._release()
            raise

    def _existing(self, mode: Mode) -> Manifest | None:
        """Return the log to append to, or None with the directory cleared for a new one."""
        try:
            existing = _find_manifest(self.path)
        except StorageError:
            if mode != "overwrite" or FORMAT not in (self.path / _MANIFEST).read_text(errors="replace"):
                raise
            _remove_log(self.path)
            return None
        if existing is None:
            foreign = [entry.name for entry in self.path.iterdir() if not _is_ours(entry)]
            if foreign:
                raise StorageError(
                    f"{self.path}: expected an empty directory or a log, found other files ({', '.join(foreign[:3])}); "
                    "choose another path"
                )
        if existing is None or existing.rows == 0 or mode == "overwrite":
            _remove_log(self.path)
            return None
        if mode == "refuse":
            raise StorageError(
                f"{self.path}: expected no log here, found one of {existing.rows} rows; pass mode='append' to continue "
                "it, mode='overwrite' to replace it, or another path"
            )
        metadata = self._metadata
        for name, expected, actual in (
            ("environment", existing.env_id, metadata.env_id),
            ("environment config", _json_text(existing.env_config), _json_text(metadata.env_config)),
            ("prompt fingerprint", existing.prompt_fingerprint, self.prompts.fingerprint),
        ):
            if expected != actual:
                raise DataError(
                    f"{self.path}: cannot append, expected {name} {expected} as recorded, got {actual}; "
                    "record into another directory"
                )
        _remove(self.path.glob(".*.tmp"))
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

    @property
    def _pending_rows(self) -> int:
        return sum(len(part) for part, _ in self._pending)

    def append(self, batch: LoggedDataset) -> None:
        """Add the rows of `batch`; its prompts and metadata are taken to be those of the writer.

        Raises:
            DataError: the columns differ from those of the rows before, or a text is not valid Unicode.
            StorageError: a shard could not be written; the rows stay in memory, and :meth:`flush` tries again.
        """
        self._require_open()
        columns = _column_types(batch)
        expected: Mapping[str, str] | None = None if self._manifest is None else self._manifest.columns
        if self._pending:
            expected = _column_types(self._pending[0][0])
        if expected is not None and dict(expected) != columns:
            raise DataError(
                f"{self.path}: cannot append, expected columns {_json_text(expected)}, got {_json_text(columns)}; "
                "record the same columns in every batch"
            )
        step = self._shard_rows
        parts = [batch] if len(batch) <= step else [batch.take(slice(i, i + step)) for i in range(0, len(batch), step)]
        characters = [_count_characters(part) for part in parts]
        self._pending.extend(zip(parts, characters, strict=True))
        if self._shard_end() is not None:
            self._write_shards(partial=False)

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
        for end, (part, count) in enumerate(self._pending, start=1):
            rows, characters = rows + len(part), characters + count
            if rows >= self._shard_rows or characters >= _SHARD_CHARACTERS:
                return end
        return None

    def _write_shards(self, partial: bool) -> None:
        while self._pending:
            end = self._shard_end()
            if end is None and not partial:
                return
            try:
                self._write_shard([part for part, _ in self._pending[:end]])
            except OSError as error:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                raise StorageError(
                    f"{self.path}: cannot write: {'the disk is full' if full else error}; {self.flushed_rows} rows are "
                    f"safe on disk, {self._pending_rows} are in memory only; free some space and flush again, or "
                    "reopen later with mode='append'"
                ) from error
            del self._pending[:end]

    def _write_shard(self, parts: Sequence[LoggedDataset]) -> None:
        if self._manifest is None:
            _write_prompts(self.path, self.prompts)
        manifest = self._manifest if self._registered and self._manifest is not None else self._register(parts[0])
        content = _encode(parts, manifest)
        rows = sum(len(part) for part in parts)
        shard = Shard(_shard_name(len(manifest.shards)), rows, len(content), hashlib.sha256(content).hexdigest())
        _write_atomic(self.path / shard.file, content)
        manifest = replace(manifest, shards=(*manifest.shards, shard))
        _write_atomic(self.path / _MANIFEST, _manifest_bytes(manifest))
        self._manifest = manifest

    def _register(self, first: LoggedDataset) -> Manifest:
        """Note this recording in the manifest before its first shard."""
        metadata, manifest = self._metadata, self._manifest
        recording = Recording(self.flushed_rows, metadata.seed, self._batch_size, metadata.versions)
        if manifest is None:
            manifest = Manifest(
                env_id=metadata.env_id,
                env_config=metadata.env_config,
                notes=metadata.notes,
                prompt_texts=self.prompts.texts,
                prompt_fingerprint=self.prompts.fingerprint,
                columns=_column_types(first),
                recordings=(),
            )
        manifest = replace(manifest, recordings=(*manifest.recordings, recording))
        _write_atomic(self.path / _MANIFEST, _manifest_bytes(manifest))
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
            os.close(self._lock)
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


def _column_types(log: LoggedDataset) -> dict[str, str]:
    types = {name: f"float32[{getattr(log, name).shape[1]}]" for name in ("context", "query", "output")}
    types["action"] = next(t for t in ("int8", "int16", "int32", "int64") if log.n_prompts <= np.iinfo(t).max + 1)
    types |= {"propensity": "float64", "reward": "float32"}
    optional = {"user_id": "int64", "item_id": "int64", "query_text": "string", "sentence": "string"}
    types |= {name: kind for name, kind in optional.items() if getattr(log, name) is not None}
    if log.oracle is not None:
        types[_ORACLE] = "float32"
    return types


def _values(log: LoggedDataset, name: str) -> Array:
    return np.asarray(log.oracle.expected_reward if name == _ORACLE and log.oracle else getattr(log, name))


def _dataset(columns: Mapping[str, Array], prompts: PromptSet, metadata: LogMetadata) -> LoggedDataset:
    rest = {name: values for name, values in columns.items() if name != _ORACLE}
    oracle = Oracle(columns[_ORACLE]) if _ORACLE in columns else None
    return LoggedDataset(**rest, prompts=prompts, oracle=oracle, metadata=metadata)


def _count_characters(log: LoggedDataset) -> int:
    """Return the amount of text in `log`, or say which row is not text that a file can hold."""
    total = 0
    for name in ("sentence", "query_text"):
        texts = getattr(log, name)
        if texts is None:
            continue
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"{name}: expected text, got {text!r} in row {row}; record '' where there is none")
            total += len(text)
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:
            row = next(row for row, text in enumerate(texts) if _is_broken(text))
            raise DataError(
                f"{name}: expected valid Unicode, got {texts[row][:80]!r} in row {row} with a lone surrogate; "
                "replace it before recording"
            ) from error
    return total


def _is_broken(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _arrow_schema(columns: Mapping[str, str]) -> pa.Schema:
    """Return the Arrow schema; a vector of dimension 0 has no column."""
    import pyarrow as pa

    def arrow_type(kind: str) -> pa.DataType:
        vector = _VECTOR.fullmatch(kind)
        if vector:
            return pa.list_(pa.field("element", pa.float32(), nullable=False), int(vector[1]))
        # Offsets of 64 bits: a shard may hold more than 2 GiB of text.
        return pa.large_string() if kind == "string" else pa.type_for_alias(kind)

    stored = {name: kind for name, kind in columns.items() if kind != "float32[0]"}
    return pa.schema([pa.field(name, arrow_type(kind), nullable=False) for name, kind in stored.items()])


def _encode(parts: Sequence[LoggedDataset], manifest: Manifest) -> memoryview:
    """Return the rows of `parts` as the bytes of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _arrow_schema(manifest.columns)
    arrays = []
    for column in schema:
        values = np.concatenate([_values(part, column.name) for part in parts])
        if values.ndim == 2:
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), type=column.type))
        elif values.dtype == object:
            arrays.append(pa.array(values, type=column.type))
        else:
            arrays.append(pa.array(values.astype(column.type.to_pandas_dtype(), copy=False)))
    floats = {name: kind for name, kind in manifest.columns.items() if kind.startswith("float")}
    leaves = {name: f"{name}.list.element" if _VECTOR.fullmatch(kind) else name for name, kind in floats.items()}
    stamp = {"first_row": str(manifest.rows), "prompts": manifest.prompt_fingerprint}
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table(arrays, schema=schema.with_metadata(stamp)),
        sink,
        compression="zstd",
        compression_level=1,
        use_dictionary=[name for name in schema.names if name not in floats],
        column_encoding=dict.fromkeys((leaves[name] for name in floats if name in schema.names), "BYTE_STREAM_SPLIT"),
        write_statistics=False,
    )
    return memoryview(sink.getvalue())


def _decode(content: bytes, file: Path, manifest: Manifest) -> dict[str, Array]:
    """Return the columns in a Parquet file whose bytes are `content`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(content))
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"{file}: expected a Parquet file, cannot read it: {error}; {_REPAIR}") from error
    schema, expected = table.schema.remove_metadata(), _arrow_schema(manifest.columns)
    if schema != expected:
        raise StorageError(f"{file}: expected columns ({_one_line(expected)}), got ({_one_line(schema)}); {_REPAIR}")
    columns: dict[str, Array] = {}
    for name, kind in manifest.columns.items():
        vector = _VECTOR.fullmatch(kind)
        if kind == "float32[0]":
            columns[name] = np.empty((table.num_rows, 0), dtype=np.float32)
        elif vector:
            flat = table.column(name).combine_chunks().flatten()
            columns[name] = flat.to_numpy(zero_copy_only=False).reshape(-1, int(vector[1]))
        else:
            columns[name] = table.column(name).to_numpy()
    columns["action"] = columns["action"].astype(np.int64, copy=False)
    return columns


def _one_line(schema: pa.Schema) -> str:
    return ", ".join(f"{column.name}: {column.type}" for column in schema)


def _read_shard(root: Path, shard: Shard, manifest: Manifest) -> dict[str, Array]:
    content = _read(root / shard.file)
    _check_sum(root / shard.file, content, shard.sha256)
    return _decode(content, root / shard.file, manifest)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise StorageError(f"{file}: expected this file of the log, it is missing; {_REPAIR}") from error
    except OSError as error:
        raise StorageError(f"{file}: cannot read: {error}; {_REPAIR}") from error


def _check_sum(file: Path, content: bytes, expected: str) -> None:
    actual = hashlib.sha256(content).hexdigest()
    if actual != expected:
        raise StorageError(
            f"{file}: damaged: expected SHA-256 {expected}, got {actual} of {len(content)} bytes; {_REPAIR}"
        )


def _write_prompts(root: Path, prompts: PromptSet) -> None:
    from safetensors.numpy import save as safetensors_bytes

    embeddings = np.ascontiguousarray(prompts.embeddings)
    _write_atomic(root / _PROMPTS, safetensors_bytes({"embeddings": embeddings}))


def _read_prompts(root: Path, manifest: Manifest) -> PromptSet:
    from safetensors import SafetensorError
    from safetensors.numpy import load as safetensors_arrays

    file = root / _PROMPTS
    try:
        prompts = PromptSet(safetensors_arrays(_read(file))["embeddings"], manifest.prompt_texts)
    except (SafetensorError, KeyError, ValueError) as error:
        raise StorageError(f"{file}: expected the prompt embeddings, cannot read them: {error}; {_REPAIR}") from error
    if prompts.fingerprint != manifest.prompt_fingerprint:
        raise StorageError(
            f"{file}: expected prompts with fingerprint {manifest.prompt_fingerprint}, got {prompts.fingerprint}; "
            f"{_REPAIR}"
        )
    return prompts


def _find_manifest(root: Path) -> Manifest | None:
    """Return the manifest in `root` with the shards it does not name yet, or None if there is none."""
    file = root / _MANIFEST
    if not file.is_file():
        return None
    manifest = _parse_manifest(file, _read(file))
    while True:
        following = root / _shard_name(len(manifest.shards))
        if not following.is_file():
            return manifest
        manifest = replace(manifest, shards=(*manifest.shards, _recover(following, manifest)))


def _recover(file: Path, manifest: Manifest) -> Shard:
    """Return the entry of a whole shard that was written just before a kill, after the last manifest."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = _read(file)
    _decode(content, file, manifest)
    found = pq.read_schema(pa.BufferReader(content)).metadata or {}
    expected = {b"first_row": str(manifest.rows).encode(), b"prompts": manifest.prompt_fingerprint.encode()}
    actual = {key: found.get(key) for key in expected}
    if actual != expected:
        raise StorageError(f"{file}: expected the shard that follows the manifest, {expected}, got {actual}; {_REPAIR}")
    rows = pq.read_metadata(pa.BufferReader(content)).num_rows
    return Shard(file.name, rows, len(content), hashlib.sha256(content).hexdigest())


def _parse_manifest(file: Path, content: bytes) -> Manifest:
    try:
        raw = json.loads(content)
    except ValueError as error:
        raise StorageError(f"{file}: expected JSON, cannot read it: {error}; {_REPAIR}") from error
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
        return Manifest(
            env_id=raw["env_id"],
            env_config=raw["env_config"],
            notes=raw["notes"],
            prompt_texts=None if texts is None else tuple(texts),
            prompt_fingerprint=raw["prompt_fingerprint"],
            columns=raw["columns"],
            recordings=tuple(Recording(**entry) for entry in raw["recordings"]),
            shards=tuple(Shard(**entry) for entry in raw["shards"]),
        )
    except (KeyError, TypeError) as error:
        raise StorageError(f"{file}: incomplete: {type(error).__name__} {error}; {_REPAIR}") from error


def _manifest_bytes(manifest: Manifest) -> bytes:
    content = {"format": FORMAT, "version": FORMAT_VERSION, "rows": manifest.rows, **asdict(manifest)}
    return (json.dumps(content, indent=1) + "\n").encode()


def _json_text(value: Mapping[str, Any]) -> str:
    """Return `value` as canonical JSON; tuples and lists come out alike."""
    try:
        return json.dumps(dict(value), sort_keys=True)
    except (TypeError, ValueError) as error:
        raise DataError(f"metadata: expected an environment config that fits into JSON: {error}") from error


def _shard_name(index: int) -> str:
    return f"shard-{index:06d}.parquet"


def _is_ours(entry: Path) -> bool:
    name = entry.name.removeprefix(".").removesuffix(".tmp")
    return name in (_MANIFEST, _PROMPTS) or _SHARD.fullmatch(name) is not None


def _remove_log(root: Path) -> None:
    # The last shard goes first: what a kill leaves behind is a log that misses shards, never one with rows mixed up.
    _remove(sorted((entry for entry in root.iterdir() if _SHARD.fullmatch(entry.name)), reverse=True))
    _remove([root / _MANIFEST, root / _PROMPTS, *root.glob(".*.tmp")])


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        if _is_ours(file):
            file.unlink(missing_ok=True)


def _lock(root: Path) -> int | None:
    """Make the directory and take its lock, which ends with the process; None where the system has no such locks."""
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


def _write_atomic(file: Path, content: bytes | memoryview) -> None:
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
