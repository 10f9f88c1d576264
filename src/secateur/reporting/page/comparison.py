"""The page of a comparison: many ways to prune one model, or several, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..words import SHRUNKEN, is_shrunken, number, windows
from .parts import Card, Cell, Page, Sample, Section, Table, bytes_, numeric, plain, seconds, share, words
from .plots import pictures_of, scaling_pictures
from .quality import perplexity, version
from .records import Records
from .rows import Group, Row, decode_speed, groups_of, is_dense, label, perplexity_of, setting
from .speed import conditions
from .wording import counted, digits, listing, percent, points, short


def comparison_page(records: Records) -> Page:
    """Put together the page of one or several comparisons."""
    rows = [row for document in records.comparisons for row in document["rows"]]
    groups = groups_of(rows)
    models = list(dict.fromkeys(row["model"] for row in rows))
    failed = [row for row in rows if row.get("error")]
    sections = [
        Section("summary", "In short", cards=_cards(groups), tables=[_best(groups)] if len(groups) > 1 else []),
        Section("pictures", "Quality, size and speed", text=_warnings(groups), pictures=pictures_of(groups)),
        Section("scaling", "From model to model", pictures=scaling_pictures(groups) if len(models) > 1 else []),
        Section("rows", "Every row", tables=[_table(group) for group in groups]),
        Section("failed", "What failed", tables=[_failures(failed)] if failed else []),
        Section("generations", "What they write", samples=_samples(rows)),
        _reproduce(records.comparisons, rows),
    ]
    names = [short(model, 60) for model in models]
    title = (
        f"Comparison of {listing(names)}" if 0 < len(names) <= 3 else f"Comparison of {counted(len(names), 'model')}"
    )
    planned = sum(document.get("planned") or len(document["rows"]) for document in records.comparisons)
    note = (
        f"Unfinished: {len(rows)} of {planned} rows; the command below goes on with it." if len(rows) < planned else ""
    )
    return Page(title, "Comparison", _lead(rows, groups, failed), sections, "comparison.json", note)


def _lead(rows: Sequence[Row], groups: Sequence[Group], failed: Sequence[Row]) -> str:
    if not rows:
        return "The comparison holds no rows."
    pruned = [row for row in rows if not is_dense(row)]
    said = [f"{counted(len(pruned), 'way')} of pruning, {counted(len({row['model'] for row in rows}), 'model')}."]
    for group in groups:
        best = _best_of(group)
        if group.dense and best and len(groups) == 1:
            reached = listing(f"{number(perplexity_of(row))} at {percent(at, 0)} ({setting(row)})" for at, row in best)
            dense = number(perplexity_of(group.dense))
            said.append(f"{short(group.model, 60)}: perplexity {dense} before pruning; lowest after it {reached}.")
    if failed:
        said.append(f"{counted(len(failed), 'row')} failed.")
    return " ".join(said)


def _best_of(group: Group) -> list[tuple[float, Row]]:
    """The row of lowest perplexity at each sparsity that was asked for."""
    best: dict[float, Row] = {}
    for row in group.rows:
        found, target = perplexity_of(row), row.get("target")
        if not is_dense(row) and found is not None and target is not None:
            former = perplexity_of(best[target]) if target in best else None
            if former is None or found < former:
                best[target] = row
    return sorted(best.items(), key=lambda item: item[0])


def _cards(groups: Sequence[Group]) -> list[Card]:
    if len(groups) != 1:
        return []
    [group] = groups
    cards = []
    if group.dense and group.conditions:
        cards.append(Card("Perplexity, dense", number(perplexity_of(group.dense)), windows(group.dense["evaluation"])))
    for at, row in _best_of(group):
        times = row.get("perplexity_ratio")
        note = f"{setting(row)}{f'; ×{digits(times)} of dense' if times is not None else ''}"
        cards.append(Card(f"Best at {percent(at, 0)}", number(perplexity_of(row)), note))
    return cards


def _best(groups: Sequence[Group]) -> Table:
    rows = [
        [
            Cell(short(group.model)),
            share(at),
            Cell(setting(row)),
            perplexity(perplexity_of(row)),
            plain(row.get("perplexity_ratio")),
            plain(row.get("loss_increase")),
        ]
        for group in groups
        for at, row in _best_of(group)
    ]
    head = ["Model", "Sparsity asked for", "Lowest perplexity by", "Perplexity", "× dense", "Loss increase, nats"]
    return Table("The best at each sparsity", head, rows)


def _warnings(groups: Sequence[Group]) -> list[str]:
    """What must be known to read the pictures."""
    text = []
    conditions_ = {group.conditions for group in groups if group.conditions}
    if len(conditions_) > 1:
        text.append("Perplexities of different texts or windows cannot be compared; each has pictures of its own.")
    if any(is_shrunken(row) for group in groups for row in group.rows):
        text.append(SHRUNKEN)
    missing = [row for group in groups for row in group.rows if measured(row) and perplexity_of(row) is None]
    if missing:
        text.append(
            f"Beyond measure and so in no picture of perplexity: {listing(label(row, groups) for row in missing[:8])}"
            + (f" and {len(missing) - 8} more." if len(missing) > 8 else ".")
        )
    if len({conditions(row["bench"]) for group in groups for row in group.rows if row.get("bench")}) > 1:
        text.append("Speeds were measured under different conditions, which the last section lists.")
    return text


def measured(row: Row) -> bool:
    """Whether a row got as far as an evaluation."""
    return row.get("evaluation") is not None


Column = tuple[str, Callable[[Row], Cell]]


def _nested(*keys: str) -> Callable[[Row], Any]:
    def get(row: Row) -> Any:
        found: Any = row
        for key in keys:
            found = (found or {}).get(key)
        return found

    return get


def _perplexity_cell(row: Row) -> Cell:
    found = perplexity_of(row)
    return Cell("beyond measure") if measured(row) and found is None else perplexity(found)


def _speed_cell(row: Row) -> Cell:
    found = decode_speed(row)
    return plain(found["median"] if found else None)


def _of(form: Callable[[float | None], Cell], *keys: str) -> Callable[[Row], Cell]:
    get = _nested(*keys)
    return lambda row: form(get(row))


COLUMNS: tuple[Column, ...] = (
    ("Sparsity", _of(share, "sparsity")),
    ("Perplexity", _perplexity_cell),
    ("× dense", _of(plain, "perplexity_ratio")),
    ("Perplexity increase", _of(plain, "perplexity_increase")),
    ("Loss increase, nats", _of(plain, "loss_increase")),
    ("KL to dense, nats", _of(plain, "evaluation", "fidelity", "kl")),
    ("Same likeliest token", _of(share, "evaluation", "fidelity", "top1")),
    ("Task mean", _of(share, "tasks", "mean")),
    ("Change of it", _of(numeric(points), "task_mean_change")),
    ("Bytes", _of(bytes_, "bytes")),
    ("Bytes, × dense", _of(plain, "bytes_ratio")),
    ("Decoding, tokens/s", _speed_cell),
    ("Decoding, × dense", _of(plain, "decode_ratio")),
    ("Resident, × dense", _of(plain, "resident_ratio")),
    ("Time to prune", _of(seconds, "seconds")),
    ("Peak memory", _of(bytes_, "peak_memory_bytes")),
    ("Format", lambda row: Cell(row.get("format") or "")),
    ("", lambda row: Cell("failed" if row.get("error") else "")),
)


def _table(group: Group) -> Table:
    """All rows of a group; columns that no row fills are left out."""
    columns = [(head, cell) for head, cell in COLUMNS if any(cell(row).text for row in group.rows)]
    rows = [[Cell(setting(row, with_target=True)), *(cell(row) for _, cell in columns)] for row in group.rows]
    where = f": {group.conditions}" if group.conditions else ""
    return Table(f"{group.model}{where}", ["Method, pattern", *(head for head, _ in columns)], rows)


def _failures(rows: Iterable[Row]) -> Table:
    found = [words(row["model"], setting(row, with_target=True), row["error"]) for row in rows]
    return Table("Rows that failed, and why", ["Model", "Method, pattern", "Error"], found)


def _samples(rows: Sequence[Row]) -> list[Sample]:
    """After each prompt, what every row writes."""
    models = len({row["model"] for row in rows})
    found: dict[str, list[tuple[str, str, str]]] = {}
    for row in rows:
        name = f"{short(row['model'], 40)}: {setting(row, with_target=True)}" if models > 1 else setting(row, True)
        for one in row.get("generations") or ():
            found.setdefault(one["prompt"], []).append(version(name, one))
    return [Sample(prompt, versions) for prompt, versions in found.items()]


def _reproduce(documents: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> Section:
    code, facts = [], []
    for number_, document in enumerate(documents, 1):
        which = f" {number_}" if len(documents) > 1 else ""
        if document.get("command"):
            code.append((f"The command{which}", document["command"]))
        software = document.get("software") or {}
        machine = ", ".join(filter(None, [document.get("processor"), _threads(document)]))
        versions = listing(f"{name} {version_}" for name, version_ in software.items())
        facts += [(f"Machine{which}", machine), (f"Software{which}", versions)]
        facts.append((f"Date{which}", str(document.get("date") or "")))
    for row in rows:
        if calibration := row.get("calibration"):
            said = f"{calibration['samples']} sequences of {calibration['seqlen']} tokens of {calibration['source']}"
            seed = f"seed {calibration['seed']}, digest {calibration.get('digest') or 'none'}"
            facts.append(("Calibration", f"{said}, {calibration['tokens']:,} tokens in all; {seed}"))
        if bench := row.get("bench"):
            facts.append(("Speeds", conditions(bench)))
    return Section("reproduce", "To do it again", code=code, facts=[f for f in dict.fromkeys(facts) if f[1]])


def _threads(document: Mapping[str, Any]) -> str:
    return counted(document["threads"], "thread") if document.get("threads") is not None else ""
