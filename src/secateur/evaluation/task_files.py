"""Rows of a task's own files, given to lm-eval in place of what it would download.

A file ``TASK.SPLIT.jsonl`` holds the rows of one split with the fields that they have on the hub, and lm-eval's
definition of the task is applied to them unchanged. Nothing is copied into a cache.
"""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..models.source import first_line
from ..pipeline.data_files import read_text

EXAMPLES_READ = 1000  # of those that shots are drawn from; the rest are like them

# Fields that a task reads by another name than the original data set's: lm-eval takes boolq from super_glue.
RENAMED = {"boolq": {"label": "answer"}}


def give_rows(task: Any, folder: Path, shots: int, limit: int | None) -> None:
    """Give a task that lm-eval is making the rows of its files, once it is clear that it can ask them.

    Args:
        task: lm-eval's task, which has its config and no data.
        folder: where the files are.
        shots: solved examples before each question; they come from a file of their own.
        limit: how many questions will be asked; None is all.

    Raises:
        DataError: a file is missing, or has not what the task reads.
    """
    config = task.config
    if type(task).__name__ != "ConfigurableTask":
        name = config.task or type(task).__name__
        raise DataError(f"task {name}: is Python code that fetches its own data; leave it or the directory out")
    splits = config.test_split, config.validation_split, "validation", "test"
    path = _find(folder, [*_files(config.task, *splits), f"{config.task}.jsonl"], "which holds its questions")
    task.DATASET_PATH, task.dataset = path.name, {path.name: _dataset(path, config.task)}
    asked, other = ("test_split", "validation_split") if config.test_split else ("validation_split", "test_split")
    setattr(config, asked, path.name)
    setattr(config, other, None)
    examples, how = None, config.fewshot_config
    if shots and (how.split or how.samples is None):
        names = _files(config.task, how.split, config.training_split, "train")
        examples = _find(folder, names, f"from which its {shots} shots are drawn; or ask with --num-fewshot 0")
        task.dataset.setdefault(examples.name, _dataset(examples, config.task))
        if len(task.dataset[examples.name]) <= shots:
            raise DataError(f"{examples}: {shots} shots are drawn from more than {shots} rows; it has fewer")
    config.training_split = examples and examples.name
    how.split = config.training_split if how.split else None
    _examine(task, config, path, limit)
    if examples:
        _examine(task, how, examples, EXAMPLES_READ)


def _files(name: str, *splits: str | None) -> list[str]:
    return [f"{name}.{split}.jsonl" for split in dict.fromkeys(splits) if split]


def _find(folder: Path, names: list[str], purpose: str) -> Path:
    """Return the first of the files that is there."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    there = ", ".join(sorted(path.name for path in folder.glob("*.jsonl"))[:12]) or "none"
    raise DataError(f"{folder}: has no {' or '.join(names)}, {purpose}; .jsonl files there: {there}")


def _dataset(path: Path, name: str) -> Any:
    """Read rows into memory; nothing is written into the cache of data sets."""
    from datasets import Dataset

    rows: list[dict[str, Any]] = []
    try:
        for number, line in enumerate(read_text(path).split("\n"), 1):
            row = json.loads(line) if line.strip() else None
            if isinstance(row, dict):
                rows.append({to: row[field] for to, field in RENAMED.get(name, {}).items() if field in row} | row)
            elif line.strip():
                raise DataError(f"{path}: line {number} is not an object with fields")
    except (ValueError, RecursionError):
        raise DataError(f"{path}: line {number} is not JSON") from None
    if not rows:
        raise DataError(f"{path}: is empty")
    fields = dict.fromkeys(field for row in rows for field in row)
    try:
        return Dataset.from_dict({field: [row.get(field) for row in rows] for field in fields})
    except Exception as error:  # pyarrow's and datasets' own
        raise DataError(f"{path}: a field is not of one type in all rows ({first_line(error)[:120]})") from None


def _examine(task: Any, how: Any, path: Path, count: int | None) -> None:
    """Refuse rows that the task would ask in a wrong way; lm-eval would go on with nonsense."""
    rows = task.dataset[path.name]
    try:
        rows = how.process_docs(rows) if how.process_docs else rows
    except Exception as error:  # of the task's own code
        raise DataError(f"{path}: a row {_why(error, {})}") from None
    if len(rows) == 0:
        raise DataError(f"{path}: holds no question that the task would ask")
    if how is task.config:  # what the functions of a task need that is still being made
        task.features, task.prompt = list(rows.features), None
    for number, row in enumerate(islice(rows, count), 1):
        fault = _fault(task, how, {field: value for field, value in row.items() if value is not None})
        if fault:
            raise DataError(f"{path}: row {number} {fault}")


def _fault(task: Any, how: Any, row: dict[str, Any]) -> str | None:
    """Say what keeps a row from being asked."""
    for template in (how.doc_to_text, how.doc_to_target, how.doc_to_choice):
        if isinstance(template, str) and template.isidentifier() and template not in row:
            return f"has no field {template}, which the task reads"  # and lm-eval would take the name for a text
    try:
        text, gold = task.doc_to_text(row, how.doc_to_text), task.doc_to_target(row, how.doc_to_target)
        choices = task.doc_to_choice(row, how.doc_to_choice) if how.doc_to_choice is not None else []
    except Exception as error:  # of templates and of the task's own code
        return _why(error, row)
    if choices:
        gold = text if isinstance(text, int) else gold
        for answer in gold if isinstance(gold, list) else [gold]:
            place = isinstance(answer, int) and 0 <= answer < len(choices)
            if not place and answer not in choices:
                return f"has the answer {answer!r}, which is none of its {len(choices)} choices"
    return None


def _why(error: Exception, row: dict[str, Any]) -> str:
    named = re.search(r"^'(\w+)' is undefined|has no attribute '(\w+)'", str(error))
    field = error.args[0] if isinstance(error, KeyError) else named and (named[1] or named[2])
    if isinstance(field, str) and field not in row.values():
        return f"has no field {field}, which the task reads"
    return f"cannot be asked ({type(error).__name__}: {first_line(error)[:120]})"
