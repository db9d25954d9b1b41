"""Records: how policies and reward models are written to a directory, and read back with the same bits.

``<stem>.json`` says what was written, and names ``<stem>-<checksum>.safetensors`` beside it. A class takes part by a
method ``to_record``, a class method ``from_record``, and the decorator :func:`recorded`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

from safetensors.numpy import load as deserialise, save as serialise

from offprompts_env.errors import OffPromptsError, StorageError, unknown_name
from offprompts_env.manifest import write_atomic
from offprompts_env.types import Array

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Record:
    """What a policy or a reward model is made of, ready to be written.

    Attributes:
        kind: name of its class.
        settings: JSON-able.
        tensors: arrays by name.
    """

    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Array] = field(default_factory=dict)

    @classmethod
    def of_parts(cls, kind: str, settings: Mapping[str, Any], parts: Mapping[str, Record]) -> Record:
        """Return the record of something that is made of other records; :meth:`part` gives them back."""
        inner = {name: {"kind": part.kind, **part.settings} for name, part in parts.items()}
        tensors = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.tensors.items()}
        return cls(kind, {**settings, **inner}, tensors)

    def part(self, name: str) -> Record:
        """Return the record that :meth:`of_parts` was given as `name`."""
        settings = dict(self.settings[name])
        tensors = {
            key.removeprefix(f"{name}."): value for key, value in self.tensors.items() if key.startswith(f"{name}.")
        }
        return Record(settings.pop("kind"), settings, tensors)


@runtime_checkable
class Recordable(Protocol):
    """Something that can be written to a file and read back."""

    def to_record(self) -> Record:
        """Return what it is made of."""
        ...


class _Revivable(Recordable, Protocol):
    @classmethod
    def from_record(cls, record: Record) -> Self:
        """Inverse of :meth:`to_record`."""
        ...


RevivableT = TypeVar("RevivableT", bound=_Revivable)

_KINDS: dict[str, dict[str, Callable[[Record], Any]]] = {}


def recorded(what: str) -> Callable[[type[RevivableT]], type[RevivableT]]:
    """Return a decorator that makes a class known to :func:`revive` as a kind of `what`."""

    def register(kind: type[RevivableT]) -> type[RevivableT]:
        _KINDS.setdefault(what, {})[kind.__name__] = kind.from_record
        return kind

    return register


def kinds(what: str) -> list[str]:
    """Return the names of the known kinds of `what`."""
    return sorted(_KINDS[what])


def revive(record: Record, what: str) -> Any:
    """Make again what gave `record`.

    Raises:
        ConfigError: not a known kind of `what`.
    """
    if record.kind not in _KINDS[what]:
        raise unknown_name(what, record.kind, _KINDS[what])
    return _KINDS[what][record.kind](record)


def save_record(record: Record, path: str | Path, *, what: str, stem: str) -> Path:
    """Write `record` into the directory `path`, which is made if need be.

    Args:
        record: what is written.
        path: the directory.
        what: what error messages call it.
        stem: of the names of both files.

    Raises:
        StorageError: the directory cannot be written.
    """
    directory = Path(path)
    content = serialise(dict(record.tensors))
    checksum = hashlib.sha256(content).hexdigest()
    weights = f"{stem}-{checksum[:16]}.safetensors"
    description = {
        "format_version": FORMAT_VERSION,
        "kind": record.kind,
        "settings": record.settings,
        "weights": weights,
        "sha256": checksum,
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomic(directory / weights, content)
        # What was here before stays whole until this is.
        write_atomic(directory / f"{stem}.json", (json.dumps(description, indent=2) + "\n").encode())
        for old in directory.glob(f"{stem}-*.safetensors"):
            if old.name != weights:
                old.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"{what}: cannot write to {directory}: {error}; free some space or choose another path"
        ) from error
    return directory


def load_record(path: str | Path, *, what: str, stem: str) -> Any:
    """Make again what :func:`save_record` wrote into the directory `path`.

    Raises:
        ConfigError: not a known kind of `what`.
        StorageError: not such a directory, damaged, or of a newer format version.
    """
    directory = Path(path)
    try:
        description = json.loads((directory / f"{stem}.json").read_text(encoding="utf-8"))
        version = description["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{what}: expected a directory that save wrote, with {stem}.json, at {directory}, but {error!r}"
        ) from error
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise StorageError(
            f"{what}: {directory} has format version {version}, this package reads up to {FORMAT_VERSION}; "
            "upgrade with: pip install -U offprompts-env"
        )
    if description.get("kind") not in _KINDS[what]:
        raise unknown_name(what, description.get("kind"), _KINDS[what])
    try:
        content = (directory / description["weights"]).read_bytes()
        expected, actual = description["sha256"], hashlib.sha256(content).hexdigest()
        if actual == expected:
            return revive(Record(description["kind"], description["settings"], deserialise(content)), what)
    except OffPromptsError:
        raise
    except Exception as error:
        raise StorageError(
            f"{what}: the files in {directory} do not fit together or are damaged: "
            f"{type(error).__name__}: {error}; save the {what} again"
        ) from error
    raise StorageError(
        f"{what}: {directory / description['weights']} is damaged: expected SHA-256 {expected}, got {actual}; "
        f"save the {what} again"
    )
