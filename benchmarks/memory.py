"""Memory must not grow with depth; and what a block of a 7B model takes.

    python benchmarks/memory.py depth            peak memory at 16 blocks over peak memory at 4
    python benchmarks/memory.py 7b [--method M]  a random Llama of LLaMA-2-7B's widths, 2 blocks

Each run is a process of its own, disk to disk; memory is its maximum resident set.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def random_llama(folder: Path, blocks: int, hidden: int, inner: int, heads: int, vocabulary: int) -> int:
    """Save a random Llama in bfloat16 and return its bytes."""
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=blocks, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=vocabulary, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters()) * 2


def pruned(model: Path, output: Path, rows: Path, method: str) -> dict:
    """Prune in a process of its own; return the report."""
    command = [sys.executable, "-c", "import sys; from secateur.cli import main; sys.exit(main())"]
    command += ["prune", str(model), str(output), "--method", method, "--calibration", str(rows), "--json", "-q"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def token_rows(path: Path, samples: int, seqlen: int, vocabulary: int) -> Path:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (samples, seqlen), generator=generator).tolist()
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids), encoding="utf-8")
    return path


def depth(folder: Path, method: str) -> dict:
    rows = token_rows(folder / "rows.jsonl", 16, 512, 8192)
    peaks = {}
    for blocks in (4, 16):
        random_llama(folder / f"model{blocks}", blocks, 1024, 2816, 16, 8192)
        report = pruned(folder / f"model{blocks}", folder / f"out{blocks}", rows, method)
        peaks[blocks] = report["peak_memory_bytes"]
    return {"method": method, "peak_memory_bytes": peaks, "ratio": round(peaks[16] / peaks[4], 3)}


def seven_b(folder: Path, method: str) -> dict:
    samples, seqlen = 8, 512
    size = random_llama(folder / "model", 2, 4096, 11008, 32, 32000)
    report = pruned(folder / "model", folder / "out", token_rows(folder / "rows.jsonl", samples, seqlen, 32000), method)
    return {
        "method": method,
        "tokens": samples * seqlen,
        "checkpoint_bytes": size,
        "seconds per block": [round(block["seconds"], 1) for block in report["blocks"]],
        "peak_memory_bytes": report["peak_memory_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["depth", "7b"])
    parser.add_argument("--method", default="wanda")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps((depth if options.what == "depth" else seven_b)(Path(scratch), options.method), indent=1))


if __name__ == "__main__":
    main()
