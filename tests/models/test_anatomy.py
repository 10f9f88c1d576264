"""Blocks, matrices and the skeleton, on every tiny family, against the model's own forward."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.errors import ModelError
from secateur.models.anatomy import Skeleton, find_blocks
from secateur.models.matrices import matrices, unreadable
from secateur.models.replay import check_replay
from tiny import FAMILIES, rows, tiny_model

TUPLES = ("bloom", "falcon", "gptj", "mpt")  # families whose blocks return tuples in some versions of transformers
EXTRA = {
    "bloom": {"n_layer": 3, "n_head": 4},
    "falcon": {"multi_query": False},
    "gptj": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "mpt": {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64},
}
every_family = pytest.mark.parametrize("family", [*FAMILIES, *TUPLES])

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
LLAMA_SHAPES = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]


def make(family):
    return tiny_model(family, **EXTRA.get(family, {}))


def whole_forward(model, ids):
    """The model's own forward: the input of the first block, the output of every block, and the logits."""
    inputs, outputs = [], []
    _, blocks = find_blocks(model)

    def seen(module, args, kwargs, out):
        inputs.append(args[0] if args else kwargs["hidden_states"])
        outputs.append((out[0] if isinstance(out, tuple) else out).clone())

    hooks = [block.register_forward_hook(seen, with_kwargs=True) for block in blocks]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return inputs[0], outputs, logits


def all_resident(skeleton):
    @contextmanager
    def resident(index):
        with skeleton.in_place(index) as block:
            yield block

    return resident


@every_family
def test_replaying_the_blocks_is_the_models_own_forward(family):
    model, ids = make(family), rows(3, 30)
    first, outputs, logits = whole_forward(model, ids)
    skeleton = Skeleton(model)
    check_replay(skeleton, all_resident(skeleton), ids[:1])
    hidden, calls = skeleton.record(ids)
    assert torch.equal(hidden, first)
    assert len(calls) == len(outputs) == 3
    with torch.no_grad():
        for block, call, expected in zip(skeleton.real, calls, outputs, strict=True):
            hidden = call.run(block, hidden)
            assert torch.equal(hidden, expected)
    assert torch.equal(skeleton.logits(ids, hidden), logits)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_nothing_stays_in_the_model(family):
    model, ids = make(family), rows(2, 9)
    modules = {name: id(module) for name, module in model.named_modules()}
    own = {name: sorted(vars(module)) for name, module in model.named_modules()}
    skeleton = Skeleton(model)
    hidden, _ = skeleton.record(ids)
    skeleton.logits(ids, hidden)
    for error in (RuntimeError, KeyboardInterrupt):

        def fail(index, call, hidden, error=error):
            raise error

        with pytest.raises(error):
            skeleton.through(ids, fail)
    with pytest.raises(ZeroDivisionError), skeleton.in_place(1):
        1 / 0  # noqa: B018
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == own


def test_recording_computes_no_gradient():
    hidden, _ = Skeleton(make("llama")).record(rows(1, 5))
    assert not hidden.requires_grad


@every_family
def test_blocks_are_found(family):
    model = make(family)
    path, blocks = find_blocks(model)
    assert len(blocks) == 3 and model.get_submodule(path) is blocks
    skeleton = Skeleton(model)
    inside = {id(p) for p in blocks.parameters()}
    outside = {id(p) for module in skeleton.outside for p in module.parameters(recurse=False)}
    assert inside.isdisjoint(outside)
    assert inside | outside == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("count", [2, 7])
def test_no_list_of_blocks(count):
    model = make("llama")
    model.config.num_hidden_layers = count
    with pytest.raises(ModelError, match="decoder blocks") as caught:
        find_blocks(model)
    assert "\n" not in str(caught.value)


def test_two_lists_of_blocks():
    model = make("llama")
    model.others = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    with pytest.raises(ModelError, match=r"model\.layers, others"):
        find_blocks(model)


def test_a_list_inside_the_blocks_is_not_another():
    model = make("llama")
    for block in model.model.layers:
        block.parts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    assert find_blocks(model)[0] == "model.layers"


@pytest.mark.parametrize(
    ("family", "names", "shapes"),
    [
        ("llama", ATTENTION + MLP, LLAMA_SHAPES),
        ("mistral", ATTENTION + MLP, LLAMA_SHAPES),
        ("qwen2", ATTENTION + MLP, LLAMA_SHAPES),
        ("qwen3", ATTENTION + MLP, LLAMA_SHAPES),
        (
            "gpt2",
            ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
            [(96, 32), (32, 32), (128, 32), (32, 128)],
        ),
    ],
)
def test_matrices_are_named_and_seen_as_out_in(family, names, shapes):
    path, blocks = find_blocks(make(family))
    found = matrices(blocks[1], f"{path}.1")
    assert sorted(found) == sorted(f"{path}.1.{name}" for name in names)
    for name, shape in zip(names, shapes, strict=True):
        matrix = found[f"{path}.1.{name}"]
        assert matrix.shape == shape == tuple(matrix.read().shape)
        assert matrix.parameter == f"{path}.1.{name}.weight"
        x = torch.randn(5, shape[1])
        with torch.no_grad():
            torch.testing.assert_close(matrix.module(x) - matrix.module(x * 0), x @ matrix.read().T)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_written_is_read(family):
    path, blocks = find_blocks(make(family))
    for matrix in matrices(blocks[0], f"{path}.0").values():
        W = torch.randn(matrix.shape)
        parameter = matrix.weight
        matrix.write(W)
        assert torch.equal(matrix.read(), W) and matrix.weight is parameter


def test_routers_norms_embeddings_and_convolutions_are_no_matrices():
    block = nn.ModuleDict(
        {
            "gate": nn.Linear(4, 4),
            "router": nn.Linear(4, 4),
            "shared_expert_gate": nn.Linear(4, 1),
            "gate_proj": nn.Linear(4, 4),
            "norm": nn.LayerNorm(4),
            "table": nn.Embedding(4, 4),
            "conv": nn.Conv1d(4, 4, 3),
            "inner": nn.ModuleDict({"gate": nn.Linear(4, 4), "up": Conv1D(8, 4)}),
        }
    )
    assert list(matrices(block, "layers.0")) == ["layers.0.gate_proj", "layers.0.inner.up"]


def test_fused_weights_of_unknown_layout_are_no_matrices_but_have_a_name():
    block = nn.Module()
    block.conv = nn.Conv1d(4, 4, 3)
    block.mlp = nn.Module()
    block.mlp.mix = nn.Parameter(torch.zeros(1, 1, 4))
    block.mlp.experts = nn.Module()
    block.mlp.experts.down_proj = nn.Parameter(torch.zeros(2, 3, 4))
    assert matrices(block, "layers.0") == {}
    assert unreadable(block, "layers.0") == {"layers.0.mlp.experts.down_proj": 24}


def depends_on_the_block_before(model, shared):
    """Make every block add what the one before it left in `shared`, as gemma3n's blocks do."""
    for block in model.model.layers:
        inner = block.forward

        def forward(hidden_states, inner=inner, **kwargs):
            out = inner(hidden_states, **kwargs) + shared.get("last", 0)
            shared["last"] = out.mean()
            return out

        block.forward = forward


def counts_its_calls(model, shared):
    """Make one block's output depend on how often it has run."""
    inner = model.model.layers[1].forward

    def forward(hidden_states, **kwargs):
        shared["calls"] = shared.get("calls", 0) + 1
        return inner(hidden_states, **kwargs) * shared["calls"]

    model.model.layers[1].forward = forward


def reads_what_the_first_block_left(model, shared):
    """Make the last block use a tensor that the first computed for the same tokens."""
    first, last = model.model.layers[0].forward, model.model.layers[2].forward

    def leave(hidden_states, **kwargs):
        shared["left"] = first(hidden_states, **kwargs)
        return shared["left"]

    model.model.layers[0].forward = leave
    model.model.layers[2].forward = lambda hidden_states, **kwargs: last(hidden_states, **kwargs) + shared["left"]


@pytest.mark.parametrize("change", [depends_on_the_block_before, counts_its_calls, reads_what_the_first_block_left])
def test_blocks_that_share_state_are_refused(change):
    model = make("llama")
    change(model, {})
    skeleton = Skeleton(model)
    with pytest.raises(ModelError, match=r"model\.layers\.\d: .*share state") as caught:
        check_replay(skeleton, all_resident(skeleton), rows(1, 12))
    assert "\n" not in str(caught.value)
    assert list(model.model.layers) == skeleton.real


def test_a_call_keeps_one_copy_of_what_it_shares():
    skeleton = Skeleton(make("llama"))
    _, known = skeleton.record(rows(2, 9))
    _, calls = skeleton.record(rows(2, 9, seed=1))
    for mine, theirs in zip(calls, known, strict=True):
        shared = mine.shared_with(theirs)
        cos, sin = shared.kwargs["position_embeddings"]
        assert cos is theirs.kwargs["position_embeddings"][0] and sin is theirs.kwargs["position_embeddings"][1]
    _, longer = skeleton.record(rows(2, 10))
    cos, _ = longer[0].shared_with(known[0]).kwargs["position_embeddings"]
    assert cos.shape[1] == 10
