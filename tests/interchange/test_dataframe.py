import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings

from offprompts_env.errors import ActionError, ConfigError, DataError, DimensionError, PropensityError
from offprompts_env.interchange import from_dataframe
from offprompts_env.types import LoggedDataset, LogMetadata, PromptSet
from tests.test_storage import assert_same, logs, make_log

PROMPTS = PromptSet(np.eye(3), ("funny", "sad", "old"))


def make_frame() -> pd.DataFrame:
    """As a user might have it: own names, list cells, prompt texts, an index that starts elsewhere."""
    return pd.DataFrame(
        {
            "taste": [[0.5, 1.0], [1.5, 2.0], [2.5, 3.0], [3.5, 4.0]],
            "year": [1990, 1991, 1992, 1993],
            "length": [90.5, 91.5, 92.5, 93.5],
            "keyword": ["sad", "funny", "sad", "old"],
            "p": [0.5, None, 0.25, 1.0],
            "liked": [True, False, True, True],
            "vector_0": [0.0, 1.0, 2.0, 3.0],
            "vector_1": [4.0, 5.0, 6.0, 7.0],
            "said": ["a", "b", "", "☃"],
            "who": pd.array([7, 8, 9, 7], dtype="Int64"),
        },
        index=[10, 11, 12, 13],
    )


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


def test_a_users_frame() -> None:
    log = LoggedDataset.from_dataframe(make_frame(), PROMPTS, **NAMES, metadata=LogMetadata(notes="mine"))
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


def test_least_that_is_needed() -> None:
    frame = pd.DataFrame({"context_0": [1.0, 2.0], "action": [0, 1], "reward": [0.5, 1.5]})
    log = from_dataframe(frame, ["a", "b"], embeddings=[[0.0], [1.0]], query=None, output=None)
    assert np.isnan(log.propensity).all()
    assert (log.query.shape, log.output.shape) == ((2, 0), (2, 0))
    one = from_dataframe(frame, ["a", "b"], embeddings=[[0.0], [1.0]], query="reward", output=["context_0", "reward"])
    np.testing.assert_array_equal(one.query, [[0.5], [1.5]])
    np.testing.assert_array_equal(one.output, [[1, 0.5], [2, 1.5]])
    assert log.prompts.texts == ("a", "b")


@settings(max_examples=60, deadline=None)
@given(log=logs())
def test_any_log_comes_back(log: LoggedDataset) -> None:
    names = {name: None for name in ("query", "output") if getattr(log, name).shape[1] == 0}
    if log.context.shape[1] == 0:
        names["context"] = []
    frame = log.to_dataframe()
    assert len(frame) == len(log)
    assert_same(LoggedDataset.from_dataframe(frame, log.prompts, metadata=log.metadata, **names), log)


def test_through_a_csv_file(tmp_path: Path) -> None:
    log = make_log(20, text=False)
    log.to_dataframe().to_csv(tmp_path / "log.csv", index=False)
    back = LoggedDataset.from_dataframe(pd.read_csv(tmp_path / "log.csv"), log.prompts, metadata=log.metadata)
    assert_same(replace(back, propensity=log.propensity), log)
    np.testing.assert_allclose(back.propensity, log.propensity, rtol=1e-15)


def test_the_frame_shows_prompt_and_oracle() -> None:
    log = make_log(20)
    frame = log.to_dataframe()
    assert log.prompts.texts is not None
    assert frame["prompt"].tolist() == [log.prompts.texts[action] for action in log.action]
    assert log.oracle is not None
    np.testing.assert_array_equal(frame["expected_reward"], log.oracle.expected_reward)


def cell(column: str, value: Any, row: int = 2) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def change(frame: pd.DataFrame) -> pd.DataFrame:
        frame = frame.astype({column: object})
        frame.iat[row, frame.columns.get_loc(column)] = value
        return frame

    return change


def names(**changes: Any) -> dict[str, Any]:
    return NAMES | changes


WRONG: dict[str, tuple[Callable[[pd.DataFrame], pd.DataFrame], dict[str, Any], type[Exception], str]] = {
    "missing": (lambda f: f.drop(columns="taste"), NAMES, DataError, "context: expected a column 'taste' of lists"),
    "near": (lambda f: f, names(reward="like"), DataError, "reward: expected a column 'like'.*did you mean 'liked'"),
    "no query": (lambda f: f, names(query="query"), DataError, "or query=None if the log has none"),
    "twice": (lambda f: f.rename(columns={"year": "liked"}), names(query="length"), DataError, "has 2 of that name"),
    "gap": (lambda f: f.rename(columns={"vector_1": "vector_2"}), NAMES, DataError, "vector_1 is missing"),
    "short list": (cell("taste", [1.0]), NAMES, DataError, "taste: expected 2 numbers as in row 0, got 1 in row 2"),
    "no list": (cell("taste", 3.0), NAMES, DataError, "taste: expected a list of numbers, got 3.0 in row 2"),
    "text list": (cell("taste", "[1, 2]"), NAMES, DataError, r"taste: expected a list of numbers, got '\[1, 2\]'"),
    "words": (cell("taste", ["a", "b"]), NAMES, DataError, "taste: expected a list of numbers, got .* in row 2"),
    "nan in list": (cell("taste", [1.0, np.nan]), NAMES, DataError, "context: expected finite .* in row 2"),
    "nan": (cell("length", None), NAMES, DataError, "length: expected a number, got None in row 2"),
    "unit": (cell("length", "92 min"), NAMES, DataError, "length: expected a number, got '92 min' in row 2"),
    "prompt": (cell("keyword", "funy"), NAMES, ActionError, "got 'funy' in row 2; did you mean 'funny'"),
    "new prompt": (cell("keyword", "zzz"), NAMES, ActionError, "got 'zzz' in row 2; add it to the prompts"),
    "no prompt": (cell("keyword", None), NAMES, DataError, "keyword: expected text, got None in row 2"),
    "index": (lambda f: f.assign(keyword=[0, 1, 2, 3]), NAMES, ActionError, r"index in \[0, 3\), got 3 in row 3"),
    "half": (
        lambda f: f.assign(keyword=[0, 1, 1.5, 0]),
        NAMES,
        DataError,
        "keyword: expected an integer, got 1.5 in row 2",
    ),
    "endless": (
        lambda f: f.assign(keyword=[0, 1, np.inf, 0]),
        NAMES,
        DataError,
        "expected an integer, got inf in row 2",
    ),
    "p": (cell("p", 1.5), NAMES, PropensityError, "propensity: expected a probability .* got 1.5 in row 2"),
    "p zero": (cell("p", 0), NAMES, PropensityError, "got 0.0 in row 2"),
    "p text": (cell("p", "half"), NAMES, DataError, "p: expected a number, got 'half' in row 2"),
    "no reward": (cell("liked", np.nan), NAMES, DataError, "liked: expected a number, got nan in row 2"),
    "endless reward": (
        cell("liked", np.inf),
        NAMES,
        DataError,
        "reward: expected finite numbers, got .*inf.* in row 2",
    ),
    "no sentence": (cell("said", np.nan), NAMES, DataError, "said: expected text, got nan in row 2; fill empty cells"),
    "no id": (cell("who", None), NAMES, DataError, "who: expected a number, got None in row 2"),
    "large id": (
        lambda f: f.assign(who=np.array([1, 2, 2**64 - 1, 3], dtype=np.uint64)),
        NAMES,
        DataError,
        "who: expected an integer of 64 bits, got 18446744073709551615 in row 2",
    ),
    "rounded id": (
        lambda f: f.assign(who=[1, 2, 1e300, 3]),
        NAMES,
        DataError,
        "expected an integer, got 1e.300 in row 2",
    ),
    "half id": (cell("who", 7.5), NAMES, DataError, "who: expected an integer, got 7.5 in row 2"),
    "no oracle": (
        lambda f: f,
        names(expected_reward="oracle"),
        DataError,
        "expected_reward: expected a column 'oracle'",
    ),
    "empty": (lambda f: f.iloc[:0], NAMES, DataError, "expected at least one round"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_frame(case: str) -> None:
    change, mapping, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        from_dataframe(change(make_frame()), PROMPTS, **mapping)


def test_wrong_prompts() -> None:
    frame = make_frame()
    with pytest.raises(DataError, match="expected an embedding for each of the 3 prompt texts, got none"):
        from_dataframe(frame, ["funny", "sad", "old"], **NAMES)
    with pytest.raises(DimensionError, match="expected 2 texts, one an embedding, got 3"):
        from_dataframe(frame, ["funny", "sad", "old"], embeddings=np.eye(2), **NAMES)
    with pytest.raises(ConfigError, match="expected non-blank text"):
        from_dataframe(frame, ["funny", " ", "old"], embeddings=np.eye(3), **NAMES)
    with pytest.raises(DataError, match="expected none beside a PromptSet"):
        from_dataframe(frame, PROMPTS, embeddings=np.eye(3), **NAMES)
    with pytest.raises(DataError, match="as the prompts have no texts, got text"):
        from_dataframe(frame, PromptSet(np.eye(3)), **NAMES)
    with pytest.raises(DataError, match="expected distinct prompt texts, but 'sad' is there twice"):
        from_dataframe(frame, PromptSet(np.eye(4), ("funny", "sad", "sad", "old")), **NAMES)


def test_integers_stay_exact() -> None:
    log = replace(make_log(3), item_id=np.array([2**62 + 1, -(2**63), 2**63 - 1]))
    back = LoggedDataset.from_dataframe(log.to_dataframe(), log.prompts)
    assert back.item_id is not None
    np.testing.assert_array_equal(back.item_id, [2**62 + 1, -(2**63), 2**63 - 1])


def test_pandas_is_loaded_on_demand() -> None:
    import subprocess

    code = "import sys, offprompts_env.interchange, offprompts_env.collecting; print('pandas' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
