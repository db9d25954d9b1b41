from dataclasses import dataclass

import numpy as np
import pytest

from offprompts_env.errors import ConfigError, DataError, DimensionError, NumericalError
from offprompts_env.sampling import chosen_probabilities, inverse_cdf, sample_actions
from offprompts_env.simulator import RewardNoise, Simulator
from offprompts_env.synthetic import AdditiveOutputs, BilinearReward, SyntheticConfig
from offprompts_env.types import Contexts, FloatArray, Outputs


@dataclass
class Table:
    """A policy that returns the same row everywhere."""

    row: FloatArray

    @property
    def n_prompts(self) -> int:
        return len(self.row)

    def probabilities(self, contexts: Contexts) -> FloatArray:
        return np.tile(self.row, (len(contexts), 1))


class Opaque:
    """An output model that hides its closed form, so that the simulator has to sample."""

    def __init__(self, inner: object) -> None:
        self.inner, self.output_dim, self.prompts = inner, inner.output_dim, inner.prompts

    def sample(self, contexts: Contexts, actions: np.ndarray, rng: np.random.Generator) -> Outputs:
        return self.inner.sample(contexts, actions, rng)


def tiny(**settings: object) -> Simulator:
    return SyntheticConfig(n_prompts=4, output_dim=3, **settings).build()


def hidden(**settings: object) -> Simulator:
    exact = tiny(**settings)
    return Simulator(exact.contexts, Opaque(exact.outputs), exact.rewards)


def test_policy_value_is_the_sum_over_prompts() -> None:
    simulator = tiny()
    policy = Table(np.array([0.1, 0.2, 0.3, 0.4]))
    contexts = simulator.evaluation_contexts(50, seed=3)
    estimate = simulator.policy_value(policy, contexts=contexts)
    assert estimate.terms == pytest.approx(simulator.expected_rewards(contexts) @ policy.row)
    assert estimate.value == pytest.approx(simulator.policy_value(policy, n=50, seed=3).value)


def test_sampled_value_agrees_with_the_exact_one() -> None:
    exact, sampled = tiny(), hidden()
    assert exact.exact
    assert not sampled.exact
    policy = Table(np.array([0.1, 0.2, 0.3, 0.4]))
    truth = exact.policy_value(policy, n=200_000)
    estimate = sampled.policy_value(policy, n=200_000)
    difference = estimate.minus(truth)
    assert abs(difference.value) < 4 * difference.standard_error
    contexts = exact.evaluation_contexts(3)
    drawn = sampled.expected_rewards(contexts, n_samples=4000)
    assert drawn == pytest.approx(exact.expected_rewards(contexts), abs=0.02)


def test_common_random_numbers_make_equal_policies_equal_and_close_policies_close() -> None:
    sampled = hidden()
    first = sampled.policy_value(Table(np.array([0.25, 0.25, 0.25, 0.25])), n=4000)
    again = sampled.policy_value(Table(np.array([0.25, 0.25, 0.25, 0.25])), n=4000)
    near = sampled.policy_value(Table(np.array([0.25, 0.25, 0.26, 0.24])), n=4000)
    assert (first.terms == again.terms).all()
    assert np.mean(first.terms != near.terms) < 0.02
    assert first.minus(near).standard_error < 0.2 * first.standard_error


def test_oracle_is_the_best_of_all_prompts() -> None:
    simulator = tiny()
    contexts = simulator.evaluation_contexts(20)
    assert (simulator.oracle(contexts) == simulator.expected_rewards(contexts).argmax(axis=1)).all()


def test_wrong_policies() -> None:
    simulator = tiny()
    foreign = Table(np.full(4, 0.25))
    foreign.catalogue = tiny(seed=9).prompts.fingerprint
    with pytest.raises(DimensionError, match="the catalogues differ"):
        simulator.policy_value(foreign)
    foreign.catalogue = simulator.prompts.fingerprint
    simulator.policy_value(foreign)
    with pytest.raises(DimensionError, match="expected 4 prompts as in this simulator, got 3"):
        simulator.policy_value(Table(np.ones(3) / 3))
    with pytest.raises(DataError, match=r"sum 1.2"):
        simulator.policy_value(Table(np.array([0.3, 0.3, 0.3, 0.3])))
    with pytest.raises(DataError, match=r"minimum -0.2"):
        simulator.policy_value(Table(np.array([-0.2, 0.4, 0.4, 0.4])))
    with pytest.raises(NumericalError, match="NaN in row 0"):
        simulator.policy_value(Table(np.array([np.nan, 0.4, 0.4, 0.2])))


def test_nan_rewards_are_refused() -> None:
    class Broken:
        kind = "continuous"

        def mean(self, contexts: Contexts, outputs: Outputs) -> FloatArray:
            return np.full(len(contexts), np.nan)

    exact = tiny()
    simulator = Simulator(exact.contexts, exact.outputs, Broken())
    with pytest.raises(NumericalError, match="reward: expected finite numbers, got nan in row 0"):
        simulator.play(
            exact.evaluation_contexts(2), np.zeros(2, int), np.random.default_rng(0), np.random.default_rng(1)
        )


@pytest.mark.parametrize(
    ("kind", "mean", "error", "words"),
    [
        ("binary", [0.5, 1.2], NumericalError, r"probabilities in \[0, 1\] for a binary reward, got 1.2 in row 1"),
        ("binary", [-0.1, 0.2], NumericalError, r"got -0.1 in row 0"),
        ("continuous", [[0.1, 0.2]], DimensionError, r"expected 2 means, one a round, got shape \(1, 2\)"),
    ],
)
def test_wrong_means_of_an_own_reward_model(kind: str, mean: object, error: type[Exception], words: str) -> None:
    class Own:
        def __init__(self) -> None:
            self.kind = kind

        def mean(self, contexts: Contexts, outputs: Outputs) -> FloatArray:
            return np.array(mean)

    exact = tiny()
    simulator = Simulator(exact.contexts, exact.outputs, Own())
    with pytest.raises(error, match=words):
        simulator.play(
            exact.evaluation_contexts(2), np.zeros(2, int), np.random.default_rng(0), np.random.default_rng(1)
        )
    with pytest.raises(error, match=words):
        simulator.policy_value(Table(np.ones(4) / 4), n=2)


def test_noise_has_the_stated_moments() -> None:
    mean = np.full(100_000, 0.3)
    normal = RewardNoise("continuous", 2.0).draw(mean, np.random.default_rng(0))
    assert normal.mean() == pytest.approx(0.3, abs=0.03)
    assert normal.std() == pytest.approx(2.0, abs=0.03)
    coin = RewardNoise("binary").draw(mean, np.random.default_rng(0))
    assert set(np.unique(coin)) == {0.0, 1.0}
    assert coin.mean() == pytest.approx(0.3, abs=0.01)
    assert (RewardNoise("continuous", 0.0).draw(mean, np.random.default_rng(0)) == np.float32(0.3)).all()


def test_inverse_cdf_never_draws_an_impossible_prompt() -> None:
    pmf = np.tile(np.array([0.0, 0.3, 0.0, 0.7, 0.0]), (3, 1))
    assert inverse_cdf(pmf, np.array([0.0, 0.3, 1 - 1e-16])).tolist() == [1, 3, 3]


def test_sampled_frequencies_match_the_pmf() -> None:
    policy = Table(np.array([0.1, 0.2, 0.3, 0.4]))
    contexts = tiny().evaluation_contexts(100_000)
    actions, propensities = sample_actions(policy, contexts, np.random.default_rng(0))
    assert np.bincount(actions) / len(actions) == pytest.approx(policy.row, abs=0.007)
    assert (propensities == policy.row[actions]).all()


def test_propensities_are_those_of_the_draw_where_rows_sum_to_nearly_one() -> None:
    policy = Table(np.array([1.0005, 0.0, 0.0, 0.0]))
    contexts = tiny().evaluation_contexts(3)
    assert sample_actions(policy, contexts, np.random.default_rng(0))[1].tolist() == [1.0] * 3
    policy = Table(np.array([0.3, 0.3, 0.2, 0.1995]))
    actions, propensities = sample_actions(policy, contexts, np.random.default_rng(0))
    assert propensities == pytest.approx(policy.row[actions] / 0.9995, rel=1e-12)
    assert chosen_probabilities(policy, contexts, actions) == pytest.approx(propensities, rel=1e-12)


class Saturating(BilinearReward):
    """Overrides what is played, and forgets what the closed form reads."""

    def mean(self, contexts: Contexts, outputs: Outputs) -> FloatArray:
        return np.tanh(3 * super().mean(contexts, outputs))


class Squashed(AdditiveOutputs):
    def sample(self, contexts: Contexts, actions: np.ndarray, rng: np.random.Generator) -> Outputs:
        return Outputs(np.tanh(super().sample(contexts, actions, rng).embedding))


@pytest.mark.parametrize("kind", ["continuous", "binary"])
def test_parts_that_play_another_game_than_their_closed_form_are_refused(kind: str) -> None:
    config = SyntheticConfig(n_prompts=4, reward_type=kind)
    with pytest.raises(ConfigError, match=r"Saturating has weights\(\).* but mean\(\) is something else"):
        config.build(rewards=Saturating.draw(config))
    with pytest.raises(ConfigError, match=r"Squashed has effects .* but sample\(\) draws something else"):
        config.build(outputs=Squashed.draw(config))
    assert not config.build(outputs=Opaque(Squashed.draw(config))).exact


def test_what_is_no_policy_has_no_value() -> None:
    with pytest.raises(ConfigError, match="policy: expected an object like Policy, but object lacks n_prompts, prob"):
        tiny().policy_value(object())
