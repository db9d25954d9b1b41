"""Folders of results: what is read, what is left alone, what is set aside."""

import json
import math
import os
import warnings
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import rows
from benchmarks.rows import Result, Results, ResultsWarning, Row, read_rows, rows_bytes
from offprompts_env.errors import StorageError

RESULT = Result(1.5, 0.1, {"uniform": 0.5}, (1, 2), (0.1, 0.2), 3.0, 4.0, 5, {"mse": 0.25}, {"story": ["a", None]}, 6.0)
ROW = Row(
    id="s/n=1/world=0/learner=a", sweep="s", point="n=1", x=1.0, world=0, seed=0, learner="a", score=0.5, key="key",
    config="config", result=RESULT, versions={"torch": "2"}, commit="c", device="cpu",
    finished="2026-01-01T00:00:00.000000+00:00",
)  # fmt: skip


def written(out: Path, *rows: Row) -> Path:
    with Results(out) as results:
        results.append(rows)
    return sorted((out / "rows").glob("*.parquet"))[-1]


def other_version(file: Path, version: int) -> bytes:
    table = pq.read_table(file)
    place = table.schema.get_field_index("format_version")
    file.unlink()
    pq.write_table(table.set_column(place, "format_version", pa.array([version] * len(table), pa.int32())), file)
    return file.read_bytes()


def test_a_row_comes_back_as_it_was(tmp_path: Path) -> None:
    written(tmp_path, ROW)
    assert read_rows(tmp_path) == [ROW]
    assert read_rows(tmp_path / "nowhere") == []


def test_a_file_from_before_a_column_came_is_read(tmp_path: Path) -> None:
    file = written(tmp_path, ROW)
    pq.write_table(pq.read_table(file).drop_columns(["wall_seconds"]), file)
    (row,) = read_rows(tmp_path)
    assert math.isnan(row.result.wall_seconds)
    assert replace(row, result=replace(row.result, wall_seconds=6.0)) == ROW


def test_a_run_counts_once_and_the_newest_is_it(tmp_path: Path) -> None:
    newer, older = replace(ROW, score=0.7, finished="2026-02"), replace(ROW, score=0.1, finished="2025")
    written(tmp_path, newer)
    written(tmp_path, older)
    written(tmp_path, ROW)
    assert read_rows(tmp_path) == [newer]
    with Results(tmp_path) as results:
        results.merge()
    assert read_rows(tmp_path) == [newer]
    assert len(list((tmp_path / "rows").glob("*.parquet"))) == 1


def test_a_merge_while_reading_hides_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(ROW, id="other")
    written(tmp_path, ROW)
    written(tmp_path, other)
    listed = rows._files

    def stale(root: Path) -> list[Path]:
        found = listed(root)
        monkeypatch.setattr(rows, "_files", listed)
        with Results(root) as results:
            results.merge()
        return found

    monkeypatch.setattr(rows, "_files", stale)
    assert {row.id for row in read_rows(tmp_path)} == {ROW.id, "other"}


def test_a_link_to_nowhere_is_no_row(tmp_path: Path) -> None:
    written(tmp_path, ROW)
    (tmp_path / "rows" / "000009.parquet").symlink_to(tmp_path / "nowhere")
    assert read_rows(tmp_path) == [ROW]


@pytest.mark.parametrize("version", [0, 2])
def test_rows_of_other_formats_are_left_alone(tmp_path: Path, version: int) -> None:
    file = written(tmp_path, ROW)
    content = other_version(file, version)
    second = replace(ROW, id="other")
    with pytest.warns(ResultsWarning, match=f"1 rows have format version {version}, this package reads 1"):
        assert read_rows(tmp_path) == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResultsWarning)
        written(tmp_path, second)
        written(tmp_path, replace(ROW, id="third"))
        with Results(tmp_path) as results:
            results.merge()
        assert {row.id for row in read_rows(tmp_path)} == {"other", "third"}
    assert file.read_bytes() == content


def garbage_column(file: Path) -> None:
    table = pq.read_table(file).drop_columns(["references"])
    file.unlink()
    pq.write_table(table, file)


def broken_json(file: Path) -> None:
    table = pq.read_table(file)
    place = table.schema.get_field_index("details")
    file.unlink()
    pq.write_table(table.set_column(place, "details", pa.array(["{"])), file)


DAMAGES = {
    "text": lambda file: file.write_text("not Parquet at all"),
    "empty": lambda file: file.write_bytes(b""),
    "head alone": lambda file: file.write_bytes(file.read_bytes()[:300]),
    "a hole": lambda file: file.write_bytes(file.read_bytes()[:-200] + bytes(192) + file.read_bytes()[-8:]),
    "a column less": garbage_column,
    "broken JSON": broken_json,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_said_by_readers_and_set_aside_by_the_writer(tmp_path: Path, damage: str) -> None:
    file = written(tmp_path, ROW)
    DAMAGES[damage](file)
    content = file.read_bytes()
    with pytest.warns(ResultsWarning, match="cannot be read"):
        assert read_rows(tmp_path) == []
    assert file.exists()
    with pytest.warns(ResultsWarning, match="It was moved to"):
        written(tmp_path, ROW)
    assert [aside.read_bytes() for aside in (tmp_path / "damaged").iterdir()] == [content]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_rows(tmp_path) == [ROW]


def test_what_cannot_be_reached_is_not_taken_for_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, ROW)

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(pq, "read_table", refused)
        with Results(tmp_path) as results:
            results.merge()
    assert file.exists()
    assert read_rows(tmp_path) == [ROW]


def test_other_files_are_nobodys_business(tmp_path: Path) -> None:
    written(tmp_path, ROW)
    (tmp_path / "rows" / "notes.txt").write_text("mine")
    (tmp_path / "rows" / ".000009.parquet.tmp").write_bytes(b"what a killed writer left")
    with Results(tmp_path) as results, warnings.catch_warnings():
        warnings.simplefilter("error")
        results.merge()
        assert read_rows(tmp_path) == [ROW]
    assert (tmp_path / "rows" / "notes.txt").read_text() == "mine"


def test_a_merge_that_cannot_be_written_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = replace(ROW, id="other")
    written(tmp_path, ROW)
    written(tmp_path, second)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with Results(tmp_path) as results, pytest.raises(StorageError, match="rows written so far are kept"):
        results.merge()
    assert read_rows(tmp_path) == [ROW, second]


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with Results(tmp_path), pytest.raises(StorageError, match="choose another folder with --out"):
        Results(tmp_path)
    Results(tmp_path).__exit__(None, None, None)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="expected a folder that can be written"):
        Results(tmp_path / "out")
    tmp_path.chmod(0o700)


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(StorageError, match="expected a folder that can be written"):
        Results(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_the_same_rows_are_the_same_bytes() -> None:
    assert rows_bytes([ROW]) == rows_bytes([replace(ROW)])
    assert Result.from_json(json.loads(json.dumps(RESULT.to_json()))) == RESULT
