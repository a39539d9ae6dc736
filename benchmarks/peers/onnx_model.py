"""A layer as an ONNX model: zeros stored, IR version 8 and opset 13, which all runtimes read."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def layer_model(weight, factors, batch):
    """The serialised model ``y = x Wᵀ``, or ``y = x Wᵀ + (x Vᵀ) Uᵀ`` with the factors (U, V).

    `batch` None leaves it open.
    """
    nodes, tensors = [], []

    def product(x, matrix, y):
        name = f"weight_{y}"
        tensors.append(numpy_helper.from_array(np.ascontiguousarray(matrix.T), name))
        nodes.append(helper.make_node("MatMul", [x, name], [y]))

    if factors is None:
        product("x", weight, "y")
    else:
        u, v = factors
        product("x", weight, "sparse")
        product("x", v, "inner")
        product("inner", u, "low_rank")
        # Sum and not Add: DeepSparse 1.8.0 fails an assertion on the Add of two MatMuls.
        nodes.append(helper.make_node("Sum", ["sparse", "low_rank"], ["y"]))
    d_out, d_in = weight.shape
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch or "batch", d_in])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch or "batch", d_out])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    return model.SerializeToString()
