"""SFCL's image encoder: a spatial and a frequency backbone, gated, then fused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robusthash.core.registry import build, register

DOMAINS = ("spatial", "frequency")
"""What the two backbones are called in ``HashOutput.aux``, also where the second is another spatial one."""

MaskKind = Literal["own", "soft", "hard", "noisy"]
"""How a mask is made: as the mode and the settings say, or as an attacker supposes it."""


class Separation(nn.Module):
    """Splits features into a robust and a non-robust part by a learned mask: f+ = m o f, f- = f - f+.

    r = MLP(f); with noise, m = sigmoid((r + g1 - g2) / tau), g Gumbel, which is the two-way Gumbel softmax of
    sigmoid(r) exactly (log s(r) - log(1 - s(r)) = r). Noise in training only: without it m = sigmoid(r /
    tau), which is soft and deterministic.

    Args:
        width: D of the features.
        hidden: of the MLP.
        tau: temperature.
        hard_eval: outside training, m = 1[r >= 0]; its gradient is that of the soft mask, so that attacks see
            it.
    """

    def __init__(self, width: int, hidden: int = 256, tau: float = 1.0, hard_eval: bool = False) -> None:
        super().__init__()
        if tau <= 0:
            raise ValueError(f"tau is a temperature above 0, got {tau:g}")
        self.score = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.tau = tau
        self.hard_eval = hard_eval

    def mask(self, features: Tensor, kind: MaskKind = "own") -> Tensor:
        """(B, D) -> (B, D) in [0, 1].

        Args:
            kind: ``own``: noisy in training, else hard or soft by ``hard_eval``. ``hard`` has the soft mask's
                gradient.
        """
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
class SFCLEncoder(nn.Module):
    """Spatial and frequency features, separated by masks (SFRG) and fused (RAFF); D = ``width``.

    f+_s, f+_f from the separation nets; f~_s = f+_s + g_s sigmoid(W_sf f+_f), f~_f likewise with the sides
    exchanged; features = MLP [f~_s | f~_f] with GELU. ``aux`` shows, for ``spatial`` and ``frequency``, the
    ungated features under that name and f+ and f- under ``spatial+``, ``spatial-`` and so on: what the outer
    loss ``sfcl`` works on. The defaults are the paper's pair at 224 px, AlexNet and GFNet-Ti.

    Args:
        spatial: an ``image-encoder`` name or settings.
        frequency: another; two spatial backbones are the control of the paper's idea.
        width: of the fused features and of the fusion's hidden layer (paper: hidden 512; its output is not
            told).
        hidden: of the separation nets.
        tau: temperature of the masks, 1 in the paper.
        separate: False: masks are 1, and ``aux`` shows no f- (ablation S).
        fuse: False: no exchange, only the MLP (ablation F).
        gamma: start of g_s and g_f (ours; the paper does not say).
        hard_eval: masks of 0 and 1 outside training (ours; off).

    Raises:
        ValueError: one of the two backbones is itself of two domains.
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
        self.backbones = nn.ModuleDict(
            {"spatial": build("image-encoder", spatial), "frequency": build("image-encoder", frequency)}
        )
        if any(isinstance(backbone, SFCLEncoder) for backbone in self.backbones.values()):
            raise ValueError("a backbone of 'sfcl' must be a plain image encoder, not 'sfcl' itself")
        widths = {name: int(self.backbones[name].width) for name in DOMAINS}  # type: ignore[arg-type]
        one, two = widths.values()
        self.separations = nn.ModuleDict(
            {name: Separation(widths[name], hidden, tau, hard_eval) for name in DOMAINS} if separate else {}
        )
        self.exchanges = nn.ModuleList([Exchange(one, two, gamma), Exchange(two, one, gamma)] if fuse else [])
        self.fusion = nn.Sequential(nn.Linear(one + two, width), nn.GELU(), nn.Linear(width, width))
        self.width = width
        self.hard_eval = hard_eval
        parts = ("", "+", "-") if separate else ("", "+")
        self.shown = {f"{name}{part}": widths[name] for name in DOMAINS for part in parts}
        self.declares = "mask" if separate else "plain"

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, 3, H, W) -> (B, ``width``) and what the outer loss needs."""
        return self.seen(x)

    def seen(
        self, x: Tensor, mask: MaskKind = "own", only: str | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``forward`` as an attacker may look at it.

        Args:
            mask: how masks are made.
            only: the one domain whose backbone has a gradient; values are the same.
        """
        shown: dict[str, Tensor] = {}
        for name in DOMAINS:
            features, _ = self.backbones[name](x)
            if only not in (None, name):
                features = features.detach()
            shown[name] = shown[f"{name}+"] = features
            if self.separations:
                shown[f"{name}+"], shown[f"{name}-"] = self.separations[name](features, mask)
        left, right = shown["spatial+"], shown["frequency+"]
        if self.exchanges:
            left, right = self.exchanges[0](left, right), self.exchanges[1](right, left)
        return self.fusion(torch.cat([left, right], 1)), shown
