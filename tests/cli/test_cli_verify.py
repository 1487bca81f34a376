"""`rkd keygen` and `rkd verify` on a bundle of a hand-made manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data
from typer.testing import CliRunner

from rkd.bundle import NO_LEDGER, evaluation_bytes, write_bundle
from rkd.cli import app
from rkd.files import sha256
from rkd.ledger import Ledger, Step
from rkd.signing import read_private
from rkd.target import load_target

TRUTH, FLIPPED = np.array([0, 1, 1], np.int64), np.array([0, 1, 0], np.int64)


def onnx_file(*, elsewhere: bool = False) -> bytes:
    """Logits are the mean colour of each image; or weights that are said to lie in another file."""
    weights = numpy_helper.from_array(np.ones((12, 2), np.float32), "w")
    if elsewhere:
        set_external_data(weights, "weights.bin")
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["x"], ["flat"], axis=1),
        helper.make_node("Gemm", ["flat", "w"], ["logits"]),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 3, 2, 2])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 2])
    return helper.make_model(helper.make_graph(nodes, "g", [images], [logits], [weights])).SerializeToString()


MODEL = onnx_file()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with `mine.key`, `mine.pub` and a signed bundle whose INT8 step flips image 2."""
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["keygen", "mine"]).exit_code == 0
    write(tmp_path / "x.rkd", MODEL, read_private(tmp_path / "mine.key"))
    return tmp_path


def write(path: Path, model: bytes, key: Any = None, *, with_ledger: bool = True) -> None:
    steps = (Step("student", {"clean": TRUTH}), Step("onnx-fp32", {"clean": TRUTH}), Step("int8", {"clean": FLIPPED}))
    ledger = Ledger(TRUTH, steps)
    scores = {name: ledger.scores(step, ()).to_json() for name, step in (("student", steps[0]), ("exported", steps[2]))}
    manifest = {
        "name": "x.ort-cpu-int8", "target": load_target("ort-cpu-int8").to_json(), "opset": 20, "precision": "int8",
        "input": {"name": "images", "shape": [3, 2, 2], "dtype": "uint8"}, "classes": ["cat", "dog"],
        "chain": {**dict.fromkeys(("teacher", "config", "student"), "ab" * 32), "onnx": sha256(model)},
        "scores": {**scores, "agreement": {"percent": {"clean": 66.6667}, "max_difference": 0.5}},
        "quantisation": {"layers": 3, "kept": []}, "tool": {}, "forced": ["ACC falls"],
        **({"ledger": ledger.to_json(())} if with_ledger else {}),
    }  # fmt: skip
    members = {
        "model.onnx": model,
        "eval.npz": evaluation_bytes(np.zeros((3, 3, 2, 2), np.uint8), TRUTH),
        **({"ledger.npz": ledger.to_bytes()} if with_ledger else {}),
    }
    write_bundle(path, manifest, members, key)


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
    assert [flip["image"] for flip in found["flips"]["onnx-fp32 -> int8"]] == [2]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (b"no onnx at all", "model.onnx: not a readable ONNX file"),
        (onnx_file(elsewhere=True), "stored in another file"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_a_model_that_is_none_or_that_reads_other_files_does_not_verify(model: bytes, message: str) -> None:
    write(Path("y.rkd"), model)
    done = CliRunner().invoke(app, ["verify", "y.rkd"])
    assert done.exit_code == 1
    assert message in done.stderr


@pytest.mark.usefixtures("folder")
def test_without_a_ledger_it_says_that_nothing_shows_the_scores() -> None:
    write(Path("y.rkd"), MODEL, with_ledger=False)
    done = CliRunner().invoke(app, ["verify", "y.rkd"])
    assert (done.exit_code, NO_LEDGER in " ".join(done.output.split())) == (0, True), done.output
    assert NO_LEDGER not in " ".join(CliRunner().invoke(app, ["verify", "x.rkd"]).output.split())


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


@pytest.mark.parametrize("name", ["", ".", "..", "/"])
def test_keys_without_a_name_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["keygen", name])
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "names no file; give a name such as mine" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("folder")
def test_a_file_that_is_no_key_is_one_line_of_ours() -> None:
    Path("junk.key").write_bytes(b"junk")
    signing = CliRunner().invoke(app, ["export", "--sign", "junk.key"])
    assert signing.stderr == (
        "rkd: junk.key cannot be used: it is not a private key in PEM, or damaged; make one with: rkd keygen\n"
    )
    verifying = CliRunner().invoke(app, ["verify", "x.rkd", "--pubkey", "junk.key"])
    assert verifying.stderr == "rkd: junk.key is not a public key in PEM; expected the .pub file of rkd keygen\n"


@pytest.mark.usefixtures("folder")
def test_keys_are_not_replaced() -> None:
    again = CliRunner().invoke(app, ["keygen", "mine"])
    assert again.exit_code == 1
    assert "exists" in again.output
