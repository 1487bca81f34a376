from __future__ import annotations

import io

import pytest
from rich.console import Console

from rkd.bench.table import _short, render


def shown(result):
    out = io.StringIO()
    Console(file=out, width=80, color_system=None).print(render(result))
    return out.getvalue()


def invalid(text):
    reason = {"code": "throttled", "affects": "timing", "text": text}
    return {"valid": False, "timing": False, "scores": True, "reasons": [reason]}


def quiet(result):
    """No accidental reasons of the machine that the tests run on."""
    for entry in result["entries"]:
        entry["validity"] = {"valid": True, "timing": True, "scores": True, "reasons": []}
    return result


def test_the_comparison_fits_80_columns(measured):
    text = shown(measured)
    assert max(map(len, text.splitlines())) <= 80
    for word in ("bundle", "p50 ms", "p90 ms", "p99 ms", "img/s", "MB", "ACC %", "ASR %", "RA %"):
        assert word in text


def test_figures_intervals_and_denominators_are_shown(measured):
    first = quiet(measured)["entries"][0]
    text = shown(measured)
    acc = first["scores"]["acc"]
    assert f"{acc['percent']:.1f}" in text
    assert f"{acc['low']:.1f}-{acc['high']:.1f}" in text
    assert "n 300" in text
    assert "Wilson" in text


def test_an_interval_without_an_upper_end_says_how_many_inferences_it_takes(measured):
    latency = quiet(measured)["entries"][0]["latency"]
    for key in ("p50", "p90", "p99"):
        latency[key] = {"ms": 2.0, "low": 1.5, "high": 3.0}
        measured["entries"][1]["latency"][key] = {"ms": 2.0, "low": 1.5, "high": 3.0}
    latency["p999"] = measured["entries"][1]["latency"]["p999"] = None
    assert "1.50-3.00" in shown(measured)
    assert ">=" not in shown(measured)
    latency["p99"] = {"ms": 2.0, "low": 1.25, "high": None}
    assert ">=1.25" in shown(measured)
    assert "too few inferences for an upper end; p99 takes 368, p99.9 3,688" in " ".join(shown(measured).split())


def test_pairs_of_bundles_are_stated_with_their_interval(measured):
    measured["comparisons"] = [
        {"first": 0, "second": 1, "batch": 1, "ratio": 2.5, "low": 2.4, "high": 2.6, "rounds": 5}
    ]
    text = " ".join(shown(quiet(measured)).split())
    assert "other.ort-cpu takes 2.500 [2.400, 2.600] times as long as linear.ort-cpu." in text


def test_a_ratio_of_one_round_has_no_interval(measured):
    measured["comparisons"] = [
        {"first": 0, "second": 1, "batch": 1, "ratio": 2.5, "low": None, "high": None, "rounds": 1}
    ]
    text = " ".join(shown(quiet(measured)).split())
    assert "takes 2.500 (one round, no interval) times as long as linear.ort-cpu." in text


@pytest.mark.parametrize("side", [0, 1])
def test_a_ratio_is_marked_where_either_sides_timing_is_invalid(measured, side):
    assert "INVALID timing: other" not in shown(quiet(measured))
    measured["entries"][side]["validity"] = invalid("hot")
    assert "INVALID timing: other.ort-cpu takes" in shown(measured)


def test_the_worst_trigger_is_in_the_first_table_and_all_in_the_second(measured):
    text = shown(quiet(measured))
    triggers = measured["entries"][0]["scores"]["triggers"]
    assert len(triggers) == 2
    worst = max(t["asr"]["percent"] for t in triggers)
    assert f"{worst:.1f}" in text.split("trigger ")[0]
    for trigger in triggers:
        assert trigger["name"] in text.split("trigger ")[1]


def test_an_invalid_row_is_marked_and_its_reason_printed(measured):
    assert "INVALID" not in shown(quiet(measured))
    measured["entries"][1]["validity"] = invalid("the board was throttled")
    text = shown(measured)
    assert "INVALID" in text
    assert "other.ort-cpu is INVALID (throttled): the board was throttled" in text
    assert "INVALID timing" in text


def test_reasons_of_one_code_are_one_line_with_their_numbers_as_a_range(measured):
    first, second = quiet(measured)["entries"]
    for entry, n, ms, seconds in ((first, 1399, 0.9, 1.2), (second, 402, 1.25, 1.3)):
        entry["validity"] = {"valid": False, "timing": False, "scores": True, "reasons": [
            {"code": "too-short", "affects": "timing", "text": f"{n:,} latency samples, 5000 wanted; measure longer"},
            {"code": "too-short", "affects": "timing", "text": f"batch 4: {n} samples in {ms} s, p99 is 7"},
        ]}  # fmt: skip
        entry["memory"]["reason"] = f"its process did not finish within {seconds} s"
    text = " ".join(shown(measured).split())
    assert (
        "every bundle is INVALID (too-short): 402 to 1,399 latency samples, 5000 wanted; measure longer; "
        "batch 4: 402 to 1399 samples in 0.9 to 1.25 s, p99 is 7"
    ) in text
    assert "every bundle: memory not reported: its process did not finish within 1.2 to 1.3 s" in text
    assert text.count("too-short") == 1


def test_classes_that_are_called_by_numbers_are_no_range(measured):
    for entry, name in zip(quiet(measured)["entries"], "37", strict=True):
        entry["findings"] = [{"code": "classes-missing", "text": f"no images of class {name}"}]
    text = " ".join(shown(measured).split())
    assert "linear.ort-cpu: no images of class 3" in text
    assert "other.ort-cpu: no images of class 7" in text


def test_what_is_said_of_some_bundles_names_them(measured):
    first, second = quiet(measured)["entries"]
    first["validity"], second["validity"] = invalid("hot at 97 C"), invalid("slow at 97 C")
    text = " ".join(shown(measured).split())
    assert "linear.ort-cpu is INVALID (throttled): hot at 97 C" in text
    assert "other.ort-cpu is INVALID (throttled): slow at 97 C" in text


def test_a_difference_from_the_host_is_printed(measured):
    assert "other.ort-cpu: ACC differs from the exporting host's" in " ".join(shown(measured).split())


def test_what_was_not_measured_is_a_dash(measured):
    entry = quiet(measured)["entries"][0]
    measured["entries"], measured["comparisons"] = [entry], []
    entry["latency"] = entry["scores"] = None
    entry["memory"].update(peak_bytes=None, reason="no /proc")
    text = shown(measured)
    row = next(line for line in text.splitlines() if line.strip().startswith("linear.ort-cpu"))
    assert row.split() == ["linear.ort-cpu", *["-"] * 8]
    assert "memory not reported: no /proc" in text


def test_what_no_bundle_reports_is_one_line_and_no_column_and_never_0(measured):
    for entry in quiet(measured)["entries"]:
        entry["power"] = None
        entry["memory"]["device_bytes"] = None
    text = shown(measured)
    assert "Not reported: device, W, idle W, mJ." in text
    assert not [line for line in text.splitlines() if line.split() == ["bundle", "peak", "MB", "device"]]
    head = next(line for line in text.splitlines() if "peak MB" in line)
    assert head.split() == ["bundle", "peak", "MB", "steady", "arena", "grew"]
    measured["entries"][1]["memory"]["device_bytes"] = 77_000_000
    text = shown(measured)
    assert "Not reported: W, idle W, mJ." in text
    rows = text[text.index("peak MB") :].splitlines()
    assert [row.split()[4] for row in rows if "ort-cpu" in row][:2] == ["-", "77"]


def test_what_ran_where_is_stated(measured):
    for entry in quiet(measured)["entries"]:
        entry["device"].update(model="Board 7", cpu="Some CPU")
        entry["software"].update(
            runtime="onnxruntime", runtime_version="1.99", providers=["CPUExecutionProvider"], threads=3
        )
    text = " ".join(shown(measured).split())
    assert "Ran every bundle with onnxruntime 1.99, CPUExecutionProvider, threads 3, on Board 7." in text
    measured["entries"][1]["software"].update(runtime="tensorrt", runtime_version="10.3", providers=["Orin", "fp16"])
    text = " ".join(shown(measured).split())
    assert "Ran linear.ort-cpu with onnxruntime 1.99, CPUExecutionProvider, threads 3, on Board 7." in text
    assert "Ran other.ort-cpu with tensorrt 10.3, Orin, fp16, threads 3, on Board 7." in text


def test_full_agreement_is_stated_as_well(measured):
    share = measured["entries"][0]["agreement"]["share"]
    assert share["hits"] == share["n"]
    assert f"{share['n']:,} of {share['n']:,} (100.00 %) predictions agree" in " ".join(shown(quiet(measured)).split())


def test_bundles_of_one_name_are_told_apart_everywhere(measured):
    first, second = quiet(measured)["entries"]
    assert "A: linear" not in shown(measured)
    second["bundle"]["name"] = first["bundle"]["name"]
    text = shown(measured)
    rows = [line.split()[0] for line in text.splitlines() if "linear.ort-cpu" in line]
    assert {"A:", "B:"} <= set(rows)
    assert f"B: {first['bundle']['name']}: ACC differs" in " ".join(text.split())
    first["host"], second["host"] = "orin", "pi"
    assert "A: linear" not in shown(measured)


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("robustkd.jetson-fp16", ["robustkd.", "jetson-fp16"]),
        ("mobilenetv2-robustkd-teacher.rtx-fp16", ["mobilenetv2-", "robustkd-teacher.", "rtx-fp16"]),
    ],
)
def test_a_long_name_breaks_behind_its_dots_and_dashes(measured, name, lines):
    quiet(measured)["entries"][0]["bundle"]["name"] = name
    text = shown(measured)
    assert max(map(len, text.splitlines())) <= 80
    at = next(i for i, line in enumerate(text.splitlines()) if line.split()[:1] == lines[:1])
    assert [line.split()[0] for line in text.splitlines()[at : at + len(lines)]] == lines


def test_a_name_without_a_place_to_break_is_still_within_80_columns(measured):
    quiet(measured)["entries"][0]["bundle"]["name"] = "x" * 200
    text = shown(measured)
    assert max(map(len, text.splitlines())) <= 80


def test_markup_in_reasons_is_text(measured):
    measured["entries"][0]["validity"] = invalid("[bold]a[/nothing]")
    assert "[bold]a[/nothing]" in shown(measured)


@pytest.mark.parametrize(("value", "text"), [(0.0123, "0.012"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1234")])
def test_numbers_have_no_exponent(value, text):
    assert _short(value) == text
