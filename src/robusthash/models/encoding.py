"""A split -> packed codes, streamed: memory is one batch and the codes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robusthash.core.embeddings import Embeddings, Searched
from robusthash.core.hamming import pack
from robusthash.core.out_of_memory import halving, warn
from robusthash.core.runtime import precision
from robusthash.core.types import Codes
from robusthash.data.base import Split, batches
from robusthash.models.hasher import Hasher, frozen


def encode_signs(victim: Hasher, modality: str, inputs: Tensor, batch_size: int | None = None) -> Tensor:
    """(B, ...) inputs of one modality -> (B, K) codes on the CPU, in eval mode, without a graph.

    Codes are int8 signs; of a victim that is searched by its numbers they are those, float32.

    Args:
        batch_size: inputs that are moved to the victim's device and encoded at a time; all by default.
    """
    with frozen(victim), torch.no_grad():
        parts = inputs.split(batch_size or max(1, len(inputs)))
        logits = [victim({modality: part.to(victim.device)})[modality].logits for part in parts]
        kind = torch.int8 if victim.distance == "hamming" else torch.float32
        return torch.cat([victim.compared(part).to("cpu", kind) for part in logits])


def encode_split(victim: Hasher, split: Split, **options: Any) -> dict[str, Codes]:
    """``encode_searched`` of a model that is searched by bits.

    Raises:
        ValueError: as ``encode_searched``; a model that is searched by its numbers, which have no codes.
    """
    encoded = encode_searched(victim, split, **options)
    codes = {name: rows for name, rows in encoded.items() if isinstance(rows, Codes)}
    if len(codes) < len(encoded):
        raise ValueError(
            f"this model is searched by the {victim.distance} distance of its numbers, and has no binary "
            "codes; encode it by encode_searched, or wrap it with output='signs'"
        )
    return codes


def encode_searched(
    victim: Hasher,
    split: Split,
    *,
    batch_size: int = 256,
    modality: str | None = None,
    dtype: str = "float32",
    progress: Callable[[int, int], None] | None = None,
    origin: str = "",
) -> dict[str, Searched]:
    """Codes of every item, or float vectors where a model is searched by those, by modality.

    In eval mode, without a graph; the batch size does not change them.

    Where a batch does not fit into memory, the split is encoded again by half of it, with a warning.

    Args:
        victim: anything with the ``Hasher`` call.
        modality: encode only this one; all that the victim and the split share by default.
        dtype: ``float32`` or ``bf16`` autocast.
        progress: called with (items done, items in all) after each batch.
        origin: digest of the model, kept in the codes; an index refuses queries of another.

    Raises:
        ValueError: NaN or infinite logits, or no such modality in victim and split.
        MemoryError: single items do not fit.
    """

    def encoded(size: int) -> dict[str, Searched]:
        return encode_by(
            victim, split, batch_size=size, modality=modality, dtype=dtype, progress=progress, origin=origin
        )

    return halving(encoded, batch_size, "items", "encoded", warn)[0]


def encode_by(
    victim: Hasher,
    split: Split,
    *,
    batch_size: int,
    modality: str | None = None,
    dtype: str = "float32",
    progress: Callable[[int, int], None] | None = None,
    origin: str = "",
) -> dict[str, Searched]:
    """``encode_searched`` at this batch size or not at all, for splits that must share one."""
    names = victim.modalities if modality is None else (modality,)
    encoded: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    by_bits = victim.distance == "hamming"
    done = 0
    with frozen(victim), torch.no_grad(), precision(dtype, victim.device):
        for batch in batches(split, batch_size):
            inputs = {name: v for name, v in batch.to(victim.device).inputs.items() if name in names}
            if not inputs:
                has = list(batch.inputs)
                raise ValueError(f"nothing to encode: {list(names)} wanted, the {split.name} split has {has}")
            for name, output in victim(inputs).items():
                rows = victim.compared(output.logits)
                encoded[name].append(pack(rows) if by_bits else rows.to("cpu", torch.float32))
            done += len(batch)
            if progress is not None:
                progress(done, len(split))
    joined = {name: torch.cat(rows) for name, rows in encoded.items() if rows}
    return {name: _searched(rows, victim, origin) for name, rows in joined.items()}


def as_searched(rows: Tensor, victim: Hasher) -> Searched:
    """(N, K) signs, or the vectors of a victim that is searched by those, with positions as ids."""
    return _searched(pack(rows) if victim.distance == "hamming" else rows, victim)


def _searched(rows: Tensor, victim: Hasher, origin: str = "") -> Searched:
    ids = torch.arange(len(rows))
    if victim.distance == "hamming":
        return Codes(rows, victim.bits, ids, origin)
    return Embeddings(rows, victim.distance, ids, origin)


def weights_digest(model: nn.Module) -> str:
    """16 hex digits of every parameter and buffer; ``"none"`` of a model that holds none."""
    return state_digest(model.state_dict())


def state_digest(state: Mapping[str, Tensor]) -> str:
    """``weights_digest`` of the state of a model."""
    if not state:
        return "none"
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def plain_attention() -> Iterator[None]:
    """Products and softmax inside: the fused form has no gradient, no ONNX, and no operations to count."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
