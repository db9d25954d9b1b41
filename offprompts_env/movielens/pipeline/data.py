"""From raw ratings to the benchmark's users, movies and facts.

Two disjoint sets of ratings are kept apart from here on, because the sentences say how a movie was received:

- the *reaction* ratings: liked (rating >= `like`) or disliked (rating <= `dislike`), of users and movies with enough of
  both, balanced per user. The reward simulator is trained and tested on these only.
- the *background* ratings: all others. What sentences say about reception and popularity comes from these only, so no
  held-out reaction leaks into the text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd

from offprompts_env.errors import DataError
from offprompts_env.movielens.grammar import Movie, era_of
from offprompts_env.movielens.lexicon import ERAS, GENRES, TAG_GROUP, lexicon
from offprompts_env.movielens.raw import RawMovieLens

#: What a coordinate of a user vector is the taste for.
TASTE_NAMES: tuple[str, ...] = (*GENRES, *ERAS, "popular", "acclaimed")

_GENRE_SPELLINGS = {"Children's": "Children"}
_EM_STEPS = 15
_PRIOR_RATINGS = 5.0  # shrinkage of user and item means, in ratings


@dataclass(frozen=True)
class FilterConfig:
    """Which ratings count as reactions.

    ``like``, ``dislike``: rating thresholds. ``min_user``, ``min_item``: how many reactions of each class a user and a
    movie must keep (5 and 3 suit latest-small; the published 10 and 10 suit MovieLens-1M and larger).
    ``min_tags``: how many users must agree on a tag.
    """

    like: float = 4.5
    dislike: float = 3.0
    min_user: int = 5
    min_item: int = 3
    min_tags: int = 1


@dataclass(frozen=True)
class Reactions:
    """Reactions as index arrays: ``users``, ``items`` (n,) index into `Benchmark`; ``liked`` (n,) bool."""

    users: np.ndarray
    items: np.ndarray
    liked: np.ndarray

    def __len__(self) -> int:
        return len(self.liked)

    def take(self, index: np.ndarray) -> Reactions:
        """Return the reactions at `index` (positions or a mask)."""
        return Reactions(self.users[index], self.items[index], self.liked[index])


@dataclass(frozen=True)
class TasteRatings:
    """All ratings of the kept users, for user vectors: ``users`` index (n,), ``features`` row (n,), ``rating`` (n,).

    ``reaction`` (n,) is the position in `Benchmark.reactions`, or -1 for a background rating.
    """

    users: np.ndarray
    features: np.ndarray
    rating: np.ndarray
    reaction: np.ndarray


@dataclass(frozen=True)
class Benchmark:
    """The filtered data set: users, movies and reactions, and what user vectors are fit on.

    ``user_ids`` (n_users,), ``item_ids`` (n_items,) are MovieLens ids; ``movies[i]`` belongs to ``item_ids[i]``;
    ``features`` (n_rated_movies, d_x) are the attributes of all rated movies, centred on the kept ones.
    """

    user_ids: np.ndarray
    item_ids: np.ndarray
    movies: tuple[Movie, ...]
    years: np.ndarray
    reactions: Reactions
    features: np.ndarray
    taste: TasteRatings


def split_title(raw: str) -> tuple[str, int | None]:
    """Return (display title, year) of a raw MovieLens title.

    Trailing articles move to the front ("Matrix, The (1999)" -> "The Matrix (1999)"), names in other languages go
    ("City of God (Cidade de Deus) (2002)" -> "City of God (2002)"); the year is None where the title has none.
    """
    match = re.fullmatch(r"(.*?)\s*\((\d{4})(?:[-\u2013]\d{0,4})?\)\s*", raw)
    name, year = (match[1], int(match[2])) if match else (raw.strip(), None)
    name = re.sub(r"\s*\([^()]*\)", "", name).strip() or name
    article = re.fullmatch(r"(.*), (The|A|An|Les?|La|L'|Il|El|Der|Die|Das|Los|Las)", name)
    if article:
        name = f"{article[2]}{'' if article[2].endswith(chr(39)) else ' '}{article[1]}"
    return (f"{name} ({year})" if year else name), year


def prepare(raw: RawMovieLens, config: FilterConfig, rng: np.random.Generator) -> Benchmark:
    """Filter `raw` and collect the facts that sentences may state.

    Raises `DataError` if the filter leaves nothing.
    """
    known = {genre: i for i, genre in enumerate(GENRES)}
    table = raw.items.set_index("item")
    genres = {
        item: tuple(g for g in (_GENRE_SPELLINGS.get(name, name) for name in names) if g in known)
        for item, names in table["genres"].items()
    }
    ratings = raw.ratings[raw.ratings["item"].isin([item for item, names in genres.items() if names])]
    ratings = ratings.reset_index(drop=True)
    reactions = _reactions(ratings, config, rng)
    if not len(reactions):
        raise DataError(
            f"expected users with at least {config.min_user} likes (rating >= {config.like}) and {config.min_user} "
            f"dislikes (rating <= {config.dislike}) each, found none in {len(ratings)} ratings; "
            "lower min_user or min_item, or use a larger MovieLens"
        )
    background = ratings.drop(index=reactions.index)
    user_ids = np.unique(reactions["user"].to_numpy())
    item_ids = np.unique(reactions["item"].to_numpy())

    rated = np.unique(ratings["item"].to_numpy())
    quality, popularity = _reception(background, rated)
    titles = [split_title(str(table.at[item, "title"])) for item in rated]
    years = np.array([year or _year(table.at[item, "year"]) for item, (_, year) in zip(rated, titles, strict=True)])
    eras = [era_of(int(year)) for year in years]
    kept = np.searchsorted(rated, item_ids)
    popularity_level = np.searchsorted(np.quantile(popularity[kept], [1 / 3, 2 / 3]), popularity)
    reception_level = np.searchsorted(np.quantile(quality[kept], [0.2, 0.5, 0.8]), quality)
    tags = _tags(raw, config)
    movies = tuple(
        Movie(
            title=titles[i][0],
            genres=genres[item],
            era=eras[i],
            popularity=int(popularity_level[i]),
            reception=int(reception_level[i]),
            tags=tags.get(int(item), ()),
        )
        for i, item in zip(kept, item_ids, strict=True)
    )

    features = np.zeros((len(rated), len(TASTE_NAMES)))
    era_index = {era: len(GENRES) + i for i, era in enumerate(ERAS)}
    for row, item in enumerate(rated):
        features[row, [known[genre] for genre in genres[item]]] = 1.0
        features[row, era_index[eras[row]]] = 1.0
    features[:, -2] = popularity_level - 1.0
    features[:, -1] = (reception_level - 1.5) * 0.8
    features -= features[kept].mean(axis=0)

    own = ratings[ratings["user"].isin(user_ids)]
    position = pd.Series(np.arange(len(reactions)), index=reactions.index).reindex(own.index, fill_value=-1)
    means = background.groupby("item")["rating"].agg(["sum", "size"]).reindex(rated, fill_value=0)
    overall = float(background["rating"].mean())
    item_mean = ((means["sum"] + overall * _PRIOR_RATINGS) / (means["size"] + _PRIOR_RATINGS)).to_numpy()
    rows = np.searchsorted(rated, own["item"].to_numpy())
    return Benchmark(
        user_ids=user_ids,
        item_ids=item_ids,
        movies=movies,
        years=years[kept],
        reactions=Reactions(
            users=np.searchsorted(user_ids, reactions["user"].to_numpy()),
            items=np.searchsorted(item_ids, reactions["item"].to_numpy()),
            liked=reactions["liked"].to_numpy(),
        ),
        features=features,
        taste=TasteRatings(
            users=np.searchsorted(user_ids, own["user"].to_numpy()),
            features=rows,
            rating=own["rating"].to_numpy() - item_mean[rows],
            reaction=position.to_numpy(),
        ),
    )


def user_vectors(benchmark: Benchmark, excluded: np.ndarray) -> np.ndarray:
    """Fit the taste of every user by empirical Bayes; returns (n_users, d_x) float64.

    With z_i the features of movie i and e_ui the rating of user u minus the movie's background mean, centred per user:

        e_ui = v_u . z_i + noise,   noise ~ N(0, s^2),   v_u ~ N(0, S),

    and the vector of u is the posterior mean (A_u / s^2 + S^-1)^-1 c_u / s^2 with A_u = sum_i z_i z_i^T and
    c_u = sum_i z_i e_ui. S and s^2 are fitted to all users by EM (ridge regression is the case S ~ identity; a full S
    lets one taste tell about another). Vectors come in units of their root mean square: as the context of a learner
    they have the size that networks are initialised for. Uses all ratings of the users except those whose reaction is
    set in ``excluded`` (n_reactions,).
    """
    taste = benchmark.taste
    use = (taste.reaction < 0) | ~excluded[np.maximum(taste.reaction, 0)]
    users, rows, rating = taste.users[use], taste.features[use], taste.rating[use]
    n_users, width = len(benchmark.user_ids), benchmark.features.shape[1]
    counts = np.bincount(users, minlength=n_users)
    means = np.bincount(users, weights=rating, minlength=n_users) / np.maximum(counts, 1)
    residual = rating - means[users]
    order = np.argsort(users, kind="stable")
    ends = np.cumsum(counts)
    gram, moment = np.zeros((n_users, width, width)), np.zeros((n_users, width))
    for user, (start, end) in enumerate(zip(ends - counts, ends, strict=True)):
        index = order[start:end]
        design = benchmark.features[rows[index]]
        gram[user], moment[user] = design.T @ design, design.T @ residual[index]

    noise = max(float(np.mean(residual**2)), 1e-3)
    prior = np.eye(width) * noise / 15.0
    for _ in range(_EM_STEPS):
        covariance = np.linalg.inv(gram / noise + np.linalg.inv(prior))  # (n_users, d_x, d_x)
        vectors = np.einsum("uij,uj->ui", covariance, moment) / noise
        fit = np.einsum("ui,uij,uj->u", vectors, gram, vectors) - 2 * np.einsum("ui,ui->u", vectors, moment)
        spread = np.einsum("uij,uji->u", gram, covariance)
        prior = (covariance.sum(axis=0) + vectors.T @ vectors) / n_users + 1e-5 * np.eye(width)
        noise = max(float((np.sum(residual**2) + np.sum(fit + spread)) / max(len(residual), 1)), 1e-3)
    posterior = np.linalg.inv(gram / noise + np.linalg.inv(prior))
    vectors = np.einsum("uij,uj->ui", posterior, moment)
    return np.asarray(vectors / max(float(np.sqrt(np.mean(vectors**2))), 1e-12))


def _reactions(ratings: pd.DataFrame, config: FilterConfig, rng: np.random.Generator) -> pd.DataFrame:
    """Label, filter until stable, and balance per user; the index stays that of `ratings`."""
    table = ratings[(ratings["rating"] >= config.like) | (ratings["rating"] <= config.dislike)].copy()
    table["liked"] = table["rating"] >= config.like
    size = -1
    while size != len(table):
        size = len(table)
        for column, least in (("user", config.min_user), ("item", config.min_item)):
            likes = table.groupby(column)["liked"].transform("sum")
            total = table.groupby(column)["liked"].transform("size")
            table = table[(likes >= least) & (total - likes >= least)]
    likes = table.groupby("user")["liked"].transform("sum")
    total = table.groupby("user")["liked"].transform("size")
    smaller = np.minimum(likes, total - likes)
    # Keep a random `smaller` of each user's likes and dislikes: rank the rows of each class by a random key.
    key = pd.Series(rng.random(len(table)), index=table.index)
    rank = key.groupby([table["user"], table["liked"]]).rank(method="first")
    return table[rank <= smaller]


def _reception(background: pd.DataFrame, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (quality, count) of `items`: the shrunk mean of ratings after user means, and how many there are."""
    overall = background["rating"].mean()
    user = background.groupby("user")["rating"].agg(["sum", "size"])
    bias = (user["sum"] - overall * user["size"]) / (user["size"] + _PRIOR_RATINGS)
    residual = background["rating"] - overall - background["user"].map(bias)
    item = residual.groupby(background["item"]).agg(["sum", "size"]).reindex(items, fill_value=0)
    return (item["sum"] / (item["size"] + _PRIOR_RATINGS)).to_numpy(), item["size"].to_numpy(dtype=np.float64)


def _tags(raw: RawMovieLens, config: FilterConfig) -> dict[int, tuple[str, ...]]:
    """Return item -> lexicon tags that at least `config.min_tags` users gave it, sorted."""
    if raw.tags is None:
        return {}
    allowed = {word.text for word in lexicon() if word.group == TAG_GROUP}
    table = raw.tags.assign(tag=raw.tags["tag"].str.lower().str.strip())
    table = table[table["tag"].isin(allowed)]
    counts = table.groupby(["item", "tag"])["user"].nunique()
    counts = counts[counts >= config.min_tags]
    result: dict[int, tuple[str, ...]] = {}
    for item, tag in sorted(counts.index):
        result[int(item)] = (*result.get(int(item), ()), str(tag))
    return result


def _year(value: object) -> int:
    """Return the release year of the item table, or 1990 (the middle of MovieLens) where it is missing."""
    return 1990 if pd.isna(value) else int(value)  # type: ignore[call-overload]
