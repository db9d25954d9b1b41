"""The grammar of the small language model's sentences: facts about a movie (and a keyword) -> a sentence, and back.

A sentence is a concatenation of *pieces*; each piece is one token of the small model, so that prompts and sentences
stay short and a keyword is the same token wherever it stands::

    sentence  = opener [adjective] genres head [era] [theme] [tag] [hint] reception "."
    opener    = "A famous" | ...                       how widely the movie was seen (3 levels)
    genres    = genre {"," genre} [" and" genre]        the emphasised genre first, at most three
    theme     = (" full of" | ...) noun                 a noun of the emphasised genre, or the keyword
    tag       = " touching on" noun                     something MovieLens users tagged the movie with
    hint      = " with a hint of" noun | " in a somewhat" adjective " way"
    reception = ", loved by nearly everyone" | ...      how it was received (4 levels)

`describe` draws a sentence, `parse` reads one back and refuses everything else: a sentence is *malformed* when `parse`
returns None. Openers are never lexicon words, so that a keyword has one spelling only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from offprompts_env.movielens.lexicon import ERAS, GENRE_NAMES, TAG_GROUP, Keyword, Kind, lexicon

#: Openers by how widely the movie was seen: rarely, somewhat, widely.
OPENERS: tuple[tuple[str, ...], ...] = (
    ("A little-known", "An overlooked"),
    ("A familiar", "A fairly well-known"),
    ("A famous", "A hugely popular"),
)
HEADS: tuple[str, ...] = (" film", " movie", " picture")
THEME_LINKS: tuple[str, ...] = (" full of", " about", " with plenty of", " built on")
TAG_LINK = " touching on"
NOUN_HINT = " with a hint of"
ADJECTIVE_HINT = (" in a somewhat", " way")
#: Closings by how the movie was received: badly, mixed, well, very well.
RECEPTIONS: tuple[tuple[str, ...], ...] = (
    (", disliked by many", ", and a letdown for most"),
    (", with a mixed reception", ", and people disagree about it"),
    (", liked by most", ", and well received"),
    (", loved by nearly everyone", ", and held in the highest regard"),
)
MAX_GENRES = 3


@dataclass(frozen=True)
class Movie:
    """What a sentence may say about one movie.

    ``genres`` are MovieLens genres (keys of `GENRE_NAMES`), ``era`` a key of `ERAS`, ``popularity`` an index into
    `OPENERS`, ``reception`` one into `RECEPTIONS`, ``tags`` texts of tag keywords.
    """

    title: str
    genres: tuple[str, ...]
    era: str
    popularity: int
    reception: int
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """What one sentence says; the inverse of `describe`."""

    genres: tuple[str, ...]
    era: str | None
    popularity: int
    reception: int
    keywords: tuple[str, ...]


def era_piece(era: str) -> str:
    """Return the piece that names `era`, such as ``" from the nineties"``."""
    return f" from {ERAS[era][2]}"


def era_of(year: int) -> str:
    """Return the era of `year`."""
    return next(name for name, (first, last, _) in ERAS.items() if first <= year <= last)


@cache
def _words() -> dict[tuple[str, str], tuple[str, ...]]:
    """Return (group, kind) -> keyword pieces."""
    table: dict[tuple[str, str], list[str]] = {}
    for word in lexicon():
        table.setdefault((word.group, word.kind), []).append(f" {word.text}")
    return {key: tuple(words) for key, words in table.items()}


@cache
def _kinds() -> dict[str, str]:
    return {word.text: word.kind for word in lexicon()}


@cache
def pieces() -> tuple[str, ...]:
    """All pieces of all sentences, keywords included; the small model makes each of them one token."""
    fixed = [piece for level in OPENERS for piece in level] + [f" {name}" for name in GENRE_NAMES.values()]
    fixed += [",", " and", ".", *HEADS, *map(era_piece, ERAS), *THEME_LINKS, TAG_LINK, NOUN_HINT, *ADJECTIVE_HINT]
    fixed += [piece for level in RECEPTIONS for piece in level]
    return tuple(dict.fromkeys([*fixed, *(f" {word.text}" for word in lexicon())]))


def is_compatible(keyword: Keyword, movie: Movie) -> bool:
    """Say whether `keyword` suits `movie`: its genre, its era, or one of its tags."""
    if keyword.group == TAG_GROUP:
        return keyword.text in movie.tags
    return keyword.group in movie.genres or keyword.group == movie.era


def describe(movie: Movie, keyword: Keyword | None, rng: np.random.Generator) -> list[str]:
    """Draw the pieces of one sentence about `movie`; their concatenation is the sentence.

    Without a keyword the sentence names all genres (a random three of them if there are more) in random order, the
    first with an adjective and a noun of its own, usually the era, and half of the time a hint of the last genre. A
    compatible keyword stands literally in its slot, and a genre keyword makes its genre the only one that is named. A
    keyword that does not suit the movie only adds a hint, so that it moves the sentence less.
    """
    compatible = keyword is not None and is_compatible(keyword, movie)
    emphasised = keyword is not None and compatible and keyword.group in movie.genres
    if keyword is not None and emphasised:
        genres = [keyword.group]
    else:
        genres = [movie.genres[i] for i in rng.permutation(len(movie.genres))[:MAX_GENRES]]
    draw = rng.random(3)
    words = _words()

    adjective = _pick(words[genres[0], "adjective"], rng) if draw[0] < 0.6 else None
    noun = _pick(words[genres[0], "noun"], rng)
    tag_nouns = [tag for tag in movie.tags if _kinds()[tag] == "noun"]
    tag = f" {_pick(tag_nouns, rng)}" if tag_nouns and draw[1] < 0.4 and not emphasised else None
    era = draw[2] < (0.5 if emphasised else 0.9)
    if not compatible:
        tag_adjectives = [f" {tag}" for tag in movie.tags if _kinds()[tag] == "adjective"]
        if tag_adjectives and rng.random() < 0.4:
            adjective = _pick(tag_adjectives, rng)
    hint: list[str] = []
    if keyword is None and rng.random() < 0.5:
        kind: Kind = "noun" if rng.random() < 0.5 else "adjective"
        hint = _hint(_pick(words[genres[-1], kind], rng), kind)
    if keyword is not None:
        word = f" {keyword.text}"
        if not compatible:
            hint = _hint(word, keyword.kind)
        elif keyword.kind == "adjective":
            adjective = word
        elif keyword.group == TAG_GROUP:
            tag = word
        else:
            noun = word
        era = era or (compatible and keyword.group == movie.era)

    sentence = [_pick(OPENERS[movie.popularity], rng)]
    sentence += [adjective] if adjective else []
    for i, genre in enumerate(genres):
        if i:
            sentence.append(" and" if i == len(genres) - 1 else ",")
        sentence.append(f" {GENRE_NAMES[genre]}")
    sentence.append(_pick(HEADS, rng))
    sentence += [era_piece(movie.era)] if era else []
    sentence += [_pick(THEME_LINKS, rng), noun]
    sentence += [TAG_LINK, tag] if tag else []
    return [*sentence, *hint, _pick(RECEPTIONS[movie.reception], rng), "."]


def _hint(word: str, kind: Kind) -> list[str]:
    return [NOUN_HINT, word] if kind == "noun" else [ADJECTIVE_HINT[0], word, ADJECTIVE_HINT[1]]


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _any(options: Sequence[str]) -> str:
    return "(?:" + "|".join(re.escape(option) for option in sorted(options, key=len, reverse=True)) + ")"


@cache
def _pattern() -> re.Pattern[str]:
    words = _words()
    adjectives = _any([word for (_, kind), group in words.items() if kind == "adjective" for word in group])
    nouns = _any([word for (_, kind), group in words.items() if kind == "noun" for word in group])
    genre = _any([f" {name}" for name in GENRE_NAMES.values()])
    return re.compile(
        f"(?P<opener>{_any([piece for level in OPENERS for piece in level])})"
        f"(?P<adjective>{adjectives})?"
        f"(?P<genres>{genre}(?:,{genre})*(?: and{genre})?)"
        f"{_any(HEADS)}(?P<era>{_any([era_piece(era) for era in ERAS])})?"
        f"{_any(THEME_LINKS)}(?P<noun>{nouns})"
        f"(?:{TAG_LINK}(?P<tag>{nouns}))?"
        f"(?:{NOUN_HINT}(?P<hint>{nouns})|{ADJECTIVE_HINT[0]}(?P<way>{adjectives}){ADJECTIVE_HINT[1]})?"
        f"(?P<reception>{_any([piece for level in RECEPTIONS for piece in level])})\\."
    )


@cache
def _readings() -> tuple[dict[str, str], dict[str, str], dict[str, int], dict[str, int]]:
    return (
        {name: genre for genre, name in GENRE_NAMES.items()},
        {era_piece(era): era for era in ERAS},
        {piece: level for level, options in enumerate(OPENERS) for piece in options},
        {piece: level for level, options in enumerate(RECEPTIONS) for piece in options},
    )


def parse(sentence: str) -> Facts | None:
    """Read the facts back from `sentence` (surrounding blanks are ignored), or return None if it is malformed.

    Strict: the whole sentence must follow the grammar above, piece by piece, and name no genre twice and at most three.
    """
    match = _pattern().fullmatch(sentence.strip())
    if match is None:
        return None
    genre_of, era_named, popularity_of, reception_of = _readings()
    genres = tuple(genre_of[name] for name in re.split(r", | and ", match["genres"].strip()))
    if len(set(genres)) < len(genres) or len(genres) > MAX_GENRES:
        return None
    keywords = (match[name] for name in ("adjective", "noun", "tag", "hint", "way"))
    return Facts(
        genres=genres,
        era=era_named[match["era"]] if match["era"] else None,
        popularity=popularity_of[match["opener"]],
        reception=reception_of[match["reception"]],
        keywords=tuple(word.strip() for word in keywords if word),
    )
