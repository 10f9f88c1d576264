"""Every kernel against the matrix unpacked and multiplied in float64, within what float32 sums may differ by."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packings import (
    FORMATS,
    KERNELS,
    VALUE_TYPES,
    assert_product,
    available,
    large,
    normal,
    packed,
    product,
    seen,
    sparse,
)
from secateur.models.formats import VALUES
from secateur.runtime import kernels
from secateur.runtime.kernels import KernelMatrix

SHAPES = [(1, 1), (5, 7), (3, 130), (4, 64), (6, 65), (33, 200), (130, 1030)]
PATTERNS = [(1, 2), (2, 4), (4, 8), (8, 16), (3, 7), (6, 9), (1, 3)]
BATCHES = (1, 2, 7, 8, 9, 17)
EVERY_PATTERN = [(n, m) for m in range(2, 17) for n in range(1, m)]


def cases():
    """A matrix of each shape, with a pattern for ``nm``."""
    for number, (shape, pattern) in enumerate(zip(SHAPES, PATTERNS, strict=True)):
        for format in FORMATS:
            yield format, sparse(shape, pattern if format == "nm" else None, seed=number), pattern


@pytest.mark.parametrize("values", VALUE_TYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_products_of_every_shape_and_batch(format, values, kernel):
    for own, W, pattern in cases():
        if own == format:
            found = packed(W, format, values, pattern)
            for batch in BATCHES:
                x = normal(batch, W.shape[1], seed=batch)
                assert_product(found.matrix.linear(x), found, x, where=f"{tuple(W.shape)}, batch {batch}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
def test_inputs_of_16_bits_give_what_float32_does_rounded(format, dtype, kernel):
    for own, W, pattern in cases():
        for values in VALUE_TYPES if own == format else ():
            found = packed(W, format, values, pattern)
            for batch in BATCHES:
                x = normal(batch, W.shape[1], seed=batch).to(dtype)
                assert torch.equal(found.matrix.linear(x), found.matrix.linear(x.float()).to(dtype)), (W.shape, values)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("values", VALUE_TYPES)
def test_every_pattern(values, batch, kernel):
    for n, m in EVERY_PATTERN:
        found = packed(sparse((7, 53), (n, m), seed=n), "nm", values, (n, m))
        x = normal(batch, 53)
        assert_product(found.matrix.linear(x), found, x, where=f"{n}:{m}")


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("values", VALUE_TYPES)
def test_every_place_of_a_matrix(values, batch, kernel):
    """One weight alone, wherever it stands, is multiplied with its own input."""
    x = torch.arange(1, 71).float().repeat(batch, 1)
    for place in range(0, 6 * 70, 11):
        W = torch.zeros(6, 70)
        W[place // 70, place % 70] = 1
        for format, pattern in (("dense", None), ("bitmask", None), ("nm", (2, 4)), ("nm", (1, 16))):
            y = packed(W, format, values, pattern).matrix.linear(x)
            assert (y - x @ W.T).abs().max() <= 1e-4, (place, format)


def extremes():
    """Rows that are empty or full, by name."""
    full, none = normal(9, 200), torch.zeros(9, 200)
    even, last = none.clone(), none.clone()
    even[::2] = full[::2]
    last[-1, -1] = 1
    blocks = full.clone()
    blocks[:, 64:128] = 0
    return {"full": full, "zeros": none, "every other row": even, "only the last": last, "an empty block": blocks}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", extremes())
def test_rows_that_are_empty_or_full(name, batch, kernel):
    W, x = extremes()[name], normal(batch, 200)
    for values in VALUE_TYPES:
        for format in FORMATS:
            pruned = sparse(W.shape, (15, 16)) == 0 if format == "nm" else W == 0
            found = packed(W.masked_fill(pruned, 0), format, values, (15, 16))
            y = found.matrix.linear(x)
            assert_product(y, found, x, where=f"{format} {values}")
            assert (y[:, (found.weights == 0).all(1)] == 0).all()
            assert torch.equal(found.matrix.unpack(0, 9).double(), found.weights)


@pytest.mark.parametrize("format", FORMATS)
def test_bias(format, kernel):
    found = packed(sparse((7, 20), (2, 4)), format, pattern=(2, 4))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        bias = normal(7, seed=5).to(dtype)
        for batch in (1, 9):
            x = normal(batch, 20)
            assert_product(found.matrix.linear(x, bias), found, x, bias, where=f"{dtype}")


def test_bias_alone_where_all_weights_are_zero(kernel):
    bias = normal(7)
    for format in FORMATS:
        y = packed(torch.zeros(7, 20), format, pattern=(2, 4)).matrix.linear(normal(3, 20), bias)
        assert torch.equal(y, bias.expand(3, 7))


def test_inputs_of_every_number_of_axes(kernel):
    found = packed(sparse((7, 20)), "bitmask")
    x = normal(2, 3, 20)
    y = found.matrix.linear(x)
    assert y.shape == (2, 3, 7)
    assert_product(y.view(6, 7), found, x.view(6, 20))
    assert found.matrix.linear(x[0, 0]).shape == (7,)
    assert found.matrix.linear(x[:, :0]).shape == (2, 0, 7)
    assert torch.equal(found.matrix.linear(x.transpose(0, 1)), y.transpose(0, 1))


@st.composite
def problems(draw):
    """A matrix with a pattern, inputs and perhaps a bias."""
    m = draw(st.integers(2, 16))
    n = draw(st.integers(1, m - 1))
    shape = draw(st.integers(1, 14)), draw(st.integers(1, 150))
    format, seed = draw(st.sampled_from(FORMATS)), draw(st.integers(0, 99))
    W = sparse(shape, (n, m) if format == "nm" else None, seed, draw(st.sampled_from([0, 0.1, 0.5, 0.9, 1])))
    found = packed(W, format, draw(st.sampled_from(VALUE_TYPES)), (n, m))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    x = normal(draw(st.integers(1, 18)), shape[1], seed=seed + 7).to(dtype)
    return found, x, normal(shape[0]) if draw(st.booleans()) else None


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems())
def test_any_problem(problem):
    found, x, bias = problem
    try:
        for name in filter(kernels.use, KERNELS):
            y = found.matrix.linear(x.float(), bias)
            assert_product(y, found, x, bias, name)
            assert torch.equal(found.matrix.linear(x, bias), y.to(x.dtype))
            assert torch.equal(found.matrix.unpack(0, len(found.weights)).double(), found.weights)
    finally:
        kernels.use(None)


def test_kernels_agree():
    """With each other more closely than with float64: the same numbers are summed."""
    names = available()
    for format, W, pattern in cases():
        for values in VALUE_TYPES:
            found, x = packed(W, format, values, pattern), normal(3, W.shape[1])
            _, allowed = product(found, x)
            ys = [found.matrix.linear(x) for name in names if kernels.use(name)]
            kernels.use(None)
            assert all(((y - ys[0]).abs() <= allowed).all() for y in ys)


def test_an_unknown_name_changes_nothing(kernel):
    assert kernels.use("abacus") is None
    found, x = packed(sparse((8, 64)), "bitmask", "int8"), normal(1, 64)
    assert_product(found.matrix.linear(x), found, x)


# Where things lie in memory, and who computes.


def at_odd_address(tensor, offset):
    """The same numbers, `offset` bytes into a larger buffer."""
    room = bytearray(tensor.numel() * tensor.element_size() + offset + 1)
    view = torch.frombuffer(room, dtype=tensor.dtype, offset=offset, count=tensor.numel()) if tensor.numel() else tensor
    return view.copy_(tensor.flatten()).view(tensor.shape)


@pytest.mark.parametrize("offset", [1, 2, 3, 5])
@pytest.mark.parametrize("values", VALUE_TYPES)
def test_parts_and_inputs_at_any_address(values, offset, kernel):
    for format in FORMATS:
        found = packed(sparse((7, 200), (2, 4)), format, values, (2, 4))
        parts = {suffix: at_odd_address(part, offset) for suffix, part in found.parts.items()}
        moved = KernelMatrix(format, (7, 200), parts, found.packing)
        assert parts[VALUES].data_ptr() % 8 == offset
        assert torch.equal(moved.unpack(0, 7), found.matrix.unpack(0, 7))
        for batch in (1, 3):
            x, bias = normal(batch, 200), normal(7)
            y = moved.linear(at_odd_address(x, offset), at_odd_address(bias, offset))
            assert torch.equal(y, found.matrix.linear(x, bias))


@pytest.mark.parametrize(("format", "values"), [("dense", "float32"), ("bitmask", "float32"), ("nm", "int8")])
def test_every_number_of_threads_gives_the_same_bits(format, values, kernel, threads):
    matrix = KernelMatrix(*large(format, values))
    x = normal(3, matrix.columns)
    for batch in (1, 3):
        found = []
        for number in (1, 2, 4):
            threads(number)
            found.append((matrix.linear(x[:batch]), matrix.linear(x[:batch], None, values == "int8")))
        for y, y8 in found[1:]:
            assert torch.equal(y, found[0][0]) and torch.equal(y8, found[0][1])


@pytest.mark.parametrize(("format", "values"), [("bitmask", "float32"), ("nm", "int8")])
def test_large_products_are_right_on_threads(format, values, kernel, threads):
    found = seen(*large(format, values))
    x = normal(2, found.matrix.columns)
    threads(3)
    assert_product(found.matrix.linear(x), found, x)
    assert torch.equal(found.matrix.unpack(0, found.matrix.rows).double(), found.weights)
