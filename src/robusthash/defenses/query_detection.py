"""Detection of attacked queries: by too many nearly equal ones, or by codes that harmless changes move.

In the spirit of Blacklight (Li et al., USENIX Security 2022): quantised windows of pixels are hashed with a
secret salt, the largest hashes are an image's fingerprint, and fingerprints that share hashes are near
duplicates. Ours: windows of 2 x 2 cells of a 16 x 16 average at their place, on a scale of the image's own
brightness and contrast, mirrored to one side; a count of near duplicates for each client and over all, which
slows and then refuses, instead of a ban at the first match; images of equal pixels do not count.

``CodeAgreement``: a query whose code moves when it is saved as a JPEG file or cut a little at the edges is
suspected, for a change of pixels that was made for one code often does not survive either. Feature squeezing
(Xu et al., NDSS 2018) for codes; the changes and the attack, which plans for all three codes, are ours.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robusthash.attacks.base import Attack
from robusthash.attacks.losses import OverDraws
from robusthash.core.types import Inputs, Outputs
from robusthash.data.transforms import crop, eight_bits, jpeg
from robusthash.models.encoding import encode_signs
from robusthash.models.hasher import Hasher
from robusthash.models.purifier import with_gradient_of
from robusthash.models.surrogate_gradients import GradientView, ViewedHasher

_SIDE = 16  # cells a side that an image is averaged to
_WINDOW = 2  # cells a side of a window
_CONTRAST = 50.0  # standard deviation, in levels of 255, that every image is brought to
_FLAT = 10.0  # least deviation that is taken for content
_LISTED = 256  # remembered queries that one hash leads to, the newest

Verdict = Literal["answer", "slow", "refuse"]


@dataclass(frozen=True)
class DetectionLimits:
    """Limits of detection: the distance of near duplicates, how many may be, and how much is remembered.

    Attributes:
        own: different near duplicates of a query that its client may have sent before it is refused.
        everyone: the same over all clients.
        slow: share of either number from which answers are slowed.
        seconds: for which a query is remembered.
        memory: queries that are remembered, over all clients; about 11 kB each.
        shared: hashes of 50 that near duplicates share.
        step: levels of 255 that a hash does not tell apart.
    """

    own: int = 20
    everyone: int = 60
    slow: float = 0.5
    seconds: float = 3600.0
    memory: int = 20_000
    shared: int = 8
    step: int = 50
    hashes: int = 50

    def __post_init__(self) -> None:
        for name in ("own", "everyone", "memory", "shared", "step", "hashes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.shared > self.hashes:
            raise ValueError(f"shared is a number of the {self.hashes} hashes, got {self.shared}")
        if not 0 < self.slow <= 1:
            raise ValueError(f"slow is a share in (0, 1], got {self.slow}")
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds must be above 0 and finite, got {self.seconds}")


@dataclass(frozen=True)
class Sighting:
    """A query as the detector sees it: its near duplicates among remembered ones, and what follows.

    Of a query with the pixels of a remembered one none are counted.
    """

    own: int  # of the same client
    everyone: int
    verdict: Verdict
    retry_after: float = 0.0  # seconds until it is no longer refused, if nothing near it comes


class Fingerprints:
    """Salted fingerprints of images: the largest hashes of windows of pixels.

    Args:
        salt: secret of the detector, at least 16 bytes; whoever knows it can avoid matches.
    """

    def __init__(self, limits: DetectionLimits, salt: bytes) -> None:
        if len(salt) < 16:
            raise ValueError(f"a salt of at least 16 bytes is needed, got {len(salt)}")
        seed = int.from_bytes(hashlib.sha256(salt).digest(), "big")
        draws = np.random.default_rng(seed)
        self._limits = limits
        self._phase = float(draws.uniform(0, limits.step))
        self._factors = draws.integers(0, 2**63, (_WINDOW, _WINDOW, 3), dtype=np.uint64) * 2 + 1
        self._places = draws.integers(0, 2**63, (_SIDE - _WINDOW + 1,) * 2, dtype=np.uint64)

    def __call__(self, pixels: np.ndarray) -> tuple[int, ...]:
        """At most ``hashes`` numbers of an image of (H, W, 3) uint8, at least one."""
        cells = self._cells(pixels)
        end = _SIDE - _WINDOW + 1
        sums, flat = self._places.copy(), np.ones((end, end), bool)
        for (row, column, channel), factor in np.ndenumerate(self._factors):
            part = cells[row : row + end, column : column + end, channel]
            sums += factor * part
            flat &= part == cells[:end, :end, channel]
        hashes = np.unique(_mixed(sums[~flat] if not flat.all() else sums))
        return tuple(hashes[-self._limits.hashes :].tolist())

    def _cells(self, pixels: np.ndarray) -> np.ndarray:
        """(16, 16, 3) uint64 quantised averages, of one brightness, contrast and side."""
        small = Image.fromarray(pixels).resize((_SIDE, _SIDE), Image.Resampling.BOX)
        cells = np.asarray(small, np.float64)
        cells = (cells - cells.mean()) * (_CONTRAST / max(cells.std(), _FLAT))
        if cells[:, : _SIDE // 2].sum() > cells[:, _SIDE // 2 :].sum():
            cells = cells[:, ::-1]
        return np.floor((cells + self._phase) / self._limits.step).astype(np.int64).astype(np.uint64)


def _mixed(values: np.ndarray) -> np.ndarray:
    """A permutation of 64-bit numbers under which the largest are a random choice."""
    values = (values ^ (values >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    return (values ^ (values >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)


@dataclass(frozen=True)
class _Remembered:
    client: str
    time: float
    content: bytes
    hashes: tuple[int, ...]


class QueryDetector:
    """Counts near duplicates among recent queries; memory is bounded, and it may be called from threads.

    Refused queries are not remembered, so a flood does not push others out. A query with the pixels of a
    remembered one is answered: it tells nothing new (of a victim that draws random numbers it would).

    Args:
        salt: as of ``Fingerprints``; drawn at random by default.
    """

    def __init__(self, limits: DetectionLimits = DetectionLimits(), salt: bytes | None = None) -> None:
        self.limits = limits
        self._fingerprint = Fingerprints(limits, secrets.token_bytes(32) if salt is None else salt)
        self._queries: OrderedDict[int, _Remembered] = OrderedDict()
        self._by_hash: dict[int, list[int]] = {}
        self._contents: set[bytes] = set()
        self._next, self._lock = 0, Lock()

    def __len__(self) -> int:
        """Number of remembered queries."""
        return len(self._queries)

    def see(self, pixels: np.ndarray, client: str, now: float) -> Sighting:
        """Judge a query, and remember it unless it is refused.

        Args:
            pixels: (H, W, 3) uint8, as the model takes them.
            now: seconds of a clock that never goes back.
        """
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ValueError(f"a query is (H, W, 3) uint8 pixels, got {pixels.dtype} {pixels.shape}")
        content = hashlib.blake2b(pixels.tobytes(), digest_size=16).digest()
        with self._lock:
            self._forget(now)
            if content in self._contents:
                return Sighting(0, 0, "answer")
        hashes = self._fingerprint(pixels)
        with self._lock:
            near = list(self._near(hashes))
            mine = [query.time for query in near if query.client == client]
            waits = (
                self._wait(mine, self.limits.own, now),
                self._wait([query.time for query in near], self.limits.everyone, now),
            )
            if any(waits):
                return Sighting(len(mine), len(near), "refuse", max(waits))
            self._remember(_Remembered(client, now, content, hashes))
        load = max(len(mine) / self.limits.own, len(near) / self.limits.everyone)
        return Sighting(len(mine), len(near), "slow" if load >= self.limits.slow else "answer")

    def _wait(self, times: list[float], most: int, now: float) -> float:
        """Seconds until fewer than ``most`` of the queries of these times are remembered; 0 for now."""
        return times[len(times) - most] + self.limits.seconds - now if len(times) >= most else 0.0

    def _near(self, hashes: tuple[int, ...]) -> Iterator[_Remembered]:
        """Remembered queries that share enough hashes, the oldest first."""
        shares = Counter(slot for value in hashes for slot in self._by_hash.get(value, ()))
        enough = min(self.limits.shared, len(hashes))
        for slot in sorted(slot for slot, shared in shares.items() if shared >= enough):
            yield self._queries[slot]

    def _remember(self, query: _Remembered) -> None:
        slot, self._next = self._next, self._next + 1
        self._queries[slot] = query
        self._contents.add(query.content)
        for value in query.hashes:
            slots = self._by_hash.setdefault(value, [])
            slots.append(slot)
            del slots[:-_LISTED]

    def _forget(self, now: float) -> None:
        """Drop queries that are too old, and the oldest where there are too many."""
        while self._queries:
            slot, query = next(iter(self._queries.items()))
            if now - query.time < self.limits.seconds and len(self._queries) < self.limits.memory:
                return
            del self._queries[slot]
            self._contents.discard(query.content)
            for value in query.hashes:
                slots = self._by_hash[value]
                if slots[0] == slot:  # newer ones may have pushed it out
                    del slots[0]
                if not slots:
                    del self._by_hash[value]


@dataclass(frozen=True)
class CodeAgreement:
    """The harmless changes of a query and how far its code moves under them.

    Args:
        quality: of the JPEG file, 1 to 100.
        cut: share of width and height that is cut away, in (0, 0.5].
    """

    quality: int = 90
    cut: float = 0.05

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise ValueError(f"JPEG quality must lie in 1..100, got {self.quality}")
        if not 0 < self.cut <= 0.5:
            raise ValueError(f"cut is a share in (0, 0.5], got {self.cut}")

    def changed(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [0, 1] as JPEG files and cut at the edges, rounded to multiples of 1/255."""
        return [jpeg(images, self.quality), eight_bits(crop(images, self.cut))]

    def disagreement(self, hasher: Hasher, images: Tensor) -> Tensor:
        """(B,) int64: most bits that differ between the code of an image and that of one of its changes."""
        codes = [encode_signs(hasher, "image", each) for each in (images, *self.changed(images))]
        return torch.stack([(codes[0] != code).sum(1) for code in codes[1:]]).amax(0)


class AgreeingHasher(ViewedHasher):
    """A victim that shows the outputs of a query and of its changes as ``draws``, with gradients of all.

    The gradient of JPEG is that of the identity; that of the cut is its own. Logits and code are the query's.
    """

    passes = (3, 3)

    def __init__(self, victim: Hasher, agreement: CodeAgreement) -> None:
        super().__init__(victim, victim)
        self.agreement = agreement

    def forward(self, inputs: Inputs) -> Outputs:
        outputs = self.gradients(inputs)
        if "image" not in inputs:
            return outputs
        images = inputs["image"]
        saved = with_gradient_of(jpeg(images, self.agreement.quality), images)
        changed = [saved, crop(images, self.agreement.cut)]
        views = [outputs["image"], *(self.gradients({"image": each})["image"] for each in changed)]
        draws = torch.stack([output.logits for output in views])
        codes = torch.stack([output.code for output in views])
        aux = {**views[0].aux, "draws": draws, "draws/code": codes}
        return {**outputs, "image": replace(views[0], aux=aux)}


@dataclass(frozen=True)
class Agreeing(GradientView):
    """The victim with the changes of ``CodeAgreement`` in its outputs, for the loss ``OverDraws``."""

    agreement: CodeAgreement = field(default_factory=CodeAgreement)

    def __call__(self, victim: Hasher) -> ViewedHasher:
        return AgreeingHasher(victim, self.agreement)


def against_agreement(attack: Attack) -> Attack:
    """The attack with its loss averaged over a query and its changes; differentiate ``Agreeing``.

    It does not select by the reported metric, which knows nothing of the changes.
    """
    return replace(attack, name=f"{attack.name} with the changes", loss=OverDraws(attack.loss), selects=False)
