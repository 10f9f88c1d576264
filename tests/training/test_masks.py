"""No sequence of steps changes a zero, whatever takes them."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import secateur
from secateur.training.masks import Masks, model_matrices
from sparse_training import IDS, same_zeros, train_step, zeros
from tiny import save_tiny, tiny_model

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adam-maximize": lambda p: torch.optim.Adam(p, lr=0.01, maximize=True, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=1.0),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}
MOVES = ("sgd", "adamw", "accumulate", "clip", "bf16", "checkpointing", "noise")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_under_every_optimizer(name, sparse):
    before, loss = zeros(sparse), []
    optimizer = OPTIMIZERS[name](sparse.parameters())
    with Masks.of(sparse).held():
        loss = [train_step(sparse, optimizer) for _ in range(4)]
        assert same_zeros(before, zeros(sparse))  # inside the loop too
    assert same_zeros(before, zeros(sparse))
    assert loss[0] != loss[-1]


def test_without_masks_the_same_steps_fill_the_zeros(sparse):
    before = zeros(sparse)
    train_step(sparse, torch.optim.AdamW(sparse.parameters(), lr=0.01))
    assert not same_zeros(before, zeros(sparse))


def test_momentum_of_a_time_before_the_mask_revives_nothing():
    model = tiny_model("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train_step(model, optimizer)
    secateur.prune(model, method="magnitude", sparsity=0.5)
    before = zeros(model)
    with Masks.of(model).held():
        train_step(model, optimizer)
    assert same_zeros(before, zeros(model))


def test_masked_gradients_count_in_no_norm(sparse):
    masks = Masks.of(sparse)
    with masks.held():
        sparse(input_ids=IDS, labels=IDS).loss.backward()
    for matrix in model_matrices(sparse).values():
        grad = matrix.part(matrix.weight.grad)
        assert (grad[~masks.keep(matrix)] == 0).all() and (grad[masks.keep(matrix)] != 0).any()


def test_hooks_are_gone_afterwards(sparse):
    with Masks.of(sparse).held():
        pass
    before = zeros(sparse)
    train_step(sparse, torch.optim.AdamW(sparse.parameters(), lr=0.01))
    assert not same_zeros(before, zeros(sparse))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(MOVES), max_size=6))
def test_no_sequence_of_steps_changes_a_zero(moves):
    model = secateur.prune(tiny_model("llama"), method="magnitude", pattern="2:4").model
    before = zeros(model)
    optimizers = {name: OPTIMIZERS[name](model.parameters()) for name in ("sgd", "adamw")}
    with Masks.of(model).held():
        for move in moves:
            if move in optimizers:
                train_step(model, optimizers[move])
            elif move == "accumulate":
                for _ in range(2):
                    model(input_ids=IDS, labels=IDS).loss.backward()
                optimizers["adamw"].step()
            elif move == "clip":
                model(input_ids=IDS, labels=IDS).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizers["sgd"].step()
            elif move == "bf16":
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = model(input_ids=IDS, labels=IDS).loss
                loss.backward()
                optimizers["adamw"].step()
            elif move == "checkpointing":
                model.train().gradient_checkpointing_enable()
                train_step(model, optimizers["adamw"])
                model.gradient_checkpointing_disable()
            elif move == "noise":  # as if someone had written into the weights
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(torch.randn_like(parameter) * 0.01)
                optimizers["sgd"].step()
            assert same_zeros(before, zeros(model)), move
    copied = copy.deepcopy(model)
    assert same_zeros(before, zeros(copied))


def test_clearing_leaves_positive_zero_of_whatever_was_there(sparse):
    masks = Masks.of(sparse)
    weight = sparse.model.layers[0].mlp.up_proj.weight
    gone = weight.detach() == 0
    with torch.no_grad():
        odd = torch.tensor([float("nan"), float("-inf"), -1.0, -0.0])
        weight[gone] = odd.repeat(int(gone.sum()) // 4 + 1)[: gone.sum()]
    masks.apply()
    assert (weight.detach().view(torch.int32)[gone] == 0).all() and (weight.detach()[~gone] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_dtype_that_trains(dtype, sparse):
    sparse.to(dtype)
    masks = Masks.of(sparse)
    count = masks.zeros
    with masks.held():
        train_step(sparse, torch.optim.SGD(sparse.parameters(), lr=0.1))
    assert Masks.of(sparse).zeros == count


def test_given_masks_are_applied_at_once_and_held():
    model = tiny_model("llama")
    name = "model.layers.1.mlp.down_proj.weight"
    keep = torch.rand(32, 48) < 0.3
    masks = Masks(model, {name: keep})
    parameter = dict(model.named_parameters())[name]
    assert torch.equal(parameter.detach() != 0, keep)
    with masks.held():
        train_step(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    assert torch.equal(parameter.detach() != 0, keep)
    assert masks.sparsity == pytest.approx(1 - float(keep.float().mean()))


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        (
            {"model.layers.1.mlp.down.weight": torch.ones(32, 48, dtype=torch.bool)},
            "did you mean model.layers.1.mlp.down",
        ),
        (
            {"model.layers.1.mlp.down_proj.weight": torch.ones(48, 32, dtype=torch.bool)},
            r"boolean \[32, 48\].*\[48, 32\]",
        ),
        ({"model.layers.1.mlp.down_proj.weight": torch.ones(32, 48)}, "must be boolean.*float32"),
    ],
)
def test_masks_that_do_not_fit_are_refused(keep, said):
    with pytest.raises(secateur.OptionError, match=said):
        Masks(tiny_model("llama"), keep)


def test_a_dense_model_has_no_zeros_to_keep():
    with pytest.raises(secateur.ModelError, match="no zeros to keep; prune it first"):
        Masks.of(tiny_model("llama"))


def test_half_precision_cannot_be_trained(sparse):
    with pytest.raises(secateur.ModelError, match=r"layers\.0.*float16.*dtype=torch.float32"):
        Masks.of(sparse.half())


def test_a_packed_model_in_memory_cannot_be_trained(tmp_path, tokenizer):
    from transformers import AutoModelForCausalLM

    save_tiny(tmp_path / "m", "llama", tokenizer=tokenizer)
    secateur.prune(tmp_path / "m", tmp_path / "p", method="magnitude", format="bitmask")
    with pytest.raises(secateur.ModelError, match=r"is packed.*secateur finetune takes its directory"):
        Masks.of(AutoModelForCausalLM.from_pretrained(tmp_path / "p"))


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_other_layouts(family):
    """Conv1D lies [in, out]; experts lie fused."""
    model = secateur.prune(tiny_model(family), method="magnitude", pattern="2:4").model
    masks = Masks.of(model)
    count = masks.zeros
    with masks.held():
        train_step(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    assert Masks.of(model).zeros == count == sum(m.weights for m in model_matrices(model).values()) // 2
