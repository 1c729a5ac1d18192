"""Code from outside of the package: ``module:name`` in recipes, commands, runs, exported models, entry points."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import robusthash as rh
from robusthash.apps.experiment.config import ConfigError, load_config
from robusthash.apps.experiment.run_directory import RunError, load_run
from robusthash.core import plugins, registry
from robusthash.core.plugins import PLUGINS
from robusthash.models.external.loaders import load_python
from robusthash.models.saved_hasher import load_exported, save_exported

LOSS = '''
from robusthash.core.labels import relevant
from robusthash.core.registry import register
from robusthash.objectives.base import HashObjective, quantisation


@register("objective", "pairwise-cosine")
class PairwiseCosine(HashObjective):
    """Cosine of the codes to the pair label."""

    def similarity(self, output, labels, codes, code_labels):
        wanted = 2 * relevant(labels, code_labels).float() - 1
        return (output.code @ codes.T / codes.shape[1] - wanted).square().mean(1)

    def regularisation(self, output):
        return 0.1 * quantisation(output)


class Bare(PairwiseCosine):
    pass
'''

ATTACK = '''
from robusthash.attacks import Attack, image_threat
from robusthash.attacks.guides import Mainstay
from robusthash.attacks.losses import ScaleFree
from robusthash.attacks.pgd import PGD
from robusthash.core.registry import register


@register("attack", "two-steps")
def two_steps(eps: float = 8 / 255) -> Attack:
    """Two steps of PGD."""
    return Attack("two-steps", Mainstay(), ScaleFree(), PGD(2, eps), image_threat(eps))
'''

NET = """
import torch


class Net(torch.nn.Module):
    def forward(self, images):
        return images.flatten(1)[:, :16] - 0.5
"""

RECIPE = """
data: {name: synthetic, train: 24, query: 12, database: 24, size: 12}
hasher: {bits: 8}
training: {objective: "OBJECTIVE", epochs: 1}
evaluation: {attacks: ["plug_attack:two_steps"]}
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a recipe, a loss, an attack and a net, on nobody's path; a state folder of its own."""
    folder = tmp_path / "own"
    folder.mkdir()
    for name, text in (("plug_loss", LOSS), ("plug_attack", ATTACK), ("plug_net", NET)):
        (folder / f"{name}.py").write_text(text)
    (folder / "own.yaml").write_text(RECIPE.replace("OBJECTIVE", "plug_loss:PairwiseCosine"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv(PLUGINS, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    registry.catalogue()
    monkeypatch.setattr(registry, "_CARDS", dict(registry._CARDS))
    yield folder
    forget()


def forget() -> None:
    """As a new process that has imported no plug-in."""
    for name in [name for name in sys.modules if name.startswith("plug_")]:
        del sys.modules[name]
    sys.path[:] = [entry for entry in sys.path if "own" not in Path(entry).name]
    for key in [key for key, card in registry._CARDS.items() if card.make.__module__.startswith("plug_")]:
        del registry._CARDS[key]


def trained(own: Path) -> Path:
    from robusthash.apps.experiment import training_stages

    return training_stages.train(load_config(own / "own.yaml"), own.parent / "runs").path


def test_the_python_name_and_the_registered_one(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own)
    by_python = registry.card("objective", "plug_loss:PairwiseCosine")
    assert by_python is registry.card("objective", "plug_loss:pairwise-cosine")
    assert by_python.name == "pairwise-cosine"
    assert load_python("plug_net:Net")(
        rh.load_data("synthetic").query.batch(torch.arange(2)).inputs["image"]
    ).shape == (2, 16)


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (
            "nomod:thing",
            r"no Python module 'nomod' \(wanted by 'nomod:thing'\) in .*; go to its folder, put it next to",
        ),
        ("plug_loss:PairwiseCosin", "has no objective 'PairwiseCosin'; did you mean 'PairwiseCosine'"),
        ("plug_loss:Bare", r"is not registered: write @register\('objective', 'Bare'\) above it"),
        ("plug_attack:two_steps", "is registered as attack 'two-steps'; here goes: objective"),
        ("plug_net:nothing", "has no objective 'nothing'.* registers no objective"),
        ("plug_loss:csq", "has no objective 'csq'"),
        (":csq", "write module:name"),
    ],
)
def test_one_line_with_a_remedy(own: Path, named: str, said: str) -> None:
    (own / "bad.yaml").write_text(RECIPE.replace("OBJECTIVE", named))
    with pytest.raises(ConfigError, match=r"bad\.yaml: training\.objective: .*" + said):
        load_config(own / "bad.yaml")


def test_a_module_that_fails_is_named_with_its_line(own: Path) -> None:
    (own / "plug_loss.py").write_text("import os\nx = 1 / 0\n")
    with pytest.raises(ConfigError, match=r"cannot be imported: ZeroDivisionError.*plug_loss\.py, line 2"):
        load_config(own / "own.yaml")


def test_extends_finds_what_lies_beside_the_base(own: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "child.yaml").write_text("extends: ../own/own.yaml\n")
    assert load_config(tmp_path / "other" / "child.yaml").training.objective == "plug_loss:PairwiseCosine"


def test_a_run_opens_without_a_path_if_its_source_is_where_it_was(own: Path) -> None:
    path = trained(own)
    held = json.loads((path / "plugins.json").read_text())
    assert held["plug_loss"]["file"] == str(own / "plug_loss.py")
    forget()
    run = load_run(path)
    assert type(run.load_model()[1]).__name__ == "PairwiseCosine"
    forget()
    (own / "plug_loss.py").rename(own / "elsewhere.py")
    with pytest.raises(RunError, match=r"plug_loss\.py is gone; put it back"):
        load_run(path)


def test_a_changed_source_is_refused_unless_it_is_allowed(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = trained(own)
    forget()
    (own / "plug_loss.py").write_text(LOSS.replace("0.1", "0.2"))
    with pytest.raises(RunError, match=rf"has changed since .* {PLUGINS}=plug_loss"):
        load_run(path)
    with pytest.raises(RunError, match=r"begun with another .*another name"):
        trained(own)
    forget()
    monkeypatch.setenv(PLUGINS, "plug_loss")
    assert load_run(path).config.training.objective == "plug_loss:PairwiseCosine"
    forget()
    monkeypatch.setenv("XDG_STATE_HOME", str(own / "another user"))
    monkeypatch.delenv(PLUGINS)
    with pytest.raises(RunError, match=rf"{PLUGINS}=plug_loss,plug_attack$"):  # all at once
        load_run(path)


def test_an_allowed_module_that_is_not_there_is_named_with_what_helps(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = trained(own)
    forget()
    (own / "plug_loss.py").rename(own / "elsewhere.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(PLUGINS, "plug_loss,plug_attack")
    with pytest.raises(RunError, match=r"no Python module 'plug_loss'.*; go to its folder, or install it$"):
        load_run(path)


def test_a_strangers_record_of_its_own_code_is_no_word_to_go_by(own: Path, tmp_path: Path) -> None:
    """The digest in a run is right, and the file lies where it says; this user never used it."""
    path = trained(own)
    forget()
    evil = own / "plug_evil.py"
    evil.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n{LOSS}")
    config = (path / "config.yaml").read_text().replace("plug_loss", "plug_evil")
    (path / "config.yaml").write_text(config)
    facts = {"file": str(evil), "sha256": plugins._sha256(evil)}
    held = json.loads((path / "plugins.json").read_text())
    (path / "plugins.json").write_text(json.dumps({**held, "plug_evil": facts}))
    with pytest.raises(RunError, match=rf"that no command of yours has used yet; .* {PLUGINS}=plug_evil$"):
        load_run(path)
    mine = held["plug_loss"]  # a source that this user trusts, under the name of another
    (path / "plugins.json").write_text(json.dumps({**held, "plug_evil": mine}))
    with pytest.raises(RunError, match="names 'plug_evil:PairwiseCosine', and its source file"):
        load_run(path)
    (path / "plugins.json").write_text('{"plug_evil": 3}')
    with pytest.raises(RunError, match=r"plugins\.json is damaged"):
        load_run(path)
    assert not (tmp_path / "ran").exists()


SECOND = '''
from dataclasses import dataclass

from robusthash.attacks import Attack, image_threat
from robusthash.attacks.base import Loss
from robusthash.attacks.guides import Mainstay
from robusthash.attacks.pgd import PGD
from robusthash.core.registry import register


@register("attack-loss", "own-agreement")
@dataclass(frozen=True)
class OwnAgreement(Loss):
    """Agreement."""

    def __call__(self, probe, guidance):
        return (probe.relaxed() * guidance.codes).mean(1)


@register("attack", "second")
def second(eps: float = 32 / 255) -> Attack:
    """Two steps of PGD on the own agreement."""
    return Attack("second", Mainstay(), OwnAgreement(), PGD(2, eps), image_threat(eps))
'''


def test_attacked_queries_of_another_version_are_not_taken(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parameters of the attack are the same, and its code is another."""
    from robusthash.apps.experiment import assess_run, evaluation_stages

    run = load_run(trained(own))
    monkeypatch.chdir(own)
    found = []
    for version in (SECOND, SECOND.replace("return (probe", "return -(probe")):
        (own / "plug_second.py").write_text(version)
        sys.modules.pop("plug_second", None)
        for key in [key for key, card in registry._CARDS.items() if card.make.__module__ == "plug_second"]:
            del registry._CARDS[key]
        evaluated = evaluation_stages.evaluate(run, attacks=["plug_second:second"])["second"]
        assessed = assess_run.assess(run, "smoke", "img-linf-32", attacks=["plug_second:second"])
        assert assessed is not None
        found.append(evaluated.perceptibility["l2/mean"])
    assert found[0] != found[1]
    assert len(list(run.path.glob("assess/*/second-*"))) == 2
    assert "img-linf-32 smoke with second" in run.assessed()


def test_an_exported_model_holds_its_sources(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own / "plug_head.py").write_text(HEAD)
    monkeypatch.chdir(own)
    hasher = rh.build_hasher(bits=8, image="small", head="plug_head:Halved")
    save_exported(tmp_path / "model", hasher, {"image_size": [12, 12]})
    forget()
    monkeypatch.chdir(tmp_path)
    assert load_exported(tmp_path / "model")[0].bits == 8
    forget()
    (own / "plug_head.py").write_text(f"{HEAD}# changed\n")
    with pytest.raises(RunError, match="has changed since"):
        load_exported(tmp_path / "model")


HEAD = '''
from robusthash.core.registry import register
from robusthash.models.heads import TanhHead


@register("head", "halved")
class Halved(TanhHead):
    """Logits of half the size."""
'''


def test_the_command_line_finds_own_attacks_and_nets(own: Path) -> None:
    """Recipe beside its loss, an attack in the current folder, a run that needs neither on the path."""
    environment = {k: v for k, v in os.environ.items() if k != PLUGINS}

    def robusthash(*words: str, folder: Path = own) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "robusthash", *words]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    done = robusthash("train", "own/own.yaml", "--json", folder=own.parent)
    assert done.returncode == 0, done.stderr
    run = str(own.parent / json.loads(done.stdout)["run"])
    done = robusthash(
        "assess", run, "--tier", "smoke", "--attack", "plug_attack:two_steps", "--eps", "4/255", "--json"
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["name"] == "img-linf-4 smoke with two-steps"
    assert {"guided", "two-steps"} == set(answer["attacks"])
    done = robusthash("assess", run, "--tier", "smoke", "--attack", "nomod:thing")
    assert done.returncode == 1
    assert "no Python module 'nomod'" in " ".join(done.stderr.split())


def test_entry_points_register_and_a_broken_one_is_named(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    points = [
        metadata.EntryPoint("losses", "plug_loss", plugins.GROUP),
        metadata.EntryPoint("broken", "plug_not_there", plugins.GROUP),
    ]
    monkeypatch.setattr(metadata, "entry_points", lambda group: points if group == plugins.GROUP else [])
    monkeypatch.syspath_prepend(str(own))
    monkeypatch.setattr(registry, "_POINTS", [plugins.GROUP])
    with pytest.warns(
        UserWarning, match=r"plug-in 'broken' \(plug_not_there\) is left out: ModuleNotFoundError"
    ):
        assert registry.card("objective", "pairwise-cosine").make.__module__ == "plug_loss"
