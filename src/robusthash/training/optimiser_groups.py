"""Optimiser groups: the parameters that each name of ``training.optim`` covers, and which are frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
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
"""Parts of the hasher that may have settings of their own, by rank: a later rank takes from earlier ones.

``image`` and ``text`` are the encoder and the head of a modality; ``backbone`` the encoders, and ``head`` the
heads, of all modalities; ``image-backbone`` and so on are one of each; ``conv`` are the convolutions of the
encoders and their batch normalisation. The rest stays with ``hasher``: purifiers, centers, an outer loss's
nets.
"""

NAMES = tuple(name for rank in PARTS for name in rank)


@dataclass(frozen=True)
class Group:
    """The parameters that one step of a recipe updates, by their name in ``training.optim``."""

    shares: dict[str, list[nn.Parameter]]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for share in self.shares.values() for parameter in share]


def part(hasher: Hasher, name: str) -> list[nn.Parameter]:
    """The parameters that a name of ``NAMES`` covers, none where the hasher has no such part."""
    if name == "conv":
        layers = [m for m in hasher.encoders.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
        return [parameter for layer in layers for parameter in layer.parameters()]
    modality, _, half = name.partition("-") if name.startswith(MODALITIES) else ("", "", name)
    modalities = [modality] if modality else list(hasher.encoders)
    sides = {"backbone": [hasher.encoders], "head": [hasher.heads], "": [hasher.encoders, hasher.heads]}[half]
    modules = [side[key] for side in sides for key in modalities if key in side]
    return [parameter for module in modules for parameter in module.parameters()]


def divided(
    hasher: Hasher, groups: Mapping[str, list[nn.Parameter]], rates: Mapping[str, float]
) -> tuple[dict[str, Group], list[nn.Parameter]]:
    """The groups of a recipe with the hasher's parts apart, and the frozen parameters.

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
    known = [*groups, *(name for name in NAMES if BASE in groups and part(hasher, name))]
    for name in rates:
        # a run that starts from another inherits that one's settings of the hasher
        if name not in known and name != BASE:
            raise ValueError(unknown(name, known))
    result = {name: Group({name: parameters}) for name, parameters in groups.items() if parameters}
    frozen: list[nn.Parameter] = []
    if BASE in groups:
        shares = _base_shares(hasher, groups[BASE], [n for n in NAMES if n in rates and n not in groups])
        frozen = [p for name, share in shares.items() if rates[name] == 0 for p in share]
        result[BASE] = Group({name: share for name, share in shares.items() if share and rates[name] > 0})
        if not result[BASE].shares:
            raise ValueError("every part of the hasher is frozen (lr 0), so nothing would be trained")
    for name in result:
        if name != BASE and rates[name] == 0:
            raise ValueError(f"training.optim.{name}.lr is 0, which freezes only parts of the hasher")
    return result, frozen


def _base_shares(
    hasher: Hasher, parameters: list[nn.Parameter], parts: list[str]
) -> dict[str, list[nn.Parameter]]:
    """The base group divided among the parts that have settings."""
    owner = {id(parameter): BASE for parameter in parameters}
    for name in parts:
        owner |= {id(parameter): name for parameter in part(hasher, name) if id(parameter) in owner}
    shares = {key: [p for p in parameters if owner[id(p)] == key] for key in (BASE, *parts)}
    for key in parts:
        if not shares[key]:
            raise ValueError(f"training.optim.{key} changes nothing: other settings cover all its parameters")
    return shares


def unknown(name: str, known: list[str]) -> str:
    """Message that ``training.optim.name`` is the setting of no group, with the known ones."""
    return f"training.optim.{name} sets a group that this recipe does not have{nearest(name, known)}"


def unset(name: str) -> str:
    """Message that a group of the recipe has no settings."""
    return f"no optimiser settings for group {name!r}; add training.optim.{name}"


def check_shapes(optimiser: torch.optim.Optimizer) -> None:
    """Refuse a state of other shapes than the parameters, which torch finds out in the first step."""
    for parameter, state in optimiser.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.ndim and value.shape != parameter.shape:
                raise ValueError(f"{name} is {tuple(value.shape)}, the parameter {tuple(parameter.shape)}")
