"""Agents of other libraries, and agents for other libraries.

Each adapter wraps an agent that its library made, and asks for that library only when it is used.
"""

from agents.adapters.base import Adapter
from agents.adapters.functions import FunctionAgent

__all__ = ["Adapter", "FunctionAgent"]
