"""The suite section of a run's report: the numbers of assess.json, and doubts that cannot be missed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from robusthash.apps.experiment import assess_run as assessing
from robusthash.apps.experiment import evaluation_stages, training_stages
from robusthash.apps.experiment.config import make_config
from robusthash.apps.experiment.run_directory import Run
from robusthash.apps.reports.pages import environment
from robusthash.apps.reports.run_report import run_page, suite_data, write_report
from robusthash.metrics.results import EvalResult, Flag
from tests.flow.test_report import Reader, check_self_contained

CONFIG = {
    "name": "tiny",
    "data": {"name": "synthetic", "train": 64, "query": 24, "database": 64},
    "hasher": {"bits": 12, "image": {"name": "small", "width": 4}},
    "training": {"objective": "csq", "epochs": 2, "batch_size": 32, "optim": {"hasher": {"lr": 0.05}}},
    "runtime": {"device": "cpu"},
}
RED = Flag("F4", 0.031, 0.005, "red", "masked gradients: add an adaptive line")
AMBER = Flag("F7", float("inf"), 0.0, "amber", "not run: no curve over eps was run")
PASS = Flag("F1", 0.0, 0.0, "pass", "randomised: attack with EOT lines")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An evaluated run, assessed by a small suite with a curve."""
    made = training_stages.train(make_config(CONFIG), tmp_path_factory.mktemp("runs"))
    evaluation_stages.evaluate(made)
    return made


@pytest.fixture(scope="module")
def result(run: Run) -> EvalResult:
    found = assessing.assess(run, "smoke", curve=True, stored=False)
    assert found is not None
    return found


def page_of(run: Run, *suites: EvalResult) -> Reader:
    return check_self_contained(run_page(run, suites))


def section_of(suite: EvalResult) -> Reader:
    """The section of one suite alone."""
    return Reader(environment().get_template("suite_section.html.j2").module.section(suite_data(suite)))


def badges(page: Reader) -> int:
    return page.words.count("UNRELIABLE")


def test_a_run_that_was_not_assessed_has_no_such_section(run: Run) -> None:
    page = check_self_contained(write_report(run).read_text(encoding="utf-8"))
    assert "Suite:" not in page.words
    assert "suite" not in {attributes.get("class") for _, attributes in page.tags}
    assert badges(page) == 0


def test_the_section_holds_the_numbers_of_the_file(run: Run) -> None:
    found = assessing.assess(run, "smoke")
    assert found is not None
    try:
        page = check_self_contained(write_report(run).read_text(encoding="utf-8"))
    finally:
        (run.path / "assess.json").unlink()
    assert "Suite: img-linf-8 smoke" in page.words
    line, reference = found.attacks["guided"], found.reference
    numbers = [found["wMAP"], found["HRS"], reference["clean"], reference["chance"], *found.interval["wMAP"]]
    for value in [*numbers, line["MAP"]]:
        assert f"{value:.3f}" in page.words
    for value in (f"{line['completeness']:.0%}", f"{line['ASR']:.0%}", f"{line['seconds']:.1f}"):
        assert value in page.words
    assert "Not checked" in page.words
    assert badges(page) == 0


def test_a_red_flag_is_at_the_top_of_page_and_section_and_beside_the_number(
    run: Run, result: EvalResult
) -> None:
    page = page_of(run, replace(result, flags=(PASS, RED, AMBER)))
    alarms = [(name, attributes) for name, attributes in page.tags if attributes.get("class") == "alarm"]
    assert len(alarms) == 4, "page, section, headline number, and the check itself"
    assert badges(page) == 4, "the fourth in the chart"
    text = "".join(page.text)
    start = text.index("Suite: img-linf-8 smoke")
    assert text.index("A red flag stands against: img-linf-8 smoke") < start
    assert text[start:].startswith("Suite: img-linf-8 smoke UNRELIABLE")
    assert f"{result['wMAP']:.3f}UNRELIABLE" in text
    assert text.index("prove nothing until") < text.index(f"{result['wMAP']:.3f}UNRELIABLE")
    assert text.count(RED.remedy) == 2
    assert text.index("not run: no curve") > text.rindex(RED.remedy), "red before amber"
    assert PASS.remedy not in text, "what found nothing needs no remedy"
    assert "1 of 3 checks found nothing" in text


def test_without_a_red_flag_nothing_is_marked(run: Run, result: EvalResult) -> None:
    page = page_of(run, replace(result, flags=(PASS, AMBER)))
    assert badges(page) == 0
    assert "Checks: F7 amber." in page.words
    assert "Checks: no flag." in page_of(run, replace(result, flags=(PASS,))).words


def test_published_attacks_are_reported_as_no_evidence(run: Run, result: EvalResult) -> None:
    setting = replace(result.setting, budget="suite paper, 1 lines", tier="paper")
    paper = replace(result, name="img-linf-8 paper", setting=setting, curves={})
    page = page_of(run, paper, result)
    assert page.words.count("no evidence of robustness") == 1
    assert page.words.index("Suite: img-linf-8 paper") > page.words.index("Suite: img-linf-8 smoke")


def test_attacks_are_grouped_by_what_they_know(result: EvalResult) -> None:
    own = result.attacks["guided"]
    asks = {**own, "oracle": 1000.0, "backward": 0.0}
    lines = {
        "guided": own,
        "gate-frozen": own,
        "refined guided": own,
        "transfer other": own,
        "square, codes": asks,
        "corner noise": asks,
        "guided-targeted": {"t-MAP": 0.42, "seconds": 1.0},
    }
    setting = replace(result.setting, attacks=tuple(name for name in lines if name != "gate-frozen"))
    values = {**result.values, "gain": 0.1, "collateral MAP": 0.3}
    reference = {**result.reference, "t-clean": 0.2}
    made = replace(result, attacks=lines, setting=setting, values=values, reference=reference)
    words = section_of(made).words
    rows = ["white-box guided", "adaptive gate-frozen", "refined refined guided", "transfer transfer other"]
    places = [words.index(row) for row in [*rows, "black-box square, codes", "noise corner noise"]]
    assert places == sorted(places)
    assert "0.420" in words[words.index("Targeted attacks") :]


def test_the_curve_is_drawn_where_there_is_one(result: EvalResult) -> None:
    with_curve = section_of(result)
    assert "wMAP over eps" in with_curve.words
    assert "eps, in 1/255" in with_curve.words
    assert any(name == "polygon" for name, _ in with_curve.tags), "the band of its interval"
    assert "over eps" not in section_of(replace(result, curves={})).words
    raw = {"wMAP/eps": {"eps": torch.tensor([0.0, 0.5]), "wMAP": torch.tensor([0.6, 0.4])}}
    ends = {**result.interval, "wMAP eps 0": (0.5, 0.7), "wMAP eps 0.5": (0.3, 0.5)}
    setting = replace(result.setting, threat="img-l2-0.5")
    other = section_of(replace(result, curves=raw, interval=ends, setting=setting))
    assert "in 1/255" not in other.words


def test_a_red_check_of_the_model_is_seen_before_any_number(run: Run) -> None:
    red = Flag("F2", 1.0, 0.01, "red", "cut graph")
    page = check_self_contained(run_page(run, checked=[red]))
    assert badges(page) == 1
    assert "every number of this model (F2)" in page.words
