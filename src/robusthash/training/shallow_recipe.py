"""The recipe ``shallow``: heads solved in closed form on features of fixed encoders, or on arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robusthash.core.registry import build, register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, LossTerms
from robusthash.data.base import RetrievalData, Split, batches
from robusthash.data.label_cells import Labels, read_labels
from robusthash.models.hasher import Hasher, frozen
from robusthash.models.heads import KernelHead, LinearHead
from robusthash.models.image_encoders import UnchangedValues
from robusthash.objectives.base import HashObjective
from robusthash.objectives.shallow.base import Projection, ShallowMethod, check_same_items, solve
from robusthash.training.recipe import Moment, Recipe, check_modalities, train_facts

Component = str | Mapping[str, Any]


@register("recipe", "shallow", state="measured")
class ShallowRecipe(Recipe):
    """Solve the heads of a hasher by a shallow method; its encoders stay as they are.

    The features are those of the encoders: the values themselves (``features``), a pretrained net, or a
    run's (``training.init_from``, whose head is replaced). The head is ``linear``, or ``kernel`` with
    anchors drawn from the training items. All happens in the first epoch, so set ``epochs: 1``; more do
    nothing.

    Args:
        hasher: with heads ``linear`` or ``kernel``.
        objective: not trained; it is what an attack on the training objective ascends, where items have
            labels.
        method: a name of kind ``shallow``, or its settings.
    """

    groups = ("hasher",)
    learns_from_labels = False  # the objective is not trained, and ``solve`` looks at what its method needs
    data_parallel = False
    new_heads = True

    def __init__(self, hasher: Hasher, objective: HashObjective, method: Component) -> None:
        self.hasher = hasher
        self.objective = objective
        self.method: ShallowMethod = build("shallow", method)
        _linear_heads(hasher)
        self._data: RetrievalData
        self._draws: Draws
        self._batch_size = 0

    def modules(self) -> dict[str, nn.Module]:
        return {"hasher": self.hasher, "objective": self.objective}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"hasher": list(self.hasher.parameters())}

    def setup(self, data: RetrievalData, seed: int, batch_size: int) -> None:
        check_modalities(self.hasher, data)
        self._data, self._draws, self._batch_size = data, Draws(seed, ("shallow",)), batch_size
        if data.train.unlabelled() < len(data.train):
            self.objective.to(self.hasher.device).setup(train_facts(data.train, self.hasher, seed))
            self.objective.to(self.hasher.device)

    def pool(self, epoch: int) -> Tensor:
        """One item: no step is taken on any."""
        return torch.zeros(1, dtype=torch.int64)

    def step(self, batch: Batch, moment: Moment) -> Iterator[tuple[str, LossTerms]]:
        if moment.epoch == 0:
            features = encoded_features(self.hasher, self._data.train, max(self._batch_size, 64))
            solve_heads(self.hasher, self.method, features, self._data.train.labels, self._draws)
        yield from ()


def _linear_heads(hasher: Hasher) -> dict[str, LinearHead]:
    for head in hasher.heads.values():
        if not isinstance(head, LinearHead):
            raise ValueError(
                f"shallow hashing solves the heads 'linear' and 'kernel', not {type(head).__name__}"
            )
    return {name: head for name, head in hasher.heads.items() if isinstance(head, LinearHead)}


@torch.no_grad()
def encoded_features(hasher: Hasher, split: Split, batch_size: int) -> dict[str, Tensor]:
    """(N, D) features of each modality, the input of the heads, in eval mode."""
    rows: dict[str, list[Tensor]] = {name: [] for name in hasher.modalities}
    with frozen(hasher):
        for batch in batches(split, batch_size, modalities=hasher.modalities):
            for name, values in batch.to(hasher.device).inputs.items():
                rows[name].append(hasher.encoders[name](values)[0].cpu())
    return {name: torch.cat(parts) for name, parts in rows.items()}


@torch.no_grad()
def solve_heads(
    hasher: Hasher, method: ShallowMethod, features: Mapping[str, Tensor], labels: Tensor | None, draws: Draws
) -> None:
    """Place anchors where heads have them, solve the method on what the linear layers get, and set those.

    Raises:
        ValueError: fewer items than anchors; and whatever ``solve`` refuses.
    """
    heads, inputs = _linear_heads(hasher), {}
    for name, head in heads.items():
        rows = features[name].to(hasher.device)
        if isinstance(head, KernelHead) and bool(rows.isfinite().all()):  # else ``solve`` names the items
            count, items = len(head.anchors), len(rows)
            if count > items:
                most = f"set hasher.head.anchors to at most {items}"
                raise ValueError(
                    f"{count} anchors are drawn from the training items, and there are {items}; {most}"
                )
            head.place(rows[torch.randperm(items, generator=draws.within("anchors").generator())[:count]])
            head.settle(rows)
        inputs[name] = head.mapped(rows).cpu()
    for name, projection in solve(method, inputs, labels, hasher.bits, draws).items():
        _set_linear(heads[name], projection, inputs[name])


def _set_linear(head: LinearHead, projection: Projection, features: Tensor) -> None:
    head.linear.weight.copy_(projection.weights.T)
    head.linear.bias.copy_(projection.offset)
    head.size.fill_(max(float(projection(features.double()).abs().mean()), 1e-12))


def _feature_rows(name: str, values: np.ndarray | Tensor) -> Tensor:
    """(N, D) float32 of one modality."""
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} features are numbers, got an array of {array.dtype}; give one of floats")
    if array.ndim != 2 or array.shape[1] < 1:
        raise ValueError(f"{name} features are (N, D), an item a row, got {array.shape}")
    return torch.from_numpy(array.astype(np.float32))


def shallow_hasher(
    method: Component,
    features: Mapping[str, np.ndarray | Tensor],
    labels: Labels | None = None,
    bits: int = 32,
    anchors: int = 0,
    seed: int = 0,
) -> Hasher:
    """A hasher of feature vectors, solved on arrays as the recipe ``shallow`` solves it on a data set.

    Args:
        method: a name of kind ``shallow``, or its settings.
        features: by modality (``image``, ``text``), (N, D) of the same N training items.
        labels: of these items, in the forms of ``RetrievalData.from_arrays``.
        bits: K.
        anchors: of the head ``kernel``; 0 takes the head ``linear``.

    Raises:
        ValueError: another shape, labels that do not fit, whatever the method refuses.

    Example:
        >>> hasher = shallow_hasher("itq", {"image": vectors}, bits=16)
        >>> hasher({"image": torch.from_numpy(others)})["image"].logits >= 0
    """
    for option, value, least in (("bits", bits, 1), ("anchors", anchors, 0)):
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
            raise ValueError(f"{option} must be a whole number from {least}, got {value!r}")
    if not isinstance(features, Mapping):
        kind = type(features).__name__
        raise ValueError(f"features are (N, D) arrays by modality, got {kind}; give {{'image': vectors}}")
    if not features:
        raise ValueError("features holds nothing; give (N, D) arrays by modality, {'image': vectors}")
    rows = {name: _feature_rows(name, values) for name, values in features.items()}
    check_same_items(rows)
    known = None if labels is None else read_labels(labels, len(next(iter(rows.values()))))[0]
    torch.manual_seed(seed)
    encoders = {name: UnchangedValues(values.shape[1], unit=False) for name, values in rows.items()}
    widths = {name: encoder.width for name, encoder in encoders.items()}
    heads = {n: KernelHead(w, bits, anchors) if anchors else LinearHead(w, bits) for n, w in widths.items()}
    hasher = Hasher(encoders, heads)
    solve_heads(hasher, build("shallow", method), rows, known, Draws(seed, ("shallow",)))
    return hasher.eval()
