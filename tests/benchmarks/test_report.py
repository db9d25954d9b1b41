"""The report: one page that a browser reads without a request, whose numbers are those of the rows."""

import re
from dataclasses import asdict, replace
from html.parser import HTMLParser

import numpy as np
import pytest

from benchmarks.figures.drawing import Drawing
from benchmarks.pages import report as room, tables
from benchmarks.pages.markup import Cell, anchor, data_uri, lean, measured, number, table
from benchmarks.pages.provenance import coverage, processor_time
from benchmarks.pages.stories import Side, Story, stories_html
from benchmarks.sweeps import SWEEPS, quick
from offprompts_env.errors import DataError, StorageError
from tests.benchmarks.some_rows import grid, row

VOID = {"meta", "img", "source", "br", "hr", "link", "input"}
SVG = '<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9pt"><path d="M 1.26 2.04 \nL 3 4" /></svg>'


class Page(HTMLParser):
    """What is in a page; fails where tags are not balanced or an id is there twice."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.tags, self.attributes, self.cells = [], [], [], [], []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []
        assert len(set(self.ids)) == len(self.ids)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if {"td", "th"} & set(self.open):
            self.cells[-1][-1] += data

    def line(self, name):
        return next(cells[1:] for cells in self.cells if cells and cells[0] == name)


@pytest.fixture
def drawn(monkeypatch):
    """Drawings without matplotlib."""

    def draw_all(sheets, folder, *, dark=False, formats=("svg",)):
        folder.mkdir(parents=True)
        path = folder / f"figure{'-dark' if dark else ''}.svg"
        path.write_text(SVG.replace("9pt", "8pt" if dark else "9pt"))
        return [
            Drawing(sheet.sweep, f"{sheet.sweep}_scores", f"{sheet.sweep} <drawn>", "Shown & told.", path)
            for sheet, _ in sheets
        ]

    monkeypatch.setattr(room, "draw_all", draw_all)


SCORES = {
    "logging": [[0.04, 0.05], [0.05, 0.05], [0.03, 0.05]],
    "is": [[0.1, 0.4], [0.2, 0.4], [0.15, None]],
    "dso": [[0.2, 0.3], [0.3, 0.3], [0.4, 0.3]],
    "online": [[0.7, 0.7], [0.7, 0.7], [0.7, 0.7]],
}


def test_the_page_is_balanced_and_asks_for_nothing(drawn):
    text = room.report(grid(SCORES) + [row("dso", world, 0.3, sweep="kernel", point="tau=1") for world in (0, 1)])
    page = Page(text)
    assert "script" not in page.tags
    assert not re.search(r"""(?:src|srcset|href|url)\s*[=(]\s*["']?(?:https?:|//)|@import|@font-face""", text)
    links = [value for name, value in page.attributes if name == "href"]
    assert links == ["#what-was-run", "#data-size", "#kernel"]
    assert {link[1:] for link in links} <= set(page.ids)
    assert ("name", "viewport") in page.attributes
    assert text.startswith("<!DOCTYPE html>")


def test_figures_follow_the_mode_and_are_in_the_page(drawn, tmp_path):
    page = Page(room.report(grid(SCORES)))
    given = dict(page.attributes)
    assert given["media"] == "(prefers-color-scheme: dark)"
    assert given["alt"] == "data_size <drawn>. Shown & told."
    light, dark = (tmp_path / name for name in ("light.svg", "dark.svg"))
    light.write_text(SVG)
    dark.write_text(SVG.replace("9pt", "8pt"))
    assert (given["src"], given["srcset"]) == (data_uri(light), data_uri(dark))


def test_means_are_those_of_the_rows_and_the_best_learner_is_marked(drawn):
    text = room.report(grid(SCORES))
    page = Page(text)
    error = np.std([0.2, 0.3, 0.4], ddof=1) / np.sqrt(3)
    assert page.line("DSO")[0] == f"0.300 ± {error:.3f}"
    # One world fewer: it is said behind the error. Not the skyline but the best that learns from the log is marked.
    assert page.line("IS PG")[1] == "0.400 ± 0.000 (2)"
    assert re.findall(r'class="best"><b>([^<]+)', text)[:2] == ["0.400", "0.300"]
    assert "2 to 3 worlds" in page.text


def test_the_published_numbers_stand_beside_ours(drawn):
    page = Page(room.report(grid({"dso": [[0.25], [0.29]]})))
    ours = 0.02
    deviation = (0.27 - 0.262) / np.hypot(ours, 0.015)
    assert page.line("DSO, n = 500") == ["0.270 ± 0.020", "0.262 ± 0.015", f"+{deviation:.1f}"]


def test_what_the_paper_says_is_checked_where_there_are_rows(drawn):
    taus = {0.5: 0.4, 1.0: 0.42, 2.0: 0.41, 4.0: 0.2}
    rows = [
        row(world=world, score=score + world / 1000, sweep="kernel", x=tau,
            point=f"tau={tau:g}/kernel=gaussian/density=network")
        for tau, score in taus.items() for world in range(3)
    ]  # fmt: skip
    page = Page(room.report(rows))
    assert "Statements that hold on these rows: 1 of 1." in page.text
    assert "A Gaussian kernel with a network density is flat in τ up to 2 and drops at 4: holds" in page.text
    assert "τ = 4 0.201 ±" in page.text


def test_aggregates_compare_with_the_logging_policy_and_with_dso():
    page = Page(tables.over_the_sweep(grid(SCORES)))
    assert page.cells[0][-2:] == ["P(better than logging policy)", "P(better than DSO)"]
    assert [cells[0] for cells in page.cells[1:]] == ["online (skyline)", "DSO", "IS PG", "logging policy"]
    assert page.line("online (skyline)")[-2].startswith("1.00 [1.00, 1.00]")
    assert page.line("DSO")[-1] == "–"


@pytest.mark.parametrize(
    "rows",
    [
        grid({"dso": [[0.2]]}),
        grid({"dso": [[None, 0.2]], "sentence-greedy": [[0.3, None]]}),
        [row("dm", measures={"mse": 0.1}), row("is", measures={"mse": 0.2})],
    ],
    ids=["one learner", "budgets", "estimators"],
)
def test_what_cannot_be_averaged_over_points_is_not(rows):
    assert tables.over_the_sweep(rows) == ""


def test_the_only_learner_of_a_point_is_not_called_the_best():
    assert 'class="best"' not in tables.means(grid({"logging": [[0.1]], "dso": [[0.2]]}))


def test_points_that_vary_in_several_things_are_folded_by_the_first():
    rows = [
        row(world=world, score=tau / 10 + (kernel == "uniform"), sweep="kernel", x=tau,
            point=f"tau={tau}/kernel={kernel}")
        for tau in (1, 2) for kernel in ("gaussian", "uniform") for world in (0, 1)
    ]  # fmt: skip
    text = tables.means(rows)
    page = Page(text)
    assert page.cells[0] == ["DSO", "tau=1", "tau=2"]
    assert page.line("kernel=uniform") == ["1.100 ± 0.000", "1.200 ± 0.000"]
    assert re.findall(r'class="best"><b>([^<]+)', text) == ["1.200"]


def test_the_smallest_error_of_estimators_is_marked_and_their_accuracy_shown(drawn):
    measures = {"bias": -0.2, "variance": 0.5, "coverage": 0.9, "truth": 1.0}
    rows = [
        row(name, world, score, sweep="estimators_n", measures={**measures, "mse": score}, references={})
        for name, score in (("DM", 0.3), ("IS", 0.1)) for world in (0, 1)
    ]  # fmt: skip
    text = room.report(rows)
    assert re.findall(r'class="best"><b>([^<]+)', text) == ["0.100"]
    page = Page(text)
    headings = re.findall(r"<h3>([^<]+)</h3>", text)
    assert headings == ["Means", "Mean squared error", "|bias|", "Variance", "Coverage of 95% interval"]
    assert [cells[1] for cells in page.cells if cells[0] == "IS"][2] == "0.200 ± 0.000"


def told(gain):
    return asdict(
        Story("User 7", "likes <b>", "Heat & Dust", Side("calm", "One.", 0.5), Side("bold", "Two.", 0.5 + gain))
    )


def test_stories_are_the_rows_and_escaped(drawn):
    rows = [
        row(name, score=score, sweep="movielens", references={"no prompt": 0.0, "oracle": 1.2, "best single": 0.6},
            details={"stories": [told(gain)]})
        for name, score, gain in (("is", 0.1, -1.5), ("dso", 0.3, 1.0), ("online", 0.9, 0.0))
    ]  # fmt: skip
    text = room.report(rows)
    page = Page(text)
    opened = text.index("What users were shown")
    # The best that learns from the log is in the open, the others are folded behind it.
    assert re.findall(r"<summary>The same under ([^<]+)", text[opened:]) == ["IS PG", "online (skyline)"]
    assert text.index("DSO beside the logging policy") < text.index("The same under IS PG")
    assert "likes &lt;b&gt;" in text
    assert "Heat &amp; Dust" in text
    assert '<span class="gain">+1.50</span>' in text
    assert '<span class="loss">−1.00</span>' in text
    assert page.line("oracle") == ["1.200"]


def sweep_rows(sweep, **changes):
    found = []
    for run in sweep.runs():
        made = row(run.learner, run.world, 0.1, sweep=sweep.name, point=run.point.name, x=run.point.x,
                   setting=repr(run.point.setting), config=repr(run.method))  # fmt: skip
        found.append(replace(made, id=run.id, **changes))
    return found


@pytest.mark.parametrize("form", ["full", "quick"])
def test_missing_runs_are_those_of_the_form_that_was_run(form):
    sweep = SWEEPS["noise"]
    taken = sweep if form == "full" else quick(sweep)
    rows = sweep_rows(taken)
    whole = coverage(rows)
    assert (whole.form, whole.planned, whole.missing, whole.gaps) == (form, len(rows), 0, ())
    without = [one for one in rows if not (one.learner == "dso" and one.world == 1)]
    part = coverage(without)
    points = [point.name for point in sweep.points]
    assert [(gap.point, gap.learner, gap.planned - gap.there) for gap in part.gaps] == [(p, "dso", 1) for p in points]
    assert part.missing == len(points)


def test_quick_points_beside_full_ones_are_a_mixed_sweep(drawn):
    full, short = (sweep_rows(sweep) for sweep in (SWEEPS["noise"], quick(SWEEPS["noise"])))
    rows = [row for row in full if row.x > 0] + [row for row in short if row.x == 0]
    assert coverage(rows).form == "mixed"
    assert "Some points are of the quick schedules" in Page(room.report(rows)).text


def test_settings_of_no_known_form_have_no_plan():
    found = coverage([row(sweep="noise", point="noise=0")])
    assert (found.form, found.planned, found.missing) == ("other", 0, 0)


def test_an_unfinished_sweep_says_what_is_missing_and_how_to_go_on(drawn):
    page = Page(room.report(sweep_rows(quick(SWEEPS["noise"]))[:-1]))
    assert "1 of" in page.text
    assert "python -m benchmarks run noise --quick" in page.text


def test_rows_of_another_setting_are_left_out_and_named(drawn):
    rows = [row(world=0, setting="VectorSetting(n=5)", finished="2025-01-01T00:00:00"), row(world=1), row(world=2)]
    page = Page(room.report(rows))
    assert "1 rows have another setting" in page.text
    assert page.text.count("2 runs") == 1


def test_processor_time_counts_a_run_of_two_sweeps_once_and_shared_stages_by_their_longest():
    rows = [
        replace(row(name, seconds=2.0, shared_seconds=shared), key=name) for name, shared in (("is", 5.0), ("dso", 3.0))
    ]
    found = processor_time([*rows, replace(rows[0], sweep="prompts")])
    assert (found.learning, found.shared) == (4.0, 5.0)


@pytest.mark.parametrize(
    ("value", "digits", "signed", "said"),
    [
        (-0.1234, 3, False, "−0.123"), (-0.0001, 3, False, "0.000"), (1234.5, 1, False, "1,234.5"),
        (0.5, 1, True, "+0.5"),
        (float("nan"), 3, False, "–"), (float("-inf"), 3, False, "−∞"),
    ],
)  # fmt: skip
def test_numbers_have_a_true_minus_and_no_negative_zero(value, digits, signed, said):
    assert number(value, digits, signed=signed) == said


def test_a_mean_of_one_world_has_no_error():
    assert measured(0.5, float("nan")) == Cell("0.500")


def test_tables_escape_what_they_show():
    assert "<i>" not in table(["<i>", "<i>"], [["<i>", Cell("<i>", "<i>")]], caption='<i>"<i>')


def test_figures_lose_bytes_and_no_shape():
    found = lean(SVG)
    assert 'd="M 1.3 2 L 3 4"' in found
    assert "<?xml" not in found
    assert 'transform="scale(0.015625)"' in lean('<svg ><g transform="scale(0.015625)"/></svg>')


def test_ids_hold_letters_digits_and_hyphens():
    assert anchor("estimators_n/x=1") == "estimators-n-x-1"


def test_users_follow_each_other_under_one_heading():
    one = Story("User 1", "", "A", Side("p", "s", 0.0), Side("q", "t", 0.0))
    text = stories_html([one, replace(one, movie="B"), replace(one, user="User 2")], ("before", "after"))
    assert re.findall(r"<h2>([^<]+)", text) == ["User 1", "User 2"]
    assert "gain" not in text
    assert "loss" not in text


def test_a_page_with_real_figures_is_small_enough(tmp_path):
    path = tmp_path / "deep" / "report.html"
    room.write_report(grid(SCORES), path)
    page = Page(path.read_text(encoding="utf-8"))
    assert page.tags.count("picture") >= 1
    assert path.stat().st_size < 5e6


def test_no_rows_say_what_to_do():
    with pytest.raises(DataError, match=r"run a sweep first"):
        room.report([])


def test_a_place_that_cannot_be_written_is_named(drawn, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file.report\.html"):
        room.write_report(grid(SCORES), tmp_path / "file" / "report.html")
