"""Contextual bandits of Vowpal Wabbit, with an arm for each prompt or with prompts as features.

Make one with the options of ``vw``: ``VowpalWabbit(prompts, "--squarecb", adf=True)``.
"""

from __future__ import annotations

import math
import re
import shlex
import struct
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from agents.adapters.base import Adapter
from agents.adapters.storage import Stored, read_agent, reviving, write_agent
from offprompts_env.config import check_integer, check_kind
from offprompts_env.errors import (
    ConfigError,
    DataError,
    DimensionError,
    StorageError,
    foreign,
    missing_dependency,
    unknown_name,
)
from offprompts_env.sampling import check_probabilities
from offprompts_env.types import Contexts, FloatArray, LoggedDataset, PromptSet

if TYPE_CHECKING:
    from vowpalwabbit.pyvw import Example, Workspace

_FLAG, _INTEGER, _NUMBER = "", r"\d{1,9}", r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
_PAIR, _TRIPLE, _CROSSED, _NAMESPACE = "[xqa:]{2}", "[xqa:]{3}", "[xqa:]{2,8}", "[xqa:]"
# What an agent may be made with: how it explores, how it learns, and which features it crosses. No option that names
# a file, since options are read from saved agents, too; none whose agents act otherwise once saved and loaded
# (--l1, --rnd), and none whose probabilities sum to something else than 1 (--regcbopt).
_OPTIONS: Mapping[str, str] = {
    "--epsilon": _NUMBER, "--first": _INTEGER, "--bag": _INTEGER, "--cover": _INTEGER, "--psi": _NUMBER,
    "--nounif": _FLAG, "--greedify": _FLAG, "--softmax": _FLAG, "--lambda": _NUMBER, "--regcb": _FLAG,
    "--mellowness": _NUMBER, "--squarecb": _FLAG, "--elim": _FLAG, "--gamma_scale": _NUMBER,
    "--gamma_exponent": _NUMBER, "--synthcover": _FLAG, "--synthcoverpsi": _NUMBER, "--synthcoversize": _INTEGER,
    "--cb_type": "mtr|dr|ips|dm|sm", "--cb_min_cost": _NUMBER, "--cb_max_cost": _NUMBER,
    "--learning_rate": _NUMBER, "-l": _NUMBER, "--power_t": _NUMBER, "--initial_t": _NUMBER, "--noconstant": _FLAG,
    "--sgd": _FLAG, "--adaptive": _FLAG, "--normalized": _FLAG, "--invariant": _FLAG, "--coin": _FLAG,
    "--ftrl": _FLAG, "--ftrl_alpha": _NUMBER, "--ftrl_beta": _NUMBER,
    "--bit_precision": "[1-9]|[12][0-9]", "-b": "[1-9]|[12][0-9]",
    "--quadratic": _PAIR, "-q": _PAIR, "--cubic": _TRIPLE, "--interactions": _CROSSED,
    "--ignore": _NAMESPACE, "--ignore_linear": _NAMESPACE, "--quiet": _FLAG,
}  # fmt: skip
_CROSSING = {"-q", "--quadratic", "--cubic", "--interactions"}
_REPEATED = _CROSSING | {"--ignore", "--ignore_linear"}
_EXPLORING = {"--first", "--bag", "--cover", "--softmax", "--regcb", "--squarecb", "--synthcover"}
# What Vowpal Wabbit would silently ignore without one of some other options.
_BELONGS: Mapping[str, tuple[str, ...]] = {
    "--psi": ("--cover",), "--nounif": ("--cover",), "--greedify": ("--bag",), "--lambda": ("--softmax",),
    "--mellowness": ("--regcb",), "--elim": ("--squarecb",), "--gamma_scale": ("--squarecb",),
    "--gamma_exponent": ("--squarecb",), "--synthcoverpsi": ("--synthcover",), "--synthcoversize": ("--synthcover",),
    "--cb_min_cost": ("--regcb", "--elim"), "--cb_max_cost": ("--regcb", "--elim"),
    "--ftrl_alpha": ("--ftrl", "--coin"), "--ftrl_beta": ("--ftrl", "--coin"),
}  # fmt: skip
_NO_EPSILON = ("--regcb", "--elim")


class VowpalWabbit(Adapter):
    """A contextual bandit of Vowpal Wabbit; its pmf is that of its own exploration.

    Features are called ``f0``, ``f1``, ... in the namespaces ``x`` (context), ``q`` (query) and, with `adf`, ``a``
    (embedding of a prompt). Cost is −reward. Before it has learned anything all prompts look alike.

    A loaded agent gives the same bits as the saved one and, but for ``--cover`` and ``--bag``, learns on likewise.

    Args:
        prompts: the catalogue.
        options: of exploration, learning and crossed features, as on the command line of ``vw``.
        adf: one model over features of prompts (``--cb_explore_adf``), which generalises over prompts; else one model a
            prompt (``--cb_explore A``). Unless `options` cross features, ``-q xa -q qa`` are added: without them no
            context would change the order of prompts.
        seed: of Vowpal Wabbit's own randomness (``--bag``).

    Raises:
        ConfigError: an option that is unknown, not allowed here or has a wrong value, or a combination that Vowpal
            Wabbit refuses.
        MissingDependencyError: Vowpal Wabbit is not installed.
    """

    def __init__(
        self, prompts: PromptSet, options: str = "--epsilon 0.05", *, adf: bool = False, seed: int = 0
    ) -> None:
        super().__init__(prompts)
        check_integer("seed", seed, 0, (1 << 63) - 1)
        self._settings = {"options": options, "adf": adf, "seed": seed}
        self._own = _checked_options(options)
        if adf and not _CROSSING.intersection(self._own):
            self._own += ["-q", "xa", "-q", "qa"]
        self._kind = ["--cb_explore_adf"] if adf else ["--cb_explore", str(len(prompts))]
        self._adf, self._dimensions = adf, (0, 0)
        self._start([*self._kind, *self._own, "--random_seed", str(seed)])

    def _start(self, arguments: list[str]) -> None:
        """Make the workspace, and the examples of prompts in it."""
        self._workspace = _workspace(arguments)
        self._lines = [f"|a {_numbered(row)}" for row in self.prompts.embeddings.tolist()] if self._adf else []
        self._prompt_examples = [self._example(line) for line in self._lines]
        # Left to the interpreter's end, the library would complain that its own modules are gone.
        weakref.finalize(self, self._workspace.finish)

    def _example(self, line: str) -> Example:
        from vowpalwabbit.pyvw import Example, LabelType

        return Example(self._workspace, line, LabelType.CONTEXTUAL_BANDIT)

    def probabilities(self, contexts: Contexts) -> FloatArray:
        """Return the pmf, (n, A) float64.

        Raises:
            DataError: a context is not finite, or Vowpal Wabbit gave no pmf.
            DimensionError: contexts of another dimension than it learned from.
        """
        check_kind("contexts", contexts, Contexts, "of an observation take Contexts.of(observation)")
        lines = list(self._described(contexts))
        with foreign(f"Vowpal Wabbit raised in {len(lines)} rounds"):
            # One by one, since Vowpal Wabbit has no call for many contexts; but each context once.
            known = {line: self._predict(line) for line in dict.fromkeys(lines)}
            pmf = np.array([known[line] for line in lines]) if lines else np.empty((0, self.n_prompts))
        check_probabilities(pmf, len(contexts), self.n_prompts)
        pmf /= pmf.sum(axis=1, keepdims=True)  # theirs are float32
        return pmf

    def _predict(self, line: str) -> list[float]:
        # The examples of prompts are made once: parsing them anew for each context would take most of the time. They
        # are never given to finish_example, which reads the outcome of examples beyond those it is given.
        example = [self._example(f"shared {line}"), *self._prompt_examples] if self._adf else line
        found: list[float] = self._workspace.predict(example)
        return found

    def learn(self, log: LoggedDataset) -> None:
        """Learn from each round in turn, with the logged propensity.

        Raises:
            DimensionError: a log over another catalogue, or of other dimensions.
            PropensityError: a propensity is unknown.
        """
        self._check_log(log)
        propensities = log.require_propensities("VowpalWabbit").tolist()
        rounds = zip(self._described(log.contexts), log.action.tolist(), log.reward.tolist(), propensities, strict=True)
        with foreign(f"Vowpal Wabbit raised while it learned from {len(log)} rounds"):
            for line, action, reward, propensity in rounds:
                self._learn(line, action, f"{-reward!r}:{propensity!r}")
        self._dimensions = (log.context.shape[1], log.query.shape[1])

    def _learn(self, line: str, action: int, outcome: str) -> None:
        if not self._adf:
            self._workspace.learn(f"{action + 1}:{outcome} {line}")
            return
        shared, chosen = self._example(f"shared {line}"), self._example(f"0:{outcome} {self._lines[action]}")
        others = self._prompt_examples
        self._workspace.learn([shared, *others[:action], chosen, *others[action + 1 :]])

    def _described(self, contexts: Contexts) -> Iterator[str]:
        """Yield the features of each round in Vowpal Wabbit's text format; all that is in it is made here."""
        shapes = (contexts.context.shape[1], contexts.query.shape[1])
        if self._dimensions not in ((0, 0), shapes):
            raise DimensionError(
                f"contexts: expected d_x and d_q {self._dimensions}, as the agent learned from, got {shapes}; use it "
                "in the world that it learned in"
            )
        for name, values in (("context", contexts.context), ("query", contexts.query)):
            wrong = ~np.isfinite(values).all(axis=1)
            if wrong.any():
                raise DataError(
                    f"{name}: expected finite numbers, got {values[np.argmax(wrong)]} in row {np.argmax(wrong)}; "
                    "repair that row"
                )
        rows = zip(contexts.context.tolist(), contexts.query.tolist(), strict=True)
        return (f"|x {_numbered(context)} |q {_numbered(query)}" for context, query in rows)

    def save(self, path: str | Path) -> Path:
        """Write the agent into the directory `path`, in Vowpal Wabbit's own format for models.

        Raises:
            StorageError: it cannot be written.
        """
        settings = {**self._settings, "dimensions": self._dimensions}
        content = _model(self._workspace)
        return write_agent(Stored("VowpalWabbit", "vowpalwabbit", content, self.prompts, settings), path)

    @classmethod
    def load(cls, path: str | Path) -> VowpalWabbit:
        """Read an agent that :meth:`save` wrote.

        A model file carries options that Vowpal Wabbit obeys, names of files among them. Those of this one must be
        the ones that the agent's own, checked options give.

        Raises:
            StorageError: not such a directory, damaged, or a model with other options.
        """
        stored = read_agent(path, "VowpalWabbit")
        with reviving(path):
            options, adf, seed, (d_x, d_q) = (stored.settings[n] for n in ("options", "adf", "seed", "dimensions"))
            agent = cls(stored.prompts, options, adf=bool(adf), seed=seed)
            expected, found = _model_options(_model(agent._workspace)), _model_options(stored.content)
        if found != expected:
            raise StorageError(
                f"agent: expected a model with the options{expected[1]!r} at {path}, got{found[1]!r}; it was written "
                "by another version of vowpalwabbit, which agent.json names, or changed by hand; save it again"
            )
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model"
            file.write_bytes(stored.content)
            # The state of its randomness is in the model. Counters are kept: learning rates may depend on them.
            agent._start([*agent._kind, *agent._own, "--preserve_performance_counters", "-i", str(file)])
        agent._dimensions = (int(d_x), int(d_q))
        return agent


def _numbered(values: list[float]) -> str:
    # A bare number would be a place in Vowpal Wabbit's table of weights, where those of neighbouring prompts overlap.
    return " ".join([f"f{index}:{value!r}" for index, value in enumerate(values)])


def _checked_options(options: str) -> list[str]:
    """Return `options` as a list, each known and with a value of its kind."""
    check_kind("options", options, str, "pass them as on the command line: '--epsilon 0.1'")
    try:
        tokens = shlex.split(options.replace("=", " "))
    except ValueError as error:
        raise ConfigError(f"options: cannot be read: {error}; close the quotation in {options!r}") from error
    checked: list[str] = []
    names: set[str] = set()
    rest = iter(tokens)
    for name in rest:
        if name.startswith("--cb_explore"):
            raise ConfigError(f"options: expected none that says how many prompts there are, got {name}; pass adf=")
        if name == "--random_seed":
            raise ConfigError("options: expected none for randomness, got --random_seed; pass seed=")
        if name not in _OPTIONS:
            raise unknown_name("Vowpal Wabbit option", name, _OPTIONS)
        if name in names - _REPEATED:
            raise ConfigError(f"options: expected {name} once, got it twice; remove one")
        names.add(name)
        checked.append(name)
        kind = _OPTIONS[name]
        if kind == _FLAG:
            continue
        value = next(rest, "")
        if not re.fullmatch(kind, value) or (kind == _NUMBER and not math.isfinite(float(value))):
            wanted = {_NUMBER: "a number", _INTEGER: "an integer"} | dict.fromkeys(
                (_PAIR, _TRIPLE, _CROSSED, _NAMESPACE), f"letters of the namespaces x, q and a that match {kind}"
            )
            raise ConfigError(
                f"options: expected {wanted.get(kind, f'one of {kind}')} after {name}, got {value or 'nothing'!r}"
            )
        checked.append(value)
    _check_together(names)
    return [name for name in checked if name != "--quiet"]


def _check_together(names: set[str]) -> None:
    """Raise where Vowpal Wabbit would take one of several explorations, or ignore an option, without a word."""
    exploring = sorted(names & _EXPLORING)
    if len(exploring) > 1:
        raise ConfigError(f"options: expected one way to explore, got {' and '.join(exploring)}; keep one of them")
    for name, owners in _BELONGS.items():
        if name in names and not names.intersection(owners):
            belongs = " or ".join(owners)
            raise ConfigError(f"options: {name} belongs to {belongs}, which is not there; add it, or leave {name} out")
    without = [name for name in _NO_EPSILON if name in names]
    if "--epsilon" in names and without:
        raise ConfigError(
            f"options: {without[0]} does not explore by --epsilon, which it ignores; leave one of them out"
        )


def _workspace(arguments: list[str]) -> Workspace:
    try:
        from vowpalwabbit.pyvw import Workspace
    except ImportError as error:
        raise missing_dependency("vowpalwabbit", "vowpalwabbit", "agents.adapters.VowpalWabbit") from error
    try:
        return Workspace(arg_list=[*arguments, "--quiet"])
    except Exception as error:
        raise ConfigError(f"options: Vowpal Wabbit refuses {' '.join(arguments)!r}: {error}") from error


def _model(workspace: Workspace) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model"
        workspace.save(str(file))
        return file.read_bytes()


def _model_options(content: bytes) -> tuple[bytes, str]:
    """Return from the head of a model its numbers of bits, and its options without the state of its randomness.

    The head is two texts (version and id), a letter, the range of labels (two float32), four counts (uint32) and the
    text of options; a text is its length (uint32) and that many bytes.
    """
    position = 0
    for _ in range(2):
        position += 4 + int(struct.unpack_from("<I", content, position)[0])
    position += 1 + 8
    counts = content[position : position + 16]
    (length,) = struct.unpack_from("<I", content, position + 16)
    options = content[position + 20 : position + 20 + length].rstrip(b"\0").decode("utf-8")
    return counts, re.sub(r" --random_seed \d+(?= |$)", "", options)
