"""What a log holds, whether its propensities can be believed, and what can be learned from it: :func:`inspect_log`."""

from agents.inspection.report import LogReport, inspect_log

__all__ = ["LogReport", "inspect_log"]
