"""Drawing from policies: free functions of the probability mass function."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from offprompts_env.errors import DataError, NumericalError
from offprompts_env.types import Contexts, FloatArray, IntArray, Policy, check_actions


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
    total = probabilities.sum(axis=1, dtype=np.float64)
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
    probabilities = check_probabilities(policy.probabilities(contexts), n, policy.n_prompts)
    actions = inverse_cdf(probabilities, rng.random(n))
    return actions, probabilities[np.arange(n), actions].astype(np.float64)
