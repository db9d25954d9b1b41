"""A language model behind a server that speaks the OpenAI protocol, for whoever needs a ``LanguageModel``."""

from __future__ import annotations

import asyncio
import hashlib
import json
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from offprompts_env.errors import DataError, ModelError, ServerError
from offprompts_env.text.decoding import Decoding
from offprompts_env.text.language_model import SEEDS, Randomness, row_seeds
from offprompts_env.text.served.background import Background
from offprompts_env.text.served.connection import FIRST_ATTEMPTS, Connection
from offprompts_env.text.served.protocol import (
    Answer,
    Refusal,
    fixed_fields,
    read_answer,
    read_listing,
    request_body,
)
from offprompts_env.text.served.report import Report
from offprompts_env.text.served.settings import Server
from offprompts_env.text.tokens import TokenCount

# Empty answers to one request before another seed is tried.
_SAME_SEED = 3

# A request: prompt and seed, or no seed where the answer does not depend on one.
_Job = tuple[str, int | None]


class ServedLM:
    """A frozen language model on a server.

    Each sentence is one request with a seed of its own, drawn from the caller's generator: with a server that honours
    seeds (see :mod:`~offprompts_env.text.served.protocol`) a sentence is a function of prompt and generator, as with a
    model in process. An attempt that fails is repeated with the same seed, so faults change no sentence. An empty
    answer counts as a fault; if it comes four times, the next attempt has another seed. So the distribution is that of
    the model's non-empty sentences.

    What stays out of reach: a server that ignores seeds gives other sentences in every run; the text of a prompt is
    the user's turn and nothing else, but a server may read control tokens in it (``<|im_start|>``) as such.

    Under Ctrl-C, requests under way are cancelled. After an error or Ctrl-C, sentences that were complete are kept for
    the same call made again. A copy, or an unpickled one in another process, opens connections of its own.

    Args:
        server: where it is, what it is called, how patiently it is asked.
        decoding: how tokens are chosen.

    Attributes:
        report: requests, retries and waiting so far.
    """

    def __init__(self, server: Server, decoding: Decoding | None = None) -> None:
        self.server = server
        self.decoding = decoding if decoding is not None else Decoding()
        self.report = Report()
        self._fixed = fixed_fields(server, self.decoding)
        self._path = "chat/completions" if server.chat else "completions"
        self._listed: dict[str, Any] | None = None
        self._writer: dict[str, str] = {}
        self._kept: dict[_Job, str] = {}
        self._warned = False
        self._background: Background | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.server.model!r} at {self.server.url})"

    def __reduce__(self) -> tuple[type[ServedLM], tuple[Server, Decoding]]:
        return type(self), (self.server, self.decoding)

    @property
    def fingerprint(self) -> str:
        """Digest of everything asked for but the prompt: the model's name, decoding, chat or plain.

        Not of the address: a server may move. The weights behind the name are the server's business, see
        :attr:`identity`.
        """
        shape = {"served": self._fixed, "chat": self.server.chat, "decoding": asdict(self.decoding)}
        return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()

    @property
    def deterministic(self) -> bool:
        """True under greedy decoding, if the caller says that the server keeps to it."""
        return self.decoding.greedy and self.server.deterministic

    @property
    def reproducible(self) -> bool:
        """Whether the same generators give the same sentences again; only the caller can say that of a server."""
        return self.server.deterministic

    @property
    def identity(self) -> dict[str, Any]:
        """What the server has said so far about the model that answers; empty before the first sentence."""
        return (self._listed or {}) | self._writer

    @property
    def tokens(self) -> TokenCount:
        """Read and written so far, where the server counts them in its answers (``usage``)."""
        return self.report.tokens

    def identify(self) -> dict[str, Any]:
        """Return what the server lists under the model's name; it is asked once.

        Empty where it does not say, does not answer now, or is not to be checked.
        """
        if self._listed is None and self.server.check_identity:
            connection, background = self._connected()
            try:
                background.run(self._identify(connection, min(FIRST_ATTEMPTS, self.server.attempts)))
            except Refusal:
                # Whoever asks for a sentence next is told why.
                return {}
        return dict(self._listed or {})

    def close(self) -> None:
        """Close all connections; the next call of :meth:`generate` opens new ones."""
        if self._background is not None:
            self._background.stop()
            self._background = None

    def generate(self, prompts: Sequence[str], rng: Randomness) -> list[str]:
        """Return one continuation a prompt, without surrounding blanks and from the first stop string on.

        Raises:
            DataError: a prompt is blank, or the generators are not as many as the prompts.
            ServerError: the server refuses, or does not answer within the attempts or the deadline.
            ModelError: it answers with another model than asked for, or than at first.
            MissingDependencyError: aiohttp is not installed.
        """
        prompts = list(prompts)
        for index, prompt in enumerate(prompts):
            if not isinstance(prompt, str) or not prompt.strip():
                raise DataError(f"prompt: expected non-blank text, got {prompt!r} at position {index}; fill it")
        seeds = row_seeds(rng, len(prompts))
        jobs: list[_Job] = [(p, None if self.deterministic else s) for p, s in zip(prompts, seeds, strict=True)]
        if not jobs:
            return []
        done = {job: self._kept[job] for job in jobs if job in self._kept}
        self._kept = done
        refused = self._finish(dict.fromkeys(jobs), done)
        if refused is not None:
            raise ServerError(
                f"{self.server.url}: {refused}. {sum(job in done for job in jobs)} of the {len(jobs)} sentences of "
                f"this call are complete (so far: {self.report}). To resume, make the same call again, which asks for "
                "the others only; or, for a recording, call collect again with the same arguments and mode='append', "
                "which keeps the rows so far"
            )
        self._kept = {}
        if self.report.retries and not self._warned:
            self._warned = True
            warnings.warn(f"{self.server.url} stumbles: {self.report}; more in `report`", stacklevel=2)
        return [done[job] for job in jobs]

    def _finish(self, jobs: Iterable[_Job], done: dict[_Job, str]) -> Refusal | None:
        """Put the sentence of each job into `done`; return why not all could be had."""
        connection, background = self._connected()
        try:
            background.run(self._write(connection, [job for job in jobs if job not in done], done))
        except Refusal as refusal:
            return refusal
        except ModelError:
            # Who wrote what is no longer known.
            done.clear()
            raise
        return None

    def _connected(self) -> tuple[Connection, Background]:
        if self._background is None or not self._background.alive:
            self._connection = Connection(self.server, self.report)
            self._background = Background(self._connection.close)
            weakref.finalize(self, self._background.stop)
        return self._connection, self._background

    async def _write(self, connection: Connection, jobs: list[_Job], done: dict[_Job, str]) -> None:
        known: list[str] = []
        try:
            async with asyncio.timeout(self.server.deadline):
                if self._listed is None:
                    known = await self._identify(connection, min(FIRST_ATTEMPTS, self.server.attempts))
                await self._work(connection, jobs, done)
                # Another process may have taken over meanwhile: it is asked before what it wrote is handed out.
                if connection.renewed:
                    await self._identify(connection, self.server.attempts)
        except TimeoutError:
            raise Refusal(
                f"the deadline of {self.server.deadline:g} s for one call has passed; raise deadline, or ask for fewer "
                "sentences at a time"
            ) from None
        except Refusal as refusal:
            if refusal.status == 404 and known:
                raise Refusal(f"{refusal}; it lists {', '.join(map(repr, known[:5]))}", 404) from None
            raise

    async def _work(self, connection: Connection, jobs: list[_Job], done: dict[_Job, str]) -> None:
        """Ask for all `jobs`, as many at once as the server is said to take; the first failure ends all."""
        queue = iter(jobs)

        async def worker() -> None:
            for job in queue:
                answer = await connection.ask(
                    self._path, partial(self._body, job), self._read, attempts=self.server.attempts
                )
                self._check_writer(answer.writer)
                done[job] = answer.text
                self.report.sentences += 1

        workers = [asyncio.create_task(worker()) for _ in range(min(self.server.concurrency, len(jobs)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for task in workers:
                task.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    def _body(self, job: _Job, blank: int) -> bytes:
        prompt, seed = job
        # An empty answer that comes again and again is the model's own with this seed.
        if seed is not None and blank > _SAME_SEED:
            seed = int(np.random.SeedSequence([seed, blank]).generate_state(1)[0]) % SEEDS
        return request_body(self._fixed, self.server.chat, prompt, seed)

    def _read(self, raw: bytes) -> Answer:
        return read_answer(raw, self.server.chat, self.decoding, self._spent)

    def _spent(self, tokens: TokenCount) -> None:
        self.report.tokens += tokens

    async def _identify(self, connection: Connection, attempts: int) -> list[str]:
        """Compare what the server lists under the model's name with what it did at first; return all names."""
        if not self.server.check_identity:
            return []
        connection.renewed = False
        try:
            listed, names = await connection.ask(
                "models", None, partial(read_listing, model=self.server.model), attempts=attempts
            )
        except Refusal as refusal:
            # Not every server lists its models; one that does not let us in is of no use.
            if refusal.status is None or refusal.status in (401, 403) or refusal.status < 400:
                raise
            listed, names = None, []
        if self._listed is None:
            self._listed = listed or {}
        elif listed is not None:
            for name, value in self._listed.items():
                self._expect(name, value, listed.get(name))
        return names

    def _check_writer(self, writer: Mapping[str, str]) -> None:
        if not self.server.check_identity:
            return
        for name, value in writer.items():
            if name == "model" and name not in self._writer and not value.startswith(self.server.model):
                raise ModelError(
                    f"{self.server.url}: expected answers of the model {self.server.model!r}, got one of {value!r}; "
                    "name that model, or, if it is only another name of it, set check_identity=False"
                )
            self._expect(name, self._writer.setdefault(name, value), value)

    def _expect(self, name: str, first: object, now: object) -> None:
        if now != first:
            raise ModelError(
                f"{self.server.url}: expected the model that answered at first under the name {self.server.model!r}, "
                f"with {name} {first!r}, got {now!r}; the sentences of this call are dropped, as nobody knows which "
                "model wrote them. Serve the first one again, or begin a new recording with a new model object"
            )
