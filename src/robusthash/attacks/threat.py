"""Threats: what may be changed, by how much, and what the attacker knows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robusthash.core.runtime import Draws
from robusthash.core.types import Inputs

Knowledge = Literal["W2", "W1", "W0", "B2", "B1", "T"]


def _per_item(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def _norms(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


@dataclass(frozen=True)
class Ball:
    """A norm ball around a clean input, cut with the input's range.

    Args:
        norm: ``linf`` or ``l2``.
        eps: radius in input units: 8/255, not 8, for pixels in [0, 1].
        bounds: range of valid inputs.

    Raises:
        ValueError: an unknown norm; an eps below 0, or beyond the width of the range for ``linf``.
    """

    norm: Literal["linf", "l2"]
    eps: float
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"norm must be 'linf' or 'l2', got {self.norm!r}")
        width = self.bounds[1] - self.bounds[0]
        if not self.eps >= 0.0 or (self.norm == "linf" and self.eps > width):
            raise ValueError(
                f"eps {self.eps:g} is outside [0, {width:g}]; budgets are fractions of the range: write 8/255, not 8"
            )

    def project(self, x: Tensor, origin: Tensor) -> Tensor:
        """The nearest point of the ball and the range (for ``l2``: ball first, then range, which stays in both).

        Raises:
            ValueError: for whole numbers, such as token ids: a norm of their differences means nothing.
        """
        if not origin.is_floating_point():
            raise ValueError(
                f"a norm ball around {origin.dtype} values means nothing; edit bags of words ('text-edits') instead"
            )
        low, high = self.bounds
        if self.norm == "linf":
            return torch.clamp(torch.clamp(x, origin - self.eps, origin + self.eps), low, high)
        delta = x - origin
        shrink = (self.eps / _norms(delta).clamp_min(1e-12)).clamp_max(1.0)
        return torch.clamp(origin + delta * _per_item(shrink, delta), low, high)

    def random_start(self, origin: Tensor, ids: Tensor, draws: Draws) -> Tensor:
        """Uniform in the cube of side 2 eps (``linf``); a random direction of random length (``l2``)."""
        noise = 2.0 * draws.uniform(ids, origin.shape[1:]).to(origin.dtype) - 1.0
        if self.norm == "l2":
            length = draws.within("length").uniform(ids, (1,)).flatten().to(origin.dtype)
            noise = noise * _per_item(length / _norms(noise).clamp_min(1e-12), noise)
        return self.project(origin + self.eps * noise, origin)

    def steepest(self, grad: Tensor) -> Tensor:
        """The unit step of the norm along ``grad``: its sign, or the normalised gradient."""
        if self.norm == "linf":
            return grad.sign()
        return grad / _per_item(_norms(grad).clamp_min(1e-12), grad)

    def size(self, delta: Tensor) -> Tensor:
        """(B,) norm of each perturbation."""
        return delta.flatten(1).abs().amax(1) if self.norm == "linf" else _norms(delta)


@dataclass(frozen=True)
class Edits:
    """An edit budget on bags of words in {0, 1}: at most so many words inserted or removed.

    Args:
        eps: m, the number of entries that may flip; of a fraction, as scaling a threat makes it, the whole part counts.

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
        """The nearest feasible bag: of the entries nearer to the other value, the m farthest from ``origin`` flip.

        Raises:
            ValueError: an ``origin`` that is no bag of 0 and 1.
        """
        if origin.dim() != 2 or not origin.is_floating_point() or not _binary(origin):
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

    def steepest(self, grad: Tensor) -> Tensor:
        raise ValueError("an edit budget has no steepest step; use the search 'greedy-flips'")

    def size(self, delta: Tensor) -> Tensor:
        """(B,) number of entries that differ."""
        return (delta != 0).flatten(1).sum(1).float()


Budget = Ball | Edits


def _binary(values: Tensor) -> bool:
    return bool(((values == 0) | (values == 1)).all())


@dataclass(frozen=True)
class Threat:
    """Balls, or edit budgets, by modality and the attacker's knowledge. A modality not named stays untouched.

    ``knowledge``: W2 weights, labels and database codes; W1 weights and training labels; W0 weights only.
    """

    balls: dict[str, Budget]
    knowledge: Knowledge = "W1"
    side: Literal["query", "database"] = "query"
    name: str = field(default="")

    def __post_init__(self) -> None:
        if not self.balls:
            raise ValueError("a threat needs at least one modality to attack")
        if not self.name:
            object.__setattr__(self, "name", "+".join(_named(m, b) for m, b in sorted(self.balls.items())))

    @property
    def edits(self) -> bool:
        """Whether words are edited, which only a search for edits can do."""
        return any(ball.norm == "flips" for ball in self.balls.values())

    def ratio(self, modality: str) -> float:
        """Budget of a modality in units of the first one's: how far a step of size 1 goes in it."""
        first = next(iter(self.balls.values())).eps
        return self.balls[modality].eps / first if first else 1.0

    def project(self, x: Inputs, origin: Inputs) -> Inputs:
        """Each attacked modality back into its ball and range."""
        return {name: ball.project(x[name], origin[name]) for name, ball in self.balls.items()}

    def random_start(self, origin: Inputs, ids: Tensor, draws: Draws) -> Inputs:
        return {name: b.random_start(origin[name], ids, draws.within("start", name)) for name, b in self.balls.items()}

    def steepest(self, grad: Inputs) -> Inputs:
        return {name: ball.steepest(grad[name]) for name, ball in self.balls.items()}

    def scaled(self, factor: float) -> Threat:
        """The same threat with every eps times ``factor``, for eps curves and warm-up."""
        balls = {name: replace(ball, eps=ball.eps * factor) for name, ball in self.balls.items()}
        return Threat(balls, self.knowledge, self.side)

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
            if isinstance(ball, Edits) and not _binary(value):
                raise ValueError(f"the attacked {name} holds values other than 0 and 1, which are no edits of words")
            if value.dtype != clean.dtype or value.shape != clean.shape:
                raise ValueError(f"the attacked {name} is {value.dtype} {tuple(value.shape)}, not {clean.dtype}")
            worst = float(ball.size(value - clean).max())
            slack = tolerance if ball.norm == "linf" else tolerance * max(1.0, ball.eps) * 10
            if worst > ball.eps + slack:
                raise ValueError(
                    f"the attacked {name} is {worst:g} from its origin under {ball.norm}, beyond {ball.eps:g}"
                )
            if value.min() < ball.bounds[0] - tolerance or value.max() > ball.bounds[1] + tolerance:
                raise ValueError(f"the attacked {name} leaves the range {ball.bounds}")


def _named(modality: str, ball: Budget) -> str:
    """``img-linf-8`` (of 255), ``img-l2-0.5``, ``txt-linf-0.05``, ``txt-bow-3``."""
    short = {"image": "img", "text": "txt"}.get(modality, modality)
    if isinstance(ball, Edits):
        return f"{short}-bow-{ball.count}"
    size = ball.eps * 255 if modality == "image" and ball.norm == "linf" else ball.eps
    return f"{short}-{ball.norm}-{size:g}"


Attacked = Literal["image", "text", "both"]
EPS = {"image": 8 / 255, "text": 0.05}
"""Customary budgets: of pixels; of a continuous text vector (DRFGD), which corresponds to no real text."""


def threat_on(
    modality: Attacked = "image",
    eps: float | None = None,
    norm: Literal["linf", "l2"] = "linf",
    knowledge: Knowledge = "W1",
) -> Threat:
    """The usual threats: ``img-linf-8`` by default, ``txt-linf-0.05``, or both on the pair of one item.

    Args:
        modality: what is attacked; ``both`` perturbs image and text of an item together.
        eps: of the image, or of the text where only that is attacked; the customary one by default.
    """
    if modality not in ("image", "text", "both"):
        raise ValueError(f"modality must be 'image', 'text' or 'both', got {modality!r}")
    attacked = ("image", "text") if modality == "both" else (modality,)
    balls: dict[str, Budget] = {name: Ball(norm, EPS[name]) for name in attacked}
    if eps is not None:
        balls[attacked[0]] = Ball(norm, eps)
    return Threat(balls, knowledge)


def image_threat(eps: float = 8 / 255, norm: Literal["linf", "l2"] = "linf", knowledge: Knowledge = "W1") -> Threat:
    """The usual image threat: ``img-linf-8`` by default."""
    return threat_on("image", eps, norm, knowledge)


def edit_threat(edits: int = 3, knowledge: Knowledge = "W1") -> Threat:
    """At most ``edits`` words inserted into, or removed from, each text: ``txt-bow-3`` by default."""
    return Threat({"text": Edits(edits)}, knowledge)
