"""Results of sweeps: one row a run, in Parquet files that only ever appear whole.

A folder of results holds ``rows/*.parquet``. Rows are appended as new files, under a lock that one writer has at a
time, and merged into one file when it is done. The reader counts a run once however often it finds it.
"""

from __future__ import annotations

import io
import json
import math
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from offprompts_env.errors import StorageError
from offprompts_env.manifest import write_atomic

FORMAT_VERSION = 1


class ResultsWarning(UserWarning):
    """Some rows or files of a folder of results are not used; the message says which, why, and what to do."""


@dataclass(frozen=True)
class Result:
    """What one run gave.

    Attributes:
        value: true value of the policy (estimators: mean of the estimates).
        standard_error: of that value, over evaluation rounds (estimators: over logs).
        references: true values of policies that the environment owns, by name: "uniform", "logging", "oracle",
            and where known "online", "no prompt", "best single".
        curve_steps: gradient steps at which the policy was looked at.
        curve: what it was worth there, in the unit of :attr:`Row.score`.
        seconds: processor time of learning, of one of the runs learned as one problem.
        shared_seconds: processor time of what it shares with other runs: logging policy, regressions, density.
        sentences: that a generator with a price was asked for.
        measures: further numbers by name.
        details: what else the report shows, JSON-able.
        wall_seconds: from the start of a task to its end, with everything that was not there yet, the runs of the task
            sharing equally; NaN where it was not noted.
    """

    value: float
    standard_error: float
    references: Mapping[str, float] = field(default_factory=dict)
    curve_steps: tuple[int, ...] = ()
    curve: tuple[float, ...] = ()
    seconds: float = 0.0
    shared_seconds: float = 0.0
    sentences: int = 0
    measures: Mapping[str, float] = field(default_factory=dict)
    details: Any = None
    wall_seconds: float = math.nan

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_json`."""
        held = {**value, "curve_steps": tuple(value["curve_steps"]), "curve": tuple(value["curve"])}
        return cls(**held)


@dataclass(frozen=True)
class Row:
    """A run with its result and its provenance.

    Attributes:
        id: ``data_size/n=500/world=3/learner=dso``.
        sweep: its first part.
        point: what is varied, ``n=500``.
        x: where that is on the axis; NaN where the axis has no numbers.
        world: seed of the world, or of the log.
        seed: of learning.
        learner: name.
        score: what figures show: the optimality ``(V(π) − V(uniform)) / (V(oracle) − V(uniform))`` on vectors, the
            improvement over no prompt on text, the squared error relative to the truth for estimators.
        key: digest of everything the result depends on.
        config: setting and learner, in full.
        result: what the run gave.
        versions: package name to version.
        commit: of the source tree, empty where there is none.
        device: what it ran on.
        finished: when, ISO 8601 in UTC.
    """

    id: str
    sweep: str
    point: str
    x: float
    world: int
    seed: int
    learner: str
    score: float
    key: str
    config: str
    result: Result
    versions: Mapping[str, str]
    commit: str
    device: str
    finished: str


_PLAIN = [f.name for f in fields(Row) if f.name not in {"result", "versions"}]
_NUMBERS = ("value", "standard_error", "seconds", "shared_seconds", "sentences")
_LATER = ("wall_seconds",)
"""Columns that came later: a file may be without."""
_AS_JSON = ("references", "measures", "details")
_TYPES: Mapping[str, pa.DataType] = {
    "str": pa.string(), "int": pa.int64(), "float": pa.float64(),
}  # fmt: skip
SCHEMA = pa.schema(
    [("format_version", pa.int32())]
    + [(f.name, _TYPES[str(f.type)]) for f in fields(Row) if f.name in _PLAIN]
    + [(f.name, _TYPES[str(f.type)]) for f in fields(Result) if f.name in (*_NUMBERS, *_LATER)]
    + [("curve_steps", pa.list_(pa.int64())), ("curve", pa.list_(pa.float64()))]
    + [(name, pa.string()) for name in (*_AS_JSON, "versions")]
)
"""Columns of a file of rows; records are JSON."""


def _to_columns(row: Row) -> dict[str, Any]:
    result = row.result
    return {
        "format_version": FORMAT_VERSION,
        **{name: getattr(row, name) for name in _PLAIN},
        **{name: getattr(result, name) for name in (*_NUMBERS, *_LATER)},
        "curve_steps": list(result.curve_steps),
        "curve": list(result.curve),
        **{name: json.dumps(getattr(result, name)) for name in _AS_JSON},
        "versions": json.dumps(dict(row.versions)),
    }


def _from_columns(held: Mapping[str, Any]) -> Row:
    result = Result(
        **{name: held[name] for name in _NUMBERS},
        **{name: held[name] for name in _LATER if name in held},
        curve_steps=tuple(held["curve_steps"]),
        curve=tuple(held["curve"]),
        **{name: json.loads(held[name]) for name in _AS_JSON},
    )
    return Row(**{name: held[name] for name in _PLAIN}, result=result, versions=json.loads(held["versions"]))


def rows_bytes(rows: Iterable[Row]) -> bytes:
    """Return the content of a file of rows."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([_to_columns(row) for row in rows], SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()


def read_rows(root: Path) -> list[Row]:
    """Return the rows of a folder of results, one a run: the one that was written last.

    Files that cannot be read and rows of other format versions are left where they are and out of the results; a
    :class:`ResultsWarning` says so.
    """
    files = _files(root)
    found = [_read_file(file) for file in files]
    while any(content.gone for content in found) and files != (files := _files(root)):
        # A writer merged them meanwhile: their rows are in a file that was not there before.
        found = [_read_file(file) for file in files]
    for content in found:
        if content.problem:
            _warn(content.problem)
    return _latest(row for content in found for row in content.rows)


def _latest(rows: Iterable[Row]) -> list[Row]:
    latest: dict[str, Row] = {}
    for row in rows:
        known = latest.get(row.id)
        if known is None or known.finished <= row.finished:
            latest[row.id] = row
    return list(latest.values())


def _files(root: Path) -> list[Path]:
    return sorted((root / "rows").glob("*.parquet"))


@dataclass(frozen=True)
class _Content:
    """What a file of rows holds.

    Attributes:
        rows: that can be used.
        problem: why these are not all.
        damaged: nobody can use it.
        gone: it was there when the folder was listed.
    """

    rows: tuple[Row, ...] = ()
    problem: str = ""
    damaged: bool = False
    gone: bool = False


def _read_file(file: Path) -> _Content:
    try:
        held = pq.read_table(file).to_pylist()
    except FileNotFoundError:
        return _Content(gone=True)
    except (pa.ArrowException, OSError) as error:
        # An error of the system has a number; one about what is in the file has none, whatever its class.
        damaged = not isinstance(error, OSError) or error.errno is None
        return _Content(problem=_unreadable(file, error), damaged=damaged)
    fitting = [row for row in held if row.get("format_version") == FORMAT_VERSION]
    try:
        rows = tuple(_from_columns(row) for row in fitting)
    except (KeyError, TypeError, ValueError) as error:
        return _Content(problem=_unreadable(file, error), damaged=True)
    if len(rows) == len(held):
        return _Content(rows)
    found = sorted({str(row.get("format_version")) for row in held} - {str(FORMAT_VERSION)})
    return _Content(
        rows,
        f"{file}: {len(held) - len(rows)} rows have format version {', '.join(found)}, this package reads "
        f"{FORMAT_VERSION}; they are left out. Read them with the version that wrote them, or run the sweep again and "
        "delete the file",
    )


def _unreadable(file: Path, error: Exception) -> str:
    return (
        f"{file}: cannot be read ({type(error).__name__}: {error}); its rows are left out. Run the sweep again: it "
        "makes only those anew, without training where the store beside them is whole"
    )


def _warn(message: str) -> None:
    warnings.warn(message, ResultsWarning, stacklevel=4)


class Results(AbstractContextManager["Results"]):
    """The one writer of a folder of results; a context manager.

    Args:
        root: the folder, made if need be.

    Raises:
        StorageError: the folder cannot be made, or another process is writing to it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            (root / "rows").mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(root / "rows" / ".lock")
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise StorageError(
                f"{root}: expected to be the only sweep that writes here, but another one is running; wait for it, or "
                "choose another folder with --out"
            ) from error
        except OSError as error:
            raise StorageError(f"{root}: expected a folder that can be written, got {error}") from error
        try:
            self._set_aside()
        except BaseException:
            self._lock.release()
            raise
        self._next = 1 + max((_number(file) for file in _files(root)), default=0)

    def _set_aside(self) -> None:
        """Move files that nobody can read, such as one that was cut short, out of the way."""
        for file in _files(self.root):
            content = _read_file(file)
            if content.damaged:
                aside = self.root / "damaged" / f"{file.stem}-{time.time_ns()}{file.suffix}"
                try:
                    aside.parent.mkdir(exist_ok=True)
                    file.replace(aside)
                except OSError as error:
                    raise _unwritable(aside, error) from error
                _warn(f"{content.problem}. It was moved to {aside}")

    def append(self, rows: Sequence[Row]) -> None:
        """Write `rows` as one new file.

        Raises:
            StorageError: they cannot be written; what was there before is untouched.
        """
        file = self.root / "rows" / f"{self._next:06d}.parquet"
        try:
            write_atomic(file, rows_bytes(rows))
        except OSError as error:
            raise _unwritable(file, error) from error
        self._next += 1

    def merge(self) -> None:
        """Put all rows into one file, a run once. What cannot be read, or is of another version, stays as it is.

        Raises:
            StorageError: it cannot be written; no row is lost.
        """
        found = {file: _read_file(file) for file in _files(self.root)}
        whole = [file for file, content in found.items() if content.rows and not content.problem]
        if len(whole) < 2:
            return
        self.append(_latest(row for file in whole for row in found[file].rows))
        for file in whole:
            file.unlink(missing_ok=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let others write."""
        self._lock.release()


def _number(file: Path) -> int:
    return int(file.stem) if file.stem.isdigit() else 0


def _unwritable(file: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{file}: cannot be written: {error}; free some space, then run the same command again: rows written so far "
        "are kept"
    )
