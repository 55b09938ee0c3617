"""The report: well formed, complete, self-contained, escaped."""

import base64
import re
from html.parser import HTMLParser
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
from jinja2 import UndefinedError
from markupsafe import Markup
from PIL import Image

from spar.common.errors import InputError
from spar.evaluation.results import Result, Score
from spar.reporting import charts
from spar.reporting.report import (
    ReportAnswer,
    ReportData,
    ReportEdit,
    ReportImage,
    ReportReconstruction,
    ReportRouting,
    render_report,
    write_report,
)
from spar.reporting.routing_summary import collect_routing
from spar.reporting.templating import render_template

VOID = ("img", "meta")  # elements without an end
EVIL = "<script>alert('x')</script>\"&"
DETECTOR = {"version": "1", "accuracy": 0.999, "accuracy_degraded": 0.99, "n": 200}
RESULTS = (
    Result(
        "shapes-gen",
        (Score("overall", 0.97, 0.96, 0.98, 600), Score("colors", 0.5, 0.4, 0.6, 100), Score("part.color", 1, 1, 1, 9)),
        {"seed": 0, "steps": 20, "detector": DETECTOR, "machine": {"cpu": "test", "cores": 2}, "seconds": 3.0},
    ),
    Result("shapes-recon", (Score("psnr", 31.0, 30.0, 32.0, 500), Score("ssim", 0.955, 0.94, 0.96, 500)), {}),
    Result("shapes-vqa", (Score("overall", 0.9, 0.8, 0.95, 9), Score("blind.overall", 0.3, 0.2, 0.4, 9)), {}),
)


def picture(color="red", size=(64, 64)):
    return Image.new("RGB", size, color)


def routing():
    tokens = ["<|im_start|>", "red", "\n", *["<IMG_CONTEXT>"] * 64, "query 0"]
    kinds = ["text"] * 3 + ["image"] * 64 + ["query"]
    weights = np.random.default_rng(0).dirichlet(np.ones(4), len(tokens))
    return SimpleNamespace(tokens=tokens, kinds=kinds, layers=(2, 4, 6, 8), weights=weights)


def everything():
    steps = np.arange(0, 400, 4)
    return ReportData(
        title="Title of the page",
        lead=EVIL,
        manifest={"recipe": "shapes", "scores": {"a": 0.5}, "note": EVIL},
        facts={"cpu": "test", "versions": {"torch": "2"}},
        gallery=[ReportImage(picture(), "a red prompt", True), ReportImage(picture("blue"), EVIL, False)],
        edits=[ReportEdit(picture(), "make it green", picture("green"), True)],
        answers=[ReportAnswer(picture(), "what color?", "red", "red"), ReportAnswer(picture(), EVIL, EVIL, "no")],
        reconstructions=[ReportReconstruction(picture(), picture("navy"), "31.5 dB")],
        routing=[ReportRouting("make the red circle blue", routing(), picture("pink"))],
        routing_summary=collect_routing([routing()]),
        curves={"encoder": {"loss": (steps, np.exp(-steps / 90)), "weird": (steps[:1], np.array([np.nan]))}},
        results=RESULTS,
    )


class Reader(HTMLParser):
    """Collects elements and checks that every one that opens closes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.words.append(data)

    def named(self, name):
        return [attributes for found, attributes in self.elements if found == name]


@pytest.fixture(scope="module")
def page():
    return render_report(everything())


def test_the_page_is_well_formed_and_its_links_lead_somewhere(page):
    reader = Reader(page)
    assert not reader.open
    ids = {attributes["id"] for _, attributes in reader.elements if "id" in attributes}
    links = [attributes["href"] for attributes in reader.named("a")]
    assert len(links) == 8 and {link[1:] for link in links} == ids


def test_every_part_is_shown(page):
    words = " ".join(Reader(page).words)
    for phrase in (
        "Title of the page", "a red prompt", "make it green", "what color?", "31.5 dB", "encoder", "0.970", "31.0 dB",
        "shapes-recon", "color word", "blind 0.300", "detector version 1", "99.9%", "make the red circle",
        "layer 8", "drawing queries",
    ):
        assert phrase in words, phrase


def test_nothing_of_the_user_s_is_markup(page):
    reader = Reader(page)
    assert not reader.named("script") and "<script" not in page
    assert " ".join(reader.words).count("alert('x')") >= 4


def test_nothing_is_loaded_from_elsewhere(page):
    reader = Reader(page)
    assert all(image["src"].startswith("data:image/png;base64,") for image in reader.named("img"))
    assert not reader.named("link") and not re.search(r"url\(|@import|https?://", page)
    assert "default-src 'none'" in reader.named("meta")[2]["content"]


def test_every_image_and_chart_has_a_name(page):
    reader = Reader(page)
    assert all(image["alt"].strip() for image in reader.named("img"))
    assert all(drawing["aria-label"] and drawing["role"] == "img" for drawing in reader.named("svg"))


def test_images_are_enlarged_threefold_and_kept_exactly():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    reader = Reader(render_report(ReportData(gallery=[ReportImage(image, "noise")])))
    data = reader.named("img")[0]["src"].split(",", 1)[1]
    shown = np.asarray(Image.open(BytesIO(base64.b64decode(data))))
    assert np.array_equal(shown, np.asarray(image).repeat(3, 0).repeat(3, 1))


def test_verdicts_are_words_with_honest_colours(page):
    spans = re.findall(r'<span class="(reached|near|short)">([^<]+)</span>', page)
    assert ("reached", "✓ reached") in spans  # 0.97, from 0.96, against 0.95
    assert ("short", "✗ short") in spans  # 31 dB, to 32, against 33.5
    assert ("near", "≈ reached, not certain") in spans  # SSIM 0.955, from 0.94, against 0.95
    assert ("short", "✗ wrong") in spans and ("reached", "✓ right") in spans


def test_an_empty_report_is_a_page_and_parts_left_out_are_not_named():
    reader = Reader(render_report(ReportData()))
    assert not reader.open and not reader.named("section") and not reader.named("nav")


def test_it_is_written_whole_or_not_at_all(tmp_path):
    write_report(tmp_path / "new" / "report.html", ReportData(title="x"))
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["report.html"]
    with pytest.raises(InputError, match="cannot write"):
        write_report(tmp_path / "new" / "report.html" / "x.html", ReportData())


def test_templates_escape_what_is_not_markup():
    image = picture()
    shown = render_report(ReportData(title=EVIL, gallery=[ReportImage(image, '"x" < y')]))
    assert "<title>&lt;script&gt;" in shown and 'alt="Generated: &#34;x&#34; &lt; y"' in shown
    assert render_template("empty_curve.svg", name=Markup("<b>c</b>")).count("<b>c</b>") == 2


def test_a_value_that_a_template_lacks_is_an_error():
    with pytest.raises(UndefinedError, match="name"):
        render_template("empty_curve.svg")


def points(drawing):
    lines = re.findall(r'points="([^"]+)"', drawing)
    return [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in lines]


def test_a_curve_falls_where_its_values_fall_and_log_makes_an_exponential_straight():
    steps = np.arange(30)
    line = points(charts.curve("loss", steps, np.exp(-steps / 4.0), log=True))[0]
    heights = np.array([y for _, y in line])
    assert np.allclose(np.diff(heights), np.diff(heights)[0], atol=0.11) and np.diff(heights)[0] > 0
    bent = np.array([y for _, y in points(charts.curve("loss", steps, np.exp(-steps / 4.0), log=False))[0]])
    assert np.diff(bent)[0] > 5 * np.diff(bent)[-1]


@pytest.mark.parametrize("values", [[0.0, 1.0, -2.0], [5.0, 5.0, 5.0], [1.0, float("inf"), 2.0]])
def test_odd_curves_are_drawn(values):
    drawing = charts.curve("x", np.arange(3), np.array(values), log=True)
    assert "nan" not in drawing.replace("inf", "nan") and "log scale" not in drawing


def test_long_series_are_thinned_to_their_means():
    steps, values = charts.thin(np.arange(1000), np.arange(1000.0))
    assert len(steps) == charts.MAX_POINTS
    assert np.allclose(steps, values) and values[0] == pytest.approx(2.5)


def test_what_is_long_of_the_origin_is_folded():
    earlier = {"recipe": "shapes", "scores": {f"score {number}": number / 7 for number in range(40)}}
    page = render_report(ReportData(manifest={"recipe": "own", "origin": earlier, "words": ["red"] * 200}))
    open_part, *folded = page.split("<details>")
    assert "<dd>own</dd>" in open_part and "score 39" not in open_part
    assert [part.partition("</summary>")[0] for part in folded] == ["<summary>origin", "<summary>words"]
    assert "score 39" in folded[0] and "<dt>recipe</dt>" in folded[0] and "red, red" in folded[1]
    assert "<details>" not in render_report(ReportData(manifest={"recipe": "own"}))
