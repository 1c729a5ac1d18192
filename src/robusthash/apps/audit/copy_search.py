"""A bench of copies with the photographs behind it: measured rows, and the pictures that show them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robusthash.apps.audit.measured_rows import Done, Example, Role, Row, Shot, make_row
from robusthash.apps.audit.photo_collection import Photos
from robusthash.apps.experiment.demo_run import colour_variety
from robusthash.core.hamming import topk
from robusthash.data.image_files import read_image
from robusthash.evaluation.attack_block import AttackedBlock, in_8bit
from robusthash.evaluation.attack_spec import AttackSpec
from robusthash.evaluation.context import EvaluationContext
from robusthash.evaluation.copy_detection import CopiesFound, copies_found

_HITS = 5  # results shown for each search


@dataclass(frozen=True)
class Hostile:
    """What one attack came back with, as files of eight bits, scored."""

    line: AttackSpec
    name: str
    found: CopiesFound
    images: Tensor  # (Q, 3, S, S) as a file of eight bits


@dataclass(frozen=True)
class Scene:
    """A bench of copies with the photographs behind it."""

    context: EvaluationContext
    photos: Photos
    radius: int
    kinds: Tensor | None = None  # (M, G) one-hot kind of each stored copy, where they are known

    @property
    def images(self) -> Tensor:
        return self.photos.asking(len(self.context.queries))

    def first(self, count: int) -> Scene:
        """The same with the first photographs alone; they are in random order."""
        return replace(self, context=self.context.at(torch.arange(count)))

    def found(self, signs: Tensor, labels: Tensor) -> CopiesFound:
        """What codes find: the copies that ``labels`` name, and the kinds where they are known."""
        return copies_found(self.context, signs, labels, self.kinds)

    def row(self, name: str, words: str, visible: str, kind: Done, signs: Tensor, images: Tensor) -> Row:
        found = self.found(signs, self.context.query_labels)
        return make_row(name, words, visible, kind, found, self.radius, (self.images, images))

    def hostile(self, line: AttackSpec, restart: int, attacked: AttackedBlock) -> Hostile:
        """Attacked photographs as files of eight bits, scored against their own copy, or the target's."""
        images = in_8bit(self.images, attacked.inputs.cpu())
        labels = self.context.targets[:, 0] if line.targeted else self.context.query_labels
        found = self.found(attacked.codes_8bit[:, 0].float(), labels)
        return Hostile(
            line, line.name if line.restarts == 1 else f"{line.name}, start {restart + 1}", found, images
        )

    def hostile_row(self, name: str, words: str, kind: Done, found: CopiesFound, images: Tensor) -> Row:
        visible = "no" if words == "nothing" else "hardly"
        return make_row(name, words, visible, kind, found, self.radius, (self.images, images))

    def everyday(self, row: Row, signs: Tensor, images: Tensor) -> Example:
        """A photograph that this change harms."""
        found = self.found(signs, self.context.query_labels)
        chosen, which = self._chosen(found, hidden=True)
        text = f"The everyday change that costs this search most: {row.words}. Shown is {which}."
        return self._example("An everyday change", text, chosen, images[chosen], found.packed[chosen], None)

    def attacked(self, found: CopiesFound, images: Tensor, targeted: bool, eps: float) -> Example:
        """A photograph on which the attack succeeded, where there is one."""
        chosen, which = self._chosen(found, hidden=not targeted)
        level = f"no pixel by more than {eps * 255:g} of 255 brightness levels"
        if not targeted:
            text = f"Changed on purpose so that the search misses it, {level}. Shown is {which}."
            return self._example(
                "Hidden on purpose", text, chosen, images[chosen], found.packed[chosen], None
            )
        wanted = int(self.context.targets[chosen, 0].argmax())
        name = self.photos.names[wanted]
        text = f"Changed on purpose so that the search takes it for {name}, {level}. Shown is {which}."
        return self._example("Taken for another", text, chosen, images[chosen], found.packed[chosen], wanted)

    def _chosen(self, found: CopiesFound, hidden: bool) -> tuple[int, str]:
        """A photograph for the pictures, and the rule it was chosen by."""
        wins = {
            "something else came first" if hidden else "that one came first": found.first,
            "its copy no longer counted as the same" if hidden else "it counted as the same": found.within(
                self.radius
            ),
        }
        for said, progress in wins.items():
            success = progress < 0.5 if hidden else progress > 0.5
            if success.any():
                chosen = int(torch.where(success, colour_variety(self.images), -1.0).argmax())
                count = int(success.sum())
                return (
                    chosen,
                    f"the {'only one' if count == 1 else f'most colourful of the {count}'} where {said}",
                )
        score = found.ap - 1e-6 * found.bits
        furthest = int(score.argmin() if hidden else score.argmax())
        return furthest, "the one on which this went furthest; nothing was gained by it on any"

    def _example(
        self, title: str, text: str, row: int, changed: Tensor, packed: Tensor, target: int | None
    ) -> Example:
        original = self.images[row]
        largest = float((changed - original).abs().max())
        return Example(
            title,
            text,
            original,
            changed,
            min(32.0, 0.5 / largest) if largest else 1.0,
            self._shots(self.context.query.packed[row], row, target),
            self._shots(packed, row, target),
        )

    def _shots(self, packed: Tensor, own: int, target: int | None) -> tuple[Shot, ...]:
        database = self.context.database
        ids, distances = topk(packed[None], database.packed, min(_HITS, len(database)))
        shots = []
        for item, far in zip(ids[0].tolist(), distances[0].tolist(), strict=True):
            picture = read_image(self.photos.paths[item], 112)
            role: Role = "own" if item == own else "target" if item == target else "other"
            shots.append(Shot(picture, self.photos.names[item], far, role))
        return tuple(shots)
