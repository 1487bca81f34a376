"""The one training loop: teachers and students, every method.

It is a generator of steps, so that whoever runs it decides what to print, when to save and when to stop. Its whole
state is a dictionary of tensors and the step's number: saved as safetensors, loaded, and it goes on as if nothing had
happened (the same bytes on one thread of a CPU).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rkd.data import Source
from rkd.distill.batches import steps_per_epoch, training_batches
from rkd.distill.grouped import grouped_in_fp32
from rkd.distill.narrow import narrow_gradients
from rkd.distill.objectives import Objective
from rkd.errors import ConfigError
from rkd.network import Normalisation


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: SGD with Nesterov momentum, one cycle of the learning rate.

    Attributes:
        epochs: passes over the images.
        batch: images a step.
        lr: the cycle's highest learning rate.
        momentum: of SGD.
        weight_decay: on convolutions' and linear layers' weights and everything else alike.
        warmup: share of the steps in which the learning rate rises; then it falls with a cosine.
        augmentation: `none`, `crop` or `crop-flip`.
        precision: of the autocast: `fp32`, `bf16` or `fp16` (CUDA).
        seed: of the order, the augmentation and the initialisation.
    """

    epochs: int
    batch: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.2
    augmentation: str = "crop-flip"
    precision: str = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 2 or self.lr <= 0 or not math.isfinite(self.lr):
            raise ConfigError(
                f"epochs must be at least 1, batch at least 2, lr above 0; got {self.epochs}, {self.batch}, {self.lr:g}"
            )


@dataclass(frozen=True)
class Step:
    """What one step did.

    Attributes:
        number: steps done, from 1.
        epoch: the epoch that it belongs to, from 0.
        ends_epoch: whether it was the epoch's last.
        loss: of the batch, on the device.
        hits: images of the batch classified correctly, on the device.
        images: images of the batch.
        lr: the learning rate that was used.
    """

    number: int
    epoch: int
    ends_epoch: bool
    loss: Tensor
    hits: Tensor
    images: int
    lr: float


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The mixed-precision context of a recipe.

    Raises:
        ConfigError: a precision that the device does not have.
    """
    kinds = {"fp32": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in kinds:
        raise ConfigError(f"precision {precision!r}: expected fp32, bf16 or fp16")
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("precision fp16 needs CUDA; on a CPU use bf16 or fp32")
    return torch.autocast(device.type, kinds[precision], enabled=precision != "fp32")


class Trainer:
    """Trains `network` for `objective`.

    Args:
        network: in train mode, on `device`, channels_last.
        objective: called with normalised images and labels; its `extra` is trained too.
        source: training images.
        normalisation: of the inputs; teacher and student share it.
        recipe: see `Recipe`.
        device: where to compute.
        frozen: names of parameters that stay as they are.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: Objective,
        source: Source,
        normalisation: Normalisation,
        recipe: Recipe,
        device: torch.device,
        frozen: frozenset[str] = frozenset(),
    ) -> None:
        self.network, self.objective, self.source = network, objective, source
        self.normalisation, self.recipe, self.device = normalisation, recipe, device
        self.total_steps = steps_per_epoch(len(source), recipe.batch) * recipe.epochs
        self.done = 0
        parameters = [p for name, p in network.named_parameters() if name not in frozen]
        parameters += list(objective.extra.parameters())
        self._optimizer = torch.optim.SGD(
            parameters, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=True
        )
        self._scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")

    def lr(self, step: int) -> float:
        """One cycle: a linear rise over the first `warmup` of all steps, then half a cosine to nought."""
        rise = self.recipe.warmup * self.total_steps
        if step < rise:
            return self.recipe.lr * (step + 1) / (rise + 1)
        return self.recipe.lr * (1 + math.cos(math.pi * (step - rise) / (self.total_steps - rise))) / 2

    def steps(self) -> Iterator[Step]:
        """Train from where the trainer stands to the end, one step at a time."""
        recipe = self.recipe
        per_epoch = self.total_steps // recipe.epochs
        self.network.train()
        self.objective.extra.train()
        batches = training_batches(
            self.source, recipe.batch, recipe.seed, self.done, self.total_steps, recipe.augmentation
        )
        on_cpu = (
            [self.network, self.objective.extra] if self.device.type == "cpu" and recipe.precision == "bf16" else []
        )
        with narrow_gradients(*on_cpu), grouped_in_fp32(*on_cpu):
            for epoch, number, images, labels in batches:
                lr = self.lr(number)
                for group in self._optimizer.param_groups:
                    group["lr"] = lr
                inputs = torch.from_numpy(images).to(self.device, non_blocking=True)
                inputs = self.normalisation(inputs.contiguous(memory_format=torch.channels_last))
                wanted = torch.from_numpy(labels).to(self.device, non_blocking=True)
                with autocast(self.device, recipe.precision):
                    loss, logits = self.objective(inputs, wanted)
                self._optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(self._scaler.scale(loss))
                self._scaler.step(self._optimizer)
                self._scaler.update()
                self.done = number + 1
                hits = (logits.detach().argmax(1) == wanted).sum()
                yield Step(self.done, epoch, self.done % per_epoch == 0, loss.detach(), hits, len(images), lr)

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, besides `done`."""
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        tensors |= {f"extra.{name}": tensor for name, tensor in self.objective.extra.state_dict().items()}
        for index, parameter in enumerate(self._optimizer.param_groups[0]["params"]):
            momentum = self._optimizer.state.get(parameter, {}).get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum.{index}"] = momentum
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        if self._scaler.is_enabled():
            tensors["scaler"] = torch.tensor([self._scaler.get_scale()], dtype=torch.float64)
        return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}

    def load_state(self, tensors: dict[str, Tensor], done: int) -> None:
        """Go on from `state()` after `done` steps.

        What fails in the middle leaves a part of it; another state may be loaded then.

        Raises:
            ValueError: the state is another network's, or not finite.
            Exception: what torch raises of the generator's state.
        """
        self._check_state(tensors)

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors and self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
        self.network.load_state_dict(part("network."))
        self.objective.extra.load_state_dict(part("extra."))
        self._optimizer.state.clear()
        parameters = self._optimizer.param_groups[0]["params"]
        for index, momentum in part("momentum.").items():
            parameter = parameters[int(index)]
            buffer = torch.empty_like(parameter, requires_grad=False)  # channels_last where the parameter is
            self._optimizer.state[parameter]["momentum_buffer"] = buffer.copy_(momentum)
        if "scaler" in tensors and self._scaler.is_enabled():
            self._scaler.load_state_dict({**self._scaler.state_dict(), "scale": float(tensors["scaler"][0])})
        self.done = done

    def _check_state(self, tensors: dict[str, Tensor]) -> None:
        """Refuse a state that `state()` of this trainer would not give.

        Raises:
            ValueError: a tensor is missing, unknown, of another shape or type, or not finite.
        """
        known = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        known |= {f"extra.{name}": tensor for name, tensor in self.objective.extra.state_dict().items()}
        needed = {*known, "rng.cpu"}
        known |= {f"momentum.{i}": p for i, p in enumerate(self._optimizer.param_groups[0]["params"])}
        known |= {name: torch.empty(0, dtype=torch.uint8) for name in ("rng.cpu", "rng.cuda")}
        known["scaler"] = torch.ones(1, dtype=torch.float64)
        if odd := needed - set(tensors) or set(tensors) - set(known):
            raise ValueError(
                f"it does not fit this network: {min(odd)} is {'unknown' if min(odd) in tensors else 'missing'}"
            )
        for name, tensor in tensors.items():
            like = known[name]
            if tensor.dtype != like.dtype or (tensor.shape != like.shape and not name.startswith("rng.")):
                raise ValueError(f"it does not fit this network: {name} is {tensor.dtype} {tuple(tensor.shape)}")
            if not tensor.isfinite().all() and like.isfinite().all():  # a network may hold infinities of its own
                raise ValueError(f"{name} is not finite")
        if "scaler" in tensors and not tensors["scaler"].item() > 0:
            raise ValueError("scaler is not above 0")
