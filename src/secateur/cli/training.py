"""The command that trains with sparsity: finetune."""

from __future__ import annotations

from typing import Annotated

import typer

from . import screen
from .app import app
from .arguments import (
    SOURCE,
    Allocation,
    Device,
    Evaluate,
    Exclude,
    Include,
    Json,
    Model,
    Output,
    Overwrite,
    Pattern,
    Resume,
    Threads,
    TrustRemoteCode,
    fraction,
)


@app.command()
def finetune(
    model: Model,
    output: Output,
    data: Annotated[
        str,
        typer.Option(
            metavar="SOURCE", help=f"Text to train on: {SOURCE}; up to 32 rows are held out.", show_default=False
        ),
    ],
    train: Annotated[
        str | None,
        typer.Option(
            help="full, lora (adapters under the mask, merged in the end) or bias (biases and norms).",
            show_default="lora; full when pruning on the way",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Of the optimiser.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Rows of a forward.")] = 2,
    accumulate: Annotated[int, typer.Option(help="Forwards of a step.")] = 1,
    seqlen: Annotated[int | None, typer.Option(help="Tokens of a row.", show_default="512 or the context")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="At its highest.", show_default="full 1e-4, lora 1e-3, bias 2e-3")
    ] = None,
    rank: Annotated[int, typer.Option(help="Of LoRA's adapters.")] = 16,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Learn this model's predictions: the dense one's.", show_default="none"),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(
            help="Prune on the way to this fraction of weights removed.",
            show_default="keep the zeros that there are",
            parser=fraction,
            metavar="FRACTION",
        ),
    ] = None,
    initial: Annotated[
        float, typer.Option(help="Fraction removed at the first step.", parser=fraction, metavar="FRACTION")
    ] = 0.0,
    schedule: Annotated[str, typer.Option(help="How sparsity rises: cubic, linear or one-cycle.")] = "cubic",
    every: Annotated[
        int | None,
        typer.Option(help="Steps from one mask to the next.", show_default="10, or a tenth of all if that is fewer"),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Prune in so many rounds in place of a schedule.", show_default="gradually")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Which weights go: wanda, ria, magnitude; in rounds any method.",
            show_default="wanda",
        ),
    ] = None,
    pattern: Pattern = None,
    allocation: Allocation = "uniform",
    include: Include = None,
    exclude: Exclude = None,
    samples: Annotated[int, typer.Option(help="Rows that rounds calibrate on.")] = 64,
    eval_steps: Annotated[
        int | None,
        typer.Option(help="Steps from one held-out loss and checkpoint to the next.", show_default="a fifth of all"),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the order of rows, and of adapters.")] = 0,
    device: Device = "auto",
    threads: Threads = None,
    evaluate: Evaluate = None,
    overwrite: Overwrite = False,
    resume: Resume = True,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Train a pruned model and keep its zeros, or prune it on the way."""
    from .. import api
    from ..reporting.terminal.training import training_table

    report = api.finetune(
        model, output, data, train=train, steps=steps, batch_size=batch_size, accumulate=accumulate, seqlen=seqlen,
        learning_rate=learning_rate, rank=rank, teacher=teacher, sparsity=sparsity, initial=initial, schedule=schedule,
        every=every, rounds=rounds, method=method, pattern=pattern, allocation=allocation or "uniform",
        include=include or (), exclude=exclude or (), samples=samples, eval_steps=eval_steps,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed, device=device, threads=threads, evaluate=evaluate, overwrite=overwrite, resume=resume,
        trust_remote_code=trust_remote_code, progress=screen.progress(),
    )  # fmt: skip
    screen.show(report, training_table, as_json)
    if not as_json:
        screen.say(f"written to {output}")
