"""What every entry of METHODS promises, for every pattern and dtype. A new method is tested by being there."""

import pytest
import torch

from secateur.pruning import METHODS, NM, SUMSQ, Block, Matrix, Row, Statistics, parse_method, parse_pattern

PATTERNS = ["row", "matrix", "2:4", "3:5", "block:4x8"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

COMPOSED = ["magnitude+pcg", "wanda+obs", "sparsegpt+pcg", "alps+obs+pcg", "wanda+swaps+pcg"]

every_method = pytest.mark.parametrize("method", METHODS)
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)
every_composition = pytest.mark.parametrize(
    ("method", "pattern"),
    [(m, p) for m in COMPOSED for p in PATTERNS if "swaps" not in m or p in ("row", "2:4", "3:5")],
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def weights(rows, columns, dtype=torch.float32):
    """Weights without a zero, in any of the dtypes."""
    W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns)) * 0.05
    return (W + W.sign() * 1e-3).to(dtype)


def tokens(columns, count=None):
    """Correlated tokens; by default enough for a Gram matrix of full rank."""
    g = torch.Generator().manual_seed(columns)
    x = torch.randn(count or 3 * columns, columns, generator=g)
    return x @ (torch.eye(columns) + torch.randn(columns, columns, generator=g) / columns**0.5)


def prune(method, W, x, sparsity, pattern):
    """Run a method on just the statistics that it says it needs."""
    method = parse_method(method)
    return method(W, Statistics.of(x, method.needs), sparsity, parse_pattern(pattern))


def check(W, pruned, mask, sparsity, pattern):
    """Shapes, types, finite in the dtype of W, zeros where the mask says, and the exact count."""
    assert pruned.shape == mask.shape == W.shape
    assert mask.dtype == torch.bool
    assert pruned.dtype in (W.dtype, torch.float32, torch.float64)
    assert pruned.to(W.dtype).isfinite().all()
    gone = pruned[~mask]
    assert not gone.any() and not gone.signbit().any()
    check_count(mask, sparsity, parse_pattern(pattern))


def check_count(mask, sparsity, pattern):
    rows, columns = mask.shape
    if isinstance(pattern, Row):
        assert ((~mask).sum(1) == round(sparsity * columns)).all()
    elif isinstance(pattern, Matrix):
        assert (~mask).sum() == round(sparsity * rows * columns)
    elif isinstance(pattern, NM):
        for group in mask.split(pattern.m, 1):
            assert (group.sum(1) == -(-group.shape[1] * pattern.n // pattern.m)).all()
    else:
        assert isinstance(pattern, Block)
        tiles = [tile for band in mask.split(pattern.height, 0) for tile in band.split(pattern.width, 1)]
        assert all(tile.all() or not tile.any() for tile in tiles)
        assert sum(not tile.any() for tile in tiles) == round(sparsity * len(tiles))


@every_method
@every_pattern
@every_dtype
@pytest.mark.parametrize("shape", [(12, 37), (5, 150)], ids=str)
def test_exact_counts_and_finite_weights(method, pattern, dtype, shape):
    W, x = weights(*shape, dtype), tokens(shape[1])
    for sparsity in (0.0, 0.3, 0.5, 0.99):
        pruned, mask = prune(method, W, x, sparsity, pattern)
        check(W, pruned, mask, sparsity, pattern)
        assert torch.equal(pruned != 0, mask)  # no weight is zero that the mask keeps


@every_method
@every_dtype
@pytest.mark.parametrize("pattern", ["row", "matrix", "block:4x8"])
def test_sparsity_0_changes_nothing(method, dtype, pattern):
    W = weights(12, 37, dtype)
    pruned, mask = prune(method, W, tokens(37), 0.0, pattern)
    assert mask.all()
    torch.testing.assert_close(pruned.float(), W.float(), rtol=1e-4, atol=0)


@every_method
@every_pattern
def test_deterministic(method, pattern):
    W, x = weights(12, 37), tokens(37)
    first, second = (prune(method, W, x, 0.5, pattern) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@every_method
@every_pattern
@every_dtype
def test_arguments_are_neither_changed_nor_handed_back(method, pattern, dtype):
    for shape in ((12, 37), (1, 24), (24, 1)):
        W, statistics = weights(*shape, dtype), Statistics.of(tokens(shape[1]), METHODS[method].needs)
        arguments = [t for t in (W, statistics.sum_I, statistics.sumsq_I, statistics.gram_II) if t is not None]
        before = [t.clone() for t in arguments]
        for sparsity in (0.5, 0.0):
            for result in METHODS[method](W, statistics, sparsity, parse_pattern(pattern)):
                result.fill_(7)
        assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


@every_method
@pytest.mark.parametrize("pattern", ["row", "matrix", "2:4", "3:5"])
def test_permuting_the_rows_permutes_the_result(method, pattern):
    W, x = weights(12, 37), tokens(37)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(5))
    pruned, mask = prune(method, W, x, 0.5, pattern)
    moved, moved_mask = prune(method, W[order], x, 0.5, pattern)
    assert torch.equal(moved_mask, mask[order])
    torch.testing.assert_close(moved, pruned[order], rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("other_processor")
@every_method
@every_pattern
def test_layout_in_memory_does_not_matter(method, pattern):
    W, x = weights(12, 37), tokens(37)
    pruned, mask = prune(method, W, x, 0.5, pattern)
    strided, strided_mask = prune(method, W.T.contiguous().T, x, 0.5, pattern)
    assert torch.equal(strided_mask, mask) and torch.equal(strided, pruned)


@every_method
def test_a_parameter_is_taken(method):
    W, x = weights(12, 37), tokens(37)
    pruned, mask = prune(method, W, x, 0.5, "row")
    same, same_mask = prune(method, torch.nn.Parameter(W.clone()), x, 0.5, "row")
    assert torch.equal(same, pruned) and torch.equal(same_mask, mask)


INPUTS = {
    "dead columns": lambda x: x * (torch.arange(37) % 6 != 0),
    "a dead group": lambda x: x * (torch.arange(37) // 8 != 1),
    "fewer tokens than columns": lambda x: x[:5],
    "one token": lambda x: x[:1],
    "no token": lambda x: x[:0],
    "silence": torch.zeros_like,
    "equal columns": lambda x: x[:, :1].expand_as(x),
    "a loud column": lambda x: x * (1 + 1e4 * (torch.arange(37) == 3)),
    "faint": lambda x: x * 1e-8,
    "loud": lambda x: x * 1e8,
}


@every_method
@every_pattern
@pytest.mark.parametrize("kind", INPUTS)
def test_degenerate_inputs(method, pattern, kind):
    for dtype in DTYPES:
        W = weights(12, 37, dtype)
        pruned, mask = prune(method, W, INPUTS[kind](tokens(37)), 0.5, pattern)
        check(W, pruned, mask, 0.5, pattern)


@every_method
@every_pattern
@pytest.mark.parametrize("zero", ["everywhere", "rows", "columns"])
def test_weights_of_zero(method, pattern, zero):
    for dtype in DTYPES:
        W = weights(12, 37, dtype)
        {"everywhere": W, "rows": W[::2], "columns": W[:, ::3]}[zero].zero_()
        pruned, mask = prune(method, W, tokens(37), 0.5, pattern)
        check(W, pruned, mask, 0.5, pattern)
        assert bool(pruned.any()) == (zero != "everywhere")


@every_method
@every_pattern
@every_dtype
def test_thin_matrices(method, pattern, dtype):
    for shape in ((1, 24), (24, 1), (1, 1), (3, 2)):
        W, x = weights(*shape, dtype), tokens(shape[1])
        for sparsity in (0.0, 0.5, 0.99):
            pruned, mask = prune(method, W, x, sparsity, pattern)
            check(W, pruned, mask, sparsity, pattern)


@every_composition
def test_a_composition_keeps_what_a_method_promises(method, pattern):
    for dtype in DTYPES:
        W, x = weights(12, 37, dtype), tokens(37)
        before = W.clone()
        for sparsity in (0.0, 0.5, 0.99):
            pruned, mask = prune(method, W, x, sparsity, pattern)
            check(W, pruned, mask, sparsity, pattern)
            assert torch.equal(pruned != 0, mask)
            again, again_mask = prune(method, W.T.contiguous().T, x, sparsity, pattern)
            assert torch.equal(again_mask, mask) and torch.equal(again, pruned)
            pruned.fill_(7), mask.fill_(False)
            assert torch.equal(W, before)


@every_composition
@pytest.mark.parametrize("kind", INPUTS)
def test_degenerate_inputs_of_a_composition(method, pattern, kind):
    for shape in ((12, 37), (1, 37)):
        W = weights(*shape)
        W[:, 3] = 0
        pruned, mask = prune(method, W, INPUTS[kind](tokens(37)), 0.5, pattern)
        check(W, pruned, mask, 0.5, pattern)


@every_method
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scale_of_the_weights_does_not_matter(method, scale):
    W, x = weights(12, 37), tokens(37)
    pruned, mask = prune(method, W, x, 0.5, "matrix")
    scaled, scaled_mask = prune(method, W * scale, x, 0.5, "matrix")
    assert torch.equal(scaled_mask, mask)
    torch.testing.assert_close(scaled / scale, pruned, rtol=1e-4, atol=1e-6)


@every_method
def test_pruning_half_is_better_than_pruning_the_other_half(method):
    W, x = weights(12, 37), tokens(37)
    x[:, ::4] *= 30
    pruned, mask = prune(method, W, x, 0.5, "row")
    error, other = ((x @ (new - W).T).square().sum() for new in (pruned, W * ~mask))
    assert error < other


@every_method
def test_default_pattern_can_be_read(method):
    assert str(parse_pattern(METHODS[method].pattern)) == METHODS[method].pattern


@every_method
def test_paper_is_named(method):
    assert METHODS[method].paper.startswith("https://")
    assert METHODS[method].prune.__doc__


def test_the_contract_sees_methods_with_and_without_statistics():
    assert any(not m.needs for m in METHODS.values()) and any(SUMSQ in m.needs for m in METHODS.values())
