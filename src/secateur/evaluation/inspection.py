"""What a model's matrices look like: shape, sparsity, pattern, format, bytes."""

from __future__ import annotations

from typing import Any

from ..models.disk_host import DiskHost
from ..models.hosts import block_matrices
from ..models.shards import PackedInfo, read_parts
from ..progress import Progress
from ..pruning import detect_pattern
from ..runtime.arrangement import kind_of, packed_is_faster
from ..runtime.kernels import KernelMatrix, library


def _runs(info: PackedInfo, known: dict[tuple[Any, ...], str]) -> str:
    """``packed`` or ``dense``, whichever is faster on this machine; what is known of one matrix holds for its kind."""
    kind = kind_of(info.packing)
    if kind not in known:
        parts = read_parts(info)
        kernel = KernelMatrix(info.packing.format, info.packing.shape, parts, info.packing) if library() else None
        known[kind] = "packed" if packed_is_faster(info.packing, kernel) else "dense"
    return known[kind]


def inspect_matrices(host: DiskHost, progress: Progress) -> dict[str, Any]:
    """Look at every prunable matrix of a checkpoint, one block in memory at a time.

    Returns:
        model type, dtype, bytes of the whole checkpoint; sparsity and weights over all matrices; and for each
        matrix name, block, shape, sparsity, pattern, format, bytes, and for packed ones how they would run here.
    """
    checkpoint = host.checkpoint
    count = len(host.skeleton.real)
    rows: list[dict[str, Any]] = []
    runs: dict[tuple[Any, ...], str] = {}
    progress.start("inspecting", count)
    for index in range(count):
        with host.block(index):
            for name, matrix in block_matrices(host, index).items():
                W_OI = matrix.read()
                infos = [checkpoint.tensors[n] for n in host.names_of[matrix.parameter]]
                rows.append(
                    {
                        "name": name,
                        "block": index,
                        "shape": list(W_OI.shape),
                        "sparsity": float((W_OI == 0).double().mean()),
                        "pattern": detect_pattern(W_OI),
                        "format": infos[0].packing.format if isinstance(infos[0], PackedInfo) else "dense",
                        "runs": _runs(infos[0], runs) if isinstance(infos[0], PackedInfo) else "dense",
                        "dtype": infos[0].dtype_name,
                        "bytes": sum(info.bytes for info in infos),
                    }
                )
        progress.advance()
    progress.finish()
    weights = sum(row["shape"][0] * row["shape"][1] for row in rows)
    zeros = sum(row["sparsity"] * row["shape"][0] * row["shape"][1] for row in rows)
    return {
        "model_type": host.model.config.model_type,
        "blocks": count,
        "weights": weights,
        "sparsity": zeros / weights if weights else 0.0,
        "bytes": checkpoint.bytes,
        "matrices": rows,
    }
