from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings

from offprompts_env.errors import ActionError, ConfigError, DataError, PropensityError, StorageError
from offprompts_env.interchange import convert_parquet, from_parquet, parquet as ours, to_parquet
from offprompts_env.types import LoggedDataset, LogMetadata, PromptSet
from tests.test_storage import assert_same, logs, make_log

PROMPTS = PromptSet(np.eye(3), ("funny", "sad", "old"))
NAMES: dict[str, Any] = {
    "context": "taste",
    "query": ["year", "length"],
    "action": "keyword",
    "propensity": "p",
    "reward": "liked",
    "output": "vector",
    "sentence": "said",
    "user_id": "who",
}


def make_table(**changes: Any) -> pa.Table:
    """As a service might log it: own names, list cells, prompt texts, and columns that no log has."""
    columns: dict[str, Any] = {
        "taste": pa.array([[0.5, 1.0], [1.5, 2.0], [2.5, 3.0], [3.5, 4.0]]),
        "year": [1990, 1991, 1992, 1993],
        "length": [90.5, 91.5, 92.5, 93.5],
        "keyword": ["sad", "funny", "sad", "old"],
        "p": [0.5, None, 0.25, 1.0],
        "liked": [True, False, True, True],
        "vector_0": [0.0, 1.0, 2.0, 3.0],
        "vector_1": [4.0, 5.0, 6.0, 7.0],
        "said": ["a", "b", "", "☃"],
        "who": pa.array([7, 8, 9, 7], pa.int32()),
        "unrelated": [{"a": 1}, None, {"a": 3}, {"a": 4}],
    }
    columns |= changes
    return pa.table({name: values for name, values in columns.items() if values is not None})


def write(path: Path, **changes: Any) -> Path:
    pq.write_table(make_table(**changes), path, row_group_size=3)
    return path


def test_a_services_file(tmp_path: Path) -> None:
    log = from_parquet(write(tmp_path / "a.parquet"), PROMPTS, **NAMES, metadata=LogMetadata(notes="mine"))
    np.testing.assert_array_equal(log.context, [[0.5, 1], [1.5, 2], [2.5, 3], [3.5, 4]])
    np.testing.assert_array_equal(log.query, [[1990, 90.5], [1991, 91.5], [1992, 92.5], [1993, 93.5]])
    np.testing.assert_array_equal(log.action, [1, 0, 1, 2])
    np.testing.assert_array_equal(log.propensity, [0.5, np.nan, 0.25, 1])
    np.testing.assert_array_equal(log.reward, [1, 0, 1, 1])
    np.testing.assert_array_equal(log.output, [[0, 4], [1, 5], [2, 6], [3, 7]])
    assert log.sentence is not None
    assert log.sentence.tolist() == ["a", "b", "", "☃"]
    assert log.user_id is not None
    assert log.user_id.tolist() == [7, 8, 9, 7]
    assert (log.item_id, log.query_text, log.oracle) == (None, None, None)
    assert log.metadata.notes == "mine"
    log.context[0, 0] = 9  # as learners' tensors share this memory


VECTORS: dict[str, pa.Array] = {
    "list": pa.array([[1, 2], [3, 4]], pa.list_(pa.float64())),
    "large list": pa.array([[1, 2], [3, 4]], pa.large_list(pa.float32())),
    "fixed": pa.array([[1, 2], [3, 4]], pa.list_(pa.float32(), 2)),
    "integers": pa.array([[1, 2], [3, 4]], pa.list_(pa.int16())),
    "halves": pa.array([[1, 2], [3, 4]], pa.list_(pa.float16(), 2)),
    "tensor": pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.float32(), (2,)), pa.array([[1, 2], [3, 4]], pa.list_(pa.float32(), 2))
    ),
}


@pytest.mark.parametrize("kind", VECTORS)
def test_vectors_of_any_list_type(tmp_path: Path, kind: str) -> None:
    pq.write_table(pa.table({"context": VECTORS[kind], "action": [0, 1], "reward": [0.5, 1.5]}), tmp_path / "a.parquet")
    log = from_parquet(tmp_path / "a.parquet", PROMPTS, query=None, output=None)
    np.testing.assert_array_equal(log.context, [[1, 2], [3, 4]])
    assert np.isnan(log.propensity).all()


def test_nested_columns(tmp_path: Path) -> None:
    user = [{"features": [1.0, 2.0], "id": 5, "plan": {"level": 1.5}}, {"features": [3.0, 4.0], "id": 6, "plan": None}]
    for rows in (user[:1], [user[0], {**user[1], "plan": {"level": 2.5}}]):
        table = pa.table({"user": rows, "a.b": [0] * len(rows), "r": [1.0] * len(rows)})
        pq.write_table(table, tmp_path / "a.parquet")
        log = from_parquet(
            tmp_path / "a.parquet", PROMPTS, context="user.features", query=["user.plan.level"], output=None,
            action="a.b", reward="r", user_id="user.id",
        )  # fmt: skip
        np.testing.assert_array_equal(log.context, [row["features"] for row in rows])
        np.testing.assert_array_equal(log.query[:, 0], [1.5, 2.5][: len(rows)])
        assert log.user_id is not None
        assert log.user_id.tolist() == [5, 6][: len(rows)]
    pq.write_table(pa.table({"user": user, "a.b": [0, 0], "r": [1.0, 1.0]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"user.plan.level: expected a number, got None in row 1 of .*a.parquet"):
        from_parquet(
            tmp_path / "a.parquet", PROMPTS, context="user.plan.level", query=None, output=None, action="a.b",
            reward="r",
        )  # fmt: skip


def test_only_mapped_columns_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    inner = ours._read

    def spy(file: Path, layout: Any) -> Any:
        for block in inner(file, layout):
            seen.extend(block.table.column_names)
            yield block

    monkeypatch.setattr(ours, "_read", spy)
    from_parquet(write(tmp_path / "a.parquet"), PROMPTS, **NAMES)
    assert set(seen) == {"taste", "year", "length", "keyword", "p", "liked", "vector_0", "vector_1", "said", "who"}


def test_many_files(tmp_path: Path) -> None:
    for i, folder in enumerate(("day=2", "day=1", "_staging", ".hidden")):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "part.parquet", year=[i] * 4)
    (tmp_path / "_SUCCESS").touch()
    assert from_parquet(tmp_path, PROMPTS, **NAMES).query[:, 0].tolist() == [1] * 4 + [0] * 4
    assert from_parquet(f"{tmp_path}/day=*/*.parquet", PROMPTS, **NAMES).query[:, 0].tolist() == [1] * 4 + [0] * 4
    given = [tmp_path / "day=2" / "part.parquet", str(tmp_path / "day=1" / "part.parquet")]
    assert from_parquet(given, PROMPTS, **NAMES).query[:, 0].tolist() == [0] * 4 + [1] * 4


def test_row_groups_and_blocks_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = make_log(50)
    to_parquet(log, tmp_path / "a.parquet")
    monkeypatch.setattr(ours, "BLOCK_ROWS", 7)
    assert_same(from_parquet(tmp_path / "a.parquet"), log)


def test_a_log_can_be_larger_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = make_log(50)
    for i in range(5):
        to_parquet(log.take(slice(10 * i, 10 * i + 10)), tmp_path / f"{i}.parquet")
    monkeypatch.setattr(ours, "BLOCK_ROWS", 7)
    assert convert_parquet(tmp_path / "*.parquet", tmp_path / "log") == tmp_path / "log"
    assert_same(LoggedDataset.load(tmp_path / "log"), log)
    with pytest.raises(StorageError, match="expected no log here"):
        convert_parquet(tmp_path / "*.parquet", tmp_path / "log")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(log=logs())
def test_any_log_comes_back(tmp_path: Path, log: LoggedDataset) -> None:
    assert_same(from_parquet(to_parquet(log, tmp_path / "log.parquet")), log)


def test_other_tools_see_a_plain_table(tmp_path: Path) -> None:
    log = make_log(20)
    frame = pd.read_parquet(to_parquet(log, tmp_path / "log.parquet"))
    assert log.prompts.texts is not None
    assert frame["prompt"].tolist() == [log.prompts.texts[action] for action in log.action]
    np.testing.assert_array_equal(np.stack(frame["context"].to_list()), log.context)
    assert frame["propensity"].isna().tolist() == np.isnan(log.propensity).tolist()
    group = pq.read_metadata(tmp_path / "log.parquet").row_group(0)
    chunks = [group.column(i) for i in range(group.num_columns)]
    assert {chunk.compression for chunk in chunks} == {"SNAPPY"}
    assert {kind for chunk in chunks for kind in chunk.encodings} <= {"PLAIN", "RLE", "RLE_DICTIONARY"}


def test_prompts_of_a_file(tmp_path: Path) -> None:
    log = make_log(20)
    file = to_parquet(log, tmp_path / "log.parquet")
    assert log.prompts.texts is not None
    encoded = PromptSet(np.ones((7, 2)), log.prompts.texts)
    np.testing.assert_array_equal(from_parquet(file, encoded).prompts.embeddings, encoded.embeddings)
    assert from_parquet(file, embeddings=np.ones((7, 2))).prompts.texts == log.prompts.texts
    assert from_parquet(file, metadata=LogMetadata(notes="x")).metadata.notes == "x"
    with pytest.raises(DataError, match=r"expected the 7 prompts in .*log.parquet, got 3 others"):
        from_parquet(file, PROMPTS)


def test_prompts_that_the_rows_name(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet")
    log = from_parquet(file, **NAMES)
    assert log.prompts.texts == ("funny", "old", "sad")
    np.testing.assert_array_equal(log.prompts.embeddings, np.eye(3))
    assert log.action.tolist() == [2, 0, 2, 1]
    own = from_parquet(file, embeddings=[[1.0], [2.0], [3.0]], **NAMES)
    np.testing.assert_array_equal(own.prompts.embeddings, [[1], [2], [3]])
    indices = write(tmp_path / "b.parquet", keyword=[0, 1, 2, 0])
    with pytest.raises(DataError, match=r"keyword: expected prompt texts, .* got int64 in row 0 .*pass prompts="):
        from_parquet(indices, **NAMES)
    many = pa.table({"context": [0.0] * 5000, "action": [f"say {i}" for i in range(5000)], "reward": [0.0] * 5000})
    pq.write_table(many, tmp_path / "c.parquet")
    with pytest.raises(DataError, match="at most 4,096 distinct prompts without embeddings"):
        from_parquet(tmp_path / "c.parquet", query=None, output=None)
    log = from_parquet(tmp_path / "c.parquet", query=None, output=None, embeddings=np.ones((5000, 1)))
    assert log.n_prompts == 5000


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "missing": ({"taste": None}, {}, DataError, r"context: expected a column 'taste' of lists or .*x.parquet has"),
    "near": (
        {},
        {"reward": "like"},
        DataError,
        r"reward: expected a column 'like', .*x.parquet has none; did you mean",
    ),
    "no query": ({}, {"query": "query"}, DataError, "or query=None if the log has none"),
    "gap": ({"vector_1": None, "vector_2": [0.0] * 4}, {}, DataError, r"vector_1 is missing in .*x.parquet"),
    "no field": ({}, {"reward": "unrelated.b"}, DataError, "reward: expected a column 'unrelated.b'"),
    "short": ({"taste": [[1.0, 2.0], [1.0]] * 2}, {}, DataError, r"taste: expected 2 .* got 1 in row 1 of .*x.parq"),
    "no list": ({"taste": [[1.0, 2.0]] * 3 + [None]}, {}, DataError, r"taste: .* got None in row 3 of .*x.parquet"),
    "hole": ({"taste": [[1.0, 2.0]] * 3 + [[1.0, None]]}, {}, DataError, r"got \[1.0, None\] in row 3 of .*x.parq"),
    "nan in list": ({"taste": [[1.0, 2.0]] * 3 + [[1.0, np.nan]]}, {}, DataError, "taste: expected finite .* in row 3"),
    "huge": ({"length": [1.0, 1e300, 1.0, 1.0]}, {}, DataError, "length: expected finite .* in row 1 of"),
    "text vector": ({"taste": ["[1, 2]"] * 4}, {}, DataError, r"taste: expected a number, got '\[1, 2\]' in row 0"),
    "word lists": ({"taste": [["a"]] * 4}, {}, DataError, r"taste: expected a list of numbers, got list<"),
    "null": ({"length": [1.0, None, 1.0, 1.0]}, {}, DataError, "length: expected a number, got None in row 1"),
    "unit": ({"length": ["92 min"] * 4}, {}, DataError, "length: expected a number, got '92 min' in row 0"),
    "date": ({"length": pa.array([0] * 4, pa.timestamp("s"))}, {}, DataError, r"length: .* got timestamp\[ms\]"),
    "prompt": ({"keyword": ["sad", "funy", "sad", "old"]}, {}, ActionError, "got 'funy' in row 1 .*mean 'funny'"),
    "no prompt": ({"keyword": ["sad", None, "sad", "old"]}, {}, DataError, "keyword: expected text, got None in row 1"),
    "index": ({"keyword": [0, 1, 2, 3]}, {}, ActionError, r"keyword: .* in \[0, 3\), got 3 in row 3 of .*x.parquet"),
    "negative": ({"keyword": [0, 1, 2, -1]}, {}, ActionError, "got -1 in row 3"),
    "half": ({"keyword": [0, 1, 1.5, 0]}, {}, DataError, "keyword: expected an integer of 64 bits, got 1.5 in row 2"),
    "endless": ({"keyword": [0, 1, np.inf, 0]}, {}, DataError, "got inf in row 2"),
    "p": ({"p": [0.5, 0.5, 0.5, 1.5]}, {}, PropensityError, "p: expected a probability .* got 1.5 in row 3 of .*x.p"),
    "p zero": ({"p": [0, 1, 1, 1]}, {}, PropensityError, "got 0.0 in row 0"),
    "p text": ({"p": ["half"] * 4}, {}, DataError, "p: expected a number, got 'half' in row 0"),
    "no sentence": ({"said": ["a", None, "", ""]}, {}, DataError, "said: expected text, got None in row 1"),
    "number said": ({"said": [1, 2, 3, 4]}, {}, DataError, "said: expected text, got int64"),
    "large id": ({"who": pa.array([0, 1, 2, 2**63], pa.uint64())}, {}, DataError, "who: expected an integer of 64"),
    "rounded id": ({"who": [0.0, 1.0, 2.0, 2.0**60]}, {}, DataError, "who: expected an integer of 64 bits"),
    "empty": ({name: [] for name in make_table().column_names}, {}, DataError, "expected"),
    "unknown": ({}, {"rewards": "liked"}, ConfigError, "unknown column 'rewards': did you mean 'reward'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_file(tmp_path: Path, case: str) -> None:
    changes, mapping, error, words = WRONG[case]
    file = write(tmp_path / "x.parquet", **changes)
    with pytest.raises(error, match=words):
        from_parquet(file, PROMPTS, **NAMES | mapping)


def test_rows_are_counted_in_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "BLOCK_ROWS", 2)
    write(tmp_path / "a.parquet")
    write(tmp_path / "b.parquet", p=[0.5, 0.5, 0.5, 2.0])
    with pytest.raises(PropensityError, match=r"p: .* got 2.0 in row 3 of .*b.parquet"):
        from_parquet(tmp_path, PROMPTS, **NAMES)


CLASHES: dict[str, tuple[dict[str, Any], str]] = {
    "width": (
        {"taste": [[1.0]] * 4},
        r"context: expected float32\[2\] as in row 0 of .*a.parquet, got float32\[1\] in",
    ),
    "column": (
        {"user_id": [1, 2, 3, 4]},
        r"user_id: expected none as in row 0 of .*a.parquet, got int64 in row 0 of .*b",
    ),
}


@pytest.mark.parametrize("case", CLASHES)
def test_files_that_differ(tmp_path: Path, case: str) -> None:
    changes, words = CLASHES[case]
    write(tmp_path / "a.parquet")
    write(tmp_path / "b.parquet", **changes)
    names = {name: source for name, source in NAMES.items() if name != "user_id"}
    with pytest.raises(DataError, match=words):
        from_parquet(tmp_path, PROMPTS, **names)


def test_propensities_may_be_missing_in_one_file(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", p=None)
    write(tmp_path / "b.parquet", p=None, propensity=[0.5] * 4)
    names = {name: source for name, source in NAMES.items() if name != "propensity"}
    log = from_parquet(tmp_path, PROMPTS, **names)
    np.testing.assert_array_equal(log.propensity, [np.nan] * 4 + [0.5] * 4)


def test_no_files(tmp_path: Path) -> None:
    for files in (tmp_path, tmp_path / "x.parquet", f"{tmp_path}/*.parquet", [], [tmp_path / "x"], [tmp_path]):
        with pytest.raises(StorageError, match="expected"):
            from_parquet(files, PROMPTS)


def test_a_failed_export_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = make_log(5)
    file = to_parquet(log, tmp_path / "log.parquet")
    before = file.read_bytes()

    def full(*args: Any, **kwargs: Any) -> None:
        args[1].write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full)
        with pytest.raises(StorageError, match=r"cannot write: .*No space left"):
            to_parquet(make_log(9), file)
    broken = replace(log, sentence=np.array(["\ud800"] * 5, dtype=object))
    with pytest.raises(DataError, match=r"sentence: expected valid Unicode, got .* in row 0"):
        to_parquet(broken, file)
    with pytest.raises(StorageError, match="cannot write"):
        to_parquet(log, tmp_path / "nowhere" / "log.parquet")
    assert [entry.name for entry in tmp_path.iterdir()] == ["log.parquet"]
    assert file.read_bytes() == before


def test_a_catalogue_too_large_for_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from offprompts_env.interchange import header

    monkeypatch.setattr(header, "_LARGEST", 100)
    with pytest.raises(DataError, match=r"catalogue of at most 100 bytes beside a table.*use LoggedDataset.save"):
        to_parquet(make_log(5), tmp_path / "log.parquet")


def test_wrong_texts_are_named(tmp_path: Path) -> None:
    calls: list[Callable[[], object]] = [
        lambda: to_parquet(replace(make_log(3), sentence=np.array(["a", b"b", "c"], dtype=object)), tmp_path / "a"),
        lambda: to_parquet(replace(make_log(3), sentence=np.array(["a", None, "c"], dtype=object)), tmp_path / "a"),
    ]
    for call in calls:
        with pytest.raises(DataError, match=r"sentence: expected text, got .* in row 1"):
            call()
