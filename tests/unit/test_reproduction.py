"""Entries of the papers: each is resolved and checked; runs are made once, resumed, shared and judged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import robusthash as rh
from robusthash.apps.cli import app
from robusthash.apps.experiment import training_stages
from robusthash.apps.experiment.dry_run_parts import DryRunRows
from robusthash.apps.experiment.results_copy import keep
from robusthash.apps.experiment.run_directory import Run, load_run
from robusthash.apps.experiment.stored_analyses import store_analysis
from robusthash.apps.reproduction import claims_ledger, paper_entries, reproduction
from robusthash.apps.reproduction.claims_ledger import Claim, judge
from robusthash.apps.reproduction.entry_runs import Recipes, Stored, identity_of, make_plan, take_over_model
from robusthash.apps.reproduction.paper_entries import SCALES, Paper, papers, read_paper
from robusthash.apps.reproduction.printed_table import make_blocks
from robusthash.core.runtime import show_progress, shown_by

ROOT = Path(__file__).resolve().parents[2]
ENTRIES = [
    (name, entry.id, scale)
    for name, each in papers().items()
    for entry in each.entries
    for scale in SCALES
    if getattr(entry, scale) is not None
]
RECIPES = Recipes(ROOT / "recipes")

TINY = """
data: {name: synthetic, texts: false, train: 64, query: 12, database: 48}
hasher: {bits: 16, image: {name: small, width: 4}}
training: {objective: dpsh, epochs: 1, batch_size: 32}
evaluation: {attacks: [{name: mainstay, steps: 1}, {name: hag, steps: 1}]}
runtime: {threads: 1}
"""
PAPER = """
name: Tiny
title: a paper
venue: nowhere
unit: percent
entries:
  - id: table-1
    title: two models
    columns: {clean: clean, SAAT: mainstay, gap: mainstay minus hag}
    printed: {FLICKR: {one: [80, 20, null], three: [70, 10, null]}}
    small:
      minutes: 1
      seeds: 2
      differs: all of it
      blocks:
        - title: shapes
          beside: FLICKR
          rows: {one: tiny, two: {recipe: tiny, set: [hasher.bits=8]}, three: {missing: not built}}
  - id: table-2
    title: the same model under another attack
    columns: {PGD: pgd}
    small:
      minutes: 1
      seeds: 1
      blocks: [{title: shapes, rows: {one: {recipe: tiny, set: [name=tiny-pgd, "evaluation.attacks=[{name: pgd, steps: 1}]"]}}}]
  - id: figure-1
    kind: figure
    title: rates
    columns: {clean: clean}
    small:
      minutes: 1
      seeds: 1
      over: {setting: training.objective.eta, values: [0.1, 1]}
      blocks: [{title: shapes, rows: {one: {recipe: tiny, set: ["training.objective={name: dpsh}"]}}}]
  - {id: figure-2, title: pictures, unavailable: they are pictures}
  - &analysis
    id: epochs
    title: an analysis of two models
    shows: epochs
    small:
      minutes: 1
      seeds: 1
      blocks: [{title: shapes, set: [runtime.keep_epochs=1], rows: {one: tiny, two: {recipe: tiny, set: [hasher.bits=8]}}}]
  - {<<: *analysis, id: cost, shows: cost}
  - {<<: *analysis, id: transfer, shows: transfer}
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recipes, as a clone has one, and no results."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "recipes" / "papers").mkdir(parents=True)
    (folder / "recipes" / "tiny.yaml").write_text(TINY)
    return folder


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Paper:
    paper = read_paper(PAPER, "tiny.yaml")
    monkeypatch.setattr(paper_entries, "papers", lambda: {"tiny": paper})
    monkeypatch.setattr(reproduction, "papers", lambda: {"tiny": paper})
    return paper


@pytest.fixture(scope="module")
def made(clone: Path) -> reproduction.Reproduction:
    """Both seeds of table 1, once for all tests."""
    paper = read_paper(PAPER, "tiny.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper_entries, "papers", lambda: {"tiny": paper})
        return rh.reproduce("tiny", "table-1", recipes=clone / "recipes", runs=clone / "runs")


@pytest.mark.parametrize(("name", "entry", "scale"), ENTRIES, ids=lambda each: each)
def test_an_entry_resolves_to_runs_that_give_its_columns(name: str, entry: str, scale: str) -> None:
    """Every recipe loads with its overrides, every column is a result of some row, no two rows are one model."""
    found = papers()[name].entry(entry)
    plan = make_plan(found, found.at(scale), RECIPES, Stored([]))
    assert plan.runs
    assert plan.state == "not run"
    if found.shows == "values":
        given = {title for run in plan.runs for title in run.columns}
        assert given == {title for title, column in plan.columns.items() if column is not None}
    minutes, measured = plan.minutes()
    assert not measured
    if scale == "small":
        assert minutes is not None
        assert minutes <= 40  # a seed of any small table, on one core
    for run in plan.runs:
        assert run.command.startswith(f"robusthash run {RECIPES.folder}/")
        assert run.recipe.is_file()


def test_every_paper_has_entries_and_every_row_a_recipe_or_a_reason() -> None:
    assert set(papers()) == {"saat", "saah", "sfcl", "drfgd", "dsarh"}
    with pytest.raises(ValueError, match="either a recipe or the reason"):
        read_paper(PAPER.replace("{missing: not built}", "{set: [a=1]}"), "tiny.yaml")
    with pytest.raises(ValueError, match="printed values of FLICKR, one: 2 for 3"):
        read_paper(PAPER.replace("[80, 20, null]", "[80, 20]"), "tiny.yaml")


def test_a_table_has_our_cells_and_the_printed_ones(made: reproduction.Reproduction) -> None:
    assert made.state == "done"
    assert not made.failed
    (block,) = made.blocks
    by_row = {line.name: line for line in block.lines}
    assert [line.seeds for line in block.lines] == [2, 2, 0]
    assert by_row["one"].printed == pytest.approx({"clean": 0.8, "SAAT": 0.2})
    assert by_row["two"].printed == {}
    gap = by_row["one"].cells["gap"]
    assert gap.signed
    text = made.markdown()
    assert f"{by_row['one'].cells['clean'].text()} [0.800]" in text
    assert "three (not built) | - [0.700] | - [0.100] | - | 0" in text
    assert "Differs from the paper: all of it" in text
    assert "\\toprule" in made.latex()
    assert len(made.csv().splitlines()) == 1 + 9


def test_what_is_stored_is_not_made_again(
    made: reproduction.Reproduction, clone: Path, tiny: Paper, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **options: object) -> None:
        raise AssertionError("a stored run was made again")

    monkeypatch.setattr(reproduction, "run_all", never)
    again = rh.reproduce("tiny", "table-1", recipes=clone / "recipes", runs=clone / "runs")
    assert again.markdown() == made.markdown()
    copies = clone / "results"
    for path in sorted((clone / "runs" / "tiny").iterdir()):
        keep(Run(path, load_run(path).config), copies)
    stored = rh.reproduce("tiny", "table-1", recipes=clone / "recipes", runs=clone / "elsewhere")
    assert stored.state == "done"
    assert [line.cells["clean"].value for line in stored.blocks[0].lines[:2]] == pytest.approx(
        [line.cells["clean"].value for line in made.blocks[0].lines[:2]], abs=1e-3
    )


def test_a_stopped_call_goes_on_to_the_same_table(
    made: reproduction.Reproduction, clone: Path, tmp_path: Path, tiny: Paper, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = reproduction.run_all, []

    def stopped(config, *rest, **options):  # type: ignore[no-untyped-def]
        calls.append(config.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(config, *rest, **options)

    monkeypatch.setattr(reproduction, "run_all", stopped)
    (tmp_path / "recipes").symlink_to(clone / "recipes")
    with pytest.raises(KeyboardInterrupt):
        rh.reproduce("tiny", "table-1", recipes=tmp_path / "recipes", runs=tmp_path / "runs")
    partial = rh.reproduce(
        "tiny", "table-1", recipes=tmp_path / "recipes", runs=tmp_path / "runs", stored_only=True
    )
    assert partial.state == "2 of 4 runs stored"
    monkeypatch.setattr(reproduction, "run_all", real)
    whole = rh.reproduce("tiny", "table-1", recipes=tmp_path / "recipes", runs=tmp_path / "runs")
    assert whole.markdown() == made.markdown()


def test_a_run_that_fails_is_named_and_the_others_go_on(
    clone: Path, tmp_path: Path, tiny: Paper, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = reproduction.run_all

    def failing(config, *rest, **options):  # type: ignore[no-untyped-def]
        if config.hasher.bits == 8:
            raise ValueError("eight bits do not fit")
        return real(config, *rest, **options)

    monkeypatch.setattr(reproduction, "run_all", failing)
    (tmp_path / "recipes").symlink_to(clone / "recipes")
    found = rh.reproduce("tiny", "table-1", seeds=1, recipes=tmp_path / "recipes", runs=tmp_path / "runs")
    assert found.state == "1 of 2 runs stored"
    ((command, error),) = found.failed.items()
    assert "hasher.bits=8" in command
    assert error == "eight bits do not fit"


def test_a_model_under_another_name_is_not_trained_again(
    made: reproduction.Reproduction, clone: Path, tiny: Paper, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **options: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(training_stages, "fit", never)
    found = rh.reproduce("tiny", "table-2", recipes=clone / "recipes", runs=clone / "runs")
    assert found.state == "done"
    (copy,) = (clone / "runs" / "tiny-pgd").iterdir()
    original = clone / "runs" / "tiny" / copy.name
    assert (copy / "checkpoint" / "hasher.safetensors").read_bytes() == (
        original / "checkpoint" / "hasher.safetensors"
    ).read_bytes()
    assert json.loads((original / "metrics.json").read_text())  # the other's results stay
    config = load_run(copy).config
    assert take_over_model(config, clone / "runs") is None  # it is there
    _, by_epoch = Recipes(clone / "recipes").config("tiny", ("name=by-epoch", "runtime.keep_epochs=1"))
    assert take_over_model(by_epoch, clone / "runs") is None  # the others kept no weights of epochs


def test_a_figure_is_drawn_over_its_axis(clone: Path, tmp_path: Path, tiny: Paper) -> None:
    pytest.importorskip("matplotlib")
    found = rh.reproduce("tiny", "figure-1", recipes=clone / "recipes", runs=clone / "runs", out=tmp_path)
    assert [line.name for line in found.blocks[0].lines] == ["one, eta 0.1", "one, eta 1"]
    drawn = {path.relative_to(tmp_path).as_posix() for path in found.drawn}
    assert drawn == {"tiny-figure-1/sweep.pdf", "tiny-figure-1/sweep.png"}  # entries do not overwrite others'


def test_the_list_says_the_state_of_each_entry(
    made: reproduction.Reproduction, clone: Path, tiny: Paper
) -> None:
    folders = reproduction.Folders.of(clone / "recipes", clone / "runs")
    listed = {each.entry: each for each in reproduction.list_entries(folders)}
    assert listed["table-1"].state == "done"
    assert listed["table-1"].measured
    quickest: dict[int, float] = {}
    for path in (clone / "runs" / "tiny").iterdir():
        run, results = load_run(path), load_run(path).evaluated()
        if "eta" in str(run.config.training.objective):
            continue  # a run of figure-1
        attacked = results["mainstay"].cost.seconds + results["hag"].cost.seconds
        assert results["worst"].cost.seconds == pytest.approx(attacked)  # no cost of its own
        whole, bits = float(run.card()["seconds"]) + attacked, run.config.hasher.bits
        quickest[bits] = min(whole, quickest.get(bits, whole))
    assert listed["table-1"].seed_minutes == pytest.approx(sum(quickest.values()) / 60)
    assert listed["figure-2"].state == "cannot be run: they are pictures"
    with pytest.raises(ValueError, match="they are pictures"):
        rh.reproduce("tiny", "figure-2", recipes=clone / "recipes")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["saat", "table-22"], "did you mean 'table-2'"),
        (["sat"], "did you mean 'saat'"),
        (["saat", "table-2", "--set", "hasher.bits=8", "--data-root", "/nowhere"], "/nowhere/ucmerced.jsonl"),
        (["saat", "table-2", "--miniature"], "add --dry-run"),
        (["saah", "table-nag", "--scale", "paper"], "has no paper scale; take --scale small"),
        (["saat", "table-2", "--recipes", "/nowhere"], "/nowhere does not hold the recipes"),
        (["saat", "table-2", "--set", "training.epoch=2"], "training.epoch"),
        (["saat", "table-2", "--set", "runtime.seed=5"], "--seeds N takes the training seeds"),
        (["saat", "table-2", "--csv", "one.txt", "--latex", "one.txt"], "named for two exports"),
        (["saat", "table-2", "--out", __file__], "a folder is needed"),
        (["saat", "table-2", "--csv", "."], "is a folder, and a file is needed"),
        (["saat", "table-2", "--markdown", "."], "is a folder, and a file is needed"),
        (["saat", "table-2", "--stored"], "is no folder, and nothing is stored there"),
        (["saat", "table-2", "--stored", "--dry-run"], "leave one out"),
        (["sat", "--claims"], "did you mean 'saat'"),
        (["saat", "table-22", "--claims"], "did you mean 'table-2'"),
    ],
)
def test_a_refusal_is_one_line_with_a_remedy(words: list[str], said: str, tmp_path: Path) -> None:
    answer = CliRunner().invoke(app, ["reproduce", *words, "--runs", str(tmp_path / "runs")])
    assert answer.exit_code != 0
    assert said in str(answer.exception)


def test_the_command_prints_what_python_gives(
    made: reproduction.Reproduction, clone: Path, tiny: Paper, tmp_path: Path
) -> None:
    words = ["--recipes", str(clone / "recipes"), "--runs", str(clone / "runs")]
    table = tmp_path / "table.md"
    answer = CliRunner().invoke(
        app, ["reproduce", "tiny", "table-1", *words, "--stored", "--json", "--markdown", str(table)]
    )
    assert answer.exit_code == 0, answer.exception
    places = {"recipes": clone / "recipes", "runs": clone / "runs"}
    same = rh.reproduce("tiny", "table-1", stored_only=True, **places)
    assert json.loads(answer.stdout) == json.loads(json.dumps(same.plain()))
    assert table.read_text().strip() == same.markdown()


def claim(clone: Path, relation: str, by: float = 0.0, first: str = "tiny: clean") -> Claim:
    comparison = {"what": "a", "first": first, "relation": relation, "second": "tiny: mainstay", "by": by}
    return Claim(id="Z1", paper="Tiny", statement="s", comparisons=[comparison])


def test_a_verdict_is_computed_from_paired_intervals(
    made: reproduction.Reproduction, clone: Path, tiny: Paper, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes, stored = Recipes(clone / "recipes"), Stored([clone / "runs"])
    held = judge(claim(clone, "above", by=-2.0), recipes, stored)
    assert held.verdict == "open"  # two seeds decide nothing
    assert "fewer than 3 seeds" in held.reason
    monkeypatch.setattr(claims_ledger, "METHOD_SEEDS", 2)
    plain = judge(claim(clone, "above", by=-2.0), recipes, stored)
    assert (plain.verdict, plain.reason) == ("reproduced", "")
    first, second = plain.findings[0].means
    assert first - second == pytest.approx(plain.findings[0].difference.value)
    assert f"a: {first:.3f} against {second:.3f}, " in plain.findings[0].text()
    fewer = claim(clone, "above", by=-2.0).model_copy(update={"without": "a rival"})
    assert judge(fewer, recipes, stored).reason == "without a rival"
    assert judge(claim(clone, "above", by=2.0), recipes, stored).verdict == "reversed"
    against = claim(clone, "above", by=2.0).model_copy(update={"without": "a rival"})
    assert judge(against, recipes, stored).reason == "without a rival"
    assert judge(claim(clone, "below", by=2.0), recipes, stored).verdict == "reversed"
    assert judge(claim(clone, "below", by=-2.0), recipes, stored).verdict == "reproduced"
    mixed = claim(clone, "above", by=-2.0)
    mixed = mixed.model_copy(
        update={"comparisons": [*mixed.comparisons, claim(clone, "above", by=2.0).comparisons[0]]}
    )
    judged = judge(mixed, recipes, stored)
    assert (judged.verdict, judged.reason) == ("reversed", "in part (fails in 1, holds in 1 of 2)")
    one_choice = claim(clone, "above", by=2.0).model_copy(update={"depends_on": "rate"})
    assert judge(one_choice, recipes, stored).verdict == "open"
    missing = judge(claim(clone, "above", first="tiny: nothing"), recipes, stored)
    assert (missing.verdict, missing.reason) == ("open", "not run")
    assert missing.plain()["findings"][0]["means"] is None, "JSON has no NaN"


def test_sides_within_two_hundredths_are_level(
    made: reproduction.Reproduction, clone: Path, tiny: Paper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claimed difference that is not there decides, unless another unit or a tolerance is meant or a run lacks."""
    recipes, stored = Recipes(clone / "recipes"), Stored([clone / "runs"])
    monkeypatch.setattr(claims_ledger, "METHOD_SEEDS", 2)
    same = {"what": "a", "first": "tiny: clean", "relation": "above", "second": "tiny: clean"}
    away = {**same, "first": "tiny: nothing"}

    def judged(*comparisons: dict[str, object]) -> tuple[str, str]:
        found = judge(Claim(id="Z2", paper="Tiny", statement="s", comparisons=comparisons), recipes, stored)
        return found.verdict, found.reason

    held = claim(clone, "above", by=-2.0).comparisons[0].model_dump()
    failing = claim(clone, "above", by=2.0).comparisons[0].model_dump()
    assert judged(same) == ("level", "")
    assert judged(same, held) == ("level", "in part (level in 1, holds in 1 of 2)")
    assert judged(same, failing) == ("reversed", "in part (fails in 1, level in 1 of 2)")
    assert judged(same, away) == ("open", "holds in 0 of 2, 1 level, 1 not run")
    assert judged({**same, "level": 0}) == ("open", "holds in 0 of 1")
    assert judged({**same, "by": 0.01, "relation": "below"})[0] == "reversed"
    monkeypatch.setattr(claims_ledger, "METHOD_SEEDS", 3)
    assert judged(same)[0] == "open"  # two seeds decide nothing


def test_every_claim_names_what_decides_it() -> None:
    claims = claims_ledger.all_claims()
    counts = {
        paper: sum(each.paper == paper for each in claims)
        for paper in ("SAAT", "SAAH", "SFCL", "DRFGD", "DSARH")
    }
    assert counts == {"SAAT": 10, "SAAH": 11, "SFCL": 9, "DRFGD": 8, "DSARH": 10}
    rows = {
        identity_of(RECIPES.config(f"ucmerced-{name}")[1]) for name in ("sem", "sem-cgat", "sfcl")
    }  # a page's
    for name, entry, scale in ENTRIES:
        if scale == "small":
            found = papers()[name].entry(entry)
            plan = make_plan(found, found.at("small"), RECIPES, Stored([]), seeds=1)
            rows |= {identity_of(run.config) for run in plan.runs}
    for each in claims:
        if each.entry:
            name, entry = each.entry.split()
            assert papers()[name].entry(entry).at("small")
        for side in (side for pair in each.comparisons for side in (pair.first, pair.second)):
            _, config = RECIPES.config(side.recipe, tuple(side.set))
            assert identity_of(config) in rows, f"{each.id}: {side.recipe} {side.set} is a row of no entry"


def test_computed_claims_hold() -> None:
    assert all(compute() for compute in claims_ledger._COMPUTED.values())


def test_claims_are_those_of_the_paper_and_of_the_entry() -> None:
    assert claims_ledger.claims_of() == claims_ledger.all_claims()
    assert {each.paper for each in claims_ledger.claims_of("SAAT")} == {"SAAT"}
    assert {each.entry for each in claims_ledger.claims_of("saat", "table-3")} == {"saat table-3"}


@pytest.mark.parametrize("damage", ["no config", "another recipe's config"])
def test_stored_results_without_a_config_of_their_own_are_named(
    made: reproduction.Reproduction, clone: Path, tmp_path: Path, damage: str
) -> None:
    run = Stored([clone / "runs"]).of_model(Recipes(clone / "recipes").config("tiny")[1])[0]
    copy = keep(run, tmp_path).path
    assert not Stored([tmp_path]).unreadable
    if damage == "no config":
        (copy / "config.yaml").unlink()
    else:
        text = (copy / "config.yaml").read_text()
        (copy / "config.yaml").write_text(text.replace("name: tiny", "name: other", 1))
    (named,) = Stored([tmp_path]).unreadable
    assert str(copy) in named
    assert "it is a copy: make it again" in named


@pytest.mark.parametrize(("measure", "chance"), [("", True), ("MAP of ", True), ("nDCG@100 of ", False)])
def test_chance_is_that_of_map(
    clone: Path, made: reproduction.Reproduction, measure: str, chance: bool
) -> None:
    entry = (
        read_paper(PAPER, "tiny.yaml")
        .entry("table-1")
        .model_copy(update={"columns": {"clean": f"{measure}clean"}})
    )
    plan = make_plan(entry, entry.at("small"), Recipes(clone / "recipes"), Stored([clone / "runs"]))
    (block,) = make_blocks(plan, 1.0)
    assert block.lines[0].cells
    assert bool(block.chance) == chance


def test_another_evaluation_needs_a_name(tmp_path: Path) -> None:
    """Stored runs are found by their model, so they would be shown as results of another evaluation."""
    options = {"stored_only": True, "seeds": 1, "recipes": ROOT / "recipes", "runs": tmp_path}
    with pytest.raises(ValueError, match="give --set name"):
        reproduction.reproduce("saat", "table-3", sets=("evaluation.queries=50",), **options)


@pytest.mark.parametrize(
    ("entry", "shown"),
    [("epochs", "best cgat"), ("cost", "step ratio"), ("transfer", "from tiny")],
)
def test_an_entry_of_an_analysis_makes_it_and_shows_its_numbers(
    tiny: Paper, clone: Path, entry: str, shown: str
) -> None:
    """The settings of each analysis are fit to run, on models that are trained once for all of them."""
    found = rh.reproduce("tiny", entry, recipes=clone / "recipes", runs=clone / "analysed")
    assert found.failed == {}
    assert found.state == "done"
    assert shown in found.analysis


def test_rows_of_a_dry_run_are_the_fewest_that_its_parts_take() -> None:
    """EQB2A reads ranked lists of ten items; a kernel head has as many anchors as the recipe says."""
    _, listed = RECIPES.config("ucmerced-dadh", ("evaluation.attacks=[eqb2a]",))
    assert DryRunRows.of(listed, 4).database == 10
    _, closed = RECIPES.config("wikipedia-shallow-seph")
    assert (DryRunRows.of(closed, 4).train, DryRunRows.of(closed, 4).fitted) == (4, 500)


def test_a_claim_is_judged_by_stored_analyses_of_kept_copies(
    made: reproduction.Reproduction, clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number of ``bands.json`` decides as a result does, from the kept copy too; other weights do not."""
    recipes, runs = Recipes(clone / "recipes"), tmp_path / "runs"
    shutil.copytree(clone / "runs", runs)
    _, config = recipes.config("tiny")
    mine = Stored([runs]).of_model(config)
    for number, run in enumerate(mine):
        store_analysis(
            run, "bands", {}, {"share at 2": 0.5 + 0.01 * number, "share at 7": [0.9, float("nan")]}
        )
    high, low = ({"recipe": "tiny", "kind": "bands", "column": f"share at {order}"} for order in (7, 2))
    comparison = {"what": "a", "first": high, "relation": "above", "second": low}
    bands = Claim(id="Z1", paper="Tiny", statement="s", comparisons=[comparison])
    monkeypatch.setattr(claims_ledger, "METHOD_SEEDS", 2)
    for run in mine:
        keep(run, tmp_path / "kept")
    for folder in (runs, tmp_path / "kept"):
        judged = judge(bands, recipes, Stored([folder]))
        assert judged.verdict == "reproduced"
        difference = judged.findings[0].difference
        assert difference is not None
        assert difference.value == pytest.approx(0.395)
    facts = json.loads((mine[0].path / "bands.json").read_text())
    (mine[0].path / "bands.json").write_text(json.dumps({**facts, "model": "0" * 16}))
    stored = Stored([runs])
    assert judge(bands, recipes, stored).verdict == "open"
    assert "is of the weights 0000000000000000" in stored.unreadable[0]


def test_progress_reaches_the_work_inside() -> None:
    seen: list[tuple[int, int, str]] = []
    with shown_by(lambda *step: seen.append(step)):
        show_progress(1, 2, "epochs of the generator")
    show_progress(2, 2, "epochs of the generator")
    assert seen == [(1, 2, "epochs of the generator")]
