"""The demo's two searches over its photographs as files, for the service to show."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from robusthash.apps.experiment.demo_run import MODELS, run_demo
from robusthash.apps.experiment.index_run import Adding, build_index
from robusthash.apps.experiment.model_stages import read_data
from robusthash.apps.experiment.run_directory import load_run
from robusthash.core.atomic_files import json_text, write_folder_aside, write_text
from robusthash.core.limited_files import read_json
from robusthash.core.runtime import Progress
from robusthash.data.base import Split
from robusthash.data.photos import describe_item, thumbnail

_SHOWN = 400  # windows of the database that are searched
_SIDE = 192  # pixels of their files


@dataclass(frozen=True)
class DemoParts:
    """Indexes of the demo's models over the same photographs, the hardened one first, and their folder."""

    hardened: Path
    undefended: Path
    images: Path


def demo_parts(out: Path, progress: Progress) -> DemoParts:
    """The parts of the demo in ``out``, which is run where it has not been; each made once."""
    if not (out / "summary.json").is_file():
        run_demo(out, progress)
    summary = read_json(out / "summary.json")
    runs = {model: load_run(Path(summary["runs"][model])) for model in MODELS}
    photographs = out / "photographs"
    if not photographs.is_dir():
        data = read_data(runs["saat"].config)
        with write_folder_aside(photographs) as aside:
            _write(data.database, aside, progress)
    indexes = {model: out / f"served-{model}" for model in MODELS}
    for model, index in indexes.items():
        adding = Adding(payload=photographs / "about.jsonl")
        build_index(index, runs[model].path, photographs, progress=progress, adding=adding)
    return DemoParts(indexes["saat"], indexes["undefended"], photographs)


def _write(split: Split, folder: Path, progress: Progress) -> None:
    """Windows as JPEG files, and a table of the photographs that they are of."""
    lines = []
    for place in range(min(_SHOWN, len(split))):
        item = describe_item(split, place)
        name = f"{item.photograph}-{place:03d}.jpg"
        pixels = thumbnail(item, _SIDE).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / name, quality=92)
        lines.append(json_text({"file": name, "labels": [item.photograph], "caption": item.caption}))
        progress(place + 1, min(_SHOWN, len(split)), "writing photographs")
    write_text(folder / "about.jsonl", "\n".join(line.replace("\n", " ") for line in lines) + "\n")
