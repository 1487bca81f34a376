"""Hardening: a student that does not follow what moves many images at once.

A backdoor that survives distillation is a universal perturbation: one change that leads any image to the target class,
because the teacher's features respond to it. So before the student is trained, the perturbations are looked for that do
the teacher the most harm on clean images, within a ball, without knowing the trigger or the target class (they are what
trigger inversion would call a candidate); in most teachers with such a backdoor they lead to its target. While the student is trained,
some of its images carry one of them, while the labels and the teacher's features stay those of the clean images
(universal adversarial training, Shafahi et al., AAAI 2020; with the teacher's perturbations and feature distillation).

Perturbations can also be looked for on the student while it is trained, as that paper does; docs/defaults.md compares.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rkd.data import Source
from rkd.distill.objectives import StudentObjective
from rkd.errors import ArchitectureError, RunError, first_line, ran_out_of_memory
from rkd.metrics import Images, Labels, Proportion
from rkd.network import Network, Normalisation
from rkd.npz import npz_bytes, read_npz
from rkd.progress import progress, say
from rkd.run import PERTURBATIONS, Run, fooling_text

COUNT = 4  # perturbations
_STEP = 0.1  # of the radius
SEARCH_STEPS = 30  # on the teacher
_LOOK = 128  # images a step of the search
_LIMIT_BYTES = 2**31
_MOST_STEPS = 2**40


@dataclass(frozen=True)
class Fooling:
    """Perturbations that fool a network.

    Attributes:
        perturbations: (K, 3, H, W), on pixels in [0, 1].
        fooled: of the different images of the last steps that the network sees rightly, the share that it does not
            under one of them, when they were looked at last.
        towards: the class that these are seen as most often.
        together: share of these that are seen as it.
    """

    perturbations: Tensor
    fooled: Proportion
    towards: int
    together: Proportion

    def to_json(self, classes: tuple[str, ...]) -> dict[str, Any]:
        """As it goes into run.json."""
        return {
            "fooled": self.fooled.to_json(), "towards": classes[self.towards], "together": self.together.to_json()
        }  # fmt: skip


def random_perturbations(count: int, size: tuple[int, int], linf: float, seed: int) -> Tensor:
    """(count, 3, H, W), uniform within half the radius `linf`, on pixels in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, *size, generator=generator).mul_(2).sub_(1).mul_(linf / 2)


def fooling_perturbations(
    teacher: Network,
    clean: Source,
    first: Tensor,
    linf: float,
    *,
    seed: int,
    device: torch.device,
    batch: int,
    on_step: Callable[[int], None],
) -> Fooling:
    """Look for the universal perturbations that do a network the most harm on clean images.

    What climbs is how far another class's logit is above the true one's: unlike cross-entropy it has a gradient however
    sure the network is, so a teacher does not escape by large logits.

    Args:
        teacher: the network, in eval mode.
        clean: training images with labels.
        first: (K, 3, H, W), where the search starts, on pixels in [0, 1].
        linf: radius of the ball, on pixels in [0, 1].
        seed: which images are looked at.
        device: where to compute.
        batch: images at once, at most.
        on_step: called with the steps done, of SEARCH_STEPS.

    Raises:
        ArchitectureError: the network has no gradient, or none that is finite.
    """
    found = first.to(device)
    rng = np.random.default_rng([seed, 0xF001])
    mistakes: dict[int, int] = {}  # by image: what it is wrongly seen as, or -1
    for step in range(SEARCH_STEPS):
        chosen = np.sort(rng.permutation(len(clean))[:_LOOK])
        images, labels = clean.batch(chosen)
        gradient = torch.zeros_like(found)
        for start in range(0, len(images), batch):
            which = torch.arange(start, min(start + batch, len(images)), device=device) % len(found)
            pixels, truth = _on(device, images[start : start + batch], labels[start : start + batch])
            part, said = _slope(teacher, pixels, truth, found, which)
            gradient += part
            if 3 * step >= 2 * SEARCH_STEPS:
                with torch.no_grad():
                    seen = teacher.module(_inputs(teacher, pixels)).argmax(1) == truth
                wrong = torch.where(said == truth, -1, said)[seen].tolist()
                mistakes |= zip(chosen[start : start + batch][seen.cpu().numpy()].tolist(), wrong, strict=True)
        if not gradient.isfinite().all() or not gradient.any():
            raise ArchitectureError(
                f"{teacher.arch}: its gradients are {'all zero' if gradient.isfinite().all() else 'not finite'}, so what fools it "
                "cannot be looked for; use --perturbations student"
            )
        found = (found + gradient.sign() * linf * _STEP).clamp(-linf, linf)
        on_step(step + 1)
    counts = np.bincount([one for one in mistakes.values() if one >= 0], minlength=len(teacher.classes))
    fooled = int(counts.sum())
    return Fooling(
        found.cpu(), Proportion(fooled, len(mistakes)), int(counts.argmax()), Proportion(int(counts.max()), fooled)
    )


def check_differentiable(teacher: Network, device: torch.device) -> None:
    """See that what fools a teacher can be looked for, before anything is written.

    Raises:
        ArchitectureError: it is the user's own network, and has no gradient.
    """
    pixels = torch.full((1, 3, *teacher.size), 0.5, device=device)
    nothing = torch.zeros(1, device=device, dtype=torch.long)
    _slope(teacher, pixels, nothing, torch.zeros_like(pixels), nothing)


def _on(device: torch.device, images: Images, labels: Labels) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(images).to(device).float() / 255, torch.from_numpy(labels).to(device)


def _inputs(teacher: Network, pixels: Tensor) -> Tensor:
    return teacher.normalisation(255 * pixels).contiguous(memory_format=torch.channels_last)


def _slope(
    teacher: Network, pixels: Tensor, truth: Tensor, perturbations: Tensor, which: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of the margin by the perturbations, and what the network says under them.

    Raises:
        ArchitectureError: the network has no gradient.
    """
    moving = perturbations.detach().clone().requires_grad_()
    try:
        logits = teacher.module(_inputs(teacher, (pixels + moving[which]).clamp(0, 1))).float()
        true = logits.gather(1, truth[:, None]).squeeze(1)
        other = logits.scatter(1, truth[:, None], -torch.inf).amax(1)
        (gradient,) = torch.autograd.grad((other - true).sum(), moving)
    except RuntimeError as error:
        if ran_out_of_memory(error):
            raise
        raise ArchitectureError(
            f"{teacher.arch} has no gradient ({first_line(error)}), so what fools it cannot be looked for; use --perturbations student"
        ) from error
    return gradient, logits.detach().argmax(1)


def fooling_of_run(
    run: Run,
    teacher: Network,
    clean: Source,
    first: Tensor,
    linf: float,
    *,
    seed: int,
    device: torch.device,
    batch: int,
) -> Tensor:
    """What fools a run's teacher: taken from the run, or looked for by `fooling_perturbations` and kept there.

    Args:
        run: where they are kept.
        teacher: its teacher.
        clean: its training images.
        first: (K, 3, H, W), where the search starts.
        linf: radius of the ball.
        seed: which images are looked at.
        device: where to compute.
        batch: images at once, at most.

    Raises:
        RunError: what the run holds is not what it would have kept.
        ArchitectureError: the teacher has no gradient.
    """
    path = run.path / PERTURBATIONS
    if (data := run.kept(PERTURBATIONS)) is not None:
        try:
            kept = torch.from_numpy(read_npz(io.BytesIO(data), _LIMIT_BYTES)["perturbations"])
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} does not hold perturbations: {error}") from error
        if kept.shape != first.shape or kept.dtype != first.dtype or not kept.abs().amax() <= linf * (1 + 1e-5):
            raise RunError(f"{path} holds other perturbations than this run's; start a new run")
        return kept
    with progress("look for what fools the teacher", SEARCH_STEPS) as bar:
        found = fooling_perturbations(
            teacher, clean, first, linf, seed=seed, device=device, batch=batch, on_step=bar.update
        )
    summary = found.to_json(teacher.classes)
    run.keep(PERTURBATIONS, npz_bytes({"perturbations": found.perturbations.numpy()}), fooling=summary)
    say(f"{fooling_text(summary, 255 * linf)}; the student is hardened against them")
    return found.perturbations


class UniversalPerturbations(nn.Module):
    """What some of a student's images carry while it is hardened.

    Args:
        first: (K, 3, H, W), the perturbations at the start, on pixels in [0, 1].
        linf: radius of the ball, on pixels in [0, 1].
        scaling: what the images were normalised by.
        fixed: whether they stay as they are. Otherwise they climb the student's loss, with the gradient that the training
            step has computed anyway.
        share: of a batch's images that carry one; at least one image does.
        start: steps before the first image does: docs/defaults.md says what a late start is worth.
    """

    def __init__(
        self,
        first: Tensor,
        linf: float,
        scaling: Normalisation,
        *,
        share: float,
        fixed: bool = False,
        start: int = 0,
    ) -> None:
        super().__init__()
        self.share, self.start = share, start
        self.step = 0
        mean, deviations = (torch.tensor(three).view(1, 3, 1, 1) for three in (scaling.mean, scaling.std))
        self.register_buffer("radius", linf / deviations, persistent=False)
        self.register_buffer("black", -mean / deviations, persistent=False)
        self.register_buffer("white", (1 - mean) / deviations, persistent=False)
        self.perturbations = nn.Parameter(first / deviations, requires_grad=not fixed)
        if not fixed:
            self.perturbations.register_post_accumulate_grad_hook(self._ascend)  # type: ignore[no-untyped-call]

    def begin_step(self, images: int) -> int:
        """Begin a training step of so many images: how many of them, from the first on, carry a perturbation."""
        self.step += 1
        return max(1, int(self.share * images)) if self.step > self.start else 0

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) to the same, each with a perturbation, cut off at black and white as an image is."""
        # In turn: a small batch does not carry the same ones every time.
        which = (torch.arange(len(images), device=images.device) + self.step * len(images)) % len(self.perturbations)
        return (images + self.perturbations[which]).clamp(self.get_buffer("black"), self.get_buffer("white"))

    def get_extra_state(self) -> Tensor:
        """The steps so far: a resumed run goes on counting. No buffer, which each step would fetch from the device."""
        return torch.tensor(self.step)

    def set_extra_state(self, state: Tensor) -> None:
        """Inverse of `get_extra_state`.

        Raises:
            ValueError: no number of steps.
        """
        if not 0 <= int(state) < _MOST_STEPS:
            raise ValueError(f"{int(state)} steps of hardening")
        self.step = int(state)

    def _ascend(self, perturbations: Tensor) -> None:
        """One step of signed-gradient ascent on the student's loss, inside the ball, as part of the backward pass."""
        gradient = perturbations.grad
        assert gradient is not None  # noqa: S101  (the hook runs when it is there)
        radius = self.get_buffer("radius")
        with torch.no_grad():
            perturbations.add_(gradient.nan_to_num().sign() * radius * _STEP)
            perturbations.copy_(perturbations.minimum(radius).maximum(-radius))
        perturbations.grad = None


class Hardened:
    """An objective some of whose student's images carry a perturbation, while labels and teacher are those of clean ones.

    They are one batch with the clean ones, normalised together. Apart, with running statistics of clean images alone, the
    student keeps more accuracy, but follows a trigger that is larger than the radius: docs/defaults.md has figures.

    Args:
        objective: of the student.
        hardening: the perturbations.
    """

    def __init__(self, objective: StudentObjective, hardening: UniversalPerturbations) -> None:
        self.objective, self.hardening = objective, hardening
        self.extra: nn.Module = nn.ModuleDict({**dict(objective.extra.named_children()), "hardening": hardening})

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See `rkd.distill.objectives.Objective`."""
        carriers = self.hardening.begin_step(len(images))
        if not carriers:
            return self.objective(images, labels)
        seen = torch.cat([self.hardening(images[:carriers]), images[carriers:]])
        return self.objective(images, labels, seen.contiguous(memory_format=torch.channels_last))
