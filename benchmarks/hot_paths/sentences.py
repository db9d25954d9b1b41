"""Hot paths around a language model: sentences kept in memory, on disk and frozen; and what a recording adds."""

from __future__ import annotations

import sqlite3
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

import agents
import offprompts_env as op
from benchmarks.hot_paths.timing import Figure, seconds
from offprompts_env.text.bulk import generate, plan
from offprompts_env.text.freezing import freeze
from offprompts_env.text.frozen import FrozenSentences
from offprompts_env.text.store import SentenceStore


def sentences(n: int = 1 << 15) -> list[Figure]:
    """Sentences a second from a warm store on disk, a warm sample table, and a frozen table."""
    simulator = gym.make("OffPrompts-MovieLens-v0", n_prompts=20, cache_slots=4).unwrapped.simulator  # type: ignore[attr-defined]
    table, rng = simulator.outputs, np.random.default_rng(0)
    queries = simulator.contexts.rounds(np.zeros(25, np.int64), np.arange(25))
    contexts = queries.take(rng.integers(25, size=n))
    actions = rng.integers(20, size=n)
    with tempfile.TemporaryDirectory() as folder:
        store = SentenceStore(Path(folder) / "sentences.db")
        frozen = FrozenSentences(freeze(table.outputs, queries, Path(folder) / "frozen", samples=4, store=store))
        requests = table.outputs.requests(contexts, actions)
        slots = rng.integers(4, size=n).tolist()
        model = table.outputs.fingerprint
        from_disk = n / seconds(lambda: store.get(model, "table 0", requests, slots))
        bare = n / seconds(_bare_lookups(Path(folder) / "bare.db", n))
        table.store = store
        table.sample(contexts, actions, rng)
        in_memory = n / seconds(lambda: table.sample(contexts, actions, rng))
        replayed = n / seconds(lambda: frozen.sample(contexts, actions, rng))
        asked = n / seconds(lambda: table.outputs.requests(contexts, actions))
    drawn = n / seconds(lambda: (rng.random(n) * 4).astype(np.int64))
    return [
        Figure(
            "sentences from a store on disk", from_disk, "sentences/s", "higher", 2e5, bare,
            "SQLite giving rows of that length by number, in one statement",
        ),
        Figure(
            "sentences from a table in memory", in_memory, "sentences/s", "higher", 2e5, asked,
            "putting the requests together, which are its keys",
        ),
        Figure("frozen sentences", replayed, "sentences/s", "higher", 2e5, drawn, "drawing the numbers of the samples"),
    ]  # fmt: skip


def _bare_lookups(path: Path, n: int) -> Callable[[], object]:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, text BLOB)")
    connection.executemany("INSERT INTO t (text) VALUES (?)", ((b"s" * 70,) for _ in range(n)))
    connection.commit()
    return lambda: connection.execute("SELECT id, text FROM t").fetchall()


def around_the_model(n: int = 2048) -> Figure:
    """What environment, sample table, rewards and logging add to generation and encoding, in processor time."""
    added, generating = [], []
    for seed in range(3):
        env = gym.make("OffPrompts-MovieLens-v0", cache_slots=4)
        simulator = env.unwrapped.simulator  # type: ignore[attr-defined]
        outputs = simulator.outputs.outputs
        # The states of the references are computed once a process, however many rounds follow.
        everything = np.arange(simulator.contexts.n_items)
        simulator.rewards.reference(simulator.contexts.rounds(np.zeros_like(everything), everything))
        spent = _watched(outputs)
        policy = agents.UniformPolicy(simulator.n_prompts)
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            op.collect(env, policy, n, Path(folder) / "log", seed=seed, progress=False)
            whole = time.process_time() - start
        added.append(whole - sum(spent.values()))
        generating.append(spent["write"])
    share = 100 * float(np.median(np.array(added) / np.array(generating)))
    return Figure(
        "recording sentences, around the models", share, "% of generation", "lower", 5, share, "itself; models apart"
    )


def bulk_generation(n: int = 2048) -> Figure:
    """What planning, seeds and the store add to generation and encoding where a store is filled, in processor time."""
    added, generating = [], []
    outputs = gym.make("OffPrompts-MovieLens-v0", n_prompts=64).unwrapped.simulator.outputs  # type: ignore[attr-defined]
    spent = _watched(outputs)
    titles = gym.make("OffPrompts-MovieLens-v0").unwrapped.simulator.contexts  # type: ignore[attr-defined]
    queries = titles.rounds(np.zeros(n // 256, np.int64), np.arange(n // 256))
    for seed in range(3):
        spent.update(write=0.0, embed=0.0)
        with tempfile.TemporaryDirectory() as folder, SentenceStore(Path(folder) / "sentences.db") as store:
            start = time.process_time()
            requests = outputs.requests(queries.repeat(64), np.tile(np.arange(64), n // 256))
            planned = plan(outputs, requests, store, samples=4, seed=seed)
            generate(planned, lambda: outputs, store)
            added.append(time.process_time() - start - sum(spent.values()))
        generating.append(spent["write"])
    share = 100 * float(np.median(np.array(added) / np.array(generating)))
    return Figure(
        "filling a store, around the models", share, "% of generation", "lower", 5, share, "itself; models apart"
    )


def _watched(outputs: Any) -> dict[str, float]:
    """Return a mapping in which `outputs` adds up the processor time of its models from now on.

    It is taken inside the whole that is measured: in batches of another make models cost otherwise.
    """
    spent = {"write": 0.0, "embed": 0.0}

    def timed(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def run(*arguments: object) -> object:
            start = time.process_time()
            result = call(*arguments)
            spent[name] += time.process_time() - start
            return result

        return run

    for name in spent:
        setattr(outputs, name, timed(name, getattr(outputs, name)))
    return spent
