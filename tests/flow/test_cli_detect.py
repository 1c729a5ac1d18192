"""``robusthash detect`` on a run of the small generated world: the table, Python's numbers, a kept copy,
refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from robusthash.apps.experiment import evaluation_stages, training_stages
from robusthash.apps.experiment.config import make_config
from robusthash.apps.experiment.detect_run import detection
from robusthash.apps.experiment.results_copy import keep
from robusthash.apps.experiment.run_directory import Run, load_run

MAINSTAY = {"name": "mainstay", "steps": 2, "step_size": "8/255", "slope": "one"}
CONFIG = {
    "name": "tiny",
    "data": {"name": "synthetic", "train": 64, "query": 40, "database": 60},
    "hasher": {"bits": 12, "image": {"name": "small", "width": 4}, "text": {"name": "mlp", "widths": [16]}},
    "training": {"objective": "csq", "epochs": 4, "batch_size": 32, "optim": {"hasher": {"lr": 0.05}}},
    "evaluation": {"attacks": [MAINSTAY, {"name": "dhta", "steps": 2}], "queries": 3},
    "runtime": {"device": "cpu", "threads": 1},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = training_stages.train(make_config(CONFIG), tmp_path_factory.mktemp("runs"))
    evaluation_stages.evaluate(run)
    return run


def test_attacks_of_the_recipe_are_judged_and_the_copy_shows_the_same(call, run, tmp_path):
    asked = ("--queries", 40, "--false-alarms", 0.2, "--weight", 0.1)
    code, out, err = call("detect", run.path, *asked, "--json")
    assert code == 0, err
    (result,) = json.loads(out).values()
    assert result["queries"] == 40, "the 3 queries of the recipe are not meant"
    rows = [(row["attack"], row["attacker"], row["measure"][:2]) for row in result["attacks"]]
    attackers = ("oblivious", "adaptive", "worst")
    assert rows == [
        *(("mainstay (slope one)", attacker, "MA") for attacker in attackers),
        *(("dhta", attacker, "t-") for attacker in attackers),
    ]
    assert all(0 <= row["caught"] <= 1 for row in result["attacks"])
    again, path = detection(run, None, 0.2, [0.1], 40)
    assert json.loads(json.dumps(again)) == result
    copy = keep(run, tmp_path).path
    assert (copy / path.name).is_file()
    code, out, _ = call("detect", copy, "--markdown")
    assert code == 0
    assert out.count("\n") == 2 + len(rows)
    assert f"| {result['attacks'][0]['caught']:.3f} |" in out
    with pytest.raises(ValueError, match=r"without detection-T2I\.json"):
        detection(load_run(copy), direction="T2I")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "takes 29 clean queries"),
        (("--queries", 40, "--false-alarms", 0), "above 0 and below 1"),
        (("--queries", 40, "--false-alarms", 0.2, "--weight", 0), "positive"),
        (
            ("--queries", 40, "--direction", "T2I"),
            "give an attack on texts, as --attack '{name: mainstay, mod",
        ),
    ],
)
def test_what_cannot_be_judged_is_refused_in_a_line(call, run: Run, options: tuple, said: str) -> None:
    code, _, err = call("detect", run.path, *options)
    assert code == 1
    last = err.strip().splitlines()[-1]
    assert last.startswith("error:")
    assert any(part in last for part in said.split("|"))


def test_a_text_side_has_its_own_file(call, run: Run) -> None:
    attack = "{name: mainstay, modality: text, steps: 2, step_size: 0.02}"
    asked = ("--direction", "T2I", "--queries", 40, "--false-alarms", 0.2, "--weight", 0.1)
    code, out, err = call("detect", run.path, *asked, "--attack", attack)
    assert code == 0, err
    assert Path(out.splitlines()[-1]) == run.path / "detection-T2I.json"
