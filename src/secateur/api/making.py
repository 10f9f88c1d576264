"""Making models: prune, pack, unpack."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import ModelError, OptionError
from ..models.gguf import as_checkpoint
from ..models.in_memory import is_path, model_in_memory, model_name
from ..models.source import load_model, load_tokenizer, locate, open_checkpoint
from ..pipeline.live import prune_live
from ..pipeline.machine import choose_device
from ..pipeline.packing import pack_checkpoint, unpack_checkpoint
from ..pipeline.plan import Request
from ..pipeline.presets import chosen
from ..pipeline.prune import prune_checkpoint
from ..pipeline.reconstruct import Reconstruction
from ..progress import Progress
from ..pruning import Method
from ..reporting.terminal.progress import terminal_progress
from .places import measured_on, output_path, write_card
from .searching import search_path, sought
from .undisturbed import undisturbed


@dataclass(frozen=True)
class PruneResult:
    """What `prune` gives back.

    Attributes:
        model: the pruned model, if one is in memory.
        path: the output directory, if one was written.
        report: the contents of ``secateur.json`` (docs/json.md).
    """

    model: PreTrainedModel | None
    path: Path | None
    report: dict[str, Any]


@undisturbed
def prune(
    model: str | Path | PreTrainedModel | nn.Module,
    output: str | Path | None = None,
    *,
    preset: str | None = None,
    method: str | Method | None = None,
    update: str | None = None,
    sparsity: float | None = None,
    pattern: str | None = None,
    calibration: Any = "c4",
    samples: int | None = None,
    seqlen: int | None = None,
    seed: int = 0,
    allocation: str | Mapping[str, float | str] | Sequence[float] | None = None,
    propagate: str = "block",
    reconstruct: bool | Reconstruction | None = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    format: str = "dense",
    values: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    evaluate: str | None = None,
    max_loss: float | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    resume: bool = True,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> PruneResult:
    """Prune a model in one shot.

    A path or hub id with `output` is pruned from disk to disk, one block in memory at a time, and a killed run
    goes on where it stopped. A live model is pruned in place. A path without `output` is loaded, pruned and
    given back.

    Args:
        model: directory, hub id, ``.gguf`` file, ``smollm2``, or a live model, also wrapped (torch.compile, DDP).
        output: directory of the new checkpoint.
        preset: ``fast``, ``balanced`` or ``best``: the method, reconstruction and allocation for so much patience; what
            is given besides wins.
        method: ``magnitude``, ``wanda``, ``ria``, ``sparsegpt``, ``alps`` with options (``sparsegpt:damping=0.02``) and
            what follows it (``wanda+swaps+pcg:iterations=40``), or a `Method` of your own; None is the preset's, and
            without one ``wanda+pcg``.
        update: what follows the method: ``pcg`` or ``obs`` solve for the weights that are kept, ``swaps`` improves the
            mask; the same as ``+pcg`` after the method, or in place of what follows the preset's.
        sparsity: fraction of weights removed, in [0, 1); None is 0.5, or what an N:M pattern implies.
        pattern: ``row``, ``matrix``, ``N:M`` (keep N of M), ``block:RxC``; None is the method's own.
        calibration: a SOURCE, strings, token ids [samples, seqlen], records, or a tokenizer's batch; ``self`` is text
            that the model itself writes, in memory as a whole meanwhile.
        samples: calibration sequences; None is 128, or as many as there are.
        seqlen: tokens of a sequence; None is min(2048, context).
        seed: of the random crops.
        allocation: ``uniform`` (the default); ``linear`` (in depth, its slope is sought), ``owl`` (by outliers) or
            ``alpha`` (by spectra), which find a sparsity a block; a YAML file, a mapping of blocks or expressions
            to sparsities; or one number a block.
        propagate: what later matrices see: ``block``, the pruned blocks before them; ``dense``, the unpruned model;
            ``sequential``, every pruned matrix before them, at the cost of one forward in place of two.
        reconstruct: train each block's kept weights, once its matrices are pruned, to give the dense model's hidden
            states; settings in a `Reconstruction`; None is what the preset says.
        include: expressions; only matrices in whose name one is found.
        exclude: expressions; no matrix in whose name one is found.
        format: of the pruned matrices: ``dense``, ``bitmask`` (any zeros), ``nm`` (N:M with M up to 16).
        values: ``int8`` rounds packed values to 8 bits, with a scale for each row; None keeps them exactly.
        dtype: of the written tensors; ``auto`` is the source's.
        device: where to compute; ``auto`` is a GPU if there is one.
        threads: for torch; None leaves them alone.
        evaluate: a SOURCE on which perplexity is measured before and after.
        max_loss: in place of a sparsity: the largest is sought whose loss on `evaluate`'s text (None is
            ``wikitext2``), in nats per token, rises by at most this.
        dry_run: plan and estimate only; the report is the plan.
        overwrite: replace an earlier result of Secateur.
        resume: go on with an unfinished run.
        trust_remote_code: let Python code that comes with the model run.
        tokenizer: in place of the model's own.
        progress: hears of the work; None draws a bar if stderr is a terminal.

    Raises:
        SecateurError: one line that says what, where, and what to do.
    """
    progress = progress or terminal_progress(lines=False)
    in_memory = None if is_path(model) else model_in_memory(model)
    choice = chosen(
        preset, method=method, update=update, allocation=allocation, reconstruct=reconstruct, sparsity=sparsity,
        pattern=pattern,
    )  # fmt: skip
    request = Request(
        **choice, sparsity=sparsity, pattern=pattern, calibration=calibration, samples=samples, seqlen=seqlen,
        seed=seed, propagate=propagate, include=include, exclude=exclude, dtype=dtype, device=device,
        threads=threads, evaluate=evaluate, trust_remote_code=trust_remote_code, format=format, values=values,
    )  # fmt: skip
    if in_memory is not None or output is None:
        if evaluate or max_loss is not None or dry_run or dtype != "auto" or format != "dense":
            raise OptionError(
                "evaluate, max_loss, dry_run, dtype and format are for pruning from disk to disk: give a model's name "
                "and output"
            )
        if in_memory is None:
            model, own = _load(str(model), request)
            tokenizer = tokenizer or own
        target = None if output is None else output_path(output)
        report = prune_live(model, request, progress, tokenizer=tokenizer, output=target, describe=write_card)
        return PruneResult(model_in_memory(model), target, report)

    place = output_path(output)
    if max_loss is not None:
        request = sought(str(model), place, request, max_loss, progress, dry_run=dry_run, overwrite=overwrite)

    measure = measured_on(evaluate, tokenizer, seqlen, device, progress, trust_remote_code) if evaluate else None
    report = prune_checkpoint(
        str(model), place, request, progress, tokenizer=tokenizer, evaluate=measure,
        describe=write_card, dry_run=dry_run, overwrite=overwrite, resume=resume,
    )  # fmt: skip
    if max_loss is not None:
        shutil.rmtree(search_path(place), ignore_errors=True)
    return PruneResult(None, None if dry_run else place, report)


@undisturbed
def pack(
    model: str | Path,
    output: str | Path,
    *,
    format: str = "bitmask",
    values: str | None = None,
    overwrite: bool = False,
    resume: bool = True,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Pack the matrices of a pruned checkpoint, so that it is smaller on disk and in memory (docs/formats.md).

    Args:
        model: directory, hub id or ``.gguf`` file of a model that was pruned, by whatever tool.
        output: directory of the packed checkpoint.
        format: ``bitmask`` (any zeros) or ``nm`` (N:M with M up to 16).
        values: ``int8`` rounds values to 8 bits, with a scale for each row; None keeps them exactly.
        overwrite: replace an earlier result of Secateur.
        resume: go on with an unfinished run.
        trust_remote_code: let Python code that comes with the model run.
        progress: hears of the work; None draws a bar if stderr is a terminal.

    Raises:
        SecateurError: one line that says what, where, and what to do.
    """
    return pack_checkpoint(
        model_name(model), output_path(output), format, values, progress or terminal_progress(lines=False),
        overwrite=overwrite, resume=resume, trust_remote_code=trust_remote_code, describe=write_card,
    )  # fmt: skip


@undisturbed
def unpack(
    model: str | Path,
    output: str | Path,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a packed checkpoint dense again, as any other tool reads it.

    Args:
        model: directory or hub id of a checkpoint that Secateur packed.
        output: directory of the dense checkpoint.
        overwrite: replace an earlier result of Secateur.
        trust_remote_code: let Python code that comes with the model run.
        progress: hears of the work; None draws a bar if stderr is a terminal.

    Raises:
        SecateurError: one line that says what, where, and what to do.
    """
    return unpack_checkpoint(
        model_name(model), output_path(output), progress or terminal_progress(lines=False), overwrite=overwrite,
        trust_remote_code=trust_remote_code, describe=write_card,
    )  # fmt: skip


def _load(model: str, request: Request) -> tuple[PreTrainedModel, Any]:
    request.check()
    with tempfile.TemporaryDirectory() as scratch:
        trusted = request.trust_remote_code
        directory = as_checkpoint(locate(model, trusted), Path(scratch))
        if open_checkpoint(directory, trusted).packed:
            raise ModelError(f"{model}: is packed; give an output as well, or unpack it first")
        device = choose_device(request.device)
        model_in_memory: PreTrainedModel = load_model(directory, "auto", trusted).to(device)
        return model_in_memory, load_tokenizer(directory, trusted)
