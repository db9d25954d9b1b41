"""Logged datasets from and to Hugging Face ``datasets``, by way of their Arrow tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import numpy.typing as npt

from offprompts_env.errors import DataError, missing_dependency
from offprompts_env.interchange.header import choose_prompts, header_text, is_header, parse_header
from offprompts_env.interchange.tables import (
    BLOCK_ROWS,
    Block,
    Columns,
    Fields,
    distinct_prompts,
    join,
    resolve,
    to_table,
    without_columns,
)
from offprompts_env.types import LoggedDataset, LogMetadata, PromptSet

if TYPE_CHECKING:
    import datasets

_PLACE = "the Hugging Face dataset"


def from_huggingface(
    dataset: datasets.Dataset | datasets.IterableDataset,
    prompts: PromptSet | Sequence[str] | None = None,
    *,
    embeddings: npt.ArrayLike | None = None,
    metadata: LogMetadata | None = None,
    **columns: Unpack[Columns],
) -> LoggedDataset:
    """Make a dataset from one of Hugging Face, in memory, on disk or streamed, with one row a round.

    Args:
        dataset: the rounds; with rows selected, shuffled or filtered as may be.
        prompts: the catalogue, or its texts together with `embeddings`. None takes the catalogue that
            :func:`to_huggingface` put beside the rows, or the names of a ``ClassLabel``, or else the distinct texts of
            the action column, sorted; the latter two are one-hot unless `embeddings` are passed.
        embeddings: (A, d_e), where `prompts` are texts.
        metadata: provenance; by default what :func:`to_huggingface` put beside the rows.
        columns: which column is what; see :class:`offprompts_env.interchange.tables.Columns`.

    Raises:
        DataError: no dataset, a column is missing, or a cell has the wrong type, length or range; the message names
            column and row (counted from 0), expected and actual.
        ActionError: an action is not in the catalogue.
        ConfigError: `columns` has an unknown field.
        StorageError: the catalogue beside the rows is damaged or of a newer version.
        MissingDependencyError: the package ``datasets`` is not installed.
    """
    library = _library()
    if not isinstance(dataset, library.Dataset | library.IterableDataset):
        splits = f"; choose a split: {', '.join(map(repr, dataset))}" if isinstance(dataset, dict) else ""
        raise DataError(
            f"dataset: expected a datasets.Dataset, got {type(dataset).__name__}"
            f"{splits or '; read one with datasets.load_from_disk or datasets.load_dataset'}"
        )
    wanted = Fields.of(columns)
    description = dataset.info.description or ""
    header = parse_header(description, _PLACE) if is_header(description) else None
    if header is not None:
        wanted = without_columns(wanted, header.empty)

    def distinct() -> PromptSet:
        label = (dataset.features or {}).get(wanted.action)
        if isinstance(label, library.ClassLabel):
            return PromptSet(
                np.eye(len(label.names)) if embeddings is None else np.asarray(embeddings), tuple(label.names)
            )
        return distinct_prompts(_blocks(dataset, wanted, actions_only=True), embeddings)

    catalogue = choose_prompts(prompts, embeddings, header, distinct)
    if metadata is None:
        metadata = LogMetadata() if header is None else header.metadata
    return join(_blocks(dataset, wanted), catalogue, metadata, _PLACE)


def to_huggingface(log: LoggedDataset) -> datasets.Dataset:
    """Return `log` as a ``datasets.Dataset``, which :func:`from_huggingface` reads back as it was.

    Columns are those of :func:`offprompts_env.interchange.to_parquet`. The catalogue and the provenance are JSON in
    ``dataset.info.description``, which ``save_to_disk``, ``select``, ``shuffle`` and ``filter`` keep.
    ``to_parquet`` and ``to_iterable_dataset`` of ``datasets``, and its hub, do not: pass `prompts` when you read from
    there.

    Raises:
        DataError: a text is not valid Unicode, the metadata is not JSON-able, or the catalogue is too large.
        MissingDependencyError: the package ``datasets`` is not installed.
    """
    library = _library()
    return library.Dataset(to_table(log), info=library.DatasetInfo(description=header_text(log)))


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise missing_dependency("datasets", "datasets", "reading and making Hugging Face datasets") from error
    return datasets


def _place(start: int, row: int) -> str:
    return f"row {start + row} of {_PLACE}"


def _blocks(dataset: Any, wanted: Fields, *, actions_only: bool = False) -> Iterator[Block]:
    """Yield the rows as Arrow tables; of a dataset that knows its columns, those that are needed."""
    import pyarrow as pa

    start = 0
    layout = None
    if dataset.features is not None:
        layout = resolve(dataset.features.arrow_schema, wanted, _PLACE)
        if actions_only:
            layout = {"action": layout["action"]}
        sources = {source for found in layout.values() for source in found}
        names = dataset.features
        dataset = dataset.select_columns(
            sorted({source if source in names else source.split(".")[0] for source in sources})
        )
    tables = dataset.with_format("arrow").iter(BLOCK_ROWS)
    while True:
        try:
            table = next(tables, None)
        except pa.ArrowException as error:
            raise DataError(
                f"{_PLACE}: cannot read after row {start}: {error}; make a datasets.Dataset of it first, which has "
                "the same types in all rows"
            ) from error
        if table is None:
            return
        yield Block(table, layout or resolve(table.schema, wanted, _PLACE), partial(_place, start))
        start += table.num_rows
