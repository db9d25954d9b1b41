"""Frozen sentence tables: what is exported is what is replayed, without a model; both ways of drawing; exact values."""

from __future__ import annotations

import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

import agents
import offprompts_env as op
from agents.cli import main
from offprompts_env.errors import ConfigError, DataError, DimensionError, StorageError
from offprompts_env.text.cache import SampleTable
from offprompts_env.text.freezing import freeze
from offprompts_env.text.frozen import FrozenSentences, FrozenTable
from offprompts_env.text.language_model import CausalLM
from offprompts_env.text.store import SentenceStore
from offprompts_env.types import Contexts
from tests.tiny_bundle import KEYWORDS, TITLES, make_tiny_bundle

ID = "OffPrompts-MovieLens-v0"
K = 3


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_bundle(tmp_path_factory.mktemp("frozen") / "bundle"))


@pytest.fixture(scope="module")
def live(bundle: str) -> op.Simulator:
    """The world with its model, and a sample table in front."""
    return gym.make(ID, bundle=bundle, cache_slots=K).unwrapped.simulator


@pytest.fixture(scope="module")
def folder(bundle: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("frozen") / "table"
    assert main(["freeze", ID, "--env", f"bundle={bundle}", "--samples", str(K), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def table(folder: Path) -> FrozenTable:
    return FrozenTable.load(folder)


@pytest.fixture
def replay(bundle: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> op.Simulator:
    """The world of the table, where no language model can be loaded."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a language model was loaded")

    monkeypatch.setattr(CausalLM, "__init__", refuse)
    return gym.make(ID, bundle=bundle, sentences=str(folder)).unwrapped.simulator


def rounds(simulator: op.Simulator, n: int = 80, seed: int = 0) -> tuple[Contexts, np.ndarray]:
    rng = np.random.default_rng(seed)
    return simulator.contexts.sample(n, rng), rng.integers(simulator.n_prompts, size=n)


def test_a_table_holds_what_it_says(table: FrozenTable, folder: Path) -> None:
    assert table.queries == TITLES
    assert table.prompts.texts == KEYWORDS
    assert table.complete
    assert len(table.sentences) == len(TITLES) * len(KEYWORDS) * K
    assert all(len(table.no_prompt[title]) == 4 for title in TITLES)
    card = (folder / "CARD.md").read_text(encoding="utf-8")
    assert f"{K} sentences of every (query, prompt)" in card
    assert str(table.facts["fingerprint"]) in card


def test_replay_is_the_sample_table_without_a_model(live: op.Simulator, replay: op.Simulator) -> None:
    contexts, actions = rounds(live)
    played = live.play(contexts, actions, np.random.default_rng(1), np.random.default_rng(2))
    again = replay.play(*rounds(replay), np.random.default_rng(1), np.random.default_rng(2))
    assert again.outputs.text.tolist() == played.outputs.text.tolist()
    np.testing.assert_allclose(again.outputs.embedding, played.outputs.embedding, atol=1e-5)
    np.testing.assert_array_equal(again.contexts.user_id, contexts.user_id)
    np.testing.assert_allclose(again.contexts.query, contexts.query, atol=1e-6)
    np.testing.assert_allclose(again.reward, played.reward, atol=1e-4)


def test_logs_of_two_worlds_on_one_table_are_identical(bundle: str, folder: Path, tmp_path: Path) -> None:
    logs = []
    for name in ("a", "b"):
        env = gym.make(ID, bundle=bundle, sentences=str(folder))
        policy = agents.UniformPolicy(len(KEYWORDS))
        logs.append(op.collect(env, policy, 50, tmp_path / name, seed=3, progress=False))
        if name == "a":
            # What was asked before must not matter to the last bit.
            env.unwrapped.simulator.expected_rewards(rounds(env.unwrapped.simulator)[0])
    for column in ("reward", "output", "action", "query", "sentence"):
        np.testing.assert_array_equal(getattr(logs[0], column), getattr(logs[1], column))
    assert logs[0].metadata.env_config["sentences_sha256"] == FrozenTable.load(folder).checksum


def test_expected_rewards_are_the_mean_over_the_table(replay: op.Simulator, table: FrozenTable) -> None:
    contexts, _ = rounds(replay, 7)
    found = replay.expected_rewards(contexts)
    by_hand = np.zeros_like(found)
    for row in range(7):
        for action in range(len(KEYWORDS)):
            first = table.first[table.queries.index(contexts.query_text[row]), action]
            for k in range(K):
                one = contexts.take(slice(row, row + 1))
                outputs = op.Outputs(table.embeddings[first + k][None], table.sentences[[first + k]])
                by_hand[row, action] += replay.rewards.mean(one, outputs)[0] / K
    np.testing.assert_allclose(found, by_hand, atol=1e-5)
    drawn = np.stack([replay.play(contexts, np.full(7, 2), *_two(seed)).expected_reward for seed in range(600)])
    errors = drawn.std(axis=0) / np.sqrt(600) + 1e-6
    assert (np.abs(drawn.mean(axis=0) - found[:, 2]) < 4 * errors).all()


def _two(seed: int) -> tuple[np.random.Generator, np.random.Generator]:
    return np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])


def test_the_truth_of_a_table_is_exact(replay: op.Simulator, live: op.Simulator) -> None:
    truth = op.Truth.enumerated(replay, users=5, movies=6)
    assert truth.score.shape == (30, len(KEYWORDS))
    np.testing.assert_allclose(truth.score, replay.expected_rewards(truth.contexts), atol=1e-4)
    np.testing.assert_array_equal(truth.choose, truth.score)
    assert truth.oracle().value == pytest.approx(truth.score.max(axis=1).mean(), abs=1e-5)
    policy = agents.UniformPolicy(len(KEYWORDS))
    assert truth.value(policy).value == pytest.approx(truth.uniform().value, abs=1e-5)
    sampled = replay.policy_value(policy, n=4000)
    assert abs(sampled.value - truth.uniform().value) < 4 * sampled.standard_error
    with pytest.raises(ConfigError, match=r"Truth\.drawn"):
        op.Truth.enumerated(live)


def test_with_replacement_rows_use_their_own_uniform(table: FrozenTable, replay: op.Simulator) -> None:
    contexts, actions = rounds(replay)
    outputs = FrozenSentences(table)
    whole = outputs.sample(contexts, actions, np.random.default_rng(0)).text
    other = actions.copy()
    other[::2] = (other[::2] + 1) % len(KEYWORDS)
    assert (outputs.sample(contexts, other, np.random.default_rng(0)).text[1::2] == whole[1::2]).all()


def test_without_replacement(table: FrozenTable, replay: op.Simulator) -> None:
    """Every pass has each sentence once, in an order whose every place is uniform."""
    outputs = FrozenSentences(table, replacement=False)
    assert FrozenSentences(table).reproducible
    assert not outputs.reproducible
    contexts, _ = rounds(replay, 1)
    rng = np.random.default_rng(0)
    first = int(table.first[table.queries.index(contexts.query_text[0]), 4])
    embeddings = {tuple(row): k for k, row in enumerate(table.embeddings[first : first + K])}
    assert len(embeddings) == K
    counts = np.zeros((K, K))
    passes = 3000
    for _ in range(passes):
        seen = [
            embeddings[tuple(outputs.deal(contexts, np.array([4]), rng).embedding[0])] for _ in range(K)
        ]  # fmt: skip
        assert sorted(seen) == list(range(K))
        counts[range(K), seen] += 1
    # 4 degrees of freedom: 0.999 quantile 18.5.
    assert ((counts - passes / K) ** 2 / (passes / K)).sum() < 18.5
    outputs.restart()
    again = FrozenSentences(table, replacement=False)
    many, actions = rounds(replay, 200)
    drawn = [o.deal(many, actions, np.random.default_rng(3)).text.tolist() for o in (outputs, again)]
    assert drawn[0] == drawn[1]
    with pytest.raises(DataError, match="were left of their pass, got 'never written'"):
        outputs.remember(many, actions, op.Outputs(np.zeros((200, 1)), np.full(200, "never written", dtype=object)))


def test_evaluation_leaves_what_is_dealt_alone(bundle: str, folder: Path) -> None:
    """Values are a function of the seed, and of the table: with replacement or without they are the same."""
    worlds = [
        gym.make(ID, bundle=bundle, sentences=str(folder), replacement=flag).unwrapped.simulator
        for flag in (False, False, True)
    ]
    policy = agents.UniformPolicy(len(KEYWORDS))
    first = worlds[0].policy_value(policy, n=300, seed=5)
    again, other = (worlds[i].policy_value(policy, n=300, seed=5) for i in (0, 2))
    np.testing.assert_array_equal(first.terms, again.terms)
    np.testing.assert_array_equal(first.terms, other.terms)
    # Nothing but who asks and which prompt is drawn is left to chance: terms are expected rewards.
    contexts = worlds[0].evaluation_contexts(300, 5)
    rewards = worlds[0].expected_rewards(contexts)
    assert (np.abs(first.terms[:, None] - rewards).min(axis=1) < 1e-5).all()
    contexts, actions = rounds(worlds[0], 100)
    played = [world.play(contexts, actions, *_two(9)).outputs.text.tolist() for world in worlds[:2]]
    assert played[0] == played[1]


@pytest.mark.parametrize("num_envs", [None, 4])
def test_a_log_without_replacement_goes_on_where_it_stopped(
    bundle: str, folder: Path, tmp_path: Path, num_envs: int | None
) -> None:
    """What follows is as if the log had not been stopped, in the middle of a batch too, whoever goes on with it."""

    def world() -> gym.Env | gym.vector.VectorEnv:
        settings = {"bundle": bundle, "sentences": str(folder), "replacement": False}
        if num_envs is None:
            return gym.make(ID, **settings)
        return gym.make_vec(ID, num_envs, vectorization_mode="sync", **settings)

    def record(n: int, name: str, env: gym.Env | gym.vector.VectorEnv) -> op.LoggedDataset:
        policy = agents.UniformPolicy(len(KEYWORDS))
        size = 64 if num_envs is None else None
        return op.collect(env, policy, n, tmp_path / name, seed=3, batch_size=size, mode="append", progress=False)

    n = 1000 if num_envs is None else 200
    env = world()
    whole = record(n, "whole", env)
    # The same object, as it was left, and another one.
    record(n // 2 + 9, "parts", env)
    parts = record(n, "parts", world())
    for column in ("reward", "output", "action", "sentence"):
        np.testing.assert_array_equal(getattr(whole, column), getattr(parts, column))
    assert "collect repeats such a log" in whole.metadata.notes
    if num_envs is None:
        # Of one (query, prompt), each K rounds are a pass: 1,000 rounds make about seven of each.
        table = FrozenTable.load(folder)
        for title, action in ((TITLES[0], 4), (TITLES[5], 0)):
            said = whole.sentence[(whole.query_text == title) & (whole.action == action)].tolist()
            first = table.first[table.queries.index(title), action]
            for start in range(0, len(said) - K + 1, K):
                assert sorted(said[start : start + K]) == sorted(table.sentences[first : first + K])


def test_a_world_without_replacement_says_so(bundle: str, folder: Path) -> None:
    env = gym.make(ID, bundle=bundle, sentences=str(folder), replacement=False)
    assert env.spec.nondeterministic
    with pytest.raises(ConfigError, match="set sentences too"):
        gym.make(ID, bundle=bundle, replacement=False)


def test_fewer_prompts(bundle: str, folder: Path, table: FrozenTable) -> None:
    simulator = gym.make(ID, bundle=bundle, sentences=str(folder), n_prompts=2).unwrapped.simulator
    assert simulator.prompts.texts == KEYWORDS[:2]
    with pytest.raises(ConfigError, match="n_prompts: expected 1 to 8"):
        table.leading(9)


def test_only_what_a_log_needs(bundle: str, live: op.Simulator, tmp_path: Path) -> None:
    env = gym.make(ID, bundle=bundle)
    log = op.collect(env, agents.UniformPolicy(len(KEYWORDS)), 12, tmp_path / "log", progress=False)
    words = ["--env", f"bundle={bundle}", "--log", str(tmp_path / "log"), "--out", str(tmp_path / "table")]
    assert main(["freeze", ID, *words, "--samples", "2"]) == 0
    found = FrozenTable.load(tmp_path / "table")
    needed = set(zip(log.query_text.tolist(), log.action.tolist(), strict=True))
    assert {(found.queries[q], a) for q, a in zip(*np.nonzero(found.first >= 0), strict=True)} == needed
    outputs = FrozenSentences(found)
    outputs.sample(log.contexts, log.action, np.random.default_rng(0))
    title, prompt = next((q, a) for q in found.queries for a in range(len(KEYWORDS)) if (q, a) not in needed)
    row = np.flatnonzero(log.query_text == title)[:1]
    with pytest.raises(DataError, match=rf"prompt {prompt} 'w2\d', but the table has none"):
        outputs.sample(log.contexts.take(row), np.array([prompt]), np.random.default_rng(0))


def test_an_export_takes_from_a_store(live: op.Simulator, tmp_path: Path, table: FrozenTable) -> None:
    outputs, store = live.outputs.outputs, SentenceStore(tmp_path / "s.db")
    queries = live.contexts.rounds(np.zeros(6, np.int64), np.arange(6))
    half = np.zeros((6, len(KEYWORDS)), dtype=bool)
    half[:, ::2] = True
    freeze(outputs, queries, tmp_path / "half", samples=K, pairs=half, store=store)
    held = len(store)
    whole = freeze(outputs, queries, tmp_path / "whole", samples=K, store=store)
    assert (held, len(store)) == (72, 144)
    assert whole.sentences.tolist() == table.sentences.tolist()
    # The same sentences are those of a sample table over the store.
    cached = SampleTable(outputs, slots=K, store=store)
    contexts, actions = rounds(live)
    cached.sample(contexts, actions, np.random.default_rng(0))
    assert cached.generated == 0


def test_a_model_with_one_answer_is_asked_once(bundle: str, tmp_path: Path) -> None:
    out = tmp_path / "table"
    decoding = '{"greedy": true, "max_new_tokens": 3}'
    words = ["--env", f"bundle={bundle}", "n_prompts=2", f"decoding={decoding}", "--samples", "5", "--out", str(out)]
    assert main(["freeze", ID, *words]) == 0
    table = FrozenTable.load(out)
    assert (table.samples, len(table.sentences)) == (1, 2 * len(TITLES))
    # What the card says is what wrote, not what was typed, and no folder of the author's.
    assert table.facts["decoding"]["greedy"] is True
    assert table.facts["decoding"]["max_new_tokens"] == 3
    assert "{prompt}" in table.facts["template"]
    assert table.facts["settings"]["bundle"] == "bundle"
    assert bundle not in (out / "CARD.md").read_text(encoding="utf-8")


def test_damage_and_misuse(bundle: str, live: op.Simulator, folder: Path, tmp_path: Path) -> None:
    queries = live.contexts.rounds(np.zeros(2, np.int64), np.arange(2))
    path = tmp_path / "table"
    outputs = live.outputs.outputs
    freeze(outputs, queries, path, samples=2)
    simulator = gym.make(ID, bundle=bundle, sentences=str(path)).unwrapped.simulator
    with pytest.raises(DataError, match="fewer sentences without a prompt"):
        simulator.play(*rounds(simulator, 3), *_two(0))
    with pytest.raises(ConfigError, match="decoding: expected nothing beside frozen sentences"):
        gym.make(ID, bundle=bundle, sentences=str(path), decoding={"temperature": 2.0})
    with pytest.raises(ConfigError, match="expected the table with the checksum 00"):
        gym.make(ID, bundle=bundle, sentences=str(path), sentences_sha256="00")
    with pytest.raises(DimensionError, match=r"pairs: expected bools \(2, 8\)"):
        freeze(outputs, queries, path, samples=2, pairs=np.ones((3, 8), dtype=bool))
    with pytest.raises(DataError, match="expected each once"):
        freeze(outputs, queries.take(np.array([0, 0])), path, samples=2)
    with pytest.raises(StorageError, match="choose another"):
        freeze(outputs, queries, tmp_path, samples=2)
    before = (path / "table.json").read_text(encoding="utf-8")
    with pytest.raises(KeyboardInterrupt):
        freeze(outputs, queries, path, samples=2, progress=_interrupt)
    assert (path / "table.json").read_text(encoding="utf-8") == before
    newer = json.loads(before) | {"format_version": 9}
    (path / "table.json").write_text(json.dumps(newer), encoding="utf-8")
    with pytest.raises(StorageError, match="format version 9"):
        FrozenTable.load(path)
    described = json.loads(before)
    for name, value in (("pairs", 5), ("facts", None), ("format_version", "one"), ("embeddings.npy", None)):
        damaged = described | {"files": dict(described["files"])}
        holder = damaged["files"] if name == "embeddings.npy" else damaged
        if value is None:
            del holder[name]
        else:
            holder[name] = value
        (path / "table.json").write_text(json.dumps(damaged), encoding="utf-8")
        with pytest.raises(StorageError, match="frozen sentences: expected"):
            FrozenTable.load(path)
    with pytest.raises(DataError, match="at least one"):
        freeze(outputs, queries, path, samples=2, pairs=np.zeros((2, 8), dtype=bool))
    (path / "table.json").write_text(before, encoding="utf-8")
    with (path / "sentences.parquet").open("ab") as file:
        file.write(b"x")
    with pytest.raises(StorageError, match=r"sentences\.parquet: expected .* download or export it again"):
        FrozenTable.load(path)
    with pytest.raises(StorageError, match="found none"):
        gym.make(ID, bundle=bundle, sentences=str(tmp_path / "none"))


def _interrupt(done: int, total: int) -> None:
    raise KeyboardInterrupt
