"""Objects of Python as bytes that run no code when they are read: the format of skops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from offprompts_env.errors import StorageError, missing_dependency


def skops_bytes(thing: Any, what: str, extra: str) -> bytes:
    """Return `thing` as bytes, after a look whether it can be read back.

    Raises:
        MissingDependencyError: skops is not installed.
        StorageError: skops does not know how to write some part of it.
    """
    try:
        from skops import io
    except ImportError as error:
        raise missing_dependency("skops", extra, f"saving {what}") from error
    try:
        content: bytes = io.dumps(thing)
        io.loads(content, trusted=io.get_untrusted_types(data=content))
    except Exception as error:
        raise StorageError(
            f"{what}: skops cannot write it: {type(error).__name__}: {error}; save what it is made of yourself, or "
            "clone what it does with agents.BehaviorCloning and save that"
        ) from error
    return content


def skops_object(content: bytes, known: Sequence[str], what: str, extra: str, *, trusted: bool) -> Any:
    """Return what :func:`skops_bytes` wrote.

    Args:
        content: the bytes.
        known: full names of types that are part of the library and harmless; skops knows many itself.
        what: of which agent, for errors.
        extra: the one that installs skops.
        trusted: the reader knows who wrote the bytes, and lets them make objects of any type.

    Raises:
        MissingDependencyError: skops is not installed.
        StorageError: not such bytes, or types in it that neither skops nor `known` lists, and not `trusted`.
    """
    try:
        from skops import io
    except ImportError as error:
        raise missing_dependency("skops", extra, f"reading {what}") from error
    try:
        found = io.get_untrusted_types(data=content)
    except Exception as error:
        raise _unreadable(what, error) from error
    unknown = sorted(set(found) - set(known))
    if unknown and not trusted:
        raise StorageError(
            f"{what}: expected parts that are known to be harmless, got {', '.join(unknown)}; if you wrote the file "
            "yourself, pass trusted=True to load"
        )
    try:
        return io.loads(content, trusted=found)
    except Exception as error:
        raise _unreadable(what, error) from error


def _unreadable(what: str, error: Exception) -> StorageError:
    return StorageError(
        f"{what}: cannot read it: {type(error).__name__}: {error}; it may be of another version of the library; save "
        "the agent again"
    )
