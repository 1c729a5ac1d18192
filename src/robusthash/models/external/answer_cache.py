"""Answers of an endpoint on disk, a line of JSON each, so that an interrupted audit goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class AnswerCache:
    """A file of answers by image. The first line names the endpoint; a line that a kill cut off is ignored.

    Headers, which may hold secrets, are not in it.
    """

    def __init__(self, path: Path, url: str) -> None:
        self.path, self.url = path, url

    def read(self) -> dict[str, Any]:
        """Answers by image; none where the file is missing or of another endpoint."""
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return {}
        entries = [entry for line in lines if (entry := _entry(line)) is not None]
        if not entries or entries[0].get("endpoint") != self.url:
            self.delete()
            return {}
        return {entry["image"]: entry["answer"] for entry in entries[1:] if "image" in entry}

    def add(self, image: str, answer: Any) -> None:
        """Append one answer."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+", encoding="utf-8") as stream:
            if stream.tell() == 0:
                stream.write(json.dumps({"endpoint": self.url}) + "\n")
            # a new line first: the one before may have been cut off
            stream.write("\n" + json.dumps({"image": image, "answer": answer}) + "\n")

    def delete(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)


def _entry(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
