"""Models taken away: files of ONNX and TorchScript, folders for the hub, and what they refuse."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image
from service_parts import CONFIG
from typer.testing import CliRunner

import robusthash as rh
from robusthash.apps.cli import app
from robusthash.apps.experiment.config import make_config
from robusthash.apps.experiment.evaluation_stages import evaluate
from robusthash.apps.experiment.run_directory import Run, RunError
from robusthash.apps.experiment.training_stages import train
from robusthash.core.hamming import pack
from robusthash.core.registry import register
from robusthash.data.image_files import read_image
from robusthash.models.encoding import encode_signs
from robusthash.models.portable.model_files import facts_in
from robusthash.models.purifier import Purifier

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
pytest.importorskip("onnx", reason="needs the extra 'onnx'")

EVALUATED = {**CONFIG, "evaluation": {"queries": 4, "attacks": [{"name": "pgd", "steps": 2}]}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    done = train(make_config(EVALUATED), tmp_path_factory.mktemp("runs"))
    evaluate(done)
    return done


def images(count: int = 5, size: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def model_of(size: int = 32, **options: Any) -> rh.SearchModel:
    hasher = rh.build_hasher(bits=12, **options).eval()
    for module in hasher.modules():  # statistics of a batch norm that is not at its start
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
    return rh.SearchModel(hasher, size)


SMALL = {"name": "small", "width": 4}
FREQUENCY = {"name": "gfnet", "size": 32, "patch": 4, "dim": 8, "depth": 2}
MODELS: dict[str, dict[str, Any]] = {
    "small": {"image": SMALL},
    "small at 36 px, whose maps of 9 divide into no halves": {"image": SMALL, "size": 36},
    "linear head": {"image": SMALL, "head": "linear"},
    "kernel head": {"image": SMALL, "head": "kernel"},
    "meta-embedding": {"image": SMALL, "head": "meta-embedding"},
    "batchnorm head": {"image": SMALL, "head": "batchnorm"},
    "mlp head": {"image": SMALL, "head": "mlp"},
    "layered": {"image": {"name": "layered", "inner": SMALL, "widths": [8]}},
    "features": {"image": {"name": "vector", "inputs": 20}, "size": 0},
    "gate": {"image": SMALL, "purifiers": {"image": "spectral-gate"}},
    "low-pass gate": {"image": SMALL, "purifiers": {"image": {"name": "spectral-gate", "kind": "low-pass"}}},
    "drfgd at 33 px": {"image": SMALL, "purifiers": {"image": "drfgd-image"}, "size": 33},
    "gfnet": {"image": FREQUENCY},
    "sfcl": {"image": {"name": "sfcl", "spatial": SMALL, "frequency": FREQUENCY, "width": 16, "hidden": 8}},
}


@pytest.mark.parametrize("to", ["onnx", "torchscript"])
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_is_written(name: str, to: str, tmp_path: Path) -> None:
    model = model_of(**MODELS[name])
    path = tmp_path / f"m.{'onnx' if to == 'onnx' else 'pt'}"
    check = rh.export(model, path, to=to)["check"]
    assert check["images"] == 256
    assert check["bits"] == 256 * 12
    assert check["equal_bits"] >= 0.999 * check["bits"]
    facts = facts_in(path)
    assert facts is not None
    assert facts.check == check
    assert facts.bits == 12


@pytest.mark.slow
def test_a_published_net_is_written(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    model = model_of(image={"name": "efficientnet-lite0", "enlarge": 64})
    assert rh.export(model, tmp_path / "m.onnx")["check"]["equal_bits"] >= 0.999 * 256 * 12


@pytest.mark.parametrize("pixels", ["float32", "uint8"])
def test_an_onnx_file_gives_packed_codes_for_any_batch(run: Run, tmp_path: Path, pixels: str) -> None:
    path = tmp_path / "m.onnx"
    rh.export(run.path, path, pixels=pixels)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    meta = json.loads(session.get_modelmeta().custom_metadata_map["robusthash"])
    assert meta["digest"] == run.card()["digest"]
    assert meta["input"]["type"] == pixels
    assert meta["input"]["shape"] == ["batch", 3, 32, 32]
    hasher = run.load_hasher()
    for count in (1, 3, 17):
        whole = (images(count) * 255).round().to(torch.uint8)
        given = whole if pixels == "uint8" else whole.float() / 255
        codes, logits = session.run(["codes", "logits"], {"images": given.numpy()})
        assert codes.dtype == np.uint8
        assert np.array_equal(codes, pack(encode_signs(hasher, "image", whole.float() / 255)).numpy())
        assert logits.shape == (count, 16)


def test_images_prepared_as_the_docs_say_have_the_codes_of_the_package(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts_of_file, prepare = code_blocks("serving.md", "onnxruntime.InferenceSession", "ImageOps.fit")
    monkeypatch.chdir(tmp_path)
    rh.export(run.path, "mine.onnx")
    turned = Image.Exif()
    turned[0x0112] = 6
    for side, mode in ((40, "RGB"), (200, "RGB"), (200, "L")):
        pixels = np.random.default_rng(side).integers(0, 256, (side, side + 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save("query.jpg", exif=turned)
        names: dict[str, Any] = {"facts": facts_in(Path("mine.onnx")).__dict__}
        exec(prepare, names)
        exec(facts_of_file, names)
        assert np.array_equal(names["pixels"][0] * 255, read_image("query.jpg", 32).numpy())
        assert np.array_equal(names["codes"], rh.load(run.path).encode("query.jpg").packed.numpy())
        asked = names["facts"]["input"]
        assert (asked["fit"], asked["filter"]) == ("central square", "Pillow BICUBIC")


def code_blocks(page: str, *having: str) -> list[str]:
    """The first block of Python in a page of the documents with each text."""
    text = (Path(__file__).resolve().parents[2] / "docs" / page).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    return [next(block for block in blocks if each in block) for each in having]


def test_a_torchscript_file_gives_codes_and_logits(run: Run, tmp_path: Path) -> None:
    rh.export(run.path, tmp_path / "m.pt", to="torchscript")
    codes, logits = torch.jit.load(str(tmp_path / "m.pt"))(images(3))
    assert torch.equal(codes, pack(logits))
    assert torch.equal(codes, pack(encode_signs(run.load_hasher(), "image", images(3))))


def measured(target: str, folder: Path) -> dict[str, tuple[float, ...]]:
    audit = rh.audit(target, out=folder, tier="smoke", queries=6, attacked=2)
    assert audit["size"] == 32
    assert audit["gradients"]
    return {row["name"]: (row["first"], row["map"], row["bits"]) for row in audit["rows"]}


@pytest.fixture(scope="module")
def of_the_run(run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, ...]]:
    return measured(str(run.path), tmp_path_factory.mktemp("audit"))


@pytest.mark.parametrize(
    "options",
    [
        {"to": "onnx", "out": "m.onnx"},
        {"to": "torchscript", "out": "m.pt"},
        {"to": "torch", "out": "folder"},
    ],
    ids=["onnx", "torchscript", "torch"],
)
def test_an_exported_file_is_audited_with_the_numbers_of_its_run(
    run: Run, tmp_path: Path, options: dict[str, str], of_the_run: dict[str, tuple[float, ...]]
) -> None:
    target = str(tmp_path / options["out"])
    rh.export(run.path, target, to=options["to"])
    found = measured(target, tmp_path / "file")
    assert found.keys() == of_the_run.keys()
    for name, row in of_the_run.items():
        assert found[name] == pytest.approx(row, abs=1e-6), name


def test_a_linear_head_keeps_its_scale(tmp_path: Path) -> None:
    model = model_of(image=SMALL, head="linear")
    model.hasher.heads["image"].size.fill_(7.0)
    rh.export(model, tmp_path / "m.onnx")
    facts = facts_in(tmp_path / "m.onnx")
    assert facts is not None
    assert facts.scale == 7.0


def test_texts_are_exported_too(tmp_path: Path) -> None:
    data = rh.load_data("synthetic", train=24, query=8, database=16)
    hasher = rh.build_hasher(image=SMALL, text="mlp", vocabulary=data.vocabulary, bits=12).eval()
    model = rh.SearchModel.of(hasher, data)
    assert rh.export(model, tmp_path / "t.onnx", modality="text")["check"]["equal_codes"] == 256
    facts = facts_in(tmp_path / "t.onnx")
    assert facts is not None
    assert facts.texts == model.texts.plain()
    with pytest.raises(ValueError, match="hashes text, and an audit needs images"):
        rh.audit(str(tmp_path / "t.onnx"), out=tmp_path / "a", tier="smoke")
    model.save_pretrained(tmp_path / "both")
    again = rh.SearchModel.from_pretrained(tmp_path / "both", device="cpu")
    assert (
        again.encode(["a red disc"], modality="text").hex()
        == model.encode(["a red disc"], modality="text").hex()
    )


@register("purifier", "tests-random", modality="image")
class RandomNoise(Purifier):
    """Noise that is drawn anew for each call."""

    def forward(self, x: torch.Tensor, encode: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return x + torch.randn_like(x), {}


@register("purifier", "tests-sorted", modality="image")
class Unwritable(Purifier):
    """An operator that ONNX does not have."""

    def forward(self, x: torch.Tensor, encode: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return torch.special.bessel_j0(x), {}


def test_what_no_file_holds_is_refused(tmp_path: Path, run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    random = model_of(image=SMALL, purifiers={"image": "tests-random"})
    with pytest.raises(ValueError, match=r"draws its codes at random.*--to torch"):
        rh.export(random, tmp_path / "m.onnx")
    other = model_of(image=SMALL, purifiers={"image": "tests-sorted"})
    with pytest.raises(ValueError, match=r"cannot be written as onnx: .*bessel.*; --to torch"):
        rh.export(other, tmp_path / "m.onnx")
    assert capfd.readouterr().out == ""
    with pytest.raises(ValueError, match="encodes image, not text"):
        rh.export(run.path, tmp_path / "m.onnx", modality="text")
    with pytest.raises(ValueError, match=r"ends in \.onnx, got"):
        rh.export(run.path, tmp_path / "m.pt")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "m.onnx").write_text("mine")
    with pytest.raises(FileExistsError, match="there already"):
        rh.export(run.path, tmp_path / "m.onnx")
    rh.export(run.path, tmp_path / "m.onnx", overwrite=True, pixels="uint8")
    with pytest.raises(ValueError, match=r"takes uint8 pixels.*--pixels float32"):
        rh.audit(str(tmp_path / "m.onnx"), out=tmp_path / "a", tier="smoke")


def test_a_model_that_purifies_queries_alone_has_a_file_for_each_side(tmp_path: Path) -> None:
    gate = {"name": "spectral-gate", "rho": 0.1}
    model = model_of(image=SMALL, purifiers={"image": gate}, sides="query")
    for side, inside in (("query", True), ("database", False)):
        rh.export(model, tmp_path / "m.onnx", side=side, overwrite=True)
        facts = facts_in(tmp_path / "m.onnx")
        assert facts is not None
        assert facts.purifier is inside


def test_the_verb_prints_the_check(run: Run, tmp_path: Path) -> None:
    arguments = ["export", str(run.path), "--to", "torchscript", "--out", str(tmp_path / "m.pt")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "256 of 256 images have the same code; 4096 of 4096 bits are equal" in done.stderr
    assert done.stdout.split() == [str(tmp_path / "m.pt")]
    done = CliRunner().invoke(app, [*arguments, "--overwrite", "--json"])
    assert json.loads(done.stdout)["check"]["equal_bits"] == 4096


# --- folders for the hub


@pytest.fixture
def folder(run: Run, tmp_path: Path) -> Path:
    rh.export(run.path, tmp_path / "folder", to="torch", licence="apache-2.0")
    return tmp_path / "folder"


def test_a_hub_folder_gives_the_codes_of_its_run(run: Run, folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    hasher = rh.Hasher.from_pretrained(folder)
    codes = encode_signs(run.load_hasher(), "image", images())
    assert torch.equal(encode_signs(hasher, "image", images()), codes)
    assert rh.load(folder).origin == run.card()["digest"]
    hasher.save_pretrained(folder.parent / "again")  # its size is known
    assert rh.load(folder.parent / "again").side == 32
    with pytest.raises(ValueError, match="size of the images of this hasher is not known; name it"):
        rh.build_hasher(bits=8, image=SMALL).save_pretrained(folder.parent / "third")


def test_a_model_card_has_the_measured_numbers(run: Run, folder: Path) -> None:
    text = (folder / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "apache-2.0"
    assert front["library_name"] == "robusthash"
    results = run.results()
    values = {e["metrics"][0]["name"]: e["metrics"][0]["value"] for e in front["model-index"][0]["results"]}
    assert values["MAP (clean)"] == round(results["clean"]["MAP"], 6)
    assert values["wMAP (worst)"] == round(results["worst"]["wMAP"], 6)
    assert f"| worst | img-linf-8: pgd | wMAP | {results['worst']['wMAP']:.4f} (" in text
    assert "| data | synthetic |" in text
    hub = pytest.importorskip("huggingface_hub", reason="needs the extra 'hub'")
    card = hub.ModelCard.load(folder / "README.md")
    assert card.data.eval_results[0].metric_value == values["MAP (clean)"]


def test_a_model_card_that_was_written_in_stays(run: Run, folder: Path) -> None:
    (folder / "README.md").write_text("mine")
    rh.export(run.path, folder, to="torch")
    assert (folder / "README.md").read_text() == "mine"
    rh.export(run.path, folder, to="torch", overwrite=True)
    assert "synthetic" in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match=r"licence is an identifier of the hub.*got 'Apache 2'"):
        rh.export(run.path, folder, to="torch", licence="Apache 2")


def with_weights(folder: Path, change: Any) -> None:
    """Other tensors under a card that vouches for them, as a stranger could write it."""
    import hashlib

    from robusthash.models.saved_hasher import sealed

    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    weights = safetensors.torch.save(tensors)
    (folder / "model.safetensors").write_bytes(weights)
    card = json.loads((folder / "config.json").read_text())
    card["weights"] = hashlib.sha256(weights).hexdigest()
    (folder / "config.json").write_text(json.dumps(sealed(card)))


def edited(folder: Path, **changes: Any) -> None:
    from robusthash.models.saved_hasher import sealed

    card = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(sealed(card)))


def test_strange_folders_are_refused_in_a_line(folder: Path, tmp_path: Path) -> None:
    def refusal(change: Any) -> str:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        change(copy)
        with pytest.raises(RunError) as refused:
            rh.Hasher.from_pretrained(copy)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    head = "heads.image.linear.weight"
    wide = {head: torch.zeros(16, 5)}
    assert "have the shape (16, 5), and its hasher takes" in refusal(
        lambda at: with_weights(at, lambda tensors: tensors.update(wide))
    )
    assert f"its hasher has {head}" in refusal(lambda at: with_weights(at, lambda tensors: tensors.pop(head)))
    assert "the file of weights has extra" in refusal(
        lambda at: with_weights(at, lambda tensors: tensors.update(extra=torch.zeros(1)))
    )
    weights = (folder / "model.safetensors").read_bytes()
    assert "sha256 is not that of the card" in refusal(
        lambda at: (at / "model.safetensors").write_bytes(weights[:-9])
    )
    assert "not JSON" in refusal(lambda at: (at / "config.json").write_text('{"schema": "robu'))
    card = (folder / "config.json").read_text()
    assert "a field was changed" in refusal(
        lambda at: (at / "config.json").write_text(card.replace('"texts"', '"more": 1, "texts"', 1))
    )
    assert "no saved model" in refusal(lambda at: (at / "config.json").unlink())

    def pickled(at: Path) -> None:
        (at / "model.safetensors").unlink()
        torch.save({"w": torch.zeros(1)}, at / "pytorch_model.bin")

    assert "model.safetensors" in refusal(pickled)
    assert "bits is 1000000000, more than 65536" in refusal(
        lambda at: edited(at, bits=10**9, hasher={**json.loads(card)["hasher"], "bits": 10**9})
    )
    assert "image_size is [1000000, 1000000], more than 16384 a side" in refusal(
        lambda at: edited(at, image_size=[10**6, 10**6])
    )
    code = {"bits": 16, "image": "os:system", "text": None, "head": "tanh", "declared": "plain"}
    said = refusal(lambda at: edited(at, hasher={**code, "vocabulary": None}))
    assert "os:system" in said or "'os'" in said


def test_a_model_that_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_size is \\[20000, 20000\\], more than 16384 a side"):
        model_of(20_000).save(tmp_path / "large")
    assert not (tmp_path / "large").exists()


def test_a_file_that_is_there_is_not_sought_on_the_hub(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("robusthash.models.hub_folder._hub", lambda: pytest.fail("the hub was asked"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/p000.jpg").write_bytes(b"x")
    for load in (rh.Hasher.from_pretrained, rh.SearchModel.from_pretrained):
        with pytest.raises(RunError, match=r"photos/p000\.jpg is a file; a saved model is a folder"):
            load("photos/p000.jpg")


def test_a_card_cannot_make_other_weights_be_read(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def opened(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a file of weights was opened at the word of a card")

    monkeypatch.setattr("robusthash.models.gfnet.load_weights", opened)
    image = {**FREQUENCY, "weights": "/etc/hostname"}
    edited(folder, hasher={"bits": 16, "image": image, "text": None, "head": "tanh"})
    with pytest.raises(RunError, match="its hasher has"):
        rh.Hasher.from_pretrained(folder)


# --- the hub itself, faked


class FakeHub:
    """Repositories in a folder; anything that would open a connection is not there."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls = root, list[tuple[str, Any]]()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
        hub, fake = pytest.importorskip("huggingface_hub", reason="needs the extra 'hub'"), self

        class Api:
            def __init__(self, token: Any = None, library_name: Any = None) -> None:
                pass

            def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
                fake.calls.append(("create", (repo_id, private)))
                return f"https://hub.invalid/{repo_id}"

            def upload_folder(self, *, repo_id: str, folder_path: str, allow_patterns: Any, **_: Any) -> None:
                (fake.root / repo_id).mkdir(parents=True)
                for name in allow_patterns:
                    shutil.copy(Path(folder_path) / name, fake.root / repo_id / name)

        def download(repo_id: str, *, allow_patterns: Any, **_: Any) -> str:
            fake.calls.append(("download", (repo_id, tuple(allow_patterns))))
            if not (fake.root / repo_id).is_dir():
                raise OSError("404 Client Error\nno such repository")
            return str(fake.root / repo_id)

        monkeypatch.setattr(hub, "HfApi", Api)
        monkeypatch.setattr(hub, "snapshot_download", download)
        return self


def test_a_model_goes_to_the_hub_and_comes_back(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub(tmp_path / "hub").install(monkeypatch)
    rh.export(run.path, tmp_path / "other", to="torch")
    assert hub.calls == []  # nothing is sent unasked
    result = rh.export(run.path, folder, to="torch", push="me/hasher")
    assert result["address"] == "https://hub.invalid/me/hasher"
    assert hub.calls == [("create", ("me/hasher", True))]
    hasher = rh.Hasher.from_pretrained("me/hasher")
    assert torch.equal(
        encode_signs(hasher, "image", images()), encode_signs(run.load_hasher(), "image", images())
    )
    assert hub.calls[-1][1][1] == ("config.json", "model.safetensors", "README.md")
    assert hasher.push_to_hub("me/second", private=False) == "https://hub.invalid/me/second"
    assert ("create", ("me/second", False)) in hub.calls
    with pytest.raises(RunError, match=r"no folder me/none, and the hub does not give it: OSError: 404"):
        rh.Hasher.from_pretrained("me/none")
    with pytest.raises(RunError, match="neither a folder nor an id of the hub"):
        rh.Hasher.from_pretrained("../none/x")
    with pytest.raises(RunError, match="an id of the hub is user/name, got 'mine'"):
        hasher.push_to_hub("mine")
    with pytest.raises(ValueError, match="say --to torch with --push"):
        rh.export(run.path, tmp_path / "m.onnx", push="me/hasher")
