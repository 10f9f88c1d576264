"""Packed matrices against docs/formats.md, transcribed into plain loops over plain numbers."""

import random
import struct
import zlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import NumericsError, OptionError
from secateur.models.formats import (
    DTYPES,
    INTEGER,
    Packing,
    bits,
    check,
    checksum,
    pack,
    row_offsets,
    unpack,
    unpack_rows,
)
from tiny import bytes_of

# docs/formats.md, in loops. A matrix is a list of rows of integers: the bits of each weight.


def f32(number):
    return struct.unpack("<f", struct.pack("<f", number))[0]


def spec_bitmask(rows, columns, held):
    """Values and mask; ``held(r, c)`` says what stands for a weight."""
    values, mask = [], bytearray()
    for top in range(0, len(rows), 4):
        for left in range(0, columns, 64):
            for r in range(top, top + 4):
                for first in range(left, left + 64, 8):
                    byte = 0
                    for place in range(8):
                        c = first + place
                        if r < len(rows) and c < columns and rows[r][c] != 0:
                            byte += 2**place
                            values.append(held(r, c))
                    mask.append(byte)
    return values, bytes(mask)


def nm_groups(out, columns, m):
    """Row and first column of each group, in order."""
    step = 16 // m * m
    for top in range(0, out, 4):
        for left in range(0, columns, step):
            for r in range(top, top + 4):
                for first in range(left, left + step, m):
                    yield r, first


def spec_nm(rows, columns, held, n, m):
    """Values and index."""
    width = 1 if m == 2 else 2 if m <= 4 else 4
    values, places = [], []
    for r, first in nm_groups(len(rows), columns, m):
        group = [rows[r][c] if r < len(rows) and c < columns else 0 for c in range(first, first + m)]
        chosen = [p for p in range(m) if group[p] != 0]
        chosen += [p for p in range(m) if group[p] == 0][: n - len(chosen)]
        for p in sorted(chosen):
            values.append(held(r, first + p) if r < len(rows) and first + p < columns else 0)
            places.append(p)
    index = bytearray(-(-len(places) * width // 8))
    for number, place in enumerate(places):
        bit = number * width
        index[bit // 8] += place << bit % 8
    return values, bytes(index)


def spec_pack(W, packing):
    """The bytes of each part, by suffix, in the order of the table."""
    rows, columns = plain(W), W.shape[1]
    scales = None
    if packing.values == "int8":
        numbers = W.float().tolist()
        scales = [f32(max(map(abs, row)) / 127) or 1.0 for row in numbers]

        def held(r, c):
            return round(f32(numbers[r][c] / scales[r])) % 256

        size = 1
    else:

        def held(r, c):
            return rows[r][c]

        size = W.element_size()
    if packing.format == "bitmask":
        values, beside = spec_bitmask(rows, columns, held)
        suffix = "_mask"
    else:
        values, beside = spec_nm(rows, columns, held, packing.n, packing.m)
        suffix = "_index"
    parts = {"": b"".join((value % 256**size).to_bytes(size, "little") for value in values), suffix: beside}
    if scales is not None:
        parts["_scale"] = b"".join(struct.pack("<f", scale) for scale in scales)
    return parts


def spec_unpack(packing, parts):
    """The matrix of integers, from the bytes of the parts."""
    out, columns = packing.shape
    size = 1 if packing.values == "int8" else DTYPES[packing.dtype].itemsize
    stream = [int.from_bytes(parts[""][i : i + size], "little") for i in range(0, len(parts[""]), size)]
    rows = [[0] * columns for _ in range(out)]
    taken = 0
    if packing.format == "bitmask":
        across = -(-columns // 64)
        for number in range(8 * len(parts["_mask"])):
            if parts["_mask"][number // 8] >> number % 8 & 1:
                tile, inside = divmod(number, 256)
                r, c = tile // across * 4 + inside // 64, tile % across * 64 + inside % 64
                rows[r][c] = stream[taken]
                taken += 1
    else:
        width = 1 if packing.m == 2 else 2 if packing.m <= 4 else 4
        for r, first in nm_groups(out, columns, packing.m):
            for _ in range(packing.n):
                bit = taken * width
                place = parts["_index"][bit // 8] >> bit % 8 & 2**width - 1
                if r < out and first + place < columns:
                    rows[r][first + place] = stream[taken]
                taken += 1
    assert taken == len(stream)
    return rows


def plain(W):
    """The bits of a matrix as rows of integers that are not negative."""
    modulus = 256 ** W.element_size()
    return [[number % modulus for number in row] for row in bits(W).tolist()]


# Matrices.

SHAPES = [(1, 1), (1, 64), (5, 7), (3, 130), (4, 64), (8, 128), (9, 65), (2, 1), (33, 12)]
ALL = list(DTYPES)


def matrix(shape, dtype="float32", sparsity=0.5, seed=0):
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=g)
    return W.masked_fill(torch.rand(shape, generator=g) < sparsity, 0).to(DTYPES[dtype])


def n_of_m(shape, n, m, dtype="bfloat16", seed=0, lose=0.0):
    """Exactly n of every m, or a few less where `lose` takes some away."""
    g = torch.Generator().manual_seed(seed)
    rows, columns = shape
    groups = -(-columns // m)
    keep = torch.rand(rows, groups, m, generator=g).argsort(2).argsort(2) < n
    keep = keep.view(rows, -1)[:, :columns] & (torch.rand(shape, generator=g) >= lose)
    return (torch.randn(shape, generator=g) + 3).masked_fill(~keep, 0).to(DTYPES[dtype])


def random_bits(shape, dtype, sparsity, seed):
    """Any bits at all: infinities, NaN with payloads, subnormals."""
    random_ = random.Random(seed)
    size = DTYPES[dtype].itemsize
    modulus = 256**size
    found = [0 if random_.random() < sparsity else random_.randrange(modulus) for _ in range(shape[0] * shape[1])]
    data = bytearray(b"".join(number.to_bytes(size, "little") for number in found))
    return torch.frombuffer(data, dtype=DTYPES[dtype]).view(shape)


def specials(dtype):
    """-0.0, infinities, NaN of several payloads, the smallest subnormals, between zeros."""
    size = DTYPES[dtype].itemsize
    exponent = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}[dtype]
    sign = 1 << 8 * size - 1
    odd = [sign, 1, sign | 1, exponent, sign | exponent, exponent | 1, sign | exponent | 3, exponent - 1]
    data = b"".join(number.to_bytes(size, "little") + bytes(3 * size) for number in odd * 8)
    return torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]).view(4, 64)


def same_as_the_specification(W, format, values=None):
    """Pack by both, compare bytes; unpack by both, compare bits. Return what was packed, if it was."""
    packed = pack("w", W, format, values)
    if packed is None:
        return None
    packing, parts = packed
    expected = spec_pack(W, packing)
    assert list(parts) == list(packing.parts)
    assert {suffix: bytes_of(part) for suffix, part in parts.items()} == expected
    assert {suffix: (part.dtype, len(part)) for suffix, part in parts.items()} == packing.parts
    assert packing.bytes == sum(map(len, expected.values()))
    assert packing.crc32 == zlib.crc32(b"".join(expected[suffix] for suffix in packing.parts))
    check("w", packing, parts)
    back = unpack(packing, parts)
    whole = spec_unpack(packing, expected)
    if values is None:
        assert back.dtype == W.dtype
        assert plain(back) == whole == plain(W)
    else:
        scales = struct.unpack(f"<{len(W)}f", expected["_scale"])
        signed = [[v - 256 if v > 127 else v for v in row] for row in whole]
        assert back.dtype == torch.float32
        assert back.tolist() == [[f32(v * s) for v in row] for row, s in zip(signed, scales, strict=True)]
    return packed


# Bit for bit.


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", [0.3, 0.7, 1.0])
def test_bitmask_is_as_specified(dtype, shape, sparsity):
    for values in (None, "int8"):
        same_as_the_specification(matrix(shape, dtype, sparsity), "bitmask", values)


@pytest.mark.parametrize("dtype", ALL)
def test_bitmask_packs_whole_tiles_that_are_half_empty(dtype):
    assert same_as_the_specification(matrix((8, 128), dtype), "bitmask") is not None


@pytest.mark.parametrize("dtype", ALL)
def test_special_bits_survive_bitmask(dtype):
    packing, _ = same_as_the_specification(specials(dtype), "bitmask")
    assert packing.count == 64


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_special_bits_survive_nm(dtype):
    packing, _ = same_as_the_specification(specials(dtype), "nm")
    assert (packing.n, packing.m, packing.count) == (1, 4, 64)


def test_minus_zero_is_held_and_zero_is_not():
    W = torch.zeros(4, 64)
    W[1, 5] = -0.0
    packing, parts = pack("w", W, "bitmask")
    assert packing.count == 1
    assert plain(unpack(packing, parts)) == plain(W) != plain(torch.zeros(4, 64))


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("values", [None, "int8"])
def test_empty_and_full_rows(dtype, values):
    W = matrix((12, 64), dtype, 0.0)
    W[2], W[5], W[6], W[8:] = 0, 0, 0, 0
    packing, parts = same_as_the_specification(W, "bitmask", values)
    assert packing.count == 5 * 64


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("values", [None, "int8"])
def test_nothing_but_zeros(dtype, values):
    W = torch.zeros(8, 64, dtype=DTYPES[dtype])
    packing, parts = same_as_the_specification(W, "bitmask", values)
    assert packing.count == 0
    assert bytes_of(unpack(packing, parts)) == bytes_of(W.float() if values else W)


def test_nm_of_nothing_but_zeros_names_the_other_format():
    with pytest.raises(OptionError, match="bitmask"):
        pack("w", torch.zeros(8, 64), "nm")


@settings(max_examples=120, deadline=None)
@given(
    rows=st.integers(1, 13),
    columns=st.integers(1, 150),
    dtype=st.sampled_from(ALL),
    sparsity=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_any_bits_of_any_shape_come_back(rows, columns, dtype, sparsity, seed):
    W = random_bits((rows, columns), dtype, sparsity, seed)
    found = same_as_the_specification(W, "bitmask")
    count = int((bits(W) != 0).sum())
    takes = count * W.element_size() + -(-rows // 4) * -(-columns // 64) * 32
    assert (found is not None) == (takes < W.numel() * W.element_size())
    try:
        same_as_the_specification(W, "nm")
    except OptionError as error:
        assert "bitmask" in str(error)  # noqa: PT017


@settings(max_examples=80, deadline=None)
@given(
    m=st.integers(2, 16),
    part=st.floats(0, 1),
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    dtype=st.sampled_from(ALL),
    seed=st.integers(0, 2**32),
    values=st.sampled_from([None, "int8"]),
)
def test_any_n_of_any_m_comes_back(m, part, rows, columns, dtype, seed, values):
    n = 1 + int(part * (m - 2))
    try:
        same_as_the_specification(n_of_m((rows, columns), n, m, dtype, seed), "nm", values)
    except OptionError:
        assert columns % m  # only a ragged end can spoil it


def test_what_lies_otherwise_in_memory_is_the_same_matrix():
    W = matrix((64, 12), "bfloat16", 0.7)
    for strided in (W.T, torch.cat([W, W], 1)[:, :12], W[::2]):
        packing, parts = pack("w", strided, "bitmask")
        again, others = pack("w", strided.contiguous(), "bitmask")
        assert packing == again
        assert bytes_of(unpack(packing, parts)) == bytes_of(strided.contiguous())


# N:M.

PATTERNS = [(n, m) for m in range(2, 17) for n in range(1, m)]


def index_bits(m):
    return 1 if m == 2 else 2 if m <= 4 else 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_pattern_is_found_and_packed_if_that_is_smaller(dtype):
    size, kept_dense = DTYPES[dtype].itemsize, []
    for n, m in PATTERNS:
        step = 16 // m * m
        W = n_of_m((8, 15 * step), n, m, dtype, seed=n * m)
        packed = pack("w", W, "nm")
        count = 8 * 15 * (step // m) * n
        takes = count * size + -(-count * index_bits(m) // 8)
        if takes >= 8 * 15 * step * size:
            assert packed is None, (n, m)
            kept_dense.append((n, m))
            continue
        packing, parts = packed
        assert (packing.n, packing.m, packing.count, packing.bytes) == (n, m, count, takes)
        check("w", packing, parts)
        assert bytes_of(unpack(packing, parts)) == bytes_of(W)
    assert (15, 16) in kept_dense and len(kept_dense) < len(PATTERNS) / 3


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 3), (2, 4), (3, 5), (4, 8), (5, 12), (8, 16)])
@pytest.mark.parametrize("values", [None, "int8"])
@pytest.mark.parametrize("columns", [240, 250, 255])
def test_patterns_with_ragged_ends_and_gaps_are_as_specified(n, m, values, columns):
    W = n_of_m((16, columns), n, m, lose=0.01)
    packing, _ = same_as_the_specification(W, "nm", values)
    assert packing.n * m == packing.m * n  # 6:10 for 3:5 where it needs less padding


def test_a_group_with_fewer_values_holds_the_lowest_free_places():
    W = n_of_m((4, 64), 2, 4, "float32")
    W[0, :4] = torch.tensor([0.0, 0, 0, 5])
    W[1, :4] = torch.tensor([0.0, 7, 0, 0])
    W[2, :4] = 0
    packing, parts = same_as_the_specification(W, "nm")
    index = parts["_index"][:8:2]  # of the first groups of 4 rows
    assert [(int(byte) & 3, int(byte) >> 2 & 3) for byte in index[:3]] == [(0, 3), (0, 1), (0, 1)]


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
def test_zeros_without_a_pattern_are_refused_and_bitmask_named(sparsity):
    with pytest.raises(OptionError) as caught:
        pack("model.layers.0.mlp.up_proj.weight", matrix((64, 256), sparsity=sparsity), "nm")
    said = str(caught.value)
    assert said.startswith("model.layers.0.mlp.up_proj.weight: ") and "bitmask" in said and "\n" not in said


def test_a_dense_matrix_has_no_pattern_to_find():
    assert pack("w", matrix((8, 64), sparsity=0.0), "nm") is None


# Bytes.


def exactly(sparsity, dtype="bfloat16", shape=(256, 640)):
    W = torch.ones(shape[0] * shape[1])
    removed = torch.randperm(len(W), generator=torch.Generator().manual_seed(1))[: round(sparsity * len(W))]
    W[removed] = 0
    return W.view(shape).to(DTYPES[dtype])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("sparsity", "share"), [(0.5, 0.5625), (0.6, 0.4625), (0.7, 0.3625)])
def test_bitmask_takes_what_was_predicted(dtype, sparsity, share):
    W = exactly(sparsity, dtype)
    packing, parts = pack("w", W, "bitmask")
    assert packing.bytes == sum(len(bytes_of(part)) for part in parts.values()) == share * 2 * W.numel()
    assert packing.predicted_bytes == packing.bytes


def test_eight_bits_take_what_was_predicted():
    W = exactly(0.5)
    packing, parts = pack("w", W, "bitmask", "int8")
    assert packing.predicted_bytes == 0.3125 * 2 * W.numel()
    assert packing.bytes == packing.predicted_bytes + 4 * len(W) == sum(len(bytes_of(p)) for p in parts.values())


@pytest.mark.parametrize(("n", "m", "share"), [(2, 4, 0.5625), (4, 8, 0.625), (8, 16, 0.625)])
def test_nm_takes_what_was_predicted(n, m, share):
    W = n_of_m((64, 320), n, m)
    packing, parts = pack("w", W, "nm")
    assert packing.predicted_bytes == packing.bytes == share * 2 * W.numel()
    assert packing.bytes == sum(len(bytes_of(part)) for part in parts.values())


@pytest.mark.parametrize("values", [None, "int8"])
def test_odd_shapes_take_little_more_than_predicted(values):
    W = matrix((101, 1001), "bfloat16")
    packing, _ = pack("w", W, "bitmask", values)
    assert 1 <= packing.bytes / packing.predicted_bytes < 1.02


@pytest.mark.parametrize(("shape", "sparsity"), [((1, 1), 1.0), ((1, 1), 0.0), ((4, 64), 0.0), ((1, 64), 0.2)])
def test_what_would_not_shrink_is_not_packed(shape, sparsity):
    assert pack("w", matrix(shape, "bfloat16", sparsity), "bitmask") is None


def test_what_is_as_large_packed_is_not_packed():
    W = torch.ones(4, 64, dtype=torch.bfloat16)
    W.view(-1)[:16] = 0  # 32 bytes of mask for 32 bytes of zeros
    assert pack("w", W, "bitmask") is None
    W.view(-1)[16] = 0
    assert pack("w", W, "bitmask") is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_other_dtypes_are_not_packed(dtype):
    assert pack("w", torch.zeros(8, 64).to(dtype), "bitmask") is None


# Eight bits.


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("format", ["bitmask", "nm"])
def test_rounding_is_off_by_half_a_step_of_its_row_at_most(dtype, format):
    W = n_of_m((64, 320), 2, 4, dtype) * (10.0 ** torch.arange(-3, 1).repeat(16))[:, None].to(DTYPES[dtype])
    packing, parts = pack("w", W, format, "int8")
    off = (unpack(packing, parts) - W.float()).abs().amax(1)
    step = W.float().abs().amax(1) / 127
    assert (off <= step / 2 * (1 + 1e-5)).all()
    assert (off > step / 4).all()  # it does round
    assert (parts[""].abs().int().view(-1) <= 127).all()
    assert torch.equal(unpack(packing, parts)[W == 0], torch.zeros(int((W == 0).sum())))


def test_the_largest_of_a_row_survives_and_small_ones_stay_held():
    W = torch.zeros(4, 64)
    W[:, 0], W[:, 1] = torch.tensor([1.0, -2, 3, 127]), 1e-6
    packing, parts = pack("w", W, "bitmask", "int8")
    assert packing.count == 8
    assert torch.allclose(unpack(packing, parts)[:, 0], W[:, 0], rtol=1e-6)
    assert (unpack(packing, parts)[:, 1] == 0).all()


@pytest.mark.parametrize("largest", [1, 63, 64, 127, 189, 190, 300, 1000])
def test_rows_of_subnormal_numbers_never_change_their_sign(largest):
    """A scale that is subnormal itself is coarse; a value must not leave 8 bits for it."""
    W = torch.zeros(4, 64)
    W[0, :8] = torch.tensor([largest, -largest] * 4, dtype=torch.int32).double().mul(2.0**-149).float()
    packing, parts = pack("w", W, "bitmask", "int8")
    off = (unpack(packing, parts).double() - W.double()).abs().max().item()
    assert off <= largest * 2.0**-149


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_what_has_no_scale_is_not_rounded(odd):
    W = matrix((8, 64), "bfloat16")
    W[3, 7] = odd
    with pytest.raises(NumericsError, match=r"^w: "):
        pack("w", W, "bitmask", "int8")


# A few rows at a time.


@pytest.mark.parametrize("shape", [(5, 9), (16, 64), (13, 130), (4, 300), (3, 66)])
@pytest.mark.parametrize("values", [None, "int8"])
@pytest.mark.parametrize("format", ["bitmask", "nm"])
def test_rows_are_those_of_the_whole(shape, values, format):
    W = n_of_m(shape, 1, 3, "float32") if format == "nm" else matrix(shape, "float32", 0.9)
    packing, parts = pack("w", W, format, values)
    whole, offsets = unpack(packing, parts), row_offsets(packing, parts)
    assert len(offsets) == -(-shape[0] // 4) + 1
    assert (int(offsets[0]), int(offsets[-1])) == (0, packing.count)
    for start in range(0, shape[0], 4):
        for stop in range(start + 1, shape[0] + 1):
            assert torch.equal(unpack_rows(packing, parts, offsets, start, stop), whole[start:stop]), (start, stop)


@pytest.mark.parametrize("format", ["bitmask", "nm"])
def test_rows_have_the_dtype_that_the_values_have_now(format):
    W = n_of_m((13, 64), 2, 4)
    packing, parts = pack("w", W, format)
    cast = {**parts, "": parts[""].double()}
    found = unpack_rows(packing, cast, row_offsets(packing, cast), 4, 13)
    assert found.dtype == torch.float64 and torch.equal(found, W[4:].double())


# What config.json says.


@pytest.mark.parametrize("format", ["bitmask", "nm"])
@pytest.mark.parametrize("values", [None, "int8"])
@pytest.mark.parametrize("transposed", [False, True])
def test_an_entry_comes_back(format, values, transposed):
    packing, _ = pack("w", n_of_m((8, 64), 2, 4), format, values)
    packing = replace(packing, transposed=transposed)
    entry = packing.to_json()
    assert Packing.from_json("w", entry) == packing
    keys = {"format", "shape", "dtype", "values", "count", "crc32"}
    assert set(entry) == keys | ({"n", "m"} if format == "nm" else set()) | ({"transposed"} if transposed else set())
    assert list(entry["shape"]) == [8, 64]


def test_the_checksum_is_of_all_parts_in_order():
    packing, parts = pack("w", n_of_m((8, 64), 2, 4), "nm", "int8")
    assert list(parts) == ["", "_index", "_scale"]
    assert checksum(parts) == zlib.crc32(b"".join(map(bytes_of, parts.values()))) == packing.crc32
    assert checksum(dict(reversed(parts.items()))) != packing.crc32


def test_zero_means_that_all_bits_are_zero():
    assert {size: dtype.itemsize for size, dtype in INTEGER.items()} == {4: 4, 2: 2, 1: 1}
    assert bits(torch.tensor([0.0, -0.0])).tolist() == [0, -(2**31)]
