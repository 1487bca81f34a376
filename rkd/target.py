"""A target profile: which runtime a board has and what it wants (no torch).

A profile is a TOML file. The built-in ones are in `targets/`; a file of your own works the same way:

    rkd export --target my-board.toml

Versions, compute capabilities, memory, batch sizes, budgets and the quantisation recipe are data here, not code.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from rkd.errors import ConfigError, TargetError
from rkd.toml import read_toml, unknown_key

Runtime = Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]
Precision = Literal["fp32", "fp16", "int8"]
Activations = Literal["int8", "uint8"]
Bias = Literal["float", "int32"]
Rest = Literal["fp32", "fp16"]

CPU_PROVIDER, TENSORRT_PROVIDER = "CPUExecutionProvider", "TensorrtExecutionProvider"
PROVIDERS = (
    CPU_PROVIDER, "CUDAExecutionProvider", TENSORRT_PROVIDER, "CANNExecutionProvider",
    "CoreMLExecutionProvider", "DmlExecutionProvider", "DnnlExecutionProvider", "MIGraphXExecutionProvider",
    "NnapiExecutionProvider", "OpenVINOExecutionProvider", "QNNExecutionProvider", "RknpuExecutionProvider",
    "VitisAIExecutionProvider", "XnnpackExecutionProvider",
)  # fmt: skip
FLOORS: dict[Runtime, str] = {"onnxruntime": "1.20", "tensorrt": "10.3", "tensorrt-rtx": "1.2"}
"""The oldest release of each runtime that rkd serves."""
CEILINGS: dict[Runtime, str] = {"tensorrt": "12", "tensorrt-rtx": "2"}
"""The first release of a runtime that rkd does not serve: nobody has seen it, and its calls may be others."""
OPSETS: dict[Runtime, tuple[tuple[str, int], ...]] = {
    "onnxruntime": (("1.20", 21), ("1.32", 24)),  # ONNX Runtime's compatibility table; 1.32 ran
    "tensorrt": (("10.3", 20), ("10.15", 24)),  # 20 is what was parsed; 24 from NVIDIA's list of operators
    "tensorrt-rtx": (("1.2", 20),),
}
"""The newest opset that is known to work, from which release of a runtime on."""
OPERATORS = ("Add", "Conv", "Gemm", "Mul")  # that can be quantised
_WEIGHTED = frozenset({"Conv", "Gemm"})
_VERSION = re.compile(r"\d{1,3}(\.\d{1,3}){0,3}")
_CAPABILITY = re.compile(r"\d{1,2}\.\d")
_CALIBRATOR = re.compile(r"minmax|mse|percentile-9\d(\.\d{1,4})?")

T = TypeVar("T")


@dataclass(frozen=True)
class Quantisation:
    """How a graph becomes INT8: one recipe for each family of runtimes.

    Attributes:
        activations: `int8`, symmetric, as TensorRT wants them; `uint8`, with a zero point, as CPUs compute fast.
        weight_bits: 8, or 7 where the CPU's multiply-add saturates at 16 bits (x86 without VNNI).
        bias: `float`, or `int32` as ONNX Runtime's CPU kernels want it (TensorRT's parser refuses it).
        operators: that are quantised; Conv and Gemm with their weights, channel by channel.
        rest: precision of everything else and of the layers that INT8 would cost accuracy.
        calibrators: that are tried; measured accuracy decides: `minmax`, `mse`, `percentile-99.99`.
        images: from the training side, for the ranges of activations; as many again decide.
        min_agreement: percent of these deciding images on which the INT8 file must say what the student says; layers
            are kept in the higher precision until it does.
    """

    activations: Activations
    weight_bits: int
    bias: Bias
    operators: tuple[str, ...]
    rest: Rest
    calibrators: tuple[str, ...]
    images: int
    min_agreement: float

    def problem(self, runtime: Runtime, provider: str, opset: int) -> str | None:
        """What is impossible about the recipe, for this runtime; None if nothing is."""
        if self.weight_bits not in (7, 8):
            return f"weight_bits {self.weight_bits}: expected 8, or 7 for CPUs whose multiply-add saturates"
        if problem := self._listed_problem():
            return problem
        if not 16 <= self.images <= 16384:
            return f"images {self.images}: expected 16 to 16384"
        if not 0 <= self.min_agreement <= 100:
            return f"min_agreement {self.min_agreement:g}: expected 0 to 100 percent"
        if runtime != "onnxruntime" or provider == TENSORRT_PROVIDER:
            if self.activations != "int8" or self.bias != "float" or self.weight_bits != 8:
                return (
                    f"{provider or runtime} takes symmetric int8 activations, 8-bit weights and a float bias only; "
                    'set activations = "int8", weight_bits = 8, bias = "float"'
                )
        elif provider == CPU_PROVIDER and self.rest == "fp16":
            return 'rest = "fp16" on a CPU runs at fp32\'s speed at best; use fp32'
        if self.rest == "fp16" and opset < 19:
            return f"opset {opset}: FP16 scales of Q/DQ came with 19"
        return None

    def _listed_problem(self) -> str | None:
        """What is impossible about the operators and the calibrators."""
        unknown = sorted(set(self.operators) - set(OPERATORS))
        if unknown or not _WEIGHTED & set(self.operators):
            return f"operators {list(self.operators)}: expected Conv, Gemm or both, and perhaps {', '.join(OPERATORS)}"
        wrong = [name for name in self.calibrators if not _CALIBRATOR.fullmatch(name)]
        if wrong or not self.calibrators:
            return f"calibrators {list(self.calibrators)}: expected minmax, mse or percentile-99.99 (any share from 90)"
        for key in ("operators", "calibrators"):
            names = getattr(self, key)
            if twice := [name for name in names if names.count(name) > 1]:
                return f"{key} {list(names)}: {twice[0]} is there twice; leave one out"
        if self.bias == "float" and (ignored := sorted(set(self.operators) - _WEIGHTED)):
            return (
                f"operators {list(self.operators)}: with a float bias, as TensorRT wants it, only Conv and Gemm are "
                f"quantised; leave out {', '.join(ignored)}"
            )
        return None


@dataclass(frozen=True)
class Target:
    """One target.

    Attributes:
        name: letters, digits and `-`; it becomes part of the bundle's file name.
        summary: one line for people.
        board: what it runs on.
        runtime: `onnxruntime`, `tensorrt` (Jetson, data centre), or `tensorrt-rtx` (GeForce and RTX).
        precision: of weights and activations in the ONNX file.
        provider: ONNX Runtime's execution provider; empty for TensorRT.
        opset: ONNX operator set, asserted after the export; one that min_version of the runtime reads.
        max_batch: batches from 1 to this many are allowed; 1 fixes the batch, and no other size can be fixed.
        needs: what must be on the board, for people.
        acc_budget: points of ACC that the file may lose against the student; more fails the export.
        asr_budget: points of ASR that it may gain under any trigger; more fails the export.
        min_version, below_version: of the runtime, as `10.3`; empty for any that rkd serves (`FLOORS`, `CEILINGS`), but
            TensorRT needs a min_version.
        compute: CUDA compute capabilities that the profile is for, as `8.7`; empty for any.
        workspace_mib: TensorRT's memory pool limit while building; 0 leaves its default.
        opt_batch: the batch that TensorRT tunes its kernels for.
        quantisation: the recipe, for precision int8.
    """

    name: str
    summary: str
    board: str
    runtime: Runtime
    precision: Precision
    provider: str
    opset: int
    max_batch: int
    needs: str
    acc_budget: float = 1.0
    asr_budget: float = 1.0
    min_version: str = ""
    below_version: str = ""
    compute: tuple[str, ...] = ()
    workspace_mib: int = 0
    opt_batch: int = 1
    quantisation: Quantisation | None = None

    @property
    def on_cpu(self) -> bool:
        """Whether it computes on a CPU."""
        return self.provider == CPU_PROVIDER

    def to_json(self) -> dict[str, Any]:
        """The profile as it goes into a bundle: lists for tuples, no key for what is absent."""
        values = dataclasses.asdict(self)
        if self.quantisation is None:
            del values["quantisation"]
        return {key: _plain(value) for key, value in values.items()}

    @classmethod
    def from_mapping(cls, values: dict[str, Any], origin: str) -> Target:
        """Check and take over a profile; `origin` names it in errors.

        Raises:
            TargetError: unknown or missing keys, wrong types, impossible values or combinations.
        """
        values = dict(values)
        recipe = values.pop("quantisation", None)
        if recipe is not None and not isinstance(recipe, dict):
            raise TargetError(f"{origin}: quantisation is {recipe!r}, expected a table [quantisation]")
        target = _typed(cls, values, origin)
        if recipe is not None:
            quantisation = _typed(Quantisation, recipe, f"{origin}: quantisation")
            target = dataclasses.replace(target, quantisation=quantisation)
        problem = target.problem()
        if problem:
            raise TargetError(f"{origin}: {problem}")
        return target

    def problem(self) -> str | None:
        """What is impossible about it; None if nothing is."""
        found = self._value_problem() or self._combination_problem()
        if found is None and self.quantisation is not None:
            found = self.quantisation.problem(self.runtime, self.provider, self.opset)
            found = found and f"quantisation: {found}"
        return found

    def _value_problem(self) -> str | None:
        """A value that is impossible by itself."""
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,63}", self.name):
            return f"name {self.name!r}: use 1 to 64 lower-case letters, digits and '-'"
        if not 18 <= self.opset <= 24:
            return f"opset {self.opset}: the exporter writes 18 to 24"
        if not 1 <= self.max_batch <= 4096:
            return f"max_batch {self.max_batch}: expected 1 to 4096"
        if not 1 <= self.opt_batch <= self.max_batch:
            return f"opt_batch {self.opt_batch}: expected 1 to max_batch, which is {self.max_batch}"
        if not 0 <= self.workspace_mib <= 2**20:
            return f"workspace_mib {self.workspace_mib}: expected 0 to {2**20}"
        for key in ("acc_budget", "asr_budget"):
            if not 0 <= getattr(self, key) <= 100:
                return f"{key} {getattr(self, key):g}: expected 0 to 100 points"
        for key in ("min_version", "below_version"):
            if getattr(self, key) and not _VERSION.fullmatch(getattr(self, key)):
                return f"{key} {getattr(self, key)!r}: expected numbers such as '10.3'"
        if wrong := [text for text in self.compute if not _CAPABILITY.fullmatch(text)]:
            return f"compute {wrong[0]!r}: expected capabilities such as '8.7'"
        return None

    def _combination_problem(self) -> str | None:
        """Values that are impossible together."""
        if (self.runtime == "onnxruntime") != bool(self.provider):
            return (
                f"runtime {self.runtime} with provider {self.provider!r}: "
                "onnxruntime needs one (e.g. CPUExecutionProvider), tensorrt has none"
            )
        if self.provider and self.provider not in PROVIDERS:
            close = difflib.get_close_matches(self.provider, PROVIDERS, 1)
            hint = f"did you mean {close[0]}?" if close else f"expected {', '.join(PROVIDERS)}"
            return f"provider {self.provider!r} is none of ONNX Runtime's; {hint}"
        if self.on_cpu and self.precision == "fp16":
            return "precision fp16 on a CPU runs at fp32's speed at best; use fp32"
        if self.on_cpu and self.compute:
            return "compute is for CUDA devices, the provider is the CPU's; leave it out"
        if self.runtime == "onnxruntime" and self.workspace_mib:
            return "workspace_mib is TensorRT's, the runtime is onnxruntime; leave it out"
        if self.runtime == "onnxruntime" and self.opt_batch != 1:
            return "opt_batch is TensorRT's, the runtime is onnxruntime; leave it out"
        if self.min_version and self.below_version and not version(self.min_version) < version(self.below_version):
            return f"min_version {self.min_version} is not below below_version {self.below_version}"
        if (self.precision == "int8") != (self.quantisation is not None):
            return (
                f"precision {self.precision} with{'' if self.quantisation else 'out'} a table [quantisation]: "
                "int8 needs the recipe, the others have none"
            )
        return self._release_problem()

    def _release_problem(self) -> str | None:
        """A release of the runtime that rkd does not serve, or that does not read the opset."""
        floor = FLOORS[self.runtime]
        least = self.min_version or ("" if self.runtime != "onnxruntime" else floor)
        if version(least) < version(floor):
            return (
                f"min_version {self.min_version!r}: {self.runtime} is served from {floor} on; set {floor} or newer, or "
                "take ort-cpu for a board with an older one"
            )
        ceiling = CEILINGS.get(self.runtime, "")
        if ceiling and version(least) >= version(ceiling):
            return f"min_version {least!r}: {self.runtime} is served below {ceiling}; set an older one"
        releases = OPSETS[self.runtime]
        newest = max(opset for release, opset in releases if version(release) <= version(least))
        if self.opset > newest:
            later = next((release for release, opset in releases if opset >= self.opset), "")
            hint = f"set opset = {newest} or older" + (f', or min_version = "{later}"' if later else "")
            return f"opset {self.opset}: {self.runtime} {least} is known to read up to {newest}; {hint}"
        return None


def version(text: str) -> tuple[int, ...]:
    """`10.3.0.26` as numbers that compare; what follows the numbers is ignored."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else (0,)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


@cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    return get_type_hints(cls)


def _typed(cls: type[T], values: dict[str, Any], origin: str) -> T:
    """A dataclass from a mapping; every key known and of its type, none missing."""
    hints = _hints(cast("Any", cls))
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise TargetError(f"{origin}: {unknown_key(key, fields)}")
    found = {}
    for key, field in fields.items():
        if key in values:
            found[key] = _value(values[key], hints[key], f"{origin}: {key}")
        elif field.default is dataclasses.MISSING:
            raise TargetError(f"{origin}: {key!r} is missing")
    return cls(**found)


def _value(value: Any, hint: Any, what: str) -> Any:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise TargetError(f"{what} is {value!r}, expected one of {', '.join(get_args(hint))}")
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise TargetError(f"{what} is {value!r}, expected a list of texts")
        return tuple(value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise TargetError(f"{what} is {value!r}, expected {hint.__name__}")
    return value


def builtin_targets() -> dict[str, Target]:
    """The built-in targets by name, sorted."""
    found = {}
    for item in sorted(resources.files("rkd.targets").iterdir(), key=lambda item: item.name.removesuffix(".toml")):
        if item.name.endswith(".toml"):
            with resources.as_file(item) as path:
                target = _read(path)
            found[target.name] = target
    return found


def load_target(name: str) -> Target:
    """A built-in target by its name, or the profile in a file whose name ends in `.toml`.

    Raises:
        TargetError: no such target, or a profile that is wrong.
        StorageError: the file cannot be read.
    """
    if name.endswith(".toml"):
        return _read(Path(name))
    known = builtin_targets()
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]}?" if close else f"expected {', '.join(known)} or a .toml file"
        raise TargetError(f"no target is called {name!r}; {hint}")
    return known[name]


def _read(path: Path) -> Target:
    try:
        values = read_toml(path)
    except ConfigError as error:
        raise TargetError(str(error)) from error
    return Target.from_mapping(values, str(path))
