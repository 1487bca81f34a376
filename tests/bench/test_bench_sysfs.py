"""Sensors in /sys, laid out as the boards have them."""

from __future__ import annotations

import pytest

from rkd import diagnosis
from rkd.bench.sensors.reading import total_rails
from rkd.bench.sensors.sysfs import Sysfs, power_mode


def put(root, files):
    for path, text in files.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


# An Orin Nano on L4T 36: names of rails and files as in docs.nvidia.com/jetson/archives/r36.4.3/DeveloperGuide/SD/
# PlatformPowerAndPerformance/JetsonOrinNanoSeriesJetsonOrinNxSeriesAndJetsonAgxOrinSeries.html (INA3221, soctherm_oc,
# thermal zones); the driver of the counters is drivers/hwmon/tegra23x-oc-event.c of NVIDIA's out-of-tree modules.
ORIN_NANO = {
    "sys/class/hwmon/hwmon1/name": "ina3221",
    "sys/class/hwmon/hwmon1/in1_label": "VDD_IN",
    "sys/class/hwmon/hwmon1/in1_input": "5000",
    "sys/class/hwmon/hwmon1/curr1_input": "1256",
    "sys/class/hwmon/hwmon1/in2_label": "VDD_CPU_GPU_CV",
    "sys/class/hwmon/hwmon1/in2_input": "4992",
    "sys/class/hwmon/hwmon1/curr2_input": "304",
    "sys/class/hwmon/hwmon1/in3_label": "NC",
    "sys/class/hwmon/hwmon1/in7_label": "sum of shunt voltages",
    "sys/class/hwmon/hwmon3/name": "soctherm_oc",
    "sys/class/hwmon/hwmon3/oc1_event_cnt": "0",
    "sys/class/hwmon/hwmon3/oc2_event_cnt": "15",
    "sys/class/hwmon/hwmon3/oc3_event_cnt": "37",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
    "sys/class/thermal/thermal_zone0/temp": "49531",
    "sys/class/thermal/thermal_zone1/type": "gpu-thermal",
    "sys/class/thermal/thermal_zone1/temp": "-256000",
    "sys/class/thermal/thermal_zone8/type": "tj-thermal",
    "sys/class/thermal/thermal_zone8/temp": "51718",
    "sys/class/thermal/cooling_device0/type": "pwm-fan",
    "sys/class/thermal/cooling_device0/cur_state": "3",
    "sys/class/thermal/cooling_device1/type": "cpu-throttle-alert",
    "sys/class/thermal/cooling_device1/cur_state": "0",
    "sys/class/devfreq/17000000.gpu/cur_freq": "624750000",
    "sys/class/devfreq/17000000.gpu/max_freq": "1020000000",
    "sys/class/devfreq/15340000.vic/cur_freq": "115200000",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "729600",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq": "1510400",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "1510400",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_max_freq": "1510400",
}


def test_an_orin_nano(tmp_path):
    put(tmp_path, ORIN_NANO)
    found = Sysfs(tmp_path, [0, 1]).read()
    assert found.watts == {"VDD_IN": pytest.approx(6.28), "VDD_CPU_GPU_CV": pytest.approx(1.517568)}
    assert total_rails(found.watts) == ("VDD_IN",)
    assert found.celsius == {"cpu": 49.531, "tj": 51.718}
    assert found.hertz == {"cpu": 1510.4e6, "cpu cap": 1510.4e6, "gpu": 624.75e6, "gpu cap": 1020e6}
    assert found.throttle == {
        "count: over-current oc1": 0,
        "count: over-current oc2": 15,
        "count: over-current oc3": 37,
        "level: cpu-throttle-alert": 0,
    }


def ina3221(number: int, *channels: tuple[str, int, int] | None) -> dict[str, str]:
    """A monitor's channels: label, millivolts, milliamperes; None where the board's device tree disables one."""
    base = f"sys/class/hwmon/hwmon{number}"
    files = {f"{base}/name": "ina3221", f"{base}/in7_label": "sum of shunt voltages", f"{base}/in7_input": "4"}
    for i, channel in enumerate(channels, 1):
        label, millivolts, milliamperes = channel or ("NC", 0, 0)
        files |= {f"{base}/in{i}_label": label, f"{base}/in{i}_enable": str(int(channel is not None))}
        files |= {f"{base}/in{i}_input": str(millivolts), f"{base}/curr{i}_input": str(milliamperes)}
    return files


# Labels and addresses (0x40 is read first): arch/arm64/boot/dts/nvidia/tegra194-p2888.dtsi and tegra234-p3701.dtsi of
# Linux; Thor's are those of its tegrastats lines (test_bench_tegrastats.py). The GPUs' devfreq names are those that public
# monitors look for; Thor's gpu-nvd-0 is the clock of its video engines.
BOARDS = {
    "AGX Orin": (
        ina3221(2, ("VDD_GPU_SOC", 19080, 123), ("VDD_CPU_CV", 19088, 20), ("VIN_SYS_5V0", 5016, 802))
        | ina3221(3, None, ("VDDQ_VDD2_1V8AO", 5016, 60), None)
        | {"sys/class/devfreq/17000000.ga10b/cur_freq": "306000000"},
        {"VDD_GPU_SOC": 2.34684, "VDD_CPU_CV": 0.38176, "VIN_SYS_5V0": 4.022832, "VDDQ_VDD2_1V8AO": 0.30096},
        2.34684 + 0.38176 + 4.022832,
        {"gpu": 306e6},
    ),
    "AGX Xavier, JetPack 5": (
        ina3221(4, ("GPU", 19096, 24), ("CPU", 19096, 32), ("SOC", 19080, 153))
        | ina3221(5, ("CV", 19096, 0), ("VDDRQ", 19096, 16), ("SYS5V", 19064, 173))
        | {"sys/class/devfreq/17000000.gv11b/cur_freq": "114750000"},
        {"GPU": 0.458304, "CPU": 0.611072, "SOC": 2.91924, "CV": 0.0, "VDDRQ": 0.305536, "SYS5V": 3.298072},
        0.458304 + 0.611072 + 2.91924 + 0.305536 + 3.298072,
        {"gpu": 114.75e6},
    ),
    "Thor": (
        ina3221(1, ("VDD_GPU", 12008, 410), ("VDD_CPU_SOC_MSS", 12000, 662), ("VIN_SYS_5V0", 4992, 1335))
        | {"sys/class/hwmon/hwmon4/name": "ina238", "sys/class/hwmon/hwmon4/power1_input": "24780000"}
        | {"sys/class/devfreq/gpu-gpc-0/cur_freq": "1575000000", "sys/class/devfreq/gpu-nvd-0/cur_freq": "1692000000"},
        {"VDD_GPU": 4.92328, "VDD_CPU_SOC_MSS": 7.944, "VIN_SYS_5V0": 6.66432, "VIN": 24.78},
        24.78,
        {"gpu": 1575e6},
    ),
}


@pytest.mark.parametrize("board", BOARDS)
def test_the_rails_of_larger_boards_and_what_they_sum_to(tmp_path, board):
    files, watts, total, hertz = BOARDS[board]
    put(tmp_path, files)
    found = Sysfs(tmp_path).read()
    assert found.watts == pytest.approx(watts)
    assert sum(found.watts[rail] for rail in total_rails(found.watts)) == pytest.approx(total)
    assert found.hertz == hertz


def test_a_xavier_of_jetpack_4_has_its_rails_under_iio(tmp_path):
    base = "sys/bus/i2c/drivers/ina3221x/1-0040/iio:device0"
    put(
        tmp_path,
        {f"{base}/rail_name_0": "GPU", f"{base}/in_voltage0_input": "19144", f"{base}/in_current0_input": "24"},
    )
    assert Sysfs(tmp_path).read().watts == {"GPU": pytest.approx(0.459456)}


def test_thors_input_is_an_ina238(tmp_path):
    put(
        tmp_path,
        {"sys/class/hwmon/hwmon4/name": "ina238", "sys/class/hwmon/hwmon4/power1_input": "19780000"},
    )
    found = Sysfs(tmp_path).read()
    assert found.watts == {"VIN": 19.78}
    assert total_rails(found.watts) == ("VIN",)


def test_a_chip_that_offers_only_mean_power_is_read_and_its_input_comes_first(tmp_path):
    base = "sys/class/hwmon"
    put(tmp_path, {f"{base}/hwmon1/name": "power_meter", f"{base}/hwmon1/power1_average": "187000000"})
    put(tmp_path, {f"{base}/hwmon1/power1_average_interval": "1000"})
    put(tmp_path, {f"{base}/hwmon2/name": "amdgpu", f"{base}/hwmon2/power1_average": "35000000"})
    put(tmp_path, {f"{base}/hwmon2/power1_label": "PPT"})
    put(tmp_path, {f"{base}/hwmon3/name": "other", f"{base}/hwmon3/power1_average": "9000000"})
    put(tmp_path, {f"{base}/hwmon3/power1_input": "8000000"})
    assert Sysfs(tmp_path).read().watts == {"power_meter": 187.0, "PPT": 35.0, "other": 8.0}


def test_rapl_is_power_between_two_looks_and_wraps_around(tmp_path):
    base = "sys/class/powercap/intel-rapl:0"
    put(
        tmp_path, {f"{base}/name": "package-0", f"{base}/energy_uj": "999000", f"{base}/max_energy_range_uj": "1000000"}
    )
    clock = Clock()
    sensors = Sysfs(tmp_path, clock=clock)
    assert sensors.read().watts == {}
    put(tmp_path, {f"{base}/energy_uj": "500000"})
    clock.now = 0.5
    assert sensors.read().watts == {"package-0": pytest.approx(501_000 / 1e6 / 0.5)}


def test_parts_of_two_processors_are_told_apart_and_only_packages_are_summed(tmp_path):
    names = {"0": "package-0", "0:0": "core", "0:1": "dram", "1": "package-1", "1:0": "core", "2": "package"}
    for zone, name in names.items():
        base = f"sys/class/powercap/intel-rapl:{zone}"
        put(tmp_path, {f"{base}/name": name, f"{base}/energy_uj": "0"})
    clock = Clock()
    sensors = Sysfs(tmp_path, clock=clock)
    sensors.read()
    for microjoules, zone in enumerate(names, start=1):
        put(tmp_path, {f"sys/class/powercap/intel-rapl:{zone}/energy_uj": f"{microjoules}000000"})
    clock.now = 1.0
    found = sensors.read().watts
    assert found == {
        "package-0": 1, "package-0 core": 2, "package-0 dram": 3, "package-1": 4, "package-1 core": 5, "package-2": 6
    }  # fmt: skip
    assert total_rails(found) == ("package-0", "package-1", "package-2")


def test_a_battery_counts_only_while_it_discharges(tmp_path):
    base = "sys/class/power_supply/BAT0"
    put(tmp_path, {f"{base}/type": "Battery", f"{base}/status": "Discharging", f"{base}/voltage_now": "12000000"})
    put(tmp_path, {f"{base}/current_now": "1500000"})
    assert Sysfs(tmp_path).read().watts == {"battery": pytest.approx(18.0)}
    put(tmp_path, {f"{base}/status": "Charging"})
    assert Sysfs(tmp_path).read().watts == {}


@pytest.mark.parametrize(
    ("bits", "active"), [("50005", {"under-voltage", "throttled"}), ("50000", set()), ("0", set())]
)
def test_a_raspberry_pi_says_what_throttles_it_now(tmp_path, bits, active):
    put(tmp_path, {"sys/devices/platform/soc/soc:firmware/get_throttled": bits})
    found = Sysfs(tmp_path).read().throttle
    assert {name.removeprefix("now: ") for name, level in found.items() if level} == active


@pytest.mark.parametrize(
    "kind", ["LCD", "TCC Offset", "int3406-display", "pwm-fan", "intel_powerclamp", "iwlwifi_1", "hot-surface-alert"]
)
def test_a_cooling_device_that_slows_no_processor_down_is_left_out(tmp_path, kind):
    base = "sys/class/thermal/cooling_device"
    put(tmp_path, {f"{base}0/type": kind, f"{base}0/cur_state": "20"})
    put(tmp_path, {f"{base}1/type": "Processor", f"{base}1/cur_state": "1"})
    assert Sysfs(tmp_path).read().throttle == {"level: Processor": 1}


def test_an_intel_core_that_was_too_hot_is_counted(tmp_path):
    put(tmp_path, {"sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "7"})
    assert Sysfs(tmp_path).read().throttle == {"count: cpu0 core too hot": 7}


@pytest.mark.parametrize("garbage", ["", "N/A", "1.5", "-", "99999999999999999999", "0x10", "Ω", "\0", "nan"])
def test_a_sensor_that_says_nonsense_is_not_reported(tmp_path, garbage):
    files = {
        path: garbage if path.endswith(("_input", "temp", "_freq", "_cnt", "state")) else text
        for path, text in ORIN_NANO.items()
    }
    put(tmp_path, files | {"sys/devices/platform/soc/soc:firmware/get_throttled": f"z{garbage}"})
    found = Sysfs(tmp_path, [0, 1]).read()
    assert found.to_json() == {}


def test_sensors_that_refuse_to_be_read_are_not_reported(tmp_path):
    put(tmp_path, ORIN_NANO)
    for file in ("in1_input", "curr1_input"):
        path = tmp_path / "sys/class/hwmon/hwmon1" / file
        path.unlink()
        path.mkdir()  # reading it is an OSError, as a sensor's that is asleep
    assert set(Sysfs(tmp_path).read().watts) == {"VDD_CPU_GPU_CV"}


def test_a_machine_without_sensors_reports_nothing(tmp_path):
    assert Sysfs(tmp_path, [0, 1]).read().to_json() == {}


def test_the_power_mode_has_its_name_from_nvpmodels_own_file(tmp_path):
    put(tmp_path, {"var/lib/nvpmodel/status": "pmode:0002 fmode:quiet"})
    assert power_mode(tmp_path) == "2"
    put(tmp_path, {"etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n"})
    assert power_mode(tmp_path) == "MAXN_SUPER (2)"
    assert power_mode(tmp_path / "nowhere") is None


def test_doctor_says_what_the_board_reports_and_what_not(tmp_path):
    put(tmp_path, ORIN_NANO | {"var/lib/nvpmodel/status": "pmode:0000"})
    found = diagnosis._sensors(tmp_path)
    assert found.state == "ok"
    assert "power (VDD_IN, VDD_CPU_GPU_CV)" in found.detail
    assert "power mode 0" in found.detail
    bare = diagnosis._sensors(tmp_path / "bare")
    assert (bare.state, "not reported: power, clocks, heat, throttling" in bare.detail) == ("note", True)
