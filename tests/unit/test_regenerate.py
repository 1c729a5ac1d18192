"""The recipe that trains purifiers: a hasher that stands still, groups, ablations, resuming, a whole run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    Interrupted,
    MemoryLog,
    assert_same_state,
    make_data,
    small_hasher,
    state_of,
    train_config,
    trained_hasher,
)

from robusthash.apps.experiment import evaluation_stages, model_stages, training_stages
from robusthash.apps.experiment.config import ConfigError, make_config
from robusthash.apps.experiment.run_directory import RunError, load_run
from robusthash.apps.reports.run_report import load_branches, save_branches, write_report
from robusthash.attacks import dhta
from robusthash.attacks.drfgd import drfgd
from robusthash.core.registry import build
from robusthash.core.runtime import Draws
from robusthash.core.types import Goal
from robusthash.data import RetrievalData
from robusthash.defenses.drfgd import Regenerate
from robusthash.models.encoding import encode_split
from robusthash.models.hasher import Hasher, build_hasher, purified
from robusthash.models.purifier import ProxyBackward
from robusthash.objectives import DPSH
from robusthash.training import HashingRecipe, OptimConfig, Schedule, TrainConfig, fit
from robusthash.training.recipe import Moment

IMAGE = {"image": {"name": "drfgd-image", "width": 4}}
BOTH: dict[str, Any] = {**IMAGE, "text": {"name": "drfgd-text", "hidden": 16}}
TEXT_ATTACK = {"name": "drfgd", "modality": "text", "steps": 2}
TERMS = ["divergence", "classification", "discrimination", "alignment", "reconstruction"]


@pytest.fixture(scope="module")
def data() -> RetrievalData:
    return make_data(multi=True)


@pytest.fixture(scope="module")
def warm(data: RetrievalData) -> Hasher:
    return trained_hasher(data)


@pytest.fixture(scope="module")
def paired() -> tuple[RetrievalData, Hasher]:
    """Images with texts, and a hasher of both that has learned a little."""
    data = build("data", {"name": "synthetic", "train": 48, "query": 8, "database": 32})
    image, text = {"name": "small", "width": 4, "grid": 1}, {"name": "mlp", "widths": [16]}
    hasher = build_hasher(bits=8, image=image, text=text, vocabulary=data.vocabulary)
    fit(HashingRecipe(hasher, DPSH()), data, train_config(3))
    return data, hasher


def config(epochs: int = 1, lr: float = 2e-3, **options: Any) -> TrainConfig:
    optim = {name: OptimConfig("adam", lr, momentum=0.5, weight_decay=0.0) for name in ("purifier", "critic")}
    return TrainConfig(
        epochs=epochs, batch_size=16, optim=optim, schedule=Schedule("constant"), device="cpu", **options
    )


def recipe(warm: Hasher, **options: Any) -> Regenerate:
    return Regenerate(purified(copy.deepcopy(warm), IMAGE, "query"), DPSH(), drfgd(steps=2), **options)


def one_step(made: Regenerate, data: RetrievalData) -> dict[str, dict[str, float]]:
    made.setup(data, 0, 16)
    batch = data.train.batch(torch.arange(16)).only(made.hasher.modalities)
    groups = made.step(batch, Moment(0, 0.0, Draws(0)))
    return {group: {name: float(term.detach()) for name, term in terms.items()} for group, terms in groups}


@pytest.mark.parametrize("inner", ["published", "through"])
def test_the_hasher_is_bit_identical_after_training_and_the_purifier_is_not(
    inner: Any, warm: Hasher, data: RetrievalData
) -> None:
    made = recipe(warm, inner=inner)
    bare = made.hasher.bare()
    bare.train()  # batch statistics would move in this mode
    before, purifier = state_of(bare), copy.deepcopy(made.hasher.purifiers.state_dict())
    made.setup(data, 0, 16)
    for group, terms in made.step(data.train.batch(torch.arange(16)), Moment(0, 0.0, Draws(0))):
        torch.stack(list(terms.values())).sum().backward()
        assert_same_state(before, state_of(bare))  # no mode, no flag, no gradient either
        assert group in ("purifier", "critic")
    fit(made, data, config())
    for name, value in bare.state_dict().items():
        assert torch.equal(value, before["state"][name]), name
    assert any(
        not torch.equal(value, purifier[name]) for name, value in made.hasher.purifiers.state_dict().items()
    )
    assert made.hasher.declared == made.hasher.spec["declared"] == "purifier"


def test_what_is_made_from_attacked_images_comes_nearer_to_the_relevant_codes(
    warm: Hasher, data: RetrievalData
) -> None:
    lines = fit(recipe(warm, reconstruction=1.0, discrimination=0.0), data, config(6, 5e-3))
    assert lines[-1]["image alignment"] < 0.9 * lines[0]["image alignment"]
    assert "image critic" not in lines[0]


def test_images_and_texts_are_trained_together(paired: tuple[RetrievalData, Hasher]) -> None:
    data, hasher = paired
    whole = purified(copy.deepcopy(hasher), BOTH, "query")
    before = copy.deepcopy(whole.state_dict())
    (line,) = fit(Regenerate(whole, DPSH(), drfgd(steps=2), text_attack=TEXT_ATTACK), data, config())
    named = {f"{modality} {term}" for modality in ("image", "text") for term in [*TERMS, "critic"]}
    assert named == set(line) - {"epoch", "lr", "seconds"}
    for name, value in whole.state_dict().items():
        if not name.startswith("purifiers"):
            assert torch.equal(value, before[name]), name
    for modality in ("image", "text"):
        moved = [n for n, v in whole.state_dict().items() if not torch.equal(v, before[n])]
        assert any(name.startswith(f"purifiers.{modality}") for name in moved)


def test_texts_alone_may_be_purified(paired: tuple[RetrievalData, Hasher]) -> None:
    data, hasher = paired
    whole = purified(copy.deepcopy(hasher), {"text": BOTH["text"]}, "query")
    found = one_step(Regenerate(whole, DPSH(), drfgd(steps=2, modality="text")), data)
    assert set(found["purifier"]) == {f"text {term}" for term in TERMS}


def attacked_by(made: Regenerate, victim: Hasher, data: RetrievalData) -> dict[str, Any]:
    """What the inner attacks of ``made`` find on ``victim`` for the first 16 items."""
    batch, found = data.train.batch(torch.arange(16)), {}
    for attack in made.attacks:
        goal, reference = Goal(batch.labels, -1), made.memory.reference()
        found |= attack.perturb(victim, batch, goal, reference, draws=Draws(0)).inputs
    return {name: value.detach() for name, value in found.items()}


@pytest.mark.parametrize("inner", ["published", "through"])
def test_the_inner_attack_is_taken_on_the_bare_hasher_or_through_the_purifiers(
    inner: Any, paired: tuple[RetrievalData, Hasher]
) -> None:
    """L_Rec of x and of what the attack finds on either, computed apart, for purifiers that change their
    inputs."""
    data, hasher = paired
    whole = purified(copy.deepcopy(hasher), BOTH, "query")
    for modality in ("image", "text"):
        torch.nn.init.normal_(
            whole.purifiers[modality].last.weight, std=0.2, generator=torch.Generator().manual_seed(4)
        )
    made = Regenerate(whole, DPSH(), drfgd(steps=3), text_attack=TEXT_ATTACK, inner=inner, reconstruction=1.0)
    losses = one_step(made, data)["purifier"]
    found = {"published": attacked_by(made, whole.bare(), data), "through": attacked_by(made, whole, data)}
    batch = data.train.batch(torch.arange(16))
    for modality, purifier in whole.purifiers.items():
        assert not torch.equal(found["published"][modality], found["through"][modality])
        x = batch.inputs[modality]
        with torch.no_grad():
            clean, robust = purifier(x, None)[0], purifier(found[inner][modality], None)[0]
        expected = sum(float((a - b).square().mean()) for a, b in [(x, clean), (x, robust), (clean, robust)])
        assert losses[f"{modality} reconstruction"] == pytest.approx(expected, rel=1e-5)


def test_before_a_new_purifier_both_inner_attacks_are_the_same(warm: Hasher, data: RetrievalData) -> None:
    assert one_step(recipe(warm, inner="through"), data) == one_step(recipe(warm), data)


@pytest.mark.parametrize("term", TERMS)
def test_each_term_can_be_left_out(term: str, warm: Hasher, data: RetrievalData) -> None:
    found = one_step(recipe(warm, **{term: 0.0}), data)
    assert set(found["purifier"]) == {f"image {other}" for other in TERMS if other != term}
    assert ("critic" in found) == (term != "discrimination")


def test_disentangle_false_is_the_control(warm: Hasher, data: RetrievalData) -> None:
    made = recipe(warm, disentangle=False)
    found = one_step(made, data)
    assert set(found["purifier"]) == {"image discrimination", "image alignment", "image reconstruction"}
    fragile = copy.deepcopy(made.hasher.purifiers["image"].fragile.state_dict())
    fit(made, data, config())
    for name, value in made.hasher.purifiers["image"].fragile.state_dict().items():
        assert torch.equal(value, fragile[name]), "nothing should train the fragile branch here"


def test_weights_scale_their_terms(warm: Hasher, data: RetrievalData) -> None:
    plain, scaled = one_step(recipe(warm), data), one_step(recipe(warm, disentangle=2.0, alignment=5.0), data)
    ratios = {name: scaled["purifier"][name] / value for name, value in plain["purifier"].items() if value}
    assert ratios["image divergence"] == pytest.approx(2.0)
    assert ratios["image alignment"] == pytest.approx(0.5)
    assert ratios["image discrimination"] != 0


def test_a_new_purifier_reconstructs_clean_images_and_keeps_the_perturbation(
    warm: Hasher, data: RetrievalData
) -> None:
    """At the start g = x and g' = x', so L_Rec is twice the mean square of the perturbation."""
    found = one_step(recipe(warm), data)["purifier"]["image reconstruction"]
    made = recipe(warm)
    made.setup(data, 0, 16)
    batch = data.train.batch(torch.arange(16))
    attacked = made.attacks[0].perturb(
        made.hasher.bare(), batch, Goal(batch.labels, -1), made.memory.reference(), draws=Draws(0)
    )
    change = (attacked.inputs["image"] - batch.inputs["image"]).square().mean()
    assert found == pytest.approx(1000 * 2 * float(change), rel=1e-4)


def test_the_literal_divergence_is_another_loss(warm: Hasher, data: RetrievalData) -> None:
    found = [
        one_step(recipe(warm, literal_divergence=literal), data)["purifier"] for literal in (False, True)
    ]
    assert found[0]["image divergence"] == pytest.approx(0.69, abs=0.05)  # features start out alike
    assert found[1]["image divergence"] < 0.2
    assert found[0]["image alignment"] == found[1]["image alignment"]


def test_resumed_equals_uninterrupted(warm: Hasher, data: RetrievalData) -> None:
    settings = config(2, augment="flip-crop")
    straight, log = recipe(warm), MemoryLog()
    lines = fit(straight, data, settings, log)
    stopped = MemoryLog(stop_after=1)
    with pytest.raises(Interrupted):
        fit(recipe(warm), data, settings, stopped)
    stopped.stop_after = None
    torch.rand(7)
    resumed = recipe(warm)
    again = fit(resumed, data, settings, stopped)
    for ours, theirs in zip(again, lines, strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    for name, module in straight.modules().items():
        other = resumed.modules()[name].state_dict()
        assert module.state_dict().keys() == other.keys()
        for key, value in module.state_dict().items():
            assert torch.equal(value, other[key]), f"{name} {key}"
    assert len(straight.modules()["critics"].state_dict()) > 0
    assert len(straight.modules()["classifiers"].state_dict()) == 2


def foreign(warm: Hasher) -> Hasher:
    return purified(warm, IMAGE, "query").as_seen_from("identity")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda w: Regenerate(w, DPSH(), drfgd()), "set hasher.purifiers"),
        (lambda w: Regenerate(foreign(w), DPSH(), drfgd()), f"{ProxyBackward.__name__}; use drfgd-image"),
        (lambda w: recipe(w, text_attack=TEXT_ATTACK), r"attacks on \['image', 'text'\].*text_attack"),
        (lambda w: Regenerate(purified(w, IMAGE), DPSH(), dhta()), "'dhta' is targeted"),
        (lambda w: recipe(w, inner="both"), "inner must be 'published'.*got 'both'"),
        (lambda w: recipe(w, alignment=-1.0), "must not be negative"),
        (lambda w: recipe(w, **dict.fromkeys(TERMS, 0.0)), "nor all be 0"),
    ],
)
def test_what_cannot_be_trained_is_refused(make: Callable[[Hasher], Any], said: str, warm: Hasher) -> None:
    with pytest.raises(ValueError, match=said):
        make(copy.deepcopy(warm))


def test_data_without_a_modality_of_the_hasher_are_refused(paired: tuple[RetrievalData, Hasher]) -> None:
    whole = purified(copy.deepcopy(paired[1]), IMAGE, "query")
    with pytest.raises(ValueError, match="encodes 'text', tiny has"):
        Regenerate(whole, DPSH(), drfgd()).setup(make_data(), 0, 16)


# --- a whole run: parent, purifiers, three views of the attacker, pictures in the report


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("runs")
    base: dict[str, Any] = {
        "name": "parent",
        "data": {"name": "synthetic", "train": 48, "query": 8, "database": 32},
        "hasher": {
            "bits": 8,
            "image": {"name": "small", "width": 4},
            "text": {"name": "mlp", "widths": [16]},
        },
        "training": {"objective": "dpsh", "epochs": 2, "batch_size": 16},
        "runtime": {"device": "cpu"},
    }
    parent = training_stages.train(make_config(base), root)
    group = {"name": "adam", "lr": 2e-3, "momentum": 0.5, "weight_decay": 0.0}
    child = {
        **base,
        "name": "child",
        "hasher": {**base["hasher"], "purifiers": BOTH, "sides": "query"},
        "training": {
            "recipe": {"name": "regenerate", "reconstruction": 1.0, "text_attack": TEXT_ATTACK},
            "objective": "dpsh",
            "attack": {"name": "drfgd", "steps": 2},
            "optim": {"purifier": group, "critic": group},
            "epochs": 2,
            "batch_size": 16,
            "init_from": str(parent.path),
        },
        "evaluation": {
            "directions": ["I2T", "T2I"],
            **{
                view: [{"name": "drfgd", "steps": 2}, {"name": "drfgd", "steps": 2, "modality": "text"}]
                for view in ("attacks", "oblivious", "identity")
            },
        },
    }
    return training_stages.run_all(make_config(child), root)


def test_three_views_of_the_attacker_are_in_the_results_and_the_report(run: Any) -> None:
    text = (run.path / "report.html").read_text()
    results = evaluation_stages.evaluate(run)
    for direction, attack in (("I2T", "drfgd"), ("T2I", "drfgd on text")):
        for name in ("clean", attack, f"{attack} (oblivious)", f"{attack} (identity)"):
            assert f"{results[f'{direction} {name}']['MAP']:.3f}" in text
        assert f"Results, {direction}" in text
    found = [np.load(path)["inputs"] for path in (run.path / "attacks").glob("drfgd-*/0.npz")]
    assert len(found) == 6
    images = [inputs for inputs in found if inputs.ndim == 4]
    assert len(images) == 3
    for number, inputs in enumerate(images):
        assert not any(np.array_equal(inputs, other) for other in images[:number]), "two views found the same"
    assert "Where the branches look" in text


def test_the_loaded_hasher_encodes_the_database_without_its_purifier(run: Any) -> None:
    hasher = model_stages.load_hasher(load_run(run.path))
    data = model_stages.read_data(run.config)
    bare = encode_split(hasher.bare(), data.database)["image"].packed
    assert torch.equal(model_stages.database_codes(run).packed, bare)
    files = model_stages.encode(run)
    assert np.array_equal(np.load(files["database.image"])["codes"], bare.numpy())
    through = encode_split(hasher, data.query)["image"].packed
    assert np.array_equal(np.load(files["query.image"])["codes"], through.numpy())


def test_heat_maps_are_scaled_and_shown_once_for_each_query(run: Any, tmp_path: Path) -> None:
    kept = np.load(run.path / "branches.npz")
    assert kept["images"].shape == kept["samples"].shape == (5, 3, 16, 16)
    for name in ("robust", "fragile"):
        assert kept[name].shape == (5, 16, 16)
        assert kept[name].min() >= 0
        assert kept[name].max() <= 1
        assert (kept[name].reshape(5, -1).max(1) > 0.5).all()
    assert not np.array_equal(kept["robust"], kept["fragile"])
    rows = load_branches(run.path)
    assert rows is not None
    assert [len(images) for images in rows.values()] == [5] * 4
    page = write_report(run).read_text()
    assert page.count("data:image/png;base64,") == 4 * 5
    assert page.count("Where the branches look") == 1
    (tmp_path / "branches.npz").write_bytes(b"PK broken")
    with pytest.raises(RunError, match="damaged"):
        load_branches(tmp_path)


def test_a_hasher_without_such_a_purifier_has_no_heat_maps(tmp_path: Path) -> None:
    save_branches(tmp_path, small_hasher(), make_data().query)
    assert load_branches(tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_a_parent_of_other_purifiers_is_refused(run: Any, tmp_path: Path) -> None:
    again = run.config.model_copy(update={"name": "again"})
    training = again.training.model_copy(update={"init_from": str(run.path)})
    with pytest.raises(ConfigError, match="has purifiers already"):
        training_stages.train(again.model_copy(update={"training": training}), tmp_path)
