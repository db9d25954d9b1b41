"""What a build will take, told before hours of it: sentences, weights, disk, memory."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from offprompts_env.errors import ConfigError, StorageError

# A sentence with its request, in the store of the build and in the files made of it, in bytes.
_SENTENCE = 1024

# A simulator is kept by its stage and by the bundle.
_COPIES = 2


@dataclass(frozen=True)
class Survey:
    """What a build will take.

    Attributes:
        users: after the filter.
        movies: likewise.
        reactions: likewise.
        sentences: that the language model will write, by stage.
        lm_bytes: weights of an existing language model; None of one that is on the hub, or is to be trained.
        encoder_bytes: likewise of the simulator's encoder.
        copies_lm: whether the bundle will hold the language model.
        lm_on_cpu: whether the language model will compute from this machine's memory.
        disk_free: bytes, where stages and the bundle go.
        memory: bytes of this machine.
    """

    users: int
    movies: int
    reactions: int
    sentences: dict[str, int]
    lm_bytes: int | None
    encoder_bytes: int | None
    copies_lm: bool
    lm_on_cpu: bool
    disk_free: int
    memory: int

    @property
    def disk(self) -> int:
        """Bytes that stages and bundle will take, about."""
        copied = (self.lm_bytes or 0) if self.copies_lm else 0
        return copied + _COPIES * (self.encoder_bytes or 0) + _SENTENCE * sum(self.sentences.values())

    def check(self) -> None:
        """Refuse what cannot end well.

        Raises:
            StorageError: the disk has no room for it.
            ConfigError: the language model is larger than the memory that it is to compute in.
        """
        if self.disk > self.disk_free:
            raise StorageError(
                f"build: expected {_size(self.disk)} of free disk for stages and bundle, found "
                f"{_size(self.disk_free)}; free some, pass another work folder and out, or copy_lm=False"
            )
        if self.lm_on_cpu and (self.lm_bytes or 0) > self.memory:
            raise ConfigError(
                f"lm: expected weights that fit into the {_size(self.memory)} of this machine, got "
                f"{_size(self.lm_bytes or 0)}; pass device='cuda', device_map='auto', or a smaller model"
            )

    def lines(self) -> list[str]:
        """Say it for people, a line a thing."""
        written = ", ".join(f"{count:,} {stage}" for stage, count in self.sentences.items() if count)
        return [
            f"filter      {self.users:,} users, {self.movies:,} movies, {self.reactions:,} reactions",
            f"sentences   {sum(self.sentences.values()):,} to write ({written})",
            f"weights     language model {_weights(self.lm_bytes)}, encoder {_weights(self.encoder_bytes)}",
            f"disk        {_size(self.disk)} of {_size(self.disk_free)} that are free",
        ]


def weights_in(source: str | None) -> int | None:
    """Return the bytes of the weights in the folder `source`; None if it is none."""
    if source is None or not Path(source).expanduser().is_dir():
        return None
    return sum(file.stat().st_size for file in Path(source).expanduser().glob("*.safetensors"))


def free_disk(folder: Path) -> int:
    """Return the bytes that are free where `folder` is, or will be."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    return shutil.disk_usage(there).free


def physical_memory() -> int:
    """Return the bytes of memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _size(n: int) -> str:
    return f"{n / 2**30:,.1f} GiB" if n >= 2**30 else f"{n / 2**20:,.1f} MiB"


def _weights(n: int | None) -> str:
    return "from the hub, or trained here" if n is None else _size(n)
