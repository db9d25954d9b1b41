import argparse
import math
import re
import sys
import warnings
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from benchmarks import figures
from benchmarks.figures import marks, sheets
from benchmarks.figures.drawing import WIDTH, palette
from benchmarks.figures.scores import over_axis
from benchmarks.rows import Results
from benchmarks.summaries import comparable, mean_interval
from benchmarks.sweeps import SWEEPS
from offprompts_env.errors import ConfigError, DataError, MissingDependencyError, StorageError
from tests.benchmarks.some_rows import grid, row

SCORES = np.random.default_rng(0).normal(0.4, 0.05, (3, 4, 3))
PAPER = {"dso": SCORES[0], "is": SCORES[1] - 0.2, "logging": SCORES[2] - 0.3}
CURVE = {"curve_steps": (10, 20, 30), "curve": (0.1, 0.3, 0.4)}
MEASURES = {"mse": 0.01, "bias": -0.02, "variance": 0.009, "coverage": 0.93}
TEXT = {"uniform": 0.01, "oracle": 0.35, "best single": 0.19, "no prompt": 0.0}


def text_rows(learners, **kwargs):
    found = []
    for learner, sentences in learners.items():
        for world in range(2):
            for seed in range(3):
                given = {"sentences": sentences, "references": TEXT, "seed": seed, **kwargs}
                found.append(row(learner, world, 0.1 + 0.01 * seed, **given))
    return found


def words(drawing):
    """All text in an SVG, whose text is text."""
    root = ET.fromstring(drawing.path.read_text(encoding="utf-8"))
    return {"".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")}


def strokes(drawing):
    return set(re.findall(r"stroke: (#[0-9a-f]{6})", drawing.path.read_text(encoding="utf-8")))


def drawn(held, folder, **kwargs):
    with warnings.catch_warnings():
        # An empty panel or a lost glyph would only warn.
        warnings.simplefilter("error")
        return {drawing.name: drawing for drawing in figures.draw_all(figures.sheets_of(held), folder, **kwargs)}


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    return drawn(grid(PAPER, **CURVE), tmp_path_factory.mktemp("figures"))


def test_a_sweep_over_an_axis_gets_scores_curves_and_aggregates(paper):
    kinds = ("scores", "curves", "iqm", "profile", "improvement")
    assert list(paper) == [f"data_size_{kind}" for kind in kinds]
    for name, drawing in paper.items():
        assert drawing.sweep == "data_size"
        assert drawing.path.name == f"{name}.svg"
        assert "4 worlds" in drawing.caption
        assert "95% intervals" in drawing.caption
    assert paper["data_size_scores"].title == "Logged rounds: optimality"


def test_scores_have_the_axis_the_learners_and_the_skyline(paper):
    assert {
        "logged rounds",
        "optimality",
        "500",
        "1k",
        "2k",
        "DSO",
        "IS PG",
        "logging policy",
        "online (skyline)",
    } <= words(paper["data_size_scores"])
    assert {"#d55e00", "#56b4e9"} <= strokes(paper["data_size_scores"])
    assert {"n=500", "n=1000", "n=2000", "gradient steps"} <= words(paper["data_size_curves"])
    assert {"over IS PG", "over logging policy", "P(DSO is better)"} <= words(paper["data_size_improvement"])


def axes_of(sketch, colours):
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    sketch.draw(figure, colours)
    return figure.axes


def test_the_line_is_the_mean_and_the_band_its_interval():
    shown = sheets.sheet(grid({"dso": PAPER["dso"]}))
    (axis,) = axes_of(over_axis(shown), palette(["dso", "logging", "online"]))
    (line,) = (line for line in axis.lines if line.get_label() == "DSO")
    assert line.get_xdata().tolist() == [500, 1000, 2000]
    assert line.get_ydata() == pytest.approx(PAPER["dso"].mean(axis=0))
    (band,) = (held for held in axis.collections if held.get_paths())
    ends = band.get_paths()[0].vertices[:, 1]
    assert min(ends) == pytest.approx(min(one.mean.low for one in shown.summaries))
    assert axis.get_xscale() == "log"
    # What the rows say of the environment's own policies, though no such learner was run.
    assert {tuple(line.get_ydata()) for line in axis.lines if line.get_label() != "DSO"} == {(0.1,) * 3, (0.7,) * 3}


def test_a_wide_interval_does_not_squeeze_the_scores():
    held = grid({"dso": [[0.1, 0.2], [0.5, 0.3]]})
    (axis,) = axes_of(over_axis(sheets.sheet(held)), palette(["dso", "logging", "online"]))
    assert axis.get_ylim() == pytest.approx((0.1 - 0.036, 0.7 + 0.036))


def test_two_worlds_have_no_interval_that_would_fill_the_panel():
    assert marks.interval([0.1, 0.3]).value == pytest.approx(0.2)
    assert np.isnan([marks.interval([0.1, 0.3]).low, marks.interval([0.1, 0.3]).high]).all()
    assert marks.interval([0.1, 0.2, 0.3]) == mean_interval([0.1, 0.2, 0.3])


def test_labels_stay_within_the_figure():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3), layout="constrained")
    (axis,) = marks.panels(figure, 1, x="interquartile mean of improvement over no prompt")
    axis.set_yticks([0], ["SentenceGreedy, prompt seen"])
    figure.draw_without_rendering()
    label = axis.xaxis.label.get_window_extent()
    assert 0 < label.x0 < label.x1 < figure.bbox.width


def test_what_is_varied_besides_the_axis_gets_panels(tmp_path):
    held = [
        row(sweep="kernel", point=f"tau={tau:g}/kernel={kernel}/density=network", x=tau, world=world, score=0.1 * tau)
        for kernel in ("gaussian", "uniform")
        for tau in (0.5, 1.0, 4.0)
        for world in range(3)
    ]
    found = drawn(held, tmp_path)
    # One learner is compared with none.
    assert list(found) == ["kernel_scores"]
    assert {"gaussian kernel", "uniform kernel", "network density", "bandwidth τ"} <= words(found["kernel_scores"])
    assert "bars are 95% intervals" in found["kernel_scores"].caption


def test_text_gets_boxes_and_sentences(tmp_path):
    held = text_rows(
        {"dso": 40_000, "sentence-greedy": 16_000, "logging": 0}, sweep="movielens", point="prompts=all", x=math.nan
    )
    found = drawn(held, tmp_path)
    assert list(found)[:2] == ["movielens_runs", "movielens_sentences"]
    assert found["movielens_runs"].title == "MovieLens: improvement over no prompt"
    assert "2 worlds of 3 learning seeds each" in found["movielens_runs"].caption
    assert {"DSO", "best single", "oracle", "improvement over no prompt"} <= words(found["movielens_runs"])
    assert {"sentences asked for by a run", "1k", "10k"} <= words(found["movielens_sentences"])


def test_panels_of_other_learners_have_names_of_their_own(tmp_path):
    whole = text_rows({"dso": 40_000, "is": 0}, sweep="movielens_published", point="prompts=all", x=math.nan)
    more = text_rows({"dso": 40_000}, sweep="movielens_published", point="prompts=all/sentences=unbounded", x=math.nan)
    drawing = drawn([*whole, *more], tmp_path)["movielens_published_runs"]
    texts = ET.parse(drawing.path).iter("{http://www.w3.org/2000/svg}text")
    labels = ["".join(node.itertext()).strip() for node in texts]
    assert sorted(label for label in labels if label in ("DSO", "IS PG")) == ["DSO", "DSO", "IS PG"]


def test_aggregates_say_that_a_score_is_a_mean_over_seeds(tmp_path, paper):
    found = drawn(text_rows({"dso": 40_000, "logging": 0}, sweep="movielens", point="prompts=all"), tmp_path)
    for kind in ("iqm", "profile", "improvement"):
        assert "A score is the mean over the learning seeds" in found[f"movielens_{kind}"].caption
        assert "learning seeds" not in paper[f"data_size_{kind}"].caption


def test_budgets_are_points_of_their_own_and_not_averaged(tmp_path):
    budgets = [run for run in SWEEPS["movielens_budget"].runs() if run.world == 0]
    held = [
        row(run.learner, world, 0.1 + 0.01 * world, sweep=run.sweep.name, point=run.point.name, x=run.point.x,
            sentences=int(run.point.x), references=TEXT)
        for run in budgets
        for world in range(2)
    ]  # fmt: skip
    found = drawn(held, tmp_path)
    assert list(found) == ["movielens_budget_sentences"]
    assert {"DSO", "SentenceGreedy"} <= words(found["movielens_budget_sentences"])


def test_estimators_get_four_panels(tmp_path):
    held = [
        row(name, world, 0.01, sweep="estimators_n", point=f"n={n}", x=float(n), references={}, measures=MEASURES)
        for name in ("IS", "DR")
        for n in (500, 1000)
        for world in range(2)
    ]
    # An estimator that never gave a number has no score.
    held.append(row("DR", 2, math.nan, sweep="estimators_n", point="n=500", references={}, measures={"mse": math.nan}))
    found = drawn(held, tmp_path)
    assert list(found) == ["estimators_n_accuracy"]
    assert {"mean squared error", "|bias|", "variance", "coverage of 95% interval", "IS", "DR"} <= words(
        found["estimators_n_accuracy"]
    )


def test_any_other_sweep_gets_a_panel_for_each_point(tmp_path):
    held = [
        row(learner, world, 0.2, sweep="cases", point=f"case={case}", x=math.nan, references={})
        for learner in ("dso", "mine")
        for case in ("plain", "confounded outputs")
        for world in range(2)
    ]
    found = drawn(held, tmp_path)
    assert {"plain", "confounded outputs", "mine", "score"} <= words(found["cases_scores"])


def test_one_run_is_enough_to_draw(tmp_path):
    assert list(drawn([row(**CURVE)], tmp_path)) == ["data_size_scores", "data_size_curves"]


def test_the_same_rows_give_the_same_bytes_in_any_order(tmp_path, paper):
    again = drawn(grid(PAPER, **CURVE)[::-1], tmp_path)
    for name in ("data_size_scores", "data_size_iqm", "data_size_profile"):
        assert again[name].path.read_bytes() == paper[name].path.read_bytes()


def test_dark_figures_lie_beside_light_ones_in_lighter_ink(tmp_path):
    held = [row(point=f"n={n}", x=float(n)) for n in (500, 1000)]
    light = drawn(held, tmp_path, formats=("svg", "png"))["data_size_scores"]
    dark = drawn(held, tmp_path, dark=True)["data_size_scores"]
    assert {file.name for file in tmp_path.iterdir()} == {
        "data_size_scores.svg", "data_size_scores.png", "data_size_scores-dark.svg",
    }  # fmt: skip
    assert "#e8e8e8" in dark.path.read_text(encoding="utf-8")
    assert "#e8e8e8" not in light.path.read_text(encoding="utf-8")
    assert not strokes(dark) & {"#d55e00"}


def test_a_learner_has_its_colour_whatever_stands_beside_it():
    few, many = palette(["dso", "mine"]), palette(["dso", "is", "mine", "regression", "uniform"])
    assert few.styles["dso"] == many.styles["dso"]
    assert few.styles["mine"] not in (few.styles["dso"], many.styles["is"])
    estimators = [f"estimator {i}" for i in range(14)]
    found = palette(estimators).styles
    assert len({(found[name].colour, found[name].marker) for name in estimators}) == 14


@pytest.mark.parametrize(
    ("places", "scale", "labels"),
    [
        ([0, 1, 2, 3], "linear", ["0", "1", "2", "3"]),
        ([0.5, 1, 2, 4], "log", ["0.5", "1", "2", "4"]),
        ([0.25, 0.5, 0.75, 1], "linear", ["0.25", "0.5", "0.75", "1"]),
        ([10, 50, 100, 500, 1000], "log", ["10", "50", "100", "500", "1k"]),
        ([10, 100], "linear", ["10", "100"]),
        ([7], "linear", ["7"]),
    ],
)
def test_ticks_are_the_points_and_wide_axes_logarithmic(places, scale, labels):
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    marks.scale(axis, places)
    assert axis.get_xscale() == scale
    assert [label.get_text() for label in axis.get_xticklabels()] == labels


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ([row(world=w) for w in range(20)], "20 worlds"),
        ([row()], "1 world"),
        ([row(world=0), row(world=1), row("is")], "1 to 2 worlds"),
        ([row(world=w, seed=s) for w in range(2) for s in range(3)], "2 worlds of 3 learning seeds each"),
    ],
)
def test_captions_say_how_many_worlds(held, expected):
    assert sheets.worlds_in_words(held) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["S(n=500, prompts=1000, effort=Effort(steps=1.0, learning_rate=1.0))"], " 500 logged rounds; 1,000 prompts."),
        (["S(n=500, prompts=10)", "S(n=800, prompts=10)"], " 10 prompts."),
        (["S(effort=Effort(steps=0.1, learning_rate=5.0))"], " Quick form: 10% of the published gradient steps."),
        (["S()"], ""),
    ],
)
def test_captions_say_what_was_not_varied(settings, expected):
    assert sheets.settings_in_words([row(setting=setting) for setting in settings]) == expected


def test_references_are_on_the_scale_of_the_scores():
    scored = row(score=0.5, value=3.0, references={"uniform": 1.0, "oracle": 5.0, "online": 4.0})
    assert sheets.reference([scored], "online").value == pytest.approx(0.75)
    assert sheets.reference(text_rows({"dso": 1}), "best single").value == pytest.approx(0.19)
    assert sheets.reference([scored], "best single") is None


def test_rows_of_a_quick_sweep_do_not_mix_into_a_full_one(tmp_path):
    quick = [row(world=w, score=0.9, setting="quick", finished="2025") for w in range(4)]
    full = [row(world=w, score=0.4 + 0.01 * w) for w in range(2)]
    with pytest.warns(UserWarning, match="4 rows have another setting"):
        (drawing,) = figures.draw_all(figures.sheets_of([*quick, *full]), tmp_path)
    assert "2 worlds" in drawing.caption
    assert comparable(full) == full


@pytest.mark.parametrize("formats", [(), ("tiff?",)])
def test_an_unknown_format_is_named(tmp_path, formats):
    with pytest.raises(ConfigError, match=r"formats: expected some of .*svg"):
        figures.draw_all(figures.sheets_of([row()]), tmp_path, formats=formats)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file.figures: expected a folder where figures can be written.*--to"):
        figures.draw_all(figures.sheets_of([row()]), tmp_path / "file" / "figures")


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match="plots"):
        figures.draw_all(figures.sheets_of([row()]), tmp_path)


def command(*arguments):
    parser = argparse.ArgumentParser()
    figures.add_command(parser.add_subparsers())
    chosen = parser.parse_args(["figures", *map(str, arguments)])
    return chosen.do(chosen)


def test_the_command_draws_what_a_folder_holds(tmp_path, capsys):
    with Results(tmp_path) as results:
        results.append(grid({"dso": [[0.1, 0.2]]}))
    assert command("--out", tmp_path, "--format", "png") == 0
    assert (tmp_path / "figures" / "data_size_scores.png").read_bytes().startswith(b"\x89PNG")
    assert "data_size_scores.png: Logged rounds: optimality" in capsys.readouterr().out


def test_the_command_says_that_a_folder_is_empty(tmp_path):
    with pytest.raises(DataError, match="expected rows of a sweep, got none"):
        command("--out", tmp_path)


def test_a_caption_on_text_says_what_its_intervals_leave_out():
    assert "whose own error is in no interval" in sheets.settings_in_words([row(setting="TextSetting(rounds=100)")])
    assert "whose own error" not in sheets.settings_in_words([row()])
