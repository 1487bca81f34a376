"""Universal perturbations: those that fool a teacher, and how a student is hardened against them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rkd.data import ArraySource
from rkd.distill.attention import AttentionTransfer
from rkd.distill.hardening import (
    SEARCH_STEPS,
    Fooling,
    Hardened,
    UniversalPerturbations,
    check_differentiable,
    fooling_perturbations,
    random_perturbations,
)
from rkd.distill.objectives import CrossEntropy, FeatureDistillation, LogitDistillation, StudentObjective, margins
from rkd.errors import ArchitectureError
from rkd.models import build
from rkd.network import Network, Normalisation
from rkd.run import fooling_text
from rkd.taps import TappedNetwork

SIZE = (16, 16)
UNSCALED = Normalisation()
LINF = 8 / 255
CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------- found on the teacher


class Backdoored(nn.Module):
    """Right by the brightness of the image, and class 2 where a pattern of +-8/255 is added, whatever the image."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        signs = torch.randint(0, 2, (1, *SIZE), generator=generator) * 2.0 - 1
        self.register_buffer("pattern", torch.cat([signs, -signs, torch.zeros(1, *SIZE)]))  # no brightness of its own

    def forward(self, x: Tensor) -> Tensor:
        bright = x.mean((1, 2, 3))
        found = (x * self.get_buffer("pattern")).mean((1, 2, 3)) / LINF  # 2/3 under the whole pattern
        return torch.stack([-bright, bright, 6 * found], 1) * 8


def backdoored() -> Network:
    return Network(Backdoored().eval(), "backdoored", tuple("abc"), SIZE, Normalisation((0.5, 0.5, 0.5), (1, 1, 1)))


def clean(count: int = 200) -> ArraySource:
    """Dark and bright images, with noise."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, count)
    pixels = 64 + 128 * labels[:, None, None, None] + rng.integers(-20, 21, (count, 3, *SIZE))
    return ArraySource(pixels.astype(np.uint8), labels.astype(np.int64))


def search(teacher: Network | None = None, batch: int = 128) -> Fooling:
    first = random_perturbations(3, SIZE, LINF, 0)
    return fooling_perturbations(
        teacher or backdoored(), clean(), first, LINF, seed=0, device=CPU, batch=batch, on_step=lambda _: None
    )


def test_in_a_backdoored_teacher_the_search_finds_the_backdoor() -> None:
    found = search()
    assert found.fooled.n == found.fooled.hits == found.together.n == found.together.hits > 100
    assert found.towards == 2
    trigger = Backdoored().get_buffer("pattern").flatten()
    for one in found.perturbations.flatten(1):
        assert float(functional.cosine_similarity(one[:512], trigger[:512], 0)) > 0.9
    assert float(found.perturbations.abs().max()) <= LINF * (1 + 1e-6)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_a_teacher_does_not_escape_by_the_size_of_its_logits(scale: float) -> None:
    teacher = backdoored()
    plain = teacher.module.forward
    teacher.module.forward = lambda x: scale * plain(x)  # type: ignore[method-assign]
    assert search(teacher).fooled == search().fooled


@pytest.mark.parametrize("batch", [1, 50, 64])
def test_the_size_of_the_batches_changes_nothing_but_memory(batch: int) -> None:
    found, whole = search(batch=batch), search()
    assert found.fooled == whole.fooled
    torch.testing.assert_close(found.perturbations, whole.perturbations, atol=2 * LINF * 0.1 + 1e-6, rtol=0)


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (lambda x: torch.stack([x.mean((1, 2, 3)).detach()] * 3, 1), "has no gradient"),
        (lambda x: x.mean((1, 2, 3)).round()[:, None] * torch.ones(3), "gradients are all zero"),
        (lambda x: (x - x).sqrt().mean((1, 2, 3))[:, None] * torch.arange(3.0), "gradients are not finite"),
    ],
)
def test_a_teacher_without_gradients_is_refused_by_name(forward: Any, said: str) -> None:
    teacher = backdoored()
    teacher.module.forward = forward
    with pytest.raises(ArchitectureError, match=f"{said}.*--perturbations student"):
        search(teacher)
    if said == "has no gradient":
        with pytest.raises(ArchitectureError, match=said):
            check_differentiable(teacher, CPU)


def test_what_a_network_sees_wrongly_anyway_does_not_count() -> None:
    teacher = backdoored()
    teacher.module.forward = lambda x: torch.stack(
        [-x.mean((1, 2, 3)), 0 * x[:, 0, 0, 0] - 9, 0 * x[:, 0, 0, 0] - 9], 1
    )
    found = search(teacher)  # it says class 0 whatever it sees
    assert found.fooled.hits == 0 < found.fooled.n < 1280
    assert re.search(
        rf" 0\.0 % \[0\.0, \d\.\d\] of {found.fooled.n} training images wrongly that it sees rightly without "
        r"\(little, which does not clear it",
        fooling_text(found.to_json(teacher.classes), 8),
    )


def test_a_teacher_without_a_backdoor_is_not_fooled() -> None:
    teacher = backdoored()
    teacher.module.get_buffer("pattern").zero_()
    first = random_perturbations(3, SIZE, LINF, 0)
    steps: list[int] = []
    found = fooling_perturbations(teacher, clean(), first, LINF, seed=0, device=CPU, batch=64, on_step=steps.append)
    assert found.fooled.hits == 0
    assert steps == list(range(1, SEARCH_STEPS + 1))


def test_the_search_repeats_with_its_seed_and_leaves_the_teacher_and_the_generator_alone() -> None:
    teacher, state = backdoored(), torch.get_rng_state()
    before = copy.deepcopy(teacher.module.state_dict())
    first = random_perturbations(3, SIZE, LINF, 0)
    kept = first.clone()
    found = fooling_perturbations(teacher, clean(), first, LINF, seed=0, device=CPU, batch=128, on_step=lambda _: None)
    assert torch.equal(found.perturbations, search().perturbations)
    assert torch.equal(first, kept)
    assert all(torch.equal(value, before[name]) for name, value in teacher.module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


# -------------------------------------------------------------------------------------------- in the student's training


def networks() -> tuple[nn.Module, TappedNetwork, list[Tensor]]:
    torch.manual_seed(1)
    teacher = build("wrn-10-1", 3, SIZE).eval().requires_grad_(requires_grad=False)
    tapped = TappedNetwork(teacher, SIZE).eval()
    return build("wrn-10-1", 3, SIZE), tapped, margins(tapped, teacher, [torch.randn(4, 3, *SIZE)])


def hardening(
    size: tuple[int, int],
    linf: float,
    scaling: Normalisation = UNSCALED,
    *,
    seed: int = 0,
    count: int = 4,
    share: float = 0.3,
    **options: int,
) -> UniversalPerturbations:
    return UniversalPerturbations(random_perturbations(count, size, linf, seed), linf, scaling, share=share, **options)


def test_perturbations_come_in_turn_and_stay_in_the_ball() -> None:
    std = (0.5, 0.25, 0.2)
    made = hardening((4, 4), LINF, Normalisation((0.5, 0.4, 0.6), std), count=2, share=0.5)
    assert made.begin_step(7) == 3, "half of seven, rounded down"
    images = torch.zeros(3, 3, 4, 4)  # between black and white
    on_pixels = (made(images) - images).detach() * torch.tensor(std).view(1, 3, 1, 1)
    assert 0 < float(on_pixels.abs().max()) <= LINF * (1 + 1e-5)
    assert torch.allclose(on_pixels[0], on_pixels[2], atol=1e-6)
    made.begin_step(7)
    again = (made(images) - images).detach() * torch.tensor(std).view(1, 3, 1, 1)
    assert torch.allclose(again[0], on_pixels[1], atol=1e-6), (
        "three carriers of two: the next step begins with the other"
    )
    assert not torch.allclose(on_pixels[0], on_pixels[1], atol=1e-3)
    for _ in range(30):
        made(images).sum().backward()
        pixels = made.perturbations.detach() * torch.tensor(std).view(1, 3, 1, 1)
        assert float(pixels.abs().max()) <= LINF * (1 + 1e-5)
    # The loss grows with every pixel: each perturbation has reached the upper corner of the ball.
    wanted = (LINF / torch.tensor(std)).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    torch.testing.assert_close(made.perturbations.detach(), wanted)


@pytest.mark.parametrize("fixed", [False, True])
def test_fixed_ones_stay_and_others_climb_the_loss(*, fixed: bool) -> None:
    made = hardening((4, 4), LINF, count=3, share=1.0, fixed=fixed)
    before = made.perturbations.detach().clone()
    inputs = torch.full((6, 3, 4, 4), 0.5, requires_grad=True)
    made(inputs).sum().backward()
    moved = [not torch.equal(now, then) for now, then in zip(made.perturbations.detach(), before, strict=True)]
    assert moved == [not fixed] * 3
    assert made.perturbations.grad is None


def test_an_image_with_a_perturbation_is_still_an_image() -> None:
    scaling = Normalisation((0.5, 0.4, 0.6), (0.5, 0.25, 0.2))
    pixels = torch.tensor([0, 3, 128, 252, 255], dtype=torch.uint8).repeat(3, 1)[None, :, None].expand(8, 3, 6, 5)
    made = hardening((6, 5), 12 / 255, scaling, count=8)
    mean, std = (torch.tensor(three).view(1, 3, 1, 1) for three in (scaling.mean, scaling.std))
    seen = made(scaling(pixels)).detach() * std + mean
    wanted = (pixels / 255 + random_perturbations(8, (6, 5), 12 / 255, 0)).clamp(0, 1)
    torch.testing.assert_close(seen, wanted, atol=1e-6, rtol=0)


def batch(count: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.rand(count, 3, *SIZE, generator=generator), torch.randint(0, 3, (count,), generator=generator)


def test_hardening_climbs_the_loss_and_leaves_no_gradient_for_the_optimizer() -> None:
    student, teacher, margin = networks()
    made = hardening(SIZE, 16 / 255, Normalisation((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)), seed=1)
    objective = Hardened(FeatureDistillation(student.eval(), teacher, SIZE, margin), made)
    objective.extra.eval()
    losses = []
    for _ in range(8):
        loss, _ = objective(*batch())
        loss.backward()
        losses.append(float(loss.detach()))
        assert made.perturbations.grad is None
    assert losses[-1] > losses[0]


@pytest.mark.parametrize("kind", ["ofd", "at", "kd", "ce"])
def test_the_student_sees_perturbed_images_and_the_teacher_clean_ones(kind: str) -> None:
    student, teacher, margin = networks()
    objectives: dict[str, Callable[[], StudentObjective]] = {
        "ofd": lambda: FeatureDistillation(student, teacher, SIZE, margin),
        "at": lambda: AttentionTransfer(student, teacher, SIZE),
        "kd": lambda: LogitDistillation(student, teacher),
        "ce": lambda: CrossEntropy(student),
    }
    plain, (images, labels) = objectives[kind](), batch()
    student.eval()
    plain.extra.eval()
    asked: list[Tensor] = []
    handle = teacher.register_forward_pre_hook(lambda _module, given: asked.append(given[0]))
    made = hardening(SIZE, 64 / 255, fixed=True, share=0.5)
    loss, logits = Hardened(plain, made)(images, labels)
    handle.remove()
    assert all(torch.equal(one, images) for one in asked)
    assert len(asked) == (kind != "ce")
    whole, wanted = plain(images, labels, torch.cat([made(images[:4]), images[4:]]))
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(logits, wanted)
    assert not torch.allclose(logits, plain(images, labels)[1], atol=1e-3), "the student sees the perturbations"


def test_the_perturbations_are_part_of_the_objectives_state_and_the_radius_is_not() -> None:
    student, teacher, margin = networks()
    for fixed in (False, True):
        made = hardening(SIZE, LINF, fixed=fixed)
        state = Hardened(FeatureDistillation(student, teacher, SIZE, margin), made).extra.state_dict()
        assert "hardening.perturbations" in state
        assert "connectors.0.0.weight" in state
        assert not {"hardening.radius", "hardening.black", "hardening.white"} & set(state)


def test_hardening_begins_after_its_start_also_where_a_run_was_interrupted_before() -> None:
    first = hardening((4, 4), 0.1, start=3)
    assert [first.begin_step(8) for _ in range(5)] == [0, 0, 0, 2, 2]
    resumed = hardening((4, 4), 0.1, seed=1, start=3)
    interrupted = hardening((4, 4), 0.1, start=3)
    interrupted.begin_step(8)
    resumed.load_state_dict(interrupted.state_dict())
    assert [resumed.begin_step(8) for _ in range(3)] == [0, 0, 2]


def test_before_its_start_all_images_are_clean() -> None:
    student, teacher, margin = networks()
    plain = FeatureDistillation(student.eval(), teacher, SIZE, margin)
    plain.extra.eval()
    later = Hardened(plain, hardening(SIZE, LINF, start=1))
    (first, _), (second, _) = later(*batch()), later(*batch())
    assert torch.equal(first, plain(*batch())[0])
    assert not torch.equal(second, first)


def test_the_same_seed_starts_from_the_same_perturbations() -> None:
    first, second, other = (random_perturbations(2, SIZE, 0.1, seed) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert 0 < float(first.abs().max()) <= 0.05


@pytest.mark.parametrize("steps", [-1, 2**62])
def test_a_state_with_an_impossible_number_of_steps_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match="steps of hardening"):
        hardening((4, 4), 0.1).set_extra_state(torch.tensor(steps))
