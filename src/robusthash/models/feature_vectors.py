"""Encoders that learn nothing: the values of an image, a vector or a bag of words are the features."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from robusthash.core.registry import register
from robusthash.models.hasher import Encoder


class UnchangedValues(Encoder):
    """The values of an item as they are, (B, ...) -> (B, D); with ``unit`` at length one."""

    def __init__(self, width: int, unit: bool) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"features need at least one value an item, got {width}")
        self.width = width
        self.unit = unit

    def forward(self, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        flat = values.flatten(1)
        if flat.shape[1] != self.width or not flat.is_floating_point():
            shape = tuple(values.shape)
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
