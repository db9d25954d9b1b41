"""``offprompts render``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from agents.cli.logs import ColumnNames, open_log
from agents.cli.output import print_json
from offprompts_env.config import check_integer
from offprompts_env.manifest import MANIFEST
from offprompts_env.printing import printable
from offprompts_env.streaming import LogStream
from offprompts_env.types import FloatArray, LoggedDataset

_NUMBERS = 8


@dataclass(frozen=True)
class Render:
    """Show rounds of a log as text.

    In use:
      offprompts render log
      offprompts render log --rows 20 --first 1000
    """

    log: Annotated[Path, tyro.conf.Positional]
    """Directory of a log, or a Parquet, CSV or JSON-lines file."""
    rows: int = 5
    """How many rounds."""
    first: int = 0
    """The first of them, counted from 0."""
    json: bool = False
    """Print them as JSON."""
    columns: ColumnNames = field(default_factory=ColumnNames)

    def run(self) -> None:
        """Run the command."""
        check_integer("--rows", self.rows, 1)
        check_integer("--first", self.first, 0)
        log = self._head()
        part = log.take(slice(self.first, self.first + self.rows)) if self.first < len(log) else None
        rounds = [] if part is None else [_round(part, row, self.first + row) for row in range(len(part))]
        if self.json:
            print_json({"rounds": rounds})
        else:
            print(printable("\n".join(_lines(rounds))) or f"{self.log}: no round {self.first:,}, it has {len(log):,}")

    def _head(self) -> LoggedDataset:
        # Of a large log only the beginning is read.
        if (self.log / MANIFEST).is_file() and self.columns == ColumnNames():
            return LogStream.open(self.log).head(self.first + self.rows)
        return open_log(self.log, self.columns)


def _round(log: LoggedDataset, row: int, number: int) -> dict[str, Any]:
    prompt = int(log.action[row])
    texts = log.prompts.texts
    return {
        "round": number,
        "user": None if log.user_id is None else int(log.user_id[row]),
        "context": log.context[row].tolist(),
        "query": log.query[row].tolist() if log.query_text is None else str(log.query_text[row]),
        "prompt": prompt,
        "text": None if texts is None else texts[prompt],
        "output": log.output[row].tolist() if log.sentence is None else str(log.sentence[row]),
        "propensity": float(log.propensity[row]),
        "reward": float(log.reward[row]),
    }


def _lines(rounds: list[dict[str, Any]]) -> Iterator[str]:
    for shown in rounds:
        user = "" if shown["user"] is None else f"{shown['user']}, "
        text = "" if shown["text"] is None else f' "{shown["text"]}"'
        drawn = shown["propensity"]
        known = "unknown" if drawn != drawn else f"{drawn:.3g}"
        yield f"round   {shown['round']}"
        yield f"user    {user}{_vector(shown['context'])}"
        if shown["query"]:
            yield f"query   {_vector(shown['query'])}"
        yield f"prompt  {shown['prompt']}{text} (propensity {known})"
        if shown["output"]:
            yield f"output  {_vector(shown['output'])}"
        yield f"reward  {shown['reward']:+.3f}"
        yield ""


def _vector(values: str | FloatArray | list[float]) -> str:
    if isinstance(values, str):
        return values
    more = f" … {len(values)} numbers" if len(values) > _NUMBERS else ""
    return "(" + " ".join(f"{value:+.2f}" for value in values[:_NUMBERS]) + more + ")"
