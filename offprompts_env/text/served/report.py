"""What it took to get the sentences."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from offprompts_env.text.tokens import TokenCount


@dataclass
class Report:
    """Counts over the life of a :class:`~offprompts_env.text.served.ServedLM`.

    Attributes:
        sentences: received and complete.
        requests: sent, repeated ones included.
        retries: attempts that failed and were repeated, by what failed.
        waited: seconds between attempts, summed over requests that waited side by side.
        tokens: that the server says it has read and written, for sentences that were thrown away too.
    """

    sentences: int = 0
    requests: int = 0
    retries: Counter[str] = field(default_factory=Counter)
    waited: float = 0.0
    tokens: TokenCount = field(default_factory=TokenCount)

    def to_json(self) -> dict[str, Any]:
        """Return all counts, JSON-able; tokens only where the server tells them."""
        tokens = {"tokens_read": self.tokens.read, "tokens_written": self.tokens.written}
        return {
            "sentences": self.sentences,
            "requests": self.requests,
            "retries": dict(sorted(self.retries.items())),
            "waited": round(self.waited, 3),
            **(tokens if self.tokens.sentences else {}),
        }

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.retries.most_common())
        return (
            f"{self.sentences} sentences in {self.requests} requests, {self.retries.total()} of them repeated"
            f"{f' ({reasons})' if reasons else ''}, {self.waited:.1f} s waited"
        )
