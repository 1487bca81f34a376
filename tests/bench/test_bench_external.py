from __future__ import annotations

from contextlib import suppress

import numpy as np
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
    in_subgraph,
    in_tensor_list,
    in_graph_list,
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
