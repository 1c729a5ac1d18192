"""Lists in messages: the first few, and how many more there are."""

from __future__ import annotations

from collections.abc import Sequence


def some_names(names: Sequence[str]) -> str:
    """At most three names, and how many more there are: "a and b", "a, b, c and 2 more"."""
    shown = [*names[:3], *([f"{len(names) - 3} more"] if len(names) > 3 else [])]
    return " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))


def some_of(items: Sequence[object], most: int = 20) -> str:
    """The first ``most`` of some items, which may hold commas, and how many more there are."""
    more = f"; and {len(items) - most} more" if len(items) > most else ""
    return "; ".join(map(str, items[:most])) + more
