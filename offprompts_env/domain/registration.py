"""One line that turns a bundle into an id of Gymnasium, and the way from a row of a log back to the user's own ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gymnasium.envs.registration import register

from offprompts_env.errors import ConfigError
from offprompts_env.movielens.bundle import Bundle


def register_domain(env_id: str, bundle: str | Path, **settings: Any) -> None:
    """Register the environment of a `bundle` under `env_id`, such as ``"MyDomain-v0"``.

    Put the call into a module of your own: ``gym.make("my_module:MyDomain-v0")`` imports it, in any process.

    Args:
        env_id: name and version.
        bundle: folder that :func:`~offprompts_env.domain.build.build_domain` wrote.
        settings: of :class:`~offprompts_env.movielens.parts.MovieLensConfig`, as defaults of the environment.

    Raises:
        BundleError: there is no such bundle.
        ConfigError: a setting has no form in JSON, so that a log could not name its environment.
    """
    folder = Bundle.open(bundle).directory.resolve()
    try:
        json.dumps(settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"register_domain: expected settings that JSON knows, got {settings!r} ({error}); pass own parts to "
            "gym.make instead"
        ) from error
    register(
        env_id,
        entry_point="offprompts_env.domain.envs:DomainEnv",
        vector_entry_point="offprompts_env.domain.envs:DomainVectorEnv",
        kwargs={"bundle": str(folder), **settings},
    )


def original_ids(bundle: str | Path) -> tuple[dict[int, str], dict[int, str]]:
    """Return what ``user_id`` and ``item_id`` of a log's rows are in the files that the bundle was built from.

    Raises:
        BundleError: the bundle, or its table of ids, is missing or damaged.
    """
    opened = Bundle.open(bundle)
    found = json.loads(opened.file("ids.json").read_text(encoding="utf-8"))
    return dict(enumerate(found["users"])), dict(enumerate(found["items"]))
