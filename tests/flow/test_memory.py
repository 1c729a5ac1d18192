"""A model too large for the memory, through the command line: smaller batches that are said, or one line of
error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from robusthash.apps.experiment import training_stages
from robusthash.apps.experiment.config import make_config
from robusthash.metrics.results import load_results
from robusthash.models.hasher import Hasher

CONFIG = {
    "name": "tiny",
    "data": {"name": "synthetic", "train": 48, "query": 20, "database": 40},
    "hasher": {"bits": 8, "image": {"name": "small", "width": 4}},
    "training": {"objective": "csq", "epochs": 1, "batch_size": 32, "optim": {"hasher": {"lr": 0.05}}},
    "evaluation": {"attacks": [], "batch_size": 20},
    "runtime": {"device": "cpu"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return training_stages.train(make_config(CONFIG), tmp_path_factory.mktemp("runs")).path


@pytest.fixture
def hold(monkeypatch):
    """Let the device hold only so many images at a time."""
    usual = Hasher.forward

    def limit(fits: int, error: Exception | None = None) -> None:
        def forward(hasher, inputs):
            if len(inputs["image"]) > fits:
                raise error or torch.OutOfMemoryError(
                    "CUDA out of memory. Tried to allocate 2.00 GiB.\nSee docs."
                )
            return usual(hasher, inputs)

        monkeypatch.setattr(Hasher, "forward", forward)

    return limit


def test_smaller_batches_are_said_and_change_nothing(call, run, hold):
    def codes() -> dict[str, np.ndarray]:
        return {path.name: np.load(path)["codes"] for path in (run / "codes").glob("*.npz")}

    assert call("encode", run)[0] == 0
    expected = codes()
    assert call("assess", run, "--tier", "smoke")[0] == 0
    (whole,) = load_results(run / "assess.json")
    for path in (run / "assess").rglob("*.npz"):
        path.unlink()
    hold(16)
    code, _, err = call("encode", run)
    assert code == 0
    assert err.count("32 items at a time did not fit into memory; 16 were encoded at a time\n") == 3, (
        "for each split"
    )
    assert "SmallerBatch" not in err
    assert all(np.array_equal(packed, expected[name]) for name, packed in codes().items())
    code, _, err = call("assess", run, "--tier", "smoke")
    assert code == 0
    for said in (
        "16 were encoded at a time",
        "20 queries at a time did not fit into memory; 10 were attacked at a time",
    ):
        assert said in err
    (result,) = load_results(run / "assess.json")
    assert result.values == pytest.approx(whole.values)
    assert any("encoded at a time" in note for note in result.notes)


@pytest.mark.parametrize("verb", [["encode"], ["evaluate"], ["assess", "--tier", "smoke"], ["questions"]])
def test_what_never_fits_is_one_line_with_a_remedy(call, run, hold, verb):
    hold(0)
    code, _, err = call(verb[0], run, *verb[1:])
    assert code == 1
    assert "Traceback" not in err
    assert err.splitlines()[-1] == (
        "error: memory is not enough for items to be encoded one at a time; free some memory, take a smaller model "
        "or input, or compute elsewhere (runtime.device: cpu)"
    )


@pytest.mark.parametrize(
    "error",
    [
        None,
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory\nframe #0"),
    ],
)
def test_training_without_memory_is_one_line_too(call, tmp_path, hold, error):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(CONFIG))
    hold(0, error)
    code, _, err = call("train", tmp_path / "recipe.yaml", "--runs", tmp_path)
    assert code == 1
    (line,) = (line for line in err.splitlines() if line.startswith("error:"))
    assert line.startswith("error: memory is not enough (")
    assert "take smaller batches (training.batch_size, evaluation.batch_size)" in line
    assert "Traceback" not in err
    assert "frame" not in err


def test_other_errors_of_the_libraries_are_faults_of_the_program(call, run, hold):
    hold(0, RuntimeError("shapes cannot be multiplied"))
    code, _, err = call("encode", run)
    assert code == 3
    assert "unexpected RuntimeError: shapes cannot be multiplied" in err
