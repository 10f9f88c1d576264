"""What a training does, frozen: all that decides its result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import OptionError
from ..models.checkpoint import Checkpoint
from ..models.disk_host import DiskHost
from ..models.gguf import as_checkpoint
from ..models.shards import digest
from ..models.source import load_tokenizer, locate, open_checkpoint
from ..pipeline.calibration import Tokens, context_length
from ..pipeline.machine import software
from ..pipeline.plan import calibration_record, listed
from ..pipeline.rules import allocation_rules
from .request import FinetuneRequest

COURSE = ("sparsity", "initial", "schedule", "every", "rounds", "method", "pattern", "samples")


def make_plan(
    request: FinetuneRequest, model: Mapping[str, Any], tokens: Tokens, teacher: DiskHost | None, device: str
) -> dict[str, Any]:
    """Return all that decides the result."""
    pruning = request.pruning
    rules = allocation_rules(request.allocation)
    course: dict[str, Any] | None = None
    if request.prunes:
        course = {name: getattr(request, name) for name in COURSE} | {
            "method": str(pruning.method),
            "allocation": "uniform" if rules is None else (dict(rules) if isinstance(rules, Mapping) else list(rules)),
            "include": listed(request.include),
            "exclude": listed(request.exclude),
        }
        course["every"] = request.masked_every
        for unused in ("schedule", "every") if request.rounds else ("samples",):
            del course[unused]
    return {
        "command": "finetune",
        "model": dict(model),
        "data": calibration_record(tokens, request.seed),
        "train": request.trained,
        "steps": request.steps,
        "batch_size": request.batch_size,
        "accumulate": request.accumulate,
        "learning_rate": request.rate,
        "rank": request.rank if request.trained == "lora" else None,
        "teacher": teacher
        and {"name": request.teacher, "digest": source_digest(teacher.checkpoint.directory, teacher.checkpoint)},
        "course": course,
        "eval_steps": request.evaluated_every,
        "gradient_checkpointing": request.gradient_checkpointing,
        "seed": request.seed,
        "device": device,
        "threads": torch.get_num_threads(),
        "evaluate": {"source": request.evaluate, "seqlen": request.seqlen} if request.evaluate else None,
        "software": software(),
    }


def open_teacher(request: FinetuneRequest, scratch: Path, student: DiskHost, seqlen: int) -> DiskHost:
    """Open the model whose predictions are to be learnt.

    Raises:
        OptionError: its vocabulary is another one, or its context is shorter than the rows.
    """
    path = locate(str(request.teacher), request.trust_remote_code)
    host = DiskHost(open_checkpoint(as_checkpoint(path, scratch), request.trust_remote_code), torch.device("cpu"))
    sizes = [one.model.config.get_text_config().vocab_size for one in (host, student)]
    words = [load_tokenizer(one.checkpoint.directory, request.trust_remote_code) for one in (host, student)]
    if sizes[0] != sizes[1] or (all(words) and words[0].get_vocab() != words[1].get_vocab()):
        raise OptionError(
            f"teacher {request.teacher}: has another vocabulary than the model, so its predictions cannot be learnt; "
            "use the model that was pruned, before it was"
        )
    context = context_length(host.model.config)
    if context is not None and context < seqlen:
        raise OptionError(f"teacher {request.teacher}: its context is {context} tokens; give --seqlen {context}")
    return host


def source_digest(path: Path, source: Checkpoint) -> str:
    """The digest of a model's files, or of the one file that it came in."""
    return digest(source.files if path.is_dir() else [path])
