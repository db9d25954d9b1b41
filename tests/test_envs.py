import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import offprompts_env
from offprompts_env.envs import PromptEnv, SyntheticEnv
from offprompts_env.errors import ActionError, ConfigError, ResetNeededError
from offprompts_env.rng import stream
from offprompts_env.simulator import Simulator
from offprompts_env.synthetic import SyntheticConfig
from offprompts_env.types import PromptSet

gym.register_envs(offprompts_env)
IDS = ["OffPrompts-Synthetic-v0", "OffPrompts-MovieLens-v0"]
SMALL = {"OffPrompts-Synthetic-v0": {"n_prompts": 20}, "OffPrompts-MovieLens-v0": {"n_prompts": 20}}
# Contexts are unbounded, and Gymnasium says so of any such space.
EXPECTED_WARNINGS = ("minimum value is -infinity", "maximum value is infinity")


def make(env_id: str, **kwargs: object) -> gym.Env:
    return gym.make(env_id, **SMALL[env_id], **kwargs)


@pytest.mark.parametrize("env_id", IDS)
def test_gymnasium_checker_is_clean(env_id: str) -> None:
    env = make(env_id, render_mode="ansi")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # What other tests of this process left to be collected is not the checker's to say.
        warnings.simplefilter("ignore", ResourceWarning)
        check_env(env.unwrapped)
    unexpected = [str(w.message) for w in caught if not any(known in str(w.message) for known in EXPECTED_WARNINGS)]
    assert unexpected == []


@pytest.mark.parametrize("env_id", IDS)
def test_stable_baselines_checker_is_clean(env_id: str) -> None:
    from stable_baselines3.common.env_checker import check_env as check_sb3

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_sb3(make(env_id).unwrapped)


@pytest.mark.parametrize("env_id", IDS)
def test_info_describes_the_round(env_id: str) -> None:
    env = make(env_id, render_mode="ansi")
    observation, about = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    after, reward, terminated, truncated, info = env.step(np.int64(3))
    assert (terminated, truncated) == (True, False)
    assert all((after[key] == observation[key]).all() for key in observation)
    assert np.isfinite(reward)
    assert np.isfinite(info["expected_reward"])
    assert info["output"].shape == (env.unwrapped.simulator.outputs.output_dim,)
    shown = env.render()
    for word in ("user", "query", "prompt", "output", "reward"):
        assert word in shown
    if env_id == "OffPrompts-MovieLens-v0":
        assert about["query_text"] in shown
        assert info["sentence"] in shown
        assert info["prompt"] == env.unwrapped.simulator.prompts.texts[3]
        assert {"user_id", "item_id", "query_text", "sentence", "prompt"} <= set(info)


def rollout(env: gym.Env, seed: int, rounds: int = 6) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    actions = np.random.default_rng(seed).integers(20, size=rounds)
    for index, action in enumerate(actions):
        observation, _ = env.reset(seed=seed if index == 0 else None)
        _, reward, _, _, info = env.step(action)
        rows.append(
            (
                observation["context"].tobytes(),
                observation["query"].tobytes(),
                reward,
                info["expected_reward"],
                info["output"].tobytes(),
                info.get("sentence"),
            )
        )
    return rows


@pytest.mark.parametrize("env_id", IDS)
def test_two_seeded_rollouts_are_identical(env_id: str) -> None:
    first, second = make(env_id), make(env_id)
    assert rollout(first, 7) == rollout(second, 7) == rollout(first, 7)
    assert rollout(first, 7) != rollout(first, 8)


@pytest.mark.parametrize("env_id", IDS)
def test_two_seeded_vector_rollouts_are_identical(env_id: str) -> None:
    def play(seed: int) -> list[bytes]:
        envs = gym.make_vec(env_id, num_envs=5, **SMALL[env_id])
        observation, _ = envs.reset(seed=seed)
        rows = [observation["context"].tobytes()]
        for step in range(3):
            observation, reward, terminated, truncated, infos = envs.step(np.arange(5) + step)
            assert envs.observation_space.contains(observation)
            assert terminated.all()
            assert not truncated.any()
            rows += [observation["query"].tobytes(), reward.tobytes(), infos["final_info"]["output"].tobytes()]
        return rows

    assert play(3) == play(3)
    assert play(3) != play(4)


@pytest.mark.parametrize("env_id", IDS)
def test_vector_final_info_is_of_the_finished_round(env_id: str) -> None:
    envs = gym.make_vec(env_id, num_envs=4, **SMALL[env_id])
    before, _ = envs.reset(seed=0)
    after, _, _, _, infos = envs.step(np.arange(4))
    assert (infos["final_obs"]["context"] == before["context"]).all()
    assert not (after["context"] == before["context"]).all()
    assert infos["_final_info"].all()
    if "MovieLens" in env_id:
        assert list(infos["final_info"]["prompt"]) == list(envs.unwrapped.simulator.prompts.texts[:4])
        assert len(infos["final_info"]["sentence"]) == 4


def test_no_dummy_rows_through_gymnasiums_own_vectors() -> None:
    envs = gym.make_vec(
        IDS[0], num_envs=3, vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}, n_prompts=20,
    )  # fmt: skip
    envs.reset(seed=0)
    for _ in range(4):
        _, rewards, terminated, _, _ = envs.step(np.zeros(3, dtype=np.int64))
        assert terminated.all()
        assert (rewards != 0).all()


@pytest.mark.parametrize("reward_type", ["continuous", "binary"])
def test_blocks_ahead_play_the_same_rounds_as_the_simulator_one_by_one(reward_type: str) -> None:
    """The closed-form block is a shortcut, not another process."""
    env = SyntheticEnv(n_prompts=20, reward_type=reward_type)
    env.reset(seed=0)
    source, outputs, rewards = (np.random.default_rng(s) for s in np.random.SeedSequence(0).spawn(3))
    for action in np.random.default_rng(1).integers(20, size=40):
        observation = {key: value[None] for key, value in env._observe().items()}
        contexts = env.simulator.contexts.sample(1, source)
        assert contexts.context == pytest.approx(observation["context"], rel=1e-5, abs=1e-6)
        truth = env.simulator.play(contexts, np.array([action]), outputs, rewards)
        _, reward, _, _, info = env.step(action)
        assert info["output"] == pytest.approx(truth.outputs.embedding[0], rel=1e-5, abs=1e-5)
        assert info["expected_reward"] == pytest.approx(truth.expected_reward[0], rel=1e-4, abs=1e-6)
        assert reward == pytest.approx(truth.reward[0], rel=1e-4, abs=1e-5)
        env.reset()


def test_general_simulators_play_too() -> None:
    class Opaque:
        def __init__(self, inner: object) -> None:
            self.inner, self.output_dim, self.prompts = inner, inner.output_dim, inner.prompts

        def sample(self, contexts, actions, rng):
            return self.inner.sample(contexts, actions, rng)

    exact = SyntheticConfig(n_prompts=20).build()
    general = PromptEnv(Simulator(exact.contexts, Opaque(exact.outputs), exact.rewards))
    fast = PromptEnv(exact)
    for one, other in zip(rollout(general, 5), rollout(fast, 5), strict=True):
        assert one[2] == pytest.approx(other[2], rel=1e-4, abs=1e-5)


def test_agents_cannot_change_the_round_through_the_observation() -> None:
    env = SyntheticEnv(n_prompts=20)
    observation, _ = env.reset(seed=0)
    kept = observation["context"].copy()
    observation["context"][:] = 1e9
    after, _, _, _, _ = env.step(0)
    assert (after["context"] == kept).all()


@pytest.mark.parametrize("action", [20, -1, 1.0, np.float32(2), "3", None, True, [1, 2], np.array([1.5])])
def test_wrong_actions(action: object) -> None:
    env = SyntheticEnv(n_prompts=20)
    env.reset(seed=0)
    with pytest.raises(ActionError, match=r"expected .*\[0, 20\)"):
        env.step(action)
    env.step(np.array([4]))


@pytest.mark.parametrize("actions", [np.zeros(3, int), np.full(4, 20), np.zeros(4), np.zeros((4, 1), int)])
def test_wrong_vector_actions(actions: np.ndarray) -> None:
    envs = gym.make_vec(IDS[0], num_envs=4, n_prompts=20)
    envs.reset(seed=0)
    with pytest.raises(ActionError, match="expected"):
        envs.step(actions)


def test_step_before_reset_and_twice() -> None:
    env = SyntheticEnv(n_prompts=20)
    with pytest.raises(ResetNeededError, match="call reset"):
        env.step(0)
    env.reset(seed=0)
    env.step(0)
    with pytest.raises(ResetNeededError, match="call reset"):
        env.step(0)
    with pytest.raises(ResetNeededError, match="call reset"):
        gym.make_vec(IDS[0], num_envs=2).step(np.zeros(2, int))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_promts": 5}, "did you mean 'n_prompts'"),
        ({"mapping": "cubic"}, "unknown mapping 'cubic'"),
        ({"preset": "paper"}, "did you mean 'paper_code'"),
        ({"n_prompts": "many"}, "n_prompts: expected an integer"),
        ({"presett": "paper_code"}, "did you mean 'preset'"),
        ({"render": "ansi"}, "did you mean 'render_mode'"),
        ({"reward": 3}, "did you mean 'rewards'"),
        ({"contexts": "mine"}, "contexts: expected an object like ContextSource, but str lacks context_dim"),
        ({"outputs": 3}, "outputs: expected an object like OutputModel, but int lacks output_dim, prompts, sample"),
        ({"rewards": 3}, "rewards: expected an object like RewardModel, but int lacks kind, mean"),
    ],
)
def test_wrong_settings_through_make(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        gym.make(IDS[0], **settings)
    with pytest.raises(ConfigError, match=words):
        gym.make_vec(IDS[0], num_envs=2, **settings)


def test_wrong_vector_settings() -> None:
    with pytest.raises(ConfigError, match="same_step"):
        gym.make_vec(IDS[0], num_envs=2, autoreset_mode="next_step")
    with pytest.raises(ConfigError, match="num_envs"):
        gym.make_vec(IDS[0], num_envs=0)
    with pytest.raises(ConfigError, match=r"num_envs: expected an integer ≥ 1, got 2\.5"):
        gym.make_vec(IDS[0], num_envs=2.5)
    with pytest.raises(ConfigError, match="bundle: expected a path as text or None, got 3"):
        gym.make(IDS[1], bundle=3)
    with pytest.raises(ConfigError, match="one integer"):
        gym.make_vec(IDS[0], num_envs=2).reset(seed=[1, 2])


@pytest.mark.parametrize("env_id", IDS)
def test_specs_are_json_able_and_make_the_environment_again(env_id: str) -> None:
    env = make(env_id)
    spec = gym.envs.registration.EnvSpec.from_json(env.spec.to_json())
    assert rollout(gym.make(spec), 1) == rollout(env, 1)
    plugin = gym.make(f"offprompts_env:{env_id}", **SMALL[env_id])
    assert rollout(plugin, 1) == rollout(env, 1)
    by_config = gym.make(env_id, **env.unwrapped.config)
    assert rollout(by_config, 1) == rollout(env, 1)


@pytest.mark.parametrize("env_id", IDS)
def test_own_parts_are_named_in_the_config(env_id: str) -> None:
    own = make(env_id).unwrapped.simulator.contexts
    config = make(env_id, contexts=own).unwrapped.config
    assert config == make(env_id).unwrapped.config | {"contexts": f"{type(own).__module__}.{type(own).__name__}"}
    # So a log of it never passes for one of the built-in world.
    with pytest.raises(ConfigError, match="contexts: expected an object like ContextSource"):
        gym.make(env_id, **config)


@pytest.mark.parametrize("env_id", IDS)
def test_ppo_trains(env_id: str) -> None:
    from stable_baselines3 import PPO

    model = PPO(
        "MultiInputPolicy", make(env_id), gamma=0.0, gae_lambda=1.0, n_steps=16, batch_size=16, n_epochs=1, seed=0
    )
    before = [p.clone() for p in model.policy.parameters()]
    model.learn(32)
    assert any((b != p).any() for b, p in zip(before, model.policy.parameters(), strict=True))


@pytest.mark.parametrize("env_id", IDS)
def test_own_prompts_through_make(env_id: str) -> None:
    prompts = PromptSet(np.eye(3, 5), ("thrilling", "love", "war"))
    for env in (gym.make(env_id, prompts=prompts), gym.make_vec(env_id, num_envs=2, prompts=prompts)):
        assert env.unwrapped.simulator.prompts is prompts
        assert env.unwrapped.config["prompts"].endswith("PromptSet")
    env = gym.make(env_id, prompts=prompts)
    env.reset(seed=0)
    assert env.step(2)[4]["prompt"] == "war"


def test_worlds_are_named_by_their_seed() -> None:
    one, same, other = (SyntheticEnv(seed=s, n_prompts=20).simulator for s in (1, 1, 2))
    assert one.prompts.fingerprint == same.prompts.fingerprint != other.prompts.fingerprint
    assert stream(1, "world", "prompts").standard_normal((20, 5)).astype(np.float32) == pytest.approx(
        one.prompts.embeddings
    )
