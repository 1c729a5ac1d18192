"""Shallow hashing as a run: trained, loaded, attacked, the same as in Python, on the encoder of another run."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from robusthash.apps.experiment.config import load_config
from robusthash.apps.experiment.run_directory import load_run
from robusthash.apps.experiment.training_stages import train
from robusthash.core.registry import build
from robusthash.training.shallow_recipe import shallow_hasher

DATA = {"name": "synthetic", "train": 60, "query": 12, "database": 40, "size": 12}
PIXELS = {"name": "features", "inputs": 3 * 12 * 12}


def recipe_file(path, hasher, method="sdh", **training):
    recipe = {
        "data": DATA,
        "hasher": {"bits": 8, "head": "linear", **hasher},
        "training": {
            "recipe": {"name": "shallow", "method": method},
            "objective": "dpsh",
            "epochs": 1,
            **training,
        },
        "runtime": {"threads": 1, "device": "cpu"},
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_a_run_is_what_python_solves_and_can_be_attacked(call, tmp_path):
    head = {"name": "kernel", "anchors": 20}
    file = recipe_file(tmp_path / "pixels.yaml", {"image": PIXELS, "head": head})
    code, out, err = call("train", file, "--runs", tmp_path / "runs", "--json")
    assert code == 0, err
    (folder,) = (tmp_path / "runs" / "pixels").iterdir()
    run = load_run(folder).load_hasher()
    split = build("data", DATA).train
    images = split.batch(torch.arange(len(split))).inputs["image"]
    own = shallow_hasher("sdh", {"image": images.flatten(1)}, split.labels, bits=8, anchors=20)
    with torch.no_grad():
        torch.testing.assert_close(
            run({"image": images})["image"].logits, own({"image": images})["image"].logits
        )
    code, out, err = call("evaluate", folder, "--attack", "mainstay", "--eps", "0.1", "--json")
    assert code == 0, err
    assert "mainstay" in out
    again = train(load_config(file), tmp_path / "other")
    assert again.card()["digest"] == load_run(folder).card()["digest"]


def test_the_features_may_be_those_of_a_run(call, tmp_path):
    net = {"name": "small", "width": 4, "grid": 1}
    deep = {"data": DATA, "hasher": {"bits": 16, "image": net}, "training": {"epochs": 1}}
    (tmp_path / "deep.yaml").write_text(yaml.safe_dump({**deep, "runtime": {"threads": 1, "device": "cpu"}}))
    file = recipe_file(tmp_path / "on-deep.yaml", {"image": net}, "itq", init_from="deep.yaml")
    code, _, err = call("train", file, "--runs", tmp_path / "runs")
    assert code == 0, err
    (parent,) = (load_run(path) for path in (tmp_path / "runs" / "deep").iterdir())
    (run,) = (load_run(path) for path in (tmp_path / "runs" / "on-deep").iterdir())
    assert (parent.load_hasher().bits, run.load_hasher().bits) == (16, 8)
    left, right = (part.load_hasher().encoders.state_dict() for part in (parent, run))
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    ("hasher", "method", "said"),
    [
        ({"image": PIXELS}, "cvh", "hashes images and texts together"),
        ({"image": PIXELS}, "itk", "no shallow is called 'itk'; did you mean 'itq'?"),
        ({"image": PIXELS, "head": "tanh"}, "itq", "solves the heads 'linear' and 'kernel', not TanhHead"),
        ({"image": PIXELS, "head": {"name": "kernel", "anchors": 61}}, "sdh", "anchors to at most 60"),
        ({"image": {"name": "features", "inputs": 7}}, "itq", "set hasher.image.inputs"),
    ],
)
def test_what_does_not_fit_is_one_line(call, tmp_path, hasher, method, said):
    code, _, err = call(
        "train", recipe_file(tmp_path / "wrong.yaml", hasher, method), "--runs", tmp_path / "r"
    )
    assert code != 0
    assert said in err.replace("\n", " ")
    assert "Traceback" not in err


def test_the_methods_are_listed(call):
    code, out, _ = call("list", "shallow", "--json")
    assert code == 0
    listed = {entry["name"]: entry for entry in json.loads(out)}
    assert {"itq", "sdh", "cosdish", "lfh", "cvh", "cmfh", "scm", "seph", "dlfh"} <= set(listed)
    assert listed["dlfh"]["modality"] == "image+text"
    assert not listed["itq"]["supervised"]
