"""What a model card says of a model that was trained under its masks, or pruned while it was trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...pruning import METHODS
from ...pruning.methods import parts_of
from ..removed import is_shrunk, removed_share
from ..trained import (
    command_of,
    course_words,
    held_out,
    is_trained,
    loss_name,
    loss_words,
    remarks,
    story,
    what_was_trained,
)
from ..words import duration, size
from .papers import PERP, SCHEDULE_PAPERS, cited
from .pruned import allocation_words, layers_of, method_cited, method_name, pattern_words, pruned_words
from .shrunk import shrunk_words
from .text import markdown_code, markdown_text, short_name

Report = Mapping[str, Any]

TRAINING_COSTS = "Pruning costs quality; training wins back some of it, and most on texts like those it saw."


def trained_words(report: Report, between: str = ", ") -> str:
    """What was done, for the title: everything before it, too."""
    return between.join(_words(one) for one in story(report) if _made(one))


def _made(report: Report) -> bool:
    return command_of(report) in ("prune", "shrink", "finetune")


def _words(report: Report) -> str:
    if not is_trained(report):
        return shrunk_words(report) if is_shrunk(report) else pruned_words(report)
    steps = f"{report['training']['steps']:,} steps"
    if course := report["plan"]["course"]:
        return f"pruned with {method_name(course['method'])} to {report['sparsity'] * 100:.3g}% in {steps} of training"
    return f"trained for {steps}"


def trained_sentences(report: Report, base: str) -> list[str]:
    """What was trained, on what, and what became of the zeros."""
    plan, course = report["plan"], report["plan"]["course"]
    layers = layers_of(course) if course else "its decoder's linear layers"
    kept = "" if course else ", and every zero that was there before was kept in training"
    said = [
        f"This is {base}, {trained_words(report, ', then ')}.",
        f"Of the weights in {layers} {report['sparsity']:.1%} are zero{kept}.",
    ]
    if not course and not any(map(_made, story(report)[:-1])):
        said.append("How it was pruned is not recorded here.")
    teacher = plan["teacher"]
    aim = f"as {markdown_code(short_name(teacher['name']))} does" if teacher else "what comes next"
    said.append(
        f"Trained were {markdown_text(what_was_trained(plan))}, to predict {aim} in "
        f"{markdown_code(plan['data']['source'])}."
    )
    return [*said, *map(markdown_text, remarks(report))]


def trained_facts(report: Report) -> list[tuple[str, str]]:
    """The rows of the table."""
    plan, training, data = report["plan"], report["training"], report["plan"]["data"]
    spent = f"{duration(report['seconds']['training'])}, {plan['threads']:d} threads, {markdown_text(plan['device'])}"
    rows, rows_of_a_step = training["held_out_rows"], plan["batch_size"] * plan["accumulate"]
    facts = [
        *(_former(one) for one in story(report)[:-1] if _made(one)),
        *_course(plan["course"]),
        ("Trained", _trained(plan, training)),
        ("Steps", f"{training['steps']:,} of {plan['steps']:,}, each of {rows_of_a_step:,} rows"),
        (
            "Data",
            f"{markdown_code(data['source'])}, {data['samples'] - rows:,} rows and {rows:,} held out, of "
            f"{data['seqlen']:,} tokens at most; {data['tokens']:,} tokens, seed {data['seed']:d}",
        ),
        ("Teacher", markdown_code(short_name(plan["teacher"]["name"])) if plan["teacher"] else ""),
        ("Learning rate", f"{plan['learning_rate']:g} at its highest"),
        ("Held-out loss", _held_out(training)),
        ("Sparsity", _sparsity(report)),
        ("Time to train", spent),
        ("Peak memory", size(report["peak_memory_bytes"])),
    ]
    return [(what, text) for what, text in facts if text]


def _trained(plan: Report, training: Report) -> str:
    said = f"{markdown_text(what_was_trained(plan))}: {training['trainable']:,} in all"
    return f"{said}. {cited(PERP)}" if plan["train"] in ("lora", "bias") else said


def _former(report: Report) -> tuple[str, str]:
    """One thing that was done to the model before."""
    plan = report["plan"]
    if is_trained(report):
        course = f", pruned on the way {markdown_text(course_words(plan['course']))}" if plan["course"] else ""
        steps, source = report["training"]["steps"], markdown_code(plan["data"]["source"])
        return "Trained before", f"{markdown_text(what_was_trained(plan))}; {steps:,} steps on {source}{course}"
    if is_shrunk(report):
        return "Shrunk before", f"{removed_share(report['parameters']):.1%} of its blocks' parameters were removed"
    said = f"{report['sparsity']:.2%} of {report['weights']:,} weights, pattern {pattern_words(plan['pattern'])}"
    return "Pruned before", f"{said}. {_method(plan['method'])}"


def _method(method: str) -> str:
    """A method with its paper, whose retraining is here."""
    return method_cited(method).replace("; here without its retraining", "")


def _course(course: Report | None) -> list[tuple[str, str]]:
    """How it was pruned on the way."""
    if not course:
        return []
    name = parts_of(course["method"])[0][0]
    schedule = SCHEDULE_PAPERS.get(course["schedule"] if course["rounds"] is None else "rounds")
    pattern = course["pattern"] or (METHODS[name].pattern if name in METHODS else "")
    return [
        ("Pruned on the way", markdown_text(course_words(course)) + (f". {cited(schedule)}" if schedule else "")),
        ("Method", _method(course["method"])),
        ("Pattern", pattern_words(pattern) if pattern else ""),
        ("Allocation", allocation_words(course)),
    ]


def _held_out(training: Report) -> str:
    pair = held_out(training)
    if not pair:
        return ""
    before, after = map(loss_words, pair)
    of = "" if training["loss"] != "divergence" else f", {loss_name(training)}"
    return f"{after}; before, {before}: nats per token{of}, {training['held_out_rows']:,} rows"


def _sparsity(report: Report) -> str:
    zeros = f"{report['zeros']:,} of {report['weights']:,} weights are zero"
    kept = "" if report["plan"]["course"] else "; every zero was kept"
    return f"{report['sparsity']:.2%}; before, {report['sparsity_before']:.2%}: {zeros}{kept}"
