"""Both pages as a whole: well-formed, alone, readable by everybody, and deaf to hostile names."""

import copy
import itertools
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from rkd.bench.examples import pack
from rkd.bench.gates import parse_gates
from rkd.bench.report import Curve, MaskPanel, ModelRow, RunReport, TriggerPanel, result_page, run_page
from rkd.bench.report.entries import best, read_entries
from rkd.bench.report.style import DARK, LIGHT
from rkd.errors import RkdError
from rkd.metrics import Proportion, Scores, TriggerScore
from rkd.triggers import Trigger

HOSTILE = """<script>alert(1)</script>'"><img src=//evil.example/x onerror=alert(1)>"""
VOID = {"br", "img", "link", "meta"}
DIGEST = "ab" * 32


class Page(HTMLParser):
    """Reads a page and fails on tags that do not close in order."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.headings, self.text, self.last = [], [], [], "", ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs)), f"doubled attribute in {tag}"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in {"h1", "h2", "h3"}:
            self.headings.append((int(self.open[-1][1]), data))
        if not self.open or self.open[-1] != "style":
            self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def sections(self):
        return [text for level, text in self.headings if level == 2]


def scores(*, n=200, trigger="patch", acc=163):
    asr, ra = Proportion(19 * n // 200, n), Proportion(66 * n // 200, n)
    return Scores(Proportion(acc * n // 200, n), (TriggerScore(trigger, 3, asr, ra),))


def trigger(grid=None):
    mask, none = np.zeros((3, 8, 8), np.float32), np.zeros((3, 8, 8), np.float32)
    mask[:, 6:, 6:] = 1
    return Trigger("patch", 3, mask, mask, none + np.float32(4 / 255), grid)


def run_report(word="student"):
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8), dtype=np.uint8)
    axis = np.linspace(-1, 1, 8, dtype=np.float32)
    grid = np.stack(np.meshgrid(axis * 0.9, axis), axis=-1).astype(np.float32)
    shown = [TriggerPanel(t, images, t.apply(images), [f"true: {word}", "b"]) for t in (trigger(), trigger(grid))]
    return RunReport(
        title=f"Run {word}",
        verdict=f"Verdict {word}.",
        created=f"2026-01-01 {word}",
        command=f"rkd distill {word}",
        models=[
            ModelRow(f"control {word}", "wrn", scores(), 1000, 2000, 3000, note=word),
            ModelRow(f"undefended {word}", word, scores(acc=150), control=f"control {word}"),
        ],
        curves=[Curve(f"{word} {i}", kind, [1, 2, 3], [3, 2, 1 + i]) for i in range(2) for kind in ("loss", word)],
        triggers=shown,
        masks=[MaskPanel(f"tap {word}", np.random.default_rng(1).random((5, 4, 4), np.float32), word)],
        detox_history=[(0, 0.3, 0.0, 1.0), (10, 0.4, 0.5, 0.6)],
        settings=[("student", word, "command line"), ("lr", "0.1", "default")],
        provenance=[("teacher sha256", DIGEST), (word, word)],
        notes=[f"Note {word}"],
    )


def validity(reasons):
    listed = [{"code": "throttled", "affects": "all", "text": reason} for reason in reasons]
    return dict.fromkeys(("valid", "timing", "scores"), not listed) | {"reasons": listed}


def picture(level):
    return pack(np.full((3, 8, 8), level, np.uint8))


def costs(word):
    span = {"before": 1.0, "during": 2.0, "after": None}
    return {
        "memory": {
            **dict.fromkeys(("peak_bytes", "steady_bytes", "before_bytes", "loaded_bytes", "arena_bytes"), 10**8),
            "growth_bytes": 6_000_000, "leak": True, "device_bytes": None, "system_bytes": 10**7, "inferences": 400,
            "reason": None,
        },
        "power": {
            "rails": {"VDD_IN": 7.0, word: 2.0}, "total": ["VDD_IN"], "watts": 7.0, "idle_watts": None, "joules": 0.014,
            "samples": 80,
        },
        "conditions": {
            "samples": 80, "interval_s": 0.1,
            "clocks_hz": {word: {**span, "first_third": 1.0, "last_third": 1.0}},
            "celsius": {word: span}, "throttle": {f"count: {word}": span}, "others": None, "gpu_percent_before": 37.0,
            "reason": None,
        },
        "classes": [{"name": word, "acc": Proportion(3, 4).to_json()}],
        "agreement": {
            "share": Proportion(199, 200).to_json(),
            "flips": [{"image": 7, "trigger": "patch", "truth": 0, "host": 1, "here": 3}],
        },
        "examples": [
            {
                "trigger": "patch", "target": 3,
                "images": [
                    {"before": picture(9), "after": picture(90), "truth": word, "clean": word, "triggered": word}
                ],
            }
        ],
        "gates": [],
        "findings": [{"code": "leak", "text": word}],
    }  # fmt: skip


def entry(word="student", *, reasons=(), latency=True, scored=True, p50=2.0):
    def quantile(ms):
        return {"ms": ms, "low": 0.9 * ms, "high": 1.1 * ms}

    found = scores().to_json()
    built = {
        "bundle": {
            "name": "robustkd-student",
            "sha256": DIGEST,
            "model_sha256": DIGEST,
            "student_sha256": None,
            "target": word,
            "runtime": "onnxruntime",
            "precision": word,
            "forced": [word] if latency else [],
        },
        "host": word,
        "started": "2026-01-01T00:00:00Z",
        "device": {
            "model": word,
            "cpu": None,
            "architecture": "aarch64",
            "cores": 6,
            "physical_cores": 6,
            "memory_bytes": None,
            "os": word,
            "kernel": word,
            "python": "3.10",
            "governor": None,
            "power_mode": None,
            "max_frequency_hz": None,
            "container": None,
            "emulator": None,
        },
        "load": {"busy_cores": None, "average": None},
        "software": {
            "rkd": "0.1.0",
            "python": "3.10",
            "numpy": "2.0",
            "runtime": "onnxruntime",
            "runtime_version": None,
            "providers": [word],
            "threads": 6,
            "details": {word: word},
        },
        "layers": [{"name": word, "kind": word, "precision": "fp16"}] if latency else None,
        "settings": {
            "mode": "default",
            "batch": 1,
            "sweep": [],
            "threads": None,
            "seconds": 8,
            "min_samples": 400,
            "cap_seconds": 60,
            "warm_up_cap_seconds": 10,
            "rounds": 16,
            "latency": True,
            "memory": True,
            "accuracy": True,
            "sensors": True,
            "lock_clocks": False,
            "clocks_locked_by": None,
        },
        "latency": {
            "p50": quantile(p50),
            "p90": quantile(1.2 * p50),
            "p99": quantile(2 * p50),
            "p999": quantile(3 * p50),
            "mean_ms": p50,
            "n": 4321,
            "batch": 1,
            "seconds": 8.0,
            "images_per_second": 500.0,
            "warm_up": 50,
            "stationary": True,
            "first_third_ms": None,
            "last_third_ms": None,
            "histogram": {"low_ms": p50, "high_ms": 3 * p50, "counts": [4000, 300, 21]},
            "rounds": [{"at_s": i, "p50_ms": p50, "n": n} for i, n in enumerate((1440, 1440, 1441))],
            "stages": dict.fromkeys(("h2d", "compute", "d2h"), quantile(p50)),
        }
        if latency
        else None,
        "sweep": [],
        **(costs(word) if latency else BARE),
        "scores": found if scored else None,
        "evaluated": {"source": word, "images": 200, "of": 200},
        "labels": {"clean": DIGEST, "triggers": {word: DIGEST}},
        "exported_scores": found,
        "differences": [{"figure": word, "here": None, "host": found["acc"]}],
        "validity": validity(reasons),
    }
    gates = parse_gates(["acc>=90"]) if latency else ()
    return {**built, "gates": [{**gate.judge(built), "text": word} for gate in gates]}


BARE = {
    **dict.fromkeys(("memory", "power", "conditions", "classes", "agreement")),
    **{name: [] for name in ("examples", "gates", "findings")},
}


def document(*entries):
    pairs = [
        {"first": 0, "second": 1, "batch": 1, "ratio": 2.0, "low": 1.9, "high": 2.1, "rounds": 16} for _ in entries[1:2]
    ]
    return {"schema": 4, "interrupted": False, "comparisons": pairs, "entries": list(entries)}


PAGES = {
    "run": run_page(run_report()),
    "run-hostile": run_page(run_report(HOSTILE)),
    "run-empty": run_page(RunReport("Nothing")),
    "result": result_page([document(entry(), entry(p50=3.0)), document(entry(reasons=["drifted"]))]),
    "result-hostile": result_page(
        [document(entry(HOSTILE, reasons=[HOSTILE]), entry(HOSTILE))], HOSTILE, HOSTILE, HOSTILE
    ),
    "result-bare": result_page([document(entry(latency=False, scored=False))]),
    "result-none": result_page([]),
}


@pytest.fixture(params=PAGES)
def page(request):
    return PAGES[request.param]


def test_page_is_well_formed_and_has_a_language_a_title_and_headings_in_order(page):
    read = Page(page)
    assert page.startswith("<!DOCTYPE html>")
    assert read.all("html") == [{"lang": "en"}]
    assert len(read.all("title")) == len(read.all("h1")) == len(read.all("main")) == 1
    levels = [level for level, _ in read.headings]
    assert levels[0] == 1
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels))


def test_page_asks_for_nothing(page):
    read = Page(page)
    policy = next(meta["content"] for meta in read.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")
    assert not {"script", "iframe", "object", "form", "base", "embed"} & {name for name, _ in read.elements}
    for _, attrs in read.elements:
        assert not any(name.startswith("on") for name in attrs)
        for name in ("src", "href", "srcset", "action", "poster", "xlink:href"):
            assert attrs.get(name, "data:").startswith("data:")
        assert "url(" not in attrs.get("style", "")
    style = re.search("<style>(.*?)</style>", page, re.DOTALL)
    assert style
    assert not re.search(r"url\(|@import|http", style[1])


def test_everything_drawn_has_words(page):
    read = Page(page)
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in read.all("svg"))
    assert all(image["alt"] for image in read.all("img"))
    assert all(head.get("scope") for head in read.all("th"))
    assert all(
        div.get("aria-label") and div["tabindex"] == "0" for div in read.all("div") if div.get("role") == "region"
    )


@pytest.mark.parametrize("name", ["run-hostile", "result-hostile"])
def test_hostile_names_are_shown_and_do_nothing(name):
    page = PAGES[name]
    assert "<script" not in page
    assert "<img src=//" not in page
    read = Page(page)
    assert HOSTILE in read.text
    assert all(image["src"].startswith("data:image/png;base64,") for image in read.all("img"))


@pytest.mark.parametrize(
    ("field", "section"),
    [
        ("models", "Results"),
        ("notes", "Before relying on this"),
        ("triggers", "Triggers"),
        ("curves", "Training"),
        ("settings", "Settings"),
        ("provenance", "Provenance"),
    ],
)
def test_an_empty_part_leaves_its_section_out(field, section):
    full = run_report()
    without = RunReport(**{**full.__dict__, field: ()})
    assert section in Page(run_page(full)).sections
    assert section not in Page(run_page(without)).sections


def test_detoxification_goes_when_masks_and_history_are_both_empty():
    full = run_report().__dict__
    assert "Detoxification" in Page(run_page(RunReport(**{**full, "masks": ()}))).sections
    assert "Detoxification" in Page(run_page(RunReport(**{**full, "detox_history": ()}))).sections
    assert "Detoxification" not in Page(run_page(RunReport(**{**full, "masks": (), "detox_history": ()}))).sections
    assert Page(PAGES["run-empty"]).sections == []


def test_table_shows_value_interval_n_and_excess_over_the_control():
    control, student = Proportion(300, 2000), Proportion(1046, 2000)
    rows = [
        ModelRow("control", "wrn", Scores(control, (TriggerScore("t", 0, control, control),))),
        ModelRow("student", "wrn", Scores(control, (TriggerScore("t", 0, student, control),)), control="control"),
    ]
    text = Page(run_page(RunReport("x", models=rows))).text
    assert "52.3[50.1, 54.5]n 2,000excess +37.3" in text
    assert text.count("excess +") == 1


def test_a_bundle_that_was_exported_by_force_is_marked_and_says_why():
    forced = entry()
    forced["bundle"]["forced"] = ["ACC falls from 90.00 to 80.00 %"]
    text = Page(result_page([document(forced)])).text
    assert text.count("exported by force") == 2  # in the table, and what was wrong
    assert "ACC falls from 90.00 to 80.00 %" in text
    forced["bundle"]["forced"] = []
    assert "exported by force" not in Page(result_page([document(forced)])).text


def test_the_type_of_each_layer_is_in_a_folded_table():
    told = entry()
    told["layers"] = [{"name": "conv1", "kind": "CaskConvolution", "precision": "fp16"}]
    page = Page(result_page([document(told)]))
    assert "the types of 1 layers" in page.text
    assert "conv1CaskConvolutionfp16" in page.text
    told["layers"] = None
    assert "the types of" not in Page(result_page([document(told)])).text


def test_shares_without_images_and_unknown_costs_are_dashes():
    nothing = Proportion(0, 0)
    rows = [ModelRow("m", "a", Scores(nothing, (TriggerScore("t", 0, nothing, nothing),)))]
    read = Page(run_page(RunReport("x", models=rows, curves=[Curve("a", "loss", [1], [float("nan")])])))
    assert read.text.count("\N{EN DASH}n 0") == 3
    assert "nan" not in read.text.lower()
    assert read.sections == ["Results"]


def test_a_model_without_a_trigger_that_another_has_is_marked_as_not_measured():
    rows = [ModelRow("a", "x", scores()), ModelRow("b", "x", Scores(Proportion(1, 2)))]
    assert Page(run_page(RunReport("x", models=rows))).text.count("\N{EN DASH}not measured") == 2


def test_definitions_stand_with_the_figures():
    text = Page(PAGES["run"]).text
    for words in (
        "true class is not the target",
        "still predicted correctly",
        "clean twin",
        "95 % Wilson",
        "30 points",
    ):
        assert words in text


def test_trigger_panels_show_original_triggered_difference_and_what_the_trigger_is_made_of():
    alts = [image["alt"] for image in Page(PAGES["run"]).all("img")]
    for words in ("original", "with the trigger", "difference \N{MULTIPLICATION SIGN}8"):
        assert sum(words in alt and alt.startswith("example") for alt in alts) == 4
    assert sum("mask m" in alt for alt in alts) == 2
    assert sum("warp" in alt for alt in alts) == 1


def test_panels_refuse_shapes_that_are_not_theirs():
    one = np.zeros((1, 3, 8, 8), np.uint8)
    with pytest.raises(ValueError, match="expected two of"):
        TriggerPanel(trigger(), one, one[:, :2])
    with pytest.raises(ValueError, match="expected a mask"):
        MaskPanel("tap", np.zeros((4, 4), np.float32))


def test_invalid_entries_are_warned_about_before_the_figures_and_kept_out_of_the_verdict():
    bad = entry(p50=0.5, reasons=["latency drifted"])
    read = Page(result_page([document(entry(p50=2.0), bad)]))
    assert read.sections[0].endswith("Not valid as evidence")
    assert "To know" in read.sections
    assert read.text.index("latency drifted") < read.text.index("Results")
    assert "1 of 2 measurements of latency, memory and power must not be used." in read.text
    assert "robustkd-student takes 2.00 ms for an image" in read.text
    assert read.text.count("\N{WARNING SIGN} B") >= 2


def test_a_result_of_only_invalid_entries_claims_nothing():
    text = Page(result_page([document(entry(reasons=["emulated"]))])).text
    assert "This measurement is not valid. The figures below must not be used as evidence" in text
    assert "at the median" not in text


def test_what_is_a_teacher_is_called_one():
    teacher = entry()
    teacher["bundle"] |= {"role": "teacher", "student_sha256": DIGEST}
    text = Page(result_page([document(entry(), teacher)])).text
    assert "teacher \N{MIDDLE DOT} student" in text  # the role, and the target of this entry
    assert "B teacher sha256" in text


def test_verdict_names_the_fastest_and_the_worst_trigger():
    text = Page(PAGES["result"]).text
    assert "robustkd-student (A), the fastest of 2, takes 2.00 ms for an image at the median" in text
    assert "Clean accuracy is 81.5 %" in text
    assert "patch (in A), does so on 9.5 % of the images" in text


def test_scatter_needs_two_bundles():
    assert "What speed costs" in Page(PAGES["result"]).sections
    assert "What speed costs" not in Page(result_page([document(entry())])).sections


@pytest.mark.parametrize(
    ("evaluated", "said"),
    [
        ({"source": "one.npz", "images": 57, "of": 57}, "57 of 57 images of one.npznot compared: the host did not see"),
        ({"source": "bundle", "images": 256, "of": 500}, "of bundlenot compared: not all images were evaluated"),
        ({"source": "bundle", "images": 0, "of": 500}, "of bundlenot compared: no image was evaluated"),
    ],
)
def test_why_a_board_is_not_compared_with_the_host_is_true(evaluated, said):
    one = entry()
    one.update(differences=None, evaluated=evaluated)
    assert said in Page(result_page([document(one)])).text


def test_a_bundle_is_headed_by_the_runtime_that_ran_it():
    one = entry()
    one["bundle"]["runtime"] = "tensorrt"
    assert "onnxruntime instead of tensorrt" in Page(result_page([document(one)])).text
    assert "instead of" not in Page(result_page([document(entry())])).text


def test_a_sweep_is_not_called_a_batch_of_one():
    one = entry()
    assert "Milliseconds for a batch of 1." in Page(result_page([document(one)])).text
    one["sweep"] = [{**one["latency"], "batch": 8}]
    text = Page(result_page([document(one)])).text
    assert "Milliseconds for one batch of the size in its row" in text
    assert "batch of 1." not in text


def test_an_invalid_bundle_is_hollow_beside_a_valid_one():
    page = Page(result_page([document(entry(), entry(p50=3.0, reasons=["drifted"]))]))
    discs = [attributes for element, attributes in page.elements if attributes.get("class") == "spot"]
    assert [disc["fill"] == "none" for disc in discs] == [False, True] * 2


def test_what_was_not_measured_is_a_dash_and_draws_nothing():
    read = Page(PAGES["result-bare"])
    assert read.all("svg") == []
    assert "\N{EN DASH}not measured" in read.text
    assert "Latency" not in read.sections


def test_a_document_of_another_schema_is_refused():
    wrong = copy.deepcopy(document(entry()))
    wrong["entries"][0]["bundle"]["extra"] = 1
    with pytest.raises(RkdError, match="result 2"):
        result_page([document(entry()), wrong])


def luminance(colour):
    """Relative luminance of WCAG 2.2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_contrasts_4_5_to_1_and_marks_3_to_1(scheme):
    for text in ("ink", "muted"):
        assert contrast(scheme[text], scheme["paper"]) >= 4.5
    for text in ("ink", "warn"):
        assert contrast(scheme[text], scheme["warn-paper"]) >= 4.5
    assert contrast(scheme["warn"], scheme["paper"]) >= 4.5
    for mark in ("acc", "asr", "ra", "s0", "s1", "s2", "s3", "s4", "s5"):
        assert contrast(scheme[mark], scheme["paper"]) >= 3
        assert contrast(scheme[mark], scheme["track"]) >= 3


def test_the_costs_of_an_inference_are_stated_with_what_is_not_reported():
    text = Page(PAGES["result"]).text
    for words in (
        "6.0 MB in 400 inferences, a leak",
        "7.00 W",
        "14.0 mJ",
        "not reported",
        "VDD_IN 7.00 W",
        "GPU load37 %",
    ):
        assert words in text
    for section in ("Gates", "Pair by pair", "Triggers", "Memory", "Power", "Class by class", "The machine meanwhile"):
        assert section in Page(PAGES["result"]).sections


def test_a_percentile_without_an_upper_end_is_said_to_be_at_least_its_lower_one():
    one = entry()
    one["latency"]["p99"] = {"ms": 4.0, "low": 3.25, "high": None}
    text = Page(result_page([document(one)])).text
    assert "4.00at least 3.25n 4,321" in text
    assert "too few batches for an upper end" in text


def test_a_pair_is_stated_with_its_interval_and_marked_where_it_does_not_count():
    good, bad = document(entry(), entry()), document(entry(), entry(reasons=["throttled"]))
    assert "B \N{DIVISION SIGN} A12.00 [1.90, 2.10]" in Page(result_page([good])).text
    assert "\N{WARNING SIGN} B \N{DIVISION SIGN} A" in Page(result_page([bad])).text
    assert "D \N{DIVISION SIGN} C" in Page(result_page([good, good])).text


def test_the_front_holds_what_nothing_else_beats_and_only_valid_bundles():
    fast, slow, fastest = entry(p50=1.0), entry(p50=2.0), entry(p50=0.5, reasons=["throttled"])
    assert best(read_entries([document(fast, slow, fastest)])) == {"A"}
    assert best(read_entries([document(fast, fast)])) == {"A", "B"}


def test_what_spoils_only_the_timing_leaves_the_scores_in_the_verdict():
    one = entry()
    one["validity"] = {
        "valid": False, "timing": False, "scores": True,
        "reasons": [{"code": "emulated", "affects": "timing", "text": "emulated CPU"}],
    }  # fmt: skip
    text = Page(result_page([document(one)])).text
    assert "The figures of latency, memory and power must not be used" in text
    assert "Clean accuracy is 81.5 %" in text
    assert "at the median" not in text


def test_a_ratio_of_one_round_is_shown_without_an_interval():
    found = document(entry(), entry(p50=3.0))
    assert "2.00 [1.90, 2.10]" in Page(result_page([found])).text
    found["comparisons"][0] |= {"low": None, "high": None, "rounds": 1}
    assert "2.00 (one round, no interval)" in Page(result_page([found])).text
