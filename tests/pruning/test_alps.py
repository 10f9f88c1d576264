"""ALPS against a transcription of its algorithm, against other methods, and against every mask there is."""

import math
from functools import partial
from itertools import combinations

import pytest
import torch

from secateur.errors import NumericsError, OptionError
from secateur.pruning import METHODS, NM, Block, Matrix, Row, Statistics, alps, parse_method, parse_pattern

from .test_reference import damped, keep_largest, least_squares, output_error, problem

plain = partial(alps, alike=0)  # the Gram matrix as it is, as in the paper


def alps_paper(W_OI, G_II, sparsity, pattern, most=300, rho=0.1, damping=0.01):
    """Algorithms 1 and 2 with the schedule of the authors' code, inputs down and outputs across, in float64."""
    H = damped(G_II.double(), damping)
    n = H.diagonal().sqrt()
    H = torch.diag(1 / n) @ H @ torch.diag(1 / n)
    W = torch.diag(n) @ W_OI.double().T

    def support(A_IO):
        return keep_largest(A_IO.abs().T, pattern, sparsity).T

    def begin():
        return W * support(W), torch.zeros_like(W), support(W)

    D, V, S = begin()
    k, raised = S.sum().item(), False
    for t in range(1, most + 1):
        B = torch.linalg.solve(H + rho * torch.eye(len(H), dtype=H.dtype), H @ W - V + rho * D)
        S_new = support(B + V / rho)
        D = (B + V / rho) * S_new
        V = V + rho * (B - D)
        if t % 3 == 0:
            s = (S_new != S).sum().item() / k
            S = S_new
            if (s == 0 and raised) or (t > 30 and s < 3e-4):
                break
            if s > 0.1:
                rho, raised = rho * 1.3, True
            elif s > 0.005:
                rho, raised = rho * 1.2, True
            elif raised:
                rho *= 1.1
            else:
                rho /= 5
                D, V, S = begin()
    S = S_new
    X, R = D.clone(), (H @ (W - D)) * S
    P, rs = R, (R * R).sum(0)
    for _ in range(10):
        HP = (H @ P) * S
        alpha = rs / (P * HP).sum(0)
        X, R = X + alpha * P, R - alpha * HP
        P, rs = R + (R * R).sum(0) / rs * P, (R * R).sum(0)
    return (torch.diag(1 / n) @ X).T, S.T, t


@pytest.mark.parametrize("shape", [(24, 60), (10, 130)])
@pytest.mark.parametrize(
    ("pattern", "sparsity"), [("matrix", 0.5), ("matrix", 0.8), ("row", 0.6), ("2:4", 0.5), ("3:5", 0.4)]
)
def test_alps_is_the_authors_algorithm(shape, pattern, sparsity):
    W, x = problem(*shape)
    statistics, pattern = Statistics.of(x), parse_pattern(pattern)
    want, want_mask, steps = alps_paper(W, statistics.gram_II, sparsity, pattern)
    assert 6 < steps < 300
    got, mask = plain(W.double(), statistics, sparsity, pattern)
    assert torch.equal(mask, want_mask)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    single, mask = plain(W, statistics, sparsity, pattern)
    assert single.dtype == torch.float32
    assert (mask != want_mask).double().mean() < 0.01
    assert output_error(W, single, statistics.gram_II) < 1.02 * output_error(W, want, statistics.gram_II)


@pytest.mark.parametrize("options", [{"rho": 2.0}, {"damping": 0.2}, {"iterations": 7}], ids=str)
def test_options(options):
    W, x = problem(24, 60)
    statistics = Statistics.of(x)
    spelt = {"most" if key == "iterations" else key: value for key, value in options.items()}
    want, want_mask, _ = alps_paper(W, statistics.gram_II, 0.5, Matrix(), **spelt)
    got, mask = plain(W.double(), statistics, 0.5, Matrix(), **options)
    assert torch.equal(mask, want_mask)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    assert not torch.equal(got, plain(W.double(), statistics, 0.5, Matrix())[0])


@pytest.mark.parametrize("rho", [50.0, 1e4])
def test_a_mask_that_rests_begins_anew_with_less_of_a_penalty(rho):
    W, x = problem(24, 60)
    statistics = Statistics.of(x)
    H = damped(statistics.gram_II.double())
    want, want_mask, _ = alps_paper(W, statistics.gram_II, 0.5, Matrix(), rho=rho)
    got, mask = plain(W.double(), statistics, 0.5, Matrix(), rho=rho)
    assert torch.equal(mask, want_mask)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    stuck = keep_largest((W * H.diagonal().sqrt()).abs(), Matrix(), 0.5)
    assert output_error(W, got, H) < 0.9 * output_error(W, least_squares(W, H, stuck), H)


@pytest.mark.parametrize("shape", [(24, 130), (40, 60)])
@pytest.mark.parametrize(("pattern", "sparsity"), [("matrix", 0.5), ("row", 0.7), ("2:4", 0.5), ("block:4x8", 0.4)])
def test_alps_is_better_than_the_rest(shape, pattern, sparsity):
    W, x = problem(*shape)
    statistics, pattern = Statistics.of(x), parse_pattern(pattern)
    G = statistics.gram_II
    ours = output_error(W, plain(W, statistics, sparsity, pattern)[0], G)
    for other in ("sparsegpt", "sparsegpt+pcg", "magnitude+pcg:iterations=100", "wanda+pcg:iterations=100"):
        assert ours < output_error(W, parse_method(other)(W, statistics, sparsity, pattern)[0], G)


def test_alps_finds_the_best_of_all_masks_more_often_than_not():
    found = []
    for seed in range(12):
        W, x = problem(1, 8, tokens=40, seed=seed)
        statistics = Statistics.of(x)
        H = damped(statistics.gram_II.double())
        masks = torch.tensor([[[j in kept for j in range(8)]] for kept in combinations(range(8), 4)])
        errors = sorted(output_error(W, least_squares(W, H, mask), H) for mask in masks)
        ours = output_error(W, plain(W, statistics, 0.5, Row())[0], H)
        assert errors[0] * (1 - 1e-5) <= ours < 0.5 * errors[35]
        found.append(ours <= 1.001 * errors[0])
    assert sum(found) >= 9


def test_with_hardly_any_tokens_it_is_nearly_wanda():
    """Which keeps the weights as they are, and chooses by the inputs' sizes alone."""
    W, x = problem(12, 40)
    _, want_mask = METHODS["wanda"](W, Statistics.of(x), 0.5, Matrix())
    got, mask = alps(W, Statistics.of(x), 0.5, Matrix(), damping=1e-6, alike=1e9)
    assert (mask != want_mask).float().mean() < 0.03
    torch.testing.assert_close(got, W * mask, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", ["row", "matrix", "2:4"])
def test_dead_columns_stay_as_they_are_where_they_are_kept(pattern):
    W, x = problem(12, 40)
    x[:, ::5] = 0
    pruned, mask = plain(W, Statistics.of(x), 0.5, parse_pattern(pattern))
    dead = torch.zeros(40, dtype=torch.bool)
    dead[::5] = True
    assert mask[:, dead].any() and not mask[:, dead].all()
    torch.testing.assert_close(pruned[:, dead], W[:, dead] * mask[:, dead], rtol=1e-4, atol=1e-6)


def test_every_row_of_tiles_and_of_n_m_is_a_projection():
    W, x = problem(24, 64)
    tiles = plain(W, Statistics.of(x), 0.5, Block(4, 8))[1].reshape(6, 4, 8, 8).float().mean((1, 3))
    assert ((tiles == 0) | (tiles == 1)).all() and tiles.mean() == 0.5
    assert (plain(W, Statistics.of(x), 0.0, NM(1, 4))[1].reshape(24, 16, 4).sum(2) == 1).all()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        *[({"damping": value}, "damping") for value in (0.0, -1.0, math.nan, math.inf)],
        *[({"alike": value}, "alike") for value in (-1.0, math.nan, math.inf)],
        *[({"rho": value}, "rho") for value in (0.0, -1.0, math.nan, math.inf)],
        ({"iterations": 0}, "iterations"),
    ],
)
def test_options_out_of_range(options, word):
    W, x = problem(2, 4)
    with pytest.raises(OptionError, match=f"alps: {word}"):
        alps(W, Statistics.of(x), 0.5, Row(), **options)


def test_a_gram_matrix_that_is_not_finite_is_an_error():
    W, x = problem(2, 4)
    x[3, 2] = math.inf
    with pytest.raises(NumericsError, match="NaN or Inf"):
        METHODS["alps"](W, Statistics.of(x), 0.5, Row())
