"""Gradual pruning in one's own loop."""

import pytest
import torch

import secateur
from secateur.pruning import Statistics, parse_pattern, wanda
from secateur.training.masks import Masks, model_matrices
from sparse_training import IDS, same_zeros, train_step, zeros
from tiny import tiny_model


def trained(model, **options):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in secateur.gradual(model, **options):
        train_step(model, optimizer)
    return model


def sparsities(model):
    return {name: 1 - float(m.read().count_nonzero()) / m.weights for name, m in model_matrices(model).items()}


@pytest.mark.parametrize("pattern", ["row", "matrix", "block:4x4", "2:4", "3:8"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria"])
def test_the_end_is_exactly_the_target(method, pattern):
    model = trained(tiny_model("llama").train(), final=None, steps=6, method=method, pattern=pattern)
    fixed = parse_pattern(pattern).fixed_sparsity
    assert set(sparsities(model).values()) == {0.5 if fixed is None else fixed}
    for matrix in model_matrices(model).values():  # and the zeros lie where the pattern wants them
        keep = matrix.read() != 0
        assert torch.equal(parse_pattern(pattern).mask(keep.float(), 0.5), keep)


def test_new_masks_come_only_every_so_many_steps_and_the_last_in_time():
    model, seen = tiny_model("llama"), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in secateur.gradual(model, final=0.5, steps=12, every=5, schedule="linear"):
        train_step(model, optimizer)
        seen.append(round(Masks.of_matrices(model).sparsity, 2))
    assert seen == [0.0] * 5 + [0.25] * 5 + [0.5] * 2


def test_one_step_prunes_to_the_target():
    assert set(sparsities(trained(tiny_model("llama"), final=0.25, steps=1)).values()) == {0.25}


def test_what_is_pruned_stays_pruned_and_zeros_from_before_count(sparse):
    before = zeros(sparse)
    trained(sparse, final=0.75, steps=5)
    assert all((zeros(sparse)[name] | ~was).all() for name, was in before.items())
    assert set(sparsities(sparse).values()) == {0.75}


def test_zeros_beyond_the_target_are_kept(sparse):
    before = zeros(sparse)
    trained(sparse, final=0.25, steps=3)
    assert same_zeros(before, zeros(sparse))


def test_an_allocation_is_reached_matrix_by_matrix():
    rules = {"0": 0.0, r".*down_proj": 0.75}
    model = trained(tiny_model("llama"), final=0.5, initial=0.4, steps=4, allocation=rules)
    found = sparsities(model)
    assert {v for n, v in found.items() if ".layers.0." in n} == {0.0}
    assert {v for n, v in found.items() if n.endswith("down_proj") and ".0." not in n} == {0.75}
    assert {v for n, v in found.items() if ".layers.1.self_attn" in n} == {0.5}


def test_include_and_exclude():
    found = sparsities(trained(tiny_model("llama"), final=0.5, steps=2, include="mlp", exclude="layers.1"))
    assert {n for n, v in found.items() if v} == {n for n in found if "mlp" in n and "layers.1" not in n}


def test_wanda_scores_the_inputs_of_the_steps_since_the_last_mask():
    """Without training in between the masks must be those of Wanda on what the loop fed in."""
    model = tiny_model("llama").train()
    inputs = {}
    hooks = [
        m.module.register_forward_pre_hook(
            lambda _, args, n=n: inputs.setdefault(n, []).append(args[0].detach().clone())
        )
        for n, m in model_matrices(model).items()
    ]
    dense = {n: m.read().clone() for n, m in model_matrices(model).items()}
    for step in secateur.gradual(model, final=0.5, steps=3, every=2, method="wanda", schedule="linear"):
        model(input_ids=IDS[step : step + 1])
        if step == 0:
            with torch.no_grad():
                model.eval()(input_ids=IDS[3:])  # an evaluation, which does not count
            model.train()
    for hook in hooks:
        hook.remove()
    for name, matrix in model_matrices(model).items():
        seen = torch.cat([inputs[name][0].reshape(-1, matrix.shape[1]), inputs[name][2].reshape(-1, matrix.shape[1])])
        expected = parse_pattern("row").mask(wanda(dense[name], Statistics.of(seen)), 0.5)
        assert torch.equal(matrix.read() != 0, expected), name


def test_experts_that_no_token_reached_are_pruned_by_magnitude(messages):
    model = tiny_model("mixtral", num_local_experts=8).train()
    for _ in secateur.gradual(model, final=0.5, steps=2, method="wanda"):
        model(input_ids=torch.full((1, 4), 5))
    assert set(sparsities(model).values()) == {0.5}
    assert sum("saw no input in training; pruned by magnitude" in line for line in messages) == 1


def test_an_error_in_the_loop_leaves_no_hooks(sparse):
    def broken():
        for _ in secateur.gradual(sparse, final=0.75, steps=4, method="wanda"):
            raise KeyError("the user's own")

    with pytest.raises(KeyError):
        broken()
    assert not any(module._forward_pre_hooks for module in sparse.modules())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps 0: at least 1"),
        ({"steps": 5, "every": 0}, "every 0"),
        ({"steps": 5, "initial": 1.0}, "initial 1: is the fraction removed"),
        ({"steps": 5, "final": 50}, "for 50 percent write 0.5"),
        ({"steps": 5, "schedule": "cubik"}, "did you mean cubic"),
        ({"steps": 5, "method": "sparsegpt"}, "use magnitude, wanda or ria, or prune in rounds"),
        ({"steps": 5, "method": "wnada"}, "did you mean wanda"),
        ({"steps": 5, "pattern": "4:2"}, "0 < N < M"),
        ({"steps": 5, "allocation": {"layers.9": 0.5}}, "matches no block"),
        ({"steps": 5, "include": "nothing"}, "found in no matrix name"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_step(options, said):
    model = tiny_model("llama")
    with pytest.raises(secateur.OptionError, match=said):
        secateur.gradual(model, **options)
    assert Masks.of_matrices(model).zeros == 0
