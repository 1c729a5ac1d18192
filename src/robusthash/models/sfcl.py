"""SFCL's image encoder, a spatial and a frequency backbone, gated and then fused, and views of its masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robusthash.core.registry import build, register
from robusthash.models.hasher import Encoder, Hasher
from robusthash.models.surrogate_gradients import (
    GradientView,
    SampledHasher,
    SampledView,
    VictimValues,
    ViewedHasher,
)

DOMAINS = ("spatial", "frequency")
"""Names of the two backbones in ``HashOutput.aux``, also where the second is another spatial one."""

MaskKind = Literal["own", "soft", "hard", "noisy"]
"""A mask as the mode and the settings make it (own), or as an attacker assumes it."""


class Separation(nn.Module):
    """Splits features into a robust and a non-robust part by a learned mask: f+ = m o f, f- = f - f+.

    r = MLP(f); with noise, m = sigmoid((r + g1 - g2) / tau), g Gumbel, which is the two-way Gumbel softmax of
    sigmoid(r) exactly (log s(r) - log(1 - s(r)) = r). Noise in training only: without it m = sigmoid(r /
    tau), or 1[r >= 0] with the gradient of that (``hard_eval``).
    """

    def __init__(self, width: int, hidden: int = 256, tau: float = 1.0, hard_eval: bool = False) -> None:
        super().__init__()
        if tau <= 0:
            raise ValueError(f"tau is a temperature above 0, got {tau:g}")
        self.score = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.tau = tau
        self.hard_eval = hard_eval

    def mask(self, features: Tensor, kind: MaskKind = "own") -> Tensor:
        """(B, D) -> (B, D) in [0, 1]; ``own`` is noisy in training, else hard or soft by ``hard_eval``."""
        if kind == "own":
            kind = "noisy" if self.training else "hard" if self.hard_eval else "soft"
        r = self.score(features).float()
        if kind == "noisy":
            # a difference of two Gumbels is logistic; drawn as one, with u kept off 0 and 1
            u = torch.rand_like(r).clamp(1e-6, 1.0 - 1e-6)
            return torch.sigmoid((r + torch.logit(u)) / self.tau)
        soft = torch.sigmoid(r / self.tau)
        return (r >= 0).to(soft) + (soft - soft.detach()) if kind == "hard" else soft

    def forward(self, features: Tensor, kind: MaskKind = "own") -> tuple[Tensor, Tensor]:
        """(B, D) -> f+ and f-, which add to the features."""
        robust = self.mask(features, kind).to(features.dtype) * features
        return robust, features - robust


class Exchange(nn.Module):
    """One way of the fusion: f_a + gamma * sigmoid(W f_b). Additive, as printed, and no gate."""

    def __init__(self, width: int, other: int, gamma: float = 0.1) -> None:
        super().__init__()
        self.linear = nn.Linear(other, width, bias=False)
        self.gamma = nn.Parameter(torch.tensor(gamma))

    def forward(self, features: Tensor, others: Tensor) -> Tensor:
        return features + self.gamma * torch.sigmoid(self.linear(others))


@register(
    "image-encoder", "sfcl", paper="SFCL, ICMR 2026", evidence="paper", modality="image", state="measured"
)
class SFCLEncoder(Encoder):
    """Spatial and frequency features, separated by masks (SFRG) and fused (RAFF); D = ``width``.

    f+_s, f+_f from the separation nets; f~_s = f+_s + g_s sigmoid(W_sf f+_f), f~_f likewise with the sides
    exchanged; features = MLP [f~_s | f~_f] with GELU. ``aux`` has the ungated features as ``spatial`` and
    ``frequency``, f+ and f- as ``spatial+``, ``spatial-`` and so on. The defaults are the paper's pair at 224
    px, AlexNet and GFNet-Ti.

    Args:
        spatial, frequency: ``image-encoder`` names or settings; two spatial ones are the control of the
            paper's idea.
        width: of the fused features and of the fusion's hidden layer (paper: hidden 512, output not given).
        hidden: of the separation nets.
        tau: temperature of the masks, 1 in the paper.
        separate: False: masks are 1, and ``aux`` has no f- (ablation S).
        fuse: False: no exchange, only the MLP (ablation F).
        gamma: start of g_s and g_f (ours; the paper does not say).
        hard_eval: masks of 0 and 1 outside training (ours; off).
    """

    def __init__(
        self,
        spatial: str | Mapping[str, Any] = "alexnet",
        frequency: str | Mapping[str, Any] = "gfnet",
        width: int = 512,
        hidden: int = 256,
        tau: float = 1.0,
        separate: bool = True,
        fuse: bool = True,
        gamma: float = 0.1,
        hard_eval: bool = False,
    ) -> None:
        super().__init__()
        nets = dict(zip(DOMAINS, (spatial, frequency), strict=True))
        backbones = {name: build("image-encoder", net) for name, net in nets.items()}
        if any(isinstance(backbone, SFCLEncoder) for backbone in backbones.values()):
            raise ValueError("a backbone of 'sfcl' must be a plain image encoder, not 'sfcl' itself")
        self.widths = widths = {name: int(backbone.width) for name, backbone in backbones.items()}
        one, two = widths.values()
        self.backbones = nn.ModuleDict(backbones)
        separated = widths.items() if separate else ()
        self.separations = nn.ModuleDict({n: Separation(D, hidden, tau, hard_eval) for n, D in separated})
        self.exchanges = nn.ModuleList([Exchange(one, two, gamma), Exchange(two, one, gamma)] if fuse else [])
        self.fusion = nn.Sequential(nn.Linear(one + two, width), nn.GELU(), nn.Linear(width, width))
        self.width = width
        self.hard_eval = hard_eval
        self.declares = "mask" if separate else "plain"

    @property
    def aux_widths(self) -> Mapping[str, int]:
        parts = ("", "+", "-") if self.separations else ("", "+")
        return {f"{name}{part}": self.widths[name] for name in DOMAINS for part in parts}

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.assumed(x)

    def assumed(
        self, x: Tensor, mask: MaskKind = "own", only: str | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``forward`` with an assumed kind of mask, or the gradient of ``only`` one domain's backbone."""
        aux: dict[str, Tensor] = {}
        for name in DOMAINS:
            features, _ = self.backbones[name](x)
            if only not in (None, name):
                features = features.detach()
            aux[name] = aux[f"{name}+"] = features
            if self.separations:
                aux[f"{name}+"], aux[f"{name}-"] = self.separations[name](features, mask)
        left, right = aux["spatial+"], aux["frequency+"]
        if self.exchanges:
            left, right = self.exchanges[0](left, right), self.exchanges[1](right, left)
        return self.fusion(torch.cat([left, right], 1)), aux


class _AssumedEncoder(nn.Module):
    """SFCL's encoder with other masks, or with the gradient of one branch."""

    def __init__(self, inner: SFCLEncoder, mask: MaskKind = "own", only: str | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.mask = mask
        self.only = only

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.inner.assumed(x, self.mask, self.only)


def masks_of(victim: Hasher) -> dict[str, SFCLEncoder]:
    """The SFCL encoders of a victim that separate by masks, by modality."""
    return {n: e for n, e in victim.encoders.items() if isinstance(e, SFCLEncoder) and len(e.separations)}


def _assuming(victim: Hasher, mask: MaskKind = "own", only: str | None = None) -> Hasher:
    encoders = masks_of(victim)
    if not encoders:
        raise ValueError("a view of masks or branches needs the image encoder 'sfcl' with separate: true")
    return victim.with_parts({name: _AssumedEncoder(e, mask, only) for name, e in encoders.items()})


@register("gradient-view", "mask")
@dataclass(frozen=True)
class MaskView(GradientView):
    """Gradients as if masks were ``hard`` (0 or 1, with the soft mask's gradient) or ``soft``."""

    mask: Literal["hard", "soft"]

    def __call__(self, victim: Hasher) -> ViewedHasher:
        return VictimValues(victim, _assuming(victim, self.mask))


@register("gradient-view", "branch")
@dataclass(frozen=True)
class BranchView(GradientView):
    """The gradient of one branch alone, ``spatial`` or ``frequency``; the other is taken for constant."""

    branch: str

    def __post_init__(self) -> None:
        if self.branch not in DOMAINS:
            raise ValueError(f"branch must be one of {', '.join(DOMAINS)}, got {self.branch!r}")

    def __call__(self, victim: Hasher) -> ViewedHasher:
        return ViewedHasher(victim, _assuming(victim, only=self.branch))


@register("gradient-view", "mask-noise")
@dataclass(frozen=True)
class MaskNoise(SampledView):
    """``draws`` samples with the Gumbel noise that masks have in training; codes are those without it."""

    def __call__(self, victim: Hasher) -> ViewedHasher:
        return SampledHasher(victim, _assuming(victim, "noisy"), self.draws, deterministic=True)
