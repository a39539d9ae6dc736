"""Times each size of layer in a compressed model against torch's dense layer, for its report."""

from __future__ import annotations

from collections.abc import Callable

from oats.bench.contenders import Dtype, compressed, torch_dense
from oats.bench.layer_latency import Row, layer_rows
from oats.bench.shapes import LayerShape
from oats.checkpoint.config_json import parse_quantization_config
from oats.checkpoint.stored_model import StoredModel
from oats.inspection.anatomy import block_and_kind

BATCHES = (1, 16, 128)


def time_layers(model: StoredModel, progress: Callable[[int, int, str], None]) -> list[Row]:
    """Rows of every size of layer at each of `BATCHES`, on random weights; none for a dense model.

    `progress` is called as progress(sizes done, sizes in all, note).
    """
    if model.config is None or not model.layers:
        return []
    config = parse_quantization_config(model.config)[0]
    names: dict[tuple[int, int], dict[str, None]] = {}
    for layer in model.layers:
        names.setdefault((layer.d_out, layer.d_in), {})[block_and_kind(layer.name)[1]] = None
    dtype: Dtype = "fp32" if model.layers[0].dtype == "fp32" else "bf16"
    rows: list[Row] = []
    for done, ((d_out, d_in), kinds) in enumerate(names.items()):

        def say(note: str, done: int = done) -> None:
            progress(done, len(names), note)

        shape = LayerShape(", ".join(kinds), d_out, d_in)
        ours = [compressed(dtype, storage=model.layers[0].storage)]
        rows += layer_rows(shape, BATCHES, config, ours, [torch_dense(dtype)], progress=say)
    return rows
