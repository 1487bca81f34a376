"""The depoisoning mask: within its cap, within its budget, and never a change to the teacher."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rkd.data import ArraySource
from rkd.detox import (
    DetoxCheck,
    Detoxification,
    DetoxRecipe,
    TapMask,
    _ascend,
    detoxify,
    masks_from_bytes,
    set_masks,
)
from rkd.distill.loop import autocast
from rkd.errors import RunError
from rkd.models import build
from rkd.network import Network, Normalisation
from rkd.npz import npz_bytes
from rkd.taps import TappedNetwork

CPU = torch.device("cpu")


def learn(
    network: Network, clean: Any, held_out: Any, recipe: DetoxRecipe, seed: int = 0, **more: Any
) -> tuple[Detoxification, TappedNetwork]:
    tapped = TappedNetwork(network.module, network.size, frozen=True)
    found = detoxify(
        tapped, network.normalisation, clean, held_out, recipe, seed=seed, device=CPU,
        autocast=lambda: autocast(CPU, "fp32"), **more,
    )  # fmt: skip
    return found, tapped


@pytest.fixture(scope="module")
def case(digits16: tuple[Any, Any]) -> tuple[Network, Any, Any]:
    """The teacher, 300 images to learn on and 200 others."""
    network, data = digits16
    return copy.deepcopy(network), data.train.subset(np.arange(300)), data.train.subset(np.arange(300, 500))


RECIPE = DetoxRecipe(accuracy_budget=2.0, cap=0.9, steps=60, batch=32, check_every=10)


@pytest.fixture(scope="module")
def learned(case: tuple[Network, Any, Any]) -> tuple[Detoxification, dict[str, Tensor], list[DetoxCheck]]:
    network, clean, held_out = case
    before = {name: tensor.clone() for name, tensor in network.module.state_dict().items()}
    seen: list[DetoxCheck] = []
    found, _ = learn(network, clean, held_out, RECIPE, on_check=seen.append)
    return found, before, seen


def accuracy_of(network: Network, masks: tuple[TapMask, ...], source: Any) -> float:
    """Percent, with A' = (1 - m) A + m P written out."""
    tapped = TappedNetwork(network.module, network.size).eval()
    parts = [(torch.from_numpy(mask.mask), torch.from_numpy(mask.replacement)) for mask in masks]
    tapped.set_edits([lambda a, m=m, p=p: (1 - m) * a + m * p for m, p in parts])
    images, labels = source.batch(np.arange(len(source)))
    with torch.no_grad():
        logits, _ = tapped(network.normalisation(torch.from_numpy(images)))
    return 100 * float(np.mean(logits.argmax(1).numpy() == labels))


# ---------------------------------------------------------------------------------------------------------- dual ascent


@pytest.mark.parametrize("budget", [0.0, 0.5, 1.0, 5.0, 100.0])
def test_lambda_rises_while_points_are_left_and_falls_when_they_are_spent(budget: float) -> None:
    weight = 0.3
    assert _ascend(weight, budget - 0.4, budget) > weight
    assert _ascend(weight, budget, budget) == weight
    assert _ascend(weight, budget + 0.4, budget) < weight


def test_lambda_falls_faster_than_it_rises() -> None:
    up = math.log(_ascend(1.0, -1000.0, 1.0))
    down = -math.log(_ascend(1.0, 1000.0, 1.0))
    assert 0 < up < down


def test_lambda_stays_within_a_thousandth_and_a_thousand() -> None:
    high = low = 1.0
    for _ in range(200):
        high, low = _ascend(high, 0.0, 1.0), _ascend(low, 50.0, 1.0)
    assert (low, high) == (1e-3, 1e3)


# -------------------------------------------------------------------------------------------------- what a mask must be


def test_the_mask_is_within_its_cap_and_has_a_value_for_each_place_of_each_tap(
    case: tuple[Network, Any, Any], learned: tuple[Detoxification, Any, Any]
) -> None:
    taps = TappedNetwork(case[0].module, case[0].size).taps
    masks = learned[0].masks
    assert [mask.tap for mask in masks] == [tap.name for tap in taps]
    for mask, tap in zip(masks, taps, strict=True):
        assert mask.mask.shape == mask.replacement.shape == tap.shape
        assert mask.mask.dtype == mask.replacement.dtype == np.float32
        assert mask.mask.min() >= 0
        assert 0 < mask.mask.max() <= np.float32(RECIPE.cap)
        assert np.isfinite(mask.replacement).all()


def test_a_mask_by_channel_is_one_number_and_one_shift_a_channel(case: tuple[Network, Any, Any]) -> None:
    network, clean, held_out = case
    found, tapped = learn(network, clean, held_out, replace(RECIPE, shape="channel", steps=20, check_every=10))
    assert found.variance < 1
    for mask, tap in zip(found.masks, tapped.taps, strict=True):
        assert mask.mask.shape == mask.replacement.shape == tap.shape
        for values in (mask.mask, mask.replacement):
            assert np.ptp(values, axis=(1, 2)).max() == 0
            assert len(np.unique(values[:, 0, 0])) > 1


def test_the_budget_is_kept_on_the_held_out_images_as_counted_here(
    case: tuple[Network, Any, Any], learned: tuple[Detoxification, Any, Any]
) -> None:
    network, _, held_out = case
    found = learned[0]
    identity = tuple(TapMask(m.tap, np.zeros_like(m.mask), m.replacement) for m in found.masks)
    assert found.n == len(held_out)
    assert found.teacher_accuracy == pytest.approx(accuracy_of(network, identity, held_out))
    assert found.teacher_accuracy > 80, "the teacher must know something for this test to mean anything"
    assert found.accuracy == pytest.approx(accuracy_of(network, found.masks, held_out), abs=0.5)
    assert found.accuracy >= found.teacher_accuracy - RECIPE.accuracy_budget


def test_the_features_vary_less_with_the_mask(
    case: tuple[Network, Any, Any], learned: tuple[Detoxification, Any, Any]
) -> None:
    network, clean, _ = case
    images, _ = clean.batch(np.arange(len(clean)))
    inputs = network.normalisation(torch.from_numpy(images))
    tapped = TappedNetwork(network.module, network.size).eval()
    with torch.no_grad():
        before = [value.var(0).sum() for value in tapped(inputs)[1]]
        set_masks(tapped, learned[0].masks, CPU, torch.float32)
        after = [value.var(0).sum() for value in tapped(inputs)[1]]
    ratio = float(np.mean([float(a / b) for a, b in zip(after, before, strict=True)]))
    assert ratio < 0.9
    assert learned[0].variance == pytest.approx(ratio, abs=0.15)  # measured on one batch of 32


def test_every_look_is_told_and_kept_and_the_best_within_the_budget_is_taken(
    learned: tuple[Detoxification, Any, list[DetoxCheck]],
) -> None:
    found, _, seen = learned
    assert tuple(seen) == found.history
    assert [check.step for check in seen] == [10, 20, 30, 40, 50, 60]
    within = [check for check in seen if check.lost <= RECIPE.accuracy_budget]
    assert found.variance == min(check.variance for check in within)


def test_the_teachers_weights_and_bn_statistics_are_not_touched(
    case: tuple[Network, Any, Any], learned: tuple[Any, dict[str, Tensor], Any]
) -> None:
    after = case[0].module.state_dict()
    assert list(after) == list(learned[1])
    assert all(torch.equal(learned[1][name], tensor) for name, tensor in after.items())


def test_after_learning_the_teacher_is_left_without_edits(case: tuple[Network, Any, Any]) -> None:
    network, clean, held_out = case
    _, tapped = learn(network, clean, held_out, DetoxRecipe(steps=2, batch=8, check_every=1))
    images = torch.randn(2, 3, *network.size)
    with torch.no_grad():
        torch.testing.assert_close(tapped(images)[0], network.module(images), rtol=1e-4, atol=1e-4)


def test_the_same_seed_gives_the_same_masks_and_another_seed_others(case: tuple[Network, Any, Any]) -> None:
    recipe = DetoxRecipe(accuracy_budget=100, steps=4, batch=16, check_every=2)
    first, second, other = (learn(*case, recipe, seed=seed)[0].to_bytes() for seed in (5, 5, 6))
    assert first == second
    assert first != other


def test_an_edit_is_the_papers_equation() -> None:
    rng = np.random.default_rng(0)
    mask, replacement = rng.random((2, 4, 3, 5)).astype(np.float32)
    a = rng.normal(size=(2, 4, 3, 5)).astype(np.float32)
    got = TapMask("t", mask, replacement).edit(CPU, torch.float32)(torch.from_numpy(a)).numpy()
    np.testing.assert_allclose(got, (1 - mask) * a + mask * replacement, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------- nothing can be given


class Knife(nn.Module):
    """Class 0 exactly where the image is brighter than 0.5: any step towards the mean of dark images loses it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False)
        nn.init.constant_(self.a.weight, 1 / 3)
        nn.init.ones_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        v = functional.relu(self.b(self.a(x))).mean((1, 2, 3))
        return torch.stack([v, torch.full_like(v, 0.5)], 1)


def knife(level: int) -> tuple[Network, ArraySource, ArraySource]:
    network = Network(Knife().eval(), "knife", ("bright", "dark"), (4, 4), Normalisation())
    dark = ArraySource(np.zeros((20, 3, 4, 4), np.uint8), np.ones(20, np.int64))
    bright = ArraySource(np.full((5, 3, 4, 4), level, np.uint8), np.zeros(5, np.int64))
    return network, dark, bright


def test_where_every_mask_costs_more_than_the_budget_the_identity_is_returned() -> None:
    network, dark, bright = knife(128)  # 128 / 255 is just above one half
    found, _ = learn(network, dark, bright, DetoxRecipe(accuracy_budget=0, steps=6, batch=4, check_every=2))
    assert all(check.lost == 100 for check in found.history)
    assert found.teacher_accuracy == found.accuracy == 100
    assert found.variance == 1
    assert all(not mask.mask.any() for mask in found.masks)
    assert accuracy_of(network, found.masks, bright) == 100


def test_a_feature_that_never_varies_gives_finite_masks() -> None:
    network, dark, bright = knife(250)
    found, _ = learn(network, dark, bright, DetoxRecipe(accuracy_budget=0, steps=6, batch=4, check_every=2))
    assert found.accuracy == 100
    assert all(np.isfinite(m.mask).all() and np.isfinite(m.replacement).all() for m in found.masks)
    assert math.isfinite(found.variance)


def test_two_images_are_enough_to_learn_on(case: tuple[Network, Any, Any]) -> None:
    network, clean, held_out = case
    two = clean.subset(np.arange(2))
    found, _ = learn(network, two, held_out, DetoxRecipe(accuracy_budget=100, steps=2, batch=2, check_every=1))
    assert all(np.isfinite(m.mask).all() and np.isfinite(m.replacement).all() for m in found.masks)


# ---------------------------------------------------------------------------------------------------- kept and read again


def test_masks_survive_being_written_and_read(learned: tuple[Detoxification, Any, Any]) -> None:
    found = learned[0]
    read = masks_from_bytes(found.to_bytes(), "masks.npz")
    assert [mask.tap for mask in read] == [mask.tap for mask in found.masks]
    for a, b in zip(read, found.masks, strict=True):
        assert np.array_equal(a.mask, b.mask)
        assert np.array_equal(a.replacement, b.replacement)


def test_more_than_ten_taps_keep_their_order_and_names_with_dots() -> None:
    masks = tuple(
        TapMask(f"layer{i}.bn", np.zeros((1, 1, 1), np.float32), np.full((1, 1, 1), i, np.float32)) for i in range(12)
    )
    read = masks_from_bytes(Detoxification(masks, 0, 0, 1, 0, 1, ()).to_bytes(), "masks.npz")
    assert [mask.tap for mask in read] == [mask.tap for mask in masks]
    assert [float(mask.replacement[0, 0, 0]) for mask in read] == list(range(12))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: b"not a zip" + data[9:],
        lambda data: data[:300] + bytes([data[300] ^ 1]) + data[301:],
        lambda data: data.replace(b".mask.npy", b".masq.npy"),
        lambda data: data.replace(b"0.bn", b"x.bn"),
    ],
    ids=["empty", "half", "a byte short", "other magic", "a flipped bit", "a missing array", "no number"],
)
def test_damaged_masks_are_refused_by_name(damage: Callable[[bytes], bytes]) -> None:
    array = np.ones((3, 4, 4), np.float32)
    data = Detoxification((TapMask("bn1", array, array),), 0, 0, 1, 0, 1, ()).to_bytes()
    masks_from_bytes(data, "ok")
    with pytest.raises(RunError, match=r"runs/x/masks\.npz does not hold masks"):
        masks_from_bytes(damage(data), "runs/x/masks.npz")


@pytest.mark.parametrize("value", ["a", np.nan, np.inf, 0.3, -0.1])
def test_values_that_no_mask_has_are_refused_by_name(value: Any) -> None:
    array = np.full((3, 4, 4), 0.2, np.float32)
    odd = np.full((3, 4, 4), value, None if isinstance(value, str) else np.float32)
    data = npz_bytes({"0.bn1.mask": odd, "0.bn1.replacement": array})
    with pytest.raises(RunError, match=r"masks\.npz does not hold masks: 0\.bn1\.mask"):
        masks_from_bytes(data, "masks.npz", cap=0.25)
    masks_from_bytes(npz_bytes({"0.bn1.mask": array, "0.bn1.replacement": array}), "masks.npz", cap=0.2)


@pytest.mark.parametrize("other", ["wrn-10-2", "resnet20"])
def test_another_networks_masks_are_refused(learned: tuple[Detoxification, Any, Any], other: str) -> None:
    tapped = TappedNetwork(build(other, 10, (16, 16)).eval(), (16, 16))
    with pytest.raises(RunError, match="the masks are for taps"):
        set_masks(tapped, learned[0].masks, CPU, torch.float32)


def test_too_few_or_duplicate_masks_are_refused(
    case: tuple[Network, Any, Any], learned: tuple[Detoxification, Any, Any]
) -> None:
    tapped = TappedNetwork(case[0].module, case[0].size)
    for masks in (learned[0].masks[1:], (*learned[0].masks[1:], learned[0].masks[1]), ()):
        with pytest.raises(RunError, match="the masks are for taps"):
            set_masks(tapped, masks, CPU, torch.float32)
