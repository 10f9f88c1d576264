"""Kernels and numbers that are not ordinary: every bit unpacked, rounding to 16 bits, NaN, infinities, extremes."""

import math

import pytest
import torch

from packings import FORMATS, VALUE_TYPES, assert_product, normal, packed, seen, sparse
from secateur.models.formats import DTYPES, SCALE, bits, row_offsets, unpack, unpack_rows

FLOATS = ("float32", "bfloat16", "float16")


def same_bits(a, b):
    """NaN may have other bits: processors make the signalling ones quiet."""
    assert a.dtype == b.dtype and a.shape == b.shape
    return bool(((bits(a) == bits(b)) | (a.isnan() & b.isnan())).all())


def every_16_bits(dtype):
    """Every number of a 16-bit type but +0, which no format holds."""
    return torch.arange(1 - 2**15, 2**15 + 1).to(torch.int16).view(DTYPES[dtype])[:-1].view(-1, 1)


def odd_float32():
    """Numbers of all sizes, those halfway between 16-bit ones and their neighbours among them."""
    whole = torch.cat([every_16_bits(dtype).float().view(-1) for dtype in ("bfloat16", "float16")])
    around = [bits(whole) + offset for offset in (0, 0x7FFF, 0x8000, 0x8001, 0xFFF, 0x1000, 0x1001)]
    found = torch.cat(around).view(torch.float32)
    return found[bits(found) != 0]


# Unpacking.


@pytest.mark.parametrize("values", FLOATS)
@pytest.mark.parametrize("format", FORMATS)
def test_every_number_is_unpacked_bit_for_bit(format, values, kernel):
    numbers = every_16_bits(values) if values != "float32" else odd_float32()[:200000]
    W = torch.zeros(-(-len(numbers.view(-1)) // 66), 132, dtype=DTYPES[values])
    W.view(-1)[: 2 * len(numbers.view(-1)) : 2] = numbers.view(-1)
    found = packed(W, format, values, (1, 2))
    assert same_bits(found.matrix.unpack(0, len(W)), W.float())


@pytest.mark.parametrize("values", VALUE_TYPES)
@pytest.mark.parametrize("format", ["bitmask", "nm"])
def test_unpacking_is_what_the_format_says(format, values, kernel):
    for shape in ((1, 1), (5, 7), (33, 200), (6, 65)):
        for pattern in ((2, 4), (3, 7), (11, 16)):
            found = packed(sparse(shape, pattern), format, values, pattern)
            assert same_bits(found.matrix.unpack(0, shape[0]), unpack(found.packing, found.parts).float())


@pytest.mark.parametrize("format", ["bitmask", "nm"])
def test_rows_are_unpacked_from_any_tile_to_any(format, kernel):
    found = packed(sparse((22, 70), (2, 4)), format, "int8", (2, 4))
    offsets = row_offsets(found.packing, found.parts)
    for start in range(0, 22, 4):
        for stop in [*range(start + 4, 22, 4), 22]:
            expected = unpack_rows(found.packing, found.parts, offsets, start, stop)
            assert torch.equal(found.matrix.unpack(start, stop), expected)
    assert found.matrix.unpack(8, 8).shape == (0, 70)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
def test_unpacking_rounds_as_torch_does(format, dtype, kernel):
    numbers = odd_float32()[::5]
    W = torch.zeros(-(-len(numbers) // 60), 120)
    W.view(-1)[: 2 * len(numbers) : 2] = numbers
    assert same_bits(packed(W, format, pattern=(1, 2)).matrix.unpack(0, len(W), dtype), W.to(dtype))
    for values in VALUE_TYPES:
        found = packed(sparse((9, 70), (2, 4)), format, values, (2, 4))
        assert same_bits(found.matrix.unpack(0, 9, dtype), found.matrix.unpack(0, 9).to(dtype))


# Rounding.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_are_rounded_as_torch_rounds(dtype, kernel):
    W = odd_float32().view(-1, 1)
    y = packed(W, "dense").matrix.linear(torch.ones(1, dtype=dtype))
    assert torch.equal(y.isnan(), W.view(-1).isnan())
    assert torch.equal(y.nan_to_num(7), W.view(-1).to(dtype).nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_of_16_bits_are_read_exactly(dtype, kernel):
    x = every_16_bits(str(dtype).removeprefix("torch."))
    for format in FORMATS:
        y = packed(torch.ones(1, 1), format, pattern=(1, 2)).matrix.linear(x)
        assert torch.equal(y.isnan(), x.isnan())
        assert torch.equal(y.nan_to_num(7), x.nan_to_num(7))


# NaN and infinities.


def assert_same_kinds(y, x, weights):
    """NaN where a dense product has it, and infinities likewise."""
    exact = x.double() @ weights.T
    assert torch.equal(y.isnan(), exact.isnan())
    assert torch.equal(y.isinf(), exact.isinf())
    assert ((y.double() == exact) | ~exact.isinf()).all()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("values", VALUE_TYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_inputs_that_are_not_finite(format, values, number, batch, kernel):
    for shape in ((6, 37), (5, 65)):
        found = packed(sparse(shape, (2, 4)), format, values, (2, 4))
        for column in range(0, shape[1], 3):
            x = normal(batch, shape[1])
            x[-1, column] = number
            assert_same_kinds(found.matrix.linear(x), x, found.weights)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("values", FLOATS)
@pytest.mark.parametrize("format", FORMATS)
def test_weights_that_are_not_finite(format, values, number, batch, kernel):
    for place in range(0, 6 * 37, 5):
        W = sparse((6, 37), (2, 4))
        W[W != 0] = torch.where(torch.arange(int((W != 0).sum())) == place % 111, number, W[W != 0])
        found, x = packed(W, format, values, (2, 4)), normal(batch, 37)
        assert_same_kinds(found.matrix.linear(x), x, found.weights)


# Extremes.


@pytest.mark.parametrize("values", VALUE_TYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_small_and_large_numbers(format, values, kernel):
    """Sums are in float32: a product of small weights and large inputs is as exact as any other."""
    for size in (1e-6, 1e-3, 1e4) if values == "float16" else (1e-28, 1e-12, 1e12, 1e28):
        found = packed(sparse((6, 37), (2, 4)) * size, format, values, (2, 4))
        x = normal(3, 37) / size
        assert_product(found.matrix.linear(x), found, x, where=f"{size}")


@pytest.mark.parametrize("format", FORMATS)
def test_8_bit_weights_of_very_small_scale(format, kernel):
    found = packed(sparse((6, 37), (2, 4)), format, "int8", (2, 4))
    parts = {**found.parts, SCALE: torch.tensor([1e-30, 1e-33, 1e-36, 2e-38, 1e-31, 1e-35])}
    found = seen(format, (6, 37), parts, found.packing)
    assert torch.equal(found.matrix.unpack(0, 6).double(), found.weights)
    x = normal(2, 37) * 1e25
    assert_product(found.matrix.linear(x), found, x)
