"""The errors this project raises on bad input; every message says what was expected, what came, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class OffPromptsError(Exception):
    """Base of all errors raised on purpose by this project."""


class ConfigError(OffPromptsError, ValueError):
    """A setting is unknown, out of range, or does not fit another one."""


class DimensionError(ConfigError):
    """Two parts disagree about a dimension."""


class ActionError(OffPromptsError, ValueError):
    """An action is not a valid prompt index."""


class ResetNeededError(OffPromptsError, RuntimeError):
    """``step`` was called where no round is open."""


class DataError(OffPromptsError, ValueError):
    """Data from outside (a log, a data frame, raw ratings) is malformed."""


class PropensityError(DataError):
    """Propensities are missing or not probabilities, and the method at hand needs them."""


class StorageError(OffPromptsError, OSError):
    """A file or directory cannot be read or written as asked."""


class BundleError(StorageError):
    """An asset bundle is missing, incomplete or damaged."""


class ModelError(OffPromptsError, ValueError):
    """A language model, encoder or tokenizer cannot be used as it is."""


class ServerError(OffPromptsError, RuntimeError):
    """A server refuses to answer, or did not answer in the time it was given; what was complete can be kept."""


class NumericalError(OffPromptsError, ArithmeticError):
    """A computation gave NaN or infinity."""


class AgentError(OffPromptsError, RuntimeError):
    """Code of an agent from elsewhere raised; the message names the call, the cause is the agent's own error."""


class MissingDependencyError(OffPromptsError, ImportError):
    """An optional package is needed for what was asked."""


def missing_dependency(package: str, extra: str, purpose: str) -> MissingDependencyError:
    """Return the error for an optional `package` that `purpose` needs and that the extra `extra` installs."""
    return MissingDependencyError(
        f"{purpose} needs the package {package!r}, which is not installed; "
        f"install it with: pip install 'offprompts-env[{extra}]'"
    )


def unknown_name(kind: str, name: object, valid: Iterable[str]) -> ConfigError:
    """Return the error for an unknown `name`, with the nearest of the `valid` ones."""
    options = sorted(valid)
    near = difflib.get_close_matches(str(name), options, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ConfigError(f"unknown {kind} {name!r}: {hint}valid: {', '.join(options)}")


@contextmanager
def foreign(what: str) -> Iterator[None]:
    """Turn what code from elsewhere raises into an :class:`AgentError` that says `what` happened, and the error."""
    try:
        yield
    except OffPromptsError:
        raise
    except Exception as error:
        raise AgentError(f"{what}: {type(error).__name__}: {error}") from error
