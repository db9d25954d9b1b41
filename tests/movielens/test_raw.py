"""Raw MovieLens files: every published format gives the same tables; anything else is refused with a remedy."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from offprompts_env.errors import DataError
from offprompts_env.movielens.pipeline.data import split_title
from offprompts_env.movielens.raw import read_movielens
from tests.tiny_movielens import FORMATS, made_up, write_csv, write_double_colon, write_tab


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_tables(name: str, tmp_path: Path) -> None:
    ratings, movies = made_up()
    FORMATS[name](tmp_path, ratings, movies)
    raw = read_movielens(tmp_path)
    assert list(raw.ratings.itertuples(index=False, name=None)) == ratings
    assert raw.ratings.dtypes.astype(str).tolist() == ["int32", "int32", "float32"]
    assert list(zip(raw.items["item"], raw.items["title"], raw.items["genres"], strict=True)) == movies
    assert (raw.tags is not None) == (name == "csv")


@pytest.mark.parametrize("name", FORMATS)
def test_detection_is_by_content_not_by_name(name: str, tmp_path: Path) -> None:
    ratings, movies = made_up()
    FORMATS[name](tmp_path, ratings, movies)
    for number, path in enumerate(sorted(tmp_path.iterdir())):
        path.rename(tmp_path / f"file{9 - number}")
    raw = read_movielens(tmp_path)
    assert len(raw.ratings) == len(ratings)
    assert raw.items["title"].tolist() == [title for _, title, _ in movies]


def test_tags_keep_commas_and_colons(tmp_path: Path) -> None:
    ratings, movies = made_up()
    write_csv(tmp_path, ratings, movies)
    tags = read_movielens(tmp_path).tags
    assert tags is not None
    assert set(tags["tag"]) == {"Surreal", "boxing", "x, y"}
    other = tmp_path / "10m"
    other.mkdir()
    write_double_colon(other, ratings, movies)
    (other / "tags.dat").write_text("15::4::what::ever::1215184630\n15::5::1984::1215184630\n")
    tags = read_movielens(other).tags
    assert tags is not None
    assert tags["tag"].tolist() == ["what::ever", "1984"]


def test_quoted_titles_with_commas_and_repeated_ratings(tmp_path: Path) -> None:
    (tmp_path / "movies.csv").write_text('movieId,title,genres\n7,"Matrix, The (1999)",Action|Sci-Fi\n')
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,7,2.0,5\n1,7,4.5,6\n")
    raw = read_movielens(tmp_path)
    assert raw.items["title"].tolist() == ["Matrix, The (1999)"]
    assert raw.ratings["rating"].tolist() == [4.5]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("ratings.csv", "userId,movieId,rating,timestamp\n1,2,9.0,3\n", r"from 0\.5 to 5, got 9\.0 in rating 1"),
        ("ratings.csv", "userId,movieId,rating,timestamp\n1,2,nan,3\n", "from 0.5 to 5, got nan"),
        ("ratings.csv", "userId,movieId,rating,timestamp\n1,2,five,3\n", "cannot be read as one"),
        ("ratings.csv", "userId,movieId,rating,timestamp\n9999999999,2,3.0,3\n", "cannot be read as one"),
        ("ratings.csv", "userId,movieId,rating,timestamp\n1,999,3.0,3\n", "found none of them there"),
        ("ratings.csv", "user;movie;stars\n1;2;3\n", "no table of ratings was recognised"),
        ("ratings.csv", "", "no table of ratings was recognised"),
        ("movies.csv", "title\nToy Story\n", "no table of items was recognised"),
    ],
)
def test_bad_files_are_refused_by_name(file: str, content: str, message: str, tmp_path: Path) -> None:
    write_csv(tmp_path, *made_up())
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read_movielens(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_folder_and_an_archive_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        read_movielens(tmp_path / "nowhere")
    (tmp_path / "ml.zip").write_bytes(b"PK\x03\x04\0\0")
    with pytest.raises(DataError, match=r"no table of ratings .* ml\.zip"):
        read_movielens(tmp_path)


def test_of_several_rating_tables_the_largest_counts(tmp_path: Path) -> None:
    ratings, movies = made_up()
    write_tab(tmp_path, ratings, movies)
    assert (tmp_path / "u1.test").is_file()
    assert len(read_movielens(tmp_path).ratings) == len(ratings)


def test_a_million_double_colon_ratings_take_seconds(tmp_path: Path) -> None:
    # The Python engine of pandas needs some 10 s and 1 GiB for a million of these; 10M size must fit in two minutes.
    write_double_colon(tmp_path, *made_up())
    rng = np.random.default_rng(0)
    users, items = rng.integers(1, 70_000, 1_000_000), rng.integers(1, 31, 1_000_000)
    rows = [f"{u}::{i}::3.5::838985046" for u, i in zip(users.tolist(), items.tolist(), strict=True)]
    (tmp_path / "ratings.dat").write_text("\n".join(rows))
    start = time.perf_counter()
    raw = read_movielens(tmp_path)
    assert time.perf_counter() - start < 8
    assert len(raw.ratings) == len(set(zip(users.tolist(), items.tolist(), strict=True)))
    assert raw.ratings.memory_usage(deep=True).sum() < 20 * len(raw.ratings)


@pytest.mark.parametrize(
    ("raw", "title", "year"),
    [
        ("Matrix, The (1999)", "The Matrix (1999)", 1999),
        ("City of God (Cidade de Deus) (2002)", "City of God (2002)", 2002),
        ("Beautiful Mind, A (2001) ", "A Beautiful Mind (2001)", 2001),
        ("Avventura, L' (Adventure, The) (1960)", "L'Avventura (1960)", 1960),
        ("Me, Myself & Irene (2000)", "Me, Myself & Irene (2000)", 2000),
        ("Unnamed", "Unnamed", None),
    ],
)
def test_titles(raw: str, title: str, year: int | None) -> None:
    assert split_title(raw) == (title, year)
