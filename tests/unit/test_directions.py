"""Other label systems of the same items, and evaluation in every direction through the public path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from robusthash.apps.experiment.config import ConfigError, make_config
from robusthash.apps.experiment.evaluation_stages import evaluate
from robusthash.apps.experiment.training_stages import train
from robusthash.data import RetrievalData
from robusthash.data.base import ArraySource
from robusthash.data.splits import Indices, assemble, hash_pixels

RAW = {
    "name": "both",
    "data": {"name": "synthetic", "train": 48, "query": 12, "database": 48},
    "hasher": {
        "bits": 8,
        "image": {"name": "small", "width": 4, "grid": 1},
        "text": {"name": "mlp", "widths": [16]},
    },
    "training": {"objective": "dpsh", "epochs": 2, "batch_size": 16},
    "evaluation": {
        "directions": ["I2T", "I2I", "T2I"],
        "attacks": [{"name": "mainstay", "steps": 2}, {"name": "mainstay", "steps": 2, "modality": "text"}],
    },
    "runtime": {"device": "cpu"},
}


def labelled() -> RetrievalData:
    pixels = torch.randint(
        0, 256, (9, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    tags, classes = torch.eye(3).repeat(3, 1), torch.eye(9)[:, :2]
    indices = Indices(torch.arange(3), torch.arange(3, 6), torch.arange(6, 9))
    source = ArraySource({"image": pixels})
    return assemble("two", source, tags, hash_pixels(pixels), indices, "abc", also={"class": classes})


def test_another_label_system() -> None:
    data = labelled()
    assert data.label_systems == ("class",)
    by = data.by("class")
    assert torch.equal(by.query.labels, torch.eye(9)[3:6, :2])
    assert torch.equal(by.query.rows, data.query.rows)
    assert by.fingerprint() != data.fingerprint()
    assert "class" in by.note
    assert torch.equal(data.query.take(torch.tensor([1])).also["class"], torch.eye(9)[4:5, :2])
    with pytest.raises(ValueError, match=r"no labels 'colour' besides its own; it has \['class'\]"):
        data.by("colour")


def test_directions_end_to_end(tmp_path: Path) -> None:
    """Each direction is scored under the attacks that change its query modality, and under no other."""
    run = train(make_config(RAW), tmp_path)
    results = evaluate(run)
    assert list(results) == [
        *("I2T clean", "I2T mainstay", "I2T worst"),
        *("I2I clean", "I2I mainstay", "I2I worst"),
        *("T2I clean", "T2I mainstay on text", "T2I worst"),
    ]
    assert results["I2T mainstay"].setting.direction == "I2T"
    assert results["T2I mainstay on text"].setting.threat == "txt-linf-0.05"
    assert results["I2T clean"].values["MAP"] != results["I2I clean"].values["MAP"]
    written = json.loads((run.path / "metrics.json").read_text())
    assert [result["name"] for result in written["results"]] == list(results)
    again = evaluate(run)
    assert again["T2I worst"].values == results["T2I worst"].values
    assert len(list((run.path / "attacks").iterdir())) == 3  # one folder for each direction and attack


def test_what_a_recipe_needs_is_said() -> None:
    with pytest.raises(ConfigError, match="recipe 'adversarial' needs 'attack'"):
        make_config({**RAW, "training": {"recipe": "adversarial", "outer": "saat"}})
    with pytest.raises(ConfigError, match="recipe 'hashing' takes no 'outer'"):
        make_config({**RAW, "training": {"outer": "saat"}})
    with pytest.raises(ConfigError, match="recipe"):
        make_config({**RAW, "training": {"recipe": "hashin"}})
    with pytest.raises(ConfigError, match="takes no 'warmpu'"):
        make_config({**RAW, "training": {"recipe": {"name": "adversarial", "warmpu": 0.1}}})


def test_a_text_hasher_needs_texts(tmp_path: Path) -> None:
    bare = {**RAW, "data": {**RAW["data"], "texts": False}}
    with pytest.raises(ValueError, match="needs data with texts"):
        train(make_config(bare), tmp_path)


def test_a_checkpoint_of_other_modalities_is_refused(tmp_path: Path) -> None:
    parent = train(make_config(RAW), tmp_path)
    child = {**RAW, "name": "child", "hasher": {"bits": 8, "image": RAW["hasher"]["image"]}}
    child["training"] = {**RAW["training"], "init_from": str(parent.path)}
    with pytest.raises(ConfigError, match=r"has \['image'\], but .* encodes \['image', 'text'\]"):
        train(make_config(child), tmp_path)


def test_another_net_than_the_one_that_training_goes_on_from_is_refused(tmp_path: Path) -> None:
    parent = train(make_config(RAW), tmp_path)
    child = {**RAW, "name": "child", "hasher": {**RAW["hasher"], "image": {"name": "small", "width": 6}}}
    child["training"] = {**RAW["training"], "init_from": str(parent.path)}
    with pytest.raises(ConfigError, match=r"hasher.image is .*'width': 6.* was trained with"):
        train(make_config(child), tmp_path)
    del child["hasher"]["image"]
    assert train(make_config(child), tmp_path).trained, "what is not asked for is the parent's"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"directions": ["I2I", "I2T"]}, r"directions holds I2T, and .* does not encode 'text'"),
        ({"oblivious": ["mainstay"]}, r"evaluation.oblivious overlooks a purifier, and .* has none"),
    ],
)
def test_an_impossible_evaluation_is_refused_before_any_attack(
    asked: dict, said: str, tmp_path: Path
) -> None:
    hasher = {"bits": 8, "image": RAW["hasher"]["image"]}
    run = train(
        make_config({**RAW, "hasher": hasher, "evaluation": {"attacks": ["mainstay"], **asked}}), tmp_path
    )
    with pytest.raises(ValueError, match=said):
        evaluate(run)
    assert not (run.path / "attacks").exists()


def test_a_relevance_that_the_data_lack_is_refused_before_the_training(tmp_path: Path) -> None:
    hasher = {"bits": 8, "image": RAW["hasher"]["image"]}
    asked = {**RAW, "hasher": hasher, "evaluation": {"relevance": ["own", "class"]}}
    with pytest.raises(ConfigError, match=r"evaluation.relevance holds 'class', and synthetic has \['own'\]"):
        train(make_config(asked), tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
