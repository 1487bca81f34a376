"""Run a trainer inside a run directory: progress, log, checkpoints, stopping and going on."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from rkd.checks import loss, object_of, string, whole, whole_between
from rkd.data import Source
from rkd.distill.loop import Step, Trainer
from rkd.errors import RkdError, RunError, StoppedError, first_line, ran_out_of_memory
from rkd.files import to_json
from rkd.metrics import Images, evaluate
from rkd.network import Network
from rkd.progress import Bar, progress, say
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
        RunError: no checkpoint can be loaded.
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
    """Load the newest checkpoint of this stage that can be loaded and forget what was logged after it.

    Raises:
        RunError: there are some, and none can be loaded.
    """
    group, damage = _Group(), ""
    for step, members in run.checkpoints():
        try:
            place = _place(members, step)
            if place["stage"] == stage:
                _load(trainer, members, step)
                group = _Group(**place["group"])
        except ValueError as error:
            damage = damage or f"checkpoint {step} is damaged: {first_line(error)}"
            continue
        if place["stage"] != stage:  # an earlier stage's, whose result is written
            run.drop_checkpoints()
        elif damage:
            say(f"{damage}; going on from step {step}")
        break
    else:
        if damage:
            raise RunError(f"{run.path}: {damage}; remove {run.path / 'checkpoints'} to begin this stage again")
    run.cut_metrics(stage, trainer.done)
    return group


def _place(members: Mapping[str, bytes], step: int) -> dict[str, Any]:
    """Where in the training a checkpoint of this step is.

    Raises:
        ValueError: it does not say.
    """
    group = object_of({"loss": loss, "hits": whole(), "images": whole(), "steps": whole()})
    check = object_of({"stage": string, "step": whole_between(step, step), "group": group})
    if _PLACE not in members:
        raise ValueError(f"{_PLACE} is missing")
    try:
        place = json.loads(members[_PLACE])
    except RecursionError as error:
        raise ValueError(f"{_PLACE}: {error}") from error
    if (problem := check(place)) is not None:
        raise ValueError(f"{_PLACE}{problem}")
    return dict(place)


def _load(trainer: Trainer, members: Mapping[str, bytes], step: int) -> None:
    """Bring the trainer to where a checkpoint was saved.

    Raises:
        ValueError: the checkpoint is damaged, or another network's.
    """
    if step > trainer.total_steps:
        raise ValueError(f"step {step} of {trainer.total_steps}")
    try:
        trainer.load_state(load_safetensors(members[_STATE]), step)
    except MemoryError:
        raise
    except Exception as error:  # safetensors and torch raise of many kinds
        if isinstance(error, RuntimeError) and ran_out_of_memory(error):
            raise
        raise ValueError(f"{_STATE}: {first_line(error)}") from error
