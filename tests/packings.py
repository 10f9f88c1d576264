"""Matrices for tests of kernels, packed in every format, and what a product with them has to give."""

from dataclasses import dataclass, replace

import torch

from secateur.models.formats import (
    DTYPES,
    INDEX,
    MASK,
    SCALE,
    VALUES,
    Packing,
    _pack_bitmask,
    _pack_nm,
    _places,
    bits,
    check,
    checksum,
    unpack,
)
from secateur.runtime import kernels
from secateur.runtime.kernels import KernelMatrix

KERNELS = ("portable", "avx2", "avx512")
FORMATS = ("dense", "bitmask", "nm")
VALUE_TYPES = ("float32", "bfloat16", "float16", "int8")
UNIT = 2.0**-24  # of rounding, in float32


@dataclass
class Packed:
    """A matrix as kernels see it, its parts, and its weights in float64."""

    matrix: KernelMatrix
    parts: dict[str, torch.Tensor]
    packing: Packing | None
    weights: torch.Tensor


def available():
    """The kernels that this machine has; the best are in use afterwards."""
    found = [name for name in KERNELS if kernels.library() and kernels.use(name)]
    kernels.use(None)
    return found


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sparse(shape, pattern=None, seed=0, density=0.5):
    """Normal numbers and zeros: anywhere, or all but N of every M."""
    W = normal(*shape, seed=seed)
    chances = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1))
    if pattern is None:
        return W.masked_fill(chances >= density, 0)
    n, m = pattern
    chances = torch.nn.functional.pad(chances, (0, -shape[1] % m), value=-1)
    order = chances.unflatten(-1, (-1, m)).argsort(-1, descending=True).argsort(-1).flatten(-2)
    return W.masked_fill(order[:, : shape[1]] >= n, 0)


def packed(W_OI, format, values="float32", pattern=None):
    """Pack a matrix, even where that saves nothing."""
    W = W_OI if values == "int8" else W_OI.to(DTYPES[values])
    held, scale = bits(W), {}
    if values == "int8":
        scale[SCALE] = W.abs().amax(1) / 127
        scale[SCALE][scale[SCALE] == 0] = 1
        held = (W / scale[SCALE][:, None]).round().to(torch.int8)
    if format == "dense":
        parts, packing = {VALUES: held.reshape(-1)}, None
    elif format == "bitmask":
        parts = dict(zip((VALUES, MASK), _pack_bitmask(held, bits(W) != 0), strict=True))
    else:
        parts = dict(zip((VALUES, INDEX), _pack_nm(held, bits(W) != 0, *pattern), strict=True))
    parts = {**parts, VALUES: parts[VALUES].view(torch.int8 if scale else W.dtype), **scale}
    if format != "dense":
        n, m = pattern if format == "nm" else (None, None)
        packing = Packing(format, tuple(W.shape), "float32" if scale else values, values, len(parts[VALUES]), n=n, m=m)
    return seen(format, tuple(W.shape), parts, packing)


def seen(format, shape, parts, packing):
    if packing is not None:
        weights = unpack(packing, parts).double()
    else:
        weights = parts[VALUES].float().view(shape)
        weights = (weights * parts[SCALE][:, None] if SCALE in parts else weights).double()
    return Packed(KernelMatrix(format, shape, parts, packing), parts, packing, weights)


def large(format, values):
    """What `KernelMatrix` takes, of more than 4 MiB, so that four threads share it; any index of 1:2 is sound."""
    shape = 1100, 4000 if values == "float32" else 12000
    n, m = (1, 2) if format == "nm" else (None, None)
    generator = torch.Generator().manual_seed(3)
    if format == "bitmask":
        mask = torch.randint(256, (275 * -(-shape[1] // 64) * 32,), dtype=torch.uint8, generator=generator)
        mask.view(275, -1, 4, 8)[:, -1, :, shape[1] % 64 // 8 or 8 :] = 0
        count = int(sum((mask >> bit & 1).sum() for bit in range(8)))
        where = {MASK: mask}
    else:
        count = _places(shape, 1, 2) if n else shape[0] * shape[1]
        where = {INDEX: torch.randint(256, (count // 8,), dtype=torch.uint8, generator=generator)} if n else {}
    if values == "int8":
        held = torch.randint(-127, 128, (count,), dtype=torch.int8, generator=generator)
        where[SCALE] = torch.rand(shape[0], generator=generator) / 127
    else:
        held = torch.randn(count, generator=generator)
    packing = None if format == "dense" else Packing(format, shape, "float32", values, count, n=n, m=m)
    parts = {VALUES: held, **where}
    if packing is not None:
        packing = replace(packing, crc32=checksum(parts))
        check("large", packing, parts)
    return format, shape, parts, packing


def product(found, x, bias=None):
    """Return x Wᵀ + b in float64, and how far from it sums in float32 can be."""
    exact, sizes = x.double() @ found.weights.T, x.double().abs() @ found.weights.abs().T
    if bias is not None:
        exact, sizes = exact + bias.double(), sizes + bias.double().abs()
    # No number is added more often: a vector has four lanes at least, of which a step of 9 columns fills one thrice.
    return exact, sizes * UNIT * (found.weights.shape[1] / 2 + 16) + 1e-37


def assert_product(y, found, x, bias=None, where=""):
    exact, allowed = product(found, x, bias)
    wrong = (y.double() - exact).abs() - allowed
    assert y.shape == exact.shape, where
    assert (wrong <= 0).all(), f"{where}: off by {wrong.max():.3g} more than rounding explains"
