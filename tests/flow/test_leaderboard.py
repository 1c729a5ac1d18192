"""Evidence, registry and leaderboard by the command line: real runs in, a page that sorts and filters out."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from robusthash.apps import cli
from robusthash.apps.experiment import evaluation_stages, training_stages
from robusthash.apps.experiment.config import make_config
from robusthash.apps.experiment.leaderboard import as_markdown, as_plain, make_leaderboards
from robusthash.apps.experiment.run_directory import Run
from robusthash.apps.experiment.run_files import sealed
from robusthash.apps.reports.leaderboard_page import leaderboard_page
from robusthash.metrics.results import Flag, load_results, save_results
from tests.flow.test_report import Reader

CONFIG = {
    "name": "tiny",
    "data": {"name": "synthetic"},
    "hasher": {"bits": 12, "image": {"name": "small", "width": 4}},
    "training": {"objective": "csq", "epochs": 2, "batch_size": 32, "optim": {"hasher": {"lr": 0.05}}},
    "evaluation": {"attacks": [{"name": "hag", "steps": 2}], "batch_size": 16},
    "runtime": {"device": "cpu"},
}
STRONG = "{name: mainstay, steps: 4, step_size: 4/255}"
SCRIPT = Path(cli.__file__).parent / "reports" / "leaderboard.js"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = training_stages.train(make_config(CONFIG), tmp_path_factory.mktemp("runs"))
    evaluation_stages.evaluate(run)
    return run


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(trained.path, tmp_path / trained.id))


def sibling(
    run: Path, folder: Path, *, seed: int = 0, shift: float = 0.0, name: str = "tiny", **changes: object
) -> Path:
    """A run made of another: other training seed, name, settings, flags, and every AP lower by ``shift``."""
    made = Path(shutil.copytree(run, folder / f"{name}{seed}{shift}{len(changes)}"))
    config = yaml.safe_load((made / "config.yaml").read_text())
    config["name"], config["runtime"]["seed"] = name, seed
    (made / "config.yaml").write_text(yaml.safe_dump(config))
    card = json.loads((made / "model.json").read_text())
    (made / "model.json").write_text(json.dumps(sealed({**card, "name": name})))
    flags = changes.pop("flags", ())
    found = []
    for result in load_results(made / "metrics.json"):
        per_query = {n: v - shift if "MAP" in n else v for n, v in result.per_query.items()}
        values = {n: v - shift if "MAP" in n else v for n, v in result.values.items()}
        span = {n: (a - shift, b - shift) if "MAP" in n else (a, b) for n, (a, b) in result.interval.items()}
        setting = replace(result.setting, model=f"{name}/{made.name}", **changes)  # type: ignore[arg-type]
        kept: tuple[Flag, ...] = flags if result.name == "worst" else ()  # type: ignore[assignment]
        made_result = replace(
            result, per_query=per_query, values=values, interval=span, setting=setting, flags=kept
        )
        found.append(made_result)
    save_results(made / "metrics.json", found)
    return made


# ---------------------------------------------------------------------------------------------- evidence and
# registry


def test_evidence_from_export_to_a_lower_best_known_value(run, tmp_path, call):
    bundle = tmp_path / "bundle"
    code, out, err = call("evidence", "export", run, "--attack", STRONG, "--out", bundle)
    assert (code, out.strip().splitlines()[-1]) == (0, str(bundle)), err
    code, out, err = call("evidence", "verify", bundle, "--run", run, "--json")
    assert code == 0, err
    said = json.loads(out)
    own = {result.name: result for result in load_results(run / "metrics.json")}["worst"]
    assert said["values"]["MAP"] < own["wMAP"]
    (board,) = make_leaderboards([run])
    (row,) = board.rows
    assert row.worst.value == own["wMAP"]
    assert row.known.value <= said["values"]["MAP"]
    assert row.known.value == pytest.approx(float(torch.minimum(
        own.per_query["wMAP"], load_results(run / "evidence.json")[0].per_query["MAP"]).mean()))  # fmt: skip
    assert said["bundle"] in row.sources
    assert said["bundle"] in as_markdown([board])
    assert call("evidence", "verify", bundle, "--run", run)[0] == 0
    assert len(load_results(run / "evidence.json")) == 1, "a bundle that is verified twice counts once"


def test_evidence_lowers_suites_too_on_all_queries_and_on_their_choice_of_them(run, tmp_path, call):
    for queries in (10, 1000):
        assert (
            call("assess", run, "--tier", "smoke", "--queries", str(queries), "--threat", "img-linf-8")[0]
            == 0
        )
        results = load_results(run / "assess.json")
        raised = [
            replace(
                r,
                per_query={**r.per_query, "wMAP": r.per_query["clean"]},
                values={**r.values, "wMAP": float(r.per_query["clean"].mean())},
            )
            for r in results
        ]
        save_results(
            run / "assess.json", raised
        )  # as if the suite had found nothing, so that the bundle must win
        bundle = tmp_path / f"bundle{queries}"
        assert call("evidence", "export", run, "--attack", STRONG, "--out", bundle)[0] == 0
        code, out, _ = call("evidence", "verify", bundle, "--run", run, "--json")
        assert code == 0
        (own,) = raised
        (row,) = next(
            board.rows for board in make_leaderboards([run]) if board.setting.budget.startswith("suite smoke")
        )
        found = {result.name: result for result in load_results(run / "evidence.json")}
        name = json.loads(out)["bundle"] + (", 10 queries" if queries == 10 else "")
        lowest = torch.minimum(own.per_query["clean"], found[name].per_query["MAP"])
        assert row.known.value == pytest.approx(float(lowest.mean()))
        assert row.known.value < float(own.per_query["clean"].mean())
        assert name in row.sources


def test_evidence_for_other_weights_is_refused_in_one_line(run, tmp_path, call):
    bundle = tmp_path / "bundle"
    assert call("evidence", "export", run, "--attack", "hag", "--out", bundle)[0] == 0
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "weights": "0" * 16}))
    code, out, err = call("evidence", "verify", bundle, "--run", run)
    assert (code, out) == (1, "")
    assert "made for other weights" in err
    assert "Traceback" not in err
    assert not (run / "evidence.json").exists()
    code, _, err = call("evidence", "export", run, "--attack", "dhta", "--out", tmp_path / "t")
    assert code == 1
    assert "targeted" in err


def test_an_entry_may_claim_a_suite(run, tmp_path, call):
    assert call("assess", run, "--tier", "smoke", "--queries", "10")[0] == 0
    named = ["evidence", "entry", run, "--recipe", "tiny.yaml", "--out", tmp_path]
    code, _, err = call(*named, "--result", "img-linf-8 standard")
    assert code == 1
    assert "has no result 'img-linf-8 standard'" in err
    code, out, err = call(*named, "--result", "img-linf-8 smoke")
    assert code == 0, err
    claimed = yaml.safe_load(Path(out.strip()).read_text())["claimed"]
    (own,) = load_results(run / "assess.json")
    assert (claimed["tier"], claimed["queries"]) == ("smoke", 10)
    assert claimed["worst"] == round(own["wMAP"], 4)
    code, _, err = call("verify", out.strip(), "--run", run)
    assert code == 0, err


def test_an_entry_is_written_verified_and_fails_when_it_lies(run, tmp_path, call):
    registry = tmp_path / "registry"
    registry.mkdir()
    code, out, err = call("evidence", "entry", run, "--recipe", "recipes/tiny.yaml", "--out", registry)
    assert code == 0, err
    path = Path(out.strip())
    for block in (run / "attacks").rglob(
        "*.npz"
    ):  # verification runs the attacks anew: kept blocks cannot vouch
        block.unlink()
    code, out, err = call("verify", path, "--run", run, "--json")
    assert code == 0, err
    assert json.loads(out)["faults"] == []
    raw = yaml.safe_load(path.read_text())
    raw["claimed"]["clean"] += 0.2
    raw["claimed"]["worst"] += 0.1
    path.write_text(yaml.safe_dump(raw))
    code, _, err = call("verify", path, "--run", run)
    assert code == 1
    assert "claimed.clean" in err
    assert "claimed.worst" in err
    raw["source"]["seed"] = 3
    path.write_text(yaml.safe_dump(raw))
    code, _, err = call("verify", path, "--run", run)
    assert code == 1
    assert "with seed 3; train that one" in err


# ---------------------------------------------------------------------------------------------- boards


def test_three_seeds_make_a_method_and_fewer_do_not_say_the_word(run, tmp_path):
    seeds = [run, sibling(run, tmp_path, seed=1, shift=0.01), sibling(run, tmp_path, seed=2, shift=0.02)]
    (board,) = make_leaderboards(seeds)
    (row,) = board.rows
    own = [{r.name: r for r in load_results(path / "metrics.json")} for path in seeds]
    assert (row.claim, row.name) == ("method", "tiny")
    assert row.known.value == pytest.approx(sum(results["worst"]["wMAP"] for results in own) / 3)
    assert row.clean == pytest.approx(sum(results["clean"]["MAP"] for results in own) / 3)
    assert row.known.interval[0] < row.known.value < row.known.interval[1]
    assert "method, 3 seeds" in as_markdown([board])
    (two,) = make_leaderboards(seeds[:2])
    assert [row.claim for row in two.rows] == ["checkpoint"] * 2
    for text in (as_markdown([two]), leaderboard_page([two]), json.dumps(as_plain([two]))):
        assert "method" not in text.lower()


def test_unlike_settings_never_share_a_table(run, tmp_path):
    digests = load_results(run / "metrics.json")[-1].setting.digests
    other = sibling(run, tmp_path, name="other", budget="more steps", digests={**digests, "budget": "2-0"})
    boards = make_leaderboards([run, other])
    assert [len(board.rows) for board in boards] == [1, 1]
    assert len({board.id for board in boards}) == 2
    assert f"not comparable with: {boards[1].id} in budget" in as_markdown(boards)
    more_bits = sibling(run, tmp_path, name="longer", bits=64)
    (board,) = make_leaderboards([run, more_bits])
    assert {row.setting.bits for row in board.rows} == {12, 64}


def test_suites_of_two_schemes_never_share_a_table_and_the_page_says_why(run, tmp_path, call):
    assert call("assess", run, "--tier", "smoke", "--queries", "10")[0] == 0
    older = sibling(run, tmp_path, name="older")
    (own,) = load_results(run / "assess.json")
    plain = {**own.setting.digests, "suite": "dabfaa8925b3"}  # as the first scheme wrote it
    save_results(older / "assess.json", [replace(own, setting=replace(own.setting, digests=plain))])
    boards = [
        board for board in make_leaderboards([run, older]) if board.setting.budget.startswith("suite smoke")
    ]
    assert [len(board.rows) for board in boards] == [1, 1]
    assert len({board.id for board in boards}) == 2
    text = as_markdown(boards)
    assert f"not comparable with: {boards[1].id} in digests.suite (identities by the schemes 1 and 2" in text


def test_results_from_before_budgets_had_an_identity_share_a_table_by_their_text(run, tmp_path):
    digests = {
        n: v for n, v in load_results(run / "metrics.json")[-1].setting.digests.items() if n != "budget"
    }
    older = sibling(run, tmp_path, name="older", digests=digests)
    (board,) = make_leaderboards([run, older])
    assert len(board.rows) == 2


def test_an_unreliable_model_is_last_unranked_and_marked_everywhere(run, tmp_path):
    red = Flag("F4", 0.03, 0.005, "red", "masking: an adaptive attack is needed")
    unknown = Flag("F7", float("inf"), 0.0, "amber", "not run")
    masked = sibling(run, tmp_path, name="masked", shift=-0.1, flags=(red, unknown))
    (board,) = make_leaderboards([masked, run])
    assert [row.name.partition("/")[0] for row in board.rows] == ["tiny", "masked"]
    assert board.rows[1].known.value > board.rows[0].known.value
    assert board.rows[0].bold("wMAP")
    assert not board.rows[1].bold("wMAP")
    assert "**UNRELIABLE** masked" in as_markdown([board])
    assert "UNRELIABLE (F4)" in as_markdown([board])
    assert as_plain([board])["boards"][0]["rows"][1]["unreliable"] is True
    page = leaderboard_page([board])
    row = re.search(r'<tr id="row-0-2".*?</tr>', page, re.DOTALL)
    assert row is not None
    assert 'class="unreliable"' in row[0]
    assert row[0].count(">UNRELIABLE") == 2, "beside the name and among the checks"
    assert "an adaptive attack is needed" in row[0]
    assert page.count('class="cross"') == 4, "crossed in the chart and its legend"
    assert "A red flag stands against" in page


def test_the_results_of_a_suite_are_listed_beside_those_of_the_recipe(run):
    results = {result.name: result for result in load_results(run / "metrics.json")}
    worst = results["worst"]
    curve = {
        "wMAP/eps": {"eps": torch.tensor([0.0, 4 / 255, 8 / 255]), "wMAP": torch.tensor([0.6, 0.5, 0.4])}
    }
    setting = replace(worst.setting, budget="standard", attacks=("guided/0", "flip/1"))
    assessed = replace(worst, name="img-linf-8 standard", setting=setting, curves=curve)
    save_results(run / "assess.json", [assessed])
    boards = make_leaderboards([run])
    assert len(boards) == 2
    tier = next(board for board in boards if board.setting.budget == "standard")
    assert tier.rows[0].clean == results["clean"]["MAP"]
    named = replace(assessed, setting=replace(setting, tier="paper"))
    save_results(run / "assess.json", [named])
    assert any("img-linf-8, paper tier, 2 attacks" in board.title for board in make_leaderboards([run]))
    save_results(run / "assess.json", [assessed])
    assert "wMAP over eps" in leaderboard_page(boards)


def test_a_red_check_of_the_model_marks_every_number_of_it(run):
    assert not make_leaderboards([run])[0].rows[0].checked
    red = {
        "id": "F2",
        "value": 1.0,
        "threshold": 0.01,
        "level": "red",
        "remedy": "cut graph",
        "title": "share",
    }
    (run / "checks.json").write_text(json.dumps([red, {**red, "id": "F7", "value": "inf", "level": "amber"}]))
    (row,) = make_leaderboards([run])[0].rows
    assert row.unreliable
    assert [flag.id for flag in row.flags] == ["F2"]
    (run / "checks.json").write_text("[{")
    with pytest.raises(ValueError, match=r"checks\.json is damaged .* robusthash check"):
        make_leaderboards([run])
    (run / "checks.json").write_text("[]")
    worst = next(result for result in load_results(run / "metrics.json") if result.name == "worst")
    setting = replace(worst.setting, threat="img-linf-4")
    flags = tuple(Flag(id, 1.0, 0.0, "red", "") for id in ("F4", "F13"))
    save_results(run / "assess.json", [replace(worst, name="img-linf-4 fast", setting=setting, flags=flags)])
    marks = {
        board.setting.threat: [flag.id for flag in board.rows[0].flags] for board in make_leaderboards([run])
    }
    assert marks == {"img-linf-4": ["F13", "F4"], worst.setting.threat: ["F13"]}, (
        "F4 is about one suite alone"
    )


@pytest.mark.parametrize("what", ["twice", "seed", "unevaluated", "unattacked", "no run"])
def test_runs_that_make_no_board(run, tmp_path, what):
    paths, words = [run], ""
    if what == "twice":
        paths, words = [run, run], "given twice"
    elif what == "seed":
        paths, words = (
            [run, sibling(run, tmp_path, seed=0, shift=0.1)],
            r"training seeds \[0, 0\] of one recipe repeat",
        )
    elif what == "unevaluated":
        (run / "metrics.json").unlink()
        words = "has not been evaluated; run 'robusthash evaluate"
    elif what == "unattacked":
        clean = [result for result in load_results(run / "metrics.json") if result.name == "clean"]
        save_results(run / "metrics.json", clean)
        words = "none of these runs was attacked"
    else:
        paths, words = [tmp_path], "no config.yaml"
    with pytest.raises(ValueError, match=words):
        make_leaderboards(paths)


# ---------------------------------------------------------------------------------------------- the page


def test_the_page_loads_nothing_and_escapes_what_it_shows(run, tmp_path, call):
    odd = sibling(run, tmp_path, name="odd", training_attack="<script>alert(1)</script>")
    files = [tmp_path / name for name in ("board.html", "board.md", "board.json")]
    options = [word for pair in zip(("--out", "--markdown", "--json"), files, strict=True) for word in pair]
    code, out, err = call("leaderboard", run, odd, *options)
    assert code == 0, err
    assert out.split() == [str(path) for path in files]
    text = files[0].read_text()
    page = LeaderboardReader(text)
    assert not page.wrong
    assert not page.open
    assert page.names().isdisjoint({"iframe", "object", "embed", "link", "base", "form"})
    assert [name for name, _ in page.tags].count("script") == 1
    assert "<script>alert" not in text
    assert not re.search(r"https?:|@import|url\(", text)
    assert {"src", "href"}.isdisjoint({key for _, attributes in page.tags for key in attributes})
    assert json.loads(files[2].read_text())["schema"] == "robusthash.leaderboard/1"
    shown = call("leaderboard", run)[1]
    assert shown.startswith("# Leaderboard")


def test_a_folder_stands_for_the_runs_in_it(call, run):
    assert call("leaderboard", run.parent)[1] == call("leaderboard", run)[1]


class LeaderboardReader(Reader):
    """Words of scripts are not those of the page."""

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["script"]:
            super().handle_data(data)


def test_the_script_sorts_filters_and_reads_addresses():
    if shutil.which("node") is None:
        pytest.skip("needs node to run the page's script alone")
    code = f"""
const {{ read, write, order, fits }} = require({json.dumps(str(SCRIPT))});
const facts = {{ data: "photos", threat: "img-linf-8", bits: "32", name: "Tiny/ab" }};
console.log(JSON.stringify([
  order(["0.5", "", "0.25", "10"], true), order(["0.5", "", "0.25", "10"], false), order(["b", "a", ""], false),
  fits(facts, {{}}), fits(facts, {{ bits: "64" }}),
  fits(facts, {{ bits: "32", find: "tiny" }}), fits(facts, {{ find: "x" }}),
  read("#" + write({{ find: "a&b=c", bits: "", sort: "known.up" }})),
]));
"""
    done = subprocess.run(["node", "-e", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [
        [3, 0, 2, 1], [2, 0, 3, 1], [1, 0, 2], True, False, True, False, {"find": "a&b=c", "sort": "known.up"},
    ]  # fmt: skip


def dom(path: Path, address: str) -> list[tuple[str, bool]]:
    """Names of the rows as a browser shows them at this address, and whether each is hidden."""
    words = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--dump-dom",
        f"file://{path}#{address}",
    ]
    folder = {**os.environ, "HOME": str(path.parent)}
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120, env=folder)
    rows = re.findall(r"<tr id=[^>]*>", done.stdout)
    return [(re.search(r'data-name="(\w+)', row)[1], "hidden" in row) for row in rows]  # type: ignore[index]


def test_a_browser_sorts_and_filters_by_the_address(run, tmp_path):
    if shutil.which("chromium") is None:
        pytest.skip("needs chromium to open the page")
    low, long = (
        sibling(run, tmp_path, name="low", shift=0.1),
        sibling(run, tmp_path, name="long", shift=0.2, bits=64),
    )
    page = tmp_path / "board.html"
    page.write_text(leaderboard_page(make_leaderboards([low, run, long])))
    assert dom(page, "") == [("tiny", False), ("low", False), ("long", False)]
    assert dom(page, "sort=known.up") == [("long", False), ("low", False), ("tiny", False)]
    assert dom(page, "bits=64&sort=clean.down") == [("tiny", True), ("low", True), ("long", False)]
