"""The page of a model made smaller: what was removed, what was tried out, what it cost and gained."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..removed import chosen_blocks, removed_share, what_is_left
from ..words import number, size
from . import quality, speed
from .blocks import by_kind, errors_by_kind, of_blocks, pictures_by_block
from .cards import bytes_tables, progress_words, time_card
from .charts import Axis
from .making import reproduce
from .parts import Card, Cell, Page, Picture, Section, Table, exact, plain, seconds, share
from .records import Records
from .wording import counted, course, listing, percent, ratio, short

Report = Mapping[str, Any]
ERROR = Axis("Output error, |Y − Y′| / |Y|")


def shrunk_page(records: Records) -> Page:
    """Put together the page of an output of ``shrink``, finished or not."""
    report = records.report
    name, finished = report["plan"]["model"]["name"], records.kind == "shrunk"
    sections = [
        Section("summary", "In short", text=[DENSE] if finished else [], cards=_cards(records, name)),
        Section(
            "quality",
            "Quality",
            tables=quality.perplexity_table(records),
            pictures=quality.tasks_picture(records) + quality.fidelity_picture(records),
        ),
        removed_section(report),
        cut_section(report),
        Section("size", "Size and speed", tables=bytes_tables(report) + speed.speed_tables(records)),
        Section("generations", "What it writes", samples=quality.samples(records, name)),
        quality.history(records),
        reproduce(records),
    ]
    if finished:
        gone = percent(removed_share(report["parameters"]), 1)
        title = f"{short(name, 80)}, {gone} of its blocks' parameters removed"
        lead = " ".join([removed_words(report), *_gain(records)])
        return Page(title, "Shrunk model", lead, sections, "secateur.json and evaluations.jsonl")
    note = "This run is not finished: what follows is what its journal says. The same command goes on from there."
    lead = f"Blocks cut so far: {progress_words(records)}."
    kind = "Shrunk model, unfinished"
    return Page(f"{short(name, 80)}, to be shrunk", kind, lead, sections, "plan.json and journal.jsonl", note)


DENSE = "On this page the dense model is the one that was shrunk, as it was before; the new one is dense too."


def removed_words(report: Report) -> str:
    """What was removed, and what became of the matrices around it."""
    plan, parameters = report["plan"], report["parameters"]
    said = [
        f"Of {parameters['blocks_before']:,} parameters of its blocks {percent(removed_share(parameters))} were "
        f"removed; {parameters['blocks_after']:,} are left."
    ]
    if left := what_is_left(report["config"]):
        said.append(f"It has {listing(left)}.")
    if report["matrices"]:
        anew = "was solved anew by least squares" if plan.get("compensate") else "kept its other weights as they were"
        said.append(f"{short(plan['criterion'], 40)} chose what went; each matrix after a cut {anew}.")
    return " ".join(said)


def _gain(records: Records) -> list[str]:
    said = []
    (before, after), _ = quality.perplexities(records)
    if before and after:
        said.append(
            f"Perplexity went from {number(before.get('perplexity'))} to {number(after.get('perplexity'))} on "
            f"{short(after['text'], 60)}."
        )
    said.append(f"The checkpoint takes {size(records.report['bytes']['output'])}.")
    return said


def _cards(records: Records, name: str) -> list[Card]:
    report, finished = records.report, records.kind == "shrunk"
    cards = [quality.perplexity_card(records, name)] if finished or report.get("evaluation") else []
    if finished:
        cards += [_parameters_card(report["parameters"]), _bytes_card(report), *speed.speed_cards(records, name)]
        cards += [quality.fidelity_card(records, name), quality.tasks_card(records, name)]
        cards.append(time_card("Time to shrink", report, report["seconds"]["shrinking"]))
    else:
        cards.append(Card("Blocks finished", progress_words(records), "as the journal says"))
        spent = sum(line["seconds"] for line in (*report["steps"], *report["blocks"]))
        cards.append(time_card("Time so far", report, spent))
    return cards


def _parameters_card(parameters: Mapping[str, Any]) -> Card:
    blocks, total = (percent(removed_share(parameters, of), 1) for of in ("blocks_", ""))
    note = f"{parameters['before']:,} → {parameters['after']:,}; {total} of all that there were"
    return Card("Parameters of blocks", f"{blocks} removed", note)


def _bytes_card(report: Report) -> Card:
    """The checkpoint's size, beside that of the whole model with as many bytes for each parameter."""
    output, parameters = report["bytes"]["output"], report["parameters"]
    times = ratio(parameters["before"], parameters["after"])
    if not times:
        return Card("Checkpoint", size(output))
    return Card("Checkpoint", f"{size(output * times)} → {size(output)}", f"×{1 / times:.2f}; both in its dtype")


def removed_section(report: Report) -> Section:
    """What the config says now, how many parameters went, and what was tried out before."""
    text, tables, pictures = [], list[Table](), list[Picture]()
    if config := report.get("config"):
        rows = [[Cell(name), *(_value(value) for value in pair)] for name, pair in config.items()]
        tables.append(Table("What its config.json says", ["", "Before", "After"], rows))
    if parameters := report.get("parameters"):
        rows = [
            [
                Cell(what),
                *(exact(parameters[f"{of}{when}"]) for when in ("before", "after")),
                share(removed_share(parameters, of)),
            ]
            for what, of in (("All", ""), ("Of blocks", "blocks_"))
        ]
        tables.append(Table("Parameters", ["", "Before", "After", "Removed"], rows))
        if report["plan"].get("target") is not None:
            asked = percent(report["plan"]["target"], 1)
            text.append(f"To be removed were {asked} of the blocks' parameters, as nearly as whole parts allow.")
    if removed := report.get("removed_layers"):
        text.append(
            f"{counted(len(removed), 'block')} removed, {chosen_blocks(report['plan'])}: "
            f"{listing(map(str, removed))} as the whole model counts them."
        )
    for step in report["steps"]:
        if show := STEPS.get(step["step"]):
            found = show(step, report)
            tables, pictures = tables + found[0], pictures + found[1]
    return Section("removed", "What was removed", text=text, tables=tables, pictures=pictures)


def _value(value: Any) -> Cell:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return exact(value)
    return Cell("not said" if value is None else listing(map(str, value)) if isinstance(value, list) else str(value))


Shown = tuple[list[Table], list[Picture]]


def _split(step: Report, report: Report) -> Shown:
    """The ways to take a target from heads and neurons."""
    tried = step.get("kl") or {}
    least = min((value for value in tried.values() if value is not None), default=None)
    rows = [
        [Cell(way), plain(value), Cell("taken" if value is not None and value == least else "")]
        for way, value in tried.items()
    ]
    caption = f"Ways to take {percent(report['plan'].get('target'), 1)} of the parameters, tried out on a few rows"
    return [Table(caption, ["Way", "KL, nats per token", ""], rows)] if rows else [], []


def _layers(step: Report, report: Report) -> Shown:
    """What the model would be without each block."""
    if report["plan"]["depth"] == "influence":
        found = _numbered(enumerate(step.get("influence") or ()))
        what, id, axis = "Influence of each block", "influence", Axis("1 − cosine of its input and output")
        says = "The influence"
    else:  # of random choices there is nothing to tell
        tried = ((re.search(r"\d+", key), value) for key, value in (step.get("tried") or {}).items())
        found = _numbered((int(number[0]), value) for number, value in tried if number)
        what, id, axis = "Without each block, the last time that one was chosen", "without", Axis("KL, nats per token")
        says = "The distance from the whole model's predictions"
    if not found:
        return [], []
    return [], [of_blocks(id, what, course(found, says), f"{what}: {axis.title}", found, axis, bars=True)]


def _numbered(pairs: Any) -> dict[int, float]:
    return {number: value for number, value in pairs if value is not None}


def _experts(step: Report, report: Report) -> Shown:
    """Which experts each block kept, and what the others gave to their tokens."""
    rows = []
    for block, (kept, salience) in enumerate(zip(step.get("kept") or (), step.get("salience") or (), strict=False)):
        if kept is None or salience is None:
            continue
        gone = [index for index in range(len(salience)) if index not in kept]
        weakest = min((salience[index] for index in kept if index < len(salience)), key=_or_zero, default=None)
        strongest = max((salience[index] for index in gone), key=_or_zero, default=None)
        rows.append([Cell(str(block)), Cell(listing(map(str, gone))), plain(strongest), plain(weakest)])
    head = ["Block", "Experts removed", "Most that one of them gave", "Least that one kept gives"]
    caption = "Experts: the mean of gate times norm of output, over the tokens routed to each"
    return [Table(caption, head, rows)] if rows else [], []


def _or_zero(value: float | None) -> float:
    return value or 0.0


STEPS: dict[str, Callable[[Report, Report], Shown]] = {"split": _split, "layers": _layers, "experts": _experts}


def cut_section(report: Report) -> Section:
    """What each cut did to its matrix and block, and where the time went."""
    matrices, blocks, plan, text = report["matrices"], report["blocks"], report["plan"], []
    if matrices:
        text.append("The matrices are those that read what was cut; blocks are numbered as in the new model.")
    pictures: list[Picture] = []
    if cells := by_kind(matrices, "output_error"):
        pictures.append(_errors(cells))
    elif matrices:
        text.append(
            f"Their output errors are not known: {short(plan['criterion'], 40)} without compensation takes no Gram "
            "matrix, from which they are computed."
        )
    if blocks and all(block.get("output_error") is None for block in blocks):
        text.append(f"Output errors of blocks are not measured with propagate {short(plan['propagate'], 40)}.")
    pictures += pictures_by_block(blocks)
    return Section("blocks", "Blocks and matrices", text=text, pictures=pictures, tables=_steps_tables(report["steps"]))


def _errors(cells: Mapping[tuple[str, int], float]) -> Picture:
    """Of one kind of matrix a line, of several a map."""
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    if len(kinds) > 1:
        return errors_by_kind(cells)
    values = {block: value for (_, block), value in cells.items()}
    title = f"Output error of {short(kinds[0], 40)}"
    return of_blocks("errors", title, course(values, "The output error"), ERROR.title, values, ERROR)


SPENT = {
    "split": "Trying out heads and neurons",
    "layers": "Choosing the last block that went",
    "experts": "Observing experts",
}


def _steps_tables(steps: Sequence[Report]) -> list[Table]:
    rows = [[Cell(str(SPENT.get(step["step"], step["step"]))), seconds(step["seconds"])] for step in steps]
    return [Table("Time before the first block", ["Step", "Time"], rows)] if rows else []
