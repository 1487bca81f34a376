"""Purify a teacher before it is distilled: the defences that work on a network's weights, as baselines.

    finetune    train the teacher further on the clean images
    prune       fine-pruning: prune channels that clean images leave dormant, then fine-tune
    nad         fine-tune a copy, then train the teacher under the copy's attention
    anp         prune the neurons that adversarial perturbations of the weights rely on

All of them see the clean training budget only, train in the one loop of `rkd.distill` and leave `purified.safetensors`
in the run directory. A fifth of the budget, at most 1,000 images, is held out: it decides how much is pruned.
"""

from rkd.purify.stage import Purification, purified

__all__ = ["Purification", "purified"]
