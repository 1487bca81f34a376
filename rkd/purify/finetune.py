"""Fine-tuning, alone and under attention (NAD)."""

from __future__ import annotations

from rkd.distill.attention import AttentionTransfer
from rkd.distill.objectives import CrossEntropy
from rkd.errors import ArchitectureError
from rkd.network import Network
from rkd.purify.stage import Purification
from rkd.taps import TappedNetwork

FINETUNE_LR = 0.02  # with attention, 0.05 was seen to take a small network apart
_NAD_FIRST, _NAD_OTHERS = 500.0, 1000.0  # the paper's weights of the attention at the first and at later stages


def finetune(work: Purification) -> None:
    """Train the whole teacher further on clean images."""
    network = work.copy()
    work.train(network, CrossEntropy(network.module), "fine-tune the teacher", steps=work.steps, lr=FINETUNE_LR)
    work.finish(network)


def neural_attention_distillation(work: Purification) -> None:
    """NAD (Li et al., "Neural Attention Distillation", ICLR 2021).

    A copy of the teacher is fine-tuned for half the steps; then the teacher is trained on clean images with its
    attention pulled towards the copy's.

    Raises:
        ArchitectureError: no feature map was found.
    """

    def fine_tuned() -> Network:
        network = work.copy()
        objective = CrossEntropy(network.module)
        work.train(network, objective, "fine-tune a copy (NAD)", steps=max(1, work.steps // 2), lr=FINETUNE_LR)
        return network

    guide = work.trained_once("finetuned.safetensors", fine_tuned)
    guide.module.eval().requires_grad_(requires_grad=False)
    tapped = TappedNetwork(guide.module, guide.size, frozen=True).eval()
    if not tapped.taps:
        raise ArchitectureError(f"no feature map was found in {guide.arch}, whose attention NAD needs")
    network = work.copy()
    weights = (_NAD_FIRST, *(_NAD_OTHERS for _ in tapped.taps[1:]))
    objective = AttentionTransfer(network.module, tapped, network.size, weights)
    work.train(network, objective, "purify the teacher (NAD)", steps=work.steps, lr=FINETUNE_LR)
    work.finish(network)
