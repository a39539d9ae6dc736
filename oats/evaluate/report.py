"""Measured rows as JSON values, as Markdown, and what machine they were measured on."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from oats import __version__, ops
from oats.evaluate.latency import LeftOut, Row, Timing


def machine() -> dict[str, Any]:
    """What the numbers depend on.

    >>> sorted(machine())
    ['cores', 'cpu', 'isa', 'memory_gb', 'oats', 'system', 'threads', 'torch']
    """
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "isa": ops.active_isa(),
        "oats": __version__,
        "torch": torch.__version__,
    }


def to_dict(rows: Sequence[Row], left_out: Sequence[LeftOut], **more: Any) -> dict[str, Any]:
    """Everything that was measured, as plain JSON values."""
    return {
        "machine": machine(),
        **more,
        "rows": [row.to_dict() for row in rows],
        "left_out": [vars(item) for item in left_out],
    }


def markdown(rows: Sequence[Row], left_out: Sequence[LeftOut]) -> str:
    """Tables of medians, one for each layer, compression and dtype of ours: contenders by batch.

    A cell is the median in milliseconds; of a peer, in brackets, how many times as fast ours is.
    """
    facts = machine()
    versions = {_name(timing): timing.version for row in rows for timing in (row.peer, row.ours)}
    lines = [
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gb']:.0f} GB; {facts['threads']} threads; "
        f"{facts['system']}. Milliseconds of one call, median; in brackets how many times as fast the first "
        "line is. Read bandwidth in the same run: "
        + (
            f"{min(row.read_gb_per_s for row in rows):.0f}–{max(row.read_gb_per_s for row in rows):.0f} GB/s."
            if rows
            else "not measured."
        )
    ]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = (row.model, row.layer, row.d_out, row.d_in, row.compression, _name(row.ours))
        groups.setdefault(key, []).append(row)
    for (model, layer, d_out, d_in, compression, name), group in groups.items():
        batches = sorted({row.batch for row in group})
        title = f"{d_out} × {d_in}"
        if model:
            title = f"{model} {layer}, {title}"
        ours = group[0].ours
        lines += [
            "",
            f"**{title}**, compression {compression:g}: {name}, rank {ours.rank}, "
            f"density {ours.nnz / (d_out * d_in):.3f}",
            "",
            "| | weight | " + " | ".join(f"batch {batch}" if batch == batches[0] else str(batch) for batch in batches)
            + " |",
            "| --- | --- |" + " --- |" * len(batches),
        ]  # fmt: skip
        mine = {row.batch: f"**{_ms(row.ours)}**" for row in group}
        lines.append(_line(f"**{name}**", ours, mine, batches))
        peers: dict[str, list[Row]] = {}
        for row in group:
            peers.setdefault(_name(row.peer), []).append(row)
        for peer, peer_rows in peers.items():
            cells = {row.batch: f"{_ms(row.peer)} ({row.ratio:.2f} ×)" for row in peer_rows}
            lines.append(_line(peer, peer_rows[0].peer, cells, batches))
    lines += ["", "Versions: " + "; ".join(f"{name} {version}" for name, version in versions.items()) + "."]
    if left_out:
        lines += ["", "Left out:", ""]
        lines += [f"- {item.name} ({item.where}): {item.reason}" for item in left_out]
    return "\n".join(lines) + "\n"


def _line(name: str, timing: Timing, cells: dict[int, str], batches: Sequence[int]) -> str:
    weight = "–" if timing.weight_bytes is None else f"{timing.weight_bytes / 1e6:.1f} MB"
    return f"| {name} | {weight} | " + " | ".join(cells.get(batch, "") for batch in batches) + " |"


def _name(timing: Timing) -> str:
    form = {"oats": "", "dense": "", "unstructured": ", unstructured"}[timing.form]
    isa = f", {timing.isa}" if timing.isa else ""
    return f"{timing.name} {timing.dtype}{isa}{form}"


def _ms(timing: Timing) -> str:
    """Three significant digits, as milliseconds.

    >>> [f"{_digits(value)}" for value in (0.5678, 1.234, 12.34, 123.4)]
    ['0.568', '1.23', '12.3', '123']
    """
    return _digits(timing.ms.median)


def _digits(value: float) -> str:
    for limit, digits in ((1, 3), (10, 2), (100, 1)):
        if value < limit:
            return f"{value:.{digits}f}"
    return f"{value:.0f}"


def _cpu_name() -> str:
    """As Linux reports it, with the family that tells generations apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown CPU"
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    name = facts.get("model name", "unknown CPU")
    return f"{name} (family {facts.get('cpu family', '?')}, model {facts.get('model', '?')})"
