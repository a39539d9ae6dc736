"""Measured rows as JSON values or as Markdown, with the machine that they were measured on."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from oats._version import __version__
from oats.bench.layer_latency import LeftOut, Row, Timing
from oats.kernels.isa import active_isa


def machine() -> dict[str, Any]:
    """The machine and versions that the numbers depend on.

    >>> sorted(machine())
    ['cores', 'cpu', 'isa', 'memory_gb', 'oats', 'system', 'threads', 'torch']
    """
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "isa": active_isa(),
        "oats": __version__,
        "torch": torch.__version__,
    }


def to_dict(rows: Sequence[Row], left_out: Sequence[LeftOut], **more: Any) -> dict[str, Any]:
    """All rows, as plain JSON values."""
    return {
        "machine": machine(),
        **more,
        "rows": [row.to_dict() for row in rows],
        "left_out": [vars(item) for item in left_out],
    }


def markdown(rows: Sequence[Row], left_out: Sequence[LeftOut]) -> str:
    """Tables of medians, a line for each contender, a table for each layer, compression and input dtype."""
    facts = machine()
    speeds = [row.read_gb_per_s for row in rows]
    others = max((row.others for row in rows), default=math.nan)
    lines = [
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gb']:.0f} GB, {facts['system']}; "
        f"{facts['threads']} threads; instruction set {facts['isa']}. "
        + (f"Memory read at {min(speeds):.0f} to {max(speeds):.0f} GB/s in this run; " if speeds else "")
        + f"other processes took {others:.0%} of the CPUs at most.",
        "",
        "Milliseconds of one call, medians of calls in turn; in brackets how many times as fast as this line "
        "the first line is. \\*: the 90th percentile is more than 1.5 × the median.",
    ]
    tables: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = (row.model, row.layer, row.d_out, row.d_in, row.compression, row.ours.input_dtype)
        tables.setdefault(key, []).append(row)
    for table in tables.values():
        lines += ["", *_table(table)]
    if any(row.peer.name == "DeepSparse" for row in rows):
        lines += ["", *_against_unstructured(rows)]
    versions = {timing.name: timing.version for row in rows for timing in (row.ours, row.peer)}
    lines += ["", "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."]
    if left_out:
        lines += ["", "Left out:", ""]
        lines += [f"- {item.name} ({item.where}): {item.reason}" for item in left_out]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row]) -> list[str]:
    first = rows[0]
    batches = sorted({row.batch for row in rows})
    timings: dict[str, dict[int, Timing]] = {}
    for row in rows:
        timings.setdefault(row.ours.label, {})[row.batch] = row.ours
    for row in rows:
        timings.setdefault(row.peer.label, {})[row.batch] = row.peer
    shape = f"{first.d_out} × {first.d_in}"
    named = f"{first.model} {first.layer}, {shape}" if first.model else shape
    lines = [
        f"**{named}**, {first.compression:.0%} removed, {first.ours.input_dtype}: rank {first.ours.rank}, "
        f"density {first.ours.nnz / (first.d_out * first.d_in):.3f}",
        "",
        "| | MB | batch " + " | ".join(str(batch) for batch in batches) + " |",
        "| --- | --- |" + " --- |" * len(batches),
    ]
    main = timings[first.ours.label]
    for label, by_batch in timings.items():
        size = next(iter(by_batch.values())).weight_bytes
        cells = []
        for batch in batches:
            if batch not in by_batch:
                cells.append("")
            elif by_batch is main:
                cells.append(f"**{_ms(by_batch[batch])}**")
            else:
                ratio = by_batch[batch].ms.median / main[batch].ms.median
                cells.append(f"{_ms(by_batch[batch])} ({ratio:.2f})")
        name = f"**{label}**" if by_batch is main else label
        megabytes = "–" if size is None else f"{size / 1e6:.1f}"
        lines.append(f"| {name} | {megabytes} | " + " | ".join(cells) + " |")
    return lines


def _against_unstructured(rows: Sequence[Row]) -> list[str]:
    """The comparison of arXiv 2409.13652, section 4: OATS and unstructured pruning, same compression."""
    found: dict[tuple[Any, ...], dict[tuple[str, str, str], Timing]] = {}
    for row in rows:
        case = found.setdefault((row.d_out, row.d_in, row.compression, row.batch), {})
        for timing in (row.ours, row.peer):
            if timing.form != "dense":
                case.setdefault((timing.name, timing.dtype, timing.form), timing)
    engines = [("DeepSparse", "fp32"), ("oats", "fp32"), ("oats", "bf16")]
    engines = [e for e in engines if any((*e, "unstructured") in case for case in found.values())]
    lines = [
        "**Sparse plus low-rank against unstructured** at the same compression, each on DeepSparse and here; "
        "in brackets how many times as fast as unstructured OATS is on the same engine",
        "",
        "| layer | removed | batch | "
        + " | ".join(f"{name} {dtype} unstructured | OATS" for name, dtype in engines)
        + " |",
        "| --- | --- | --- |" + " --- | --- |" * len(engines),
    ]
    for (d_out, d_in, compression, batch), case in found.items():
        cells = []
        for engine in engines:
            plain, low_rank = case.get((*engine, "unstructured")), case.get((*engine, "oats"))
            ratio = f" ({plain.ms.median / low_rank.ms.median:.2f})" if plain and low_rank else ""
            cells += [_ms(plain) if plain else "", _ms(low_rank) + ratio if low_rank else ""]
        if any(case.get((*engine, "unstructured")) for engine in engines):
            lines.append(f"| {d_out} × {d_in} | {compression:.0%} | {batch} | " + " | ".join(cells) + " |")
    return lines


def _ms(timing: Timing) -> str:
    return _digits(timing.ms.median) + ("\\*" if timing.ms.is_wide else "")


def _digits(value: float) -> str:
    """Three significant digits, with trailing zeros.

    >>> [_digits(value) for value in (0.5678, 1.2, 12.34, 123.4)]
    ['0.568', '1.20', '12.3', '123']
    """
    for limit, digits in ((1, 3), (10, 2), (100, 1)):
        if value < limit:
            return f"{value:.{digits}f}"
    return f"{value:.0f}"


def _cpu_name() -> str:
    """The name that Linux gives, with family and model numbers, which tell generations apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown CPU"
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    name = facts.get("model name", "unknown CPU")
    return f"{name} (family {facts.get('cpu family', '?')}, model {facts.get('model', '?')})"
