"""Value estimates from a reward model of sentences alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from agents.estimators.base import MODEL_ERROR, OfflineEstimator, support
from agents.estimators.look import check_predictions, draw_prompts, fit_rewards
from agents.kernels import generate
from agents.rewards import SentenceModel, SentenceRewardRegression, SentenceRewardSource
from agents.worlds import Worlds
from offprompts_env.config import check_integer
from offprompts_env.rng import stream
from offprompts_env.simulator import OutputModel
from offprompts_env.types import Contexts, Estimate, FloatArray, IntArray, LoggedDataset, Outputs, Policy


@dataclass(frozen=True)
class SentenceDM(OfflineEstimator):
    """Direct method on sentences: ``V̂ = mean_i E[r̂(x_i, q_i, s')]``, s' of prompts of π and the generator.

    As good as r̂: the standard error leaves out r̂'s own error. Unlike weights it has something to say of prompts that
    were never logged, if their sentences are like logged ones.

    Attributes:
        rewards: the regression behind r̂, or :class:`agents.FittedSentenceRewards`.
        n_samples: simulated sentences a round; different policies get the same uniforms.
        folds: K of the cross-fitting; None fits one model on the whole log.
    """

    rewards: SentenceRewardSource = field(default_factory=SentenceRewardRegression)
    n_samples: int = 4
    folds: int | None = None

    asks_generator: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_integer("n_samples", self.n_samples, 1)
        if self.folds is not None:
            check_integer("folds", self.folds, 2)

    def _estimate(self, policy: Policy, log: LoggedDataset, given: Worlds, seed: int) -> Estimate:
        (generator,) = given.require_generators(self._label)
        models = fit_rewards(self.rewards, log, self.folds, seed)
        drawn, average = draw_prompts(policy, log, self.n_samples, seed)
        rng, terms, everything = stream(seed, "sentence DM", "outputs"), np.empty(len(log)), np.arange(len(log))
        for where, model in models:
            rows = everything[where]
            terms[rows] = expected_reward(model, log.contexts.take(rows), simulate(generator, log, rows, drawn, rng))
        check_predictions(terms)
        diagnostics, _ = support(average, log)
        return Estimate.of_mean(terms, diagnostics=diagnostics, warnings=(MODEL_ERROR,))


def simulate(
    generator: OutputModel, log: LoggedDataset, rows: IntArray, drawn: IntArray, rng: np.random.Generator
) -> FloatArray:
    """Return embeddings of what `generator` answers in `rows` (k,) of `log` to the prompts `drawn` (n, m), (k, m, d_o).

    Raises:
        NumericalError: an embedding is NaN or infinite.
    """
    asked = np.repeat(rows, drawn.shape[1])
    return generate(generator, log.contexts, asked, drawn[rows].ravel(), rng).reshape(len(rows), drawn.shape[1], -1)


def expected_reward(model: SentenceModel, contexts: Contexts, sentences: FloatArray) -> FloatArray:
    """Return the mean prediction over the `sentences` (n, m, d_o) of every round, (n,)."""
    n, m, dim = sentences.shape
    predicted = model(contexts.repeat(m), Outputs(sentences.reshape(n * m, dim)))
    return np.asarray(predicted.reshape(n, m).mean(axis=1, dtype=np.float64))
