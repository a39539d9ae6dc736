"""OpenVINO, fp32 or bf16 (argument): its default would be bf16 wherever the CPU has it."""

import sys

import openvino as ov
from onnx_model import layer_model
from worker import Peer, serve


class OpenVINO(Peer):
    version = ov.__version__.split("-")[0]

    def __init__(self, dtype):
        self._precision, self._bytes = {"fp32": (ov.Type.f32, 4), "bf16": (ov.Type.bf16, 2)}[dtype]

    def size(self, weight):
        return self._bytes * weight.size

    def load(self, weight, factors, copies, threads):
        self._weight, self._factors, self._number, self._threads = weight, factors, copies, threads
        return self.size(weight)

    def calls(self, x):
        # A fixed batch: its plan of the product depends on it.
        core = ov.Core()
        model = core.read_model(layer_model(self._weight, self._factors, len(x)))
        options = {
            "INFERENCE_PRECISION_HINT": self._precision,
            "INFERENCE_NUM_THREADS": self._threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        return [self._call(core.compile_model(model, "CPU", options), x) for _ in range(self._number)]

    @staticmethod
    def _call(compiled, x):
        request = compiled.create_infer_request()
        request.set_input_tensor(ov.Tensor(x))

        def call():
            request.infer()
            return request.get_output_tensor()

        return call

    def result(self, returned):
        return returned.data


serve(OpenVINO(sys.argv[1]))
