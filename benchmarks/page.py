"""One self-contained HTML page: what some users were shown before and after learning."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from offprompts_env.rng import stream
from offprompts_env.sampling import sample_actions
from offprompts_env.simulator import Simulator
from offprompts_env.types import Contexts, FloatArray, IntArray, Outputs, Policy


@dataclass(frozen=True, slots=True)
class Side:
    """What one policy showed.

    Attributes:
        prompt: the keyword.
        sentence: what the language model wrote.
        reward: expected reward of that sentence.
    """

    prompt: str
    sentence: str
    reward: float


@dataclass(frozen=True, slots=True)
class Story:
    """One user and one movie, before and after."""

    user: str
    taste: str
    movie: str
    before: Side
    after: Side


def stories(
    simulator: Simulator, before: Policy, after: Policy, *, users: int = 3, movies: int = 3, seed: int = 0
) -> list[Story]:
    """Play the same rounds under both policies, `movies` rounds for each of `users` drawn users.

    Users and movies are drawn, not picked. Both policies see common random numbers: where they choose the same prompt,
    they show the same sentence.
    """
    rng = stream(seed, "stories", "contexts")
    pool = simulator.contexts.sample(users * (movies + 1), rng)
    who = pool.take(np.repeat(np.arange(users), movies))
    what = pool.take(np.arange(users, users * (movies + 1)))
    rounds = Contexts(who.context, what.query, who.user_id, what.item_id, what.query_text)

    def play(policy: Policy) -> tuple[IntArray, Outputs, FloatArray]:
        actions, _ = sample_actions(policy, rounds, stream(seed, "stories", "actions"))
        outputs = simulator.outputs.sample(rounds, actions, stream(seed, "stories", "outputs"))
        return actions, outputs, simulator.rewards.mean(rounds, outputs)

    sides = [play(before), play(after)]
    describe = getattr(simulator.contexts, "describe", None)
    texts = simulator.prompts.texts

    def side(played: tuple[IntArray, Outputs, FloatArray], row: int) -> Side:
        actions, outputs, rewards = played
        sentence = "" if outputs.text is None else str(outputs.text[row])
        prompt = str(actions[row]) if texts is None else texts[int(actions[row])]
        return Side(prompt, sentence, float(rewards[row]))

    return [
        Story(
            user=f"User {rounds.user_id[row]}" if rounds.user_id is not None else f"User {row // movies}",
            taste=describe(rounds, row) if describe else "",
            movie=str(rounds.query_text[row]) if rounds.query_text is not None else f"query {row}",
            before=side(sides[0], row),
            after=side(sides[1], row),
        )
        for row in range(len(rounds))
    ]


_STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #16794a; --bad: #b3372f; }
@media (prefers-color-scheme: dark) { :root { --good: #63d297; --bad: #ff8f85; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 0; } .taste, .note { opacity: .75; margin: 0; }
.movie { border-top: 1px solid var(--line); padding: .8rem 0; }
.movie h3 { font-size: 1rem; margin: 0 0 .4rem; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
@media (max-width: 40rem) { .sides { grid-template-columns: 1fr; } }
.sides p { margin: 0; } .label { font-size: .85rem; opacity: .75; }
.gain { color: var(--good); font-weight: 600; } .loss { color: var(--bad); font-weight: 600; }
kbd { font: inherit; border: 1px solid var(--line); border-radius: .3rem; padding: 0 .35rem; }
table { border-collapse: collapse; margin: 1rem 0; width: 100%; } img { max-width: 100%; background: #fff; }
th, td { text-align: right; padding: .25rem .5rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } .wide { overflow-x: auto; }
"""


def write_page(
    path: Path,
    title: str,
    note: str,
    told: Sequence[Story],
    *,
    names: tuple[str, str],
    table: str,
    figure: Path,
) -> None:
    """Write the page.

    Args:
        path: of the page.
        title: of the page.
        note: what the reader should know first.
        told: the stories.
        names: of both sides.
        table: an HTML table that stands before the stories.
        figure: a PNG file, which is copied into the page.
    """
    picture = base64.b64encode(figure.read_bytes()).decode()

    def show(label: str, side: Side, css: str) -> str:
        mark = f'<span class="{css}">{side.reward:+.2f}</span>'
        head = f'<p class="label">{html.escape(label)}: <kbd>{html.escape(side.prompt)}</kbd> · reward {mark}</p>'
        return f"<div>{head}<p>{html.escape(side.sentence)}</p></div>"

    parts = []
    user = ""
    for story in told:
        if story.user != user:
            user = story.user
            parts.append(f'<h2>{html.escape(user)}</h2><p class="taste">{html.escape(story.taste)}</p>')
        gained = story.after.reward - story.before.reward
        css = "gain" if gained > 0 else "loss" if gained < 0 else ""
        sides = show(names[0], story.before, "") + show(names[1], story.after, css)
        parts.append(f'<div class="movie"><h3>{html.escape(story.movie)}</h3><div class="sides">{sides}</div></div>')
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        f'<h1>{html.escape(title)}</h1><p class="note">{html.escape(note)}</p>'
        f'<div class="wide">{table}</div><img alt="The same values drawn" src="data:image/png;base64,{picture}">'
        f"{''.join(parts)}</body></html>\n"
    )
    path.write_text(page, encoding="utf-8")
