"""The reward parts of the MovieLens benchmark: how a user's probability of liking becomes a reward.

    continuous    r = scale · (P(like | x, q, s) − mean_k P(like | x, q, s0_k))
    binary        r = P(like | x, q, s)

``s0_1 … s0_K`` are sentences about the same movie without a prompt, frozen per movie. So a continuous reward says what
the prompt added, and movies that everybody likes do not drown it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, get_args, runtime_checkable

import numpy as np

from offprompts_env.config import check_integer, check_number
from offprompts_env.errors import DataError, unknown_name
from offprompts_env.movielens.collaborative import CollaborativeModel
from offprompts_env.movielens.simulator import LikeSimulator
from offprompts_env.rng import stream
from offprompts_env.simulator import RewardKind
from offprompts_env.text.encoder import Encoder
from offprompts_env.text.language_model import LanguageModel
from offprompts_env.text.prompted import PromptFormatter, query_texts
from offprompts_env.text.store import NO_PROMPT_SERIES, SentenceStore
from offprompts_env.types import Contexts, FloatArray, Outputs

# Queries of known references that are encoded together.
_BLOCK = 16


@runtime_checkable
class LikeModel(Protocol):
    """How probably a user likes a movie described by a sentence, in two steps: one encoding serves many users."""

    @property
    def context_dim(self) -> int:
        """``d_x`` of the users it knows how to read."""
        ...

    def states(self, sentences: Sequence[str]) -> FloatArray:
        """Return what is read off each sentence, (n, h)."""
        ...

    def probability(self, contexts: Contexts, states: FloatArray) -> FloatArray:
        """Return ``P(like | x, q, s)``, (n,)."""
        ...


class SimulatedLikes:
    """The DistilBERT simulator as a like model; it reads the user vector and the sentence.

    Args:
        simulator: user and sentence → P(like).
        encoder: gives the sentence states, as ``simulator.encode``; an encoder that is shared with the output model
            saves encoding each sentence twice.
    """

    def __init__(self, simulator: LikeSimulator, encoder: Encoder) -> None:
        self.simulator, self.encoder = simulator, encoder

    @property
    def context_dim(self) -> int:
        """``d_x``."""
        return self.simulator.config.d_x

    def states(self, sentences: Sequence[str]) -> FloatArray:
        """Return pooled encoder states, (n, d_b)."""
        return self.encoder.encode(sentences)

    def probability(self, contexts: Contexts, states: FloatArray) -> FloatArray:
        """Return ``P(like | x, s)``, (n,)."""
        return self.simulator.probability(contexts.context, states)


class CollaborativeLikes:
    """Collaborative filtering as a like model; it reads the user vector, the movie's id and the sentence.

    Args:
        model: user, movie and sentence state → P(like).
        encoder: gives the sentence states that `model` was fitted on.
    """

    def __init__(self, model: CollaborativeModel, encoder: Encoder) -> None:
        self.model, self.encoder = model, encoder

    @property
    def context_dim(self) -> int:
        """``d_x``."""
        return self.model.d_x

    def states(self, sentences: Sequence[str]) -> FloatArray:
        """Return pooled encoder states, (n, d_b)."""
        return self.encoder.encode(sentences)

    def probability(self, contexts: Contexts, states: FloatArray) -> FloatArray:
        """Return ``P(like | x, q, s)``, (n,); a movie without an id counts as unknown."""
        items = np.full(len(contexts), -1) if contexts.item_id is None else contexts.item_id
        return self.model.probability(contexts.context, items, states)


class UnpromptedSentences:
    """K sentences about each query without a prompt, frozen.

    Those that are not known are written when first needed, with the stream ``("no_prompt", query, k)``: what they say
    does not depend on when that is.

    Args:
        known: query text to at least K sentences.
        language_model: writes the others.
        formatter: makes its requests.
        n_samples: K.
        store: sentences on disk. Processes that share it share the reference too, also where the model is not
            reproducible.
    """

    def __init__(
        self,
        known: Mapping[str, Sequence[str]],
        language_model: LanguageModel,
        formatter: PromptFormatter,
        n_samples: int = 4,
        store: SentenceStore | None = None,
    ) -> None:
        check_integer("baseline_samples", n_samples, 1)
        self.language_model, self.n_samples = language_model, n_samples
        self.formatter = formatter.guarded(language_model)
        self.store = store
        self._sentences = {
            query: tuple(sentences[:n_samples]) for query, sentences in known.items() if len(sentences) >= n_samples
        }
        listed = list(self._sentences)
        blocks = [tuple(listed[start : start + _BLOCK]) for start in range(0, len(listed), _BLOCK)]
        self._block_of = {query: block for block in blocks for query in block}

    def block(self, query: str) -> tuple[str, ...]:
        """Return the queries, `query` among them, whose sentences are encoded together, always the same ones.

        Rounding depends on the batch, and a reward must not depend on who came before.
        """
        return self._block_of.get(query, (query,))

    def missing(self, queries: Sequence[str]) -> list[tuple[str, int]]:
        """Return what :meth:`about` would ask the model for: (query, k)."""
        named = self._unknown(queries)
        if self.store is None or not named:
            return named
        requests, samples = [self.formatter.ask(query) for query, _ in named], [k for _, k in named]
        left = self.store.missing(self.language_model.fingerprint, NO_PROMPT_SERIES, requests, samples)
        return [named[position] for position in left]

    def about(self, queries: Sequence[str]) -> list[tuple[str, ...]]:
        """Return the K sentences about each query."""
        named = self._unknown(queries)
        if named:
            written = self._written(named)
            for start in range(0, len(named), self.n_samples):
                self._sentences[named[start][0]] = tuple(written[start : start + self.n_samples])
        return [self._sentences[query] for query in queries]

    def _unknown(self, queries: Sequence[str]) -> list[tuple[str, int]]:
        """Return (query, k) for each of the K sentences of those `queries` that are not in memory."""
        unknown = [query for query in dict.fromkeys(queries) if query not in self._sentences]
        return [(query, k) for query in unknown for k in range(self.n_samples)]

    def _written(self, named: list[tuple[str, int]]) -> list[str]:
        """Return sentence k about each query: that of the store, else one that the model writes now."""

        def write(rows: Sequence[int]) -> list[str]:
            rngs = [stream(0, "no_prompt", *named[row]) for row in rows]
            return self.language_model.generate([requests[row] for row in rows], rngs)

        requests = [self.formatter.ask(query) for query, _ in named]
        if self.store is None:
            return write(range(len(named)))
        return self.store.complete(
            self.language_model.fingerprint, NO_PROMPT_SERIES, requests, [k for _, k in named], write
        )


class LikeReward:
    """Reward from a like model; see the module for the equations.

    Args:
        model: user, movie and sentence → P(like).
        unprompted: the reference of a continuous reward.
        kind: "continuous" or "binary".
        scale: factor of a continuous reward; the published one is 10.

    Raises:
        ConfigError: unknown kind, or a scale that is not positive.
    """

    def __init__(
        self,
        model: LikeModel,
        unprompted: UnpromptedSentences,
        *,
        kind: RewardKind = "continuous",
        scale: float = 10.0,
    ) -> None:
        if kind not in get_args(RewardKind):
            raise unknown_name("reward_type", kind, get_args(RewardKind))
        check_number("reward_scale", scale, 0, strict=True)
        self.model, self.unprompted, self.scale = model, unprompted, scale
        self.kind: RewardKind = kind
        self._reference_states: dict[str, FloatArray] = {}

    @property
    def context_dim(self) -> int:
        """``d_x`` of the users it reads."""
        return self.model.context_dim

    def mean(self, contexts: Contexts, outputs: Outputs) -> FloatArray:
        """Return the noiseless reward, (n,).

        Raises:
            DataError: outputs without text, or contexts without query text under a continuous reward.
            DimensionError: users of another dimension than the model's.
        """
        if outputs.text is None:
            raise DataError("rewards: this reward reads sentences, but the outputs have no text; use a text model")
        liked = self.model.probability(contexts, self.model.states(outputs.text.tolist()))
        if self.kind == "binary":
            return liked
        return np.asarray(self.scale * (liked - self.reference(contexts)), dtype=np.float32)

    def reference(self, contexts: Contexts) -> FloatArray:
        """Return ``mean_k P(like | x, q, s0_k)``, (n,)."""
        queries = query_texts(contexts)
        distinct = {query: row for row, query in enumerate(dict.fromkeys(queries))}
        asked = np.array([distinct[query] for query in queries], dtype=np.int64)
        # A user who is shown many prompts for one query has one reference.
        columns = np.column_stack([contexts.context, contexts.query, asked.astype(np.float64)])
        pairs = columns.view(f"V{columns.strides[0]}")[:, 0].tolist()
        first = {pair: row for row, pair in reversed(list(enumerate(pairs)))}
        rows = np.fromiter(first.values(), dtype=np.int64, count=len(first))
        place = dict(zip(first, range(len(first)), strict=True))
        pair_of = [place[pair] for pair in pairs]
        states = np.stack(self._states_about(list(distinct)))[asked[rows]]
        samples = self.unprompted.n_samples
        liked = self.model.probability(contexts.take(rows).repeat(samples), states.reshape(-1, states.shape[-1]))
        return np.asarray(liked.reshape(-1, samples).mean(axis=1)[pair_of])

    def _states_about(self, queries: list[str]) -> list[FloatArray]:
        missing = [query for query in queries if query not in self._reference_states]
        # Asked for together, as a language model may have to write some of them.
        self.unprompted.about(missing)
        for block in dict.fromkeys(self.unprompted.block(query) for query in missing):
            sentences = self.unprompted.about(block)
            states = self.model.states([text for texts in sentences for text in texts])
            for query, part in zip(block, np.split(states, len(block)), strict=True):
                self._reference_states[query] = part
        return [self._reference_states[query] for query in queries]
