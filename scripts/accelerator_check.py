"""Stages of ``accelerator_check.sh``: tests, codes, throughput, dry runs; each is written as it ends."""

from __future__ import annotations

import argparse
import copy
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from _timing import StepLog  # noqa: E402
from adversarial_step import BITS, Bare  # noqa: E402
from defense_cost import random_data  # noqa: E402

from robusthash.core.registry import build  # noqa: E402
from robusthash.models import build_hasher  # noqa: E402
from robusthash.models.encoding import encode_signs  # noqa: E402
from robusthash.objectives import CSQ  # noqa: E402
from robusthash.training import OptimConfig, Schedule, TrainConfig, fit  # noqa: E402

STEPS = 7  # of the inner attack
Stage = Callable[[argparse.Namespace], Iterator[dict[str, Any]]]


class Clock(StepLog):
    """A log of training that takes the time of each step, when the device has done it."""

    def __init__(self, device: str) -> None:
        self.device, self.times = device, [time.perf_counter()]

    def progress(self, done: int, total: int, text: str) -> None:
        synchronise(self.device)
        self.times.append(time.perf_counter())


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def tests(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The tests marked ``gpu``."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider"]
    yield called("tests", command, 150)


def dry_runs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The dry run of one recipe of each paper (on the CPU, of the first alone)."""
    recipes = [
        sorted(folder.rglob("*.yaml"))[0]
        for folder in sorted((ROOT / "recipes/papers").iterdir())
        if folder.is_dir()
    ]
    for recipe in recipes[:1] if options.cpu else recipes:
        short = ["--batch", "2"] if options.cpu else []
        command = [
            sys.executable,
            "-m",
            "robusthash",
            "run",
            str(recipe),
            "--dry-run",
            "--miniature",
            "--json",
        ]
        yield called(str(recipe.relative_to(ROOT)), [*command, *short, "--device", options.device], 60)


def throughput(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One epoch of SAAT with AlexNet, in float32 and bf16, and the bare loop in float32."""
    side, batch, items = (63, 4, 12) if options.cpu else (224, 64, 1024)
    data = random_data(items, side)
    hasher = build_hasher(bits=BITS, image={"name": "alexnet"})
    for precision in ("float32", "bf16"):
        net, clock = copy.deepcopy(hasher), Clock(options.device)
        reset_memory(options.device)
        attack = {"name": "mainstay", "steps": STEPS, "step_size": 2 / 255, "slope": "one"}
        objective = CSQ()
        recipe = build(
            "recipe",
            "adversarial",
            hasher=net,
            objective=objective,
            attack=build("attack", attack, objective=objective),
            outer=build("outer", "saat"),
        )
        optim = {"hasher": OptimConfig("sgd", 1e-3)}
        fit(
            recipe,
            data,
            TrainConfig(1, batch, optim, Schedule("constant"), precision=precision, device=options.device),
            clock,
        )
        yield rate(f"SAAT, AlexNet, {precision}", clock.times, batch, options.device, side)
    bare = Bare(hasher, data, batch)
    moved(bare, options.device)
    reset_memory(options.device)
    times = [time.perf_counter()]
    for _ in range(items // batch):
        bare.step()
        synchronise(options.device)
        times.append(time.perf_counter())
    yield rate("bare loop, AlexNet, float32", times, batch, options.device, side)


def codes(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Codes on the device and on the CPU: bits that differ, and the largest logit among them."""
    side, items = (63, 16) if options.cpu else (224, 256)
    images = random_data(items, side).train.source.arrays["image"].float() / 255
    for name in ("alexnet", "resnet18"):
        hasher = build_hasher(bits=BITS, image={"name": name}).eval()
        expected = encode_signs(hasher, "image", images)
        with torch.inference_mode():
            logits = hasher({"image": images})["image"].logits
        found = encode_signs(copy.deepcopy(hasher).to(options.device), "image", images).cpu()
        differs = found != expected
        largest = float(logits[differs].abs().max()) if differs.any() else 0.0
        yield {"name": name, "bits": differs.numel(), "differ": int(differs.sum()), "largest_logit": largest}


def called(name: str, command: list[str], limit: int) -> dict[str, Any]:
    """The outcome of a command, with the end of what it printed."""
    started = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"name": name, "exit": None, "seconds": limit, "end": "ran past its limit"}
    try:
        end: Any = json.loads(done.stdout)
    except ValueError:
        end = (done.stdout + done.stderr)[-500:]
    return {
        "name": name,
        "exit": done.returncode,
        "seconds": round(time.perf_counter() - started, 1),
        "end": end,
    }


def rate(name: str, times: list[float], batch: int, device: str, side: int) -> dict[str, Any]:
    """Images a second over the steps but the first, and the peak memory."""
    steps = [after - before for before, after in pairwise(times[1:])]
    figures = {"name": name, "pixels": side, "batch": batch, "steps": len(steps)}
    figures["images_per_second"] = round(batch * len(steps) / sum(steps), 1)
    if device.startswith("cuda"):
        figures["peak_mib"] = torch.cuda.max_memory_allocated() >> 20
    return figures


def reset_memory(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()


def moved(bare: Bare, device: str) -> None:
    """The bare loop's state on the device; its pixels too, where it reads them by row."""
    bare.net.to(device)
    for name in ("pixels", "labels", "centers", "memory"):
        setattr(bare, name, getattr(bare, name).to(device))
    bare.optimiser = torch.optim.SGD(bare.net.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4)


STAGES: dict[str, Stage] = {"tests": tests, "codes": codes, "throughput": throughput, "dry runs": dry_runs}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cpu", action="store_true", help="Small sizes on the CPU, to try the script.")
    parser.add_argument("--stages", default=",".join(STAGES), help="Some of the stages, by commas.")
    options = parser.parse_args()
    available = torch.accelerator.is_available()
    options.device = "cpu" if options.cpu or not available else torch.accelerator.current_accelerator().type
    name = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "cpu"
    found: dict[str, Any] = {"device": options.device, "name": name, "torch": torch.__version__, "stages": {}}
    if not available and not options.cpu:
        found["state"] = "no accelerator"
        options.out.write_text(json.dumps(found, indent=1) + "\n")
        print("there is no accelerator here; --cpu tries the script at small sizes")
        return 0
    for stage in options.stages.split(","):
        rows: list[dict[str, Any]] = []
        found["stages"][stage] = rows
        try:
            for row in STAGES[stage](options):
                rows.append(row)
                print(json.dumps({"stage": stage, **row}), flush=True)
        except Exception as error:  # the other stages say something too
            rows.append({"error": f"{type(error).__name__}: {error}"[:500]})
            print(json.dumps(rows[-1]), flush=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    failed = any("error" in row or row.get("exit", 0) for rows in found["stages"].values() for row in rows)
    found["state"] = "failed" if failed else "passed"
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
