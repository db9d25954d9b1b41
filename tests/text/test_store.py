"""The sentence store: names, bounds, many processes, damage, hostile text, and no change of what is drawn."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.cli import main
from offprompts_env.errors import ConfigError, DataError, DimensionError, StorageError
from offprompts_env.movielens.rewards import UnpromptedSentences
from offprompts_env.text.cache import SampleTable, table_series
from offprompts_env.text.decoding import Decoding
from offprompts_env.text.encoder import PCAEncoder, TextEncoder
from offprompts_env.text.language_model import CausalLM, row_uniforms
from offprompts_env.text.prompted import PromptedLM, PromptFormatter
from offprompts_env.text.store import NO_PROMPT_SERIES, SentenceStore
from offprompts_env.types import Contexts, PromptSet
from tests import tiny_models

FORMATTER = PromptFormatter("w1 {query} w2 {prompt} w3", "w1 {query} w3")
HOSTILE = ("a\0b", "\ud800", "x" * (2 << 20), "\x1b[31m\r\n", "{query} %s {{7*7}}", "'); DROP TABLE sentence;--", "")


@pytest.fixture
def store(tmp_path: Path) -> SentenceStore:
    return SentenceStore(tmp_path / "sentences.db")


def texts(n: int) -> list[str]:
    return [f"request {i}" for i in range(n)]


def test_what_is_put_is_got(store: SentenceStore) -> None:
    assert store.put("m", "table 0", ["a", "a", "b"], [0, 1, 0], ["x", "y", "z"]) == ["x", "y", "z"]
    assert store.get("m", "table 0", ["b", "a", "a", "a"], [0, 1, 2, 0]) == ["z", "y", None, "x"]
    assert store.missing("m", "table 0", ["b", "c", "a"], [0, 0, 7]) == [1, 2]
    assert store.get("other", "table 0", ["a"], [0]) == [None]
    assert store.get("m", "table 1", ["a"], [0]) == [None]
    assert store.get("m", "table 0", [], []) == []
    assert store.put("m", "table 0", [], [], []) == []
    assert len(store) == 3


def test_the_first_writer_wins(store: SentenceStore) -> None:
    store.put("m", "s", ["a"], [0], ["first"])
    assert store.put("m", "s", ["b", "a", "b"], [0, 0, 0], ["new", "second", "third"]) == ["new", "first", "new"]
    assert len(store) == 2


def test_more_than_one_statement(store: SentenceStore) -> None:
    names = texts(9000)
    store.put("m", "s", names, [3] * 9000, [name.upper() for name in names])
    assert store.get("m", "s", names[::-1], [3] * 9000) == [name.upper() for name in names[::-1]]


def test_hostile_text_stays_text(store: SentenceStore) -> None:
    store.put("m", "s", HOSTILE, range(len(HOSTILE)), HOSTILE[::-1])
    assert tuple(store.get("m", "s", HOSTILE, range(len(HOSTILE)))) == HOSTILE[::-1]
    assert {row.request for row in store.rows()} == set(HOSTILE)


def test_embeddings(store: SentenceStore) -> None:
    vectors = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    store.put_embeddings("e", ["a", "b", "c"], vectors)
    store.put_embeddings("e", ["a"], np.zeros((1, 4), np.float32))
    found, held = store.embeddings("e", ["c", "x", "a"])
    np.testing.assert_array_equal(held, [True, False, True])
    np.testing.assert_array_equal(found[held], vectors[[2, 0]])
    nothing, held = store.embeddings("f", ["a", "b"])
    assert nothing.shape == (2, 0)
    assert not held.any()


def test_wrong_lengths(store: SentenceStore) -> None:
    with pytest.raises(DataError, match="samples: expected 2"):
        store.get("m", "s", ["a", "b"], [0])
    with pytest.raises(DataError, match="sentences: expected 1"):
        store.put("m", "s", ["a"], [0], [])
    with pytest.raises(DataError, match="embeddings: expected"):
        store.put_embeddings("e", ["a"], np.zeros((2, 3)))


def test_bounded_by_dropping_the_oldest_requests(tmp_path: Path) -> None:
    store = SentenceStore(tmp_path / "s.db", max_sentences=5)
    store.put("m", "s", ["a", "a", "b"], [0, 1, 0], ["1", "2", "3"])
    store.put("m", "s", ["c", "d"], [0, 0], ["4", "5"])
    assert len(store) == 5
    store.put("m", "s", ["e"], [0], ["6"])
    assert store.missing("m", "s", ["a", "a", "b", "c", "d", "e"], [0, 1, 0, 0, 0, 0]) == [0, 1]
    assert len(store) == 4
    many = texts(8)
    store.put("m", "s", many, [0] * 8, many)
    assert store.missing("m", "s", many, [0] * 8) == []
    assert len(store) == 8
    store.put_embeddings("e", many, np.ones((8, 2)))
    store.put_embeddings("e", ["x"], np.ones((1, 2)))
    _, held = store.embeddings("e", [*many, "x"])
    assert held.tolist() == [False] * 4 + [True] * 5


def test_inspection(store: SentenceStore, capsys: pytest.CaptureFixture[str]) -> None:
    store.put("mistral", "table 0", ["a movie", "a movie", "war"], [0, 1, 0], ["x", "y\x1b[2J", "z"])
    store.put("mistral", "no prompt", ["plain"], [0], ["movie"])
    store.describe("mistral", {"model": "Mistral"})
    first, second = store.models()
    assert (first.fingerprint, first.series, first.requests, first.sentences) == ("mistral", "table 0", 2, 3)
    assert (second.series, second.sentences, dict(second.facts)) == ("no prompt", 1, {"model": "Mistral"})
    assert [row.sentence for row in store.rows(contains="movie")] == ["x", "y\x1b[2J", "movie"]
    assert len(list(store.rows(model="mis", series="table 0", limit=2))) == 2
    assert main(["sentences", str(store.path)]) == 0
    assert "4 sentences" in (shown := capsys.readouterr().out)
    assert "Mistral" in shown
    assert main(["sentences", str(store.path), "--contains", "a movie"]) == 0
    assert "\\u001b[2J" in (shown := capsys.readouterr().out)
    assert "\x1b" not in shown
    assert main(["sentences", str(store.path), "--series", "none", "--json"]) == 0
    assert main(["sentences", str(store.path) + ".no"]) == 1


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a" * 5000)
    with pytest.raises(StorageError, match="no sentence store or is damaged"):
        SentenceStore(tmp_path / "text")
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE t (a)").connection.commit()
    with pytest.raises(StorageError, match="another SQLite file"):
        SentenceStore(tmp_path / "other.db")
    with pytest.raises(StorageError, match="expected a folder"):
        SentenceStore(tmp_path / "no" / "s.db")
    with pytest.raises(StorageError, match="found none"):
        SentenceStore(tmp_path / "none.db", read_only=True)
    SentenceStore(tmp_path / "new.db").close()
    for version in (9, 0, -1):
        sqlite3.connect(tmp_path / "new.db").execute(f"PRAGMA user_version = {version}").connection.close()
        for read_only in (False, True):
            with pytest.raises(StorageError, match=f"format version {version}, this package reads"):
                SentenceStore(tmp_path / "new.db", read_only=read_only)


def test_read_only(store: SentenceStore) -> None:
    store.put("m", "s", ["a"], [0], ["x"])
    reader = SentenceStore(store.path, read_only=True)
    assert reader.get("m", "s", ["a"], [0]) == ["x"]
    with pytest.raises(StorageError, match="read-only"):
        reader.put("m", "s", ["b"], [0], ["y"])
    assert reader.complete("m", "s", ["b", "a"], [0, 0], lambda rows: ["new"] * len(rows)) == ["new", "x"]
    assert len(reader) == 1


def test_a_full_disk_loses_nothing(store: SentenceStore) -> None:
    store.put("m", "s", ["a"], [0], ["x"])
    pages = store._connection().execute("PRAGMA page_count").fetchone()[0]
    store._connection().execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(StorageError, match=r"full.*Free some space"):
        store.put("m", "s", texts(999), [0] * 999, ["long" * 100] * 999)
    store._connection().execute("PRAGMA max_page_count = 100000")
    assert len(store) == 1
    assert store.get("m", "s", ["a"], [0]) == ["x"]
    store.put("m", "s", texts(999), [0] * 999, ["long" * 100] * 999)
    assert len(store) == 1000


def test_what_a_full_disk_did_not_take_is_not_asked_for_again(store: SentenceStore) -> None:
    asked: list[int] = []

    def write(rows: list[int]) -> list[str]:
        asked.append(len(rows))
        return [f"{row} " * 400 for row in rows]

    pages = store._connection().execute("PRAGMA page_count").fetchone()[0]
    store._connection().execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(StorageError, match=r"full.*Free some space.*500 sentences are held"):
        store.complete("m", "s", texts(500), [0] * 500, write)
    for names in (texts(500), ["another"]):
        # What is held comes first: no model is asked while its answers cannot be kept.
        with pytest.raises(StorageError, match="full"):
            store.complete("m", "s", names, [0] * len(names), write)
    store._connection().execute("PRAGMA max_page_count = 100000")
    # One more request than before is all that is written, in whatever order they come.
    again = store.complete("m", "s", ["more", *texts(500)[::-1]], [0] * 501, write)
    assert asked == [500, 1]
    assert again[1:] == [f"{row} " * 400 for row in range(499, -1, -1)]
    assert SentenceStore(store.path).get("m", "s", texts(500), [0] * 500) == again[:0:-1]
    assert not store._unsaved


def test_what_a_put_could_not_store_goes_with_the_next_one(
    store: SentenceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is locked by another process for longer than anybody waits."""
    monkeypatch.setattr("offprompts_env.text.store._PATIENCE", 0.01)
    store.close()
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    for request, sentence in (("a", "first"), ("a", "second"), ("b", "x")):
        with pytest.raises(StorageError, match=r"locked.*held in memory; the next put"):
            store.put("m", "s", [request], [0], [sentence])
    with pytest.raises(StorageError, match="locked"):
        store.save()
    other.execute("ROLLBACK")
    assert store.put("m", "t", ["c"], [1], ["y"]) == ["y"]
    assert store.get("m", "s", ["a", "b"], [0, 0]) == ["first", "x"]
    assert len(store) == 3
    assert not store._unsaved


def test_what_can_never_be_stored_does_not_stand_in_the_way(store: SentenceStore) -> None:
    store._connection().setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 10_000)
    with pytest.raises(StorageError, match="too big"):
        store.put("m", "s", ["a"], [0], ["x" * 20_000])
    store.put("m", "s", ["b"], [0], ["y"])
    assert [row.sentence for row in store.rows()] == ["y"]


@pytest.mark.parametrize("read_only", [False, True])
def test_a_name_asked_for_twice_is_written_once(store: SentenceStore, read_only: bool) -> None:
    asked: list[list[int]] = []

    def write(rows: list[int]) -> list[str]:
        asked.append(list(rows))
        return [f"{row}" for row in rows]

    store = SentenceStore(store.path, read_only=read_only)
    said = store.complete("m", "s", ["a", "b", "a", "a"], np.array([0, 0, 0, 1]), write)
    assert said == ["0", "1", "0", "3"]
    assert asked == [[0, 1, 3]]


def test_what_writes_must_write_one_text_each(store: SentenceStore) -> None:
    for wrong, message in (
        (["x"], "expected 2, one a request, got 1"),
        (["x"] * 3, "got 3"),
        (["x", None], "NoneType"),
    ):
        with pytest.raises(DataError, match=f"sentences: .*{message}"):
            store.complete("m", "s", ["a", "b"], [0, 0], lambda rows, wrong=wrong: wrong)
    assert len(store) == 0
    assert not store._unsaved


def test_references_do_not_make_room(tmp_path: Path) -> None:
    store = SentenceStore(tmp_path / "s.db", max_sentences=10)
    store.put("m", NO_PROMPT_SERIES, texts(6), [0] * 6, ["reference"] * 6)
    for start in range(0, 40, 4):
        store.put("m", "table 0", [f"r{i}" for i in range(start, start + 4)], [0] * 4, ["s"] * 4)
    assert store.get("m", NO_PROMPT_SERIES, texts(6), [0] * 6) == ["reference"] * 6
    assert len(store) == 10
    assert [row.request for row in store.rows(series="table 0")] == ["r36", "r37", "r38", "r39"]


class Stranger:
    """A process that may read a folder, and not write into it. Permissions do not bind root, so it is nobody then.

    It opens the store as told, or with None as it can be.
    """

    def __init__(self, path: Path, read_only: bool | None = True) -> None:
        context = multiprocessing.get_context("fork")
        self.path, self.read_only = path, read_only
        self.here, self.there = context.Pipe()
        self.process = context.Process(target=self._serve, daemon=True)
        self.process.start()

    def _serve(self) -> None:
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        store = None
        while True:
            self.there.recv()
            try:
                store = store or self.opened()
                self.there.send((len(store), store.get("m", "s", ["a"], [0])[0]))
            except StorageError as error:
                self.there.send(str(error))

    def opened(self) -> SentenceStore:
        if self.read_only is not None:
            return SentenceStore(self.path, read_only=self.read_only)
        with pytest.warns(UserWarning, match="cannot be written; sentences that it lacks"):
            store = SentenceStore.shared(self.path)
        assert store.complete("m", "s", ["a", "new"], [0, 0], lambda rows: ["n"] * len(rows)) == ["x", "n"]
        return store

    def sees(self) -> tuple[int, str | None] | str:
        folder = self.path.resolve().parent
        folder.chmod(0o755 if os.getuid() == 0 else 0o555)
        self.here.send("look")
        assert self.here.poll(60)
        folder.chmod(0o755)
        return self.here.recv()


@pytest.fixture
def shown() -> Iterator[SentenceStore]:
    """A store where other users may look, unlike in a folder of the tests."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        store = SentenceStore(Path(folder) / "s.db")
        store.put("m", "s", ["a"], [0], ["x"])
        store.close()
        yield store


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be two users")
@pytest.mark.parametrize("read_only", [True, None])
def test_a_reader_leaves_nothing_beside_a_store_of_another_user(shown: SentenceStore, read_only: bool | None) -> None:
    """In a folder that both may write, SQLite would make files of the reader's, and lock the owner out."""
    reader = Stranger(shown.path, read_only=read_only)
    shown.path.parent.chmod(0o777)
    reader.here.send("look")
    assert reader.here.poll(60)
    assert reader.here.recv() == (1, "x")
    assert [path.name for path in shown.path.parent.iterdir()] == ["s.db"]
    shown.put("m", "s", ["b"], [0], ["y"])
    # While the owner writes, the reader follows.
    reader.here.send("look")
    assert reader.here.poll(60)
    assert reader.here.recv() == (2, "x")
    shown.put("m", "s", ["c"], [0], ["z"])
    assert {path.stat().st_uid for path in shown.path.parent.iterdir()} == {0}


def test_what_can_be_written_is_opened_for_it(tmp_path: Path, store: SentenceStore, recwarn: object) -> None:
    for path in (store.path, tmp_path / "new.db"):
        with SentenceStore.shared(path) as opened:
            assert not opened.read_only
            opened.put("m", "s", ["a"], [0], ["x"])
    assert not list(recwarn)  # type: ignore[call-overload]
    for wrong, words in (
        (tmp_path / "no" / "s.db", "expected a folder"),
        (tmp_path, "file"),
        ("~nobody-here/s.db", "nobody-here"),
    ):
        with pytest.raises(StorageError, match=words):
            SentenceStore.shared(wrong)


def test_a_folder_that_cannot_be_written_is_read(shown: SentenceStore) -> None:
    reader = Stranger(shown.path)
    assert reader.sees() == (1, "x")
    assert "readonly" in Stranger(shown.path, read_only=False).sees()
    assert Stranger(shown.path, read_only=None).sees() == (1, "x")
    # What others write meanwhile is seen: when they have left, and while they write through their log.
    many = texts(3000)
    shown.put("m", "s", many, [0] * 3000, ["y" * 99] * 3000)
    shown.close()
    assert not shown.path.with_name("s.db-wal").exists()
    assert reader.sees() == (3001, "x")
    shown.put("m", "s", many, [1] * 3000, ["z" * 99] * 3000)
    assert shown.path.with_name("s.db-wal").exists()
    assert reader.sees() == Stranger(shown.path).sees() == (6001, "x")
    shown.close()
    assert reader.sees() == Stranger(shown.path).sees() == (6001, "x")


def test_a_log_that_a_killed_writer_left_is_not_passed_over(shown: SentenceStore) -> None:
    """Also not by a link: the log is beside the file, and not beside the link."""
    beside = shown.path.parent / "linked"
    beside.mkdir()
    (beside / "link.db").symlink_to(shown.path)
    assert Stranger(beside / "link.db").sees() == (1, "x")
    shown.path.with_name("s.db-wal").write_bytes(b"written last")
    for path in (shown.path, beside / "link.db"):
        assert "s.db-wal holds what was written last" in Stranger(path).sees()


def test_a_file_written_while_it_is_read_as_it_is(shown: SentenceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """What SQLite then takes for damage, or does not notice, is said to be what it is; the next call reads anew."""
    connect = sqlite3.connect

    def cannot_write(address: str, **settings: Any) -> sqlite3.Connection:
        if "immutable" not in address:
            error = sqlite3.OperationalError("unable to open database file")
            error.sqlite_errorcode = sqlite3.SQLITE_CANTOPEN
            raise error
        return connect(address, **settings)

    monkeypatch.setattr(sqlite3, "connect", cannot_write)
    reader = SentenceStore(shown.path, read_only=True)
    rows = reader.rows()
    assert next(rows).sentence == "x"
    os.utime(shown.path, ns=(1, 1))
    with pytest.raises(StorageError, match=r"written while it was read.*read it again"):
        list(rows)
    assert reader.get("m", "s", ["a"], [0]) == ["x"]


def test_places_where_no_store_can_be(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to folder").symlink_to(tmp_path / "folder")
    (tmp_path / "to nothing").symlink_to(tmp_path / "nothing")
    for name in ("folder", "to folder", "pipe", "loop", "a\0b", "x" * 5000, "folder/.."):
        for read_only in (False, True):
            with pytest.raises(StorageError, match=r"expected a file|path|unable to open"):
                SentenceStore(tmp_path / name, read_only=read_only)
    with pytest.raises(StorageError, match="found none"):
        SentenceStore(tmp_path / "to nothing", read_only=True)
    with pytest.raises(StorageError, match="cannot tell which folder"):
        SentenceStore("~nobody of that name/s.db")
    assert not (tmp_path / "a").exists()
    # A link to where nothing is yet is made good, as by any program that writes a file.
    SentenceStore(tmp_path / "to nothing").put("m", "s", ["a"], [0], ["x"])
    assert len(SentenceStore(tmp_path / "nothing")) == 1


@pytest.mark.parametrize("name", ["a\0b", "\ud800", 7])
def test_names_that_cannot_be_told_apart(store: SentenceStore, name: str) -> None:
    for call in (
        lambda: store.put(name, "s", ["r"], [0], ["x"]),
        lambda: store.put("m", name, ["r"], [0], ["x"]),
        lambda: store.get(name, "s", ["r"], [0]),
        lambda: store.describe(name, {}),
        lambda: store.embeddings(name, ["x"]),
        lambda: store.put_embeddings(name, ["x"], np.zeros((1, 2))),
    ):
        with pytest.raises(DataError, match="expected text without NUL"):
            call()
    # In a request or a sentence they are text.
    if isinstance(name, str):
        store.put("m", "s", [name], [0], [name])
        assert store.get("m", "s", [name], [0]) == [name]


def test_what_cannot_be_kept_is_refused(store: SentenceStore) -> None:
    for sample in (-1, 2**63, 1.5, float("nan"), "1", None):
        with pytest.raises(DataError, match=r"samples: expected integers in \[0, 2\*\*63\)"):
            store.put("m", "s", ["r"], [sample], ["x"])
    with pytest.raises(DataError, match="requests: expected text, got int 7"):
        store.get("m", "s", [7], [0])
    with pytest.raises(DataError, match="sentences: expected text, got NoneType"):
        store.put("m", "s", ["r"], [0], [None])
    with pytest.raises(DataError, match="facts: expected what JSON can hold"):
        store.describe("m", {"model": object()})
    for limit in (-3, 2**63, 1.5):
        with pytest.raises(ConfigError, match="limit"):
            list(store.rows(limit=limit))
    for where in ({"model": "\ud800"}, {"series": "\ud800"}):
        with pytest.raises(DataError, match="expected text without NUL and halves"):
            list(store.rows(**where))
    for vectors in ([["x"]], [[1.0], [1.0, 2.0]]):
        with pytest.raises(DataError, match="embeddings: expected numbers"):
            store.put_embeddings("e", ["x"], vectors)
    with pytest.raises(DataError, match="sentences: expected text, got int"):
        store.embeddings("e", [4])
    store.put_embeddings("e", ["x"], np.zeros((1, 3)))
    with pytest.raises(DataError, match="expected dimension 3, as those of encoder 'e'"):
        store.put_embeddings("e", ["y"], np.zeros((1, 4)))
    store.put_embeddings("other", ["y"], np.zeros((1, 4)))
    assert store.embeddings("e", ["x", "y"])[1].tolist() == [True, False]


def _put_many(store: SentenceStore, worker: int) -> None:
    for start in range(0, 300, 20):
        rows = list(range(start, start + 20))
        store.put("m", "s", [f"r{i}" for i in rows], [0] * 20, [f"{worker}:{i}" for i in rows])


def _put_for_ever(path: Path) -> None:
    store = SentenceStore(path)
    for number in range(10**9):
        store.put("m", "s", [f"k{number}"] * 10, range(10), ["s"] * 10)


def test_many_processes_write_at_once(store: SentenceStore) -> None:
    # The same object goes to every process: each opens a connection of its own.
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_put_many, args=(store, i)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    found = store.get("m", "s", [f"r{i}" for i in range(300)], [0] * 300)
    assert all(text is not None and text.split(":")[1] == str(i) for i, text in enumerate(found))
    assert len(store) == 300 == len(list(store.rows()))


def _open_together(path: Path, barrier) -> None:
    barrier.wait(60)
    SentenceStore(path).put("m", "s", ["a"], [0], ["x"])


def test_many_processes_make_one_store(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for trial in range(40):
        path, barrier = tmp_path / f"{trial}.db", context.Barrier(8)
        workers = [context.Process(target=_open_together, args=(path, barrier)) for _ in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert [worker.exitcode for worker in workers] == [0] * 8
        assert len(SentenceStore(path)) == 1


def test_damage_that_sqlite_does_not_see(store: SentenceStore) -> None:
    store.put("m", "s", ["a"], [0], ["x"])
    store.put_embeddings("e", ["a"], np.ones((1, 4)))
    store.put_embeddings("e", ["b"], np.ones((1, 4)))
    store._connection().execute("UPDATE embedding SET vector = ? WHERE id = 2", (b"123",))
    store._connection().execute("UPDATE sentence SET text = ?", (b"\xff",))
    store._connection().execute("INSERT INTO model VALUES ('m', '{')")
    for call in (lambda: store.get("m", "s", ["a"], [0]), lambda: list(store.rows()), store.models,
                 lambda: store.embeddings("e", ["a", "b"])):  # fmt: skip
        with pytest.raises(StorageError, match="damaged"):
            call()


@pytest.mark.parametrize(
    "harm",
    [
        "DROP TABLE sentence",
        "DELETE FROM count",
        "UPDATE count SET n = 'many' WHERE what = 'sentence'",
        "UPDATE sentence SET text = 7",
        "UPDATE sentence SET text = 'text and not bytes'",
        "UPDATE sentence SET sample = 'first'",
        "UPDATE series SET name = x'00'",
        "UPDATE embedding SET vector = 5",
        "INSERT INTO model VALUES ('m', '[1]')",
        f"INSERT INTO model VALUES ('m', '{'[' * 100_000}')",
        "DROP TABLE sentence; CREATE VIEW sentence AS SELECT 1 request, 0 sample, x'41' text",
        "CREATE TRIGGER t AFTER INSERT ON sentence BEGIN DELETE FROM sentence; END",
    ],
)
def test_a_file_that_somebody_made_to_look_like_a_store(store: SentenceStore, harm: str) -> None:
    """What SQLite is content with and we never write is named; nothing else comes out."""
    store.put("m", "s", ["a"], [0], ["x"])
    store.put_embeddings("e", ["a"], np.ones((1, 4)))
    store.close()
    sqlite3.connect(store.path).executescript(harm).connection.close()
    calls = (
        len,
        lambda opened: opened.get("m", "s", ["a"], [0]),
        lambda opened: opened.put("m", "s", ["b"], [0], ["x"]),
        lambda opened: opened.embeddings("e", ["a"]),
        lambda opened: opened.put_embeddings("e", ["b"], np.ones((1, 4))),
        lambda opened: opened.models(),
        lambda opened: list(opened.rows()),
    )
    found = []
    for call in calls:
        try:
            call(SentenceStore(store.path))
        except StorageError as error:
            found.append("damaged" in str(error))
    assert any(found)
    assert all(found)


def test_a_file_cut_short_or_altered(store: SentenceStore) -> None:
    """Wherever it is cut, and whatever is in it: what is read is an answer or a StorageError."""
    many = texts(200)
    store.put("m", "s", many, [0] * 200, [f"{name} " * 9 for name in many])
    store.put_embeddings("e", many, np.ones((200, 2)))
    store.close()
    whole, rng = store.path.read_bytes(), np.random.default_rng(0)
    broken = [whole[: int(cut)] for cut in rng.integers(1, len(whole), size=30)] + [whole[:-1], whole[:100]]
    for reach in (100, 4096, len(whole)) * 10:
        altered = np.frombuffer(whole, dtype=np.uint8).copy()
        altered[rng.integers(reach, size=8)] = rng.integers(256, size=8)
        broken.append(altered.tobytes())
    refused = 0
    for content in broken:
        store.path.write_bytes(content)
        for read_only in (True, False):
            try:
                with SentenceStore(store.path, read_only=read_only) as opened:
                    opened.get("m", "s", many, [0] * 200)
                    opened.embeddings("e", many)
                    list(opened.rows())
                    opened.models()
                    len(opened)
            except StorageError:
                refused += 1
        for left in store.path.parent.glob("s.db-*"):
            left.unlink()
    assert refused > 60


def test_a_killed_writer_leaves_whole_transactions(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    worker = multiprocessing.get_context("spawn").Process(target=_put_for_ever, args=(path,))
    worker.start()
    store = None
    while store is None or len(store) < 200:
        time.sleep(0.01)
        store = SentenceStore(path) if path.exists() else None
    os.kill(worker.pid, signal.SIGKILL)  # type: ignore[arg-type]
    worker.join()
    rows = list(store.rows())
    assert len(rows) == len(store)
    assert len(store) % 10 == 0
    assert len({(row.request, row.sample) for row in rows}) == len(rows)
    store.put("m", "s", ["after"], [0], ["x"])


def test_a_pickled_store_reads_the_same_file(store: SentenceStore) -> None:
    store.put("m", "s", ["a"], [0], ["x"])
    copy = pickle.loads(pickle.dumps(store))
    assert copy.get("m", "s", ["a"], [0]) == ["x"]


# What an agent sees ---------------------------------------------------------------------------------------------------


class Fickle:
    """Two words with the chances 0.7 and 0.3, from generators or, if seedless, from a source of its own."""

    deterministic = False

    def __init__(self, name: str = "fickle", source: np.random.Generator | None = None) -> None:
        self.fingerprint, self.source, self.written = name, source, 0

    def generate(self, prompts, rng):
        self.written += len(prompts)
        draws = row_uniforms(rng, len(prompts), 1)[:, 0] if self.source is None else self.source.random(len(prompts))
        return ["w0" if u < 0.7 else "w1" for u in draws]


class Letters:
    """Embeds "wI" as I; counts."""

    dim, fingerprint, encoded = 1, "letters", 0

    def encode(self, texts):
        self.encoded += len(texts)
        return np.array([[float(text[1:])] for text in texts], dtype=np.float32).reshape(-1, 1)


def table(model, store=None, slots=4, encoder=None, seed=0):
    prompts = PromptSet(np.eye(4), texts=tuple(f"w{20 + i}" for i in range(4)))
    return SampleTable(PromptedLM(model, encoder or Letters(), prompts, FORMATTER), slots=slots, store=store, seed=seed)


def rounds(n: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    queries = np.array([f"w{i}" for i in rng.integers(3, size=n)], dtype=object)
    return Contexts(np.zeros((n, 2)), np.zeros((n, 1)), query_text=queries), rng.integers(4, size=n)


def test_a_store_changes_nothing_that_is_seen(tmp_path: Path) -> None:
    tokens = tiny_models.tokenizer()
    lm = CausalLM(tiny_models.llama(), tokens, decoding=Decoding(max_new_tokens=8))
    states = TextEncoder(tiny_models.distilbert(), tokens)
    encoder = PCAEncoder.fit(states, [f"w{i} w{i + 1}" for i in range(20)], 3)
    store = SentenceStore(tmp_path / "s.db")
    contexts, actions = rounds(60)

    def seen(store):
        drawn = table(lm, store, encoder=encoder).sample(contexts, actions, np.random.default_rng(5))
        return drawn.text.tolist(), drawn.embedding

    plain, embeddings = seen(None)
    half = table(lm, store, encoder=encoder)
    half.sample(contexts.take(slice(0, 20)), actions[:20], np.random.default_rng(5))
    for _ in range(2):
        sentences, found = seen(store)
        assert sentences == plain
        np.testing.assert_allclose(found, embeddings, rtol=1e-4, atol=1e-5)
    reader = table(lm, SentenceStore(store.path, read_only=True), encoder=encoder)
    assert reader.sample(contexts, actions, np.random.default_rng(5)).text.tolist() == plain
    assert reader.generated == 0


def test_a_warm_store_asks_neither_model_nor_encoder(store: SentenceStore) -> None:
    contexts, actions = rounds(300)
    first, second = (table(Fickle(), store, encoder=Letters()) for _ in range(2))
    a = first.sample(contexts, actions, np.random.default_rng(1))
    b = second.sample(contexts, actions, np.random.default_rng(1))
    assert a.text.tolist() == b.text.tolist()
    np.testing.assert_array_equal(a.embedding, b.embedding)
    assert first.outputs.language_model.written == first.generated == len(store) > 0
    assert second.outputs.language_model.written == second.outputs.encoder.encoded == 0


def test_embeddings_of_another_encoder_under_the_same_name(store: SentenceStore) -> None:
    contexts, actions = rounds(30)
    made = table(Fickle(), store)
    made.sample(contexts, actions, np.random.default_rng(1))

    class Wide(Letters):
        dim = 2

        def encode(self, texts):
            return np.repeat(super().encode(texts), 2, axis=1)

    with pytest.raises(DimensionError, match="expected dimension 2, that of encoder"):
        table(Fickle(), store, encoder=Wide()).sample(contexts, actions, np.random.default_rng(1))


def test_models_and_seeds_do_not_mix(store: SentenceStore) -> None:
    contexts, actions = rounds(300)
    for model, seed in (("a", 0), ("b", 0), ("a", 1)):
        made = table(Fickle(model), store, seed=seed)
        plain = table(Fickle(model), seed=seed)
        drawn = made.sample(contexts, actions, np.random.default_rng(1)).text.tolist()
        assert drawn == plain.sample(contexts, actions, np.random.default_rng(1)).text.tolist()
    assert {(m.fingerprint, m.series) for m in store.models()} == {
        ("a", table_series(0)), ("b", table_series(0)), ("a", table_series(1)),
    }  # fmt: skip


@pytest.mark.parametrize("seedless", [False, True])
def test_reuse_does_not_change_the_distribution(tmp_path: Path, seedless: bool) -> None:
    """Over tables, the share of "w0" is 0.7 with and without a store, and has the variance of K frozen samples."""
    contexts, actions = rounds(1)
    shares = {"without": [], "cold": [], "warm": []}
    source = np.random.default_rng(3) if seedless else None
    store = SentenceStore(tmp_path / "s.db")
    for seed in range(400):
        for name in shares:
            made = table(Fickle(source=source), None if name == "without" else store, slots=2, seed=seed)
            drawn = [made.sample(contexts, actions, np.random.default_rng([seed, i])).text[0] for i in range(12)]
            shares[name].append(np.mean([text == "w0" for text in drawn]))
    assert shares["warm"] == shares["cold"]
    assert len(store) <= 800
    for found in shares.values():
        error = np.std(found) / np.sqrt(len(found))
        assert abs(np.mean(found) - 0.7) < 4 * error
        # Var of a share: p (1 - p) (1/K + (1 - 1/K)/12).
        assert np.var(found) == pytest.approx(0.21 * (0.5 + 0.5 / 12), rel=0.2)


def _fill_half(path: Path, seeds: range) -> None:
    """Write every other table, as another process that ran before."""
    contexts, actions = rounds(6)
    for seed in seeds:
        made = table(Words(), SentenceStore(path), slots=3, seed=seed)
        made.sample(contexts.take(slice(0, 3)), actions[:3], np.random.default_rng([seed, 9]))


class Words(Fickle):
    """One of four words with the chances .4, .3, .2, .1."""

    def generate(self, prompts, rng):
        draws = row_uniforms(rng, len(prompts), 1)[:, 0]
        return [f"w{k}" for k in np.searchsorted([0.4, 0.7, 0.9], draws, side="right")]


def test_what_others_have_written_changes_no_distribution(tmp_path: Path) -> None:
    """χ² of single draws, and of pairs of draws of one table, over tables that another process had half filled."""
    path, seeds = tmp_path / "s.db", range(600)
    writer = multiprocessing.get_context("fork").Process(target=_fill_half, args=(path, seeds))
    writer.start()
    writer.join()
    assert writer.exitcode == 0
    assert len(SentenceStore(path)) > 600
    contexts, actions = rounds(6)
    chances = np.array([0.4, 0.3, 0.2, 0.1])
    for store in (None, SentenceStore(path)):
        single, pair = np.zeros(4), np.zeros((4, 4))
        for seed in seeds:
            made = table(Words(), store, slots=3, seed=seed)
            once, twice = (
                made.sample(contexts, actions, np.random.default_rng([seed, i])).embedding[0, 0].astype(int)
                for i in range(2)
            )
            single[once] += 1
            pair[once, twice] += 1
        expected = 600 * chances
        # 3 degrees of freedom: 0.999 quantile 16.3.
        assert ((single - expected) ** 2 / expected).sum() < 16.3
        # Two draws of a table of three are the same sentence in a third of the cases, and independent otherwise.
        joint = 600 * (np.diag(chances) / 3 + np.outer(chances, chances) * 2 / 3)
        # 15 degrees of freedom: 0.999 quantile 37.7.
        assert ((pair - joint) ** 2 / joint).sum() < 37.7


def _complete_slowly(path: Path, worker: int) -> None:
    def write(rows):
        time.sleep(0.05)
        return [f"{worker}" for _ in rows]

    held = SentenceStore(path).complete("m", "s", texts(40), [0] * 40, write)
    (path.parent / f"seen{worker}").write_text(" ".join(held))


def test_processes_that_ask_at_once_see_the_same(store: SentenceStore) -> None:
    """Each writes all; whoever is first to put a sentence decides, and everybody goes on with what is stored."""
    workers = [
        multiprocessing.get_context("fork").Process(target=_complete_slowly, args=(store.path, worker))
        for worker in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seen = {(store.path.parent / f"seen{worker}").read_text() for worker in range(4)}
    assert seen == {" ".join(str(s) for s in store.get("m", "s", texts(40), [0] * 40))}


def chi_square(found: np.ndarray, expected: np.ndarray) -> float:
    return float(((found - expected) ** 2 / expected).sum())


def test_a_race_selects_nothing(store: SentenceStore) -> None:
    """Two processes write the same pairs of samples at once, without seeds: both go on with the same, unselected ones.

    The other process puts its own while the first still writes, or the other way round.
    """
    chances, rng = np.array([0.4, 0.3, 0.2, 0.1]), np.random.default_rng(7)
    other = SentenceStore(store.path)
    # Lengths differ, so that a choice by length would show.
    words = ["w" * (k + 1) for k in range(4)]
    n = 800
    names, samples = [name for name in texts(n) for _ in range(2)], [0, 1] * n

    def say(rows: list[int]) -> list[str]:
        return [words[k] for k in rng.choice(4, size=len(rows), p=chances)]

    asked: list[int] = []
    won: list[str] = []

    def race(rows: list[int]) -> list[str]:
        mine = say(rows)
        won.extend(other.complete("m", "s", names[: len(rows)], samples[: len(rows)], say))
        asked.append(len(rows))
        return mine

    half = len(names) // 2
    seen = store.complete("m", "s", names[:half], samples[:half], race)
    assert asked == [half]
    assert seen == won
    # The other one has half of what is asked for now, and is late for the rest.
    seen = store.complete("m", "s", names, samples, say)
    assert seen[:half] == won
    assert seen == other.complete("m", "s", names, samples, say) == store.get("m", "s", names, samples)
    drawn = np.array([words.index(sentence) for sentence in seen]).reshape(-1, 2)
    # 3 and 15 degrees of freedom: 0.999 quantiles 16.3 and 37.7.
    assert chi_square(np.bincount(drawn[:, 0], minlength=4), n * chances) < 16.3
    assert chi_square(np.bincount(drawn[:, 1], minlength=4), n * chances) < 16.3
    pairs = np.bincount(4 * drawn[:, 0] + drawn[:, 1], minlength=16)
    assert chi_square(pairs, n * np.outer(chances, chances).ravel()) < 37.7


def test_without_seeds_a_store_keeps_the_distribution(tmp_path: Path) -> None:
    """χ² as above, for a server that ignores seeds: single draws, and pairs within one table, over 600 tables.

    Another handle begins each table, and the last one finds it begun.
    """
    contexts, actions = rounds(6)
    path = tmp_path / "s.db"
    for theirs, ours in ((None, None), (SentenceStore(path), SentenceStore(path))):
        source, counts = np.random.default_rng(11), np.zeros((2, 2))
        for seed in range(600):
            if theirs is not None:
                begun = table(Fickle(source=source), theirs, slots=3, seed=seed)
                begun.sample(contexts.take(slice(0, 3)), actions[:3], np.random.default_rng([seed, 9]))
            made = table(Fickle(source=source), ours, slots=3, seed=seed)
            once, twice = (
                int(made.sample(contexts, actions, np.random.default_rng([seed, i])).embedding[0, 0]) for i in range(2)
            )
            counts[once, twice] += 1
        chances = np.array([0.7, 0.3])
        # 1 and 3 degrees of freedom: 0.999 quantiles 10.8 and 16.3.
        assert chi_square(counts.sum(axis=1), 600 * chances) < 10.8
        assert chi_square(counts, 600 * (np.diag(chances) / 3 + np.outer(chances, chances) * 2 / 3)) < 16.3


def test_what_made_room_comes_back_as_it_was(tmp_path: Path) -> None:
    """A store much too small drops and refills all the time, and nothing that is drawn changes."""
    store = SentenceStore(tmp_path / "s.db", max_sentences=4)
    contexts, actions = rounds(40)
    dropped = 0
    for i in range(30):
        # No memory but the store.
        made, plain = table(Words(), store, slots=3), table(Words(), slots=3)
        drawn, expected = (
            one.sample(contexts.take(slice(i, i + 8)), actions[i : i + 8], np.random.default_rng(i))
            for one in (made, plain)
        )
        assert drawn.text.tolist() == expected.text.tolist()
        dropped += made.generated
    # It has been asked far more often than there are sentences: 3 queries, 4 prompts, 3 samples.
    assert dropped > 3 * 36


def test_a_table_of_what_cannot_be_written_again_needs_a_store_without_bound(tmp_path: Path) -> None:
    class Seedless(Fickle):
        reproducible = False

    bounded = SentenceStore(tmp_path / "s.db", max_sentences=4)
    with pytest.raises(ConfigError, match="expected one without max_sentences, got 4"):
        table(Seedless(), bounded)
    table(Seedless(), SentenceStore(tmp_path / "s.db"))
    table(Fickle(), bounded)


def test_processes_over_a_seedless_server_share_one_reference(store: SentenceStore) -> None:
    source = np.random.default_rng(0)
    first, second = (UnpromptedSentences({}, Fickle(source=source), FORMATTER, 8, store) for _ in range(2))
    queries = [f"w{i}" for i in range(9)]
    assert first.about(queries) == second.about(queries[::-1])[::-1]
    assert first.about(queries) != UnpromptedSentences({}, Fickle(source=source), FORMATTER, 8).about(queries)
