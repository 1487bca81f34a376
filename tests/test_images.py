"""Files of every kind, size and damage: what pixels come out; expectations are worked out by hand."""

from __future__ import annotations

import io
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import folder, noise, save
from PIL import Image
from torchvision import transforms

from rkd import _images
from rkd.data import open_dataset
from rkd.errors import ConfigError, DataError


def only_image(tmp_path: Path, name: str, data: bytes) -> np.ndarray:
    """The (3, H, W) pixels of train/a/<name>, in a folder whose other images are RGB of 2x2."""
    target = tmp_path / "train" / "a" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    for i, other in enumerate(("train/b/x.png", "test/a/x.png", "test/b/x.png")):
        save(tmp_path / other, noise(100 + i, 2, 2))
    dataset = open_dataset(str(tmp_path))
    images, labels = dataset.train.batch(np.array([0]))
    assert labels.tolist() == [0]
    return images[0]


def everything(source: Any) -> tuple[np.ndarray, np.ndarray]:
    return source.batch(np.arange(len(source)))


def refusal(spec: Path | str, **kwargs: Any) -> str:
    with pytest.raises(DataError) as caught:
        open_dataset(str(spec), **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return folder(tmp_path / "pets", {"train": {"dog": 4, "cat": 3}, "test": {"cat": 2, "dog": 1}})


@pytest.mark.parametrize(
    ("extension", "options"),
    [(".jpg", {"quality": 95}), (".webp", {"lossless": True}), (".bmp", {}), (".gif", {}), (".tif", {}), (".ppm", {})],
)
def test_each_common_format_is_decoded(tmp_path: Path, extension: str, options: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), (200, 100, 50)).save(
        buffer, {".jpg": "JPEG", ".tif": "TIFF"}.get(extension, extension[1:]), **options
    )
    image = only_image(tmp_path, f"x{extension}", buffer.getvalue())
    assert np.abs(image.astype(int) - np.array([200, 100, 50]).reshape(3, 1, 1)).max() <= (
        4 if extension == ".jpg" else 0
    )


# ---------------------------------------------------------------------------------------------------------------- size


def test_images_of_different_sizes_ask_for_a_size_and_name_two(pets: Path) -> None:
    save(pets / "train/cat/large.png", noise(80, 9, 7))
    message = refusal(pets)
    assert "6x6" in message
    assert "9x7" in message
    assert "--image-size" in message
    assert open_dataset(str(pets), size=6).size == (6, 6)


def test_large_images_ask_for_a_size(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}}, height=2, width=513)
    assert "2x513" in refusal(root)
    assert open_dataset(str(root), size=(2, 8)).size == (2, 8)


@pytest.mark.parametrize("size", [0, -1, 4097, (32, 0)])
def test_a_size_that_is_none_is_a_config_error(pets: Path, size: Any) -> None:
    with pytest.raises(ConfigError, match="expected 1 to 4096"):
        open_dataset(str(pets), size=size)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40))
def test_other_sizes_are_fitted_as_torchvisions_resize_and_centercrop_do(height: int, width: int, size: int) -> None:
    image = Image.fromarray(noise(height * 61 + width, height, width))
    expected = transforms.CenterCrop(size)(transforms.Resize(size)(image))  # bilinear is its default
    np.testing.assert_array_equal(np.asarray(_images.fit(image, (size, size))), np.asarray(expected))


@settings(max_examples=60, deadline=None)
@given(*[st.integers(1, 40)] * 4)
def test_fitting_to_any_height_and_width_fills_it(height: int, width: int, to_height: int, to_width: int) -> None:
    white = Image.new("RGB", (width, height), (255, 255, 255))
    fitted = np.asarray(_images.fit(white, (to_height, to_width)))
    assert fitted.shape == (to_height, to_width, 3)
    assert fitted.min() == 255  # a crop outside of the image would be black


def test_an_image_too_narrow_to_scale_is_left_out(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train": {"a": 2, "b": 2}, "test": {"a": 1, "b": 1}})
    save(root / "train/a/thin.png", np.full((1, 100_000, 3), 255, dtype=np.uint8))  # 224 x 22,400,000 when scaled
    dataset = open_dataset(str(root), size=224, max_corrupt=0.5)
    assert "corrupt: 1 of 7 images left out: train/a/thin.png" in dataset.notes


# ---------------------------------------------------------------------------------------------------------- conversions


def png(pixels: Any, mode: str | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, "PNG", **options)
    return buffer.getvalue()


def test_grey_is_repeated_over_the_channels(tmp_path: Path) -> None:
    grey = np.array([[0, 7], [128, 255]], dtype=np.uint8)
    image = only_image(tmp_path, "x.png", png(grey))
    np.testing.assert_array_equal(image, np.stack([grey] * 3))
    assert open_dataset(str(tmp_path)).notes == ("1 grey image converted to RGB",)


def test_one_bit_images_become_black_and_white(tmp_path: Path) -> None:
    image = only_image(tmp_path, "x.png", png(np.array([[False, True], [True, False]])))
    assert image[0].tolist() == [[0, 255], [255, 0]]


def test_16_bit_grey_is_scaled_to_8_bits_and_not_cut_off(tmp_path: Path) -> None:
    values = np.array([[0, 257], [32768, 65535]], dtype=np.uint16)  # times 255 / 65535: 0, 1, 127.5, 255
    image = only_image(tmp_path, "x.png", png(values))
    assert image[2].tolist() == [[0, 1], [128, 255]]
    assert open_dataset(str(tmp_path)).notes == ("1 16-bit grey image scaled to 8 bits and converted to RGB",)


def test_transparent_pixels_are_put_on_black(tmp_path: Path) -> None:
    rgba = np.array(
        [[[200, 100, 50, 255], [200, 100, 50, 0]], [[200, 100, 50, 51], [255, 255, 255, 128]]], dtype=np.uint8
    )
    image = only_image(tmp_path, "x.png", png(rgba))
    expected = [[[200, 100, 50], [0, 0, 0]], [[40, 20, 10], [128, 128, 128]]]  # 51 / 255 is a fifth
    assert image.transpose(1, 2, 0).tolist() == expected
    assert open_dataset(str(tmp_path)).notes == ("1 transparent image put on black",)


def test_palettes_are_looked_up_with_and_without_a_transparent_entry(tmp_path: Path) -> None:
    paletted = Image.new("P", (2, 2))
    paletted.putpalette([10, 20, 30, 40, 50, 60])
    paletted.putdata([0, 1, 1, 0])
    opaque = only_image(tmp_path / "opaque", "x.png", png(paletted))
    assert opaque.transpose(1, 2, 0).tolist() == [[[10, 20, 30], [40, 50, 60]], [[40, 50, 60], [10, 20, 30]]]
    clear = only_image(tmp_path / "clear", "x.png", png(paletted, transparency=b"\x00\xff"))
    assert clear.transpose(1, 2, 0).tolist() == [[[0, 0, 0], [40, 50, 60]], [[40, 50, 60], [0, 0, 0]]]


def test_a_warning_of_the_decoder_is_kept_from_the_user_and_the_image_is_used(tmp_path: Path) -> None:
    chunk = b"acTL" + struct.pack(">II", 0, 0)  # an animation of no frames: Pillow warns, and warnings are errors here
    data = png(noise(7, 2, 2))
    after_header = 8 + 25
    extra = struct.pack(">I", 8) + chunk + struct.pack(">I", zlib.crc32(chunk))
    image = only_image(tmp_path, "x.png", data[:after_header] + extra + data[after_header:])
    np.testing.assert_array_equal(image.transpose(1, 2, 0), noise(7, 2, 2))


def test_cmyk_is_converted(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("CMYK", (2, 2), (0, 0, 0, 255)).save(buffer, "TIFF")  # key at its most: black
    assert only_image(tmp_path, "x.tif", buffer.getvalue()).max() == 0


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_that_have_no_8_bit_meaning_are_left_out(tmp_path: Path, mode: str) -> None:
    root = folder(tmp_path, {"train": {"a": 2, "b": 2}, "test": {"a": 1, "b": 1}})
    Image.new(mode, (6, 6), 70000).save(root / "train/a/x.tif")
    assert "corrupt: 1 of 7 images left out: train/a/x.tif" in open_dataset(str(root), max_corrupt=0.5).notes


# -------------------------------------------------------------------------------------------------------------- damage


def damage(root: Path) -> list[str]:
    """One image for each way of being undecodable; returns their names."""
    good = (root / "train/a/0.png").read_bytes()
    jpeg = io.BytesIO()
    Image.fromarray(noise(1, 64, 64)).save(jpeg, "JPEG")
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    other = io.BytesIO()
    Image.fromarray(noise(2)).save(other, "PCX")  # Pillow could, but only the formats of the extensions are read
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 6\nshowpage\n"
    files = {
        "bomb.png": bomb,
        "cut.jpg": jpeg.getvalue()[:-200],
        "cut.png": good[:-30],
        "empty.png": b"",
        "eps.png": postscript,
        "pcx.png": other.getvalue(),
        "text.png": b"this is no image",
    }
    for name, data in files.items():
        (root / "train/a" / name).write_bytes(data)
    return [f"train/a/{name}" for name in files]


def test_damaged_images_are_left_out_named_and_counted(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train": {"a": 5, "b": 5}, "test": {"a": 2, "b": 2}})
    before = open_dataset(str(root))
    names = damage(root)
    dataset = open_dataset(str(root), size=6, max_corrupt=0.5)
    assert [note for note in dataset.notes if "corrupt" in note] == [
        f"corrupt: 7 of 21 images left out: {', '.join(names[:3])}, ..."
    ]
    np.testing.assert_array_equal(everything(dataset.train)[0], everything(before.train)[0])
    assert dataset.train.labels.tolist() == before.train.labels.tolist()


def test_too_many_damaged_images_are_an_error_with_their_number_and_names(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train": {"a": 5, "b": 5}, "test": {"a": 2, "b": 2}})
    (root / "train/a/3.png").write_bytes(b"")
    message = refusal(root)
    assert "1 of 14 images cannot be decoded, at most 1.0% may: train/a/3.png" in message
    assert len(open_dataset(str(root), max_corrupt=1 / 14).train) == 9


def test_a_folder_of_nothing_but_damage_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(3):
            (tmp_path / name / f"{i}.png").write_bytes(b"x")
    assert "none of its images can be decoded" in refusal(tmp_path)
    assert "6 of 6 images cannot be decoded" in refusal(tmp_path, size=8)


def test_a_class_whose_training_images_are_all_damaged_is_refused(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train": {"a": 9, "b": 1}, "test": {"a": 1, "b": 1}})
    (root / "train/b/0.png").write_bytes(b"")
    assert "no training images of class b (corrupt: 1 of 12 images left out" in refusal(root, max_corrupt=0.5)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_whatever_a_file_holds_decoding_fails_with_an_exception_or_gives_pixels(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM"]))
    buffer = io.BytesIO()
    Image.fromarray(noise(3, 8, 8)).save(buffer, kind)
    mutant = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        mutant[data.draw(st.integers(0, len(mutant) - 1))] = data.draw(st.integers(0, 255))
    mutant = mutant[: data.draw(st.integers(0, len(mutant)))] if data.draw(st.booleans()) else mutant

    def load(_: int) -> Any:
        with Image.open(io.BytesIO(mutant), formats=_images._FORMATS) as image:
            if image.width * image.height > 10**6:
                raise ValueError("large")
            return _images.to_pixels(image, (8, 8))

    decoded = _images.decode_all(load, 1, (8, 8))
    assert len(decoded.failed) <= 1
    assert decoded.images.shape == (1, 3, 8, 8)


def test_an_interruption_does_not_wait_for_the_images_that_are_left() -> None:
    loaded = []

    def load(i: int) -> Any:
        loaded.append(i)
        time.sleep(2e-4)
        return np.zeros((3, 1, 1), dtype=np.uint8), ()

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _images.decode_all(load, 5000, (1, 1), interrupt)
    assert len(loaded) < 2500
