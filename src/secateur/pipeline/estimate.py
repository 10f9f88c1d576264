"""What a run will take, before it is begun: time, memory and disk."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from ..models.disk_host import DiskHost
from ..models.hosts import block_matrices
from ..models.matrices import Matrix
from ..pruning import GRAM
from ..pruning.methods import parts_of
from .calibration import Tokens
from .observation import fits, gram_bytes, paused_bytes, room
from .plan import Plan
from .reconstruct import HELD_OUT
from .stream import MICRO_BATCH_TOKENS

# Attention, norms and the rest, as a share of the time in matrix products (SmolLM2, 512 tokens: 1.4).
OVERHEAD = 1.4
FORWARDS_OF_A_STEP = 3  # forward, and backward to weights and inputs
COPIES = 6  # of a block's weights, beside any run's, to reconstruct it: gradients, two of Adam, first, best
# Time of a method or stage in products of a matrix with its Gram matrix (SmolLM2, 50 %; `swaps` takes more under N:M).
PRODUCTS = {"sparsegpt": 15, "obs": 15, "pcg": 30, "swaps": 120, "alps": 120}
RUNTIME_BYTES = 500 << 20  # Python, torch and transformers


def estimate(plan: Plan, host: DiskHost, tokens: Tokens | None) -> dict[str, Any]:
    """Return rough seconds and memory, and the disk's bytes, that a plan takes."""
    checkpoint = host.checkpoint
    pruned = {name for name, target in plan.job.targets.items() if target.sparsity}
    blocks = [list(block_matrices(host, index).values()) for index in range(len(host.skeleton.real))]
    config = host.model.config.get_text_config()
    weights = [sum(matrix.weights for matrix in block) for block in blocks]
    count = tokens.tokens if tokens else 0
    gram, how = GRAM in plan.job.method.needs, plan.job.reconstruct
    operations = 0.0
    if tokens:
        passes: float = 2 if plan.job.propagate == "block" else 1
        if how:
            seen = 1 - 1 / HELD_OUT
            passes += 1 + how.epochs * (FORWARDS_OF_A_STEP * seen + 1 - seen)
        used = sum(_share_of_tokens(matrix, config) * matrix.weights for block in blocks for matrix in block)
        operations += 2 * count * used * passes * OVERHEAD
    if gram:
        distinct = [sum(c * c for c in {matrix.shape[1] for matrix in block}) for block in blocks]
        product = sum(2 * matrix.weights * matrix.shape[1] for block in blocks for matrix in block)
        products = sum(PRODUCTS.get(name, 0) for name, _ in parts_of(plan.record["method"])) or 1  # 1: a user's own
        operations += count * sum(distinct) + products * product
    floats = [i for i in checkpoint.tensors.values() if i.dtype.is_floating_point]
    itemsize = host.dtype.itemsize if host.dtype else max((i.dtype.itemsize for i in floats), default=2)
    output = checkpoint.bytes + sum(i.weights * max(0, itemsize - i.dtype.itemsize) for i in floats)
    widest = max((max(matrix.shape) for block in blocks for matrix in block), default=0)
    outside = sum(checkpoint.tensors[n].weights for n in host.names[None])
    activations = min(count, MICRO_BATCH_TOKENS) * widest * 4 * 4
    if tokens and plan.job.propagate == "sequential":
        paused = paused_bytes(count, config.hidden_size, (matrix for block in blocks for matrix in block))
        activations += paused if fits(paused, host.device) else 0
    hidden = 2 * count * config.hidden_size * 4
    if how:
        activations += COPIES * 4 * max(weights, default=0) + (hidden if fits(hidden, host.device) else 0)
    most = math.inf if plan.job.propagate == "sequential" else room(host.device)  # which observes experts in parts
    sums = max((_gram_bytes(block, most) for block in blocks), default=0) if gram else 0
    return {
        "matrices": len(plan.matrices),
        "weights": sum(m.weights for m in plan.matrices),
        "mean_sparsity": plan.mean_sparsity,
        "estimate": {
            "seconds": operations / _operations_per_second(),
            "memory_bytes": RUNTIME_BYTES + 4 * outside + 2 * 4 * max(weights, default=0) + sums + activations,
            "disk_bytes": output
            + sum(m.weights for m in plan.matrices if m.name in pruned) * itemsize
            + hidden * (2 if how else 1),
        },
    }


def _share_of_tokens(matrix: Matrix, config: Any) -> float:
    """The share of all tokens that reach a matrix."""
    if matrix.expert is None:
        return 1.0
    share: float = getattr(config, "num_experts_per_tok", 1) / len(matrix.weight)
    return share


def _gram_bytes(block: Sequence[Matrix], most: float) -> float:
    """Gram matrices of one block: of its few distinct inputs, and of its experts' own, at most so many at once."""
    shared = 4 * 4 * max((matrix.shape[1] for matrix in block), default=0) ** 2
    return shared + min(gram_bytes(matrix for matrix in block if matrix.expert is not None), most)


def _operations_per_second() -> float:
    a = torch.randn(1024, 1024)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * 1024**3 / best
