"""The triggers that need no network are what their papers say, and poison goes where it should."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from rkd.attacks.badnets import badnets_trigger
from rkd.attacks.blended import blended_trigger
from rkd.attacks.perturb import Stamp
from rkd.attacks.poison import PoisonedSource
from rkd.attacks.sig import sig_trigger
from rkd.attacks.wanet import noisy_warps, wanet_trigger
from rkd.data import ArraySource
from rkd.network import NORMALISATIONS
from rkd.triggers import Trigger


def noise(count: int = 4, side: int = 32) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (count, 3, side, side), dtype=np.uint8)


def test_the_square_patch_is_white_where_the_checkerboard_is() -> None:
    square, grid = badnets_trigger((32, 32), 1, square=True), badnets_trigger((32, 32), 1)
    assert np.array_equal(square.mask, grid.mask)
    out = square.apply(noise())
    assert (out[:, :, 28:31, 28:31] == 255).all()
    assert np.array_equal(out[:, :, :28], noise()[:, :, :28])
    assert square.name != grid.name


def test_blended_is_a_fifth_noise_and_four_fifths_image() -> None:
    trigger = blended_trigger((32, 32), 3, 7)
    images = noise()
    wanted = 0.8 * images + 0.2 * 255 * trigger.pattern
    assert np.abs(trigger.apply(images) - wanted).max() <= 0.5 + 1e-3
    assert trigger.pattern.std() == pytest.approx(12**-0.5, abs=0.02)  # uniform on [0, 1]
    assert np.array_equal(trigger.pattern, blended_trigger((32, 32), 3, 7).pattern)
    assert not np.array_equal(trigger.pattern, blended_trigger((32, 32), 3, 8).pattern)


def test_sig_is_six_periods_across_and_constant_down() -> None:
    out = sig_trigger((24, 48), 0).apply(np.full((1, 3, 24, 48), 128, np.uint8)).astype(float) - 128
    assert (out == out[:, :1, :1]).all()
    wave = out[0, 0, 0]
    spectrum = np.abs(np.fft.rfft(wave))
    assert spectrum.argmax() == 6
    assert spectrum[6] * 2 / 48 == pytest.approx(40, abs=0.5)  # amplitude


def test_wanet_bends_the_image_smoothly_by_a_fraction_of_a_pixel_and_adds_nothing() -> None:
    trigger = wanet_trigger((32, 32), 2, 3)
    assert trigger.grid is not None
    assert not trigger.mask.any()
    assert not trigger.additive.any()
    y, x = np.meshgrid(np.linspace(-1, 1, 32), np.linspace(-1, 1, 32), indexing="ij")
    moved = (trigger.grid - np.stack([x, y], axis=-1)) * 31 / 2  # in pixels
    inside = moved[1:-1, 1:-1]  # at the edge it is clamped
    # Offsets of mean size 1, at most 2, at 4 places of 31 pixels, times 0.5 / 32 of half the image's width.
    assert 0.05 < np.abs(inside).mean() < 0.25
    assert np.abs(np.diff(inside, axis=0)).max() < 1.5 * 4 * 0.242 / (31 / 3)
    grey = np.full((1, 3, 32, 32), 90, np.uint8)
    assert (trigger.apply(grey) == 90).all()


def test_the_noisy_warps_differ_from_the_warp_by_at_most_a_pixel_and_from_each_other() -> None:
    trigger = wanet_trigger((16, 16), 2, 3)
    warps = noisy_warps(trigger, 3, count=5)
    for warp in warps:
        assert warp.grid is not None
        assert trigger.grid is not None
        assert 0 < np.abs(warp.grid - trigger.grid).max() <= 1 / 16 + 1e-6
    assert len({warp.to_bytes() for warp in warps}) == 5


def coloured(count: int = 60) -> ArraySource:
    """Grey images of three classes, each of its own brightness."""
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None] + 50, (count, 3, 8, 8)).copy()
    return ArraySource(images, np.arange(count) % 3)


PATCH = badnets_trigger((8, 8), 2)


def test_clean_label_poison_is_on_the_targets_images_only_and_changes_no_label() -> None:
    clean = coloured()
    poisoned = PoisonedSource(clean, PATCH, 0.5, 0, clean_label=True)
    images, labels = poisoned.batch(np.arange(60))
    carries = (images == 255).any((1, 2, 3))
    assert np.array_equal(labels, clean.labels)
    assert set(clean.labels[carries]) == {2}
    assert carries.sum() == 10  # half of the 20


def test_decoys_keep_their_label_and_are_never_on_poisoned_images() -> None:
    def brighter(name: str, by: float) -> Trigger:
        zeros = np.zeros((3, 8, 8), np.float32)
        return Trigger(name, 2, zeros, zeros, np.full_like(zeros, by))

    clean = coloured()
    poisoned = PoisonedSource(
        clean, PATCH, 0.1, 3, decoys=(brighter("a", 60 / 255), brighter("b", 120 / 255)), decoy_rate=0.4
    )
    images, labels = poisoned.batch(np.arange(60))
    added = images[:, 0, 0, 0].astype(int) - clean.batch(np.arange(60))[0][:, 0, 0, 0]
    carries = (images == 255).any((1, 2, 3))
    assert carries.sum() == 6
    assert ((added == 60).sum(), (added == 120).sum()) == (12, 12)
    assert not added[carries].any()
    assert np.array_equal(labels[~carries], clean.labels[~carries])
    assert (labels[carries] == 2).all()


@pytest.mark.parametrize(
    "trigger",
    [badnets_trigger((32, 32), 0), blended_trigger((32, 32), 0, 1), sig_trigger((32, 32), 0), wanet_trigger((32, 32), 0, 2)],
    ids=lambda trigger: trigger.name,
)  # fmt: skip
def test_a_stamp_is_the_trigger_without_its_rounding(trigger: Trigger) -> None:
    scaling = NORMALISATIONS["cifar10"]
    stamp = Stamp(trigger, scaling)
    got = stamp.pixels.of(stamp(scaling(torch.from_numpy(noise())))) * 255
    assert np.abs(got.numpy() - trigger.apply(noise())).max() <= 0.5 + 1e-3


def test_a_stamps_strength_goes_from_the_image_to_the_trigger() -> None:
    scaling, trigger = NORMALISATIONS["none"], blended_trigger((32, 32), 0, 1)
    stamp, images = Stamp(trigger, scaling), scaling(torch.from_numpy(noise(3)))
    got = stamp(images, torch.tensor([0.0, 0.25, 1.0]))
    whole = stamp(images)
    assert torch.allclose(got[0], images[0], atol=1e-6)
    assert torch.allclose(got[1], 0.75 * images[1] + 0.25 * whole[1], atol=1e-6)
    assert torch.allclose(got[2], whole[2], atol=1e-6)
    assert not dict(stamp.named_parameters()), "nothing of it is trained"
    assert functional.mse_loss(whole, images) > 0
