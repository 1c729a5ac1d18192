"""Image encoders: (B, 3, H, W) in [0, 1], or feature vectors (B, V), -> (features (B, D), aux)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import normalize

from robusthash.core.registry import build, register
from robusthash.models.hasher import Encoder
from robusthash.models.heads import dense

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Normalise(nn.Module):
    """(x - mean) / std per channel, inside the model, so that attack budgets stay in pixel units."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class ImageEncoder(Encoder):
    """Normalisation, then ``trunk``. ``width`` is D.

    Inputs under ``smallest`` pixels a side are refused, and all sizes but ``exact`` where the net takes one.
    With ``enlarge``, images are first brought to this side (bilinear): attacks change the given pixels.
    """

    def __init__(
        self,
        trunk: nn.Module,
        width: int,
        smallest: int,
        statistics=IMAGENET,
        exact: int | None = None,
        enlarge: int | None = None,
    ) -> None:
        super().__init__()
        if enlarge is not None and enlarge < smallest:
            raise ValueError(f"enlarge must be at least {smallest} px for this encoder, got {enlarge}")
        self.normalise = Normalise(*statistics)
        self.trunk = trunk
        self.width = width
        self.smallest = smallest
        self.exact = exact
        self.enlarge = enlarge

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if x.ndim != 4:
            raise ValueError(
                f"this encoder takes images (B, 3, H, W), and these are {tuple(x.shape)}: vectors take the "
                "image encoder 'vector', as image={'name': 'vector', 'inputs': V}"
            )
        if self.enlarge is not None:
            x = functional.interpolate(x, size=(self.enlarge, self.enlarge), mode="bilinear")
        self._check_size(int(x.shape[-2]), int(x.shape[-1]))
        return self.trunk(self.normalise(x)), {}

    def _check_size(self, height: int, width: int) -> None:
        kind = type(self.trunk).__name__
        net = "this encoder" if isinstance(self.trunk, nn.Sequential) else f"the image encoder ({kind})"
        got = f"px, and these have {height} x {width}"
        if min(height, width) < self.smallest:
            least = self.smallest
            raise ValueError(
                f"{net} needs images of at least {least} {got}; set the data's size to {least} or more"
            )
        if self.exact is not None and (height, width) != (self.exact, self.exact):
            takes = f"takes images of {self.exact} x {self.exact} {got}"
            raise ValueError(
                f"{net} {takes}; set the data's size to {self.exact}, or the encoder's to theirs"
            )


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


@register("image-encoder", "small", modality="image", state="measured")
def small(width: int = 32, grid: int = 2) -> ImageEncoder:
    """Four convolutions for 16-64 px that train on a CPU in minutes; ``width`` channels, doubled twice.

    The last map is pooled to ``grid`` x ``grid``, so any input size gives D = 4 * width * grid^2.
    """
    if min(width, grid) < 1:
        raise ValueError(f"width and grid must be at least 1, got {width} and {grid}")
    trunk = nn.Sequential(
        # the only layer at full resolution strides, since it would cost more than all others together
        nn.Conv2d(3, width, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        *_block(width, 2 * width),
        nn.MaxPool2d(2),
        *_block(2 * width, 4 * width),
        *_block(4 * width, 4 * width),
        nn.AdaptiveAvgPool2d(grid),
        nn.Flatten(),
    )
    return ImageEncoder(trunk, 4 * width * grid**2, smallest=8, statistics=((0.5,) * 3, (0.25,) * 3))


@register("image-encoder", "vector", modality="image")
class VectorMLP(Encoder):
    """Fully connected layers with ReLU on vectors of image features, as of the data set ``wikipedia``.

    Args:
        inputs: V, values in each vector.
        widths: of the layers; the last is D.
        dropout: after every layer.
        normalise: bring each vector to mean 0 and variance 1; nets do not learn from histograms that sum to
            one.
    """

    def __init__(
        self, inputs: int, widths: Sequence[int] = (512,), dropout: float = 0.0, normalise: bool = True
    ) -> None:
        super().__init__()
        if inputs < 1 or not widths or min(widths) < 1:
            raise ValueError(f"inputs and widths must be positive numbers, got {inputs} and {list(widths)}")
        first = [nn.LayerNorm(inputs, eps=1e-8, elementwise_affine=False)] if normalise else []
        self.layers = nn.Sequential(*first, *dense(inputs, widths, dropout))
        self.inputs = inputs
        self.width = widths[-1]

    def forward(self, vectors: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if vectors.dim() != 2 or vectors.shape[1] != self.inputs:
            raise ValueError(
                f"the encoder 'vector' takes {self.inputs} features an item, and the images come as "
                f"{tuple(vectors.shape)}; set its inputs to their number, or choose an encoder for pixels"
            )
        return self.layers(vectors), {}


@register("image-encoder", "layered", modality="image")
class Layered(Encoder):
    """Fully connected layers with ReLU on another image encoder; the last width is D.

    Args:
        inner: ``image-encoder`` name or settings.
        widths: of the layers; DADH has (8192, 4096, 2048) on a convolutional net, with ``batchnorm``.
        dropout, batchnorm: as of the text encoder ``mlp``.
    """

    def __init__(
        self,
        inner: str | Mapping[str, Any] = "small",
        widths: Sequence[int] = (512,),
        dropout: float = 0.0,
        batchnorm: bool = False,
    ) -> None:
        super().__init__()
        self.inner = build("image-encoder", inner)
        self.layers = dense(int(self.inner.width), widths, dropout, batchnorm)
        self.width = widths[-1]

    @property
    def smallest(self) -> int:
        """Least side of an image in pixels, the inner encoder's."""
        return self.inner.smallest

    def forward(self, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        features, aux = self.inner(values)
        return self.layers(features), aux


class UnchangedValues(Encoder):
    """The values of an item as they are, (B, ...) -> (B, D); with ``unit`` at length one."""

    one: Tensor

    def __init__(self, width: int, unit: bool) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"features need at least one value an item, got {width}")
        self.width = width
        self.unit = unit
        self.register_buffer("one", torch.ones(()), persistent=False)  # knows the dtype of the hasher

    def forward(self, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        shape = tuple(values.shape)
        if len(shape) < 2:
            raise ValueError(
                f"the encoder 'features' takes items in rows, (N, {self.width}), got {shape}; of one item "
                "give values[None]"
            )
        flat = values.flatten(1)
        if isinstance(flat, Tensor) and flat.is_floating_point():  # not the bounds of a certificate
            broken = torch.nonzero(~flat.isfinite().all(1)).flatten()
            if len(broken):
                many = f"{len(broken)} of {len(flat)} items, the first at {int(broken[0])}"
                raise ValueError(f"features are NaN or infinite in {many}; leave these items out")
            flat = flat.to(self.one.dtype)
        if flat.shape[1] != self.width or not flat.is_floating_point():
            raise ValueError(
                f"the encoder 'features' has {self.width} values an item, and these come as {values.dtype} "
                f"{shape}; set hasher.image.inputs to their number, for images channels x height x width"
            )
        return (normalize(flat, eps=1e-12) if self.unit else flat), {}


@register("image-encoder", "features", modality="image", state="measured")
class ImageFeatures(UnchangedValues):
    """Vectors of image features, or all pixels of an image, as they are: for shallow hashing.

    Args:
        inputs: D, values an item: 128 for ``wikipedia``, 3 x 16 x 16 = 768 for images of 16 px.
        unit: bring each item to length one.
    """

    def __init__(self, inputs: int, unit: bool = False) -> None:
        super().__init__(inputs, unit)


@register("text-encoder", "features", modality="text", state="measured")
class TextFeatures(UnchangedValues):
    """Bags of words or weights of topics as they are: for shallow hashing.

    Args:
        vocabulary: D, known from the data.
        unit: bring each item to length one.
    """

    def __init__(self, vocabulary: int, unit: bool = False) -> None:
        super().__init__(vocabulary, unit)
        self.vocabulary = vocabulary
