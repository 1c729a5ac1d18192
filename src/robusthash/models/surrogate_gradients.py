"""Views of a victim with other gradients: the same call, parameters and codes.

A registered ``gradient-view`` is a frozen dataclass, ``GateView("one")(victim)``; an attack differentiates
what it returns, and the evaluator encodes with the victim itself. The ideas are those of Athalye, Carlini and
Wagner (ICML 2018). Views of the gate and of SFCL's masks are in ``gates.py`` and ``sfcl.py``.
"""

from __future__ import annotations

import contextlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import HashOutput, Inputs, Outputs
from robusthash.data.base import Split
from robusthash.models.hasher import Hasher, frozen
from robusthash.models.purifier import ProxyBackward, Purifier, with_gradient_of

Near = Callable[[Inputs, Tensor, Draws], Inputs]
"""(clean inputs, ids, draws) -> inputs near them, such as an attack will evaluate."""


class ViewedHasher(Hasher):
    """A victim whose outputs are those of ``gradients``, a hasher of the same values with other gradients.

    Guides and searches take it for the victim. ``passes`` are the forward and backward passes of the victim
    that one of its own costs.
    """

    passes: tuple[int, int] = (1, 1)

    def __init__(self, victim: Hasher, gradients: Hasher) -> None:
        parts = dict(victim.encoders), dict(victim.heads), victim.spec, victim.declared
        super().__init__(*parts, dict(victim.purifiers), victim.sides)
        self.victim = victim
        self.gradients = gradients

    def for_block(self, clean: Inputs, draws: Draws) -> ViewedHasher:
        """The view for one block of clean inputs, with the random numbers that it may draw."""
        return self

    def forward(self, inputs: Inputs) -> Outputs:
        return self.gradients(inputs)


class GradientView(ABC):
    """Interface of a registered ``gradient-view``: victim -> what an attack differentiates."""

    @abstractmethod
    def __call__(self, victim: Hasher) -> ViewedHasher: ...

    def fitted(
        self, victim: Hasher, split: Split, modalities: Collection[str], near: Near, draws: Draws
    ) -> GradientView:
        """The view with what it learns on training items learned; itself where nothing learns."""
        return self


class VictimValues(ViewedHasher):
    """Logits and codes of the victim with the gradients of another hasher of the same parts.

    So a search compares and selects points by what they do to the victim, whatever it assumes to find them.
    """

    passes = (2, 1)

    def forward(self, inputs: Inputs) -> Outputs:
        with torch.no_grad():
            values = self.victim(inputs)
        if not torch.is_grad_enabled():
            return values
        return {name: exchanged(values[name], output) for name, output in self.gradients(inputs).items()}


def exchanged(values: HashOutput, source: HashOutput) -> HashOutput:
    """``values`` with the gradients of ``source``."""
    return replace(
        values,
        logits=with_gradient_of(values.logits, source.logits),
        code=with_gradient_of(values.code, source.code),
        features=with_gradient_of(values.features, source.features),
    )


# ---------------------------------------------------------------------------------------------- noise


@contextlib.contextmanager
def keyed_noise(key: int, device: torch.device | str) -> Iterator[None]:
    """Seed the global streams of torch, NumPy and Python inside, and restore them.

    Models that draw from them then give a function of ``key`` and of the order within the batch.
    """
    place = torch.device(device)
    devices = [place.index or 0] if place.type == "cuda" else []
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        # torch.manual_seed would queue a call for every idle accelerator
        torch.random.default_generator.manual_seed(key)
        for number in devices:
            with torch.cuda.device(number):
                torch.cuda.manual_seed(key)
        random.seed(key)
        np.random.seed(key % 2**32)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


class SampledHasher(ViewedHasher):
    """The mean over several samples of a hasher that draws, each with its own keyed noise; new at every call.

    ``aux`` holds the samples, ``draws`` (n, B, K) logits and ``draws/code``, for the loss ``OverDraws``.
    Logits are their mean or, with ``deterministic``, those of a victim that does not draw. One sample's graph
    at a time is in memory; each is computed again in the backward pass.
    """

    def __init__(self, victim: Hasher, gradients: Hasher, samples: int, deterministic: bool) -> None:
        super().__init__(victim, gradients)
        self.samples = samples
        self.deterministic = deterministic
        self.passes = (2 * samples + int(deterministic), samples)
        self.draws = Draws(0, ("views",))
        self.calls = 0

    def for_block(self, clean: Inputs, draws: Draws) -> ViewedHasher:
        view = SampledHasher(self.victim, self.gradients, self.samples, self.deterministic)
        view.draws = draws
        return view

    def forward(self, inputs: Inputs) -> Outputs:
        scope, self.calls = self.draws.within(self.calls), self.calls + 1
        samples = [self._sample(inputs, scope.within(number).key()) for number in range(self.samples)]
        if self.deterministic:
            with torch.no_grad():
                values = self.victim(inputs)
        outputs = {}
        for name, first in samples[0].items():
            logits = torch.stack([sample[name].logits for sample in samples])
            code = torch.stack([sample[name].code for sample in samples])
            aux = {"draws": logits, "draws/code": code}
            output = replace(first, logits=logits.mean(0), code=code.mean(0), aux=aux)
            if self.deterministic:
                output = replace(exchanged(values[name], output), aux=aux)
            outputs[name] = output
        return outputs

    def _sample(self, inputs: Inputs, key: int) -> Outputs:
        def sample(values: Inputs) -> Outputs:
            with keyed_noise(key, next(iter(values.values())).device):
                return self.gradients(values)

        if not torch.is_grad_enabled():
            return sample(inputs)
        return checkpoint(sample, inputs, use_reentrant=False, preserve_rng_state=False)


@dataclass(frozen=True)
class SampledView(GradientView):
    """Base of views that average over ``draws`` samples."""

    draws: int = 20

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"a mean over noise needs at least 1 draw, got {self.draws}")


@register("gradient-view", "noise-averaged")
@dataclass(frozen=True)
class NoiseAveraged(SampledView):
    """Expectation over transformation: ``draws`` samples of a victim that draws random numbers itself.

    Args:
        identity: take its purifiers' gradient for the identity's, where they hide their own.
    """

    identity: bool = False

    def __call__(self, victim: Hasher) -> ViewedHasher:
        gradients = victim.as_seen_from("identity") if self.identity else victim
        return SampledHasher(victim, gradients, self.draws, deterministic=False)


# ---------------------------------------------------------------------------------------------- purifiers


def purifiers_of(victim: Hasher) -> dict[str, Purifier]:
    """The purifiers of a victim, by modality."""
    parts = {name: part for name, part in victim.purifiers.items() if isinstance(part, Purifier)}
    if not parts:
        raise ValueError("a view of the purifier needs a victim with one: give its defense as a Purifier")
    return parts


@register("gradient-view", "repair-identity")
@dataclass(frozen=True)
class RepairIdentity(GradientView):
    """The purifier's values with the identity's gradient (BPDA; Athalye et al., ICML 2018)."""

    def __call__(self, victim: Hasher) -> ViewedHasher:
        return ViewedHasher(victim, victim.as_seen_from("identity"))


class MovedHasher(ViewedHasher):
    """The victim with |P(x') - P(x)|^2 in ``aux`` as ``moved`` (B,), P(x) that of the clean input."""

    def __init__(self, victim: Hasher, gradients: Hasher, clean: Inputs | None = None) -> None:
        super().__init__(victim, gradients)
        self.clean = clean or {}

    def for_block(self, clean: Inputs, draws: Draws) -> ViewedHasher:
        inputs = {name: values for name, values in clean.items() if name in self.victim.purifiers}
        return MovedHasher(self.victim, self.gradients, repaired(self.victim, inputs))

    def forward(self, inputs: Inputs) -> Outputs:
        outputs = self.gradients(inputs)
        for name in inputs:
            if name in self.victim.purifiers:
                if name not in self.clean:
                    raise ValueError(f"the move of the repaired {name} is unknown before for_block()")
                aux = outputs[name].aux
                moved = (aux["pure"] - self.clean[name]).flatten(1).square().sum(1)
                outputs[name] = replace(outputs[name], aux={**aux, "moved": moved})
        return outputs


def repaired(victim: Hasher, inputs: Inputs) -> Inputs:
    """P(x) of each modality that has a purifier, in eval mode, without gradients."""
    with frozen(victim), torch.no_grad():
        outputs = victim(inputs)
    return {name: outputs[name].aux["pure"].detach() for name in inputs if name in victim.purifiers}


@register("gradient-view", "repair-moved")
@dataclass(frozen=True)
class RepairMoved(GradientView):
    """The victim with how far its purified input moved, for an attack that first fools the purifier.

    Args:
        gradient: the purifier's ``own``, or the ``identity`` where it hides its own.
    """

    gradient: Literal["own", "identity"] = "own"

    def __call__(self, victim: Hasher) -> ViewedHasher:
        purifiers_of(victim)
        return MovedHasher(victim, victim.as_seen_from("white-box" if self.gradient == "own" else "identity"))


class ProxyNet(nn.Module):
    """x + three smooth layers: convolutions for images (B, C, H, W), linear ones for vectors (B, V).

    ``like`` has the shape of its inputs; ``width`` counts channels, and vectors have eight times as many
    units.
    """

    def __init__(self, like: Tensor, width: int = 16) -> None:
        super().__init__()
        size = like.shape[1]
        layer: Callable[[int, int], nn.Module] = partial(nn.Conv2d, kernel_size=3, padding=1)
        if like.dim() == 2:
            layer, width = nn.Linear, 8 * width
        first, middle, last = layer(size, width), layer(width, width), layer(width, size)
        self.layers = nn.Sequential(first, nn.SiLU(), middle, nn.SiLU(), last)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


@register("gradient-view", "repair-learnt")
@dataclass(frozen=True)
class RepairLearnt(GradientView):
    """The purifier's values with the gradient of a small net that imitates it on training items (BPDA)."""

    steps: int = 200  # of ``fitted``, 32 items each; Adam, 1e-3, mean square error
    width: int = 16  # of the net
    nets: Mapping[str, nn.Module] | None = field(default=None, repr=False, compare=False)

    BATCH = 32
    RATE = 1e-3

    def __post_init__(self) -> None:
        if min(self.steps, self.width) < 1:
            raise ValueError(f"steps and width must be at least 1, got {self.steps} and {self.width}")

    def __call__(self, victim: Hasher) -> ViewedHasher:
        if self.nets is None:
            raise ValueError("the net that imitates this purifier is not learned yet: call fitted(...) first")
        parts = purifiers_of(victim)
        proxies = {name: ProxyBackward(parts[name], net) for name, net in self.nets.items()}
        return ViewedHasher(victim, victim.with_parts(purifiers=proxies))

    def fitted(
        self, victim: Hasher, split: Split, modalities: Collection[str], near: Near, draws: Draws
    ) -> RepairLearnt:
        """The view with nets learned from pairs x, P(x) of ``split``, half of them moved by ``near``.

        Purifiers of other modalities than those named keep their own gradient. Items, moves and first weights
        depend on ``draws`` alone.
        """
        names = [name for name in purifiers_of(victim) if name in modalities]
        if not names:
            has = list(victim.purifiers)
            raise ValueError(f"nothing to imitate: purifiers for {has}, asked for {list(modalities)}")
        rows = torch.arange(self.BATCH)
        nets: dict[str, nn.Module] = {}
        optimisers: dict[str, torch.optim.Optimizer] = {}
        for step in range(self.steps):
            scope = draws.within(step)
            items = (scope.uniform(rows, ()) * len(split)).long()
            clean = split.batch(items).only(modalities).to(victim.device).inputs
            moved = near(clean, rows.to(victim.device), scope)
            inputs = {name: torch.cat([clean[name][::2], moved[name][1::2]]) for name in names}
            targets = repaired(victim, inputs)
            for name, values in inputs.items():
                if name not in nets:
                    with torch.random.fork_rng(devices=[]):
                        torch.manual_seed(draws.within(name).key())
                        nets[name] = ProxyNet(values, self.width).to(values)
                    optimisers[name] = torch.optim.Adam(nets[name].parameters(), self.RATE)
                with torch.enable_grad():
                    loss = (nets[name](values) - targets[name]).square().mean()
                    optimisers[name].zero_grad(set_to_none=True)
                    loss.backward()
                    optimisers[name].step()
        return replace(self, nets={name: net.requires_grad_(False) for name, net in nets.items()})
