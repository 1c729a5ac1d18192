"""Limits on the parts of JPEG and PNG files, checked before a decoder walks them one by one.

A progressive JPEG is decoded once a scan, and Pillow reads markers and chunks in Python, where no other
thread goes on: a few megabytes of them would take seconds to hours.
"""

from __future__ import annotations

import re
from typing import BinaryIO

SCANS = 100  # of one JPEG; encoders write some ten
MARKERS = 1_000  # of one JPEG, without restarts inside scans
FILL = 64 << 10  # bytes between the segments of a JPEG
CHUNKS = 10_000  # of one PNG that hold fewer than ``_SMALL`` bytes
_SMALL = 256
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_MARKER = re.compile(rb"\xff[^\x00\xff]", re.DOTALL)
_AFTER_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)  # restarts are inside a scan
_BARE = {0x01, *range(0xD0, 0xD9)}  # markers without a length
_SEQUENTIAL, _SCAN, _END = (0xC0, 0xC1), 0xDA, 0xD9
_READ = 1 << 14


def check_parts(stream: BinaryIO) -> None:
    """Refuse a JPEG or PNG of too many parts; the stream stays where it is.

    Raises:
        ValueError: more scans, markers, fill bytes or small chunks than the limits of this module.
    """
    start = stream.tell()
    head = stream.read(len(_PNG))
    try:
        if head.startswith(_JPEG):
            stream.seek(start + 2)
            _check_jpeg(stream)
        elif head == _PNG:
            _check_png(stream)
    finally:
        stream.seek(start)


def _check_jpeg(stream: BinaryIO) -> None:
    counts = {"scans": 0, "markers": 0, "fill bytes": 0}
    limits = {"scans": SCANS, "markers": MARKERS, "fill bytes": FILL}
    whole, in_scan = -1, False  # components of a scan after which none comes
    while True:
        code, skipped = _next_marker(stream, in_scan)
        counts["markers"] += 1
        counts["scans"] += code == _SCAN
        counts["fill bytes"] += 0 if in_scan else skipped
        for name, count in counts.items():
            if count > limits[name]:
                raise ValueError(f"it is a JPEG of more than {limits[name]} {name}")
        if code in (None, _END):
            return
        if code in _BARE:
            in_scan = False
            continue
        head = stream.read(8)
        if code in _SEQUENTIAL and len(head) == 8:
            whole = head[7]
        in_scan = code == _SCAN
        if in_scan and head[2:3] == bytes([max(whole, 0)]):
            return
        stream.seek(max(int.from_bytes(head[:2]), 2) - len(head), 1)


def _next_marker(stream: BinaryIO, in_scan: bool) -> tuple[int | None, int]:
    """The code of the next marker, None at the end, and the bytes before it; the stream is behind it."""
    pattern, before, rest = _AFTER_SCAN if in_scan else _MARKER, 0, b""
    while part := stream.read(_READ):
        part = rest + part
        if marker := pattern.search(part):
            stream.seek(marker.end() - len(part), 1)
            return part[marker.end() - 1], before + marker.start()
        before, rest = before + len(part) - 1, part[-1:]
    return None, before


def _check_png(stream: BinaryIO) -> None:
    small = 0
    while len(head := stream.read(8)) == 8 and head[4:] != b"IEND":
        length = int.from_bytes(head[:4])
        small += length < _SMALL
        if small > CHUNKS:
            raise ValueError(f"it is a PNG of more than {CHUNKS} chunks under {_SMALL} bytes")
        stream.seek(length + 4, 1)
