"""The checks by number: the value that each compares, the threshold beyond which it is red, and a remedy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from robusthash.metrics.results import Flag

Level = Literal["pass", "amber", "red"]


@dataclass(frozen=True)
class Check:
    """One check: its value is compared with ``threshold``."""

    title: str
    threshold: float
    remedy: str  # one line


OF_A_SUITE = frozenset({"F4", "F5", "F6", "F7", "F8", "F9", "F18"})
"""Checks that compare the attacks of one suite under one threat; all others are about the model itself."""

_MORE_STEPS = "not converged: raise the steps"
_MASKED = "masked gradients: add an adaptive attack"
_TRAIN_MODE = "call eval(); dropout and batch statistics make each code depend on luck or on the batch"

CHECKS: dict[str, Check] = {
    "F1": Check("share of queries whose code differs between passes", 0.0, "randomised: attack by EOT"),
    "F2": Check("share of queries whose input gradient is exactly 0 at the start", 0.01,
                "cut graph or saturation: attack through the identity (BPDA), with a scale-free objective"),
    "F3": Check("share of queries with a NaN or infinite loss, gradient or code", 0.0,
                "fix the model before scoring"),
    "F4": Check("wMAP that a gradient-free attack takes off the white-box wMAP", 0.005, _MASKED),
    "F5": Check("wMAP that a transfer attack takes off the white-box wMAP", 0.005, _MASKED),
    "F6": Check("wMAP at eps = 1 above max(chance, floor)", 0.02,
                "the attack or the graph is broken: look at F2, F14 first"),
    "F7": Check("largest rise of wMAP along the eps curve", 0.0,
                "a bug: start each eps from the solution before it"),
    "F8": Check("wMAP lost by doubling the steps", 0.01, _MORE_STEPS),
    "F9": Check("wMAP lost by doubling the restarts", 0.01, "not converged: raise the restarts"),
    "F10": Check("rank correlation of objective and AP lost along the path (red below)", 0.3,
                 "the objective is misaligned with the metric: use soft-ap"),
    "F11": Check("share of queries whose returned point is worse than the best seen", 0.0,
                 "a selection bug in the attack"),
    "F12": Check("share of queries whose objective still rises in the last 10 steps", 0.10, _MORE_STEPS),
    "F13": Check("share of queries where 100 random sign steps beat the gradient step", 0.10,
                 "rugged landscape: smooth the gradient, average it over noise (EOT)"),
    "F14": Check("share of queries whose gradient disagrees with finite differences by over 5 %", 0.10,
                 "a non-differentiable or detached part: differentiate it, or BPDA"),
    "F15": Check("autograd used inside the forward pass (1 = yes)", 0.0,
                 "a dynamic defense: differentiate through it"),
    "F16": Check("share of bits that differ between float32 and float64", 0.01,
                 "numerically unstable codes: enlarge the margins"),
    "F17": Check("AP within ties: optimistic minus pessimistic", 0.2,
                 "collapsed codes, MAP is the luck of the order: report MAP/mink and the gap"),
    "F18": Check("share of attacked queries on one code", 0.25,
                 "one universal direction serves most queries: say so (amber)"),
    "F19": Check("layers that run in train mode in evaluation", 0.0, _TRAIN_MODE),
    "F20": Check("largest absolute value that reaches the first layer of the encoder", 6.0,
                 "normalised twice, or inputs outside the range: normalise inside the model only"),
    "F21": Check("queries that the database or the training set also holds", 0.0, "fix the split"),
    "F22": Check("share of queries whose AP at eps = 0 is not the clean AP", 0.01,
                 "clean and attacked pipelines differ"),
    "F23": Check("ways in which the model does not behave as it declares", 0.0,
                 "declare its class: the wrong attacks were run"),
}  # fmt: skip


def flag(
    id: str, value: float, level: Level, *, threshold: float | None = None, remedy: str | None = None
) -> Flag:
    """The flag of a check, with its own threshold and remedy unless others are given."""
    check = CHECKS[id]
    threshold = check.threshold if threshold is None else threshold
    return Flag(id, float(value), threshold, level, remedy or check.remedy)


def above(id: str, value: float, over: Level = "red") -> Flag:
    """``over`` where the value exceeds the check's threshold, else a pass."""
    return flag(id, value, over if value > CHECKS[id].threshold else "pass")


def not_run(id: str, reason: str) -> Flag:
    """Amber with an infinite value and the reason: a check that could not be run is no pass."""
    return flag(id, math.inf, "amber", remedy=f"not run: {reason}")


def order(flags: list[Flag]) -> tuple[Flag, ...]:
    """Sort by number."""
    return tuple(sorted(flags, key=lambda flag: int(flag.id[1:])))
