"""Runs that were touched: files that changed or broke, a directory in use, other devices, and training that
goes on. Every advice is followed, and must help."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from robusthash.apps.experiment import evaluation_stages, training_stages
from robusthash.apps.experiment.config import make_config
from robusthash.apps.experiment.run_directory import Run, load_run
from robusthash.apps.experiment.run_files import sealed
from robusthash.attacks.generator_file import read
from robusthash.core.directory_lock import LOCK, InUse, owned
from robusthash.core.runtime import choose_device, computing_on

CONFIG = {
    "name": "tiny",
    "data": {"name": "synthetic", "train": 64, "query": 12, "database": 90},
    "hasher": {"bits": 12, "image": {"name": "small", "width": 4}},
    "training": {"objective": "csq", "epochs": 2, "batch_size": 32, "optim": {"hasher": {"lr": 0.05}}},
    "evaluation": {"attacks": [{"name": "pgd", "steps": 2}], "batch_size": 8},
    "runtime": {"device": "cpu"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The folder of one evaluated run."""
    root = tmp_path_factory.mktemp("runs")
    evaluation_stages.evaluate(training_stages.train(make_config(CONFIG), root))
    return root


@pytest.fixture
def run(made, tmp_path) -> Path:
    """A run directory of one's own, in place: runs/tiny/ID."""
    shutil.copytree(made, tmp_path / "runs")
    (path,) = (tmp_path / "runs" / "tiny").iterdir()
    return path


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def said_in_one_line(call, *words) -> str:
    """The error of a command: one line, no trace."""
    code, _, err = call(*words)
    assert code == 1, (words, err)
    assert "Traceback" not in err
    lines = [line for line in err.strip().splitlines() if line.startswith("error:")]
    assert lines == err.strip().splitlines()[-1:], err
    return lines[0]


def follow(advice: str, call, **given: object) -> None:
    """Do what an error says: delete the file or line that it names, and call the command behind it."""
    if line := re.search(r"(\S+) is damaged .*; delete its line (\d+)", advice):
        path, number = Path(line[1]), int(line[2])
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[: number - 1] + lines[number:]))
    elif re.search("; delete (it|the file) to ", advice):
        Path(re.search(r"(/\S+?)(?: holds| is damaged| does not fit)", advice)[1]).unlink()
    elif re.search("delete it", advice):
        Path(re.search(r"(/\S+) is damaged", advice)[1]).unlink()
    elif named := re.search(r"delete (/\S+), then", advice):
        Path(named[1]).unlink()
    if command := re.search(r": robusthash (.*)$", advice):
        words = [str(given.get(word, word)) for word in shlex.split(command[1])]
        code, _, err = call(*words)
        assert code == 0, (words, err)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_seed(path: Path) -> None:
    other = training_stages.train(make_config(CONFIG, ["runtime.seed=1"]), path.parents[4])
    shutil.copyfile(other.path / "checkpoint" / path.name, path)


def garble(path: Path) -> None:
    path.write_text('{"hasher": null}')


@pytest.mark.parametrize("change", [flip_a_bit, halve, other_seed, Path.unlink], ids=lambda f: f.__name__)
@pytest.mark.parametrize("file", ["hasher.safetensors", "objective.safetensors"])
def test_weights_are_those_that_were_trained_or_refused(call, run, change, file):
    before = json.loads((run / "model.json").read_text())["digest"]
    change(run / "checkpoint" / file)
    for verb in ("evaluate", "encode"):
        advice = said_in_one_line(call, verb, run)
        assert file in advice
    assert said_in_one_line(call, "train", run / "config.yaml", "--runs", run.parents[1]) == advice
    follow(advice, call)
    assert load_run(run).card()["digest"] == before
    assert call("evaluate", run)[0] == 0


def test_a_card_that_knows_only_both_digests_together_is_enough(call, run):
    card = json.loads((run / "model.json").read_text())
    del card["weights"], card["card"]
    (run / "model.json").write_text(json.dumps(card))
    load_run(run).load_hasher()
    flip_a_bit(run / "checkpoint" / "objective.safetensors")
    assert "hasher.safetensors or " in said_in_one_line(call, "encode", run)


@pytest.mark.parametrize(
    ("file", "change", "verbs"),
    [
        ("model.json", halve, ["evaluate", "encode"]),
        ("model.json", garble, ["evaluate", "encode"]),
        ("config.yaml", lambda path: path.write_text(""), ["evaluate", "encode", "report"]),
        ("config.yaml", halve, ["evaluate", "report"]),
        ("data.json", halve, ["evaluate", "cost"]),
        ("environment.json", halve, ["evaluate", "report"]),
        ("environment.json", lambda path: path.write_text("[]"), ["report"]),
        ("log.jsonl", lambda path: path.write_text(path.read_text() + '{"epo'), ["report"]),
        ("metrics.json", halve, ["report", "table"]),
        ("metrics-*.npz", halve, ["report", "table"]),
        ("metrics-*.npz", Path.unlink, ["report", "table"]),
        ("checkpoint/database.npz", lambda path: path.write_bytes(b"PK"), ["evaluate"]),
        ("attacks/*/0.npz", halve, ["evaluate"]),
    ],
)
def test_a_damaged_file_is_named_with_a_remedy_that_works(call, run, recipe, file, change, verbs):
    (path,) = list(run.glob(file)) or [run / file]
    change(path)
    for verb in verbs:
        advice = said_in_one_line(call, verb, run)
    place = str(run / "metrics.json") if file.startswith("metrics") else str(path)
    assert place in advice
    follow(advice, call, RECIPE=recipe)
    if file == "checkpoint/database.npz":  # of a method that learns none it is not written again
        path.unlink()
    for verb in ("evaluate", "report", *verbs):
        code, _, err = call(verb, run)
        assert code == 0, err


@pytest.mark.parametrize("change", [halve, Path.unlink])
def test_assess_says_what_to_do_about_results_that_it_cannot_read(call, run, change):
    words = ("assess", run, "--tier", "smoke", "--queries", 4)
    assert call(*words)[0] == 0
    first = load_run(run).assessed()
    change(next(run.glob("assess-*.npz")))
    blocks = {path: path.stat().st_mtime_ns for path in run.glob("assess/**/*.npz")}
    advice = said_in_one_line(call, *words)
    (run / "assess.json").unlink()
    assert "assess.json" in advice
    assert "delete it and assess again" in advice
    assert call(*words)[0] == 0
    assert load_run(run).assessed()["img-linf-8 smoke"].values == first["img-linf-8 smoke"].values
    assert {path: path.stat().st_mtime_ns for path in blocks} == blocks


@pytest.mark.parametrize("part", ["modules", "optimisers", "no module", "nothing"])
def test_a_checkpoint_of_other_shapes_is_named(call, run, recipe, part):
    (run / "model.json").unlink()
    path = run / "checkpoint" / "resume.pt"
    state = torch.load(path, weights_only=True)
    if part == "modules":
        state["modules"]["hasher"] = {n: torch.zeros(3, 3) for n in state["modules"]["hasher"]}
    elif part == "optimisers":
        for entry in state["optimisers"]["hasher"]["state"].values():
            entry["momentum_buffer"] = torch.zeros(2, 5)
    elif part == "no module":
        del state["modules"]["hasher"]
    torch.save([] if part == "nothing" else {**state, "epoch": 1}, path)
    advice = said_in_one_line(call, "train", recipe, "--runs", run.parents[1])
    assert str(path) in advice
    follow(advice, call)
    assert call("train", recipe, "--runs", run.parents[1])[0] == 0


@pytest.mark.parametrize("change", ["bits", "queries", "one array"])
def test_a_block_of_other_widths_is_named(call, run, change):
    path = next(run.glob("attacks/*/0.npz"))
    with np.load(path) as held:
        arrays = {name: held[name] for name in held.files}
    if change == "bits":
        arrays = {n: v[..., :8] if n in ("signs", "codes_8bit") else v for n, v in arrays.items()}
    elif change == "queries":
        arrays = {name: value[:5] for name, value in arrays.items()}
    else:
        arrays["passes"] = arrays["passes"][:3]
    np.savez(path, **arrays)
    advice = said_in_one_line(call, "evaluate", run)
    assert str(path) in advice
    follow(advice, call)
    assert call("evaluate", run)[0] == 0


def test_blocks_of_other_weights_are_not_taken(run):
    """The same run directory with a model that was trained again to other weights."""
    first = load_run(run).evaluated()
    other = training_stages.train(make_config(CONFIG, ["runtime.seed=1"]), run.parents[2] / "other")
    wanted = evaluation_stages.evaluate(other)
    for earlier in (False, True):
        for name in ("hasher", "objective"):
            file = f"checkpoint/{name}.safetensors"
            shutil.copyfile(other.path / file, run / file)
        card = json.loads((run / "model.json").read_text())
        card["digest"] = other.card()["digest"]
        (run / "model.json").write_text(json.dumps(sealed(card)))
        if earlier:  # the name that blocks had before it held the weights
            folders = sorted((run / "attacks").iterdir(), key=lambda path: path.stat().st_mtime)
            folders[0].rename(run / "attacks" / earlier_name(run))
        found = evaluation_stages.evaluate(load_run(run))
        assert found["pgd"].values == wanted["pgd"].values
        assert found["pgd"].values != first["pgd"].values


def earlier_name(run: Path) -> str:
    """The name of the folder of a run's blocks in versions that left the weights out."""
    made = load_run(run)
    victim, objective = evaluation_stages.load_victim(made)
    context = evaluation_stages.context_of(
        made, victim, evaluation_stages.read_data(made.config), lambda *_: None
    )
    attack = evaluation_stages.build("attack", CONFIG["evaluation"]["attacks"][0], objective=objective)
    searched = [context.queries.fingerprint(), context.data.database.fingerprint()]
    key = [attack.settings(), *searched, made.config.evaluation.batch_size, context.seed]
    return f"pgd-{evaluation_stages.identity(key)}"


def test_blocks_of_earlier_versions_are_taken_where_the_results_are_of_these_weights(run):
    (folder,) = (run / "attacks").iterdir()
    folder.rename(run / "attacks" / earlier_name(run))
    times = {path.name: path.stat().st_mtime_ns for path in run.glob("attacks/*/*.npz")}
    evaluation_stages.evaluate(load_run(run))
    assert {path.name: path.stat().st_mtime_ns for path in run.glob("attacks/*/*.npz")} == times


# ---------------------------------------------------------------------------------------------- added attacks


def test_an_attack_is_added_to_the_results(call, run):
    first = load_run(run).evaluated()
    more = ("--attack", "{name: hag, steps: 2}", "--attack", "{name: pgd, steps: 6}", "--json")
    code, out, err = call("evaluate", run, *more)
    assert code == 0, err
    results = load_run(run).evaluated()
    assert list(results) == ["clean", "pgd", "hag", "pgd #2", "worst"]
    assert set(json.loads(out)["results"]) == set(results)
    assert results["pgd"].values == first["pgd"].values
    assert results["worst"]["wMAP"] <= min(results[name]["MAP"] for name in ("pgd", "hag", "pgd #2"))
    under = torch.stack([results[n].per_query["MAP"] for n in ("clean", "pgd", "hag", "pgd #2")])
    assert torch.equal(results["worst"].per_query["wMAP"], under.min(0).values)
    assert call("evaluate", run, "--attack", "{name: pgd, steps: 6}")[0] == 0
    assert list(load_run(run).evaluated()) == list(results), "the same attack takes its own place"
    assert load_run(run).evaluated()["worst"].values == results["worst"].values
    together = [CONFIG["evaluation"]["attacks"][0], {"name": "hag", "steps": 2}, {"name": "pgd", "steps": 6}]
    config = make_config({**CONFIG, "evaluation": {**CONFIG["evaluation"], "attacks": together}})
    at_once = evaluation_stages.evaluate(Run(run, config))
    assert at_once["worst"].values == results["worst"].values
    assert call("evaluate", run)[0] == 0
    assert list(load_run(run).evaluated()) == ["clean", "pgd", "worst"]


def test_an_added_attack_of_another_threat_is_named_by_it(call, run):
    wider = ("--attack", "{name: pgd, steps: 2, eps: 16/255}")
    assert call("evaluate", run, *wider)[0] == 0
    assert list(load_run(run).evaluated()) == ["clean", "pgd", "pgd (img-linf-16)", "worst"]
    held = load_run(run).evaluated()["pgd (img-linf-16)"].values
    assert call("evaluate", run, *wider)[0] == 0, "the same attack takes its own place"
    assert load_run(run).evaluated()["pgd (img-linf-16)"].values == held


def test_targeted_attacks_alone_have_no_worst_case(run):
    attacks = [{"name": "dhta", "steps": 2}]
    config = make_config({**CONFIG, "evaluation": {**CONFIG["evaluation"], "attacks": attacks}})
    assert list(evaluation_stages.evaluate(Run(run, config))) == ["clean", "dhta"]


def test_a_generator_that_is_asked_for_is_written_where_its_blocks_are_stored(call, run, tmp_path):
    made = {"name": "pros-gan", "epochs": 1, "width": 2, "hidden": 8}
    assert call("evaluate", run, "--attack", json.dumps(made))[0] == 0
    times = {path: path.stat().st_mtime_ns for path in run.glob("attacks/*/*.npz")}
    file = tmp_path / "generator.pt"
    assert call("evaluate", run, "--attack", json.dumps({**made, "generator": str(file)}))[0] == 0
    assert {path: path.stat().st_mtime_ns for path in run.glob("attacks/*/*.npz")} == times
    assert read(file)["epoch"] == 1
    file.write_bytes(file.read_bytes()[:100])
    said = said_in_one_line(call, "evaluate", run, "--attack", json.dumps({**made, "generator": str(file)}))
    assert "is no file of a generator" in said


def test_an_attack_is_not_added_to_results_of_other_queries(call, run):
    held = yaml.safe_load((run / "config.yaml").read_text())
    held["evaluation"]["queries"] = 6
    (run / "config.yaml").write_text(yaml.safe_dump(held))
    before = (run / "metrics.json").read_bytes()
    advice = said_in_one_line(call, "evaluate", run, "--attack", "hag")
    assert "queries" in advice
    assert (run / "metrics.json").read_bytes() == before
    follow(advice, call)
    assert call("evaluate", run, "--attack", "hag")[0] == 0


# ---------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "setting", ["runtime.device=abacus", "evaluation.directions=[I2T]", "evaluation.relevance=[none]"]
)
def test_a_setting_that_fails_is_not_written_into_a_finished_run(call, run, recipe, setting):
    before = (run / "config.yaml").read_bytes()
    said_in_one_line(call, "run", recipe, "--runs", run.parents[1], "--set", setting)
    assert (run / "config.yaml").read_bytes() == before
    assert call("evaluate", run)[0] == 0


def test_a_setting_that_fails_makes_no_run(call, recipe, tmp_path):
    words = ("train", recipe, "--runs", tmp_path / "new", "--set", "runtime.device=abacus")
    assert "abacus" in said_in_one_line(call, *words)
    assert not (tmp_path / "new").exists()


def test_a_finished_run_is_evaluated_by_other_settings_and_keeps_them(call, run, recipe):
    words = ("run", recipe, "--runs", run.parents[1], "--set", "evaluation.queries=6")
    assert call(*words)[0] == 0
    assert load_run(run).config.evaluation.queries == 6
    assert len(load_run(run).evaluated()["clean"].per_query["MAP"]) == 6


VERBS = (
    "train run evaluate assess attack questions transfer poison check verify encode search sweep curves "
    "attribute cost demo audit evidence-export evidence-verify evidence-entry index-build index-add"
)


@pytest.mark.parametrize("verb", VERBS.split())
def test_every_verb_that_computes_takes_a_device(call, verb):
    code, out, err = call(*verb.split("-"), "--help")
    assert code == 0
    assert "--device" in out + err


def test_a_device_that_is_gone_is_replaced_for_one_command(call, run, tmp_path):
    held = yaml.safe_load((run / "config.yaml").read_text())
    held["runtime"]["device"] = "abacus"
    (run / "config.yaml").write_text(yaml.safe_dump(held))
    for words in (("evaluate", run), ("encode", run), ("assess", run, "--tier", "smoke", "--queries", 2)):
        assert "try --device cpu" in said_in_one_line(call, *words)
        code, _, err = call(*words, "--device", "cpu")
        assert code == 0, err
    assert load_run(run).config.runtime.device == "abacus"
    assert "meta2" in said_in_one_line(call, "evaluate", run, "--device", "meta2")
    with pytest.raises(ValueError, match="abacus"):
        choose_device("abacus")
    with computing_on("cpu"):
        assert choose_device("abacus").type == "cpu"


# ---------------------------------------------------------------------------------------------- owners


HOLDER = (
    "import sys, time\n"
    "from robusthash.core.atomic_files import write_aside\n"
    "from robusthash.core.directory_lock import owned\n"
    "with owned(sys.argv[1], 'training'), write_aside(sys.argv[1] + '/half.json') as aside:\n"
    "    aside.write_text('half')\n"
    "    print('ready', flush=True)\n"
    "    time.sleep(600)\n"
)


def test_a_second_process_is_told_who_works_in_a_run(call, run, recipe):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        before = {path: path.read_bytes() for path in run.glob("*.*") if path.name != LOCK}
        for words in (
            ("train", recipe, "--runs", run.parents[1], "--set", "evaluation.queries=5"),
            ("run", recipe, "--runs", run.parents[1], "--set", "evaluation.queries=5"),
            ("evaluate", run),
            ("assess", run, "--tier", "smoke"),
        ):
            said = said_in_one_line(call, *words)
            assert (
                f"{run} is in use by process {holder.pid} on {os.uname().nodename} (training, since 20"
                in said
            )
        assert {path: path.read_bytes() for path in before} == before
        assert call("report", run)[0] == 0, "reading needs no lock"
    finally:
        holder.kill()
        holder.wait()
    assert list(run.glob(".half.*.part.json"))
    assert call("evaluate", run)[0] == 0, "its owner is dead"
    assert not list(run.glob(".half.*")), "what it left half written is removed"
    assert not (run / LOCK).exists()


def test_an_owner_on_another_host_is_believed(call, run):
    (run / LOCK).write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "2026", "work": "training"}))
    advice = said_in_one_line(call, "evaluate", run)
    assert "process 1 on elsewhere" in advice
    assert f"where that has ended delete {run / LOCK}" in advice
    (run / LOCK).unlink()
    assert call("evaluate", run)[0] == 0


@pytest.mark.parametrize("left", ["", "{", "[]", '{"pid": "x"}'])
def test_a_lock_without_an_owner_is_taken(tmp_path, left):
    (tmp_path / LOCK).write_text(left)
    if "pid" in left:
        with pytest.raises(InUse), owned(tmp_path, "work"):
            pass
        return
    with owned(tmp_path, "work"), owned(tmp_path, "a part of the work"):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


# ---------------------------------------------------------------------------------------------- longer training


def digest_of(path: Path) -> str:
    return load_run(path).card()["digest"]


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_longer_training_goes_on_from_a_shorter_run(call, recipe, tmp_path, schedule):
    runs, setting = tmp_path / "runs", ("--set", f"training.schedule.kind={schedule}", "--json")
    trained = {}
    for name, folder, more in (
        ("short", runs, ("--set", "training.epochs=2")),
        ("resumed", runs, ("--set", "training.epochs=5", "--resume-from")),
        ("whole", tmp_path / "whole", ("--set", "training.epochs=5")),
    ):
        more = (*more, trained["short"]) if name == "resumed" else more
        code, out, err = call("train", recipe, "--runs", folder, *setting, *more)
        assert code == 0, err
        trained[name] = Path(json.loads(out)["run"])
        if name == "resumed":
            assert ("another model" in err) == (schedule == "cosine")
    same = digest_of(trained["resumed"]) == digest_of(trained["whole"])
    assert same == (schedule == "constant")
    assert (trained["resumed"].name == trained["whole"].name) == same, "another model has another id"
    assert [line["epoch"] for line in load_run(trained["resumed"]).lines()] == list(range(5))
    assert load_run(trained["resumed"]).origin == {"resumed_from": str(trained["short"])}
    words = ("train", recipe, "--runs", runs, "--resume-from", trained["short"], *setting)
    assert "above 2" in said_in_one_line(call, *words)
    assert "more epochs" in said_in_one_line(
        call, *words, "--set", "runtime.seed=3", "--set", "training.epochs=9"
    )
    (trained["short"] / "checkpoint" / "resume.pt").unlink()
    assert "kept no checkpoint" in said_in_one_line(call, *words, "--set", "training.epochs=9")


def test_the_advice_on_another_recipe_trains_on(call, recipe, run):
    words = ("train", recipe, "--runs", run.parents[1], "--resume-from", run, "--set", "training.epochs=3")
    advice = said_in_one_line(call, *words, "--set", "hasher.bits=16")
    code, _, err = call(*shlex.split(advice.partition(": robusthash ")[2]), "--runs", run.parents[1])
    assert code == 0, err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ["schedule"]),
        ({"schedule": {"kind": "constant"}}, []),
        ({"schedule": {"kind": "constant", "warmup": 0.1}}, ["schedule"]),
        (
            {
                "schedule": {"kind": "constant"},
                "recipe": {"name": "adversarial", "warmup": 0.5},
                "outer": "pgd-at",
                "attack": {"name": "pgd", "steps": 1},
            },
            ["training.recipe 'adversarial'"],
        ),
    ],
)
def test_what_depends_on_the_number_of_epochs_is_known(changes, words):
    config = make_config({**CONFIG, "training": {**CONFIG["training"], **changes}})
    found = training_stages.depends_on_total(config)
    assert len(found) == len(words)
    assert all(word in text for word, text in zip(words, found, strict=True))


def test_the_config_of_a_hardened_run_trains_it_again(call, recipe, run, tmp_path, monkeypatch):
    """Its parent is a recipe with a relative path; from elsewhere the run knows which run that was."""
    child = {
        "extends": "tiny.yaml",
        "name": "hard",
        "training": {
            "recipe": "adversarial",
            "outer": "pgd-at",
            "attack": {"name": "pgd", "steps": 1},
            "epochs": 1,
            "init_from": "tiny.yaml",
        },
    }
    path = tmp_path / "hard.yaml"
    path.write_text(yaml.safe_dump(child))
    code, out, err = call("train", path, "--runs", run.parents[1], "--json")
    assert code == 0, err
    hardened, elsewhere = Path(json.loads(out)["run"]), tmp_path / "elsewhere"
    assert load_run(hardened).origin == {"parent": str(run)}
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    before = digest_of(hardened)
    flip_a_bit(hardened / "checkpoint" / "hasher.safetensors")
    follow(said_in_one_line(call, "encode", hardened), call)
    assert digest_of(hardened) == before
    assert call("encode", hardened)[0] == 0


# ---------------------------------------------------------------------------------------------- files


def test_files_have_the_mode_that_the_user_chose(tmp_path):
    before = os.umask(0o027)
    try:
        run = training_stages.train(make_config(CONFIG), tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in run.path.rglob("*") if path.is_file()}
    assert {"hasher.safetensors", "resume.pt", "model.json"} <= set(modes)
    assert set(modes.values()) == {"0o640"}, modes


@pytest.mark.parametrize("file", ["resume.pt", "hasher.safetensors"])
def test_a_full_disk_is_one_line_and_keeps_what_was_there(run, recipe, file):
    """A limit on the file size stands for the full disk; the file is written anew over the old one."""
    path = run / "checkpoint" / file
    old = path.read_bytes()
    (run / "model.json").unlink()
    state = torch.load(run / "checkpoint" / "resume.pt", weights_only=True)
    if file == "resume.pt":  # an epoch is left to train
        torch.save({**state, "epoch": 1, "lines": state["lines"][:1]}, path)
        old = path.read_bytes()
    code = (
        "import resource, signal, sys\n"
        "from robusthash.apps.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(old) // 2},) * 2)\n"
        "sys.argv = ['robusthash', *sys.argv[1:]]\n"
        "main()\n"
    )
    words = [sys.executable, "-c", code, "train", recipe, "--runs", run.parents[1]]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    line = done.stderr.strip().splitlines()[-1]  # before it may stand from which epoch training goes on
    assert "Traceback" not in done.stderr
    assert f"cannot write {path}: File too large; what was there before is unchanged" in line
    assert path.read_bytes() == old
    assert not list(run.rglob(".*.part*"))


def test_a_log_whose_last_line_was_cut_goes_on_in_a_line_of_its_own(run):
    made = load_run(run)
    path = run / "log.jsonl"
    path.write_text(path.read_text() + '{"epoch": 2, "lo')
    made.log({"epoch": 2, "loss": 1.0})
    made.log({"epoch": 3, "loss": 1.0})
    assert path.read_text().splitlines()[-3:] == [
        '{"epoch": 2, "lo', '{"epoch": 2, "loss": 1.0}', '{"epoch": 3, "loss": 1.0}'
    ]  # fmt: skip


def test_verify_computes_the_digest_of_the_weights_again(call, run, recipe, tmp_path):
    code, out, err = call("evidence", "entry", run, "--recipe", recipe, "--out", tmp_path, "--json")
    assert code == 0, err
    words = ("verify", json.loads(out)["entry"], "--run", run)
    assert call(*words)[0] == 0
    flip_a_bit(run / "checkpoint" / "hasher.safetensors")
    assert "are not those that were trained" in said_in_one_line(call, *words)


def test_a_recipe_that_is_refused_leaves_no_run(tmp_path: Path) -> None:
    """A loss that does not fit the net is found out when training begins; a run that began stays."""
    training = {**CONFIG["training"], "recipe": "adversarial", "outer": "sfcl", "attack": "dhta"}
    with pytest.raises(ValueError, match=r"set hasher\.image to {name: sfcl, .*}, SIDE the data's size"):
        training_stages.train(make_config({**CONFIG, "training": training}), tmp_path)
    assert list(tmp_path.glob("tiny/*")) == []
    gone = {**CONFIG, "data": {"name": "ucmerced", "root": str(tmp_path / "nowhere")}}
    with pytest.raises(FileNotFoundError, match="nowhere"):
        training_stages.train(make_config(gone), tmp_path)
    assert list(tmp_path.glob("tiny/*")) == []
    run = training_stages.train(make_config(CONFIG), tmp_path)
    (run.path / "checkpoint" / "hasher.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="hasher"):
        training_stages.train(make_config(CONFIG), tmp_path)
    assert run.path.is_dir()
