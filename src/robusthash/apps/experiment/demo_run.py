"""The demo: photographs are searched by code, the search is attacked, hardened by SAAT, attacked again, and
reported.

Everything is made by the same stages that recipes use, in ``OUT/runs``, so a stopped demo goes on where it
was.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robusthash.apps.experiment import stages
from robusthash.apps.experiment.config import load_config, save_config
from robusthash.apps.experiment.run_directory import Run, write_json
from robusthash.apps.experiment.stages import Progress, silent
from robusthash.apps.reports.demo_page import BudgetCurve, DemoExample, DemoSearch, Hit, demo_page
from robusthash.attacks.base import Attack
from robusthash.core.atomic_files import write_aside
from robusthash.core.hamming import pack
from robusthash.core.registry import build
from robusthash.core.runtime import digest
from robusthash.core.types import Codes
from robusthash.data.base import RetrievalData
from robusthash.data.photos import describe_item, thumbnail
from robusthash.data.splits import stable_subset
from robusthash.evaluation.context import EvaluationContext, make_context
from robusthash.evaluation.evaluate import attack_all, score_attack
from robusthash.index import open_index
from robusthash.metrics.distortion import image_measures
from robusthash.metrics.measure_key import MeasureKey, Role
from robusthash.metrics.results import EvalResult, software_versions

MODELS = ("undefended", "saat")
EPS = (0, 2, 4, 8, 12, 16)
"""Budgets of the curve, in grey levels of 255."""

CURVE_ATTACK = "guided-apgd"
"""The strongest of the attacks: it knows the database and keeps the point of lowest AP that it saw."""

PICTURED = "mainstay"
"""The attack of the pictures: it always spends the whole budget, where the strongest returns what it cannot
harm."""

_RESULTS = 8  # shown for each search
_CURVE_QUERIES = 100


def run_demo(
    out: Path,
    progress: Progress = silent,
    seed: int = 0,
    threads: int | None = None,
    sets: Sequence[str] = (),
) -> dict[str, Any]:
    """Train, attack, harden, attack, search and report on ``photos``.

    Writes ``report.html`` and ``summary.json`` to ``out``, with the runs, recipes and indexes beside them.
    Stopped at any point and called again, it goes on from the last checkpoint or attacked block.

    Args:
        seed: of training and of the attacks; the photographs' windows stay the same.
        threads: of torch; None leaves its default.
        sets: overrides of both recipes, as ``--set`` takes them.

    Returns:
        The content of ``summary.json``; see ``summarise``.
    """
    started = time.perf_counter()
    recipes, runs = _write_recipes(Path(out), seed, threads, sets), {}
    results: dict[str, dict[str, EvalResult]] = {}
    for model, path in recipes.items():
        run = stages.train(load_config(path), Path(out) / "runs", _named(progress, model), path.parent)
        runs[model], results[model] = run, stages.evaluate(run, _named(progress, model))
    data = stages.read_data(runs["saat"].config)
    contexts = {model: _context(run, data) for model, run in runs.items()}
    curves = {
        model: eps_curve(run, contexts[model], results[model], _named(progress, model))
        for model, run in runs.items()
    }
    example = choose_example(runs, contexts, results)
    commands = _commands(Path(out), seed, recipes, runs)
    summary = summarise(runs, data, results, curves, example, commands)
    summary["seconds"]["this call"] = round(time.perf_counter() - started, 1)
    with write_aside(Path(out) / "report.html") as aside:
        aside.write_text(demo_page(summary, results, curves, example), encoding="utf-8")
    write_json(Path(out) / "summary.json", summary)
    return summary


def _write_recipes(out: Path, seed: int, threads: int | None, sets: Sequence[str]) -> dict[str, Path]:
    """The packaged recipes with their settings resolved, in ``out/recipes``, so that they can be run by hand
    too."""
    folder = out / "recipes"
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [f"runtime.seed={seed}", f"evaluation.seed={seed}", *sets]
    chosen += [] if threads is None else [f"runtime.threads={threads}"]
    written = {}
    for model in MODELS:
        packaged = files("robusthash.apps").joinpath("recipes", f"demo-{model}.yaml")
        config = load_config(Path(str(packaged)), chosen)
        written[model] = folder / f"demo-{model}.yaml"
        with write_aside(written[model]) as aside:
            aside.write_text(save_config(config))
    return written


def _named(progress: Progress, model: str) -> Progress:
    """Progress that says which model it is about; the epochs of a training are one bar."""
    return lambda done, total, text: progress(
        done, total, f"{model}: {'training' if text.startswith('epoch') else text}"
    )


def _context(run: Run, data: RetrievalData) -> EvaluationContext:
    """The bench that ``stages.evaluate`` attacked, on data read once."""
    section = run.config.evaluation
    victim, _ = stages.load_victim(run)
    return make_context(
        victim,
        data,
        build("protocol", section.protocol),
        queries=section.queries,
        seed=section.seed,
        batch_size=section.batch_size,
    )


# ---------------------------------------------------------------------------------------------- MAP against
# eps


def eps_curve(
    run: Run, context: EvaluationContext, results: Mapping[str, EvalResult], progress: Progress = silent
) -> BudgetCurve:
    """AP of some queries, chosen by content, at each budget of ``EPS``.

    A perturbation of a smaller budget is allowed at a larger one too, so each query keeps the least AP so
    far, and the curve never rises. The budgets that were evaluated already (none, and the run's own) are
    taken from there; the others are kept in ``curve.json`` of the run as they are done.
    """
    settings, own = _attack(run, CURVE_ATTACK)
    budget = own.threat.balls["image"].eps
    asked, few = stable_subset(context.queries, _CURVE_QUERIES), context.some(_CURVE_QUERIES)
    identity = digest([settings, few.queries.fingerprint(), few.batch_size, few.seed, run.card()["digest"]])
    path = run.path / "curve.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    if kept.get("identity") != identity:
        kept = {"identity": identity, "seconds": 0.0, "ap": {}}
    measure = results["clean"].setting.headline
    rows = []
    for number, eps in enumerate(EPS):
        if eps == 0:
            ap = results["clean"].per_query[measure][asked].tolist()
        elif abs(eps / 255 - budget) < 1e-9:
            ap = results[CURVE_ATTACK].per_query[measure][asked].tolist()
        elif str(eps) in kept["ap"]:
            ap = kept["ap"][str(eps)]
        else:
            attack = replace(own, threat=own.threat.scaled(eps / 255 / budget))
            began = time.perf_counter()
            ap = score_attack(few, attack, attack_all(few, attack)).per_query[measure].tolist()
            kept["ap"][str(eps)] = ap
            kept["seconds"] += time.perf_counter() - began
            write_json(path, kept)
        rows.append(ap)
        progress(number + 1, len(EPS), "MAP against eps")
    return BudgetCurve(
        CURVE_ATTACK, EPS, torch.tensor(rows, dtype=torch.float64).cummin(0).values, kept["seconds"]
    )


# ---------------------------------------------------------------------------------------------- one query
# searched


def choose_example(
    runs: Mapping[str, Run],
    contexts: Mapping[str, EvaluationContext],
    results: Mapping[str, Mapping[str, EvalResult]],
) -> DemoExample:
    """Search with one query, clean and attacked, in the index of each model.

    Of the queries that the undefended model finds and loses under attack and the hardened one finds and keeps
    (of all, where there is none), it is the one with the most varied colours. So it is chosen, not typical,
    and its rule says among how many.
    """
    measure = results["saat"]["clean"].setting.headline
    clean = {model: results[model]["clean"].per_query[measure] for model in MODELS}
    attacked = {model: results[model][PICTURED].per_query[measure] for model in MODELS}
    found = (clean["undefended"] > 0.9) & (clean["saat"] > 0.9)
    fit = found & (attacked["undefended"] < 0.1) & (attacked["saat"] > 0.9)
    queries = contexts["saat"].queries
    colour = colour_variety(queries.batch(torch.arange(len(queries))).inputs["image"])
    query = int(torch.where(fit, colour, -1.0).argmax() if fit.any() else colour.argmax())
    lost = {
        model: results[model]["worst"].per_query[MeasureKey(measure).name("worst")] <= 0.5 * clean[model]
        for model in MODELS
    }
    among = (
        f"{int(fit.sum())} of {len(fit)} queries have a clean AP above 0.9 under both models and, under the {PICTURED} "
        "attack, below 0.1 under the undefended and above 0.9 under the hardened one. This is the one of them "
        "with the most varied colours"
        if fit.any()
        else f"This is, of {len(fit)} queries, the one with the most varied colours"
    )
    rule = (
        f"{among}: a chosen example, not an average. In the worst case over all attacks, "
        f"{int(lost['undefended'].sum())} of {len(fit)} queries lose at least half of their AP under the undefended "
        f"model, and {int(lost['saat'].sum())} under the hardened one."
    )
    searches = []
    for model in MODELS:
        searches += _searches(model, runs[model], contexts[model], query, clean[model], attacked[model])
    item = describe_item(queries, query)
    eps = float(_attack(runs["saat"], PICTURED)[1].threat.balls["image"].eps)
    return DemoExample(query, item.photograph, rule, PICTURED, eps, tuple(searches))


def colour_variety(images: Tensor) -> Tensor:
    """(B,) deviation of the opponent colours, red - green and yellow - blue, over the pixels of (B, 3, H, W)
    images."""
    red, green, blue = images.flatten(2).unbind(1)
    return torch.stack([red - green, (red + green) / 2 - blue]).std(2).norm(dim=0)


def _attack(run: Run, name: str) -> tuple[dict[str, Any], Attack]:
    """Settings of an attack of the run's recipe, and the attack."""
    settings = stages.named_attacks(run.config.evaluation.attacks)[name]
    _, objective = stages.load_victim(run)
    return settings, build("attack", settings, objective=objective)


def _searches(
    model: str, run: Run, context: EvaluationContext, query: int, clean: Tensor, attacked: Tensor
) -> list[DemoSearch]:
    """The clean and the attacked image of one query, each searched in the model's index."""
    found = stages.attacked_queries(run, context, PICTURED, *_attack(run, PICTURED), silent)
    origin = context.queries.batch(torch.tensor([query])).inputs["image"][0]
    changed = found.inputs[query]
    measures = {name: float(value) for name, value in image_measures(origin[None], changed[None]).items()}
    origin_digest = run.card()["digest"]
    packed = torch.stack([context.query.packed[query], pack(found.signs[query])[0]])
    codes = Codes(packed, context.query.bits, torch.arange(2), origin_digest)
    with open_index(f"file:{run.path / 'index'}", bits=codes.bits) as index:
        if index.count() == 0:
            database = context.data.database
            payload = [{"photograph": describe_item(database, i).photograph} for i in range(len(database))]
            index.add(replace(context.database, origin=origin_digest), payload)
        ranking = index.search(codes, _RESULTS)
    made = []
    for row, (image, ap, seen) in enumerate([(origin, clean, {}), (changed, attacked, measures)]):
        pairs = zip(ranking.ids[row].tolist(), ranking.distances[row].tolist(), strict=True)
        hits = tuple(_hit(context, query, item, distance) for item, distance in pairs if item >= 0)
        made.append(DemoSearch(model, row == 1, image, float(ap[query]), seen, hits))
    return made


def _hit(context: EvaluationContext, query: int, item: int, distance: int) -> Hit:
    made = describe_item(context.data.database, item)
    shared = (context.query_labels[query] * context.database_labels[item]).sum() > 0
    return Hit(thumbnail(made, 112), made.photograph, distance, bool(shared))


# ---------------------------------------------------------------------------------------------- the numbers


def summarise(
    runs: Mapping[str, Run],
    data: RetrievalData,
    results: Mapping[str, Mapping[str, EvalResult]],
    curves: Mapping[str, BudgetCurve],
    example: DemoExample,
    commands: Sequence[str],
) -> dict[str, Any]:
    """All numbers of the report as plain JSON.

    ``undefended`` and ``saat`` hold, for ``clean``, each attack and ``worst``, the MAP with its interval and
    more; the MAPs stand at the top as well, under flat names such as ``undefended.mainstay.map`` and
    ``saat.worst.map``.
    """
    models = {
        model: {name: _numbers(name, result) for name, result in results[model].items()} for model in MODELS
    }
    before, after = models["undefended"], models["saat"]
    clean, config = results["saat"]["clean"], runs["saat"].config
    flat = {
        f"{model}.{name}.{key}": found[key]
        for model, named in models.items()
        for name, found in named.items()
        for key in ("map", "t-map")
        if key in found
    }
    return {
        **flat,
        **models,
        "chance": clean.reference["chance"],
        "checks": {
            "undefended worst / clean": before["worst"]["map"] / before["clean"]["map"],
            "saat worst / undefended worst": after["worst"]["map"] / before["worst"]["map"],
            "saat clean / undefended clean": after["clean"]["map"] / before["clean"]["map"],
        },
        "curve": {
            "attack": curves["saat"].attack,
            "queries": curves["saat"].ap.shape[1],
            "eps": [eps / 255 for eps in EPS],
            **{model: {"map": curve.mean, "interval": curve.interval} for model, curve in curves.items()},
        },
        "example": {
            "query": example.query,
            "photograph": example.name,
            "attack": example.attack,
            "rule": example.rule,
            "ap": {f"{s.model}.{'attacked' if s.attacked else 'clean'}": s.ap for s in example.searches},
        },
        "data": {**data.describe(), "options": config.data},
        "bits": clean.setting.bits,
        "queries": len(clean.per_query[clean.setting.headline]),
        "attacks": {name: dict(s) for name, s in stages.named_attacks(config.evaluation.attacks).items()},
        "seeds": {"training": config.runtime.seed, "evaluation": config.evaluation.seed},
        "models": {model: run.card() for model, run in runs.items()},
        "runs": {model: str(run.path) for model, run in runs.items()},
        "seconds": {
            **{f"training, {model}": run.card()["seconds"] for model, run in runs.items()},
            **{f"attacks, {model}": round(results[model]["worst"].cost.seconds, 1) for model in MODELS},
            **{f"MAP against eps, {model}": round(curve.seconds, 1) for model, curve in curves.items()},
        },
        "threads": torch.get_num_threads(),
        "versions": software_versions(),
        "commands": list(commands),
    }


def _numbers(name: str, result: EvalResult) -> dict[str, Any]:
    """One result under plain names."""
    key = result.setting.key
    role: Role = "worst" if name == "worst" else ""
    keys = {"map": key.name(role), "map-8bit": key.name(role, storage="8bit"), "t-map": key.name("targeted")}
    keys |= {"flips": "flips", "success": "ASR", "hrs": "HRS"}
    made: dict[str, Any] = {short: result[full] for short, full in keys.items() if full in result.values}
    spans = {short: list(result.interval[keys[short]]) for short in ("map", "t-map") if short in made}
    return {**made, **{f"{short}-interval": ends for short, ends in spans.items()}}


def summary_rows(summary: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """The short table that the demo ends with: columns and rows."""
    rows: list[list[Any]] = []
    for name in summary["saat"]:
        found = [summary[model][name] for model in MODELS]
        rows.append(
            ["worst case per query" if name == "worst" else name, *(numbers["map"] for numbers in found)]
        )
        if "t-map" in found[0]:
            rows[-1][0] = f"{name}, own labels"
            rows.append([f"{name}, target labels", *(numbers["t-map"] for numbers in found)])
    rows.append(["chance", *[summary["chance"]] * len(MODELS)])
    return ["", "undefended", "SAAT"], rows


def _commands(out: Path, seed: int, recipes: Mapping[str, Path], runs: Mapping[str, Run]) -> list[str]:
    """What to type for the whole demo, and for its parts one by one."""
    quoted = {model: shlex.quote(str(run.path)) for model, run in runs.items()}
    folder = shlex.quote(str(out / "runs"))
    return [
        f"robusthash demo --out {shlex.quote(str(out))} --seed {seed}",
        "",
        "# or step by step, with the same result; each of these goes on where the demo was",
        *(f"robusthash run {shlex.quote(str(path))} --runs {folder}" for path in recipes.values()),
        f"robusthash compare {quoted['saat']} {quoted['undefended']} --result worst",
        *(f"robusthash index info {quoted[model]}/index" for model in MODELS),
    ]
