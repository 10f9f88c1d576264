"""Allocations by rule, against the papers' formulas; their means; levels of N:M."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import NumericsError, OptionError
from secateur.pruning import NM, Row, Statistics, Target
from secateur.pruning.allocation import balanced
from secateur.pruning.depth import (
    alpha,
    as_levels,
    check_target,
    levels_beside,
    linear,
    outlier_ratio,
    owl,
    tail_exponent,
)

RULES = {
    "linear": lambda numbers, weights, target: linear(weights, target, numbers[0]),
    "owl": owl,
    "alpha": alpha,
}


def mean(values, weights):
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


# --- means


@st.composite
def blocks(draw):
    count = draw(st.integers(2, 40))
    numbers = draw(st.lists(st.floats(-1, 1), min_size=count, max_size=count))
    weights = draw(st.lists(st.integers(1, 10**9), min_size=count, max_size=count))
    return numbers, weights


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=60, deadline=None)
@given(blocks=blocks(), target=st.floats(0, 0.95))
def test_the_weighted_mean_is_the_target(rule, blocks, target):
    numbers, weights = blocks
    found = RULES[rule](numbers, weights, target)
    assert len(found) == len(weights) and all(0 <= s <= 0.95 for s in found)
    assert mean(found, weights) == pytest.approx(target, abs=1e-9)


def test_sparsities_that_would_be_too_large_are_clipped_and_the_others_make_up_for_it():
    assert balanced([1.2, 0.6, 0.3], [1, 1, 2], 0.7) == pytest.approx([0.95, 0.8166667, 0.5166667], abs=1e-6)


def test_a_mean_that_no_sparsities_have():
    with pytest.raises(OptionError, match=r"0\.96"):
        balanced([0.5], [1], 0.96)


# --- rules


def test_linear_is_straight_in_depth():
    found = linear([5] * 5, 0.6, 0.2)
    assert found == pytest.approx([0.4, 0.5, 0.6, 0.7, 0.8], abs=1e-12)
    assert linear([5] * 5, 0.6, -0.2) == pytest.approx(found[::-1], abs=1e-12)


def test_linear_with_unequal_blocks_keeps_its_slope():
    found = linear([1, 1, 6], 0.5, 0.1)
    assert np.diff(found) == pytest.approx([0.1, 0.1], abs=1e-12)


def test_owl_is_the_papers_formula():
    ratios, target, lam = np.array([0.3, 0.1, 0.25, 0.7]), 0.7, 0.08
    kept = (ratios - ratios.min()) * (1 / (ratios.max() - ratios.min()) * lam * 2)
    kept = kept - kept.mean() + (1 - target)
    assert owl(list(ratios), [7] * 4, target) == pytest.approx(list(1 - kept), abs=1e-12)


def test_alpha_is_the_papers_formula():
    alphas, weights, target, eps = np.array([2.5, 4.0, 3.1, 2.0]), np.array([3, 1, 2, 2]), 0.6, 0.3
    ratios = (alphas - alphas.min()) / (alphas.max() - alphas.min()) * (2 * eps) + (1 - eps)
    ratios = ratios * (weights.sum() * target / (weights * ratios).sum())
    assert alpha(list(alphas), list(weights), target) == pytest.approx(list(ratios), abs=1e-12)
    assert max(ratios) == ratios[1]  # the lightest tail loses most


@pytest.mark.parametrize("rule", [owl, alpha])
def test_equal_blocks_get_the_target(rule):
    assert rule([0.2, 0.2], [3, 5], 0.7) == [0.7, 0.7]


# --- what the rules follow from


def test_outliers_are_counted_over_all_matrices_of_a_block_together():
    generator = torch.Generator().manual_seed(3)
    pairs, scores = [], []
    for rows, columns in ((6, 40), (10, 24)):
        W = torch.randn(rows, columns, generator=generator, dtype=torch.float64) ** 5
        x = torch.randn(50, columns, generator=generator)
        pairs.append((W.float(), Statistics.of(x, {"sumsq"})))
        scores.append((W.abs() * x.double().square().sum(0).sqrt()).flatten())
    scores = torch.cat(scores)
    want = float((scores > 5 * scores.mean()).double().mean())
    assert 0 < want < 0.5
    assert outlier_ratio(pairs) == pytest.approx(want)
    apart = [outlier_ratio(pairs[:1]), outlier_ratio(pairs[1:])]  # of 240 scores each
    assert outlier_ratio(pairs) != pytest.approx(sum(apart) / 2)


def test_an_expert_is_no_outlier_by_the_tokens_that_reached_it():
    W, x = torch.ones(4, 4), torch.ones(1, 4)
    pairs = [(W, Statistics.of(x.expand(tokens, 4))) for tokens in (10000, *[1] * 20)]
    assert outlier_ratio(pairs) == 0


def hill(W, bins=100):
    """AlphaPruning's estimate in numpy, from singular values."""
    eigenvalues = np.sort(np.linalg.svd(W.astype(np.float64), compute_uv=False) ** 2)
    counts, edges = np.histogram(np.log10(eigenvalues), bins)
    tail = eigenvalues[np.log10(eigenvalues) >= edges[np.argmax(counts)]]
    return 1 + len(tail) / np.log(tail / tail[0]).sum()


@pytest.mark.parametrize("shape", [(60, 60), (40, 90), (90, 40)])
@pytest.mark.parametrize("power", [1, 3])
def test_the_tail_exponent_is_hills_from_the_peak_on(shape, power):
    W = torch.randn(*shape, generator=torch.Generator().manual_seed(power)) ** power
    assert tail_exponent(W) == pytest.approx(hill(W.numpy()), rel=1e-6)
    assert tail_exponent(100 * W) == pytest.approx(tail_exponent(W), rel=1e-6)


def test_a_heavier_tail_has_a_smaller_exponent():
    ranks = torch.arange(1, 200, dtype=torch.float64)
    light, heavy = (tail_exponent(torch.diag(ranks**-slope)) for slope in (0.2, 2.0))
    assert heavy < light


def test_spectra_without_a_tail():
    assert tail_exponent(torch.eye(5)) == math.inf
    assert tail_exponent(torch.zeros(3, 4)) == math.inf
    low_rank = torch.outer(torch.arange(1.0, 30), torch.ones(20))  # one eigenvalue; the others are rounding
    assert tail_exponent(low_rank) == math.inf


def test_weights_and_inputs_that_are_not_finite():
    W = torch.tensor([[1.0, float("nan")], [1.0, 2.0]])
    with pytest.raises(NumericsError, match="NaN"):
        tail_exponent(W)
    with pytest.raises(NumericsError, match="NaN"):
        outlier_ratio([(W, Statistics.of(torch.ones(1, 2)))])


# --- levels of N:M


@pytest.mark.parametrize(("middle", "beside"), [("2:4", "1:4 3:4"), ("4:8", "2:8 6:8"), ("5:16", "1:16 9:16")])
def test_levels(middle, beside):
    assert " ".join(map(str, levels_beside(NM(*map(int, middle.split(":")))))) == beside


@pytest.mark.parametrize("pattern", [NM(1, 4), NM(3, 4), NM(3, 6), NM(1, 2), NM(4, 16), NM(12, 16)])
def test_patterns_without_levels(pattern):
    with pytest.raises(OptionError, match=f"pattern {pattern}.*use 2:4"):
        check_target("owl", Target(pattern.fixed_sparsity, pattern))


def test_a_target_above_what_a_block_may_have():
    with pytest.raises(OptionError, match=r"allocation alpha.*0\.95.*0\.97"):
        check_target("alpha", Target(0.97, Row()))
    check_target("alpha", Target(0.95, Row()))


def spelled(found):
    return " ".join(str(pattern.n) for pattern in found)


def test_as_much_moves_as_was_to_move():
    """Of 4:8 a step is 0.25; the pairs' distances to it sum up to 2.0, 1.0, 0.5 and 0.2 blocks."""
    order = [0.9, 0.1, 0.8, 0.2, 0.5]
    for scale, want in ((1.0, "2 6 2 6 4"), (0.4, "2 6 4 4 4"), (0.3, "2 6 4 4 4"), (0.1, "4 4 4 4 4")):
        sparsities = [0.5 + scale * (s - 0.5) for s in order]
        assert spelled(as_levels(sparsities, [9] * 5, NM(4, 8))) == want


def test_only_blocks_of_equal_weights_are_paired():
    assert spelled(as_levels([0.9, 0.1, 0.2], [9, 7, 9], NM(2, 4))) == "1 2 3"
    assert spelled(as_levels([0.9, 0.1], [9, 7], NM(2, 4))) == "2 2"


def test_equal_blocks_stay_in_the_middle():
    assert spelled(as_levels([0.5] * 4, [9] * 4, NM(2, 4))) == "2 2 2 2"
    assert spelled(as_levels([0.6, 0.6, 0.1], [9, 9, 18], NM(2, 4))) == "2 2 2"


@settings(max_examples=100, deadline=None)
@given(blocks=blocks(), few=st.integers(1, 3))
def test_levels_keep_the_mean_exactly(blocks, few):
    numbers, weights = blocks
    weights = [weight % few + 1 for weight in weights]
    found = as_levels(numbers, weights, NM(8, 16))
    assert {p.n for p in found} <= {4, 8, 12}
    assert sum(p.n * w for p, w in zip(found, weights, strict=True)) == 8 * sum(weights)
