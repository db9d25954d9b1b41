"""One self-contained HTML page: what some users were shown before and after learning."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.pages.markup import data_uri, document, number
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


def stories_html(told: Sequence[Story], names: tuple[str, str], *, level: int = 2) -> str:
    """Return stories as HTML, users with their movies.

    Args:
        told: the stories; those of a user follow each other.
        names: of both sides.
        level: of a user's heading; that of a movie is the next.
    """

    def show(label: str, side: Side, css: str) -> str:
        mark = f'<span class="{css}">{number(side.reward, 2, signed=True)}</span>'
        head = f'<p class="label">{html.escape(label)}: <kbd>{html.escape(side.prompt)}</kbd> · reward {mark}</p>'
        return f"<div>{head}<p>{html.escape(side.sentence)}</p></div>"

    parts = []
    user = ""
    for story in told:
        if story.user != user:
            user = story.user
            taste = f'<p class="taste">{html.escape(story.taste)}</p>' if story.taste else ""
            parts.append(f"<h{level}>{html.escape(user)}</h{level}>{taste}")
        gained = story.after.reward - story.before.reward
        css = "gain" if gained > 0 else "loss" if gained < 0 else "same"
        sides = show(names[0], story.before, "same") + show(names[1], story.after, css)
        movie = f"<h{level + 1}>{html.escape(story.movie)}</h{level + 1}>"
        parts.append(f'<div class="movie">{movie}<div class="sides">{sides}</div></div>')
    return "".join(parts)


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
    drawn = f'<figure><img class="paper" alt="The same values drawn" src="{data_uri(figure)}"></figure>'
    body = (
        f'<h1>{html.escape(title)}</h1><p class="note">{html.escape(note)}</p>'
        f'<div class="wide">{table}</div>{drawn}{stories_html(told, names)}'
    )
    path.write_text(document(title, body), encoding="utf-8")
