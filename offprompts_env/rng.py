"""One seed, many independent named streams.

A stream is ``PCG64(SeedSequence(seed, spawn_key=crc32(name), ...))``: two names never share random numbers, and adding
a stream never changes another one. Nothing in this project touches a global generator.
"""

from __future__ import annotations

import zlib

import numpy as np


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """Return the generator called `names` of the run `seed`.

    Args:
        seed: non-negative integer that names the run.
        names: path of the stream, e.g. ``stream(0, "world", "prompts")``.
    """
    return np.random.default_rng(sequence(seed, *names))


def sequence(seed: int, *names: str | int) -> np.random.SeedSequence:
    """Return the seed sequence behind :func:`stream`, for code that seeds something else than NumPy."""
    key = tuple(name if isinstance(name, int) else zlib.crc32(name.encode()) for name in names)
    return np.random.SeedSequence(entropy=seed, spawn_key=key)


def integer_seed(seed: int, *names: str | int) -> int:
    """Return a 63-bit integer seed for a foreign generator (torch, scikit-learn) from the stream called `names`."""
    return int(sequence(seed, *names).generate_state(1, np.uint64)[0] >> np.uint64(1))
