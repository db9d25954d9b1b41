"""What every prompt would say to a query, as far as a log and a generator tell: means and spread of sentences.

    KnownSentences      of a generator with Gaussian outputs, exact
    LearnedSentences    a regression of the sentence on (q, a), from logged and generated sentences

A frozen generator never sees the user, so sentences of other users teach what a prompt would say to this one; and a
policy that is built on such means asks no language model when it acts.

Symbols: ``n`` rounds, ``A`` prompts, ``d_e`` prompt and ``d_o`` output dimension, ``d_c = d_x + d_q``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from agents.records import Record, recorded, revive
from agents.ridge import fit_ridge, interactions
from agents.sentence_rewards import SentenceRewardEnsemble, predict, side_by_side
from offprompts_env.config import check_integer, check_number
from offprompts_env.errors import ConfigError, DataError, DimensionError, NumericalError
from offprompts_env.simulator import GaussianOutputs
from offprompts_env.types import Contexts, FloatArray, IntArray, LoggedDataset

# Numbers of an (n, A, d) block that are held at once: 8 MiB of float32.
_BLOCK = 1 << 21


@runtime_checkable
class SentenceMeans(Protocol):
    """The mean sentence of every prompt, around which sentences scatter like ``Normal(0, diag(noise_std²))``."""

    @property
    def n_prompts(self) -> int:
        """``A``."""
        ...

    @property
    def output_dim(self) -> int:
        """``d_o``."""
        ...

    @property
    def noise_std(self) -> FloatArray:
        """Standard deviation of each output dimension around the mean, (d_o,)."""
        ...

    def means(self, contexts: Contexts) -> FloatArray:
        """Return ``E[s | q, a]`` of every prompt, (n, A, d_o) float32."""
        ...

    def to_record(self) -> Record:
        """Return what it is made of."""
        ...


class KnownSentences:
    """``E[s | q, a] = base(q) + effects[a]`` of a Gaussian generator.

    Args:
        generator: the generator.
    """

    def __init__(self, generator: GaussianOutputs) -> None:
        self._generator = generator
        self._effects = np.asarray(generator.effects, dtype=np.float32)
        self.n_prompts, self.output_dim = self._effects.shape
        self.noise_std: FloatArray = np.asarray(generator.noise_std, dtype=np.float32)

    def means(self, contexts: Contexts) -> FloatArray:
        """Return ``E[s | q, a]``, (n, A, d_o)."""
        base = np.asarray(self._generator.base(contexts), dtype=np.float32)
        return base[:, None] + self._effects

    def to_record(self) -> Record:
        """Raise :class:`ConfigError`: a generator's own base cannot be written."""
        raise ConfigError(
            "save: expected a generator whose base(q) is affine, which a file can hold; distil the policy with "
            "agents.SentencePG, whose network saves, or pass sentences=agents.SentenceRegression()"
        )


@recorded("sentence means")
@dataclass(frozen=True, eq=False)
class AffineSentences:
    """``E[s | q, a] = [x, q, 1] M + effects[a]``: known sentences that can be written.

    Attributes:
        matrix: M, (d_c + 1, d_o).
        effects: (A, d_o).
        noise_std: (d_o,).
    """

    matrix: FloatArray
    effects: FloatArray
    noise_std: FloatArray

    @property
    def n_prompts(self) -> int:
        """``A``."""
        return len(self.effects)

    @property
    def output_dim(self) -> int:
        """``d_o``."""
        return int(self.effects.shape[1])

    def means(self, contexts: Contexts) -> FloatArray:
        """Return ``E[s | q, a]``, (n, A, d_o); raises :class:`DimensionError` for contexts of other dimensions."""
        inputs = side_by_side(contexts)
        if inputs.shape[1] != len(self.matrix) - 1:
            raise DimensionError(
                f"sentences: expected context and query of {len(self.matrix) - 1} dimensions together, got "
                f"{inputs.shape[1]}"
            )
        base = inputs @ self.matrix[:-1] + self.matrix[-1]
        return np.asarray(base[:, None] + self.effects)

    def to_record(self) -> Record:
        """Return what it is made of."""
        tensors = {"matrix": self.matrix, "effects": self.effects, "noise_std": self.noise_std}
        return Record("AffineSentences", {}, tensors)

    @classmethod
    def from_record(cls, record: Record) -> AffineSentences:
        """Inverse of :meth:`to_record`."""
        return cls(**record.tensors)


def known_sentences(generator: GaussianOutputs, d_x: int, d_q: int) -> SentenceMeans:
    """Return the means of a Gaussian `generator`: in a form that can be written, if its base is affine.

    Raises:
        NumericalError: the generator's base, effects or noise are not finite.
    """
    # Near and far from the origin, since what is affine near it may bend.
    probe = np.random.default_rng(0).standard_normal((8 * (d_x + d_q + 1), d_x + d_q)).astype(np.float32)
    probe[::2] *= 10
    base = np.asarray(generator.base(Contexts(probe[:, :d_x], probe[:, d_x:])), dtype=np.float64)
    effects, noise = (np.ascontiguousarray(part, dtype=np.float32) for part in (generator.effects, generator.noise_std))
    for part in (base, effects, noise):
        if not np.isfinite(part).all():
            raise NumericalError(
                f"generator: expected finite base, effects and noise, got {part[~np.isfinite(part)][0]}; check the "
                "generator"
            )
    design = np.column_stack([probe, np.ones(len(probe))]).astype(np.float64)
    matrix = np.linalg.lstsq(design, base, rcond=None)[0]
    if not np.allclose(design @ matrix, base, atol=1e-5 * (1 + np.abs(base).max())):
        return KnownSentences(generator)
    return AffineSentences(np.ascontiguousarray(matrix, dtype=np.float32), effects, noise)


@recorded("sentence means")
@dataclass(frozen=True, eq=False)
class LearnedSentences:
    """``E[s | q, a] = φ(q, e_a) W + b + u_a + v_q``: a polynomial, an offset a prompt, an offset a known query.

    Attributes:
        embeddings: of the prompts, (A, d_e).
        weights: W, of :func:`agents.ridge.interactions` of query and prompt, (p, d_o).
        offsets: ``b + u_a``, (A, d_o).
        queries: rows of the queries that have an offset, sorted as :func:`numpy.unique` does, (k, d_q).
        query_offsets: v_q of these, (k, d_o); other queries have none.
        noise_std: of sentences around the means, (d_o,).
        explained: share of the variance of the sentences that the means explain, leave-one-out, before offsets.
    """

    embeddings: FloatArray
    weights: FloatArray
    offsets: FloatArray
    queries: FloatArray
    query_offsets: FloatArray
    noise_std: FloatArray
    explained: float = float("nan")
    _place: dict[bytes, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_place", {key: index for index, key in enumerate(_keys(self.queries))})

    @property
    def n_prompts(self) -> int:
        """``A``."""
        return len(self.embeddings)

    @property
    def output_dim(self) -> int:
        """``d_o``."""
        return int(self.weights.shape[1])

    def means(self, contexts: Contexts) -> FloatArray:
        """Return ``E[s | q, a]``, (n, A, d_o); rounds with the same query share the work.

        Raises:
            DimensionError: queries of another dimension than it was fitted to.
        """
        queries, inverse = np.unique(contexts.query, axis=0, return_inverse=True)
        d_q, d_e, d_o = self.queries.shape[1], self.embeddings.shape[1], self.output_dim
        if queries.shape[1] != d_q:
            raise DimensionError(f"sentences: expected queries of dimension {d_q}, got {queries.shape[1]}")
        # φ holds q, e, q ⊗ e and e ⊗ e: the terms of e alone are the same for all queries.
        cross = self.weights[d_q + d_e : d_q + d_e + d_q * d_e].reshape(d_q, d_e * d_o)
        alone = np.concatenate([self.weights[d_q : d_q + d_e], self.weights[d_q + d_e + d_q * d_e :]])
        first, second = np.triu_indices(d_e)
        own = np.concatenate([self.embeddings, self.embeddings[:, first] * self.embeddings[:, second]], axis=1)
        fixed = own @ alone + self.offsets
        slopes = (queries @ cross).reshape(len(queries), d_e, d_o)
        level = queries @ self.weights[:d_q] + self._query_offset(queries)
        means = np.matmul(self.embeddings, slopes) + fixed + level[:, None]
        return np.asarray(means[inverse.ravel()], dtype=np.float32)

    def _query_offset(self, queries: FloatArray) -> FloatArray:
        offsets = np.zeros((len(queries), self.output_dim), dtype=np.float32)
        for row, key in enumerate(_keys(queries)):
            index = self._place.get(key)
            if index is not None:
                offsets[row] = self.query_offsets[index]
        return offsets

    def to_record(self) -> Record:
        """Return what it is made of."""
        names = ("embeddings", "weights", "offsets", "queries", "query_offsets", "noise_std")
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in names}
        return Record("LearnedSentences", {"explained": self.explained}, tensors)

    @classmethod
    def from_record(cls, record: Record) -> LearnedSentences:
        """Inverse of :meth:`to_record`."""
        return cls(**dict(record.tensors), explained=record.settings["explained"])


@dataclass(frozen=True)
class SentenceRegression:
    """Fit :class:`LearnedSentences` to pairs of (query, prompt) and sentence, such as a log has them.

    A ridge regression with its penalty by leave-one-out, then offsets of prompts and queries by backfitting, shrunk as
    random effects: with k sentences an offset is ``k / (k + shrinkage)`` of their mean residual.

    Attributes:
        prompt_shrinkage: of offsets of prompts.
        query_shrinkage: of offsets of queries.
        sweeps: of backfitting.
    """

    prompt_shrinkage: float = 3.0
    query_shrinkage: float = 1.0
    sweeps: int = 5

    def __post_init__(self) -> None:
        check_number("prompt_shrinkage", self.prompt_shrinkage, 0, strict=True)
        check_number("query_shrinkage", self.query_shrinkage, 0, strict=True)
        check_integer("sweeps", self.sweeps, 1)

    def fit(
        self, query: FloatArray, action: IntArray, sentence: FloatArray, embeddings: FloatArray
    ) -> LearnedSentences:
        """Fit sentences.

        Args:
            query: (n, d_q).
            action: prompts, (n,).
            sentence: (n, d_o).
            embeddings: of all prompts, (A, d_e).

        Raises:
            DataError: fewer than three sentences, or sentences without dimensions.
        """
        if len(sentence) < 3 or sentence.shape[1] == 0:
            raise DataError(
                f"sentences: expected at least 3 with embeddings, got shape {sentence.shape}; record a log with outputs"
            )
        raw = sentence.astype(np.float64)
        features = interactions(query.astype(np.float64), embeddings[action].astype(np.float64), 2)
        fit = fit_ridge(features, raw)
        queries, place = np.unique(query, axis=0, return_inverse=True)
        place = place.ravel()
        left = raw - features @ fit.weights - fit.intercept
        prompt: FloatArray = np.zeros((len(embeddings), raw.shape[1]))
        own: FloatArray = np.zeros((len(queries), raw.shape[1]))
        # Queries that never repeat have no offset to learn: their one residual is mostly noise.
        repeated = len(queries) < len(query) / 2
        for _ in range(self.sweeps):
            prompt = _shrunk_means(left - own[place], action, len(embeddings), self.prompt_shrinkage)
            if repeated:
                own = _shrunk_means(left - prompt[action], place, len(queries), self.query_shrinkage)
        rest = left - prompt[action] - own[place]
        variance = float(np.sum(raw.var(axis=0)))
        return LearnedSentences(
            embeddings=embeddings,
            weights=fit.weights.astype(np.float32),
            offsets=(fit.intercept + prompt).astype(np.float32),
            queries=queries[: len(queries) if repeated else 0],
            query_offsets=own[: len(queries) if repeated else 0].astype(np.float32),
            noise_std=rest.std(axis=0).astype(np.float32),
            explained=1 - float(np.sum(fit.noise)) / variance if variance else float("nan"),
        )


def _keys(queries: FloatArray) -> list[bytes]:
    """Return the bytes of every row, which are the same for equal rows."""
    # Adding zero makes -0.0 a 0.0.
    return [row.tobytes() for row in np.ascontiguousarray(queries) + np.float32(0)]


def _shrunk_means(values: FloatArray, group: IntArray, groups: int, shrinkage: float) -> FloatArray:
    """Return ``Σ values / (count + shrinkage)`` of every group, (groups, d)."""
    sums = np.stack([np.bincount(group, column, minlength=groups) for column in values.T], axis=1)
    return np.asarray(sums / (np.bincount(group, minlength=groups)[:, None] + shrinkage))


@recorded("sentence means")
@dataclass(frozen=True, eq=False)
class WithPrompts:
    """Sentences with the prompt's embedding appended: for encoders that lose what the prompt still tells.

    Attributes:
        sentences: the means.
        embeddings: of the prompts, (A, d_e).
    """

    sentences: SentenceMeans
    embeddings: FloatArray

    @property
    def n_prompts(self) -> int:
        """``A``."""
        return self.sentences.n_prompts

    @property
    def output_dim(self) -> int:
        """``d_o + d_e``."""
        return self.sentences.output_dim + int(self.embeddings.shape[1])

    @property
    def noise_std(self) -> FloatArray:
        """Noise of the sentences; none of the embeddings."""
        return np.concatenate([self.sentences.noise_std, np.zeros(self.embeddings.shape[1], dtype=np.float32)])

    def means(self, contexts: Contexts) -> FloatArray:
        """Return means and embeddings side by side, (n, A, d_o + d_e)."""
        means = self.sentences.means(contexts)
        both = np.broadcast_to(self.embeddings, (len(means), *self.embeddings.shape))
        return np.concatenate([means, both], axis=2, dtype=np.float32)

    def to_record(self) -> Record:
        """Return what it is made of."""
        own = Record.of_parts("WithPrompts", {}, {"sentences": self.sentences.to_record()})
        return Record(own.kind, own.settings, {**own.tensors, "embeddings": self.embeddings})

    @classmethod
    def from_record(cls, record: Record) -> WithPrompts:
        """Inverse of :meth:`to_record`."""
        return cls(revive(record.part("sentences"), "sentence means"), record.tensors["embeddings"])


@recorded("reward model")
@dataclass(frozen=True, eq=False)
class SentenceScores:
    """Predicted rewards of the mean sentence of every prompt: the scores of a policy.

    ``score(x, q, a) = mean − pessimism · standard deviation`` of the reward model's members at ``E[s | q, a]``.

    Attributes:
        rewards: r̂ and its members.
        sentences: what every prompt would say.
        pessimism: standard deviations below the mean.
    """

    rewards: SentenceRewardEnsemble
    sentences: SentenceMeans
    pessimism: float = 0.0

    @property
    def n_prompts(self) -> int:
        """``A``."""
        return self.sentences.n_prompts

    def __call__(self, contexts: Contexts) -> FloatArray:
        """Return scores of all prompts, (n, A)."""
        return self._by_parts(contexts, lambda inputs, means: predict(self.rewards, inputs, means, self.pessimism))

    def logged(self, log: LoggedDataset) -> FloatArray:
        """Return predicted rewards of the logged sentences themselves, (n,)."""
        sentence = log.output
        if isinstance(self.sentences, WithPrompts):
            sentence = np.concatenate([sentence, self.sentences.embeddings[log.action]], axis=1)
        return predict(self.rewards, side_by_side(log.contexts), sentence[:, None])[:, 0]

    def of_member(self, index: int, contexts: Contexts) -> FloatArray:
        """Return what one member of the reward model predicts, (n, A)."""
        return self._by_parts(contexts, lambda inputs, means: self.rewards.member(index, inputs, means))

    def _by_parts(self, contexts: Contexts, score: Callable[[FloatArray, FloatArray], FloatArray]) -> FloatArray:
        scores = np.empty((len(contexts), self.n_prompts), dtype=np.float32)
        size = max(1, _BLOCK // (self.n_prompts * 128))
        inputs = side_by_side(contexts)
        for start in range(0, len(contexts), size):
            rows = slice(start, start + size)
            means = self.sentences.means(contexts.take(rows))
            scores[rows] = score(inputs[rows], means)
        wrong = ~np.isfinite(scores).all(axis=1)
        if wrong.any():
            raise NumericalError(
                f"sentences: expected finite predicted rewards of all prompts, got NaN or infinity in row "
                f"{int(np.argmax(wrong))}; check the contexts and the generator"
            )
        return scores

    def to_record(self) -> Record:
        """Return what it is made of."""
        parts = {"rewards": self.rewards.to_record(), "sentences": self.sentences.to_record()}
        return Record.of_parts("SentenceScores", {"pessimism": self.pessimism}, parts)

    @classmethod
    def from_record(cls, record: Record) -> SentenceScores:
        """Inverse of :meth:`to_record`."""
        rewards, sentences = (
            revive(record.part("rewards"), "reward model"),
            revive(record.part("sentences"), "sentence means"),
        )
        return cls(rewards, sentences, record.settings["pessimism"])
