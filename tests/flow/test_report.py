"""The report of one run: the numbers of metrics.json, escaped text, one file without outside references."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from jinja2 import UndefinedError

from robusthash.apps.experiment import evaluation_stages, training_stages
from robusthash.apps.experiment.config import make_config
from robusthash.apps.experiment.run_directory import Run, RunError
from robusthash.apps.reports import run_report
from robusthash.apps.reports.charts import UNIT, Chart, ChartAxis, Dot, IntervalChart, LineChart, Series, draw
from robusthash.apps.reports.pages import environment, png
from robusthash.apps.reports.run_report import run_page, write_report

VOID = {"img", "meta", "circle", "line", "polyline", "polygon", "br"}


class Reader(HTMLParser):
    """Collects tags and text, and notices tags that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.wrong: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in VOID:
            self.wrong.append(f"{tag} is not closed")
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> closes something else")

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def names(self) -> set[str]:
        return {name for name, _ in self.tags}


def check_self_contained(text: str) -> Reader:
    """Well nested, nothing that runs, nothing fetched."""
    page = Reader(text)
    assert not page.wrong
    assert not page.open
    assert page.names().isdisjoint({"script", "iframe", "object", "embed", "link", "base", "form"})
    for name, attributes in page.tags:
        for key, value in attributes.items():
            assert not key.startswith("on"), f"{name} has a handler {key}"
            if key in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                assert str(value).startswith(("data:image/png;base64,", "#")), f"{name} {key}={value!r:.40}"
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert "url(" not in text
    return page


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A small evaluated run on the generated data, with an untargeted and a targeted attack."""
    config = make_config(
        {
            "name": "tiny",
            "data": {"name": "synthetic", "train": 64, "query": 12, "database": 256},
            "hasher": {"bits": 8, "image": {"name": "small", "width": 4}},
            "training": {
                "objective": "csq",
                "epochs": 2,
                "batch_size": 32,
                "optim": {"hasher": {"lr": 0.05}},
            },
            "evaluation": {
                "attacks": [
                    {"name": "mainstay", "steps": 2, "step_size": "8/255"},
                    {"name": "dhta", "steps": 2, "step_size": "8/255"},
                ]
            },
            "runtime": {"device": "cpu"},
        }
    )
    made = training_stages.train(config, tmp_path_factory.mktemp("runs"))
    evaluation_stages.evaluate(made)
    return made


def test_the_report_is_one_well_formed_file_with_the_numbers_of_metrics_json(run: Run) -> None:
    path = write_report(run)
    assert path == run.path / "report.html"
    page = check_self_contained(path.read_text(encoding="utf-8"))
    written = {
        entry["name"]: entry for entry in json.loads((run.path / "metrics.json").read_text())["results"]
    }
    assert set(written) == {"clean", "mainstay", "dhta", "worst"}
    expected = [
        written["clean"]["values"]["MAP"],
        written["clean"]["reference"]["chance"],
        written["mainstay"]["values"]["MAP"],
        written["dhta"]["values"]["t-MAP"],
        written["worst"]["values"]["wMAP"],
        written["worst"]["values"]["HRS"],
        *written["worst"]["interval"]["wMAP"],
    ]
    for value in expected:
        assert f"{value:.3f}" in page.words
    assert "svg" not in page.words  # charts are drawn, not printed as text
    assert {"svg", "polyline", "circle", "table", "figcaption"} <= page.names()


def test_every_result_stands_in_its_row_with_all_its_numbers(run: Run) -> None:
    """No number of a result may get lost between metrics.json and the page, or end in another row."""
    page = write_report(run).read_text(encoding="utf-8")
    rows = [re.sub(r"<[^>]*>", " ", row) for row in re.findall(r"<tr.*?</tr>", page, re.DOTALL)]
    for entry in json.loads((run.path / "metrics.json").read_text())["results"]:
        name, values, cost = entry["name"], entry["values"], entry["cost"]
        prefix = "w" if name == "worst" else ""
        measures = [key for key in (f"{prefix}MAP", f"{prefix}MAP/8bit", "t-MAP") if key in values]
        numbers = [f"{number:.3f}" for key in measures for number in (values[key], *entry["interval"][key])]
        numbers += [f"{values[key]:.1f}" for key in ("flips",) if key in values]
        numbers += [f"{cost['forward']:,} + {cost['backward']:,}"] * bool(cost["forward"])
        numbers += [f"{values[key]:.0%}" for key in ("ASR", "t-ASR") if key in values][:1]
        result, *perturbation = [row for row in rows if row.split()[0] == name]
        assert len(measures) >= 1
        assert len(perturbation) == bool(entry["perceptibility"])
        for number in numbers:
            assert number in result, f"{name}: {number}"
        for row in perturbation:
            assert f"{entry['perceptibility']['linf/max'] * 255:.2f}" in row
            assert f"{entry['perceptibility']['ssim/mean']:.3f}" in row


def test_every_chart_has_a_title_a_description_and_a_legend(run: Run) -> None:
    page = Reader(write_report(run).read_text(encoding="utf-8"))
    images = [
        attributes for name, attributes in page.tags if name == "svg" and attributes.get("role") == "img"
    ]
    assert (
        len(images) == 6
    )  # MAP by attack, loss terms; precision over recall and over N, untargeted and of targets
    for title in ("Precision and recall", "Precision of the first N"):
        assert (
            page.text.count(title) == page.text.count(f"{title} of the target labels") == 2
        )  # title, figure
    assert all(len(attributes["aria-label"]) > 20 for attributes in images)
    assert sum(name == "desc" for name, _ in page.tags) == len(images)
    assert sum(a.get("class") == "legend" for _, a in page.tags) == len(images)


def test_the_same_files_give_the_same_report(run: Run) -> None:
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_hostile_names_cannot_break_out(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = '</title></code><script>alert("x")</script><img src=x onerror=alert(1)>'
    results = dict(run.evaluated())
    results[hostile] = results.pop("mainstay")
    card = {**run.card(), "name": hostile, "objective": {"name": hostile}}
    log = [
        {"epoch": 0, "lr": 0.1, "seconds": 1.0, hostile: 0.5},
        {"epoch": 1, "lr": 0.1, "seconds": 1.0, hostile: 0.4},
    ]
    monkeypatch.setattr(Run, "evaluated", lambda _: results)
    monkeypatch.setattr(Run, "card", lambda _: card)
    monkeypatch.setattr(Run, "lines", lambda _: log)
    monkeypatch.setattr(run_report, "command_of", lambda _: f"robusthash run '{hostile}'")
    page = check_self_contained(run_page(run))
    assert page.words.count('<script>alert("x")</script>') >= 4  # title, row, legend, command: as text


def test_a_report_without_attacks_claims_no_robustness(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    results = {"clean": run.evaluated()["clean"]}
    monkeypatch.setattr(Run, "evaluated", lambda _: results)
    page = check_self_contained(run_page(run))
    assert "nothing is said about robustness" in page.words
    assert "worst case" not in page.words


def test_a_run_that_was_not_evaluated_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has not been evaluated; run 'robusthash evaluate"):
        Run(tmp_path, run.config).evaluated()
    with pytest.raises(RunError, match="no trained model"):
        write_report(Run(tmp_path, run.config))


# ---------------------------------------------------------------------------------------------- the pieces


def svg(chart: Chart) -> str:
    return environment().get_template("charts.html.j2").module.chart(chart)


def test_templates_escape_text_and_attributes_and_refuse_unknown_names() -> None:
    row = environment().get_template("macros.html.j2").module.row("a < b & c", ['x"', 0.5, None], True)
    assert str(row).strip() == (
        '<tr class="marked"><th scope="row">a &lt; b &amp; c</th><td>x&#34;</td><td>0.5</td><td>None</td></tr>'
    )
    with pytest.raises(UndefinedError, match="title"):
        environment().get_template("base.html.j2").render()


def test_a_picture_holds_its_own_pixels() -> None:
    import base64
    import io

    import numpy as np
    from PIL import Image

    image = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    encoded = png(image)
    assert encoded.source.startswith("data:image/png;base64,")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded.source.partition(",")[2]))))
    assert np.array_equal(pixels, (image * 255).round().permute(1, 2, 0).numpy().astype(np.uint8))
    element = environment().get_template("macros.html.j2").module.picture(image, "noise & more")
    assert 'alt="noise &amp; more" width="7" height="5"' in element


def test_lines_are_drawn_where_their_values_are() -> None:
    series = [Series("s", [0, 16], [0.0, 1.0])]
    chart = svg(LineChart(series=series, x=ChartAxis("x", [0, 8, 16]), y=ChartAxis("y", UNIT), title="t"))
    found = re.search(r'points="([\d.]+),([\d.]+) ([\d.]+),([\d.]+)"', chart)
    assert found is not None
    left, low, right, high = map(float, found.groups())
    grid = [float(y) for y in re.findall(r'y1="([\d.]+)" y2="[\d.]+" class="grid"', chart)]
    assert (low, high) == (max(grid), min(grid))
    ticks = [
        float(x) for x in re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="middle">\d+</text>', chart)
    ]
    assert (left, right) == (min(ticks), max(ticks))


INTERVALS = IntervalChart(
    rows=[("clean", [Dot("one", 0.9, 0.85, 0.95), Dot("two", 0.5, 0.4, 0.6)])],
    tones={"one": "a", "two": "b"},
    x=ChartAxis("MAP", UNIT),
    reference=("chance", 0.1),
    title="t",
)


def test_dots_lie_inside_their_intervals() -> None:
    chart = svg(INTERVALS)
    whiskers = re.findall(
        r'<line x1="([\d.]+)" x2="([\d.]+)" y1="[\d.]+" y2="[\d.]+" class="whisker"/>', chart
    )[:2]
    centres = re.findall(r'<circle cx="([\d.]+)"', chart)[:2]
    for (low, high), centre in zip(whiskers, centres, strict=True):
        assert float(low) < float(centre) < float(high)
    assert float(centres[0]) > float(centres[1])


def test_papers_draw_the_same_description() -> None:
    pytest.importorskip("matplotlib", reason="needs the extra 'figures' (pip install robusthash[figures])")
    (axes,) = draw(INTERVALS).axes
    assert [bar.get_height() for bar in axes.patches] == [0.9, 0.5]
    with pytest.raises(ValueError, match="needs at least one value"):
        draw(LineChart(series=[], x=ChartAxis("x"), y=ChartAxis("y")))


def test_series_with_parts_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="'s' has parts of different length"):
        Series("s", [0, 1], [0.0], "a")
    with pytest.raises(ValueError, match="has no points"):
        Series("s", [], [], "a")
