"""Feeds for objectives that weigh every prompt of a round: ``J(π) = mean_i Σ_a π(a | x_i, q_i) G(i, a)``.

The matrix G is made for a pool of rounds at once. A log whose matrix fits the pool has it made once; of a larger one a
new pool is drawn again and again, so that no (n, A) matrix is held.

Symbols: ``W`` worlds, ``B`` rounds of a batch, ``A`` prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from agents.networks import StackedMLP
from agents.training import BLOCK, StackedLogs, world_streams
from offprompts_env.types import FloatArray, IntArray

# Numbers of a world's matrix that are held at once: 64 MiB of float32.
_POOL = 1 << 24
# Batches that use a row of a pool that does not hold the whole log, before another is drawn.
_REUSE = 8

Gains = Callable[[int, IntArray], FloatArray]
"""``(world, rows (k,) of its log) -> G (k, A)``."""


@dataclass(frozen=True, slots=True)
class GainBatch:
    """A batch of logged rounds.

    Attributes:
        inputs: ``[x, q, 1]``, (W, B, d + 1).
        gains: what each prompt would gain, G (W, B, A).
        prior: logits that are added to the network's, (W, B, A), or 0.
    """

    inputs: Tensor
    gains: Tensor
    prior: Tensor | float = 0.0


def expected_gain(outputs: Tensor, batch: GainBatch) -> Tensor:
    """Return ``−mean_i Σ_a π(a | x_i, q_i) G(i, a)`` of logits (W, B, A), (W,): no prompt is sampled."""
    return -(torch.softmax(outputs + batch.prior, -1) * batch.gains).sum(-1).mean(-1)


def expected_gain_gradient(outputs: Tensor, batch: GainBatch) -> tuple[Tensor, Tensor]:
    """Return :func:`expected_gain` and its derivative ``−π(a) (G(a) − E_π[G]) / B`` by hand."""
    pmf = torch.softmax(outputs + batch.prior, -1)
    value = torch.linalg.vecdot(pmf, batch.gains)[..., None]
    slope = (value - batch.gains).mul_(pmf).div_(outputs.shape[1])
    return -value.mean((1, 2)), slope


class GainFeed:
    """Feed of logged rounds with their row of G.

    Args:
        stack: the logs.
        seeds: one a log.
        label: name of the streams.
        batch_size: ``B``.
        gains: makes rows of G.
        prior: makes rows of logits that are added to the network's, or None.
    """

    def __init__(
        self,
        stack: StackedLogs,
        seeds: Sequence[int],
        label: str,
        batch_size: int,
        gains: Gains,
        prior: Gains | None = None,
    ) -> None:
        self._stack, self._batch_size = stack, batch_size
        self._makers = [gains] if prior is None else [gains, prior]
        self._batches, self._pools = (world_streams(seeds, label, name) for name in ("batches", "pools"))
        self._rows: list[IntArray] = [np.empty(0, dtype=np.int64)] * stack.worlds
        self._matrices: list[list[Tensor]] = [[]] * stack.worlds

    def _fill(self) -> None:
        for world, size in enumerate(self._stack.sizes):
            whole = size * self._stack.n_prompts <= _POOL
            if whole and len(self._rows[world]):
                continue
            most = min(size, max(1, BLOCK * self._batch_size // _REUSE))
            self._rows[world] = np.arange(size) if whole else self._pools[world].choice(size, most, replace=False)
            self._matrices[world] = [torch.from_numpy(make(world, self._rows[world])) for make in self._makers]

    def block(self, steps: int, network: StackedMLP) -> list[GainBatch]:
        """Return batches for at most `steps` steps."""
        self._fill()
        shape = (min(steps, BLOCK), self._batch_size)
        drawn = [rng.integers(len(rows), size=shape) for rng, rows in zip(self._batches, self._rows, strict=True)]
        rows = [
            torch.from_numpy(own[index]) + offset
            for own, index, offset in zip(self._rows, drawn, self._stack.offsets, strict=True)
        ]
        inputs = self._stack.inputs[torch.stack(rows, 1)]
        index = torch.from_numpy(np.stack(drawn, 1))
        return [
            GainBatch(
                x,
                *(
                    torch.stack([own[part][chosen] for own, chosen in zip(self._matrices, step, strict=True)])
                    for part in range(len(self._makers))
                ),
            )
            for x, step in zip(inputs, index, strict=True)
        ]
