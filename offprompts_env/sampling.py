"""Drawing from policies: free functions of the probability mass function."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from offprompts_env.config import check_kind
from offprompts_env.errors import DataError, DimensionError, NumericalError
from offprompts_env.types import Contexts, FloatArray, IntArray, Policy, PromptSet, check_actions

# Numbers of an (n, A) matrix that are held at once: 16 MiB of float64.
MATRIX_AT_ONCE = 1 << 21


def check_probabilities(probabilities: FloatArray, n: int, n_prompts: int) -> FloatArray:
    """Return `probabilities` if it is an (n, A) matrix of distributions, else say which row is not.

    Raises:
        DataError: wrong shape, a negative entry, or a row whose sum is off one by more than 1e-3.
        NumericalError: NaN.
    """
    probabilities = np.asarray(probabilities)
    if probabilities.shape != (n, n_prompts):
        raise DataError(
            f"probabilities: expected shape ({n}, {n_prompts}), got {probabilities.shape}; "
            "a policy returns one row a context and one column a prompt of the same catalogue"
        )
    total = probabilities.sum(axis=1)
    if np.isnan(total).any():
        raise NumericalError(f"probabilities: got NaN in row {int(np.argmax(np.isnan(total)))}; check the policy")
    wrong = (np.abs(total - 1) > 1e-3) | (probabilities.min(axis=1) < 0)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DataError(
            f"probabilities: expected non-negative numbers that sum to 1, got sum {total[row]:.6g} and "
            f"minimum {probabilities[row].min():.6g} in row {row}"
        )
    return probabilities


def check_catalogue(what: str, found: str | None, prompts: PromptSet) -> None:
    """Raise :class:`DimensionError` if `what` was made for a known catalogue `found`, and that is not `prompts`."""
    if found is not None and found != prompts.fingerprint:
        raise DimensionError(
            f"{what}: expected prompts with fingerprint {prompts.fingerprint[:12]}…, got one over {found[:12]}…; "
            "the catalogues differ in order, texts or embeddings, so actions do not mean the same"
        )


def check_policy(policy: Policy, prompts: PromptSet, place: str) -> None:
    """Check that `policy` chooses among `prompts`, the catalogue of `place`.

    A policy that knows what it was made for says so in an attribute ``catalogue``, the fingerprint of its prompts.

    Raises:
        ConfigError: not a policy.
        DimensionError: another number of prompts, or another catalogue.
    """
    check_kind("policy", policy, Policy, "pass a policy, for instance agents.UniformPolicy(n_prompts)")
    if policy.n_prompts != len(prompts):
        raise DimensionError(
            f"policy: expected {len(prompts)} prompts as in {place}, got {policy.n_prompts}; "
            "use a policy over the same catalogue"
        )
    check_catalogue("policy", getattr(policy, "catalogue", None), prompts)


def row_parts(n: int, n_prompts: int, at_once: int = MATRIX_AT_ONCE) -> Iterator[slice]:
    """Yield the rows of an (n, A) matrix in parts of at most `at_once` numbers, or of one row."""
    size = max(1, at_once // n_prompts)
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def pmf_by_parts(policy: Policy, contexts: Contexts) -> Iterator[tuple[slice, Contexts, FloatArray]]:
    """Yield rows, their contexts and their checked pmf (m, A), part by part so that the whole is never held.

    Raises:
        DataError: `policy` does not give distributions.
        NumericalError: it gives NaN.
    """
    for rows in row_parts(len(contexts), policy.n_prompts):
        part = contexts.take(rows)
        yield rows, part, check_probabilities(policy.probabilities(part), len(part), policy.n_prompts)


def pick(probabilities: FloatArray, actions: IntArray) -> FloatArray:
    """Return the probability (n,) float64 with which :func:`inverse_cdf` draws `actions` (n,) from rows (n, A).

    That is relative to the row's own total, which need not be 1 to the last digit.
    """
    total = probabilities.sum(axis=1, dtype=np.float64)
    return np.asarray(np.minimum(probabilities[np.arange(len(actions)), actions] / total, 1.0))


def chosen_probabilities(policy: Policy, contexts: Contexts, actions: IntArray) -> FloatArray:
    """Return ``π(a_i | x_i, q_i)`` of `actions` (n,) in `contexts`, (n,) float64; raises as :func:`pmf_by_parts`.

    A policy that can tell without the whole pmf has a method ``chosen(contexts, actions)``.
    """
    own = getattr(policy, "chosen", None)
    if own is not None:
        return np.asarray(own(contexts, actions), dtype=np.float64)
    found = np.empty(len(contexts))
    for rows, _, pmf in pmf_by_parts(policy, contexts):
        found[rows] = pick(pmf, actions[rows])
    return found


def inverse_cdf(probabilities: FloatArray, uniforms: FloatArray) -> npt.NDArray[np.int64]:
    """Return for each row the smallest index whose cumulative probability exceeds the uniform.

    The same uniforms give the same actions under the same policy and mostly the same under a similar one: common random
    numbers for comparing policies.

    Args:
        probabilities: (n, A), rows sum to one.
        uniforms: (n,), in [0, 1).
    """
    cumulative = np.cumsum(probabilities, axis=1, dtype=np.float64)
    # Scaling by the row's own total keeps rounding from running past the last prompt with positive probability.
    target = np.asarray(uniforms, dtype=np.float64)[:, None] * cumulative[:, -1:]
    return np.asarray(np.argmax(cumulative > target, axis=1), dtype=np.int64)


def sample_actions(policy: Policy, contexts: Contexts, rng: np.random.Generator) -> tuple[IntArray, FloatArray]:
    """Draw one prompt a round and return it with its probability.

    Args:
        policy: its own ``sample`` is used where it has one.
        contexts: n rounds.
        rng: source of the draw.

    Returns:
        actions (n,) int64 and propensities (n,) float64.
    """
    n = len(contexts)
    own = getattr(policy, "sample", None)
    if own is not None:
        actions, propensities = own(contexts, rng)
        return check_actions(actions, policy.n_prompts, n), np.asarray(propensities, dtype=np.float64)
    uniforms, actions, propensities = rng.random(n), np.empty(n, dtype=np.int64), np.empty(n)
    for rows, _, pmf in pmf_by_parts(policy, contexts):
        actions[rows] = inverse_cdf(pmf, uniforms[rows])
        propensities[rows] = pick(pmf, actions[rows])
    return actions, propensities
