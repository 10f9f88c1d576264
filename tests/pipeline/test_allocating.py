"""Named allocations: the same on disk and in memory, once for a run, and the best that was tried."""

import copy
import json
import math
import time

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM

import secateur
from secateur.errors import OptionError
from secateur.pipeline import allocating
from secateur.pipeline.allocating import best_slope, search_slopes
from secateur.pruning import Accumulator, Row, wanda
from tiny import Interrupts, files_below, rows, same_bytes, save_tiny, tensors_of, tiny_model

NAMES = ["linear", "owl", "alpha"]
ROWS = rows(6, 24)


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto")


def plan_of(model, **options):
    """Prune a live model and return the plan."""
    return secateur.prune(model, **{"calibration": ROWS, **options}).report["plan"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("pattern", "sparsity"), [("row", 0.7), ("2:4", 0.5)])
def test_disk_equals_live(model, out, name, pattern, sparsity):
    options = {"pattern": pattern, "sparsity": sparsity, "calibration": ROWS, "allocation": name, "method": "wanda"}
    report = secateur.prune(model, out, **options).report
    live = load(model)
    before = copy.deepcopy(live.state_dict())
    mine = secateur.prune(live, **options).report
    for key in ("allocation", "allocation_found"):
        assert report["plan"][key] == mine["plan"][key]
    assert same_bytes(load(out).state_dict(), live.state_dict())
    for key, tensor in live.state_dict().items():  # nothing but zeros: the masks of trials are gone
        assert torch.equal(tensor[tensor != 0], before[key][tensor != 0])
    found = report["plan"]["allocation_found"]
    total = sum(row["shape"][0] * row["shape"][1] for row in report["matrices"])
    mean = sum(row["target"] * row["shape"][0] * row["shape"][1] for row in report["matrices"]) / total
    assert found["name"] == name
    assert mean == pytest.approx(sparsity, abs=1e-6) and found["mean"] == pytest.approx(mean, abs=1e-12)
    assert list(report["plan"]["allocation"]) == ["0", "1", "2"]
    if pattern == "2:4":
        assert set(report["plan"]["allocation"].values()) <= {"1:4", "2:4", "3:4"}
        if name == "linear":
            assert len({row["kl"] for row in found["slopes"]}) > 2  # slopes steep enough to part the three blocks
    assert not out.with_name("out.secateur").exists()


@pytest.mark.parametrize("name", NAMES)
def test_of_a_part_of_the_matrices_the_mean_is_the_target_too(name):
    plan = plan_of(tiny_model("llama"), allocation=name, sparsity=0.6, include=r"[012]\.mlp|[12]\.self_attn")
    weights = [3 * 32 * 48, *[3 * 32 * 48 + 2 * 32 * 32 + 2 * 16 * 32] * 2]
    mean = sum(w * s for w, s in zip(weights, plan["allocation"].values(), strict=True)) / sum(weights)
    assert len(set(plan["allocation"].values())) > 1
    assert mean == pytest.approx(0.6, abs=1e-6)


def test_alpha_needs_no_calibration():
    plan = plan_of(tiny_model("llama"), allocation="alpha", method="magnitude", calibration="/no/such.jsonl")
    assert plan["calibration"] is None and len(plan["allocation"]) == 3


def test_a_method_without_calibration_gets_it_for_the_allocation_alone(model, out):
    report = secateur.prune(model, out, allocation="owl", method="magnitude", calibration=ROWS).report
    assert report["plan"]["calibration"]["tokens"] == ROWS.numel()
    assert {row["tokens"] for row in report["matrices"]} == {None}
    assert {row["output_error"] for row in report["blocks"]} == {None}
    mine = secateur.prune(load(model), allocation="owl", method="magnitude", calibration=ROWS).report
    assert mine["plan"]["allocation"] == report["plan"]["allocation"]
    assert {row["output_error"] for row in mine["blocks"]} == {None}


def test_uniform_and_rules_have_no_record():
    assert plan_of(tiny_model("llama"))["allocation_found"] is None
    assert plan_of(tiny_model("llama"), allocation={"1": 0.25})["allocation_found"] is None


# --- what is measured


def test_owl_measures_the_dense_model():
    model = tiny_model("llama")
    dense = copy.deepcopy(model)
    measured = plan_of(model, allocation="owl", sparsity=0.7)["allocation_found"]["measured"]
    statistics = wanda_statistics(dense)
    for index in range(3):
        scores = torch.cat(
            [wanda(m.weight, statistics[n]).flatten() for n, m in linears(dense) if f"layers.{index}." in n]
        )
        assert measured[str(index)] == pytest.approx(float((scores > 5 * scores.mean()).double().mean()))


def linears(model):
    return [(n, m) for n, m in model.model.layers.named_modules(prefix="layers") if isinstance(m, torch.nn.Linear)]


def wanda_statistics(model, calibration=ROWS):
    sums = {}
    handles = [
        module.register_forward_pre_hook(
            lambda m, args, name=name: sums.setdefault(name, Accumulator({"sumsq"})).add(args[0])
        )
        for name, module in linears(model)
    ]
    with torch.no_grad():
        model(calibration)
    for handle in handles:
        handle.remove()
    return {name: accumulator.statistics() for name, accumulator in sums.items()}


def test_linear_takes_the_slope_that_is_best_in_the_whole_model(monkeypatch):
    """Its KLs are those of whole models, masked by the first rows, on the last ones; none that was tried is better."""
    monkeypatch.setattr(allocating, "MASK_TOKENS", 2 * 24 + 1)
    model = tiny_model("llama")
    dense = copy.deepcopy(model)
    calibration = rows(11, 24)
    plan = plan_of(model, allocation="linear", sparsity=0.6, method="magnitude", calibration=calibration)
    found = plan["allocation_found"]
    statistics = wanda_statistics(dense, calibration[:3])
    with torch.no_grad():
        theirs = log_softmax(dense(calibration[-8:]).logits.double(), -1)
        kls = {}
        for row in found["slopes"]:
            masked = copy.deepcopy(dense)
            for name, module in linears(masked):
                index = int(name.split(".")[1])
                sparsity = 0.6 + row["slope"] * (index - 1)
                module.weight.mul_(Row().mask(wanda(module.weight, statistics[name]), sparsity))
            own = log_softmax(masked(calibration[-8:]).logits.double(), -1)
            kls[row["slope"]] = float((theirs.exp() * (theirs - own)).sum(-1).mean())
            assert row["kl"] == pytest.approx(kls[row["slope"]], rel=1e-3)
    assert len(kls) >= 5 and {0.0, 0.1, -0.1} <= kls.keys()
    assert found["slope"] == min(kls, key=kls.get) != 0
    assert (found["rows"], found["tokens"]) == (8, 8 * 24)
    slopes = [0.6 + found["slope"] * way for way in (-1, 0, 1)]
    assert list(plan["allocation"].values()) == pytest.approx(slopes, abs=1e-6)


@pytest.mark.parametrize("least", [0.0, 0.03, -0.1, 0.17, 0.25, -0.25])
def test_slopes_are_sought_downhill(least):
    calls = []

    def measure(slopes):
        calls.append(list(slopes))
        return [(slope - least) ** 2 for slope in slopes]

    tried = search_slopes(measure, 0.25)
    assert calls[0] == [0.0, -0.1, 0.1]
    assert sum(map(len, calls)) == len(tried) <= 6
    assert all(-0.25 <= slope <= 0.25 for slope in tried)
    assert abs(best_slope(tried) - least) <= 0.025


def test_uniform_wins_ties_and_what_is_undefined():
    assert best_slope({0.1: 0.5, 0.0: 0.5, -0.1: 0.5}) == 0
    assert best_slope({-0.1: 0.5, 0.1: 0.5, 0.0: 0.6}) == -0.1
    assert best_slope({0.0: math.inf, 0.1: math.inf}) == 0


def test_where_nothing_can_differ_uniform_alone_is_tried():
    calls = []
    assert search_slopes(lambda slopes: calls.append(slopes) or [1.0], 0.0) == {0.0: 1.0}
    assert calls == [[0.0]]


# --- going on


@pytest.mark.parametrize("name", NAMES)
def test_the_same_command_goes_on_without_finding_again(model, tmp_path, monkeypatch, name):
    options = {"calibration": ROWS, "allocation": name, "sparsity": 0.6}
    secateur.prune(model, tmp_path / "whole", **options)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        secateur.prune(model, out, **options, progress=Interrupts(6))
    frozen = json.loads((tmp_path / "out.secateur" / "plan.json").read_text())
    assert not (tmp_path / "out.secateur" / "allocating").exists()

    def fails(*args):
        raise AssertionError("it was found before")

    with monkeypatch.context() as patch:
        patch.setattr(allocating._Finder, "find", fails)
        again = secateur.prune(model, out, **options).report
        assert secateur.prune(model, out, **options).report == again  # finished: nothing to do
    assert again["plan"]["allocation_found"] == frozen["allocation_found"]
    assert same_bytes(tensors_of(out), tensors_of(tmp_path / "whole"))


def test_what_was_found_for_other_options_is_not_taken(model, tmp_path):
    options = {"calibration": ROWS, "allocation": "owl"}
    secateur.prune(model, tmp_path / "out", **options, sparsity=0.6)
    secateur.prune(model, tmp_path / "out", **options, sparsity=0.7, overwrite=True)
    report = secateur.prune(model, tmp_path / "fresh", **options, sparsity=0.7).report
    assert (
        json.loads((tmp_path / "out" / "secateur.json").read_text())["plan"]["allocation"]
        == (report["plan"]["allocation"])
    )
    other = secateur.prune(model, tmp_path / "out", calibration=ROWS, allocation="alpha", sparsity=0.7, overwrite=True)
    assert other.report["plan"]["allocation_found"]["name"] == "alpha"


def test_what_is_to_be_replaced_is_found_again_and_counts_as_pruning(model, out, monkeypatch):
    options = {"calibration": ROWS, "allocation": "owl", "sparsity": 0.6}
    secateur.prune(model, out, **options)
    real, calls = allocating._Finder.find, []

    def find(finder, name):
        calls.append(name)
        time.sleep(0.2)
        return real(finder, name)

    monkeypatch.setattr(allocating._Finder, "find", find)
    with pytest.raises(KeyboardInterrupt):
        secateur.prune(model, out, **options, overwrite=True, progress=Interrupts(6))
    report = secateur.prune(model, out, **options, overwrite=True).report
    assert calls == ["owl"]  # the killed run had it
    in_blocks = sum(block["seconds"] for block in report["blocks"])
    assert report["seconds"]["pruning"] >= in_blocks + 0.2
    seconds = secateur.prune(tiny_model("llama"), **options).report["seconds"]
    assert seconds["this_process"] >= seconds["pruning"] >= 0.2 and calls == ["owl", "owl"]


def test_interrupted_while_finding_nothing_is_left(model, out):
    with pytest.raises(KeyboardInterrupt):
        secateur.prune(model, out, calibration=ROWS, allocation="linear", progress=Interrupts(12, "allocating"))
    assert files_below(out.parent) == {}


def test_what_a_process_left_that_was_killed_while_finding_is_no_hindrance(model, tmp_path):
    options = {"calibration": ROWS, "allocation": "owl", "sparsity": 0.6}
    secateur.prune(model, tmp_path / "whole", **options)
    left = tmp_path / "out.secateur" / "allocating" / "dense"
    left.mkdir(parents=True)
    (left / "even.bin").write_bytes(b"torn")
    secateur.prune(model, tmp_path / "out", **options)
    assert same_bytes(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "whole"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_dry_run_finds_it_too(model, out):
    plan = secateur.prune(model, out, calibration=ROWS, allocation="owl", sparsity=0.6, dry_run=True).report
    assert plan["allocation_found"]["name"] == "owl" and len(plan["allocation"]) == 3
    assert plan["mean_sparsity"] == pytest.approx(0.6, abs=1e-6)
    assert files_below(out.parent) == {}


# --- models


@pytest.mark.parametrize("name", NAMES)
def test_a_mixture_of_experts(tmp_path, name):
    source = save_tiny(tmp_path / "source", "mixtral", num_local_experts=4)
    options = {"calibration": ROWS, "allocation": name, "sparsity": 0.6}
    report = secateur.prune(source, tmp_path / "out", **options).report
    assert report["plan"]["allocation_found"]["mean"] == pytest.approx(0.6, abs=1e-6)
    assert len({row["target"] for row in report["matrices"]}) > 1
    assert plan_of(load(source), **options)["allocation"] == report["plan"]["allocation"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"allocation": "lineal"}, "did you mean linear"),
        ({"allocation": "owl", "sparsity": 0.96}, r"allocation owl.*0\.96"),
        ({"allocation": "alpha", "pattern": "1:4"}, "pattern 1:4.*use 2:4"),
    ],
)
def test_what_cannot_be_allocated(options, said):
    with pytest.raises(OptionError, match=said) as caught:
        plan_of(tiny_model("llama"), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["linear", "owl"])
def test_inputs_that_are_never_seen(monkeypatch, name):
    monkeypatch.setattr(allocating.Observer, "seen", lambda self, matrix: False)
    with pytest.raises(OptionError, match=r"no input.*alpha"):
        plan_of(tiny_model("llama"), allocation=name)


@pytest.mark.parametrize("options", [{"sparsity": 0.6}, {"pattern": "2:4"}])
def test_one_block_alone_has_the_target_itself(options):
    plan = plan_of(tiny_model("llama"), allocation="linear", include=r"layers\.1\.", **options)
    assert plan["allocation"] == {"1": options.get("sparsity", "2:4")}
    assert plan["allocation_found"] == {"name": "linear", "mean": options.get("sparsity", 0.5)}


def test_training_takes_rules_but_no_names():
    with pytest.raises(OptionError, match=r"'owl'.*only prune"):
        secateur.gradual(tiny_model("llama"), 0.5, steps=10, allocation="owl")
