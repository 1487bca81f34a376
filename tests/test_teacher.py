"""Strangers' checkpoints: read without being run, recognised, and checked against clean images."""

from __future__ import annotations

import io
import json
import random
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from rkd.data import ArraySource
from rkd.errors import ArchitectureError, CheckpointError, ConfigError, RkdError, StorageError
from rkd.files import sha256
from rkd.metrics import Proportion
from rkd.models import build
from rkd.models.infer import infer_arch, output_count
from rkd.network import Network, Normalisation
from rkd.teacher import Checkpoint, choose_teacher, likelier_scaling, open_teacher, read_checkpoint, save_teacher

SIZE = (16, 16)
CPU = torch.device("cpu")
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(0)
    return dict(build("wrn-10-1", 10, SIZE).state_dict())


def small() -> State:
    """Two tensors: enough to be a state dict, small enough to be damaged many times."""
    return {"fc.weight": torch.arange(6.0).reshape(2, 3), "fc.bias": torch.tensor([0.5, -0.5])}


def saved(path: Path, value: Any, **kwargs: Any) -> Path:
    torch.save(value, path, **kwargs)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def same(got: Checkpoint, wanted: State) -> None:
    assert set(got.tensors) == set(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(got.tensors[name], tensor, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------- honest files


@pytest.mark.parametrize("name", ["t.pt", "t.pth", "t.pth.tar", "t.bin", "t"])
def test_a_bare_state_dict_is_read_under_any_name(tmp_path: Path, state: State, name: str) -> None:
    path = saved(tmp_path / name, state)
    checkpoint = read_checkpoint(path)
    same(checkpoint, state)
    assert checkpoint.sha256 == sha256(path.read_bytes())
    assert (checkpoint.header, checkpoint.notes) == (None, ())


@pytest.mark.parametrize(
    "key",
    ["state_dict", "model_state_dict", "model_state", "model", "net", "network", "teacher", "weights", "params"],
)
def test_a_known_wrapper_is_taken_off_and_noted(tmp_path: Path, key: str) -> None:
    checkpoint = read_checkpoint(saved(tmp_path / "t.pt", {key: small(), "epoch": 3}))
    same(checkpoint, small())
    assert checkpoint.notes == (f"the tensors were inside {key!r}",)


def test_what_training_scripts_save_is_read(tmp_path: Path, state: State) -> None:
    module = build("wrn-10-1", 10, SIZE)
    module.load_state_dict(state)
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    module(torch.zeros(2, 3, *SIZE)).sum().backward()
    optimizer.step()
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    parallel = OrderedDict((f"module.{name}", tensor) for name, tensor in state.items())
    script = {
        "epoch": 200,
        "state_dict": parallel,
        "best_prec": torch.tensor(93.2),
        "optimizer": optimizer.state_dict(),
    }
    checkpoint = read_checkpoint(saved(tmp_path / "model_best.pth.tar", script))
    same(checkpoint, state)
    assert checkpoint.notes == ("the tensors were inside 'state_dict'", "removed prefix 'module.'")


def test_wrappers_and_prefixes_inside_each_other_are_taken_off(tmp_path: Path) -> None:
    compiled = {f"_orig_mod.module.{name}": tensor for name, tensor in small().items()}
    same(read_checkpoint(saved(tmp_path / "t.pt", {"model": {"state_dict": compiled}})), small())


def test_a_prefix_that_not_all_names_have_stays(tmp_path: Path) -> None:
    mixed = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    same(read_checkpoint(saved(tmp_path / "t.pt", mixed)), mixed)


def test_the_old_format_of_torch_is_read(tmp_path: Path, state: State) -> None:
    same(read_checkpoint(saved(tmp_path / "t.pt", state, _use_new_zipfile_serialization=False)), state)


def test_safetensors_of_strangers_are_read(tmp_path: Path, state: State) -> None:
    (tmp_path / "t.safetensors").write_bytes(save_safetensors(state, {"format": "pt"}))
    checkpoint = read_checkpoint(tmp_path / "t.safetensors")
    same(checkpoint, state)
    assert checkpoint.header is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = read_checkpoint(saved(tmp_path / "t.pt", {n: t.to(dtype) for n, t in small().items()}))
    same(checkpoint, small())
    assert checkpoint.notes == (f"converted from {str(dtype).removeprefix('torch.')} to float32",)


@pytest.mark.parametrize("name", ["mine.pt", "mine.safetensors"])
def test_what_rkd_saves_says_everything_of_itself(tmp_path: Path, state: State, name: str) -> None:
    module = build("wrn-10-1", 10, SIZE)
    module.load_state_dict(state)
    scaling = Normalisation((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    network = Network(module, "wrn-10-1", tuple("abcdefghij"), SIZE, scaling, {"attack": "none"})
    save_teacher(tmp_path / name, network)
    checkpoint = read_checkpoint(tmp_path / name)
    same(checkpoint, state)
    (opened,) = open_teacher(checkpoint, arch=None, normalisation=None, classes=None, size=SIZE)
    assert opened.describe() == network.describe()
    images = np.random.default_rng(0).integers(0, 256, (4, 3, *SIZE), dtype=np.uint8)
    np.testing.assert_array_equal(opened.predictor(CPU)(images), network.predictor(CPU)(images))


def test_shared_weights_are_no_reason_to_refuse(tmp_path: Path) -> None:
    weight = torch.randn(50, 50)
    same(read_checkpoint(saved(tmp_path / "t.pt", {"a": weight, "b": weight})), {"a": weight, "b": weight})


# ------------------------------------------------------------------------------------------------- honest refusals


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such file"):
        read_checkpoint(tmp_path / "missing.pt")
    assert "is a folder" in refusal(tmp_path)
    for name, content in {
        "empty.pt": b"",
        "text.pt": b"hello",
        "zip.pt": b"PK\x03\x04",
        "x.safetensors": b"{}",
    }.items():
        (tmp_path / name).write_bytes(content)
        refusal(tmp_path / name)


def test_an_unknown_wrapper_is_listed_by_its_keys(tmp_path: Path) -> None:
    message = refusal(saved(tmp_path / "t.pt", {"ema_weights": small(), "step": 7}))
    assert "'ema_weights', 'step'" in message
    assert "state_dict" in message


@pytest.mark.parametrize(
    "value", [{}, [], torch.zeros(3), 5, None, "text", {"state_dict": {}}, {"model": {"model": {"model": small()}}}, {3: torch.zeros(1)}]
)  # fmt: skip
def test_other_content_is_no_state_dict(tmp_path: Path, value: Any) -> None:
    assert "state dict" in refusal(saved(tmp_path / "t.pt", value))


def test_a_torchscript_archive_is_refused_as_code(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "t.pt"))
    assert "TorchScript" in refusal(tmp_path / "t.pt")


def repacked(path: Path, out: Path, compression: int = zipfile.ZIP_STORED, leave_out: str = "") -> Path:
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in old.namelist():
            if not leave_out or not name.endswith(leave_out):
                new.writestr(name, old.read(name))
    return out


def test_other_zip_archives_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "t.pt", small())
    assert "compressed" in refusal(repacked(path, tmp_path / "small.pt", zipfile.ZIP_DEFLATED))
    assert "without a torch checkpoint" in refusal(repacked(path, tmp_path / "headless.pt", leave_out="data.pkl"))
    refusal(repacked(path, tmp_path / "hollow.pt", leave_out="data/0"))


def formats(value: Any) -> dict[str, bytes]:
    made = {"t.safetensors": save_safetensors(value)}
    for name, new in {"zip.pt": True, "legacy.pt": False}.items():
        buffer = io.BytesIO()
        torch.save(value, buffer, _use_new_zipfile_serialization=new)
        made[name] = buffer.getvalue()
    return made


@pytest.mark.parametrize("name", ["t.safetensors", "zip.pt", "legacy.pt"])
def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path, name: str) -> None:
    data, path = formats(small())[name], tmp_path / name
    for length in {*range(1, len(data), max(1, len(data) // 60)), len(data) - 1}:
        path.write_bytes(data[:length])
        refusal(path)


@pytest.mark.parametrize("name", ["t.safetensors", "zip.pt", "legacy.pt"])
def test_damaged_files_are_read_or_refused_and_nothing_else(tmp_path: Path, name: str) -> None:
    data, path, rng = formats(small())[name], tmp_path / name, random.Random(0)
    refused = 0
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        if rng.random() < 0.2:
            at = rng.randrange(len(changed))
            del changed[at : at + rng.randint(1, 50)]
        path.write_bytes(changed)
        try:
            read_checkpoint(path)
        except CheckpointError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_named(tmp_path: Path, value: float) -> None:
    broken = {**small(), "layer3.weight": torch.tensor([1.0, value])}
    assert "layer3.weight" in refusal(saved(tmp_path / "t.pt", broken))


@pytest.mark.parametrize(
    "odd",
    [
        lambda: torch.zeros(3).to_sparse(),
        lambda: torch.zeros(3, dtype=torch.complex64),
        lambda: torch.zeros(3, device="meta"),
        lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
    ],
    ids=["sparse", "complex", "meta", "quantised"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_no_plain_weights_are_named(tmp_path: Path, odd: Callable[[], Tensor]) -> None:
    message = refusal(saved(tmp_path / "t.pt", {**small(), "odd": odd()}))
    assert re.search(r"'odd'|torch\._utils\._rebuild_(sparse_tensor|meta_tensor_no_storage|qtensor)", message), message


def test_tables_of_indices_are_read_and_whole_numbers_as_weights_are_refused(tmp_path: Path) -> None:
    """As torchvision's Swin has tables, and as quantised networks have weights."""
    code = tmp_path / "net.py"
    code.write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.fc = nn.Linear(3, 2)\n"
        "        self.register_buffer('table', torch.zeros(3, dtype=torch.int64))\n"
        "    def forward(self, x):\n"
        "        return self.fc(x.mean((2, 3))[:, self.table])\n"
        "def make():\n    return Net()\n"
    )
    table = torch.tensor([2, 0, 1])
    state = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.zeros(2), "table": table}

    def opened(state: dict[str, Tensor]) -> Network:
        checkpoint = read_checkpoint(saved(tmp_path / "t.pt", state))
        return open_teacher(
            checkpoint, arch=f"{code}:make", normalisation=Normalisation(), classes=("a", "b"), size=(8, 8)
        )[0]

    assert torch.equal(opened(state).module.get_buffer("table"), table)
    for name, wrong, expected in (("fc.weight", torch.ones(2, 3, dtype=torch.int8), "fractions"),
                                  ("table", table.float(), "whole numbers")):  # fmt: skip
        with pytest.raises(ArchitectureError, match=f"{name} holds .*, expected {expected}"):
            opened({**state, name: wrong})


# ------------------------------------------------------------------------------------------------------ huge claims


def test_a_tensor_that_claims_more_than_the_file_has_is_refused(tmp_path: Path) -> None:
    for tensor in (
        torch.zeros(1).expand(10**11),
        torch.zeros(8).as_strided((5000, 8), (0, 1)),
        torch.zeros(500).expand(2, 500),
    ):
        assert re.search("'w' (claims more|most)", refusal(saved(tmp_path / "t.pt", {"w": tensor})))


def test_many_tensors_that_together_claim_more_than_the_file_has_are_refused(tmp_path: Path) -> None:
    shared = torch.zeros(50_000)
    path = saved(tmp_path / "t.pt", {f"w{i}": shared for i in range(500)})
    assert 100 * path.stat().st_size < 500 * 200_000
    assert "claim" in refusal(path)


def test_more_tensors_than_any_network_has_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rkd.teacher._MAX_TENSORS", 1)
    assert "at most 1 " in refusal(saved(tmp_path / "t.pt", small()))


def test_a_file_larger_than_any_teacher_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "t.pt").open("wb") as file:
        file.truncate(2**34 + 1)
    assert "at most" in refusal(tmp_path / "t.pt")


def test_a_pickle_that_allocates_without_holding_the_bytes_is_refused(tmp_path: Path) -> None:
    # torch allows `bytearray(n)` with any n; here it is a mebibyte out of thirty bytes.
    claim = b"\x80\x02c%s\nbytearray\n\x8a\x04\x00\x00\x10\x00\x85R."
    for module in (b"builtins", b"__builtin__"):
        (tmp_path / "t.pt").write_bytes(claim % module)
        assert "bytearray" in refusal(tmp_path / "t.pt")


@pytest.mark.parametrize("kind", ["V1000000", "S1000000", "U1000000", "O", "M8[s]", "f4,f4", "(9,9)f4", ">f8", ""])
@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_a_numpy_value_that_is_no_plain_number_is_refused(tmp_path: Path, kind: str, module: str) -> None:
    # numpy makes a value without content as large as its type says.
    text = b"X" + len(kind).to_bytes(4, "little") + kind.encode()
    value = b"\x80\x02c" + module.encode() + b"\nscalar\ncnumpy\ndtype\n" + text + b"\x85R\x85R."
    buffer = io.BytesIO()
    torch.save({}, buffer)
    with zipfile.ZipFile(buffer) as empty, zipfile.ZipFile(tmp_path / "t.pt", "w") as archive:
        for name in empty.namelist():
            archive.writestr(name, value if name.endswith("data.pkl") else empty.read(name))
    assert "numpy value of type" in refusal(tmp_path / "t.pt")


@pytest.mark.parametrize("number", [np.float64(93.2), np.float32(93.2), np.int64(93), np.bool_(1)])
def test_a_numpy_number_beside_the_weights_is_read_over(tmp_path: Path, number: Any) -> None:
    same(read_checkpoint(saved(tmp_path / "t.pt", {"state_dict": small(), "best_prec1": number})), small())


@pytest.mark.parametrize(
    "header",
    [
        {"mean": torch.zeros(1).expand(10**12), "std": [1, 1, 1]},
        {"provenance": torch.zeros(3)},
        {"classes": {1, 2}},
        {"arch": b"wrn-10-1"},
        {"mean": [float("nan")] * 3},
    ],
)
def test_a_header_that_is_no_plain_data_is_refused(tmp_path: Path, header: dict[str, Any]) -> None:
    assert "header" in refusal(saved(tmp_path / "t.pt", {"state_dict": small(), "rkd": header}))


# ----------------------------------------------------------------------------------------------------- architecture


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for n, t in module.state_dict().items() if not n.endswith("num_batches_tracked")}


@pytest.mark.parametrize("order", ["as saved by torch", "sorted as in safetensors"])
@pytest.mark.parametrize(
    ("name", "side", "expected"),
    [
        ("wrn-10-1", 32, ("wrn-10-1",)),
        ("wrn-16-2", 32, ("wrn-16-2",)),
        ("wrn-40-4", 32, ("wrn-40-4",)),
        ("resnet20", 32, ("resnet20",)),
        ("resnet56", 32, ("resnet56",)),
        ("torchvision:resnet18", 32, ("torchvision:resnet18",)),
        ("resnet18", 32, ("resnet18",)),
        ("resnet18", 224, ("torchvision:resnet18", "resnet18")),
        ("mobilenet_v2", 32, ("torchvision:mobilenet_v2", "mobilenet_v2")),
        ("mobilenet_v3_small", 32, ("torchvision:mobilenet_v3_small", "mobilenet_v3_small")),
        ("shufflenet_v2_x1_0", 32, ("torchvision:shufflenet_v2_x1_0", "shufflenet_v2_x1_0")),
        ("squeezenet1_1", 64, ("torchvision:squeezenet1_1", "squeezenet1_1")),
        ("convnext_tiny", 64, ("torchvision:convnext_tiny", "convnext_tiny")),
    ],
)
def test_the_architecture_is_found_from_names_and_shapes(
    name: str, side: int, expected: tuple[str, ...], order: str
) -> None:
    with torch.device("meta"):
        shapes = shapes_of(build(name, 7, (side, side)))
    if order.startswith("sorted"):
        shapes = dict(sorted(shapes.items()))
    assert output_count(shapes) == 7
    assert infer_arch(shapes, (side, side)) == expected


def test_the_3x3_and_the_7x7_stem_are_told_apart() -> None:
    with torch.device("meta"):
        stems = [build(name, 7, (32, 32)).state_dict()["conv1.weight"].shape for name in ("resnet18", "torchvision:resnet18")]  # fmt: skip
    assert stems == [(64, 3, 3, 3), (64, 3, 7, 7)]


@pytest.mark.parametrize(
    "name",
    ["block1.layer.0.conv1.weight", "layer3.0.conv1.weight", "features.0.weight", "stem.0.weight"],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(), (0,), (1,), (0, 0), (10**9, 0), (3, 3, 3, 3)])
def test_telling_names_with_absurd_shapes_fit_nothing(name: str, shape: tuple[int, ...]) -> None:
    assert infer_arch({name: shape}, (32, 32)) == ()
    assert infer_arch({name: shape, "fc.weight": (10, 64)}, (32, 32)) == ()


def test_tensors_that_fit_nothing_ask_for_the_architecture(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(saved(tmp_path / "t.pt", small()))
    with pytest.raises(ArchitectureError, match=r"fc\.weight.*--arch"):
        open_teacher(checkpoint, arch=None, normalisation=Normalisation(), classes=None, size=SIZE)


@pytest.mark.parametrize(
    ("arch", "said"),
    [
        ("wrn-10-2", r"block1\.layer\.0\.bn2\.weight is \(16,\), expected \(32,\)"),
        ("wrn-16-1", r"block1\.layer\.1\.bn1\.weight is missing"),
        ("resnet20", r"is not a resnet20: bn1\.weight is \(64,\), expected \(16,\)"),
    ],
)
def test_the_wrong_architecture_says_which_tensors_do_not_fit(
    tmp_path: Path, state: State, arch: str, said: str
) -> None:
    checkpoint = read_checkpoint(saved(tmp_path / "t.pt", state))
    with pytest.raises(ArchitectureError, match=said):
        open_teacher(checkpoint, arch=arch, normalisation=Normalisation(), classes=None, size=SIZE)


def test_another_number_of_classes_than_the_data_has_is_refused_with_both_numbers(tmp_path: Path, state: State) -> None:
    checkpoint = read_checkpoint(saved(tmp_path / "t.pt", state))
    with pytest.raises(ArchitectureError, match=r"has 10 classes, the data has 3 \(a, b, c"):
        open_teacher(checkpoint, arch=None, normalisation=Normalisation(), classes=("a", "b", "c"), size=SIZE)


def test_a_stranger_must_be_told_the_scaling(tmp_path: Path, state: State) -> None:
    checkpoint = read_checkpoint(saved(tmp_path / "t.pt", state))
    with pytest.raises(ConfigError, match="--normalize"):
        open_teacher(checkpoint, arch=None, normalisation=None, classes=None, size=SIZE)
    (network,) = open_teacher(checkpoint, arch=None, normalisation=Normalisation(), classes=None, size=SIZE)
    assert (network.arch, network.classes) == ("wrn-10-1", tuple("0123456789"))


HEADER = {"arch": "wrn-10-1", "mean": [0, 0, 0], "std": [1, 1, 1]}


@pytest.mark.parametrize(
    "arch",
    ["evil.py:make", "./evil.py:make", "/srv/evil.py:make", "evil.py", "timm:hf-hub:me/evil", "timm:../evil", "torchvision:a b", "", 5, None, ["wrn-10-1"]],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_header_may_not_name_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: State, arch: Any, suffix: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('canary', 'w')\ndef make():\n    open('canary', 'w')\n")
    path = tmp_path / f"t{suffix}"
    header = {**HEADER, "arch": arch}
    if suffix == ".pt":
        torch.save({"state_dict": state, "rkd": header}, path)
    else:
        path.write_bytes(save_safetensors(state, {"rkd": json.dumps(header)}))
    checkpoint = read_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"plain name|code to run"):
        open_teacher(checkpoint, arch=None, normalisation=None, classes=None, size=SIZE)
    if suffix == ".safetensors":
        with pytest.raises(CheckpointError):
            Network.load(path)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "change",
    [{"mean": [0, 0]}, {"std": [0, 1, 1]}, {"std": "abc"}, {"mean": 5}, {"mean": [[0], [0], [0]]}, {"mean": {}}],
)
def test_a_header_with_an_impossible_scaling_is_refused(tmp_path: Path, state: State, change: dict[str, Any]) -> None:
    checkpoint = read_checkpoint(saved(tmp_path / "t.pt", {"state_dict": state, "rkd": {**HEADER, **change}}))
    with pytest.raises(RkdError, match="normalisation"):
        open_teacher(checkpoint, arch=None, normalisation=None, classes=None, size=SIZE)


# --------------------------------------------------------------------------------------------------------- scaling


@pytest.mark.parametrize(
    ("text", "mean", "std"),
    [
        ("none", (0, 0, 0), (1, 1, 1)),
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("cifar10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        ("0.5;0.25", (0.5,) * 3, (0.25,) * 3),
        ("0.1,0.2,0.3;0.4,0.5,0.6", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
        (" 0.1, 0.2, 0.3 ; 1 ", (0.1, 0.2, 0.3), (1, 1, 1)),
        ("-1;2", (-1,) * 3, (2,) * 3),
    ],
)
def test_scalings_are_parsed(text: str, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    scaling = Normalisation.parse(text)
    assert (scaling.mean, scaling.std) == (mean, std)
    assert Normalisation.parse(str(scaling)) == scaling


@pytest.mark.parametrize(
    "text", ["", "cifar", "0.5", "0.5;", ";1", "0.5;0", "0.5;-1", "nan;1", "0;inf", "1,2;1", "1,2,3,4;1", "a;b", "1;2;3", "1e999;1"]
)  # fmt: skip
def test_other_scalings_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        Normalisation.parse(text)


def test_scaling_is_what_the_formula_says() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5), dtype=np.uint8)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
    got = Normalisation(tuple(mean), tuple(std))(torch.from_numpy(pixels))
    np.testing.assert_allclose(got.numpy(), expected, atol=2e-6)


# ---------------------------------------------------------------------------------------------------- chance check


class Grey(nn.Module):
    """The mean of an image's first channel, cut at `edges`, answered with the class `order` gives for that range."""

    def __init__(self, edges: list[float], order: list[int]) -> None:
        super().__init__()
        self.edges = nn.Parameter(torch.tensor(edges), requires_grad=False)
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        found = torch.bucketize(x[:, 0].mean((1, 2)), self.edges)
        return torch.eye(len(self.order))[torch.tensor(self.order)[found]]


CLEAN_LABELS = np.random.default_rng(0).permutation(np.arange(120) % 4)


def clean() -> ArraySource:
    """Four greys, 40, 100, 160 and 220, one a class, with noise."""
    noise = np.random.default_rng(1).integers(-9, 10, (120, 3, 8, 8))
    pixels = (40 + 60 * CLEAN_LABELS)[:, None, None, None] + noise
    return ArraySource(pixels.astype(np.uint8), CLEAN_LABELS)


def grey(order: list[int], scaling: str = "none", trained: str = "none") -> Network:
    """A network that is right under the scaling `trained`, used with `scaling`."""
    known = Normalisation.parse(trained)
    edges = [(edge / 255 - known.mean[0]) / known.std[0] for edge in (70, 130, 190)]
    return Network(Grey(edges, order), "grey", tuple("abcd"), (8, 8), Normalisation.parse(scaling))


def refused(network: Network) -> str:
    with pytest.raises(CheckpointError, match="clean images right") as caught:
        choose_teacher([network], clean(), CPU)
    return str(caught.value)


def test_a_teacher_that_is_right_is_taken_with_its_accuracy() -> None:
    network, found = choose_teacher([grey([0, 1, 2, 3])], clean(), CPU)
    assert network.arch == "grey"
    assert found == Proportion(120, 120)


def test_of_several_that_fit_the_best_on_the_images_is_taken() -> None:
    good = grey([0, 1, 2, 3])
    chosen, found = choose_teacher([grey([3, 2, 1, 0]), good, grey([0, 1, 2, 2])], clean(), CPU)
    assert chosen is good
    assert found.hits == 120


def test_only_so_many_images_are_looked_at_and_the_seed_says_which() -> None:
    half_right = grey([0, 1, 2, 2])
    looks = [choose_teacher([half_right], clean(), CPU, limit=40, seed=seed)[1] for seed in (0, 0, 1, 2)]
    assert {look.n for look in looks} == {40}
    assert looks[0] == looks[1]
    assert len({look.hits for look in looks}) > 1


def test_a_teacher_that_always_says_the_same_is_refused(state: State) -> None:
    module = build("wrn-10-1", 4, (8, 8))
    with torch.no_grad():
        module.fc.weight.zero_()
        module.fc.bias.zero_()
    message = refused(Network(module, "wrn-10-1", tuple("abcd"), (8, 8), Normalisation()))
    assert "25.0 % of 120 clean images right, chance is 25.0 %" in message
    assert "check --normalize" in message


def test_always_answering_the_commonest_class_is_chance() -> None:
    labels = np.where(np.arange(120) < 90, 2, np.arange(120) % 2)
    source = ArraySource(np.zeros((120, 3, 8, 8), np.uint8), labels)
    with pytest.raises(CheckpointError, match=r"75\.0 % of 120 clean images right, chance is 75\.0 %"):
        choose_teacher([grey([2, 2, 2, 2])], source, CPU)


def test_a_teacher_with_its_classes_in_another_order_gets_that_hint() -> None:
    message = refused(grey([1, 2, 3, 0]))
    assert "100 % under another class order" in message
    assert "class folders" in message


@pytest.mark.parametrize("trained", ["imagenet", "cifar10"])
def test_a_teacher_with_another_scaling_gets_that_scaling_as_hint(trained: str) -> None:
    # All edges are negative, and without the scaling no pixel is: class 3 is all that it says.
    known = Normalisation.parse(trained)
    source = dark()
    edges = [(edge / 255 - known.mean[0]) / known.std[0] for edge in (7, 17, 27)]
    assert max(edges) < 0
    network = Network(Grey(edges, [0, 1, 2, 3]), "grey", tuple("abcd"), (8, 8), Normalisation())
    with pytest.raises(CheckpointError, match=r"25\.0 % of 120 .*with --normalize (imagenet|cifar10) it gets"):
        choose_teacher([network], source, CPU)
    _, found = choose_teacher([replace(network, normalisation=known)], source, CPU)
    assert found.hits == 120


def test_a_scaling_that_beats_chance_but_is_clearly_not_the_best_is_asked_about() -> None:
    doubt = likelier_scaling(grey([0, 1, 2, 3], scaling="imagenet"), clean(), CPU)
    assert doubt is not None
    assert "--normalize imagenet: 75.0 % of 120 clean training images are right, with --normalize none 100.0 %" in doubt
    assert likelier_scaling(grey([0, 1, 2, 3]), clean(), CPU) is None


def dark() -> ArraySource:
    """Four greys, 2, 12, 22 and 32, one a class."""
    pixels = np.broadcast_to((2 + 10 * CLEAN_LABELS)[:, None, None, None], (120, 3, 8, 8))
    return ArraySource(pixels.astype(np.uint8), CLEAN_LABELS)


def test_messages_are_one_line(tmp_path: Path) -> None:
    for name, data in formats(small()).items():
        (tmp_path / name).write_bytes(data[:-20])
        assert not re.search(r"\n", refusal(tmp_path / name).strip())
