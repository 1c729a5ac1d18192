"""From a folder of images to a searched index: a recipe is chosen, trained, measured, indexed and searched.

It runs the same stages as recipes do, in ``OUT/runs``, so a stopped quickstart goes on where it was.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from robusthash.apps.experiment.config import load_config, write_packaged_recipe
from robusthash.apps.experiment.index_run import build_index, search_by
from robusthash.apps.experiment.run_directory import Run, write_json
from robusthash.apps.experiment.table_text import copy_table
from robusthash.apps.experiment.training_stages import run_all
from robusthash.core.atomic_files import write_aside
from robusthash.core.runtime import Progress, silent, yield_when_busy
from robusthash.core.words import some_names
from robusthash.data.copies import CHANGES, LEAST, images_below
from robusthash.data.image_files import UnreadableImage, read_image
from robusthash.data.transforms import to_pixels
from robusthash.metrics.results import EvalResult, headline_of

Labels = Literal["auto", "none", "folders", "manifest"]

_SAMPLES = 40_000  # images shown in training by labels, whatever the size of the folder
_MINUTES, _FULL = 3.75, 250  # of two cores, for this many images or more: copies are then 8000 in all
_MANIFESTS = (".csv", ".jsonl")
_SIDE = 512  # pixels of the example that is searched with


@dataclass(frozen=True)
class Plan:
    """The reading of a folder: its recipe and data, and the reason in words."""

    recipe: Literal["copies", "labels"]
    data: Mapping[str, str]
    words: str
    images: tuple[Path, ...]


def quickstart(
    folder: str | Path,
    out: str | Path = "quickstart",
    *,
    labels: Labels = "auto",
    manifest: str | Path | None = None,
    seed: int = 0,
    sets: Sequence[str] = (),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train on a folder of images, measure, index all of them, and search with a changed copy of one.

    Writes ``quickstart.json`` to ``out``, with runs and recipes next to it; the index and ``report.html`` lie
    in the run. Stopped at any point and called again, it goes on from the last epoch or attacked block.

    Args:
        folder: images, in subfolders or not; see ``plan``.
        labels, manifest: as of ``plan``.
        seed: of training and of the attacks.
        sets: overrides of the recipe, as ``--set`` takes them.

    Returns:
        The content of ``quickstart.json``.
    """
    started, out = time.perf_counter(), Path(out)
    progress = yield_when_busy(progress)
    choice = plan(folder, labels, manifest)
    recipes = _write_recipes(out, choice, seed, sets)
    run = run_all(load_config(recipes[0]), out / "runs", progress, recipes[0].parent)
    index = run.path / "index"
    indexed = build_index(index, run.path, Path(folder), progress=progress)
    example = _example(out, index, choice, run)
    summary = _summary(choice, run, index, example)
    summary["indexed"] = indexed["count"]
    summary |= {name: indexed[name] for name in ("added", "updated", "unchanged", "skipped")}
    summary["next"] = next_commands(run, index, Path(example["image"]), recipes[1], Path(folder))
    summary["seconds"] = round(time.perf_counter() - started, 1)
    write_json(out / "quickstart.json", summary)
    return summary


def plan(folder: str | Path, labels: Labels = "auto", manifest: str | Path | None = None) -> Plan:
    """Decide from the files of a folder how to train on it.

    Args:
        labels: ``folders`` takes the subfolders for classes, ``manifest`` the file that ``manifest`` names or
            the one CSV or JSON-lines file in the folder, ``none`` takes each image for a class of its own.
            ``auto`` is the manifest where one is named or lies there, else the subfolders where there are
            several and no image lies next to them, else none.

    Raises:
        FileNotFoundError: no such folder or manifest.
        ValueError: no images, too few without labels, labels of one class, or several manifests.
    """
    folder = Path(folder)
    paths = images_below(folder).images
    root = {"root": str(folder.resolve())}
    result = (
        _manifest(folder, manifest, named=labels == "manifest") if labels in ("auto", "manifest") else None
    )
    if result:
        words = f"labels of {result.name}; --labels none trains without"
        return Plan("labels", {**root, "manifest": str(result.resolve())}, words, paths)
    tops = [path.relative_to(folder).parts for path in paths]
    classes = sorted({parts[0] for parts in tops if len(parts) > 1})
    loose = sum(len(parts) == 1 for parts in tops)
    if labels == "folders" and len(classes) < 2:
        raise ValueError(
            f"{folder} holds {len(classes)} class folder{'s' * (len(classes) != 1)}, and labels need two at "
            "least: with one class everything is alike; --labels none trains without labels"
        )
    if labels == "folders" or (labels == "auto" and len(classes) > 1 and not loose):
        named = f"{len(classes)} subfolders as classes ({some_names(classes)})"
        words = f"{named}; --labels none trains without labels"
        return Plan("labels", root, words, paths)
    if len(paths) < LEAST:
        raise ValueError(
            f"{folder} holds {len(paths)} images, and training without labels needs at least {LEAST}, better "
            "100 or more; add images"
        )
    reason = "" if labels == "none" else _why_unlabelled(classes, loose)
    words = f"each image is a class of its own, with its changed copies{reason}"
    return Plan("copies", root, words, paths)


def duration(images: int, recipe: Literal["copies", "labels"]) -> str:
    """Time of the whole on two free cores, in words. Training does no more work beyond 250 images."""
    minutes = round(_MINUTES * (min(images, _FULL) / _FULL if recipe == "copies" else 1))
    return "about a minute" if minutes <= 1 else f"about {minutes} minutes"


def _why_unlabelled(classes: Sequence[str], loose: int) -> str:
    if classes and loose:
        return f" ({loose} images lie next to the subfolders, so these are no classes)"
    if classes:
        return f" (one subfolder, {classes[0]!r}: with one class everything would be alike)"
    return ""


def _manifest(folder: Path, manifest: str | Path | None, named: bool) -> Path | None:
    """The manifest that was given, else the one that lies in the folder."""
    if manifest is not None:
        if not Path(manifest).is_file():
            raise FileNotFoundError(f"no manifest {Path(manifest).absolute()}")
        return Path(manifest)
    there = sorted(path for path in folder.iterdir() if path.suffix.lower() in _MANIFESTS and path.is_file())
    if len(there) > 1:
        names = ", ".join(path.name for path in there)
        raise ValueError(
            f"{folder} holds several manifests ({names}); name one by --manifest, or --labels none"
        )
    if named and not there:
        raise ValueError(f"{folder} holds no CSV or JSON-lines file; name the manifest by --manifest")
    return there[0] if there else None


def _write_recipes(out: Path, plan: Plan, seed: int, sets: Sequence[str]) -> list[Path]:
    """The recipe and the one that hardens it, with their settings resolved, to be run by hand too."""
    folder = out / "recipes"
    folder.mkdir(parents=True, exist_ok=True)
    overrides = [f"runtime.seed={seed}", f"evaluation.seed={seed}"]
    overrides += [f"data.{name}={json.dumps(value, ensure_ascii=False)}" for name, value in plan.data.items()]
    paths = [folder / f"{plan.recipe}{ending}.yaml" for ending in ("", "-saat")]
    for path, share in zip(paths, (1, 0.5), strict=True):
        epochs = max(10, round(share * min(200, _SAMPLES // len(plan.images))))
        by_size = [f"training.epochs={epochs}"] if plan.recipe == "labels" else []
        write_packaged_recipe(path, [*overrides, *by_size, *sets])
    return paths


def _example(out: Path, index: Path, plan: Plan, run: Run) -> dict[str, Any]:
    """Search with a changed copy of the first readable image of the folder, which is written to ``out``."""
    change = CHANGES[-1]
    for path in plan.images:
        try:
            pixels = read_image(path, _SIDE)
            break
        except UnreadableImage:
            continue
    changed = Image.fromarray(to_pixels(change(pixels[None].float() / 255))[0])
    copy = out / "example.png"
    with write_aside(copy) as aside:
        changed.save(aside, "PNG")
    began = time.perf_counter()
    hits = search_by(index, copy, run.path, k=5)
    seconds = round(time.perf_counter() - began, 3)
    return {
        "image": str(copy),
        "copy of": str(path),
        "change": change.words,
        "hits": hits,
        "seconds": seconds,
    }


def _summary(plan: Plan, run: Run, index: Path, example: Mapping[str, Any]) -> dict[str, Any]:
    results = run.evaluated()
    columns, rows = copy_table(results)
    return {
        "images": len(plan.images),
        "taken for": plan.words,
        "run": str(run.path),
        "index": str(index),
        "report": str(run.path / "report.html"),
        "bits": run.card()["bits"],
        "training seconds": run.card()["seconds"],
        "headline": {name: _headline(result) for name, result in results.items()},
        "copies": [dict(zip(columns, row, strict=True)) for row in rows],
        "example": dict(example),
    }


def _headline(result: EvalResult) -> dict[str, float]:
    name = headline_of(result)
    return {name: result.values[name], "chance": result.reference["chance"]}


def next_commands(run: Run, index: Path, image: Path, hardening: Path, folder: Path) -> dict[str, str]:
    """Command lines to go on with, by what they do."""
    quoted = {name: shlex.quote(str(path)) for name, path in (("run", run.path), ("folder", folder))}
    runs = shlex.quote(str(run.path.parent.parent))
    return {
        "search": f"robusthash search {shlex.quote(str(index))} {shlex.quote(str(image))}",
        "assess": f"robusthash assess {quoted['run']}",
        "audit": f"robusthash audit {quoted['run']} --photos {quoted['folder']}",
        "harden": f"robusthash run {shlex.quote(str(hardening))} --runs {runs}",
    }
