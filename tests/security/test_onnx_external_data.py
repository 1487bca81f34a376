from __future__ import annotations

from contextlib import suppress

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from rkd.bench.external import refuse_external_data
from rkd.bench.runner import CPU_PROVIDER, OrtRunner
from rkd.errors import BundleError


def external(name="w", location="w.bin"):
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def constant(tensor):
    return helper.make_node("Constant", [], ["c"], value=tensor)


def in_initializer(model):
    model.graph.initializer.append(external())


def in_constant(model):
    model.graph.node.append(constant(external()))


def in_subgraph(model):
    branch = helper.make_graph([], "then", [], [], [external()])
    node = helper.make_node("If", ["q"], ["r"], then_branch=branch, else_branch=helper.make_graph([], "else", [], []))
    model.graph.node.append(node)


def in_tensor_list(model):
    model.graph.node.append(helper.make_node("X", [], ["r"], many=[numpy_helper.from_array(np.ones(1)), external()]))


def in_graph_list(model):
    model.graph.node.append(helper.make_node("X", [], ["r"], many=[helper.make_graph([], "g", [], [], [external()])]))


def in_function(model):
    model.functions.append(helper.make_function("d", "F", [], ["c"], [constant(external())], []))


def in_sparse_initializer(model):
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(external())


def in_sparse_attribute(model):
    node = model.graph.node.add(op_type="Constant", output=["c"])
    node.attribute.add(name="sparse_value", type=11).sparse_tensor.indices.CopyFrom(external())


def in_training_graph(model):
    model.training_info.add().algorithm.initializer.append(external())


def only_marked_as_external(model):
    tensor = TensorProto(name="w2", data_type=TensorProto.FLOAT, dims=[2])
    tensor.data_location = TensorProto.EXTERNAL
    model.graph.initializer.append(tensor)


PLACES = [
    in_initializer,
    in_constant,
    in_tensor_list,
    in_function,
    in_sparse_initializer,
    in_sparse_attribute,
    in_training_graph,
    only_marked_as_external,
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_external_data_is_refused_wherever_it_is(linear, place):
    model = linear.onnx()
    place(model)
    with pytest.raises(BundleError, match="stored in another file"):
        refuse_external_data(model.SerializeToString(), "x.rkd")


@pytest.mark.parametrize("place", [in_subgraph, in_graph_list], ids=lambda place: place.__name__)
def test_external_data_in_an_operators_graph_is_refused_with_the_graph(linear, place):
    model = linear.onnx()
    place(model)
    with pytest.raises(BundleError, match="a graph inside of an operator"):
        refuse_external_data(model.SerializeToString(), "x.rkd")


def test_a_loop_that_never_ends_is_refused_before_it_runs(linear):
    """In the runtime it would hear no signal but SIGKILL."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Identity", ["v"], ["w"])], "body",
        [helper.make_tensor_value_info(n, t, None) for n, t in (("i", TensorProto.INT64), ("go", TensorProto.BOOL), ("v", TensorProto.FLOAT))],
        [helper.make_tensor_value_info(n, t, None) for n, t in (("on", TensorProto.BOOL), ("w", TensorProto.FLOAT))],
    )  # fmt: skip
    model = linear.onnx()
    model.graph.initializer.append(numpy_helper.from_array(np.array(2**60), "rounds"))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1), "start"))
    model.graph.node.append(helper.make_node("Loop", ["rounds", "", "start"], ["end"], body=body))
    with (
        pytest.raises(BundleError, match=r"a graph inside of an operator \(a loop or a branch\)"),
        OrtRunner(model.SerializeToString(), CPU_PROVIDER, 1, "m"),
    ):
        pass


def test_a_file_in_the_current_folder_is_not_read(linear, folder):
    """ONNX Runtime alone would load this one: it resolves external data against the current folder."""
    weights = linear.weights.astype(np.float32)
    (folder / "w.bin").write_bytes(weights.tobytes())
    model = linear.onnx()
    model.graph.initializer[0].ClearField("raw_data")
    model.graph.initializer[0].MergeFrom(TensorProto(data_location=TensorProto.EXTERNAL))
    model.graph.initializer[0].external_data.add(key="location", value="w.bin")
    with (
        pytest.raises(BundleError, match="stored in another file"),
        OrtRunner(model.SerializeToString(), CPU_PROVIDER, 1, "m"),
    ):
        pass


def test_an_overlong_encoding_hides_nothing():
    location = b"\x70\x81\x80\x00"  # TensorProto.data_location = 1, as three bytes instead of one
    tensor = b"\x2a" + bytes([len(location)]) + location
    model = b"\x3a" + bytes([len(tensor)]) + tensor
    with pytest.raises(BundleError, match="stored in another file"):
        refuse_external_data(model, "m")


def test_a_model_with_all_data_inside_passes(linear):
    refuse_external_data(linear.onnx().SerializeToString(), "m")


def test_random_damage_gives_a_bundle_error_or_nothing(linear):
    whole = linear.onnx().SerializeToString()
    generator = np.random.default_rng(0)
    for _ in range(2000):
        damaged = bytearray(whole)
        for at in generator.integers(0, len(whole), 3):
            damaged[at] = generator.integers(0, 256)
        with suppress(BundleError):
            refuse_external_data(bytes(damaged[: generator.integers(1, len(whole) + 1)]), "m")


# ------------------------------------------------------------------------ what two readers could read differently


def varint(value):
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def field(number, content, beyond=0):
    return varint((number << 3 | 2) + beyond) + varint(len(content)) + content


@pytest.mark.parametrize("beyond", [0, 1 << 32, 1 << 33, 1 << 34])
def test_a_field_number_beyond_32_bits_hides_nothing(linear, folder, beyond):
    """The runtime's reader keeps 32 bits of a tag: 14 + 2^29 is 14 to it, and it reads the file."""
    (folder / "w.bin").write_bytes(linear.weights.astype(np.float32).tobytes())
    model = linear.onnx()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    location = b"\x0a\x08location\x12\x05w.bin"
    evil = tensor.SerializeToString() + field(13, location, beyond) + varint((14 << 3) + beyond) + b"\x01"
    del model.graph.initializer[0]
    graph = model.graph.SerializeToString() + field(5, evil)
    model.ClearField("graph")
    data = model.SerializeToString() + field(7, graph)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    images = np.ones((1, *linear.images_shape), np.uint8)
    got = onnxruntime.InferenceSession(data, options).run(None, {"images": images})[0]
    np.testing.assert_array_equal(got[0], linear.weights.sum(0))  # so the runtime alone does read it
    with pytest.raises(BundleError, match="stored in another file|number is too large"):
        refuse_external_data(data, "m")


def test_a_length_beyond_32_bits_is_refused():
    with pytest.raises(BundleError, match="cut short"):
        refuse_external_data(b"\x3a" + varint(2**64 + 2) + b"\x10\x01", "m")


def test_a_model_in_the_runtimes_own_format_is_refused_also_where_it_looks_like_protobuf(linear, folder):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = "m.ort"
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(linear.onnx().SerializeToString(), options)
    data = (folder / "m.ort").read_bytes()
    for start in (data[:4], b"\x12\x80\x01\x00", b"\x12\x7f\x00\x00"):
        with pytest.raises(BundleError, match="own format"):
            refuse_external_data(start + data[4:], "m")


def test_an_operator_that_loads_a_compiled_engine_is_refused(linear):
    model = linear.onnx()
    model.graph.node.append(
        helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", ep_cache_context="../e")
    )
    with pytest.raises(BundleError, match="compiled engine"):
        refuse_external_data(model.SerializeToString(), "m")


def test_millions_of_empty_fields_are_not_walked(refusal_in_limits):
    graph = b"\x50\x00" * 5_000_000
    assert "500,000 fields" in refusal_in_limits(lambda: refuse_external_data(field(7, graph), "m"))


def test_a_name_that_is_no_text_is_a_bundle_error(linear):
    """Found by fuzzing: the runtime hands the name of an input over as it is in the file."""
    data = linear.onnx().SerializeToString().replace(b"images", b"\xfbmages")
    with pytest.raises(BundleError), OrtRunner(data, CPU_PROVIDER, 1, "m"):
        pass
