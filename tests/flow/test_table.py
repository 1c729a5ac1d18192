"""``robusthash table``: who shares a row, and the caption that says what was attacked, and how."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from robusthash.apps.experiment import evaluation_stages, training_stages
from robusthash.apps.experiment.config import make_config
from robusthash.apps.experiment.run_directory import Run, load_run
from robusthash.apps.experiment.table_text import captions
from robusthash.apps.experiment.tables import Column, make_rows, parse_column, seeds_by_row
from robusthash.metrics.results import load_results, save_results
from robusthash.metrics.statistics import bootstrap_interval, hierarchical_interval

CONFIG = {
    "name": "tiny",
    "data": {"name": "synthetic", "train": 64, "query": 24, "database": 64},
    "hasher": {"bits": 12, "image": {"name": "small", "width": 4}},
    "training": {"objective": "csq", "epochs": 2, "batch_size": 32, "optim": {"hasher": {"lr": 0.05}}},
    "evaluation": {"attacks": [{"name": "hag", "steps": 2}, {"name": "mainstay", "steps": 2}]},
    "runtime": {"device": "cpu"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = training_stages.train(make_config(CONFIG), tmp_path_factory.mktemp("runs"))
    evaluation_stages.evaluate(made)
    return made


def sibling(run: Run, folder: Path, name: str, settings: dict[str, object], **changes: object) -> Path:
    """A copy of a run with other settings (by dotted path) in its config, and other fields in its worst
    case."""
    made = Path(shutil.copytree(run.path, folder / name))
    config = yaml.safe_load((made / "config.yaml").read_text())
    for path, value in settings.items():
        section, key = path.split(".")
        config[section][key] = value
    (made / "config.yaml").write_text(yaml.safe_dump(config))
    found = load_results(made / "metrics.json")
    changed = [replace(r, setting=replace(r.setting, **changes)) if r.name == "worst" else r for r in found]
    save_results(made / "metrics.json", changed)
    return made


def test_runs_share_a_row_only_where_the_seed_alone_differs(call, run, tmp_path):
    seed = sibling(run, tmp_path, "seed", {"runtime.seed": 1})
    longer = sibling(run, tmp_path, "longer", {"hasher.bits": 16})
    slower = sibling(run, tmp_path, "slower", {"hasher.bits": 16, "training.epochs": 9})
    code, out, err = call("table", run.path, longer, seed, slower, "--column", "worst")
    assert code == 0, err
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()[2:5]]
    assert [(row[0], row[-1]) for row in rows] == [
        ("tiny, hasher.bits=12, training.epochs=2", "2"),
        ("tiny, hasher.bits=16, training.epochs=2", "1"),
        ("tiny, hasher.bits=16, training.epochs=9", "1"),
    ]
    assert [row.name for row in make_rows([run.path, seed])] == ["tiny"]
    assert load_run(seed).recipe == run.recipe != load_run(longer).recipe


def test_a_seed_that_is_given_twice_is_refused(call, run, tmp_path):
    again = sibling(run, tmp_path, "again", {})
    code, _, err = call("table", run.path, again)
    assert code == 1
    assert "training seeds [0, 0] of one recipe repeat" in err


def test_the_caption_names_attacks_and_budget(call, run, tmp_path):
    budget = (
        "PGD, 2 steps, step size 1/255, random start, slope by the published schedule, knows weights and "
        "training labels; raw gradient, 2 steps, optimiser sgd, lr 0.78125, momentum 0.9, slope by the "
        "published schedule, knows the weights alone"
    )
    said = f"worst: img-linf-8, the lowest AP of each query under hag, mainstay; budget: {budget}."
    other = sibling(run, tmp_path, "other", {"hasher.bits": 16})
    out = call("table", run.path, other, "--column", "clean", "--column", "worst")[1]
    assert [line for line in out.splitlines() if line][4:] == [said]
    rows = json.loads(call("table", run.path, "--json")[1])
    assert rows[0]["attacked"]["clean"] == ""
    assert rows[0]["attacked"]["worst"] == said.removeprefix("worst: ").removesuffix(".")
    assert not captions(make_rows([run.path]), ["clean"])


@pytest.mark.parametrize(
    "changes", [{"attacks": ("hag",)}, {"budget": "more steps"}, {"threat": "img-linf-4"}]
)
def test_rows_that_were_attacked_differently_are_said_apart(run, tmp_path, changes):
    other = sibling(run, tmp_path, "other", {"hasher.bits": 16}, **changes)
    lines = captions(make_rows([run.path, other]), ["clean", "worst"])
    assert [line.partition(": ")[0] for line in lines] == [
        "worst of tiny, hasher.bits=12",
        "worst of tiny, hasher.bits=16",
        "Columns whose rows do not compare, since they were attacked differently",
    ]
    assert lines[0] != lines[1]
    for value in changes.values():
        assert (value if isinstance(value, str) else value[0]) in lines[1]


def test_seeds_that_were_attacked_differently_leave_the_cell_empty(run, tmp_path):
    seed = sibling(run, tmp_path, "seed", {"runtime.seed": 1}, threat="img-linf-4")
    (row,) = make_rows([run.path, seed])
    assert "worst" not in row.cells
    assert "worst" not in row.attacked
    assert captions([row], ["clean", "worst"])[-1].startswith("-: not evaluated in every seed")


def test_difference_to_the_worst_case_is_that_of_the_headlines(call, run):
    code, out, err = call("table", run.path, "--column", "clean minus worst", "--json")
    assert code == 0, err
    found = run.evaluated()
    gap = found["clean"].per_query["MAP"] - found["worst"].per_query["wMAP"]
    assert json.loads(out)[0]["cells"]["clean minus worst"]["value"] == pytest.approx(float(gap.mean()))


def test_attack_that_was_not_run_is_said_so(call, run, tmp_path):
    other = sibling(run, tmp_path, "other", {"hasher.bits": 16})
    kept = [result for result in load_results(other / "metrics.json") if result.name != "hag"]
    save_results(other / "metrics.json", kept)
    out = call("table", run.path, other, "--column", "clean", "--column", "hag")[1]
    assert "| not run |" in out.splitlines()[3]
    assert "not evaluated in every seed" not in out


def test_a_result_that_another_row_has_keeps_its_column(call, run, tmp_path):
    fewer = sibling(run, tmp_path, "fewer", {"training.epochs": 9})
    save_results(fewer / "metrics.json", [r for r in load_results(fewer / "metrics.json") if r.name != "hag"])
    for paths in ((fewer, run.path), (run.path, fewer)):
        code, out, err = call("table", *paths, "--no-caption")
        assert code == 0, err
        head, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines())
        cells = {line[0].rpartition("=")[2]: line[head.index("hag")] for line in lines}
        assert cells["9"] == "-"
        assert cells["2"].startswith("0.")


def moved(folder: Path, run: Run, seed: int, by: float, **settings: object) -> Path:
    """A sibling of another seed whose clean AP are lower, more so for later queries."""
    name = f"{seed} {by}"
    made = sibling(run, folder, name, {"runtime.seed": seed, **settings})
    found = load_results(made / "metrics.json")
    shift = by * torch.linspace(0, 2, 24, dtype=torch.float64)
    lower = {"MAP": found[0].per_query["MAP"] - shift}
    means = {**found[0].values, "MAP": float(lower["MAP"].mean())}
    save_results(
        made / "metrics.json",
        [replace(found[0], per_query={**found[0].per_query, **lower}, values=means), *found[1:]],
    )
    return made


def test_differences_are_paired_by_seed_and_query(call, run, tmp_path):
    own = [run.path, moved(tmp_path, run, 1, 0.02)]
    other = {"hasher.bits": 16}
    lower = [moved(tmp_path, run, seed, by, **other) for seed, by in ((0, 0.1), (1, 0.06), (2, 9.0))]
    baseline = "tiny, hasher.bits=12"
    code, out, err = call("table", *lower, *own, "--against", baseline, "--column", "clean", "--json")
    assert code == 0, err
    (row,) = json.loads(out)
    cell = row["cells"]["clean"]
    assert (row["name"], cell["seeds"], cell["signed"]) == ("tiny, hasher.bits=16", 2, True)
    steps = torch.linspace(0, 2, 24, dtype=torch.float64)
    differences = torch.stack([-0.1 * steps, (0.02 - 0.06) * steps])
    assert cell["value"] == pytest.approx(-0.07)
    assert cell["interval"] == pytest.approx(list(hierarchical_interval(differences)))
    shown = call("table", *lower, *own, "--against", baseline, "--column", "clean", "--column", "worst")[
        1
    ].splitlines()
    assert shown[0] == "| recipe | clean | worst | seeds |"
    assert shown[2].startswith("| tiny, hasher.bits=16 | -0.070 (-0.")
    assert shown[2].endswith("| +0.000 (+0.000 to +0.000) | 2 |")
    first = ["--against", baseline, "--seed", 0, "--column", "clean", "--json"]
    (one,) = json.loads(call("table", *lower, *own, *first)[1])
    assert one["cells"]["clean"]["interval"] == pytest.approx(list(bootstrap_interval(-0.1 * steps)))
    code, _, err = call("table", lower[2], *own, "--against", baseline)
    assert code == 1
    assert f"tiny, hasher.bits=16 (seeds [2]) and {baseline} (seeds [0, 1]) have no seed in common" in err
    code, _, err = call("table", *lower, *own, "--against", "tiny")
    assert code == 1
    assert "no row is named 'tiny'" in err
    assert "no run has the training seed 7" in call("table", *own, "--seed", 7)[2]


def test_columns_of_measures_and_of_suites_under_labels(call, run, tmp_path):
    seed = Path(shutil.copytree(run.path, tmp_path / "tiny" / run.id))
    suite = replace(run.evaluated()["worst"], name="img-linf-8 standard")
    save_results(seed / "assess.json", [suite])
    columns = ["clean as as it is", "ACG@100 of clean", "img-linf-8 standard as standard tier"]
    code, out, err = call(
        "table", seed.parent, "--row", "tiny as ours", *(w for c in columns for w in ("--column", c))
    )
    assert code == 0, err
    lines = out.splitlines()
    assert (
        lines[0]
        == "| recipe | as it is | ACG@100 of clean | standard tier | chance | training minutes | seeds |"
    )
    clean = run.evaluated()["clean"]
    assert lines[2].startswith(f"| ours | {clean['MAP']:.3f} (")
    assert f"| {clean['ACG@100']:.3f} (" in lines[2]
    assert f"| {suite['wMAP']:.3f} (" in lines[2]
    assert lines[4].startswith("standard tier: img-linf-8, the lowest AP of each query")
    assert len(call("table", seed, "--no-caption", "--column", "worst")[1].splitlines()) == 3
    assert "img-linf-8 standard" not in call("table", seed)[1]


def test_a_column_of_differences_is_paired_within_the_run(call, run, tmp_path):
    seeds = [run.path, moved(tmp_path, run, 1, 0.05)]
    columns = ["--column", "mainstay minus hag as mainstay to HAG", "--column", "MAP of clean minus hag"]
    code, out, err = call("table", *seeds, *columns, "--json")
    assert code == 0, err
    (row,) = json.loads(out)
    found = {name: run.evaluated()[name].per_query["MAP"].double() for name in ("mainstay", "hag")}
    expected = (found["mainstay"] - found["hag"]).repeat(2, 1)
    cell = row["cells"]["mainstay to HAG"]
    assert cell["signed"]
    assert cell["value"] == pytest.approx(float(expected.mean()), abs=1e-6)
    assert cell["interval"] == pytest.approx(list(hierarchical_interval(expected)), abs=1e-6)
    assert "MAP of clean minus hag" in row["cells"]
    refused = call("table", *seeds, "--against", "tiny", "--column", "mainstay minus hag")[2]
    assert "'mainstay minus hag' is a difference already" in refused
    assert "no run has a result" in call("table", *seeds, "--column", "mainstay minus hga")[2]


def test_a_column_or_row_that_is_nowhere_is_refused(call, run):
    code, _, err = call("table", run.path, "--column", "wors")
    assert code == 1
    assert "no run has a result 'wors'; did you mean 'worst'" in err
    assert "no run has a result 'clea'" in call("table", run.path, "--column", "nDCG@100 of clea as x")[2]
    assert "no row is named 'tinny'" in call("table", run.path, "--row", "tinny as ours")[2]
    assert (
        "'clean' has no values per query of 'MAO'; did you mean 'MAP'"
        in call("table", run.path, "--column", "MAO of clean")[2]
    )


def test_names_with_the_words_of_a_column_are_never_taken_apart():
    names = ["clean", "best of clean", "clean as ever"]
    assert parse_column("best of clean", names) == Column("best of clean")
    assert parse_column("clean as ever", names) == Column("clean as ever")
    assert parse_column("clean as ever as x", names) == Column("clean as ever", None, "x")
    assert parse_column("MAP of clean as a as b", [*names, "clean as a"]) == Column("clean as a", "MAP", "b")


def test_a_row_alone_has_no_differences(call, run):
    code, _, err = call("table", run.path, "--against", "tiny")
    assert code == 1
    assert "tiny is the only row" in err


def test_a_folder_of_recipes_is_as_good_as_the_folders_in_it(call, run, tmp_path):
    assert call("table", run.path.parents[1]) == call("table", run.path.parent)
    code, _, err = call("table", tmp_path)
    assert code == 1
    assert f"{tmp_path} is not a run directory and holds none" in err


@pytest.mark.parametrize("damage", ["truncated", "no config", "another recipe's config"])
def test_of_a_folder_damaged_runs_are_passed_over_and_named(call, run, tmp_path, damage):
    runs = tmp_path / "runs"
    whole, broken = (sibling(run, runs, name, {}) for name in ("whole", "broken"))
    if damage == "truncated":
        arrays = next(broken.glob("metrics-*.npz"))
        arrays.write_bytes(arrays.read_bytes()[:100])
    elif damage == "no config":
        (broken / "config.yaml").unlink()
    else:
        text = (broken / "config.yaml").read_text()
        (broken / "config.yaml").write_text(text.replace(f"name: {run.config.name}", "name: other", 1))
    code, out, err = call("table", runs, "--column", "clean")
    assert code == 0, err
    assert err.startswith("passed over: ")
    assert str(broken) in err
    assert out == call("table", whole, "--column", "clean")[1]
    code, _, err = call("table", broken)
    assert code == 1
    shutil.rmtree(whole)
    code, _, err = call("table", runs)
    assert code == 1
    assert "no run of these folders has results that can be read" in err


def test_columns_of_different_numbers_of_queries_are_said(run):
    row = make_rows([run.path])[0]
    several = replace(row, queries={**row.queries, "worst": 64})
    count = row.queries["clean"]
    assert f"Numbers of queries differ: {count} of clean; 64 of worst." in captions(
        [several], ["clean", "worst"]
    )
    assert not any("queries differ" in line for line in captions([row], ["clean", "worst"]))


def test_of_a_folder_runs_that_were_not_evaluated_are_left_out(call, run, tmp_path):
    done = sibling(run, tmp_path, "done", {})
    waiting = sibling(run, tmp_path, "waiting", {"runtime.seed": 1})
    for path in waiting.glob("metrics.*"):
        path.unlink()
    code, out, err = call("table", tmp_path, "--column", "clean")
    assert code == 0, err
    assert f"{waiting} has no results yet and is left out" in err
    assert out == call("table", done, "--column", "clean")[1]
    code, _, err = call("table", done, waiting, "--column", "clean")
    assert code == 1
    assert f"{waiting} has not been evaluated" in err
    shutil.rmtree(done)
    code, _, err = call("table", tmp_path)
    assert code == 1
    assert "none of these runs was evaluated" in err


def test_other_formats_hold_the_same_values(call, run):
    cell = make_rows([run.path])[0].cells["clean"]
    lines = list(csv.reader(call("table", run.path, "--column", "clean", "--format", "csv")[1].splitlines()))
    parts = ["recipe", "clean", "clean low", "clean high", "clean seeds"]
    assert lines[0] == [*parts, "chance", "training minutes", "seeds"]
    assert float(lines[1][5]) == pytest.approx(run.evaluated()["clean"].reference["chance"], abs=1e-6)
    assert lines[1][7] == "1"
    assert [float(value) for value in lines[1][1:5]] == pytest.approx(
        [cell.value, *cell.interval, 1], abs=1e-6
    )
    latex = ["--column", "clean as 95 % & more", "--format", "latex"]
    tex = call("table", run.path, *latex)[1].splitlines()
    assert tex[0] == r"\begin{tabular}{lllll}"
    assert tex[2] == r"recipe & 95 \% \& more & chance & training minutes & seeds \\"
    low, high = cell.interval
    assert tex[4].startswith(f"tiny & {cell.value:.3f} {{\\scriptsize ({low:.3f}--{high:.3f})}} & ")
    attacked = call("table", run.path, "--format", "latex")[1].splitlines()
    assert attacked[:2] == [r"\begin{table*}", r"\centering\footnotesize"]
    assert attacked[2].startswith(r"\caption{")
    assert "budget: PGD" in attacked[2]
    assert attacked[-2:] == [r"\end{tabular}", r"\end{table*}"]
    assert call("table", run.path, "--format", "latex", "--no-caption")[1].splitlines() == attacked[3:-1]


def test_seeds_stand_in_their_order(run, tmp_path):
    later = [moved(tmp_path, run, 2, 0.2), run.path, moved(tmp_path, run, 1, 0.1)]
    assert [seed.config.runtime.seed for seed in seeds_by_row(later)["tiny"]] == [0, 1, 2]
    assert make_rows(later)[0].cells == make_rows(later[::-1])[0].cells


def test_runs_with_a_direction_in_common_share_a_table(call, tmp_path):
    config = {
        **CONFIG,
        "data": {**CONFIG["data"], "texts": True},
        "hasher": {**CONFIG["hasher"], "text": {"name": "mlp", "widths": [8]}},
        "training": {**CONFIG["training"], "objective": "dcmh"},
    }
    runs = []
    for name, directions in (("both", ["I2T", "T2I"]), ("one", ["I2T"]), ("other", ["T2I"])):
        config = {**config, "name": name, "evaluation": {"directions": directions, "attacks": []}}
        runs.append(training_stages.train(make_config(config), tmp_path))
        evaluation_stages.evaluate(runs[-1])
    both, one, other = (run.path for run in runs)
    code, out, err = call("table", both, one, "--column", "I2T clean", "--column", "T2I clean")
    assert code == 0, err
    first, second = (line.split("|")[2:-1] for line in out.splitlines() if "both" in line or "one" in line)
    assert first[0] == second[0]
    assert second[1].strip() == "not run"
    code, _, err = call("table", one, other)
    assert code == 1
    assert "other was scored on T2I, the first recipe on I2T" in err
