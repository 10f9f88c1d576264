"""Commands that measure models: eval, inspect, generate, bench, compare, sensitivity; and report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import screen
from .app import app
from .arguments import (
    CALIBRATION,
    SOURCE,
    BatchSize,
    Device,
    Generations,
    Json,
    Limit,
    Model,
    Record,
    Shots,
    TaskData,
    Tasks,
    TrustRemoteCode,
    fraction,
    numbers,
    words,
)


@app.command("eval")
def evaluate(
    model: Model,
    text: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help=f"Text to measure on: {SOURCE}.", show_default="wikitext2, unless --tasks"),
    ] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens of a window.", show_default="2048 or the context")] = None,
    windows: Annotated[int | None, typer.Option(help="How many windows.", show_default="all")] = None,
    against: Annotated[
        str | None, typer.Option(metavar="DENSE", help="The dense model, asked the same: shows how far this one is.")
    ] = None,
    tasks: Tasks = None,
    task_data: TaskData = None,
    batch_size: BatchSize = 8,
    limit: Limit = None,
    num_fewshot: Shots = None,
    generations: Generations = 0,
    device: Device = "auto",
    record: Record = True,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure a model: perplexity, zero-shot tasks, and how far it is from the dense one."""
    from .. import api
    from ..reporting.terminal.evidence import evaluation_table

    found = api.evaluate(
        model, text=text, seqlen=seqlen, windows=windows, against=against, tasks=words(tasks), task_data=task_data,
        batch_size=batch_size, limit=limit, num_fewshot=num_fewshot, generations=generations, device=device,
        record=record, trust_remote_code=trust_remote_code, progress=screen.progress(),
    )  # fmt: skip
    screen.show({"schema": 1, "model": model, **found}, lambda e: evaluation_table(e["model"], e), as_json)


@app.command()
def compare(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Directories, hub ids, .gguf files, or smollm2.", show_default=False),
    ],
    methods: Annotated[
        str,
        typer.Option(metavar="NAME,NAME", help="Methods, with :OPTION=VALUE if need be; shrink removes whole parts."),
    ] = "magnitude,wanda,sparsegpt,wanda+pcg",
    sparsities: Annotated[str, typer.Option(metavar="S,S", help="Fractions removed; N:M has its own.")] = "0.5",
    patterns: Annotated[str, typer.Option(metavar="P,P", help="own (each method's own), row, 2:4, …")] = "own",
    calibration: Annotated[str, typer.Option(metavar="SOURCE,SOURCE", help=f"Texts: {CALIBRATION}.")] = "c4",
    samples: Annotated[
        str | None, typer.Option(metavar="N,N", help="Calibration sequences.", show_default="128, or what there is")
    ] = None,
    seeds: Annotated[str, typer.Option(metavar="N,N", help="Of the random crops.")] = "0",
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens of a window and of a sequence.", show_default="2048 or the context")
    ] = None,
    propagate: Annotated[str, typer.Option(help="block, dense or sequential, as in prune.")] = "block",
    format: Annotated[str, typer.Option(help="Of the pruned matrices: dense, bitmask, nm.")] = "bitmask",
    values: Annotated[str | None, typer.Option(help="int8, as in prune.", show_default="kept exactly")] = None,
    dtype: Annotated[str, typer.Option(help="Of the written tensors, as in prune.")] = "auto",
    text: Annotated[str, typer.Option(metavar="SOURCE", help="Text for perplexity.")] = "wikitext2",
    windows: Annotated[int | None, typer.Option(help="How many windows.", show_default="40, or what there is")] = None,
    tasks: Tasks = None,
    task_data: TaskData = None,
    batch_size: BatchSize = 8,
    limit: Limit = None,
    num_fewshot: Shots = None,
    generations: Generations = 0,
    bench: Annotated[bool, typer.Option("--bench", help="Memory and speed too, in turn with the dense model.")] = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where measurements are kept, to go on with.")
    ] = Path("comparison"),
    device: Device = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads to compute with.", show_default="torch's")] = None,
    record: Record = True,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure models dense and pruned in every combination; what is measured is never measured twice."""
    from .. import api
    from ..reporting.terminal.evidence import comparison_table

    found = api.compare(
        models, methods=words(methods), sparsities=[fraction(word) for word in words(sparsities)],
        patterns=words(patterns), calibration=words(calibration),
        samples=None if samples is None else numbers(samples), seeds=numbers(seeds), seqlen=seqlen,
        propagate=propagate, format=format, values=values, dtype=dtype, text=text, windows=windows,
        tasks=words(tasks), task_data=task_data, batch_size=batch_size, limit=limit, num_fewshot=num_fewshot,
        generations=generations, bench=bench, output=output, device=device, threads=threads, record=record,
        trust_remote_code=trust_remote_code, progress=screen.progress(),
    )  # fmt: skip
    screen.show(found, comparison_table, as_json)


@app.command()
def inspect(model: Model, trust_remote_code: TrustRemoteCode = False, as_json: Json = False) -> None:
    """Show each matrix's shape, sparsity, pattern, format and bytes."""
    from .. import api
    from ..reporting.terminal.tables import inspection_table

    found = api.inspect(model, trust_remote_code=trust_remote_code, progress=screen.progress())
    screen.show({"schema": 1, "model": model, **found}, lambda f: inspection_table(f["model"], f), as_json)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="How the text begins.", show_default=False)],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 40,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Let a model go on with a text: a quick look with your own eyes."""
    from .. import api
    from ..reporting.terminal.tables import generation_text

    continuation = api.generate(model, prompt, tokens=tokens, device=device, trust_remote_code=trust_remote_code)
    found = {"schema": 1, "model": model, "prompt": prompt, "continuation": continuation}
    screen.show(found, lambda f: generation_text(f["prompt"], f["continuation"]), as_json)


@app.command()
def bench(
    model: Model,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Another model, timed in turn with the first.")
    ] = None,
    batch: Annotated[str, typer.Option(metavar="N,N", help="How many sequences at once, such as 1,8.")] = "1",
    prompt: Annotated[int, typer.Option(help="Tokens before the first new one.")] = 128,
    tokens: Annotated[int, typer.Option(help="New tokens.")] = 32,
    rounds: Annotated[int, typer.Option(help="How often everything is run; medians are shown.")] = 5,
    threads: Annotated[int | None, typer.Option(help="Threads to compute with.", show_default="torch's")] = None,
    prefer: Annotated[
        str | None,
        typer.Option(help="speed: packed where that is faster here; memory: all packed.", show_default="speed"),
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(help="int8: round inputs to 8 bits where values are (nm only).", show_default="kept exactly"),
    ] = None,
    record: Record = True,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure bytes on disk, resident memory and tokens per second, of one model or of two in turn."""
    from .. import api
    from ..reporting.terminal.tables import speed_table

    found = api.bench(
        model, against=against, batch=numbers(batch), prompt=prompt, tokens=tokens, rounds=rounds, threads=threads,
        prefer=prefer, activations=activations, record=record, trust_remote_code=trust_remote_code,
        progress=screen.progress(),
    )  # fmt: skip
    screen.show({"schema": 1, **found}, speed_table, as_json)


@app.command()
def sensitivity(
    model: Model,
    method: Annotated[str, typer.Option(help="As in prune.")] = "wanda+pcg",
    sparsity: Annotated[
        float | None,
        typer.Option(
            help="Fraction of weights removed where one block or kind is pruned alone.",
            show_default="0.5, or what N:M implies",
            parser=fraction,
            metavar="FRACTION",
        ),
    ] = None,
    pattern: Annotated[str | None, typer.Option(help="As in prune.", show_default="the method's own")] = None,
    calibration: Annotated[str, typer.Option(metavar="SOURCE", help="Text to calibrate on, as in prune.")] = "c4",
    samples: Annotated[
        int | None, typer.Option(help="Calibration sequences.", show_default="128, or what there is")
    ] = None,
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens of a sequence and of a window.", show_default="2048 or the context")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random crops.")] = 0,
    text: Annotated[str, typer.Option(metavar="SOURCE", help="Held-out text to compare on.")] = "wikitext2",
    windows: Annotated[
        int, typer.Option(help="How many windows; they are read n/2 times for n blocks, and once for each kind.")
    ] = 8,
    by: Annotated[
        str, typer.Option(metavar="UNIT,UNIT", help="What is pruned alone: each block, each kind of matrix.")
    ] = "block,kind",
    target: Annotated[
        float | None,
        typer.Option(
            help="Mean sparsity of the allocation.", show_default="--sparsity", parser=fraction, metavar="FRACTION"
        ),
    ] = None,
    spread: Annotated[
        float,
        typer.Option(help="How far the allocation goes from it.", parser=fraction, metavar="FRACTION"),
    ] = 0.1,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE.yaml", help="Write the allocation, for prune --allocation."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure what pruning each block or kind of matrix alone costs, and allocate sparsity by it."""
    from .. import api
    from ..reporting.terminal.sensitivity import sensitivity_table

    found = api.sensitivity(
        model, method=method, sparsity=sparsity, pattern=pattern, calibration=calibration, samples=samples,
        seqlen=seqlen, seed=seed, text=text, windows=windows, by=words(by), target=target, spread=spread,
        output=output, overwrite=overwrite, device=device, trust_remote_code=trust_remote_code,
        progress=screen.progress(),
    )  # fmt: skip
    screen.show({"schema": 1, "model": model, **found}, lambda f: sensitivity_table(model, f), as_json)
    if output is not None:
        screen.say(f"written to {output}")


@app.command()
def report(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_RUN", help="What prune, pack or compare wrote, or an unfinished run.", show_default=False
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page.")] = Path("report.html"),
) -> None:
    """Write one HTML page about what was pruned, measured or compared."""
    from .. import api

    screen.say(f"written to {api.report(model, output=output)}")
