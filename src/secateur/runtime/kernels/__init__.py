"""Matrix products straight from packed weights, in C (kernels.h says which), called with ctypes.

The library knows nothing of Python or torch. Without a compiler at install it is missing, and `library` says so once.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.formats import INDEX, MASK, ROWS, SCALE, VALUES, Packing, row_offsets

log = logging.getLogger("secateur")

FILE = Path(__file__).with_name("_kernels.so")
FORMATS = {"dense": 0, "bitmask": 1, "nm": 2}
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NO_SUCH_KERNEL = 2


class _Matrix(ctypes.Structure):
    """`Matrix` of kernels.h."""

    _fields_ = (
        ("format", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("n", ctypes.c_int32),
        ("m", ctypes.c_int32),
        ("values", ctypes.c_void_p),
        ("where", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("count", ctypes.c_int64),
    )


@lru_cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, with the widest vectors that this machine has; None if they were not compiled."""
    try:
        found = ctypes.CDLL(str(FILE))
    except OSError as error:
        why = "they were not compiled at install, for want of a C compiler" if not FILE.exists() else str(error)
        log.warning("no kernels for packed weights (%s); torch computes instead, from unpacked ones", why)
        return None
    pointer, int64, int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    found.secateur_use.restype, found.secateur_use.argtypes = ctypes.c_char_p, [ctypes.c_char_p]
    found.secateur_used.restype = ctypes.c_char_p
    found.secateur_linear.argtypes = [pointer, pointer, int32, int64, pointer, int32, pointer, int32, int32]
    found.secateur_unpack.argtypes = [pointer, int64, int64, pointer, int32, int32, int32]
    found.secateur_use(None)
    found.secateur_borrow_threads.argtypes = [pointer]
    found.secateur_borrow_threads(_gomp_parallel())
    return found


def _gomp_parallel() -> int | None:
    """Address of the function with which torch's OpenMP starts a job on its threads, if there is one."""
    with suppress(OSError, AttributeError, TypeError):  # torch makes its own libraries' names known to all
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    return None


def use(name: str | None = None) -> str | None:
    """Choose ``portable``, ``avx2`` or ``avx512`` kernels, or the best for None; return their name, or None if none."""
    kernels = library()
    chosen = kernels and kernels.secateur_use(name and name.encode())
    return chosen.decode() if chosen else None


@lru_cache
def native_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself; elsewhere float32 is the faster to multiply."""
    kernels = library()
    return kernels is not None and bool(kernels.secateur_native_bfloat16())


def in_use() -> str | None:
    """Name of the kernels in use, or None if there are none."""
    kernels = library()
    return None if kernels is None else kernels.secateur_used().decode()


def seen(tensors: Iterable[Tensor]) -> list[tuple[Any, ...]]:
    """Where and how tensors lie, and how often they were written to: offsets are derived from a mask."""
    return [
        (part.data_ptr(), part.dtype, part.shape, part.stride(), 0 if part.is_inference() else part._version)
        for part in tensors
    ]


class KernelMatrix:
    """One matrix in memory, as the kernels see it. It keeps its tensors alive."""

    def __init__(self, format: str, shape: tuple[int, int], tensors: Mapping[str, Tensor], packing: Packing | None):
        """Point at tensors, by suffix, on the CPU; of a dense matrix, only its values (and scale)."""
        self.rows, self.columns = shape
        self._seen = seen(tensors.values()) if all(t.is_contiguous() for t in tensors.values()) else None
        # Other tensor objects, which hold the memory even if those given are let point elsewhere.
        held = {suffix: tensor.detach().contiguous().view(-1) for suffix, tensor in tensors.items()}
        self.values = values = held[VALUES]
        where, scale = held.get(MASK, held.get(INDEX)), held.get(SCALE)
        offsets = row_offsets(packing, held).contiguous() if packing else None
        self.tensors, self._offsets = held, offsets
        self._matrix = _Matrix(
            FORMATS[format], TYPES[values.dtype], *shape, (packing and packing.n) or 0, (packing and packing.m) or 0,
            values.data_ptr(), None if where is None else where.data_ptr(),
            None if offsets is None else offsets.data_ptr(), None if scale is None else scale.data_ptr(), len(values),
        )  # fmt: skip
        self._pointer = ctypes.addressof(self._matrix)

    def holds(self, tensors: Iterable[Tensor]) -> bool:
        """Whether this points at these tensors, where they lie now."""
        return self._seen == seen(tensors)

    def linear(self, x: Tensor, bias: Tensor | None = None, activations8: bool = False) -> Tensor:
        """Return x Wᵀ + b.

        Args:
            x: [..., in], float32, bfloat16 or float16, on the CPU; sums are kept in float32, y is in x's dtype.
            bias: [out].
            activations8: round x to 8 bits, one scale for each 64 inputs.

        Raises:
            NotImplementedError: these weights have no kernel with 8-bit activations.
        """
        x = x.contiguous()
        y = torch.empty(*x.shape[:-1], self.rows, dtype=x.dtype, device="cpu")
        bias = None if bias is None else bias.detach().float().contiguous()
        kernels = library()
        assert kernels is not None
        _raise_for(
            kernels.secateur_linear(
                self._pointer, x.data_ptr(), TYPES[x.dtype], x.numel() // self.columns, y.data_ptr(), TYPES[y.dtype],
                None if bias is None else bias.data_ptr(), activations8, torch.get_num_threads(),
            )
        )  # fmt: skip
        return y

    def unpack(self, start: int, stop: int, dtype: torch.dtype = torch.float32, *, unscaled: bool = False) -> Tensor:
        """Return rows `start` (a multiple of 4) to `stop` (likewise, or the last) of W, [rows, in].

        Args:
            start: the first row.
            stop: the row after the last.
            dtype: that they are rounded to.
            unscaled: leave out the scales of 8-bit values, which are then exact in every dtype.
        """
        assert start % ROWS == 0 and (stop % ROWS == 0 or stop == self.rows)
        W = torch.empty(stop - start, self.columns, dtype=dtype, device="cpu")
        kernels = library()
        assert kernels is not None
        _raise_for(
            kernels.secateur_unpack(
                self._pointer, start, stop, W.data_ptr(), TYPES[dtype], unscaled, torch.get_num_threads()
            )
        )  # fmt: skip
        return W


def _raise_for(code: int) -> None:
    if code == NO_SUCH_KERNEL:
        raise NotImplementedError("8-bit activations need 8-bit values in an N:M pattern")
    if code:
        raise MemoryError("no memory for a matrix product")
