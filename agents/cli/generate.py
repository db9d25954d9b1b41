"""``offprompts generate``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from agents.cli.freeze import every_query, first_of_each, visited
from agents.cli.output import print_json
from agents.cli.record import make_env
from agents.cli.settings import read_settings
from offprompts_env.config import check_integer, check_number
from offprompts_env.errors import ConfigError
from offprompts_env.text.bulk import BulkReport, Engine, Here, Plan, Processes, RayCluster, generate, plan
from offprompts_env.text.prompted import TextOutputModel, query_texts
from offprompts_env.text.store import SentenceStore
from offprompts_env.text.tokens import counting
from offprompts_env.types import Contexts

# A dry run writes so many sentences, and keeps them, to say how long the rest would take.
_TRIAL = 64


@dataclass(frozen=True)
class EnvironmentOutputs:
    """Makes the output model of an environment, wherever it is called."""

    env_id: str
    settings: dict[str, Any]

    def __call__(self) -> TextOutputModel:
        """Make it.

        Raises:
            ConfigError: the environment has no language model.
        """
        made: Any = make_env(self.env_id, self.settings)
        outputs = made.unwrapped.simulator.outputs
        outputs = getattr(outputs, "outputs", outputs)
        if not isinstance(outputs, TextOutputModel):
            raise ConfigError(f"{self.env_id}: expected an environment whose outputs a language model writes, got none")
        return outputs


@dataclass(frozen=True)
class Generate:
    """Fill a store with K sentences of each (query, prompt), or of those that a log has, and with references.

    References are the sentences without a prompt of which a continuous reward is a difference.

    In use:
      offprompts generate OffPrompts-MovieLens-v0 --store sentences.db --env n_prompts=20 --samples 4
      offprompts generate OffPrompts-MovieLens-v0 --store sentences.db --env n_prompts=20 --log log --workers 4
      offprompts generate OffPrompts-MovieLens-v0 --store sentences.db --env n_prompts=20 --dry-run

    An environment with the same settings, cache_slots=K and this sentence_store then asks its model nothing. A run that
    was stopped goes on with the same command.
    """

    env_id: Annotated[str, tyro.conf.Positional]
    """Id of the environment."""
    store: Path
    """File of the store; it is made where there is none."""
    samples: int = 4
    """K."""
    env: tuple[str, ...] = ()
    """Settings of the environment, as name=value."""
    log: Path | None = None
    """Only what the rows of this log need."""
    queries: int | None = None
    """Only the first so many queries."""
    seed: int = 0
    """Of the sample table."""
    workers: int = 1
    """Processes or actors; one writes in this process, which is right for a server or an accelerator."""
    engine: Literal["local", "ray"] = "local"
    """Where they run."""
    address: str | None = None
    """Of a Ray cluster; "auto" for the one that this machine belongs to."""
    gpus: float = 0
    """Accelerators a Ray actor."""
    shard_size: int = 1024
    """Sentences a shard: what a lost worker or an interrupt costs."""
    price: float | None = None
    """Of a million tokens that are read, and also written where --price-written says nothing else."""
    price_written: float | None = None
    """Of a million tokens that are written; needs --price."""
    dry_run: bool = False
    """Only say what there is to do, and from a few sentences, how long it would take."""
    quiet: bool = False
    """Show no progress (it is never shown where standard error is not a terminal)."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> None:
        """Run the command."""
        self._check_prices()
        settings = read_settings(self.env, "--env")
        engine = self._engine()
        store = SentenceStore(self.store)
        made: Any = make_env(self.env_id, settings | {"sentence_store": str(self.store)})
        simulator = made.unwrapped.simulator
        make = EnvironmentOutputs(self.env_id, settings)
        outputs = make()
        queries, requests = self._needs(simulator, outputs)
        store.describe(outputs.fingerprint, {"model": settings.get("language_model", "the bundle's model")})
        planned = plan(
            outputs, requests, store, samples=self.samples, seed=self.seed, shard_size=self.shard_size
        )  # fmt: skip
        unprompted = getattr(simulator.rewards, "unprompted", None)
        asked = () if unprompted is None else unprompted.missing(query_texts(queries))
        if self.dry_run:
            self._say_plan(planned, outputs, store, len(asked))
            return
        try:
            references = _references(unprompted, asked)
            report = self._generate(planned, make if engine.workers > 1 else lambda: outputs, store, engine, references)
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(
                f"{self.store} has {len(store):,} sentences; go on with the same command"
            ) from interrupt
        self._say_report(report)

    def _check_prices(self) -> None:
        for name, price in (("--price", self.price), ("--price-written", self.price_written)):
            if price is not None:
                check_number(name, price, 0)
        if self.price_written is not None and self.price is None:
            raise ConfigError("--price-written: the tokens that are read have no price; give --price too, 0 if free")

    def _engine(self) -> Engine:
        check_integer("--workers", self.workers, 1)
        if self.engine == "ray":
            return RayCluster(self.workers, self.address, self.gpus)
        if self.address is not None:
            raise ConfigError("--address: the engine local has none; give --engine ray too")
        return Here() if self.workers == 1 else Processes(self.workers)

    def _needs(self, simulator: Any, outputs: TextOutputModel) -> tuple[Contexts, list[str]]:
        """Return the queries, one round each, and the requests about them."""
        if self.log is None:
            queries = first_of_each(every_query(simulator.contexts), self.queries)
            asked, chosen = np.divmod(np.arange(len(queries) * len(outputs.prompts)), len(outputs.prompts))
        else:
            queries, pairs = visited(self.log, outputs)
            queries = first_of_each(queries, self.queries)
            asked, chosen = np.nonzero(pairs[: len(queries)])
        return queries, outputs.requests(queries.take(asked), chosen)

    def _generate(
        self, planned: Plan, make: Any, store: SentenceStore, engine: Engine, references: BulkReport
    ) -> BulkReport:
        from tqdm import tqdm

        with tqdm(total=planned.missing, unit="sentence", disable=True if self.quiet else None) as bar:

            def show(report: BulkReport) -> None:
                if self.price is not None:
                    bar.set_postfix_str(f"cost {_money(self._cost(references + report))}", refresh=False)
                bar.update(report.written - bar.n)

            return references + generate(planned, make, store, engine, progress=show)

    def _cost(self, report: BulkReport) -> float:
        read = self.price or 0.0
        written = read if self.price_written is None else self.price_written
        return (report.tokens_in * read + report.tokens_out * written) / 1e6

    def _say_plan(self, planned: Plan, outputs: TextOutputModel, store: SentenceStore, references: int) -> None:
        counts: dict[str, Any] = {
            "requests": planned.requests, "samples": planned.samples, "found": planned.found,
            "missing": planned.missing, "references": references, "shards": len(planned.shards),
        }  # fmt: skip
        if planned.shards:
            requests = planned.shards[0].requests[:: planned.samples]
            few = plan(outputs, requests, store, samples=planned.samples, seed=self.seed, shard_size=_TRIAL)
            start = time.perf_counter()
            trial = generate(
                Plan(few.model, few.seed, few.requests, few.samples, few.shards[:1]), lambda: outputs, store
            )
            each = (time.perf_counter() - start) / max(trial.written, 1)
            counts["seconds"] = each * (planned.missing / self.workers + references)
            if self.price is not None:
                counts["cost"] = self._cost(trial) / max(trial.written, 1) * (planned.missing + references)
        if self.json:
            print_json(counts)
            return
        print(
            f"{planned.requests:,} requests, {planned.samples} sentences each: {planned.found:,} in {self.store}, "
            f"{planned.missing:,} to write, in {len(planned.shards):,} shards"
            f"{f'; and {references:,} references without a prompt' if references else ''}"
        )
        if "seconds" in counts:
            cost = f", at a cost of about {_money(counts['cost'])}" if "cost" in counts else ""
            minutes = counts["seconds"] / 60
            took = f"{minutes:,.1f} min" if minutes >= 2 else f"{counts['seconds']:.1f} s"
            print(f"about {took}, workers: {self.workers}{cost}")

    def _say_report(self, report: BulkReport) -> None:
        if self.json:
            cost = {} if self.price is None else {"cost": self._cost(report)}
            print_json({"store": str(self.store), **report.to_json(), **cost})
            return
        own = f", {report.references:,} of them references without a prompt" if report.references else ""
        lost = f"; {report.lost_workers} workers died and were replaced" if report.lost_workers else ""
        about = "" if report.counted is not None else "about "
        cost_said = "" if self.price is None else f", cost {about}{_money(self._cost(report))}"
        print(
            f"{self.store}: {report.written:,} sentences written{own}, {report.found:,} were there; "
            f"{report.seconds:,.0f} s, {report.sentences_per_second:,.0f} sentences/s, {about}{report.tokens_in:,} "
            f"tokens read and {report.tokens_out:,} written{cost_said}{lost}"
        )


def _money(cost: float) -> str:
    # Two digits that say something, also of a small trial.
    return f"{cost:,.2f}" if cost >= 1 or not cost else f"{cost:.2g}"


def _references(unprompted: Any, asked: Sequence[tuple[str, int]]) -> BulkReport:
    """Let `unprompted` write the references that are `asked` for, where it has any, and report on it."""
    if not asked:
        return BulkReport.of_nothing()
    start, queries = time.perf_counter(), list(dict.fromkeys(query for query, _ in asked))
    written, tokens = counting(unprompted.language_model, lambda: unprompted.about(queries))
    said = dict(zip(queries, written, strict=True))
    return BulkReport(
        found=0,
        written=len(asked),
        seconds=time.perf_counter() - start,
        characters_in=sum(len(unprompted.formatter.ask(query)) for query, _ in asked),
        characters_out=sum(len(said[query][k]) for query, k in asked),
        counted=tokens,
        lost_workers=0,
        references=len(asked),
    )
