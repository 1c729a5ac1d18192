"""The stage behind ``robusthash assess``: a suite on a trained run, kept block by block, written beside the metrics."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from robusthash.apps import stages
from robusthash.apps.config import ConfigError
from robusthash.apps.runs import Run, RunError, write_json
from robusthash.attacks.threat import Ball, Budget, Edits, Threat
from robusthash.core.files import write_aside
from robusthash.core.runtime import digest
from robusthash.evaluation.attacked import Attacked
from robusthash.evaluation.bench import Bench
from robusthash.evaluation.curve import eps_curve
from robusthash.evaluation.lines import Line
from robusthash.evaluation.results import EvalResult, load_results, save_results
from robusthash.evaluation.suite import Checks, Suite, assess_prepared, prepare_suite, run_shard, tier
from robusthash.objectives.base import HashObjective

Extra = Callable[[Bench, HashObjective, Threat, str], Sequence[Line]]
"""(bench, objective, threat, tier) -> lines beside those that every victim is given: adaptive, transfer, black-box."""

CURVE_LINES = ("guided", "soft-ap")


@dataclass(frozen=True)
class FolderKeep:
    """Attacked blocks as files, ``<line>-<digest of its settings>/<restart>/<block>.npz``, complete or not there."""

    root: Path

    def _path(self, line: Line, restart: int, block: int) -> Path:
        name = re.sub(r"[^\w.-]+", "_", line.name)
        return self.root / f"{name}-{digest(line.settings(), 8)}" / str(restart) / f"{block}.npz"

    def load(self, line: Line, restart: int, block: int) -> Attacked | None:
        """The block that was kept, or None.

        Raises:
            RunError: a file that cannot be read; it is named.
        """
        path = self._path(line, restart, block)
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return Attacked.from_arrays({name: arrays[name] for name in arrays.files})
        except (ValueError, OSError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise RunError(
                f"attacked queries {path} are damaged ({error}); delete the file to attack them again"
            ) from None

    def save(self, line: Line, restart: int, block: int, attacked: Attacked) -> None:
        """Keep a block."""
        path = self._path(line, restart, block)
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_aside(path) as aside:
            np.savez(aside, allow_pickle=False, **attacked.arrays())


_BUDGETS: dict[str, tuple[str, Callable[[float], Budget]]] = {
    "img-linf": ("image", lambda size: Ball("linf", size / 255)),
    "img-l2": ("image", lambda size: Ball("l2", size)),
    "txt-linf": ("text", lambda size: Ball("linf", size)),
    "txt-bow": ("text", Edits),
}


def threat_by_name(name: str) -> Threat:
    """The threat that calls itself so: ``img-linf-8`` (of 255), ``img-l2-0.5``, ``txt-linf-0.05``, ``txt-bow-3``.

    Raises:
        ConfigError: another name.
    """
    kind, _, size = name.rpartition("-")
    if kind not in _BUDGETS or not re.fullmatch(r"\d+(\.\d+)?", size):
        raise ConfigError(f"no threat is called {name!r}; write {', '.join(f'{known}-SIZE' for known in _BUDGETS)}")
    modality, make = _BUDGETS[kind]
    return Threat({modality: make(float(size))}, "W2")


def assess(
    run: Run,
    tier_name: str = "fast",
    threat: str | Threat = "img-linf-8",
    queries: int | None = None,
    shown: stages.Shown = stages.silent,
    *,
    direction: str | None = None,
    curve: bool = False,
    shard: tuple[int, int] | None = None,
    extra: Extra | None = None,
    checks: Checks | None = None,
) -> EvalResult | None:
    """Run a suite on a trained run, or go on where it was stopped, and write ``assess.json``.

    Args:
        queries: instead of the tier's; chosen by ``stable_subset``.
        direction: ``I2T`` and the like; the hasher's first modality both ways by default.
        curve: the worst case at seven budgets too, by the lines ``guided`` and ``soft-ap``.
        shard: (i, n): only these blocks of queries, for several processes; a call without it joins them.
        extra: lines beside those of the tier.
        checks: raises the flags.

    Returns:
        The result, named by threat and tier; None of a shard.
    """
    if run.config.runtime.threads:
        torch.set_num_threads(run.config.runtime.threads)
    victim, objective = stages.load_victim(run)
    data = stages.read_data(run.config, shown)
    aim = threat_by_name(threat) if isinstance(threat, str) else threat
    everything = run.config.evaluation.model_copy(update={"queries": None})
    whole = replace(run, config=run.config.model_copy(update={"evaluation": everything}))
    bench = stages._bench(whole, victim, data, shown, direction)
    lines = () if extra is None else extra(bench, objective, aim, tier_name)
    suite, bench, notes = prepare_suite(bench, tier(tier_name, aim, extra_lines=lines, queries=queries))
    folder = _folder(run, suite, bench)
    if shard is not None:
        run_shard(bench, suite, shard, keep=FolderKeep(folder), progress=shown)
        return None
    result = assess_prepared(bench, suite, notes, keep=FolderKeep(folder), progress=shown, checks=checks)
    if curve:
        chosen = [line for line in suite.lines if line.name in CURVE_LINES]
        kept = FolderKeep(folder / "curve")
        result = eps_curve(bench, chosen, aim, keep=kept, progress=shown).onto(result)
    prefix = "" if direction is None else f"{direction} "
    result = stages._described(result, f"{prefix}{result.name}", run)
    _write(run.path / "assess.json", result)
    return result


def _folder(run: Run, suite: Suite, bench: Bench) -> Path:
    """Where the blocks of a suite on these queries are kept; lines keep apart what their own settings change."""
    asked = [bench.queries.fingerprint(), bench.data.database.fingerprint(), bench.protocol.settings()["targets"]]
    identity = digest([run.card()["digest"], *asked, bench.direction, bench.batch_size, bench.seed])
    folder = run.path / "assess" / f"{suite.name}-{identity}"
    folder.mkdir(parents=True, exist_ok=True)
    lines = {line.name: {"restarts": line.restarts, "settings": line.settings()} for line in suite.lines}
    (folder / "lines").mkdir(exist_ok=True)
    write_json(folder / "lines" / f"{suite.digest()}.json", _plain(lines))
    return folder


def _plain(value: object) -> object:
    """Settings as JSON takes them: what is no plain data is written as text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _write(path: Path, result: EvalResult) -> None:
    """Put a result among those of other suites and threats, in place of an older one of its name."""
    others = [other for other in load_results(path) if other.name != result.name] if path.is_file() else []
    save_results(path, [*others, result])
