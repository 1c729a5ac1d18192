"""A split -> packed codes, streamed: memory is one batch and the codes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from robusthash.core.hamming import pack, sign
from robusthash.core.out_of_memory import halving, warn
from robusthash.core.runtime import precision
from robusthash.core.types import Codes
from robusthash.data.base import Split, batches
from robusthash.models.hasher import Hasher, frozen


def encode_signs(victim: Hasher, modality: str, inputs: Tensor, batch_size: int | None = None) -> Tensor:
    """(B, ...) inputs of one modality -> (B, K) int8 codes on the CPU, in eval mode, without a graph.

    Args:
        batch_size: inputs that are moved to the victim's device and encoded at a time; all by default.
    """
    with frozen(victim), torch.no_grad():
        parts = inputs.split(batch_size or max(1, len(inputs)))
        logits = [victim({modality: part.to(victim.device)})[modality].logits for part in parts]
        return torch.cat([sign(part).to("cpu", torch.int8) for part in logits])


def encode_split(
    victim: Hasher,
    split: Split,
    *,
    batch_size: int = 256,
    modality: str | None = None,
    dtype: str = "float32",
    progress: Callable[[int, int], None] | None = None,
    origin: str = "",
) -> dict[str, Codes]:
    """Codes of every item, by modality, in eval mode, without a graph. The batch size does not matter to the
    result.

    Where a batch does not fit into memory, the split is encoded again by half of it, and a warning says so.

    Args:
        victim: anything with the ``Hasher`` call.
        modality: encode only this one; all that the victim and the split share by default.
        dtype: ``float32`` or ``bf16`` autocast.
        progress: called with (items done, items in all) after each batch.
        origin: digest of the model, kept in the codes; an index refuses queries of another.

    Raises:
        ValueError: where the model gives NaN or infinite logits, or where it and the split share no such
            modality.
        MemoryError: where not even single items fit.
    """

    def encoded(size: int) -> dict[str, Codes]:
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
) -> dict[str, Codes]:
    """``encode_split`` at this batch size or not at all, for splits that must share one."""
    wanted = victim.modalities if modality is None else (modality,)
    packed: dict[str, list[torch.Tensor]] = {name: [] for name in wanted}
    done = 0
    with frozen(victim), torch.no_grad(), precision(dtype, victim.device):
        for batch in batches(split, batch_size):
            inputs = {
                name: values for name, values in batch.to(victim.device).inputs.items() if name in wanted
            }
            if not inputs:
                raise ValueError(
                    f"nothing to encode: {list(wanted)} wanted, the {split.name} split has {list(batch.inputs)}"
                )
            for name, output in victim(inputs).items():
                packed[name].append(pack(sign(output.logits)))
            done += len(batch)
            if progress is not None:
                progress(done, len(split))
    ids = torch.arange(len(split))
    return {name: Codes(torch.cat(rows), victim.bits, ids, origin) for name, rows in packed.items() if rows}


def weights_digest(model: nn.Module) -> str:
    """16 hex digits of every parameter and buffer; ``"none"`` of a model that holds none."""
    state = model.state_dict()
    if not state:
        return "none"
    found = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
