"""SparseGPT beyond the paper: ill-conditioned inputs, refusals, and its fixed mask's manners."""

import math

import pytest
import torch

from secateur.errors import NumericsError, OptionError
from secateur.pruning import GRAM, Matrix, Row, Statistics, sparsegpt
from secateur.pruning.sparsegpt import inverse_factor


def gram(columns, tokens, seed=0):
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    return Statistics.of(x, {GRAM}).gram_II


def weights(rows, columns):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize(("columns", "tokens"), [(1, 3), (20, 60), (60, 20), (130, 300)])
def test_inverse_factor(columns, tokens):
    G = gram(columns, tokens)
    U = inverse_factor(G, 0.01)
    H = G.double() + 0.01 * G.diagonal().double().mean() * torch.eye(columns, dtype=torch.float64)
    assert torch.equal(U, U.triu())
    assert (U.diagonal() > 0).all()
    torch.testing.assert_close(U.double().T @ U.double(), torch.linalg.inv(H), rtol=1e-3, atol=1e-5 * U.square().max())


def test_inverse_factor_of_a_gram_matrix_with_dead_columns_does_not_depend_on_scale():
    G = gram(12, 40)
    G[3], G[:, 3] = 0, 0
    U = inverse_factor(G, 0.01)
    torch.testing.assert_close(inverse_factor(G * 1e-8, 0.01), U * 1e4, rtol=1e-4, atol=0)
    assert U[3].count_nonzero() == U[:, 3].count_nonzero() == 1


def test_ill_conditioned_gram_is_factored_with_more_damping_or_in_float64():
    x = torch.randint(-9, 10, (3, 300), generator=torch.Generator().manual_seed(0)).float()
    G = x.T @ x  # exact, and of rank 3
    assert torch.linalg.cholesky_ex(G + 1e-9 * G.diagonal().mean() * torch.eye(300)).info != 0
    U = inverse_factor(G, 1e-9)
    assert U.isfinite().all() and (U.diagonal() > 0).all()
    W, mask = sparsegpt(weights(6, 300), Statistics(1, gram_II=G), 0.5, Row(), damping=1e-9)
    assert W.isfinite().all() and (mask.sum(1) == 150).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gram_matrix_that_is_not_finite_is_an_error(bad):
    G = gram(6, 20)
    G[2, 3] = G[3, 2] = bad
    with pytest.raises(NumericsError, match="NaN or Inf"):
        sparsegpt(weights(2, 6), Statistics(20, gram_II=G), 0.5, Row())


def test_a_matrix_that_is_no_gram_matrix_is_an_error():
    with pytest.raises(NumericsError, match="damping"):
        sparsegpt(weights(2, 2), Statistics(2, gram_II=torch.tensor([[1.0, 2.0], [2.0, 1.0]])), 0.5, Row())


@pytest.mark.parametrize(
    ("options", "word"),
    [
        *[({"damping": value}, "damping") for value in (0.0, -1.0, math.nan, math.inf)],
        ({"block_size": 0}, "block_size"),
    ],
)
def test_options_out_of_range(options, word):
    with pytest.raises(OptionError, match=word):
        sparsegpt(weights(2, 4), Statistics(9, gram_II=gram(4, 9)), 0.5, Row(), **options)


def test_without_a_gram_matrix():
    with pytest.raises(OptionError, match="gram_II"):
        sparsegpt(weights(2, 4), Statistics(), 0.5, Row())


def test_nothing_pruned_changes_nothing_but_dead_columns():
    G = gram(20, 60)
    G[5], G[:, 5] = 0, 0
    W = weights(4, 20)
    new, mask = sparsegpt(W, Statistics(60, gram_II=G), 0.0, Matrix())
    assert mask.all()
    W[:, 5] = 0
    assert torch.equal(new, W)


@pytest.mark.parametrize("shape", [(5, 12), (1, 12), (5, 1)])
def test_fixed_mask_is_neither_changed_nor_handed_back(shape):
    mask = weights(*shape) > 0
    before = mask.clone()
    statistics = Statistics(30, gram_II=gram(shape[1], 30))
    new, used = sparsegpt(weights(*shape), statistics, 0.5, Row(), mask=mask)
    assert torch.equal(used, before) and torch.equal(new != 0, before)
    used[:] = False
    assert torch.equal(mask, before)


def test_fixed_mask_of_all_ones_keeps_every_weight():
    W = weights(4, 20)
    new, _ = sparsegpt(W, Statistics(60, gram_II=gram(20, 60)), 0.5, Row(), mask=torch.ones(4, 20, dtype=torch.bool))
    assert torch.equal(new, W)


def test_double_weights_and_gram_are_taken():
    W, G = weights(4, 20), gram(20, 60)
    new, mask = sparsegpt(W.double(), Statistics(60, gram_II=G.double()), 0.5, Row())
    same, same_mask = sparsegpt(W, Statistics(60, gram_II=G), 0.5, Row())
    assert torch.equal(mask, same_mask)
    torch.testing.assert_close(new.float(), same)
