"""What outer losses need of the inner attack is checked where a recipe is read, and where one is made in
Python."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from helpers import make_data, small_hasher

from robusthash.apps.experiment.config import ConfigError, make_config
from robusthash.attacks import Attack, image_threat
from robusthash.attacks.base import Guide
from robusthash.attacks.losses import Agreement
from robusthash.attacks.pgd import PGD
from robusthash.core import registry
from robusthash.core.registry import build, catalogue
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Goal, Guidance, Reference
from robusthash.defenses import AdversarialTraining, CgATOuter, PlainAT, Round, SAATOuter
from robusthash.defenses.base import Needs, OuterLoss
from robusthash.defenses.sfcl import SFCLOuter
from robusthash.models import Hasher
from robusthash.objectives import DPSH
from robusthash.training import Moment

Settings = str | dict[str, Any]


def recipe(outer: Settings, attack: Settings) -> dict[str, Any]:
    optim = {"hasher": {"lr": 0.01}, "guide": {"lr": 0.01}}
    training = {
        "recipe": "adversarial",
        "objective": "dpsh",
        "outer": outer,
        "attack": attack,
        "optim": optim,
    }
    return {"name": "x", "data": "synthetic", "hasher": {"text": "mlp"}, "training": training}


REFUSED: list[tuple[Settings, Settings, str]] = [
    ("saat", "mainstay-targeted", "targeted"),
    ("saat", "dhta", "targeted"),
    ("cgat", "tha", "targeted"),
    ("saat", "pgd", "Unguided"),
    ("saat", "sdha", "Positives"),
    ("cgat", "hag", "Own"),
    ("cgat", {"name": "dsarh", "mode": "literal_sign"}, "Similarity"),
    ({"name": "sfcl", "wrong": "target"}, "mainstay", "labels that a targeted inner attack aims at"),
    ("sfcl", {"name": "mainstay", "modality": "text"}, "needs attacked images"),
    ("pgd-at", "pros-gan", "learns once for a finished victim"),
    ("pgd-at", "aach", "learns once for a finished victim"),
]
FITTING: list[tuple[Settings, Settings]] = [
    ("saat", "mainstay"),
    ("saat", "cgat"),
    ("cgat", "dsarh"),
    ("saat", {"name": "mainstay", "modality": "text"}),
    ("saat", {"name": "text-edits", "like": "mainstay"}),
    ("pgd-at", "hag"),
    ("pgd-at", "dhta"),
    ("atrdh", "tha"),
    ("atrdh", "mainstay"),
    ("dsarh", "dsarh"),
    ("saah", "pgd"),
    ("saah", {"name": "mainstay", "modality": "text"}),
    ("sfcl", "dhta"),
    ("sfcl", "mainstay"),
    ({"name": "sfcl", "wrong": "target"}, "dhta"),
    ({"name": "sfcl", "wrong": "target", "auxiliary": 0.0}, "mainstay"),  # l' is not taken then
]


@pytest.mark.parametrize(("outer", "attack", "why"), REFUSED)
def test_an_attack_that_does_not_fit_is_refused_where_the_recipe_is_read(
    outer: Settings, attack: Settings, why: str
) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        make_config(recipe(outer, attack))
    name = outer if isinstance(outer, str) else outer["name"]
    assert f"Attacks that fit '{name}': " in str(caught.value)
    assert "'epochs'" not in str(caught.value)  # the line is not hidden behind the whole section


def test_an_inner_attack_without_a_budget_is_refused_where_the_recipe_is_read() -> None:
    with pytest.raises(ConfigError, match="attack has an eps of 0, so that nothing would be attacked"):
        make_config(recipe("saat", {"name": "mainstay", "eps": 0}))


@pytest.mark.parametrize(("outer", "attack"), FITTING)
def test_an_attack_that_fits_is_read(outer: Settings, attack: Settings) -> None:
    assert make_config(recipe(outer, attack)).training.outer == outer


def test_what_the_attack_needs_of_hasher_and_optimisers_is_asked_for_where_the_recipe_is_read() -> None:
    """Before anything is trained, the run to start from above all."""
    for name, settings, recipe_name in (
        ("text-edits", "text-edits", "adversarial"),
        ("mainstay", {"name": "mainstay", "modality": "both"}, "adversarial"),
        ("mainstay", {"name": "mainstay", "modality": "text"}, "asymmetric"),
    ):
        raw = recipe("pgd-at" if recipe_name == "adversarial" else "dsarh", settings)
        raw["training"]["recipe"] = recipe_name
        raw["hasher"] = {"image": "small"}
        with pytest.raises(ConfigError, match=rf"'{name}' changes texts.*set hasher\.text") as caught:
            make_config(raw)
        assert "batch_size" not in str(caught.value)  # the whole config would hide the line
    for outer, attack in (("atrdh", "tha"), ("dsarh", "tha")):
        raw = recipe(outer, attack)
        del raw["training"]["optim"]["guide"]
        with pytest.raises(ConfigError, match=r"group 'guide'; add training\.optim\.guide"):
            make_config(raw)


def test_the_line_names_what_fits() -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(recipe("saat", "dhta"))
    fits, losses = (
        str(caught.value).partition("Attacks that fit 'saat': ")[2].split("; losses that fit 'dhta': ")
    )
    assert {"mainstay", "cgat"} <= set(fits.split(", "))
    assert not {"dhta", "pgd", "hag", "sdha", "text-edits"} & set(
        fits.split(", ")
    )  # the last attacks no images
    assert {"pgd-at", "atrdh", "sfcl"} <= set(losses.split(", "))
    assert not {"saat", "cgat"} & set(losses.split(", "))


OF_ANY_ENCODER = [card.name for card in catalogue("outer") if card.name not in ("saah", "sfcl")]
"""The other two need an encoder of their own; their terms do not look at the guidance."""


@pytest.mark.parametrize("outer", OF_ANY_ENCODER)
@pytest.mark.parametrize("attack", [card.name for card in catalogue("attack") if card.modality == "any"])
def test_every_pair_is_refused_where_it_is_made_or_trains_a_step(outer: str, attack: str) -> None:
    """No pair dies of a tensor size within training: it is refused before, or it has finite terms."""
    objective, options = DPSH(), {"name": attack}
    options |= {"steps": 2} if attack != "tha" else {"steps": 2, "hidden": 16}
    made = build("attack", options, objective=objective)
    data = make_data()
    loss = build("outer", outer)
    if loss.needs.unmet(made):
        with pytest.raises(ValueError, match=f"does not fit the outer loss '{outer}'"):
            AdversarialTraining(small_hasher(), objective, made, loss)
        return
    trained = AdversarialTraining(small_hasher(), objective, made, loss)
    trained.setup(data, 0, 8)
    for _, terms in trained.step(data.train.batch(torch.arange(8)), Moment(0, 0.5, Draws(0))):
        assert all(bool(torch.isfinite(term)) for term in terms.values())


@dataclass(frozen=True)
class Nearest(Guide):
    """The known code that is nearest: one an item, but of which label it is not said."""

    def __call__(
        self, victim: Hasher, batch: Batch, goal: Goal, reference: Reference | None, draws: Draws
    ) -> Guidance:
        own = next(iter(victim(batch.inputs).values())).relaxed()
        assert reference is not None
        codes = torch.cat(list(reference.codes.values()))
        return Guidance(codes[(own @ codes.T).argmax(1)])


@dataclass(frozen=True)
class Declared(Nearest):
    label_codes = True


@pytest.mark.parametrize("outer", [SAATOuter(), CgATOuter()])
def test_an_attack_of_ones_own_is_checked_where_the_recipe_is_made(outer: SAATOuter | CgATOuter) -> None:
    def mine(guide: Nearest, targeted: bool = False) -> Attack:
        return Attack("mine", guide, Agreement(), PGD(1), image_threat(), targeted=targeted)

    with pytest.raises(ValueError, match=r"'mine' does not fit.*Nearest.*label_codes = True"):
        AdversarialTraining(small_hasher(), DPSH(), mine(Nearest()), outer)
    with pytest.raises(ValueError, match="targeted"):
        AdversarialTraining(small_hasher(), DPSH(), mine(Declared(), targeted=True), outer)
    AdversarialTraining(small_hasher(), DPSH(), mine(Declared()), outer)
    AdversarialTraining(small_hasher(), DPSH(), mine(Nearest()), PlainAT())


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Names that the test registers are forgotten afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        registry.catalogue()  # the package's own names are registered by now, and stay
        patch.setattr(registry, "_CARDS", dict(registry._CARDS))
        yield


@pytest.mark.usefixtures("forgetful")
def test_a_new_loss_joins_by_what_it_declares() -> None:
    @registry.register("outer", "picky")
    @dataclass(frozen=True)
    class Picky(OuterLoss):
        needs: ClassVar[Needs] = Needs(goal="target", label_codes=True)

        def __call__(self, turn: Round) -> dict[str, torch.Tensor]:
            return PlainAT()(turn)

    with pytest.raises(
        ConfigError, match="Attacks that fit 'picky': dhta, guided-targeted-apgd, mainstay-targeted"
    ):
        make_config(recipe("picky", "mainstay"))
    make_config(recipe("picky", "dhta"))


def test_sfcl_needs_a_target_only_where_it_looks_at_one() -> None:
    assert SFCLOuter().needs.goal is None
    assert SFCLOuter(wrong="target").needs.goal == "target"
    assert SFCLOuter(wrong="target", auxiliary=0.0).needs.goal is None


@pytest.mark.parametrize("name", ["complementary", "auxiliary", "semantic"])
@pytest.mark.parametrize("weight", [-1.0, "C"])
def test_sfcl_takes_no_weight_that_is_none(name: str, weight: object) -> None:
    """A negative one would train away from what the term asks for."""
    with pytest.raises(ConfigError, match=f"{name} .*(at least 0|a finite number), got {weight!r}"):
        make_config(recipe({"name": "sfcl", name: weight}, "mainstay"))
