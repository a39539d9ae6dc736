"""The line protocol that a peer is driven by, from inside the peer's own Python; only numpy is needed.

One JSON object a line, requests on stdin, replies on stdout:

    (at the start)                                              {"name": …, "version": …}
    {"do": "load", "weight": "w.npy", "factors": [] or ["u.npy", "v.npy"],
     "threads": n, "cycled_bytes": n}
                                                                {"weight_bytes": n or null, "copies": n}
    {"do": "output", "x": "x.npy", "y": "y.npy"}                {}, once y.npy is written
    {"do": "time", "calls": n, "warm_up": n}                    {"ms": [n floats]}
    (a request that failed)                                     {"error": "…"}

Arrays are float32, whatever the peer makes of them: weight (d_out, d_in) with its zeros stored, u (d_out,
r), v (r, d_in), x (batch, d_in), y (batch, d_out). Between requests the parent stops the process (SIGSTOP),
so that none of its threads spins.

What runs whole models (`answer`, and not `serve`) answers these. All times are of one clock, in seconds:

    {"do": "load", "threads": n, "context": n, …}               {"bytes_per_token": n or null}
    {"do": "generate", "prompt": [ids], "new_tokens": n}
                              {"seconds": [after how many each new token was there], "tokens": [new ids]}
    {"do": "together", "prompts": [[ids], …], "new_tokens": n}
                              {"arrivals": [[when each new token was there], …]}

`load` also says what to load, in the peer's own words. New tokens are the most likely ones, and no token
ends a text. `bytes_per_token` are of the weights that a token of one text reads.
"""

import ctypes
import json
import math
import os
import sys
import time
from abc import ABC, abstractmethod

import numpy as np


class Peer(ABC):
    """One way to compute ``y = x Wᵀ``."""

    version: str
    # Sessions and compiled graphs are heavy; of small layers no more than this many are made.
    most_copies = 64

    @abstractmethod
    def size(self, weight):
        """Bytes of the weight as the peer will hold it, at least: it decides how many copies are made."""

    @abstractmethod
    def load(self, weight, factors, copies, threads):
        """Hold `copies` of the weight; return the bytes that a call reads of one, None if not known.

        `factors` is None, or (U, V) for ``y = x Wᵀ + (x Vᵀ) Uᵀ``: only of peers started for that form.
        """

    @abstractmethod
    def calls(self, x):
        """For each copy, a function that computes the product with `x`: what is timed."""

    def result(self, returned):
        """What a call of the first copy returned as an array, (batch, d_out)."""
        return returned


def serve(peer):
    """Answer requests until stdin ends."""
    calls, done = [], 0

    def load(request):
        calls.clear()
        weight = np.load(request["weight"])
        factors = [np.load(path) for path in request["factors"]] if request["factors"] else None
        copies = min(math.ceil(request["cycled_bytes"] / peer.size(weight)), peer.most_copies)
        size = peer.load(weight, factors, copies, request["threads"])
        return {"weight_bytes": size, "copies": copies}

    def output(request):
        calls.clear()
        calls.extend(peer.calls(np.load(request["x"])))
        np.save(request["y"], np.asarray(peer.result(calls[0]()), dtype=np.float32))
        return {}

    def timed(request):
        nonlocal done
        taken = []
        for call in range(-request["warm_up"], request["calls"]):
            function = calls[done % len(calls)]
            done += 1
            start = time.perf_counter()
            function()
            seconds = time.perf_counter() - start
            if call >= 0:
                taken.append(1e3 * seconds)
        return {"ms": taken}

    answer(type(peer).__name__, peer.version, {"load": load, "output": output, "time": timed})


def answer(name, version, requests):
    """Answer requests until stdin ends; `requests` has a function from request to reply for each."""
    # Die with the parent, also while stopped by it (Linux: PR_SET_PDEATHSIG, SIGKILL).
    ctypes.CDLL(None).prctl(1, 9)
    # Libraries print to stdout what they like: it goes to stderr, and replies go to where stdout was.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(**fields):
        print(json.dumps(fields), file=replies, flush=True)

    reply(name=name, version=version)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] not in requests:
                raise ValueError(f"no request is called {request['do']!r}")
            fields = requests[request["do"]](request)
        except Exception as error:
            fields = {"error": f"{type(error).__name__}: {error}"[:2000]}
        reply(**fields)
