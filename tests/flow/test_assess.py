"""``robusthash assess`` end to end: the table, JSON, going on after a kill, shards, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from robusthash.apps.commands import assess_command as suite_verb
from robusthash.apps.experiment import assess_run as assessing
from robusthash.apps.experiment import evaluation_stages, model_stages, run_directory, training_stages
from robusthash.apps.experiment.config import make_config
from robusthash.apps.experiment.run_directory import RunError, load_run
from robusthash.attacks.threat_model import edit_threat, image_threat
from robusthash.core.runtime import silent
from robusthash.data import RetrievalData, load_data
from robusthash.evaluation.attack_spec import GradientAttack
from robusthash.evaluation.context import make_context
from robusthash.metrics.results import load_results
from robusthash.models.hasher import build_hasher
from robusthash.robustness import suite, tiers
from robusthash.robustness.assess import assess, run_shard
from robusthash.robustness.suite import tier as suite_tier

CONFIG = {
    "name": "tiny",
    "data": {"name": "synthetic", "train": 64, "query": 24, "database": 64},
    "hasher": {"bits": 12, "image": {"name": "small", "width": 4}},
    "training": {"objective": "csq", "epochs": 2, "batch_size": 32, "optim": {"hasher": {"lr": 0.05}}},
    "evaluation": {"batch_size": 8, "queries": 3},
    "runtime": {"device": "cpu"},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return training_stages.train(make_config(CONFIG), tmp_path).path


def blocks(run: Path) -> dict[str, dict[str, np.ndarray]]:
    """All that is kept, without the times."""
    found = {}
    for path in sorted((run / "assess").rglob("*.npz")):
        with np.load(path) as arrays:
            found[str(path.relative_to(run))] = {n: arrays[n] for n in arrays.files if n != "seconds"}
    return found


def equal(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for path, arrays in left.items():
        for name, values in arrays.items():
            np.testing.assert_array_equal(values, right[path][name], err_msg=f"{path} {name}")


def test_the_verb_shows_a_table_and_json_and_writes_the_record(call, run):
    code, out, err = call("assess", run, "--tier", "smoke", "--queries", "20", "--eps-curve", "--json")
    assert code == 0, err
    shown = json.loads(out)
    assert shown["name"] == "img-linf-8 smoke"
    assert shown["values"]["wMAP"] <= shown["values"]["clean"]
    assert shown["setting"]["queries"].endswith("query[20]"), (
        "the 3 queries of the recipe are not the suite's"
    )
    assert shown["curves"]["wMAP/eps"]["wMAP"][0] == pytest.approx(shown["values"]["clean"])
    (written,) = load_results(run / "assess.json")
    assert written["wMAP"] == shown["values"]["wMAP"]
    assert written.setting.digests["model"] == load_run(run).card()["digest"]
    code, out, err = call("assess", run, "--tier", "smoke", "--threat", "img-linf-4")
    assert code == 0, err
    for word in ("wMAP/8bit", "HRS", "unique wins", "guided", "24 queries", "floor"):
        assert word in out
    assert {result.name for result in load_results(run / "assess.json")} == {
        "img-linf-8 smoke",
        "img-linf-4 smoke",
    }


def test_the_hasher_loads_without_its_objective(run, monkeypatch):
    trained = load_run(run)
    monkeypatch.setattr(run_directory, "build", lambda *_: pytest.fail("no objective is needed"))
    assert model_stages.load_hasher(trained).bits == trained.card()["hasher"]["bits"]


def test_after_a_kill_and_in_shards_the_records_are_the_same(call, run, monkeypatch):
    saved = assessing.FolderStore.save
    whole = assessing.assess(load_run(run), "smoke")
    expected = blocks(run)
    assert len(expected) == 3
    _forget(run)

    def dies(store, spec, restart, block, attacked):
        if block == 1:
            raise KeyboardInterrupt
        saved(store, spec, restart, block, attacked)

    with monkeypatch.context() as patched:
        patched.setattr(assessing.FolderStore, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            assessing.assess(load_run(run), "smoke")
    assert len(blocks(run)) == 1
    again = assessing.assess(load_run(run), "smoke")
    equal(blocks(run), expected)
    assert again.values == whole.values
    _forget(run)
    for part in ("0/2", "1/2"):
        code, _, err = call("assess", run, "--tier", "smoke", "--shard", part)
        assert code == 0
        assert f"shard {part} is done" in err
    equal(blocks(run), expected)
    assert assessing.assess(load_run(run), "smoke").values == whole.values


def _forget(run: Path) -> None:
    for path in (run / "assess").rglob("*.npz"):
        path.unlink()


@pytest.fixture
def coarser(monkeypatch) -> RetrievalData:
    """The data of ``CONFIG`` with a second label system, ``coarse``: two classes are one."""
    own = model_stages.read_data(make_config(CONFIG))
    splits = {}
    for name, part in own.splits.items():
        pairs = part.labels.unflatten(1, (-1, 2)).amax(2)
        splits[name] = replace(part, also={"coarse": pairs})
    both = replace(own, **splits)
    for stages in (assessing, evaluation_stages, training_stages):
        monkeypatch.setattr(stages, "read_data", lambda *_: both)
    return both


def test_another_label_system_is_what_attackers_and_scores_go_by(call, run, coarser):
    """Its results stand besides those by the labels of the data, under a name that says it."""
    code, _, err = call("assess", run, "--tier", "smoke")
    assert code == 0, err
    code, out, err = call("assess", run, "--tier", "smoke", "--relevance", "coarse", "--json")
    assert code == 0, err
    assert json.loads(out)["name"] == "by coarse img-linf-8 smoke"
    fine, wide = load_results(run / "assess.json")
    assert (fine.setting.relevance, wide.setting.relevance) == ("own", "coarse")
    assert wide.reference["chance"] > fine.reference["chance"]
    code, _, err = call("assess", run, "--tier", "smoke", "--relevance", "coarse", "--attack", "pgd")
    assert code == 1
    assert "have 4 of another system, for which it has no centers: leave out attacks on the trained" in err
    code, _, err = call("assess", run, "--relevance", "colour")
    assert code == 1
    assert "no labels 'colour' besides its own; it has ['coarse']" in err


def test_an_evaluation_by_another_label_system(tmp_path, coarser):
    config = make_config({**CONFIG, "evaluation": {"relevance": ["own", "coarse"], "attacks": ["mainstay"]}})
    results = evaluation_stages.evaluate(training_stages.train(config, tmp_path))
    assert list(results) == [
        "clean",
        "mainstay",
        "worst",
        *(f"by coarse {n}" for n in ("clean", "mainstay", "worst")),
    ]
    for name in ("clean", "mainstay"):
        assert results[f"by coarse {name}"]["MAP"] > results[name]["MAP"]


def test_a_damaged_generator_is_refused_where_its_blocks_are_stored(call, run, tmp_path):
    file = tmp_path / "generator.pt"
    own = json.dumps({"name": "pros-gan", "epochs": 1, "width": 2, "hidden": 8, "generator": str(file)})
    assert call("assess", run, "--tier", "smoke", "--attack", own)[0] == 0
    file.write_bytes(file.read_bytes()[:100])
    code, _, err = call("assess", run, "--tier", "smoke", "--attack", own)
    assert code == 1
    assert "is no file of a generator" in err


def test_damaged_blocks_and_bad_words_are_refused(call, run):
    assessing.assess(load_run(run), "smoke")
    victim = next(run.rglob("*/0/0.npz"))
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(RunError, match="damaged"):
        assessing.assess(load_run(run), "smoke")
    for arguments, said in [
        (["--tier", "smok"], "'smoke'"),
        (["--threat", "img-linf"], "no threat is called 'img-linf'"),
        (["--threat", "txt-bow-3"], "queries are images"),
        (["--shard", "2/2"], "2/2"),
        (["--direction", "image"], "I2T"),
    ]:
        code, _, err = call("assess", run, *arguments)
        assert code == (2 if "--direction" in arguments else 1)  # of few words: refused by the parser
        assert said in err


@pytest.mark.parametrize("text", ["[]", "{}", '{"hasher'])
def test_a_damaged_model_card_is_named(run, text):
    (run / "model.json").write_text(text)
    with pytest.raises(RunError, match=r"model\.json is damaged"):
        load_run(run).card()


def test_a_claim_has_lines_that_only_ask_and_all_flags(run, monkeypatch, capsys):
    """The standard tier, made small: noise and questions beside the gradient lines, and every check that has
    an id."""
    monkeypatch.setitem(suite.TIERS, "standard", suite._Tier(("guided",), 1, 4, 24, 2))
    monkeypatch.setitem(tiers.ORACLE_QUERIES, "standard", 5)
    monkeypatch.setattr(tiers, "CHECKED", 6)
    config = {**CONFIG, "runtime": {**CONFIG["runtime"], "seed": 1}}
    trainings = [{**CONFIG["training"], "epochs": epochs} for epochs in (1, 2)]
    twins = [
        training_stages.train(make_config({**config, "training": each}), run.parent.parent)
        for each in trainings
    ]
    result = assessing.assess(load_run(run), "standard", surrogates=twins)
    transfers = {f"transfer tiny-{twin.id}" for twin in twins}
    assert {"guided", "uniform noise", "corner noise", "square, ids", *transfers} <= set(result.attacks)
    assert "2 of the 3 surrogates that a claim is made with" in result.notes
    for given, words in (
        ([load_run(run)], "has the weights of the victim"),
        ([twins[0]] * 2, "is given twice"),
    ):
        with pytest.raises(ValueError, match=words):
            assessing.assess(load_run(run), "standard", surrogates=given)
    flags = {flag.id: flag for flag in result.flags}
    assert set(flags) == {f"F{number}" for number in range(1, 24)}
    assert flags["F7"].level == "amber"  # no curve was run
    for ran in ("F4", "F5", "F6", "F8", "F9"):
        assert flags[ran].value < float("inf")
    monkeypatch.setattr(
        GradientAttack, "run", lambda *_: pytest.fail("the attacks of the checks are kept as well")
    )
    assert assessing.assess(load_run(run), "standard", surrogates=twins).flags == result.flags
    suite_verb.print_assessment(result)
    assert "remedy" in capsys.readouterr().out


GATED = {**CONFIG["hasher"], "purifiers": {"image": "spectral-gate"}}


@pytest.mark.parametrize(
    ("name", "hasher"),
    [
        ("smoke", CONFIG["hasher"]),
        ("fast", CONFIG["hasher"]),
        ("standard", CONFIG["hasher"]),
        ("standard", GATED),
    ],
    ids=["smoke", "fast", "standard", "standard of a gated victim"],
)
def test_python_and_the_command_line_run_the_same_tier(call, tmp_path, monkeypatch, name, hasher):
    """One name, one number: the same attacks, values, flags, notes and digest."""
    cut = {"standard": ("guided", "flip")}.get(name, suite.TIERS[name].names)
    monkeypatch.setitem(suite.TIERS, name, suite._Tier(cut, 1, 4, 12, 2, targeted=name == "standard"))
    monkeypatch.setitem(tiers.ORACLE_QUERIES, "standard", 5)
    monkeypatch.setattr(tiers, "CHECKED", 6)
    trained = training_stages.train(make_config({**CONFIG, "hasher": hasher}), tmp_path)
    code, _, err = call("assess", trained.path, "--tier", name, "--eps-curve")
    assert code == 0, err
    (written,) = load_results(trained.path / "assess.json")

    victim, objective = model_stages.load_victim(trained)
    context = make_context(victim, model_stages.read_data(trained.config, silent), batch_size=8)
    result = assess(context, name, objective=objective, curve=True)
    assert result.attacks.keys() == written.attacks.keys()
    assert result.setting.attacks == written.setting.attacks
    assert result.flags == written.flags
    assert bool(result.flags) == (name != "smoke")
    assert result.setting.digests["suite"] == written.setting.digests["suite"]
    assert (result.name, result.setting.budget, result.notes) == (
        written.name,
        written.setting.budget,
        written.notes,
    )
    assert not result.setting.differs(written.setting)
    assert result.values == written.values
    expected = {"smoke": set(), "fast": {"noise"}, "standard": {"noise", "black-box"}}[name]
    prepared = tiers.prepare_tier(context, name, objective=objective)
    kinds = {spec.kind for spec in prepared.suite.specs} - {"white-box"}
    assert kinds == (expected | {"adaptive"} if hasher is GATED else expected)
    assert ("trained-objective" in result.attacks) == (hasher is GATED)


def test_shards_of_a_tier_in_python_are_joined_by_the_same_call(run, tmp_path, monkeypatch):
    monkeypatch.setitem(suite.TIERS, "fast", suite._Tier(("guided",), 1, 4, 20, 2))
    victim, objective = model_stages.load_victim(load_run(run))
    context = make_context(victim, load_data(**CONFIG["data"]), batch_size=8)
    store = assessing.FolderStore(tmp_path / "blocks")
    expected = assess(context, "fast", objective=objective, checked=False)
    for shard in ((0, 2), (1, 2)):
        run_shard(context, "fast", shard, objective=objective, store=store)
    with monkeypatch.context() as stopped:
        stopped.setattr(GradientAttack, "run", lambda *_: pytest.fail("every block is there"))
        result = assess(context, "fast", objective=objective, checked=False, store=store)
    assert result.values == expected.values
    assert list(result.attacks) == ["guided", "uniform noise", "corner noise"]


def test_what_a_tier_takes_is_refused_where_it_means_nothing(run):
    victim, objective = model_stages.load_victim(load_run(run))
    context = make_context(victim, load_data(**CONFIG["data"]), queries=4)
    own = suite_tier("smoke")
    for words, options in (
        ("go with a tier by name", {"suite": own, "objective": objective}),
        ("take eps_curve", {"suite": own, "curve": True}),
        ("give it as objective=", {"suite": "paper"}),
    ):
        with pytest.raises(ValueError, match=words):
            assess(context, **options)
    with pytest.raises(KeyError, match="did you mean 'standard'"):
        assess(context, "standart")
    result = assess(context, own, queries=3)
    assert list(result.attacks) == ["guided"]
    assert result.setting.queries.endswith("query[3]")


def test_adaptive_lines_go_with_the_defense():
    data = load_data("synthetic")
    gated = build_hasher(bits=12, image={"name": "small", "width": 4}, purifiers={"image": "spectral-gate"})
    threat = image_threat(knowledge="W2")
    for hasher, expected in (
        (gated, True),
        (build_hasher(bits=12, image={"name": "small", "width": 4}), False),
    ):
        context = make_context(hasher, data, queries=4)
        specs = tiers.extra_attacks(context, None, threat, "standard", (), tiers.observe(context, threat))
        assert any(spec.kind == "adaptive" for spec in specs) == expected
        assert {spec.kind for spec in tiers.extra_attacks(context, None, threat, "fast")} == {"noise"}
    assert tiers.extra_attacks(context, None, threat, "smoke") == ()


def test_where_no_gradient_arrives_the_white_box_lines_are_left_out():
    threat = image_threat(knowledge="W2")
    whole = suite_tier("fast", threat, extra_attacks=tiers.noise_attacks(threat))
    assert [spec.kind for spec in tiers.without_gradient(whole).specs] == ["noise", "noise"]
    words = suite_tier("standard", edit_threat(2))
    assert [spec.name for spec in tiers.without_gradient(words).specs] == ["exact", "refined exact"]


def test_the_paper_tier_stands_apart(call, run):
    code, out, err = call("assess", run, "--tier", "paper", "--queries", "4", "--steps", "5", "--json")
    assert code == 0, err
    shown = json.loads(out)
    assert shown["name"] == "img-linf-8 paper at most 5 steps"
    assert shown["setting"]["budget"].startswith("suite paper at most 5 steps, ")
    assert shown["attacks"]["tha"]["fit steps"] >= 500
    assert "fit steps" not in shown["attacks"]["dhta"]
    assert shown["flags"] == []
    assert not shown["attacks"].keys() & {"guided", "soft-ap", "corner noise"}
    assert {"mainstay", "hag", "pgd-20"} <= shown["attacks"].keys()
    assert "MAP@5000/hits/legacy" in shown["attacks"]["mainstay"]
    code, _, err = call("assess", run, "--tier", "paper", "--eps-curve")
    assert code == 1
    assert "'paper' does not have" in err
    code, _, err = call("assess", run, "--tier", "fast", "--steps", "5")
    assert code == 1
    assert "--steps shortens the attacks of the tier 'paper'" in err


@pytest.mark.parametrize("reached", [0.5, 0.0])
def test_only_a_cut_graph_loses_its_white_box_lines(run, monkeypatch, reached):
    looked = tiers.observe
    monkeypatch.setattr(
        tiers, "observe", lambda context, threat: replace(looked(context, threat), reached=reached)
    )
    result = assessing.assess(load_run(run), "fast", queries=4, checked=False)
    assert result is not None
    assert ("guided" in result.attacks) == (reached > 0)
    assert any("no gradient reaches the input" in note for note in result.notes) == (reached == 0)
    if reached == 0:
        paper = assessing.assess(load_run(run), "paper", queries=4, steps=2, checked=False)
        assert paper is not None  # what needs no gradient of the victim stays
        assert "aach" in paper.attacks
        assert "mainstay" not in paper.attacks
