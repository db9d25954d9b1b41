from __future__ import annotations

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import agents
import offprompts_env as op
from agents.networks import MLP
from agents.policies import softmax
from offprompts_env.errors import ConfigError, DimensionError, NumericalError, StorageError
from offprompts_env.sampling import sample_actions
from offprompts_env.simulator import Simulator
from offprompts_env.types import LoggedDataset, Policy, PromptSet


@pytest.fixture(scope="module")
def policies(simulator: Simulator, log: LoggedDataset) -> dict[str, Policy]:
    model = agents.PromptRewardRegression(steps=200).fit(log)
    clusters = agents.PromptClusters(np.array([2, 0, 1, 0, 0, 2, 0, 1, 0, 0, 2, 0]), np.eye(3), model.catalogue)
    first = agents.BehaviorCloning(steps=20).fit(replace(log, action=log.action % 3, prompts=PromptSet(np.eye(3))))
    first = replace(first, catalogue=None)
    return {
        "uniform": agents.UniformPolicy(12, model.catalogue),
        "constant": agents.ConstantPolicy(3, 12),
        "softmax": agents.SoftmaxPolicy(model, 12, beta=2.5, catalogue=model.catalogue),
        "epsilon": agents.EpsilonGreedyPolicy(model, 12, epsilon=0.1),
        "neural": agents.ImportanceSamplingPG(steps=20).fit(log),
        "two-stage greedy": agents.TwoStagePolicy(first, agents.SecondStage(clusters, model)),
        "two-stage softmax": agents.TwoStagePolicy(
            agents.SoftmaxPolicy(replace(model, embeddings=model.embeddings[:3], catalogue=None), 3, beta=-2.0),
            agents.SecondStage(clusters, model, beta=3.0),
        ),
    }


pytestmark = pytest.mark.filterwarnings("ignore::agents.TrainingWarning")
KINDS = ["uniform", "constant", "softmax", "epsilon", "neural", "two-stage greedy", "two-stage softmax"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_is_a_pmf_and_samples_from_it(kind, policies, log):
    policy, contexts = policies[kind], log.contexts.take(slice(4)).repeat(5_000)
    pmf = policy.probabilities(contexts)
    assert isinstance(policy, Policy)
    assert pmf.shape == (20_000, 12)
    np.testing.assert_allclose(pmf.sum(1), 1, atol=1e-5)
    assert pmf.min() >= 0
    actions, propensities = sample_actions(policy, contexts, np.random.default_rng(0))
    np.testing.assert_allclose(propensities, pmf[np.arange(20_000), actions], rtol=1e-6)
    for start in range(0, 20_000, 5_000):
        found = np.bincount(actions[start : start + 5_000], minlength=12) / 5_000
        assert np.abs(found - pmf[start]).max() < 0.04


@pytest.mark.parametrize("kind", KINDS)
def test_policies_load_back_with_the_same_bits(kind, policies, log, tmp_path):
    policy = policies[kind]
    again = agents.load_policy(policy.save(tmp_path / "p"), log.prompts)
    assert type(again) is type(policy)
    assert np.array_equal(again.probabilities(log.contexts), policy.probabilities(log.contexts))


@pytest.mark.parametrize("kind", ["two-stage greedy", "two-stage softmax"])
def test_a_two_stage_policy_is_the_product_of_its_stages(kind, policies, log):
    policy, contexts = policies[kind], log.contexts.take(slice(40))
    labels = policy.second.clusters.labels
    pmf, chances = policy.probabilities(contexts), policy.first.probabilities(contexts)
    scores, values = policy.second.rewards(contexts), policy.second.values(contexts)
    for cluster in range(3):
        members = np.flatnonzero(labels == cluster)
        np.testing.assert_allclose(pmf[:, members].sum(1), chances[:, cluster], rtol=1e-5)
        inner = scores[:, members]
        if policy.second.beta is None:
            expected = np.eye(len(members))[inner.argmax(1)]
            np.testing.assert_allclose(values[:, cluster], inner.max(1), rtol=1e-5)
        else:
            expected = softmax(policy.second.beta * inner)
            np.testing.assert_allclose(values[:, cluster], (expected * inner).sum(1), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(pmf[:, members], chances[:, [cluster]] * expected, rtol=1e-4, atol=1e-7)


def test_a_two_stage_policy_samples_without_scoring_all_prompts(policies, log, monkeypatch):
    scored = []
    call = agents.PromptRewards.__call__
    monkeypatch.setattr(
        agents.PromptRewards,
        "__call__",
        lambda model, contexts: scored.append(len(contexts) * model.n_prompts) or call(model, contexts),
    )
    policy = policies["two-stage greedy"]
    actions, _ = policy.sample(log.contexts.take(slice(100)), np.random.default_rng(0))
    assert sum(scored) == sum(
        (policy.second.clusters.labels == c).sum() for c in policy.second.clusters.labels[actions]
    )


def test_all_prompts_are_scored_as_one_by_one(policies, log):
    model = policies["softmax"].scores
    contexts = log.contexts.take(slice(50))
    scores = model(contexts)
    for action in range(12):
        one = model.chosen(contexts, np.full(50, action))
        np.testing.assert_allclose(scores[:, action], one, rtol=1e-4, atol=1e-5)


def test_oracle_is_best(simulator, policies):
    best = simulator.policy_value(agents.OraclePolicy(simulator)).value
    assert all(best > simulator.policy_value(policy).value for policy in policies.values())


def test_extreme_scores_do_not_overflow(log):
    policy = agents.SoftmaxPolicy(lambda contexts: np.tile([1e5, -1e5, 0.0], (len(contexts), 1)), 3)
    np.testing.assert_array_equal(policy.probabilities(log.contexts)[0], [1, 0, 0])


def second_stage(n_prompts: int = 3, beta: float | None = None) -> agents.SecondStage:
    model = agents.PromptRewards(MLP((np.zeros((4, 1), dtype=np.float32),)), np.zeros((n_prompts, 1), dtype=np.float32))
    return agents.SecondStage(agents.PromptClusters(np.array([0, 1, 0]), np.zeros((2, 1))), model, beta)


class Foreign:
    n_prompts = 2

    def probabilities(self, contexts):
        return np.full((len(contexts), 2), 0.5)


@pytest.mark.parametrize("kind", [agents.EpsilonGreedyPolicy, agents.SoftmaxPolicy])
def test_a_score_that_is_nan_is_an_error_not_the_best(kind, log):
    policy = kind(lambda contexts: np.tile([0.0, np.nan, 1.0], (len(contexts), 1)), 3)
    with pytest.raises(NumericalError, match="NaN in row 0"):
        sample_actions(policy, log.contexts, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: agents.UniformPolicy(0), "n_prompts"),
        (lambda: agents.ConstantPolicy(5, 5), "action"),
        (lambda: agents.SoftmaxPolicy(len, 5, beta=float("inf")), "beta"),
        (lambda: agents.EpsilonGreedyPolicy(len, 5, epsilon=1.5), "epsilon"),
        (lambda: agents.EpsilonGreedyPolicy(len, 5, epsilon=-0.5), "epsilon"),
        (lambda: agents.SoftmaxPolicy(len, 5).save("nowhere"), "BehaviorCloning"),
        (lambda: agents.TwoStagePolicy(agents.UniformPolicy(3), second_stage()), "over 2 clusters, got one over 3"),
        (lambda: second_stage(beta=float("nan")), "beta"),
        (lambda: second_stage(n_prompts=4), "reward model's 4 prompts, got 3"),
        (lambda: agents.TwoStagePolicy(Foreign(), second_stage()).save("nowhere"), "first: .*BehaviorCloning"),
    ],
)
def test_wrong_settings(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_wrong_files(policies, log, tmp_path):
    with pytest.raises(StorageError, match=r"policy\.json"):
        agents.load_policy(tmp_path)
    path = policies["neural"].save(tmp_path / "p")
    with pytest.raises(DimensionError, match="fingerprint"):
        agents.load_policy(path, PromptSet(log.prompts.embeddings + 1))
    with pytest.raises(DimensionError, match="expected 3 prompts"):
        agents.load_policy(path, PromptSet(log.prompts.embeddings[:3]))
    description = json.loads((path / "policy.json").read_text())
    for change, error in (({"format_version": 99}, StorageError), ({"kind": "NeuralPolicies"}, ConfigError)):
        (path / "policy.json").write_text(json.dumps(description | change))
        with pytest.raises(error):
            agents.load_policy(path)
    (path / "policy.json").write_text(json.dumps(description))
    weights = path / description["weights"]
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(StorageError, match=r"damaged: expected SHA-256 .*; save the policy again"):
        agents.load_policy(path)
    weights.unlink()
    with pytest.raises(StorageError, match=r"damaged: FileNotFoundError.*policy-"):
        agents.load_policy(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        policies["neural"].save(tmp_path / "file")


@pytest.mark.parametrize("writes", range(6))
def test_a_kill_or_a_full_disk_leaves_the_old_policy_or_the_new_one(policies, log, tmp_path, monkeypatch, writes):
    old, new = policies["neural"], agents.ImportanceSamplingPG(steps=20).fit(log, seed=1)
    old.save(tmp_path / "p")
    left = iter(range(writes))

    def fails(step):
        def run(*arguments, **settings):
            if next(left, None) is None:
                raise OSError(28, "No space left on device")
            return step(*arguments, **settings)

        return run

    for owner, name in ((Path, "replace"), (Path, "unlink"), (os, "fsync")):
        monkeypatch.setattr(owner, name, fails(getattr(owner, name)))
    with contextlib.suppress(StorageError, OSError):
        new.save(tmp_path / "p")
    monkeypatch.undo()
    found = agents.load_policy(tmp_path / "p").probabilities(log.contexts)
    assert any(np.array_equal(found, policy.probabilities(log.contexts)) for policy in (old, new))
    new.save(tmp_path / "p")
    assert np.array_equal(
        agents.load_policy(tmp_path / "p").probabilities(log.contexts), new.probabilities(log.contexts)
    )
    assert len(list((tmp_path / "p").glob("policy-*.safetensors"))) == 1


def test_a_tempered_network_is_a_power_of_the_policy(policies, log):
    policy, contexts = policies["neural"], log.contexts.take(slice(50))
    pmf = policy.probabilities(contexts).astype(np.float64)
    for beta in (0.0, 0.2, 1.0, 3.0):
        power = pmf**beta
        np.testing.assert_allclose(
            policy.tempered(beta).probabilities(contexts), power / power.sum(1, keepdims=True), rtol=1e-4
        )
    assert policy.tempered(0.5).catalogue == policy.catalogue
    np.testing.assert_array_equal(policy.probabilities(contexts).astype(np.float64), pmf)
    for beta in (float("inf"), 1e39):
        with pytest.raises(ConfigError, match="beta"):
            policy.tempered(beta)


def test_the_published_logging_policy_on_text_is_worth_less_than_what_it_softens(simulator):
    quick = agents.OnlinePG(steps=300, learning_rate=5e-3)
    soft = agents.online_logging_policy(simulator, online=quick, seed=3)
    sharp = agents.online_logging_policy(simulator, online=quick, seed=3, beta=1.0)
    contexts = simulator.contexts.sample(200, np.random.default_rng(0))
    for left, right in zip(soft.network.layers[:-1], sharp.network.layers[:-1], strict=True):
        np.testing.assert_array_equal(left, right)
    np.testing.assert_allclose(soft.network.layers[-1], 0.2 * sharp.network.layers[-1], rtol=1e-6)
    # What is learned online with the same seed is another policy than the one behind the log.
    assert not np.array_equal(sharp.logits(contexts), quick.fit(simulator, seed=3).logits(contexts))
    truth = op.Truth.exact(simulator)
    uniform = truth.value(agents.UniformPolicy(simulator.n_prompts)).value
    assert uniform < truth.value(soft).value < truth.value(sharp).value
