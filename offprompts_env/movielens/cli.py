"""``offprompts build-assets`` and ``offprompts card``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from offprompts_env.config import read_object
from offprompts_env.movielens.build import BuildConfig, build_assets, published, small, survey
from offprompts_env.movielens.bundle import Bundle
from offprompts_env.text.loading import MODEL_KWARGS


@dataclass(frozen=True)
class BuildAssets:
    """Build an asset bundle from raw MovieLens files, and measure it; an interrupted build goes on where it stopped."""

    raw: Path
    """Folder with the raw files: CSV (latest, 20M, 25M), '::' (1M, 10M), tab (100K) or RecBole atomic files."""
    out: Path
    """Where the bundle goes; a bundle that is there already is replaced when the new one is complete."""
    work: Path | None = None
    """Folder that keeps finished stages (default: beside the bundle)."""
    quiet: bool = False
    """Show no progress (it is never shown where standard error is not a terminal)."""
    tiny: bool = False
    """Tiny models and few steps, to try the pipeline out in seconds; the bundle will be poor."""
    published: bool = False
    """Settings of the published experiment: Mistral-7B-Instruct-v0.2 and distilbert-base-uncased, for MovieLens-10M."""
    dry_run: bool = False
    """Only say what it would take: sentences, weights, disk."""
    model_kwargs: str | None = None
    """Further arguments of from_pretrained for --lm, as JSON: '{"attn_implementation": "eager"}'."""
    config: tyro.conf.AvoidSubcommands[Annotated[BuildConfig, tyro.conf.arg(name="")]] = field(
        default_factory=BuildConfig
    )

    def run(self) -> None:
        """Run the command."""
        config = small(self.config) if self.tiny else self.config
        if self.model_kwargs is not None:
            config = replace(config, model_kwargs=read_object("--model-kwargs", self.model_kwargs, MODEL_KWARGS))
        config = published(config) if self.published else config
        if self.dry_run:
            ahead = survey(self.raw, self.out, config)
            print("\n".join(ahead.lines()))
            ahead.check()
            return
        print(build_assets(self.raw, self.out, config, self.work, quiet=True if self.quiet else None))


@dataclass(frozen=True)
class Card:
    """Print the model card of a bundle, with every measured figure, after checking the bundle's files."""

    bundle: Path | None = None
    """Folder of the bundle (default: the embedded one)."""

    def run(self) -> None:
        """Run the command."""
        bundle = Bundle.open(self.bundle)
        bundle.verify()
        print(bundle.file("MODEL_CARD.md").read_text(encoding="utf-8"))
