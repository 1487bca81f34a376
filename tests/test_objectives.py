"""Losses against formulas written out naively, and against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor, nn
from torch.nn import functional

from rkd.distill.objectives import (
    CrossEntropy,
    FeatureDistillation,
    LogitDistillation,
    _PartialL2,
    margins,
    tap_report,
)
from rkd.errors import ArchitectureError
from rkd.models import build
from rkd.taps import TappedNetwork

SIZE = (16, 16)


def naive_partial_l2(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """Heo et al. 2019, equations 2 and 3, as autograd sees them."""
    target = torch.maximum(teacher, margin)
    return ((student - target).square() * ((student > target) | (target > 0))).sum()


def random_case(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and margins, float64, with exact zeros, ties and values at the margin among them."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 4, 6, 5, 5, generator=generator, dtype=torch.float64)
    margin = -torch.rand(1, 6, 1, 1, generator=generator, dtype=torch.float64)
    kind = torch.randint(0, 6, teacher.shape, generator=generator)
    teacher = torch.where(kind == 0, 0.0, teacher)
    teacher = torch.where(kind == 1, margin, teacher)
    teacher = torch.where(kind == 2, margin - 1, teacher)
    student = torch.where(kind == 3, 0.0, student)
    student = torch.where((kind == 4) & (teacher > 0), -student.abs() - 3, student)
    # Through float32 first: both sides then start from the same numbers.
    return student.float().double(), teacher.float().double(), margin.float().double()


@pytest.mark.parametrize("seed", range(5))
def test_the_partial_l2_and_its_gradient_are_the_formulas(seed: int) -> None:
    student, teacher, margin = random_case(seed)
    student.requires_grad_()
    expected = naive_partial_l2(student, teacher, margin)
    (wanted,) = torch.autograd.grad(expected, student)
    mine = student.detach().float().requires_grad_()
    got = _PartialL2.apply(mine, teacher.float(), margin.float())
    (3 * got).backward()
    assert float(got.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert mine.grad is not None
    torch.testing.assert_close(mine.grad.double(), 3 * wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("s", "t", "m", "loss", "gradient"),
    [
        (2.0, 1.0, -0.5, 1.0, 2.0),
        (-2.0, 1.0, -0.5, 9.0, -6.0),  # the teacher is positive: below it counts as well
        (-2.0, -1.0, -0.5, 0.0, 0.0),  # the teacher is negative and the student lower than the margin
        (0.5, -1.0, -0.5, 1.0, 2.0),
        (-0.5, -1.0, -0.5, 0.0, 0.0),
        (-1.0, 0.0, -0.5, 0.0, 0.0),  # zero is not positive
        (1.0, 0.0, -0.5, 1.0, 2.0),
        (-3.0, 1e-30, -0.5, 9.0, -6.0),  # hardly positive is positive
        (-3.0, 1e6, -0.5, (1e6 + 3) ** 2, -2 * (1e6 + 3)),
        (-1.0, 0.0, 0.0, 0.0, 0.0),
    ],
)
def test_the_partial_l2_of_one_number(s: float, t: float, m: float, loss: float, gradient: float) -> None:
    student = torch.tensor([[[[s]]]], requires_grad=True)
    got = _PartialL2.apply(student, torch.tensor([[[[t]]]]), torch.tensor([[[[m]]]]))
    got.backward()
    assert float(got.detach()) == pytest.approx(loss, rel=1e-6)
    assert student.grad is not None
    assert float(student.grad) == pytest.approx(gradient, rel=1e-6)


def test_the_partial_l2_in_bf16_is_close_to_the_formula() -> None:
    student, teacher, margin = (tensor.bfloat16() for tensor in random_case(0))
    expected = naive_partial_l2(student.double(), teacher.double(), margin.double())
    got = _PartialL2.apply(student.requires_grad_(), teacher, margin.float())
    assert float(got.detach()) == pytest.approx(float(expected), rel=1e-2)


# -------------------------------------------------------------------------------------------------------------- margins


def tapped_wrn(bn: nn.BatchNorm2d | None = None) -> tuple[nn.Module, TappedNetwork]:
    torch.manual_seed(0)
    network = build("wrn-10-1", 3, SIZE).eval()
    if bn is not None:
        network.get_submodule("bn1").load_state_dict(bn.state_dict())
    return network, TappedNetwork(network, SIZE)


def test_the_margin_at_a_bn_is_the_mean_of_the_negative_part_of_its_normal() -> None:
    bn = nn.BatchNorm2d(64)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        bn.weight.copy_(torch.rand(64, generator=generator) + 0.1)
        bn.weight[::2] *= -1  # a BN's scale may be negative: the deviation is its size
        bn.bias.copy_(torch.randn(64, generator=generator) * 0.3)
        bn.weight[0], bn.bias[0] = 0.5, 1.0
        bn.weight[1], bn.bias[1] = 0.5, -4.0
    network, tapped = tapped_wrn(bn)
    found = margins(tapped, network, [])[-1].double().numpy()
    mean, deviation = bn.bias.detach().double().numpy(), np.abs(bn.weight.detach().double().numpy())
    below = stats.norm.cdf(0, mean, deviation)
    wanted = stats.truncnorm.mean(-np.inf, -mean / deviation, loc=mean, scale=deviation)
    usual = below > 1e-3
    assert usual.sum() > 50
    np.testing.assert_allclose(found[usual], wanted[usual], rtol=1e-5)
    assert (found <= 0).all()


def test_the_margin_of_a_channel_that_is_hardly_ever_negative_is_minus_three_deviations() -> None:
    bn = nn.BatchNorm2d(64)
    with torch.no_grad():
        bn.weight.fill_(0.25)
        bn.bias.fill_(2.0)  # eight deviations above zero
    network, tapped = tapped_wrn(bn)
    assert torch.equal(margins(tapped, network, [])[-1], torch.full((64,), -0.75))


def test_the_margin_of_a_dead_channel_is_its_constant_or_nought() -> None:
    bn = nn.BatchNorm2d(64)
    with torch.no_grad():
        bn.weight.zero_()
        bn.bias.copy_(torch.linspace(-1, 1, 64))
    network, tapped = tapped_wrn(bn)
    torch.testing.assert_close(margins(tapped, network, [])[-1], torch.linspace(-1, 1, 64).clamp_max(0))


def test_the_margin_at_an_addition_is_the_mean_of_the_negative_values_that_are_seen() -> None:
    torch.manual_seed(0)
    network = build("resnet20", 3, SIZE).eval()
    tapped = TappedNetwork(network, SIZE)
    batches = [torch.randn(4, 3, *SIZE), torch.randn(2, 3, *SIZE)]
    found = margins(tapped, network, batches)
    with torch.no_grad():
        values = [
            np.concatenate(parts) for parts in zip(*([v.numpy() for v in tapped(b)[1]] for b in batches), strict=True)
        ]
    for margin, value in zip(found, values, strict=True):
        for channel in range(value.shape[1]):
            negative = value[:, channel][value[:, channel] < 0]
            assert float(margin[channel]) == pytest.approx(negative.mean() if negative.size else 0, rel=1e-4)


# ------------------------------------------------------------------------------------------------------- the whole loss


def networks(teacher: str = "wrn-10-1", student: str = "wrn-10-1") -> tuple[nn.Module, TappedNetwork, list[Tensor]]:
    torch.manual_seed(1)
    made = build(teacher, 3, SIZE).eval().requires_grad_(requires_grad=False)
    tapped = TappedNetwork(made, SIZE).eval()
    return build(student, 3, SIZE), tapped, margins(tapped, made, [torch.randn(4, 3, *SIZE)])


def batch(count: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(count, 3, *SIZE, generator=generator), torch.randint(0, 3, (count,), generator=generator)


def test_feature_distillation_weighs_taps_by_halves_and_divides_by_a_thousand_images() -> None:
    student, teacher, margin = networks()
    objective = FeatureDistillation(student.eval(), teacher, SIZE, margin)
    objective.extra.eval()
    images, labels = batch()
    with torch.no_grad():
        loss, logits = objective(images, labels)
        _, wanted = teacher(images)
        plain, features = TappedNetwork(student, SIZE).eval()(images)
        probabilities = special.log_softmax(plain.double().numpy(), axis=1)
        expected = -probabilities[np.arange(5), labels.numpy()].mean()
        distances = [
            float(naive_partial_l2(connector(s).double(), t.double(), m.view(1, -1, 1, 1).double()))
            for connector, s, t, m in zip(objective.connectors, features, wanted, margin, strict=True)
        ]
    assert len(distances) == 3
    expected += sum(d * w for d, w in zip(distances, (1 / 4, 1 / 2, 1), strict=True)) / (1000 * 5)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(logits, plain)


def test_connectors_have_one_convolution_and_bn_a_pair_and_learn() -> None:
    student, teacher, margin = networks("wrn-10-2", "wrn-10-1")
    objective = FeatureDistillation(student, teacher, SIZE, margin)
    shapes = [(tuple(c[0].weight.shape), c[0].bias) for c in objective.connectors]  # type: ignore[index]
    assert shapes == [((32, 16, 1, 1), None), ((64, 32, 1, 1), None), ((128, 64, 1, 1), None)]
    loss, _ = objective(*batch())
    loss.backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in objective.extra.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_a_student_that_equals_a_positive_teacher_has_no_feature_loss() -> None:
    feature = torch.rand(2, 4, 3, 3)
    assert float(_PartialL2.apply(feature, feature.clone(), torch.full((1, 4, 1, 1), -1.0))) == 0


def test_where_no_resolution_agrees_the_students_feature_is_resized() -> None:
    class Odd(nn.Module):
        """Its maps are 15 and 7 pixels wide, the wide ResNet's 16, 8 and 4."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 2), nn.Conv2d(4, 4, 3, 2), nn.Conv2d(4, 6, 3, 1, 1)
            self.bn, self.head = nn.BatchNorm2d(6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(functional.relu(self.bn(self.c(self.b(self.a(x))))).mean((2, 3)))
            return logits

    _, teacher, margin = networks()
    objective = FeatureDistillation(Odd(), teacher, SIZE, margin)
    assert objective.pairs == [(2, 0)]
    loss, logits = objective(*batch())
    loss.backward()
    assert logits.shape == (5, 3)
    assert math.isfinite(float(loss.detach()))


def test_networks_without_feature_maps_cannot_be_distilled_by_features() -> None:
    _, teacher, margin = networks()
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))
    with pytest.raises(ArchitectureError, match="--method kd"):
        FeatureDistillation(flat, teacher, SIZE, margin)


@pytest.mark.parametrize(("temperature", "weight"), [(4.0, 0.9), (1.0, 0.5), (20.0, 1.0), (2.0, 0.0)])
def test_logit_distillation_is_hintons_formula(temperature: float, weight: float) -> None:
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(12, 4)) for _ in range(2))
    images, labels = torch.randn(6, 3, 2, 2), torch.tensor([0, 1, 2, 3, 0, 1])
    loss, logits = LogitDistillation(student, teacher, temperature, weight)(images, labels)
    with torch.no_grad():
        s, t = student(images).double().numpy(), teacher(images).double().numpy()
    p, q = special.softmax(t / temperature, axis=1), special.softmax(s / temperature, axis=1)
    divergence = special.rel_entr(p, q).sum(1).mean()
    hard = -np.log(special.softmax(s, axis=1)[np.arange(6), labels.numpy()]).mean()
    assert float(loss.detach()) == pytest.approx((1 - weight) * hard + weight * temperature**2 * divergence, rel=1e-4)
    np.testing.assert_allclose(logits.detach().numpy(), s, rtol=1e-5)
    if weight:
        loss.backward()
        assert all(p.grad is None for p in teacher.parameters())


def test_cross_entropy_is_the_mean_negative_log_probability_of_the_label() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    images, labels = torch.randn(6, 3, 2, 2), torch.tensor([0, 1, 2, 3, 0, 1])
    loss, logits = CrossEntropy(network)(images, labels)
    probabilities = special.softmax(logits.detach().double().numpy(), axis=1)
    assert float(loss.detach()) == pytest.approx(-np.log(probabilities[np.arange(6), labels.numpy()]).mean(), rel=1e-5)


def test_the_report_of_taps_has_one_line_a_pair() -> None:
    student, teacher, _ = networks()
    lines = tap_report(teacher.taps, TappedNetwork(student, SIZE).taps)
    assert len(lines) == 3
    assert all(line.startswith("features: the student's ") and " learns the teacher's " in line for line in lines)
