"""8-bit activations: whole numbers are multiplied, inputs rounded with one scale for each 64 slots (kernels.h)."""

import math

import pytest
import torch

from packings import available, normal, packed, seen, sparse
from secateur.models.formats import SCALE, VALUES
from secateur.runtime import kernels

EVERY_PATTERN = [(n, m) for m in range(2, 17) for n in range(1, m)]
SHAPES = [(1, 1), (5, 7), (3, 130), (6, 65), (4, 64), (33, 200), (9, 513)]


def made(shape, pattern, seed=0):
    """8-bit weights, for ``nm`` where there is a pattern."""
    return packed(sparse(shape, pattern, seed), "nm" if pattern else "dense", "int8", pattern)


def slots_of(columns, pattern):
    """The slot of each column: of a step of 16, the first floor(16 / M) * M are columns."""
    wide = 16 // pattern[1] * pattern[1] if pattern else 16
    column = torch.arange(columns)
    return column // wide * 16 + column % wide


def rounded(x, slots):
    """Inputs as whole numbers and the scale of each of them."""
    blocks = -(-int(slots.max() + 1) // 64)
    laid_out = torch.zeros(len(x), blocks * 64).index_copy(1, slots, x.float()).view(len(x), blocks, 64)
    most = laid_out.abs().amax(2, keepdim=True)
    whole = (laid_out * torch.where(most > 0, 127 / most, 0)).round()  # half to even
    return whole.flatten(1)[:, slots].double(), (most / 127).expand_as(whole).flatten(1)[:, slots].double()


def transcribed(found, x, pattern):
    """Sums of whole numbers times both scales, in float64, and how far from it scaled sums in float32 can be."""
    whole, scales = rounded(x, slots_of(x.shape[1], pattern))
    exact = (whole * scales) @ found.weights.T
    blocks = x.shape[1] // 36 + 1
    return exact, (whole * scales).abs() @ found.weights.abs().T * 2.0**-24 * (blocks + 8) + 1e-37


def assert_transcribed(found, x, pattern, where=""):
    exact, allowed = transcribed(found, x, pattern)
    wrong = (found.matrix.linear(x, activations8=True).double() - exact).abs() - allowed
    assert (wrong <= 0).all(), f"{where}: off by {wrong.max():.3g} more than rounding explains"


@pytest.mark.parametrize("batch", [1, 3, 9])
def test_every_shape(batch, kernel):
    for shape in SHAPES:
        for pattern in (None, (1, 2), (2, 4), (3, 4), (4, 8), (6, 8), (8, 16), (4, 16), (3, 7)):
            assert_transcribed(made(shape, pattern), normal(batch, shape[1], seed=3), pattern, f"{shape} {pattern}")


@pytest.mark.parametrize("columns", [37, 144, 163])
def test_every_pattern(columns, kernel):
    for pattern in EVERY_PATTERN:
        assert_transcribed(made((7, columns), pattern), normal(2, columns), pattern, f"{pattern}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_of_16_bits_give_what_float32_does_rounded(dtype, kernel):
    found, bias = made((7, 200), (4, 8)), normal(7)
    x = normal(3, 200).to(dtype)
    expected = found.matrix.linear(x.float(), bias, activations8=True)
    assert torch.equal(found.matrix.linear(x, bias, activations8=True), expected.to(dtype))
    assert torch.equal(expected, found.matrix.linear(x.float(), activations8=True) + bias)


def test_whole_numbers_that_need_no_rounding_are_exact(kernel):
    """The largest of each block is 127, so that its scale is 1; sums stay below 2^24."""
    x = torch.randint(-127, 128, (3, 256), generator=torch.Generator().manual_seed(1)).float()
    x[:, ::64] = 127
    for pattern in ((2, 4), (4, 8), (8, 16), (12, 16), (1, 2), (15, 16)):
        found = made((8, 256), pattern)
        found = seen("nm", (8, 256), {**found.parts, SCALE: torch.ones(8)}, found.packing)
        assert torch.equal(found.matrix.linear(x, activations8=True).double(), x.double() @ found.weights.T)


@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_the_largest_numbers_do_not_overflow(signs, kernel):
    for pattern in (None, (2, 4), (8, 16), (12, 16)):
        found = made((8, 256), pattern)
        parts = {**found.parts, VALUES: torch.full_like(found.parts[VALUES], 127 * signs[0])}
        found = seen("nm" if pattern else "dense", (8, 256), parts, found.packing)
        assert_transcribed(found, torch.full((2, 256), 3.0 * signs[1]), pattern, f"{pattern}")


@pytest.mark.parametrize("pattern", [None, (2, 4), (8, 16), (15, 16)])
def test_weights_of_minus_128(pattern, kernel):
    """Packing writes none, but a checkpoint may hold them, and unpacking reads them."""
    found = made((8, 256), pattern)
    parts = {**found.parts, VALUES: torch.full_like(found.parts[VALUES], -128)}
    found = seen("nm" if pattern else "dense", (8, 256), parts, found.packing)
    for x in (normal(2, 256), torch.full((1, 256), -1.0)):
        assert_transcribed(found, x, pattern)


def test_kernels_agree_but_for_the_order_of_float32_sums():
    for pattern in (None, (2, 4), (4, 8), (8, 16), (6, 8), (7, 9)):
        found, x = made((33, 1030), pattern), normal(3, 1030)
        _, allowed = transcribed(found, x, pattern)
        ys = [found.matrix.linear(x, activations8=True) for name in available() if kernels.use(name)]
        kernels.use(None)
        assert all(((y - ys[0]).abs() <= allowed).all() for y in ys)


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (8, 16), (3, 7)])
def test_it_is_within_a_hundredth_and_a_half_of_the_exact_product(pattern, kernel):
    found, x = made((96, 768), pattern), normal(4, 768)
    exact = x.double() @ found.weights.T
    y = found.matrix.linear(x, activations8=True).double()
    assert (y - exact).norm() < 0.015 * exact.norm()
    assert (y - exact).norm() > 0.0005 * exact.norm()  # the option is not ignored


def test_a_large_input_coarsens_its_own_block_alone(kernel):
    found, x = made((8, 256), (2, 4)), normal(1, 256)
    x[0, 70] = 1e6
    weights = found.weights.clone()
    weights[:, 64:128] = 0
    found.matrix.tensors[VALUES].view(2, -1, 4, 8)[:, 4:8] = 0
    exact = x.double() @ weights.T
    assert (found.matrix.linear(x, activations8=True).double() - exact).norm() < 0.015 * exact.norm()


def test_zeros_give_zeros(kernel):
    found = made((8, 100), (2, 4))
    assert (found.matrix.linear(torch.zeros(2, 100), activations8=True) == 0).all()
    assert (found.matrix.linear(torch.full((2, 100), 1e-42), activations8=True).abs() < 1e-37).all()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("pattern", [None, (2, 4), (3, 7), (8, 16)])
def test_inputs_that_are_not_finite_make_nan(pattern, number, kernel):
    """As a dense product would, or NaN in place of an infinity."""
    for columns in (64, 70, 130):
        found, x = made((5, columns), pattern), normal(2, columns)
        x[1, -1] = number
        y = found.matrix.linear(x, activations8=True)
        assert y[1].isnan().all() and y[0].isfinite().all()


def test_they_are_refused_without_8_bit_values_of_a_pattern(kernel):
    W, x = sparse((8, 64), (2, 4)), normal(1, 64)
    for format, values in (("bitmask", "int8"), ("bitmask", "float32"), ("nm", "bfloat16"), ("dense", "float32")):
        with pytest.raises(NotImplementedError, match="8-bit"):
            packed(W, format, values, (2, 4)).matrix.linear(x, activations8=True)
