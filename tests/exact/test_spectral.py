"""The block DCT, the spectral gate and SAAH's two terms, against values known by hand or by another way."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from robusthash.defenses.saah import spectral_stability
from robusthash.models import build_hasher
from robusthash.models.block_dct import BlockDCT, dct_matrix
from robusthash.models.gates import SpectralGate

LEARNED = ("block", "pixel", "pixel+freq", "global")


def images(count: int = 2, height: int = 16, width: int = 24, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def through(gate: SpectralGate, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P(x), the gate and its excess; a gate needs nothing hashed."""

    def refuse(_: Tensor) -> None:
        raise AssertionError("the gate hashed something")

    with torch.no_grad():
        pure, shown = gate(x, refuse)  # type: ignore[arg-type]
    return pure, shown["gate"], shown["excess"]


def stirred(kind: str, seed: int = 0, **options: object) -> SpectralGate:
    """A gate with random weights in every layer, as training would leave them."""
    gate = SpectralGate(kind, **options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return gate


# --- the transform


@pytest.mark.parametrize("block", [2, 4, 8])
def test_inverse_and_parseval(block: int) -> None:
    dct, x = BlockDCT(block), images()
    z = dct(x)
    assert z.shape == (2, 16 * 24 // block**2, 3, block, block)
    torch.testing.assert_close(dct.inverse(z, 16, 24), x, atol=1e-5, rtol=0)
    torch.testing.assert_close(z.square().flatten(1).sum(1), x.square().flatten(1).sum(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("block", [3, 8])
def test_against_the_written_sum(block: int) -> None:
    """Eq. 5: (2/B) C_u C_v sum_ij x(i, j) cos((2i+1) u pi / 2B) cos((2j+1) v pi / 2B), C_0 = 1/sqrt 2."""
    x = torch.rand(block, block, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    i = torch.arange(block, dtype=torch.float64)
    found = BlockDCT(block)(x.float().expand(1, 3, -1, -1))[0, 0, 1]
    for u in range(block):
        for v in range(block):
            waves = torch.outer(
                torch.cos((2 * i + 1) * u * math.pi / (2 * block)),
                torch.cos((2 * i + 1) * v * math.pi / (2 * block)),
            )
            halves = (2**-0.5 if u == 0 else 1.0) * (2**-0.5 if v == 0 else 1.0)
            assert float(found[u, v]) == pytest.approx(
                float(2 / block * halves * (x * waves).sum()), abs=1e-5
            )


def test_golden_ramp_and_constant() -> None:
    ramp = torch.linspace(0, 1, 8).expand(1, 3, 8, 8)
    z = BlockDCT()(ramp)[0, 0, 0]
    expected = torch.tensor([4.0, -2.6031, 0.0, -0.2721, 0.0, -0.0812, 0.0, -0.0205])
    torch.testing.assert_close(z[0], expected, atol=5e-5, rtol=0)
    torch.testing.assert_close(z[1:], torch.zeros(7, 8), atol=1e-5, rtol=0)
    assert float(z.square().sum()) == pytest.approx(22.857143, rel=1e-5)
    flat = BlockDCT()(torch.full((1, 3, 8, 8), 0.7))[0, 0, 2]
    assert float(flat[0, 0]) == pytest.approx(8 * 0.7, rel=1e-6)
    assert float(flat.flatten()[1:].abs().max()) < 1e-6


def test_blocks_come_row_by_row_and_channels_stay_apart() -> None:
    x = torch.zeros(1, 3, 16, 24)
    x[0, 2, 8:, 8:16] = 1.0  # second row of blocks, second column
    z = BlockDCT()(x)
    assert torch.nonzero(z[0, :, :, 0, 0] > 0.5).tolist() == [[4, 2]]
    vertical = torch.linspace(0, 1, 8)[:, None].expand(1, 3, 8, 8)
    assert float(BlockDCT()(vertical)[0, 0, 0, 1, 0]) == pytest.approx(-2.6031, abs=5e-5)  # u counts rows


def test_the_matrix_is_orthonormal_for_every_size() -> None:
    for size in (1, 2, 3, 5, 8, 16):
        matrix = dct_matrix(size)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(size), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="at least 1 point, got 0"):
        dct_matrix(0)


def test_autocast_leaves_the_transform_in_float32() -> None:
    dct, x = BlockDCT(), images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = dct(x)
        back = dct.inverse(z, 16, 24)
    assert torch.equal(z, dct(x))
    assert torch.equal(back, dct.inverse(dct(x), 16, 24))


def test_sides_that_are_no_multiples_of_the_block() -> None:
    with pytest.raises(ValueError, match=r"12 x 16 px do not divide into blocks of 8; resize"):
        SpectralGate()(torch.rand(1, 3, 12, 16), None)  # type: ignore[arg-type]
    SpectralGate(block=4)(torch.rand(1, 3, 12, 16), None)  # type: ignore[arg-type]


# --- the gate


def test_parameters() -> None:
    def count(kind: str, block: int = 8) -> int:
        return sum(parameter.numel() for parameter in SpectralGate(kind, block).parameters())  # type: ignore[arg-type]

    assert count("block") == 31_161 == 192 * 121 + 121 + 121 * 64 + 64
    assert count("pixel") == 173**2 + 6 * 173 + 1
    assert count("pixel+freq") == count("pixel") + 16 * 173 + 16 * 64
    assert count("global") == 64
    assert count("low-pass") == count("none") == 0
    assert count("block", 4) == 48 * 121 + 121 + 121 * 16 + 16


@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize(("rho", "m_min", "tau"), [(0.5, 0.05, 1.0), (0.3, 0.1, 2.0)])
def test_starts_at_rho_and_scales_the_image(kind: str, rho: float, m_min: float, tau: float) -> None:
    gate, x = SpectralGate(kind, rho=rho, m_min=m_min, tau=tau), images()  # type: ignore[arg-type]
    pure, m, excess = through(gate, x)
    assert m.shape == (2, 6, 8, 8)
    torch.testing.assert_close(m, torch.full_like(m, rho), atol=1e-6, rtol=0)
    assert float(excess.square().max()) < 1e-12  # R_bound
    torch.testing.assert_close(pure, rho * x, atol=1e-5, rtol=0)


def test_bias_at_the_start() -> None:
    (bias,) = [p for name, p in SpectralGate().named_parameters() if p.shape == (64,)]
    torch.testing.assert_close(bias, torch.full((64,), -0.105361), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize("seen", ["log1p", "raw"])
def test_range_and_excess(kind: str, seen: str) -> None:
    gate = stirred(kind, input=seen, m_min=0.2, rho=0.6, tau=0.2)
    _, m, excess = through(gate, images())
    assert 0.2 <= float(m.min()) < float(m.max()) <= 1.0
    torch.testing.assert_close(excess, m.flatten(1).mean(1) - 0.6)


def test_kinds_see_what_they_should() -> None:
    """By image and block; by magnitude alone; by magnitude and frequency; by frequency alone."""
    x = images()
    x[:, :, :8, :8] = x[:, :, 8:, 8:16]  # two blocks alike
    for kind in LEARNED:
        m = through(stirred(kind), x)[1]
        torch.testing.assert_close(m[:, 0], m[:, 4])
        assert torch.equal(m[0], m[1]) == (kind == "global")
    flat = torch.full((1, 3, 8, 8), 0.5)  # all but the first coefficient are 0
    assert float(through(stirred("pixel"), flat)[1].flatten()[1:].std()) < 1e-5
    assert float(through(stirred("pixel+freq"), flat)[1].flatten()[1:].std()) > 1e-3
    changed = images(1)
    changed[:, :, :8, :8] += 0.3 * torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(5))
    for kind in ("block", "pixel"):  # a block's gate depends on that block alone
        before, after = through(stirred(kind), images(1))[1], through(stirred(kind), changed)[1]
        assert not torch.equal(before[:, 0], after[:, 0])
        torch.testing.assert_close(before[:, 1:], after[:, 1:])


@pytest.mark.parametrize("kind", LEARNED)
def test_autocast_rounds_the_network_alone(kind: str) -> None:
    gate, x = stirred(kind), images()
    exact, m, _ = through(gate, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pure, rounded, excess = through(gate, x)
    assert pure.dtype == rounded.dtype == excess.dtype == torch.float32
    torch.testing.assert_close(rounded, m, atol=0.05, rtol=0)
    torch.testing.assert_close(gate.dct(pure), gate.dct(x) * rounded[:, :, None], atol=1e-5, rtol=0)
    torch.testing.assert_close(pure, exact, atol=0.2, rtol=0)


def test_the_three_channels_share_a_gate_and_signs_do_not_matter() -> None:
    gate, x = stirred("block"), images(1)
    z = gate.dct(x)
    pure, m, _ = through(gate, x)
    torch.testing.assert_close(gate.dct(pure), z * m[:, :, None], atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(gate.gate(-z), gate.gate(z))


def test_nothing_is_clipped() -> None:
    """An edge without its high frequencies overshoots."""
    edge = (torch.arange(8) >= 4).float().expand(1, 3, 8, 8)
    pure, _, _ = through(SpectralGate("low-pass", cutoff=3), edge)
    assert float(pure.min()) < 0.0
    assert float(pure.max()) > 1.0


@pytest.mark.parametrize(("cutoff", "kept"), [(0, 1), (1, 3), (6, 28), (None, 36), (14, 64)])
def test_low_pass_keeps_a_triangle(cutoff: int | None, kept: int) -> None:
    pure, m, excess = through(SpectralGate("low-pass", cutoff=cutoff), images())
    limit = 7 if cutoff is None else cutoff
    assert [[int(v) for v in row] for row in m[0, 0]] == [
        [int(u + v <= limit) for v in range(8)] for u in range(8)
    ]
    assert int(m[1, 3].sum()) == kept
    assert float(excess[0]) == pytest.approx(kept / 64 - 0.5, abs=1e-6)
    if kept == 64:
        torch.testing.assert_close(pure, images(), atol=1e-5, rtol=0)  # m = 1: P(x) = x
    if kept == 1:
        torch.testing.assert_close(
            pure[0, 0, :8, :8], images()[0, 0, :8, :8].mean().expand(8, 8), atol=1e-6, rtol=0
        )


def test_none_is_the_identity() -> None:
    pure, m, excess = through(SpectralGate("none"), images())
    assert torch.equal(pure, images())
    assert torch.equal(m, torch.ones(2, 6, 8, 8))
    assert torch.equal(excess, torch.full((2,), 0.5))


def test_centred_halves_the_contrast_and_keeps_the_grey() -> None:
    pure, _, _ = through(SpectralGate(center=True), images())
    torch.testing.assert_close(pure, 0.5 + 0.5 * (images() - 0.5), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "blocks"}, "kind of gate must be one of block, pixel"),
        ({"rho": 0.04}, "m_min 0.05 and rho 0.04"),
        ({"rho": 1.0}, "m_min < rho < 1"),
        ({"tau": 0.0}, "tau must be above 0"),
        ({"input": "log"}, "'log1p' or 'raw', got 'log'"),
        ({"cutoff": 3}, "is of kind 'low-pass', in 0..14, got 3 with 'block'"),
        ({"kind": "low-pass", "cutoff": 15}, r"in 0\.\.14, got 15"),
        ({"block": 0}, "at least 1 point"),
    ],
)
def test_options_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpectralGate(**options)  # type: ignore[arg-type]


# --- stability


def uniform(m: float, blocks: int = 6) -> Tensor:
    return torch.full((2, blocks, 8, 8), m)


@pytest.mark.parametrize("reduction", ["block", "sum", "mean"])
def test_stability_vanishes_without_a_change_and_grows_by_its_square(reduction: str) -> None:
    change, gate = images(seed=3) - 0.5, through(stirred("block"), images())[1]
    once = float(spectral_stability(change, gate, reduction))  # type: ignore[arg-type]
    assert float(spectral_stability(torch.zeros_like(change), gate, reduction)) == 0.0  # type: ignore[arg-type]
    assert float(spectral_stability(2 * change, gate, reduction)) == pytest.approx(4 * once, rel=1e-5)  # type: ignore[arg-type]
    assert once > 0


def test_stability_in_closed_form() -> None:
    """One block, the mean alone moved by d, m = 0.5: m^4 (8 d)^2 = 0.0625 (8 d)^2 for each channel."""
    d = 0.03
    for channels in (1, 3):
        change = torch.zeros(1, 3, 8, 8)
        change[:, :channels] = d
        found = spectral_stability(change, torch.full((1, 1, 8, 8), 0.5))
        assert float(found) == pytest.approx(channels * 0.0625 * (8 * d) ** 2, rel=1e-5)


def test_stability_of_a_uniform_gate_is_the_energy_times_its_fourth_power() -> None:
    change = images(seed=3) - 0.5
    energy = float(change.square().sum()) / 2
    for m in (0.2, 1.0):
        for reduction, share in (("sum", 1), ("block", 6), ("mean", 3 * 16 * 24)):
            found = spectral_stability(change, uniform(m), reduction)  # type: ignore[arg-type]
            assert float(found) == pytest.approx(energy * m**4 / share, rel=1e-4)


def test_only_what_the_gate_lets_through_counts() -> None:
    change = images(seed=3) - 0.5
    gate = uniform(0.0)
    gate[:, 2, 1, 3] = 0.5
    z = BlockDCT()(change)[:, 2, :, 1, 3]
    expected = float((z.square().sum(1) * 0.5**4).mean())
    assert float(spectral_stability(change, gate, "sum")) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("reduction", "settled"), [("block", 0.46), ("sum", 0.11), ("mean", 0.50)])
def test_where_a_uniform_gate_settles(reduction: str, settled: float) -> None:
    """At 224 px under a change of 8/255, minimising L_stab + (m - 0.5)^2: why ``block`` is the default."""
    change = torch.full((1, 3, 224, 224), 8 / 255)
    unit = float(spectral_stability(change, torch.ones(1, 784, 8, 8), reduction))  # type: ignore[arg-type]
    grid = torch.linspace(0, 1, 1001)
    assert float(grid[(unit * grid**4 + (grid - 0.5) ** 2).argmin()]) == pytest.approx(settled, abs=0.006)


def test_stability_has_no_gradient_to_the_images_and_one_to_the_gate() -> None:
    change = (images(seed=3) - 0.5).requires_grad_(True)
    gate = uniform(0.5).requires_grad_(True)
    spectral_stability(change, gate).backward()
    assert change.grad is None  # a constant, whatever made it
    z = BlockDCT()(change.detach())
    expected = 4 * 0.5**3 * z.square().sum(2) / 12  # two images of six blocks
    torch.testing.assert_close(gate.grad, expected, rtol=1e-4, atol=1e-7)


# --- the whole victim


@pytest.mark.parametrize("kind", ["block", "pixel", "pixel+freq"])
def test_gradients_pass_through_gate_and_net(kind: str) -> None:
    """The slope of a code along a direction, by autograd and by central differences, of gate and encoder
    together."""
    hasher = build_hasher(
        bits=8, image={"name": "small", "width": 4, "grid": 1}, purifiers={"image": {"name": "spectral-gate"}}
    )
    hasher.purifiers["image"] = stirred(kind)
    hasher.double().eval()
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    step = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    pull = torch.randn(2, 8, generator=generator, dtype=torch.float64)

    def value(inputs: Tensor) -> Tensor:
        pure, _ = hasher.purifiers["image"](inputs, None)
        features, _ = hasher.encoders["image"](pure)
        return (hasher.heads["image"](features)[0] * pull).sum()

    leaf = x.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad((hasher({"image": leaf})["image"].logits * pull).sum(), leaf)
    slope, tiny = float((grad * step).sum()), 1e-6
    with torch.no_grad():
        measured = float(value(x + tiny * step) - value(x - tiny * step)) / (2 * tiny)
    assert slope == pytest.approx(measured, rel=1e-4)


def test_views_of_a_gated_victim() -> None:
    """At the start m = rho, so the white-box gradient is rho times the encoder's at P(x)."""
    settings = {"bits": 8, "image": {"name": "small", "width": 4, "grid": 1}}
    gated = build_hasher(**settings, purifiers={"image": {"name": "spectral-gate", "rho": 0.4}}).eval()  # type: ignore[arg-type]
    x = images(height=16, width=16)

    def logits_and_grad(victim: torch.nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
        leaf = inputs.clone().requires_grad_(True)
        logits = victim({"image": leaf})["image"].logits
        return logits.detach(), torch.autograd.grad(logits.sum(), leaf)[0]

    bare, at_pure = logits_and_grad(gated.as_seen_from("oblivious"), 0.4 * x)
    logits, grad = logits_and_grad(gated.as_seen_from("white-box"), x)
    torch.testing.assert_close(logits, bare, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad, 0.4 * at_pure, atol=1e-5, rtol=1e-4)
    logits, grad = logits_and_grad(gated.as_seen_from("identity"), x)
    torch.testing.assert_close(logits, bare, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad, at_pure, atol=1e-5, rtol=1e-4)
    oblivious, _ = logits_and_grad(gated.as_seen_from("oblivious"), x)
    assert not torch.allclose(oblivious, bare, atol=1e-3)
    assert "gate" not in gated.as_seen_from("oblivious")({"image": x})["image"].aux
