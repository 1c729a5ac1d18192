"""Run directories: names, digests, checkpoints, and the trained model in files that run no code when read."""

from __future__ import annotations

import hashlib
import json
import pickle
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from robusthash.apps.experiment.config import Config, ConfigError, load_config, save_config
from robusthash.core.atomic_files import json_text, write_aside
from robusthash.core.registry import build
from robusthash.core.runtime import digest
from robusthash.core.types import Codes
from robusthash.metrics.results import EvalResult, Flag, load_results, software_versions
from robusthash.models.hasher import Hasher, build_hasher
from robusthash.objectives.base import HashObjective

Progress = Callable[[int, int, str], None]
"""Called with (done, total, text)."""


class RunError(ValueError):
    """A run directory that cannot be used as it stands."""


CHECKED = "checks.json"  # the flags of ``check``
TEXTS = "texts.json"  # how texts become inputs, so that those of others can
KEPT = "kept.json"  # marks a copy of results without weights, see ``kept_results``
_TRAIN = "run 'robusthash train' or 'robusthash run' first"
_DAMAGED: tuple[type[Exception], ...] = (ValueError, KeyError, TypeError, RuntimeError, OSError, EOFError)
_DAMAGED += (pickle.UnpicklingError, zipfile.BadZipFile, safetensors.SafetensorError)


@contextmanager
def reading(path: Path, remedy: str, what: str = "") -> Iterator[None]:
    """Raise an error of a block that reads ``path`` as ``RunError("WHAT PATH is damaged (...); REMEDY")``."""
    try:
        yield
    except _DAMAGED as error:
        reason = next(iter(str(error).splitlines()), repr(error))
        raise RunError(f"{f'{what} {path}'.strip()} is damaged ({reason}); {remedy}") from None


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    with write_aside(path) as temporary:
        temporary.write_text(json_text(value, path.name))


@dataclass(frozen=True)
class Run:
    """One run directory. Implements the loop's ``RunLog``."""

    path: Path
    config: Config
    on_progress: Progress = field(default=lambda done, total, text: None, compare=False)

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def recipe(self) -> str:
        """Identity of the recipe, the same for every training seed and wherever the data lies."""
        plain = self.config.model_dump()
        data = plain["data"] if isinstance(plain["data"], dict) else {"name": plain["data"]}
        plain["data"] = {key: value for key, value in data.items() if key != "root"}
        plain["runtime"]["seed"] = 0
        return f"{self.config.name} {Config.model_validate(plain).model_id()}"

    @property
    def kept(self) -> bool:
        """A copy of results without weights."""
        return (self.path / KEPT).is_file()

    @property
    def trained(self) -> bool:
        """The final weights exist; ``model.json`` is written last."""
        return (self.path / "model.json").is_file()

    @property
    def _resume_file(self) -> Path:
        return self.path / "checkpoint" / "resume.pt"

    @property
    def _database_file(self) -> Path:
        return self.path / "checkpoint" / "database.npz"

    def resume(self) -> dict[str, Any] | None:
        """The last training checkpoint, or None. Raises RunError for one that cannot be read."""
        if not self._resume_file.is_file():
            return None
        with reading(self._resume_file, "delete it to train again from the start", "checkpoint"):
            return torch.load(self._resume_file, map_location="cpu", weights_only=True)

    def checkpoint(self, state: dict[str, Any]) -> None:
        """Replace the training checkpoint; store the epoch's weights too, if ``keep_epochs`` says so."""
        self._resume_file.parent.mkdir(parents=True, exist_ok=True)
        every = self.config.runtime.keep_epochs
        if every is not None and not state.get("step") and state["epoch"] % every == 0:
            path = self._epoch_file(state["epoch"])
            path.parent.mkdir(exist_ok=True)
            _save_weights(state["modules"]["hasher"], path)
        with write_aside(self._resume_file) as temporary:
            torch.save(state, temporary)

    def log(self, line: dict[str, Any]) -> None:
        """Append one JSON line."""
        with (self.path / "log.jsonl").open("a") as lines:
            lines.write(json.dumps(line) + "\n")

    def _epoch_file(self, epoch: int) -> Path:
        return self.path / "epochs" / f"{epoch}.safetensors"

    def kept_epochs(self) -> list[int]:
        """Numbers of the epochs whose weights are stored, ascending; see ``runtime.keep_epochs``."""
        return sorted(int(path.stem) for path in (self.path / "epochs").glob("*.safetensors"))

    def load_epoch(self, epoch: int) -> tuple[Hasher, HashObjective]:
        """The hasher after ``epoch`` epochs, and the objective of the trained run."""
        hasher, objective = self.load_model()
        _load_weights(hasher, self._epoch_file(epoch))
        return hasher, objective

    def lines(self) -> list[dict[str, Any]]:
        """One line per epoch, the last where a kill repeated it. Raises RunError before the first epoch."""
        path = self.path / "log.jsonl"
        if not path.is_file():
            raise RunError(f"{self.path} has no training log; {_TRAIN}")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return list({line["epoch"]: line for line in lines}.values())

    def progress(self, done: int, total: int, text: str) -> None:
        self.on_progress(done, total, text)

    def save_model(
        self, hasher: Hasher, objective: HashObjective, lines: list[dict[str, Any]], size: tuple[int, ...]
    ) -> None:
        """Write weights and model card, with the ``size`` of images, and delete the training checkpoint."""
        folder = self.path / "checkpoint"
        folder.mkdir(parents=True, exist_ok=True)
        weights = {"hasher": _save_weights(hasher.state_dict(), folder / "hasher.safetensors")}
        weights["objective"] = _save_weights(objective.kept(), folder / "objective.safetensors")
        card = {
            "name": self.config.name,
            "id": self.id,
            "bits": hasher.bits,
            "modalities": list(hasher.modalities),
            "image_size": list(size),
            "declared": hasher.declared,
            "hasher": hasher.spec,
            "objective": self.config.training.objective,
            "digest": digest(weights, 16),
            "epochs": len(lines),
            "seconds": round(sum(line["seconds"] for line in lines), 1),
            "last": lines[-1],
            "versions": software_versions(),
        }
        write_json(self.path / "model.json", card)
        self._resume_file.unlink(missing_ok=True)

    def save_database(self, codes: Codes) -> None:
        """Store the database codes that the method itself learned."""
        with write_aside(self._database_file) as temporary:
            np.savez(temporary, allow_pickle=False, codes=codes.packed.cpu().numpy(), bits=codes.bits)

    def learned_database(self) -> Codes | None:
        """The database codes that the method learned, in the order of the database split, or None."""
        path = self._database_file
        if not path.is_file():
            return None
        with reading(path, "train the run again", "database of codes"), np.load(path) as arrays:
            packed, bits = torch.from_numpy(arrays["codes"]), int(arrays["bits"])
        return Codes(packed, bits, torch.arange(len(packed)), self.card()["digest"])

    def card(self) -> dict[str, Any]:
        """The model card. Raises RunError before the run is trained, and where the card is damaged."""
        if not self.trained:
            raise RunError(f"{self.path} holds no trained model; {_TRAIN}")
        path = self.path / "model.json"
        try:
            card = json.loads(path.read_text())
        except ValueError as error:
            raise RunError(f"the model card {path} is damaged ({error}); train the run again") from None
        if not isinstance(card, dict) or "hasher" not in card:
            raise RunError(f"the model card {path} is damaged (it names no hasher); train the run again")
        return card

    @property
    def was_evaluated(self) -> bool:
        return (self.path / "metrics.json").is_file()

    def evaluated(self) -> dict[str, EvalResult]:
        """Results of ``evaluate`` by name: ``clean``, each attack, ``worst``; ``I2T clean`` and the like.

        Raises:
            RunError: the run has not been evaluated.
        """
        if not self.was_evaluated:
            raise RunError(f"{self.path} has not been evaluated; run 'robusthash evaluate {self.path}' first")
        return self._results("metrics.json")

    def assessed(self) -> dict[str, EvalResult]:
        """Results of ``assess`` by name: ``img-linf-8 standard``, ``I2T img-linf-8 fast``; maybe none."""
        return self._results("assess.json")

    def _results(self, file: str) -> dict[str, EvalResult]:
        path = self.path / file
        return {result.name: result for result in load_results(path)} if path.is_file() else {}

    def results(self) -> dict[str, EvalResult]:
        """``assessed`` and ``evaluated`` by name. Raises RunError where there is neither."""
        assessed = self.assessed()
        return assessed if assessed and not self.was_evaluated else {**assessed, **self.evaluated()}

    def checked(self) -> tuple[Flag, ...]:
        """Flags of the last ``check``; empty without one."""
        path = self.path / CHECKED
        if not path.is_file():
            return ()
        with reading(path, f"write it again: robusthash check {self.path}"):
            entries = json.loads(path.read_text(encoding="utf-8"))
            numbers = [(float(entry["value"]), float(entry["threshold"])) for entry in entries]  # maybe "inf"
            return tuple(
                Flag(entry["id"], value, threshold, entry["level"], entry["remedy"])
                for entry, (value, threshold) in zip(entries, numbers, strict=True)
            )

    def load_hasher(self) -> Hasher:
        """The trained hasher alone (eval mode, CPU).

        Raises:
            RunError: weights that are truncated or do not fit the model card.
        """
        if self.kept:
            raise RunError(
                f"{self.path} keeps results without weights; train its recipe again for the model: "
                f"robusthash train {self.path / 'config.yaml'}"
            )
        spec = self.card()["hasher"]
        image, text = without_weights(spec["image"]), without_weights(spec["text"])
        hasher = build_hasher(**{**spec, "image": image, "text": text})
        _load_weights(hasher, self.path / "checkpoint" / "hasher.safetensors")
        return hasher.eval()

    def load_model(self) -> tuple[Hasher, HashObjective]:
        """The trained hasher and its objective (eval mode, CPU); errors as of ``load_hasher``."""
        hasher = self.load_hasher()
        objective = build("objective", self.card()["objective"])
        _load_weights(objective, self.path / "checkpoint" / "objective.safetensors")
        return hasher, objective.eval()


def open_run(config: Config, root: Path, ancestor: str = "", progress: Progress | None = None) -> Run:
    """The run directory of ``config`` under ``root``, created if it is new.

    Raises:
        RunError: the directory belongs to another config, or holds results alone.
    """
    path = root / config.name / config.model_id(ancestor)
    existing = path / "config.yaml"
    if (path / KEPT).is_file():
        raise RunError(f"{path} holds results alone, and no run goes on there; use another --runs folder")
    if existing.is_file():
        held = load_config(existing).model_id(ancestor)
        if held != path.name:
            remedy = "move it away or use another --runs folder"
            raise RunError(f"{path} holds the run of another config ({held}); {remedy}")
    path.mkdir(parents=True, exist_ok=True)
    with write_aside(existing) as temporary:
        temporary.write_text(save_config(config))
    if not (path / "environment.json").is_file():
        threads, started = torch.get_num_threads(), time.strftime("%F %T")
        environment = {"versions": software_versions(), "threads": threads, "started": started}
        write_json(path / "environment.json", environment)
    return Run(path, config, progress or Run.on_progress)


def load_run(path: str | Path) -> Run:
    """An existing run directory. Raises RunError where there is none."""
    path = Path(path)
    if not (path / "config.yaml").is_file():
        raise RunError(f"{path} is not a run directory: it has no config.yaml")
    try:
        return Run(path, load_config(path / "config.yaml"))
    except ConfigError as error:
        raise RunError(f"{path}: its config cannot be read: {error}") from None


def without_weights(encoder: Any) -> Any:
    """Encoder settings without pretrained weights, whose file may be gone since training started there."""
    if not isinstance(encoder, dict):
        return encoder
    return {key: None if key == "weights" else without_weights(value) for key, value in encoder.items()}


def _save_weights(state: dict[str, Tensor], path: Path) -> str:
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with write_aside(path) as temporary:
        safetensors.torch.save_file(tensors, temporary)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _load_weights(module: nn.Module, path: Path) -> None:
    """Load every tensor by name; buffers that ``setup`` makes (centers) take the shape of the file."""
    with reading(path, "train the run again", "the file of weights"):
        tensors = safetensors.torch.load_file(path)
    for name, buffer in module.named_buffers():
        if name in tensors and buffer.shape != tensors[name].shape and buffer.numel() == 0:
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, torch.empty_like(tensors[name]))
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise RunError(f"weights {path} do not fit the model card: {reason}") from None
