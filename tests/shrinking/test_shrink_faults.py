"""What shrink refuses, in one line, and how a stopped run goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import secateur
from secateur.errors import ModelError, OptionError, OutputError, ResumeError, SecateurError
from secateur.progress import Silent
from test_families import family_model
from tiny import Interrupts, files_below, rows, save_tiny, tensors_of

COMMON = {"round": 8, "calibration": rows(6, 24), "progress": Silent()}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for kind in ("llama", "mixtral", "mamba", "bloom", "deepseek_v3", "falcon", "gpt2"):
        family_model(kind).save_pretrained(folder / kind)
    return folder


REFUSED = [
    ("llama", {}, OptionError, "nothing to remove: give neurons, heads, layers, experts or target"),
    ("llama", {"neurons": 1.0}, OptionError, "neurons 1: a fraction that goes, between 0 and 1"),
    ("llama", {"heads": 0.0}, OptionError, "heads 0: a fraction that goes, between 0 and 1"),
    ("llama", {"neurons": 0.99}, OptionError, "intermediate_size: 0.99 of 48 leaves 0 .*0.8333, which leaves 8"),
    ("llama", {"neurons": 0.01}, OptionError, "intermediate_size: 0.01 of 48 leaves 48 .*0.1667, which leaves 40"),
    ("llama", {"neurons": 0.5, "round": 64}, OptionError, "cannot be cut to a smaller multiple of 64"),
    ("llama", {"neurons": 0.5, "round": 0}, OptionError, "round 0: at least 1"),
    ("llama", {"heads": 0.9}, OptionError, "heads: 0.9 of 2 leaves 0 .* legal fraction is 0.5, which leaves 1"),
    ("llama", {"layers": 3}, OptionError, "layers 3: the model has 3, so 1 to 2 can be removed"),
    ("llama", {"layers": 0}, OptionError, "layers 0: the model has 3, so 1 to 2 can be removed"),
    ("llama", {"layers": [1, 7]}, OptionError, "layers 7: the model has blocks 0 to 2"),
    ("llama", {"layers": "0,1,2"}, OptionError, "layers: all 3 would go; leave one at least"),
    ("llama", {"layers": "1,x"}, OptionError, "layers '1,x': a number of layers, or a list of their numbers"),
    ("llama", {"layers": []}, OptionError, r"layers \[\]: a number of layers, or a list"),
    ("llama", {"neurons": "0.5"}, OptionError, "neurons '0.5': a fraction that goes"),
    ("gpt2", {"target": 0.2, "of": "heads"}, ModelError, "heads: gpt2 makes its heads as wide"),
    ("bloom", {"target": 0.3}, ModelError, "bloom: "),
    ("llama", {"layers": ""}, OptionError, "layers '': a number of layers"),
    ("llama", {"experts": 0.5}, ModelError, "llama: its config tells no number of experts"),
    ("mixtral", {"experts": 0.75}, OptionError, "experts 0.75: leaves 1 of 4, and each token takes 2; 0.5 is the most"),
    ("llama", {"target": 0.2, "neurons": 0.1}, OptionError, "target and neurons: target decides alone"),
    ("llama", {"target": 0.99}, OptionError, "target 0.99: cannot be taken from heads and neurons, which hold 99%"),
    ("llama", {"target": 0.9, "of": "heads"}, OptionError, "target 0.9: cannot be taken from heads, which hold"),
    ("llama", {"target": 0.2, "of": "head"}, OptionError, "unknown part 'head': did you mean heads"),
    ("llama", {"target": 0.2, "of": "heads,layers"}, OptionError, "of layers: stands alone"),
    ("llama", {"neurons": 0.5, "criterion": "opt"}, OptionError, "unknown criterion 'opt': "),
    ("llama", {"layers": 1, "depth": "cosine"}, OptionError, "unknown depth 'cosine': known: kl, influence, random"),
    ("llama", {"neurons": 0.5, "propagate": "blocks"}, OptionError, "unknown propagate 'blocks': did you mean block"),
    ("llama", {"neurons": 0.5, "dtype": "int8"}, OptionError, "unknown dtype"),
    ("mamba", {"neurons": 0.5}, ModelError, "mamba: .*no neurons can be removed"),
    ("mamba", {"heads": 0.5}, ModelError, "mamba: its config does not tell how many heads"),
    ("bloom", {"neurons": 0.5}, ModelError, "bloom: its config has no width of its MLPs, so no neurons"),
    ("deepseek_v3", {"heads": 0.5}, ModelError, "deepseek_v3: none of its layers are known to have heads"),
    ("deepseek_v3", {"experts": 0.9}, OptionError, "experts"),
]


@pytest.mark.parametrize(("kind", "options", "error", "message"), REFUSED, ids=[f"{k}-{o}" for k, o, _, _ in REFUSED])
@pytest.mark.parametrize("dry_run", [False, True])
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(kind, options, error, message, dry_run, models, tmp_path):
    with pytest.raises(error, match=message) as caught:
        secateur.shrink(models / kind, tmp_path / "out", dry_run=dry_run, **{**COMMON, **options})
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_groups_of_experts_that_no_longer_divide_are_found_out(tmp_path):
    """DeepSeek chooses among groups of experts first: three of four experts make no two groups."""
    model = family_model("deepseek_v3")
    model.config.n_group, model.config.topk_group = 2, 1
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="cannot be cut so"):
        secateur.shrink(tmp_path / "model", tmp_path / "out", experts=0.25, **COMMON)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(("kind", "last"), [("zamba", 3), ("gemma4_text", 3), ("glm_moe_dsa", 2)])
@pytest.mark.parametrize("what", ["neurons", "layers"])
def test_blocks_that_share_state_or_weights_are_refused(kind, last, what, tmp_path):
    options = {"neurons": 0.5} if what == "neurons" else {"layers": [last]}
    family_model(kind).save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="pruned one at a time"):
        secateur.shrink(tmp_path / "model", tmp_path / "out", **options, **COMMON)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_occupied_outputs_are_refused(models, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty"):
        secateur.shrink(models / "llama", tmp_path / "out", layers=[1], **COMMON)
    with pytest.raises(OutputError, match="OUTPUT is"):
        secateur.shrink(models / "llama", models / "llama", layers=[1], **COMMON)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_the_same_command_again_does_nothing_and_another_is_refused(models, tmp_path, messages):
    report = secateur.shrink(models / "llama", tmp_path / "out", neurons=0.5, **COMMON)
    before = files_below(tmp_path / "out")
    assert secateur.shrink(models / "llama", tmp_path / "out", neurons=0.5, **COMMON) == json.loads(json.dumps(report))
    assert any("nothing to do" in message for message in messages)
    with pytest.raises(ResumeError, match=r"neurons 0\.5, not 0\.25"):
        secateur.shrink(models / "llama", tmp_path / "out", neurons=0.25, **COMMON)
    assert files_below(tmp_path / "out") == before
    secateur.shrink(models / "llama", tmp_path / "out", neurons=0.3, overwrite=True, **COMMON)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == 32


def test_a_dry_run_proves_the_cut_and_writes_nothing(models, tmp_path):
    plan = secateur.shrink(models / "llama", tmp_path / "out", heads=0.5, neurons=0.5, dry_run=True, **COMMON)
    assert plan["config"]["intermediate_size"] == [48, 24]
    assert plan["config"]["num_key_value_heads"] == [2, 1]
    plan = secateur.shrink(models / "llama", tmp_path / "out", target=0.3, dry_run=True, **COMMON)
    assert len(plan["candidates"]) == 2 and not plan["config"]
    assert not any(tmp_path.iterdir())


# Stopped runs.

RUNS = {
    "width": ("llama", {"neurons": 0.5, "heads": 0.5}),
    "block": ("llama", {"neurons": 0.5, "heads": 0.5, "propagate": "block"}),
    "target": ("llama", {"target": 0.3}),
    "layers": ("llama", {"layers": 2, "neurons": 0.5}),
    "experts": ("mixtral", {"experts": 0.25, "neurons": 0.5}),
    "tuples": ("falcon", {"layers": 1, "neurons": 0.5}),  # whose blocks return more than their hidden state
}
STOPS = [
    ("width", "proving the cut", 1), ("width", "pruning", 2), ("width", "pruning", 3), ("width", "cutting", 2),
    ("width", "writing", 5), ("block", "pruning", 4), ("target", "trying out", 2), ("target", "pruning", 2),
    ("layers", "trying out", 2), ("layers", "trying out", 5), ("layers", "proving the cut", 1),
    ("layers", "pruning", 1), ("experts", "observing experts", 2), ("experts", "cutting", 2),
    ("experts", "pruning", 2), ("experts", "cutting", 5), ("tuples", "pruning", 2), ("tuples", "cutting", 1),
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """The tensors and config of each run, never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    for name, (kind, options) in RUNS.items():
        secateur.shrink(models / kind, folder / name, **COMMON, **options)
    return {name: result(folder / name) for name in RUNS}


def result(folder):
    return {n: data for n, data in files_below(folder).items() if n.endswith("safetensors") or n == "config.json"}


@pytest.mark.parametrize(("name", "task", "steps"), STOPS)
def test_a_stopped_run_goes_on_to_the_same_model(name, task, steps, models, whole, tmp_path):
    kind, options = RUNS[name]
    with pytest.raises(KeyboardInterrupt):
        secateur.shrink(models / kind, tmp_path / "out", **{**COMMON, **options, "progress": Interrupts(steps, task)})
    assert not (tmp_path / "out").exists()
    secateur.shrink(models / kind, tmp_path / "out", **COMMON, **options)
    assert result(tmp_path / "out") == whole[name]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["width", "block"])
def test_after_another_boot_hidden_states_are_made_again(name, models, whole, tmp_path, monkeypatch):
    kind, options = RUNS[name]
    with pytest.raises(KeyboardInterrupt):
        secateur.shrink(models / kind, tmp_path / "out", **{**COMMON, **options, "progress": Interrupts(3, "pruning")})
    monkeypatch.setattr("secateur.pipeline.run_directory.boot_id", lambda: "another")
    secateur.shrink(models / kind, tmp_path / "out", **COMMON, **options)
    assert result(tmp_path / "out") == whole[name]


KILLED = """
import os, sys
import torch
import secateur
from secateur.progress import Silent
from tiny import rows
torch.set_num_threads(1)
class Dies(Silent):
    left = int(sys.argv[3])
    def advance(self, done=1, note=None):
        Dies.left -= 1
        if not Dies.left:
            os.kill(os.getpid(), 9)
options = {"round": 8, "calibration": rows(6, 24), "progress": Dies()}
secateur.shrink(sys.argv[1], sys.argv[2], layers=2, neurons=0.5, **options)
"""


@pytest.mark.parametrize("steps", [3, 15])
def test_a_process_that_is_killed_leaves_a_whole_output_or_none(steps, models, whole, tmp_path):
    words = [sys.executable, "-c", KILLED, str(models / "llama"), str(tmp_path / "out"), str(steps)]
    tests = str(Path(__file__).parents[1])
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": tests}, timeout=300)
    assert done.returncode == -9, done.stderr
    assert not (tmp_path / "out").exists()
    secateur.shrink(models / "llama", tmp_path / "out", layers=2, neurons=0.5, **COMMON)
    assert result(tmp_path / "out") == whole["layers"]


def test_what_was_chosen_is_not_chosen_again(models, tmp_path):
    told = []

    class Notes(Silent):
        def start(self, task, total, done=0):
            told.append(task)

    kind, options = RUNS["layers"]
    with pytest.raises(KeyboardInterrupt):
        secateur.shrink(models / kind, tmp_path / "out", **{**COMMON, **options, "progress": Interrupts(1, "pruning")})
    with pytest.raises(ResumeError, match=r"layers 2, not 1"):
        secateur.shrink(models / kind, tmp_path / "out", **{**COMMON, **options, "layers": 1})
    secateur.shrink(models / kind, tmp_path / "out", **{**COMMON, **options, "progress": Notes()})
    assert "trying out" not in told and "pruning" in told


# What follows.


def test_a_shrunken_model_is_pruned_packed_measured_and_shrunk_again(models, tmp_path):
    secateur.shrink(models / "llama", tmp_path / "small", neurons=0.5, layers=[1], **COMMON)
    calibration = rows(6, 24)
    secateur.prune(
        tmp_path / "small", tmp_path / "pruned", calibration=calibration, format="bitmask", progress=Silent()
    )
    assert secateur.inspect(tmp_path / "pruned")["sparsity"] == pytest.approx(0.5, abs=0.02)
    again = secateur.shrink(tmp_path / "pruned", tmp_path / "again", heads=0.5, **COMMON)
    assert again["config"]["num_key_value_heads"] == [2, 1]
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    secateur.shrink(tmp_path / "again", tmp_path / "last", layers=1, **COMMON)
    assert json.loads((tmp_path / "last" / "config.json").read_text())["num_hidden_layers"] == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype_rounds_what_was_proved(dtype, models, tmp_path):
    report = secateur.shrink(models / "llama", tmp_path / "out", neurons=0.5, layers=[1], dtype=dtype, **COMMON)
    from safetensors.torch import load_file

    (file,) = (tmp_path / "out").glob("*.safetensors")
    assert {str(tensor.dtype) for tensor in load_file(file).values()} == {f"torch.{dtype}"}
    assert report["config"]["dtype"] == ["float32", dtype]


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_a_bias_stays_as_it_is_without_compensation(criterion, tmp_path):
    save_tiny(tmp_path / "model", "gpt2")
    secateur.shrink(tmp_path / "model", tmp_path / "out", neurons=0.5, criterion=criterion, compensate=False, **COMMON)
    before, after = tensors_of(tmp_path / "model"), tensors_of(tmp_path / "out")
    assert torch.equal(before["transformer.h.0.mlp.c_proj.bias"], after["transformer.h.0.mlp.c_proj.bias"])


def test_shards_and_dtypes_stay_as_they_were(tmp_path):
    source = save_tiny(tmp_path / "model", "llama", "bfloat16", max_shard_size="24KB")
    secateur.shrink(source, tmp_path / "out", neurons=0.5, **COMMON)
    shards = [sorted(path.name for path in folder.glob("*.safetensors")) for folder in (source, tmp_path / "out")]
    assert shards[0] == shards[1] and len(shards[0]) > 1
    model = secateur.inspect(tmp_path / "out")
    assert {row["format"] for row in model["matrices"]} == {"dense"}
    from safetensors.torch import load_file

    for path in (tmp_path / "out").glob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}


def test_rows_of_a_criterion_without_inputs_need_no_text(models, tmp_path):
    options = {**COMMON, "calibration": "/nowhere/text.txt"}
    for number, what in enumerate(
        (
            {"neurons": 0.5, "criterion": "magnitude", "compensate": False},
            {"layers": [1]},
            {"layers": 1, "depth": "random"},
        )
    ):
        report = secateur.shrink(models / "llama", tmp_path / str(number), **options, **what)
        assert report["plan"]["calibration"] is None
    with pytest.raises(SecateurError, match=r"/nowhere/text\.txt"):
        secateur.shrink(models / "llama", tmp_path / "out", neurons=0.5, **options)
