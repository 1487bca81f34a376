"""The PNG encoder, checked against Pillow's decoder."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from rkd.bench.report.png import data_uri, encode_png, heat_pixels


def decode(data):
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image.mode, np.asarray(image)


def gradient(height, width):
    return np.fromfunction(lambda y, x, c: (3 * x + 5 * y + 40 * c) % 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    "pixels",
    [
        np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8),
        gradient(33, 64),
        gradient(64, 33).transpose(1, 0, 2),
        np.zeros((1, 1, 3), np.uint8),
        np.full((4, 9, 3), 255, np.uint8),
    ],
    ids=["noise", "gradient", "not-contiguous", "one-pixel", "flat"],
)
def test_rgb_comes_back_as_it_was(pixels):
    mode, decoded = decode(encode_png(pixels))
    assert mode == "RGB"
    np.testing.assert_array_equal(decoded, pixels)


def test_grey_comes_back_as_it_was():
    pixels = np.random.default_rng(1).integers(0, 256, (6, 11, 1), dtype=np.uint8)
    mode, decoded = decode(encode_png(pixels))
    assert mode == "L"
    np.testing.assert_array_equal(decoded, pixels[..., 0])


def test_data_uri_holds_the_png():
    pixels = gradient(4, 4)
    kind, _, payload = data_uri(pixels).partition(",")
    assert kind == "data:image/png;base64"
    np.testing.assert_array_equal(decode(base64.b64decode(payload))[1], pixels)


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)],
)
def test_other_shapes_and_types_are_refused(pixels):
    with pytest.raises(ValueError, match="expected uint8"):
        encode_png(pixels)


def test_heat_map_darkens_steadily_so_that_it_reads_without_colour():
    ramp = heat_pixels(np.linspace(0, 2, 200)[None, :], 2.0)[0].astype(np.float64)
    luma = ramp @ [0.2126, 0.7152, 0.0722]  # ITU-R BT.709
    assert (np.diff(luma) <= 0).all()
    assert luma[0] - luma[-1] > 150


def test_heat_map_of_zeros_and_of_values_beyond_its_range_is_drawn():
    pale, dark = heat_pixels(np.array([[0.0, 1.0]]), 1.0)[0]
    assert (heat_pixels(np.zeros((2, 2)), 0.0) == pale).all()
    np.testing.assert_array_equal(heat_pixels(np.array([[-1.0, 9.0, np.nan]]), 1.0)[0], [pale, dark, pale])
