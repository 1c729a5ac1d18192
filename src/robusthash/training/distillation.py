"""UKD: train an unsupervised teacher, then a student on the neighbours by the teacher's features."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from robusthash.core.registry import build, name_of, register
from robusthash.core.types import Batch, LossTerms
from robusthash.data.base import RetrievalData
from robusthash.models.hasher import Hasher
from robusthash.objectives.base import HashObjective
from robusthash.objectives.ukd import UKD
from robusthash.objectives.unsupervised import fixed_features
from robusthash.training.recipe import HashingRecipe, Moment


@register("recipe", "ukd", paper="Hu et al., CVPR 2020", evidence="paper+code", state="measured")
class Distilled(HashingRecipe):
    """UKD: a teacher of the same shape learns without labels; the student then learns its neighbours.

    Args:
        objective: ``ukd``, of the student.
        teacher: an unsupervised objective or its settings.
        teacher_epochs: length of the teacher's training, in the group "teacher"; less than the run's epochs.

    Cost: both nets' training, and one pass of the teacher over the training items.
    """

    groups = ("hasher", "teacher")
    data_parallel = False  # the teacher is called next to the hasher

    def __init__(
        self,
        hasher: Hasher,
        objective: HashObjective,
        teacher: str | Mapping[str, Any] = "djsrh",
        teacher_epochs: int = 10,
    ) -> None:
        super().__init__(hasher, objective)
        if not isinstance(objective, UKD):
            raise ValueError(f"recipe 'ukd' trains training.objective: ukd, not {name_of(objective)}")
        if teacher_epochs < 1:
            raise ValueError(f"teacher_epochs must be at least 1, got {teacher_epochs}")
        teacher_objective = build("objective", teacher)
        if teacher_objective.supervised:
            raise ValueError(
                f"the teacher of 'ukd' is unsupervised, and {name_of(teacher_objective)} needs labels"
            )
        self.student = objective
        self.teacher_epochs = teacher_epochs
        self.teacher = HashingRecipe(copy.deepcopy(hasher), teacher_objective)

    def modules(self) -> dict[str, nn.Module]:
        teacher = {f"teacher {name}": module for name, module in self.teacher.modules().items()}
        return {**super().modules(), **teacher}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {**super().parameter_groups(), "teacher": self.teacher.parameter_groups()["hasher"]}

    def setup(self, data: RetrievalData, seed: int, batch_size: int) -> None:
        super().setup(data, seed, batch_size)
        self.teacher.hasher.to(self.hasher.device)
        self.teacher.setup(data, seed, batch_size)
        self.items = data.train

    def step(self, batch: Batch, moment: Moment) -> Iterator[tuple[str, LossTerms]]:
        if moment.epoch >= self.teacher_epochs:
            yield from super().step(batch, moment)
        else:
            for _, terms in self.teacher.step(batch, moment):
                yield "teacher", {f"teacher {name}": term for name, term in terms.items()}

    def end_epoch(self, epoch: int) -> None:
        if epoch >= self.teacher_epochs:
            super().end_epoch(epoch)
            return
        self.teacher.end_epoch(epoch)
        if epoch == self.teacher_epochs - 1:
            encoders = dict(self.teacher.hasher.encoders)
            self.student.teach({name: fixed_features(self.items, name, "net", encoders) for name in encoders})
