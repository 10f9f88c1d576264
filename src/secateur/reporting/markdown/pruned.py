"""What a model card says of a model whose weights were set to zero in one shot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...pruning.methods import parts_of
from ..pruned import allocation_found, found_words, mean_errors, reconstruction_words
from ..words import duration, size
from .papers import ALLOCATION_PAPERS, EBFT, PAPERS, STAGE_PAPERS, Paper, cited
from .text import calibrated_on, markdown_code, markdown_text

Report = Mapping[str, Any]

PATTERNS = {"row": ", the same sparsity in every output row", "matrix": ", one choice over each whole matrix"}


def pruned_words(report: Report) -> str:
    """What was done, for the title."""
    return f"pruned with {method_name(report['plan']['method'])} to {report['sparsity'] * 100:.3g}%"


def method_name(method: str) -> str:
    """A method in a few words, and what followed it."""
    return " + ".join(paper.name if paper else markdown_code(text) for paper, text, _ in _parts(method))


def _parts(method: str) -> list[tuple[Paper | None, str, str]]:
    """Of a method and each stage: its paper, its whole text, its options."""
    parts = enumerate(parts_of(method))
    return [
        ((STAGE_PAPERS if place else PAPERS).get(name), f"{name}:{options}" if options else name, options)
        for place, (name, options) in parts
    ]


def pruned_sentences(report: Report, base: str) -> list[str]:
    """What was set to zero."""
    plan = report["plan"]
    fitted = (
        "; then the kept weights, norms and biases of each block were trained to give the dense model's hidden states"
    )
    return [
        f"This is {base}, with {report['sparsity']:.1%} of the weights in {layers_of(plan)} set to zero, in one shot "
        f"after training{fitted if plan.get('reconstruct') else ' and without retraining'}. Embeddings, output head, "
        "norms and biases were not pruned."
    ]


def layers_of(plan: Report) -> str:
    """Which layers were pruned, of a plan or of the course of a training."""
    narrowed = plan["include"] or plan["exclude"]
    return "those of its linear layers that were selected" if narrowed else "its decoder's linear layers"


def pruned_facts(report: Report) -> list[tuple[str, str]]:
    """The rows of the table."""
    plan, calibration = report["plan"], report["plan"]["calibration"]
    count, dense = len(report["matrices"]), [*report["dense_matrices"], *report["left_out"]]
    more = f" and {len(dense) - 3} more" if len(dense) > 3 else ""
    facts = [
        ("Preset", markdown_code(plan["preset"]) if plan.get("preset") else ""),
        ("Method", method_cited(plan["method"])),
        ("Sparsity", f"{report['sparsity']:.2%}: {report['zeros']:,} of {report['weights']:,} weights are zero"),
        ("Pattern", pattern_words(plan["pattern"])),
        ("Pruned", f"{count:,} matrices"),
        ("Left dense", dense and f"{len(dense):,} matrices: {', '.join(map(markdown_code, dense[:3]))}{more}"),
        ("Allocation", allocation_words(plan)),
        ("Reconstruction", _reconstruction(report)),
        ("Calibration", calibrated_on(calibration) if calibration else "none, the method needs none"),
        (
            "Time to prune",
            f"{duration(report['seconds']['pruning'])}, {plan['threads']:d} threads, {markdown_text(plan['device'])}",
        ),
        ("Peak memory", size(report["peak_memory_bytes"])),
    ]
    return [(what, text) for what, text in facts if text]


def method_cited(method: str) -> str:
    """A method with its paper, and each stage that followed it with its own."""
    said = []
    for paper, text, options in _parts(method):
        told = cited(paper) if paper else f"{markdown_code(text)}, a method of its user's own"
        said.append(f"{told}. Options: {markdown_code(options.replace(':', ', '))}" if paper and options else told)
    return ". Then ".join(said)


def pattern_words(pattern: str) -> str:
    """A pattern, and what it means."""
    return f"{markdown_code(pattern)}{PATTERNS.get(pattern, '')}"


def allocation_words(plan: Report) -> str:
    """How sparsity was shared out, by a plan or in the course of a training."""
    if found := allocation_found(plan):
        return f"{markdown_text(found_words(found))}. {cited(ALLOCATION_PAPERS[found['name']])}"
    rules = plan["allocation"]
    return "uniform" if rules == "uniform" else f"by {len(rules)} rules, which stand below"


def _reconstruction(report: Report) -> str:
    """How each block was fitted after its pruning, and what that gained."""
    how = report["plan"].get("reconstruct")
    if not how:
        return ""
    said = reconstruction_words(how)
    if errors := mean_errors(report["blocks"]):
        before, after, count = errors
        said += f"; held-out error, mean over {count:,} blocks, {after:.4f}; before, {before:.4f}"
    return f"{said}. {cited(EBFT)}"
