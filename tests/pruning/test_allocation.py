"""Allocations: keys, values, which rule wins, and errors that say what to write."""

import pytest

from secateur.errors import OptionError
from secateur.pruning import NM, MatrixInfo, Row, Target, allocate, mean_sparsity, parse_pattern
from secateur.pruning.allocation import check_sparsity, default_target

KINDS = ("self_attn.q_proj", "mlp.up_proj")
BLOCKS = (0, 1, 2, 10)
MATRICES = [MatrixInfo(f"model.layers.{b}.{kind}", b, 100 * (1 + b)) for b in BLOCKS for kind in KINDS]
HALF = Target(0.5, Row())


def given(rules, default=HALF):
    """The sparsity of every matrix, by block and the first letter of its name."""
    return {(m.block, m.name.split(".")[-1][0]): t.sparsity for m, t in pairs(rules, default)}


def pairs(rules, default=HALF):
    targets = allocate(MATRICES, default, rules)
    assert list(targets) == [m.name for m in MATRICES]
    return [(m, targets[m.name]) for m in MATRICES]


def everywhere(sparsity=0.5, **changes):
    """`sparsity` everywhere but where changes such as q1=0.7, all2=0 say otherwise."""
    table = {(b, letter): sparsity for b in BLOCKS for letter in "qu"}
    for key, value in changes.items():
        letters, block = ("qu", key[3:]) if key.startswith("all") else (key[0], key[1:])
        table.update({(int(block), letter): value for letter in letters})
    return table


# --- keys and values


def test_without_rules_all_take_the_default():
    assert given(None) == everywhere()
    assert given({}) == everywhere()


@pytest.mark.parametrize("key", ["1", "layer.1", "layers.1", 1])
def test_a_block_is_exactly_that_block(key):
    assert given({key: 0.7}) == everywhere(all1=0.7)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (r".*\.q_proj", everywhere(q0=0.7, q1=0.7, q2=0.7, q10=0.7)),
        (r"model\.layers\.1\.mlp\.up_proj", everywhere(u1=0.7)),
        (r"model\.layers\.[12]\..*", everywhere(all1=0.7, all2=0.7)),
        (r".*\.(0|10)\.mlp.*", everywhere(u0=0.7, u10=0.7)),
        (r".*", everywhere(0.7)),
    ],
)
def test_a_regular_expression_matches_the_whole_name(key, expected):
    assert given({key: 0.7}) == expected


@pytest.mark.parametrize("key", ["q_proj", "model", r"model\.layers\.1", "layers.1.mlp.up_proj", r".*\.up"])
def test_a_part_of_a_name_matches_nothing(key):
    with pytest.raises(OptionError, match="matches no block and no whole matrix name"):
        given({key: 0.7})


def test_the_first_rule_that_matches_wins():
    assert given({"1": 0.6, r".*q_proj": 0.7, ".*": 0.2}) == everywhere(0.2, q0=0.7, q2=0.7, q10=0.7, all1=0.6)
    assert given({r".*q_proj": 0.7, "1": 0.6}) == everywhere(q0=0.7, q1=0.7, q2=0.7, q10=0.7, u1=0.6)
    assert given({"layers.1": 0.6, "1": 0.7}) == everywhere(all1=0.6)


def test_0_leaves_dense():
    assert given({"0": 0, ".*up_proj": 0.0}) == everywhere(all0=0, u1=0, u2=0, u10=0)


@pytest.mark.parametrize("value", [0.25, "0.25", "2.5e-1"])
def test_numbers_may_be_spelled(value):
    assert given({"2": value}) == everywhere(all2=0.25)


def test_an_n_m_value_brings_its_pattern():
    for matrix, target in pairs({"1": "1:4", "layers.2": 0.3}):
        want = {1: Target(0.75, NM(1, 4)), 2: Target(0.3, Row())}.get(matrix.block, HALF)
        assert target == want


def test_under_n_m_other_n_m_and_0_are_taken():
    default = Target(0.5, NM(2, 4))
    targets = {m.block: t for m, t in pairs({"0": "4:16", "1": 0}, default)}
    assert targets[0] == Target(0.75, NM(4, 16))
    assert targets[1].sparsity == 0
    assert targets[2] == targets[10] == default


def test_under_n_m_a_number_is_refused():
    with pytest.raises(OptionError, match="4:16") as caught:
        given({"1": 0.6}, Target(0.5, NM(2, 4)))
    assert "'1'" in str(caught.value) and "2:4" in str(caught.value)


def test_a_list_has_one_value_for_each_block():
    assert given([0.1, 0, "1:4", 0.9]) == everywhere(all0=0.1, all1=0, all2=0.75, all10=0.9)
    assert given((0.1, 0.2, 0.3, 0.4)) == everywhere(all0=0.1, all1=0.2, all2=0.3, all10=0.4)


# --- errors


@pytest.mark.parametrize("count", [0, 3, 5, 8])
def test_a_list_of_another_length(count):
    with pytest.raises(OptionError, match=f"{count} numbers for 4 blocks"):
        given([0.5] * count)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("layers.3", "layers.0"),
        ("3", "layers.10"),
        ("layer.11", "layers.1"),
        (r"model.layers.1.mlp.upproj", "did you mean model.layers.1.mlp.up_proj"),
        ("model.layers.1.self_attn.q", "did you mean model.layers.1.self_attn.q_proj"),
    ],
)
def test_a_key_that_matches_nothing_names_the_nearest(key, hint):
    with pytest.raises(OptionError) as caught:
        given({"0": 0.5, key: 0.5})
    assert repr(key) in str(caught.value) and hint in str(caught.value)


@pytest.mark.parametrize("key", ["*.q_proj", "(", "["])
def test_a_key_that_is_no_regular_expression(key):
    with pytest.raises(OptionError, match="regular expression") as caught:
        given({key: 0.5})
    assert repr(key) in str(caught.value)


@pytest.mark.parametrize("value", [1, 1.0, -0.1, 1.5, 50, float("nan"), float("inf"), "1", "nan"])
def test_a_sparsity_out_of_range(value):
    with pytest.raises(OptionError, match="at least 0 and below 1") as caught:
        given({"layers.1": value})
    assert "layers.1" in str(caught.value)


@pytest.mark.parametrize("value", ["dense", "row", "", None, [0.5], {}])
def test_a_sparsity_that_is_no_number(value):
    with pytest.raises(OptionError, match="must be a number") as caught:
        given({"layers.1": value})
    assert "layers.1" in str(caught.value)


@pytest.mark.parametrize(("value", "word"), [("block:4x4", "N:M"), ("4:4", "0 < N < M"), ("a:b", "unknown pattern")])
def test_a_pattern_that_is_no_n_m(value, word):
    with pytest.raises(OptionError, match=word):
        given({"layers.1": value})


def test_percent_is_explained():
    with pytest.raises(OptionError, match=r"write 0\.5"):
        check_sparsity(50, "sparsity")


@pytest.mark.parametrize("value", [0, 0.0, 0.5, "0.5", 0.999999])
def test_sparsities_in_range(value):
    assert check_sparsity(value, "here") == float(value)


# --- the default


@pytest.mark.parametrize(
    ("sparsity", "pattern", "expected"),
    [
        (None, "row", 0.5),
        (None, "block:4x4", 0.5),
        (None, "2:4", 0.5),
        (None, "1:4", 0.75),
        (0.3, "matrix", 0.3),
        (0, "row", 0),
        (0.75, "1:4", 0.75),
        ("0.4", "3:5", 0.4),
    ],
)
def test_default_target(sparsity, pattern, expected):
    target = default_target(sparsity, parse_pattern(pattern))
    assert target == Target(pytest.approx(expected), parse_pattern(pattern))


def test_sparsity_and_pattern_that_contradict_each_other():
    with pytest.raises(OptionError, match="leave one out") as caught:
        default_target(0.6, parse_pattern("2:4"))
    assert all(word in str(caught.value) for word in ("2:4", "0.5", "0.6"))


@pytest.mark.parametrize("sparsity", [1, -0.1, 60, "half"])
@pytest.mark.parametrize("pattern", ["row", "2:4"])
def test_default_out_of_range(sparsity, pattern):
    with pytest.raises(OptionError, match="sparsity"):
        default_target(sparsity, parse_pattern(pattern))


# --- the mean


def test_mean_is_weighted_by_weights():
    targets = allocate(MATRICES, HALF, {"10": 0, "1": 0.8})
    total = sum(m.weights for m in MATRICES)
    want = (200 * 0.5 + 400 * 0.8 + 600 * 0.5) / total
    assert mean_sparsity(MATRICES, targets) == pytest.approx(want)


def test_mean_of_equal_targets_and_of_nothing():
    assert mean_sparsity(MATRICES, allocate(MATRICES, HALF)) == pytest.approx(0.5)
    assert mean_sparsity([], {}) == 0
