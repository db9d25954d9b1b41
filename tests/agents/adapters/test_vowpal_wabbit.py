"""Vowpal Wabbit as an agent."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import agents
import offprompts_env as op
from agents.adapters.base import Adapter
from agents.adapters.vowpal_wabbit import VowpalWabbit
from offprompts_env.errors import (
    ConfigError,
    DataError,
    DimensionError,
    MissingDependencyError,
    OffPromptsError,
    PropensityError,
    StorageError,
)
from offprompts_env.types import Contexts, LoggedDataset, PromptSet
from tests.agents.adapters.conformance import N_PROMPTS, Conformance, simulator

pyvw = pytest.importorskip("vowpalwabbit.pyvw")


class TestOneArmAPrompt(Conformance):
    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        return VowpalWabbit(prompts, "--epsilon 0.2", seed=seed)


class TestPromptsAsFeatures(Conformance):
    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        return VowpalWabbit(prompts, "--squarecb", adf=True, seed=seed)


class TestBagging(Conformance):
    """The one exploration with randomness of its own that is allowed."""

    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        return VowpalWabbit(prompts, "--bag 5", adf=True, seed=seed)


def log_of(world: op.Simulator, n: int, seed: int = 1) -> LoggedDataset:
    return op.collect(world, agents.UniformPolicy(world.n_prompts), n, seed=seed, progress=False)


def probe(n: int = 30) -> Contexts:
    return simulator().contexts.sample(n, np.random.default_rng(5))


def text(row: np.ndarray) -> str:
    return " ".join(f"f{i}:{value!r}" for i, value in enumerate(row.tolist()))


def lines(contexts: Contexts) -> list[str]:
    return [f"|x {text(x)} |q {text(q)}" for x, q in zip(contexts.context, contexts.query, strict=True)]


def test_an_arm_a_prompt_is_what_the_library_does_alone() -> None:
    world = simulator()
    log, agent = log_of(world, 300), VowpalWabbit(world.prompts, "--epsilon 0.1")
    agent.learn(log)
    alone = pyvw.Workspace(f"--cb_explore {N_PROMPTS} --epsilon 0.1 --random_seed 0 --quiet")
    for line, action, reward, propensity in zip(
        lines(log.contexts), log.action, log.reward.tolist(), log.propensity.tolist(), strict=True
    ):
        alone.learn(f"{action + 1}:{-reward}:{propensity} {line}")
    expected = [alone.predict(line) for line in lines(probe())]
    np.testing.assert_allclose(agent.probabilities(probe()), expected, atol=1e-7)
    assert agent.probabilities(probe()).max() == pytest.approx(0.9 + 0.1 / N_PROMPTS)


@pytest.mark.parametrize("options", ["--epsilon 0.1", "--cover 3", "--bag 3", "--regcb", "--softmax --lambda 5"])
def test_prompts_as_features_are_what_the_library_does_alone(options: str) -> None:
    """The examples of prompts are reused from round to round; nothing of a round may stay in them."""
    world = simulator()
    log, agent = log_of(world, 300), VowpalWabbit(world.prompts, f"{options} -q xa", adf=True)
    alone = pyvw.Workspace(f"--cb_explore_adf {options} -q xa --random_seed 0 --quiet")
    prompts = [f"|a {text(row)}" for row in world.prompts.embeddings]
    agent.learn(log)
    for line, action, reward, propensity in zip(
        lines(log.contexts), log.action, log.reward.tolist(), log.propensity.tolist(), strict=True
    ):
        own = [(f"0:{-reward}:{propensity} " if a == action else "") + prompt for a, prompt in enumerate(prompts)]
        alone.learn([f"shared {line}", *own])
    expected = [alone.predict([f"shared {line}", *prompts]) for line in lines(probe())]
    np.testing.assert_allclose(agent.probabilities(probe()), expected, atol=1e-6)


@pytest.mark.parametrize("adf", [False, True])
def test_it_earns_more_than_a_uniform_policy(adf: bool) -> None:
    world = simulator()
    agent = VowpalWabbit(world.prompts, adf=adf)
    op.collect(world, agent, 3_000, seed=0, batch_size=100, progress=False)
    gain = world.policy_value(agent).minus(world.policy_value(agents.UniformPolicy(N_PROMPTS)))
    assert gain.interval[0] > 0.1 * world.policy_value(agents.OraclePolicy(world)).value


def test_features_generalise_to_prompts_that_were_never_played() -> None:
    rng = np.random.default_rng(0)
    prompts = PromptSet(rng.normal(size=(40, 3)))
    context, action = rng.normal(size=(2_000, 3)), rng.integers(20, size=2_000)

    def rewards(x: np.ndarray) -> np.ndarray:
        return np.asarray(x @ prompts.embeddings.T)

    log = LoggedDataset(
        context=context, query=np.zeros((2_000, 1)), action=action, propensity=np.full(2_000, 1 / 20),
        reward=rewards(context)[np.arange(2_000), action], output=np.zeros((2_000, 0)), prompts=prompts,
    )  # fmt: skip
    new = rng.normal(size=(300, 3))
    best = rewards(new).argmax(axis=1)

    def hits(agent: VowpalWabbit) -> float:
        agent.learn(log)
        found = agent.probabilities(Contexts(new, np.zeros((300, 1)))).argmax(axis=1)
        return float(np.mean(found[best >= 20] == best[best >= 20]))

    assert hits(VowpalWabbit(prompts, adf=True)) > 0.5
    assert hits(VowpalWabbit(prompts)) < 0.1


@pytest.mark.parametrize("adf", [False, True])
@pytest.mark.parametrize("options", ["--epsilon 0.1", "--squarecb", "--sgd -l 0.01 --epsilon 0.2", "--first 350"])
def test_a_loaded_agent_learns_on_as_if_it_had_not_been_saved(options: str, adf: bool, tmp_path: Path) -> None:
    world = simulator()
    agent = VowpalWabbit(world.prompts, options, adf=adf, seed=3)
    agent.learn(log_of(world, 300))
    same = VowpalWabbit.load(agent.save(tmp_path / "agent"))
    agent.learn(log_of(world, 300, seed=2))
    same.learn(log_of(world, 300, seed=2))
    np.testing.assert_array_equal(same.probabilities(probe()), agent.probabilities(probe()))


def test_looking_does_not_change_what_it_learns_later() -> None:
    world = simulator()
    looking, other = (VowpalWabbit(world.prompts, "--bag 3 --sgd", adf=True) for _ in range(2))
    for seed in range(3):
        looking.probabilities(probe())
        looking.learn(log_of(world, 100, seed))
        other.learn(log_of(world, 100, seed))
    np.testing.assert_array_equal(looking.probabilities(probe()), other.probabilities(probe()))


@pytest.mark.parametrize("adf", [False, True])
def test_before_it_learns_all_prompts_look_alike(adf: bool) -> None:
    pmf = VowpalWabbit(simulator().prompts, "--epsilon 0.1", adf=adf).probabilities(probe())
    np.testing.assert_allclose(pmf, 1 / N_PROMPTS, atol=1e-6)


WRONG = [
    ("--cb_explore 3", "pass adf="),
    ("--cb_explore_adf", "pass adf="),
    ("--random_seed 4", "pass seed="),
    ("--epsilom 0.1", "did you mean '--epsilon'"),
    ("-f stolen.model", "unknown Vowpal Wabbit option"),
    ("-i other.model", "unknown Vowpal Wabbit option"),
    ("data.txt", "unknown Vowpal Wabbit option"),
    ("--epsilon", "expected a number after --epsilon, got 'nothing'"),
    ("--epsilon nan", "expected a number after --epsilon, got 'nan'"),
    ("--epsilon 1e999", "expected a number"),
    ("--bag 2.5", "expected an integer after --bag"),
    ("-b 60", "after -b, got '60'"),
    ("--cb_type nope", "mtr|dr|ips"),
    ("-q zz", "namespaces x, q and a"),
    ("--epsilon 'a", "close the quotation"),
    ("--epsilon 0.1 --epsilon=0.2", "expected --epsilon once"),
    ("--lambda 3", "--lambda belongs to --softmax"),
    ("--bag 3 --softmax", "one way to explore, got --bag and --softmax"),
    ("--coin --ftrl", "Vowpal Wabbit refuses"),
    ("--regcb --epsilon 0.3", "--regcb does not explore by --epsilon"),
    ("--squarecb --elim --epsilon 0.3", "--elim does not explore by --epsilon"),
    ("--cb_min_cost 0", "--cb_min_cost belongs to --regcb or --elim"),
]


@pytest.mark.parametrize(("options", "says"), WRONG)
def test_a_wrong_option_is_told(options: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("|", r"\|")):
        VowpalWabbit(simulator().prompts, options)


def test_wrong_arguments_are_told() -> None:
    with pytest.raises(ConfigError, match="options: expected a str"):
        VowpalWabbit(simulator().prompts, 3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="seed"):
        VowpalWabbit(simulator().prompts, seed=-1)
    with pytest.raises(ConfigError, match="prompts: expected a PromptSet"):
        VowpalWabbit(["a", "b"])  # type: ignore[arg-type]


@pytest.mark.parametrize("part", ["context", "query"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_context_that_is_not_finite_is_named(part: str, value: float) -> None:
    columns = {"context": np.zeros((3, 5)), "query": np.zeros((3, 5))}
    columns[part][1, 2] = value
    with pytest.raises(DataError, match=f"{part}: expected finite numbers, got .* in row 1"):
        VowpalWabbit(simulator().prompts).probabilities(Contexts(**columns))


def test_an_unknown_propensity_is_named() -> None:
    world = simulator()
    log = log_of(world, 10)
    with pytest.raises(PropensityError, match="VowpalWabbit needs the column 'propensity'"):
        VowpalWabbit(world.prompts).learn(replace(log, propensity=np.full(10, np.nan)))


def test_a_second_log_of_other_dimensions_is_refused() -> None:
    world = simulator()
    log, agent = log_of(world, 10), VowpalWabbit(world.prompts)
    agent.learn(log)
    with pytest.raises(DimensionError, match=r"expected d_x and d_q \(5, 5\), .* got \(3, 5\)"):
        agent.learn(replace(log, context=log.context[:, :3]))


def tamper(path: Path, **settings: object) -> dict[str, object]:
    description = json.loads((path / "agent.json").read_text())
    description["settings"] |= settings
    (path / "agent.json").write_text(json.dumps(description))
    return description


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"options": "-f stolen.model"}, "unknown Vowpal Wabbit option"),
        ({"options": "--epsilon 0.9"}, "expected a model with the options.* 0.89.* got.* 0.1"),
        ({"adf": True}, "expected a model with the options"),
        ({"dimensions": None}, "damaged"),
        ({"seed": "x"}, "seed: expected an integer"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_told(settings: dict[str, object], says: str, tmp_path: Path) -> None:
    path = VowpalWabbit(simulator().prompts, "--epsilon 0.1").save(tmp_path / "agent")
    tamper(path, **settings)
    with pytest.raises(OffPromptsError, match=says):
        VowpalWabbit.load(path)


def test_options_in_a_model_file_are_not_obeyed(tmp_path: Path) -> None:
    path = VowpalWabbit(simulator().prompts, "--epsilon 0.1").save(tmp_path / "agent")
    (file,) = path.glob("agent-*.bin")
    stolen, content = tmp_path / "stolen", file.read_bytes()
    start = content.index(b" --cb_adf")
    length = int.from_bytes(content[start - 4 : start], "little")
    options = content[start : start + length].rstrip(b"\0") + f" --predictions {stolen}".encode() + b"\0"
    head = content[: start - 4] + len(options).to_bytes(4, "little")
    file.write_bytes(head + options + content[start + length :])
    description = json.loads((path / "agent.json").read_text())
    description["sha256"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    (path / "agent.json").write_text(json.dumps(description))
    with pytest.raises(StorageError, match="--predictions"):
        VowpalWabbit.load(path)
    assert not stolen.exists()


def test_without_vowpalwabbit_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vowpalwabbit.pyvw", None)
    with pytest.raises(MissingDependencyError, match=r"offprompts-env\[vowpalwabbit\]"):
        VowpalWabbit(simulator().prompts)


def test_every_feature_has_a_weight_of_its_own() -> None:
    # Vowpal Wabbit takes a name that is a number for a place in its table, where those of neighbours overlap.
    n_prompts, rng = 10, np.random.default_rng(0)
    prompts, wanted = PromptSet(np.eye(n_prompts)), rng.integers(n_prompts, size=6_000)
    actions = rng.integers(n_prompts, size=6_000)
    log = op.LoggedDataset(
        context=np.eye(n_prompts)[wanted], query=np.zeros((6_000, 1)), action=actions,
        propensity=np.full(6_000, 1 / n_prompts), reward=(actions == wanted).astype(float),
        output=np.empty((6_000, 0)), prompts=prompts,
    )  # fmt: skip
    agent = VowpalWabbit(prompts, "--epsilon 0.1")
    agent.learn(log)
    pmf = agent.probabilities(Contexts(np.eye(n_prompts), np.zeros((n_prompts, 1))))
    np.testing.assert_array_equal(pmf.argmax(axis=1), np.arange(n_prompts))
