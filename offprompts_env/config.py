"""Frozen configuration records made from keyword arguments, with messages that name the nearest valid setting."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, Self

from offprompts_env.errors import ConfigError, unknown_name

#: Settings of an environment that say how and where numbers are had, and not which: how much is computed at once and
#: on what, where sentences are kept, how patiently a server is asked. Rounding aside, rounds do not depend on them, so
#: a log may go on under others. The number type (`dtype`) is none of them: in half precision sentences differ.
INCIDENTAL = frozenset(
    {
        "device", "device_map", "batch_size", "max_batch_tokens", "sentence_store", "sentences",
        "api_key_env", "concurrency", "requests_per_second", "request_timeout", "deadline", "attempts", "first_wait",
        "longest_wait", "max_bytes", "check_identity",
    }
)  # fmt: skip


#: Further arguments of a model's loading that say where its layers are, and so are no more than `device_map`.
PLACEMENT = frozenset({"max_memory", "offload_folder", "offload_buffers", "low_cpu_mem_usage"})


def identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return `settings` without :data:`INCIDENTAL` ones, also inside the settings of a server or a model's loading."""
    kept = {name: value for name, value in settings.items() if name not in INCIDENTAL}
    if isinstance(server := kept.get("server"), Mapping):
        kept["server"] = identity(server)
    if isinstance(loading := kept.get("model_kwargs"), Mapping):
        kept["model_kwargs"] = not_placing(loading) or None
    return kept


def not_placing(model_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return `model_kwargs` without :data:`PLACEMENT`."""
    return {name: value for name, value in (model_kwargs or {}).items() if name not in PLACEMENT}


def read_object(name: str, text: str, example: str) -> dict[str, Any]:
    """Return the settings that an option `name` of the command line has as a JSON object.

    Raises:
        ConfigError: `text` is none.
    """
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{name}: expected a JSON object such as '{example}', got {text!r}; quote it")
    return found


class Config:
    """Mixin of frozen configuration dataclasses: JSON-able, made from keyword arguments."""

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Make the record from keyword arguments.

        Raises:
            ConfigError: a setting is unknown (the message names the nearest valid one) or out of range.
        """
        valid = cls.names()
        for name in settings:
            if name not in valid:
                raise unknown_name("setting", name, valid)
        return cls(**settings)

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of all settings."""
        return [f.name for f in fields(cls)]  # type: ignore[arg-type]

    def to_json(self) -> dict[str, Any]:
        """Return the settings as a JSON-able dict from which :meth:`from_settings` makes an equal record."""
        result: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # type: ignore[call-overload]
        return result


def check_integer(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raise :class:`ConfigError` unless `value` is an integer in [low, high]."""
    valid = isinstance(value, int) and not isinstance(value, bool) and value >= low
    if not valid or (high is not None and isinstance(value, int) and value > high):
        span = f"≥ {low}" if high is None else f"from {low} to {high}"
        raise ConfigError(f"{name}: expected an integer {span}, got {value!r}{_foreign(value)}")


def check_number(name: str, value: object, low: float = -math.inf, *, strict: bool = False) -> None:
    """Raise :class:`ConfigError` unless `value` is a finite number ≥ `low` (> `low` if `strict`)."""
    valid = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not valid or value < low or (strict and value == low):  # type: ignore[operator]
        bound = "" if low == -math.inf else f" {'>' if strict else '≥'} {low}"
        raise ConfigError(f"{name}: expected a finite number{bound}, got {value!r}{_foreign(value)}")


def check_kind(name: str, value: object, kind: type, remedy: str) -> None:
    """Raise :class:`ConfigError` unless `value` is a `kind`: an instance of a class, or like a protocol."""
    if isinstance(value, kind):
        return
    if getattr(kind, "_is_protocol", False):
        missing = [member for member in dir(kind) if not member.startswith("_") and not hasattr(value, member)]
        found = f"expected an object like {kind.__name__}, but {type(value).__name__} lacks {', '.join(missing)}"
    else:
        found = f"expected a {kind.__name__}, got {value!r:.80} of type {type(value).__name__}"
    raise ConfigError(f"{name}: {found}; {remedy}")


def _foreign(value: object) -> str:
    # Settings go into JSON, which knows no numbers of NumPy or torch.
    return "; make it a Python number with .item()" if hasattr(value, "item") else ""
