"""The photographs of an audit with the copies that the search stores, and their categories by subfolder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from robusthash.core.runtime import Draws
from robusthash.core.words import some_of
from robusthash.data.image_files import MAX_PIXELS, path_text, read_images
from robusthash.data.image_listing import list_images
from robusthash.data.photos import PHOTOGRAPHS, photograph_path
from robusthash.data.splits import hash_pixels
from robusthash.data.transforms import jpeg
from robusthash.evaluation.copy_detection import CategoryScores

STORED_QUALITY = 95
"""JPEG quality of the copies that are searched: what a site keeps of an upload."""

SAME_PICTURE = 0.97
"""Correlation of the pixels of two photographs, as 16 x 16 blocks, from which on they are copies. Different
ones of COCO (246) have at most 0.86, of UC Merced (700) 0.96; saved again at quality 90 at least 0.98 to
themselves."""

_BATCH = 64
_REMEDY = (
    "sort your photographs into one subfolder for each kind (FOLDER/cat, FOLDER/dog), or leave --labels out"
)


@dataclass(frozen=True, eq=False)
class Photos:
    """Different photographs in random order, and their stored copies.

    Left out are ``unreadable`` files, those with the pixels of another (``twice``), and ``flat`` ones, whose
    pixels are those of a stored copy, as saving a plain area changes nothing. Those that are nearly the same
    stay, and ``copies`` knows them.
    """

    folder: str  # "" for the packaged photographs
    paths: tuple[Path, ...]
    names: tuple[str, ...]
    pixels: Tensor  # (M, 3, S, S) uint8
    stored: Tensor  # (M, 3, S, S) uint8
    unreadable: tuple[str, ...]
    twice: tuple[str, ...]
    flat: tuple[str, ...]
    beyond: int  # left out: more than the limit
    files: tuple[str, ...]  # names of all images that lie in the folder, left out or not
    passed_over: tuple[str, ...] = ()  # other files there, with the reason
    copies: Tensor = field(default_factory=lambda: torch.empty(0, 2).long())  # (P, 2) pairs of rows

    def __len__(self) -> int:
        return len(self.paths)

    def first(self, count: int) -> Tensor:
        """(min(count, M), 3, S, S) float in [0, 1]: the first photographs."""
        return self.pixels[:count].float() / 255

    def are_copies(self, count: int) -> Tensor:
        """(count, M) bool: whether each of the first photographs and each of all are nearly the same."""
        both = torch.cat([self.copies, self.copies.flip(1)])
        both = both[both[:, 0] < count]
        mask = torch.zeros(count, len(self), dtype=torch.bool)
        mask[both[:, 0], both[:, 1]] = True
        return mask

    def at(self, size: int, max_pixels: int | None = None) -> Photos:
        """The same photographs in the same order at another size; a ValueError where one cannot be read."""
        pixels, _ = read_images(self.paths, size, on_error="raise", max_pixels=max_pixels or MAX_PIXELS)
        return replace(self, pixels=pixels, stored=_saved(pixels))

    def facts(self) -> dict[str, object]:
        """Photographs used and left out, as JSON."""
        return {
            "folder": self.folder or "the photographs of this package",
            "used": len(self),
            "unreadable": list(self.unreadable),
            "the same as another": list(self.twice),
            "nearly the same as another": sorted({self.names[row] for row in self.copies[:, 1].tolist()}),
            "pairs of copies inside the folder": len(self.copies),
            "unchanged by saving again": list(self.flat),
            "beyond the limit": self.beyond,
            "passed over": list(self.passed_over),
        }


def read_photos(
    folder: Path | None, size: int, limit: int = 1000, seed: int = 0, max_pixels: int | None = None
) -> Photos:
    """Read the images below a folder, as ``list_images`` finds them, as central squares of ``size`` pixels.

    Unreadable files are counted and named, not fatal. Of more than ``limit``, that number is drawn.

    Args:
        folder: None takes the twenty photographs of this package.
        max_pixels: as of ``read_image``, which has a default.
        seed: of the order, and so of which photographs are queries and are attacked.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no images in it, none that can be read, or fewer than two different ones.
    """
    packaged = [(photograph_path(photograph), photograph.name) for photograph in PHOTOGRAPHS]
    files, passed_over = (packaged, ()) if folder is None else _images_below(folder)
    order = torch.randperm(len(files), generator=Draws(seed, ("audit", "order")).generator())[:limit]
    drawn = [files[row] for row in order.tolist()]
    pixels, readable_rows = read_images(
        [path for path, _ in drawn], size, on_error="skip", max_pixels=max_pixels or MAX_PIXELS
    )
    readable = [drawn[row] for row in readable_rows.tolist()]
    names = [name for _, name in readable]
    stored = _saved(pixels)
    hashes, hashes_stored = hash_pixels(pixels), hash_pixels(stored)
    flat = np.isin(hashes, hashes_stored)
    first = _first_of_content(hashes) & _first_of_content(hashes_stored)
    used = np.flatnonzero(first & ~flat)
    if len(used) < 2:
        where = "the photographs of this package" if folder is None else str(folder)
        raise ValueError(
            f"{where} holds {len(used)} usable photograph{'s' * (len(used) != 1)} of {len(files)} files; an "
            "audit asks whether a search tells photographs apart, and needs at least 2 different ones, "
            "better 20 or more"
        )
    rows = torch.from_numpy(used)
    return Photos(
        folder="" if folder is None else str(folder),
        paths=tuple(readable[row][0] for row in used),
        names=tuple(names[row] for row in used),
        pixels=pixels[rows],
        stored=stored[rows],
        unreadable=tuple(sorted({name for _, name in drawn} - set(names))),
        twice=tuple(names[row] for row in np.flatnonzero(~first & ~flat)),
        flat=tuple(names[row] for row in np.flatnonzero(flat)),
        beyond=len(files) - len(drawn),
        files=tuple(name for _, name in files),
        passed_over=passed_over,
        copies=_copies(pixels[rows]),
    )


def _saved(pixels: Tensor) -> Tensor:
    """(N, 3, S, S) uint8: the copies of images of that form that a search stores."""
    saved = [jpeg(part.float() / 255, STORED_QUALITY) for part in pixels.split(_BATCH)]
    return (torch.cat(saved) * 255).round().to(torch.uint8)


def _copies(pixels: Tensor) -> Tensor:
    """(P, 2) rows of photographs that are nearly the same, by their pixels alone: no search is asked."""
    pooled = [functional.adaptive_avg_pool2d(part.float(), 16).flatten(1) for part in pixels.split(_BATCH)]
    blocks = torch.cat(pooled)
    unit = functional.normalize(blocks - blocks.mean(1, keepdim=True))
    pairs = [
        (part @ unit.T > SAME_PICTURE).nonzero() + torch.tensor([start, 0])
        for start, part in zip(range(0, len(unit), _BATCH), unit.split(_BATCH), strict=True)
    ]
    found = torch.cat(pairs)
    return found[found[:, 0] < found[:, 1]]


def _first_of_content(hashes: np.ndarray) -> np.ndarray:
    """(N,) bool: the first of each content."""
    mask = np.zeros(len(hashes), dtype=bool)
    mask[np.unique(hashes, return_index=True)[1]] = True
    return mask


def _images_below(folder: Path) -> tuple[list[tuple[Path, str]], tuple[str, ...]]:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder.absolute()}; --photos takes a folder of images")
    listing = list_images(folder)
    if not listing.images:
        raise ValueError(f"{folder} holds no image; passed over: {some_of(listing.skipped) or 'nothing'}")
    named = [(path, path_text(path.relative_to(folder))) for path in listing.images]
    return named, tuple(map(str, listing.skipped))


@dataclass(frozen=True, eq=False)
class Categories:
    """The category of each photograph: the subfolder that a user sorted it into."""

    folder: str
    counts: Mapping[str, int]  # usable photographs of each category
    stored: Tensor  # (M, G) float, one-hot in the order of ``counts``; zeros for a photograph in no subfolder
    files: Mapping[str, str]  # the category of every image in the folder, left out or not; "" in no subfolder

    def facts(self) -> dict[str, object]:
        """Categories and their photographs, as JSON."""
        return {
            "photographs": dict(self.counts),
            "in no subfolder": int((self.stored.sum(1) == 0).sum()),
            "own copy": "left out",
        }

    def require_known(self, lists: Sequence[Sequence[str]], url: str) -> None:
        """Refuse an endpoint whose answers say nothing of categories.

        Raises:
            ValueError: an id that is no file of the folder, or lists of one id.
        """
        unknown = [each for ids in lists for each in ids if each not in self.files]
        if unknown:
            raise ValueError(
                f"{url} answered the id {unknown[0]!r}, which is no image below {self.folder}, so its kind "
                "is unknown; --labels needs ids that are paths below it, such as "
                f"{next(iter(self.files))!r}; or leave --labels out"
            )
        if max(map(len, lists)) < 2:
            raise ValueError(
                f"{url} answered one id to each photograph, its own copy at best, so nothing of its kind can "
                "be found; let it answer more, or leave --labels out"
            )

    def found_in(self, lists: Sequence[Sequence[str]], names: Sequence[str], width: int) -> CategoryScores:
        """Score lists of ids, nearest first, by the category of each query; its own id is left out.

        Args:
            names: of the queries, one for each list.
            width: ids that count. A shorter list is filled up with photographs of another category.
        """
        items = torch.ones(len(lists), width + 1, dtype=torch.int64)
        items[:, -1] = len(self.files) - 1 - width
        relevant = torch.zeros_like(items)
        sizes = Counter(self.files.values())
        for row, (ids, name) in enumerate(zip(lists, names, strict=True)):
            category = self.files[name]
            if category:
                same = [self.files.get(each) == category for each in ids if each != name][:width]
                relevant[row, : len(same)] = torch.tensor(same, dtype=torch.int64)
                relevant[row, -1] = sizes[category] - 1 - sum(same)
        return CategoryScores.counted(items, relevant, width)


def read_categories(photos: Photos) -> Categories:
    """The first folder below the one that was named is the category of all that lies in it.

    Raises:
        ValueError: the photographs of this package, no subfolders, or not two categories of two usable
            photographs each.
    """
    if not photos.folder:
        raise ValueError(f"--labels needs --photos; the packaged photographs are of no kinds: {_REMEDY}")
    categories = [_category(name) for name in photos.names]
    counts = dict(sorted(Counter(filter(None, categories)).items()))
    if not counts:
        raise ValueError(f"{photos.folder} holds no subfolder with a usable photograph: {_REMEDY}")
    if len(counts) == 1:
        raise ValueError(
            f"{photos.folder} holds one kind only, {next(iter(counts))!r}, and needs two: {_REMEDY}"
        )
    if sum(count > 1 for count in counts.values()) < 2:
        counted = ", ".join(f"{category} {count}" for category, count in counts.items())
        raise ValueError(
            f"{photos.folder} holds {len(counts)} kinds ({counted}), and at least two must have two usable "
            "photographs: add some, raise --limit, or leave --labels out"
        )
    stored = torch.tensor([[category == each for each in counts] for category in categories]).float()
    return Categories(photos.folder, counts, stored, {name: _category(name) for name in photos.files})


def _category(name: str) -> str:
    parts = Path(name).parts
    return parts[0] if len(parts) > 1 else ""
