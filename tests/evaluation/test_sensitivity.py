"""Sensitivity against models that were really pruned in one place only; the allocation by hand, and as prune has it."""

import json
import math
import re

import pytest
import yaml

import secateur
from secateur import cli
from secateur.errors import OptionError, OutputError
from secateur.evaluation import sensitivity as measuring
from secateur.pruning.allocation import allocate_by_sensitivity
from tiny import TEXT, Interrupts, save_tiny, tiny_tokenizer

WINDOW, WINDOWS = 16, 3
PRUNING = {"method": "wanda", "sparsity": 0.6, "samples": 4, "seqlen": WINDOW}


@pytest.fixture(autouse=True)
def no_timing(monkeypatch):
    monkeypatch.setattr("secateur.pipeline.estimate._operations_per_second", lambda: 1e9)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Two files: to calibrate on, and to measure on."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "train.txt").write_text(TEXT * 2)
    (folder / "test.txt").write_text(TEXT[40:])
    return {"calibration": str(folder / "train.txt"), "text": str(folder / "test.txt")}


@pytest.fixture(scope="module")
def llama(model_directory):
    return model_directory("llama")


@pytest.fixture(scope="module")
def of_llama(llama, text):
    return secateur.sensitivity(llama, **PRUNING, **text, windows=WINDOWS)


def alone(model, text, out, include, **pruning):
    """What eval says of a model that was pruned there alone, with the statistics of the unpruned model."""
    chosen = {**PRUNING, **pruning, "calibration": text["calibration"], "propagate": "dense"}
    report = secateur.prune(model, out, **chosen, include=include).report
    found = secateur.evaluate(out, text=text["text"], seqlen=WINDOW, windows=WINDOWS, against=model)
    return report, found


def assert_row(row, report, found):
    """A row of the table says what eval says of that model."""
    assert row["kl"] == pytest.approx(found["fidelity"]["kl"], rel=1e-5)
    assert row["kl"] > 1e-3
    assert row["top1"] == found["fidelity"]["top1"]
    assert row["loss_increase"] == pytest.approx(found["loss"] - found["against"]["loss"], rel=1e-4, abs=1e-6)
    error = found["fidelity"]["loss_increase_stderr"]
    assert row["loss_increase_stderr"] == pytest.approx(error, rel=1e-4)
    assert row["weights"] == report["weights"] and row["matrices"] == len(report["matrices"])
    assert row["sparsity"] == report["sparsity"]


# What is measured.


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_block_is_as_if_pruned_alone(of_llama, llama, text, tmp_path, block):
    assert [row["block"] for row in of_llama["blocks"]] == [0, 1, 2]
    assert_row(of_llama["blocks"][block], *alone(llama, text, tmp_path / "out", rf"\.{block}\."))


KINDS = ("q_proj", "k_proj", "v_proj", "o_proj")
LLAMA = [f"self_attn.{name}" for name in KINDS] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


@pytest.mark.parametrize("kind", ["self_attn.q_proj", "mlp.down_proj"])
def test_a_kind_is_as_if_pruned_alone(of_llama, llama, text, tmp_path, kind):
    assert [row["kind"] for row in of_llama["kinds"]] == LLAMA
    (row,) = (row for row in of_llama["kinds"] if row["kind"] == kind)
    assert row["matrices"] == 3
    assert_row(row, *alone(llama, text, tmp_path / "out", re.escape(kind)))


# experts in the middle block only
SPARSE = {"decoder_sparse_step": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.mark.parametrize(
    ("family", "changes", "kind", "include", "pruning"),
    [
        ("gpt2", {}, "mlp.c_proj", r"mlp\.c_proj", {"method": "sparsegpt"}),  # Conv1D
        ("mixtral", {"num_local_experts": 4}, "mlp.experts.gate_up_proj", "gate_up_proj", {}),  # fused in memory only
        ("qwen3_moe", SPARSE, "mlp.experts.down_proj", r"experts\.down_proj", {"method": "magnitude"}),
        ("llama-tied", {}, "mlp.up_proj", "up_proj", {"pattern": "2:4", "sparsity": 0.5}),
    ],
)  # fmt: skip
def test_other_models_in_16_bits(family, changes, kind, include, pruning, text, tmp_path):
    model = save_tiny(tmp_path / "model", family, "bfloat16", tokenizer=tiny_tokenizer(), **changes)
    options = {**PRUNING, **pruning}
    found = secateur.sensitivity(model, **options, **text, windows=WINDOWS)
    (row,) = (row for row in found["kinds"] if row["kind"] == kind)
    assert_row(row, *alone(model, text, tmp_path / "kind", include, **pruning))
    assert_row(found["blocks"][1], *alone(model, text, tmp_path / "block", r"\.1\.", **pruning))
    for part in ("blocks", "kinds"):  # every weight that is pruned is in one block and of one kind
        assert sum(row["weights"] for row in found[part]) == secateur.inspect(model)["weights"]
    assert (found["allocation"] is None) == ("pattern" in pruning)


def test_micro_batches_make_no_difference(of_llama, llama, text, monkeypatch):
    monkeypatch.setattr("secateur.pipeline.stream.MICRO_BATCH_TOKENS", WINDOW)
    split = secateur.sensitivity(llama, **PRUNING, **text, windows=WINDOWS)
    for part in ("blocks", "kinds"):
        assert [row["kl"] for row in split[part]] == pytest.approx([row["kl"] for row in of_llama[part]], rel=1e-4)


def test_conditions_are_recorded(of_llama, llama, text):
    dense = secateur.evaluate(llama, text=text["text"], seqlen=WINDOW, windows=WINDOWS)
    assert dense.items() <= of_llama.items()
    assert (of_llama["method"], of_llama["pattern"], of_llama["sparsity"]) == ("wanda", "row", 0.6)
    assert (of_llama["calibration"]["samples"], of_llama["calibration"]["seqlen"]) == (4, WINDOW)
    assert of_llama["seconds"] > 0 and json.dumps(of_llama)


def test_one_of_the_two(llama, text, of_llama):
    found = secateur.sensitivity(llama, **PRUNING, **text, windows=WINDOWS, by=["kind"])
    assert found["blocks"] == [] and found["allocation"] is None and found["kinds"] == of_llama["kinds"]
    found = secateur.sensitivity(llama, **PRUNING, **text, windows=WINDOWS, by=["block"])
    assert found["kinds"] == [] and found["blocks"] == of_llama["blocks"]


class Counts:
    """A progress that adds up."""

    def __init__(self):
        self.tasks = {}

    def start(self, task, total, done=0):
        self.task, self.tasks[task] = task, [total, done]

    def advance(self, done=1, note=None):
        self.tasks[self.task][1] += done

    def finish(self): ...


@pytest.mark.parametrize("by", [["block"], ["kind"], ["kind", "block"]])
def test_progress_is_of_the_whole_and_arrives(llama, text, by, monkeypatch):
    monkeypatch.setattr("secateur.pipeline.stream.MICRO_BATCH_TOKENS", WINDOW)
    progress = Counts()
    secateur.sensitivity(llama, **PRUNING, **text, windows=WINDOWS, by=by, progress=progress)
    total, done = progress.tasks["sensitivity"]
    blocks, kinds = WINDOWS * (4 + 3 + 2 + 2), WINDOWS * 7 * 4  # blocks and head; the dense ones before block 2
    assert total == done == blocks * ("block" in by) + kinds * ("kind" in by)


# The allocation.


def test_the_rule_by_hand():
    # log2 of KL per weight: -9, -7, -5, -4, so x = -1, -0.2, 0.6, 1 and 0.5 - 0.1 x = 0.6, 0.52, 0.44, 0.4
    kl = [8 * 2.0**-9, 8 * 2.0**-7, 8 * 2.0**-5, 8 * 2.0**-4]
    assert allocate_by_sensitivity(kl, [8] * 4, 0.49, 0.1) == pytest.approx([0.6, 0.52, 0.44, 0.4], abs=1e-6)
    # a part with twice the weights and twice the KL is as sensitive as another; the mean counts weights
    assert allocate_by_sensitivity([0.08, 0.64, 1.28], [8, 16, 8], 0.5, 0.1) == pytest.approx([0.6, 0.5, 0.4], abs=1e-6)
    found = allocate_by_sensitivity([0.01, 0.04], [8, 16], 0.5, 0.1)
    assert found == pytest.approx([0.5 + 0.4 / 3, 0.5 - 0.2 / 3], abs=1e-6)


def test_sparsities_stay_within_bounds_and_keep_the_mean():
    found = allocate_by_sensitivity([0.001, 0.01, 0.1], [1, 1, 1], 0.9, 0.3)
    assert found == pytest.approx([0.95, 0.95, 0.8], abs=1e-6)  # 1.2 and 0.9 are clipped and shifted
    assert allocate_by_sensitivity([0.001, 0.1], [1, 1], 0.1, 0.5) == pytest.approx([0.2, 0.0], abs=1e-6)
    assert allocate_by_sensitivity([0.001, 0.1], [1, 1], 0.95, 0.5) == pytest.approx([0.95, 0.95], abs=1e-6)


def test_equals_are_given_the_same():
    assert allocate_by_sensitivity([0.2, 0.2], [3, 3], 0.5, 0.4) == [0.5, 0.5]
    assert allocate_by_sensitivity([0.0, -1e-9, 1e-7], [1, 1, 1], 0.5, 0.4) == [0.5] * 3  # rounding, and no more
    assert allocate_by_sensitivity([0.1, 0.2], [3, 3], 0.5, 0.0) == [0.5, 0.5]


def test_the_allocation_follows_from_the_table(of_llama):
    allocation, blocks = of_llama["allocation"], of_llama["blocks"]
    x = [math.log(row["kl"]) for row in blocks]
    raw = [-0.1 * (2 * (value - min(x)) / (max(x) - min(x)) - 1) for value in x]
    expected = [0.6 + value - sum(raw) / 3 for value in raw]
    assert list(allocation["sparsities"]) == ["0", "1", "2"]
    assert list(allocation["sparsities"].values()) == pytest.approx(expected, abs=2e-6)
    assert (allocation["target"], allocation["spread"]) == (0.6, 0.1)
    assert allocation["mean"] == pytest.approx(0.6, abs=1e-6)
    assert max(expected) - min(expected) == pytest.approx(0.2)


def test_prune_takes_the_file_and_reaches_the_target(llama, text, tmp_path, of_llama):
    file = tmp_path / "allocation.yaml"
    options = {"windows": WINDOWS, "by": ["block"], "target": 0.4, "spread": 0.2}
    found = secateur.sensitivity(llama, **PRUNING, **text, **options, output=file)
    sparsities = found["allocation"]["sparsities"]
    assert yaml.safe_load(file.read_text()) == {int(key): value for key, value in sparsities.items()}
    report = secateur.prune(llama, tmp_path / "out", method="magnitude", allocation=str(file)).report
    assert report["sparsity"] == pytest.approx(0.4, abs=1e-3)  # rounded to whole weights in each matrix
    assert {row["target"] for row in report["matrices"] if row["block"] == 1} == {sparsities["1"]}
    by_kl = sorted(range(3), key=lambda block: of_llama["blocks"][block]["kl"])
    assert [sparsities[str(block)] for block in by_kl] == sorted(sparsities.values(), reverse=True)


def test_an_infinite_divergence_counts_as_the_greatest(llama, text, monkeypatch):
    measured = measuring.measure_units

    def endless(*args):
        dense, rows = measured(*args)
        rows["block"][1]["kl"] = None
        return dense, rows

    monkeypatch.setattr("secateur.api.allocating.measure_units", endless)
    found = secateur.sensitivity(llama, **PRUNING, **text, windows=WINDOWS, by=["block"])
    sparsities = found["allocation"]["sparsities"]
    assert sparsities["1"] == min(sparsities.values()) < max(sparsities.values())


def test_names_in_the_file_cannot_break_it(llama, text, tmp_path):
    name = tmp_path / "a\n0: 0.9\n\x07"
    name.symlink_to(llama)
    file = tmp_path / "allocation.yaml"
    found = secateur.sensitivity(name, **PRUNING, **text, windows=1, by=["block"], output=file)
    assert len(yaml.safe_load(file.read_text())) == 3
    assert yaml.safe_load(file.read_text())[0] == found["allocation"]["sparsities"]["0"]


# What goes wrong.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": ["blokc"]}, "did you mean block"),
        ({"by": []}, "by: name what"),
        ({"by": ["kind"], "target": 0.5}, "have --by name block"),
        ({"by": ["kind"], "output": "x.yaml"}, "have --by name block"),
        ({"pattern": "2:4", "sparsity": None, "target": 0.5}, "pattern 2:4 has one sparsity"),
        ({"target": 0.96}, r"target 0\.96"),
        ({"target": float("nan")}, "target nan"),
        ({"spread": -0.1}, r"spread -0\.1"),
        ({"spread": 1.0}, "spread 1"),
        ({"method": "wnada"}, "did you mean wanda"),
        ({"windows": 0}, "windows 0"),
        ({"windows": 999}, r"has \d+ windows"),
        ({"sparsity": 0.0}, "prunes nothing"),
    ],
)
def test_options_that_cannot_be_carried_out(llama, text, options, message):
    with pytest.raises(OptionError, match=message):
        secateur.sensitivity(llama, **{**PRUNING, "windows": 1, **text, **options})


def test_a_file_is_not_replaced_unasked(llama, text, tmp_path, monkeypatch):
    file = tmp_path / "allocation.yaml"
    file.write_text("mine")
    options = {**PRUNING, **text, "windows": 1, "by": ["block"]}
    with pytest.raises(OutputError, match=r"allocation.yaml: is there already; --overwrite replaces it"):
        secateur.sensitivity("no/such/model/at/all", **options, output=file)  # before any work
    assert file.read_text() == "mine"
    with pytest.raises(OutputError, match="is a directory; give a file's name"):
        secateur.sensitivity(llama, **options, output=tmp_path, overwrite=True)
    with pytest.raises(OutputError, match="nowhere: is no directory"):
        secateur.sensitivity(llama, **options, output=tmp_path / "nowhere" / "a.yaml")
    secateur.sensitivity(llama, **options, output=file, overwrite=True)
    assert "mine" not in file.read_text()


@pytest.mark.parametrize(("task", "steps"), [("pruning", 2), ("sensitivity", 5)])
def test_an_interrupt_leaves_nothing(llama, text, tmp_path, monkeypatch, task, steps):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    options = {**PRUNING, **text, "windows": 1, "by": ["block"], "output": tmp_path / "allocation.yaml"}
    with pytest.raises(KeyboardInterrupt):
        secateur.sensitivity(llama, **options, progress=Interrupts(steps, task))
    assert list(tmp_path.iterdir()) == [scratch] and list(scratch.iterdir()) == []


def test_the_command(llama, text, tmp_path, capsys, monkeypatch):
    words = ["sensitivity", str(llama), "--samples", "4", "--seqlen", str(WINDOW), "--windows", "2"]
    words += ["--calibration", text["calibration"], "--text", text["text"], "--target", "0.3"]
    assert cli.main([*words, "-o", str(tmp_path / "a.yaml"), "-q"]) == 0
    out = capsys.readouterr().out
    assert "block by block" in out and "mlp.down_proj" in out and "allocated" in out and "mean 0.3000" in out
    assert cli.main([*words, "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["model"], len(found["blocks"]), len(found["kinds"])) == (1, str(llama), 3, 7)
    assert cli.main([*words, "-o", str(tmp_path / "a.yaml")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
