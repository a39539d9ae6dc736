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
