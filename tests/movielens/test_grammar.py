"""The grammar: what it says is true, keywords stand where they should, and the parser refuses everything else."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from offprompts_env.movielens.grammar import MAX_GENRES, Movie, describe, era_of, is_compatible, parse, pieces
from offprompts_env.movielens.lexicon import ERAS, GENRE_NAMES, GENRES, TAG_GROUP, Keyword, lexicon

SPACE = Movie(
    "Space Fright (1984)", ("Horror", "Sci-Fi"), "1980s", popularity=0, reception=3, tags=("surreal", "boxing")
)
WORDS = {word.text: word for word in lexicon()}


def told(movie: Movie, keyword: Keyword | None, n: int = 200) -> list[str]:
    rng = np.random.default_rng(0)
    return ["".join(describe(movie, keyword, rng)) for _ in range(n)]


def some_movie(rng: np.random.Generator) -> Movie:
    genres = tuple(rng.choice(GENRES, size=int(rng.integers(1, 7)), replace=False).tolist())
    tags = [word.text for word in lexicon() if word.group == TAG_GROUP]
    chosen = tuple(sorted(rng.choice(tags, size=int(rng.integers(0, 3)), replace=False).tolist()))
    era = str(rng.choice(list(ERAS)))
    return Movie("Any (2000)", genres, era, int(rng.integers(3)), int(rng.integers(4)), chosen)


def test_lexicon_has_about_a_thousand_distinct_words_in_balance() -> None:
    words = lexicon()
    assert len({word.text for word in words}) == len(words)
    assert 950 <= len(words) <= 1100
    counts = Counter((word.group, word.kind) for word in words)
    assert {counts[genre, "adjective"] for genre in GENRES} == {20}
    assert {counts[genre, "noun"] for genre in GENRES} == {32}
    assert all(counts[era, "adjective"] >= 5 for era in ERAS)
    assert all(word.text == word.text.strip() and "  " not in word.text for word in words)


@pytest.mark.parametrize(
    ("year", "era"), [(1921, "1940s"), (1949, "1940s"), (1950, "1950s"), (1999, "1990s"), (2024, "2010s")]
)
def test_eras_cover_all_years(year: int, era: str) -> None:
    assert era_of(year) == era


def test_parse_inverts_describe_on_random_movies_and_keywords() -> None:
    rng = np.random.default_rng(1)
    words = lexicon()
    for _ in range(3000):
        movie = some_movie(rng)
        keyword = words[rng.integers(len(words))] if rng.random() < 0.7 else None
        said = describe(movie, keyword, rng)
        facts = parse("".join(said))
        assert facts is not None, said
        assert set(facts.genres) <= set(movie.genres)
        assert facts.era in (None, movie.era)
        assert (facts.popularity, facts.reception) == (movie.popularity, movie.reception)
        if keyword is None:
            assert len(facts.genres) == min(MAX_GENRES, len(movie.genres))
        else:
            assert keyword.text in facts.keywords


def test_every_piece_of_a_sentence_is_a_declared_piece() -> None:
    rng = np.random.default_rng(2)
    known = set(pieces())
    words = lexicon()
    for index in range(2000):
        assert set(describe(some_movie(rng), words[index % len(words)], rng)) <= known


def test_sentences_begin_with_no_lexicon_word() -> None:
    starts = {text.split()[0] for text in told(SPACE, None)}
    assert starts <= {"A", "An"}


@pytest.mark.parametrize("text", ["haunted houses", "eerie"])
def test_a_suitable_genre_keyword_is_literal_and_alone_names_the_genre(text: str) -> None:
    for sentence in told(SPACE, WORDS[text]):
        facts = parse(sentence)
        assert facts is not None
        assert text in facts.keywords
        assert facts.genres == ("Horror",)


@pytest.mark.parametrize("text", ["cowboys", "dusty", "disco-era", "chess"])
def test_an_unsuitable_keyword_is_a_hint_and_changes_no_fact(text: str) -> None:
    assert not is_compatible(WORDS[text], SPACE)
    for sentence in told(SPACE, WORDS[text]):
        facts = parse(sentence)
        assert facts is not None
        assert text in facts.keywords
        assert f"hint of {text}" in sentence or f"in a somewhat {text} way" in sentence
        assert set(facts.genres) == {"Horror", "Sci-Fi"}


def test_era_and_tag_keywords_suit_by_era_and_tag() -> None:
    assert is_compatible(WORDS["arcade-era"], SPACE)
    assert is_compatible(WORDS["boxing"], SPACE)
    assert not is_compatible(WORDS["samurai"], SPACE)
    assert all("arcade-era" in text and "from the eighties" in text for text in told(SPACE, WORDS["arcade-era"]))
    assert all("touching on boxing" in text for text in told(SPACE, WORDS["boxing"]))


def test_sentences_vary() -> None:
    assert len(set(told(SPACE, None))) > 190
    assert len(set(told(SPACE, WORDS["ghosts"]))) > 100


GOOD = "A little-known eerie horror and sci-fi film from the eighties full of ghosts, loved by nearly everyone."


def test_the_parser_reads_an_example() -> None:
    facts = parse(f"  {GOOD}\n")
    assert facts is not None
    assert facts.genres == ("Horror", "Sci-Fi")
    assert facts.era == "1980s"
    assert facts.keywords == ("eerie", "ghosts")
    assert (facts.popularity, facts.reception) == (0, 3)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("A little-known", "A little known"),
        ("A little-known ", ""),
        (" eerie", " eeriest"),
        (" eerie", " eerie eerie"),
        (" horror and sci-fi", " ghosts and sci-fi"),
        (" horror and sci-fi", " horror and horror"),
        (" horror and sci-fi", " horror sci-fi"),
        (" horror and sci-fi", " horror, sci-fi, drama and war"),
        (" film", ""),
        ("the eighties", "eighties"),
        (" full of ghosts", ""),
        ("ghosts", "ghost"),
        ("ghosts", "eerie"),
        (", loved by nearly everyone", ""),
        (", loved by nearly everyone", ", loved by nearly everyone, liked by most"),
        ("everyone.", "everyone"),
        ("everyone.", "everyone. A"),
    ],
)
def test_the_parser_refuses_what_is_not_in_the_grammar(old: str, new: str) -> None:
    assert old in GOOD
    assert parse(GOOD.replace(old, new)) is None


def test_genre_names_are_distinct_pieces() -> None:
    assert len(set(GENRE_NAMES.values())) == len(GENRES)
    assert not set(GENRE_NAMES.values()) & set(WORDS)
