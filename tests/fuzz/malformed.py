"""A seeded generator of malformed values, texts and files."""

from __future__ import annotations

import copy
import io
import json
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1.5, -0.0, float("nan"), float("inf"), 10**30, -(10**30), 2**63),
    *(
        "",
        "8/0",
        "1.2.3/4",
        "[/red]",
        "[bold]x",
        "\\[red]",
        "\x1b[2J",
        "../../x",
        "..",
        "mod:name",
        ":",
        "a" * 5000,
    ),
    *(
        "\u202etxt",
        "<script>alert(1)</script>",
        "=1+1",
        "a|b",
        "1e999",
        "0x10",
        "1_000",
        "é",
        "\ud800",
        "img-linf-0",
    ),
    *([], {}, [[]], [None], {"name": None}, {"name": []}, {"name": "csq", "x": 1}, [1, "a"], {"": ""}),
)
"""Values that stand where others belong."""

TEXTS = (
    *(
        "",
        " ",
        "[",
        "{",
        "{a: [",
        "a: b: c",
        "- ",
        "%",
        "@x",
        "`",
        "!!python/object/apply:os.system [id]",
        "\t- a",
    ),
    *(
        "&a [*a]",
        "&a {b: *a}",
        "*a",
        "{<<: 1}",
        "? {a: b}\n: c",
        "2020-99-99",
        "!!binary x",
        "!!float x",
        "0" * 5000,
    ),
    *(
        "[" * 3000,
        "{a: " * 400,
        "- " * 2000,
        "9" * 5000,
        "null",
        "8/0",
        "NaN",
        "-",
        "=",
        "a: 1\na: [",
        "\x00",
    ),
    "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(
        f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    ),
)
"""YAML of the command line and of files."""


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place within plain data."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(below for key, item in pairs for below in places(item, (*path, key)))]


def with_odd_value(value: Any, draw: random.Random) -> tuple[Any, str]:
    """Plain data with one odd value, a key too many or one too few, and the last name on the way there."""
    value = copy.deepcopy(value)
    path = draw.choice(places(value)[1:] or [()])
    if not path:
        return draw.choice(ODD), ""
    node = value
    for key in path[:-1]:
        node = node[key]
    change = draw.random()
    if change < 0.1:
        del node[path[-1]]
    elif change < 0.2 and isinstance(node, dict):
        node[f"{path[-1]}x"] = node[path[-1]]
    else:
        node[path[-1]] = copy.deepcopy(draw.choice(ODD))
    return value, str(path[-1])


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Bytes of a file that were cut, flipped, doubled or replaced."""
    kind = draw.randrange(8)
    if kind == 0:
        return content[: draw.randrange(len(content) or 1)]
    if kind == 1:
        return b""
    if kind == 2:
        return draw.randbytes(draw.randrange(1, 2000))
    if kind == 3:
        return content + draw.randbytes(20)
    if kind == 4:
        return draw.choice(TEXTS).encode("utf-8", "surrogatepass")
    if kind == 5:
        return b"\xff\xfe" + content
    spoiled = bytearray(content)
    for _ in range(draw.randrange(1, 30)):
        if spoiled:
            spoiled[draw.randrange(len(spoiled))] = draw.randrange(256)
    return bytes(spoiled)


def odd_document(path: Path, draw: random.Random) -> None:
    """Spoil a JSON or YAML file: one value of it, or its bytes."""
    if draw.random() < 0.4:
        path.write_bytes(damaged(path.read_bytes(), draw))
        return
    as_json = path.suffix == ".json"
    text = path.read_text(encoding="utf-8")
    value, _ = with_odd_value(json.loads(text) if as_json else yaml.safe_load(text), draw)
    written = json.dumps(value) if as_json else yaml.safe_dump(value, allow_unicode=False)
    path.write_text(written, encoding="utf-8")


def npz(draw: random.Random, good: dict[str, Any]) -> bytes:
    """An ``.npz`` of odd arrays, one that lies about its size, or damaged bytes."""
    kind, buffer = draw.randrange(6), io.BytesIO()
    key = draw.choice(list(good))
    odd = draw.choice(
        [
            *(np.zeros(0), np.zeros((0, 4)), np.array(5), np.full((6, 4), np.nan), np.array(["a", "b"])),
            *(np.zeros((6, 4, 2)), np.full((6, 4), 7), np.full((6, 4), -(2**62)), np.zeros((6, 4), complex)),
            *(
                np.array([{}, []], dtype=object),
                np.zeros(6, "M8[s]"),
                np.full((6, 4), 1e300),
                np.zeros((1, 1)),
            ),
        ]
    )
    if kind < 2:
        np.savez(buffer, **{**good, key: odd})
    elif kind == 2:
        np.savez(buffer, **{name: values for name, values in good.items() if name != key})
    elif kind == 3:
        _bomb(buffer, key, draw.choice([(1 << 34,), (1 << 20, 1 << 20), (-4,), (1 << 40,)]))
    else:
        np.savez(buffer, **good)
        return damaged(buffer.getvalue(), draw)
    return buffer.getvalue()


def _bomb(buffer: io.BytesIO, key: str, shape: tuple[int, ...]) -> None:
    """A member that claims ``shape``, and 300 MiB of zeros that take 300 KiB."""
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open(f"{key}.npy", "w") as member,
    ):
        np.lib.format.write_array_header_1_0(member, {"descr": "|i1", "fortran_order": False, "shape": shape})
        for _ in range(300):
            member.write(bytes(1 << 20))
