"""``offprompts methods``, and how learners and estimators are made from names and settings."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

import tyro

from agents.inspection.needs import ESTIMATORS, LEARNERS, Method
from offprompts_env.errors import unknown_name


@dataclass(frozen=True)
class Methods:
    """List learners and estimators, or the settings of one of them.

    In use:
      offprompts methods
      offprompts methods dso
      offprompts methods dr
    """

    name: Annotated[str | None, tyro.conf.Positional] = None
    """Name of a learner or an estimator; one that is both is shown as both."""

    def run(self) -> None:
        """Run the command."""
        if self.name is None:
            for title, methods in (("learners", LEARNERS), ("estimators", ESTIMATORS)):
                print(f"{title} (offprompts methods NAME shows the settings of one)")
                print("\n".join(_listed(methods)))
            return
        tables = [methods for methods in (LEARNERS, ESTIMATORS) if self.name in methods]
        if not tables:
            raise unknown_name("method", self.name, {*LEARNERS, *ESTIMATORS})
        for methods in tables:
            print("\n".join(_described(self.name, "learner" if methods is LEARNERS else "estimator", methods)))


def make_method(name: str, methods: Mapping[str, Method], kind: str) -> Any:
    """Return the learner or estimator called `name` with its default settings.

    Raises:
        ConfigError: there is none; the message names the nearest.
    """
    import agents

    if name not in methods:
        raise unknown_name(kind, name, methods)
    return getattr(agents, methods[name].class_name)()


def _listed(methods: Mapping[str, Method]) -> Iterator[str]:
    import agents

    width = max(map(len, methods))
    for name, method in methods.items():
        needs = [
            word
            for word, wanted in (
                ("propensities", method.propensities), ("a logging policy, or a clone", method.logger),
                ("outputs", method.outputs), ("the generator", method.generator),
            )
            if wanted
        ]  # fmt: skip
        summary = _plain(inspect.getdoc(getattr(agents, method.class_name)) or "").partition("\n")[0]
        asked = f" [needs {', '.join(needs)}]" if needs else ""
        yield f"  {name:<{width}}  {summary}{asked}"


def _described(name: str, kind: str, methods: Mapping[str, Method]) -> Iterator[str]:
    method = make_method(name, methods, kind)
    documentation = inspect.getdoc(type(method)) or ""
    said = _attributes(type(method))
    yield f"{kind} {name}: agents.{type(method).__name__}"
    yield ""
    yield _plain(documentation.partition("\nAttributes:")[0]).rstrip()
    yield ""
    yield f"settings, given as --set name=value (offprompts {'learn' if kind == 'learner' else 'evaluate'} ...):"
    yield from _settings(method, "", said)
    yield ""


def _settings(configuration: Any, prefix: str, said: Mapping[str, str]) -> Iterator[str]:
    for own in fields(configuration):
        if not own.init:
            continue
        value = getattr(configuration, own.name)
        inner = hasattr(value, "__dataclass_fields__")
        shown = type(value).__name__ if inner else repr(value)
        line = f"{prefix}{own.name} = {shown}{f': {said[own.name]}' if own.name in said else ''}"
        yield from textwrap.wrap(line, 100, initial_indent="  ", subsequent_indent=" " * 8, break_long_words=False)
        if inner:
            yield from _settings(value, f"{prefix}{own.name}.", _attributes(type(value)))


def _attributes(kind: type) -> dict[str, str]:
    """Return what the docstrings of a class and those it is made of say of its attributes."""
    import docstring_parser

    said: dict[str, str] = {}
    for base in kind.__mro__:
        for parameter in docstring_parser.parse(base.__doc__ or "").params:
            for name in parameter.arg_name.split(", "):
                said.setdefault(name, " ".join(_plain(parameter.description or "").split()))
    return said


def _plain(documentation: str) -> str:
    """Return it without the marks of reStructuredText."""
    return re.sub(r":\w+:`~?([^`]*)`", r"\1", documentation).replace("`", "")
