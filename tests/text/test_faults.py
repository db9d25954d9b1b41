"""Recording through a server that stumbles: nothing lost, nothing doubled, nothing silently wrong."""

from __future__ import annotations

import threading

import gymnasium as gym
import numpy as np
import pytest

import agents
import offprompts_env as op
from offprompts_env.errors import DataError, ModelError, ServerError
from offprompts_env.text.decoding import Decoding
from offprompts_env.text.prompted import PromptFormatter
from offprompts_env.text.served import ServedLM, Server
from tests.text.fault_proxy import KINDS, FakeModel, FaultProxy, sentence_of
from tests.tiny_bundle import FORMATTER, make_tiny_bundle

ASK = PromptFormatter(FORMATTER.template, FORMATTER.template_without_prompt)
PATIENT = {
    "model": "fake",
    "first_wait": 0.01,
    "longest_wait": 0.05,
    "request_timeout": 0.5,
    "attempts": 20,
    "concurrency": 16,
}
HASTY = PATIENT | {"attempts": 2}
COLUMNS = ("context", "query", "action", "propensity", "reward", "output", "sentence", "user_id", "item_id")

pytestmark = pytest.mark.filterwarnings("ignore:.*stumbles")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return str(make_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny"))


def make(bundle, url, server=PATIENT):
    return gym.make(
        "OffPrompts-MovieLens-v0", bundle=bundle, language_model=url, server=server,
        template=ASK.template, template_without_prompt=ASK.template_without_prompt,
    )  # fmt: skip


def record(env, n, path=None, **options):
    policy = agents.UniformPolicy(env.unwrapped.simulator.n_prompts)
    return op.collect(env, policy, n, path, seed=3, batch_size=250, progress=False, **options)


def same(log, other):
    """Whether `log` is the beginning of `other`, bit for bit."""
    for name in COLUMNS:
        assert np.array_equal(getattr(log, name), getattr(other, name)[: len(log)]), name


@pytest.fixture(scope="module")
def undisturbed(bundle):
    with FakeModel() as model:
        return record(make(bundle, model.url), 2000)


def test_two_thousand_rounds_through_faults_are_those_without(bundle, undisturbed, tmp_path):
    with FakeModel() as model, FaultProxy(model.url, share=0.2) as proxy:
        env = make(bundle, proxy.url)
        log = record(env, 2000, tmp_path / "log")
        report = env.unwrapped.simulator.outputs.language_model.report
        assert set(proxy.faults) == set(KINDS)
        assert report.retries.total() > 300
        # One for each sentence, one for each failed attempt, and few to ask which model it is.
        assert 0 < report.requests - report.sentences - report.retries.total() < 20
    assert len(log) == 2000
    same(log, undisturbed)
    # Each row's sentence was written for that row's question, with a seed of its own.
    for row in range(len(log)):
        request = ASK.ask(log.query_text[row], log.prompts.texts[log.action[row]])
        assert log.sentence[row] == sentence_of(request, log.sentence[row].split(" s")[-1])
    assert len(set(log.sentence)) == 2000
    assert report.sentences >= 2000
    assert set(report.to_json()["retries"]) >= {"status 429", "status 500", "timeout", "empty sentence", "invalid JSON"}


def test_it_stops_cleanly_and_resumes(bundle, undisturbed, tmp_path):
    with FakeModel() as model:
        url = model.url
        env = make(bundle, url, HASTY)
        lm = env.unwrapped.simulator.outputs.language_model
        # The server dies for good in the second batch.
        dead = threading.Event()

        def die(n, request):
            if n >= 350 and not dead.is_set():
                dead.set()
                threading.Thread(target=model.down).start()

        model.say = die
        with pytest.raises(ServerError, match="start the server") as error:
            record(env, 1000, tmp_path / "log")
        assert "mode='append'" in str(error.value)
        assert "of the 250 sentences of this call are complete" in str(error.value)
        kept = op.LoggedDataset.load(tmp_path / "log")
        assert len(kept) == 250
        model.say = lambda n, request: None
        model.up()
        before = lm.report.sentences
        log = record(env, 1000, tmp_path / "log", mode="append")
        assert len(log) == 1000
        same(log, undisturbed)
        # What was complete in the batch that failed was not asked for again.
        assert lm.report.sentences - before < 750


def test_a_new_process_resumes_where_the_server_has_moved_to(bundle, undisturbed, tmp_path, monkeypatch):
    with FakeModel() as first:
        monkeypatch.setenv("OPENAI_BASE_URL", first.url)
        record(make(bundle, None), 375, tmp_path / "log")
    with FakeModel() as second:
        monkeypatch.setenv("OPENAI_BASE_URL", second.url)
        same(record(make(bundle, None), 750, tmp_path / "log", mode="append"), undisturbed)
        with pytest.raises(DataError, match="environment config"):
            record(make(bundle, None, PATIENT | {"model": "other"}), 1000, tmp_path / "log", mode="append")


def test_a_server_that_restarts_is_waited_for(bundle, undisturbed):
    with FakeModel() as model:
        env = make(bundle, model.url, PATIENT | {"attempts": 60})
        restarts = []

        def restart(n, request):
            if n in (200, 500) and n not in restarts:
                restarts.append(n)
                threading.Thread(target=lambda: (model.down(), threading.Event().wait(0.2), model.up())).start()

        model.say = restart
        same(record(env, 750), undisturbed)
        assert restarts == [200, 500]
        # Asked who it is at first, and at the end of each batch in which a connection was opened.
        assert model.listed >= 3


@pytest.mark.parametrize(
    ("change", "told"),
    [({"model": "fake-2"}, "model 'fake'"), ({"system": "fp-2"}, "system_fingerprint 'fp-1'"),
     ({"root": "/weights/b"}, "root '/weights/a'")],
)  # fmt: skip
def test_a_model_swapped_under_its_name_is_not_mixed_in(bundle, undisturbed, tmp_path, change, told):
    with FakeModel(system="fp-1") as model:
        env = make(bundle, model.url)

        def swap(n, request):
            if n == 350:
                threading.Thread(target=lambda: (model.down(), vars(model).update(change), model.up())).start()

        model.say = swap
        with pytest.raises(ModelError, match=told):
            record(env, 1000, tmp_path / "log")
    log = op.LoggedDataset.load(tmp_path / "log")
    assert len(log) == 250
    same(log, undisturbed)


def test_a_model_swapped_between_two_processes_is_not_mixed_in(bundle, undisturbed, tmp_path, monkeypatch):
    with FakeModel() as first:
        monkeypatch.setenv("OPENAI_BASE_URL", first.url)
        record(make(bundle, None), 250, tmp_path / "log")
    with FakeModel(root="/weights/b") as second:
        monkeypatch.setenv("OPENAI_BASE_URL", second.url)
        with pytest.raises(DataError, match=r"cannot append, expected the model .*/weights/a.* got .*/weights/b"):
            record(make(bundle, None), 500, tmp_path / "log", mode="append")
        # Who does not want to know is not told.
        unchecked = PATIENT | {"check_identity": False}
        assert len(record(make(bundle, None, unchecked), 500, tmp_path / "log", mode="append")) == 500
    same(op.LoggedDataset.load(tmp_path / "log").take(slice(0, 250)), undisturbed)


def test_a_log_goes_on_with_more_patience(bundle, undisturbed, tmp_path, monkeypatch):
    with FakeModel() as model:
        monkeypatch.setenv("OPENAI_BASE_URL", model.url)
        record(make(bundle, None, HASTY), 250, tmp_path / "log")
        same(record(make(bundle, None, PATIENT), 500, tmp_path / "log", mode="append"), undisturbed)
        with pytest.raises(DataError, match="environment config"):
            record(make(bundle, None, PATIENT | {"extra": {"top_k": 5}}), 750, tmp_path / "log", mode="append")


@pytest.mark.parametrize("kind", KINDS)
def test_each_fault_alone_is_survived(kind):
    prompts = [f"w{i} asks" for i in range(60)]
    with FakeModel() as model, FaultProxy(model.url, share=0.3, kinds=(kind,)) as proxy:
        lm = ServedLM(Server(proxy.url, **PATIENT), Decoding(8))
        said = lm.generate(prompts, np.random.default_rng(1))
        seeds = [int(sentence.split(" s")[-1]) for sentence in said]
        assert said == list(map(sentence_of, prompts, seeds))
        # Only a model that says nothing, again and again, is asked with another seed.
        assert kind == "empty" or seeds == np.random.default_rng(1).integers(2**31 - 1, size=60).tolist()
        assert proxy.faults[kind] > 0
        lm.close()


@pytest.mark.parametrize("kind", KINDS)
def test_each_fault_that_stays_is_an_error_that_says_so(kind):
    with FakeModel() as model, FaultProxy(model.url, share=0.0, kinds=(kind,)) as proxy:
        lm = ServedLM(Server(proxy.url, **HASTY | {"concurrency": 1}), Decoding(8))
        lm.generate(["w1"], np.random.default_rng(1))
        proxy.share = 1.0
        with pytest.raises(ServerError, match=r"2 attempts failed.*; .*\. 0 of the 3 sentences") as error:
            lm.generate(["w1", "w2", "w3"], np.random.default_rng(2))
        assert str(lm.report) in str(error.value)
        proxy.share = 0.0
        assert len(lm.generate(["w1", "w2", "w3"], np.random.default_rng(2))) == 3
        lm.close()


@pytest.mark.parametrize("keeps", [False, True])
def test_an_environment_says_whether_its_model_keeps_to_seeds(bundle, tmp_path, keeps):
    with FakeModel() as model:
        env = make(bundle, model.url, PATIENT | {"deterministic": keeps})
        assert env.unwrapped.spec.nondeterministic is not keeps
        assert gym.spec("OffPrompts-MovieLens-v0").nondeterministic is False
        log = record(env, 4, tmp_path / "log")
    said = '{"id": "fake", "owned_by": "tests", "root": "/weights/a"}'
    lines = [] if keeps else ["not reproducible: its language model does not keep to seeds"]
    assert log.metadata.notes.splitlines() == [*lines, f"served model: {said}"]
