"""Where the two branches of a regenerating purifier look: heat maps, kept with the run and shown in its
report."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from robusthash.apps.experiment.run_directory import RunError
from robusthash.apps.reports import html
from robusthash.apps.reports.html import Markup, tag
from robusthash.core.atomic_files import write_aside
from robusthash.data.base import Split
from robusthash.data.splits import stable_subset
from robusthash.models.drfgd import ImageRegenerator
from robusthash.models.hasher import Hasher, frozen

FILE = "branches.npz"
_SHOWN = 5


def save_branches(folder: Path, victim: Hasher, queries: Split) -> None:
    """Write ``branches.npz``: a few query images, what the purifier makes of them, and a heat map of each
    branch.

    The images are chosen by content. A hasher without such a purifier leaves no file. Maps are (n, H, W) in
    [0, 1], the mean |activation| over channels between its least and its largest value in the image.
    """
    if "image" not in victim.purifiers or not isinstance(victim.purifiers["image"], ImageRegenerator):
        return
    purifier = victim.purifiers["image"]
    images = queries.batch(stable_subset(queries, _SHOWN)).inputs["image"].to(victim.device)
    with frozen(victim), torch.no_grad():
        robust, fragile = purifier.views(images)
        sample = purifier.regenerate(images).sample
    size = (images.shape[-2], images.shape[-1])
    arrays = {
        "images": images,
        "samples": sample,
        "robust": _heat(robust, size),
        "fragile": _heat(fragile, size),
    }
    with write_aside(folder / FILE) as aside:
        np.savez(aside, allow_pickle=False, **{name: value.cpu().numpy() for name, value in arrays.items()})


def _heat(view: Tensor, size: tuple[int, int]) -> Tensor:
    low, high = view.flatten(1).amin(1)[:, None, None], view.flatten(1).amax(1)[:, None, None]
    scaled = (view - low) / (high - low).clamp_min(1e-12)
    return interpolate(scaled[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def branches_section(folder: Path) -> Markup | None:
    """The heat maps of a run as a section of its report, or None where it has none.

    Raises:
        RunError: a file that cannot be read.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            kept = {
                name: torch.from_numpy(arrays[name]) for name in ("images", "samples", "robust", "fragile")
            }
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise RunError(f"{path} is damaged ({error}); evaluate the run again") from None
    rows = {
        "query": kept["images"],
        "made anew": kept["samples"],
        "robust branch": _over(kept["images"], kept["robust"]),
        "fragile branch": _over(kept["images"], kept["fragile"]),
    }
    shots = [
        tag("figure", html.picture(image, f"query {number}, {name}"), tag("figcaption", name))
        for name, images in rows.items()
        for number, image in enumerate(images)
    ]
    remark = (
        "Mean |activation| of a branch over its channels, bright where it is large, scaled within each image. What is "
        "hashed is made from the encoding and the robust branch; the fragile branch serves training only."
    )
    return html.section(
        "Where the branches look", tag("p", remark, class_="note"), tag("div", *shots, class_="shots")
    )


def _over(images: Tensor, heat: Tensor) -> Tensor:
    """(n, 3, H, W) images in grey, dimmed, with the heat on them from dark over orange to yellow."""
    grey = images.mean(1, keepdim=True)
    colour = torch.stack([heat, 0.8 * heat.square(), 0.1 * heat], 1)
    return (0.35 * grey + 0.65 * colour).clamp(0, 1)
