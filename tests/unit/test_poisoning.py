"""Any registered attack on the images of a database: direction T2I of an image-text run, and what is
refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from robusthash.apps.experiment.config import make_config
from robusthash.apps.experiment.evaluation_stages import context_of
from robusthash.apps.experiment.model_stages import load_hasher, load_victim, read_data
from robusthash.apps.experiment.poison_run import poison
from robusthash.apps.experiment.run_directory import Run
from robusthash.apps.experiment.training_stages import train
from robusthash.core.registry import build
from robusthash.core.runtime import silent
from robusthash.evaluation.evaluate import score_clean
from robusthash.metrics.results import load_results

RAW: dict[str, Any] = {
    "name": "both",
    "data": {"name": "synthetic", "size": 12, "train": 60, "query": 16, "database": 48},
    "hasher": {
        "bits": 8,
        "image": {"name": "small", "width": 4, "grid": 1},
        "text": {"name": "mlp", "widths": [32]},
    },
    "training": {
        "objective": "dsarh",
        "optim": {"hasher": {"name": "adam", "lr": 1e-2, "weight_decay": 0}},
        "epochs": 15,
        "batch_size": 20,
    },
    "runtime": {"device": "cpu"},
}
STRONG = {"name": "dsarh", "eps": 0.3, "steps": 10, "step_size": 0.06}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(make_config(RAW), tmp_path_factory.mktemp("runs"))


def test_dsarh_attacks_the_images_that_texts_search(run: Run) -> None:
    """Queries are clean texts; the more of the database is attacked, the lower their MAP."""
    whole, path = poison(run, "db-perturb", attack=STRONG, share=1.0, direction="T2I")
    part, _ = poison(run, "db-perturb", attack=STRONG, share=0.25, direction="T2I")
    clean = whole.reference["clean"]
    assert whole["MAP"] < part["MAP"] < clean
    assert whole["MAP"] < clean - 0.1
    assert whole.values["items"] == 48
    assert whole.setting.direction == "T2I"
    assert whole.setting.attacks == ("dsarh",)
    assert whole.setting.threat == "db-perturb-img-linf-76.5"
    assert whole.perceptibility["linf/max"] == pytest.approx(0.3, abs=1e-6)
    assert path.name == "poison-db-perturb-img-linf-76.5-dsarh-T2I.json"
    assert load_results(path)[0].values["MAP"] == part["MAP"], "the later one of this name"
    victim = load_hasher(run)
    context = context_of(run, victim, read_data(run.config), silent, "T2I")
    assert score_clean(context)["MAP"] == clean


def test_the_attacker_of_items_knows_what_texts_look_like(run: Run) -> None:
    """Across modalities the known codes are those of both, of the training set at W1 and of the database at
    W2."""
    victim, objective = load_victim(run)
    for direction, pairs in (("T2I", True), ("I2I", False)):
        context = context_of(run, victim, read_data(run.config), silent, direction)
        for knowledge, items in (("W1", 60), ("W2", 48)):
            attack = build("attack", {"name": "dsarh", "knowledge": knowledge}, objective=objective)
            known = context.known(attack, pairs)
            assert known is not None
            assert set(known.codes) == ({"image", "text"} if pairs else {"image"})
            assert all(len(codes) == items for codes in known.codes.values())
    of_text = {**STRONG, "codes": "text"}
    assert poison(run, "db-perturb", attack=of_text, direction="T2I")[0]["item flips"] > 0
    with pytest.raises(ValueError, match="no text codes are known"):
        poison(run, "db-perturb", attack=of_text, direction="I2I")


@pytest.mark.parametrize("name", ["mainstay", "pgd", "hag", "sdha", "cgat", "dsarh", "drfgd", "guided-apgd"])
def test_attacks_by_name(run: Run, name: str) -> None:
    result, path = poison(run, "db-perturb", attack={"name": name, "steps": 2})
    assert result.setting.threat == "db-perturb-img-linf-8"
    assert result.setting.attacks == (build("attack", name, objective=load_victim(run)[1]).name,)
    assert result.perceptibility["linf/max"] <= 8 / 255 + 1e-6
    assert path.name == f"poison-db-perturb-img-linf-8-{result.setting.attacks[0]}.json"


def test_a_bound_in_the_name_of_the_threat(run: Run) -> None:
    result, _ = poison(
        run, "db-perturb-img-linf-4", attack={"name": "dsarh", "knowledge": "W2"}, direction="T2I"
    )
    assert result.setting.threat == "db-perturb-img-linf-4"
    assert result.setting.budget.endswith("W2")
    assert result.perceptibility["linf/max"] <= 4 / 255 + 1e-6


def test_the_usual_attack_is_as_it_was(run: Run) -> None:
    result, path = poison(run, "db-perturb", steps=2)
    assert result.setting.attacks == ("guided-apgd",)
    assert path.name == "poison-db-perturb-img-linf-8.json"
    named, other = poison(run, "db-perturb", attack={"name": "guided-apgd", "steps": 2})
    assert other.name == "poison-db-perturb-img-linf-8-guided-apgd.json"
    assert torch.equal(named.per_query["MAP"], result.per_query["MAP"])


@pytest.mark.parametrize(
    ("threat", "options", "said"),
    [
        ("db-insert", {"attack": "dsarh"}, "an attack can be chosen for db-perturb"),
        ("db-perturb", {"attack": "dsarh", "steps": 5}, "give them with the attack"),
        ("db-perturb-img-linf-4", {"attack": {"name": "dsarh", "eps": 0.1}}, "give one of them"),
        ("db-perturb", {"attack": {"name": "dsarh", "modality": "text"}}, r"changes \['text'\]"),
        ("db-perturb", {"attack": "dhta"}, "is targeted"),
    ],
)
def test_what_does_not_fit_is_refused(run: Run, threat: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        poison(run, threat, **options)
