"""GFNet: an image encoder that mixes its tokens in the frequency domain (the frequency backbone of SFCL)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robusthash.core.registry import register
from robusthash.models.image_encoders import ImageEncoder
from robusthash.models.pretrained_weights import load_weights


class GlobalFilter(nn.Module):
    """F^-1(W o F(X)) over an n x n grid of tokens: a circular convolution as large as the grid, per channel.

    ``complex_weight`` is (n, n // 2 + 1, C, 2), real and imaginary part, drawn from N(0, 0.02^2) as in the
    code. The transform runs in float32 (float64 for a float64 model), under autocast too.
    """

    def __init__(self, grid: int, dim: int) -> None:
        super().__init__()
        self.grid = grid
        self.complex_weight = nn.Parameter(torch.randn(grid, grid // 2 + 1, dim, 2) * 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, n * n, C) -> (B, n * n, C)."""
        n = self.grid
        with torch.autocast(tokens.device.type, enabled=False):
            x = tokens.to(torch.promote_types(tokens.dtype, torch.float32)).unflatten(1, (n, n))
            # a model in channels-last strides its 4-d weights so that the two parts are no longer neighbours
            weight = torch.view_as_complex(self.complex_weight.contiguous())
            spectrum = torch.fft.rfft2(x, dim=(1, 2), norm="ortho") * weight
            mixed = torch.fft.irfft2(spectrum, s=(n, n), dim=(1, 2), norm="ortho")
        return mixed.flatten(1, 2).to(tokens.dtype)


class Mlp(nn.Module):
    """C -> ratio * C -> C with GELU."""

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, ratio * dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(ratio * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """X + DropPath(MLP(LN(GF(LN(X))))): one residual around the whole chain."""

    def __init__(self, grid: int, dim: int, ratio: int, drop: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.filter = GlobalFilter(grid, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, ratio)
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        change = self.mlp(self.norm2(self.filter(self.norm1(x))))
        if self.training and self.drop:
            mask = (torch.rand(len(x), 1, 1, device=x.device) >= self.drop).to(change.dtype)
            change = change * mask / (1.0 - self.drop)
        return x + change


class PatchEmbedding(nn.Module):
    """Images cut into patches, each a token: (B, 3, S, S) -> (B, n * n, C)."""

    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class GFNet(nn.Module):
    """Patches, position, blocks, LayerNorm, mean over tokens; parameter names are the authors'."""

    def __init__(self, size: int, patch: int, dim: int, depth: int, ratio: int, drop_path: float) -> None:
        super().__init__()
        if patch < 1 or size < patch or size % patch:
            raise ValueError(f"a patch of {patch} px does not divide images of {size} px")
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"drop_path is a probability in [0, 1), got {drop_path:g}")
        if depth < 1:
            raise ValueError(f"depth must be at least 1 block, got {depth}")
        grid = size // patch
        self.patch_embed = PatchEmbedding(patch, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid * grid, dim))
        drops = [drop_path * block / max(depth - 1, 1) for block in range(depth)]
        self.blocks = nn.Sequential(*(Block(grid, dim, ratio, drop) for drop in drops))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, C)."""
        tokens = self.patch_embed(x) + self.pos_embed
        return self.norm(self.blocks(tokens)).mean(1)


@register(
    "image-encoder",
    "gfnet",
    paper="Rao et al., NeurIPS 2021",
    evidence="paper+code",
    modality="image",
    state="measured",
)
def gfnet(
    size: int = 224,
    patch: int = 16,
    dim: int = 256,
    depth: int = 12,
    ratio: int = 4,
    drop_path: float = 0.0,
    weights: str | None = None,
) -> ImageEncoder:
    """GFNet, D = ``dim``; the defaults are GFNet-Ti (7,254,784 parameters). Takes images of ``size`` px only.

    Scaled down, keep at least 8 patches a side: 64 px with patch 8, 32 px with patch 4; dim 64, depth 4.

    Args:
        size, patch: sides of the images, for which the filters are made, and of a patch, a divisor.
        dim: channels of a token, and D.
        depth: blocks.
        ratio: width of the MLPs over ``dim``.
        drop_path: largest probability that a block is left out in training, growing from 0 with depth.
        weights: a file, such as the authors' release of GFNet-Ti; a classifier in it is left out.

    Differs: filters of another size are not resized; the weights must fit.
    """
    trunk = GFNet(size, patch, dim, depth, ratio, drop_path)
    if weights is not None:
        load_weights(trunk, weights, "gfnet", fits="size, patch, dim, depth and ratio must fit")
    return ImageEncoder(trunk, dim, smallest=1, exact=size)


@register(
    "image-encoder", "gfnet-xs", paper="Rao et al., NeurIPS 2021", evidence="paper+code", modality="image"
)
def gfnet_xs(size: int = 224, weights: str | None = None) -> ImageEncoder:
    """GFNet-XS, D = 384, 12 blocks of patches of 16 px. ``weights``: a file or None."""
    return gfnet(size, dim=384, depth=12, weights=weights)


@register(
    "image-encoder", "gfnet-s", paper="Rao et al., NeurIPS 2021", evidence="paper+code", modality="image"
)
def gfnet_s(size: int = 224, weights: str | None = None) -> ImageEncoder:
    """GFNet-S, D = 384, 19 blocks of patches of 16 px. ``weights``: a file or None."""
    return gfnet(size, dim=384, depth=19, weights=weights)


@register(
    "image-encoder", "gfnet-b", paper="Rao et al., NeurIPS 2021", evidence="paper+code", modality="image"
)
def gfnet_b(size: int = 224, weights: str | None = None) -> ImageEncoder:
    """GFNet-B, D = 512, 19 blocks of patches of 16 px. ``weights``: a file or None."""
    return gfnet(size, dim=512, depth=19, weights=weights)
