"""What packing saves: bytes on disk, resident memory after load, and the seconds it takes.

    python benchmarks/packing.py [--model smollm2 | --random-1b] [--sparsity 0.5] [--text SOURCE]

Prunes by magnitude (row by row), packs, and loads both checkpoints with transformers, each in a process of its own.
With --text, perplexity of both in one process, by transformers' forward in float32 on 2 windows of 256 tokens.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LOAD = """
import json, sys, time
import psutil, torch, secateur
from transformers import AutoConfig, AutoModelForCausalLM
with torch.device("meta"):
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1]))  # so that the model's code is loaded
before = psutil.Process().memory_info().rss
started = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
seconds = time.perf_counter() - started
for tensor in (*model.parameters(), *model.buffers()):
    tensor.view(-1)[::1024].sum()  # touched, so that mapped pages count
held = sum(t.numel() * t.element_size() for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
print(json.dumps({"resident_bytes": psutil.Process().memory_info().rss - before, "tensor_bytes": held,
                  "load_seconds": round(seconds, 2)}))
"""


def random_1b(folder):
    """A random Llama of 1.1 billion weights, in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
        vocab_size=32000, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    return folder


def perplexities(dense, packed, text):
    """Perplexity by transformers' own forward."""
    import torch
    from transformers import AutoModelForCausalLM

    from secateur.models.source import load_tokenizer
    from secateur.pipeline.calibration import evaluation_windows

    found = []
    for path in (dense, packed):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        tokens = evaluation_windows(text, load_tokenizer(path), model.config, 256, 2)
        with torch.no_grad():
            losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in tokens.rows]
        found.append(float(torch.tensor(losses).mean().exp()))
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--random-1b", action="store_true")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--text")
    options = parser.parse_args()
    import secateur

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = random_1b(folder / "model") if options.random_1b else options.model
        dense, packed = folder / "dense", folder / "packed"
        secateur.prune(model, dense, method="magnitude", pattern="row", sparsity=options.sparsity)
        started = time.perf_counter()
        report = secateur.pack(dense, packed)
        found = {"sparsity": options.sparsity, "pack_seconds": round(time.perf_counter() - started, 1)}
        matrices = report["packed"]
        found["matrices"] = {"dense_bytes": matrices["dense"], "packed_bytes": matrices["true"]}
        for name, path in (("dense", dense), ("packed", packed)):
            output = subprocess.run([sys.executable, "-c", LOAD, path], check=True, capture_output=True, text=True)
            found[name] = {"file_bytes": sum(f.stat().st_size for f in path.glob("*.safetensors"))}
            found[name] |= json.loads(output.stdout.splitlines()[-1])
        for key in ("file_bytes", "resident_bytes", "tensor_bytes"):
            found[f"{key}_ratio"] = round(found["packed"][key] / found["dense"][key], 4)
        if options.text:
            found["perplexity"] = dict(zip(("dense", "packed"), perplexities(dense, packed, options.text), strict=True))
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
