from collections.abc import Sequence
from typing import Literal

class WeightShape:
    d_out: int
    d_in: int
    rank: int
    nnz: int
    value_bytes: int
    values: Literal["exact", "int8", "int4"]
    factors: Literal["exact", "int8"]
    scale_columns: int
    masked: bool

    def __init__(
        self,
        *,
        d_out: int,
        d_in: int,
        rank: int,
        nnz: int,
        value_bytes: int,
        values: str,
        factors: str,
        scale_columns: int,
        masked: bool,
    ) -> None: ...

def best_isa() -> str: ...
def active_isa() -> str: ...
def isa_names() -> list[str]: ...
def release_threads() -> None: ...
def mask_population(mask: int, d_out: int, d_in: int, /) -> int: ...
def packed_bytes(shape: WeightShape, isa: str, /) -> int: ...
def pack(shape: WeightShape, tensors: dict[str, int], isa: str, out: int, threads: int, /) -> None: ...
def packed_header(packed: int, bytes: int, /) -> tuple[WeightShape, str]: ...
def unpack(packed: int, tensors: dict[str, int], threads: int, /) -> None: ...
def read_sparse_rows(packed: int, rows: int, count: int, out: int, threads: int, /) -> None: ...
def sparse_low_rank_linear(
    packed: int, x: int, batch: int, x_stride: int, bias: int, y: int, y_stride: int, threads: int, /
) -> None: ...
def sparse_low_rank_linears(
    projections: tuple[int, ...], x: int, batch: int, x_stride: int, threads: int, /
) -> None: ...
def set_activation_codes(int8: bool, /) -> None: ...
def activation_codes() -> bool: ...
def rms_norm(
    x: int,
    rows: int,
    columns: int,
    weight: int,
    eps: float,
    one_plus: bool,
    value_bytes: int,
    y: int,
    threads: int,
    /,
) -> None: ...
def keep_largest_in_rows(
    rows: int, number: int, columns: int, count: int, value_bytes: int, out: int, threads: int, /
) -> None: ...

# The decoder (oats/engine/native.py fills it in); addresses are those of tensors that outlive it.

page_tokens: int

class Gate:
    none: Gate
    silu: Gate
    gelu: Gate
    gelu_tanh: Gate
    relu: Gate

class DecoderLinear:
    def __init__(self, *, d_out: int, d_in: int, packed: int = 0, dense: int = 0, bias: int = 0) -> None: ...

class DecoderNorm:
    def __init__(self, *, weight: int = 0, eps: float = 0.0, one_plus: bool = False) -> None: ...

class Rope:
    def __init__(self, frequencies: Sequence[float], scale: float) -> None: ...

class DecoderExpert:
    def __init__(self, gate_up: Sequence[DecoderLinear], down: DecoderLinear) -> None: ...

class DecoderExperts:
    def __init__(
        self,
        *,
        router: Sequence[DecoderLinear],
        each: Sequence[DecoderExpert],
        chosen: int,
        normalised: bool,
        shared: bool,
    ) -> None: ...

class DecoderLayer:
    before_attention: DecoderNorm
    after_attention: DecoderNorm
    before_mlp: DecoderNorm
    after_mlp: DecoderNorm
    q_norm: DecoderNorm
    k_norm: DecoderNorm
    qkv: Sequence[DecoderLinear]
    attention_out: DecoderLinear
    gate_up: Sequence[DecoderLinear]
    down: DecoderLinear
    experts: DecoderExperts
    heads: int
    kv_heads: int
    head_dim: int
    attention_scale: float
    attention_softcap: float
    window: int
    rope: int
    cache: int
    cache_layer: int
    gate: Gate
    gated: bool

class DecoderModel:
    embedding_scale: float
    residual_scale: float
    logits_scale: float
    logits_softcap: float
    layers: Sequence[DecoderLayer]
    ropes: Sequence[Rope]
    final_norm: DecoderNorm
    head: DecoderLinear
    def __init__(
        self, *, value_bytes: int, hidden: int, vocabulary: int, embedding: int = 0, packed_embedding: int = 0
    ) -> None: ...

class DecoderSequence:
    def __init__(
        self,
        first_row: int,
        rows: int,
        start: int,
        pages: Sequence[Sequence[int]],
        ropes: Sequence[Rope] = (),
    ) -> None: ...

def most_likely(logits: int, n: int, value_bytes: int) -> int: ...

class Decoder:
    def __init__(self, model: DecoderModel) -> None: ...
    def step(
        self,
        tokens: Sequence[int],
        sequences: Sequence[DecoderSequence],
        caches: Sequence[tuple[int, int, int]],
        logits_rows: Sequence[int],
        logits: int,
        threads: int,
    ) -> None: ...
