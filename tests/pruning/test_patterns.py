"""Patterns against plain stable sorts: exact counts, ties, ragged edges, chunks, spellings."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import OptionError
from secateur.pruning import NM, Block, Matrix, Row, parse_pattern
from secateur.pruning.patterns import lowest

quick = settings(max_examples=80, deadline=None, derandomize=True)


def first(scores, count):
    """The indices that a stable ascending sort puts first."""
    return sorted(range(len(scores)), key=scores.__getitem__)[:count]


def span(per_column, start, columns):
    return round(per_column * (start + columns)) - round(per_column * start)


def oracle(pattern, score_OI, sparsity, start=0):
    """The mask by the definitions of the four patterns, in plain Python."""
    rows, columns = score_OI.shape
    keep = torch.ones(rows, columns, dtype=torch.bool)
    if isinstance(pattern, Row):
        for r in range(rows):
            keep[r, first(score_OI[r].tolist(), span(sparsity, start, columns))] = False
    elif isinstance(pattern, Matrix):
        flat = keep.view(-1)
        flat[first(score_OI.flatten().tolist(), span(sparsity * rows, start, columns))] = False
    elif isinstance(pattern, NM):
        for r in range(rows):
            for a in range(0, columns, pattern.m):
                group = score_OI[r, a : a + pattern.m].tolist()
                kept = -(-len(group) * pattern.n // pattern.m)
                keep[r, [a + j for j in first(group, len(group) - kept)]] = False
    else:
        corners = [(r, c) for r in range(0, rows, pattern.height) for c in range(0, columns, pattern.width)]
        tiles = [(slice(r, r + pattern.height), slice(c, c + pattern.width)) for r, c in corners]
        down = -(-rows // pattern.height)
        count = span(sparsity * down, start // pattern.width, len(tiles) // down)
        for t in first([score_OI[tile].double().square().mean().item() for tile in tiles], count):
            keep[tiles[t]] = False
    return keep


@st.composite
def scores(draw, tied=None):
    """Matrices of up to 7 x 20 scores: many equal ones, or all distinct."""
    rows, columns = draw(st.integers(1, 7)), draw(st.integers(1, 20))
    if draw(st.booleans()) if tied is None else tied:
        cells = draw(st.lists(st.integers(0, 3), min_size=rows * columns, max_size=rows * columns))
    else:
        cells = draw(st.permutations(range(rows * columns)))
    return torch.tensor(cells, dtype=torch.float32).reshape(rows, columns)


sparsities = st.one_of(st.sampled_from([0.0, 0.1, 0.29, 0.3, 0.5, 0.7, 0.99]), st.floats(0, 0.999))
PATTERNS = [Row(), Matrix(), NM(2, 4), NM(4, 8), NM(8, 16), NM(1, 4), NM(3, 5), Block(2, 3), Block(1, 4), Block(5, 1)]
patterns = st.sampled_from(PATTERNS)


# --- equal to a stable sort


@quick
@given(scores(), st.integers(0, 25))
def test_lowest_is_a_stable_sort(score, count):
    expected = torch.zeros_like(score, dtype=torch.bool)
    for r, row in enumerate(score.tolist()):
        expected[r, first(row, count)] = True
    assert torch.equal(lowest(score, count), expected)


@pytest.mark.parametrize("pattern", [Row(), Matrix(), NM(2, 4), NM(3, 5), NM(8, 16)], ids=str)
@quick
@given(score=scores(), sparsity=sparsities)
def test_mask_is_a_stable_sort(pattern, score, sparsity):
    assert torch.equal(pattern.mask(score, sparsity), oracle(pattern, score, sparsity))


@pytest.mark.parametrize("pattern", [Block(2, 3), Block(1, 4), Block(5, 1), Block(4, 4)], ids=str)
@quick
@given(score=scores(tied=False), sparsity=sparsities)
def test_block_mask_is_a_stable_sort_of_tiles(pattern, score, sparsity):
    assert torch.equal(pattern.mask(score, sparsity), oracle(pattern, score, sparsity))


@pytest.mark.parametrize("pattern", [Row(), Matrix(), Block(2, 3)], ids=str)
@quick
@given(score=scores(tied=False), sparsity=sparsities, chunks=st.integers(0, 5))
def test_later_chunk_is_a_stable_sort(pattern, score, sparsity, chunks):
    start = chunks * (pattern.selection_width or 1)
    assert torch.equal(pattern.mask(score, sparsity, start), oracle(pattern, score, sparsity, start))


# --- counts


@pytest.mark.parametrize(
    ("columns", "sparsity", "pruned"),
    [(10, 0.3, 3), (100, 0.29, 29), (100, 0.57, 57), (100, 0.58, 58), (10, 0.99, 10), (7, 0.5, 4), (7, 0.0, 0)],
)
def test_counts_are_rounded_not_floored(columns, sparsity, pruned):
    score = torch.rand(3, columns, generator=torch.Generator().manual_seed(0))
    assert (~Row().mask(score, sparsity)).sum(1).tolist() == [pruned] * 3
    assert (~Matrix().mask(score[:1], sparsity)).sum() == pruned
    assert (~Block(2, 2).mask(score.repeat(1, 2), sparsity)[::2, ::2]).sum() == round(sparsity * 2 * columns)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 1 / 3, 0.5, 0.77, 0.99])
def test_row_and_matrix_counts(sparsity):
    score = torch.rand(13, 31, generator=torch.Generator().manual_seed(1))
    assert (~Row().mask(score, sparsity)).sum(1).tolist() == [round(sparsity * 31)] * 13
    assert (~Matrix().mask(score, sparsity)).sum() == round(sparsity * 13 * 31)


def test_matrix_takes_from_where_the_scores_are_low():
    score = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    assert Matrix().mask(score, 0.5).tolist() == [[False] * 3, [True] * 3]
    assert Row().mask(score, 1 / 3).tolist() == [[False, True, True]] * 2


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (8, 16), (1, 4), (3, 5), (1, 2), (7, 8)])
@pytest.mark.parametrize("groups", [0, 1, 3])
def test_n_m_keeps_n_of_m_and_a_share_of_the_rest(n, m, groups):
    for rest in range(m):
        columns = groups * m + rest
        if not columns:
            continue
        mask = NM(n, m).mask(torch.rand(5, columns, generator=torch.Generator().manual_seed(rest)), 0.5)
        assert mask.shape == (5, columns)
        assert (mask[:, : groups * m].reshape(5, groups, m).sum(2) == n).all()
        assert (mask[:, groups * m :].sum(1) == -(-rest * n // m)).all()


def test_n_m_ignores_sparsity_and_names_its_own():
    score = torch.rand(4, 16, generator=torch.Generator().manual_seed(2))
    assert torch.equal(NM(1, 4).mask(score, 0.0), NM(1, 4).mask(score, 0.9))
    assert NM(1, 4).fixed_sparsity == 0.75
    assert [p.fixed_sparsity for p in (Row(), Matrix(), Block(2, 2))] == [None] * 3


def test_selection_width():
    assert [p.selection_width for p in (Row(), Matrix(), NM(2, 4), Block(8, 16))] == [None, None, 4, 16]


# --- ties: the lower index is pruned first


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (Row(), [[0, 0, 0, 0, 1, 1, 1, 1]] * 2),
        (Matrix(), [[0] * 8, [1] * 8]),
        (NM(1, 4), [[0, 0, 0, 1] * 2] * 2),
        (NM(2, 4), [[0, 0, 1, 1] * 2] * 2),
        (NM(3, 5), [[0, 0, 1, 1, 1, 0, 1, 1]] * 2),
        (Block(1, 2), [[0] * 8, [1] * 8]),
        (Block(2, 2), [[0, 0, 0, 0, 1, 1, 1, 1]] * 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_scores_go_in_order(pattern, expected, value):
    assert pattern.mask(torch.full((2, 8), value), 0.5).int().tolist() == expected


def test_only_the_ties_that_are_needed_go():
    assert lowest(torch.tensor([[2.0, 1.0, 2.0, 0.0, 2.0], [2.0, 2.0, 2.0, 2.0, 9.0]]), 3).int().tolist() == [
        [1, 1, 0, 1, 0],
        [1, 1, 1, 0, 0],
    ]


# --- blocks


@pytest.mark.parametrize("shape", [(8, 12), (9, 13), (3, 50), (1, 1), (4, 1)])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99])
def test_block_prunes_whole_tiles(shape, sparsity):
    height, width = 4, 3
    score = torch.rand(shape, generator=torch.Generator().manual_seed(3))
    mask = Block(height, width).mask(score, sparsity)
    tiles = [t for band in mask.split(height, 0) for t in band.split(width, 1)]
    assert all(t.all() or not t.any() for t in tiles)
    assert sum(not t.any() for t in tiles) == round(sparsity * len(tiles))


def test_ragged_tile_counts_by_its_mean():
    score = torch.ones(2, 5)
    score[:, 4] = 1.2  # the ragged tile: its sum, 2.88, is below a whole tile's 4; its mean is above
    assert Block(2, 2).mask(score, 2 / 3).int().tolist() == [[0, 0, 0, 0, 1]] * 2
    score[:, 4] = 0.9
    assert Block(2, 2).mask(score, 1 / 3).int().tolist() == [[1, 1, 1, 1, 0]] * 2


def test_block_score_is_the_sum_of_squares():
    score = torch.tensor([[3.0, 0.0, 2.0, 2.0]])  # sums 3 < 4, squares 9 > 8
    assert Block(1, 2).mask(score, 0.5).int().tolist() == [[1, 1, 0, 0]]
    assert torch.equal(Block(1, 2).mask(score * 1e30, 0.5), Block(1, 2).mask(score, 0.5))  # squares beyond float32


# --- chunks


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@quick
@given(data=st.data(), sparsity=sparsities)
def test_chunks_add_up_to_the_whole(pattern, data, sparsity):
    rows = data.draw(st.integers(1, 7))
    unit = pattern.selection_width or 1
    widths = data.draw(st.lists(st.integers(1, 5).map(lambda k: k * unit), min_size=1, max_size=5))
    widths[-1] -= data.draw(st.integers(0, unit - 1))  # the last chunk may be ragged
    score = torch.rand(rows, sum(widths), generator=torch.Generator().manual_seed(sum(widths)))
    starts = [sum(widths[:k]) for k in range(len(widths))]
    chunks = [pattern.mask(score[:, a : a + w], sparsity, a) for a, w in zip(starts, widths, strict=True)]
    mask, whole = torch.cat(chunks, 1), pattern.mask(score, sparsity)
    if isinstance(pattern, NM):
        assert torch.equal(mask, whole)
    elif isinstance(pattern, Row):
        assert torch.equal(mask.sum(1), whole.sum(1))
    else:  # tiles, or weights, by their top left corners
        step = (pattern.height, pattern.width) if isinstance(pattern, Block) else (1, 1)
        assert mask[:: step[0], :: step[1]].sum() == whole[:: step[0], :: step[1]].sum()


# --- spellings


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("row", Row()),
        ("matrix", Matrix()),
        ("2:4", NM(2, 4)),
        ("3:5", NM(3, 5)),
        ("16:32", NM(16, 32)),
        ("block:16x8", Block(16, 8)),
        ("block:1x1", Block(1, 1)),
        (" Row ", Row()),
        ("BLOCK:4X4", Block(4, 4)),
    ],
)
def test_parse_pattern(text, pattern):
    assert parse_pattern(text) == pattern
    assert parse_pattern(str(pattern)) == pattern


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("4:4", "0 < N < M"),
        ("5:4", "0 < N < M"),
        ("0:4", "0 < N < M"),
        ("block:0x4", "at least 1 row"),
        ("block:4x0", "at least 1 row"),
        ("rows", "did you mean row?"),
        ("matrx", "did you mean matrix?"),
        ("block:16", "block:RxC"),
        ("-2:4", "N:M"),
        ("2:4:8", "N:M"),
        ("", "row"),
    ],
)
def test_parse_pattern_errors_say_what_to_write(text, hint):
    with pytest.raises(OptionError) as caught:
        parse_pattern(text)
    assert hint in str(caught.value)
    assert repr(text) in str(caught.value)
