"""ONNX Runtime, fp32."""

import onnxruntime
from onnx_model import layer_model
from worker import Peer, serve


class ONNXRuntime(Peer):
    version = onnxruntime.__version__

    def size(self, weight):
        return weight.nbytes

    _pool = 0

    def load(self, weight, factors, copies, threads):
        # One pool for all copies: with one each, the threads of the others spin while one works.
        if self._pool != threads:
            onnxruntime.set_global_thread_pool_sizes(threads, 1)
            self._pool = threads
        options = onnxruntime.SessionOptions()
        options.use_per_session_threads = False
        options.log_severity_level = 3
        model = layer_model(weight, factors, None)
        self._copies = [
            onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            for _ in range(copies)
        ]
        return weight.nbytes

    def calls(self, x):
        return [lambda s=s: s.run(None, {"x": x})[0] for s in self._copies]


serve(ONNXRuntime())
