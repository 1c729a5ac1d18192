"""The audit end to end: hashes, modules, endpoints and runs on small pictures, and what it refuses."""

from __future__ import annotations

import json
import re
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from robusthash.apps.audit import warnings as audit_warnings
from robusthash.apps.audit.measured_rows import AuditPlan, AuditRow
from robusthash.apps.audit.measurement import run_audit
from robusthash.apps.audit.photo_collection import read_photos
from robusthash.apps.audit.searches_by_code import code_context
from robusthash.apps.audit.targets import AuditOptions, EndpointLimits, Tier, open_target, size_of
from robusthash.apps.audit.verdict import counted, idle_attacks, verdict
from robusthash.apps.audit.warnings import model_flags
from robusthash.core.hamming import distance
from robusthash.core.runtime import Draws, silent
from robusthash.data.transforms import jpeg
from robusthash.metrics.results import Flag
from robusthash.models.external.model_answers import AnswerReading, Broken
from tests.unit.test_endpoint import served

LINES = ("guided-apgd", "flip", "mainstay", "square")
TINY = Tier("tiny", 8, 3, 4, 20)


def save(path, seed, size=48):
    small = Draws(seed).uniform(torch.arange(1), (3, 5, 5))
    picture = torch.nn.functional.interpolate(small, size, mode="bicubic").clamp(0, 1)[0]
    Image.fromarray((picture.permute(1, 2, 0).numpy() * 255).astype(np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    (root / "deeper").mkdir(parents=True)
    for seed in range(9):
        save(root / ("deeper" if seed % 2 else "") / f"{seed}.png", seed)
    return root


@pytest.fixture
def model(monkeypatch):
    """``toy:model``, a linear hasher of 24 bits on 32 pixels."""
    made = types.ModuleType("toy")
    torch.manual_seed(0)
    linear = torch.nn.Linear(3 * 32 * 32, 24, bias=False)
    made.model = torch.nn.Sequential(torch.nn.Flatten(), linear)
    made.model.register_forward_pre_hook(lambda module, inputs: (inputs[0] - 0.5,))
    monkeypatch.setitem(sys.modules, "toy", made)
    return made.model


def test_a_model_is_measured_attacked_and_described_in_words(folder, model, tmp_path, monkeypatch):
    (folder / "broken.jpg").write_bytes(b"no picture")
    save(folder / "again.png", 3)
    Image.new("RGB", (40, 40), "white").save(folder / "white.png")
    red = Flag("F9", 2.0, 1.0, "red", "restart the attack")
    monkeypatch.setattr(audit_warnings, "model_checks", lambda *arguments, **options: (red,))
    summary = run_audit("toy:model", tmp_path / "out", folder, AuditOptions(size=32, tier=TINY))
    rows = {row["name"]: row for row in summary["rows"]}
    assert summary["bits"] == 24
    assert summary["photographs"]["used"] == 9
    assert summary["photographs"]["unreadable"] == ["broken.jpg"]
    assert len(summary["photographs"]["the same as another"]) == 1
    assert summary["photographs"]["unchanged by saving again"] == ["white.png"]
    assert rows["unchanged"]["asked"] == 8
    assert rows["hide, worst case"]["asked"] == 3
    # a linear hasher keeps everyday copies, and falls at once where its weights are followed
    assert rows["jpeg-90"]["first"] == 1.0
    assert rows["hide, worst case"]["map"] < 0.5 < rows["noise"]["map"]
    assert rows["hide, worst case"]["map"] <= min(
        rows[name]["map"] for name in ("guided-apgd", "flip", "mainstay", "square")
    )
    assert rows["imitate"]["map"] > 0.5
    assert rows["flip"]["largest"] <= 8 + 1e-3
    assert json.loads((tmp_path / "out" / "audit.json").read_text()) == json.loads(json.dumps(summary))
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png") > 20
    assert summary["verdict"]["alarm"].startswith("Do not rely on these numbers: check F9 is red")
    assert page.index("check F9 is red") < page.index(summary["verdict"]["first"])  # at the very top
    assert "restart the attack" in page
    assert 'src="http' not in page
    assert not re.search(r"nan|None", re.sub(r"<[^>]*>", "", page))


def test_copies_inside_the_folder_are_no_accidental_matches(folder, tmp_path, call):
    pytest.importorskip("imagehash", reason="needs the extra 'audit' (pip install robusthash[audit])")
    options = AuditOptions(size=48, tier=replace(TINY, queries=30), replacement=False)
    without = run_audit("phash", tmp_path / "one", folder, options)
    for seed in (2, 4, 6):
        with Image.open(folder / f"{seed}.png") as picture:
            picture.save(folder / f"again-{seed}.jpg", quality=80)
            picture.resize((36, 36)).save(folder / f"small-{seed}.png")
    found = run_audit("phash", tmp_path / "two", folder, options)
    photographs = found["photographs"]
    assert without["photographs"]["pairs of copies inside the folder"] == 0
    assert photographs["pairs of copies inside the folder"] == 9  # three pairs of each three
    assert len(photographs["nearly the same as another"]) == 6
    assert photographs["used"] == 15
    assert found["false matches"] == without["false matches"] == 0.0
    assert "9 pairs have nearly the same pixels" in (tmp_path / "two" / "report.html").read_text()
    words = ["--photos", folder, "--size", 48, "--tier", "smoke", "--attacked", 2, "--no-replacement"]
    code, out, err = call("audit", "phash", *words, "--out", tmp_path / "three")
    assert code == 0, err
    assert "copies inside the folder: 9 pairs" in out
    for path in [path for path in folder.rglob("*.*") if path.stem[-1] != "2"]:
        path.unlink()
    with pytest.raises(ValueError, match=r"looked up are all copies of one another.*robusthash duplicates"):
        run_audit("phash", tmp_path / "four", folder, options)


def test_the_same_audit_gives_the_same_numbers(folder, model, tmp_path):
    first, second = (
        run_audit("toy:model", tmp_path / n, folder, AuditOptions(size=32, tier=TINY)) for n in ("a", "b")
    )
    assert first["rows"] == second["rows"]


@pytest.mark.parametrize("reading", [AnswerReading(), AnswerReading("float", "euclidean")])
def test_an_embedding_is_audited_by_its_own_distance(reading, folder, tmp_path, monkeypatch):
    """Features that are never negative: cut at 0 or 0.5 they would make one code of all photographs."""
    net = torch.nn.Linear(3 * 32 * 32, 24, bias=False)
    torch.nn.init.normal_(net.weight, std=0.05, generator=torch.Generator().manual_seed(0))
    made = types.ModuleType("positive")
    made.model = torch.nn.Sequential(torch.nn.Flatten(), net, torch.nn.Softplus(beta=5))
    monkeypatch.setitem(sys.modules, "positive", made)
    (folder / "flat").mkdir()
    for path in folder.glob("*.png"):
        path.rename(folder / "flat" / path.name)
    options = AuditOptions(labels=True, size=32, tier=TINY, reading=reading)
    summary = run_audit("positive:model", tmp_path / "out", folder, options)
    rows = {row["name"]: row for row in summary["rows"]}
    assert summary["distance"] == reading.distance
    assert rows["unchanged"]["first"] == rows["jpeg-90"]["first"] == 1.0
    assert rows["hide, worst case"]["map"] < 0.6 < rows["noise"]["map"]
    assert {"guided-apgd", "flip", "margin-pn", "square", "imitate"} <= set(rows)
    assert rows["imitate"]["bits"] < rows["before the attack"]["bits"]
    assert 0 < summary["radius"] == float(summary["radius"])
    assert summary["false matches"] <= 0.01
    assert rows["unchanged"]["same_kind"] is not None
    assert ("Nobody said so" in summary["said"][0]) == (reading == AnswerReading())
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"compares embeddings by {reading.distance} distance" in page
    assert "bits apart" not in page
    assert not re.search(r"nan|None", re.sub(r"<[^>]*>", "", page))
    with pytest.raises(ValueError, match=r"radius is a (cosine|euclidean) distance"):
        run_audit("positive:model", tmp_path / "out", folder, replace(options, radius=-1))


def brightness(images):
    """A hash in NumPy, without gradients: 64 blocks of 6 x 6 pixels, each brighter than the median or not."""
    grey = (
        images.detach().mean(1).numpy().reshape(len(images), 8, 6, 8, 6).mean((2, 4)).reshape(len(images), 64)
    )
    return grey > np.median(grey, axis=1, keepdims=True)


def test_a_hash_without_gradients_says_what_was_not_tried(folder, tmp_path, monkeypatch):
    made = types.ModuleType("numeric")
    made.brightness = brightness
    monkeypatch.setitem(sys.modules, "numeric", made)
    options = AuditOptions(size=48, tier=TINY, radius=10)
    summary = run_audit("numeric:brightness", tmp_path / "out", folder, options)
    assert not summary["gradients"]
    assert summary["radius"] == 10
    kinds = {"same", "everyday", "noise", "hide", "hide-worst", "hide-saved"}
    assert {row["kind"] for row in summary["rows"]} == kinds
    asked = next(row for row in summary["rows"] if row["name"] == "square")
    assert asked["bits"] > next(row for row in summary["rows"] if row["name"] == "noise")["bits"]
    assert {flag["id"] for flag in summary["flags"]} == {"F1", "F15", "F17", "F19", "F20"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "limit of this audit, not a protection" in page
    assert "Not tried: somebody who has the model, since its answers cannot be differentiated" in page
    assert summary["verdict"]["first"].startswith("Black box only: 20 questions about each photograph")
    assert summary["verdict"]["level"] != "held"


def test_a_perceptual_hash_is_attacked_through_its_public_arithmetic(folder, tmp_path):
    pytest.importorskip("imagehash", reason="needs the extra 'audit' (pip install robusthash[audit])")
    summary = run_audit("dhash", tmp_path / "out", folder, AuditOptions(size=48, tier=TINY))
    assert summary["gradients"]
    assert summary["radius"] == 10
    bits = {row["name"]: row["bits"] for row in summary["rows"] if "bits" in row}
    assert bits["flip"] > bits["square"] > bits["noise"]
    rows = {row["name"]: row for row in summary["rows"]}
    assert rows["evade"]["recognised"] <= min(rows[name]["recognised"] for name in LINES)
    assert rows["collide"]["bits"] < rows["before the attack"]["bits"]
    assert {row["kind"] for row in summary["rows"]} >= {"imitate-worst", "hide-saved", "imitate-saved"}


@pytest.mark.parametrize("eps", [0.5 / 255, 8 / 255])
@pytest.mark.parametrize("name", ["dhash", "numeric:brightness"])
def test_the_first_sentence_agrees_with_the_numbers(folder, tmp_path, monkeypatch, name, eps, call):
    """On the page and in the terminal: what the strongest attack left, and never comfort by a black box."""
    pytest.importorskip("imagehash", reason="needs the extra 'audit' (pip install robusthash[audit])")
    made = types.ModuleType("numeric")
    made.brightness = brightness
    monkeypatch.setitem(sys.modules, "numeric", made)
    options = AuditOptions(size=48, tier=TINY, radius=10, eps=eps)
    summary = run_audit(name, tmp_path / "out", folder, options)
    rows = {row["kind"]: row for row in summary["rows"]}
    hidden = round((1 - rows["hide-worst"]["recognised"]) * 3)
    assert rows["hide-worst"]["recognised"] == min(
        row["recognised"] for row in summary["rows"] if row["kind"] in ("hide", "hide-worst")
    )
    page = (tmp_path / "out" / "report.html").read_text()
    first = re.sub(r"<[^>]*>", "", re.search(r'<p class="verdict.*?</p>', page)[0])
    assert first == summary["verdict"]["first"]
    assert f"{hidden} of 3 photographs" in first
    assert f"{eps * 255:g} of 255" in first
    level = summary["verdict"]["level"]
    if ":" in name:
        assert first.startswith("Black box only") or hidden == 3
        assert "nobody who has the model was tried" in first
        assert level == ("fooled" if hidden else "unknown")
    else:
        assert level == ("fooled" if hidden else "held")
        assert ("longer attacks may hide more" in first) == (hidden == 0)
    assert "further than 10 bits" in first
    assert "counted as the same" in page
    assert "recognised" not in page
    assert f"at most {eps * 255:g} of 255 brightness levels a pixel" in page or ":" in name
    resize = next(row for row in summary["rows"] if row["name"] == "resize")
    assert resize["words"].endswith("(at the model's size, 48 px)")


def test_ordinary_neighbours_of_a_correct_search_are_no_failures(folder, model, tmp_path):
    run_audit("toy:model", tmp_path / "out", folder, AuditOptions(size=32, tier=TINY))
    page = (tmp_path / "out" / "report.html").read_text()
    shown = re.findall(r'<li class="(yes|no|plain)">.*?</button>(.*?)</li>', page)
    before = [shown[start : start + 5] for start in range(0, len(shown), 10)]
    for hits in before:  # what the unchanged photograph finds: its own copy, and four that are no mistakes
        assert [style for style, _ in hits] == ["yes", *["plain"] * 4]
        assert "✗" not in "".join(text for _, text in hits)
    assert any("✗" in text or "◎" in text for _, text in shown)  # an attack that took the place is one


class Masked(torch.nn.Module):
    """The toy model behind something that takes its gradient away."""

    def __init__(self, way):
        super().__init__()
        self.inner, self.way = sys.modules["toy"].model, way

    def forward(self, images):
        if self.way == "rounded":
            return self.inner((images * 255).round() / 255)
        if self.way == "detached":
            return self.inner(images.detach())
        if self.way == "zeroed":
            return self.inner(images).detach() + 0 * self.inner(images)
        return self.inner(images) >= 0


def test_gradients_that_are_there_pass(folder, model, tmp_path):
    summary = run_audit("toy:model", tmp_path / "out", folder, AuditOptions(size=32, tier=TINY))
    flags = {flag["id"]: flag for flag in summary["flags"]}
    assert set(flags) == {f"F{number}" for number in (*range(1, 4), *range(10, 18), *range(19, 24))}
    assert {id for id, flag in flags.items() if flag["level"] == "red"} <= {"F12"}  # a short search
    assert flags["F2"]["level"] == flags["F3"]["level"] == "pass"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "The weights show an attack no way" in page


def scaled(inner, images):
    return 1e6 * inner(images)


def gated(inner, images):
    smooth = torch.nn.functional.avg_pool2d(images, 3, 1, 1)
    return inner(images * torch.sigmoid(20 * (smooth - images)).detach())


def compressed(inner, images):
    """Real JPEG files, with a gradient of nothing that they do."""
    files = jpeg(images.detach().float(), 30).to(images)
    return inner(files) + 1e-3 * (images - images.detach()).flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("mask", "id", "level", "said"),
    [
        (scaled, "F2", "amber", "tanh saturates"),
        (gated, "F14", "red", "detached part"),
        (compressed, "F13", "red", "rugged"),
    ],
)
def test_an_audit_warns_where_check_does(folder, model, tmp_path, mask, id, level, said):
    """Attacks follow a gradient here that is there, and not that of the model."""

    class Mask(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, images):
            return mask(self.inner, images)

    sys.modules["toy"].mask = Mask()
    summary = run_audit("toy:mask", tmp_path / "out", folder, AuditOptions(size=32, tier=TINY))
    (flag,) = [each for each in summary["flags"] if each["id"] == id]
    assert flag["level"] == level
    assert said in flag["remedy"]
    if mask is gated:  # in a TorchScript file too
        torch.jit.trace(Mask(), torch.zeros(2, 3, 32, 32)).save(str(tmp_path / "mask.pt"))
        few = read_photos(folder, 32)
        target = open_target(str(tmp_path / "mask.pt"), few.first(8))
        plan = AuditPlan(target, few, None, AuditOptions(size=32, tier=TINY), silent)
        flags = {
            each.id: each.level for each in model_flags(target, code_context(plan, target.hasher), 8 / 255)
        }
        assert flags["F14"] == "red"


@pytest.mark.parametrize("seed", [0, 1])
def test_codes_by_class_are_not_called_collapsed(folder, tmp_path, monkeypatch, seed):
    """A search by class gives the pictures of a class one code, which is what it is for."""
    made = types.ModuleType("classy")

    class Classes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            draws = torch.Generator().manual_seed(seed)
            self.codes = torch.nn.Parameter(torch.randn(3, 32, generator=draws))

        def forward(self, images):
            grey = images.mean((1, 2, 3))[:, None]
            return torch.softmax(-400 * (grey - torch.tensor([0.43, 0.48, 0.54])) ** 2, 1) @ self.codes

    made.classes = Classes()
    made.one = lambda images: made.classes(images).abs() * made.classes.codes[0].sign()
    monkeypatch.setitem(sys.modules, "classy", made)
    levels = {}
    for name in ("classes", "one"):
        summary = run_audit(f"classy:{name}", tmp_path / "out", folder, AuditOptions(size=32, tier=TINY))
        (flag,) = [each for each in summary["flags"] if each["id"] == "F17"]
        levels[name] = flag["level"]
        if name == "classes":
            assert "a search by class is meant to share them" in flag["remedy"]
    assert levels == {"classes": "amber", "one": "red"}  # and one code for everything is for nothing


@pytest.mark.parametrize("way", ["rounded", "detached", "zeroed", "bits"])
def test_a_model_that_takes_its_gradient_away_gets_a_red_flag(folder, model, tmp_path, way):
    sys.modules["toy"].masked = Masked(way)
    summary = run_audit("toy:masked", tmp_path / "out", folder, AuditOptions(size=32, tier=TINY))
    (flag,) = [each for each in summary["flags"] if each["id"] == "F2"]
    assert (flag["level"], flag["value"]) == ("red", 1.0)
    assert "cuts the gradient" in flag["remedy"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Do not rely on these numbers: check" in page


def test_a_scripted_model_and_a_function_are_looked_at_too(folder, model, tmp_path):
    torch.jit.trace(Masked("zeroed").eval(), torch.zeros(2, 3, 32, 32)).save(str(tmp_path / "zeroed.pt"))
    sys.modules["toy"].function = lambda images: model(images.detach()) + 0 * images.sum()
    sys.modules["toy"].numbers = lambda images: model(images.detach()).detach().numpy()
    for target, level in [
        (str(tmp_path / "zeroed.pt"), "red"),
        ("toy:function", "red"),
        ("toy:numbers", None),
    ]:
        summary = run_audit(target, tmp_path / "out", folder, AuditOptions(size=32, tier=TINY))
        assert {flag["id"]: flag["level"] for flag in summary["flags"]}.get("F2") == level


def answer_with(folder, size):
    """An honest search over the folder's photographs, which answers ids with distances."""
    photos = read_photos(folder, size)
    stored = photos.stored.float().mean(1).flatten(1)

    def bits(pixels):
        return np.packbits((pixels > pixels.mean()).numpy())

    codes = torch.from_numpy(np.stack([bits(each) for each in stored]))

    def answer(body, number):
        import io

        pixels = (
            torch.from_numpy(np.asarray(Image.open(io.BytesIO(body)), dtype=np.float32)).mean(2).flatten()
        )
        far = distance(torch.from_numpy(bits(pixels))[None], codes)[0]
        order = far.argsort(stable=True)[:5].tolist()
        return 200, {}, {"ids": [photos.names[i] for i in order], "distances": [int(far[i]) for i in order]}

    return answer


def test_an_endpoint_of_ids(folder, tmp_path):
    pytest.importorskip("httpx", reason="needs the extra 'audit' (pip install robusthash[audit])")
    limits = EndpointLimits(rate=1e6, headers={"x-key": "secret-word"})
    with served(answer_with(folder, 32)) as (url, _):
        summary = run_audit(url, tmp_path / "out", folder, AuditOptions(size=32, tier=TINY, limits=limits))
        assert summary["bits"] is None
        assert summary["rows"][0]["first"] == 1.0
        assert summary["rows"][1]["recognised"] is None
        everyday, asked = 8 * 10, TINY.attacked * TINY.questions
        assert everyday + asked / 2 <= summary["questions"] <= everyday + asked + TINY.attacked + 2
        written = (tmp_path / "out" / "report.html").read_text() + (
            tmp_path / "out" / "audit.json"
        ).read_text()
        assert "secret-word" not in written
        with pytest.raises(ValueError, match="raise --budget"):
            run_audit(
                url,
                tmp_path / "out",
                folder,
                AuditOptions(size=32, tier=TINY, limits=EndpointLimits(budget=20, rate=1e6)),
            )


def with_threshold(answer, most, empty):
    """The same search, which returns what is at most ``most`` bits away, and ``empty`` where nothing is."""

    def near(body, number):
        _, _, found = answer(body, number)
        count = sum(distance <= most for distance in found["distances"])
        kept = {name: values[:count] for name, values in found.items()}
        return (200, {}, kept) if count else empty

    return near


@pytest.mark.parametrize("empty", [(200, {}, {"ids": []}), (404, {}, b""), (204, {}, b"")])
def test_an_endpoint_with_a_threshold_may_find_nothing(folder, tmp_path, empty):
    pytest.importorskip("httpx", reason="needs the extra 'audit' (pip install robusthash[audit])")
    strict = with_threshold(answer_with(folder, 32), 40, empty)
    tier, limits = Tier("tiny", 8, 2, 2, 10), EndpointLimits(rate=1e6)
    with served(strict) as (url, _):
        summary = run_audit(url, tmp_path / "out", folder, AuditOptions(size=32, tier=tier, limits=limits))
    rows = {row["name"]: row for row in summary["rows"]}
    assert rows["unchanged"]["map"] == 1.0
    assert rows["crop-10"]["map"] == rows["crop-10"]["first"] == 0.0  # nothing is near a cropped one
    assert (tmp_path / "out" / "report.html").exists()


def test_an_audit_that_broke_off_goes_on(folder, tmp_path):
    pytest.importorskip("httpx", reason="needs the extra 'audit' (pip install robusthash[audit])")
    honest, broken = answer_with(folder, 32), [60]

    def answer(body, number):
        return honest(body, number) if number <= broken[0] else (403, {}, b"no more")

    tier, limits = Tier("tiny", 8, 2, 2, 10), EndpointLimits(rate=1e6)
    options = AuditOptions(size=32, tier=tier, limits=limits)
    with served(answer) as (url, asked):
        with pytest.raises(Broken, match="no more"):
            run_audit(url, tmp_path / "out", folder, options)
        assert len(asked) == 61
        broken[0] = 10_000
        resumed = run_audit(url, tmp_path / "out", folder, options)
        sent = len(asked) - 61
        whole = run_audit(url, tmp_path / "out", folder, options)  # a finished one keeps nothing
        assert resumed["rows"] == whole["rows"]
        assert sent == resumed["questions"] == whole["questions"] - 59  # the check asks one again


def answer_by_brightness(folder, size):
    """A search that noise around 0 cannot move, and a patch of one sign can."""
    photos = read_photos(folder, size)
    stored = photos.stored.float().mean((1, 2, 3))

    def answer(body, number):
        import io

        asked = torch.from_numpy(np.asarray(Image.open(io.BytesIO(body)), dtype=np.float32)).mean()
        return 200, {}, {"ids": [photos.names[i] for i in (stored - asked).abs().argsort().tolist()]}

    return answer


def test_questions_alone_find_what_noise_does_not(folder, tmp_path):
    pytest.importorskip("httpx", reason="needs the extra 'audit' (pip install robusthash[audit])")
    with served(answer_by_brightness(folder, 32)) as (url, _):
        limits = EndpointLimits(rate=1e6)
        summary = run_audit(
            url, tmp_path / "out", folder, AuditOptions(size=32, tier=TINY, eps=0.1, limits=limits)
        )
    rows = {row["name"]: row for row in summary["rows"]}
    assert rows["square"]["map"] < rows["noise"]["map"]
    assert rows["hide, worst case"]["map"] == rows["square"]["map"]
    assert rows["square"]["largest"] <= 0.1 * 255 + 1
    assert "by someone who may only ask it, 20 times" in (tmp_path / "out" / "report.html").read_text()


def test_photographs_that_cannot_be_used(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="takes a folder"):
        read_photos(tmp_path / "gone", 32)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        read_photos(empty, 32)
    save(empty / "one.png", 0)
    with pytest.raises(ValueError, match="holds 1 usable photograph of 1 files"):
        read_photos(empty, 32)
    assert len(read_photos(folder, 32, limit=4)) == 4


def test_targets_that_cannot_be_opened(folder, model):
    images = read_photos(folder, 32).first(8)
    for target, said in [
        ("phas", "did you mean 'phash'"),
        ("model.onnx", "no model file"),
        ("model.pt", "no model file"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            open_target(target, images)
    with pytest.raises(Broken, match="answers 24 bits, and --bits says 64"):
        open_target("toy:model", images, bits=64)
    assert size_of("toy:model", None) == 224


def row_of(kind, name="x", first=1.0, bits=0.0, asked=20):
    return AuditRow(name, name, "no", kind, asked, first, first, first, bits)


def test_ties_are_no_whole_photographs_and_attacks_below_noise_are_named():
    rows = [row_of("noise", bits=1.1), row_of("hide", "guided-apgd"), row_of("hide", "flip", 0.0, 20.0)]
    assert idle_attacks(rows) == [
        "guided-apgd got nowhere (moved by 0; random noise: 1.1), so its row says nothing good of this search."
    ]
    assert [counted(share, 20) for share in (1.0, 0.975, 0.0)] == ["20", "19.5", "0"]
    summary = {
        "radius": 10,
        "distance": "hamming",
        "matches by": "rank",
        "tier": {"questions": 5},
        "eps": 0.1,
    }
    summary |= {"gradients": True, "photographs": {"used": 60}}
    said = verdict(summary, [row_of("same"), row_of("hide-worst", first=0.375, asked=4)], ())
    assert "hides from it 2.5 of 4 photographs (not found first)" in said.first
    assert said.asked.startswith("20 photographs were looked up in a search that stores copies of 60")


def test_the_terminal_names_radius_stored_copies_and_attacks_that_imitate(folder, tmp_path, call):
    pytest.importorskip("imagehash", reason="needs the extra 'audit' (pip install robusthash[audit])")
    few = ["--size", 48, "--tier", "smoke", "--queries", 2, "--attacked", 2, "--out", tmp_path / "o"]
    code, out, err = call("audit", "dhash", "--photos", folder, *few)
    assert code == 0, err
    assert "Counts as the same: within 10 bits." in out
    assert "2 photographs were looked up in a search that stores copies of" in out
    head, _, tail = out.partition("(lower is better)")
    assert "imitate" not in head
    assert "imitate, best case" in tail
    assert "recognised" not in out + err


def test_the_verb(folder, model, tmp_path, call):
    small = ["--size", 32, "--tier", "smoke", "--attacked", 2]
    plain = ["audit", "toy:model", "--photos", folder, *small, "--out", tmp_path / "o"]
    code, out, err = call(*plain, "--json")
    assert code == 0, err
    assert json.loads(out)["tier"]["attacked"] == 2
    for wrong in (("--bits", "many"), ("--header", "no colon"), ("--tier", "huge"), ("--eps", 0)):
        assert call(*plain, *wrong)[0] == 1
