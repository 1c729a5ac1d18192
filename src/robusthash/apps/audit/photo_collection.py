"""The photographs of an audit: a user's folder, or the packaged ones, with the copies that the search
stores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robusthash.core.runtime import Draws
from robusthash.data.image_files import SUFFIXES, read_images
from robusthash.data.photos import PHOTOGRAPHS, photograph_path
from robusthash.data.splits import hash_pixels
from robusthash.data.transforms import jpeg

STORED_QUALITY = 95
"""JPEG quality of the copies that are searched: what a site keeps of an upload."""

_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class Photos:
    """Different photographs in random order, and their stored copies."""

    folder: str  # "" for the packaged photographs
    paths: tuple[Path, ...]
    names: tuple[str, ...]
    pixels: Tensor  # (M, 3, S, S) uint8
    stored: Tensor  # (M, 3, S, S) uint8
    unreadable: tuple[str, ...]
    twice: tuple[str, ...]  # left out: the pixels of another photograph
    flat: tuple[
        str, ...
    ]  # left out: their pixels are those of a stored copy, as saving a plain area changes nothing
    beyond: int  # left out: more than the limit
    files: tuple[str, ...]  # names of all that lie in the folder, left out or not

    def __len__(self) -> int:
        return len(self.paths)

    def asking(self, count: int) -> Tensor:
        """(min(count, M), 3, S, S) float in [0, 1]: the first photographs."""
        return self.pixels[:count].float() / 255

    def facts(self) -> dict[str, object]:
        """What was used and what was not, as JSON."""
        return {
            "folder": self.folder or "the photographs of this package",
            "used": len(self),
            "unreadable": list(self.unreadable),
            "the same as another": list(self.twice),
            "unchanged by saving again": list(self.flat),
            "beyond the limit": self.beyond,
        }


def read_photos(folder: Path | None, size: int, limit: int = 1000, seed: int = 0) -> Photos:
    """Read the images below a folder, hidden files apart, as central squares of ``size`` pixels.

    Unreadable files are counted and named, not fatal. Where there are more than ``limit``, so many are drawn.

    Args:
        folder: None takes the twenty photographs of this package.
        seed: of the order, and so of which photographs ask and are attacked.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no images in it, none that can be read, or fewer than two different ones.
    """
    where = "the photographs of this package" if folder is None else str(folder)
    found = _packaged() if folder is None else _below(folder)
    order = torch.randperm(len(found), generator=Draws(seed, ("audit", "order")).generator())[:limit]
    chosen = [found[row] for row in order.tolist()]
    pixels, kept = read_images([path for path, _ in chosen], size, on_error="skip")
    readable = [chosen[row] for row in kept.tolist()]
    unreadable = tuple(sorted({name for _, name in chosen} - {name for _, name in readable}))
    saved = [jpeg(part.float() / 255, STORED_QUALITY) for part in pixels.split(_AT_ONCE)]
    stored = (torch.cat(saved) * 255).round().to(torch.uint8)
    own, copies = hash_pixels(pixels), hash_pixels(stored)
    flat = np.isin(own, copies)
    first = _first(own) & _first(copies)
    use = np.flatnonzero(first & ~flat)
    if len(use) < 2:
        raise ValueError(
            f"{where} holds {len(use)} usable photograph{'s' * (len(use) != 1)} of {len(found)} files; an audit asks "
            "whether a search tells photographs apart, and needs at least 2 different ones, better 20 or more"
        )
    rows = torch.from_numpy(use)
    names = [name for _, name in readable]
    return Photos(
        folder="" if folder is None else str(folder),
        paths=tuple(readable[row][0] for row in use),
        names=tuple(names[row] for row in use),
        pixels=pixels[rows],
        stored=stored[rows],
        unreadable=unreadable,
        twice=tuple(names[row] for row in np.flatnonzero(~first & ~flat)),
        flat=tuple(names[row] for row in np.flatnonzero(flat)),
        beyond=len(found) - len(chosen),
        files=tuple(name for _, name in found),
    )


def _first(hashes: np.ndarray) -> np.ndarray:
    """(N,) bool: the first of each content."""
    mask = np.zeros(len(hashes), dtype=bool)
    mask[np.unique(hashes, return_index=True)[1]] = True
    return mask


def _packaged() -> list[tuple[Path, str]]:
    return [(photograph_path(photograph), photograph.name) for photograph in PHOTOGRAPHS]


def _below(folder: Path) -> list[tuple[Path, str]]:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder.absolute()}; --photos takes a folder of images")
    inside = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    shown = [
        path for path in inside if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not shown:
        raise ValueError(f"{folder} holds no image ({', '.join(sorted(SUFFIXES))})")
    return [(path, str(path.relative_to(folder))) for path in shown]
