"""Budgets of the command line: ``--threat``, ``--eps`` and ``--norm`` as one threat by name."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch

from robusthash.apps.experiment.config import Component, settings_of, value_of
from robusthash.apps.experiment.model_stages import image_size
from robusthash.apps.experiment.run_directory import Run
from robusthash.attacks import named_threat
from robusthash.attacks.threat_model import EPS, Edits, Knowledge, Swaps, Threat
from robusthash.core.registry import catalogue, check
from robusthash.data.base import RetrievalData


def threat_name(
    threat: str | None = None, eps: str | None = None, norm: str | None = None, modality: str = "image"
) -> str:
    """The threat that the three options name together; the usual one of the modality by default.

    Args:
        threat: a name; ``db-insert`` and ``db-perturb`` take their bound from the other two, if given.
        eps: size of the ball in units of the range: ``8/255``.
        norm: ``linf`` by default. Without ``eps`` its size is the customary one: 8/255 for images, 0.05 for
            text vectors, and in ``l2`` that of the size of the images.

    Raises:
        ValueError: an ``eps`` that is no size, a norm without a customary size, or two budgets.

    Example:
        >>> threat_name(eps="4/255"), threat_name(norm="l2"), threat_name(modality="text")
        ('img-linf-4', 'img-l2', 'txt-linf-0.05')
    """
    if threat is not None and eps is None and norm is None:
        return threat
    on_database, norm = threat in ("db-insert", "db-perturb"), norm or "linf"
    name = f"{ {'image': 'img', 'text': 'txt'}[modality] }-{norm}"
    if eps is not None or norm == "linf":
        size = EPS[modality] if eps is None else size_of(eps, "--eps")
        if not size > 0:
            raise ValueError(f"--eps {eps} leaves nothing to attack; give a size above 0, such as 8/255")
        if size > 1 and norm == "linf":
            raise ValueError(f"--eps {eps} is beyond the range of 0 to 1; write 8/255, not 8")
        levels = size * 255 if name == "img-linf" else size
        name += f"-{levels:.10f}".rstrip("0").rstrip(".")
    elif name != "img-l2" or on_database:
        raise ValueError(f"--norm {norm} has no customary eps here; give eps, as --norm {norm} --eps 12")
    if on_database:
        return f"{threat}-{name}"
    if threat not in (None, name):
        raise ValueError(
            f"--threat {threat} is one budget and --eps, --norm another ({name}); give one of them"
        )
    return name


def size_of(text: str, option: str) -> float:
    """The number that an option gives as 8/255 or 0.5; a ValueError where it is none."""
    size = value_of(text)
    if isinstance(size, bool) or not isinstance(size, int | float):
        raise ValueError(f"{option} takes a number such as 8/255, got {text!r}")
    return size


def query_modality(run: Run, direction: str | None = None) -> str:
    """Modality of the queries of a direction, by default of the run's first one."""
    first = direction or next(iter(run.config.evaluation.directions or ()), "")
    return {"I": "image", "T": "text"}.get(first[:1]) or run.card()["modalities"][0]


def threat_on_data(name: str, data: RetrievalData, knowledge: Knowledge | None = None) -> Threat:
    """A threat by name, with what it takes from the data: the size of images, the range of text vectors.

    Raises:
        ValueError: ``img-l2`` on features, which have no customary size.
    """
    pixels, texts = image_size(data), None
    if name == "img-l2" and pixels is None:
        raise ValueError(
            "img-l2 grows with the size of images, and the data are features: name img-l2-NUMBER"
        )
    if name == "txt-feat-linf":
        texts = data.train.batch(torch.arange(len(data.train))).inputs.get("text")
    return named_threat(name, knowledge, pixels=pixels, features=texts)


def attack_under(
    attack: Component, threat: str | None = None, eps: str | None = None, norm: str | None = None
) -> Component:
    """Settings of an attack (a mapping, YAML or a name), under the budget of the options where one is given.

    Raises:
        ValueError: settings with a budget of nothing, or of their own where one is given; a threat of several
            modalities or to the database.
    """
    settings = value_of(attack) if isinstance(attack, str) else attack
    card, values = check("attack", settings)
    for key in ("eps", "edits", "swaps"):
        if values.get(key) == 0:
            raise ValueError(f"{key} 0 of {attack!r} leaves nothing to attack; give a size above 0")
    if threat is None and eps is None and norm is None:
        return settings
    options: dict[str, Any] = {"name": settings_of(settings)["name"], **values}
    name = threat_name(threat, eps, norm, options.get("modality", "image"))
    if doubled := [key for key in ("eps", "norm", "edits", "swaps") if key in options]:
        raise ValueError(
            f"the attack {attack!r} has {doubled[0]!r}, and {name} is asked for; give one of them"
        )
    budget = named_threat(name)
    if budget.side != "query":
        raise ValueError(f"{name} changes the database, {attack!r} queries; robusthash poison measures it")
    ((modality, ball), *others) = budget.balls.items()
    if others:
        raise ValueError(
            f"{name} is of several modalities; write the budget into the attack: {{name: ..., eps: ...}}"
        )
    if isinstance(ball, Edits | Swaps):
        key, maker = ("edits", "text-edits") if isinstance(ball, Edits) else ("swaps", "token-swaps")
        if key not in signature(card.make).parameters:
            raise ValueError(
                f"{name} is a budget of {key} of words, which {maker} makes and {card.name} does not: "
                f"take --attack {maker}"
            )
        return {**options, key: ball.count}
    if "eps" not in signature(card.make).parameters:
        raise ValueError(f"the attack {card.name!r} takes no eps, so it cannot be run under {name}")
    if ball.norm != "linf" and "norm" not in signature(card.make).parameters:
        normed = [c.name for c in catalogue("attack") if "norm" in signature(c.make).parameters]
        raise ValueError(
            f"{name}: the attack {card.name!r} searches in linf alone; with a norm: {', '.join(normed)}"
        )
    options |= {} if modality == "image" else {"modality": modality}
    return {**options, "eps": ball.eps, **({} if ball.norm == "linf" else {"norm": ball.norm})}
