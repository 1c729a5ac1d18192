"""RoCMR's attack: ascend the contrastive loss of an item against reference items."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robusthash.attacks.base import Attack, Loss, Probe
from robusthash.attacks.drfgd import SignedSets
from robusthash.attacks.published import steps_on
from robusthash.attacks.threat_model import Attacked, threat_on
from robusthash.core.registry import register
from robusthash.core.types import Guidance


def info_nce(scores: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """(B,) -log (P / (P + sum of exp s over the negatives)), P the mean of exp s over the positives.

    With a single positive that is the usual InfoNCE; scores that are all alike give ln(1 + negatives).

    Args:
        scores: (B, M) cosines over the temperature.
        positive, negative: (B, M) masks; every row has a positive.
    """
    near = scores.masked_fill(~positive, -torch.inf).logsumexp(1) - positive.sum(1).clamp_min(1).log()
    far = scores.masked_fill(~negative, -torch.inf)
    return torch.cat([near[:, None], far], 1).logsumexp(1) - near


@register("attack-loss", "info-nce", paper="Zhang et al., IJCNN 2022", evidence="reconstruction")
@dataclass(frozen=True)
class InfoNCE(Loss):
    """Minus ``info_nce`` of the attacked code's cosines to reference codes, relevant against irrelevant ones.

    Args:
        temperature: 0.1.
    """

    temperature: float = 0.1

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        if guidance.weights is None:
            raise ValueError("info-nce needs codes with signed weights; use the guide 'signed-sets'")
        with torch.autocast(guidance.codes.device.type, enabled=False):
            code, codes = probe.relaxed().float(), guidance.codes.float()
            lengths = code.norm(dim=1, keepdim=True) * codes.norm(dim=1)
            scores = code @ codes.T / lengths.clamp_min(1e-8) / self.temperature
            return -info_nce(scores, guidance.weights > 0, guidance.weights < 0)


@register("attack", "rocmr", paper="Zhang et al., IJCNN 2022", evidence="reconstruction", state="measured")
def rocmr(
    eps: float | None = None,
    steps: int = 3,
    step_size: float | None = None,
    temperature: float = 0.1,
    most: int = 64,
    random_start: bool = True,
    modality: Attacked = "image",
) -> Attack:
    """RoCMR: PGD on the contrastive loss against at most ``most`` relevant and as many irrelevant items.

    Three steps by default, of a third of the budget each; image and text together are ``modality: both``.
    Differs: the paper's negatives are those of its batch; here they are reference items drawn by query, so
    that each query is attacked alone.
    """
    threat = threat_on(modality, eps)
    longest = max(ball.eps for ball in threat.balls.values())
    search = steps_on(modality, steps, longest / 3 if step_size is None else step_size, random_start)
    return Attack("rocmr", SignedSets(most), InfoNCE(temperature), search, threat)
