"""Train a small vision transformer on Fashion-MNIST, compress it with several methods, compare accuracies.

    python examples/vision.py                 # a ViT
    python examples/vision.py --model dinov2  # the structure of DINOv2, with SwiGLU as in its largest model

The images come from Debian's package dataset-fashion-mnist, or from four idx files in ``--data``. The images,
the trained model, the finished cells of the table, a compressed model and the pictures stay in ``.demo/``. A
second run continues one that was stopped.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2ForImageClassification, ViTConfig, ViTForImageClassification
from transformers.utils import logging

import oats
from oats.checkpoint.atomic import write_text
from oats.checkpoint.saving import save_model
from oats.cli.compare import print_table
from oats.cli.console import progress_bar, results
from oats.evaluate import comparison, comparison_plot
from oats.evaluate.cells import Cell, Cells
from oats.evaluate.comparison_table import format_score, markdown
from oats.inspection import rollout
from oats.integrations.vision import load_vision_model
from oats.kernels.isa import active_isa

DEMO = Path(__file__).parent.parent / ".demo"
FILES = {
    ("train", "images"): "train-images-idx3-ubyte.gz",
    ("train", "labels"): "train-labels-idx1-ubyte.gz",
    ("test", "images"): "t10k-images-idx3-ubyte.gz",
    ("test", "labels"): "t10k-labels-idx1-ubyte.gz",
}
CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
MEAN, STD = 0.2860, 0.3530  # of the training images

# 7 x 7 patches of 4 x 4 pixels.
SHAPE = dict(
    image_size=28, patch_size=4, num_channels=1, hidden_size=96, num_hidden_layers=4, num_attention_heads=4,
    num_labels=10,
)  # fmt: skip
MODELS = {
    "vit": (ViTForImageClassification, ViTConfig(**SHAPE, intermediate_size=192)),
    "dinov2": (Dinov2ForImageClassification, Dinov2Config(**SHAPE, mlp_ratio=2, use_swiglu_ffn=True)),
}
BATCH, RATE = 128, 1e-3
CALIBRATION_IMAGES = 2048  # the paper's number
METHODS = ("magnitude", "wanda", "dsnot", "sparsegpt", "oats", "oats-hessian")
COMPRESSIONS = (0.3, 0.4, 0.5, 0.6)

console = results()


def fashion_mnist(directory: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Normalised images (n, 1, 28, 28) and labels (n,) of the "train" and the "test" split."""
    if not all((directory / file).is_file() for file in FILES.values()):
        unpack(directory)
    splits = {}
    for split in ("train", "test"):
        images, labels = (read_idx(directory / FILES[split, what]) for what in ("images", "labels"))
        splits[split] = ((images[:, None] / 255 - MEAN) / STD, labels.long())
    return splits


def unpack(directory: Path) -> None:
    """Download Debian's package and extract the files; the package is not installed."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        sys.exit(f"put {', '.join(FILES.values())} (Fashion-MNIST) into {directory}, or run this on Debian")
    package = directory / "package"
    package.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", "dataset-fashion-mnist"], cwd=package, check=True)
    subprocess.run(["dpkg", "-x", next(package.glob("*.deb")), package], check=True)
    for file in FILES.values():
        shutil.copy(next(package.rglob(file)), directory / file)
    shutil.rmtree(package)


def read_idx(file: Path) -> Tensor:
    """The array of an idx file of bytes: two zeros, 8, the number of dimensions, and big-endian sizes."""
    content = gzip.decompress(file.read_bytes())
    dimensions = content[3]
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    return torch.frombuffer(bytearray(content[4 + 4 * dimensions :]), dtype=torch.uint8).view(shape)


def train(kind: Any, config: Any, images: Tensor, labels: Tensor, epochs: int, seed: int) -> nn.Module:
    """Train with AdamW and a one-cycle learning rate on cross-entropy; images are mirrored at random."""
    torch.manual_seed(seed)
    model = kind(config)
    model.config.label2id = {name: i for i, name in enumerate(CLASSES)}
    model.config.id2label = dict(enumerate(CLASSES))
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    done = 0
    with progress_bar("Training") as bar:
        for epoch in range(epochs):
            for chosen in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:
                batch = images[chosen]
                flipped = torch.where(torch.rand(len(batch), 1, 1, 1) < 0.5, batch.flip(3), batch)
                loss = nn.functional.cross_entropy(model(flipped).logits, labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                done += 1
                bar.update(done, steps, f"loss {float(loss.detach()):.3f}")
            console.print(f"epoch {epoch + 1} of {epochs}: loss {float(loss.detach()):.3f}")
    return model.eval()


@torch.inference_mode()
def accuracy(model: Any, images: Tensor, labels: Tensor) -> float:
    """Share of the images whose class is predicted right."""
    right = 0
    for batch, wanted in zip(images.to(model.dtype).split(500), labels.split(500), strict=True):
        right += int((model(batch).logits.argmax(-1) == wanted).sum())
    return right / len(labels)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="vit")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pattern", default="row", help="row, layer or N:M")
    parser.add_argument("--rank-ratio", type=float, default=0.2, help="the paper's for ViT-B (default 0.2)")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--compressions", nargs="+", type=float, default=COMPRESSIONS)
    parser.add_argument("--train-images", type=int, default=60000, help="use only the first ones")
    parser.add_argument("--data", type=Path, default=DEMO / "fashion-mnist")
    parser.add_argument("--out", type=Path, help="default: .demo/vision-MODEL")
    arguments = parser.parse_args()
    logging.disable_progress_bar()  # of loading and saving
    common = oats.OatsConfig(rank_ratio=arguments.rank_ratio, pattern=arguments.pattern, seed=arguments.seed)
    planned = comparison.plan(common, arguments.methods, arguments.compressions)

    data = fashion_mnist(arguments.data)
    images, labels = (each[: arguments.train_images] for each in data["train"])
    out = arguments.out or DEMO / f"vision-{arguments.model}"
    dense = out / f"dense-{arguments.epochs}-{len(images)}-{arguments.seed}"
    normalisation = dense / "preprocessor_config.json"  # written last
    if not normalisation.is_file():
        started = time.perf_counter()
        trained = train(*MODELS[arguments.model], images, labels, arguments.epochs, arguments.seed)
        save_model(trained, None, dense, overwrite=True)
        write_text(normalisation, json.dumps({"image_mean": [MEAN], "image_std": [STD]}))
        console.print(f"trained in {time.perf_counter() - started:.0f} s")

    calibration = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    calibration = calibration[:CALIBRATION_IMAGES]
    settings = {
        "model": f"{type(load_vision_model(dense)).__name__}, {SHAPE}, {arguments.epochs} epochs of "
        f"{len(images)} images, seed {arguments.seed}",
        "dtype": "float32",
        "evaluation": f"all {len(data['test'][1])} test images of Fashion-MNIST",
        "calibration": f"{len(calibration)} training images",
        "rank ratio": arguments.rank_ratio,
        "pattern": arguments.pattern,
        "iterations": common.resolved_iterations,
        "versions": f"oats {oats.__version__}, torch {torch.__version__}, instruction set {active_isa()}",
    }

    def score(model: Any) -> dict[str, float]:
        return {"accuracy, test": accuracy(model, *data["test"])}

    def measure(what: comparison.Planned | None) -> comparison.Measured:
        model = load_vision_model(dense)
        return comparison.measure_(model, what, {"pixel_values": calibration}, common, score)

    def progress(done: int, total: int, name: str, cell: Cell | None) -> None:
        if cell is not None:
            scores = (format_score(*score) for score in cell.scores.items())
            console.print(f"{done}/{total}  {name}: {', '.join(scores)}")

    cells = Cells(out / f"cells-{dense.name}-{arguments.pattern.replace(':', '-')}", settings)
    finished = comparison.complete(cells, planned, measure, progress)
    write_text(out / "table.md", markdown(finished, settings))
    comparison_plot.draw(finished, [out / "accuracy.png", out / "accuracy.svg"])
    print_table(console, finished)

    half = out / "oats-50"
    model = load_vision_model(dense)
    oats.compress_(model, {"pixel_values": calibration}, oats.OatsConfig(rank_ratio=arguments.rank_ratio))
    save_model(model, None, half, overwrite=True)
    shutil.copy(normalisation, half)
    # The first test image of six classes.
    chosen = [int((data["test"][1] == kind).nonzero()[0]) for kind in (0, 1, 5, 7, 8, 9)]
    test = data["test"][0][chosen]
    for image, index in zip(test, chosen, strict=True):
        pixels = ((image[0] * STD + MEAN) * 255).round().byte().numpy()
        Image.fromarray(pixels).save(out / f"test-{index}.png")
    model = load_vision_model(half, attn_implementation="eager")
    names = [CLASSES[int(data["test"][1][index])] for index in chosen]
    rollout.draw(test, rollout.rollouts(model, test), out / "rollout.png", names)
    console.print(f"table.md, accuracy.png, rollout.png and the models are in {out}")


if __name__ == "__main__":
    main()
