"""An ONNX file as a victim: its graph in torch, which attacks can follow, or a black box by onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from robusthash.models.external.model_answers import Call
from robusthash.models.external.onnx_operators import OPERATORS
from robusthash.models.external.onnx_shapes import Unsupported

_CLOSE = 1e-3  # of the largest number: by how much torch may differ from the runtime of the format
_AGREE = 0.99  # share of bits on which they must agree


class OnnxGraph(nn.Module):
    """The graph of an ONNX model, computed by torch, node by node; what is needed no more is let go.

    Args:
        model: an ``onnx.ModelProto``, whose weights become buffers.
        output: name of the output that a call returns.

    Raises:
        Unsupported: operators that have no form in torch here; the message names them.
    """

    def __init__(self, model: Any, output: str) -> None:
        super().__init__()
        from onnx import helper, inliner, numpy_helper

        model = inliner.inline_local_functions(model)
        graph, self.output = model.graph, output
        self.opset = next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), 1)
        kinds = {
            node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
            for node in graph.node
        }
        if missing := sorted(kinds - set(OPERATORS) - {"Constant"}):
            raise Unsupported(f"torch has no form here of its operators {', '.join(missing)}")
        self.weights: dict[str, str] = {}  # name in the graph -> name of the buffer
        self.steps: list[tuple[Any, list[str], list[str], dict[str, Any]]] = []
        for each in graph.initializer:
            self._keep(each.name, numpy_helper.to_array(each))
        for node in graph.node:
            attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
            attributes = {name: _plain(value, numpy_helper) for name, value in attributes.items()}
            if node.op_type == "Constant":
                self._keep(node.output[0], _constant(attributes))
                continue
            attributes |= {"opset": self.opset, "outputs": len(node.output)}
            self.steps.append((OPERATORS[node.op_type], list(node.input), list(node.output), attributes))
        initialised = {each.name for each in graph.initializer}
        self.input = next(each.name for each in graph.input if each.name not in initialised)
        self.last = {name: number for number, step in enumerate(self.steps) for name in step[1]}
        self.last[output] = len(self.steps)

    def _keep(self, name: str, values: Any) -> None:
        self.weights[name] = f"weight_{len(self.weights)}"
        values = values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
        self.register_buffer(self.weights[name], values)

    def forward(self, images: Tensor) -> Tensor:
        values: dict[str, Tensor] = {self.input: images}

        def read(name: str) -> Tensor | None:
            if not name:
                return None
            return getattr(self, self.weights[name]) if name in self.weights else values[name]

        for number, (operator, inputs, outputs, attributes) in enumerate(self.steps):
            result = operator([read(name) for name in inputs], attributes)
            results = [result] if isinstance(result, Tensor) else list(result)
            values.update(zip(outputs, results, strict=False))
            for name in {*inputs, *outputs}:
                if self.last.get(name, -1) <= number:
                    values.pop(name, None)
        answer = read(self.output)
        if answer is None:
            raise Unsupported(f"the output {self.output!r} is not computed")
        return answer


def _plain(value: Any, numpy_helper: Any) -> Any:
    """An attribute as Python and torch have it."""
    if isinstance(value, bytes):
        return value.decode()
    if hasattr(value, "data_type"):
        return torch.as_tensor(np.array(numpy_helper.to_array(value)))
    return value


def _constant(attributes: dict[str, Any]) -> Any:
    """The value of a Constant node, in one of its forms."""
    for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        if name in attributes:
            value = attributes[name]
            return value if isinstance(value, Tensor) else np.array(value, _KINDS[name.rstrip("s")])
    raise Unsupported("torch has no form here of its operators Constant of texts")


_KINDS = {"value_float": np.float32, "value_int": np.int64}


def load_onnx(path: Path, images: Tensor, output: str | None = None) -> tuple[Call, str]:
    """An ONNX file as a differentiable module where torch can compute its graph, and ""; else as a black box,
    and the reason.

    Images are resized to the input size that the file fixes. The graph in torch counts only if it agrees with
    ``onnxruntime`` on ``images``, (n, 3, H, W) in [0, 1].

    Args:
        output: name of the output that is the code, or the number of its place, where there are several.

    Raises:
        FileNotFoundError: no such file.
        ImportError: the extra ``onnx`` is not installed.
        ValueError: no ONNX file, one that does not take one batch of colour images, or one of several outputs
            of which none is chosen.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no model file {path}")
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"ONNX files need an extra: pip install 'robusthash[onnx]' ({error})") from error
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a family of errors of its own
        raise ValueError(f"{path} cannot be opened as an ONNX model: {error}") from error
    runtime = _Session(session, path, output)
    try:
        graph = OnnxGraph(onnx.load(str(path)), runtime.output).eval()
        converted = _Resized(graph, runtime.size, runtime.batch)
        with torch.no_grad():
            reason = _difference(converted(images), torch.from_numpy(np.array(runtime(images))))
    except Unsupported as error:
        reason = str(error)
    except Exception as error:  # a graph that the table reads wrongly fails in torch's words
        reason = f"its graph fails in torch ({type(error).__name__}: {str(error)[:160]})"
    return (runtime, reason) if reason else (converted, "")


def _difference(ours: Tensor, theirs: Tensor) -> str:
    """The reason why the graph in torch is not that of the runtime; "" where it is."""
    if ours.shape != theirs.shape:
        return f"in torch it answers the shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
    agree = float(((ours >= 0) == (theirs >= 0)).float().mean())
    apart = float((ours.float() - theirs.float()).abs().max() / theirs.abs().max().clamp_min(1e-12))
    if agree < _AGREE or not apart < _CLOSE:
        return f"in torch it agrees on {agree:.1%} of the bits, and its numbers differ by {apart:.2g}"
    return ""


class _Session:
    """An onnxruntime session as a callable; a fixed batch of one is run image by image."""

    def __init__(self, session: Any, path: Path, output: str | None) -> None:
        inputs = session.get_inputs()
        shapes = [list(each.shape) for each in inputs]
        if len(shapes) != 1 or len(shapes[0]) != 4 or (isinstance(shapes[0][1], int) and shapes[0][1] != 3):
            raise ValueError(f"{path} must take one input (B, 3, H, W), it takes {shapes}")
        if inputs[0].type != "tensor(float)":
            raise ValueError(f"{path} takes {inputs[0].type}; export it with float32 images as its input")
        batch, _, height, width = shapes[0]
        if isinstance(batch, int) and batch != 1:
            raise ValueError(f"{path} has a fixed batch of {batch}; export it with a free one, or 1")
        self.session, self.name = session, inputs[0].name
        self.output = _select(session.get_outputs(), output, path)
        self.batch: int | None = 1 if batch == 1 else None
        fixed = isinstance(height, int) and isinstance(width, int)
        self.size: tuple[int, int] | None = (height, width) if fixed else None

    def __call__(self, images: Tensor) -> np.ndarray:
        values = _resized(images, self.size).detach().cpu().numpy()
        parts = [values] if self.batch is None else np.split(values, len(values))
        return np.concatenate([self.session.run([self.output], {self.name: part})[0] for part in parts])


def _select(outputs: Any, output: str | None, path: Path) -> str:
    """The name of the output to audit.

    Raises:
        ValueError: several, and none is named, or none of this name.
    """
    names = [each.name for each in outputs]
    if output is None and len(names) == 1:
        return str(names[0])
    if output in names:
        return str(output)
    if output is not None and output.isdecimal() and int(output) < len(names):
        return str(names[int(output)])
    listed = ", ".join(f"{each.name} {list(each.shape)}" for each in outputs)
    if output is None:
        raise ValueError(
            f"{path} has the outputs {listed}; say which is the code, with --output-name {names[-1]}"
        )
    raise ValueError(f"{path} has no output {output!r}; it has {listed}")


class _Resized(nn.Module):
    """A graph in torch behind the same resizing and batching."""

    def __init__(self, inner: nn.Module, size: tuple[int, int] | None, batch: int | None) -> None:
        super().__init__()
        self.inner, self.size, self.batch = inner, size, batch

    def forward(self, images: Tensor) -> Tensor:
        values = _resized(images, self.size)
        parts = [values] if self.batch is None else list(values.split(self.batch))
        return torch.cat([self.inner(part) for part in parts])


def _resized(images: Tensor, size: tuple[int, int] | None) -> Tensor:
    if size is None or tuple(images.shape[-2:]) == size:
        return images
    options: dict[str, Any] = {"mode": "bilinear", "antialias": True, "align_corners": False}
    return functional.interpolate(images, size, **options).clamp(0, 1)
