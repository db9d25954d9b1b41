import errno
import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from offprompts_env import storage
from offprompts_env.columns import Batches, concatenate
from offprompts_env.errors import ConfigError, DataError, StorageError
from offprompts_env.storage import ShardWriter, iter_batches, load, read_manifest, save
from offprompts_env.types import LoggedDataset, LogMetadata, Oracle, PromptSet


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for a real disk takes most of the time and shows nothing here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


COLUMNS = ("context", "query", "action", "propensity", "reward", "output")
OPTIONAL = ("sentence", "user_id", "item_id", "query_text")


def make_log(
    n: int = 50, *, n_prompts: int = 7, text: bool = True, dims: tuple[int, int, int] = (3, 2, 4)
) -> LoggedDataset:
    rng = np.random.default_rng(n)
    vectors = [rng.standard_normal((n, d), dtype=np.float32) for d in dims]
    propensity = rng.random(n)
    propensity[::3] = np.nan
    texts = tuple(f"prompt {i} \x00 é 😀" for i in range(n_prompts)) if text else None
    return LoggedDataset(
        context=vectors[0],
        query=vectors[1],
        action=rng.integers(n_prompts, size=n),
        propensity=propensity,
        reward=rng.standard_normal(n, dtype=np.float32),
        output=vectors[2],
        prompts=PromptSet(np.random.default_rng(0).normal(size=(n_prompts, 3)), texts),
        sentence=np.array([f"sentence {i} \t\r\n\x00 ☃" for i in range(n)], dtype=object) if text else None,
        user_id=rng.integers(-5, 5, size=n) if text else None,
        item_id=rng.integers(2**62, size=n) if text else None,
        query_text=np.array(["Wall·E (2008)"] * n, dtype=object) if text else None,
        oracle=Oracle(rng.standard_normal(n, dtype=np.float32)),
        metadata=LogMetadata(
            "Some-v0", {"n_prompts": n_prompts, "nested": {"a": [1, 2.5, None]}}, 3, {"numpy": "2"}, "é"
        ),
    )


def assert_same(actual: LoggedDataset, expected: LoggedDataset) -> None:
    """Equal bit for bit, NaN included."""
    for name in COLUMNS + OPTIONAL:
        a, b = getattr(actual, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        if b is not None:
            assert a.dtype == b.dtype, name
            np.testing.assert_array_equal(a, b, err_msg=name)
    assert (actual.oracle is None) == (expected.oracle is None)
    if actual.oracle is not None and expected.oracle is not None:
        np.testing.assert_array_equal(actual.oracle.expected_reward, expected.oracle.expected_reward)
    assert actual.prompts.fingerprint == expected.prompts.fingerprint
    assert actual.prompts.texts == expected.prompts.texts
    assert actual.metadata == expected.metadata


# ---------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("shard_rows", [1, 7, 50, 1000])
def test_round_trip(tmp_path: Path, shard_rows: int) -> None:
    log = make_log()
    assert save(log, tmp_path / "log", shard_rows=shard_rows) == tmp_path / "log"
    assert_same(LoggedDataset.load(tmp_path / "log"), log)
    manifest = read_manifest(tmp_path / "log")
    assert manifest.rows == 50
    assert all((tmp_path / "log" / shard.file).stat().st_size == shard.bytes for shard in manifest.shards)
    assert {entry.name for entry in (tmp_path / "log").iterdir()} == {
        "manifest.json", "prompts.safetensors", *(shard.file for shard in manifest.shards)
    }  # fmt: skip


texts = st.text(st.characters(exclude_categories=("Cs",)))
unit = st.floats(0, 1, exclude_min=True) | st.floats(0, 1, exclude_min=True, width=32) | st.just(float("nan"))
finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


@st.composite
def logs(draw: st.DrawFn) -> LoggedDataset:
    n, n_prompts = draw(st.integers(1, 8)), draw(st.sampled_from([1, 2, 127, 128, 129, 40_000]))

    def rows(cell: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(cell, min_size=n, max_size=n))

    def maybe(cell: st.SearchStrategy[Any], dtype: Any) -> Any:
        return np.array(rows(cell), dtype=dtype) if draw(st.booleans()) else None

    def matrix() -> np.ndarray:
        d = draw(st.integers(0, 3))
        return np.array(rows(st.lists(finite, min_size=d, max_size=d)), dtype=np.float32).reshape(n, d)

    ids = st.integers(-(2**63), 2**63 - 1)
    return LoggedDataset(
        context=matrix(),
        query=matrix(),
        action=rows(st.integers(0, n_prompts - 1)),
        propensity=rows(unit),
        reward=rows(finite),
        output=matrix(),
        prompts=PromptSet(np.zeros((n_prompts, 1)), draw(st.none() | st.just(("x",) * n_prompts))),
        sentence=maybe(texts, object),
        query_text=maybe(texts, object),
        user_id=maybe(ids, np.int64),
        item_id=maybe(ids, np.int64),
        oracle=draw(st.none() | st.builds(lambda r: Oracle(np.array(r, np.float32)), st.just(rows(finite)))),
        metadata=LogMetadata(notes=draw(texts)),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(log=logs(), shard_rows=st.integers(1, 9))
def test_any_log_comes_back(tmp_path: Path, log: LoggedDataset, shard_rows: int) -> None:
    save(log, tmp_path / "log", mode="overwrite", shard_rows=shard_rows)
    assert_same(load(tmp_path / "log"), log)


def test_megabyte_sentences_make_small_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_SHARD_CHARACTERS", 3_000_000)
    log = make_log(8)
    long = np.array([chr(ord("a") + i) * 1_000_000 + "ünïcode" * 10_000 for i in range(8)], dtype=object)
    log = replace(log, sentence=long)
    with ShardWriter(tmp_path, log.prompts, log.metadata) as writer:
        for row in range(8):
            writer.append(log.take(slice(row, row + 1)))
        assert writer.flushed_rows == 6
    assert_same(load(tmp_path), log)


def test_many_small_batches_are_joined_on_the_way() -> None:
    log = make_log(1000)
    batches = Batches()
    for row in range(1000):
        batches.append(log.take(slice(row, row + 1)))
    batches.append(log)
    assert len(batches.parts) == 3 + (1000 - 3 * 256) + 1
    assert_same(concatenate(batches.parts[:-1], log.metadata), log)
    assert batches.parts[-1] is log


def test_small_on_disk(tmp_path: Path) -> None:
    n = 100_000
    log = replace(make_log(n, n_prompts=1000, text=False, dims=(5, 5, 5)), propensity=np.full(n, 1e-3))
    save(log, tmp_path / "log")
    assert sum(entry.stat().st_size for entry in (tmp_path / "log").iterdir()) / n <= 62


def test_batches_join_to_the_whole(tmp_path: Path) -> None:
    log = make_log(50)
    save(log, tmp_path / "log", shard_rows=7)
    for rows in (1, 3, 7, 20, 49, 50, 51):
        batches = list(iter_batches(tmp_path / "log", rows))
        assert [len(b) for b in batches[:-1]] == [rows] * (len(batches) - 1)
        start = 0
        for batch in batches:
            assert_same(batch, log.take(slice(start, start + len(batch))))
            start += len(batch)
        assert start == 50
    with pytest.raises(ConfigError, match="rows: expected at least 1, got 0"):
        next(iter_batches(tmp_path / "log", 0))


# --------------------------------------------------------------------------------------------------------- modes


def test_existing_log_is_refused_appended_or_overwritten(tmp_path: Path) -> None:
    first, second = make_log(20), make_log(30)
    path = save(first, tmp_path / "log", shard_rows=8)
    with pytest.raises(StorageError, match=r"found one of 20 rows.*mode='append'"):
        save(second, path)
    assert_same(load(path), first)
    save(second, path, mode="append")
    both = load(path)
    assert_same(both.take(slice(20)), first)
    assert_same(both.take(slice(20, 50)), second)
    assert [recording.first_row for recording in read_manifest(path).recordings] == [0, 20]
    (path / "notes of a user.txt").write_text("stays")
    save(second, path, mode="overwrite")
    assert_same(load(path), second)
    assert (path / "notes of a user.txt").exists()


def test_refuse_takes_a_log_without_rows(tmp_path: Path) -> None:
    log = make_log()
    with ShardWriter(tmp_path / "log", log.prompts):
        pass
    save(log, tmp_path / "log")
    assert_same(load(tmp_path / "log"), log)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda log: replace(log, metadata=replace(log.metadata, env_id="Other-v0")), "environment Some-v0 .*Other-v0"),
        (lambda log: replace(log, metadata=replace(log.metadata, env_config={"a": 1})), 'config .*"nested".*{"a": 1}'),
        (
            lambda log: replace(log, prompts=PromptSet(log.prompts.embeddings)),
            "prompt fingerprint [0-9a-f]{64} .*, got [0-9a-f]{64}",
        ),
        (lambda log: replace(log, user_id=None), 'expected columns .*"user_id": "int64".*, got '),
        (lambda log: replace(log, oracle=None), 'expected columns .*"expected_reward"'),
        (lambda log: replace(log, context=np.zeros((50, 9))), r"float32\[3\].*float32\[9\]"),
    ],
    ids=["environment", "config", "prompts", "ids", "oracle", "dimension"],
)
def test_append_refuses_another_kind_of_log(
    tmp_path: Path, change: Callable[[LoggedDataset], LoggedDataset], words: str
) -> None:
    log = make_log(50)
    save(log, tmp_path / "log")
    with pytest.raises(DataError, match=words):
        save(change(log), tmp_path / "log", mode="append")
    assert_same(load(tmp_path / "log"), log)


def test_append_takes_texts_embedded_on_another_machine(tmp_path: Path) -> None:
    log = make_log(20)
    again = replace(log, prompts=PromptSet(log.prompts.embeddings * np.float32(1 + 1e-6), log.prompts.texts))
    save(log, tmp_path / "log")
    save(again, tmp_path / "log", mode="append")
    found = load(tmp_path / "log")
    assert len(found) == 40
    assert (found.prompts.embeddings == log.prompts.embeddings).all()
    assert found.prompts.fingerprint == again.prompts.fingerprint


def test_append_takes_tuples_and_lists_alike(tmp_path: Path) -> None:
    log = replace(make_log(), metadata=LogMetadata(env_config={"a": (1, 2)}))
    save(log, tmp_path / "log")
    save(log, tmp_path / "log", mode="append")
    assert len(load(tmp_path / "log")) == 100


def test_seeds_of_numpy_are_seeds(tmp_path: Path) -> None:
    log = replace(make_log(), metadata=LogMetadata(seed=np.int64(7)))
    assert load(save(log, tmp_path / "log")).metadata.seed == 7


@pytest.mark.parametrize("mode", ["refuse", "append", "overwrite"])
def test_other_files_are_never_touched(tmp_path: Path, mode: storage.Mode) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(StorageError, match=r"other files \(thesis.tex\)"):
        save(make_log(), tmp_path, mode=mode)
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    with pytest.raises(StorageError, match="expected the manifest of a log"):
        save(make_log(), tmp_path, mode=mode)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["manifest.json", "thesis.tex"]


def test_wrong_arguments(tmp_path: Path) -> None:
    log = make_log()
    with pytest.raises(ConfigError, match="unknown mode 'apend': did you mean 'append'"):
        save(log, tmp_path / "log", mode="apend")
    with pytest.raises(ConfigError, match="shard_rows: expected at least 1, got 0"):
        save(log, tmp_path / "log", shard_rows=0)
    for odd in (LogMetadata(env_config={"part": object()}), LogMetadata(seed=object())):
        with pytest.raises(DataError, match="metadata: expected a config, seed and versions that fit into JSON"):
            save(replace(log, metadata=odd), tmp_path / "log")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="expected a directory or nothing"):
        save(log, tmp_path / "file")


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    log = make_log()
    with ShardWriter(tmp_path, log.prompts), pytest.raises(StorageError, match="only writer"):
        ShardWriter(tmp_path, log.prompts, mode="append")
    writer = ShardWriter(tmp_path, log.prompts)
    writer.close()
    writer.close()
    with pytest.raises(StorageError, match="closed"):
        writer.append(log)
    with pytest.raises(StorageError, match="closed"):
        writer.flush()


@pytest.mark.parametrize(
    ("column", "cell", "words"),
    [
        ("sentence", None, "sentence: expected text, got None in row 4"),
        ("sentence", 3.5, "sentence: expected text, got 3.5 in row 4"),
        ("query_text", "a\ud800b", "query_text: expected valid Unicode, got .* in row 4 with a lone surrogate"),
    ],
)
def test_cells_that_are_no_text(tmp_path: Path, column: str, cell: object, words: str) -> None:
    log = make_log()
    values = getattr(log, column).copy()
    values[4] = cell
    with pytest.raises(DataError, match=words):
        save(replace(log, **{column: values}), tmp_path / "log", shard_rows=2)


# ------------------------------------------------------------------------------------------------ damaged and foreign


def edit_manifest(path: Path, **changes: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.update(changes)
    (path / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if v is not ...}))


def edit_shard(path: Path, index: int, **changes: Any) -> None:
    shards = json.loads((path / "manifest.json").read_text())["shards"]
    shards[index].update(changes)
    edit_manifest(path, shards=shards, rows=sum(int(shard["rows"]) for shard in shards))


def forget_shards(path: Path, left: int) -> None:
    """Leave the manifest of a writer that was killed before it could name the last shards."""
    shards = json.loads((path / "manifest.json").read_text())["shards"][:left]
    edit_manifest(path, shards=shards, rows=sum(shard["rows"] for shard in shards))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda p: shutil.rmtree(p), "expected a dataset directory"),
    "a file": (lambda p: (shutil.rmtree(p), p.write_text("")), "expected a dataset directory"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "expected a dataset directory"),
    "other manifest": (lambda p: (p / "manifest.json").write_text("{}"), "expected the manifest of a log"),
    "torn manifest": (lambda p: (p / "manifest.json").write_text('{"format": "offp'), "manifest.json: expected JSON"),
    "list": (lambda p: (p / "manifest.json").write_text("[]"), "expected the manifest of a log"),
    "newer": (lambda p: edit_manifest(p, version=2), "expected format version 1 or older, got 2; upgrade"),
    "no version": (lambda p: edit_manifest(p, version=...), "expected format version 1 or older, got None"),
    "incomplete": (lambda p: edit_manifest(p, columns=...), "manifest.json: incomplete: KeyError 'columns'"),
    "odd shard": (lambda p: edit_manifest(p, shards=[{"file": "x"}]), "manifest.json: incomplete: TypeError"),
    "missing shard": (lambda p: (p / "shard-000001.parquet").unlink(), "shard-000001.parquet: .*missing"),
    "bit flip": (
        lambda p: flip(p / "shard-000001.parquet"),
        "shard-000001.parquet: damaged: expected SHA-256 [0-9a-f]{64}, got",
    ),
    "short shard": (
        lambda p: os.truncate(p / "shard-000001.parquet", 100),
        r"shard-000001.parquet: damaged.*\(100 bytes\)",
    ),
    "missing prompts": (lambda p: (p / "prompts.safetensors").unlink(), "prompts.safetensors: .*missing"),
    "prompt bits": (lambda p: flip(p / "prompts.safetensors"), "prompts.safetensors: damaged"),
    "short prompts": (lambda p: os.truncate(p / "prompts.safetensors", 20), r"damaged.*\(20 bytes\)"),
    "prompt texts": (lambda p: edit_manifest(p, prompt_texts=["a"] * 7), "expected prompts with fingerprint"),
    "columns": (
        lambda p: edit_manifest(p, columns={"action": "int8"}),
        r"expected columns \(action: int8\), got \(context",
    ),
    "fewer rows than listed": (lambda p: edit_shard(p, 1, rows=9), "shard-000001.parquet: expected 9 rows .* got 8"),
    "more rows than listed": (lambda p: edit_shard(p, 2, rows=3), "shard-000002.parquet: expected 3 rows .* got 4"),
    "rows as text": (
        lambda p: edit_shard(p, 1, rows="8"),
        "expected a number of rows of shard-000001.parquet, got '8'",
    ),
    "other total": (lambda p: edit_manifest(p, rows=21), "expected 'rows' to be 20, the sum over its shards, got 21"),
    "a gap": (
        lambda p: (forget_shards(p, 1), (p / "shard-000001.parquet").unlink()),
        "shard-000001.parquet: expected this shard before shard-000002.parquet, it is missing",
    ),
    "no rows": (
        lambda p: [f.unlink() for f in p.glob("shard*")] and edit_manifest(p, shards=[], rows=0),
        "at least one flushed row",
    ),
    "orphan": (
        lambda p: (p / "shard-000003.parquet").write_bytes(b"PAR1"),
        "shard-000003.parquet: expected a Parquet file",
    ),
    "stray": (
        lambda p: shutil.copy(p / "shard-000001.parquet", p / "shard-000003.parquet"),
        "expected the shard that follows",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_is_wrong_with_a_directory(tmp_path: Path, case: str) -> None:
    damage, words = DAMAGE[case]
    path = save(make_log(20), tmp_path / "log", shard_rows=8)
    damage(path)
    with pytest.raises(StorageError, match=words) as caught:
        load(path)
    assert str(path) in str(caught.value)
    with pytest.raises(StorageError):
        list(iter_batches(path, 100)) or load(path)


@pytest.mark.parametrize("total", [8, 20])
def test_shards_that_the_manifest_does_not_name_are_read_with_a_warning(tmp_path: Path, total: int) -> None:
    log = make_log(20)
    path = save(log, tmp_path / "log", shard_rows=8)
    forget_shards(path, 1)
    edit_manifest(path, rows=total)
    words = r"shard-000001.parquet, shard-000002.parquet \(12 rows\) that manifest.json does not name.* no checksum"
    with pytest.warns(UserWarning, match=words):
        assert_same(load(path), log)
    with pytest.warns(UserWarning, match=words):
        assert len(next(iter_batches(path, 20))) == 20
    with pytest.warns(UserWarning, match=words):
        save(make_log(5), path, mode="append")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load(path)) == 25  # by now they are named
        forget_shards(path, 1)
        save(log, path, mode="overwrite")


def test_append_counts_the_rows_that_are_there(tmp_path: Path) -> None:
    path = save(make_log(20), tmp_path / "log", shard_rows=8)
    edit_shard(path, 1, rows=9)
    with pytest.raises(StorageError, match=r"shard-000001.parquet: expected 9 rows as in manifest.json, got 8"):
        save(make_log(5), path, mode="append")
    save(make_log(5), path, mode="overwrite")
    assert_same(load(path), make_log(5))


def test_a_damaged_log_can_be_overwritten(tmp_path: Path) -> None:
    path = save(make_log(20), tmp_path / "log", shard_rows=8)
    (path / "manifest.json").write_text('{"format": "offprompts-log", "vers')
    with pytest.raises(StorageError, match="expected JSON"):
        save(make_log(5), path, mode="append")
    save(make_log(5), path, mode="overwrite")
    assert_same(load(path), make_log(5))


def test_append_looks_for_the_shards_that_are_there(tmp_path: Path) -> None:
    path = save(make_log(20), tmp_path / "log", shard_rows=8)
    os.truncate(path / "shard-000001.parquet", 100)
    with pytest.raises(StorageError, match=r"shard-000001.parquet: cannot append .* of \d+ bytes, got 100; restore"):
        save(make_log(5), path, mode="append")
    (path / "shard-000001.parquet").unlink()
    with pytest.raises(StorageError, match=r"shard-000001.parquet: cannot append .* of \d+ bytes, found none"):
        save(make_log(5), path, mode="append")


@pytest.mark.parametrize("mode", ["refuse", "append"])
def test_rows_without_a_manifest_are_not_thrown_away(tmp_path: Path, mode: storage.Mode) -> None:
    path = save(make_log(20), tmp_path / "log", shard_rows=8)
    (path / "manifest.json").rename(tmp_path / "manifest.json")
    with pytest.raises(StorageError, match=r"shards of a log without its manifest\.json; restore"):
        save(make_log(5), path, mode=mode)
    (tmp_path / "manifest.json").rename(path / "manifest.json")
    assert_same(load(path), make_log(20))
    (path / "manifest.json").unlink()
    save(make_log(5), path, mode="overwrite")
    assert_same(load(path), make_log(5))


# ------------------------------------------------------------------------------------------------ kills and full disks


class Killed(BaseException):
    """Stands for the end of the process: nothing of the program may handle it."""


@pytest.mark.filterwarnings("ignore:.*no checksum")
def test_a_kill_at_any_moment_leaves_every_flushed_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = make_log(24)
    real_replace, real_open = Path.replace, Path.open
    left = 0

    def maybe_die() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed

    def sync(descriptor: int) -> None:
        maybe_die()

    def rename(self: Path, target: Path) -> Path:
        maybe_die()
        return real_replace(self, target)

    def opened(self: Path, mode: str = "r", *args: Any) -> Any:
        if mode == "wb":
            maybe_die()
        return real_open(self, mode, *args)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", rename)
    monkeypatch.setattr(Path, "open", opened)
    for moment in range(1000):
        path, flushed, left = tmp_path / f"log{moment}", 0, moment
        writer = ShardWriter(path, log.prompts, log.metadata, shard_rows=8)
        try:
            for start in range(0, 24, 4):
                writer.append(log.take(slice(start, start + 4)))
                flushed = writer.flushed_rows
            break
        except Killed:
            flushed = writer.flushed_rows
        finally:
            left = 10**9
        # A copy has no lock, as after the end of a process.
        copy = shutil.copytree(path, tmp_path / f"copy{moment}")
        found = read_manifest(copy).rows if (copy / "manifest.json").exists() else 0
        assert flushed <= found <= flushed + 8
        if found:
            assert_same(load(copy), log.take(slice(found)))
        save(log.take(slice(found, 24)), copy, mode="append") if found < 24 else None
        assert_same(load(copy), log)
        assert not list(copy.glob(".*")) or found == 24
    assert moment > 20
    assert_same(load(path), log)


def test_a_full_disk_says_how_many_rows_are_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = make_log(30)
    writer = ShardWriter(tmp_path / "log", log.prompts, log.metadata, shard_rows=10)
    writer.append(log.take(slice(10)))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for _ in range(2):
            with pytest.raises(StorageError, match="the disk is full; 10 rows are safe on disk, 20 are in memory only"):
                writer.append(log.take(slice(10, 30))) if writer.rows == 10 else writer.flush()
            assert_same(load(tmp_path / "log"), log.take(slice(10)))
            assert not list((tmp_path / "log").glob(".*"))
        with pytest.raises(StorageError, match="20 are in memory only"), writer:
            writer.flush()
        # The failed context manager has let go of the directory without a second error on top.
        with pytest.raises(StorageError, match="0 rows are safe on disk, 30 are in memory only"):
            save(log, tmp_path / "other")
    save(log.take(slice(10, 30)), tmp_path / "log", mode="append")
    assert_same(load(tmp_path / "log"), log)


def test_flush_can_be_tried_again_when_there_is_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = make_log(30)
    with ShardWriter(tmp_path, log.prompts, log.metadata, shard_rows=10) as writer, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
        with pytest.raises(StorageError, match="broken; 0 rows are safe on disk, 30"):
            writer.append(log)
        patch.undo()
    assert_same(load(tmp_path), log)


def test_a_slow_recording_is_flushed_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = make_log(8)
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with ShardWriter(tmp_path, log.prompts, log.metadata) as writer:
        flushed = []
        for row, seconds in enumerate((3, 3, 3, 3, 1, 30, 1, 10)):  # how long each row took
            now += seconds
            writer.append(log.take(slice(row, row + 1)))
            flushed.append(writer.flushed_rows)
    # Never more than ten seconds are in memory only, and no row of minutes waits for the next one.
    assert flushed == [0, 0, 0, 4, 4, 6, 6, 8]
    assert_same(load(tmp_path), log)
