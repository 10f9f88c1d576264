"""Making smaller dense models: shrink."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..models.in_memory import model_name
from ..progress import Progress
from ..reporting.terminal.progress import terminal_progress
from ..shrinking.request import ShrinkRequest
from ..shrinking.shrink import shrink_checkpoint
from .places import measured_on, output_path, write_card
from .undisturbed import undisturbed


@undisturbed
def shrink(
    model: str | Path,
    output: str | Path,
    *,
    neurons: float | None = None,
    heads: float | None = None,
    layers: int | str | Sequence[int] | None = None,
    experts: float | None = None,
    target: float | None = None,
    of: str | Sequence[str] = ("heads", "neurons"),
    round: int = 64,
    criterion: str = "obs",
    depth: str = "kl",
    compensate: bool = True,
    calibration: Any = "c4",
    samples: int | None = None,
    seqlen: int | None = None,
    seed: int = 0,
    propagate: str = "sequential",
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    evaluate: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    resume: bool = True,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Remove neurons, heads, experts or whole blocks, and write a smaller dense model that every engine runs.

    The result is an ordinary checkpoint with a config of its own. Before the work every kind of block is cut by way of
    trial, and every block again at the end: what it gives must equal the whole block's with the removed parts zeroed.
    A killed run goes on where it stopped.

    Args:
        model: directory, hub id, ``.gguf`` file, or ``smollm2``.
        output: directory of the new checkpoint.
        neurons: fraction of each MLP's neurons that goes, of experts' too.
        heads: fraction of the attention heads that goes, in whole groups that share keys and values; only in
            families whose config has a head_dim of its own.
        layers: how many blocks go (chosen by `depth`), or a list of their numbers (``"3,5"``).
        experts: fraction of the experts that goes: those that give least to their tokens.
        target: fraction of the blocks' parameters that goes, from where `of` says.
        of: ``heads,neurons`` (tried out, and split as harms predictions least), ``neurons``, ``heads`` or ``layers``.
        round: new widths of MLPs are multiples of this.
        criterion: of neurons and heads: ``obs`` (what removal costs once the rest has made up for it), ``flap``,
            ``wanda-sp``, ``magnitude``, ``random``.
        depth: which blocks go: ``kl`` (one after the other, the one without which predictions change least),
            ``influence`` (those that change the hidden state least), ``random``.
        compensate: the matrix after the cut is solved anew by least squares; where it has a bias, that takes over what
            the removed parts gave on average.
        calibration: a SOURCE, strings, token ids [samples, seqlen], records, or a tokenizer's batch.
        samples: calibration sequences; None is 128, or as many as there are.
        seqlen: tokens of a sequence; None is min(2048, context).
        seed: of the random crops, and of ``random``.
        propagate: what later matrices see: ``sequential``, every cut before them; ``block``, the cut blocks before
            them; ``dense``, the whole model.
        dtype: of the written tensors; ``auto`` is the source's.
        device: where to compute; ``auto`` is a GPU if there is one.
        threads: for torch; None leaves them alone.
        evaluate: a SOURCE on which perplexity is measured before and after.
        dry_run: prove the cut on one block of each kind and say what the config would say; write nothing.
        overwrite: replace an earlier result of Secateur.
        resume: go on with an unfinished run.
        trust_remote_code: let Python code that comes with the model run.
        tokenizer: in place of the model's own.
        progress: hears of the work; None draws a bar if stderr is a terminal.

    Returns:
        The contents of ``secateur.json`` (docs/json.md); of a dry run, the plan.

    Raises:
        SecateurError: one line that says what, where, and what to do.
    """
    progress = progress or terminal_progress(lines=False)
    request = ShrinkRequest(
        neurons=neurons, heads=heads, layers=layers, experts=experts, target=target, of=of, round=round,
        criterion=criterion, depth=depth, compensate=compensate, calibration=calibration, samples=samples,
        seqlen=seqlen, seed=seed, propagate=propagate, dtype=dtype, device=device, threads=threads, evaluate=evaluate,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    measure = measured_on(evaluate, tokenizer, seqlen, device, progress, trust_remote_code) if evaluate else None
    return shrink_checkpoint(
        model_name(model), output_path(output), request, progress, tokenizer=tokenizer, evaluate=measure,
        describe=write_card, dry_run=dry_run, overwrite=overwrite, resume=resume,
    )  # fmt: skip
