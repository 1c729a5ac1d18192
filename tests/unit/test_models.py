"""Encoders, heads, the hasher and encoding."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torchvision
from helpers import Flat, LinearHead, make_data, make_split, small_hasher, state_of, trained_hasher
from torch import nn

from robusthash.core.hamming import distance, pack, topk
from robusthash.core.registry import build, catalogue
from robusthash.core.types import Codes
from robusthash.data import ArraySource, RetrievalData, Split
from robusthash.models import Hasher, build_hasher, encode_split
from robusthash.models.hasher import frozen
from robusthash.models.image_encoders import IMAGENET, ImageEncoder

WIDTHS = {
    "alexnet": 4096,
    "vgg11": 4096,
    "vgg16": 4096,
    "vgg19": 4096,
    "resnet18": 512,
    "resnet34": 512,
    "resnet50": 2048,
    "small": 512,
}
NEEDED = {"agah": {"classes": 8}}
SMALLEST = {
    "block-means": 16,
    "agah": 8,
    "alexnet": 63,
    "small": 8,
    "cpah": 8,
    "layered": 8,
    "inception-v3": 75,
}
# made for one size of images, for none, or named by another option; tested on their own
FIXED = ("gfnet", "gfnet-xs", "gfnet-s", "gfnet-b", "vit-b-16", "timm", "sfcl", "vector", "features")
CARDS = [card.name for card in catalogue("image-encoder") if card.name not in FIXED]


@pytest.fixture(scope="module")
def data() -> RetrievalData:
    return make_data(train=60, query=30, database=60)


@pytest.fixture(scope="module")
def learned(data: RetrievalData) -> Hasher:
    return trained_hasher(data, bits=16, epochs=10)


# --- encoders


@pytest.mark.parametrize("name", CARDS)
def test_encoder_at_its_smallest_size(name: str) -> None:
    """Shapes, on the device that holds no numbers: the weights of VGG19 alone would take half a gigabyte."""
    side = SMALLEST.get(name, 32)
    with torch.device("meta"):
        hasher = build_hasher(bits=12, image={"name": name, **NEEDED.get(name, {})})
        output = hasher({"image": torch.rand(2, 3, side, side)})["image"]
        larger = hasher({"image": torch.rand(2, 3, side + 17, side + 5)})["image"]
    encoder = hasher.encoders["image"]
    assert encoder.width == WIDTHS.get(name, encoder.width)
    assert output.features.shape == larger.features.shape == (2, encoder.width)
    assert output.logits.shape == output.code.shape == (2, 12)
    assert encoder.smallest == side
    with (
        pytest.raises(ValueError, match=f"at least {side} px, and these have {side - 1} x {side}"),
        torch.device("meta"),
    ):
        hasher({"image": torch.rand(2, 3, side - 1, side)})


@pytest.mark.parametrize(("name", "side"), [("alexnet", 64), ("resnet18", 32), ("small", 8)])
def test_encoder_runs_forward_and_backward(name: str, side: int) -> None:
    hasher = build_hasher(bits=4, image=name).eval()
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    output = hasher({"image": x})["image"]
    assert torch.isfinite(output.logits).all()
    torch.testing.assert_close(output.code, torch.tanh(output.logits))
    (grad,) = torch.autograd.grad(output.logits.square().sum(), x)
    assert torch.isfinite(grad).all()
    assert float(grad.abs().sum()) > 0


def test_smallest_size_is_the_true_limit_of_alexnet() -> None:
    net = torchvision.models.alexnet(weights=None)
    net.features(torch.rand(1, 3, 63, 63))
    with pytest.raises(RuntimeError):
        net.features(torch.rand(1, 3, 62, 62))


def test_missing_weights_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none.pth' does not exist; give a file"):
        build_hasher(bits=8, image={"name": "resnet18", "weights": str(tmp_path / "none.pth")})


def test_weights_come_from_a_local_file(tmp_path: Path) -> None:
    torch.manual_seed(5)
    source = torchvision.models.resnet18(weights=None)
    with torch.no_grad():
        for value in source.state_dict().values():
            if value.is_floating_point():
                value.uniform_(0.01, 0.02)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    hasher = build_hasher(
        bits=8, image={"name": "resnet18", "weights": str(tmp_path / "weights.pth")}, seed=1
    ).eval()
    trunk = hasher.encoders["image"].trunk.state_dict()
    for name, value in source.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(trunk[name], value), name
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in IMAGENET)
    x = torch.rand(2, 3, 32, 32)
    source.fc = nn.Identity()
    expected = source.eval()((x - mean) / std)
    torch.testing.assert_close(hasher({"image": x})["image"].features, expected, rtol=1e-4, atol=1e-5)


def test_weights_of_another_model_are_an_error(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"not of resnet18: 99 missing: .*; 1 of another shape: conv1"):
        build("image-encoder", {"name": "resnet18", "weights": str(tmp_path / "other.pth")})


def test_normalisation_is_inside_the_model() -> None:
    """Inputs are in [0, 1]; mean and standard deviation are buffers, moved and saved with the weights."""
    encoder = ImageEncoder(nn.Flatten(), 48, smallest=4)
    assert {"normalise.mean", "normalise.std"} <= set(encoder.state_dict())
    grey = torch.tensor(IMAGENET[0]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    features, aux = encoder(grey)
    torch.testing.assert_close(features, torch.zeros(2, 48))
    assert aux == {}
    white, _ = encoder(torch.ones(1, 3, 4, 4))
    assert white[0, 0].item() == pytest.approx((1 - 0.485) / 0.229)
    small = build("image-encoder", "small")
    torch.testing.assert_close(small.normalise(torch.full((1, 3, 8, 8), 0.75)), torch.ones(1, 3, 8, 8))


def test_small_net_takes_any_size_and_its_width_is_as_stated() -> None:
    for width, grid in [(4, 1), (6, 3)]:
        encoder = build("image-encoder", {"name": "small", "width": width, "grid": grid})
        assert encoder.width == 4 * width * grid**2
        for side in (16, 33, 64):
            assert encoder(torch.rand(1, 3, side, side))[0].shape == (1, encoder.width)


# --- heads


@pytest.mark.parametrize("name", [card.name for card in catalogue("head")])
def test_heads(name: str) -> None:
    head = build("head", name, width=6, bits=5)
    assert head.bits == 5
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    for training in (True, False):
        logits, code, scale = head.train(training)(features)
        assert logits.shape == code.shape == (40, 5)
        assert isinstance(scale, float)
        assert scale > 0
        # a code and its bits agree, whatever the head shows to the objective
        assert torch.equal(code >= 0, logits >= 0)


def test_linear_head_learns_its_scale_in_training_only() -> None:
    head = build("head", "linear", width=6, bits=5)
    features = 50 * torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    logits, code, scale = head.eval()(features)
    assert scale == 1.0
    assert code is logits
    for _ in range(60):
        head.train()(features)
    _, _, scale = head.eval()(features)
    assert scale == pytest.approx(float(logits.detach().abs().mean()), rel=0.01)
    before = scale
    head(features * 100)
    assert head(features)[2] == before


def test_batchnorm_head_balances_the_bits() -> None:
    torch.manual_seed(0)
    head = build("head", "batchnorm", width=6, bits=5).train()
    assert head.linear.bias is None
    logits, code, _ = head(10 + torch.randn(400, 6, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(logits.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(code, torch.tanh(logits))


# --- the hasher


@pytest.mark.parametrize("bits", [0, -3, 1.5, "32", True, None])
def test_bits_must_be_a_positive_whole_number(bits: object) -> None:
    with pytest.raises(ValueError, match="bits must be a positive whole number"):
        build_hasher(bits=bits)  # type: ignore[arg-type]


def test_hasher_refuses_what_does_not_fit() -> None:
    flat, head = Flat(), LinearHead(torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"encoders for \['image'\] but heads for \['text'\]"):
        Hasher({"image": flat}, {"text": head})
    with pytest.raises(ValueError, match=r"different bits: \[4, 6\]"):
        Hasher({"image": flat, "text": Flat()}, {"image": head, "text": LinearHead(torch.ones(6, 3))})
    with pytest.raises(ValueError, match="an image or a text encoder"):
        build_hasher(bits=8, image=None)
    with pytest.raises(ValueError, match=r"knows \['image'\], not 'audio'"):
        Hasher({"image": flat}, {"image": head})({"audio": torch.rand(2, 3)})
    with pytest.raises(KeyError, match="did you mean 'alexnet'"):
        build_hasher(bits=8, image="alexnett")
    with pytest.raises(KeyError, match="takes no 'widht'; did you mean 'width'"):
        build_hasher(bits=8, image={"name": "small", "widht": 8})


def test_hasher_answers_any_subset_of_its_modalities() -> None:
    weights = {
        m: torch.randn(4, 3, generator=torch.Generator().manual_seed(i))
        for i, m in enumerate(["image", "text"])
    }
    hasher = Hasher({m: Flat() for m in weights}, {m: LinearHead(w) for m, w in weights.items()})
    inputs = {m: torch.rand(2, 3) for m in weights}
    both = hasher(inputs)
    assert set(both) == {"image", "text"}
    only = hasher({"text": inputs["text"]})
    assert set(only) == {"text"}
    assert torch.equal(only["text"].logits, both["text"].logits)
    assert hasher({}) == {}
    assert hasher.for_database() is hasher
    assert (hasher.bits, hasher.modalities, hasher.device) == (4, ("image", "text"), torch.device("cpu"))


def test_weights_depend_on_the_seed_alone() -> None:
    first = small_hasher(seed=3).state_dict()
    torch.rand(5)
    second, third = small_hasher(seed=3).state_dict(), small_hasher(seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)


def test_a_hasher_can_be_built_again_from_its_spec() -> None:
    made = small_hasher(bits=12, declared="adversarial")
    again = build_hasher(**made.spec)
    again.load_state_dict(made.state_dict())
    assert again.declared == "adversarial"
    assert again.spec == made.spec
    x = torch.rand(2, 3, 12, 12)
    assert torch.equal(made.eval()({"image": x})["image"].logits, again.eval()({"image": x})["image"].logits)


def test_frozen_restores_every_mode_and_flag() -> None:
    hasher = small_hasher(head="batchnorm").train()
    parts, parameters = list(hasher.modules()), list(hasher.parameters())
    parts[3].eval()
    parts[-1].eval()
    parameters[2].requires_grad_(False)
    before = state_of(hasher)
    with frozen(hasher):
        assert not any(part.training for part in parts)
        assert not any(parameter.requires_grad for parameter in parameters)
        hasher({"image": torch.rand(2, 3, 12, 12)})
        inside = state_of(hasher)
        with frozen(hasher):
            pass
        assert state_of(hasher)["modes"] == inside["modes"]
    after = state_of(hasher)
    assert after["modes"] == before["modes"]
    assert after["flags"] == before["flags"]
    assert all(torch.equal(value, after["state"][name]) for name, value in before["state"].items())
    with pytest.raises(ZeroDivisionError), frozen(hasher):
        raise ZeroDivisionError
    assert state_of(hasher)["modes"] == before["modes"]
    assert state_of(hasher)["flags"] == before["flags"]


# --- encoding


def test_encoding_does_not_depend_on_the_batch_size(learned: Hasher, data: RetrievalData) -> None:
    seen: list[tuple[int, int]] = []
    whole = encode_split(
        learned, data.database, origin="m", progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(60, 60)]
    learned.train()  # the mode of the caller does not matter, and is kept
    for size in (1, 7):
        part = encode_split(learned, data.database, batch_size=size)["image"]
        assert torch.equal(part.packed, whole["image"].packed)
    assert learned.training
    learned.eval()
    codes = whole["image"]
    assert (codes.bits, codes.origin, len(codes)) == (16, "m", 60)
    assert torch.equal(codes.ids, torch.arange(60))
    with torch.no_grad():
        logits = learned(data.database.batch(torch.arange(60)).inputs)["image"].logits
    assert torch.equal(codes.signs() > 0, logits >= 0)
    assert not codes.packed.is_inference()


def test_encoding_nothing_is_an_error(learned: Hasher, data: RetrievalData) -> None:
    with pytest.raises(ValueError, match="text"):
        encode_split(learned, data.query, modality="text")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        encode_split(learned, data.query, batch_size=0)
    with pytest.raises(ValueError, match="'float16'"):
        encode_split(learned, data.query, dtype="float16")


def test_encoding_takes_the_modality_asked_for(data: RetrievalData) -> None:
    text = torch.rand(30, 4, generator=torch.Generator().manual_seed(0))
    pixels = data.query.source.arrays["image"]
    source = ArraySource({"image": pixels, "text": text})
    split = Split("query", source, torch.arange(30), data.query.labels, source.hashes())
    weights = {"image": torch.randn(8, pixels[0].numel()), "text": torch.randn(8, 4)}
    both = Hasher({m: Flat() for m in weights}, {m: LinearHead(w) for m, w in weights.items()})
    assert set(encode_split(both, split)) == {"image", "text"}
    assert set(encode_split(both, split, modality="text")) == {"text"}
    only_text = Hasher({"text": Flat()}, {"text": LinearHead(weights["text"])})
    assert set(encode_split(only_text, split)) == {"text"}


def test_a_diverged_model_is_an_error_not_a_code(learned: Hasher, data: RetrievalData) -> None:
    broken = copy.deepcopy(learned)
    with torch.no_grad():
        broken.heads["image"].linear.bias[3] = float("inf")
    with pytest.raises(ValueError, match="30 of 480 code values are NaN or infinite"):
        encode_split(broken, data.query)


def precision_at_ten(queries: Codes, database: Codes, relevant: torch.Tensor) -> float:
    found, _ = topk(queries.packed, database.packed, 10)
    return float(torch.gather(relevant, 1, found).double().mean())


def test_bf16_keeps_almost_all_bits_and_the_ranking(learned: Hasher, data: RetrievalData) -> None:
    query, database = make_split("query", 150, 11), make_split("database", 150, 12)
    relevant = query.labels @ database.labels.T > 0
    codes = {
        dtype: [encode_split(learned, split, dtype=dtype)["image"] for split in (query, database)]
        for dtype in ("float32", "bf16")
    }
    differing = [
        float((a.signs() != b.signs()).double().mean())
        for a, b in zip(codes["float32"], codes["bf16"], strict=True)
    ]
    assert max(differing) < 0.02
    full, half = (precision_at_ten(*codes[dtype], relevant) for dtype in ("float32", "bf16"))
    assert full > 0.6  # chance is 1 in 3: the victim has learned something, so that agreement means something
    assert abs(full - half) < 0.02
    assert (
        float(distance(codes["float32"][0].packed, codes["bf16"][0].packed).diagonal().double().mean()) < 0.32
    )


def test_channels_last_changes_nothing_but_rounding(learned: Hasher, data: RetrievalData) -> None:
    convolution = next(m for m in learned.modules() if isinstance(m, nn.Conv2d) and m.weight.shape[1] > 1)
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    plain = copy.deepcopy(learned).to(memory_format=torch.contiguous_format).eval()
    x = data.query.batch(torch.arange(30)).inputs["image"]
    with torch.no_grad():
        ours = learned.eval()({"image": x.contiguous(memory_format=torch.channels_last)})["image"].logits
        theirs = plain({"image": x})["image"].logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(pack(ours >= 0), pack(theirs >= 0))
