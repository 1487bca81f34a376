"""Fine-pruning (Liu, Dolan-Gavitt and Garg, "Fine-Pruning", RAID 2018).

Channels of the last stage that clean images hardly activate are pruned, in the order of their mean activation, until
accuracy on held-out clean images falls by more than a few points; then the network is fine-tuned.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rkd.distill.objectives import CrossEntropy
from rkd.network import Network
from rkd.purify.finetune import FINETUNE_LR
from rkd.purify.stage import Purification
from rkd.taps import TappedNetwork, channel_writers

_PARTS = 32  # the channels are pruned in so many portions
_RANKING_IMAGES = 2000
_BATCH = 256


def fine_pruning(work: Purification) -> None:
    """Prune, then fine-tune with what was pruned held at nought.

    Raises:
        ArchitectureError: the last stage's channels cannot be pruned one by one.
    """
    writers = channel_writers(work.teacher.module, work.teacher.size)
    network = work.trained_once("pruned.safetensors", lambda: _pruned(work, writers))
    dead = dead_channels(network.module, writers)
    handles = [_hold_at_nought(parameter, dead) for parameter in _parameters(network.module, writers)]
    work.train(network, CrossEntropy(network.module), "fine-tune the pruned teacher", steps=work.steps, lr=FINETUNE_LR)
    for handle in handles:
        handle.remove()
    work.finish(network, pruned_channels=int(dead.sum()), channels=len(dead))


def _pruned(work: Purification, writers: Sequence[str]) -> Network:
    """As many channels pruned as held-out accuracy allows."""
    order = np.argsort(_activations(work, work.copy()), kind="stable")
    portion = max(1, len(order) // _PARTS)
    network, _ = work.pruned(
        range(portion, len(order), portion),
        lambda network, count: prune_channels(network.module, writers, order[:count]),
    )
    return network


def _activations(work: Purification, network: Network) -> NDArray[np.float64]:
    """Mean activation of each channel of the last stage on clean images of all classes, (C,)."""
    tapped = TappedNetwork(network.module, network.size, only=(-1,)).eval()
    order = np.random.default_rng([work.recipe.seed, 0xF19E]).permutation(len(work.clean))  # folders go class by class
    chosen = np.sort(order[:_RANKING_IMAGES])
    total, images_seen = torch.zeros(tapped.taps[0].channels, dtype=torch.float64), 0
    with torch.no_grad():
        for images, _ in work.clean.batches(_BATCH, chosen):
            inputs = torch.from_numpy(images).to(work.device).contiguous(memory_format=torch.channels_last)
            _, (feature,) = tapped(network.normalisation(inputs))
            total += feature.float().relu().mean((2, 3)).double().sum(0).cpu()
            images_seen += len(images)
    activations: NDArray[np.float64] = (total / images_seen).numpy()
    return activations


def prune_channels(module: nn.Module, writers: Sequence[str], channels: NDArray[np.int64]) -> None:
    """Set these channels of the last stage to nought, in place."""
    with torch.no_grad():
        for parameter in _parameters(module, writers):
            parameter[torch.from_numpy(channels).to(parameter.device)] = 0


def dead_channels(module: nn.Module, writers: Sequence[str]) -> Tensor:
    """Which channels of the last stage are nought whatever the image, bool (C,)."""
    parts = [parameter.detach().flatten(1) if parameter.ndim > 1 else parameter.detach()[:, None]
             for parameter in _parameters(module, writers)]  # fmt: skip
    return torch.cat(parts, 1).eq(0).all(1)


def _parameters(module: nn.Module, writers: Sequence[str]) -> list[nn.Parameter]:
    found = [module.get_submodule(name) for name in writers]
    parameters = [p for writer in found for p in (writer.weight, writer.bias)]
    return [p for p in parameters if isinstance(p, nn.Parameter)]


def _hold_at_nought(parameter: nn.Parameter, dead: Tensor) -> RemovableHandle:
    """Let no gradient move the dead channels; weight decay and momentum leave nought where it is."""
    keep = (~dead).to(parameter.dtype).view(-1, *[1] * (parameter.ndim - 1))  # (C, 1, ...)

    def hold(gradient: Tensor) -> Tensor:
        return gradient * keep

    handle: RemovableHandle = parameter.register_hook(hold)  # type: ignore[no-untyped-call]
    return handle
