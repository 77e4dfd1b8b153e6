"""What the pages say, read as a browser would: elements, cells, the charts' JSON."""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deme_core.binned_losses import RelativeLosses
from deme_core.html_report import comparison_page, run_page
from deme_core.html_report.captions import scores_caption
from deme_core.html_report.content import (
    ComparedRun,
    ComparisonContent,
    Copy,
    Difference,
    HeldoutLosses,
    Picture,
    Provenance,
    RunContent,
    Samples,
    Score,
    Scores,
    SearchLog,
    StageCost,
    TriedWeights,
)
from deme_core.html_report.loss_charts import heldout_chart, thinned, training_chart
from deme_core.html_report.numbers import decimal_places, duration, number, percent, signed, weight
from deme_core.html_report.pictures import read_picture
from deme_core.html_report.score_chart import score_chart
from deme_core.html_report.search_chart import search_chart
from deme_core.html_report.sentences import comparison_sentence, headline, verdict_sentence
from deme_core.segments import TimestepSegment
from deme_core.verdict import Interval, Verdict

METRIC = "fd_efficientnet_lite0"
BAD_NAME = "<script>alert(1)</script>"
PIXEL = "data:image/png;base64,iVBORw0KGgo="


class Page(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("td", "th", "small"):
            self.handle_data(" ")
        if tag not in ("meta", "img"):
            self._open.append(tag)
            self.text.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.text[tag][-1] += data

    def rows(self) -> list[str]:
        """Returns the text of every row of every table."""
        return [" ".join(text.split()) for text in self.text["tr"]]

    def chart(self, name: str) -> dict[str, Any]:
        """Returns what a chart shows."""
        scripts = [attributes for tag, attributes in self.elements if tag == "script"]
        index = next(i for i, attributes in enumerate(scripts) if attributes.get("id") == f"chart-{name}")
        found: dict[str, Any] = json.loads(self.text["script"][index])
        return found


def score(mean: float, *, has_images: bool = True) -> Score:
    images = Interval(mean, mean - 3, mean + 3) if has_images else None
    return Score(Interval(mean, mean - 2, mean + 2), images, (mean - 1, mean + 1))


def difference(baseline: str, mean: float, verdict: Verdict, row: str = "merged") -> Difference:
    return Difference(
        row, baseline, METRIC, Interval(mean, mean - 2, mean + 2), Interval(mean, mean - 4, mean), verdict
    )


SCORES = Scores(
    metric=METRIC,
    rows={
        row: {METRIC: score(mean), "precision": score(0.5, has_images=False)}
        for row, mean in {"pretrained": 393.0, "finetuned": 345.8, "ensemble": 348.1, "merged": 334.6}.items()
    },
    differences=(difference("pretrained", -58.4, "better"), difference("finetuned", -1.2, "too close to call")),
    higher_is_better=frozenset({"precision"}),
)
CURVE = RelativeLosses((0, 50, 100), (Interval(-0.02, -0.03, -0.01), Interval(0.01, 0.0, 0.02)))
FAR_OFF = RelativeLosses((0, 50, 100), (Interval(-0.02, -0.03, -0.01), Interval(9.0, 8.0, 10.0)))
RECORDS = [{"global_step": step, "diffusion_loss": 0.1, "consistency_loss": 0.01} for step in (10, 20)]
SEARCH = SearchLog(
    title="Merge weights",
    weight_names=("segment 0", "segment 1"),
    candidates=(
        TriedWeights((0.0, 0.0), 9.0, rough=False),
        TriedWeights((0.5, 1.0), 7.0, rough=False),
        TriedWeights((1.0, 0.5), 8.0, rough=False),
    ),
    rank_correlation={"held-out loss": 0.5},
    num_images=300,
    num_losses=6,
)
CONTENT = RunContent(
    title="toy",
    run="0123456789abcdef",
    finished="24 November 2026, 12:00 UTC",
    facts={"images": "300 for each of 5 seeds"},
    scores=SCORES,
    samples=Samples(note="Same noise.", rows={row: (Picture(PIXEL, 274),) for row in SCORES.rows}),
    heldout=HeldoutLosses(curves={"merged": CURVE, "segment 0": FAR_OFF}, segment_edges=(0, 50, 100)),
    trainings={"finetuned": RECORDS, "segment 0": RECORDS},
    searches=(SEARCH, replace(SEARCH, title="Scale of the control")),
    copies=(
        Copy(TimestepSegment(0, 50), Interval(-0.0157, -0.018, -0.0135), True, (0.3,)),
        Copy(TimestepSegment(50, 100), Interval(0.01, -0.01, 0.03), False, (0.0,)),
    ),
    costs=(
        StageCost("finetune", "finetuning", 3, 1, 61.0, 122.4, 0),
        StageCost("features", "images and their features", 8, 8, 0.5, 0.5, 1200),
    ),
    seconds={"total": 75.0, "idle": 5.0, "storage": 2.0},
    provenance=Provenance(
        recipe_name="toy",
        recipe="name: toy\nsegments: {count: 2}\n",
        commands=("deme run toy.yaml",),
        versions={"torch": "2.15.0"},
        digests={"model merged": "a" * 64},
    ),
)


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(run_page(CONTENT))


def test_the_verdict_is_a_sentence(page: Page) -> None:
    assert page.text["h1"] == [
        "The merged model is better than the pretrained model; against the control that saw as many images it is "
        "too close to call."
    ]


@pytest.mark.parametrize(
    ("verdicts", "sentence"),
    [
        (
            ("better", "better"),
            "The merged model is better than the pretrained model and the control that saw as many images.",
        ),
        (
            ("better", "worse"),
            "The merged model is better than the pretrained model; it is worse than the control that saw as many "
            "images.",
        ),
        (
            ("too close to call", "too close to call"),
            "The merged model against the pretrained model and the control that saw as many images is too close to "
            "call.",
        ),
    ],
)
def test_every_pair_of_verdicts_has_its_sentence(verdicts: Sequence[Verdict], sentence: str) -> None:
    pairs = zip(("pretrained", "finetuned"), verdicts, strict=True)
    assert verdict_sentence([difference(baseline, 0.0, verdict) for baseline, verdict in pairs]) == sentence


def test_each_row_with_verdicts_has_a_sentence() -> None:
    found = (difference("pretrained", -1.0, "better"), difference("pretrained", 1.0, "worse", "distilled"))
    unjudged = Difference("merged", "pretrained", "precision", Interval(0.0, 0.0, 0.0))
    assert headline((*found, unjudged)) == (
        "The merged model is better than the pretrained model. The distilled model is worse than the pretrained model."
    )
    assert headline((unjudged,)) == ""
    without_weight = [Copy(TimestepSegment(0, 50), Interval(-0.01, -0.02, 0.0), True, (0.0, 0.0))]
    nothing = (difference("pretrained", 0.0, "too close to call"), difference("finetuned", 9.0, "worse"))
    assert headline(nothing, without_weight) == (
        "The merged model is the pretrained model: all merge weights are 0. The merged model is worse than the control "
        "that saw as many images."
    )
    assert headline(nothing, [replace(without_weight[0], weights=(0.0, 0.1))]) == headline(nothing)


def test_several_runs_have_one_sentence() -> None:
    found = [difference("a", 0.0, "worse", "b"), difference("a", 0.0, "better", "c"), difference("a", 0, "worse", "d")]
    assert comparison_sentence(found) == "Against a, c is better; b and d are worse."


def test_the_table_has_both_intervals_of_every_row(page: Page) -> None:
    rows = page.rows()
    assert rows[0] == f"row {METRIC} ↓ precision ↑"
    assert rows[1].startswith(
        "pretrained the model as it came 393.0 391.0 to 395.0 over seeds 390.0 to 396.0 over images"
    )
    assert "merged one model, merged from the copies 334.6 332.6 to 336.6 over seeds" in rows[4]
    assert rows[1].count("over images") == 1, "precision was not resampled"


def test_differences_carry_their_intervals_and_verdict(page: Page) -> None:
    assert f"merged − pretrained {METRIC} −58.4 −60.4 to −56.4 −62.4 to −58.4 better" in page.rows()
    assert f"merged − finetuned {METRIC} −1.20 −3.20 to +0.80 −5.20 to −1.20 too close to call" in page.rows()


def test_a_bad_row_and_a_small_difference_keep_their_digits() -> None:
    seeds, images = Interval(-0.04, -0.049, -0.02), Interval(-0.04, -0.0799, -0.0001)
    close = Scores(
        metric="fid",
        rows={
            row: {"fid": score(mean)} for row, mean in {"pretrained": 3.51, "finetuned": 250.0, "merged": 3.46}.items()
        },
        differences=(
            Difference("merged", "pretrained", "fid", seeds, images, "better"),
            Difference("merged", "finetuned", "fid", Interval(-246.54, -250.0, -0.0001), None, "better"),
        ),
    )
    samples = Samples(note="", rows={row: (Picture(PIXEL, 274),) for row in close.rows})
    rows = Page(run_page(replace(CONTENT, scores=close, samples=samples))).rows()
    assert "merged − pretrained fid −0.0400 −0.0490 to −0.0200 −0.0799 to −0.0001 better" in rows
    assert "merged − finetuned fid −246.540 −250.000 to −0.0001 – better" in rows
    assert rows[1].startswith("pretrained the model as it came 3.510 1.510 to 5.510 over seeds")


def captions(scores: Scores) -> tuple[str, str]:
    """Returns what stands under the chart of the scores, and below that the note on all intervals."""
    page = Page(run_page(replace(CONTENT, scores=scores)))
    note = next(text for text in page.text["p"] if text.startswith("All intervals hold"))
    return page.text["figcaption"][0], note


BOTH_DECIDE = "only if both of its intervals exclude zero"
SEEDS_DECIDE = "not resampled: the seeds alone decide"


def test_the_caption_speaks_of_what_was_resampled() -> None:
    caption, note = captions(SCORES)
    assert "Wide bar: 95 % bootstrap over the images, generated and real." in caption
    assert BOTH_DECIDE in caption and SEEDS_DECIDE not in caption
    assert "and those over seeds the real images, too" in note
    caption, note = captions(replace(SCORES, draws_real_images=False))
    assert "Wide bar: 95 % bootstrap over the generated images alone." in caption
    assert note.startswith("All intervals hold the training and the real images fixed")


def test_without_resamples_the_seeds_alone_decide() -> None:
    rows = {
        row: {METRIC: score(by_metric[METRIC].seeds.mean, has_images=False)} for row, by_metric in SCORES.rows.items()
    }
    plain = tuple(replace(difference, images=None) for difference in SCORES.differences)
    caption, note = captions(replace(SCORES, rows=rows, differences=plain))
    assert SEEDS_DECIDE in caption and "Wide bar" not in caption and BOTH_DECIDE not in caption
    assert note.startswith("All intervals hold the training and the real images fixed")


def test_the_luck_of_random_subsets_is_named_where_a_kernel_distance_decides() -> None:
    named = "but not over the random subsets of a kernel distance"
    lone = {"model": {name: score(0.1) for name in ("kid", "kd_efficientnet_lite0", METRIC)}}
    told = [named in scores_caption(Scores(metric=metric, rows=lone)) for metric in lone["model"]]
    assert told == [True, True, False]


def test_gate_and_costs_are_tables(page: Page) -> None:
    rows = page.rows()
    assert "segment 0 0 to 49 −1.57 % −1.80 % to −1.35 % 0.3 better merged" in rows
    assert "segment 1 50 to 99 +1.00 % −1.00 % to +3.00 % 0 too close to call left out of the merge" in rows
    assert "finetuning 3 1 1 min 01 s 2 min 02 s –" in rows
    assert "images and their features 8 all 0.5 s 0.5 s 1,200" in rows
    assert "whole run 11 9 1 min 15 s 2 min 03 s 1,200" in rows


def test_the_run_can_be_done_again(page: Page) -> None:
    assert page.text["pre"] == ["deme run toy.yaml\n", CONTENT.provenance.recipe]
    assert "Recipe, defaults filled in but for those that digests leave out" in page.text["h3"]
    download = next(attributes for _, attributes in page.elements if "download" in attributes)
    assert download["download"] == "toy.yaml"
    assert base64.b64decode(str(download["href"]).partition(",")[2]).decode() == CONTENT.provenance.recipe
    assert f"model merged {'a' * 64}" in page.rows()
    assert "torch 2.15.0" in page.rows()


def test_nothing_is_outside_of_the_file(page: Page) -> None:
    addresses = [a[name] for _, a in page.elements for name in ("src", "href") if name in a]
    assert len(addresses) > 10
    assert all(address and address.startswith(("data:", "#")) for address in addresses)
    assert not [tag for tag, _ in page.elements if tag in ("link", "iframe", "object")]
    assert not any("@import" in style or "url(" in style for style in page.text["style"])
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data: blob:;")


def test_plotly_is_in_it_once(page: Page) -> None:
    assert sum("* plotly.js v" in script for script in page.text["script"]) == 1


def test_every_chart_has_a_place_and_content(page: Page) -> None:
    places = [a["data-chart"] for _, a in page.elements if "data-chart" in a]
    assert places == [f"chart-{name}" for name in ("scores", "heldout", "search-0", "search-1", "training")]
    for place in places:
        assert place is not None
        assert page.chart(place.removeprefix("chart-"))["data"]


def test_names_cannot_break_out_of_the_page() -> None:
    odd = replace(
        CONTENT,
        title=BAD_NAME,
        searches=(replace(SEARCH, title=BAD_NAME, weight_names=(BAD_NAME, "b")),),
        trainings={BAD_NAME: RECORDS},
    )
    page = Page(run_page(odd))
    assert not [script for script in page.text["script"] if script == "alert(1)"]
    assert page.text["h3"][0] == BAD_NAME
    assert BAD_NAME in {trace["name"] for trace in page.chart("training")["data"]}


def test_the_page_of_one_model_leaves_out_what_it_does_not_have() -> None:
    rows = {"model": SCORES.rows["merged"]}
    lone = RunContent(
        title="hub/model",
        run="0123",
        finished="now",
        facts={},
        scores=Scores(metric=METRIC, rows=rows),
        samples=Samples(note="", rows={"model": (Picture(PIXEL, 274),)}),
        provenance=CONTENT.provenance,
        costs=CONTENT.costs,
        seconds=CONTENT.seconds,
    )
    page = Page(run_page(lone))
    assert page.text["h1"] == [f"hub/model: {METRIC} 334.6"]
    assert page.text["h2"] == ["Scores", "Samples", "Time and cost", "Do it again"]


def test_captions_stand_under_the_images_of_all_rows() -> None:
    prompts = ["a red fox", "a blue door"]
    rows = {row: tuple(Picture(f"{PIXEL}{row}", 64, prompt) for prompt in prompts) for row in ("pretrained", "merged")}
    page = Page(run_page(replace(CONTENT, samples=Samples(note="", rows=rows))))
    images = [str(a["src"]).removeprefix(PIXEL) for tag, a in page.elements if tag == "img"]
    assert images == ["pretrained", "merged", "pretrained", "merged"]
    assert [text for text in page.text["p"] if text in prompts] == prompts


def test_the_chart_draws_both_intervals_of_rows_and_of_differences() -> None:
    row = Score(Interval(5.0, 4.0, 7.0), Interval(5.0, 3.0, 9.0), (5.0,))
    seeds, images = Interval(-2.0, -3.0, -0.5), Interval(-2.0, -4.0, -1.0)
    differences = (Difference("merged", "pretrained", "fid", seeds, images, "better"),)
    rows = {name: {"fid": row} for name in ("pretrained", "merged")}
    traces = score_chart(Scores(metric="fid", rows=rows, differences=differences)).to_dict()["data"]
    bars = [list(trace["x"]) for trace in traces if trace["mode"] == "lines+markers"]
    assert bars == [[3.0, 9.0], [3.0, 9.0], [-4.0, -1.0]]
    lines = [trace for trace in traces if "error_x" in trace]
    bounds = [(*line["x"], *line["error_x"]["arrayminus"], *line["error_x"]["array"]) for line in lines]
    assert bounds == [(5.0, 1.0, 2.0), (5.0, 1.0, 2.0), (-2.0, 1.0, 1.5)]


def test_held_out_losses_are_per_cent_with_borders_and_a_range_that_copies_do_not_stretch() -> None:
    assert CONTENT.heldout is not None
    figure = heldout_chart(CONTENT.heldout, is_copy=frozenset({"segment 0"})).to_dict()
    merged = next(trace for trace in figure["data"] if trace.get("name") == "merged")
    assert (list(merged["x"]), list(merged["y"])) == ([25.0, 75.0], [-2.0, 1.0])
    borders = [shape["x0"] for shape in figure["layout"]["shapes"] if shape["x0"] == shape["x1"]]
    assert borders == [50]
    low, high = figure["layout"]["yaxis"]["range"]
    assert -4 < low < -3
    assert 2 < high < 3, "a copy that is 900 % worse elsewhere must not flatten the rest"
    assert [a["text"] for a in figure["layout"]["annotations"]] == ["segment 0", "segment 1"]


def test_a_loss_that_is_always_zero_has_no_panel() -> None:
    without = [{**record, "consistency_loss": 0.0} for record in RECORDS]
    assert [a.text for a in training_chart({"finetuned": without}).layout.annotations] == ["diffusion loss"]
    assert len(training_chart({"finetuned": RECORDS}).layout.annotations) == 2
    assert len(training_chart({"finetuned": without, "segment 0": RECORDS}).layout.annotations) == 2


def test_long_histories_are_thinned_by_means() -> None:
    steps, values = thinned(list(range(1, 1001)), [float(i) for i in range(1, 1001)])
    assert len(values) <= 400
    assert (steps[0], values[0]) == (3, 2.0)
    assert (steps[-1], values[-1]) == (1000, 1000.0)
    assert thinned([5], [0.5]) == ([5], [0.5])


def test_a_search_shows_its_best_so_far_and_marks_the_best() -> None:
    figure = search_chart(SEARCH).to_dict()
    best_so_far = next(trace for trace in figure["data"] if trace.get("name") == "best so far")
    assert list(best_so_far["y"]) == [9.0, 7.0, 7.0]
    by_weight = next(trace for trace in figure["data"] if trace.get("name") == "segment 1")
    assert (list(by_weight["x"]), list(by_weight["y"])) == ([0.0, 1.0, 0.5], [9.0, 7.0, 8.0])
    widths = list(by_weight["marker"]["line"]["width"])
    assert [width > 0 for width in widths] == [False, True, False]


def test_candidates_without_a_score_are_left_out_and_counted() -> None:
    first, second, third = SEARCH.candidates
    log = replace(SEARCH, candidates=(first, replace(second, score=None), third))
    figure = search_chart(log).to_dict()
    by_weight = next(trace for trace in figure["data"] if trace.get("name") == "segment 1")
    assert list(by_weight["x"]) == [first.weights[1], third.weights[1]]
    assert [text.split(":")[0] for text in by_weight["text"]] == ["1", "3"]
    assert (log.num_scores, log.num_failed) == (2, 1)


def test_what_a_search_measured_is_counted_once_and_in_words() -> None:
    first, second, _ = SEARCH.candidates
    failed = replace(second, score=None)
    log = replace(SEARCH, candidates=(first, failed, replace(failed, rough=True), first, failed), num_images=60)
    (told,) = [text for text in Page(run_page(replace(CONTENT, searches=(log,)))).text["p"] if "60 images" in text]
    assert told.startswith("1 score, 60 images, 6 held-out losses; ")
    assert "; 1 candidate made images that are not finite, which are not counted." in told


@pytest.mark.parametrize(("total", "is_told"), [(61.0, True), (75.0, False)])
def test_stages_are_called_side_by_side_only_where_they_were(total: float, is_told: bool) -> None:
    page = Page(run_page(replace(CONTENT, seconds=CONTENT.seconds | {"total": total})))
    assert any("Stages run side by side" in text for text in page.text["p"]) == is_told


def test_a_control_that_makes_up_for_a_distillation_is_told_by_images() -> None:
    rows = {**SCORES.rows, "distilled": SCORES.rows["merged"]}
    page = Page(run_page(replace(CONTENT, scores=replace(SCORES, rows=rows))))
    control = "with as many images as all other trainings together, the distillation's too"
    assert any(control in row for row in page.rows())


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_a_control_whose_loss_is_weighed_says_so(gamma: float | None) -> None:
    page = Page(run_page(replace(CONTENT, control_min_snr_gamma=gamma)))
    assert any("its loss weighed by Min-SNR" in row for row in page.rows()) == (gamma is not None)


def test_a_search_for_a_metric_that_grows_marks_the_highest() -> None:
    figure = search_chart(replace(SEARCH, higher_is_better=True)).to_dict()
    best_so_far = next(trace for trace in figure["data"] if trace.get("name") == "best so far")
    assert list(best_so_far["y"]) == [9.0, 9.0, 9.0]
    by_weight = next(trace for trace in figure["data"] if trace.get("name") == "segment 1")
    assert [width > 0 for width in by_weight["marker"]["line"]["width"]] == [True, False, False]


def test_rough_scores_have_panels_of_their_own() -> None:
    rough = tuple(replace(c, score=50 * c.score, rough=True) for c in SEARCH.candidates)
    figure = search_chart(replace(SEARCH, candidates=(*rough, *SEARCH.candidates[:2]))).to_dict()
    best_so_far = [list(trace["y"]) for trace in figure["data"] if trace.get("name") == "best so far"]
    assert best_so_far == [[450.0, 350.0, 350.0], [9.0, 7.0]]


def test_small_pictures_stay_as_they_are_and_large_ones_shrink(tmp_path: Path) -> None:
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    Image.new("L", (64, 32), 7).save(small)
    Image.effect_noise((1280, 640), 50).save(large)
    kept = read_picture(small, "a caption")
    assert base64.b64decode(kept.uri.partition(",")[2]) == small.read_bytes()
    assert (kept.width, kept.is_small, kept.caption) == (64, True, "a caption")
    shrunk = read_picture(large)
    content = base64.b64decode(shrunk.uri.partition(",")[2])
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.size) == ("WEBP", (1024, 512))
    assert len(content) < large.stat().st_size / 2


@pytest.mark.parametrize(
    ("values", "places"),
    [([393.0, 0.0], 1), ([1250.0, 3.51, -3.46], 3), ([0.0047], 6), ([1e-9], 6), ([12345.6], 0), ([], 1), ([0.0], 1)],
)
def test_a_column_has_as_many_decimals_as_its_smallest_number_needs(values: list[float], places: int) -> None:
    assert decimal_places(values) == places


def test_numbers_as_people_write_them() -> None:
    assert (number(-1234.5, 1), signed(0.5, 2), percent(-0.0123)) == ("−1,234.5", "+0.50", "−1.23 %")
    assert (signed(0.0, 1), signed(-0.04, 1), number(0.5, 0)) == ("+0.0", "−0.04", "0.5"), (
        "what is not 0 is not shown so"
    )
    assert (signed(-0.0, 3), number(-0.0, 1), weight(-0.0), weight(-0.5)) == ("+0.000", "0.0", "0", "−0.5")
    assert [duration(s) for s in (0.04, 59.94, 59.96, 61.2, 3599.7, 7260.0)] == [
        "0.0 s",
        "59.9 s",
        "1 min 00 s",
        "1 min 01 s",
        "1 h 00 min",
        "2 h 01 min",
    ]


def compared(label: str, **settings: str) -> ComparedRun:
    return ComparedRun(label=label, run=f"{label}-run", recipe="toy", model="merged", settings=settings)


def test_the_page_of_several_runs_shows_what_differs() -> None:
    first, second = "toy 01", "toy 02"
    content = ComparisonContent(
        runs=(compared(first, **{"finetune.seed": "0"}), compared(second, **{"finetune.seed": "1"})),
        facts={"sampler": "ddim, 20 steps"},
        scores=Scores(
            metric=METRIC,
            rows={first: {METRIC: score(393.0)}, second: {METRIC: score(300.0)}},
            differences=(difference(first, -93.0, "better", second),),
        ),
        samples=Samples(note="Same noise.", rows={label: (Picture(PIXEL, 274),) for label in (first, second)}),
        heldout=HeldoutLosses(curves={first: CURVE, second: CURVE}),
    )
    page = Page(comparison_page(content))
    assert page.text["h1"] == ["Against toy 01, toy 02 is better."]
    assert "finetune.seed 0 1" in page.rows()
    assert "toy 02 300.0 298.0 to 302.0 over seeds 297.0 to 303.0 over images" in page.rows()
    assert len([tag for tag, _ in page.elements if tag == "img"]) == 2
    assert {trace["name"] for trace in page.chart("heldout")["data"] if "name" in trace} == {first, second}
    bare = replace(content, heldout=None, runs=(compared(first), compared(second)))
    assert "No setting of the recipes differs." in comparison_page(bare)
    assert "heldout" not in [a.get("id") for _, a in Page(comparison_page(bare)).elements]


def test_the_guards_of_a_search_are_told(page: Page) -> None:
    guarded = Page(run_page(replace(CONTENT, searches=(replace(SEARCH, guards=("fd_pixels_4x4", "recall")),))))
    sentence = (
        "Where fd_pixels_4x4 or recall is worse than the pretrained model’s by some share of it, the candidate’s score "
        "is worse by the same share of the pretrained model’s score; shares of several add up."
    )
    assert any(sentence in text for text in guarded.text["p"])
    assert not any("worse by the same share" in text for text in page.text["p"])


def test_a_run_without_resamples_beside_one_that_has_them_is_told_why_nothing_is_decided() -> None:
    rows = {
        label: {METRIC: score(mean, has_images=label == "c")} for label, mean in (("a", 3.0), ("b", 2.0), ("c", 1.0))
    }
    found = (difference("a", -1.0, "better", "b"), difference("a", -2.0, "too close to call", "c"))
    content = ComparisonContent(
        runs=tuple(map(compared, rows)),
        facts={},
        scores=Scores(metric=METRIC, rows=rows, differences=tuple(replace(each, images=None) for each in found)),
        samples=Samples(note="", rows={label: (Picture(PIXEL, 274),) for label in rows}),
    )
    page = Page(comparison_page(content))
    reason = "only one of the two has resamples"
    assert [reason in row for row in page.rows() if "− a" in row] == [False, True]
    assert page.text["dd"].count(reason) == 1
    caption = page.text["figcaption"][0]
    assert BOTH_DECIDE in caption and "Where neither of two was resampled, the seeds alone decide" in caption
