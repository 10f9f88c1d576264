"""Bytes, memory and tokens per second on a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..words import arrangement_words, size
from .parts import Card, Cell, Table, bytes_, plain, words
from .quality import latest
from .records import Records
from .wording import digits, measuring, ratio, short

Bench = Mapping[str, Any]


def bench_of(records: Records) -> Bench | None:
    """The last recorded measurement of speed."""
    return latest(records, "bench").get("bench")


def conditions(bench: Bench) -> str:
    """On what speeds were measured."""
    return (
        f"{short(bench['processor'])}, {bench['threads']} threads, {bench['prompt']} tokens of prompt and "
        f"{bench['tokens']} new, median of {bench['rounds']} rounds"
    )


def speed_cards(records: Records, dense: str) -> list[Card]:
    """Resident memory and decoding speed, beside those of what the model was compared with."""
    bench = bench_of(records)
    titles = ("Resident memory", "Decoding, tokens per second")
    if not bench or not bench["models"]:
        return [Card(title, "", missing=measuring("bench", records.name, "--against", dense)) for title in titles]
    models = list(reversed(bench["models"][:2]))
    against = f"{short(models[0]['name'], 30)} → {short(models[1]['name'], 30)}" if len(models) == 2 else ""
    memory = [model.get("resident_bytes") for model in models]
    batch = min((s["batch"] for s in bench["models"][0]["speeds"]), default=1)
    speeds = [median(model, "decode", batch) for model in models]
    return [
        _card(titles[0], memory, size, against),
        _card(titles[1], speeds, digits, f"batch {batch}; {conditions(bench)}"),
    ]


def _card(title: str, values: list[Any], form: Any, note: str) -> Card:
    times = ratio(values[-1], values[0]) if len(values) == 2 else None
    said = " → ".join("not measured" if value is None else form(value) for value in values)
    return Card(title, said, "; ".join(filter(None, [f"×{times:.2f}" if times else "", note])))


def median(model: Mapping[str, Any], what: str, batch: int) -> float | None:
    """Tokens per second at one batch size; None if that was not measured."""
    return next((speed[what]["median"] for speed in model["speeds"] if speed["batch"] == batch), None)


def speed_tables(records: Records) -> list[Table]:
    """Everything that the last measurement of speed found."""
    bench = bench_of(records)
    if not bench or not bench["models"]:
        return []
    models = bench["models"]
    rows = [_row(title, [bytes_(m.get(key)) for m in models]) for title, key in SIZES]
    for batch in dict.fromkeys(speed["batch"] for model in models for speed in model["speeds"]):
        for what in ("prefill", "decode"):
            rows.append(_row(f"{what.title()}, batch {batch}, tokens/s", [_speed(m, what, batch) for m in models]))
    head = ["", *(f"{model['name']} ({model['dtype']})" for model in models), *(["Ratio"] if len(models) == 2 else [])]
    found = [Table(f"Size and speed, from the slowest to the fastest round: {conditions(bench)}", head, rows)]
    said = [words(model["name"], arrangement_words(model["arrangement"])) for model in models if _arranged(model)]
    said += [words(f"{m['name']}, {d}", f"not measured: {why}") for m in models for d, why in _untimed(m)]
    return found + ([Table("How the matrices run on that machine", ["Model", ""], said)] if said else [])


SIZES = (("Bytes on disk", "bytes"), ("Resident memory", "resident_bytes"))


def _arranged(model: Mapping[str, Any]) -> bool:
    arranged = model.get("arrangement")
    return arranged is not None and {"kernels", "activations8"} <= arranged.keys()


def _untimed(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    return list((model.get("not_measured") or {}).items())


def _row(title: str, cells: list[Cell]) -> list[Cell]:
    times = [plain(ratio(cells[0].value, cells[1].value))] if len(cells) == 2 else []
    return [Cell(title), *cells, *times]


def _speed(model: Mapping[str, Any], what: str, batch: int) -> Cell:
    speed = next((s[what] for s in model["speeds"] if s["batch"] == batch), None)
    if speed is None:
        return Cell("not measured")
    return Cell(
        f"{digits(speed['median'])} ({digits(speed['slowest'])} to {digits(speed['fastest'])})", speed["median"]
    )
