"""Logged datasets from and to Vowpal Wabbit's text formats for contextual bandits.

One line a round, for ``--cb_explore A``; actions count from 1 and a cost is a negative reward:

    2:-0.5:0.25 |c c0:1.5 c1:-2 |q q0:3

Several lines a round, one an action with its features, for ``--cb_explore_adf``:

    shared |c c0:1.5 c1:-2 |q q0:3
    |e e0:1 e1:0
    2:-0.5:0.25 |e e0:0 e1:1
    <empty line>

Namespaces are ``c`` (context), ``q`` (query) and ``e`` (prompt embedding). A feature is named by its namespace and
index, so nothing in the data can be taken for syntax. Names that are only numbers would not do: Vowpal Wabbit takes
them for hashes, and those of neighbours share weights with ``--cb_explore`` (9.11.9). Numbers are the shortest that
read back as the same float (propensities: double). Arrow makes and reads the text of many rows at once, so that a file
is never held as a whole.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from offprompts_env.errors import ActionError, ConfigError, DataError, DimensionError, PropensityError, StorageError
from offprompts_env.interchange.common import warn_dropped, whole_file
from offprompts_env.interchange.vowpal_lines import Cells, Rows, parse_lines, sections, show, wrong
from offprompts_env.types import Array, FloatArray, IntArray, LoggedDataset, LogMetadata, PromptSet

if TYPE_CHECKING:
    import pyarrow as pa

_CONTEXT, _QUERY, _EMBEDDING = "c", "q", "e"
# Numbers made into text at once, and bytes read at once.
_NUMBERS, _BYTES = 1 << 20, 1 << 22
# A line of an action that begins with something else than its features.
_LABELLED = re.compile(rb"\n[^|\n]")


# ----------------------------------------------------------------------------------------------------------- writing


def to_vowpal(log: LoggedDataset, path: str | Path) -> Path:
    """Write one line a round, ``action:cost:probability |c c0:x ... |q q0:q ...``, and return the path.

    Args:
        log: the rounds, all with known propensities: Vowpal Wabbit would skip a row without one in silence.
        path: of the file; an older one is replaced as a whole.

    Raises:
        PropensityError: a propensity is unknown.
        StorageError: the file cannot be written.

    Warns:
        UserWarning: what the format cannot hold, once.
    """
    _check_known(log)
    with whole_file(Path(path)) as file:
        for part in _parts(log):
            file.write(_content(_join([*_label(part), *_shown(part), "\n"], len(part))))
    warn_dropped(log, "the cb format of Vowpal Wabbit", "propensity")
    return Path(path)


def to_vowpal_adf(log: LoggedDataset, path: str | Path) -> Path:
    """Write for each round ``shared |c ... |q ...`` and a line ``|e e0:e ...`` for every prompt, and return the path.

    The line of the recorded prompt begins with its label. Every round repeats all embeddings, as the format asks: n · A
    · d_e numbers. Arguments and errors are those of :func:`to_vowpal`.
    """
    _check_known(log)
    embeddings = log.prompts.embeddings
    texts = _join(["|", *_features(embeddings, _EMBEDDING), "\n"], len(embeddings))
    actions, starts = _content(texts), _offsets(texts).tolist()
    with whole_file(Path(path)) as file:
        for part in _parts(log):
            shared = _slices(_join(["shared", *_shown(part), "\n"], len(part)))
            labels = _slices(_join([*_label(part), " "], len(part)))
            # Row by row: the text of a round is mostly that of the catalogue, copied around a label.
            for about, label, action in zip(shared, labels, part.action.tolist(), strict=True):
                start = starts[action]
                file.write(b"".join((about, actions[:start], label, actions[start:], b"\n")))
    warn_dropped(log, "the cb_adf format of Vowpal Wabbit", "propensity", "embeddings")
    return Path(path)


def _check_known(log: LoggedDataset) -> None:
    log.require_propensities("the text format of Vowpal Wabbit")


def _parts(log: LoggedDataset) -> Iterator[LoggedDataset]:
    rows = max(1, _NUMBERS // (3 + log.context.shape[1] + log.query.shape[1]))
    return (log.take(slice(start, start + rows)) for start in range(0, len(log), rows))


def _label(log: LoggedDataset) -> list[Any]:
    """Return the pieces of ``action:cost:probability``."""
    return [_texts(log.action + 1), ":", _texts(-log.reward), ":", _texts(log.propensity)]


def _shown(log: LoggedDataset) -> list[Any]:
    """Return the pieces of `` |c c0:x ... |q q0:q ...``; a vector of dimension 0 has no namespace."""
    vectors = ((_CONTEXT, log.context), (_QUERY, log.query))
    pieces = [piece for name, v in vectors if v.shape[1] for piece in (" |", *_features(v, name))]
    return pieces or [" |"]


def _features(matrix: FloatArray, name: str) -> list[Any]:
    """Return the pieces of ``c c0:v c1:v ...``, one row of text a row of `matrix`."""
    columns = np.ascontiguousarray(matrix.T)
    return [name, *(piece for i, column in enumerate(columns) for piece in (f" {name}{i}:", _texts(column)))]


def _texts(values: Array) -> pa.Array:
    """Return numbers as the shortest texts that read back as the same."""
    import pyarrow as pa
    import pyarrow.compute as pc

    # From buffers, as pyarrow's own conversion imports pandas.
    kind = pa.type_for_alias(values.dtype.name)
    array = pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])
    return pc.cast(array, pa.string())


def _join(pieces: list[Any], n: int) -> pa.Array:
    """Return n texts, each the pieces one after the other; a string is the same piece in all of them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if all(isinstance(piece, str) for piece in pieces):
        return pa.repeat(pa.scalar("".join(pieces)), n)
    scalars = [pa.scalar(piece) if isinstance(piece, str) else piece for piece in pieces]
    return pc.binary_join_element_wise(*scalars, pa.scalar(""))


def _offsets(texts: pa.Array) -> IntArray:
    return np.frombuffer(texts.buffers()[1], dtype=np.int32, count=len(texts) + 1, offset=4 * texts.offset)


def _content(texts: pa.Array) -> memoryview:
    """Return all texts, one after the other, without making a Python object of each."""
    offsets = _offsets(texts)
    return memoryview(texts.buffers()[2])[offsets[0] : offsets[-1]]


def _slices(texts: pa.Array) -> Iterator[memoryview]:
    whole = memoryview(texts.buffers()[2])
    return (whole[i:j] for i, j in itertools.pairwise(_offsets(texts).tolist()))


# ----------------------------------------------------------------------------------------------------------- reading


def from_vowpal(
    path: str | Path,
    prompts: PromptSet,
    *,
    context: str = _CONTEXT,
    query: str = _QUERY,
    metadata: LogMetadata | None = None,
) -> LoggedDataset:
    """Read a file of lines ``action:cost:probability |c c0:1.5 ...``; a label without a probability makes it NaN.

    Features are named by index, with or without the namespace before it (``c0`` or ``0``); one that is missing is
    0, and one without a value is 1. There are no outputs (d_o = 0).

    Args:
        path: of the file.
        prompts: the catalogue; action 1 is its first prompt.
        context: namespace of the context; ``""`` for features right after ``|``.
        query: namespace of the query; a file without it has none (d_q = 0).
        metadata: provenance.

    Raises:
        StorageError: the file cannot be read.
        DataError: a line is malformed, which the message names.
        ActionError, PropensityError: an action is not in the catalogue, or a probability is none.
    """
    file, names = Path(path), _check_names(context, query)
    parts = [
        parse_lines(block, np.arange(first, first + block.count(b"\n")), names, file) for block, first in _blocks(file)
    ]
    return _log(parts, prompts, file, metadata)


def from_vowpal_adf(
    path: str | Path,
    prompts: PromptSet | None = None,
    *,
    context: str = _CONTEXT,
    query: str = _QUERY,
    embedding: str = _EMBEDDING,
    metadata: LogMetadata | None = None,
) -> LoggedDataset:
    """Read a file of rounds of several lines, whose actions are the same in each round.

    Args:
        path: of the file.
        prompts: the catalogue, in the order of the lines; None takes the features of the actions.
        context: namespace of the context, in the shared line.
        query: namespace of the query, in the shared line.
        embedding: namespace of the features of actions.
        metadata: provenance.

    Raises:
        StorageError: the file cannot be read.
        DataError: a line is malformed, or the actions differ between rounds.
        DimensionError: `prompts` are others than the actions.
        PropensityError: a probability is none.
    """
    file, names = Path(path), _check_names(context, query)
    rounds = _Rounds(file)
    parts = [parse_lines(text, lines, names, file) for text, lines in rounds.as_single_lines()]
    if rounds.actions is None:
        raise DataError(f"{file}: expected at least one round, got none")
    found = _embeddings(rounds.actions, rounds.first_line, embedding, file)
    return _log(parts, _same_prompts(prompts, found, file), file, metadata)


def _check_names(context: str, query: str) -> tuple[str, str]:
    for name in (context, query):
        if re.search(r"[\s:|]", name):
            raise ConfigError(f"namespace: expected a name without spaces, ':' and '|', got {name!r}")
    if context == query:
        raise ConfigError(f"namespace: expected different ones for context and query, got {context!r} twice")
    return context, query


def _blocks(file: Path) -> Iterator[tuple[bytes, int]]:
    """Yield the file in blocks of whole lines, each with the number of its first line."""
    line = 1
    try:
        with file.open("rb") as source:
            while block := source.read(_BYTES):
                block = (block + source.readline()).replace(b"\r\n", b"\n")
                block = block if block.endswith(b"\n") else block + b"\n"
                yield block, line
                line += block.count(b"\n")
    except OSError as error:
        raise StorageError(f"{file}: cannot read: {error}; pass the path of a text file") from error


class _Rounds:
    """Rounds of several lines, made into the same rounds of one line.

    Attributes:
        actions: the lines of the actions without the label, which all rounds have in common; None before the first.
        first_line: number of the first of them.
    """

    _AT_ONCE = 1 << 14

    def __init__(self, file: Path) -> None:
        self.file = file
        self.actions: bytes | None = None
        self.first_line = 0
        self._starts: list[int] = []

    def as_single_lines(self) -> Iterator[tuple[bytes, IntArray]]:
        """Yield blocks of lines ``action:cost:probability |c ...`` with the number of the line each comes from."""
        # Round by round: which action has the label is known only after comparing the lines with the first round's.
        texts: list[bytes] = []
        lines: list[int] = []
        for text, line in self._split():
            texts.append(self._single_line(text, line))
            lines.append(line)
            if len(texts) == self._AT_ONCE:
                yield b"".join(texts), np.array(lines)
                texts, lines = [], []
        if texts:
            yield b"".join(texts), np.array(lines)

    def _split(self) -> Iterator[tuple[bytes, int]]:
        """Yield the text of each round, without the empty lines between, and the number of its first line."""
        rest, line = b"", 1
        for block, _ in _blocks(self.file):
            *whole, rest = (rest + block).split(b"\n\n")
            for text in whole:
                if body := text.strip(b"\n"):
                    yield body, line + len(text) - len(text.lstrip(b"\n"))
                line += text.count(b"\n") + 2
        if body := rest.strip(b"\n"):
            yield body, line + len(rest) - len(rest.lstrip(b"\n"))

    def _single_line(self, text: bytes, line: int) -> bytes:
        shared, _, actions = text.partition(b"\n")
        if not re.match(rb"shared[ |]", shared):
            raise wrong(self.file, line, "expected a round to begin with 'shared |'", shared)
        found = _LABELLED.search(actions)
        start = 0 if actions[:1] not in (b"|", b"") else found.start() + 1 if found else -1
        if start < 0:
            raise wrong(self.file, line, "expected a label action:cost:probability before one action", shared)
        end = actions.find(b"|", start)
        if end < 0:
            raise wrong(self.file, line + 1 + actions.count(b"\n", 0, start), "expected features", actions[start:])
        plain = actions[:start] + actions[end:]
        if self.actions is None:
            self.actions, self.first_line = plain, line + 1
            self._starts = [0, *(match.end() for match in re.finditer(rb"\n", plain))]
        elif plain != self.actions:
            raise self._differs(plain, line)
        action = bisect_right(self._starts, start)
        # Vowpal Wabbit ignores the number in the label: an action is known by its place.
        label = actions[start:end].strip().partition(b":")[2]
        return b"%d:%s %s\n" % (action, label, shared[6:].strip())

    def _differs(self, plain: bytes, line: int) -> DataError:
        theirs, ours = plain.split(b"\n"), (self.actions or b"").split(b"\n")
        if len(theirs) != len(ours):
            return DataError(
                f"{self.file}:{line}: expected {len(ours)} actions as in the first round, got {len(theirs)}; rounds "
                "with different actions have no common catalogue"
            )
        index = next(i for i, pair in enumerate(zip(theirs, ours, strict=True)) if pair[0] != pair[1])
        return wrong(
            self.file,
            line + 1 + index,
            f"expected one label a round, and {show(ours[index])} as in the first",
            theirs[index],
        )


def _embeddings(actions: bytes, first_line: int, name: str, file: Path) -> FloatArray:
    """Return the features (A, d_e) of lines ``|e e0:v ...``."""
    cells = Cells()
    lines = actions.split(b"\n")
    for row, line in enumerate(lines):
        for _, features in sections(line, first_line + row, (name,), file):
            cells.add(row, features)
    return cells.matrix(len(lines))


def _same_prompts(prompts: PromptSet | None, found: FloatArray, file: Path) -> PromptSet:
    if prompts is None:
        return PromptSet(found)
    shape = prompts.embeddings.shape
    wide = np.zeros((len(found), max(shape[1], found.shape[1])), dtype=np.float32)
    wide[:, : found.shape[1]] = found
    if wide.shape != shape or not np.allclose(wide, prompts.embeddings, rtol=1e-5, atol=1e-6):
        raise DimensionError(
            f"{file}: expected as actions the {shape[0]} prompts given, with their embeddings of dimension {shape[1]}, "
            f"got {len(found)} of dimension {found.shape[1]} or with other features; pass prompts in the file's order"
        )
    return prompts


def _log(parts: Iterable[Rows], prompts: PromptSet, file: Path, metadata: LogMetadata | None) -> LoggedDataset:
    parts = [part for part in parts if len(part.line)]
    if not parts:
        raise DataError(f"{file}: expected at least one round, got none")
    for part in parts:
        _check_labels(part, len(prompts), file)
    n = sum(len(part.line) for part in parts)
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in ("action", "propensity")
    }
    return LoggedDataset(
        **columns,
        context=_stack([part.context for part in parts]),
        query=_stack([part.query for part in parts]),
        reward=-np.concatenate([part.cost for part in parts]),
        output=np.empty((n, 0), dtype=np.float32),
        prompts=prompts,
        metadata=metadata if metadata is not None else LogMetadata(),
    )


def _stack(matrices: list[FloatArray]) -> FloatArray:
    """Return the rows of all; the last features of narrow ones are 0."""
    width = max(matrix.shape[1] for matrix in matrices)
    return np.concatenate([np.pad(matrix, ((0, 0), (0, width - matrix.shape[1]))) for matrix in matrices])


def _check_labels(rows: Rows, n_prompts: int, file: Path) -> None:
    bad = (rows.action < 0) | (rows.action >= n_prompts)
    if bad.any():
        row = int(np.argmax(bad))
        raise ActionError(
            f"{file}:{rows.line[row]}: action: expected a number from 1 to {n_prompts}, got {rows.action[row] + 1}; "
            "pass the prompts that the actions number"
        )
    bad = ~(np.isnan(rows.propensity) | ((rows.propensity > 0) & (rows.propensity <= 1)))
    if bad.any():
        row = int(np.argmax(bad))
        raise PropensityError(
            f"{file}:{rows.line[row]}: probability: expected one in (0, 1], got {rows.propensity[row]}; leave it out "
            "where it is unknown"
        )
