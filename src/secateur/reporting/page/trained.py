"""The page of a model that was trained under its masks, or pruned while it was trained."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..trained import (
    command_of,
    first_model,
    held_out,
    is_trained,
    loss_name,
    loss_words,
    remarks,
    story,
    what_was_trained,
    zeros_words,
)
from ..words import number, size
from . import quality, speed
from .blocks import sparsity_by_kind
from .cards import bytes_card, bytes_tables, time_card
from .charts import Axis, Series, scatter
from .making import reproduce
from .parts import Card, Cell, Page, Picture, Section, Table, plain, share
from .records import Records
from .wording import counted, digits, percent, ratio, short

Report = Mapping[str, Any]


def trained_page(records: Records) -> Page:
    """Put together the page of an output of ``finetune``, finished or not."""
    report, first = records.report, first_model(records.report)
    name, finished = short(report["plan"]["model"]["name"], 80), records.kind == "trained"
    sections = [
        Section("summary", "In short", cards=_cards(records, first)),
        Section(
            "quality",
            "Quality",
            tables=quality.perplexity_table(records) + perplexities_on_the_way(report),
            pictures=quality.tasks_picture(records) + quality.fidelity_picture(records),
        ),
        training_section(report),
        matrices_section(report),
        Section("size", "Size and speed", tables=bytes_tables(report) + speed.speed_tables(records)),
        Section("generations", "What it writes", samples=quality.samples(records, first)),
        quality.history(records),
        reproduce(records),
    ]
    if finished:
        title, lead = f"{name}, {title_words(report)}", " ".join([trained_words(report), *_gain(records)])
        files, note = "secateur.json and evaluations.jsonl", " ".join(remarks(report))
        return Page(title, "Trained model", lead, sections, files, note)
    note = "This run is not finished: what follows is what its journal says. The same command goes on from there."
    lead = f"Trained so far: {_progress(report)}, as far as the last checkpoint."
    files = "plan.json and journal.jsonl"
    return Page(f"{name}, to be trained", "Trained model, unfinished", lead, sections, files, note)


def title_words(report: Report) -> str:
    """What was done, in a few words."""
    steps = counted(report["training"]["steps"], "step")
    if report["plan"].get("course"):
        return f"pruned to {percent(report['sparsity'], 0)} in {steps} of training"
    return f"trained for {steps}, {percent(report['sparsity'], 0)} of its weights zero"


def trained_words(report: Report) -> str:
    """What was trained, and what became of the zeros."""
    plan, training = report["plan"], report["training"]
    teacher = f", to predict as {short(plan['teacher']['name'], 60)} does" if plan.get("teacher") else ""
    return (
        f"Trained for {counted(training['steps'], 'step')} on {short(plan['data']['source'], 60)}{teacher}: "
        f"{short(what_was_trained(plan), 80)}, {training['trainable']:,} in all. Of {report['weights']:,} weights in "
        f"its matrices, {report['zeros']:,} ({percent(report['sparsity'])}) are zero, "
        f"{percent(report['sparsity_before'])} before: {short(zeros_words(report), 160)}."
    )


def _gain(records: Records) -> list[str]:
    said, ((before, after), _) = [], quality.perplexities(records)
    if before and after:
        own, text = records.report.get("evaluation"), short(after["text"], 60)
        of = "before training" if own else f"of {short(before.get('model') or 'the other model', 60)}"
        values = number(after.get("perplexity")), number(before.get("perplexity"))
        said.append(f"Its perplexity on {text} is {values[0]}; {values[1]} {of}.")
    return [*said, f"The checkpoint takes {size(records.report['bytes']['output'])}."]


def _progress(report: Report) -> str:
    return f"{report['at']:,} of {counted(report['plan']['steps'], 'step')}"


def _cards(records: Records, first: str) -> list[Card]:
    report, finished = records.report, records.kind == "trained"
    cards = [quality.perplexity_card(records, first)] if finished or report.get("evaluation") else []
    if not finished:
        cards.append(Card("Steps finished", _progress(report), "as the journal says"))
        return [*cards, time_card("Time so far", report, report["seconds"]["training"])]
    before, after = (percent(report[key]) for key in ("sparsity_before", "sparsity"))
    note = f"{report['zeros']:,} of {report['weights']:,} weights; {short(zeros_words(report), 160)}"
    cards.append(Card("Sparsity", after if before == after else f"{before} → {after}", note))
    cards += [*_loss_card(report["training"]), *(card for card in (bytes_card(report),) if card)]
    cards += speed.speed_cards(records, first)
    cards += [quality.fidelity_card(records, first), quality.tasks_card(records, first)]
    return [*cards, time_card("Time to train", report, report["seconds"]["training"])]


def _loss_card(training: Report) -> list[Card]:
    pair = held_out(training)
    if not pair:
        return []
    before, after = pair
    times = ratio(after, before)
    note = f"{loss_name(training)}, nats per token, {counted(training['held_out_rows'], 'row')}"
    value = f"{loss_words(before)} → {loss_words(after)}"
    return [Card("On held-out rows", value, "; ".join(filter(None, [f"×{times:.2f}" if times else "", note])))]


def perplexities_on_the_way(report: Report) -> list[Table]:
    """The perplexity after each thing that was done, as far as all were measured on the same tokens."""
    own, rows = report.get("evaluation") or {}, list[list[Cell]]()
    for one in story(report):
        measured = one.get("evaluation") or {}
        for when in ("before", "after"):
            if (found := measured.get(when)) and _tokens(found) == _tokens(own.get("after") or {}):
                what = "before" if when == "before" else WHEN[command_of(one)]
                if when == "after" or not rows:
                    rows.append([Cell(what), quality.perplexity(found.get("perplexity"))])
    return [Table("Perplexity on the way, on the same tokens", ["", "Perplexity"], rows)] if len(rows) > 2 else []


WHEN = {"prune": "pruned", "shrink": "shrunk", "finetune": "trained"}


def _tokens(evaluation: Report) -> list[Any]:
    return [evaluation.get(key) for key in ("text", "seqlen", "windows", "tokens", "available_tokens")]


def training_section(report: Report) -> Section:
    """How the losses went, and what it was trained with."""
    plan, training, data = report["plan"], report.get("training"), report["plan"]["data"]
    rows = plan["batch_size"] * plan["accumulate"]
    facts = [
        ("Trained", short(what_was_trained(plan), 80)),
        ("Learnt", f"the predictions of {short(plan['teacher']['name'])}" if plan.get("teacher") else "the text"),
        ("Text", f"{counted(data['samples'], 'row')} of {short(data['source'])}, {data['tokens']:,} tokens"),
        ("Steps", f"{plan['steps']:,} were asked for, each of {counted(rows, 'row')}"),
        ("Learning rate", f"{digits(plan['learning_rate'])} at its highest"),
    ]
    if training:
        facts.insert(3, ("Held out", counted(training["held_out_rows"], "row")))
        facts.append(("Kept", f"the model of step {training['steps']:,}"))
    for before in story(report)[:-1]:
        facts.append(("Before", _before(before)))
    return Section("training", "Training", pictures=_losses(training) if training else [], facts=facts)


def _before(report: Report) -> str:
    """One thing that was done to the model before it was trained."""
    plan = report["plan"]
    if is_trained(report):
        return f"{title_words(report)}, {short(what_was_trained(plan), 80)}, on {short(plan['data']['source'])}"
    if command_of(report) == "prune":
        return (
            f"pruned by {short(plan['method'])} to {percent(report['sparsity'])}, pattern {short(plan['pattern'], 40)}"
        )
    return {"shrink": "shrunk: parts of its blocks were removed", "pack": "packed"}.get(command_of(report), "unpacked")


def _losses(training: Report) -> list[Picture]:
    """Loss against step: of the rows that were trained on, and of those held out."""
    found = {"training rows": _points(training["losses"]), "held-out rows": _points(training["held_out"])}
    if not any(found.values()):
        return []
    name = loss_name(training).capitalize()
    title, axis = "The course of training", f"{name}, nats per token"
    looks = {"training rows": (1, None), "held-out rows": (0, 0)}
    series = [Series(label, *looks[label], dash=0, points=_places(values)) for label, values in found.items() if values]
    if (kept := training["steps"]) in found["held-out rows"]:
        series.append(Series(f"kept, step {kept:,}", 5, 11, points=_places({kept: found["held-out rows"][kept]})))
    says = f"{name}: " + "; ".join(_in_words(label, values) for label, values in found.items() if values) + "."
    steps = sorted({step for values in found.values() for step in values})
    rows = [[Cell(str(step)), *(plain(values.get(step)) for values in found.values())] for step in steps]
    table = Table(axis, ["Step", "Training rows", "Held-out rows"], rows)
    svg = scatter("losses", title, says, series, Axis("Step"), Axis(axis))
    return [Picture("losses", title, says, svg, table)]


def _points(pairs: Sequence[Sequence[Any]]) -> dict[int, float]:
    """Losses by step, but for those that are no numbers."""
    return {step: loss for step, loss in pairs if loss is not None}


def _places(values: Mapping[int, float]) -> list[tuple[float, float, float, float]]:
    return [(step, values[step], 0.0, 0.0) for step in sorted(values)]


def _in_words(label: str, values: Mapping[int, float]) -> str:
    first, last, low = min(values), max(values), min(values, key=lambda step: values[step])
    return (
        f"on {label} {digits(values[first])} at step {first:,} and {digits(values[last])} at step {last:,}, lowest at "
        f"step {low:,}, {digits(values[low])}"
    )


def matrices_section(report: Report) -> Section:
    """Where the zeros are, by kind of matrix and block."""
    found = [{**one, "block": block} for one in report["matrices"] if (block := block_of(one["name"])) is not None]
    return Section("blocks", "Blocks and matrices", pictures=sparsity_by_kind(found), tables=_sparsity(report))


def block_of(name: str) -> int | None:
    """The block that a matrix is in, which is the first number in its name.

    >>> block_of("model.layers.12.mlp.experts.3.up_proj"), block_of("lm_head")
    (12, None)
    """
    found = re.search(r"(?<=\.)\d+(?=\.)", name)
    return int(found[0]) if found else None


def _sparsity(report: Report) -> list[Table]:
    """How many zeros came on the way, if any did."""
    if not report["plan"].get("course") or "zeros" not in report:
        return []
    cells = [share(report["sparsity_before"]), share(report["sparsity"])]
    caption = "Sparsity of all matrices"
    return [Table(caption, ["", "Before", "After"], [[Cell("Zeros / weights"), *cells]])]
