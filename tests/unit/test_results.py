"""Records: JSON and back, no NaN, torn pairs noticed, comparison refused where settings differ."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from robusthash.metrics.comparison import compare
from robusthash.metrics.measure_key import MeasureKey
from robusthash.metrics.protocol import load_protocol
from robusthash.metrics.results import (
    Cost,
    DataSet,
    EvalResult,
    Flag,
    Setting,
    by_direction,
    load_results,
    save_results,
)


def setting(**changes: object) -> Setting:
    plain = Setting(
        model="dpsh-32",
        database="photos",
        queries="photos",
        protocol=load_protocol("house").settings(),
        direction="I2I",
        bits=32,
        threat="img-linf-8",
        attacks=("hag", "mainstay"),
        budget="2 x 100 steps",
        seeds=(0, 1),
        digests={"model": "aa", "codes": "bb", "database": "cc", "queries": "dd", "labels": "ee"},
    )
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def result(seed: int = 0, **changes: object) -> EvalResult:
    generator = torch.Generator().manual_seed(seed)
    ap = torch.rand(30, generator=generator, dtype=torch.float64)
    recall = ap.clone()
    recall[4] = torch.nan
    return EvalResult(
        setting=setting(**changes),
        values={"MAP@5000": float(ap.mean()), "MAP": 0.25},
        per_query={"MAP@5000": ap, "R@100": recall, "flips": torch.arange(30)},
        interval={"MAP@5000": (0.1, 0.9)},
        reference={"chance": 0.1, "least": 0.05},
        empty=2,
        curves={"PR": {"recall": torch.arange(3).double(), "precision": torch.ones(3).double()}},
        notes=("MAP@5000: k clipped to the 300 items of the database",),
        winner=("hag/0",) * 30,
        attacks={"hag/0": {"MAP": 0.2, "unique_wins": 4.0}},
        representative={"MAP": 0.1},
        perceptibility={"psnr/mean": float("inf"), "linf/max": 8 / 255},
        flags=(Flag("F1", 0.0, 0.0, "pass", "none"), Flag("F7", 0.1, 0.0, "red", "fix the attack")),
        cost=Cost(100, 90, 0, 3.5),
    )


def test_a_result_reads_like_a_mapping_and_offers_the_nearest_name() -> None:
    made = result()
    assert made["MAP"] == 0.25
    assert made.unreliable
    assert not dataclasses.replace(made, flags=()).unreliable
    with pytest.raises(KeyError, match="did you mean 'MAP@5000'"):
        made["MAP@500"]
    with pytest.raises(ValueError, match="different length"):
        dataclasses.replace(made, winner=("clean",))


def test_saved_and_loaded_results_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    save_results(path, [result(0), result(1, model="csq-32")])
    loaded = load_results(path)
    for before, after in zip([result(0), result(1, model="csq-32")], loaded, strict=True):
        for name in (f.name for f in dataclasses.fields(EvalResult)):
            if name not in ("per_query", "curves"):
                assert getattr(before, name) == getattr(after, name), name
        for name, values in before.per_query.items():
            assert torch.equal(values.nan_to_num(-1), after.per_query[name].nan_to_num(-1))
            assert values.dtype == after.per_query[name].dtype
        assert torch.equal(before.curves["PR"]["precision"], after.curves["PR"]["precision"])
    assert {item.name for item in tmp_path.iterdir()} == {"metrics.json", sidecar_of(path).name}
    text = path.read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    document = json.loads(text)
    assert document["schema"] == "robusthash.results/2"
    assert document["measures"]["MAP@5000"] == {"base": "MAP@5000"}


def sidecar_of(path: Path) -> Path:
    """The file of the arrays of a results file."""
    return path.with_name(f"{path.stem}-{json.loads(path.read_text())['sidecar'][:16]}.npz")


def as_schema_1(path: Path) -> None:
    """Rewrite a results file as the first schema has it: structure in names and texts alone."""
    document = json.loads(path.read_text())
    del document["measures"]
    for entry in document["results"]:
        del entry["attack"], entry["scored_on"]
        for name in ("data", "tier", "relevance"):
            del entry["setting"][name]
    path.write_text(json.dumps({**document, "schema": "robusthash.results/1"}))


def test_results_of_the_first_schema_are_read_into_the_fields_of_the_second(tmp_path: Path) -> None:
    data = DataSet("photos", "a note: with (brackets)", 700, 24)
    place: dict[str, object] = {"database": data.texts[0], "queries": data.texts[1], "data": data}
    found = []
    for direction, relevance in (("I2T", "own"), ("I2T", "class"), ("T2I", "own")):
        scored_on = direction if relevance == "own" else f"{direction} by {relevance}"
        for attack in ("clean", "hag on text", "worst"):
            made = result(0, direction=direction, relevance=relevance, **place)
            name = f"{scored_on} {attack}"
            found.append(dataclasses.replace(made, name=name, attack=attack, scored_on=scored_on))
    suite = {"tier": "paper at most 5 steps", "budget": "suite paper at most 5 steps, 13 lines"}
    made = result(0, direction="T2I", **place, **suite)
    name = "T2I img-linf-8 paper at most 5 steps"
    found.append(dataclasses.replace(made, name=name, attack="worst", scored_on="T2I"))
    path = tmp_path / "metrics.json"
    save_results(path, found)
    as_schema_1(path)
    for before, after in zip(found, load_results(path), strict=True):
        assert after.setting == before.setting
        assert (after.name, after.attack, after.scored_on) == (before.name, before.attack, before.scored_on)
    groups = by_direction({r.name: r for r in load_results(path)[:-1]})
    assert list(groups) == ["I2T", "I2T by class", "T2I"]
    assert all(list(group) == ["clean", "hag on text", "worst"] for group in groups.values())


def test_texts_of_the_first_schema_that_name_no_data_set_stay_names(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    save_results(path, [dataclasses.replace(result(0, database="codes.npz"), name="clean", attack="clean")])
    as_schema_1(path)
    (read,) = load_results(path)
    assert read.setting.data == DataSet("codes.npz")
    assert (read.attack, read.scored_on, read.setting.tier, read.setting.relevance) == (
        "clean",
        "",
        "",
        "own",
    )


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("MAP", MeasureKey("MAP")),
        ("wMAP@5000/mink", MeasureKey("MAP@5000", ("mink",), "worst")),
        ("wMAP/8bit", MeasureKey("MAP", role="worst", storage="8bit")),
        ("t-MAP/max", MeasureKey("MAP", ("max",), "targeted")),
        ("t-MAP@5000/hits/legacy/rounded", MeasureKey("MAP@5000", ("hits", "legacy"), "targeted", "rounded")),
        ("collateral MAP", MeasureKey("MAP", role="collateral")),
        ("MAP under pgd/8bit", MeasureKey("MAP", attack="pgd/8bit")),
        ("wMAP eps 1.5e-05", MeasureKey("MAP", role="worst", eps=1.5e-05)),
        ("P@r<=2", MeasureKey("P@r<=2")),
        ("WAP", MeasureKey("WAP")),
        ("t-PR/radius", MeasureKey("PR", ("radius",), "targeted")),
        ("t-ASR", MeasureKey("ASR", role="targeted")),
        ("exposure@10/8bit", MeasureKey("exposure@10", storage="8bit")),
        ("curve score", MeasureKey("curve score")),
    ],
)  # fmt: skip
def test_a_measure_is_parsed_and_named_again(name: str, key: MeasureKey) -> None:
    assert MeasureKey.parse(name) == key
    assert str(key) == name


def test_a_key_names_its_kin() -> None:
    key = MeasureKey.parse("MAP@5000/expected")
    assert key.is_ap
    assert key.ties == "expected"
    assert key.name("worst", storage="8bit") == "wMAP@5000/expected/8bit"
    assert MeasureKey("MAP").name(attack="hag") == "MAP under hag"
    assert not MeasureKey.parse("WAP").is_ap
    assert result()[MeasureKey("MAP@5000")] == result()["MAP@5000"]


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_results(tmp_path / name / "metrics.json", [result()])
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("a", "b"))
    assert one == two
    assert len(one) == 2


def test_nan_is_refused_by_name_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    save_results(path, [result()])
    before = path.read_bytes()
    broken = dataclasses.replace(result(), values={"MAP": float("nan")})
    with pytest.raises(ValueError, match=r"results\[0\]\.values\.MAP is NaN"):
        save_results(path, [broken])
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match=r"saved as \.json"):
        save_results(tmp_path / "metrics.txt", [result()])


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    with pytest.raises(FileNotFoundError):
        load_results(path)
    path.write_text("not json")
    with pytest.raises(ValueError, match="is not JSON"):
        load_results(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="names no schema"):
        load_results(path)
    path.write_text('{"schema": "robusthash.results/99"}')
    with pytest.raises(ValueError, match="results/99"):
        load_results(path)
    save_results(path, [result()])
    document = json.loads(path.read_text())
    del document["results"][0]["setting"]["bits"]
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="is damaged"):
        load_results(path)


def test_a_pair_that_does_not_belong_together_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    save_results(path, [result(0)])
    older = sidecar_of(path).read_bytes()
    save_results(path, [result(1)])
    sidecar_of(path).write_bytes(older)
    with pytest.raises(ValueError, match="does not belong"):
        load_results(path)
    sidecar_of(path).unlink()
    with pytest.raises(FileNotFoundError, match=r"metrics-\w+\.npz, which is missing"):
        load_results(path)


def as_earlier_versions(path: Path) -> None:
    """Rename the arrays as versions did that wrote them over those before."""
    sidecar_of(path).rename(path.with_suffix(".npz"))


def test_results_of_earlier_versions_are_read_and_their_arrays_go_with_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    save_results(path, [result(0)])
    as_earlier_versions(path)
    (read,) = load_results(path)
    assert torch.equal(read.per_query["MAP@5000"], result(0).per_query["MAP@5000"])
    beside = [
        tmp_path / name for name in ("other.npz", "metrics-by-hand.npz", "metrics2-0123456789abcdef.npz")
    ]
    for other in beside:
        other.write_bytes(b"not ours")
    save_results(path, [result(1)])
    assert {item.name for item in tmp_path.iterdir()} == {
        path.name, sidecar_of(path).name, *(other.name for other in beside)
    }  # fmt: skip


@pytest.mark.parametrize("earlier", [False, True], ids=["by content", "of earlier versions"])
def test_whenever_a_writer_ends_the_results_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool
) -> None:
    """The writer is stopped before each change that it makes to the folder, in turn."""
    path, left = tmp_path / "metrics.json", 0
    replaced, removed = os.replace, Path.unlink
    seen = set()
    for stop in range(6):
        save_results(path, [result(0)])
        if earlier:
            as_earlier_versions(path)
        left = stop

        def count(change: object) -> object:
            def counted(*arguments: object, **options: object) -> object:
                nonlocal left
                left -= 1
                if left < 0:
                    raise KeyboardInterrupt
                return change(*arguments, **options)  # type: ignore[operator]

            return counted

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(os, "replace", count(replaced))
            patch.setattr(Path, "unlink", count(removed))
            save_results(path, [result(1)])
        (read,) = load_results(path)
        seen.add(float(read.per_query["MAP@5000"][0]))
    assert seen == {float(result(seed).per_query["MAP@5000"][0]) for seed in (0, 1)}


@pytest.mark.parametrize("name", ["../../etc/passwd", 7, None, "ab" * 31])
def test_a_sidecar_is_named_by_a_digest_alone(tmp_path: Path, name: object) -> None:
    path = tmp_path / "metrics.json"
    save_results(path, [result(0)])
    path.write_text(json.dumps({**json.loads(path.read_text()), "sidecar": name}))
    with pytest.raises(ValueError, match="damaged: it names no sidecar"):
        load_results(path)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"database": "other"}, "database"),
        ({"queries": "other"}, "queries"),
        ({"threat": "img-l2"}, "threat"),
        ({"attacks": ("hag",)}, "attacks"),
        ({"budget": "1 x 10 steps"}, "budget"),
        ({"seeds": (5,)}, "seeds"),
        ({"direction": "I2T"}, "direction"),
        ({"protocol": load_protocol("saat").settings()}, "protocol.k"),
        ({"digests": {**setting().digests, "database": "XX"}}, "digests.database"),
        ({"digests": {**setting().digests, "more": "XX"}}, "digests.more"),
    ],
)  # fmt: skip
def test_comparison_is_refused_and_names_the_field(changes: dict[str, object], field: str) -> None:
    with pytest.raises(ValueError, match=rf"differ in .*\b{field}\b"):
        compare(result(0), result(1, **changes))


def test_budgets_are_compared_by_identity_and_of_older_results_by_text() -> None:
    digests = setting().digests
    made = setting(digests={**digests, "budget": "2-aa"})
    reworded = setting(digests={**digests, "budget": "2-aa"}, budget="200 steps in all")
    other = setting(digests={**digests, "budget": "2-bb"})
    assert made.differs(reworded) == []
    assert made.differs(other) == ["budget"]
    assert made.differs(setting()) == [], "made before budgets had an identity"
    assert reworded.differs(setting()) == ["budget"]
    assert other.differs(setting(digests={**digests, "budget": "3-aa"})) == [], (
        "of two schemes the text decides"
    )
    assert reworded.differs(setting(digests={**digests, "budget": "3-aa"})) == ["budget"]


def test_suites_of_two_schemes_are_said_to_be_of_two_schemes(tmp_path: Path) -> None:
    digests = setting().digests
    older = result(0, digests={**digests, "suite": "9a17fc952c2c"})  # as the first scheme wrote it
    save_results(tmp_path / "assess.json", [older])
    (read,) = load_results(tmp_path / "assess.json")
    assert read.setting == older.setting
    newer = result(1, digests={**digests, "suite": "2-ba886e2e19e0"})
    said = r"differ in digests.suite \(identities by the schemes 1 and 2 .*; assess the older one again\)"
    for pair in ((read, newer), (newer, read)):
        with pytest.raises(ValueError, match=said):
            compare(*pair)
    with pytest.raises(ValueError, match=r"differ in digests.suite;"):
        compare(newer, result(1, digests={**digests, "suite": "2-0"}))
    assert older.setting.difference(read.setting) == ""


def test_models_may_differ_also_after_a_round_trip(tmp_path: Path) -> None:
    digests = {**setting().digests, "model": "zz", "codes": "yy"}
    other = result(
        1, model="csq-64", bits=64, objective="csq", defense="saat", training_attack="pgd", digests=digests
    )
    save_results(tmp_path / "metrics.json", [other])
    differences = compare(result(0), load_results(tmp_path / "metrics.json")[0])
    expected = result(0).per_query["MAP@5000"] - other.per_query["MAP@5000"]
    made = differences["MAP@5000"]
    assert made.mean == pytest.approx(float(expected.mean()))
    assert made.interval[0] < made.mean < made.interval[1]
    assert made.p <= made.p_holm <= 1
    assert differences["R@100"].queries == 29
    assert differences["flips"].p == 1


def test_a_clear_difference_is_significant_after_correction() -> None:
    better = result(0)
    worse = dataclasses.replace(
        better, per_query={name: values - 0.1 for name, values in better.per_query.items()}
    )
    difference = compare(better, worse)["MAP@5000"]
    assert difference.mean == pytest.approx(0.1)
    assert difference.p_holm < 0.001
    with pytest.raises(ValueError, match="share no per-query measure"):
        compare(better, dataclasses.replace(worse, per_query={}, winner=()))
