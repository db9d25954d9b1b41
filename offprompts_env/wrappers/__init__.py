"""Wrappers that show the same rounds in another form: flat, with text, with excluded prompts, with few candidates.

An observation wrapper keeps the rounds bit for bit. Recording goes inside of a wrapper that changes observations or
actions: ``CandidatePrompts(RecordLoggedData(env, path), k)``.
"""

from offprompts_env.wrappers.candidates import CandidatePrompts
from offprompts_env.wrappers.masks import ActionMask, VectorActionMask
from offprompts_env.wrappers.observations import FlatObservation, FlatVectorObservation, TextObservation

__all__ = [
    "ActionMask",
    "CandidatePrompts",
    "FlatObservation",
    "FlatVectorObservation",
    "TextObservation",
    "VectorActionMask",
]
