"""SFCL's outer loss, which makes the two domains robust and complementary, and attacks on its masks."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robusthash.attacks.losses import OverDraws
from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import LossTerms
from robusthash.defenses.adaptive import AdaptiveAttack, AdaptiveAttacks, AdaptiveSetting
from robusthash.defenses.base import Needs, OuterLoss, Round
from robusthash.models.hasher import Hasher
from robusthash.models.sfcl import DOMAINS, BranchView, MaskNoise, MaskView, masks_of
from robusthash.objectives.base import TrainFacts

MODALITY = "image"


class LabelScorer(nn.Module):
    """g(a, b, l), an MLP on the concatenation, and its estimate I^: mean log-softmax over label sets.

    One hidden ReLU layer, its weights split by input so that B items are scored against U label sets at once.
    """

    def __init__(self, width: int, other: int, classes: int, hidden: int = 128) -> None:
        super().__init__()
        self.features = nn.Linear(width + other, hidden)
        self.labels = nn.Linear(classes, hidden, bias=False)
        self.score = nn.Linear(hidden, 1)

    def forward(self, features: Tensor, others: Tensor, sets: Tensor, own: Tensor) -> Tensor:
        """I^(f; l | f') of Eq. 5: at most 0, and -log U where the scorer knows nothing.

        Args:
            features: (B, D).
            others: (B, D').
            sets: (U, C) the distinct label sets of the batch.
            own: (B,) which of them is each item's.
        """
        items = self.features(torch.cat([features, others], 1))[:, None]
        scores = self.score(torch.relu(items + self.labels(sets)[None])).squeeze(2)
        return -F.cross_entropy(scores.float(), own)


class _Reversed(torch.autograd.Function):
    """The identity with the gradient's sign exchanged."""

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return -grad


class Redundancy(nn.Module):
    """InfoNCE between the robust features of the two domains, under projections to ``size`` and cosine / 0.1.

    InfoNCE is a lower bound on the information that the domains share, and the encoder lowers it: projections
    trained along would only collapse. So they ascend (their gradient is reversed), or stay random
    orthonormal.
    """

    def __init__(self, width: int, other: int, kind: Literal["reversed", "frozen"], size: int = 128) -> None:
        super().__init__()
        if kind not in ("reversed", "frozen"):
            raise ValueError(f"redundancy must be 'reversed' or 'frozen', got {kind!r}")
        self.projections = nn.ParameterList(
            nn.Parameter(nn.init.orthogonal_(torch.empty(size, D)), requires_grad=kind == "reversed")
            for D in (width, other)
        )

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Mean over i of log softmax_j (cos(p_i, q_j) / 0.1) at j = i: at most 0, -log B if all are alike."""
        p, q = (
            F.normalize(F.linear(values, _Reversed.apply(weight)).float(), dim=1)
            for values, weight in zip((left, right), self.projections, strict=True)
        )
        return -F.cross_entropy(p @ q.T / 0.1, torch.arange(len(p), device=p.device))


def wrong_labels(probabilities: Tensor, labels: Tensor) -> Tensor:
    """l': the classes that an attacked item is taken for and does not have; else the likeliest of those.

    (B, C) multi-hot, never overlapping ``labels``; empty only for an item that has every class.
    ``probabilities`` (B, C) are from the ungated features of the attacked item.
    """
    foreign = labels == 0
    predicted = (probabilities >= 0.5) & foreign
    first = probabilities.masked_fill(~foreign, -1.0).argmax(1)
    likeliest = F.one_hot(first, labels.shape[1]).bool() & foreign
    return torch.where(predicted.any(1, keepdim=True), predicted, likeliest).to(labels.dtype)


@register("outer", "sfcl", paper="SFCL, ICMR 2026", evidence="paper", state="measured")
class SFCLOuter(nn.Module, OuterLoss):
    """SFCL: L = w (complementary * L_comp + auxiliary * L_aux) + semantic * L_sem, w the warm-up factor.

    L_comp (Eq. 6) = -I^(s; l | f) - I^(f; l | s) + alpha I^(s; f) on robust features, averaged over clean and
    attacked. L_aux (Eq. 7) = sum over domains of BCE(h(f+(x')), l) + BCE(h(f-(x')), l') + 0.5 BCE(h(f+(x)),
    l), means over classes; the same head h for both parts. L_sem is the recipe's objective, the mean of clean
    and attacked.

    Needs the image encoder ``sfcl``, whose parts are in ``HashOutput.aux``. Without separation there is no
    f-, and L_aux is not taken. The paper's inner attack is targeted PGD (``dhta``) of 10 steps of 2/255.

    Args:
        complementary, auxiliary, semantic: lambda_c, lambda_a, lambda_s, as in the paper. 0 leaves the term
            out.
        alpha: weight of the redundancy, 0.5 in the paper.
        warmup: share of training over which w grows from 0 to 1 (the paper's "adversarial warm-up" is not
            defined); give the recipe the same one for eps.
        sem_inputs: ``both``, or ``clean``: L_sem without the attacked images.
        wrong: l' as ``predicted`` for x' (FSR's rule, made multi-label), or the ``target`` of the attack.
        redundancy: ``reversed``: the critic's projections learn to find shared information; ``frozen``:
            random.
        hidden: of the auxiliary heads.

    Differs: Eq. 7 is printed with the sign that would drive p+ to 0; this is the cross-entropy that the text
    speaks of. Eq. 5 runs over the distinct label sets of the batch, since equal ones would be false
    negatives.
    """

    def __init__(
        self,
        complementary: float = 0.3,
        auxiliary: float = 1.0,
        semantic: float = 3.0,
        alpha: float = 0.5,
        warmup: float = 0.1,
        sem_inputs: Literal["both", "clean"] = "both",
        wrong: Literal["predicted", "target"] = "predicted",
        redundancy: Literal["reversed", "frozen"] = "reversed",
        hidden: int = 256,
    ) -> None:
        super().__init__()
        if not 0.0 <= warmup < 1.0:
            raise ValueError(f"warmup is a share of training in [0, 1), got {warmup:g}")
        if sem_inputs not in ("both", "clean"):
            raise ValueError(f"sem_inputs must be 'both' or 'clean', got {sem_inputs!r}")
        if wrong not in ("predicted", "target"):
            raise ValueError(f"wrong must be 'predicted' or 'target', got {wrong!r}")
        weights = {"complementary": complementary, "auxiliary": auxiliary, "semantic": semantic}
        for name, weight in weights.items():
            if not isinstance(weight, int | float) or weight < 0:
                raise ValueError(f"{name} is a weight of at least 0, got {weight!r}")
        self.complementary, self.auxiliary, self.semantic = complementary, auxiliary, semantic
        self.alpha = alpha
        self.warmup = warmup
        self.sem_inputs = sem_inputs
        self.wrong = wrong
        self.redundancy_kind = redundancy
        self.hidden = hidden
        self.needs = Needs(goal="target" if wrong == "target" and auxiliary else None, modality=MODALITY)
        self.heads = nn.ModuleDict()
        self.scorers = nn.ModuleDict()
        self.redundancy: Redundancy | None = None

    def setup(self, facts: TrainFacts) -> None:
        """Make heads and scorers for the widths of the encoder's features, drawn from the seed."""
        widths = facts.aux_widths.get(MODALITY, {})
        if not all(f"{name}+" in widths for name in DOMAINS):
            encoder = "{name: sfcl, spatial: small, frequency: {name: gfnet, size: SIDE, patch: P}}"
            raise ValueError(
                "the outer loss 'sfcl' needs the two branches of the image encoder 'sfcl': set hasher.image "
                f"to {encoder}, SIDE the data's size and P a divisor of it"
            )
        one, two = (widths[name] for name in DOMAINS)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(Draws(facts.seed).within("sfcl").key())
            if self.auxiliary and f"{DOMAINS[0]}-" in widths:
                for name in DOMAINS:
                    first, last = nn.Linear(widths[name], self.hidden), nn.Linear(self.hidden, facts.classes)
                    self.heads[name] = nn.Sequential(first, nn.ReLU(), last)
            if self.complementary:
                self.scorers["spatial"] = LabelScorer(one, two, facts.classes)
                self.scorers["frequency"] = LabelScorer(two, one, facts.classes)
                self.redundancy = Redundancy(one, two, self.redundancy_kind)

    def forward(self, turn: Round) -> LossTerms:
        """The weighted terms of one step."""
        if MODALITY not in turn.robust:
            changed = sorted(turn.robust)
            raise ValueError(f"the outer loss 'sfcl' needs attacked images; the attack changes {changed}")
        labels = turn.batch.labels
        if labels is None:
            raise ValueError("the outer loss 'sfcl' needs labels, which this batch lacks")
        clean, attacked = turn.clean[MODALITY].aux, turn.robust[MODALITY].aux
        ramp = min(1.0, turn.progress / self.warmup) if self.warmup else 1.0
        terms = self._semantic(turn)
        if self.heads:
            auxiliary = self._auxiliary(clean, attacked, labels, self._wrong(turn, labels))
            terms["auxiliary"] = ramp * self.auxiliary * auxiliary
        if self.scorers:
            parts = [self._complementary(aux, labels) for aux in (clean, attacked)]
            for name in parts[0]:
                value = torch.stack([part[name] for part in parts]).mean()
                terms[f"complementary/{name}"] = ramp * self.complementary * value
        return terms

    def _semantic(self, turn: Round) -> LossTerms:
        """L_sem on the clean items, and with the attacked modalities in the place of the clean ones."""
        if self.sem_inputs == "clean":
            return turn.objective_terms("clean", turn.clean, self.semantic)
        clean = turn.objective_terms("clean", turn.clean, self.semantic / 2)
        return {**clean, **turn.objective_terms("robust", {**turn.clean, **turn.robust}, self.semantic / 2)}

    def _wrong(self, turn: Round, labels: Tensor) -> Tensor:
        """(B, C) l', held constant."""
        if self.wrong == "target":
            if turn.goal.sign < 0 or turn.goal.labels is None:
                raise ValueError("wrong: target needs a targeted inner attack, such as dhta")
            return turn.goal.labels * (1.0 - labels)  # an item without a possible target has its own labels
        with torch.no_grad():
            aux = turn.robust[MODALITY].aux
            logits = torch.stack([self.heads[name](aux[name]).float() for name in DOMAINS]).mean(0)
            return wrong_labels(torch.sigmoid(logits), labels)

    def _auxiliary(
        self, clean: dict[str, Tensor], attacked: dict[str, Tensor], labels: Tensor, wrong: Tensor
    ) -> Tensor:
        def entropy(name: str, features: Tensor, targets: Tensor) -> Tensor:
            return F.binary_cross_entropy_with_logits(self.heads[name](features).float(), targets)

        terms = [
            entropy(name, attacked[f"{name}+"], labels)
            + entropy(name, attacked[f"{name}-"], wrong)
            + 0.5 * entropy(name, clean[f"{name}+"], labels)
            for name in DOMAINS
        ]
        return torch.stack(terms).sum()

    def _complementary(self, aux: dict[str, Tensor], labels: Tensor) -> LossTerms:
        """Both parts of L_comp: information on the labels that the domains lack, and what they share."""
        sets, own = torch.unique(labels, dim=0, return_inverse=True)
        left, right = aux["spatial+"], aux["frequency+"]
        assert self.redundancy is not None
        spatial = self.scorers["spatial"](left, right, sets, own)
        information = spatial + self.scorers["frequency"](right, left, sets, own)
        return {"labels": -information, "redundancy": self.alpha * self.redundancy(left, right)}


@register("adaptive", "mask", paper="SFCL, ICMR 2026", modality="image")
class MaskAttacks(AdaptiveAttacks):
    """SFCL: the mask that it does not use, training noise, and each branch before the fused code."""

    def modalities(self, victim: Hasher) -> Collection[str]:
        return masks_of(victim)

    def attacks(self, victim: Hasher, modality: str, setting: AdaptiveSetting) -> list[AdaptiveAttack]:
        other = MaskView("soft" if masks_of(victim)[modality].hard_eval else "hard")
        half = setting.half
        alone = {b: setting.attack(f"branch-{b}-first", BranchView(b), steps=half) for b in DOMAINS}
        return [
            setting.attack(f"mask-{other.mask}", other),
            setting.attack("mask-noise-20", MaskNoise(20), loss=OverDraws()),
            *(setting.staged(f"branch-{branch}", first) for branch, first in alone.items()),
        ]
