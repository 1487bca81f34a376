"""Run jobs on a Ray cluster that is there already (extra `ray`; RAY_ADDRESS names it).

Every worker needs this rkd and must see the suite's folder, the data sets and the logs under the same paths: a shared
file system. Whether it does is looked at before a job is begun there.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import signal
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rkd.errors import MissingExtraError, RuntimeUnavailableError
from rkd.suite.launch import Leash, Outcome, Task, run_task
from rkd.suite.results import code_version

_MIB = 2**20
_KNOCK_S = 10.0


def work_remotely(task: Task, marker: str, code: Mapping[str, Any]) -> Outcome:
    """What a worker does: look around, then run the job to its end in a process of its own.

    Cancelling the task interrupts it here; the job is then asked to save, and waited for.

    Args:
        task: the job.
        marker: a file of the suite that the worker must see.
        code: of the rkd that sent it, as `rkd.suite.results.code_version` has it.
    """
    host = os.uname().nodename
    mine = code_version()
    if (mine["rkd"], mine["sources"]) != (code["rkd"], code["sources"]):
        here, there = (f"rkd {c['rkd']} (sources {c['sources'][:12]})" for c in (mine, code))
        return Outcome(task.job, 1, 0.0, f"worker {host} has {here}, expected {there}", host)
    if not Path(marker).is_file():
        return Outcome(
            task.job, 1, 0.0, f"worker {host} does not see {marker}: the suite's --out must be on a shared disk", host
        )
    return run_task(task, Leash())


def _knock(address: str) -> None:
    """See that something answers at HOST:PORT: Ray itself tries for minutes, in silence, and then ends the process.

    Raises:
        OSError: nothing does.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=_KNOCK_S).close()
        except (OSError, OverflowError) as error:
            raise ConnectionError(f"RAY_ADDRESS={address}: {error}") from error


def gpu_share(jobs: int, gpus: int) -> float:
    """GPUs of one job: one, or an equal part of one where there are more jobs; Ray gives no parts of several."""
    return 1.0 if jobs <= gpus else 1.0 / math.ceil(jobs / gpus)


class RayLauncher:
    """Jobs on the workers of a cluster: as many CPUs as a job has threads, and its share of the GPUs where there are some.

    Args:
        jobs: at once; 0 for one a GPU of the cluster, or one a CPU where there is none.
        memory_mib: what Ray sets aside for a job; 0 for nothing.
        out: the suite's folder.

    Raises:
        MissingExtraError: ray is not installed.
        RuntimeUnavailableError: there is no cluster, or it has no CPU.
    """

    def __init__(self, jobs: int, memory_mib: int, out: Path) -> None:
        try:
            ray: Any = importlib.import_module("ray")
        except ImportError:
            raise MissingExtraError("ray", "ray") from None
        self._ray = ray
        mine = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            _knock(os.environ.get("RAY_ADDRESS", ""))
            ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError) as error:
            first = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise RuntimeUnavailableError(
                f"no Ray cluster was found ({first[0]}); start one (ray start --head), and set RAY_ADDRESS where it is "
                "on another machine"
            ) from error
        for number, handler in mine.items():  # Ray sets its own, which end the process before the jobs have saved
            signal.signal(number, handler)
        there: Mapping[str, float] = ray.cluster_resources()
        cpus, gpus = int(there.get("CPU", 0)), int(there.get("GPU", 0))
        self.slots = jobs or gpus or cpus
        if cpus < 1:
            ray.shutdown()
            raise RuntimeUnavailableError("the Ray cluster has no CPU; add workers to it")
        self._resources: dict[str, float] = {"memory": memory_mib * _MIB} if memory_mib else {}
        if gpus:  # Ray hides the GPUs of a machine from a job that asks for none
            self._resources["num_gpus"] = gpu_share(self.slots, gpus)
        self._remote: Any = ray.remote(max_retries=0)(work_remotely)
        self._marker, self._code = str(out / "suite.json"), code_version()
        self._jobs: dict[Any, Task] = {}

    def start(self, task: Task) -> None:
        """See `Launcher`.

        Raises:
            RuntimeUnavailableError: no machine of the cluster has what the job asks for: Ray would wait for one for ever.
        """
        wanted = {"CPU": float(task.threads or 1), "memory": self._resources.get("memory", 0.0)}
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        for what, amount in wanted.items():
            largest = max((machine.get(what, 0.0) for machine in machines), default=0.0)
            if amount > largest:
                unit, size = ("CPUs", 1) if what == "CPU" else ("MiB of memory", _MIB)
                raise RuntimeUnavailableError(
                    f"a job needs {amount / size:g} {unit}, and the largest machine of the Ray cluster has "
                    f"{largest / size:g}; give it less (threads in the suite file, --memory), or add a machine"
                )
        asked = self._remote.options(num_cpus=wanted["CPU"], **self._resources)
        self._jobs[asked.remote(task, self._marker, self._code)] = task

    def ended(self, timeout_s: float) -> list[Outcome]:
        """See `Launcher`."""
        waiting = list(self._jobs)
        done, _ = self._ray.wait(waiting, num_returns=1, timeout=timeout_s)
        more, _ = self._ray.wait(waiting, num_returns=len(waiting), timeout=0)
        return [self._outcome(reference) for reference in dict.fromkeys((*done, *more))]

    def stop(self) -> None:
        """See `Launcher`."""
        for reference in self._jobs:
            self._ray.cancel(reference, force=False)

    def kill(self) -> None:
        """See `Launcher`."""
        for reference in self._jobs:
            self._ray.cancel(reference, force=True)

    def close(self) -> None:
        """See `Launcher`."""
        self._ray.shutdown()

    def _outcome(self, reference: Any) -> Outcome:
        task = self._jobs.pop(reference)
        try:
            outcome: Outcome = self._ray.get(reference)
        except self._ray.exceptions.TaskCancelledError:
            return Outcome(task.job, 143, 0.0, "")
        except self._ray.exceptions.RayError as error:  # the worker or its machine is gone, or out of memory
            said = " ".join(str(error).split())[:300]
            return Outcome(task.job, 1, 0.0, f"its Ray worker failed: {type(error).__name__}: {said}")
        return outcome
