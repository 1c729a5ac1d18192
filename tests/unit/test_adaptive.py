"""Adaptive lines by defense: which there are, that each runs and keeps the ball, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from helpers import jolted, make_data, trained_hasher
from torch import Tensor, nn

from robusthash.attacks.base import Attack
from robusthash.attacks.guides import Mainstay
from robusthash.attacks.losses import ScaleFree
from robusthash.attacks.pgd import APGD
from robusthash.attacks.threat_model import image_threat, threat_on
from robusthash.core.hamming import sign
from robusthash.evaluation.attack_spec import AttackSpec
from robusthash.evaluation.context import EvaluationContext, make_context
from robusthash.models import Hasher, Purifier, build_hasher, purified
from robusthash.models.hasher import frozen
from robusthash.models.purifier import Encode
from robusthash.models.sfcl import MaskNoise
from robusthash.models.surrogate_gradients import NoiseAveraged, RepairIdentity, RepairLearnt
from robusthash.objectives import DPSH
from robusthash.robustness.specs.adaptive_attacks import Adaptive, Staged, adaptive_attacks
from robusthash.robustness.victim_behaviour import VictimBehaviour, matches, mismatches, observed

SMALL = {"name": "small", "width": 4, "grid": 1}
DATA = make_data(size=16)
THREAT = image_threat(16 / 255, knowledge="W2")
HONEST = VictimBehaviour(False, False, False, False, False, 1.0)


class Aside(Purifier):
    """Sixteen grey levels, and a graph that was cut."""

    def forward(self, x: Tensor, encode: Encode) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            return torch.round(x * 15) / 15, {}


class Noisy(Purifier):
    declares = "randomised"

    def forward(self, x: Tensor, encode: Encode) -> tuple[Tensor, dict[str, Tensor]]:
        return x + 0.1 * torch.rand_like(x), {}


class Descending(Purifier):
    """One step down a loss of its own, through the net."""

    def forward(self, x: Tensor, encode: Encode) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.enable_grad():
            leaf = x if x.requires_grad else x.detach().requires_grad_(True)
            loss = (encode(leaf).logits.square() - 1).square().sum()
            (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        return x - 0.01 * grad, {}


def before(base: Hasher, purifier: Purifier, declared: str) -> Hasher:
    return Hasher(dict(base.encoders), dict(base.heads), {}, declared, {"image": purifier}).eval()  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def base() -> Hasher:
    return trained_hasher(DATA)


@pytest.fixture(scope="module")
def contexts(base: Hasher) -> dict[str, EvaluationContext]:
    """A trained victim of each kind."""
    encoder = {"name": "sfcl", "spatial": SMALL, "frequency": SMALL, "width": 16}
    masked = jolted(
        build_hasher(bits=8, image=encoder)
    )  # untrained: training so short collapses it to one code
    victims = {
        "gate": purified(base, {"image": "spectral-gate"}),
        "mask": masked,
        "purifier": purified(base, {"image": {"name": "drfgd-image", "width": 4}}),
        "randomised": before(base, Noisy(), "randomised"),
        "aside": before(base, Aside(), "purifier"),
    }
    return {name: make_context(victim, DATA, queries=8, batch_size=8) for name, victim in victims.items()}


LINES = {
    "gate": [
        *("gate-frozen", "gate-minimum", "gate-one", "gate-smooth", "band-low", "band-mid", "band-high"),
        "gate-opening",
    ],
    "mask": ["mask-hard", "mask-noise-20", "branch-spatial", "branch-frequency"],
    "purifier": ["repair-identity", "repair-learnt", "two-stage", "eot-20"],
    "randomised": ["repair-identity", "repair-learnt", "two-stage", "eot-20"],
}


def names(specs: tuple[AttackSpec, ...]) -> list[str]:
    return [spec.name for spec in specs]


@pytest.mark.parametrize("kind", LINES)
def test_lines_of_a_class(kind: str, contexts: dict[str, EvaluationContext]) -> None:
    victim = contexts[kind].victim
    assert victim.declared == kind
    specs = adaptive_attacks(victim, None, THREAT, 4)
    assert names(specs) == LINES[kind]
    assert names(adaptive_attacks(victim, DPSH(), THREAT, 4)) == [*LINES[kind], "trained-objective"]
    settings = [json.dumps(spec.settings(), sort_keys=True) for spec in specs]
    assert not any('"code":' in text for text in settings), "all parts have registered names"
    assert len(set(settings)) == len(specs)
    assert {spec.kind for spec in specs} == {"adaptive"}
    assert specs[0].at(image_threat(0.1)).threat == image_threat(0.1, knowledge="W2")
    unsaid = threat_on("text", knowledge="W2")
    assert names(adaptive_attacks(victim, None, unsaid)) == (["eot-20"] if kind == "randomised" else [])


def short(spec: AttackSpec) -> AttackSpec:
    """The same line with few looks and little learning."""
    if isinstance(spec, Adaptive) and isinstance(spec.view, NoiseAveraged | MaskNoise):
        return replace(spec, view=replace(spec.view, draws=2))
    if isinstance(spec, Adaptive) and isinstance(spec.view, RepairLearnt):
        return replace(spec, view=RepairLearnt(4))
    return spec


@pytest.mark.parametrize("kind", LINES)
def test_every_line_runs(kind: str, contexts: dict[str, EvaluationContext]) -> None:
    """It stays in the ball, reports the victim's own codes of its inputs, counts its passes and can be
    repeated."""
    context = contexts[kind]
    batch = context.batch(0)
    for spec in adaptive_attacks(context.victim, DPSH(), THREAT, 4, 2):
        spec = short(spec)
        fitted = spec.fitted(context)
        assert fitted.settings() == spec.settings(), "what is learned takes no part"
        found = fitted.run(context, 0, 0)
        THREAT.verify({"image": found.inputs}, batch.inputs)
        assert not torch.equal(found.inputs, batch.inputs["image"])
        if kind != "randomised":
            with frozen(context.victim), torch.no_grad():
                own = sign(context.victim({"image": found.inputs})["image"].logits).to(torch.int8)
            assert torch.equal(found.signs[:, 0], own)
        forward, backward, oracle = found.passes[0].tolist()
        seen = fitted.view(context.victim) if isinstance(fitted, Adaptive) and fitted.view else None
        expected = tuple(4 * price for price in seen.passes) if seen is not None else (4, 4)
        assert (forward, backward, oracle) == (*expected, 0) or isinstance(spec, Staged)
        assert spec.restarts == 2
        if spec.name in ("gate-frozen", "two-stage", "repair-learnt", "mask-noise-20", "eot-20"):
            assert torch.equal(short(spec).fitted(context).run(context, 0, 0).inputs, found.inputs)
            assert not torch.equal(fitted.run(context, 0, 1).inputs, found.inputs)


def test_the_second_stage_starts_where_the_first_ended(contexts: dict[str, EvaluationContext]) -> None:
    context = contexts["mask"]
    spec = next(x for x in adaptive_attacks(context.victim, None, THREAT, 8) if x.name == "branch-spatial")
    assert isinstance(spec, Staged)
    first = spec.first.run(context, 0, 0)
    starts: list[Tensor] = []
    handle = context.victim.register_forward_pre_hook(
        lambda module, args: starts.append(args[0]["image"].detach())
    )
    found = spec.then.run(context, 0, 0, {"image": first.inputs})
    handle.remove()
    assert torch.allclose(starts[0], first.inputs)
    whole = spec.run(context, 0, 0)
    assert torch.equal(whole.inputs, found.inputs)
    assert torch.equal(whole.passes, first.passes + found.passes)
    with pytest.raises(ValueError, match="have the threats"):
        replace(spec, first=spec.first.at(image_threat(0.1)))


def test_a_purifier_out_of_the_graph_falls_to_the_adaptive_lines(
    contexts: dict[str, EvaluationContext],
) -> None:
    """A plain attack cannot even start; the lines for what was observed bring MAP down."""
    context = contexts["aside"]
    seen = observed(context.victim, context.batch(0).inputs)
    assert seen.cut
    assert not seen.gradient_reaches_input
    assert matches("purifier", seen) == []
    white = Adaptive("white", Attack("white", Mainstay(), ScaleFree(), APGD(4), THREAT, selects=True))
    with pytest.raises(ValueError, match="no gradient reaches the image of this victim"):
        white.run(context, 0, 0)
    specs = adaptive_attacks(context.victim, None, THREAT, 10, behaviour=seen)
    assert names(specs) == [
        "repair-identity",
        "repair-learnt",
        "two-stage",
    ]  # nothing random, so nothing to average
    clean = context.query.signs()[:8]
    metric = context.select(context.query_labels[:8], -1)
    for spec in specs:
        signs = spec.fitted(context).run(context, 0, 0).signs[:, 0]
        assert float(metric(signs.float()).mean()) > float(metric(clean.float()).mean()) + 0.05
    assert any(isinstance(spec, Adaptive) and isinstance(spec.view, RepairIdentity) for spec in specs)
    *_, trained = adaptive_attacks(context.victim, DPSH(), THREAT, 10, behaviour=seen)
    assert trained.name == "trained-objective"
    assert trained.run(context, 0, 0).signs.shape == (8, 1, 8)


def test_what_cannot_be_attacked_so_is_refused(base: Hasher) -> None:
    def declaring(declared: str) -> Hasher:
        return Hasher(dict(base.encoders), dict(base.heads), {}, declared)  # type: ignore[arg-type]

    for honest in ("plain", "adversarial"):
        assert adaptive_attacks(declaring(honest), DPSH(), THREAT) == ()
    with pytest.raises(ValueError, match="robusthash detect"):
        adaptive_attacks(declaring("detector"), None, THREAT)
    for declared in ("gate", "purifier", "mask"):
        with pytest.raises(ValueError, match=f"declares '{declared}' and has no such part"):
            adaptive_attacks(declaring(declared), None, THREAT)
    with pytest.raises(ValueError, match="declares 'moat', for which no file registers adaptive attacks"):
        adaptive_attacks(declaring("moat"), None, THREAT)
    with pytest.raises(ValueError, match="need W0, W1 or W2, not B2"):
        adaptive_attacks(base, None, image_threat(knowledge="B2"))
    noisy = before(base, Noisy(), "plain")
    assert "eot-20" in names(
        adaptive_attacks(noisy, None, THREAT, behaviour=replace(HONEST, randomised=True))
    )


def test_without_labels_lines_leave_the_own_code(contexts: dict[str, EvaluationContext]) -> None:
    context = contexts["gate"]
    spec = adaptive_attacks(context.victim, DPSH(), replace(THREAT, knowledge="W0"), 3)
    assert "trained-objective" not in names(spec)
    assert spec[0].run(context, 0, 0).representative.shape == (8, 1, 8)


# ----------------------------------------------------------------------------------------------------
# observed


class Cut(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.encoder(x.detach())


def test_observed_behaviour(base: Hasher, contexts: dict[str, EvaluationContext]) -> None:
    x = {"image": DATA.query.batch(torch.arange(8)).inputs["image"]}
    assert observed(base, x) == HONEST
    seen = {name: observed(context.victim, x) for name, context in contexts.items()}
    assert seen["gate"] == replace(HONEST, gate=True)
    assert seen["mask"] == replace(HONEST, mask=True)
    assert seen["purifier"] == replace(HONEST, purifier=True)
    assert seen["randomised"] == replace(HONEST, purifier=True, randomised=True)
    assert seen["aside"] == replace(HONEST, purifier=True, reached=0.0)
    assert observed(before(base, Descending(), "purifier"), x) == replace(
        HONEST, purifier=True, inner_gradients=True
    )
    cut = Hasher({"image": Cut(base.encoders["image"])}, dict(base.heads))
    assert observed(cut, x) == replace(HONEST, reached=0.0)
    assert not mismatches(base, x)
    assert [reason[:8] for reason in mismatches(cut, x)] == ["no gradi"]
    with pytest.raises(ValueError, match="at least two passes"):
        observed(base, x, passes=1)


@pytest.mark.parametrize(
    ("declared", "change", "reason"),
    [
        ("plain", {"randomised": True}, "codes change between calls"),
        ("randomised", {}, "codes did not change"),
        ("adversarial", {"purifier": True}, "declare 'purifier'"),
        ("plain", {"gate": True}, "declare 'gate'"),
        ("plain", {"mask": True}, "declare 'mask'"),
        ("gate", {}, "'gate' is declared, and none"),
        ("mask", {}, "'mask' is declared, and none"),
        ("purifier", {}, "'purifier' is declared, and none"),
        ("plain", {"inner_gradients": True}, "takes gradients itself"),
        ("adversarial", {"reached": 0.0}, "no gradient reaches"),
        ("adversarial", {"reached": 0.9}, "a gradient reaches 90% of the items only"),
        ("detector", {}, "no part of a hasher"),
    ],
)
def test_a_wrong_class_is_named(declared: str, change: dict[str, bool | float], reason: str) -> None:
    reasons = matches(declared, replace(HONEST, **change))  # type: ignore[arg-type]
    assert len(reasons) == 1
    assert reason in reasons[0]


@pytest.mark.parametrize(
    ("declared", "change"),
    [
        ("plain", {}),
        ("adversarial", {}),
        ("gate", {"gate": True}),
        ("mask", {"mask": True, "gate": True}),
        ("purifier", {"purifier": True, "inner_gradients": True, "reached": 0.0}),
        ("randomised", {"purifier": True, "randomised": True}),
    ],
)
def test_a_right_class_is_not(declared: str, change: dict[str, bool | float]) -> None:
    assert matches(declared, replace(HONEST, **change)) == []  # type: ignore[arg-type]
