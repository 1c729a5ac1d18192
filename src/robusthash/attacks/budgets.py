"""Budgets of change of one modality: norm balls, edits of words, swaps of tokens."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor

from robusthash.core.option_types import Checked
from robusthash.core.runtime import Draws

Norm = Literal["linf", "l2", "l1"]
NORMS: tuple[Norm, ...] = get_args(Norm)
_BREAKPOINTS = 1 << 22  # sorted at a time


def per_item(values: Tensor, like: Tensor) -> Tensor:
    """(B,) shaped to scale the items of ``like``."""
    return values.view(-1, *[1] * (like.dim() - 1))


def binary(values: Tensor) -> bool:
    """True where all values are 0 or 1, as in a bag that says which words occur."""
    return bool(((values == 0) | (values == 1)).all())


class Budget(Checked, ABC):
    """Bound on the change of one modality: ``eps`` in a norm, within the range ``bounds`` of valid inputs.

    ``edits``: words or tokens change, which only a search for edits can do.
    """

    norm: str
    eps: float
    bounds: tuple[float, float]
    edits: bool = False

    @abstractmethod
    def project(self, x: Tensor, origin: Tensor) -> Tensor:
        """The nearest feasible inputs."""

    @abstractmethod
    def random_start(self, origin: Tensor, ids: Tensor, draws: Draws) -> Tensor:
        """Random feasible inputs, keyed by item."""

    @abstractmethod
    def size(self, delta: Tensor) -> Tensor:
        """(B,) norm of each change, or the number of entries that differ."""

    @abstractmethod
    def label(self, modality: str) -> str:
        """The budget as names of threats hold it: "img-linf-8", "txt-bow-3"."""

    def steepest(self, grad: Tensor, at: Tensor | None = None) -> Tensor:
        """The unit step of steepest ascent along ``grad``, taken from ``at``."""
        raise ValueError(f"a budget of {self.norm} has no steepest step; use the search 'greedy-{self.norm}'")

    def details(self) -> dict[str, Any]:
        """Further settings of the budget."""
        return {}

    def check(self, x: Tensor, origin: Tensor) -> None:  # of norm balls any input is a point
        """Refuse inputs that no budget of this form allows, whatever its size."""

    def check_length(self, length: float, what: str, origin: Tensor) -> None:
        """Refuse a length that no change of inputs like ``origin`` reaches: it is in other units."""

    def with_eps(self, eps: float) -> Self:
        """The same budget of another size."""
        return replace(self, eps=eps)  # type: ignore[type-var]  # every budget is a dataclass


@dataclass(frozen=True)
class Ball(Budget):
    """A norm ball around a clean input, cut with the input's range.

    Args:
        norm: ``linf``, ``l2`` or ``l1``.
        eps: radius in input units: 8/255, not 8, for pixels in [0, 1]. Of ``l1``, where none is customary for
            every size, 12 at 32 x 32 pixels is the usual one (Croce & Hein, ICML 2021).
        bounds: range of valid inputs.
    """

    norm: Norm
    eps: float
    bounds: tuple[float, float] = (0.0, 1.0)
    SPARSITY: ClassVar[float] = 0.01
    """Share of the entries that a step of ``l1`` changes, as in SLIDE (Tramer & Boneh, NeurIPS 2019)."""

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
        width = self.bounds[1] - self.bounds[0]
        if not 0.0 <= self.eps < math.inf or (self.norm == "linf" and self.eps > width):
            most = f"{width:g}]" if self.norm == "linf" else "inf)"
            raise ValueError(
                f"eps {self.eps:g} is outside [0, {most}; budgets are fractions of the range: write "
                "8/255, not 8"
            )

    def project(self, x: Tensor, origin: Tensor) -> Tensor:
        """The nearest point of ball and range (of ``l2`` ball first, then range, which stays in both)."""
        if not origin.is_floating_point():
            raise ValueError(
                f"a norm ball around {origin.dtype} values means nothing; edit bags of words ('text-edits') "
                "or swap tokens ('token-swaps') instead"
            )
        low, high = self.bounds
        if self.norm == "linf":
            return torch.clamp(torch.clamp(x, origin - self.eps, origin + self.eps), low, high)
        delta = x - origin
        if self.norm == "l1":
            room = torch.where(delta > 0, high - origin, origin - low).clamp_min(0.0)
            allowed = project_l1(delta.flatten(1), room.flatten(1), self.eps).view_as(delta)
            moved = torch.clamp(origin + allowed, low, high)
            # half an ulp too much in each of 150,000 entries would add up
            beyond = (moved.double() - origin.double()).abs() > allowed.abs().double()
            return torch.where(beyond, torch.nextafter(moved, origin), moved)
        shrink = (self.eps / self.size(delta).clamp_min(1e-12)).clamp_max(1.0)
        return torch.clamp(origin + delta * per_item(shrink, delta), low, high)

    def random_start(self, origin: Tensor, ids: Tensor, draws: Draws) -> Tensor:
        """Uniform in the cube of side 2 eps (``linf``); else a random direction of random length."""
        noise = 2.0 * draws.uniform(ids, origin.shape[1:]).to(origin.dtype) - 1.0
        if self.norm != "linf":
            length = draws.within("length").uniform(ids, (1,)).flatten().to(origin.dtype)
            noise = noise * per_item(length / self.size(noise).clamp_min(1e-12), noise)
        return self.project(origin + self.eps * noise, origin)

    def check_length(self, length: float, what: str, origin: Tensor) -> None:
        entries, width = origin[0].numel(), self.bounds[1] - self.bounds[0]
        longest = width * {"linf": 1.0, "l2": math.sqrt(entries), "l1": float(entries)}[self.norm]
        if length > longest * (1 + 1e-6):
            raise ValueError(
                f"{what} {length:g} is beyond the longest change of {' x '.join(map(str, origin.shape[1:]))} "
                f"inputs in {self.norm}, {longest:.4g}; lengths are in units of the range of width "
                f"{width:g}: of 255 levels, divide by 255"
            )

    def steepest(self, grad: Tensor, at: Tensor | None = None) -> Tensor:
        """The unit step along ``grad``: its sign, the normalised gradient, or a sparse step (``l1``).

        The steepest step of ``l1`` moves a single entry; as usual it is spread over the signs of the largest
        share ``SPARSITY`` of the entries. Entries that are at the end of the range in ``at`` are passed over.
        """
        if self.norm == "linf":
            return grad.sign()
        if self.norm == "l2":
            return grad / per_item(self.size(grad).clamp_min(1e-12), grad)
        if at is not None:
            low, high = self.bounds
            grad = torch.where(((grad > 0) & (at < high)) | ((grad < 0) & (at > low)), grad, 0.0)
        flat = grad.flatten(1)
        largest = flat.abs().topk(max(1, math.ceil(self.SPARSITY * flat.shape[1])), dim=1).indices
        step = torch.zeros_like(flat).scatter_(1, largest, flat.gather(1, largest).sign())
        return (step / step.abs().sum(1, keepdim=True).clamp_min(1.0)).view_as(grad)

    def size(self, delta: Tensor) -> Tensor:
        flat = delta.flatten(1)
        if self.norm == "linf":
            return flat.abs().amax(1)
        return flat.norm(dim=1) if self.norm == "l2" else flat.abs().sum(1)

    def details(self) -> dict[str, Any]:
        return {"bounds": [float(bound) for bound in self.bounds]}

    def label(self, modality: str) -> str:
        """``img-linf-8`` (of 255), ``txt-linf-0.05``, and a range other than [0, 1]: " in [-1.5, 2]"."""
        size = self.eps * 255 if modality == "image" and self.norm == "linf" else self.eps
        low, high = self.bounds
        within = "" if (low, high) == (0.0, 1.0) else f" in [{low:g}, {high:g}]"
        return f"{_short(modality)}-{self.norm}-{size:g}{within}"


def project_l1(delta: Tensor, room: Tensor, eps: float) -> Tensor:
    """The nearest change of L1 norm at most ``eps`` with no entry beyond its room.

    The soft threshold of the change, cut at the room, sign(d) min(max(|d| - t, 0), room): the exact
    projection onto the intersection of ball and box (Croce & Hein, ICML 2021). Its norm falls with t in
    straight pieces, so t comes from sorting where they end, in float64.

    Args:
        delta: (B, D) change.
        room: (B, D) how far each entry may go in the direction of its change, at least 0.
    """
    rows = max(1, _BREAKPOINTS // (2 * max(1, delta.shape[1])))
    if len(delta) > rows:
        parts = zip(delta.split(rows), room.split(rows), strict=True)
        return torch.cat([project_l1(change, left, eps) for change, left in parts])
    size, room = delta.abs().double(), room.double()
    starts, ends = (size - room).clamp_min(0.0), size  # of the piece of t on which an entry shrinks
    at, order = torch.cat([starts, ends], 1).sort(1)
    begins = torch.where(order < size.shape[1], 1.0, -1.0).to(at.dtype)
    shrinking = begins.cumsum(1)  # entries, after each breakpoint
    lost = (shrinking[:, :-1] * at.diff(dim=1)).cumsum(1)
    whole = torch.minimum(size, room).sum(1, keepdim=True)
    norm = torch.cat([whole, whole - lost], 1)  # at each breakpoint
    # beyond this one the norm falls below eps; -1 where it is below already
    last = (norm > eps).sum(1, keepdim=True) - 1
    here = last.clamp_min(0)
    beyond = (norm.gather(1, here) - eps) / shrinking.gather(1, here).clamp_min(1.0)
    threshold = torch.where(last < 0, 0.0, at.gather(1, here) + beyond)
    return (delta.sign() * torch.minimum((size - threshold).clamp_min(0.0), room)).to(delta.dtype)


@dataclass(frozen=True)
class Edits(Budget):
    """At most ``eps`` words, its whole part, inserted into or removed from a bag of words in {0, 1}."""

    eps: float = 3
    norm = "flips"
    bounds = (0.0, 1.0)
    edits = True

    def __post_init__(self) -> None:
        if not 0 <= self.eps < math.inf:
            raise ValueError(f"an edit budget is a number of words, at least 0, got {self.eps!r}")

    @property
    def count(self) -> int:
        """Entries that may flip."""
        return int(self.eps + 1e-9)

    def project(self, x: Tensor, origin: Tensor) -> Tensor:
        """The nearest feasible bag: of the entries nearer to the other value, the ``count`` farthest flip."""
        if origin.dim() != 2 or not origin.is_floating_point() or not binary(origin):
            raise ValueError(
                f"an edit budget needs texts as real (B, V) bags of words of 0 and 1, got {origin.dtype} "
                f"{tuple(origin.shape)} from {float(origin.min()):g} to {float(origin.max()):g}; "
                "binarise them"
            )
        distance = (x - origin).abs()
        order = distance.argsort(dim=1, descending=True, stable=True)[:, : self.count]
        allowed = torch.zeros_like(origin, dtype=torch.bool).scatter_(1, order, True)
        return torch.where(allowed & (distance > 0.5), 1.0 - origin, origin)

    def random_start(self, origin: Tensor, ids: Tensor, draws: Draws) -> Tensor:
        """Exactly ``count`` entries flipped, drawn by item."""
        noise = draws.uniform(ids, origin.shape[1:]).to(origin.dtype)
        return self.project(origin + (1.0 - 2.0 * origin) * (0.5 + 0.5 * noise + 1e-6), origin)

    def size(self, delta: Tensor) -> Tensor:
        return (delta != 0).flatten(1).sum(1).float()

    def check(self, x: Tensor, origin: Tensor) -> None:
        if not binary(x):
            raise ValueError("the attacked text holds values other than 0 and 1, which are no edits of words")

    def label(self, modality: str) -> str:
        return f"{_short(modality)}-bow-{self.count}"


class Candidates:
    """For each token of a vocabulary the tokens that may replace it; its own id where nothing may.

    Args:
        table: (V, k) int64; row v holds the candidates of token v.
    """

    def __init__(self, table: Tensor) -> None:
        if table.ndim != 2 or table.dtype != torch.int64 or table.shape[1] < 1:
            raise ValueError(f"candidates are (V, k) int64 token ids, got {table.dtype} {tuple(table.shape)}")
        self.table = table.cpu()
        self.digest = hashlib.sha256(self.table.numpy().tobytes()).hexdigest()[:12]

    def of(self, ids: Tensor) -> Tensor:
        """(B, L) token ids -> (B, L, k) candidates of each; an id beyond the vocabulary is refused."""
        if len(ids) and int(ids.max()) >= len(self.table):
            raise ValueError(
                f"token id {int(ids.max())} has no candidates, which were made for a vocabulary of "
                f"{len(self.table)}; fit the attack to the victim that these texts belong to"
            )
        return self.table.to(ids.device)[ids]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Candidates) and self.digest == other.digest

    def __hash__(self) -> int:
        return int(self.digest, 16)

    def __repr__(self) -> str:
        return f"Candidates({len(self.table)} tokens, {self.table.shape[1]} each, {self.digest})"


@dataclass(frozen=True)
class Swaps(Budget):
    """At most ``eps`` tokens of a text changed, each for a candidate; special tokens and padding stay.

    Args:
        eps: tokens that may change; of a fraction the whole part counts.
        k: candidates of each token: the nearest of the victim's own embedding table.
        candidates: None until the attack is fitted to a victim.
    """

    eps: float = 2
    k: int = 8
    candidates: Candidates | None = None
    norm = "swaps"
    bounds = (0.0, float("inf"))
    edits = True

    def __post_init__(self) -> None:
        if not 0 <= self.eps < math.inf:
            raise ValueError(f"a budget of swaps is a number of tokens, at least 0, got {self.eps!r}")
        if self.k < 1:
            raise ValueError(f"each token needs at least 1 candidate, got {self.k}")

    @property
    def count(self) -> int:
        """Tokens that may change."""
        return int(self.eps + 1e-9)

    def allowed(self, origin: Tensor) -> Tensor:
        """(B, L) token ids -> (B, L, k) candidates."""
        if origin.ndim != 2 or origin.dtype != torch.int64:
            raise ValueError(
                f"token swaps need texts as (B, L) int64 token ids, got {origin.dtype} "
                f"{tuple(origin.shape)}; set texts: tokens for the data, or use 'text-edits' on bags of words"
            )
        if self.candidates is None:
            raise ValueError("the candidates of each token are not known yet; fit the attack to the victim")
        return self.candidates.of(origin)

    def project(self, x: Tensor, origin: Tensor) -> Tensor:
        """Tokens that are no candidates go back; of the others the first ``count`` of each text stay."""
        valid = (x != origin) & (self.allowed(origin) == x[:, :, None]).any(2)
        return torch.where(valid & (valid.cumsum(1) <= self.count), x, origin)

    def random_start(self, origin: Tensor, ids: Tensor, draws: Draws) -> Tensor:
        """``count`` tokens that have candidates changed for one of them, drawn by item."""
        allowed = self.allowed(origin)
        free = (allowed != origin[:, :, None]).any(2)
        places = draws.uniform(ids, (origin.shape[1],)).masked_fill(~free, 2.0)
        order = places.argsort(dim=1, stable=True)[:, : self.count]
        swapped = torch.zeros_like(free).scatter_(1, order, True) & free
        pick = (draws.within("candidate").uniform(ids, (origin.shape[1],)) * allowed.shape[2]).long()
        return torch.where(swapped, allowed.gather(2, pick[:, :, None])[:, :, 0], origin)

    def size(self, delta: Tensor) -> Tensor:
        return (delta != 0).flatten(1).sum(1).float()

    def details(self) -> dict[str, Any]:
        return {"k": self.k, "candidates": None if self.candidates is None else self.candidates.digest}

    def check(self, x: Tensor, origin: Tensor) -> None:
        strange = (x != origin) & ~(self.allowed(origin) == x[:, :, None]).any(2)
        if strange.any():
            row, place = torch.nonzero(strange)[0].tolist()
            raise ValueError(
                f"the attacked text {row} has token {int(x[row, place])} at place {place}, which is no "
                f"candidate of {int(origin[row, place])}"
            )

    def label(self, modality: str) -> str:
        return f"{_short(modality)}-token-{self.count}"


def _short(modality: str) -> str:
    return {"image": "img", "text": "txt"}.get(modality, modality)
