"""Reading a saved agent of whatever class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from agents.adapters.base import Adapter
from agents.adapters.coba import Coba
from agents.adapters.contextual_bandits import ContextualBandits
from agents.adapters.mabwiser import MABWiser
from agents.adapters.obp import OBP
from agents.adapters.scikit_learn import ScikitLearnClassifier, ScikitLearnRegressor
from agents.adapters.stable_baselines3 import StableBaselines3
from agents.adapters.storage import describe_agent
from agents.adapters.vowpal_wabbit import VowpalWabbit
from offprompts_env.errors import StorageError

# These are in formats that cannot run code; the others may hold pickles.
_SAFE: Mapping[str, Callable[[str | Path], Adapter]] = {
    "StableBaselines3": StableBaselines3.load,
    "VowpalWabbit": VowpalWabbit.load,
}
_OTHERS = {
    kind.__name__: kind
    for kind in (Coba, ContextualBandits, MABWiser, OBP, ScikitLearnClassifier, ScikitLearnRegressor)
}


def load_agent(path: str | Path, *, trusted: bool = False) -> Adapter:
    """Read the agent that ``save`` of an adapter wrote into the directory `path`.

    Args:
        path: the directory.
        trusted: the reader knows who wrote the files, and lets them run code where they are pickles.

    Raises:
        StorageError: no such directory, damaged, of an unknown class, or not `trusted` and a pickle.
    """
    kind = describe_agent(path)["kind"]
    if kind in _SAFE:
        return _SAFE[kind](path)
    if kind in _OTHERS:
        return _OTHERS[kind].load(path, trusted=trusted)
    raise StorageError(f"agent: expected one of {', '.join(sorted({*_SAFE, *_OTHERS}))} at {path}, got {kind!r}")
