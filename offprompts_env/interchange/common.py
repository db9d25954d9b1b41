"""What the formats share: saying once what is dropped, splitting vectors, and whole text files."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from offprompts_env.errors import DimensionError, StorageError
from offprompts_env.types import FloatArray, LoggedDataset, LogMetadata

_WORDS = {
    "propensity": "propensities",
    "output": "output embeddings",
    "sentence": "sentences",
    "user_id": "user ids",
    "item_id": "item ids",
    "query_text": "query texts",
    "oracle": "expected rewards",
    "embeddings": "prompt embeddings",
    "texts": "prompt texts",
    "metadata": "provenance",
}


def warn_dropped(log: LoggedDataset, what: str, *holds: str) -> None:
    """Say in one warning what `log` has beside contexts, actions and rewards that the format `what` does not hold.

    Args:
        log: what is exported.
        what: name of the format.
        holds: fields of the log that it holds; ``embeddings`` and ``texts`` are those of the prompts.
    """
    there = {
        name: getattr(log, name) is not None for name in ("sentence", "user_id", "item_id", "query_text", "oracle")
    }
    there |= {
        "propensity": not np.isnan(log.propensity).all(),
        "output": log.output.shape[1] > 0,
        "embeddings": True,
        "texts": log.prompts.texts is not None,
        "metadata": log.metadata != LogMetadata(),
    }
    dropped = [words for name, words in _WORDS.items() if there[name] and name not in holds]
    if dropped:
        warnings.warn(
            f"{what} cannot hold {', '.join(dropped)}: dropped; keep the log itself (log.save) to have them again",
            stacklevel=3,
        )


def split_observation(observation: FloatArray, context_dim: int | None) -> tuple[FloatArray, FloatArray]:
    """Return context (n, d_x) and query (n, d_q) of `observation` = [x, q]; without `context_dim` all is context.

    Raises:
        DimensionError: the observation has fewer dimensions.
    """
    width = observation.shape[1]
    d = width if context_dim is None else context_dim
    if not 0 <= d <= width:
        raise DimensionError(
            f"context_dim: expected a number from 0 to {width}, the dimension of an observation [x, q], got {d}"
        )
    return observation[:, :d], observation[:, d:]


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that is there as a whole afterwards, in place of an older one, or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot write: {error}; pass a file in a directory that has space left") from error
    finally:
        temporary.unlink(missing_ok=True)
