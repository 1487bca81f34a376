"""Children that cost a tenth of a second: forked from a server that has imported torch and rkd once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

PRELOADED = [
    "rkd.cli",
    "rkd.distill.session",
    "rkd.reporting",
    "torch._dynamo",
    "torchvision.models",
    "torch.utils.flop_counter",
]

# What a child runs. `fault` names one of rkd.files.os's functions and the call of it at which the process kills itself.
CHILD = """
import functools, os, signal, sys
os.chdir(folder)
descriptor = os.open("stderr.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
os.dup2(descriptor, 1)
os.dup2(descriptor, 2)
sys.argv = ["rkd", *arguments]
from rkd import files
from rkd.detox import DetoxRecipe
from rkd.distill import session
session.DetoxRecipe = functools.partial(DetoxRecipe, steps=steps, check_every=2)
if fault is not None:
    name, left = fault
    real, calls = getattr(os, name), iter(range(left))
    class Faulty:
        def __getattr__(self, attribute):
            return getattr(os, attribute)
    def dies(*args):
        if next(calls, None) is None:
            if name == "write":
                real(args[0], bytes(args[1])[:len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)
    files.os = Faulty()
    setattr(files.os, name, dies)
from rkd.cli import app
app(arguments)
"""

Start = Callable[..., BaseProcess]


@pytest.fixture(scope="session")
def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@pytest.fixture
def start(_context: multiprocessing.context.ForkServerContext) -> Iterator[Start]:
    """Start `rkd ARGUMENTS` in `folder`; what it prints goes to stderr.txt there."""
    children: list[BaseProcess] = []

    def start(folder: Path, *arguments: object, steps: int = 8, fault: tuple[str, int] | None = None) -> BaseProcess:
        names = {"folder": str(folder), "arguments": [str(a) for a in arguments], "steps": steps, "fault": fault}
        child = _context.Process(target=exec, args=(CHILD, names))
        child.start()
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.join()
        child.close()
