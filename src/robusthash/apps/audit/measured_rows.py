"""The plan of an audit, and its measured rows and pictures, by a search over stored copies of photographs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from robusthash.apps.audit.photo_collection import Categories, Photos
from robusthash.apps.audit.targets import AuditOptions, Target
from robusthash.apps.experiment.demo_run import colour_variety
from robusthash.core.embeddings import nearest
from robusthash.core.runtime import Draws, Progress
from robusthash.data.image_files import read_image
from robusthash.data.transforms import EVERYDAY, noise
from robusthash.evaluation.attack_block import AttackedBlock, in_8bit
from robusthash.evaluation.attack_spec import AttackSpec
from robusthash.evaluation.context import EvaluationContext
from robusthash.evaluation.copy_detection import CategoryScores, CopyScores, copy_scores
from robusthash.metrics.distortion import pixel_norms
from robusthash.metrics.results import Flag

Change = Literal[
    "same",
    "everyday",
    "noise",
    "hide",
    "hide-worst",
    "hide-saved",
    "imitate",
    "imitate-worst",
    "imitate-saved",
]
Columns = tuple[str, str, str, Change]
"""First columns of a row: name, words for readers, how visible it is, what it is."""

Role = Literal["own", "target", "other"]

_HITS = 5  # results drawn for each search


@dataclass(frozen=True)
class AuditRow:
    """Effect of one change on a search. Shares are of the photographs that were searched for."""

    name: str
    words: str
    visible: str
    kind: Change
    asked: int  # photographs that were searched for
    map: float  # mean of 1 / rank: of the own copy, or under ``imitate`` of the other photograph's
    first: float  # share whose copy (or target) came first
    recognised: float | None = None  # share within the radius; None where there are no codes
    bits: float | None = None  # mean distance to the copy (or target): bits, or that of vectors
    largest: float = 0.0  # largest change of a pixel, of 255
    psnr: float | None = None  # dB, of the mean squared change over all photographs; None without a change
    per_photo: tuple[float, ...] = ()  # 1 / rank of each
    same_kind: float | None = None  # MAP of finding the others of a category; None without categories
    same_kind_chance: float | None = None  # that of a random order
    same_kind_each: tuple[float | None, ...] = ()  # AP of each; None for the only one of its category


@dataclass(frozen=True)
class Shot:
    """One picture that a search returned."""

    picture: Tensor  # (3, h, w) uint8
    name: str
    distance: float
    role: Role


@dataclass(frozen=True)
class AuditExample:
    """A photograph, what was done to it, and what the search returned before and after."""

    title: str
    text: str
    original: Tensor  # (3, S, S) float
    changed: Tensor
    gain: float  # by which the difference is amplified
    before: tuple[Shot, ...]
    after: tuple[Shot, ...]


def category_columns(answers: CategoryScores | None) -> dict[str, Any]:
    """The columns of a row on photographs of the same category; nothing without categories."""
    if answers is None:
        return {}
    each = tuple(None if math.isnan(value) else value for value in answers.ap.tolist())
    if all(value is None for value in each):
        return {"same_kind_each": each}
    mean, chance = float(answers.ap.nanmean()), float(answers.chance.nanmean())
    return {"same_kind": mean, "same_kind_chance": chance, "same_kind_each": each}


def difference(before: Tensor, after: Tensor) -> dict[str, Any]:
    """Columns of a row: largest change of a pixel in levels of 255, and PSNR in dB.

    Args:
        before, after: (Q, 3, S, S) float in [0, 1].
    """
    norms = [pixel_norms(a, b) for a, b in zip(before.split(32), after.split(32), strict=True)]
    mse = float(torch.cat([each["mse"] for each in norms]).mean())
    largest = float(torch.cat([each["linf"] for each in norms]).amax()) * 255
    return {"largest": largest, "psnr": None if mse == 0 else -10 * math.log10(mse)}


def worst_of(
    answers: Sequence[CopyScores], imitate: bool = False, by_radius: bool = False
) -> tuple[CopyScores, Tensor]:
    """Each photograph's worst case over several attacks, and which attack it was: by rank, or by bits where
    matches are those within a radius.

    Rank, coming first and distance are each taken at their own worst, which for imitation is their best. The
    category is taken at its worst in both.
    """
    ap, bits = torch.stack([each.ap for each in answers]), torch.stack([each.bits for each in answers])
    first = torch.stack([each.first for each in answers])
    # of equal ranks, the attack that moved more bits
    score = (ap if imitate else -ap) + (bits if not imitate else -bits).double() * (
        1e9 if by_radius else 1e-9
    )
    winner = score.argmax(0)
    rows = torch.stack([each.rows for each in answers])[winner, torch.arange(len(winner))]
    kinds = [each.kind for each in answers if each.kind is not None]
    kind = (
        CategoryScores(torch.stack([each.ap for each in kinds]).amin(0), kinds[0].chance) if kinds else None
    )
    if imitate:
        return CopyScores(ap.amax(0), first.amax(0), bits.amin(0), rows, kind), winner
    return CopyScores(ap.amin(0), first.amin(0), bits.amax(0), rows, kind), winner


@dataclass(frozen=True)
class AttackResult:
    """Photographs that one attack changed, as 8-bit files, and how the search answers them."""

    spec: AttackSpec
    name: str
    answers: CopyScores
    images: Tensor  # (Q, 3, S, S) as an 8-bit file


@dataclass(frozen=True)
class CopySearch:
    """A search over stored copies, with the photographs behind it."""

    context: EvaluationContext
    photos: Photos
    radius: float
    categories: Tensor | None = None  # (M, G) one-hot category of each stored copy, where they are known

    @property
    def images(self) -> Tensor:
        return self.photos.first(len(self.context.queries))

    def first(self, count: int) -> CopySearch:
        """The same with the first photographs alone; they are in random order."""
        return replace(self, context=self.context.at(torch.arange(count)))

    def find(self, signs: Tensor, labels: Tensor | None = None) -> CopyScores:
        """Search for the copies that ``labels`` name, the own ones by default."""
        labels = self.context.query_labels if labels is None else labels
        return copy_scores(self.context, signs, labels, self.categories)

    def row(self, columns: Columns, answers: CopyScores, images: Tensor) -> AuditRow:
        """The row of one change. ``images``: after it."""
        per_query = answers.ap, answers.first, answers.within(self.radius), answers.bits.double()
        ap, first, recognised, bits = (float(values.mean()) for values in per_query)
        others = {**difference(self.images, images), **category_columns(answers.kind)}
        per_photo = tuple(answers.ap.tolist())
        return AuditRow(*columns, len(answers.ap), ap, first, recognised, bits, per_photo=per_photo, **others)

    def score(self, spec: AttackSpec, restart: int, attacked: AttackedBlock) -> AttackResult:
        """Score attacked photographs as 8-bit files against their own copy, or the target's."""
        images = in_8bit(self.images, attacked.inputs.cpu())
        labels = self.context.targets[:, 0] if spec.targeted else None
        name = spec.name if spec.restarts == 1 else f"{spec.name}, start {restart + 1}"
        return AttackResult(spec, name, self.find(attacked.codes_8bit[:, 0].float(), labels), images)

    def everyday_example(self, words: str, signs: Tensor, images: Tensor) -> AuditExample:
        """A photograph that this change harms."""
        answers = self.find(signs)
        row, rule = self._pick(answers, hidden=True)
        text = f"The everyday change that costs this search most: {words}. Shown is {rule}."
        return self._example("An everyday change", text, row, images[row], answers.rows[row])

    def attacked_example(
        self, answers: CopyScores, images: Tensor, targeted: bool, eps: float
    ) -> AuditExample:
        """A photograph on which the attack succeeded, where there is one."""
        row, rule = self._pick(answers, hidden=not targeted)
        target = int(self.context.targets[row, 0].argmax()) if targeted else None
        aim = "misses it" if target is None else f"takes it for {self.photos.names[target]}"
        level = f"no pixel by more than {eps * 255:g} of 255 brightness levels"
        text = f"Changed on purpose so that the search {aim}, {level}. Shown is {rule}."
        title = "Taken for another" if targeted else "Hidden on purpose"
        return self._example(title, text, row, images[row], answers.rows[row], target)

    def _pick(self, answers: CopyScores, hidden: bool) -> tuple[int, str]:
        """A photograph for the pictures, and the rule it was picked by."""
        within = answers.within(self.radius)
        if hidden:
            events = {"something else came first": answers.first < 0.5}
            events["its copy no longer counted as the same"] = within < 0.5
        else:
            events = {"that one came first": answers.first > 0.5, "it counted as the same": within > 0.5}
        for event, success in events.items():
            if success.any():
                row = int(torch.where(success, colour_variety(self.images), -1.0).argmax())
                count = int(success.sum())
                rule = "only one" if count == 1 else f"most colourful of the {count}"
                return row, f"the {rule} where {event}"
        score = answers.ap - 1e-6 * answers.bits
        furthest = int(score.argmin() if hidden else score.argmax())
        return furthest, "the one on which this went furthest; nothing was gained by it on any"

    def _example(
        self, title: str, text: str, row: int, changed: Tensor, asked: Tensor, target: int | None = None
    ) -> AuditExample:
        original = self.images[row]
        largest = float((changed - original).abs().max())
        gain = min(32.0, 0.5 / largest) if largest else 1.0
        before = self._shots(self.context.query.rows()[row], row, target)
        return AuditExample(title, text, original, changed, gain, before, self._shots(asked, row, target))

    def _shots(self, asked: Tensor, own: int, target: int | None) -> tuple[Shot, ...]:
        database = self.context.database
        ids, distances = nearest(self.context.query.of(asked[None]), database, min(_HITS, len(database)))
        roles: dict[int | None, Role] = {target: "target", own: "own"}
        shots = []
        for item, distance in zip(ids[0].tolist(), distances[0].tolist(), strict=True):
            picture = read_image(self.photos.paths[item], 112)
            shots.append(Shot(picture, self.photos.names[item], distance, roles.get(item, "other")))
        return tuple(shots)


_BY_SIZE = ("resize", "blur")  # changes whose effect goes with the size of what is changed


@dataclass(frozen=True)
class AuditPlan:
    """An opened target, and the photographs and options to measure it with."""

    target: Target
    photos: Photos
    categories: Categories | None
    options: AuditOptions
    progress: Progress

    @property
    def images(self) -> Tensor:
        """(Q, 3, S, S) float: the photographs that are searched for."""
        return self.photos.first(self.options.tier.queries)

    @property
    def by_radius(self) -> bool:
        """Pictures within a radius that somebody has set count as the same."""
        return self.target.radius is not None or self.options.radius is not None

    def changes(self) -> list[tuple[Columns, Callable[[Tensor], Tensor]]]:
        """Everyday changes and noise: the first columns of the row of each, and the change."""
        eps, draws = self.options.eps, Draws(self.options.seed, ("audit",))

        def noisy(images: Tensor) -> Tensor:
            return noise(images, torch.arange(len(images)), eps, draws)

        words = f"random noise of {eps * 255:g} of 255 brightness levels"
        everyday: list[tuple[Columns, Callable[[Tensor], Tensor]]]
        size = f" (at the model's size, {self.images.shape[-1]} px)"  # quickstart changes larger ones
        everyday = [
            ((each.name, each.words + size * (each.name in _BY_SIZE), each.visible, "everyday"), each)
            for each in EVERYDAY
        ]
        return [*everyday, (("noise", words, "slight grain", "noise"), noisy)]


@dataclass(frozen=True)
class MeasuredAudit:
    """Rows and pictures of an audit, with what was noted and checked."""

    rows: tuple[AuditRow, ...]
    examples: tuple[AuditExample, ...] = ()
    remarks: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    radius: float | None = None
    false_matches: float | None = None
    flags: tuple[Flag, ...] = ()
