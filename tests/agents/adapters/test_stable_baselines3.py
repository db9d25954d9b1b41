"""Models of Stable-Baselines3 as agents: exact propensities, also while they train, and files without code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.torch_layers import CombinedExtractor
from stable_baselines3.common.vec_env import VecNormalize

from agents.adapters.base import Adapter
from agents.adapters.stable_baselines3 import StableBaselines3
from agents.adapters.vec_env import PromptVecEnv
from offprompts_env.errors import (
    AgentError,
    ConfigError,
    DataError,
    DimensionError,
    MissingDependencyError,
    OffPromptsError,
    StorageError,
)
from offprompts_env.types import Contexts, PromptSet
from tests.agents.adapters.conformance import N_PROMPTS, Conformance, simulator

torch.set_num_threads(1)
SMALL: dict[str, Any] = {"gamma": 0.0, "device": "cpu"}


def envs(num_envs: int = 8, **settings: Any) -> Any:
    settings = {"preset": "paper_code", "n_prompts": N_PROMPTS, "reward_std": 0.1, "seed": 0} | settings
    return gym.make_vec("OffPrompts-Synthetic-v0", num_envs=num_envs, **settings)


def ppo(seed: int = 0, **more: Any) -> PPO:
    return PPO("MultiInputPolicy", PromptVecEnv(envs()), n_steps=16, batch_size=64, seed=seed, **SMALL | more)


def a2c(seed: int = 0) -> A2C:
    flat = gym.wrappers.FlattenObservation(
        gym.make("OffPrompts-Synthetic-v0", preset="paper_code", n_prompts=N_PROMPTS, seed=0)
    )
    return A2C("MlpPolicy", flat, seed=seed, policy_kwargs={"net_arch": [16], "activation_fn": torch.nn.ReLU}, **SMALL)


def dqn(seed: int = 0, **more: Any) -> DQN:
    settings = SMALL | {"learning_starts": 40, "buffer_size": 500, "exploration_fraction": 0.9} | more
    return DQN("MultiInputPolicy", PromptVecEnv(envs()), seed=seed, **settings)


def maskable(seed: int = 0, **settings: Any) -> Any:
    contrib = pytest.importorskip("sb3_contrib")
    world = PromptVecEnv(settings.pop("envs", None) or envs())
    return contrib.MaskablePPO("MultiInputPolicy", world, n_steps=16, batch_size=64, seed=seed, **SMALL | settings)


def contexts(n: int = 50) -> Contexts:
    return simulator().contexts.sample(n, np.random.default_rng(2))


class Fixed(Conformance):
    learns = False


class TestPPO(Fixed):
    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        return StableBaselines3(ppo(seed), prompts)


class TestA2COnFlatObservations(Fixed):
    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        return StableBaselines3(a2c(seed), prompts, epsilon=0.2)


class TestDQN(Fixed):
    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        return StableBaselines3(dqn(seed), prompts, epsilon=0.2)


class TestMaskablePPO(Fixed):
    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        return StableBaselines3(maskable(seed), prompts)


class TestMaskedMaskablePPO(Fixed):
    @staticmethod
    def masks(contexts: Contexts) -> np.ndarray:
        return np.stack([contexts.context[:, 0] > 0] * 2 + [np.ones(len(contexts))] * (N_PROMPTS - 2), axis=1) > 0

    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        return StableBaselines3(maskable(seed), prompts, masks=self.masks, epsilon=0.1)

    def load(self, path: Path, *, trusted: bool) -> Adapter:
        with pytest.raises(ConfigError, match="masks"):
            StableBaselines3.load(path)
        return StableBaselines3.load(path, masks=self.masks)

    def test_masked_prompts_are_never_played(self) -> None:
        pmf = self.make(simulator().prompts, 0).probabilities(contexts())
        np.testing.assert_array_equal(pmf == 0, ~self.masks(contexts()))


@pytest.mark.parametrize("make", [ppo, a2c, maskable])
def test_the_pmf_is_that_which_the_model_draws_from(make: Any) -> None:
    model, shown = make(), contexts(3)
    pmf = StableBaselines3(model, simulator().prompts).probabilities(shown)
    times = shown.repeat(4_000)
    flat = isinstance(model.observation_space, spaces.Box)
    seen: Any = np.concatenate([times.context, times.query], axis=1)
    drawn, _ = model.predict(seen if flat else {"context": times.context, "query": times.query})
    for row in range(3):
        found = np.bincount(drawn[row * 4_000 : (row + 1) * 4_000], minlength=N_PROMPTS) / 4_000
        assert np.abs(found - pmf[row]).max() < 0.04


def test_dqn_plays_what_it_chooses_and_explores_as_it_does_now() -> None:
    model, shown = dqn(), contexts()
    agent = StableBaselines3(model, simulator().prompts)
    np.testing.assert_allclose(agent.probabilities(shown), 1 / N_PROMPTS)  # before learning_starts
    model.learn(200)
    assert agent.epsilon == model.exploration_rate
    assert 0 < agent.epsilon < 1
    greedy, _ = model.predict({"context": shown.context, "query": shown.query}, deterministic=True)
    chosen = agent.probabilities(shown)[np.arange(len(shown)), greedy]
    np.testing.assert_allclose(chosen, 1 - agent.epsilon + agent.epsilon / N_PROMPTS)
    assert len(np.unique(greedy)) > 1


def test_dqn_explores_with_the_stated_frequency() -> None:
    model, shown = dqn(exploration_fraction=1e-3, exploration_final_eps=0.3), contexts(1)
    model.learn(100)
    pmf = StableBaselines3(model, simulator().prompts).probabilities(shown)[0]
    seen = {"context": shown.context, "query": shown.query}
    drawn = [int(model.predict(seen, deterministic=False)[0][0]) for _ in range(2_000)]
    assert np.abs(np.bincount(drawn, minlength=N_PROMPTS) / 2_000 - pmf).max() < 0.05


def test_epsilon_smooths_a_distribution() -> None:
    model, shown = ppo(), contexts()
    bare = StableBaselines3(model, simulator().prompts).probabilities(shown)
    smooth = StableBaselines3(model, simulator().prompts, epsilon=0.3).probabilities(shown)
    np.testing.assert_allclose(smooth, 0.7 * bare + 0.3 / N_PROMPTS)


def test_it_follows_the_model_as_it_trains() -> None:
    model = ppo()
    agent = StableBaselines3(model, simulator().prompts)
    before = agent.probabilities(contexts())
    model.learn(128)
    assert not np.array_equal(agent.probabilities(contexts()), before)


def test_looking_does_not_change_how_training_goes_on(tmp_path: Path) -> None:
    ends = []
    for look in (False, True):
        model = ppo()
        model.learn(128)
        if look:
            agent = StableBaselines3(model, simulator().prompts)
            model.policy.set_training_mode(True)
            agent.probabilities(contexts())
            agent.save(tmp_path / "agent")
            assert model.policy.training
        model.learn(128, reset_num_timesteps=False)
        ends.append(StableBaselines3(model, simulator().prompts).probabilities(contexts()))
    np.testing.assert_array_equal(*ends)


def test_observations_are_normalised_as_in_training() -> None:
    normalising = VecNormalize(PromptVecEnv(envs()), norm_reward=False)
    model = PPO("MultiInputPolicy", normalising, n_steps=16, batch_size=64, seed=0, **SMALL)
    model.learn(256)
    shown = contexts()
    agent = StableBaselines3(model, simulator().prompts)
    seen = normalising.normalize_obs({"context": shown.context, "query": shown.query})
    with torch.no_grad():
        expected = model.policy.get_distribution(model.policy.obs_to_tensor(seen)[0]).distribution.probs
    np.testing.assert_allclose(agent.probabilities(shown), expected, rtol=1e-6)
    with pytest.raises(ConfigError, match="VecNormalize"):
        agent.save("nowhere")


def test_a_policy_alone_is_an_agent() -> None:
    model = ppo()
    agents = [StableBaselines3(given, simulator().prompts) for given in (model, model.policy)]
    np.testing.assert_array_equal(*(agent.probabilities(contexts()) for agent in agents))


def test_epsilon_of_the_moment_is_saved(tmp_path: Path) -> None:
    model = dqn()
    model.learn(200)
    agent = StableBaselines3(model, simulator().prompts)
    loaded = StableBaselines3.load(agent.save(tmp_path / "agent"))
    assert loaded.epsilon == agent.epsilon
    loaded.save(tmp_path / "again")
    again = StableBaselines3.load(tmp_path / "again")
    np.testing.assert_array_equal(again.probabilities(contexts()), agent.probabilities(contexts()))


@pytest.mark.parametrize(
    "network",
    [{"net_arch": {"pi": [8], "vf": [4, 4]}, "activation_fn": torch.nn.GELU}, {"share_features_extractor": False}],
)
def test_the_network_is_rebuilt(network: dict[str, Any], tmp_path: Path) -> None:
    agent = StableBaselines3(ppo(policy_kwargs=network), simulator().prompts)
    loaded = StableBaselines3.load(agent.save(tmp_path / "agent"))
    np.testing.assert_array_equal(loaded.probabilities(contexts()), agent.probabilities(contexts()))


class OwnExtractor(CombinedExtractor):
    pass


class OwnActivation(torch.nn.Tanh):
    pass


@pytest.mark.parametrize(
    ("network", "says"),
    [
        ({"features_extractor_class": OwnExtractor}, "the features extractor OwnExtractor"),
        ({"activation_fn": OwnActivation}, "the activation OwnActivation"),
        ({"activation_fn": lambda: torch.nn.LeakyReLU(0.5)}, "the activation <lambda>"),
    ],
)
def test_what_json_cannot_describe_is_not_saved(network: dict[str, Any], says: str, tmp_path: Path) -> None:
    agent = StableBaselines3(ppo(policy_kwargs=network), simulator().prompts)
    with pytest.raises(ConfigError, match=rf"{says}; save it with .*model\.save"):
        agent.save(tmp_path / "agent")
    assert not (tmp_path / "agent").exists()


def test_changed_layers_are_not_saved(tmp_path: Path) -> None:
    model = ppo()
    model.policy.action_net = torch.nn.Sequential(torch.nn.Linear(64, 3), torch.nn.Linear(3, N_PROMPTS))
    with pytest.raises(ConfigError, match="layers of its own"):
        StableBaselines3(model, simulator().prompts).save(tmp_path / "agent")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("policy", "os"),
        ("activation", "functional"),
        ("activation", "NoSuch"),
        ("network", {"net_arch": [3]}),
        ("network", {"features_extractor_class": "os.system"}),
        ("dimensions", {"context": 5}),
        ("dimensions", [5, 5]),
    ],
)
def test_a_wrong_description_is_told(name: str, value: Any, tmp_path: Path) -> None:
    path = StableBaselines3(ppo(), simulator().prompts).save(tmp_path / "agent")
    description = json.loads((path / "agent.json").read_text())
    description["settings"][name] = value
    (path / "agent.json").write_text(json.dumps(description))
    with pytest.raises(StorageError, match="save it again"):
        StableBaselines3.load(path)


def test_a_masked_policy_asks_for_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = StableBaselines3(maskable(), simulator().prompts).save(tmp_path / "agent")
    monkeypatch.setitem(__import__("sys").modules, "sb3_contrib.common.maskable.policies", None)
    with pytest.raises(MissingDependencyError, match=r"offprompts-env\[sb3-contrib\]"):
        StableBaselines3.load(path)


def recurrent() -> Any:
    return pytest.importorskip("sb3_contrib").RecurrentPPO("MultiInputLstmPolicy", PromptVecEnv(envs()), **SMALL)


def elsewhere(observed: spaces.Space[Any], played: spaces.Space[Any]) -> Any:
    class Elsewhere(gym.Env[Any, Any]):
        observation_space, action_space = observed, played

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            return observed.sample(), {}

    return A2C("MultiInputPolicy" if isinstance(observed, spaces.Dict) else "MlpPolicy", Elsewhere(), **SMALL)


def box(*shape: int) -> spaces.Box:
    return spaces.Box(-1, 1, shape, np.float32)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: "PPO", ConfigError, "expected a model of Stable-Baselines3 or its policy, got str"),
        (lambda: PPO, ConfigError, "or its policy, got ABCMeta"),
        (recurrent, ConfigError, "is recurrent"),
        (lambda: elsewhere(box(10), box(2)), ConfigError, r"expected the actions Discrete\(6\)"),
        (lambda: elsewhere(box(10), spaces.Discrete(6, start=1)), ConfigError, r"expected the actions Discrete\(6\)"),
        (lambda: elsewhere(box(10), spaces.Discrete(7)), DimensionError, "an agent with 6 arms, one a prompt, got 7"),
        (lambda: elsewhere(spaces.Discrete(4), spaces.Discrete(6)), ConfigError, "one vector of both"),
        (lambda: elsewhere(box(2, 5), spaces.Discrete(6)), ConfigError, "one vector of both"),
        (lambda: elsewhere(spaces.Dict(user=box(5), query=box(5)), spaces.Discrete(6)), ConfigError, "'context'"),
        (lambda: dqn().policy, ConfigError, "epsilon: MultiInputPolicy chooses"),
    ],
)
def test_a_model_that_does_not_fit_is_told(make: Any, error: type[OffPromptsError], says: str) -> None:
    with pytest.raises(error, match=says):
        StableBaselines3(make(), simulator().prompts)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"epsilon": 1.5}, "epsilon"),
        ({"epsilon": "0.1"}, "epsilon"),
        ({"masks": lambda contexts: np.ones((len(contexts), N_PROMPTS))}, "for a MaskablePPO .* got function"),
    ],
)
def test_a_wrong_argument_is_told(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        StableBaselines3(ppo(), simulator().prompts, **settings)


@pytest.mark.parametrize(
    ("masks", "error", "says"),
    [
        (lambda c: np.ones((len(c), 2)), DimensionError, r"expected shape \(50, 6\), got \(50, 2\)"),
        (lambda c: np.arange(len(c))[:, None] * np.ones(N_PROMPTS) != 3, DataError, "in row 3"),
        (lambda c: c.no_such, AgentError, "masks raised in 50 rounds: AttributeError"),
    ],
)
def test_wrong_masks_are_told(masks: Any, error: type[OffPromptsError], says: str) -> None:
    agent = StableBaselines3(maskable(), simulator().prompts, masks=masks)
    with pytest.raises(error, match=says):
        agent.probabilities(contexts())


def test_a_network_that_breaks_is_named() -> None:
    model = ppo()
    model.policy.action_net = torch.nn.Linear(3, N_PROMPTS)
    with pytest.raises(AgentError, match="MultiInputActorCriticPolicy raised in 50 rounds: RuntimeError"):
        StableBaselines3(model, simulator().prompts).probabilities(contexts())
