"""The verbs of analyses end to end on the generated world: attribute, cost, curves, figures, sweep."""

from __future__ import annotations

import json
import multiprocessing
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import pytest
import yaml

from robusthash.apps.experiment import evaluation_stages, training_stages
from robusthash.apps.experiment import parameter_sweep as sweep
from robusthash.apps.experiment.attribution_run import load_attributions
from robusthash.apps.experiment.config import make_config
from robusthash.apps.experiment.run_directory import load_run

CONFIG = {
    "name": "tiny",
    "data": {"name": "synthetic", "train": 64, "query": 12, "database": 210},
    "hasher": {"bits": 12, "image": {"name": "small", "width": 4}},
    "training": {"objective": "csq", "epochs": 4, "batch_size": 32, "optim": {"hasher": {"lr": 0.05}}},
    "evaluation": {
        "attacks": [{"name": "mainstay", "steps": 2, "step_size": "4/255"}, {"name": "dhta", "steps": 2}]
    },
    "runtime": {"device": "cpu", "keep_epochs": 2},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    run = training_stages.train(make_config(CONFIG), tmp_path_factory.mktemp("runs"))
    evaluation_stages.evaluate(run)
    return run.path


def drawn(folder: Path, *stems: str) -> None:
    """Both files of every figure are there and can be read."""
    for stem in stems:
        assert (folder / f"{stem}.pdf").read_bytes().startswith(b"%PDF")
        pixels = matplotlib.image.imread(folder / f"{stem}.png")
        assert pixels.shape[0] > 200
        assert pixels[..., :3].std() > 0.01


def test_attribute_writes_arrays_and_heat_maps(call, trained, tmp_path):
    arguments = ("--images", 6, "--permutations", 4, "--top", 40, "--out", tmp_path, "--json")
    code, out, err = call("attribute", trained, *arguments)
    assert code == 0, err
    (shown,) = json.loads(out).values()
    (kept,) = load_attributions(tmp_path / "attribution.npz").values()
    assert shown["mean"] == kept.mean.tolist()
    assert float((kept.values.sum((1, 2)) - (kept.everything - kept.none)).abs().max()) < 1e-9
    drawn(tmp_path, "bands", "bands-share")
    code, _, err = call("attribute", trained, trained, "--out", tmp_path)
    assert code == 1
    assert "named twice" in err


def test_cost_is_a_table_with_the_undefended_net_as_one(call, trained):
    code, out, err = call("cost", trained, "--repeats", 5, "--json")
    assert code == 0, err
    (row,) = json.loads(out)["rows"]
    assert row["size"]["macs"] > row["size"]["parameters"] > 0
    assert row["latency"]["ratio"] > 0
    assert row["latency"]["threads"] == 1
    assert row["attack_steps"] == 0
    assert row["step_ms"] is row["step_ratio"] is None
    code, out, _ = call("cost", trained, "--repeats", 2)
    assert code == 0
    assert out.count("\n| tiny |") == 1


def test_training_steps_are_timed_in_turn_and_leave_the_runs_alone(call, trained, tmp_path):
    attack = {"name": "pgd", "steps": 8, "step_size": "2/255"}
    training = {
        **CONFIG["training"],
        "recipe": "adversarial",
        "outer": "pgd-at",
        "attack": attack,
        "epochs": 1,
    }
    hardened = training_stages.train(
        make_config({**CONFIG, "name": "hardened", "training": training}), tmp_path
    ).path
    weights = (hardened / "checkpoint" / "hasher.safetensors").read_bytes()
    code, out, err = call("cost", trained, hardened, "--repeats", 2, "--rounds", 3, "--json")
    assert code == 0, err
    plain, defended = json.loads(out)["rows"]
    assert plain["step_ms"] > 0
    assert defended["step_ratio"] > 2  # nine passes of it and more, for one
    stored = json.loads((hardened / "cost.json").read_text())["values"]
    assert stored["step ratio"] == pytest.approx(defended["step_ratio"], abs=1e-6)
    assert (hardened / "checkpoint" / "hasher.safetensors").read_bytes() == weights
    one_step = {
        **CONFIG,
        "name": "one-step",
        "training": {**CONFIG["training"], "epochs": 1, "batch_size": 64},
    }
    short = training_stages.train(make_config(one_step), tmp_path).path
    assert (
        json.loads(call("cost", short, "--repeats", 1, "--rounds", 1, "--json")[1])["rows"][0]["step_ms"] > 0
    )


def test_curves_draw_the_log_and_the_kept_epochs(call, trained, tmp_path):
    arguments = (
        "--robust",
        "{name: mainstay, eps: 32/255, steps: 4, step_size: 16/255}",
        "--queries",
        8,
        "--out",
        tmp_path,
        "--json",
    )
    code, out, err = call("curves", trained, *arguments)
    assert code == 0, err
    found = json.loads(out)["tiny"]
    epochs, losses = found["log"]["loss"]
    assert epochs == [1, 2, 3, 4]
    assert losses[-1] < losses[0]
    measure, (kept, clean), _ = found["robust"]["clean"]
    assert (measure, kept) == ("MAP", [2, 4])
    _, (_, attacked), _ = found["robust"]["mainstay"]
    assert attacked[-1] < clean[-1]
    drawn(tmp_path, "convergence-tiny", "seconds-tiny", "robust-curves")
    assert call("curves", trained, *arguments)[1] == out  # the second time from what was kept


def test_the_last_kept_epoch_is_the_trained_model(trained):
    run = load_run(trained)
    last, final = run.load_epoch(4)[0].state_dict(), run.load_model()[0].state_dict()
    assert all(last[name].equal(final[name]) for name in final)
    assert (
        not run.load_epoch(2)[0]
        .state_dict()["heads.image.linear.weight"]
        .equal(final["heads.image.linear.weight"])
    )


def test_curves_of_a_run_without_kept_epochs_say_how_to_keep_them(call, trained, tmp_path):
    config = {**CONFIG, "runtime": {"device": "cpu"}}
    run = training_stages.train(make_config(config), tmp_path / "runs")
    assert run.id == trained.name  # keeping epochs makes no other model
    code, _, err = call("curves", run.path, "--robust", "mainstay", "--out", tmp_path)
    assert code == 1
    assert "runtime.keep_epochs=1" in err


def test_figures_draw_what_was_measured(call, trained, tmp_path):
    matrix = {"surrogates": ["a", "b"], "victims": ["a"], "attacked": [[0.1], [None]], "measure": "MAP"}
    (tmp_path / "matrix.json").write_text(json.dumps(matrix))
    code, out, err = call(
        "figures", trained, "--out", tmp_path, "--transfer", tmp_path / "matrix.json", "--json"
    )
    assert code == 0, err
    curves = [f"{kind}{ending}" for kind in ("pr", "pn") for ending in ("", "-attacked", "-targeted")]
    stems = ("attacks", "targeted", "scatter", *curves, "loss", "transfer")
    drawn(tmp_path, *stems)
    assert len(json.loads(out)["figures"]) == 2 * len(stems)
    (tmp_path / "matrix.json").write_text("[]")
    code, _, err = call("figures", trained, "--out", tmp_path, "--transfer", tmp_path / "matrix.json")
    assert code == 1
    assert "no transfer matrix" in err


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, "evaluation": {"attacks": []}}))
    return path


def test_a_sweep_runs_every_point_names_the_failing_one_and_goes_on(call, recipe, tmp_path, monkeypatch):
    command = ("sweep", recipe, "--over", "training.optim.hasher.lr=0.05,1e30", "--set", "training.epochs=1")
    places = ("--jobs", 2, "--runs", tmp_path / "runs", "--out", tmp_path / "swept", "--json")
    code, out, err = call(*command, *places)
    assert code == 1
    good, bad = json.loads(out)["points"]
    assert (good["state"], bad["state"]) == ("done", "failed")
    assert "not finite" in bad["error"] or "NaN" in bad["error"]
    assert "1 of 2 points failed" in err
    assert load_run(good["run"]).config.runtime.threads == 1
    table = (tmp_path / "swept" / "sweep.md").read_text()
    assert "| 0.05 | 0." in table
    assert "| 1e30 | - | 0 | 1 |" in table
    drawn(tmp_path / "swept", "sweep")

    def never(*arguments, **options):
        raise AssertionError("a point that is done was run again")

    monkeypatch.setattr(sweep, "ProcessPoolExecutor", never)
    code, out, _ = call(*command[:3], "training.optim.hasher.lr=0.05", *command[4:], *places, "--no-figure")
    assert code == 0
    assert json.loads(out)["points"] == [good]


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_sweep_that_ends_ends_its_children_and_a_second_one_waits(recipe, tmp_path, call, how, code):
    command = [
        sys.executable,
        "-m",
        "robusthash",
        "sweep",
        str(recipe),
        "--over",
        "hasher.bits=8,16",
        "--jobs",
        "2",
    ]
    command += [
        "--set",
        "training.epochs=5000",
        "--runs",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path / "swept"),
    ]
    parent = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    until = time.monotonic() + 120
    while len(list((tmp_path / "runs").glob("tiny/*/log.jsonl"))) < 2:
        assert time.monotonic() < until
        assert parent.poll() is None
        time.sleep(0.2)  # until both train
    children = _children_of(parent.pid)
    assert len(children) >= 2
    _, _, said = call(*command[3:])
    assert f"swept is in use by process {parent.pid}" in said
    parent.send_signal(how)  # to the sweep alone
    assert parent.wait(timeout=30) == code
    until = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < until, "a process of the sweep goes on"
        time.sleep(0.1)


def _children_of(pid: int) -> list[int]:
    """Processes that any thread of a process started."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def test_a_killed_point_is_named_and_ends_no_other(recipe, tmp_path):
    """A process that is killed, as for want of memory, is a failed point; the other one goes on."""
    sets = ("training.epochs=120",)
    points = sweep.points_of(recipe, [sweep.read_axis("hasher.bits=8,16")], [0], sets)
    whole = sweep.Sweep(recipe, points, tmp_path / "runs", tmp_path / "swept", jobs=2)
    killed: list[int] = []
    others = {process.pid for process in multiprocessing.active_children()}  # left by tests before this one

    def kill(done: int, total: int, text: str) -> None:
        while not killed:  # a process of the sweep, once an epoch is logged
            for process in multiprocessing.active_children():
                if process.pid in others:
                    continue
                if list((tmp_path / "runs").glob("tiny/*/log.jsonl")):
                    process.kill()
                    killed.append(process.pid)
                    return
            time.sleep(0.05)

    outcomes = whole.run(lambda *progress: kill(*progress) if progress[2] != "parents" else None)
    states = sorted(outcome.state for outcome in outcomes)
    assert states == ["done", "failed"]
    (failed,) = (outcome for outcome in outcomes if outcome.state == "failed")
    assert "was killed" in failed.error
    again = sweep.Sweep(recipe, points, tmp_path / "runs", tmp_path / "swept", jobs=2).run()
    assert [outcome.state for outcome in again] == ["done", "done"]


def test_points_of_one_parent_train_it_once(recipe, tmp_path):
    """Two points that start from one recipe share its run; where that fails, both fail and name it."""
    training = {"recipe": "adversarial", "outer": {"name": "pgd-at"}, "epochs": 1, "init_from": recipe.name}
    training["attack"] = {"name": "pgd", "steps": 1}
    child = recipe.parent / "child.yaml"
    child.write_text(yaml.safe_dump({"extends": recipe.name, "training": training}))
    points = sweep.points_of(child, [sweep.read_axis("training.clip=0,1")], [0])
    assert points[0].parent == points[1].parent != ""
    outcomes = sweep.Sweep(child, points, tmp_path / "runs", tmp_path / "swept", jobs=2).run()
    assert [outcome.state for outcome in outcomes] == ["done", "done"], outcomes
    assert len(list((tmp_path / "runs" / "tiny").iterdir())) == 1
    recipe.write_text(yaml.safe_dump({**CONFIG, "data": {"name": "folder", "root": "nowhere"}}))
    points = sweep.points_of(child, [sweep.read_axis("training.clip=0,1")], [1])
    outcomes = sweep.Sweep(child, points, tmp_path / "runs", tmp_path / "swept", jobs=2).run()
    assert [outcome.state for outcome in outcomes] == ["failed", "failed"]
    assert all("its parent tiny.yaml failed:" in outcome.error for outcome in outcomes)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ("training.epochs", "section.key=value"),
        ("training.epochs=1,1", "every value once"),
        ("evaluation.seed=1,2", "makes no other model"),
        ("runtime.seed=1,2", "--seeds"),
        ("training.epoch=1,2", "did you mean"),
    ],
)
def test_a_bad_sweep_is_refused_before_anything_runs(call, recipe, tmp_path, over, message):
    code, _, err = call("sweep", recipe, "--over", over, "--runs", tmp_path / "runs")
    assert code == 1
    assert message in err.replace("\n", " ")
    assert not (tmp_path / "runs").exists()


def test_points_of_one_model_are_refused(recipe):
    axis = sweep.read_axis("training.clip=0,0.0")
    with pytest.raises(ValueError, match="same model"):
        sweep.points_of(recipe, [axis], [0])
    with pytest.raises(ValueError, match="different whole numbers"):
        sweep.points_of(recipe, [axis], [0, 0])
    with pytest.raises(ValueError, match="whole numbers with commas"):
        sweep.whole_numbers("0;1")


def test_values_with_commas_are_a_list():
    axis = sweep.read_axis("training.attack=[{name: pgd, steps: 2}, {name: hag, steps: 3}]")
    assert axis.values == ("{name: pgd, steps: 2}", "{name: hag, steps: 3}")
