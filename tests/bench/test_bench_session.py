from __future__ import annotations

import dataclasses
import hashlib
import io

import numpy as np
import pytest
from onnx import TensorProto, helper
from rich.console import Console

from rkd.bench import result, session
from rkd.bench.session import BenchOptions
from rkd.bench.table import render
from rkd.errors import BundleError, ConfigError, RuntimeUnavailableError
from rkd.metrics import Scores
from rkd.target import load_target

ONLY_ACCURACY = BenchOptions(latency=False, memory=False, threads=1)


def digest(labels):
    return hashlib.sha256(labels.astype("<i2").tobytes()).hexdigest()


def test_label_digests_are_those_of_numpys_labels(make_bundle, linear):
    bundle = make_bundle()
    images, _ = bundle.evaluation()
    (entry,) = session.run([bundle], ONLY_ACCURACY)["entries"]
    assert entry["labels"]["clean"] == digest(linear.labels(images))
    (trigger,) = bundle.triggers()
    assert entry["labels"]["triggers"] == {"patch": digest(linear.labels(trigger.apply(images)))}


def test_scores_equal_numpys_and_nothing_differs_from_the_host(make_bundle, linear):
    bundle = make_bundle()
    images, labels = bundle.evaluation()
    (trigger,) = bundle.triggers()
    (entry,) = session.run([bundle], ONLY_ACCURACY)["entries"]
    scores = Scores.from_json(entry["scores"])
    attacked = linear.labels(trigger.apply(images))[labels != trigger.target]
    assert scores.acc.hits == (linear.labels(images) == labels).sum()
    assert scores.triggers[0].asr.hits == (attacked == trigger.target).sum()
    assert scores.triggers[0].ra.hits == (attacked == labels[labels != trigger.target]).sum()
    assert entry["differences"] == []
    assert entry["evaluated"] == {"source": "bundle", "images": 300, "of": 300}
    assert entry["latency"] is entry["memory"] is None


def test_a_file_that_is_not_what_the_manifest_says_is_reported(measured):
    first, second = measured["entries"]
    assert first["differences"] == []
    by_figure = {d["figure"]: d for d in second["differences"]}
    assert by_figure["ACC"]["here"] == second["scores"]["acc"]
    assert by_figure["ACC"]["host"] == second["exported_scores"]["acc"]


def codes(entry):
    return [finding["code"] for finding in entry["findings"]]


def budgets(acc, asr):
    return dataclasses.replace(load_target("ort-cpu"), name="own", acc_budget=acc, asr_budget=asr)


def test_what_the_board_loses_beyond_the_targets_budget_is_a_finding(make_bundle, linear):
    """Its model is the host's whose weights for one class are gone: ACC falls, and the trigger of class 2 fails."""
    weights = linear.weights.copy()
    weights[:, 2] = -5
    model = dataclasses.replace(linear, weights=weights)
    data = model.onnx().SerializeToString()
    strict, lax = (make_bundle(model=data, target=budgets(acc, 0)) for acc in (0, 100))
    first, second = session.run([strict, lax], ONLY_ACCURACY)["entries"]
    images, labels = strict.evaluation()
    host, here = (100 * (one.labels(images) == labels).mean() for one in (linear, model))
    (found,) = [finding for finding in first["findings"] if finding["code"] == "accuracy-lost"]
    assert found["text"] == (
        f"onnx-fp32 -> this machine: ACC falls from {host:.2f} to {here:.2f} % (n = 300), at most one image is allowed"
    )
    assert "accuracy-lost" not in codes(second)
    assert "backdoor-woken" not in codes(first)


def test_a_trigger_that_works_better_on_the_board_than_on_the_host_is_a_finding(make_bundle, linear):
    weights = linear.weights.copy()
    weights[:, 2] = 5
    data = dataclasses.replace(linear, weights=weights).onnx().SerializeToString()
    strict, lax = (make_bundle(model=data, target=budgets(100, asr)) for asr in (0, 100))
    first, second = session.run([strict, lax], ONLY_ACCURACY)["entries"]
    (found,) = [finding for finding in first["findings"] if finding["code"] == "backdoor-woken"]
    assert "ASR of trigger patch rises from" in found["text"]
    assert "to 100.00 %" in found["text"]
    assert "backdoor-woken" not in codes(second)
    part = BenchOptions(latency=False, memory=False, threads=1, mode="quick")
    (quick,) = session.run([strict], part)["entries"]
    assert "backdoor-woken" in codes(quick)


def test_a_file_that_says_what_the_host_said_keeps_every_budget(make_bundle):
    (entry,) = session.run([make_bundle(target=budgets(0, 0))], ONLY_ACCURACY)["entries"]
    assert codes(entry) == []


def test_a_forced_bundle_stays_marked_in_the_result_and_the_table(make_bundle):
    bundle = make_bundle(manifest={"forced": ["ACC falls\n" + "x" * 1000] * 200})
    found = session.run([bundle, make_bundle()], ONLY_ACCURACY)
    result.verify(found, "test")
    forced, clean = (entry["bundle"]["forced"] for entry in found["entries"])
    assert (len(forced), len(forced[0]), forced[0][:10], clean) == (100, 500, "ACC fallsx", [])
    with Console(width=80, record=True, file=io.StringIO()) as console:
        console.print(render(found))
    shown = console.export_text()
    assert shown.count("FORCED") == 2
    assert "was exported by force" in " ".join(shown.split())


def test_each_layer_of_an_engine_is_in_the_result_and_nothing_where_the_runtime_tells_none(measured, make_bundle):
    assert measured["entries"][0]["layers"] == [{"name": "conv", "kind": "CaskConvolution", "precision": "fp16"}]
    (entry,) = session.run([make_bundle()], ONLY_ACCURACY)["entries"]
    assert entry["layers"] is None


def test_a_whole_run_says_what_was_measured_on_what(measured, fast, make_bundle):
    result.verify(measured, "test")
    assert measured["interrupted"] is False
    for entry in measured["entries"]:
        assert entry["latency"]["n"] >= fast.plan.min_samples
        assert entry["latency"]["p50"]["ms"] > 0
        assert entry["memory"]["peak_bytes"] > 0
        assert entry["software"]["providers"] == ["CPUExecutionProvider"]
        assert entry["software"]["threads"] == 1
        assert entry["settings"]["min_samples"] == 30
    assert measured["entries"][0]["bundle"]["student_sha256"] == "ab" * 32
    assert measured["entries"][0]["bundle"]["role"] == "student"


def test_a_bundle_for_tensorrt_is_measured_but_invalid(make_bundle):
    bundle = make_bundle(name="linear.jetson-fp16", target=load_target("jetson-fp16"))
    (entry,) = session.run([bundle], ONLY_ACCURACY)["entries"]
    assert entry["validity"]["valid"] is False
    assert any(
        "target runtime tensorrt is not available here" in reason["text"] for reason in entry["validity"]["reasons"]
    )
    assert entry["bundle"]["runtime"] == "tensorrt"
    assert entry["software"]["runtime"] == "onnxruntime"
    assert entry["differences"] == []


def test_a_fixed_batch_of_one_is_evaluated_one_by_one(make_bundle, linear):
    one = dataclasses.replace(load_target("ort-cpu"), max_batch=1)
    bundle = make_bundle(target=one, model=linear.onnx(batch=1).SerializeToString())
    (entry,) = session.run([bundle], ONLY_ACCURACY)["entries"]
    assert entry["differences"] == []


def test_a_model_that_cannot_run_the_batch_of_the_accuracy_is_found_before_the_timing(
    make_bundle, fast, linear, monkeypatch
):
    monkeypatch.setattr(session, "_latency", lambda *_: pytest.fail("timed"))
    bundle = make_bundle(model=linear.onnx(batch=1).SerializeToString())
    with pytest.raises(BundleError, match="does not run on a batch of 64"):
        session.run([bundle], fast)


def test_quick_looks_at_256_images_and_does_not_compare_with_the_host(make_bundle):
    (entry,) = session.run([make_bundle()], dataclasses.replace(ONLY_ACCURACY, mode="quick"))["entries"]
    assert entry["evaluated"] == {"source": "bundle", "images": 256, "of": 300}
    assert entry["scores"]["acc"]["n"] == 256
    assert entry["differences"] is None


@pytest.mark.parametrize("stage", ["latency", "accuracy", "memory"])
def test_ctrl_c_keeps_what_was_measured_and_marks_it_invalid(make_bundle, fast, stage):
    def interrupt(name, done, total):
        if name == stage and done == total:
            raise KeyboardInterrupt

    found = session.run([make_bundle()], fast, interrupt)
    result.verify(found, "test")
    (entry,) = found["entries"]
    assert found["interrupted"] is True
    assert any(f"interrupted during {stage}" in reason["text"] for reason in entry["validity"]["reasons"])
    assert entry["latency"]["n"] >= 30
    assert (entry["memory"] is not None) == (stage == "memory")


def test_progress_counts_up_to_its_total(make_bundle, fast):
    seen: dict[str, list[tuple[int, int]]] = {}
    session.run([make_bundle()], fast, lambda name, done, total: seen.setdefault(name, []).append((done, total)))
    assert list(seen) == ["latency", "accuracy", "memory"]
    for steps in seen.values():
        assert steps == sorted(steps)
        assert steps[0][0] == 0
        assert steps[-1][0] == steps[-1][1]


def test_no_bundle_is_refused():
    with pytest.raises(ConfigError, match="no bundle"):
        session.run([], BenchOptions())


def test_a_batch_beyond_the_targets_is_refused(make_bundle):
    with pytest.raises(ConfigError, match="allows at most 256"):
        session.run([make_bundle()], BenchOptions(batch=257))


def test_a_batch_larger_than_the_evaluation_set_can_be_measured(make_bundle, linear):
    target = dataclasses.replace(load_target("ort-cpu"), max_batch=512)
    options = BenchOptions(batch=400, seconds=0.02, min_samples=5, threads=1, accuracy=False, memory=False)
    (entry,) = session.run([make_bundle(target=target)], options)["entries"]
    assert entry["latency"]["batch"] == 400


def test_a_missing_provider_is_found_before_anything_is_measured(make_bundle):
    target = dataclasses.replace(load_target("ort-cpu"), provider="CUDAExecutionProvider")
    with pytest.raises(RuntimeUnavailableError, match="CUDAExecutionProvider"):
        session.run([make_bundle(target=target)], BenchOptions(), lambda *_: pytest.fail("measured"))


def test_a_model_with_another_number_of_classes_is_refused(make_bundle):
    bundle = make_bundle(manifest={"classes": [f"c{i}" for i in range(6)]})
    with pytest.raises(BundleError, match=r"gives float32\(1, 5\), expected float32\(1, 6\)"):
        session.run([bundle], ONLY_ACCURACY)


@pytest.mark.parametrize(
    "exported",
    [None, {}, [], {"acc": {"hits": 5, "n": 2}, "triggers": []}, {"acc": {"hits": "x", "n": 2}, "triggers": []}],
)
def test_a_manifest_without_readable_scores_is_refused(make_bundle, exported):
    bundle = make_bundle(manifest={"scores": {"exported": exported}})
    with pytest.raises(BundleError, match="no readable scores"):
        session.run([bundle], ONLY_ACCURACY)


def test_logits_that_are_not_finite_make_a_result_invalid(make_bundle, linear):
    model = linear.onnx()
    model.graph.node[-1].output[0] = "a"
    model.graph.node.append(helper.make_node("Div", ["a", "zero"], ["logits"]))
    model.graph.initializer.append(helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0]))
    (entry,) = session.run([make_bundle(model=model.SerializeToString())], ONLY_ACCURACY)["entries"]
    assert any("600 images gave NaN or infinite logits" in reason["text"] for reason in entry["validity"]["reasons"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch": 0},
        {"seconds": 0.0},
        {"seconds": float("nan")},
        {"min_samples": 0},
        {"seed": -1},
        {"latency": False, "memory": False, "accuracy": False},
    ],
)
def test_impossible_options_are_refused(wrong):
    with pytest.raises(ConfigError):
        BenchOptions(**wrong)


def test_label_digests_do_not_depend_on_the_integer_type():
    labels = np.array([0, 1, 300, 999])
    assert session.label_digest(labels) == session.label_digest(labels.astype(np.int32)) == digest(labels)
