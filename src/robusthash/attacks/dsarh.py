"""DSARH's attack: away from the codes of similar items and towards those of dissimilar ones, all at once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from robusthash.attacks.base import Attack, Guide, Loss, Probe
from robusthash.attacks.guides import Own, known
from robusthash.attacks.losses import Agreement, ObjectiveLoss
from robusthash.attacks.published import steps_on
from robusthash.attacks.threat_model import Attacked, Knowledge, threat_on
from robusthash.core.hamming import sign
from robusthash.core.labels import relevant
from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Goal, Guidance, Outputs, Reference
from robusthash.data.base import RetrievalData, batches
from robusthash.models.hasher import Hasher, frozen
from robusthash.objectives.pairwise import DPH, DPSH

Mode = Literal["fixed", "literal_sign", "literal_eq11", "literal_eq17"]
Among = Literal["all", "image", "text"]


def signed_mean(similar: Tensor, codes: Tensor, balanced: bool) -> Tensor:
    """(B, K) in [-1, 1], towards similar codes and away from dissimilar ones, not binarised.

    Args:
        similar: (B, M) bool.
        codes: (M, K) in {-1, +1}, or means of such; or features (M, D) of length 1.
        balanced: (mean of the similar - mean of the others) / 2, a side without items counting nothing (Eq 5
            takes the two expectations apart); otherwise sum_j s_ij R_j / M with s in {-1, +1}, as printed.
    """
    with torch.autocast(codes.device.type, enabled=False):  # sums of signs are exact in float32
        near = similar.float()
        towards = near @ codes
        away = codes.sum(0) - towards
        if not balanced:
            return (towards - away) / len(codes)
        count = near.sum(1, keepdim=True)
        return (towards / count.clamp_min(1.0) - away / (len(codes) - count).clamp_min(1.0)) / 2


_PAPER = "DSARH, Zhang et al., manuscript 2024"


@register("attack-guide", "similarity", paper=_PAPER, evidence="paper")
@dataclass(frozen=True)
class Similarity(Guide):
    """DSARH's direction a_i: signed mean of reference codes R_j by similarity; (1/K) h . a_i is lowered.

    R_j is the mean of the item's codes over modalities (the paper's integrated form, Eq 17 as meant), or the
    code of one (``codes``: inter-modal Eq 14, intra-modal Eq 16).

    Args:
        mode: ``fixed`` is the repaired attack. The literal ones follow the printed update, to show what it
            does: ``literal_sign`` steps along +sum_j s_ij R_j (Eq 9, whose sign helps retrieval);
            ``literal_eq11`` along +sum_j s_ij (B_i o R_j), B_i the own clean code (the last factor of Eq 9
            dropped: bits with B_i = -1 go the other way); ``literal_eq17`` along +sum_j s_ij (B^U_j o B^V_j),
            all ones where image and text agree.
        balanced: separate means of similar and dissimilar items; the literal modes always take the printed
            sum.

    Differs: ``balanced`` and the integrated mean are ours; the signs are those that lower similarity.
    """

    mode: Mode = "fixed"
    balanced: bool = True
    codes: Among = "all"

    def __post_init__(self) -> None:
        if self.mode not in (modes := get_args(Mode)):
            raise ValueError(f"mode must be one of {', '.join(modes)}, got {self.mode!r}")
        if self.codes not in get_args(Among):
            raise ValueError(f"codes must be 'all', 'image' or 'text', got {self.codes!r}")

    @property
    def label_codes(self) -> bool:  # type: ignore[override]  # of the mode, hence no attribute of the class
        """Only the repaired direction points to the codes of the labels."""
        return self.mode == "fixed"

    def __call__(
        self, victim: Hasher, batch: Batch, goal: Goal, reference: Reference | None, draws: Draws
    ) -> Guidance:
        banks, similar = self._known(goal, reference)
        together = torch.stack(banks).mean(0)
        if self.mode == "fixed":
            return Guidance(signed_mean(similar, together, self.balanced))
        if self.mode == "literal_eq17":
            if len(banks) != 2:
                raise ValueError("literal_eq17 multiplies image and text codes; only one of them is known")
            together = banks[0] * banks[1]
        printed = signed_mean(similar, together, balanced=False)
        if self.mode == "literal_eq11":
            printed = printed * sign(Own()(victim, batch, goal, reference, draws).codes)
        return Guidance(-printed)  # the search goes against the guidance, the printed update along it

    def _known(self, goal: Goal, reference: Reference | None) -> tuple[list[Tensor], Tensor]:
        """The banks (M, K) of the modalities in ``codes``, and which of their items are similar, (B, M)."""
        codes, labels, goal_labels = known(reference, goal)
        modalities = () if reference is None else tuple(reference.codes)
        banks = dict(zip(modalities, codes.chunk(len(modalities)), strict=True))
        if self.codes != "all" and self.codes not in banks:
            raise ValueError(f"no {self.codes} codes are known to this attacker, only those of {list(banks)}")
        similar = relevant(goal_labels, labels[: len(codes) // len(modalities)])
        return list(banks.values()) if self.codes == "all" else [banks[self.codes]], similar


@dataclass(frozen=True)
class FeatureGuidance(Guidance):
    """A direction among codes, and one among features."""

    features: dict[str, Tensor] = field(default_factory=dict)  # by modality (B, D)


@register("attack-guide", "feature-similarity", paper=_PAPER, evidence="paper")
@dataclass(frozen=True, eq=False)
class FeatureSimilarity(Guide):
    """DSARH's direction among codes, and one among features: signed mean c_i of f_j / |f_j| (Eq 10).

    f are the features that the hash head takes. The known items are those whose codes are known: training
    (W1) or database items (W2), encoded by ``fitted``. Before that, as in adversarial training, where
    features move with every step, they are the clean items of the batch.
    """

    codes: Similarity
    knowledge: Knowledge
    bank: dict[str, Tensor] | None = field(
        default=None, compare=False
    )  # by modality (M, D), rows of length 1
    labels: Tensor | None = field(default=None, compare=False)  # (M, C)

    learns = True

    def fitted(self, victim: Hasher, data: RetrievalData, reference: Reference | None, draws: Draws) -> Guide:
        """The guide with the features of the known items."""
        split = data.train if self.knowledge == "W1" else data.database
        rows: dict[str, list[Tensor]] = {}
        with frozen(victim), torch.no_grad():
            for batch in batches(split, 256, modalities=victim.modalities):
                for name, values in _unit_features(victim(batch.to(victim.device).inputs)).items():
                    rows.setdefault(name, []).append(values)
        labels = None if split.labels is None else split.labels.to(victim.device)
        return replace(self, bank={name: torch.cat(parts) for name, parts in rows.items()}, labels=labels)

    def __call__(
        self, victim: Hasher, batch: Batch, goal: Goal, reference: Reference | None, draws: Draws
    ) -> Guidance:
        guidance = self.codes(victim, batch, goal, reference, draws)
        bank, labels = self.bank, self.labels
        if bank is None:
            with torch.no_grad():
                bank, labels = _unit_features(victim(batch.inputs)), batch.labels
        if labels is None or goal.labels is None:
            raise ValueError("the feature term compares labelled items, and these have no labels")
        similar = relevant(goal.labels, labels)
        features = {name: signed_mean(similar, bank[name], self.codes.balanced) for name in batch.inputs}
        return FeatureGuidance(guidance.codes, guidance.weights, features)


def _unit_features(outputs: Outputs) -> dict[str, Tensor]:
    """f / |f| by modality, (B, D)."""
    return {name: normalize(output.features.float().flatten(1)) for name, output in outputs.items()}


@register("attack-loss", "feature-agreement", paper=_PAPER, evidence="paper")
@dataclass(frozen=True)
class FeatureAgreement(Loss):
    """(1/K) h . a + weight * f / |f| . c, the second averaged over the attacked modalities (Eq 10)."""

    weight: float

    def __call__(self, probe: Probe, guidance: Guidance) -> Tensor:
        if not isinstance(guidance, FeatureGuidance):
            raise ValueError("this loss needs a direction in feature space: the guide 'dsarh' with features")
        features = _unit_features(probe.outputs)
        terms = [(values * guidance.features[name]).sum(1) for name, values in features.items()]
        return Agreement()(probe, guidance) + self.weight * torch.stack(terms).mean(0)


def _loss(form: str) -> Loss:
    if form == "linear":
        return Agreement()
    if form in ("weighted", "square"):
        return ObjectiveLoss(DPSH() if form == "weighted" else DPH())
    raise ValueError(f"form must be 'linear', 'weighted' or 'square', got {form!r}")


@register("attack", "dsarh", paper=_PAPER, evidence="paper", state="measured")
def dsarh(
    eps: float | None = None,
    steps: int = 20,
    step_size: float | None = None,
    modality: Attacked = "image",
    mode: Mode = "fixed",
    balanced: bool = True,
    codes: Among = "all",
    form: Literal["linear", "weighted", "square"] = "linear",
    knowledge: Knowledge = "W1",
    features: float = 0.0,
) -> Attack:
    """DSARH: sign steps of 2/255 against the signed mean of the known codes; 1 to 10 in its training.

    Args:
        steps: 20 in evaluation is ours (the paper stops when "the prediction" alters, which retrieval does
            not have).
        step_size: 2/255, or 3/500 on text. One step hence moves by 2/255, not by eps.
        mode: ``fixed``, or a printed form; see the guide ``similarity``.
        form: ``linear`` agreement; ``weighted`` ascends the pair likelihood itself, sum_j (S_ij - sigma(<h,
            R_j> / 2)) R_j recomputed at each step (Eq 8); ``square`` ascends mean_j ((1/K) <h, R_j> -
            S'_ij)^2, the exact image-only form, which turns round where |<h, R_j>| > K would begin and so
            never does with tanh. The last two compare with all codes known.
        knowledge: training codes (W1) or database codes (W2); the paper does not say.
        features: weight of the feature term (Eq 10), f / |f| . c with c the signed mean of the features of
            known items of the same modality, normalised; see ``FeatureSimilarity``. 0 leaves it out.

    Differs: the signs and factors of the printed updates are repaired. The feature term compares a modality
    with itself, since features of images and texts need not have one width, and takes the features before the
    hash head.
    """
    if form != "linear" and (mode != "fixed" or codes != "all" or features):
        raise ValueError(f"form {form!r} stands alone: leave mode 'fixed', codes 'all' and features 0")
    if features < 0 or (features and mode != "fixed"):
        raise ValueError(f"features must be at least 0, and 0 with a literal mode, got {features:g}")
    size = 2 / 255 if step_size is None and modality != "text" else step_size
    search, threat = steps_on(modality, steps, size, False), threat_on(modality, eps, knowledge=knowledge)
    guide = Similarity(mode, balanced, codes)
    if features:
        guides, loss = FeatureSimilarity(guide, knowledge), FeatureAgreement(features)
        return Attack("dsarh", guides, loss, search, threat)
    return Attack("dsarh", guide, _loss(form), search, threat)
