"""Lines that tegrastats printed on real boards, each with where it was published."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rkd.bench.sensors.reading import total_rails
from rkd.bench.sensors.tegrastats import parse_line

# github.com/hasegawa-ryo-edu-ea/neuroseek, tests/test_telemetry.py
ORIN_NANO = (
    "08-10-2026 21:39:51 RAM 2513/7620MB (lfb 1x4MB) SWAP 25/3810MB (cached 0MB) CPU [11%@729,7%@729,8%@729,4%@729,"
    "3%@729,14%@729] GR3D_FREQ 0% cpu@51.218C soc2@51.093C soc0@50.125C gpu@51.593C tj@51.718C soc1@50.343C VDD_IN "
    "4744mW/6179mW VDD_CPU_GPU_CV 1273mW/2369mW VDD_SOC 1234mW/1392mW"
)
# github.com/GDWR/jetson_exporter/issues/14 (JetPack 5)
AGX_ORIN_5 = (
    "04-11-2025 10:36:27 RAM 4321/62801MB (lfb 1759x4MB) SWAP 19/31400MB (cached 0MB) CPU [0%@729,0%@729,0%@729,0%@729,"
    "0%@729,0%@729,0%@729,0%@729,0%@729,0%@729,0%@729,0%@729] EMC_FREQ 0%@2133 GR3D_FREQ 0%@[0,0] VIC_FREQ 729 APE 174 "
    "CV0@-256C CPU@44.562C Tboard@32C SOC2@40.093C Tdiode@33C SOC0@41.093C CV1@-256C GPU@-256C tj@44.343C SOC1@41.25C "
    "CV2@-256C VDD_GPU_SOC 2340mW/2340mW VDD_CPU_CV 390mW/390mW VIN_SYS_5V0 4025mW/4025mW NC 0mW/0mW VDDQ_VDD2_1V8AO "
    "301mW/301mW NC 0mW/0mW"
)
# github.com/lesomnus/tegra-exporter, stats/parse_test.go (L4T 36.4.4)
AGX_ORIN_6 = (
    "05-09-2026 18:42:06 RAM 18207/62841MB (lfb 466x4MB) SWAP 86/31420MB (cached 0MB) CPU [14%@2188,5%@2112,8%@2035,"
    "14%@2201,46%@1267,47%@1267,2%@1267,10%@1267,4%@1036,5%@1036,6%@1036,10%@1036] EMC_FREQ 3%@2133 GR3D_FREQ 0%@[0,0] "
    "NVENC 79%@166 NVDEC off NVJPG off NVJPG1 off VIC 36%@115 OFA off NVDLA0 off NVDLA1 off PVA0_FREQ off APE 174 "
    "cpu@52.562C soc2@48.437C soc0@49.093C tj@52.562C soc1@49.656C VDD_GPU_SOC 2412mW/2412mW VDD_CPU_CV 1607mW/1607mW "
    "VIN_SYS_5V0 4707mW/4707mW"
)
# github.com/martinkersner/gtop/pull/7 (JetPack 4.2)
AGX_XAVIER_4 = (
    "RAM 14700/15692MB (lfb 3x2MB) SWAP 898/8192MB (cached 23MB) CPU [0%@1190,0%@1190,0%@1190,0%@1190,0%@1190,0%@1190,"
    "0%@1190,0%@1190] EMC_FREQ 0% GR3D_FREQ 0% AO@30C GPU@30.5C Tboard@31C Tdiode@32C AUX@30.5C CPU@31.5C thermal@30.8C "
    "PMIC@100C GPU 463/463 CPU 618/618 SOC 2936/2936 CV 0/0 VDDRQ 309/309 SYS5V 3306/3306"
)
# github.com/henrygd/beszel/pull/1631 (TX2, before JetPack 5)
TX2 = (
    "RAM 3276/7859MB (lfb 5x4MB) SWAP 1626/12122MB (cached 181MB) CPU [44%@1421,49%@2031,67%@2034,17%@1420,25%@1419,"
    "8%@1420] EMC_FREQ 1%@1866 GR3D_FREQ 0%@114 APE 150 MTS fg 1% bg 1% PLL@42.5C MCPU@42.5C PMIC@50C Tboard@38C "
    "GPU@39.5C BCPU@42.5C thermal@41.3C Tdiode@39.25C VDD_SYS_GPU 182/182 VDD_SYS_SOC 730/730 VDD_4V0_WIFI 0/0 VDD_IN "
    "5297/5297 VDD_SYS_CPU 1917/1917 VDD_SYS_DDR 1241/1241"
)
# github.com/lesomnus/tegra-exporter, stats/parse_test.go (L4T 38.4 and 39.2)
THOR_38 = (
    "05-17-2026 10:00:33 RAM 4280/125773MB (lfb 29x4MB) SWAP 0/2048MB (cached 0MB) CPU [0%@972,0%@972,0%@972,0%@972,"
    "1%@972,0%@972,1%@972,0%@972,0%@2601,17%@2601,1%@972,9%@972,0%@972,1%@972] EMC_FREQ 0%@665 GR3D_FREQ @[0,0,0] "
    "NVENC0_FREQ @0 NVENC1_FREQ @0 NVDEC0_FREQ @0 NVDEC1_FREQ @0 NVJPG0_FREQ @0 VIC off OFA_FREQ @0 PVA0_FREQ off APE "
    "300 cpu@35.25C tj@36.031C soc012@36.062C soc345@34.5C VDD_GPU 0mW/0mW VDD_CPU_SOC_MSS 4923mW/4544mW VIN_SYS_5V0 "
    "4327mW/4227mW"
)
THOR_39 = (
    "07-23-2026 15:29:27 RAM 9091/125811MB (lfb 19x4MB) SWAP 0/2048MB (cached 0MB) CPU [40%@972,16%@972,18%@972,20%@972,"
    "13%@972,11%@972,15%@972,19%@972,10%@972,15%@972,28%@972,11%@972,11%@972,15%@972] EMC_FREQ 7%@3200 GR3D_FREQ "
    "@[314,314,314] NVENC0_FREQ @1556 NVENC1_FREQ @1556 NVDEC0_FREQ @1556 NVDEC1_FREQ @1556 NVJPG0_FREQ @1556 VIC "
    "59%@423 OFA_FREQ @1556 PVA0_FREQ off APE 300 cpu@34.312C/34.843C tj@35.906C/35.906C soc012@34.093C/34.437C "
    "gpu@35.906C/35.906C soc345@34.437C/34.437C VDD_GPU 4925mW/4925mW/4925mW VDD_CPU_SOC_MSS 7953mW/8332mW/8710mW "
    "VIN_SYS_5V0 6667mW/6717mW/6767mW"
)
REAL = {
    "Orin Nano": ORIN_NANO, "AGX Orin, JetPack 5": AGX_ORIN_5, "AGX Orin, JetPack 6": AGX_ORIN_6,
    "AGX Xavier": AGX_XAVIER_4, "TX2": TX2, "Thor, L4T 38": THOR_38, "Thor, L4T 39": THOR_39,
}  # fmt: skip


def rounded(values):
    return {name: round(value, 6) for name, value in values.items()}


@pytest.mark.parametrize(
    ("board", "watts", "total"),
    [
        ("Orin Nano", {"VDD_IN": 4.744, "VDD_CPU_GPU_CV": 1.273, "VDD_SOC": 1.234}, 4.744),
        (
            "AGX Orin, JetPack 5",
            {"VDD_GPU_SOC": 2.34, "VDD_CPU_CV": 0.39, "VIN_SYS_5V0": 4.025, "VDDQ_VDD2_1V8AO": 0.301},
            2.34 + 0.39 + 4.025,
        ),
        ("AGX Orin, JetPack 6", {"VDD_GPU_SOC": 2.412, "VDD_CPU_CV": 1.607, "VIN_SYS_5V0": 4.707}, 8.726),
        (
            "AGX Xavier",
            {"GPU": 0.463, "CPU": 0.618, "SOC": 2.936, "CV": 0.0, "VDDRQ": 0.309, "SYS5V": 3.306},
            0.463 + 0.618 + 2.936 + 0.309 + 3.306,
        ),
        (
            "TX2",
            {
                "VDD_SYS_GPU": 0.182,
                "VDD_SYS_SOC": 0.73,
                "VDD_4V0_WIFI": 0.0,
                "VDD_IN": 5.297,
                "VDD_SYS_CPU": 1.917,
                "VDD_SYS_DDR": 1.241,
            },
            5.297,
        ),
        ("Thor, L4T 38", {"VDD_GPU": 0.0, "VDD_CPU_SOC_MSS": 4.923, "VIN_SYS_5V0": 4.327}, 9.25),
        ("Thor, L4T 39", {"VDD_GPU": 4.925, "VDD_CPU_SOC_MSS": 7.953, "VIN_SYS_5V0": 6.667}, 19.545),
    ],
)
def test_rails_are_the_present_power_and_their_total_is_the_boards(board, watts, total):
    found = parse_line(REAL[board])
    assert rounded(found.watts) == watts
    assert sum(found.watts[name] for name in total_rails(found.watts)) == pytest.approx(total)


@pytest.mark.parametrize(
    ("board", "hertz", "load"),
    [
        ("Orin Nano", {"cpu": 729e6}, {"gpu": 0.0}),
        ("AGX Orin, JetPack 5", {"cpu": 729e6, "emc": 2133e6}, {"gpu": 0.0, "emc": 0.0}),
        ("AGX Orin, JetPack 6", {"cpu": 2201e6, "emc": 2133e6}, {"gpu": 0.0, "emc": 3.0}),
        ("AGX Xavier", {"cpu": 1190e6}, {"gpu": 0.0, "emc": 0.0}),
        ("TX2", {"cpu": 2034e6, "emc": 1866e6, "gpu": 114e6}, {"gpu": 0.0, "emc": 1.0}),
        ("Thor, L4T 38", {"cpu": 2601e6, "emc": 665e6}, {"emc": 0.0}),
        ("Thor, L4T 39", {"cpu": 972e6, "emc": 3200e6, "gpu": 314e6}, {"emc": 7.0}),
    ],
)
def test_clocks_and_loads_are_there_only_where_the_line_has_them(board, hertz, load):
    found = parse_line(REAL[board])
    assert dict(found.hertz) == hertz
    assert dict(found.load) == load


@pytest.mark.parametrize(
    ("part", "hertz"),
    [
        ("GR3D_FREQ @[300,off,600]", {"gpu": 600e6}),
        ("GR3D_FREQ 0%@[0, 300, 400]", {"gpu": 400e6}),
        ("GR3D_FREQ @[off,off]", {}),
        ("GR3D_FREQ 5%@[ 300 ] EMC_FREQ 0%@665", {"gpu": 300e6, "emc": 665e6}),
        ("CPU [0%,5%,off]@2601", {"cpu": 2601e6}),
        ("CPU [0%@729,off,3%@1190]", {"cpu": 1190e6}),
        ("CPU [0%@0,off]", {}),
    ],
)
def test_the_fastest_clock_counts_where_some_are_off_or_all_are_one(part, hertz):
    assert dict(parse_line(f"{part} VDD_IN 4744mW/6179mW").hertz) == hertz


def test_temperatures_leave_out_blocks_without_power_and_limits():
    assert parse_line(AGX_ORIN_5).celsius == {
        "cpu": 44.562, "tboard": 32.0, "soc2": 40.093, "tdiode": 33.0, "soc0": 41.093, "tj": 44.343, "soc1": 41.25
    }  # fmt: skip
    assert parse_line(THOR_39).celsius == {
        "cpu": 34.312, "tj": 35.906, "soc012": 34.093, "gpu": 35.906, "soc345": 34.437
    }  # fmt: skip


@pytest.mark.parametrize("line", REAL.values(), ids=REAL)
def test_a_line_that_is_cut_short_anywhere_gives_no_figure_that_the_whole_line_has_not(line):
    whole = parse_line(line)
    for end in range(len(line)):
        found = parse_line(line[:end])
        for name, value in (found.celsius if found else {}).items():
            assert whole.celsius[name] == value
        assert set(found.watts if found else ()) <= set(whole.watts)


@pytest.mark.parametrize(
    "garbage",
    ["", "\n", "tegrastats: permission denied", "RAM 1/2MB", "CPU []", "CPU [off,off]", "@C @ C", "x" * 100_000, "\0" * 99,
     "GR3D_FREQ 999%@", "VDD_IN mW", "VDD_IN 1e9mW/1e9mW", "[" * 9000, "CPU [" + "9" * 9000 + "%@1]"],
)  # fmt: skip
def test_garbage_reports_nothing(garbage):
    assert parse_line(garbage) is None


@given(st.text(max_size=300))
@settings(max_examples=300, deadline=None)
def test_any_text_gives_finite_figures_or_none(text):
    found = parse_line(text)
    for values in (found.watts, found.celsius, found.hertz, found.load) if found else ():
        assert all(np.isfinite(value) for value in values.values())


def test_random_damage_of_real_lines_never_raises_and_stays_finite():
    generator = np.random.default_rng(0)
    for line in REAL.values():
        for _ in range(300):
            damaged = bytearray(line.encode())
            for at in generator.integers(0, len(damaged), 4):
                damaged[at] = generator.integers(0, 256)
            found = parse_line(damaged.decode(errors="replace"))
            for values in (found.watts, found.celsius, found.hertz, found.load) if found else ():
                assert all(np.isfinite(value) for value in values.values())
