"""``offprompts learn``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from agents.cli.logs import ColumnNames, fingerprint, open_log, simulator_of, split
from agents.cli.methods import make_method
from agents.cli.output import print_json
from agents.cli.policies import Origin, known_logger
from agents.cli.settings import read_settings, with_settings
from agents.inspection.needs import LEARNERS
from offprompts_env.errors import StorageError
from offprompts_env.types import LoggedDataset

if TYPE_CHECKING:
    from offprompts_env.simulator import OutputModel


@dataclass(frozen=True)
class Learn:
    """Learn a policy from a log.

    In use:
      offprompts learn log --learner is --out policy --hold-out 0.5
      offprompts learn log --learner dso --out policy --set tau=0.5 steps=5000 density.steps=2000
      offprompts methods dso                      (the settings of a learner)

    The generator, for methods that ask one, is that of the environment which the log names.
    """

    log: Annotated[Path, tyro.conf.Positional]
    """Directory of a log, or a Parquet, CSV or JSON-lines file."""
    learner: str
    """Name of the learner: offprompts methods lists them."""
    out: Path
    """Directory of the policy; one that is there is replaced only with --overwrite."""
    set: tuple[str, ...] = ()
    """Settings of the learner, as name=value: steps=2000 rewards.steps=5000."""
    hold_out: float = 0.0
    """Share of the rounds, drawn at random, that is left out; offprompts evaluate finds and uses just these."""
    seed: int = 0
    """Names the run: initial weights, batches, draws, and the rounds that are left out."""
    no_generator: bool = False
    """Do without the generator of the log's environment."""
    logging_policy: Path | None = None
    """Directory of the policy that recorded the log, where propensities are unknown or a method asks for it."""
    overwrite: bool = False
    """Replace a policy that is there."""
    json: bool = False
    """Print the result as JSON."""
    columns: ColumnNames = field(default_factory=ColumnNames)

    def run(self) -> None:
        """Run the command."""
        import agents

        settings = read_settings(self.set, "--set")
        learner = with_settings(make_method(self.learner, LEARNERS, "learner"), settings)
        if self.out.exists() and not self.overwrite and (not self.out.is_dir() or any(self.out.iterdir())):
            raise StorageError(
                f"{self.out}: expected nothing there, found something; pass --overwrite, or another --out"
            )
        log = open_log(self.log, self.columns)
        train, _ = split(log, self.hold_out, self.seed)
        policy = learner.fit(
            train,
            generator=None if self.no_generator else _generator(self.learner, train),
            logging_policy=known_logger(self.logging_policy, log),
            seed=self.seed,
        )
        agents.save_policy(policy, self.out)
        origin = Origin(self.learner, settings, fingerprint(log), len(train), self.hold_out, self.seed)
        origin.save(self.out)
        if self.json:
            print_json({"path": str(self.out), "policy": type(policy).__name__, "rounds": len(train)})
            return
        print(f"{self.out}: {type(policy).__name__} learned by {self.learner} from {len(train):,} rounds")


def _generator(learner: str, log: LoggedDataset) -> OutputModel | None:
    """Return the generator for methods that have a use for one, if there is one."""
    method = LEARNERS[learner]
    if not (method.generator or method.outputs) or log.output.shape[1] == 0:
        return None
    simulator = simulator_of(log)
    return None if simulator is None else simulator.outputs
