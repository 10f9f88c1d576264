"""Recorded data as it lies on disk -> Records, from which a page is made. Nothing here computes or guesses."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import DataError, OutputError
from .checking import check
from .shapes import (
    COMPARISON,
    ENDED,
    JOURNAL_BLOCK,
    PACKED,
    PLAN,
    SAVED,
    SHRINK_PLAN,
    SHRUNK_BLOCK,
    TRAINING_PLAN,
    a_step,
    evaluation_line,
    made_by,
)
from .wording import tidy

SCHEMA = 1
REPORT, EVALUATIONS, COMPARED = "secateur.json", "evaluations.jsonl", "comparison.json"
FROZEN_PLAN, JOURNAL = "plan.json", "journal.jsonl"


@dataclass(frozen=True)
class Records:
    """What a page is made of.

    Attributes:
        kind: ``pruned``, ``packed`` (or unpacked), ``shrunk``, ``trained``, ``unfinished`` or ``comparison``.
        name: the directory's or file's own name, without its place.
        report: ``secateur.json``; of an unfinished run what its plan and journal say; empty for a comparison.
        evaluations: lines of ``evaluations.jsonl``, oldest first.
        comparisons: documents of ``secateur compare``.
        blocks: of an unfinished run, how many the model has, if that is known.
    """

    kind: str
    name: str
    report: Mapping[str, Any] = field(default_factory=dict)
    evaluations: Sequence[Mapping[str, Any]] = ()
    comparisons: Sequence[Mapping[str, Any]] = ()
    blocks: int | None = None


def load_records(path: Path) -> Records:
    """Read what lies at `path`.

    Args:
        path: OUTPUT of prune, shrink, finetune or pack; the run directory of an unfinished run, or the OUTPUT that it
            is to make; a directory with ``comparison.json``, or such a file, which may hold several documents.

    Raises:
        OutputError: nothing of ours lies there.
        DataError: it is damaged, or its schema is unknown.
    """
    path = path.expanduser()
    name = path.resolve().name
    run = path.with_name(path.name + ".secateur") if path.name else path
    if path.is_file():
        return Records("comparison", path.stem, comparisons=_comparisons(path))
    if (path / REPORT).is_file():
        return _finished(path, name)
    if (path / COMPARED).is_file():
        return Records("comparison", name, comparisons=_comparisons(path / COMPARED))
    for directory in (path, run):
        if (directory / FROZEN_PLAN).is_file():
            return _unfinished(directory, directory.resolve().name.removesuffix(".secateur"))
    if not path.exists():
        raise OutputError(f"{path}: no such file or directory")
    raise OutputError(
        f"{path}: Secateur did not write it; give the OUTPUT of prune, shrink, finetune or pack, a run directory, or a "
        "comparison"
    )


def _finished(path: Path, name: str) -> Records:
    report = _one(path / REPORT)
    _check_schema(report, path / REPORT)
    plan = report.get("plan")
    command = plan.get("command", "prune") if isinstance(plan, dict) else "prune"
    kind = {"prune": "pruned", "shrink": "shrunk", "finetune": "trained"}.get(str(command), "packed")
    check(report, PACKED if kind == "packed" else made_by(report), f"{path / REPORT}")
    report = _with_sound_past(report)
    lines = list(_lines(path / EVALUATIONS))
    for number, line in enumerate(lines, 1):
        where = f"{path / EVALUATIONS}: line {number}"
        _check_schema(line, where)
        check(line, evaluation_line, where)
    return Records(kind, name, report, lines)


def _with_sound_past(report: dict[str, Any]) -> dict[str, Any]:
    """Leave out what a model was before it was trained, if that is damaged: it came with the model."""
    for key in ("former", "pruned"):
        if (before := report.get(key)) is not None:
            try:
                check(before, made_by(before), key)
                report = {**report, key: _with_sound_past(before)}
            except DataError:
                report = {**report, key: None}
    return report


def _unfinished(path: Path, name: str) -> Records:
    """The plan and the journal of a run, put together as ``secateur.json`` would be."""
    plan = _one(path / FROZEN_PLAN)
    command = plan.get("command", "prune")
    if command == "finetune":
        return _training(path, name, plan)
    shapes = {"prune": (PLAN, JOURNAL_BLOCK), "shrink": (SHRINK_PLAN, SHRUNK_BLOCK)}
    plan_shape, block_shape = shapes.get(str(command), (PACKED["plan"], {"block": int}))
    check(plan, plan_shape, f"{path / FROZEN_PLAN}")
    lines = list(_lines(path / JOURNAL))
    blocks = [line for line in lines if "block" in line]
    for block in blocks:
        check(block, block_shape, f"{path / JOURNAL}: a block")
    steps = {str(line["step"]): line for line in lines if "step" in line}
    for step in steps.values():
        check(step, a_step, f"{path / JOURNAL}: a step")
    before = next((line.get("result") for line in lines if line.get("evaluated") == "before"), None)
    check({"before": before}, {"before?": evaluation_line}, f"{path / JOURNAL}: an evaluation")
    matrices = [{**matrix, "block": block["block"]} for block in blocks for matrix in block.get("matrices") or ()]
    for matrix in matrices:
        matrix["sparsity"] = matrix["zeros"] / max(1, matrix["shape"][0] * matrix["shape"][1])
    report = {"schema": SCHEMA, "plan": plan, "steps": list(steps.values()), "blocks": blocks, "matrices": matrices}
    report["evaluation"] = {"before": before, "after": None} if before else None
    return Records("unfinished", name, report, blocks=_count_of_blocks(path, plan["model"]["name"]))


def _training(path: Path, name: str, plan: dict[str, Any]) -> Records:
    """The plan and the journal of an unfinished training, put together as ``secateur.json`` would be."""
    check(plan, TRAINING_PLAN, f"{path / FROZEN_PLAN}")
    lines = list(_lines(path / JOURNAL))
    saved = [line for line in lines if line.get("step") == "saved"]
    for line in saved:
        check(line, SAVED, f"{path / JOURNAL}: a checkpoint")
    ended = next((line for line in lines if line.get("step") == "trained"), None)
    check({"ended": ended}, {"ended?": ENDED}, f"{path / JOURNAL}: the end")
    evaluated = {str(line.get("evaluated")): line.get("result") for line in lines if "evaluated" in line}
    check(evaluated, {"before?": evaluation_line, "after?": evaluation_line}, f"{path / JOURNAL}: an evaluation")
    before = evaluated.get("before")
    report = {
        "schema": SCHEMA, "plan": plan, "training": ended, "matrices": ended["matrices"] if ended else [],
        "at": saved[-1]["at"] if saved else 0, "seconds": {"training": sum(line["seconds"] for line in saved)},
        "evaluation": {"before": before, "after": evaluated.get("after")} if before else None,
    }  # fmt: skip
    return Records("unfinished", name, report)


def _count_of_blocks(path: Path, model: str) -> int | None:
    """How many blocks a run has to do, as the model's own config says, where that lies at hand."""
    smaller = path / "source-narrow" / "config.json"  # whose blocks are cut after others were removed
    for config in (smaller, *sorted(path.glob("source-*/config.json")), Path(model) / "config.json"):
        try:
            found: Any = json.loads(config.read_text(encoding="utf-8"))
            count = found.get("text_config", found).get("num_hidden_layers", found.get("n_layer"))
        except (OSError, ValueError, AttributeError):  # not there, or not what it should be: the page does without
            continue
        if isinstance(count, int):
            return count
    return None


def _comparisons(path: Path) -> list[dict[str, Any]]:
    """Every document of a file: one, several after one another, or a list."""
    text, documents, start = _text(path), [], 0
    decoder = json.JSONDecoder()
    while rest := text[start:].lstrip():
        start = len(text) - len(rest)
        try:
            document, start = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            raise DataError(f"{path}: is damaged; it is not JSON from character {start + 1} on") from None
        documents += document if isinstance(document, list) else [document]
    if not documents or not all(isinstance(d, dict) and isinstance(d.get("rows"), list) for d in documents):
        raise OutputError(f"{path}: is no comparison; give what `secateur compare` wrote, or the directory of a model")
    found = [dict(tidy(document)) for document in documents]
    for document in found:
        _check_schema(document, path)
        check(document, COMPARISON, str(path))
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError:
        raise DataError(f"{path}: is damaged; it is not UTF-8 text") from None


def _one(path: Path) -> dict[str, Any]:
    return _parsed(_text(path), str(path))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a journal; the last one is left out if it was torn by a kill while it was written."""
    if not path.exists():
        return
    try:
        whole = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise OutputError(f"{path}: cannot be read ({error.strerror or error})") from None
    for number, line in enumerate(whole, 1):
        where = f"{path}: line {number}"
        try:
            text = line.decode()
        except ValueError:
            raise DataError(f"{where}: is damaged; it is not UTF-8 text") from None
        yield _parsed(text, where)


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(f"{where}: is damaged; it is not JSON") from None
    if not isinstance(found, dict):
        raise DataError(f"{where}: is damaged; it is no JSON object")
    return dict(tidy(found))


def _check_schema(document: Mapping[str, Any], where: Path | str) -> None:
    if (schema := document.get("schema")) != SCHEMA:
        raise DataError(f"{where}: has schema {schema!r}; this Secateur reads schema {SCHEMA}")
