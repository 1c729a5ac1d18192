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
from robusthash.attacks.search import APGD
from robusthash.attacks.threat import image_threat, threat_on
from robusthash.core.hamming import sign
from robusthash.evaluation.adaptive import Adaptive, Staged, adaptive_lines
from robusthash.evaluation.bench import Bench, make_bench
from robusthash.evaluation.lines import Line
from robusthash.evaluation.observed import Observed, matches, mismatches, observed
from robusthash.models import Hasher, Purifier, build_hasher, purified
from robusthash.models.hasher import frozen
from robusthash.models.purified import Encode
from robusthash.models.repairs import RepairIdentity, RepairLearnt
from robusthash.models.views import MaskNoise, NoiseAveraged
from robusthash.objectives import DPSH

SMALL = {"name": "small", "width": 4, "grid": 1}
DATA = make_data(size=16)
THREAT = image_threat(16 / 255, knowledge="W2")
HONEST = Observed(False, False, False, False, False, 1.0)


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
def benches(base: Hasher) -> dict[str, Bench]:
    """A trained victim of each kind."""
    encoder = {"name": "sfcl", "spatial": SMALL, "frequency": SMALL, "width": 16}
    masked = jolted(build_hasher(bits=8, image=encoder))  # untrained: training so short collapses it to one code
    victims = {
        "gate": purified(base, {"image": "spectral-gate"}),
        "mask": masked,
        "purifier": purified(base, {"image": {"name": "drfgd-image", "width": 4}}),
        "randomised": before(base, Noisy(), "randomised"),
        "aside": before(base, Aside(), "purifier"),
    }
    return {name: make_bench(victim, DATA, queries=8, batch_size=8) for name, victim in victims.items()}


LINES = {
    "gate": [
        *("gate-frozen", "gate-minimum", "gate-one", "gate-smooth", "band-low", "band-mid", "band-high"),
        "gate-opening",
    ],
    "mask": ["mask-hard", "mask-noise-20", "branch-spatial", "branch-frequency"],
    "purifier": ["repair-identity", "repair-learnt", "two-stage", "eot-20"],
    "randomised": ["repair-identity", "repair-learnt", "two-stage", "eot-20"],
}


def names(lines: tuple[Line, ...]) -> list[str]:
    return [line.name for line in lines]


@pytest.mark.parametrize("kind", LINES)
def test_lines_of_a_class(kind: str, benches: dict[str, Bench]) -> None:
    victim = benches[kind].victim
    assert victim.declared == kind
    lines = adaptive_lines(victim, None, THREAT, 4)
    assert names(lines) == LINES[kind]
    assert names(adaptive_lines(victim, DPSH(), THREAT, 4)) == [*LINES[kind], "trained-objective"]
    settings = [json.dumps(line.settings(), sort_keys=True) for line in lines]
    assert not any('"code":' in text for text in settings), "all parts have registered names"
    assert len(set(settings)) == len(lines)
    assert {line.kind for line in lines} == {"adaptive"}
    assert lines[0].at(image_threat(0.1)).threat == image_threat(0.1, knowledge="W2")
    unsaid = threat_on("text", knowledge="W2")
    assert names(adaptive_lines(victim, None, unsaid)) == (["eot-20"] if kind == "randomised" else [])


def short(line: Line) -> Line:
    """The same line with few looks and little learning."""
    if isinstance(line, Adaptive) and isinstance(line.view, NoiseAveraged | MaskNoise):
        return replace(line, view=replace(line.view, draws=2))
    if isinstance(line, Adaptive) and isinstance(line.view, RepairLearnt):
        return replace(line, view=RepairLearnt(4))
    return line


@pytest.mark.parametrize("kind", LINES)
def test_every_line_runs(kind: str, benches: dict[str, Bench]) -> None:
    """It stays in the ball, reports the victim's own codes of its inputs, counts its passes and can be repeated."""
    bench = benches[kind]
    batch = bench.batch(0)
    for line in adaptive_lines(bench.victim, DPSH(), THREAT, 4, 2):
        line = short(line)
        fitted = line.fitted(bench)
        assert fitted.settings() == line.settings(), "what is learned takes no part"
        found = fitted.run(bench, 0, 0)
        THREAT.verify({"image": found.inputs}, batch.inputs)
        assert not torch.equal(found.inputs, batch.inputs["image"])
        if kind != "randomised":
            with frozen(bench.victim), torch.no_grad():
                own = sign(bench.victim({"image": found.inputs})["image"].logits).to(torch.int8)
            assert torch.equal(found.signs[:, 0], own)
        forward, backward, oracle = found.passes[0].tolist()
        seen = fitted.view(bench.victim) if isinstance(fitted, Adaptive) and fitted.view else None
        expected = tuple(4 * price for price in seen.passes) if seen is not None else (4, 4)
        assert (forward, backward, oracle) == (*expected, 0) or isinstance(line, Staged)
        assert line.restarts == 2
        if line.name in ("gate-frozen", "two-stage", "repair-learnt", "mask-noise-20", "eot-20"):
            assert torch.equal(short(line).fitted(bench).run(bench, 0, 0).inputs, found.inputs)
            assert not torch.equal(fitted.run(bench, 0, 1).inputs, found.inputs)


def test_the_second_stage_starts_where_the_first_ended(benches: dict[str, Bench]) -> None:
    bench = benches["mask"]
    line = next(x for x in adaptive_lines(bench.victim, None, THREAT, 8) if x.name == "branch-spatial")
    assert isinstance(line, Staged)
    first = line.first.run(bench, 0, 0)
    starts: list[Tensor] = []
    handle = bench.victim.register_forward_pre_hook(lambda module, args: starts.append(args[0]["image"].detach()))
    found = line.then.run(bench, 0, 0, {"image": first.inputs})
    handle.remove()
    assert torch.allclose(starts[0], first.inputs)
    whole = line.run(bench, 0, 0)
    assert torch.equal(whole.inputs, found.inputs)
    assert torch.equal(whole.passes, first.passes + found.passes)
    with pytest.raises(ValueError, match="have the threats"):
        replace(line, first=line.first.at(image_threat(0.1)))


def test_a_purifier_out_of_the_graph_falls_to_the_adaptive_lines(benches: dict[str, Bench]) -> None:
    """A plain attack cannot even start; the lines for what was observed bring MAP down."""
    bench = benches["aside"]
    seen = observed(bench.victim, bench.batch(0).inputs)
    assert seen.cut
    assert not seen.gradient_reaches_input
    assert matches("purifier", seen) == []
    white = Adaptive("white", Attack("white", Mainstay(), ScaleFree(), APGD(4), THREAT, selects=True))
    with pytest.raises(RuntimeError, match="does not require grad"):
        white.run(bench, 0, 0)
    lines = adaptive_lines(bench.victim, None, THREAT, 10, seen=seen)
    assert names(lines) == ["repair-identity", "repair-learnt", "two-stage"]  # nothing random, so nothing to average
    clean = bench.query.signs()[:8]
    metric = bench.select(bench.query_labels[:8], -1)
    for line in lines:
        signs = line.fitted(bench).run(bench, 0, 0).signs[:, 0]
        assert float(metric(signs.float()).mean()) > float(metric(clean.float()).mean()) + 0.05
    assert any(isinstance(line, Adaptive) and isinstance(line.view, RepairIdentity) for line in lines)


def test_what_cannot_be_attacked_so_is_refused(base: Hasher) -> None:
    def declaring(declared: str) -> Hasher:
        return Hasher(dict(base.encoders), dict(base.heads), {}, declared)  # type: ignore[arg-type]

    for honest in ("plain", "adversarial"):
        assert adaptive_lines(declaring(honest), DPSH(), THREAT) == ()
    with pytest.raises(ValueError, match="the package has no detector"):
        adaptive_lines(declaring("detector"), None, THREAT)
    for declared, reason in (("gate", "has no purifier"), ("purifier", "has no purifier"), ("mask", "has none")):
        with pytest.raises(ValueError, match=reason):
            adaptive_lines(declaring(declared), None, THREAT)
    with pytest.raises(ValueError, match="need W0, W1 or W2, not B2"):
        adaptive_lines(base, None, image_threat(knowledge="B2"))
    noisy = before(base, Noisy(), "plain")
    assert "eot-20" in names(adaptive_lines(noisy, None, THREAT, seen=replace(HONEST, randomised=True)))


def test_without_labels_lines_leave_the_own_code(benches: dict[str, Bench]) -> None:
    bench = benches["gate"]
    line = adaptive_lines(bench.victim, DPSH(), replace(THREAT, knowledge="W0"), 3)
    assert "trained-objective" not in names(line)
    assert line[0].run(bench, 0, 0).representative.shape == (8, 1, 8)


# ---------------------------------------------------------------------------------------------------- observed


class Cut(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.encoder(x.detach())


def test_observed_behaviour(base: Hasher, benches: dict[str, Bench]) -> None:
    x = {"image": DATA.query.batch(torch.arange(8)).inputs["image"]}
    assert observed(base, x) == HONEST
    seen = {name: observed(bench.victim, x) for name, bench in benches.items()}
    assert seen["gate"] == replace(HONEST, gate=True)
    assert seen["mask"] == replace(HONEST, mask=True)
    assert seen["purifier"] == replace(HONEST, purifier=True)
    assert seen["randomised"] == replace(HONEST, purifier=True, randomised=True)
    assert seen["aside"] == replace(HONEST, purifier=True, reached=0.0)
    assert observed(before(base, Descending(), "purifier"), x) == replace(HONEST, purifier=True, inner_gradients=True)
    cut = Hasher({"image": Cut(base.encoders["image"])}, dict(base.heads))
    assert observed(cut, x) == replace(HONEST, reached=0.0)
    assert not mismatches(base, x)
    assert [reason[:8] for reason in mismatches(cut, x)] == ["no gradi"]
    with pytest.raises(ValueError, match="at least two looks"):
        observed(base, x, looks=1)


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
        ("detector", {}, "the package has none"),
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
