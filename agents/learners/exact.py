"""Policy gradients whose expectation over prompts is exact: every prompt of a round is weighed, none is sampled.

    J(π) = mean_i Σ_a π(a | x_i, q_i) G(i, a)

    ExactDSO        G = min(K̄(s_i, a) / π₀(s_i | x_i, q_i), clip) r_i
    SentencePG      G = r̂(x_i, q_i, E[s | q_i, a])

Kernel weights are those of :mod:`agents.closed_form`: the generator's noise is integrated out too, and nothing is asked
of it while training. Where sentences are not Gaussian they are learned, see :class:`agents.SentenceRegression`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from agents.closed_form import kernel_weights
from agents.kernels import GaussianKernel
from agents.learners.base import Objective, OfflinePolicyGradient
from agents.learners.cloning import BehaviorCloning
from agents.learners.sentence import SentenceModels
from agents.pools import GainBatch, GainFeed, Gains, expected_gain_gradient
from agents.sentences import SentenceMeans, SentenceRegression, known_sentences
from agents.worlds import Worlds
from offprompts_env.config import check_number
from offprompts_env.simulator import GaussianOutputs
from offprompts_env.types import FloatArray, IntArray, Policy

# Numbers of an (n, A, d_o) block of means that are held at once: 64 MiB of float32.
_MEANS_AT_ONCE = 1 << 24


def sentence_means(worlds: Worlds, regression: SentenceRegression | None) -> list[SentenceMeans]:
    """Return what prompts would say in every world: known of a Gaussian generator, otherwise learned from the log."""
    worlds.stack.require_outputs("a method in the space of sentences")
    found: list[SentenceMeans] = []
    for world, log in enumerate(worlds.stack.logs):
        generator = None if worlds.generators is None else worlds.generators[world]
        if isinstance(generator, GaussianOutputs) and regression is None:
            found.append(known_sentences(generator, log.context.shape[1], log.query.shape[1]))
        else:
            fit = SentenceRegression() if regression is None else regression
            found.append(fit.fit(log.query, log.action, log.output, log.prompts.embeddings))
    return found


@dataclass(frozen=True)
class ExactPG(OfflinePolicyGradient):
    """What these learners share: a shorter schedule, since a step without sampling is worth several with it."""

    steps: int = 5_000
    batch_size: int = 64
    learning_rate: float = 1e-3

    def _exact(self, worlds: Worlds, gains: Gains, prior: Gains | None = None) -> Objective[GainBatch]:
        feed = GainFeed(worlds.stack, worlds.seeds, self.label, self.batch_size, gains, prior)
        return Objective(feed, expected_gain_gradient)


class KernelWeights:
    """Kernel weights of every prompt for rows of a world's log."""

    def __init__(
        self,
        worlds: Worlds,
        kernel: GaussianKernel,
        sentences: Sequence[SentenceMeans],
        policies: Sequence[Policy],
        clip: float,
    ) -> None:
        self._worlds, self._kernel, self._sentences, self._policies = worlds, kernel, sentences, policies
        self._clip = clip

    def __call__(self, world: int, rows: IntArray) -> FloatArray:
        """Return ``min(K̄(s_i, a) / π₀(s_i | x_i, q_i), clip)`` for `rows` (k,) of a world's log, (k, A)."""
        log, sentences = self._worlds.stack.logs[world], self._sentences[world]
        weights = np.empty((len(rows), log.n_prompts), dtype=np.float32)
        size = max(1, _MEANS_AT_ONCE // (log.n_prompts * sentences.output_dim))
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            own = rows[part]
            weights[part] = kernel_weights(
                self._kernel, log.output[own], log.contexts.take(own), sentences, self._policies[world]
            )
        return np.minimum(weights, np.float32(self._clip), out=weights)


@dataclass(frozen=True)
class ExactDSO(ExactPG):
    """DSO with exact expectations over prompts and over the generator's noise, density included.

    The exact density of a narrow kernel gives more variable weights than the published network, which smooths, so the
    default bandwidth is twice the published one. On ``paper_code`` (optimality, mean of worlds 0 to 2): 500 rounds .33
    at τ = 2 and .22 at τ = 1; 8,000 rounds .57 and .53; a tenth of the time of :class:`agents.DSO`.

    Attributes:
        tau: bandwidth of the Gaussian kernel.
        output_noise: noise added to both sentences, see :class:`agents.GaussianKernel`; integrated out, so that it only
            widens the kernel.
        clip: upper bound of the weight.
        sentences: how prompts' sentences are learned; None learns them only where the generator is not Gaussian.
        cloning: how a missing logging policy is estimated.
    """

    steps: int = 2_000
    tau: float = 2.0
    output_noise: float = 1.0
    clip: float = 200.0
    sentences: SentenceRegression | None = None
    cloning: BehaviorCloning = field(default_factory=BehaviorCloning)

    label: ClassVar[str] = "exact DSO"

    def __post_init__(self) -> None:
        super().__post_init__()
        GaussianKernel(self.tau, self.output_noise)
        check_number("clip", self.clip, 0, strict=True)

    def _objective(self, worlds: Worlds) -> Objective[GainBatch]:
        policies = worlds.logging_policies_or_clones("agents.ExactDSO", self.cloning)
        kernel, sentences = GaussianKernel(self.tau, self.output_noise), sentence_means(worlds, self.sentences)
        weights = KernelWeights(worlds, kernel, sentences, policies, self.clip)

        def gains(world: int, rows: IntArray) -> FloatArray:
            matrix = weights(world, rows)
            matrix *= worlds.stack.logs[world].reward[rows, None]
            return matrix

        return self._exact(worlds, gains)


@dataclass(frozen=True)
class SentencePG(ExactPG):
    """The sentence-level direct method distilled into a network, by policy gradient over all prompts.

    What :class:`agents.SentenceGreedy` chooses by enumeration the network chooses in one pass, and saves.

    Attributes:
        models: how r̂ and the prompts' sentences are made.
    """

    models: SentenceModels = field(default_factory=SentenceModels)

    label: ClassVar[str] = "sentence PG"

    def _objective(self, worlds: Worlds) -> Objective[GainBatch]:
        scores = self.models.fit_many(worlds)

        def gains(world: int, rows: IntArray) -> FloatArray:
            return scores[world](worlds.stack.logs[world].contexts.take(rows))

        return self._exact(worlds, gains)
