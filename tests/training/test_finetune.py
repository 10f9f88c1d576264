"""`secateur finetune` from disk to disk."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from secateur.progress import Silent
from secateur.training.masks import Masks, model_matrices
from tiny import TEXT, files_below, save_tiny, tensors_of

QUICK = {"steps": 10, "seqlen": 16, "learning_rate": 0.01, "progress": Silent()}


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer):
    """A dense model, two pruned ones (one of them packed), and a text."""
    folder = tmp_path_factory.mktemp("finetune")
    save_tiny(folder / "dense", "llama", "bfloat16", tokenizer=tokenizer)
    secateur.prune(folder / "dense", folder / "pruned", method="magnitude", pattern="2:4", progress=Silent())
    secateur.prune(
        folder / "dense", folder / "packed", method="magnitude", pattern="2:4", format="nm", progress=Silent()
    )
    (folder / "text.txt").write_text(TEXT * 20)
    return folder


def loaded(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto")


def weights(path):
    return {name: m.read().clone() for name, m in model_matrices(loaded(path)).items()}


@pytest.mark.parametrize("train", ["full", "lora", "bias"])
def test_recovery_keeps_every_zero_and_lowers_the_loss(train, models, tmp_path):
    report = secateur.finetune(models / "pruned", tmp_path / "out", models / "text.txt", train=train, **QUICK)
    before, after = weights(models / "pruned"), weights(tmp_path / "out")
    for name, W in before.items():
        assert torch.equal(W == 0, after[name] == 0), name
        assert torch.equal(W, after[name]) == (train == "bias")
    assert (report["sparsity"], report["sparsity_before"]) == (0.5, 0.5)
    assert {m["pattern"] for m in report["matrices"]} == {"2:4"}
    held = report["training"]["held_out"]
    assert held[0][0] == 0 and held[-1][0] == 10 and min(loss for _, loss in held) < held[0][1]
    assert report == json.loads((tmp_path / "out" / "secateur.json").read_text())
    assert report["former"]["plan"]["method"] == "magnitude"
    assert not (tmp_path / "out.secateur").exists()


def test_what_is_not_trained_is_the_same_byte_for_byte(models, tmp_path):
    secateur.finetune(models / "pruned", tmp_path / "out", models / "text.txt", train="lora", **QUICK)
    before, after = tensors_of(models / "pruned"), tensors_of(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight" for name in weights(models / "pruned")}
    assert {name: t.dtype for name, t in before.items()} == {name: t.dtype for name, t in after.items()}


def test_the_best_checkpoint_is_kept(models, tmp_path):
    """What is learnt from the first rows is wrong for those held out, so the first measurement is the best."""
    rows = torch.cat([torch.arange(3, 19).repeat(20, 1), torch.arange(3, 19).flip(0).repeat(20, 1)])
    options = {**QUICK, "train": "full", "eval_steps": 2, "learning_rate": 0.1}
    report = secateur.finetune(models / "pruned", tmp_path / "out", rows, **options)
    held = dict(report["training"]["held_out"])
    assert list(held) == [0, 2, 4, 6, 8, 10] and held[2] == min(held[step] for step in held if step)
    assert report["training"]["steps"] == 2
    with torch.no_grad():
        loss = loaded(tmp_path / "out").float()(input_ids=rows[-4:], labels=rows[-4:]).loss
    assert float(loss) == pytest.approx(held[2], rel=0.01)  # which was measured in float32


def windows(models):
    """The rows of the text that are held out: the last 32 of the 52 that are of use."""
    ids = AutoTokenizer.from_pretrained(models / "dense")(TEXT * 20)["input_ids"]
    return torch.tensor(ids[20 * 16 : 52 * 16]).reshape(32, 16)


def test_a_teacher_is_learnt(models, tmp_path):
    options = {**QUICK, "train": "full", "teacher": str(models / "dense")}
    report = secateur.finetune(models / "pruned", tmp_path / "out", models / "text.txt", **options)
    held = report["training"]["held_out"]
    assert report["training"]["loss"] == "divergence" and held[-1][1] < held[0][1]
    rows = windows(models)
    with torch.no_grad():
        known, own = (
            loaded(models / name).float()(input_ids=rows).logits[:, :-1].log_softmax(-1) for name in ("dense", "pruned")
        )
    expected = (known.exp() * (known - own)).sum(-1).mean()
    assert held[0][1] == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("name", ["packed", "int8"])
def test_a_packed_model_is_packed_again(name, models, tmp_path):
    if name == "int8":
        secateur.pack(models / "pruned", tmp_path / "int8", format="bitmask", values="int8", progress=Silent())
    source = tmp_path / "int8" if name == "int8" else models / name
    report = secateur.finetune(source, tmp_path / "out", models / "text.txt", **QUICK)
    before, after = (
        json.loads((p / "config.json").read_text())["quantization_config"] for p in (source, tmp_path / "out")
    )
    assert {n: (m["format"], m["values"]) for n, m in before["matrices"].items()} == {
        n: (m["format"], m["values"]) for n, m in after["matrices"].items()
    }
    assert report["packed"]["true"] < 0.75 * report["packed"]["dense"]
    secateur.unpack(source, tmp_path / "a", progress=Silent())
    secateur.unpack(tmp_path / "out", tmp_path / "b", progress=Silent())
    then, now = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all((now[n][W == 0] == 0).all() and not torch.equal(now[n], W) for n, W in then.items())
    loaded(tmp_path / "out")(input_ids=torch.tensor([[3, 4, 5]]))


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"sparsity": 0.75, "every": 3}, "row"),
        ({"pattern": "2:4", "method": "wanda", "every": 2}, "2:4"),
        ({"sparsity": 0.75, "rounds": 3}, "row"),
        ({"sparsity": 0.75, "rounds": 2, "method": "sparsegpt", "pattern": "row"}, "row"),
        ({"pattern": "1:4", "rounds": 5, "method": "magnitude", "train": "bias"}, "1:4"),
    ],
)
def test_pruning_on_the_way_ends_exactly_at_the_target(options, pattern, models, tmp_path):
    report = secateur.finetune(models / "dense", tmp_path / "out", models / "text.txt", **QUICK, **options)
    target = report["plan"]["course"]["sparsity"] or (0.5 if pattern == "2:4" else 0.75)
    for name, W in weights(tmp_path / "out").items():
        assert int((W == 0).sum()) == round(target * W.numel()), name
        if ":" in pattern:
            assert ((W.reshape(-1, 4) != 0).sum(1) == int(pattern[0])).all()
    assert report["sparsity_before"] < 0.01 and report["training"]["steps"] == 10
    assert {m["sparsity"] for m in report["matrices"]} == {target}


@pytest.mark.parametrize(
    ("data", "rows", "tokens"),
    [
        (torch.arange(3, 67).reshape(4, 16), 4, 64),
        ([TEXT] * 2, 24, 24 * 16),  # joined and cut, as a file is
        (iter([TEXT] * 9), 52, 52 * 16),  # 52 are of use: 10 steps of 2, and 32 held out
        ([{"text": TEXT}] * 2, 24, 24 * 16),
        ([{"input_ids": list(range(3, 13)), "attention_mask": [1] * 7 + [0] * 3}] * 4, 4, 28),
        ({"input_ids": torch.arange(3, 43).reshape(4, 10), "attention_mask": torch.ones(4, 10)}, 4, 40),
    ],
)
def test_python_data_of_every_kind(data, rows, tokens, models, tmp_path):
    report = secateur.finetune(models / "pruned", tmp_path / "out", data, **QUICK)
    found = report["plan"]["data"]
    assert (found["samples"], found["tokens"]) == (rows, tokens)


def test_rows_of_several_lengths_are_filled_up_and_the_filling_counts_nowhere(models, tmp_path):
    long, short = torch.arange(3, 27), torch.arange(30, 34)
    report = secateur.finetune(
        models / "pruned", tmp_path / "out", [long, short], **{**QUICK, "steps": 1, "learning_rate": 1e-9}
    )
    model = loaded(models / "pruned").float()
    losses = [float(model(input_ids=row[None], labels=row[None]).loss.detach()) for row in (long, short)]
    expected = (losses[0] * 23 + losses[1] * 3) / 26
    assert report["training"]["losses"][0][1] == pytest.approx(expected, rel=1e-4)
    assert report["training"]["held_out"] == []


def test_the_same_plan_is_done_once(models, tmp_path, messages):
    first = secateur.finetune(models / "pruned", tmp_path / "out", models / "text.txt", **QUICK)
    assert secateur.finetune(models / "pruned", tmp_path / "out", models / "text.txt", **QUICK) == first
    assert "nothing to do" in messages[-1]
    with pytest.raises(secateur.ResumeError, match="seed 0, not 1"):
        secateur.finetune(models / "pruned", tmp_path / "out", models / "text.txt", **QUICK, seed=1)


def test_evaluation_before_and_after(models, tmp_path):
    report = secateur.finetune(
        models / "pruned", tmp_path / "out", models / "text.txt", evaluate=str(models / "text.txt"), **QUICK
    )
    found = report["evaluation"]
    assert found["after"]["perplexity"] < found["before"]["perplexity"]


# Killed and resumed.

COURSES = {
    "lora": ("pruned", {}),
    "full": ("pruned", {"train": "full"}),
    "gradual": ("dense", {"sparsity": 0.75, "method": "wanda", "every": 2}),
    "rounds": ("dense", {"sparsity": 0.75, "rounds": 3}),
}
KILLS = ("after 1", "within 2", "written")


@pytest.fixture(scope="module")
def killed(models, tmp_path_factory):
    """Every course, trained whole, and killed and resumed at every point: the folder, and how processes ended."""
    folder = tmp_path_factory.mktemp("killed")
    words = [sys.executable, "-W", "ignore", Path(__file__).parents[1] / "dying_trainings.py", models, folder]
    done = subprocess.run([*words, json.dumps(COURSES), *KILLS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kill", KILLS)
@pytest.mark.parametrize("course", COURSES)
def test_killed_and_resumed_ends_the_same_bit_for_bit(course, kill, killed):
    folder, ended = killed
    found = ended[f"{course}, {kill}"]
    assert found == {"first": -signal.SIGKILL, "output": False, "checkpoints": True, "second": 0, "left": False}
    whole, again = folder / course, folder / f"{course}, {kill}"
    expected = tensors_of(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors_of(again).items())
    reports = [json.loads((path / "secateur.json").read_text()) for path in (whole, again)]
    assert reports[0]["training"] == reports[1]["training"]


def test_a_run_that_is_resumed_with_another_option_is_refused(models, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    from secateur.pipeline.run_directory import RunDirectory

    monkeypatch.setattr(RunDirectory, "write_block", stop)
    with pytest.raises(KeyboardInterrupt):
        secateur.finetune(models / "pruned", tmp_path / "out", models / "text.txt", **QUICK)
    with pytest.raises(secateur.ResumeError, match=r"unfinished run with learning_rate 0.01, not 0.02"):
        secateur.finetune(models / "pruned", tmp_path / "out", models / "text.txt", **{**QUICK, "learning_rate": 0.02})


# What goes wrong.


def test_nan_ends_the_training_and_the_best_model_before_it_is_kept(models, tmp_path, monkeypatch, messages):
    from transformers import Trainer

    step = Trainer.training_step
    monkeypatch.setattr(
        Trainer,
        "training_step",
        lambda self, *args: step(self, *args) * (float("nan") if self.state.global_step == 6 else 1),
    )
    report = secateur.finetune(
        models / "pruned", tmp_path / "out", models / "text.txt", train="full", eval_steps=2, **QUICK
    )
    assert report["training"]["stopped"] == 7 and report["training"]["steps"] in (2, 4, 6)
    assert any("step 7" in line and "NaN" in line for line in messages)
    assert all(torch.isfinite(tensor).all() for tensor in tensors_of(tmp_path / "out").values())
    assert Masks.of(loaded(tmp_path / "out")).sparsity == 0.5


@pytest.mark.parametrize("train", ["full", "bias"])
def test_weights_that_become_nan_in_the_last_step_are_not_kept(train, models, tmp_path, monkeypatch):
    """The loss of that step is still a number; a norm is not."""
    from transformers import Trainer

    step = Trainer.training_step

    def poisoned(self, model, *args):
        loss = step(self, model, *args)
        if self.state.global_step == 9:
            model.model.norm.weight.grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(Trainer, "training_step", poisoned)
    report = secateur.finetune(models / "pruned", tmp_path / "out", models / "text.txt", train=train, **QUICK)
    assert report["training"]["stopped"] == 10 and report["training"]["steps"] < 10
    assert all(torch.isfinite(tensor).all() for tensor in tensors_of(tmp_path / "out").values())


def test_nan_before_the_first_checkpoint_leaves_nothing(models, tmp_path):
    broken = shutil.copytree(models / "pruned", tmp_path / "broken")
    from safetensors.torch import load_file, save_file

    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(secateur.NumericsError, match=r"NaN or Inf in step 1.*lower --learning-rate than 0.01"):
        secateur.finetune(broken, tmp_path / "out", models / "text.txt", **QUICK)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.secateur").exists()


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("dense", {}, "no zeros to keep; prune it first"),
        ("pruned", {"train": "lorra"}, "did you mean lora"),
        ("pruned", {"train": "lora", "sparsity": 0.6}, "give --train full"),
        ("pruned", {"steps": 0}, "steps 0"),
        ("pruned", {"batch_size": 0}, "batch_size 0"),
        ("pruned", {"learning_rate": 3.0}, "between 0 and 1"),
        ("pruned", {"seqlen": 4096}, "longer than the model's context"),
        ("pruned", {"data": "no-such-file.txt"}, "neither a file nor a known text"),
        ("pruned", {"data": []}, "is empty"),
        ("pruned", {"data": [""]}, "less than one window"),
        ("pruned", {"schedule": "linear"}, "schedule: is for pruning on the way"),
        ("pruned", {"sparsity": 0.7, "rounds": 11}, "10 steps are fewer"),
        ("pruned", {"sparsity": 0.7, "rounds": 2, "schedule": "linear"}, "have their own course"),
        ("pruned", {"sparsity": 0.7, "method": "sparsegpt"}, "prune in rounds"),
        ("pruned", {"teacher": "nowhere/at/all"}, "no such file or directory"),
        ("pruned", {"teacher": "other"}, "has another vocabulary"),
        ("pruned", {"evaluate": ""}, "evaluate is empty"),
        ("pruned", {"eval_steps": 0}, "eval_steps 0"),
        ("pruned", {"seed": -1}, "seed -1: at least 0"),
        ("pruned", {"seed": 2**32}, "below 2"),
        ("dense", {"sparsity": 0.3, "initial": 0.8}, "initial 0.8: is more than the 0.3"),
        ("dense", {"sparsity": 0.3, "every": 10}, "every 10: new masks come every so many of 10 steps"),
        ("pruned", {"teacher": "short"}, "its context is 8 tokens; give --seqlen 8"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(name, options, said, models, tmp_path):
    if (teacher := options.get("teacher")) in ("other", "short"):
        changes = {"vocab_size": 96} if teacher == "other" else {"max_position_embeddings": 8}
        options = {"teacher": str(save_tiny(tmp_path / "other", "llama", **changes))}
    options = {**QUICK, "data": models / "text.txt", **options}
    before = files_below(models)
    with pytest.raises(secateur.SecateurError, match=said) as error:
        secateur.finetune(models / name, tmp_path / "out", **options)
    assert "\n" not in str(error.value)
    assert {p.name for p in tmp_path.iterdir()} <= {"other"}
    assert files_below(models) == before


def test_a_text_of_less_than_a_window(models, tmp_path):
    (tmp_path / "short.txt").write_text("A bud.")
    with pytest.raises(secateur.DataError, match="less than one window of 16"):
        secateur.finetune(models / "pruned", tmp_path / "out", tmp_path / "short.txt", **QUICK)


def test_tied_embeddings_that_lie_on_disk_twice_are_written_twice(models, tmp_path, tokenizer):
    from safetensors.torch import load_file, save_file

    save_tiny(tmp_path / "tied", "llama-tied", tokenizer=tokenizer)
    tensors = load_file(tmp_path / "tied" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "tied" / "model.safetensors", metadata={"format": "pt"})
    secateur.prune(tmp_path / "tied", tmp_path / "pruned", method="magnitude", progress=Silent())
    secateur.finetune(tmp_path / "pruned", tmp_path / "out", models / "text.txt", train="full", **QUICK)
    found = tensors_of(tmp_path / "out")
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert not torch.equal(found["lm_head.weight"], tensors["lm_head.weight"])


def test_random_numbers_of_others_go_on(models, tmp_path):
    import random

    torch.manual_seed(5)
    random.seed(5)
    expected = (torch.rand(1), random.random())
    torch.manual_seed(5)
    random.seed(5)
    secateur.finetune(models / "pruned", tmp_path / "out", models / "text.txt", **QUICK)
    assert (torch.rand(1), random.random()) == expected


def test_one_step_trains(models, tmp_path):
    secateur.finetune(models / "pruned", tmp_path / "out", models / "text.txt", **{**QUICK, "steps": 1})
    before, after = weights(models / "pruned"), weights(tmp_path / "out")
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_in_float16_no_weight_that_is_kept_becomes_zero(models, tmp_path):
    """Weights that training has brought within half of float16's smallest number."""
    from safetensors.torch import load_file, save_file

    secateur.prune(models / "dense", tmp_path / "half", method="magnitude", dtype="float16", progress=Silent())
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    kept = tensors[name] != 0
    tensors[name][kept] = torch.where(torch.rand(int(kept.sum())) < 0.5, 2.0**-24, -(2.0**-24)).half()
    save_file(tensors, tmp_path / "half" / "model.safetensors", metadata={"format": "pt"})
    options = {**QUICK, "train": "full", "learning_rate": 4e-8, "steps": 1}
    report = secateur.finetune(tmp_path / "half", tmp_path / "out", models / "text.txt", **options)
    after = tensors_of(tmp_path / "out")[name]
    assert torch.equal(after != 0, kept) and set(after[kept].abs().tolist()) == {2.0**-24, 2.0**-23}
    assert report["sparsity"] == report["sparsity_before"]
