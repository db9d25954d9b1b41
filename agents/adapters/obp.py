"""Policies of the Open Bandit Pipeline (obp 0.4.1): its bandits, and its learners from logs."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator

from agents.adapters.base import Adapter, check_arms, check_epsilon, features
from agents.adapters.storage import Stored, read_pickled, reviving, write_agent
from offprompts_env.config import check_integer, check_kind
from offprompts_env.errors import ConfigError, DataError, StorageError, foreign, missing_dependency, unknown_name
from offprompts_env.sampling import MATRIX_AT_ONCE, check_probabilities, row_parts
from offprompts_env.types import Contexts, FloatArray, LoggedDataset, PromptSet


class OBP(Adapter):
    """A policy of obp: ``OBP(LinUCB(dim=d_x + d_q, n_actions=A, epsilon=1.0), prompts)``.

    With features ``[x, q]``, its pmf is

    - of EpsilonGreedy, LinEpsilonGreedy, LogisticEpsilonGreedy and Random: their own, with their own ``epsilon``;
    - of LinUCB, LogisticUCB and IPWLearner: ``(1 − ε) 1{a is the best} + ε / A``;
    - of BernoulliTS, LinTS and LogisticTS: ``(1 − ε) k_a / K + ε / A`` where `a` is the best in ``k_a`` of K = `draws`
      draws from the posterior; the adapter acts from exactly that pmf, so that its propensities are exact;
    - of NNPolicyLearner: its softmax.

    Scores are computed here for all rounds and prompts at once, from the policy's parameters: its own
    ``select_action`` takes a round at a time. An IPWLearner is uniform until it has learned, and learns anew from each
    log; a bandit learns from round after round.

    Args:
        policy: for one prompt a round (``len_list=1``), with A actions.
        prompts: the catalogue.
        epsilon: ε.
        draws: K; needed for Thompson sampling, and for no other policy.
        seed: of those draws, which are the same at each look, and of how a network is fitted.

    Raises:
        ConfigError: not such a policy, or a setting out of range.
        DimensionError: a policy of another number of actions.
        MissingDependencyError: obp is not installed.
    """

    def __init__(
        self,
        policy: Any,
        prompts: PromptSet,
        *,
        epsilon: float = 0.05,
        draws: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(prompts)
        self.policy, self._epsilon, self._draws, self._seed = policy, check_epsilon(epsilon), draws, seed
        self._name = _checked_name(policy)
        check_arms(policy.n_actions, prompts, "obp")
        if policy.len_list != 1:
            raise ConfigError(
                f"policy: expected one that chooses one prompt a round, got len_list={policy.len_list}; make it with "
                "len_list=1"
            )
        check_integer("seed", seed, 0)
        if draws is not None:
            check_integer("draws", draws, 2)
        if (draws is None) == (self._name in _DRAWN):
            raise ConfigError(
                f"draws: {self._name} needs the number of draws from its posterior, got None; 100 is usual"
                if draws is None
                else f"draws: expected none, as {self._name} is no Thompson sampling, got {draws}"
            )

    @property
    def _dimension(self) -> int | None:
        if self._name == "IPWLearner":
            return getattr(self.policy.base_classifier_list[0], "n_features_in_", None)
        return getattr(self.policy, "dim", getattr(self.policy, "dim_context", None))

    def probabilities(self, contexts: Contexts) -> FloatArray:
        """Return the pmf, (n, A) float64.

        Raises:
            AgentError: the policy raised.
            DataError: a context is not finite.
            DimensionError: contexts of another dimension than it was made for.
        """
        check_kind("contexts", contexts, Contexts, "of an observation take Contexts.of(observation)")
        x = features(contexts, self._dimension)
        if not np.isfinite(x).all():
            row = int(np.argmin(np.isfinite(x).all(axis=1)))
            raise DataError(f"contexts: expected finite numbers, got {x[row]} in row {row}; repair that row")
        with foreign(f"{self._name} raised in {len(x)} rounds"):
            pmf = self._pmf(x)
        return check_probabilities(pmf, len(x), self.n_prompts)

    def _pmf(self, x: FloatArray) -> FloatArray:
        policy = self.policy
        if self._name == "NNPolicyLearner":
            own = policy.predict_proba(x)[:, :, 0].astype(np.float64)
            return np.asarray(own / own.sum(axis=1, keepdims=True))
        if self._name == "IPWLearner":
            if self._dimension is None:
                return np.full((len(x), self.n_prompts), 1 / self.n_prompts)
            return self._smoothed(policy.predict(x)[:, :, 0], self._epsilon)
        if self._name in _DRAWN:
            weights = _DRAWN[self._name](policy, self._draws or 0, np.random.default_rng(self._seed))
            return self._smoothed(self._shares(x, weights), self._epsilon)
        if self._name in _FREE and policy.action_counts.min() == 0:
            return np.full((len(x), self.n_prompts), 1 / self.n_prompts)
        best = _best(_SCORES[self._name](policy, x))
        return self._smoothed(best, self._epsilon if self._name in _CERTAIN else policy.epsilon)

    def _smoothed(self, own: FloatArray, epsilon: float) -> FloatArray:
        return np.asarray((1 - epsilon) * own + epsilon / self.n_prompts)

    def _shares(self, x: FloatArray, drawn: FloatArray) -> FloatArray:
        """Return in which share of `drawn` weights each prompt is the best, (n, A).

        Args:
            x: features (n, d).
            drawn: weights (K, A, d), or values (K, A, 1) without features. They are the same for all rows, so that no
                row depends on what else is asked for.
        """
        draws, count, _ = drawn.shape
        weights = drawn.reshape(draws * count, -1).T
        rows = x if self._name not in _FREE else np.ones((len(x), 1))
        shares = np.empty((len(x), count))
        for part in row_parts(len(x), draws * count, MATRIX_AT_ONCE):
            shares[part] = _best((rows[part] @ weights).reshape(-1, draws, count)).mean(axis=1)
        return shares

    def learn(self, log: LoggedDataset) -> None:
        """Learn from rounds; a learner from logs is fitted with the logged propensities.

        Raises:
            AgentError: the policy raised.
            DataError: a reward that the policy cannot learn from.
            DimensionError: a log over another catalogue, or of other dimensions.
            PropensityError: a propensity that is needed is unknown.
        """
        self._check_log(log)
        self._check_rewards(log)
        fits = self._name in ("IPWLearner", "NNPolicyLearner")
        x = features(log.contexts, None if self._name == "IPWLearner" else self._dimension)
        pscore = log.require_propensities(self._name) if fits else None
        with foreign(f"{self._name} raised while it learned from {len(log)} rounds"):
            if fits:
                # A network's batches are shuffled by torch's global generator: seeded for this, then put back.
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(self._seed)
                    reward = log.reward.astype(np.float64)
                    self.policy.fit(context=x, action=log.action, reward=reward, pscore=pscore)
                return
            # One by one: so obp updates a bandit, every `batch_size` rounds.
            for row, action, reward in zip(x[:, None, :], log.action.tolist(), log.reward.tolist(), strict=True):
                context = {} if self._name in _FREE else {"context": row}
                self.policy.update_params(action=action, reward=reward, **context)

    def _check_rewards(self, log: LoggedDataset) -> None:
        if self._name == "IPWLearner" and log.reward.min() < 0:
            raise DataError(
                f"reward: expected none below 0, since IPWLearner weighs rounds by it, got {log.reward.min()} in row "
                f"{log.reward.argmin()}; learn from dataclasses.replace(log, reward=log.reward - log.reward.min())"
            )
        binary = self._name == "BernoulliTS" or self._name.startswith("Logistic")
        wrong = ~np.isin(log.reward, (0, 1))
        if binary and wrong.any():
            row = int(np.argmax(wrong))
            raise DataError(
                f"reward: expected 0 or 1, all that {self._name} can learn from, got {log.reward[row]} in row {row}; "
                "use a policy for numbers, such as LinTS"
            )

    def save(self, path: str | Path) -> Path:
        """Write the agent into the directory `path`, as a pickle.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            content = pickle.dumps(self.policy)
        except Exception as error:
            raise StorageError(
                f"agent: {self._name} cannot be pickled: {error}; make it of functions and classes with a name"
            ) from error
        settings = {"epsilon": self._epsilon, "draws": self._draws, "seed": self._seed}
        return write_agent(Stored("OBP", "obp", content, self.prompts, settings), path)

    @classmethod
    def load(cls, path: str | Path, *, trusted: bool = False) -> OBP:
        """Read an agent that :meth:`save` wrote.

        Args:
            path: the directory.
            trusted: the file is a pickle, which can run any code; say that you know who wrote it.

        Raises:
            StorageError: not such a directory, damaged, or not `trusted`.
        """
        _policies()
        stored, policy = read_pickled(path, "OBP", trusted=trusted)
        with reviving(path):
            return cls(policy, stored.prompts, **stored.settings)


def _policies() -> Any:
    try:
        import obp.policy
    except ImportError as error:
        raise missing_dependency("obp", "obp", "agents.adapters.OBP") from error
    return obp.policy


def _checked_name(policy: Any) -> str:
    """Return the class of a policy of obp itself: one that is derived from it may choose in another way."""
    name = type(policy).__name__
    if type(policy) is not getattr(_policies(), name, None) or name not in _NAMES:
        raise unknown_name("policy of obp", name, _NAMES)
    return name


def _best(scores: FloatArray) -> FloatArray:
    """Return 1 for the largest score of each row: of those that tie the last, as ``argsort()[::-1]`` in obp."""
    count = scores.shape[-1]
    return np.asarray(np.eye(count)[count - 1 - np.argmax(scores[..., ::-1], axis=-1)])


def _means(policy: Any, x: FloatArray) -> FloatArray:
    """Return ``b_a / n_a``, what each action earned so far, (n, A)."""
    return np.tile(policy.reward_counts / policy.action_counts, (len(x), 1))


def _linear(policy: Any, x: FloatArray) -> FloatArray:
    """Return ``x · A_a⁻¹ b_a``, (n, A)."""
    return np.asarray(x @ np.einsum("aij,ja->ia", policy.A_inv, policy.b))


def _linear_bound(policy: Any, x: FloatArray) -> FloatArray:
    """Return ``x · A_a⁻¹ b_a + ε √(x · A_a⁻¹ x)``, (n, A) (Li et al., 2010)."""
    spread = np.sqrt(np.einsum("nad,nd->na", np.tensordot(x, policy.A_inv, (1, 1)), x))
    return np.asarray(_linear(policy, x) + policy.epsilon * spread)


def _logistic(policy: Any, x: FloatArray) -> FloatArray:
    """Return ``σ(x · m_a)``, (n, A)."""
    return np.stack([model.predict_proba(x) for model in policy.model_list], axis=1)


def _logistic_bound(policy: Any, x: FloatArray) -> FloatArray:
    """Return ``σ(x · m_a) + ε √(Σ_j x_j² / q_aj)``, (n, A)."""
    precision = np.stack([model._q for model in policy.model_list])
    return np.asarray(_logistic(policy, x) + policy.epsilon * np.sqrt(x**2 @ (1 / precision).T))


def _draw_means(policy: Any, draws: int, rng: Generator) -> FloatArray:
    """Draw means from ``Beta(α + successes, β + failures)``, (draws, A, 1)."""
    successes = policy.reward_counts + policy.alpha
    failures = policy.action_counts - policy.reward_counts + policy.beta
    return np.asarray(rng.beta(successes, failures, size=(draws, policy.n_actions))[:, :, None])


def _draw_linear(policy: Any, draws: int, rng: Generator) -> FloatArray:
    """Draw weights from ``Normal(A_a⁻¹ b_a, A_a⁻¹)``, (draws, A, d)."""
    means = np.einsum("aij,ja->ai", policy.A_inv, policy.b)
    drawn = [rng.multivariate_normal(mean, spread, draws) for mean, spread in zip(means, policy.A_inv, strict=True)]
    return np.stack(drawn, axis=1)


def _draw_logistic(policy: Any, draws: int, rng: Generator) -> FloatArray:
    """Draw weights from ``Normal(m_a, diag(sd_a²))``, (draws, A, d); σ keeps their order."""
    drawn = [rng.normal(model._m, model.sd(), (draws, policy.dim)) for model in policy.model_list]
    return np.stack(drawn, axis=1)


_FREE = ("EpsilonGreedy", "Random", "BernoulliTS")
_CERTAIN = ("LinUCB", "LogisticUCB")
_SCORES: dict[str, Callable[[Any, FloatArray], FloatArray]] = {
    "EpsilonGreedy": _means,
    "Random": _means,
    "LinEpsilonGreedy": _linear,
    "LinUCB": _linear_bound,
    "LogisticEpsilonGreedy": _logistic,
    "LogisticUCB": _logistic_bound,
}
_DRAWN: dict[str, Callable[[Any, int, Generator], FloatArray]] = {
    "BernoulliTS": _draw_means,
    "LinTS": _draw_linear,
    "LogisticTS": _draw_logistic,
}
_NAMES = (*_SCORES, *_DRAWN, "IPWLearner", "NNPolicyLearner")
