"""The records and protocols that everything else is written against.

Symbols: ``n`` rounds, ``A`` prompts, ``d_x`` context, ``d_q`` query, ``d_e`` prompt and ``d_o`` output dimension.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from offprompts_env.errors import ActionError, ConfigError, DataError, DimensionError, NumericalError, PropensityError
from offprompts_env.rng import stream

if TYPE_CHECKING:
    import pandas as pd

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.integer[Any]]


def _matrix(value: npt.ArrayLike, name: str) -> Array:
    array = np.asarray(value, dtype=np.float32)
    if array.ndim != 2:
        raise DataError(f"{name}: expected a matrix (n, d), got shape {array.shape}; pass one row a round")
    return array


def _column(value: npt.ArrayLike, name: str, n: int, dtype: npt.DTypeLike) -> Array:
    try:
        array = np.asarray(value, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: expected values of type {np.dtype(dtype)}, got {type(value).__name__}") from error
    if array.shape != (n,):
        raise DataError(f"{name}: expected {n} values, one a round, got shape {array.shape}")
    return array


def _check_finite(array: Array, name: str) -> None:
    # A sum is a cheap first look: it is finite unless an element is not, or the values are astronomically large.
    if np.isfinite(np.sum(array, dtype=np.float64)):
        return
    bad = ~np.isfinite(array)
    if bad.any():
        row = int(np.argwhere(bad)[0][0])
        raise DataError(f"{name}: expected finite numbers, got {array[row]!r} in row {row}; drop or repair that row")


@dataclass(frozen=True, slots=True, eq=False)
class Contexts:
    """Who asks about what, one row a round.

    Attributes:
        context: user features, (n, d_x) float32.
        query: item features, (n, d_q) float32.
        user_id: (n,) int64, where users have ids.
        item_id: (n,) int64, where items have ids.
        query_text: (n,) array of str, where queries are text.
    """

    context: FloatArray
    query: FloatArray
    user_id: IntArray | None = None
    item_id: IntArray | None = None
    query_text: Array | None = None

    def __post_init__(self) -> None:
        context, query = _matrix(self.context, "context"), _matrix(self.query, "query")
        if len(context) != len(query):
            raise DataError(f"query: expected {len(context)} rows, as many as context, got {len(query)}")
        object.__setattr__(self, "context", context)
        object.__setattr__(self, "query", query)
        for name, dtype in (("user_id", np.int64), ("item_id", np.int64), ("query_text", object)):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _column(value, name, len(context), dtype))

    @classmethod
    def of(cls, observation: Mapping[str, Any], info: Mapping[str, Any] | None = None) -> Contexts:
        """Return what an environment showed as contexts: one row for a single round, one a round for a batch.

        Args:
            observation: with the keys ``context`` and ``query``, as ``reset`` and ``step`` return it.
            info: returned with it; ids and query text come from here.

        Raises:
            DataError: the observation has lost its keys, or has other shapes.
        """
        try:
            context, query = (np.asarray(observation[name], dtype=np.float32) for name in ("context", "query"))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise DataError(
                f"observation: expected a dict with 'context' and 'query', got {type(observation).__name__}; pass what "
                "the environment returned, before any wrapper that flattens it"
            ) from error
        single = context.ndim == 1

        def said(name: str) -> Any:
            if info is None or name not in info:
                return None
            return [info[name]] if single else info[name]

        return cls(
            context[None] if single else context,
            query[None] if single else query,
            said("user_id"),
            said("item_id"),
            said("query_text"),
        )

    def __len__(self) -> int:
        return len(self.context)

    def take(self, index: Any) -> Contexts:
        """Return the rows `index` (anything that indexes the first axis and keeps it)."""
        columns: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        taken: dict[str, Any] = {name: None if value is None else value[index] for name, value in columns.items()}
        return Contexts(**taken)

    def repeat(self, times: int) -> Contexts:
        """Return every row `times` times in a row."""
        return self.take(np.repeat(np.arange(len(self)), times))


@dataclass(frozen=True, slots=True, eq=False)
class Outputs:
    """What the frozen model answered, one row a round.

    Attributes:
        embedding: (n, d_o) float32; in the synthetic benchmark the embedding *is* the output.
        text: (n,) array of str, where the output is text.
    """

    embedding: FloatArray
    text: Array | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "embedding", _matrix(self.embedding, "output embedding"))
        if self.text is not None:
            object.__setattr__(self, "text", _column(self.text, "output text", len(self.embedding), object))

    def __len__(self) -> int:
        return len(self.embedding)

    def take(self, index: Any) -> Outputs:
        """Return the rows `index`."""
        return Outputs(self.embedding[index], None if self.text is None else self.text[index])


@dataclass(frozen=True, eq=False)
class PromptSet:
    """The catalogue of prompts an action indexes.

    Attributes:
        embeddings: (A, d_e) float32.
        texts: the prompt texts, where prompts are text.
    """

    embeddings: FloatArray
    texts: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        embeddings = _matrix(self.embeddings, "prompt embeddings")
        if len(embeddings) == 0:
            raise ConfigError("prompts: expected at least one prompt, got none; pass a non-empty list")
        _check_finite(embeddings, "prompt embeddings")
        object.__setattr__(self, "embeddings", embeddings)
        if self.texts is not None:
            texts = tuple(self.texts)
            check_prompt_texts(texts)
            if len(texts) != len(embeddings):
                raise DimensionError(
                    f"prompts: expected {len(embeddings)} texts, one an embedding, got {len(texts)}; encode them again"
                )
            object.__setattr__(self, "texts", texts)

    def __len__(self) -> int:
        return len(self.embeddings)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the texts, or of the embeddings without texts: equal for catalogues that index the same prompts.

        Embeddings of texts stay out of it: their last digits depend on the machine and its number of threads.
        """
        content = np.ascontiguousarray(self.embeddings).tobytes() if self.texts is None else b""
        digest = hashlib.sha256(content)
        digest.update(repr((self.embeddings.shape, self.texts)).encode())
        return digest.hexdigest()


def check_prompt_texts(texts: Sequence[str]) -> None:
    """Raise :class:`ConfigError` if `texts` is empty or holds something that is not a prompt."""
    if len(texts) == 0:
        raise ConfigError("prompts: expected at least one prompt, got an empty list; pass a non-empty list")
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"prompts: expected non-blank text, got {text!r} at position {index}; remove or fill it")


@runtime_checkable
class Policy(Protocol):
    """A policy is its probability mass function over prompts.

    A policy that can draw without building the whole (n, A) matrix may also have a method
    ``sample(contexts, rng) -> (actions (n,), propensities (n,))``; see :func:`offprompts_env.sampling.sample_actions`.
    Likewise ``chosen(contexts, actions) -> (n,)``; see :func:`offprompts_env.sampling.chosen_probabilities`.
    """

    @property
    def n_prompts(self) -> int:
        """Number of prompts ``A``."""
        ...

    def probabilities(self, contexts: Contexts) -> FloatArray:
        """Return ``π(a | x, q)`` for every round and prompt, (n, A); rows sum to one."""
        ...


@runtime_checkable
class Agent(Protocol):
    """What acts on batches, says with which propensity, and may learn from what came of it."""

    def act(self, contexts: Contexts, rng: np.random.Generator) -> tuple[IntArray, FloatArray]:
        """Return prompts (n,) and the probabilities (n,) with which they were drawn."""
        ...

    def learn(self, log: LoggedDataset) -> None:
        """Learn from a batch of rounds; a fixed agent does nothing."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Estimate:
    """A number with its uncertainty.

    The interval is the normal one; :meth:`bootstrap` and :meth:`empirical_bernstein` give the estimate with another.

    Attributes:
        value: the estimate; NaN where the log says nothing at all.
        standard_error: its standard error; 0 where it is exact, NaN where it is unknown.
        terms: per-round terms whose mean is `value`, (n,); paired differences of two policies come from them. Those of
            a ratio are linearised: their spread is that of the ratio, to first order.
        effective_sample_size: ``(Σ w)² / Σ w²`` of the weights used, or n without weights.
        confidence: coverage of the interval.
        interval: lower and upper end; the normal interval ``value ± z · standard_error`` unless given.
        diagnostics: further named numbers, such as the largest and the mean weight.
        warnings: what a reader must know before trusting the value.
        ratio: columns b, u, v (n,) of an estimate ``mean(b) + mean(u) / mean(v)``; None for a mean of terms.
        strata: numbers of rounds that were recorded apart, one after the other; None for rounds of one kind.
    """

    value: float
    standard_error: float
    terms: FloatArray = field(repr=False)
    effective_sample_size: float
    confidence: float = 0.95
    interval: tuple[float, float] = (float("nan"), float("nan"))
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    ratio: tuple[FloatArray, FloatArray, FloatArray] | None = field(default=None, repr=False)
    strata: tuple[int, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _check_confidence(self.confidence)
        if np.isnan(self.interval[0]) and np.isnan(self.interval[1]):
            from statistics import NormalDist

            half = NormalDist().inv_cdf(0.5 + self.confidence / 2) * self.standard_error
            object.__setattr__(self, "interval", (self.value - half, self.value + half))

    @classmethod
    def of_mean(cls, terms: FloatArray, *, strata: tuple[int, ...] | None = None, **rest: Any) -> Estimate:
        """Estimate the mean of independent `terms` (n,), with standard error ``std(terms) / √n``.

        Args:
            terms: one a round.
            strata: numbers of rounds of each stratum: what differs between strata is then no chance.
            rest: further attributes.
        """
        terms = np.asarray(terms, dtype=np.float64)
        if len(terms) == 0:
            raise DataError("estimate: expected at least one round, got none")
        rest.setdefault("effective_sample_size", float(len(terms)))
        value = float(terms.mean())
        return cls(value=value, standard_error=_error_of_mean(terms, strata), terms=terms, strata=strata, **rest)

    @classmethod
    def of_ratio(cls, baseline: FloatArray, numerator: FloatArray, denominator: FloatArray, **rest: Any) -> Estimate:
        """Estimate ``V = mean(b) + mean(u) / mean(v)`` of columns (n,), by the delta method.

        Its terms are ``b + ρ + (u − ρ v) / mean(v)`` with ``ρ = mean(u) / mean(v)``. All is NaN where ``mean(v) = 0``.
        """
        columns = tuple(np.asarray(column, dtype=np.float64) for column in (baseline, numerator, denominator))
        b, u, v = columns
        if len(v) == 0:
            raise DataError("estimate: expected at least one round, got none")
        scale = v.mean() if v.mean() != 0 else np.nan
        rho = u.mean() / scale
        return cls.of_mean(b + rho + (u - rho * v) / scale, ratio=(b, u, v), **rest)

    def normal(self, confidence: float = 0.95) -> Estimate:
        """Return this estimate with the normal interval of another `confidence`."""
        return replace(self, confidence=confidence, interval=(float("nan"), float("nan")))

    def bootstrap(self, *, n_resamples: int = 1_000, confidence: float | None = None, seed: int = 0) -> Estimate:
        """Return this estimate with the percentile interval of the bootstrap (Efron, 1979).

        Rounds are drawn with replacement, within strata, and the estimate is made again: a ratio from its columns, not
        from its terms. What was fitted before (reward models, densities) stays as it is.

        Args:
            n_resamples: number of resamples.
            confidence: of the interval; None keeps this one's.
            seed: names the resamples.
        """
        if not (isinstance(n_resamples, int) and n_resamples >= 2):
            raise ConfigError(f"n_resamples: expected an integer ≥ 2, got {n_resamples!r}; 1000 is usual")
        confidence = self.confidence if confidence is None else _check_confidence(confidence)
        rng, sizes = stream(seed, "bootstrap"), self.strata or (len(self.terms),)
        starts = np.cumsum((0, *sizes[:-1]))
        values = np.empty(n_resamples)
        # One resample at a time: its rows stay in cache, and memory does not grow with the number of resamples.
        for index in range(n_resamples):
            parts = [start + rng.integers(size, size=size) for start, size in zip(starts, sizes, strict=True)]
            rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
            if self.ratio is None:
                values[index] = self.terms[rows].mean()
            else:
                b, u, v = (column[rows].mean() for column in self.ratio)
                values[index] = b + u / v if v != 0 else np.nan
        known = values[~np.isnan(values)]
        if len(known) == 0:
            return replace(self, confidence=confidence, interval=(float("nan"), float("nan")))
        low, high = np.quantile(known, [0.5 - confidence / 2, 0.5 + confidence / 2])
        notes = self.warnings
        if len(known) < n_resamples:
            missing = n_resamples - len(known)
            notes = (*notes, f"{missing} of {n_resamples} resamples had no weight and were left out of the interval")
        return replace(self, confidence=confidence, interval=(float(low), float(high)), warnings=notes)

    def empirical_bernstein(
        self, bounds: tuple[float, float] | None = None, *, confidence: float | None = None
    ) -> Estimate:
        """Return this estimate with an interval that covers at every n, not only for large ones.

        ``value ± (√(2 s² ln(4/δ) / n) + 7 R ln(4/δ) / 3(n − 1))`` with s² the variance of n terms in a range of length
        R and ``δ = 1 − confidence`` (Maurer and Pontil, 2009, theorem 4, on both sides).

        Args:
            bounds: smallest and largest value that a term could have; None takes the observed ones, and a warning says
                so: the guarantee holds for known bounds only.
            confidence: of the interval; None keeps this one's.

        Raises:
            DataError: fewer than two rounds, or a term outside `bounds`.
        """
        confidence = self.confidence if confidence is None else _check_confidence(confidence)
        n, notes = len(self.terms), self.warnings
        if n < 2:
            raise DataError(f"empirical Bernstein interval: expected at least two rounds, got {n}; record more")
        observed = float(self.terms.min()), float(self.terms.max())
        low, high = observed if bounds is None else bounds
        if observed[0] < low or observed[1] > high:
            raise DataError(
                f"bounds: expected all terms in [{low:g}, {high:g}], got some from {observed[0]:g} to {observed[1]:g}; "
                "pass the smallest and largest value that a weighted reward can have"
            )
        if bounds is None:
            notes = (
                *notes,
                "the empirical Bernstein interval takes the observed range of terms for the possible one",
            )
        if self.ratio is not None:
            notes = (*notes, "the empirical Bernstein bound is for means; for a ratio it holds only to first order")
        scale = float(np.log(4 / (1 - confidence)))
        half = float(np.sqrt(2 * self.terms.var(ddof=1) * scale / n)) + 7 * (high - low) * scale / (3 * (n - 1))
        ends = (self.value - half, self.value + half)
        return replace(self, confidence=confidence, interval=ends, warnings=notes)

    def minus(self, other: Estimate) -> Estimate:
        """Return the paired difference of two estimates over the same rounds."""
        if self.terms.shape != other.terms.shape:
            raise DimensionError(
                f"difference: expected terms over the same rounds, got {len(self.terms)} and {len(other.terms)}"
            )
        return Estimate.of_mean(self.terms - other.terms, confidence=self.confidence, strata=self.strata)

    def __str__(self) -> str:
        low, high = self.interval
        text = f"{self.value:.4f} ± {self.standard_error:.4f} ({self.confidence:.0%}: {low:.4f} to {high:.4f})"
        return "; ".join((text, *(f"warning: {warning}" for warning in self.warnings)))


def _check_confidence(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence: expected a number between 0 and 1, got {confidence!r}; 0.95 is usual")
    return confidence


def _error_of_mean(terms: FloatArray, strata: tuple[int, ...] | None) -> float:
    """Return the standard error of the mean of `terms` (n,), whose strata have fixed numbers of rounds."""
    parts = [terms] if strata is None else np.split(terms, np.cumsum(strata)[:-1])
    if min(map(len, parts)) < 2:
        return float("nan")
    return float(np.sqrt(sum(len(part) * part.var(ddof=1) for part in parts)) / len(terms))


@dataclass(frozen=True, slots=True, eq=False)
class Oracle:
    """What only the simulator knows; it travels beside a log and no learner reads it.

    Attributes:
        expected_reward: noiseless reward of the recorded output, (n,).
    """

    expected_reward: FloatArray


@dataclass(frozen=True, slots=True)
class LogMetadata:
    """Where a log comes from.

    Attributes:
        env_id: registered id of the environment, or None for a log from elsewhere.
        env_config: the JSON-able keyword arguments that make it again; of a part of the caller's own, the class.
        seed: seed of the recording.
        versions: package name to version, as recorded.
        notes: free text.
    """

    env_id: str | None = None
    env_config: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: str = ""

    def __post_init__(self) -> None:
        # Seeds come out of NumPy as often as not, and JSON would refuse them when the first rows are written.
        if isinstance(self.seed, np.integer):
            object.__setattr__(self, "seed", int(self.seed))


_OPTIONAL_COLUMNS: Mapping[str, type] = {
    "sentence": object,
    "query_text": object,
    "user_id": np.int64,
    "item_id": np.int64,
}


@dataclass(frozen=True, eq=False)
class LoggedDataset:
    """Logged rounds: all that an offline learner may look at. Frozen, and validated once when made.

    Attributes:
        context: (n, d_x) float32.
        query: (n, d_q) float32.
        action: prompt indices in [0, A), (n,) int64.
        propensity: probability with which the recorded action was drawn, in (0, 1], (n,) float64; NaN where unknown.
        reward: (n,) float32.
        output: output embeddings, (n, d_o) float32.
        prompts: the catalogue that `action` indexes.
        sentence: (n,) array of str, where outputs are text.
        user_id, item_id: (n,) int64, where they exist.
        query_text: (n,) array of str, where queries are text.
        oracle: truth known to the simulator only; learners never read it.
        metadata: provenance.

    Raises:
        DataError: a column has the wrong shape, type or range; the message names column, row, expected and actual.
    """

    context: FloatArray
    query: FloatArray
    action: IntArray
    propensity: FloatArray
    reward: FloatArray
    output: FloatArray
    prompts: PromptSet
    sentence: Array | None = None
    user_id: IntArray | None = None
    item_id: IntArray | None = None
    query_text: Array | None = None
    oracle: Oracle | None = None
    metadata: LogMetadata = field(default_factory=LogMetadata)

    def __post_init__(self) -> None:
        for name in ("context", "query", "output"):
            matrix = _matrix(getattr(self, name), name)
            _check_finite(matrix, name)
            object.__setattr__(self, name, matrix)
        n = len(self.context)
        if n == 0:
            raise DataError("log: expected at least one round, got none; record some first")
        for name in ("query", "output"):
            if len(getattr(self, name)) != n:
                raise DataError(f"{name}: expected {n} rows, as many as context, got {len(getattr(self, name))}")
        object.__setattr__(self, "action", check_actions(self.action, len(self.prompts), n))
        object.__setattr__(self, "reward", _column(self.reward, "reward", n, np.float32))
        _check_finite(self.reward, "reward")
        propensity = _column(self.propensity, "propensity", n, np.float64)
        wrong = ~(np.isnan(propensity) | ((propensity > 0) & (propensity <= 1)))
        if wrong.any():
            row = int(np.argmax(wrong))
            raise PropensityError(
                f"propensity: expected a probability in (0, 1] or NaN for unknown, got {propensity[row]} in row {row}; "
                "record the probability with which the action was drawn"
            )
        object.__setattr__(self, "propensity", propensity)
        for name, dtype in _OPTIONAL_COLUMNS.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _column(value, name, n, dtype))
        if self.oracle is not None:
            expected = _column(self.oracle.expected_reward, "oracle.expected_reward", n, np.float32)
            object.__setattr__(self, "oracle", Oracle(expected))

    def __len__(self) -> int:
        return len(self.context)

    @property
    def n_prompts(self) -> int:
        """Number of prompts ``A``."""
        return len(self.prompts)

    @cached_property
    def contexts(self) -> Contexts:
        """The contexts of all rounds."""
        return Contexts(self.context, self.query, self.user_id, self.item_id, self.query_text)

    @cached_property
    def outputs(self) -> Outputs:
        """The outputs of all rounds."""
        return Outputs(self.output, self.sentence)

    def take(self, index: Any) -> LoggedDataset:
        """Return the rows `index` as a dataset of their own."""
        changes: dict[str, Any] = {}
        for name in ("context", "query", "action", "propensity", "reward", "output", *_OPTIONAL_COLUMNS):
            value = getattr(self, name)
            changes[name] = None if value is None else value[index]
        if self.oracle is not None:
            changes["oracle"] = Oracle(self.oracle.expected_reward[index])
        return replace(self, **changes)

    def require_propensities(self, method: str) -> FloatArray:
        """Return the propensities, or say which rows lack one and what `method` could be replaced by.

        Raises:
            PropensityError: at least one propensity is NaN.
        """
        unknown = np.isnan(self.propensity)
        if unknown.any():
            raise PropensityError(
                f"{method} needs the column 'propensity', which is unknown (NaN) in {int(unknown.sum())} of "
                f"{len(self)} rows, the first being row {int(np.argmax(unknown))}; use a method without propensities "
                "(agents.RegressionPG), or estimate them with agents.BehaviorCloning and pass logging_policy="
            )
        return self.propensity

    @classmethod
    def load(cls, path: str | Path) -> LoggedDataset:
        """Read a recorded directory; see :func:`offprompts_env.storage.load`."""
        from offprompts_env import storage

        return storage.load(path)

    def save(self, path: str | Path, *, mode: Literal["append", "refuse", "overwrite"] = "refuse") -> Path:
        """Write a directory that :meth:`load` reads; see :func:`offprompts_env.storage.save`."""
        from offprompts_env import storage

        return storage.save(self, path, mode=mode)

    @classmethod
    def from_dataframe(cls, frame: pd.DataFrame, prompts: PromptSet, **columns: Any) -> LoggedDataset:
        """Make a dataset from a data frame; see :func:`offprompts_env.interchange.from_dataframe`."""
        from offprompts_env import interchange

        return interchange.from_dataframe(frame, prompts, **columns)

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row a round; see :func:`offprompts_env.interchange.to_dataframe`."""
        from offprompts_env import interchange

        return interchange.to_dataframe(self)


def check_actions(action: npt.ArrayLike, n_prompts: int, n: int) -> npt.NDArray[np.int64]:
    """Return `action` as (n,) int64 prompt indices.

    Raises:
        ActionError: wrong type, shape, or an index outside [0, n_prompts).
    """
    array = np.asarray(action)
    if array.shape != (n,):
        raise ActionError(f"action: expected {n} prompt indices, one a round, got shape {array.shape}")
    if not np.issubdtype(array.dtype, np.integer):
        raise ActionError(f"action: expected integers in [0, {n_prompts}), got dtype {array.dtype}; cast to int64")
    array = array.astype(np.int64, copy=False)
    if n and (array.min() < 0 or array.max() >= n_prompts):
        row = int(np.argmax((array < 0) | (array >= n_prompts)))
        raise ActionError(
            f"action: expected an index in [0, {n_prompts}), got {array[row]} in row {row}; pass indices of prompts"
        )
    return array


def check_rewards(reward: FloatArray) -> FloatArray:
    """Return `reward` unchanged, or raise :class:`NumericalError` if a value is NaN or infinite."""
    if not np.isfinite(reward).all():
        row = int(np.argmin(np.isfinite(reward)))
        raise NumericalError(
            f"reward: expected finite numbers, got {reward[row]} in row {row}; check the reward model and its inputs"
        )
    return reward
