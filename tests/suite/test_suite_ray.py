"""`rkd suite --launcher ray` on a cluster of several workers (needs the extra `ray`: `make test-ray`)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rkd.cli import app
from rkd.errors import install_hint

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]  # a cluster starts slowly on a busy machine

CLUSTER = """
import sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 * 2**20})
for _ in range(2):
    cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


def needs_ray() -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed: make test-ray")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A local cluster: a head without CPUs and two workers of one CPU each."""
    needs_ray()
    root = str(Path(__file__).parents[2])
    patient = {"RAY_raylet_start_wait_time_s": "240", "RAY_USAGE_STATS_ENABLED": "0"}  # also on a busy machine
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((root, os.environ.get("PYTHONPATH", ""))), **patient}
    command = [sys.executable, "-c", CLUSTER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        assert ":" in line, "the cluster did not start"
        yield line
        process.stdin.close()
        process.wait(60)


def suite(folder: Path, address: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "RAY_ADDRESS": address, "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "rkd", "suite", "tiny.toml", "--launcher", "ray", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_cells_run_on_both_workers_and_give_what_they_give_here(
    folder: Path, address: str, tiny: str, finished: Path
) -> None:
    (folder / "tiny.toml").write_text(tiny)
    with suite(folder, address) as process:
        out, said = process.communicate(timeout=800)
    assert process.returncode == 0, said
    assert "2 at once" in said
    cells = sorted((finished / "results" / "tiny" / "cells").iterdir())
    assert len(cells) == 4
    for cell in cells:
        here, there = json.loads(cell.read_text()), json.loads((folder / "results/tiny/cells" / cell.name).read_text())
        for part in ("student", "control", "excess_asr", "settings", "trigger"):
            assert there[part] == here[part], part
    assert "of 1 attacked cases transfer" in out


def test_stopped_in_the_middle_the_cells_save_and_the_next_call_goes_on(folder: Path, address: str, tiny: str) -> None:
    (folder / "tiny.toml").write_text(
        tiny.replace('method = "ofd" }', 'method = "ofd", epochs = 400, checkpoint-every = 1 }')
    )
    student = folder / "runs/tiny/cells/stripes/tiny/clean/full/ofd/s0"
    with suite(folder, address, "--only", "*/clean/*/ofd/*") as process:
        while not list(student.glob("checkpoints/0*")):
            try:
                process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
            raise AssertionError(process.communicate())
        process.terminate()
        _, said = process.communicate(timeout=400)
    assert process.returncode == 143, said
    assert json.loads((student / "run.json").read_text())["state"] == "running"
    log = (folder / "runs/tiny/logs/student__stripes__tiny__clean__full__ofd__s0.log").read_text()
    assert "stopped and saved at step" in log


def test_a_job_that_no_machine_of_the_cluster_can_hold_is_refused(folder: Path, address: str, tiny: str) -> None:
    (folder / "tiny.toml").write_text(
        tiny.replace("[distill]", "[distill]\nthreads = 2").replace("[teacher]", "[teacher]\nthreads = 2")
    )
    with suite(folder, address) as process:
        _, said = process.communicate(timeout=400)
    assert process.returncode == 1
    assert "a job needs 2 CPUs, and the largest machine of the Ray cluster has 1" in " ".join(said.split())


def test_without_a_cluster_it_says_how_to_start_one(folder: Path, tiny: str) -> None:
    needs_ray()
    (folder / "tiny.toml").write_text(tiny)
    with suite(folder, "127.0.0.1:1") as process:
        _, said = process.communicate(timeout=400)
    assert process.returncode == 1
    assert "ray start --head" in said.strip().splitlines()[-1]
    assert "Traceback" not in said


def test_without_ray_it_says_what_to_install(folder: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    (folder / "tiny.toml").write_text(tiny)
    done = CliRunner().invoke(app, ["suite", "tiny.toml", "--launcher", "ray"])
    assert done.exit_code == 1
    assert done.stderr == f"rkd: ray is not installed; install it with: {install_hint('ray')}\n"
