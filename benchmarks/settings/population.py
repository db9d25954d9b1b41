"""A population whose true values are known: a finite set of rounds of a synthetic world, which logs draw from.

Logs draw rounds with replacement. So the true value of a policy is a sum over all rounds and prompts without sampling
error, its digits those of single precision, and policies are tables. The target policies are

    π = (1 − a) π₀ + a softmax(β E[r | x, q, ·])

with π₀ what recorded the logs: a = 0 is on policy, a = 1 as far as it gets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from agents.policies import softmax
from offprompts_env.errors import DataError
from offprompts_env.sampling import pmf_by_parts, row_parts
from offprompts_env.simulator import Simulator
from offprompts_env.truth import Truth
from offprompts_env.types import Contexts, FloatArray, Policy, PromptSet


class Table:
    """A policy over the rounds of a population, which its contexts name by their ``user_id``.

    Args:
        pmf: ``π(a | x, q)`` in every round of the population, (N, A).
        prompts: what it chooses among.
    """

    def __init__(self, pmf: FloatArray, prompts: PromptSet) -> None:
        self.pmf = np.asarray(pmf, dtype=np.float32)
        self.catalogue = prompts.fingerprint

    @property
    def n_prompts(self) -> int:
        """``A``."""
        return int(self.pmf.shape[1])

    def probabilities(self, contexts: Contexts) -> FloatArray:
        """Return the rows of the table, (n, A).

        Raises:
            DataError: the contexts are not those of a population.
        """
        if contexts.user_id is None:
            raise DataError("contexts: expected rounds of a population, with user_id their number, got none")
        return self.pmf[contexts.user_id]


class Pool:
    """Contexts drawn with replacement from a finite set.

    Args:
        contexts: the set, (N,).
    """

    def __init__(self, contexts: Contexts) -> None:
        self.contexts = replace(contexts, user_id=np.arange(len(contexts)))
        self.context_dim, self.query_dim = contexts.context.shape[1], contexts.query.shape[1]

    def sample(self, n: int, rng: np.random.Generator) -> Contexts:
        """Draw n rounds."""
        return self.contexts.take(rng.integers(len(self.contexts), size=n))


@dataclass(frozen=True, eq=False)
class Population:
    """A finite set of rounds with a logging and a target policy.

    Attributes:
        simulator: draws rounds of the set.
        logging: π₀.
        target: π.
        references: true values of "uniform", "best single", "oracle", "logging" and "target".
        distance: how far π is from π₀: "chi_square" ``E[w²] − 1``, "effective_share" ``1 / E[w²]`` and "max_ratio"
            ``max w`` with ``w = π / π₀`` and expectations over π₀, and "kl", ``KL(π‖π₀)``.
    """

    simulator: Simulator
    logging: Table
    target: Table
    references: Mapping[str, float]
    distance: Mapping[str, float]

    @classmethod
    def of(cls, simulator: Simulator, logging: Policy, *, n: int, distance: float, beta: float) -> Population:
        """Make the evaluation rounds of `simulator` a population.

        Args:
            simulator: an exact one.
            logging: π₀.
            n: rounds.
            distance: a in [0, 1].
            beta: inverse temperature β of the policy that the target is mixed with.
        """
        truth = Truth.exact(simulator, n)
        recorded, wanted = np.empty((2, n, simulator.n_prompts), dtype=np.float32)
        for rows, _, pmf in pmf_by_parts(logging, truth.contexts):
            recorded[rows] = pmf / pmf.sum(axis=1, keepdims=True)
            wanted[rows] = (1 - distance) * recorded[rows] + distance * softmax(beta * truth.score[rows])
        pool = Pool(truth.contexts)
        tables = {"logging": Table(recorded, simulator.prompts), "target": Table(wanted, simulator.prompts)}
        known = replace(truth, contexts=pool.contexts)
        references = known.references() | {name: known.value(table) for name, table in tables.items()}
        return cls(
            Simulator(pool, simulator.outputs, simulator.rewards, reward_std=simulator.noise.std),
            **tables,
            references={name: estimate.value for name, estimate in references.items()},
            distance=_distance(recorded, wanted),
        )


def _distance(logging: FloatArray, target: FloatArray) -> dict[str, float]:
    second, divergence, largest = 0.0, 0.0, 0.0
    for rows in row_parts(*logging.shape):
        ratio = target[rows].astype(np.float64) / logging[rows]
        second += float((target[rows] * ratio).sum())
        divergence += float((target[rows] * np.log(np.maximum(ratio, np.finfo(np.float64).tiny))).sum())
        largest = max(largest, float(ratio.max()))
    mean = second / len(logging)
    return {
        "chi_square": mean - 1,
        "effective_share": 1 / mean,
        "kl": divergence / len(logging),
        "max_ratio": largest,
    }
