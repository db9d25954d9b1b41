"""Bulk generation: what is written is what a table would write; lost workers, interrupts and resuming."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

import agents
import offprompts_env as op
from agents.cli import main
from offprompts_env.errors import ConfigError, ModelError, StorageError
from offprompts_env.text.bulk import BulkReport, Engine, Here, Plan, Processes, RayCluster, generate, plan
from offprompts_env.text.cache import SampleTable
from offprompts_env.text.language_model import row_uniforms
from offprompts_env.text.prompted import PromptedLM, PromptFormatter
from offprompts_env.text.store import SentenceStore
from offprompts_env.text.tokens import TokenCount
from offprompts_env.types import Contexts, PromptSet
from tests.tiny_bundle import KEYWORDS, TITLES, make_tiny_bundle

ID = "OffPrompts-MovieLens-v0"
FORMATTER = PromptFormatter("{query} with {prompt}", "{query}")
K = 3


class Words:
    """Says "w" and a number below 1,000; may die at a word, once or always, and counts."""

    deterministic = False

    def __init__(self, fingerprint: str = "words", deadly: str = "", marker: Path | None = None) -> None:
        self.fingerprint, self.deadly, self.marker, self.written = fingerprint, deadly, marker, 0

    def generate(self, prompts, rng):
        spared = self.marker is not None and self.marker.exists()
        if self.deadly and not spared and any(self.deadly in prompt for prompt in prompts):
            if self.marker is not None:
                self.marker.touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)
        self.written += len(prompts)
        return [f"w{int(1000 * u)}" for u in row_uniforms(rng, len(prompts), 1)[:, 0]]


class Numbers:
    """Embeds "wI" as I."""

    dim, fingerprint = 1, "numbers"

    def encode(self, texts):
        return np.array([[float(text[1:])] for text in texts], dtype=np.float32).reshape(-1, 1)


@dataclass(frozen=True)
class Make:
    """Makes an output model in any process."""

    fingerprint: str = "words"
    deadly: str = ""
    marker: Path | None = None
    words: type[Words] = Words

    def __call__(self) -> PromptedLM:
        prompts = PromptSet(np.eye(5), texts=tuple(f"p{i}" for i in range(5)))
        return PromptedLM(self.words(self.fingerprint, self.deadly, self.marker), Numbers(), prompts, FORMATTER)


def rounds(n: int = 20) -> tuple[Contexts, np.ndarray]:
    """The product of n queries with five prompts."""
    texts = np.array([f"q{i}" for i in range(n) for _ in range(5)], dtype=object)
    return Contexts(np.zeros((5 * n, 1)), np.zeros((5 * n, 1)), query_text=texts), np.tile(np.arange(5), n)


@pytest.fixture
def store(tmp_path: Path) -> SentenceStore:
    return SentenceStore(tmp_path / "s.db")


def planned(store: SentenceStore, n: int = 20, size: int = 30, samples: int = K) -> Plan:
    outputs = Make()()
    return plan(outputs, outputs.requests(*rounds(n)), store, samples=samples, shard_size=size)


def check_filled(store: SentenceStore, n: int = 20) -> None:
    """A table over the store asks nothing, and sees what one without a store sees."""
    contexts, actions = rounds(n)
    kept, plain = SampleTable(Make()(), slots=K, store=store), SampleTable(Make()(), slots=K)
    for seed in range(6):
        drawn = [t.sample(contexts, actions, np.random.default_rng(seed)) for t in (kept, plain)]
        assert drawn[0].text.tolist() == drawn[1].text.tolist()
        np.testing.assert_array_equal(drawn[0].embedding, drawn[1].embedding)
    assert kept.generated == 0
    assert len(store) == 5 * n * K


class Counted(Words):
    """Counts tokens: two a request and one a word."""

    tokens = TokenCount()

    def generate(self, prompts, rng):
        self.tokens += TokenCount(2 * len(prompts), len(prompts), len(prompts))
        return super().generate(prompts, rng)


@pytest.mark.parametrize("engine", [Here(), Processes(2)], ids=str)
def test_tokens_are_counted_where_the_model_counts_them(store: SentenceStore, engine: Engine) -> None:
    report = generate(planned(store), Make(words=Counted), store, engine)
    assert report.counted == TokenCount(600, 300, 300)
    assert (report.tokens_in, report.tokens_out) == (600, 300)
    assert report.to_json()["counted"] is True


class OfItsOwn(Words):
    """Has `tokens` that are no counts."""

    tokens = ("a", "b")


def test_tokens_of_another_kind_are_no_counts(store: SentenceStore) -> None:
    assert generate(planned(store), Make(words=OfItsOwn), store).counted is None


def test_a_plan(store: SentenceStore) -> None:
    made = planned(store)
    assert (made.requests, made.samples, made.missing, made.found, len(made.shards)) == (100, K, 300, 0, 10)
    assert all(len(shard.samples) == 30 for shard in made.shards)
    # The samples of a request are together.
    assert made.shards[0].requests[:4] == ("q0 with p0",) * 3 + ("q0 with p1",)
    with pytest.raises(ConfigError, match="samples: expected an integer ≥ 1"):
        planned(store, samples=0)


@pytest.mark.parametrize("engine", [Here(), Processes(1), Processes(2)], ids=str)
def test_every_engine_writes_what_a_table_would(store: SentenceStore, engine: Engine) -> None:
    seen: list[BulkReport] = []
    report = generate(planned(store), Make(), store, engine, progress=seen.append)
    assert (report.written, report.found, report.lost_workers) == (300, 0, 0)
    assert [r.written for r in seen] == list(range(30, 301, 30))
    assert report.characters_out == sum(len(row.sentence) for row in store.rows())
    # These words are not counted by who says them: a quarter of the characters stands for them.
    assert report.counted is None
    assert (report.tokens_in, report.tokens_out) == (report.characters_in // 4, report.characters_out // 4)
    check_filled(store)
    again = planned(store)
    assert (again.missing, again.shards) == (0, ())
    assert generate(again, Make(), store, engine).written == 0


def test_a_shard_that_a_full_disk_did_not_take_is_not_written_again(
    store: SentenceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that it is a sentence for which there is no room.
    monkeypatch.setattr(store, "put_embeddings", lambda *_: None)
    outputs = Make()()
    wrote: list[int] = []
    write = outputs.write
    outputs.write = lambda requests, rngs: wrote.append(len(requests)) or write(requests, rngs)
    pages = store._connection().execute("PRAGMA page_count").fetchone()[0]
    store._connection().execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StorageError, match=r"full.*held in memory"):
        generate(planned(store, 100), lambda: outputs, store)
    held = sum(wrote)
    assert 0 < held < 1500
    with pytest.raises(StorageError, match="full"):
        planned(store, 100)
    store._connection().execute("PRAGMA max_page_count = 100000")
    again = planned(store, 100)
    assert (again.found, again.missing) == (held, 1500 - held)
    generate(again, lambda: outputs, store)
    assert sum(wrote) == 1500
    check_filled(store, 100)


def test_a_lost_worker_costs_its_shard(store: SentenceStore, tmp_path: Path) -> None:
    report = generate(planned(store), Make(deadly="q7 ", marker=tmp_path / "died"), store, Processes(2))
    assert (report.written, report.lost_workers) == (300, 1)
    check_filled(store)


def test_a_shard_that_kills_every_worker_is_named_and_the_rest_is_kept(store: SentenceStore) -> None:
    with pytest.raises(ModelError, match=r"shard 3 lost its worker 3 times, first request 'q6 with p0'"):
        generate(planned(store), Make(deadly="q7 "), store, Processes(2))
    assert 90 <= len(store) < 300
    assert len(store) % 30 == 0
    report = generate(planned(store), Make(), store)
    assert report.found + report.written == 300
    check_filled(store)


def test_an_interrupt_keeps_what_is_complete(store: SentenceStore) -> None:
    def stop(report: BulkReport) -> None:
        if report.written == 90:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(planned(store), Make(), store, progress=stop)
    assert len(store) == 90
    assert planned(store).found == 90
    generate(planned(store), Make(), store)
    check_filled(store)


def test_workers_with_another_model_are_refused(store: SentenceStore) -> None:
    with pytest.raises(ModelError, match="expected a worker with the model words of the plan, got one with other"):
        generate(planned(store), Make("other"), store, Processes(2))
    assert len(store) == 0


@pytest.mark.slow
def test_ray(store: SentenceStore, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    try:
        report = generate(planned(store), Make(deadly="q7 ", marker=tmp_path / "died"), store, RayCluster(2))
        assert (report.written, report.lost_workers) == (300, 1)
        check_filled(store)
    finally:
        ray.shutdown()


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_bundle(tmp_path_factory.mktemp("bulk") / "bundle"))


def run(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    capsys.readouterr()
    assert main(["generate", ID, *words, "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_the_command_fills_what_an_environment_needs(
    bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "s.db")
    words = ("--env", f"bundle={bundle}", "--store", path, "--samples", "2", "--shard-size", "40", "--price", "3")
    trial = run(capsys, *words, "--dry-run")
    assert trial["missing"] == 2 * len(TITLES) * len(KEYWORDS)
    assert trial["cost"] > 0  # type: ignore[operator]
    report = run(capsys, *words, "--workers", "2", "--price-written", "5")
    assert report["found"] + report["written"] == trial["missing"]  # type: ignore[operator]
    # Counted by the processes that wrote.
    assert report["counted"]
    assert report["tokens_in"] > report["written"] < report["tokens_out"]  # type: ignore[operator]
    assert report["cost"] == pytest.approx((3 * report["tokens_in"] + 5 * report["tokens_out"]) / 1e6)  # type: ignore[operator]
    env = gym.make(ID, bundle=bundle, cache_slots=2, sentence_store=path)
    log = op.collect(env, agents.UniformPolicy(len(KEYWORDS)), 60, seed=1, progress=False)
    plain = gym.make(ID, bundle=bundle, cache_slots=2)
    assert env.unwrapped.simulator.outputs.generated == 0
    same = op.collect(plain, agents.UniformPolicy(len(KEYWORDS)), 60, seed=1, progress=False)
    assert log.sentence.tolist() == same.sentence.tolist()
    assert main(["generate", ID, *words]) == 0
    assert "0 sentences written, 96 were there" in capsys.readouterr().out


def test_references_are_said_and_paid(bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("--env", f"bundle={bundle}", f"language_model={bundle}/lm", "decoding={'max_new_tokens': 8}")
    words = (*settings, "--store", str(tmp_path / "s.db"), "--samples", "1", "--queries", "2", "--price", "1000000")
    trial = run(capsys, *words, "--dry-run")
    assert (trial["references"], trial["missing"], trial["found"]) == (8, 16, 0)
    report = run(capsys, *words)
    # The trial has written all that is no reference: what is spent now is spent on references.
    assert (report["references"], report["written"], report["found"]) == (8, 8, 16)
    assert report["counted"]
    assert report["tokens_in"] >= report["written"] < report["tokens_out"]  # type: ignore[operator]
    assert report["cost"] == report["tokens_in"] + report["tokens_out"]  # type: ignore[operator]
    assert len(SentenceStore(tmp_path / "s.db")) == 24
    assert main(["generate", ID, *words[:-1], "0.01"]) == 0
    assert "0 sentences written, 16 were there" in capsys.readouterr().out
    assert main(["generate", ID, *settings, "--store", str(tmp_path / "t.db"), "--queries", "1", "--price", "1"]) == 0
    assert re.search(r"tokens read and \d+ written, cost 0\.00\d+", capsys.readouterr().out)


def test_the_command_fills_what_a_log_needs(bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    env = gym.make(ID, bundle=bundle)
    log = op.collect(env, agents.UniformPolicy(len(KEYWORDS)), 15, tmp_path / "log", progress=False)
    words = ("--env", f"bundle={bundle}", "--store", str(tmp_path / "s.db"), "--log", str(tmp_path / "log"))
    report = run(capsys, *words, "--samples", "1")
    assert report["written"] == len(set(zip(log.query_text.tolist(), log.action.tolist(), strict=True)))
    assert main(["generate", ID, *words, "--env", f"bundle={bundle}", "n_prompts=3"]) == 2
    assert "over the environment's 3 prompts" in capsys.readouterr().err
    assert main(["generate", ID, *words, "--price-written", "5"]) == 2
    assert "--price-written: the tokens that are read have no price" in capsys.readouterr().err
    assert main(["generate", ID, *words, "--price", "-1"]) == 2
    assert "--price: expected a finite number ≥ 0, got -1.0" in capsys.readouterr().err
    assert main(["generate", "OffPrompts-Synthetic-v0", "--store", str(tmp_path / "t.db")]) == 2
