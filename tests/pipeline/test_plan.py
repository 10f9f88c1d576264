"""Options -> what happens to each matrix, and what is said of options that cannot be carried out."""

import json
import math
import shutil

import pytest
import torch

import secateur
from secateur.errors import OptionError
from tiny import rows, tiny_model

BLOCKS = 3
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def prune(**options):
    """Prune a live model by magnitude; return each matrix's target, or None if it stayed dense."""
    model = tiny_model("llama")
    report = secateur.prune(model, **{"method": "magnitude", **options}).report
    reached = {row["name"]: (row["target"], row["pattern"]) for row in report["matrices"]}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            assert bool((module.weight == 0).any()) == (name in reached)
    return reached, report


def leaves(reached, block=0):
    return {name.rsplit(".", 1)[-1] for name in reached if f".{block}." in name}


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ((), (), ATTENTION + MLP),
        ("mlp", (), MLP),
        (["q_proj", "up_proj"], (), ["q_proj", "up_proj"]),
        ((), "mlp", ATTENTION),
        ((), ["mlp", "[qk]_proj$"], ["v_proj", "o_proj"]),
        ("mlp", "down", ["gate_proj", "up_proj"]),
        (r"layers\.\d\.mlp", (), MLP),
    ],
)
def test_include_narrows_and_exclude_subtracts(include, exclude, expected):
    reached, report = prune(include=include, exclude=exclude)
    for block in range(BLOCKS):
        assert leaves(reached, block) == set(expected)
    assert report["weights"] == sum(row["shape"][0] * row["shape"][1] for row in report["matrices"])
    assert report["sparsity"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"include": "up_porj"}, "include 'up_porj' .*did you mean up_proj"),
        ({"exclude": ["mlp", "lm_haed"]}, "exclude 'lm_haed' is found in no matrix name"),
        ({"include": "("}, r"include '\(' is no regular expression"),
        ({"exclude": "*"}, r"exclude '\*' is no regular expression"),
        ({"include": "mlp", "exclude": "proj"}, "leave no matrix"),
    ],
)
def test_expressions_that_fit_nothing(options, said):
    with pytest.raises(OptionError, match=said) as caught:
        prune(**options)
    assert "\n" not in str(caught.value)


# Allocation.


def as_given(rules, form, tmp_path):
    if form == "python":
        return rules
    path = tmp_path / f"rules.{form}"
    if form == "json":
        path.write_text(json.dumps(rules))
    elif isinstance(rules, dict):
        path.write_text("# how much\n" + "".join(f"{json.dumps(k)}: {v}\n" for k, v in rules.items()))
    else:
        path.write_text("".join(f"- {v}\n" for v in rules))
    return str(path)


@pytest.mark.parametrize("form", ["python", "yaml", "json"])
@pytest.mark.parametrize("key", ["1", "layer.1", "layers.1"])
def test_a_block_gets_its_own_sparsity(tmp_path, form, key):
    reached, report = prune(allocation=as_given({key: 0.75}, form, tmp_path), sparsity=0.25)
    assert {target for name, target in reached.items() if ".1." in name} == {(0.75, "matrix")}
    assert {target for name, target in reached.items() if ".1." not in name} == {(0.25, "matrix")}
    assert {k: float(v) for k, v in report["plan"]["allocation"].items()} == {key: 0.75}


@pytest.mark.parametrize("form", ["python", "yaml", "json"])
def test_one_number_for_each_block(tmp_path, form):
    reached, report = prune(allocation=as_given([0.25, 0, 0.75], form, tmp_path))
    found = {block: {t for name, (t, _) in reached.items() if f".{block}." in name} for block in range(BLOCKS)}
    assert found == {0: {0.25}, 1: set(), 2: {0.75}}
    assert report["sparsity"] == pytest.approx(1 / 3, abs=1e-3)
    assert len(report["dense_matrices"]) == 7


def test_an_unquoted_number_is_a_block(tmp_path):
    (tmp_path / "a.yaml").write_text("0: 3:4\n1: 0.75\n2: 0\n")  # YAML 1.1 reads 3:4 as 184
    reached, _ = prune(allocation=str(tmp_path / "a.yaml"))
    found = {block: {t for name, (t, _) in reached.items() if f".{block}." in name} for block in range(BLOCKS)}
    assert found == {0: {0.25}, 1: {0.75}, 2: set()}
    assert prune(allocation={1: 0.75})[0] == prune(allocation={"1": 0.75})[0]


def test_what_is_reached_is_said_before_the_work(messages):
    prune(allocation=[0.25, 0, 0.75])
    assert [m for m in messages if m.startswith("block 0: mean sparsity 0.2500")]
    assert [m for m in messages if m.startswith("mean sparsity of all pruned matrices: 0.33")]


def test_expressions_match_whole_names_and_the_first_rule_wins():
    rules = {r"model\.layers\.0\..*": 0.25, r".*\.up_proj": "1:4", ".*proj": 0.75}
    reached, _ = prune(allocation=rules)
    assert reached["model.layers.0.mlp.up_proj"] == (0.25, "matrix")
    assert reached["model.layers.1.mlp.up_proj"] == (0.75, "1:4")
    assert reached["model.layers.1.mlp.down_proj"] == (0.75, "matrix")


def test_under_a_pattern_of_n_of_m_rules_are_such_patterns_or_nothing():
    reached, report = prune(pattern="2:4", allocation={"0": "4:16", "1": 0})
    assert {target for name, target in reached.items() if ".0." in name} == {(0.75, "4:16")}
    assert {target for name, target in reached.items() if ".2." in name} == {(0.5, "2:4")}
    assert not any(".1." in name for name in reached)


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"7": 0.5}, "'7' matches no block"),
        ({"layers.3": 0.5}, r"'layers\.3' matches no block.*did you mean layers\.2"),
        ({"up_proj": 0.5}, "'up_proj' matches no block and no whole matrix name"),
        ({r"model\.layers\.0\.mlp\.up_porj": 0.5}, r"did you mean model\.layers\.0\.mlp\.up_proj"),
        ({"(": 0.5}, "neither a block nor a regular expression"),
        ({"0": -0.1}, "fraction removed"),
        ({"0": 50}, r"write 0\.5"),
        ({"0": math.nan}, "fraction removed"),
        ({"0": "much"}, "must be a number"),
        ({"0": None}, "must be a number"),
        ({"0": "4:2"}, "0 < N < M"),
        ({"0": "block:2x2"}, "N:M pattern"),
        ([0.5, 0.5], "2 numbers for 3 blocks"),
        ([0.5, 0.5, "x"], "must be a number"),
    ],
)
@pytest.mark.parametrize("form", ["python", "yaml"])
def test_rules_that_fit_nothing(tmp_path, rules, said, form):
    if form == "yaml":
        rules = as_given(rules, "json", tmp_path)  # which is YAML too
    with pytest.raises(OptionError, match=said) as caught:
        prune(allocation=rules)
    assert "\n" not in str(caught.value)


def test_numbers_do_not_go_with_a_pattern_of_n_of_m():
    with pytest.raises(OptionError, match=r"2:4.*another N:M pattern"):
        prune(pattern="2:4", allocation={"0": 0.25})


@pytest.mark.parametrize("text", ["", "just words", "7", "- [", "a: b: c", "[]", "{}", "\x00", "é".encode("latin-1")])
def test_a_file_without_rules(tmp_path, text):
    path = tmp_path / "rules.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(OptionError, match=r"rules\.yaml") as caught:
        prune(allocation=str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "said"), [("unifrom", "did you mean uniform"), ("no/such.yaml", "neither a file")])
def test_an_unknown_allocation(name, said):
    with pytest.raises(OptionError, match=said):
        prune(allocation=name)


# Sparsity and pattern.


@pytest.mark.parametrize(
    ("options", "sparsity", "pattern"),
    [
        ({}, 0.5, "matrix"),
        ({"method": "wanda"}, 0.5, "row"),
        ({"sparsity": 0.25}, 0.25, "matrix"),
        ({"sparsity": "0.25"}, 0.25, "matrix"),
        ({"pattern": "2:4"}, 0.5, "2:4"),
        ({"pattern": "1:4", "sparsity": 0.75}, 0.75, "1:4"),
        ({"pattern": "block:4x8", "sparsity": 0.25}, 0.25, "block:4x8"),
    ],
)
def test_defaults(options, sparsity, pattern):
    reached, report = prune(calibration=rows(), **options)
    assert set(reached.values()) == {(sparsity, pattern)}
    assert (report["plan"]["sparsity"], report["plan"]["pattern"]) == (sparsity, pattern)
    assert report["sparsity"] == pytest.approx(sparsity, abs=0.02)


def test_sparsity_zero_changes_nothing():
    reached, report = prune(sparsity=0)
    assert reached == {} and report["sparsity"] == 0 and len(report["dense_matrices"]) == 21


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sparsity": 50}, r"sparsity 50.*write 0\.5"),
        ({"sparsity": 1}, "sparsity 1"),
        ({"sparsity": -0.5}, "sparsity"),
        ({"sparsity": math.nan}, "sparsity"),
        ({"sparsity": "half"}, "sparsity"),
        ({"pattern": "2:4", "sparsity": 0.6}, r"2:4 .*0\.5.*0\.6"),
        ({"pattern": "4:2"}, "0 < N < M"),
        ({"pattern": "rows"}, "did you mean row"),
        ({"pattern": "block:0x8"}, "at least 1 row"),
        ({"method": "wnada"}, "did you mean wanda"),
        ({"method": "sparsegpt:dampening=1"}, "did you mean damping"),
        ({"method": "sparsegpt:damping"}, "OPTION=VALUE"),
        ({"method": "sparsegpt:block_size=big"}, "block_size takes int"),
        ({"method": "sparsegpt:block_size=0"}, "block_size"),
        ({"method": "magnitude:damping=1"}, "has no options"),
        ({"method": ""}, "unknown method"),
        ({"propagate": "blocks"}, "did you mean block"),
        ({"threads": 0}, "threads 0"),
    ],
)
def test_options_that_cannot_be_carried_out(options, said):
    model = tiny_model("llama")
    former = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(OptionError, match=said) as caught:
        secateur.prune(model, **{"method": "magnitude", "calibration": rows(), **options})
    assert "\n" not in str(caught.value)
    assert all(torch.equal(p, former[name]) for name, p in model.state_dict().items())


def test_options_are_refused_before_the_model_is_opened(tmp_path):
    with pytest.raises(OptionError, match="sparsity"):
        secateur.prune(tmp_path / "no such model", tmp_path / "out", sparsity=50)


# The record.


def test_the_plan_records_what_a_rerun_needs(tmp_path, model_directory):
    source = model_directory("llama")
    plan = secateur.prune(source, tmp_path / "out", calibration=rows(4, 10), seed=3, include="mlp").report["plan"]
    assert plan["model"]["name"] == str(source) and len(plan["model"]["digest"]) == 64
    expected = {"source": "the given tensor", "samples": 4, "seqlen": 10, "tokens": 40}
    assert expected.items() <= plan["calibration"].items()
    expected = {"method": "wanda+pcg", "pattern": "row", "sparsity": 0.5, "allocation": "uniform", "propagate": "block"}
    assert expected.items() <= plan.items()
    assert (plan["include"], plan["exclude"], plan["dtype"], plan["device"]) == (["mlp"], [], "auto", "cpu")
    assert plan["threads"] == 1 and plan["software"]["secateur"] == secateur.__version__


def test_a_method_without_needs_opens_no_calibration():
    assert prune(calibration="no such source")[1]["plan"]["calibration"] is None


def test_a_dry_run_writes_nothing_and_counts_right(tmp_path, model_directory):
    options = {"calibration": rows(4, 10), "allocation": {"0": 0}}
    plan = secateur.prune(model_directory("llama"), tmp_path / "out", dry_run=True, **options).report
    assert list(tmp_path.iterdir()) == []
    report = secateur.prune(model_directory("llama"), tmp_path / "out", **options).report
    assert plan["matrices"] == 21 and plan["weights"] == report["weights"]
    assert plan["mean_sparsity"] == pytest.approx(report["sparsity"], abs=1e-3)
    assert plan["calibration"] == report["plan"]["calibration"]
    assert all(plan["estimate"][key] > 0 for key in ("seconds", "memory_bytes", "disk_bytes"))


@pytest.mark.parametrize(("source", "dtype"), [("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "float32")])
def test_the_disk_that_is_estimated_is_enough(tmp_path, model_directory, source, dtype):
    """At the end of a run, the blocks, the hidden states and the output lie on the disk together."""
    given = rows(2, 8)
    plan = secateur.prune(
        model_directory("llama", source), tmp_path / "out", calibration=given, dtype=dtype, dry_run=True
    ).report
    report = secateur.prune(model_directory("llama", source), tmp_path / "out", calibration=given, dtype=dtype).report
    size = {"float32": 4, "bfloat16": 2}[source if dtype == "auto" else dtype]
    hidden = 2 * given.numel() * 32 * 4
    assert plan["estimate"]["disk_bytes"] >= report["bytes"]["output"] + report["weights"] * size + hidden


def test_the_time_that_is_estimated_grows_with_the_solves(tmp_path, model_directory, monkeypatch):
    monkeypatch.setattr(secateur.pipeline.estimate, "_operations_per_second", lambda: 1e9)

    def seconds(method):
        asked = {"calibration": rows(2, 8), "method": method, "dry_run": True}
        return secateur.prune(model_directory("llama"), tmp_path / "out", **asked).report["estimate"]["seconds"]

    found = [seconds(method) for method in ("wanda", "sparsegpt", "wanda+pcg", "alps", "wanda+swaps+pcg")]
    assert found == sorted(set(found))


def test_a_full_disk_is_seen_before_the_work(tmp_path, model_directory, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(secateur.OutputError, match="GiB are free"):
        secateur.prune(model_directory("llama"), tmp_path / "out", method="magnitude")
    assert list(tmp_path.iterdir()) == []
