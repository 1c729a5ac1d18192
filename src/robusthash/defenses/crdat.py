"""CRDAT: codes and features of a clean teacher, distilled into a student on attacked inputs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from robusthash.attacks.base import Attack, Guide
from robusthash.attacks.losses import ObjectiveLoss
from robusthash.core.hamming import sign
from robusthash.core.registry import register
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Goal, Guidance, HashOutput, LossTerms, Outputs, Reference
from robusthash.data.base import RetrievalData
from robusthash.models.hasher import Hasher, frozen
from robusthash.objectives.base import HashObjective, quantisation
from robusthash.training.recipe import Moment, Recipe, check_modalities, train_facts


@dataclass(frozen=True)
class GivenCodes(Guide):
    """One code an item, (B, K), from elsewhere: here from the teacher."""

    codes: Tensor = field(repr=False, compare=False)

    def __call__(
        self, victim: Hasher, batch: Batch, goal: Goal, reference: Reference | None, draws: Draws
    ) -> Guidance:
        return Guidance(self.codes)


def code_distance(student: HashOutput, teacher: HashOutput) -> Tensor:
    """(B,) 1 - (1/K) h_s . sgn t, in [0, 2]."""
    return 1.0 - (student.relaxed() * sign(teacher.logits)).mean(1)


def feature_distance(student: HashOutput, teacher: HashOutput) -> Tensor:
    """(B,) 1 - cos of the features before the head, in [0, 2]."""
    return 1.0 - cosine_similarity(student.features.float(), teacher.features.float(), eps=1e-8)


@register(
    "recipe",
    "crdat",
    paper="Zhu et al., SIGIR 2025",
    evidence="reconstruction",
    supervised=False,
    state="measured",
)
class CRDAT(Recipe):
    """CRDAT, second stage: a student learns a clean teacher's codes and features on attacked inputs.

        L = 1 - (1/K) h_s(x') . sgn t(x) + features * (1 - cos(phi_s(x'), phi_t(x)))
            + quantisation * mean (h_s(x') - sgn)^2

    The first stage is an ordinary run, named by ``training.init_from``: the teacher is the hasher that
    training starts with, frozen, and the student starts as its copy. Labels are not used, so the second stage
    runs on unlabelled items. Over image and text only the nets of attacked modalities learn; the others stay
    the teacher's.

    Args:
        hasher: the trained student to be.
        objective: that of the hasher's training; it is not lowered, only attacks on it need it.
        attack: untargeted; its guide is replaced by the teacher's code sgn t(x), from which x' is driven. In
            the card 7 steps of 2/255 from a random start, here as given.
        features, quantisation: weights, 1 and 1e-4.

    Cost of a step: with T steps of the attack T + 1 forward and backward passes of the student, and one
    forward pass of the teacher. Differs: abstract alone is public (no code): that the hashing loss is absent,
    that clean representations are distilled at the level of codes and of features, and that there are two
    stages is the paper's; the forms of both distances, their weights and the attack are ours.
    """

    groups = ("hasher",)
    starts_trained = True
    data_parallel = False  # the teacher is called apart from the hasher

    def __init__(
        self,
        hasher: Hasher,
        objective: HashObjective,
        attack: Attack,
        features: float = 1.0,
        quantisation: float = 1e-4,
    ) -> None:
        if attack.targeted:
            raise ValueError(
                f"{attack.name!r} is targeted, and CRDAT drives items from the teacher's code: take an "
                "untargeted attack such as 'hag' or 'mainstay'"
            )
        if isinstance(attack.loss, ObjectiveLoss):
            raise ValueError(
                f"{attack.name!r} attacks the hashing objective, and CRDAT drives items from the teacher's "
                "code: take 'mainstay' or 'hag'"
            )
        if min(features, quantisation) < 0.0:
            raise ValueError(f"weights must not be negative, got {features:g} and {quantisation:g}")
        self.hasher = hasher
        self.objective = objective
        self.attack = attack
        self.weights = {"features": float(features), "quantisation": float(quantisation)}
        self.teacher = copy.deepcopy(hasher).requires_grad_(False)
        if hasher.declared == "plain":
            hasher.declared = hasher.spec["declared"] = "adversarial"

    def modules(self) -> dict[str, nn.Module]:
        return {"hasher": self.hasher, "teacher": self.teacher, "objective": self.objective}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        parts = [
            self.hasher.get_submodule(f"{kind}.{name}")
            for name in self.attack.threat.balls
            for kind in ("encoders", "heads")
        ]
        return {"hasher": [parameter for part in parts for parameter in part.parameters()]}

    def setup(self, data: RetrievalData, seed: int, batch_size: int) -> None:
        check_modalities(self.hasher, data)
        self.teacher.to(self.hasher.device)
        if data.train.labels is not None or not self.objective.supervised:
            self.objective.to(self.hasher.device).setup(train_facts(data.train, self.hasher, seed))
            self.objective.to(self.hasher.device)  # what setup made

    def step(self, batch: Batch, moment: Moment) -> Iterator[tuple[str, LossTerms]]:
        batch = batch.only(self.attack.threat.balls)
        with frozen(self.teacher), torch.no_grad():
            clean: Outputs = self.teacher(batch.inputs)
        codes = torch.stack([output.relaxed() for output in clean.values()]).mean(0)
        attack = replace(self.attack, guide=GivenCodes(sign(codes)))
        result = attack.perturb(self.hasher, batch, Goal(batch.labels, -1), None, draws=moment.draws)
        self.hasher.train()
        robust = self.hasher({name: value.detach() for name, value in result.inputs.items()})
        pairs = [(output, clean[name]) for name, output in robust.items()]
        terms = {
            "codes": torch.stack([code_distance(*pair).mean() for pair in pairs]).mean(),
            "features": torch.stack([feature_distance(*pair).mean() for pair in pairs]).mean(),
            "quantisation": torch.stack([quantisation(output).mean() for output in robust.values()]).mean(),
        }
        yield "hasher", {name: self.weights.get(name, 1.0) * value for name, value in terms.items()}
