"""Threats: what may be changed, by how much, and what the attacker knows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from robusthash.attacks.token_budget import Swaps
from robusthash.core.runtime import Draws, digest
from robusthash.core.types import Inputs

Knowledge = Literal["W2", "W1", "W0", "B2", "B1", "T"]
Norm = Literal["linf", "l2", "l1"]
NORMS: tuple[Norm, ...] = get_args(Norm)
_HELD = 1 << 22  # breakpoints sorted at a time


def per_item(values: Tensor, like: Tensor) -> Tensor:
    """(B,) shaped to scale the items of ``like``."""
    return values.view(-1, *[1] * (like.dim() - 1))


def project_l1(delta: Tensor, room: Tensor, eps: float) -> Tensor:
    """The nearest change of L1 norm at most ``eps`` that no entry of which is beyond its room.

    It is the soft threshold of the change, cut at the room, sign(d) min(max(|d| - t, 0), room): the exact
    projection onto the intersection of ball and box (Croce & Hein, ICML 2021), not onto one after the other.
    Its norm falls with t in straight pieces, so t is found by sorting where they end, in float64.

    Args:
        delta: (B, D) change.
        room: (B, D) how far each entry may go in the direction of its change, at least 0.
    """
    rows = max(1, _HELD // (2 * max(1, delta.shape[1])))
    if len(delta) > rows:
        parts = zip(delta.split(rows), room.split(rows), strict=True)
        return torch.cat([project_l1(change, left, eps) for change, left in parts])
    size, room = delta.abs().double(), room.double()
    starts, ends = (size - room).clamp_min(0.0), size  # of the piece of t on which an entry shrinks
    at, order = torch.cat([starts, ends], 1).sort(1)
    shrinking = (
        torch.where(order < size.shape[1], 1.0, -1.0).to(at.dtype).cumsum(1)
    )  # entries, after each breakpoint
    lost = (shrinking[:, :-1] * at.diff(dim=1)).cumsum(1)
    whole = torch.minimum(size, room).sum(1, keepdim=True)
    norm = torch.cat([whole, whole - lost], 1)  # at each breakpoint
    last = (norm > eps).sum(
        1, keepdim=True
    ) - 1  # beyond it the norm falls below eps; -1 where it is there already
    here = last.clamp_min(0)
    beyond = (norm.gather(1, here) - eps) / shrinking.gather(1, here).clamp_min(1.0)
    threshold = torch.where(last < 0, 0.0, at.gather(1, here) + beyond)
    return (delta.sign() * torch.minimum((size - threshold).clamp_min(0.0), room)).to(delta.dtype)


@dataclass(frozen=True)
class Ball:
    """A norm ball around a clean input, cut with the input's range.

    Args:
        norm: ``linf``, ``l2`` or ``l1``.
        eps: radius in input units: 8/255, not 8, for pixels in [0, 1]. Of ``l1``, where none is customary for
            every size, 12 at 32 x 32 pixels is the usual one (Croce & Hein, ICML 2021).
        bounds: range of valid inputs.

    Raises:
        ValueError: an unknown norm; an eps below 0, or beyond the width of the range for ``linf``.
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
        if not self.eps >= 0.0 or (self.norm == "linf" and self.eps > width):
            raise ValueError(
                f"eps {self.eps:g} is outside [0, {width:g}]; budgets are fractions of the range: write 8/255, not 8"
            )

    def project(self, x: Tensor, origin: Tensor) -> Tensor:
        """The nearest point of the ball and the range (of ``l2`` ball first, then range, which stays in
        both).

        Raises:
            ValueError: for whole numbers, such as token ids: a norm of their differences means nothing.
        """
        if not origin.is_floating_point():
            raise ValueError(
                f"a norm ball around {origin.dtype} values means nothing; edit bags of words ('text-edits') or swap "
                "tokens ('token-swaps') instead"
            )
        low, high = self.bounds
        if self.norm == "linf":
            return torch.clamp(torch.clamp(x, origin - self.eps, origin + self.eps), low, high)
        delta = x - origin
        if self.norm == "l1":
            room = torch.where(delta > 0, high - origin, origin - low).clamp_min(0.0)
            kept = project_l1(delta.flatten(1), room.flatten(1), self.eps).view_as(delta)
            moved = torch.clamp(origin + kept, low, high)
            # half an ulp too much in each of 150,000 entries would add up
            beyond = (moved.double() - origin.double()).abs() > kept.abs().double()
            return torch.where(beyond, torch.nextafter(moved, origin), moved)
        shrink = (self.eps / self.size(delta).clamp_min(1e-12)).clamp_max(1.0)
        return torch.clamp(origin + delta * per_item(shrink, delta), low, high)

    def random_start(self, origin: Tensor, ids: Tensor, draws: Draws) -> Tensor:
        """Uniform in the cube of side 2 eps (``linf``); a random direction of random length (``l2``,
        ``l1``)."""
        noise = 2.0 * draws.uniform(ids, origin.shape[1:]).to(origin.dtype) - 1.0
        if self.norm != "linf":
            length = draws.within("length").uniform(ids, (1,)).flatten().to(origin.dtype)
            noise = noise * per_item(length / self.size(noise).clamp_min(1e-12), noise)
        return self.project(origin + self.eps * noise, origin)

    def steepest(self, grad: Tensor, at: Tensor | None = None) -> Tensor:
        """The unit step of the norm along ``grad``: its sign, the normalised gradient, or a sparse step
        (``l1``).

        The steepest step of ``l1`` moves a single entry; as usual it is spread, over the signs of the largest
        share ``SPARSITY`` of the entries, so that no search needs a step for each.

        Args:
            at: where the step is taken; entries of ``l1`` that are at the end of the range already are passed
                over.
        """
        if self.norm == "linf":
            return grad.sign()
        if self.norm == "l2":
            return grad / per_item(self.size(grad).clamp_min(1e-12), grad)
        if at is not None:
            low, high = self.bounds
            grad = torch.where(((grad > 0) & (at < high)) | ((grad < 0) & (at > low)), grad, 0.0)
        flat = grad.flatten(1)
        moved = max(1, math.ceil(self.SPARSITY * flat.shape[1]))
        largest = flat.abs().topk(moved, dim=1).indices
        step = torch.zeros_like(flat).scatter_(1, largest, flat.gather(1, largest).sign())
        return (step / step.abs().sum(1, keepdim=True).clamp_min(1.0)).view_as(grad)

    def details(self) -> dict[str, Any]:
        """What beside norm and eps makes it."""
        return {"bounds": [float(bound) for bound in self.bounds]}

    def size(self, delta: Tensor) -> Tensor:
        """(B,) norm of each perturbation."""
        flat = delta.flatten(1)
        if self.norm == "linf":
            return flat.abs().amax(1)
        return flat.norm(dim=1) if self.norm == "l2" else flat.abs().sum(1)


@dataclass(frozen=True)
class Edits:
    """An edit budget on bags of words in {0, 1}: at most so many words inserted or removed.

    Args:
        eps: m, the number of entries that may flip; of a fraction, as scaling a threat makes it, the whole
            part counts.

    Raises:
        ValueError: m below 0.
    """

    eps: float = 3
    norm: ClassVar[Literal["flips"]] = "flips"
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not self.eps >= 0:
            raise ValueError(f"an edit budget is a number of words, at least 0, got {self.eps!r}")

    @property
    def count(self) -> int:
        """Entries that may flip."""
        return int(self.eps + 1e-9)

    def project(self, x: Tensor, origin: Tensor) -> Tensor:
        """The nearest feasible bag: of the entries nearer to the other value, the m farthest from ``origin``
        flip.

        Raises:
            ValueError: an ``origin`` that is no bag of 0 and 1.
        """
        if origin.dim() != 2 or not origin.is_floating_point() or not binary(origin):
            raise ValueError(
                f"an edit budget needs texts as real (B, V) bags of words of 0 and 1, got {origin.dtype} "
                f"{tuple(origin.shape)} from {float(origin.min()):g} to {float(origin.max()):g}; binarise them"
            )
        distance = (x - origin).abs()
        order = distance.argsort(dim=1, descending=True, stable=True)[:, : self.count]
        allowed = torch.zeros_like(origin, dtype=torch.bool).scatter_(1, order, True)
        return torch.where(allowed & (distance > 0.5), 1.0 - origin, origin)

    def random_start(self, origin: Tensor, ids: Tensor, draws: Draws) -> Tensor:
        """Exactly m entries flipped, drawn by item."""
        noise = draws.uniform(ids, origin.shape[1:]).to(origin.dtype)
        return self.project(origin + (1.0 - 2.0 * origin) * (0.5 + 0.5 * noise + 1e-6), origin)

    def steepest(self, grad: Tensor, at: Tensor | None = None) -> Tensor:
        raise ValueError("an edit budget has no steepest step; use the search 'greedy-flips'")

    def details(self) -> dict[str, Any]:
        """Nothing beside norm and eps."""
        return {}

    def size(self, delta: Tensor) -> Tensor:
        """(B,) number of entries that differ."""
        return (delta != 0).flatten(1).sum(1).float()


Budget = Ball | Edits | Swaps


def binary(values: Tensor) -> bool:
    """Whether all values are 0 or 1, as in a bag that says which words occur."""
    return bool(((values == 0) | (values == 1)).all())


@dataclass(frozen=True)
class Threat:
    """Balls, or edit budgets, by modality and the attacker's knowledge. A modality not named stays untouched.

    Plain data: threats of equal content are equal, hash alike and have one ``fingerprint`` on every machine.

    ``knowledge``: W2 weights, labels and database codes; W1 weights and training labels; W0 weights only; B2
    answers with codes or distances; B1 answers with the ordered ids of the top k; T surrogate models only.
    ``version`` rises where the meaning of a name changes, so that results of two meanings are never compared.
    """

    balls: dict[str, Budget]
    knowledge: Knowledge = "W1"
    side: Literal["query", "database"] = "query"
    name: str = field(default="")
    version: int = 1

    def __post_init__(self) -> None:
        if not self.balls:
            raise ValueError("a threat needs at least one modality to attack")
        for value, known in (
            (self.knowledge, ("W2", "W1", "W0", "B2", "B1", "T")),
            (self.side, ("query", "database")),
        ):
            if value not in known:
                raise ValueError(f"a threat has one of {', '.join(known)} there, got {value!r}")
        if not self.name:
            object.__setattr__(self, "name", automatic_name(self.balls))

    def __hash__(self) -> int:
        return int(self.fingerprint(), 16)

    def settings(self) -> dict[str, Any]:
        """The threat as JSON holds it; ``from_settings`` reads it. Candidate lists stand in it by their
        digest."""
        balls = {
            name: {"norm": b.norm, "eps": float(b.eps), **b.details()}
            for name, b in sorted(self.balls.items())
        }
        return {
            "name": self.name,
            "version": self.version,
            "knowledge": self.knowledge,
            "side": self.side,
            "balls": balls,
        }

    @staticmethod
    def from_settings(settings: Mapping[str, Any]) -> Threat:
        """The inverse of ``settings``; candidate lists of token swaps are found again when the attack is
        fitted.

        Raises:
            ValueError: a missing or unknown key, or a norm that no budget has.
        """
        wanted = {"name", "version", "knowledge", "side", "balls"}
        if set(settings) != wanted:
            raise ValueError(f"the settings of a threat are {sorted(wanted)}, got {sorted(settings)}")
        balls = {name: _budget(made) for name, made in settings["balls"].items()}
        return Threat(balls, settings["knowledge"], settings["side"], settings["name"], settings["version"])

    def fingerprint(self) -> str:
        """Digest of the content, the same in every process and on every machine."""
        return digest(self.settings(), 15)

    @property
    def edits(self) -> bool:
        """Whether words or tokens are edited, which only a search for edits can do."""
        return any(ball.norm in ("flips", "swaps") for ball in self.balls.values())

    def ratio(self, modality: str) -> float:
        """Budget of a modality in units of the first one's: how far a step of size 1 goes in it."""
        first = next(iter(self.balls.values())).eps
        return self.balls[modality].eps / first if first else 1.0

    def project(self, x: Inputs, origin: Inputs) -> Inputs:
        """Each attacked modality back into its ball and range."""
        return {name: ball.project(x[name], origin[name]) for name, ball in self.balls.items()}

    def random_start(self, origin: Inputs, ids: Tensor, draws: Draws) -> Inputs:
        return {
            name: b.random_start(origin[name], ids, draws.within("start", name))
            for name, b in self.balls.items()
        }

    def steepest(self, grad: Inputs, at: Inputs | None = None) -> Inputs:
        """The unit step of each budget, taken from ``at`` where that is given."""
        return {
            name: b.steepest(grad[name], None if at is None else at[name]) for name, b in self.balls.items()
        }

    def corner(self, drawn: Inputs) -> Inputs:
        """A unit step of each ball in a random direction, from uniform numbers in [0, 1): a sign for each
        entry.

        A step of ``l1`` moves few entries: the numbers choose which.
        """

        def direction(norm: str, numbers: Tensor) -> Tensor:
            return numbers - 0.5 if norm == "l1" else torch.where(numbers < 0.5, -1.0, 1.0).to(numbers.dtype)

        return self.steepest({name: direction(ball.norm, drawn[name]) for name, ball in self.balls.items()})

    def scaled(self, factor: float) -> Threat:
        """The same threat with every eps times ``factor``, for eps curves and warm-up."""
        balls = {name: replace(ball, eps=ball.eps * factor) for name, ball in self.balls.items()}
        usual = automatic_name(self.balls)
        kept = self.name.removesuffix(usual) if self.name.endswith(usual) else ""  # "db-insert-img-linf-8"
        return replace(self, balls=balls, name=kept + automatic_name(balls))

    def verify(self, x: Inputs, origin: Inputs, tolerance: float = 1e-6) -> None:
        """Raise where an input left its ball or range, is not finite, or an unnamed modality was touched.

        The evaluator calls this, not the attack.
        """
        for name, value in x.items():
            clean = origin[name]
            if name not in self.balls:
                if not torch.equal(value, clean):
                    raise ValueError(f"the attack touched {name!r}, which {self.name} does not allow")
                continue
            ball = self.balls[name]
            if not torch.isfinite(value).all():
                raise ValueError(f"the attacked {name} holds NaN or infinite values")
            if isinstance(ball, Edits) and not binary(value):
                raise ValueError(
                    f"the attacked {name} holds values other than 0 and 1, which are no edits of words"
                )
            if value.dtype != clean.dtype or value.shape != clean.shape:
                raise ValueError(
                    f"the attacked {name} is {value.dtype} {tuple(value.shape)}, not {clean.dtype}"
                )
            if isinstance(ball, Swaps):
                ball.check(value, clean)
            worst = float(ball.size(value - clean).max())
            slack = tolerance if ball.norm == "linf" else tolerance * max(1.0, ball.eps) * 10
            if worst > ball.eps + slack:
                raise ValueError(
                    f"the attacked {name} is {worst:g} from its origin under {ball.norm}, beyond {ball.eps:g}"
                )
            if value.min() < ball.bounds[0] - tolerance or value.max() > ball.bounds[1] + tolerance:
                raise ValueError(f"the attacked {name} leaves the range {ball.bounds}")


def automatic_name(balls: Mapping[str, Budget]) -> str:
    """What a threat is called where nobody named it: ``img-linf-8+txt-linf-0.05``."""
    return "+".join(_named(modality, ball) for modality, ball in sorted(balls.items()))


def _named(modality: str, ball: Budget) -> str:
    """``img-linf-8`` (of 255), ``txt-linf-0.05``, ``txt-linf-0.05 in [-1.5, 2]``, ``txt-bow-3``,
    ``txt-token-2``."""
    short = {"image": "img", "text": "txt"}.get(modality, modality)
    if isinstance(ball, Edits):
        return f"{short}-bow-{ball.count}"
    if isinstance(ball, Swaps):
        return f"{short}-token-{ball.count}"
    size = ball.eps * 255 if modality == "image" and ball.norm == "linf" else ball.eps
    low, high = ball.bounds
    within = (
        "" if (low, high) == (0.0, 1.0) else f" in [{low:g}, {high:g}]"
    )  # another range is another threat
    return f"{short}-{ball.norm}-{size:g}{within}"


def _budget(settings: Mapping[str, Any]) -> Budget:
    norm, eps = settings["norm"], settings["eps"]
    if norm == "flips":
        return Edits(eps)
    if norm == "swaps":
        return Swaps(eps, settings["k"])
    return Ball(norm, eps, tuple(settings["bounds"]))  # refuses any other norm


Attacked = Literal["image", "text", "both"]
EPS = {"image": 8 / 255, "text": 0.05}
"""Customary budgets: of pixels; of a continuous text vector (DRFGD), which corresponds to no real text."""


def threat_on(
    modality: Attacked = "image",
    eps: float | None = None,
    norm: Norm = "linf",
    knowledge: Knowledge = "W1",
) -> Threat:
    """The usual threats: ``img-linf-8`` by default, ``txt-linf-0.05``, or both on the pair of one item.

    Args:
        modality: what is attacked; ``both`` perturbs image and text of an item together.
        eps: of the image, or of the text where only that is attacked; the customary one by default, in L-inf.

    Raises:
        ValueError: an L2 or L1 threat without ``eps``: the customary length depends on the size of the image.
    """
    if modality not in ("image", "text", "both"):
        raise ValueError(f"modality must be 'image', 'text' or 'both', got {modality!r}")
    if norm != "linf" and (eps is None or modality == "both"):
        raise ValueError(
            f"an {norm} threat on {modality!r} has no customary eps here; give eps, on one modality (of images 0.5 at "
            "32 x 32 and 3.5 at 224 x 224 are customary in l2, as in the threat 'img-l2', and 12 at 32 x 32 in l1)"
        )
    attacked = ("image", "text") if modality == "both" else (modality,)
    balls: dict[str, Budget] = {name: Ball(norm, EPS[name]) for name in attacked}
    if eps is not None:
        balls[attacked[0]] = Ball(norm, eps)
    return Threat(balls, knowledge)


def image_threat(eps: float = 8 / 255, norm: Norm = "linf", knowledge: Knowledge = "W1") -> Threat:
    """The usual image threat: ``img-linf-8`` by default."""
    return threat_on("image", eps, norm, knowledge)


def edit_threat(edits: int = 3, knowledge: Knowledge = "W1") -> Threat:
    """At most ``edits`` words inserted into, or removed from, each text: ``txt-bow-3`` by default."""
    return Threat({"text": Edits(edits)}, knowledge)
