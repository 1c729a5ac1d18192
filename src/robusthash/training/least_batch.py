"""The smallest batch that a model trains on: batch normalisation needs two values of each channel."""

from __future__ import annotations

import copy

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from robusthash.data.base import RetrievalData
from robusthash.models.hasher import Hasher
from robusthash.training.recipe import Recipe


def least_batch(recipe: Recipe, data: RetrievalData, batch_size: int) -> int:
    """Items that a step needs: 2 where a layer cannot normalise over a batch of one item, else 1.

    A last batch of one then joins the one before it.

    Raises:
        ValueError: all batches are of one item, and 2 are needed.
    """
    if recipe.pool(0) is None and batch_size > 1 and len(data.train) % batch_size != 1:
        return 1
    if not any(
        isinstance(layer, _BatchNorm) for part in recipe.modules().values() for layer in part.modules()
    ):
        return 1
    hasher = copy.deepcopy(recipe.hasher).train()  # frozen parts stay in eval mode
    others = [part for name, part in recipe.modules().items() if name != "hasher"]
    layers = [layer for part in (hasher, *others) for layer in part.modules() if layer.training]
    flat = any(isinstance(layer, torch.nn.BatchNorm1d) for layer in layers)
    if not flat and _trains_on_one(hasher, data):
        return 1
    if min(batch_size, len(data.train)) < 2:
        raise ValueError(
            f"batches of one item (batch_size {batch_size}, {len(data.train)} training items) cannot be "
            "normalised over the batch, as a layer of this model does; take a batch_size of at least 2"
        )
    return 2


def _trains_on_one(hasher: Hasher, data: RetrievalData) -> bool:
    """Tell whether the hasher, in training mode, takes a batch of one item; no random state is used up."""
    one = data.train.batch(torch.zeros(1, dtype=torch.int64)).only(hasher.modalities).to(hasher.device)
    devices = [hasher.device] if hasher.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        try:
            hasher(one.inputs)
        except ValueError as error:
            return "more than 1 value per channel" not in str(error)
    return True
