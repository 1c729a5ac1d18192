"""Identity of attacks, suites and runs: pinned digests, what changes them and what does not."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robusthash.apps.experiment.block_store import FolderStore
from robusthash.apps.experiment.config import load_config
from robusthash.attacks.base import Attack
from robusthash.attacks.guides import Mainstay
from robusthash.attacks.pgd import APGD
from robusthash.attacks.published import guided_apgd, pgd
from robusthash.attacks.ranking_losses import flip_apgd
from robusthash.attacks.tha import Prototype
from robusthash.attacks.threat_model import image_threat, named_threat
from robusthash.core import identity as scheme
from robusthash.core import registry
from robusthash.core.identity import describe, identity, marked_identity, scheme_of
from robusthash.core.registry import Card, build, catalogue, register
from robusthash.evaluation.attack_spec import AttackSpec, GradientAttack, RefinedAttack
from robusthash.models.gates import GateView
from robusthash.models.sfcl import BranchView, MaskNoise, MaskView
from robusthash.models.surrogate_gradients import NoiseAveraged, RepairIdentity, RepairLearnt, RepairMoved
from robusthash.robustness.specs.oracle_attacks import OracleAttack, noise_attacks, oracle_attacks
from robusthash.robustness.specs.published_suite import paper_suite
from robusthash.robustness.suite import TIERS, Suite, tier

ROOT = Path(__file__).resolve().parents[2]
GOLDEN: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("identity.json").read_text())
"""Digests and defaults as published. A digest that differs here makes every stored result of its suite
incomparable. Where that is meant, raise ``core.identity.SCHEME`` and write the file again:
``python tests/unit/test_identity.py``."""

PARTS = ("attack-guide", "attack-loss", "attack-search", "question-search", "gradient-view")
THREATS = ("img-linf-8", "img-linf-4", "img-l2", "img-l1-40", "txt-bow-2", "txt-token-2", "joint")
RECIPES = (
    "synthetic-csq",
    "synthetic-dcmh",
    "fashion-csq",
    "fashion-csq-saat",
    "fashion-csq-saah",
    "fashion-sfcl",
    "cifar10-dpsh",
    "cifar10-drfgd",
    "ucmerced-cpah",
    "ucmerced-labels-dpsh",
)
VIEWS = (
    GateView("one"),
    MaskView("hard"),
    BranchView("spatial"),
    NoiseAveraged(),
    NoiseAveraged(5, identity=True),
    MaskNoise(),
    RepairIdentity(),
    RepairMoved(),
    RepairLearnt(),
)


def suites() -> dict[str, Suite]:
    """Every tier under the usual threats; the published attacks under norms."""
    found = {f"{name} {threat}": tier(name, named_threat(threat)) for threat in THREATS for name in TIERS}
    objective = build("objective", "csq")
    for threat in ("img-linf-8", "img-l2"):
        found[f"paper {threat}"] = paper_suite(objective, named_threat(threat))
    return found


def specs() -> dict[str, AttackSpec]:
    """A line of each kind that stores blocks."""
    threat, objective = named_threat("img-linf-8"), build("objective", "csq")
    found: list[AttackSpec] = [*tier("standard").specs, *noise_attacks(threat), *oracle_attacks(threat, 1000)]
    found += [
        GradientAttack(str(describe(view)["name"]), guided_apgd(), view=view, view_name=repr(view))
        for view in VIEWS[:4]
    ]
    return {spec.name: spec for spec in [*found, *paper_suite(objective).specs]}


def attacks() -> dict[str, str]:
    """Registered attacks with their defaults: by this the blocks of ``evaluate`` are stored."""
    objective = build("objective", "csq")
    cards = [card for card in catalogue("attack") if card.make.__module__.startswith("robusthash.")]
    return {card.name: identity(build("attack", card.name, objective=objective).settings()) for card in cards}


def defaults() -> dict[str, dict[str, Any]]:
    """The defaults of every registered part, of an attack and of a search by questions, described."""
    found = {"Attack": defaults_of(Attack), "OracleAttack": defaults_of(OracleAttack)}
    for kind in PARTS:
        for card in catalogue(kind):
            if card.make.__module__.startswith("robusthash."):
                found[f"{kind}/{card.name}"] = defaults_of(card.make)
    return found


def defaults_of(make: Any) -> dict[str, Any]:
    if not dataclasses.is_dataclass(make):
        options = inspect.signature(make).parameters.items()
        return {name: describe(option.default) for name, option in options}
    fields = [f for f in dataclasses.fields(make) if f.compare]
    known = {f.name: describe(f.default) for f in fields if f.default is not dataclasses.MISSING}
    made = {
        f.name: describe(f.default_factory()) for f in fields if f.default_factory is not dataclasses.MISSING
    }
    return {**known, **made}


def written() -> dict[str, dict[str, Any]]:
    """What ``identity.json`` holds."""
    recipes = {name: load_config(ROOT / "recipes" / f"{name}.yaml").model_id() for name in RECIPES}
    folders = {name: FolderStore(Path()).folder(spec).name for name, spec in specs().items()}
    views = {repr(view): identity(view) for view in VIEWS}
    digests = {name: suite.digest() for name, suite in suites().items()}
    return {
        "suites": digests,
        "runs": recipes,
        "blocks of assess": folders,
        "blocks of evaluate": attacks(),
        "views": views,
        "defaults": defaults(),
    }


# ------------------------------------------------------------------------------------------------- pinned


@pytest.mark.parametrize("group", ["suites", "runs", "blocks of assess", "blocks of evaluate", "views"])
def test_digests_are_as_published(group: str) -> None:
    now = written()[group]
    assert {name: now.get(name) for name in GOLDEN[group]} == GOLDEN[group]


def test_defaults_of_registered_parts_are_as_published() -> None:
    """A changed default is in no digest, so it needs another scheme; a new option with a default does not."""
    now = defaults()
    for part, known in GOLDEN["defaults"].items():
        assert {name: now[part].get(name) for name in known} == known, part
    assert not now.keys() - GOLDEN["defaults"].keys(), "write identity.json again, which pins the new parts"


def test_shipped_parts_have_registered_names() -> None:
    for name, spec in specs().items():
        assert "code" not in set(keys(spec.settings())), name
    for card in catalogue("attack"):
        if card.make.__module__.startswith("robusthash."):
            settings = build("attack", card.name, objective=build("objective", "dpsh")).settings()
            assert "code" not in set(keys(settings)), card.name


def keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from keys(item)


# ------------------------------------------------------------------------------------- what does not change a
# digest


def rebuilt(cls: type, name: str, more: dict[str, Any]) -> type:
    """The class under another name, with more fields that have defaults."""
    fields = [(f.name, f.type, field(default=f.default)) for f in dataclasses.fields(cls)]
    fields += [(key, type(value), field(default=value)) for key, value in more.items()]
    made = dataclasses.make_dataclass(name, fields, bases=(cls,), frozen=True)
    made.__module__ = "elsewhere"
    return made


def put_in_place(monkeypatch: pytest.MonkeyPatch, cls: type, kind: str, made: type) -> None:
    """Register ``made`` by the name of ``cls``, as editing the source would."""
    ((key, card),) = [(k, c) for k, c in registry._CARDS.items() if c.make is cls]
    assert key[0] == kind
    monkeypatch.setitem(registry._CARDS, key, replace(card, make=made))


@pytest.mark.parametrize("more", [{}, {"added": 3}], ids=["renamed", "with another field"])
def test_a_renamed_class_or_another_field_with_a_default_keeps_every_digest(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    spec = GradientAttack("guided", guided_apgd(steps=7), view=NoiseAveraged(5), view_name="noise")
    suite = Suite("one", (spec, RefinedAttack("refined", flip_apgd())))
    before, folder, budget = (
        suite.digest(),
        FolderStore(Path()).folder(spec),
        identity(spec.attack.budget_settings()),
    )
    guide = rebuilt(Mainstay, "RenamedGuide", more)
    search = rebuilt(APGD, "RenamedSearch", more)
    view = rebuilt(NoiseAveraged, "RenamedView", more)
    put_in_place(monkeypatch, Mainstay, "attack-guide", guide)
    put_in_place(monkeypatch, APGD, "attack-search", search)
    put_in_place(monkeypatch, NoiseAveraged, "gradient-view", view)
    attack = replace(spec.attack, guide=guide(), search=search(7))
    other = replace(spec, attack=attack, view=view(5))
    assert repr(attack.search) != repr(spec.attack.search)
    refined = suite.specs[1]
    assert isinstance(refined, RefinedAttack)
    refined = replace(refined, attack=replace(refined.attack, search=search(refined.attack.search.steps)))  # type: ignore[attr-defined]
    assert Suite("one", (other, refined)).digest() == before
    assert FolderStore(Path()).folder(other) == folder
    assert identity(attack.budget_settings()) == budget
    if more:
        changed = replace(other, attack=replace(attack, search=search(7, added=4)))
        assert Suite("one", (changed, refined)).digest() != before
        assert FolderStore(Path()).folder(changed) != folder


def test_a_field_with_a_default_may_join_the_attack_itself() -> None:
    attack = guided_apgd()
    made = dataclasses.make_dataclass(
        "Wider", [("more", int, field(default=0))], bases=(type(attack),), frozen=True
    )
    parts = {f.name: getattr(attack, f.name) for f in dataclasses.fields(attack)}
    assert made(**parts).settings() == attack.settings()
    assert made(**parts, more=1).settings() != attack.settings()


def test_what_is_learned_takes_no_part() -> None:
    assert identity(Prototype(8, 8)) == identity(Prototype(8, 8))
    learned = Prototype(8, 8)
    learned.net.append(torch.nn.Linear(2, 2))
    assert identity(learned) == identity(Prototype(8, 8))
    assert identity(Prototype(8, 9)) != identity(Prototype(8, 8))
    assert describe(Prototype()) == {"kind": "attack-guide", "name": "prototype"}
    assert identity(replace(RepairLearnt(), nets={"image": torch.nn.Linear(2, 2)})) == identity(
        RepairLearnt()
    )


# ------------------------------------------------------------------------------------------ what changes a
# digest


def changed(value: Any) -> Any:
    """Another value of the type of an option."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else value + 0.5


@pytest.mark.parametrize("part", ["guide", "loss", "search"])
@pytest.mark.parametrize(
    "name", [c.name for c in catalogue("attack") if c.make.__module__.startswith("robusthash.")]
)
def test_every_option_of_a_part_changes_the_identity(name: str, part: str) -> None:
    attack = build("attack", name, objective=build("objective", "csq"))
    held = getattr(attack, part)
    if not dataclasses.is_dataclass(held):
        assert isinstance(held, Prototype)
        return
    seen = {identity(attack.settings())}
    options = [
        f.name
        for f in dataclasses.fields(held)
        if f.compare and isinstance(getattr(held, f.name), int | float)
    ]
    for option in options:
        made = object.__new__(type(held))  # without __post_init__, which may refuse the value
        for f in dataclasses.fields(held):
            object.__setattr__(made, f.name, getattr(held, f.name))
        object.__setattr__(made, option, changed(getattr(held, option)))
        other = object.__new__(type(attack))
        for f in dataclasses.fields(attack):
            object.__setattr__(other, f.name, made if f.name == part else getattr(attack, f.name))
        seen.add(identity(other.settings()))
    assert len(seen) == 1 + len(options), options


def test_everything_of_an_attack_changes_its_identity() -> None:
    attack = guided_apgd(steps=4)
    others = [
        replace(attack, name="other"),
        replace(attack, guide=Mainstay("ones")),
        replace(attack, loss=flip_apgd().loss, guide=flip_apgd().guide),
        replace(attack, search=APGD(5)),
        replace(attack, threat=image_threat(4 / 255, knowledge="W2")),
        replace(attack, targeted=True),
        replace(attack, restarts=2),
        replace(attack, selects=False),
        replace(pgd(build("objective", "csq")), name=attack.name),
        replace(pgd(build("objective", "dpsh")), name=attack.name),
        replace(pgd(build("objective", "dpsh")), name=attack.name, slope="published"),
    ]
    assert len({identity(one.settings()) for one in [attack, *others]}) == 1 + len(others)
    spec = GradientAttack("a", attack)
    more = [
        RefinedAttack("a", attack),
        RefinedAttack("a", attack).following([spec]),
        GradientAttack("a", attack, view=lambda victim: victim, view_name="itself"),
        GradientAttack("a", attack, view=lambda victim: victim, view_name="another"),
        GradientAttack("a", attack, view=NoiseAveraged(), view_name="noise"),
        GradientAttack("a", attack, view=NoiseAveraged(3), view_name="noise"),
    ]
    assert len({FolderStore(Path()).folder(one) for one in [spec, *more]}) == 1 + len(more)
    assert FolderStore(Path()).folder(spec) == FolderStore(Path()).folder(replace(spec, restarts=3)), (
        "blocks of more"
    )
    assert Suite("s", (spec,)).digest() != Suite("s", (replace(spec, restarts=3),)).digest()


def test_the_number_of_the_scheme_is_hashed_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    before = marked_identity(Mainstay())
    assert scheme_of(before) == scheme.SCHEME
    assert re.fullmatch(r"\d+-[0-9a-f]{12}", before)
    monkeypatch.setattr(scheme, "SCHEME", scheme.SCHEME + 1)
    assert identity(Mainstay()) != before.partition("-")[2]
    assert scheme_of(marked_identity(Mainstay())) == scheme.SCHEME
    assert scheme_of("dc571df17020") == scheme.FIRST


# ------------------------------------------------------------------------------------------------- own parts


@dataclass(frozen=True)
class OwnGuide:
    """A user's guide, which no name is registered for."""

    width: int
    slope: float = 1.0
    codes: Any = None
    learned: Any = field(default=None, compare=False)


class Stateful:
    def __init__(self, steps: int) -> None:
        self.steps = steps


class Stateless:
    """A search or a guide without parameters."""


def own_function(x: int) -> int:
    return x


def test_a_part_without_a_name_is_called_by_its_module() -> None:
    name = f"{__name__}:OwnGuide"
    assert describe(OwnGuide(3)) == {"code": name, "options": {"width": 3}}
    assert (
        describe(OwnGuide(3, 1)) == describe(OwnGuide(3, 1.0)) == describe(OwnGuide(3, learned=torch.ones(3)))
    )
    assert describe(OwnGuide(3, 0.5)) == {"code": name, "options": {"width": 3, "slope": 0.5}}
    assert describe(OwnGuide(3, codes=own_function))["options"]["codes"] == {
        "code": f"{__name__}:own_function"
    }
    assert describe(Stateless()) == {"code": f"{__name__}:Stateless"}
    nested = describe(OwnGuide(3, codes=[Mainstay(), {"a": np.float32(2)}]))["options"]["codes"]
    assert nested == [{"kind": "attack-guide", "name": "mainstay"}, {"a": 2}]


def test_tensors_are_told_apart_by_their_content() -> None:
    codes = [torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.int8)]
    assert len({identity(OwnGuide(3, codes=value)) for value in codes}) == 4
    assert identity(OwnGuide(3, codes=codes[0])) == identity(OwnGuide(3, codes=np.zeros((2, 3), np.float32)))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (lambda x: x, "function of a module or a dataclass"),
        (Stateful(3), "Stateful has state and is no dataclass.*identity_options"),
        (torch.nn.Linear(2, 2), "Linear has state and is no dataclass.*identity_options"),
        (partial(own_function, 3), "partial has state and is no dataclass"),
        (torch.ones(2).sum, "function of a module or a dataclass"),
    ],
)
def test_what_cannot_be_described_is_refused(value: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        identity(OwnGuide(3, codes=value))


def test_a_function_made_in_a_function_is_refused() -> None:
    def inner() -> None: ...

    with pytest.raises(TypeError, match="no name to identify it by"):
        describe(inner)


def test_a_registered_name_stands_for_a_part_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_CARDS", dict(registry._CARDS))
    register("attack-guide", "own-guide")(OwnGuide)
    assert isinstance(registry.card_of(OwnGuide), Card)
    assert describe(OwnGuide(3)) == {"kind": "attack-guide", "name": "own-guide", "options": {"width": 3}}


if __name__ == "__main__":
    Path(__file__).with_name("identity.json").write_text(
        json.dumps(written(), indent=1) + "\n", encoding="utf-8"
    )
