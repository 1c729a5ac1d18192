"""The records that pass between the rooms. All are frozen: a stage returns a new one.

Sizes: ``B`` batch, ``N`` items, ``Q`` queries, ``M`` reference items, ``K`` bits, ``C`` classes, ``D``
feature width, ``k`` ranks kept.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from robusthash.core.hamming import pack, unpack

Inputs = dict[str, Tensor]
"""By modality: ``"image"`` is (B, 3, H, W) in [0, 1]; ``"text"`` is (B, V) counts or (B, L) token ids."""

LossTerms = dict[str, Tensor]
"""Named scalars, already weighted; their sum is the loss that is minimised."""


@dataclass(frozen=True)
class Batch:
    """Some items of one split."""

    inputs: Inputs
    labels: Tensor | None  # (B, C) multi-hot float; None in unsupervised use
    ids: Tensor  # (B,) int64, position in the split

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(
            {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()},
            None if self.labels is None else self.labels.to(device, non_blocking=True),
            self.ids.to(device, non_blocking=True),
        )

    def only(self, modalities: Collection[str]) -> Batch:
        """The same items with only these modalities; a ``ValueError`` where they have none of them."""
        inputs = {name: value for name, value in self.inputs.items() if name in modalities}
        if not inputs:
            raise ValueError(f"these items have {sorted(self.inputs)}, not {sorted(modalities)}")
        return replace(self, inputs=inputs)

    def with_inputs(self, inputs: Inputs) -> Batch:
        """The same items with some modalities replaced, as an attack returns them."""
        return replace(self, inputs={**self.inputs, **inputs})


@dataclass(frozen=True)
class HashOutput:
    """Output of a hasher for one modality of a batch."""

    logits: Tensor  # (B, K) before the squashing function; bit k is +1 where logits >= 0
    code: Tensor  # (B, K) what the objective sees: tanh, linear or batch-normed
    features: Tensor  # (B, D) input of the hash head
    aux: dict[str, Tensor] = field(default_factory=dict)  # masks, spectra, for the encoder's own outer loss
    scale: float = 1.0  # mean |logit| of a linear head, so that tanh does not saturate

    def relaxed(self, alpha: float = 1.0) -> Tensor:
        """(B, K) tanh(alpha * logits / scale). ``alpha`` is an argument and never stored."""
        return torch.tanh(self.logits * (alpha / self.scale))


Outputs = dict[str, HashOutput]
"""Outputs of a hasher, by modality."""


@dataclass(frozen=True)
class Codes:
    """Binary codes of a split, packed."""

    packed: Tensor  # (N, ceil(K / 8)) uint8; bit 1 = +1; first bit of the code highest; zeros pad the end
    bits: int
    ids: Tensor  # (N,) int64
    origin: str = ""  # digest of the model that made them; "" where it is unknown

    def __len__(self) -> int:
        return len(self.packed)

    def signs(self) -> Tensor:
        """(N, K) int8 in {-1, +1}."""
        return unpack(self.packed, self.bits)

    def rows(self) -> Tensor:
        """(N, K) what the search compares: the signs."""
        return self.signs()

    def take(self, positions: Tensor) -> Codes:
        """These items, numbered again."""
        return replace(self, packed=self.packed[positions], ids=torch.arange(len(positions)))

    def of(self, rows: Tensor) -> Codes:
        """The codes of (N, K) other signs of the same length, numbered from 0."""
        return Codes(pack(rows), self.bits, torch.arange(len(rows)))

    @staticmethod
    def none(bits: int, origin: str) -> Codes:
        """Codes of no item, which have a length and an origin."""
        return Codes(torch.zeros(0, (bits + 7) // 8, dtype=torch.uint8), bits, torch.arange(0), origin)

    def numpy(self) -> np.ndarray:
        """(N, ceil(K / 8)) uint8, packed."""
        return self.packed.cpu().numpy()

    def hex(self) -> list[str]:
        """Codes as hex digits; the first bit is the highest of the first digit, zeros pad the end."""
        return [row.tobytes().hex() for row in self.numpy()]

    @staticmethod
    def from_numpy(array: np.ndarray, bits: int | None = None, first_id: int = 0) -> Codes:
        """Codes of any program, with their rows as ids.

        Args:
            array: (N, K) of -1 and +1, of 0 and 1, or bool; or (N, ceil(bits / 8)) packed uint8.
            bits: K; needed for packed codes, whose last byte is filled up with zeros.
            first_id: of the first row; the others follow.

        Raises:
            ValueError: another shape, another type, or values that are none of these.
        """
        if array.ndim != 2:
            raise ValueError(f"codes are (N, K) or packed (N, bytes), got shape {array.shape}")
        width, ids = array.shape[1], torch.arange(len(array)) + first_id
        if bits is not None and (not isinstance(bits, int | np.integer) or isinstance(bits, bool)):
            raise ValueError(f"bits must be a whole number, got {bits!r}")
        if bits is not None and width != bits:
            return Codes(torch.from_numpy(_packed_bytes(array, bits)), bits, ids)
        ones = array == 1
        if width == 0 or not ((ones | (array == 0)).all() or (ones | (array == -1)).all()):
            some = ", ".join(map(str, np.unique(array)[:4].tolist())) or "none"
            remedy = "packed codes need bits= and are uint8"
            if array.dtype.kind == "f":
                remedy = "of real numbers take the sign first: np.where(outputs >= 0, 1, -1)"
            raise ValueError(f"bits are -1 and +1, 0 and 1, or bool; got {array.dtype} {some}; {remedy}")
        signs = torch.from_numpy(np.where(ones, 1, -1).astype(np.int8))
        return Codes(pack(signs), width, ids)


def _packed_bytes(array: np.ndarray, bits: int) -> np.ndarray:
    """A copy of (N, ceil(bits / 8)) uint8 bytes, checked."""
    width = -(-bits // 8)
    if bits < 1 or array.dtype != np.uint8 or array.shape[1] != width:
        remedy = ""
        if array.dtype.kind in "iu" and array.shape[1] * array.itemsize == width:  # packed in other words
            remedy = "; as bytes: array.view(np.uint8)"
            if array.dtype == np.int8:
                remedy += ", or where 128 was taken off (array.astype(int) + 128).astype(np.uint8)"
        raise ValueError(
            f"codes of {bits} bits are {bits} columns, or {width} packed uint8 columns; got "
            f"{array.shape[1]} columns of {array.dtype}{remedy}"
        )
    padding = 8 * width - bits
    if padding and (array[:, -1] & ((1 << padding) - 1)).any():  # it would count as distance
        raise ValueError(f"packed codes have ones after bit {bits}; the padding must be zero")
    return array.copy()


CodesLike = Codes | np.ndarray | Tensor
"""Codes, or an array or tensor of one of the forms that ``Codes.from_numpy`` reads."""


def as_codes(values: CodesLike, bits: int, first_id: int = 0) -> Codes:
    """Codes as they are, and arrays and tensors by ``Codes.from_numpy``; ValueError where they do not fit."""
    if isinstance(values, Codes):
        return values
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    if not isinstance(values, np.ndarray):
        raise ValueError(f"codes are Codes, an array or a tensor, got a {type(values).__name__}")
    return Codes.from_numpy(values, bits, first_id)


@dataclass(frozen=True)
class Ranking:
    """The nearest items of each query, by (distance, id)."""

    ids: Tensor  # (Q, k) int64, -1 where fewer than k were found
    distances: Tensor  # (Q, k) int32, ascending; -1 where the id is -1
    cut: Tensor  # (Q,) bool: the engine, not the (distance, id) rule, cut a tie at rank k


@dataclass(frozen=True)
class Profile:
    """Counts by Hamming distance 0..K: all that a ranking metric needs. Profiles of shards add."""

    items: Tensor  # (Q, K + 1) int64
    relevant: Tensor  # (Q, K + 1) int64
    gain: Tensor  # (Q, K + 1) int64, sum of shared labels
    gain_exp: Tensor  # (Q, K + 1) float64, sum of 2^shared - 1
    ideal: Tensor  # (Q, G) int64, database items that share g labels with the query

    def __len__(self) -> int:
        return len(self.items)

    @property
    def bits(self) -> int:
        return self.items.shape[1] - 1


@dataclass(frozen=True)
class Goal:
    """Aim of the adversary for each query: its own labels and away, or target labels and towards."""

    labels: Tensor | None  # (B, C) own or target labels; None for label-free attacks
    sign: int  # -1 away from them, +1 towards them


@dataclass(frozen=True)
class Guidance:
    """Place of the goal in Hamming space: a code for each query, or a weighted set of codes."""

    codes: Tensor  # (B, K) one representative code per query, or (M, K) a set shared by the batch
    weights: Tensor | None = None  # (B, M) signed pull of each shared code; None when one-to-one


@dataclass(frozen=True)
class Reference:
    """Codes and labels that the attacker knows: the training set (W1) or the database (W2)."""

    codes: dict[str, Tensor]  # by modality, (M, K) float in {-1, +1}
    labels: Tensor | None  # (M, C) multi-hot float

    def to(self, device: torch.device | str) -> Reference:
        return Reference(
            {name: value.to(device) for name, value in self.codes.items()},
            None if self.labels is None else self.labels.to(device),
        )
