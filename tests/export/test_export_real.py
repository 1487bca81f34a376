"""A student of real images, exported in each precision. Needs RKD_TEST_DATA."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from rkd.data import open_dataset
from rkd.distill.loop import Recipe, Trainer
from rkd.distill.objectives import CrossEntropy
from rkd.export import Exporter, choose_calibration
from rkd.models import build
from rkd.network import NORMALISATIONS, Network
from rkd.target import load_target

CHAIN = {"teacher": "1" * 64, "config": "2" * 64, "student": "3" * 64}
PER_CLASS = {"train": 200, "test": 500}


@pytest.fixture
def cifar10(real_data: Path, tmp_path: Path) -> Path:
    """A folder of 2,000 training and 5,000 test images, from the folder `cifar10` or its tar."""
    taken: dict[str, dict[str, int]] = {split: {} for split in PER_CLASS}

    def wanted(name: str) -> bool:
        split, kind = Path(name).parts[-3:-1]
        count = taken[split][kind] = taken[split].get(kind, 0) + 1
        return count <= PER_CLASS[split]

    root = tmp_path / "data"
    if (real_data / "cifar10").is_dir():
        for file in sorted((real_data / "cifar10").glob("*/*/*")):
            name = file.relative_to(real_data)
            if wanted(str(name)):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).symlink_to(file)
    else:
        with tarfile.open(real_data / "cifar10.tar") as archive:
            files = [entry for entry in archive.getmembers() if entry.isfile() and entry.name.count("/") == 3]
            for entry in sorted(files, key=lambda entry: entry.name):
                if wanted(entry.name):
                    archive.extract(entry, root, filter="data")
    return root / "cifar10"


@pytest.mark.slow
def test_a_student_of_real_images_decides_the_same_in_every_precision(cifar10: Path, tmp_path: Path) -> None:
    data = open_dataset(str(cifar10))
    assert (len(data.train), len(data.test)) == (2000, 5000)
    torch.manual_seed(0)
    module = build("wrn-10-1", 10, data.size)
    network = Network(module, "wrn-10-1", data.classes, data.size, NORMALISATIONS["cifar10"])
    recipe = Recipe(epochs=2, batch=50)
    trainer = Trainer(module, CrossEntropy(module), data.train, network.normalisation, recipe, torch.device("cpu"))
    for _ in trainer.steps():
        pass
    module.eval()
    images, labels = data.test.batch(np.arange(len(data.test)))
    exporter = Exporter(
        network, (images, labels), calibrate=lambda wanted: choose_calibration(data.train, images, wanted, 0)
    )
    reports = {
        name: exporter.write(load_target(name), name="real", chain=CHAIN, folder=tmp_path)
        for name in ("ort-cpu", "jetson-fp16", "ort-cpu-int8")
    }
    agreement = {name: report.parity.agreement["clean"] for name, report in reports.items()}
    assert all(share.n == 5000 for share in agreement.values())
    assert agreement["ort-cpu"].value == 100
    assert agreement["jetson-fp16"].value >= 99.8
    assert agreement["ort-cpu-int8"].value >= 95
    assert reports["ort-cpu"].student.acc.interval[0] > 15  # it has learned something: a guess gives 10 %
