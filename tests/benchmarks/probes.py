"""What tests ask workers to do. In a file of its own, which workers import in no time."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def probe(what: str) -> object:
    """Do what is asked for in a worker."""
    if what == "raise":
        raise ValueError("as asked\nin two lines")
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "sleep":
        time.sleep(60)
    if what == "threads":
        import torch

        return torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], os.environ["OPENBLAS_NUM_THREADS"]
    return what


def die_once(mark: Path) -> str:
    """Die, unless `mark` says that it was done already."""
    if not mark.exists():
        mark.touch()
        probe("die")
    return "second"
