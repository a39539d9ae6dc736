"""`oats.decompose` against the published algorithm: 80 alternations, each with a full SVD.

    python benchmarks/decomposition.py --random 1024x1024 2048x2048
    python benchmarks/decomposition.py --random 4096x14336 --no-exact --repeat 1
    python benchmarks/decomposition.py --model DIRECTORY --layer model.layers.8.mlp.up_proj.weight

The full alternation is timed with `torch.linalg.svd` in float32. Where 80 take longer than `--longest`
seconds, fewer are timed and the time is extrapolated, which the table marks with "≈". The error after 80 is
computed in full, from the eigenvectors of the Gram matrix in float64 (the same step), unless `--no-exact`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import oats
from oats.budget import nnz_per_row, rank_for
from oats.selection import keep_largest

PUBLISHED = 80
"""Alternations of arXiv 2409.13652."""


def full_svd(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation, as the published code takes it."""
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
    """Seconds of 80 alternations and how many were timed for it."""
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
    """Log-normal, one input in 97 a thousand times the rest: like the activations of transformers."""
    moment = torch.exp(torch.randn(d_in, generator=torch.Generator().manual_seed(1)))
    moment[::97] *= 1000
    return moment


def weights(shapes: list[str], model: Path | None, layers: list[str]) -> Iterator[tuple[str, Tensor]]:
    """What is asked for, one after the other."""
    for shape in shapes:
        d_out, d_in = map(int, shape.split("x"))
        yield "random", torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(0))
    if model is not None:
        from safetensors import safe_open

        with safe_open(model / "model.safetensors", framework="pt") as tensors:
            for names in layers:  # "a+b": side by side
                parts = [tensors.get_tensor(name).float() for name in names.split("+")]
                yield names, torch.cat(parts, dim=1)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--random", nargs="*", default=[], metavar="ROWSxCOLUMNS")
    parser.add_argument("--model", type=Path, help="a directory with model.safetensors")
    parser.add_argument("--layer", nargs="*", default=[], help="tensors of it")
    parser.add_argument("--compression", type=float, nargs="+", default=[0.3, 0.5, 0.6])
    parser.add_argument("--rank-ratio", type=float, default=0.25)
    parser.add_argument("--longest", type=float, default=10.0, help="seconds of full SVDs to time")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--no-exact", action="store_true", help="leave out the error after 80 full alternations"
    )
    arguments = parser.parse_args()

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; seconds and relative errors")
    print("| weight | shape | ρ | rank | 80 full SVDs | error | decompose | error | alternations | |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, weight in weights(arguments.random, arguments.model, arguments.layer):
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
