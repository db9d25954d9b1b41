"""Value estimates from a reward model of sentences alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from agents.estimators.base import constant_rewards, noted, one_world, support
from agents.estimators.look import check_predictions, draw_prompts, fit_rewards
from agents.kernels import generate
from agents.rewards import SentenceRewardRegression, SentenceRewardSource
from offprompts_env.config import check_integer
from offprompts_env.rng import stream
from offprompts_env.sampling import check_policy
from offprompts_env.simulator import OutputModel
from offprompts_env.types import Estimate, LoggedDataset, Outputs, Policy


@dataclass(frozen=True)
class SentenceDM:
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

    def __post_init__(self) -> None:
        check_integer("n_samples", self.n_samples, 1)
        if self.folds is not None:
            check_integer("folds", self.folds, 2)

    def estimate(
        self,
        policy: Policy,
        log: LoggedDataset,
        *,
        generator: OutputModel | None = None,
        logging_policy: Policy | None = None,
        seed: int = 0,
    ) -> Estimate:
        """Estimate ``V(policy)``.

        Args:
            policy: over the log's prompts.
            log: logged rounds.
            generator: the frozen generator.
            logging_policy: not used.
            seed: of the regression and of the simulated sentences.

        Raises:
            ConfigError: no generator.
            DataError: the policy does not give distributions, or the log is too small to fit a model on.
            DimensionError: policy, generator and log do not fit.
            NumericalError: the policy, the generator or the model gives NaN.
        """
        check_policy(policy, log.prompts, "the log")
        notes = ["the standard error leaves out the error of the reward model"]
        (model_of,) = one_world(log, generator, None, seed).require_generators("agents.SentenceDM")
        with noted(notes):
            models = fit_rewards(self.rewards, log, self.folds, seed)
        drawn, average = draw_prompts(policy, log, self.n_samples, seed)
        rng, terms, everything = stream(seed, "sentence DM", "outputs"), np.empty(len(log)), np.arange(len(log))
        for where, model in models:
            rows = everything[where]
            asked = np.repeat(rows, self.n_samples)
            sentences = Outputs(generate(model_of, log.contexts, asked, drawn[rows].ravel(), rng))
            predicted = model(log.contexts.take(asked), sentences).reshape(len(rows), -1)
            terms[rows] = predicted.mean(axis=1, dtype=np.float64)
        check_predictions(terms)
        diagnostics, _ = support(average, log)
        messages = (*notes, *constant_rewards(log.reward))
        return Estimate.of_mean(terms, diagnostics=diagnostics, warnings=messages)
