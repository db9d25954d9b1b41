"""The sweeps on text, on a tiny bundle: what is shared, what is counted, what is told, and how runs are named."""

from __future__ import annotations

import json
from dataclasses import fields

import numpy as np
import pytest

import agents
import offprompts_env as op
from benchmarks.methods import Effort, Logging, Own, Shuffled
from benchmarks.settings import text
from benchmarks.settings.text import PUBLISHED, TEXT, CountedOutputs, PublishedSetting, TextSetting
from benchmarks.settings.worlds import look_every
from benchmarks.store import Store
from benchmarks.sweeps import SWEEPS, quick
from tests.tiny_bundle import KEYWORDS, make_tiny_bundle

# Forty rounds are too few for a regression, as it says.
pytestmark = pytest.mark.filterwarnings("ignore::agents.TrainingWarning")

# Log 1 before log 0, and a seed that one log has alone: what is shared must find its way back to its unit.
UNITS = [(1, 0), (0, 0), (0, 1)]
OWN = """
import numpy as np
import agents

class First:
    played = 0
    def act(self, contexts, rng):
        return np.zeros(len(contexts), dtype=np.int64), np.ones(len(contexts))
    def learn(self, rounds):
        First.played += len(rounds)

def policy(prompts, seed):
    return agents.ConstantPolicy(0, len(prompts))

def agent(prompts, seed):
    return First()
"""


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    bundle = make_tiny_bundle(tmp_path_factory.mktemp("text") / "bundle")
    return TextSetting(
        rounds=40, warm_up=20, users=3, movies=2, curve_rounds=4, effort=Effort(1e-3), bundle=str(bundle)
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def results(setting, store):
    names = ("logging", "is", "greedy", "dso", "online")
    return {name: setting.perform(TEXT[name], UNITS, store) for name in names}


def kept(store, stage):
    return [path.name for path in (store.root / stage).iterdir() if not path.name.startswith(".")]


def test_references_belong_to_the_log_or_the_seed(results):
    owned = [one.references for own in results.values() for one in own]
    assert {tuple(sorted(one)) for one in owned} == {
        ("best single", "logging", "no prompt", "online", "oracle", "uniform")
    }
    for name in ("uniform", "best single", "oracle", "no prompt"):
        assert len({one[name] for one in owned}) == 1
    assert owned[0]["no prompt"] == 0.0
    first, second, third = results["is"]
    assert second.references["logging"] == third.references["logging"] != first.references["logging"]
    assert first.references["online"] == second.references["online"] != third.references["online"]


def test_values_are_those_of_the_truth(results, setting):
    for one in results["logging"]:
        assert one.value == one.references["logging"]
        assert one.measures["over logging"] == one.measures["over logging error"] == 0.0
    for one in results["online"]:
        assert one.value == one.references["online"]
    for own in results.values():
        for one in own:
            assert one.measures["over best single"] == pytest.approx(one.value - one.references["best single"])
            assert setting.score(one) == one.value


def test_sentences_with_a_price_are_counted(results):
    # A thousandth of 20,000 for the steps and of 10,000 for the density; the skyline's one step plays its batch.
    asked = {name: {one.sentences for one in own} for name, own in results.items()}
    assert asked == {"logging": {0}, "is": {0}, "greedy": {0}, "dso": {30}, "online": {text.ONLINE.batch_size}}


def test_policies_are_looked_at_while_they_are_trained(results):
    for one in results["is"]:
        assert one.curve_steps == tuple(range(2, 21, 2))
        assert len(one.curve) == 10
        assert np.isfinite(one.curve).all()
    assert results["logging"][0].curve == ()


def test_the_report_gets_stories_of_the_first_log_and_seed(results):
    for own in results.values():
        assert [one.details is None for one in own] == [True, False, True]
    before, after = (results[name][1].details["stories"] for name in ("logging", "dso"))
    assert json.loads(json.dumps(after)) == after
    assert [story["before"] for story in before] == [story["after"] for story in before]
    assert [story["before"] for story in before] == [story["before"] for story in after]
    assert {story["after"]["prompt"] for story in after} <= set(KEYWORDS)


def test_what_is_shared_is_made_once(results, setting, store, monkeypatch):
    counts = {stage: len(kept(store, stage)) for stage in ("logging", "logs", "density", "truth", "skyline", "rewards")}
    assert counts == {"logging": 2, "logs": 2, "density": 2, "truth": 1, "skyline": 2, "rewards": 3}
    for owner, name in ((agents, "logging_policies"), (text, "collect"), (op.Truth, "drawn")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("made again"))
    monkeypatch.setattr(agents.OnlinePG, "fit_many", lambda *_, **__: pytest.fail("made again"))
    monkeypatch.setattr(agents.NetworkDensity, "fit_many", lambda *_, **__: pytest.fail("made again"))
    again = setting.perform(TEXT["dso"], UNITS, store)
    assert [one.value for one in again] == [one.value for one in results["dso"]]
    assert [one.sentences for one in again] == [30] * 3


def test_a_unit_alone_is_what_it_was_among_others(results, setting, store):
    for name in ("is", "greedy", "dso"):
        alone = setting.perform(TEXT[name], UNITS[2:], store)[0]
        assert alone.value == pytest.approx(results[name][2].value, abs=1e-5)
        assert alone.references == results[name][2].references


def test_agents_of_users_are_valued_in_the_same_rounds(setting, store, tmp_path, monkeypatch):
    (tmp_path / "own_on_text.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    policy, agent = (
        setting.perform(Own.of(f"own_on_text:{name}"), UNITS[1:2], store)[0] for name in ("policy", "agent")
    )
    assert agent.value == pytest.approx(policy.value)
    assert agent.measures == pytest.approx(policy.measures)
    assert (agent.details, policy.details is None) == (None, False)
    from own_on_text import First

    assert First.played == setting.rounds


def test_logs_are_made_with_the_effort_of_the_setting(setting, store):
    before = len(kept(store, "logging"))
    other = TextSetting(**{**vars(setting), "effort": Effort(2e-3)})
    other.perform(Logging(), [(0, 0)], store)
    assert len(kept(store, "logging")) == before + 1
    # The truth knows nothing of learning.
    assert len(kept(store, "truth")) == 1


def test_less_effort_asks_for_fewer_sentences():
    tenth = Effort(steps=0.1)
    dso = tenth.of(TEXT["dso"])
    assert (dso.max_sentences, dso.density.max_sentences, dso.steps) == (2_000, 1_000, 1_000)
    assert tenth.of(agents.DSO()).max_sentences is None
    assert tenth.of(agents.SentenceGreedy()).models.budget == 0
    assert tenth.of(agents.SentenceGreedy(agents.SentenceModels(budget=400))).models.budget == 40


def test_a_counted_generator_is_the_generator():
    outputs = op.SyntheticConfig(n_prompts=4).build().outputs
    counted = CountedOutputs(outputs)
    assert (counted.output_dim, len(counted.prompts)) == (outputs.output_dim, 4)
    contexts = op.Contexts(np.zeros((3, 5)), np.zeros((3, 5)))
    drawn = [own.sample(contexts, np.arange(3), np.random.default_rng(0)).embedding for own in (outputs, counted)]
    np.testing.assert_array_equal(*drawn)
    assert counted.asked == 3


def test_runs_are_named_by_log_and_seed():
    sweep = SWEEPS["movielens"]
    ids = [run.id for run in sweep.runs()]
    assert "movielens/prompts=all/log=2/seed=3/learner=dso" in ids
    assert len(ids) == len(set(ids)) == 25 * len(TEXT)
    short = quick(sweep)
    assert {(run.world, run.seed) for run in short.runs()} == {(0, 0), (1, 0)}
    assert {run.point.setting.prompts for run in short.runs()} == {100}


def test_the_paper_logs_by_a_softer_form_of_what_was_learned_online(setting, store, results):
    shared = {f.name: getattr(setting, f.name) for f in fields(setting)}
    paper = PublishedSetting(**shared)
    before = {stage: kept(store, stage) for stage in ("logging", "logs", "truth", "skyline")}
    own = paper.perform(Logging(), UNITS, store)
    learned = paper.perform(TEXT["is"], UNITS, store)
    more = {stage: len(kept(store, stage)) - len(names) for stage, names in before.items()}
    assert more == {"logging": 2, "logs": 2, "truth": 0, "skyline": 0}
    assert [one.value for one in learned] != [one.value for one in results["is"]]
    first, second, third = [one.value for one in own]
    assert second == third != first
    assert first != results["logging"][0].value
    for name in ("uniform", "oracle", "no prompt", "online"):
        assert [one.references[name] for one in own] == [one.references[name] for one in results["logging"]]


def test_the_published_sweep_has_the_published_schedules():
    sweep = SWEEPS["movielens_published"]
    ids = {run.id for run in sweep.runs()}
    assert len(ids) == 25 * (len(PUBLISHED) + 1 + 5)
    assert "movielens_published/prompts=all/sentences=unbounded/log=4/seed=4/learner=dso" in ids
    usual, unbounded, shuffled = sweep.points
    assert {point.setting for point in sweep.points} == {PublishedSetting(beta=0.2, rounds=10_000)}
    assert all(method.learner == usual.methods[name] for name, method in shuffled.methods.items())
    assert usual.methods["regression"] == agents.RegressionPG()
    dso = unbounded.methods["dso"]
    assert (dso.steps, dso.batch_size, dso.learning_rate) == (20_000, 32, 5e-4)
    assert dso.max_sentences is dso.density.max_sentences is None
    assert {run.key for run in sweep.runs()}.isdisjoint({run.key for run in SWEEPS["movielens"].runs()})


def test_the_sweep_of_budgets_shares_runs_with_the_first_one():
    first = {run.key for run in SWEEPS["movielens"].runs()}
    budgets = SWEEPS["movielens_budget"]
    shared = {(run.point.name, run.learner) for run in budgets.runs() if run.key in first}
    assert shared == {("budget=0", "sentence-greedy"), ("budget=30000", "dso")}
    for point in budgets.points:
        for learner in point.methods.values():
            if isinstance(learner, agents.DSO):
                assert learner.max_sentences + learner.density.max_sentences == point.x
            else:
                assert learner.models.budget == point.x


def test_shuffled_embeddings_change_what_reads_them_alone(setting, store, results):
    readers = {name: setting.perform(Shuffled(TEXT[name]), UNITS, store) for name in ("is", "greedy")}
    values = {name: [one.value for one in own] for name, own in readers.items()}
    assert values["is"] == [one.value for one in results["is"]]
    assert values["greedy"] != [one.value for one in results["greedy"]]


def test_a_learner_in_another_is_looked_at_as_often_as_itself():
    for around in (Shuffled, agents.Embedded):
        assert look_every(around(TEXT["is"])) == look_every(TEXT["is"]) == TEXT["is"].steps // 10
    assert look_every(Shuffled(TEXT["greedy"])) == 1


def test_the_sweep_of_distances_shares_runs_with_the_first_one():
    first = {run.key for run in SWEEPS["movielens"].runs()}
    for run in SWEEPS["movielens_distances"].runs():
        assert (run.key in first) == (run.point.name == "embedding=encoder")


def test_the_sweep_of_embeddings_shares_runs_with_the_first_one():
    first = {run.key for run in SWEEPS["movielens"].runs()}
    for run in SWEEPS["movielens_embeddings"].runs():
        assert (run.key in first) == (run.point.name == "embeddings=own")
