"""The command line end to end on the small generated world: train, evaluate, index, search, and every
refusal."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from robusthash.apps.experiment import evaluation_stages, training_stages
from robusthash.apps.experiment.config import ConfigError, load_config, make_config
from robusthash.apps.experiment.run_directory import RunError, load_run

REPO = Path(__file__).parents[2]
CONFIG = {
    "name": "tiny",
    "data": {"name": "synthetic"},
    "hasher": {"bits": 12, "image": {"name": "small", "width": 4}},
    "training": {"objective": "csq", "epochs": 3, "batch_size": 32, "optim": {"hasher": {"lr": 0.05}}},
    "evaluation": {
        "attacks": [{"name": "mainstay", "steps": 3, "step_size": "4/255"}, {"name": "dhta", "steps": 3}],
        "batch_size": 16,
    },
    "runtime": {"device": "cpu"},
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """One evaluated run, shared by the tests that only read it."""
    root = tmp_path_factory.mktemp("runs")
    run = training_stages.train(make_config(CONFIG), root)
    evaluation_stages.evaluate(run)
    return run.path


def test_results_go_to_stdout_and_nothing_else_does(call, trained, tmp_path, monkeypatch):
    """A loop over the verbs that answer with a table: it can be piped, and with --json is JSON alone."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (20, 20), "red").save("a.png")
    assert call("index", "build", "ix", "--run", trained)[0] == 0
    codes = [
        line
        for line in call("encode", trained)[1].split()
        if Path(line).name.startswith(("query", "database"))
    ]
    assert call("token", "new", "reader")[0] == 0
    commands: dict[str, list[object]] = {
        "list": ["attack"],
        "data": ["check", "{name: synthetic, train: 64, query: 16, database: 64}"],
        "search": ["ix", "a.png", "--run", trained],
        "index": ["info", "ix"],
        "token": ["list"],
        "compare": [trained, trained],
        "score": sorted(codes, reverse=True),
        "evaluate": [trained],
        "check": [trained, "--queries", 4],
        "certify": [trained, "--attacks", "none"],
        "questions": [trained, "--budgets", "2,4", "--queries", 4, "--shows", "codes"],
        "assess": [trained, "--tier", "smoke", "--queries", 4, "--unchecked"],
        "poison": [trained, "--threat", "db-insert", "--count", 1, "--steps", 2],
        "attack": [trained, "{name: mainstay, steps: 1}", "--out", "attacked.npz"],
        "train": [trained / "config.yaml", "--runs", trained.parents[1]],
        "run": [trained / "config.yaml", "--runs", trained.parents[1], "--dry-run", "--batch", 2],
    }
    for verb, words in commands.items():
        code, out, err = call(verb, *words)
        assert code == 0 or verb == "check", (verb, err)
        assert "│" in out, verb
        assert not set("│┃┏┓") & set(err), verb
        code, out, err = call(verb, *words, "--json")
        assert json.loads(out) is not None, verb
        assert not set("│┃┏┓") & set(err), verb


@pytest.mark.parametrize(
    "verb", ["run", "train", "encode", "evaluate", "attack", "score", "compare", "list", "index", "poison"]
)
def test_help_suffices(call, verb):
    code, out, err = call(verb, "--help")
    assert code == 0
    assert "Usage" in out + err


def test_train_and_evaluate_give_json(call, recipe, tmp_path):
    code, out, _ = call("train", recipe, "--runs", tmp_path / "runs", "--json")
    assert code == 0
    run = Path(json.loads(out)["run"])
    code, out, _ = call("evaluate", run, "--json")
    results = json.loads(out)["results"]
    assert code == 0
    assert set(results) == {"clean", "mainstay", "dhta", "worst"}
    assert results["worst"]["values"]["wMAP"] <= results["clean"]["values"]["MAP"]
    assert results["worst"]["values"]["wMAP"] <= results["mainstay"]["values"]["MAP"]
    assert results["dhta"]["setting"]["digests"]["model"] == load_run(run).card()["digest"]
    assert results["mainstay"]["perceptibility"]["linf/max"] <= 8 / 255 + 1e-6


def test_run_again_does_no_work_twice(recipe, tmp_path, monkeypatch):
    first = training_stages.run_all(load_config(recipe), tmp_path / "runs")
    weights = (first.path / "checkpoint" / "hasher.safetensors").stat().st_mtime_ns
    blocks = {path: path.stat().st_mtime_ns for path in (first.path / "attacks").rglob("*.npz")}
    metrics = json.loads((first.path / "metrics.json").read_text())
    again = training_stages.run_all(load_config(recipe), tmp_path / "runs")
    assert again.path == first.path
    assert (again.path / "checkpoint" / "hasher.safetensors").stat().st_mtime_ns == weights
    assert {path: path.stat().st_mtime_ns for path in (again.path / "attacks").rglob("*.npz")} == blocks
    repeated = json.loads((again.path / "metrics.json").read_text())
    assert [r["values"] for r in repeated["results"]] == [r["values"] for r in metrics["results"]]


def test_adversarial_run_trains_its_ancestor_first(recipe, tmp_path):
    child = {
        "extends": "tiny.yaml",
        "training": {
            "recipe": "adversarial",
            "outer": "saat",
            "attack": {"name": "mainstay", "steps": 2, "step_size": "5/255", "slope": "one"},
            "epochs": 1,
            "init_from": "tiny.yaml",
        },
    }
    path = tmp_path / "tiny-saat.yaml"
    path.write_text(yaml.safe_dump(child))
    run = training_stages.train(load_config(path), tmp_path / "runs", base=tmp_path)
    assert run.card()["declared"] == "adversarial"
    assert run.config.training.objective == "csq"  # from the file that it extends
    assert [p.name for p in (tmp_path / "runs").iterdir() if p.name == "tiny"] == ["tiny"]


def test_the_ancestor_has_the_net_of_the_run_that_asks_for_it(recipe, tmp_path):
    """An override of bits or of the encoder reaches the undefended model that training starts from."""
    child = {
        "extends": "tiny.yaml",
        "training": {
            "recipe": "adversarial",
            "outer": "pgd-at",
            "attack": {"name": "pgd", "steps": 1},
            "epochs": 1,
        },
    }
    child["training"]["init_from"] = "tiny.yaml"
    path = tmp_path / "tiny-at.yaml"
    path.write_text(yaml.safe_dump(child))
    wanted = ["hasher.bits=12", "hasher.image={name: small, width: 4}"]
    run = training_stages.train(load_config(path, wanted), tmp_path / "runs", base=tmp_path)
    (ancestor,) = (tmp_path / "runs" / "tiny").iterdir()
    assert load_run(ancestor).card()["bits"] == run.card()["bits"] == 12
    assert load_run(ancestor).card()["hasher"]["image"] == run.card()["hasher"]["image"]


@pytest.mark.parametrize(("start", "what"), [("nowhere", "run"), ("nowhere.yaml", "file")])
def test_a_start_that_is_not_there_is_named_by_its_setting(call, recipe, tmp_path, start, what):
    said = call("train", recipe, "--runs", tmp_path / "runs", "--set", f"training.init_from={start}")[2]
    assert f"training.init_from is '{start}', and there is no such {what}: name the directory" in said


def test_killed_training_goes_on_to_the_same_result(tmp_path):
    """kill -9 after the first checkpoint; the same command ends with the same weights as an uninterrupted
    run."""
    config = {**CONFIG, "training": {**CONFIG["training"], "epochs": 30}}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "robusthash", "train", str(path), "--runs", str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").rglob("resume.pt")):
        assert process.poll() is None, "training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "killed").rglob("model.json"))
    resumed = training_stages.train(load_config(path), tmp_path / "killed")
    whole = training_stages.train(load_config(path), tmp_path / "whole")
    assert resumed.card()["digest"] == whole.card()["digest"]
    assert resumed.card()["epochs"] == 30


def test_encode_then_score_agrees_with_evaluate(call, trained):
    code, _, _ = call("encode", trained)
    assert code == 0
    codes = trained / "codes"
    code, out, _ = call("score", codes / "query.image.npz", codes / "database.image.npz", "--json")
    assert code == 0
    metrics = json.loads((trained / "metrics.json").read_text())
    clean = next(result for result in metrics["results"] if result["name"] == "clean")
    assert json.loads(out)["values"]["MAP"] == pytest.approx(clean["values"]["MAP"], abs=1e-12)


def test_attack_writes_inputs_inside_the_ball(call, trained, tmp_path):
    out = tmp_path / "attacked.npz"
    code, printed, _ = call("attack", trained, "{name: hag, steps: 3, eps: 4/255}", "--out", out, "--json")
    assert code == 0
    assert json.loads(printed)["perceptibility"]["linf/max"] <= 4 / 255 + 1e-6
    with np.load(out, allow_pickle=False) as arrays:
        assert arrays["inputs"].dtype == np.float32
        assert len(arrays["inputs"]) == len(arrays["codes"]) == len(arrays["labels"])


def test_compare_two_runs(call, trained, tmp_path):
    other = training_stages.train(make_config(CONFIG, ["runtime.seed=1"]), tmp_path)
    evaluation_stages.evaluate(other)
    code, out, _ = call("compare", trained, other.path, "--result", "clean", "--json")
    assert code == 0
    assert "MAP" in json.loads(out)
    code, _, err = call("compare", trained, other.path, "--result", "cleen")
    assert code == 1
    assert "did you mean 'clean'" in err


def test_table_averages_seeds(call, trained, tmp_path):
    other = training_stages.train(make_config(CONFIG, ["runtime.seed=1"]), tmp_path)
    evaluation_stages.evaluate(other)
    code, out, _ = call("table", trained, other.path, "--column", "clean", "--column", "worst")
    assert code == 0
    assert out.splitlines()[2].startswith("| tiny | ")
    assert out.splitlines()[2].endswith("| 2 |")


def test_index_build_search_add_remove(call, trained, tmp_path):
    index = tmp_path / "index"
    assert call("index", "build", index, "--run", trained)[0] == 0
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    image = tmp_path / "picture.png"
    Image.fromarray(pixels).save(image)
    code, out, _ = call("index", "search", index, image, "--run", trained, "--k", 3, "--json")
    hits = json.loads(out)
    assert code == 0
    assert len(hits) == 3
    assert [hit["distance"] for hit in hits] == sorted(hit["distance"] for hit in hits)
    code, out, _ = call("index", "add", index, image, "--run", trained, "--json")
    assert code == 0
    assert json.loads(out)["count"] == 201
    code, out, _ = call("index", "search", index, image, "--run", trained, "--k", 1, "--json")
    assert json.loads(out)[0]["distance"] == 0
    code, out, _ = call("index", "remove", index, 200, "--json")
    assert json.loads(out) == {"removed": 1, "items": 200}
    assert json.loads(call("index", "info", index, "--json")[1])["bits"] == 12


def test_search_is_a_verb_that_knows_who_built_the_index(call, trained, tmp_path):
    index, image = tmp_path / "index", tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(image)
    assert call("index", "build", index, "--run", trained)[0] == 0
    code, out, err = call("search", index, image, "-k", 4, "--json")
    assert code == 0, err
    hits = json.loads(out)
    assert len(hits) == 4
    for verb in (("search",), ("index", "search")):
        assert json.loads(call(*verb, index, image, "--run", trained, "--k", 4, "--json")[1]) == hits
    (index / "run.json").unlink()
    code, _, err = call("search", index, image)
    assert code == 1
    assert "name it with --run" in err


def test_encode_gives_the_codes_of_images(call, trained, tmp_path):
    folder, numbers = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    for name in ("a", "b"):
        pixels = numbers.integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    code, out, err = call("encode", trained, folder)
    assert code == 0, err
    lines = [line.split("  ") for line in out.splitlines()]
    assert [path for _, path in lines] == [str(folder / "a.png"), str(folder / "b.png")]
    assert all(len(digits) == 4 for digits, _ in lines)  # 12 bits in two bytes
    assert call("encode", trained, folder / "b.png")[1].splitlines() == ["  ".join(lines[1])]
    assert json.loads(call("encode", trained, folder, "--json")[1])["codes"] == {
        path: code for code, path in lines
    }
    assert call("encode", trained, folder, "--out", tmp_path / "codes.npz")[0] == 0
    with np.load(tmp_path / "codes.npz", allow_pickle=False) as arrays:
        assert [bytes(row).hex() for row in arrays["codes"]] == [digits for digits, _ in lines]
        assert arrays["bits"] == 12
        assert arrays["paths"].tolist() == [path for _, path in lines]
    for words, message in (
        ((trained, tmp_path / "none"), "neither an image nor a folder"),
        ((trained, folder, "--out", "codes.txt"), "ends in .npz"),
    ):
        code, _, err = call("encode", *words)
        assert code == 1
        assert message in err


def test_index_refuses_a_checkpoint_of_other_bits(call, trained, tmp_path):
    assert call("index", "build", tmp_path / "index", "--run", trained)[0] == 0
    other = training_stages.train(make_config(CONFIG, ["hasher.bits=16"]), tmp_path / "runs")
    image = tmp_path / "picture.png"
    Image.new("RGB", (20, 20)).save(image)
    code, _, err = call("index", "search", tmp_path / "index", image, "--run", other.path)
    assert code == 1
    assert "12" in err
    assert "16" in err


def test_index_refuses_the_queries_of_another_run(call, trained, tmp_path):
    index, image = tmp_path / "index", tmp_path / "picture.png"
    assert call("index", "build", index, "--run", trained)[0] == 0
    other = training_stages.train(make_config(CONFIG, ["runtime.seed=1"]), tmp_path / "runs")
    Image.new("RGB", (20, 20)).save(image)
    for verb in ("search", "add"):
        code, out, err = call("index", verb, index, image, "--run", other.path)
        assert (code, out) == (1, "")
        for said in (other.card()["digest"], load_run(trained).card()["digest"], "--run"):
            assert said in err


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.epoch=2", ["training.epoch", "epochs"]),
        ("trainin.epochs=2", ["trainin", "training"]),
        ("hasher.bits=0", ["hasher.bits", "0"]),
        ("hasher.bits=-8", ["hasher.bits", "-8"]),
        ("training.objective=cqs", ["cqs", "csq"]),
        ("training.objective.quantization=1", ["quantization", "quantisation"]),
        ("evaluation.attacks.0.step=3", ["'step'", "steps"]),
        ("data=photo", ["photo", "photos"]),
        ("training.outer=saat", ["adversarial"]),
        ("runtime", ["section.key=value"]),
        ("evaluation.attacks.7.steps=1", ["7"]),
        ("training.optim.hasher.learning_rate=1", ["learning_rate"]),
        ("training={epochs: ", ["not valid YAML", "'{epochs: '"]),
    ],
)
def test_config_errors_name_the_key_and_the_nearest(override, words):
    with pytest.raises(ConfigError) as raised:
        make_config(CONFIG, [override])
    for word in words:
        assert word in str(raised.value)


def test_budgets_are_fractions(trained, call):
    config = make_config(CONFIG, ["evaluation.attacks.0.eps=8/255", "training.optim.hasher.lr=1e-2"])
    assert config.evaluation.attacks[0]["eps"] == 8 / 255
    assert config.training.optim["hasher"].lr == 0.01
    code, _, err = call("evaluate", trained, "--attack", "{name: mainstay, eps: 8}")
    assert code == 1
    assert "8/255" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        ("{name: hag, steps: ", "not valid YAML"),
        ("[hag]", "attack is a name, or a mapping with 'name'"),
        ("{steps: 3}", "attack needs a 'name'"),
        ("{name: hag, steps: many}", "steps of attack 'hag' must be a whole number, got 'many'"),
        ("{name: hag, slope: none}", "slope of attack 'hag' must be 'published' or 'one', got 'none'"),
    ],
)
def test_an_attack_that_cannot_be_read_is_one_line(trained, call, tmp_path, attack, said):
    for words in (
        ("evaluate", trained, "--attack", attack),
        ("attack", trained, attack, "--out", tmp_path / "x.npz"),
    ):
        code, _, err = call(*words)
        assert code == 1
        assert said in err
        assert len(err.strip().splitlines()) == 1


def test_a_truncated_checkpoint_is_named(recipe, tmp_path, call):
    runs = tmp_path / "runs"
    run = training_stages.train(load_config(recipe), runs)
    weights = run.path / "checkpoint" / "hasher.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    code, _, err = call("evaluate", run.path)
    assert code == 1
    assert "hasher.safetensors" in err.replace("\n", "")
    (run.path / "model.json").unlink()
    (run.path / "checkpoint" / "resume.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(RunError, match="damaged"):
        training_stages.train(load_config(recipe), runs)


def test_a_run_directory_of_another_config_is_refused(recipe, tmp_path):
    run = training_stages.train(load_config(recipe), tmp_path / "runs")
    held = yaml.safe_load((run.path / "config.yaml").read_text())
    held["hasher"]["bits"] = 24
    (run.path / "config.yaml").write_text(yaml.safe_dump(held))
    with pytest.raises(RunError, match="another config"):
        training_stages.train(load_config(recipe), tmp_path / "runs")


def test_damaged_attack_block_is_named(tmp_path):
    run = training_stages.train(make_config(CONFIG), tmp_path)
    evaluation_stages.evaluate(run)
    block = next((run.path / "attacks").rglob("0.npz"))
    block.write_bytes(block.read_bytes()[:100])
    with pytest.raises(RunError, match="damaged"):
        evaluation_stages.evaluate(run)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    run = training_stages.train(make_config(CONFIG), tmp_path)
    run.checkpoint({"epoch": 1})
    real_save = torch.save

    def full(state, path):
        real_save({"epoch": 2}, path)
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="resume"):
        run.checkpoint({"epoch": 2})
    assert run.resume() == {"epoch": 1}
    assert [p.name for p in (run.path / "checkpoint").iterdir() if ".part" in p.name] == []


def test_recipes_of_the_repository_are_valid():
    paths = sorted((REPO / "recipes").rglob("*.yaml"))
    assert paths
    for path in paths:
        config = load_config(path)
        assert config.name == path.stem
        if config.training.init_from:
            assert (path.parent / config.training.init_from).is_file()


def test_recipes_of_purifiers_have_the_hasher_that_they_start_from():
    checked = 0
    for path in sorted((REPO / "recipes").rglob("*drfgd*.yaml")):
        child = load_config(path)
        parent = load_config(path.parent / child.training.init_from)
        assert child.data == parent.data, path
        assert child.training.objective == parent.training.objective, path
        for part in ("bits", "image", "text", "head"):
            assert getattr(child.hasher, part) == getattr(parent.hasher, part), (path, part)
        checked += 1
    assert checked >= 10


def test_unknown_recipe_file_and_run(call, tmp_path):
    code, _, err = call("train", tmp_path / "none.yaml")
    assert code == 1
    assert "does not exist" in err.replace("\n", " ")
    code, _, err = call("evaluate", tmp_path)
    assert code == 1
    assert "config.yaml" in err


def test_poison_attacks_the_database(call, trained, tmp_path):
    code, out, _ = call("poison", trained, "--threat", "db-insert", "--count", 3, "--steps", 3, "--json")
    found = json.loads(out)
    assert code == 0
    assert 0 <= found["values"]["exposure@10"] <= 1
    assert found["threat"] == "db-insert-img-linf-8"
    assert (trained / "poison-db-insert-img-linf-8.json").is_file()
    kept = tmp_path / "kept.json"
    code, out, err = call(
        "poison", trained, "--threat", "db-perturb-img-linf-4", "--share", 0.1, "--steps", 3, "--out", kept
    )
    assert code == 0
    assert out.splitlines()[-1] == str(kept)
    assert "20 of 200 items" in out.replace("\n", " ")
    chosen = "{name: dsarh, eps: 4/255, steps: 2}"
    code, out, _ = call(
        "poison", trained, "--threat", "db-perturb", "--attack", chosen, "--share", 1, "--json"
    )
    assert code == 0
    assert json.loads(out)["threat"] == "db-perturb-img-linf-4"
    assert (trained / "poison-db-perturb-img-linf-4-dsarh.json").is_file()
    for arguments, said in [
        (("--threat", "db-insert", "--attack", "dsarh"), "db-perturb"),
        (("--threat", "img-linf-8"), "changes queries"),
        (("--threat", "db-insort"), "db-insert"),
        (("--threat", "db-perturb", "--share", 2), "(0, 1]"),
        (("--threat", "db-perturb", "--direction", "T2T"), "must be I2I or T2I"),
    ]:
        code, _, err = call("poison", trained, *arguments)
        assert code == 1
        assert said in err.replace("\n", " ")


def test_list_shows_evidence(call):
    code, out, _ = call("list", "attack", "--json")
    cards = {card["name"]: card for card in json.loads(out)}
    assert code == 0
    assert cards["mainstay"]["evidence"] == "paper+code"
    assert cards["mainstay"]["state"] == "measured"
    assert cards["dhta"]["targeted"]
    (model,) = json.loads(call("list", "models", "--json")[1])
    assert (model["name"], model["evidence"], model["state"]) == ("copy-hash", "own", "measured")
    code, _, err = call("list", "atack")
    assert code == 1
    assert "attack" in err
