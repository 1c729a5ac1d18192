"""Shallow methods: closed forms against brute force and finite differences, and objectives that never get worse."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from robusthash.core.hamming import sign
from robusthash.core.runtime import Draws
from robusthash.objectives.shallow.base import TrainingFeatures, ridge, solve
from robusthash.objectives.shallow.cmfh import CMFH
from robusthash.objectives.shallow.correlations import CVH, SCM
from robusthash.objectives.shallow.discrete_codes import ITQ, SDH, square_codes
from robusthash.objectives.shallow.latent_factors import (
    raise_codes,
    raise_factors,
)
from robusthash.objectives.shallow.seph import divergence

DRAWS = Draws(0, ("test",))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def known(bits: int, labels: Tensor | None = None, **values: Tensor) -> TrainingFeatures:
    return TrainingFeatures({n: v - v.mean(0) for n, v in values.items()}, labels, bits, DRAWS)


def factor_likelihood(factors: Tensor, similar: Tensor, beta: float) -> float:
    """sum_{i != j} [S_ij T_ij - softplus(T_ij)] - ||U||^2 / (2 beta), T = U U^T / 2; what LFH raises."""
    theta = factors @ factors.T / 2
    terms = similar * theta - softplus(theta)
    return float(terms.sum() - terms.diagonal().sum() - factors.square().sum() / (2 * beta))


def discrete_likelihood(codes: Tensor, others: Tensor, similar: Tensor, lam: float) -> float:
    """sum_ij [S_ij T_ij - softplus(T_ij)], T = (lam / K) U V^T; what DLFH raises."""
    theta = lam / codes.shape[1] * codes @ others.T
    return float((similar * theta - softplus(theta)).sum())


def factorisation_value(
    method: CMFH, parts: list[Tensor], y: Tensor, factors: list[Tensor], weights: list[Tensor]
) -> float:
    """The objective, which no step raises."""
    total = method.gamma * y.square().sum()
    for a, x, u, w in zip((method.share, 1.0 - method.share), parts, factors, weights, strict=True):
        fit = (x - y @ u).square().sum() + method.mu * (y - x @ w).square().sum()
        total = total + a * (fit + method.gamma * (u.square().sum() + w.square().sum()))
    return float(total)


def one_hot(items: int, classes: int) -> Tensor:
    return torch.eye(classes, dtype=torch.float64)[torch.arange(items) % classes]


def test_ridge_is_where_the_gradient_is_zero() -> None:
    x, y = numbers(30, 5), numbers(30, 3, seed=1) + 2
    x = x - x.mean(0)
    found = ridge(x, y, 0.7)
    w, b = found.weights.clone().requires_grad_(True), found.offset.clone().requires_grad_(True)
    loss = (x @ w + b - y).square().sum() + 0.7 * w.square().sum()
    for grad in torch.autograd.grad(loss, [w, b]):
        torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-9, rtol=0)


def test_itq_rotates_the_principal_components_and_rounds_never_raise_its_error() -> None:
    x = numbers(60, 6) @ torch.diag(torch.tensor([5.0, 4, 3, 2, 1, 0.5]).double())
    given, errors = known(3, image=x), []
    centred = given.values["image"]
    for rounds in (0, 1, 2, 5, 20):
        weights = ITQ(rounds).fit(given)["image"].weights
        torch.testing.assert_close(weights.T @ weights, torch.eye(3).double(), atol=1e-9, rtol=0)
        projected = centred @ weights
        errors.append(float((sign(projected) - projected).square().sum()))
    top = torch.linalg.svd(centred).S[:3].square().sum()
    assert float(projected.square().sum()) == pytest.approx(float(top))  # no other 3 directions hold as much
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


def test_sdh_reads_labels_from_its_codes() -> None:
    labels = one_hot(60, 4)
    x = labels @ numbers(4, 6, seed=2) * 4 + numbers(60, 6)
    projection = SDH().fit(known(8, labels, image=x))["image"]
    codes = sign(projection(x - x.mean(0)))
    read = ridge(codes - codes.mean(0), labels, 1.0)(codes - codes.mean(0))
    assert float((read.argmax(1) == labels.argmax(1)).double().mean()) > 0.95


def test_cosdish_steps_are_exact_in_each_bit_of_an_item() -> None:
    targets, rest = numbers(5, 5), sign(numbers(7, 3, seed=1))
    targets, outside = targets + targets.T, numbers(7, 5, seed=2)

    def value(b: Tensor) -> float:
        inside = (targets - b @ b.T).square()
        return float(inside.sum() - inside.diagonal().sum() + 2 * (outside - rest @ b.T).square().sum())

    codes, before = sign(numbers(5, 3, seed=3)), None
    for _ in range(8):
        codes = square_codes(codes, targets, rest, outside)
        assert before is None or value(codes) <= before + 1e-9
        before = value(codes)
    for i, k in itertools.product(range(5), range(3)):
        other = codes.clone()
        other[i, k] *= -1
        assert value(codes) <= value(other) + 1e-9


def test_lfh_never_lowers_its_likelihood_and_ends_where_its_gradient_is_small() -> None:
    labels = one_hot(24, 3)
    similar, factors = (labels @ labels.T), numbers(24, 4, seed=4)
    values = [factor_likelihood(factors, similar, 30.0)]
    for _ in range(60):
        factors = raise_factors(factors, similar, 30.0)
        values.append(factor_likelihood(factors, similar, 30.0))
    assert all(after >= before - 1e-9 for before, after in itertools.pairwise(values))
    assert values[-1] - values[-2] < 0.01 * (values[1] - values[0])


def test_cvh_finds_correlation_one_where_texts_are_a_map_of_images() -> None:
    x = numbers(50, 4)
    y = x @ numbers(4, 4, seed=5)
    found = CVH(lam=1e-10).fit(known(4, image=x, text=y))
    left, right = (found[n].weights for n in ("image", "text"))
    a, b = (x - x.mean(0)) @ left, (y - y.mean(0)) @ right
    for k in range(4):
        assert float(torch.corrcoef(torch.stack([a[:, k], b[:, k]]))[0, 1]) == pytest.approx(1.0, abs=1e-5)
    gram = a.T @ a / 50
    torch.testing.assert_close(gram, torch.eye(4).double(), atol=1e-5, rtol=0)  # no direction twice


def test_the_first_bit_of_scm_is_the_best_pair_of_directions() -> None:
    labels = one_hot(40, 3)
    given = known(1, labels, image=numbers(40, 3) + labels, text=numbers(40, 2, seed=6) + labels[:, :2])
    x, y = given.values["image"], given.values["text"]
    found = SCM().fit(given)
    signed = 2 * labels @ labels.T - 1

    def correlation(a: Tensor, b: Tensor) -> float:
        across = (x @ a) @ signed @ (y @ b)
        lam = 1e-4
        sizes = [(z @ w).square().mean() + lam * w.square().sum() for z, w in ((x, a), (y, b))]
        return float(across / (sizes[0] * sizes[1]).sqrt())

    best = correlation(found["image"].weights[:, 0], found["text"].weights[:, 0])
    others = [correlation(numbers(3, seed=s), numbers(2, seed=s + 500)) for s in range(400)]
    assert best >= max(others)
    assert best > 0


def test_scm_takes_a_single_feature() -> None:
    """Its one direction is the feature; that of the texts is the best partner, by an exact solve."""
    labels = one_hot(40, 3)
    text = numbers(40, 2, seed=6) + labels[:, :2]
    given = known(1, labels, image=labels[:, :1] + 0.1 * numbers(40, 1), text=text)
    x, y = given.values["image"], given.values["text"]
    found = SCM().fit(given)
    across = y.T @ (2 * labels @ labels.T - 1) @ x
    partner = torch.linalg.solve(y.T @ y / 40 + 1e-4 * torch.eye(2).double(), across)[:, 0]
    made = found["text"].weights[:, 0]
    assert float((made @ partner).abs() / (made.norm() * partner.norm())) > 1 - 1e-9


def test_cmfh_rounds_never_raise_its_objective() -> None:
    method, values = CMFH(mu=3.0, gamma=0.2), []
    x, t = numbers(30, 5), numbers(30, 4, seed=7)
    y = numbers(30, 3, seed=8)
    factors, weights = [numbers(3, 5), numbers(3, 4)], [numbers(5, 3), numbers(4, 3)]
    parts = [x, t]
    for _ in range(6):
        values.append(factorisation_value(method, parts, y, factors, weights))
        factors = method._factors(parts, y)
        values.append(factorisation_value(method, parts, y, factors, weights))
        weights = [torch.linalg.solve(method._inner(p), method.mu * p.T @ y) for p in parts]
        values.append(factorisation_value(method, parts, y, factors, weights))
        y = method._latent(parts, factors, weights)
    assert all(after <= before + 1e-8 for before, after in itertools.pairwise(values))


def test_seph_gradient_is_that_of_finite_differences_and_zero_where_p_is_q() -> None:
    codes = numbers(6, 3)
    target = torch.rand(6, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    target = target + target.T
    target.fill_diagonal_(0.0)
    target /= target.sum()
    _, gradient = divergence(codes, target, 0.3)
    for i, k in itertools.product(range(6), range(3)):
        up, down = codes.clone(), codes.clone()
        up[i, k] += 1e-6
        down[i, k] -= 1e-6
        slope = (divergence(up, target, 0.3)[0] - divergence(down, target, 0.3)[0]) / 2e-6
        assert float(gradient[i, k]) == pytest.approx(slope, abs=1e-6)
    near = 1 / (1 + (codes[:, None] - codes[None]).square().sum(2) / 4)
    near.fill_diagonal_(0.0)
    value, gradient = divergence(codes, near / near.sum(), 0.0)
    assert value == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


def test_dlfh_bits_never_lower_the_likelihood() -> None:
    labels = one_hot(20, 3)
    similar = labels @ labels.T
    u, v = sign(numbers(20, 6)), sign(numbers(20, 6, seed=1))
    values = [discrete_likelihood(u, v, similar, 8.0)]
    for _ in range(5):
        u = raise_codes(u, v, similar, 8.0)
        values.append(discrete_likelihood(u, v, similar, 8.0))
        v = raise_codes(v, u, similar.T, 8.0)
        values.append(discrete_likelihood(u, v, similar, 8.0))
    assert all(after >= before - 1e-9 for before, after in itertools.pairwise(values))
    assert values[-1] > values[0]


def test_projections_are_for_features_as_they_came() -> None:
    """Centring and scale are part of them: the same data shifted and enlarged has the same codes."""
    x = numbers(40, 6)
    plain = solve(ITQ(), {"image": x}, None, 4, DRAWS)["image"]
    moved = solve(ITQ(), {"image": 100 * x + 7}, None, 4, DRAWS)["image"]
    assert torch.equal(sign(plain(x)), sign(moved(100 * x + 7)))
    torch.testing.assert_close(plain(x).mean(0), torch.zeros(4).double(), atol=1e-9, rtol=0)
