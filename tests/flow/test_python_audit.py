"""The audit in Python gives the numbers of the command line, whichever way a net is handed over."""

from __future__ import annotations

import json

import pytest
from torch import nn
from typer.testing import CliRunner

import robusthash as rh
from robusthash.apps.cli import app
from robusthash.core.atomic_files import json_text

NET = '''
import torch
from torch import nn


class Net(nn.Module):
    """Edges and their signs."""

    def __init__(self, inside=True):
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 5, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 49, 24))
        self.drop, self.inside = nn.Dropout(), inside

    def forward(self, x):
        return self.layers((x - 0.5) / 0.25 if self.inside else x)
'''


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    (tmp_path / "net_of_theirs.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import net_of_theirs

    return net_of_theirs.Net


def test_every_way_gives_the_same_numbers(theirs):
    command = "audit net_of_theirs:Net --tier smoke --queries 4 --attacked 2 --size 32 --out cli --json"
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == 0, done.output
    expected = json.loads(done.stdout)
    net = theirs().train()
    for number, target in enumerate(
        (
            "net_of_theirs:Net",
            net,
            rh.wrap(net, bits=24),
            rh.wrap(theirs(inside=False), bits=24, mean=0.5, std=0.25),
        )
    ):
        out = f"out{number}"
        found = rh.audit(target, out=out, tier="smoke", queries=4, attacked=2, size=32)
        found = json.loads(json_text(found, "audit.json"))
        # a wrapped net was told how its answers are read
        found["said"][0], asked = (
            text.partition(" Nobody said so")[0] for text in (found["said"][0], expected["said"][0])
        )
        expected["said"][0] = asked
        for part in ("rows", "said", "doubts", "flags", "bits", "gradients", "radius"):
            assert found[part] == expected[part], part
        assert found["target"] == ("Net" if number else "net_of_theirs:Net")
    assert net.training
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_a_trained_hasher_is_audited(tmp_path):
    hasher = rh.build_hasher(bits=16, image={"name": "small", "width": 4, "grid": 1})
    found = rh.audit(hasher, out=tmp_path, tier="smoke", queries=4, attacked=2, size=32)
    assert (found["bits"], found["gradients"]) == (16, True)
    again = rh.audit(rh.SearchModel(hasher, 32), out=tmp_path, tier="smoke", queries=4, attacked=2)
    assert again["rows"] == found["rows"]
    assert (tmp_path / "report.html").is_file()


def test_options_of_no_meaning_are_named(tmp_path):
    with pytest.raises(ValueError, match="an audit takes no 'sise'; its options are labels, size, bits"):
        rh.audit("phash", out=tmp_path, sise=32)
    with pytest.raises(ValueError, match="the tier of an audit must be one of smoke, fast, got 'full'"):
        rh.audit(nn.Flatten(), out=tmp_path, tier="full")
