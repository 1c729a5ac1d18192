"""A new attack, objective and defense: one file each, outside the package, held to the same contract."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from contract.checks import (
    ATTACK_CHECKS,
    OBJECTIVE_CHECKS,
    World,
    check_labels,
    check_state,
    check_terms,
    make_attack,
)
from robusthash.attacks import Attack, image_threat
from robusthash.core import registry
from robusthash.evaluation import make_context
from robusthash.models import build_hasher, purified
from robusthash.objectives import HashObjective
from robusthash.robustness.specs.adaptive_attacks import adaptive_attacks
from robusthash.robustness.tiers import extra_attacks, observe
from robusthash.robustness.victim_behaviour import matches

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

DEFENSE = '''
"""Grey levels outside the graph, and the attack of somebody who knows of them."""

from dataclasses import dataclass

import torch

from robusthash.core.registry import register
from robusthash.defenses.adaptive import AdaptiveAttacks
from robusthash.models.purifier import Purifier, with_gradient_of
from robusthash.models.surrogate_gradients import GradientView, ViewedHasher


@register("purifier", "my-levels", modality="image")
class Levels(Purifier):
    """Images rounded to a few grey levels."""

    declares = "my-levels"

    def __init__(self, levels: int = 15) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, x, encode):
        return torch.round(x.detach() * self.levels) / self.levels, {}


class SoftLevels(Purifier):
    """The levels, with the gradient of a sine between them."""

    def __init__(self, inner: Levels) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x, encode):
        n = self.inner.levels
        pure, aux = self.inner(x, encode)
        return with_gradient_of(pure, x - torch.sin(2 * torch.pi * n * x) / (4 * torch.pi * n)), aux


@register("gradient-view", "my-soft-levels")
@dataclass(frozen=True)
class SoftView(GradientView):
    """The victim with the gradient of soft levels."""

    def __call__(self, victim):
        parts = {name: SoftLevels(part) for name, part in victim.purifiers.items() if isinstance(part, Levels)}
        return ViewedHasher(victim, victim.with_parts(purifiers=parts))


@register("adaptive", "my-levels")
class LevelAttacks(AdaptiveAttacks):
    """Levels taken for smooth."""

    def modalities(self, victim):
        return [name for name, part in victim.purifiers.items() if isinstance(part, Levels)]

    def attacks(self, victim, modality, setting):
        return [setting.attack("my-soft-levels", SoftView())]
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
        (home / "newdefense.py").write_text(DEFENSE)
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


def test_new_defense_brings_its_own_adaptive_attacks(package: Path, world: World) -> None:
    """One file: the purifier, the view of it and the attack, found by the tier and run on the victim."""
    purifier = {"image": {"name": "their_methods.newdefense:my-levels", "levels": 31}}
    victim = purified(world.victim, purifier)
    context = make_context(victim, world.data, queries=8, batch_size=8)
    threat = image_threat(8 / 255, knowledge="W2")
    seen = observe(context, threat)
    assert victim.declared == "my-levels"
    assert matches(victim.declared, seen) == []
    specs = {spec.name: spec for spec in adaptive_attacks(victim, None, threat, 4, behaviour=seen)}
    assert list(specs) == ["my-soft-levels", "repair-identity", "repair-learnt", "two-stage"]
    spec = specs["my-soft-levels"]
    assert spec.settings()["view"] == {"kind": "gradient-view", "name": "my-soft-levels"}
    in_tier = extra_attacks(context, world.objective, threat, "standard", behaviour=seen)
    assert {*specs, "trained-objective"} <= {attack.name for attack in in_tier}
    result = spec.fitted(context).run(context, 0, 0)
    clean = context.batch(0).inputs
    threat.verify({"image": result.inputs}, clean)
    assert not torch.equal(result.inputs, clean["image"])
    again = build_hasher(**victim.spec)  # as a stored run is opened
    assert (again.declared, again.purifiers["image"].levels) == ("my-levels", 31)
    assert adaptive_attacks(again, None, threat, 4)[0].name == "my-soft-levels"


def test_options_of_a_new_method_are_checked_too(package: Path) -> None:
    with pytest.raises(KeyError, match="did you mean 'weight'"):
        registry.build("objective", {"name": "their_methods.newobjective:my-objective", "wieght": 0.2})
    with pytest.raises(KeyError, match="has no objective 'my-objectiv'; did you mean 'my-objective'"):
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


@pytest.mark.parametrize(
    ("source", "named", "said"),
    [
        (ATTACK, "my_method:my_attack", ["<Function test_registered[my-attack-stays_inside]>"]),
        (OBJECTIVE, "my_method:Margin", ["<Function test_state_comes_back[my-objective]>"]),
        (DEFENSE, "my_method:Levels", ["no test is made for each purifier"]),
        (ATTACK, "my_method:nothing", ["'my_method:nothing' is not registered"]),
        (ATTACK, "no_file:nothing", ["no Python module 'no_file'"]),
    ],
)
def test_an_author_asks_for_the_tests_of_a_method(
    source: str, named: str, said: list[str], tmp_path: Path
) -> None:
    """``pytest tests/contract --method MODULE:NAME``, in the folder of the method."""
    (tmp_path / "my_method.py").write_text(source)
    words = [str(Path(__file__).parent), "--method", named, "--collect-only", "-v", "-p", "no:cacheprovider"]
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    listed = answer.stdout + answer.stderr
    assert all(each in listed for each in said)
    assert "dpsh" not in listed
    assert "mainstay" not in listed
    assert (answer.returncode == 0) == said[0].startswith("<Function")
