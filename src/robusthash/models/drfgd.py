"""DRFGD's purifiers: a query is taken apart into a robust and a fragile view, and made anew from the robust
one."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.utils.parametrizations import spectral_norm

from robusthash.core.registry import register
from robusthash.models.purifier import Encode, Purifier, carried


@dataclass(frozen=True)
class Regenerated:
    """A batch made anew, and what training looks at."""

    sample: Tensor  # the shape and range of the inputs
    robust: Tensor  # (B, Z) attack-robust feature z_arf
    fragile: Tensor  # (B, Z) attack-vulnerable feature z_avf


class Regenerator(Purifier):
    """Interface of a purifier that takes its input apart: one encoder, two parallel branches, one decoder.

    The decoder sees the encoding and the robust branch only. At inference the fragile branch is not run.
    """

    width: int  # Z

    @abstractmethod
    def _read(self, x: Tensor) -> list[Tensor]:
        """What the decoder's skips need, and last the encoding f that the branches share."""

    @abstractmethod
    def _write(self, x: Tensor, read: list[Tensor], robust: Tensor) -> Tensor:
        """Make the sample from the robust branch (unpooled) and the encoding."""

    @abstractmethod
    def critic(self) -> nn.Module:
        """A new discriminator of such inputs: (B, ...) -> logits, above 0 for what it takes to be real."""

    robust: nn.Module
    fragile: nn.Module

    def forward(self, x: Tensor, encode: Encode) -> tuple[Tensor, dict[str, Tensor]]:
        read = self._read(x)
        return self._write(x, read, self.robust(read[-1])), {}

    def regenerate(self, x: Tensor) -> Regenerated:
        """The sample with both views, pooled over places."""
        read = self._read(x)
        robust, fragile = self.robust(read[-1]), self.fragile(read[-1])
        return Regenerated(self._write(x, read, robust), _pooled(robust), _pooled(fragile))


def _pooled(view: Tensor) -> Tensor:
    return view.mean((2, 3)) if view.dim() == 4 else view


class _Residual(nn.Module):
    """x + two layers, each after normalisation and ReLU."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Convolution, normalisation within each image (no batch statistics: a query must not depend on others),
    ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.GroupNorm(4, outputs), nn.ReLU(inplace=True)
    )


@register(
    "purifier", "drfgd-image", paper="DRFGD, AAAI 2026", evidence="paper", modality="image", state="measured"
)
class ImageRegenerator(Regenerator):
    """A residual U-Net over images (B, 3, H, W) in [0, 1], any H and W of at least 8.

    Channels width, 2 width, 4 width at scales 1, 1/2, 1/4; both branches are two convolutions of 4 width
    channels at scale 1/4, and the decoder takes encoding and robust branch side by side.

    Args:
        width: channels at full scale, a multiple of 4. 64 is what the paper's size suggests; 16 runs on a
            CPU.
        output: ``residual`` adds tanh of the last layer to the input and clamps; that layer starts at zero,
            so the new purifier changes nothing. ``direct`` is a sigmoid of it: no way around the decoder for
            a perturbation.

    Differs: the paper names neither the source of the encoding f nor any layer; all of this is ours.

    Raises:
        ValueError: a width that four groups do not divide, or an unknown output.
    """

    def __init__(self, width: int = 16, output: Literal["residual", "direct"] = "residual") -> None:
        super().__init__()
        if width < 4 or width % 4:
            raise ValueError(f"width must be a positive multiple of 4, got {width}")
        _check_output(output)
        self.output = output
        self.width = deep = 4 * width
        self.first = _conv(3, width)
        self.down = nn.ModuleList([_conv(width, 2 * width, 2), _conv(2 * width, deep, 2)])
        self.bottom = _Residual(_conv(deep, deep), nn.Conv2d(deep, deep, 3, padding=1))
        self.robust = nn.Sequential(_conv(deep, deep), nn.Conv2d(deep, deep, 3, padding=1))
        self.fragile = nn.Sequential(_conv(deep, deep), nn.Conv2d(deep, deep, 3, padding=1))
        self.up = nn.ModuleList([_conv(2 * deep, 2 * width), _conv(2 * width, width)])
        self.last = nn.Conv2d(width, 3, 3, padding=1)
        _zero(self.last, output)

    def _read(self, x: Tensor) -> list[Tensor]:
        if x.dim() != 4 or x.shape[1] != 3 or min(x.shape[-2:]) < 8:
            raise ValueError(
                f"this purifier takes images (B, 3, H, W) of at least 8 px, got {tuple(x.shape)}"
            )
        read = [self.first(2.0 * x - 1.0)]
        for layer in self.down:
            read.append(layer(read[-1]))
        read[-1] = self.bottom(read[-1])
        return read

    def _write(self, x: Tensor, read: list[Tensor], robust: Tensor) -> Tensor:
        deep = torch.cat([read[-1], robust], 1)
        for layer, skip in zip(self.up, reversed(read[:-1]), strict=True):
            deep = interpolate(layer(deep), skip.shape[-2:], mode="nearest") + skip
        return _finish(x, self.last(deep), self.output)

    def critic(self) -> nn.Module:
        return PatchCritic(self.width // 4)

    def views(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H / 4, W / 4) mean |activation| of the robust and of the fragile branch: where each of them
        looks."""
        deep = self._read(x)[-1]
        return self.robust(deep).abs().mean(1), self.fragile(deep).abs().mean(1)


@register(
    "purifier", "drfgd-text", paper="DRFGD, AAAI 2026", evidence="paper", modality="text", state="measured"
)
class TextRegenerator(Regenerator):
    """The same over bags of words (B, V) in [0, 1], of fully connected residual layers.

    Args:
        vocabulary: V, known from the data.
        hidden: width of every layer and of both views.
        output: as for images; but the clamp of ``residual`` is left out of the gradient (straight through),
            in training and for attackers. Words are 0 or 1, the edges of the range, where the clamp cuts many
            changes (ours).
    """

    def __init__(
        self, vocabulary: int, hidden: int = 512, output: Literal["residual", "direct"] = "residual"
    ) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}")
        _check_output(output)
        self.vocabulary = vocabulary
        self.output = output
        self.width = hidden
        self.first = nn.Sequential(nn.Linear(vocabulary, hidden), nn.ReLU())
        self.bottom = _Residual(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
        self.robust = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
        self.fragile = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
        self.join = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.ReLU())
        self.up = _Residual(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
        self.last = nn.Linear(hidden, vocabulary)
        _zero(self.last, output)

    def _read(self, x: Tensor) -> list[Tensor]:
        if x.dim() != 2 or x.shape[1] != self.vocabulary:
            raise ValueError(
                f"this purifier counts {self.vocabulary} words, and the texts come as {tuple(x.shape)}; "
                "use the vocabulary that it was trained with"
            )
        return [self.bottom(self.first(x))]

    def _write(self, x: Tensor, read: list[Tensor], robust: Tensor) -> Tensor:
        change = self.last(self.up(self.join(torch.cat([read[-1], robust], 1))))
        return _finish(x, change, self.output, straight=True)

    def critic(self) -> nn.Module:
        sizes = (self.vocabulary, self.width, self.width // 2 or 1)
        layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.LeakyReLU(0.2))]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], 1))


class PatchCritic(nn.Module):
    """PatchGAN with spectral norm: (B, 3, H, W) -> (B, 1, H / 4, W / 4) logits, one for each patch (ours)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            spectral_norm(nn.Conv2d(3, width, 4, 2, 1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(width, 2 * width, 4, 2, 1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(2 * width, 1, 3, 1, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(2.0 * x - 1.0)


def _check_output(output: str) -> None:
    if output not in ("residual", "direct"):
        raise ValueError(f"output must be 'residual' or 'direct', got {output!r}")


def _zero(last: nn.Conv2d | nn.Linear, output: str) -> None:
    if output == "residual":
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]


def _finish(x: Tensor, change: Tensor, output: str, *, straight: bool = False) -> Tensor:
    """The sample from what the last layer says; ``straight`` leaves the clamp out of the gradient."""
    if output == "direct":
        return torch.sigmoid(change).to(x.dtype)
    free = x + torch.tanh(change)
    kept = free.clamp(0.0, 1.0)
    return (carried(kept, free) if straight else kept).to(x.dtype)
