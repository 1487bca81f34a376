from __future__ import annotations

import pytest

from rkd.bench import device
from rkd.bench.device import identify, load_before, physical_cores


@pytest.fixture
def four_cores(monkeypatch):
    monkeypatch.setattr(device, "visible_cores", lambda: [0, 1, 2, 3])


def put(root, path, text):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.mark.usefixtures("four_cores")
def test_a_board_is_identified(tmp_path):
    put(tmp_path, "proc/device-tree/model", "NVIDIA Jetson Orin Nano Developer Kit\0")
    put(tmp_path, "proc/cpuinfo", "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd42\n")
    put(tmp_path, "proc/meminfo", "MemTotal:        7990000 kB\nMemFree: 1 kB\n")
    put(tmp_path, "etc/os-release", 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 22.04.5 LTS"\n')
    for core, clock in enumerate((1510400, 1510400, 1728000, 1510400)):
        put(tmp_path, f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_governor", "schedutil\n")
        put(tmp_path, f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_max_freq", f"{clock}\n")
    found = identify(tmp_path)
    assert found.model == "NVIDIA Jetson Orin Nano Developer Kit"
    assert found.cpu == "Arm Cortex-A78AE"
    assert found.memory_bytes == 7990000 * 1024
    assert found.os == "Ubuntu 22.04.5 LTS"
    assert (found.governor, found.max_frequency_hz) == ("schedutil", 1_728_000_000)
    assert found.cores == 4


def test_what_is_not_reported_is_none_and_never_zero(tmp_path):
    found = identify(tmp_path)
    fields = (found.model, found.cpu, found.memory_bytes, found.os, found.governor, found.max_frequency_hz)
    assert fields == (None,) * 6
    assert (found.container, found.emulator) == (None, None)


def test_an_unknown_arm_core_keeps_its_numbers(tmp_path):
    put(tmp_path, "proc/cpuinfo", "CPU implementer\t: 0x99\nCPU part\t: 0x123\n")
    assert identify(tmp_path).cpu == "Arm implementer 0x99 part 0x123"


def test_control_characters_of_a_model_name_are_dropped(tmp_path):
    put(tmp_path, "proc/cpuinfo", "model name\t: Evil\x1b[31m CPU\n")
    assert identify(tmp_path).cpu == "Evil[31m CPU"


@pytest.mark.usefixtures("four_cores")
def test_hardware_threads_of_one_core_count_once(tmp_path):
    for core, siblings in enumerate(("0-1", "0-1", "2-3", "2-3")):
        put(tmp_path, f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list", siblings + "\n")
    assert physical_cores(tmp_path) == 2


@pytest.mark.usefixtures("four_cores")
def test_without_topology_every_core_counts(tmp_path):
    assert physical_cores(tmp_path) == 4


@pytest.mark.usefixtures("four_cores")
def test_busy_cores_come_from_the_ticks_in_between(tmp_path):
    def stat(busy, idle):
        lines = [f"cpu{core} {busy[core]} 0 0 {idle[core]} 0 0 0 0 0 0" for core in range(5)]
        put(tmp_path, "proc/stat", "cpu  1 2 3 4 5 6 7 8 9 10\n" + "\n".join(lines) + "\nintr 1\n")

    stat([100] * 5, [1000] * 5)
    # Core 4 is fully busy but not ours.
    load = load_before(tmp_path, wait=lambda _: stat([130, 100, 115, 100, 130], [1000, 1030, 1015, 1030, 1000]))
    assert load.busy_cores == 1.5


def test_busy_cores_are_none_without_proc(tmp_path):
    assert load_before(tmp_path, wait=lambda _: None).busy_cores is None


def test_qemu_user_is_seen_and_a_real_interpreter_is_not(tmp_path):
    link = tmp_path / "proc/thread-self/exe"
    link.parent.mkdir(parents=True)
    link.symlink_to("/usr/bin/qemu-aarch64-static")
    assert identify(tmp_path).emulator == "qemu-aarch64"
    link.unlink()
    link.symlink_to("/usr/bin/python3.11")
    assert identify(tmp_path).emulator is None


def test_this_machine_is_identified():
    found = identify()
    assert 1 <= found.physical_cores <= found.cores
    assert found.python
