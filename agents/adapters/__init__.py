"""Agents of other libraries, and agents for other libraries.

Each adapter wraps an agent that its library made, and asks for that library only when it is used.
"""

from agents.adapters.base import Adapter
from agents.adapters.coba import Coba, CobaLog, coba_environment
from agents.adapters.contextual_bandits import ContextualBandits
from agents.adapters.functions import FunctionAgent
from agents.adapters.loading import load_agent
from agents.adapters.mabwiser import MABWiser
from agents.adapters.obp import OBP
from agents.adapters.predictor import Predictor
from agents.adapters.scikit_learn import ScikitLearnClassifier, ScikitLearnRegressor
from agents.adapters.stable_baselines3 import StableBaselines3
from agents.adapters.vec_env import PromptVecEnv
from agents.adapters.vowpal_wabbit import VowpalWabbit

__all__ = [
    "OBP",
    "Adapter",
    "Coba",
    "CobaLog",
    "ContextualBandits",
    "FunctionAgent",
    "MABWiser",
    "Predictor",
    "PromptVecEnv",
    "ScikitLearnClassifier",
    "ScikitLearnRegressor",
    "StableBaselines3",
    "VowpalWabbit",
    "coba_environment",
    "load_agent",
]
