"""Which layers of a packed model run packed on this machine, and which dense: measured, or as asked for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, OptionError
from ..models.formats import DTYPES, MAX_M, VALUES, Packing, pack
from ..models.in_memory import eager
from . import kernels
from .kernels import KernelMatrix
from .linear import KernelLinear, PackedLinear, UnpackedLinear

PREFERENCES = ("speed", "memory")
VARIABLE = "SECATEUR_PREFER"
EVICTED_BYTES = 64 << 20  # read between two measurements, so that weights come from memory as they do in a model
MEASUREMENTS = 7
TIE = 1.1  # so much slower a kernel may be for the memory that packing saves
_measured: dict[tuple[Any, ...], dict[str, float]] = {}


def optimize(model: nn.Module, *, prefer: str | None = None, activations: str | None = None) -> dict[str, Any]:
    """Arrange a model that was loaded from a packed checkpoint for this machine; loading has done it once.

    Args:
        model: its packed layers are exchanged in place.
        prefer: ``speed`` keeps a matrix packed only where a kernel computes one row of inputs from packed weights
            faster than torch from dense ones (or 10 % slower at most), both measured here; ``memory`` keeps all
            packed. None is what the environment's SECATEUR_PREFER says, else ``speed``. Dense layers (the output
            head) take our kernel where that is faster, which costs no memory.
        activations: ``int8`` rounds the inputs of matrices in an N:M pattern with 8-bit values to 8 bits too, one
            scale for each 64 of them, for up to 8 rows of inputs at a time: a relative error of about 1 % in each
            product. None keeps them as they are.

    Returns:
        What was chosen (`arrangement`).

    Raises:
        OptionError: an option that does not exist, or no matrix can run with 8-bit activations.
        ModelError: it is no model.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"{type(model).__name__}: is no model; give one that was loaded from a packed checkpoint")
    of = "prefer" if prefer else VARIABLE
    prefer = prefer or os.environ.get(VARIABLE) or "speed"
    if prefer not in PREFERENCES:
        raise OptionError(f"{of} {prefer!r}: use {' or '.join(PREFERENCES)}")
    if activations not in (None, "int8"):
        raise OptionError(f"activations {activations!r}: use int8, or leave it out")
    fitting = [m for m in model.modules() if isinstance(m, PackedLinear) and _takes_8_bit_activations(m.packing)]
    if activations and not fitting:
        raise OptionError(
            "activations int8: none of its matrices can; it takes kernels, and 2:4, 8:16 or alike with values int8"
        )
    for layer in fitting:
        layer.activations = activations
    with eager(model):
        _arrange(model, prefer)
    return arrangement(model)


def _arrange(model: nn.Module, prefer: str) -> None:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)  # that the model computes in
    exchanged: dict[nn.Module, nn.Module] = {}  # a layer may stand in several places
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not name:
            continue  # there is nothing to exchange it in
        if module in exchanged:
            _exchange(model, name, exchanged[module])
        elif isinstance(module, UnpackedLinear) and prefer == "memory":
            exchanged[module] = _exchange(model, name, _packed_again(module))
        elif isinstance(module, PackedLinear) and prefer == "speed" and module.weight.is_cpu:  # a GPU wants memory
            to = dtype or module.weight.dtype
            exact = to in (module.weight.dtype, torch.float32)  # else weights would be rounded
            if exact and not packed_is_faster(module.packing, module.kernel(), to):
                exchanged[module] = _exchange(model, name, _unpacked(module, to))
        elif type(module) in (nn.Linear, KernelLinear):
            module.__class__ = KernelLinear if _our_dense_is_faster(module) else nn.Linear
            module.__dict__.pop("_kernel", None)  # which cannot be copied


def arrangement(model: nn.Module) -> dict[str, Any]:
    """How many matrices run packed, unpacked and with 8-bit activations, the kernels' name, and what was measured."""
    found = list(model.modules())
    packed = [module for module in found if isinstance(module, PackedLinear)]
    return {
        "kernels": kernels.in_use(),
        "packed": len(packed),
        "unpacked": sum(isinstance(module, UnpackedLinear) for module in found),
        "dense_kernel": sum(isinstance(module, KernelLinear) for module in found),
        "activations8": sum(module.activations == "int8" for module in packed),
        "measured": list(_measured.values()),
    }


def packed_is_faster(packing: Packing, kernel: KernelMatrix | None, dtype: torch.dtype | None = None) -> bool:
    """Whether a matrix in the CPU's memory is better left packed for speed, in a model that computes in `dtype`."""
    if packing.values == "int8":
        return True  # unpacked it would be float32
    if kernel is None:
        return False
    found = measured(kernel, packing, dtype or kernel.values.dtype)
    return found["kernel"] <= TIE * found["torch"]


def _our_dense_is_faster(module: nn.Linear) -> bool:
    weight = module.weight
    fits = weight.is_cpu and weight.dtype in kernels.FLOATS and weight.is_contiguous()
    if not fits or kernels.library() is None:
        return False
    shape = (module.out_features, module.in_features)
    kernel = KernelMatrix("dense", shape, {VALUES: weight}, None)
    found = measured(kernel, None, weight.dtype)
    return found["kernel"] <= found["torch"]


def kind_of(packing: Packing) -> tuple[Any, ...]:
    """What decides how fast a matrix is: shape, format, values, and its sparsity in steps of 5 %."""
    rows, columns = packing.shape
    density = round(20 * packing.count / (rows * columns))
    return packing.shape, packing.format, packing.n, packing.m, packing.values, density


def measured(kernel: KernelMatrix, packing: Packing | None, dtype: torch.dtype) -> dict[str, float]:
    """Seconds for one row of inputs by our kernel and by torch's dense product, in turn; measured once.

    Of each the fastest of several runs counts: whatever else the machine does only makes them slower.
    """
    shape = (kernel.rows, kernel.columns)
    key = (shape, packing and kind_of(packing), kernel.values.dtype, dtype, torch.get_num_threads(), kernels.in_use())
    if key not in _measured:
        x = torch.ones(1, shape[1], dtype=dtype, device="cpu")
        dense = torch.ones(shape, dtype=dtype, device="cpu")
        with torch.inference_mode():
            ours, theirs = _in_turn(lambda: kernel.linear(x), lambda: nn.functional.linear(x, dense))
        _measured[key] = {"rows": shape[0], "columns": shape[1], "kernel": ours, "torch": theirs}
    return _measured[key]


def _in_turn(*functions: Callable[[], Tensor]) -> list[float]:
    seconds: list[list[float]] = [[] for _ in functions]
    other = torch.ones(EVICTED_BYTES // 4, dtype=torch.float32, device="cpu")
    for _ in range(MEASUREMENTS + 1):
        for function, taken in zip(functions, seconds, strict=True):
            other.sum()
            started = time.perf_counter()
            function()
            taken.append(time.perf_counter() - started)
    return [min(taken[1:]) for taken in seconds]


def _takes_8_bit_activations(packing: Packing) -> bool:
    """Whether there is a fast kernel for it: for 4, 8 or 12 values in 16 columns."""
    if packing.n is None or packing.m is None or packing.values != "int8" or kernels.library() is None:
        return False
    return packing.m > 2 and MAX_M // packing.m * packing.n in (4, 8, 12)


def _exchange(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
    return module


def _unpacked(module: PackedLinear, dtype: torch.dtype) -> UnpackedLinear:
    with torch.device("meta"):
        dense = UnpackedLinear(module.in_features, module.out_features, bias=module.bias is not None)
    weight = module.rows(0, module.out_features, dtype)
    dense.weight, dense.bias = nn.Parameter(weight, requires_grad=False), module.bias  # type: ignore[assignment]
    dense.packing = module.packing
    return dense.train(module.training)


def repack(module: UnpackedLinear) -> tuple[Packing, dict[str, Tensor]] | None:
    """The matrix packed as it was on disk; None if what happened to it since makes that no smaller."""
    weight = module.weight.detach()
    held = weight.to(DTYPES[module.packing.dtype])
    if torch.equal(held.to(weight.dtype), weight):
        weight = held  # as it was packed; in the model's dtype it may be wider
    try:
        found = pack("weight", weight, module.packing.format)
    except OptionError:  # its zeros have another pattern by now
        found = pack("weight", weight, "bitmask")
    return found and (replace(found[0], transposed=module.packing.transposed), found[1])


def _packed_again(module: UnpackedLinear) -> nn.Module:
    found = repack(module)
    if found is None:
        return module
    packing, parts = found
    packed = PackedLinear(packing, module.bias)
    for suffix, part in parts.items():
        packed.register_buffer(f"weight{suffix}", part)
    return packed.train(module.training)
