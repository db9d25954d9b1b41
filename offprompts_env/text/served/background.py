"""An event loop in a thread of its own: works under a caller's running loop, such as that of a notebook."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Background:
    """A private event loop.

    Args:
        close: awaited in the loop before it ends.
    """

    def __init__(self, close: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._close = close
        self._process = os.getpid()
        self._loop = asyncio.new_event_loop()
        # A daemon: what is under way when the program ends is cut off and not waited for.
        self._thread = threading.Thread(target=self._serve, name="offprompts-served", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it can be used: a fork has no threads of its parent."""
        return self._process == os.getpid() and self._thread.is_alive()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what `work` returns; an interrupt while waiting, such as Ctrl-C, cancels it and is raised again."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()

    def stop(self) -> None:
        """Close, and end the thread; does nothing the second time."""
        if not self.alive:
            return
        asyncio.run_coroutine_threadsafe(self._finish(), self._loop)
        # A collected owner may be let go of by the loop itself, which cannot wait for its own end.
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _serve(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    async def _finish(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        try:
            await asyncio.gather(*others, return_exceptions=True)
            await self._close()
        finally:
            self._loop.stop()
