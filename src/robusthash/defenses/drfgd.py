"""DRFGD: train purifiers that split queries and regenerate them, for a hasher that is never changed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, softplus

from robusthash.attacks.base import Attack
from robusthash.attacks.drfgd import SignedSets, set_contrast, swapped
from robusthash.core.registry import build, register
from robusthash.core.types import Batch, Goal, Inputs, LossTerms, Reference
from robusthash.data.base import RetrievalData
from robusthash.models.drfgd import Regenerated, Regenerator
from robusthash.models.hasher import Hasher, frozen
from robusthash.objectives.base import CodeMemory, HashObjective
from robusthash.training.recipe import Moment, Recipe, check_modalities, fill_memory, train_facts


def shared_information(robust: Tensor, fragile: Tensor) -> Tensor:
    """L_Div repaired: ln 2 - JS(softmax robust, softmax fragile), (B,) in [0, ln 2]; 0 for disjoint supports.

    Differs: Eq 4 prints the minimum of a divergence, which would make both features equal; see
    ``symmetric_kl``.
    """
    p, q = log_softmax(robust.float(), 1), log_softmax(fragile.float(), 1)
    middle = torch.logaddexp(p, q) - math.log(2.0)
    js = 0.5 * (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(1)
    return math.log(2.0) - js


def symmetric_kl(robust: Tensor, fragile: Tensor) -> Tensor:
    """L_Div as printed (Eq 4), KL(P||Q) + KL(Q||P), (B,); it makes the two alike: for ablations only."""
    p, q = log_softmax(robust.float(), 1), log_softmax(fragile.float(), 1)
    return ((p.exp() - q.exp()) * (p - q)).sum(1)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy to the uniform distribution over the ``targets`` (B, C), mean over items that have any.

    Its minimum is ln |y|. Differs: Eq 5-6 leave the targets unnormalised, so that 1 - y of many classes would
    outweigh everything else.
    """
    count = targets.sum(1)
    losses = -(targets * log_softmax(logits.float(), 1)).sum(1) / count.clamp_min(1.0)
    return losses.sum() / (count > 0).sum().clamp_min(1)


def critic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """L_D repaired: -E log D(real) - E log(1 - D(fake)) of logits; the printed one has no lower bound."""
    return softplus(-real.float()).mean() + softplus(fake.float()).mean()


Inner = Literal["published", "through"]


@register("recipe", "regenerate", paper="DRFGD, AAAI 2026", evidence="paper", state="measured")
class Regenerate(Recipe):
    """DRFGD: the hasher stays as it is, bit for bit; its purifiers learn against attacks on its queries.

    For each purified modality, x clean and x' attacked, z and z' their robust features, v and v' their
    fragile ones, g and g' their regenerated samples (the paper's x-bar and x-tilde):

        L_R = divergence * mean over (z, v), (z', v') of [ln 2 - JS]
            + classification * mean of CE(z, y), CE(z', y), CE(v, y), CE(v', 1 - y)       ("reverse
            supervision")
        L_G = discrimination * L_Dis + alignment * L_Ali + reconstruction * L_Rec
        L_Ali = mean over g, g' of ``set_contrast`` with the sets exchanged, through the frozen hasher
        L_Rec = MSE(x, g) + MSE(x, g') + MSE(g, g');   L_Dis = -mean over g, g' of log D

    The group "purifier" (with the classifiers) steps on disentangle * L_R + L_G; then "critic" on L_D. A term
    of weight 0 is not computed: those are the paper's ablations.

    Args:
        hasher: a trained one with ``Regenerator`` purifiers, for queries only in the paper (``sides:
            query``).
        objective: that of the hasher's training; only attacks on it need it.
        attack, text_attack: make x' in every step; the second, as settings, on texts where both are purified.
        disentangle: lambda, 1, in no equation of the paper; here it weighs L_R, so that 0 is the control.
        alignment, reconstruction: alpha in [1, 50] and beta in [400, 2000] in the paper, by the target model.
        tau, most: of ``set_contrast`` and ``SignedSets``.
        literal_divergence: ``symmetric_kl`` instead of ln 2 - JS.
        inner: ``published`` attacks the bare hasher, as the paper does: x' of an attacker who does not know
            of the purifier. ``through`` (ours) attacks hasher and purifiers as they are, so that they learn
            against one who does.

    Differs: the terms of the classification are averaged; see the functions above for the repaired equations.
    """

    groups = ("purifier", "critic")
    data_parallel = False  # purifiers are called apart from the hasher

    def __init__(
        self,
        hasher: Hasher,
        objective: HashObjective,
        attack: Attack,
        text_attack: Mapping[str, Any] | str | None = None,
        disentangle: float = 1.0,
        divergence: float = 1.0,
        classification: float = 1.0,
        alignment: float = 10.0,
        reconstruction: float = 1000.0,
        discrimination: float = 1.0,
        tau: float = 0.05,
        most: int = 256,
        literal_divergence: bool = False,
        inner: Inner = "published",
    ) -> None:
        if inner not in get_args(Inner):
            raise ValueError(f"inner must be 'published' or 'through' (the purifiers), got {inner!r}")
        self.inner = inner
        self.hasher = hasher
        self.objective = objective
        self.attacks = [attack]
        if text_attack is not None:
            self.attacks.append(build("attack", text_attack, objective=objective))
        self.purifiers = _checked(hasher, self.attacks)
        self.weights = {
            "divergence": float(disentangle) * divergence,
            "classification": float(disentangle) * classification,
            "discrimination": float(discrimination),
            "alignment": float(alignment),
            "reconstruction": float(reconstruction),
        }
        if min(self.weights.values()) < 0 or max(self.weights.values()) == 0:
            raise ValueError(f"weights must not be negative, nor all be 0, got {self.weights}")
        self.tau = tau
        self.sets = SignedSets(most)
        self.divergence = symmetric_kl if literal_divergence else shared_information
        self.classifiers = nn.ModuleDict()
        self.critics = nn.ModuleDict()
        self.memory: CodeMemory
        hasher.declared = hasher.spec["declared"] = "purifier"

    def modules(self) -> dict[str, nn.Module]:
        parts = {"hasher": self.hasher, "objective": self.objective, "memory": self.memory}
        return {**parts, "classifiers": self.classifiers, "critics": self.critics}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        purifiers = [*self.hasher.purifiers.parameters(), *self.classifiers.parameters()]
        return {"purifier": purifiers, "critic": list(self.critics.parameters())}

    def setup(self, data: RetrievalData, seed: int, batch_size: int) -> None:
        check_modalities(self.hasher, data)
        facts, device = train_facts(data.train, self.hasher, seed), self.hasher.device
        self.objective.to(device).setup(facts)
        self.objective.to(device)  # what setup made
        for modality, purifier in self.purifiers.items():
            if self.weights["classification"]:
                self.classifiers[modality] = nn.Linear(purifier.width, facts.classes).to(device)
            if self.weights["discrimination"]:
                self.critics[modality] = purifier.critic().to(device)
        bare = self.hasher.bare()
        self.memory = CodeMemory(len(data.train), bare.bits, data.train.labels, bare.modalities).to(device)
        fill_memory(
            self.memory, bare, data.train, batch_size
        )  # the hasher does not change, so once is enough

    def step(self, batch: Batch, moment: Moment) -> Iterator[tuple[str, LossTerms]]:
        bare, reference = self.hasher.bare(), self.memory.reference()
        attacked: Inputs = {}
        victim = self.hasher if self.inner == "through" else bare
        for attack in self.attacks:
            result = attack.perturb(victim, batch, Goal(batch.labels, -1), reference, draws=moment.draws)
            attacked |= {name: value.detach() for name, value in result.inputs.items()}
        terms: LossTerms = {}
        fakes: Inputs = {}
        # no parameter of the hasher or the critics may move, or collect a gradient, in this step
        with frozen(bare), frozen(self.critics):
            for modality, purifier in self.purifiers.items():
                pair = purifier.regenerate(batch.inputs[modality]), purifier.regenerate(attacked[modality])
                parts = self._terms(modality, bare, batch.only({modality}), pair, reference, moment)
                terms |= {f"{modality} {name}": self.weights[name] * value for name, value in parts.items()}
                fakes[modality] = torch.cat([regenerated.sample.detach() for regenerated in pair])
        yield "purifier", terms
        if len(self.critics):
            losses: LossTerms = {}
            for name, critic in self.critics.items():
                logits = critic(torch.cat([batch.inputs[name], fakes[name]]))
                losses[f"{name} critic"] = critic_loss(logits[: len(batch)], logits[len(batch) :])
            yield "critic", losses

    def _terms(
        self,
        modality: str,
        bare: Hasher,
        batch: Batch,
        pair: tuple[Regenerated, Regenerated],
        reference: Reference,
        moment: Moment,
    ) -> LossTerms:
        """The terms of one modality with a weight, unweighted; ``pair`` from the clean and attacked input."""
        clean, robust = pair
        x, labels = batch.inputs[modality], cast(Tensor, batch.labels)
        terms: LossTerms = {}
        if self.weights["divergence"]:
            terms["divergence"] = _mean([self.divergence(each.robust, each.fragile) for each in pair])
        if self.weights["classification"]:
            classifier = self.classifiers[modality]
            views = [(clean.robust, labels), (robust.robust, labels), (clean.fragile, labels)]
            views.append((robust.fragile, 1.0 - labels))
            terms["classification"] = _mean([soft_cross_entropy(classifier(z), y) for z, y in views])
        if self.weights["discrimination"]:
            critic = self.critics[modality]
            terms["discrimination"] = _mean([softplus(-critic(each.sample).float()) for each in pair])
        if self.weights["alignment"]:
            draws = moment.draws.within("alignment")
            guidance = swapped(self.sets(bare, batch, Goal(labels, +1), reference, draws))
            codes = [bare({modality: each.sample})[modality].relaxed() for each in pair]
            terms["alignment"] = _mean([set_contrast(code, guidance, self.tau) for code in codes])
        if self.weights["reconstruction"]:
            pairs = [(x, clean.sample), (x, robust.sample), (clean.sample, robust.sample)]
            terms["reconstruction"] = torch.stack([(a - b).float().square().mean() for a, b in pairs]).sum()
        return terms


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack([value.mean() for value in values]).mean()


def _checked(hasher: Hasher, attacks: list[Attack]) -> dict[str, Regenerator]:
    """The purifiers, where each has its attack."""
    if not hasher.purifiers:
        raise ValueError("recipe 'regenerate' trains purifiers: set hasher.purifiers")
    for modality, purifier in hasher.purifiers.items():
        if not isinstance(purifier, Regenerator):
            raise ValueError(f"the {modality} purifier is a {type(purifier).__name__}; use drfgd-{modality}")
    for attack in attacks:
        if attack.targeted:
            raise ValueError(f"{attack.name!r} is targeted; purifiers train against an untargeted one")
    attacked = sorted(name for attack in attacks for name in attack.threat.balls)
    if attacked != sorted(hasher.purifiers):
        raise ValueError(
            f"purifiers for {sorted(hasher.purifiers)} but attacks on {attacked}: each purified modality "
            "needs one attack, training.attack, and for texts next to images training.recipe.text_attack"
        )
    return {modality: cast(Regenerator, purifier) for modality, purifier in hasher.purifiers.items()}
