"""Every figure of docs/results.md on quality, by `secateur compare`: what is measured is never measured twice.

    cd DATA && python …/benchmarks/published.py -o …/benchmarks/results/published [--only grid,seeds]
    python benchmarks/published.py -o benchmarks/results/published --print > tables.md

DATA holds the calibration texts and the test text named below, and the zero-shot sets in its folder zeroshot. All in
all it takes about six hours on two threads; when it is stopped, the same command goes on.
"""

import argparse
import json
import statistics
from pathlib import Path

import secateur
from secateur.reporting.terminal.progress import terminal_progress

ROWS, TEXT = "c4_64x512.smollm2.jsonl", "wiki.test.raw"
COMMON = {"text": TEXT, "windows": 40, "seqlen": 512}
TENTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
PATTERNS = ("own", "2:4")
ASKED = {"methods": ("wanda", "sparsegpt"), "patterns": PATTERNS, "calibration": ROWS, "task_data": "zeroshot"}
TABLES = {
    "grid": {
        "methods": ("magnitude", "wanda", "ria", "sparsegpt"), "sparsities": (0.5, 0.6, 0.7),
        "patterns": ("own", "2:4", "4:8", "8:16"), "calibration": ROWS,
    },
    "magnitude-row": {"methods": ("magnitude",), "sparsities": TENTHS[:7], "patterns": ("row",)},
    "sparsities": {"methods": ("wanda", "sparsegpt"), "sparsities": TENTHS, "calibration": ROWS},
    "seeds": {
        "methods": ("wanda", "sparsegpt"), "patterns": PATTERNS, "calibration": "c4_docs.jsonl", "samples": 64,
        "seeds": (0, 1, 2),
    },
    "calibration": {
        "methods": ("wanda",), "calibration": ("c4_docs.jsonl", "wikipedia_docs.jsonl", "sotu"), "samples": 64,
    },
    "samples": {"methods": ("wanda",), "calibration": "c4_docs.jsonl", "samples": (1, 2, 4, 8, 16, 32, 64, 128)},
    "tasks": {**ASKED, "tasks": ("arc_easy", "piqa", "winogrande", "openbookqa")},
    "boolq": {**ASKED, "tasks": ("boolq",), "limit": 500},
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", help="names of tables")
    parser.add_argument("--print", action="store_true", help="measure nothing; print what is there as Markdown")
    options = parser.parse_args()
    for name in options.only.split(",") if options.only else TABLES:
        path = options.output / f"{name}.json"
        if options.print:
            print(f"### {name}\n\n{table(name, json.loads(path.read_text())) if path.exists() else 'not measured'}\n")
            continue
        document = secateur.compare(
            "smollm2", **COMMON, **TABLES[name], output=options.output, progress=terminal_progress(quiet=True)
        )
        path.write_text(json.dumps(document, indent=1) + "\n")
        print(name, "done", flush=True)


def table(name, document):
    """The rows of one document, with what varies in it."""
    lines = [
        "| method | pattern | sparsity | calibration | perplexity | x dense | KL | top-1 | tasks |",
        "|---|" + "---|" * 8,
    ]
    for row in document["rows"]:
        found, calibration, tasks = row["evaluation"], row["calibration"], row["tasks"]
        fidelity = found.get("fidelity") or {"kl": 0, "top1": 1}
        source = f"{calibration['source']}, {calibration['samples']}, seed {calibration['seed']}" if calibration else ""
        answers = (
            ", ".join(f"{r['task']} {r['metrics']['acc']['value']:.3f}" for r in tasks["results"]) if tasks else ""
        )
        cells = [row["method"], row["pattern"] or "", f"{row['sparsity']:.0%}", source, f"{found['perplexity']:.4g}"]
        cells += [f"{row['perplexity_ratio'] or 1:.3f}", f"{fidelity['kl']:.3f}", f"{fidelity['top1']:.1%}", answers]
        lines.append(f"| {' | '.join(cells)} |")
    if name == "seeds":
        for method, pattern in dict.fromkeys((r["method"], r["pattern"]) for r in document["rows"] if r["pattern"]):
            found = [
                r["evaluation"]["perplexity"]
                for r in document["rows"]
                if (r["method"], r["pattern"]) == (method, pattern)
            ]
            lines.append(f"\n{method} {pattern}: {statistics.mean(found):.2f} ± {statistics.stdev(found):.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
