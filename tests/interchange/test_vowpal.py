import errno
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from offprompts_env.errors import (
    ActionError,
    ConfigError,
    DataError,
    DimensionError,
    OffPromptsError,
    PropensityError,
    StorageError,
)
from offprompts_env.interchange import vowpal, vowpal_lines
from offprompts_env.interchange.vowpal import from_vowpal, from_vowpal_adf, to_vowpal, to_vowpal_adf
from offprompts_env.types import LoggedDataset, LogMetadata, PromptSet
from tests.test_storage import assert_same, logs, make_log

pytestmark = pytest.mark.filterwarnings("ignore:the cb(_adf)? format of Vowpal Wabbit cannot hold")


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def known(log: LoggedDataset) -> LoggedDataset:
    return replace(log, propensity=np.where(np.isnan(log.propensity), 0.5, log.propensity))


def held(log: LoggedDataset, *, texts: bool = True) -> LoggedDataset:
    """What the format can hold of a log; the prompts' texts come from the caller."""
    names = ("sentence", "user_id", "item_id", "query_text", "oracle")
    log = replace(log, output=np.empty((len(log), 0)), metadata=LogMetadata(), **dict.fromkeys(names))
    return log if texts else replace(log, prompts=PromptSet(log.prompts.embeddings))


# ------------------------------------------------------------------------------------------------------- round trips


def test_the_text_itself(tmp_path: Path) -> None:
    log = LoggedDataset(
        context=[[1.5, -2], [0.1, 1e-7]],
        query=[[3], [1e20]],
        action=[1, 0],
        propensity=[0.25, 1 / 3],
        reward=[0.5, -1],
        output=np.empty((2, 0)),
        prompts=PromptSet([[1, 0], [0, 1]]),
    )
    assert to_vowpal(log, tmp_path / "cb.txt").read_text() == (
        "2:-0.5:0.25 |c c0:1.5 c1:-2 |q q0:3\n1:1:0.3333333333333333 |c c0:0.1 c1:1e-7 |q q0:1e+20\n"
    )
    assert to_vowpal_adf(log, tmp_path / "adf.txt").read_text() == (
        "shared |c c0:1.5 c1:-2 |q q0:3\n|e e0:1 e1:0\n2:-0.5:0.25 |e e0:0 e1:1\n\n"
        "shared |c c0:0.1 c1:1e-7 |q q0:1e+20\n1:1:0.3333333333333333 |e e0:1 e1:0\n|e e0:0 e1:1\n\n"
    )
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adf.txt", "cb.txt"]


@pytest.mark.parametrize("dims", [(3, 2, 4), (3, 0, 0), (0, 2, 0), (0, 0, 0)])
@pytest.mark.parametrize("at_once", [7, 1 << 20])
def test_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dims: Any, at_once: int) -> None:
    monkeypatch.setattr(vowpal, "_NUMBERS", at_once)
    monkeypatch.setattr(vowpal, "_BYTES", 10 * at_once)
    log = known(make_log(60, dims=dims))
    assert_same(from_vowpal(to_vowpal(log, tmp_path / "cb"), log.prompts), held(log))
    path = to_vowpal_adf(log, tmp_path / "adf")
    assert_same(from_vowpal_adf(path, log.prompts), held(log))
    assert_same(from_vowpal_adf(path, metadata=log.metadata), replace(held(log, texts=False), metadata=log.metadata))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(log=logs())
def test_any_log_comes_back(tmp_path: Path, log: LoggedDataset) -> None:
    log = known(log)
    assert_same(from_vowpal(to_vowpal(log, tmp_path / "cb"), log.prompts), held(log))
    if log.n_prompts < 200:
        assert_same(from_vowpal_adf(to_vowpal_adf(log, tmp_path / "adf"), log.prompts), held(log))


def test_every_float_comes_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(2**32, size=30_000, dtype=np.uint32).view(np.float32)
    tiny, most = np.finfo(np.float32).tiny, np.finfo(np.float32).max
    edges = np.array([0, -0.0, 1e-45, tiny, most, -most, 1 / 3], np.float32)
    values = np.concatenate([edges, values[np.isfinite(values)]])
    values = values[: len(values) // 2 * 2].reshape(-1, 2)
    log = known(make_log(len(values), text=False, dims=(0, 0, 0)))
    log = replace(log, context=values, reward=values[:, 1])
    back = from_vowpal(to_vowpal(log, tmp_path / "cb"), log.prompts)
    np.testing.assert_array_equal(back.context.view(np.uint32), log.context.view(np.uint32))
    np.testing.assert_array_equal(back.reward.view(np.uint32), log.reward.view(np.uint32))
    np.testing.assert_array_equal(back.propensity, log.propensity)


def test_both_ways_of_reading_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = known(make_log(40))
    path = to_vowpal(log, tmp_path / "cb")
    monkeypatch.setattr(vowpal_lines, "_parse_each", lambda *_: pytest.fail("expected the lines to be read as a table"))
    assert_same(from_vowpal(path, log.prompts), held(log))
    monkeypatch.undo()
    monkeypatch.setattr(vowpal_lines, "_parse_alike", lambda *_: None)
    assert_same(from_vowpal(path, log.prompts), held(log))


def test_text_from_data_is_no_syntax(tmp_path: Path) -> None:
    evil = "x |c 0:9\n1:-9:1 |c 0:9\n\nshared |c 0:9"
    log = known(make_log(6))
    log = replace(
        log,
        sentence=np.array([evil] * 6, dtype=object),
        query_text=np.array([evil] * 6, dtype=object),
        prompts=PromptSet(log.prompts.embeddings, (evil,) * 7),
        metadata=LogMetadata(notes=evil),
    )
    for write in (to_vowpal, to_vowpal_adf):
        text = write(log, tmp_path / "file").read_text()
        assert set(text.replace("shared", "")) <= set("0123456789+-.e:|cq \n")
        assert "0:9\n" not in text
    assert len(from_vowpal_adf(tmp_path / "file")) == 6


def test_what_is_dropped_is_said_once(tmp_path: Path) -> None:
    log = known(make_log(6))
    with pytest.warns(UserWarning, match="the cb format of Vowpal Wabbit cannot hold") as caught:
        to_vowpal(log, tmp_path / "cb")
    assert len(caught) == 1
    for words in ("output embeddings", "sentences", "user ids", "expected rewards", "prompt embeddings", "provenance"):
        assert words in str(caught[0].message)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="cannot hold prompt texts: dropped"):
        to_vowpal_adf(replace(held(log), query=log.query), tmp_path / "adf")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_vowpal_adf(held(log, texts=False), tmp_path / "adf")


def test_names_with_and_without_their_namespace(tmp_path: Path) -> None:
    file = tmp_path / "cb.txt"
    for text in ("1:2:0.5 |c c1:3 |q 0:4\n" * 2, "1:2:0.5 |c c1:3 |q 0:4\n1:2:0.5 |c 1:3 |q q0:4\n"):
        file.write_text(text)
        log = from_vowpal(file, PromptSet(np.eye(2)))
        np.testing.assert_array_equal(log.context, [[0, 3]] * 2)
        np.testing.assert_array_equal(log.query, [[4]] * 2)


# ------------------------------------------------------------------------------------------------- files from elsewhere


def test_a_file_from_elsewhere(tmp_path: Path) -> None:
    file = tmp_path / "cb.txt"
    file.write_bytes(b"1:2:0.4 'first| 0:0.5 3\r\n\r\n3:0:.25 | 1:-1e1 1:2 |item 1:7\n  2:-1 |item |\n4:1:1|  2:5")
    log = from_vowpal(file, PromptSet(np.eye(4)), context="", query="item")
    np.testing.assert_array_equal(log.context, [[0.5, 0, 0, 1], [0, -8, 0, 0], [0, 0, 0, 0], [0, 0, 5, 0]])
    np.testing.assert_array_equal(log.query, [[0, 0], [0, 7], [0, 0], [0, 0]])
    np.testing.assert_array_equal(log.action, [0, 2, 1, 3])
    np.testing.assert_array_equal(log.propensity, [0.4, 0.25, np.nan, 1])
    np.testing.assert_array_equal(log.reward, [-2, 0, 1, -1])


def test_rounds_from_elsewhere(tmp_path: Path) -> None:
    file = tmp_path / "adf.txt"
    first = "shared | 0:1\n|a 0:1 2\n0:2:0.5 |a 1:3\n|a 0:4"
    file.write_bytes(f"\n{first}\n\n\n{first.replace('0:2:0.5 ', '').replace('|a 0:4', '9:-1:0.25 |a 0:4')}".encode())
    log = from_vowpal_adf(file, context="", embedding="a")
    np.testing.assert_array_equal(log.prompts.embeddings, [[1, 0, 1], [0, 3, 0], [4, 0, 0]])
    np.testing.assert_array_equal(log.action, [1, 2])
    np.testing.assert_array_equal(log.reward, [-2, 1])
    np.testing.assert_array_equal(log.propensity, [0.5, 0.25])
    # Features that are 0 need not be there.
    given_prompts = PromptSet(np.pad(log.prompts.embeddings, ((0, 0), (0, 1))), ("a", "b", "c"))
    assert from_vowpal_adf(file, given_prompts, context="", embedding="a").prompts is given_prompts


# ----------------------------------------------------------------------------------------------------- the real library


def world(n: int = 3000) -> LoggedDataset:
    """A user likes the prompt that is nearest to the first context: prompt 0, 1 or 2 for -1, 0 or 1."""
    rng = np.random.default_rng(5)
    kind, action = rng.integers(3, size=n), rng.integers(3, size=n)
    return LoggedDataset(
        context=np.eye(3)[kind],
        query=rng.normal(size=(n, 1)),
        action=action,
        propensity=np.full(n, 1 / 3),
        reward=(kind == action).astype(float),
        output=np.empty((n, 0)),
        prompts=PromptSet(np.eye(3)),
    )


def test_vowpal_wabbit_learns_from_the_file(tmp_path: Path) -> None:
    vw = pytest.importorskip("vowpalwabbit")
    path = to_vowpal(world(), tmp_path / "cb.txt")
    workspace = vw.Workspace(f"--cb_explore 3 --epsilon 0.1 -d {path} --quiet")
    # Uniform costs -1/3 a round, the best policy with ε = 0.1 less than -0.9.
    loss = workspace.get_sum_loss() / workspace.get_weighted_examples()
    assert workspace.get_weighted_examples() == 3000
    assert loss < -0.8
    for kind in range(3):
        pmf = workspace.predict(f"|c {' '.join(f'c{i}:{float(i == kind)}' for i in range(3))} |q q0:0")
        assert int(np.argmax(pmf)) == kind
        assert sum(pmf) == pytest.approx(1, abs=1e-5)
    workspace.finish()


def test_vowpal_wabbit_learns_line_by_line(tmp_path: Path) -> None:
    vw = pytest.importorskip("vowpalwabbit")
    log = world(300)
    workspace = vw.Workspace("--cb_explore 3 --quiet")
    with to_vowpal(log, tmp_path / "cb.txt").open() as file:
        for row, line in enumerate(file):
            example = workspace.parse(line)
            label = vw.CBLabel.from_example(example).costs[0]
            assert label.action == log.action[row] + 1
            assert label.cost == -log.reward[row]
            assert label.probability == pytest.approx(1 / 3)
            workspace.learn(example)
            workspace.finish_example(example)
    assert workspace.get_weighted_examples() == 300
    workspace.finish()


def test_vowpal_wabbit_learns_from_rounds_of_several_lines(tmp_path: Path) -> None:
    vw = pytest.importorskip("vowpalwabbit")
    path = to_vowpal_adf(world(), tmp_path / "adf.txt")
    workspace = vw.Workspace(f"--cb_explore_adf --epsilon 0.1 -q ce -d {path} --quiet")
    assert workspace.get_weighted_examples() == 3000
    assert workspace.get_sum_loss() / workspace.get_weighted_examples() < -0.7
    actions = [f"|e {' '.join(f'e{i}:{float(i == a)}' for i in range(3))}" for a in range(3)]
    for kind in range(3):
        shared = f"shared |c {' '.join(f'c{i}:{float(i == kind)}' for i in range(3))} |q q0:0"
        assert int(np.argmax(workspace.predict([shared, *actions]))) == kind
    workspace.finish()


# ------------------------------------------------------------------------------------------------------- wrong input

GOOD = "1:0.5:0.25 |c 0:1 1:2 |q 0:3"
PROMPTS = PromptSet(np.eye(3))
LINES: dict[str, tuple[str, type[OffPromptsError], str]] = {
    "no features": ("1:0.5:0.25", DataError, "expected features after"),
    "no label": ("|c 0:1 1:2 |q 0:3", DataError, "expected one label action:cost:probability, got ''"),
    "two labels": ("1:0.5:0.25 2:1:0.5 |c 0:1", DataError, "expected one label"),
    "action only": ("1 |c 0:1 1:2 |q 0:3", DataError, "expected one label"),
    "four fields": ("1:2:0.5:7 |c 0:1 1:2 |q 0:3", DataError, "expected one label"),
    "word": ("one:0.5:0.25 |c 0:1 1:2 |q 0:3", DataError, "expected one label .* got 'one:0.5:0.25 '"),
    "negative": ("-1:0.5:0.25 |c 0:1 1:2 |q 0:3", OffPromptsError, "expected one label|from 1 to 3, got -1"),
    "huge action": ("9" * 5000 + ":0.5:0.25 |c 0:1 1:2 |q 0:3", DataError, "expected one label"),
    "half action": ("1.5:0.5:0.25 |c 0:1 1:2 |q 0:3", DataError, "expected one label"),
    "zero": ("0:0.5:0.25 |c 0:1 1:2 |q 0:3", ActionError, "action: expected a number from 1 to 3, got 0"),
    "too many": ("4:0.5:0.25 |c 0:1 1:2 |q 0:3", ActionError, "from 1 to 3, got 4; pass the prompts"),
    "probability 0": ("1:0.5:0 |c 0:1 1:2 |q 0:3", PropensityError, r"expected one in \(0, 1\], got 0.0; leave it out"),
    "probability 2": ("1:0.5:2 |c 0:1 1:2 |q 0:3", PropensityError, "got 2.0"),
    "nan": ("1:0.5:nan |c 0:1 1:2 |q 0:3", DataError, "expected a finite number, got 'nan'"),
    "empty cost": ("1::0.25 |c 0:1 1:2 |q 0:3", DataError, "expected a finite number, got ''"),
    "infinite cost": ("1:inf:0.25 |c 0:1 1:2 |q 0:3", DataError, "expected a finite number, got 'inf'"),
    "endless": ("1:0.5:0.25 |c 0:1 1:1e39 |q 0:3", DataError, "expected a finite number, got '1e39'"),
    "underscore": ("1:0.5:0.25 |c 0:1 1:1_0 |q 0:3", DataError, "expected a finite number, got '1_0'"),
    "hexadecimal": ("1:0.5:0.25 |c 0:1 1:0x10 |q 0:3", DataError, "expected a finite number, got '0x10'"),
    "no value": ("1:0.5:0.25 |c 0:1 1: |q 0:3", DataError, "expected a finite number, got ''"),
    "name": ("1:0.5:0.25 |c age:1 |q 0:3", DataError, "expected features named by an index .* got 'age:1'"),
    "prefix": ("1:0.5:0.25 |c 0:1 1:2 |q c0:3", DataError, "as in 'q0:1.5', got 'c0:3'"),
    "string": ("1:0.5:0.25 |c 0=red |q 0:3", DataError, "expected features named by an index"),
    "hashed": ("1:0.5:0.25 |c 4000000000:1", DataError, "an index below 65536"),
    "namespace": ("1:0.5:0.25 |c 0:1 1:2 |x 0:3", DataError, r"namespace 'c' or 'q' \(pass the names of yours\)"),
    "scaled": ("1:0.5:0.25 |c:2 0:1 1:2 |q 0:3", DataError, r"namespace 'c' or 'q'.* got '\|c:2 0:1 1:2 '"),
    "binary": ("1:0.5:0.25 |c 0:1 1:\x00\xff |q 0:3", DataError, "expected a finite number"),
    "swapped marks": ("1 0.5:0.25 |c 0:1 1:2 |q 0:3", DataError, "expected one label"),
}


@pytest.mark.parametrize("case", LINES)
@pytest.mark.parametrize("alone", [False, True], ids=["third of four", "alone"])
def test_what_is_wrong_with_a_line(tmp_path: Path, case: str, alone: bool) -> None:
    line, error, words = LINES[case]
    file = tmp_path / "cb.txt"
    file.write_bytes("\n".join([line] if alone else [GOOD, GOOD, line, GOOD]).encode("latin-1"))
    with pytest.raises(error, match=words) as caught:
        from_vowpal(file, PROMPTS)
    assert str(caught.value).startswith(f"{file}:{1 if alone else 3}: ")


SHARED, OTHER, CHOSEN = "shared |c 0:1\n", "|e 0:1 1:0\n", "2:0.5:0.25 |e 0:0 1:1\n"
ROUNDS: dict[str, tuple[str, int, type[OffPromptsError], str]] = {
    "not shared": (OTHER + CHOSEN, 5, DataError, "expected a round to begin with 'shared |'"),
    "no label": (SHARED + OTHER + "|e 0:0 1:1\n", 5, DataError, "expected a label action:cost:probability"),
    "nothing else": (SHARED, 5, DataError, "expected a label"),
    "two labels": (SHARED + "1:1:0.5 " + OTHER + CHOSEN, 7, DataError, "expected one label a round"),
    "other features": (SHARED + OTHER + CHOSEN.replace("1:1", "1:2"), 7, DataError, "and '.e 0:0 1:1' as in the first"),
    "fewer actions": (SHARED + CHOSEN, 5, DataError, "expected 2 actions as in the first round, got 1"),
    "label alone": (SHARED + OTHER + "2:0.5:0.25\n", 7, DataError, "expected features"),
    "half a label": (SHARED + OTHER + CHOSEN.replace("2:0.5:0.25", "2"), 5, DataError, "expected a finite number"),
    "probability": (SHARED + OTHER + CHOSEN.replace("0.25", "7"), 5, PropensityError, "got 7.0"),
    "shared name": (SHARED.replace("0:", "a:") + OTHER + CHOSEN, 5, DataError, "named by an index"),
}


@pytest.mark.parametrize("case", ROUNDS)
def test_what_is_wrong_with_a_round(tmp_path: Path, case: str) -> None:
    text, line, error, words = ROUNDS[case]
    file = tmp_path / "adf.txt"
    file.write_text(f"{SHARED}{OTHER}{CHOSEN}\n{text}\n{SHARED}{OTHER}{CHOSEN}\n")
    with pytest.raises(error, match=words) as caught:
        from_vowpal_adf(file)
    assert str(caught.value).startswith(f"{file}:{line}: ")


def test_wrong_features_of_actions(tmp_path: Path) -> None:
    file = tmp_path / "adf.txt"
    file.write_text(f"{SHARED}{OTHER}{CHOSEN}\n")
    with pytest.raises(DataError, match=rf"{file}:2: expected features in namespace 'a'"):
        from_vowpal_adf(file, embedding="a")
    file.write_text(f"{SHARED}{OTHER}{CHOSEN.replace('1:1', 'b:1')}\n")
    with pytest.raises(DataError, match=rf"{file}:3: expected features named by an index"):
        from_vowpal_adf(file)


CALLS: dict[str, tuple[Callable[[Path], object], type[OffPromptsError], str]] = {
    "missing": (lambda p: from_vowpal(p / "none", PROMPTS), StorageError, "none: cannot read"),
    "missing rounds": (lambda p: from_vowpal_adf(p / "none"), StorageError, "none: cannot read"),
    "empty": (lambda p: from_vowpal(p / "empty", PROMPTS), DataError, "expected at least one round, got none"),
    "empty rounds": (lambda p: from_vowpal_adf(p / "empty"), DataError, "expected at least one round, got none"),
    "name": (lambda p: from_vowpal(p / "adf", PROMPTS, context="a b"), ConfigError, "namespace: .* got 'a b'"),
    "twice": (lambda p: from_vowpal(p / "adf", PROMPTS, query="c"), ConfigError, "got 'c' twice"),
    "other prompts": (lambda p: from_vowpal_adf(p / "adf", PROMPTS), DimensionError, "the 3 prompts given"),
    "order": (lambda p: from_vowpal_adf(p / "adf", PromptSet(np.eye(2)[::-1])), DimensionError, "in the file's order"),
    "unknown": (lambda p: to_vowpal(make_log(5), p / "x"), PropensityError, "Vowpal Wabbit needs .* in 2 of 5 rows"),
    "unknown rounds": (lambda p: to_vowpal_adf(make_log(5), p / "x"), PropensityError, "unknown .NaN. in 2 of 5 rows"),
    "no directory": (lambda p: to_vowpal(known(make_log(5)), p / "x" / "y"), StorageError, "y: cannot write"),
}


@pytest.mark.parametrize("case", CALLS)
def test_what_is_wrong_with_a_call(tmp_path: Path, case: str) -> None:
    call, error, words = CALLS[case]
    (tmp_path / "empty").write_text("\n\n\n")
    (tmp_path / "adf").write_text(f"{SHARED}{OTHER}{CHOSEN}\n")
    with pytest.raises(error, match=words):
        call(tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == {"empty", "adf"}


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, file = known(make_log(5)), tmp_path / "cb.txt"
    file.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot write: .*No space left"):
        to_vowpal(log, file)
    assert [entry.name for entry in tmp_path.iterdir()] == ["cb.txt"]
    assert file.read_text() == "old"
