"""The doubly robust sentence learner, on a world where every round is enumerated."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import agents
from agents.learners.exact import ExactPG, KernelWeights
from agents.networks import MLP
from offprompts_env.errors import ConfigError, DataError, PropensityError
from offprompts_env.types import Outputs
from tests.agents.tiny_bandit import LOGGING, MEAN, MODEL, PROMPTS, Table, draw, population, rounds

NARROW = {"tau": 0.1, "output_noise": 0.0}
BY_SENTENCE = {"residual": "kernel", **NARROW}
BY_PROMPT = {"residual": "action"}


class Numbers:
    """A Gaussian generator without noise: the sentence of a prompt is its number."""

    output_dim, prompts = 1, PROMPTS
    effects, noise_std = np.arange(4.0)[:, None], np.zeros(1)

    def base(self, contexts):
        return np.zeros((len(contexts), 1))

    def sample(self, contexts, actions, rng):
        return Outputs(np.asarray(actions, dtype=np.float32)[:, None])


class Reads:
    """A fitted r̂ given by a table, of which it is said how well it predicts; it is what fits itself, too."""

    members = 1

    def __init__(self, table, error=0.5):
        self.table, self.validation = np.asarray(table), {"error": error, "baseline": 1.0}

    def fit_many(self, logs, *, seeds=None):
        return [self] * len(logs)

    def member(self, index, contexts, sentences):
        x, s = contexts[:, 0].astype(int), np.rint(sentences[..., 0]).astype(int)
        return self.table[x[:, None], s].astype(np.float32)


def learner(table=MODEL, error=0.5, **settings):
    models = agents.SentenceModels(rewards=Reads(table, error))
    return agents.SentenceDR(**{"models": models, "steps": 300, "learning_rate": 2e-2, "hidden": (8,), **settings})


def fit(config, log, **settings):
    return config.fit(log, generator=Numbers(), logging_policy=Table(LOGGING), **settings)


def chosen(policy):
    """Return the likeliest prompt of both contexts, and its probability."""
    pmf = policy.probabilities(rounds([0, 1], [0, 0]).contexts)
    return pmf.argmax(axis=1).tolist(), pmf.max(axis=1)


def objective(config, log, monkeypatch):
    """Return what a policy gains in every round by each prompt, G (n, A), and its prior logits."""
    kept = []
    exact = ExactPG._exact
    monkeypatch.setattr(ExactPG, "_exact", lambda self, *made: kept.append(made) or exact(self, *made))
    fit(replace(config, steps=1), log)
    _, gains, prior = kept[-1]
    rows = np.arange(len(log))
    return gains(0, rows), prior(0, rows)


def by_context(matrix, log):
    return np.stack([matrix[log.context[:, 0] == x].mean(axis=0) for x in range(2)])


@pytest.mark.parametrize("weights", [BY_SENTENCE, BY_PROMPT], ids=["sentence", "prompt"])
@pytest.mark.parametrize("mix", [(1.0, 0.0), (1.0, 0.3), (1.0, 1.0), (0.0, 1.0), (0.5, 0.25)])
def test_gains_of_the_population_are_the_formula(weights, mix, monkeypatch):
    log, (model, residual) = population(), mix
    gains, _ = objective(learner(mixes=(mix,), **weights), log, monkeypatch)
    expected = model * MODEL + residual * (MEAN - model * MODEL)
    np.testing.assert_allclose(by_context(gains, log), expected, atol=1e-5)


def test_a_right_model_needs_no_right_weights(monkeypatch):
    log = population()
    wide, _ = objective(learner(MEAN, mixes=((1.0, 1.0),), tau=5.0), log, monkeypatch)
    np.testing.assert_allclose(wide, MEAN[log.context[:, 0].astype(int)], atol=1e-5)
    alone, _ = objective(learner(MEAN, mixes=((0.0, 1.0),), tau=5.0), log, monkeypatch)
    assert np.abs(by_context(alone, log) - MEAN).max() > 0.1


def test_weights_are_clipped(monkeypatch):
    log = population()
    gains, _ = objective(learner(mixes=((0.0, 1.0),), clip=3.0, **BY_PROMPT), log, monkeypatch)
    np.testing.assert_allclose(by_context(gains, log), np.minimum(1 / LOGGING, 3) * LOGGING * MEAN, rtol=1e-5)


def test_the_prior_is_the_model_in_units_of_its_spread(monkeypatch):
    log = population()
    spread = MODEL[log.context[:, 0].astype(int)].std(axis=1).mean()
    for mix, beta in (((1.0, 1.0), 10 / spread), ((0.5, 1.0), 5 / spread), ((0.0, 1.0), 0.0)):
        _, prior = objective(learner(mixes=(mix,)), log, monkeypatch)
        np.testing.assert_allclose(prior, beta * MODEL[log.context[:, 0].astype(int)], rtol=1e-5)


@pytest.mark.parametrize("weights", [BY_SENTENCE, BY_PROMPT], ids=["sentence", "prompt"])
def test_held_out_values_are_unbiased_whatever_the_model(weights):
    log, config = population(), learner(mixes=((1.0, 1.0),), **weights)
    policy = fit(config, log)
    worlds = agents.worlds.Worlds(agents.training.StackedLogs([log]), (Numbers(),), (Table(LOGGING),), (0,))
    flat = replace(policy, beta=1.5, network=MLP(tuple(np.zeros_like(layer) for layer in policy.network.layers)))
    for judged in (policy, flat):
        (terms,) = config._held_out(worlds, [judged])
        truth = (judged.probabilities(rounds([0, 1], [0, 0]).contexts) * MEAN).sum(axis=1).mean()
        assert terms.mean() == pytest.approx(truth, abs=1e-5)


@pytest.mark.parametrize("weights", [BY_SENTENCE, BY_PROMPT], ids=["sentence", "prompt"])
def test_residuals_lead_from_a_wrong_model_to_the_best_prompts(weights):
    log, best, believed = population(), MEAN.argmax(axis=1).tolist(), MODEL.argmax(axis=1).tolist()
    assert best != believed
    for mix, expected in (((1.0, 0.0), believed), ((1.0, 1.0), best), ((0.0, 1.0), best)):
        found, sure = chosen(fit(learner(mixes=(mix,), sharpness=1.0, steps=400, **weights), log))
        assert found == expected, mix
        assert sure.min() > 0.9


def test_without_residuals_it_is_the_direct_method():
    config, log = learner(mixes=((1.0, 0.0),), steps=1), population()
    policy = fit(config, log)
    direct = agents.SentenceGreedy(config.models).fit(log, generator=Numbers())
    np.testing.assert_allclose(policy.probabilities(log.contexts), direct.probabilities(log.contexts), atol=1e-6)


MIXES = ((1.0, 0.0), (1.0, 1.0), (0.0, 1.0))


def of_mix(mix, config, log):
    return fit(replace(config, mixes=(mix,)), log).probabilities(log.contexts)


@pytest.mark.parametrize(
    ("table", "error", "n", "tolerance", "mixes", "mix"),
    [
        (MEAN, 0.5, 600, 1.0, MIXES, (1.0, 0.0)),  # right: no residuals
        (-MEAN, 0.5, 600, 1.0, MIXES[:2], (1.0, 1.0)),  # wrong, and found to be so
        (-MEAN, 0.5, 1500, 1e9, MIXES, (1.0, 0.0)),  # wrong, and all is forgiven
        (-MEAN, 1.0, 1500, 1e9, MIXES, (0.0, 1.0)),  # predicts nothing: has no say
        (-MEAN, 1.0, 600, 1e9, MIXES, (1.0, 0.0)),  # predicts nothing, of too few rounds to tell
    ],
)
def test_the_mix_is_chosen_on_held_out_rounds(table, error, n, tolerance, mixes, mix):
    config = learner(table, error, mixes=mixes, tolerance=tolerance, sharpness=1.0, steps=150, **BY_PROMPT)
    log = draw(n, np.random.default_rng(0), noise=0.1)
    found = fit(config, log).probabilities(log.contexts)
    assert np.array_equal(found, of_mix(mix, config, log))
    assert not np.array_equal(found, of_mix((0.5, 1.0), config, log))


def test_of_equal_mixes_the_first_wins():
    config = learner(mixes=((1.0, 0.0), (2.0, 0.0)), tolerance=0.0)
    log = draw(100, np.random.default_rng(1))
    assert fit(config, log).beta == fit(replace(config, mixes=((1.0, 0.0),)), log).beta


def test_the_mixes_of_a_world_share_its_weights(monkeypatch):
    asked, made = [], KernelWeights.__call__
    monkeypatch.setattr(KernelWeights, "__call__", lambda *call: asked.append((call[1], len(call[2]))) or made(*call))
    logs = [draw(n, np.random.default_rng(n)) for n in (100, 120)]
    config = learner(mixes=((1.0, 1.0), (1.0, 0.5), (0.0, 1.0)), steps=1)
    config.fit_many(logs, generators=[Numbers()] * 2, logging_policies=[Table(LOGGING)] * 2)
    assert asked[:2] == [(0, 70), (1, 84)]
    assert asked[2:-2] == [(0, 30), (1, 36)] * 3  # each mix is judged by itself
    assert asked[-2:] == [(0, 100), (1, 120)]


def test_gains_are_of_the_rows_and_the_mix_that_are_asked_for(monkeypatch):
    kept, exact, mixes = [], ExactPG._exact, ((1.0, 0.0), (1.0, 0.5), (0.0, 1.0))
    monkeypatch.setattr(ExactPG, "_exact", lambda self, *made: kept.append(made) or exact(self, *made))
    logs = [draw(100, np.random.default_rng(world)) for world in range(2)]
    learner(mixes=mixes, steps=1).fit_many(logs, generators=[Numbers()] * 2, logging_policies=[Table(LOGGING)] * 2)
    worlds, gains, prior = kept[0]
    assert worlds.seeds == (0, 0, 0, 1, 1, 1)
    for matrix in (gains, prior):
        whole = [matrix(index, np.arange(70)) for index in range(6)]
        for index in (0, 4, 1, 5, 2, 3):
            for rows in (np.arange(5), np.array([8, 3]), np.array([3, 8])):
                np.testing.assert_allclose(matrix(index, rows), whole[index][rows], rtol=1e-5, atol=1e-6)
    for world in range(2):
        x = worlds.stack.logs[3 * world].context[:, 0].astype(int)
        np.testing.assert_allclose(gains(3 * world, np.arange(70)), MODEL[x], rtol=1e-5)


def test_prompts_that_were_never_logged_are_judged_by_the_model():
    log = population()
    seen = log.take(np.flatnonzero(log.action < 2))
    held = LOGGING * (np.arange(4) < 2)
    held /= held.sum(axis=1, keepdims=True)
    seen = replace(seen, propensity=held[seen.context[:, 0].astype(int), seen.action])
    table = 1.1 * MODEL
    config = learner(table, mixes=((1.0, 1.0),), sharpness=1.0, steps=400, **BY_PROMPT)
    policy = config.fit(seen, generator=Numbers(), logging_policy=Table(held))
    mixed = np.concatenate([MEAN[:, :2], table[:, 2:]], axis=1)
    assert (mixed.argmax(axis=1) >= 2).all()
    assert chosen(policy)[0] == mixed.argmax(axis=1).tolist()


def test_a_constant_model_gives_no_prior():
    config = learner(np.ones((2, 4)), mixes=((1.0, 1.0),), **BY_PROMPT)
    policy = fit(config, population())
    assert policy.beta == 0
    assert chosen(policy)[0] == MEAN.argmax(axis=1).tolist()


def test_one_prompt_leaves_no_choice():
    log = rounds([0, 1] * 10, [0] * 20, propensity=np.ones(20), prompts=PROMPTS)
    policy = agents.SentenceDR(models=learner().models, steps=5, **BY_PROMPT).fit(
        log, generator=Numbers(), logging_policy=Table(np.eye(4)[[0, 0]])
    )
    np.testing.assert_allclose(policy.probabilities(log.contexts).sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("residual", ["kernel", "action"])
@pytest.mark.filterwarnings("ignore::agents.TrainingWarning")
def test_a_world_learns_the_same_alone_and_in_a_stack(residual):
    logs = [draw(120 + 16 * world, np.random.default_rng(world), noise=0.5) for world in range(3)]
    config = learner(mixes=MIXES, steps=40, residual=residual)
    logging, generators = [Table(LOGGING)] * 3, [Numbers()] * 3
    together = config.fit_many(logs, generators=generators, logging_policies=logging, seeds=[7, 8, 9])
    for log, seed, policy in zip(logs, (7, 8, 9), together, strict=True):
        alone = fit(config, log, seed=seed)
        assert np.array_equal(alone.probabilities(log.contexts), policy.probabilities(log.contexts))


def test_a_callback_sees_what_is_learned():
    seen = []
    look = agents.Callback(5, lambda step, policies: seen.append((step, policies)))
    log = population()
    policy = fit(learner(mixes=((1.0, 1.0),), steps=10), log, callback=look)
    assert [step for step, _ in seen] == [5, 10]
    last = seen[-1][1][0]
    assert isinstance(last, agents.TiltedPolicy)
    assert np.array_equal(last.probabilities(log.contexts), policy.probabilities(log.contexts))


@pytest.mark.filterwarnings("ignore::agents.TrainingWarning")
def test_what_is_learned_saves(simulator, log, tmp_path):
    part = log.take(np.arange(200))
    config = agents.SentenceDR(steps=10, models=agents.SentenceModels(rewards=agents.PolynomialRidge(2)))
    policy = config.fit(part, generator=simulator.outputs, logging_policy=agents.UniformPolicy(12))
    again = agents.load_policy(policy.save(tmp_path / "p"), log.prompts)
    assert np.array_equal(again.probabilities(part.contexts), policy.probabilities(part.contexts))


def test_unknown_propensities_and_logging_policies():
    log = population()
    unknown = replace(log, propensity=np.full(len(log), np.nan))
    with pytest.raises(PropensityError):
        learner(**BY_PROMPT).fit(unknown, generator=Numbers())
    with pytest.warns(agents.AssumptionWarning, match="propensities are unknown") as said:
        assumed = learner(steps=1, **BY_PROMPT).fit(unknown, generator=Numbers(), logging_policy=Table(LOGGING))
    assert len(said) == 1
    same = learner(steps=1, **BY_PROMPT).fit(log, generator=Numbers())
    np.testing.assert_array_equal(assumed.network.layers[0], same.network.layers[0])
    config = learner(steps=1, cloning=agents.BehaviorCloning(steps=5))
    with pytest.warns(agents.AssumptionWarning, match=r"agents\.SentenceDR: no logging policy was given"):
        config.fit(unknown, generator=Numbers())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"residual": "prompt"}, "residual"),
        ({"mixes": ()}, "mixes"),
        ({"mixes": ((0.0, 0.0),)}, "mixes"),
        ({"mixes": ((1.0, -0.1),)}, "mixes"),
        ({"mixes": ((1.0,),)}, "mixes"),
        ({"mixes": ((1.0, float("nan")),)}, "mixes"),
        ({"mixes": ((1.0, float("inf")),)}, "mixes"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"tolerance": float("nan")}, "tolerance"),
        ({"train_fraction": 0.0}, "train_fraction"),
        ({"train_fraction": 1.0}, "train_fraction"),
        ({"sharpness": 0.0}, "sharpness"),
        ({"clip": 0.0}, "clip"),
        ({"tau": 0.0}, "tau"),
        ({"output_noise": -1.0}, "output_noise"),
        ({"steps": 0}, "steps"),
    ],
)
def test_wrong_settings(settings, words):
    with pytest.raises(ConfigError, match=words):
        agents.SentenceDR(**settings)


def test_a_log_too_small_to_choose_by():
    with pytest.raises(DataError, match="at least 2 held-out rounds to choose a mix by, got 1 of 4"):
        fit(learner(), rounds([0, 1, 0, 1], [0, 1, 2, 3]))
    assert isinstance(fit(learner(mixes=((1.0, 1.0),), steps=1), rounds([0, 1], [0, 1])), agents.TiltedPolicy)
