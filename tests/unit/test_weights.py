"""Weight files as people have them: every form fills the same net, and every bad file is one clear line."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from robusthash.core.registry import build
from robusthash.models.gfnet import gfnet
from robusthash.models.pretrained_weights import HOLDERS, conversion, load_weights, read_tensors

State = dict[str, Tensor]


class Net(nn.Module):
    """Two layers with a BatchNorm, as an encoder without its classifier."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(nn.Linear(width, 2))


@pytest.fixture
def state() -> State:
    torch.manual_seed(3)
    net = Net()
    with torch.no_grad():
        for value in net.state_dict().values():
            value.copy_(torch.randn(value.shape).abs() * 9 + 1)
    return net.state_dict()


def head(classes: int = 7) -> State:
    return {"fc.weight": torch.zeros(classes, 2), "fc.bias": torch.zeros(classes)}


def under(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def loaded(path: Path, **options: Any) -> State:
    torch.manual_seed(0)
    net = Net()
    load_weights(net, str(path), "net", **options)
    return net.state_dict()


def same(found: State, expected: State) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


@pytest.mark.parametrize("holder", [None, *HOLDERS])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_is_found_bare_or_under_its_key(
    tmp_path: Path, state: State, holder: str | None, zipped: bool
) -> None:
    path = tmp_path / "w.pth"
    held: dict[str, Any] = {
        "epoch": 3,
        "best": torch.tensor(0.7),  # a tensor beside the state dict is not the state dict
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
        "args": argparse.Namespace(lr=0.1, arch="net"),
    }
    what = OrderedDict(state) if holder is None else {**held, holder: OrderedDict(state)}
    torch.save(what, path, _use_new_zipfile_serialization=zipped)
    assert same(loaded(path), state)


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "backbone.",
        "encoder.",
        "model.",
        "module.model.",
        "_orig_mod.module.",
        "encoders.image.trunk.",
    ],
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_whatever_stands_before_the_names_is_found(
    tmp_path: Path, state: State, prefix: str, suffix: str
) -> None:
    path = tmp_path / f"w.{suffix}"
    written = {**under(prefix, state), "normalise.mean": torch.zeros(3)}
    if suffix == "pth":
        torch.save({"state_dict": written}, path)
    else:
        safetensors.torch.save_file(written, path)
    assert same(loaded(path), state)


def test_dataparallel_inside_a_net(tmp_path: Path, state: State) -> None:
    """The ImageNet example of PyTorch wraps AlexNet's features alone: features.module.0.weight."""
    torch.save(
        {name.replace("layer1.", "layer1.module."): value for name, value in state.items()},
        tmp_path / "w.pth",
    )
    assert same(loaded(tmp_path / "w.pth"), state)


def test_half_precision_is_read_into_the_nets_own(tmp_path: Path, state: State) -> None:
    torch.save(
        {name: value.half() if value.is_floating_point() else value for name, value in state.items()},
        tmp_path / "w",
    )
    found = loaded(tmp_path / "w")
    assert found["conv1.weight"].dtype == torch.float32
    assert torch.equal(found["conv1.weight"], state["conv1.weight"].half().float())


def test_old_files_lack_the_counts_of_batchnorm(tmp_path: Path, state: State) -> None:
    torch.save(
        {name: value for name, value in state.items() if not name.endswith("tracked")}, tmp_path / "w.pth"
    )
    assert same(loaded(tmp_path / "w.pth"), {**state, "bn1.num_batches_tracked": torch.tensor(0)})


def test_what_the_net_has_no_place_for_is_left_out_and_named(
    tmp_path: Path, state: State, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(under("module.", {**state, **head(classes=7)}), tmp_path / "w.pth")
    with caplog.at_level(logging.WARNING):
        assert load_weights(Net(), str(tmp_path / "w.pth"), "net") == ("module.fc.weight", "module.fc.bias")
    assert "9 of 11 tensors taken; left out: module.fc.weight (7 x 2) and module.fc.bias (7)" in caplog.text


def test_nothing_left_out_says_nothing(
    tmp_path: Path, state: State, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(state, tmp_path / "w.pth")
    assert load_weights(Net(), str(tmp_path / "w.pth"), "net") == ()
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("name", "classes"), [("alexnet", 10), ("alexnet", 1000), ("resnet18", 10), ("resnet18", 1000)]
)
def test_a_classifier_of_any_size_is_left_out(tmp_path: Path, name: str, classes: int) -> None:
    with torch.device("meta"):
        shapes = getattr(torchvision.models, name)(weights=None, num_classes=classes).state_dict()
    torch.manual_seed(1)
    # a large layer is one value repeated, which takes no room in the file
    state = {
        k: torch.rand(v.shape if v.numel() < 1 << 20 else 1).expand(v.shape).to(v.dtype)
        for k, v in shapes.items()
    }
    torch.save({"state_dict": under("module.", state), "arch": name}, tmp_path / "w.pth")
    trunk = build("image-encoder", {"name": name, "weights": str(tmp_path / "w.pth")}).trunk.state_dict()
    lost = {"fc.weight", "fc.bias"} if name == "resnet18" else {"classifier.6.weight", "classifier.6.bias"}
    assert set(state) - set(trunk) == lost
    assert all(torch.equal(trunk[key], state[key]) for key in trunk)


def test_the_authors_release_of_gfnet_ti(tmp_path: Path) -> None:
    """Names and shapes of the published file, written out by hand, with its ``args``; the default size takes
    it."""
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, 196, 256),
        "patch_embed.proj.weight": (256, 3, 16, 16),
        "patch_embed.proj.bias": (256,),
        "norm.weight": (256,),
        "norm.bias": (256,),
        "head.weight": (1000, 256),
        "head.bias": (1000,),
    }
    for block in range(12):
        for name, shape in {
            "norm1.weight": (256,),
            "norm1.bias": (256,),
            "filter.complex_weight": (14, 8, 256, 2),
            "norm2.weight": (256,),
            "norm2.bias": (256,),
            "mlp.fc1.weight": (1024, 256),
            "mlp.fc1.bias": (1024,),
            "mlp.fc2.weight": (256, 1024),
            "mlp.fc2.bias": (256,),
        }.items():
            shapes[f"blocks.{block}.{name}"] = shape
    drawn = torch.Generator().manual_seed(4)
    state = {name: torch.randn(shape, generator=drawn) for name, shape in shapes.items()}
    assert sum(value.numel() for name, value in state.items() if not name.startswith("head.")) == 7_254_784
    args = argparse.Namespace(arch="gfnet-ti", input_size=224, lr=5e-4)
    held = {"model": state, "epoch": 299, "scaler": {"scale": 65536.0}, "args": args}
    torch.save(held, tmp_path / "gfnet-ti.pth")
    trunk = gfnet(weights=str(tmp_path / "gfnet-ti.pth")).trunk.state_dict()
    assert same(trunk, {name: value for name, value in state.items() if not name.startswith("head.")})
    with pytest.raises(
        ValueError, match=r"196 x 256, not 1 x 49 x 256\).* not 7 x 4 x 256 x 2\).*size, patch"
    ) as caught:
        gfnet(size=112, weights=str(tmp_path / "gfnet-ti.pth"))
    assert "\n" not in str(caught.value)


class Foreign:
    """A class that no file of weights may bring to life."""


class Runs:
    """What a hostile pickle does when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def _truncated(path: Path, state: State) -> None:
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _truncated_old(path: Path, state: State) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _scripted(path: Path, state: State) -> None:
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(path))


def _arrays(path: Path, state: State) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.zeros(2))


BAD: dict[str, tuple[Callable[[Path, State], Any], str]] = {
    "empty": (lambda p, s: p.write_bytes(b""), "are an empty file"),
    "truncated": (_truncated, "damaged or no file of weights; fetch it again"),
    "truncated, old form": (_truncated_old, "damaged or no file of weights; fetch it again"),
    "a photograph": (lambda p, s: p.write_bytes(b"\xff\xd8\xff\xe0" + bytes(99)), "no file of weights"),
    "a web page": (lambda p, s: p.write_text("<!DOCTYPE html><p>Sign in"), "it is a web page"),
    "a pointer": (lambda p, s: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "arrays": (_arrays, "no file of weights"),
    "a plain pickle": (lambda p, s: p.write_bytes(pickle.dumps({"a": 1}, protocol=2)), "no file of weights"),
    "a program": (_scripted, r"TorchScript program; save its tensors: torch.save\(torch.jit.load\('w.pth'\)"),
    "a foreign class": (
        lambda p, s: torch.save({"state_dict": s, "config": Foreign()}, p),
        r"hold Python objects \([a-z.]*test_weights.Foreign\).*convert it once.*'w-weights.pth'",
    ),
    "a foreign class, old form": (
        lambda p, s: torch.save(
            {"state_dict": s, "config": Foreign()}, p, _use_new_zipfile_serialization=False
        ),
        "hold Python objects",
    ),
    "a whole model": (
        lambda p, s: torch.save(nn.Linear(2, 2), p),
        r"Python objects \(torch.nn.modules.linear.Linear\)",
    ),
    "hostile": (
        lambda p, s: torch.save({"state_dict": s, "x": Runs(p.parent / "ran")}, p),
        "would run posix.mkdir",
    ),
    "a tensor": (lambda p, s: torch.save(torch.zeros(3), p), "hold no state dict but a Tensor"),
    "a list": (lambda p, s: torch.save([1, 2], p), "hold no state dict but a list"),
    "no tensors": (
        lambda p, s: torch.save({"epoch": 1, "lr": 0.1}, p),
        "hold no state dict but keys epoch and lr; save",
    ),
    "another key": (
        lambda p, s: torch.save({"student": s, "epoch": 1}, p),
        "keys student and epoch.*under state_dict, ",
    ),
    "another net": (
        lambda p, s: torch.save({"a.weight": torch.zeros(2), "b.weight": torch.zeros(2)}, p),
        r"\(2 tensors\) are not of net: 8 missing: conv1.weight, conv1.bias, bn1.weight and 5 more; give weights of",
    ),
    "another width": (
        lambda p, s: torch.save({"model": Net(8).state_dict()}, p),
        r"\(9 tensors\) are not of net: 7 of another shape: conv1.weight \(8 x 3 x 3 x 3, not 4 x 3 x 3 x 3\).*4 more",
    ),
    "a deeper net": (
        lambda p, s: torch.save({**s, "layer1.1.weight": torch.zeros(2, 2)}, p),
        "are not of net: 1 too many: layer1.1.weight; ",
    ),
    "quantised": (
        lambda p, s: torch.save({k: v.to(torch.int8) if k == "conv1.weight" else v for k, v in s.items()}, p),
        r"conv1.weight \(4 x 3 x 3 x 3 of int8, not 4 x 3 x 3 x 3\)",
    ),
    "not finite": (
        lambda p, s: torch.save({**s, "conv1.bias": torch.tensor([1.0, float("nan"), 0, 0])}, p),
        "NaN or infinite values, in conv1.bias; fetch",
    ),
    "two nets": (
        lambda p, s: torch.save(
            {**under("student.", s), **under("teacher.", {k: v + 1 for k, v in s.items()})}, p
        ),
        "hold net more than once, with other values, under 'student.' and 'teacher.'; save the one",
    ),
}


@pytest.mark.parametrize("form", BAD)
def test_a_bad_file_is_one_line_with_its_remedy(tmp_path: Path, state: State, form: str) -> None:
    write, message = BAD[form]
    path = tmp_path / "w.pth"
    write(path, state)
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(net, str(path), "net")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "Namespace" not in str(torch.serialization.get_safe_globals())
    assert not (tmp_path / "ran").exists()
    assert same(net.state_dict(), before)


def test_the_hostile_pickle_would_have_run(tmp_path: Path) -> None:
    """That nothing ran above says something only because opening the file in full does run it."""
    torch.save({"x": Runs(tmp_path / "ran")}, tmp_path / "w.pth")
    torch.load(tmp_path / "w.pth", weights_only=False)
    assert (tmp_path / "ran").is_dir()


def test_equal_copies_of_a_net_are_no_doubt(tmp_path: Path, state: State) -> None:
    """Adversarially trained ImageNet models hold the net twice: module.model and module.attacker.model."""
    written = {**under("module.attacker.model.", state), **under("module.model.", state)}
    torch.save({"model": written}, tmp_path / "w.pth")
    assert same(loaded(tmp_path / "w.pth"), state)


def test_damaged_safetensors(tmp_path: Path, state: State) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(state, path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"damaged or no safetensors file .*fetch it again") as caught:
        loaded(path)
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match="does not exist; give a file, or null"):
            read_tensors(path)


@pytest.mark.parametrize("what", ["dict", "module"])
def test_the_printed_conversion_works(
    tmp_path: Path, state: State, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"theirs_{what}"
    (tmp_path / f"{name}.py").write_text(
        "import torch\nclass Net(torch.nn.Linear): pass\nclass Config: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    theirs = importlib.import_module(name)
    net = theirs.Net(2, 2)
    torch.save(
        {"model": net.state_dict(), "config": theirs.Config()} if what == "dict" else net, tmp_path / "w.pth"
    )
    with pytest.raises(ValueError, match=rf"Python objects \({name}.*where {name} can be imported"):
        read_tensors(tmp_path / "w.pth")
    command = conversion(tmp_path / "w.pth").replace("python ", f"{sys.executable} ", 1)
    subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, shell=True, check=True
    )
    assert same(read_tensors(tmp_path / "w-weights.pth"), net.state_dict())
