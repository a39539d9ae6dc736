"""Tasks of lm-evaluation-harness on local data, through `oats eval --tasks` and the harness itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from oats.cli import app
from oats.errors import ConfigError
from oats.evaluate.tasks import evaluate_tasks
from tests.cli import test_cli
from tests.tiny import save_compressed

dense, text = test_cli.dense, test_cli.text  # fixtures

QUESTIONS = [
    ("The quick brown fox", ["jumps", "sleeps", "is"]),
    ("over the lazy", ["dog", "cat"]),
    ("one plus one is", ["two", "three", "four", "eleven"]),
    ("a b c", ["d", "e"]),
    ("The sky is", ["blue", "a fish"]),
    ("Ähm", ["ja", "nein"]),
]
TASK = """
task: local_quiz
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_compressed(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks")
    lines = [json.dumps({"question": question, "choices": choices}) for question, choices in QUESTIONS]
    (path / "quiz.jsonl").write_text("\n".join(lines))
    (path / "quiz.yaml").write_text(TASK.format(data=path / "quiz.jsonl"))
    return path


def test_without_the_harness_it_says_what_to_install(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for command in ("eval", "compare"):
        result = run(command, directory, "--tasks", "local_quiz")
        assert result.exit_code == 1 and "pip install 'oats-torch[eval]'" in result.stderr


def test_options_of_the_perplexity_do_not_go_with_tasks(directory: Path) -> None:
    for option in (["--context", "64"], ["--save"]):
        result = run("eval", directory, "--tasks", "x", *option)
        assert (
            result.exit_code == 1 and "belong to the perplexity; leave them out with tasks" in result.stderr
        )
    assert "at least 1" in run("eval", directory, "--tasks", "x", "--limit", 0).stderr


def test_the_same_score_as_the_harness_in_a_fresh_process(
    directory: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(
        "lm_eval", reason="lm-evaluation-harness is not installed: pip install 'oats-torch[eval]'"
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run("eval", directory, "--tasks", "local_quiz", "--task-path", tasks, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    ours = {score["metric"]: score for score in report["scores"]}
    assert set(ours) == {"acc", "acc_norm"} and ours["acc"]["samples"] == len(QUESTIONS)

    # Independently: the log-likelihood of each choice from the model's own logits.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(directory),
        AutoTokenizer.from_pretrained(directory),
    )
    right = 0
    for question, choices in QUESTIONS:
        likelihoods = []
        for choice in choices:
            start = tokenizer(question).input_ids
            ids = torch.tensor(start + tokenizer(f" {choice}", add_special_tokens=False).input_ids)
            with torch.no_grad():
                log_probabilities = model(ids[None]).logits[0].log_softmax(-1)
            predicted = log_probabilities[len(start) - 1 : -1]
            likelihoods.append(float(predicted.gather(1, ids[len(start) :, None]).sum()))
        right += likelihoods.index(max(likelihoods)) == 0
    assert ours["acc"]["value"] == pytest.approx(right / len(QUESTIONS))

    output = tmp_path / "out"
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={directory}",
               "--tasks", "local_quiz", "--include_path", str(tasks), "--device", "cpu",
               "--output_path", str(output)]  # fmt: skip
    theirs = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert theirs.returncode == 0, theirs.stderr
    (file,) = output.rglob("results*.json")
    scores = json.loads(file.read_text())["results"]["local_quiz"]
    for metric, score in ours.items():
        assert scores[f"{metric},none"] == score["value"]
        assert scores[f"{metric}_stderr,none"] == pytest.approx(score["stderr"])


def test_a_table_for_people_and_errors(directory: Path, tasks: Path, tmp_path: Path) -> None:
    pytest.importorskip(
        "lm_eval", reason="lm-evaluation-harness is not installed: pip install 'oats-torch[eval]'"
    )
    result = run("eval", directory, "--tasks", "local_quiz", "--task-path", tasks, "--limit", 2)
    assert result.exit_code == 0, result.output
    assert (
        "local_quiz" in result.stdout
        and "acc_norm" in result.stdout
        and "lm-evaluation-harness" in result.stdout
    )
    missing = run("eval", directory, "--tasks", "no_such_task_here", "--task-path", tasks)
    assert missing.exit_code == 1 and "there is no task 'no_such_task_here'" in missing.stderr
    (tmp_path / "broken.yaml").write_text(
        TASK.format(data=tmp_path / "missing.jsonl").replace("quiz", "broken")
    )
    broken = run("eval", directory, "--tasks", "local_broken", "--task-path", tmp_path)
    assert broken.exit_code == 1 and "the data of a task cannot be loaded" in broken.stderr


def test_a_missing_directory_of_tasks_is_refused_before_a_model_loads(tmp_path: Path) -> None:
    for command in ("eval", "compare"):
        refused = run(command, tmp_path, "--tasks", "quiz", "--task-path", tmp_path / "no")
        assert refused.exit_code == 2 and "--task-path" in refused.stderr


def test_tasks_from_a_missing_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no directory"):
        evaluate_tasks(None, None, ["quiz"], task_path=tmp_path / "no")


def test_tasks_of_a_comparison(
    dense: Path, text: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(
        "lm_eval", reason="lm-evaluation-harness is not installed: pip install 'oats-torch[eval]'"
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    quiz = ["--tasks", "local_quiz", "--task-path", tasks]
    texts = ["--text", text, "--calibration", text, "--samples", 4, "--length", 32, "--max-tokens", 100]
    result = run(
        "compare", dense, "--out", tmp_path / "out", "--methods", "wanda", "--compressions", 0.5, *texts,
        *quiz, "--json", "--no-plot",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    cells = json.loads(result.stdout)["cells"]
    assert [list(cell["scores"]) for cell in cells] == [["perplexity, fox.txt", "accuracy, local_quiz"]] * 2
    evaluated = json.loads(run("eval", dense, *quiz, "--json").stdout)["scores"]
    expected = next(score["value"] for score in evaluated if score["metric"] == "acc")
    assert cells[0]["scores"]["accuracy, local_quiz"] == expected
