"""Estimators of scikit-learn as agents."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import agents
import offprompts_env as op
from agents.adapters.base import Adapter, features
from agents.adapters.scikit_learn import ScikitLearnClassifier, ScikitLearnRegressor
from offprompts_env.errors import (
    AgentError,
    ConfigError,
    DataError,
    DimensionError,
    NumericalError,
    OffPromptsError,
    PropensityError,
    StorageError,
)
from offprompts_env.types import Contexts, LoggedDataset, PromptSet
from tests.agents.adapters.conformance import N_PROMPTS, Conformance, simulator

pytest.importorskip("sklearn")
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression, Ridge, SGDClassifier, SGDRegressor
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeRegressor


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, on small batches
        yield


class TestRefittedClassifier(Conformance):
    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        return ScikitLearnClassifier(make_pipeline(StandardScaler(), LogisticRegression()), prompts)


class TestIncrementalClassifier(Conformance):
    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        return ScikitLearnClassifier(SGDClassifier(loss="log_loss", random_state=seed), prompts, epsilon=0.1)


class TestImitator(Conformance):
    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        return ScikitLearnClassifier(MLPClassifier((8,), random_state=seed), prompts, imitate=True)


class TestGreedyRegressor(Conformance):
    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        return ScikitLearnRegressor(Ridge(), prompts)


class TestSoftmaxRegressor(Conformance):
    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        return ScikitLearnRegressor(SGDRegressor(random_state=seed), prompts, epsilon=0.0, beta=2.0)


class TestTrees(Conformance):
    """Skops does not know whether to trust compiled trees."""

    pickled = True

    def make(self, prompts: PromptSet, seed: int) -> Adapter:
        return ScikitLearnRegressor(DecisionTreeRegressor(max_depth=4, random_state=seed), prompts)


def played(n: int = 600) -> LoggedDataset:
    return op.collect(simulator(), agents.UniformPolicy(N_PROMPTS), n, seed=1, progress=False)


def made(**changes: Any) -> LoggedDataset:
    """Return four rounds in which prompts 0 and 2 were played; what pays depends on the context."""
    columns: dict[str, Any] = {
        "context": [[1.0], [1.0], [-1.0], [-1.0]], "query": np.zeros((4, 1)), "action": [0, 2, 0, 2],
        "propensity": [0.5, 0.25, 0.5, 0.25], "reward": [1.0, 0.0, -1.0, 2.0], "output": np.zeros((4, 0)),
        "prompts": three(),
    }  # fmt: skip
    return LoggedDataset(
        **{name: np.asarray(value) if name != "prompts" else value for name, value in (columns | changes).items()}
    )


def three() -> PromptSet:
    return PromptSet(np.eye(3))


class Recorder(ClassifierMixin, BaseEstimator):
    """Keeps what it was fitted on, and gives the frequencies of its classes."""

    def fit(self, X: np.ndarray, y: np.ndarray, sample_weight: np.ndarray) -> Recorder:
        self.classes_, self.x_, self.y_, self.w_ = np.unique(y), X, y, sample_weight
        return self

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        return np.full((len(X), len(self.classes_)), 1 / len(self.classes_))


def test_a_classifier_is_fitted_on_rewards_over_propensities() -> None:
    adapter = ScikitLearnClassifier(Recorder(), three(), epsilon=0.3)
    adapter.learn(made())
    np.testing.assert_allclose(adapter.estimator.x_, [[1, 0], [-1, 0]])
    np.testing.assert_array_equal(adapter.estimator.y_, [0, 2])
    np.testing.assert_allclose(adapter.estimator.w_, [1 / (3 * 0.5), 2 / (3 * 0.25)])
    np.testing.assert_allclose(adapter.probabilities(made().contexts)[0], [0.45, 0.1, 0.45])  # 1 was never seen
    adapter.learn(made())
    assert len(adapter.estimator.y_) == 4  # on all rounds so far


def test_a_baseline_and_imitation_weigh_differently() -> None:
    adapter = ScikitLearnClassifier(Recorder(), three(), baseline=-0.5)
    adapter.learn(made())
    np.testing.assert_allclose(adapter.estimator.w_, [1.5 / 1.5, 0.5 / 0.75, 2.5 / 0.75])
    adapter = ScikitLearnClassifier(Recorder(), three(), imitate=True)
    adapter.learn(made(propensity=np.full(4, np.nan)))
    np.testing.assert_array_equal(adapter.estimator.w_, np.ones(4))


def test_nothing_is_learned_from_nothing() -> None:
    adapter = ScikitLearnClassifier(LogisticRegression(), three())
    adapter.learn(made(reward=np.zeros(4)))
    adapter.learn(made(reward=np.array([1.0, 0, 0, 0])))  # one prompt alone is no problem of classification
    np.testing.assert_allclose(adapter.probabilities(made().contexts), 1 / 3)
    adapter.learn(made(reward=np.array([0.0, 0, 0, 1])))
    assert adapter.probabilities(made().contexts)[0].argmax() == 0
    assert adapter.probabilities(made().contexts)[3].argmax() == 2


@pytest.mark.parametrize(
    "classifier",
    [
        LogisticRegression(),
        make_pipeline(StandardScaler(), LogisticRegression()),
        SGDClassifier(loss="log_loss", random_state=0),
        GaussianNB(),
        RandomForestClassifier(20, random_state=0),
    ],
)
def test_classifiers_learn_what_pays(classifier: Any) -> None:
    world, log = simulator(), played(4_000)
    adapter = ScikitLearnClassifier(classifier, world.prompts, epsilon=0.0)
    adapter.learn(log)
    better, uniform = (world.policy_value(p).value for p in (adapter, agents.UniformPolicy(N_PROMPTS)))
    assert better > uniform + 0.05


def test_a_regressor_learns_what_pays() -> None:
    world = simulator()
    adapter = ScikitLearnRegressor(
        DecisionTreeRegressor(min_samples_leaf=50, random_state=0), world.prompts, epsilon=0.0
    )
    adapter.learn(played(4_000))
    uniform = world.policy_value(agents.UniformPolicy(N_PROMPTS)).value
    assert world.policy_value(adapter).value > uniform + 0.05


def test_imitation_is_the_logs_policy() -> None:
    world = simulator()
    logger = agents.SoftmaxPolicy(lambda contexts: contexts.context[:, :1] * np.arange(N_PROMPTS), N_PROMPTS, 0.3)
    log = op.collect(world, logger, 8_000, seed=1, progress=False)
    adapter = ScikitLearnClassifier(LogisticRegression(), world.prompts, epsilon=0.0, imitate=True)
    adapter.learn(log)
    contexts = world.contexts.sample(200, np.random.default_rng(3))
    assert np.abs(adapter.probabilities(contexts) - logger.probabilities(contexts)).mean() < 0.02


def test_predictions_are_those_of_each_pair() -> None:
    world, log = simulator(), played()
    adapter = ScikitLearnRegressor(DecisionTreeRegressor(random_state=0), world.prompts, epsilon=0.2)
    adapter.learn(log)
    contexts = log.take(slice(0, 30)).contexts
    predicted = adapter.predicted_rewards(contexts)
    for row, prompt in ((0, 0), (7, 3), (29, 5)):
        pair = np.concatenate([features(contexts)[row], world.prompts.embeddings[prompt]])[None]
        assert predicted[row, prompt] == adapter.estimator.predict(pair)[0]
    best = predicted.argmax(axis=1)
    np.testing.assert_allclose(adapter.probabilities(contexts)[np.arange(30), best], 0.8 + 0.2 / N_PROMPTS)
    adapter.beta = 3.0
    expected = np.exp(3 * predicted) / np.exp(3 * predicted).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(adapter.probabilities(contexts), 0.8 * expected + 0.2 / N_PROMPTS)


def test_one_that_is_fitted_acts_at_once() -> None:
    log = played()
    classifier = LogisticRegression().fit(features(log.contexts), log.action)
    pmf = ScikitLearnClassifier(classifier, simulator().prompts, epsilon=0.0).probabilities(log.contexts)
    np.testing.assert_allclose(pmf, classifier.predict_proba(features(log.contexts)))


@pytest.mark.parametrize(
    "estimator",
    [SGDClassifier(loss="log_loss", random_state=0), LogisticRegression(), CalibratedClassifierCV(LinearSVC(), cv=2)],
)
def test_a_saved_agent_goes_on_learning(estimator: Any, tmp_path: Path) -> None:
    log = played(400)
    adapter = ScikitLearnClassifier(estimator, simulator().prompts, epsilon=0.2, baseline=-0.1)
    adapter.learn(log.take(slice(0, 200)))
    loaded = ScikitLearnClassifier.load(adapter.save(tmp_path))
    assert (loaded.epsilon, loaded.baseline, loaded.imitate) == (0.2, -0.1, False)
    for agent in (adapter, loaded):
        agent.learn(log.take(slice(200, 400)))
    np.testing.assert_array_equal(loaded.probabilities(log.contexts), adapter.probabilities(log.contexts))


def test_parts_from_elsewhere_are_not_read_unasked(tmp_path: Path) -> None:
    adapter = ScikitLearnClassifier(Recorder(), three())
    adapter.learn(made())
    adapter.save(tmp_path)
    with pytest.raises(StorageError, match=r"known to be harmless, got .*Recorder; .* trusted=True"):
        ScikitLearnClassifier.load(tmp_path)
    ScikitLearnClassifier.load(tmp_path, trusted=True)
    with pytest.raises(StorageError, match="expected one of class ScikitLearnRegressor"):
        ScikitLearnRegressor.load(tmp_path)


WRONG: list[tuple[type, Any, dict[str, Any], type[OffPromptsError], str]] = [
    (ScikitLearnClassifier, Ridge(), {}, ConfigError, "expected a classifier .* ScikitLearnRegressor takes regressors"),
    (ScikitLearnClassifier, LinearSVC(), {}, ConfigError, "CalibratedClassifierCV"),
    (ScikitLearnClassifier, "LogisticRegression", {}, ConfigError, "got 'LogisticRegression'"),
    (ScikitLearnClassifier, KNeighborsClassifier(), {}, ConfigError, "KNeighborsClassifier does not; pass imitate"),
    (ScikitLearnClassifier, LogisticRegression(), {"epsilon": 2}, ConfigError, "epsilon: expected a probability"),
    (ScikitLearnClassifier, LogisticRegression(), {"baseline": "0"}, ConfigError, "baseline: expected a finite number"),
    (ScikitLearnRegressor, LogisticRegression(), {}, ConfigError, "expected a regressor .* takes classifiers"),
    (ScikitLearnRegressor, Ridge(), {"beta": np.inf}, ConfigError, "beta: expected a finite number"),
]


@pytest.mark.parametrize(("kind", "estimator", "settings", "error", "says"), WRONG)
def test_a_wrong_estimator_is_told(
    kind: Any, estimator: Any, settings: dict[str, Any], error: type[OffPromptsError], says: str
) -> None:
    with pytest.raises(error, match=says):
        kind(estimator, three(), **settings)


def test_classes_that_are_no_prompts_are_told() -> None:
    x, names = np.zeros((4, 2)), np.array(["a", "b", "a", "b"])
    with pytest.raises(
        DataError, match=r"expected classes in 0, ..., 2, .* got \['a', 'b'\]; fit it on prompt indices"
    ):
        ScikitLearnClassifier(LogisticRegression().fit(x, names), three())
    with pytest.raises(DataError, match=r"got \[1, 3\]"):
        ScikitLearnClassifier(LogisticRegression().fit(x, [1, 3, 1, 3]), three())


def test_propensities_are_needed_to_weigh() -> None:
    with pytest.raises(PropensityError, match="imitate=False"):
        ScikitLearnClassifier(LogisticRegression(), three()).learn(made(propensity=np.full(4, np.nan)))


class Odd(RegressorMixin, BaseEstimator):
    """Predicts whatever it is told to."""

    def __init__(self, function: Any = None) -> None:
        self.function = function

    def fit(self, X: np.ndarray, y: np.ndarray) -> Odd:
        self.fitted_ = True
        return self

    def predict(self, X: np.ndarray) -> Any:
        return self.function(X)


@pytest.mark.parametrize(
    ("function", "error", "says"),
    [
        (lambda X: np.zeros((len(X), 2)), DimensionError, r"expected 12 predictions, .* got shape \(12, 2\)"),
        (lambda X: np.full(len(X), np.nan), NumericalError, "NaN in row 0"),
        (lambda X: X @ np.zeros(3), AgentError, "Odd raised in 12 predictions from 5 features: ValueError"),
    ],
)
def test_wrong_predictions_are_told(function: Any, error: type[OffPromptsError], says: str) -> None:
    adapter = ScikitLearnRegressor(Odd(function), three())
    adapter.learn(made())
    with pytest.raises(error, match=says):
        adapter.probabilities(made().contexts)


def test_a_wrong_pmf_is_told() -> None:
    adapter = ScikitLearnClassifier(Recorder(), three())
    adapter.learn(made())
    adapter.estimator.predict_proba = lambda X: np.ones((len(X), 2))
    with pytest.raises(DataError, match="sum to 1, got sum 2"):
        adapter.probabilities(Contexts(np.zeros((2, 1)), np.zeros((2, 1))))
