"""The one bank: last relaxed code and label of every training item."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robusthash.core.hamming import sign
from robusthash.core.types import Batch, Outputs, Reference


class CodeMemory(nn.Module):
    """Detached relaxed codes by modality, indexed by ``Batch.ids``.

    Filled by one eval-mode pass before the first step, so no row is ever empty; the recipe then overwrites
    the rows of each batch with its clean outputs. A module, so that it moves, saves and resumes with
    everything else. DPSH's bank, SAAT's moving reference and (later) ADSH's database codes are this one
    object.
    """

    labels: Tensor | None

    def __init__(self, items: int, bits: int, labels: Tensor | None, modalities: tuple[str, ...]) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("labels", labels)
        self.codes = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(items, bits), requires_grad=False) for name in modalities}
        )

    @torch.no_grad()
    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Overwrite the rows of ``batch``."""
        for name, output in outputs.items():
            self.codes[name][batch.ids] = output.code.detach().float()

    def joint(self, batch: Batch) -> Tensor:
        """(B, K) the code that the modalities of each item of ``batch`` share, B = sign(F + G), held
        constant."""
        return sign(torch.stack([codes.detach()[batch.ids] for codes in self.codes.values()]).sum(0))

    def reference(self) -> Reference:
        """The signs, as attacks and guides see them."""
        return Reference({name: sign(values.detach()) for name, values in self.codes.items()}, self.labels)
