"""Choose prompts for a frozen language model from logged user feedback.

Importing this package registers ``OffPrompts-Synthetic-v0`` and ``OffPrompts-MovieLens-v0`` with Gymnasium. It loads
neither torch nor transformers nor Stable-Baselines3: what needs them imports them where it is used.
"""

from __future__ import annotations

from gymnasium.envs.registration import register

from offprompts_env.collecting import collect
from offprompts_env.errors import OffPromptsError
from offprompts_env.recording import RecordLoggedData, RecordVectorLoggedData
from offprompts_env.simulator import Simulator
from offprompts_env.streaming import LogStream
from offprompts_env.synthetic import SyntheticConfig
from offprompts_env.truth import Truth
from offprompts_env.types import Contexts, Estimate, LoggedDataset, Outputs, Policy, PromptSet

__version__ = "0.1.0"

__all__ = [
    "Contexts",
    "Estimate",
    "LogStream",
    "LoggedDataset",
    "OffPromptsError",
    "Outputs",
    "Policy",
    "PromptSet",
    "RecordLoggedData",
    "RecordVectorLoggedData",
    "Simulator",
    "SyntheticConfig",
    "Truth",
    "__version__",
    "collect",
]

for _name in ("Synthetic", "MovieLens"):
    register(
        f"OffPrompts-{_name}-v0",
        entry_point=f"offprompts_env.envs:{_name}Env",
        vector_entry_point=f"offprompts_env.envs:{_name}VectorEnv",
    )
