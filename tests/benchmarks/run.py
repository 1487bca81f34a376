"""`make bench`: rkd against bare loops, each figure a ratio measured in one run.

training    images/s of the distillation loop (folder of decoded images, augmentation, connectors, margins, log,
            checkpoints' absence) over a bare loop: the same teacher forward and student forward and backward on
            tensors that are ready in memory. Both take turns, a few steps each, in one process.
memory      peak resident memory of the one over the other's, each in a process of its own.
help        seconds of `rkd --help` in a fresh process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch.nn import functional

from rkd.data import ArraySource
from rkd.detox import TapMask, set_masks
from rkd.distill.hardening import COUNT, Hardened, UniversalPerturbations, random_perturbations
from rkd.distill.loop import Recipe, Trainer, autocast
from rkd.distill.objectives import FeatureDistillation, Objective, margins
from rkd.distill.settings import DistillSettings
from rkd.measure import choose_precision
from rkd.models import build
from rkd.network import Normalisation
from rkd.taps import TappedNetwork

SIZE, BATCH = (32, 32), 128
CPU = torch.device("cpu")


def networks() -> tuple[torch.nn.Module, torch.nn.Module]:
    """A wrn-16-2 teacher and a wrn-16-1 student, random weights."""
    torch.manual_seed(0)
    teacher = build("wrn-16-2", 10, SIZE).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    return teacher, build("wrn-16-1", 10, SIZE).to(memory_format=torch.channels_last).train()


def bare_steps(precision: str) -> Iterator[None]:
    """Teacher forward, student forward and backward, SGD; nothing else."""
    teacher, student = networks()
    images = torch.randn(BATCH, 3, *SIZE).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (BATCH,))
    optimizer = torch.optim.SGD(student.parameters(), 0.01, 0.9, weight_decay=5e-4, nesterov=True)
    while True:
        with torch.no_grad(), autocast(CPU, precision):
            teacher(images)
        with autocast(CPU, precision):
            loss = functional.cross_entropy(student(images).float(), labels)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        yield


def rkd_steps(precision: str, *, detoxified: bool) -> Iterator[None]:
    """rkd's own trainer, with augmentation, connectors, margins and, where asked for, the mask."""
    teacher, student = networks()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20_000, 3, *SIZE), dtype=np.uint8)
    source = ArraySource(images, rng.integers(0, 10, 20_000))
    tapped = TappedNetwork(teacher, SIZE, frozen=True).eval()
    found = margins(tapped, teacher, [])
    if detoxified:
        masks = [
            TapMask(tap.name, rng.random(tap.shape, np.float32), rng.random(tap.shape, np.float32))
            for tap in tapped.taps
        ]
        set_masks(tapped, masks, CPU, torch.bfloat16 if precision == "bf16" else torch.float32)
    first = random_perturbations(COUNT, SIZE, 12 / 255, 0)
    objective: Objective = (plain := FeatureDistillation(student, tapped, SIZE, found))
    if detoxified:
        objective = Hardened(
            plain,
            UniversalPerturbations(first, 12 / 255, Normalisation(), fixed=True, share=DistillSettings.harden_share),
        )
    objective.extra.to(memory_format=torch.channels_last)
    recipe = Recipe(epochs=1000, batch=BATCH, precision=precision)
    for step in Trainer(student, objective, source, Normalisation(), recipe, CPU).steps():
        float(step.loss)
        yield


def interleaved(kinds: dict[str, Iterator[None]], rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds a step of each, round by round in turn; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(rounds + 1):
        for name, iterator in kinds.items():
            started = time.perf_counter()
            for _ in range(steps):
                next(iterator)
            if number:
                seconds[name].append((time.perf_counter() - started) / steps)
    return seconds


def training(rounds: int, steps: int) -> None:
    """Print images/s and ratios."""
    precision = choose_precision("auto", CPU)
    kinds = {
        "bare": bare_steps(precision),
        "ofd": rkd_steps(precision, detoxified=False),
        "robustkd": rkd_steps(precision, detoxified=True),
    }
    seconds = interleaved(kinds, rounds, steps)
    bare = np.array(seconds["bare"])
    print(
        f"training, wrn-16-2 -> wrn-16-1, batch {BATCH}, {precision}, 1 thread, {rounds} rounds of {steps} steps in turn"
    )
    for name, values in seconds.items():
        ratios = bare / np.array(values)
        low, high = np.percentile(ratios, [5, 95])
        rate = BATCH / float(np.median(values))
        print(f"  {name:10} {rate:6.0f} images/s   {float(np.median(ratios)):.3f} of bare [{low:.3f}, {high:.3f}]")


def peak(kind: str) -> None:
    """Child: run a few steps and print the process's peak memory in bytes."""
    precision = choose_precision("auto", CPU)
    iterator = bare_steps(precision) if kind == "bare" else rkd_steps(precision, detoxified=True)
    for _ in range(12):
        next(iterator)
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def memory() -> None:
    """Print peak memory of both, each in a process of its own."""
    found = {}
    for kind in ("bare", "robustkd"):
        out = subprocess.run([sys.executable, __file__, "--peak", kind], check=True, capture_output=True, text=True)
        found[kind] = int(out.stdout)
    print(
        f"memory: robustkd {found['robustkd'] / 1e6:.0f} MB, bare {found['bare'] / 1e6:.0f} MB, ratio {found['robustkd'] / found['bare']:.2f}"
    )
    print("  (robustkd holds 20,000 decoded images, 61 MB, that the bare loop does not have)")


def help_time() -> None:
    """Print the median time of `rkd --help`."""
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "rkd", "--help"], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - started)
    print(f"help: `rkd --help` {float(np.median(seconds)):.3f} s (median of 7)")


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peak", choices=("bare", "robustkd"))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if options.peak:
        peak(options.peak)
        return
    print(f"{os.cpu_count()} cores, torch {torch.__version__}")
    training(options.rounds, options.steps)
    memory()
    help_time()


if __name__ == "__main__":
    main()
