"""The true values of policies, the best single prompt and the oracle, in one set of rounds.

Where the simulator is exact this is a table of expected rewards. Where sentences are drawn, users are crossed with
movies: one sentence of a (movie, prompt) serves every user, so that a table of many users costs no more sentences than
one. Prompts are chosen on one half of the sentences and everything is scored on the other half (cross-fitting), so the
oracle and the best single prompt are not flattered by their own luck.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from safetensors.numpy import load_file, save_file

from offprompts_env.errors import ConfigError
from offprompts_env.rng import stream
from offprompts_env.simulator import Simulator
from offprompts_env.types import Contexts, Estimate, FloatArray, IntArray, Outputs, Policy


@dataclass(frozen=True, eq=False)
class Truth:
    """Expected rewards of all prompts in a set of rounds.

    Attributes:
        contexts: n rounds.
        choose: expected rewards to choose prompts with, (n, A).
        score: expected rewards to score prompts with, independent of `choose` where sentences are drawn, (n, A).
        cluster: rounds that share sentences, (n,); standard errors are over clusters.
    """

    contexts: Contexts
    choose: FloatArray
    score: FloatArray
    cluster: IntArray

    def save(self, path: Path) -> None:
        """Write it as float32, with what policies read of the rounds."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tables = {"choose": self.choose.astype(np.float32), "score": self.score.astype(np.float32)}
        rounds = {"context": self.contexts.context, "query": self.contexts.query, "cluster": self.cluster}
        unfinished = path.with_suffix(".unfinished")
        save_file({name: np.ascontiguousarray(table) for name, table in (tables | rounds).items()}, unfinished)
        unfinished.replace(path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Inverse of :meth:`save`."""
        held = load_file(path)
        return cls(Contexts(held["context"], held["query"]), held["choose"], held["score"], held["cluster"])

    def _estimate(self, terms: FloatArray) -> Estimate:
        sums = np.bincount(self.cluster, weights=terms)
        return Estimate.of_mean(sums / np.bincount(self.cluster))

    def value(self, policy: Policy) -> Estimate:
        """Return ``E[Σ_a π(a | x, q) E[r | x, q, a]]`` with a standard error over clusters."""
        return self._estimate(np.einsum("na,na->n", policy.probabilities(self.contexts), self.score))

    def best_single(self) -> tuple[int, Estimate]:
        """Return the prompt that is best on average, chosen on one half and scored on the other."""
        best = int(self.choose.mean(axis=0).argmax())
        return best, self._estimate(self.score[:, best])

    def oracle(self) -> Estimate:
        """Return the value of the best prompt in each round, chosen on one half and scored on the other."""
        rows = np.arange(len(self.contexts))
        return self._estimate(self.score[rows, self.choose.argmax(axis=1)])


def exact_truth(simulator: Simulator, n: int = 10_000, seed: int = 0) -> Truth:
    """Return the expected rewards of `n` evaluation rounds of an exact simulator."""
    contexts = simulator.evaluation_contexts(n, seed)
    rewards = simulator.expected_rewards(contexts)
    return Truth(contexts, rewards, rewards, np.arange(n))


def drawn_truth(simulator: Simulator, *, users: int = 100, movies: int = 60, samples: int = 2, seed: int = 0) -> Truth:
    """Return the mean rewards of `users` × `movies` rounds over `samples` sentences of each (movie, prompt) a half.

    Needs ``2 · movies · A · samples`` sentences. Users and movies must have ids and be drawn independently.
    """
    pool = simulator.evaluation_contexts(20 * (users + movies), seed)
    if pool.user_id is None or pool.item_id is None:
        raise ConfigError("drawn_truth: expected contexts with user and item ids; use exact_truth for vectors")
    user_rows = np.sort(np.unique(pool.user_id, return_index=True)[1])[:users]
    movie_rows = np.sort(np.unique(pool.item_id, return_index=True)[1])[:movies]
    shown = pool.take(movie_rows)
    halves = []
    for half in ("choose", "score"):
        total = np.zeros((len(user_rows), len(movie_rows), simulator.n_prompts))
        for sample in range(samples):
            outputs = _sentences(simulator, shown, stream(seed, "truth", half, sample))
            everything = shown.repeat(simulator.n_prompts)
            for index, user in enumerate(user_rows):
                asked_by = np.full(len(everything), user)
                crossed = _cross(pool.take(asked_by), everything)
                total[index] += simulator.rewards.mean(crossed, outputs).reshape(total.shape[1:])
        halves.append((total / samples).reshape(-1, simulator.n_prompts))
    rows_of_users = pool.take(np.repeat(user_rows, len(movie_rows)))
    rows_of_movies = shown.take(np.tile(np.arange(len(movie_rows)), len(user_rows)))
    cluster = np.tile(np.arange(len(movie_rows)), len(user_rows))
    return Truth(_cross(rows_of_users, rows_of_movies), halves[0], halves[1], cluster)


def _sentences(simulator: Simulator, shown: Contexts, rng: np.random.Generator) -> Outputs:
    actions = np.tile(np.arange(simulator.n_prompts), len(shown))
    return simulator.outputs.sample(shown.repeat(simulator.n_prompts), actions, rng)


def _cross(users: Contexts, movies: Contexts) -> Contexts:
    """Return rounds with the users of one set and the movies of the other, row by row."""
    return Contexts(users.context, movies.query, users.user_id, movies.item_id, movies.query_text)
