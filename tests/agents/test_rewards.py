from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import agents
from offprompts_env.errors import ConfigError, DataError, DimensionError, StorageError
from offprompts_env.synthetic import SyntheticConfig
from offprompts_env.types import Outputs


def test_regressions_learn_the_expected_reward(simulator, log):
    settings = {"steps": 6_000, "learning_rate": 2e-3}
    prompt = agents.PromptRewardRegression(**settings).fit(log)
    sentence = agents.SentenceRewardRegression(**settings).fit(log)
    contexts = simulator.evaluation_contexts(2_000)
    truth = simulator.expected_rewards(contexts)
    assert np.mean((prompt(contexts) - truth) ** 2) < 0.3 * truth.var()
    actions = np.arange(2_000) % 12
    outputs = simulator.outputs.sample(contexts, actions, np.random.default_rng(0))
    expected = simulator.rewards.mean(contexts, outputs)
    assert np.mean((sentence(contexts, outputs) - expected) ** 2) < 0.2 * expected.var()
    for model in (prompt, sentence):
        assert model.validation["error"] < model.validation["baseline"]
        assert model.validation["rounds"] == 400


def test_a_useless_model_says_so(log):
    noise = replace(log.take(slice(60)), reward=np.random.default_rng(0).normal(size=60))
    with pytest.warns(agents.TrainingWarning, match="Record more rounds"):
        agents.PromptRewardRegression(steps=4_000, learning_rate=1e-2).fit(noise)


def test_without_held_out_rounds_the_error_is_unknown(log):
    model = agents.PromptRewardRegression(steps=10, train_fraction=1.0).fit(log)
    assert np.isnan(model.validation["error"])


@pytest.mark.filterwarnings("ignore::agents.TrainingWarning")
def test_models_of_other_dimensions(log):
    prompt = agents.PromptRewardRegression(steps=10).fit(log)
    sentence = agents.SentenceRewardRegression(steps=10).fit(log)
    wide = replace(log, context=np.ones((len(log), 6))).contexts
    with pytest.raises(DimensionError, match="reward model"):
        prompt(wide)
    with pytest.raises(DimensionError, match="network"):
        sentence(wide, Outputs(log.output))
    other = replace(prompt, catalogue="0" * 64)
    with pytest.raises(DimensionError, match="fingerprint"):
        agents.RegressionPG(steps=1, rewards=agents.FittedRewards((other,))).fit(log)


@pytest.mark.filterwarnings("ignore::agents.TrainingWarning")
def test_pessimism_lowers_what_was_never_logged(log):
    """Prompts 6 to 11 are unknown to the log: a pessimist thinks less of them, and no less of the logged ones."""
    known = log.take(log.action < 6)
    models = [
        agents.PromptRewardRegression(steps=2_000, learning_rate=2e-3, pessimism=pessimism).fit(known)
        for pessimism in (0.0, 0.1)
    ]
    plain, careful = (model(log.contexts).mean(axis=0) for model in models)
    gaps = [scores[6:].mean() - scores[:6].mean() for scores in (plain, careful)]
    assert gaps[1] < gaps[0] - 0.1
    assert abs(careful[:6].mean() - plain[:6].mean()) < 0.1


@pytest.mark.filterwarnings("ignore::agents.TrainingWarning")
@pytest.mark.parametrize(
    "regression",
    [
        agents.PromptRewardRegression(steps=50, pessimism=0.1),
        agents.TwoStepRegression(agents.SentenceRewardRegression(steps=50), agents.PromptRewardRegression(steps=50)),
    ],
    ids=["pessimistic", "two-step"],
)
def test_a_world_is_fitted_the_same_alone_and_in_a_stack(regression, log):
    logs = [log.take(slice(0, 300)), log.take(slice(300, 700))]
    together = regression.fit_many(logs, seeds=[3, 4])
    for single, own, seed in zip(together, logs, [3, 4], strict=True):
        (alone,) = regression.fit_many([own], seeds=[seed])
        assert all(np.array_equal(a, b) for a, b in zip(alone.network.layers, single.network.layers, strict=True))


@pytest.mark.filterwarnings("ignore::agents.TrainingWarning")
def test_two_steps_learn_from_predictions_of_sentences(simulator, log):
    """With a true sentence model the targets are the noiseless means; with a generator, of unlogged prompts as well."""
    noisy = replace(log, reward=log.reward + np.random.default_rng(0).normal(scale=2, size=len(log)))
    known = noisy.take(noisy.action < 6)
    true = agents.FittedSentenceRewards((simulator.rewards.mean,))
    prompts = agents.PromptRewardRegression(steps=5_000, learning_rate=2e-3)
    contexts = simulator.evaluation_contexts(1_000)
    truth = simulator.expected_rewards(contexts)

    def error(source, columns: slice) -> float:
        (model,) = source.fit_many([known])
        return float(np.mean((model(contexts) - truth)[:, columns] ** 2) / truth[:, columns].var())

    logged, unlogged = slice(0, 6), slice(6, 12)
    two_steps = agents.TwoStepRegression(true, prompts)
    assert error(two_steps, logged) < 0.5 * error(prompts, logged)
    generated = replace(two_steps, generators=(simulator.outputs,), n_generated=2_000)
    assert error(generated, unlogged) < 0.3
    assert error(generated, unlogged) < 0.5 * error(two_steps, unlogged)


@pytest.mark.filterwarnings("ignore::agents.TrainingWarning")
def test_one_generator_serves_all_folds_of_a_log(simulator, log):
    quick = (agents.SentenceRewardRegression(steps=20), agents.PromptRewardRegression(steps=20))
    source = agents.TwoStepRegression(*quick, (simulator.outputs,), n_generated=50)
    estimate = agents.DR(source, folds=3).estimate(agents.UniformPolicy(12), log.take(slice(60)))
    assert np.isfinite(estimate.value)


@pytest.mark.filterwarnings("ignore::agents.TrainingWarning")
def test_models_load_back_with_the_same_bits(log, tmp_path):
    prompt = agents.PromptRewardRegression(steps=10).fit(log)
    sentence = agents.SentenceRewardRegression(steps=10).fit(log)
    for model, arguments in ((prompt, (log.contexts,)), (sentence, (log.contexts, Outputs(log.output)))):
        again = agents.load_rewards(model.save(tmp_path / type(model).__name__))
        assert type(again) is type(model)
        assert again.validation == model.validation
        assert np.array_equal(again(*arguments), model(*arguments))
    assert agents.load_rewards(tmp_path / "PromptRewards").catalogue == log.prompts.fingerprint
    unknown = agents.PromptRewardRegression(steps=10, train_fraction=1.0).fit(log)
    assert np.isnan(agents.load_rewards(unknown.save(tmp_path / "nan")).validation["error"])


def test_wrong_files(log, tmp_path):
    with pytest.raises(StorageError, match=r"reward model: expected a directory .* rewards\.json"):
        agents.load_rewards(tmp_path)
    agents.UniformPolicy(3).save(tmp_path)
    (tmp_path / "policy.json").rename(tmp_path / "rewards.json")
    with pytest.raises(ConfigError, match=r"unknown reward model 'UniformPolicy'.*PromptRewards"):
        agents.load_rewards(tmp_path)


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda log: agents.PromptRewardRegression(pessimism=-0.1), ConfigError, "pessimism"),
        (lambda log: agents.PromptRewardRegression(pessimism=float("nan")), ConfigError, "pessimism"),
        (lambda log: agents.TwoStepRegression(n_generated=0), ConfigError, "n_generated"),
        (lambda log: agents.TwoStepRegression(generators=()).fit_many([log]), ConfigError, "generators: expected 1"),
        (
            lambda log: agents.TwoStepRegression(generators=(SyntheticConfig(n_prompts=12).build().outputs,)).fit_many(
                [log]
            ),
            DimensionError,
            "generator: expected prompts with fingerprint",
        ),
        (lambda log: agents.FittedSentenceRewards(()).fit_many([log]), ConfigError, "models: expected 1"),
        (
            lambda log: agents.TwoStepRegression().fit_many([replace(log, output=log.output[:, :0])]),
            DataError,
            "no outputs",
        ),
    ],
)
def test_wrong_input(act, error, words, log):
    with pytest.raises(error) as caught:
        act(log)
    assert words in str(caught.value)
