"""The figures of a bundle: does the language model say what is true, and do prompts matter to whom they should?

Everything is measured on sampled sentences at the bundle's own decoding parameters.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from offprompts_env.movielens.grammar import MAX_GENRES, Facts, Movie, is_compatible, parse
from offprompts_env.movielens.lexicon import GENRE_NAMES, Keyword, lexicon
from offprompts_env.movielens.simulator import LikeSimulator
from offprompts_env.text.language_model import LanguageModel
from offprompts_env.text.prompted import PromptFormatter


@dataclass(frozen=True)
class LanguageFigures:
    """What sentences say, as shares of all sentences unless stated otherwise.

    Malformed: not in the grammar (`parse` returns None). Recall: named genres of the movie over min(3, all its genres);
    precision: named genres that are the movie's; both are means over well-formed sentences without a keyword. Era,
    popularity and reception: of the well-formed sentences that state them, the share that states the truth. For
    keywords that suit the movie: the keyword stands in the sentence literally, and (genre keywords) its genre is
    named. For keywords that do not: they stand in the sentence, and their genre is (wrongly) named. Malformed
    sentences count as failures in all keyword figures.
    """

    malformed: float
    malformed_with_keyword: float
    genre_recall: float
    genre_precision: float
    era_right: float
    popularity_right: float
    reception_right: float
    keyword_literal: float
    keyword_genre_named: float
    unsuitable_keyword_literal: float
    unsuitable_genre_named: float
    distinct_share: float
    words_per_sentence: float
    sentences_per_second: float
    n_sentences: int


@dataclass(frozen=True)
class PromptFigures:
    """How much prompts matter, for reward 10 (P(like | x, s) - mean_k P(like | x, no-prompt sentence k)).

    Values are mean rewards of policies whose prompts were chosen on one half of the sampled sentences and scored on the
    other half, averaged over both directions. ``*_share``: shares of the variance of the mean reward that depends on
    the prompt, with the sampling noise of the means subtracted: prompt, user x prompt, movie x prompt, three-way.
    ``noise_variance``: variance of the reward over sentences for given user, movie and prompt.
    """

    uniform: float
    best_single: float
    best_per_movie: float
    best_per_user: float
    best_per_user_and_movie: float
    personalisation: float
    prompt_share: float
    user_prompt_share: float
    movie_prompt_share: float
    three_way_share: float
    prompt_variance: float
    noise_variance: float
    n_users: int
    n_movies: int
    n_prompts: int
    n_sentences: int


def measure_language(
    lm: LanguageModel,
    formatter: PromptFormatter,
    movies: Sequence[Movie],
    rng: np.random.Generator,
    n_per_movie: int = 4,
    n_keywords: int = 4000,
) -> LanguageFigures:
    """Sample sentences about all `movies` without a keyword, and about random movies with keywords.

    Half of the keywords suit their movie, half do not.
    """
    told = [movie for movie in movies for _ in range(n_per_movie)]
    start = time.perf_counter()
    plain = lm.generate([formatter.ask(movie.title) for movie in told], rng)
    seconds = time.perf_counter() - start
    read = [(facts, movie) for facts, movie in zip(map(parse, plain), told, strict=True) if facts is not None]

    keywords = lexicon()
    pairs: list[tuple[Movie, Keyword]] = []
    for index in range(n_keywords):
        movie = movies[int(rng.integers(len(movies)))]
        pool = [word for word in keywords if is_compatible(word, movie) == (index % 2 == 0)]
        pairs.append((movie, pool[rng.integers(len(pool))]))
    steered = lm.generate([formatter.ask(movie.title, word.text) for movie, word in pairs], rng)
    facts_of = [parse(text) for text in steered]
    suits = [(facts, word) for facts, (_, word) in zip(facts_of[::2], pairs[::2], strict=True)]
    others = [(facts, word) for facts, (_, word) in zip(facts_of[1::2], pairs[1::2], strict=True)]
    eras = [(facts.era, movie.era) for facts, movie in read if facts.era is not None]
    return LanguageFigures(
        malformed=1 - len(read) / len(plain),
        malformed_with_keyword=_mean([facts is None for facts in facts_of]),
        genre_recall=_mean(
            [len({*facts.genres} & {*movie.genres}) / min(MAX_GENRES, len(movie.genres)) for facts, movie in read]
        ),
        genre_precision=_mean([len({*facts.genres} & {*movie.genres}) / len(facts.genres) for facts, movie in read]),
        era_right=_mean([said == true for said, true in eras]),
        popularity_right=_mean([facts.popularity == movie.popularity for facts, movie in read]),
        reception_right=_mean([facts.reception == movie.reception for facts, movie in read]),
        keyword_literal=_mean([_says(facts, word) for facts, word in suits]),
        keyword_genre_named=_mean([_names(facts, word) for facts, word in suits if word.group in GENRE_NAMES]),
        unsuitable_keyword_literal=_mean([_says(facts, word) for facts, word in others]),
        unsuitable_genre_named=_mean([_names(facts, word) for facts, word in others if word.group in GENRE_NAMES]),
        distinct_share=len(set(plain)) / len(plain),
        words_per_sentence=_mean([len(text.split()) for text in plain]),
        sentences_per_second=len(plain) / seconds,
        n_sentences=len(plain) + len(steered),
    )


def _says(facts: Facts | None, word: Keyword) -> bool:
    return facts is not None and word.text in facts.keywords


def _names(facts: Facts | None, word: Keyword) -> bool:
    return facts is not None and word.group in facts.genres


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def measure_prompts(
    lm: LanguageModel,
    formatter: PromptFormatter,
    simulator: LikeSimulator,
    user_vectors: np.ndarray,
    titles: Sequence[str],
    unprompted: Sequence[Sequence[str]],
    prompts: Sequence[str],
    rng: np.random.Generator,
    n_users: int = 200,
    n_movies: int = 20,
    n_sentences: int = 16,
    scale: float = 10.0,
) -> PromptFigures:
    """Measure `PromptFigures` on random users and movies and all given `prompts`.

    ``user_vectors`` (n, d_x); ``titles`` and ``unprompted`` (no-prompt sentences) are aligned. ``n_sentences`` is even.
    """
    users = user_vectors[rng.permutation(len(user_vectors))[:n_users]]
    movies = rng.permutation(len(titles))[:n_movies]
    means = np.zeros((2, len(users), len(movies), len(prompts)))
    variance = 0.0
    for column, movie in enumerate(movies):
        reference = _liked(simulator, users, unprompted[movie]).mean(axis=1)
        asked = [formatter.ask(titles[movie], prompt) for prompt in prompts for _ in range(n_sentences)]
        rewards = scale * (_liked(simulator, users, lm.generate(asked, rng)) - reference[:, None])
        rewards = rewards.reshape(len(users), len(prompts), n_sentences)
        means[0, :, column] = rewards[..., ::2].mean(axis=2)
        means[1, :, column] = rewards[..., 1::2].mean(axis=2)
        variance += float(rewards.var(axis=2, ddof=1).mean()) / len(movies)
    values = (_policy_values(means[0], means[1]) + _policy_values(means[1], means[0])) / 2
    # The covariance of the two independent halves estimates the variance of the true means, without sampling noise.
    first, second = _components(means[0]), _components(means[1])
    shares = np.array([float((a * b).mean()) for a, b in zip(first, second, strict=True)])
    total = shares.sum()
    return PromptFigures(
        uniform=values[0],
        best_single=values[1],
        best_per_movie=values[2],
        best_per_user=values[3],
        best_per_user_and_movie=values[4],
        personalisation=values[4] - values[1],
        prompt_share=shares[0] / total,
        user_prompt_share=shares[1] / total,
        movie_prompt_share=shares[2] / total,
        three_way_share=shares[3] / total,
        prompt_variance=float(total),
        noise_variance=variance,
        n_users=len(users),
        n_movies=len(movies),
        n_prompts=len(prompts),
        n_sentences=n_sentences,
    )


def _liked(simulator: LikeSimulator, users: np.ndarray, sentences: Sequence[str]) -> np.ndarray:
    """Return P(like) (n_users, n_sentences)."""
    distinct, inverse = np.unique(list(sentences), return_inverse=True)
    states = simulator.encode([str(text) for text in distinct])
    pairs = simulator.probability(np.repeat(users, len(states), axis=0), np.tile(states, (len(users), 1)))
    return np.asarray(pairs.reshape(len(users), len(states))[:, inverse])


def _policy_values(chosen_on: np.ndarray, scored_on: np.ndarray) -> np.ndarray:
    """Return values of uniform, best single, best per movie, per user, and per both, chosen on one array (U, M, A)."""
    single = chosen_on.mean(axis=(0, 1)).argmax()
    per_movie = chosen_on.mean(axis=0).argmax(axis=1)
    per_user = chosen_on.mean(axis=1).argmax(axis=1)
    per_both = chosen_on.argmax(axis=2)
    return np.array(
        [
            scored_on.mean(),
            scored_on[:, :, single].mean(),
            np.take_along_axis(scored_on.mean(axis=0), per_movie[:, None], axis=1).mean(),
            np.take_along_axis(scored_on.mean(axis=1), per_user[:, None], axis=1).mean(),
            np.take_along_axis(scored_on, per_both[:, :, None], axis=2).mean(),
        ]
    )


def _components(means: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return prompt, user x prompt, movie x prompt and three-way effects of (U, M, A) means, each broadcast to full."""
    overall = means.mean()
    prompt = means.mean(axis=(0, 1)) - overall
    user = means.mean(axis=(1, 2)) - overall
    movie = means.mean(axis=(0, 2)) - overall
    user_prompt = means.mean(axis=1) - overall - user[:, None] - prompt[None]
    movie_prompt = means.mean(axis=0) - overall - movie[:, None] - prompt[None]
    # What depends on the prompt at all, less the three effects above.
    three = means - means.mean(axis=2, keepdims=True) - prompt - user_prompt[:, None] - movie_prompt[None]
    return prompt, user_prompt, movie_prompt, three
