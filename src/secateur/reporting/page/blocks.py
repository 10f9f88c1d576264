"""What a page shows of blocks and of the matrices in them: zeros, errors, time."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..pruned import allocation_found, errors_by_block
from .charts import Axis, Series, by_block_chart, heat_map, scatter
from .parts import Picture, Section, Table, by_block, plain, share
from .wording import counted, course, digits, percent, short

Report = Mapping[str, Any]


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


def pruned_blocks(run: Report) -> Section:
    """Where the zeros and the errors are, and where the time went."""
    pictures = sparsity_by_kind(run["matrices"])
    if cells := by_kind(run["matrices"], "output_error"):
        pictures.append(errors_by_kind(cells))
    pictures += reconstructed(run["blocks"])
    pictures += pictures_by_block(run["blocks"])
    return Section("blocks", "Blocks and matrices", _words_on_blocks(run), pictures=pictures, tables=_slopes(run))


def reconstructed(blocks: Sequence[Report]) -> list[Picture]:
    """The held-out error of each block before and after its reconstruction."""
    pairs = errors_by_block(blocks)
    if not pairs:
        return []
    id, title = "reconstruction", "Reconstruction of each block"
    says = course({block: after for block, (_, after) in pairs.items()}, "After it, the held-out error")
    series = [
        Series(name, place, place, place, [(block, pair[place], 0, 0) for block, pair in pairs.items()])
        for place, name in enumerate(("before", "after"))
    ]
    axis = Axis("Held-out error, |Y − Y′| / |Y|")
    rows = ((block, [plain(error) for error in pair]) for block, pair in pairs.items())
    table = by_block("Held-out errors of reconstruction", ["Before", "After"], rows)
    return [Picture(id, title, says, scatter(id, title, says, series, Axis("Block", whole=True), axis), table)]


def _slopes(run: Report) -> list[Table]:
    """What was tried for a linear allocation."""
    tried = (allocation_found(run["plan"]) or {}).get("slopes")
    if not tried:
        return []
    rows = [[plain(one["slope"]), plain(one.get("kl"))] for one in sorted(tried, key=lambda one: one["slope"])]
    return [Table("Slopes tried for the linear allocation", ["Slope", "KL, nats per token"], rows)]


def sparsity_by_kind(matrices: Sequence[Report]) -> list[Picture]:
    """The zeros in each kind of matrix in each block."""
    cells = by_kind(matrices, "sparsity")
    if not cells:
        return []
    says = _extremes(cells, "Sparsity", percent)
    axis = Axis("Sparsity, zeros / weights", percent=True)
    return [_heat("sparsity", "Sparsity of each kind of matrix", says, cells, axis, share)]


def errors_by_kind(cells: Mapping[tuple[str, int], float]) -> Picture:
    """The output error of each kind of matrix in each block."""
    axis = Axis("Output error, |Y − Y′| / |Y|")
    says = _extremes(cells, "Output error")
    return _heat("errors", "Output error of each kind of matrix", says, cells, axis, plain)


def pictures_by_block(blocks: Sequence[Report]) -> list[Picture]:
    """The output error of each block, and its time."""
    errors = {block["block"]: block["output_error"] for block in blocks if block.get("output_error") is not None}
    spent = {block["block"]: block["seconds"] for block in blocks if block.get("seconds") is not None}
    pictures = []
    if errors:
        axis = Axis("Output error of the block, |Y − Y′| / |Y|")
        says = course(errors, "The output error")
        pictures.append(of_blocks("block-errors", "Output error of each block", says, "Output errors", errors, axis))
    if spent:
        title, says = "Time for each block", course(spent, "Time", lambda value: f"{digits(value)} s")
        pictures.append(of_blocks("times", title, says, title, spent, Axis("Seconds"), bars=True))
    return pictures


def of_blocks(
    id: str, title: str, says: str, caption: str, values: Mapping[int, float], axis: Axis, bars: bool = False
) -> Picture:
    """One value for each block, as a picture and a table with a caption of its own."""
    table = by_block(caption, [axis.title], ((block, [plain(value)]) for block, value in values.items()))
    return Picture(id, title, says, by_block_chart(id, title, says, values, axis, bars), table)


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
