from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from agents.networks import StackedMLP
from agents.regression import RegressionBatch, squared_error_gradient
from agents.training import Adam, Schedule, no_subnormals, train, world_streams
from offprompts_env.errors import ConfigError, NumericalError


class Line:
    """Feed of a regression on y = 3 x + 1."""

    def block(self, steps: int, network: StackedMLP) -> list[RegressionBatch]:
        x = torch.linspace(-1, 1, 16).view(1, 16, 1).expand(network.worlds, 16, 1)
        return [RegressionBatch(torch.cat([x, torch.ones_like(x)], -1), 3 * x + 1)] * min(steps, 7)


def test_adam_is_that_of_pytorch():
    start = torch.randn(70)
    ours, gradient = start.clone(), torch.empty(70)
    adam = Adam(ours, gradient, 1e-2)
    theirs = start.clone().requires_grad_()
    reference = torch.optim.Adam([theirs], lr=1e-2)
    for _ in range(20):
        theirs.grad = torch.randn(70)
        gradient.copy_(theirs.grad)
        reference.step()
        adam.step()
    torch.testing.assert_close(ours, theirs.detach())


def test_the_loop_minimises_and_counts_its_steps():
    network, seen = StackedMLP.initialise((1, 8, 1), world_streams([0, 1], "test")), []
    curve = train(
        network, Line(), squared_error_gradient, Schedule(500, 16, 1e-2), label="line", on_step=lambda n: seen.append(n)
    )
    assert seen == list(range(1, 501))
    assert curve.shape == (72, 2)
    assert (curve[-1] < 0.01 * curve[0]).all()


def test_a_loop_that_is_stopped_reports_the_loss_of_the_steps_it_did():
    curves = []
    for stop in (1, None):
        network = StackedMLP.initialise((1, 8, 1), world_streams([0], "test"))
        schedule = Schedule(7 if stop else 1, 16, 1e-2)
        curves.append(
            train(network, Line(), squared_error_gradient, schedule, label="line", on_step=lambda n, s=stop: n == s)
        )
    torch.testing.assert_close(curves[0], curves[1])


def test_a_loop_that_diverges_says_which_world():
    network = StackedMLP.initialise((1, 8, 1), world_streams([0, 1], "test"))
    network.layers[0][1] = float("nan")
    with pytest.raises(NumericalError, match="world 1 became nan"):
        train(network, Line(), squared_error_gradient, Schedule(5, 16, 1e-2), label="line")


def test_an_interruption_leaves_the_threads_as_they_were():
    threads, network = torch.get_num_threads(), StackedMLP.initialise((1, 8, 1), world_streams([0], "test"))

    def interrupt(step: int) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(network, Line(), squared_error_gradient, Schedule(5, 16, 1e-2), label="line", on_step=interrupt)
    assert torch.get_num_threads() == threads


SUBNORMAL = torch.ones((), dtype=torch.int32).view(torch.float32)


def keeps_subnormals():
    return (SUBNORMAL * 1.0).view(torch.int32).item() == 1


@pytest.mark.parametrize("flushed", [False, True])
def test_subnormals_are_zero_in_a_loop_and_the_callers_business_elsewhere(flushed):
    seen = []

    def gradient(outputs, batch):
        seen.append(keeps_subnormals())
        return outputs.mean((1, 2)), torch.full_like(outputs, 1e-21)

    network = StackedMLP.initialise((1, 8, 1), world_streams([0], "test"))
    torch.set_flush_denormal(flushed)
    try:
        train(
            network, Line(), gradient, Schedule(3, 16, 1e-2), label="line",
            on_step=lambda n: seen.append(keeps_subnormals()),
        )  # fmt: skip
        # What is called between steps, a user's function say, has what it had.
        assert seen == [False, not flushed] * 3
        assert keeps_subnormals() is not flushed
        with pytest.raises(ZeroDivisionError), no_subnormals():
            _ = 1 / 0
        assert keeps_subnormals() is not flushed
    finally:
        torch.set_flush_denormal(False)


def test_the_moments_of_adam_hold_no_subnormals():
    moments = {}
    for flush in (False, True):
        adam = Adam(torch.zeros(4), torch.full((4,), 1e-21), 1e-2)
        for _ in range(5):
            with no_subnormals() if flush else nullcontext():
                adam.step()
        moments[flush] = adam._square[0].view(torch.int32)
    # The square of 1e-21 is below 1.2e-38, and above zero.
    assert (moments[False] > 0).all()
    assert (moments[True] == 0).all()


def test_wrong_schedules():
    for arguments in ((0, 1, 0.1), (1, 0, 0.1), (1, 1, float("nan")), (1, 1, 0.0)):
        with pytest.raises(ConfigError):
            Schedule(*arguments)
