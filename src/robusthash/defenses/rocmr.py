"""RoCMR: adversarial training of both modalities by contrast of clean and attacked views of each item."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from robusthash.attacks.rocmr import info_nce
from robusthash.core.labels import relevant
from robusthash.core.registry import register
from robusthash.core.types import LossTerms
from robusthash.defenses.base import OuterLoss, Round
from robusthash.objectives.base import quantisation


def contrast(one: Tensor, other: Tensor, negative: Tensor, temperature: float = 0.1) -> Tensor:
    """Symmetric InfoNCE of two views (B, K), row i of one against row i of the other; mean over the batch.

    Args:
        negative: (B, B) pairs that count as negatives; others than those and the diagonal are left out.
    """
    own = torch.eye(len(one), dtype=torch.bool, device=one.device)
    views = [view / view.norm(dim=1, keepdim=True).clamp_min(1e-8) for view in (one.float(), other.float())]
    scores = views[0] @ views[1].T / temperature
    return (info_nce(scores, own, negative) + info_nce(scores.T, own, negative.T)).mean() / 2


@register("outer", "rocmr", paper="Zhang et al., IJCNN 2022", evidence="reconstruction", state="measured")
@dataclass(frozen=True)
class RoCMROuter(OuterLoss):
    """RoCMR: L = L_ori(x) + contrast * mean InfoNCE(a, b) + quantisation * mean (|h(x')| - 1)^2.

    Views are (v, t), (v', t), (v, t') and (v', t'), as far as image or text is attacked; over images alone
    there is (x, x'). Items of the batch that share a label are no negatives; without labels all others are.

    Args:
        contrast: weight, 1.
        temperature: of the cosines, 0.1.
        quantisation: weight, 0.1.

    Cost: with T steps of the attack T + 2 forward and T + 1 backward passes of each attacked net. Differs:
    abstract alone is public (no code): adversarial examples for queries and candidates, contrast of clean and
    attacked samples. The paper learns real-valued embeddings; that it is added to a hashing objective, all
    weights, and the attack (``rocmr``, 3 steps, ``modality: both``) are ours.
    """

    contrast: float = 1.0
    temperature: float = 0.1
    quantisation: float = 0.1

    def __post_init__(self) -> None:
        if min(self.contrast, self.quantisation) < 0.0 or not self.temperature > 0.0:
            raise ValueError(
                "weights must not be negative and the temperature must be positive, got "
                f"{self.contrast:g}, {self.quantisation:g}, {self.temperature:g}"
            )

    def __call__(self, turn: Round) -> LossTerms:
        labels, count = turn.batch.labels, len(turn.batch)
        other = ~torch.eye(count, dtype=torch.bool, device=turn.batch.ids.device)
        negative = other if labels is None else other & ~relevant(labels, labels)
        losses = [contrast(a, b, negative, self.temperature) for a, b in self._views(turn)]
        spread = torch.stack([quantisation(output).mean() for output in turn.robust.values()]).mean()
        return {
            **turn.objective_terms("clean", turn.clean),
            "contrast": self.contrast * torch.stack(losses).mean(),
            "quantisation": self.quantisation * spread,
        }

    @staticmethod
    def _views(turn: Round) -> list[tuple[Tensor, Tensor]]:
        """Pairs of codes of the same items: of two modalities, or of one that is clean and attacked."""
        codes = {
            n: [o.relaxed() for o in (turn.clean[n], turn.robust.get(n)) if o is not None] for n in turn.clean
        }
        if len(codes) == 1:
            (views,) = codes.values()
            return list(combinations(views, 2))
        return [(a, b) for one, two in combinations(codes.values(), 2) for a in one for b in two]
