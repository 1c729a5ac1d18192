"""The audit where subfolders are kinds: what is measured beside the own copy, against sorting by hand, and
refusals."""

from __future__ import annotations

import io
import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from robusthash.apps.audit.measurement import run_audit
from robusthash.apps.audit.photo_collection import read_categories, read_photos
from robusthash.apps.audit.targets import AuditOptions, EndpointLimits, Tier
from robusthash.apps.experiment import training_stages
from robusthash.apps.experiment.config import make_config
from robusthash.core.runtime import Draws
from tests.unit.test_endpoint import served

TINY = Tier("tiny", 9, 4, 4, 20)
TINTS = {"red": (1.0, 0.2, 0.2), "blue": (0.2, 0.2, 1.0)}


def save(path, seed, tint, size=48):
    small = Draws(seed).uniform(torch.arange(1), (3, 5, 5))
    picture = torch.nn.functional.interpolate(small, size, mode="bicubic").clamp(0, 1)[0]
    picture = picture * torch.tensor(tint)[:, None, None]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((picture.permute(1, 2, 0).numpy() * 255).astype(np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Five red and four blue photographs in subfolders of their own."""
    root = tmp_path / "photos"
    for seed in range(9):
        kind = "red" if seed % 2 == 0 else "blue"
        save(root / kind / f"{seed}.png", seed, TINTS[kind])
    return root


@pytest.fixture
def model(monkeypatch):
    """``toy:model``, random projections of 24 bits, and ``toy:colours``, half of whose bits ask for the
    colour."""
    made = types.ModuleType("toy")
    torch.manual_seed(0)
    made.model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 24, bias=False))
    made.model.register_forward_pre_hook(lambda module, inputs: (inputs[0] - 0.3,))
    made.colours = lambda images: torch.cat(
        [(images[:, :1] - images[:, 2:]).mean((2, 3)).expand(-1, 24), made.model(images)], 1
    )
    monkeypatch.setitem(sys.modules, "toy", made)
    return made


def sorted_by_hand(model, photos, draws=4000):
    """AP of each photograph over the other stored copies of its kind, ties broken at random."""
    with torch.no_grad():
        asked, held = ((model(each.float() / 255) >= 0).numpy() for each in (photos.pixels, photos.stored))
    kinds = np.array([name.split("/")[0] for name in photos.names])
    rng, found = np.random.default_rng(0), []
    for row in range(len(asked)):
        others = np.arange(len(held)) != row
        far, same = (asked[row] != held[others]).sum(1), (kinds == kinds[row])[others]
        values = []
        for _ in range(draws):
            hits = same[np.lexsort((rng.random(len(far)), far))]
            values.append((hits.cumsum() / np.arange(1, len(hits) + 1))[hits].mean())
        found.append(np.mean(values))
    return found


def test_every_row_says_how_kinds_are_found(folder, model, tmp_path):
    summary = run_audit("toy:model", tmp_path / "out", folder, AuditOptions(labels=True, size=32, tier=TINY))
    rows = {row["name"]: row for row in summary["rows"]}
    assert summary["kinds"]["photographs"] == {"blue": 4, "red": 5}
    unchanged = rows["unchanged"]
    expected = sorted_by_hand(model.model, read_photos(folder, 32))
    assert unchanged["same_kind_each"] == pytest.approx(expected, abs=0.02)
    assert unchanged["same_kind"] == pytest.approx(np.mean(unchanged["same_kind_each"]))
    # eight others, of which four are red for a red photograph and three blue for a blue one
    harmonic = sum(1 / rank for rank in range(1, 9))
    luck = [(r - 1) / 7 + (8 - r) / (8 * 7) * harmonic for r in (4, 3)]
    assert unchanged["same_kind_chance"] == pytest.approx((5 * luck[0] + 4 * luck[1]) / 9)
    assert all(0 < row["same_kind"] <= 1 and 0 < row["same_kind_chance"] < 1 for row in rows.values())
    lines = [rows[name]["same_kind"] for name in ("guided-apgd", "flip", "mainstay", "square")]
    assert rows["hide, worst case"]["same_kind"] <= min(lines)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("luck 0.") == len(summary["rows"])
    assert summary["kinds"]["said"] in page
    assert "aimed at the photograph itself" in summary["kinds"]["said"]


def test_a_model_that_knows_colours_finds_kinds_and_hiding_a_photograph_says_so(folder, model, tmp_path):
    summary = run_audit(
        "toy:colours", tmp_path / "out", folder, AuditOptions(labels=True, size=32, tier=TINY)
    )
    unchanged = summary["rows"][0]
    assert unchanged["same_kind"] == 1.0 > unchanged["same_kind_chance"]
    assert "it scores 1.00" in summary["kinds"]["said"]
    plain = run_audit("toy:colours", tmp_path / "plain", folder, AuditOptions(size=32, tier=TINY))
    kept = [
        {**row, "same_kind": None, "same_kind_chance": None, "same_kind_each": ()} for row in summary["rows"]
    ]
    assert plain["rows"] == kept  # labels change no attack
    assert plain["kinds"] is None
    assert "same kind" not in (tmp_path / "plain" / "report.html").read_text()


def test_photographs_without_another_of_their_kind_are_searched_but_not_counted(folder, model, tmp_path):
    save(folder / "loose.png", 20, (1, 1, 1))
    save(folder / "green" / "only.png", 21, (0.2, 1.0, 0.2))
    summary = run_audit(
        "toy:model",
        tmp_path / "out",
        folder,
        AuditOptions(labels=True, size=32, tier=Tier("t", 11, 2, 4, 20)),
    )
    names = read_photos(folder, 32).names
    each = dict(zip(names, summary["rows"][0]["same_kind_each"], strict=True))
    assert [name for name, value in each.items() if value is None] == [
        name for name in names if name in ("loose.png", "green/only.png")
    ]
    assert summary["kinds"]["in no subfolder"] == 1
    assert json.loads((tmp_path / "out" / "audit.json").read_text())["kinds"] == summary["kinds"]


def test_folders_without_kinds_are_refused_with_what_to_do(tmp_path):
    def refused(root, said):
        with pytest.raises(ValueError, match=said) as caught:
            read_categories(read_photos(root, 32))
        assert "--labels" in str(caught.value)

    refused(None, "needs --photos")
    root = tmp_path / "photos"
    for seed in (0, 1):
        save(root / f"{seed}.png", seed, (1, 1, 1))
    refused(root, "holds no subfolder")
    for seed in (2, 3):
        save(root / "cat" / f"{seed}.png", seed, (1, 1, 1))
    refused(root, "one kind only, 'cat'")
    save(root / "dog" / "4.png", 4, (1, 1, 1))
    refused(root, "2 kinds \\(cat 2, dog 1\\)")
    save(root / "dog" / "deeper" / "5.png", 5, (1, 1, 1))
    assert read_categories(read_photos(root, 32)).counts == {"cat": 2, "dog": 2}


def answering(photos, count, named=lambda name: name):
    """An endpoint that answers the ids of the nearest photographs by mean colour."""
    held = photos.stored.float().mean((2, 3))

    def answer(body, number):
        asked = torch.from_numpy(np.asarray(Image.open(io.BytesIO(body)), dtype=np.float32)).mean((0, 1))
        order = (held - asked).norm(dim=1).argsort()[:count].tolist()
        return 200, {}, {"ids": [named(photos.names[i]) for i in order]}

    return answer


def test_an_endpoint_whose_ids_are_files(folder, tmp_path):
    pytest.importorskip("httpx", reason="needs the extra 'audit' (pip install robusthash[audit])")
    photos, limits = read_photos(folder, 32), EndpointLimits(rate=1e6)
    with served(answering(photos, 4)) as (url, _):
        summary = run_audit(
            url, tmp_path / "out", folder, AuditOptions(labels=True, size=32, tier=TINY, limits=limits)
        )
    unchanged = summary["rows"][0]
    assert unchanged["same_kind"] == 1.0 > unchanged["same_kind_chance"] > 0.3
    assert all(row["same_kind"] is not None for row in summary["rows"])
    assert "same kind found" in (tmp_path / "out" / "report.html").read_text()


def test_lists_of_ids_are_scored_over_what_they_can_hold(folder):
    kinds = read_categories(read_photos(folder, 32))
    lists = [
        ("red/0.png", "blue/1.png", "red/2.png", "red/4.png"),  # its own, then a miss and two hits
        ("blue/3.png", "elsewhere.png", "blue/5.png"),  # its own is lost, and the list is shorter
    ]
    found = kinds.found_in(lists, ["red/0.png", "blue/1.png"], 3)
    assert found.ap.tolist() == pytest.approx([(1 / 2 + 2 / 3) / 3, (1 + 2 / 3) / 3])
    whole = [tuple(sorted(kinds.files, reverse=kind == "red")) for kind in ("red", "blue")]
    perfect = kinds.found_in(whole, ["red/0.png", "blue/1.png"], 8)
    harmonic = sum(1 / rank for rank in range(1, 9))
    assert perfect.ap.tolist() == pytest.approx([1.0, 1.0])
    assert perfect.chance.tolist() == pytest.approx([(r - 1) / 7 + (8 - r) / 56 * harmonic for r in (4, 3)])


def test_an_endpoint_whose_ids_tell_no_kinds_is_refused_before_it_is_asked_much(folder, tmp_path):
    pytest.importorskip("httpx", reason="needs the extra 'audit' (pip install robusthash[audit])")
    photos, limits = read_photos(folder, 32), EndpointLimits(rate=1e6)
    for count, named, said in [
        (9, lambda name: name.split("/")[1], "is no image below .* paths below it, such as"),
        (1, lambda name: name, "answered one id to each photograph"),
    ]:
        with served(answering(photos, count, named)) as (url, seen):
            with pytest.raises(ValueError, match=said):
                run_audit(
                    url,
                    tmp_path / "out",
                    folder,
                    AuditOptions(labels=True, size=32, tier=TINY, limits=limits),
                )
            assert len(seen) == 2


def test_the_verb_takes_labels(folder, model, tmp_path, call):
    small = ["--size", 32, "--tier", "smoke", "--attacked", 2]
    plain = ["audit", "toy:model", *small, "--out", tmp_path / "o", "--labels"]
    code, out, err = call(*plain, "--photos", folder, "--json")
    assert code == 0, err
    assert json.loads(out)["rows"][0]["same_kind"] > 0
    code, out, err = call(*plain, "--photos", folder)
    assert code == 0, err
    assert "same kind" in out
    code, _, err = call(*plain)
    assert code == 1
    assert "needs --photos" in err


def test_a_run_of_this_package(folder, tmp_path):
    recipe = {
        "name": "tiny",
        "data": {"name": "synthetic", "train": 64, "query": 8, "database": 64},
        "hasher": {"bits": 12, "image": {"name": "small", "width": 4}},
        "training": {"objective": "csq", "epochs": 1, "batch_size": 32, "optim": {"hasher": {"lr": 0.05}}},
        "runtime": {"device": "cpu"},
    }
    run = training_stages.train(make_config(recipe), tmp_path / "runs")
    summary = run_audit(str(run.path), tmp_path / "out", folder, AuditOptions(labels=True, tier=TINY))
    assert {flag["id"]: flag["level"] for flag in summary["flags"]}["F2"] == "pass"
    assert all(row["same_kind"] > 0 for row in summary["rows"])
