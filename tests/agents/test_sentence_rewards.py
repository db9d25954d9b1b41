"""Reward models of sentences: members stopped by their own fold, out-of-fold errors, and the choice among forms."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest

import agents
from agents.networks import MLP
from agents.ridge import fit_ridge
from agents.sentence_rewards import NetworkRewards, PolynomialRewards, _Scale, predict, side_by_side
from offprompts_env.errors import ConfigError, DataError, DimensionError
from offprompts_env.rng import stream
from offprompts_env.types import FloatArray, LoggedDataset, Outputs, PromptSet

TINY = agents.NetworkEnsemble(hidden=(8,), folds=3, steps=40, batch_size=16, look_every=10)
SEARCH = agents.SentenceRewardSearch((agents.PolynomialRidge(1), agents.PolynomialRidge(2), TINY))


def made(n: int, reward, seed: int = 0) -> LoggedDataset:
    """Return a log with d_x = 2, d_q = 1 and d_o = 2 whose reward is a function of the generator and the columns."""
    rng = np.random.default_rng(seed)
    context, query, output = (rng.normal(size=(n, d)).astype(np.float32) for d in (2, 1, 2))
    return LoggedDataset(
        context=context,
        query=query,
        action=rng.integers(3, size=n),
        propensity=np.full(n, 1 / 3),
        reward=reward(rng, context, query, output),
        output=output,
        prompts=PromptSet(np.eye(3)),
    )


def bilinear(rng, context, query, output):
    return context[:, 0] * output[:, 1] + 0.5 * output[:, 0] + 0.1 * rng.normal(size=len(context))


def linear(rng, context, query, output):
    return context[:, 0] + 0.5 * output[:, 0] + rng.normal(size=len(context))


def folds(n: int, seed: int, count: int) -> FloatArray:
    return stream(seed, "sentence-reward model", "folds").permutation(n) % count


def same(left: MLP, right: MLP) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(left.layers, right.layers, strict=True))


def held_out_errors(model: NetworkRewards, log: LoggedDataset, seed: int) -> FloatArray:
    """Mean squared error of each member on the fold that it did not see, (R,)."""
    own = folds(len(log), seed, model.members)
    errors = np.empty(model.members)
    for index in range(model.members):
        rows = own == index
        predicted = model.member(index, side_by_side(log.contexts)[rows], log.output[rows][:, None])[:, 0]
        errors[index] = np.mean(np.square(predicted - log.reward[rows], dtype=np.float64))
    return errors


@pytest.mark.parametrize("patience", [1, 100])
def test_each_member_is_kept_as_it_was_when_it_predicted_its_own_fold_best(patience):
    """Against runs of every length that were looked at once, at their end."""
    log = made(60, lambda rng, *rest: rng.normal(size=60))
    looks = range(5, 61, 5)
    settings = replace(TINY, learning_rate=3e-2)
    snapshots = [replace(settings, steps=steps, look_every=10_000).fit_many([log])[0] for steps in looks]
    (found,) = replace(settings, steps=60, look_every=5, patience=patience).fit_many([log])
    errors = np.array([held_out_errors(model, log, 0) for model in snapshots])
    stops = []
    for index in range(3):
        best, idle = 0, 0
        for look in range(1, len(errors)):
            idle += 1
            if errors[look, index] < errors[best, index]:
                best, idle = look, 0
            if idle >= patience:
                break
        stops.append(best)
        assert same(found.networks[index], snapshots[best].networks[index])
    assert len(set(stops)) > 1
    assert max(stops) < len(looks) - 1


def test_the_error_is_that_of_members_on_rounds_they_did_not_see():
    log = made(60, bilinear)
    (model,) = TINY.fit_many([log], seeds=[4])
    sizes = np.bincount(folds(60, 4, 3))
    assert (sizes == 20).all()
    assert model.validation["error"] == pytest.approx(float(held_out_errors(model, log, 4).mean()), rel=1e-4)
    others = [np.delete(log.reward, i).mean(dtype=np.float64) for i in range(60)]
    assert model.validation["baseline"] == pytest.approx(np.mean((others - log.reward) ** 2), rel=1e-5)


def test_a_member_never_learns_from_its_own_fold():
    """Rewards swapped within a fold, their mean and spread as before, leave its member alone and move the others."""
    log = made(60, lambda rng, *rest: rng.permutation(np.repeat([-1.0, 1.0], 30)))
    rows = np.flatnonzero(folds(60, 0, 3) == 1)
    reward = log.reward.copy()
    reward[rows] = reward[np.random.default_rng(0).permutation(rows)]
    assert (reward != log.reward).any()
    once = replace(TINY, look_every=10_000)
    (first,), (second,) = (once.fit_many([data]) for data in (log, replace(log, reward=reward)))
    assert [same(a, b) for a, b in zip(first.networks, second.networks, strict=True)] == [False, True, False]


def test_standardisation_is_folded_into_the_network():
    rng = np.random.default_rng(0)
    raw = (rng.normal(size=(50, 4)) * [1, 30, 0.01, 2] + [0, 100, 5, -3]).astype(np.float32)
    raw[:, 3] = 50.3
    target = (7 + 3 * rng.normal(size=50)).astype(np.float32)
    scale = _Scale.of(raw, target)
    scaled = scale.inputs(raw)
    np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(scaled.std(axis=0), [1, 1, 1, 0], atol=1e-3)
    np.testing.assert_allclose([scale.target(target).mean(), scale.target(target).std()], [0, 1], atol=1e-5)
    shapes = ((5, 6), (7, 3), (4, 1))
    network = MLP(tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes))
    folded = scale.raw(network)
    np.testing.assert_allclose(folded(raw), scale.raw_target(network(scaled)), rtol=1e-3, atol=2e-3)
    # What never varied has no say, so that another value of it changes nothing.
    other = raw.copy()
    other[:, 3] = -20
    np.testing.assert_array_equal(folded(other), folded(raw))


def test_a_member_says_what_its_network_says_of_the_columns_side_by_side():
    log = made(20, bilinear)
    (model,) = TINY.fit_many([log])
    sentences = np.random.default_rng(1).normal(size=(20, 4, 2)).astype(np.float32)
    contexts = side_by_side(log.contexts)
    for index, network in enumerate(model.networks):
        expected = [network(np.concatenate([contexts, sentences[:, j]], axis=1))[:, 0] for j in range(4)]
        np.testing.assert_allclose(model.member(index, contexts, sentences), np.transpose(expected), atol=1e-5)


@pytest.mark.parametrize("source", [agents.PolynomialRidge(2, members=5), TINY], ids=["polynomial", "networks"])
def test_predictions_are_mean_and_deviation_over_members(source):
    log = made(40, bilinear)
    (model,) = source.fit_many([log])
    contexts, sentences = side_by_side(log.contexts), log.output[:, None] + np.array([[[0.0], [1.0]]], np.float32)
    members = np.stack([model.member(i, contexts, sentences) for i in range(model.members)]).astype(np.float64)
    mean, deviation = members.mean(axis=0), members.std(axis=0)
    assert deviation.min() > 0
    np.testing.assert_allclose(predict(model, contexts, sentences), mean, atol=1e-5)
    for pessimism in (1.5, -2.0):
        found = predict(model, contexts, sentences, pessimism)
        np.testing.assert_allclose(found, mean - pessimism * deviation, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(model(log.contexts, Outputs(log.output)), mean[:, 0], atol=1e-5)


def test_deviations_survive_predictions_that_are_large_beside_them():
    log = made(40, lambda rng, *rest: 1e4 + rng.normal(size=40))
    (model,) = agents.PolynomialRidge(1, members=4).fit_many([log])
    contexts, sentences = side_by_side(log.contexts), log.output[:, None]
    members = np.stack([model.member(i, contexts, sentences) for i in range(4)]).astype(np.float64)
    gap = predict(model, contexts, sentences) - predict(model, contexts, sentences, 1.0)
    np.testing.assert_allclose(gap, members.std(axis=0), atol=3e-3)


def test_the_mean_over_draws_is_the_posterior_mean():
    log = made(40, bilinear)
    few, many = (agents.PolynomialRidge(2, members=k).fit_many([log])[0] for k in (1, 9))
    outputs = Outputs(log.output)
    np.testing.assert_allclose(few(log.contexts, outputs), many(log.contexts, outputs), atol=1e-4)
    np.testing.assert_array_equal(
        predict(few, side_by_side(log.contexts), log.output[:, None], 3.0)[:, 0], few(log.contexts, outputs)
    )


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_draws_vary_as_predictions_of_the_posterior_do(offset):
    """About the mean of the sentences, wherever that lies: ``σ² fᵀ (FᵀF + λI)⁻¹ f`` of centred features f."""
    log = made(60, linear)
    moved = replace(log, output=log.output + np.float32(offset))
    (model,) = agents.PolynomialRidge(1, members=3_000).fit_many([moved])
    columns = np.concatenate([side_by_side(moved.contexts), moved.output], axis=1).astype(np.float64)
    fit = fit_ridge(columns, moved.reward.astype(np.float64)[:, None])
    inputs, probe = side_by_side(moved.contexts)[:5], moved.output[:5] + 1
    members = np.stack([model.member(index, inputs, probe[:, None])[:, 0] for index in range(model.members)])
    centred = np.concatenate([inputs, probe], axis=1) - columns.mean(axis=0)
    expected = np.sqrt(fit.noise[0]) * np.linalg.norm(centred @ fit.spread, axis=1)
    np.testing.assert_allclose(members.std(axis=0), expected, rtol=0.05)


@pytest.mark.parametrize("source", [agents.PolynomialRidge(2), TINY, SEARCH], ids=["polynomial", "networks", "search"])
def test_a_world_is_fitted_the_same_alone_and_in_a_stack(source):
    """Members that are done early stay as they are while those of other worlds go on."""
    logs = [made(n, kind, seed) for seed, (n, kind) in enumerate(((30, linear), (60, bilinear), (45, bilinear)))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", agents.TrainingWarning)
        together = source.fit_many(logs, seeds=[5, 6, 7])
        for log, seed, model in zip(logs, [5, 6, 7], together, strict=True):
            (alone,) = source.fit_many([log], seeds=[seed])
            assert alone.validation == model.validation
            ours, theirs = (fit.to_record().tensors for fit in (alone, model))
            assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert together[0].validation != together[1].validation


def test_one_world_stops_early_without_stopping_another():
    logs = [made(60, lambda rng, *rest: rng.normal(size=60)), made(60, bilinear)]
    source = replace(TINY, steps=200, look_every=5, patience=2, learning_rate=1e-2)
    together = source.fit_many(logs, seeds=[1, 2])
    for log, seed, model in zip(logs, [1, 2], together, strict=True):
        (alone,) = source.fit_many([log], seeds=[seed])
        assert all(same(a, b) for a, b in zip(alone.networks, model.networks, strict=True))
    errors = [model.validation["error"] / model.validation["baseline"] for model in together]
    assert errors[1] < 0.9 < 0.95 < errors[0]


def test_a_seed_names_the_folds_and_the_draws():
    log = made(40, bilinear)
    for source in (TINY, agents.PolynomialRidge(1)):
        (first,), (again,), (other,) = (source.fit_many([log], seeds=[seed]) for seed in (1, 1, 2))
        tensors = [model.to_record().tensors for model in (first, again, other)]
        assert all(np.array_equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
        assert not all(np.array_equal(tensors[0][name], tensors[2][name]) for name in tensors[0])


@pytest.mark.parametrize(("reward", "degree"), [(linear, 1), (bilinear, 2)])
def test_the_search_keeps_the_smallest_held_out_error(reward, degree):
    log = made(80, reward)
    model = SEARCH.fit(log, seed=3)
    names = ["polynomial of degree 1", "polynomial of degree 2", "3 networks with 8 hidden units"]
    assert set(model.validation) == {"error", "baseline", *names}
    alone = {fit.name: fit.fit_many([log], seeds=[3])[0].validation["error"] for fit in SEARCH.candidates}
    assert {name: model.validation[name] for name in names} == alone
    assert model.validation["error"] == min(alone.values())
    assert isinstance(model, PolynomialRewards)
    assert model.validation["error"] == alone[f"polynomial of degree {degree}"]


def test_networks_win_where_no_polynomial_fits():
    log = made(400, lambda rng, context, query, output: np.abs(output[:, 0]) - 2 * np.abs(context[:, 0] - output[:, 1]))
    networks = agents.NetworkEnsemble(hidden=(32,), folds=3, steps=400, batch_size=64, learning_rate=1e-2)
    model = agents.SentenceRewardSearch((agents.PolynomialRidge(1), agents.PolynomialRidge(2), networks)).fit(log)
    assert isinstance(model, NetworkRewards)
    assert model.validation["error"] < 0.7 * model.validation["polynomial of degree 2"]


def test_a_model_that_is_worse_than_the_mean_says_so():
    noise = made(12, lambda rng, *rest: rng.normal(size=12))
    useless = agents.SentenceRewardSearch((replace(TINY, steps=300, look_every=1_000, learning_rate=3e-2),))
    with pytest.warns(agents.TrainingWarning, match="that of predicting the mean.*Record more rounds"):
        useless.fit(noise)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SEARCH.fit(made(80, bilinear))


@pytest.mark.parametrize("value", [0.0, 0.3, -1e4])
def test_constant_rewards_are_told_and_predicted(value):
    log = made(40, lambda rng, *rest: np.full(40, value))
    for source in (agents.PolynomialRidge(1), agents.PolynomialRidge(2), TINY):
        with pytest.warns(agents.TrainingWarning, match=r"all 40 rewards are .* cannot tell sentences apart"):
            model = agents.SentenceRewardSearch((source,)).fit(log)
        predicted = predict(model, side_by_side(log.contexts), log.output[:, None], 1.0)
        assert np.isfinite(predicted).all()
        assert all(np.isfinite(number) for number in model.validation.values())
        if source is not TINY:
            np.testing.assert_allclose(predicted, value, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::agents.TrainingWarning")
@pytest.mark.parametrize("level", [0.0, 0.3, 123.4])
def test_columns_that_never_vary_do_no_harm(level):
    """A constant column may be a little off constant in single precision: it must not be blown up to unit variance."""
    log = made(60, bilinear)
    flat = replace(log, context=np.concatenate([log.context, np.full((60, 1), level)], axis=1))
    for source in (agents.PolynomialRidge(1), TINY):
        (model,) = source.fit_many([flat])
        moved = side_by_side(flat.contexts)
        found = predict(model, moved, flat.output[:, None])
        moved[:, 2] = level + 5
        np.testing.assert_allclose(predict(model, moved, flat.output[:, None]), found, atol=1e-4)
        assert np.abs(found).max() < 20


@pytest.mark.parametrize("source", [agents.PolynomialRidge(2), TINY], ids=["polynomial", "networks"])
def test_models_save_and_load_with_the_same_bits(source, tmp_path):
    log = made(40, bilinear)
    (model,) = source.fit_many([log])
    again = agents.load_rewards(model.save(tmp_path))
    assert type(again) is type(model)
    assert again.validation == model.validation
    assert again.members == model.members
    outputs = Outputs(log.output)
    np.testing.assert_array_equal(again(log.contexts, outputs), model(log.contexts, outputs))


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda log: agents.PolynomialRidge(3), ConfigError, "degree"),
        (lambda log: agents.PolynomialRidge(members=0), ConfigError, "members"),
        (lambda log: agents.NetworkEnsemble(hidden=()), ConfigError, "hidden"),
        (lambda log: agents.NetworkEnsemble(folds=1), ConfigError, "folds"),
        (lambda log: agents.NetworkEnsemble(look_every=0), ConfigError, "look_every"),
        (lambda log: agents.NetworkEnsemble(patience=0), ConfigError, "patience"),
        (lambda log: agents.NetworkEnsemble(steps=0), ConfigError, "steps"),
        (lambda log: agents.NetworkEnsemble(weight_decay=-1.0), ConfigError, "weight_decay"),
        (lambda log: agents.SentenceRewardSearch(()), ConfigError, "candidates: expected at least one"),
        (
            lambda log: agents.SentenceRewardSearch((agents.PolynomialRidge(1), agents.PolynomialRidge(1, members=2))),
            ConfigError,
            "candidates: expected different ones",
        ),
        (lambda log: SEARCH.fit(replace(log, output=log.output[:, :0])), DataError, "log has no outputs"),
        (lambda log: agents.PolynomialRidge().fit_many([log.take(slice(2))]), DataError, "at least 3 rounds, got 2"),
        (lambda log: TINY.fit_many([log.take(slice(5))]), DataError, "at least 6 rounds, got 5"),
        (lambda log: SEARCH.fit_many([]), DataError, "at least one log"),
        (lambda log: SEARCH.fit_many([log], seeds=[]), ConfigError, "seeds: expected 1"),
        (
            lambda log: agents.PolynomialRidge().fit_many([log])[0](log.contexts, Outputs(log.output[:, :1])),
            DimensionError,
            "dimensions (3, 2), got (3, 1)",
        ),
        (
            lambda log: TINY.fit_many([log])[0](log.contexts, Outputs(log.output[:, :1])),
            DimensionError,
            "5 dimensions together, got 4",
        ),
    ],
)
def test_wrong_input(act, error, words):
    with pytest.raises(error) as caught:
        act(made(30, bilinear))
    assert words in str(caught.value)


def test_a_polynomial_with_too_many_features_is_refused_and_left_out_of_a_search():
    rng = np.random.default_rng(0)
    wide = LoggedDataset(
        context=rng.normal(size=(40, 2)),
        query=rng.normal(size=(40, 2)),
        action=np.zeros(40, dtype=int),
        propensity=np.ones(40),
        reward=rng.normal(size=40),
        output=rng.normal(size=(40, 96)),
        prompts=PromptSet(np.eye(1)),
    )
    with pytest.raises(ConfigError, match="5,140"):
        agents.PolynomialRidge(2).fit_many([wide])
    with pytest.warns(agents.TrainingWarning):
        found = agents.SentenceRewardSearch((agents.PolynomialRidge(1), agents.PolynomialRidge(2))).fit(wide)
    assert "polynomial of degree 2" not in found.validation
    with pytest.raises(ConfigError, match="NetworkEnsemble"):
        agents.SentenceRewardSearch((agents.PolynomialRidge(2),)).fit(wide)
