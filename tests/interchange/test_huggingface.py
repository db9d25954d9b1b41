import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from offprompts_env.errors import DataError, MissingDependencyError, PropensityError, StorageError
from offprompts_env.interchange import from_huggingface, from_parquet, to_huggingface
from offprompts_env.types import LoggedDataset, LogMetadata, PromptSet
from tests.test_storage import assert_same, logs, make_log

datasets = pytest.importorskip("datasets")

PROMPTS = PromptSet(np.eye(3), ("funny", "sad", "old"))


@pytest.fixture(autouse=True)
def quiet() -> None:
    datasets.disable_progress_bars()


def make_dataset(**changes: Any) -> Any:
    columns: dict[str, Any] = {
        "user": [
            {"features": [0.5, 1.0], "id": 7},
            {"features": [1.5, 2.0], "id": 8},
            {"features": [2.5, 3.0], "id": 9},
        ],
        "keyword": ["sad", "funny", "sad"],
        "p": [0.5, None, 1.0],
        "liked": [True, False, True],
        "said": ["a", "b", "☃"],
        "unrelated": [[1], [2, 3], None],
    }
    return datasets.Dataset.from_dict(columns | changes)


NAMES: dict[str, Any] = {
    "context": "user.features",
    "query": None,
    "output": None,
    "action": "keyword",
    "propensity": "p",
    "reward": "liked",
    "sentence": "said",
    "user_id": "user.id",
}


@settings(max_examples=40, deadline=None)
@given(log=logs())
def test_any_log_comes_back(log: LoggedDataset) -> None:
    assert_same(from_huggingface(to_huggingface(log)), log)


def test_through_disk_and_memory_map(tmp_path: Path) -> None:
    log = make_log(50)
    to_huggingface(log).save_to_disk(tmp_path / "log", num_shards=3)
    dataset = datasets.load_from_disk(tmp_path / "log")
    assert_same(from_huggingface(dataset), log)
    some = dataset.select([3, 1, 4]).filter(lambda row: True)
    assert_same(from_huggingface(some), log.take([3, 1, 4]))
    stream = dataset.to_iterable_dataset()
    assert_same(from_huggingface(stream, log.prompts, metadata=log.metadata), log)


def test_what_users_of_the_library_see() -> None:
    log = make_log(5)
    dataset = to_huggingface(log)
    assert log.prompts.texts is not None
    assert dataset["prompt"][:] == [log.prompts.texts[action] for action in log.action]
    np.testing.assert_array_equal(dataset.with_format("numpy")["context"][:], log.context)
    assert [value is None for value in dataset["propensity"]] == np.isnan(log.propensity).tolist()


def test_its_parquet_files_lose_the_catalogue_and_say_so(tmp_path: Path) -> None:
    log = make_log(5)
    to_huggingface(log).to_parquet(tmp_path / "log.parquet")
    with pytest.raises(DataError, match="pass prompts= the catalogue"):
        from_parquet(tmp_path / "log.parquet")
    assert_same(from_parquet(tmp_path / "log.parquet", log.prompts, metadata=log.metadata), log)


def test_anybodys_dataset() -> None:
    log = from_huggingface(make_dataset(), PROMPTS, **NAMES, metadata=LogMetadata(notes="mine"))
    np.testing.assert_array_equal(log.context, [[0.5, 1], [1.5, 2], [2.5, 3]])
    np.testing.assert_array_equal(log.action, [1, 0, 1])
    np.testing.assert_array_equal(log.propensity, [0.5, np.nan, 1])
    assert log.user_id is not None
    assert log.user_id.tolist() == [7, 8, 9]
    assert log.metadata.notes == "mine"
    assert from_huggingface(make_dataset(), **NAMES).prompts.texts == ("funny", "sad")

    def generate() -> Any:
        yield from make_dataset(p=[0.5, float("nan"), 1.0], unrelated=[[1], [2], [3]])

    streamed = datasets.IterableDataset.from_generator(generate)
    assert_same(from_huggingface(streamed, PROMPTS, **NAMES, metadata=log.metadata), log)


def test_a_stream_whose_types_change() -> None:
    def generate() -> Any:
        yield from make_dataset()

    # The library guesses types from each row alone, and an empty cell has none.
    with pytest.raises(DataError, match=r"cannot read after row 0: (.|\n)*; make a datasets.Dataset of it first"):
        from_huggingface(datasets.IterableDataset.from_generator(generate), PROMPTS, **NAMES)


def test_class_labels_are_prompts() -> None:
    label = datasets.ClassLabel(names=["sad", "funny", "never"])
    dataset = make_dataset().cast_column("keyword", label)
    log = from_huggingface(dataset, **NAMES)
    assert log.prompts.texts == ("sad", "funny", "never")
    assert log.action.tolist() == [0, 1, 0]


def test_rows_are_counted_after_selection() -> None:
    dataset = make_dataset(p=[0.5, 2.0, 1.0]).select([2, 0, 1])
    with pytest.raises(PropensityError, match=r"p: .* got 2.0 in row 2 of the Hugging Face dataset"):
        from_huggingface(dataset, PROMPTS, **NAMES)


def test_what_is_no_dataset() -> None:
    with pytest.raises(DataError, match="got DatasetDict; choose a split: 'train', 'test'"):
        from_huggingface(datasets.DatasetDict(train=make_dataset(), test=make_dataset()), PROMPTS, **NAMES)
    with pytest.raises(DataError, match=r"expected a datasets.Dataset, got str; read one with datasets.load_from_disk"):
        from_huggingface("somebody/log", PROMPTS, **NAMES)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="reward: expected a column 'like', the Hugging Face dataset has none; did you"):
        from_huggingface(make_dataset(), PROMPTS, **NAMES | {"reward": "like"})
    with pytest.raises(DataError, match="at least one round"):
        from_huggingface(make_dataset().select([]), PROMPTS, **NAMES)


def test_a_newer_version() -> None:
    dataset = to_huggingface(make_log(5))
    dataset.info.description = dataset.info.description.replace('"version": 1', '"version": 2')
    with pytest.raises(StorageError, match="expected format version 1 or older, got 2; upgrade with"):
        from_huggingface(dataset)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'offprompts-env\[datasets\]'"):
        to_huggingface(make_log(5))
