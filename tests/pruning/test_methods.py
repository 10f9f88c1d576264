"""The table of methods, the reading of options, and methods made of a score."""

import pytest
import torch

from secateur.errors import OptionError, SecateurError
from secateur.pruning import METHODS, SUMSQ, Method, Row, Statistics, method_options, one_shot, parse_method, ria, wanda

W = torch.tensor([[4.0, -3.0, 2.0, -1.0], [1.0, 2.0, -3.0, 4.0]])


# --- parse_method


@pytest.mark.parametrize("name", METHODS)
def test_a_bare_name_is_the_method_itself(name):
    assert parse_method(name) == METHODS[name]


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("sparsegpt:damping=0.02", {"damping": 0.02}),
        ("sparsegpt:block_size=64", {"block_size": 64}),
        ("sparsegpt:damping=1e-3:block_size=8", {"damping": 0.001, "block_size": 8}),
        ("ria:exponent=1", {"exponent": 1.0}),
    ],
)
def test_options(text, options):
    method = parse_method(text)
    assert dict(method.options) == options
    assert all(type(method.options[key]) is type(value) for key, value in options.items())
    original = METHODS[text.split(":")[0]]
    assert (method.prune, method.needs, method.pattern) == (original.prune, original.needs, original.pattern)
    assert not original.options


def test_options_reach_the_function():
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 9.0, 81.0, 3.0])
    statistics = Statistics.of(x)
    _, mask = parse_method("ria:exponent=2")(W, statistics, 0.5, Row())
    assert torch.equal(mask, Row().mask(ria(W, statistics, exponent=2.0), 0.5))
    assert not torch.equal(mask, METHODS["ria"](W, statistics, 0.5, Row())[1])
    weak, strong = (parse_method(f"sparsegpt:damping={d}")(W, statistics, 0.5, Row())[0] for d in (1e-4, 10))
    assert not torch.allclose(weak, strong)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("wnada", "did you mean wanda?"),
        ("sparsegtp", "did you mean sparsegpt?"),
        ("Wanda", "did you mean wanda?"),
        ("magnitud:x=1", "did you mean magnitude?"),
        ("zzz", "known: magnitude"),
        ("", "known: magnitude"),
    ],
)
def test_unknown_method(text, hint):
    with pytest.raises(OptionError) as caught:
        parse_method(text)
    assert "unknown method" in str(caught.value) and hint in str(caught.value)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("sparsegpt:dampning=1", "did you mean damping?"),
        ("sparsegpt:blocksize=1", "did you mean block_size?"),
        ("sparsegpt:damping", "OPTION=VALUE"),
        ("sparsegpt:", "OPTION=VALUE"),
        ("sparsegpt:damping=1,block_size=2", "damping takes float, not '1,block_size=2'"),
        ("sparsegpt:damping=small", "damping takes float, not 'small'"),
        ("sparsegpt:damping=", "damping takes float, not ''"),
        ("sparsegpt:block_size=1.5", "block_size takes int, not '1.5'"),
        ("sparsegpt:mask=1", "known: damping, block_size"),
        ("wanda:exponent=1", "wanda has no options"),
        ("magnitude:", "magnitude has no options"),
    ],
)
def test_bad_options(text, hint):
    with pytest.raises(OptionError) as caught:
        parse_method(text)
    assert hint in str(caught.value) and text.split(":")[0] in str(caught.value)


def test_errors_are_values_errors_and_ours():
    assert issubclass(OptionError, ValueError) and issubclass(OptionError, SecateurError)


# --- the table


def test_method_options():
    assert method_options(METHODS["sparsegpt"]) == {"damping": 0.01, "block_size": 128}
    assert method_options(METHODS["ria"]) == {"exponent": 0.5}
    assert method_options(METHODS["wanda"]) == method_options(METHODS["magnitude"]) == {}


def test_default_patterns():
    patterns = {name: METHODS[name].pattern for name in ("magnitude", "wanda", "ria", "sparsegpt")}
    assert patterns == {"magnitude": "matrix", "wanda": "row", "ria": "matrix", "sparsegpt": "matrix"}


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.needs])
def test_missing_statistics_are_named(name):
    with pytest.raises(OptionError, match="Statistics"):
        METHODS[name](W, Statistics(), 0.5, Row())


# --- methods made of a score


def first_columns(W_OI, statistics, *, weight=1.0, name="a"):
    """Keep the last columns."""
    return weight * torch.arange(W_OI.shape[1]).expand(W_OI.shape).float()


def test_one_shot_keeps_the_largest_scores():
    pruned, mask = one_shot(first_columns)(W, Statistics(), 0.5, Row())
    assert mask.tolist() == [[False, False, True, True]] * 2
    assert pruned.tolist() == [[0, 0, 2, -1], [0, 0, -3, 4]]
    _, mask = one_shot(first_columns)(W, Statistics(), 0.5, Row(), weight=-1.0)
    assert mask.tolist() == [[True, True, False, False]] * 2


def test_a_method_of_ones_own():
    method = Method(one_shot(first_columns))
    assert method_options(method) == {"weight": 1.0, "name": "a"}
    assert method.prune.__doc__ == "Keep the last columns."
    assert method.needs == frozenset()
    assert method(W, Statistics(), 0.25, Row())[1].tolist() == [[False, True, True, True]] * 2
    turned = Method(one_shot(first_columns), options={"weight": -1.0})
    assert turned(W, Statistics(), 0.25, Row())[1].tolist() == [[True, True, True, False]] * 2


def test_a_new_entry_can_be_read_with_its_options(monkeypatch):
    monkeypatch.setitem(METHODS, "first", Method(one_shot(first_columns)))
    method = parse_method("first:weight=-2:name=b")
    assert dict(method.options) == {"weight": -2.0, "name": "b"}
    with pytest.raises(OptionError, match="did you mean first"):
        parse_method("frist")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_shot_keeps_weights_bit_for_bit(dtype):
    weights = torch.randn(6, 20, generator=torch.Generator().manual_seed(1)).to(dtype)
    statistics = Statistics.of(torch.randn(30, 20, generator=torch.Generator().manual_seed(2)), {SUMSQ})
    pruned, mask = one_shot(wanda)(weights, statistics, 0.5, Row())
    assert pruned.dtype == dtype
    assert torch.equal(pruned[mask], weights[mask])
    assert not pruned[~mask].any()
