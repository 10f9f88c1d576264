"""Statistics are sums: against float64, in any order, from any dtype, and merging is addition."""

import itertools

import pytest
import torch

from secateur.pruning import GRAM, SUM, SUMSQ, Accumulator, Statistics

ALL = (SUM, SUMSQ, GRAM)


def inputs(tokens, columns, seed=0):
    """Correlated tokens with a mean, one loud column."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=g) @ torch.randn(columns, columns, generator=g) / columns**0.5 + 0.3
    x[:, 0] *= 50
    return x


def assert_sums(statistics, x, rtol=1e-5):
    """The sums equal those of x in float64, to a fraction of the columns' norms."""
    x = x.double().reshape(-1, x.shape[-1])
    norm = x.square().sum(0).sqrt()
    assert statistics.tokens == len(x)
    for got, want, scale in [
        (statistics.sum_I, x.sum(0), x.abs().sum(0)),
        (statistics.sumsq_I, x.square().sum(0), norm.square()),
        (statistics.gram_II, x.T @ x, norm[:, None] * norm),
    ]:
        if got is not None:
            assert ((got.double() - want).abs() <= rtol * scale).all()


def assert_same(a, b, rtol=1e-5):
    assert a.tokens == b.tokens
    for name in ("sum_I", "sumsq_I", "gram_II"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=rtol, atol=rtol * 100)


@pytest.mark.parametrize("columns", [1, 2, 191, 192, 193, 400])
@pytest.mark.parametrize("needs", [ALL, (SUM, SUMSQ)], ids="+".join)
def test_sums(columns, needs):
    x = inputs(50, columns)
    statistics = Statistics.of(x, needs)
    assert statistics.sum_I is not None and statistics.sumsq_I is not None
    assert (statistics.gram_II is not None) == (GRAM in needs)
    assert_sums(statistics, x)


@pytest.mark.parametrize("columns", [1, 7, 400])
def test_gram_is_symmetric_with_the_squares_on_its_diagonal(columns):
    sums = Accumulator(ALL)
    for seed in range(3):
        sums.add(inputs(20, columns, seed))
    statistics = sums.statistics()
    assert torch.equal(statistics.gram_II, statistics.gram_II.T)
    assert torch.equal(statistics.gram_II.diagonal().double(), statistics.sumsq_I)


def test_dtypes():
    statistics = Statistics.of(inputs(5, 3))
    assert [t.dtype for t in (statistics.sum_I, statistics.sumsq_I, statistics.gram_II)] == [
        torch.float64,
        torch.float64,
        torch.float32,
    ]


def test_every_leading_dimension_is_tokens():
    x = inputs(24, 5)
    assert_same(Statistics.of(x.reshape(2, 3, 4, 5)), Statistics.of(x))
    assert_same(Statistics.of(x.T.contiguous().T), Statistics.of(x))
    assert Statistics.of(x[0]).tokens == 1


@pytest.mark.parametrize("needs", [c for k in range(4) for c in itertools.combinations(ALL, k)], ids="+".join)
def test_only_what_is_needed(needs):
    x = inputs(9, 6)
    statistics = Statistics.of(x, needs)
    assert statistics.tokens == 9
    present = {SUM: statistics.sum_I, SUMSQ: statistics.sumsq_I, GRAM: statistics.gram_II}
    assert {name for name, value in present.items() if value is not None} == set(needs)
    assert_sums(statistics, x)


@pytest.mark.parametrize("needs", [ALL, (SUM, SUMSQ)], ids="+".join)
def test_merging_is_addition(needs):
    x = inputs(60, 10)
    parts = [Statistics.of(part, needs) for part in x.split([1, 29, 30])]
    merged = parts[0] + parts[1] + parts[2]
    assert_sums(merged, x)
    assert_sums(parts[2] + (parts[1] + parts[0]), x)
    assert (merged.gram_II is None) == (GRAM not in needs)


def test_a_sum_that_one_side_lacks_is_lost():
    x = inputs(4, 3)
    merged = Statistics.of(x, (SUM, SUMSQ)) + Statistics.of(x, (SUMSQ, GRAM))
    assert merged.tokens == 8
    assert merged.sum_I is None and merged.gram_II is None
    assert torch.equal(merged.sumsq_I, Statistics.of(x, (SUMSQ,)).sumsq_I + Statistics.of(x, (SUMSQ, GRAM)).sumsq_I)


def test_merging_leaves_its_parts_alone():
    a, b = Statistics.of(inputs(4, 3, 1)), Statistics.of(inputs(4, 3, 2))
    before = a.sum_I.clone(), a.sumsq_I.clone(), a.gram_II.clone()
    _ = a + b
    assert all(torch.equal(x, y) for x, y in zip(before, (a.sum_I, a.sumsq_I, a.gram_II), strict=True))


@pytest.mark.parametrize("needs", [ALL, (SUM, SUMSQ)], ids="+".join)
def test_order_and_size_of_batches_do_not_matter(needs):
    x = inputs(64, 9)
    for order in [range(8), reversed(range(8)), (3, 1, 4, 0, 5, 7, 2, 6)]:
        sums = Accumulator(needs)
        for k in order:
            sums.add(x[8 * k : 8 * k + 8])
        assert_sums(sums.statistics(), x)


def test_an_empty_batch_adds_nothing():
    sums = Accumulator(ALL)
    sums.add(inputs(7, 4))
    before = Statistics.of(inputs(7, 4))
    sums.add(torch.empty(0, 4))
    assert_same(sums.statistics(), before, rtol=0)


@pytest.mark.parametrize("needs", [ALL, (SUM, SUMSQ)], ids="+".join)
def test_a_snapshot_does_not_change_when_more_is_added(needs):
    sums = Accumulator(needs)
    sums.add(inputs(7, 4, 1))
    snapshot = sums.statistics()
    sums.add(inputs(7, 4, 2))
    assert_sums(snapshot, inputs(7, 4, 1))


@pytest.mark.parametrize("needs", [ALL, (SUM, SUMSQ)], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_narrow_inputs_are_summed_wide(dtype, needs):
    x = inputs(300, 6).to(dtype)
    assert_sums(Statistics.of(x, needs), x)
    ones = Statistics.of(torch.ones(5000, 2, dtype=dtype), needs)  # bfloat16 would stop at 256, float16 at 2048
    assert ones.sum_I.tolist() == [5000, 5000] == ones.sumsq_I.round().tolist()
    loud = Statistics.of(torch.full((10, 2), 6e4, dtype=dtype), needs)  # its square overflows float16
    assert_sums(loud, torch.full((10, 2), 6e4, dtype=dtype))


def test_inputs_are_left_alone_and_no_graph_is_kept():
    x = inputs(5, 3).requires_grad_()
    before = x.detach().clone()
    statistics = Statistics.of(x)
    assert torch.equal(x.detach(), before)
    assert not any(t.requires_grad for t in (statistics.sum_I, statistics.sumsq_I, statistics.gram_II))
