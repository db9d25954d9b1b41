"""``offprompts evaluate``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from agents.cli.logs import ColumnNames, fingerprint, open_log, simulator_of, split
from agents.cli.methods import make_method
from agents.cli.output import estimate_json, print_json, say
from agents.cli.policies import Origin, known_logger, open_policy
from agents.cli.settings import has_setting, read_settings, with_settings
from agents.inspection.needs import ESTIMATORS, Given, judge
from offprompts_env.errors import ConfigError, OffPromptsError, unknown_name
from offprompts_env.types import Estimate, LoggedDataset, Policy

if TYPE_CHECKING:
    from offprompts_env.simulator import Simulator


@dataclass(frozen=True)
class Evaluate:
    """Estimate a policy's value from a log, beside what the log's own policy earned.

    In use:
      offprompts evaluate policy log
      offprompts evaluate policy log --estimator snips dr --set rewards.steps=5000
      offprompts evaluate uniform log --all
      offprompts evaluate policy log --truth

    Of a log that the policy was learned from, only the rounds that were held out are used.
    """

    policy: Annotated[str, tyro.conf.Positional]
    """Directory of a policy, or uniform."""
    log: Annotated[Path, tyro.conf.Positional]
    """Directory of a log, or a Parquet, CSV or JSON-lines file."""
    estimator: tuple[str, ...] = ("snips",)
    """Names of estimators: offprompts methods lists them."""
    all: bool = False
    """Take every estimator that the log allows; regressions are quicker with --set rewards.steps=5000."""
    set: tuple[str, ...] = ()
    """Settings, as name=value, of those of the estimators that have them: clip=50 rewards.steps=5000."""
    truth: bool = False
    """Also the value in the environment that the log names."""
    seed: int = 0
    """Of whatever is fitted or drawn."""
    no_generator: bool = False
    """Do without the generator of the log's environment."""
    logging_policy: Path | None = None
    """Directory of the policy that recorded the log, where propensities are unknown or a method asks for it."""
    confidence: float = 0.95
    """Coverage of the intervals."""
    json: bool = False
    """Print the estimates as JSON."""
    columns: ColumnNames = field(default_factory=ColumnNames)

    def run(self) -> None:
        """Run the command."""
        estimators = self._estimators()
        whole = open_log(self.log, self.columns)
        policy = open_policy(self.policy, whole.prompts)
        log, doubt = self._unseen(whole)
        # It takes the language model of a text environment: only where something asks for it.
        asks = any(ESTIMATORS[name].generator for name in estimators) and not self.no_generator
        simulator = simulator_of(log) if self.truth or (asks and log.output.shape[1]) else None
        if self.truth and simulator is None:
            raise ConfigError("--truth: the log names no environment, so there is nothing to ask; leave it out")
        found, refused = self._estimate(estimators, policy, log, simulator if asks else None)
        if self.truth and simulator is not None:
            found["truth"] = simulator.policy_value(policy, seed=self.seed).normal(self.confidence)
        self._print(found, refused, log, doubt)
        if not found:
            raise OffPromptsError("no estimator could be used; offprompts inspect says what the log allows")

    def _estimators(self) -> dict[str, Any]:
        names = list(ESTIMATORS) if self.all else list(dict.fromkeys(self.estimator))
        made = {name: make_method(name, ESTIMATORS, "estimator") for name in names}
        for setting, value in read_settings(self.set, "--set").items():
            having = [name for name, estimator in made.items() if has_setting(estimator, setting)]
            if not having and len(made) > 1:
                valid = {own for estimator in made.values() for own in estimator.__dataclass_fields__}
                raise unknown_name("setting of these estimators", setting, valid)
            for name in having or made:
                made[name] = with_settings(made[name], {setting: value})
        return made

    def _unseen(self, log: LoggedDataset) -> tuple[LoggedDataset, str | None]:
        """Return rounds that the policy was not learned from, and why some may be, where that is so."""
        origin = None if self.policy == "uniform" else Origin.load(Path(self.policy))
        if origin is None:
            return log, None
        if origin.log != fingerprint(log):
            return log, (
                f"{self.log} is not, row for row, the log that the policy was learned from: if it has some of the same "
                "rounds (rows were appended, sorted or read anew), estimates flatter the policy; leave them out"
            )
        _, rest = split(log, origin.hold_out, origin.seed)
        if rest is None:
            return log, (
                "the policy was learned from these very rounds, so that estimates flatter it: learn with --hold-out 0.5"
            )
        say(f"{self.log}: {len(rest):,} of {len(log):,} rounds, those held out when the policy was learned")
        return rest, None

    def _estimate(
        self, estimators: dict[str, Any], policy: Policy, log: LoggedDataset, simulator: Simulator | None
    ) -> tuple[dict[str, Estimate], dict[str, str]]:
        logger = known_logger(self.logging_policy, log)
        given = Given(
            propensities=not bool((log.propensity != log.propensity).any()),
            outputs=log.output.shape[1] > 0,
            generator=simulator is not None,
            logging_policy=logger is not None,
        )
        found: dict[str, Estimate] = {}
        refused: dict[str, str] = {}
        for name, estimator in estimators.items():
            lacks = judge(ESTIMATORS[name], given).lacks
            if lacks and self.all:
                refused[name] = f"lacks {', '.join(lacks)}"
                continue
            generator = None if simulator is None else simulator.outputs
            try:
                estimate = estimator.estimate(policy, log, generator=generator, logging_policy=logger, seed=self.seed)
            except OffPromptsError as error:
                if not self.all:
                    raise
                refused[name] = str(error)
                continue
            found[name] = estimate.normal(self.confidence)
        return found, refused

    def _print(
        self, found: dict[str, Estimate], refused: dict[str, str], log: LoggedDataset, doubt: str | None
    ) -> None:
        logged = Estimate.of_mean(log.reward).normal(self.confidence)
        if self.json:
            print_json({
                "rounds": len(log), "logging_policy": estimate_json(logged),
                "estimates": {name: estimate_json(estimate) for name, estimate in found.items()},
                "refused": refused, "warnings": [] if doubt is None else [doubt],
            })  # fmt: skip
            return
        print("\n".join(_table(found, logged, len(log), self.confidence)))
        for name, reason in refused.items():
            say(f"{name}: left out: {reason}")
        if doubt is not None:
            say(f"warning: {doubt}")
        for name, estimate in found.items():
            for warning in estimate.warnings:
                say(f"warning: {name}: {warning}")


def _table(found: dict[str, Estimate], logged: Estimate, rounds: int, confidence: float) -> list[str]:
    rows = [("", "value", "s.e.", f"{confidence:.0%} interval", "effective rounds", "over logging")]
    for name, estimate in {"logging policy": logged, **found}.items():
        low, high = estimate.interval
        over = ""
        if estimate is not logged and estimate.terms.shape == logged.terms.shape and name != "truth":
            difference = estimate.minus(logged)
            over = f"{difference.value:+.4f} ± {difference.standard_error:.4f}"
        effective = "" if name == "truth" else f"{estimate.effective_sample_size:,.0f} of {rounds:,}"
        numbers = (f"{estimate.value:.4f}", f"{estimate.standard_error:.4f}", f"{low:.4f} to {high:.4f}")
        rows.append((name, *numbers, effective, over))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
