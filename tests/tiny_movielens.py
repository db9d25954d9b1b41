"""A made-up MovieLens of a few dozen users, in every format in which MovieLens was published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

GENRES = ("Action", "Comedy", "Drama", "Horror", "Romance", "Sci-Fi")
GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip

Rating = tuple[int, int, int]
Movie = tuple[int, str, tuple[str, ...]]


def made_up(n_users: int = 40, n_movies: int = 30, seed: int = 0) -> tuple[list[Rating], list[Movie]]:
    """Return (user, movie, rating) rows and (movie, title, genres) rows; each user likes some genres only."""
    rng = np.random.default_rng(seed)
    movies: list[Movie] = []
    for number in range(1, n_movies + 1):
        genres = tuple(sorted(rng.choice(GENRES, size=int(rng.integers(1, 4)), replace=False).tolist()))
        title = f"Tale, The: Part {number}" if number % 5 else f"Été à Paris {number}"
        movies.append((number, f"{title} ({1940 + 10 * (number % 8)})", genres))
    ratings: list[Rating] = []
    for user in range(1, n_users + 1):
        taste = dict(zip(GENRES, rng.normal(size=len(GENRES)), strict=True))
        for number, _, genres in movies:
            if rng.random() < 0.9:
                score = np.mean([taste[genre] for genre in genres]) + 0.3 * rng.normal()
                ratings.append((user, number, 5 if score > 0.2 else 4 if score > 0.0 else 2))
    return ratings, movies


def write_csv(folder: Path, ratings: list[Rating], movies: list[Movie]) -> None:
    """Write the layout of latest, 20M and 25M."""
    _write(folder / "ratings.csv", ["userId,movieId,rating,timestamp", *(f"{u},{i},{r}.0,9" for u, i, r in ratings)])
    rows = [f'{i},"{title}",{"|".join(genres)}' for i, title, genres in movies]
    _write(folder / "movies.csv", ["movieId,title,genres", *rows])
    tags = [
        f'{u},{i},"{tag}",9' for (u, i, _), tag in zip(ratings[::40], ["Surreal", "boxing", "x, y"] * 99, strict=False)
    ]
    _write(folder / "tags.csv", ["userId,movieId,tag,timestamp", *tags])
    _write(folder / "links.csv", ["movieId,imdbId,tmdbId", "1,0114709,862"])


def write_double_colon(folder: Path, ratings: list[Rating], movies: list[Movie]) -> None:
    """Write the layout of 1M and 10M (1M in Latin-1)."""
    _write(folder / "ratings.dat", [f"{u}::{i}::{r}::9" for u, i, r in ratings])
    _write(folder / "movies.dat", [f"{i}::{title}::{'|'.join(genres)}" for i, title, genres in movies], "latin-1")
    _write(folder / "users.dat", ["1::F::1::10::48067", "2::M::56::16::70072"])


def write_tab(folder: Path, ratings: list[Rating], movies: list[Movie]) -> None:
    """Write the layout of 100K, with one of its splits, which must not be taken for the whole."""
    _write(folder / "u.data", [f"{u}\t{i}\t{r}\t9" for u, i, r in ratings])
    _write(folder / "u1.test", [f"{u}\t{i}\t{r}\t9" for u, i, r in ratings[:50]])
    rows = [
        "|".join([str(i), title, "01-Jan-1995", "", "http://x", *("01"[g in genres] for g in GENRES_100K)])
        for i, title, genres in movies
    ]
    _write(folder / "u.item", rows, "latin-1")
    _write(folder / "u.user", ["1|24|M|technician|85711"])


def write_atomic(folder: Path, ratings: list[Rating], movies: list[Movie]) -> None:
    """Write the layout of RecBole's atomic files."""
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    _write(folder / "ml.inter", [header, *(f"{u}\t{i}\t{r}\t9" for u, i, r in ratings)])
    rows = [f"{i}\t{title}\t1995\t{' '.join(genres)}" for i, title, genres in movies]
    _write(folder / "ml.item", ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq", *rows])
    _write(folder / "ml.user", ["user_id:token\tage:token", "1\t24"])


FORMATS: dict[str, Callable[[Path, list[Rating], list[Movie]], None]] = {
    "csv": write_csv,
    "double colon": write_double_colon,
    "tab": write_tab,
    "atomic": write_atomic,
}


def _write(path: Path, lines: list[str], encoding: str = "utf-8") -> None:
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
