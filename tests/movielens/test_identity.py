"""What a log may be continued under: other machines, other patience, another store of sentences, and no other world."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

import agents
import offprompts_env as op
from offprompts_env.config import INCIDENTAL, identity
from offprompts_env.errors import DataError
from offprompts_env.movielens.parts import MovieLensConfig
from offprompts_env.text.served import Server
from offprompts_env.text.store import SentenceStore
from tests.tiny_bundle import make_tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_bundle(tmp_path_factory.mktemp("bundle")))


def recorded(bundle: str, path: Path, n: int, **settings: object) -> op.LoggedDataset:
    env = gym.make("OffPrompts-MovieLens-v0", bundle=bundle, cache_slots=3, **settings)
    return op.collect(env, agents.UniformPolicy(8), n, path, seed=1, batch_size=10, mode="append", progress=False)


def test_every_incidental_name_is_a_setting() -> None:
    known = {f.name for kind in (MovieLensConfig, Server) for f in dataclasses.fields(kind)}
    assert known >= INCIDENTAL
    left = identity({"n_prompts": 3, "device": "cuda", "server": {"model": "m", "attempts": 3, "deterministic": True}})
    assert left == {"n_prompts": 3, "server": {"model": "m", "deterministic": True}}
    loading = {"max_memory": {"cpu": "1GiB"}, "offload_folder": "aside"}
    assert identity({"model_kwargs": loading}) == identity({"model_kwargs": None}) == {"model_kwargs": None}
    kept = {"attn_implementation": "eager"}
    assert identity({"model_kwargs": {**loading, **kept}}) == {"model_kwargs": kept}


def test_a_log_goes_on_with_a_store_and_another_batch_size(bundle: str, tmp_path: Path) -> None:
    whole = recorded(bundle, tmp_path / "whole", 30)
    recorded(bundle, tmp_path / "log", 12)
    recorded(bundle, tmp_path / "log", 20, sentence_store=str(tmp_path / "s.db"))
    log = recorded(bundle, tmp_path / "log", 30, sentence_store=str(tmp_path / "t.db"), batch_size=5)
    assert log.sentence.tolist() == whole.sentence.tolist()
    np.testing.assert_array_equal(log.action, whole.action)
    np.testing.assert_allclose(log.reward, whole.reward, atol=1e-4)
    assert len(SentenceStore(tmp_path / "s.db")) > 0
    with pytest.raises(DataError, match="environment config"):
        recorded(bundle, tmp_path / "log", 40, decoding={"temperature": 0.5})


def test_the_store_may_be_named_by_the_environment(
    bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OFFPROMPTS_SENTENCES", str(tmp_path / "s.db"))
    first = recorded(bundle, tmp_path / "log", 20)
    (found,) = SentenceStore(tmp_path / "s.db").models()
    assert (found.series, found.facts["model"]) == ("table 0", "the bundle's model")
    again = recorded(bundle, tmp_path / "again", 20)
    assert again.sentence.tolist() == first.sentence.tolist()
    assert len(SentenceStore(tmp_path / "s.db")) == found.sentences


def test_a_store_that_cannot_be_written_is_read(bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.db"
    recorded(bundle, tmp_path / "log", 12, sentence_store=str(path))
    before = len(SentenceStore(path))
    access = os.access
    # Permissions do not bind root, under whom tests may run.
    monkeypatch.setattr(os, "access", lambda place, mode: mode != os.W_OK and access(place, mode))
    with pytest.warns(UserWarning, match=r"s\.db or its folder cannot be written"):
        log = recorded(bundle, tmp_path / "log", 30, sentence_store=str(path))
    assert log.sentence.tolist() == recorded(bundle, tmp_path / "whole", 30).sentence.tolist()
    assert len(SentenceStore(path, read_only=True)) == before


def test_the_device_may_be_chosen_by_the_machine(bundle: str, tmp_path: Path) -> None:
    log = recorded(bundle, tmp_path / "log", 10, device="auto")
    assert np.isfinite(log.reward).all()


def test_references_of_another_model_are_kept(bundle: str, tmp_path: Path) -> None:
    settings = {"language_model": str(Path(bundle) / "lm"), "decoding": {"max_new_tokens": 8}}
    recorded(bundle, tmp_path / "log", 20, sentence_store=str(tmp_path / "s.db"), **settings)
    series = {found.series: found.sentences for found in SentenceStore(tmp_path / "s.db").models()}
    assert series["no prompt"] % 4 == 0
    assert set(series) == {"no prompt", "table 0"}
