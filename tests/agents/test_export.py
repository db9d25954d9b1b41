"""Policies out: files that serve with nothing but torch, and an object with Stable-Baselines3's predict."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import agents
from agents.adapters.predictor import Predictor
from agents.clustering import PromptClusters
from agents.export import describe_export, export_policy
from agents.hierarchical import HierarchicalPolicy, PromptTree
from agents.networks import MLP
from agents.policies import NeuralPolicy
from agents.rewards import PromptRewards
from agents.sentence_rewards import NetworkRewards
from agents.sentences import KnownSentences, SentenceScores
from offprompts_env.errors import (
    ConfigError,
    DataError,
    DimensionError,
    NumericalError,
    StorageError,
)
from offprompts_env.simulator import Simulator
from offprompts_env.types import Contexts, LoggedDataset, Policy
from offprompts_env.wrappers import FlatObservation

A, D_X, D_Q, D_E = 12, 5, 5, 5
KINDS = (
    "uniform",
    "constant",
    "neural",
    "deep neural",
    "softmax",
    "epsilon greedy",
    "tilted",
    "two-stage greedy",
    "two-stage soft",
    "two-stage of one cluster each",
    "hierarchical",
    "sentence greedy, known",
    "sentence greedy, learned",
    "sentence greedy, queries that never repeat",
    "sentence greedy, with prompts",
    "sentence greedy, networks",
    "sentence greedy, pessimistic",
)


def network(*sizes: int, seed: int = 0) -> MLP:
    rng = np.random.default_rng(seed)
    return MLP(
        tuple(
            (rng.standard_normal((below + 1, above)) * below**-0.5).astype(np.float32)
            for below, above in pairwise(sizes)
        )
    )


@pytest.fixture(scope="module")
def policies(log: LoggedDataset, simulator: Simulator) -> dict[str, Policy]:
    embeddings, catalogue = log.prompts.embeddings, log.prompts.fingerprint
    rewards = PromptRewards(network(D_X + D_Q + D_E, 16, 8, 1), embeddings, catalogue)
    labels = np.array([0, 1, 2, 0, 1, 0, 0, 2, 0, 1, 0, 0])
    stages = agents.SecondStage(PromptClusters(labels, np.zeros((3, 1))), rewards)
    singles = agents.SecondStage(PromptClusters(np.arange(A)[::-1], np.zeros((A, 1))), rewards, beta=1.0)
    first = NeuralPolicy(network(D_X + D_Q, 8, 3))
    polynomial = agents.SentenceModels(agents.SentenceRewardSearch((agents.PolynomialRidge(2),)))
    # Queries that repeat have an offset of their own.
    repeated = replace(log, query=log.query[np.arange(len(log)) % 20])
    learned, joined = (
        agents.SentenceGreedy(replace(polynomial, prompt_embedding=whether), epsilon=0.1).fit(repeated)
        for whether in (False, True)
    )
    known = agents.SentenceGreedy(polynomial).fit(log, generator=simulator.outputs)
    d_o = joined.scores.sentences.output_dim
    ensemble = NetworkRewards(tuple(network(D_X + D_Q + d_o, 8, 1, seed=seed) for seed in range(3)))
    return {
        "uniform": agents.UniformPolicy(A),
        "constant": agents.ConstantPolicy(7, A, catalogue),
        "neural": NeuralPolicy(network(D_X + D_Q, 32, A), catalogue),
        "deep neural": NeuralPolicy(network(D_X + D_Q, 8, 8, 8, A)),
        "softmax": agents.SoftmaxPolicy(rewards, A, 3.0, catalogue),
        "epsilon greedy": agents.EpsilonGreedyPolicy(rewards, A, 0.2),
        "tilted": agents.TiltedPolicy(rewards, 2.0, network(D_X + D_Q, 8, A)),
        "two-stage greedy": agents.TwoStagePolicy(first, stages),
        "two-stage soft": agents.TwoStagePolicy(first, replace(stages, beta=2.0)),
        "two-stage of one cluster each": agents.TwoStagePolicy(NeuralPolicy(network(D_X + D_Q, A)), singles),
        # 12 prompts in 5 groups: some have 3 members, some 2.
        "hierarchical": HierarchicalPolicy(
            network(D_X + D_Q, 8, 2 * D_E), catalogue, tree=PromptTree.arrange(embeddings, 5)
        ),
        "sentence greedy, known": known,
        "sentence greedy, learned": learned,
        "sentence greedy, queries that never repeat": agents.SentenceGreedy(polynomial).fit(log),
        "sentence greedy, with prompts": joined,
        "sentence greedy, networks": agents.SoftmaxPolicy(SentenceScores(ensemble, joined.scores.sentences), A),
        "sentence greedy, pessimistic": agents.SoftmaxPolicy(replace(learned.scores, pessimism=1.5), A, 2.0),
    }


def rounds(n: int, log: LoggedDataset, seed: int = 0) -> Contexts:
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((n, D_Q)).astype(np.float32)
    # Half of the queries are known ones.
    query[::2] = log.query[rng.integers(20, size=len(query[::2]))]
    return Contexts(rng.standard_normal((n, D_X)), query)


@pytest.fixture(scope="module")
def exported(policies: dict[str, Policy], log: LoggedDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("exported")
    assert set(policies) == set(KINDS)
    for name, policy in policies.items():
        export_policy(policy, directory / f"{name}.pt2", contexts=log.contexts, prompts=log.prompts)
    return directory


def serve(path: Path, contexts: Contexts) -> np.ndarray:
    return run(torch.export.load(path).module(), contexts)


def run(program: Any, contexts: Contexts) -> np.ndarray:
    with torch.no_grad():
        return program(torch.from_numpy(contexts.context), torch.from_numpy(contexts.query)).numpy()


@pytest.mark.parametrize("name", KINDS)
def test_the_file_gives_the_policys_probabilities(
    name: str, policies: dict[str, Policy], exported: Path, log: LoggedDataset
) -> None:
    program = torch.export.load(exported / f"{name}.pt2").module()
    for n in (1, 2, 257):
        contexts = rounds(n, log, seed=n)
        found = run(program, contexts)
        assert found.dtype == np.float32
        assert found.shape == (n, A)
        np.testing.assert_allclose(found, policies[name].probabilities(contexts), atol=1e-6)
        np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)


_ALONE = """
import pathlib, sys

for name in ("agents", "offprompts_env"):
    sys.modules[name] = None  # which makes their import fail
import numpy, torch
for file in (pathlib.Path(sys.argv[1], f"{name}.pt2") for name in sys.argv[2:]):
    serve = torch.export.load(file).module()
    context, query = (torch.from_numpy(numpy.load(pathlib.Path(sys.argv[1], f"{name}.npy"))) for name in ("x", "q"))
    numpy.save(file.with_suffix(".npy"), serve(context, query).detach().numpy())
assert not any(name.startswith(("agents.", "offprompts_env.")) for name in sys.modules)
"""


def test_the_file_serves_where_this_package_is_not(
    policies: dict[str, Policy], exported: Path, log: LoggedDataset
) -> None:
    contexts = rounds(9, log)
    np.save(exported / "x.npy", contexts.context)
    np.save(exported / "q.npy", contexts.query)
    names = ("constant", "neural", "tilted", "two-stage soft", "hierarchical", "sentence greedy, with prompts")
    command = [sys.executable, "-I", "-c", _ALONE, str(exported), *names]
    subprocess.run(command, check=True, cwd=exported, timeout=300)
    for name in names:
        found = np.load(exported / f"{name}.npy")
        np.testing.assert_allclose(found, policies[name].probabilities(contexts), atol=1e-6)


def test_no_part_of_the_file_is_a_pickle(exported: Path, log: LoggedDataset) -> None:
    here = str(Path(agents.__file__).parent).encode()
    for name in KINDS:
        with zipfile.ZipFile(exported / f"{name}.pt2") as archive:
            for part in archive.namelist():
                content = archive.read(part)
                # Pickles of torch are zip archives within, those of Python begin with a protocol.
                assert not content.startswith((b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05")), part
                assert b'"use_pickle": true' not in content, part
                assert here not in content, part


def test_the_file_says_what_it_is(exported: Path, log: LoggedDataset) -> None:
    found = describe_export(exported / "neural.pt2")
    assert found["policy"] == "NeuralPolicy"
    assert found["inputs"] == [{"name": "context", "dim": D_X}, {"name": "query", "dim": D_Q}]
    assert found["n_prompts"] == A
    assert found["catalogue"] == log.prompts.fingerprint
    assert found["versions"]["torch"] == torch.__version__
    assert found["checked"]["largest_difference"] < 1e-6
    extra = {"offprompts.json": ""}
    torch.export.load(exported / "neural.pt2", extra_files=extra)
    text = extra["offprompts.json"]
    assert json.loads(text) == found


def test_prompt_texts_travel_along(tmp_path: Path, log: LoggedDataset) -> None:
    texts = tuple(f"prompt é {index}" for index in range(A))
    prompts = replace(log.prompts, texts=texts)
    path = export_policy(agents.UniformPolicy(A), tmp_path / "a" / "p.pt2", contexts=log.contexts, prompts=prompts)
    assert describe_export(path)["prompt_texts"] == list(texts)


def test_the_program_refuses_other_dimensions(exported: Path) -> None:
    program = torch.export.load(exported / "neural.pt2").module()
    with pytest.raises((AssertionError, RuntimeError), match="5"):
        program(torch.zeros(2, D_X + 1), torch.zeros(2, D_Q))


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("uniform", "constant")])
def test_what_is_not_a_number_gives_no_probabilities(name: str, exported: Path) -> None:
    contexts = Contexts(np.full((1, D_X), np.nan), np.zeros((1, D_Q)))
    assert np.isnan(serve(exported / f"{name}.pt2", contexts)).any()


def test_learned_policies_export(tmp_path: Path, log: LoggedDataset) -> None:
    policy = agents.BehaviorCloning(steps=20).fit(log)
    path = export_policy(policy, tmp_path / "clone.pt2", contexts=log.contexts, prompts=log.prompts)
    contexts = rounds(20, log)
    np.testing.assert_allclose(serve(path, contexts), policy.probabilities(contexts), atol=1e-6)


class Liar(agents.UniformPolicy):
    def probabilities(self, contexts: Contexts) -> np.ndarray:
        return np.eye(A)[np.zeros(len(contexts), dtype=int)]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda log, world: agents.OraclePolicy(world), "OraclePolicy"),
        (lambda log, world: agents.SoftmaxPolicy(lambda contexts: np.zeros((len(contexts), A)), A), "function"),
        (lambda log, world: Liar(A), "Liar"),
        (lambda log, world: "policy", "str"),
        (
            lambda log, world: agents.SoftmaxPolicy(
                SentenceScores(NetworkRewards((network(15, 1),)), KnownSentences(world.outputs)), A
            ),
            "KnownSentences",
        ),
    ],
)
def test_what_is_no_network_says_what_to_do(
    make: Any, named: str, tmp_path: Path, log: LoggedDataset, simulator: Simulator
) -> None:
    with pytest.raises(ConfigError, match=rf"got {named}; clone .*BehaviorCloning"):
        export_policy(make(log, simulator), tmp_path / "p.pt2", contexts=log.contexts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"path": "policy.pt"}, ConfigError, r"ends in \.pt2"),
        ({"contexts": None}, ConfigError, "contexts"),
        ({"contexts": Contexts(np.zeros((0, D_X)), np.zeros((0, D_Q)))}, ConfigError, "at least one round"),
        ({"contexts": Contexts(np.zeros((3, D_X + 1)), np.zeros((3, D_Q)))}, DimensionError, "dimension"),
        ({"policy": agents.UniformPolicy(A, "another")}, DimensionError, "fingerprint"),
        ({"policy": agents.UniformPolicy(A + 1)}, DimensionError, "prompts"),
        ({"policy": NeuralPolicy(network(D_X + D_Q, A, seed=1)), "nan": True}, NumericalError, "NaN"),
    ],
)
def test_wrong_arguments(
    change: dict[str, Any], error: type[Exception], message: str, tmp_path: Path, log: LoggedDataset
) -> None:
    policy = change.get("policy", NeuralPolicy(network(D_X + D_Q, A)))
    contexts = change.get("contexts", log.contexts)
    if change.get("nan"):
        contexts = Contexts(np.full((2, D_X), np.nan), np.zeros((2, D_Q)))
    with pytest.raises(error, match=message):
        export_policy(policy, tmp_path / change.get("path", "p.pt2"), contexts=contexts, prompts=log.prompts)


def test_a_program_that_differs_is_not_written(
    tmp_path: Path, log: LoggedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = NeuralPolicy(network(D_X + D_Q, A))
    other = NeuralPolicy(network(D_X + D_Q, A, seed=1))
    monkeypatch.setattr(
        NeuralPolicy, "probabilities", lambda self, contexts: agents.policies.softmax(other.logits(contexts))
    )
    with pytest.raises(NumericalError, match="differ by"):
        export_policy(policy, tmp_path / "p.pt2", contexts=log.contexts)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_or_read_says_so(tmp_path: Path, log: LoggedDataset) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot write"):
        export_policy(agents.UniformPolicy(A), tmp_path / "file" / "p.pt2", contexts=log.contexts)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a", "b")
    for name in ("file", "other.zip", "nothing"):
        with pytest.raises(StorageError, match="export_policy wrote"):
            describe_export(tmp_path / name)


# predict


@pytest.fixture
def env() -> gym.Env:
    return gym.make("OffPrompts-Synthetic-v0", n_prompts=A)


def neural() -> NeuralPolicy:
    return NeuralPolicy(network(D_X + D_Q, A, seed=2))


@pytest.mark.parametrize("deterministic", [True, False])
def test_single_batched_and_flat_observations_agree(deterministic: bool) -> None:
    envs = gym.make_vec("OffPrompts-Synthetic-v0", 6, n_prompts=A)
    batch, _ = envs.reset(seed=0)
    flat = np.concatenate([batch["context"], batch["query"]], axis=1)
    first, second = (Predictor(neural(), context_dim=D_X, seed=3) for _ in range(2))
    actions, state = first.predict(
        batch, state=("s",), episode_start=np.ones(6, dtype=bool), deterministic=deterministic
    )
    assert state == ("s",)
    assert actions.shape == (6,)
    assert envs.action_space.contains(actions)
    assert (actions == second.predict(flat, deterministic=deterministic)[0]).all()
    if deterministic:
        best = neural().probabilities(Contexts.of(batch)).argmax(axis=1)
        assert (actions == best).all()
        for row in range(6):
            single, _ = first.predict({key: value[row] for key, value in batch.items()}, deterministic=True)
            assert single.shape == ()
            assert single == best[row]
            assert first.predict(flat[row], deterministic=True)[0] == best[row]


def test_draws_follow_the_policy_and_the_seed(env: gym.Env) -> None:
    observation, _ = env.reset(seed=0)
    batch = {key: np.tile(value, (20_000, 1)) for key, value in observation.items()}
    actions, _ = Predictor(neural(), seed=1).predict(batch)
    share = np.bincount(actions, minlength=A) / len(actions)
    assert np.abs(share - neural().probabilities(Contexts.of(observation))[0]).max() < 0.02
    assert (actions == Predictor(neural(), seed=1).predict(batch)[0]).all()
    assert (actions != Predictor(neural(), seed=2).predict(batch)[0]).any()


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_stable_baselines_evaluates_it(env: gym.Env, flat: bool, deterministic: bool) -> None:
    evaluation = pytest.importorskip("stable_baselines3.common.evaluation")
    from stable_baselines3.common.monitor import Monitor

    seen = Monitor(FlatObservation(env) if flat else env)
    seen.reset(seed=0)
    model = Predictor(neural(), prompts=env.unwrapped.simulator.prompts, context_dim=D_X)
    rewards, lengths = evaluation.evaluate_policy(
        model, seen, n_eval_episodes=20, deterministic=deterministic, return_episode_rewards=True
    )
    assert lengths == [1] * 20
    assert np.isfinite(rewards).all()


def test_the_value_is_that_of_the_policy(env: gym.Env) -> None:
    evaluation = pytest.importorskip("stable_baselines3.common.evaluation")
    from stable_baselines3.common.monitor import Monitor

    env.reset(seed=0)
    truth = env.unwrapped.simulator.policy_value(neural()).value
    n = 2_000
    mean, spread = evaluation.evaluate_policy(Predictor(neural()), Monitor(env), n, deterministic=False)
    assert abs(mean - truth) < 4 * spread / n**0.5


def test_text_in_observations_reaches_the_policy() -> None:
    class Reader(agents.UniformPolicy):
        def sample(self, contexts: Contexts, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
            assert contexts.query_text is not None
            return np.array([len(text) for text in contexts.query_text]), np.ones(len(contexts))

    shown = {"context": np.zeros(D_X), "query": np.zeros(D_Q), "query_text": "Heat"}
    assert Predictor(Reader(A)).predict(shown)[0] == 4


@pytest.mark.parametrize(
    ("observation", "error"),
    [
        ({"context": np.zeros(D_X)}, DataError),
        ({"context": np.zeros(D_X + 1), "query": np.zeros(D_Q)}, DimensionError),
        (np.zeros(D_X + D_Q + 1), DimensionError),
        (np.zeros(2), DataError),
        (np.zeros((2, 2, 2)), DataError),
        ("observation", DataError),
        (None, DataError),
        ({"context": np.full(D_X, np.nan), "query": np.zeros(D_Q)}, NumericalError),
    ],
)
def test_wrong_observations(observation: Any, error: type[Exception]) -> None:
    for deterministic in (True, False):
        with pytest.raises(error):
            Predictor(neural(), context_dim=D_X).predict(observation, deterministic=deterministic)


def test_flat_observations_need_to_know_where_the_query_begins() -> None:
    with pytest.raises(DataError, match="context_dim"):
        Predictor(neural()).predict(np.zeros(D_X + D_Q))


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda log: Predictor("policy"), ConfigError),
        (lambda log: Predictor(neural(), seed=-1), ConfigError),
        (lambda log: Predictor(neural(), context_dim=2.0), ConfigError),
        (lambda log: Predictor(agents.UniformPolicy(A + 1), prompts=log.prompts), DimensionError),
        (lambda log: Predictor(agents.UniformPolicy(A, "another"), prompts=log.prompts), DimensionError),
    ],
)
def test_wrong_predictors(make: Any, error: type[Exception], log: LoggedDataset) -> None:
    with pytest.raises(error):
        make(log)
