"""What a run will take, before it is begun: time, memory and disk."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..models.disk_host import DiskHost
from ..models.hosts import block_matrices
from ..models.matrices import Matrix
from ..models.shards import WEIGHTS
from ..pruning import GRAM
from ..pruning.methods import parts_of
from .calibration import Tokens
from .observation import Observer, fits, gram_bytes, paused_bytes, room
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

Parts = Sequence[Mapping[str, Matrix]]  # of a block's matrices: those that one forward observes


def estimate(plan: Plan, host: DiskHost, tokens: Tokens | None) -> dict[str, Any]:
    """Return rough seconds and memory, and the disk's bytes, that a plan takes."""
    count = tokens.tokens if tokens else 0
    most = math.inf if plan.job.propagate == "sequential" else room(host.device)
    parts = [
        Observer(plan.job.chosen(host, index), plan.job.method.needs).parts(most)
        for index in range(len(host.skeleton.real))
    ]
    return {
        "matrices": len(plan.matrices),
        "weights": sum(m.weights for m in plan.matrices),
        "mean_sparsity": plan.mean_sparsity,
        "estimate": {
            "seconds": plan.allocation_seconds + _operations(plan, host, count, parts) / _operations_per_second(),
            "memory_bytes": _memory_bytes(plan, host, count, parts),
            "disk_bytes": disk_bytes(plan, host, tokens),
        },
    }


def _operations(plan: Plan, host: DiskHost, count: int, parts: Sequence[Parts]) -> float:
    """Operations of forwards, of which a block has one more for every part of its experts, and of solves."""
    config, how = host.model.config.get_text_config(), plan.job.reconstruct
    passes: float = 1 if plan.job.propagate == "block" else 0  # beside those that observe
    if how:
        seen = 1 - 1 / HELD_OUT
        passes += 1 + how.epochs * (FORWARDS_OF_A_STEP * seen + 1 - seen)
    operations = 0.0
    for index, its_parts in enumerate(parts):
        used = sum(_share_of_tokens(matrix, config) * matrix.weights for matrix in block_matrices(host, index).values())
        operations += 2 * count * used * (passes + len(its_parts)) * OVERHEAD
    if GRAM in plan.job.method.needs:
        chosen = [[matrix for part in its_parts for matrix in part.values()] for its_parts in parts]
        distinct = [sum(c * c for c in {matrix.shape[1] for matrix in block}) for block in chosen]
        product = sum(2 * matrix.weights * matrix.shape[1] for block in chosen for matrix in block)
        products = sum(PRODUCTS.get(name, 0) for name, _ in parts_of(plan.record["method"])) or 1  # 1: a user's own
        operations += count * sum(distinct) + products * product
    return operations


def _memory_bytes(plan: Plan, host: DiskHost, count: int, parts: Sequence[Parts]) -> int:
    blocks = [list(block_matrices(host, index).values()) for index in range(len(parts))]
    every = [matrix for block in blocks for matrix in block]
    largest = max((sum(matrix.weights for matrix in block) for block in blocks), default=0)
    outside = sum(host.checkpoint.tensors[name].weights for name in host.names[None])
    taken = RUNTIME_BYTES + 4 * outside + 2 * 4 * largest
    taken += min(count, MICRO_BATCH_TOKENS) * max((max(matrix.shape) for matrix in every), default=0) * 4 * 4
    if GRAM in plan.job.method.needs:  # of a block's few distinct inputs, and of the experts observed together
        experts = [[m for m in part.values() if m.expert is not None] for its_parts in parts for part in its_parts]
        taken += 4 * 4 * max((matrix.shape[1] for matrix in every), default=0) ** 2
        taken += max(map(gram_bytes, experts), default=0)
    if count and plan.job.propagate == "sequential":
        paused = paused_bytes(count, host.model.config.get_text_config().hidden_size, every)
        taken += paused if fits(paused, host.device) else 0
    if plan.job.reconstruct:
        hidden = _hidden_bytes(host, count)
        taken += COPIES * 4 * largest + (hidden if fits(hidden, host.device) else 0)
    return taken


def disk_bytes(plan: Plan, host: DiskHost, tokens: Tokens | None) -> int:
    """Return what a run directory holds at most: finished blocks, the output and hidden states."""
    floats = [info for info in host.checkpoint.tensors.values() if info.dtype in WEIGHTS]
    itemsize = host.dtype.itemsize if host.dtype else max((info.dtype.itemsize for info in floats), default=2)
    output = host.checkpoint.bytes + sum(info.weights * max(0, itemsize - info.dtype.itemsize) for info in floats)
    pruned = {name for name, target in plan.job.targets.items() if target.sparsity}
    blocks = sum(matrix.weights for matrix in plan.matrices if matrix.name in pruned) * itemsize
    hidden = _hidden_bytes(host, tokens.tokens if tokens else 0)
    return output + blocks + hidden * (2 if plan.job.reconstruct else 1)


def _hidden_bytes(host: DiskHost, count: int) -> int:
    return 2 * count * int(host.model.config.get_text_config().hidden_size) * 4


def _share_of_tokens(matrix: Matrix, config: Any) -> float:
    """The share of all tokens that reach a matrix."""
    if matrix.expert is None:
        return 1.0
    share: float = getattr(config, "num_experts_per_tok", 1) / len(matrix.weight)
    return share


def _operations_per_second() -> float:
    a = torch.randn(1024, 1024, dtype=torch.float32)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * 1024**3 / best
