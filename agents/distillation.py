"""Two-step regression: a sentence-level reward model, distilled into a prompt-level one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from agents.kernels import generate
from agents.rewards import PromptRewardRegression, PromptRewards, SentenceRewardRegression, SentenceRewardSource
from agents.training import check_seeds, world_streams
from offprompts_env.config import check_integer
from offprompts_env.errors import ConfigError
from offprompts_env.sampling import check_catalogue
from offprompts_env.simulator import OutputModel
from offprompts_env.types import LoggedDataset, Outputs


@dataclass(frozen=True)
class TwoStepRegression:
    """A sentence-level model, distilled: ``min_θ Σ_i (r̂(x_i, q_i, s_i) − q̂_θ(x_i, q_i, a_i))²``.

    A :class:`agents.rewards.PromptRewardSource`: it is given as `rewards` to whatever takes one. The targets are
    predictions, without the noise of rewards. They are of the logged sentences, or, with generators, of `n_generated`
    fresh ones: logged contexts with replacement, uniform prompts, what the generator makes of them. Then prompts that
    were never logged are learned about as well.

    Attributes:
        sentences: the first step: a regression, or :class:`agents.FittedSentenceRewards`.
        prompts: the second step.
        generators: one a log, or one for all, as for the folds of one log; None distils logged sentences only.
        n_generated: fresh sentences a log.
    """

    sentences: SentenceRewardSource = field(default_factory=SentenceRewardRegression)
    prompts: PromptRewardRegression = field(default_factory=PromptRewardRegression)
    generators: tuple[OutputModel, ...] | None = None
    n_generated: int = 10_000

    def __post_init__(self) -> None:
        check_integer("n_generated", self.n_generated, 1)

    def fit_many(self, logs: Sequence[LoggedDataset], *, seeds: Sequence[int] | None = None) -> list[PromptRewards]:
        """Fit several logs, each step as one batched problem.

        Raises:
            ConfigError: not as many generators as logs.
            DataError: a log without outputs.
            DimensionError: a generator of other prompts than its log's.
        """
        chosen, generators = check_seeds(logs, seeds), self.generators
        if generators is not None:
            generators = generators * len(logs) if len(generators) == 1 else generators
            if len(generators) != len(logs):
                raise ConfigError(f"generators: expected {len(logs)}, one a log, got {len(generators)}")
            for generator, log in zip(generators, logs, strict=True):
                check_catalogue("generator", generator.prompts.fingerprint, log.prompts)
        models = self.sentences.fit_many(logs, seeds=chosen)
        if generators is not None:
            worlds = zip(logs, generators, chosen, strict=True)
            logs = [self._generated(log, generator, seed) for log, generator, seed in worlds]
        distilled = [
            replace(log, reward=model(log.contexts, Outputs(log.output)))
            for log, model in zip(logs, models, strict=True)
        ]
        return self.prompts.fit_many(distilled, seeds=chosen)

    def _generated(self, log: LoggedDataset, generator: OutputModel, seed: int) -> LoggedDataset:
        """Return rounds that were never played: their rewards are still to be predicted."""
        names = ("rounds", "actions", "outputs")
        rounds, actions_rng, outputs_rng = (world_streams([seed], "two-step regression", name)[0] for name in names)
        rows = rounds.integers(len(log), size=self.n_generated)
        actions = actions_rng.integers(log.n_prompts, size=self.n_generated)
        output = generate(generator, log.contexts, rows, actions, outputs_rng)
        unknown = np.full(self.n_generated, np.nan)
        return replace(log.take(rows), action=actions, output=output, propensity=unknown, sentence=None, oracle=None)
