"""A domain's CSV files, read and checked: items, reactions and prompts.

Ids are text throughout ("00007" is not 7); positions in the order of the files take their place, and the originals are
kept beside them.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from offprompts_env.errors import ConfigError, DataError
from offprompts_env.types import FloatArray, IntArray

_TEXT = ("text", "title", "name")
_FEATURES = ("features", "tags")
_OUTCOME = ("rating", "liked", "clicked")
_TRUTH = {"1": 1.0, "true": 1.0, "yes": 1.0, "1.0": 1.0, "0": 0.0, "false": 0.0, "no": 0.0, "0.0": 0.0}


@dataclass(frozen=True)
class ReactionRule:
    """Which interactions count as reactions.

    ``like``, ``dislike``: a rating >= `like` is a like, one <= `dislike` a dislike, and those between say something
    about a user's taste only. None: the upper and the lower third of all ratings. Of 0/1 columns 1 is a like and 0 a
    dislike. ``min_user``: likes and dislikes, of each, that a user must have.
    """

    like: float | None = None
    dislike: float | None = None
    min_user: int = 1


@dataclass(frozen=True, eq=False)
class DomainTables:
    """What the files say.

    Attributes:
        item_ids: as in the file, (n_items,).
        texts: of the items, what a prompt is asked about.
        features: of each item, possibly none.
        user_ids: as in the file, of users with enough reactions, (n_users,).
        users, items: positions, one an interaction, (n,).
        rating: (n,).
        verdict: 1 like, -1 dislike, 0 neither, (n,).
        prompts: the keywords.
        dropped_users: how many had too few reactions.
        like, dislike: the thresholds.
    """

    item_ids: tuple[str, ...]
    texts: tuple[str, ...]
    features: tuple[tuple[str, ...], ...]
    user_ids: tuple[str, ...]
    users: IntArray
    items: IntArray
    rating: FloatArray
    verdict: IntArray
    prompts: tuple[str, ...]
    dropped_users: int
    like: float
    dislike: float


def read_domain(items: str | Path, interactions: str | Path, keywords: str | Path, rule: ReactionRule) -> DomainTables:
    """Read the three files.

    Raises:
        DataError: a file cannot be read, or does not say what is needed; the message names file, row and remedy.
        ConfigError: thresholds that exclude each other.
    """
    item_ids, texts, features = _items(Path(items))
    place = {item: row for row, item in enumerate(item_ids)}
    path = Path(interactions)
    rows = _table(path)
    _need(path, rows[0], ("user_id", "item_id"))
    outcome = _one_of(path, rows[0], _OUTCOME)
    pairs = [(row["user_id"], row["item_id"]) for row in rows]
    for number, (user, item) in enumerate(pairs):
        if not user or item not in place:
            raise DataError(
                f"{path}, row {number + 2}: expected a user and an item of {items}, got {user!r} and {item!r}; "
                "add the item there, or remove the row"
            )
    if len(set(pairs)) < len(pairs):
        pair, count = Counter(pairs).most_common(1)[0]
        raise DataError(
            f"{path}: expected one row for each user and item, got {count} for {pair}; keep one, such as the last"
        )
    rating = np.array([_number(path, number, row[outcome], outcome) for number, row in enumerate(rows)])
    like, dislike = (1.0, 0.0) if outcome != "rating" else _thresholds(path, rating, rule)
    verdict = (rating >= like).astype(np.int64) - (rating <= dislike)
    if not (verdict > 0).any() or not (verdict < 0).any():
        what = "likes" if (verdict > 0).any() else "dislikes"
        raise DataError(
            f"{path}: expected likes and dislikes, got {what} only (column {outcome!r}); what was never shown is no "
            "dislike: log what users saw and passed over as 0, or use ratings"
        )
    names = tuple(dict.fromkeys(user for user, _ in pairs))
    number_of = {user: row for row, user in enumerate(names)}
    if len(names) < 2:
        raise DataError(f"{path}: expected two or more users, got {names[0]!r} only; is user_id the right column?")
    users = np.array([number_of[user] for user, _ in pairs])
    counts = [np.bincount(users[verdict == sign], minlength=len(names)) for sign in (1, -1)]
    enough = np.minimum(*counts) >= rule.min_user
    if enough.sum() < 2:
        raise DataError(
            f"{path}: expected two or more users with at least {rule.min_user} likes (>= {like:g}) and dislikes "
            f"(<= {dislike:g}) each, got {int(enough.sum())} of {len(names)}; lower min_user, move the thresholds, "
            "or collect more"
        )
    keep = enough[users]
    renamed = np.cumsum(enough) - 1
    return DomainTables(
        item_ids=item_ids,
        texts=texts,
        features=features,
        user_ids=tuple(name for name, kept in zip(names, enough, strict=True) if kept),
        users=renamed[users[keep]],
        items=np.array([place[item] for _, item in pairs])[keep],
        rating=rating[keep],
        verdict=verdict[keep],
        prompts=_keywords(Path(keywords)),
        dropped_users=int((~enough).sum()),
        like=float(like),
        dislike=float(dislike),
    )


def _items(path: Path) -> tuple[tuple[str, ...], tuple[str, ...], tuple[tuple[str, ...], ...]]:
    rows = _table(path)
    _need(path, rows[0], ("item_id",))
    text = _one_of(path, rows[0], _TEXT)
    features = next((name for name in _FEATURES if name in rows[0]), None)
    for column in ("item_id", text):
        for number, row in enumerate(rows):
            if not row[column]:
                raise DataError(f"{path}, row {number + 2}: expected {column}, got nothing; fill it in or remove it")
        value, count = Counter(row[column] for row in rows).most_common(1)[0]
        if count > 1:
            raise DataError(f"{path}: expected each {column} once, got {value!r} {count} times; make them distinct")
    told = [[] if features is None else row[features].split("|") for row in rows]
    return (
        tuple(row["item_id"] for row in rows),
        tuple(row[text] for row in rows),
        tuple(tuple(dict.fromkeys(name.strip() for name in names if name.strip())) for names in told),
    )


def _keywords(path: Path) -> tuple[str, ...]:
    if path.suffix == ".csv":
        rows = _table(path)
        column = _one_of(path, rows[0], ("keyword", "prompt"))
        words = [row[column] for row in rows]
    else:
        words = [line.strip() for line in re.split(r"\r\n|\r|\n", _text(path)) if line.strip()]
    if "" in words:
        raise DataError(f"{path}, row {words.index('') + 2}: expected a prompt, got nothing; fill it in or remove it")
    word, count = Counter(words).most_common(1)[0] if words else ("", 0)
    if count > 1:
        raise DataError(f"{path}: expected each prompt once, got {word!r} {count} times; remove the copies")
    if len(words) < 2:
        raise DataError(
            f"{path}: expected two or more prompts, got {len(words)}; one a line, or a CSV with the column keyword"
        )
    return tuple(words)


def _thresholds(path: Path, rating: FloatArray, rule: ReactionRule) -> tuple[float, float]:
    if rating.min() == rating.max():
        raise DataError(
            f"{path}: expected ratings that differ, got {rating[0]:g} in every row, which shows no taste; "
            "export what users disliked too, or another column"
        )
    dislike = float(np.quantile(rating, 1 / 3)) if rule.dislike is None else rule.dislike
    like = float(np.quantile(rating, 2 / 3)) if rule.like is None else rule.like
    if rule.like is None and like <= dislike and (rating > dislike).any():
        like = float(rating[rating > dislike].min())
    elif rule.dislike is None and dislike >= like and (rating < like).any():
        dislike = float(rating[rating < like].max())
    if like <= dislike:
        raise ConfigError(
            f"{path}: expected like > dislike, got {like:g} and {dislike:g} for ratings from {rating.min():g} to "
            f"{rating.max():g}; set both, or add users who dislike something"
        )
    return like, dislike


def _number(path: Path, number: int, value: str, outcome: str) -> float:
    try:
        found = float(value) if outcome == "rating" else _TRUTH[value.lower()]
    except (ValueError, KeyError):
        found = float("nan")
    if not np.isfinite(found):
        kind = "a number" if outcome == "rating" else "0 or 1"
        raise DataError(f"{path}, row {number + 2}: expected {kind} in {outcome}, got {value!r}; correct the row")
    return found


def _table(path: Path) -> list[dict[str, str]]:
    # Lines end as in CSV: a title may hold what Unicode calls a line end.
    try:
        rows = list(csv.reader(io.StringIO(_text(path), newline=""), strict=True))
    except csv.Error as error:
        raise DataError(f"{path}: expected CSV, got what cannot be read ({error}); export it again") from error
    rows = [row for row in rows if row]
    if len(rows) < 2:
        raise DataError(f"{path}: expected a header and rows, got {len(rows)} lines; is it the right file?")
    header = [name.strip() for name in rows[0]]
    if len(header) == 1 and (separator := next((mark for mark in ";\t|" if mark in header[0]), None)):
        raise DataError(
            f"{path}: expected columns separated by commas, got {separator!r} between them in {header[0]!r}; export it "
            "again with commas"
        )
    if len(set(header)) < len(header):
        name = Counter(header).most_common(1)[0][0]
        raise DataError(f"{path}: expected each column once, got {name!r} twice or more; rename or remove one")
    for number, row in enumerate(rows[1:]):
        if len(row) != len(header):
            raise DataError(
                f"{path}, row {number + 2}: expected {len(header)} fields, got {len(row)}; quote fields with commas"
            )
    return [dict(zip(header, (field.strip() for field in row), strict=True)) for row in rows[1:]]


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: expected a file, got none that can be read ({error}); check the path") from error
    except UnicodeDecodeError as error:
        line, wide = error.object.count(b"\n", 0, error.start) + 1, error.object[:2] in (b"\xff\xfe", b"\xfe\xff")
        raise DataError(
            f"{path}: expected UTF-8, got the byte {error.object[error.start]:#x} at {error.start}, in line {line}; "
            f"save it as UTF-8, such as with: iconv -f {'utf-16' if wide else 'latin1'} -t utf-8"
        ) from error


def _need(path: Path, row: dict[str, str], columns: tuple[str, ...]) -> None:
    for column in columns:
        if column not in row:
            raise DataError(f"{path}: expected a column {column!r}, got {', '.join(row)}; rename it in the header")


def _one_of(path: Path, row: dict[str, str], columns: tuple[str, ...]) -> str:
    found = next((name for name in columns if name in row), None)
    if found is None:
        raise DataError(
            f"{path}: expected a column {' or '.join(map(repr, columns))}, got {', '.join(row)}; rename it there"
        )
    return found
