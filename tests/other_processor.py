"""Torch as another processor would have it: what no library promises to the last bit gets other last bits.

`pytest --other-processor=SEED` puts this over torch's own kernels, in all threads. The same call gives the same bits.
Another layout or alignment, other shapes or another number of threads give others, as the maths libraries have it:

- products and factorisations depend on shapes, strides, alignment to 64 bytes, and the number of threads;
- sums, norms and what works row by row depend on the length of a row, and on strides;
- functions of one number depend on whether the tensor is contiguous (vectors of numbers, or one by one).

A result moves by one unit in the last place, or not at all. Zero stays zero, and numbers with few bits stay, because
every order of operations has them exactly; so does what a product adds nothing to. Secateur's own kernels, numpy
and other processes are left alone, so what a test compares with a process that it starts differs here.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Salt = Callable[[list[Tensor]], Any]

# As whole numbers; how many zeros a short number ends with; how many results of 1024 move. Of those in 16 bits few lie
# so near a tie that they are rounded otherwise.
BITS = {
    torch.float32: (torch.int32, 11, 768),
    torch.float64: (torch.int64, 30, 768),
    torch.bfloat16: (torch.int16, 3, 2),
    torch.float16: (torch.int16, 3, 2),
}


def whole(tensors: list[Tensor]) -> Any:
    """Whatever a product's kernel is chosen by."""
    return torch.get_num_threads(), [(tuple(t.shape), t.stride(), t.data_ptr() % 64) for t in tensors]


def of_rows(tensors: list[Tensor]) -> Any:
    """The length of a row, and how its numbers lie."""
    return [(t.shape[-1:], t.stride()[-1:]) for t in tensors]


def of_sums(tensors: list[Tensor]) -> Any:
    return [(tuple(t.shape), t.stride()) for t in tensors]


def of_numbers(tensors: list[Tensor]) -> Any:
    return [t.is_contiguous() for t in tensors]


OPERATORS: dict[Salt, str] = {
    whole: "mm bmm addmm addmm_ baddbmm baddbmm_ addmv addmv_ mv dot addbmm convolution convolution_backward "
    "_linalg_eigh linalg_cholesky_ex linalg_solve_triangular _linalg_svd linalg_inv_ex _linalg_solve_ex linalg_qr "
    "linalg_lu_factor_ex triangular_solve cholesky_inverse",
    of_rows: "_softmax _log_softmax native_layer_norm _scaled_dot_product_flash_attention_for_cpu",
    of_sums: "sum.dim_IntList mean.dim linalg_vector_norm norm.ScalarOpt_dim var_mean.correction var.correction "
    "std.correction prod.dim_int",
    of_numbers: "exp exp_ exp2 expm1 log log_ log1p log2 sin cos tanh sigmoid sigmoid_ silu gelu erf softplus rsqrt "
    "pow.Tensor_Scalar pow.Tensor_Tensor addr addcmul addcmul_",
}
ADDING = {"addmm", "addmm_", "baddbmm", "baddbmm_", "addmv", "addmv_", "addbmm", "addr", "addcmul", "addcmul_"}


def moved(result: Tensor, salt: int, before: Tensor | None = None) -> None:
    """Move numbers of a result by one unit in the last place, in place; those that are `before` already stay."""
    if not result.numel() or result.dtype not in BITS:
        return
    kind, short, often = BITS[result.dtype]
    bits = result.view(kind)
    mixed = (bits.long() ^ salt) * 0x1E3779B97F4A7C15
    mixed = (mixed ^ (mixed >> 29)) * 0x3F58476D1CE4E5B9
    step = ((mixed >> 40) & 1) * 2 - 1
    step *= ((mixed >> 42) & 1023) < often
    ends = bits & (2**short - 1)
    step *= (ends != 0) & (ends != 2**short - 1)
    if before is not None:
        step *= result != before
    bits += step.to(kind)


def tensors_in(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def replaced(name: str, salt: Salt, seed: int) -> Callable[..., Any]:
    """The operator, and then other last bits."""
    kernel = torch.library.get_kernel(f"aten::{name}", "CPU")
    base = name.split(".")[0]

    def operator(keys: Any, *args: Any, **kwargs: Any) -> Any:
        taken = [t for t in tensors_in((*args, *kwargs.values())) if t.is_floating_point()]
        if not taken or any(t.device.type != "cpu" for t in taken):
            return kernel.call_boxed(keys, *args, **kwargs)
        number = zlib.crc32(f"{seed} {base.rstrip('_')} {salt(taken)}".encode()) * 0x1B873593CC9E2D51 % 2**62
        before = args[0].clone() if base in ADDING and kwargs.get("beta", 1) == 1 else None
        result = kernel.call_boxed(keys, *args, **kwargs)
        for part in tensors_in(result if isinstance(result, (list, tuple)) else (result,)):
            fits = before is not None and part.dtype == before.dtype
            moved(part, number, before.expand_as(part) if fits else None)
        return result

    return operator


def install(seed: int) -> torch.library.Library:
    """Put the other processor over torch's kernels, for as long as what is returned lives."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for salt, names in OPERATORS.items():
            for name in names.split():
                library.impl(name, replaced(name, salt, seed), "CPU", with_keyset=True, allow_override=True)
    return library
