"""Sensors of any Linux machine, from /sys; the files are found once and then only read.

    power      hwmon: INA3221 rails of a Jetson (voltage times current), other chips' powerN_input, or
               powerN_average where there is none (ACPI power meters, amdgpu)
               powercap: RAPL packages and their parts (energy counters); power_supply: a discharging battery
    clocks     cpufreq; devfreq of the GPU
    heat       thermal zones
    throttled  counters: soctherm_oc (Jetson over-current), thermal_throttle (x86)
               levels: thermal cooling devices that slow something down
               now: the Raspberry Pi's get_throttled

Formats: kernel.org/doc/Documentation/hwmon/{sysfs-interface,ina3221,ina238}.rst, .../driver-api/thermal/sysfs-api.rst,
.../power/powercap/powercap.rst; raspberrypi.com/documentation/computers/os.html#get_throttled.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from rkd.bench.sensors.reading import Reading

_CPU = "sys/devices/system/cpu"
_THROTTLED = "sys/devices/platform/soc/soc:firmware/get_throttled"
_NOT_THROTTLING = re.compile(
    r"fan|powerclamp|backlight|lcd|display|tcc.offset|charger|battery|wlan|iwlwifi|hot-surface", re.IGNORECASE
)  # a Jetson's hot-surface-alert only warns whoever touches it, at 70 C; its clocks are cut at 99 C
_GPU = re.compile(r"gpu(?!-nvd)|gv11b|ga10b|gp10b|gm20b")  # Thor's gpu-gpc-0 computes, its gpu-nvd-0 decodes video
_PI_NOW = ("under-voltage", "clock capped", "throttled", "soft temperature limit")  # bits 0 to 3; 16 to 19 are the past
_NO_SENSOR_C = -200.0

Clock = Callable[[], float]  # seconds


class Sysfs:
    """The sensors of this machine.

    Args:
        root: where /sys is.
        cores: logical cores whose clocks count.
        clock: tells the time between two looks at an energy counter.
    """

    def __init__(self, root: Path = Path("/"), cores: Iterable[int] = (), clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._channels = list(_ina_channels(root))
        self._powers = list(_powers(root))
        self._energies = [_Energy(path) for path in sorted((root / "sys/class/powercap").glob("intel-rapl:*"))]
        self._batteries = [p for p in _folders(root, "sys/class/power_supply/*") if _line(p / "type") == "Battery"]
        self._zones = [
            (_line(zone / "type"), zone / "temp") for zone in _folders(root, "sys/class/thermal/thermal_zone*")
        ]
        folders = [root / f"{_CPU}/cpu{core}/cpufreq" for core in cores]
        self._clocks = {"cpu": [folder / "scaling_cur_freq" for folder in folders]}
        self._clocks["cpu cap"] = [folder / "scaling_max_freq" for folder in folders]
        self._gpus = [p for p in _folders(root, "sys/class/devfreq/*") if _GPU.search(p.name)]
        self._counters = list(_counters(root))
        self._coolers = list(_coolers(root))
        self._pi = root / _THROTTLED

    def read(self) -> Reading:
        """Look once."""
        return Reading(self._watts(), self._celsius(), self._hertz(), self._throttle())

    def _watts(self) -> dict[str, float]:
        watts = {}
        for name, volts, amperes in self._channels:
            millivolts, milliamperes = _number(volts), _number(amperes)
            if millivolts is not None and milliamperes is not None:
                watts[name] = millivolts * milliamperes / 1e6
        for name, path in self._powers:
            if (microwatts := _number(path)) is not None:
                watts.setdefault(name, microwatts / 1e6)
        now = self._clock()
        for energy in self._energies:
            if (drawn := energy.watts(now)) is not None:
                watts[energy.name] = drawn
        drained = [w for battery in self._batteries if (w := _battery(battery)) is not None]
        return watts | ({"battery": sum(drained)} if drained else {})

    def _celsius(self) -> dict[str, float]:
        found = {}
        for name, path in self._zones:
            millidegrees = _number(path)
            if name and millidegrees is not None and millidegrees / 1000 > _NO_SENSOR_C:
                found[name.removesuffix("-thermal").lower()] = millidegrees / 1000
        return found

    def _hertz(self) -> dict[str, float]:
        found = {}
        for name, paths in self._clocks.items():
            if kilohertz := [value for path in paths if (value := _number(path))]:
                found[name] = max(kilohertz) * 1e3
        for name, file in (("gpu", "cur_freq"), ("gpu cap", "max_freq")):
            if hertz := [value for gpu in self._gpus if (value := _number(gpu / file))]:
                found[name] = max(hertz)
        return found

    def _throttle(self) -> dict[str, int]:
        found = {name: int(value) for name, path in self._counters if (value := _number(path)) is not None}
        found |= {name: int(value) for name, path in self._coolers if (value := _number(path)) is not None}
        bits = _line(self._pi)
        if not re.fullmatch(r"(0x)?[0-9a-f]{1,8}", bits):
            return found
        return found | {f"now: {name}": int(bits, 16) >> bit & 1 for bit, name in enumerate(_PI_NOW)}


class _Energy:
    """A RAPL counter: microjoules that wrap around."""

    def __init__(self, folder: Path) -> None:
        self.name = _zone(folder)
        self._path = folder / "energy_uj"
        self._range = _number(folder / "max_energy_range_uj")
        self._before: tuple[float, float] | None = None

    def watts(self, now: float) -> float | None:
        """Mean power since the last call; None at the first call and where the counter cannot be read."""
        value, before = _number(self._path), self._before
        self._before = None if value is None else (now, value)
        if value is None or before is None or now <= before[0]:
            return None
        used = value - before[1]
        if used < 0:
            if self._range is None:
                return None
            used += self._range
        return used / 1e6 / (now - before[0])


def _zone(folder: Path) -> str:
    """Name of a RAPL zone; a part of a package has the package's in front, e.g. `package-1 core`."""
    name, (_, *numbers) = _line(folder / "name") or folder.name, folder.name.split(":")
    if len(numbers) > 1:
        return f"{_zone(folder.with_name(folder.name.rpartition(':')[0]))} {name}"
    return name if name != "package" else f"package-{numbers[0]}"


def power_mode(root: Path = Path("/")) -> str | None:
    """The power mode that nvpmodel has set, e.g. `MAXN (0)`; None where the machine has none.

    nvpmodel keeps the number in /var/lib/nvpmodel/status and the names in /etc/nvpmodel.conf.
    """
    found = re.search(r"pmode:(\d+)", _line(root / "var/lib/nvpmodel/status"))
    if not found:
        return None
    number = int(found[1])
    names = re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=([\w.-]+)", _text(root / "etc/nvpmodel.conf"))
    name = next((name for key, name in names if int(key) == number), "")
    return f"{name} ({number})" if name else str(number)


def _ina_channels(root: Path) -> Iterable[tuple[str, Path, Path]]:
    """Labelled INA3221 channels: hwmon of JetPack 5 and later, iio of JetPack 4."""
    for folder in _folders(root, "sys/class/hwmon/hwmon*"):
        if not _line(folder / "name").startswith("ina"):
            continue
        for label in sorted(folder.glob("in[123]_label")):
            name, number = _line(label), label.name[2]
            if name and name != "NC" and (folder / f"curr{number}_input").exists():
                yield name, folder / f"in{number}_input", folder / f"curr{number}_input"
    for label in sorted((root / "sys/bus/i2c/drivers/ina3221x").glob("*/iio*device*/rail_name_[012]")):
        number = label.name[-1]
        if (name := _line(label)) and name != "NC":
            yield name, label.with_name(f"in_voltage{number}_input"), label.with_name(f"in_current{number}_input")


def _powers(root: Path) -> Iterable[tuple[str, Path]]:
    for folder in _folders(root, "sys/class/hwmon/hwmon*"):
        chip = _line(folder / "name") or folder.name
        averages = {path.name.removesuffix("_average"): path for path in folder.glob("power[0-9]*_average")}
        inputs = {path.name.removesuffix("_input"): path for path in folder.glob("power[0-9]*_input")}
        for number, path in sorted((averages | inputs).items()):
            label = _line(folder / f"{number}_label")
            yield label or (chip if chip != "ina238" else "VIN"), path


def _counters(root: Path) -> Iterable[tuple[str, Path]]:
    for folder in _folders(root, "sys/class/hwmon/hwmon*"):
        if _line(folder / "name") == "soctherm_oc":
            for path in sorted(folder.glob("oc*_event_cnt")):
                yield f"count: over-current {path.name.removesuffix('_event_cnt')}", path
    for cpu in _folders(root, f"{_CPU}/cpu[0-9]*"):
        for kind in ("core", "package"):
            path = cpu / f"thermal_throttle/{kind}_throttle_count"
            if path.exists():
                yield f"count: {cpu.name} {kind} too hot", path


def _coolers(root: Path) -> Iterable[tuple[str, Path]]:
    for folder in _folders(root, "sys/class/thermal/cooling_device*"):
        kind = _line(folder / "type")
        if kind and not _NOT_THROTTLING.search(kind):
            yield f"level: {kind}", folder / "cur_state"


def _battery(folder: Path) -> float | None:
    """Watts drawn from a battery; None while it is not discharging."""
    if _line(folder / "status") != "Discharging":
        return None
    if (microwatts := _number(folder / "power_now")) is not None:
        return abs(microwatts) / 1e6
    microvolts, microamperes = _number(folder / "voltage_now"), _number(folder / "current_now")
    if microvolts is None or microamperes is None:
        return None
    return abs(microvolts * microamperes) / 1e12


def _folders(root: Path, pattern: str) -> list[Path]:
    try:
        return sorted(root.glob(pattern))
    except OSError:
        return []


def _number(path: Path) -> float | None:
    """A whole number alone in a file; None for anything else (a sensor may refuse, or say N/A)."""
    text = _line(path)
    return float(text) if re.fullmatch(r"-?\d{1,18}", text) else None


def _line(path: Path) -> str:
    lines = _text(path).splitlines()
    return lines[0].strip().rstrip("\0") if lines else ""


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(65536).decode(errors="replace")
    except OSError:
        return ""
