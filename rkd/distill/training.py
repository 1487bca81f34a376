"""Run a trainer inside a run directory: progress, log, checkpoints, stopping and going on."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from rkd.data import Source
from rkd.distill.loop import Step, Trainer
from rkd.errors import RkdError, RunError, StoppedError
from rkd.files import to_json
from rkd.metrics import Images, evaluate
from rkd.network import Network
from rkd.progress import Bar, progress
from rkd.run import Run
from rkd.signals import StopRequest

_LOG_EVERY = 20  # steps
_STATE, _PLACE = "state.safetensors", "place.json"
_MONITORED = 1000  # test images looked at after each epoch; shown, never used to choose anything
_EVALUATION_BATCH = 256


@dataclass
class _Group:
    """What the steps since the last line of the log added up to."""

    loss: float = 0.0
    hits: int = 0
    images: int = 0
    steps: int = 0

    def add(self, step: Step) -> None:
        self.loss += float(step.loss)
        self.hits += int(step.hits)
        self.images += step.images
        self.steps += 1

    def figures(self) -> tuple[float, float]:
        """Mean loss and accuracy in percent."""
        return self.loss / max(self.steps, 1), 100 * self.hits / max(self.images, 1)


def train(
    trainer: Trainer,
    run: Run,
    stop: StopRequest,
    *,
    stage: str,
    resume_hint: str,
    checkpoint_every: int,
    on_epoch: Callable[[], dict[str, float]] = dict,
) -> None:
    """Train to the end, from the run's newest checkpoint of this stage if there is one.

    Args:
        trainer: fresh.
        run: where the log and the checkpoints go.
        stop: asked after every step.
        stage: its name, for the progress and the log.
        resume_hint: the command that goes on, for the message of a stop.
        checkpoint_every: steps between checkpoints; one is also written at the end of each epoch.
        on_epoch: figures to log and show at the end of each epoch, e.g. the accuracy on some test images.

    Raises:
        StoppedError: stopped by a signal, after saving.
        RkdError: the loss is not finite any more.
        StorageError: the disk said no; the last checkpoint is whole.
    """
    group = _restore(trainer, run, stage)
    started, first = time.monotonic(), trainer.done
    shown: dict[str, float] = {}
    with stop.finishing_steps(), progress(stage, trainer.total_steps, first) as bar:
        for step in trainer.steps():
            group.add(step)
            if not math.isfinite(group.loss):
                raise RkdError(
                    f"{stage}: the loss became {group.loss} at step {step.number}; lower --lr (it is {trainer.recipe.lr:g})"
                )
            loss, accuracy = group.figures()
            _show(bar, step, loss, accuracy, shown)
            if step.number % _LOG_EVERY == 0 or step.ends_epoch:
                run.log(
                    stage=stage,
                    step=step.number,
                    epoch=step.epoch,
                    loss=round(loss, 6),
                    accuracy=round(accuracy, 3),
                    lr=step.lr,
                )
                group = _Group()
            if step.ends_epoch:
                shown = on_epoch()
                trainer.network.train()
                if shown:
                    run.log(stage=stage, step=step.number, epoch=step.epoch, ends_epoch=True, **shown)
            if stop or step.ends_epoch or step.number % checkpoint_every == 0:
                _save(trainer, run, stage, group)
            if stop and stop.signal_number is not None and step.number < trainer.total_steps:
                raise StoppedError(
                    f"stopped and saved at step {step.number} of {trainer.total_steps}; go on with: {resume_hint}",
                    stop.signal_number,
                )
    seconds = time.monotonic() - started
    timings = dict(run.summary.get("timings", {}))
    timings[stage] = {
        "seconds": round(timings.get(stage, {}).get("seconds", 0) + seconds, 3),
        "images_per_s": round((trainer.done - first) * trainer.recipe.batch / seconds, 1)
        if trainer.done > first
        else timings.get(stage, {}).get("images_per_s"),
    }
    run.save(timings=timings)


def monitor(network: Network, test: Source, seed: int, device: torch.device) -> Callable[[], dict[str, float]]:
    """What to show at the end of each epoch: ACC on up to 1,000 test images, always the same ones for one seed."""
    chosen = np.sort(np.random.default_rng([seed, 0x300]).permutation(len(test))[:_MONITORED])
    predict = network.predictor(device)

    def predict_in_eval(images: Images) -> NDArray[Any]:
        network.module.eval()
        return predict(images)

    def look() -> dict[str, float]:
        scores, _ = evaluate(predict_in_eval, test.batches(_EVALUATION_BATCH, chosen))
        return {"ACC": round(scores.acc.value, 3)}

    return look


def _show(bar: Bar, step: Step, loss: float, accuracy: float, shown: dict[str, float]) -> None:
    bar.update(
        step.number, unit_per_step=step.images, unit="img", loss=loss, train_ACC=f"{accuracy:.1f}",
        **{f"test_{name}": f"{value:.1f}" for name, value in shown.items()},
    )  # fmt: skip


def _save(trainer: Trainer, run: Run, stage: str, group: _Group) -> None:
    place = {"stage": stage, "step": trainer.done, "group": asdict(group)}
    run.save_checkpoint(trainer.done, {_STATE: save_safetensors(trainer.state()), _PLACE: to_json(place)})


def _restore(trainer: Trainer, run: Run, stage: str) -> _Group:
    """Load the newest checkpoint of this stage and forget what was logged after it."""
    found = run.latest_checkpoint()
    place = json.loads(found[1][_PLACE]) if found else {}
    group, done = _Group(), 0
    if found and place.get("stage") != stage:  # an earlier stage's, whose result is written
        run.drop_checkpoints()
    elif found:
        try:
            trainer.load_state(load_safetensors(found[1][_STATE]), int(place["step"]))
            group, done = _Group(**place["group"]), trainer.done
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise RunError(f"{run.path}: checkpoint {found[0]} is of another form: {error}") from error
    run.cut_metrics(stage, done)
    return group
