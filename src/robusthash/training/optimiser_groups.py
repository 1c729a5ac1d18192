"""Optimiser groups: which parameters each name of ``training.optim`` covers, and which of them are frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from robusthash.core.registry import nearest
from robusthash.models.hasher import Hasher

BASE = "hasher"
"""The group that the parts below divide: the hasher with its purifiers, the objective and the outer loss."""

MODALITIES = ("image", "text")

PARTS: tuple[tuple[str, ...], ...] = (
    MODALITIES,
    ("backbone", "head"),
    tuple(f"{modality}-{half}" for modality in MODALITIES for half in ("backbone", "head")),
    ("conv",),
)
"""Parts of the hasher that may have settings of their own, by rank: a later rank takes parameters from
earlier ones.

``image`` and ``text`` are the encoder and the head of a modality; ``backbone`` the encoders, and ``head`` the
heads, of all modalities; ``image-backbone`` and so on are one of each; ``conv`` are the convolutions of the
encoders and their batch normalisation. What no part covers stays with ``hasher``: purifiers, an objective's
centers, an outer loss's nets.
"""

NAMES = tuple(name for rank in PARTS for name in rank)


@dataclass(frozen=True)
class Group:
    """What one step of a recipe updates: parameters by the settings that they have."""

    shares: dict[str, list[nn.Parameter]]  # by name in ``training.optim``, those that learn

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for share in self.shares.values() for parameter in share]


def part(hasher: Hasher, name: str) -> list[nn.Parameter]:
    """The parameters that a name of ``NAMES`` covers, none where the hasher has no such part."""
    if name == "conv":
        layers = [m for m in hasher.encoders.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
        return [parameter for layer in layers for parameter in layer.parameters()]
    modality, _, half = name.partition("-")
    wanted = [modality] if modality in MODALITIES else list(hasher.encoders)
    half = half or (modality if modality not in MODALITIES else "")
    sides = {"backbone": [hasher.encoders], "head": [hasher.heads], "": [hasher.encoders, hasher.heads]}[half]
    modules = [side[key] for side in sides for key in wanted if key in side]
    return [parameter for module in modules for parameter in module.parameters()]


def divided(
    hasher: Hasher, groups: Mapping[str, list[nn.Parameter]], rates: Mapping[str, float]
) -> tuple[dict[str, Group], list[nn.Parameter]]:
    """The groups of a recipe with the hasher's parts apart, and what is frozen.

    Args:
        groups: of the recipe; one without parameters needs no settings, and may have them.
        rates: learning rate of each name in ``training.optim``; 0 freezes a part of the hasher, or what no
            part covers.

    Raises:
        KeyError: a group of the recipe without settings.
        ValueError: settings that nothing would use, or nothing that learns.
    """
    for name, parameters in groups.items():
        if parameters and name not in rates:
            raise KeyError(unset(name))
    parts = [name for name in NAMES if name in rates and name not in groups]
    known = [*groups, *(name for name in NAMES if BASE in groups and part(hasher, name))]
    for name in rates:
        # a run that starts from another inherits that one's settings of the hasher
        if name not in known and name != BASE:
            raise ValueError(unknown(name, known))
    owner = {id(parameter): BASE for parameter in groups.get(BASE, [])}
    for name in parts:
        owner |= {id(parameter): name for parameter in part(hasher, name) if id(parameter) in owner}
    made: dict[str, Group] = {}
    frozen: list[nn.Parameter] = []
    for name, parameters in groups.items():
        if name != BASE:
            made |= {name: Group({name: parameters})} if parameters else {}
            continue
        shares = {key: [p for p in parameters if owner[id(p)] == key] for key in (BASE, *parts)}
        for key in parts:
            if not shares[key]:
                raise ValueError(
                    f"training.optim.{key} changes nothing: other settings cover all its parameters"
                )
        frozen = [p for key, share in shares.items() if rates[key] == 0 for p in share]
        made[name] = Group({key: share for key, share in shares.items() if share and rates[key] > 0})
        if not made[name].shares:
            raise ValueError("every part of the hasher is frozen (lr 0), so nothing would be trained")
    for name in made:
        if name != BASE and rates[name] == 0:
            raise ValueError(
                f"training.optim.{name}.lr is 0, which freezes parts of the hasher and no other group"
            )
    return made, frozen


def unknown(name: str, known: list[str]) -> str:
    """That ``training.optim.name`` is the setting of no group, and what there is."""
    return f"training.optim.{name} sets a group that this recipe does not have{nearest(name, known)}"


def unset(name: str) -> str:
    """That a group of the recipe has no settings."""
    return f"no optimiser settings for group {name!r}; add training.optim.{name}"
