"""Frequencies that a hasher searches by: RankingSHAP over the bands of the block DCT, and Shapley values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from robusthash.core.hamming import topk
from robusthash.core.runtime import Draws
from robusthash.evaluation.context import EvaluationContext
from robusthash.models.block_dct import BlockDCT
from robusthash.models.encoding import encode_signs


def shapley(
    value: Callable[[Tensor], Tensor | float],
    players: int,
    permutations: int = 64,
    draws: Draws = Draws(0),
    many: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Shapley value of each player with its standard error.

    A permutation adds the players one by one and credits each with the change of ``value``; its reverse is
    taken with it, which cancels the interaction of pairs exactly (two players: exact). The credits of every
    permutation telescope, so the values sum to value(all) - value(none) to rounding, and a player that
    changes nothing gets 0 exactly. Castro, Gomez and Tejada, "Polynomial calculation of the Shapley value
    based on sampling", 2009.

    Args:
        value: (players,) bool mask of the coalition -> a number, or a tensor of one number per image. It must
            be deterministic.
        players: number of players, at least 1.
        permutations: even, at least 4; each costs ``players`` - 1 evaluations.
        many: ``value`` takes (S, players) masks at once and gives (S, *shape).
        progress: called with (permutations done, permutations) after each pair.

    Returns:
        (players, *shape) values and standard errors, float64; the errors are those of the mean over pairs.

    Example:
        >>> worth = {(): 0.0, (0,): 1.0, (1,): 0.0, (0, 1): 3.0}
        >>> credit, error = shapley(lambda mask: worth[tuple(mask.nonzero().flatten().tolist())], players=2)
        >>> credit.tolist(), error.tolist()
        ([2.0, 1.0], [0.0, 0.0])
    """
    if players < 1:
        raise ValueError(f"players must be at least 1, got {players}")
    if permutations < 4 or permutations % 2:
        raise ValueError(f"permutations must be even and at least 4 (two antithetic pairs): {permutations}")

    def worth(masks: Tensor) -> Tensor:
        values = value(masks) if many else torch.stack([torch.as_tensor(value(mask)) for mask in masks])
        return torch.as_tensor(values, dtype=torch.float64).cpu()

    ends = worth(torch.stack([torch.zeros(players, dtype=torch.bool), torch.ones(players, dtype=torch.bool)]))
    if not torch.isfinite(ends).all():
        raise ValueError("the value of the empty or of the full coalition is not finite")
    generator = draws.within("shapley").generator()
    pairs = []
    for done in range(2, permutations + 1, 2):
        order = torch.randperm(players, generator=generator)
        pairs.append((_credits(worth, order, ends) + _credits(worth, order.flip(0), ends)) / 2)
        if progress is not None:
            progress(done, permutations)
    credits = torch.stack(pairs)
    return credits.mean(0), credits.std(0) / len(pairs) ** 0.5


def _credits(worth: Callable[[Tensor], Tensor], order: Tensor, ends: Tensor) -> Tensor:
    """(players, *shape) change of value as each player joins in ``order``; ``ends`` is that of none and of
    all.
    """
    players = len(order)
    joined = torch.ones(players, players, dtype=torch.bool).tril()[:-1]  # (steps, places)
    masks = torch.zeros_like(joined)
    masks[:, order] = joined
    between = worth(masks) if players > 1 else ends[:0]
    steps = torch.cat([ends[:1], between, ends[1:]]).diff(dim=0)
    credits = torch.empty_like(steps)
    credits[order] = steps
    return credits


Worth = Literal["tau", "ap"]


@dataclass(frozen=True, eq=False)
class BandAttribution:
    """Shapley value of every band, u down and v across, with errors; n * n bands of n x n blocks, N images.

    ``mean`` averages the images for which the worth is defined; ``values`` of the others are 0, as is their
    worth.
    """

    values: Tensor  # (N, n, n) float64, by image
    errors: Tensor  # (N, n, n) standard errors of sampling permutations
    mean: Tensor  # (n, n) over the defined images
    mean_error: Tensor  # (n, n) standard error of ``mean``: of permutations and of images together
    none: Tensor  # (N,) worth with every band at its baseline
    everything: Tensor  # (N,) worth with every band
    defined: Tensor  # (N,) bool
    worth: Worth
    top: int
    permutations: int
    seed: int
    chosen: str = ""  # how the images were chosen; "" of files that do not say it

    def arrays(self) -> dict[str, np.ndarray]:
        """Plain arrays for a file."""
        return {f.name: np.asarray(getattr(self, f.name)) for f in fields(self)}

    @staticmethod
    def from_arrays(arrays: dict[str, np.ndarray]) -> BandAttribution:
        """The inverse of ``arrays``."""
        arrays = {"chosen": np.asarray(""), **arrays}
        plain = {f.name: arrays[f.name] for f in fields(BandAttribution)}
        values: dict[str, Any] = {n: torch.from_numpy(v) if v.ndim else v.item() for n, v in plain.items()}
        return BandAttribution(**values)

    def by_order(self) -> tuple[Tensor, Tensor]:
        """Share of all attribution in the bands with u + v <= 0, 1, ..., 2n - 2, and its standard error.

        A ratio of means over the defined images; its error, over images, is that of the linearised ratio.
        """
        n = len(self.mean)
        order = torch.arange(n)[:, None] + torch.arange(n)
        used = self.values[self.defined]
        by_limit = [(used * (order <= limit)).sum((1, 2)) for limit in range(2 * n - 1)]
        reached = torch.stack(by_limit)  # (2n - 1, images)
        whole = reached[-1]
        share = reached.mean(1) / whole.mean()
        residual = (reached - share[:, None] * whole) / whole.mean()
        error = residual.std(1) / len(whole) ** 0.5 if len(whole) > 1 else torch.zeros_like(share)
        return share, error


def attribute_bands(
    context: EvaluationContext,
    *,
    worth: Worth = "tau",
    permutations: int = 64,
    seed: int = 0,
    block: int = 8,
    top: int = 100,
    batch_size: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> BandAttribution:
    """Credit every DCT band of the queries of ``context`` with its share in the search.

    A coalition of bands is an image that keeps their coefficients in every block and channel; the others are
    0, but the block means (DC) become the mean of the image's blocks, so that the empty coalition is a plain
    area of the image's own colour. The worth of a coalition is

    - ``tau``: Kendall's tau-b between the distances of its code and those of the clean image's code to the
      clean top ``top``. Where these all lie at one distance tau-b is undefined for every coalition: such an
      image is worth 0 throughout, marked in ``defined`` and left out of the mean. A coalition for which all
      tie agrees with nothing: 0.
    - ``ap``: expected AP over the whole database.

    Credits of an image sum to worth(all) - worth(none) up to rounding, and a band that the code does not see
    gets 0 exactly. After Heuss, de Rijke and Anand, "RankingSHAP", 2024.

    Differs: images of coalitions are not clipped to [0, 1], for clipping would give a band a part in the
    others.

    Args:
        context: with image queries; all of them are taken.
        permutations: even, at least 4; each costs block^2 - 1 passes an image.
        seed: of the permutations, which all images share.
        batch_size: coalitions encoded at a time.

    Raises:
        ValueError: queries that are no images or do not divide into blocks; a query without a relevant item
            (``ap``); no query for which tau-b is defined.
    """
    images = _images(context, worth)
    coalitions = _Coalitions(context, images, block, worth, top, batch_size)
    bands, defined = block * block, coalitions.measure.defined
    ends = coalitions(torch.tensor([[False], [True]]).expand(2, bands))
    draws = Draws(seed, ("bands",))
    credits, errors = shapley(coalitions, bands, permutations, draws, many=True, progress=progress)
    values = credits[:, :-1].T
    used, over_images = values[defined], torch.zeros(bands, dtype=torch.float64)
    if len(used) > 1:
        over_images = used.std(0) / len(used) ** 0.5
    spread = (errors[:, -1].square() + over_images.square()).sqrt()
    shape = (-1, block, block)
    return BandAttribution(
        values=values.reshape(shape).clone(),
        errors=errors[:, :-1].T.reshape(shape).clone(),
        mean=credits[:, -1].view(block, block).clone(),
        mean_error=spread.view(block, block).clone(),
        none=ends[0, :-1].clone(),
        everything=ends[1, :-1].clone(),
        defined=defined,
        worth=worth,
        top=top,
        permutations=permutations,
        seed=seed,
        chosen=context.chosen,
    )


def _images(context: EvaluationContext, worth: str) -> Tensor:
    """All queries of the context, on the victim's device."""
    if context.direction[0] != "image":
        raise ValueError(f"frequency bands are of images, and these queries are {context.direction[0]}s")
    if worth not in ("tau", "ap"):
        raise ValueError(f"worth must be 'tau' or 'ap', got {worth!r}")
    images = context.queries.batch(torch.arange(len(context.queries))).inputs["image"]
    if images.ndim != 4:
        raise ValueError(f"frequency bands need pixels, not features of shape {tuple(images.shape)}")
    return images.to(context.victim.device)


class _Coalitions:
    """(S, n * n) masks -> (S, N + 1) worth of every image, and last the mean over the defined ones.

    The mean is a column of its own, for its own error.
    """

    def __init__(
        self,
        context: EvaluationContext,
        images: Tensor,
        block: int,
        worth: Worth,
        top: int,
        batch_size: int,
    ) -> None:
        self._victim, self._block, self._images = context.victim, block, images
        self._dct = BlockDCT(block).to(images.device)
        self._present = self._dct(images)
        self._absent = torch.zeros_like(self._present)
        self._absent[..., 0, 0] = self._present[..., 0, 0].mean(1, keepdim=True)
        self._together = max(1, batch_size // len(images))
        self.measure = _Agreement(context, top) if worth == "tau" else _Precision(context)

    def __call__(self, masks: Tensor) -> Tensor:
        parts, count = [], len(self._images)
        height, width = self._images.shape[-2:]
        masks = masks.view(-1, 1, 1, 1, self._block, self._block).to(self._images.device)
        for some in masks.split(self._together):
            coefficients = torch.where(some, self._present, self._absent).flatten(0, 1)
            signs = encode_signs(self._victim, "image", self._dct.inverse(coefficients, height, width))
            parts.append(self.measure(signs.view(len(some), count, -1)))
        worth = torch.cat(parts).to(torch.float64)
        return torch.cat([worth, worth[:, self.measure.defined].mean(1, keepdim=True)], 1)


class _Agreement:
    """(S, N, K) signs -> (S, N) tau-b with the clean ranking of the clean top."""

    def __init__(self, context: EvaluationContext, top: int) -> None:
        ids, distances = topk(
            context.query_codes.packed, context.codes.packed, min(top, len(context.database))
        )
        self.defined = distances[:, 0] < distances[:, -1]
        if not self.defined.any():
            raise ValueError(
                f"the clean top {top} of every query lies at one distance, so that no ranking is left to "
                "agree with; use the worth 'ap' or a larger top"
            )
        self.nearest = context.codes.signs()[ids].float()  # (N, top, K)
        self.clean = distances.float()

    def __call__(self, signs: Tensor) -> Tensor:
        distances = (signs.shape[-1] - torch.einsum("snk,ntk->snt", signs.float(), self.nearest)) / 2
        return tau_b(distances, self.clean.expand_as(distances))


class _Precision:
    """(S, N, K) signs -> (S, N) expected AP."""

    def __init__(self, context: EvaluationContext) -> None:
        relevant = (context.query_labels.float() @ context.database_labels.float().T > 0).any(1)
        if not relevant.all():
            first = int(torch.nonzero(~relevant)[0])
            raise ValueError(f"query {first} has no relevant item, so its AP is undefined; use 'tau'")
        self.defined = relevant
        self.context = context

    def __call__(self, signs: Tensor) -> Tensor:
        labels = self.context.query_labels.repeat(len(signs), 1)
        return self.context.select(labels, +1)(signs.flatten(0, 1)).view(signs.shape[:2])


def tau_b(first: Tensor, second: Tensor) -> Tensor:
    """Kendall's tau-b along the last axis, ties and all; 0 where either side is constant.

    ``scipy.stats.kendalltau`` takes one pair at a time; this takes all of a batch at once.

    Args:
        first, second: (..., n).

    Returns:
        (...) float64.
    """
    if first.shape != second.shape or first.shape[-1] < 2:
        raise ValueError(f"tau-b compares rankings of at least 2 items, got {first.shape} and {second.shape}")
    rows, columns = torch.triu_indices(first.shape[-1], first.shape[-1], offset=1)
    left = (first[..., rows] - first[..., columns]).sign()
    right = (second[..., rows] - second[..., columns]).sign()
    agreement = (left * right).sum(-1, dtype=torch.float64)
    sizes = left.abs().sum(-1, dtype=torch.float64) * right.abs().sum(-1, dtype=torch.float64)
    return torch.where(sizes > 0, agreement / sizes.clamp_min(1).sqrt(), 0.0)
