"""How many tokens a language model has read and written: what a server is paid for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TokenCount:
    """Tokens of sentences, counted by whoever wrote them.

    Attributes:
        read: of prompts; every sentence counts its own.
        written: of sentences.
        sentences: whose tokens are counted, those that were thrown away included.
    """

    read: int = 0
    written: int = 0
    sentences: int = 0

    def __add__(self, other: TokenCount) -> TokenCount:
        return TokenCount(self.read + other.read, self.written + other.written, self.sentences + other.sentences)

    def __sub__(self, other: TokenCount) -> TokenCount:
        return TokenCount(self.read - other.read, self.written - other.written, self.sentences - other.sentences)


def counted_by(writer: object) -> TokenCount | None:
    """Return what `writer` has read and written so far, its ``tokens``; None where it does not count."""
    found = getattr(writer, "tokens", None)
    return found if isinstance(found, TokenCount) else None


def counting(writer: object, work: Callable[[], T]) -> tuple[T, TokenCount | None]:
    """Do `work`; return what it gives, and what `writer` has read and written for it, None where it does not count."""
    before = counted_by(writer)
    done = work()
    after = counted_by(writer)
    return done, None if before is None or after is None else after - before
