"""The steps from a model to a smaller one: blocks, experts, heads and neurons are removed, one after the other.

Every step makes a checkpoint of a checkpoint. What it chose is in the run directory's journal, and is not chosen again.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..models.checkpoint import Checkpoint
from ..models.disk_host import DiskHost
from ..models.gguf import as_checkpoint
from ..models.replay import check_replay
from ..models.shards import digest
from ..models.source import load_tokenizer, open_checkpoint
from ..pipeline.calibration import Tokens
from ..pipeline.disk_run import DiskRun
from ..pipeline.loop import prune_blocks
from ..pipeline.machine import choose_device, software
from ..pipeline.output import files_beside
from ..pipeline.plan import calibration_record, written_dtype
from ..pipeline.prune import stream_at
from ..pipeline.run_directory import RunDirectory
from ..pipeline.self_text import tokens_for
from ..pipeline.stream import MICRO_BATCH_TOKENS, Stream
from ..progress import Progress
from . import depth
from .config import PREDICTOR, Config, changes, rounded
from .cutting import kinds_of_blocks
from .experts import Thinning, saliences, strongest
from .proof import probe, prove
from .request import ShrinkRequest
from .split import Share, best_share, possible, shares, values_of, widths_of
from .views import smaller_model, with_tensors, without_blocks
from .width import Narrowing

log = logging.getLogger("secateur")


class Shrinking:
    """One model on its way to a smaller one."""

    def __init__(
        self, source: Checkpoint, host: DiskHost, tokens: Tokens | None, request: ShrinkRequest, progress: Progress
    ) -> None:
        self.source, self.host, self.tokens, self.request, self.progress = source, host, tokens, request, progress
        self.config = Config(source.directory, host.model.config, kinds_of_blocks(host))
        self.plan: dict[str, Any] = {}
        self.layers = self._layers()
        self.narrow = host  # the last model on the way, for its shapes

    @classmethod
    def prepared(
        cls, model: str, path: Path, scratch: Path, request: ShrinkRequest, progress: Progress, tokenizer: Any
    ) -> Shrinking:
        """Open the model, read the calibration text, and make the plan."""
        dtype = written_dtype(request.dtype)
        source = open_checkpoint(as_checkpoint(path, scratch, dtype), request.trust_remote_code)
        host = DiskHost(source, choose_device(request.device), dtype)
        files_beside(source, fit=False)
        if beyond := uncut(host):
            others = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
            log.info("%s%s: predict further tokens, fit the whole model alone, and are left out", beyond[0], others)
            source = with_tensors(source, {}, beyond)
            host = DiskHost(source, host.device, dtype)
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
        source.check_cast(dtype)
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

    def check(self) -> None:
        """Prove that the model's blocks can be run one at a time, and learn what they return.

        Raises:
            ModelError: they cannot.
        """
        check_replay(self.host.skeleton, self.host.block, probe(self.host))

    def _layers(self) -> int | list[int] | None:
        """How many blocks go, or which; checked."""
        request, layers = self.request, self.request.wanted_layers()
        if request.target is not None and request.parts == ["layers"]:
            layers = depth.share(request.target, self.config)
        if layers is not None:
            depth.check_layers(layers, self.config)
        return layers

    def with_fewer_blocks(self, run: RunDirectory) -> DiskHost:
        """Remove blocks, prove that the others give the same in their new places, and return what is left."""
        if self.layers is None:
            return self.host
        removed = self.layers if isinstance(self.layers, list) else self._chosen_blocks(run, self.layers)
        return self._without_blocks(removed, run.path / "source-layers")

    def _without_blocks(self, removed: Sequence[int], folder: Path) -> DiskHost:
        view = without_blocks(self.host, removed, self.config.changed(**self.config.fewer_layers(removed)), folder)
        kept = [index for index in range(self.config.layers) if index not in removed]
        small = smaller_model(view, self.host, kept)
        self.progress.start("proving the cut", len(kept))
        for place, index in enumerate(kept):
            with self.host.block(index) as block:
                prove(self.host, block, index, small, place, {}, [])
            self.progress.advance()
        self.progress.finish()
        return small

    def _chosen_blocks(self, run: RunDirectory, count: int) -> list[int]:
        steps, started = steps_of(run, "layers"), time.perf_counter()
        known = steps[-1]["removed"] if steps else []
        if len(known) == count:
            return sorted(known)

        def note(event: dict[str, Any]) -> None:
            nonlocal started
            run.note({"step": "layers", **event, "seconds": time.perf_counter() - started})
            started = time.perf_counter()

        units, request = depth.units(self.config), self.request
        if request.depth == "kl":
            return depth.greedy(self.host, self.rows, units, count, self.progress, known, note)
        if request.depth == "influence":
            influence = depth.influences(self.host, self.rows, self.progress)
        else:
            generator = torch.Generator().manual_seed(request.seed)
            influence = torch.rand(self.config.layers, generator=generator, dtype=torch.float32).tolist()
        removed = depth.least_influential(influence, units, count)
        note({"removed": removed, "influence": influence})
        return removed

    def with_fewer_experts(self, run: RunDirectory, host: DiskHost) -> DiskHost:
        """Remove experts, prove that tokens go to the others as if those were silent, and return what is left."""
        if self.request.experts is None:
            return host
        thinning = Thinning(host, self.request.experts, run.path / "source-experts")
        checkpoint = thinning.cut(self._kept_experts(run, host, thinning.left), run.path / "cut", self.progress)
        return smaller_model(checkpoint, host)

    def _kept_experts(self, run: RunDirectory, host: DiskHost, left: int) -> list[list[int] | None]:
        for line in steps_of(run, "experts"):
            known: list[list[int] | None] = line["kept"]
            return known
        started, stream = time.perf_counter(), Stream(host, self.rows, run.path / "hidden")
        found = saliences(host, stream, self.progress)
        stream.close()
        kept = [None if salience is None else strongest(salience, left) for salience in found]
        seconds = time.perf_counter() - started
        run.note({"step": "experts", "kept": kept, "salience": found, "seconds": seconds})
        return kept

    def foreseen(self, scratch: Path) -> dict[str, Any]:
        """Try every cut on the whole model that no measurement decides: what would go wrong after hours goes wrong now.

        Returns:
            New values of the config, and the candidates that a target would be chosen from.

        Raises:
            SecateurError: the model cannot be cut so.
        """
        values: dict[str, Any] = {}
        request, candidates = self.request, list[str]()
        if self.layers is not None:
            any_blocks = self.layers if isinstance(self.layers, list) else list(range(self.layers))
            small = self._without_blocks(any_blocks, scratch / "source-layers")
            values["num_hidden_layers"] = len(small.skeleton.real)
        if request.experts is not None:
            thinning = Thinning(self.host, request.experts, scratch / "source-experts")
            thinning.settle()
            values |= thinning.values
        if request.target is None or request.parts == ["layers"]:
            narrower = values_of(self.config, share_of(self.config, request), widths_of(self.host), request.round)
            if narrower:
                Narrowing(self.host, narrower, scratch / "source-narrow").settle(self.progress)
            values |= narrower
        else:
            ways = shares(self.host, request.target, request.parts)
            candidates = list(
                map(str, possible(self.host, ways, request.round, request.method, scratch / "source-split"))
            )
        return {"config": changes(self.config, values), "candidates": candidates}

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
        return narrowing.cut(results.written, run.path / "cut", self.progress)

    def _share(self, run: RunDirectory, host: DiskHost) -> Share:
        """How much is to be taken from heads and from neurons."""
        request, config = self.request, Config(host.checkpoint.directory, host.model.config)
        if request.target is None or request.parts == ["layers"]:
            return share_of(config, request)
        for line in steps_of(run, "split"):
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


def uncut(host: DiskHost) -> list[str]:
    """Return the names of tensors that predict further tokens, which the model does not have and nobody cuts.

    They are blocks after the last one (DeepSeek, GLM), heads by names of their own (``mtp.``), and whatever else ends
    like a tensor of a block.
    """
    stack = host.skeleton.path.rpartition(".")[2]
    numbered = re.compile(rf"(^|\.){re.escape(stack)}\.\d+\.")
    inner = {numbered.split(name, 1)[-1] for names in host.names.values() for name in names if numbered.search(name)}

    def ends_like_a_block(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[start:]) in inner for start in range(1, len(parts)))

    inside = {name for index in range(len(host.skeleton.real)) for name in host.names.get(index, [])}
    return sorted(n for n in host.foreign - inside if PREDICTOR.search(n) or ends_like_a_block(n))


def steps_of(run: RunDirectory, name: str) -> list[dict[str, Any]]:
    """What the journal knows of a step, in order."""
    return [line for line in run.journal if line.get("step") == name]


def share_of(config: Config, request: ShrinkRequest) -> Share:
    """How much is asked for of heads and of neurons."""
    left = None if request.heads is None else rounded(config.heads[1], request.heads, 1, "heads")
    return Share(left, request.neurons)
