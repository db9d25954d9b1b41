"""From Arrow tables, whatever they were read from, to logged rounds: all checks are here, and each names its place.

No cell becomes a Python object before its type and length are known, and no row is looped over: texts are taken from
Arrow at once, numbers are views of its buffers.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self, TypedDict

import numpy as np
import numpy.typing as npt

from offprompts_env.columns import check_texts, column_types, concatenate, make_dataset
from offprompts_env.errors import ActionError, DataError, PropensityError, unknown_name
from offprompts_env.interchange.dataframe import Vector, numbered_columns
from offprompts_env.types import Array, FloatArray, IntArray, LoggedDataset, LogMetadata, PromptSet

if TYPE_CHECKING:
    import pyarrow as pa

# Rows that are converted at once.
BLOCK_ROWS = 1 << 16
# Bytes of a text. A cell beyond is no sentence, but a mistake or an attack, and is refused before it fills memory.
LONGEST_TEXT = 1 << 20
# So many texts as one-hot prompts take 64 MiB.
_MOST_ONE_HOT = 1 << 12
_VECTORS = ("context", "query", "output")
_TEXTS = ("sentence", "query_text")
_IDS = ("user_id", "item_id")
_OPTIONAL = ("propensity", *_TEXTS, *_IDS, "expected_reward")


class Columns(TypedDict, total=False):
    """Which column is what; as in :func:`offprompts_env.interchange.from_dataframe`, and with the same defaults.

    A name may be a path into nested columns: ``"user.features"`` is the field ``features`` of the column ``user``,
    unless a column is called so. A vector is a column of lists of one length (of whatever Arrow list type), a column of
    numbers, a prefix of numbered columns, or a sequence of names.
    """

    context: Vector
    query: Vector | None
    action: str
    reward: str
    output: Vector | None
    propensity: str | None
    sentence: str | None
    user_id: str | None
    item_id: str | None
    query_text: str | None
    expected_reward: str | None


@dataclass(frozen=True, slots=True)
class Fields:
    """:class:`Columns` with their defaults."""

    context: Vector = "context"
    query: Vector | None = "query"
    action: str = "action"
    reward: str = "reward"
    output: Vector | None = "output"
    propensity: str | None = None
    sentence: str | None = None
    user_id: str | None = None
    item_id: str | None = None
    query_text: str | None = None
    expected_reward: str | None = None

    @classmethod
    def of(cls, columns: Columns) -> Self:
        """Return the mapping of a caller.

        Raises:
            ConfigError: there is no such field.
        """
        valid = [field.name for field in fields(cls)]
        for name in columns:
            if name not in valid:
                raise unknown_name("column", name, valid)
        return cls(**columns)

    def named(self) -> list[str]:
        """Return all names, defaults included, that may be those of columns."""
        found: list[str] = []
        for field in fields(self):
            given = getattr(self, field.name)
            if given is None:
                given = field.name if field.name in _OPTIONAL else ()
            found += [given] if isinstance(given, str) else given
        return found


# Field to the columns that it comes from; a field that is not there has none.
Layout = dict[str, list[str]]


@dataclass(frozen=True)
class Block:
    """Rows that were read.

    Attributes:
        table: their columns.
        layout: which column is what.
        place: row of the block to where that is, for messages, such as "row 7 of part-0.parquet".

    Raises:
        DataError: texts that are not Unicode, or offsets and indices that lead out of their column: what a reader takes
            on trust, and what would crash later.
    """

    table: pa.Table
    layout: Layout
    place: Callable[[int], str]

    def __post_init__(self) -> None:
        import pyarrow as pa

        try:
            self.table.validate(full=True)
        except pa.ArrowException as error:
            raise DataError(f"damaged rows from {self.place(0)} on: {error}; restore them from a copy") from error


def resolve(schema: pa.Schema, wanted: Fields, place: str) -> Layout:
    """Say which columns of `schema` the fields come from.

    Raises:
        DataError: a column is missing, or there are two of that name; the message names `place`.
    """
    layout: Layout = {name: _vector_columns(schema, getattr(wanted, name), name, place) for name in _VECTORS}
    layout |= {name: [_existing(schema, getattr(wanted, name), name, place)] for name in ("action", "reward")}
    for name in _OPTIONAL:
        given = getattr(wanted, name)
        # An empty name leaves out a column that would be found by itself.
        if given != "" and (given is not None or name in schema.names):
            layout[name] = [_existing(schema, name if given is None else given, name, place)]
    return layout


def _exists(schema: pa.Schema, source: str) -> bool:
    import pyarrow as pa

    if source in schema.names:
        return True
    first, *rest = source.split(".")
    if not rest or first not in schema.names:
        return False
    kind = schema.field(first).type
    for part in rest:
        if not pa.types.is_struct(kind) or kind.get_field_index(part) < 0:
            return False
        kind = kind.field(part).type
    return True


def _existing(schema: pa.Schema, source: str, name: str, place: str) -> str:
    if schema.names.count(source) > 1:
        raise DataError(
            f"{name}: expected one column {source!r}, {place} has {schema.names.count(source)} of that name"
        )
    if not _exists(schema, source):
        near = difflib.get_close_matches(source, schema.names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(
            f"{name}: expected a column {source!r}, {place} has none; {hint}pass {name}= the name of the column"
        )
    return source


def _vector_columns(schema: pa.Schema, source: Vector | None, name: str, place: str) -> list[str]:
    if source is None:
        return []
    if not isinstance(source, str):
        return [_existing(schema, column, name, place) for column in source]
    if _exists(schema, source):
        return [_existing(schema, source, name, place)]
    numbered = numbered_columns(schema.names, source, name, place)
    return [_existing(schema, column, name, place) for column in numbered]


def join(blocks: Iterable[Block], prompts: PromptSet, metadata: LogMetadata, what: str) -> LoggedDataset:
    """Return the rounds of all blocks as one dataset; raises as :func:`rounds`, and where `what` has no rows."""
    parts = list(rounds(blocks, prompts))
    if not parts:
        raise DataError(f"{what}: expected at least one round, got none; record some first")
    return concatenate(parts, metadata)


def rounds(blocks: Iterable[Block], prompts: PromptSet) -> Iterator[LoggedDataset]:
    """Yield the rounds of each block that has rows.

    Raises:
        DataError: a cell has the wrong type, length or range, or blocks differ in their columns; the message names the
            column, the row and the file.
        ActionError: an action is not in the catalogue.
    """
    first: tuple[dict[str, str], str] | None = None
    for block in blocks:
        if block.table.num_rows == 0:
            continue
        part = _convert(block, prompts)
        types = column_types(part)
        if first is None:
            first = types, block.place(0)
        if types != first[0]:
            name = next(name for name in {**first[0], **types} if types.get(name) != first[0].get(name))
            raise DataError(
                f"{name}: expected {first[0].get(name, 'none')} as in {first[1]}, got {types.get(name, 'none')} in "
                f"{block.place(0)}; bring both to the same columns, or read them apart"
            )
        yield part


def _convert(block: Block, prompts: PromptSet) -> LoggedDataset:
    columns: dict[str, Array] = {name: _vector(block, name) for name in _VECTORS}
    columns["action"] = _actions(block, prompts)
    columns["reward"] = _finite(block, "reward", _single(_numbers(block, block.layout["reward"][0])))
    columns["propensity"] = _propensities(block)
    columns |= {name: _texts(block, name) for name in _TEXTS if name in block.layout}
    columns |= {name: _integers(block, name) for name in _IDS if name in block.layout}
    if "expected_reward" in block.layout:
        columns["expected_reward"] = _single(_numbers(block, block.layout["expected_reward"][0], missing=True))
    return make_dataset(columns, prompts, LogMetadata())


def _column(block: Block, source: str) -> pa.Array:
    """Return a column, or a field of a nested one, as one array of a storage type."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if source in block.table.column_names:
        column = block.table.column(source)
    else:
        first, *rest = source.split(".")
        column = pc.struct_field(block.table.column(first), rest)
    array = column.combine_chunks()
    return array.storage if isinstance(array, pa.ExtensionArray) else array


def _refuse(block: Block, source: str, row: int, expected: str, actual: object, advice: str = "") -> DataError:
    return DataError(f"{source}: expected {expected}, got {actual} in {block.place(row)}{advice and '; ' + advice}")


def _first(wrong: npt.ArrayLike) -> int:
    return int(np.argmax(np.asarray(wrong)))


def _numbers(block: Block, source: str, *, missing: bool = False) -> Array:
    """Return a column of numbers as it is; empty cells become NaN where `missing` allows them."""
    import pyarrow as pa

    array = _column(block, source)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if array.null_count and not missing:
        raise _refuse(block, source, _first(array.is_null()), "a number", None, "fill or drop empty cells")
    return _as_numbers(array, lambda: _no_numbers(block, source, array))


def _no_numbers(block: Block, source: str, array: pa.Array) -> DataError:
    """Return the error for a column of something else; of texts it names the first that is no number."""
    for row, cell in enumerate(array.to_pylist()) if _is_text(block, source) else ():
        try:
            float(cell or 0)
        except ValueError:
            return _refuse(block, source, row, "a number", repr(cell)[:80], "repair it, or leave the cell empty")
    return _refuse(block, source, 0, "numbers", array.type, "convert the column")


def _as_numbers(array: pa.Array, refuse: Callable[[], DataError]) -> Array:
    import pyarrow as pa

    kind = array.type
    if pa.types.is_boolean(kind):
        array = array.cast(pa.uint8())
    elif pa.types.is_decimal(kind) or pa.types.is_null(kind):
        array = array.cast(pa.float64())
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise refuse()
    return np.asarray(array.to_numpy(zero_copy_only=False))


def _single(values: Array) -> FloatArray:
    # What is too large becomes infinite, which the next check names.
    with np.errstate(over="ignore"):
        return values.astype(np.float32, copy=False)


def _finite(block: Block, source: str, values: FloatArray) -> FloatArray:
    # A sum is a cheap first look: it is finite unless an element is not.
    if not np.isfinite(values.sum(dtype=np.float64)):
        bad = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
        if bad.any():
            row = _first(bad)
            raise _refuse(block, source, row, "finite numbers that fit into float32", values[row], "repair or drop it")
    return values


def _vector(block: Block, name: str) -> FloatArray:
    sources = block.layout[name]
    if len(sources) == 1:
        array = _column(block, sources[0])
        if hasattr(array, "flatten") and not _is_struct(array):
            return _finite(block, sources[0], _lists(block, sources[0], array))
    matrix = np.empty((block.table.num_rows, len(sources)), dtype=np.float32)
    for i, source in enumerate(sources):
        matrix[:, i] = _finite(block, source, _single(_numbers(block, source)))
    return matrix


def _is_struct(array: pa.Array) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_struct(array.type))


def _lists(block: Block, source: str, array: pa.Array) -> FloatArray:
    import pyarrow as pa
    import pyarrow.compute as pc

    expected = "a list of numbers"
    if array.null_count:
        raise _refuse(block, source, _first(array.is_null()), expected, None, "fill or drop empty cells")
    if pa.types.is_fixed_size_list(array.type):
        width = array.type.list_size
    else:
        lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
        width = int(lengths[0])
        if (wrong := lengths != width).any():
            row = _first(wrong)
            raise _refuse(block, source, row, f"{width} numbers as in {block.place(0)}", lengths[row])
    flat = array.flatten()
    if flat.null_count and width:
        row = _first(flat.is_null()) // width
        raise _refuse(block, source, row, expected, array[row].as_py())
    values = _as_numbers(flat, lambda: _refuse(block, source, 0, expected, array.type))
    return _single(values).reshape(len(array), width)


def _propensities(block: Block) -> FloatArray:
    if "propensity" not in block.layout:
        return np.full(block.table.num_rows, math.nan)
    (source,) = block.layout["propensity"]
    values = _numbers(block, source, missing=True).astype(np.float64, copy=False)
    wrong = ~(np.isnan(values) | ((values > 0) & (values <= 1)))
    if wrong.any():
        row = _first(wrong)
        raise PropensityError(
            f"{source}: expected a probability in (0, 1], or an empty cell for unknown, got {values[row]} in "
            f"{block.place(row)}; log the probability with which the action was drawn"
        )
    return values


def _integers(block: Block, name: str) -> IntArray:
    (source,) = block.layout[name]
    values = _numbers(block, source)
    if np.issubdtype(values.dtype, np.signedinteger):
        return values.astype(np.int64, copy=False)
    # Beyond 2**53 a float may stand for another integer than was meant.
    limit = 2**63 if np.issubdtype(values.dtype, np.unsignedinteger) else 2**53
    with np.errstate(invalid="ignore"):
        wrong = ~((values >= -limit) & (values < limit) & (values == np.floor(values)))
    if wrong.any():
        row = _first(wrong)
        raise _refuse(block, source, row, "an integer of 64 bits", values[row])
    return values.astype(np.int64)


def _words(block: Block, source: str) -> tuple[pa.Array, IntArray | None]:
    """Return the texts of a column, and which one each row has where the column is a dictionary; checked."""
    import pyarrow as pa
    import pyarrow.compute as pc

    array = _column(block, source)
    words, indices = array, None
    if pa.types.is_dictionary(array.type):
        words = array.dictionary
    if pa.types.is_string_view(words.type):
        words = words.cast(pa.large_string())
    if not (pa.types.is_string(words.type) or pa.types.is_large_string(words.type)):
        raise _refuse(block, source, 0, "text", words.type, "convert the column")
    empty = array.is_null()
    if array.null_count:
        raise _refuse(block, source, _first(empty), "text", None, "fill empty cells with ''")
    if words is not array and pa.types.is_dictionary(array.type):
        indices = array.indices.to_numpy(zero_copy_only=False)

    def row_of(bad: pa.Array) -> int:
        marked = bad.to_numpy(zero_copy_only=False)
        return _first(marked if indices is None else marked[indices])

    if words.null_count:
        raise _refuse(block, source, row_of(words.is_null()), "text", None, "fill empty cells with ''")
    lengths = pc.binary_length(words)
    if len(words) and (longest := pc.max(lengths).as_py()) > LONGEST_TEXT:
        row = row_of(pc.equal(lengths, longest))
        expected = f"a text of at most {LONGEST_TEXT:,} bytes"
        raise _refuse(block, source, row, expected, f"{longest:,}", "shorten it, or leave the column out")
    return words, indices


def _texts(block: Block, name: str) -> Array:
    (source,) = block.layout[name]
    words, indices = _words(block, source)
    texts = np.asarray(words.to_numpy(zero_copy_only=False), dtype=object)
    # Rows that share a word share the object: a file can't grow by orders of magnitude in memory.
    return texts if indices is None else texts[indices]


def _is_text(block: Block, source: str) -> bool:
    import pyarrow as pa

    kind = _column(block, source).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _actions(block: Block, prompts: PromptSet) -> IntArray:
    (source,) = block.layout["action"]
    if not _is_text(block, source):
        actions = _integers(block, "action")
        wrong = (actions < 0) | (actions >= len(prompts))
        if wrong.any():
            row = _first(wrong)
            raise ActionError(
                f"{source}: expected an index in [0, {len(prompts)}), got {actions[row]} in {block.place(row)}; pass "
                "the catalogue that was used"
            )
        return actions
    words, indices = _words(block, source)
    numbers = _indices_of(block, source, words, prompts)
    actions = numbers if indices is None else numbers[indices]
    if (wrong := actions < 0).any():
        row = _first(wrong)
        text = _column(block, source)[row].as_py()
        near = difflib.get_close_matches(text, prompts.texts or (), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "add it to the prompts"
        raise ActionError(f"{source}: expected the text of a prompt, got {text[:80]!r} in {block.place(row)}; {hint}")
    return actions


def _indices_of(block: Block, source: str, words: pa.Array, prompts: PromptSet) -> IntArray:
    """Return the prompt of each word, -1 where there is none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if prompts.texts is None:
        raise _refuse(block, source, 0, "prompt indices, as the prompts have no texts", "text", "map it to indices")
    known = pa.array(prompts.texts, type=words.type)
    if len(pc.unique(known)) < len(known):
        twice = next(text for i, text in enumerate(prompts.texts) if text in prompts.texts[:i])
        raise DataError(f"{source}: expected distinct prompt texts, but {twice!r} is there twice; pass indices")
    found = pc.fill_null(pc.index_in(words, value_set=known), -1)
    return np.asarray(found.to_numpy(zero_copy_only=False), dtype=np.int64)


def distinct_prompts(blocks: Iterable[Block], embeddings: npt.ArrayLike | None) -> PromptSet:
    """Return the prompts that the action column names, sorted by text; one-hot unless there are `embeddings`.

    Raises:
        DataError: actions are not texts, or are too many for one-hot embeddings.
    """
    import pyarrow.compute as pc

    found: set[str] = set()
    for block in blocks:
        if block.table.num_rows == 0:
            continue
        (source,) = block.layout["action"]
        if not _is_text(block, source):
            raise _refuse(
                block, source, 0, "prompt texts, as no prompts were passed", _column(block, source).type,
                "pass prompts= the catalogue that actions index",
            )  # fmt: skip
        found.update(pc.unique(_words(block, source)[0]).to_pylist())
        if len(found) > _MOST_ONE_HOT and embeddings is None:
            raise DataError(
                f"{source}: expected at most {_MOST_ONE_HOT:,} distinct prompts without embeddings, got more by "
                f"{block.place(0)}; check that the column holds prompts, and pass a PromptSet with embeddings"
            )
    if not found:
        raise DataError("action: expected at least one round, got none; record some first")
    texts = tuple(sorted(found))
    return PromptSet(np.eye(len(texts), dtype=np.float32) if embeddings is None else np.asarray(embeddings), texts)


def to_table(log: LoggedDataset) -> pa.Table:
    """Return one row a round: vectors as FixedSizeList, an unknown propensity as null, and the text of the prompt.

    Raises:
        DataError: a text is not valid Unicode.
    """
    import pyarrow as pa

    arrays: dict[str, pa.Array] = {}
    for name, kind in column_types(log).items():
        if name == "expected_reward":
            values: Array = log.oracle.expected_reward if log.oracle is not None else np.empty(0)
        else:
            values = getattr(log, name)
        if name in _VECTORS:
            if values.shape[1]:
                arrays[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
        elif name == "propensity":
            arrays[name] = pa.array(values, mask=np.isnan(values))
        elif kind == "string":
            arrays[name] = _as_text(log, values)
        else:
            arrays[name] = pa.array(values.astype(kind, copy=False))
        if name == "action" and log.prompts.texts is not None:
            arrays["prompt"] = pa.array(log.prompts.texts, type=pa.large_string()).take(pa.array(values))
    return pa.table(arrays)


def _as_text(log: LoggedDataset, texts: Array) -> pa.Array:
    import pyarrow as pa

    # Arrow notices by itself what is no valid text, bytes apart; where that is, is looked for only then.
    if set(map(type, texts)) != {str}:
        check_texts(log)
    try:
        return pa.array(texts, type=pa.large_string())
    except UnicodeEncodeError:
        check_texts(log)
        raise


def without_columns(wanted: Fields, widths: Iterable[str]) -> Fields:
    """Return `wanted` where the vectors `widths`, of dimension 0, have no column."""
    default = Fields()
    empty: dict[str, Any] = {n: () for n in widths if n in _VECTORS and getattr(wanted, n) == getattr(default, n)}
    return replace(wanted, **empty)
