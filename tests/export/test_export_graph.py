"""The ONNX file: FP32 and FP16."""

from __future__ import annotations

import copy
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from rkd.errors import ArchitectureError, ExportError
from rkd.export.onnx_model import to_onnx
from rkd.export.parity import predictor_of
from rkd.export.precision import check_range, to_fp16
from rkd.models import STUDENTS, build
from rkd.network import NORMALISATIONS, Network

SIZE = (16, 16)
CPU = torch.device("cpu")


def network(module: nn.Module, classes: int = 5, size: tuple[int, int] = SIZE, name: str = "mine") -> Network:
    return Network(module, name, tuple(f"c{i}" for i in range(classes)), size, NORMALISATIONS["cifar10"])


def settled(name: str, size: tuple[int, int] = SIZE) -> Network:
    """A network with random weights whose BN statistics are those of its inputs."""
    torch.manual_seed(0)
    result = network(build(name, 5, size), size=size, name=name)
    batch = torch.from_numpy(images(32, size))
    with torch.no_grad():
        for _ in range(10):
            result.module(result.normalisation(batch))
    return result


def images(n: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    coarse = np.random.default_rng(1).integers(0, 256, (n, 3, 4, 4), dtype=np.uint8)
    return coarse.repeat(size[0] // 4, axis=2).repeat(size[1] // 4, axis=3)


class Head(nn.Module):
    """Mean colour to logits: exports in a second."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def wrn() -> Network:
    return settled("wrn-10-1")


@pytest.fixture(scope="module")
def wrn_fp32(wrn: Network) -> bytes:
    return to_onnx(wrn, 20)


@pytest.fixture(scope="module")
def wrn_fp16(wrn_fp32: bytes) -> bytes:
    return to_fp16(wrn_fp32)


def reference(net: Network, x: np.ndarray) -> np.ndarray:
    module = copy.deepcopy(net.module).eval()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (net.normalisation.mean, net.normalisation.std))
    with torch.no_grad():
        return module((torch.from_numpy(x).float() / 255 - mean) / std).numpy()


@pytest.mark.parametrize("n", [1, 2, 7])
def test_logits_are_torchs_at_any_batch(wrn: Network, wrn_fp32: bytes, n: int) -> None:
    np.testing.assert_allclose(predictor_of(wrn_fp32)(images(n)), reference(wrn, images(n)), rtol=1e-4, atol=1e-5)


def test_input_is_uint8_and_batch_is_free(wrn_fp32: bytes, wrn_fp16: bytes) -> None:
    for model in (wrn_fp32, wrn_fp16):
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        seen = [(v.name, v.type, v.shape) for v in (*session.get_inputs(), *session.get_outputs())]
        assert seen == [("images", "tensor(uint8)", ["N", 3, 16, 16]), ("logits", "tensor(float)", ["N", 5])]


def test_fixed_batch_takes_one_image_only() -> None:
    session = onnxruntime.InferenceSession(to_onnx(network(Head()), 20, dynamic_batch=False))
    assert session.get_inputs()[0].shape == [1, 3, 16, 16]
    assert session.get_outputs()[0].shape == [1, 5]


@pytest.mark.parametrize("opset", [18, 21])
def test_opset_is_what_was_asked_for(opset: int) -> None:
    model = onnx.load_model_from_string(to_onnx(network(Head()), opset))
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]


def test_opset_that_the_exporter_raises_silently_is_refused() -> None:
    with pytest.raises(ExportError, match="opset 17 was asked for"):
        to_onnx(network(Head()), 17)


def test_callers_module_stays_untouched_and_dropout_is_off() -> None:
    module = nn.Sequential(Head(), nn.Dropout(0.5)).double().train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    model = onnx.load_model_from_string(to_onnx(network(module), 20))
    assert all(part.training for part in module.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert {node.op_type for node in model.graph.node} == {"Cast", "Mul", "Add", "ReduceMean", "Gemm"}


def test_dropout_that_ignores_eval_mode_is_refused() -> None:
    class Noisy(Head):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(x), 0.5, training=True)

    with pytest.raises(ExportError, match="random in eval mode"):
        to_onnx(network(Noisy()), 20)


def test_equal_networks_give_equal_bytes_in_any_memory_format(wrn: Network, wrn_fp32: bytes, wrn_fp16: bytes) -> None:
    other = network(copy.deepcopy(wrn.module).to(memory_format=torch.channels_last).eval())
    again = to_onnx(other, 20)
    assert again == wrn_fp32
    assert to_fp16(again) == wrn_fp16


def test_nothing_of_this_machine_is_in_the_bytes(wrn_fp32: bytes, wrn_fp16: bytes) -> None:
    folders = [Path.home(), Path.cwd(), Path(sysconfig.get_paths()["purelib"]), Path(__file__).parents[2]]
    needles = [b"/home", b"site-packages", b".py", b"torch", *(str(folder).encode() for folder in folders)]
    for data in (wrn_fp32, wrn_fp16):
        model = onnx.load_model_from_string(data)
        del model.graph.initializer[:]  # weights are random bytes
        text = model.SerializeToString()
        for needle in needles:
            assert needle not in text, needle
        assert not model.metadata_props
        assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
        assert not any(tensor.external_data for tensor in onnx.load_model_from_string(data).graph.initializer)


def test_exporter_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    to_onnx(network(Head()), 20)
    with pytest.raises(ExportError):
        to_onnx(network(Branching()), 20)
    assert capfd.readouterr() == ("", "")


class Branching(Head):
    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits if logits.sum() > 0 else -logits


class Bessel(Head):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(super().forward(x))


class Conditional(Head):
    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return torch.cond(x.mean() > 99, lambda a: a + 1, lambda a: a - 1.0, (logits,))


class Choosy(Head):
    """Random in a branch only."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return torch.cond(x.mean() > 99, lambda a: a + torch.rand_like(a), lambda a: a - 1.0, (logits,))


class FixedBatch(Head):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Branching, r"branches on values of its tensors at `return logits if logits\.sum\(\) > 0.*torch\.where"),
        (Bessel, r"operator prims\.bessel_j0 \(node \w*bessel_j0\) has no ONNX counterpart; replace"),
        (Conditional, r"node \w*cond\w* \(If\) holds a graph of its own, .*torch\.where"),
        (Choosy, r"node \w*cond\w* \(If\) holds a graph of its own"),
        (FixedBatch, r"fixes the number of images.*max_batch = 1"),
    ],
)
def test_what_cannot_be_exported_is_named_in_one_line(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        to_onnx(network(make()), 20)
    assert "\n" not in str(caught.value)


def test_network_that_returns_no_logits_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="expected logits"):
        to_onnx(network(Head(), classes=6), 20)


def test_diverged_weights_are_refused_by_name() -> None:
    module = Head()
    nn.init.constant_(module.fc.bias, float("nan"))
    with pytest.raises(ExportError, match=r"fc\.bias holds NaN"):
        to_onnx(network(module), 20)


def test_fp16_graph_is_typed_fp16_after_fp32_preprocessing(wrn_fp16: bytes) -> None:
    model = onnx.load_model_from_string(wrn_fp16)
    onnx.checker.check_model(model, full_check=True)
    types = {v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(model).graph.value_info}
    full = [node.op_type for node in model.graph.node if types.get(node.output[0]) == onnx.TensorProto.FLOAT]
    assert full == ["Cast", "Mul", "Add"]
    assert model.graph.node[-1].op_type == "Cast"
    weights = {t.name: t.data_type for t in model.graph.initializer if "network" in t.name}
    assert weights
    assert set(weights.values()) == {onnx.TensorProto.FLOAT16}


def test_fp16_file_decides_as_torch_does(wrn: Network, wrn_fp16: bytes) -> None:
    got, wanted = predictor_of(wrn_fp16)(images(64)), reference(wrn, images(64))
    assert np.abs(got - wanted).max() < 0.01 * np.abs(wanted).max()


def test_batch_norm_statistics_beyond_fp16_survive() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 14 * 14, 5))
    with torch.no_grad():
        module[0].weight.mul_(1000)
        module[2].running_var.copy_(torch.tensor([1e6, 4e5, 1e5, 9e5]))
        module[2].weight.copy_(torch.tensor([1.0, 2.0, 0.5, -1.0]))
        module[2].running_mean.copy_(torch.tensor([100.0, 300.0, -5.0, 0.0]))
    net = network(module)
    model = to_onnx(net, 20)
    assert any(node.op_type == "BatchNormalization" for node in onnx.load_model_from_string(model).graph.node)
    got, wanted = predictor_of(to_fp16(model))(images(16)), reference(net, images(16))
    assert np.abs(got - wanted).max() < 0.01 * np.abs(wanted).max()


def test_tiny_weights_round_and_do_not_grow() -> None:
    module = Head()
    nn.init.constant_(module.fc.weight, 1e-9)
    model = onnx.load_model_from_string(to_fp16(to_onnx(network(module), 20)))
    weight = next(t for t in model.graph.initializer if t.name.endswith("fc.weight"))
    assert not numpy_helper.to_array(weight).any()


def test_weight_beyond_fp16_is_refused_by_name() -> None:
    module = Head()
    nn.init.constant_(module.fc.weight, 7e4)
    with pytest.raises(ExportError, match=r"fc\.weight reaches 70,000, FP16 holds at most 65,504"):
        to_fp16(to_onnx(network(module), 20))


def test_activation_beyond_fp16_is_refused_by_name_and_value() -> None:
    class Loud(Head):
        def __init__(self) -> None:
            super().__init__()
            self.loud, self.quiet = nn.Linear(5, 5, bias=False), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.quiet(self.loud(super().forward(x)))

    module = Loud()
    nn.init.constant_(module.loud.weight, 4e4)
    nn.init.constant_(module.fc.weight, 0.0)
    nn.init.constant_(module.fc.bias, 1.0)
    nn.init.constant_(module.quiet.weight, 1e-6)
    with pytest.raises(ExportError, match=r"activation \w+ reaches 200,000"):  # 5 * 1 * 4e4
        check_range(to_onnx(network(module), 20), images(8))


@pytest.mark.slow
@pytest.mark.parametrize("name", [student.name for student in STUDENTS])
def test_every_student_exports_in_both_precisions(name: str) -> None:
    size = (32, 32)
    net = settled(name, size)
    model = to_onnx(net, 20)
    check_range(model, images(8, size))
    wanted = reference(net, images(32, size))
    for data, tolerance in ((model, 1e-4), (to_fp16(model), 0.02)):
        onnx.checker.check_model(data, full_check=True)
        assert np.abs(predictor_of(data)(images(32, size)) - wanted).max() <= tolerance * np.abs(wanted).max()
