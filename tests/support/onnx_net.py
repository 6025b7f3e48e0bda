"""Small ONNX models, written node by node, before and after they are rewritten."""

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx_files import onnx_session

from cora_plugin.integrations.onnx.graph import Graph

RANDOM = np.random.default_rng(0)
STEP, ZERO = np.float32(0.02), np.uint8(0)


def normal(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


class Net:
    """An ONNX model of one input `x` and one output, written node by node."""

    def __init__(self, *shape):
        self.shape, self.nodes, self.constants = shape, [], []

    def __call__(self, kind, *inputs, **attributes):
        """Add a node; arrays among the inputs become initializers."""
        names = []
        for value in inputs:
            if not isinstance(value, str):
                name = f"c{len(self.constants)}"
                self.constants.append(numpy_helper.from_array(np.asarray(value), name))
                value = name
            names.append(value)
        output = f"y{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, names, [output], **attributes))
        return output

    def rounded(self, x, step=STEP, zero=ZERO, **axis):
        levels = self("QuantizeLinear", x, step, zero, **axis)
        return self("DequantizeLinear", levels, step, zero, **axis)

    def weight(self, values, low=-8, high=7):
        """Integers of few bits as Brevitas writes them."""
        clipped = self("Clip", values, np.int8(low), np.int8(high))
        scale = RANDOM.uniform(0.01, 0.02, len(values)).astype(np.float32)
        zero = np.zeros(len(values), np.int8)
        return self("DequantizeLinear", clipped, scale, zero, axis=0)

    def model(self):
        info = helper.make_tensor_value_info
        sizes = [f"size{n}" for n in range(len(self.shape) + 1)]
        graph = helper.make_graph(
            self.nodes,
            "net",
            [info("x", TensorProto.FLOAT, ["n", *self.shape])],
            [info(self.nodes[-1].output[0], TensorProto.FLOAT, sizes)],
            self.constants,
        )
        opset = [helper.make_opsetid("", 21)]
        return helper.make_model(graph, opset_imports=opset, ir_version=10)


def rewritten(model, *steps):
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    graph = Graph(copied)
    for step in steps:
        step(graph)
    return graph.finish()


def run(model, x, optimized=None):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if optimized is None:
        level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.graph_optimization_level = level
    else:
        options.optimized_model_filepath = str(optimized)
    session = onnx_session(model.SerializeToString(), options)
    return session.run(None, {"x": x})[0]


def assert_same(before, after, x, atol=1e-5):
    np.testing.assert_allclose(run(after, x), run(before, x), atol=atol)
