"""Models outside of runs: exported folders of weights and a card, and entries of the registry."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import safetensors.torch

from robusthash.apps.experiment.run_directory import Run, RunError, load_run, reading, without_weights
from robusthash.core.atomic_files import json_text, write_all_aside
from robusthash.core.limited_files import read_json
from robusthash.core.plugins import as_sources, sources, without_new_code
from robusthash.core.registry import nearest
from robusthash.metrics.results import software_versions
from robusthash.models.hasher import Hasher, build_hasher
from robusthash.robustness.evidence.records import load_entry

SCHEMA = "robusthash.model/1"
CARD, WEIGHTS = "model.json", "hasher.safetensors"
REGISTRY, RUNS = Path("registry"), Path("runs")


def save_exported(folder: Path, hasher: Hasher, facts: dict[str, Any]) -> None:
    """Write weights and card of a hasher to a folder of their own; ``facts`` are fields of the card.

    Raises:
        FileExistsError: the folder holds something else than an exported model.
        ValueError: a wrapped net, whose code is not of this package.
    """
    if "foreign" in hasher.spec:
        raise ValueError(
            f"{hasher.spec['foreign']} is a wrapped net, which only its own code can build again: keep its "
            "state_dict by torch.save, and wrap it after loading"
        )
    others = (
        [path.name for path in folder.iterdir() if path.name not in (CARD, WEIGHTS)]
        if folder.is_dir()
        else []
    )
    if others:
        raise FileExistsError(f"{folder} holds {others[0]}, which is no part of a model; give another folder")
    tensors = {name: value.detach().cpu().contiguous() for name, value in hasher.state_dict().items()}
    weights = safetensors.torch.save(tensors)
    spec = {**hasher.spec, **{name: without_weights(hasher.spec[name]) for name in ("image", "text")}}
    card = {
        "schema": SCHEMA,
        **facts,
        "bits": hasher.bits,
        "modalities": list(hasher.modalities),
        "hasher": spec,
    }
    if used := sources(spec):
        card["plugins"] = used
    card |= {"weights": hashlib.sha256(weights).hexdigest(), "versions": software_versions()}
    text = json_text(card, CARD)
    folder.mkdir(parents=True, exist_ok=True)
    with write_all_aside([folder / WEIGHTS, folder / CARD]) as asides:
        asides[0].write_bytes(weights)
        asides[1].write_text(text, encoding="utf-8")


def load_exported(folder: Path) -> tuple[Hasher, dict[str, Any]]:
    """Hasher (eval mode, CPU) and card of an exported model. No pickle is opened.

    Raises:
        RunError: damaged files, another schema, or parts of a module that ``core.plugins`` refuses.
    """
    again = "save the model again"
    with reading(folder / CARD, again, "the card"):
        card = read_json(folder / CARD)
        if card["schema"] != SCHEMA:
            raise ValueError(f"schema {card['schema']!r}, and this version reads {SCHEMA!r}")
        spec, size, digest = card["hasher"], card["image_size"], card["weights"]
        recorded = as_sources(card.get("plugins", {}))
    with reading(folder / WEIGHTS, again, "the file of weights"):
        weights = (folder / WEIGHTS).read_bytes()
        if hashlib.sha256(weights).hexdigest() != digest:
            raise ValueError("its sha256 is not that of the card")
        with without_new_code(folder, recorded):
            hasher = build_hasher(**spec)
        hasher.load_state_dict(safetensors.torch.load(weights))
        [int(side) for side in size]
    return hasher.eval(), card


def run_of_entry(name: str) -> Run:
    """The run with the weights of a registry entry.

    Args:
        name: id of an entry in ``registry/``, or the path of its file; its run is looked for in ``runs/``.

    Raises:
        RunError: no such entry, or no run with its weights; the message says how to make it.
    """
    path = Path(name) if name.endswith(".yaml") else REGISTRY / f"{name}.yaml"
    if not path.is_file():
        known = sorted(each.stem for each in REGISTRY.glob("*.yaml"))
        hint = nearest(name, known) if known else f"; there is no {REGISTRY}/ here to look a name up in"
        raise RunError(f"{name!r} is neither a run, an exported model nor a registry entry{hint}")
    entry = load_entry(path)
    source, close = entry.source, ""
    for card in sorted(RUNS.glob("*/*/model.json")):
        run = load_run(card.parent)
        if source.digest and run.card().get("digest") == source.digest:
            return run
        if run.config.name == Path(source.recipe).stem and run.config.runtime.seed == source.seed:
            if not source.digest:
                return run
            close = f" ({run.path} is of this recipe and seed with other weights, {run.card().get('digest')})"
    overrides = "".join(f" --set {each}" for each in (f"runtime.seed={source.seed}", *source.set))
    raise RunError(
        f"the weights {source.digest} of the entry {entry.id} are in no run of {RUNS}/{close}; train it, "
        f"'robusthash train {source.recipe}{overrides}', and load that run"
    )
