"""``offprompts sentences``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from agents.cli.output import print_json
from offprompts_env.printing import printable
from offprompts_env.text.store import SentenceStore


@dataclass(frozen=True)
class Sentences:
    """Say what a store of sentences holds, or show sentences of it.

    In use:
      offprompts sentences sentences.db
      offprompts sentences sentences.db --contains Casablanca --limit 20
    """

    store: Annotated[Path, tyro.conf.Positional]
    """File of the store."""
    model: str | None = None
    """Show sentences of models whose fingerprint begins so."""
    series: str | None = None
    """Show sentences of this series, such as "table 0" or "no prompt"."""
    contains: str | None = None
    """Show sentences with this text in the request or in the sentence."""
    limit: int = 10
    """Show so many at most."""
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        """Run the command."""
        with SentenceStore(self.store, read_only=True) as store:
            if (self.model, self.series, self.contains) == (None, None, None):
                self._summary(store)
            else:
                self._rows(store)

    def _summary(self, store: SentenceStore) -> None:
        models = store.models()
        if self.json:
            print_json({"sentences": len(store), "bytes": store.size, "models": [asdict(model) for model in models]})
            return
        print(f"{self.store}: {len(store):,} sentences, {store.size / 1e6:,.2f} MB")
        for found in models:
            facts = "; ".join(f"{name} {value}" for name, value in found.facts.items() if value)
            print(printable(f"  {found.fingerprint[:16]}  {found.series}: {found.sentences:,} sentences of "
                            f"{found.requests:,} requests{'  (' + facts + ')' if facts else ''}"))  # fmt: skip

    def _rows(self, store: SentenceStore) -> None:
        rows = list(store.rows(self.model, self.series, self.contains, self.limit))
        if self.json:
            print_json({"sentences": [asdict(row) for row in rows]})
            return
        for row in rows:
            print(printable(f"{row.request}\n  {row.sample}: {row.sentence}"))
        if not rows:
            print("no such sentences")
