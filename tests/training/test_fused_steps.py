"""Optimisers that take their steps in the midst of backward, one for each parameter; and those of somebody else."""

import threading

import pytest
import torch

import secateur
from secateur.training.masks import Masks
from sparse_training import IDS, same_zeros, train_step, zeros
from tiny import tiny_model

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),  # what it remembers of one weight counts for others
}


def sparse_model():
    return secateur.prune(tiny_model("llama"), method="magnitude", pattern="row").model


def stepping_in_backward(model, make):
    """As in pytorch's tutorial: no gradient outlives its hook."""
    optimizers = {parameter: make([parameter]) for parameter in model.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    return [parameter.register_post_accumulate_grad_hook(step) for parameter in optimizers]


def backward(model, times=4):
    for row in IDS[:times]:
        model(input_ids=row[None], labels=row[None]).loss.backward()


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def fused(make, order, model=None):
    model = model or sparse_model()
    before = zeros(model)
    if order == "before":
        stepping_in_backward(model, make)
    with Masks.of(model).held():
        if order == "after":
            stepping_in_backward(model, make)
        backward(model)
        assert same_zeros(before, zeros(model))
    return weights(model)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_in_backward_is_the_same_step(name):
    """Whether hooks were there before the masks or came later: as one step after backward, bit for bit."""
    model = sparse_model()
    optimizers = [OPTIMIZERS[name]([parameter]) for parameter in model.parameters()]
    with Masks.of(model).held():
        for row in IDS:
            model(input_ids=row[None], labels=row[None]).loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    for order in ("before", "after"):
        assert equal(weights(model), fused(OPTIMIZERS[name], order)), order


def test_one_optimizer_made_before_the_masks_is_heard():
    model = sparse_model()
    before, optimizer = zeros(model), torch.optim.AdamW(model.parameters(), lr=0.01)
    with Masks.of(model).held():
        train_step(model, optimizer)
        assert same_zeros(before, zeros(model))


def test_gradual_pruning_with_steps_in_backward():
    model = tiny_model("llama").train()
    stepping_in_backward(model, OPTIMIZERS["adamw"])
    for _ in secateur.gradual(model, final=0.5, steps=4, method="wanda"):
        backward(model, 1)
    assert Masks.of(model).sparsity == 0.5


def test_a_trainer_callback_with_steps_in_backward():
    model = sparse_model()
    before, callback = zeros(model), secateur.KeepSparsity()
    stepping_in_backward(model, OPTIMIZERS["adamw"])
    callback.on_train_begin(None, None, None, model=model)
    backward(model)
    callback.on_train_end(None, None, None)
    assert same_zeros(before, zeros(model))


class Lomo(torch.optim.Optimizer):
    """Takes its steps in tensors' hooks, and is never asked for one."""

    def __init__(self, parameters):
        super().__init__(parameters, {})
        self.held = [parameter for group in self.param_groups for parameter in group["params"]]
        for parameter in self.held:
            parameter.register_hook(self.fuse)

    def fuse(self, gradient):
        with torch.no_grad():
            for parameter in self.held:
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad, alpha=-0.1)
                    parameter.grad = None
        return gradient


def test_lomo_keeps_zeros():
    model = sparse_model()
    before, former = zeros(model), weights(model)
    optimizer = Lomo(model.parameters())
    with Masks.of(model).held():
        backward(model)
        optimizer.fuse(None)
    assert same_zeros(before, zeros(model)) and not equal(former, weights(model))


class LowRank(torch.optim.AdamW):
    """As GaLore layer by layer: an optimiser for each parameter, whose update is projected, so it is dense."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim == 2:
                    U, S, V = torch.linalg.svd(parameter.grad, full_matrices=False)
                    parameter.grad.copy_(U[:, :2] @ torch.diag(S[:2]) @ V[:2])
        super().step()


@pytest.mark.parametrize("order", ["before", "after"])
def test_an_update_that_fills_what_was_cleared(order):
    fused(lambda p: LowRank(p, lr=0.01), order)


def test_a_step_clears_what_its_optimizer_holds_and_nothing_else():
    model = sparse_model()
    up, down = (model.model.layers[1].mlp.get_submodule(name).weight for name in ("up_proj", "down_proj"))
    masked = {parameter: parameter.detach() == 0 for parameter in (up, down)}
    other = tiny_model("llama")
    theirs, ours = torch.optim.SGD(other.parameters(), lr=0.1), torch.optim.SGD([up, model.lm_head.weight], lr=0.1)
    with Masks.of(model).held():
        backward(model, 1)
        with torch.no_grad():
            for parameter, gone in masked.items():
                parameter[gone] = 1.0  # as if in use
        thread = threading.Thread(target=train_step, args=(other, theirs))
        thread.start()
        thread.join()
        assert all((parameter[gone] == 1).all() for parameter, gone in masked.items())
        ours.step()
        assert (up[masked[up]] == 0).all() and (down[masked[down]] == 1).all()


def test_two_models_are_trained_in_two_threads():
    """Each with its masks and its optimisers: as if each were alone."""
    expected = fused(OPTIMIZERS["adamw"], "after")
    models, found = [sparse_model(), sparse_model()], {}  # made here: there is one source of random numbers

    def work(number):
        found[number] = fused(OPTIMIZERS["adamw"], "after", models[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(equal(expected, found[number]) for number in (0, 1))
