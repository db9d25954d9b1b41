"""Environments of your own domain: items, prompts and reactions from CSV files, see docs/your-own-domain.md."""

from __future__ import annotations

from offprompts_env.domain.registration import original_ids, register_domain

__all__ = ["original_ids", "register_domain"]
