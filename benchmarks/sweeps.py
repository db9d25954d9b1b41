"""The sweeps that can be run, and the choice of runs by patterns."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product

import agents
from benchmarks.methods import BEYOND, PAPER, Method, Own
from benchmarks.plan import Point, Run, Sweep
from benchmarks.settings import estimation, failures, text
from benchmarks.settings.text import TextSetting
from benchmarks.settings.vectors import VectorSetting
from offprompts_env.errors import ConfigError, unknown_name

_LEARNERS: Mapping[str, Method] = {**PAPER, **BEYOND}


def _paper(name: str, title: str, axis: str, settings: Mapping[str, tuple[float, VectorSetting]]) -> Sweep:
    points = tuple(Point(point, x, setting, _LEARNERS) for point, (x, setting) in settings.items())
    return Sweep(name, title, axis, points, worlds=20)


def _kernels() -> list[Point]:
    densities: Mapping[str, agents.LoggingDensity] = {
        "network": agents.NetworkDensity(),
        "monte-carlo": agents.MonteCarloDensity(),
    }
    # The default kernel by its bandwidth alone, so that τ = 1 with a network is the very run of the other sweeps.
    kernels: Mapping[str, Callable[[float], agents.Kernel | None]] = {
        "gaussian": lambda tau: None,
        "uniform": lambda tau: agents.UniformKernel(tau),
    }
    return [
        Point(
            f"tau={tau:g}/kernel={kernel}/density={density}",
            tau,
            VectorSetting(),
            {"dso": agents.DSO(tau=tau, kernel=kernels[kernel](tau), density=densities[density])},
        )
        for kernel, density, tau in product(kernels, densities, (0.5, 1.0, 2.0, 4.0))
    ]


def _sweeps() -> dict[str, Sweep]:
    sweeps = [
        _paper(
            "data_size",
            "Logged rounds",
            "logged rounds",
            {f"n={n}": (n, VectorSetting(n=n)) for n in (500, 1000, 2000, 4000, 8000)},
        ),
        _paper(
            "prompts",
            "Number of prompts",
            "prompts",
            {f"prompts={a}": (a, VectorSetting(prompts=a)) for a in (10, 50, 100, 500, 1000)},
        ),
        _paper(
            "noise",
            "Noise of the reward",
            "standard deviation of the reward's noise",
            {f"noise={noise}": (noise, VectorSetting(noise=noise)) for noise in (0, 1, 2, 3)},
        ),
        Sweep("kernel", "DSO: bandwidth, kernel and density", "bandwidth τ", tuple(_kernels()), worlds=20),
        *text.sweeps(),
        failures.sweep(),
        *estimation.sweeps(),
    ]
    return {sweep.name: sweep for sweep in sweeps}


SWEEPS: Mapping[str, Sweep] = _sweeps()
"""All sweeps by name."""


def quick(sweep: Sweep) -> Sweep:
    """Return a form of `sweep` of minutes: fewer worlds, a tenth of the steps."""
    points = tuple(replace(point, setting=point.setting.quick()) for point in sweep.points)
    return replace(
        sweep, points=points, worlds=min(sweep.worlds, sweep.quick_worlds), seeds=min(sweep.seeds, sweep.quick_seeds)
    )


def with_agent(sweep: Sweep, name: str, method: Method) -> Sweep:
    """Return `sweep` with one more learner at every point.

    Raises:
        ConfigError: the name is taken.
    """
    for point in sweep.points:
        if name in point.methods:
            raise ConfigError(f"agent: the name {name!r} is a built-in learner's; choose another with --name")
    points = tuple(replace(point, methods={**point.methods, name: method}) for point in sweep.points)
    return replace(sweep, points=points)


def select(
    patterns: Sequence[str],
    *,
    short: bool = False,
    worlds: int | None = None,
    own: Mapping[str, Own] | None = None,
    bundle: str | None = None,
    prompts: int | None = None,
) -> list[Run]:
    """Return the runs whose ids match one of `patterns`, in the order of the sweeps.

    Args:
        patterns: a sweep's name, an id, the beginning of one up to a ``/``, or a pattern with ``*`` of either.
        short: take the quick forms.
        worlds: number of worlds in place of the sweep's.
        own: users' agents by name, put beside the built-in learners.
        bundle: folder of the assets that sweeps on text take in place of the embedded ones.
        prompts: so many of the keywords in sweeps on text, the first ones; None for all.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    sweeps = []
    for sweep in SWEEPS.values():
        taken = quick(sweep) if short else sweep
        taken = taken if worlds is None else replace(taken, worlds=worlds)
        taken = on_text(taken, bundle, prompts)
        for name, method in (own or {}).items():
            taken = with_agent(taken, name, method)
        sweeps.append(taken)
    runs = [run for sweep in sweeps for run in sweep.runs()]
    chosen: dict[str, Run] = {}
    for pattern in patterns:
        found = {run.id: run for run in runs if _matches(run.id, pattern)}
        if not found:
            raise _nothing(pattern, [run.id for run in runs])
        chosen |= found
    return [run for run in runs if run.id in chosen]


def on_text(sweep: Sweep, bundle: str | None, prompts: int | None) -> Sweep:
    """Return `sweep`, where it is on text, on the assets in the folder `bundle` and with so many prompts."""

    def changed(point: Point) -> Point:
        setting = point.setting
        if not isinstance(setting, TextSetting):
            return point
        if bundle is not None:
            setting = replace(setting, bundle=bundle)
        if prompts is None:
            return replace(point, setting=setting)
        first, *rest = point.name.split("/")
        name = "/".join([f"prompts={prompts}", *rest])
        named = (name, prompts) if first == "prompts=all" else (point.name, point.x)
        return replace(point, setting=replace(setting, prompts=prompts), name=named[0], x=named[1])

    return replace(sweep, points=tuple(changed(point) for point in sweep.points))


def _nothing(pattern: str, ids: Sequence[str]) -> ConfigError:
    if "/" not in pattern:
        return unknown_name("sweep", pattern, SWEEPS)
    near = difflib.get_close_matches(pattern, ids, n=1, cutoff=0.3)
    return ConfigError(
        f"no run matches {pattern!r}; the nearest id is {near[0] if near else ids[0]!r}, and "
        f"`python -m benchmarks list {pattern.split('/')[0]}` shows those of a sweep"
    )


def _matches(name: str, pattern: str) -> bool:
    start = f"{pattern.rstrip('/')}/"
    return name.startswith(start) or any(fnmatch.fnmatchcase(name, one) for one in (pattern, f"{start}*"))
