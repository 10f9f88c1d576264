"""A packed checkpoint in transformers: it opens, computes what the dense one computes, and never becomes dense."""

import copy
import io
import json
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import secateur
from secateur.models.checkpoint import Checkpoint
from secateur.models.formats import pack
from secateur.runtime import linear
from secateur.runtime.linear import PackedLinear
from sparse_models import MIXTURES, made_once, sparse_model, thin
from tiny import DTYPES, laid_out, rows, same_bytes, tensors_of

FAMILIES = {"llama": "bfloat16", "llama-tied": "float32", "gpt2": "float32", "qwen2": "float16"}
FAMILIES |= dict.fromkeys(MIXTURES, "float32")
PACKED = {"llama": 21, "llama-tied": 21, "gpt2": 12, "qwen2": 21, "mixtral": 12, "qwen3_moe": 12}
IDS = rows(2, 12)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """``directories(family, format, values)``: a pruned model, dense and packed; to be read only."""
    return made_once(tmp_path_factory, FAMILIES.__getitem__)


def opened(directory, **options):
    return laid_out(AutoModelForCausalLM.from_pretrained(directory, **{"dtype": "auto", **options}).eval())


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def alike(found, expected, dtype):
    """Whether they differ by no more than other orders of summation make of a dtype's roundings, in three blocks."""
    tight = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 5e-2}[dtype]
    return torch.allclose(found.float(), expected.float(), rtol=tight, atol=tight)


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def as_it_was(model, directory):
    """The dense model with exactly the weights that the packed checkpoint has, in float32 where they are rounded."""
    checkpoint = Checkpoint.open(directory)
    for name in checkpoint.packed:
        module = model.get_submodule(name.removesuffix(".weight"))
        module.weight.data = checkpoint.read(name).float()
    return model


# Opening.

SCRIPT = """
import sys
{first}
from transformers import AutoModelForCausalLM
import torch
torch.set_num_threads(1)
{then}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
torch.save(model(torch.load(sys.argv[2])).logits.detach(), sys.argv[3])
"""
QUIET = "import secateur; assert not {'torch', 'transformers'} & set(sys.modules)"
REFUSED = """
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
except Exception as error:
    print(type(error).__name__, error)
else:
    sys.exit("opened without secateur")
import secateur
"""
ORDERS = {
    "secateur first": {"first": QUIET, "then": ""},
    "transformers first": {"first": "", "then": "import secateur"},
    "transformers first, and tried without": {"first": "", "then": REFUSED},
}


@pytest.mark.parametrize("order", ORDERS)
def test_it_opens_in_a_fresh_process(order, directories, tmp_path):
    dense, packed = directories()
    torch.save(IDS, tmp_path / "ids")
    command = [sys.executable, "-c", SCRIPT.format(**ORDERS[order]), packed, tmp_path / "ids", tmp_path / "logits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert alike(torch.load(tmp_path / "logits"), logits(opened(dense)), "bfloat16")


def test_registering_leaves_nothing_behind():
    """The finder goes once it has found; registering again is harmless."""
    from secateur.runtime.register import _Finder, register

    register()
    assert not any(isinstance(finder, _Finder) for finder in sys.meta_path)


# What it computes.

CASES = [
    (family, format, values)
    for family in FAMILIES
    for format, values in (("bitmask", None), ("nm", None), ("bitmask", "int8"), ("nm", "int8"))
    if format == "bitmask" or family in ("llama", "gpt2", "qwen2", "mixtral")
]


@pytest.mark.parametrize(("family", "format", "values"), CASES)
def test_it_computes_what_the_dense_model_computes(family, format, values, directories):
    dense, packed = directories(family, format, values)
    model = opened(packed)
    assert len(layers(model)) == PACKED[family]
    exact = as_it_was(opened(dense, dtype=torch.float32), packed)
    in_float32 = opened(packed, dtype=torch.float32)
    assert torch.allclose(logits(in_float32), logits(exact), rtol=1e-5, atol=1e-5)
    if values is None:
        assert alike(logits(model), logits(opened(dense)), FAMILIES[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_head_too(family, directories):
    dense, packed = directories(family, dtype="float32")
    with torch.no_grad():
        found, expected = (AutoModel.from_pretrained(d, dtype="auto")(IDS).last_hidden_state for d in (packed, dense))
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("values", [None, "int8"])
def test_nothing_dense_is_kept(family, values, directories):
    dense, packed = directories(family, "bitmask", values)
    model, checkpoint = opened(packed), Checkpoint.open(packed)
    names = {name.removesuffix(".weight").removeprefix("transformer.") for name in checkpoint.packed}
    assert {name.removeprefix("transformer.") for name in layers(model)} == names
    tensors = {id(t): t for t in (*model.parameters(), *model.state_dict(keep_vars=True).values())}
    held = sum(t.numel() * t.element_size() for t in tensors.values())
    assert held == checkpoint.bytes < Checkpoint.open(dense).bytes
    for layer in layers(model).values():
        assert not isinstance(layer, nn.Linear) and set(layer.state_dict()) >= {"weight", "weight_mask"}
        layer(torch.ones(1, layer.in_features))
        assert sum(t.numel() for t in vars(layer).values() if torch.is_tensor(t)) <= layer.out_features  # offsets


@pytest.mark.parametrize("values", [None, "int8"])
def test_a_matrix_of_nothing_but_zeros(values, tmp_path):
    model = sparse_model("llama", "bfloat16", "bitmask")
    model.model.layers[1].mlp.up_proj.weight.data.zero_()
    model.save_pretrained(tmp_path / "dense")
    secateur.pack(tmp_path / "dense", tmp_path / "packed", values=values)
    found = opened(tmp_path / "packed")
    assert found.model.layers[1].mlp.up_proj.packing.count == 0
    expected = as_it_was(opened(tmp_path / "dense", dtype=torch.float32), tmp_path / "packed")
    in_float32 = opened(tmp_path / "packed", dtype=torch.float32)
    assert torch.allclose(logits(in_float32), logits(expected), rtol=1e-5, atol=1e-5)


def test_it_writes_what_the_dense_model_writes(directories):
    dense, packed = (opened(d) for d in directories("llama", dtype="float32"))
    padded = IDS.clone()
    padded[0, :5] = 0
    for options in ({}, {"num_beams": 3}, {"attention_mask": (padded != 0).long()}):
        ids = padded if "attention_mask" in options else IDS
        settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids), **options}
        assert torch.equal(packed.generate(ids, **settings), dense.generate(ids, **settings))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes(mode, directories):
    dense, packed = (opened(d) for d in directories())
    with mode():
        found, expected = packed(IDS).logits, dense(IDS).logits
        assert alike(found, expected, "bfloat16")
    assert torch.equal(logits(packed), found)  # nothing from that mode was kept that another cannot use


def test_gradients_flow_through_to_inputs_and_not_to_weights(directories):
    dense, packed = (opened(d) for d in directories("qwen2", dtype="float32"))
    found = []
    for model in (packed, dense):
        inputs = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=inputs).logits.square().sum().backward()
        found.append(inputs.grad)
    assert torch.allclose(*found, rtol=1e-4, atol=1e-5)
    for layer in layers(packed).values():
        assert not any(part.requires_grad for part in layer.parts.values())


# Moving, casting, copying.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("values", [None, "int8"])
def test_the_dtype_asked_for_is_what_it_computes_in(dtype, values, directories):
    dense, packed = directories("llama", "bitmask", values)
    model = opened(packed, dtype=DTYPES[dtype])
    assert model.dtype == DTYPES[dtype] == logits(model).dtype
    scales = {name: t for name, t in model.state_dict().items() if name.endswith("_scale")}
    on_disk = tensors_of(packed)
    assert len(scales) == (21 if values else 0)
    assert same_bytes(scales, {name: on_disk[name] for name in scales})


def test_the_device_asked_for(directories):
    dense, packed = directories()
    for device in ("cpu", {"": "cpu"}):
        assert alike(logits(opened(packed, device_map=device)), logits(opened(dense)), "bfloat16")


@pytest.mark.parametrize("values", [None, "int8"])
def test_a_cast_is_that_of_the_dense_model(values, directories):
    dense, packed = directories("llama", "bitmask", values)
    model, expected = opened(packed), as_it_was(opened(dense, dtype=torch.float32), packed)
    for dtype in (torch.float32, torch.float64, torch.float32):
        model, expected = model.to(dtype), expected.to(dtype)
        assert logits(model).dtype == dtype
        assert torch.allclose(logits(model), logits(expected), rtol=1e-5, atol=1e-5)
    on_disk = tensors_of(packed)
    for name, tensor in model.to(torch.bfloat16).state_dict().items():
        if name.endswith("_scale"):
            assert tensor.dtype == torch.float32 and torch.equal(tensor, on_disk[name])


@pytest.mark.parametrize("cast", ["half", "float"])
def test_half_and_float_are_refused_by_transformers(cast, directories):
    model = opened(directories()[1])
    with pytest.raises(ValueError, match="not supported for quantized"):
        getattr(model, cast)()


@pytest.mark.parametrize("values", [None, "int8"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_compute_the_same(how, values, directories):
    model = opened(directories("llama", "bitmask", values)[1])
    expected = logits(model)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    for layer in layers(model).values():
        layer.weight.zero_()
    assert torch.equal(logits(other), expected)


def test_a_state_goes_from_one_model_to_another(directories):
    packed = directories()[1]
    model, other = opened(packed), opened(packed)
    assert set(model.state_dict()) == set(tensors_of(packed))
    for layer in layers(other).values():
        layer.weight.zero_()
    assert not torch.equal(logits(other), logits(model))
    assert str(other.load_state_dict(model.state_dict())) == "<All keys matched successfully>"
    assert torch.equal(logits(other), logits(model))


# Saving.


@pytest.mark.parametrize(("family", "format", "values"), CASES)
def test_what_is_saved_is_what_was_opened(family, format, values, directories, tmp_path):
    _, packed = directories(family, format, values)
    model = opened(packed)
    model.save_pretrained(tmp_path / "again")
    assert same_bytes(tensors_of(tmp_path / "again"), tensors_of(packed))
    former, now = (json.loads((d / "config.json").read_text()) for d in (packed, tmp_path / "again"))
    assert now["quantization_config"] == former["quantization_config"]
    assert torch.equal(logits(opened(tmp_path / "again")), logits(model))
    secateur.unpack(tmp_path / "again", tmp_path / "dense")
    secateur.unpack(packed, tmp_path / "expected")
    assert same_bytes(tensors_of(tmp_path / "dense"), tensors_of(tmp_path / "expected"))


@pytest.mark.parametrize("values", [None, "int8"])
def test_what_was_cast_is_saved_as_it_is_now(values, directories, tmp_path):
    _, packed = directories("llama", "bitmask", values)
    model = opened(packed).to(torch.float32)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(opened(tmp_path / "again")), logits(model))
    for info in Checkpoint.open(tmp_path / "again").packed.values():
        assert info.packing.values == (values or "float32")
        assert values or info.packing.dtype == "float32"


def test_shards(directories, tmp_path):
    _, packed = directories()
    opened(packed).save_pretrained(tmp_path / "again", max_shard_size="12KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 3
    assert torch.equal(logits(opened(tmp_path / "again")), logits(opened(packed)))
    assert Checkpoint.open(tmp_path / "again").packed.keys() == Checkpoint.open(packed).packed.keys()


# One layer.


def layer(W_OI, format="bitmask", values=None, bias=None):
    packing, parts = pack("w", W_OI, format, values)
    found = PackedLinear(packing, bias)
    for suffix, part in parts.items():
        getattr(found, f"weight{suffix}").copy_(part)
    return found


def half_zero(rows_, columns, seed=0):
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(rows_, columns, generator=g)
    W.view(-1)[torch.randperm(W.numel(), generator=g)[: W.numel() // 2]] = 0
    return W


@pytest.mark.parametrize("shape", [(24,), (0, 24), (1, 24), (7, 24), (2, 3, 24), (2, 0, 24), (1, 2, 3, 4, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_inputs_of_any_shape_and_dtype(shape, dtype):
    W, bias = half_zero(13, 24), torch.randn(13, generator=torch.Generator().manual_seed(2))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    found = layer(W, bias=bias)(x)
    assert found.dtype == dtype and found.shape == (*shape[:-1], 13)
    assert torch.allclose(found, nn.functional.linear(x.float(), W, bias).to(dtype), rtol=1e-5, atol=1e-5)


def test_inputs_that_do_not_lie_in_order():
    W = half_zero(13, 24)
    x = torch.randn(24, 5)
    assert torch.allclose(layer(W)(x.T), x.T @ W.T, rtol=1e-5, atol=1e-5)


def test_inputs_of_another_width_are_refused():
    for width in (12, 23, 25, 48):
        with pytest.raises(RuntimeError):
            layer(half_zero(13, 24))(torch.ones(4, width))


@pytest.mark.parametrize("rows_at_once", [4, 8, 12, 100])
@pytest.mark.parametrize("values", [None, "int8"])
@pytest.mark.parametrize("format", ["bitmask", "nm"])
def test_a_few_rows_at_a_time_give_the_same(rows_at_once, values, format, monkeypatch):
    W = torch.randn(30, 24, generator=torch.Generator().manual_seed(0))
    thin(W, format, 1)
    monkeypatch.setattr(linear, "TILE_BYTES", 4 * 24 * rows_at_once)
    packed = layer(W, format, values)
    whole = packed.rows(0, 30)
    assert values or torch.equal(whole, W)
    x = torch.randn(5, 24)
    assert torch.allclose(packed(x), x @ whole.T, rtol=1e-5, atol=1e-5)


def test_a_state_with_another_mask_is_taken_whole(monkeypatch):
    monkeypatch.setattr(linear, "TILE_BYTES", 4 * 24 * 4)
    packed, other = layer(half_zero(32, 24, seed=1)), layer(half_zero(32, 24, seed=2))
    x = torch.randn(3, 24)
    packed(x)
    packed.load_state_dict(other.state_dict())
    assert torch.equal(packed(x), other(x))


def test_it_says_what_it_is():
    text = repr(layer(half_zero(13, 24), values="int8"))
    assert all(word in text for word in ("24", "13", "bitmask", "int8"))


# What it is not for.


def test_a_packed_model_is_not_pruned_in_memory(directories):
    _, packed = directories()
    for model in (opened(packed), str(packed)):
        with pytest.raises(secateur.ModelError, match="packed"):
            secateur.prune(model, method="magnitude")
