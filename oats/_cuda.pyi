max_columns: int
max_group: int
cell_rows: int
cell_columns: int

def layout(d_out: int, d_in: int, rank: int, nnz: int, value_bytes: int) -> tuple[int, ...]: ...
def plan(d_out: int, d_in: int, rank: int, batch: int, multiprocessors: int, /) -> tuple[int, int]: ...
def sparse_low_rank_linear(
    packed: int,
    d_out: int,
    d_in: int,
    rank: int,
    nnz: int,
    dtype: int,
    x: int,
    batch: int,
    x_stride: int,
    bias: int,
    y: int,
    y_stride: int,
    splits: int,
    workspace: int,
    stream: int,
    capability: int,
    /,
) -> None: ...
def expand(
    packed: int,
    d_out: int,
    d_in: int,
    rank: int,
    nnz: int,
    dtype: int,
    first: int,
    rows: int,
    out: int,
    out_stride: int,
    columns: int,
    stream: int,
    capability: int,
    /,
) -> None: ...
def keep_largest_in_rows(
    rows: int,
    number: int,
    columns: int,
    count: int,
    value_bytes: int,
    out: int,
    squares: int,
    stream: int,
    capability: int,
    /,
) -> None: ...
