"""`oats.decompose` against the published algorithm: 80 alternations, each with a full SVD.

    python benchmarks/decomposition.py --random 1024x1024 2048x2048
    python benchmarks/decomposition.py --random 4096x14336 --no-exact --repeat 1
    python benchmarks/decomposition.py --weights DIRECTORY --layer model.layers.8.mlp.up_proj.weight
    python benchmarks/decomposition.py --model phi-3-mini --compression 0.5 [--method oats-hessian]
    python benchmarks/decomposition.py --random 512x512 --batch 2 8
    python benchmarks/decomposition.py --accuracy [--weights DIRECTORY]

The published algorithm is timed with `torch.linalg.svd` in float32. If 80 alternations take longer than
`--longest` seconds, fewer are timed, and the table marks the extrapolated time with "≈". The error after 80
alternations is computed in full, in float64, from the eigenvectors of the Gram matrix (the same step);
`--no-exact` leaves it out.

`--model` times the layers of one block of a model in `oats.bench.shapes`, on random weights, and multiplies
by the number of blocks. For `oats-hessian` the inputs mix a few directions. `--batch` times random weights of
one shape together, and one after the other. `--accuracy` compares final errors, not times, on many kinds of
layers, with products in float32 and in bfloat16.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import oats
import oats.decomposition.subspace
from oats.bench.shapes import shapes_of
from oats.decomposition.alternating import decompose_batch
from oats.decomposition.budget import nnz_per_row, rank_for
from oats.decomposition.methods import decompose_by_method, statistic_for
from oats.decomposition.selection import keep_largest

PUBLISHED = 80
"""Alternations of arXiv 2409.13652."""


def full_svd(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation, computed as in the published code."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def by_gram(matrix: Tensor, rank: int) -> Tensor:
    """The same from the eigenvectors of the smaller Gram matrix, in float64."""
    if len(matrix) > matrix.shape[1]:
        return by_gram(matrix.mT, rank).mT
    u = torch.linalg.eigh(matrix @ matrix.mT).eigenvectors[:, len(matrix) - rank :]
    return u @ (u.mT @ matrix)


def alternate(
    scaled: Tensor, rank: int, count: int, low_rank_step: Callable[[Tensor, int], Tensor], steps: int
) -> float:
    """The relative error after that many published alternations."""
    sparse = torch.zeros_like(scaled)
    for _ in range(steps):
        residual = scaled - low_rank_step(scaled - sparse, rank)
        sparse = keep_largest(residual.contiguous(), count)
    return float(torch.linalg.matrix_norm(residual - sparse) / torch.linalg.matrix_norm(scaled))


def timed_published(scaled: Tensor, rank: int, count: int, longest: float) -> tuple[float, int]:
    """Seconds of 80 alternations, and how many of them were timed."""
    start = time.perf_counter()
    alternate(scaled, rank, count, full_svd, 1)
    one = time.perf_counter() - start
    steps = min(PUBLISHED, int(longest / one))
    if steps < 2:
        return one * PUBLISHED, 1
    start = time.perf_counter()
    alternate(scaled, rank, count, full_svd, steps)
    return (time.perf_counter() - start) / steps * PUBLISHED, steps


def moments(d_in: int) -> Tensor:
    """Log-normal, one input in 97 times a thousand: like the activations of transformers."""
    moment = torch.exp(torch.randn(d_in, generator=torch.Generator().manual_seed(1)))
    moment[::97] *= 1000
    return moment


def normal(*shape: int, seed: int) -> Tensor:
    """Gaussian entries."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(d_out: int, d_in: int) -> Tensor:
    """Student's t with 3 degrees of freedom."""
    chi = sum(normal(d_out, d_in, seed=seed).square() for seed in (6, 7, 8))
    return normal(d_out, d_in, seed=5) / torch.as_tensor(chi / 3).sqrt()


def low_rank_plus(noise: float, d_out: int, d_in: int) -> Tensor:
    """An eighth of the full rank, plus Gaussian noise times `noise`."""
    inner = min(d_out, d_in) // 8
    product = normal(d_out, inner, seed=7) @ normal(inner, d_in, seed=8) / inner**0.5
    return product + noise * normal(d_out, d_in, seed=9)


def power_law(exponent: float, d_out: int, d_in: int) -> Tensor:
    """Singular values ``i ** -exponent``, random singular vectors."""
    inner = min(d_out, d_in)
    u, v = (torch.linalg.qr(normal(d, inner, seed=seed)).Q for d, seed in ((d_out, 3), (d_in, 4)))
    return (u * torch.arange(1, inner + 1).float() ** -exponent) @ v.T


KINDS: dict[str, Callable[[int, int], Tensor]] = {
    "gaussian": partial(normal, seed=0),
    "heavy-tailed": heavy_tailed,
    "low rank + 0.3": partial(low_rank_plus, 0.3),
    "low rank + 0.01": partial(low_rank_plus, 0.01),
    "power law ½": partial(power_law, 0.5),
    "power law 1": partial(power_law, 1.0),
    "power law 2": partial(power_law, 2.0),
}
SHAPES = [(384, 384), (256, 640), (640, 384)]


def decades(d_in: int, number: float) -> Tensor:
    """Moments spread evenly over `number` decades."""
    share = torch.rand(d_in, generator=torch.Generator().manual_seed(99))
    return torch.pow(10.0, number * (share - 0.5))


MOMENTS: dict[str, tuple[Callable[[int], Tensor], float]] = {
    "ones": (torch.ones, 0.5),
    "log-normal": (moments, 0.4),
    "6 decades": (partial(decades, number=6), 0.6),
}
"""Name → how to make second moments, and the compression to test them at."""

GEMMA = (
    "model.layers.2.self_attn.q_proj.weight",
    "model.layers.2.self_attn.k_proj.weight",
    "model.layers.9.self_attn.o_proj.weight",
    "model.layers.9.mlp.up_proj.weight",
    "model.layers.14.mlp.down_proj.weight",
    "model.layers.0.self_attn.v_proj.weight",
    "model.layers.17.mlp.gate_proj.weight",
)


def weights(shapes: list[str], model: Path | None, layers: list[str]) -> Iterator[tuple[str, Tensor]]:
    """The weights that the command line names."""
    for shape in shapes:
        d_out, d_in = map(int, shape.split("x"))
        yield "random", torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(0))
    if model is not None:
        from safetensors import safe_open

        with safe_open(model / "model.safetensors", framework="pt") as tensors:
            for names in layers:  # "a+b": side by side
                parts = [tensors.get_tensor(name).float() for name in names.split("+")]
                yield names, torch.cat(parts, dim=1)


def many_layers(model: Path | None) -> Iterator[tuple[str, Tensor, str]]:
    """Kind, weight, and a key of `MOMENTS`."""
    for shape in SHAPES:
        for kind, make in KINDS.items():
            for moment in MOMENTS:
                yield kind, make(*shape), moment
    for name, weight in weights([], model, list(GEMMA) if model else []):
        for moment in MOMENTS:
            yield name.removeprefix("model.layers.").removesuffix(".weight"), weight, moment


def compare_errors(model: Path | None, momenta: list[float], exact: bool) -> None:
    """Print one row a layer: final errors, relative to float32 products at the first momentum."""
    headings = [f"{dtype}, momentum {m:g}" for m in momenta for dtype in ("float32", "bfloat16")]
    print(f"| layer | shape | moments | ρ | 80 exact | {' | '.join(headings)} |")
    print("|---" * (5 + len(headings)) + "|")
    gaps: list[list[float]] = []
    for kind, weight, name in many_layers(model):
        make, compression = MOMENTS[name]
        moment = make(weight.shape[1])
        errors = []
        for momentum in momenta:
            for smallest in (weight.numel() + 1, 0):
                oats.decomposition.subspace.BFLOAT16_FROM = smallest
                result = oats.decompose(weight, moment, compression=compression, momentum=momentum)
                errors.append(result.relative_error)
        published = math.nan
        if exact:
            scaled = weight.double() * moment.double().sqrt()
            count = nnz_per_row(weight.shape[1], compression, 0.25)
            published = alternate(scaled, result.rank, count, by_gram, PUBLISHED)
        gaps.append([100 * (error / errors[0] - 1) for error in (published, *errors[1:])])
        cells = " | ".join(f"{gap:+.2f} %" for gap in gaps[-1][1:])
        shape = " × ".join(map(str, weight.shape))
        row = f"{kind} | {shape} | {name} | {compression} | {gaps[-1][0]:+.2f} % | {errors[0]:.5f} | {cells}"
        print(f"| {row} |", flush=True)
    for label, of in (("least", min), ("mean", statistics.mean), ("largest", max)):
        columns = [f"{of(column):+.2f} %" for column in zip(*gaps, strict=True)]
        print(f"| **{label} of {len(gaps)}** | | | | {columns[0]} | | {' | '.join(columns[1:])} |")


def correlated_hessian(d_in: int) -> Tensor:
    """The Hessian of inputs that mix a few directions with noise, scaled to the sizes of `moments`."""
    hessian = torch.zeros(d_in, d_in)
    for seed in range(4):
        tokens = normal(d_in, d_in // 2, seed=seed) + normal(d_in, 8, seed=4) @ normal(
            8, d_in // 2, seed=seed + 5
        )
        hessian.addmm_(tokens, tokens.T)
    size = moments(d_in).sqrt()
    return hessian.mul_(size).mul_(size[:, None])


def time_model(model: str, compressions: list[float], method: str) -> None:
    """Print one row for each layer of a block, and the time of all blocks."""
    layers = shapes_of(model)
    blocks = min(layer.count for layer in layers)
    takes_hessian = statistic_for(oats.OatsConfig(method=method)) == "hessians"
    print("| layer | shape | in a block | ρ | seconds each | error | alternations |")
    print("|---|---|---|---|---|---|---|")
    for compression in compressions:
        total = 0.0
        for layer in layers:
            weight = normal(layer.d_out, layer.d_in, seed=0)
            parts = weight.chunk(3) if layer.name == "qkv_proj" else (weight,)
            config = oats.OatsConfig(method=method, compression=compression)
            statistic = correlated_hessian(layer.d_in) if takes_hessian else moments(layer.d_in)
            start = time.perf_counter()
            results = [decompose_by_method(part, statistic, config) for part in parts]
            taken = (time.perf_counter() - start) / len(parts)
            number = layer.count // blocks * len(parts)
            total += taken * number
            print(
                f"| {layer.name} | {len(parts[0])} × {layer.d_in} | {number} | {compression} | {taken:.2f} | "
                f"{results[0].relative_error:.5f} | {results[0].iterations} |",
                flush=True,
            )
        print(
            f"\nOne block: {total:.1f} s. {blocks} blocks, extrapolated: {blocks * total / 60:.1f} minutes.\n"
        )


def time_batches(shapes: list[str], sizes: list[int], compressions: list[float], repeat: int) -> None:
    """Print one row a batch: seconds one after the other, seconds together, and the ratio."""
    print("| shape | batch | ρ | one by one | together | |")
    print("|---|---|---|---|---|---|")
    for shape in shapes:
        d_out, d_in = map(int, shape.split("x"))
        for size in sizes:
            batch = [normal(d_out, d_in, seed=seed) for seed in range(size)]
            moment, names = moments(d_in), [str(i) for i in range(size)]
            for compression in compressions:
                config = oats.OatsConfig(compression=compression)
                seconds: list[list[float]] = [[], []]
                for _ in range(repeat):
                    for taken, step in zip(seconds, (1, size), strict=True):
                        start = time.perf_counter()
                        for first in range(0, size, step):
                            part = slice(first, first + step)
                            decompose_batch(batch[part], [moment] * step, config, names[part])
                        taken.append(time.perf_counter() - start)
                alone, together = map(statistics.median, seconds)
                print(
                    f"| {d_out} × {d_in} | {size} | {compression} | {alone:.2f} | {together:.2f} | "
                    f"{alone / together:.2f} × |",
                    flush=True,
                )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--random", nargs="*", default=[], metavar="ROWSxCOLUMNS")
    parser.add_argument("--weights", type=Path, help="a directory with model.safetensors")
    parser.add_argument("--layer", nargs="*", default=[], help="tensors of it")
    parser.add_argument("--compression", type=float, nargs="+", default=[0.3, 0.5, 0.6])
    parser.add_argument("--rank-ratio", type=float, default=0.25)
    parser.add_argument("--longest", type=float, default=10.0, help="seconds of full SVDs to time")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--no-exact", action="store_true", help="leave out the error after 80 full alternations"
    )
    parser.add_argument("--model", help="a name in oats.bench.shapes: time one of its blocks")
    parser.add_argument("--batch", type=int, nargs="+", help="time so many at once against one by one")
    parser.add_argument("--method", choices=["oats", "oats-hessian"], default="oats", help="for --model")
    parser.add_argument("--accuracy", action="store_true", help="compare errors on many layers")
    parser.add_argument("--momentum", type=float, nargs="+", default=[0.9], help="for --accuracy")
    arguments = parser.parse_args()

    if arguments.accuracy:
        compare_errors(arguments.weights, arguments.momentum, not arguments.no_exact)
        return
    if arguments.model:
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
        time_model(arguments.model, arguments.compression, arguments.method)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; seconds and relative errors")
    if arguments.batch:
        time_batches(arguments.random, arguments.batch, arguments.compression, arguments.repeat)
        return
    print("| weight | shape | ρ | rank | 80 full SVDs | error | decompose | error | alternations | |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, weight in weights(arguments.random, arguments.weights, arguments.layer):
        d_out, d_in = weight.shape
        moment = moments(d_in)
        scaled = weight * moment.sqrt()
        for compression in arguments.compression:
            rank = rank_for(d_out, d_in, compression, arguments.rank_ratio, "row")
            count = nnz_per_row(d_in, compression, arguments.rank_ratio)
            published, steps = timed_published(scaled, rank, count, arguments.longest)
            error = math.nan
            if not arguments.no_exact:
                error = alternate(scaled.double(), rank, count, by_gram, PUBLISHED)
            times = []
            for _ in range(arguments.repeat):
                start = time.perf_counter()
                result = oats.decompose(
                    weight, moment, compression=compression, rank_ratio=arguments.rank_ratio
                )
                times.append(time.perf_counter() - start)
            taken = statistics.median(times)
            about = "" if steps == PUBLISHED else f"≈ (from {steps}) "
            print(
                f"| {name} | {d_out} × {d_in} | {compression} | {rank} | {about}{published:.1f} | "
                f"{error:.5f} | {taken:.2f} | {result.relative_error:.5f} | {result.iterations} | "
                f"{published / taken:.0f} × |",
                flush=True,
            )


if __name__ == "__main__":
    main()
