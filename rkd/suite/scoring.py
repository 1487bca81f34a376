"""Score a control under the triggers of the attacked teachers that it was never near."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rkd.distill.inputs import open_with_progress
from rkd.errors import RunError
from rkd.files import sha256, to_json, write_file
from rkd.measure import choose_device, use_threads
from rkd.metrics import evaluate
from rkd.network import Network
from rkd.progress import say
from rkd.run import STUDENT, Run
from rkd.suite.place import read_scores
from rkd.triggers import Trigger

_EVALUATION_BATCH = 256


def score_control(*, run: str, data: str, out: str, triggers: Mapping[str, str], threads: int = 1) -> None:
    """Measure a finished student under triggers and add the figures to a file.

    Args:
        run: its run directory.
        data: what `--data` takes.
        out: the JSON file: the student's digest, and by name the trigger's digest and ACC, ASR and RA.
        triggers: trigger files by the name of the attack.
        threads: CPU threads.

    Raises:
        RunError: the run is not finished, or the data is not what it was.
        RkdError: a file cannot be read or written.
    """
    opened = Run.open(Path(run))
    if not opened.finished:
        raise RunError(f"{run} is not finished")
    use_threads(threads)
    student = Network.load(opened.path / STUDENT)
    dataset = open_with_progress(data, student.size, int(opened.setting("split_seed")))
    if dataset.digest != opened.summary.get("data", {}).get("digest"):
        raise RunError(f"{run}: the data has changed since the run; restore it, or start the suite in a new --out")
    named: dict[str, Trigger] = {}
    digests: dict[str, str] = {}
    for index, (name, path) in enumerate(triggers.items()):
        named[name] = replace(Trigger.load(Path(path)), name=f"t{index}")  # two attacks may call theirs the same
        digests[name] = sha256(Path(path).read_bytes())
    say(f"score {len(dataset.test):,} test images under {len(named)} triggers")
    predict = student.predictor(choose_device(str(opened.setting("device"))))
    scores, _ = evaluate(predict, dataset.test.batches(_EVALUATION_BATCH), tuple(named.values()))
    found = {
        name: {"trigger": digests[name], "acc": scores.acc.to_json(), "asr": t.asr.to_json(), "ra": t.ra.to_json()}
        for name, t in zip(named, scores.triggers, strict=True)
    }
    digest = str(opened.summary["student"]["sha256"])
    write_file(Path(out), to_json({"student": digest, "triggers": {**read_scores(Path(out), digest), **found}}))
