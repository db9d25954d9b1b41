"""The sweep where direct methods fail."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import agents
from benchmarks.methods import TITLES, Effort
from benchmarks.settings import failures
from benchmarks.settings.failures import CASES, MIXED, PURE, CaseSetting, ShownOutputs, SupportedPolicy
from benchmarks.store import Store
from benchmarks.sweeps import SWEEPS
from offprompts_env.errors import ConfigError
from offprompts_env.simulator import GaussianOutputs
from offprompts_env.synthetic import SyntheticConfig
from tests.benchmarks.some_rows import row

TINY = CaseSetting(n=60, prompts=10, effort=Effort(steps=1e-3), contexts=50, curve_contexts=20, support=0.2, shown=2)
SWEEP = SWEEPS["failures"]


def one(learner, world, score, case="tiny"):
    return row(learner, world, score, sweep="failures", point=f"case={case}", x=float("nan"))


ROWS = [
    one(learner, world, score)
    for world in range(2)
    for learner, score in (("sentence-greedy", 0.5), ("is", 0.25), ("sentence-dr", 0.5 + 0.1 * world))
]


@pytest.mark.filterwarnings("ignore::agents.TrainingWarning")
def test_learners_see_what_a_case_leaves(tmp_path, monkeypatch):
    given = []

    def fit_many(self, logs, *, generators, logging_policies, **rest):
        given.extend(zip(logs, generators, logging_policies, strict=True))
        return [agents.UniformPolicy(10) for _ in logs]

    monkeypatch.setattr(agents.ImportanceSamplingPG, "fit_many", fit_many)
    results = TINY.perform(agents.ImportanceSamplingPG(), [(0, 0), (1, 0)], Store(tmp_path))
    assert [TINY.score(result) for result in results] == pytest.approx([0, 0])
    assert len(given) == 2
    for (log, generator, policy), result, seed in zip(given, results, (0, 1), strict=True):
        assert log.output.shape == (60, 2)
        assert isinstance(generator, GaussianOutputs)
        assert generator.output_dim == 2
        pmf = policy.probabilities(log.contexts)
        np.testing.assert_allclose(pmf.sum(axis=1), 1, atol=1e-5)
        assert ((pmf > 0).sum(axis=1) == 2).all()
        np.testing.assert_allclose(log.propensity, pmf[np.arange(60), log.action], rtol=1e-4)
        value = TINY.build(seed).policy_value(policy, n=50).value
        assert result.references["logging"] == pytest.approx(value)
    assert not np.array_equal(given[0][2].supported, given[1][2].supported)


@pytest.mark.filterwarnings("ignore::agents.TrainingWarning")
def test_a_learner_learns_from_a_lossy_log(tmp_path):
    learner = agents.SentenceDR(models=agents.SentenceModels(rewards=agents.PolynomialRidge(1)), steps=5)
    (result,) = TINY.perform(learner, [(0, 0)], Store(tmp_path))
    assert result.references["uniform"] != result.value <= result.references["oracle"]


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


def test_what_is_not_gaussian_hides_nothing():
    simulator = replace(TINY, shown=None).build(0)
    simulator.outputs = object()
    assert replace(TINY, shown=None).generator(simulator) is simulator.outputs
    with pytest.raises(ConfigError, match="expected a Gaussian generator, got object"):
        TINY.generator(simulator)


def test_worlds_are_shared_by_cases_that_differ_in_what_is_seen_alone():
    assert replace(TINY, shown=3, n=5).process == TINY.process
    assert replace(TINY, support=0.3).process != TINY.process
    assert isinstance(replace(TINY, shown=3).quick(), CaseSetting)


def test_the_sweep_has_a_point_a_case_with_its_own_models():
    assert [point.name for point in SWEEP.points] == [f"case={name}" for name in CASES]
    for point, case in zip(SWEEP.points, CASES.values(), strict=True):
        assert {*MIXED, *PURE} <= set(point.methods) <= set(TITLES)
        assert point.setting == case.setting
        for name in ("sentence-greedy", *MIXED[:2]):
            assert point.methods[name].models == case.models
        assert point.methods["sentence-dr+e"].models == replace(case.models, prompt_embedding=True)
        assert point.methods["dso"].steps == 5_000


def test_what_a_case_does_not_change_is_not_run_twice():
    keys = {(run.point.name, run.learner): run.key for run in SWEEP.runs() if run.world == 0}
    twice = {learner for point, learner in keys if keys[point, learner] == keys["case=baseline", learner]
             and point != "case=baseline"}  # fmt: skip
    assert twice == {"logging", "exact-dso", "is", "regression", "dr", "dso"}
    assert len(set(keys.values())) == len(keys) - len(twice)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], []),
        ([one("sentence-dr", 0, 0.5)], []),
        ([replace(one("sentence-dr", 0, 0.5), sweep="other"), one("is", 0, 0.1)], []),
        (
            [replace(row, score=-row.score) if row.learner == "sentence-dr" else row for row in ROWS],
            ["tiny          sentence-dr − sentence-greedy: −1.050 ± 0.050 (2 worlds)"],
        ),
        (ROWS, ["tiny          sentence-dr − sentence-greedy: 0.050 ± 0.050 (2 worlds)"]),
        # A better one in fewer worlds is not the best, and worlds are paired.
        ([*ROWS, one("dr", 1, 0.9)], ["tiny          sentence-dr − sentence-greedy: 0.050 ± 0.050 (2 worlds)"]),
        (
            [*ROWS, one("is", 2, 0.25), one("sentence-dr", 2, 0.9)],
            ["tiny          sentence-dr − is: 0.417 ± 0.120 (3 worlds)"],
        ),
    ],
)
def test_the_verdict_pairs_worlds_with_the_best_pure_learner(rows, said):
    assert failures.verdict(rows) == said
