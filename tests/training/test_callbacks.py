"""The callbacks in transformers' own Trainer."""

import shutil

import pytest
import torch
from transformers import Trainer, TrainingArguments

import secateur
from secateur.training.masks import Masks
from sparse_training import IDS, same_zeros, train_step, zeros
from tiny import tiny_model

ROWS = [{"input_ids": row, "labels": row} for row in IDS]


def trainer(model, folder, *callbacks, **options):
    settings = {
        "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 0.01, "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "dataloader_pin_memory": False,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    args = TrainingArguments(output_dir=str(folder), **{**settings, **options})
    return Trainer(model=model, args=args, train_dataset=ROWS, callbacks=list(callbacks))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1, "max_grad_norm": 0.1},
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"optim": "adafactor"},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
    ],
)
def test_a_trainer_keeps_every_zero(options, sparse, tmp_path):
    before = zeros(sparse)
    former = sparse.model.layers[0].mlp.up_proj.weight.detach().clone()
    trainer(sparse, tmp_path, secateur.KeepSparsity(), **options).train()
    assert same_zeros(before, zeros(sparse))
    assert not torch.equal(former, sparse.model.layers[0].mlp.up_proj.weight)


def test_given_masks_are_held(tmp_path):
    model = tiny_model("llama")
    keep = {"model.layers.1.mlp.up_proj.weight": torch.rand(48, 32) < 0.5}
    trainer(model, tmp_path, secateur.KeepSparsity(keep)).train()
    for name, mask in keep.items():
        assert torch.equal(dict(model.named_parameters())[name].detach() != 0, mask)


def test_a_dense_model_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(secateur.ModelError, match="no zeros to keep"):
        trainer(tiny_model("llama"), tmp_path, secateur.KeepSparsity()).train()


def test_trainer_and_plain_loop_agree(tmp_path):
    """The same rows in the same order, the same optimiser: the same weights, bit for bit."""
    ours, theirs = tiny_model("llama"), tiny_model("llama")
    options = {"final": 0.6, "schedule": "linear", "every": 2, "method": "wanda"}
    order = []

    class Watched(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            order.append(inputs["input_ids"].clone())
            return super().training_step(model, inputs, *args, **kwargs)

    made = trainer(theirs, tmp_path, max_grad_norm=0.0)
    Watched(model=theirs, args=made.args, train_dataset=ROWS, callbacks=[secateur.GradualPruning(**options)]).train()
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.01, weight_decay=0.0, fused=True)  # as the Trainer's
    ours.train()
    for step in secateur.gradual(ours, steps=6, **options):
        train_step(ours, optimizer, order[step])
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6, msg=name)
    assert same_zeros(zeros(ours), zeros(theirs))
    assert Masks.of(ours).sparsity == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_going_on_from_a_trainers_checkpoint_ends_the_same(method, tmp_path):
    """Killed after a checkpoint between two masks, and resumed in another model."""
    options = {"save_strategy": "steps", "save_steps": 3, "seed": 3}
    course = {"final": 0.7, "every": 4, "method": method, "schedule": "linear"}
    whole = tiny_model("llama")
    trainer(whole, tmp_path / "whole", secateur.GradualPruning(**course), max_steps=9, **options).train()
    again = tiny_model("llama")
    (tmp_path / "again").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    resumed = trainer(again, tmp_path / "again", secateur.GradualPruning(**course), max_steps=9, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-3"))
    for (name, mine), other in zip(again.named_parameters(), whole.named_parameters(), strict=True):
        assert torch.equal(mine, other[1]), name


def test_zeros_survive_a_trainers_checkpoint(sparse, tmp_path):
    before = zeros(sparse)
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer(sparse, tmp_path, secateur.KeepSparsity(), max_steps=4, **options).train()
    fresh = tiny_model("llama")  # dense: the checkpoint brings the zeros
    trainer(fresh, tmp_path, secateur.KeepSparsity(), **options).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-4")
    )
    assert same_zeros(before, zeros(fresh))


def test_unknown_options_are_one_line(tmp_path):
    with pytest.raises(secateur.OptionError, match=r"GradualPruning:.*speed"):
        trainer(tiny_model("llama"), tmp_path, secateur.GradualPruning(final=0.5, speed=3)).train()
