from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import agents
from offprompts_env.errors import DimensionError
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
