"""A layer as an ONNX model: one MatMul, zeros stored, IR version 8 and opset 13, which all runtimes read."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def layer_model(weight, batch):
    """The serialised model ``y = x Wᵀ``; `batch` None leaves it open."""
    d_out, d_in = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch or "batch", d_in])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch or "batch", d_out])],
        [numpy_helper.from_array(np.ascontiguousarray(weight.T), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    return model.SerializeToString()
