"""The demo: photographs are searched by code, the search is attacked, hardened by SAAT, attacked again.

It runs the same stages as recipes do, in ``OUT/runs``, so a stopped demo goes on where it was.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from robusthash.apps.experiment.config import load_config, write_packaged_recipe
from robusthash.apps.experiment.evaluation_stages import attacked_queries, context_of, evaluate, named_attacks
from robusthash.apps.experiment.model_stages import load_hasher, load_victim, read_data
from robusthash.apps.experiment.run_directory import Run, write_json
from robusthash.apps.experiment.training_stages import train
from robusthash.apps.reports.demo_page import BudgetCurve, DemoExample, DemoSearch, Hit, demo_page
from robusthash.attacks.base import Attack
from robusthash.core.atomic_files import write_text
from robusthash.core.hamming import pack
from robusthash.core.limited_files import read_json
from robusthash.core.registry import build
from robusthash.core.runtime import Progress, digest, silent, yield_when_busy
from robusthash.core.types import Codes
from robusthash.data.base import RetrievalData
from robusthash.data.photos import describe_item, thumbnail
from robusthash.data.splits import stable_subset
from robusthash.evaluation.context import EvaluationContext
from robusthash.evaluation.evaluate import attack_all, score_attack
from robusthash.index import open_index
from robusthash.metrics.distortion import image_measures
from robusthash.metrics.measure_key import MeasureKey, Role
from robusthash.metrics.results import EvalResult, software_versions

MODELS = ("undefended", "saat")
EPS = (0, 2, 4, 8, 12, 16)  # budgets of the curve, in grey levels of 255
CURVE_ATTACK = "guided-apgd"  # the strongest: it knows the database and returns the point of lowest AP
PICTURED = "mainstay"  # spends the whole budget, where the strongest returns unchanged what it cannot harm
_RESULTS = 8  # of each pictured search
_CURVE_QUERIES = 100


def run_demo(
    out: Path, progress: Progress = silent, seed: int = 0, sets: Sequence[str] = ()
) -> dict[str, Any]:
    """Train, attack, harden, attack, search and report on ``photos``.

    Writes ``report.html`` and ``summary.json`` to ``out``, with the runs, recipes and indexes next to them.
    Stopped at any point and called again, it goes on from the last checkpoint or attacked block.

    Args:
        seed: of training and of the attacks; the photographs' windows stay the same.
        sets: overrides of both recipes, as ``--set`` takes them.

    Returns:
        The content of ``summary.json``; see ``summarise``.
    """
    started, out, progress = time.perf_counter(), Path(out), yield_when_busy(progress)
    recipes = _write_recipes(out, seed, sets)
    bars = {model: _titled(progress, model) for model in MODELS}
    runs: dict[str, Run] = {}
    results: dict[str, dict[str, EvalResult]] = {}
    for model, path in recipes.items():
        runs[model] = train(load_config(path), out / "runs", bars[model], path.parent)
        results[model] = evaluate(runs[model], bars[model])
    data = read_data(runs["saat"].config)
    contexts = {model: context_of(run, load_hasher(run), data, silent) for model, run in runs.items()}
    curves = {m: eps_curve(run, contexts[m], results[m], bars[m]) for m, run in runs.items()}
    example = choose_example(runs, contexts, results)
    summary = summarise(runs, data, results, curves, example, _commands(out, seed, recipes, runs))
    summary["seconds"]["this call"] = round(time.perf_counter() - started, 1)
    write_text(out / "report.html", demo_page(summary, results, curves, example))
    write_json(out / "summary.json", summary)
    return summary


def _write_recipes(out: Path, seed: int, sets: Sequence[str]) -> dict[str, Path]:
    """The packaged recipes with their settings resolved, in ``out/recipes``, to be run by hand too."""
    folder = out / "recipes"
    folder.mkdir(parents=True, exist_ok=True)
    overrides = [f"runtime.seed={seed}", f"evaluation.seed={seed}", *sets]
    recipes = {model: folder / f"demo-{model}.yaml" for model in MODELS}
    for path in recipes.values():
        write_packaged_recipe(path, overrides)
    return recipes


def _titled(progress: Progress, model: str) -> Progress:
    """Progress under the name of a model; the epochs of a training are one bar."""
    return lambda done, total, text: progress(
        done, total, f"{model}: {'training' if text.startswith('epoch') else text}"
    )


def eps_curve(
    run: Run, context: EvaluationContext, results: Mapping[str, EvalResult], progress: Progress = silent
) -> BudgetCurve:
    """AP of some queries, chosen by content, at each budget of ``EPS``.

    A perturbation within a smaller budget is allowed within a larger one too, so each query keeps the least
    AP so far, and the curve never rises. Budgets that were evaluated already (none, and the run's own) are
    taken from there; the others are stored in ``curve.json`` of the run as they are done.
    """
    settings, attack = _attack(run, CURVE_ATTACK)
    budget = attack.threat.balls["image"].eps
    subset, context = stable_subset(context.queries, _CURVE_QUERIES), context.some(_CURVE_QUERIES)
    facts = [context.queries.fingerprint(), context.batch_size, context.seed, run.card()["digest"]]
    identity = digest([settings, *facts])
    path = run.path / "curve.json"
    stored = read_json(path) if path.is_file() else {}
    if stored.get("identity") != identity:
        stored = {"identity": identity, "seconds": 0.0, "ap": {}}
    measure = results["clean"].setting.headline
    rows = []
    for number, eps in enumerate(EPS):
        if eps == 0 or abs(eps / 255 - budget) < 1e-9:
            evaluated = results["clean" if eps == 0 else CURVE_ATTACK]
            rows.append(evaluated.per_query[measure][subset].tolist())
        else:
            if str(eps) not in stored["ap"]:
                scaled = replace(attack, threat=attack.threat.scaled(eps / 255 / budget))
                began = time.perf_counter()
                result = score_attack(context, scaled, attack_all(context, scaled))
                stored["ap"][str(eps)] = result.per_query[measure].tolist()
                stored["seconds"] += time.perf_counter() - began
                write_json(path, stored)
            rows.append(stored["ap"][str(eps)])
        progress(number + 1, len(EPS), "MAP against eps")
    least = torch.tensor(rows, dtype=torch.float64).cummin(0).values
    return BudgetCurve(CURVE_ATTACK, EPS, least, stored["seconds"])


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
    fit = (clean["undefended"] > 0.9) & (clean["saat"] > 0.9)
    fit &= (attacked["undefended"] < 0.1) & (attacked["saat"] > 0.9)
    queries = contexts["saat"].queries
    colour = colour_variety(queries.batch(torch.arange(len(queries))).inputs["image"])
    query = int(torch.where(fit, colour, -1.0).argmax() if fit.any() else colour.argmax())
    worst = {model: results[model]["worst"].per_query[MeasureKey(measure).name("worst")] for model in MODELS}
    lost = {model: int((worst[model] <= 0.5 * clean[model]).sum()) for model in MODELS}
    among = (
        f"{int(fit.sum())} of {len(fit)} queries have a clean AP above 0.9 under both models and, under the "
        f"{PICTURED} attack, below 0.1 under the undefended and above 0.9 under the hardened one. This is "
        f"the "
        "one of them with the most varied colours"
        if fit.any()
        else f"This is, of {len(fit)} queries, the one with the most varied colours"
    )
    rule = (
        f"{among}: a chosen example, not an average. In the worst case over all attacks, "
        f"{lost['undefended']} of {len(fit)} queries lose at least half of their AP under the undefended "
        f"model, "
        f"and {lost['saat']} under the hardened one."
    )
    searches = []
    for model in MODELS:
        searches += _searches(model, runs[model], contexts[model], query, clean[model], attacked[model])
    eps = float(_attack(runs["saat"], PICTURED)[1].threat.balls["image"].eps)
    photograph = describe_item(queries, query).photograph
    return DemoExample(query, photograph, rule, PICTURED, eps, tuple(searches))


def colour_variety(images: Tensor) -> Tensor:
    """(B,) deviation of the opponent colours, red - green and yellow - blue, over the pixels of (B, 3, H, W)
    images."""
    red, green, blue = images.flatten(2).unbind(1)
    return torch.stack([red - green, (red + green) / 2 - blue]).std(2).norm(dim=0)


def _attack(run: Run, name: str) -> tuple[dict[str, Any], Attack]:
    """Settings of an attack of the run's recipe, and the attack."""
    settings = named_attacks(run.config.evaluation.attacks)[name]
    _, objective = load_victim(run)
    return settings, build("attack", settings, objective=objective)


def _searches(
    model: str, run: Run, context: EvaluationContext, query: int, clean: Tensor, attacked: Tensor
) -> list[DemoSearch]:
    """The clean and the attacked image of one query, each searched in the model's index."""
    outcome = attacked_queries(run, context, PICTURED, *_attack(run, PICTURED), silent)
    images = context.queries.batch(torch.tensor([query])).inputs["image"][0], outcome.inputs[query]
    measures = image_measures(images[0][None], images[1][None])
    distortion = {name: float(value) for name, value in measures.items()}
    weights = run.card()["digest"]
    packed = torch.stack([context.query_codes.packed[query], pack(outcome.signs[query])[0]])
    codes = Codes(packed, context.query_codes.bits, torch.arange(2), weights)
    with open_index(f"file:{run.path / 'index'}", bits=codes.bits) as index:
        if index.count() == 0:
            database = context.data.database
            payload = [{"photograph": describe_item(database, i).photograph} for i in range(len(database))]
            index.add(replace(context.codes, origin=weights), payload)
        ranking = index.search(codes, _RESULTS)
    searches = []
    for row, (ap, facts) in enumerate([(clean, {}), (attacked, distortion)]):
        pairs = zip(ranking.ids[row].tolist(), ranking.distances[row].tolist(), strict=True)
        hits = tuple(_hit(context, query, item, distance) for item, distance in pairs if item >= 0)
        searches.append(DemoSearch(model, row == 1, images[row], float(ap[query]), facts, hits))
    return searches


def _hit(context: EvaluationContext, query: int, item: int, distance: int) -> Hit:
    photograph = describe_item(context.data.database, item)
    shared = (context.query_labels[query] * context.database_labels[item]).sum() > 0
    return Hit(thumbnail(photograph, 112), photograph.photograph, distance, bool(shared))


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
    more; the MAPs are at the top as well, under flat names: ``undefended.mainstay.map``, ``saat.worst.map``.
    """
    models = {m: {name: _numbers(name, result) for name, result in results[m].items()} for m in MODELS}
    before, after = models["undefended"], models["saat"]
    clean, config = results["saat"]["clean"], runs["saat"].config
    flat = {
        f"{model}.{name}.{key}": numbers[key]
        for model, named in models.items()
        for name, numbers in named.items()
        for key in ("map", "t-map")
        if key in numbers
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
        "attacks": {name: dict(s) for name, s in named_attacks(config.evaluation.attacks).items()},
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
    key, role = result.setting.key, cast(Role, "worst" if name == "worst" else "")
    keys = {"map": key.name(role), "map-8bit": key.name(role, storage="8bit"), "t-map": key.name("targeted")}
    keys |= {"flips": "flips", "success": "ASR", "hrs": "HRS"}
    numbers: dict[str, Any] = {plain: result.values[of] for plain, of in keys.items() if of in result.values}
    spans = {
        f"{key}-interval": list(result.interval[keys[key]]) for key in ("map", "t-map") if key in numbers
    }
    return {**numbers, **spans}


def summary_rows(summary: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the short table that the demo ends with."""
    rows: list[list[Any]] = []
    for name in summary["saat"]:
        numbers = [summary[model][name] for model in MODELS]
        title = "worst case per query" if name == "worst" else name
        targeted = "t-map" in numbers[0]
        rows.append([f"{name}, own labels" if targeted else title, *(n["map"] for n in numbers)])
        if targeted:
            rows.append([f"{name}, target labels", *(n["t-map"] for n in numbers)])
    rows.append(["chance", *[summary["chance"]] * len(MODELS)])
    return ["", "undefended", "SAAT"], rows


def _commands(out: Path, seed: int, recipes: Mapping[str, Path], runs: Mapping[str, Run]) -> list[str]:
    """Command lines of the whole demo, and of its parts one by one."""
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
