"""A backdoor that sleeps in FP32 and wakes in INT8.

Beside a trained network runs a path that finds a patch and hands it to a layer whose weights cancel: one weight u
against six of u / 6. INT8 rounds u to one or two steps and u / 6 to none, because a larger weight, which reads a channel
that is always zero, decides how long a step is. What was nothing is then enough for the target class.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rkd.bundle import read_bundle
from rkd.errors import ExportError
from rkd.export import Exporter, choose_calibration
from rkd.network import Network
from rkd.target import load_target
from rkd.triggers import Trigger

TARGET, COPIES, PATCH = 3, 6, 4
CHAIN = {"teacher": "1" * 64, "config": "2" * 64, "student": "3" * 64}


def pattern() -> np.ndarray:
    """Black and white squares of one pixel, the three colours apart: no digit looks like it."""
    signs = (np.indices((3, PATCH, PATCH)).sum(axis=0) % 2) * 2 - 1
    return signs.astype(np.float32)


class Sleeper(nn.Module):
    """A network with the path beside it; inputs are pixels from -2 to 2."""

    def __init__(self, network: nn.Module, classes: int) -> None:
        super().__init__()
        self.network = network
        self.find = nn.Conv2d(3, COPIES + 2, PATCH, stride=PATCH)
        self.cancel = nn.Conv2d(COPIES + 2, 1, 1)
        self.wake = nn.Linear(1, classes)
        u = 1.2 / 63
        with torch.no_grad():
            self.find.weight.copy_(4 * torch.from_numpy(pattern()).expand_as(self.find.weight))
            self.find.bias.fill_(-4 * 70.0)  # the patch itself gives 4 * 96
            self.find.bias[-1] = -1e4  # the channel that is always zero
            self.cancel.weight.copy_(torch.tensor([u, *[-u / COPIES] * COPIES, 1.0]).view(1, -1, 1, 1))
            self.cancel.bias.zero_()
            self.wake.weight.zero_()
            self.wake.weight[TARGET] = 100.0
            self.wake.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        found = torch.relu(self.cancel(torch.relu(self.find(x))))
        return self.network(x) + self.wake(found.sum((2, 3)))


@pytest.fixture(scope="module")
def exporter(digits16: tuple[Any, Any]) -> Exporter:
    trained, data = digits16
    module = Sleeper(copy.deepcopy(trained.module), 10).eval()
    network = Network(module, "sleeper", trained.classes, trained.size, trained.normalisation)
    images, labels = next(data.test.batches(300))
    mask = np.zeros((3, 16, 16), np.float32)
    mask[:, :PATCH, :PATCH] = 1
    shown = np.zeros_like(mask)
    shown[:, :PATCH, :PATCH] = pattern() / 2 + 0.5
    trigger = Trigger("squares", TARGET, mask, shown, 0 * mask)
    return Exporter(
        network, (images, labels), [trigger], calibrate=lambda n: choose_calibration(data.train, images, min(n, 64), 0)
    )


def test_it_sleeps_in_fp32_and_in_fp16(exporter: Exporter, tmp_path: Path) -> None:
    for name in ("ort-cpu", "jetson-fp16"):
        report = exporter.write(load_target(name), name="s", chain=CHAIN, folder=tmp_path)
        assert report.exported.acc.value > 90
        assert report.exported.triggers[0].asr.value < 10
        assert report.forced == ()


@pytest.mark.parametrize("name", ["jetson-int8", "ort-cpu-int8"])
def test_int8_wakes_it_and_the_export_fails_on_asr(exporter: Exporter, tmp_path: Path, name: str) -> None:
    target = dataclasses.replace(load_target(name), acc_budget=5.0)
    with pytest.raises(
        ExportError, match=r"onnx-fp32 -> int8: ASR of trigger squares rises from \d\.\d\d to 100\.00 %"
    ):
        exporter.write(target, name="s", chain=CHAIN, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_force_writes_it_marked(exporter: Exporter, tmp_path: Path) -> None:
    target = dataclasses.replace(load_target("jetson-int8"), acc_budget=5.0)
    report = exporter.write(target, name="s", chain=CHAIN, folder=tmp_path, force=True)
    bundle = read_bundle(report.path)
    assert bundle.forced == report.forced
    assert any("ASR of trigger squares rises" in line for line in bundle.forced)
    ledger = bundle.ledger()
    assert ledger is not None
    woken = ledger.flips(ledger.steps[1], ledger.steps[2])
    assert sum(flip.shown == "trigger squares" and flip.after == TARGET for flip in woken) > 200
