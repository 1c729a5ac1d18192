"""Observed behaviour of a victim against what it declares: a wrong class means the wrong adaptive attacks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.optim.optimizer import register_optimizer_step_pre_hook

from robusthash.core.types import Inputs, Outputs
from robusthash.models.hasher import Defense, Hasher, frozen
from robusthash.models.purifier import Purifier
from robusthash.models.sfcl import Separation

SAME = 1e-4
"""Logits of two passes are the same up to this share of the largest; kernels may reorder sums."""


@dataclass(frozen=True)
class VictimBehaviour:
    """Behaviour of a victim in eval mode."""

    randomised: bool  # logits differ between calls on the same inputs
    purifier: bool  # a Purifier that is no gate is before an encoder
    gate: bool
    mask: bool  # features are separated by a learned mask
    inner_gradients: bool  # forward takes gradients or steps of an optimiser itself
    reached: float  # share of the items to whose input a gradient comes; 1 where no input is continuous

    @property
    def gradient_reaches_input(self) -> bool:
        """For at least 99 % of the items; below, the gradient is masked for some, and at 0 it is cut."""
        return self.reached >= 0.99

    @property
    def cut(self) -> bool:
        """No gradient reaches any item, so nothing that differentiates the victim itself can start."""
        return self.reached == 0


def observed(victim: Hasher, inputs: Inputs, passes: int = 3) -> VictimBehaviour:
    """Observe a victim on some clean inputs; 8 to 128 are enough.

    Logits are compared over ``passes`` calls, the parts are those of the package by type, and a backward pass
    inside the forward pass shows in the tensors that autograd takes back (under ``no_grad`` outside, none is
    needed).
    """
    if not inputs or passes < 2:
        raise ValueError(f"observing takes inputs and at least two passes, got {sorted(inputs)} and {passes}")
    purifiers = [part for part in victim.modules() if isinstance(part, Purifier)]
    with frozen(victim):
        with torch.no_grad(), _inner_gradients() as events:
            logits = [_logits(victim(inputs)) for _ in range(passes)]
        reached = _reached(victim, inputs)
    return VictimBehaviour(
        randomised=any(_differ(logits[0], other) for other in logits[1:]),
        purifier=any(part.declares != "gate" for part in purifiers),
        gate=any(part.declares == "gate" for part in purifiers),
        mask=any(isinstance(part, Separation) for part in victim.modules()),
        inner_gradients=bool(events),
        reached=reached,
    )


@contextlib.contextmanager
def _inner_gradients() -> Iterator[list[str]]:
    """A list that gets an entry for every backward pass and step of an optimiser inside."""
    events: list[str] = []

    def unpack(value: Tensor) -> Tensor:
        events.append("backward")
        return value

    def step(*_: Any) -> None:
        events.append("step")

    handle = register_optimizer_step_pre_hook(step)
    try:
        with saved_tensors_hooks(lambda value: value, unpack):
            yield events
    finally:
        handle.remove()


def _logits(outputs: Outputs) -> dict[str, Tensor]:
    return {name: output.logits.detach() for name, output in outputs.items()}


def _differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return any(bool((v - other[n]).abs().max() > SAME * v.abs().max()) for n, v in one.items())


def _reached(victim: Hasher, inputs: Inputs) -> float:
    """The share of items to whose continuous inputs sum |u|, which saturates nowhere, has a gradient."""
    leaves = {n: v.detach().clone().requires_grad_(True) for n, v in inputs.items() if v.is_floating_point()}
    if not leaves:
        return 1.0
    with torch.enable_grad():
        value = torch.stack([output.logits.abs().sum() for output in victim(leaves).values()]).sum()
        if not value.requires_grad:
            return 0.0
        grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    shares = [0.0 if g is None else float((g != 0).flatten(1).any(1).float().mean()) for g in grads]
    return min(shares)


def matches(declared: str, observed: VictimBehaviour) -> list[str]:
    """Reasons why a declared class does not fit the observed behaviour; none where it does.

    A victim may have more parts than the one that names its class: the attacks on them are run as well, so
    only a class that hides a part (``plain``, ``adversarial``) or names one that is not there is a mismatch.
    A purifier of a class from outside the package is attacked as a purifier too.
    """
    reasons = []
    hides = declared in ("plain", "adversarial", "detector")
    other_purifier = declared not in get_args(Defense) and observed.purifier
    purifies = declared in ("purifier", "randomised") or other_purifier
    if observed.randomised and declared != "randomised":
        reasons.append(f"codes change between calls, and {declared!r} is declared: declare 'randomised'")
    if declared == "randomised" and not observed.randomised:
        reasons.append("'randomised' is declared, and codes did not change between calls")
    for part, inside in (("purifier", observed.purifier), ("gate", observed.gate), ("mask", observed.mask)):
        if hides and inside:
            reasons.append(f"a {part} is inside, and {declared!r} is declared: declare {part!r}")
        if declared == part and not inside:
            reasons.append(f"{part!r} is declared, and none was found inside")
    if observed.inner_gradients and not purifies:
        reasons.append(f"forward takes gradients itself, and {declared!r} is declared: declare 'purifier'")
    if not observed.gradient_reaches_input and not purifies:
        some = f"a gradient reaches {observed.reached:.0%} of the items only"
        reason = "no gradient reaches the input" if observed.cut else some
        reasons.append(f"{reason}, and {declared!r} is declared: the graph is cut or saturated")
    if declared == "detector":
        reasons.append("'detector' is declared, which is no part of a hasher: no attack includes its score")
    return reasons


def mismatches(victim: Hasher, inputs: Inputs) -> list[str]:
    """``matches`` of the declared class and the behaviour on some clean inputs."""
    return matches(victim.declared, observed(victim, inputs))
