"""What holds for every pattern and every allocation, whatever the scores, the shapes and the rules."""

import math
import re

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from secateur.errors import OptionError
from secateur.pipeline.plan import allocation_rules
from secateur.pruning import NM, Block, Matrix, MatrixInfo, Row, Target, allocate, mean_sparsity, parse_pattern
from secateur.pruning.allocation import default_target

every = settings(max_examples=150, deadline=None, derandomize=True)

SIZES = st.integers(1, 20)
NMS = st.tuples(SIZES, SIZES).filter(lambda p: p[0] != p[1]).map(lambda p: NM(min(p), max(p)))
BLOCKS = st.builds(Block, st.integers(1, 6), st.integers(1, 6))
GLOBAL = st.one_of(st.just(Row()), st.just(Matrix()), BLOCKS)  # those that take a sparsity
PATTERNS = st.one_of(GLOBAL, NMS)
SPARSITIES = st.one_of(st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 0.75, 0.99]), st.floats(0, 0.9999))
SHAPES = st.one_of(
    st.tuples(st.integers(1, 7), st.integers(1, 16)),
    st.tuples(st.integers(1, 30), st.just(1)),  # one column
    st.sampled_from([(0, 5), (5, 0), (0, 0)]),  # no weights at all
)
FEW = st.sampled_from([0.0, -0.0, 1.0, 2.0, 3.0, math.inf, -math.inf])  # ties and infinities
FINITE = st.integers(-1000, 1000).map(float)


@st.composite
def matrices(draw, shapes=SHAPES, distinct=False):
    """Scores: many ties and infinities, or integers, or all distinct; some of the rows all zero."""
    rows, columns = draw(shapes)
    size = rows * columns
    if distinct:
        cells = draw(st.permutations(range(size)))
    else:
        cells = draw(st.lists(draw(st.sampled_from([FEW, FINITE])), min_size=size, max_size=size))
    score = torch.tensor(cells, dtype=torch.float32).reshape(rows, columns)
    if rows and not distinct and draw(st.booleans()):
        score[draw(st.lists(st.integers(0, rows - 1), max_size=rows))] = 0
    return score


def bands(length, step):
    return [slice(a, min(a + step, length)) for a in range(0, length, step)]


def units(pattern, score_OI):
    """What may go: for each choice its units in order, each as (score, where in the matrix)."""
    rows, columns = score_OI.shape
    cells = [[(value, (r, c)) for c, value in enumerate(row)] for r, row in enumerate(score_OI.tolist())]
    if isinstance(pattern, Row):
        return cells
    if isinstance(pattern, Matrix):
        return [[cell for row in cells for cell in row]]
    if isinstance(pattern, NM):
        return [row[group] for row in cells for group in bands(columns, pattern.m)]
    tiles = [(down, across) for down in bands(rows, pattern.height) for across in bands(columns, pattern.width)]
    square_OI = score_OI.double().square()
    return [[(square_OI[tile].mean().item(), tile) for tile in tiles]]


def count(pattern, shape, group, sparsity):
    """How many units of one choice go."""
    rows, columns = shape
    if isinstance(pattern, NM):
        return len(group) - math.ceil(len(group) * pattern.n / pattern.m)
    if isinstance(pattern, Block):
        return round(sparsity * math.ceil(rows / pattern.height) * math.ceil(columns / pattern.width))
    return round(sparsity * columns) if isinstance(pattern, Row) else round(sparsity * rows * columns)


def gone(mask_OI, where):
    """Whether a weight, or a whole tile, is pruned; a tile is never pruned in part."""
    kept = mask_OI[where].reshape(-1).tolist()
    assert all(kept) == any(kept)
    return not all(kept)


def accepted(call):
    """What a call returns, or None where it refuses as it may: in one line."""
    try:
        return call()
    except OptionError as error:
        said = str(error)
    assert "\n" not in said
    return None


# Patterns.


KINDS = {"row": st.just(Row()), "matrix": st.just(Matrix()), "n:m": NMS, "block": BLOCKS}


@pytest.mark.parametrize("kind", KINDS)
@every
@given(score=matrices(), sparsity=SPARSITIES, data=st.data())
def test_exactly_the_lowest_go(kind, score, sparsity, data):
    """Counts are exact; all that is pruned comes before all that is kept, by score and then by place."""
    pattern, before = data.draw(KINDS[kind]), score.clone()
    mask = pattern.mask(score, sparsity)
    assert mask.dtype == torch.bool and mask.shape == score.shape and torch.equal(score, before)
    for group in units(pattern, score):
        order = [(value, place) for place, (value, _) in enumerate(group)]
        pruned = [place for place, (_, where) in enumerate(group) if gone(mask, where)]
        kept = sorted(set(range(len(group))) - set(pruned))
        assert len(pruned) == count(pattern, score.shape, group, sparsity)
        if pruned and kept:
            assert max(order[p] for p in pruned) < min(order[k] for k in kept)


@every
@given(matrices(), NMS)
def test_never_more_than_n_in_any_m(score, pattern):
    mask = pattern.mask(score, 0.5)
    for group in bands(score.shape[1], pattern.m):
        kept = mask[:, group].sum(1)
        assert (kept <= pattern.n).all() and (kept >= 1).all()


@every
@given(GLOBAL, SPARSITIES, st.integers(1, 9), st.data())
def test_counts_of_chunks_add_up_wherever_they_start(pattern, sparsity, rows, data):
    """Two chunks take what one of both takes, also far from the first column."""
    unit = pattern.selection_width or 1
    start, first, second = (data.draw(st.integers(low, high)) * unit for low, high in ((0, 10**6), (1, 5), (1, 5)))

    def pruned(start, columns):
        mask = pattern.mask(torch.arange(rows * columns).reshape(rows, columns).float(), sparsity, start)
        return int((~mask).sum()) if not isinstance(pattern, Block) else int((~mask[:: pattern.height, ::unit]).sum())

    assert pruned(start, first) + pruned(start + first, second) == pruned(start, first + second)
    many = rows if isinstance(pattern, Row) else 1  # choices
    columns = first // unit
    down = -(-rows // pattern.height) if isinstance(pattern, Block) else rows
    assert abs(pruned(start, first) - sparsity * down * columns) <= many


@every
@given(matrices(), GLOBAL, SPARSITIES, SPARSITIES)
def test_a_higher_sparsity_takes_what_a_lower_one_takes(score, pattern, one, other):
    lower, higher = (pattern.mask(score, sparsity) for sparsity in sorted((one, other)))
    assert not (higher & ~lower).any()


@every
@given(matrices(), PATTERNS, SPARSITIES, st.integers(-12, 12))
def test_the_scale_of_the_scores_does_not_matter(score, pattern, sparsity, exponent):
    scale = 2.0**exponent  # exact
    assert torch.equal(pattern.mask(score * scale, sparsity), pattern.mask(score, sparsity))


@every
@given(matrices(), st.one_of(st.just(Row()), NMS), SPARSITIES, st.randoms(use_true_random=False))
def test_rows_are_chosen_by_themselves(score, pattern, sparsity, random):
    order = random.sample(range(len(score)), len(score))
    assert torch.equal(pattern.mask(score[order], sparsity), pattern.mask(score, sparsity)[order])


@every
@given(matrices(distinct=True), st.one_of(st.just(Matrix()), BLOCKS), SPARSITIES, st.randoms(use_true_random=False))
def test_the_order_of_rows_matters_to_ties_only(score, pattern, sparsity, random):
    height = pattern.height if isinstance(pattern, Block) else 1
    score = score[: len(score) // height * height]  # whole bands of rows
    values = [value for group in units(pattern, score) for value, _ in group]
    assume(len(set(values)) == len(values))
    down = len(score) // height
    order = [band * height + r for band in random.sample(range(down), down) for r in range(height)]
    assert torch.equal(pattern.mask(score[order], sparsity), pattern.mask(score, sparsity)[order])


@every
@given(matrices(), st.one_of(st.integers(1, 10**9), st.just(10**9)), st.integers(1, 10**9), SPARSITIES)
@example(torch.ones(3, 4), 100_000, 1_000_000, 0.5)
def test_a_tile_larger_than_the_matrix_is_the_matrix(score, height, width, sparsity):
    assume(height >= score.shape[0] and width >= score.shape[1])
    gone = round(sparsity) if score.numel() else 0
    assert (~Block(height, width).mask(score, sparsity)).sum() == gone * score.numel()


# Spellings.


@every
@given(st.one_of(PATTERNS, st.builds(Block, st.integers(1, 10**6), st.integers(1, 10**6))))
def test_a_pattern_is_read_as_it_is_written(pattern):
    assert parse_pattern(str(pattern)) == pattern == parse_pattern(f" {str(pattern).upper()}\n")


DIGITS = st.one_of(st.integers(-1, 10**30).map(str), st.text("0123456789٣", max_size=30))
SPELLINGS = st.one_of(
    st.text(),
    st.text("rowmatixblck:0123456789 ", max_size=12),
    st.builds("{}:{}".format, DIGITS, DIGITS),
    st.builds("block:{}x{}".format, DIGITS, DIGITS),
)


@every
@given(SPELLINGS)
@example("9" * 5000 + ":4")
@example("block:4x" + "9" * 5000)
@example(f"1:{10**30}")
@example(f"block:{10**30}x{10**30}")
def test_any_text_is_a_pattern_that_works_or_an_option_error(text):
    pattern = accepted(lambda: parse_pattern(text))
    if pattern is None:
        return
    assert parse_pattern(str(pattern)) == pattern
    assert pattern.fixed_sparsity is None or 0 < pattern.fixed_sparsity < 1
    assert pattern.mask(torch.rand(3, 5), 0.5).shape == (3, 5)


# Allocations.

NAMES = [f"model.layers.{b}.{kind}" for b in (0, 1, 2, 10) for kind in ("attn.q", "attn.q_norm", "mlp.up")]
INFOS = [MatrixInfo(name, int(name.split(".")[2]), 1 + 7 * n) for n, name in enumerate(NAMES)]
KEYS = st.one_of(
    st.builds("{}{}".format, st.sampled_from(["", "layer.", "layers."]), st.sampled_from([0, 1, 2, 10])),
    st.sampled_from([r".*\.q", r".*attn.*", r".*\.(1|10)\..*", r"model\.layers\.[01]\..*", ".*"]),
    st.sampled_from(NAMES),
)
DEFAULTS = st.one_of(
    st.builds(default_target, st.one_of(st.none(), SPARSITIES), GLOBAL), st.builds(default_target, st.none(), NMS)
)


def first_rule(rules, info):
    for key, value in rules.items():
        block = re.fullmatch(r"(?:layers?\.)?(\d+)", key)
        if (int(block[1]) == info.block) if block else re.fullmatch(key, info.name):
            return value
    return None


@every
@given(
    st.dictionaries(KEYS, st.one_of(SPARSITIES, SPARSITIES.map(repr), NMS.map(str)), max_size=6),
    DEFAULTS,
    st.lists(st.sampled_from(INFOS), unique=True),
)
def test_every_matrix_has_the_target_of_its_first_rule(rules, default, infos):
    if default.pattern.fixed_sparsity is not None:  # takes no number but 0
        rules = {key: value if ":" in str(value) else 0 for key, value in rules.items()}
    rules = {key: value for key, value in rules.items() if any(first_rule({key: 1}, info) for info in infos)}
    targets = allocate(infos, default, rules)
    assert list(targets) == [info.name for info in infos]
    for info in infos:
        value, target = first_rule(rules, info), targets[info.name]
        if value is None:
            assert target == default
        elif ":" in str(value):
            assert str(target.pattern) == value and target.sparsity == target.pattern.fixed_sparsity
        else:
            assert target == Target(float(value), default.pattern)
    if infos:
        sparsities = [target.sparsity for target in targets.values()]
        assert min(sparsities) - 1e-9 <= mean_sparsity(infos, targets) <= max(sparsities) + 1e-9


JSON = st.recursive(
    st.one_of(st.sampled_from([None, True, 0, 1, "1", "1.0", -0.0]), st.integers(), st.floats(), st.text(), SPELLINGS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=4,
)
RULES = st.one_of(
    st.dictionaries(KEYS, JSON, max_size=1),
    st.dictionaries(st.one_of(KEYS, st.text(), st.integers(), st.none(), DIGITS), JSON, max_size=4),
    st.lists(JSON, max_size=5),
    JSON,
)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of an odd regular expression
@every
@given(RULES, DEFAULTS)
@example({"0": 1}, Target(0.5, Row()))
@example({"9" * 5000: 0.5}, Target(0.5, Row()))
@example({"0": 10**400}, Target(0.5, Row()))
@example({"0": 10**5000}, Target(0.5, Row()))
@example({"0": "1:" + "9" * 400}, Target(0.5, Row()))
@example({"a{99999999999999999999}": 0.5}, Target(0.5, Row()))
@example({"(" * 5000 + ")" * 5000: 0.5}, Target(0.5, Row()))
@example(0.5, Target(0.5, Row()))
def test_any_rules_are_targets_or_an_option_error(rules, default):
    targets = accepted(lambda: allocate(INFOS, default, rules))
    if targets is not None:
        assert list(targets) == NAMES
        assert all(0 <= target.sparsity < 1 for target in targets.values())


YAML = st.one_of(
    st.text(),
    st.text("0123:.-[]{}?&*!'\"#\n layers", max_size=40),
    st.lists(st.builds("{}: {}".format, KEYS, st.one_of(SPARSITIES, PATTERNS, st.text(max_size=3)))).map("\n".join),
    st.lists(st.builds("- {}".format, st.one_of(SPARSITIES, NMS)), min_size=3, max_size=5).map("\n".join),
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("allocation") / "rules.yaml"


@pytest.mark.filterwarnings("ignore::FutureWarning")
@every
@given(content=st.one_of(st.binary(), YAML.map(str.encode)))
@example(content=b"0: 0.25\n1: 2:4\n")
@example(content=b"[" * 5000)
@example(content=b"? [a]\n: 0.5")
@example(content=b"&a [*a, *a, *a, *a]")
def test_any_allocation_file_is_targets_or_an_option_error(file, content):
    file.write_bytes(content)
    targets = accepted(lambda: allocate(INFOS, Target(0.5, Row()), allocation_rules(str(file))))
    assert targets is None or list(targets) == NAMES


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "~nobody-of-this-name/a.yaml", "\ud800"])
def test_a_name_that_is_no_file_is_an_option_error(name):
    with pytest.raises(OptionError, match="unknown allocation"):
        allocation_rules(name)
