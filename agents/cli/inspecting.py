"""``offprompts inspect``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from agents.cli.logs import ColumnNames, open_log
from agents.cli.output import print_json
from agents.inspection import inspect_log
from offprompts_env.printing import printable


@dataclass(frozen=True)
class Inspect:
    """Say what a log holds, whether its propensities can be believed, what is odd, and what it allows.

    In use:
      offprompts inspect log
      offprompts inspect log --json
      offprompts inspect service.csv --context age visits --action prompt --reward clicked
    """

    log: Annotated[Path, tyro.conf.Positional]
    """Directory of a log, or a Parquet, CSV or JSON-lines file."""
    json: bool = False
    """Print the report as JSON."""
    columns: ColumnNames = field(default_factory=ColumnNames)

    def run(self) -> None:
        """Run the command."""
        report = inspect_log(open_log(self.log, self.columns))
        if self.json:
            print_json(report.to_json())
        else:
            print(printable(str(report)))
