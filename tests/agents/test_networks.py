from __future__ import annotations

import numpy as np
import pytest
import torch

from agents.networks import MLP, StackedMLP, homogeneous
from offprompts_env.errors import DimensionError


def stacked(sizes: tuple[int, ...], worlds: int = 3) -> StackedMLP:
    return StackedMLP.initialise(sizes, [np.random.default_rng(seed) for seed in range(worlds)])


@pytest.mark.parametrize("sizes", [(4, 6, 5), (4, 6, 1), (4, 6, 7, 2), (4, 6, 7, 1)])
def test_backward_is_what_autograd_gives(sizes):
    network, inputs = stacked(sizes), torch.randn(3, 8, 5)
    inputs[..., -1] = 1
    target = torch.randn(3, 8, sizes[-1])
    outputs = network.forward(inputs)
    network.backward(2 * (outputs - target))

    layers = [layer.clone().requires_grad_() for layer in network.layers]
    hidden = inputs[..., :-1]
    for index, layer in enumerate(layers):
        hidden = torch.relu(hidden) if index else hidden
        hidden = hidden @ layer[:, :-1] + layer[:, -1:]
    torch.testing.assert_close(outputs, hidden)
    expected = torch.autograd.grad((hidden - target).square().sum(), layers)
    gradient = StackedMLP(3, sizes)
    gradient.parameters.copy_(network.gradient)
    for found, wanted in zip(gradient.layers, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_backward_by_finite_differences():
    # A seed for which no shift moves a hidden unit across the kink of its ReLU, where differences are no derivatives.
    network, inputs = stacked((2, 3, 2), worlds=1), torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(1))
    inputs[..., -1] = 1
    network.backward(2 * network.forward(inputs))
    for index in np.flatnonzero(network.gradient.numpy())[:10]:
        values = []
        for shift in (-1e-2, 2e-2):
            network.parameters[index] += shift
            values.append(network.forward(inputs).square().sum().item())
        network.parameters[index] -= 1e-2
        assert (values[1] - values[0]) / 2e-2 == pytest.approx(network.gradient[index].item(), rel=0.05, abs=0.02)


def test_initial_weights_are_those_of_a_linear_layer():
    layer = stacked((50, 400, 3), worlds=1).layers[0]
    reference = torch.nn.Linear(50, 400)
    assert layer.abs().max() <= 50**-0.5
    assert layer.std().item() == pytest.approx(reference.weight.std().item(), rel=0.03)


def test_unstacked_networks_compute_the_same():
    network, inputs = stacked((4, 6, 5)), np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    together = network.forward(torch.from_numpy(homogeneous([inputs])).expand(3, 9, 5))
    for world, mlp in enumerate(network.unstack()):
        np.testing.assert_allclose(mlp(inputs), together[world].numpy(), rtol=1e-4, atol=1e-5)
        assert mlp.sizes == (4, 6, 5)
    again = StackedMLP.of(network.unstack())
    assert all(torch.equal(a, b) for a, b in zip(again.layers, network.layers, strict=True))


def test_wrong_dimensions():
    with pytest.raises(DimensionError, match="expected inputs of dimension 4, got 3"):
        stacked((4, 6, 5)).unstack()[0](np.zeros((2, 3), dtype=np.float32))
    with pytest.raises(DimensionError, match="sizes"):
        StackedMLP.of([*stacked((4, 6, 5), 1).unstack(), *stacked((4, 7, 5), 1).unstack()])


def test_tensors_round_trip():
    (mlp,) = stacked((4, 6, 7, 5), worlds=1).unstack()
    again = MLP.from_tensors(mlp.tensors("p.") | {"other": np.zeros(1)}, "p.")
    assert all(np.array_equal(a, b) for a, b in zip(mlp.layers, again.layers, strict=True))
