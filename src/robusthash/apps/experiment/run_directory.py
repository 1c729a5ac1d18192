"""Run directories: names, digests, checkpoints, and the trained model in files that execute nothing when
read."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import time
import zipfile
from collections.abc import Callable, Sequence
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

logger = logging.getLogger(__name__)


class RunError(ValueError):
    """A run directory that cannot be used as it stands."""


CHECKED = "checks.json"
"""What ``check`` said of a run."""

KEPT = "kept.json"
"""What makes a run directory a copy of results alone; see ``keeping``."""


def write_json(path: Path, value: Any) -> None:
    """Write JSON aside and rename, so that a reader never sees half a file."""
    with write_aside(path) as temporary:
        temporary.write_text(json_text(value, path.name))


@dataclass(frozen=True)
class Run:
    """One run directory. Implements the loop's ``RunLog``."""

    path: Path
    config: Config
    on_progress: Callable[[int, int, str], None] = field(
        default=lambda done, total, text: None, compare=False
    )

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def recipe(self) -> str:
        """What training seeds of one recipe have in common, and no other recipe; wherever the data lies."""
        plain = self.config.model_dump()
        data = plain["data"] if isinstance(plain["data"], dict) else {"name": plain["data"]}
        plain["data"] = {key: value for key, value in data.items() if key != "root"}
        plain["runtime"]["seed"] = 0
        return f"{self.config.name} {Config.model_validate(plain).model_id()}"

    @property
    def kept(self) -> bool:
        """A copy of results alone, without weights."""
        return (self.path / KEPT).is_file()

    @property
    def trained(self) -> bool:
        """The final weights are there; ``model.json`` is written last."""
        return (self.path / "model.json").is_file()

    @property
    def _resume_file(self) -> Path:
        return self.path / "checkpoint" / "resume.pt"

    def resume(self) -> dict[str, Any] | None:
        """The last training checkpoint, or None.

        Raises:
            RunError: a checkpoint that cannot be read; it names the file and says what to do.
        """
        if not self._resume_file.is_file():
            return None
        try:
            return torch.load(self._resume_file, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, OSError) as error:
            raise RunError(
                f"checkpoint {self._resume_file} is damaged ({str(error).splitlines()[0]}); "
                "delete it to train again from the start"
            ) from None

    def checkpoint(self, state: dict[str, Any]) -> None:
        """Replace the training checkpoint; keep the weights of this epoch too, if the config wants them."""
        self._resume_file.parent.mkdir(parents=True, exist_ok=True)
        every = self.config.runtime.keep_epochs
        if every is not None and state["epoch"] % every == 0:
            path = self._epoch_file(state["epoch"])
            path.parent.mkdir(exist_ok=True)
            _save_weights(state["modules"]["hasher"], path)
        with write_aside(self._resume_file) as temporary:
            torch.save(state, temporary)

    def log(self, line: dict[str, Any]) -> None:
        """Append one JSON line; lines of epochs that a kill made run again are told by their epoch number."""
        with (self.path / "log.jsonl").open("a") as lines:
            lines.write(json.dumps(line) + "\n")

    def _epoch_file(self, epoch: int) -> Path:
        return self.path / "epochs" / f"{epoch}.safetensors"

    def kept_epochs(self) -> list[int]:
        """After how many epochs weights were kept, ascending; see ``runtime.keep_epochs``."""
        return sorted(int(path.stem) for path in (self.path / "epochs").glob("*.safetensors"))

    def load_epoch(self, epoch: int) -> tuple[Hasher, HashObjective]:
        """The hasher as it was after ``epoch`` epochs, and the objective of the trained run."""
        hasher, objective = self.load_model()
        _load_weights(hasher, self._epoch_file(epoch))
        return hasher, objective

    def lines(self) -> list[dict[str, Any]]:
        """One line per epoch; of an epoch that a kill made run again, the last.

        Raises:
            RunError: no epoch has been trained.
        """
        path = self.path / "log.jsonl"
        if not path.is_file():
            raise RunError(
                f"{self.path} has no training log; run 'robusthash train' or 'robusthash run' first"
            )
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return list({line["epoch"]: line for line in lines}.values())

    def progress(self, done: int, total: int, text: str) -> None:
        self.on_progress(done, total, text)

    def save_model(
        self,
        hasher: Hasher,
        objective: HashObjective,
        lines: list[dict[str, Any]],
        image_size: tuple[int, ...],
    ) -> None:
        """Write the trained weights and the model card; the training checkpoint is then no longer needed."""
        folder = self.path / "checkpoint"
        folder.mkdir(parents=True, exist_ok=True)
        weights = {"hasher": _save_weights(hasher.state_dict(), folder / "hasher.safetensors")}
        weights["objective"] = _save_weights(objective.kept(), folder / "objective.safetensors")
        card = {
            "name": self.config.name,
            "id": self.id,
            "bits": hasher.bits,
            "modalities": list(hasher.modalities),
            "image_size": list(image_size),
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
        """Keep the database codes that the method itself learned."""
        with write_aside(self.path / "checkpoint" / "database.npz") as temporary:
            np.savez(temporary, allow_pickle=False, codes=codes.packed.cpu().numpy(), bits=codes.bits)

    def learned_database(self) -> Codes | None:
        """The database codes that the method learned, in the order of the database split, or None."""
        path = self.path / "checkpoint" / "database.npz"
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as arrays:
                packed, bits = torch.from_numpy(arrays["codes"]), int(arrays["bits"])
        except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise RunError(
                f"learned database codes {path} are damaged ({error}); train the run again"
            ) from None
        return Codes(packed, bits, torch.arange(len(packed)), self.card()["digest"])

    def card(self) -> dict[str, Any]:
        """The model card.

        Raises:
            RunError: the run is not trained.
        """
        if not self.trained:
            raise RunError(
                f"{self.path} holds no trained model; run 'robusthash train' or 'robusthash run' first"
            )
        return json.loads((self.path / "model.json").read_text())

    @property
    def was_evaluated(self) -> bool:
        return (self.path / "metrics.json").is_file()

    def evaluated(self) -> dict[str, EvalResult]:
        """What ``evaluate`` measured, by name: ``clean``, each attack, ``worst``; ``I2T clean`` in several
        directions.

        Raises:
            RunError: the run has not been evaluated.
        """
        if not self.was_evaluated:
            raise RunError(f"{self.path} has not been evaluated; run 'robusthash evaluate {self.path}' first")
        return {result.name: result for result in load_results(self.path / "metrics.json")}

    def assessed(self) -> dict[str, EvalResult]:
        """What suites found, by name: ``img-linf-8 standard``, ``I2T img-linf-8 fast``; empty where none was
        run."""
        path = self.path / "assess.json"
        return {result.name: result for result in load_results(path)} if path.is_file() else {}

    def results(self) -> dict[str, EvalResult]:
        """Both by name. Tables of attacks take ``evaluated`` alone, so that no suite is listed among its own
        parts.

        Raises:
            RunError: the run has been neither evaluated nor assessed.
        """
        assessed = self.assessed()
        return assessed if assessed and not self.was_evaluated else {**assessed, **self.evaluated()}

    def checked(self) -> tuple[Flag, ...]:
        """What ``check`` last said of the model; empty where it was not asked.

        Raises:
            RunError: a file that cannot be read; it is named.
        """
        path = self.path / CHECKED
        if not path.is_file():
            return ()
        try:  # JSON has no infinite numbers, so they may be text
            return tuple(
                Flag(
                    made["id"], float(made["value"]), float(made["threshold"]), made["level"], made["remedy"]
                )
                for made in json.loads(path.read_text(encoding="utf-8"))
            )
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{path} is damaged ({error!r}); write it again: robusthash check {self.path}"
            ) from None

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
        image, text = _without_weights(spec["image"]), _without_weights(spec["text"])
        hasher = build_hasher(**{**spec, "image": image, "text": text})
        _load_weights(hasher, self.path / "checkpoint" / "hasher.safetensors")
        return hasher.eval()

    def load_model(self) -> tuple[Hasher, HashObjective]:
        """The trained hasher and its objective (eval mode, CPU); errors as of ``load_hasher``."""
        hasher = self.load_hasher()
        objective = build("objective", self.card()["objective"])
        _load_weights(objective, self.path / "checkpoint" / "objective.safetensors")
        return hasher, objective.eval()


def open_run(
    config: Config,
    root: Path,
    ancestor: str = "",
    progress: Callable[[int, int, str], None] | None = None,
) -> Run:
    """The run directory of ``config`` under ``root``, made if it is new.

    Raises:
        RunError: the directory belongs to another config.
    """
    path = root / config.name / config.model_id(ancestor)
    existing = path / "config.yaml"
    if (path / KEPT).is_file():
        raise RunError(
            f"{path} keeps results without weights, and no run goes on there; use another --runs folder"
        )
    if existing.is_file():
        held = load_config(existing).model_id(ancestor)
        if held != path.name:
            raise RunError(
                f"{path} holds the run of another config ({held}); move it away or use another --runs folder"
            )
    path.mkdir(parents=True, exist_ok=True)
    with write_aside(existing) as temporary:
        temporary.write_text(save_config(config))
    environment = {
        "versions": software_versions(),
        "threads": torch.get_num_threads(),
        "started": time.strftime("%F %T"),
    }
    if not (path / "environment.json").is_file():
        write_json(path / "environment.json", environment)
    return Run(path, config, progress or Run.on_progress)


def load_run(path: str | Path) -> Run:
    """An existing run directory.

    Raises:
        RunError: not a run directory.
    """
    path = Path(path)
    if not (path / "config.yaml").is_file():
        raise RunError(f"{path} is not a run directory: it has no config.yaml")
    try:
        return Run(path, load_config(path / "config.yaml"))
    except ConfigError as error:
        raise RunError(f"{path}: its config cannot be read: {error}") from None


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Run directories: those given, and of any other folder given those right below it, by name.

    Raises:
        RunError: a folder that neither is a run directory nor holds one.
    """
    found: list[Path] = []
    for path in paths:
        below = sorted(config.parent for config in path.glob("*/config.yaml"))
        if not (path / "config.yaml").is_file() and not below:
            deeper = next(path.glob("*/*/config.yaml"), None)
            raise RunError(
                f"{path} is not a run directory and holds none: it has no config.yaml"
                + ("" if deeper is None else f"; give the folders in it that do, such as {deeper.parents[1]}")
            )
        found += [path] if (path / "config.yaml").is_file() else below
    return found


def runs_with(has: Callable[[Run], bool], paths: Sequence[Path]) -> tuple[list[Run], list[Run]]:
    """The runs that ``find_runs`` finds: those that are given or ``has`` holds of; and the others, of
    folders.

    So a folder may hold runs that wait for their results, and a run that is given itself is not left out.

    Raises:
        RunError: a folder that neither is a run directory nor holds one.
    """
    runs = [load_run(path) for path in find_runs(paths)]
    chosen = [run for run in runs if run.path in paths or has(run)]
    return chosen, [run for run in runs if run not in chosen]


def _without_weights(encoder: Any) -> Any:
    """Encoder settings, nested ones too, without pretrained weights: those were only the start, and may be
    gone."""
    if not isinstance(encoder, dict):
        return encoder
    return {key: None if key == "weights" else _without_weights(value) for key, value in encoder.items()}


def _save_weights(state: dict[str, Tensor], path: Path) -> str:
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with write_aside(path) as temporary:
        safetensors.torch.save_file(tensors, temporary)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _load_weights(module: nn.Module, path: Path) -> None:
    """Load every tensor by name; buffers that ``setup`` makes (centers) take the shape of the file."""
    try:
        tensors = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise RunError(f"weights {path} are missing or damaged ({error}); train the run again") from None
    for name, buffer in module.named_buffers():
        if name in tensors and buffer.shape != tensors[name].shape and buffer.numel() == 0:
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, torch.empty_like(tensors[name]))
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise RunError(
            f"weights {path} do not fit the model card: {str(error).splitlines()[-1].strip()}"
        ) from None
