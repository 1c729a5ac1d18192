"""A collection encoded on a real Ray cluster of two machines' worth of processes, one of which is killed."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import robusthash as rh
from robusthash.apps.experiment.config import make_config
from robusthash.apps.experiment.training_stages import train
from tests.flow.test_encode_collection import codes, files
from tests.flow.test_index_library import CONFIG
from tests.index_kills import make_library

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
WORKERS, COUNT, PART = 2, 300, 10


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch):
    """A head without cores, and two workers of one core each."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        made.workers = [made.add_node(num_cpus=1) for _ in range(WORKERS)]
        ray.init(address=made.address, log_to_driver=False, logging_level=logging.ERROR)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def in_time(holds: Callable[[], bool], seconds: float = 60) -> bool:
    """Whether it holds within so many seconds: Ray learns of a death by missed health checks."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


@pytest.mark.slow
@needs_ray
def test_a_killed_worker_changes_no_code_and_doubles_no_item(cluster, tmp_path: Path):
    import ray

    from robusthash.apps.collection.on_ray import encode_on_ray

    run = train(make_config(CONFIG), tmp_path / "runs").path
    library = make_library(tmp_path / "library", COUNT)
    rh.encode_collection(run, library, tmp_path / "alone", part_size=PART, processes=0)

    def kill_in_the_middle(done: int, total: int, text: str) -> None:
        if done == 3:
            cluster.remove_node(cluster.workers[0], allow_graceful=False)

    out, index = tmp_path / "codes", f"file:{tmp_path / 'ix'}"
    options = {"workers": WORKERS, "part_size": PART, "index": index}
    report = encode_on_ray(run, library, out, progress=kill_in_the_middle, **options)
    assert (report["done"], report["items"], report["in_use"]) == (COUNT // PART, COUNT, [])
    assert in_time(lambda: sum(node["Alive"] for node in ray.nodes()) == WORKERS)  # the head, and one
    assert files(out) == files(tmp_path / "alone")
    held = codes(out)
    with rh.open_index(index, bits=32) as opened:
        assert opened.count() == COUNT
        ids = [number for number, _, _ in held.values()]
        assert [one["path"] for one in opened.payload(ids)] == [str(library / name) for name in held]
    again = encode_on_ray(run, library, out, **options)
    assert (again["encoded"], again["unchanged"]) == (0, COUNT // PART)
    with rh.open_index(index, bits=32) as opened:
        assert opened.count() == COUNT


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_a_line_says_how_to_install_it(call, tmp_path):
    code, _, err = call(
        "encode", "--images", tmp_path, "--run", tmp_path, "--out", tmp_path / "o", "--ray", 2
    )
    assert (code, "pip install 'robusthash[ray]'" in err) == (1, True)
