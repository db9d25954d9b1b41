"""Estimators of scikit-learn as agents: a classifier as a policy, a regressor as a model of rewards."""

from __future__ import annotations

import inspect
import warnings
from abc import abstractmethod
from pathlib import Path
from typing import Any, Self

import numpy as np

from agents.adapters.base import Adapter, check_epsilon, features
from agents.adapters.rounds import Rounds
from agents.adapters.skops_files import skops_bytes, skops_object
from agents.adapters.storage import Stored, read_agent, reviving, write_agent
from agents.policies import greedy, softmax
from offprompts_env.config import check_kind, check_number
from offprompts_env.errors import ConfigError, DataError, DimensionError, foreign, missing_dependency
from offprompts_env.sampling import check_probabilities, row_parts
from offprompts_env.types import Contexts, FloatArray, LoggedDataset, PromptSet

# Parts of estimators that skops does not know itself and that are plain Python. Trees of all kinds are left out, as
# skops leaves them out: a forged one makes compiled code read outside its arrays.
_KNOWN = (
    "sklearn.calibration._CalibratedClassifier",
    "sklearn.calibration._SigmoidCalibration",
    "sklearn.gaussian_process._gpc._BinaryGaussianProcessClassifierLaplace",
    "sklearn.gaussian_process.kernels.ConstantKernel",
    "sklearn.gaussian_process.kernels.Matern",
    "sklearn.gaussian_process.kernels.Product",
    "sklearn.gaussian_process.kernels.RBF",
    "sklearn.gaussian_process.kernels.Sum",
    "sklearn.gaussian_process.kernels.WhiteKernel",
    "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
    "sklearn.neural_network._stochastic_optimizers.SGDOptimizer",
)
_EXTRA = "scikit-learn"


class _Estimator(Adapter):
    """What both agents share: how an estimator is taught and written."""

    def __init__(self, estimator: Any, prompts: PromptSet, epsilon: float) -> None:
        super().__init__(prompts)
        self.estimator, self.epsilon = estimator, check_epsilon(epsilon)
        self._features: int | None = None
        self._rounds: Rounds | None = None

    @property
    def _name(self) -> str:
        return f"scikit-learn's {type(self.estimator).__name__}"

    @property
    def _incremental(self) -> bool:
        return hasattr(self.estimator, "partial_fit")

    @property
    def _fitted(self) -> bool:
        from sklearn.exceptions import NotFittedError
        from sklearn.utils.validation import check_is_fitted

        try:
            check_is_fitted(self.estimator)
        except NotFittedError:
            return False
        return True

    def _known(self, contexts: Contexts) -> FloatArray:
        """Return features ``[x, q]``, (n, d), of the dimension that the agent learned from."""
        check_kind("contexts", contexts, Contexts, "of an observation take Contexts.of(observation)")
        return features(contexts, self._features)

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """Return the arguments of the constructor, after the catalogue."""

    def save(self, path: str | Path) -> Path:
        """Write the agent, and the rounds it must be fitted on again; in the format of skops, which runs no code.

        Raises:
            MissingDependencyError: skops is not installed.
            StorageError: skops cannot write the estimator, or the directory cannot be written.
        """
        rounds = None if self._rounds is None else dict(vars(self._rounds))
        content = skops_bytes({"estimator": self.estimator, "rounds": rounds}, self._name, _EXTRA)
        settings = {"arguments": self._settings(), "features": self._features}
        return write_agent(Stored(type(self).__name__, "scikit-learn", content, self.prompts, settings), path)

    @classmethod
    def load(cls, path: str | Path, *, trusted: bool = False) -> Self:
        """Read what :meth:`save` wrote.

        Args:
            path: the directory.
            trusted: you know who wrote it; needed for trees, forests, neighbours, and parts that are not of
                scikit-learn.

        Raises:
            MissingDependencyError: skops is not installed.
            StorageError: not such a directory, damaged, or with unknown parts and not `trusted`.
        """
        stored = read_agent(path, cls.__name__)
        with reviving(path):
            held = skops_object(stored.content, _KNOWN, f"the agent in {path}", _EXTRA, trusted=trusted)
            loaded = cls(held["estimator"], stored.prompts, **stored.settings["arguments"])
            loaded._features = stored.settings["features"]
            loaded._rounds = None if held["rounds"] is None else Rounds(**held["rounds"])
        return loaded


class ScikitLearnClassifier(_Estimator):
    """A classifier as a policy: ``π(a | x, q) = (1 − ε) predict_proba([x, q])_a + ε / A``.

    Its classes are prompt indices; prompts that it has not seen have probability ε / A. It learns by weighted
    classification: rounds are examples of the prompt that was played, with weight ``max(r − b, 0) / (A π₀(a | x, q))``,
    so that it maximises an importance-weighted log-likelihood (Zhao et al., 2012: outcome-weighted learning). With
    ``imitate=True`` all weigh the same, and it learns to do what the log's policy did.

    The pmf is uniform until the classifier is fitted.

    Args:
        classifier: any with ``predict_proba``, or a pipeline that ends in one; fitted already or not.
        prompts: the catalogue.
        epsilon: ε.
        imitate: whether to imitate, whatever was rewarded.
        baseline: b; rounds with a reward of b or less teach nothing.

    Raises:
        ConfigError: not such a classifier; or it takes no weights and is not to imitate.
        DataError: it is fitted already, and its classes are no prompt indices.
        MissingDependencyError: scikit-learn is not installed.
    """

    def __init__(
        self,
        classifier: Any,
        prompts: PromptSet,
        *,
        epsilon: float = 0.05,
        imitate: bool = False,
        baseline: float = 0.0,
    ) -> None:
        super().__init__(classifier, prompts, epsilon)
        if not _is("classifier", classifier) or not hasattr(classifier, "predict_proba"):
            raise ConfigError(
                f"classifier: expected a classifier of scikit-learn with predict_proba, got {classifier!r:.80}; "
                "sklearn.calibration.CalibratedClassifierCV gives it to others, ScikitLearnRegressor takes regressors"
            )
        check_number("baseline", baseline)
        self.imitate, self.baseline = imitate, baseline
        self._weights = _weights_argument(classifier)
        if self._weights is None and not imitate:
            raise ConfigError(
                f"classifier: expected one whose fit takes sample_weight, but {type(classifier).__name__} does not; "
                "pass imitate=True to learn what the log's policy did, or take another, such as LogisticRegression"
            )
        if self._fitted:
            self._classes()

    def _settings(self) -> dict[str, Any]:
        return {"epsilon": self.epsilon, "imitate": self.imitate, "baseline": self.baseline}

    def _classes(self) -> FloatArray:
        classes = np.asarray(self.estimator.classes_)
        if not np.issubdtype(classes.dtype, np.integer) or classes.min() < 0 or classes.max() >= self.n_prompts:
            raise DataError(
                f"classifier: expected classes in 0, ..., {self.n_prompts - 1}, as prompts are numbered, got "
                f"{classes[:5].tolist()}{', ...' if len(classes) > 5 else ''}; fit it on prompt indices"
            )
        return classes

    def probabilities(self, contexts: Contexts) -> FloatArray:
        """Return the pmf, (n, A).

        Raises:
            AgentError: the classifier raised.
            DataError: it gave no distributions.
            DimensionError: contexts of another dimension than it learned from.
            NumericalError: it gave NaN.
        """
        x, n = self._known(contexts), len(contexts)
        pmf = np.full((n, self.n_prompts), self.epsilon / self.n_prompts)
        if not self._fitted:
            return np.full_like(pmf, 1 / self.n_prompts)
        classes = self._classes()
        with foreign(f"{self._name} raised in {n} rounds"):
            own = self.estimator.predict_proba(x)
        pmf[:, classes] += (1 - self.epsilon) * check_probabilities(own, n, len(classes))
        return pmf

    def learn(self, log: LoggedDataset) -> None:
        """Learn from rounds: by ``partial_fit`` where the classifier has it, else by ``fit`` on all rounds so far.

        A classifier of the second kind is fitted once rounds with two different prompts are there.

        Raises:
            AgentError: the classifier raised.
            DimensionError: a log over another catalogue, or of other dimensions.
            PropensityError: the log has no propensities, and they are needed as it is not to imitate.
        """
        self._check_log(log)
        x = features(log.contexts, self._features)
        self._features = x.shape[1]
        weight = np.ones(len(log)) if self.imitate else self._weight(log)
        counts = weight > 0
        if not counts.any():
            warnings.warn(
                f"{self._name}: none of {len(log)} rewards is above baseline={self.baseline}, so there is nothing to "
                "learn from them; lower the baseline",
                stacklevel=2,
            )
            return
        rounds = Rounds(x[counts], log.action[counts], weight[counts])
        with foreign(f"{self._name} raised as it learned from {len(log)} rounds"):
            if self._incremental:
                everything = np.arange(self.n_prompts)
                self.estimator.partial_fit(rounds.x, rounds.action, classes=everything, **self._weighted(rounds))
                return
            self._rounds = rounds.after(self._rounds)
            if np.ptp(self._rounds.action) > 0:
                self.estimator.fit(self._rounds.x, self._rounds.action, **self._weighted(self._rounds))

    def _weight(self, log: LoggedDataset) -> FloatArray:
        propensity = log.require_propensities("ScikitLearnClassifier with imitate=False")
        return np.maximum(log.reward.astype(np.float64) - self.baseline, 0) / (propensity * self.n_prompts)

    def _weighted(self, rounds: Rounds) -> dict[str, FloatArray]:
        return {} if self._weights is None else {self._weights: rounds.reward}


class ScikitLearnRegressor(_Estimator):
    """A regressor as a model of rewards ``f([x, q, e_a])``, with e_a the embedding of prompt a.

    It plays the prompt of the largest prediction with probability ``1 − ε`` and else any; with ``beta=β`` it draws from
    ``softmax(β f)`` instead of the largest. Predictions are made for all prompts of many contexts in one call.

    The pmf is uniform until the regressor is fitted.

    Args:
        regressor: any regressor or pipeline that ends in one; fitted already (on ``[x, q, e_a]``) or not.
        prompts: the catalogue.
        epsilon: ε.
        beta: β, inverse temperature; None is greedy.

    Raises:
        ConfigError: not a regressor.
        MissingDependencyError: scikit-learn is not installed.
    """

    def __init__(self, regressor: Any, prompts: PromptSet, *, epsilon: float = 0.05, beta: float | None = None) -> None:
        super().__init__(regressor, prompts, epsilon)
        if not _is("regressor", regressor):
            raise ConfigError(
                f"regressor: expected a regressor of scikit-learn, got {regressor!r:.80}; ScikitLearnClassifier takes "
                "classifiers"
            )
        if beta is not None:
            check_number("beta", beta)
        self.beta = beta

    def _settings(self) -> dict[str, Any]:
        return {"epsilon": self.epsilon, "beta": self.beta}

    def predicted_rewards(self, contexts: Contexts) -> FloatArray:
        """Return ``f([x, q, e_a])`` of each prompt, (n, A); raises as :meth:`probabilities`."""
        x, embeddings = self._known(contexts), self.prompts.embeddings
        predicted = np.empty((len(x), self.n_prompts))
        width = x.shape[1] + embeddings.shape[1]
        for part in row_parts(len(x), self.n_prompts * width):
            rows = x[part]
            pairs = np.concatenate(
                [np.repeat(rows, self.n_prompts, axis=0), np.tile(embeddings, (len(rows), 1))], axis=1
            )
            with foreign(f"{self._name} raised in {len(pairs)} predictions from {width} features"):
                given = np.asarray(self.estimator.predict(pairs))
            if given.size != len(pairs):
                raise DimensionError(
                    f"regressor: expected {len(pairs)} predictions, one a context and prompt, got shape {given.shape}; "
                    "fit it on one target"
                )
            predicted[part] = given.reshape(len(rows), self.n_prompts)
        return predicted

    def probabilities(self, contexts: Contexts) -> FloatArray:
        """Return the pmf, (n, A).

        Raises:
            AgentError: the regressor raised.
            DimensionError: contexts of another dimension than it learned from, or other than one prediction a prompt.
            NumericalError: it gave NaN.
        """
        uniform = np.full((len(contexts), self.n_prompts), 1 / self.n_prompts)
        if not self._fitted:
            self._known(contexts)
            return uniform
        predicted = self.predicted_rewards(contexts)
        own = greedy(predicted) if self.beta is None else softmax(self.beta * predicted)
        return (1 - self.epsilon) * check_probabilities(own, *uniform.shape) + self.epsilon * uniform

    def learn(self, log: LoggedDataset) -> None:
        """Learn from rounds: by ``partial_fit`` where the regressor has it, else by ``fit`` on all rounds so far.

        Raises:
            AgentError: the regressor raised.
            DimensionError: a log over another catalogue, or of other dimensions.
        """
        self._check_log(log)
        x = features(log.contexts, self._features)
        self._features = x.shape[1]
        pairs = np.concatenate([x, self.prompts.embeddings[log.action]], axis=1)
        rounds = Rounds(pairs, log.action, log.reward.astype(np.float64))
        with foreign(f"{self._name} raised as it learned from {len(log)} rounds"):
            if self._incremental:
                self.estimator.partial_fit(rounds.x, rounds.reward)
            else:
                self._rounds = rounds.after(self._rounds)
                self.estimator.fit(self._rounds.x, self._rounds.reward)


def _is(kind: str, estimator: object) -> bool:
    """Whether `estimator` is an instance of that kind, by scikit-learn's own word."""
    try:
        from sklearn.base import BaseEstimator, is_classifier, is_regressor
    except ImportError as error:
        raise missing_dependency("scikit-learn", _EXTRA, "an estimator of scikit-learn as an agent") from error
    if not isinstance(estimator, BaseEstimator):
        return False
    return bool(is_classifier(estimator) if kind == "classifier" else is_regressor(estimator))


def _weights_argument(estimator: Any) -> str | None:
    """Return under which name the method that teaches `estimator` takes weights, or None."""
    prefix, last = "", estimator
    while hasattr(last, "steps"):  # a pipeline passes on what is prefixed with the name of the step
        name, last = last.steps[-1]
        prefix += f"{name}__"
    teach = last.partial_fit if not prefix and hasattr(last, "partial_fit") else last.fit
    return f"{prefix}sample_weight" if "sample_weight" in inspect.signature(teach).parameters else None
