"""What an agent with randomness of its own does, where its library does not say with which probabilities."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from agents.adapters.base import smoothed
from offprompts_env.config import check_integer
from offprompts_env.types import FloatArray


def drawn_pmf(
    choose: Callable[[FloatArray], npt.ArrayLike], rows: FloatArray, draws: int, n_prompts: int
) -> FloatArray:
    """Return how often each prompt is chosen in `draws` choices for a row, over `draws`, (n, A).

    Not an estimate of what the agent would do that stands in for it: an adapter acts from this very pmf, so its
    propensities are exact. It depends on the row and on the agent, not on what else is asked for.

    Args:
        choose: prompts (m,) for m rows of features, by a fresh copy of the agent at each call, whose random state is
            therefore always the same.
        rows: features (n, d).
        draws: choices a row.
        n_prompts: ``A``.

    Raises:
        ActionError: what is chosen is no prompt.
    """
    distinct, which = np.unique(rows, axis=0, return_inverse=True)
    # Row by row: the k-th row of a batch gets the k-th random numbers, so in one call rows would depend on each other.
    pmf = [
        smoothed(choose(np.repeat(row[None], draws, axis=0)), n_prompts, 0.0, draws).mean(axis=0) for row in distinct
    ]
    return np.asarray(pmf)[which.reshape(-1)]


def check_draws(draws: int | None) -> None:
    """Raise :class:`ConfigError` unless `draws` is None or at least 2."""
    if draws is not None:
        check_integer("draws", draws, 2)
