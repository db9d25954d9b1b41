"""What a table cannot say by itself, as JSON beside it: the prompt catalogue, where it is from, and empty columns."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from offprompts_env.columns import column_types
from offprompts_env.config import identity
from offprompts_env.errors import DataError, OffPromptsError, StorageError
from offprompts_env.interchange.dataframe import catalogue_of
from offprompts_env.manifest import json_text
from offprompts_env.types import LoggedDataset, LogMetadata, PromptSet

FORMAT = "offprompts-table"
FORMAT_VERSION = 1
# Parquet readers refuse metadata of 100 MB, and the Arrow schema within holds them a second time.
_LARGEST = 1 << 25


@dataclass(frozen=True)
class Header:
    """What one of our tables says about itself.

    Attributes:
        prompts: the catalogue.
        metadata: provenance.
        empty: vectors of dimension 0, which have no column.
        place: the file, for messages.
    """

    prompts: PromptSet
    metadata: LogMetadata
    empty: tuple[str, ...]
    place: str


def header_text(log: LoggedDataset) -> str:
    """Return the header of `log` as JSON.

    Raises:
        DataError: the metadata is not JSON-able, or the catalogue is too large for a header.
    """
    embeddings = np.ascontiguousarray(log.prompts.embeddings, dtype="<f4")
    text = json_text(
        {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "empty": [name for name, kind in column_types(log).items() if kind == "float32[0]"],
            "metadata": asdict(log.metadata),
            "prompts": {
                "texts": log.prompts.texts,
                "fingerprint": log.prompts.fingerprint,
                "shape": embeddings.shape,
                "float32_base64": base64.b64encode(embeddings.tobytes()).decode(),
            },
        }
    )
    if len(text) > _LARGEST:
        raise DataError(
            f"prompts: expected a catalogue of at most {_LARGEST:,} bytes beside a table, got {len(text):,}; "
            "use LoggedDataset.save, which has a file for it"
        )
    return text


def parse_header(text: str | bytes, place: str) -> Header:
    """Return the header that one of our tables has.

    Raises:
        StorageError: it is damaged, or of a newer format version.
    """
    raw = _load(text)
    if raw is None or raw.get("format") != FORMAT:
        raise StorageError(f"{place}: expected a header of format {FORMAT!r}, cannot read it; pass prompts= yourself")
    version = raw.get("version")
    if type(version) is not int or version > FORMAT_VERSION:
        raise StorageError(
            f"{place}: expected format version {FORMAT_VERSION} or older, got {version!r}; "
            "upgrade with: pip install -U offprompts-env"
        )
    try:
        found = raw["prompts"]
        content = base64.b64decode(found["float32_base64"], validate=True)
        embeddings = np.frombuffer(content, dtype="<f4").astype(np.float32).reshape(found["shape"])
        prompts = PromptSet(embeddings, None if found["texts"] is None else tuple(found["texts"]))
        metadata = LogMetadata(**raw["metadata"])
        header = Header(prompts, metadata, tuple(raw["empty"]), place)
        fingerprint = found["fingerprint"]
    except (KeyError, TypeError, ValueError, OffPromptsError) as error:
        raise StorageError(
            f"{place}: damaged header: {type(error).__name__} {error}; write the file again, or pass prompts= yourself"
        ) from error
    if prompts.fingerprint != fingerprint:
        raise StorageError(
            f"{place}: expected prompts with fingerprint {fingerprint}, got {prompts.fingerprint}; write the file again"
        )
    return header


def is_header(text: str) -> bool:
    """Say whether `text` is meant as a header, be it damaged or not."""
    raw = _load(text)
    return raw is not None and raw.get("format") == FORMAT


def _load(text: str | bytes) -> dict[str, Any] | None:
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return raw if isinstance(raw, dict) else None


def same_header(headers: Sequence[Header]) -> Header | None:
    """Return the header that tables share; seed, versions and notes are those of the first.

    Raises:
        DataError: they are of different catalogues or environments; the message names two files.
    """
    for header in headers[1:]:
        first = headers[0]
        for what, expected, actual in (
            ("prompt catalogue", first.prompts.fingerprint, header.prompts.fingerprint),
            ("environment", first.metadata.env_id, header.metadata.env_id),
            (
                "environment config",
                json_text(identity(first.metadata.env_config)),
                json_text(identity(header.metadata.env_config)),
            ),
        ):
            if expected != actual:
                raise DataError(
                    f"{header.place}: expected the {what} {expected} as in {first.place}, got {actual}; read them apart"
                )
    return headers[0] if headers else None


def choose_prompts(
    given: PromptSet | Sequence[str] | None,
    embeddings: npt.ArrayLike | None,
    header: Header | None,
    distinct: Callable[[], PromptSet],
) -> PromptSet:
    """Return the catalogue: the `given` one, else that of the `header`, else the `distinct` texts that are there.

    Raises:
        DataError: texts without embeddings, or another catalogue than that of the header.
    """
    if given is None:
        if header is None:
            return distinct()
        return header.prompts if embeddings is None else PromptSet(np.asarray(embeddings), header.prompts.texts)
    prompts = catalogue_of(given, embeddings)
    # Embeddings may differ, as the caller may have another encoder; the prompts that actions index may not.
    if header is not None and (len(prompts), prompts.texts) != (len(header.prompts), header.prompts.texts):
        raise DataError(
            f"prompts: expected the {len(header.prompts)} prompts in {header.place}, got {len(prompts)} others; "
            "pass the catalogue that was recorded, or none to take that of the file"
        )
    return prompts
