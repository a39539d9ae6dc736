"""A whole model in llama.cpp, through the bindings of llama-cpp-python. Requests as in worker.py, and:

{"do": "load", "file": "b.gguf", …}
{"do": "quantize", "source": "a.gguf", "file": "b.gguf", "type": "Q4_K_M",
 "embedding": number of a type or null, "pure": true or false}                {}, once b.gguf is written
"""

import ctypes
import time

import llama_cpp
import numpy as np
from worker import answer

quiet = llama_cpp.llama_log_callback(lambda level, text, _: None)
llama_cpp.llama_log_set(quiet, None)
llama_cpp.llama_backend_init()
loaded = {}
# Number of texts → a context that holds so many.
contexts = {}


def quantize(request):
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{request['type']}")
    parameters.allow_requantize, parameters.pure = True, request["pure"]
    if request["embedding"] is not None:
        parameters.token_embedding_type = parameters.output_tensor_type = request["embedding"]
    paths = [request[name].encode() for name in ("source", "file")]
    if llama_cpp.llama_model_quantize(*paths, ctypes.byref(parameters)) != 0:
        raise RuntimeError(f"cannot quantise {request['source']}")
    return {}


def load(request):
    model = llama_cpp.llama_model_load_from_file(
        request["file"].encode(), llama_cpp.llama_model_default_params()
    )
    if not model:
        raise RuntimeError(f"cannot load {request['file']}")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    loaded.update(request, model=model, vocabulary=vocabulary)
    context_of(1)
    return {"bytes_per_token": None}


def context_of(texts):
    """A context without tokens for so many texts."""
    if texts not in contexts:
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_seq_max, parameters.n_ctx = texts, texts * loaded["context"]
        parameters.n_batch = parameters.n_ctx
        parameters.n_threads = parameters.n_threads_batch = loaded["threads"]
        contexts[texts] = llama_cpp.llama_init_from_model(loaded["model"], parameters)
        if not contexts[texts]:
            raise RuntimeError(f"cannot make a context for {loaded['file']}")
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(contexts[texts]), True)
    return contexts[texts]


def decode(context, batch):
    status = llama_cpp.llama_decode(context, batch)
    if status != 0:
        raise RuntimeError(f"llama_decode returned {status}")


def most_likely(context, row):
    logits = llama_cpp.llama_get_logits_ith(context, row)
    return int(np.ctypeslib.as_array(logits, (loaded["vocabulary"],)).argmax())


def generate(request):
    context = context_of(1)
    pending, tokens, seconds = request["prompt"], [], []
    start = time.perf_counter()
    for _ in range(request["new_tokens"]):
        array = (llama_cpp.llama_token * len(pending))(*pending)
        decode(context, llama_cpp.llama_batch_get_one(array, len(pending)))
        tokens.append(most_likely(context, -1))
        pending = tokens[-1:]
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "tokens": tokens}


def together(request):
    prompts = request["prompts"]
    context = context_of(len(prompts))
    batch = llama_cpp.llama_batch_init(max(len(prompts), *map(len, prompts)), 0, 1)
    arrivals = [[] for _ in prompts]

    def fill(row, token, position, text, wanted):
        batch.token[row], batch.pos[row], batch.logits[row] = token, position, wanted
        batch.n_seq_id[row], batch.seq_id[row][0] = 1, text

    def arrived(text, row):
        arrivals[text].append(time.perf_counter())
        return most_likely(context, row)

    try:
        last = []
        for text, prompt in enumerate(prompts):
            for row, token in enumerate(prompt):
                fill(row, token, row, text, row == len(prompt) - 1)
            batch.n_tokens = len(prompt)
            decode(context, batch)
            last.append(arrived(text, -1))
        batch.n_tokens = len(prompts)
        for step in range(request["new_tokens"] - 1):
            for text, prompt in enumerate(prompts):
                fill(text, last[text], len(prompt) + step, text, True)
            decode(context, batch)
            last = [arrived(text, text) for text in range(len(prompts))]
    finally:
        llama_cpp.llama_batch_free(batch)
    return {"arrivals": arrivals}


requests = {"quantize": quantize, "load": load, "generate": generate, "together": together}
answer("llama.cpp", llama_cpp.__version__, requests)
