"""Sentences on disk: what a language model has written is kept, shared between processes, and never asked for twice.

One SQLite file in write-ahead mode. A sentence is named by the model that wrote it (its fingerprint), the *series* of
random numbers that it was written with, the full request, and a sample index:

===============  ================================================================================================
series           sentence k of a request
===============  ================================================================================================
``table <s>``    the k-th sample of a :class:`~offprompts_env.text.cache.SampleTable` with seed s
``no prompt``    the k-th reference sentence of :class:`~offprompts_env.movielens.rewards.UnpromptedSentences`
===============  ================================================================================================

A sentence under a name is a function of that name where the model is reproducible. Where it is not (a server that
ignores seeds), the first writer wins, and all later readers see what it wrote. So a store changes how often a model is
asked, and nothing about the distribution of what is read: neither who wins nor what makes room depends on what a
sentence says. One thing is out of its hands: if such a server gives short answers sooner, and several processes ask it
for the same names at the same moment, the first is more often a short one. Let one process fill the store, as
``offprompts generate`` does.

Embeddings lie beside the sentences, named by the encoder's fingerprint and the sentence.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from offprompts_env.config import check_integer
from offprompts_env.errors import DataError, StorageError
from offprompts_env.types import Array, FloatArray

FORMAT_VERSION = 1

#: Series of the references of a continuous reward. They are few and are not dropped to make room: a model that ignores
#: seeds would write others in their place, and rewards would shift.
NO_PROMPT_SERIES = "no prompt"

# "OPSe": tells our files from other SQLite databases.
_APPLICATION = 0x4F505365

# Keys looked up by one statement: enough to hide the cost of a statement, few enough for SQLite's 32,766 parameters.
_AT_ONCE = 4096

_DAMAGED = "It is no sentence store or is damaged: choose another path, or move it away and generate again"

# How long one process waits for another's transaction, in seconds. Transactions take milliseconds.
_PATIENCE = 60.0

_SCHEMA = """
CREATE TABLE model (fingerprint TEXT PRIMARY KEY, facts TEXT NOT NULL);
CREATE TABLE series (id INTEGER PRIMARY KEY, model TEXT NOT NULL, name TEXT NOT NULL, UNIQUE (model, name));
CREATE TABLE request (id INTEGER PRIMARY KEY AUTOINCREMENT, key BLOB NOT NULL UNIQUE, series INTEGER NOT NULL,
                      text BLOB NOT NULL);
CREATE TABLE sentence (request INTEGER NOT NULL, sample INTEGER NOT NULL, text BLOB NOT NULL,
                       PRIMARY KEY (request, sample)) WITHOUT ROWID;
CREATE TABLE embedding (id INTEGER PRIMARY KEY AUTOINCREMENT, key BLOB NOT NULL UNIQUE, vector BLOB NOT NULL);
CREATE TABLE count (what TEXT PRIMARY KEY, n INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO count VALUES ('sentence', 0), ('embedding', 0);
"""

# Nothing else may stand in a store: a trigger or a view in a file from elsewhere would act in our name.
_TABLES = frozenset({"model", "series", "request", "sentence", "embedding", "count"})

# How SQLite says that it cannot make the files that go with a write-ahead log.
_UNWRITABLE = frozenset({sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY})

KindT = TypeVar("KindT")

# What a file is known by: i-node, size, time of change, and whether a writer's log lies beside it.
_State = tuple[int, int, int, bool]


class _DamageError(Exception):
    """What was read is not what :class:`SentenceStore` writes."""


@dataclass(frozen=True, slots=True)
class StoredModel:
    """What a store holds of one model in one series.

    Attributes:
        fingerprint: of the model.
        series: see the module.
        facts: what was said about the model with :meth:`SentenceStore.describe`.
        requests: different requests.
        sentences: their sentences.
    """

    fingerprint: str
    series: str
    facts: Mapping[str, Any]
    requests: int
    sentences: int


@dataclass(frozen=True, slots=True)
class StoredSentence:
    """One sentence with its name."""

    model: str
    series: str
    request: str
    sample: int
    sentence: str


class SentenceStore:
    """A file of sentences that many processes may read and write at once.

    Every method is one transaction: a process that is killed leaves all of it or nothing. A copy in another process
    (pickled, or forked) opens a connection of its own.

    With `max_sentences`, the requests that were first stored longest ago make room, each with all its sentences; what
    the same call has just put stays, even if it alone is more, and so do references (:data:`NO_PROMPT_SERIES`).
    Embeddings are bounded by the same number. A reproducible model writes what was dropped as it was; for one that is
    not, a :class:`~offprompts_env.text.cache.SampleTable` refuses a bounded store, since its K sentences would not stay
    the same.

    What the file could not take (full disk, locked) is held in memory, and the next :meth:`put` or :meth:`complete`
    puts it first: a model is asked for nothing new before what it has said is safe. A pickled copy does not hold it.

    Args:
        path: the file; it is made where there is none. Its folder must exist. Not on a network file system, where
            SQLite's locks do not hold.
        max_sentences: sentences kept; None for no bound.
        read_only: never write, and refuse to make the file. Where it or its folder cannot be written either, the file
            is read as it is while no writer's log lies beside it, and opened anew when it has changed.

    Raises:
        ConfigError: `max_sentences` is no integer ≥ 1.
        StorageError: the file is something else, is damaged, of a newer format, or cannot be opened.
    """

    def __init__(self, path: str | Path, *, max_sentences: int | None = None, read_only: bool = False) -> None:
        if max_sentences is not None:
            check_integer("max_sentences", max_sentences, 1)
        try:
            self.path = Path(path).expanduser()
        except RuntimeError as error:
            raise StorageError(f"sentence store: cannot tell which folder {path} begins with: {error}") from error
        self.max_sentences, self.read_only = max_sentences, read_only
        self._open_in: dict[tuple[int, int], sqlite3.Connection] = {}
        self._unsaved: dict[tuple[str, str, str, int], str] = {}
        self._as_it_was: dict[sqlite3.Connection, _State] = {}
        self._connection()

    @classmethod
    def shared(cls, path: str | Path) -> SentenceStore:
        """Open `path` for reading and writing, or where it cannot be written for reading, with a warning.

        Raises:
            StorageError: as the class.
        """
        try:
            file = Path(path).expanduser().resolve()
        except (RuntimeError, OSError, ValueError):
            return cls(path)
        if not file.is_file() or all(os.access(place, os.W_OK) for place in (file, file.parent)):
            return cls(path)
        warnings.warn(
            f"sentence store: {path} or its folder cannot be written; sentences that it lacks are written by the model "
            "and not kept. Copy it to where they can be kept, if they are many",
            stacklevel=2,
        )
        return cls(path, read_only=True)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.path, self.max_sentences, self.read_only)

    def __enter__(self) -> SentenceStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    def __len__(self) -> int:
        """Number of sentences."""
        with self._reading() as connection:
            return _number(connection, "sentence")

    @property
    def size(self) -> int:
        """Bytes on disk; what was written last lies in a log beside the file until it is taken over."""
        file = self._file()
        return sum(path.stat().st_size for path in (file, _beside(file, "-wal")) if path.is_file())

    def close(self) -> None:
        """Close the connections of this process; the next call opens one again."""
        for owner in list(self._open_in):
            # What was inherited by a fork must not be touched: closing it would drop the parent's locks.
            if owner[0] == os.getpid():
                self._forget(owner)

    def get(self, model: str, series: str, requests: Sequence[str], samples: Sequence[int]) -> list[str | None]:
        """Return the sentence of each (request, sample), None where there is none.

        Args:
            model: fingerprint of the language model.
            series: see the module.
            requests: full requests, n of them.
            samples: their sample indices, n of them.

        Raises:
            DataError: requests and samples differ in number, or a name cannot be one.
            StorageError: the file cannot be read.
        """
        found: list[str | None] = [None] * len(requests)
        with self._reading() as connection:
            for position, text in self._lookup(connection, model, series, requests, samples, "sentence.text"):
                found[position] = _text(text)
        return found

    def missing(self, model: str, series: str, requests: Sequence[str], samples: Sequence[int]) -> list[int]:
        """Return the positions of those (request, sample) that :meth:`get` would not find, in rising order."""
        held = np.zeros(len(requests), dtype=bool)
        with self._reading() as connection:
            for position, _ in self._lookup(connection, model, series, requests, samples, "1"):
                held[position] = True
        return np.flatnonzero(~held).tolist()

    def put(
        self, model: str, series: str, requests: Sequence[str], samples: Sequence[int], sentences: Sequence[str]
    ) -> list[str]:
        """Store sentences, and return what the store holds under each name: the first writer wins.

        Raises:
            DataError: requests, samples and sentences differ in number, a name cannot be one, or a sentence is no text.
            StorageError: the file cannot be written; nothing of this call is stored then, nothing that was there is
                lost, and unless the store is read-only, the sentences are held for :meth:`save`.
        """
        _check_sentences(sentences, len(requests))
        keys = _request_keys(model, series, requests, samples)
        if not keys:
            return []
        try:
            self.save()
            return self._put(model, series, requests, samples, sentences, keys)
        except StorageError as error:
            # What SQLite finds too long it would find too long again, and nothing could be put after it.
            if self.read_only or isinstance(error.__cause__, sqlite3.DataError):
                raise
            self._hold(model, series, requests, samples, sentences)
            raise StorageError(
                f"{error}. {len(self._unsaved)} sentences are held in memory; the next put, or save(), tries again"
            ) from error
        except KeyboardInterrupt:
            self._hold(model, series, requests, samples, sentences)
            raise

    def save(self) -> None:
        """Put what earlier calls could not.

        Raises:
            StorageError: it still cannot be written, and stays held.
        """
        if not self._unsaved:
            return
        batches: dict[tuple[str, str], list[tuple[str, int, str]]] = {}
        for (model, series, request, sample), sentence in dict(self._unsaved).items():
            batches.setdefault((model, series), []).append((request, sample, sentence))
        for (model, series), rows in batches.items():
            requests, samples, sentences = (list(column) for column in zip(*rows, strict=True))
            self._put(model, series, requests, samples, sentences, _request_keys(model, series, requests, samples))
            for request, sample in zip(requests, samples, strict=True):
                self._unsaved.pop((model, series, request, sample), None)

    def _hold(
        self, model: str, series: str, requests: Sequence[str], samples: Sequence[int], sentences: Sequence[str]
    ) -> None:
        for request, sample, sentence in zip(requests, samples, sentences, strict=True):
            self._unsaved.setdefault((model, series, request, int(sample)), sentence)

    def _put(
        self,
        model: str,
        series: str,
        requests: Sequence[str],
        samples: Sequence[int],
        sentences: Sequence[str],
        keys: list[bytes],
    ) -> list[str]:
        with self._writing() as connection:
            connection.execute("INSERT OR IGNORE INTO series (model, name) VALUES (?, ?)", (model, series))
            where = "SELECT id FROM series WHERE model = ? AND name = ?"
            number = connection.execute(where, (model, series)).fetchone()[0]
            texts = dict(zip(keys, requests, strict=True))
            connection.executemany(
                "INSERT OR IGNORE INTO request (key, series, text) VALUES (?, ?, ?)",
                ((key, number, _bytes(text)) for key, text in texts.items()),
            )
            before = connection.total_changes
            connection.executemany(
                "INSERT OR IGNORE INTO sentence SELECT id, ?, ? FROM request WHERE key = ?",
                ((int(k), _bytes(text), key) for key, k, text in zip(keys, samples, sentences, strict=True)),
            )
            added = connection.total_changes - before
            held = list(sentences)
            if added < len(keys):
                for position, text in self._lookup(connection, model, series, requests, samples, "sentence.text"):
                    held[position] = _text(text)
            self._count(connection, "sentence", added)
            self._make_room(connection, list(texts))
        return held

    def complete(
        self,
        model: str,
        series: str,
        requests: Sequence[str],
        samples: Sequence[int],
        write: Callable[[Sequence[int]], Sequence[str]],
    ) -> list[str]:
        """Return the sentence of each (request, sample): what is held, and otherwise what `write` says, which is put.

        A name that is asked for twice is written once.

        Args:
            model: fingerprint of the language model.
            series: see the module.
            requests: full requests, n of them.
            samples: their sample indices, n of them.
            write: gets positions of those that are missing, the first of each name, and returns their sentences.

        Raises:
            DataError: as :meth:`put`.
            StorageError: as :meth:`put`, before `write` is asked where sentences are held already; a store that is
                read-only is only read.
        """
        self.save()
        held = self.get(model, series, requests, samples)
        names = [(request, int(sample)) for request, sample in zip(requests, samples, strict=True)]
        first: dict[tuple[str, int], int] = {}
        for position, sentence in enumerate(held):
            if sentence is None:
                first.setdefault(names[position], position)
        if not first:
            return [sentence for sentence in held if sentence is not None]
        fresh = list(write(list(first.values())))
        _check_sentences(fresh, len(first))
        if not self.read_only:
            asked, index = zip(*first, strict=True)
            fresh = self.put(model, series, asked, index, fresh)
        said = dict(zip(first, fresh, strict=True))
        return [said[name] if sentence is None else sentence for name, sentence in zip(names, held, strict=True)]

    def embeddings(self, encoder: str, sentences: Sequence[str]) -> tuple[FloatArray, Array]:
        """Return the embeddings of `sentences` under the encoder with this fingerprint.

        Returns:
            (n, d) float32, zeros where there is none ((n, 0) where there is none at all), and which there are, (n,).
        """
        _name("encoder", encoder)
        _check_texts("sentences", sentences)
        keys = [_digest(encoder, sentence) for sentence in sentences]
        found: dict[bytes, bytes] = {}
        unique = list(dict.fromkeys(keys))
        with self._reading() as connection:
            for start in range(0, len(unique), _AT_ONCE):
                some = unique[start : start + _AT_ONCE]
                marks = ",".join("?" * len(some))
                found.update(connection.execute(f"SELECT key, vector FROM embedding WHERE key IN ({marks})", some))
            sizes = {len(_is(vector, bytes)) for vector in found.values()}
        held = np.fromiter((key in found for key in keys), dtype=bool, count=len(keys))
        if len(sizes) > 1 or any(size % 4 for size in sizes):
            raise StorageError(
                f"sentence store: expected embeddings of one dimension of encoder {encoder!r} in {self.path}, found "
                f"{sorted(sizes)} bytes. {_DAMAGED}"
            )
        dim = next(iter(sizes), 0) // 4
        vectors = np.zeros((len(keys), dim), dtype=np.float32)
        if found:
            stacked = b"".join(found[key] for key in keys if key in found)
            vectors[held] = np.frombuffer(stacked, dtype="<f4").reshape(-1, dim)
        return vectors, held

    def put_embeddings(self, encoder: str, sentences: Sequence[str], embeddings: FloatArray) -> None:
        """Store one embedding a sentence, (n, d); those that are there stay as they are.

        Raises:
            DataError: not one embedding a sentence, or of another dimension than those that are there.
            StorageError: as :meth:`put`.
        """
        try:
            vectors = np.ascontiguousarray(embeddings, dtype="<f4")
        except (TypeError, ValueError) as error:
            raise DataError(f"embeddings: expected numbers, ({len(sentences)}, d), got others: {error}") from error
        _check_texts("sentences", sentences)
        if vectors.ndim != 2 or len(vectors) != len(sentences):
            raise DataError(f"embeddings: expected ({len(sentences)}, d), one a sentence, got {vectors.shape}")
        dimension = f"dimension {_name('encoder', encoder)}"
        rows = ((_digest(encoder, text), vector.tobytes()) for text, vector in zip(sentences, vectors, strict=True))
        with self._writing() as connection:
            connection.execute("INSERT OR IGNORE INTO count VALUES (?, ?)", (dimension, vectors.shape[1]))
            dim = self._count(connection, dimension, 0)
            if dim != vectors.shape[1]:
                raise DataError(
                    f"embeddings: expected dimension {dim}, as those of encoder {encoder!r} in {self.path}, got "
                    f"{vectors.shape[1]}; give another encoder another fingerprint"
                )
            before = connection.total_changes
            connection.executemany("INSERT OR IGNORE INTO embedding (key, vector) VALUES (?, ?)", rows)
            held = self._count(connection, "embedding", connection.total_changes - before)
            if self.max_sentences is not None and held > max(self.max_sentences, len(sentences)):
                surplus = held - max(self.max_sentences, len(sentences))
                oldest = "SELECT id FROM embedding ORDER BY id LIMIT ?"
                connection.execute(f"DELETE FROM embedding WHERE id IN ({oldest})", (surplus,))
                self._count(connection, "embedding", -surplus)

    def describe(self, model: str, facts: Mapping[str, Any]) -> None:
        """Keep JSON-able `facts` about a model, for whoever inspects the store; they are no part of any name.

        Raises:
            DataError: JSON cannot hold them.
            StorageError: as :meth:`put`.
        """
        try:
            told = json.dumps(dict(facts))
        except (TypeError, ValueError) as error:
            raise DataError(f"facts: expected what JSON can hold, got {facts!r}: {error}") from error
        with self._writing() as connection:
            connection.execute("INSERT OR REPLACE INTO model VALUES (?, ?)", (_name("model", model), told))

    def models(self) -> tuple[StoredModel, ...]:
        """Return what there is of each model and series, in the order in which they came."""
        query = """
            SELECT series.model, series.name, coalesce(model.facts, '{}'), count(DISTINCT request.id),
                   count(sentence.sample)
            FROM series LEFT JOIN model ON model.fingerprint = series.model
            LEFT JOIN request ON request.series = series.id LEFT JOIN sentence ON sentence.request = request.id
            GROUP BY series.id ORDER BY series.id
        """
        with self._reading() as connection:
            rows = connection.execute(query).fetchall()
            return tuple(
                StoredModel(_is(model, str), _is(name, str), _is(json.loads(_is(facts, str)), dict), n, k)
                for model, name, facts, n, k in rows
            )

    def rows(
        self,
        model: str | None = None,
        series: str | None = None,
        contains: str | None = None,
        limit: int | None = None,
    ) -> Iterator[StoredSentence]:
        """Go through the sentences, by age of their request and by sample.

        Args:
            model: only of models whose fingerprint begins so.
            series: only of this series.
            contains: only those with this text in the request or in the sentence.
            limit: so many at most.

        Raises:
            ConfigError: `limit` is negative, or larger than SQLite counts.
            DataError: no model or series can have this name.
        """
        if limit is not None:
            check_integer("limit", limit, 0, 2**63 - 1)
        conditions, values = ["1"], []
        if model is not None:
            conditions.append("substr(series.model, 1, ?) = ?")
            values += [len(model), _name("model", model)]
        if series is not None:
            conditions.append("series.name = ?")
            values.append(_name("series", series))
        if contains is not None:
            conditions.append("(instr(request.text, ?) OR instr(sentence.text, ?))")
            values += [_bytes(contains)] * 2
        query = f"""
            SELECT series.model, series.name, request.text, sentence.sample, sentence.text
            FROM request CROSS JOIN series ON series.id = request.series
            CROSS JOIN sentence ON sentence.request = request.id
            WHERE {" AND ".join(conditions)} ORDER BY request.id, sentence.sample LIMIT ?
        """
        with self._reading() as connection:
            for name, of, request, sample, text in connection.execute(query, (*values, -1 if limit is None else limit)):
                yield StoredSentence(_is(name, str), _is(of, str), _text(request), _is(sample, int), _text(text))

    def _lookup(
        self,
        connection: sqlite3.Connection,
        model: str,
        series: str,
        requests: Sequence[str],
        samples: Sequence[int],
        what: str,
    ) -> Iterator[tuple[int, Any]]:
        """Give (position, `what`) of every name that is there."""
        keys = _request_keys(model, series, requests, samples)
        for start in range(0, len(keys), _AT_ONCE):
            some = range(start, min(start + _AT_ONCE, len(keys)))
            # CROSS JOIN keeps the order of the loops: from each key to its request to its sentence.
            yield from connection.execute(
                f"WITH wanted (position, key, sample) AS (VALUES {','.join(['(?,?,?)'] * len(some))}) "
                f"SELECT position, {what} FROM wanted CROSS JOIN request ON request.key = wanted.key "
                "CROSS JOIN sentence ON sentence.request = request.id AND sentence.sample = wanted.sample",
                list(chain.from_iterable((i, keys[i], int(samples[i])) for i in some)),
            )

    def _count(self, connection: sqlite3.Connection, what: str, change: int) -> int:
        connection.execute("UPDATE count SET n = n + ? WHERE what = ?", (change, what))
        return _number(connection, what)

    def _make_room(self, connection: sqlite3.Connection, fresh: list[bytes]) -> None:
        """Drop the oldest requests until the bound holds, but none of `fresh` and no references."""
        if self.max_sentences is None:
            return
        surplus = self._count(connection, "sentence", 0) - self.max_sentences
        if surplus <= 0:
            return
        kept = set(fresh)
        oldest = connection.execute(
            "SELECT request.id, request.key, count(*) FROM request CROSS JOIN sentence "
            "ON sentence.request = request.id WHERE request.series NOT IN (SELECT id FROM series WHERE name = ?) "
            "GROUP BY request.id ORDER BY request.id",
            (NO_PROMPT_SERIES,),
        )
        dropped: list[tuple[int]] = []
        for number, key, sentences in oldest:
            if surplus <= 0:
                break
            if key not in kept:
                dropped.append((number,))
                surplus -= sentences
        before = connection.total_changes
        connection.executemany("DELETE FROM sentence WHERE request = ?", dropped)
        gone = connection.total_changes - before
        connection.executemany("DELETE FROM request WHERE id = ?", dropped)
        self._count(connection, "sentence", -gone)

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        connection = self._connection()
        try:
            with self._translated("read"):
                yield connection
        except StorageError:
            # A file that changed underneath looks damaged, and is not.
            self._check_unchanged(connection)
            raise
        self._check_unchanged(connection)

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        if self.read_only:
            raise StorageError(f"sentence store: {self.path} was opened read-only; open it with read_only=False")
        connection = self._connection()
        with self._translated("write"):
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                # A full disk may have ended the transaction already.
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StorageError(f"sentence store: cannot {what} {self.path}: {error}. {_remedy(error)}") from error
        except (_DamageError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise StorageError(f"sentence store: cannot {what} {self.path}: {error}. {_DAMAGED}") from error

    def _connection(self) -> sqlite3.Connection:
        owner = os.getpid(), threading.get_ident()
        connection = self._open_in.get(owner)
        if connection is not None and self._changed(connection):
            self._forget(owner)
            connection = None
        if connection is None:
            with self._translated("open"):
                connection = self._open()
            self._open_in[owner] = connection
        return connection

    def _forget(self, owner: tuple[int, int]) -> None:
        connection = self._open_in.pop(owner)
        self._as_it_was.pop(connection, None)
        connection.close()

    def _changed(self, connection: sqlite3.Connection) -> bool:
        """Tell whether a file that is read as it is has been written since; SQLite itself does not look."""
        then = self._as_it_was.get(connection)
        return then is not None and _state(self._file()) != then

    def _check_unchanged(self, connection: sqlite3.Connection) -> None:
        if self._changed(connection):
            raise StorageError(
                f"sentence store: {self.path} was written while it was read in a folder that cannot be written; "
                "read it again"
            )

    def _file(self) -> Path:
        """Return where the file really is; what SQLite keeps beside it is beside that, not beside a link to it."""
        if "\0" in str(self.path):
            raise StorageError(f"sentence store: expected a path without NUL, got {str(self.path)!r}")
        try:
            file = self.path.resolve()
            there, is_file = file.exists(), file.is_file()
        except (OSError, RuntimeError) as error:
            raise StorageError(f"sentence store: cannot open {self.path}: {error}; check the path") from error
        if there and not is_file:
            raise StorageError(
                f"sentence store: expected a file {self.path}, found a folder or something else; choose another path"
            )
        return file

    def _open(self) -> sqlite3.Connection:
        file = self._file()
        if self.read_only and not file.exists():
            raise StorageError(f"sentence store: expected a file {self.path}, found none; check the path")
        if not file.parent.is_dir():
            raise StorageError(f"sentence store: expected a folder {file.parent}, found none; make it first")
        if not self.read_only:
            return self._opened(file, "mode=rwc")
        followed = all(_beside(file, ending).exists() for ending in ("-wal", "-shm"))
        if not followed and not os.access(file, os.W_OK):
            # SQLite would make the files beside it, as files of ours: whose store it is could not write it any more.
            return self._opened_as_it_is(file)
        try:
            return self._opened(file, "mode=ro")
        except sqlite3.OperationalError as error:
            # Extended codes have the plain one in their lowest byte.
            if error.sqlite_errorcode & 0xFF not in _UNWRITABLE:
                raise
            return self._opened_as_it_is(file)

    def _opened_as_it_is(self, file: Path) -> sqlite3.Connection:
        """Open a file beside which SQLite cannot, or must not, make the files through which it follows writers."""
        for ending in ("-wal", "-journal"):
            if _beside(file, ending).exists():
                raise StorageError(
                    f"sentence store: {file}{ending} holds what was written last, and cannot be read without being "
                    "written to; open the store once as somebody who can write it, or copy both files"
                )
        state = _state(file)
        connection = self._opened(file, "mode=ro&immutable=1")
        self._as_it_was[connection] = state
        return connection

    def _opened(self, file: Path, how: str) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{file.as_uri()}?{how}", uri=True, timeout=_PATIENCE, isolation_level=None, check_same_thread=False
        )
        try:
            self._check_format(connection)
            if not self.read_only:
                _write_ahead(connection)
                # Safe against killed processes; a power cut may cost the last transactions, but not the file.
                connection.execute("PRAGMA synchronous = NORMAL")
        except BaseException:
            connection.close()
            raise
        return connection

    def _check_format(self, connection: sqlite3.Connection) -> None:
        application = _application(connection)
        if application == 0 and not self.read_only:
            self._make_if_empty(connection)
            application = _application(connection)
        if application != _APPLICATION:
            raise StorageError(
                f"sentence store: expected {self.path} to be one, found another SQLite file; choose another path"
            )
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if not 1 <= version <= FORMAT_VERSION:
            raise StorageError(
                f"sentence store: {self.path} has format version {version}, this package reads version "
                f"{FORMAT_VERSION}; use the version of offprompts-env that wrote it, or a newer one"
            )
        made = "SELECT type, name FROM sqlite_master WHERE type <> 'index' AND name NOT LIKE 'sqlite^_%' ESCAPE '^'"
        if set(connection.execute(made)) != {("table", name) for name in _TABLES}:
            raise StorageError(
                f"sentence store: expected the tables {sorted(_TABLES)} in {self.path}, found others. {_DAMAGED}"
            )

    def _make_if_empty(self, connection: sqlite3.Connection) -> None:
        # Looked at under the lock: another process may be making it right now.
        connection.execute("BEGIN IMMEDIATE")
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
            for statement in _SCHEMA.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
        connection.execute("COMMIT")


def _application(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA application_id").fetchone()[0])


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Go over to write-ahead mode, which SQLite refuses at once, without its patience, while others hold a lock."""
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.005)
        else:
            return


def _reopened(path: Path, max_sentences: int | None, read_only: bool) -> SentenceStore:
    return SentenceStore(path, max_sentences=max_sentences, read_only=read_only)


def _check_texts(what: str, texts: Sequence[str]) -> None:
    for text in texts:
        if not isinstance(text, str):
            raise DataError(f"{what}: expected text, got {type(text).__name__} {text!r:.80}")


def _check_sentences(sentences: Sequence[str], n: int) -> None:
    if len(sentences) != n:
        raise DataError(f"sentences: expected {n}, one a request, got {len(sentences)}")
    _check_texts("sentences", sentences)


def _request_keys(model: str, series: str, requests: Sequence[str], samples: Sequence[int]) -> list[bytes]:
    if len(samples) != len(requests):
        raise DataError(f"samples: expected {len(requests)}, one a request, got {len(samples)}")
    _check_texts("requests", requests)
    for sample in samples:
        if not isinstance(sample, int | np.integer) or not 0 <= sample < 2**63:
            raise DataError(f"samples: expected integers in [0, 2**63), got {sample!r:.80}")
    begin = hashlib.blake2b(_bytes(f"{_name('model', model)}\0{_name('series', series)}\0"), digest_size=16)
    known: dict[str, bytes] = {}
    for request in requests:
        if request not in known:
            digest = begin.copy()
            digest.update(_bytes(request))
            known[request] = digest.digest()
    return [known[request] for request in requests]


def _name(what: str, name: str) -> str:
    """Return `name` if it can be told from the rest of a key, which follows after a NUL, and SQLite can hold it."""
    if not isinstance(name, str) or "\0" in name or any("\ud800" <= c <= "\udfff" for c in name):
        raise DataError(f"{what}: expected text without NUL and halves of surrogate pairs, got {name!r}")
    return name


def _digest(encoder: str, sentence: str) -> bytes:
    return hashlib.blake2b(_bytes(f"{encoder}\0{sentence}"), digest_size=16).digest()


def _bytes(text: str) -> bytes:
    # Half of a surrogate pair is no UTF-8, but may stand in a Python string.
    return text.encode("utf-8", "surrogatepass")


def _text(data: object) -> str:
    return _is(data, bytes).decode("utf-8", "surrogatepass")


def _is(value: object, kind: type[KindT]) -> KindT:
    """Return `value` if it is what its column should hold; SQLite columns hold anything."""
    if not isinstance(value, kind):
        raise _DamageError(f"expected {kind.__name__}, found {type(value).__name__}")
    return value


def _number(connection: sqlite3.Connection, what: str) -> int:
    row = connection.execute("SELECT n FROM count WHERE what = ?", (what,)).fetchone()
    return _is(None if row is None else row[0], int)


def _beside(file: Path, ending: str) -> Path:
    return file.with_name(file.name + ending)


def _state(file: Path) -> _State:
    try:
        found = file.stat()
    except OSError:
        return 0, 0, 0, False
    return found.st_ino, found.st_size, found.st_mtime_ns, _beside(file, "-wal").exists()


def _remedy(error: sqlite3.Error) -> str:
    said = str(error)
    if "not a database" in said or "malformed" in said:
        return _DAMAGED
    if "full" in said:
        return "What it held is still there. Free some space, or bound the store with max_sentences"
    if "locked" in said:
        return f"Another process has kept it locked for {_PATIENCE:g} s: end that process"
    return "Check that the file and its folder can be read and written"
