"""Lines of NVIDIA's tegrastats, from L4T 28 (TX2) to 39 (Thor).

Its documentation: docs.nvidia.com/jetson/archives/r38.4/DeveloperGuide/AT/JetsonLinuxDevelopmentTools/
TegrastatsUtility.html. The line changes with every release: units come and go (`5336/4970`, `2340mW/2340mW`,
`37528mW/37528mW/37528mW`), names change case, a clock may stand without a load (`@[314,off,600]`), or once
for all cores (`CPU [0%,5%,off]@2601`). So each kind of token is looked for by its form, wherever it stands, and what
does not look like one is left alone.
"""

from __future__ import annotations

import math
import re

from rkd.bench.sensors.reading import Reading

_LIMIT_CHARS = 8192
_MHZ, _MW = 1e6, 1e-3
_CPUS = re.compile(r"\bCPU \[([^\]]*)\](?:@(\d{1,5}))?")
_CORE = re.compile(r"\d{1,3}%@(\d{1,5})")
_ENGINE = re.compile(r"\b(GR3D_FREQ|EMC_FREQ)\s+(?:(\d{1,3})%)?(?:@(?:\[([^\]]*)\]|(\d+)))?")
_TEMPERATURE = re.compile(r"(?<![\w.-])([A-Za-z][\w.-]*)@(-?\d{1,4}(?:\.\d+)?)C\b")
_RAIL = re.compile(r"(?<![\w/])([A-Z][A-Z0-9_]*) (\d{1,7})(mW)?/\d{1,7}(?:mW)?(?:/\d{1,7}(?:mW)?)?(?![\w/])")
_RAIL_ALONE = re.compile(r"(?<![\w/])([A-Z][A-Z0-9_]*) (\d{1,7})mW(?![\w/])")
_NOT_RAILS = frozenset({"RAM", "SWAP", "IRAM", "NC"})  # sizes, and an INA channel that is not connected
_NO_SENSOR = -200.0  # a zone of a block without power reads -256


def parse_line(line: str) -> Reading | None:
    """One line of tegrastats; None where it is none."""
    line = line[:_LIMIT_CHARS]
    cpus = _CPUS.search(line)
    rest = line[: cpus.start()] + line[cpus.end() :] if cpus else line
    hertz, load = _engines(rest)
    cores = [int(clock) for clock in (*_CORE.findall(cpus[1]), cpus[2] or 0)] if cpus else [0]
    if max(cores):
        hertz["cpu"] = max(cores) * _MHZ
    celsius = {name.lower(): float(value) for name, value in _TEMPERATURE.findall(rest) if float(value) > _NO_SENSOR}
    watts = {name: int(value) * _MW for name, value, *_ in _RAIL.findall(rest) if name not in _NOT_RAILS}
    watts |= {name: int(value) * _MW for name, value in _RAIL_ALONE.findall(rest) if name not in _NOT_RAILS}
    found = Reading(watts, celsius, {name: value for name, value in hertz.items() if math.isfinite(value)}, {}, load)
    return found if found.to_json() else None


def _engines(line: str) -> tuple[dict[str, float], dict[str, float]]:
    """Clocks and loads of GPU and memory controller; a clock of 0 is a block without power."""
    hertz, load = {}, {}
    for engine, percent, several, one in _ENGINE.findall(line):
        name = "gpu" if engine == "GR3D_FREQ" else "emc"
        fastest = max((int(clock) for clock in re.findall(r"\b\d{1,6}\b", several or one)), default=0)
        if fastest:
            hertz[name] = fastest * _MHZ
        if percent and int(percent) <= 100:
            load[name] = float(percent)
    return hertz, load
