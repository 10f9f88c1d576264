"""Shrinking from disk to disk: blocks, experts, heads and neurons are removed, and a smaller dense model is written.

Every step makes a checkpoint of a checkpoint, whose tensors stay where they are or lie in the run directory:

    blocks     chosen by what the model predicts without them; the rest is renumbered
    experts    chosen by what they give to their tokens, all at once
    heads, neurons   pruned as whole columns by the loop that prunes everything else, then cut
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ModelError, OutputError, unwritable
from ..models.checkpoint import Checkpoint
from ..models.gguf import as_checkpoint
from ..models.hosts import DiskHost
from ..models.shards import digest
from ..models.source import load_tokenizer, locate, open_checkpoint
from ..pipeline.calibration import Tokens
from ..pipeline.disk_run import DiskRun
from ..pipeline.files import check_room, write_text
from ..pipeline.loop import prune_blocks
from ..pipeline.machine import choose_device, peak_memory_bytes, software, threads
from ..pipeline.output import SCHEMA, Describe, check_output, write_checkpoint
from ..pipeline.plan import calibration_record, written_dtype
from ..pipeline.prune import Evaluate, evaluated, file_bytes, stream_at
from ..pipeline.run_directory import REPORT, RunDirectory, finished_result
from ..pipeline.self_text import tokens_for
from ..pipeline.stream import MICRO_BATCH_TOKENS, Stream
from ..progress import Progress
from . import depth
from .config import Config, changes, rounded
from .cut import Kept
from .experts import saliences, strongest
from .proof import prove, silenced_experts
from .request import ShrinkRequest
from .roles import Geometry
from .split import Share, best_share, shares, values_of, widths_of
from .views import with_config, without_blocks
from .width import Narrowing, cut_all

log = logging.getLogger("secateur")


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
    request.check()
    path = locate(model, request.trust_remote_code)
    check_output(output, path, overwrite)
    if output.is_symlink():  # the result goes where it leads
        output = output.resolve()
    if dry_run:
        with tempfile.TemporaryDirectory() as scratch, threads(request.threads):
            shrinking = Shrinking.prepared(model, path, Path(scratch), request, progress, tokenizer)
            return {**shrinking.plan, **shrinking.outlook(Path(scratch))}
    run = RunDirectory(output, resume)
    try:
        with threads(request.threads):
            shrinking = Shrinking.prepared(model, path, run.path, request, progress, tokenizer)
            finished = None if overwrite else finished_result(output, shrinking.plan)
            if finished is not None:
                run.forget()
                return finished
            run.begin(shrinking.plan)
            return _run(run, shrinking, path, evaluate, describe)
    except OSError as error:
        raise OutputError(f"{error.filename or run.path}: {unwritable(error)}") from error
    finally:
        run.close()


def _run(
    run: RunDirectory, shrinking: Shrinking, path: Path, evaluate: Evaluate | None, describe: Describe | None
) -> dict[str, Any]:
    started = time.perf_counter()
    source, progress = shrinking.source, shrinking.progress
    needed = 3 * source.bytes + shrinking.hidden_bytes
    check_room(run.path, 0 if run.journal else needed, "this run")
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
        **shrinking.facts(run, target),
        "seconds": {"shrinking": shrinking.seconds(run), "this_process": time.perf_counter() - started},
        "peak_memory_bytes": peak_memory_bytes(),
        "bytes": file_bytes(path, source, target),
        "evaluation": {"before": before, "after": after} if after else None,
    }
    write_text(target / REPORT, json.dumps(report, indent=1))
    if describe:
        describe(target, source.directory)
    run.install()
    return report


class Shrinking:
    """One model on its way to a smaller one."""

    def __init__(
        self, source: Checkpoint, host: DiskHost, tokens: Tokens | None, request: ShrinkRequest, progress: Progress
    ) -> None:
        self.source, self.host, self.tokens, self.request, self.progress = source, host, tokens, request, progress
        self.config = Config(source.directory, host.model.config)
        self.plan: dict[str, Any] = {}
        self.layers = self._layers()

    @classmethod
    def prepared(
        cls, model: str, path: Path, scratch: Path, request: ShrinkRequest, progress: Progress, tokenizer: Any
    ) -> Shrinking:
        """Open the model, read the calibration text, and make the plan."""
        dtype = written_dtype(request.dtype)
        source = open_checkpoint(as_checkpoint(path, scratch, dtype), request.trust_remote_code)
        host = DiskHost(source, choose_device(request.device), dtype)
        tokens = None
        if request.needs_tokens:
            tokenizer = tokenizer or load_tokenizer(source.directory, request.trust_remote_code)
            tokens = tokens_for(
                host, request.calibration, tokenizer, request.samples, request.seqlen, request.seed, progress
            )
        files = source.files if path.is_dir() else [path]
        progress.start("reading the model", sum(file.stat().st_size for file in files))
        shrinking = cls(source, host, tokens, request, progress)
        shrinking.plan = {
            "command": "shrink",
            "model": {"name": model, "digest": digest(files, progress.advance)},
            **request.record,
            "calibration": calibration_record(tokens, request.seed) if tokens else None,
            "device": str(host.device),
            "threads": torch.get_num_threads(),
            "micro_batch_tokens": MICRO_BATCH_TOKENS,
            "evaluate": {"source": request.evaluate, "seqlen": request.seqlen} if request.evaluate else None,
            "software": software(),
        }
        progress.finish()
        return shrinking

    @property
    def rows(self) -> Sequence[torch.Tensor]:
        """The calibration rows; none if nothing is to be observed."""
        return self.tokens.rows if self.tokens else []

    @property
    def hidden_bytes(self) -> int:
        """What hidden states take on the disk."""
        width = int(self.host.model.config.get_text_config().hidden_size)
        return 2 * self.tokens.tokens * width * 4 if self.tokens else 0

    def _layers(self) -> int | list[int] | None:
        """How many blocks go, or which; checked."""
        request, layers = self.request, self.request.wanted_layers()
        if request.target is not None and request.parts == ["layers"]:
            layers = self.config.layers - rounded(self.config.layers, request.target, self.config.period, "layers")
        if layers is not None:
            depth.check_layers(layers, self.config)
        return layers

    def with_fewer_blocks(self, run: RunDirectory) -> DiskHost:
        """Remove blocks, prove that the others give the same in their new places, and return what is left."""
        if self.layers is None:
            return self.host
        removed = self.layers if isinstance(self.layers, list) else self._chosen_blocks(run, self.layers)
        view = without_blocks(
            self.host, removed, self.config.changed(**self.config.fewer_layers(removed)), run.path / "source-layers"
        )
        small = DiskHost(view, self.host.device, self.host.dtype)
        kept = [index for index in range(self.config.layers) if index not in removed]
        self.progress.start("proving the cut", len(kept))
        for place, index in enumerate(kept):
            with self.host.block(index) as block:
                prove(self.host, block, index, small, place, {}, [])
            self.progress.advance()
        self.progress.finish()
        return small

    def _chosen_blocks(self, run: RunDirectory, count: int) -> list[int]:
        steps = [line for line in run.journal if line.get("step") == "layers"]
        if steps and len(steps[-1]["removed"]) == count:
            return sorted(steps[-1]["removed"])
        units, started = depth.units(self.config), time.perf_counter()

        def note(event: dict[str, Any]) -> None:
            nonlocal started
            run.note({"step": "layers", **event, "seconds": time.perf_counter() - started})
            started = time.perf_counter()

        if self.request.depth == "kl":
            known = steps[-1]["removed"] if steps else []
            return depth.greedy(self.host, self.rows, units, count, self.progress, known, note)
        if self.request.depth == "influence":
            influence = depth.influences(self.host, self.rows, self.progress)
        else:
            generator = torch.Generator().manual_seed(self.request.seed)
            influence = torch.rand(self.config.layers, generator=generator).tolist()
        removed = depth.least_influential(influence, units, count)
        note({"removed": removed, "influence": influence})
        return removed

    def with_fewer_experts(self, run: RunDirectory, host: DiskHost) -> DiskHost:
        """Remove experts, prove that tokens go to the others as if those were silent, and return what is left."""
        if self.request.experts is None:
            return host
        config = Config(host.checkpoint.directory, host.model.config)
        values = config.fewer_experts(self.request.experts)
        (left,) = values.values()
        view = with_config(host.checkpoint, config.changed(**values), run.path / "source-experts")
        small = DiskHost(view, host.device, host.dtype)
        kept = self._chosen_experts(run, host, left)

        def cut(index: int, block: nn.Module) -> tuple[Kept, AbstractContextManager[None]]:
            return Kept(experts=kept[index]), silenced_experts(host, block, index, small, kept[index] or [])

        folder = run.path / "cut" / "experts"
        folder.parent.mkdir(exist_ok=True)
        checkpoint = cut_all(host, small, Geometry(1, 1), cut, lambda index: {}, folder, self.progress)
        return DiskHost(checkpoint, host.device, host.dtype)

    def _chosen_experts(self, run: RunDirectory, host: DiskHost, left: int) -> list[list[int] | None]:
        for line in run.journal:
            if line.get("step") == "experts":
                known: list[list[int] | None] = line["kept"]
                return known
        started, stream = time.perf_counter(), Stream(host, self.rows, run.path / "hidden")
        found = saliences(host, stream, self.progress)
        stream.close()
        if all(salience is None for salience in found):
            raise ModelError(f"{self.config.kind}: its experts are behind no interface that can be observed")
        kept = [None if salience is None else strongest(salience, left) for salience in found]
        shown = [None if salience is None else salience.tolist() for salience in found]
        run.note({"step": "experts", "kept": kept, "salience": shown, "seconds": time.perf_counter() - started})
        return kept

    def narrowed(self, run: RunDirectory, host: DiskHost) -> Checkpoint:
        """Remove neurons and heads by the pruning loop, cut what it left, and return the checkpoint."""
        self.narrow = host
        share = self._share(run, host)
        if share.heads is None and not share.neurons:
            return host.checkpoint
        config = Config(host.checkpoint.directory, host.model.config)
        values = values_of(config, share, widths_of(host), self.request.round)
        narrowing = Narrowing(host, values, run.path / "source-narrow")
        narrowing.settle(self.progress)
        self.narrow = narrowing.small
        job, results = narrowing.job(self.request.method, self.request.propagate), DiskRun(run, host)
        if results.done < len(host.skeleton.real):
            if results.done:
                log.info("going on from block %d of %d", results.done + 1, len(host.skeleton.real))
            tokens = self.tokens if job.method.needs else None
            stream = stream_at(run, host, results, tokens, job, self.progress) if tokens else None
            prune_blocks(host, job, stream, results, self.progress)
            if stream:
                stream.close()
        (run.path / "cut").mkdir(exist_ok=True)
        return narrowing.cut(results.written, run.path / "cut" / "narrow", self.progress)

    def _share(self, run: RunDirectory, host: DiskHost) -> Share:
        """How much is to be taken from heads and from neurons."""
        request, config = self.request, Config(host.checkpoint.directory, host.model.config)
        if request.target is None or request.parts == ["layers"]:
            left = None if request.heads is None else rounded(config.heads[1], request.heads, 1, "heads")
            return Share(left, request.neurons)
        for line in run.journal:
            if line.get("step") == "split":
                return Share(line["heads"], line["neurons"])
        candidates, started = shares(host, request.target, request.parts), time.perf_counter()
        share, tried = candidates[0], dict[str, float]()
        if len(candidates) > 1:
            share, tried = best_share(
                host, candidates, request.round, request.method, self.rows, run.path / "hidden", self.progress
            )
        seconds = time.perf_counter() - started
        run.note({"step": "split", "heads": share.heads, "neurons": share.neurons, "kl": tried, "seconds": seconds})
        return share

    def seconds(self, run: RunDirectory) -> float:
        """What the work took, in all processes."""
        return float(sum(line["seconds"] for line in run.journal if "block" in line or "step" in line))

    def facts(self, run: RunDirectory, target: Path) -> dict[str, Any]:
        """What a report says of the model that was made."""
        steps = {line["step"]: line for line in run.journal if "step" in line}
        config = json.loads((target / "config.json").read_text())
        removed = self.layers if isinstance(self.layers, list) else steps.get("layers", {}).get("removed", [])
        return {
            "config": changes(self.config, config),
            "parameters": {
                "before": sum(info.weights for info in self.source.tensors.values()),
                "after": sum(info.weights for info in Checkpoint.open(target).tensors.values()),
                "blocks_before": block_parameters(self.host),
                "blocks_after": block_parameters(self.narrow),
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

    def outlook(self, scratch: Path) -> dict[str, Any]:
        """What can be told before the work: new values of the config, as far as no measurement decides them."""
        values: dict[str, Any] = {}
        if self.layers is not None:
            count = self.layers if isinstance(self.layers, int) else len(self.layers)
            values["num_hidden_layers"] = self.config.layers - count
        if self.request.experts is not None:
            values |= self.config.fewer_experts(self.request.experts)
        if self.request.target is None or self.request.parts == ["layers"]:
            left = None
            if self.request.heads is not None:
                left = rounded(self.config.heads[1], self.request.heads, 1, "heads")
            share = Share(left, self.request.neurons)
            narrower = values_of(self.config, share, widths_of(self.host), self.request.round)
            if narrower:
                Narrowing(self.host, narrower, scratch / "narrow").settle(self.progress)
            values |= narrower
            candidates = []
        else:
            candidates = [str(share) for share in shares(self.host, self.request.target, self.request.parts)]
        return {"config": changes(self.config, values), "candidates": candidates}


def block_parameters(host: DiskHost) -> int:
    """How many parameters a model's blocks hold."""
    return sum(parameter.numel() for block in host.skeleton.real for parameter in block.parameters())
