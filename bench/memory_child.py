"""The child of `rkd.bench.memory`: one model from standard input, its memory as one JSON line on standard output."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np

from rkd.bench.memory import Memory, resident
from rkd.bench.runner import Choice, import_runtime, open_runner
from rkd.files import sha256

_SETTLED = 10  # inferences after which the runtime's arena has its size


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
    runner = open_runner(choice, model, "the model")
    del model
    settled = None
    with runner:
        for i in range(head["inferences"]):
            runner.infer(images)
            if i + 1 == _SETTLED:
                settled = resident("VmRSS")
        steady, peak = resident("VmRSS"), resident("VmHWM")
    growth = None if steady is None or settled is None else steady - settled
    reason = None if peak is not None else "this system does not report it"
    return Memory(peak, steady, growth, before, head["inferences"], reason)


if __name__ == "__main__":
    sys.exit(main())
