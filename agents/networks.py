"""Perceptrons: a stack of equally shaped ones that is trained as a whole, and one of them at rest.

Symbols: ``W`` worlds, ``B`` rounds of a batch. A bias is the last row of a weight matrix: inputs and hidden layers
carry a last column of ones, so that a layer is one matrix product and so is its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offprompts_env.errors import DimensionError
from offprompts_env.types import FloatArray

# Floats of four cache lines. Each world's part of the buffer is padded to a multiple, so that its numbers meet the same
# vector instructions wherever it lies in the stack: how a product rounds depends on alignment.
_LINE = 64


def homogeneous(columns: Sequence[FloatArray]) -> FloatArray:
    """Return `columns` [(n, d_1), (n, d_2), ...] side by side with a last column of ones, (n, Σ d + 1) float32."""
    return np.concatenate([*columns, np.ones((len(columns[0]), 1))], axis=1, dtype=np.float32)


@dataclass(frozen=True, eq=False)
class MLP:
    """A trained perceptron with ReLU between its layers.

    Attributes:
        layers: weight matrices, (d_in + 1, d_out) each, bias in the last row.
    """

    layers: tuple[FloatArray, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of units, from input to output."""
        return (len(self.layers[0]) - 1, *(layer.shape[1] for layer in self.layers))

    def __call__(self, inputs: FloatArray) -> FloatArray:
        """Return outputs (n, d_out) for `inputs` (n, d_in).

        Raises:
            DimensionError: inputs of another dimension than it was trained on.
        """
        if inputs.shape[1] != self.sizes[0]:
            raise DimensionError(f"network: expected inputs of dimension {self.sizes[0]}, got {inputs.shape[1]}")
        hidden = inputs @ self.layers[0][:-1]
        hidden += self.layers[0][-1]
        return self.upper(hidden)

    def upper(self, hidden: FloatArray) -> FloatArray:
        """Return the outputs for `hidden` (..., h), what the first layer gives before its ReLU."""
        for layer in self.layers[1:]:
            hidden = np.maximum(hidden, 0) @ layer[:-1]
            hidden += layer[-1]
        return hidden

    def tensors(self, prefix: str = "") -> dict[str, FloatArray]:
        """Return the weights under the names ``<prefix>layer<i>``."""
        return {f"{prefix}layer{i}": np.ascontiguousarray(layer) for i, layer in enumerate(self.layers)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, FloatArray], prefix: str = "") -> MLP:
        """Inverse of :meth:`tensors`."""
        names = (f"{prefix}layer{i}" for i in range(len(tensors)))
        return cls(tuple(tensors[name] for name in names if name in tensors))


class StackedMLP:
    """W independent perceptrons of the same shape, ReLU between layers, in one flat buffer.

    Forward and backward are batched matrix products, written out: what autograd would do, without its bookkeeping,
    which is most of the time at this size. A world gets the same numbers whatever it is stacked with, bit for bit if B
    is a multiple of 16.

    Attributes:
        parameters: all weights, flat.
        gradient: gradient of the summed losses with respect to `parameters`, filled by :meth:`backward`.
        head: what makes a policy's distribution of the outputs, where they are not its logits.

    Args:
        worlds: ``W``.
        sizes: numbers of units, from input (without the column of ones) to output.
    """

    def __init__(self, worlds: int, sizes: Sequence[int]) -> None:
        self.worlds, self.sizes = worlds, tuple(sizes)
        shapes = [(below + 1, above) for below, above in pairwise(self.sizes)]
        strides = [-(-rows * columns // _LINE) * _LINE for rows, columns in shapes]
        lengths = [worlds * stride for stride in strides]
        self.parameters, self.gradient = torch.zeros(sum(lengths)), torch.zeros(sum(lengths))
        self.layers, self._slopes = (
            [
                part.as_strided((worlds, rows, columns), (stride, columns, 1))
                for part, (rows, columns), stride in zip(torch.split(flat, lengths), shapes, strides, strict=True)
            ]
            for flat in (self.parameters, self.gradient)
        )
        self.head: Callable[[Tensor], Any] | None = None
        self._tape: list[Tensor] = []

    @classmethod
    def initialise(cls, sizes: Sequence[int], rngs: Sequence[np.random.Generator]) -> StackedMLP:
        """Draw weights and biases of every layer uniformly on ±1/√d_in, PyTorch's default, one generator a world."""
        stack = cls(len(rngs), sizes)
        for world, rng in enumerate(rngs):
            for layer in stack.layers:
                bound = (layer.shape[1] - 1) ** -0.5
                drawn = rng.uniform(-bound, bound, tuple(layer.shape[1:])).astype(np.float32)
                layer[world] = torch.from_numpy(drawn)
        return stack

    @classmethod
    def of(cls, networks: Sequence[MLP]) -> StackedMLP:
        """Stack trained perceptrons of the same shape."""
        stack = cls(len(networks), networks[0].sizes)
        for world, network in enumerate(networks):
            if network.sizes != stack.sizes:
                raise DimensionError(f"networks: expected sizes {stack.sizes} in all worlds, got {network.sizes}")
            for layer, weights in zip(stack.layers, network.layers, strict=True):
                layer[world] = torch.from_numpy(weights)
        return stack

    def unstack(self) -> list[MLP]:
        """Return a copy of every world's perceptron."""
        return [MLP(tuple(layer[world].numpy().copy() for layer in self.layers)) for world in range(self.worlds)]

    def forward(self, inputs: Tensor) -> Tensor:
        """Return outputs (W, B, d_out) for `inputs` (W, B, d_in + 1) that end in a column of ones."""
        batch = inputs.shape[:2]
        if not self._tape or self._tape[0].shape[:2] != batch:
            self._tape = [inputs, *(torch.ones(*batch, size + 1) for size in self.sizes[1:-1])]
        self._tape[0] = inputs
        for layer, below, above in zip(self.layers, self._tape, self._tape[1:], strict=False):
            torch.bmm(below, layer, out=above[..., :-1])
            above.relu_()
        last = self.layers[-1]
        # A product with a single column is a sum: the matrix routine for it is slow, and rounds differently when alone.
        if last.shape[-1] == 1:
            return (self._tape[-1] * last.mT).sum(-1, keepdim=True)
        return torch.bmm(self._tape[-1], last)

    def backward(self, slope: Tensor) -> None:
        """Fill :attr:`gradient`, given the derivative of the loss with respect to the last forward's outputs."""
        for index in reversed(range(len(self.layers))):
            below, layer = self._tape[index], self.layers[index]
            if slope.shape[-1] == 1:
                self._slopes[index][..., 0] = (below * slope).sum(1)
            else:
                torch.bmm(below.mT, slope, out=self._slopes[index])
            if index > 0:
                weights = layer[:, :-1].mT
                slope = slope * weights if slope.shape[-1] == 1 else slope @ weights
                # The derivative of ReLU; a mask of booleans would be several times slower.
                slope.mul_(below[..., :-1].sign())
