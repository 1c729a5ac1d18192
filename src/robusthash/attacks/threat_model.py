"""Threats: what may be changed, by how much, and what the attacker knows; and the threats by name.

A name says what may be changed and by how much, ``img-linf-8`` or with other numbers ``img-linf-4``; each has
a version. Who knows what is ``knowledge``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from robusthash.attacks.budgets import Ball, Budget, Edits, Norm, Swaps
from robusthash.core.registry import build, catalogue, nearest, register
from robusthash.core.runtime import Draws, digest
from robusthash.core.types import Inputs

Knowledge = Literal["W2", "W1", "W0", "B2", "B1", "T"]
Side = Literal["query", "database"]
Attacked = Literal["image", "text", "both"]

EPS = {"image": 8 / 255, "text": 0.05}
"""Customary budgets: of pixels; of a continuous text vector (DRFGD), which corresponds to no real text."""

L2_AT_32 = 0.5
"""Customary L2 budget at 32 x 32 pixels; it grows with the square root of the pixel count (3.5 at 224)."""


@dataclass(frozen=True)
class Threat:
    """Budgets by modality and the attacker's knowledge. A modality not named stays untouched.

    Plain data: threats of equal content are equal, hash alike and have one ``fingerprint`` on every machine.

    ``knowledge``: W2 weights, labels and database codes; W1 weights and training labels; W0 weights only; B2
    answers with codes or distances; B1 answers with the ordered ids of the top k; T surrogate models only.
    ``version`` rises where the meaning of a name changes, so that results of two meanings are never compared.
    """

    balls: dict[str, Budget]
    knowledge: Knowledge = "W1"
    side: Side = "query"
    name: str = ""
    version: int = 1

    def __post_init__(self) -> None:
        if not self.balls:
            raise ValueError("a threat needs at least one modality to attack")
        for value, known in ((self.knowledge, get_args(Knowledge)), (self.side, get_args(Side))):
            if value not in known:
                raise ValueError(f"a threat has one of {', '.join(known)} there, got {value!r}")
        if not self.name:
            object.__setattr__(self, "name", automatic_name(self.balls))

    def __hash__(self) -> int:
        return int(self.fingerprint(), 16)

    def settings(self) -> dict[str, Any]:
        """The threat as JSON holds it, read by ``from_settings``; candidate lists stand as their digest."""
        balls = {
            name: {"norm": ball.norm, "eps": float(ball.eps), **ball.details()}
            for name, ball in sorted(self.balls.items())
        }
        facts = {"name": self.name, "version": self.version, "knowledge": self.knowledge, "side": self.side}
        return {**facts, "balls": balls}

    @staticmethod
    def from_settings(settings: Mapping[str, Any]) -> Threat:
        """The inverse of ``settings``; candidate lists of token swaps come back when the attack is fitted."""
        keys = {"name", "version", "knowledge", "side", "balls"}
        if set(settings) != keys:
            raise ValueError(f"the settings of a threat are {sorted(keys)}, got {sorted(settings)}")
        balls = {name: _budget(ball) for name, ball in settings["balls"].items()}
        return Threat(balls, settings["knowledge"], settings["side"], settings["name"], settings["version"])

    def fingerprint(self) -> str:
        """Digest of the content, the same in every process and on every machine."""
        return digest(self.settings(), 15)

    @property
    def edits(self) -> bool:
        """True where words or tokens are edited, which only a search for edits can do."""
        return any(ball.edits for ball in self.balls.values())

    def ratio(self, modality: str) -> float:
        """Budget of a modality in units of the first one's: how far a step of size 1 goes in it."""
        first = next(iter(self.balls.values())).eps
        return self.balls[modality].eps / first if first else 1.0

    def project(self, x: Inputs, origin: Inputs) -> Inputs:
        """Each attacked modality back into its budget and range."""
        return {name: ball.project(x[name], origin[name]) for name, ball in self.balls.items()}

    def random_start(self, origin: Inputs, ids: Tensor, draws: Draws) -> Inputs:
        """Random feasible inputs, keyed by item."""
        return {
            name: ball.random_start(origin[name], ids, draws.within("start", name))
            for name, ball in self.balls.items()
        }

    def steepest(self, grad: Inputs, at: Inputs | None = None) -> Inputs:
        """The unit step of each budget, taken from ``at`` where that is given."""
        return {n: ball.steepest(grad[n], None if at is None else at[n]) for n, ball in self.balls.items()}

    def corner(self, uniform: Inputs) -> Inputs:
        """A unit step of each ball in the direction of uniform numbers in [0, 1): a sign for each entry.

        A step of ``l1`` moves few entries: the numbers choose which.
        """

        def direction(norm: str, numbers: Tensor) -> Tensor:
            return numbers - 0.5 if norm == "l1" else torch.where(numbers < 0.5, -1.0, 1.0).to(numbers.dtype)

        return self.steepest({name: direction(ball.norm, uniform[name]) for name, ball in self.balls.items()})

    def scaled(self, factor: float) -> Threat:
        """The same threat with every eps times ``factor``, for eps curves and warm-up."""
        balls = {name: ball.with_eps(ball.eps * factor) for name, ball in self.balls.items()}
        usual = automatic_name(self.balls)
        prefix = self.name.removesuffix(usual) if self.name.endswith(usual) else ""  # "db-insert-img-linf-8"
        return replace(self, balls=balls, name=prefix + automatic_name(balls))

    def verify(self, x: Inputs, origin: Inputs, tolerance: float = 1e-6) -> None:
        """Refuse inputs outside budget or range, non-finite ones, and other modalities that were touched.

        The evaluator calls this, not the attack.
        """
        for name, value in x.items():
            clean, ball = origin[name], self.balls.get(name)
            if ball is None:
                if not torch.equal(value, clean):
                    raise ValueError(f"the attack touched {name!r}, which {self.name} does not allow")
                continue
            if not torch.isfinite(value).all():
                raise ValueError(f"the attacked {name} holds NaN or infinite values")
            if value.dtype != clean.dtype or value.shape != clean.shape:
                raise ValueError(f"the attacked {name} is {value.dtype} {[*value.shape]}, not {clean.dtype}")
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
    """The name of a threat that has none: ``img-linf-8+txt-linf-0.05``."""
    return "+".join(ball.label(modality) for modality, ball in sorted(balls.items()))


def _budget(settings: Mapping[str, Any]) -> Budget:
    norm, eps = settings["norm"], settings["eps"]
    if norm == "flips":
        return Edits(eps)
    if norm == "swaps":
        return Swaps(eps, settings["k"])
    return Ball(norm, eps, tuple(settings["bounds"]))  # refuses any other norm


def threat_on(
    modality: Attacked = "image", eps: float | None = None, norm: Norm = "linf", knowledge: Knowledge = "W1"
) -> Threat:
    """The usual threats: ``img-linf-8`` by default, ``txt-linf-0.05``, or both on the pair of one item.

    Args:
        eps: of the image, or of the text where only that is attacked; the customary one by default, in L-inf.

    Raises:
        ValueError: an L2 or L1 threat without ``eps``: the customary length depends on the size of the image.
    """
    if modality not in get_args(Attacked):
        raise ValueError(f"modality must be 'image', 'text' or 'both', got {modality!r}")
    if norm != "linf" and (eps is None or modality == "both"):
        raise ValueError(
            f"an {norm} threat on {modality!r} has no customary eps here; give eps, on one modality (of "
            "images 0.5 at 32 x 32 and 3.5 at 224 x 224 are customary in l2, as in the threat 'img-l2', and "
            "12 at 32 x 32 in l1)"
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


@register("threat", "img-linf-8", modality="image")
def img_linf_8(knowledge: Knowledge = "W1") -> Threat:
    """Pixels changed by at most 8/255, in [0, 1]."""
    return image_threat(knowledge=knowledge)


@register("threat", "img-l2", modality="image")
def img_l2(knowledge: Knowledge = "W1", pixels: tuple[int, int] = (32, 32)) -> Threat:
    """Euclidean length of the change at most 0.5 at 32 x 32 pixels, 3.5 at 224 x 224."""
    if len(pixels) != 2 or min(pixels) < 1:
        raise ValueError(f"pixels must be the height and width of the model's input, got {pixels!r}")
    return image_threat(L2_AT_32 * math.sqrt(pixels[0] * pixels[1]) / 32, "l2", knowledge)


@register("threat", "txt-feat-linf", modality="text")
def txt_feat_linf(features: Tensor, knowledge: Knowledge = "W1", eps: float = EPS["text"]) -> Threat:
    """Entries of a continuous text vector changed by at most 0.05, within the range of the training set."""
    if not features.is_floating_point() or not features.isfinite().all():
        raise ValueError(f"the range comes from finite real training features, got {features.dtype}")
    return Threat({"text": Ball("linf", eps, (float(features.min()), float(features.max())))}, knowledge)


@register("threat", "txt-bow-m", modality="text")
def txt_bow_m(m: int = 3, knowledge: Knowledge = "W1") -> Threat:
    """At most m = 3 words inserted into a bag of words, or removed from it."""
    return edit_threat(m, knowledge)


@register("threat", "txt-token-m", modality="tokens")
def txt_token_m(m: int = 2, k: int = 8, knowledge: Knowledge = "W1") -> Threat:
    """At most m = 2 tokens changed, each for one of its k = 8 nearest in the victim's embedding table."""
    return Threat({"text": Swaps(m, k)}, knowledge)


@register("threat", "joint")
def joint(knowledge: Knowledge = "W1") -> Threat:
    """Image (8/255) and text vector (0.05) of one item together; every direction is scored from that pair."""
    return threat_on("both", knowledge=knowledge)


@register("threat", "db-insert", modality="image")
def db_insert(like: str = "img-linf-8", knowledge: Knowledge = "W2") -> Threat:
    """Items added to the database, each within the bound of the image threat ``like``, to be found often."""
    return _on_database("db-insert", like, knowledge)


@register("threat", "db-perturb", modality="image")
def db_perturb(like: str = "img-linf-8", knowledge: Knowledge = "W2") -> Threat:
    """A declared share of the database items, each within the bound of ``like``, to be no longer found."""
    return _on_database("db-perturb", like, knowledge)


def _on_database(name: str, like: str, knowledge: Knowledge) -> Threat:
    bound = named_threat(like, knowledge=knowledge)
    if set(bound.balls) != {"image"} or bound.side != "query":
        raise ValueError(f"{name} takes the bound of an image threat, not {like!r}")
    return Threat(bound.balls, knowledge, "database", f"{name}-{bound.name}")


_NUMBER = r"(\d+(?:\.\d+)?)"
_PATTERNS: tuple[tuple[str, str, Callable[[float], Budget]], ...] = (
    (rf"img-linf-{_NUMBER}", "image", lambda size: Ball("linf", size / 255)),
    (rf"img-l1-{_NUMBER}", "image", lambda size: Ball("l1", size)),
    (rf"img-l2-{_NUMBER}", "image", lambda size: Ball("l2", size)),
    (rf"txt-linf-{_NUMBER}", "text", lambda size: Ball("linf", size)),
    (rf"txt-l1-{_NUMBER}", "text", lambda size: Ball("l1", size)),
    (rf"txt-l2-{_NUMBER}", "text", lambda size: Ball("l2", size)),
    (r"txt-bow-(\d+)", "text", Edits),
    (r"txt-token-(\d+)", "text", Swaps),
)


def named_threat(
    name: str,
    knowledge: Knowledge | None = None,
    *,
    pixels: tuple[int, int] | None = None,
    features: Tensor | None = None,
) -> Threat:
    """The threat of a name: a registered one, one with other numbers, or several joined by ``+``.

    Args:
        name: ``img-linf-8``, ``img-l2``, ``txt-feat-linf``, ``txt-bow-m``, ``txt-token-m``, ``joint``,
            ``db-insert``, ``db-perturb``; ``img-linf-4`` (of 255), ``img-l2-3.5``, ``img-l1-12``,
            ``txt-linf-0.05``, ``txt-bow-5``, ``txt-token-1``; ``img-linf-8+txt-linf-0.05``;
            ``db-insert-img-linf-4``. Every name that a threat gives itself is read, but for those of a range
            that only the data give.
        knowledge: W2, W1, W0, B2, B1 or T; that of the registered threat by default.
        pixels: height and width of the input, for ``img-l2``.
        features: (N, V) training features, which ``txt-feat-linf`` needs.

    Raises:
        KeyError: an unknown name, with the nearest known one.
        ValueError: a number outside its range, or ``txt-feat-linf`` without features.

    Example:
        >>> named_threat("img-l2", pixels=(224, 224)).name
        'img-l2-3.5'
    """
    known = {card.name for card in catalogue("threat")}
    if name in known:
        if name == "txt-feat-linf" and features is None:
            raise ValueError(
                "txt-feat-linf needs features=, the text vectors of the training set: they give its range"
            )
        options = {"knowledge": knowledge, "pixels": pixels, "features": features}
        threat: Threat = build("threat", name, **{k: v for k, v in options.items() if v is not None})
        return threat
    for side in ("db-insert", "db-perturb"):
        if name.startswith(f"{side}-"):
            return _on_database(side, name.removeprefix(f"{side}-"), knowledge or "W2")
    balls: dict[str, Budget] = {}
    for part in name.split("+"):
        modality, budget = _parsed(part, known)
        if modality in balls:
            raise ValueError(f"{name!r} names two budgets for the {modality}")
        balls[modality] = budget
    return Threat(balls, knowledge or "W1")


def _parsed(part: str, known: set[str]) -> tuple[str, Budget]:
    for pattern, modality, make in _PATTERNS:
        if match := re.fullmatch(pattern, part):
            size = float(match[1])
            if part.startswith("img-linf-") and size > 255:
                raise ValueError(f"{part}: img-linf-N is in levels of 255, so N is at most 255")
            if part.startswith("txt-linf-") and size > 1:
                raise ValueError(f"{part}: txt-linf-N is in the range of texts, 0 to 1, so N is at most 1")
            return modality, make(size)
    raise KeyError(
        f"no threat is called {part!r}{nearest(part, known)} Other numbers: img-linf-4, img-l2-1, img-l1-12, "
        "txt-bow-5."
    )
