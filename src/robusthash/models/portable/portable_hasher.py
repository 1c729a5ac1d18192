"""A hasher of one modality as a net of plain operators: inputs in, packed codes and logits out."""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from robusthash.core.types import HashOutput
from robusthash.models.gfnet import GlobalFilter
from robusthash.models.hasher import Hasher

Pixels = Literal["float32", "uint8"]
"""Pixels in [0, 1], or whole numbers from 0 to 255, which are divided by 255 inside."""


class PortableHasher(nn.Module):
    """Purifier, normalisation, encoder and head of a hasher; a copy, on the CPU and in eval mode.

    Images (B, 3, S, S) or texts, bags (B, V) or token ids (B, L), -> (B, ceil(K / 8)) uint8 codes, packed as
    ``hamming.pack`` does it, and (B, K) logits, which attacks follow and whose signs are the bits.

    Args:
        pixels: of images.
    """

    places: Tensor

    def __init__(self, hasher: Hasher, modality: str, pixels: Pixels = "float32") -> None:
        super().__init__()
        parts = copy.deepcopy(hasher).cpu().eval().requires_grad_(False)
        self.encoder, self.head = parts.encoders[modality], parts.heads[modality]
        self.purifier = dict(parts.purifiers).get(modality)
        self.bits, self.from_bytes = hasher.bits, modality == "image" and pixels == "uint8"
        self.register_buffer("places", 2.0 ** torch.arange(7, -1, -1))
        for module in list(self.encoder.modules()):
            for name, child in module.named_children():
                if isinstance(child, GlobalFilter):
                    setattr(module, name, CosineFilter(child))
                elif isinstance(child, nn.AdaptiveAvgPool2d):
                    setattr(module, name, WindowMeans(child))

    def _hash(self, inputs: Tensor) -> HashOutput:
        features, aux = self.encoder(inputs)
        logits, code, scale = self.head(features)
        return HashOutput(logits, code, features, aux, scale)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        if self.from_bytes:
            inputs = inputs.to(self.places.dtype) / 255
        if self.purifier is not None:
            inputs, _ = self.purifier(inputs, self._hash)
        logits = self._hash(inputs).logits
        return self.packed(logits), logits

    def packed(self, logits: Tensor) -> Tensor:
        """(B, K) logits -> (B, ceil(K / 8)) uint8; bit 1 where logits >= 0, the first bit highest."""
        bits = pad((logits >= 0).to(self.places.dtype), (0, -self.bits % 8))
        return (bits.reshape(-1, (self.bits + 7) // 8, 8) * self.places).sum(-1).to(torch.uint8)


class CosineFilter(nn.Module):
    """A ``GlobalFilter`` by products with matrices of cosines and sines: runtimes of files have no FFT."""

    def __init__(self, filter: GlobalFilter) -> None:
        super().__init__()
        n, half = filter.grid, filter.grid // 2 + 1
        self.grid = n
        turns = torch.arange(n, dtype=torch.float64)[:, None] * torch.arange(n, dtype=torch.float64)
        cosines = (turns * 2 * math.pi / n).cos() / math.sqrt(n)
        sines = (turns * 2 * math.pi / n).sin() / math.sqrt(n)
        # of the frequencies that are left out, each is the conjugate of one that is there
        twice = torch.tensor([1.0 if k in (0, n - k) else 2.0 for k in range(half)], dtype=torch.float64)
        matrices = {"cosines": cosines, "sines": sines}
        matrices |= {"half_cosines": cosines[:, :half], "half_sines": sines[:, :half]}
        matrices |= {"back_cosines": cosines[:, :half] * twice, "back_sines": sines[:, :half] * twice}
        real, imaginary = filter.complex_weight.detach().unbind(-1)
        for name, value in {**matrices, "real": real, "imaginary": imaginary}.items():
            self.register_buffer(name, value.to(torch.float32).contiguous())

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, n * n, C) -> (B, n * n, C)."""
        part: dict[str, Tensor] = dict(self.named_buffers())
        x = tokens.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)  # (B, C, rows, columns)
        a, b = x @ part["half_cosines"], -(x @ part["half_sines"])
        cosines, sines = part["cosines"], part["sines"]
        a, b = cosines @ a + sines @ b, cosines @ b - sines @ a
        real, imaginary = part["real"].permute(2, 0, 1), part["imaginary"].permute(2, 0, 1)
        a, b = a * real - b * imaginary, a * imaginary + b * real
        a, b = cosines @ a - sines @ b, cosines @ b + sines @ a
        mixed = a @ part["back_cosines"].T - b @ part["back_sines"].T
        return mixed.permute(0, 2, 3, 1).flatten(1, 2)


class WindowMeans(nn.Module):
    """Adaptive average pooling as two products with matrices: ONNX has none but over whole maps."""

    def __init__(self, pool: nn.AdaptiveAvgPool2d) -> None:
        super().__init__()
        size = pool.output_size
        self.rows, self.columns = (size, size) if isinstance(size, int) or size is None else size

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, rows, columns)."""
        if self.rows == self.columns == 1:
            return maps.mean((-2, -1), keepdim=True)
        rows, columns = (
            _windows(int(side), side_after).to(maps)
            for side, side_after in zip(maps.shape[-2:], (self.rows, self.columns), strict=True)
        )
        return rows @ maps @ columns.T


def _windows(before: int, after: int | None) -> Tensor:
    """(after, before) weights of the mean of each window; torch rounds windows outwards."""
    after = before if after is None else after
    weights = torch.zeros(after, before)
    for place in range(after):
        first, last = place * before // after, -(-(place + 1) * before // after)
        weights[place, first:last] = 1 / (last - first)
    return weights
