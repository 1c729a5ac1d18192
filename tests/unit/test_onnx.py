"""ONNX operators in torch against onnxruntime, one node each, and exports of whole nets with their gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from robusthash.models.external.onnx_file import OnnxGraph, load_onnx
from robusthash.models.external.onnx_operators import OPERATORS

onnx = pytest.importorskip("onnx", reason="needs the extra 'onnx' (pip install robusthash[onnx])")
runtime = pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")

NUMBERS = np.random.default_rng(0)
X = NUMBERS.normal(size=(2, 4, 6, 7)).astype(np.float32)
POSITIVE = np.abs(X) + 0.1
FLAT = X.reshape(2, -1)[:, :12]


def weights(*shape):
    return NUMBERS.normal(size=shape).astype(np.float32)


def whole(*values):
    return np.array(values, np.int64)


def case(kind, *inputs, opset=18, **attributes):
    """An operator on inputs; the first is the image, the others are constants, "" one that is left out."""
    label = f"{kind}-{opset}-{'-'.join(f'{n}={v}' for n, v in attributes.items())}"
    return pytest.param(kind, inputs, opset, attributes, id=label[:80])


PLAIN = [
    "Abs",
    "Ceil",
    "Cos",
    "Erf",
    "Exp",
    "Floor",
    "HardSwish",
    "Identity",
    "Mish",
    "Neg",
    "Relu",
    "Round",
    "Sigmoid",
    "Sign",
    "Sin",
    "Softplus",
    "Softsign",
    "Tanh",
    "GlobalAveragePool",
    "Selu",
    "GlobalMaxPool",
    "Elu",
    "HardSigmoid",
    "LeakyRelu",
    "Transpose",
    "Dropout",
]
CASES = [
    *(
        case(kind, X)
        for kind in PLAIN
    ),
    *(case(kind, POSITIVE) for kind in ("Log", "Reciprocal", "Sqrt")),
    *(case(kind, X, weights(6, 1)) for kind in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Mean", "Sum", "PRelu")),
    *(case(kind, X, X[:, :1]) for kind in ("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal")),
    case("Pow", POSITIVE, np.array(2.5, np.float32)),
    case("Mod", X, np.array(0.7, np.float32), fmod=1),
    case("Clip", X, np.array(-0.5, np.float32), np.array(0.4, np.float32)),
    case("Clip", X, "", np.array(0.4, np.float32)),
    case("Clip", X, opset=9, min=-0.5, max=0.4),
    case("MatMul", X, weights(7, 3)),
    case("Gemm", FLAT, weights(5, 12), weights(5), transB=1, alpha=0.5, beta=2.0),
    case("Gemm", FLAT, weights(2, 5), transA=1),
    case("Einsum", X, weights(4, 3), equation="bchw,cd->bdhw"),
    case("Conv", X, weights(5, 4, 3, 3), weights(5), kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2]),
    case("Conv", X, weights(4, 2, 3, 2), kernel_shape=[3, 2], group=2, pads=[0, 1, 2, 0], dilations=[2, 1]),
    case("Conv", X, weights(5, 4, 3, 3), auto_pad="SAME_UPPER", strides=[2, 2]),
    case("Conv", X, weights(5, 4, 3, 3), auto_pad="SAME_LOWER", strides=[2, 2]),
    case("Conv", X[:, :, 0], weights(5, 4, 3)),
    case("ConvTranspose", X, weights(4, 3, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]),
    case("MaxPool", X, kernel_shape=[3, 2], strides=[2, 1], pads=[1, 1, 0, 0]),
    case("MaxPool", X, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    case("AveragePool", X, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    case("AveragePool", X, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], count_include_pad=1),
    case("AveragePool", X, kernel_shape=[2, 2], pads=[0, 1, 1, 0]),
    case("BatchNormalization", X, weights(4), weights(4), weights(4), np.abs(weights(4)), epsilon=1e-3),
    case("InstanceNormalization", X, weights(4), weights(4)),
    case("LayerNormalization", X, weights(6, 7), weights(6, 7), axis=2),
    case("LayerNormalization", X, weights(7)),
    case("GroupNormalization", X, weights(2), weights(2), num_groups=2),
    case("GroupNormalization", X, weights(4), weights(4), num_groups=2, opset=21),
    case("LpNormalization", X, axis=1, p=2),
    case("LRN", X, size=3, alpha=0.1),
    *(case(kind, X, opset=opset, axis=1) for kind in ("Softmax", "LogSoftmax") for opset in (11, 13)),
    case("Gelu", X, opset=20),
    case("Gelu", X, opset=20, approximate="tanh"),
    *(
        case(f"Reduce{way}", X, whole(1, -1), keepdims=keep)
        for way in ("Mean", "Sum", "Max", "Min", "L1", "L2", "SumSquare", "LogSumExp")
        for keep in (0, 1)
    ),
    case("ReduceMean", X, opset=13, axes=[2, 3], keepdims=0),
    case("ReduceMean", X),
    case("ReduceSum", X, noop_with_empty_axes=1),
    *(case(kind, X, axis=1, keepdims=0) for kind in ("ArgMax", "ArgMin")),
    case("Reshape", X, whole(0, -1, 7)),
    case("Flatten", X, axis=2),
    case("Flatten", X, axis=-1),
    case("Transpose", X, perm=[0, 2, 3, 1]),
    case("Concat", X, weights(2, 3, 6, 7), axis=1),
    case("Slice", X, whole(1, -1), whole(4, -100), whole(1, 3), whole(2, -2)),
    case("Slice", X, opset=9, starts=[1], ends=[9999], axes=[2]),
    case("Gather", X, whole([0, -1], [2, 1]), axis=1),
    case("GatherElements", X, np.zeros((2, 4, 1, 7), np.int64) - 1, axis=2),
    case("Squeeze", X[:, :1], whole(1)),
    case("Squeeze", X[:, :1], opset=11, axes=[1]),
    case("Unsqueeze", X, whole(0, -1)),
    case("Unsqueeze", X, opset=11, axes=[1]),
    case("Expand", X[:, :1], whole(2, 4, 1, 7)),
    case("Tile", X, whole(1, 2, 1, 3)),
    case("Pad", X, whole(0, 0, 1, 2, 0, 0, 0, 1), np.array(0.5, np.float32)),
    case("Pad", X, whole(0, 0, 1, 2, 0, 0, 0, 1), mode="reflect"),
    case("Pad", X, whole(0, 0, 1, 2, 0, 0, 0, 1), mode="edge"),
    case("Pad", X, whole(1, 2), "", whole(-1)),
    case("Pad", X, opset=2, pads=[0, 0, 1, 2, 0, 0, 0, 1]),
    case("Resize", X, "", np.array([1, 1, 2, 2], np.float32), mode="nearest",
         coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
    *(
        case("Resize", X, "", "", whole(2, 4, 9, 5), mode=mode, cubic_coeff_a=-0.75,
             coordinate_transformation_mode=place)
        for mode in ("linear", "cubic") for place in ("half_pixel", "align_corners")
    ),
    *(case("DepthToSpace", X, blocksize=2, mode=mode) for mode in ("CRD", "DCR")),
    case("SpaceToDepth", X[:, :, :, :6], blocksize=2),
    case("CumSum", X, whole(2)[0]),
    case("Trilu", X, upper=0),
    case("Where", X > 0, X, -X),
    case("ScatterND", X, whole([0, 1], [1, 3]), weights(2, 6, 7)),
    case("Cast", X, to=7),
    case("Size", X),
    case("Shape", X, start=1),
]  # fmt: skip


def one_node(kind, inputs, opset, attributes):
    """A model of one node whose first input is the image, and the output's names."""
    names = ["x", *(f"c{number}" for number in range(1, len(inputs)))]
    given = {name: value for name, value in zip(names, inputs, strict=True) if not isinstance(value, str)}
    used = [name if name in given else "" for name in names]
    node = onnx.helper.make_node(kind, used, ["y"], **attributes)
    first = onnx.helper.make_tensor_value_info(
        "x", onnx.helper.np_dtype_to_tensor_dtype(inputs[0].dtype), None
    )
    constants = [onnx.numpy_helper.from_array(value, name) for name, value in given.items() if name != "x"]
    output = onnx.ValueInfoProto(name="y")
    graph = onnx.helper.make_graph([node], "one", [first], [output], constants)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)


@pytest.mark.parametrize(("kind", "inputs", "opset", "attributes"), CASES)
def test_an_operator_is_that_of_the_runtime(kind, inputs, opset, attributes):
    model = one_node(kind, inputs, opset, attributes)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {"x": inputs[0]})
    ours = OnnxGraph(model, "y")(torch.from_numpy(inputs[0]))
    assert tuple(ours.shape) == theirs.shape
    assert ours.is_floating_point() == (theirs.dtype == np.float32)
    torch.testing.assert_close(ours.float(), torch.as_tensor(theirs).float(), rtol=1e-4, atol=1e-5)


def test_every_operator_is_tried():
    elsewhere = {"And", "Or", "Not", "CastLike", "ConstantOfShape", "Range", "Split"}
    assert {case.values[0] for case in CASES} | elsewhere == set(OPERATORS)


class Small(torch.nn.Module):
    """A net with the operators of usual exports: a strided block, a shortcut, attention, a chunk, shapes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, 2, 1),
            torch.nn.BatchNorm2d(8),
            torch.nn.Hardswish(),
            torch.nn.MaxPool2d(2),
        )
        self.block = torch.nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.attend = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = torch.nn.LayerNorm(8)
        self.last = torch.nn.Linear(8, 16)

    def forward(self, images):
        maps = self.first((images - 0.45) / 0.22)
        maps = maps + torch.relu(self.block(maps))
        left, right = maps.chunk(2, 1)
        maps = torch.cat([right, torch.nn.functional.gelu(left)], 1)
        words = maps.flatten(2).transpose(1, 2)
        words = words + self.attend(words, words, words, need_weights=False)[0]
        mask = torch.ones(words.shape[1], dtype=words.dtype)
        return self.last(self.norm((words * mask[:, None]).mean(1)))


@pytest.mark.parametrize("way", ["14", "17", "torch's default"])
def test_gradients_of_an_export_are_those_of_the_net(tmp_path, way):
    net, path = Small().eval(), tmp_path / "net.onnx"
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    if way.isdigit():
        options = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}, "opset_version": int(way)}
        torch.onnx.export(net, (images,), str(path), dynamo=False, **options)
    else:
        pytest.importorskip("onnxscript", reason="torch.onnx.export needs it")
        torch.onnx.export(net, (images[:1],), str(path), dynamo=True, verbose=False)
    model, said = load_onnx(path, images)
    assert said == ""
    slopes = []
    for each in (model, net):
        leaf = images.clone().requires_grad_(True)
        answer = each(leaf)
        slopes.append(torch.autograd.grad(torch.tanh(answer).sum(), leaf)[0])
    assert slopes[1].abs().max() > 0
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-3, atol=1e-6)
    double = model.double()(images.double())  # what finite differences need
    assert double.dtype == torch.float64


def test_quantised_and_looping_graphs_are_named(tmp_path):
    images = torch.rand(4, 3, 8, 8)
    model = one_node("QuantizeLinear", (X[:, :3], np.array(0.1, np.float32), np.array(0, np.uint8)), 13, {})
    del model.graph.input[0].type.tensor_type.shape.dim[:]
    shape = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["b", 3, 8, 8])
    model.graph.input[0].CopyFrom(shape)
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("y", onnx.TensorProto.UINT8, None))
    onnx.save(model, str(tmp_path / "quantised.onnx"))
    _, said = load_onnx(tmp_path / "quantised.onnx", images)
    assert said == "torch has no form here of its operators QuantizeLinear"
