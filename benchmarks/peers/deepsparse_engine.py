"""DeepSparse 1.8.0, fp32, zeros stored in the model: it finds them when it compiles."""

import os
import tempfile

os.environ["NM_DISABLE_ANALYTICS"] = "1"

import deepsparse
import numpy as np
from onnx_model import layer_model
from worker import Peer, serve


class DeepSparse(Peer):
    version = deepsparse.__version__
    most_copies = 16

    def size(self, weight):
        # Its own format is not public; this much it must hold.
        return 4 * int((weight != 0).sum())

    def load(self, weight, factors, copies, threads):
        self._weight, self._factors, self._number, self._threads = weight, factors, copies, threads
        return None

    def calls(self, x):
        x = np.ascontiguousarray(x)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "layer.onnx")
            with open(path, "wb") as file:
                file.write(layer_model(self._weight, self._factors, len(x)))
            engines = [
                deepsparse.Engine(path, batch_size=len(x), num_cores=self._threads)
                for _ in range(self._number)
            ]
        return [lambda e=e: e.run([x], val_inp=False)[0] for e in engines]


serve(DeepSparse())
