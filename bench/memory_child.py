"""The child of `rkd.bench.memory`: one model from standard input, its memory as one JSON line on standard output."""

from __future__ import annotations

import dataclasses
import json
import sys
import time

import numpy as np

from rkd.bench.device import available_bytes, resident
from rkd.bench.memory import FEWEST, SETTLED, Memory, growth
from rkd.bench.runner import Choice, Images, Runner, device_memory_of, import_runtime, open_runner
from rkd.files import sha256

_POINTS = 100  # resident sizes kept
_ENOUGH_BYTES = 64 * 2**20  # of growth: a board has only so much


def main() -> int:
    """Answer one request; every failure is part of the answer."""
    try:
        answer = dataclasses.asdict(_measure())
    except Exception as error:  # noqa: BLE001 - the parent has no other way to learn what happened
        answer = {"error": f"{type(error).__name__}: {error}"}
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


def _measure() -> Memory:
    head = json.loads(sys.stdin.buffer.readline())
    model = sys.stdin.buffer.read()
    if sha256(model) != head["sha256"]:
        raise ValueError("the model was cut short on its way")
    images = np.zeros(head["shape"], dtype=np.uint8)
    choice = Choice(**head["choice"])
    import_runtime(choice)
    # The model's own bytes do not count as "before".
    held = resident("VmRSS")
    before = None if held is None else max(held - len(model), 0)
    available = available_bytes()
    runner = open_runner(choice, model, "the model")
    del model
    with runner:
        loaded = resident("VmRSS")
        inferences, settled, sizes = run(runner, images, head["inferences"], head["seconds"], head["cap_seconds"])
        device = device_memory_of(runner)
        still = available_bytes()
        steady, peak = resident("VmRSS"), resident("VmHWM")
    grown = growth(sizes)
    return Memory(
        peak_bytes=peak,
        steady_bytes=steady,
        growth_bytes=grown[0] if grown else None,
        leak=grown[1] if grown else None,
        before_bytes=before,
        loaded_bytes=loaded,
        arena_bytes=None if settled is None or loaded is None else max(settled - loaded, 0),
        device_bytes=device,
        system_bytes=fall(available, still),
        inferences=inferences,
        reason=None if peak is not None else "this system does not report it",
    )


def fall(before: int | None, after: int | None) -> int | None:
    """By how much it fell; None where it did not, or is not known."""
    return before - after if before is not None and after is not None and after < before else None


def run(
    runner: Runner, images: Images, least: int, seconds: float, cap_seconds: float
) -> tuple[int, int | None, list[int]]:
    """Run a model and watch the resident size.

    Args:
        runner: active.
        images: the batch.
        least: inferences at least, where the cap allows.
        seconds: to run at least, unless it grows by 64 MiB.
        cap_seconds: to run at most, but `FEWEST` inferences at least.

    Returns:
        Inferences, the size after the first ten of them, and the sizes from there on, evenly spaced.
    """
    sizes: list[int] = []
    settled, done, every = None, 0, 1
    start = time.monotonic()
    while True:
        passed, grown = time.monotonic() - start, sizes[-1] - sizes[0] if sizes else 0
        if done >= FEWEST and passed >= cap_seconds:
            break
        if done >= max(FEWEST, least) and (passed >= seconds or grown >= _ENOUGH_BYTES):
            break
        runner.infer(images)
        done += 1
        if done == SETTLED:
            settled = resident("VmRSS")
        if done >= SETTLED and done % every == 0 and (size := resident("VmRSS")) is not None:
            sizes.append(size)
            if len(sizes) == 2 * _POINTS:
                sizes, every = sizes[1::2], 2 * every
    return done, settled, sizes


if __name__ == "__main__":
    sys.exit(main())
