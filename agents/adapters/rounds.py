"""Rounds kept for agents that can only be fitted on all of them at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from offprompts_env.types import FloatArray, IntArray


@dataclass(frozen=True, eq=False)
class Rounds:
    """What an agent learns from, one row a round.

    Attributes:
        x: features (n, d).
        action: prompts (n,).
        reward: (n,), or whatever number goes with a round.
    """

    x: FloatArray
    action: IntArray
    reward: FloatArray

    def after(self, earlier: Rounds | None) -> Rounds:
        """Return `earlier` rounds and then these."""
        if earlier is None:
            return self
        return Rounds(
            np.concatenate([earlier.x, self.x]),
            np.concatenate([earlier.action, self.action]),
            np.concatenate([earlier.reward, self.reward]),
        )
