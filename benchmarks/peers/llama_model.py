"""A whole model in llama.cpp, through the bindings of llama-cpp-python.

{"do": "quantize", "source": "a.gguf", "file": "b.gguf", "type": "Q4_K_M",
 "embedding": number of a type or null, "pure": true or false}   {}, once b.gguf is written
{"do": "load", "file": "b.gguf", "threads": n, "context": n}                   {}
{"do": "generate", "prompt": [ids], "new_tokens": n}
                                         {"seconds": [after how many each new token was there]}
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
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = request["context"]
    parameters.n_threads = parameters.n_threads_batch = request["threads"]
    context = llama_cpp.llama_init_from_model(model, parameters)
    if not context:
        raise RuntimeError(f"cannot make a context for {request['file']}")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    loaded.update(context=context, vocabulary=vocabulary)
    return {}


def generate(request):
    context, vocabulary = loaded["context"], loaded["vocabulary"]
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    tokens, seconds = request["prompt"], []
    start = time.perf_counter()
    for _ in range(request["new_tokens"]):
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        status = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(tokens)))
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        logits = llama_cpp.llama_get_logits_ith(context, -1)
        tokens = [int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax())]
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds}


answer("llama.cpp", llama_cpp.__version__, {"quantize": quantize, "load": load, "generate": generate})
