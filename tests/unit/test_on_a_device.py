"""Training, attacks and evaluation on a device apart from the CPU give what they give on the CPU, bit for bit.

The device is emulated (``emulated_device.py``), so that any machine finds tensors that were left on the CPU; the
tests of ``tests/gpu`` are those of a real one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from contract.checks import World, make_attack, make_world, run
from contract.test_recipes import IMAGES, KINDS, PURIFIERS, SMALL, make_recipe
from emulated_device import DEVICE, emulated_device
from helpers import make_data, small_hasher, train_config
from torch import Tensor

from robusthash.core.registry import build, catalogue
from robusthash.data import RetrievalData, load_data
from robusthash.evaluation import make_context
from robusthash.models import build_hasher
from robusthash.robustness.assess import assess
from robusthash.training import HashingRecipe, Recipe, fit

WITH_CRITICS = ("agah", "cpah", "dadh", "ssah", "ukd")
OBJECTIVES = [card.name for card in catalogue("objective") if card.name not in WITH_CRITICS]
NEED_TEXTS = ("cmla", "dacm", "ta-dch")
IMAGE_ATTACKS = [card.name for card in catalogue("attack") if card.modality not in ("tokens", "text")]
ATTACKS = [name for name in IMAGE_ATTACKS if name not in NEED_TEXTS]


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


def assert_equal(here: dict[str, Tensor], there: dict[str, Tensor]) -> None:
    assert here.keys() == there.keys()
    assert [name for name, value in here.items() if not torch.equal(value, there[name])] == []


def trained(make: Callable[[], Recipe], data: RetrievalData) -> dict[str, Tensor]:
    """All that a recipe learns and keeps, on the CPU."""
    recipe = make()
    fit(recipe, data, train_config(2))
    modules = recipe.modules().items()
    return {f"{part}.{name}": v.cpu() for part, m in modules for name, v in m.state_dict().items()}


def test_the_emulation_refuses_what_accelerators_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    with emulated_device(monkeypatch):
        here, there = torch.arange(3.0), torch.arange(3.0).to(DEVICE)
        assert torch.equal((there + torch.tensor(1.0)).cpu(), here + 1)  # a scalar may come from anywhere
        assert there[torch.tensor([2])].tolist() == [2.0]  # and positions
        for mixed in (
            lambda: here + there,
            lambda: torch.where(there > 1, there, here),
            lambda: here[there.long()],
        ):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(3, device=DEVICE, generator=torch.Generator())


@pytest.mark.parametrize("kind", KINDS)
def test_adversarial_training(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data()

    def make() -> Recipe:
        image, gates = IMAGES.get(kind, SMALL), PURIFIERS.get(kind)
        return make_recipe(kind, build_hasher(bits=8, image=image, purifiers=gates))

    here = trained(make, data)
    with emulated_device(monkeypatch) as device:
        there = trained(make, data)
    assert device.operations > 1000
    assert_equal(here, there)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_of_images_and_texts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_data("synthetic", train=64, query=12, database=48)

    def make() -> Recipe:
        text = {"name": "mlp", "widths": [16]}
        hasher = build_hasher(bits=8, image=SMALL, text=text, vocabulary=data.vocabulary)
        return HashingRecipe(hasher, build("objective", name))

    here = trained(make, data)
    with emulated_device(monkeypatch):
        assert_equal(here, trained(make, data))


def moved(world: World) -> World:
    """The same world with everything on the device that a caller puts there."""
    victim, objective = (copy.deepcopy(part).to(DEVICE) for part in (world.victim, world.objective))
    placed = {name: getattr(world, name).to(DEVICE) for name in ("batch", "reference", "targets")}
    return replace(world, victim=victim, objective=objective, **placed)


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(name: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def attacked(place: World) -> dict[str, Tensor]:
        result = run(place.fitted(make_attack(name, place.objective)), place)
        return {"signs": result.signs.cpu(), **{key: v.cpu() for key, v in result.inputs.items()}}

    here = attacked(world)
    with emulated_device(monkeypatch):
        assert_equal(here, attacked(moved(world)))


def test_a_suite(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def scores(place: World) -> dict[str, Tensor]:
        result = assess(make_context(place.victim, place.data, batch_size=8), "smoke", queries=8)
        return {"ap": result.per_query["wMAP"]} | {
            f"clean {n}": torch.tensor(v) for n, v in result.reference.items()
        }

    here = scores(world)
    with emulated_device(monkeypatch):
        there = scores(moved(world))
    for name, value in here.items():
        torch.testing.assert_close(there[name], value, equal_nan=True)


def test_linear_heads_read_their_running_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> Recipe:
        return HashingRecipe(small_hasher(head="linear"), build("objective", "csq"))

    here = trained(make, make_data())
    with emulated_device(monkeypatch):
        assert_equal(here, trained(make, make_data()))
