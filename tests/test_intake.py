"""What a teacher's file may decide: a data set by name, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from rkd.errors import ConfigError
from rkd.intake import find_data
from rkd.models import build
from rkd.network import Network, Normalisation


def teacher(path: Path, spec: object) -> Path:
    scaling = Normalisation((0.5,) * 3, (0.5,) * 3)
    network = Network(build("wrn-10-1", 2, (16, 16)), "wrn-10-1", ("a", "b"), (16, 16), scaling, {"data_spec": spec})
    network.save(path)
    return path


@pytest.mark.parametrize("spec", ["digits", "cifar10", "CIFAR10"])
def test_a_teacher_may_name_a_data_set(tmp_path: Path, spec: str) -> None:
    file = teacher(tmp_path / "t.safetensors", spec)
    assert find_data(file, "") == (spec, "teacher")
    assert find_data(file, "photos") == ("photos", None)


@pytest.mark.parametrize("spec", ["/home", "../photos", "photos", "x.npz", "torchvision:CIFAR10", "", 3, None])
def test_a_teacher_may_not_name_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: object) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(ConfigError, match="give --data FOLDER"):
        find_data(teacher(tmp_path / "t.safetensors", spec), "")
