"""Text encoders: (B, V) bags of words in [0, 1] -> (features (B, D), aux)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from robusthash.core.registry import register


@register(
    "text-encoder", "mlp", paper="DCMH, CVPR 2017", evidence="paper+code", modality="text", state="measured"
)
class TextMLP(nn.Module):
    """Fully connected layers with ReLU on a bag of words; the last width is D.

    Args:
        vocabulary: V, known from the data.
        widths: of the layers. Papers: DCMH (8192), DSARH (4096, 512), AGAH (8192, 4096, 512), DAPH (4096)
            with dropout 0.2, DADH (8192, 4096, 2048) with ``batchnorm``. Ours for small sets: (512,).
        dropout: after every layer.
        batchnorm: normalise before each ReLU.
    """

    def __init__(
        self, vocabulary: int, widths: Sequence[int] = (512,), dropout: float = 0.0, batchnorm: bool = False
    ) -> None:
        super().__init__()
        if not widths or min(widths) < 1:
            raise ValueError(f"widths must be at least one positive number, got {list(widths)}")
        layers: list[nn.Module] = []
        for inputs, outputs in zip((vocabulary, *widths), widths, strict=False):
            layers.append(nn.Linear(inputs, outputs))
            layers += [nn.BatchNorm1d(outputs)] if batchnorm else []
            layers.append(nn.ReLU())
            layers += [nn.Dropout(dropout)] if dropout else []
        self.layers = nn.Sequential(*layers)
        self.vocabulary = vocabulary
        self.width = widths[-1]

    def forward(self, bags: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if bags.dim() != 2 or bags.shape[1] != self.vocabulary or not bags.is_floating_point():
            raise ValueError(
                f"this text encoder counts {self.vocabulary} words, and the texts come as {bags.dtype} "
                f"{tuple(bags.shape)}; "
                "use the vocabulary that it was trained with"
            )
        return self.layers(bags), {}
