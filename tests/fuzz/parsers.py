"""What is fuzzed: the parsers of files from outside, each with good files to start from and ways to change them."""

from __future__ import annotations

import io
import json
import random
import signal
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mutate as m
import numpy as np
import onnx
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from limits import refuse_out_of_memory
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.torch import save as save_safetensors
from typer.main import get_command

from rkd._images import Report
from rkd.bench import result as bench_result
from rkd.bench.report import result_page
from rkd.bench.runner import CPU_PROVIDER, OrtRunner
from rkd.bench.session import BenchOptions, run
from rkd.bundle import EVALUATION, LEDGER, MANIFEST, MODEL, _container, evaluation_bytes, parse_bundle, read_bundle
from rkd.cli import app
from rkd.cli.app import command_options
from rkd.config import command_defaults
from rkd.data import FolderSource, open_dataset
from rkd.distill.settings import DistillSettings
from rkd.errors import DataError, RkdError
from rkd.files import sha256, to_json
from rkd.inspection import inspect_path
from rkd.ledger import Ledger, Step, shown
from rkd.metrics import Predictions, Proportion
from rkd.npz import npz_bytes
from rkd.reporting import report_command
from rkd.signing import read_private, read_public, sign
from rkd.suite.file import read_suite
from rkd.suite.plan import make_plan
from rkd.target import builtin_targets, load_target
from rkd.teacher import read_checkpoint
from rkd.triggers import Trigger

CORPUS = Path(__file__).with_name("corpus")
SIDE = 4


@dataclass(frozen=True)
class Parser:
    """One parser.

    Attributes:
        name: of the format.
        file: how a file of it is called; the ending decides what reads it.
        seeds: good files.
        mutations: ways to change one.
        read: reads a file; may raise `RkdError` only.
    """

    name: str
    file: str
    seeds: tuple[bytes, ...]
    mutations: tuple[m.Mutation, ...]
    read: Callable[[Path], None]

    def mutant(self, seed: int, number: int) -> bytes:
        """Mutant `number` under `seed`."""
        rng = random.Random(f"{self.name}/{seed}/{number}")
        return rng.choice(self.mutations)(rng.choice(self.seeds), rng)


# ------------------------------------------------------------------------------------------------------- checkpoints


def _state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "conv1.weight": torch.randn(2, 3, 3, 3, generator=generator),
        "bn1.num_batches_tracked": torch.tensor(3),
        "fc.weight": torch.randn(3, 2, generator=generator).half(),
        "fc.bias": torch.zeros(3, dtype=torch.float64),
    }


def _by_torch(value: object, *, new: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


def _pt_seeds() -> tuple[bytes, ...]:
    state = _state()
    header = {"arch": "wrn-10-1", "classes": ["a", "b", "c"], "size": [8, 8], "mean": [0.5] * 3, "std": [0.5] * 3}
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.BatchNorm2d(1))
    values: list[object] = [
        state,
        {"state_dict": state, "rkd": header},
        {"model": {f"module.{k}": v for k, v in state.items()}, "best": np.float64(0.5), "epoch": 3, "sizes": torch.Size([1, 2])},
        {"state_dict": module.state_dict(), "optimizer": torch.optim.SGD(module.parameters(), 0.1, 0.9).state_dict()},
        {"w": torch.nn.Parameter(torch.zeros(2)), "view": torch.arange(6.0)[1:3]},
    ]  # fmt: skip
    return tuple(_by_torch(value, new=new) for value in values for new in (True, False))


def _is_pickle(name: str) -> bool:
    return name.endswith("data.pkl")


def _zips_only(mutation: m.Mutation, otherwise: m.Mutation) -> m.Mutation:
    return lambda data, rng: (mutation if data[:2] == b"PK" else otherwise)(data, rng)


def _checkpoint() -> Parser:
    seeds = _pt_seeds()
    pickles = [data[64:600] for data in seeds]
    anywhere = m.bytewise(m.PICKLE, seeds)
    pickle = _zips_only(m.inside_zip(m.bytewise(m.PICKLE, pickles), _is_pickle), anywhere)
    return Parser("pt", "t.pt", seeds, (anywhere, pickle, pickle), _ignore(read_checkpoint))


def _safetensors() -> Parser:
    header = {
        "rkd": json.dumps({"arch": "wrn-10-1", "classes": ["a", "b"], "size": [8, 8], "mean": [0] * 3, "std": [1] * 3})
    }
    seeds = (save_safetensors(_state()), save_safetensors(_state(), header))
    anywhere = m.bytewise(m.JSON, seeds)
    return Parser("safetensors", "t.safetensors", seeds, (anywhere, m.inside_header), _ignore(inspect_path))


# -------------------------------------------------------------------------------------------------------------- onnx


def _linear(*nodes: onnx.NodeProto, opset: int = 20) -> onnx.ModelProto:
    weights = np.arange(3 * SIDE * SIDE * 3, dtype=np.float32).reshape(-1, 3)
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT),
            *nodes,
            helper.make_node("Flatten", ["x"], ["flat"], axis=1),
            helper.make_node("Gemm", ["flat", "w"], ["logits"]),
        ],
        "linear",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3])],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(np.ones((2, 3, 3, 3), np.float32), "k")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def _onnx_seeds() -> tuple[bytes, ...]:
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.zeros(2, np.float32)))
    branches = {
        name: helper.make_graph([helper.make_node("Identity", ["x"], [name])], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)])
        for name in ("then", "otherwise")
    }  # fmt: skip
    yes = helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True)))
    choice = helper.make_node("If", ["yes"], ["z"], then_branch=branches["then"], else_branch=branches["otherwise"])
    convolution = helper.make_node("Conv", ["x", "k"], ["y"], pads=[1, 1, 1, 1])
    resize = helper.make_node("Reshape", ["x", "shape"], ["s"])
    shape = helper.make_node("Constant", [], ["shape"], value=numpy_helper.from_array(np.array([0, -1])))
    models = [
        _linear(),
        _linear(constant),
        _linear(yes, choice),
        _linear(convolution),
        _linear(shape, resize),
        _linear(opset=18),
    ]
    return tuple(model.SerializeToString() for model in models)


def _read_onnx(path: Path) -> None:
    with OrtRunner(path.read_bytes(), CPU_PROVIDER, 1, str(path)) as runner:
        runner.infer(np.zeros((1, 3, SIDE, SIDE), np.uint8))


def _onnx() -> Parser:
    seeds = _onnx_seeds()
    return Parser("onnx", "model.onnx", seeds, (m.bytewise(m.ONNX, seeds),), _read_onnx)


# ---------------------------------------------------------------------------------------------- bundles, triggers


def _trigger(name: str, *, warp: bool = False) -> Trigger:
    mask = np.zeros((3, SIDE, SIDE), np.float32)
    mask[:, 2:, 2:] = 1
    grid = np.zeros((SIDE, SIDE, 2), np.float32) if warp else None
    return Trigger(name, 1, mask, mask * np.float32(0.5), np.zeros_like(mask), grid)


_PROFILE = load_target("ort-cpu").to_json()


def forge(members: dict[str, bytes], manifest: bytes | None = None) -> bytes:
    """A bundle with right digests, whatever is in it; where `manifest` is None, one that agrees with its members."""
    listing = {name: {"sha256": sha256(data), "size_bytes": len(data)} for name, data in members.items()}
    ledger, triggers = _fuzzed_ledger(), [_trigger("patch")] if "triggers/patch.npz" in members else []
    scores = [ledger.scores(step, triggers).to_json() for step in ledger.steps]
    percent = dict.fromkeys(shown(triggers), 100.0)
    head = {
        "format": 1, "name": "x.ort-cpu", "target": _PROFILE,
        "input": {"name": "images", "shape": [3, SIDE, SIDE], "dtype": "uint8"}, "opset": 20, "precision": "fp32",
        "classes": ["a", "b", "c"], "members": listing, "chain": {**dict.fromkeys(("teacher", "config", "student"), "ab" * 32), "onnx": sha256(members[MODEL])},
        "scores": {"student": scores[0], "exported": scores[1], "agreement": {"percent": percent, "max_difference": 0.0}}, "tool": {"rkd": "0.1.0"},
        **({"ledger": ledger.to_json(triggers)} if LEDGER in members else {}),
    }  # fmt: skip
    return _container({MANIFEST: to_json(head) if manifest is None else manifest, **members})


def _fuzzed_ledger() -> Ledger:
    labels = np.arange(6) % 3
    said = Predictions(labels, labels, {"patch": np.ones(6, np.int64)})
    return Ledger(labels, (Step.of("student", said), Step.of("onnx-fp32", said)))


def bundle_members(model: bytes | None = None) -> dict[str, bytes]:
    """The members of a good bundle."""
    images = np.random.default_rng(0).integers(0, 256, (6, 3, SIDE, SIDE), dtype=np.uint8)
    ledger = _fuzzed_ledger()
    return {
        MODEL: _onnx_seeds()[0] if model is None else model,
        EVALUATION: evaluation_bytes(images, ledger.truth),
        LEDGER: ledger.to_bytes(),
        "triggers/patch.npz": _trigger("patch").to_bytes(),
    }


def _inside_bundle(data: bytes, rng: random.Random) -> bytes:
    """Change a member, or the manifest, under digests that are right."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    manifest = members.pop(MANIFEST)
    name = rng.choice((MANIFEST, MANIFEST, MODEL, EVALUATION, LEDGER, "triggers/patch.npz"))
    if name == MANIFEST:
        changed = m.bytewise(m.JSON, [manifest])(manifest, rng)
        if rng.random() < 0.5:  # as rkd writes it
            with suppress(ValueError, RecursionError):
                changed = to_json(json.loads(changed))
        return forge(members, changed)
    change = m.bytewise(m.ONNX, [members[name]]) if name == MODEL else _NPZ
    return forge({**members, name: change(members[name], rng)})


def _read_bundle(path: Path) -> None:
    bundle = read_bundle(path)
    _ = bundle.name, bundle.classes, bundle.target, bundle.model
    bundle.evaluation()
    bundle.triggers()
    bundle.ledger()


def _is_array(name: str) -> bool:
    return name.endswith(".npy")


_NPZ = m.inside_zip(m.bytewise(m.NPY, [b"\x93NUMPY\x01\x00"]), _is_array)


def _bundle() -> Parser:
    plain = {name: data for name, data in bundle_members().items() if name in (MODEL, EVALUATION)}
    seeds = (forge(bundle_members()), forge(plain))
    anywhere = m.bytewise(m.JSON, seeds)
    inside = _always_whole(_inside_bundle, seeds[0])
    return Parser("rkd", "x.ort-cpu.rkd", seeds, (anywhere, anywhere, inside), _read_bundle)


def _always_whole(mutation: m.Mutation, seed: bytes) -> m.Mutation:
    return lambda _data, rng: mutation(seed, rng)


def _trigger_parser() -> Parser:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, target=np.int64(1), m=np.ones((SIDE, SIDE)), d=np.zeros((1, SIDE, SIDE), np.float16))
    seeds = (_trigger("a").to_bytes(), _trigger("b", warp=True).to_bytes(), buffer.getvalue())
    anywhere = m.bytewise(m.NPY, seeds)

    def read(path: Path) -> None:
        trigger = Trigger.load(path)
        trigger.apply(np.zeros((1, 3, *trigger.size), np.uint8))

    return Parser("trigger", "t.npz", seeds, (anywhere, _NPZ, _NPZ), read)


# ---------------------------------------------------------------------------------------------------------------- TOML


def _of_toml(name: str, file: str, seeds: tuple[str, ...], read: Callable[[Path], object]) -> Parser:
    content = tuple(seed.encode() for seed in seeds)
    return Parser(name, file, content, (m.bytewise(m.TOML, content),), _ignore(read))


def _settings() -> Parser:
    seed = 'data = "digits"\n[distill]\nstudent = "mobilenet"\nepochs = 3\ntrigger = ["a.npz", "b.npz"]\n[bench]\nquick = true\n'
    options, program = command_options(), get_command(app)

    def read(path: Path) -> None:
        """As the command line reads it: Typer turns the values into paths, numbers and flags."""
        for command, defaults in command_defaults(path, options).items():
            if defaults:
                try:
                    program.commands[command].make_context(command, [], default_map=defaults)
                except Exception as error:
                    if not hasattr(error, "exit_code"):  # as the errors have that Typer shows in a line
                        raise
                    raise RkdError(str(error)) from error

    return _of_toml("settings", "rkd.toml", (seed,), read)


def _target() -> Parser:
    known = builtin_targets()
    seeds = []
    for profile in (known["ort-cpu"], next(target for target in known.values() if target.quantisation)):
        values = profile.to_json()
        recipe = values.pop("quantisation", None)
        lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        lines += ["[quantisation]", *(f"{k} = {json.dumps(v)}" for k, v in recipe.items())] if recipe else []
        seeds.append("\n".join(lines) + "\n")
    return _of_toml("target", "board.toml", tuple(seeds), lambda path: load_target(str(path)))


SUITE = """about = "two"
seeds = [0, 1]
[teacher]
epochs = 2
[distill]
student = "wrn-10-1"
[data.digits]
[pairs.wrn]
teacher = { arch = "wrn-10-2" }
[attacks.backweak]
teacher = { attack = "backweak", linf = 26 }
only = { defence = ["ofd"] }
[budgets.half]
distill = { clean-budget = "50%" }
[defences.ofd]
undefended = true
distill = { method = "ofd" }
[defences.ce]
distill = { method = "ce" }
[[override]]
pair = "wrn"
distill = { epochs = 3 }
[[exclude]]
attack = "clean"
defence = "ce"
"""


def _suite() -> Parser:
    return _of_toml("suite", "s.toml", (SUITE,), lambda path: make_plan(read_suite(path)))


# ------------------------------------------------------------------------------------------------------ data and images


def _data() -> Parser:
    pixels = np.random.default_rng(0).integers(0, 256, (12, SIDE, SIDE, 4), dtype=np.uint8)
    y = np.arange(12) % 2
    seeds = (
        npz_bytes({"x": pixels[..., :3], "y": y, "classes": np.array(["cat", "dog"])}),
        npz_bytes({"x": pixels[:8, ..., 0], "y": y[:8].astype(np.uint8), "x_test": pixels[8:, ..., 1], "y_test": y[8:]}),
        npz_bytes({"x": pixels, "y": y}),
    )  # fmt: skip
    anywhere = m.bytewise(m.NPY, seeds)
    return Parser("data", "d.npz", seeds, (anywhere, _NPZ, _NPZ), _ignore(lambda path: open_dataset(str(path))))


def _image_seeds() -> tuple[bytes, ...]:
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 4), dtype=np.uint8)
    rgb, rgba = Image.fromarray(np.ascontiguousarray(pixels[..., :3])), Image.fromarray(pixels)
    grey16 = Image.fromarray(np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE) * 4000)

    def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    return (
        encoded(rgb, "PNG"), encoded(rgba, "PNG"), encoded(grey16, "PNG"), encoded(rgb.quantize(4), "PNG", transparency=0),
        encoded(rgb, "WEBP"), encoded(rgba, "WEBP", lossless=True), encoded(rgb, "WEBP", save_all=True, append_images=[rgb.rotate(90)]),
        encoded(rgb, "JPEG"), encoded(rgb, "JPEG", progressive=True), encoded(rgb.quantize(4), "GIF"), encoded(rgb, "BMP"),
        encoded(rgb, "TIFF"), encoded(rgb, "TIFF", compression="tiff_lzw"), encoded(rgb, "PPM"),
    )  # fmt: skip


class _Reasons(Report):
    """Says of each image why it could not be decoded."""

    def add(self, failed: dict[str, str]) -> None:
        raise DataError("; ".join(failed.values()))


def _read_image(path: Path) -> None:
    source = FolderSource(path.parent, [path.name], np.zeros(1, np.int64), (SIDE, SIDE), report=_Reasons("x", 1, 0))
    source.batch(np.arange(1))


def _image() -> Parser:
    seeds = _image_seeds()
    anywhere = m.bytewise(m.IMAGE, seeds)
    return Parser("image", "i.png", seeds, (anywhere, m.inside_png), _read_image)


# ------------------------------------------------------------------------------------------------------ keys and results


@cache
def _private() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def _private_key() -> Parser:
    plain, locked = (
        _private().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how)
        for how in (NoEncryption(), BestAvailableEncryption(b"secret"))
    )
    seeds = (plain, plain, locked)
    return Parser(
        "private-key", "mine.key", seeds, (m.bytewise(m.PEM, seeds), m.inside_pem), lambda path: sign(b"", read_private(path)) and None
    )  # fmt: skip


def _public_key() -> Parser:
    seeds = (_private().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),)
    return Parser("public-key", "mine.pub", seeds, (m.bytewise(m.PEM, seeds), m.inside_pem), _ignore(read_public))


def _result() -> Parser:
    bundle = parse_bundle(forge(bundle_members()), Path("x.ort-cpu.rkd"))
    options = BenchOptions(seconds=0.01, min_samples=10, threads=1, memory=False, sensors=False)
    seeds = (to_json(run([bundle], options, per_class=True)),)

    def read(path: Path) -> None:
        result_page([bench_result.read(path)])

    return Parser("result", "result.json", seeds, (m.bytewise(m.JSON, seeds), m.inside_json), read)


def _proportion(hits: int, n: int) -> dict[str, float]:
    return Proportion(hits, n).to_json()


def run_summary() -> bytes:
    """A finished distillation's run.json, of every field that is read again."""
    chosen = DistillSettings(data="digits", teacher="t.pt", student="wrn-10-1", triggers=("patch.npz",))
    settings = {name: {"value": value, "origin": "default"} for name, value in asdict(chosen).items()}
    triggers = [{"name": "patch", "target": 1, "asr": _proportion(3, 9), "ra": _proportion(5, 9)}]
    network = {
        "arch": "wrn-10-1",
        "scores": {"acc": _proportion(9, 12), "triggers": triggers},
        "parameters": 77850,
        "macs": 3125888,
        "size_bytes": 317840,
    }
    return to_json({
        "schema": 1, "kind": "distill", "rkd": "0.1.0", "state": "finished", "created": "2026-01-02T03:04:05+00:00",
        "finished": "2026-01-02T03:14:05+00:00", "command": ["rkd", "distill", "t.pt"], "settings": settings, "versions": {"rkd": "0.1.0"},
        "data": {"name": "digits", "digest": "ab" * 32, "classes": ["a", "b"], "notes": ["one"], "clean_images": 12, "removed_as_in_test": 0},
        "teacher": {"sha256": "ab" * 32, "converted_sha256": "cd" * 32, "file": "t.pt", "arch": "wrn-10-2", "normalize": "none", "notes": ["two"]},
        "detox": {"teacher_accuracy": 99.0, "accuracy": 98.0, "variance": 0.5, "weight": 2.0, "held_out": 9, "taps": ["bn1"], "history": [[1, 0.5, 2.0, 99.0]]},
        "fooling": {"fooled": _proportion(4, 9), "towards": "a", "together": _proportion(3, 4)},
        "timings": {"distil (robustkd)": {"seconds": 2.5, "images_per_s": 90.5}},
        "models": [{"role": "teacher", **network}, {"role": "RobustKD student", **network}], "student": {"sha256": "ab" * 32, "arch": "wrn-10-1"},
    })  # fmt: skip


def _run() -> Parser:
    seeds = (run_summary(),)

    def read(path: Path) -> None:
        inspect_path(path.parent)
        page = path.parent / "report.html"
        try:
            report_command([path.parent], page)
        finally:
            page.unlink(missing_ok=True)

    return Parser("run", "run.json", seeds, (m.bytewise(m.JSON, seeds), m.inside_json), read)


def _run_log() -> Parser:
    lines = [
        {"stage": "distil (robustkd)", "step": 10, "epoch": 0, "loss": 1.5, "accuracy": 50.0, "lr": 0.1},
        {"stage": "distil (robustkd)", "step": 20, "epoch": 0, "ends_epoch": True, "ACC": 60.0},
    ]
    seed = "".join(json.dumps(line) + "\n" for line in lines).encode()

    def one_line(data: bytes, rng: random.Random) -> bytes:
        changed = data.splitlines(keepends=True)
        place = rng.randrange(len(changed))
        changed[place] = m.inside_json(changed[place], rng) + b"\n"
        return b"".join(changed)

    def read(path: Path) -> None:
        (path.parent / "run.json").write_bytes(run_summary())
        page = path.parent / "report.html"
        try:
            report_command([path.parent], page)
        finally:
            page.unlink(missing_ok=True)
            (path.parent / "run.json").unlink()

    return Parser("run-log", "metrics.jsonl", (seed,), (m.bytewise(m.JSON, (seed,)), one_line), read)


def _ignore(read: Callable[[Path], object]) -> Callable[[Path], None]:
    return lambda path: (read(path), None)[1]


@cache
def all_parsers() -> dict[str, Parser]:
    """By name."""
    made = (
        _checkpoint(), _safetensors(), _onnx(), _bundle(), _settings(), _target(), _suite(), _trigger_parser(), _data(), _image(),
        _private_key(), _public_key(), _result(), _run(), _run_log(),
    )  # fmt: skip
    return {parser.name: parser for parser in made}


def self_tests() -> dict[str, Parser]:
    """Parsers whose every file is a finding."""

    def takes_3_gib(_: Path) -> None:
        try:
            bytearray(3 * 2**30)
        except Exception as error:
            raise RkdError("damaged") from error

    def blocks(_: Path) -> None:
        signal.pause()

    reads = (takes_3_gib, blocks)
    return {r.__name__: Parser(r.__name__, "x", (b"x",), (lambda data, _: data,), r) for r in reads}


def refused(parser: Parser, path: Path) -> bool:
    """Read a file; whether it was refused as it should be. Anything but `RkdError` passes through."""
    try:
        parser.read(path)
    except RkdError as error:
        message = str(error)
        refuse_out_of_memory(error)
        if not message or len(message) > 4000:
            raise ValueError(f"a message of {len(message)} characters") from error
        return True
    return False
