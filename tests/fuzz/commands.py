"""The commands that read each kind of file, and what must come of a file that they must refuse."""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import parsers
import torch
import typer.testing
from limits import CPU_SECONDS, MEMORY_BYTES, OUT_OF_MEMORY, Ended, forked
from parsers import Parser

import rkd.bench.command
import rkd.cli
import rkd.distill.session
import rkd.inspection
import rkd.reporting
import rkd.suite.command
import rkd.verification
from rkd.models import build
from rkd.network import Network, Normalisation
from rkd.npz import npz_bytes

SIDE = 16  # of the images of a teacher that is right about every one of them

Files = dict[str, bytes]


@dataclass(frozen=True)
class Command:
    """A command line, and the files that it is run beside.

    Attributes:
        parser: the parser whose mutants it is given.
        arguments: after `rkd`.
        lay_out: from a mutant, the files of the working folder.
        chatty: a native decoder may print lines of its own before rkd's.
    """

    parser: str
    arguments: tuple[str, ...]
    lay_out: Callable[[bytes], Files]
    chatty: bool = False

    @property
    def name(self) -> str:
        """`KIND: rkd COMMAND ...`."""
        return f"{self.parser}: rkd {' '.join(self.arguments)}"


def all_commands() -> list[Command]:
    """Every command that reads files from outside, a kind of file at a time."""
    known = parsers.all_parsers()

    def reads(parser: str, *arguments: str, beside: Callable[[], Files] = dict, chatty: bool = False) -> Command:
        file = known[parser].file
        return Command(parser, arguments, lambda data: {**beside(), file: data}, chatty)

    def in_a_bundle(data: bytes) -> Files:
        return {"x.ort-cpu.rkd": parsers.forge(parsers.bundle_members(data))}

    def in_a_class_folder(data: bytes) -> Files:
        good = parsers.all_parsers()["image"].seeds
        return {**_teacher(), "photos/a/0.png": data, "photos/a/1.png": good[0], "photos/b/2.png": good[1], "photos/b/3.png": good[3]}  # fmt: skip

    # One thread: children of a process whose OpenMP has threads would wait for those.
    distill = ("distill", "--student", "wrn-10-1", "--epochs", "1", "--device", "cpu", "--threads", "1")
    on_data, of_teacher = (*distill, "--data", "teacher.npz"), (*distill, "t.safetensors")
    inspected = ("pt", "safetensors", "rkd", "target", "trigger", "result")
    return [
        reads("pt", *on_data, "t.pt", beside=_teacher),
        reads("safetensors", *on_data, "t.safetensors", beside=_teacher),
        reads("rkd", "bench", "--quick", "x.ort-cpu.rkd"),
        reads("rkd", "verify", "x.ort-cpu.rkd"),
        Command("onnx", ("bench", "--quick", "x.ort-cpu.rkd"), in_a_bundle),
        reads("settings", "targets"),
        reads("target", "export", "--target", "board.toml"),
        reads("suite", "suite", "--dry-run", "s.toml"),
        reads("trigger", *of_teacher, "--data", "teacher.npz", "--trigger", "t.npz", beside=_teacher),
        reads("data", *of_teacher, "--data", "d.npz", beside=_teacher),
        Command("image", (*of_teacher, "--data", "photos"), in_a_class_folder, chatty=True),
        reads("private-key", "export", "--sign", "mine.key"),
        reads("public-key", "verify", "x.ort-cpu.rkd", "--pubkey", "mine.pub", beside=_bundle),
        reads("result", "report", "result.json"),
        reads("run", "report", "."),
        reads("run", "inspect", "."),
        reads("run-log", "report", ".", beside=lambda: {"run.json": parsers.run_summary()}),
        *(reads(parser, "inspect", known[parser].file) for parser in inspected),
    ]


def warm_up(commands: list[Command]) -> None:
    """Run each command in this process on what is no file of its kind, so that children find imported what it needs."""
    for command in commands:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            _write(Path(folder), command.lay_out(b"x\n"))
            os.chdir(folder)
            done = typer.testing.CliRunner().invoke(rkd.cli.app, list(command.arguments))
            os.chdir("..")
            if done.exit_code != 1:
                raise AssertionError(f"{command.name}: exit {done.exit_code}: {done.output}")


@cache
def _bundle() -> Files:
    return {"x.ort-cpu.rkd": parsers.all_parsers()["rkd"].seeds[0]}


@cache
def _teacher() -> Files:
    """A teacher and the images on which it is always right, because their labels are its answers."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = Network(build("wrn-10-1", 2, (SIDE, SIDE)).eval(), "wrn-10-1", ("a", "b"), (SIDE, SIDE), Normalisation())
    images = np.random.default_rng(0).integers(0, 256, (24, 3, SIDE, SIDE), dtype=np.uint8)
    logits = network.predictor(torch.device("cpu"))(images)
    labels = (logits[:, 1] - logits[:, 0] > np.median(logits[:, 1] - logits[:, 0])).astype(np.int64)
    last = [p for p in network.module.parameters() if p.shape == (2,)][-1]
    with torch.no_grad():
        last[1] -= float(np.median(logits[:, 1] - logits[:, 0]))
    pixels = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    data = npz_bytes({"x": pixels, "y": labels, "classes": np.array(["a", "b"])})
    return {"t.safetensors": network.to_bytes(), "teacher.npz": data}


def check_command(command: Command, data: bytes) -> tuple[str, Ended] | None:
    """What is wrong about how `command` refuses `data` (empty where nothing is); None where it need not refuse it.

    The working folder must be empty, and is so again.
    """
    parser = parsers.all_parsers()[command.parser]
    try:
        if not _must_be_refused(parser, data):
            return None
    except Exception as error:
        return f"in process: {type(error).__name__}: {str(error)[:300]}", Ended(b"", 0, 0, 0.0)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        laid_out = command.lay_out(data)
        _write(Path(folder), laid_out)
        ended = forked(lambda: _rkd(Path(folder), command.arguments))
        found = {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}
    return _problem(ended, found - set(laid_out), chatty=command.chatty), ended


def _write(folder: Path, files: Files) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _must_be_refused(parser: Parser, data: bytes) -> bool:
    path = Path(parser.file)
    path.write_bytes(data)
    try:
        return parsers.refused(parser, path)
    finally:
        path.unlink()


def _rkd(folder: Path, arguments: tuple[str, ...]) -> bytes:
    """In a forked child: `rkd ARGUMENTS` in `folder`; what it printed, unless it ended otherwise than by exit 1."""
    with tempfile.TemporaryFile() as said:
        for descriptor in (1, 2):
            os.dup2(said.fileno(), descriptor)
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(io.FileIO(descriptor, "w", closefd=False), write_through=True) for descriptor in (1, 2)
        )
        os.chdir(folder)
        sys.argv = ["rkd", *arguments]
        try:
            rkd.cli.main()
            code: object = 0
        except SystemExit as end:
            code = end.code
        said.seek(0)
        if code != 1:
            raise AssertionError(f"exit {code}: {said.read()[-300:]!r}")
        return said.read()


def _problem(ended: Ended, left: set[str], *, chatty: bool) -> str:
    said = ended.output.decode(errors="replace")
    lines = said.splitlines()
    if OUT_OF_MEMORY.search(said):
        return f"ran out of memory: {said[-300:]!r}"
    if ended.status != 0:
        return f"status {ended.status}: {said[-600:]!r}"
    if not lines or not said.endswith("\n") or "internal error" in said or "Traceback" in said:
        return f"said {said[-300:]!r}"
    if not lines[-1].startswith("rkd: ") or (len(lines) > 1 and not chatty) or not lines[-1].isprintable():
        return f"said {said[-300:]!r}"
    if left or ended.cpu_seconds > CPU_SECONDS or ended.peak_bytes > MEMORY_BYTES:
        return f"left {sorted(left)}, took {ended.cpu_seconds:.1f} s and {ended.peak_bytes / 2**20:.0f} MiB"
    return ""
