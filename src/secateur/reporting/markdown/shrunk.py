"""What a model card says of a model from which neurons, heads, experts or blocks were removed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..removed import chosen_blocks, removed_share, what_is_left
from ..words import duration, size
from .papers import CRITERIA_PAPERS, DEPTH_PAPERS, REAP, cited
from .text import calibrated_on, markdown_code, markdown_text

Report = Mapping[str, Any]

LOADING = (
    "It is a complete checkpoint of transformers, dense and smaller than its base model: nothing else is needed, and "
    "every engine that runs the base model runs it."
)


def shrunk_words(report: Report) -> str:
    """What was done, for the title."""
    return f"shrunk by {removed_share(report['parameters']):.1%} of its blocks' parameters"


def shrunk_sentences(report: Report, base: str) -> list[str]:
    """What was removed, and what became of the rest."""
    plan, removed = report["plan"], report["removed_layers"]
    said = [
        f"This is {base}, with {removed_share(report['parameters']):.1%} of the parameters of its blocks removed, in "
        "one shot after training and without retraining."
    ]
    if left := what_is_left(report["config"]):
        said.append(f"It has {'; '.join(left)}.")
    if removed:
        blocks = ", ".join(f"{index:d}" for index in removed)
        said.append(f"{'Block' if len(removed) == 1 else 'Blocks'} {blocks} of the base model went.")
    if report["matrices"]:
        solved = "were solved anew by least squares, to make up for what went"
        said.append(f"The matrices after a cut {solved if plan['compensate'] else 'keep their other weights'}.")
    return [*said, "Embeddings and output head were not cut."]


def shrunk_facts(report: Report) -> list[tuple[str, str]]:
    """The rows of the table."""
    plan, parameters, calibration = report["plan"], report["parameters"], report["plan"]["calibration"]
    spent = f"{duration(report['seconds']['shrinking'])}, {plan['threads']:d} threads, {markdown_text(plan['device'])}"
    facts = [
        ("Criterion", _criterion(plan["criterion"]) if report["matrices"] else ""),
        ("Heads or neurons", _split(report)),
        ("Blocks removed", _blocks(report)),
        ("Experts", f"those that give least to their tokens went. {cited(REAP)}" if report["kept_experts"] else ""),
        ("Config", "; ".join(_change(name, old, new) for name, (old, new) in report["config"].items())),
        ("Parameters", f"{parameters['after']:,}; before, {parameters['before']:,}"),
        ("Parameters of blocks", f"{parameters['blocks_after']:,}; before, {parameters['blocks_before']:,}"),
        ("Calibration", calibrated_on(calibration) if calibration else "none, nothing was to be observed"),
        ("Time to shrink", spent),
        ("Peak memory", size(report["peak_memory_bytes"])),
    ]
    return [(what, text) for what, text in facts if text]


def shrunk_size(report: Report) -> str:
    """The checkpoint's size, and that of the whole model with as many bytes for each parameter."""
    output, parameters = report["bytes"]["output"], report["parameters"]
    return f"{size(output)}; before, in the same dtype, {size(output * parameters['before'] / parameters['after'])}"


def _criterion(name: str) -> str:
    if name in CRITERIA_PAPERS:
        return f"{markdown_code(name)}. {cited(CRITERIA_PAPERS[name])}"
    return "chance" if name == "random" else markdown_code(name)


def _split(report: Report) -> str:
    """How a target was divided, if several ways were tried."""
    tried: Mapping[str, float] = next((step["kl"] for step in report["steps"] if step["step"] == "split"), {})
    if not tried:
        return ""
    best = min(tried, key=lambda way: tried[way])
    return (
        f"of {len(tried)} ways to remove {report['plan']['target']:.1%}, the one that changes predictions least: "
        f"{markdown_text(best)}, KL {tried[best]:.3g} nats per token"
    )


def _blocks(report: Report) -> str:
    removed, plan = report["removed_layers"], report["plan"]
    if not removed:
        return ""
    said = f"{', '.join(f'{index:d}' for index in removed)}: {markdown_text(chosen_blocks(plan))}"
    named = isinstance(plan["layers"], list)
    return said if named or plan["depth"] not in DEPTH_PAPERS else f"{said}. {cited(DEPTH_PAPERS[plan['depth']])}"


def _change(name: str, old: Any, new: Any) -> str:
    return f"{markdown_code(name)} from {_value(old)} to {_value(new)}"


def _value(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list):
        return f"a list of {len(value):,}"
    return "what it did not say" if value is None else markdown_code(value)
