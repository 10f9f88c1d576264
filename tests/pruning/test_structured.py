"""Structured criteria and compensation against their definitions in float64."""

import pytest
import torch

from secateur.errors import NumericsError, OptionError
from secateur.pruning import Statistics
from secateur.pruning.structured import CRITERIA, Columns, compensate, obs, structured


def example(rows=7, columns=12, tokens=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), x + torch.randn(columns, generator=generator)


def ridge(x, damping=0.01):
    """Inputs under whose Gram matrix lies the damping, float64."""
    x = x.double()
    return torch.cat([x, (damping * x.square().sum(0).mean()).sqrt() * torch.eye(x.shape[1], dtype=torch.float64)])


def best(W, x, kept):
    """The weights on the kept columns with the least output error, by a solver that knows no Gram matrix; and it."""
    x, W = ridge(x), W.double()
    solution = torch.linalg.lstsq(x[:, kept], x @ W.T).solution.T
    return solution, float((x @ W.T - x[:, kept] @ solution.T).square().sum())


@pytest.mark.parametrize("width", [1, 3, 4])
def test_groups_of_columns_go_by_the_sum_of_their_scores(width):
    score = torch.arange(24.0).reshape(2, 12).flip(1)
    mask = Columns(width).mask(score, 0.5)
    assert mask.shape == (2, 12)
    assert mask[:, : 6 // width * width].all() and not mask[:, 12 - 6 // width * width :].any()
    assert str(Columns(width)) == f"columns:{width}"


def test_compensation_is_the_least_squares_solution():
    W, x = example()
    kept = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1, 1], dtype=torch.bool)
    new = compensate(W, Statistics.of(x).gram_II, kept)
    solution, _ = best(W, x, kept)
    assert torch.allclose(new[:, kept].double(), solution, rtol=1e-3, atol=1e-4)
    assert (new[:, ~kept] == 0).all()


def test_nothing_removed_changes_nothing():
    W, x = example()
    new = compensate(W, Statistics.of(x).gram_II, torch.ones(12, dtype=torch.bool))
    assert torch.equal(new, W)


def test_with_centred_sums_the_bias_is_part_of_the_solution():
    W, x = example()
    statistics, kept = Statistics.of(x), torch.arange(12) % 3 != 0
    new = compensate(W, statistics.centred().gram_II, kept, damping=1e-6)
    bias = (W - new) @ statistics.mean_I.float()
    with_ones = torch.cat([x.double()[:, kept], torch.ones(len(x), 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(with_ones, x.double() @ W.double().T).solution.T
    assert torch.allclose(new[:, kept].double(), solution[:, :-1], rtol=1e-2, atol=1e-2)
    assert torch.allclose(bias.double(), solution[:, -1], rtol=1e-2, atol=2e-2)


def test_centred_sums_are_those_of_centred_inputs():
    _, x = example()
    centred, expected = Statistics.of(x).centred(), Statistics.of(x.double() - x.double().mean(0))
    assert torch.allclose(centred.gram_II, expected.gram_II, rtol=1e-3, atol=1e-2)
    assert torch.allclose(centred.sumsq_I, expected.sumsq_I, rtol=1e-4)
    assert (centred.sum_I == 0).all() and centred.tokens == len(x)


@pytest.mark.parametrize(("width", "sparsity"), [(1, 0.25), (1, 0.5), (3, 0.5), (4, 1 / 3), (2, 0.5)])
def test_obs_removes_what_costs_least_at_every_step(width, sparsity):
    W, x = example(seed=3)
    groups = 12 // width
    removed: list[int] = []
    for _ in range(round(sparsity * groups)):
        costs = {}
        for group in set(range(groups)) - set(removed):
            gone = [*removed, group]
            kept = torch.tensor([column // width not in gone for column in range(12)])
            costs[group] = best(W, x, kept)[1]
        removed.append(min(costs, key=costs.get))
    new, mask = obs(W, Statistics.of(x), sparsity, Columns(width))
    kept = torch.tensor([column // width not in removed for column in range(12)])
    assert torch.equal(mask, kept.expand(7, 12))
    assert torch.allclose(new[:, kept].double(), best(W, x, kept)[0], rtol=1e-3, atol=1e-3)


def test_obs_in_few_rounds_is_close_to_one_at_a_time(monkeypatch):
    W, x = example(rows=30, columns=96, tokens=2000, seed=5)
    _, one = obs(W, Statistics.of(x), 0.5, Columns(1))
    monkeypatch.setattr("secateur.pruning.structured.ROUNDS", 96)
    _, other = obs(W, Statistics.of(x), 0.5, Columns(1))
    errors = [best(W, x, mask[0])[1] for mask in (one, other)]
    assert errors[0] < 1.1 * errors[1]
    assert one[0].sum() == other[0].sum() == 48


def test_flap_is_variance_times_squared_weights():
    W = torch.tensor([[2.0, 1.0, 3.0], [0.0, 1.0, 1.0]])
    x = torch.tensor([[1.0, 0.0, 5.0], [3.0, 4.0, 5.0]])  # variances 1, 4, 0
    method = structured("flap", compensated=False)
    _, mask = method(W, Statistics.of(x, method.needs), 1 / 3, Columns(1))
    assert mask[0].tolist() == [True, True, False]  # scores 4, 8, 0
    _, mask = method(W, Statistics.of(x, method.needs), 2 / 3, Columns(1))
    assert mask[0].tolist() == [False, True, False]


def test_wanda_sp_and_magnitude_by_hand():
    W = torch.tensor([[2.0, 1.0, 3.0], [0.0, 1.0, 1.0]])  # columns add up to 2, 2, 4
    x = torch.tensor([[4.0, 3.0, 1.0]])
    wanda, magnitude = (structured(name, compensated=False) for name in ("wanda-sp", "magnitude"))
    assert wanda(W, Statistics.of(x, wanda.needs), 1 / 3, Columns(1))[1][0].tolist() == [True, True, False]  # 8, 6, 4
    assert magnitude(W, Statistics(), 1 / 3, Columns(1))[1][0].tolist() == [False, True, True]


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("compensated", [True, False])
def test_every_criterion_removes_whole_groups_and_compensation_never_costs(name, compensated):
    W, x = example(rows=20, columns=48, tokens=500)
    method = structured(name, compensated=compensated, seed=1)
    before = W.clone()
    new, mask = method(W, Statistics.of(x, method.needs), 0.25, Columns(4))
    assert torch.equal(W, before)
    assert (mask[0].reshape(12, 4).sum(1) % 4 == 0).all() and int((~mask[0]).sum()) == 12
    assert (new[:, ~mask[0]] == 0).all()
    error = float((ridge(x) @ (W - new).double().T).square().sum())
    plain = float((ridge(x) @ torch.where(mask, 0, W).double().T).square().sum())
    assert error < 0.9 * plain if compensated else torch.equal(new, torch.where(mask, W, 0))


def test_chance_depends_on_its_seed_alone():
    W, x = example()
    masks = [structured("random", compensated=False, seed=s)(W, Statistics(), 0.5, Columns(1))[1] for s in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_what_needs_no_inputs_asks_for_none():
    assert not structured("magnitude", compensated=False).needs and not structured("random", compensated=False).needs
    assert all(structured(name, compensated=True).needs for name in CRITERIA)


def test_bad_sums_and_names_are_refused():
    W, x = example()
    with pytest.raises(OptionError, match="unknown criterion 'flapp': did you mean flap"):
        structured("flapp", compensated=True)
    gram = Statistics.of(x).gram_II.clone()
    gram[0, 0] = torch.nan
    with pytest.raises(NumericsError, match="NaN"):
        compensate(W, gram, torch.arange(12) > 3)


def test_columns_without_input_can_go_or_stay():
    W, x = example()
    x[:, 5] = 0
    new, mask = obs(W, Statistics.of(x), 1 / 12, Columns(1))
    assert not mask[0, 5] and torch.isfinite(new).all()
    kept = torch.arange(12) != 3
    assert torch.isfinite(compensate(W, Statistics.of(x).gram_II, kept)).all()
