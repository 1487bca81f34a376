"""What this machine is and how busy it is, from /proc and /sys (no host name, no serial number, no user).

What a machine does not report is None, never 0: inside containers and emulators most of it is missing.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkd.bench.sensors.sysfs import power_mode

_MEMINFO = Path("/proc/meminfo")
_LIMIT_CHARS = 200
_CPU = "sys/devices/system/cpu"
# MIDR implementer and part of cores found on boards; their /proc/cpuinfo has no model name.
_ARM_PARTS = {
    ("0x41", "0xd03"): "Arm Cortex-A53",
    ("0x41", "0xd05"): "Arm Cortex-A55",
    ("0x41", "0xd07"): "Arm Cortex-A57",
    ("0x41", "0xd08"): "Arm Cortex-A72",
    ("0x41", "0xd0b"): "Arm Cortex-A76",
    ("0x41", "0xd42"): "Arm Cortex-A78AE",
    ("0x41", "0xd83"): "Arm Neoverse V3AE",
    ("0x4e", "0x003"): "NVIDIA Denver 2",
    ("0x4e", "0x004"): "NVIDIA Carmel",
}


@dataclass(frozen=True)
class Device:
    """One machine; None where it does not report.

    Attributes:
        model: of the board, e.g. `NVIDIA Jetson Orin Nano Developer Kit`.
        cpu: of the processor.
        architecture: e.g. `aarch64`.
        cores: logical ones that this process may use.
        physical_cores: of these.
        memory_bytes: of the whole machine.
        os: the distribution.
        kernel: its release.
        python: version.
        governor: of CPU frequency; several are joined by commas.
        power_mode: that nvpmodel has set, on a Jetson.
        max_frequency_hz: of the fastest core, as the governor allows it.
        container: `docker`, `podman` or another; None also where there is none.
        emulator: e.g. `qemu-aarch64`; None where there is none.
    """

    model: str | None
    cpu: str | None
    architecture: str
    cores: int
    physical_cores: int
    memory_bytes: int | None
    os: str | None
    kernel: str
    python: str
    governor: str | None
    power_mode: str | None
    max_frequency_hz: int | None
    container: str | None
    emulator: str | None

    def to_json(self) -> dict[str, Any]:
        """As in result.json."""
        return dict(self.__dict__)


@dataclass(frozen=True)
class Load:
    """What others did on this machine just before the start.

    Attributes:
        busy_cores: how many of the cores that this process may use were busy; None where not reported.
        average: the load average of the last minute, of the whole machine; None where not reported.
    """

    busy_cores: float | None
    average: float | None

    def to_json(self) -> dict[str, Any]:
        """As in result.json."""
        return {"busy_cores": self.busy_cores, "average": self.average}


def resident(key: str, status: Path = Path("/proc/self/status")) -> int | None:
    """`VmRSS` or `VmHWM` of this process, or `MemAvailable` of /proc/meminfo, in bytes; None where not reported."""
    try:
        text = status.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(rf"^{key}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def available_bytes() -> int | None:
    """Memory that programs can still get, page cache that would give way included; None where not reported."""
    return resident("MemAvailable", _MEMINFO)


def identify(root: Path = Path("/")) -> Device:
    """Describe this machine; `root` is where its /proc and /sys are."""
    memory = re.search(r"^MemTotal:\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    release = re.search(r'^PRETTY_NAME="?([^"\n]+)', _read(root / "etc/os-release"), re.MULTILINE)
    cores = visible_cores()
    governors = sorted({_line(root / f"{_CPU}/cpu{core}/cpufreq/scaling_governor") for core in cores} - {""})
    clocks = [_line(root / f"{_CPU}/cpu{core}/cpufreq/scaling_max_freq") for core in cores]
    return Device(
        model=_line(root / "proc/device-tree/model") or _line(root / "sys/class/dmi/id/product_name") or None,
        cpu=_cpu(_read(root / "proc/cpuinfo")),
        architecture=platform.machine(),
        cores=len(cores),
        physical_cores=physical_cores(root),
        memory_bytes=int(memory[1]) * 1024 if memory else None,
        os=_clean(release[1]) if release else None,
        kernel=platform.release(),
        python=platform.python_version(),
        governor=", ".join(governors) or None,
        power_mode=power_mode(root),
        max_frequency_hz=max((int(clock) * 1000 for clock in clocks if clock.isdecimal()), default=None),
        container=_container(root),
        emulator=_emulator(root),
    )


def load_before(root: Path = Path("/"), seconds: float = 0.3, wait: Callable[[float], None] = time.sleep) -> Load:
    """Watch the machine for a moment while this process does nothing.

    The load average lags by a minute, so it would blame this run for the one before it; the busy time of the cores
    does not.

    Args:
        root: where /proc is.
        seconds: how long.
        wait: passes the time.
    """
    try:
        average: float | None = round(os.getloadavg()[0], 2)
    except OSError:
        average = None
    before = _ticks(root)
    wait(seconds)
    after = _ticks(root)
    shares = [
        (after[core][0] - busy) / (after[core][1] - total)
        for core, (busy, total) in before.items()
        if core in after and after[core][1] > total
    ]
    return Load(round(sum(shares), 2) if shares else None, average)


def visible_cores() -> list[int]:
    """Logical cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def physical_cores(root: Path = Path("/")) -> int:
    """Physical cores that this process may use; the logical ones where the machine does not tell them apart."""
    cores = visible_cores()
    return len({_line(root / f"{_CPU}/cpu{core}/topology/thread_siblings_list") or str(core) for core in cores})


def _ticks(root: Path) -> dict[int, tuple[int, int]]:
    """Busy and total ticks of each visible core; time stolen by a hypervisor counts as busy."""
    visible, ticks = set(visible_cores()), {}
    for match in re.finditer(r"^cpu(\d+) (\d+(?: \d+){7})", _read(root / "proc/stat"), re.MULTILINE):
        values = [int(value) for value in match[2].split()]
        if int(match[1]) in visible:
            ticks[int(match[1])] = sum(values) - values[3] - values[4], sum(values)  # without idle and iowait
    return ticks


def _cpu(cpuinfo: str) -> str | None:
    def first(key: str) -> str:
        found = re.search(rf"^{key}\s*: (.+)$", cpuinfo, re.MULTILINE)
        return _clean(found[1]) if found else ""

    if name := first("model name"):
        return name
    implementer, part = first("CPU implementer"), first("CPU part")
    if not part:
        return None
    return _ARM_PARTS.get((implementer, part), f"Arm implementer {implementer} part {part}")


def _container(root: Path) -> str | None:
    if (root / ".dockerenv").exists():
        return "docker"
    if (root / "run/.containerenv").exists():
        return "podman"
    return _line(root / "run/systemd/container") or None


def _emulator(root: Path) -> str | None:
    """qemu-user shows a program its own /proc/self/exe, but not its own /proc/thread-self/exe."""
    try:
        name = (root / "proc/thread-self/exe").readlink().name
    except OSError:
        return None
    return _clean(name).removesuffix("-static") if name.startswith("qemu-") else None


def _line(path: Path) -> str:
    lines = _read(path).splitlines()
    return _clean(lines[0]) if lines else ""


def _clean(text: str) -> str:
    return "".join(c for c in text if c.isprintable()).strip()[:_LIMIT_CHARS]


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""
