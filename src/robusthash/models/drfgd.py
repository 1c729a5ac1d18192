"""DRFGD's purifiers: queries split into a robust and a fragile view and regenerated from the robust one."""

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
from robusthash.models.purifier import Encode, Purifier, with_gradient_of

Output = Literal["residual", "direct"]


@dataclass(frozen=True)
class Regenerated:
    """A regenerated batch and both views of it, for training."""

    sample: Tensor  # the shape and range of the inputs
    robust: Tensor  # (B, Z) attack-robust feature z_arf
    fragile: Tensor  # (B, Z) attack-vulnerable feature z_avf


class Regenerator(Purifier):
    """Interface of a purifier of one encoder, two parallel branches and one decoder.

    The decoder gets the encoding and the robust branch only. At inference the fragile branch is not run.
    """

    width: int  # Z
    robust: nn.Module
    fragile: nn.Module

    @abstractmethod
    def _read(self, x: Tensor) -> list[Tensor]:
        """The features for the decoder's skips, and last the encoding f that the branches share."""

    @abstractmethod
    def _write(self, x: Tensor, features: list[Tensor], robust: Tensor) -> Tensor:
        """The sample from the robust branch (unpooled) and the encoding."""

    @abstractmethod
    def critic(self) -> nn.Module:
        """A new discriminator of such inputs: (B, ...) -> logits, above 0 for real."""

    def forward(self, x: Tensor, encode: Encode) -> tuple[Tensor, dict[str, Tensor]]:
        features = self._read(x)
        return self._write(x, features, self.robust(features[-1])), {}

    def regenerate(self, x: Tensor) -> Regenerated:
        """The sample with both views, pooled over places."""
        features = self._read(x)
        robust, fragile = self.robust(features[-1]), self.fragile(features[-1])
        return Regenerated(self._write(x, features, robust), _pooled(robust), _pooled(fragile))


def _pooled(view: Tensor) -> Tensor:
    return view.mean((2, 3)) if view.dim() == 4 else view


class _Residual(nn.Module):
    """x + layers(x)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
    # normalised within each image: with batch statistics a query would depend on others
    return nn.Sequential(conv, nn.GroupNorm(4, outputs), nn.ReLU(inplace=True))


@register(
    "purifier", "drfgd-image", paper="DRFGD, AAAI 2026", evidence="paper", modality="image", state="measured"
)
class ImageRegenerator(Regenerator):
    """A residual U-Net over images (B, 3, H, W) in [0, 1], any H and W of at least 8.

    Channels width, 2 width, 4 width at scales 1, 1/2, 1/4; both branches are two convolutions of 4 width
    channels at scale 1/4, and the decoder takes encoding and robust branch side by side.

    Args:
        width: channels at full scale, a multiple of 4; the paper's size suggests 64, 16 runs on a CPU.
        output: ``residual`` adds tanh of the last layer, which starts at zero, to the input and clamps;
            ``direct`` is a sigmoid of it: no way around the decoder for a perturbation.

    Differs: the paper names neither the source of the encoding f nor any layer; all of this is ours.
    """

    def __init__(self, width: int = 16, output: Output = "residual") -> None:
        super().__init__()
        if width < 4 or width % 4:
            raise ValueError(f"width must be a positive multiple of 4, got {width}")
        self.output = _checked(output)
        self.width = deep = 4 * width
        self.first = _conv(3, width)
        self.down = nn.ModuleList([_conv(width, 2 * width, 2), _conv(2 * width, deep, 2)])
        self.bottom = _Residual(_conv(deep, deep), nn.Conv2d(deep, deep, 3, padding=1))
        self.robust = nn.Sequential(_conv(deep, deep), nn.Conv2d(deep, deep, 3, padding=1))
        self.fragile = nn.Sequential(_conv(deep, deep), nn.Conv2d(deep, deep, 3, padding=1))
        self.up = nn.ModuleList([_conv(2 * deep, 2 * width), _conv(2 * width, width)])
        self.last = nn.Conv2d(width, 3, 3, padding=1)
        _start(self.last, output)

    def _read(self, x: Tensor) -> list[Tensor]:
        if x.dim() != 4 or x.shape[1] != 3 or min(x.shape[-2:]) < 8:
            raise ValueError(f"this purifier takes images (B, 3, H, W) of 8 px or more, got {tuple(x.shape)}")
        features = [self.first(2.0 * x - 1.0)]
        for layer in self.down:
            features.append(layer(features[-1]))
        features[-1] = self.bottom(features[-1])
        return features

    def _write(self, x: Tensor, features: list[Tensor], robust: Tensor) -> Tensor:
        deep = torch.cat([features[-1], robust], 1)
        for layer, skip in zip(self.up, reversed(features[:-1]), strict=True):
            size = int(skip.shape[-2]), int(skip.shape[-1])  # numbers, also where an export traces shapes
            deep = interpolate(layer(deep), size, mode="nearest") + skip
        return _sample(x, self.last(deep), self.output)

    def critic(self) -> nn.Module:
        return PatchCritic(self.width // 4)

    def views(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H / 4, W / 4) mean |activation| of the robust and of the fragile branch, for heat maps."""
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
        output: as for images; but the clamp of ``residual`` is left out of the gradient (straight through):
            words are 0 or 1, the edges of the range, where it cuts many changes (ours).
    """

    def __init__(self, vocabulary: int, hidden: int = 512, output: Output = "residual") -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}")
        self.vocabulary = vocabulary
        self.output = _checked(output)
        self.width = hidden
        self.first = nn.Sequential(nn.Linear(vocabulary, hidden), nn.ReLU())
        self.bottom = _Residual(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
        self.robust = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
        self.fragile = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
        self.join = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.ReLU())
        self.up = _Residual(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
        self.last = nn.Linear(hidden, vocabulary)
        _start(self.last, output)

    def _read(self, x: Tensor) -> list[Tensor]:
        if x.dim() != 2 or x.shape[1] != self.vocabulary:
            raise ValueError(
                f"this purifier counts {self.vocabulary} words, and the texts come as {tuple(x.shape)}; "
                "use the vocabulary that it was trained with"
            )
        return [self.bottom(self.first(x))]

    def _write(self, x: Tensor, features: list[Tensor], robust: Tensor) -> Tensor:
        change = self.last(self.up(self.join(torch.cat([features[-1], robust], 1))))
        return _sample(x, change, self.output, straight_through=True)

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


def _checked(output: Output) -> Output:
    if output not in ("residual", "direct"):
        raise ValueError(f"output must be 'residual' or 'direct', got {output!r}")
    return output


def _start(last: nn.Conv2d | nn.Linear, output: Output) -> None:
    """Start a residual at zero."""
    if output == "residual":
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]


def _sample(x: Tensor, change: Tensor, output: Output, *, straight_through: bool = False) -> Tensor:
    """The sample from the last layer's output; ``straight_through`` leaves the clamp out of the gradient."""
    if output == "direct":
        return torch.sigmoid(change).to(x.dtype)
    free = x + torch.tanh(change)
    clamped = free.clamp(0.0, 1.0)
    return (with_gradient_of(clamped, free) if straight_through else clamped).to(x.dtype)
