"""DSARH's outer loss: the hashing objective on clean and on attacked outputs, mixed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from robusthash.core.registry import register
from robusthash.core.types import LossTerms
from robusthash.defenses.adversarial_training import Round

CLEAN_ONLY = "regularisation"  # by this name every objective calls its quantisation


@register("outer", "dsarh", paper="DSARH, Zhang et al., manuscript 2024", evidence="paper", state="measured")
@dataclass(frozen=True)
class DSARHOuter:
    """DSARH: L = (1 - lam) L_sim(x) + lam L_sim(x') + quantisation(x), with whatever objective is trained.

    x' holds the attacked items of the attacked modalities and clean ones of the others, so that text keeps
    its full weight where only images are attacked. It learns nothing from them: the memory that attacked
    images are compared with is constant, as in Eq 18, and holds codes of clean items. The paper's own
    objectives are ``dsarh`` (image-text) and ``adsh`` (images).

    Args:
        lam: 0 is plain training, 1 trains on attacked items alone (the paper's account of its curves).
        lam_mode: ``additive`` is Eq 18 as printed, L(x) + lam L_sim(x') on the attacked modalities, with lam
            1 in mind.

    Raises:
        ValueError: lam below 0, or above 1 in the convex form.

    Differs: the paper prints the additive form and describes the convex one; its value of lam is not given,
    0.5 is ours. Quantisation stays on clean codes at full weight (as Eq 23 and 27 of the image form).
    """

    lam: float = 0.5
    lam_mode: Literal["convex", "additive"] = "convex"

    def __post_init__(self) -> None:
        if self.lam_mode not in ("convex", "additive"):
            raise ValueError(f"lam_mode must be 'convex' or 'additive', got {self.lam_mode!r}")
        if self.lam < 0.0 or (self.lam_mode == "convex" and self.lam > 1.0):
            raise ValueError(f"lam must lie in [0, 1] (at least 0 where additive), got {self.lam:g}")

    def __call__(self, turn: Round) -> LossTerms:
        convex = self.lam_mode == "convex"
        clean = turn.objective(turn.clean, turn.batch, turn.memory)
        attacked = {**turn.clean, **turn.robust} if convex else turn.robust
        robust = turn.objective(attacked, turn.batch, turn.memory)
        kept = 1.0 - self.lam if convex else 1.0
        return {
            **{
                f"clean/{name}": value if name == CLEAN_ONLY else kept * value
                for name, value in clean.items()
            },
            **{f"robust/{name}": self.lam * value for name, value in robust.items() if name != CLEAN_ONLY},
        }
