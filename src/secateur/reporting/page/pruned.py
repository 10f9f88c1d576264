"""The page of one model: pruned, packed, or on its way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..removed import is_shrunk
from ..trained import first_model, is_trained
from ..words import number, size
from . import quality, speed
from .blocks import pruned_blocks
from .cards import bytes_card, bytes_tables, progress_words, time_card
from .making import reproduce
from .parts import Card, Page, Section
from .records import Records
from .shrunk import cut_section, removed_section, removed_words
from .trained import matrices_section, trained_words, training_section
from .wording import counted, percent, ratio, short

Report = Mapping[str, Any]


def model_page(records: Records) -> Page:
    """Put together the page of one model."""
    maker = _maker(records)
    run = None if is_shrunk(maker) or is_trained(maker) else maker
    dense = first_model(records.report)
    sections = [
        Section("summary", "In short", cards=_cards(records, run, dense)),
        Section(
            "quality",
            "Quality",
            tables=quality.perplexity_table(records),
            pictures=quality.tasks_picture(records) + quality.fidelity_picture(records),
        ),
        *_made(maker),
        Section("size", "Size and speed", tables=bytes_tables(records.report) + speed.speed_tables(records)),
        Section("generations", "What it writes", samples=quality.samples(records, dense)),
        quality.history(records),
        reproduce(records),
    ]
    files = "plan.json and journal.jsonl" if records.kind == "unfinished" else "secateur.json and evaluations.jsonl"
    return Page(_title(records), _kind(records), _lead(records, maker, run), sections, files, _note(records))


def _made(maker: Report | None) -> list[Section]:
    """What was done to a model, by what did it."""
    if maker is None:
        return []
    if is_shrunk(maker):
        return [removed_section(maker), cut_section(maker)]
    return [training_section(maker), matrices_section(maker)] if is_trained(maker) else [pruned_blocks(maker)]


def _maker(records: Records) -> Report | None:
    """The report of what made the model: this one, or that of the model that was packed."""
    if records.kind == "packed" or "command" in records.report["plan"]:
        return records.report.get("pruned")
    return records.report


def _kind(records: Records) -> str:
    command = records.report["plan"].get("command", "prune")
    kind = {"pack": "Packed model", "unpack": "Unpacked model"}.get(command, "Pruned model")
    return f"{kind}, unfinished" if records.kind == "unfinished" else kind


def _title(records: Records) -> str:
    plan = records.report["plan"]
    name = short(plan["model"]["name"], 80)
    if command := plan.get("command"):
        values = f", values {plan['values']}" if plan.get("values") else ""
        return f"{name}, {command}ed{' as ' + plan['format'] if plan.get('format') else ''}{values}"
    reached = records.report.get("sparsity", plan["sparsity"])
    return f"{name}, {percent(reached, 0)} removed by {short(plan['method'], 60)}"


def _lead(records: Records, maker: Report | None, run: Report | None) -> str:
    """A few sentences that say what was done, what it cost and what it gained."""
    said = []
    plan = records.report["plan"]
    if records.kind == "unfinished":
        verb = "packed" if plan.get("command") == "pack" else "pruned"
        return f"Blocks {verb} so far: {progress_words(records)}."
    if run:
        said.append(
            f"Of {run['weights']:,} weights in the selected matrices, {run['zeros']:,} ({percent(run['sparsity'])}) "
            f"are zero; {short(run['plan']['method'], 60)} chose them, pattern {short(run['plan']['pattern'], 40)}."
        )
    elif maker:
        said.append(removed_words(maker) if is_shrunk(maker) else trained_words(maker))
    (before, after), of = quality.perplexities(records)
    if before and after:
        said.append(
            f"Perplexity went from {number(before.get('perplexity'))} to {number(after.get('perplexity'))} on "
            f"{short(after['text'], 60)}{f' ({of})' if of else ''}."
        )
    sizes = records.report.get("bytes") or {}
    if "output" in sizes:
        old = sizes.get("source", sizes.get("dense_16_bit"))
        what = (
            "what was packed" if "source" in sizes and plan.get("command") == "pack" else "the dense model in 16 bits"
        )
        what = "what was unpacked" if plan.get("command") == "unpack" else what
        times = ratio(sizes["output"], old)
        said.append(f"The checkpoint takes {size(sizes['output'])}" + (f", {times:.2f} of {what}." if times else "."))
    return " ".join(said)


def _note(records: Records) -> str:
    if records.kind == "unfinished":
        return "This run is not finished: what follows is what its journal says. The same command goes on from there."
    plan = records.report["plan"]
    if records.kind == "packed" and plan.get("values") and not quality.latest(records, "text"):
        return "Packing rounded the values to 8 bits, and the quality after that was not measured."
    return ""


def _cards(records: Records, run: Report | None, dense: str) -> list[Card]:
    finished = records.kind != "unfinished"
    cards = [quality.perplexity_card(records, dense)] if finished or (run and run.get("evaluation")) else []
    if run and finished:
        note = (
            f"{run['zeros']:,} of {run['weights']:,} weights in {counted(len(run['matrices']), 'matrix', 'matrices')}"
        )
        cards.append(Card("Sparsity", percent(run["sparsity"]), f"{note}; pattern {short(run['plan']['pattern'], 40)}"))
    if not finished:
        cards.append(Card("Blocks finished", progress_words(records), "as the journal says"))
    cards += [card for card in (bytes_card(records.report),) if card]
    if finished:
        cards += speed.speed_cards(records, dense)
        cards += [quality.fidelity_card(records, dense), quality.tasks_card(records, dense)]
    if run and run["blocks"]:
        spent = run["seconds"]["pruning"] if "seconds" in run else sum(block["seconds"] for block in run["blocks"])
        cards.append(time_card("Time to prune", run, spent))
    return cards
