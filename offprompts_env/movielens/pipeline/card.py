"""The model card of a bundle, made from what was measured, and the notice of the MovieLens data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MOVIELENS_NOTICE = """\
The user vectors, movie titles and genres, and the weights in this folder are derived from a MovieLens data set of
GroupLens Research, University of Minnesota (the embedded bundle: ml-latest-small,
https://grouplens.org/datasets/movielens/). Raw ratings and tags are not included. Transformations of the data set are
redistributed under its own conditions, which are not those of the code around them:

    Neither the University of Minnesota nor any of the researchers involved can guarantee the correctness of the data,
    its suitability for any particular purpose, or the validity of results based on the use of the data set. The data
    set may be used for any research purposes under the following conditions:

    * The user may not state or imply any endorsement from the University of Minnesota or the GroupLens Research Group.
    * The user must acknowledge the use of the data set in publications resulting from the use of the data set (see
    below
      for citation information).
    * The user may redistribute the data set, including transformations, so long as it is distributed under these same
      license conditions.
    * The user may not use this information for any commercial or revenue-bearing purposes without first obtaining
      permission from a faculty member of the GroupLens Research Project at the University of Minnesota.
    * The executable software scripts are provided "as is" without warranty of any kind, either expressed or implied,
      including, but not limited to, the implied warranties of merchantability and fitness for a particular purpose. The
      entire risk as to the quality and performance of them is with you. Should the program prove defective, you assume
      the cost of all necessary servicing, repair or correction.

    In no event shall the University of Minnesota, its affiliates or employees be liable to you for any damages
    arising out of the use or inability to use these programs (including but not limited to loss of data or data being
    rendered inaccurate).

To acknowledge use of the data set in publications, please cite:

    F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and Context. ACM Transactions on
    Interactive Intelligent Systems (TiiS) 5, 4: 19:1-19:19. https://doi.org/10.1145/2827872
"""

_MEASURE = "offprompts build-assets --raw ml-latest-small --out bundle"


def model_card(measured: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return the model card: what the parts are, every measured figure, how each was measured, and limits.

    ``measured`` is the content of ``metrics.json``, ``settings`` the build configuration as plain values.
    """
    counts, prompts, language = measured["counts"], measured["prompts"], measured["language"]
    decoding = settings["decoding"]
    lines = [
        "# MovieLens bundle",
        "",
        f"{counts['users']} users, {counts['movies']} movies and {counts['keywords']} keywords; fitted on "
        f"{counts['reactions']} reactions (likes and dislikes, balanced per user) and "
        f"{counts['ratings_of_these_users']} "
        "ratings of these users. For research only: see `LICENSE-MOVIELENS.txt`.",
        "",
        "- `lm/`: "
        + (
            "a Llama-architecture causal language model "
            f"({settings['language_model']['layers']} layers, width {settings['language_model']['width']}) trained "
            f"from "
            "scratch on sentences of the project's grammar about these movies. It knows these movies and this "
            "grammar only."
            if language
            else "the language model given to the build."
        ),
        f"- decoding: temperature {decoding['temperature']}, top-p {decoding['top_p']}, at most "
        f"{decoding['max_new_tokens']} tokens.",
        "- `simulator/`: a DistilBERT-architecture encoder and a head, P(like | user vector, sentence), trained on the "
        "language model's own sentences without a keyword.",
        "- `collaborative.safetensors`: a bilinear sibling with movie means.",
        "- `users.safetensors`: taste vectors: the posterior mean of each user's linear taste for genres, eras, "
        "popularity "
        "and acclaim.",
        "",
        "## Measured",
        "",
        "| figure | value | at least | aim |",
        "|---|---|---|---|",
        *(f"| {name} | {value} | {least} | {aim} |" for name, value, least, aim in _table(measured)),
        "",
        f"Measure again: `{_MEASURE}` (the build ends with these measurements; one command, one seed).",
        "",
        "## How",
        "",
        *_how(prompts, len(measured["held_out"])),
        "",
        "## All figures",
        "",
        *_everything(measured),
        "",
        "## Limits",
        "",
        "The users are those of one small data set who rate much and with variety; the sentences are formulaic; "
        "reception "
        "and popularity in the sentences are those among MovieLens users. Keywords that do not suit a movie are "
        "followed "
        "all the same, as a hint: sentences under such prompts are not true of the movie. Rewards are predictions of a "
        "model, not reactions of people.",
        "",
        "## Settings",
        "",
        "```json",
        json.dumps(settings, indent=1, ensure_ascii=False),
        "```",
        "",
    ]
    return "\n".join(lines)


def _table(measured: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    held_out, prompts, language = measured["held_out"], measured["prompts"], measured["language"]
    rows = []
    if language:
        rows += [
            ("no-prompt genre recall / precision",
             f"{language['genre_recall']:.4f} / {language['genre_precision']:.4f}", "0.97 / 0.95", "0.99"),
            ("malformed sentences, without / with a keyword",
             f"{language['malformed']:.2%} / {language['malformed_with_keyword']:.2%}", "1.5%", "0.5%"),
            ("suitable keyword: its genre is named / the word itself",
             f"{language['keyword_genre_named']:.4f} / {language['keyword_literal']:.4f}", "0.98 / 0.80", "0.95 "
             "literal"),
        ]  # fmt: skip
    auc, no_user = _over_splits(held_out, "user", "auc"), _over_splits(held_out, "no_user", "auc")
    return [
        *rows,
        ("held-out AUC, one sentence", f"{auc:.4f}", "0.675", "0.70"),
        ("margin over no user", f"{auc - no_user:.4f}", "0.04", "0.06"),
        ("expected calibration error", f"{_over_splits(held_out, 'user', 'calibration_error'):.4f}", "0.05", "0.03"),
        ("best prompt per (user, movie) minus best single prompt", f"{prompts['personalisation']:.3f}", "0.5", "0.7"),
        ("user x prompt share of the prompt-dependent variance", f"{prompts['user_prompt_share']:.1%}", "30%", "40%"),
    ]  # fmt: skip


def _over_splits(rows: Sequence[Mapping[str, Any]], model: str, figure: str) -> float:
    return float(np.mean([row[model][figure] for row in rows]))


def _how(prompts: Mapping[str, Any], n_splits: int) -> list[str]:
    return [
        "- *Sentences* are sampled at the decoding parameters above. *Malformed*: `grammar.parse` refuses it; the "
        "parser "
        "accepts exactly the sentences of the grammar, with no genre twice. *Recall*: named genres of the movie over "
        "min(3, number of its genres), for a sentence names at most three; *precision*: named genres that are the "
        "movie's. Keyword figures count malformed sentences as failures.",
        f"- *Held out*: mean of {n_splits} random splits of the reactions, 20% test, 8% validation (early "
        f"stopping), 72% "
        "training; one sentence for each movie and reaction. User vectors are fitted without validation and test "
        "reactions, in training without the reaction's own fold. Reception and popularity in the sentences come "
        "from ratings "
        "that are no reactions, in any split. *No user*: the same model and training with zero user vectors. "
        "*Calibration*: ten bins of equal count.",
        f"- *Prompts*: {prompts['n_users']} users x {prompts['n_movies']} movies x the first {prompts['n_prompts']} "
        f"keywords "
        f"x {prompts['n_sentences']} sentences; reward 10 (P(like | x, s) - mean over 4 no-prompt sentences). "
        f"Prompts are "
        "chosen on one half of the sentences and scored on the other half, both ways. Variance shares are of the mean "
        "reward that depends on the prompt (prompt, user x prompt, movie x prompt, three-way), from the covariance "
        "of the "
        "two halves, so that sampling noise does not count.",
    ]


def _everything(measured: Mapping[str, Any]) -> list[str]:
    lines = ["| | figure | value |", "|---|---|---|"]
    for part in ("language", "prompts"):
        lines += [
            f"| {part} | {name.replace('_', ' ')} | {value:.4g} |" for name, value in (measured[part] or {}).items()
        ]
    for row in measured["held_out"]:
        for model in ("user", "user_mean_of_8", "no_user", "no_user_mean_of_8"):
            lines.append(
                f"| split {row['split']} | {model.replace('_', ' ')}: AUC, log-loss, calibration error | "
                f"{row[model]['auc']:.4f}, {row[model]['log_loss']:.4f}, {row[model]['calibration_error']:.4f} |"
            )
    return lines
