"""The CUDA kernels and `oats.kernels.cuda`: emulated on the CPU, and on a device where there is one.

What every backend must do (products, selection) is in test_kernels.py.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import oats
from oats.compression.quantize import quantize_layer_
from oats.config import Storage
from oats.decomposition import selection
from oats.errors import ConfigError, DeviceError, FormatError
from oats.format.bitmask import decode
from oats.format.layer_spec import LayerSpec
from oats.kernels.cuda import availability, keep_largest, packing
from oats.kernels.cuda import sparse_low_rank_linear as product
from oats.kernels.keep_largest import keep_largest_in_rows
from oats.nn.semi_structured import SemiStructuredLinear, fits, use_semi_structured_
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear
from tests.backends import BACKENDS, EMULATED, Backend, needs_cuda
from tests.compiler import COMPILER
from tests.conftest import random_layer
from tests.cuda.emulation import ROOT, SOURCES, emulated, emulated_kernels
from tests.kernels.test_kernels import assert_close
from tests.scripts import load_script

CUDA_BACKENDS = BACKENDS[-2:]


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread):
    yield


def test_every_index_of_the_layout(tmp_path: Path) -> None:
    compiler = shutil.which(COMPILER)
    if compiler is None or not SOURCES.is_dir():
        pytest.skip(f"no C++ compiler ({COMPILER}), or no sources in {SOURCES}")
    program = tmp_path / "test_cells"
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-I", str(SOURCES)]
    subprocess.run([*command, str(ROOT / "tests/cuda/test_cells.cpp"), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_kernels_are_compiled_where_nvcc_is() -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc: the CUDA kernels are not compiled here")
    if os.environ.get("OATS_CUDA") == "0":
        pytest.skip("OATS_CUDA=0: the CUDA kernels are not compiled")
    assert availability.is_built(), "nvcc is there, but oats._cuda is not built; run pip install -e . again"
    spec = LayerSpec(100, 200, 3, 7000, torch.bfloat16)
    assert packing.packed_bytes(spec) == emulated_kernels().layout(*spec.sizes, 2)[5]


@pytest.mark.parametrize("backend", CUDA_BACKENDS, ids=str)
@pytest.mark.parametrize("shape", [(70, 200, 20, 0.4), (16, 64, 0, 1.0), (33, 2100, 40, 0.5)], ids=str)
def test_half_precision(backend: Backend, shape: tuple[int, int, int, float]) -> None:
    layer = random_layer(*shape, torch.float16)
    packed = backend.pack(layer)
    assert all(torch.equal(tensor, layer[name]) for name, tensor in packed.unpack().items())
    for batch in (1, 5, 16, 32, 40):
        x, bias = torch.randn(batch, shape[1]).half(), torch.randn(shape[0]).half()
        assert_close(packed.linear(x, bias), layer, x, bias)


@pytest.mark.parametrize("backend", CUDA_BACKENDS, ids=str)
def test_rows_of_x_lie_anywhere(backend: Backend) -> None:
    layer = random_layer(70, 128, 9, 0.4, torch.bfloat16)
    packed, memory = backend.pack(layer), torch.randn(9 * 400).bfloat16().to(backend.device)
    for stride, first, as_it_is in (
        ((128, 1), 0, True),
        ((192, 1), 8, True),
        ((0, 1), 0, True),
        ((128, 1), 3, False),
        ((129, 1), 0, False),
        ((1, 9), 0, False),
    ):
        x = memory.as_strided((9, 128), stride, first)
        with backend.active():
            y = product.linear(x, packed.tensor, None, packed.spec).cpu()
            assert (product._whole_cells(x) is x) == as_it_is
        assert_close(y, layer, x.cpu(), None)


@pytest.mark.parametrize("density", [0.03, 0.5, 0.8, 1.0])
def test_values_go_round_the_ring(density: float) -> None:
    # 16 tiles a warp: up to eight times what the ring holds.
    layer = random_layer(20, 8000, 5, density, torch.bfloat16)
    packed = EMULATED.pack(layer)
    with emulated(1):
        assert availability.compiled.plan(20, 8000, 5, 1, 1)[0] == 1
        for batch in (1, 12):
            x = torch.randn(batch, 8000).bfloat16()
            assert_close(product.linear(x, packed.tensor, None, packed.spec), layer, x, None)


@pytest.mark.parametrize("backend", CUDA_BACKENDS, ids=str)
def test_the_same_call_gives_the_same_bits(backend: Backend) -> None:
    # Enough inputs that blocks share a strip; the emulation runs threads in another order each time.
    layer = random_layer(40, 3000, 20, 0.4, torch.bfloat16)
    packed = backend.pack(layer)
    with backend.active():
        assert availability.compiled.plan(40, 3000, 20, 3, 400)[0] > 1
    for batch in (1, 12, 30):
        x = torch.randn(batch, 3000).bfloat16()
        first = packed.linear(x)
        assert all(torch.equal(packed.linear(x), first) for _ in range(3))


@pytest.mark.parametrize("backend", CUDA_BACKENDS, ids=str)
def test_nothing_depends_on_what_memory_held(backend: Backend) -> None:
    layer = random_layer(40, 3000, 20, 0.4, torch.bfloat16)
    packed, x = backend.pack(layer), torch.randn(40, 3000).bfloat16()
    expected = [packed.linear(x[:3]), packed.linear(x)]
    # Fills what is allocated with NaN, and bytes with 255.
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(backend.pack(layer).tensor, packed.tensor)
        assert torch.equal(packed.linear(x[:3]), expected[0]) and torch.equal(packed.linear(x), expected[1])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", CUDA_BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows_by_several_panels(backend: Backend, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(product, "PANEL_ELEMENTS", 32 * 210)
    # Sizes that are not multiples of 8: what fills them up must not be multiplied by what memory held.
    layer = random_layer(149, 190, 11, 0.4, dtype)
    packed = backend.pack(layer)
    x, bias = torch.randn(50, 190).to(dtype), torch.randn(149).to(dtype)
    assert_close(packed.linear(x, bias), layer, x, bias)
    assert_close(packed.linear(x), layer, x, None)


def test_dense_is_what_the_tensors_stand_for() -> None:
    layer = random_layer(70, 130, 9, 0.4, torch.bfloat16)
    # A kept value may be zero: the mask has it all the same.
    layer["values"][:50] = 0
    packed = EMULATED.pack(layer)
    assert torch.equal(packed.unpack()["values"], layer["values"])
    expected = decode(layer["mask"], layer["values"], 130).float()
    expected = expected.addmm(layer["low_rank_u"].float(), layer["low_rank_v"].float()).bfloat16()
    with emulated():
        assert torch.equal(product.to_dense(packed.tensor, packed.spec), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_is_laid_out_in_groups_of_rows(dtype: torch.dtype, monkeypatch) -> None:
    layer = random_layer(150, 330, 9, 0.4, dtype)
    whole = EMULATED.pack(layer)
    monkeypatch.setattr(packing, "GROUP_ELEMENTS", 3 * 16 * 384)
    packed = EMULATED.pack(layer)
    assert torch.equal(packed.tensor, whole.tensor)
    unpacked = packed.unpack()
    assert all(torch.equal(unpacked[name], tensor) for name, tensor in layer.items())


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose end is the end of the memory that may be touched; a byte behind it ends the process."""
    page = mmap.PAGESIZE
    size = -(-tensor.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + size), ctypes.c_size_t(page), 0) == 0
    room = torch.frombuffer(memory, dtype=torch.uint8, count=size)
    return room[size - tensor.nbytes :].view(tensor.dtype).view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize(
    "shape", [(5, 2100, 9, 0.7), (33, 64, 0, 1.0), (16, 1, 1, 1.0), (40, 200, 24, 0.1)], ids=str
)
def test_nothing_outside_the_buffers_is_touched(shape: tuple[int, int, int, float]) -> None:
    kernels, (d_out, d_in, rank, _) = emulated_kernels(), shape
    for dtype in product.DTYPES:
        layer = random_layer(*shape, dtype)
        packed = EMULATED.pack(layer)
        weight, sizes = guarded(packed.tensor), packed.spec.sizes
        name = product.DTYPES.index(dtype)
        out = guarded(torch.full((d_out, d_in), torch.nan).to(dtype))
        kernels.expand(weight.data_ptr(), *sizes, name, 0, d_out, out.data_ptr(), d_in, d_in, 0, 0)
        assert torch.equal(out, decode(layer["mask"], layer["values"], d_in))
        for batch in (1, 9, 32) if dtype != torch.float32 else ():
            bias, stride = guarded(torch.randn(d_out).to(dtype)), -(-d_in // 64) * 64
            wide = guarded(nn.functional.pad(torch.randn(batch, d_in), (0, stride - d_in)).to(dtype))
            x = wide[:, :d_in]
            y = guarded(torch.full((batch, d_out), torch.nan).to(dtype))
            splits, size = kernels.plan(d_out, d_in, rank, batch, 400)
            workspace = guarded(torch.full((max(size, 1),), 255, dtype=torch.uint8))
            arguments = (x.data_ptr(), batch, stride, bias.data_ptr(), y.data_ptr(), d_out, splits)
            kernels.sparse_low_rank_linear(
                weight.data_ptr(), *sizes, name, *arguments, workspace.data_ptr(), 0, 0
            )
            assert_close(y, layer, x, bias)


@pytest.mark.parametrize("columns", [3, 64, 65, 1000])
def test_selection_touches_nothing_outside_the_rows(columns: int) -> None:
    for dtype in (torch.float32, torch.float64):
        rows = torch.randn(7, columns, dtype=dtype).round()
        out = guarded(torch.full_like(rows, torch.nan))
        with emulated():
            keep_largest.keep_largest_in_rows(guarded(rows), 2, out)
        assert torch.equal(out, keep_largest_in_rows(rows, 2))


def test_more_than_two_to_the_31_elements() -> None:
    d_out, d_in, before, kept = 65_541, 65_600, 2**32 + 5, 2000
    spec = LayerSpec(d_out, d_in, 0, before + kept, torch.bfloat16)
    kernels = emulated_kernels()
    starts, masks, values, *_, size, _, _ = kernels.layout(*spec.sizes, 2)
    # Only what is touched takes memory.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, size + 128, flags)
    room = torch.frombuffer(memory, dtype=torch.uint8)
    packed = room[-room.data_ptr() % 128 :][:size]
    # The last strip, of five outputs, made as a weight of its own, and put at its place in the large one.
    dense = torch.zeros(5, d_in)
    dense.view(-1)[torch.randperm(5 * d_in)[:kept]] = torch.randn(kept).bfloat16().float() + 4
    mask, own = oats.format.bitmask.encode(dense)
    layer = {"mask": mask, "values": own.bfloat16()}
    layer |= {"low_rank_u": torch.zeros(5, 0).bfloat16(), "low_rank_v": torch.zeros(0, d_in).bfloat16()}
    small = EMULATED.pack(layer)
    with emulated():
        parts = packing.parts_of(small.tensor, small.spec)
    strips, tiles = -(-d_out // 16), -(-d_in // 64)
    place = (strips - 1) * tiles
    own_starts = packed[starts + 8 * place : starts + 8 * (place + tiles + 1)].view(torch.int64)
    own_starts.copy_(parts.starts + before)
    packed[masks + 128 * place : masks + 128 * (place + tiles)] = parts.masks
    packed[values + 2 * before : values + 2 * (before + kept)].view(torch.bfloat16).copy_(parts.values)

    only_block = ctypes.CDLL(kernels.__file__).emulate_only_block
    only_block.argtypes = [ctypes.c_int64]
    x = torch.randn(2, d_in).bfloat16()
    with emulated():
        found = product.expand(packed, spec, torch.empty(5, d_in).bfloat16(), 16 * (strips - 1))
        assert torch.equal(found.float(), dense.bfloat16().float())
        only_block(strips - 1)
        try:
            y = product.linear(x, packed, None, spec)[:, -5:]
        finally:
            only_block(-1)
    assert_close(y, layer, x, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_splitting_rows_is_keeping_and_what_is_left(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    for columns, count in ((65, 1), (300, 299), (700, 300), (1025, 512)):
        for rows in (
            torch.randn(5, columns, generator=g, dtype=dtype),
            torch.randn(5, columns, generator=g, dtype=dtype).round(),
        ):
            kept = keep_largest_in_rows(rows, count)
            left, out = rows.clone(), torch.empty_like(rows)
            with emulated():
                assert keep_largest.splits_in_one_pass(left, count, out)
                norms = keep_largest.split_largest_in_rows(left, count, out)
            assert torch.equal(out, kept) and torch.equal(left, rows - kept)
            expected = (rows - kept).double().norm(dim=1)
            torch.testing.assert_close(norms, expected, rtol=100 * torch.finfo(dtype).eps, atol=0)
    with emulated():
        square = torch.ones(700, 700)
        assert keep_largest.splits_in_one_pass(square, 300, square.clone())
        for rows, out in (
            (square.bfloat16(), square.bfloat16()),
            (square.T, square),
            (square, square.T),
            (square, square.double()),
            (square, square[:5]),
        ):
            assert not keep_largest.splits_in_one_pass(rows, 300, out)


def test_long_rows_are_selected_by_torch(monkeypatch) -> None:
    monkeypatch.setattr(keep_largest, "_LONG_ROW", 90)
    for rows in (torch.randn(3, 100), torch.randn(3, 100).round()):
        for count in (1, 40, 99):
            out = torch.empty_like(rows)
            with emulated():
                assert not keep_largest.splits_in_one_pass(rows, count, out)
                keep_largest.keep_largest_in_rows(rows, count, out)
            assert torch.equal(out, keep_largest_in_rows(rows, count))


def test_sizes_are_checked() -> None:
    packed = EMULATED.pack(random_layer(40, 56, 5, 0.4, torch.bfloat16))
    x, spec = torch.ones(2, 56).bfloat16(), packed.spec
    rest = spec.d_out, spec.rank, spec.nnz
    with emulated():
        assert product.checked_spec(x, packed.tensor, None, *rest) == spec
        for changed, error in [
            ((x.repeat(1, 2), packed.tensor, None, *rest), FormatError),
            ((x.double(), packed.tensor, None, *rest), ValueError),
            ((x.float(), packed.tensor, None, *rest), FormatError),
            ((x, packed.tensor[:-1], None, *rest), FormatError),
            ((x, packed.tensor.float(), None, *rest), FormatError),
            ((x, packed.tensor, torch.ones(39).bfloat16(), *rest), ValueError),
            ((x, packed.tensor, torch.ones(40), *rest), ValueError),
            ((x, packed.tensor.to("meta"), None, *rest), ValueError),
        ]:
            with pytest.raises(error, match=r"expected|is on"):
                product.checked_spec(*changed)


def unpacked(dtype: torch.dtype, storage: Storage | None = None) -> SparseLowRankLinear:
    layer = SparseLowRankLinear.from_canonical(random_layer(40, 64, 5, 0.4, dtype), 64)
    if storage is not None:
        quantize_layer_(layer, storage)
    made = SparseLowRankLinear(64, 40, 5, layer.nnz, False, dtype, storage=layer.storage)
    for name, tensor in layer.canonical().items():
        setattr(made, name, tensor)
    return made


def to_fake_cuda(layer: SparseLowRankLinear) -> SparseLowRankLinear:
    """In a FakeTensorMode: its tensors have no content, but say that they are on a CUDA device."""
    for name, tensor in layer.canonical().items():
        setattr(layer, name, torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda"))
    return layer


def test_without_kernels_a_cuda_tensor_is_a_clear_error(monkeypatch) -> None:
    monkeypatch.setattr(availability, "compiled", None)
    packed, layer = unpacked(torch.float32).pack_(), unpacked(torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer, x = to_fake_cuda(layer), torch.ones(2, 64, device="cuda")
        for call in (
            lambda: layer(x),
            lambda: layer.pack_("model.q_proj"),
            lambda: packed._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda")),
            lambda: selection.keep_largest(x, 2),
            lambda: selection.split_largest(x, 2, out=torch.empty_like(x)),
        ):
            with pytest.raises(DeviceError, match=r"OATS_CUDA=1 pip install .*OATS_CUDA_FALLBACK=dense"):
                call()
        with pytest.raises(ValueError, match="input is on cuda:0 but the layer on cpu"):
            packed(x)
    assert packed(torch.ones(1, 64)).shape == (1, 40)


@pytest.mark.parametrize("storage", [None, Storage("int4", "int8", 64)], ids=str)
def test_the_fallback_is_for_what_has_no_kernels(storage: Storage | None, monkeypatch) -> None:
    if storage is None:
        monkeypatch.setattr(availability, "compiled", None)
    layer = unpacked(torch.bfloat16, storage)
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer, x = to_fake_cuda(layer), torch.ones(2, 64, device="cuda").bfloat16()
        with pytest.raises(DeviceError, match="OATS_CUDA_FALLBACK=dense"):
            layer(x)
        assert not layer._computes_unpacked()
        monkeypatch.setenv("OATS_CUDA_FALLBACK", "dense")
        assert layer._computes_unpacked()
    monkeypatch.setenv("OATS_CUDA_FALLBACK", "yes")
    with pytest.raises(ConfigError, match="'yes', expected 'dense'"):
        availability.dense_fallback_wanted()


def test_the_fallback_is_the_same_product(monkeypatch) -> None:
    """The branch for a device without kernels, on the CPU."""
    layer = unpacked(torch.float32)
    monkeypatch.setattr(SparseLowRankLinear, "_computes_unpacked", lambda self: True)
    x = torch.randn(3, 64)
    assert_close(layer(x), layer.canonical(), x, None)
    assert layer.packed is None


def test_which_layers_suit_the_sparse_tensor_cores() -> None:
    config = oats.OatsConfig(pattern="2:4", compression=0.4)
    linear = nn.Linear(128, 64, dtype=torch.bfloat16)
    layer = SparseLowRankLinear.from_linear(linear, torch.ones(128), config)
    assert fits(layer) and layer.rank > 0
    rows = SparseLowRankLinear.from_linear(linear, torch.ones(128), oats.OatsConfig())
    narrow = SparseLowRankLinear.from_linear(nn.Linear(120, 64).bfloat16(), torch.ones(120), config)
    single = SparseLowRankLinear.from_linear(linear.float(), torch.ones(128), config)
    for other in (rows, narrow, single):
        assert not fits(other)
        with pytest.raises(DeviceError, match="not of the pattern 2:4"):
            SemiStructuredLinear(other)


@needs_cuda
def test_semi_structured_layers() -> None:
    config = oats.OatsConfig(pattern="2:4", compression=0.4)
    linear = nn.Linear(256, 128, dtype=torch.bfloat16)
    model = nn.Sequential(SparseLowRankLinear.from_linear(linear, torch.ones(256), config)).cuda()
    x = torch.randn(3, 7, 256, device="cuda").bfloat16()
    expected = model(x)
    assert use_semi_structured_(model) == 1
    torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)
    with pytest.raises(DeviceError, match="cannot be saved"):
        model.state_dict()


@needs_cuda
@pytest.mark.parametrize("batch", [1, 16, 100])
def test_a_product_in_a_graph(batch: int) -> None:
    layer = random_layer(300, 3000, 20, 0.4, torch.bfloat16)
    module = SparseLowRankLinear.from_canonical({k: v.cuda() for k, v in layer.items()}, 3000)
    x = torch.randn(batch, 3000, device="cuda").bfloat16()
    module(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, module(x))
        assert_close(y.cpu(), layer, x.cpu(), None)


@needs_cuda
def test_products_on_two_streams_at_once() -> None:
    layer = random_layer(64, 4096, 20, 0.4, torch.bfloat16)
    module = SparseLowRankLinear.from_canonical({k: v.cuda() for k, v in layer.items()}, 4096)
    inputs = [torch.randn(4, 4096, device="cuda").bfloat16() for _ in range(2)]
    expected = [module(x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    results: list[tuple[int, torch.Tensor]] = []
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results.append((i, module(inputs[i])))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected[i]) for i, y in results)


@pytest.fixture(scope="module")
def benchmark():
    path = ROOT / "benchmarks" / "gpu.py"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return load_script("benchmarks/gpu.py")


class InTiles:
    """A layer as it is on a CUDA device, for the emulated kernels."""

    def __init__(self, layer: SparseLowRankLinear) -> None:
        self.packed, self.spec = packing.pack(layer.canonical(), layer.spec), layer.spec
        self.rank, self.nnz = layer.rank, layer.nnz

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return product.linear(x, self.packed, None, self.spec)

    def to_dense(self) -> torch.Tensor:
        return product.to_dense(self.packed, self.spec)


def test_what_the_benchmark_compares(benchmark, monkeypatch) -> None:
    outputs: dict[str, list[torch.Tensor]] = {}

    def call_all(contenders):
        outputs.update({name: [call() for call in calls] for name, calls in contenders.items()})
        return {"oats": 0.5, "cublas": 1.0}

    made = benchmark.random_layer
    monkeypatch.setattr(benchmark, "random_layer", lambda *arguments: InTiles(made(*arguments)))
    monkeypatch.setattr(benchmark, "milliseconds", call_all)
    with emulated():
        rows = benchmark.product_rows([(64, 192)], [1, 40], 0.5, "cpu", 30_000)
    assert [row["batch"] for row in rows] == [1, 40] and all(row["speedup"] == 2 for row in rows)
    assert rows[0]["nnz"] == 64 * 72 and rows[0]["bytes"] > 2 * rows[0]["nnz"]
    ours, dense = (torch.stack(outputs[name]) for name in ("oats", "cublas"))
    assert len(ours) * rows[0]["bytes"] >= 4 * 30_000
    torch.testing.assert_close(ours, dense, rtol=0.05, atol=0.5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_benchmark_says_that_there_is_no_device(benchmark, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="0"):
        benchmark.main()
    assert "nothing was measured" in capsys.readouterr().out
