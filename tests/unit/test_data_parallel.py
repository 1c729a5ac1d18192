"""Two processes train to the weights of one with the same batches, for every recipe that may."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from helpers import MemoryLog, make_data, train_config

from robusthash.apps.experiment.config import load_config
from robusthash.apps.experiment.run_directory import load_run
from robusthash.apps.experiment.training_stages import train
from robusthash.core.processes import join_processes, rank
from robusthash.core.registry import build
from robusthash.models import build_hasher
from robusthash.training import Recipe, fit

SMALL = {"name": "small", "width": 4}
SFCL = {
    "name": "sfcl",
    "spatial": SMALL,
    "frequency": {"name": "gfnet", "size": 16, "patch": 4, "dim": 8, "depth": 1, "ratio": 2},
}
KINDS: dict[str, dict[str, Any]] = {
    "hashing": {},
    "pgd-at": {"attack": {"name": "pgd", "steps": 2}},
    "saat": {"attack": {"name": "mainstay", "steps": 2}},
    "saah": {"attack": {"name": "pgd", "steps": 2}, "purifiers": {"image": "spectral-gate"}},
    "sfcl": {"attack": {"name": "mainstay", "steps": 2}, "image": SFCL},
}


def make(kind: str, head: str) -> Recipe:
    options = KINDS[kind]
    purifiers = options.get("purifiers")
    hasher = build_hasher(bits=8, image=options.get("image", SMALL), head=head, seed=1, purifiers=purifiers)
    objective = build("objective", "csq")
    if kind == "hashing":
        return build("recipe", "hashing", hasher=hasher, objective=objective)
    attack = build("attack", options["attack"], objective=objective)
    outer = build("outer", kind)
    return build("recipe", "adversarial", hasher=hasher, objective=objective, attack=attack, outer=outer)


def as_double(values: torch.Tensor) -> torch.Tensor:
    return values.double() / (255 if values.dtype == torch.uint8 else 1)


def trained(kind: str, head: str) -> dict[str, torch.Tensor]:
    """State and last losses of a hasher in double precision, so that rounding turns no sign of a gradient."""
    if kind == "sfcl":
        return _trained(make(kind, head))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("robusthash.data.base.as_input", as_double)
        recipe = make(kind, head)
        recipe.hasher.double()
        return _trained(recipe)


def _trained(recipe: Recipe) -> dict[str, torch.Tensor]:
    lines = fit(
        recipe, make_data(train=43, size=16), replace(train_config(2), batch_size=16)
    )  # a last batch of 11, in shares of 6 and 5
    terms = {
        f"log.{name}": torch.tensor(v) for name, v in lines[-1].items() if name not in ("seconds", "figures")
    }
    states = {f"{name}.{key}": v for name, m in recipe.modules().items() for key, v in m.state_dict().items()}
    return {**states, **terms}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def process(number: int, count: int, port: int, folder: str, jobs: list[tuple[str, str]]) -> None:
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(address | {"RANK": str(number), "WORLD_SIZE": str(count)})
    join_processes()
    for kind, head in jobs:
        torch.save(trained(kind, head), Path(folder) / f"{kind}-{head}-{rank()}.pt")
    torch.distributed.barrier()  # a process that leaves early breaks the connection of the other
    torch.distributed.destroy_process_group()


JOBS = [("hashing", "batchnorm"), ("hashing", "linear"), *((kind, "tanh") for kind in list(KINDS)[1:])]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes trained, each recipe in a file for each process."""
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(process, (2, free_port(), str(folder), JOBS), nprocs=2)
    return folder


@pytest.mark.parametrize(("kind", "head"), JOBS)
def test_two_processes_train_to_the_weights_of_one(kind: str, head: str, together: Path) -> None:
    both = [torch.load(together / f"{kind}-{head}-{number}.pt") for number in (0, 1)]
    for name, value in both[0].items():
        assert torch.equal(both[1][name], value), name
        assert torch.isfinite(value.double()).all()
    if kind == "sfcl":  # draws its gates, so that its result is another of the same kind
        return
    one = trained(kind, head)
    assert one.keys() == both[0].keys()
    for name, value in one.items():
        torch.testing.assert_close(both[0][name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_a_checkpoint_of_two_processes_is_not_taken_up_by_one() -> None:
    class Earlier(MemoryLog):
        def resume(self) -> dict | None:
            state = super().resume()
            return state and {**state, "processes": 2}

    log = Earlier()
    fit(make("hashing", "tanh"), make_data(), train_config(1), log)
    with pytest.raises(ValueError, match="begun by 2 processes, and there are 1 now; start as many"):
        fit(make("hashing", "tanh"), make_data(), train_config(2), log)


RECIPE = """
name: together
data: {name: synthetic, size: 16, train: 64, query: 12, database: 36}
hasher: {bits: 8, image: {name: small, width: 4}}
training: {epochs: 2, batch_size: 16, optim: {hasher: {lr: 0.05}}}
evaluation: {attacks: [{name: pgd, steps: 2}]}
"""


def start(folder: Path, number: int, port: int, recipe: Path) -> subprocess.Popen[str]:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    together = {"RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": str(number)}
    return subprocess.Popen(
        [sys.executable, "-m", "robusthash", "run", str(recipe), "--runs", str(folder / "runs")],
        env={**os.environ, **address, **together},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_command_line_trains_in_two_processes_and_one_evaluates(tmp_path: Path) -> None:
    """As ``torchrun`` starts them; weights are those of one process, and a second call finds all done."""
    recipe = tmp_path / "together.yaml"
    recipe.write_text(RECIPE)
    alone = train(load_config(recipe), tmp_path / "alone")
    for _ in range(2):
        port = free_port()
        both = [start(tmp_path, number, port, recipe) for number in (0, 1)]
        said = [process.communicate(timeout=240) for process in both]
        assert [process.returncode for process in both] == [0, 0], said
    (run,) = [load_run(path) for path in (tmp_path / "runs" / "together").iterdir()]
    assert run.id == alone.id
    assert len(run.results()) == 3
    assert len(run.lines()) == 2
    one, two = alone.load_hasher().state_dict(), run.load_hasher().state_dict()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_an_error_of_the_recipe_is_said_once(tmp_path: Path) -> None:
    recipe = tmp_path / "together.yaml"
    recipe.write_text(RECIPE)
    for wrong in (tmp_path / "none.yaml", recipe):
        if wrong is recipe:
            recipe.write_text(RECIPE.replace("evaluation: {", "evaluation: {relevance: [blue], "))
        port = free_port()
        both = [start(tmp_path, number, port, wrong) for number in (0, 1)]
        first, second = (process.communicate(timeout=240)[1] for process in both)
        assert [process.returncode for process in both] == [1, 1]
        assert first.count("error:") == 1
        assert second == ""


def test_a_process_that_dies_ends_the_others_with_a_message(tmp_path: Path) -> None:
    recipe = tmp_path / "together.yaml"
    recipe.write_text(RECIPE.replace("epochs: 2", "epochs: 500"))
    port = free_port()
    first, second = (start(tmp_path, number, port, recipe) for number in (0, 1))
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("resume.pt")) and time.monotonic() < deadline:
        time.sleep(0.2)
    second.kill()
    killed = time.monotonic()
    _, said = first.communicate(timeout=90)
    second.communicate()
    assert first.returncode == 1
    assert time.monotonic() - killed < 75
    assert "another process of this work is gone (connection closed)" in said
    assert "gloo" not in said
    assert "Traceback" not in said
