"""`rkd keygen` and `rkd verify` on a bundle of a hand-made manifest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from rkd.bundle import evaluation_bytes, write_bundle
from rkd.cli import app
from rkd.ledger import Ledger, Step
from rkd.signing import read_private
from rkd.target import load_target

TRUTH = np.array([0, 1, 1], np.int64)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with `mine.key`, `mine.pub` and a signed bundle whose INT8 step flips image 2."""
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["keygen", "mine"]).exit_code == 0
    steps = (Step("student", {"clean": TRUTH}), Step("int8", {"clean": np.array([0, 1, 0])}))
    manifest = {
        "name": "x.ort-cpu", "target": load_target("ort-cpu").to_json(), "opset": 20, "precision": "fp32",
        "input": {"name": "images", "shape": [3, 2, 2], "dtype": "uint8"}, "classes": ["cat", "dog"],
        "chain": {}, "scores": {}, "tool": {}, "forced": ["ACC falls"],
    }  # fmt: skip
    members = {
        "model.onnx": b"m",
        "eval.npz": evaluation_bytes(np.zeros((3, 3, 2, 2), np.uint8), TRUTH),
        "ledger.npz": Ledger(TRUTH, steps).to_bytes(),
    }
    write_bundle(tmp_path / "x.rkd", manifest, members, read_private(tmp_path / "mine.key"))
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_the_right_key_verifies_and_flips_are_listed() -> None:
    done = CliRunner().invoke(app, ["verify", "x.rkd", "--pubkey", "mine.pub", "--flips"])
    assert done.exit_code == 0, done.output
    assert "the key that was asked for" in done.output
    assert "FORCED: ACC falls" in done.output
    assert "no trigger travels in it: whether a backdoor wakes was not checked" in " ".join(done.output.split())
    assert "image 2, clean: dog -> cat (true: dog)" in done.output


@pytest.mark.usefixtures("folder")
def test_json_holds_the_same() -> None:
    done = CliRunner().invoke(app, ["verify", "x.rkd", "--flips", "--json"])
    found = json.loads(done.output)
    assert (found["trusted"], found["forced"]) == (False, ["ACC falls"])
    assert found["signer"].startswith("ed25519:")
    assert [flip["image"] for flip in found["flips"]["student -> int8"]] == [2]


def test_a_wrong_key_and_a_flipped_byte_are_one_line_and_exit_1(folder: Path) -> None:
    runner = CliRunner()
    runner.invoke(app, ["keygen", "other"])
    wrong = runner.invoke(app, ["verify", "x.rkd", "--pubkey", "other.pub"])
    assert wrong.exit_code == 1
    assert "signed by another key" in wrong.output
    data = bytearray((folder / "x.rkd").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "x.rkd").write_bytes(data)
    broken = runner.invoke(app, ["verify", "x.rkd"])
    assert broken.exit_code == 1
    assert "x.rkd" in broken.output


@pytest.mark.usefixtures("folder")
def test_keys_are_not_replaced() -> None:
    again = CliRunner().invoke(app, ["keygen", "mine"])
    assert again.exit_code == 1
    assert "exists" in again.output
