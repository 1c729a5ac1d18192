"""One query for the page, clean and attacked: its results, norms, flipped bits and AP."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from robusthash.apps.reports.pages import png
from robusthash.apps.service.search_service import SearchService
from robusthash.attacks import hag
from robusthash.core.runtime import Draws
from robusthash.core.types import Batch, Goal

_STEPS = 20
_MOST = 10_000  # ranks over which AP is taken


def attacked_query(
    service: SearchService, content: bytes | None, item: int | None, eps: int, k: int
) -> dict[str, Any]:
    """A query in one model: results and AP (where its labels are known) before and after an attack.

    The attack is HAG at ``eps`` of 255 with the model's weights; its pixels are rounded as a file would.

    Args:
        content: an uploaded file; None with ``item``.
        item: the id of an indexed image, whose labels give AP.

    Raises:
        NoItem: no such item, or no image of it.
        UnreadableImage, RefusedFormat: as in ``SearchService.decode``.
    """
    content = service.picture(int(item or 0)).read_bytes() if content is None else content
    clean = service.decode(content)
    labels = [] if item is None else _labels(service.item(item)["payload"])
    attacked = _attacked(service, clean, eps)
    change = attacked - clean
    codes = service.encode("image", [clean, attacked])
    flipped = int(np.unpackbits((codes[0] ^ codes[1]).numpy()).sum())
    norms = {"linf": float(change.abs().max() * 255), "l2": float(change.norm()), "flipped_bits": flipped}
    return {
        "name": service.name,
        "bits": service.model.bits,
        "clean": _searched(service, codes[0], clean, labels, item, k),
        "attacked": _searched(service, codes[1], attacked, labels, item, k),
        "change": png(change * (0.5 / max(float(change.abs().max()), 1e-6)) + 0.5).source,
        **norms,
    }


def _attacked(service: SearchService, clean: Tensor, eps: int) -> Tensor:
    hasher = service.model.hasher
    batch = Batch({"image": clean[None].to(hasher.device)}, None, torch.zeros(1, dtype=torch.int64))
    attack = hag(eps=eps / 255, steps=_STEPS, slope="one")
    adversarial = attack(hasher, batch, Goal(None, -1), None, draws=Draws(0)).inputs["image"][0].cpu()
    rounded = (adversarial * 255).round() / 255
    return rounded.clamp(min=clean - eps / 255, max=clean + eps / 255).clamp(0, 1)


def _searched(
    service: SearchService, code: Tensor, image: Tensor, labels: list[Any], item: int | None, k: int
) -> dict[str, Any]:
    results = service.search(code, k + 1, None, None, service.model.is_plain(image))
    results = [one for one in results if one["id"] != item][:k]
    for one in results:
        one["relevant"] = _shared(labels, one["payload"]) if labels else None
    ap = _average_precision(service, code, labels, item) if labels else None
    return {"image": png(image).source, "results": results, "ap": ap}


def _average_precision(service: SearchService, code: Tensor, labels: list[Any], item: int | None) -> float:
    ranked = [one for one in service.search(code, _MOST, None, ["labels"]) if one["id"] != item]
    relevant = np.array([_shared(labels, one["payload"]) for one in ranked], dtype=float)
    if not relevant.any():
        return 0.0
    precision = relevant.cumsum() / np.arange(1, len(relevant) + 1)
    return float((precision * relevant).sum() / relevant.sum())


def _labels(payload: dict[str, Any]) -> list[Any]:
    labels = payload.get("labels", [])
    return labels if isinstance(labels, list) else [labels]


def _shared(labels: list[Any], payload: dict[str, Any]) -> bool:
    return any(label in labels for label in _labels(payload))
