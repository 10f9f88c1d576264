"""How much of a perplexity is float noise: the same run with its sums taken in another order.

    python benchmarks/noise.py --calibration c4_64x512.smollm2.jsonl --text wiki.test.raw --method sparsegpt \
        --sparsity 0.7 --micro-batches 2048

Micro-batches of another size change nothing but the order of additions. With `--authors-factor`, SparseGPT takes
its inverse factor as the authors' code does, by two factorisations and a full inverse in float32.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

import secateur
from secateur.pipeline import stream


def authors_factor(gram, damping):
    H = gram.clone()
    diagonal = H.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    return torch.linalg.cholesky(inverse, upper=True).contiguous()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[2048])
    parser.add_argument("--authors-factor", action="store_true")
    options = parser.parse_args()
    if options.authors_factor:
        sys.modules["secateur.pruning.sparsegpt"].inverse_factor = authors_factor
    for tokens in options.micro_batches:
        stream.MICRO_BATCH_TOKENS = tokens
        with tempfile.TemporaryDirectory() as scratch:
            result = secateur.prune(
                "smollm2", Path(scratch) / "pruned", method=options.method, sparsity=options.sparsity, dtype="float32",
                calibration=options.calibration,
            )  # fmt: skip
            found = secateur.evaluate(result.path, text=options.text, seqlen=512, windows=40)
        case = {"method": options.method, "sparsity": options.sparsity, "micro_batch_tokens": tokens}
        case["authors_factor"] = options.authors_factor
        print(json.dumps({**case, "perplexity": found["perplexity"]}), flush=True)


if __name__ == "__main__":
    main()
