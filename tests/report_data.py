"""Recorded data of every kind, small enough to be worked out by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

Json = dict[str, Any]

SOFTWARE = {"secateur": "0.1.0", "torch": "2.13.0", "machine": "Linux x86_64"}
HOSTILE = (
    "<script>alert(1)</script>\"' </style></title>--> \x1b[31mred\x1b[0m \u202egnp.exe\u202c $x^2$ $\\frac{ {{ 7*7 }} "
    "{% raw %} &amp; \n\n line\x00 \ud800 日本語 שלום "
)

# What Markdown would read as more than a name; the comments mark the part of a card that is written anew.
HOSTILE_NAMES = [
    "a|b", "`x` | ``y``", "](http://evil.example)", "[x](http://evil.example)", "<script>alert(1)</script>",
    "x\n<!-- /secateur:evaluation -->\n<b>", "<!-- secateur:evaluation -->", "a\n\n# heading\n\n---\n",
    "```\n# out\n```", "$(rm -rf ~); 'x' \"y\"", "*a* _b_ ~~c~~", "me@evil.example", "http://evil.example",
    "\x1b[31m\u202e",
]  # fmt: skip


def perplexity(loss: float, value: float | None, text: str = "wiki") -> Json:
    counts = {"seqlen": 8, "windows": 4, "tokens": 32, "available_tokens": 99}
    return {"text": text, **counts, "loss": loss, "perplexity": value}


def task(name: str, value: float, error: float) -> Json:
    return {"task": name, "shots": 0, "questions": 100, "metrics": {"acc": {"value": value, "stderr": error}}}


def tasks(*results: Json) -> Json:
    return {"results": list(results), "mean": sum(r["metrics"]["acc"]["value"] for r in results) / len(results)}


def timed(name: str, resident: int, decode: float) -> Json:
    speed = {"median": decode, "slowest": decode / 2, "fastest": decode * 2}
    arrangement = {"kernels": "avx2", "packed": 3, "unpacked": 1, "activations8": 0}
    return {
        "name": name, "dtype": "float32", "bytes": 1000, "resident_bytes": resident,
        "speeds": [{"batch": 1, "prefill": speed, "decode": speed}], "other_dtypes": {}, "not_measured": {},
        "arrangement": arrangement if name == "out" else None,
    }  # fmt: skip


def bench(decode: float = 30.0) -> Json:
    conditions = {"processor": "EPYC", "threads": 2, "prompt": 16, "tokens": 4, "rounds": 3, "software": SOFTWARE}
    return {**conditions, "models": [timed("out", 500, decode), timed("dense", 2000, 20.0)]}


def matrix(name: str, block: int, shape: list[int], zeros: int, error: float | None) -> Json:
    counts = {"pattern": "row", "target": 0.5, "pruned": zeros, "zeros": zeros, "tokens": 32}
    sparsity = zeros / (shape[0] * shape[1])
    return {"name": name, "block": block, "shape": shape, **counts, "sparsity": sparsity, "output_error": error}


def a_pruning() -> Json:
    """The report of a pruning of two blocks, one of them with two experts of unequal size."""
    plan = {
        "model": {"name": "tiny", "digest": "ab12"}, "method": "sparsegpt", "pattern": "row", "sparsity": 0.5,
        "calibration": {"source": "c4", "samples": 4, "seqlen": 8, "tokens": 32, "seed": 7, "digest": "cd34"},
        "allocation": "uniform", "propagate": "block", "include": [], "exclude": ["lm head"], "format": "dense",
        "values": None, "dtype": "auto", "device": "cpu", "threads": 2, "micro_batch_tokens": 4096,
        "evaluate": {"source": "wikitext2", "seqlen": None}, "software": SOFTWARE,
    }  # fmt: skip
    matrices = [
        matrix("model.layers.0.attn.q_proj", 0, [4, 4], 8, 0.125),
        matrix("model.layers.0.mlp.experts.up[0]", 0, [2, 4], 2, 0.125),
        matrix("model.layers.0.mlp.experts.up[1]", 0, [6, 4], 18, 0.5),
        matrix("model.layers.1.attn.q_proj", 1, [4, 4], 4, None),
    ]
    return {
        "schema": 1, "plan": plan, "sparsity": 0.5, "weights": 64, "zeros": 32, "dense_matrices": ["layers.1.o"],
        "left_out": [], "matrices": matrices,
        "blocks": [
            {"block": 0, "seconds": 1.5, "output_error": 0.25},
            {"block": 1, "seconds": 2.5, "output_error": 0.5},
        ],
        "seconds": {"pruning": 4.0, "this_process": 9.0}, "peak_memory_bytes": 2_000_000,
        "bytes": {"source_files": 900, "dense_16_bit": 1000, "output": 750}, "packed": None,
        "evaluation": {"before": perplexity(3.0, 20.0), "after": perplexity(4.0, 50.0)},
    }  # fmt: skip


def a_shrinking() -> Json:
    """The report of a shrinking of four blocks to three, whose heads, neurons and experts became fewer."""
    plan = {
        "command": "shrink", "model": {"name": "tiny", "digest": "ab12"}, "neurons": None, "heads": None, "layers": 1,
        "experts": 0.5, "target": 0.25, "of": ["heads", "neurons"], "round": 64, "criterion": "obs", "depth": "kl",
        "compensate": True, "seed": 7, "propagate": "block", "dtype": "auto",
        "calibration": {"source": "c4", "samples": 4, "seqlen": 8, "tokens": 32, "seed": 7, "digest": "cd34"},
        "device": "cpu", "threads": 2, "micro_batch_tokens": 4096,
        "evaluate": {"source": "wikitext2", "seqlen": None}, "software": SOFTWARE,
    }  # fmt: skip
    own = {"target": 0.25, "tokens": 32}
    matrices = [
        {"name": "model.layers.0.attn.o_proj", "shape": [4, 4], **own, "output_error": 0.5, "block": 0},
        {"name": "model.layers.0.mlp.experts.down[0]", "shape": [4, 2], **own, "output_error": 0.125, "block": 0},
        {"name": "model.layers.0.mlp.experts.down[1]", "shape": [4, 6], **own, "output_error": 0.25, "block": 0},
        {"name": "model.layers.1.attn.o_proj", "shape": [4, 4], **own, "output_error": 0.75, "block": 1},
    ]
    steps = [
        {"step": "layers", "removed": [2], "kl": 0.25, "tried": {"(0,)": 2.0, "(1,)": 1.0, "(2,)": 0.25, "(3,)": 0.5},
         "seconds": 2.0, "boot": "b"},
        {"step": "experts", "kept": [[1, 3], None, [0, 1]], "seconds": 1.0, "boot": "b",
         "salience": [[1.0, 3.0, 2.0, 4.0], None, [8.0, 7.0, 5.0, 6.0]]},
        {"step": "split", "heads": 1, "neurons": 0.125, "seconds": 3.0, "boot": "b",
         "kl": {"50.0% of the neurons removed": 0.75, "1 groups of heads left and 12.5% of the neurons removed": 0.5}},
    ]  # fmt: skip
    return {
        "schema": 1, "plan": plan,
        "config": {"intermediate_size": [1536, 1152], "num_hidden_layers": [4, 3], "head_dim": [None, 8],
                   "layer_types": [["a", "b", "a", "b"], ["a", "b", "b"]]},
        "parameters": {"before": 2000, "after": 1600, "blocks_before": 1600, "blocks_after": 1200},
        "removed_layers": [2], "kept_experts": [[1, 3], None, [0, 1]], "steps": steps, "matrices": matrices,
        "blocks": [
            {"block": 0, "seconds": 1.5, "output_error": 0.25},
            {"block": 1, "seconds": 2.5, "output_error": 0.5},
        ],
        "seconds": {"shrinking": 10.0, "this_process": 12.0}, "peak_memory_bytes": 2_000_000,
        "bytes": {"source_files": 900, "dense_16_bit": 4000, "output": 6400},
        "evaluation": {"before": perplexity(3.0, 20.0), "after": perplexity(4.0, 50.0)},
    }  # fmt: skip


def trained_matrix(name: str, shape: list[int], zeros: int, before: int) -> Json:
    sparsity = zeros / (shape[0] * shape[1])
    counts = {"zeros": zeros, "sparsity": sparsity, "zeros_before": before}
    return {"name": name, "shape": shape, "pattern": "unstructured", **counts}


def a_training(former: Json | None = None) -> Json:
    """The report of a training of a pruned model of two blocks, whose checkpoint of step 6 of 8 was the best."""
    plan = {
        "command": "finetune", "model": {"name": "thin", "digest": "ef56"},
        "data": {"source": "c4", "samples": 20, "seqlen": 8, "tokens": 160, "seed": 7, "digest": "cd78"},
        "train": "lora", "steps": 8, "batch_size": 2, "accumulate": 3, "learning_rate": 0.001, "rank": 4,
        "teacher": None, "course": None, "eval_steps": 2, "gradient_checkpointing": False, "seed": 7, "device": "cpu",
        "threads": 2, "evaluate": {"source": "wikitext2", "seqlen": None}, "software": SOFTWARE,
    }  # fmt: skip
    matrices = [
        trained_matrix("model.layers.0.attn.q_proj", [4, 4], 8, 8),
        trained_matrix("model.layers.0.mlp.up_proj", [6, 4], 18, 18),
        trained_matrix("model.layers.1.attn.q_proj", [4, 4], 4, 4),
        trained_matrix("head.proj", [2, 4], 2, 2),
    ]
    training = {
        "loss": "cross-entropy", "steps": 6, "stopped": None, "trainable": 1200,
        "losses": [[2, 4.5], [4, 4.0], [6, 3.5], [8, 3.0]],
        "held_out": [[0, 5.0], [2, 4.75], [4, 4.25], [6, 4.0], [8, 4.5]], "held_out_rows": 2,
    }  # fmt: skip
    return {
        "schema": 1, "plan": plan, "sparsity": 0.5, "sparsity_before": 0.5, "weights": 64, "zeros": 32,
        "training": training, "matrices": matrices, "seconds": {"training": 20.0}, "peak_memory_bytes": 2_000_000,
        "bytes": {"source_files": 900, "dense_16_bit": 1000, "output": 750}, "packed": None,
        "evaluation": {"before": perplexity(4.0, 50.0), "after": perplexity(3.5, 30.0)}, "former": former,
    }  # fmt: skip


def a_course(**changes: Any) -> Json:
    """How a model was pruned while it was trained: gradually, if there are no rounds."""
    own = {"samples": 64} if "rounds" in changes else {"initial": 0.25, "schedule": "cubic", "every": 2}
    return {
        "sparsity": 0.6, "pattern": None, "rounds": None, "method": "wanda", "allocation": "uniform", "include": [],
        "exclude": [], **own, **changes,
    }  # fmt: skip


def evaluations() -> list[Json]:
    """Evaluations of everything that can be measured."""
    dense = {
        "model": "tiny",
        "loss": 3.0,
        "perplexity": 20.0,
        "tasks": tasks(task("arc", 0.5, 0.03), task("piqa", 0.7, 0.02)),
    }
    prompts = [{"prompt": "Once upon", "continuation": " a time", "repetition": 0.0}]
    written = [{"prompt": "Once upon", "continuation": " a a a a a", "repetition": 0.75}]
    full = {
        "schema": 1, "date": "2026-11-22T13:00:00+00:00", "model": "out", **perplexity(4.0, 50.0),
        "fidelity": {"kl": 0.5, "top1": 0.75, "blocks": [0.0625, 0.375]},
        "against": {**dense, "generations": prompts}, "generations": written,
        "tasks": tasks(task("arc", 0.4, 0.04), task("piqa", 0.7, 0.02)), "software": SOFTWARE,
    }  # fmt: skip
    speed = {"schema": 1, "date": "2026-11-23T08:00:00+00:00", "bench": bench(), "software": SOFTWARE}
    return [full, speed]


def row(method: str, pattern: str | None, sparsity: float, value: float | None, **more: Any) -> Json:
    dense = method == "dense"
    return {
        "model": "tiny", "method": method, "pattern": pattern, "sparsity": sparsity,
        "target": None if dense else sparsity,
        "calibration": None, "propagate": None, "format": "dense", "evaluation": perplexity(2.0, value),
        "loss_increase": None if dense else 0.25, "perplexity_increase": None, "perplexity_ratio": None, "tasks": None,
        "task_mean_change": None, "seconds": 3.0, "peak_memory_bytes": None, "bytes": 1000, "bytes_ratio": 1.0,
        "bench": None, "decode_ratio": None, "resident_ratio": None, "error": None, **more,
    }  # fmt: skip


def a_comparison() -> Json:
    """Dense, lines of two methods, a point of N:M, and a row that failed."""
    rows = [
        row("dense", None, 0.0, 20.0, tasks=tasks(task("arc", 0.5, 0.03), task("piqa", 0.7, 0.04)), bench=bench(10.0)),
        row("wanda", "row", 0.5, 40.0, bytes=600, bench=bench(25.0), tasks=tasks(task("arc", 0.4, 0.06))),
        row("wanda", "row", 0.25, 25.0),
        row("wanda", "2:4", 0.5, 80.0, bytes=500),
        row("ria", "matrix", 0.5, 35.0),
        row("ria", "matrix", 0.75, None, evaluation=None, bytes=None, error="out of memory; make room"),
    ]
    document = {"schema": 1, "command": "secateur compare tiny", "date": "2026-11-22", "software": SOFTWARE}
    return {**document, "processor": "EPYC", "threads": 2, "rows": rows}


def poisoned(value: Any, key: str = "") -> Any:
    """The same data with hostile text in every string, and very long text where people write freely."""
    if isinstance(value, str):
        if key in ("command", "step") and " " not in value:
            return value  # such as pack or unpack, by which the kind of report is known
        return value + HOSTILE + ("x" * 10_000 if key in ("prompt", "continuation", "error", "secateur") else "")
    if isinstance(value, dict):
        own = key in ("software", "metrics", "config", "kl", "tried")  # keys that are data
        return {k + HOSTILE if own else k: poisoned(v, k) for k, v in value.items()}
    return [poisoned(item, key) for item in value] if isinstance(value, list) else value


def save_output(directory: Path, report: Json, lines: list[Json] = []) -> Path:  # noqa: B006  never changed
    directory.mkdir()
    (directory / "secateur.json").write_text(json.dumps(report))
    if lines:
        (directory / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def packed_report(pruned: Json | None, values: str | None = None) -> Json:
    plan = {"command": "pack", "format": "bitmask", "values": values, "model": {"name": "out", "digest": "ef56"}}
    packed = {"matrices": 4, "dense": 128, "predicted": 72, "true": 74}
    sizes = {"source": 1000, "output": 640}
    return {
        "schema": 1, "plan": {**plan, "software": SOFTWARE}, "bytes": sizes, "packed": packed, "dense_matrices": [],
        "pruned": copy.deepcopy(pruned),
    }  # fmt: skip


def save_run(directory: Path, report: Json, blocks: int) -> Path:
    """A run directory whose process was killed while it wrote the line after `blocks` blocks."""
    directory.mkdir()
    (directory / "plan.json").write_text(json.dumps(report["plan"]))
    journal = [{"evaluated": "before", "of": report["plan"]["evaluate"], "result": report["evaluation"]["before"]}]
    journal += report.get("steps", [])
    for block in report["blocks"][:blocks]:
        own = [m for m in report["matrices"] if m["block"] == block["block"]]
        bare = [{"zeros": 4, **{k: v for k, v in m.items() if k not in ("block", "sparsity")}} for m in own]
        journal.append({**block, "matrices": bare, "boot": "b"})
    torn = '{"block": 1, "secon'
    (directory / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in journal) + torn)
    return directory


def save_training(directory: Path, report: Json, saved: int, ended: bool = False) -> Path:
    """The run directory of a training that was killed after so many checkpoints, or before its end was written."""
    directory.mkdir()
    (directory / "plan.json").write_text(json.dumps(report["plan"]))
    journal = [{"evaluated": "before", "of": report["plan"]["evaluate"], "result": report["evaluation"]["before"]}]
    journal += [{"step": "saved", "at": 2 * (i + 1), "seconds": 2.5, "boot": "b"} for i in range(saved)]
    if ended:
        end = {"step": "trained", **report["training"], "matrices": report["matrices"], "seconds": 20.0}
        journal.append(end)
    (directory / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in journal) + '{"step": "sav')
    return directory


def save_every_kind(folder: Path) -> dict[str, Path]:
    """One path of each kind that a page can be made of, hostile ones and poor ones among them."""
    pruned, shrunk, lines, comparison = a_pruning(), a_shrinking(), evaluations(), a_comparison()
    trained = a_training(pruned)
    course = {
        **trained,
        "plan": {**trained["plan"], "course": a_course(allocation={"0": 0.25}), "teacher": {"name": "t"}},
    }
    paths = {
        "pruned": save_output(folder / "out", pruned),
        "full": save_output(folder / "full", pruned, lines),
        "packed": save_output(folder / "packed", packed_report(pruned), lines),
        "packed int8": save_output(folder / "int8", packed_report(None, "int8")),
        "unfinished": save_run(folder / "half.secateur", pruned, 1),
        "shrunk": save_output(folder / "shrunk", shrunk, lines),
        "shrunk packed": save_output(folder / "shrunk-packed", packed_report(shrunk, "int8")),
        "shrunk unfinished": save_run(folder / "shrunk-half.secateur", shrunk, 1),
        "shrunk hostile": save_output(folder / "shrunk-hostile", poisoned(shrunk), [poisoned(line) for line in lines]),
        "trained": save_output(folder / "trained", trained, lines),
        "trained packed": save_output(folder / "trained-packed", packed_report(course, "int8")),
        "trained unfinished": save_training(folder / "trained-half.secateur", trained, 3),
        "trained hostile": save_output(
            folder / "trained-hostile", poisoned(course), [poisoned(line) for line in lines]
        ),
        "hostile": save_output(folder / "hostile", poisoned(pruned), [poisoned(line) for line in lines]),
    }
    rows = comparison["rows"]
    larger = [{**r, "model": "larger", "bytes": r["bytes"] and r["bytes"] * 4} for r in rows]
    documents = {
        "comparison": comparison,
        "models": {**comparison, "rows": rows + larger},
        "hostile comparison": poisoned({**comparison, "rows": rows + larger}),
        "dense only": {**comparison, "rows": rows[:1]},
        "one row": {**comparison, "rows": rows[1:2]},
        "no rows": {**comparison, "rows": []},
        "beyond": {**comparison, "rows": [rows[0], row("wanda", "row", 0.5, None), row("ria", "row", 0.5, 1e299)]},
    }
    for name, document in documents.items():
        paths[name] = folder / f"{name}.json"
        paths[name].write_text(json.dumps(document))
    return paths
