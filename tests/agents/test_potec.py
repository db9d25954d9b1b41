from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import agents
import offprompts_env as op
from agents.feeds import LoggedRounds
from agents.learners.potec import _Rounds
from agents.networks import MLP, StackedMLP
from agents.training import StackedLogs
from offprompts_env.errors import ConfigError, DimensionError, PropensityError
from offprompts_env.synthetic import SyntheticConfig

pytestmark = pytest.mark.filterwarnings("ignore::agents.TrainingWarning")

SHORT = 60
QUICK_REWARDS = agents.PromptRewardRegression(steps=SHORT)
QUICK = agents.POTEC(steps=SHORT, rewards=QUICK_REWARDS, clusters=agents.EmbeddingClusters(4))


def weights(policy: agents.TwoStagePolicy) -> list[np.ndarray]:
    return list(policy.first.scores.network.layers)


@pytest.mark.parametrize("n_prompts", [3, 20])
def test_a_world_learns_the_same_alone_and_in_a_stack(n_prompts):
    simulators = [SyntheticConfig.preset("paper_code", n_prompts=n_prompts, seed=seed).build() for seed in range(3)]
    logging = [agents.UniformPolicy(n_prompts)] * 3
    logs = [op.collect(s, p, 90 + 13 * i, seed=i) for i, (s, p) in enumerate(zip(simulators, logging, strict=True))]
    together = QUICK.fit_many(logs, logging_policies=logging, seeds=[7, 8, 9])
    for world, seed in enumerate([7, 8, 9]):
        alone = QUICK.fit(logs[world], logging_policy=logging[world], seed=seed)
        assert all(np.array_equal(a, b) for a, b in zip(weights(alone), weights(together[world]), strict=True))
        assert np.array_equal(alone.second.clusters.labels, together[world].second.clusters.labels)


def test_a_seed_names_a_run(log):
    uniform = agents.UniformPolicy(12)
    first, again, other = (QUICK.fit(log, logging_policy=uniform, seed=seed) for seed in (1, 1, 2))
    contexts = log.contexts.take(slice(50))
    assert np.array_equal(first.probabilities(contexts), again.probabilities(contexts))
    assert not np.array_equal(first.probabilities(contexts), other.probabilities(contexts))


def test_what_the_first_stage_reads_of_a_round(log):
    """Cluster propensities, residuals and values against their definitions, under a logging policy that prefers."""
    model = QUICK_REWARDS.fit(log)
    clusters = agents.PromptClusters(np.arange(12) % 3, np.eye(3)[:, :2])
    second = agents.SecondStage(clusters, model)
    logging = agents.SoftmaxPolicy(model, 12, beta=5.0)
    stack = StackedLogs([log])
    feed = _Rounds(stack, [second], [logging], LoggedRounds(stack, [0], "POTEC", 16))
    network = StackedMLP(1, (feed.n_inputs, 4, 1))
    pmf, predicted = logging.probabilities(log.contexts), model(log.contexts)
    for batch, plain in zip(
        feed.block(5, network), LoggedRounds(stack, [0], "POTEC", 16).block(5, network), strict=True
    ):
        rows = plain.rows[0].numpy()
        labels = log.action[rows] % 3
        assert batch.clusters[0].tolist() == labels.tolist()
        own = np.stack([pmf[rows][:, c::3].sum(1) for c in range(3)], axis=1)
        np.testing.assert_allclose(batch.propensity[0], own[np.arange(16), labels], rtol=1e-5)
        residual = log.reward[rows] - predicted[rows, log.action[rows]]
        np.testing.assert_allclose(batch.residual[0], residual, atol=1e-5)
        best = np.stack([predicted[rows][:, c::3].max(1) for c in range(3)], axis=1)
        np.testing.assert_allclose(batch.values[0], best, rtol=1e-4, atol=1e-6)
        inputs = batch.inputs.view(16, 3, -1)
        assert torch.equal(inputs[:, :, :-3], stack.inputs[rows][:, None, :-1].expand(-1, 3, -1))
        assert torch.equal(inputs[:, :, -3:-1], torch.eye(3)[:, :2].expand(16, -1, -1))
        assert (inputs[..., -1] == 1).all()


def test_it_learns_in_an_easy_world(simulator, log):
    """Well above the greedy policy of a reward model that only ranks prompts within clusters."""
    uniform = simulator.policy_value(agents.UniformPolicy(12)).value
    best = simulator.policy_value(agents.OraclePolicy(simulator)).value
    rewards = agents.PromptRewardRegression(steps=3_000, learning_rate=3e-3)
    settings = {"steps": 1_500, "learning_rate": 5e-3, "rewards": rewards}
    for clusters in (agents.EmbeddingClusters(4), agents.OutputClusters(4)):
        learner = agents.POTEC(**settings, clusters=clusters)
        policy = learner.fit(log, generator=simulator.outputs, logging_policy=agents.UniformPolicy(12))
        assert simulator.policy_value(policy).value > uniform + 0.5 * (best - uniform)


def test_the_log_corrects_a_model_that_is_wrong_between_clusters(simulator, log):
    """q̂ = 0 says nothing of clusters of one prompt each: what is learned comes from the weighted rewards alone."""
    model = QUICK_REWARDS.fit(log)
    silent = replace(model, network=MLP(tuple(np.zeros_like(layer) for layer in model.network.layers)))
    learner = agents.POTEC(
        steps=1_500,
        learning_rate=5e-3,
        rewards=agents.FittedRewards((silent,)),
        clusters=agents.KnownClusters((agents.PromptClusters(np.arange(12), log.prompts.embeddings),)),
    )
    uniform = simulator.policy_value(agents.UniformPolicy(12)).value
    best = simulator.policy_value(agents.OraclePolicy(simulator)).value
    policy = learner.fit(log, logging_policy=agents.UniformPolicy(12))
    assert simulator.policy_value(policy).value > uniform + 0.4 * (best - uniform)


def test_callback_watches_and_stops(log):
    seen = []

    def on_step(step, policies):
        seen.append((step, policies[0].probabilities(log.contexts.take(slice(3)))))
        return step == 40

    policy = QUICK.fit(
        log, logging_policy=agents.UniformPolicy(12), callback=agents.Callback(every=20, on_step=on_step)
    )
    assert [step for step, _ in seen] == [20, 40]
    np.testing.assert_array_equal(policy.probabilities(log.contexts.take(slice(3))), seen[-1][1])


def test_a_missing_logging_policy_is_cloned(log):
    learner = replace(QUICK, cloning=agents.BehaviorCloning(steps=SHORT))
    with pytest.warns(agents.AssumptionWarning, match="agents.POTEC: no logging policy"):
        learner.fit(replace(log, propensity=np.full(len(log), np.nan)))


def test_one_prompt():
    simulator = SyntheticConfig(n_prompts=1).build()
    log = op.collect(simulator, agents.UniformPolicy(1), 50)
    policy = QUICK.fit(log, logging_policy=agents.UniformPolicy(1))
    assert (policy.probabilities(log.contexts) == 1).all()


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda log: agents.POTEC(clip=0.0), ConfigError, "clip"),
        (lambda log: agents.POTEC(beta=float("inf")), ConfigError, "beta"),
        (lambda log: agents.POTEC(hidden=()), ConfigError, "hidden"),
        (
            lambda log: QUICK.fit(log, logging_policy=agents.ConstantPolicy(0, 12)),
            PropensityError,
            "did not record this log",
        ),
        (
            lambda log: replace(
                QUICK,
                clusters=agents.KnownClusters(
                    tuple(agents.PromptClusters(np.arange(12) % k, np.zeros((k, 2))) for k in (2, 3))
                ),
            ).fit_many([log, log], logging_policies=[agents.UniformPolicy(12)] * 2),
            DimensionError,
            "fit them one by one",
        ),
    ],
)
def test_wrong_input(act, error, words, log):
    with pytest.raises(error) as caught:
        act(log)
    assert words in str(caught.value)
