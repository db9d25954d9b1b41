"""Text from elsewhere, made fit for a terminal."""

from __future__ import annotations

import json


def printable(text: str) -> str:
    r"""Return `text` with what would steer a terminal, or cannot be printed, escaped as in JSON; lines stay lines.

    Titles and sentences come from elsewhere, and ``\x1b]0;…`` in one would rename the window of who looks at it.
    """
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)
