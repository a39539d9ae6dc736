"""Times ours, torch, and every installed peer on the same layers: `make bench` and `make bench-peers`.

    python benchmarks/run.py --out bench-results            # the shapes of docs/performance.md
    python benchmarks/run.py --out bench-results --quick    # 4096 × 4096 at four batches
    python benchmarks/run.py --out here --model phi-3-mini --no-peers

Prints the tables as Markdown. Writes the tables, all rows as JSON, and the pictures to the directory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from process import PeerError, PeerProcess

from oats.bench import plots, summary
from oats.bench.contenders import DTYPES, Contender, compressed, torch_dense
from oats.bench.layer_latency import LeftOut, Row, layer_rows
from oats.bench.random_layer import Form
from oats.bench.shapes import LayerShape, shapes_of
from oats.config import OatsConfig
from oats.errors import OatsError, OutputExistsError
from oats.kernels.isa import active_isa, available_isas

HERE = Path(__file__).resolve().parent

# Llama-3-8B and Llama-2-7B between them.
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096), (1024, 4096))
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 256, 512, 1024, 2048)
QUICK_BATCHES = (1, 4, 16, 128)
# Batch sizes of the peers: several of decoding, and one of a prompt.
PEER_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 128)
# More compressions for the comparison with unstructured pruning.
OTHER_COMPRESSIONS = (0.3, 0.4, 0.6, 0.7)
CODES: tuple[Literal["int8", "int4"], ...] = ("int8", "int4")
# Lower instruction sets, and sparse plus low rank on DeepSparse, run on the first shape only.
ISA_BATCHES = (1, 16, 128)


@dataclass(frozen=True)
class PeerKind:
    """How a peer is started.

    Attributes:
        environment: folder under .bench/ whose Python runs it; "" is the Python of this process.
        script: file in peers/, and its arguments.
        how: how to install it, for the line that says that it is missing.
    """

    name: str
    stored_dtype: str
    form: Form
    environment: str
    script: tuple[str, ...]
    how: str = "make bench-peers"


def peer_kinds(bench: Path, sparamx: str | None) -> list[PeerKind]:
    """All peers, installed or not. `bench` is the folder of their environments."""
    ggml = str(bench / "llama/build")
    kinds = [
        PeerKind("torch CSR", "fp32", "unstructured", "", ("torch_csr.py",)),
        PeerKind("scipy CSR", "fp32", "unstructured", "runtimes", ("scipy_csr.py",)),
        PeerKind("ONNX Runtime", "fp32", "dense", "runtimes", ("onnx_runtime.py",)),
        PeerKind("OpenVINO", "fp32", "dense", "runtimes", ("openvino_runtime.py", "fp32")),
        PeerKind("OpenVINO", "bf16", "dense", "runtimes", ("openvino_runtime.py", "bf16")),
        PeerKind("DeepSparse", "fp32", "unstructured", "deepsparse", ("deepsparse_engine.py",)),
        PeerKind("DeepSparse", "fp32", "oats", "deepsparse", ("deepsparse_engine.py",)),
        PeerKind("llama.cpp", "q8_0", "dense", "runtimes", ("ggml_matmul.py", ggml, "q8_0")),
        PeerKind("llama.cpp", "q4_k", "dense", "runtimes", ("ggml_matmul.py", ggml, "q4_k")),
    ]
    if sparamx is not None:
        script = ("sparamx.py", sparamx, str(bench / "sparamx"))
        kinds.append(PeerKind("SparAMX AVX", "bf16", "unstructured", "", script))
    return kinds


def start_peers(
    kinds: Sequence[PeerKind], bench: Path, batches: Sequence[int], left_out: list[LeftOut]
) -> list[PeerProcess]:
    """The peers that start. For the others, `left_out` gets the reason and how to install them."""
    peers = []
    for kind in kinds:
        python = bench / kind.environment / "bin/python" if kind.environment else Path(sys.executable)
        script, *arguments = kind.script
        name = f"{kind.name} {kind.stored_dtype}"
        if not python.exists():
            left_out.append(LeftOut(name, "everywhere", f"not installed; {kind.how} installs it"))
            continue
        command = [str(python), str(HERE / "peers" / script), *arguments]
        try:
            peers.append(
                PeerProcess(
                    kind.name, command, stored_dtype=kind.stored_dtype, form=kind.form, batches=batches
                )
            )
        except PeerError as error:
            left_out.append(LeftOut(name, "everywhere", f"{error}; {kind.how} installs it"))
    return peers


def main(arguments: Sequence[str] | None = None) -> int:
    """Run. The exit status is 1 if a result of ours is wrong, or nothing could be measured."""
    options = _parser().parse_args(arguments)
    if options.quick:
        options.shapes, options.batches = SHAPES[:1], QUICK_BATCHES
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    started = time.monotonic()
    rows: list[Row] = []
    left_out: list[LeftOut] = []
    failure = None
    # A run that SIGTERM ends writes its results so far, as one that is interrupted.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _prepare(options)
        _measure(options, rows, left_out)
    except (OatsError, KeyboardInterrupt) as error:
        failure = str(error) or "interrupted"
        print(f"\nbenchmarks: error: {failure}", file=sys.stderr)
    if not rows:
        return 1
    # Results from before a failure are written too.
    table = summary.markdown(rows, left_out)
    (options.out / "table.md").write_text(table)
    seconds = round(time.monotonic() - started)
    values = summary.to_dict(rows, left_out, seconds=seconds, failure=failure)
    (options.out / "rows.json").write_text(json.dumps(values, indent=1) + "\n")
    if options.plot:
        plots.draw(rows, options.out)
    print(table)
    print(f"{options.out}: table.md, rows.json{', pictures' if options.plot else ''}; {seconds} s")
    return 0 if failure is None else 1


def _prepare(options: argparse.Namespace) -> None:
    """Check now what would fail when the results are written."""
    for name in ("table.md", "rows.json"):
        if (options.out / name).exists():
            raise OutputExistsError(f"{options.out / name} exists; give another directory")
    if options.plot:
        plots.prepare(options.out)
    options.out.mkdir(parents=True, exist_ok=True)


def _measure(options: argparse.Namespace, rows: list[Row], left_out: list[LeftOut]) -> None:
    """Measure everything. Each row is added to `rows` at once, so that a failure loses nothing."""
    bench = options.environments.resolve()
    shapes: Sequence[LayerShape]
    if options.model is not None:
        shapes = shapes_of(options.model)
    else:
        shapes = [LayerShape(f"{d_out} x {d_in}", d_out, d_in) for d_out, d_in in options.shapes]
    config = OatsConfig(compression=options.compression, rank_ratio=options.rank_ratio)
    peer_batches = [batch for batch in options.batches if batch in PEER_BATCHES]
    peers: list[Contender] = []
    if options.peers:
        kinds = peer_kinds(bench, options.sparamx)
        if options.sparamx is None:
            how = "give --sparamx or SPARAMX the folder SparAMX of a checkout of its repository"
            left_out.append(LeftOut("SparAMX AVX bf16", "everywhere", how))
        if options.only:
            kinds = [kind for kind in kinds if any(part in kind.name.lower() for part in options.only)]
        _say("starting the peers")
        peers += start_peers(kinds, bench, peer_batches, left_out)
    peers = [*(torch_dense(dtype) for dtype in DTYPES), *peers]

    def timed(
        shape: LayerShape,
        batches: Sequence[int],
        config: OatsConfig,
        ours: Sequence[Contender],
        peers: Sequence[Contender],
    ) -> None:
        try:
            timings = layer_rows(
                shape, batches, config, ours, peers, model=options.model or "", seconds=options.seconds,
                repetitions=options.repetitions, left_out=left_out, progress=_say,
            )  # fmt: skip
            for row in timings:
                rows.append(row)
        finally:
            for contender in ours:
                contender.close()

    try:
        for number, shape in enumerate(shapes):
            ours = _ours(peer_batches if options.peers else [])
            if number == 0:
                lower = [isa for isa in available_isas() if isa not in (active_isa(), "scalar")]
                batches = [batch for batch in options.batches if batch in ISA_BATCHES]
                ours += [_at(compressed(dtype, isa=isa), batches) for isa in lower for dtype in DTYPES]
            # DeepSparse takes half a minute to compile one form for a large batch.
            shown = peers if number == 0 else [peer for peer in peers if peer.form != "oats"]
            timed(shape, options.batches, config, ours, shown)
        if options.peers and not options.quick:
            deepsparse = [peer for peer in peers if peer.name in ("torch", "DeepSparse")]
            for share in OTHER_COMPRESSIONS:
                ours = _ours(QUICK_BATCHES)
                budget = replace(config, compression=share)
                timed(shapes[0], QUICK_BATCHES, budget, ours, deepsparse)
    finally:
        for contender in peers:
            contender.close()


def _ours(unstructured_batches: Sequence[int]) -> list[Contender]:
    exact = [compressed(dtype) for dtype in DTYPES]
    codes = [compressed("bf16", storage=OatsConfig(values=values).storage) for values in CODES]
    plain = [_at(compressed(dtype, form="unstructured"), unstructured_batches) for dtype in DTYPES]
    return [*exact, *codes, *(plain if unstructured_batches else [])]


def _at(contender: Contender, batches: Sequence[int]) -> Contender:
    contender.batches = batches
    return contender


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="directory of the results")
    parser.add_argument("--model", help="the layer shapes of a model, such as llama-3-8b")
    parser.add_argument("--shapes", type=_shapes, default=SHAPES, help="such as 4096x4096,1024x4096")
    parser.add_argument("--batches", type=_whole_numbers, default=BATCHES, help="such as 1,4,16")
    parser.add_argument("--compression", type=float, default=0.5)
    parser.add_argument("--rank-ratio", type=float, default=0.25)
    parser.add_argument("--threads", type=int, help="of all contenders (default: torch's)")
    parser.add_argument("--repetitions", type=int, default=200, help="most timed calls of each")
    parser.add_argument("--seconds", type=float, default=0.4, help="seconds of timed calls of each, about")
    parser.add_argument("--quick", action="store_true", help="4096 x 4096 at batches 1, 4, 16, 128")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="ours and torch only")
    parser.add_argument("--only", type=lambda text: text.lower().split(","), help="peers with these names")
    parser.add_argument("--no-plot", dest="plot", action="store_false")
    parser.add_argument("--environments", type=Path, default=HERE.parent / ".bench", help="of the peers")
    parser.add_argument("--sparamx", default=os.environ.get("SPARAMX"), help="folder SparAMX of a checkout")
    return parser


def _shapes(text: str) -> list[tuple[int, int]]:
    pairs = [tuple(int(part) for part in shape.split("x")) for shape in text.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise argparse.ArgumentTypeError(f"shapes are d_out x d_in with commas between, got {text!r}")
    return [(pair[0], pair[1]) for pair in pairs]


def _whole_numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _say(note: str) -> None:
    """Show a note on one line of a terminal; nothing if stderr is a file."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{note[:width]:<{width}}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
