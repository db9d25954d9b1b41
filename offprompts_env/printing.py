"""Text from elsewhere, on a terminal."""

from __future__ import annotations

import json


def printable(text: str, *, lines: bool = True) -> str:
    r"""Return `text` with what would steer a terminal, or cannot be printed, escaped as in JSON.

    Titles and sentences come from elsewhere, and ``\x1b]0;…`` in one would rename the window of who looks at it.

    Args:
        text: anything.
        lines: whether lines stay lines; otherwise their ends are escaped too, so that a title cannot pass for two.
    """
    return "".join(c if c.isprintable() or (lines and c == "\n") else json.dumps(c)[1:-1] for c in text)
