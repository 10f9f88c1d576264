"""The loop against plain PyTorch: forwards of the whole model with hooks, and the loop of Wanda's script in memory."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import secateur
from secateur.errors import ModelError, NumericsError
from secateur.models.anatomy import find_blocks
from secateur.pipeline.stream import micro_batches
from secateur.pruning import GRAM, METHODS, SUM, SUMSQ, Method, Statistics, parse_pattern
from tiny import FAMILIES, rows, tiny_model

every_family = pytest.mark.parametrize("family", FAMILIES)
MIXED = [torch.arange(3, 3 + n) for n in (5, 9, 9, 14, 5, 33)]


def linears(module):
    return {name: m for name, m in module.named_modules() if isinstance(m, (nn.Linear, Conv1D))}


def read(module):
    return module.weight.data.T if isinstance(module, Conv1D) else module.weight.data


def spy(needs=(SUM, SUMSQ, GRAM)):
    """A method that prunes nothing and keeps the statistics that it is given, in order."""
    heard = []

    def prune(W_OI, statistics, sparsity, pattern):
        if W_OI.shape != (8, 8):  # an example that options may be tried on before the model is opened
            heard.append(statistics)
        return W_OI, torch.ones_like(W_OI, dtype=torch.bool)

    return Method(prune, frozenset(needs)), heard


def inputs_of(model, batches):
    """What reaches each matrix in plain forwards of the whole model: matrix -> tokens [T, I], in order of blocks."""
    path, blocks = find_blocks(model)
    seen, hooks = {}, []
    for index, block in enumerate(blocks):
        for name, module in linears(block).items():
            x = seen.setdefault(f"{path}.{index}.{name}", [])
            hooks.append(module.register_forward_pre_hook(lambda m, i, x=x: x.append(i[0].reshape(-1, i[0].shape[-1]))))
    with torch.no_grad():
        for ids in batches:
            model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(x) for name, x in seen.items()}


@every_family
@pytest.mark.parametrize("given", [rows(5, 20), MIXED], ids=["equal", "mixed"])
def test_statistics_are_those_of_the_whole_model(family, given):
    model = tiny_model(family)
    method, heard = spy()
    expected = inputs_of(model, [row[None] for row in given])
    secateur.prune(model, method=method, calibration=given, propagate="dense")
    assert len(heard) == len(expected) == (12 if family == "gpt2" else 21)
    for statistics, x in zip(heard, expected.values(), strict=True):
        assert statistics.tokens == len(x) == sum(len(row) for row in given)
        x = x.double()
        close = {"rtol": 1e-4, "atol": 1e-4 * float(x.square().sum(0).max())}
        torch.testing.assert_close(statistics.sum_I, x.sum(0), **close)
        torch.testing.assert_close(statistics.sumsq_I, x.square().sum(0), **close)
        torch.testing.assert_close(statistics.gram_II.double(), x.T @ x, **close)


def test_matrices_with_one_input_share_its_sums():
    method, heard = spy()
    secateur.prune(tiny_model("llama"), method=method, calibration=rows())
    q, k, v, o, gate, up, down = (s.gram_II.data_ptr() for s in heard[:7])
    assert q == k == v and gate == up
    assert len({q, o, gate, down}) == 4


def test_only_what_a_method_needs_is_summed():
    for needs in ((SUM,), (SUMSQ,), (GRAM,), (SUM, GRAM)):
        method, heard = spy(needs)
        secateur.prune(tiny_model("llama"), method=method, calibration=rows())
        assert (heard[0].sum_I is not None) == (SUM in needs)
        assert (heard[0].gram_II is not None) == (GRAM in needs)
        assert (heard[0].sumsq_I is not None) == (SUMSQ in needs)


def plain_loop(model, ids, method, sparsity, pattern):
    """Prune as Wanda's and SparseGPT's scripts do, everything in memory; return the output error of each block."""
    _, blocks = find_blocks(model)
    calls = []
    hooks = [
        b.register_forward_pre_hook(lambda m, args, kw: calls.append((args, kw)), with_kwargs=True) for b in blocks
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    args, kwargs = calls[0]
    hidden = args[0] if args else kwargs["hidden_states"]
    errors = []
    for block, (args, kwargs) in zip(blocks, calls, strict=True):

        def forward(x, block=block, args=args, kwargs=kwargs):
            with torch.no_grad():
                out = block(x, *args[1:], **kwargs) if args else block(**{**kwargs, "hidden_states": x})
            return out[0] if isinstance(out, tuple) else out

        inputs, hooks = {}, []
        for name, module in linears(block).items():
            seen = inputs.setdefault(name, [])
            hooks.append(module.register_forward_pre_hook(lambda m, i, seen=seen: seen.append(i[0])))
        dense = forward(hidden)
        for hook in hooks:
            hook.remove()
        for name, module in linears(block).items():
            statistics = Statistics.of(inputs[name][0], method.needs) if method.needs else Statistics()
            W, _ = method(read(module), statistics, sparsity, pattern)
            module.weight.data = W.T.contiguous() if isinstance(module, Conv1D) else W
        pruned = forward(hidden)
        errors.append(float((dense - pruned).norm() / dense.norm()))
        hidden = pruned
    return errors


@every_family
@pytest.mark.parametrize(
    ("method", "pattern"),
    [
        ("magnitude", "matrix"),
        ("wanda", "row"),
        ("wanda", "2:4"),
        ("ria", "matrix"),
        ("sparsegpt", "matrix"),
        ("sparsegpt", "2:4"),
    ],
)
def test_the_loop_is_that_of_the_papers_scripts(family, method, pattern):
    ours, plain, ids = tiny_model(family), tiny_model(family), rows(6, 24)
    errors = plain_loop(plain, ids, METHODS[method], 0.5, parse_pattern(pattern))
    result = secateur.prune(ours, method=method, pattern=pattern, calibration=ids)
    for (name, mine), theirs in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(mine == 0, theirs == 0), name
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
    if method != "magnitude":
        assert [b["output_error"] for b in result.report["blocks"]] == pytest.approx(errors, rel=1e-3)


def test_dense_propagation_is_one_shot_for_every_block():
    """Every block is pruned by what the unpruned model feeds it; no output error is known then."""
    ours, plain, ids = tiny_model("llama"), tiny_model("llama"), rows(6, 24)
    inputs = inputs_of(plain, [ids])
    result = secateur.prune(ours, calibration=ids, propagate="dense", method="wanda")
    for name, x in inputs.items():
        module = plain.get_submodule(name)
        W, _ = METHODS["wanda"](module.weight.data, Statistics.of(x, {SUMSQ}), 0.5, parse_pattern("row"))
        assert torch.equal(ours.get_submodule(name).weight.data, W)
    assert [b["output_error"] for b in result.report["blocks"]] == [None, None, None]


def test_output_error_of_a_matrix():
    model, ids = tiny_model("llama"), rows(6, 24)
    former = {name: p.detach().clone() for name, p in model.named_parameters()}
    inputs = inputs_of(model, [ids])
    report = secateur.prune(model, calibration=ids, method="sparsegpt", propagate="dense").report
    for row in report["matrices"]:
        x, name = inputs[row["name"]], row["name"] + ".weight"
        dense, new = x @ former[name].T, x @ model.state_dict()[name].T
        assert row["output_error"] == pytest.approx(float((dense - new).norm() / dense.norm()), rel=1e-2)
    report = secateur.prune(tiny_model("llama"), calibration=ids, method="wanda").report
    assert {row["output_error"] for row in report["matrices"]} == {None}


def test_rows_of_different_lengths_are_not_mixed_up():
    """The order of rows of different lengths changes no statistic of the first block's matrices."""
    found = []
    for order in (MIXED, MIXED[::-1], sorted(MIXED, key=len)):
        method, heard = spy({SUMSQ})
        secateur.prune(tiny_model("mistral"), method=method, calibration=list(order), propagate="dense")
        found.append(heard)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert a.tokens == b.tokens
            torch.testing.assert_close(a.sumsq_I, b.sumsq_I, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("lengths", [[5], [5, 5, 5], [5, 9, 9, 5], [4096] * 3, [5000, 5000], [2000] * 5])
def test_micro_batches_keep_rows_and_order(lengths):
    given = [torch.full((length,), number) for number, length in enumerate(lengths)]
    batches = list(micro_batches(given))
    again = [row for batch in batches for row in batch]
    assert len(again) == len(given)
    assert all(torch.equal(a, b) for a, b in zip(again, given, strict=True))
    assert all(batch.numel() <= 4096 or len(batch) == 1 for batch in batches)


def test_many_micro_batches_are_as_good_as_one(monkeypatch):
    found = []
    for tokens in (4096, 24, 1):
        monkeypatch.setattr("secateur.pipeline.stream.MICRO_BATCH_TOKENS", tokens)
        model = tiny_model("llama")
        secateur.prune(model, calibration=rows(6, 24), method="sparsegpt")
        found.append(model.state_dict())
    for name, weight in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(weight, other[name], rtol=1e-3, atol=1e-4)


def test_a_matrix_that_no_token_reaches_is_named():
    model = tiny_model("llama")
    model.model.layers[1].mlp.spare = nn.Linear(64, 64)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.spare"):
        secateur.prune(model, calibration=rows())
    secateur.prune(model, calibration=rows(), exclude="spare")
    secateur.prune(model, method="magnitude")


def test_sparsity_zero_leaves_a_matrix_alone():
    model, former = tiny_model("llama"), tiny_model("llama").state_dict()
    report = secateur.prune(model, calibration=rows(), allocation={".*up_proj": 0, "1": 0.25}).report
    for name, weight in model.state_dict().items():
        dense = "proj" not in name or "up_proj" in name
        assert torch.equal(weight, former[name]) == dense
    assert report["dense_matrices"] == [f"model.layers.{i}.mlp.up_proj" for i in range(3)]
    assert {row["target"] for row in report["matrices"] if row["block"] == 1} == {0.25}


def test_what_does_not_fit_the_dtype_is_named():
    def explode(W_OI, statistics, sparsity, pattern):
        return W_OI * 1e30, torch.ones_like(W_OI, dtype=torch.bool)

    with pytest.raises(NumericsError, match=r"model\.layers\.0\.self_attn\.q_proj: .*float16"):
        secateur.prune(tiny_model("llama", "float16"), method=Method(explode))
