"""Target profiles: the built-in ones and a user's own."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from rkd.errors import StorageError, TargetError
from rkd.target import Target, builtin_targets, load_target, version

GOOD: dict[str, Any] = {
    "name": "my-board", "summary": "mine", "board": "a board", "runtime": "onnxruntime", "precision": "fp32",
    "provider": "CPUExecutionProvider", "opset": 20, "max_batch": 8, "needs": "nothing",
}  # fmt: skip


TENSORRT: dict[str, Any] = {"runtime": "tensorrt", "provider": "", "min_version": "10.3"}
RECIPE: dict[str, Any] = {
    "activations": "uint8", "weight_bits": 7, "bias": "int32", "operators": ["Conv"], "rest": "fp32",
    "calibrators": ["minmax"], "images": 64, "min_agreement": 98.0,
}  # fmt: skip
BUILT_IN = {
    "jetson-fp32", "jetson-fp16", "jetson-int8", "rtx-fp16", "ort-cpu", "ort-cpu-int8", "ort-cuda-fp16", "raspberry-pi"
}  # fmt: skip


def toml(values: dict[str, Any]) -> str:
    return "".join(f"{key} = {f'{value!r}' if isinstance(value, str) else str(value).lower()}\n" for key, value in values.items())  # fmt: skip


def refusal(**changes: Any) -> str:
    values = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    with pytest.raises(TargetError) as caught:
        Target.from_mapping(values, "mine.toml")
    assert str(caught.value).startswith("mine.toml: ")
    return str(caught.value)


def test_the_built_in_targets_are_those_of_their_files() -> None:
    found = builtin_targets()
    assert set(found) == BUILT_IN
    assert list(found) == sorted(found)
    folder = Path(__file__).resolve().parents[1] / "targets"
    assert set(found) == {path.stem for path in folder.glob("*.toml")}
    for name, target in found.items():
        assert target.name == name
        assert load_target(name) == target == load_target(str(folder / f"{name}.toml"))


def test_a_profile_survives_the_bundle() -> None:
    for target in builtin_targets().values():
        assert Target.from_mapping(target.to_json(), "manifest") == target


def test_a_file_of_your_own_works_the_same_way(tmp_path: Path) -> None:
    (tmp_path / "my-board.toml").write_text(toml(GOOD))
    target = load_target(str(tmp_path / "my-board.toml"))
    defaults = {
        "acc_budget": 1.0, "asr_budget": 1.0, "min_version": "", "below_version": "", "compute": [], "workspace_mib": 0,
        "opt_batch": 1,
    }  # fmt: skip
    assert target.to_json() == {**GOOD, **defaults}


def test_an_unknown_name_is_answered_with_the_one_that_was_meant_or_with_all() -> None:
    with pytest.raises(TargetError, match="'jetson-fp61'; did you mean jetson-fp16"):
        load_target("jetson-fp61")
    with pytest.raises(TargetError, match=r"jetson-fp16, .*ort-cpu.* or a \.toml file"):
        load_target("quantum")
    with pytest.raises(TargetError):
        load_target("")
    with pytest.raises(TargetError):
        load_target("../targets/ort-cpu")


def test_a_file_that_is_missing_or_no_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such file"):
        load_target(str(tmp_path / "x.toml"))
    for content in (b"name = ", b"\xff", b"a=" + b"[" * 100_000):
        (tmp_path / "x.toml").write_bytes(content)
        with pytest.raises(TargetError, match=r"x\.toml"):
            load_target(str(tmp_path / "x.toml"))


@pytest.mark.parametrize("key", GOOD)
def test_each_key_is_needed_and_of_its_type(key: str) -> None:
    assert f"{key!r} is missing" in refusal(**{key: None})
    for other in (3.5, True, [], {}, "text" if isinstance(GOOD[key], int) else 7):
        assert f"{key} is {other!r}, expected" in refusal(**{key: other})


def test_an_unknown_key_is_answered_with_the_one_that_was_meant() -> None:
    assert "unknown key 'precison'; did you mean 'precision'?" in refusal(precison="fp32")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "My Board"}, "lower-case"),
        ({"name": ""}, "lower-case"),
        ({"name": "../x"}, "lower-case"),
        ({"name": "a\n"}, "lower-case"),
        ({"name": "a" * 65}, "lower-case"),
        ({"runtime": "coreml"}, "expected one of onnxruntime, tensorrt, tensorrt-rtx"),
        ({"precision": "int4"}, "expected one of fp32, fp16, int8"),
        ({"precision": "fp16"}, "use fp32"),
        ({"opset": 17}, "opset 17"),
        ({"opset": 25}, "opset 25"),
        (
            {"opset": 22},
            "opset 22: onnxruntime 1.20 is known to read up to 21; set opset = 21 or older, or min_version",
        ),
        ({"opset": 24, "min_version": "1.20"}, 'or min_version = "1.32"'),
        ({**TENSORRT, "opset": 21}, "opset 21: tensorrt 10.3 is known to read up to 20"),
        ({**TENSORRT, "min_version": None}, "min_version '': tensorrt is served from 10.3 on"),
        ({**TENSORRT, "min_version": "8.6"}, "min_version '8.6': tensorrt is served from 10.3 on"),
        ({**TENSORRT, "runtime": "tensorrt-rtx", "min_version": "1.1"}, "tensorrt-rtx is served from 1.2 on"),
        ({**TENSORRT, "min_version": "12"}, "min_version '12': tensorrt is served below 12"),
        ({**TENSORRT, "runtime": "tensorrt-rtx", "min_version": "2.0"}, "tensorrt-rtx is served below 2"),
        ({"min_version": "1.19"}, "onnxruntime is served from 1.20 on"),
        (
            {"provider": "FooExecutionProvider"},
            "provider 'FooExecutionProvider' is none of ONNX Runtime's; did you mean",
        ),
        ({"provider": "cpu"}, "provider 'cpu' is none of ONNX Runtime's; expected CPUExecutionProvider, "),
        ({"opt_batch": 4}, "opt_batch is TensorRT's"),
        ({"max_batch": 0}, "max_batch 0"),
        ({"max_batch": 4097}, "max_batch 4097"),
        ({"provider": ""}, "onnxruntime needs one"),
        ({"runtime": "tensorrt"}, "tensorrt has none"),
        ({"workspace_mib": -1}, "workspace_mib -1"),
        ({"workspace_mib": 2**21}, "workspace_mib"),
        ({"workspace_mib": 64}, "workspace_mib is TensorRT's"),
        ({"opt_batch": 9}, "opt_batch 9: expected 1 to max_batch, which is 8"),
        ({"opt_batch": 0}, "opt_batch 0"),
        ({"acc_budget": -0.1}, "acc_budget -0.1"),
        ({"asr_budget": 101}, "asr_budget 101"),
        ({"asr_budget": float("nan")}, "asr_budget nan"),
        ({"min_version": "new"}, "min_version 'new'"),
        ({"min_version": "10.3", "below_version": "9"}, "min_version 10.3 is not below"),
        ({"compute": ["sm87"]}, "compute 'sm87': expected capabilities such as '8.7'"),
        ({"compute": ["8.7"]}, "compute is for CUDA devices"),
        ({"compute": [8.7]}, "expected a list of texts"),
        ({"compute": "8.7"}, "expected a list of texts"),
        ({"precision": "int8"}, "without a table [quantisation]"),
        ({"quantisation": RECIPE}, "precision fp32 with a table [quantisation]"),
        ({"quantisation": 3}, "expected a table"),
    ],
)
def test_impossible_values_and_combinations_are_refused(changes: dict[str, Any], said: str) -> None:
    assert said in refusal(**changes)


def test_a_recipe_survives_the_bundle_and_whole_numbers_may_stand_for_shares() -> None:
    target = Target.from_mapping({**GOOD, "precision": "int8", "quantisation": RECIPE, "acc_budget": 2}, "mine")
    assert target.acc_budget == 2.0
    assert target.quantisation is not None
    assert target.to_json()["quantisation"] == RECIPE
    assert Target.from_mapping(target.to_json(), "again") == target


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"weight_bits": 4}, "weight_bits 4"),
        ({"operators": []}, "operators []"),
        ({"operators": ["Add"]}, "expected Conv, Gemm or both"),
        ({"operators": ["Conv", "Softmax"]}, "expected Conv, Gemm or both"),
        ({"calibrators": []}, "calibrators []"),
        ({"calibrators": ["entropy"]}, "expected minmax, mse or percentile-99.99"),
        ({"calibrators": ["percentile-9"]}, "calibrators"),
        ({"calibrators": ["percentile-00"]}, "percentile-99.99 (any share from 90)"),
        ({"calibrators": ["percentile-50"]}, "percentile-99.99 (any share from 90)"),
        ({"calibrators": ["mse", "mse"]}, "mse is there twice"),
        ({"operators": ["Conv", "Conv"]}, "Conv is there twice"),
        ({"operators": ["Conv", "Mul", "Add"], "bias": "float"}, "leave out Add, Mul"),
        ({"images": 15}, "images 15"),
        ({"min_agreement": 101.0}, "min_agreement 101"),
        ({"rest": "fp16"}, "use fp32"),
        ({"activations": "int4"}, "expected one of int8, uint8"),
        ({"calibrator": ["mse"]}, "quantisation: unknown key 'calibrator'; did you mean 'calibrators'?"),
        ({"bias": None}, "quantisation: 'bias' is missing"),
    ],
)
def test_impossible_recipes_are_refused(recipe: dict[str, Any], said: str) -> None:
    changed = {key: value for key, value in {**RECIPE, **recipe}.items() if value is not None}
    assert said in refusal(precision="int8", quantisation=changed)


@pytest.mark.parametrize(
    "change", [{"activations": "uint8"}, {"bias": "int32"}, {"weight_bits": 7}], ids=lambda change: next(iter(change))
)
def test_a_recipe_that_tensorrt_rejects_is_refused(change: dict[str, Any]) -> None:
    good = {**RECIPE, "activations": "int8", "bias": "float", "weight_bits": 8, "rest": "fp16"}
    board = {"precision": "int8", **TENSORRT}
    assert Target.from_mapping({**GOOD, **board, "quantisation": good}, "mine").quantisation is not None
    assert "tensorrt takes symmetric int8" in refusal(**board, quantisation={**good, **change})
    through = {"precision": "int8", "provider": "TensorrtExecutionProvider"}
    assert Target.from_mapping({**GOOD, **through, "quantisation": good}, "mine").quantisation is not None
    assert "TensorrtExecutionProvider takes symmetric int8" in refusal(**through, quantisation={**good, **change})
    for place in (board, {"precision": "int8", "provider": "CUDAExecutionProvider"}):
        assert "opset 18: FP16 scales" in refusal(**place, quantisation=good, opset=18)


@pytest.mark.parametrize(
    ("changes", "opset"), [({"min_version": "1.32"}, 24), ({}, 21), ({**TENSORRT, "min_version": "10.15"}, 24)]
)
def test_an_opset_that_the_least_release_reads_is_taken(changes: dict[str, Any], opset: int) -> None:
    assert Target.from_mapping({**GOOD, **changes, "opset": opset}, "mine").opset == opset


def test_versions_compare_as_numbers() -> None:
    assert version("10.3") < version("10.13.3.9") < version("11.4.0.dev1") < version("12")
    assert version("8.6.2") < version("10.3")
    assert version("unknown") < version("1")


def test_mutated_profiles_are_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    rng, text, path = random.Random(0), toml(GOOD).encode(), tmp_path / "x.toml"
    refused = 0
    for _ in range(600):
        data = bytearray(text)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            data[at : at + rng.randint(0, 5)] = rng.choice([b"", b"\n", b"[", b'"', b"\xff", rng.randbytes(2)])
        path.write_bytes(data)
        try:
            load_target(str(path))
        except TargetError:
            refused += 1
    assert refused > 300
