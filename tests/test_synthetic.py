import itertools

import numpy as np
import pytest

from offprompts_env.errors import ConfigError, DimensionError
from offprompts_env.rng import stream
from offprompts_env.simulator import Simulator
from offprompts_env.synthetic import MAPPINGS, AdditiveOutputs, BilinearReward, GaussianContexts, SyntheticConfig
from offprompts_env.types import Contexts, PromptSet

TINY = {"n_prompts": 4, "context_dim": 2, "query_dim": 3, "prompt_dim": 2, "output_dim": 4}


@pytest.mark.parametrize(
    ("mapping", "formula"),
    [
        ("linear", lambda z: z),
        ("trigonometric", lambda z: 5 * np.sin(z)),
        ("sigmoid", lambda z: 5 / (1 + np.exp(-z))),
        ("rational", lambda z: np.clip((z + 0.7) / (1 + 1.4 + z), -5, 5)),
        ("power", lambda z: 0.25 * z * np.abs((z - 3) * (z + 3) * (z - 5) * (z + 5)) ** 0.2 if abs(z) < 5 else 0.0),
        ("exponential", lambda z: 25 * z / (1 + np.exp(z) + np.exp(-z))),
    ],
)
def test_mapping_is_the_published_formula(mapping: str, formula) -> None:
    z = np.linspace(-8, 8, 41)
    assert MAPPINGS[mapping](z, 0.7) == pytest.approx([formula(value) for value in z], abs=1e-9)


def test_mappings_are_finite_far_out_and_at_the_pole() -> None:
    z = np.array([-1e6, -800.0, -3.0, 800.0, 1e6])
    for function in MAPPINGS.values():
        assert np.isfinite(function(z, 1.0)).all()


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_process_matches_its_equations_term_by_term(mapping: str) -> None:
    """The parts, computed again from the documented draws with loops and no shared code."""
    config = SyntheticConfig(**TINY, mapping=mapping, mapping_scale=0.8, seed=3)
    simulator = config.build()
    prompts = stream(3, "world", "prompts").standard_normal((4, 2))
    rng = stream(3, "world", "outputs")
    M, N = rng.standard_normal((3, 4)), rng.standard_normal((2, 4))
    rng = stream(3, "world", "rewards")
    C, Q = rng.standard_normal((2, 4)), rng.standard_normal((3, 4))
    contexts = simulator.evaluation_contexts(3)
    expected = np.zeros((3, 4))
    for i, a in itertools.product(range(3), range(4)):
        x, q = contexts.context[i].astype(float), contexts.query[i].astype(float)
        mean = q @ M + MAPPINGS[mapping](0.8 * (prompts[a] @ N), 1.0)
        expected[i, a] = (x @ C + q @ Q) @ mean / ((2 + 3) * 4 * 5)
    assert simulator.expected_rewards(contexts) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mapping": "power", "confounded_dims": 2},
        {"reward_dims": 2, "output_gain": 2.0},
        {"reward_type": "binary", "output_std": 30.0},
        {"reward_type": "binary", "confounded_dims": 4, "output_std": 40.0},
    ],
)
def test_closed_form_agrees_with_sampling(settings: dict[str, object]) -> None:
    simulator = SyntheticConfig(**TINY, **settings).build()
    contexts = simulator.evaluation_contexts(2)
    exact = simulator.expected_rewards(contexts)
    n = 40_000
    for i, a in itertools.product(range(2), range(4)):
        rows = contexts.take(np.full(n, i))
        rounds = simulator.play(rows, np.full(n, a), np.random.default_rng(i), np.random.default_rng(10 + a))
        for values in (rounds.expected_reward, rounds.reward):
            error = values.std() / np.sqrt(n)
            assert abs(values.mean() - exact[i, a]) < 4.5 * error + 1e-5


def test_quadrature_of_binary_rewards_is_exact() -> None:
    simulator = SyntheticConfig(**TINY, reward_type="binary", output_std=25.0).build()
    contexts = simulator.evaluation_contexts(1)
    weights = simulator.rewards.weights(contexts)[0].astype(float)
    spread = np.linalg.norm(weights * 25)
    z = np.linspace(-10, 10, 200_001)
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    means = simulator.outputs.mean(contexts.repeat(4), np.arange(4)) @ weights
    expected = [np.sum(density / (1 + np.exp(-(m + spread * z)))) * (z[1] - z[0]) for m in means]
    assert simulator.expected_rewards(contexts)[0] == pytest.approx(expected, abs=1e-6)


def test_context_covariance() -> None:
    source = SyntheticConfig(seed=1).build().contexts
    drawn = source.sample(200_000, np.random.default_rng(0))
    joint = np.hstack([drawn.context, drawn.query])
    expected = source.factor.astype(float) @ source.factor.T.astype(float)
    assert np.cov(joint.T) == pytest.approx(expected, abs=0.12)
    assert np.abs(joint.mean(axis=0)).max() < 0.05


def test_confounded_outputs_ignore_the_prompt_but_not_the_reward() -> None:
    simulator = SyntheticConfig(**TINY, confounded_dims=2).build()
    assert (simulator.outputs.effects[:, 2:] == 0).all()
    assert (simulator.outputs.effects[:, :2] != 0).all()
    contexts = simulator.evaluation_contexts(5)
    assert (simulator.outputs.base(contexts)[:, 2:] == 0).all()
    assert (simulator.rewards.weights(contexts)[:, 2:] != 0).all()


def test_sparse_reward_reads_first_dimensions_with_a_smaller_normaliser() -> None:
    full = SyntheticConfig(**TINY).build()
    sparse = SyntheticConfig(**TINY, reward_dims=2).build()
    contexts = full.evaluation_contexts(5)
    assert (sparse.rewards.weights(contexts)[:, 2:] == 0).all()
    assert sparse.rewards.weights(contexts)[:, :2] == pytest.approx(2 * full.rewards.weights(contexts)[:, :2], rel=1e-5)


def test_paper_code_preset_doubles_the_mean_and_shares_matrices() -> None:
    paper = SyntheticConfig.preset("paper_code", seed=5).build()
    stated = SyntheticConfig(seed=5).build()
    assert paper.outputs.query_matrix == pytest.approx(2 * stated.outputs.query_matrix)
    assert paper.outputs.effects == pytest.approx(2 * stated.outputs.effects)
    assert paper.rewards.context_matrix * 250 == pytest.approx(stated.outputs.query_matrix, rel=1e-6)
    assert stated.rewards.context_matrix * 250 != pytest.approx(stated.outputs.query_matrix, rel=1e-2)
    one_point = paper.evaluation_contexts(1).take(np.zeros(50_000, dtype=int))
    drawn = paper.outputs.sample(one_point, np.zeros(50_000, dtype=int), np.random.default_rng(0)).embedding
    assert drawn.std(axis=0) == pytest.approx(np.ones(5), abs=0.02)


def test_clustered_prompts() -> None:
    prompts = SyntheticConfig(prompt_clusters=3, cluster_std=0.1).build().prompts.embeddings
    distance = np.linalg.norm(prompts[:, None] - prompts[None, :200], axis=-1)
    near = distance < 1.0
    assert len({tuple(row) for row in near}) == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"maping": "linear"}, "did you mean 'mapping'"),
        ({"mapping": "trigonometrical"}, "did you mean 'trigonometric'"),
        ({"n_prompts": 0}, "n_prompts: expected an integer ≥ 1, got 0"),
        ({"n_prompts": 2.5}, "n_prompts: expected an integer"),
        ({"output_std": -1.0}, "output_std: expected a finite number ≥ 0"),
        ({"reward_std": float("nan")}, "reward_std"),
        ({"confounded_dims": 6}, "from 0 to 5"),
        ({"reward_dims": 0}, "reward_dims"),
        ({"reward_type": "binry"}, "did you mean 'binary'"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_settings(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SyntheticConfig.from_settings(settings)


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match="did you mean 'paper_code'"):
        SyntheticConfig.preset("papercode")


def test_config_survives_json() -> None:
    config = SyntheticConfig.preset("paper_code", reward_dims=2, prompt_clusters=4)
    assert SyntheticConfig.from_settings(config.to_json()) == config


def test_own_parts_and_mismatched_parts() -> None:
    config = SyntheticConfig()
    own = AdditiveOutputs(PromptSet(np.zeros((7, 2))), np.zeros((5, 3)), np.ones((7, 3)), 0.5)
    simulator = config.build(outputs=own)
    assert (simulator.n_prompts, simulator.outputs.output_dim) == (7, 3)
    other_queries = config.build(contexts=GaussianContexts(np.eye(6), 2))
    assert other_queries.outputs.query_matrix.shape == (4, 5)
    with pytest.raises(DimensionError, match="outputs of dimension 3, but the reward model reads 5"):
        config.build(outputs=own, rewards=BilinearReward(np.ones((5, 5)), np.ones((5, 5)), 1.0))
    with pytest.raises(DimensionError, match=r"expected context and query of dimensions \(2, 2\), got \(5, 5\)"):
        config.build(rewards=BilinearReward(np.ones((2, 5)), np.ones((2, 5)), 1.0))
    with pytest.raises(DimensionError, match="queries of dimension 9"):
        config.build(outputs=AdditiveOutputs(PromptSet(np.zeros((7, 2))), np.zeros((9, 3)), np.ones((7, 3)), 0.5))
    with pytest.raises(ConfigError, match="lacks kind, mean"):
        Simulator(simulator.contexts, own, object())  # type: ignore[arg-type]


def test_own_prompts() -> None:
    drawn = SyntheticConfig(n_prompts=6).build()
    prompts = PromptSet(drawn.prompts.embeddings[[5, 0]], ("last", "first"))
    simulator = SyntheticConfig(n_prompts=6).build(prompts=prompts)
    assert simulator.prompts is prompts
    contexts = drawn.evaluation_contexts(7)
    expected = drawn.expected_rewards(contexts)[:, [5, 0]]
    assert simulator.expected_rewards(contexts) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert SyntheticConfig().build(prompts=PromptSet(np.zeros((3, 2)))).n_prompts == 3
    with pytest.raises(ConfigError, match="brings its own prompts"):
        SyntheticConfig().build(prompts=prompts, outputs=drawn.outputs)
    with pytest.raises(ConfigError, match="expected a PromptSet, got list"):
        SyntheticConfig().build(prompts=["a"])  # type: ignore[arg-type]


def test_contexts_record_is_what_parts_read() -> None:
    simulator = SyntheticConfig().build()
    with pytest.raises(DimensionError, match="got 4"):
        simulator.outputs.base(Contexts(np.zeros((1, 5)), np.zeros((1, 4))))
