"""The true values of policies beside those that the environment owns, in one set of rounds.

Where the simulator is exact this is a table of expected rewards. Where sentences are drawn, users are crossed with
movies: one sentence of a (movie, prompt) serves every user, so that a table of many users costs no more sentences than
one. Prompts are chosen on one half of the sentences and everything is scored on the other half (cross-fitting), so the
oracle and the best single prompt are not flattered by their own luck.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from offprompts_env.config import check_integer, check_kind
from offprompts_env.errors import ConfigError, DataError, DimensionError, StorageError
from offprompts_env.rng import stream
from offprompts_env.sampling import pmf_by_parts
from offprompts_env.simulator import EnumerableOutputs, Simulator
from offprompts_env.types import Contexts, Estimate, FloatArray, IntArray, Outputs, Policy


@dataclass(frozen=True, eq=False)
class Truth:
    """Expected rewards of all prompts in a set of rounds.

    Attributes:
        contexts: n rounds.
        choose: expected rewards to choose prompts with, (n, A).
        score: expected rewards to score prompts with, independent of `choose` where sentences are drawn, (n, A).
        cluster: rounds that share sentences, (n,); standard errors are over clusters.
        no_prompt: what sentences without a prompt are worth; None where there is no such thing. A reward on text is
            measured against them, so there it is 0 by definition.
    """

    contexts: Contexts
    choose: FloatArray
    score: FloatArray
    cluster: IntArray
    no_prompt: float | None = None

    def __post_init__(self) -> None:
        n = len(self.contexts)
        if self.choose.shape != self.score.shape or self.score.shape[:1] != (n,) or self.cluster.shape != (n,):
            raise DataError(
                f"truth: expected choose and score of one shape ({n}, A) and cluster ({n},), got "
                f"{self.choose.shape}, {self.score.shape} and {self.cluster.shape}"
            )

    @classmethod
    def exact(cls, simulator: Simulator, n: int = 10_000, seed: int = 0) -> Self:
        """Return the expected rewards of `n` evaluation rounds of an exact simulator.

        Raises:
            ConfigError: the simulator draws sentences, or `n` is not positive.
        """
        check_kind("simulator", simulator, Simulator, "of an environment pass env.unwrapped.simulator")
        check_integer("n", n, 1)
        if not simulator.exact:
            raise ConfigError(
                "truth: expected a simulator with closed forms; use Truth.drawn where sentences are drawn"
            )
        contexts = simulator.evaluation_contexts(n, seed)
        rewards = simulator.expected_rewards(contexts)
        return cls(contexts, rewards, rewards, np.arange(n))

    @classmethod
    def drawn(
        cls, simulator: Simulator, *, users: int = 100, movies: int = 60, samples: int = 2, seed: int = 0
    ) -> Self:
        """Return mean rewards of `users` × `movies` rounds over `samples` sentences of each (movie, prompt) a half.

        Needs ``2 · movies · A · samples`` sentences. Users and movies are drawn independently; rounds are ordered by
        user, then by movie.

        Raises:
            ConfigError: users or movies have no ids, or a number is not positive.
        """
        check_kind("simulator", simulator, Simulator, "of an environment pass env.unwrapped.simulator")
        for name, value in (("users", users), ("movies", movies), ("samples", samples)):
            check_integer(name, value, 1)
        asking, shown = _people_and_queries(simulator, users, movies, seed)
        everything, actions = shown.repeat(simulator.n_prompts), _every_prompt(simulator, shown)
        halves = []
        for half in ("choose", "score"):
            drawn = (
                simulator.outputs.sample(everything, actions, stream(seed, "truth", half, sample))
                for sample in range(samples)
            )
            halves.append(_crossed_means(simulator, asking, everything, drawn))
        return cls._crossed(simulator, asking, shown, halves[0], halves[1])

    @classmethod
    def enumerated(cls, simulator: Simulator, *, users: int = 100, movies: int = 60, seed: int = 0) -> Self:
        """Return exact mean rewards of `users` × `movies` rounds where outputs can be enumerated.

        ``E[r | x, q, a] = 1/K Σ_k r(x, q, s_k)`` over the K sentences of a frozen table: nothing is drawn but who the
        users and which the movies are, so `choose` and `score` are one table, and the oracle is the table's own. With
        as many users and movies as there are, values have no error at all: then read the standard errors as those of
        a larger population of movies.

        Raises:
            ConfigError: outputs cannot be enumerated, users or movies have no ids, or a number is not positive.
        """
        check_kind("simulator", simulator, Simulator, "of an environment pass env.unwrapped.simulator")
        for name, value in (("users", users), ("movies", movies)):
            check_integer(name, value, 1)
        outputs = simulator.outputs
        if not isinstance(outputs, EnumerableOutputs):
            raise ConfigError(
                "truth: expected outputs that can be enumerated, such as frozen sentences; use Truth.drawn"
            )
        asking, shown = _people_and_queries(simulator, users, movies, seed)
        everything, actions = shown.repeat(simulator.n_prompts), _every_prompt(simulator, shown)
        every = (outputs.outcome(everything, actions, k) for k in range(outputs.outcomes))
        means = _crossed_means(simulator, asking, everything, every)
        return cls._crossed(simulator, asking, shown, means, means)

    @classmethod
    def _crossed(
        cls, simulator: Simulator, asking: Contexts, shown: Contexts, choose: FloatArray, score: FloatArray
    ) -> Self:
        """Return the truth of all rounds of the users in `asking` with the queries in `shown`, user by user."""
        queries = np.tile(np.arange(len(shown)), len(asking))
        rounds = _cross(asking.take(np.repeat(np.arange(len(asking)), len(shown))), shown.take(queries))
        # A continuous reward with a reference is the change against sentences without a prompt.
        relative = simulator.rewards.kind == "continuous" and hasattr(simulator.rewards, "reference")
        return cls(rounds, choose, score, queries, 0.0 if relative else None)

    def save(self, path: str | Path) -> None:
        """Write it as one file of float32, with what policies read of the rounds."""
        from safetensors.numpy import save_file

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        held = {
            "choose": self.choose.astype(np.float32),
            "score": self.score.astype(np.float32),
            "context": self.contexts.context,
            "query": self.contexts.query,
            "cluster": self.cluster,
        }
        if self.no_prompt is not None:
            held["no_prompt"] = np.array([self.no_prompt])
        unfinished = path.with_suffix(".unfinished")
        save_file({name: np.ascontiguousarray(column) for name, column in held.items()}, unfinished)
        unfinished.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Inverse of :meth:`save`.

        Raises:
            StorageError: there is no such file, or it cannot be read.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            held = load_file(path)
        except (OSError, SafetensorError) as error:
            raise StorageError(f"{path}: expected a file that Truth.save wrote, but {error}") from error
        no_prompt = float(held["no_prompt"][0]) if "no_prompt" in held else None
        contexts = Contexts(held["context"], held["query"])
        return cls(contexts, held["choose"], held["score"], held["cluster"], no_prompt)

    def take(self, rows: IntArray) -> Truth:
        """Return the truth in some of the rounds, for a look that must be cheap."""
        tables = (self.choose[rows], self.score[rows], self.cluster[rows])
        return Truth(self.contexts.take(rows), *tables, self.no_prompt)

    def value(self, policy: Policy) -> Estimate:
        """Return ``E[Σ_a π(a | x, q) E[r | x, q, a]]`` with a standard error over clusters.

        Raises:
            ConfigError: not a policy.
            DimensionError: the policy is over another number of prompts.
        """
        check_kind("policy", policy, Policy, "it needs n_prompts and probabilities(contexts)")
        if policy.n_prompts != self.score.shape[1]:
            raise DimensionError(f"policy: expected {self.score.shape[1]} prompts as here, got {policy.n_prompts}")
        terms = np.empty(len(self.contexts))
        for rows, _, pmf in pmf_by_parts(policy, self.contexts):
            terms[rows] = np.einsum("na,na->n", pmf, self.score[rows])
        return self.of_terms(terms)

    def of_actions(self, actions: IntArray) -> Estimate:
        """Return the value of one prompt a round, `actions` (n,)."""
        return self.of_terms(self.score[np.arange(len(self.contexts)), actions])

    def of_terms(self, terms: FloatArray) -> Estimate:
        """Return the mean over clusters of the means of one number a round (n,), with its standard error.

        With clusters of one size, as :meth:`exact` and :meth:`drawn` give them, it is the mean over rounds.
        """
        _, cluster = np.unique(self.cluster, return_inverse=True)
        return Estimate.of_mean(np.bincount(cluster, weights=terms) / np.bincount(cluster))

    def uniform(self) -> Estimate:
        """Return the value of uniform prompts."""
        return self.of_terms(self.score.mean(axis=1, dtype=np.float64))

    def best_single(self) -> tuple[int, Estimate]:
        """Return the prompt that is best on average, chosen on one half and scored on the other."""
        best = int(self.choose.mean(axis=0, dtype=np.float64).argmax())
        return best, self.of_terms(self.score[:, best])

    def oracle(self) -> Estimate:
        """Return the value of the best prompt in each round, chosen on one half and scored on the other."""
        return self.of_actions(self.choose.argmax(axis=1))

    def references(self) -> dict[str, Estimate]:
        """Return what the environment owns: "no prompt" where it is defined, "uniform", "best single", "oracle"."""
        owned = {"uniform": self.uniform(), "best single": self.best_single()[1], "oracle": self.oracle()}
        if self.no_prompt is None:
            return owned
        return {"no prompt": self.of_terms(np.full(len(self.contexts), self.no_prompt)), **owned}

    def optimality(self, policy: Policy) -> float:
        """Return ``(V(π) − V(uniform)) / (V(oracle) − V(uniform))``: 0 is uniform, 1 the oracle."""
        low, high = self.uniform().value, self.oracle().value
        return (self.value(policy).value - low) / (high - low)


def _people_and_queries(simulator: Simulator, users: int, movies: int, seed: int) -> tuple[Contexts, Contexts]:
    """Return rounds of different users, and rounds of different movies."""
    pool = simulator.evaluation_contexts(20 * (users + movies), seed)
    if pool.user_id is None or pool.item_id is None:
        raise ConfigError("truth: expected contexts with user and item ids; use Truth.exact for vectors")
    user_rows = np.sort(np.unique(pool.user_id, return_index=True)[1])[:users]
    movie_rows = np.sort(np.unique(pool.item_id, return_index=True)[1])[:movies]
    return pool.take(user_rows), pool.take(movie_rows)


def _every_prompt(simulator: Simulator, shown: Contexts) -> IntArray:
    return np.tile(np.arange(simulator.n_prompts), len(shown))


def _crossed_means(
    simulator: Simulator, asking: Contexts, everything: Contexts, outputs: Iterable[Outputs]
) -> FloatArray:
    """Return rewards of every user in `asking` with `everything`, averaged over `outputs`: (users · queries, A)."""
    total, samples = np.zeros((len(asking), len(everything))), 0
    for drawn in outputs:
        samples += 1
        for user in range(len(asking)):
            crossed = _cross(asking.take(np.full(len(everything), user)), everything)
            total[user] += simulator.rewards.mean(crossed, drawn)
    # The precision of its file, so that a truth that was read is the truth that was made.
    return (total / samples).reshape(-1, simulator.n_prompts).astype(np.float32)


def _cross(users: Contexts, movies: Contexts) -> Contexts:
    """Return rounds with the users of one set and the movies of the other, row by row."""
    return Contexts(users.context, movies.query, users.user_id, movies.item_id, movies.query_text)
