"""An encoded collection -> index: items by their ids, so that it may be repeated."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robusthash.apps.collection.encoded_parts import CodesFolder
from robusthash.apps.experiment.index_items import path_payload
from robusthash.core.runtime import Progress, silent
from robusthash.index import CodeIndex


def readable_codes(codes: str | Path, origin: str | None = None) -> CodesFolder:
    """The folder of an encoded collection, of whose parts one at least is encoded and can be read.

    Raises:
        ValueError: codes of another model than ``origin``, a damaged part, or none that is encoded.
    """
    folder = CodesFolder.open(codes)
    if origin not in (None, folder.card.origin):
        held = f"(origin {folder.card.origin}, of the run {origin})"
        raise ValueError(f"{folder.path} holds codes of another model {held}; name the run that encoded them")
    done = [name for name in folder.card.parts if folder.status(name).get("state") == "done"]
    if not done:
        raise ValueError(f"no part of {folder.path} is encoded yet; 'robusthash encode' goes on with it")
    folder.read(done[0])
    return folder


def add_codes(
    index: CodeIndex,
    codes: str | Path,
    root: Path | None = None,
    progress: Progress = silent,
    origin: str | None = None,
) -> dict[str, Any]:
    """Add the codes of ``encode_collection`` under their own ids; an item that is held is replaced.

    Args:
        codes: the folder of the codes.
        root: folder of the images that the paths in the payload begin with; by default that of the encoding.
        origin: digest of the model that must have made them.

    Returns:
        ``added`` and ``updated`` items, ``repeated`` names (of another part, left out), and the parts that
        are ``not_encoded``, or ``stale``: encoded before the collection listed other images in them. Those
        are left out too.

    Raises:
        ValueError: codes of another model or length, damaged files, or no part that is encoded.
    """
    folder = readable_codes(codes, origin)
    index.add(folder.no_codes(), keys=[])  # refuses codes of another model before anything is read
    counts, repeated = {"added": 0, "updated": 0}, list[str]()
    absent, stale = list[str](), list[str]()
    added_ids = np.zeros(0, dtype=np.int64)  # in order
    for done, name in enumerate(folder.card.parts, start=1):
        state = folder.status(name).get("state")
        if state != "done":
            (stale if state == "stale" else absent).append(name)
            continue
        ids, here, again = add_part(index, folder, name, root, added_ids)
        added = np.sort(ids.numpy())
        added_ids = np.insert(added_ids, np.searchsorted(added_ids, added), added)
        repeated += again
        counts["updated"] += here
        counts["added"] += len(ids) - here
        progress(done, len(folder.card.parts), "adding parts")
    return {**counts, "repeated": repeated, "not_encoded": absent, "stale": stale}


def add_part(
    index: CodeIndex,
    folder: CodesFolder,
    name: str,
    root: Path | None = None,
    added_ids: np.ndarray | None = None,
) -> tuple[torch.Tensor, int, list[str]]:
    """Add one part; the ids, how many of them were held, and the names left out as added before.

    Args:
        added_ids: (N,) int64 ids that were added before, in ascending order.
    """
    part, base = folder.read(name), Path(folder.card.root if root is None else os.path.abspath(root))
    new = np.ones(len(part.codes), dtype=bool)
    if added_ids is not None:
        ids = part.codes.ids.numpy()
        new = np.searchsorted(added_ids, ids, "left") == np.searchsorted(added_ids, ids, "right")
    rows = np.flatnonzero(new).tolist()
    payload = [{**part.payload[row], **path_payload(base / part.names[row])} for row in rows]
    if not rows:
        return part.codes.ids[:0], 0, part.names
    codes = replace(part.codes, packed=part.codes.packed[rows], ids=part.codes.ids[rows])
    added = index.add(codes, payload, on_duplicate="update")
    again = [name for name, is_new in zip(part.names, new.tolist(), strict=True) if not is_new]
    return added.ids, int(added.held.sum()), again
