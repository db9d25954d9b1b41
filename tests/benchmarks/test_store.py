"""The store: made once, whole or not at all, by any number of processes."""

import multiprocessing
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from benchmarks.store import JSON, VALUES, Codec, Store, StoreError, StoreWarning, digest
from offprompts_env.errors import DataError


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    store, made = Store(tmp_path), []

    def make(missing: list[int]) -> list[int]:
        made.append(missing)
        return [10 * index for index in missing]

    assert [kept.value for kept in store.many("stage", ["a", "b"], make, JSON)] == [0, 10]
    assert [kept.value for kept in store.many("stage", ["a", "b", "c"], make, JSON)] == [0, 10, 20]
    assert made == [[0, 1], [2]]


def test_what_was_made_before_a_moment_is_made_again_once(tmp_path: Path) -> None:
    old = Store(tmp_path)
    old.one("stage", "a", lambda: 1, JSON)
    time.sleep(0.02)  # ticks of a file system are coarse
    store = Store(tmp_path, old.now())

    def fails() -> int:
        raise ValueError

    with pytest.raises(ValueError):
        store.one("stage", "a", fails, JSON)
    assert old.one("stage", "a", lambda: 2, JSON).value == 1
    assert store.one("stage", "a", lambda: 3, JSON).value == 3
    assert store.one("stage", "a", lambda: 4, JSON).value == 3
    assert old.one("stage", "a", lambda: 5, JSON).value == 3


@pytest.mark.parametrize("damage", ["value.json", "cost.json", "missing"])
def test_damaged_artefacts_are_made_again(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path)
    store.one("stage", "a", lambda: 1, JSON)
    if damage == "missing":
        (tmp_path / "stage" / "a" / "value.json").unlink()
    else:
        (tmp_path / "stage" / "a" / damage).write_text("{")
    with pytest.warns(StoreWarning, match="cannot be read .* made again"):
        assert store.one("stage", "a", lambda: 2, JSON).value == 2
    assert store.one("stage", "a", lambda: 3, JSON).value == 2


def test_what_cannot_be_reached_is_kept(tmp_path: Path) -> None:
    def refused(folder: Path) -> int:
        raise PermissionError(13, "Permission denied")

    store = Store(tmp_path)
    store.one("stage", "a", lambda: 1, JSON)
    with pytest.raises(StoreError, match="may be whole, so it is kept"):
        store.one("stage", "a", lambda: 2, Codec(JSON.write, refused))
    assert store.one("stage", "a", lambda: 3, JSON).value == 1


def test_an_artefact_of_a_killed_process_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "stage" / ".a.unfinished").mkdir(parents=True)
    (tmp_path / "stage" / ".a.unfinished" / "value.json").write_text("1")
    assert Store(tmp_path).one("stage", "a", lambda: 2, JSON).value == 2
    assert not (tmp_path / "stage" / ".a.unfinished").exists()


def _write_much(root: Path, kind: str) -> None:
    # A disk that is full after some bytes, as far as this process goes.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    store = Store(root)
    try:
        if kind == "array":
            store.one("stage", "a", lambda: np.zeros(10_000), VALUES)
        else:
            store.one("stage", "a", lambda: "x" * 10_000, JSON)
    except StoreError as error:
        raise SystemExit(0 if "run the same command again" in str(error) else 2) from error
    raise SystemExit(1)


@pytest.mark.parametrize("kind", ["array", "json"])
def test_a_full_disk_leaves_no_half_artefact(tmp_path: Path, kind: str) -> None:
    process = multiprocessing.get_context("fork").Process(target=_write_much, args=(tmp_path, kind))
    process.start()
    process.join(30)
    assert process.exitcode == 0
    assert not [path for path in (tmp_path / "stage").iterdir() if path.suffix != ".lock"]
    assert Store(tmp_path).one("stage", "a", lambda: 1, JSON).value == 1


def _slowly(root: Path) -> None:
    def make() -> int:
        (root / f"made-{time.time_ns()}").touch()
        time.sleep(0.3)
        return 1

    Store(root / "store").one("stage", "a", make, JSON)


def test_one_process_makes_what_several_ask_for(tmp_path: Path) -> None:
    processes = [multiprocessing.get_context("fork").Process(target=_slowly, args=(tmp_path,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(list(tmp_path.glob("made-*"))) == 1


def test_names_tell_settings_apart() -> None:
    @dataclass(frozen=True)
    class Setting:
        n: int

    assert digest("log", Setting(1)) == digest("log", Setting(1))
    assert len({digest("log", Setting(1)), digest("log", Setting(2)), digest("rewards", Setting(1))}) == 3
    with pytest.raises(DataError, match="give the class a __repr__"):
        digest(object())
