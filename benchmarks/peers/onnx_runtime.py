"""ONNX Runtime, fp32."""

import onnxruntime
from onnx_model import layer_model
from worker import Peer, serve


class ONNXRuntime(Peer):
    version = onnxruntime.__version__

    def size(self, weight):
        return weight.nbytes

    def load(self, weight, factors, copies, threads):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        model = layer_model(weight, factors, None)
        self._copies = [
            onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            for _ in range(copies)
        ]
        return weight.nbytes

    def calls(self, x):
        return [lambda s=s: s.run(None, {"x": x})[0] for s in self._copies]


serve(ONNXRuntime())
