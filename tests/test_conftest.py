"""Tests that skip for want of something installable fail where RKD_REQUIRE_ALL=1 says that all of it is there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SKIPS = """
import pytest


@pytest.mark.skipif(True, reason="needs Chromium: apt-get install chromium")
def test_browser():
    pass


@pytest.mark.skipif(True, reason="needs playwright and axe-playwright-python: make setup")
def test_driver():
    pass


@pytest.fixture
def server():
    pytest.skip("sshd does not start here")


def test_server(server):
    pass


def test_builder():
    pytest.importorskip("tensorrt_rtx_that_is_nowhere")


@pytest.mark.slow
def test_slow():
    pass


@pytest.mark.gpu
def test_gpu():
    pass


def test_ray():
    pytest.skip("ray is not installed: make test-ray")


def test_data(real_data):
    pass


def test_root():
    pytest.skip("root may write anything")
"""


@pytest.mark.parametrize(("required", "counts"), [("1", "1 failed, 5 skipped, 3 errors"), ("", "9 skipped")])
def test_only_what_can_be_installed_is_required(tmp_path: Path, required: str, counts: str) -> None:
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_skips.py").write_text(SKIPS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow: a\n    gpu: b\n")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RKD_", "PYTEST_"))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(
        command, env={**kept, "RKD_REQUIRE_ALL": required}, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert counts in done.stdout
    assert ("skipped although RKD_REQUIRE_ALL=1: sshd does not start here" in done.stdout) == bool(required)
