"""A new attack and a new objective: one file each, outside the package, held to the same contract."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from contract.checks import (
    ATTACK_CHECKS,
    OBJECTIVE_CHECKS,
    World,
    check_labels,
    check_state,
    check_terms,
    make_attack,
)
from robusthash.attacks import Attack
from robusthash.core import registry
from robusthash.objectives import HashObjective

ATTACK = '''
"""Push the code to that of the most distant known item, whatever it shows."""

from dataclasses import dataclass

import torch

from robusthash.attacks import Attack, image_threat
from robusthash.attacks.base import Guide
from robusthash.attacks.losses import Agreement
from robusthash.attacks.pgd import PGD
from robusthash.core.registry import register
from robusthash.core.types import Guidance


@dataclass(frozen=True)
class Farthest(Guide):
    """The complement of the known code that is farthest from the query's own."""

    def __call__(self, victim, batch, goal, reference, draws):
        with torch.no_grad():
            own = next(iter(victim(batch.inputs).values())).relaxed()
        codes = torch.cat(list(reference.codes.values())) if reference is not None else -own.sign()
        return Guidance(-codes[(own @ codes.T).argmin(1)])


@register("attack", "my-attack", supervised=False)
def my_attack(eps: float = 8 / 255, steps: int = 100, step_size: float = 2 / 255) -> Attack:
    """Away from the complement of the farthest known code."""
    return Attack("my-attack", Farthest(), Agreement(), PGD(steps, step_size), image_threat(eps))
'''

OBJECTIVE = '''
"""Contrast the mean agreement with similar items and with the others."""

from robusthash.core.labels import relevant
from robusthash.core.registry import register
from robusthash.objectives.base import HashObjective, quantisation


@register("objective", "my-objective")
class Margin(HashObjective):
    """Mean agreement with dissimilar items minus that with similar ones."""

    def __init__(self, weight: float = 0.1) -> None:
        super().__init__()
        self.weight = weight

    def similarity(self, output, labels, codes, code_labels):
        near = relevant(labels, code_labels).float()
        agreement = output.code @ codes.T / codes.shape[1]
        far = 1.0 - near
        return (agreement * far).sum(1) / far.sum(1).clamp_min(1) - (agreement * near).sum(1) / near.sum(1).clamp_min(1)

    def regularisation(self, output):
        return self.weight * quantisation(output)
'''


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A package of somebody else on the path; names that it registers are forgotten afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("elsewhere")
        home = folder / "their_methods"
        home.mkdir()
        (home / "__init__.py").write_text("")
        (home / "newattack.py").write_text(ATTACK)
        (home / "newobjective.py").write_text(OBJECTIVE)
        patch.syspath_prepend(str(folder))
        registry.catalogue()  # the package's own names are registered by now, and stay
        patch.setattr(registry, "_CARDS", dict(registry._CARDS))
        importlib.invalidate_caches()
        yield home
    for name in [name for name in sys.modules if name.startswith("their_methods")]:
        del sys.modules[name]


@pytest.mark.parametrize("check", ATTACK_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_new_attack(check: Callable[[Attack, World], None], package: Path, world: World) -> None:
    check(make_attack("their_methods.newattack:my-attack", world.objective), world)


def test_new_attack_needs_no_labels(package: Path, world: World) -> None:
    made = registry.card("attack", "their_methods.newattack:my-attack")
    check_labels(make_attack("their_methods.newattack:my-attack", world.objective), world, made.supervised)
    assert made.summary == "Away from the complement of the farthest known code."
    assert "my-attack" in [card.name for card in registry.catalogue("attack")]


@pytest.mark.parametrize("check", OBJECTIVE_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_new_objective(check: Callable[[HashObjective], None], package: Path) -> None:
    check(registry.build("objective", {"name": "their_methods.newobjective:my-objective", "weight": 0.2}))


def test_new_objective_keeps_its_state(package: Path) -> None:
    name = "their_methods.newobjective:my-objective"
    check_state(registry.build("objective", name), registry.build("objective", name))


def test_options_of_a_new_method_are_checked_too(package: Path) -> None:
    with pytest.raises(KeyError, match="did you mean 'weight'"):
        registry.build("objective", {"name": "their_methods.newobjective:my-objective", "wieght": 0.2})
    with pytest.raises(KeyError, match="no objective is called 'my-objectiv'; did you mean 'my-objective'"):
        registry.build("objective", "their_methods.newobjective:my-objectiv")
    with pytest.raises(ModuleNotFoundError, match="their_method"):
        registry.build("objective", "their_method.newobjective:my-objective")


def test_the_checks_can_fail(package: Path) -> None:
    """An objective that sends no gradient back is caught by the sweep."""

    class Dead(HashObjective):
        def similarity(self, output, labels, codes, code_labels):  # type: ignore[no-untyped-def]
            return output.code.detach().square().mean(1)

        def regularisation(self, output):  # type: ignore[no-untyped-def]
            return 0.0 * output.code.mean(1)

    with pytest.raises(AssertionError, match="no gradient"):
        check_terms(Dead())
