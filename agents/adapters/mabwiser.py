"""Agents of the library mabwiser: LinUCB, LinTS, UCB1, neighbourhood policies and others."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from agents.adapters.base import Adapter, check_arms, check_epsilon, features, smoothed
from agents.adapters.draws import check_draws, drawn_pmf
from agents.adapters.skops_files import skops_bytes, skops_object
from agents.adapters.storage import Stored, read_agent, reviving, write_agent
from offprompts_env.config import check_kind
from offprompts_env.errors import ActionError, ConfigError, DataError, foreign, missing_dependency
from offprompts_env.types import Contexts, FloatArray, IntArray, LoggedDataset, PromptSet

# What its agents are made of, as far as skops does not know it: plain classes without code that reading would run.
_KNOWN = (
    "mabwiser.clusters._Clusters",
    "mabwiser.greedy._EpsilonGreedy",
    "mabwiser.linear._LinTS",
    "mabwiser.linear._LinUCB",
    "mabwiser.linear._Linear",
    "mabwiser.linear._RidgeRegression",
    "mabwiser.mab.MAB",
    "mabwiser.neighbors._KNearest",
    "mabwiser.neighbors._Radius",
    "mabwiser.popularity._Popularity",
    "mabwiser.rand._Random",
    "mabwiser.softmax._Softmax",
    "mabwiser.thompson._ThompsonSampling",
    "mabwiser.ucb._UCB1",
    "mabwiser.utils._NumpyRNG",
)


class MABWiser(Adapter):
    """An agent of mabwiser: ``MABWiser(MAB(list(range(A)), LearningPolicy.LinUCB(alpha=1.0)), prompts)``.

    Its pmf is ``(1 − ε) own(a | x, q) + ε / A``, where `own` is what the library does for features ``[x, q]``, or
    without features where its policy is context-free:

    - LinUCB, UCB1: the best prompt, the first of those that tie.
    - LinGreedy, EpsilonGreedy: the same, and with its own ``epsilon`` any prompt.
    - Random: uniform.
    - All of them also with the neighbourhood policies KNearest and Clusters.
    - All others (LinTS, ThompsonSampling, Softmax, Popularity; Radius, LSHNearest, TreeBandit): the library does not
      tell. With ``draws=K``, `own` is the share of K choices that the agent makes for one context, and the adapter acts
      from exactly that; it costs a call a context, or one call where the agent is context-free. (Softmax and Popularity
      choose the largest of a Dirichlet sample, which is not what their expectations say.)

    The pmf is uniform until the agent has learned from something. Teach it through :meth:`learn` only: an agent that is
    trained behind its adapter needs a new one.

    Args:
        agent: a ``MAB`` with A arms, which stand for the prompts in their order.
        prompts: the catalogue.
        epsilon: ε.
        draws: K, where the library does not tell the pmf; 100 is usual.

    Raises:
        ConfigError: not a ``MAB``; or its pmf is not known and no `draws` are given.
        DimensionError: another number of arms than prompts.
        MissingDependencyError: mabwiser is not installed.
    """

    _OWN: ClassVar = ("LinUCB", "UCB1", "LinGreedy", "EpsilonGreedy", "Random")
    _NEIGHBOURHOODS: ClassVar = ("NoneType", "KNearest", "Clusters")

    def __init__(self, agent: Any, prompts: PromptSet, *, epsilon: float = 0.05, draws: int | None = None) -> None:
        super().__init__(prompts)
        try:
            from mabwiser.mab import MAB
        except ImportError as error:
            raise missing_dependency("mabwiser", "mabwiser", "MABWiser") from error
        check_kind("agent", agent, MAB, "pass a MAB of mabwiser.mab")
        check_arms(len(agent.arms), prompts, "mabwiser")
        check_draws(draws)
        self.agent, self.epsilon, self.draws = agent, check_epsilon(epsilon), draws
        self._policy = type(agent.learning_policy).__name__
        around = type(agent.neighborhood_policy).__name__
        if draws is None and (self._policy not in self._OWN or around not in self._NEIGHBOURHOODS):
            raise ConfigError(
                f"agent: expected one whose pmf mabwiser tells ({', '.join(self._OWN)}, alone or with KNearest or "
                f"Clusters), got {self._policy}{'' if around == 'NoneType' else f' with {around}'}; pass draws=100 to "
                "act from the shares of 100 choices a context"
            )
        self._features: int | None = None
        self._look: Any = None

    def probabilities(self, contexts: Contexts) -> FloatArray:
        """Return the pmf, (n, A).

        Raises:
            ActionError: the agent chose what is no arm of it.
            AgentError: it raised.
            DimensionError: contexts of another dimension than it learned from.
        """
        check_kind("contexts", contexts, Contexts, "of an observation take Contexts.of(observation)")
        x, n, n_prompts = features(contexts, self._features), len(contexts), self.n_prompts
        if n == 0:
            return np.empty((0, n_prompts))
        if not self.agent._is_initial_fit or (self._policy == "Random" and self.draws is None):
            return np.full((n, n_prompts), 1 / n_prompts)
        if not self.agent.is_contextual:
            x = np.zeros((n, 1))  # all rows are the same to it
        with foreign(f"mabwiser's {self._policy} raised in {n} rounds"):
            own = self._greedy(x) if self.draws is None else drawn_pmf(self._fresh, x, self.draws, n_prompts)
        return (1 - self.epsilon) * own + self.epsilon / n_prompts

    def _greedy(self, x: FloatArray) -> FloatArray:
        if self._look is None:
            self._look = _without_exploration(self.agent)
        explore = float(getattr(self.agent.learning_policy, "epsilon", 0.0))
        return smoothed(self._chosen(self._look, x), self.n_prompts, explore, len(x))

    def _fresh(self, x: FloatArray) -> IntArray:
        # A copy: asking the agent moves its random state.
        return self._chosen(deepcopy(self.agent), x)

    def _chosen(self, agent: Any, x: FloatArray) -> IntArray:
        """Return the prompts that `agent` chooses, (n,)."""
        chosen = agent.predict(x)
        place = {arm: index for index, arm in enumerate(self.agent.arms)}
        try:
            # For one row the library gives a bare arm.
            return np.asarray([place[arm] for arm in (chosen if isinstance(chosen, list) else [chosen])])
        except KeyError as error:
            raise ActionError(
                f"agent: expected one of its {len(place)} arms, got {error}; leave its arms alone"
            ) from None

    def learn(self, log: LoggedDataset) -> None:
        """Learn from rounds with one ``partial_fit``; a call costs milliseconds an arm, so let batches be large.

        Raises:
            AgentError: the agent raised.
            DataError: rewards that its learning policy cannot take.
            DimensionError: a log over another catalogue, or of other dimensions.
        """
        self._check_log(log)
        x = features(log.contexts, self._features)
        self._check_rewards(log)
        arms = np.asarray(self.agent.arms)
        with foreign(f"mabwiser's {self._policy} raised as it learned from {len(log)} rounds"):
            shown = x if self.agent.is_contextual else None
            self.agent.partial_fit(arms[log.action], log.reward.astype(np.float64), shown)
            if self.draws is not None:
                self.agent.predict(x[:1])  # else the same random numbers would be drawn all the time
        self._features, self._look = x.shape[1], None

    def _check_rewards(self, log: LoggedDataset) -> None:
        reward = log.reward
        if self._policy == "ThompsonSampling" and self.agent.learning_policy.binarizer is None:
            wrong, what = (reward != 0) & (reward != 1), "0 or 1"
            remedy = "give the policy a binarizer: LearningPolicy.ThompsonSampling(f) with f(arm, reward) -> 0 or 1"
        elif self._policy == "Popularity":
            wrong, what, remedy = reward < 0, "no negative number", "shift rewards, or take another policy"
        else:
            return
        if wrong.any():
            row = int(np.argmax(wrong))
            raise DataError(
                f"reward: expected {what}, which is what {self._policy} of mabwiser learns from, got "
                f"{reward[row]} in row {row}; {remedy}"
            )

    def save(self, path: str | Path) -> Path:
        """Write the agent; in the format of skops, which runs no code when it is read.

        Raises:
            MissingDependencyError: skops is not installed.
            StorageError: skops cannot write it (LSHNearest and TreeBandit), or the directory cannot be written.
        """
        settings = {"epsilon": self.epsilon, "draws": self.draws, "features": self._features}
        content = skops_bytes(self.agent, f"mabwiser's {self._policy}", "mabwiser")
        return write_agent(Stored(type(self).__name__, "mabwiser", content, self.prompts, settings), path)

    @classmethod
    def load(cls, path: str | Path, *, trusted: bool = False) -> MABWiser:
        """Read what :meth:`save` wrote.

        Args:
            path: the directory.
            trusted: you know who wrote it; needed only for an agent with parts that are not of mabwiser, such as a
                binarizer of your own.

        Raises:
            MissingDependencyError: skops is not installed.
            StorageError: not such a directory, damaged, or with unknown parts and not `trusted`.
        """
        stored = read_agent(path, cls.__name__)
        with reviving(path):
            agent = skops_object(stored.content, _KNOWN, f"the agent in {path}", "mabwiser", trusted=trusted)
            loaded = cls(agent, stored.prompts, epsilon=stored.settings["epsilon"], draws=stored.settings["draws"])
            loaded._features = stored.settings["features"]
        return loaded


def _without_exploration(agent: Any) -> Any:
    """Return a copy of a ``MAB`` that always plays what it takes for best: the library has no other way to ask."""
    copy = deepcopy(agent)
    inner = copy._imp
    for policy in (inner, getattr(inner, "lp", None), *getattr(inner, "lp_list", ())):
        if hasattr(policy, "epsilon"):
            policy.epsilon = 0.0
    return copy
