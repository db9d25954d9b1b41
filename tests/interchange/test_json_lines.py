import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings

from offprompts_env.errors import ActionError, ConfigError, DataError, PropensityError, StorageError
from offprompts_env.interchange import from_csv, from_json_lines, json_lines as ours, to_json_lines
from offprompts_env.types import LoggedDataset, LogMetadata, PromptSet
from tests.test_storage import assert_same, logs, make_log

PROMPTS = PromptSet(np.eye(3), ("funny", "sad", "old"))
NAMES: dict[str, Any] = {
    "context": "user.features",
    "query": ["item.year", "item.length"],
    "action": "prompt.keyword",
    "propensity": "prompt.p",
    "reward": "liked",
    "output": None,
    "sentence": "response.text",
    "user_id": "user.id",
}


def make_rows() -> list[dict[str, Any]]:
    """As a service might log it: nested, with keys that no log has, in lines that differ."""
    words = ("sad", "funny", "sad", "old")
    said = ('quo"te', "2020-01-01", "", "☃ \\ \n")
    return [
        {
            "time": f"2026-01-0{i + 1}T00:00:00Z",
            "user": {"id": 7 + i, "features": [i + 0.5, i + 1], "plan": None},
            "item": {"year": 1990 + i, "length": 90.5 + i},
            "prompt": {"keyword": words[i]} | ({"p": 0.25 * i} if i else {}),
            "liked": i % 2 == 0,
            "response": {"text": said[i]},
            "debug": i if i % 2 else "text",
        }
        for i in range(4)
    ]


def write(path: Path, rows: list[dict[str, Any]], separator: str = "\n") -> Path:
    content = separator.join(json.dumps(row) for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["log.jsonl", "log.jsonl.gz"])
def test_a_services_log(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / name, make_rows(), separator="\n\n")
    log = from_json_lines(file, PROMPTS, **NAMES, metadata=LogMetadata(notes="mine"))
    np.testing.assert_array_equal(log.context, [[0.5, 1], [1.5, 2], [2.5, 3], [3.5, 4]])
    np.testing.assert_array_equal(log.query, [[1990, 90.5], [1991, 91.5], [1992, 92.5], [1993, 93.5]])
    np.testing.assert_array_equal(log.action, [1, 0, 1, 2])
    np.testing.assert_array_equal(log.propensity, [np.nan, 0.25, 0.5, 0.75])
    np.testing.assert_array_equal(log.reward, [1, 0, 1, 0])
    assert log.sentence is not None
    assert log.sentence.tolist() == ['quo"te', "2020-01-01", "", "☃ \\ \n"]
    assert log.user_id is not None
    assert log.user_id.tolist() == [7, 8, 9, 10]
    assert log.metadata.notes == "mine"
    assert from_json_lines(file, **NAMES).prompts.texts == ("funny", "old", "sad")


def test_many_files_and_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "_ROWS", 3)
    write(tmp_path / "b.jsonl", make_rows()[:2])
    write(tmp_path / "a.ndjson.gz", make_rows())
    log = from_json_lines(tmp_path, PROMPTS, **NAMES)
    np.testing.assert_array_equal(log.action, [1, 0, 1, 2, 1, 0])
    np.testing.assert_array_equal(log.context[:, 0], [0.5, 1.5, 2.5, 3.5, 0.5, 1.5])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(log=logs())
def test_any_log_comes_back(tmp_path: Path, log: LoggedDataset) -> None:
    with pytest.warns(UserWarning, match=r"without prompt embeddings and provenance; pass prompts=log.prompts"):
        file = to_json_lines(log, tmp_path / "log.jsonl")
    assert_same(from_json_lines(file, log.prompts, metadata=log.metadata), log)


@pytest.mark.filterwarnings("ignore:.*lines hold rounds only")
def test_lines_are_what_others_expect(tmp_path: Path) -> None:
    log = make_log(5)
    to_json_lines(log, tmp_path / "log.jsonl")
    to_json_lines(log, tmp_path / "log.jsonl.gz")
    lines = (tmp_path / "log.jsonl").read_bytes()
    assert gzip.decompress((tmp_path / "log.jsonl.gz").read_bytes()) == lines
    rows = [json.loads(line) for line in lines.splitlines()]
    assert list(rows[0]) == [
        "context", "query", "action", "prompt", "propensity", "reward", "output", "sentence", "query_text", "user_id",
        "item_id", "expected_reward",
    ]  # fmt: skip
    np.testing.assert_array_equal(np.array([row["context"] for row in rows], dtype=np.float32), log.context)
    assert log.prompts.texts is not None
    assert [row["prompt"] for row in rows] == [log.prompts.texts[action] for action in log.action]
    assert [row["propensity"] is None for row in rows] == np.isnan(log.propensity).tolist()


WRONG: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "no json": ('{"user": ', {}, DataError, r"expected a JSON object, cannot read line 3 of .*log.jsonl: Expecting"),
    "list": ("[1, 2]", {}, DataError, r"expected a JSON object, got \[1, 2\] in line 3 of .*log.jsonl"),
    "two": ("{} {}", {}, DataError, r"cannot read line 3 of .*: Extra data"),
    "no utf-8": (b'{"a": "\xff"}', {}, DataError, r"cannot read line 3 of .*: 'utf-8' codec"),
    "deep": ('{"a": ' + "[" * 200_000, {}, DataError, r"cannot read line 3 of .*recursion"),
    "digits": ('{"a": ' + "9" * 10_000 + "}", {}, DataError, r"cannot read line 3 of .*digits"),
    "long": ('{"a": "' + "x" * 2000 + '"}', {}, DataError, r"at most 1,500 bytes, got more in line 3 of .*log.jsonl"),
    "missing": ({"liked": None}, {}, DataError, r"liked: expected a number, got None in line 3 of .*log.jsonl"),
    "no user": ({"user": 5}, {}, DataError, r"user.features: expected a list of numbers, got None in line 3 of"),
    "kind": ({"liked": "yes"}, {}, DataError, r"liked: expected values of one kind, .* got 'yes' in line 3 of .*log.j"),
    "short": (
        {"user": {"id": 1, "features": [1]}},
        {},
        DataError,
        r"expected 2 numbers as in line 1 of .* in line 3 of",
    ),
    "words": ({"user": {"id": 1, "features": ["a", "b"]}}, {}, DataError, r"user.features: .* in line 3 of"),
    "hole": ({"user": {"id": 1, "features": [1, None]}}, {}, DataError, r"got \[1.0, None\] in line 3 of"),
    "id": ({"user": {"id": 1.5, "features": [1, 2]}}, {}, DataError, r"user.id: expected an integer .* in line 3 of"),
    "large id": ({"user": {"id": 2**70, "features": [1, 2]}}, {}, DataError, r"user.id: .* in line 3 of"),
    "nan": (
        {"item": {"year": float("nan"), "length": 1}},
        {},
        DataError,
        r"item.year: expected finite .* in line 3 of",
    ),
    "prompt": ({"prompt": {"keyword": "sat", "p": 0.5}}, {}, ActionError, r"got 'sat' in line 3 of .*mean 'sad'"),
    "p": ({"prompt": {"keyword": "sad", "p": -0.5}}, {}, PropensityError, r"prompt.p: .* got -0.5 in line 3 of"),
    "surrogate": ('{"response": {"text": "\\ud800"}}', {}, DataError, r"in line 3 of"),
    "no key": (
        {},
        {"reward": "like"},
        DataError,
        r"reward: expected a column 'like', .*log.jsonl \(lines 1 to 5\) has",
    ),
    "no path": ({}, {"reward": "user.reward"}, DataError, r"reward: expected a column 'user.reward'"),
    "unknown": ({}, {"prompts_": "a"}, ConfigError, "unknown column 'prompts_'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_line(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, mapping, error, words = WRONG[case]
    if case == "long":
        monkeypatch.setattr(ours, "LONGEST_LINE", 1500)
    lines = [json.dumps(row).encode() for row in make_rows()]
    # After a blank line, so that lines and rows are not the same.
    third = json.dumps(make_rows()[1] | change) if isinstance(change, dict) else change
    lines[1:2] = [b"  ", third if isinstance(third, bytes) else third.encode()]
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(error, match=words):
        from_json_lines(tmp_path / "log.jsonl", PROMPTS, **NAMES | mapping)


def test_damaged_archives(tmp_path: Path) -> None:
    whole = write(tmp_path / "log.jsonl.gz", make_rows() * 500).read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "no.jsonl.gz").write_bytes(b"{}\n")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    (tmp_path / "flipped.jsonl.gz").write_bytes(flipped)
    for name in ("cut", "no"):
        with pytest.raises(StorageError, match=rf"{name}.jsonl.gz: cannot read after line \d+: "):
            from_json_lines(tmp_path / f"{name}.jsonl.gz", PROMPTS, **NAMES)
    with pytest.raises((StorageError, DataError), match=r"flipped.jsonl.gz"):
        from_json_lines(tmp_path / "flipped.jsonl.gz", PROMPTS, **NAMES)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="expected at least one round"):
        from_json_lines(tmp_path / "empty.jsonl", PROMPTS, **NAMES)


def test_a_failed_export_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text("good\n")

    def full(*args: Any) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ours, "_as_lines", full)
    with pytest.raises(StorageError, match=r"cannot write: .*No space left"):
        to_json_lines(make_log(5), file)
    assert [entry.name for entry in tmp_path.iterdir()] == ["log.jsonl"]
    assert file.read_text() == "good\n"


# ---------------------------------------------------------------------------------------------------------------- CSV


def test_csv_comes_back(tmp_path: Path) -> None:
    log = make_log(20)
    log.to_dataframe().to_csv(tmp_path / "log.csv.gz", index=False)
    back = from_csv(tmp_path / "log.csv.gz", log.prompts, metadata=log.metadata)
    np.testing.assert_allclose(back.propensity, log.propensity, rtol=1e-15)
    object.__setattr__(back, "propensity", log.propensity)
    assert_same(back, log)


def test_a_services_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from offprompts_env.interchange import csv_files

    # So small that types of the first block, here integers and nothing, do not hold for the rest.
    monkeypatch.setattr(csv_files, "_BLOCK", 64)
    rows = [
        "age,p,keyword,liked,said",
        *(["30,,sad,1,NA"] * 8),
        "31.5,0.5,funny,0,\"two\nlines, of 'text'\"",
        "32,1,old,1,",
    ]
    (tmp_path / "log.csv").write_text("\n".join(rows) + "\n")
    names: dict[str, Any] = {"context": "age", "query": None, "output": None, "action": "keyword", "reward": "liked"}
    log = from_csv(tmp_path / "log.csv", **names, propensity="p", sentence="said")
    assert log.prompts.texts == ("funny", "old", "sad")
    np.testing.assert_array_equal(log.context[7:, 0], [30, 31.5, 32])
    np.testing.assert_array_equal(log.propensity[7:], [np.nan, 0.5, 1])
    assert log.sentence is not None
    assert log.sentence[7:].tolist() == ["NA", "two\nlines, of 'text'", ""]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "expected CSV"),
        ("age,action\n1,0\n", "reward: expected a column 'reward', .*log.csv has none"),
        ("age,action,reward\n1,0,1\n2,0\n", "expected CSV with the same types in all rows.*Expected 3 columns, got 2"),
        ("age,action,reward\n1,0,good\n", r"reward: expected a number, got 'good' in row 0 of .*log.csv"),
        ("age,action,reward\n1,0,1\n2,0,\n", r"reward: expected a number, got None in row 1 of .*log.csv"),
        ("age,action,reward\n1,3,1\n", r"action: expected an index in \[0, 3\), got 3 in row 0 of .*log.csv"),
    ],
)
def test_what_is_wrong_with_a_csv_file(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "log.csv").write_text(content)
    with pytest.raises((DataError, ActionError), match=words):
        from_csv(tmp_path / "log.csv", PROMPTS, context="age", query=None, output=None)


def test_csv_agrees_with_data_frames(tmp_path: Path) -> None:
    log = make_log(30, text=False)
    log.to_dataframe().to_csv(tmp_path / "log.csv", index=False)
    frame = LoggedDataset.from_dataframe(pd.read_csv(tmp_path / "log.csv"), log.prompts)
    table = from_csv(tmp_path / "log.csv", log.prompts)
    np.testing.assert_array_equal(frame.context, table.context)
    np.testing.assert_array_equal(frame.reward, table.reward)
