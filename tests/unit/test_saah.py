"""SAAH as a defense: its terms, whom they train, what is logged, and a run from config to a loaded model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MemoryLog, facts_of, make_data, small_hasher, train_config, trained_hasher
from torch import Tensor

from robusthash.apps.experiment.config import make_config
from robusthash.apps.experiment.model_stages import load_hasher
from robusthash.apps.experiment.training_stages import train
from robusthash.apps.reports.run_report import training_chart
from robusthash.attacks import Attack
from robusthash.core.registry import build
from robusthash.core.runtime import Draws
from robusthash.core.types import Goal, LossTerms, Reference
from robusthash.data import RetrievalData
from robusthash.defenses import AdversarialTraining, PlainAT, Round, SAAHOuter
from robusthash.defenses.saah import spectral_stability
from robusthash.models import Hasher, build_hasher, purified
from robusthash.objectives import DPSH, HashObjective
from robusthash.training import Moment, fit

GATE = {"name": "spectral-gate", "block": 4}


def inner(objective: HashObjective, **options: Any) -> Attack:
    settings = {"name": "pgd", "steps": 2, "step_size": 4 / 255, "random_start": False, **options}
    return build("attack", settings, objective=objective)


def saah(hasher: Hasher, outer: Any = None) -> AdversarialTraining:
    objective = DPSH()
    return AdversarialTraining(hasher, objective, inner(objective), SAAHOuter() if outer is None else outer)


@pytest.fixture(scope="module")
def data() -> RetrievalData:
    return make_data()


@pytest.fixture(scope="module")
def warm(data: RetrievalData) -> Hasher:
    return trained_hasher(data, epochs=4)


@pytest.fixture
def gated(warm: Hasher) -> Hasher:
    """A trained hasher behind a gate whose layers are no longer at their start."""
    hasher = purified(copy.deepcopy(warm), {"image": GATE}, seed=1)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in hasher.purifiers.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return hasher


class Seen(SAAHOuter):
    """Keeps the rounds."""

    rounds: list[Round] = []  # noqa: RUF012 - emptied by the test that reads it

    def __call__(self, turn: Round) -> LossTerms:
        self.rounds.append(turn)
        return super().__call__(turn)


@pytest.fixture
def rounds() -> Iterator[list[Round]]:
    Seen.rounds.clear()
    yield Seen.rounds
    Seen.rounds.clear()


def one_step(recipe: AdversarialTraining, data: RetrievalData) -> dict[str, LossTerms]:
    recipe.setup(data, 0, 16)
    return dict(recipe.step(data.train.batch(torch.arange(16)), Moment(0, 0.0, Draws(0))))


def test_terms_are_those_of_the_paper(gated: Hasher, data: RetrievalData, rounds: list[Round]) -> None:
    yielded = one_step(saah(gated, Seen(stability=3.0, retention=2.0, stab_reduction="sum")), data)
    terms, (turn,) = yielded["hasher"], rounds
    clean, robust = (
        turn.objective(outputs, turn.batch, turn.memory) for outputs in (turn.clean, turn.robust)
    )
    assert set(terms) == {
        "clean/similarity",
        "clean/regularisation",
        "robust/similarity",
        "robust/regularisation",
        "stability",
        "retention",
    }
    for name in clean:
        assert torch.equal(terms[f"clean/{name}"], clean[name])
        assert torch.equal(terms[f"robust/{name}"], robust[name])
    x, attacked = turn.batch.inputs["image"], turn.attacked.inputs["image"]
    gate = turn.clean["image"].aux["gate"]
    assert terms["stability"].item() == pytest.approx(
        3 * spectral_stability(x - attacked, gate, "sum").item()
    )
    bound = (gate.flatten(1).mean(1) - 0.5).square().mean()
    assert terms["retention"].item() == pytest.approx(2 * bound.item(), rel=1e-5)


def test_attacked_images_pass_through_their_own_gate(
    gated: Hasher, data: RetrievalData, rounds: list[Round]
) -> None:
    one_step(saah(gated, Seen()), data)
    (turn,) = rounds
    purifier = gated.purifiers["image"]
    for outputs, inputs in ((turn.clean, turn.batch.inputs), (turn.robust, turn.attacked.inputs)):
        torch.testing.assert_close(outputs["image"].aux["gate"], purifier.gate(purifier.dct(inputs["image"])))
    assert not torch.allclose(turn.clean["image"].aux["gate"], turn.robust["image"].aux["gate"], atol=1e-4)


@pytest.mark.parametrize("term", ["stability", "retention"])
def test_own_terms_train_the_gate_alone(term: str, gated: Hasher, data: RetrievalData) -> None:
    value = one_step(saah(gated), data)["hasher"][term]
    value.backward()
    assert all(p.grad is None for p in [*gated.encoders.parameters(), *gated.heads.parameters()])
    for name, parameter in gated.purifiers.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0, name


def test_hash_terms_train_gate_and_encoder(gated: Hasher, data: RetrievalData) -> None:
    terms = one_step(saah(gated), data)["hasher"]
    (terms["clean/similarity"] + terms["robust/similarity"]).backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in gated.parameters())


def test_a_new_gate_is_kept_and_training_moves_it(warm: Hasher, data: RetrievalData) -> None:
    hasher = purified(copy.deepcopy(warm), {"image": GATE}, seed=1)
    terms = one_step(saah(hasher), data)["hasher"]
    assert terms["retention"].item() < 1e-12
    before = copy.deepcopy(hasher.purifiers.state_dict())
    fit(saah(hasher), data, train_config(2))
    assert all(not torch.equal(value, before[name]) for name, value in hasher.purifiers.state_dict().items())


def without(lines: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in ("seconds", "figures", *names)} for line in lines]


def test_without_gate_and_terms_it_is_plain_adversarial_training(warm: Hasher, data: RetrievalData) -> None:
    """The ablation ``none``: the same run, bit for bit, as the control on the bare hasher."""
    gated, bare = purified(copy.deepcopy(warm), {"image": {**GATE, "kind": "none"}}), copy.deepcopy(warm)
    ours = fit(saah(gated), data, train_config(2))
    theirs = fit(saah(bare, PlainAT()), data, train_config(2))
    assert without(ours, "stability", "retention") == without(theirs)
    assert all(line["retention"] == pytest.approx(0.25) for line in ours)  # nothing learns to lower it
    for (name, left), (_, right) in zip(
        gated.bare().named_parameters(), bare.named_parameters(), strict=True
    ):
        assert torch.equal(left, right), name


def test_zero_weights_switch_the_terms_off(gated: Hasher, data: RetrievalData) -> None:
    other = copy.deepcopy(gated)
    lines = fit(saah(gated, SAAHOuter(stability=0.0, retention=0.0)), data, train_config(1))
    assert lines[0]["stability"] == lines[0]["retention"] == 0.0
    plain = fit(saah(other, PlainAT()), data, train_config(1))
    assert without(lines, "stability", "retention") == without(plain)
    for (name, left), (_, right) in zip(gated.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(left, right), name


def test_figures_are_logged_and_not_optimised(gated: Hasher, data: RetrievalData) -> None:
    log = MemoryLog()
    lines = fit(saah(gated), data, train_config(2), log)
    assert log.lines == lines
    for line in lines:
        figures = line["figures"]
        assert set(figures) == {"gate/mean", "gate/spread", "gate/images"}
        assert 0.05 <= figures["gate/mean"] <= 1.0
        assert figures["gate/spread"] > 0
        assert figures["gate/images"] > 0
        assert not set(figures) & set(line)
    assert training_chart(lines) is not None
    assert "figures" not in fit(saah(gated, PlainAT()), data, train_config(1))[0]


def test_figures_of_a_known_gate(gated: Hasher, data: RetrievalData, rounds: list[Round]) -> None:
    one_step(saah(gated, Seen()), data)
    (turn,) = rounds
    gate = torch.full((16, 9, 4, 4), 0.2)
    gate[:, :, 0] = 0.6  # a quarter of the frequencies
    gate[8:] += 0.1
    turn.clean["image"].aux["gate"] = gate
    figures = SAAHOuter().figures(turn)
    assert float(figures["gate/mean"]) == pytest.approx(0.35)
    assert float(figures["gate/spread"]) == pytest.approx(0.4 * 3**0.5 / 4, rel=1e-5)
    assert float(figures["gate/images"]) == pytest.approx(0.05, rel=1e-5)


def test_a_hasher_without_a_gate_is_refused(warm: Hasher, data: RetrievalData) -> None:
    with pytest.raises(
        ValueError, match=r"needs a hasher with a spectral gate.*purifiers: \{image: spectral-gate\}"
    ):
        one_step(saah(copy.deepcopy(warm)), data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stability": -1.0}, "stability must not be negative, got -1"),
        ({"retention": -0.5}, "retention must not be negative"),
        ({"stab_reduction": "blocks"}, "one of block, sum, mean, got 'blocks'"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SAAHOuter(**options)


def test_pgd_starts_where_it_is_told(warm: Hasher, data: RetrievalData) -> None:
    """One step from the clean image moves every pixel by the step or not at all; from a random start it does
    not."""
    objective = DPSH()
    objective.setup(facts_of(data.train.labels, warm.bits))
    batch = data.query.batch(torch.arange(8))
    memory_codes = torch.where(torch.arange(48)[:, None] % 2 == 0, 1.0, -1.0).expand(-1, 8)
    reference = Reference({"image": memory_codes}, data.train.labels)
    moved = {}
    for random in (False, True):
        attack = inner(objective, steps=1, random_start=random)
        found = attack.perturb(warm, batch, Goal(batch.labels, -1), reference, draws=Draws(0))
        moved[random] = ((found.inputs["image"] - batch.inputs["image"]).abs() * 255 / 4).flatten()

    def stepped(sizes: Tensor) -> float:
        return float(((sizes < 1e-3) | ((sizes - 1).abs() < 1e-3)).float().mean())

    assert stepped(moved[False]) == 1.0
    assert float(moved[False].max()) > 0.99
    assert stepped(moved[True]) < 0.1


@pytest.mark.parametrize("modality", ["image", "text", "both"])
def test_over_image_and_text(modality: str) -> None:
    """The gate stands before the images; an attack on the texts alone changes no spectrum."""
    data = build("data", {"name": "synthetic", "train": 24, "query": 4, "database": 8})
    image, purifiers = {"name": "small", "width": 4, "grid": 1}, {"image": "spectral-gate"}
    hasher = build_hasher(bits=8, image=image, text="mlp", vocabulary=data.vocabulary, purifiers=purifiers)
    objective = DPSH()
    recipe = AdversarialTraining(hasher, objective, inner(objective, modality=modality), SAAHOuter())
    recipe.setup(data, 0, 8)
    terms = dict(recipe.step(data.train.batch(torch.arange(8)), Moment(0, 0.0, Draws(0))))["hasher"]
    assert all(bool(torch.isfinite(term)) for term in terms.values())
    assert (float(terms["stability"].detach()) > 0) == (modality != "text")


def test_declared_is_gate(warm: Hasher) -> None:
    gated = purified(copy.deepcopy(warm), {"image": GATE})
    assert gated.declared == gated.spec["declared"] == "gate"
    saah(gated)
    assert gated.declared == "gate"  # adversarial training does not overwrite it
    assert small_hasher(purifiers={"image": GATE}, declared="detector").declared == "detector"
    assert warm.declared == "plain"


def test_a_run_from_config_to_a_loaded_model(tmp_path: Path) -> None:
    """Trained from an undefended run, saved and loaded: gate, class and codes are the same."""
    small = {"name": "small", "width": 4, "grid": 1}
    plain = {
        "name": "plain",
        "data": {"name": "synthetic", "texts": False, "train": 32, "query": 8, "database": 16},
        "hasher": {"bits": 8, "image": small},
        "training": {"objective": "dpsh", "epochs": 1, "batch_size": 16},
    }
    parent = train(make_config(plain), tmp_path)
    attack = {"name": "pgd", "steps": 1, "step_size": "4/255", "random_start": False}
    recipe = {"recipe": "adversarial", "outer": "saah", "attack": attack, "init_from": str(parent.path)}
    gate = {"name": "spectral-gate", "kind": "pixel+freq"}
    config = {
        **plain,
        "name": "saah",
        "hasher": {"bits": 8, "image": small, "purifiers": {"image": gate}},
        "training": {**plain["training"], **recipe},  # type: ignore[dict-item]
    }
    run = train(make_config(config), tmp_path)
    hasher = load_hasher(run)
    again = load_hasher(run)
    assert hasher.declared == "gate"
    assert hasher.purifiers["image"].kind == "pixel+freq"
    assert set(run.card()["last"]["figures"]) == {"gate/mean", "gate/spread", "gate/images"}
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        left, right = (victim.eval()({"image": x})["image"] for victim in (hasher, again))
    assert torch.equal(left.logits, right.logits)
    assert torch.equal(left.aux["gate"], right.aux["gate"])
    assert float(left.aux["gate"].std()) > 0  # what was learned came back
