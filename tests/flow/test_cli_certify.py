"""``robusthash certify`` on a run: Python's numbers, a kept copy, the leaderboard, refusals."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import robusthash as rh
from robusthash.apps.experiment import evaluation_stages, training_stages
from robusthash.apps.experiment.certify_run import certificates
from robusthash.apps.experiment.config import make_config
from robusthash.apps.experiment.leaderboard import as_markdown, as_plain, make_leaderboards
from robusthash.apps.experiment.results_copy import keep
from robusthash.apps.experiment.run_directory import Run, load_run
from robusthash.apps.reports.leaderboard_page import leaderboard_page

CONFIG = {
    "name": "tiny",
    "data": {"name": "synthetic", "train": 64, "query": 20, "database": 60},
    "hasher": {"bits": 12, "image": {"name": "small", "width": 4}},
    "training": {
        "recipe": {"name": "hashing", "noise": 0.25},
        "objective": "csq",
        "epochs": 4,
        "batch_size": 32,
        "optim": {"hasher": {"lr": 0.05}},
    },
    "evaluation": {"attacks": [{"name": "hag", "steps": 2}]},
    "runtime": {"device": "cpu", "threads": 1},
}
ASKED = ("--samples", 100, "--queries", 6, "--radius", "0.1", "--radius", "1/4")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = training_stages.train(make_config(CONFIG), tmp_path_factory.mktemp("runs"))
    evaluation_stages.evaluate(run)
    return run


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Run:
    return load_run(shutil.copytree(trained.path, tmp_path / trained.id))


def certified(call, path: Path, *options: object) -> dict:
    code, out, err = call("certify", path, *options, "--json")
    assert code == 0, err
    (result,) = json.loads(out).values()
    return result


def test_the_command_gives_pythons_numbers_and_the_copy_shows_them(call, run, tmp_path):
    found = certified(call, run.path, *ASKED, "--attacks", "smoke")
    hasher, data = run.load_hasher(), rh.load_data(**CONFIG["data"])
    context = rh.make_context(hasher, data, queries=6)
    ours = rh.certify(context, samples=100, radii=(0.1, 0.25), attacks="smoke", queries=None).plain()
    assert json.loads(json.dumps(ours)).items() <= found.items()
    assert [row["radius"] for row in found["rows"]] == [0.1, 0.25]
    assert all(row["certified"] <= row["attacked"] for row in found["rows"])
    copy = keep(run, tmp_path / "kept").path
    code, out, err = call("certify", copy, "--markdown")
    assert code == 0, err
    assert out.count("\n") == 2 + 1 + 2
    assert f"| l2 0.25 | {found['rows'][1]['bits']:.1f} of 12 | {found['rows'][1]['certified']:.3f} |" in out
    code, _, err = call("certify", copy, "--sigma", 0.5)
    assert code == 1
    assert "without the certificate 'smoothing 0.5' (it has smoothing 0.25)" in err


def test_the_leaderboard_shows_certified_next_to_attacked(call, run):
    (plain,) = make_leaderboards([run.path])
    assert "certified" not in as_markdown([plain]).partition("##")[2].partition("* queries")[0]
    found = certified(call, run.path, *ASKED, "--attacks", "smoke")
    certified(
        call, run.path, "--method", "intervals", "--queries", 6, "--radius", "1/255", "--attacks", "none"
    )
    assert set(certificates(run)) == {"smoothing 0.25", "intervals"}, "one does not replace the other"
    (board,) = make_leaderboards([run.path])
    low, high = found["rows"][1]["certified"], found["rows"][1]["attacked"]
    assert board.rows[0].certified["smoothing 0.25, l2 0.25"] == (low, high)
    text = f"smoothing 0.25, l2 0.25: {low:.3f} to {high:.3f}"
    heads = next(line for line in as_markdown([board]).splitlines() if "best-known" in line)
    assert "| by | certified to attacked | HRS |" in heads, "beside the attacked worst case"
    assert "of the smoothed codes" in as_markdown([board])
    assert "of the smoothed codes" not in as_markdown([plain])
    page = re.sub(r"<[^>]*>", " ", leaderboard_page([board]))
    assert re.search(r"found by\s+certified to attacked\s+HRS", page)
    assert text in as_markdown([board])
    assert "intervals, linf 1/255: " in as_markdown([board])
    assert text in leaderboard_page([board])
    (row,) = as_plain([board])["boards"][0]["rows"]
    assert row["certified"]["intervals, linf 1/255"][1] is None


def test_certificates_of_other_weights_are_refused(call, run):
    certified(call, run.path, *ASKED, "--attacks", "none")
    path = run.path / "certified.json"
    path.write_text(path.read_text().replace(run.card()["digest"], "0" * 16))
    code, _, err = call("certify", run.path, *ASKED, "--attacks", "none")
    assert code == 1
    assert "of other weights than those of the run; delete it, then: robusthash certify" in err
    path.unlink()
    certified(call, run.path, *ASKED, "--attacks", "none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--radius", "much"], "--radius takes a number such as 8/255, got 'much'"),
        (["--sigma", "-1"], "sigma must be above 0"),
        (["--method", "intervals", "--radius", "8"], "write 1/255"),
    ],
)
def test_bad_numbers_are_refused_in_a_line(call, run, options, message):
    code, out, err = call("certify", run.path, "--queries", 4, *options)
    assert code == 1
    assert message in err
    assert not out
    assert not (run.path / "certified.json").exists()
