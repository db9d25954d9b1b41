"""The card of a domain's bundle: what was measured, and how."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np


def domain_card(measured: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return the card; ``measured`` is the content of ``metrics.json``, ``settings`` the build's as plain values."""
    counts, prompts, rows = measured["counts"], measured["prompts"], measured["held_out"]
    limits = measured["thresholds"]
    figures = [(row["user"], row["no_user"]) for row in rows]
    auc, without = (np.array([pair[which]["auc"] for pair in figures]) for which in (0, 1))
    calibration = np.mean([user["calibration_error"] for user, _ in figures])
    lines = [
        "# Bundle of a domain of its own",
        "",
        *(f"- {name.replace('_', ' ')}: {count:,}" for name, count in counts.items()),
        "",
        f"A like is a rating >= {limits['like']:g}, a dislike one <= {limits['dislike']:g}. P(like | user, sentence) "
        "is the probability of a like among these reactions, not among all that a user might see.",
        "",
        "| figure | value |",
        "|---|---|",
        f"| held-out AUC (mean of {len(rows)} splits; lowest, highest) | {auc.mean():.3f} ({auc.min():.3f}, "
        f"{auc.max():.3f}) |",
        f"| the same without the user | {without.mean():.3f} |",
        f"| expected calibration error | {calibration:.3f} |",
        f"| reactions held out in each split | {rows[0]['reactions']} |",
        f"| reward of a prompt drawn uniformly | {prompts['uniform']:+.3f} |",
        f"| best single prompt | {prompts['best_single']:+.3f} |",
        f"| best prompt for each user and item | {prompts['best_per_user_and_movie']:+.3f} |",
        f"| share of the prompt-dependent variance that differs between users | {prompts['user_prompt_share']:.1%} |",
        "",
        "*Held out*: 20% of the reactions test, the rest trains and stops early; user vectors are fitted without test "
        "and validation reactions, in training without the reaction's own fold; the mean over four sentences. "
        f"*Prompts*: {prompts['n_users']} users, {prompts['n_movies']} items, {prompts['n_prompts']} prompts, "
        f"{prompts['n_sentences']} sentences each; chosen on one half of them, scored on the other, both ways.",
        "",
        "Rewards are predictions of a model, not reactions of people.",
        "",
        "## Settings",
        "",
        "```json",
        json.dumps(settings, indent=1, ensure_ascii=False),
        "```",
        "",
    ]
    return "\n".join(lines)
