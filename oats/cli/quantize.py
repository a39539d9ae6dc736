"""``oats quantize DIR OUT``."""

from __future__ import annotations

from typing import Annotated

from typer import Option

import oats.cli.options as options
from oats.errors import ConfigError


def quantize(
    directory: options.CompressedModel,
    out: options.OutModel,
    values: Annotated[str, Option(help="How kept values are stored: int8 or int4 codes, or exact.")] = "int8",
    low_rank: Annotated[str, Option(help="The same for the low-rank factors: int8, or exact.")] = "int8",
    scale_columns: options.ScaleColumns = 128,
    head: options.Head = None,
    calibrate: Annotated[
        bool, Option("--calibrate", help="Fit codes to the layers' inputs: worth it for int4, takes longer.")
    ] = False,
    calibration: options.CalibrationText = None,
    samples: options.Samples = 64,
    length: options.Length = 512,
    overwrite: options.OverwriteModel = False,
    as_json: options.Json = False,
) -> None:
    """Store the values of a compressed model as int8 or int4 codes: fewer bytes, and faster for it.

    No calibration is needed. With --calibrate, or a --calibration text, the values after each code make up
    for its error, and each block is fitted to what the quantised blocks before it return.
    """
    from oats.checkpoint.loading import load_model
    from oats.checkpoint.record import Record
    from oats.checkpoint.saving import check_output, save_model
    from oats.checkpoint.stored_model import read_stored_model
    from oats.cli.console import human_bytes, print_json, progress_bar, results, settings_table, status
    from oats.compression.calibration_text import calibration_text
    from oats.compression.head import quantize_head_
    from oats.compression.quantize import quantize_
    from oats.compression.tokenization import calibration_sequences
    from oats.config import OatsConfig, Storage

    OatsConfig(head=head)  # type: ignore[arg-type]  # checks it
    storage = Storage.of(values, low_rank, scale_columns)  # type: ignore[arg-type]  # checks them
    check_output(out, overwrite=overwrite, source=directory)
    before = read_stored_model(directory)
    if not before.layers:
        raise ConfigError(f"{directory} has no layer that oats compressed; run `oats compress` first")
    record = Record.read(directory) or Record()
    with status(f"Loading {directory}"):
        model, tokenizer = load_model(directory, as_saved=True)
    if head:
        quantize_head_(model, scale_columns)
    windows, calibrated_on = None, {}
    if calibrate or calibration is not None:
        if tokenizer is None:
            raise ConfigError(f"{directory} takes images; leave the calibration text out")
        text = calibration_text(calibration)
        vocabulary = model.get_input_embeddings().num_embeddings
        windows = calibration_sequences(tokenizer, text, vocabulary, samples, length)
        calibrated_on = {**text.identity(), "samples": samples, "length": length}
    with progress_bar("Quantising") as bar:
        moved = quantize_(
            model, storage.values, storage.low_rank, storage.scale_columns,
            calibration=windows,
            progress=lambda done, total, name: bar.update(done, total, f"layers  {name}"),
        )  # fmt: skip
    errors = {name: error for name, error in moved.items() if error is not None}
    record = record.quantized(storage, errors, calibrated_on)
    with status(f"Saving {out}"):
        save_model(model, tokenizer, out, overwrite=overwrite, record=record, source=str(directory))
    after = read_stored_model(out)
    sizes, dense = (before.layer_bytes, after.layer_bytes), before.dense_bf16_bytes
    if as_json:
        print_json(
            out=str(out), layers=len(after.layers), layer_bytes_before=sizes[0], layer_bytes=sizes[1],
            share_of_dense_bf16=sizes[1] / dense, disk_bytes=after.disk_bytes,
        )  # fmt: skip
        return
    settings = {
        "written": str(out),
        "linear layers": f"{human_bytes(sizes[0])} to {human_bytes(sizes[1])}, "
        f"{sizes[1] / dense:.3f} of dense bf16",
        "on disk": f"{human_bytes(before.disk_bytes)} to {human_bytes(after.disk_bytes)}, all files",
    }
    results().print(settings_table(settings))
