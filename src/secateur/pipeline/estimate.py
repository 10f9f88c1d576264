"""What a run will take, before it is begun: time, memory and disk."""

from __future__ import annotations

import time
from typing import Any

import torch

from ..models.hosts import DiskHost, block_matrices
from ..pruning import GRAM
from .calibration import Tokens
from .plan import Plan
from .stream import MICRO_BATCH_TOKENS

# Attention, norms and the rest, as a share of the time in matrix products (SmolLM2, 512 tokens: 1.4).
OVERHEAD = 1.4
RUNTIME_BYTES = 500 << 20  # Python, torch and transformers


def estimate(plan: Plan, host: DiskHost, tokens: Tokens | None) -> dict[str, Any]:
    """Return rough seconds and memory, and the disk's bytes, that a plan takes."""
    checkpoint = host.checkpoint
    pruned = {name for name, target in plan.job.targets.items() if target.sparsity}
    shapes = [
        {name: matrix.shape for name, matrix in block_matrices(host, index).items()}
        for index in range(len(host.skeleton.real))
    ]
    weights = [sum(rows * columns for rows, columns in block.values()) for block in shapes]
    count = tokens.tokens if tokens else 0
    gram = GRAM in plan.job.method.needs
    operations = 0.0
    if tokens:
        passes = 2 if plan.job.propagate == "block" else 1
        operations += 2 * count * sum(weights) * passes * OVERHEAD
    if gram:
        distinct = [sum(c * c for c in {columns for _, columns in block.values()}) for block in shapes]
        operations += count * sum(distinct) + sum(2 * r * c * c for block in shapes for r, c in block.values())
    floats = [i for i in checkpoint.tensors.values() if i.dtype.is_floating_point]
    itemsize = host.dtype.itemsize if host.dtype else max((i.dtype.itemsize for i in floats), default=2)
    output = checkpoint.bytes + sum(i.weights * max(0, itemsize - i.dtype.itemsize) for i in floats)
    width = host.model.config.get_text_config().hidden_size
    widest = max((max(shape) for block in shapes for shape in block.values()), default=0)
    outside = sum(checkpoint.tensors[n].weights for n in host.names[None])
    largest = max(weights, default=0)
    sums = 4 * 4 * max((max(c for _, c in block.values()) for block in shapes if block), default=0) ** 2 if gram else 0
    activations = min(count, MICRO_BATCH_TOKENS) * widest * 4 * 4
    return {
        "matrices": len(plan.matrices),
        "weights": sum(m.weights for m in plan.matrices),
        "mean_sparsity": plan.mean_sparsity,
        "estimate": {
            "seconds": operations / _operations_per_second(),
            "memory_bytes": RUNTIME_BYTES + 4 * outside + 2 * 4 * largest + sums + activations,
            "disk_bytes": output
            + sum(m.weights for m in plan.matrices if m.name in pruned) * itemsize
            + 2 * count * width * 4,
        },
    }


def _operations_per_second() -> float:
    a = torch.randn(1024, 1024)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * 1024**3 / best
