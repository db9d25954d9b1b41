"""Readers of raw MovieLens files, whatever their release, into one shape.

Files are told apart by what is in them, not by their names:

=====================  =================================================================
CSV                    latest, 20M, 25M, 32M: ``userId,movieId,rating,timestamp`` and the like
double colon           1M, 10M: ``1::1193::5::978300760``
tab and bar            100K: ``196<tab>242<tab>3<tab>881250949`` and ``1|Toy Story (1995)|...``
RecBole atomic         ``user_id:token<tab>item_id:token<tab>rating:float`` and the like
=====================  =================================================================

Where a folder holds several tables of one kind (100K brings splits of its ratings), the largest counts.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from offprompts_env.errors import DataError

Table = Literal["ratings", "items", "tags"]

_EXPECTED = (
    "expected a folder with MovieLens ratings and movies in one of these formats: CSV (latest, 20M, 25M), '::' (1M, "
    "10M), "
    "tab and '|' (100K), or RecBole atomic files (.inter, .item)"
)
_CSV_TABLES: dict[tuple[str, ...], Table] = {
    ("userId", "movieId", "rating"): "ratings",
    ("movieId", "title", "genres"): "items",
    ("userId", "movieId", "tag"): "tags",
}
# The order of the genre flags in u.item of MovieLens-100K.
_GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
_HEAD_BYTES = 65536


@dataclass(frozen=True)
class RawMovieLens:
    """Raw MovieLens in one shape.

    ``ratings``: user int32, item int32, rating float32, one row per (user, item).
    ``items``: item int32, title str (as MovieLens writes it), genres (tuple of str), year float (NaN where only the
    title says it). ``tags``: user int32, item int32, tag str; None where the release has no tags.
    """

    ratings: pd.DataFrame
    items: pd.DataFrame
    tags: pd.DataFrame | None


@dataclass(frozen=True)
class _Source:
    path: Path
    table: Table
    read: Callable[[Path], pd.DataFrame]


def read_movielens(folder: str | Path) -> RawMovieLens:
    """Read the MovieLens release in `folder`.

    Ratings of 10M size take seconds and below 1 GiB. Raises `DataError` where the folder does not hold ratings and
    movies in a known format, or where a table holds impossible values.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{_EXPECTED}, but {folder} is not a folder; unpack the archive and pass the folder")
    sources: dict[Table, _Source] = {}
    seen: list[str] = []
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        seen.append(path.name)
        source = _detect(path)
        if source and (source.table not in sources or path.stat().st_size > sources[source.table].path.stat().st_size):
            sources[source.table] = source
    for table in ("ratings", "items"):
        if table not in sources:
            found = ", ".join(seen[:12]) or "nothing"
            raise DataError(f"{_EXPECTED}; no table of {table} was recognised in {folder}, which holds: {found}")
    ratings = _check_ratings(sources["ratings"])
    items = _read(sources["items"]).drop_duplicates("item").reset_index(drop=True)
    if not ratings["item"].isin(items["item"]).any():
        raise DataError(
            f"expected the movies rated in {sources['ratings'].path} to be listed in {sources['items'].path}, found "
            f"none "
            "of them there; are the two files of one release?"
        )
    tags = _read(sources["tags"]) if "tags" in sources else None
    return RawMovieLens(ratings=ratings, items=items, tags=tags)


def _detect(path: Path) -> _Source | None:
    """Recognise `path` by its first lines; None for anything that is not a table of interest."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if b"\0" in head:
        return None
    lines = head.decode("utf-8", errors="replace").lstrip("\ufeff").splitlines()
    first = lines[0] if lines else ""
    columns = first.split("\t")
    if all(re.fullmatch(r"\w+:(token|token_seq|float|float_seq)", column) for column in columns):
        return _detect_atomic(path, [column.split(":")[0] for column in columns])
    header = [column.strip().strip('"') for column in first.split(",")]
    for needed, table in _CSV_TABLES.items():
        if set(needed) <= set(header):
            return _Source(path, table, _CSV_READERS[table])
    colons = first.split("::")
    if len(colons) >= 4 and _numeric([*colons[:2], colons[-1]]):
        # A tag can be a number too, but not many in a row.
        if all(_numeric(line.split("::")) and line.count("::") == 3 for line in lines[:20]):
            return _Source(path, "ratings", _double_colon_ratings)
        return _Source(path, "tags", _double_colon_tags)
    if len(colons) == 3 and _numeric(colons[:1]) and not _numeric(colons[1:2]):
        return _Source(path, "items", _double_colon_items)
    if len(columns) == 4 and _numeric(columns):
        return _Source(path, "ratings", _tab_ratings)
    bars = first.split("|")
    if len(bars) == 5 + len(_GENRES_100K) and _numeric(bars[:1]) and set(bars[5:]) <= {"0", "1"}:
        return _Source(path, "items", _bar_items)
    return None


def _numeric(fields: list[str]) -> bool:
    return all(re.fullmatch(r"\d+(\.\d+)?", field.strip()) for field in fields)


def _read(source: _Source) -> pd.DataFrame:
    """Run the reader, and turn what pandas says about bad content into a `DataError` that names the file."""
    try:
        return source.read(source.path)
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise DataError(
            f"{source.path} begins like a MovieLens table of {source.table}, but cannot be read as one: {error}; "
            "download or unpack it again"
        ) from error


def _check_ratings(source: _Source) -> pd.DataFrame:
    table = _read(source)
    bad = ~table["rating"].between(0.5, 5.0)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise DataError(
            f"{source.path}: expected ratings from 0.5 to 5, got {table['rating'].iloc[row]} in rating {row + 1} "
            f"({int(bad.sum())} such); is the file of another data set?"
        )
    return table.drop_duplicates(["user", "item"], keep="last", ignore_index=True)


_RATING_TYPES = {"user": "int32", "item": "int32", "rating": "float32"}


def _csv_ratings(path: Path) -> pd.DataFrame:
    names = {"userId": "user", "movieId": "item", "rating": "rating"}
    types = {raw: _RATING_TYPES[name] for raw, name in names.items()}
    return pd.read_csv(path, usecols=list(names), dtype=types, engine="c").rename(columns=names)[list(names.values())]


def _csv_items(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path, usecols=["movieId", "title", "genres"], dtype={"movieId": "int32"}, engine="c")
    return _items(table["movieId"].tolist(), table["title"].astype(str).tolist(), table["genres"].tolist(), "|")


def _csv_tags(path: Path) -> pd.DataFrame:
    types = {"userId": "int32", "movieId": "int32"}
    table = pd.read_csv(path, usecols=["userId", "movieId", "tag"], dtype=types, engine="c").dropna()
    table.columns = pd.Index(["user", "item", "tag"])
    return table.astype({"tag": str}).reset_index(drop=True)


_CSV_READERS: dict[Table, Callable[[Path], pd.DataFrame]] = {
    "ratings": _csv_ratings,
    "items": _csv_items,
    "tags": _csv_tags,
}


def _double_colon_ratings(path: Path) -> pd.DataFrame:
    # With one ":" as separator, "1::1193::5::978300760" has its values in every other column, and the fast C engine
    # applies; the two-character separator would need the slow Python engine.
    return pd.read_csv(path, sep=":", header=None, usecols=[0, 2, 4], engine="c", names=[
        "user", "_1", "item", "_2", "rating", "_3", "_4"
    ], dtype=_RATING_TYPES)  # fmt: skip


def _double_colon_items(path: Path) -> pd.DataFrame:
    rows = [line.split("::") for line in _text(path).splitlines() if line]
    return _items([row[0] for row in rows], ["::".join(row[1:-1]) for row in rows], [row[-1] for row in rows], "|")


def _double_colon_tags(path: Path) -> pd.DataFrame:
    rows = [line.split("::") for line in _text(path).splitlines() if line]
    table = pd.DataFrame(
        {
            "user": [row[0] for row in rows],
            "item": [row[1] for row in rows],
            "tag": ["::".join(row[2:-1]) for row in rows],
        }
    )
    return table.astype({"user": "int32", "item": "int32"})


def _tab_ratings(path: Path) -> pd.DataFrame:
    return pd.read_csv(
        path,
        sep="\t",
        header=None,
        usecols=[0, 1, 2],
        names=["user", "item", "rating"],
        dtype=_RATING_TYPES,
        engine="c",
    )


def _bar_items(path: Path) -> pd.DataFrame:
    rows = [line.split("|") for line in _text(path).splitlines() if line]
    genres = ["|".join(name for name, flag in zip(_GENRES_100K, row[5:], strict=True) if flag == "1") for row in rows]
    years = [re.search(r"(\d{4})$", row[2]) for row in rows]
    return _items([row[0] for row in rows], [row[1] for row in rows], genres, "|", [y and y[1] for y in years])


def _detect_atomic(path: Path, columns: list[str]) -> _Source | None:
    if {"user_id", "item_id", "rating"} <= set(columns):
        return _Source(path, "ratings", _atomic_ratings)
    if "item_id" in columns and "user_id" not in columns:
        return _Source(path, "items", _atomic_items)
    return None


def _atomic_ratings(path: Path) -> pd.DataFrame:
    names = {"user_id": "user", "item_id": "item", "rating": "rating"}
    header = pd.read_csv(path, sep="\t", nrows=0).columns
    wanted = {column: names[column.split(":")[0]] for column in header if column.split(":")[0] in names}
    types = {column: _RATING_TYPES[name] for column, name in wanted.items()}
    table = pd.read_csv(path, sep="\t", usecols=list(wanted), dtype=types, engine="c")
    return table.rename(columns=wanted)[list(names.values())]


def _atomic_items(path: Path) -> pd.DataFrame:
    table = pd.read_csv(io.StringIO(_text(path)), sep="\t", dtype=str, keep_default_na=False, quoting=3)
    table.columns = pd.Index([column.split(":")[0] for column in table.columns])
    title = next((name for name in ("movie_title", "title", "name") if name in table.columns), None)
    genres = next((name for name in ("class", "genre", "genres") if name in table.columns), None)
    if title is None or genres is None:
        raise KeyError(f"no title and genre columns among {', '.join(map(str, table.columns))}")
    years = table["release_year"].tolist() if "release_year" in table.columns else None
    return _items(table["item_id"].tolist(), table[title].tolist(), table[genres].tolist(), " ", years)


def _items(
    ids: list[str] | list[int],
    titles: list[str],
    genres: list[str],
    separator: str,
    years: list[str | None] | None = None,
) -> pd.DataFrame:
    """Make the item table from columns; `genres` are joined by `separator`."""
    table = pd.DataFrame({"item": ids, "title": titles}).astype({"item": "int32"})
    table["genres"] = [tuple(name for name in str(names).strip().split(separator) if name) for names in genres]
    table["year"] = pd.to_numeric(pd.Series(years if years is not None else [None] * len(ids)), errors="coerce").astype(
        "float64"
    )
    return table


def _text(path: Path) -> str:
    """Read `path` as UTF-8, or as Latin-1, in which 100K and 1M were published."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")
