"""What recorded data must hold for a page to be made of it: a key with a question mark may be absent or null."""

from __future__ import annotations

from typing import Any

NUMBER = (int, float)

GENERATION = {"prompt": str, "continuation": str, "repetition?": NUMBER}
TASK = {"task": str, "shots?": int, "questions?": int, "metrics": {"*": {"value?": NUMBER, "stderr?": NUMBER}}}
TASKS = {"results": [TASK], "mean?": NUMBER}
AGAINST = {"model": str, "loss?": NUMBER, "perplexity?": NUMBER, "tasks?": TASKS, "generations?": [GENERATION]}
FIDELITY = {"kl?": NUMBER, "top1?": NUMBER, "blocks?": [(*NUMBER, type(None))]}
MEASURED = {"text": str, "seqlen": int, "windows": int, "tokens": int, "available_tokens": int}
EVALUATION = {
    "loss?": NUMBER,
    "perplexity?": NUMBER,
    "fidelity?": FIDELITY,
    "against?": AGAINST,
    "tasks?": TASKS,
    "generations?": [GENERATION],
}
SPEED = {"median": NUMBER, "slowest": NUMBER, "fastest": NUMBER}
ARRANGEMENT = {"kernels?": str, "packed": int, "unpacked": int, "activations8?": int}
TIMED = {
    "name": str,
    "dtype": str,
    "bytes?": NUMBER,
    "resident_bytes?": NUMBER,
    "speeds": [{"batch": int, "prefill": SPEED, "decode": SPEED}],
    "arrangement?": ARRANGEMENT,
    "not_measured?": {"*": str},
}
BENCH = {"processor": str, "threads": int, "prompt": int, "tokens": int, "rounds": int, "models": [TIMED]}


def evaluation_line(value: Any) -> dict[str, Any]:
    """An evaluation, which must say on what a perplexity was measured if it has one."""
    measured = MEASURED if isinstance(value, dict) and value.get("text") is not None else {}
    return {**EVALUATION, **measured, "date?": str, "software?": {}, "bench?": BENCH}


MATRIX = {"name": str, "shape": [int], "zeros": NUMBER, "output_error?": NUMBER}
BLOCK = {"block": int, "seconds": NUMBER, "output_error?": NUMBER}
RECONSTRUCTION = {"error_before?": NUMBER, "error_after?": NUMBER, "epochs": int}
PRUNED_BLOCK = {**BLOCK, "reconstruction?": RECONSTRUCTION}
JOURNAL_BLOCK = {**PRUNED_BLOCK, "matrices": [MATRIX]}
MODEL = {"name": str, "digest?": str}
CALIBRATION = {"source": str, "samples": int, "seqlen": int, "tokens": int, "seed": int, "digest?": str}
SLOPE = {"slope": NUMBER, "kl?": NUMBER}


def found_allocation(value: Any) -> dict[str, Any]:
    """How the rules of a named allocation were found: of a slope, with those tried."""
    sought = isinstance(value, dict) and value.get("slopes") is not None
    return {"name": str, "mean": NUMBER, **({"slope": NUMBER, "slopes": [SLOPE]} if sought else {})}


PLAN = {
    "model": MODEL,
    "method": str,
    "pattern": str,
    "sparsity": NUMBER,
    "preset?": str,
    "calibration?": CALIBRATION,
    "allocation_found?": found_allocation,
    "propagate": str,
    "reconstruct?": {"epochs": int, "learning_rate": NUMBER},
    "include?": [str],
    "exclude?": [str],
    "format?": str,
    "values?": str,
    "dtype?": str,
    "device?": str,
    "threads": int,
    "micro_batch_tokens?": int,
    "evaluate?": {"source": str, "seqlen?": int},
    "software?": {},
}
BYTES_PACKED = {"matrices": int, "dense": NUMBER, "predicted": NUMBER, "true": NUMBER}
PRUNED: dict[str, Any] = {
    "plan": PLAN,
    "sparsity": NUMBER,
    "weights": NUMBER,
    "zeros": NUMBER,
    "dense_matrices?": [str],
    "left_out?": [str],
    "matrices": [{**MATRIX, "block": int, "sparsity": NUMBER}],
    "blocks": [PRUNED_BLOCK],
    "seconds": {"pruning": NUMBER},
    "peak_memory_bytes?": NUMBER,
    "bytes?": {"source_files": NUMBER, "dense_16_bit": NUMBER, "output": NUMBER},
    "packed?": BYTES_PACKED,
    "evaluation?": {"before": {**EVALUATION, **MEASURED}, "after": {**EVALUATION, **MEASURED}},
}
OR_NOT = (*NUMBER, type(None))
SHRINK_PLAN = {
    "command": str,
    "model": MODEL,
    "target?": NUMBER,
    "of?": [str],
    "criterion": str,
    "depth": str,
    "calibration?": CALIBRATION,
    "propagate": str,
    "dtype?": str,
    "device?": str,
    "threads": int,
    "micro_batch_tokens?": int,
    "evaluate?": {"source": str, "seqlen?": int},
    "software?": {},
}


def a_pair(value: Any) -> Any:
    """Former and new value, whatever they are."""
    return list if isinstance(value, list) and len(value) == 2 else ()


def list_or_none(*of: type) -> Any:
    """A list of one type; or None."""
    return lambda value: type(None) if value is None else [of]


def a_step(value: Any) -> dict[str, Any]:
    """What was tried out before the first block; of several candidates at once, each has a distance."""
    distances = {"*": OR_NOT} if isinstance(value, dict) and value.get("step") == "split" else NUMBER
    own = {"kl?": distances, "tried?": {"*": OR_NOT}, "influence?": [OR_NOT]}
    return {"step": str, "seconds": NUMBER, **own, "kept?": [list_or_none(int)], "salience?": [list_or_none(*OR_NOT)]}


SHRUNK_MATRIX = {"name": str, "shape": [int], "output_error?": NUMBER}
SHRUNK_BLOCK = {**BLOCK, "matrices": [{**SHRUNK_MATRIX, "zeros": NUMBER}]}
SHRUNK: dict[str, Any] = {
    "plan": SHRINK_PLAN,
    "config": {"*": a_pair},
    "parameters": {"before": NUMBER, "after": NUMBER, "blocks_before": NUMBER, "blocks_after": NUMBER},
    "removed_layers": [int],
    "steps": [a_step],
    "blocks": [BLOCK],
    "matrices": [{**SHRUNK_MATRIX, "block": int}],
    "seconds": {"shrinking": NUMBER},
    "peak_memory_bytes?": NUMBER,
    "bytes": {"source_files?": NUMBER, "dense_16_bit?": NUMBER, "output": NUMBER},
    "evaluation?": {"before": {**EVALUATION, **MEASURED}, "after": {**EVALUATION, **MEASURED}},
}


COURSE = {
    "sparsity?": NUMBER,
    "pattern?": str,
    "method": str,
    "rounds?": int,
    "initial?": NUMBER,
    "schedule?": str,
    "every?": int,
    "samples?": int,
    "include?": [str],
    "exclude?": [str],
}


def a_course(value: Any) -> dict[str, Any]:
    """How a model was pruned while it was trained: in rounds, or gradually."""
    gradually = isinstance(value, dict) and value.get("rounds") is None
    return {**COURSE, "initial": NUMBER, "schedule": str, "every": int} if gradually else COURSE


TRAINING_PLAN = {
    "command": str,
    "model": MODEL,
    "data": CALIBRATION,
    "train": str,
    "steps": int,
    "batch_size": int,
    "accumulate": int,
    "learning_rate": NUMBER,
    "rank?": int,
    "teacher?": MODEL,
    "course?": a_course,
    "eval_steps": int,
    "seed": int,
    "device?": str,
    "threads": int,
    "evaluate?": {"source": str, "seqlen?": int},
    "software?": {},
}


def a_point(value: Any) -> Any:
    """A step and its loss, which may be no number."""
    sound = isinstance(value, list) and len(value) == 2 and type(value[0]) is int
    return [OR_NOT] if sound else ()


TRAINING = {
    "loss": str,
    "steps": int,
    "stopped?": int,
    "trainable": int,
    "losses": [a_point],
    "held_out": [a_point],
    "held_out_rows": int,
}
TRAINED_MATRIX = {"name": str, "shape": [int], "zeros": NUMBER, "sparsity": NUMBER, "zeros_before": NUMBER}
SAVED = {"step": str, "at": int, "seconds": NUMBER}
ENDED = {**TRAINING, "matrices": [TRAINED_MATRIX], "seconds": NUMBER}
TRAINED: dict[str, Any] = {
    "plan": TRAINING_PLAN,
    "sparsity": NUMBER,
    "sparsity_before": NUMBER,
    "weights": NUMBER,
    "zeros": NUMBER,
    "training": TRAINING,
    "matrices": [TRAINED_MATRIX],
    "seconds": {"training": NUMBER},
    "peak_memory_bytes?": NUMBER,
    "bytes": {"source_files": NUMBER, "dense_16_bit": NUMBER, "output": NUMBER},
    "packed?": BYTES_PACKED,
    "evaluation?": {"before": {**EVALUATION, **MEASURED}, "after": {**EVALUATION, **MEASURED}},
}


def made_by(value: Any) -> dict[str, Any]:
    """The report of what was done to a model, by its command."""
    plan = value.get("plan") if isinstance(value, dict) else None
    command = plan.get("command") if isinstance(plan, dict) else None
    shapes = {"shrink": SHRUNK, "finetune": TRAINED, "pack": PACKED, "unpack": PACKED}
    return shapes.get(command, PRUNED) if isinstance(command, str) else PRUNED


PACKED: dict[str, Any] = {
    "plan": {"command": str, "format?": str, "values?": str, "model": MODEL, "software?": {}},
    "bytes": {"source": NUMBER, "output": NUMBER},
    "packed?": BYTES_PACKED,
    "dense_matrices?": [str],
    "pruned?": made_by,
}
ROW = {
    "model": str,
    "method": str,
    "pattern?": str,
    "sparsity?": NUMBER,
    "target?": NUMBER,
    "calibration?": CALIBRATION,
    "propagate?": str,
    "format?": str,
    "evaluation?": evaluation_line,
    "loss_increase?": NUMBER,
    "perplexity_increase?": NUMBER,
    "perplexity_ratio?": NUMBER,
    "tasks?": TASKS,
    "task_mean_change?": NUMBER,
    "seconds?": NUMBER,
    "peak_memory_bytes?": NUMBER,
    "bytes?": NUMBER,
    "bytes_ratio?": NUMBER,
    "bench?": BENCH,
    "decode_ratio?": NUMBER,
    "resident_ratio?": NUMBER,
    "generations?": [GENERATION],
    "error?": str,
}
COMPARISON: dict[str, Any] = {
    "command?": str,
    "date?": str,
    "software?": {},
    "processor?": str,
    "threads?": int,
    "planned?": int,
    "rows": [ROW],
}
