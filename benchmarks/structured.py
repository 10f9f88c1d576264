"""What removing neurons, heads and blocks costs, by criterion, with and without compensation: `secateur compare`.

    cd DATA && python …/benchmarks/structured.py -o …/benchmarks/results/structured [--only width,depth,split]
    python benchmarks/structured.py -o benchmarks/results/structured --print > tables.md

DATA holds the calibration rows and the test text of `published.py`. It takes about two and a half hours on two threads;
when it is stopped, the same command goes on.
"""

import argparse
import json
import math
from pathlib import Path

import secateur
from secateur.reporting.terminal.progress import terminal_progress

COMMON = {
    "text": "wiki.test.raw", "windows": 40, "seqlen": 512, "calibration": "c4_64x512.smollm2.jsonl",
    "sparsities": (0.1, 0.2, 0.3),
}  # fmt: skip
CRITERIA = ("obs", "flap", "wanda-sp", "magnitude", "random")
TABLES = {
    "width": [f"shrink:of=neurons:criterion={c}{off}" for off in ("", ":compensate=no") for c in CRITERIA],
    "depth": [f"shrink:of=layers:depth={depth}" for depth in ("kl", "influence", "random")],
    "split": ["shrink"],
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", help="names of tables")
    parser.add_argument("--print", action="store_true", help="measure nothing; print what is there as Markdown")
    options = parser.parse_args()
    for name in options.only.split(",") if options.only else TABLES:
        path = options.output / f"{name}.json"
        if options.print:
            print(f"### {name}\n\n{table(json.loads(path.read_text())) if path.exists() else 'not measured'}\n")
            continue
        document = secateur.compare(
            "smollm2", **COMMON, methods=TABLES[name], output=options.output, progress=terminal_progress(quiet=True)
        )
        path.write_text(json.dumps(document, indent=1) + "\n")
        print(name, "done", flush=True)


def table(document):
    """The rows of one document, and what compensation takes away of the rise in log perplexity."""
    lines = ["| method | asked for | removed | perplexity | x dense | KL | top-1 |", "|---|" + "---|" * 6]
    rises = {}
    for row in document["rows"]:
        found = row["evaluation"]
        fidelity = found.get("fidelity") or {"kl": 0, "top1": 1}
        rises[row["method"], row["target"]] = math.log(row["perplexity_ratio"] or 1)
        cells = [row["method"], f"{row['target'] or 0:.0%}", f"{row['sparsity']:.1%}", f"{found['perplexity']:.4g}"]
        cells += [f"{row['perplexity_ratio'] or 1:.3f}", f"{fidelity['kl']:.3f}", f"{fidelity['top1']:.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    for (method, target), rise in rises.items():
        without = rises.get((f"{method}:compensate=no", target))
        if without:
            lines.append(f"\n{method}, {target:.0%}: compensation takes away {1 - rise / without:.0%} of the rise")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
