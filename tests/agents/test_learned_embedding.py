"""Learned embeddings: distances are differences of predicted reward, and everything else keeps its meaning."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

import agents
import offprompts_env as op
from agents.learners.base import Learner
from offprompts_env.errors import ConfigError, DataError, DimensionError, OffPromptsError, StorageError
from offprompts_env.simulator import Simulator
from offprompts_env.synthetic import SyntheticConfig
from offprompts_env.types import Contexts, LoggedDataset, Outputs
from tests.agents.test_learners import QUICK_CLONING, QUICK_DENSITY, SHORT, Black, identical

D_O = 20
QUICK_REWARDS = agents.PolynomialRidge(2)


@dataclass(frozen=True)
class Products:
    """``x_1 s_1 + x_2 s_2``, or its hyperbolic tangent: what else a sentence says does not matter."""

    bent: bool = False
    kind: str = "continuous"

    def mean(self, contexts: Contexts, outputs: Outputs) -> np.ndarray:
        said = np.einsum("nd,nd->n", contexts.context[:, :2], outputs.embedding[:, :2])
        return np.tanh(said) if self.bent else said

    def __call__(self, contexts: Contexts, outputs: Outputs) -> np.ndarray:
        return self.mean(contexts, outputs)

    def fit_many(self, logs, *, seeds=None) -> list[Products]:
        """Be the regression that has found the truth."""
        return [self] * len(logs)


@pytest.fixture(scope="module")
def world() -> Simulator:
    return SyntheticConfig(n_prompts=12, output_dim=D_O, seed=1).build(rewards=Products())


@pytest.fixture(scope="module")
def log(world: Simulator) -> LoggedDataset:
    return op.collect(world, agents.UniformPolicy(12), 1500, seed=0)


def pairs(log: LoggedDataset, n: int = 300) -> tuple[Contexts, np.ndarray, np.ndarray]:
    """Return rounds, and two sentences of each."""
    one, other = np.random.default_rng(0).integers(len(log), size=(2, n))
    return log.contexts.take(one), log.output[one], log.output[other]


def squared(embedding: agents.LearnedEmbedding, contexts: Contexts, s: np.ndarray, t: np.ndarray) -> np.ndarray:
    difference = embedding(contexts, Outputs(s)) - embedding(contexts, Outputs(t))
    return np.square(difference.astype(np.float64)).sum(axis=1)


def test_distances_are_mean_squared_differences_over_readers(log: LoggedDataset) -> None:
    embedding = agents.RewardEmbedding(rewards=Products(), readers=40).fit(log)
    assert embedding.readers.shape == (40, log.context.shape[1])
    assert {tuple(row) for row in embedding.readers} <= {tuple(row) for row in log.context}
    contexts, s, t = pairs(log)
    by_hand = np.zeros(len(s))
    for reader in embedding.readers:
        asked = Contexts(np.tile(reader, (len(s), 1)), contexts.query)
        by_hand += np.square(Products()(asked, Outputs(s)) - Products()(asked, Outputs(t))) / 40
    ratio = squared(embedding, contexts, s, t) / by_hand
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-3)
    # Rewards are linear in two numbers of the sentence: two directions hold all.
    assert embedding.kept == pytest.approx(1, abs=1e-9)
    assert (np.linalg.norm(embedding.directions, axis=0) > 0).sum() == D_O
    assert embedding(contexts, Outputs(s)).std(axis=0)[2:].max() < 1e-4


def test_distances_of_a_rounds_own_reader(log: LoggedDataset) -> None:
    embedding = agents.RewardEmbedding(of="round", rewards=Products(bent=True)).fit(log)
    contexts, s, t = pairs(log)
    by_hand = np.abs(Products(bent=True)(contexts, Outputs(s)) - Products(bent=True)(contexts, Outputs(t)))
    found = embedding(contexts, Outputs(s)) - embedding(contexts, Outputs(t))
    assert not found[:, 1:].any()
    scale = float(embedding.directions[0, 0])
    np.testing.assert_allclose(np.abs(found[:, 0]), abs(scale) * by_hand, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("of", ["users", "round"])
def test_logged_sentences_are_as_far_apart_as_before(log: LoggedDataset, of: str) -> None:
    """So that a bandwidth and the noise of a kernel mean what they meant."""
    embedding = agents.RewardEmbedding(of=of, rewards=Products()).fit(log)
    contexts, s, t = pairs(log, 20_000)
    raw = np.square(s - t).sum(axis=1).mean()
    assert squared(embedding, contexts, s, t).mean() == pytest.approx(raw, rel=0.1)
    embedded = embedding.log(log)
    assert embedded.output.shape == log.output.shape
    for column in ("context", "action", "reward", "propensity"):
        np.testing.assert_array_equal(getattr(embedded, column), getattr(log, column))


def test_directions_that_are_left_out_are_told() -> None:
    """With one number to say it in, an embedding keeps the one direction that tells most."""
    world = SyntheticConfig(n_prompts=12, output_dim=1, seed=1).build()
    log = op.collect(world, agents.UniformPolicy(12), 400, seed=0)

    class Waves(Products):
        def mean(self, contexts: Contexts, outputs: Outputs) -> np.ndarray:
            return np.sin(contexts.context[:, 0] * outputs.embedding[:, 0])

    embedding = agents.RewardEmbedding(rewards=Waves(), readers=30).fit(log)
    assert embedding.dim == 1
    assert 0.05 < embedding.kept < 0.99


def test_it_finds_what_matters(log: LoggedDataset, world: Simulator) -> None:
    """18 of 20 numbers of a sentence are noise: learned distances rank true differences of reward, raw ones hardly."""
    found = []
    for seed in range(4):
        own = op.collect(world, agents.UniformPolicy(12), 1500, seed=seed)
        embedding = agents.RewardEmbedding(rewards=QUICK_REWARDS).fit(own, seed=seed)
        contexts, s, t = pairs(op.collect(world, agents.UniformPolicy(12), 1500, seed=100 + seed), 1000)
        true = np.abs(Products()(contexts, Outputs(s)) - Products()(contexts, Outputs(t)))
        raw = spearmanr(np.square(s - t).sum(axis=1), true).statistic
        found.append((spearmanr(squared(embedding, contexts, s, t), true).statistic, raw))
    gain = np.subtract(*np.transpose(found))
    assert gain.mean() > 0.1
    assert gain.mean() > 6 * gain.std(ddof=1) / 2
    round_embedding = agents.RewardEmbedding(of="round", rewards=QUICK_REWARDS).fit(log)
    contexts, s, t = pairs(log, 1000)
    true = np.abs(Products()(contexts, Outputs(s)) - Products()(contexts, Outputs(t)))
    assert spearmanr(squared(round_embedding, contexts, s, t), true).statistic > 0.9


def test_embedded_is_what_one_would_do_by_hand(log: LoggedDataset, world: Simulator) -> None:
    inner = agents.DSO(steps=SHORT, density=QUICK_DENSITY, cloning=QUICK_CLONING)
    settings = agents.RewardEmbedding(rewards=agents.PolynomialRidge(2), readers=16)
    learner = agents.Embedded(inner, settings)
    assert isinstance(learner, Learner)
    policy = agents.UniformPolicy(12)
    learned = learner.fit(log, generator=world.outputs, logging_policy=policy, seed=3)
    embedding = settings.fit(log, seed=3)
    generator = agents.EmbeddedOutputs(world.outputs, embedding)
    by_hand = inner.fit(embedding.log(log), generator=generator, logging_policy=policy, seed=3)
    assert identical(learned, by_hand)
    given = agents.Embedded(inner, embedding).fit(log, generator=world.outputs, logging_policy=policy, seed=3)
    assert identical(given, by_hand)
    logs = [log.take(slice(0, 700)), log.take(slice(700, 1400))]
    more = {"generators": [world.outputs] * 2, "logging_policies": [policy] * 2, "seeds": [3, 4]}
    both = learner.fit_many(logs, **more)
    alone = learner.fit(logs[1], generator=world.outputs, logging_policy=policy, seed=4)
    for a, b in zip(both[1].network.layers, alone.network.layers, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_whatever_reads_sentences_reads_embedded_ones(log: LoggedDataset, world: Simulator) -> None:
    embedding = agents.RewardEmbedding(rewards=agents.PolynomialRidge(2)).fit(log)
    greedy = agents.Embedded(agents.SentenceGreedy(agents.SentenceModels(QUICK_REWARDS)), embedding).fit(log)
    exact = agents.Embedded(agents.ExactDSO(steps=40), embedding).fit(
        log, logging_policy=agents.UniformPolicy(12), generator=world.outputs
    )
    assert exact.probabilities(log.contexts.take(slice(4))).shape == (4, 12)
    uniform = world.policy_value(agents.UniformPolicy(12), n=2000)
    value = world.policy_value(greedy, n=2000)
    assert value.minus(uniform).value > 4 * value.minus(uniform).standard_error
    generator = agents.EmbeddedOutputs(world.outputs, embedding)
    estimate = agents.KernelIS(tau=0.5, density=QUICK_DENSITY).estimate(
        greedy, embedding.log(log), generator=generator, logging_policy=agents.UniformPolicy(12)
    )
    assert np.isfinite(estimate.value)
    drawn = generator.sample(log.contexts.take(slice(5)), log.action[:5], np.random.default_rng(0))
    raw = world.outputs.sample(log.contexts.take(slice(5)), log.action[:5], np.random.default_rng(0))
    np.testing.assert_array_equal(drawn.embedding, embedding(log.contexts.take(slice(5)), raw))


def test_nothing_but_the_log_is_read(log: LoggedDataset) -> None:
    blind = replace(log, oracle=None)
    embeddings = [agents.RewardEmbedding(rewards=QUICK_REWARDS).fit(data, seed=1) for data in (log, blind)]
    np.testing.assert_array_equal(embeddings[0].directions, embeddings[1].directions)
    other = agents.RewardEmbedding(rewards=QUICK_REWARDS).fit(log, seed=2)
    assert not np.array_equal(embeddings[0].readers, other.readers)


@pytest.mark.parametrize("of", ["users", "round"])
@pytest.mark.parametrize("rewards", [agents.PolynomialRidge(2), agents.SentenceRewardRegression(steps=SHORT)])
def test_saved_and_read_with_the_same_bits(log: LoggedDataset, tmp_path: Path, of: str, rewards: object) -> None:
    embedding = agents.RewardEmbedding(of=of, rewards=rewards).fit(log)
    embedding.save(tmp_path / "embedding")
    again = agents.load_embedding(tmp_path / "embedding")
    np.testing.assert_array_equal(again(log.contexts, log.outputs), embedding(log.contexts, log.outputs))
    assert again.kept == embedding.kept
    weights = next((tmp_path / "embedding").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(StorageError, match="is damaged"):
        agents.load_embedding(tmp_path / "embedding")


def test_bad_input(log: LoggedDataset, world: Simulator, tmp_path: Path) -> None:
    embedding = agents.RewardEmbedding(rewards=Products()).fit(log)
    with pytest.raises(OffPromptsError, match=r"of.*user"):
        agents.RewardEmbedding(of="user")
    with pytest.raises(ConfigError, match="readers"):
        agents.RewardEmbedding(readers=0)
    with pytest.raises(ConfigError, match="learner"):
        agents.Embedded("dso")
    with pytest.raises(DimensionError, match=r"outputs: expected embeddings \(1500, 20\)"):
        embedding(log.contexts, Outputs(log.output[:, :3]))
    small = SyntheticConfig(n_prompts=12, output_dim=3).build()
    with pytest.raises(DimensionError, match="expected dimension 20"):
        agents.EmbeddedOutputs(small.outputs, embedding)
    with pytest.raises(DataError, match="the log has no outputs"):
        agents.RewardEmbedding().fit(replace(log, output=np.zeros((len(log), 0), np.float32), sentence=None))

    class Indifferent(Products):
        def mean(self, contexts: Contexts, outputs: Outputs) -> np.ndarray:
            return contexts.context[:, 0]

    with pytest.raises(DataError, match="does not tell sentences apart"):
        agents.RewardEmbedding(rewards=Indifferent()).fit(log)
    with pytest.raises(ConfigError, match="Products, which cannot be saved"):
        embedding.save(tmp_path)
    with pytest.raises(ConfigError, match="pass generator="):
        agents.Embedded(agents.DSO(steps=3)).fit(log, logging_policy=agents.UniformPolicy(12))


@pytest.mark.slow
@pytest.mark.parametrize("nuisance", [True, False], ids=["nuisance", "default"])
def test_dso_learns_more_on_learned_distances(nuisance: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Eight worlds, with 18 nuisance numbers in a sentence or as registered; raw distances and learned ones."""
    settings = {"steps": 4000, "learning_rate": 1e-3, "max_sentences": 60_000, "refresh": 50}
    dso = agents.DSO(**settings, density=agents.NetworkDensity(steps=4000))
    gained: dict[str, list[float]] = {"raw": [], "users": [], "round": []}
    for seed in range(8):
        world = SyntheticConfig(seed=seed).build()
        if nuisance:
            world = SyntheticConfig(n_prompts=50, output_dim=D_O, seed=seed).build(rewards=Products())
        quick = agents.PromptRewardRegression(steps=2000)
        logging = agents.logging_policy(world, n=2000, regression=quick, seed=seed)
        log = op.collect(world, logging, 4000, seed=seed)
        learners = {
            "raw": dso,
            "users": agents.Embedded(dso, agents.RewardEmbedding(readers=16)),
            "round": agents.Embedded(dso, agents.RewardEmbedding(of="round")),
        }
        uniform = world.policy_value(agents.UniformPolicy(world.n_prompts), n=4000)
        for name, learner in learners.items():
            policy = learner.fit(log, generator=Black(world.outputs), logging_policy=logging, seed=seed)
            gain = world.policy_value(policy, n=4000).minus(uniform).value
            # What can be gained differs between worlds: as registered, all rewards are exact, and so is their share.
            gained[name].append(gain if nuisance else op.Truth.exact(world, 4000).optimality(policy))
    found = {name: np.array(values) for name, values in gained.items()}
    with capsys.disabled():
        for name, values in found.items():
            over = values - found["raw"]
            error, of_gain = values.std(ddof=1) / 8**0.5, over.std(ddof=1) / 8**0.5
            print(f"\n{name}: {values.mean():.3f} ± {error:.3f}, over raw {over.mean():.3f} ± {of_gain:.3f}")
    for name in ("users", "round"):
        over = found[name] - found["raw"]
        assert over.mean() > 3 * over.std(ddof=1) / 8**0.5
