"""Base of unsupervised image-text objectives: similarity from fixed features, and no use of labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from robusthash.core.labels import relevant
from robusthash.core.registry import build, name_of
from robusthash.core.types import Batch, HashOutput, Outputs
from robusthash.data.base import Split, batches
from robusthash.models.hasher import frozen
from robusthash.objectives.base import CodeMemory, HashObjective, TrainFacts
from robusthash.objectives.dadh import unit

Features = str | Mapping[str, Any]
"""``net`` (the hasher's own encoder before its first step), ``raw`` (the input), or an encoder."""

PRETRAINED: dict[str, dict[str, Any]] = {
    "efficientnet-lite0": {"name": "efficientnet-lite0", "weights": "package"},
    "minilm": {"name": "transformer", "weights": "minilm", "pooling": "mean"},
}
"""Encoders by a short name, with the weights of the extra ``weights``."""

LEAST_SIDE = 96
"""Smaller images are enlarged to it for a pretrained net: at 48 px its last map would be 2 x 2."""


class Unsupervised(HashObjective):
    """Base: ``forward`` sees neither the batch's labels nor the memory's, and items need none.

    An attack on the objective (``pgd``) has labels of its own: ``similarity`` is mean_j (cos(h, U_j) -
    S'_ij)^2 with S' = +1 for references that share a label with the item and -1 for others. Training never
    calls it.
    """

    supervised: ClassVar[bool] = False

    def setup(self, facts: TrainFacts) -> None:
        if set(facts.widths) != {"image", "text"}:
            has = " and ".join(facts.widths) or "nothing"
            raise ValueError(
                f"{name_of(self)} learns from pairs of an image and its text, and this hasher encodes "
                f"{has} alone; set hasher.image and hasher.text, and take data with both"
            )

    def similarity(self, output: HashOutput, labels: Tensor, codes: Tensor, code_labels: Tensor) -> Tensor:
        target = 2.0 * relevant(labels, code_labels).float() - 1.0
        return (unit(output.code) @ unit(codes).T - target).square().mean(1)

    def slope(self) -> float:
        """Slope a of the tanh(a u) that is trained now, 1 by default; it never falls."""
        return 1.0

    def directions(self, outputs: Outputs, batch: Batch, memory: CodeMemory) -> dict[str, Tensor]:
        """Relaxed codes (B, K) of length 1; of a modality that is not in ``outputs``, the memory's."""
        slope = self.slope()
        codes: dict[str, Tensor] = {}
        for name in ("image", "text"):
            if name in outputs:
                codes[name] = unit(outputs[name].code if slope == 1.0 else outputs[name].relaxed(slope))
            elif name in memory.codes:
                codes[name] = unit(memory.codes[name].detach()[batch.ids])
        return codes


class FixedSimilarity(Unsupervised):
    """Base of objectives whose similarity is the cosine of features that are computed once, at ``setup``.

    Args:
        image_features: ``efficientnet-lite0`` (the default: ImageNet weights of the extra ``weights``; images
            under 96 px are enlarged), ``net``, ``raw`` (pixels, or the vectors of data without pixels), or
            settings of an ``image-encoder``.
        text_features: ``raw`` (the default: bags of words, as in the papers), ``minilm`` (of token ids; same
            extra), ``net``, or settings of a ``text-encoder``.

    One pass over the training items before the first step, and N * D floats of memory.
    """

    fixed_image: Tensor
    fixed_text: Tensor

    def __init__(self, image_features: Features = "efficientnet-lite0", text_features: Features = "raw"):
        super().__init__()
        self.features = {"image": image_features, "text": text_features}
        for name in self.features:  # rows of length 1; never stored: setup makes the same ones again
            self.register_buffer(f"fixed_{name}", torch.empty(0), persistent=False)

    def setup(self, facts: TrainFacts) -> None:
        super().setup(facts)
        if facts.split is None:
            raise ValueError(f"{name_of(self)} needs the training items themselves for its features")
        for name, choice in self.features.items():
            setattr(self, f"fixed_{name}", fixed_features(facts.split, name, choice, facts.encoders))

    def cosines(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, B) cosines of the fixed image and of the fixed text features of these training items."""
        image, text = self.fixed_image[ids], self.fixed_text[ids]
        return image @ image.T, text @ text.T


def fixed_features(
    split: Split, modality: str, choice: Features, encoders: Mapping[str, nn.Module], batch_size: int = 64
) -> Tensor:
    """(N, D) features of a split's items in one modality, rows of length 1 (0 for an empty text).

    Raises:
        ValueError: items without that modality, token ids taken raw, and features that are NaN or infinite.
    """
    first = split.batch(torch.zeros(1, dtype=torch.int64)).inputs
    if modality not in first:
        raise ValueError(f"the {split.name} items have {' and '.join(first)}, and no {modality}")
    if choice == "raw" and not first[modality].is_floating_point():
        raise ValueError(
            f"token ids are no features; set training.objective.{modality}_features to 'minilm' or 'net'"
        )
    with torch.random.fork_rng([]):  # an encoder's unused initial weights move no stream of the training
        encoder = _encoder(modality, choice, first[modality], encoders)
    device = next((parameter.device for parameter in encoder.parameters()), torch.device("cpu"))
    rows = []
    with frozen(encoder), torch.no_grad():
        for batch in batches(split, batch_size, modalities=(modality,)):
            output = encoder(batch.inputs[modality].to(device))
            rows.append((output[0] if isinstance(output, tuple) else output).flatten(1).float())
    features = torch.cat(rows)
    broken = torch.nonzero(~torch.isfinite(features).all(1)).flatten()
    if len(broken):
        raise ValueError(
            f"the {modality} features of {len(broken)} of {len(features)} training items are NaN or "
            f"infinite, first item {int(broken[0])}; leave them out or repair them"
        )
    return unit(features)


def _encoder(
    modality: str, choice: Features, example: Tensor, encoders: Mapping[str, nn.Module]
) -> nn.Module:
    if choice == "raw":
        return nn.Identity()
    if choice == "net":
        return encoders[modality]
    settings = PRETRAINED.get(choice, choice) if isinstance(choice, str) else choice
    if modality == "text":
        return build("text-encoder", settings, vocabulary=example.shape[1])
    if example.dim() != 4 and choice in PRETRAINED:
        raise ValueError(
            f"the images come as vectors of {example.shape[1]} features, and {choice!r} takes pixels; set "
            "training.objective.image_features=raw"
        )
    return (
        _Enlarged(build("image-encoder", settings))
        if choice in PRETRAINED
        else build("image-encoder", settings)
    )


class _Enlarged(nn.Module):
    """An encoder of images with at least ``LEAST_SIDE`` pixels a side."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Any:
        if (least := min(images.shape[-2:])) < LEAST_SIDE:
            images = interpolate(images, scale_factor=LEAST_SIDE / least, mode="bilinear", antialias=True)
        return self.encoder(images)
