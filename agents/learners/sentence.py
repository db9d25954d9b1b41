"""The sentence-level direct method: model the reward of a sentence, and what every prompt would say; then choose.

    r̂(x, q, s) ≈ E[r | x, q, s]        π(x, q) = argmax_a r̂(x, q, E[s | q, a])

Every logged sentence teaches about all prompts that would say something like it, without importance weights: many
prompts cost nothing, since the prompt enters through its sentence alone. As good as r̂: :class:`agents.SentenceDR` is
for where it is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from agents.kernels import generate
from agents.learners.base import Callback, OfflineLearner
from agents.policies import EpsilonGreedyPolicy
from agents.sentence_rewards import EnsembleSource, SentenceRewardEnsemble, SentenceRewardSearch
from agents.sentences import SentenceMeans, SentenceRegression, SentenceScores, WithPrompts, known_sentences
from agents.worlds import Worlds
from offprompts_env.config import check_integer, check_number
from offprompts_env.errors import ConfigError
from offprompts_env.rng import stream
from offprompts_env.simulator import GaussianOutputs, OutputModel
from offprompts_env.types import IntArray, LoggedDataset


@dataclass(frozen=True)
class SentenceModels:
    """How the two models of the sentence-level direct method are made.

    What every prompt would say is known of a generator with Gaussian outputs; otherwise it is learned from the logged
    sentences, and from up to `budget` more that the generator is asked for. These are chosen where they matter: for a
    logged query, the prompt whose predicted reward is highest under one member of the reward model drawn at random
    (Thompson sampling), in `asks` turns, the models of sentences fitted anew after each.

    Attributes:
        rewards: fits r̂.
        sentences: fits ``E[s | q, a]`` where it is not known.
        prompt_embedding: whether r̂ also reads the embedding of the prompt, for encoders that lose part of a sentence.
            None tries both and keeps what predicts held-out rounds better, unless the generator is Gaussian: then the
            sentence is its embedding.
        pessimism: standard deviations of r̂ below its mean at which a prompt is scored.
        budget: sentences that the generator is asked for at most; 0 asks for none.
        asks: turns in which they are asked for.
    """

    rewards: EnsembleSource = field(default_factory=SentenceRewardSearch)
    sentences: SentenceRegression | None = None
    prompt_embedding: bool | None = None
    pessimism: float = 0.0
    budget: int = 0
    asks: int = 4

    def __post_init__(self) -> None:
        check_number("pessimism", self.pessimism)
        check_integer("budget", self.budget, 0)
        check_integer("asks", self.asks, 1)

    def fit_many(self, worlds: Worlds) -> list[SentenceScores]:
        """Return the scores of every world."""
        worlds.stack.require_outputs("a sentence-level method")
        if self.budget:
            worlds.require_generators("a budget of sentences")
        logs, seeds = worlds.stack.logs, worlds.seeds
        gaussian = worlds.generators is not None and all(isinstance(own, GaussianOutputs) for own in worlds.generators)
        fitted = []
        if self.prompt_embedding is not True:
            fitted.append([(model, False) for model in self.rewards.fit_many(logs, seeds=seeds)])
        if self.prompt_embedding or (self.prompt_embedding is None and not gaussian):
            joined = [_with_embedding(log) for log in logs]
            fitted.append([(model, True) for model in self.rewards.fit_many(joined, seeds=seeds)])
        scores = []
        for world, (log, *models) in enumerate(zip(logs, *fitted, strict=True)):
            generator = None if worlds.generators is None else worlds.generators[world]
            model, appended = min(models, key=lambda pair: pair[0].validation["error"])
            scores.append(self._scores(log, generator, model, appended, seeds[world]))
        return scores

    def _scores(
        self,
        log: LoggedDataset,
        generator: OutputModel | None,
        model: SentenceRewardEnsemble,
        appended: bool,
        seed: int,
    ) -> SentenceScores:
        def scores(sentences: SentenceMeans) -> SentenceScores:
            source = WithPrompts(sentences, log.prompts.embeddings) if appended else sentences
            return SentenceScores(model, source, self.pessimism)

        if isinstance(generator, GaussianOutputs) and self.sentences is None:
            return scores(known_sentences(generator, log.context.shape[1], log.query.shape[1]))
        fit = SentenceRegression() if self.sentences is None else self.sentences
        embeddings = log.prompts.embeddings
        query, action, sentence = log.query, log.action, log.output
        learned = scores(fit.fit(query, action, sentence, embeddings))
        if generator is None or self.budget == 0:
            return learned
        rows_rng, member_rng, outputs_rng = (
            stream(seed, "sentence direct method", name) for name in ("rounds", "members", "outputs")
        )
        for share in np.diff(np.linspace(0, self.budget, min(self.asks, self.budget) + 1).astype(int)):
            rows = rows_rng.integers(len(log), size=share)
            wanted = _thompson(learned, log, rows, member_rng)
            answers = generate(generator, log.contexts, rows, wanted, outputs_rng)
            query = np.concatenate([query, log.query[rows]])
            action, sentence = np.concatenate([action, wanted]), np.concatenate([sentence, answers])
            learned = scores(fit.fit(query, action, sentence, embeddings))
        return learned


def _with_embedding(log: LoggedDataset) -> LoggedDataset:
    return replace(log, output=np.concatenate([log.output, log.prompts.embeddings[log.action]], axis=1))


def _thompson(scores: SentenceScores, log: LoggedDataset, rows: IntArray, rng: np.random.Generator) -> IntArray:
    """Return the best prompt of each of `rows` under a member drawn at random, (m,)."""
    members = rng.integers(scores.rewards.members, size=len(rows))
    wanted = np.empty(len(rows), dtype=np.int64)
    for member in np.unique(members):
        own = np.flatnonzero(members == member)
        wanted[own] = scores.of_member(int(member), log.contexts.take(rows[own])).argmax(axis=1)
    return wanted


@dataclass(frozen=True)
class SentenceGreedy(OfflineLearner[EpsilonGreedyPolicy]):
    """Sentence-level direct method by enumeration: the prompt whose mean sentence has the best predicted reward.

    Needs sentences in the log; no propensities, no logging policy, and a generator only if it is Gaussian or a budget
    of sentences is to be spent. Has no steps, so that a callback is never called. To serve it as a network distil it
    with :class:`agents.SentencePG`.

    Attributes:
        models: how r̂ and the prompts' sentences are made.
        epsilon: share of uniform prompts, for a policy that goes on to record logs with support.
    """

    models: SentenceModels = field(default_factory=SentenceModels)
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        check_number("epsilon", self.epsilon, 0)
        if self.epsilon > 1:
            raise ConfigError(f"epsilon: expected a probability, got {self.epsilon}")

    def _learn(self, worlds: Worlds, callbacks: Sequence[Callback]) -> list[EpsilonGreedyPolicy]:
        return [
            EpsilonGreedyPolicy(scores, scores.n_prompts, self.epsilon, log.prompts.fingerprint)
            for scores, log in zip(self.models.fit_many(worlds), worlds.stack.logs, strict=True)
        ]
