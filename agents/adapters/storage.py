"""Adapters on disk: a JSON description, the catalogue as safetensors, and one file of the foreign library.

``agent.json`` names the other two by checksum. Most libraries have no format of their own but Python's pickle, and
reading a pickle runs whatever code is in it: such a file is opened only for ``trusted=True``.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load as deserialise, save as serialise

from offprompts_env.errors import MissingDependencyError, StorageError
from offprompts_env.manifest import write_atomic
from offprompts_env.types import PromptSet

FORMAT_VERSION = 1
_DESCRIPTION = "agent.json"


@dataclass(frozen=True)
class Stored:
    """An adapter, ready to be written.

    Attributes:
        kind: name of its class.
        distribution: name of the package that the content belongs to; its version is noted.
        content: the foreign agent, in the format of its library.
        prompts: the catalogue.
        settings: JSON-able.
    """

    kind: str
    distribution: str
    content: bytes
    prompts: PromptSet
    settings: Mapping[str, Any] = field(default_factory=dict)


def write_agent(stored: Stored, path: str | Path) -> Path:
    """Write `stored` into the directory `path`; one that is there already stays whole until the new one is.

    Raises:
        StorageError: the directory cannot be written.
    """
    directory = Path(path)
    embeddings = serialise({"embeddings": np.ascontiguousarray(stored.prompts.embeddings)})
    files = {_named("agent", stored.content, "bin"): stored.content}
    files[_named("prompts", embeddings, "safetensors")] = embeddings
    content, prompts = files
    description = {
        "format_version": FORMAT_VERSION,
        "kind": stored.kind,
        "distribution": stored.distribution,
        "version": version(stored.distribution),
        "settings": stored.settings,
        "prompt_texts": stored.prompts.texts,
        "content": content,
        "prompts": prompts,
        "sha256": {name: hashlib.sha256(bytes_).hexdigest() for name, bytes_ in files.items()},
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, bytes_ in files.items():
            write_atomic(directory / name, bytes_)
        write_atomic(directory / _DESCRIPTION, (json.dumps(description, indent=2) + "\n").encode())
        for old in (*directory.glob("agent-*.bin"), *directory.glob("prompts-*.safetensors")):
            if old.name not in files:
                old.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"agent: cannot write to {directory}: {error}; free some space or choose another path"
        ) from error
    return directory


def _named(stem: str, content: bytes, suffix: str) -> str:
    return f"{stem}-{hashlib.sha256(content).hexdigest()[:16]}.{suffix}"


def describe_agent(path: str | Path) -> dict[str, Any]:
    """Return what the description of the agent at `path` says: its ``kind``, ``distribution``, ``version``, ...

    Raises:
        StorageError: there is none, or it is of a newer format version.
    """
    directory = Path(path)
    try:
        described: dict[str, Any] = json.loads((directory / _DESCRIPTION).read_text(encoding="utf-8"))
        found, kind = described["format_version"], described["kind"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"agent: expected a directory that save wrote, with {_DESCRIPTION}, at {directory}, but {error!r}"
        ) from error
    if not isinstance(found, int) or found > FORMAT_VERSION:
        raise StorageError(
            f"agent: {directory} has format version {found}, this package reads up to {FORMAT_VERSION}; "
            "upgrade with: pip install -U offprompts-env"
        )
    if not isinstance(kind, str):
        raise StorageError(f"agent: expected the name of a class as 'kind' in {directory}, got {kind!r}; save it again")
    return described


def read_agent(path: str | Path, kind: str) -> Stored:
    """Read what :func:`write_agent` wrote of an adapter of class `kind`.

    Raises:
        StorageError: not such a directory, damaged, of another class or a newer format version.
    """
    directory, described = Path(path), describe_agent(path)
    if described["kind"] != kind:
        raise StorageError(
            f"agent: expected one of class {kind} at {directory}, got {described['kind']}; read it with that"
        )
    try:
        content, embeddings = (
            _read(directory, described[name], described["sha256"]) for name in ("content", "prompts")
        )
        texts = described["prompt_texts"]
        prompts = PromptSet(deserialise(embeddings)["embeddings"], None if texts is None else tuple(texts))
        return Stored(kind, described["distribution"], content, prompts, described["settings"])
    except StorageError:
        raise
    except Exception as error:
        raise StorageError(
            f"agent: the files in {directory} do not fit together or are damaged: {type(error).__name__}: {error}; "
            "save the agent again"
        ) from error


def read_pickled(path: str | Path, kind: str, *, trusted: bool) -> tuple[Stored, Any]:
    """Read what :func:`write_agent` wrote of an adapter whose content is a pickle, and what is in that.

    Whether the content is a pickle is the class's to say: the description comes from whoever wrote the directory.

    Args:
        path: the directory.
        kind: name of the class.
        trusted: the reader knows who wrote the files, and lets them run code.

    Raises:
        StorageError: as :func:`read_agent`, or not `trusted`.
    """
    if not trusted:
        raise StorageError(
            f"agent: {path} holds a pickle, which can run any code when it is read; if you wrote it yourself, pass "
            f"trusted=True: {kind}.load(path, trusted=True)"
        )
    stored = read_agent(path, kind)
    with reviving(path):
        return stored, pickle.loads(stored.content)


def _read(directory: Path, name: str, checksums: Mapping[str, str]) -> bytes:
    # A name, not a path: a description from elsewhere must not reach out of its directory.
    content = (directory / Path(name).name).read_bytes()
    actual = hashlib.sha256(content).hexdigest()
    if actual != checksums[name]:
        raise StorageError(
            f"agent: {directory / name} is damaged: expected SHA-256 {checksums[name]}, got {actual}; save it again"
        )
    return content


@contextmanager
def reviving(path: str | Path) -> Iterator[None]:
    """Say of whatever fails while an agent is made of what `path` holds that the files are damaged."""
    try:
        yield
    except (StorageError, MissingDependencyError):
        raise
    except Exception as error:
        raise StorageError(
            f"agent: {path} is damaged, or of another version of its library: {type(error).__name__}: {error}; save it "
            "again"
        ) from error
