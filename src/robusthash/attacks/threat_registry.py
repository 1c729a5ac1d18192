"""The threats by name: ``named_threat("img-linf-8")``, and with other numbers ``img-linf-4``, ``txt-bow-5``.

Each name has a version. The name says what may be changed and by how much; who knows what is ``knowledge``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from torch import Tensor

from robusthash.attacks.threat_model import (
    EPS,
    Ball,
    Budget,
    Edits,
    Knowledge,
    Norm,
    Threat,
    edit_threat,
    image_threat,
    threat_on,
)
from robusthash.attacks.token_budget import Swaps
from robusthash.core.registry import build, catalogue, nearest, register

L2_AT_32 = 0.5
"""The customary L2 budget at 32 x 32 pixels; it grows with the square root of the number of pixels (3.5 at
224)."""


@register("threat", "img-linf-8", modality="image")
def img_linf_8(knowledge: Knowledge = "W1") -> Threat:
    """Pixels changed by at most 8/255, in [0, 1]."""
    return image_threat(knowledge=knowledge)


@register("threat", "img-l2", modality="image")
def img_l2(knowledge: Knowledge = "W1", pixels: tuple[int, int] = (32, 32)) -> Threat:
    """Euclidean length of the change at most 0.5 at 32 x 32 pixels, 3.5 at 224 x 224.

    Args:
        pixels: height and width of the model's input; the budget grows with the square root of their product.
    """
    if len(pixels) != 2 or min(pixels) < 1:
        raise ValueError(f"pixels must be the height and width of the model's input, got {pixels!r}")
    return image_threat(L2_AT_32 * math.sqrt(pixels[0] * pixels[1]) / 32, "l2", knowledge)


def image_ball(
    norm: Norm, eps: float | None, pixels: tuple[int, int] | None, knowledge: Knowledge = "W1"
) -> Threat:
    """An image threat by norm and budget, by default the customary one: ``img-linf-8``, or ``img-l2`` at this
    size.

    Raises:
        ValueError: an L2 threat without ``eps`` on features, which have no ``pixels``; an L1 threat without
            ``eps``.
    """
    if norm == "l2" and eps is None and pixels is not None:
        return img_l2(knowledge, pixels)
    return threat_on("image", eps, norm, knowledge)


@register("threat", "txt-feat-linf", modality="text")
def txt_feat_linf(features: Tensor, knowledge: Knowledge = "W1", eps: float = EPS["text"]) -> Threat:
    """Entries of a continuous text vector changed by at most 0.05, within the range of the training set.

    Args:
        features: (N, V) of the training set, whose least and largest value are the range.
    """
    if not features.is_floating_point() or not features.isfinite().all():
        raise ValueError(
            f"the range comes from finite real features of the training set, got {features.dtype}"
        )
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
    """The attacker adds items to the database, each within a bound of a photograph of theirs, to be found
    often.

    Args:
        like: the bound, by the name of an image threat.
    """
    return _on_database("db-insert", like, knowledge)


@register("threat", "db-perturb", modality="image")
def db_perturb(like: str = "img-linf-8", knowledge: Knowledge = "W2") -> Threat:
    """A declared share of the database items is changed within a bound, to be no longer found.

    Args:
        like: the bound, by the name of an image threat.
    """
    return _on_database("db-perturb", like, knowledge)


def _on_database(name: str, like: str, knowledge: Knowledge) -> Threat:
    made = named_threat(like, knowledge=knowledge)
    if set(made.balls) != {"image"} or made.side != "query":
        raise ValueError(
            f"{name} changes images of the database under the bound of an image threat, not {like!r}"
        )
    return Threat(made.balls, knowledge, "database", f"{name}-{made.name}")


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
    """The threat of a name: one of the catalogue, one with other numbers, or several joined by ``+``.

    Args:
        name: ``img-linf-8``, ``img-l2``, ``txt-feat-linf``, ``txt-bow-m``, ``txt-token-m``, ``joint``,
            ``db-insert``, ``db-perturb``; ``img-linf-4`` (of 255), ``img-l2-3.5``, ``img-l1-12``,
            ``txt-linf-0.05``, ``txt-bow-5``, ``txt-token-1``; ``img-linf-8+txt-linf-0.05``;
            ``db-insert-img-linf-4``. Every name that a threat gives itself is read, but for those of a range
            that only the data give.
        knowledge: W2, W1, W0, B2, B1 or T; that of the catalogue by default.
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
    given = {"knowledge": knowledge, "pixels": pixels, "features": features}
    if name in known:
        if name == "txt-feat-linf" and features is None:
            raise ValueError(
                "txt-feat-linf needs features=, the text vectors of the training set: they give its range"
            )
        threat: Threat = build(
            "threat", name, **{key: value for key, value in given.items() if value is not None}
        )
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
        if found := re.fullmatch(pattern, part):
            return modality, make(float(found[1]))
    raise KeyError(
        f"no threat is called {part!r}{nearest(part, known)} Other numbers: img-linf-4, img-l2-1, img-l1-12, txt-bow-5."
    )
