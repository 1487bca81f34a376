from __future__ import annotations

import pytest

from rkd.bench.gates import parse_gates
from rkd.bench.validity import CODES, Reason, Validity
from rkd.errors import ConfigError
from rkd.metrics import Proportion


def share(hits, n):
    return Proportion(hits, n).to_json()


@pytest.fixture
def entry():
    """ACC 95 % of 1,000 [93.5, 96.2]; ASR patch 1 % of 900, noise 4 % of 900; p99 4.0 [3.8, 5.2] ms; 150 MB."""
    quantile = {"ms": 4.0, "low": 3.8, "high": 5.2}
    return {
        "latency": {
            **dict.fromkeys(("p50", "p90", "p99"), quantile),
            "p999": None,
            "images_per_second": 250.0,
            "n": 999,
        },
        "memory": {"peak_bytes": 150_000_000, "device_bytes": None},
        "power": None,
        "scores": {
            "acc": share(950, 1000),
            "triggers": [
                {"name": "patch", "asr": share(9, 900), "ra": share(800, 900)},
                {"name": "noise", "asr": share(36, 900), "ra": share(850, 900)},
            ],
        },
        "agreement": {"share": share(2998, 3000)},
        "validity": Validity(()).to_json(),
    }


def verdict(text, entry):
    (gate,) = parse_gates([text])
    return gate.judge(entry)["passed"]


@pytest.mark.parametrize(
    ("text", "passed"),
    [
        ("acc>=93", True),
        ("acc>=94", False),  # the value is 95, the lower end is not
        ("acc>=95", False),
        ("asr_upper<=6", True),
        ("asr<=4", False),  # noise is exactly 4, its upper end is above
        ("asr:patch<=2", True),
        ("asr:patch<=1", False),
        ("ra>=86", True),
        ("ra>=87", False),  # patch is the worst
        ("ra:noise>=92", True),
        ("p99<=5.2ms", True),
        ("p99<=5ms", False),
        ("p99<=0.0052s", True),
        ("p50 < 6000 us", True),
        ("memory<=150MB", True),
        ("memory<=143MiB", False),
        ("memory<150MB", False),
        ("throughput>=250", True),
        ("agreement>=99.7", True),
        ("agreement>=99.9", False),
        ("watts<=10W", False),  # not measured
        ("p999<=100ms", False),
        ("asr:other<=50", False),
    ],
)
def test_a_limit_is_held_against_the_bad_end(entry, text, passed):
    assert verdict(text, entry) is passed


@pytest.mark.parametrize(("figure", "fewest"), [("p90", "36"), ("p99", "368")])
def test_a_limit_on_a_percentile_without_an_upper_end_is_broken_and_says_how_many_inferences_would_do(
    entry, figure, fewest
):
    entry["latency"].update({figure: {"ms": 4.0, "low": 3.8, "high": None}, "n": 30})
    (gate,) = parse_gates([f"{figure}<=100ms"])
    assert gate.judge(entry) == {
        "gate": f"{figure}<=100ms",
        "value": None,
        "passed": False,
        "text": f"{figure}<=100ms: {figure} is at least 3.8 ms; 30 inferences are too few for an upper 95 % limit, "
        f"{fewest} would do",
    }
    assert verdict(f"{figure}>=3.8ms", entry) is True


def test_a_limit_on_a_percentile_that_takes_more_inferences_says_how_many(entry):
    (gate,) = parse_gates(["p999<=1s"])
    assert gate.judge(entry)["text"] == (
        "p999<=1s: 999 inferences are too few for p999, 3,688 would do for its upper 95 % limit"
    )
    entry["latency"] = None
    assert gate.judge(entry)["text"] == "p999<=1s: p999 was not measured"


def test_a_memory_gate_counts_what_the_model_holds_on_a_gpu(entry):
    entry["memory"]["device_bytes"] = 60_000_000
    assert verdict("memory<=210MB", entry) is True
    assert verdict("memory<=209MB", entry) is False


def test_a_verdict_says_what_was_seen(entry):
    (gate,) = parse_gates(["acc >= 94"])
    assert gate.judge(entry) == {
        "gate": "acc>=94",
        "value": share(950, 1000)["low"],
        "passed": False,
        "text": "acc>=94: acc is 95 % of 1,000 images, lower 95 % limit 93.47 %; to be sure takes about 2,358 images",
    }
    (power,) = parse_gates(["joules<=1mJ"])
    assert power.judge(entry)["text"] == "joules<=1mJ: joules was not measured"


@pytest.mark.parametrize("code", CODES)
def test_no_gate_passes_on_a_figure_that_is_invalid(entry, code):
    validity = Validity((Reason(code, "what happened"),))
    entry["validity"] = validity.to_json()
    entry["power"] = {"watts": 5.0, "joules": 0.02}
    timing = ("p50<=9ms", "p99<=9ms", "memory<=1GB", "throughput>=1", "watts<=9W", "joules<=1J")
    scores = ("acc>=1", "asr<=99", "asr_upper<=99", "ra:noise>=1", "agreement>=1")
    assert {verdict(text, entry) for text in timing} == {validity.holds("timing")}
    assert {verdict(text, entry) for text in scores} == {validity.holds("scores")}


def test_a_gate_says_why_its_figure_is_invalid(entry):
    entry["validity"] = Validity(
        (Reason("throttled", "a"), Reason("one-class", "b"), Reason("throttled", "c"))
    ).to_json()
    (gate,) = parse_gates(["memory<=200MB"])
    assert gate.judge(entry)["text"] == "memory<=200MB: memory is 150 MB, but invalid: throttled"


def test_the_issues_own_line_is_read():
    gates = parse_gates(["acc>=90, asr_upper<=2, p99<=5ms", "memory<=200MB,agreement>=99.5"])
    assert [(g.figure, g.operator, g.limit) for g in gates] == [
        ("acc", ">=", 90), ("asr_upper", "<=", 2), ("p99", "<=", 5), ("memory", "<=", 2e8), ("agreement", ">=", 99.5)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("acc=90", "expected a figure"),
        ("acc>=", "expected a figure"),
        ("speed<=5", "no figure is called 'speed'"),
        ("p99<=5MB", "p99 is not in 'MB'; expected ms, us, s"),
        ("acc:patch>=9", "only asr and ra"),
        ("acc>=1e999", "too large"),
        ("acc>=90; p99<=5", "expected a figure"),
        ("", "expected a figure"),
        (",", "expected a figure"),
        ("acc>=90,", "expected a figure"),
        ("acc>=\u0669\u0660", "expected a figure"),
    ],
)
def test_a_gate_that_cannot_be_read_is_named(text, words):
    with pytest.raises(ConfigError, match=words):
        parse_gates([text])


def test_without_an_image_there_is_no_share_to_pass(entry):
    entry["scores"]["triggers"] = [{"name": "patch", "asr": share(0, 0), "ra": share(0, 0)}]
    assert verdict("asr<=100", entry) is False


@pytest.mark.parametrize(
    ("hits", "n", "text", "said"),
    [
        (
            500,
            500,
            "agreement>=99.5",
            "100 % of 500 images, lower 95 % limit 99.24 %; to be sure takes about 805 images",
        ),
        (0, 100, "asr<=2", "0 % of 100 images, upper 95 % limit 3.699 %; to be sure takes about 195 images"),
        (499, 500, "agreement>=99.9", None),  # 99.8 does not keep it, however many images
        (2000, 2000, "agreement>=99.5", None),
    ],
)
def test_a_share_that_too_few_images_hold_says_how_many_would(entry, hits, n, text, said):
    entry["agreement"]["share"] = share(hits, n)
    entry["scores"]["triggers"] = [{"name": "patch", "asr": share(hits, n), "ra": share(1, 2)}]
    (gate,) = parse_gates([text])
    judged = gate.judge(entry)
    assert judged["passed"] == (n == 2000)
    assert judged["text"].endswith(said) if said else "to be sure" not in judged["text"]
