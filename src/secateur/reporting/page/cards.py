"""Figures and tables that pages of all kinds of models show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..words import duration, packed_words, size
from .parts import Card, Cell, Table, bytes_, exact
from .records import Records
from .wording import counted, ratio

Report = Mapping[str, Any]


def progress_words(records: Records) -> str:
    """How many blocks of an unfinished run are done."""
    whole = f" of {records.blocks}" if records.blocks else ""
    return f"{len(records.report['blocks'])}{whole}"


def time_card(title: str, run: Report, spent: float) -> Card:
    """How long it took, and with what."""
    memory = f"peak memory {size(run['peak_memory_bytes'])}; " if run.get("peak_memory_bytes") else ""
    place = f"{counted(run['plan']['threads'], 'thread')}, {run['plan'].get('device') or 'cpu'}"
    return Card(title, duration(spent), memory + place)


def bytes_card(report: Report) -> Card | None:
    """Size of the checkpoint before and after."""
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


def bytes_tables(report: Report) -> list[Table]:
    """All recorded sizes."""
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
