"""Scores of a model on tasks of lm-evaluation-harness."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from oats.errors import CalibrationError, ConfigError


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    Attributes:
        metric: name of the metric in the harness, such as ``"acc"``, and the filter of the answers if any.
        stderr: standard error of `value` over the questions; None if the harness gives none.
        shots: examples in the prompt.
        samples: number of questions.
        version: version of the task. Scores of different versions cannot be compared.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    shots: int
    samples: int
    version: str


@dataclass(frozen=True)
class TaskScores:
    """The scores, and the settings that they depend on."""

    scores: tuple[Score, ...]
    dtype: str
    limit: int | None
    harness: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)


def evaluate_tasks(
    model: Any, tokenizer: Any, tasks: Sequence[str], *, task_path: str | Path | None = None,
    shots: int | None = None, limit: int | None = None, batch: int = 1,
) -> TaskScores:  # fmt: skip
    """Run tasks of lm-evaluation-harness, as ``lm_eval --model hf`` does with the saved model.

    Args:
        model: a causal language model of transformers, dense or compressed.
        tasks: names of tasks or groups, or patterns of names.
        task_path: directory with YAML files of tasks. A task there replaces one of the harness.
        shots: examples in the prompt; None leaves it to the task.
        limit: questions of each task at most.
        batch: sequences of one forward pass.

    Raises:
        ConfigError: the harness is not installed, there is no such task, or an argument is out of range.
        CalibrationError: the data of a task cannot be loaded.
    """
    if batch < 1 or (limit is not None and limit < 1) or (shots is not None and shots < 0):
        raise ConfigError(
            f"batch and limit must be at least 1 and shots at least 0, got {batch}, {limit} and {shots}"
        )
    if task_path is not None and not Path(task_path).is_dir():
        raise ConfigError(f"there is no directory {task_path} with tasks; check task_path")
    require_harness()
    import lm_eval
    from datasets.exceptions import DatasetsError
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    include = None if task_path is None else str(task_path)
    # The harness has thousands of task files. Reading them takes seconds, so read them only if needed.
    manager = TaskManager(include_path=include, include_defaults=False) if include else None
    if manager is None or _unknown(manager, tasks):
        manager = TaskManager(include_path=include)
    if missing := _unknown(manager, tasks):
        raise ConfigError(
            f"there is no task {missing[0]!r}; `lm_eval ls tasks` lists those of the harness, and "
            "--task-path gives a directory with your own"
        )
    started = time.perf_counter()
    try:
        found: Any = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch),
            tasks=manager.match_tasks(list(tasks)), num_fewshot=shots, limit=limit, task_manager=manager,
            log_samples=False,
        )  # fmt: skip
    except (DatasetsError, OSError) as error:
        raise CalibrationError(f"the data of a task cannot be loaded: {error}") from error
    return TaskScores(
        scores=tuple(_scores(found)), dtype=str(model.dtype).removeprefix("torch."), limit=limit,
        harness=lm_eval.__version__, seconds=time.perf_counter() - started,
    )  # fmt: skip


def require_harness() -> None:
    """Check that lm-evaluation-harness is installed; call it before the long work.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"tasks need lm-evaluation-harness ({error.name} is missing): pip install 'oats-torch[eval]'"
        ) from None


def _unknown(manager: Any, tasks: Sequence[str]) -> list[str]:
    return [task for task in tasks if not manager.match_tasks([task])]


def _scores(found: dict[str, Any]) -> list[Score]:
    """One entry for each task and metric in the result of ``simple_evaluate``."""
    scores = []
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            name, _, answers = key.partition(",")
            if not isinstance(value, (int, float)) or name.endswith("_stderr") or not answers:
                continue
            stderr = metrics.get(f"{name}_stderr,{answers}")
            score = Score(
                task=task,
                metric=name if answers == "none" else f"{name}, {answers}",
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
                shots=int(found.get("n-shot", {}).get(task) or 0),
                samples=int(found.get("n-samples", {}).get(task, {}).get("effective", 0)),
                version=str(found.get("versions", {}).get(task, "")),
            )
            scores.append(score)
    return scores
