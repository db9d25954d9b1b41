"""Logged datasets from CSV files; ``log.to_dataframe().to_csv(path, index=False)`` writes one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy.typing as npt

from offprompts_env.errors import DataError
from offprompts_env.interchange.files import Files, find_files
from offprompts_env.interchange.header import choose_prompts
from offprompts_env.interchange.tables import Block, Columns, Fields, Layout, distinct_prompts, join, resolve
from offprompts_env.types import LoggedDataset, LogMetadata, PromptSet

if TYPE_CHECKING:
    import pyarrow as pa

# Bytes that are read at once; a row has to fit.
_BLOCK = 1 << 24


def from_csv(
    files: Files,
    prompts: PromptSet | Sequence[str] | None = None,
    *,
    embeddings: npt.ArrayLike | None = None,
    metadata: LogMetadata | None = None,
    **columns: Unpack[Columns],
) -> LoggedDataset:
    """Make a dataset from CSV files with a line of names and one row a round; ``.gz`` files are unpacked.

    Vectors are numbered columns or a sequence of names. An empty cell is an unknown propensity, or an empty text.

    Args:
        files: a file, a directory, a glob pattern, or paths; see :func:`offprompts_env.interchange.files.find_files`.
        prompts: as in :func:`offprompts_env.interchange.from_json_lines`.
        embeddings: (A, d_e), where `prompts` are texts.
        metadata: provenance.
        columns: which column is what; see :class:`offprompts_env.interchange.tables.Columns`.

    Raises:
        StorageError: a file is missing.
        DataError: a file is no CSV file, a column is missing, or a cell has the wrong type or range; the message names
            the file.
        ActionError: an action is not in the catalogue.
        ConfigError: `columns` has an unknown field.

    Warns:
        UserWarning: two files have the same content.
    """
    found = find_files(files, ".csv", ".csv.gz")
    wanted = Fields.of(columns)
    catalogue = choose_prompts(
        prompts, embeddings, None, lambda: distinct_prompts(_blocks(found, wanted, actions_only=True), embeddings)
    )
    return join(_blocks(found, wanted), catalogue, metadata if metadata is not None else LogMetadata(), str(files))


def _blocks(files: Sequence[Path], wanted: Fields, *, actions_only: bool = False) -> Iterator[Block]:
    import pyarrow as pa

    for file in files:
        start = 0
        try:
            with _open(file) as reader:
                schema = reader.schema
            layout = resolve(schema, wanted, str(file))
            if actions_only:
                layout = {"action": layout["action"]}
            with _open(file, **_types(schema, layout)) as reader:
                for batch in reader:
                    yield Block(pa.Table.from_batches([batch]), layout, partial(_place, file, start))
                    start += batch.num_rows
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: expected CSV with the same types in all rows: {error}") from error


def _types(schema: pa.Schema, layout: Layout) -> dict[str, Any]:
    """Return what to read, and as what: types of the first block that may not fit the later ones are widened."""
    import pyarrow as pa

    types: dict[str, pa.DataType] = {}
    for name, sources in layout.items():
        for source in sources:
            kind = schema.field(source).type
            if name in ("sentence", "query_text"):
                types[source] = pa.string()
            elif pa.types.is_null(kind) or (pa.types.is_integer(kind) and name not in ("action", "user_id", "item_id")):
                types[source] = pa.float64()
            else:
                types[source] = kind
    return {"include_columns": list(types), "column_types": types}


def _open(file: Path, **convert: Any) -> Any:
    import pyarrow.csv as pa_csv

    return pa_csv.open_csv(
        file,
        read_options=pa_csv.ReadOptions(block_size=_BLOCK, use_threads=False),
        parse_options=pa_csv.ParseOptions(newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(**convert),
    )


def _place(file: Path, start: int, row: int) -> str:
    return f"row {start + row} of {file}"
