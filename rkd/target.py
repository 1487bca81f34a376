"""A target profile: which runtime a board has and what it wants (no torch).

A profile is a TOML file. The built-in ones are in `targets/`; a file of your own works the same way:

    rkd export --target my-board.toml
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from rkd.errors import ConfigError, TargetError
from rkd.toml import read_toml, unknown_key

Runtime = Literal["onnxruntime", "tensorrt"]
Precision = Literal["fp32", "fp16"]


@dataclass(frozen=True)
class Target:
    """One target.

    Attributes:
        name: letters, digits and `-`; it becomes part of the bundle's file name.
        summary: one line for people.
        board: what it runs on.
        runtime: `onnxruntime` or `tensorrt`.
        precision: of weights and activations in the ONNX file.
        provider: ONNX Runtime's execution provider; empty for TensorRT.
        opset: ONNX operator set, asserted after the export.
        max_batch: batches from 1 to this many are allowed; 1 fixes the batch.
        needs: what must be on the board, for people.
        workspace_mib: TensorRT's memory pool limit while building; 0 leaves its default.
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
    workspace_mib: int = 0

    def to_json(self) -> dict[str, Any]:
        """The profile as it goes into a bundle."""
        return dataclasses.asdict(self)

    @classmethod
    def from_mapping(cls, values: dict[str, Any], origin: str) -> Target:
        """Check and take over a profile; `origin` names it in errors.

        Raises:
            TargetError: unknown or missing keys, wrong types, impossible values or combinations.
        """
        hints = get_type_hints(cls)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key in values:
            if key not in fields:
                raise TargetError(f"{origin}: {unknown_key(key, fields)}")
        for key, field in fields.items():
            if key not in values:
                if field.default is dataclasses.MISSING:
                    raise TargetError(f"{origin}: {key!r} is missing")
                continue
            choices = get_args(hints[key])
            if choices and values[key] not in choices:
                raise TargetError(f"{origin}: {key} is {values[key]!r}, expected one of {', '.join(choices)}")
            kind = str if choices else hints[key]
            if type(values[key]) is not kind:
                raise TargetError(f"{origin}: {key} is {values[key]!r}, expected {kind.__name__}")
        target = cls(**values)
        target._check(origin)
        return target

    def _check(self, origin: str) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,63}", self.name):
            raise TargetError(f"{origin}: name {self.name!r}: use 1 to 64 lower-case letters, digits and '-'")
        if not 18 <= self.opset <= 24:
            raise TargetError(f"{origin}: opset {self.opset}: the exporter writes 18 to 24")
        if not 1 <= self.max_batch <= 4096:
            raise TargetError(f"{origin}: max_batch {self.max_batch}: expected 1 to 4096")
        if (self.runtime == "onnxruntime") != bool(self.provider):
            raise TargetError(
                f"{origin}: runtime {self.runtime} with provider {self.provider!r}: "
                "onnxruntime needs one (e.g. CPUExecutionProvider), tensorrt has none"
            )
        if self.provider == "CPUExecutionProvider" and self.precision == "fp16":
            raise TargetError(f"{origin}: precision fp16 on a CPU runs at fp32's speed at best; use fp32")
        if not 0 <= self.workspace_mib <= 2**20:
            raise TargetError(f"{origin}: workspace_mib {self.workspace_mib}: expected 0 to {2**20}")


def builtin_targets() -> dict[str, Target]:
    """The built-in targets by name, sorted."""
    found = {}
    for item in sorted(resources.files("rkd.targets").iterdir(), key=lambda item: item.name):
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
