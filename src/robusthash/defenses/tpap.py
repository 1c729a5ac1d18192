"""TPAP: overfit a hasher to one-step attacks, then step each query away from its code before it is hashed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from robusthash.attacks.base import Attack
from robusthash.core.registry import register
from robusthash.core.types import LossTerms
from robusthash.defenses.adversarial_training import AdversarialTraining
from robusthash.defenses.base import OuterLoss, Round
from robusthash.models.hasher import Hasher
from robusthash.models.tpap import StepAway
from robusthash.objectives.base import HashObjective


@register("outer", "attacked-alone", paper="Tang & Zhang, CVPR 2024", evidence="paper+code", state="measured")
@dataclass(frozen=True)
class AttackedAlone(OuterLoss):
    """L = L_ori(x'): the hashing objective on attacked inputs alone; modalities not attacked stay clean."""

    def __call__(self, turn: Round) -> LossTerms:
        return turn.objective_terms("robust", {**turn.clean, **turn.robust})


@register("recipe", "tpap", paper="Tang & Zhang, CVPR 2024", evidence="reconstruction", state="measured")
class TPAP(AdversarialTraining):
    """TPAP: the bare hasher is trained on one-step attacks until it overfits; its purifiers have no weights.

    The purifiers ``tpap-image`` and ``tpap-text`` of the hasher are for queries (``sides: query``) and take
    no part in the training, which is ``AdversarialTraining`` with the outer loss ``attacked-alone``.

    Args:
        hasher: with TPAP purifiers; from a new net as in the paper, or a trained one.
        attack: of one step from the clean input, in the paper FGSM on the training loss:
            ``{name: pgd, steps: 1, step_size: 8/255, random_start: false}``. More steps are adversarial
            training that does not overfit, and the purifier then has nothing to work on.

    Cost of a step: two forward and backward passes, and a forward pass of the clean items; of a query, see
    ``StepAway``. Differs: FGSM, its budget, training on attacked inputs alone and the long schedule are the
    paper's and its code's (a step of SGD at 0.01, momentum 0.9, weight decay 1e-3, 100 epochs, weights of
    epoch 70 or later); that it works on hashing objectives and steps from codes, not classes, is ours.
    """

    data_parallel = False  # the bare hasher is called, not the one with purifiers

    def __init__(self, hasher: Hasher, objective: HashObjective, attack: Attack) -> None:
        others = [n for n, part in hasher.purifiers.items() if not isinstance(part, StepAway)]
        if others or not hasher.purifiers:
            has = f"the {others[0]} purifier is another" if others else "this hasher has none"
            raise ValueError(
                f"recipe 'tpap' is for the purifiers tpap-image and tpap-text, and {has}: set "
                "hasher.purifiers to {image: tpap-image}"
            )
        super().__init__(hasher.bare(), objective, attack, AttackedAlone())
        self.hasher = hasher  # with the purifiers, and the same nets

    def modules(self) -> dict[str, nn.Module]:
        return {**super().modules(), "hasher": self.hasher}
