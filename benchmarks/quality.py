"""What better solves, reconstruction and allocation win: perplexity, divergence, time and memory of each.

    cd DATA && python …/benchmarks/quality.py -o …/benchmarks/results/quality [--only ablation,best] [--rows NAME,NAME]
    python benchmarks/quality.py -o benchmarks/results/quality --print > tables.md

DATA holds `c4_docs.jsonl` (to calibrate) and `wiki.test.raw` (to measure), and for the second model its directory
`stories`, made by `benchmarks/stories.py`. A row that is in OUTPUT/rows.jsonl is not measured again, and a row that was
killed goes on. On two threads of a CPU a row takes 4 to 8 minutes, with reconstruction 20 to 30.
"""

import argparse
import json
import math
import re
import shutil
import statistics
from pathlib import Path

import secateur
from secateur.reporting.terminal.progress import terminal_progress

STAGES = {
    "sparsegpt": {"method": "sparsegpt"},
    "wanda": {"method": "wanda"},
    "wanda+pcg": {"method": "wanda+pcg"},
    "wanda+swaps+pcg": {"method": "wanda+swaps+pcg"},
    "alps": {"method": "alps"},
}
TARGETS = {
    "50 %": {"sparsity": 0.5}, "60 %": {"sparsity": 0.6}, "70 %": {"sparsity": 0.7}, "2:4": {"pattern": "2:4"},
    "8:16": {"pattern": "8:16"},
}  # fmt: skip
SEEDS = {"50 %": (0, 1, 2), "2:4": (0, 1, 2)}
TASKS = ("arc_easy", "piqa", "winogrande", "openbookqa")
SETTINGS = [(6, 3e-4, 2048), (6, 1e-3, 2048), (6, 2e-3, 2048), (12, 1e-3, 2048), (6, 1e-3, 4096)]


def runs():
    """Every row: table, name, and the options of `secateur.prune`."""
    for epochs, rate, tokens in SETTINGS:
        how = secateur.Reconstruction(epochs=epochs, learning_rate=rate, batch_tokens=tokens)
        name = f"sparsegpt + {epochs} epochs at {rate:g}, {tokens} tokens a step, 50 %"
        yield "settings", name, {"method": "sparsegpt", "reconstruct": how}
    for goal, asked in TARGETS.items():
        for name, how in STAGES.items():
            yield "ablation", f"{name}, {goal}", {**asked, **how}
        for method in ("wanda", "wanda+pcg", "wanda+swaps+pcg", "sparsegpt", "alps"):
            yield "reconstruction", f"{method} + reconstruct, {goal}", {**asked, "method": method, "reconstruct": True}
        for samples in (128, 256):
            yield "text", f"best, {goal}, {samples} rows", {**asked, "preset": "best", "samples": samples}
        for method in ("wanda", "wanda+pcg:alike=0", "wanda+pcg", "alps:alike=0", "alps") if goal == "50 %" else ():
            for samples in (2, 8):
                yield "text", f"{method}, {goal}, {samples} rows", {**asked, "method": method, "samples": samples}
        for rule in ("linear", "owl", "alpha"):
            yield "allocation", f"wanda+pcg, {rule}, {goal}", {**asked, "method": "wanda+pcg", "allocation": rule}
        by_depth = {**asked, "method": "alps", "allocation": "linear"}
        yield "allocation", f"alps, linear, {goal}", by_depth
        yield "allocation", f"alps + reconstruct, linear, {goal}", {**by_depth, "reconstruct": True}
        for seed in SEEDS.get(goal, (0,)):
            yield "best", f"best, {goal}, seed {seed}", {**asked, "preset": "best", "seed": seed}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", help="names of tables")
    parser.add_argument("--rows", help="names of rows, separated by semicolons")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default="c4_docs.jsonl")
    parser.add_argument("--text", default="wiki.test.raw")
    parser.add_argument("--tasks", help="where the zero-shot sets lie; they are answered too")
    parser.add_argument("--limit", type=int, help="questions of each zero-shot set; all if it is not given")
    parser.add_argument("--print", action="store_true", help="measure nothing; print what is there as Markdown")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "rows.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if options.print:
        print(table(rows))
        return
    wanted = [("dense", "dense", None), *runs()]
    for where, name, how in wanted:
        asked = options.only is None or where in options.only.split(",") or where == "dense"
        asked = asked and (options.rows is None or name in options.rows.split(";") or where == "dense")
        if asked and name not in {row["name"] for row in rows}:
            rows.append({"table": where, "name": name, **measured(name, how, options)})
            with file.open("a") as lines:
                lines.write(json.dumps(rows[-1]) + "\n")
            print(name, rows[-1]["perplexity"], flush=True)


def measured(name, how, options):
    """Prune as asked, and measure the result on the test text against the dense model."""
    progress, place = terminal_progress(quiet=True), options.output / re.sub(r"[^\w.]+", "-", name)
    found, subject = {}, options.model
    if how is not None:
        calibration = {"calibration": options.data, "seqlen": 512, "samples": 64}
        report = secateur.prune(options.model, place, **{**calibration, **how}, progress=progress).report
        rebuilt = [b["reconstruction"] for b in report["blocks"] if "reconstruction" in b]
        told = ("method", "pattern", "calibration", "reconstruct", "allocation_found", "software", "device")
        found = {
            "options": {name: str(value) for name, value in how.items()},
            "sparsity": report["sparsity"],
            "seconds": report["seconds"]["pruning"],
            "process_seconds": report["seconds"]["this_process"],  # the search for an allocation too
            "peak_memory_bytes": report["peak_memory_bytes"],
            "plan": {key: report["plan"].get(key) for key in told},
            "reconstruction": rebuilt,
        }
        subject = place
    tasks = {"tasks": TASKS, "task_data": options.tasks, "limit": options.limit} if options.tasks else {}
    against = {} if how is None else {"against": options.model}
    result = secateur.evaluate(
        subject, text=options.text, seqlen=512, windows=40, record=False, progress=progress, **against, **tasks
    )
    shutil.rmtree(place, ignore_errors=True)
    fidelity = result.get("fidelity") or {}
    scores = {row["task"]: row["metrics"]["acc"]["value"] for row in (result.get("tasks") or {}).get("results", [])}
    return {**found, "perplexity": result["perplexity"], "kl": fidelity.get("kl"), "tasks": scores}


def table(rows):
    """All rows, and what part of SparseGPT's gap in log perplexity to the dense model each one closes."""
    found = {row["name"]: row for row in rows}
    dense = found["dense"]["perplexity"]
    lines = ["| what | perplexity | KL | of SparseGPT's gap closed | tasks | pruning | memory |", "|---|" + "---|" * 6]
    closed = {}
    for row in rows:
        goal = next((g for g in TARGETS if f", {g}" in row["name"]), None)
        base = found.get(f"sparsegpt, {goal}")
        if base:
            closed[row["name"]] = 1 - math.log(row["perplexity"] / dense) / math.log(base["perplexity"] / dense)
        cells = [row["name"], f"{row['perplexity']:.2f}", "" if row["kl"] is None else f"{row['kl']:.3f}"]
        cells.append(f"{closed[row['name']]:.0%}" if row["name"] in closed else "")
        cells.append(f"{statistics.mean(row['tasks'].values()):.3f}" if row["tasks"] else "")
        cells += (
            [f"{row['seconds']:.0f} s", f"{row['peak_memory_bytes'] / 1e9:.1f} GB"] if "seconds" in row else ["", ""]
        )
        lines.append(f"| {' | '.join(cells)} |")
    for goal, seeds in SEEDS.items():
        names = [f"best, {goal}, seed {seed}" for seed in seeds]
        if closed.keys() >= set(names):
            values, parts = [found[n]["perplexity"] for n in names], [closed[n] for n in names]
            lines.append(
                f"\nbest, {goal}, {len(names)} seeds: {statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}, "
                f"{statistics.mean(parts):.0%} ± {statistics.stdev(parts):.0%} of the gap closed"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
