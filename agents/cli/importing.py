"""``offprompts import``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from agents.cli.logs import ColumnNames, open_log
from offprompts_env.storage import Mode, read_manifest


@dataclass(frozen=True)
class Import:
    """Make a log of a Parquet, CSV or JSON-lines file, so that its columns need naming only once.

    In use:
      offprompts import service.csv --out log --context age visits --action prompt --reward clicked
      offprompts import service.parquet --out log --context user.features --query item --propensity p
    """

    file: Annotated[Path, tyro.conf.Positional]
    """The file, which ends in .parquet, .csv, .jsonl or .ndjson (.gz behind it, but for .parquet)."""
    out: Path
    """Directory of the log."""
    columns: ColumnNames = field(default_factory=ColumnNames)
    mode: Mode = "refuse"
    """What to do where there is a log already."""

    def run(self) -> None:
        """Run the command."""
        log = open_log(self.file, self.columns)
        log.save(self.out, mode=self.mode)
        rows = read_manifest(self.out).rows
        added = f", {len(log):,} of them new" if rows > len(log) else ""
        print(f"{self.out}: {rows:,} rounds of {log.n_prompts:,} prompts{added}; next: offprompts inspect {self.out}")
