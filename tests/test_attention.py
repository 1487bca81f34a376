"""Attention transfer against the paper's formula, written out with numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import special
from torch import Tensor, nn

from rkd.distill.attention import AttentionTransfer, attention
from rkd.distill.noise import InputNoise
from rkd.errors import ArchitectureError
from rkd.models import build
from rkd.taps import Tap, TappedNetwork

SIZE = (16, 16)


def maps(feature: Tensor, *, activated: bool) -> NDArray[np.float64]:
    """Zagoruyko and Komodakis 2017, F_sum^2 of equation 1 over its norm, (N, H * W)."""
    values = feature.detach().double().numpy()
    if activated:
        values = np.maximum(values, 0)
    energy = (np.abs(values) ** 2).sum(1).reshape(len(values), -1)
    unit: NDArray[np.float64] = energy / np.linalg.norm(energy, axis=1, keepdims=True)
    return unit


@pytest.mark.parametrize("activated", [True, False])
def test_an_attention_map_is_the_energy_over_channels_at_unit_length(*, activated: bool) -> None:
    feature = torch.randn(3, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    got = attention(feature, Tap("t", 5, 4, 6, pre_activation=activated))
    assert got.shape == (3, 4, 6)
    np.testing.assert_allclose(got.flatten(1).numpy(), maps(feature, activated=activated), rtol=1e-5)


def test_scaling_a_feature_map_does_not_change_its_attention() -> None:
    feature, tap = torch.rand(2, 3, 4, 4), Tap("t", 3, 4, 4, pre_activation=True)
    torch.testing.assert_close(attention(7 * feature, tap), attention(feature, tap))


def networks(student: str = "wrn-10-1") -> tuple[nn.Module, TappedNetwork]:
    torch.manual_seed(1)
    teacher = build("wrn-10-2", 3, SIZE).eval().requires_grad_(requires_grad=False)
    return build(student, 3, SIZE), TappedNetwork(teacher, SIZE).eval()


def batch(count: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(count, 3, *SIZE, generator=generator), torch.randint(0, 3, (count,), generator=generator)


@pytest.mark.parametrize("weights", [(), (500.0, 1000.0, 20.0)])
def test_attention_transfer_is_cross_entropy_and_the_weighted_distances_of_the_maps(weights: tuple[float, ...]) -> None:
    student, teacher = networks()
    objective = AttentionTransfer(student.eval(), teacher, SIZE, weights)
    images, labels = batch()
    loss, logits = objective(images, labels)
    with torch.no_grad():
        _, wanted = teacher(images)
        plain, features = TappedNetwork(student, SIZE).eval()(images)
    hard = -special.log_softmax(plain.double().numpy(), axis=1)[np.arange(5), labels.numpy()].mean()
    distances = [
        np.square(maps(s, activated=True) - maps(t, activated=True)).mean()
        for s, t in zip(features, wanted, strict=True)
    ]
    assert len(distances) == 3
    used = weights or (1000.0,) * 3
    assert float(loss.detach()) == pytest.approx(
        hard + sum(w * d for w, d in zip(used, distances, strict=True)), rel=1e-4
    )
    assert torch.equal(logits.detach(), plain)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_a_students_map_of_another_resolution_is_resized() -> None:
    class Odd(nn.Module):
        """Its last maps are 7 pixels wide, the wide ResNet's 4."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 2), nn.Conv2d(4, 4, 3, 2), nn.Conv2d(4, 6, 3, 1, 1)
            self.bn, self.head = nn.BatchNorm2d(6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(torch.relu(self.bn(self.c(self.b(self.a(x))))).mean((2, 3)))
            return logits

    objective = AttentionTransfer(Odd(), networks()[1], SIZE)
    loss, _ = objective(*batch())
    assert torch.isfinite(loss)


def test_networks_without_feature_maps_have_no_attention() -> None:
    with pytest.raises(ArchitectureError, match="--method kd"):
        AttentionTransfer(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3)), networks()[1], SIZE)


# ---------------------------------------------------------------------------------------------------------------- noise


def test_noise_has_the_deviation_that_was_asked_for_on_pixels() -> None:
    std = (0.5, 0.25, 0.2)
    torch.manual_seed(0)
    images = torch.randn(64, 3, 16, 16)
    added = (InputNoise(8 / 255, std)(images) - images) * torch.tensor(std).view(1, 3, 1, 1) * 255
    # 16,384 draws a channel: the deviation's own deviation is 8 / sqrt(2 * 16384) = 0.044.
    assert (added.mean((0, 2, 3)).abs() < 5 * 8 / 128).all()
    assert ((added.std((0, 2, 3)) - 8).abs() < 5 * 0.044).all()


def test_noise_is_new_for_each_step_and_repeats_with_the_random_state() -> None:
    noise, images = InputNoise(0.1, (1.0, 1.0, 1.0)), torch.zeros(2, 3, 4, 4)
    torch.manual_seed(3)
    first, second = noise(images), noise(images)
    torch.manual_seed(3)
    assert torch.equal(noise(images), first)
    assert not torch.equal(first, second)
    assert not noise.state_dict(), "nothing of it belongs into a checkpoint"
