"""What commands print."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from agents.inspection.report import plain
from offprompts_env.printing import printable
from offprompts_env.types import Estimate


def print_json(content: Mapping[str, Any]) -> None:
    """Print `content` as JSON; numbers that JSON does not know become null."""
    print(printable(json.dumps(plain(content), indent=1, ensure_ascii=False, allow_nan=False)))


def say(message: str) -> None:
    """Print a remark where it does not mix with results."""
    print(message, file=sys.stderr)


def estimate_json(found: Estimate) -> dict[str, Any]:
    """Return an estimate without its terms."""
    return {
        "value": found.value,
        "standard_error": found.standard_error,
        "confidence": found.confidence,
        "interval": list(found.interval),
        "effective_sample_size": found.effective_sample_size,
        "diagnostics": dict(found.diagnostics),
        "warnings": list(found.warnings),
    }
