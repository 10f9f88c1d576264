"""Methods against short float64 transcriptions of their papers, from the formulas."""

import pytest
import torch

from secateur.pruning import GRAM, METHODS, NM, SUMSQ, Block, Matrix, Row, Statistics, parse_pattern, sparsegpt

SHAPES = [(24, 300), (40, 130)]


def problem(rows, columns, tokens=None, seed=0):
    """Heavy-tailed weights, and correlated tokens whose channels differ in loudness: W_OI, x_TI."""
    g = torch.Generator().manual_seed(seed)
    tokens = tokens or 2 * columns
    W = torch.randn(rows, columns, generator=g) * torch.randn(rows, columns, generator=g).abs()
    mixing = torch.randn(columns, columns, generator=g) / columns**0.5
    loudness = torch.randn(columns, generator=g).exp()
    return W, (torch.randn(tokens, columns, generator=g) @ mixing + 0.2) * loudness


def keep_largest(score_OI, pattern, sparsity):
    """The mask of a score by sorting alone."""
    rows, columns = score_OI.shape
    if isinstance(pattern, NM):
        parts = [keep_largest(part, Row(), 1 - pattern.n / pattern.m) for part in score_OI.split(pattern.m, 1)]
        return torch.cat(parts, 1)
    order = (score_OI if isinstance(pattern, Row) else score_OI.reshape(1, -1)).argsort(1)
    keep = torch.ones_like(order, dtype=torch.bool)
    keep.scatter_(1, order[:, : round(sparsity * order.shape[1])], False)
    return keep.reshape(rows, columns)


# --- scores


def wanda_running(W_OI, batches):
    """Wanda as published: s_j is the running mean over sequences of ||x_j||²; the score |W_ij| sqrt(s_j)."""
    s_I, n = torch.zeros(W_OI.shape[1], dtype=torch.float64), 0
    for x_BTI in batches:
        b = len(x_BTI)
        s_I *= n / (n + b)
        n += b
        s_I += x_BTI.double().square().sum((0, 1)) / n
    return W_OI.double().abs() * s_I.sqrt()


def ria_paper(W_OI, x_TI, a):
    """RIA: every weight relative to its row's and to its column's sum, times the input's norm to the power a."""
    A = W_OI.double().abs()
    relative = torch.empty_like(A)
    for i in range(A.shape[0]):
        for j in range(A.shape[1]):
            relative[i, j] = A[i, j] / A[i, :].sum() + A[i, j] / A[:, j].sum()
    return relative * x_TI.double().norm(dim=0) ** a


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("pattern", "sparsity"), [("row", 0.5), ("row", 0.7), ("matrix", 0.5), ("2:4", 0.5), ("1:2", 0.5)]
)
@pytest.mark.parametrize("needs", [{SUMSQ}, {GRAM}], ids="+".join)
def test_wanda(shape, pattern, sparsity, needs):
    W, x = problem(*shape)
    sequences = x.reshape(-1, 10, x.shape[1])
    want = keep_largest(wanda_running(W, sequences.split([7, 1, len(sequences) - 8])), parse_pattern(pattern), sparsity)
    pruned, mask = METHODS["wanda"](W, Statistics.of(x, needs), sparsity, parse_pattern(pattern))
    assert torch.equal(mask, want)
    assert torch.equal(pruned, W * want)


def test_wanda_is_a_norm_over_tokens_and_no_mean_or_variance():
    W = torch.ones(1, 3)
    x = torch.tensor(
        [[2.0, 0.0, 1.9], [2.0, 3.0, -1.9]]
    )  # norms 2.83, 3, 2.69; means 2, 1.5, 0; variances 0, 2.25, 3.61
    assert METHODS["wanda"](W, Statistics.of(x), 1 / 3, Row())[1].tolist() == [[True, True, False]]
    assert METHODS["wanda"](W, Statistics.of(x), 2 / 3, Row())[1].tolist() == [[False, True, False]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("pattern", "sparsity"), [("row", 0.5), ("matrix", 0.5), ("matrix", 0.7), ("2:4", 0.5)])
@pytest.mark.parametrize("exponent", [None, 1.0, 0.0])
def test_ria(shape, pattern, sparsity, exponent):
    W, x = problem(*shape)
    method = METHODS["ria"]
    options = {} if exponent is None else {"exponent": exponent}
    pruned, mask = method.prune(W, Statistics.of(x, method.needs), sparsity, parse_pattern(pattern), **options)
    want = keep_largest(ria_paper(W, x, 0.5 if exponent is None else exponent), parse_pattern(pattern), sparsity)
    assert torch.equal(mask, want)
    assert torch.equal(pruned, W * want)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("pattern", "sparsity"), [("row", 0.5), ("matrix", 0.7), ("2:4", 0.5)])
def test_magnitude(shape, pattern, sparsity):
    W, _ = problem(*shape)
    pruned, mask = METHODS["magnitude"](W, Statistics(), sparsity, parse_pattern(pattern))
    assert torch.equal(mask, keep_largest(W.double().abs(), parse_pattern(pattern), sparsity))
    assert torch.equal(pruned, W * mask)


# --- SparseGPT


def damped(G_II, damping=0.01):
    """G + damping * mean(diag G) over the columns with input; a dead column takes that mean as its diagonal."""
    H, diagonal = G_II.clone(), G_II.diagonal()
    mean = diagonal[diagonal > 0].mean()
    H.diagonal()[diagonal == 0] = mean
    H.diagonal().add_(damping * mean)
    return H


def sparsegpt_paper(W_OI, G_II, sparsity, pattern, block=128, damping=0.01, mask=None, tokens=1000):
    """Algorithm 1, column by column in float64, with exact counts and groups aligned at column 0."""
    W, G = W_OI.double().clone(), G_II.double() * 2 / tokens  # the authors' scale
    rows, columns = W.shape
    W[:, G.diagonal() == 0] = 0
    U = torch.linalg.cholesky(torch.linalg.inv(damped(G, damping)), upper=True)
    keep = torch.ones(rows, columns, dtype=torch.bool) if mask is None else mask
    for a in range(0, columns, block):
        b = min(a + block, columns)
        if mask is None and not isinstance(pattern, NM):
            score = W[:, a:b] ** 2 / U.diagonal()[a:b] ** 2
            if isinstance(pattern, Block):
                prune_tiles(keep[:, a:b], score, a, sparsity, pattern)
            else:
                share = 1 if isinstance(pattern, Row) else rows  # of one row, or of all
                order = score.reshape(rows // share, -1).argsort(1)
                gone = round(sparsity * share * b) - round(sparsity * share * a)
                chosen = torch.ones_like(order, dtype=torch.bool).scatter_(1, order[:, :gone], False)
                keep[:, a:b] = chosen.reshape(rows, b - a)
        for j in range(a, b):
            if mask is None and isinstance(pattern, NM) and j % pattern.m == 0:
                group = slice(j, min(j + pattern.m, columns))
                score = W[:, group] ** 2 / U.diagonal()[group] ** 2
                kept = -(-score.shape[1] * pattern.n // pattern.m)
                order = score.argsort(1)[:, : score.shape[1] - kept]
                keep[:, group] = torch.ones_like(score, dtype=torch.bool).scatter_(1, order, False)
            error = torch.where(keep[:, j], 0, W[:, j]) / U[j, j]
            W[:, j:] -= error[:, None] * U[j, j:]
    W[~keep] = 0
    return W, keep


def prune_tiles(keep_OC, score_OC, start, sparsity, pattern):
    """Mark the tiles of least summed saliency, a ragged one by its mean, in place."""
    corners = [
        (r, c) for r in range(0, len(score_OC), pattern.height) for c in range(0, len(score_OC.T), pattern.width)
    ]
    tiles = [(slice(r, r + pattern.height), slice(c, c + pattern.width)) for r, c in corners]
    down = -(-len(score_OC) // pattern.height)
    before, after = start // pattern.width, start // pattern.width + len(tiles) // down
    tiles.sort(key=lambda tile: score_OC[tile].mean().item())
    for tile in tiles[: round(sparsity * down * after) - round(sparsity * down * before)]:
        keep_OC[tile] = False


def assert_near(got, want, tolerance=1e-3):
    assert (got.double() - want).norm() <= tolerance * want.norm()
    assert (got.double() - want).abs().max() <= tolerance * want.abs().max()


def output_error(W_OI, new_OI, G_II):
    D, G = new_OI.double() - W_OI.double(), G_II.double()
    return ((D @ G) * D).sum().item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_size", [128, 32, 1])
@pytest.mark.parametrize(("pattern", "sparsity"), [("matrix", 0.5), ("matrix", 0.77), ("row", 0.5), ("row", 0.3)])
def test_sparsegpt_unstructured(shape, block_size, pattern, sparsity):
    W, x = problem(*shape)
    statistics, pattern = Statistics.of(x, {GRAM}), parse_pattern(pattern)
    got, mask = sparsegpt(W, statistics, sparsity, pattern, block_size=block_size)
    want, want_mask = sparsegpt_paper(W, statistics.gram_II, sparsity, pattern, block_size)
    assert torch.equal(mask, want_mask)
    assert_near(got, want)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_size", [128, 32, 1])
@pytest.mark.parametrize("sparsity", [0.3, 0.6])
def test_sparsegpt_tiles_cost_the_sum_of_their_weights(shape, block_size, sparsity):
    W, x = problem(*shape)
    statistics, pattern = Statistics.of(x, {GRAM}), Block(5, 8)
    got, mask = sparsegpt(W, statistics, sparsity, pattern, block_size=block_size)
    want, want_mask = sparsegpt_paper(W, statistics.gram_II, sparsity, pattern, max(8, block_size))
    assert torch.equal(mask, want_mask)
    assert_near(got, want)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_size", [128, 32, 1])
@pytest.mark.parametrize("pattern", ["2:4", "8:16", "1:4", "3:5", "16:32"])
def test_sparsegpt_n_m_for_any_block_size(shape, block_size, pattern):
    W, x = problem(*shape)
    statistics, pattern = Statistics.of(x, {GRAM}), parse_pattern(pattern)
    got, mask = sparsegpt(W, statistics, 0.5, pattern, block_size=block_size)
    want, want_mask = sparsegpt_paper(W, statistics.gram_II, None, pattern)
    assert torch.equal(mask, want_mask)
    assert_near(got, want)


@pytest.mark.parametrize(("pattern", "sparsity"), [("matrix", 0.5), ("row", 0.5), ("2:4", 0.5)])
def test_sparsegpt_with_dead_columns(pattern, sparsity):
    W, x = problem(40, 130)
    x[:, ::9] = 0
    x[:, 64:72] = 0
    statistics, pattern = Statistics.of(x, {GRAM}), parse_pattern(pattern)
    got, _ = sparsegpt(W, statistics, sparsity, pattern)
    want, _ = sparsegpt_paper(W, statistics.gram_II, sparsity, pattern)
    dead = x.abs().sum(0) == 0
    assert not got[:, dead].any()
    assert torch.equal(got != 0, want != 0)  # masks may differ where dead weights tie
    assert_near(got, want)


@pytest.mark.parametrize("damping", [0.001, 0.1])
def test_sparsegpt_damping(damping):
    W, x = problem(24, 100, tokens=60)
    statistics = Statistics.of(x, {GRAM})
    got, mask = sparsegpt(W, statistics, 0.5, Matrix(), damping=damping)
    want, want_mask = sparsegpt_paper(W, statistics.gram_II, 0.5, Matrix(), damping=damping)
    assert torch.equal(mask, want_mask)
    assert_near(got, want, 5e-3)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_sparsegpt_does_not_depend_on_the_scale_of_the_inputs(scale):
    W, x = problem(24, 100)
    statistics = Statistics.of(x, {GRAM})
    scaled = Statistics(len(x), gram_II=statistics.gram_II * scale)
    want, want_mask = sparsegpt(W, statistics, 0.5, Matrix())
    got, mask = sparsegpt(W, scaled, 0.5, Matrix())
    assert torch.equal(mask, want_mask)
    assert_near(got, want.double())


def surgeon(W_OI, G_II, mask_OI):
    """Optimal brain surgeon: each pruned weight of a row in turn, the columns after it making up for it.

    From the definition: with b the first column of the inverse of the damped Gram matrix of columns j and
    later, the change of these columns is -w_j / b_j * b.
    """
    W, H = W_OI.double().clone(), damped(G_II.double())
    for j in range(W.shape[1]):
        first = torch.zeros(W.shape[1] - j, dtype=torch.float64)
        first[0] = 1
        b = torch.linalg.solve(H[j:, j:], first)
        W[:, j:] -= torch.where(mask_OI[:, j], 0, W[:, j])[:, None] / b[0] * b
    return W * mask_OI


def least_squares(W_OI, G_II, mask_OI):
    """The best weights on a support: w_S = G_SS⁻¹ (G w)_S, row by row."""
    W, G = torch.zeros(W_OI.shape, dtype=torch.float64), G_II.double()
    for i, support in enumerate(mask_OI):
        W[i, support] = torch.linalg.solve(G[support][:, support], (G @ W_OI[i].double())[support])
    return W


def wanda_mask(W, statistics, sparsity, pattern):
    return METHODS["wanda"](W, statistics, sparsity, parse_pattern(pattern))[1]


@pytest.mark.parametrize("shape", [(24, 60), (5, 140)])
@pytest.mark.parametrize(("pattern", "sparsity"), [("row", 0.6), ("matrix", 0.5), ("2:4", 0.5), ("block:4x8", 0.3)])
@pytest.mark.parametrize("block_size", [128, 7])
def test_fixed_mask_is_the_sequential_surgeon(shape, pattern, sparsity, block_size):
    W, x = problem(*shape)
    statistics = Statistics.of(x)
    mask = wanda_mask(W, statistics, sparsity, pattern)
    got, got_mask = sparsegpt(W, statistics, sparsity, parse_pattern(pattern), block_size=block_size, mask=mask)
    assert torch.equal(got_mask, mask)
    assert_near(got, surgeon(W, statistics.gram_II, mask))
    assert_near(got, sparsegpt_paper(W, statistics.gram_II, None, None, mask=mask)[0])


@pytest.mark.parametrize(("pattern", "sparsity"), [("row", 0.5), ("row", 0.8), ("2:4", 0.5)])
def test_update_is_better_than_none_and_no_better_than_least_squares(pattern, sparsity):
    W, x = problem(24, 130)
    statistics = Statistics.of(x)
    mask = wanda_mask(W, statistics, sparsity, pattern)
    updated, _ = sparsegpt(W, statistics, sparsity, parse_pattern(pattern), mask=mask)
    none, ours, best = (
        output_error(W, new, statistics.gram_II)
        for new in (W * mask, updated, least_squares(W, statistics.gram_II, mask))
    )
    assert best <= ours < none
    own, own_mask = sparsegpt(W, statistics, sparsity, parse_pattern(pattern))
    best = output_error(W, least_squares(W, statistics.gram_II, own_mask), statistics.gram_II)
    assert best <= output_error(W, own, statistics.gram_II) < none
