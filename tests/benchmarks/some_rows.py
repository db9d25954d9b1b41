"""Rows made up for tests of what is made from rows."""

from __future__ import annotations

from benchmarks.rows import Result, Row

SETTING = "VectorSetting(n=500, effort=Effort(steps=1.0, learning_rate=1.0))"


def row(
    learner="dso", world=0, score=0.5, *, sweep="data_size", point="n=500", x=500.0, seed=0, setting=SETTING,
    config=None, finished="2026-01-01T00:00:00.000000+00:00", **result,
):  # fmt: skip
    """A row whose value is its score, on a scale on which uniform is worth 0 and the oracle 1."""
    given = {"references": {"uniform": 0.0, "logging": 0.1, "oracle": 1.0, "online": 0.7}, **result}
    return Row(
        id=f"{sweep}/{point}/world={world}/seed={seed}/learner={learner}",
        sweep=sweep,
        point=point,
        x=x,
        world=world,
        seed=seed,
        learner=learner,
        score=score,
        key="k",
        config=f"{setting}; {config or learner}",
        result=Result(**{"value": score, "standard_error": 0.01, **given}),
        versions={"python": "3.11"},
        commit="abc",
        device="cpu",
        finished=finished,
    )


def grid(scores, **kwargs):
    """Rows of learner to (world, point) table of scores; NaN or None: no row."""
    return [
        row(learner, world, score, point=f"n={500 * 2**p}", x=500.0 * 2**p, **kwargs)
        for learner, table in scores.items()
        for world, line in enumerate(table)
        for p, score in enumerate(line)
        if score is not None
    ]
