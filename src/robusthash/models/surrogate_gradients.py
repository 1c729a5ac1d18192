"""Views of a victim: the same call, the same parameters, the victim's own codes; only the gradients are
others.

A view is made by a small frozen object, ``GateSeen("one")(victim)``. What it returns is differentiated by an
attack; the evaluator encodes with the victim itself. Athalye, Carlini and Wagner (ICML 2018) is where the
ideas come from.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import HashOutput, Inputs, Outputs
from robusthash.models.gates import SpectralGate
from robusthash.models.hasher import Hasher, frozen
from robusthash.models.purifier import Encode, Purifier, carried
from robusthash.models.sfcl import DOMAINS, MaskKind, SFCLEncoder


class View(Hasher):
    """A victim seen with other gradients. Guides and searches take it for the victim.

    ``passes`` says how many forward and backward passes of the victim one of its own costs.
    """

    passes: tuple[int, int] = (1, 1)

    def __init__(self, victim: Hasher, gradients: Hasher) -> None:
        purifiers, spec = dict(victim.purifiers), victim.spec
        super().__init__(
            dict(victim.encoders), dict(victim.heads), spec, victim.declared, purifiers, victim.sides
        )
        self.victim = victim
        self.gradients = gradients

    def around(self, clean: Inputs, draws: Draws) -> View:
        """The view for one block of clean inputs, with the random numbers that it may draw."""
        return self

    def forward(self, inputs: Inputs) -> Outputs:
        """What is differentiated; its values are the victim's."""
        return self.gradients(inputs)


class Carried(View):
    """Logits and codes of the victim with the gradients of another hasher of the same parts.

    So a search compares, keeps and selects points by what they do to the victim, whatever it supposes to find
    them.
    """

    passes = (2, 1)

    def forward(self, inputs: Inputs) -> Outputs:
        with torch.no_grad():
            own = self.victim(inputs)
        if not torch.is_grad_enabled():
            return own
        return {name: _carried(own[name], output) for name, output in self.gradients(inputs).items()}


def _carried(own: HashOutput, seen: HashOutput) -> HashOutput:
    features = carried(own.features, seen.features)
    return replace(
        own, logits=carried(own.logits, seen.logits), code=carried(own.code, seen.code), features=features
    )


def rebuilt(
    victim: Hasher,
    encoders: Mapping[str, nn.Module] | None = None,
    purifiers: Mapping[str, nn.Module] | None = None,
) -> Hasher:
    """The victim with some encoders or purifiers exchanged; all else is shared."""
    encoders, purifiers = {**victim.encoders, **(encoders or {})}, {**victim.purifiers, **(purifiers or {})}
    return Hasher(encoders, dict(victim.heads), victim.spec, victim.declared, purifiers, victim.sides)


# ------------------------------------------------------------------------------------------------ spectral
# gates


class Weighed(Purifier):
    """A spectral gate that weighs by another rule than its own."""

    declares = "gate"

    def __init__(self, inner: SpectralGate, rule: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = inner
        self.rule = rule

    def forward(self, x: Tensor, encode: Encode) -> tuple[Tensor, dict[str, Tensor]]:
        return self.inner.weighed(x, self.rule)


class _Frozen(Carried):
    """Gates held constant: at those of the clean inputs once they are told, until then at those of the
    inputs."""

    def around(self, clean: Inputs, draws: Draws) -> View:
        gates = gates_of(self.victim)
        with frozen(self.victim), torch.no_grad():
            known = {
                name: gate.gate(gate.coefficients(clean[name]))
                for name, gate in gates.items()
                if name in clean
            }
        told = {name: Weighed(gates[name], _constant(values)) for name, values in known.items()}
        return _Frozen(self.victim, rebuilt(self.victim, purifiers=told))


def _constant(values: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda z: values


def _flat(value: float) -> Callable[[Tensor], Tensor]:
    return lambda z: z.new_full((*z.shape[:2], *z.shape[3:]), value)


def _held(gate: SpectralGate) -> Callable[[Tensor], Tensor]:
    return lambda z: gate.gate(z).detach()


def _smooth(gate: SpectralGate, factor: float) -> Callable[[Tensor], Tensor]:
    return lambda z: carried(gate.gate(z), gate.gate(z, factor * gate.tau))


def gates_of(victim: Hasher) -> dict[str, SpectralGate]:
    """The spectral gates of a victim, by modality."""
    return {name: gate for name, gate in victim.purifiers.items() if isinstance(gate, SpectralGate)}


@register("gradient-view", "gate")
@dataclass(frozen=True)
class GateSeen:
    """Gradients of a gated victim under another gate (SAAH).

    Args:
        gate: ``frozen``: m(x) of the clean input, without a gradient through m; ``minimum`` and ``one``: m =
            m_min and m = 1 everywhere; ``smooth``: the gate itself, its gradient alone at temperature 4 tau.

    Raises:
        ValueError: a victim without a spectral gate.
    """

    gate: Literal["frozen", "minimum", "one", "smooth"]

    def __call__(self, victim: Hasher) -> View:
        gates = gates_of(victim)
        if not gates:
            raise ValueError(
                "a view of the gate needs a victim with the purifier 'spectral-gate'; this one has none"
            )
        rules = {name: self._rule(gate) for name, gate in gates.items()}
        seen = rebuilt(victim, purifiers={name: Weighed(gates[name], rule) for name, rule in rules.items()})
        if self.gate == "smooth":  # its values are the victim's already
            return View(victim, seen)
        return (_Frozen if self.gate == "frozen" else Carried)(victim, seen)

    def _rule(self, gate: SpectralGate) -> Callable[[Tensor], Tensor]:
        if self.gate == "smooth":
            return _smooth(gate, 4.0)
        if self.gate == "frozen":
            return _held(gate)
        return _flat(1.0 if self.gate == "one" else gate.m_min)


# ------------------------------------------------------------------------------------------- masks and
# branches


class _EncoderSeen(nn.Module):
    """SFCL's encoder with other masks, or with the gradient of one branch."""

    def __init__(self, inner: SFCLEncoder, mask: MaskKind = "own", only: str | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.mask = mask
        self.only = only

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.inner.seen(x, self.mask, self.only)


def masks_of(victim: Hasher) -> dict[str, SFCLEncoder]:
    """The SFCL encoders of a victim that separate by masks, by modality."""
    return {n: e for n, e in victim.encoders.items() if isinstance(e, SFCLEncoder) and len(e.separations)}


def _masked(victim: Hasher, mask: MaskKind = "own", only: str | None = None) -> Hasher:
    found = masks_of(victim)
    if not found:
        raise ValueError("a view of masks or branches needs the image encoder 'sfcl' with separate: true")
    return rebuilt(
        victim, encoders={name: _EncoderSeen(encoder, mask, only) for name, encoder in found.items()}
    )


@register("gradient-view", "mask")
@dataclass(frozen=True)
class MaskSeen:
    """Gradients as if masks were ``hard`` (0 or 1, straight through: the soft mask's gradient) or ``soft``
    (SFCL)."""

    mask: Literal["hard", "soft"]

    def __call__(self, victim: Hasher) -> View:
        return Carried(victim, _masked(victim, self.mask))


@register("gradient-view", "branch")
@dataclass(frozen=True)
class BranchSeen:
    """The gradient of one branch alone, ``spatial`` or ``frequency``; the other is taken for constant
    (SFCL)."""

    branch: str

    def __post_init__(self) -> None:
        if self.branch not in DOMAINS:
            raise ValueError(f"branch must be one of {', '.join(DOMAINS)}, got {self.branch!r}")

    def __call__(self, victim: Hasher) -> View:
        return View(victim, _masked(victim, only=self.branch))


# -------------------------------------------------------------------------------------------------------
# noise


@contextlib.contextmanager
def keyed_noise(key: int, device: torch.device | str) -> Iterator[None]:
    """Seed the global streams of torch, NumPy and Python inside, and put them back as they were.

    For models that draw from them: what they draw is then a function of ``key`` and of the order within the
    batch.
    """
    place = torch.device(device)
    devices = [place.index or 0] if place.type == "cuda" else []
    plain, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        torch.random.default_generator.manual_seed(
            key
        )  # torch.manual_seed queues a call for every idle accelerator
        for number in devices:
            with torch.cuda.device(number):
                torch.cuda.manual_seed(key)
        random.seed(key)
        np.random.seed(key % 2**32)
        try:
            yield
        finally:
            random.setstate(plain)
            np.random.set_state(array)


class Averaged(View):
    """Several looks at a hasher that draws, each with own keyed noise; new ones at every call.

    ``aux`` shows the looks one by one, ``draws`` (n, B, K) logits and ``draws/code``, so that a loss can be
    averaged over them (``OverDraws``). The logits are their mean, or (``own``) those of a victim that does
    not draw. Of the graphs of the looks one at a time is in memory; each is computed again on the way back.
    """

    def __init__(self, victim: Hasher, gradients: Hasher, looks: int, own: bool) -> None:
        super().__init__(victim, gradients)
        self.looks = looks
        self.own = own
        self.passes = (2 * looks + int(own), looks)
        self.draws = Draws(0, ("views",))
        self.calls = 0

    def around(self, clean: Inputs, draws: Draws) -> View:
        view = Averaged(self.victim, self.gradients, self.looks, self.own)
        view.draws = draws
        return view

    def forward(self, inputs: Inputs) -> Outputs:
        scope, self.calls = self.draws.within(self.calls), self.calls + 1
        looks = [self._look(inputs, scope.within(number).key()) for number in range(self.looks)]
        if self.own:
            with torch.no_grad():
                own = self.victim(inputs)
        outputs = {}
        for name, first in looks[0].items():
            logits, code = (
                torch.stack([getattr(look[name], part) for look in looks]) for part in ("logits", "code")
            )
            shown = {"draws": logits, "draws/code": code}
            mean = replace(first, logits=logits.mean(0), code=code.mean(0), aux=shown)
            outputs[name] = replace(_carried(own[name], mean), aux=shown) if self.own else mean
        return outputs

    def _look(self, inputs: Inputs, key: int) -> Outputs:
        def look(values: Inputs) -> Outputs:
            with keyed_noise(key, next(iter(values.values())).device):
                return self.gradients(values)

        if not torch.is_grad_enabled():
            return look(inputs)
        return checkpoint(look, inputs, use_reentrant=False, preserve_rng_state=False)


def _looks(number: int) -> int:
    if number < 1:
        raise ValueError(f"a mean over noise needs at least 1 draw, got {number}")
    return number


@register("gradient-view", "noise-averaged")
@dataclass(frozen=True)
class NoiseAveraged:
    """Expectation over transformation: ``draws`` looks at a victim that draws random numbers itself.

    Args:
        identity: take its purifiers' gradient for the identity's, where they hide their own.
    """

    draws: int = 20
    identity: bool = False

    def __post_init__(self) -> None:
        _looks(self.draws)

    def __call__(self, victim: Hasher) -> View:
        return Averaged(
            victim, victim.seen_by("identity") if self.identity else victim, self.draws, own=False
        )


@register("gradient-view", "mask-noise")
@dataclass(frozen=True)
class MaskNoise:
    """``draws`` looks with the Gumbel noise that masks have in training (SFCL); codes are those without
    it."""

    draws: int = 20

    def __post_init__(self) -> None:
        _looks(self.draws)

    def __call__(self, victim: Hasher) -> View:
        return Averaged(victim, _masked(victim, "noisy"), self.draws, own=True)
