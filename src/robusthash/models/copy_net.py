"""The encoder of the packaged hash for copies: residual layers on an image of 16 x 16 pixels."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from robusthash.core.registry import register
from robusthash.models.hasher import Encoder


@register("image-encoder", "copy-net", modality="image", state="measured")
class CopyNet(Encoder):
    """Residual fully connected layers on the means of blocks of pixels; ours.

    A change of 8/255 is small next to the differences of large blocks, and large next to fine detail, so the
    net sees blocks alone.

    Args:
        width: D, of every layer.
        depth: residual layers.
        side: blocks in a row.
    """

    def __init__(self, width: int = 512, depth: int = 3, side: int = 16) -> None:
        super().__init__()
        if min(width, depth, side) < 1:
            raise ValueError(f"width, depth and side must be at least 1, got {width}, {depth}, {side}")
        self.width, self.smallest = width, side
        self.stem = nn.Linear(3 * side * side, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm1d(width), nn.SiLU(), nn.Linear(width, width, bias=False))
            for _ in range(depth)
        )
        self.last = nn.Sequential(nn.BatchNorm1d(width), nn.SiLU())

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        height, width = map(int, x.shape[-2:])  # numbers, also while an export traces the net
        if min(height, width) < self.smallest:
            raise ValueError(
                f"the image encoder copy-net needs images of at least {self.smallest} px, and these have "
                f"{height} x {width}; set the data's size to 64"
            )
        if height % self.smallest or width % self.smallest:
            blocks = functional.adaptive_avg_pool2d(x, self.smallest)
        else:
            blocks = functional.avg_pool2d(x, (height // self.smallest, width // self.smallest))
        features = self.stem((2 * blocks - 1).flatten(1))
        for layer in self.layers:
            features = features + layer(features)
        return self.last(features), {}
