"""Adversarial neuron pruning (Wu and Wang, "Adversarial Neuron Pruning Purifies Backdoored Deep Models", NeurIPS 2021).

A backdoored network misclassifies clean images into the target class when its neurons' weights are perturbed a little.
A mask of each neuron is learned on clean images so that the network resists such perturbations (equations 5 to 7):

    min over m in [0, 1]   alpha * CE(m * w, b) + (1 - alpha) * max over |delta|, |xi| <= eps of CE((m + delta) * w, (1 + xi) * b)

and neurons whose mask is low are pruned. As in the authors' experiments a neuron is a channel of a BN; in a network
without BNs, a channel of a convolution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from rkd.errors import ArchitectureError
from rkd.network import Network
from rkd.purify.stage import Purification

_LR = 0.2
_EPS, _ALPHA = 0.4, 0.2  # the paper's, for CIFAR-10
_KEPT = 0.95  # a neuron whose mask is as high as this is not pruned
_PARTS = 100  # the neurons are pruned in so many portions


class AdversarialNeuronPerturbation:
    """The masks' objective; its `extra` holds the masks.

    Args:
        network: in train mode, its weights frozen; its BNs' statistics move.
        eps: of the perturbation, relative to weight and bias.
        alpha: weight of the unperturbed loss.
    """

    def __init__(self, network: nn.Module, eps: float = _EPS, alpha: float = _ALPHA) -> None:
        self.network, self.eps, self.alpha = network, eps, alpha
        self.names = neurons(network)
        weights = [network.get_parameter(f"{name}.weight") for name in self.names]
        self.extra: nn.Module = nn.ParameterList(torch.ones(len(w), device=w.device) for w in weights)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See `rkd.distill.objectives.Objective`."""
        masks = list(self.extra.parameters())
        with torch.no_grad():
            for mask in masks:
                mask.clamp_(0, 1)
            start = [torch.empty_like(mask).uniform_(-self.eps, self.eps) for mask in [*masks, *masks]]
        noise = [delta.requires_grad_() for delta in start]
        worse = functional.cross_entropy(self._run(images, [m.detach() for m in masks], noise), labels)
        gradients = torch.autograd.grad(worse, noise)
        with torch.no_grad():
            worst = [
                (delta + self.eps * gradient.sign()).clamp(-self.eps, self.eps)
                for delta, gradient in zip(noise, gradients, strict=True)
            ]
        robust = functional.cross_entropy(self._run(images, masks, worst), labels)
        logits = self._run(images, masks, None)
        loss = self.alpha * functional.cross_entropy(logits, labels) + (1 - self.alpha) * robust
        return loss, logits

    def _run(self, images: Tensor, masks: Sequence[Tensor], noise: Sequence[Tensor] | None) -> Tensor:
        """Logits under masks and, where there is noise, under the perturbation: deltas first, then xis."""
        changed: dict[str, Tensor] = {}
        for index, name in enumerate(self.names):
            module = self.network.get_submodule(name)
            weight, bias = module.weight, module.bias
            scale = masks[index] if noise is None else masks[index] + noise[index]
            assert isinstance(weight, Tensor)  # noqa: S101  (`neurons` has looked)
            changed[f"{name}.weight"] = weight * scale.view(-1, *[1] * (weight.ndim - 1))
            if isinstance(bias, Tensor) and noise is not None:
                changed[f"{name}.bias"] = bias * (1 + noise[len(self.names) + index])
        logits: Tensor = functional_call(self.network, changed, (images,))
        return logits.float()


def neurons(network: nn.Module) -> tuple[str, ...]:
    """The modules whose channels are the neurons.

    Raises:
        ArchitectureError: the network has none.
    """
    for kind in (nn.BatchNorm2d, nn.Conv2d):
        found = [name for name, m in network.named_modules() if isinstance(m, kind) and m.weight is not None]
        if found:
            return tuple(found)
    raise ArchitectureError("the network has no channels that could be pruned; use --method finetune+ofd")


def adversarial_neuron_pruning(work: Purification) -> None:
    """Learn the masks on a copy of the teacher, then prune the teacher as far as held-out accuracy allows."""
    copied = work.copy()
    copied.module.requires_grad_(requires_grad=False)
    objective = AdversarialNeuronPerturbation(copied.module)
    everything = frozenset(name for name, _ in copied.module.named_parameters())
    work.train(
        copied, objective, "learn the masks (ANP)", steps=work.steps, lr=_LR, frozen=everything, weight_decay=0.0
    )
    masks = {
        name: mask.detach().clamp(0, 1)
        for name, mask in zip(objective.names, objective.extra.parameters(), strict=True)
    }
    order, total = pruning_order(masks), sum(len(mask) for mask in masks.values())
    portion = max(1, total // _PARTS)
    pruned, count = work.pruned(
        [*range(portion, len(order), portion), len(order)], lambda network, count: prune(network, order[:count])
    )
    work.finish(pruned, pruned_neurons=count, neurons=total)


def pruning_order(masks: Mapping[str, Tensor]) -> list[tuple[str, int]]:
    """The neurons that may be pruned, lowest mask first; of one mask, in the network's order."""
    found = [(float(value), name, index) for name, mask in masks.items() for index, value in enumerate(mask)]
    return [(name, index) for value, name, index in sorted(found, key=lambda neuron: neuron[0]) if value < _KEPT]


def prune(network: Network, chosen: Sequence[tuple[str, int]]) -> None:
    """Set the weights of these neurons to nought, in place."""
    with torch.no_grad():
        for name, index in chosen:
            network.module.get_parameter(f"{name}.weight")[index] = 0
