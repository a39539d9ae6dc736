"""The CUDA kernels beside cuBLAS (torch's dense product) on one GPU; `make bench-gpu`.

    python benchmarks/gpu.py --json gpu.json
    python benchmarks/gpu.py --quick --no-decomposition
    MACKO=…/macko_spmv SPINFER=…/SpInfer python benchmarks/gpu.py --batches 1 8 16 32

MACKO (one row of x) and SpInfer (8, 16 and 32 rows, the fastest of its splits), from checkouts of their
repositories, multiply by an unstructured weight of as many parameters, in float16.

The calls of each contender are captured in a CUDA graph. The calls use different copies of the weight, as
many as fill four times the second-level cache. The contenders take turns; times are medians over the replays.
Before anything is timed, our output is compared with a product in float64, in units of √(Σ w² x²). The
effective bandwidth is the packed bytes over the time. Its share is relative to the bandwidth of torch's sum
of 1 GB in the same run.

Decomposition: `oats.decompose` against 80 full SVDs on the same GPU; one SVD is timed, times 80.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peers import gpu_sparse
from torch import Tensor, nn

from oats import decompose
from oats.bench.shapes import shapes_of
from oats.decomposition.budget import nnz_per_row, rank_for
from oats.format.bitmask import encode
from oats.kernels.cuda.availability import is_built
from oats.kernels.cuda.sparse_low_rank_linear import linear
from oats.kernels.keep_largest import keep_largest_in_rows
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear

LLAMA_70B = [(8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)]
QUICK = [(4096, 4096), (14336, 4096)]
BATCHES = [1, 2, 4, 8, 16, 32, 64, 256, 2048]
SPLITS = [1, 2, 4, 7]
"""Parts into which SpInfer's kernel splits the inputs; its own benchmark uses 1 to 7, by the shape."""
TOLERANCE = 2.0**-5

Call = Callable[[], Any]


def random_layer(d_out: int, d_in: int, compression: float, device: str) -> SparseLowRankLinear:
    """A layer of random values at rank ratio 0.25, in bfloat16."""
    rank = rank_for(d_out, d_in, compression, 0.25, "row")
    generator = torch.Generator(device).manual_seed(0)
    sparse = torch.randn(d_out, d_in, generator=generator, device=device)
    mask, values = encode(keep_largest_in_rows(sparse, nnz_per_row(d_in, compression, 0.25)))
    u = torch.randn(d_out, rank, generator=generator, device=device) / max(rank, 1) ** 0.5
    v = torch.randn(rank, d_in, generator=generator, device=device)
    tensors = {"mask": mask, "values": values, "low_rank_u": u, "low_rank_v": v}
    tensors = {name: t.bfloat16() if t.is_floating_point() else t for name, t in tensors.items()}
    return SparseLowRankLinear.from_canonical(tensors, d_in)


def worst_error(layer: SparseLowRankLinear, x: Tensor) -> float:
    """Largest error of our product on at most 64 rows, in units of √(Σ w² x²)."""
    return error_of(layer(x), x, layer.to_dense())


def error_of(y: Tensor, x: Tensor, weight: Tensor) -> float:
    """Largest error of `y`, the product of `x` and a dense weight, as in `worst_error`."""
    y, x, weight = y[:64].double(), x[:64].double(), weight.double()
    return float(((y - x @ weight.T) / (x.square() @ weight.square().T).sqrt()).abs().max())


def copies_of(nbytes: int, cache: int) -> int:
    """Number of copies of a weight that fill four times the second-level cache; 2 to 64."""
    return max(2, min(64, -(-4 * cache // nbytes)))


def sparse_peers(
    shape: tuple[int, int], compression: float, cache: int
) -> dict[str, tuple[list[int], list[gpu_sparse.Product], Tensor]]:
    """Peers whose checkouts the environment names → batches, products by copies of a weight, the weight."""
    checkouts = {name: Path(os.environ[name]) for name in ("MACKO", "SPINFER") if os.environ.get(name)}
    if not checkouts:
        return {}
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(*shape, generator=generator, device="cuda")
    count = nnz_per_row(shape[1], compression, 0.0)
    weight = keep_largest_in_rows(weight, count).half()
    copies = copies_of(2 * count * shape[0], cache)
    made: dict[str, tuple[list[int], list[gpu_sparse.Product], Tensor]] = {}
    for name, checkout in checkouts.items():
        try:
            if name == "MACKO":
                made["macko"] = [1], gpu_sparse.macko(checkout, weight, copies), weight
            else:
                for split, products in gpu_sparse.spinfer(checkout, weight, copies, SPLITS).items():
                    made[f"spinfer/{split}"] = [8, 16, 32], products, weight
        except (ValueError, OSError, subprocess.CalledProcessError) as reason:
            print(f"{name} is left out at {shape[0]} x {shape[1]}: {reason}")
    return made


def is_right(product: gpu_sparse.Product, x: Tensor, weight: Tensor) -> bool:
    """True if a peer computes its product within `TOLERANCE`."""
    try:
        return error_of(product(x), x, weight) < TOLERANCE
    except RuntimeError as reason:
        print(reason)
        return False


def milliseconds(contenders: dict[str, Sequence[Call]], rounds: int = 20) -> dict[str, float]:
    """Median time of a call of each contender; the contenders take turns."""
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for name, calls in contenders.items():
        for call in calls[:3]:
            call()
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for call in calls:
                call()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) / len(contenders[name]))
    return {name: statistics.median(own) for name, own in times.items()}


def read_bandwidth() -> float:
    """Bytes a second that torch's sum reads."""
    block = torch.ones(1 << 28, device="cuda")
    return block.nbytes / (milliseconds({"sum": [block.sum]})["sum"] / 1e3)


def product_rows(
    shapes: Sequence[tuple[int, int]], batches: Sequence[int], compression: float, device: str, cache: int
) -> list[dict[str, Any]]:
    """One row for each shape and batch."""
    rows = []
    for d_out, d_in in shapes:
        layer = random_layer(d_out, d_in, compression, device)
        assert layer.packed is not None
        copies = copies_of(layer.packed.nbytes, cache)
        weights = [layer.packed.clone() for _ in range(copies)]
        dense = [layer.to_dense() for _ in range(copies)]
        peers = sparse_peers((d_out, d_in), compression, cache)
        for batch in batches:
            x = torch.randn(batch, d_in, device=device).bfloat16()
            error = worst_error(layer, x)
            if not error < TOLERANCE:
                raise SystemExit(f"{d_out} x {d_in}, batch {batch}: the product is wrong by {error:.3g}")
            contenders: dict[str, Sequence[Call]] = {
                "oats": [functools.partial(linear, x, w, None, layer.spec) for w in weights],
                "cublas": [functools.partial(nn.functional.linear, x, w) for w in dense],
            }
            half = x.half()
            for name, (own_batches, products, weight) in peers.items():
                if batch not in own_batches:
                    continue
                if is_right(products[0], half, weight):
                    contenders[name] = [functools.partial(product, half) for product in products]
                else:
                    print(f"{name} is left out at {d_out} x {d_in}, batch {batch}: its product is wrong")
            times = milliseconds(contenders)
            rows.append(
                {
                    **{"d_out": d_out, "d_in": d_in, "rank": layer.rank, "nnz": layer.nnz, "batch": batch},
                    **{"bytes": layer.packed.nbytes, "error": error},
                    **{f"{name}_ms": time for name, time in times.items()},
                    "speedup": times["cublas"] / times["oats"],
                }
            )
            print(row_text(rows[-1]), flush=True)
    return rows


def row_text(row: dict[str, Any]) -> str:
    """A row as a line of text."""
    ours, dense = row["oats_ms"], row["cublas_ms"]
    others = ""
    for peer in ("macko", "spinfer"):
        own = [time for name, time in row.items() if name.startswith(peer) and name.endswith("_ms")]
        if own:
            others += f"   {peer} {min(own) * 1e3:>9.1f} µs {min(own) / ours:>5.2f} x"
    return (
        f"{row['d_out']:>6} x {row['d_in']:<6} batch {row['batch']:>5}   oats {ours * 1e3:>9.1f} µs   "
        f"cuBLAS bf16 {dense * 1e3:>9.1f} µs   {row['speedup']:>5.2f} x   "
        f"{row['bytes'] / ours / 1e6:>6.0f} GB/s" + others
    )


def seconds(call: Call) -> float:
    """Time of a second call, with the device idle before and after it."""
    call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def decomposition_rows(shapes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """Ours against 80 full SVDs."""
    rows = []
    for d_out, d_in in shapes:
        weight = torch.randn(d_out, d_in, device="cuda")
        moment = torch.rand(d_in, device="cuda") + 0.1
        own = seconds(lambda weight=weight, moment=moment: decompose(weight, moment))
        full = 80 * seconds(lambda weight=weight: torch.linalg.svd(weight, full_matrices=False))
        rows.append({"d_out": d_out, "d_in": d_in, "oats_s": own, "svd_80_s": full, "speedup": full / own})
        print(
            f"decompose {d_out} x {d_in}: {own:.2f} s, 80 full SVDs {full:.1f} s, {full / own:.0f} x",
            flush=True,
        )
    return rows


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two shapes")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--compression", type=float, default=0.5)
    parser.add_argument("--no-decomposition", action="store_true")
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    if not (torch.cuda.is_available() and is_built()):
        print("nothing was measured:", "no CUDA device" if is_built() else "oats._cuda is not built")
        sys.exit(0)
    properties = torch.cuda.get_device_properties(0)
    bandwidth = read_bandwidth()
    print(f"{properties.name}, torch {torch.__version__}; torch's sum reads {bandwidth / 1e9:.0f} GB/s")
    llama = [(shape.d_out, shape.d_in) for shape in shapes_of("llama-3-8b")]
    shapes = QUICK if arguments.quick else [*llama, *LLAMA_70B]
    products = product_rows(
        shapes, arguments.batches, arguments.compression, "cuda", properties.L2_cache_size
    )
    for row in products:
        row["bandwidth_share"] = row["bytes"] / (row["oats_ms"] / 1e3) / bandwidth
    at_one = [row for row in products if row["batch"] == 1]
    for row in at_one:
        print(f"{row['d_out']} x {row['d_in']}: {row['bandwidth_share']:.0%} of the bandwidth at batch 1")
    decompositions = [] if arguments.no_decomposition else decomposition_rows(shapes[:2])
    if arguments.json is not None:
        result = {
            **{"device": properties.name, "capability": f"{properties.major}.{properties.minor}"},
            **{"torch": torch.__version__, "cuda": torch.version.cuda, "read_bandwidth": bandwidth},
            **{"products": products, "decompositions": decompositions},
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
