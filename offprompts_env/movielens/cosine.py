"""Rewards that are cosines: whether a sentence, or the prompt itself, points where a user's taste points.

Users are tastes for named features of movies, so sentences are brought into that space. With ``z_jf`` the features of
movie j in units of their standard deviation around their mean, ``h`` the state of a text and ``s0_jk`` sentences about
j without a prompt,

    t(s) = (h(s) − h̄) W         W = argmin_W Σ_j ‖z_j − (h̄_j − h̄) W‖² + λ ‖W‖²,   h̄_j = mean_k h(s0_jk)
    sentence-cosine             c(x, s) = cos(x, t(s))
    prompt-cosine               c(x, a) = cos(x, t(f(a)) − mean_a' t(f(a')))
    P(like) = (1 + c) / 2

λ has the smallest leave-one-movie-out error; x enters with the features that movies have. f puts a keyword into the
sentence in which the bundle's prompt encoder reads it, and the mean over the bundle's keywords takes out what that
sentence says by itself: an encoder of sentences knows little of a bare keyword.

A binary reward is P. A continuous one compares with what is said without a prompt, so it is ``scale/2 · (c(x, s) −
mean_k c(x, s0_k))``, within ±scale; and ``scale/2 · c(x, a)``, within ±scale/2, where a prompt counts by itself.

The released code of arXiv 2504.02646 has two such simulators, ``100 · (cos(x, s) − cos(x, q))`` and ``100 · cos(x,
a)``, on embeddings of one dimension that need not mean the same; its reference is the movie where this one is what is
said of the movie.

A reward model sees what the user sees: the output, never the prompt. So under prompt-cosine the output *is* the prompt
(:class:`EchoedPrompts`). No language model writes, the output is certain, and with it every expected reward, the oracle
and :meth:`offprompts_env.truth.Truth.enumerated` are exact: a world to find mistakes in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from offprompts_env.config import check_number
from offprompts_env.errors import ConfigError, DataError, DimensionError, unknown_name
from offprompts_env.movielens.bundle import Bundle
from offprompts_env.movielens.grammar import era_of
from offprompts_env.simulator import RewardKind
from offprompts_env.text.encoder import Encoder
from offprompts_env.text.prompted import text_column
from offprompts_env.types import Contexts, FloatArray, IntArray, Outputs, PromptSet, check_actions

# Penalties that are tried, as shares of the largest eigenvalue of the states' scatter.
_PENALTIES = 10.0 ** np.arange(-7, 1)


@dataclass(frozen=True, eq=False)
class TasteSpace:
    """Where users and sentences meet: features that both have.

    Attributes:
        names: of the K features.
        columns: where they are in a user vector, (K,).
        centre: mean state h̄, (h,).
        weights: W, (h, K).
        explained: share of each feature's variance over movies that states tell, leave-one-movie-out, (K,).
    """

    names: tuple[str, ...]
    columns: IntArray
    centre: FloatArray
    weights: FloatArray
    explained: FloatArray

    @classmethod
    def fit(cls, states: FloatArray, features: FloatArray, names: Sequence[str], columns: IntArray) -> TasteSpace:
        """Fit the ridge regression of the module's equations.

        Args:
            states: ``h̄_j``, the mean state of each movie, (n_items, h).
            features: of each movie, raw, (n_items, K).
            names: of the features.
            columns: where they are in a user vector, (K,).

        Raises:
            DataError: fewer than 3 movies, or features that do not vary.
        """
        n = len(states)
        if n < 3 or not (np.ptp(features, axis=0) > 0).all():
            raise DataError(
                f"tastes: expected at least 3 movies and features that differ between them, got {n} movies; add movies"
            )
        target = (features - features.mean(axis=0)) / features.std(axis=0)
        centre = states.mean(axis=0, dtype=np.float64)
        left, scale, right = np.linalg.svd(states - centre, full_matrices=False)
        inside = left.T @ target
        fits = []
        for penalty in _PENALTIES * max(float(scale[0]) ** 2, np.finfo(float).tiny):
            shrink = scale**2 / (scale**2 + penalty)
            # The mean is fitted too: 1/n of each movie's own leverage.
            leverage = np.square(left) @ shrink + 1 / n
            errors = (target - left @ (shrink[:, None] * inside)) / np.maximum(1 - leverage, 1e-12)[:, None]
            weights = right.T @ ((scale / (scale**2 + penalty))[:, None] * inside)
            fits.append((np.square(errors).mean(axis=0), weights))
        error, weights = min(fits, key=lambda fit: float(fit[0].sum()))
        # Predicting the mean of the other movies errs by n / (n − 1) of the deviation from the mean of all.
        explained = 1 - error * ((n - 1) / n) ** 2
        return cls(tuple(names), columns, centre.astype(np.float32), weights.astype(np.float32), explained)

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> TasteSpace:
        """Fit it to the movies of `bundle` and its sentences without a prompt.

        Features are those of the user vectors that movies have: genres and, of movies, eras.

        Raises:
            ConfigError: users are not described by what items are described by, so that there is nothing to compare.
        """
        items, movies = bundle.items, bundle.info.domain == "movies"
        sentences = bundle.no_prompt_sentences
        rows = [row for row, title in enumerate(items.titles) if title in sentences]
        told = [{*items.genres[row], *({era_of(int(items.years[row]))} if movies else ())} for row in rows]
        wanted = bundle.info.user_features
        features = np.array([[name in names for name in wanted] for names in told], dtype=np.float64)
        columns = np.flatnonzero(np.ptp(features, axis=0) > 0) if len(told) else np.zeros(0, dtype=np.int64)
        if len(columns) < 2:
            raise ConfigError(
                f"simulator: a cosine needs at least 2 features that describe users and items alike, got "
                f"{len(columns)} of {list(wanted[:5])}; build the bundle with features of the items, or use "
                "simulator='distilbert'"
            )
        texts = [sentences[items.titles[row]] for row in rows]
        states = bundle.reward_encoder.encode([text for samples in texts for text in samples])
        ends = np.cumsum([len(samples) for samples in texts])[:-1]
        means = np.stack([own.mean(axis=0, dtype=np.float64) for own in np.split(states, ends)])
        return cls.fit(means, features[:, columns], [wanted[column] for column in columns], columns)

    def of_states(self, states: FloatArray) -> FloatArray:
        """Return ``t``, (n, K) float32, of `states` (n, h)."""
        return np.asarray((states - self.centre) @ self.weights, dtype=np.float32)

    def cosine(self, contexts: Contexts, tastes: FloatArray) -> FloatArray:
        """Return ``cos(x, t)`` of users and `tastes` (n, K), (n,) float32; 0 where either is the zero vector.

        Raises:
            DimensionError: users of too few dimensions, or not one taste a round.
        """
        if contexts.context.shape[1] <= self.columns[-1] or tastes.shape != (len(contexts), len(self.columns)):
            raise DimensionError(
                f"tastes: expected users of at least {self.columns[-1] + 1} dimensions and tastes "
                f"({len(contexts)}, {len(self.columns)}), got {contexts.context.shape} and {tastes.shape}; use the "
                "users of the same bundle"
            )
        users = contexts.context[:, self.columns]
        lengths = np.linalg.norm(users, axis=1) * np.linalg.norm(tastes, axis=1)
        inner = np.einsum("nk,nk->n", users, tastes)
        # Rounding may carry a cosine of 1 beyond it, and half of it plus a half is a probability.
        cosine = np.divide(inner, lengths, out=np.zeros_like(inner), where=lengths > 0)
        return np.asarray(np.clip(cosine, -1, 1))


class CosineLikes:
    """Cosine of taste and sentence as a like model; see the module for the equations.

    Args:
        space: where both are.
        context_dim: ``d_x`` of the users.
        encoder: gives the sentence states that `space` was fitted to.
    """

    def __init__(self, space: TasteSpace, context_dim: int, encoder: Encoder) -> None:
        self.space, self.encoder, self._context_dim = space, encoder, context_dim

    @property
    def context_dim(self) -> int:
        """``d_x``."""
        return self._context_dim

    def states(self, sentences: Sequence[str]) -> FloatArray:
        """Return ``t(s)``, (n, K)."""
        return self.space.of_states(self.encoder.encode(sentences))

    def probability(self, contexts: Contexts, states: FloatArray) -> FloatArray:
        """Return ``(1 + cos(x, t(s))) / 2``, (n,)."""
        return np.asarray((1 + self.space.cosine(contexts, states)) / 2)


class EchoedPrompts:
    """An output model that answers with the prompt itself: its text, embedded as the prompt is.

    Args:
        prompts: the catalogue.

    Raises:
        DataError: prompts without texts.
    """

    def __init__(self, prompts: PromptSet) -> None:
        if prompts.texts is None:
            raise DataError("prompts: expected prompts with texts, which are the outputs here, got embeddings alone")
        self._prompts, self._texts = prompts, text_column(prompts.texts)

    @property
    def output_dim(self) -> int:
        """``d_e``."""
        return int(self._prompts.embeddings.shape[1])

    @property
    def prompts(self) -> PromptSet:
        """The catalogue."""
        return self._prompts

    @property
    def outcomes(self) -> int:
        """1: the output is certain."""
        return 1

    def outcome(self, contexts: Contexts, actions: IntArray, k: int) -> Outputs:
        """Return the only output of each round."""
        actions = check_actions(actions, len(self._prompts), len(contexts))
        return Outputs(self._prompts.embeddings[actions], self._texts[actions])

    def sample(self, contexts: Contexts, actions: IntArray, rng: np.random.Generator) -> Outputs:
        """Return the only output of each round; nothing is drawn."""
        return self.outcome(contexts, actions, 0)


class PromptCosineReward:
    """Reward from the cosine of taste and prompt; see the module for the equations.

    Args:
        space: where both are.
        context_dim: ``d_x`` of the users.
        encoder: gives the states that `space` was fitted to.
        carrier: the sentence around a prompt, with ``{text}`` in place of it.
        catalogue: prompts whose mean says what the carrier says by itself.
        kind: "continuous" or "binary".
        scale: of a continuous reward, which is within ±scale/2.

    Raises:
        ConfigError: unknown kind, a carrier without ``{text}``, no catalogue, or a scale that is not positive.
    """

    def __init__(
        self,
        space: TasteSpace,
        context_dim: int,
        encoder: Encoder,
        *,
        carrier: str,
        catalogue: Sequence[str],
        kind: RewardKind = "continuous",
        scale: float = 10.0,
    ) -> None:
        if kind not in get_args(RewardKind):
            raise unknown_name("reward_type", kind, get_args(RewardKind))
        check_number("reward_scale", scale, 0, strict=True)
        if "{text}" not in carrier or len(catalogue) == 0:
            raise ConfigError(
                f"prompts: expected a carrier with '{{text}}' in it and a catalogue, got {carrier!r} and "
                f"{len(catalogue)} prompts"
            )
        self.space, self.context_dim, self.scale = space, context_dim, scale
        self.kind: RewardKind = kind
        self._encoder, self._carrier = encoder, carrier
        found = self._encoded(catalogue)
        self._mean = found.mean(axis=0)
        self._known = dict(zip(catalogue, found - self._mean, strict=True))

    def _encoded(self, prompts: Sequence[str]) -> FloatArray:
        carried = [self._carrier.replace("{text}", prompt) for prompt in prompts]
        return self.space.of_states(self._encoder.encode(carried))

    def tastes(self, prompts: Sequence[str]) -> FloatArray:
        """Return what each prompt is to a taste, (n, K)."""
        unknown = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if unknown:
            self._known |= zip(unknown, self._encoded(unknown) - self._mean, strict=True)
        return np.stack([self._known[prompt] for prompt in prompts])

    def mean(self, contexts: Contexts, outputs: Outputs) -> FloatArray:
        """Return the noiseless reward, (n,).

        Raises:
            DataError: outputs without text.
            DimensionError: users of other dimensions.
        """
        if outputs.text is None:
            raise DataError("rewards: this reward reads the prompt as the output, but the outputs have no text")
        cosine = self.space.cosine(contexts, self.tastes(outputs.text.tolist()))
        if self.kind == "binary":
            return np.asarray((1 + cosine) / 2)
        return np.asarray(self.scale / 2 * cosine, dtype=np.float32)

    def reference(self, contexts: Contexts) -> FloatArray:
        """Return P(like) where there is no prompt, (n,): ½, as nothing is said for or against a taste."""
        return np.full(len(contexts), 0.5, dtype=np.float32)
