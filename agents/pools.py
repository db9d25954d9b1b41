"""Feeds for objectives that weigh every prompt of a round: ``J(π) = mean_i Σ_a π(a | x_i, q_i) G(i, a)``.

The matrix G is made for a pool of rounds at once. A log whose matrix fits the pool has it made once; of a larger one a
new pool is drawn again and again, so that no (n, A) matrix is held, nor a block's worth of batches.

Symbols: ``W`` worlds, ``B`` rounds of a batch, ``A`` prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.networks import StackedMLP
from agents.training import BLOCK, StackedLogs, world_streams
from offprompts_env.types import FloatArray, IntArray

# Numbers of a world's matrix that are held at once: 64 MiB of float32.
_POOL = 1 << 24
# Batches that use a row of a pool that does not hold the whole log, on average, before another pool is drawn.
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


class _Batches(Sequence[GainBatch]):
    """Batches that are gathered when their turn comes: those of a block together may be larger than memory."""

    def __init__(self, inputs: Tensor, index: Tensor, matrices: Sequence[Sequence[Tensor]]) -> None:
        self._inputs, self._index, self._matrices = inputs, index, matrices

    def __len__(self) -> int:
        return len(self._inputs)

    def __getitem__(self, step: Any) -> Any:
        pairs = [zip(part, self._index[step], strict=True) for part in zip(*self._matrices, strict=True)]
        return GainBatch(self._inputs[step], *(torch.stack([own[rows] for own, rows in part]) for part in pairs))


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
        self._most = max(1, min(BLOCK * batch_size // _REUSE, _POOL // stack.n_prompts))
        self._whole = [size * stack.n_prompts <= _POOL for size in stack.sizes]
        self._rows: list[IntArray] = [np.empty(0, dtype=np.int64)] * stack.worlds
        self._matrices: list[list[Tensor]] = [[]] * stack.worlds

    def _fill(self) -> None:
        for world, (size, whole) in enumerate(zip(self._stack.sizes, self._whole, strict=True)):
            if whole and self._matrices[world]:
                continue
            # The old pool is let go of first.
            self._matrices[world] = []
            self._rows[world] = np.arange(size) if whole else self._pools[world].choice(size, self._most, replace=False)
            self._matrices[world] = [torch.from_numpy(make(world, self._rows[world])) for make in self._makers]

    def block(self, steps: int, network: StackedMLP) -> Sequence[GainBatch]:
        """Return batches for at most `steps` steps, fewer where a pool is used up before."""
        self._fill()
        steps = min(steps, BLOCK)
        if not all(self._whole):
            steps = min(steps, max(1, self._most * _REUSE // self._batch_size))
        shape = (steps, self._batch_size)
        drawn = [rng.integers(len(rows), size=shape) for rng, rows in zip(self._batches, self._rows, strict=True)]
        rows = [
            torch.from_numpy(own[index]) + offset
            for own, index, offset in zip(self._rows, drawn, self._stack.offsets, strict=True)
        ]
        inputs = self._stack.inputs[torch.stack(rows, 1)]
        return _Batches(inputs, torch.from_numpy(np.stack(drawn, 1)), list(self._matrices))
