"""Views of a victim with a purifier: its gradient taken for the identity's, or for that of a net that
imitates it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import Inputs, Outputs
from robusthash.data.base import Split
from robusthash.models.hasher import Hasher, frozen
from robusthash.models.purifier import Encode, IdentityBackward, Purifier, carried
from robusthash.models.surrogate_gradients import View, rebuilt

Near = Callable[[Inputs, Tensor, Draws], Inputs]
"""(clean inputs, ids, draws) -> inputs near them, such as an attack will ask about."""


def repairers_of(victim: Hasher) -> dict[str, Purifier]:
    """The purifiers of a victim, by modality.

    Raises:
        ValueError: it has none.
    """
    found = {name: part for name, part in victim.purifiers.items() if isinstance(part, Purifier)}
    if not found:
        raise ValueError(
            "a view of the purifier needs a victim with one; give the hasher its defense as a Purifier"
        )
    return found


@register("gradient-view", "repair-identity")
@dataclass(frozen=True)
class RepairIdentity:
    """The purifier's values with the identity's gradient (BPDA; Athalye et al., ICML 2018)."""

    def __call__(self, victim: Hasher) -> View:
        return View(victim, victim.seen_by("identity"))


# ---------------------------------------------------------------------------------------------- distance
# moved


class _Showing(Purifier):
    """A purifier that also shows what it made."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, encode: Encode) -> tuple[Tensor, dict[str, Tensor]]:
        pure, shown = self.inner(x, encode)
        return pure, {**shown, "pure": pure}


class Repairs(View):
    """The victim, showing in ``aux`` how far its repaired input is from that of the clean one: ``moved``
    (B,)."""

    def __init__(self, victim: Hasher, gradients: Hasher, clean: Inputs | None = None) -> None:
        super().__init__(victim, gradients)
        self.clean = clean or {}

    def around(self, clean: Inputs, draws: Draws) -> View:
        wanted = {name: values for name, values in clean.items() if name in self.victim.purifiers}
        return Repairs(self.victim, self.gradients, repaired(self.victim, wanted))

    def forward(self, inputs: Inputs) -> Outputs:
        outputs = self.gradients(inputs)
        for name in inputs:
            if name in self.victim.purifiers:
                output = outputs[name]
                if name not in self.clean:
                    raise ValueError(
                        f"how far the repaired {name} moved is unknown before around() told the clean one"
                    )
                moved = (output.aux["pure"] - self.clean[name]).flatten(1).square().sum(1)
                outputs[name] = replace(output, aux={**output.aux, "moved": moved})
        return outputs


def repaired(victim: Hasher, inputs: Inputs) -> Inputs:
    """P(x) of each modality that has a purifier, in eval mode, without gradients."""
    showing = rebuilt(victim, purifiers={name: _Showing(part) for name, part in repairers_of(victim).items()})
    with frozen(showing), torch.no_grad():
        outputs = showing(inputs)
    return {name: outputs[name].aux["pure"].detach() for name in inputs if name in victim.purifiers}


@register("gradient-view", "repair-moved")
@dataclass(frozen=True)
class RepairMoved:
    """A view that shows |P(x') - P(x)|^2, for an attack that first fools the purifier.

    Args:
        gradient: the purifier's ``own``, or the ``identity`` where it hides its own.
    """

    gradient: Literal["own", "identity"] = "own"

    def __call__(self, victim: Hasher) -> View:
        parts = repairers_of(victim)
        seen = {
            n: _Showing(part if self.gradient == "own" else IdentityBackward(part))
            for n, part in parts.items()
        }
        return Repairs(victim, rebuilt(victim, purifiers=seen))


# ------------------------------------------------------------------------------------------------- learnt
# proxy


class ProxyNet(nn.Module):
    """x + three smooth layers: convolutions for images (B, C, H, W), linear layers for vectors (B, V).

    Args:
        like: inputs of the shape that it will see; its first axis does not matter.
        width: channels; vectors have eight times as many units.
    """

    def __init__(self, like: Tensor, width: int = 16) -> None:
        super().__init__()
        size = like.shape[1]
        layer: Callable[[int, int], nn.Module] = partial(nn.Conv2d, kernel_size=3, padding=1)
        if like.dim() == 2:
            layer, width = nn.Linear, 8 * width
        self.layers = nn.Sequential(
            layer(size, width), nn.SiLU(), layer(width, width), nn.SiLU(), layer(width, size)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class _Imitated(Purifier):
    """A purifier's values with the gradient of a net that imitates it."""

    def __init__(self, inner: nn.Module, proxy: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.proxy = proxy

    def forward(self, x: Tensor, encode: Encode) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            pure, shown = self.inner(x, encode)
        return carried(pure, self.proxy(x)), shown


@register("gradient-view", "repair-learnt")
@dataclass(frozen=True)
class RepairLearnt:
    """The purifier's values with the gradient of a small net fitted on what it makes of training items
    (BPDA).

    Args:
        steps: of ``fitted``, 32 items each; Adam, 1e-3, mean square error.
        width: of the net.
        nets: the fitted nets by modality; None before ``fitted``.
    """

    steps: int = 200
    width: int = 16
    nets: Mapping[str, nn.Module] | None = field(default=None, repr=False, compare=False)

    BATCH = 32
    RATE = 1e-3

    def __post_init__(self) -> None:
        if min(self.steps, self.width) < 1:
            raise ValueError(f"steps and width must be at least 1, got {self.steps} and {self.width}")

    def __call__(self, victim: Hasher) -> View:
        if self.nets is None:
            raise ValueError("the net that imitates this purifier is not learned yet: call fitted(...) first")
        parts = repairers_of(victim)
        seen = {name: _Imitated(parts[name], net) for name, net in self.nets.items()}
        return View(victim, rebuilt(victim, purifiers=seen))

    def fitted(
        self, victim: Hasher, split: Split, modalities: Collection[str], near: Near, draws: Draws
    ) -> RepairLearnt:
        """The same view with its nets learned from pairs x, P(x) of ``split``, half of them moved by
        ``near``.

        Purifiers of other modalities than those named keep their own gradient. Which items, how they are
        moved and the first weights depend on ``draws`` alone.
        """
        wanted = [name for name in repairers_of(victim) if name in modalities]
        if not wanted:
            raise ValueError(
                f"nothing to imitate: purifiers for {list(victim.purifiers)}, asked for {list(modalities)}"
            )
        rows = torch.arange(self.BATCH)
        nets: dict[str, nn.Module] = {}
        steppers: dict[str, torch.optim.Optimizer] = {}
        for step in range(self.steps):
            scope = draws.within(step)
            batch = (
                split.batch((scope.uniform(rows, ()) * len(split)).long()).only(modalities).to(victim.device)
            )
            moved = near(batch.inputs, rows.to(victim.device), scope)
            inputs = {n: torch.cat([batch.inputs[n][::2], moved[n][1::2]]) for n in wanted}
            wished = repaired(victim, inputs)
            for name, values in inputs.items():
                if name not in nets:
                    with torch.random.fork_rng(devices=[]):
                        torch.manual_seed(draws.within(name).key())
                        nets[name] = ProxyNet(values, self.width).to(values)
                    steppers[name] = torch.optim.Adam(nets[name].parameters(), self.RATE)
                with torch.enable_grad():
                    loss = (nets[name](values) - wished[name]).square().mean()
                    steppers[name].zero_grad(set_to_none=True)
                    loss.backward()
                    steppers[name].step()
        return replace(self, nets={name: net.requires_grad_(False) for name, net in nets.items()})
