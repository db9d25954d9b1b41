from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import offprompts_env as op
from offprompts_env.errors import ConfigError, StorageError
from offprompts_env.storage import save
from offprompts_env.streaming import WINDOW_BYTES, LogStream
from offprompts_env.synthetic import SyntheticConfig
from offprompts_env.types import LoggedDataset


class Uniform:
    n_prompts = 6

    def probabilities(self, contexts):
        return np.full((len(contexts), 6), 1 / 6)


@pytest.fixture(scope="module")
def log() -> LoggedDataset:
    return op.collect(SyntheticConfig(n_prompts=6, context_dim=3, query_dim=2).build(), Uniform(), 103, seed=1)


@pytest.fixture(scope="module")
def path(log: LoggedDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log in shards of 20, 20, 20, 20, 20 and 3 rows."""
    return save(log, tmp_path_factory.mktemp("stream") / "log", shard_rows=20)


def rows(windows: list[LoggedDataset]) -> np.ndarray:
    """What identifies the rows, sentences apart."""
    return np.concatenate([window.output[:, 0] for window in windows])


@pytest.mark.parametrize("window", [1, 7, 20, 33, 50, 102, 103, 1_000])
def test_windows_hold_every_row_once(log, path, window):
    stream = LogStream.open(path, window=window)
    assert len(stream) == 103
    in_order, mixed = list(stream.windows()), list(stream.windows(seed=3))
    for windows in (in_order, mixed):
        sizes = [len(part) for part in windows]
        assert len(windows) == stream.n_windows == -(-103 // window)
        assert max(sizes) <= window
        assert sum(sizes) == 103
    np.testing.assert_array_equal(rows(in_order), log.output[:, 0])
    np.testing.assert_array_equal(np.sort(rows(mixed)), np.sort(log.output[:, 0]))


def test_a_seed_names_an_order_and_mixes_shards(log, path):
    stream = LogStream.open(path, window=40)
    first, again, other = (rows(list(stream.windows(seed=seed))) for seed in (3, 3, 5))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    found = [int(np.flatnonzero(log.output[:, 0] == value)[0]) for value in first]
    shards = [row // 20 for row in found]
    assert shards != sorted(shards)
    assert len(dict.fromkeys(shards)) == 1 + sum(a != b for a, b in itertools.pairwise(shards)) == 6


def test_rows_stay_whole(log, path):
    (window, *_) = LogStream.open(path, window=40).windows(seed=5)
    for row in range(len(window)):
        own = int(np.flatnonzero(log.output[:, 0] == window.output[row, 0])[0])
        for name in ("context", "query", "action", "propensity", "reward", "output"):
            np.testing.assert_array_equal(getattr(window, name)[row], getattr(log, name)[own])
        assert window.oracle.expected_reward[row] == log.oracle.expected_reward[own]
    assert window.prompts.fingerprint == log.prompts.fingerprint


def test_a_single_window_is_the_log_as_recorded(log, path):
    stream = LogStream.open(path)
    assert stream.window == WINDOW_BYTES // (4 * (3 + 2 + 5) + 8 + 8 + 4 + 4)
    (window,) = stream.windows(seed=1)
    for found in (window, stream.load()):
        np.testing.assert_array_equal(found.output, log.output)
        np.testing.assert_array_equal(found.action, log.action)
    np.testing.assert_array_equal(stream.head(30).reward, log.reward[:30])
    assert len(stream.head(1_000)) == 103
    assert stream.n_prompts == 6
    assert stream.metadata.seed == log.metadata.seed


def test_a_split_is_the_same_in_every_pass(log, path):
    stream = LogStream.open(path, window=25)
    kept, held_out = stream.split(0.7, seed=2)
    assert (len(kept), len(held_out)) == (5 * 14 + 2, 5 * 6 + 1)
    for part in (kept, held_out):
        passes = [np.sort(rows(list(part.windows(seed=seed)))) for seed in (None, 1, 2)]
        assert len(passes[0]) == len(part)
        for found in passes[1:]:
            np.testing.assert_array_equal(found, passes[0])
    both = np.concatenate([rows(list(kept.windows())), rows(list(held_out.windows()))])
    np.testing.assert_array_equal(np.sort(both), np.sort(log.output[:, 0]))
    assert not np.array_equal(rows([kept.load()]), rows([stream.split(0.7, seed=3)[0].load()]))


def test_a_part_can_be_split_again(path):
    outer, rest = LogStream.open(path, window=25).split(0.8, seed=2)
    inner, left = outer.split(0.5, seed=2)
    together = [rows([part.load()]) for part in (inner, left, rest)]
    assert len(np.unique(np.concatenate(together))) == 103
    assert len(inner) == 5 * 8 + 1


def test_an_empty_part(path):
    kept, held_out = LogStream.open(path).split(1.0, seed=0)
    assert len(kept) == 103
    assert list(held_out.windows()) == []
    with pytest.raises(ConfigError, match="this part has none"):
        held_out.load()


def test_wrong_input(path, tmp_path):
    for arguments in ({"window": 0}, {"window": 2.5}):
        with pytest.raises(ConfigError, match="window"):
            LogStream.open(path, **arguments)
    with pytest.raises(StorageError, match="expected a dataset directory"):
        LogStream.open(tmp_path)
    for fraction in (-0.1, 1.5):
        with pytest.raises(ConfigError, match="fraction"):
            LogStream.open(path).split(fraction, seed=0)


def test_a_damaged_shard_is_named_when_it_is_reached(log, tmp_path):
    path = save(log, tmp_path / "log", shard_rows=20)
    stream = LogStream.open(path, window=20)
    (path / "shard-000004.parquet").write_bytes(b"nothing")
    windows = stream.windows()
    assert len(next(windows)) <= 20
    with pytest.raises(StorageError, match="shard-000004"):
        list(windows)
    with pytest.raises(StorageError, match="missing"):
        list(replace(stream, path=tmp_path / "gone").windows())
