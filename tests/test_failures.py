"""The comparison of learners where direct methods fail."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import agents
from benchmarks import failures
from benchmarks.failures import CASES, METHODS, MIXED, PURE, Row, ShownOutputs, SupportedPolicy, Trial, compare
from benchmarks.rows import append_row, read_rows
from offprompts_env.simulator import GaussianOutputs
from offprompts_env.synthetic import SyntheticConfig

ROWS = [
    Row("tiny", learner, world, value, 1.0)
    for world in range(2)
    for learner, value in (("greedy", 0.5), ("is", 0.25), ("sdr kernel", 0.5 + 0.1 * world))
]


@pytest.mark.filterwarnings("ignore::agents.TrainingWarning")
def test_a_case_is_what_it_says():
    case = replace(CASES["lossy"], n=60, settings={"n_prompts": 10}, support=0.2)
    trial = Trial(case, [0, 1], contexts=50)
    # The published logging policies take seconds to fit.
    trial.comparison.logging = ([agents.UniformPolicy(10)] * 2, 0.0)
    assert [log.output.shape for log in trial.logs] == [(60, 2)] * 2
    for log, policy, generator in zip(trial.logs, trial.logging, trial.generators, strict=True):
        pmf = policy.probabilities(log.contexts)
        np.testing.assert_allclose(pmf.sum(axis=1), 1, atol=1e-5)
        assert ((pmf > 0).sum(axis=1) == 2).all()
        assert isinstance(generator, GaussianOutputs)
    learned = trial.learn(agents.SentenceDR(models=replace(case.models, rewards=agents.PolynomialRidge(1)), steps=5))
    assert trial.comparison.optimality(learned).shape == (2,)


def test_a_lossy_generator_answers_what_the_whole_one_does():
    simulator = SyntheticConfig.preset("paper_code", n_prompts=5).build()
    contexts = simulator.contexts.sample(30, np.random.default_rng(0))
    shown, actions = ShownOutputs(simulator.outputs, 2), np.arange(30) % 5
    drawn, whole = (part.sample(contexts, actions, np.random.default_rng(1)) for part in (shown, simulator.outputs))
    np.testing.assert_array_equal(drawn.embedding, whole.embedding[:, :2])
    mean = shown.base(contexts) + shown.effects[actions]
    np.testing.assert_allclose(mean, simulator.outputs.mean(contexts, actions)[:, :2], rtol=1e-5)


def test_a_held_policy_is_the_other_one_on_its_support():
    policy = SupportedPolicy(agents.UniformPolicy(4), np.array([True, False, True, False]))
    contexts = SyntheticConfig.preset("paper_code", n_prompts=4).build().contexts.sample(3, np.random.default_rng(0))
    np.testing.assert_allclose(policy.probabilities(contexts), [[0.5, 0, 0.5, 0]] * 3)


def test_known_rows_are_read_back_and_not_computed_again(tmp_path):
    for row in ROWS:
        append_row(tmp_path / "rows.csv", row)
    known = read_rows(tmp_path / "rows.csv", Row)
    assert known == ROWS
    assert compare(2, ["tiny"], ["greedy", "is"], pytest.fail, known) == [
        row for row in ROWS if "sdr" not in row.learner
    ]


def test_missing_worlds_alone_are_computed(monkeypatch):
    class Stub:
        def __init__(self, case, seeds):
            self.seeds, self.comparison = seeds, self

        def optimality(self, policies):
            return np.array(policies)

    monkeypatch.setattr(failures, "Trial", Stub)
    monkeypatch.setattr(failures, "METHODS", {"greedy": lambda trial: [float(seed) for seed in trial.seeds]})
    reported = []
    rows = compare(4, ["tiny"], ["greedy"], reported.append, ROWS)
    assert [(row.world, row.optimality) for row in reported] == [(2, 2.0), (3, 3.0)]
    assert [row.world for row in rows] == [0, 1, 2, 3]


def test_the_verdict_pairs_worlds_with_the_best_pure_learner():
    assert failures.verdict(ROWS) == "tiny          sdr kernel − greedy: 0.050 ± 0.050"
    lines = failures.table(ROWS).splitlines()
    assert lines[0].split() == ["tiny"]
    assert lines[1].split() == ["greedy", "0.500", "±", "0.000"]
    assert len(lines) == 4


def test_names():
    assert {*MIXED, *PURE} <= set(METHODS)
