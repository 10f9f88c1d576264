"""The command that makes smaller dense models: shrink."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import screen
from .app import app
from .arguments import (
    Calibration,
    Device,
    Dtype,
    Evaluate,
    Json,
    Model,
    Output,
    Overwrite,
    Resume,
    Samples,
    Seqlen,
    Threads,
    TrustRemoteCode,
    fraction,
    words,
)


def _part(what: str) -> Any:
    return typer.Option(help=what, show_default="none", parser=fraction, metavar="FRACTION")


@app.command()
def shrink(
    model: Model,
    output: Output,
    neurons: Annotated[float | None, _part("Of the MLPs' neurons, experts' included, that goes.")] = None,
    heads: Annotated[float | None, _part("Of the attention heads that goes, in groups with the same keys.")] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="N|LIST", help="How many blocks go, or which: 3,5; a list of one is 3,", show_default="none"
        ),
    ] = None,
    experts: Annotated[float | None, _part("Of the experts that goes.")] = None,
    target: Annotated[float | None, _part("Of the blocks' parameters that goes, from where --of says.")] = None,
    of: Annotated[
        str,
        typer.Option(metavar="PARTS", help="For --target: heads,neurons (split as harms least), or one, or layers."),
    ] = "heads,neurons",
    round: Annotated[int, typer.Option(help="New widths of MLPs are multiples of this.")] = 64,
    criterion: Annotated[
        str, typer.Option(help="Which neurons and heads go: obs, flap, wanda-sp, magnitude, random.")
    ] = "obs",
    depth: Annotated[
        str,
        typer.Option(
            help="Which blocks go: kl (tried out one by one), influence (they change the hidden state least), random."
        ),
    ] = "kl",
    compensate: Annotated[
        bool,
        typer.Option("--compensate/--no-compensate", help="Solve the matrix after a cut anew by least squares."),
    ] = True,
    calibration: Calibration = "c4",
    samples: Samples = None,
    seqlen: Seqlen = None,
    seed: Annotated[int, typer.Option(help="Of the random crops, and of random choices.")] = 0,
    propagate: Annotated[
        str,
        typer.Option(
            help="What later matrices see: sequential, every cut before them; block, the cut blocks before them; "
            "dense, the whole model."
        ),
    ] = "sequential",
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    evaluate: Evaluate = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Prove the cut, and say what would be written.")] = False,
    overwrite: Overwrite = False,
    resume: Resume = True,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Remove neurons, heads, experts or blocks: a smaller dense model that every engine runs."""
    from .. import api
    from ..reporting.terminal.shrinking import outlook_table, shrink_table

    report = api.shrink(
        model, output, neurons=neurons, heads=heads, layers=layers, experts=experts, target=target, of=words(of),
        round=round, criterion=criterion, depth=depth, compensate=compensate, calibration=calibration,
        samples=samples, seqlen=seqlen, seed=seed, propagate=propagate, dtype=dtype, device=device, threads=threads,
        evaluate=evaluate, dry_run=dry_run, overwrite=overwrite, resume=resume, trust_remote_code=trust_remote_code,
        progress=screen.progress(),
    )  # fmt: skip
    screen.show({"schema": 1, **report}, outlook_table if dry_run else shrink_table, as_json)
    if not dry_run and not as_json:
        screen.say(f"written to {output}")
