"""A whole model of ours, driven as the peers are. Requests as in worker.py, with:

{"do": "load", "folder": a saved model, "runtime": "engine" or "transformers", …}
{"do": "load", "architecture": a configuration of transformers, "compression": a share or null,
 "values": "int8", "int4" or null, "head": true if its codes are wanted, "runtime": …, …}
"""

import time

import torch
from transformers import AutoConfig
from worker import answer

import oats
from oats.bench.model_speed import bytes_per_token
from oats.bench.random_model import random_model
from oats.checkpoint.loading import load_model
from oats.compression.head import quantize_head_
from oats.engine.engine import Engine
from oats.engine.most_likely import most_likely

loaded = {}


def load(request):
    torch.set_num_threads(request["threads"])
    if "folder" in request:
        model, _ = load_model(request["folder"])
    else:
        model = random_of(request)
    # Before the engine: it would keep what it points to.
    loaded.update(model=model, engine=None)
    if request["runtime"] == "engine":
        engine = Engine(model)
        if engine.reason is not None:
            raise RuntimeError(engine.reason)
        loaded["engine"] = engine
    return {"bytes_per_token": bytes_per_token(model)}


def random_of(request):
    config = None
    if request["compression"] is not None:
        config = oats.OatsConfig(compression=request["compression"], values=request["values"])
    model = random_model(AutoConfig.for_model(**request["architecture"]), config)
    if request["head"]:
        quantize_head_(model)
    return model


@torch.inference_mode()
def generate(request):
    make = in_transformers if loaded["engine"] is None else in_engine
    start = time.perf_counter()
    tokens, times = make(request["prompt"], request["new_tokens"])
    return {"seconds": [moment - start for moment in times], "tokens": tokens}


def in_engine(prompt, new_tokens):
    engine = loaded["engine"]
    text, made, times = engine.new(), [], []
    logits = engine.prefill(text, prompt)
    while True:
        made.append(most_likely(logits))
        times.append(time.perf_counter())
        if len(made) == new_tokens:
            engine.release(text)
            return made, times
        logits = engine.step([(text, made[-1:])])[0]


class Clock:
    """A streamer of transformers that notes when each token is there; the first call is the prompt."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def in_transformers(prompt, new_tokens):
    ids, clock = torch.tensor([prompt]), Clock()
    # With eos_token_id=None no token ends the text. `min_new_tokens` would cost a pass over the vocabulary.
    output = loaded["model"].generate(
        ids, attention_mask=torch.ones_like(ids), eos_token_id=None, max_new_tokens=new_tokens,
        do_sample=False, use_cache=True, streamer=clock,
    )  # fmt: skip
    return output[0, len(prompt) :].tolist(), clock.times[1:]


@torch.inference_mode()
def together(request):
    engine = loaded["engine"]
    texts = [engine.new() for _ in request["prompts"]]
    arrivals = [[] for _ in texts]
    last = []
    for text, prompt, times in zip(texts, request["prompts"], arrivals, strict=True):
        last.append(most_likely(engine.prefill(text, prompt)))
        times.append(time.perf_counter())
    for _ in range(request["new_tokens"] - 1):
        logits = engine.step([(text, [token]) for text, token in zip(texts, last, strict=True)])
        last = [most_likely(row) for row in logits]
        for times in arrivals:
            times.append(time.perf_counter())
    for text in texts:
        engine.release(text)
    return {"arrivals": arrivals}


answer("oats", oats.__version__, {"load": load, "generate": generate, "together": together})
