"""Agents of the library contextualbandits: LinUCB, bootstrapped Thompson sampling, softmax explorers and others."""

from __future__ import annotations

import copyreg
import io
import pickle
import types
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from agents.adapters.base import Adapter, check_arms, check_epsilon, features
from agents.adapters.draws import check_draws, drawn_pmf
from agents.adapters.rounds import Rounds
from agents.adapters.storage import Stored, read_pickled, reviving, write_agent
from agents.policies import greedy, softmax
from offprompts_env.config import check_kind, check_number
from offprompts_env.errors import ConfigError, DataError, StorageError, foreign, missing_dependency
from offprompts_env.sampling import check_probabilities
from offprompts_env.types import Contexts, FloatArray, IntArray, LoggedDataset, PromptSet

# Of the noise that the library adds to some scores, at most 1e-12, to break ties at random.
_TIE = 1e-11
# Bounds within which its softmax takes probabilities.
_LOWEST = 1e-10


class ContextualBandits(Adapter):
    """An agent of contextualbandits: ``ContextualBandits(LinUCB(nchoices=A), prompts)``.

    Its pmf is ``(1 − ε) own(a | x, q) + ε / A``, where `own` is what the library does for features ``[x, q]``:

    - LinUCB, LogisticUCB, PartitionedUCB, BootstrappedUCB, SeparateClassifiers: the best-scored prompt; where the
      library breaks ties by noise (those that have seen nothing, of the first three), prompts that tie share.
    - EpsilonGreedy: the same, and with its own ``explore_prob`` any prompt.
    - SoftmaxExplorer: the softmax of its scores.
    - All others (LinTS, BootstrappedTS, AdaptiveGreedy, ...), and those above with a ``beta_prior``, under which an arm
      with few rounds is scored at random: the library does not tell. With ``draws=K``, `own` is the share of K choices
      that the agent makes for one context, and the adapter acts from exactly that; it costs a call a context.
      Agents that count rounds (ExploreFirst, AdaptiveGreedy) take the K choices for K rounds.

    The pmf is uniform until the agent has learned from something. Teach it through :meth:`learn` only: an agent that is
    trained behind its adapter needs a new one.

    Args:
        agent: with ``nchoices=A``; named choices stand for the prompts in their order.
        prompts: the catalogue.
        epsilon: ε.
        draws: K, where the library does not tell the pmf; 100 is usual.
        success: rewards above it count as 1, others as 0; None takes them as they are.

    Raises:
        ConfigError: not such an agent; or its pmf is not known and no `draws` are given.
        DimensionError: another number of choices than prompts.
        MissingDependencyError: contextualbandits is not installed.
    """

    _NOISY: ClassVar = ("LinUCB", "LogisticUCB", "PartitionedUCB")
    _OWN: ClassVar = (*_NOISY, "BootstrappedUCB", "SeparateClassifiers", "EpsilonGreedy", "SoftmaxExplorer")

    def __init__(
        self,
        agent: Any,
        prompts: PromptSet,
        *,
        epsilon: float = 0.05,
        draws: int | None = None,
        success: float | None = None,
    ) -> None:
        super().__init__(prompts)
        online = _online()
        check_kind(
            "agent", agent, online._BasePolicy, "pass an agent of contextualbandits.online, such as LinUCB(nchoices=A)"
        )
        check_arms(agent.nchoices, prompts, "contextualbandits")
        check_draws(draws)
        if success is not None:
            check_number("success", success)
        self.agent, self.epsilon, self.draws, self.success = agent, check_epsilon(epsilon), draws, success
        self._own = self._exact() if draws is None else None
        self._ties = type(agent).__name__ in self._NOISY or (agent.smoothing is not None and agent.noise_to_smooth)
        self._regresses = isinstance(agent, online.LinUCB)  # LinTS is one as well
        self._features: int | None = None
        self._rounds: Rounds | None = None
        self._look: Any = None

    def _exact(self) -> Callable[[FloatArray], FloatArray]:
        """Return what gives the agent's pmf where the library tells it."""
        agent, name = self.agent, type(self.agent).__name__
        if name not in self._OWN:
            raise ConfigError(
                f"agent: expected one whose pmf contextualbandits tells ({', '.join(self._OWN)}), got {name}; pass "
                "draws=100 to act from the shares of 100 choices a context"
            )
        priors = agent.beta_prior if isinstance(agent.beta_prior, list) else [agent.beta_prior]
        if any(count > 0 for _, count in priors) and not agent.force_unfit_predict:
            raise ConfigError(
                f"agent: expected a {name} that scores arms the same way each time, got one with a beta prior, which "
                "scores an arm with few rounds at random; make it with beta_prior=None, or pass draws=100"
            )
        return {"EpsilonGreedy": self._epsilon_greedy, "SoftmaxExplorer": self._softmax}.get(name, self._best)

    def probabilities(self, contexts: Contexts) -> FloatArray:
        """Return the pmf, (n, A).

        Raises:
            AgentError: the agent raised.
            DataError: it gave no scores of shape (n, A).
            DimensionError: contexts of another dimension than it learned from.
        """
        check_kind("contexts", contexts, Contexts, "of an observation take Contexts.of(observation)")
        x, n, n_prompts = features(contexts, self._features), len(contexts), self.n_prompts
        if not self.agent.is_fitted:
            return np.full((n, n_prompts), 1 / n_prompts)
        with foreign(f"contextualbandits' {type(self.agent).__name__} raised in {n} rounds"):
            own = self._drawn(x) if self._own is None else self._own(x)
        return (1 - self.epsilon) * check_probabilities(own, n, n_prompts) + self.epsilon / n_prompts

    def _looked_at(self) -> Any:
        """Return a copy to ask: asking the agent moves its random state and its schedules."""
        if self._look is None:
            self._look = deepcopy(self.agent)
            if type(self.agent).__name__ == "EpsilonGreedy":
                self._look.reset_epsilon(0.0)
        return self._look

    def _scores(self, x: FloatArray) -> FloatArray:
        scores = np.asarray(self._looked_at().decision_function(x), dtype=np.float64)
        if scores.shape != (len(x), self.n_prompts) or np.isnan(scores).any():
            raise DataError(
                f"agent: expected scores ({len(x)}, {self.n_prompts}) from decision_function, got {scores.shape} with "
                f"{int(np.isnan(scores).sum())} NaN; check its base algorithm"
            )
        return scores

    def _best(self, x: FloatArray) -> FloatArray:
        scores = self._scores(x)
        if not self._ties:
            return greedy(scores)
        best = scores >= scores.max(axis=1, keepdims=True) - _TIE
        return np.asarray(best / best.sum(axis=1, keepdims=True))

    def _epsilon_greedy(self, x: FloatArray) -> FloatArray:
        explore: float = self.agent.explore_prob
        return (1 - explore) * self._best(x) + explore / self.n_prompts

    def _softmax(self, x: FloatArray) -> FloatArray:
        # Of this class the decision function gives probabilities; the library draws from the softmax of their logits.
        chances = np.clip(self._scores(x), _LOWEST, 1 - _LOWEST)
        multiplier = self.agent.multiplier
        return softmax((1.0 if multiplier is None else multiplier) * np.log(chances / (1 - chances)))

    def _drawn(self, x: FloatArray) -> FloatArray:
        names = self.agent.choice_names

        def choose(rows: FloatArray) -> IntArray:
            chosen = np.asarray(deepcopy(self.agent).predict(rows))
            if names is None:
                return chosen.astype(np.int64)  # some of its classes choose in floats
            return np.argsort(names)[np.searchsorted(np.sort(names), chosen)]

        return drawn_pmf(choose, x, self.draws or 0, self.n_prompts)

    def learn(self, log: LoggedDataset) -> None:
        """Learn from rounds: by ``partial_fit`` where the agent has ``batch_train``, else by ``fit`` on all so far.

        An agent with schedules (a decaying ``explore_prob``, a growing ``multiplier``) counts each as a round played.

        Raises:
            AgentError: the agent raised.
            DataError: rewards other than 0 and 1, where the agent is not one that regresses.
            DimensionError: a log over another catalogue, or of other dimensions.
        """
        self._check_log(log)
        x, reward = features(log.contexts, self._features), self._reward(log)
        names = self.agent.choice_names
        rounds = Rounds(x, log.action if names is None else names[log.action], reward)
        with foreign(f"contextualbandits' {type(self.agent).__name__} raised as it learned from {len(log)} rounds"):
            if self._own != self._best:
                self.agent.predict(x)  # moves schedules and the random state as playing these rounds would have
            if self.agent.batch_train:
                self.agent.partial_fit(rounds.x, rounds.action, rounds.reward)
            else:
                self._rounds = rounds.after(self._rounds)
                self.agent.fit(self._rounds.x, self._rounds.action, self._rounds.reward)
        self._features, self._look = x.shape[1], None

    def _reward(self, log: LoggedDataset) -> FloatArray:
        if self.success is not None:
            return (log.reward > self.success).astype(np.float64)
        wrong = (log.reward != 0) & (log.reward != 1)
        if wrong.any() and not self._regresses:
            row = int(np.argmax(wrong))
            raise DataError(
                f"reward: expected 0 or 1, which is what {type(self.agent).__name__} of contextualbandits learns from, "
                f"got {log.reward[row]} in row {row}; pass success=t to count rewards above t as 1, or take LinUCB or "
                "LinTS, which regress"
            )
        return log.reward.astype(np.float64)

    def save(self, path: str | Path) -> Path:
        """Write the agent, and the rounds it must be fitted on again; a pickle, as the library has no other format."""
        settings = {
            "epsilon": self.epsilon, "draws": self.draws, "success": self.success, "features": self._features,
        }  # fmt: skip
        try:
            content = _pickled((self.agent, self._rounds))
        except Exception as error:
            raise StorageError(
                f"agent: cannot pickle it: {type(error).__name__}: {error}; make it without functions of your own"
            ) from error
        kind = type(self).__name__
        return write_agent(Stored(kind, "contextualbandits", content, self.prompts, settings), path)

    @classmethod
    def load(cls, path: str | Path, *, trusted: bool = False) -> ContextualBandits:
        """Read what :meth:`save` wrote.

        Args:
            path: the directory.
            trusted: you know who wrote it: reading a pickle can run any code.

        Raises:
            StorageError: not such a directory, damaged, or not `trusted`.
        """
        _online()
        stored, (agent, rounds) = read_pickled(path, cls.__name__, trusted=trusted)
        with reviving(path):
            settings = dict(stored.settings)
            seen = settings.pop("features")
            loaded = cls(agent, stored.prompts, **settings)
        loaded._features, loaded._rounds = seen, rounds
        return loaded


def _online() -> Any:
    try:
        from contextualbandits import online
    except ImportError as error:
        raise missing_dependency("contextualbandits", "contextualbandits", "ContextualBandits") from error
    return online


def _bound(function: Callable[..., Any], instance: object) -> types.MethodType:
    return types.MethodType(function, instance)


def _pickled(thing: object) -> bytes:
    file = io.BytesIO()
    pickler = pickle.Pickler(file, protocol=5)
    # The library binds functions to estimators under other names than their own, which pickle looks for in vain.
    pickler.dispatch_table = {
        **copyreg.dispatch_table,
        types.MethodType: lambda method: (_bound, (method.__func__, method.__self__)),
    }
    pickler.dump(thing)
    return file.getvalue()
