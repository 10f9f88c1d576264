"""What training wins back, and what masks cost: `secateur finetune` on SmolLM2, 256 tokens a step.

    cd DATA && python …/benchmarks/training.py -o …/benchmarks/results/training [--only recovery,way,overhead]
    python benchmarks/training.py -o benchmarks/results/training --print > tables.md

DATA holds `c4_64x512.smollm2.jsonl` (to calibrate), `c4_docs.jsonl` (to train) and `wiki.test.raw` (to measure). It
takes about three hours on two threads; when it is stopped, the same command goes on. Models lie in OUTPUT/models
meanwhile, which may be removed afterwards.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import secateur
from secateur.reporting.terminal.progress import terminal_progress

ROWS, TRAIN, TEXT = "c4_64x512.smollm2.jsonl", "c4_docs.jsonl", "wiki.test.raw"
STEP = {"batch_size": 1, "seqlen": 256}  # 256 tokens
TEACHER = {"teacher": "smollm2"}
WAY = {"steps": 300, "sparsity": 0.7, "pattern": "row", "train": "full"}
RUNS = {
    "recovery": {
        "lora, 200 steps": {"steps": 200},
        "lora, 200 steps, teacher": {"steps": 200, **TEACHER},
        "lora, 1,000 steps": {"steps": 1000},
        "lora, 1,000 steps, teacher": {"steps": 1000, **TEACHER},
        "full, 200 steps, teacher": {"steps": 200, "train": "full", **TEACHER},
        "bias, 200 steps, teacher": {"steps": 200, "train": "bias", **TEACHER},
    },
    "way": {
        "one shot (Wanda), 300 steps after it": {"rounds": 1, "method": "wanda", **WAY},
        "gradual (magnitude)": {"method": "magnitude", **WAY},
        "gradual (Wanda)": {"method": "wanda", **WAY},
        "5 rounds (Wanda)": {"rounds": 5, "method": "wanda", **WAY},
    },
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", default="recovery,way,overhead", help="names of tables")
    parser.add_argument("--print", action="store_true", help="measure nothing; print what is there as Markdown")
    options = parser.parse_args()
    models = options.output / "models"
    models.mkdir(parents=True, exist_ok=True)
    for name in options.only.split(","):
        path = options.output / f"{name}.json"
        if options.print:
            print(f"### {name}\n\n{table(json.loads(path.read_text())) if path.exists() else 'not measured'}\n")
            continue
        found = overhead(models) if name == "overhead" else trained(name, models)
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(name, "done", flush=True)


def trained(name, models):
    progress = terminal_progress(quiet=True)
    source = "smollm2"
    if name == "recovery":
        source = models / "pruned"
        secateur.prune("smollm2", source, method="wanda", pattern="2:4", calibration=ROWS, progress=progress)
    rows = []
    for number, (what, how) in enumerate(RUNS[name].items()):
        output = models / f"{name}-{number}"
        report = secateur.finetune(source, output, TRAIN, **STEP, **how, progress=progress)
        before = measured(source, progress) if not rows else rows[0]["before"]
        kept = ("sparsity", "sparsity_before", "training", "seconds", "peak_memory_bytes")
        found = {key: report[key] for key in kept} | {"options": {**STEP, **how}}
        rows.append({"what": what, **found, "before": before, "after": measured(output, progress)})
    return rows


def measured(model, progress):
    return secateur.evaluate(model, text=TEXT, seqlen=512, windows=40, record=False, progress=progress)


def overhead(models, rounds=5, steps=4):
    """Seconds of a step with masks over those without, in turn: median of the ratios."""
    import torch

    model = secateur.prune("smollm2", method="magnitude", sparsity=0.5).model.float().train()
    ids = torch.randint(3, 40_000, (1, 256), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)
    masks = secateur.Masks.of(model)

    def seconds():
        started = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        return (time.perf_counter() - started) / steps

    seconds()
    pairs = []
    for _ in range(rounds):
        without = seconds()
        with masks.held():
            pairs.append((without, seconds()))
    return {"pairs": pairs, "ratio": statistics.median(b / a for a, b in pairs)}


def table(found):
    if "ratio" in found:
        return f"A step with masks takes {found['ratio']:.3f} of one without (medians of {len(found['pairs'])} pairs)."
    lines = ["| what | steps | tokens | sparsity | perplexity | held-out loss | time |", "|---|" + "---|" * 6]
    first = found[0]
    lines.append(f"| before | | | {first['sparsity_before']:.2%} | {first['before']['perplexity']:.4g} | | |")
    for row in found:
        held, steps = row["training"]["held_out"], row["training"]["steps"]
        cells = [row["what"], str(steps), f"{row['options']['steps'] * 256:,}", f"{row['sparsity']:.2%}"]
        cells += [f"{row['after']['perplexity']:.4g}", f"{held[0][1]:.3f} to {dict(held)[steps]:.3f}"]
        cells.append(f"{row['seconds']['training'] / 60:.0f} min")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
