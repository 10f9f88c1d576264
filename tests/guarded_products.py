"""Multiply matrices whose parts, inputs and biases touch pages that cannot be read: who reads beyond them dies.

``python guarded_products.py`` prints ``ok``; ``python guarded_products.py beyond`` reads one byte beyond and must die.
"""

import ctypes
import mmap
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch

from packings import VALUE_TYPES, available, normal, packed, sparse
from secateur.runtime import kernels
from secateur.runtime.kernels import KernelMatrix

CASES = [("dense", None), ("bitmask", None), *(("nm", pattern) for pattern in ((1, 2), (2, 4), (3, 4), (4, 8), (3, 7)))]
CASES += [("nm", (8, 16)), ("nm", (12, 16)), ("nm", (4, 16))]
SHAPES = [(1, 1), (5, 7), (4, 64), (9, 130), (33, 200)]
kept = []


def guarded(tensor, at_end):
    """The same numbers, right before a page that cannot be read or right after one."""
    size, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
    whole = mmap.mmap(-1, (-(-size // page) + 2) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(whole))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for forbidden in (start, start + len(whole) - page):
        assert protect(forbidden, page, 0) == 0, ctypes.get_errno()
    kept.append(whole)
    if not size:
        return tensor
    offset = len(whole) - page - size if at_end else page
    return (
        torch.frombuffer(whole, dtype=tensor.dtype, offset=offset, count=tensor.numel())
        .view(tensor.shape)
        .copy_(tensor)
    )


def products(matrix, shape, place):
    """Everything that reads the matrix, with inputs placed likewise."""
    bias = place(normal(shape[0]))
    for batch in (1, 2, 9):
        for dtype in (torch.float32, torch.bfloat16):
            x = place(normal(batch, shape[1]).to(dtype))
            yield matrix.linear(x, bias)
            if matrix.tensors[""].dtype == torch.int8 and "_mask" not in matrix.tensors:
                yield matrix.linear(x, bias, activations8=True)
    yield matrix.unpack(0, shape[0])
    yield matrix.unpack(shape[0] // 8 * 4, shape[0])


def main():
    torch.set_num_threads(1)
    names = available()
    for format, pattern in CASES:
        for values in VALUE_TYPES:
            for shape in SHAPES:
                found = packed(sparse(shape, pattern), format, values, pattern)
                for at_end in (True, False):
                    parts = {suffix: guarded(part, at_end) for suffix, part in found.parts.items()}
                    matrix = KernelMatrix(format, shape, parts, found.packing)
                    for name in names:
                        kernels.use(name)
                        ys = products(matrix, shape, lambda x, at_end=at_end: guarded(x, at_end))
                        expected = products(found.matrix, shape, lambda x: x)
                        assert all(torch.equal(*pair) for pair in zip(ys, expected, strict=True)), (format, shape)
                    del matrix, parts
                    kept.clear()


if __name__ == "__main__":
    if sys.argv[1:] == ["beyond"]:
        ctypes.string_at(guarded(torch.zeros(3), True).data_ptr() + 12, 1)
    main()
    print("ok")
