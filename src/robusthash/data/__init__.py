"""Files -> batches. Readers register themselves under the kind ``data``."""

from typing import Any

from robusthash.core.registry import build
from robusthash.data.base import ArraySource, RetrievalData, Source, Split, batches

__all__ = ["ArraySource", "RetrievalData", "Source", "Split", "batches", "load_data"]


def load_data(name: str, **options: Any) -> RetrievalData:
    """Load a registered data set, e.g. ``load_data("photos", seed=0)``.

    Raises:
        KeyError: an unknown name, option or split; the nearest is offered.
        FileNotFoundError: a file is missing; the message says which archive it is in and where it goes.
        ValueError: broken files or files that do not belong together, an option outside its range, or a split
            that the items cannot give; the message names the value.
    """
    return build("data", {"name": name, **options})
