"""``offprompts build-domain``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from offprompts_env.config import read_object
from offprompts_env.domain.build import DomainConfig, build_domain
from offprompts_env.text.loading import MODEL_KWARGS


@dataclass(frozen=True)
class BuildDomain:
    """Build the bundle of your own domain, and measure it; an interrupted build goes on where it stopped.

    In use:
      offprompts build-domain --items items.csv --interactions interactions.csv --keywords keywords.txt --out bundle
        --lm distilgpt2 --template "About {query}, think of {prompt}:" --template-without-prompt "About {query}:"
    Afterwards, in a module of yours (docs/your-own-domain.md):
      from offprompts_env.domain import register_domain
      register_domain("MyDomain-v0", "bundle")
    """

    items: Path
    """CSV with item_id, title (or text), and perhaps features separated by |."""
    interactions: Path
    """CSV with user_id, item_id, and rating, or liked or clicked as 0 and 1."""
    keywords: Path
    """The prompts: one a line, or a CSV with the column keyword."""
    out: Path
    """Where the bundle goes; a bundle that is there already is replaced when the new one is complete."""
    config: tyro.conf.AvoidSubcommands[Annotated[DomainConfig, tyro.conf.arg(name="")]]
    work: Path | None = None
    """Folder that keeps finished stages (default: beside the bundle)."""
    quiet: bool = False
    """Show no progress (it is never shown where standard error is not a terminal)."""
    server: str | None = None
    """Where --lm is the address of a server: its settings as JSON, at least the model's name: '{"model": "NAME"}'."""
    model_kwargs: str | None = None
    """Further arguments of from_pretrained for --lm, as JSON: '{"attn_implementation": "eager"}'."""

    def run(self) -> None:
        """Run the command."""
        quiet = True if self.quiet else None
        config = self.config
        if self.server is not None:
            config = replace(config, server=read_object("--server", self.server, '{"model": "NAME"}'))
        if self.model_kwargs is not None:
            config = replace(config, model_kwargs=read_object("--model-kwargs", self.model_kwargs, MODEL_KWARGS))
        print(build_domain(self.items, self.interactions, self.keywords, self.out, config, self.work, quiet))
