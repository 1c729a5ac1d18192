"""Interface of shallow hashing methods, what they are given, and the checks before they solve."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robusthash.core.labels import relevant
from robusthash.core.registry import name_of
from robusthash.core.runtime import Draws


@dataclass(frozen=True)
class Projection:
    """Out-of-sample codes of one modality: bit k is +1 where (x W + b)_k >= 0."""

    weights: Tensor  # (D, K) W
    offset: Tensor  # (K,) b

    def __call__(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, K) logits."""
        return features @ self.weights + self.offset


@dataclass(frozen=True)
class TrainingFeatures:
    """Features of the training items as a method gets them: float64, centred, of mean variance 1."""

    values: Mapping[str, Tensor]  # by modality, (N, D)
    labels: Tensor | None  # (N, C) multi-hot, float64
    bits: int
    draws: Draws

    @property
    def items(self) -> int:
        return len(next(iter(self.values.values())))

    @property
    def known_labels(self) -> Tensor:
        """Labels of a supervised method, which ``solve`` has made sure of."""
        assert self.labels is not None
        return self.labels

    def similar(self) -> Tensor:
        """(N, N) float64, 1 for items that share a label, else 0."""
        return relevant(self.known_labels, self.known_labels).double()


class ShallowMethod(ABC):
    """Interface: ``fit`` maps training features to one projection a modality.

    ``modalities`` is how many it hashes together: one, or image and text. ``pairwise`` methods learn from
    which items share a label, and need pairs that do and pairs that do not.
    """

    modalities: ClassVar[int] = 1
    supervised: ClassVar[bool] = True
    pairwise: ClassVar[bool] = False

    @abstractmethod
    def fit(self, known: TrainingFeatures) -> dict[str, Projection]:
        """Projections of the centred features, by modality."""


def ridge(features: Tensor, targets: Tensor, gamma: float) -> Projection:
    """Least squares of (N, K) targets on centred features, gamma times the squared weights added."""
    eye = torch.eye(features.shape[1], dtype=features.dtype)
    mean = targets.mean(0)
    weights = torch.linalg.solve(features.T @ features + gamma * eye, features.T @ (targets - mean))
    return Projection(weights, mean)


def random_signs(known: TrainingFeatures, *scope: object) -> Tensor:
    """(N, K) fair coins in {-1, +1}."""
    generator = known.draws.within(*scope).generator()
    return torch.randint(0, 2, (known.items, known.bits), generator=generator).double() * 2.0 - 1.0


def solve(
    method: ShallowMethod, features: Mapping[str, Tensor], labels: Tensor | None, bits: int, draws: Draws
) -> dict[str, Projection]:
    """Fit a method to features; the projections are for features as they came.

    Args:
        features: by modality, (N, D) real numbers of the same N items.
        labels: (N, C) multi-hot; None is enough where the method is not supervised.
        bits: K.
        draws: of random starts and samples.

    Raises: ValueError: values that are NaN or infinite, another number of modalities than the method's,
    fewer items than bits, no labels for a supervised method, or labels by which no two items differ; a result
    by which all items have one code.
    """
    name = name_of(method)
    _check_modalities(name, method.modalities, list(features))
    values = {modality: rows.detach().cpu().double() for modality, rows in features.items()}
    for modality, rows in values.items():
        broken = torch.nonzero(~rows.isfinite().all(1)).flatten()
        if len(broken):
            many = f"{len(broken)} of {len(rows)} training items, the first at {int(broken[0])}"
            raise ValueError(f"{modality} features hold NaN or infinite values in {many}")
        if len(rows) < max(2, bits):
            raise ValueError(
                f"{bits} bits need at least {max(2, bits)} training items, and there are {len(rows)}; "
                "take fewer bits (hasher.bits), or more items"
            )
    check_same_items(values)
    if method.supervised:
        _check_labels(name, labels, method.pairwise)
    means = {modality: rows.mean(0) for modality, rows in values.items()}
    centred = {modality: rows - means[modality] for modality, rows in values.items()}
    scales = {modality: float(rows.square().mean().sqrt()) for modality, rows in centred.items()}
    for modality, scale in scales.items():
        if scale == 0:
            raise ValueError(
                f"all training items have the same {modality} features, so no bit can tell them apart"
            )
    scaled = {modality: rows / scales[modality] for modality, rows in centred.items()}
    known = TrainingFeatures(scaled, None if labels is None else labels.cpu().double(), bits, draws)
    functions = method.fit(known)
    result = {}
    for modality, projection in functions.items():
        signs = projection(scaled[modality]) >= 0
        if bool((signs == signs[0]).all()):
            raise ValueError(
                f"{name} gives all {len(signs)} training items one {modality} code of {bits} bits, which "
                "finds nothing; take more bits, other labels or another method"
            )
        weights = projection.weights / scales[modality]
        result[modality] = Projection(weights, projection.offset - means[modality] @ weights)
    return result


def check_same_items(features: Mapping[str, Tensor]) -> None:
    """Refuse features of modalities that differ in their number of rows."""
    if len({len(rows) for rows in features.values()}) > 1:
        counts = " and ".join(f"{len(rows)} of {modality}" for modality, rows in features.items())
        raise ValueError(f"there are features {counts}; give each item a row in every modality")


def _check_modalities(name: str, expected: int, modalities: list[str]) -> None:
    if expected == 2 and len(modalities) != 2:
        raise ValueError(
            f"{name} hashes images and texts together, and only {modalities[0]} features are there; set "
            "hasher.image and hasher.text, and texts for the data"
        )
    if expected == 1 and len(modalities) != 1:
        raise ValueError(
            f"{name} hashes one modality, and here are {' and '.join(modalities)}; leave one encoder out"
        )


def _check_labels(name: str, labels: Tensor | None, pairwise: bool) -> None:
    if labels is None:
        raise ValueError(f"{name} is supervised, and the training items have no labels; itq, cvh need none")
    if len(broken := torch.nonzero(~labels.isfinite().all(1)).flatten()):
        many = f"{len(broken)} of {len(labels)} training items, the first at {int(broken[0])}"
        raise ValueError(f"labels hold NaN or infinite values in {many}")
    if not (labels > 0).any():
        raise ValueError(f"{name} is supervised, and no training item has a label; itq, cvh need none")
    kinds = torch.unique((labels > 0).float(), dim=0)
    if len(kinds) < 2:
        raise ValueError(f"{name} learns from labels, and all training items have the same")
    if pairwise and bool(relevant(kinds, kinds).all()):
        raise ValueError(f"{name} learns from similar and dissimilar items, and every two here share a label")
