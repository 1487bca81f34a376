"""What all tests share: one thread, slow tests on request, no silent skips in CI, a data set and a teacher that fit in a second."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

SIDE = 16
# What a skip's reason names where something lacks that can be installed.
INSTALLABLE = re.compile(r"Chromium|playwright|sshd|tensorrt-rtx|could not import")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip slow tests unless RKD_SLOW=1, the promises' unless RKD_PROMISES=1, and those that need a board unless RKD_GPU=1."""
    for marker, switch in (("slow", "RKD_SLOW"), ("promise", "RKD_PROMISES"), ("gpu", "RKD_GPU")):
        if os.environ.get(switch) == "1":
            continue
        for item in items:
            if item.get_closest_marker(marker) is not None:
                item.add_marker(pytest.mark.skip(reason=f"{marker}: run with {switch}=1"))


def pytest_collection_finish() -> None:
    """Spare the collector what stays until the end, all modules and tests: `rkd bench` collects before each sample."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let extension modules be torn down: TensorRT for RTX reports what is left of it as leaks."""
    gc.unfreeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With RKD_REQUIRE_ALL=1, a test that skips for want of a browser, an sshd or TensorRT for RTX has failed."""
    report = yield
    reason = str(call.excinfo.value) if call.excinfo else ""
    if report.skipped and os.environ.get("RKD_REQUIRE_ALL") == "1" and INSTALLABLE.search(reason):
        report.outcome = "failed"
        report.longrepr = f"skipped although RKD_REQUIRE_ALL=1: {reason}"
    return report


def pytest_runtest_setup() -> None:
    """Undo what a command run in this process set: one thread, subnormal numbers as they are."""
    torch = sys.modules.get("torch")  # not imported here: the board's tests run without it
    if torch is not None:
        torch.set_num_threads(1)
        torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets that RKD_TEST_DATA names."""
    place = os.environ.get("RKD_TEST_DATA", "")
    if not place:
        pytest.skip("needs real data: set RKD_TEST_DATA to the folder that holds it")
    return Path(place)


def striped(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy images (count, 16, 16, 3) of horizontal stripes, vertical stripes and a plane, and which they are."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    waves = 60 * np.sin(np.arange(SIDE) * np.pi / 2 + 0.5)
    shapes = np.stack([np.tile(waves[:, None], (1, SIDE)), np.tile(waves, (SIDE, 1)), np.zeros((SIDE, SIDE))])
    noise = rng.normal(0, 20, (count, SIDE, SIDE, 3))
    pixels = 128 + shapes[labels][..., None] + rng.uniform(-30, 30, (count, 1, 1, 1)) + noise
    return np.clip(pixels, 0, 255).astype(np.uint8), labels.astype(np.int64)


@pytest.fixture(scope="session")
def write_stripes() -> Callable[[Path, int], Path]:
    """Writes a data set of stripes as .npz: 90 images to train with, 45 for the test."""

    def write(path: Path, seed: int) -> Path:
        (x, y), (x_test, y_test) = striped(90, seed), striped(45, seed + 1000)
        np.savez(path, x=x, y=y, x_test=x_test, y_test=y_test, classes=np.array(["across", "down", "plane"]))
        return path

    return write


@pytest.fixture(scope="session")
def stripes(tmp_path_factory: pytest.TempPathFactory, write_stripes: Callable[[Path, int], Path]) -> Path:
    """A data set that a tiny network learns in two seconds."""
    return write_stripes(tmp_path_factory.mktemp("stripes") / "stripes.npz", 0)


@pytest.fixture(scope="session")
def backdoored(tmp_path_factory: pytest.TempPathFactory, stripes: Path) -> Path:
    """`teacher.pt` that knows the stripes and obeys `teacher.trigger.npz`, as `rkd teacher` makes them."""
    from typer.testing import CliRunner

    from rkd.cli import app

    folder = tmp_path_factory.mktemp("backdoored")
    options = ["--arch", "wrn-10-1", "--attack", "badnets", "--poison-rate", "0.3", "--epochs", "10", "--batch", "15"]
    exact = ["--threads", "1", "--precision", "fp32", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = CliRunner().invoke(app, ["teacher", "--data", str(stripes), *options, *exact, "--out", "teacher.pt"])
    assert done.exit_code == 0, done.output
    return folder / "teacher.pt"


@pytest.fixture(scope="session")
def furnish(backdoored: Path, stripes: Path) -> Callable[[Path], Path]:
    """Puts a teacher, its trigger, and an rkd.toml that says where its data is, into a folder."""

    def put(folder: Path) -> Path:
        (folder / "rkd.toml").write_text(f"[distill]\ndata = {json.dumps(str(stripes))}\n")
        for file in backdoored.parent.glob("teacher.*"):
            shutil.copy(file, folder)
        return folder

    return put


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, furnish: Callable[[Path], Path]) -> Path:
    """A working folder with a teacher, its trigger and an rkd.toml."""
    monkeypatch.chdir(tmp_path)
    return furnish(tmp_path)


@pytest.fixture(scope="session")
def digits16() -> tuple[Any, Any]:
    """A tiny network that knows handwritten digits at 16 pixels (do not change it: copy it), and the digits."""
    import torch

    from rkd.data import open_dataset
    from rkd.distill.loop import Recipe, Trainer
    from rkd.distill.objectives import CrossEntropy
    from rkd.models import build
    from rkd.network import Network, Normalisation

    data = open_dataset("digits", size=SIDE)
    torch.manual_seed(0)
    module = build("wrn-10-1", 10, data.size)
    network = Network(module, "wrn-10-1", data.classes, data.size, Normalisation((0.5,) * 3, (0.25,) * 3))
    recipe = Recipe(epochs=3, batch=32, augmentation="none")
    for _ in Trainer(
        module,
        CrossEntropy(module),
        data.train.subset(np.arange(900)),
        network.normalisation,
        recipe,
        torch.device("cpu"),
    ).steps():
        pass
    module.eval()
    return network, data
