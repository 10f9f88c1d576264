"""The page of one model: pruned, packed, or on its way."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..commands import making_command
from ..words import duration, number, packed_words, size
from . import quality, speed
from .charts import Axis, by_block_chart, heat_map
from .parts import Card, Cell, Page, Picture, Section, Table, by_block, bytes_, exact, plain, share
from .records import Records
from .wording import counted, course, digits, listing, percent, ratio, short

Report = Mapping[str, Any]


def model_page(records: Records) -> Page:
    """Put together the page of one model."""
    plan = records.report["plan"]
    run = _pruning(records)
    dense = (run["plan"] if run else plan)["model"]["name"]
    sections = [
        Section("summary", "In short", cards=_cards(records, run, dense)),
        Section(
            "quality",
            "Quality",
            tables=quality.perplexity_table(records),
            pictures=quality.tasks_picture(records) + quality.fidelity_picture(records),
        ),
        _blocks(run) if run else Section("blocks", "Blocks and matrices"),
        Section("size", "Size and speed", tables=_bytes_tables(records.report) + speed.speed_tables(records)),
        Section("generations", "What it writes", samples=quality.samples(records, dense)),
        quality.history(records),
        _reproduce(records, run),
    ]
    files = "plan.json and journal.jsonl" if records.kind == "unfinished" else "secateur.json and evaluations.jsonl"
    return Page(_title(records), _kind(records), _lead(records, run), sections, files, _note(records))


def _pruning(records: Records) -> Report | None:
    """The report of the pruning: this one, or that of the model that was packed."""
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


def _lead(records: Records, run: Report | None) -> str:
    """A few sentences that say what was done, what it cost and what it gained."""
    said = []
    plan = records.report["plan"]
    if records.kind == "unfinished":
        whole = f" of {records.blocks}" if records.blocks else ""
        verb = "packed" if plan.get("command") == "pack" else "pruned"
        return f"Blocks {verb} so far: {len(records.report['blocks'])}{whole}."
    if run:
        said.append(
            f"Of {run['weights']:,} weights in the selected matrices, {run['zeros']:,} ({percent(run['sparsity'])}) "
            f"are zero; {short(run['plan']['method'], 60)} chose them, pattern {short(run['plan']['pattern'], 40)}."
        )
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
        whole = f" of {records.blocks}" if records.blocks else ""
        cards.append(Card("Blocks finished", f"{len(records.report['blocks'])}{whole}", "as the journal says"))
    cards += [card for card in (_bytes_card(records.report),) if card]
    if finished:
        cards += speed.speed_cards(records, dense)
        cards += [quality.fidelity_card(records, dense), quality.tasks_card(records, dense)]
    if run and run["blocks"]:
        spent = run["seconds"]["pruning"] if "seconds" in run else sum(block["seconds"] for block in run["blocks"])
        memory = f"peak memory {size(run['peak_memory_bytes'])}; " if run.get("peak_memory_bytes") else ""
        place = f"{counted(run['plan']['threads'], 'thread')}, {run['plan'].get('device') or 'cpu'}"
        cards.append(Card("Time to prune", duration(spent), memory + place))
    return cards


def _bytes_card(report: Report) -> Card | None:
    sizes = report.get("bytes")
    if not sizes:
        return None
    before = sizes.get("source", sizes.get("dense_16_bit"))
    times = ratio(sizes["output"], before)
    notes = [f"×{times:.2f}" if times else ""]
    if "dense_16_bit" in sizes:
        notes.append("from 16-bit dense")
    packed = report.get("packed")
    notes.append(packed_words(packed) if packed and packed["dense"] else "zeros are stored" if not packed else "")
    return Card("Checkpoint", f"{size(before)} → {size(sizes['output'])}", "; ".join(filter(None, notes)))


def _bytes_tables(report: Report) -> list[Table]:
    sizes, packed = report.get("bytes"), report.get("packed")
    if not sizes:
        return []
    names = {
        "source": "Checkpoint before",
        "source_files": "The source's files",
        "dense_16_bit": "Dense in 16 bits",
        "output": "Checkpoint after",
    }
    rows = [[Cell(names[key]), bytes_(sizes[key]), exact(sizes[key])] for key in names if key in sizes]
    for key, name in (("dense", "dense"), ("predicted", "packed, by the formula"), ("true", "packed")):
        if packed:
            what = counted(packed["matrices"], "packed matrix", "packed matrices")
            rows.append([Cell(f"{what}, {name}"), bytes_(packed[key]), exact(packed[key])])
    return [Table("Bytes on disk", ["", "Size", "Bytes"], rows)]


def kind_of(matrix: Mapping[str, Any]) -> str:
    """What matrices of all blocks have in common in their names: experts count as one.

    >>> kind_of({"name": "model.layers.3.mlp.experts.gate_up_proj[7]", "block": 3})
    'mlp.experts.gate_up_proj'
    """
    name = re.sub(r"\[\d+\]$", "", str(matrix["name"]).split(f".{matrix['block']}.", 1)[-1])
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def by_kind(matrices: Sequence[Mapping[str, Any]], key: str) -> dict[tuple[str, int], float]:
    """The mean of a number for each kind of matrix and block, weighted by the matrices' weights."""
    found: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for matrix in matrices:
        if matrix.get(key) is not None and (weights := math.prod(matrix["shape"])):
            found.setdefault((kind_of(matrix), matrix["block"]), []).append((weights, matrix[key]))
    return {place: values[0][1] if len(values) == 1 else _mean(values) for place, values in found.items()}


def _mean(values: Sequence[tuple[int, float]]) -> float:
    return math.fsum(weight * value for weight, value in values) / sum(weight for weight, _ in values)


def _blocks(run: Report) -> Section:
    """Where the zeros and the errors are, and where the time went."""
    pictures = []
    matrices = run["matrices"]
    if cells := by_kind(matrices, "sparsity"):
        says = _extremes(cells, "Sparsity", percent)
        axis = Axis("Sparsity, zeros / weights", percent=True)
        pictures.append(_heat("sparsity", "Sparsity of each kind of matrix", says, cells, axis, share))
    if cells := by_kind(matrices, "output_error"):
        says = _extremes(cells, "Output error")
        axis = Axis("Output error, |Y − Y′| / |Y|")
        pictures.append(_heat("errors", "Output error of each kind of matrix", says, cells, axis, plain))
    errors = {block["block"]: block["output_error"] for block in run["blocks"] if block.get("output_error") is not None}
    if errors:
        says = course(errors, "The output error")
        axis = Axis("Output error of the block, |Y − Y′| / |Y|")
        svg = by_block_chart("block-errors", "Output error of each block", says, errors, axis)
        table = by_block("Output errors", [axis.title], ((block, [plain(value)]) for block, value in errors.items()))
        pictures.append(Picture("block-errors", "Output error of each block", says, svg, table))
    if spent := {block["block"]: block["seconds"] for block in run["blocks"] if "seconds" in block}:
        says = course(spent, "Time", lambda value: f"{digits(value)} s")
        svg = by_block_chart("times", "Time for each block", says, spent, Axis("Seconds"), bars=True)
        table = by_block(
            "Time for each block", ["Seconds"], ((block, [plain(value)]) for block, value in spent.items())
        )
        pictures.append(Picture("times", "Time for each block", says, svg, table))
    return Section("blocks", "Blocks and matrices", text=_words_on_blocks(run), pictures=pictures)


def _words_on_blocks(run: Report) -> list[str]:
    text = []
    if run["matrices"] and all(matrix.get("output_error") is None for matrix in run["matrices"]):
        text.append(
            f"Output errors are known by block only: {short(run['plan']['method'], 60)} takes no Gram matrix, from "
            "which those of single matrices are computed."
        )
    if run["blocks"] and all(block.get("output_error") is None for block in run["blocks"]):
        text.append(f"Output errors of blocks are not measured with propagate {short(run['plan']['propagate'], 40)}.")
    for key, what in (("dense_matrices", "left dense as asked"), ("left_out", "left dense, their inputs unseen")):
        if names := run.get(key):
            more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
            text.append(
                f"{counted(len(names), 'matrix', 'matrices').capitalize()} {what}: {', '.join(names[:5])}{more}."
            )
    return text


def _extremes(cells: Mapping[tuple[str, int], float], what: str, form: Any = None) -> str:
    form = form or (lambda value: plain(value).text)
    low, high = min(cells, key=lambda place: cells[place]), max(cells, key=lambda place: cells[place])
    kinds, blocks = len({kind for kind, _ in cells}), len({block for _, block in cells})
    size_ = f"{counted(kinds, 'kind')} of matrices in {counted(blocks, 'block')}"
    if form(cells[low]) == form(cells[high]):
        return f"{what} of {size_}: {form(cells[low])} everywhere."
    return (
        f"{what} of {size_}: from {form(cells[low])} ({low[0]}, block {low[1]}) to {form(cells[high])} "
        f"({high[0]}, block {high[1]})."
    )


def _heat(id: str, title: str, says: str, cells: Mapping[tuple[str, int], float], axis: Axis, form: Any) -> Picture:
    kinds, blocks = list(dict.fromkeys(kind for kind, _ in cells)), sorted({block for _, block in cells})
    rows = ((block, [form(cells.get((kind, block))) for kind in kinds]) for block in blocks)
    return Picture(id, title, says, heat_map(id, title, says, cells, axis), by_block(axis.title, kinds, rows))


def _reproduce(records: Records, run: Report | None) -> Section:
    """Everything that is needed to do it again."""
    plan = records.report["plan"]
    packing = "command" in plan and run is not None
    makers = [("The command that packed it" if packing else "The command", making_command(plan, records.name))]
    plans = [plan]
    if run and run["plan"] is not plan:
        makers.insert(0, ("The command that pruned it", making_command(run["plan"], plan["model"]["name"])))
        plans.insert(0, run["plan"])
    code = [(what, line or "# pruned from Python, with what no command line can name") for what, line in makers]
    for one in plans:
        if one.get("allocation", "uniform") != "uniform":
            code.append(("allocation.yaml", json.dumps(one["allocation"], indent=1, ensure_ascii=False)))
    facts = [fact for one in plans for fact in _facts(one)]
    if bench := speed.bench_of(records):
        facts.append(("Speeds measured on", f"{bench['processor']}, {counted(bench['threads'], 'thread')}"))
    return Section("reproduce", "To do it again", code=code, facts=list(dict.fromkeys(facts)))


def _facts(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    model, calibration, facts = plan["model"], plan.get("calibration"), []
    facts.append(("Model", model["name"]))
    facts.append(("Digest of the model (SHA-256)", model.get("digest") or "none: the model was in memory"))
    if calibration:
        facts.append(
            (
                "Calibration",
                f"{calibration['samples']} sequences of {calibration['seqlen']} tokens, {calibration['tokens']:,} in "
                f"all, of {calibration['source']}; seed {calibration['seed']}",
            )
        )
        facts.append(("Digest of the calibration tokens", calibration.get("digest") or "none"))
    elif "method" in plan:
        facts.append(("Calibration", "none: the method needs none"))
    if "threads" in plan:
        facts.append(("Computed with", f"{counted(plan['threads'], 'thread')}, {plan.get('device') or 'cpu'}"))
    if plan.get("micro_batch_tokens"):
        facts.append(("Tokens at once", f"{plan['micro_batch_tokens']:,}"))
    software = plan.get("software") or {}
    facts.append(("Software", listing(f"{name} {version}" for name, version in software.items()) or "not recorded"))
    return facts
