"""``offprompts freeze``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from agents.cli.output import print_json
from agents.cli.record import make_env
from agents.cli.settings import read_settings
from offprompts_env.config import check_integer
from offprompts_env.errors import ConfigError
from offprompts_env.text.prompted import TextOutputModel, query_texts
from offprompts_env.text.store import SentenceStore
from offprompts_env.types import Array, Contexts, LoggedDataset


@dataclass(frozen=True)
class Freeze:
    """Export K sentences of each (query, prompt) as a folder that is replayed without a language model.

    In use:
      offprompts freeze OffPrompts-MovieLens-v0 --env n_prompts=20 --samples 4 --out frozen
      offprompts freeze OffPrompts-MovieLens-v0 --env n_prompts=20 --samples 4 --out visited --log log
      offprompts record OffPrompts-MovieLens-v0 --env sentences=frozen --n 1000 --out replayed

    With --store an interrupted export goes on with the same command.
    """

    env_id: Annotated[str, tyro.conf.Positional]
    """Id of the environment."""
    out: Path
    """Folder of the table."""
    samples: int = 4
    """K; one where the model is deterministic."""
    env: tuple[str, ...] = ()
    """Settings of the environment, as name=value."""
    log: Path | None = None
    """Only what the rows of this log need: their queries, and their (query, prompt)."""
    queries: int | None = None
    """Only the first so many queries."""
    store: Path | None = None
    """Store of sentences to take from and to fill."""
    seed: int = 0
    """Of the sample table that is frozen."""
    note: str = ""
    """A line for the card, such as a licence."""
    quiet: bool = False
    """Show no progress (it is never shown where standard error is not a terminal)."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> None:
        """Run the command."""
        from tqdm import tqdm

        from offprompts_env.text.freezing import freeze

        check_integer("--samples", self.samples, 1)
        settings = read_settings(self.env, "--env")
        outputs, rewards, queries, pairs = self._parts(settings)
        unprompted = getattr(rewards, "unprompted", None)
        texts = query_texts(queries)
        known = None if unprompted is None else dict(zip(texts, unprompted.about(texts), strict=True))
        facts = {"environment": self.env_id, "settings": without_folders(settings)}
        facts |= {"note": self.note} if self.note else {}
        store = None if self.store is None else SentenceStore.shared(self.store)
        with tqdm(unit="sentence", disable=True if self.quiet else None) as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            table = freeze(
                outputs, queries, self.out, samples=self.samples, seed=self.seed, pairs=pairs, no_prompt=known,
                store=store, facts=facts, progress=show,
            )  # fmt: skip
        counts = {
            "path": str(self.out), "queries": len(table.queries), "prompts": len(table.prompts),
            "samples": table.samples, "sentences": len(table.sentences), "sha256": table.checksum,
        }  # fmt: skip
        if self.json:
            print_json(counts)
        else:
            what = "(query, prompt)" if table.complete else "(query, prompt) visited"
            print(
                f"{self.out}: {counts['sentences']:,} sentences, {table.samples} of each {what}, "
                f"{len(table.queries):,} queries, {len(table.prompts):,} prompts"
            )

    def _parts(self, settings: dict[str, Any]) -> tuple[TextOutputModel, Any, Contexts, Array | None]:
        made: Any = make_env(self.env_id, settings)
        simulator = made.unwrapped.simulator
        outputs = getattr(simulator.outputs, "outputs", simulator.outputs)
        if not isinstance(outputs, TextOutputModel):
            raise ConfigError(f"{self.env_id}: expected an environment whose outputs a language model writes, got none")
        if self.log is None:
            return outputs, simulator.rewards, first_of_each(every_query(simulator.contexts), self.queries), None
        queries, pairs = visited(self.log, outputs)
        queries = first_of_each(queries, self.queries)
        return outputs, simulator.rewards, queries, pairs[: len(queries)]


def without_folders(settings: dict[str, Any]) -> dict[str, Any]:
    """Return `settings` with local paths cut to their last name: a table is passed on, its author's folders are not."""

    def shown(value: Any) -> Any:
        if isinstance(value, dict):
            return without_folders(value)
        return Path(value).name if isinstance(value, str) and value and Path(value).exists() else value

    return {name: shown(value) for name, value in settings.items()}


def every_query(source: Any) -> Contexts:
    """Return one round of each query of a context source that knows them all (``rounds``, ``n_items``).

    Raises:
        ConfigError: it does not know them.
    """
    if not hasattr(source, "rounds"):
        raise ConfigError(
            f"contexts: expected a source that lists its queries, got {type(source).__name__}; pass a log that has them"
        )
    every = np.arange(source.n_items)
    rounds: Contexts = source.rounds(np.zeros_like(every), every)
    return rounds


def first_of_each(queries: Contexts, n: int | None) -> Contexts:
    """Return the first round of each query text, of the first `n` texts."""
    rows = sorted({text: row for row, text in reversed(list(enumerate(query_texts(queries))))}.values())
    if n is not None:
        check_integer("--queries", n, 1)
    return queries.take(np.array(rows[:n]))


def visited(path: Path, outputs: TextOutputModel) -> tuple[Contexts, Array]:
    """Return the queries of a log, one round each, and which (query, prompt) its rows have, (n_q, A) of bool.

    Raises:
        ConfigError: the log is over other prompts.
        DataError: its queries have no text.
    """
    log = LoggedDataset.load(path)
    if log.prompts.fingerprint != outputs.prompts.fingerprint:
        raise ConfigError(
            f"--log: expected a log over the environment's {len(outputs.prompts)} prompts, got one over "
            f"{len(log.prompts)} others; pass the log's settings with --env"
        )
    queries = first_of_each(log.contexts, None)
    place = {text: row for row, text in enumerate(query_texts(queries))}
    pairs = np.zeros((len(queries), len(log.prompts)), dtype=bool)
    pairs[[place[text] for text in query_texts(log.contexts)], log.action] = True
    return queries, pairs
