"""Malformed inputs at every door: no trace, no hang, bounded memory, a line that names what is wrong.

A sample runs always; ``pytest tests/fuzz --fuzz 1000`` runs more of the same sequence.
"""

from __future__ import annotations

import random
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
import typer
import yaml
from PIL import Image

from robusthash.apps import cli
from robusthash.apps.experiment import evaluation_stages, index_run, training_stages
from robusthash.apps.experiment.config import make_config
from robusthash.apps.experiment.evidence_run import entry_of, export_evidence
from robusthash.robustness.evidence.records import entry_text
from tests.fuzz import malformed

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "data": {"name": "synthetic", "train": 32, "query": 12, "database": 32, "texts": False, "size": 16},
    "hasher": {"bits": 12, "image": {"name": "small", "width": 4}, "head": {"name": "mlp", "hidden": 8}},
    "training": {
        "objective": {"name": "csq", "quantisation": 0.1},
        "epochs": 1,
        "batch_size": 16,
        "optim": {"hasher": {"lr": 0.01}},
    },
    "evaluation": {"attacks": [{"name": "hag", "steps": 2, "eps": 0.03}], "queries": 10},
    "runtime": {"device": "cpu", "seed": 0},
}
CODES = {"codes": np.sign(np.arange(24).reshape(6, 4) % 3 - 0.5), "labels": np.arange(6) % 2}
SECONDS, MEMORY = 30, 2 << 30
_SPLITS = ("train", "query", "database")
Case = tuple[list[Any], list[str]]
"""Words of a command line, and texts of which an error must hold one."""


class Hang(BaseException):
    """More than ``SECONDS`` for an input."""


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, an evaluated run, its index, bundle and entry, codes, images and model files."""
    root = tmp_path_factory.mktemp("world")
    (root / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    run = training_stages.train(make_config(RECIPE), root / "trained")
    evaluation_stages.evaluate(run)
    run.path.rename(root / "run")
    run = training_stages.load_run(root / "run")
    index_run.build_index(root / "index", run.path)
    export_evidence(run, {"name": "hag", "steps": 2}, root / "bundle")
    card = entry_of(run, "tiny.yaml")
    (root / f"{card.id}.yaml").write_text(entry_text(card))
    (root / "entry").write_text(card.id)
    np.savez(root / "good.npz", **CODES)
    (root / "images").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 8))
    torch.jit.trace(net, torch.zeros(1, 3, 16, 16)).save(str(root / "net.pt"))
    torch.save(net.state_dict(), root / "net.pth")
    return root


# ---------------------------------------------------------------------------------------------- doors


def recipe(world: Path, here: Path, draw: random.Random) -> Case:
    shutil.copy(world / "tiny.yaml", here / "odd.yaml")
    malformed.odd_document(here / "odd.yaml", draw)
    return ["train", here / "odd.yaml", "--runs", here / "runs"], ["odd", *_names(RECIPE)]


def override(world: Path, here: Path, draw: random.Random) -> Case:
    path = draw.choice(malformed.places(RECIPE)[1:])
    text = draw.choice([str(draw.choice(malformed.ODD)), draw.choice(malformed.TEXTS)])
    named = ".".join(map(str, path))
    words = ["train", world / "tiny.yaml", "--runs", here / "runs", "--set", f"{named}={text}"]
    return words, [*map(str, path), repr(text[:50])[1:-1]]


def attack(world: Path, here: Path, draw: random.Random) -> Case:
    kind = draw.choice(["mainstay", "hag", "dhta", "guided-apgd", "drfgd", "text-edits", "square", "tha"])
    odd = draw.choice(malformed.ODD)
    option = draw.choice(["steps", "eps", "restarts", "step_size", "norm", "modality", "name", "x"])
    text = draw.choice([str({"name": kind, "steps": 2, option: odd}), draw.choice(malformed.TEXTS)])
    return ["attack", world / "run", text, "--out", here / "out.npz"], [
        option,
        kind,
        "attack",
        repr(text[:50])[1:-1],
    ]


def budget(world: Path, here: Path, draw: random.Random) -> Case:
    option = draw.choice(["--threat", "--eps", "--norm"])
    value = draw.choice(["img-linf-x", "img-", "db-insert", "img-l2--1", "img-linf-1e9", "txt-bow-0", "9" * 400,
                         "-1/255", "1/0", "nan", "inf", "l3", "[", "8", "0", "true", "1e-400", "[/red]"])  # fmt: skip
    words = ["attack", world / "run", "{name: mainstay, steps: 2}", "--out", here / "out.npz", option, value]
    return words, [option, value, value.partition("-")[0], "eps", "threat"]


def run_file(world: Path, here: Path, draw: random.Random) -> Case:
    shutil.copytree(world / "run", here / "odd")
    files = [path for path in sorted((here / "odd").rglob("*")) if path.suffix in (".json", ".yaml")]
    others = [path for path in sorted((here / "odd").rglob("*")) if path.is_file() and path not in files]
    path = draw.choice(files) if draw.random() < 0.7 else draw.choice(others)
    if path in files:
        malformed.odd_document(path, draw)
    else:
        path.write_bytes(malformed.damaged(path.read_bytes(), draw))
    verb = draw.choice(
        ["table", "report", "compare", "encode", "leaderboard", "keep", "evaluate", "transfer"]
    )
    more = {"compare": [world / "run"], "encode": [world / "images"], "transfer": [world / "run"]}
    more |= {"keep": ["--out", here / "kept"]}
    return [verb, here / "odd", *more.get(verb, [])], ["odd", "tiny", path.name]


def codes(world: Path, here: Path, draw: random.Random) -> Case:
    (here / "odd.npz").write_bytes(malformed.npz(draw, CODES))
    return ["score", here / "odd.npz", world / "good.npz"], ["odd.npz"]


def bundle(world: Path, here: Path, draw: random.Random) -> Case:
    shutil.copytree(world / "bundle", here / "odd")
    path = draw.choice(sorted((here / "odd").iterdir()))
    if path.suffix == ".json":
        malformed.odd_document(path, draw)
    else:
        path.write_bytes(malformed.damaged(path.read_bytes(), draw))
    return ["evidence", "verify", here / "odd", "--run", world / "run", "--no-keep"], ["odd", "bundle"]


def entry(world: Path, here: Path, draw: random.Random) -> Case:
    path = here / f"{(world / 'entry').read_text()}.yaml"
    shutil.copy(world / path.name, path)
    malformed.odd_document(path, draw)
    return ["verify", path, "--run", world / "run"], [path.stem, "claimed", "entry", "tier"]


def copy_entry(world: Path, here: Path, draw: random.Random) -> Case:
    path = here / "copy-hash.yaml"
    shutil.copy(Path(__file__).parents[2] / "registry" / path.name, path)
    malformed.odd_document(path, draw)
    return ["verify", path], [path.stem, "entry", "claims", "photographs"]


def image(world: Path, here: Path, draw: random.Random) -> Case:
    path = here / draw.choice(["odd.png", "odd.jpg", "[red].png", "a\nb.png"])
    path.write_bytes(malformed.damaged((world / "images" / "0.png").read_bytes(), draw))
    if draw.random() < 0.5:
        return ["encode", world / "run", path], [path.name, repr(path.name)[1:-1], "odd"]
    return ["search", world / "index", path, "--run", world / "run"], [
        path.name,
        repr(path.name)[1:-1],
        "odd",
    ]


def where(world: Path, here: Path, draw: random.Random) -> Case:
    text = draw.choice([*malformed.TEXTS, *map(str, malformed.ODD), "{labels: {a: 1}}", "{labels: [[]]}"])
    words = ["search", world / "index", world / "images" / "0.png", "--run", world / "run", "--where", text]
    return words, ["where", "label", "payload"]


def manifest(world: Path, here: Path, draw: random.Random) -> Case:
    rows = [
        {"file": f"{number}.png", "split": split, "labels": ["a"]}
        for number, split in zip("012", _SPLITS, strict=True)
    ]
    odd, _ = malformed.with_odd_value(rows, draw)
    path = here / draw.choice(["odd.csv", "odd.jsonl"])
    lines = odd if isinstance(odd, list) else [odd]
    text = "\n".join(map(malformed.json.dumps, lines)) if path.suffix == ".jsonl" else "\n".join(
        ["file,split,labels", *(",".join(map(str, row.values() if isinstance(row, dict) else [row])) for row in lines)]
    )  # fmt: skip
    content = text.encode("utf-8", "surrogatepass")
    path.write_bytes(malformed.damaged(content, draw) if draw.random() < 0.4 else content)
    settings = {"name": "folder", "root": str(world / "images"), "manifest": str(path), "size": 16}
    return ["data", "check", yaml.safe_dump(settings, default_flow_style=True)], [
        path.name,
        "images",
        "folder",
    ]


def model_file(world: Path, here: Path, draw: random.Random) -> Case:
    path = here / draw.choice(["odd.pt", "odd.onnx", "odd.ts"])
    source = world / draw.choice(["net.pt", "net.pth"])
    content = malformed.damaged(source.read_bytes(), draw)
    path.write_bytes(content[: len(content) - 30])  # never whole: an audit of a sound model takes its time
    return ["audit", path, "--tier", "smoke", "--size", 16, "--out", here / "audit"], ["odd", "onnx"]


def weights(world: Path, here: Path, draw: random.Random) -> Case:
    path = here / draw.choice(["odd.pth", "odd.safetensors"])
    path.write_bytes(malformed.damaged((world / "net.pth").read_bytes(), draw))
    words = ["train", world / "tiny.yaml", "--runs", here / "runs"]
    return [*words, "--set", f"hasher.image={{name: resnet18, weights: {path}}}"], ["odd", "weights"]


def number(world: Path, here: Path, draw: random.Random) -> Case:
    """An odd number for an option of any verb; what the verb works on is there and small."""
    group: Any = typer.main.get_command(cli.app)
    verbs = {"attack": [world / "run", "{name: hag, steps: 2}", "--out", here / "x.npz"],
             "search": [world / "index", world / "images" / "0.png"], "check": [world / "run", "--queries", 2],
             "poison": [world / "run", "--threat", "db-insert"], "compare": [world / "run", world / "run"],
             "questions": [world / "run", "--budgets", 3, "--queries", 2], "table": [world / "run"],
             "score": [world / "good.npz", world / "good.npz"], "transfer": [world / "run", world / "run"],
             "audit": ["none.pt"], "curves": [world / "run"], "cost": [world / "run"], "assess": [world / "run"],
             "attribute": [world / "run"], "sweep": [here / "none.yaml", "--over", "a=1"]}  # fmt: skip
    verb = draw.choice([name for name in verbs if name in group.commands])
    options = [o for o in group.commands[verb].params if o.param_type_name == "option" and not o.is_flag]
    option = draw.choice(options)
    value = draw.choice(["-1", "0", "1.5", "1e3", "nan", "inf", "abc", "", "-", "1/0", "[", "9" * 30, "0x1"])
    return [verb, *verbs[verb], f"{option.opts[0]}={value}"], [
        value,
        option.opts[0].strip("-"),
        "none",
        "tiny",
        "run",
    ]


DOORS: tuple[Callable[[Path, Path, random.Random], Case], ...] = (
    *(recipe, override, attack, budget, run_file, codes, bundle, entry, image, where, manifest, model_file),
    *(weights, number, copy_entry),
)


# ---------------------------------------------------------------------------------------------- tests


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(metafunc.config.getoption("--fuzz")))


def test_a_malformed_input_is_answered_by_a_line(seed, world, tmp_path, monkeypatch, capsys):
    draw, door = random.Random(seed), DOORS[seed % len(DOORS)]
    words, named = door(world, tmp_path, draw)
    words = [str(word).encode("utf-8", "surrogatepass").decode("utf-8", "replace") for word in words]
    line = f"{door.__name__}: robusthash {' '.join(words)[:400]!r}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["robusthash", *words])
    code = _within_limits(line)
    out, err = capsys.readouterr()
    if "Traceback" in out + err or code not in (0, 1, 2):
        pytest.fail(f"{line}\n{err[-1500:]}")
    if code == 1:
        said = re.sub(r"\s+", " ", err)
        assert "error:" in said, f"{line}\n{err[-500:]}"
        close = [name for name in named if name and re.sub(r"\s+", " ", name) in said]
        assert close, f"{line}\nnames neither of {[name[:40] for name in named]}:\n{err[-500:]}"


def _within_limits(line: str) -> int:
    def late(signum: int, frame: FrameType | None) -> None:
        raise Hang(line)

    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        cli.main()
        code = 0
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert peak < MEMORY, f"{peak >> 20} MiB after {line}"
    return code


def _names(value: Any) -> list[str]:
    return [str(part) for path in malformed.places(value) for part in path]
