"""Guards of image queries: detection of query attacks, and agreement of the code under harmless changes."""

from __future__ import annotations

import time

from torch import Tensor

from robusthash.apps.service.guard import Metrics, Refused
from robusthash.apps.service.settings import ServiceSettings
from robusthash.core.hamming import distance
from robusthash.data.transforms import to_pixels
from robusthash.defenses.query_detection import CodeAgreement, DetectionLimits, QueryDetector


class QueryGuards:
    """Query detection and code agreement, each where the settings have it; safe in several threads."""

    def __init__(self, settings: ServiceSettings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._detector: QueryDetector | None = None
        if settings.detection:
            limits = DetectionLimits(
                own=settings.near_own,
                everyone=settings.near_everyone,
                seconds=settings.near_seconds,
                memory=settings.near_memory,
            )
            self._detector = QueryDetector(limits)

    def detect(self, image: Tensor, client: str) -> float:
        """Seconds by which the answer to (3, S, S) pixels in [0, 1] is slowed.

        Raises:
            Refused: 429, too many different queries that are nearly this one.
        """
        if self._detector is None:
            return 0.0
        detection = self._detector.see(to_pixels(image[None])[0], client, time.monotonic())
        if detection.verdict == "refuse":
            self._metrics.refused.labels("near duplicates").inc()
            message = "too many queries that are nearly this image; send others, or wait"
            raise Refused(429, message, detection.retry_after)
        if detection.verdict == "slow":
            self._metrics.slowed.inc()
            return self._settings.near_delay
        return 0.0

    def changed(self, image: Tensor) -> list[Tensor]:
        """Harmless changes of a query whose codes must agree with its own; none without agreement."""
        if self._settings.agreement is None:
            return []
        return [each[0] for each in CodeAgreement().changed(image[None])]

    def agree(self, code: Tensor, others: list[Tensor]) -> None:
        """Refuse a packed code that is farther from one of the others than the settings allow.

        Raises:
            Refused: 422.
        """
        most = self._settings.agreement
        if most is not None and any(int(distance(code[None], other[None])) > most for other in others):
            self._metrics.refused.labels("code agreement").inc()
            message = "the code of this image changes when it is saved as JPEG or cut a little at the edges; "
            raise Refused(422, message + "send the photograph as it was taken")
