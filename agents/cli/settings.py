"""Settings given as ``name=value`` words, such as ``steps=2000`` or ``rewards.steps=2000``."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from offprompts_env.errors import ConfigError, OffPromptsError, unknown_name

T = TypeVar("T")

_WORDS = {"true": True, "false": False, "none": None}


def read_settings(words: Sequence[str], flag: str) -> dict[str, Any]:
    """Return what ``name=value`` words say: numbers, true, false, none, tuples as ``50,50``, JSON or Python; else text.

    Raises:
        ConfigError: a word has no name or no ``=``, or a name comes twice.
    """
    found: dict[str, Any] = {}
    for word in words:
        name, separator, value = word.partition("=")
        name = name.strip().replace("-", "_")
        if not name or not separator:
            raise ConfigError(f"{flag}: expected name=value, such as steps=2000, got {word!r}")
        if name in found:
            raise ConfigError(f"{flag}: {name} is given twice")
        found[name] = _value(value.strip())
    return found


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for read in (ast.literal_eval, json.loads) if text.startswith(("{", "[")) else (ast.literal_eval,):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text


def has_setting(configuration: object, name: str) -> bool:
    """Say whether `configuration` has the setting, whose name has a dot for each level below the first."""
    first, _, rest = name.partition(".")
    if not is_dataclass(configuration) or first not in _names(configuration):
        return False
    return not rest or has_setting(getattr(configuration, first), rest)


def with_settings(configuration: T, settings: Mapping[str, Any]) -> T:
    """Return the frozen `configuration` with other `settings`.

    Raises:
        ConfigError: a setting is unknown (the message names the nearest valid one), of the wrong type or out of range.
    """
    for name, value in settings.items():
        configuration = _with(configuration, name, value)
    return configuration


def _with(configuration: Any, name: str, value: Any) -> Any:
    kind = type(configuration).__name__
    first, _, rest = name.partition(".")
    if first not in _names(configuration):
        raise unknown_name(f"setting of {kind}", first, _names(configuration))
    old = getattr(configuration, first)
    if rest:
        if not is_dataclass(old):
            raise ConfigError(f"{kind}.{first} is {old!r} and has no setting {rest!r}; set {first} itself")
        value = _with(old, rest, value)
    elif is_dataclass(old) and value is not None:
        inner = ", ".join(f"{first}.{own}" for own in _names(old))
        raise ConfigError(f"{kind}.{first} is made of settings of its own: {inner}; set one of these")
    elif isinstance(old, tuple) and not isinstance(value, tuple):
        value = tuple(value) if isinstance(value, list) else (value,)
    try:
        return replace(configuration, **{first: value})
    except OffPromptsError as error:
        raise ConfigError(f"{kind}: {error}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{kind}.{first}: cannot be {value!r} ({error}); the default is {old!r}") from error


def _names(configuration: Any) -> list[str]:
    return [field.name for field in fields(configuration) if field.init]
