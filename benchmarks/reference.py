"""The papers' own code against Secateur, on the same rows of tokens and the same windows of text.

    python benchmarks/reference.py --calibration c4_64x512.smollm2.jsonl --text wiki.test.raw -o reference.json
    … --propagate sequential -o sequential.json

Prunes SmolLM2-135M-Instruct (dequantised to float32) with each method and measures perplexity on the first 40
windows of 512 tokens of WikiText-2 (raw, test). `REFERENCE` was measured with the authors' code, adapted to
today's libraries, on the same 64 rows of 512 tokens of C4. Rows that the output file holds are not run again.
"""

import argparse
import json
import tempfile
from pathlib import Path

import secateur
from secateur.reporting.terminal.progress import terminal_progress

DENSE = 29.19
REFERENCE = {
    ("wanda", 0.5, "row"): 65.58,
    ("sparsegpt", 0.5, "matrix"): 57.62,
    ("magnitude", 0.5, "matrix"): 483.2,
    ("wanda", 0.5, "2:4"): 206.1,
    ("sparsegpt", 0.5, "2:4"): 112.0,
    ("sparsegpt", 0.5, "8:16"): 66.37,
    ("wanda", 0.6, "row"): 161.3,
    ("sparsegpt", 0.6, "matrix"): 122.3,
    ("sparsegpt", 0.7, "matrix"): 319.9,
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--propagate", default="block", help="what later matrices see; the papers' code: block")
    options = parser.parse_args()
    rows = json.loads(options.output.read_text()) if options.output.exists() else []
    progress = terminal_progress()

    def keep(row):
        rows.append(row)
        options.output.write_text(json.dumps(rows, indent=1) + "\n")
        print(json.dumps(row), flush=True)

    def perplexity(model):
        found = secateur.evaluate(model, text=options.text, seqlen=512, windows=40, progress=progress)
        return {key: found[key] for key in ("text", "seqlen", "windows", "tokens", "perplexity")}

    with tempfile.TemporaryDirectory() as scratch:
        if not any(row["method"] == "dense" for row in rows):
            keep({"method": "dense", "reference": DENSE, **perplexity("smollm2")})
        for (method, sparsity, pattern), reference in REFERENCE.items():
            case = {"method": method, "sparsity": sparsity, "pattern": pattern}
            if options.propagate != "block":
                if method == "magnitude":  # which sees no inputs
                    continue
                case["propagate"] = options.propagate
            if any(case.items() <= row.items() for row in rows):
                continue
            result = secateur.prune(
                "smollm2", Path(scratch) / "pruned", dtype="float32", calibration=options.calibration, **case,
                overwrite=True, progress=progress,
            )  # fmt: skip
            measured = perplexity(result.path)
            keep(
                {
                    **case,
                    "reached": result.report["sparsity"],
                    "seconds": round(result.report["seconds"]["pruning"], 1),
                    "peak_memory_bytes": result.report["peak_memory_bytes"],
                    "reference": reference,
                    "ratio": round(measured["perplexity"] / reference, 4),
                    **measured,
                }
            )


if __name__ == "__main__":
    main()
