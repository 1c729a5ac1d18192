"""Speed of adversarial training in two processes of one thread each, over one process of one thread.

Both train the same net on the same batches (plain adversarial training, two inner steps). The ratio is that
of the processor seconds that a process spends on an epoch, which other load on the machine hardly touches;
that of wall times, which waiting adds to, stands in the detail and means something on two idle cores alone.
"""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from robusthash.core.processes import join_processes, rank, wait_for_others
from robusthash.core.registry import build
from robusthash.data.synthetic import synthetic
from robusthash.models import build_hasher
from robusthash.training import OptimConfig, TrainConfig, fit

TARGET = 1.85


class Clock:
    """A log of training that takes the time of each epoch."""

    def __init__(self) -> None:
        self.times = [(time.perf_counter(), time.process_time())]

    def resume(self) -> None:
        return None

    def checkpoint(self, state: dict[str, Any]) -> None:
        pass

    def log(self, line: dict[str, Any]) -> None:
        self.times.append((time.perf_counter(), time.process_time()))

    def progress(self, done: int, total: int, text: str) -> None:
        pass

    def fastest(self) -> tuple[float, float]:
        """Wall and processor seconds of the fastest epoch but the first."""
        pairs = list(zip(self.times[1:], self.times[2:], strict=False))
        walls, processors = zip(*[(b[0] - a[0], b[1] - a[1]) for a, b in pairs], strict=True)
        return min(walls), min(processors)


def train(number: int, count: int, port: int, results: Any) -> None:
    """Train four epochs as one of ``count`` processes."""
    torch.set_num_threads(1)
    if count > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        os.environ.update(RANK=str(number), WORLD_SIZE=str(count))
        join_processes()
    data = synthetic(size=64, train=256, query=8, database=64)
    objective = build("objective", "csq")
    parts = {
        "hasher": build_hasher(bits=32, image={"name": "small", "width": 32}),
        "attack": build("attack", {"name": "pgd", "steps": 2}, objective=objective),
        "outer": build("outer", "pgd-at"),
    }
    recipe = build("recipe", "adversarial", objective=objective, **parts)
    clock = Clock()
    fit(recipe, data, TrainConfig(4, 64, {"hasher": OptimConfig(lr=0.01)}, device="cpu"), clock)
    wait_for_others()
    if rank() == 0:
        results.append(clock.fastest())
    if count > 1:
        torch.distributed.destroy_process_group()


def run() -> list[dict[str, Any]]:
    times = {}
    for count in (1, 2):
        with multiprocessing.get_context("spawn").Manager() as manager, socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
            listener.close()
            shared = manager.list()
            multiprocessing.spawn(train, (count, port, shared), nprocs=count)
            times[count] = tuple(shared[0])
    (wall, processor), (wall_each, processor_each) = times[1], times[2]
    detail = {"wall_ratio": round(wall / wall_each, 3), "epoch_s": round(processor, 3)}
    detail |= {"epoch_s_of_each": round(processor_each, 3), "pixels": 64, "batch": 64}
    ratio = round(processor / processor_each, 3)
    row = {"bench": "two-processes-over-one", "ratio": ratio, "target": TARGET, "better": "higher"}
    return [{**row, "detail": detail}]


if __name__ == "__main__":
    for row in run():
        print(json.dumps(row))
