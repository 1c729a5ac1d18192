"""Names of numbered files written short: ``shards-{000..099}.tar``."""

from __future__ import annotations

import itertools
import re

_MOST = 1_000_000  # names of one pattern
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_FORMS = "a range of numbers such as {000..099}, or a list such as {a,b}"


def expanded(pattern: str) -> list[str]:
    """The names that a pattern stands for, in order; a text without braces stands for itself.

    A range counts up, by one, with as many digits as it is written with. Several braces are combined, the
    last one running fastest.

    Raises:
        ValueError: braces that are not closed, nested, empty, or of another form; names that repeat.

    Example:
        >>> expanded("s-{08..10}.tar")
        ['s-08.tar', 's-09.tar', 's-10.tar']
    """
    pieces = re.split(r"(\{[^{}]*\})", pattern)
    if any("{" in piece or "}" in piece for piece in pieces[::2]):
        raise ValueError(f"the braces of {pattern!r} are not closed, or nested; write {_FORMS}")
    choices = [[piece] if place % 2 == 0 else _choices(piece, pattern) for place, piece in enumerate(pieces)]
    count = 1
    for several in choices:
        count *= len(several)
    if count > _MOST:
        raise ValueError(f"{pattern!r} stands for {count:,} names, more than {_MOST:,}")
    names = ["".join(parts) for parts in itertools.product(*choices)]
    if len(set(names)) < len(names):
        raise ValueError(f"{pattern!r} stands for the same name more than once")
    return names


def _choices(brace: str, pattern: str) -> list[str]:
    """The texts that one pair of braces stands for."""
    inside = brace[1:-1]
    if ends := _RANGE.fullmatch(inside):
        first, last = ends.groups()
        padded = len(first) > 1 and first[0] == "0"
        if (padded or last[0] == "0") and len(first) != len(last):
            width = max(len(first), len(last))
            better = f"{{{first.zfill(width)}..{last.zfill(width)}}}"
            raise ValueError(f"{brace} in {pattern!r} has ends of unlike widths; did you mean {better}?")
        if int(first) > int(last):
            raise ValueError(f"{brace} in {pattern!r} counts down; write {{{last}..{first}}}")
        if int(last) - int(first) >= _MOST:
            raise ValueError(f"{brace} in {pattern!r} stands for more than {_MOST:,} names")
        return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    listed = inside.split(",")
    if len(listed) < 2 or not all(listed) or ".." in inside:
        raise ValueError(f"{brace} in {pattern!r} is not understood; write {_FORMS}")
    return listed
