"""Shrinking from disk to disk: blocks, experts, heads and neurons are removed, and a smaller dense model is written.

Every step makes a checkpoint of a checkpoint, whose tensors stay where they are or lie in the run directory:

    blocks     chosen by what the model predicts without them; the rest is renumbered
    experts    chosen by what they give to their tokens, all at once
    heads, neurons   pruned as whole columns by the loop that prunes everything else, then cut
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from ..models.checkpoint import Checkpoint
from ..models.source import locate
from ..pipeline.files import check_room, write_text
from ..pipeline.machine import peak_memory_bytes, threads
from ..pipeline.output import SCHEMA, Describe, check_output, write_checkpoint
from ..pipeline.prune import Evaluate, evaluated, file_bytes
from ..pipeline.run_directory import REPORT, RunDirectory, finished_result, run_of
from ..progress import Progress
from .config import changes
from .request import ShrinkRequest
from .split import block_parameters
from .steps import Shrinking


def shrink_checkpoint(
    model: str,
    output: Path,
    request: ShrinkRequest,
    progress: Progress,
    *,
    tokenizer: Any = None,
    evaluate: Evaluate | None = None,
    describe: Describe | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    resume: bool = True,
) -> dict[str, Any]:
    """Remove parts of a model and write what is left as a smaller one; go on where a killed run stopped.

    Args:
        model: MODEL as the user names it.
        output: directory of the new checkpoint.
        request: the options.
        progress: hears of the work.
        tokenizer: in place of the model's own.
        evaluate: measures a checkpoint's directory; called before and after.
        describe: adds to the finished directory what people read.
        dry_run: return the plan, and what the config would say as far as it can be told; write nothing.
        overwrite: replace a result of ours.
        resume: go on with an earlier run.

    Returns:
        The report, equal to ``secateur.json``.
    """
    started = time.perf_counter()
    request.check()
    path = locate(model, request.trust_remote_code)
    check_output(output, path, overwrite)
    if dry_run:
        with tempfile.TemporaryDirectory() as scratch, threads(request.threads):
            shrinking = Shrinking.prepared(model, path, Path(scratch), request, progress, tokenizer)
            shrinking.check()
            return {**shrinking.plan, **shrinking.foreseen(Path(scratch))}
    with run_of(output, resume) as run, threads(request.threads):
        shrinking = Shrinking.prepared(model, path, run.path, request, progress, tokenizer)
        finished = None if overwrite else finished_result(run.output, shrinking.plan)
        if finished is not None:
            run.forget()
            return finished
        run.begin(shrinking.plan)
        return _run(run, shrinking, path, evaluate, describe, started)


def _run(
    run: RunDirectory,
    shrinking: Shrinking,
    path: Path,
    evaluate: Evaluate | None,
    describe: Describe | None,
    started: float,
) -> dict[str, Any]:
    source, progress = shrinking.source, shrinking.progress
    needed = 3 * source.bytes + shrinking.hidden_bytes
    check_room(run.path, 0 if run.journal else needed, "this run")
    shrinking.check()
    if not run.begun:
        shrinking.foreseen(run.path)
    before = evaluated(run, shrinking.plan, "before", source.directory, evaluate)
    host = shrinking.with_fewer_blocks(run)
    host = shrinking.with_fewer_experts(run, host)
    smaller = shrinking.narrowed(run, host)
    target = run.path / "output"
    write_checkpoint(smaller, [], target, host.dtype, progress)
    after = evaluated(run, shrinking.plan, "after", target, evaluate)
    report = {
        "schema": SCHEMA,
        "plan": shrinking.plan,
        **facts(shrinking, run, target),
        "seconds": {"shrinking": seconds(run), "this_process": time.perf_counter() - started},
        "peak_memory_bytes": peak_memory_bytes(),
        "bytes": file_bytes(path, source, target),
        "evaluation": {"before": before, "after": after} if after else None,
    }
    write_text(target / REPORT, json.dumps(report, indent=1))
    if describe:
        describe(target, source.directory)
    run.install()
    return report


def facts(shrinking: Shrinking, run: RunDirectory, target: Path) -> dict[str, Any]:
    """What a report says of the model that was made."""
    steps: dict[str, dict[str, Any]] = {}
    for line in run.journal:  # of several rounds the last, with the time of all
        if "step" in line:
            spent = steps.get(line["step"], {}).get("seconds", 0.0) + line["seconds"]
            steps[line["step"]] = {k: v for k, v in line.items() if k != "boot"} | {"seconds": spent}
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    removed = shrinking.layers if isinstance(shrinking.layers, list) else steps.get("layers", {}).get("removed", [])
    return {
        "config": changes(shrinking.config, config),
        "parameters": {
            "before": sum(info.weights for info in shrinking.source.tensors.values()),
            "after": sum(info.weights for info in Checkpoint.open(target).tensors.values()),
            "blocks_before": block_parameters(shrinking.host),
            "blocks_after": block_parameters(shrinking.narrow),
        },
        "removed_layers": sorted(removed),
        "kept_experts": steps.get("experts", {}).get("kept"),
        "steps": list(steps.values()),
        "blocks": [{key: block[key] for key in ("block", "seconds", "output_error")} for block in run.blocks],
        "matrices": [
            {**{key: m[key] for key in ("name", "shape", "target", "output_error", "tokens")}, "block": b["block"]}
            for b in run.blocks
            for m in b["matrices"]
        ],
    }


def seconds(run: RunDirectory) -> float:
    """What the work took, in all processes."""
    return float(sum(line["seconds"] for line in run.journal if "block" in line or "step" in line))
