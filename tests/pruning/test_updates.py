"""Stages that follow a method: the solve against an exact one, swaps against all there are, and how they are named."""

import math
from functools import partial
from importlib import import_module
from itertools import product

import pytest
import torch

import secateur
from secateur.errors import NumericsError, OptionError
from secateur.pipeline.plan import Request, method_name
from secateur.pruning import (
    GRAM,
    METHODS,
    NM,
    SUMSQ,
    Block,
    Matrix,
    Method,
    Row,
    Statistics,
    method_options,
    obs,
    one_shot,
    parse_method,
    parse_pattern,
    pcg,
    sparsegpt,
    swaps,
    updated,
    wanda,
)  # fmt: skip
from secateur.pruning.swaps import swap_in_rows, sweep_groups
from secateur.pruning.updates import normalised, shrink
from tiny import tiny_model

solve = partial(pcg, alike=0)  # on the Gram matrix as it is


def problem(rows, columns, tokens=None, seed=0):
    """Weights, and the sums over correlated tokens of different loudness: W_OI, Statistics."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.eye(columns) + torch.randn(columns, columns, generator=g) / columns**0.5
    x = torch.randn(tokens or 3 * columns, columns, generator=g) @ mixing * torch.randn(columns, generator=g).exp()
    return torch.randn(rows, columns, generator=g), Statistics.of(x)


def error(W_OI, new_OI, G_II):
    D, G = new_OI.double() - W_OI.double(), G_II.double()
    return ((D @ G) * D).sum().item()


def damped(G_II, damping=0.01):
    G = G_II.double()
    diagonal = G.diagonal()
    return G + damping * diagonal[diagonal > 0].mean() * torch.eye(len(G), dtype=G.dtype)


def exact(W_OI, mask_OI, H_II):
    """The best weights on a mask, row by row: w_S = H_SS⁻¹ (H w)_S."""
    W = torch.zeros(W_OI.shape, dtype=torch.float64)
    for i, support in enumerate(mask_OI):
        W[i, support] = torch.linalg.solve(H_II[support][:, support], (H_II @ W_OI[i].double())[support])
    return W


def start(W, statistics, pattern, sparsity=0.5):
    new, mask = METHODS["wanda"](W, statistics, sparsity, parse_pattern(pattern))
    return W, new, mask, statistics, parse_pattern(pattern)


# --- pcg


@pytest.mark.parametrize("pattern", ["row", "matrix", "2:4", "block:4x8"])
@pytest.mark.parametrize("shape", [(12, 60), (3, 130)])
def test_pcg_comes_to_the_exact_solution(pattern, shape):
    W, statistics = problem(*shape)
    W, new, mask, *rest = start(W.double(), statistics, pattern)
    got, got_mask = solve(W, new, mask, *rest, iterations=500)
    assert torch.equal(got_mask, mask) and got.dtype == torch.float64
    torch.testing.assert_close(got, exact(W, mask, damped(statistics.gram_II)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("damping", [0.001, 0.3])
def test_pcg_damping(damping):
    W, statistics = problem(6, 40)
    W, new, mask, *rest = start(W.double(), statistics, "row")
    got, _ = solve(W, new, mask, *rest, iterations=500, damping=damping)
    torch.testing.assert_close(got, exact(W, mask, damped(statistics.gram_II, damping)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", ["row", "2:4"])
def test_pcg_is_as_good_as_exact_by_default(pattern):
    W, statistics = problem(24, 130)
    W, new, mask, *rest = start(W, statistics, pattern)
    H = damped(statistics.gram_II)
    best, before = error(W, exact(W, mask, H), H), error(W, new, H)
    assert best <= error(W, solve(W, new, mask, *rest)[0], H) < 1.0001 * best < 0.8 * before


def test_pcg_starts_at_the_weights_so_far():
    W, statistics = problem(12, 60)
    W, new, mask, *rest = start(W, statistics, "row")
    H = damped(statistics.gram_II)
    solution = exact(W, mask, H).float()
    got, _ = solve(W, solution, mask, *rest, iterations=1)
    torch.testing.assert_close(got, solution, rtol=1e-4, atol=1e-5)
    assert error(W, got, H) < 0.99 * error(W, solve(W, new, mask, *rest, iterations=1)[0], H)


def test_pcg_takes_steps_of_its_own_for_every_row():
    W, statistics = problem(12, 60)
    W[::2] *= 1e4
    got = solve(*start(W, statistics, "row"))[0]
    for i in range(12):
        alone = solve(*start(W[i : i + 1], statistics, "row"))[0]
        torch.testing.assert_close(got[i : i + 1], alone, rtol=1e-3, atol=1e-4 * W[i].abs().max().item())


def test_a_row_of_pcg_that_is_solved_rests_while_others_go_on():
    W, statistics = problem(2, 10)
    statistics.gram_II[:4] = statistics.gram_II[:, :4] = 0
    statistics.gram_II[:4, :4] = torch.eye(4)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0, 4:] = False
    got, _ = solve(W, torch.zeros(2, 10), mask, statistics, Matrix())
    torch.testing.assert_close(got, W * mask, rtol=1e-4, atol=1e-4)


def test_no_row_of_pcg_ends_worse():
    W, statistics = problem(30, 80, tokens=8)
    H = damped(statistics.gram_II, 1e-6)
    W, new, mask, *rest = start(W, statistics, "row")
    for iterations in (1, 2, 5, 200):
        got, _ = solve(W, new, mask, *rest, iterations=iterations, damping=1e-6)
        rows = zip(W, got, new, strict=True)
        assert all(error(w[None], a[None], H) <= error(w[None], b[None], H) * (1 + 1e-4) for w, a, b in rows)


def test_pcg_leaves_dead_columns_and_rows_that_are_solved():
    W, statistics = problem(6, 20)
    statistics.gram_II[4] = statistics.gram_II[:, 4] = 0
    W[2] = 0
    mask = torch.ones(6, 20, dtype=torch.bool)
    mask[1:, ::3] = False
    got, _ = solve(W, W * mask, mask, statistics, Matrix())
    torch.testing.assert_close(got[0], W[0])
    assert not got[2].any() and got.isfinite().all()
    torch.testing.assert_close(got[:, 4], W[:, 4])
    assert not torch.allclose(got[1], W[1] * mask[1], rtol=1e-3)


# --- shrinkage


def correlated(tokens, columns, seed):
    """Inputs whose correlations fall by half from one column to the next, and those correlations in truth."""
    truth = 0.5 ** (torch.arange(columns)[:, None] - torch.arange(columns)).abs().double()
    g = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, columns, dtype=torch.float64, generator=g) @ torch.linalg.cholesky(truth).T, truth


@pytest.mark.parametrize(("tokens", "least"), [(5, 0.5), (40, 0.2), (4000, 0.005)])
def test_the_shrunk_correlations_are_nearer_to_the_truth(tokens, least):
    """Than those that were measured, and than none, by a share that falls with the tokens."""
    taken, errors = [], {share: 0.0 for share in ("estimated", 0.0, 1.0)}
    for seed in range(20):
        x, truth = correlated(tokens, 30, seed)
        raw = x.T @ x / (x.square().sum(0).sqrt() * x.square().sum(0).sqrt()[:, None])
        shrunk = raw.clone()
        shrink(shrunk, torch.ones(30), tokens)
        taken.append(1 - (shrunk[0, 1] / raw[0, 1]).item())
        torch.testing.assert_close(shrunk, raw + taken[-1] * (torch.eye(30) - raw))
        for share in errors:
            tried = shrunk if share == "estimated" else raw + share * (torch.eye(30) - raw)
            errors[share] += (tried - truth).square().sum().item()
    assert errors["estimated"] <= min(errors.values()) and least < sum(taken) / 20 < 3 * least


@pytest.mark.parametrize("loudness", [0.0, 1e-4, 1e-3])
def test_quiet_and_dead_columns_are_no_reason_to_shrink_the_others(loudness):
    """Damping has drawn their correlations towards zero already, without a chance that would have to be taken off."""
    x = torch.cat([correlated(4096, 20, 0)[0], loudness * correlated(4096, 180, 1)[0]], 1).float()
    W = torch.randn(8, 200, generator=torch.Generator().manual_seed(0))
    alone = start(W[:, :20], Statistics.of(x[:, :20]), "row")
    H, _ = normalised("pcg", W, Statistics.of(x), 0.01, 8.0)
    want, _ = normalised("pcg", alone[0], Statistics.of(x[:, :20]), 0.01, 8.0)
    torch.testing.assert_close(H[:20, :20], want, rtol=2e-2, atol=2e-2)
    assert H[0, 1] > 0.45


def test_few_tokens_do_no_harm():
    """On other tokens of the same kind, where the Gram matrix as it is would do more harm than leaving weights."""
    W = torch.randn(20, 60, generator=torch.Generator().manual_seed(1))
    seen, other = correlated(24, 60, 0)[0].float(), correlated(5000, 60, 1)[0].float()
    W, new, mask, *rest = start(W, Statistics.of(seen), "row")
    left, trusting, careful = (
        error(W, found, other.T @ other) for found in (new, *(pcg(W, new, mask, *rest, alike=a)[0] for a in (0, 1)))
    )
    assert careful < left < trusting
    torch.testing.assert_close(pcg(W, new, mask, *rest, alike=1e6)[0], new)


def test_every_token_counts_once_they_are_many():
    x, _ = correlated(100_000, 20, 0)
    W = torch.randn(8, 20, generator=torch.Generator().manual_seed(0))
    W, new, mask, *rest = start(W, Statistics.of(x.float()), "row")
    got, trusting = pcg(W, new, mask, *rest)[0], solve(W, new, mask, *rest)[0]
    torch.testing.assert_close(got, trusting, rtol=1e-2, atol=1e-3)
    assert not torch.equal(got, trusting)


@pytest.mark.parametrize("alike", [-1.0, math.nan, math.inf])
def test_alike_out_of_range(alike):
    W, statistics = problem(2, 4)
    with pytest.raises(OptionError, match="pcg: alike"):
        pcg(*start(W, statistics, "row"), alike=alike)


# --- obs


@pytest.mark.parametrize("pattern", ["row", "2:4", "block:4x8"])
def test_obs_is_sparsegpt_with_the_mask(pattern):
    W, statistics = problem(12, 60)
    W, new, mask, *rest = start(W, statistics, pattern)
    for options in ({}, {"damping": 0.2, "block_size": 16}):
        got, got_mask = obs(W, new, mask, *rest, **options)
        want, _ = sparsegpt(W, statistics, 0.5, rest[1], mask=mask, **options)
        assert torch.equal(got, want) and torch.equal(got_mask, mask)


# --- swaps


def best_swap(w_I, keep_I, G_II, m):
    """The pair (pruned instead, kept instead) in one group of m that lowers a row's error most, by trying all."""

    def cost(keep):
        r = torch.where(keep, 0, w_I.double())
        return (r @ G_II.double() @ r).item()

    best = (0.0, None)
    for p, q in product(range(len(w_I)), repeat=2):
        if keep_I[p] and not keep_I[q] and p // m == q // m:
            other = keep_I.clone()
            other[p], other[q] = False, True
            best = min(best, (cost(other) - cost(keep_I), (p, q)))
    return best


@pytest.mark.parametrize("seed", range(5))
def test_a_swap_in_a_row_is_the_best_of_all(seed):
    W, statistics = problem(8, 10, seed=seed)
    _, mask = METHODS["magnitude"](W, statistics, 0.5, Row())
    keep, G = mask.clone(), statistics.gram_II
    for _ in range(30):
        want = [best_swap(w, k, G, 10)[1] for w, k in zip(W, keep, strict=True)]
        after = keep.clone()
        swap_in_rows(W, after, G, 1, 10, torch.zeros(8))
        for before_I, after_I, pair in zip(keep, after, want, strict=True):
            changed = (before_I != after_I).nonzero().flatten().tolist()
            assert changed == (sorted(pair) if pair else [])
            assert not pair or (after_I[pair[1]] and not after_I[pair[0]])
        if torch.equal(after, keep):
            break
        keep = after
    assert any(want) is False and not torch.equal(keep, mask)  # it went on to where no swap pays
    assert torch.equal(swaps(W, W * mask, mask, statistics, Row(), candidates=10)[1], keep)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 5)])
def test_groups_swap_their_best_pair_one_after_the_other(n, m):
    W, statistics = problem(6, 14)
    G = statistics.gram_II
    _, mask = METHODS["magnitude"](W, statistics, 0.5, NM(n, m))
    got, want = mask.clone(), mask.clone()
    assert sweep_groups(W, got, G, m, torch.zeros(6))
    for first in range(0, 14, m):
        for w, keep in zip(W, want, strict=True):
            inside = torch.zeros(14, dtype=torch.bool)
            inside[first : first + m] = True
            swap = (0.0, None)
            for p, q in product(inside.nonzero().flatten().tolist(), repeat=2):
                if keep[p] and not keep[q]:
                    other = keep.clone()
                    other[p], other[q] = False, True
                    rs = [torch.where(k, 0, w.double()) for k in (other, keep)]
                    new, old = (r @ G.double() @ r for r in rs)
                    swap = min(swap, ((new - old).item(), (p, q)))
            if swap[1]:
                keep[swap[1][0]], keep[swap[1][1]] = False, True
    assert torch.equal(got, want) and not torch.equal(got, mask)


def test_chunks_of_groups_see_each_other(monkeypatch):
    W, statistics = problem(6, 62)
    mask = METHODS["magnitude"](W, statistics, 0.5, NM(2, 4))[1]
    whole = swaps(W, W, mask, statistics, NM(2, 4))[1]
    monkeypatch.setattr(import_module("secateur.pruning.swaps"), "CHUNK", 8)
    assert torch.equal(swaps(W, W, mask, statistics, NM(2, 4))[1], whole)
    assert not torch.equal(whole, mask)


@pytest.mark.parametrize("pattern", ["row", "2:4", "3:5"])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swaps_lower_the_error_of_rows_and_keep_their_counts(pattern, sparsity, dtype):
    W, statistics = problem(20, 62)
    W, new, mask, *rest = start(W.to(dtype), statistics, pattern, sparsity)
    before = mask.clone()
    got, got_mask = swaps(W, new, mask, *rest)
    assert torch.equal(mask, before)
    assert torch.equal(got, torch.where(got_mask, W, 0)) and got.dtype == dtype
    assert torch.equal(got_mask.sum(1), mask.sum(1))
    if isinstance(rest[1], NM):
        for a, b in zip(got_mask.split(rest[1].m, 1), mask.split(rest[1].m, 1), strict=True):
            assert torch.equal(a.sum(1), b.sum(1))
    errors = [(error(w[None], a[None], statistics.gram_II), error(w[None], b[None], statistics.gram_II))
              for w, a, b in zip(W, got, new, strict=True)]  # fmt: skip
    assert all(a <= b for a, b in errors)
    assert sum(a for a, _ in errors) < 0.99 * sum(b for _, b in errors)


@pytest.mark.parametrize("pattern", ["row", "2:4"])
def test_more_sweeps_and_candidates_are_better(pattern):
    W, statistics = problem(20, 60)
    W, new, mask, *rest = start(W, statistics, pattern)
    one, two, many, narrow = (
        error(W, swaps(W, new, mask, *rest, **options)[0], statistics.gram_II)
        for options in ({"sweeps": 1}, {"sweeps": 2}, {}, {"candidates": 1})
    )
    assert error(W, new, statistics.gram_II) > one > two > many
    assert narrow > many or pattern == "2:4"


# --- all of them


@pytest.mark.parametrize(
    ("stage", "options", "words"),
    [
        *[(stage, {"damping": value}, "damping") for stage in (pcg, obs) for value in (0.0, math.nan, math.inf)],
        (pcg, {"iterations": 0}, "pcg: iterations"),
        (swaps, {"sweeps": 0}, "swaps: sweeps"),
        (swaps, {"candidates": 0}, "swaps: candidates"),
    ],
)
def test_options_out_of_range(stage, options, words):
    W, statistics = problem(3, 8)
    with pytest.raises(OptionError, match=words):
        stage(*start(W, statistics, "row"), **options)


@pytest.mark.parametrize("stage", [pcg, obs, swaps])
def test_stages_need_a_gram_matrix_that_is_finite(stage):
    W, statistics = problem(3, 8)
    W, new, mask, _, pattern = start(W, statistics, "row")
    with pytest.raises(OptionError, match="gram_II"):
        stage(W, new, mask, Statistics(), pattern)
    statistics.gram_II[2, 3] = statistics.gram_II[3, 2] = math.nan
    with pytest.raises(NumericsError, match="NaN or Inf"):
        stage(W, new, mask, statistics, pattern)


@pytest.mark.parametrize("pattern", [Matrix(), Block(4, 8)])
def test_swaps_refuses_other_patterns(pattern):
    W, statistics = problem(8, 16)
    with pytest.raises(OptionError, match=f"row or N:M, not {pattern}"):
        swaps(W, W, W > 0, statistics, pattern)


# --- compositions


def test_a_composition_runs_its_parts_in_order():
    W, statistics = problem(12, 60)
    method = parse_method("wanda+swaps:sweeps=2+pcg:iterations=3:damping=1e+1")
    got, got_mask = method(W, statistics, 0.5, Row())
    new, mask = METHODS["wanda"](W, statistics, 0.5, Row())
    new, mask = swaps(W, new, mask, statistics, Row(), sweeps=2)
    new, mask = pcg(W, new, mask, statistics, Row(), iterations=3, damping=10.0)
    assert torch.equal(got, new) and torch.equal(got_mask, mask)


def test_options_of_the_method_and_of_a_stage_stay_apart():
    W, statistics = problem(12, 60)
    got, _ = parse_method("sparsegpt:damping=0.5+pcg:damping=0.001")(W, statistics, 0.5, Row())
    new, mask = sparsegpt(W, statistics, 0.5, Row(), damping=0.5)
    assert torch.equal(got, pcg(W, new, mask, statistics, Row(), damping=0.001)[0])


def test_what_is_known_of_a_composition():
    method = parse_method("wanda+pcg")
    assert method == parse_method("wanda+pcg") != parse_method("wanda+pcg:iterations=3")
    assert method.needs == {SUMSQ, GRAM} and parse_method("magnitude+obs").needs == {GRAM}
    assert method.pattern == "row" and parse_method("sparsegpt+pcg").pattern == "matrix"
    assert method.score is None and METHODS["wanda"].score is not None
    assert method_options(method) == {} == dict(method.options)
    assert not METHODS["wanda"].options and METHODS["wanda"].needs == {SUMSQ}


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("wanda+pgc", "unknown update 'pgc': did you mean pcg?"),
        ("wanda+", "unknown update ''"),
        ("wanda+sparsegpt", "known: pcg, obs, swaps"),
        ("wnada+pcg", "did you mean wanda?"),
        ("wanda+pcg:iteration=3", "did you mean iterations?"),
        ("wanda+pcg:iterations=3.5", "update 'pcg': iterations takes int, not '3.5'"),
        ("wanda:damping=1+pcg", "wanda has no options"),
        ("wanda+swap:x", "did you mean swaps?"),
    ],
)
def test_bad_compositions(text, hint):
    with pytest.raises(OptionError) as caught:
        parse_method(text)
    assert hint in str(caught.value)


def test_updated():
    assert updated("wanda", None) == "wanda"
    assert updated("wanda:x=1", "swaps+pcg") == "wanda:x=1+swaps+pcg"
    own = Method(one_shot(wanda), frozenset({SUMSQ}), "row")
    assert updated(own, None) is own
    composed = updated(own, "swaps+pcg:iterations=3")
    W, statistics = problem(12, 60)
    want, mask = parse_method("wanda+swaps+pcg:iterations=3")(W, statistics, 0.5, Row())
    got, got_mask = composed(W, statistics, 0.5, Row())
    assert torch.equal(got, want) and torch.equal(got_mask, mask)
    assert method_name(composed) == "wanda+swaps+pcg:iterations=3"
    assert method_name(updated(composed, "obs")) == "wanda+swaps+pcg:iterations=3+obs"
    with pytest.raises(OptionError, match="did you mean pcg"):
        updated(own, "pgc")


def test_a_request_checks_the_stages():
    Request(method="alps+swaps+pcg", pattern="2:4").check()
    for method, pattern, words in (
        ("magnitude+swaps", None, "not matrix"),
        ("wanda+swaps", "block:4x4", "not block:4x4"),
        ("wanda+pcg:iterations=0", None, "at least 1"),
        ("alps:rho=0", None, "rho"),
    ):
        with pytest.raises(OptionError, match=words):
            Request(method=method, pattern=pattern).check()


def test_update_of_prune_is_the_same_as_more_text():
    results = []
    for options in (
        {"method": "wanda+pcg"},
        {"update": "pcg"},
        {"method": METHODS["wanda"], "update": "pcg"},
        {"method": "wanda"},
    ):
        model = tiny_model("llama")
        report = secateur.prune(model, calibration=torch.arange(96).reshape(4, 24) % 64, **options).report
        results.append((report["plan"]["method"], model.model.layers[0].mlp.down_proj.weight))
    assert [name for name, _ in results] == ["wanda+pcg"] * 3 + ["wanda"]
    assert all(torch.equal(weight, results[0][1]) for _, weight in results[:3])
    assert not torch.equal(results[3][1], results[0][1])


def test_swaps_come_before_what_solves_for_values():
    """They keep the original weights, so what a solve found would be lost without a word."""
    for text in ("wanda+pcg+swaps", "wanda+obs+swaps", "wanda+swaps+pcg+swaps"):
        with pytest.raises(
            OptionError, match=r"update swaps: keeps the original weights, so it comes before (pcg|obs)"
        ):
            parse_method(text)
