"""One vocabulary of budgets: ``--threat``, ``--eps`` and ``--norm`` mean the same in every verb."""

from __future__ import annotations

import inspect
import json
from importlib import import_module
from pathlib import Path

import pytest

from robusthash.apps import cli
from robusthash.apps.commands import audit, options
from robusthash.apps.experiment import assess_run, training_stages
from robusthash.apps.experiment.config import make_config
from robusthash.apps.experiment.threat_options import attack_under, threat_name, threat_on_data
from robusthash.attacks.threat_model import named_threat, threat_on
from robusthash.data import load_data

CONFIG = {
    "name": "tiny",
    "data": {"name": "synthetic", "train": 48, "query": 12, "database": 40},
    "hasher": {"bits": 8, "image": {"name": "small", "width": 4}},
    "training": {"objective": "csq", "epochs": 1, "batch_size": 32},
    "evaluation": {"attacks": [{"name": "hag", "steps": 1}], "batch_size": 8},
    "runtime": {"device": "cpu"},
}
BUDGETED = ("evaluate", "assess", "attack", "questions", "transfer", "poison", "audit", "check", "curves")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    return [
        training_stages.train(make_config(CONFIG, [f"runtime.seed={seed}"]), root).path for seed in (0, 1)
    ]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({}, "img-linf-8"),
        ({"modality": "text"}, "txt-linf-0.05"),
        ({"eps": "4/255"}, "img-linf-4"),
        ({"eps": "0.03"}, "img-linf-7.65"),
        ({"eps": "0.5", "norm": "l2"}, "img-l2-0.5"),
        ({"norm": "l2"}, "img-l2"),
        ({"norm": "linf"}, "img-linf-8"),
        ({"eps": "12", "norm": "l1"}, "img-l1-12"),
        ({"eps": "0.5", "norm": "l2", "modality": "text"}, "txt-l2-0.5"),
        ({"threat": "txt-bow-3"}, "txt-bow-3"),
        ({"threat": "img-linf-4", "eps": "4/255"}, "img-linf-4"),
        ({"threat": "db-insert", "eps": "4/255"}, "db-insert-img-linf-4"),
        ({"threat": "db-perturb"}, "db-perturb"),
    ],
)
def test_three_options_name_one_threat(given: dict[str, str], name: str) -> None:
    assert threat_name(**given) == name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"threat": "img-linf-8", "eps": "4/255"}, r"img-linf-8 is one budget .* another \(img-linf-4\)"),
        ({"threat": "img-linf-8", "norm": "l2"}, "give one of them"),
        ({"threat": "db-insert-img-linf-8", "eps": "4/255"}, "give one of them"),
        ({"norm": "l1"}, "no customary eps"),
        ({"threat": "db-insert", "norm": "l2"}, "no customary eps"),
        ({"eps": "8"}, "write 8/255, not 8"),
        ({"eps": "small"}, "a number such as 8/255"),
        ({"eps": "-8/255"}, "leaves nothing to attack"),
        ({"eps": "0"}, "leaves nothing to attack"),
        ({"eps": "8/0"}, "divides by zero"),
    ],
)
def test_budgets_that_do_not_agree_are_refused(given: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        threat_name(**given)


@pytest.mark.parametrize("eps", ["1/255", "2/255", "8/255", "16/255", "32/255", "0.1"])
def test_a_threat_of_the_shorthand_is_the_one_of_python(eps: str) -> None:
    levels = float(eps.partition("/")[0]) / (255 if "/" in eps else 1)
    ours, direct = named_threat(threat_name(eps=eps)), threat_on("image", levels)
    assert ours.balls["image"].eps == pytest.approx(direct.balls["image"].eps, rel=1e-15)
    assert ours.name == direct.name
    if "/" in eps:
        assert ours == direct


def test_the_customary_l2_budget_comes_from_the_images() -> None:
    data = load_data("synthetic", train=48, query=12, database=40)  # 16 x 16 pixels
    assert threat_on_data("img-l2", data).balls["image"].eps == 0.25


def test_every_verb_with_a_budget_has_the_same_three_options() -> None:
    for verb in BUDGETED:
        module = import_module(f"robusthash.apps.commands.{cli.FILES.get(verb, verb)}")
        parameters = inspect.signature(getattr(module, verb), eval_str=True).parameters
        for name, annotation in (("eps", options.Eps), ("norm", options.Norm), ("threat", options.Threat)):
            if (verb, name) != ("poison", "threat"):  # there it is required
                assert parameters[name].annotation == annotation, (verb, name)


def test_attacks_take_a_budget_by_name() -> None:
    assert attack_under("hag", None, None, None) == "hag"
    assert attack_under("hag", "img-linf-4", None, None) == {"name": "hag", "eps": 4 / 255}
    assert attack_under("{name: pgd, steps: 2}", None, "0.5", "l2") == {
        **{"name": "pgd", "steps": 2, "eps": 0.5},
        "norm": "l2",
    }
    assert attack_under("text-edits", "txt-bow-2", None, None) == {"name": "text-edits", "edits": 2}
    assert attack_under("mainstay", "txt-linf-0.1", None, None)["modality"] == "text"
    with pytest.raises(ValueError, match="has 'eps', and img-linf-4 is asked for"):
        attack_under("{name: hag, eps: 2/255}", "img-linf-4", None, None)
    assert attack_under("token-swaps", "txt-token-1", None, None) == {"name": "token-swaps", "swaps": 1}
    for budget, unit, maker in (
        ("txt-bow-3", "edits", "text-edits"),
        ("txt-token-1", "swaps", "token-swaps"),
    ):
        with pytest.raises(ValueError, match=f"{budget} is a budget of {unit} .* take --attack {maker}"):
            attack_under("mainstay", budget, None, None)
    for nothing in (
        "{name: pgd, steps: 2, eps: 0}",
        "{name: hag, eps: 0/255}",
        "{name: text-edits, edits: 0}",
    ):
        with pytest.raises(ValueError, match=rf"0 of '{nothing}' leaves nothing to attack"):
            attack_under(nothing)


@pytest.mark.parametrize("threat", ["db-insert", "db-perturb"])
def test_a_threat_to_the_database_is_refused_for_an_attack_on_queries(threat: str) -> None:
    with pytest.raises(ValueError, match="robusthash poison"):
        attack_under("hag", threat, None, None)


def test_an_audit_takes_levels_of_255_as_well() -> None:
    budgets = [options.BudgetOptions(*given) for given in ((None, "8"), (None, "8/255"), ())]
    same = [audit._pixel_eps(budget) for budget in budgets]
    assert same == [8 / 255] * 3
    assert audit._pixel_eps(options.BudgetOptions("img-linf-4")) == 4 / 255
    for given, message in [
        (("img-l2-1",), "it has no img-l2-1"),
        ((None, "0.5"), "0.5/255"),
    ]:
        with pytest.raises(ValueError, match=message):
            audit._pixel_eps(options.BudgetOptions(*given))


def test_verbs_measure_under_the_named_budget(call, runs, tmp_path, monkeypatch) -> None:
    threats = []
    monkeypatch.setattr(assess_run, "model_checks", lambda context, threat, **_: threats.append(threat) or ())
    for budget in (
        ("--threat", "img-linf-4"),
        ("--eps", "4/255"),
        ("--threat", "img-linf-4", "--eps", "4/255"),
    ):
        assert call("check", runs[0], *budget)[0] == 0
        code, out, err = call("transfer", *runs, "--queries", 8, "--steps", 1, *budget, "--json")
        assert (code, json.loads(out)["threat"]) == (0, "img-linf-4"), err
        code, out, err = call("attack", runs[0], "hag", *budget, "--out", tmp_path / "x.npz", "--json")
        assert (code, json.loads(out)["setting"]["threat"]) == (0, "img-linf-4"), err
        code, out, err = call("questions", runs[0], "--queries", 4, "--budgets", 2, *budget, "--json")
        assert (code, json.loads(out)["threat"]) == (0, "img-linf-4"), err
        code, out, err = call("assess", runs[0], "--tier", "smoke", "--queries", 8, *budget, "--json")
        assert (code, json.loads(out)["name"]) == (0, "img-linf-4 smoke"), err
    assert {threat.name for threat in threats} == {"img-linf-4"}
    code, out, err = call(
        "poison", runs[0], "--threat", "db-insert", "--eps", "4/255", "--count", 2, "--steps", 2, "--json"
    )
    assert (code, json.loads(out)["threat"]) == (0, "db-insert-img-linf-4"), err
    code, _, err = call("transfer", *runs, "--threat", "txt-bow-3")
    assert code == 1
    assert "does not change images alone" in err
    code, _, err = call("evaluate", runs[0], "--threat", "img-linf-4")
    assert code == 1
    assert "needs --attack" in err


def test_an_attack_that_changes_no_query_is_refused(call, runs) -> None:
    said = "mainstay on text changes texts, and this evaluation searches by images; give an attack on images"
    code, _, err = call("evaluate", runs[0], "--attack", "{name: mainstay, modality: text}")
    assert code == 1
    assert said in err
