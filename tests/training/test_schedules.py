"""Schedules against their closed forms."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import secateur
from secateur.pruning import Target, parse_pattern
from secateur.training.schedules import SCHEDULES, on_the_way, round_sparsity
from sparse_training import train_step
from tiny import tiny_model

times = st.floats(0, 1)


def test_cubic_is_zhu_and_guptas_equation():
    """s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3, with s_i = 0.1, s_f = 0.9, n dt = 100."""
    for t in (0, 1, 37, 100):
        expected = 0.9 + (0.1 - 0.9) * (1 - t / 100) ** 3
        target = on_the_way(Target(0.9, parse_pattern("row")), 0.1, SCHEDULES["cubic"](t / 100))
        assert target.sparsity == pytest.approx(expected)


def test_one_cycle_at_three_points():
    """(1 + e^-9) / (1 + e^(5 - 14 t))."""
    assert SCHEDULES["one-cycle"](0.0) == pytest.approx((1 + math.exp(-9)) / (1 + math.exp(5)))
    assert SCHEDULES["one-cycle"](5 / 14) == pytest.approx((1 + math.exp(-9)) / 2)
    assert SCHEDULES["one-cycle"](1.0) == 1.0


@given(times, times)
def test_all_rise_from_nearly_0_to_1(a, b):
    for schedule in SCHEDULES.values():
        low, high = sorted((a, b))
        assert 0 <= schedule(low) <= schedule(high) <= 1 + 1e-12
        assert schedule(0.0) < 0.01 and schedule(1.0) == pytest.approx(1)


@given(st.integers(1, 7), times, times)
def test_under_n_m_never_fewer_than_n_are_kept(n, initial, progress):
    target = on_the_way(Target(1 - n / 8, parse_pattern(f"{n}:8")), initial, progress)
    assert n <= target.pattern.n <= 8 and target.sparsity == 1 - target.pattern.n / 8


def test_rounds_remove_the_same_share_of_what_is_left():
    levels = [round_sparsity(0.9, 0.2, r / 5) for r in range(6)]
    shares = [(1 - b) / (1 - a) for a, b in pairwise(levels)]
    assert levels[0] == pytest.approx(0.2) and levels[-1] == pytest.approx(0.9)
    assert shares == pytest.approx([shares[0]] * 5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_loop_has_the_sparsity_of_the_closed_form_at_every_step(schedule):
    model = tiny_model("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    weights = [p for n, p in model.named_parameters() if ".layers." in n and p.ndim > 1]
    for step in secateur.gradual(model, final=0.6, initial=0.1, steps=11, schedule=schedule):
        level = 0.1 + 0.5 * SCHEDULES[schedule](step / 10) if step else 0.1
        train_step(model, optimizer)
        for weight in weights:
            expected = round(level * weight.numel())
            assert int((weight == 0).sum()) == expected
    assert all(int((weight == 0).sum()) == round(0.6 * weight.numel()) for weight in weights)
