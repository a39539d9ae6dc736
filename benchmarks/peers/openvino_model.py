"""A whole model in OpenVINO GenAI. Requests as in worker.py, with:

{"do": "load", "folder": what optimum-cli wrote, "precision": "f32", or null for the program's own choice, …}
"""

import time
from itertools import count

import numpy as np
import openvino
import openvino_genai as genai
from worker import answer

loaded = {}
request_ids = count()


class Clock(genai.StreamerBase):
    """Notes when each token is there."""

    def __init__(self):
        super().__init__()
        self.times = []

    def write(self, token):
        self.times += [time.perf_counter()] * (1 if isinstance(token, int) else len(token))
        return genai.StreamingStatus.RUNNING

    def end(self):
        pass


def load(request):
    properties = {"INFERENCE_NUM_THREADS": request["threads"]}
    if request["precision"] is not None:
        properties["INFERENCE_PRECISION_HINT"] = request["precision"]
    loaded.update(request, properties=properties)
    loaded["pipeline"] = genai.LLMPipeline(
        request["folder"], "CPU", scheduler_config=scheduler(request["context"]), **properties
    )
    return {"bytes_per_token": bytes_per_token(f"{request['folder']}/openvino_model.xml")}


def scheduler(tokens):
    """Settings for steps of at most so many tokens.

    The pipeline's own settings keep the prompts that it has seen: the second time, most of one is skipped.
    """
    made = genai.SchedulerConfig()
    made.enable_prefix_caching, made.max_num_batched_tokens = False, tokens
    return made


def bytes_per_token(file):
    """Of all weights, but for an embedding that is nothing else: one row of it is read."""
    model = openvino.Core().read_model(file)
    constants = [op for op in model.get_ops() if op.get_type_name() == "Constant"]
    return sum(op.get_byte_size() for op in constants if uses(op) != {"Gather"})


def uses(op):
    """Types of the operations that read a weight, after those that make numbers of its codes."""
    decoding = {"Convert", "Subtract", "Multiply", "Reshape"}
    found, waiting = set(), [op]
    while waiting:
        for output in waiting.pop().outputs():
            for reader in output.get_target_inputs():
                node = reader.get_node()
                if node.get_type_name() in decoding and not is_computed(node):
                    waiting.append(node)
                else:
                    found.add(node.get_type_name())
    return found


def is_computed(node):
    """True if it depends on what the model is called with."""
    if node.get_type_name() in ("Parameter", "ReadValue"):
        return True
    return any(is_computed(value.get_node()) for value in node.input_values())


def settings(new_tokens):
    made = genai.GenerationConfig()
    made.max_new_tokens, made.ignore_eos, made.do_sample = new_tokens, True, False
    return made


def ids_of(prompt):
    return openvino.Tensor(np.array([prompt], dtype=np.int64))


def generate(request):
    ids = ids_of(request["prompt"])
    inputs = genai.TokenizedInputs(ids, ids_of([1] * len(request["prompt"])))
    clock = Clock()
    start = time.perf_counter()
    result = loaded["pipeline"].generate(inputs, settings(request["new_tokens"]), clock)
    return {"seconds": [moment - start for moment in clock.times], "tokens": list(result.tokens[0])}


def together(request):
    if "batching" not in loaded:
        loaded["batching"] = genai.ContinuousBatchingPipeline(
            loaded["folder"], scheduler(loaded["context"]), "CPU", loaded["properties"]
        )
    pipeline, made = loaded["batching"], settings(request["new_tokens"])
    texts = [pipeline.add_request(next(request_ids), ids_of(prompt), made) for prompt in request["prompts"]]
    arrivals = [[] for _ in texts]
    while pipeline.has_non_finished_requests():
        pipeline.step()
        now = time.perf_counter()
        for times, text in zip(arrivals, texts, strict=True):
            if text.can_read():
                times += [now] * sum(len(output.generated_ids) for output in text.read().values())
    return {"arrivals": arrivals}


answer("OpenVINO GenAI", genai.__version__, {"load": load, "generate": generate, "together": together})
