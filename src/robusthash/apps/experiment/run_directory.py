"""Run directories: names, digests, checkpoints, and the trained model in files that run no code when read."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from robusthash.apps.experiment.config import Config, save_config, settings_of
from robusthash.apps.experiment.run_files import (
    COPY_AGAIN,
    RESULTS_ONLY,
    RunError,
    check_plugins,
    command_line,
    config_of,
    file_again,
    file_digest,
    load_weights,
    opening,
    other_weights,
    reading,
    record_plugins,
    remade,
    run_fault,
    save_weights,
    sealed,
    without_config,
    write_json,
)  # fmt: skip
from robusthash.core.atomic_files import write_arrays, write_aside, write_text
from robusthash.core.limited_files import check_archive, parse_json, read_json, read_npz
from robusthash.core.registry import build
from robusthash.core.runtime import Progress, digest, silent
from robusthash.core.types import Codes
from robusthash.metrics.results import EvalResult, Flag, load_results, software_versions, with_headlines
from robusthash.models.hasher import Hasher, build_hasher
from robusthash.models.saved_hasher import without_weights
from robusthash.objectives.base import HashObjective

RESTART = "delete it to train again from the start"
CHECKED = "checks.json"  # the flags of ``check``
TEXTS = "texts.json"  # how texts become inputs, so that those of others can
_TRAIN = "run 'robusthash train' or 'robusthash run' first"


@dataclass(frozen=True)
class Run:
    """One run directory. Implements the loop's ``RunLog``."""

    path: Path
    config: Config
    on_progress: Progress = field(default=silent, compare=False)

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def recipe(self) -> str:
        """Identity of the recipe, the same for every training seed and wherever the data lies."""
        plain = self.config.model_dump()
        plain["data"] = {key: value for key, value in settings_of(plain["data"]).items() if key != "root"}
        plain["runtime"]["seed"] = 0
        return f"{self.config.name} {Config.model_validate(plain).model_id()}"

    @property
    def results_only(self) -> bool:
        """A copy of results without weights."""
        return (self.path / RESULTS_ONLY).is_file()

    @property
    def origin(self) -> dict[str, str]:
        """The runs that it comes from by ``parent`` and ``resumed_from``, as far as it has and knows them."""
        path = self.path / "environment.json"
        facts = read_json(path) if path.is_file() else {}
        return {name: str(facts[name]) for name in ("parent", "resumed_from") if name in facts}

    @property
    def trained(self) -> bool:
        """The final weights exist; ``model.json`` is written last."""
        return (self.path / "model.json").is_file()

    @property
    def checkpoint_file(self) -> Path:
        """The last checkpoint of training, which stays: a longer training can go on from it."""
        return self.path / "checkpoint" / "resume.pt"

    @property
    def _database_file(self) -> Path:
        return self.path / "checkpoint" / "database.npz"

    def _remedy(self, file: str) -> str:
        return file_again(self.path, self.config, file)

    @property
    def _again(self) -> str:
        return self._remedy("model.json")

    def _first(self, work: str) -> str:
        return COPY_AGAIN if self.results_only else work

    def resume(self) -> dict[str, Any] | None:
        """The last training checkpoint, or None. Raises RunError for one that cannot be read."""
        if not self.checkpoint_file.is_file():
            return None
        with reading(self.checkpoint_file, RESTART, "checkpoint"):
            check_archive(self.checkpoint_file)
            return torch.load(self.checkpoint_file, map_location="cpu", weights_only=True)

    def checkpoint(self, state: dict[str, Any]) -> None:
        """Replace the training checkpoint; store the epoch's weights too, if ``keep_epochs`` says so."""
        self.checkpoint_file.parent.mkdir(parents=True, exist_ok=True)
        every = self.config.runtime.keep_epochs
        if every is not None and not state.get("step") and state["epoch"] % every == 0:
            path = self._epoch_file(state["epoch"])
            path.parent.mkdir(exist_ok=True)
            save_weights(state["modules"]["hasher"], path)
        with write_aside(self.checkpoint_file) as temporary, temporary.open("wb") as stream:
            torch.save(state, stream)

    def log(self, line: dict[str, Any]) -> None:
        """Append one JSON line."""
        with (self.path / "log.jsonl").open("a+b") as lines:
            end = lines.tell()
            lines.seek(max(0, end - 1))
            torn = end and lines.read() != b"\n"  # by a full disk
            lines.write((b"\n" if torn else b"") + json.dumps(line).encode() + b"\n")

    def _epoch_file(self, epoch: int) -> Path:
        return self.path / "epochs" / f"{epoch}.safetensors"

    def stored_epochs(self) -> list[int]:
        """Numbers of the epochs whose weights are stored, ascending; see ``runtime.keep_epochs``."""
        return sorted(int(path.stem) for path in (self.path / "epochs").glob("*.safetensors"))

    def load_epoch(self, epoch: int) -> tuple[Hasher, HashObjective]:
        """The hasher after ``epoch`` epochs, and the objective of the trained run."""
        hasher, objective = self.load_model()
        file = self._epoch_file(epoch)
        load_weights(hasher, file, f"delete {file} to leave this epoch out")
        return hasher, objective

    def lines(self) -> list[dict[str, Any]]:
        """One line per epoch, the last where a kill repeated it.

        Raises:
            RunError: no epoch is over, or a line that cannot be read.
        """
        path, lines = self.path / "log.jsonl", dict[int, dict[str, Any]]()
        if not path.is_file():
            raise RunError(f"{self.path} has no training log; {self._first(_TRAIN)}")
        for number, text in enumerate(path.read_bytes().splitlines(), 1):
            with reading(path, f"delete its line {number}"):
                line = parse_json(text, "it")
                lines[int(line["epoch"])] = line
        return list(lines.values())

    def progress(self, done: int, total: int, text: str) -> None:
        self.on_progress(done, total, text)

    def save_model(
        self, hasher: Hasher, objective: HashObjective, lines: list[dict[str, Any]], size: tuple[int, ...]
    ) -> None:
        """Write weights and model card, with the ``size`` of images."""
        folder = self.path / "checkpoint"
        folder.mkdir(parents=True, exist_ok=True)
        weights = {"hasher": save_weights(hasher.state_dict(), folder / "hasher.safetensors")}
        weights["objective"] = save_weights(objective.saved_state(), folder / "objective.safetensors")
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
            "weights": weights,
            "epochs": len(lines),
            "seconds": round(sum(line["seconds"] for line in lines), 1),
            "last": lines[-1],
            "versions": software_versions(),
        }
        write_json(self.path / "model.json", sealed(card))

    def check_weights(self) -> dict[str, str]:
        """Compute the digests of both files of weights, and compare them with the one in the model card.

        Raises:
            RunError: a file is missing, or holds other weights than those that were trained.
        """
        card = self.card()
        files = {name: self.path / "checkpoint" / f"{name}.safetensors" for name in ("hasher", "objective")}
        for path in files.values():
            if not path.is_file():
                raise RunError(f"the weights {path} are missing; {self._again}")
        digests = {name: file_digest(path) for name, path in files.items()}
        if digest(digests, 16) != card["digest"]:
            written = card.get("weights", {})  # older cards have the digest of both alone
            wrong = [str(path) for name, path in files.items() if digests[name] != written.get(name)]
            raise RunError(
                f"the weights {' or '.join(wrong)} are not those that were trained: their digest is "
                f"{digest(digests, 16)}, and the model card says {card['digest']}; {self._again}"
            )
        return digests

    def save_database(self, codes: Codes) -> None:
        """Store the database codes that the method itself learned."""
        write_arrays(self._database_file, codes=codes.packed.cpu().numpy(), bits=codes.bits)

    def learned_database(self) -> Codes | None:
        """The database codes that the method learned, in the order of the database split, or None."""
        path = self._database_file
        if not path.is_file():
            return None
        with reading(path, self._again, "database of codes"):
            arrays = read_npz(path, ("codes", "bits"))
            packed, bits = torch.from_numpy(arrays["codes"]), int(arrays["bits"])
        return Codes(packed, bits, torch.arange(len(packed)), self.card()["digest"])

    def card(self) -> dict[str, Any]:
        """The model card. Raises RunError before the run is trained, and where the card is damaged."""
        if not self.trained:
            raise RunError(f"{self.path} holds no trained model; {self._first(_TRAIN)}")
        path = self.path / "model.json"
        with reading(path, self._again, "the model card"):
            card = read_json(path)
            if fault := run_fault(card, self.path, self.config, self.results_only):
                raise ValueError(fault)
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
            first = self._first(f"run 'robusthash evaluate {self.path}' first")
            raise RunError(f"{self.path} has not been evaluated; {first}")
        return self._of_these_weights("metrics.json")

    def assessed(self) -> dict[str, EvalResult]:
        """Results of ``assess`` by name: ``img-linf-8 standard``, ``I2T img-linf-8 fast``; maybe none."""
        return self._of_these_weights("assess.json")

    def stored(self, file: str) -> dict[str, EvalResult]:
        """Results of a file of the run by name; none where there is no file.

        Raises:
            RunError: it cannot be read.
        """
        path = self.path / file
        if not path.is_file():
            return {}
        with reading(path, self._again if self.results_only else remade(path)):
            return {result.name: result for result in with_headlines(load_results(path))}

    def _of_these_weights(self, file: str) -> dict[str, EvalResult]:
        """Results as of ``stored``. Raises RunError where they are of other weights than the model card."""
        results, path = self.stored(file), self.path / file
        if results and self.trained and (fault := other_weights(results, self.card())):
            raise RunError(f"{path}: {fault}; {self._again if self.results_only else remade(path)}")
        return results

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
            entries = read_json(path)
            numbers = [(float(entry["value"]), float(entry["threshold"])) for entry in entries]  # maybe "inf"
            return tuple(
                Flag(entry["id"], value, threshold, entry["level"], entry["remedy"])
                for entry, (value, threshold) in zip(entries, numbers, strict=True)
            )

    def load_hasher(self) -> Hasher:
        """The trained hasher alone (eval mode, CPU).

        Raises:
            RunError: weights that are not those of the model card.
        """
        if self.results_only:
            raise RunError(
                f"{self.path} keeps results without weights; train its recipe again for the model: "
                f"robusthash train {self.path / 'config.yaml'}"
            )
        self.check_weights()
        spec, card = self.card()["hasher"], self.path / "model.json"
        with opening(self.path), reading(card, self._again, "the model card"):
            image, text = without_weights(spec["image"]), without_weights(spec["text"])
            hasher = build_hasher(**{**spec, "image": image, "text": text})
        load_weights(hasher, self.path / "checkpoint" / "hasher.safetensors", self._again)
        return hasher.eval()

    def load_model(self) -> tuple[Hasher, HashObjective]:
        """The trained hasher and its objective (eval mode, CPU); errors as of ``load_hasher``."""
        hasher = self.load_hasher()
        card = self.path / "model.json"
        with opening(self.path), reading(card, self._again, "the model card"):
            objective = build("objective", self.card()["objective"])
        load_weights(objective, self.path / "checkpoint" / "objective.safetensors", self._again)
        return hasher, objective.eval()


def run_folder(config: Config, root: Path, ancestor: str = "") -> Path:
    """The run directory of ``config`` under ``root``: its name, and the digest of what makes the model.

    Raises:
        RunError: it holds results alone, or its plug-ins have changed since it was trained.
    """
    path = root / config.name / config.model_id(ancestor)
    if (path / RESULTS_ONLY).is_file():
        raise RunError(f"{path} holds results alone, and no run goes on there; use another --runs folder")
    check_plugins(path, config)
    return path


def open_run(
    config: Config,
    root: Path,
    ancestor: str = "",
    progress: Progress = silent,
    origin: Mapping[str, Path] | None = None,
) -> Run:
    """The run directory of ``config`` under ``root``, created if it is new.

    Args:
        origin: the runs that it comes from, ``parent`` and ``resumed_from``, for its ``environment.json``.

    A run that is trained keeps its ``config.yaml``, that of its results, until ``accept``.

    Raises:
        RunError: the directory belongs to another config, or holds results alone.
    """
    path = run_folder(config, root, ancestor)
    run, held = Run(path, config, progress), None
    if (path / "config.yaml").is_file():
        with suppress(RunError):  # damaged; the name of the directory says that this is its config
            held = config_of(path).model_id(ancestor)
        if held not in (None, path.name):
            remedy = "move it away or use another --runs folder"
            raise RunError(f"{path} holds the run of another config ({held}); {remedy}")
    path.mkdir(parents=True, exist_ok=True)
    if held is None or not run.trained:
        accept(run)
    if not (path / "environment.json").is_file():
        threads, started = torch.get_num_threads(), time.strftime("%F %T")
        # numbers are the same on processors with the same vector instructions alone
        vectors = torch.backends.cpu.get_cpu_capability()
        environment = {
            "versions": software_versions(),
            "threads": threads,
            "started": started,
            "cpu": vectors,
        }
        environment |= {"command": command} if (command := command_line()) else {}
        named = {name: str(other.resolve()) for name, other in (origin or {}).items()}
        write_json(path / "environment.json", {**environment, **named})
    return run


def accept(run: Run) -> None:
    """Write the config of a run, now that its results are those of this config."""
    write_text(run.path / "config.yaml", save_config(run.config))
    record_plugins(run.path, run.config)


def load_run(path: str | Path) -> Run:
    """An existing run directory. Raises RunError where there is none, or a file of it cannot be read."""
    path = Path(path)
    if not (path / "config.yaml").is_file():
        raise RunError(without_config(path) or f"{path} is not a run directory: it has no config.yaml")
    run = Run(path, config_of(path))
    for name in ("data.json", "environment.json"):
        if (path / name).is_file():
            with reading(path / name, run._remedy(name)):
                if not isinstance(read_json(path / name), dict):
                    raise ValueError("it holds no names")
    return run
