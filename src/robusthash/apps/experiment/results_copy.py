"""Small copies of runs for a repository: results that tables are made of, without weights, blocks or paths.

A kept run is a run directory to every verb that only reads: ``table``, ``compare``, ``leaderboard``,
``report``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from robusthash.apps.experiment.run_directory import Run, RunError, load_run, write_json
from robusthash.apps.experiment.run_files import RESULTS_ONLY, SEAL, sealed
from robusthash.apps.experiment.stored_analyses import CURVES as EPOCH_CURVES
from robusthash.apps.experiment.stored_analyses import Analysis, analysis_values, has_analysis
from robusthash.core.atomic_files import write_all_aside
from robusthash.core.limited_files import read_json
from robusthash.metrics.protocol import CURVES
from robusthash.metrics.results import EvalResult, save_results

SCHEMA = "robusthash.kept/1"
_MADE_BY_VERBS: tuple[Analysis, ...] = ("bands", "cost", "transfer", "epochs")
_RESULTS = ("metrics.json", "assess.json")
_EVIDENCE = "evidence.json"  # rare, and the best-known value needs all of it
_GRADED = ("nDCG@", "ACG@")


def has_results(run: Run) -> bool:
    """True where the run was evaluated or assessed."""
    return any((run.path / name).is_file() for name in _RESULTS)


def can_be_kept(run: Run) -> bool:
    """True where the run has results, or an analysis of it is stored."""
    return has_results(run) or any(has_analysis(run, kind) for kind in _MADE_BY_VERBS)


@dataclass(frozen=True)
class KeptRun:
    """The copy of a run, and the files of an earlier copy that the run no longer has.

    Args:
        stayed: of the same model, which are kept.
        removed: of another model.
    """

    path: Path
    stayed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


def keep(run: Run, out: Path) -> KeptRun:
    """Write ``out/<recipe>/<id>``, a copy of a run that has results; the same run gives the same files again.

    The id stays that of the run, although the paths of this machine are left out of the config. What an
    earlier copy has and the run no longer has stays, as long as it is of the same model.

    Raises:
        RunError: a run that is not trained, has no results, or is itself such a copy; or ``out`` holds the
            run itself.
    """
    if run.results_only:
        raise RunError(f"{run.path} is already a kept copy; give the run that it was made of")
    card = run.card()
    if not can_be_kept(run):
        verbs = "'robusthash evaluate' or 'robusthash assess'"
        raise RunError(f"{run.path} has no results to keep; run {verbs} first")
    target = out / card["name"] / card["id"]
    if target.is_dir() and not (target / RESULTS_ONLY).is_file():
        raise RunError(f"{target} is a run directory, not a kept copy; choose another --out folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".keep-") as folder:
        staged = Path(folder)
        _write(run, card["id"], staged)
        _read_all(load_run(staged))
        same_model = target.is_dir() and _digest(target) == card["digest"]
        target.mkdir(exist_ok=True)
        names = sorted(path.name for path in staged.iterdir())
        with write_all_aside([target / name for name in names]) as asides:
            for name, aside in zip(names, asides, strict=True):
                aside.write_bytes((staged / name).read_bytes())
    left = [path for path in sorted(target.iterdir()) if path.is_file()]
    left = [path for path in left if path.name not in (*names, "report.html")]
    stayed = [path for path in left if same_model and not _replaced(path, names)]
    for path in left:
        if path not in stayed:
            path.unlink()
    stay, gone = (tuple(path.name for path in paths) for paths in (stayed, () if same_model else left))
    return KeptRun(target, stay, gone)


def _digest(copy: Path) -> str | None:
    """The digest of the model of an earlier copy; None where its card cannot be read."""
    try:
        return str(load_run(copy).card()["digest"])
    except (OSError, ValueError, KeyError):
        return None


def _replaced(arrays: Path, names: Sequence[str]) -> bool:
    """True of arrays (``metrics-DIGEST.npz``) whose results (``metrics.json``) were written anew."""
    return arrays.suffix == ".npz" and f"{arrays.stem.rpartition('-')[0]}.json" in names


def _read_all(copy: Run) -> None:
    """Read every result of a copy: one that cannot be read is not worth keeping."""
    if has_results(copy):
        copy.results()
    for kind in _MADE_BY_VERBS:
        analysis_values(copy, kind)


def _write(run: Run, run_id: str, folder: Path) -> None:
    """The files of the copy; ``kept.json`` names what was left out."""
    for path in sorted(run.path.glob("*.json")):
        if path.name in _RESULTS or path.match(EPOCH_CURVES):
            save_results(folder / path.name, [_slim(r) for r in run.stored(path.name).values()], packed=True)
        elif path.name == _EVIDENCE:
            save_results(folder / path.name, list(run.stored(path.name).values()))
        else:
            held = read_json(path)
            if isinstance(held, dict):
                held.pop("command", None)  # it may hold paths
            held = _without_paths(held)
            write_json(
                folder / path.name, sealed(held) if path.name == "model.json" and SEAL in held else held
            )
    config = run.config.model_dump(mode="json")
    if isinstance(config["data"], dict):
        config["data"].pop("root", None)
    text = yaml.safe_dump(_without_paths(config), sort_keys=False)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    log = run.path / "log.jsonl"
    if log.is_file():
        (folder / log.name).write_bytes(log.read_bytes())
    left = "16 bits of the headline and graded means"
    write_json(folder / RESULTS_ONLY, {"schema": SCHEMA, "id": run_id, "per_query": left})


def _slim(result: EvalResult) -> EvalResult:
    """A result with the per-query values that tables, intervals and paired differences need.

    Those are its headline (of a suite also that of its clean queries and of each attack), and nDCG and ACG of
    clean queries and of untargeted attacks. Curves go, but those over budgets; means and intervals of
    everything stay.
    """
    key = result.setting.key
    worst, target = key.name("worst"), key.name("targeted")
    headlines = [name for name in (worst, target, str(key)) if name in result.values]
    if worst not in headlines:
        headlines = headlines[:1]  # of a targeted attack t-MAP alone
    per_query = {
        name: values
        for name, values in result.per_query.items()
        if name in (*headlines, "clean")
        or name.startswith(f"{key} under ")
        or (name.startswith(_GRADED) and target not in headlines)
    }
    curves = {name: axes for name, axes in result.curves.items() if not name.startswith(CURVES)}
    return replace(result, per_query=per_query, curves=curves, winner=())


def _without_paths(value: Any) -> Any:
    """Plain data in which a path that leaves this folder is cut to its last part."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if isinstance(value, str) and value.startswith(("/", "~", "..")) and " " not in value:
        return Path(value).name
    return value
