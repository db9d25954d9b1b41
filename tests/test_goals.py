"""The benchmark of the goals: a tiny run on vectors and one on text, resumed."""

from __future__ import annotations

import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest

import agents
from benchmarks import goals
from benchmarks.rows import read_rows
from benchmarks.truth import Truth
from offprompts_env.types import Contexts
from tests.tiny_bundle import make_tiny_bundle

ROW = goals.TextRow("dso", 0, 0, 0.5, 0.1, -0.25, 0.05, 100, 1.5)
TRUTH = Truth(Contexts(np.zeros((2, 1)), np.zeros((2, 1))), *np.array([[[0.0, 2], [0, 1]]] * 2), np.arange(2))


@pytest.fixture(autouse=True)
def uniform_logs(monkeypatch):
    monkeypatch.setattr(agents, "logging_policy", lambda own, **settings: agents.UniformPolicy(own.n_prompts))


def test_rows_on_vectors_are_computed_once(tmp_path, monkeypatch):
    monkeypatch.setattr(goals, "POINTS", {"prompts=4": goals.Point(n=60, prompts=4)})
    learners = {
        "sentence-greedy": lambda logs: [agents.OraclePolicy(own) for own in logs.comparison.simulators],
        "greedy": lambda logs: [agents.UniformPolicy(4) for _ in logs.comparison.seeds],
    }
    monkeypatch.setattr(goals, "VECTOR_LEARNERS", learners)
    seen: list[goals.VectorRow] = []
    rows = goals.measure_vectors(["prompts=4"], list(learners), 3, tmp_path, seen.append, contexts=50, at_once=2)
    assert {(row.learner, row.world) for row in rows} == {(name, world) for name in learners for world in range(3)}
    assert [row.optimality for row in rows] == pytest.approx([1.0] * 3 + [0.0] * 3)
    for name in learners:
        learners[name] = pytest.fail
    again = goals.measure_vectors(["prompts=4"], list(learners), 3, tmp_path, pytest.fail, contexts=50)
    assert again == rows
    assert read_rows(tmp_path / "rows.csv", goals.VectorRow) == seen
    assert words(goals.ahead(again)) == "prompts=4 sentence-greedy over greedy +1.000 ± 0.000 (3 worlds)"


def words(line: str) -> str:
    """Return a line without the spaces of its columns."""
    return " ".join(line.split())


def test_the_sentence_learners_run_at_a_point(tmp_path, monkeypatch):
    monkeypatch.setattr(goals, "POINTS", {"prompts=4": goals.Point(n=60, prompts=4, noise=0)})
    rows = goals.measure_vectors(["prompts=4"], ["sentence-greedy"], 1, tmp_path, print, contexts=50)
    assert rows[0].optimality > 0.5
    assert sorted(path.name for path in (tmp_path / "worlds" / "4-prompts-noise-0").iterdir()) == ["0"]


def test_the_table_on_vectors_holds_goals_and_published_means():
    rows = [
        goals.VectorRow("n=500", name, world, 0.7 + 0.1 * world)
        for name in ("sentence-greedy", "dso")
        for world in (0, 1)
    ]
    own, dso = goals.vector_table(rows).splitlines()[1:]
    assert words(own) == "n=500 sentence-greedy 2 0.750 ± 0.050 0.75: reached"
    assert words(dso) == "n=500 dso 2 0.750 ± 0.050 0.262 ± 0.015"
    assert "missed" in goals.vector_table([replace(row, optimality=0.1) for row in rows])


def test_rows_on_text_are_computed_once(tmp_path):
    env = gym.make("OffPrompts-MovieLens-v0", bundle=str(make_tiny_bundle(tmp_path / "bundle")))
    text = goals.Text(tmp_path / "out", env, rounds=40, users=3, movies=2)
    models = agents.SentenceModels(agents.PolynomialRidge(1), budget=8)
    learners = {
        "dso": goals.TextLearner(agents.SentenceGreedy(models), lambda own: own.outputs),
        "is": goals.TextLearner(agents.ImportanceSamplingPG(steps=2)),
    }
    seen: list[goals.TextRow] = []
    rows = goals.measure_text(text, learners, 2, 2, seen.append)
    assert len(seen) == 8
    assert {row.sentences for row in rows if row.learner == "dso"} == {8}
    assert {row.sentences for row in rows if row.learner == "is"} == {0}
    again = goals.Text(tmp_path / "out", env, rounds=40)
    assert goals.measure_text(again, learners, 2, 2, pytest.fail) == rows
    np.testing.assert_array_equal(again.truth.score, text.truth.score)
    uniform = agents.UniformPolicy(text.simulator.n_prompts)
    assert text.truth.value(uniform).value == pytest.approx(text.truth.score.mean())


def test_standard_errors_on_text_are_over_data_seeds():
    rows = [replace(ROW, data_seed=data, seed=seed, value=data + 0.1 * seed) for data in (0, 2) for seed in (0, 1)]
    mean, error = goals.clustered(rows, lambda row: row.value)
    assert mean == pytest.approx(1.05)
    assert error == pytest.approx(1.0)
    assert math.isnan(goals.clustered(rows[:2], lambda row: row.value)[1])


def test_the_table_on_text_compares_with_dso_and_the_best_single_prompt():
    rows = [replace(ROW, data_seed=data) for data in (0, 1)]
    rows += [replace(row, learner="is", value=1.0) for row in rows]
    lines = goals.text_table(rows, TRUTH).splitlines()
    assert words(lines[1]) == "dso 2 0.500 ± 0.000 1.00 -0.250 ± 0.050 100"
    assert lines[2].split()[5] == "2.00"
    assert lines[3] == "best single prompt, 1: 1.500 ± 0.500 over movies"
