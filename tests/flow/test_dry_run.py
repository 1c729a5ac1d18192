"""Dry runs: one step of each part of a recipe, nothing written, and an estimate of the whole."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from robusthash.apps.experiment.config import load_config, make_config
from robusthash.apps.experiment.dry_run import DryRun, Part, dry_run
from robusthash.attacks.pgd import PGD
from tests.flow.conftest import Call

REPO = Path(__file__).resolve().parents[2]
CONFIG: dict[str, Any] = {
    "name": "tiny",
    "data": {"name": "synthetic", "train": 64, "query": 24, "database": 90, "texts": False},
    "hasher": {"bits": 12, "image": {"name": "small", "width": 4}},
    "training": {"objective": "csq", "epochs": 3, "batch_size": 16, "optim": {"hasher": {"lr": 0.05}}},
    "evaluation": {"attacks": [{"name": "pgd", "steps": 10}, {"name": "guided-apgd", "steps": 6}], "batch_size": 8},
    "runtime": {"device": "cpu"},
}  # fmt: skip
ADVERSARIAL = {
    "extends": "tiny.yaml",
    "training": {
        "recipe": "adversarial",
        "outer": "saat",
        "attack": {"name": "mainstay", "steps": 3},
        "init_from": "tiny.yaml",
    },
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    path = tmp_path / "saat.yaml"
    path.write_text(yaml.safe_dump(ADVERSARIAL))
    return path


def part(found: DryRun, name: str) -> Part:
    (one,) = [each for each in found.parts if each.name == name]
    return one


def test_one_step_of_each_part_and_the_whole(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = list[int]()
    search = PGD.__call__

    def counting(self: PGD, *args: Any) -> Any:
        steps.append(self.steps)
        return search(self, *args)

    monkeypatch.setattr(PGD, "__call__", counting)
    found = dry_run(load_config(recipe), recipe.parent)
    assert steps == [
        3,
        1,
    ]  # the inner attack of one step of training, whole, and one step of the evaluation's
    assert found.sizes == {"train": 64, "query": 24, "database": 90}
    training = part(found, "training of saat")
    assert training.timed == "one step of 16"
    assert training.whole == pytest.approx(training.seconds * 3 * 4)  # 3 epochs of 4 batches
    assert part(found, "training of tiny").whole > 0  # trained first
    assert part(found, "pgd").timed == "1 of 10 steps on 8 queries"
    assert part(found, "guided-apgd").timed == "2 of 6 steps on 8 queries"
    assert found.seconds == pytest.approx(sum(each.whole for each in found.parts))
    assert found.weight_bytes > 4 * found.parameters["image"] > 0


def test_smaller_batches_are_scaled_up_and_said(recipe: Path) -> None:
    found = dry_run(load_config(recipe), recipe.parent, batch=4)
    training = part(found, "training of saat")
    assert training.timed == "one step of 4"
    assert training.whole == pytest.approx(training.seconds * 3 * 4 * 16 / 4)
    assert any("at most 4 items, where the recipe has 16 and 8" in note for note in found.notes)
    with pytest.raises(ValueError, match="batch must be at least 2, got 1"):
        dry_run(load_config(recipe), recipe.parent, batch=1)


def test_fits_of_attacks_are_scaled_by_what_they_pass() -> None:
    attacks = [
        {"name": "pros-gan", "epochs": 5, "width": 2, "hidden": 8},
        {"name": "tha", "fit_steps": 200, "hidden": 8},
    ]
    config = make_config({**CONFIG, "evaluation": {"attacks": attacks}})
    found = dry_run(config)
    generator, prototypes = part(found, "fitting pros-gan"), part(found, "fitting tha")
    assert prototypes.whole == pytest.approx(prototypes.seconds * 200 / 20)
    known = int(re.fullmatch(r"one of at most \d+ parts, on (\d+) items", generator.timed)[1])
    assert generator.whole == pytest.approx(generator.seconds * 5 * found.sizes["train"] / known)


def test_asymmetric_training_counts_the_passes_over_its_sample() -> None:
    sections = {"recipe": {"name": "asymmetric", "items": 32, "inner_epochs": 3}, "objective": "adsh"}
    config = make_config({**CONFIG, "training": {**CONFIG["training"], **sections}})
    training = part(dry_run(config), "training of tiny")
    assert training.timed == "one step of 16"
    assert training.whole == pytest.approx(training.seconds * 3 * 6)  # 3 x 32 items in batches of 16


def test_counts_are_those_of_the_net_and_of_a_dry_run_twice(recipe: Path) -> None:
    config = load_config(recipe)
    first, again = (dry_run(config, recipe.parent, batch=4) for _ in range(2))
    wider = make_config({**CONFIG, "hasher": {"bits": 12, "image": {"name": "small", "width": 8}}})
    assert (first.parameters, first.macs) == (again.parameters, again.macs)
    assert dry_run(wider, batch=4).macs["image"] > 2 * first.macs["image"]


def test_nothing_is_written_and_json_has_everything(recipe: Path, call: Call) -> None:
    runs = recipe.parent / "runs"
    before = sorted(recipe.parent.rglob("*"))
    code, out, error = call("run", recipe, "--dry-run", "--runs", runs, "--json")
    assert code == 0, error
    plain = json.loads(out)
    assert plain["seconds"] == pytest.approx(sum(each["whole"] for each in plain["parts"]))
    assert {"parameters", "macs", "peak_bytes", "step_seconds", "notes"} <= set(plain)
    code, out, error = call("run", recipe, "--dry-run", "--runs", runs)
    assert code == 0
    for words in ("multiply-adds of one image", "memory, peak", "training of saat", "1 of 10 steps"):
        assert words in out
    assert sorted(recipe.parent.rglob("*")) == before


def test_data_that_are_not_there(tmp_path: Path, call: Call) -> None:
    recipe = REPO / "recipes" / "cifar10-csq-saah.yaml"
    code, _, error = call("run", recipe, "--dry-run", "--set", f"data.root={tmp_path}", "--batch", "2")
    assert code == 1
    assert "no CIFAR-10 in" in error
    assert "without the data: --miniature" in error
    code, _, error = call("run", recipe, "--dry-run", "--miniature", "--batch", "2")  # the remedy
    assert code == 0, error
    assert "a generated miniature in place of cifar10" in error
    assert "train 8 for 5000" in error


def test_options_of_a_dry_run_alone(recipe: Path, call: Call) -> None:
    code, _, error = call("run", recipe, "--miniature")
    assert (code, "add --dry-run" in error) == (1, True)
    code, _, error = call("run", recipe, "--dry-run", "--resume-from", recipe.parent)
    assert (code, "leave --resume-from or --dry-run out" in error) == (1, True)


@pytest.mark.parametrize(
    ("recipe", "macs"),
    [
        ("saat/tables-3-4/flickr-dph-saat.yaml", 710.2e6),  # AlexNet without its classifier, and the head
        (
            "saah/table-1/flickr-dpsh-saah.yaml",
            753.8e6,
        ),  # with the gate: 784 blocks of 30,976 and two transforms of 3 x 64 x 64
    ],
)
def test_a_recipe_of_each_paper_at_its_true_size(
    recipe: str, macs: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a dry run downloads nothing")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refused)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refused)
    path = REPO / "recipes" / "papers" / recipe
    sets = ["runtime.threads=1", "evaluation.attacks.1.steps=10"]
    found = dry_run(load_config(path, sets), path.parent, miniature=True, batch=2)
    assert found.macs["image"] == pytest.approx(macs, rel=0.01)
    assert found.sizes["train"] == 5_000
    assert any("alexnet with random weights in place of 'hub'" in note for note in found.notes)
    steps = steps_of_two(path)
    training = part(found, f"training of {path.stem}")
    assert training.whole == pytest.approx(training.seconds * steps)


@pytest.mark.parametrize(
    ("recipe", "parameters", "said"),
    [
        # AlexNet, GFNet-Ti, separation, fusion, hash layer; BERT-base with its pooler and a hash layer
        (
            "sfcl/sfcl.yaml",
            {"image": 71.4e6, "text": 109.9e6},
            "transformer with random weights, of the size of",
        ),
        # AlexNet, a linear head and the purifier of width 64; texts of 1,386 words
        ("drfgd/daph-drfgd.yaml", {"image": 61.7e6, "text": 9.9e6}, "daph is trained first"),
        # AlexNet -> 512 -> K, words -> 4096 -> 512 -> K
        ("dsarh/dsarh.yaml", {"image": 59.1e6, "text": 7.8e6}, "in place of 'weights/alexnet-robust.pth'"),
    ],
)
def test_image_text_recipes_of_the_papers_at_their_true_size(
    recipe: str, parameters: dict[str, float], said: str
) -> None:
    path = REPO / "recipes" / "papers" / recipe
    one = ["runtime.threads=1", "evaluation.directions=[I2T]", "evaluation.attacks=[{name: hag, steps: 2}]"]
    config = load_config(path, [*one, "evaluation.oblivious=[]", "evaluation.identity=[]"])
    found = dry_run(config, path.parent, miniature=True, batch=2)
    assert found.parameters == pytest.approx(parameters, rel=0.01)
    assert (found.sizes["train"], found.sizes["query"]) == (5_000, 1_000 if "dsarh" in recipe else 2_000)
    assert any(said in note for note in found.notes)


def steps_of_two(path: Path) -> float:
    """Steps of two items that cost as much as the training of a recipe with 5,000 items."""
    training = load_config(path).training
    batches = -(-5_000 // training.batch_size)
    return training.epochs * batches * training.batch_size / 2
