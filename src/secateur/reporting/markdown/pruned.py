"""What a model card says of a model whose weights were set to zero in one shot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..words import duration, size
from .papers import PAPERS, cited
from .text import calibrated_on, markdown_code, markdown_text

Report = Mapping[str, Any]

PATTERNS = {"row": ", the same sparsity in every output row", "matrix": ", one choice over each whole matrix"}


def pruned_words(report: Report) -> str:
    """What was done, for the title."""
    return f"pruned with {method_name(report['plan']['method'])} to {report['sparsity'] * 100:.3g}%"


def method_name(method: str) -> str:
    """A method in a few words."""
    name = method.partition(":")[0]
    return PAPERS[name].name if name in PAPERS else markdown_code(method)


def pruned_sentences(report: Report, base: str) -> list[str]:
    """What was set to zero."""
    return [
        f"This is {base}, with {report['sparsity']:.1%} of the weights in {layers_of(report['plan'])} set to zero, in "
        "one shot after training and without retraining. Embeddings, output head, norms and biases were not pruned."
    ]


def layers_of(plan: Report) -> str:
    """Which layers were pruned, of a plan or of the course of a training."""
    narrowed = plan["include"] or plan["exclude"]
    return "those of its linear layers that were selected" if narrowed else "its decoder's linear layers"


def pruned_facts(report: Report) -> list[tuple[str, str]]:
    """The rows of the table."""
    plan, calibration, rules = report["plan"], report["plan"]["calibration"], report["plan"]["allocation"]
    count, dense = len(report["matrices"]), [*report["dense_matrices"], *report["left_out"]]
    more = f" and {len(dense) - 3} more" if len(dense) > 3 else ""
    facts = [
        ("Method", method_cited(plan["method"])),
        ("Sparsity", f"{report['sparsity']:.2%}: {report['zeros']:,} of {report['weights']:,} weights are zero"),
        ("Pattern", pattern_words(plan["pattern"])),
        ("Pruned", f"{count:,} matrices"),
        ("Left dense", dense and f"{len(dense):,} matrices: {', '.join(map(markdown_code, dense[:3]))}{more}"),
        ("Allocation", allocation_words(rules)),
        ("Calibration", calibrated_on(calibration) if calibration else "none, the method needs none"),
        (
            "Time to prune",
            f"{duration(report['seconds']['pruning'])}, {plan['threads']:d} threads, {markdown_text(plan['device'])}",
        ),
        ("Peak memory", size(report["peak_memory_bytes"])),
    ]
    return [(what, text) for what, text in facts if text]


def method_cited(method: str) -> str:
    """A method with its paper."""
    name, _, options = method.partition(":")
    if name not in PAPERS:
        return f"{markdown_code(method)}, a method of its user's own"
    said = cited(PAPERS[name])
    return f"{said}. Options: {markdown_code(options.replace(':', ', '))}" if options else said


def pattern_words(pattern: str) -> str:
    """A pattern, and what it means."""
    return f"{markdown_code(pattern)}{PATTERNS.get(pattern, '')}"


def allocation_words(rules: Any) -> str:
    """How sparsity was shared out."""
    return "uniform" if rules == "uniform" else f"by {len(rules)} rules, which stand below"
