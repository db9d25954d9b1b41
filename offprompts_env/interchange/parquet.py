"""Logged datasets from anybody's Parquet files, and to one plain Parquet file for other tools."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy.typing as npt

from offprompts_env.errors import DataError, StorageError
from offprompts_env.interchange.common import whole_file
from offprompts_env.interchange.files import Files, find_files
from offprompts_env.interchange.header import Header, choose_prompts, header_text, parse_header, same_header
from offprompts_env.interchange.tables import (
    BLOCK_ROWS,
    LONGEST_TEXT,
    Block,
    Columns,
    Fields,
    Layout,
    distinct_prompts,
    join,
    resolve,
    rounds,
    to_table,
    without_columns,
)
from offprompts_env.storage import Mode, ShardWriter
from offprompts_env.types import LoggedDataset, LogMetadata, PromptSet

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_KEY = b"offprompts"
_SUFFIXES = (".parquet", ".pq")


def from_parquet(
    files: Files,
    prompts: PromptSet | Sequence[str] | None = None,
    *,
    embeddings: npt.ArrayLike | None = None,
    metadata: LogMetadata | None = None,
    **columns: Unpack[Columns],
) -> LoggedDataset:
    """Make a dataset from Parquet files with one row a round; only the columns that are needed are read.

    Args:
        files: a file, a directory, a glob pattern, or paths; see :func:`offprompts_env.interchange.files.find_files`.
        prompts: the catalogue, or its texts together with `embeddings`. None takes the catalogue that
            :func:`to_parquet` put into the file, or else the distinct texts of the action column, sorted; these have
            one-hot embeddings unless `embeddings` are passed, so learners see no likeness between them.
        embeddings: (A, d_e), where `prompts` are texts.
        metadata: provenance; by default what :func:`to_parquet` put into the file.
        columns: which column is what; see :class:`offprompts_env.interchange.tables.Columns`.

    Raises:
        StorageError: a file is missing, is no Parquet file, or was written by a newer version of this package.
        DataError: a column is missing, or a cell has the wrong type, length or range; the message names file, column
            and row (counted from 0), expected and actual. Or files disagree about their prompts or columns.
        ActionError: an action is not in the catalogue.
        ConfigError: `columns` has an unknown field.

    Warns:
        UserWarning: two files have the same content.
    """
    source = _Source(find_files(files, *_SUFFIXES), columns)
    catalogue = source.prompts(prompts, embeddings)
    return join(source.blocks(), catalogue, source.metadata(metadata), str(files))


def convert_parquet(
    files: Files,
    path: str | Path,
    prompts: PromptSet | Sequence[str] | None = None,
    *,
    mode: Mode = "refuse",
    embeddings: npt.ArrayLike | None = None,
    metadata: LogMetadata | None = None,
    **columns: Unpack[Columns],
) -> Path:
    """Write the rounds of Parquet files as a log of this package, which may be larger than memory; return `path`.

    Read it with ``op.LogStream.open(path)`` or ``op.LoggedDataset.load(path)``.

    Args:
        files: as in :func:`from_parquet`.
        path: directory of the log.
        prompts: as in :func:`from_parquet`.
        mode: what to do where there are rows already: refuse, append to them, or overwrite them.
        embeddings: as in :func:`from_parquet`.
        metadata: as in :func:`from_parquet`.
        columns: as in :func:`from_parquet`.

    Raises:
        StorageError: as :func:`from_parquet`, or the log cannot be written; rows before the error are in the log.
        DataError: as :func:`from_parquet`.
        ActionError: an action is not in the catalogue.
    """
    source = _Source(find_files(files, *_SUFFIXES), columns)
    catalogue = source.prompts(prompts, embeddings)
    with ShardWriter(path, catalogue, source.metadata(metadata), mode=mode) as writer:
        for part in rounds(source.blocks(), catalogue):
            writer.append(part)
        if writer.rows == 0:
            raise DataError(f"{files}: expected at least one round, got none; record some first")
    return writer.path


def to_parquet(log: LoggedDataset, path: str | Path) -> Path:
    """Write one plain Parquet file, which :func:`from_parquet` reads back as it was; return its path.

    Vectors are FixedSizeList<float>, a column ``prompt`` has the text of the action, an unknown propensity is null,
    ``expected_reward`` is the oracle. The catalogue and the provenance are JSON in the schema's metadata, under the key
    ``offprompts``. Encodings and compression are those that all readers know. A file at `path` is replaced when the
    new one is whole.

    Raises:
        DataError: a text is not valid Unicode, the metadata is not JSON-able, or the catalogue is too large.
        StorageError: the file cannot be written.
    """
    import pyarrow.parquet as pq

    target = Path(path)
    table = to_table(log).replace_schema_metadata({_KEY: header_text(log).encode()})
    with whole_file(target) as handle:
        pq.write_table(
            table,
            handle,
            row_group_size=1 << 18,
            compression="snappy",
            use_dictionary=[name for name in ("action", "prompt", "query_text") if name in table.column_names],
            write_statistics=False,
        )
    return target


class _Source:
    """Parquet files, with what their footers say; rows are read when they are asked for."""

    def __init__(self, files: Sequence[Path], columns: Columns) -> None:
        self._files = files
        self._wanted = Fields.of(columns)
        headers = []
        self._bare: Path | None = None
        for file in self._files:
            found = _open(file).schema_arrow.metadata or {}
            if _KEY in found:
                headers.append(parse_header(found[_KEY], str(file)))
            else:
                self._bare = file
        self._header: Header | None = same_header(headers)

    def prompts(self, given: PromptSet | Sequence[str] | None, embeddings: npt.ArrayLike | None) -> PromptSet:
        if given is None and self._header is not None and self._bare is not None:
            raise DataError(
                f"{self._bare}: expected a prompt catalogue as in {self._header.place}, it has none; pass prompts="
            )

        def distinct() -> PromptSet:
            return distinct_prompts(self.blocks(actions_only=True), embeddings)

        return choose_prompts(given, embeddings, self._header, distinct)

    def metadata(self, given: LogMetadata | None) -> LogMetadata:
        if given is not None:
            return given
        return LogMetadata() if self._header is None else self._header.metadata

    def blocks(self, *, actions_only: bool = False) -> Iterator[Block]:
        """Yield the rows in order, a bounded number of them at a time."""
        wanted = self._wanted if self._header is None else without_columns(self._wanted, self._header.empty)
        for file in self._files:
            layout = resolve(_open(file).schema_arrow, wanted, str(file))
            if actions_only:
                layout = {"action": layout["action"]}
            yield from _read(file, layout)


def _place(file: Path, start: int, row: int) -> str:
    return f"row {start + row} of {file}"


def _read(file: Path, layout: Layout) -> Iterator[Block]:
    import pyarrow as pa

    sources = list(dict.fromkeys(source for found in layout.values() for source in found))
    opened = _open(file)
    # A text that is stored once and meant in every row would be copied into every row otherwise.
    repeated = _check_texts_of(file, opened, sources)
    start = 0
    batches = _open(file, read_dictionary=repeated).iter_batches(BLOCK_ROWS, columns=sources)
    while True:
        try:
            batch = next(batches, None)
        except (pa.ArrowException, OSError) as error:
            raise StorageError(f"{file}: cannot read after row {start}: {error}; restore it from a copy") from error
        if batch is None:
            return
        yield Block(pa.Table.from_batches([batch]), layout, partial(_place, file, start))
        start += batch.num_rows


def _check_texts_of(file: Path, opened: pq.ParquetFile, sources: Sequence[str]) -> list[str]:
    """Return the text columns that are stored as dictionaries; refuse texts that are too long, from the footer alone.

    Raises:
        DataError: a column is larger than all its rows at the greatest length of a text.
    """
    footer, found = opened.metadata, []
    for i in range(len(opened.schema)):
        leaf = opened.schema.column(i)
        if leaf.path not in sources or leaf.physical_type != "BYTE_ARRAY":
            continue
        chunks = [(footer.row_group(g).num_rows, footer.row_group(g).column(i)) for g in range(footer.num_row_groups)]
        for rows, chunk in chunks:
            if chunk.total_uncompressed_size > (rows + 1) * LONGEST_TEXT:
                raise DataError(
                    f"{leaf.path}: expected texts of at most {LONGEST_TEXT:,} bytes, {file} has {rows} rows with "
                    f"{chunk.total_uncompressed_size:,} bytes of it; shorten them, or leave the column out"
                )
        if any(chunk.has_dictionary_page for _, chunk in chunks):
            found.append(leaf.path)
    return found


def _open(file: Path, **options: Any) -> pq.ParquetFile:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file, **options)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{file}: expected a Parquet file, cannot read it: {error}") from error
