"""Balls, threats and the verification that the evaluator relies on; the PGD search against an independent
library."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torchattacks
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor, nn

from robusthash.attacks.pgd import PGD
from robusthash.attacks.threat_model import Ball, Threat, image_threat
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch

EPS = 8 / 255


def images(seed: int = 0, count: int = 4) -> Tensor:
    return torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))


# --- balls


@pytest.mark.parametrize(
    ("norm", "eps"),
    [("linf", -0.1), ("linf", 8), ("linf", 1.001), ("linf", float("nan")), ("l2", -1), ("l2", float("nan"))],
)
def test_a_budget_outside_the_range_is_refused(norm: str, eps: float) -> None:
    with pytest.raises(ValueError, match="8/255"):
        Ball(norm, eps)  # type: ignore[arg-type]


def test_budgets_are_measured_in_the_width_of_the_range() -> None:
    Ball("linf", 8, bounds=(0.0, 255.0))
    Ball("linf", 1.0)
    Ball("l2", 3.5)
    with pytest.raises(ValueError, match="'l0'"):
        Ball("l0", 0.1)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    eps=st.floats(0, 1),
    norm=st.sampled_from(["linf", "l2", "l1"]),
    far=st.floats(0.01, 5),
)
def test_projection_ends_inside_and_keeps_what_is_inside(
    seed: int, eps: float, norm: str, far: float
) -> None:
    ball, origin = Ball(norm, eps), images(seed).double()
    noise = far * torch.randn(
        origin.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64
    )
    x = ball.project(origin + noise, origin)
    assert float(ball.size(x - origin).max()) <= eps + 1e-12
    assert float(x.min()) >= 0
    assert float(x.max()) <= 1
    torch.testing.assert_close(ball.project(x, origin), x)
    assert torch.equal(ball.project(origin, origin), origin)


def test_l2_projection_scales_and_then_cuts() -> None:
    origin = torch.tensor([[0.5, 0.5], [0.5, 0.95]]).view(2, 1, 1, 2)
    moved = origin + torch.tensor([[0.3, 0.4], [0.3, 0.4]]).view(2, 1, 1, 2)
    found = Ball("l2", 0.25).project(moved, origin).flatten(1)
    torch.testing.assert_close(found, torch.tensor([[0.65, 0.7], [0.65, 1.0]]))
    short = origin + 0.01
    assert torch.equal(Ball("l2", 0.25).project(short, origin)[0], short[0])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), eps=st.floats(0.01, 3), far=st.floats(0.05, 2))
def test_l1_projection_is_the_nearest_point_of_ball_and_box(seed: int, eps: float, far: float) -> None:
    """Against a general solver: least squares over the change split into its positive and its negative
    part."""
    generator = np.random.default_rng(seed)
    origin = generator.random(12)
    wanted = origin + far * generator.standard_normal(12)

    def away(parts: np.ndarray) -> float:
        return float(np.square(origin + parts[:12] - parts[12:] - wanted).sum())

    def slope(parts: np.ndarray) -> np.ndarray:
        pull = 2 * (origin + parts[:12] - parts[12:] - wanted)
        return np.concatenate([pull, -pull])

    room = [(0.0, 1.0 - value) for value in origin] + [(0.0, value) for value in origin]
    budget = {"type": "ineq", "fun": lambda parts: eps - parts.sum(), "jac": lambda parts: -np.ones(24)}
    solved = minimize(
        away,
        np.zeros(24),
        jac=slope,
        bounds=room,
        constraints=[budget],
        method="SLSQP",
        options={"ftol": 1e-14},
    )
    ball, at = Ball("l1", eps), torch.tensor(origin).view(1, 1, 3, 4)
    found = ball.project(torch.tensor(wanted).view(1, 1, 3, 4), at)
    assert float(ball.size(found - at)) <= eps + 1e-12
    distance = float(np.square(found.flatten().numpy() - wanted).sum())
    assert distance <= solved.fun + 1e-7  # no other feasible point is nearer
    np.testing.assert_allclose(found.flatten().numpy(), origin + solved.x[:12] - solved.x[12:], atol=2e-3)


def test_l1_projection_is_the_soft_threshold_cut_at_the_range() -> None:
    origin = torch.tensor([0.5, 0.5, 0.9, 0.5]).view(1, 1, 1, 4)
    moved = origin + torch.tensor([0.6, -0.3, 0.4, 0.1]).view(1, 1, 1, 4)
    found = Ball("l1", 0.6).project(moved, origin) - origin
    # t = 0.2: 0.4 and 0.1 of the first two, the third is cut at its room of 0.1, the fourth vanishes
    torch.testing.assert_close(found.flatten(), torch.tensor([0.4, -0.1, 0.1, 0.0]))
    assert torch.equal(Ball("l1", 0.0).project(moved, origin), origin)
    torch.testing.assert_close(Ball("l1", 99.0).project(moved, origin), moved.clamp(0, 1))


def test_l1_projection_in_parts_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    origin = images(count=7)
    moved = origin + torch.randn(origin.shape, generator=torch.Generator().manual_seed(3))
    whole = Ball("l1", 2.0).project(moved, origin)
    monkeypatch.setattr("robusthash.attacks.budgets._BREAKPOINTS", 2 * origin[0].numel() * 2)
    assert torch.equal(Ball("l1", 2.0).project(moved, origin), whole)


def test_l1_projection_of_large_images_stays_within_what_is_verified() -> None:
    origin = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    threat = image_threat(60, "l1")
    for change in (torch.randn(origin.shape, generator=torch.Generator().manual_seed(1)), torch.tensor(0.3)):
        threat.verify(threat.project({"image": origin + change}, {"image": origin}), {"image": origin})


def test_a_step_of_l1_is_sparse_and_passes_over_what_is_at_the_end_of_the_range() -> None:
    ball, grad = Ball("l1", 1.0), torch.randn(3, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    step = ball.steepest(grad)
    assert (step != 0).flatten(1).sum(1).tolist() == [3, 3, 3]  # one entry in a hundred
    torch.testing.assert_close(ball.size(step), torch.ones(3))
    largest = grad.flatten(1).abs().topk(3, dim=1)
    expected = grad.flatten(1).gather(1, largest.indices).sign() / 3
    assert torch.equal(step.flatten(1).gather(1, largest.indices), expected)
    at = torch.full_like(grad, 0.5)
    top = int(largest.indices[0, 0])
    at[0].view(-1)[top] = float(grad[0].flatten()[top] > 0)  # nothing is left to gain there
    passed = ball.steepest(grad, at)
    assert float(passed[0].flatten()[top]) == 0.0
    torch.testing.assert_close(ball.size(passed), torch.ones(3))
    assert torch.equal(passed[1:], step[1:])
    assert torch.equal(ball.steepest(torch.zeros_like(grad)), torch.zeros_like(grad))


def test_random_corners_are_signs_and_of_l1_few_entries_that_differ_by_item() -> None:
    drawn = torch.rand(5, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    signs = image_threat().corner({"image": drawn})["image"]
    assert torch.equal(signs, (drawn >= 0.5).float() * 2 - 1)
    sparse = image_threat(12, "l1").corner({"image": drawn})["image"]
    assert len({tuple(row.nonzero().flatten().tolist()) for row in sparse.flatten(1)}) == 5


def test_linf_projection_by_coordinates() -> None:
    origin = torch.tensor([[0.5, 0.02, 0.99]]).view(1, 1, 1, 3)
    found = Ball("linf", 0.1).project(origin + torch.tensor([0.3, -0.3, 0.05]).view(1, 1, 1, 3), origin)
    torch.testing.assert_close(found.flatten(), torch.tensor([0.6, 0.0, 1.0]))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_steepest_step_has_unit_size_and_the_best_slope(norm: str) -> None:
    ball, grad = Ball(norm, 1.0), torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    step = ball.steepest(grad)
    torch.testing.assert_close(ball.size(step), torch.ones(3))
    slope = (grad * step).flatten(1).sum(1)
    torch.testing.assert_close(
        slope, grad.flatten(1).norm(p=1 if norm == "linf" else 2, dim=1)
    )  # the dual norm
    assert torch.equal(ball.steepest(torch.zeros(1, 2, 4, 4)), torch.zeros(1, 2, 4, 4))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_random_start_is_inside_keyed_and_spread(norm: str) -> None:
    ball, origin = Ball(norm, 0.1), torch.full((200, 1, 4, 4), 0.5)
    ids = torch.arange(200)
    start = ball.random_start(origin, ids, Draws(0))
    sizes = ball.size(start - origin)
    assert float(sizes.max()) <= 0.1 + 1e-6
    assert float(sizes.max()) > 0.09
    assert abs(float((start - origin).mean())) < 0.002
    if norm != "linf":
        assert float(sizes.min()) < 0.02  # lengths are spread, too
    order = torch.randperm(200)
    assert torch.equal(ball.random_start(origin, ids[order], Draws(0)), start[order])
    assert not torch.equal(ball.random_start(origin, ids, Draws(1)), start)
    assert torch.equal(Ball(norm, 0.0).random_start(origin, ids, Draws(0)), origin)


# --- threats


@pytest.mark.parametrize(
    ("threat", "name"),
    [
        (image_threat(), "img-linf-8"),
        (image_threat(0.5, "l2"), "img-l2-0.5"),
        (image_threat(12, "l1"), "img-l1-12"),
        (image_threat(1 / 510), "img-linf-0.5"),
        (Threat({"text": Ball("linf", 0.05), "image": Ball("linf", EPS)}), "img-linf-8+txt-linf-0.05"),
        (Threat({"image": Ball("linf", EPS)}, name="mine"), "mine"),
        (image_threat().scaled(0.5), "img-linf-4"),
    ],
)
def test_names(threat: Threat, name: str) -> None:
    assert threat.name == name


def test_a_threat_needs_a_modality() -> None:
    with pytest.raises(ValueError, match="at least one modality"):
        Threat({})


def test_scaling_keeps_everything_else() -> None:
    threat = Threat({"image": Ball("linf", EPS, (0.1, 0.9))}, knowledge="W2", side="database")
    half = threat.scaled(0.5)
    assert half == replace(
        threat, balls={"image": Ball("linf", EPS / 2, (0.1, 0.9))}, name="img-linf-4 in [0.1, 0.9]"
    )
    with pytest.raises(ValueError, match="outside"):
        threat.scaled(100.0)


def test_only_named_modalities_are_handled() -> None:
    threat = image_threat()
    inputs = {"image": images(), "text": torch.rand(4, 3)}
    for made in (
        threat.project(inputs, inputs),
        threat.random_start(inputs, torch.arange(4), Draws(0)),
        threat.steepest(inputs),
    ):
        assert set(made) == {"image"}


def test_verify_accepts_the_border() -> None:
    clean = images()
    threat = image_threat(EPS)
    corner = threat.project({"image": clean + 1.0}, {"image": clean})
    threat.verify(corner, {"image": clean})
    threat.verify({"image": clean, "text": torch.ones(4, 2)}, {"image": clean, "text": torch.ones(4, 2)})
    l2 = image_threat(0.5, "l2")
    l2.verify(l2.project({"image": clean + 1.0}, {"image": clean}), {"image": clean})


def one_pixel(value: float) -> Tensor:
    x = torch.full((4, 3, 5, 5), 0.5)
    x[2, 1, 3, 3] = value
    return x


@pytest.mark.parametrize(
    ("norm", "x", "said"),
    [
        ("linf", one_pixel(0.5 + EPS + 1e-5), "beyond 0.0313"),
        ("linf", one_pixel(float("nan")), "NaN or infinite"),
        ("linf", one_pixel(float("inf")), "NaN or infinite"),
        ("l2", one_pixel(0.5 + EPS + 1e-3), "under l2, beyond 0.0313"),
        ("linf", one_pixel(0.5).double(), "float64"),
        ("linf", one_pixel(0.5)[:, :, :4], "not torch.float32"),
        ("linf", one_pixel(0.5)[:3], "not torch.float32"),
    ],
)
def test_verify_catches(norm: str, x: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        image_threat(EPS, norm).verify({"image": x}, {"image": torch.full((4, 3, 5, 5), 0.5)})


@pytest.mark.parametrize("side", [-1e-4, 1 + 1e-4])
def test_verify_catches_inputs_out_of_range(side: float) -> None:
    clean = torch.full((1, 3, 5, 5), 0.001 if side < 0 else 0.999)
    with pytest.raises(ValueError, match="leaves the range"):
        image_threat(EPS).verify({"image": torch.full_like(clean, side)}, {"image": clean})


def test_verify_catches_a_touched_modality() -> None:
    clean = {"image": images(), "text": torch.zeros(4, 3)}
    touched = {**clean, "text": clean["text"] + 1e-7}
    with pytest.raises(ValueError, match="touched 'text', which img-linf-8 does not allow"):
        image_threat().verify(touched, clean)


# --- an independent implementation


@pytest.mark.parametrize(
    ("eps", "step_size", "steps"), [(8 / 255, 2 / 255, 7), (0.3, 0.05, 10), (8 / 255, 8 / 255, 1)]
)
def test_pgd_equals_torchattacks(eps: float, step_size: float, steps: int) -> None:
    torch.manual_seed(0)
    classifier = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(54, 4)).eval()
    x, labels = images(3, 6), torch.tensor([0, 1, 2, 3, 0, 1])

    def score(inputs: dict[str, Tensor], progress: float) -> tuple[Tensor, Tensor]:
        logits = classifier(inputs["image"])
        return nn.functional.cross_entropy(logits, labels, reduction="none"), logits

    search = PGD(steps, step_size, random_start=False)
    batch = Batch({"image": x}, None, torch.arange(6))
    ours = search(score, batch, image_threat(eps), Draws(0), None, None).inputs["image"]
    theirs = torchattacks.PGD(classifier, eps=eps, alpha=step_size, steps=steps, random_start=False)(
        x, labels
    )
    assert float((ours - x).abs().max()) > 0.9 * min(eps, steps * step_size)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_momentum_equals_torchattacks() -> None:
    torch.manual_seed(0)
    classifier = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(54, 4)).eval()
    x, labels = images(4, 6), torch.tensor([0, 1, 2, 3, 0, 1])

    def score(inputs: dict[str, Tensor], progress: float) -> tuple[Tensor, Tensor]:
        logits = classifier(inputs["image"])
        return nn.functional.cross_entropy(logits, labels, reduction="none"), logits

    search = PGD(8, 2 / 255, momentum=1.0, random_start=False)
    batch = Batch({"image": x}, None, torch.arange(6))
    ours = search(score, batch, image_threat(8 / 255), Draws(0), None, None).inputs["image"]
    theirs = torchattacks.MIFGSM(classifier, eps=8 / 255, alpha=2 / 255, steps=8, decay=1.0)(x, labels)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
