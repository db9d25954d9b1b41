"""Language models behind a server that speaks the OpenAI protocol: vLLM, SGLang, ``transformers serve`` and others."""

from __future__ import annotations

from offprompts_env.text.served.language_model import ServedLM
from offprompts_env.text.served.report import Report
from offprompts_env.text.served.settings import Server, is_url

__all__ = ["Report", "ServedLM", "Server", "is_url"]
