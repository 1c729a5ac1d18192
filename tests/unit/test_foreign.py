"""Foreign models: what is accepted, what is found out about it, and every way in which one may be broken."""

from __future__ import annotations

import itertools
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from robusthash.core.hamming import sign
from robusthash.core.runtime import Draws
from robusthash.data.transforms import jpeg
from robusthash.models.external.loaders import NAMES, load_python, load_torchscript, perceptual
from robusthash.models.external.onnx_file import load_onnx
from robusthash.models.external.onnx_operators import OPERATORS
from robusthash.models.external.wrapper import Broken, foreign, normalisation_warning
from robusthash.models.image_encoders import IMAGENET

SIZE, BITS = 24, 16


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    small = Draws(1).uniform(torch.arange(12), (3, 6, 6))
    return torch.nn.functional.interpolate(small, SIZE, mode="bilinear")


class Linear(nn.Module):
    """A tiny hasher that normalises nothing."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3 * SIZE * SIZE, BITS, generator=generator))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images.flatten(1) - 0.5) @ self.weight


def codes(made, images):
    return sign(made.hasher({"image": images})["image"].logits)


FORMS = {
    "numbers": lambda u: u,
    "probabilities": torch.sigmoid,
    "zero-one": lambda u: (u >= 0).to(torch.int64),
    "plus-minus": lambda u: torch.where(u >= 0, 1.0, -1.0),
    "bytes": lambda u: np.packbits((u >= 0).numpy(), axis=1),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_answer_gives_the_same_code(form, images):
    model = Linear()
    made = foreign(lambda x: FORMS[form](model(x)), images, "toy")
    assert made.form == form
    assert made.hasher.bits == BITS
    assert torch.equal(codes(made, images), sign(model(images)))
    assert made.gradients == (form in ("numbers", "probabilities"))


def test_a_bool_array_is_a_code_and_a_function_without_weights_lives_on_the_cpu(images):
    made = foreign(lambda x: (x.flatten(1)[:, :9] > 0.5).numpy(), images, "toy")
    assert (made.form, made.hasher.bits, made.gradients) == ("zero-one", 9, False)
    assert made.hasher.device == torch.device("cpu")
    assert any("no gradients" in sentence for sentence in made.remarks)


def test_a_module_in_training_mode_is_put_right(images):
    model = nn.Sequential(
        nn.Flatten(), nn.BatchNorm1d(3 * SIZE * SIZE), nn.Dropout(0.5), nn.Linear(3 * SIZE * SIZE, 8)
    )
    made = foreign(model.train(), images, "toy")
    assert made.gradients
    assert not model.training


def broken_nan(x):
    return Linear()(x) / torch.zeros(())


def broken_width():
    widths = itertools.count(8)
    return lambda x: Linear()(x)[:, : next(widths)]


def broken_codes():
    numbers = torch.Generator().manual_seed(0)
    return lambda x: torch.randn(len(x), BITS, generator=numbers)


def broken_alone(x):
    return Linear()(x).squeeze()


def broken_batch_norm():
    norm = nn.BatchNorm1d(3 * SIZE * SIZE).train()
    return lambda x: norm(x.flatten(1))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (broken_nan, "NaN or infinite"),
        (broken_width(), "8 and then 9 bits"),
        (broken_codes(), "changes its codes"),
        (broken_alone, "batch of one; is it squeezed"),
        (broken_batch_norm(), "fails on 1 x 3 x 24 x 24 .* BatchNorm"),
        (lambda x: (Linear()(x) * 10).long(), "whole numbers"),
        (lambda x: Linear()(x)[None], r"\(1, 12, 16\) to 12 images"),
        (lambda x: Linear()(x)[:-1], r"\(11, 16\) to 12 images"),
        (lambda x: {"codes": Linear()(x), "n": 1}, r"2 outputs: codes \(12, 16\), n \(\); .*--output-name"),
        (lambda x: "codes", "answered a str"),
        (lambda x: x.no_such_thing(), "AttributeError"),
    ],
)
def test_a_broken_model_is_refused_with_the_reason(call, said, images):
    with pytest.raises(Broken, match=said):
        foreign(call, images, "toy")


def test_the_wrong_number_of_bits(images):
    with pytest.raises(Broken, match="answers 16 bits, and --bits says 32"):
        foreign(Linear(), images, "toy", bits=32)


def test_a_model_that_turns_bad_later_is_noticed(images):
    model, answers = Linear(), {"bad": False}
    made = foreign(lambda x: model(x)[:, : 12 if answers["bad"] else 16], images, "toy")
    answers["bad"] = True
    with pytest.raises(Broken, match="12 bits, and 16 before"):
        made.hasher({"image": images})


class Fragile(nn.Module):
    """Finds copies where its input has the scale of one normalisation; a second one scrambles it."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3 * SIZE * SIZE, 64, generator=generator))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            images = (images - torch.tensor(IMAGENET[0]).view(1, 3, 1, 1)) / 0.225
        return torch.sin(12 * images.flatten(1)) @ self.weight


def test_normalised_twice(images):
    changed = jpeg(images, 95)
    once, twice = (foreign(Fragile(times), images, "toy").hasher for times in (1, 2))
    assert "normalised twice" in normalisation_warning(twice, images, changed)
    assert normalisation_warning(once, images, changed) == ""
    assert normalisation_warning(twice, images[:4], changed[:4]) == ""  # too few to say


# ---------------------------------------------------------------------------------------------- where they
# come from


@pytest.fixture
def module(monkeypatch):
    made = types.ModuleType("my_models")
    made.linear = Linear()
    made.Linear = Linear
    made.build = lambda width=1: Linear()
    made.hashed = lambda images: Linear()(images)
    made.number = 3
    monkeypatch.setitem(sys.modules, "my_models", made)
    return made


@pytest.mark.parametrize("name", ["linear", "Linear", "build", "hashed"])
def test_python_paths(module, name, images):
    assert load_python(f"my_models:{name}")(images).shape == (12, BITS)


def test_python_paths_that_lead_nowhere(module):
    with pytest.raises(ValueError, match="did you mean 'linear'"):
        load_python("my_models:linaer")
    with pytest.raises(ImportError, match="no Python module 'no_such'"):
        load_python("no_such:model")
    with pytest.raises(ValueError, match="int, which cannot be called"):
        load_python("my_models:number")


def test_torchscript_is_differentiable_and_pickles_are_not_opened(tmp_path, images):
    model = Linear().eval()
    torch.jit.trace(model, images).save(str(tmp_path / "model.pt"))
    made = foreign(load_torchscript(tmp_path / "model.pt"), images, "model.pt")
    assert made.gradients
    assert torch.equal(codes(made, images), sign(model(images)))
    torch.save(model, tmp_path / "pickled.pt")
    with pytest.raises(ValueError, match="no TorchScript file"):
        load_torchscript(tmp_path / "pickled.pt")
    with pytest.raises(FileNotFoundError, match="no model file"):
        load_torchscript(tmp_path / "gone.pt")


def _export(path, batch, second=False):
    """y = flatten(x - 0.5) @ W as an ONNX file; ``second``: flatten(x - 0.5) is an output too."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    weight = Linear().weight.detach().numpy()
    nodes = [
        helper.make_node("Sub", ["x", "half"], ["centred"]),
        helper.make_node("Flatten", ["centred"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "w"], ["y"]),
    ]
    widths = {"y": BITS, "flat": 3 * SIZE * SIZE}
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [batch, w]) for n, w in widths.items()]
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, SIZE, SIZE])],
        outputs if second else outputs[:1],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.array(0.5, np.float32), "half")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(made, str(path))


@pytest.mark.parametrize("batch", ["batch", 1])
def test_onnx_is_computed_by_torch_or_said_to_be_a_black_box(tmp_path, images, batch, monkeypatch):
    pytest.importorskip("onnxruntime")
    _export(tmp_path / "model.onnx", batch)
    model, said = load_onnx(tmp_path / "model.onnx", images)
    made = foreign(model, images, "model.onnx")
    assert made.gradients
    assert said == ""
    assert torch.equal(codes(made, images), sign(Linear()(images)))

    larger = torch.nn.functional.interpolate(images, 2 * SIZE)
    assert made.hasher({"image": larger})["image"].logits.shape == (12, BITS)  # resized inside

    monkeypatch.delitem(OPERATORS, "MatMul")
    model, said = load_onnx(tmp_path / "model.onnx", images)
    made = foreign(model, images, "model.onnx")
    assert "torch has no form here of its operators MatMul" in said
    assert not made.gradients
    assert torch.equal(codes(made, images), sign(Linear()(images)))

    monkeypatch.setitem(OPERATORS, "MatMul", lambda x, a: -(x[0] @ x[1]))  # an operator read wrongly
    model, said = load_onnx(tmp_path / "model.onnx", images)
    assert "in torch it agrees on 0.0% of the bits" in said
    assert not foreign(model, images, "model.onnx").gradients


def test_onnx_files_that_cannot_be_used(tmp_path, images):
    pytest.importorskip("onnxruntime")
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="cannot be opened as an ONNX model"):
        load_onnx(tmp_path / "model.onnx", images)
    _export(tmp_path / "two.onnx", "batch", second=True)
    with pytest.raises(ValueError, match=r"outputs y .* flat .* which is the code, with --output-name flat"):
        load_onnx(tmp_path / "two.onnx", images)
    with pytest.raises(ValueError, match="no output 'z'; it has y"):
        load_onnx(tmp_path / "two.onnx", images, "z")
    for name, width in (("y", BITS), ("flat", 3 * SIZE * SIZE)):
        model, _ = load_onnx(tmp_path / "two.onnx", images, name)
        assert model(images).shape == (12, width)
    _export(tmp_path / "four.onnx", 4)
    with pytest.raises(ValueError, match="fixed batch of 4"):
        load_onnx(tmp_path / "four.onnx", images)


@pytest.mark.parametrize("name", NAMES)
def test_perceptual_hashes_know_a_copy_again(name):
    pytest.importorskip("pdqhash" if name == "pdq" else "imagehash")
    small = Draws(1).uniform(torch.arange(4), (3, 5, 5))
    photographs = torch.nn.functional.interpolate(small, 96, mode="bicubic").clamp(0, 1)
    hashed = perceptual(name)
    made = foreign(hashed, photographs, name)
    assert made.hasher.bits == hashed.bits
    assert made.gradients  # those of the public arithmetic behind the bits
    own = (codes(made, photographs) != codes(made, jpeg(photographs, 80))).sum(1)
    others = (codes(made, photographs) != codes(made, photographs.roll(1, 0))).sum(1)
    assert (own * 2 < others).all()
    assert (others > hashed.radius).all()


def test_an_unknown_hash():
    with pytest.raises(KeyError, match="did you mean 'phash'"):
        perceptual("phas")
