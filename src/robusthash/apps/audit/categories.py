"""Kinds of photographs: the subfolders that a user sorted them into, and what lists of ids find of the same
kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from robusthash.apps.audit.photo_collection import Photos
from robusthash.evaluation.copy_detection import KindFound

_REMEDY = (
    "sort your photographs into one subfolder for each kind (FOLDER/cat, FOLDER/dog), or leave --labels out"
)


@dataclass(frozen=True, eq=False)
class Kinds:
    """Of which kind each photograph is."""

    folder: str
    counts: Mapping[str, int]  # usable photographs of each kind
    stored: Tensor  # (M, G) float, one-hot in the order of ``counts``; zeros for a photograph in no subfolder
    files: Mapping[str, str]  # the kind of every image in the folder, left out or not; "" in no subfolder

    def facts(self) -> dict[str, object]:
        """Kinds and their photographs, as JSON."""
        return {
            "photographs": dict(self.counts),
            "in no subfolder": int((self.stored.sum(1) == 0).sum()),
            "own copy": "left out",
        }

    def require_known(self, lists: Sequence[Sequence[str]], asked: str) -> None:
        """Refuse an endpoint whose answers say nothing of kinds.

        Raises:
            ValueError: an id that is no file of the folder, or lists of one id.
        """
        unknown = [each for ids in lists for each in ids if each not in self.files]
        if unknown:
            raise ValueError(
                f"{asked} answered the id {unknown[0]!r}, which is no image below {self.folder}, so its kind is "
                f"unknown; --labels needs ids that are paths below it, such as {next(iter(self.files))!r}; or leave "
                "--labels out"
            )
        if max(map(len, lists)) < 2:
            raise ValueError(
                f"{asked} answered one id to each photograph, its own copy at best, so nothing of its kind can be "
                "found; let it answer more, or leave --labels out"
            )

    def found_in(self, lists: Sequence[Sequence[str]], names: Sequence[str], width: int) -> KindFound:
        """What lists of ids, nearest first, hold of the kind of each photograph that asked, its own id left
        out.

        Args:
            names: of the photographs that asked, one for each list.
            width: ids that count. A shorter list is filled up with photographs of another kind.
        """
        items = torch.ones(len(lists), width + 1, dtype=torch.int64)
        items[:, -1] = len(self.files) - 1 - width
        relevant = torch.zeros_like(items)
        sizes = Counter(self.files.values())
        for row, (ids, name) in enumerate(zip(lists, names, strict=True)):
            kind = self.files[name]
            if kind:
                same = [self.files.get(each) == kind for each in ids if each != name][:width]
                relevant[row, : len(same)] = torch.tensor(same, dtype=torch.int64)
                relevant[row, -1] = sizes[kind] - 1 - sum(same)
        return KindFound.counted(items, relevant, width)


def read_kinds(photos: Photos) -> Kinds:
    """The first folder below the one that was named is the kind of all that lies in it.

    Raises:
        ValueError: the photographs of this package, no subfolders, or not two kinds of two usable photographs
            each.
    """
    if not photos.folder:
        raise ValueError(
            f"--labels needs --photos; the photographs of this package are of no kinds: {_REMEDY}"
        )
    kinds = [_kind(name) for name in photos.names]
    counts = dict(sorted(Counter(filter(None, kinds)).items()))
    if not counts:
        raise ValueError(
            f"{photos.folder} holds no subfolder with a usable photograph, so no kinds: {_REMEDY}"
        )
    if len(counts) == 1:
        raise ValueError(
            f"{photos.folder} holds one kind only, {next(iter(counts))!r}, and two are needed: {_REMEDY}"
        )
    if sum(count > 1 for count in counts.values()) < 2:
        said = ", ".join(f"{kind} {count}" for kind, count in counts.items())
        raise ValueError(
            f"{photos.folder} holds {len(counts)} kinds ({said}), and at least two must have two usable photographs: "
            "add some, raise --limit, or leave --labels out"
        )
    stored = torch.tensor([[kind == each for each in counts] for kind in kinds]).float()
    return Kinds(photos.folder, counts, stored, {name: _kind(name) for name in photos.files})


def _kind(name: str) -> str:
    parts = Path(name).parts
    return parts[0] if len(parts) > 1 else ""
