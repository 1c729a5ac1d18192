"""An encoder of features: (B, V) vectors in place of images -> (features (B, D), aux)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from robusthash.core.registry import register


@register("image-encoder", "vector", modality="image")
class VectorMLP(nn.Module):
    """Fully connected layers with ReLU on vectors of image features, such as those of the data set
    ``wikipedia``.

    Args:
        inputs: V, values in each vector.
        widths: of the layers; the last is D.
        dropout: after every layer.
        normalise: first bring each vector to mean 0 and variance 1. Histograms sum to one, and at that scale,
            a hundredth a value, a net with usual learning rates does not see them.
    """

    def __init__(
        self, inputs: int, widths: Sequence[int] = (512,), dropout: float = 0.0, normalise: bool = True
    ) -> None:
        super().__init__()
        if inputs < 1 or not widths or min(widths) < 1:
            raise ValueError(f"inputs and widths must be positive numbers, got {inputs} and {list(widths)}")
        layers: list[nn.Module] = (
            [nn.LayerNorm(inputs, eps=1e-8, elementwise_affine=False)] if normalise else []
        )
        for before, after in zip((inputs, *widths), widths, strict=False):
            layers += [nn.Linear(before, after), nn.ReLU()]
            layers += [nn.Dropout(dropout)] if dropout else []
        self.layers = nn.Sequential(*layers)
        self.inputs = inputs
        self.width = widths[-1]

    def forward(self, vectors: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if vectors.dim() != 2 or vectors.shape[1] != self.inputs:
            raise ValueError(
                f"the encoder 'vector' takes {self.inputs} features an item, and the images come as "
                f"{tuple(vectors.shape)}; set its inputs to their number, or choose an encoder for pixels"
            )
        return self.layers(vectors), {}
