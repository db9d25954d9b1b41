"""What learners and estimators need of a log, as a table; a test runs every one of them to see that it is true.

The table names classes of :mod:`agents` without importing them, so that a report of a log loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["yes", "clones", "no"]
"""A log allows a method; allows it with a logging policy cloned from the log; or does not."""


@dataclass(frozen=True, slots=True)
class Method:
    """A learner or an estimator, and what it asks for.

    Attributes:
        class_name: its name in :mod:`agents`.
        propensities: those of the logged prompts, or the logging policy in their place.
        logger: the logging policy as a whole; cloned from the log where it is not given.
        outputs: output embeddings in the log.
        generator: the frozen generator.
    """

    class_name: str
    propensities: bool = False
    logger: bool = False
    outputs: bool = False
    generator: bool = False


@dataclass(frozen=True, slots=True)
class Given:
    """What there is to work with.

    Attributes:
        propensities: known in every round.
        outputs: the log has output embeddings.
        generator: one is passed.
        logging_policy: likewise.
    """

    propensities: bool
    outputs: bool
    generator: bool = False
    logging_policy: bool = False


@dataclass(frozen=True, slots=True)
class Judgement:
    """Whether a method can be run.

    Attributes:
        verdict: see :data:`Verdict`.
        lacks: names of what is missing: ``propensities``, ``outputs``, ``generator``.
    """

    verdict: Verdict
    lacks: tuple[str, ...] = ()


def judge(method: Method, given: Given) -> Judgement:
    """Say whether `method` can be run with what is `given`."""
    missing = {
        "propensities": method.propensities and not (given.propensities or given.logging_policy),
        "outputs": (method.outputs or method.generator) and not given.outputs,
        "generator": method.generator and not given.generator,
    }
    lacks = tuple(name for name, lacking in missing.items() if lacking)
    if lacks:
        return Judgement("no", lacks)
    return Judgement("clones" if method.logger and not given.logging_policy else "yes")


LEARNERS: Mapping[str, Method] = {
    "regression": Method("RegressionPG"),
    "is": Method("ImportanceSamplingPG", propensities=True),
    "dr": Method("DoublyRobustPG", propensities=True),
    "potec": Method("POTEC", logger=True),
    "dso": Method("DSO", generator=True, logger=True),
    "tuned-dso": Method("TunedDSO", generator=True, logger=True),
    "embedded": Method("Embedded", generator=True, logger=True),
    "exact-dso": Method("ExactDSO", outputs=True, logger=True),
    "sentence-greedy": Method("SentenceGreedy", outputs=True),
    "sentence-pg": Method("SentencePG", outputs=True),
    "sentence-dr": Method("SentenceDR", outputs=True, logger=True),
    "crm": Method("CRM", propensities=True),
    "bandit-net": Method("BanditNet", propensities=True),
    "logarithmic-smoothing": Method("LogarithmicSmoothingPG", propensities=True),
    "exponential-smoothing": Method("ExponentialSmoothingPG", propensities=True),
    "beta-ips": Method("BetaIPSPG", propensities=True),
    "weighted-log-likelihood": Method("WeightedLogLikelihood"),
    "policy-convolution": Method("PolicyConvolutionPG", logger=True),
    "behavior-cloning": Method("BehaviorCloning"),
}
"""Learners by the names of the command line."""

ESTIMATORS: Mapping[str, Method] = {
    "is": Method("IS", propensities=True),
    "snips": Method("SNIPS", propensities=True),
    "sub-gaussian-is": Method("SubGaussianIS", propensities=True),
    "exponential-smoothing": Method("ExponentialSmoothing", propensities=True),
    "logarithmic-smoothing": Method("LogarithmicSmoothing", propensities=True),
    "beta-ips": Method("BetaIPS", propensities=True),
    "dm": Method("DM"),
    "dr": Method("DR", propensities=True),
    "sndr": Method("SNDR", propensities=True),
    "switch-dr": Method("SwitchDR", propensities=True),
    "dros": Method("DRos", propensities=True),
    "sub-gaussian-dr": Method("SubGaussianDR", propensities=True),
    "mips": Method("MIPS", logger=True),
    "offcem": Method("OffCEM", logger=True),
    "kernel-is": Method("KernelIS", generator=True, logger=True),
    "kernel-dr": Method("KernelDR", generator=True, logger=True),
    "sentence-dm": Method("SentenceDM", generator=True),
}
"""Estimators of a single log by the names of the command line."""
