"""Commands that make models: prune, pack, unpack."""

from __future__ import annotations

from typing import Annotated

import typer

from . import screen
from .app import app
from .arguments import (
    Allocation,
    Calibration,
    Device,
    Dtype,
    Evaluate,
    Exclude,
    Include,
    Json,
    Model,
    Output,
    Overwrite,
    Pattern,
    Resume,
    Samples,
    Seqlen,
    Threads,
    TrustRemoteCode,
    fraction,
)


@app.command()
def prune(
    model: Model,
    output: Output,
    preset: Annotated[
        str | None,
        typer.Option(help="fast, balanced or best: method, reconstruction and allocation.", show_default="none"),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="magnitude, wanda, ria, sparsegpt or alps; options follow colons: alps:damping=0.02",
            show_default="wanda+pcg",
        ),
    ] = None,
    update: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What follows the method: pcg or obs solve for the kept weights, swaps improves the mask; swaps+pcg.",
            show_default="the preset's",
        ),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(
            help="Fraction of weights removed.",
            show_default="0.5, or what N:M implies",
            parser=fraction,
            metavar="FRACTION",
        ),
    ] = None,
    pattern: Pattern = None,
    calibration: Calibration = "c4",
    samples: Samples = None,
    seqlen: Seqlen = None,
    seed: Annotated[int, typer.Option(help="Of the random crops.")] = 0,
    allocation: Allocation = None,
    propagate: Annotated[
        str,
        typer.Option(
            help="What later matrices see: block, the pruned blocks before them; dense, the unpruned model; "
            "sequential, every pruned matrix before them, in one forward in place of two."
        ),
    ] = "block",
    reconstruct: Annotated[
        bool | None,
        typer.Option(
            "--reconstruct",
            help="Train each block's kept weights, once it is pruned, to give the dense model's hidden states.",
            show_default="the preset's",
        ),
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    format: Annotated[
        str, typer.Option(help="Of the pruned matrices: dense, bitmask (any zeros), nm (N:M with M up to 16).")
    ] = "dense",
    values: Annotated[
        str | None, typer.Option(help="int8: round packed values to 8 bits.", show_default="kept exactly")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    evaluate: Evaluate = None,
    max_loss: Annotated[
        float | None,
        typer.Option(
            metavar="NATS",
            help="In place of a sparsity: the largest that raises the loss per token of --evaluate's text by no more.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done and what it would take.")] = False,
    overwrite: Overwrite = False,
    resume: Resume = True,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Prune a model into a new checkpoint, block by block, without retraining."""
    from .. import api
    from ..reporting.terminal.tables import plan_table, prune_table

    result = api.prune(
        model, output, preset=preset, method=method, update=update, sparsity=sparsity, pattern=pattern,
        calibration=calibration, samples=samples, seqlen=seqlen, seed=seed, allocation=allocation,
        propagate=propagate, reconstruct=reconstruct, include=include or (),
        exclude=exclude or (), format=format, values=values, dtype=dtype, device=device, threads=threads,
        evaluate=evaluate, max_loss=max_loss, dry_run=dry_run, overwrite=overwrite, resume=resume,
        trust_remote_code=trust_remote_code, progress=screen.progress(),
    )  # fmt: skip
    screen.show({"schema": 1, **result.report}, plan_table if dry_run else prune_table, as_json)
    if not dry_run and not as_json:
        screen.say(f"written to {output}")


@app.command()
def pack(
    model: Model,
    output: Output,
    format: Annotated[str, typer.Option(help="bitmask (any zeros) or nm (N:M with M up to 16).")] = "bitmask",
    values: Annotated[
        str | None, typer.Option(help="int8: round values to 8 bits.", show_default="kept exactly")
    ] = None,
    overwrite: Overwrite = False,
    resume: Resume = True,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Pack a pruned checkpoint: smaller on disk and in memory, and it opens with from_pretrained."""
    from .. import api
    from ..reporting.terminal.tables import packing_table

    report = api.pack(
        model, output, format=format, values=values, overwrite=overwrite, resume=resume,
        trust_remote_code=trust_remote_code, progress=screen.progress(),
    )  # fmt: skip
    screen.show(report, packing_table, as_json)


@app.command()
def unpack(
    model: Model,
    output: Output,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Write a packed checkpoint dense again, as any other tool reads it."""
    from .. import api
    from ..reporting.terminal.tables import packing_table

    report = api.unpack(
        model, output, overwrite=overwrite, trust_remote_code=trust_remote_code, progress=screen.progress()
    )
    screen.show(report, packing_table, as_json)
