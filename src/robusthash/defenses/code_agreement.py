"""Agreement of a query's code with those of its harmless changes, and the attack that plans for it.

A query whose code moves when it is saved as a JPEG file or cut a little at the edges is suspected: a change
of pixels that was made for one code often does not survive either. Feature squeezing (Xu et al., NDSS 2018)
for codes; the changes and the attack are ours. Whoever knows of it makes all three codes wrong at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from robusthash.attacks.base import Attack
from robusthash.attacks.losses import OverDraws
from robusthash.core.types import Inputs, Outputs
from robusthash.data.transforms import crop, eight_bits, jpeg
from robusthash.models.encoding import encode_signs
from robusthash.models.hasher import Hasher
from robusthash.models.purifier import with_gradient_of
from robusthash.models.surrogate_gradients import GradientView, ViewedHasher


@dataclass(frozen=True)
class CodeAgreement:
    """The harmless changes of a query and how far its code moves under them.

    Args:
        quality: of the JPEG file, 1 to 100.
        cut: share of width and height that is cut away, in (0, 0.5].
    """

    quality: int = 90
    cut: float = 0.05

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise ValueError(f"JPEG quality must lie in 1..100, got {self.quality}")
        if not 0 < self.cut <= 0.5:
            raise ValueError(f"cut is a share in (0, 0.5], got {self.cut}")

    def changed(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [0, 1] as JPEG files and cut at the edges, rounded to multiples of 1/255."""
        return [jpeg(images, self.quality), eight_bits(crop(images, self.cut))]

    def disagreement(self, hasher: Hasher, images: Tensor) -> Tensor:
        """(B,) int64: most bits that differ between the code of an image and that of one of its changes."""
        codes = [encode_signs(hasher, "image", each) for each in (images, *self.changed(images))]
        return torch.stack([(codes[0] != code).sum(1) for code in codes[1:]]).amax(0)


class AgreeingHasher(ViewedHasher):
    """A victim that shows the outputs of a query and of its changes as ``draws``, with gradients of all.

    The gradient of JPEG is that of the identity; that of the cut is its own. Logits and code are the query's.
    """

    passes = (3, 3)

    def __init__(self, victim: Hasher, agreement: CodeAgreement) -> None:
        super().__init__(victim, victim)
        self.agreement = agreement

    def forward(self, inputs: Inputs) -> Outputs:
        outputs = self.gradients(inputs)
        if "image" not in inputs:
            return outputs
        images = inputs["image"]
        saved = with_gradient_of(jpeg(images, self.agreement.quality), images)
        changed = [saved, crop(images, self.agreement.cut)]
        views = [outputs["image"], *(self.gradients({"image": each})["image"] for each in changed)]
        draws = torch.stack([output.logits for output in views])
        codes = torch.stack([output.code for output in views])
        aux = {**views[0].aux, "draws": draws, "draws/code": codes}
        return {**outputs, "image": replace(views[0], aux=aux)}


@dataclass(frozen=True)
class Agreeing(GradientView):
    """The victim with the changes of ``CodeAgreement`` in its outputs, for the loss ``OverDraws``."""

    agreement: CodeAgreement = field(default_factory=CodeAgreement)

    def __call__(self, victim: Hasher) -> ViewedHasher:
        return AgreeingHasher(victim, self.agreement)


def against_agreement(attack: Attack) -> Attack:
    """The attack with its loss averaged over a query and its changes; differentiate ``Agreeing``.

    It does not select by the reported metric, which knows nothing of the changes.
    """
    return replace(attack, name=f"{attack.name} with the changes", loss=OverDraws(attack.loss), selects=False)
