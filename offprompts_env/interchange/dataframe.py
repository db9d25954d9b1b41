"""Logged datasets from and to data frames: one row a round."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from offprompts_env.errors import ActionError, DataError
from offprompts_env.types import Array, FloatArray, IntArray, LoggedDataset, LogMetadata, Oracle, PromptSet

if TYPE_CHECKING:
    import pandas as pd

# One list-valued column, a prefix of numbered columns, or the names of several columns.
Vector = str | Sequence[str]


def from_dataframe(
    frame: pd.DataFrame,
    prompts: PromptSet | Sequence[str],
    *,
    embeddings: npt.ArrayLike | None = None,
    context: Vector = "context",
    query: Vector | None = "query",
    action: str = "action",
    reward: str = "reward",
    output: Vector | None = "output",
    propensity: str | None = None,
    sentence: str | None = None,
    user_id: str | None = None,
    item_id: str | None = None,
    query_text: str | None = None,
    expected_reward: str | None = None,
    metadata: LogMetadata | None = None,
) -> LoggedDataset:
    """Make a dataset from a data frame with one row a round.

    A vector is a column whose cells are lists or arrays of one length, a column of numbers (dimension 1), or several of
    them: ``"context"`` stands for the column ``context``, or else for ``context_0``, ``context_1``, ...; a sequence of
    names for just those.

    Args:
        frame: the rounds; its index is ignored.
        prompts: the catalogue, or its texts together with `embeddings`.
        embeddings: (A, d_e), where `prompts` are texts.
        context: vector of user features.
        query: vector of item features; None where the log has none (d_q = 0).
        action: prompt indices, or prompt texts of the catalogue.
        reward: what was observed.
        output: vector of the output's embedding; None where the log has none (d_o = 0).
        propensity: probability with which the action was drawn. As for all columns from here on, None takes the column
            of that name if there is one, and "" none; without one it is unknown, NaN.
        sentence: output texts.
        user_id: integers.
        item_id: integers.
        query_text: texts.
        expected_reward: goes into the oracle field.
        metadata: provenance.

    Raises:
        DataError: a column is missing, or a cell has the wrong type, length or range; the message names column, row
            (counted from 0), expected and actual.
        ActionError: an action is not in the catalogue.
    """
    catalogue = catalogue_of(prompts, embeddings)

    def optional(name: str, given: str | None) -> str | None:
        if given == "":
            return None
        return given if given is not None else (name if name in frame.columns else None)

    columns: dict[str, Any] = {
        "context": _vector(frame, context, "context"),
        "query": _vector(frame, query, "query"),
        "output": _vector(frame, output, "output"),
        "action": _actions(frame, action, catalogue),
        "reward": _numbers(frame, reward, "reward"),
    }
    source = optional("propensity", propensity)
    unknown = np.full(len(frame), math.nan)
    columns["propensity"] = unknown if source is None else _numbers(frame, source, "propensity", missing=True)
    for name, given in (("sentence", sentence), ("query_text", query_text)):
        if (source := optional(name, given)) is not None:
            columns[name] = _texts(frame, source, name)
    for name, given in (("user_id", user_id), ("item_id", item_id)):
        if (source := optional(name, given)) is not None:
            columns[name] = _integers(_numbers(frame, source, name), source)
    if (source := optional("expected_reward", expected_reward)) is not None:
        columns["oracle"] = Oracle(_numbers(frame, source, "expected_reward", missing=True))
    return LoggedDataset(**columns, prompts=catalogue, metadata=metadata if metadata is not None else LogMetadata())


def to_dataframe(log: LoggedDataset) -> pd.DataFrame:
    """Return one row a round, which :func:`from_dataframe` reads back with its default names.

    Vectors become numbered columns ``context_0``, ``context_1``, ...; a column ``prompt`` has the text of the action,
    where prompts are texts, and ``expected_reward`` the oracle.
    """
    import pandas as pd

    columns: dict[str, Any] = {}
    for name in ("context", "query"):
        columns |= {f"{name}_{i}": values for i, values in enumerate(getattr(log, name).T)}
    columns["action"] = log.action
    if log.prompts.texts is not None:
        columns["prompt"] = np.array(log.prompts.texts, dtype=object)[log.action]
    columns |= {"propensity": log.propensity, "reward": log.reward}
    columns |= {f"output_{i}": values for i, values in enumerate(log.output.T)}
    for name in ("sentence", "user_id", "item_id", "query_text"):
        if getattr(log, name) is not None:
            columns[name] = getattr(log, name)
    if log.oracle is not None:
        columns["expected_reward"] = log.oracle.expected_reward
    return pd.DataFrame(columns)


def catalogue_of(prompts: PromptSet | Sequence[str], embeddings: npt.ArrayLike | None) -> PromptSet:
    """Return the catalogue that a caller passed as such, or as texts with their embeddings.

    Raises:
        DataError: texts without embeddings, or embeddings beside a catalogue.
    """
    if isinstance(prompts, PromptSet):
        if embeddings is not None:
            raise DataError("embeddings: expected none beside a PromptSet, which has its own; pass one of them")
        return prompts
    if embeddings is None:
        raise DataError(
            f"embeddings: expected an embedding for each of the {len(prompts)} prompt texts, got none; "
            "pass embeddings=..., or a PromptSet"
        )
    return PromptSet(np.asarray(embeddings), tuple(prompts))


def _source(frame: pd.DataFrame, source: str, name: str) -> pd.Series[Any]:
    if source not in frame.columns:
        near = difflib.get_close_matches(source, [str(column) for column in frame.columns], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(
            f"{name}: expected a column {source!r}, the frame has none; {hint}pass {name}= the name of the column"
        )
    column = frame[source]
    if column.ndim != 1:
        raise DataError(f"{name}: expected one column {source!r}, the frame has {column.shape[1]} of that name")
    return column


def _vector(frame: pd.DataFrame, source: Vector | None, name: str) -> FloatArray:
    import pandas as pd

    if source is None:
        return np.empty((len(frame), 0), dtype=np.float32)
    if not isinstance(source, str):
        return _stack(frame, list(source), name)
    if source in frame.columns:
        column = _source(frame, source, name)
        numeric = pd.api.types.is_numeric_dtype(column.dtype)
        return _stack(frame, [source], name) if numeric else _lists(column, source)
    return _stack(frame, numbered_columns([str(column) for column in frame.columns], source, name, "the frame"), name)


def numbered_columns(columns: Sequence[str], source: str, name: str, place: str) -> list[str]:
    """Return the names ``source_0``, ``source_1``, ... among `columns` of `place`, which make up the vector `name`.

    Raises:
        DataError: there are none, or their numbers have a gap.
    """
    numbered = re.compile(re.escape(source) + r"_(\d+)")
    found = sorted(int(match[1]) for column in columns if (match := numbered.fullmatch(column)))
    if not found:
        nothing = "" if name == "context" else f", or {name}=None if the log has none"
        raise DataError(
            f"{name}: expected a column {source!r} of lists or columns {source}_0, {source}_1, ..., {place} has "
            f"neither; pass {name}= the name or names of its columns{nothing}"
        )
    if found != list(range(len(found))):
        gap = next(i for i, number in enumerate(found) if i != number)
        raise DataError(
            f"{name}: expected columns numbered from {source}_0 without gaps, but {source}_{gap} is missing in {place}"
        )
    return [f"{source}_{i}" for i in found]


def _stack(frame: pd.DataFrame, sources: list[str], name: str) -> FloatArray:
    columns = [_numbers(frame, source, name) for source in sources]
    return np.array(columns, dtype=np.float32).reshape(len(sources), len(frame)).T


def _lists(column: pd.Series[Any], source: str) -> FloatArray:
    cells = column.to_list()
    try:
        matrix = np.array(cells, dtype=np.float32)
    except (TypeError, ValueError):
        matrix = np.empty(0, dtype=np.float32)
    if matrix.ndim == 2:
        return matrix
    # Something does not fit: say what and where.
    width = None
    for row, cell in enumerate(cells):
        try:
            vector = np.asarray(cell, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise DataError(f"{source}: expected a list of numbers, got {cell!r} in row {row}") from error
        if vector.ndim != 1:
            raise DataError(f"{source}: expected a list of numbers, got {cell!r} in row {row}")
        width = len(vector) if width is None else width
        if len(vector) != width:
            raise DataError(f"{source}: expected {width} numbers as in row 0, got {len(vector)} in row {row}")
    return matrix.reshape(len(cells), 0)


def _numbers(frame: pd.DataFrame, source: str, name: str, *, missing: bool = False) -> Array:
    """Return a column as numbers; empty cells become NaN where `missing` allows them."""
    import pandas as pd

    column = _source(frame, source, name)
    empty = column.isna().to_numpy()
    if empty.any() and not missing:
        raise DataError(
            f"{source}: expected a number, got {column.iloc[int(empty.argmax())]!r} in row {empty.argmax()}"
        )
    if pd.api.types.is_integer_dtype(column.dtype) and not empty.any():
        large = (column > np.iinfo(np.int64).max).to_numpy(dtype=bool)
        if large.any():
            row = int(large.argmax())
            raise DataError(f"{source}: expected an integer of 64 bits, got {column.iloc[row]} in row {row}")
        return column.to_numpy(dtype=np.int64)
    if pd.api.types.is_numeric_dtype(column.dtype):
        return column.to_numpy(dtype=np.float64, na_value=math.nan)
    for row, cell in enumerate(column):
        if not empty[row] and not isinstance(cell, int | float | np.number):
            raise DataError(f"{source}: expected a number, got {cell!r} in row {row}; convert the column")
    return column.to_numpy(dtype=np.float64, na_value=math.nan)


def _integers(values: Array, source: str) -> IntArray:
    if not np.issubdtype(values.dtype, np.integer):
        # Beyond 2**53 a float may stand for another integer than was meant; NaN fails every comparison.
        wrong = ~((np.abs(values) <= 2**53) & (values == np.floor(values)))
        if wrong.any():
            row = int(wrong.argmax())
            raise DataError(f"{source}: expected an integer, got {values[row]} in row {row}")
    return values.astype(np.int64)


def _texts(frame: pd.DataFrame, source: str, name: str) -> Array:
    cells = _source(frame, source, name).to_list()
    for row, cell in enumerate(cells):
        if not isinstance(cell, str):
            raise DataError(f"{source}: expected text, got {cell!r} in row {row}; fill empty cells with ''")
    return np.array(cells, dtype=object)


def _actions(frame: pd.DataFrame, source: str, prompts: PromptSet) -> IntArray:
    column = _source(frame, source, "action")
    if not any(isinstance(cell, str) for cell in column):
        return _integers(_numbers(frame, source, "action"), source)
    if prompts.texts is None:
        raise DataError(f"{source}: expected prompt indices, as the prompts have no texts, got text; map it to indices")
    index = {text: i for i, text in enumerate(prompts.texts)}
    if len(index) < len(prompts.texts):
        twice = next(text for i, text in enumerate(prompts.texts) if index[text] != i)
        raise DataError(f"{source}: expected distinct prompt texts, but {twice!r} is there twice; pass indices")
    actions = np.empty(len(frame), dtype=np.int64)
    for row, text in enumerate(_texts(frame, source, "action")):
        if text not in index:
            near = difflib.get_close_matches(text, prompts.texts, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else "; add it to the prompts"
            raise ActionError(f"{source}: expected the text of a prompt, got {text!r} in row {row}{hint}")
        actions[row] = index[text]
    return actions
