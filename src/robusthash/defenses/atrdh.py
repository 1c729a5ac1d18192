"""ATRDH: attacked codes keep the similarities that the clean ones have."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from robusthash.core.labels import relevant
from robusthash.core.registry import register
from robusthash.core.types import LossTerms
from robusthash.defenses.adversarial_training import Round


@register("outer", "atrdh", paper="Wang et al., SIGIR 2021", evidence="paper+code", state="measured")
@dataclass(frozen=True)
class ATRDHOuter:
    """ATRDH: L = L_ori(x) + adversarial * mean_ij ((1/K) h(x'_i) . U_j - S'_ij)^2, S' in {-1, +1}.

    U are the clean real codes of all training items, held constant; over several modalities the term is the
    mean over the pairs of an attacked modality and a memory. The paper's inner attack is ``tha`` from a
    random start, its prototype net trained along: 7 steps of 2/255.

    Differs: the memory holds true codes from the first step on (the code starts it at zero, which only adds a
    constant); targets share no label with the item (the code draws any label set of the database); the attack
    runs in eval mode.

    Args:
        adversarial: 1 in the authors' code, 2 in SAAT's copy.
    """

    adversarial: float = 1.0

    def __call__(self, turn: Round) -> LossTerms:
        own, labels = turn.batch.labels, turn.memory.labels
        if own is None or labels is None:
            raise ValueError("ATRDH keeps similarities of labels, and the training split has none")
        signed = 2.0 * relevant(own, labels).float() - 1.0
        errors = [
            (output.code @ codes.T / codes.shape[1] - signed).square().mean()
            for output in turn.robust.values()
            for codes in turn.memory.codes.values()
        ]
        clean = turn.objective(turn.clean, turn.batch, turn.memory)
        return {
            **{f"clean/{name}": value for name, value in clean.items()},
            "adversarial": self.adversarial * torch.stack(errors).mean(),
        }
