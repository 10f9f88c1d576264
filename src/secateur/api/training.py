"""Training with sparsity: finetune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..models.in_memory import model_name
from ..progress import Progress
from ..reporting.terminal.progress import terminal_progress
from ..training.finetune import finetune_checkpoint
from ..training.request import FinetuneRequest
from .places import measured_on, output_path, write_card
from .undisturbed import undisturbed


@undisturbed
def finetune(
    model: str | Path,
    output: str | Path,
    data: Any,
    *,
    train: str | None = None,
    steps: int = 200,
    batch_size: int = 2,
    accumulate: int = 1,
    seqlen: int | None = None,
    learning_rate: float | None = None,
    rank: int = 16,
    teacher: str | None = None,
    sparsity: float | None = None,
    initial: float = 0.0,
    schedule: str = "cubic",
    every: int | None = None,
    rounds: int | None = None,
    method: str | None = None,
    pattern: str | None = None,
    allocation: str | Mapping[str, float | str] | Sequence[float] = "uniform",
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    samples: int = 64,
    eval_steps: int | None = None,
    gradient_checkpointing: bool = False,
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
    evaluate: str | None = None,
    overwrite: bool = False,
    resume: bool = True,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a pruned model so that every zero stays zero, or prune a model on the way.

    Without `sparsity`, `pattern` or `rounds` the model's zeros are kept: training wins back what pruning lost. With
    them sparsity rises while the model trains: gradually, or in rounds. The whole model is in memory, in float32 on a
    CPU and in mixed precision on a GPU. A packed model is packed again. A killed run goes on from its last checkpoint.

    Args:
        model: directory, hub id, ``.gguf`` file, or ``smollm2``.
        output: directory of the new checkpoint.
        data: to train on: a SOURCE, strings, token ids [rows, seqlen], records, or a tokenizer's batch; text is cut
            into windows. Up to 32 rows are held out, and say which checkpoint is the best.
        train: ``full``, ``lora`` (adapters under the mask, merged in the end; needs peft) or ``bias`` (biases and
            norms); None is ``lora``, and ``full`` where the model is pruned on the way.
        steps: of the optimiser (AdamW; the learning rate rises for 5 % of the steps and then falls to 0).
        batch_size: rows of a forward.
        accumulate: forwards of a step.
        seqlen: tokens of a window; None is min(512, context).
        learning_rate: at its highest; None is 1e-4 for ``full``, 1e-3 for ``lora``, 2e-3 for ``bias``.
        rank: of the adapters.
        teacher: a model whose predictions are learnt in place of the text, as a rule the one that was pruned.
        sparsity: fraction of weights removed in the end; None with a pattern or rounds is 0.5, or what N:M implies.
        initial: fraction removed at the first step.
        schedule: how sparsity rises: ``cubic``, ``linear`` or ``one-cycle``.
        every: steps from one mask to the next; None is 10, or a tenth of all if that is fewer.
        rounds: prune in this many rounds in place of a schedule, each removing the same fraction of what is left.
        method: which weights go: gradually by ``wanda`` (None), ``ria`` or ``magnitude``; in rounds by any method,
            ``wanda`` if None.
        pattern: ``row``, ``matrix``, ``N:M``, ``block:RxC``; None is the method's own.
        allocation: as in `secateur.prune`.
        include: expressions; only matrices in whose name one is found.
        exclude: expressions; no matrix in whose name one is found.
        samples: rows that rounds calibrate on.
        eval_steps: from one measurement on held-out rows, and one checkpoint, to the next; None is a fifth of all.
        gradient_checkpointing: compute activations twice to keep fewer.
        seed: of the order of rows, and of the adapters.
        device: where to compute; ``auto`` is a GPU if there is one.
        threads: for torch; None leaves them alone.
        evaluate: a SOURCE on which perplexity is measured before and after.
        overwrite: replace an earlier result of Secateur.
        resume: go on with an unfinished run.
        trust_remote_code: let Python code that comes with the model run.
        tokenizer: in place of the model's own.
        progress: hears of the work; None draws a bar if stderr is a terminal.

    Returns:
        The contents of ``secateur.json`` (docs/json.md).

    Raises:
        SecateurError: one line that says what, where, and what to do.
    """
    progress = progress or terminal_progress(lines=False)
    teacher = None if teacher is None else model_name(teacher)
    request = FinetuneRequest(
        data=data, train=train, steps=steps, batch_size=batch_size, accumulate=accumulate, seqlen=seqlen,
        learning_rate=learning_rate, rank=rank, teacher=teacher, sparsity=sparsity, initial=initial, schedule=schedule,
        every=every, rounds=rounds, method=method, pattern=pattern, allocation=allocation, include=include,
        exclude=exclude, samples=samples, eval_steps=eval_steps, gradient_checkpointing=gradient_checkpointing,
        seed=seed, device=device, threads=threads, evaluate=evaluate, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    measure = measured_on(evaluate, tokenizer, seqlen, device, progress, trust_remote_code) if evaluate else None
    return finetune_checkpoint(
        model_name(model), output_path(output), request, progress, tokenizer=tokenizer, evaluate=measure,
        describe=write_card, overwrite=overwrite, resume=resume,
    )  # fmt: skip
