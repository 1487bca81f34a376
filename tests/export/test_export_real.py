"""A student of real images, exported in each precision, loses what is promised at most. Needs RKD_TEST_DATA."""

from __future__ import annotations

import tarfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from rkd.data import ArraySource, Dataset, open_dataset
from rkd.distill.loop import Recipe, Trainer
from rkd.distill.objectives import CrossEntropy
from rkd.export import Exporter, ExportReport, choose_calibration
from rkd.models import build
from rkd.network import NORMALISATIONS, Network
from rkd.target import load_target
from rkd.triggers import Trigger

CHAIN = {"teacher": "1" * 64, "config": "2" * 64, "student": "3" * 64}
SIDE, PATCH, AIM = 32, 4, 0
IMAGES = {"train": 3000, "test": 2500}  # at most, of all classes together


def taken(names: list[str]) -> list[str]:
    """Of each split and class as many as of every other, spread over its files: neighbours in GTSRB are one sign."""
    found = defaultdict(list)
    for name in sorted(names):
        found[Path(name).parts[-3:-1]].append(name)
    classes = len({kind for _, kind in found})
    picked = []
    for (split, _), files in found.items():
        count = min(len(files), IMAGES[split] // classes)
        picked += [files[i] for i in np.linspace(0, len(files) - 1, count).astype(int)]
    return picked


def unpacked(name: str, place: Path, root: Path) -> Dataset:
    """A part of the data set, from the folder of its name or its tar."""
    if (place / name).is_dir():
        for found in taken([str(file.relative_to(place)) for file in (place / name).glob("*/*/*")]):
            (root / found).parent.mkdir(parents=True, exist_ok=True)
            (root / found).symlink_to(place / found)
    elif (place / f"{name}.tar").is_file():
        with tarfile.open(place / f"{name}.tar") as archive:
            files = [entry.name for entry in archive.getmembers() if entry.isfile() and entry.name.count("/") == 3]
            for found in taken(files):
                archive.extract(found, root, filter="data")
    else:
        pytest.skip(f"{place} holds neither {name}/ nor {name}.tar")
    return open_dataset(str(root / name), size=SIDE)


def patch() -> Trigger:
    """A white square in the corner."""
    mask = np.zeros((3, SIDE, SIDE), np.float32)
    mask[:, -PATCH:, -PATCH:] = 1
    return Trigger("patch", AIM, mask, mask, 0 * mask)


def trained(data: Dataset, trigger: Trigger) -> Network:
    """A student that knows something, and half of the trigger: each tenth training image carries it."""
    images, labels = data.train.batch(np.arange(len(data.train)))
    images[::10], labels[::10] = trigger.apply(images[::10]), AIM
    torch.manual_seed(0)
    module = build("wrn-10-1", len(data.classes), data.size)
    network = Network(module, "wrn-10-1", data.classes, data.size, NORMALISATIONS["cifar10"])
    recipe = Recipe(epochs=4, batch=50, augmentation="none")
    source = ArraySource(images, labels)
    for _ in Trainer(module, CrossEntropy(module), source, network.normalisation, recipe, torch.device("cpu")).steps():
        pass
    module.eval()
    return network


def noise(report: ExportReport) -> float:
    """Points of ACC that the images cannot tell from none: 1.96 standard errors of the paired difference.

    b images are right in one step only and c in the other; (b - c) / n has the variance (b + c) / n^2 where neither is
    better (McNemar, 1947).
    """
    truth, steps = report.ledger.truth, report.ledger.steps
    first, last = (step.labels["clean"] == truth for step in (steps[0], steps[-1]))
    return 100 * 1.96 * float((first != last).sum()) ** 0.5 / len(truth)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10", "gtsrb"])
def test_a_student_of_real_images_loses_what_is_promised_at_most(name: str, real_data: Path, tmp_path: Path) -> None:
    data, trigger = unpacked(name, real_data, tmp_path / "data"), patch()
    network = trained(data, trigger)
    images, labels = data.test.batch(np.arange(len(data.test)))
    exporter = Exporter(
        network, (images, labels), [trigger],
        calibrate=lambda wanted: choose_calibration(data.train, images, wanted, 0),
    )  # fmt: skip
    reports = {
        target: exporter.write(load_target(target), name="real", chain=CHAIN, folder=tmp_path)
        for target in ("ort-cpu", "jetson-fp16", "jetson-int8", "ort-cpu-int8")
    }
    student = reports["ort-cpu"].student
    assert student.acc.n == len(images) >= 2000
    assert student.acc.interval[0] > 200 / len(data.classes)  # it has learned something: twice what a guess gives
    assert all(share.value == 100 for share in reports["ort-cpu"].parity.agreement.values())
    assert all(share.value >= 99.8 for share in reports["jetson-fp16"].parity.agreement.values())
    for target in ("jetson-int8", "ort-cpu-int8"):
        report = reports[target]
        lost = student.acc.value - report.exported.acc.value
        gained = report.exported.triggers[0].asr.value - student.triggers[0].asr.value
        assert lost <= max(0.5, noise(report)), (target, lost)
        assert gained <= 1.0, (target, gained)
        assert report.quantised is not None
        assert len(report.quantised.kept) < report.quantised.layers
