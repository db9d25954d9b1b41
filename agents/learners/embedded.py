"""Any learner on learned embeddings of the sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from agents.embeddings import EmbeddedOutputs, LearnedEmbedding, RewardEmbedding
from agents.learners.base import Callback, Learner, OfflineLearner
from agents.learners.dso import DSO
from agents.worlds import Worlds
from offprompts_env.config import check_kind
from offprompts_env.types import Policy


@dataclass(frozen=True)
class Embedded(OfflineLearner[Policy]):
    """Replaces the embeddings of sentences, logged and generated, by learned ones, and lets `learner` learn from these.

    The policy that is learned reads contexts only, so it is used like any other.

    Attributes:
        learner: what learns; it asks for what it asks for otherwise.
        embedding: how distances are learned from each log, or one that is learned already.
    """

    learner: Learner = field(default_factory=DSO)
    embedding: RewardEmbedding | LearnedEmbedding = field(default_factory=RewardEmbedding)

    def __post_init__(self) -> None:
        check_kind("learner", self.learner, Learner, "such as agents.DSO()")

    def _learn(self, worlds: Worlds, callbacks: Sequence[Callback]) -> Sequence[Policy]:
        worlds.stack.require_outputs("agents.Embedded")
        logs, given = worlds.stack.logs, self.embedding
        found = [
            given if isinstance(given, LearnedEmbedding) else given.fit(log, seed=seed)
            for log, seed in zip(logs, worlds.seeds, strict=True)
        ]
        generators = None
        if worlds.generators is not None:
            pairs = zip(worlds.generators, found, strict=True)
            generators = [EmbeddedOutputs(generator, embedding) for generator, embedding in pairs]
        return self.learner.fit_many(
            [embedding.log(log) for embedding, log in zip(found, logs, strict=True)],
            generators=generators,
            logging_policies=worlds.logging_policies,
            seeds=worlds.seeds,
            callback=callbacks[0] if callbacks else None,
        )
