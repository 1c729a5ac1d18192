"""Spectral gates, which weigh the DCT coefficients of an image before it is hashed, and views of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import Inputs
from robusthash.models.block_dct import BlockDCT
from robusthash.models.hasher import Hasher, frozen
from robusthash.models.purifier import Encode, Purifier, with_gradient_of
from robusthash.models.surrogate_gradients import GradientView, VictimValues, ViewedHasher

GateKind = Literal["block", "pixel", "pixel+freq", "global", "low-pass", "none"]
Rule = Callable[[Tensor], Tensor]
"""(B, P, 3, n, n) coefficients -> (B, P, n, n) weights."""

CHANNELS = 3
HIDDEN_BLOCK = 121
HIDDEN_PIXEL = 173
"""Widths for 31,161 parameters of the block gate and 30,968 of the pixel gate: the paper's "about 3.1e4"."""
EMBEDDED = 16


def _network(*widths: int, start: float) -> nn.Sequential:
    """Linear layers with ReLU between them; until trained, their output is ``start`` for every input."""
    layers = [nn.Linear(inputs, outputs) for inputs, outputs in pairwise(widths)]
    nn.init.zeros_(layers[-1].weight)
    nn.init.constant_(layers[-1].bias, start)
    return nn.Sequential(*[part for layer in layers[:-1] for part in (layer, nn.ReLU())], layers[-1])


class BlockLogits(nn.Module):
    """All magnitudes of a block -> a logit for each of its frequencies: 192 -> 121 -> 64 for blocks of 8."""

    def __init__(self, block: int, start: float) -> None:
        super().__init__()
        size = block * block
        self.layers = _network(CHANNELS * size, HIDDEN_BLOCK, size, start=start)

    def forward(self, sizes: Tensor) -> Tensor:
        return self.layers(sizes.flatten(2)).view(*sizes.shape[:2], *sizes.shape[3:])


class PixelLogits(nn.Module):
    """The three magnitudes of one coefficient -> its logit, by one network for all: 3 -> 173 -> 173 -> 1.

    Args:
        placed: it also gets a learned 16-vector of the frequency (u, v), which it else does not know.
    """

    def __init__(self, block: int, start: float, placed: bool) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(block, block, EMBEDDED)) if placed else None
        inputs = CHANNELS + (EMBEDDED if placed else 0)
        self.layers = _network(inputs, HIDDEN_PIXEL, HIDDEN_PIXEL, 1, start=start)

    def forward(self, sizes: Tensor) -> Tensor:
        inputs = sizes.permute(0, 1, 3, 4, 2)
        if self.place is not None:
            inputs = torch.cat([inputs, self.place.to(inputs.dtype).expand(*inputs.shape[:-1], -1)], -1)
        return self.layers(inputs).squeeze(-1)


class GlobalLogits(nn.Module):
    """One learned logit for each frequency, the same for every image."""

    def __init__(self, block: int, start: float) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.full((block, block), start))

    def forward(self, sizes: Tensor) -> Tensor:
        return self.bias.expand(*sizes.shape[:2], *sizes.shape[3:])


@register(
    "purifier",
    "spectral-gate",
    paper="SAAH, SIGIR 2026",
    evidence="paper",
    modality="image",
    state="measured",
)
class SpectralGate(Purifier):
    """P(x) = IDCT(z m), z = DCT(x) by blocks, m = m_min + (1 - m_min) sigmoid(g(|z|) / tau) (SAAH, Eq. 5-7).

    One gate for the three channels. The result is not clipped to [0, 1], which would kill gradients. It
    starts at m = rho exactly: the last layer has weights 0 and the bias tau ln(p / (1 - p)), p = (rho -
    m_min) / (1 - m_min). ``aux``: ``gate``, (B, P, n, n) m by block and frequency, and ``excess``, (B,) mean
    of m minus rho.

    Args:
        kind: ``block`` (ours; see below), ``pixel``, ``pixel+freq``; for ablations ``global`` (one learned n
            x n gate), ``low-pass`` (m = 1 where u + v <= cutoff, else 0) and ``none`` (the identity).
        block: side n of a block.
        rho: mean gate at the start, and the retention that ``excess`` is measured from; between m_min and 1.
        m_min: least gate, in [0, 1).
        tau: temperature of the sigmoid, above 0.
        input: magnitudes as ``log1p`` (ours) or ``raw`` (the text; up to n, mostly < 0.3).
        center: gate x - 0.5, so that m = 0.5 does not halve the brightness (ours; off as in the text).
        cutoff: of ``low-pass``; n - 1 by default, which keeps 36 of 64 frequencies.

    Differs: the text maps the 3 magnitudes of a coefficient to its logit (``pixel``), which cannot know its
    frequency but by magnitude; 31,161 parameters of ``block`` agree with the text's number as well, and are
    the default.
    """

    declares = "gate"

    passed: Tensor | None

    def __init__(
        self,
        kind: GateKind = "block",
        block: int = 8,
        rho: float = 0.5,
        m_min: float = 0.05,
        tau: float = 1.0,
        input: Literal["log1p", "raw"] = "log1p",
        center: bool = False,
        cutoff: int | None = None,
    ) -> None:
        super().__init__()
        if kind not in get_args(GateKind):
            raise ValueError(f"kind of gate must be one of {', '.join(get_args(GateKind))}, got {kind!r}")
        if not 0.0 <= m_min < rho < 1.0:
            raise ValueError(f"a gate needs 0 <= m_min < rho < 1, got m_min {m_min:g} and rho {rho:g}")
        if tau <= 0.0:
            raise ValueError(f"tau must be above 0, got {tau:g}")
        if input not in ("log1p", "raw"):
            raise ValueError(f"input must be 'log1p' or 'raw', got {input!r}")
        if cutoff is not None and (kind != "low-pass" or not 0 <= cutoff <= 2 * (block - 1)):
            raise ValueError(
                f"cutoff is of kind 'low-pass', in 0..{2 * block - 2}, got {cutoff} with {kind!r}"
            )
        self.kind = kind
        self.dct = BlockDCT(block)
        self.rho = rho
        self.m_min = m_min
        self.tau = tau
        self.input = input
        self.center = center
        share = (rho - m_min) / (1.0 - m_min)
        self.logits = _logits(kind, block, tau * math.log(share / (1.0 - share)))
        self.register_buffer("passed", _fixed_gate(kind, block, cutoff), persistent=False)

    def gate(self, z: Tensor, tau: float | None = None) -> Tensor:
        """(B, P, 3, n, n) coefficients -> (B, P, n, n) m in [m_min, 1] (``low-pass``: 0 or 1).

        Args:
            tau: another temperature than the gate's own, for attackers who look for a smoother gradient.
        """
        if self.logits is None:
            assert self.passed is not None
            return self.passed.to(z.dtype).expand(*z.shape[:2], -1, -1)
        sizes = z.abs()
        logits = self.logits(sizes if self.input == "raw" else sizes.log1p()).to(z.dtype)
        return self.m_min + (1.0 - self.m_min) * torch.sigmoid(logits / (self.tau if tau is None else tau))

    def coefficients(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) images -> (B, P, 3, n, n) coefficients that the gate reads and weighs."""
        return self.dct(x - 0.5 if self.center else x)

    def forward(self, x: Tensor, encode: Encode) -> tuple[Tensor, dict[str, Tensor]]:
        return self.weighed(x, self.gate)

    def weighed(self, x: Tensor, rule: Rule) -> tuple[Tensor, dict[str, Tensor]]:
        """P(x) with the gate by ``rule``: its own, or one that an attacker assumes."""
        z = self.coefficients(x)
        m = rule(z)
        aux = {"gate": m, "excess": m.flatten(1).mean(1) - self.rho}
        if self.kind == "none":  # not through two transforms, whose rounding would make it another model
            return x, aux
        pure = self.dct.inverse(z * m.unsqueeze(2), *x.shape[2:])
        return pure + 0.5 if self.center else pure, aux


def _logits(kind: GateKind, block: int, start: float) -> nn.Module | None:
    """The learned part of a gate; None where nothing is learned."""
    if kind == "block":
        return BlockLogits(block, start)
    if kind == "global":
        return GlobalLogits(block, start)
    if kind in ("pixel", "pixel+freq"):
        return PixelLogits(block, start, placed=kind == "pixel+freq")
    return None


def _fixed_gate(kind: GateKind, block: int, cutoff: int | None) -> Tensor | None:
    """(n, n) gate of a kind that learns nothing."""
    if kind == "none":
        return torch.ones(block, block)
    if kind == "low-pass":
        order = torch.arange(block)
        return (order[:, None] + order <= (block - 1 if cutoff is None else cutoff)).float()
    return None


def gates_of(victim: Hasher) -> dict[str, SpectralGate]:
    """The spectral gates of a victim, by modality."""
    return {name: gate for name, gate in victim.purifiers.items() if isinstance(gate, SpectralGate)}


class ReweighedGate(Purifier):
    """A spectral gate that weighs by another rule than its own."""

    declares = "gate"

    def __init__(self, inner: SpectralGate, rule: Rule) -> None:
        super().__init__()
        self.inner = inner
        self.rule = rule

    def forward(self, x: Tensor, encode: Encode) -> tuple[Tensor, dict[str, Tensor]]:
        return self.inner.weighed(x, self.rule)


class FrozenGates(VictimValues):
    """Gates held constant: at those of the clean inputs where known, else at those of the inputs."""

    def for_block(self, clean: Inputs, draws: Draws) -> ViewedHasher:
        gates = {name: gate for name, gate in gates_of(self.victim).items() if name in clean}
        with frozen(self.victim), torch.no_grad():
            known = {name: gate.gate(gate.coefficients(clean[name])) for name, gate in gates.items()}
        constant = {name: ReweighedGate(gates[name], _constant(values)) for name, values in known.items()}
        return FrozenGates(self.victim, self.victim.with_parts(purifiers=constant))


def _constant(values: Tensor) -> Rule:
    return lambda z: values


@register("gradient-view", "gate")
@dataclass(frozen=True)
class GateView(GradientView):
    """Gradients of a gated victim under another gate (SAAH).

    ``frozen``: m(x) of the clean input, without a gradient through m; ``minimum`` and ``one``: m = m_min and
    m = 1 everywhere; ``smooth``: the gate itself, its gradient alone at temperature 4 tau.
    """

    gate: Literal["frozen", "minimum", "one", "smooth"]

    def __call__(self, victim: Hasher) -> ViewedHasher:
        gates = gates_of(victim)
        if not gates:
            raise ValueError("a view of the gate needs a victim with the purifier 'spectral-gate'")
        parts = {name: ReweighedGate(gate, self._rule(gate)) for name, gate in gates.items()}
        gradients = victim.with_parts(purifiers=parts)
        if self.gate == "smooth":  # its values are the victim's already
            return ViewedHasher(victim, gradients)
        return (FrozenGates if self.gate == "frozen" else VictimValues)(victim, gradients)

    def _rule(self, gate: SpectralGate) -> Rule:
        if self.gate == "smooth":
            return lambda z: with_gradient_of(gate.gate(z), gate.gate(z, 4.0 * gate.tau))
        if self.gate == "frozen":
            return lambda z: gate.gate(z).detach()
        value = 1.0 if self.gate == "one" else gate.m_min
        return lambda z: z.new_full((*z.shape[:2], *z.shape[3:]), value)
