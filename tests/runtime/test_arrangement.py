"""Packed or dense: what is exchanged, what stays what it was, and layers whose weights change under the kernels."""

import copy
import json
import pickle
import subprocess
import sys
import threading
import weakref
from contextlib import ExitStack, suppress

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import secateur
from secateur.models.formats import pack, unpack
from secateur.runtime import arrangement, kernels
from secateur.runtime.kernels import KernelMatrix
from secateur.runtime.linear import KernelLinear, PackedLinear, UnpackedLinear
from sparse_models import made_once
from tiny import DTYPES, TEXT, as_read, laid_out, rows, same_bytes, tensors_of

needs_kernels = pytest.mark.skipif(kernels.library() is None, reason="the kernels were not compiled")

PACKED = {"llama": 21, "llama-tied": 21, "gpt2": 12, "mixtral": 12}
FEW, MANY = rows(2, 3), rows(2, 12)  # rows of inputs for the kernels, and too many for them
CLOSE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 5e-2}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """``directories(family, format, values, dtype)``: a pruned model, dense and packed; to be read only."""
    return made_once(tmp_path_factory, lambda family: "float32")


@pytest.fixture
def faster(monkeypatch):
    """``faster(kernel, dense=False)``: say whether our kernels are, of a packed matrix, and of a dense one."""

    def decide(packed, *, dense=False):
        def measured(kernel, packing, dtype):
            ours = dense if packing is None else packed(packing) if callable(packed) else packed
            return {"rows": kernel.rows, "columns": kernel.columns, "kernel": 1.0 if ours else 2.0, "torch": 1.5}

        monkeypatch.setattr(arrangement, "measured", measured)

    decide(True)
    return decide


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "library", lambda: None)


def opened(directory, **options):
    return laid_out(AutoModelForCausalLM.from_pretrained(directory, **{"dtype": "auto", **options}).eval())


def logits(model, ids=MANY):
    with torch.no_grad():
        return model(ids).logits


def of_class(model, kind):
    return {name for name, module in model.named_modules() if type(module) is kind}


def narrow(packing):
    return packing.shape[0] <= 16


# What is exchanged.


@needs_kernels
@pytest.mark.parametrize("family", PACKED)
@pytest.mark.parametrize("format", ["bitmask", "nm"])
def test_speed_unpacks_exactly_what_is_slower_packed(family, format, directories, faster):
    dense, packed = directories(family, format)
    model = opened(packed)
    names = of_class(model, PackedLinear)
    slow = {name for name in names if not narrow(model.get_submodule(name).packing)}
    faster(narrow)
    found = secateur.optimize(model, prefer="speed")
    assert of_class(model, UnpackedLinear) == slow and of_class(model, PackedLinear) == names - slow
    assert (found["packed"], found["unpacked"]) == (len(names - slow), len(slow)) and found["activations8"] == 0
    assert len(names) == PACKED[family] and slow
    for name in slow:
        module = model.get_submodule(name)
        expected = opened(dense).get_submodule(name).weight
        assert torch.equal(module.weight, expected.T if family == "gpt2" else expected)
        assert not module.weight.requires_grad and not module.training


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_logits_stay_what_they_were(family, dtype, directories, faster):
    model = opened(directories(family, dtype=dtype)[1])
    former = [logits(model, ids) for ids in (FEW, MANY)]
    faster(narrow)
    secateur.optimize(model, prefer="speed")
    for ids, expected in zip((FEW, MANY), former, strict=True):
        found = logits(model, ids)
        assert found.dtype == DTYPES[dtype]
        assert torch.allclose(found.float(), expected.float(), rtol=CLOSE[dtype], atol=CLOSE[dtype])
    secateur.optimize(model, prefer="memory")
    assert all(torch.equal(logits(model, ids), was) for ids, was in zip((FEW, MANY), former, strict=True))


@needs_kernels
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_wholly_unpacked_it_is_the_dense_model_bit_for_bit(family, directories, faster):
    dense, packed = directories(family)
    model = opened(packed)
    faster(False)
    secateur.optimize(model, prefer="speed")
    assert not of_class(model, PackedLinear) and not of_class(model, KernelLinear)
    expected = as_read(opened(dense))
    assert all(torch.equal(logits(as_read(model), ids), logits(expected, ids)) for ids in (FEW, MANY))


@needs_kernels
@pytest.mark.parametrize("format", ["bitmask", "nm"])
def test_memory_brings_back_what_was_packed(format, directories, faster):
    model, untouched = (opened(directories("llama", format)[1]) for _ in range(2))
    faster(False)
    secateur.optimize(model, prefer="speed")
    assert secateur.optimize(model, prefer="memory")["unpacked"] == 0
    assert of_class(model, PackedLinear) == of_class(untouched, PackedLinear)
    assert same_bytes(model.state_dict(), untouched.state_dict())
    for name in of_class(model, PackedLinear):
        assert model.get_submodule(name).packing == untouched.get_submodule(name).packing


@needs_kernels
def test_what_is_faster_packed_stays_the_same_layer(directories, faster):
    model = opened(directories()[1])
    before = [model.get_submodule(name) for name in sorted(of_class(model, PackedLinear))]
    secateur.optimize(model, prefer="speed")
    assert before == [model.get_submodule(name) for name in sorted(of_class(model, PackedLinear))]


def test_training_mode_is_kept_when_layers_are_exchanged(directories, faster):
    model = opened(directories()[1]).train()
    faster(False)
    for prefer in ("speed", "memory"):
        secateur.optimize(model, prefer=prefer)
        assert all(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_opened_in_another_dtype_is_unpacked_into_it_or_not_at_all(dtype, directories, faster, tmp_path):
    faster(False)
    packed = directories("llama")[1]
    model = opened(packed, dtype=dtype)
    expected = logits(model)
    found = secateur.optimize(model, prefer="speed")
    assert (found["unpacked"] > 0) == (dtype == torch.float32)  # in float16 the weights would be rounded
    assert logits(model).dtype == dtype
    assert torch.allclose(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    again = opened(tmp_path / "again", dtype=dtype)
    secateur.optimize(model, prefer="memory")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("format", ["bitmask", "nm"])
def test_8_bit_values_are_never_unpacked(format, directories, faster):
    model = opened(directories("llama", format, "int8")[1])
    faster(False)
    assert secateur.optimize(model, prefer="speed")["unpacked"] == 0
    assert len(of_class(model, PackedLinear)) == PACKED["llama"]


@needs_kernels
def test_a_matrix_that_holds_nan_and_negative_zeros_is_unpacked_bit_for_bit(faster):
    for dtype, nan in ((torch.bfloat16, 0x7F81), (torch.float16, 0x7D01)):
        W = half_zero(32, 32).to(dtype)
        W.view(torch.int16)[0, :3] = torch.tensor([nan, -0x8000, 1])
        model = nn.Sequential(layer(W))
        faster(False)
        secateur.optimize(model, prefer="speed")
        assert torch.equal(model[0].weight.view(torch.int16), W.view(torch.int16))


def test_one_layer_cannot_be_exchanged_in_itself(faster):
    """It is refused, or left alone; never given a child that has no name."""
    alone = layer(half_zero(32, 32))
    faster(False)
    with suppress(secateur.SecateurError):
        secateur.optimize(alone, prefer="speed")
    assert dict(alone.named_children()) == {}


@needs_kernels
def test_a_layer_in_two_places_stays_one_layer(faster):
    shared = layer(half_zero(32, 32))
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    faster(False)
    secateur.optimize(model, prefer="speed")
    assert model["a"] is model["b"][0]
    secateur.optimize(model, prefer="memory")
    assert model["a"] is model["b"][0]


@needs_kernels
def test_a_second_measurement_of_the_same_kind_is_not_made(monkeypatch):
    made = []
    monkeypatch.setattr(arrangement, "_measured", {})
    monkeypatch.setattr(arrangement, "_in_turn", lambda *functions: made.append(functions) or [1.0, 2.0])
    for seed in range(3):
        packed = layer(half_zero(32, 32, seed=seed))
        assert arrangement.packed_is_faster(packed.packing, packed.kernel())
    other = layer(half_zero(32, 16))
    assert arrangement.packed_is_faster(other.packing, other.kernel())
    assert len(made) == 2


@needs_kernels
def test_a_default_device_elsewhere_does_not_move_what_kernels_compute_on(monkeypatch):
    """No kernel is called here: what it would be given is on the CPU, or it would write to no memory of ours."""
    given = []

    class Library:
        def __getattr__(self, name):
            return lambda *arguments: given.append(arguments) or 0

    W = half_zero(8, 64)
    packing, parts = pack("w", W, "bitmask")
    x = torch.ones(1, 64)
    monkeypatch.setattr(kernels, "library", Library)
    with torch.device("meta"):
        matrix = KernelMatrix("bitmask", (8, 64), parts, packing)
        assert matrix.linear(x).is_cpu and matrix.unpack(0, 8).is_cpu
    assert matrix._matrix.offsets


# Saving.

SAVED = [(family, format) for family in PACKED for format in ("bitmask", "nm")]


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "format"), SAVED)
def test_what_is_saved_of_a_partly_unpacked_model_is_what_was_opened(
    family, format, dtype, directories, faster, tmp_path
):
    _, packed = directories(family, format, dtype=dtype)
    model = opened(packed)
    faster(narrow)
    assert secateur.optimize(model, prefer="speed")["unpacked"]
    model.save_pretrained(tmp_path / "again")
    assert same_bytes(tensors_of(tmp_path / "again"), tensors_of(packed))
    former, now = (json.loads((d / "config.json").read_text()) for d in (packed, tmp_path / "again"))
    assert now["quantization_config"] == former["quantization_config"]
    assert secateur.optimize(model, prefer="speed")["unpacked"]  # saving changed nothing in memory


@needs_kernels
def test_shards_of_a_partly_unpacked_model(directories, faster, tmp_path):
    _, packed = directories("llama-tied")
    model = opened(packed)
    faster(narrow)
    secateur.optimize(model, prefer="speed")
    model.save_pretrained(tmp_path / "again", max_shard_size="12KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 3
    assert same_bytes(tensors_of(tmp_path / "again"), tensors_of(packed))
    assert torch.equal(logits(opened(tmp_path / "again")), logits(opened(packed)))


@needs_kernels
def test_unpacking_what_was_saved_gives_the_dense_model(directories, faster, tmp_path):
    dense, packed = directories("gpt2", "nm")
    model = opened(packed)
    faster(False)
    secateur.optimize(model, prefer="speed")
    model.save_pretrained(tmp_path / "again")
    secateur.unpack(tmp_path / "again", tmp_path / "unpacked")
    secateur.unpack(packed, tmp_path / "expected")
    assert same_bytes(tensors_of(tmp_path / "unpacked"), tensors_of(tmp_path / "expected"))


@needs_kernels
@pytest.mark.parametrize(("family", "zeros"), [("llama", 0.0), ("llama", 0.3), ("gpt2", 0.0), ("gpt2", 0.3)])
def test_weights_that_changed_since_are_saved_as_they_are_now(family, zeros, directories, faster, tmp_path):
    """With no zeros left they do not pack; with other zeros they have no N:M pattern."""
    model = opened(directories(family, "nm")[1])
    faster(False)
    secateur.optimize(model, prefer="speed")
    g = torch.Generator().manual_seed(4)
    name = {"llama": "model.layers.1.self_attn.o_proj", "gpt2": "transformer.h.1.attn.c_proj"}[family]
    weight = model.get_submodule(name).weight
    weight.copy_(torch.randn(weight.shape, generator=g) * (torch.rand(weight.shape, generator=g) >= zeros))
    model.save_pretrained(tmp_path / "again")
    found = opened(tmp_path / "again")
    assert torch.allclose(logits(found), logits(model), rtol=1e-5, atol=1e-5)
    assert secateur.optimize(model, prefer="memory")["unpacked"] == (0 if zeros else 1)
    assert torch.allclose(logits(found), logits(model), rtol=1e-5, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("unpacked", [False, True])
def test_what_was_cast_to_float64_is_refused_or_can_be_opened_again(unpacked, directories, faster, tmp_path):
    """The format holds no float64."""
    model = opened(directories()[1])
    faster(not unpacked)
    secateur.optimize(model, prefer="speed")
    with suppress(secateur.SecateurError):
        model.to(torch.float64).save_pretrained(tmp_path / "again")
    if unpacked or (tmp_path / "again" / "model.safetensors").exists():
        assert torch.allclose(logits(opened(tmp_path / "again")), logits(model), rtol=1e-5, atol=1e-5)


@needs_kernels
def test_a_cast_of_a_partly_unpacked_model_is_saved_and_opened(directories, faster, tmp_path):
    model = opened(directories()[1])
    faster(narrow)
    secateur.optimize(model, prefer="speed")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "again")
    found = opened(tmp_path / "again")
    assert found.dtype == torch.bfloat16
    secateur.optimize(model, prefer="memory")
    assert same_bytes(found.state_dict(), model.state_dict())


@needs_kernels
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_a_partly_unpacked_model_saves_the_same(how, directories, faster, tmp_path):
    _, packed = directories()
    model = opened(packed)
    faster(narrow, dense=True)
    secateur.optimize(model, prefer="speed")
    expected = logits(model, FEW)
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(other, FEW), expected)
    other.save_pretrained(tmp_path / "again")
    assert same_bytes(tensors_of(tmp_path / "again"), tensors_of(packed))


# How it is asked for.


def test_the_environment_says_what_loading_prefers(directories, faster, monkeypatch):
    _, packed = directories()
    faster(False)
    assert not of_class(opened(packed), UnpackedLinear)  # the tests prefer memory
    for value in ("speed", ""):
        monkeypatch.setenv("SECATEUR_PREFER", value)
        model = opened(packed)
        assert len(of_class(model, UnpackedLinear)) == PACKED["llama"]
    assert secateur.optimize(model, prefer="memory")["unpacked"] == 0
    monkeypatch.delenv("SECATEUR_PREFER")
    assert secateur.optimize(model)["packed"] == 0


def test_an_argument_goes_before_the_environment(directories, faster, monkeypatch):
    monkeypatch.setenv("SECATEUR_PREFER", "memory")
    model = opened(directories()[1])
    faster(False)
    assert secateur.optimize(model)["unpacked"] == 0
    assert secateur.optimize(model, prefer="speed")["packed"] == 0


def test_a_wrong_word_in_the_environment_is_one_line_that_names_the_variable(directories, monkeypatch):
    monkeypatch.setenv("SECATEUR_PREFER", "size")
    with pytest.raises(secateur.OptionError) as caught:
        opened(directories()[1])
    text = str(caught.value)
    assert all(word in text for word in ("SECATEUR_PREFER", "size", "speed", "memory")) and "\n" not in text


@pytest.mark.parametrize("options", [{"prefer": "size"}, {"activations": "int4"}, {"activations": ""}])
def test_an_option_that_does_not_exist_is_refused_and_nothing_is_changed(options, directories, faster):
    model = opened(directories()[1])
    faster(False)
    with pytest.raises(secateur.OptionError, match=next(iter(options))):
        secateur.optimize(model, **{"prefer": "speed", **options})
    assert not of_class(model, UnpackedLinear)


# 8-bit activations.


def activations_of(model):
    return {m.activations for m in model.modules() if isinstance(m, PackedLinear)}


@needs_kernels
def test_8_bit_activations_are_for_8_bit_values_in_a_pattern_and_off_again_bit_for_bit(directories):
    model = opened(directories("llama", "nm", "int8")[1])
    assert activations_of(model) == {None}  # never on by default
    former = [logits(model, ids) for ids in (FEW, MANY)]
    assert secateur.optimize(model, activations="int8")["activations8"] == PACKED["llama"]
    assert activations_of(model) == {"int8"}
    rounded = logits(model, FEW)
    assert not torch.equal(rounded, former[0])
    assert torch.allclose(rounded, former[0], atol=0.2 * float(former[0].std()))
    assert torch.equal(logits(model), former[1])  # too many rows to be rounded
    assert secateur.optimize(model)["activations8"] == 0
    assert all(torch.equal(logits(model, ids), was) for ids, was in zip((FEW, MANY), former, strict=True))


@needs_kernels
def test_8_bit_activations_round_nothing_where_gradients_are_wanted(directories):
    model = opened(directories("llama", "nm", "int8")[1])
    ids = model.get_input_embeddings()(FEW).detach().requires_grad_()
    former = model(inputs_embeds=ids).logits
    secateur.optimize(model, activations="int8")
    assert torch.equal(model(inputs_embeds=ids).logits, former)


@pytest.mark.parametrize(("format", "values"), [("bitmask", "int8"), ("bitmask", None), ("nm", None)])
def test_8_bit_activations_are_refused_where_no_matrix_can(format, values, directories):
    model = opened(directories("llama", format, values)[1])
    with pytest.raises(secateur.OptionError, match="activations int8"):
        secateur.optimize(model, activations="int8")
    assert activations_of(model) == {None}


def test_8_bit_activations_are_refused_of_a_dense_model_and_without_kernels(directories, no_kernels):
    dense, packed = directories("llama", "nm", "int8")
    for directory in (dense, packed):
        with pytest.raises(secateur.OptionError, match="activations int8"):
            secateur.optimize(opened(directory), activations="int8")


@needs_kernels
def test_8_bit_activations_go_with_a_copy_and_are_not_saved(directories, tmp_path):
    model = opened(directories("llama", "nm", "int8")[1])
    secateur.optimize(model, activations="int8")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, FEW), logits(model, FEW))
    model.save_pretrained(tmp_path / "again")
    assert activations_of(opened(tmp_path / "again")) == {None}


# A dense layer on our kernel.


def dense_layer(rows_=24, columns=40, dtype="float32", bias=True, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        found = nn.Linear(columns, rows_, bias=bias).to(DTYPES[dtype])
    found.__class__ = KernelLinear
    return found


def inputs(*shape, dtype="float32", seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DTYPES[dtype])


def agrees(found, dense, x, dtype="float32"):
    """With the layer's own weights, whatever they are by now."""
    expected = nn.functional.linear(x, dense.weight, dense.bias)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    return torch.allclose(found.float(), expected.float(), rtol=CLOSE[dtype], atol=CLOSE[dtype])


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(40,), (0, 40), (1, 40), (2, 4, 40), (9, 40), (3, 3, 40), (2, 0, 40)])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_dense_layer_computes_what_torchs_does(dtype, bias, shape, mode):
    dense = dense_layer(dtype=dtype, bias=bias)
    with mode():
        x = inputs(*shape, dtype=dtype)
        assert agrees(dense(x), dense, x, dtype)


@needs_kernels
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_output_head_takes_the_kernel_and_keeps_its_ties(family, dtype, directories, faster, tmp_path):
    _, packed = directories(family, dtype=dtype)
    model = opened(packed)
    expected = [logits(model, ids) for ids in (FEW, MANY)]
    weight, state = model.lm_head.weight, set(model.state_dict())
    heard = []
    model.lm_head.register_forward_hook(lambda *_: heard.append(1))
    faster(True, dense=True)
    assert secateur.optimize(model)["dense_kernel"] == 1
    assert type(model.lm_head) is KernelLinear and model.lm_head.weight is weight
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (family != "llama")
    assert set(model.state_dict()) == state
    for ids, was in zip((FEW, MANY), expected, strict=True):
        assert torch.allclose(logits(model, ids).float(), was.float(), rtol=CLOSE[dtype], atol=CLOSE[dtype])
    assert len(heard) == 2
    model.save_pretrained(tmp_path / "again")
    assert same_bytes(tensors_of(tmp_path / "again"), tensors_of(packed))
    faster(True)
    assert secateur.optimize(model)["dense_kernel"] == 0
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is weight


@needs_kernels
def test_embeddings_resized_under_a_tied_head(directories, faster):
    model = opened(directories("llama-tied")[1])
    faster(True, dense=True)
    secateur.optimize(model)
    logits(model, FEW)
    model.resize_token_embeddings(131, mean_resizing=False)
    assert logits(model, FEW).shape == (2, 3, 131)
    by_torch = model(FEW).logits.detach()
    assert torch.allclose(logits(model, FEW), by_torch, rtol=1e-5, atol=1e-5)


def from_meta_dense(dense):
    dense.to("meta").to_empty(device="cpu").load_state_dict(dense_layer(32, 32, seed=5).state_dict())


def turned(dense):
    dense.weight.data = dense.weight.data.T


def turned_then_in_place(dense):
    turned(dense)
    dense(inputs(2, 32))
    dense.weight.data.mul_(2)


def fewer_rows(dense):
    dense.weight.data, dense.bias = dense.weight.data[:8], None


CHANGES = {
    "in place": lambda d: d.weight.data.mul_(2),
    "other data": lambda d: setattr(d.weight, "data", d.weight.data * 3),
    "another parameter": lambda d: setattr(d, "weight", nn.Parameter(d.weight.detach() * 4)),
    "a state": lambda d: d.load_state_dict({k: v * 5 for k, v in d.state_dict().items()}),
    "a state assigned": lambda d: d.load_state_dict({k: v * 6 for k, v in d.state_dict().items()}, assign=True),
    "bfloat16": lambda d: d.to(torch.bfloat16),
    "float64 and back": lambda d: d.to(torch.float64).to(torch.float32),
    "meta and back": from_meta_dense,
    "shared memory": lambda d: d.share_memory(),
    "another bias": lambda d: setattr(d, "bias", nn.Parameter(d.bias.detach() + 7)),
    "no bias": lambda d: setattr(d, "bias", None),
    "turned": turned,
    "turned, then in place": turned_then_in_place,
    "fewer rows": fewer_rows,
}


@needs_kernels
@pytest.mark.parametrize("change", CHANGES)
def test_a_dense_layer_sees_its_weights_change(change):
    dense = dense_layer(32, 32)
    with torch.no_grad():
        dense(inputs(2, 32))
        CHANGES[change](dense)
        dtype = str(dense.weight.dtype).removeprefix("torch.")
        x = inputs(2, 32, dtype=dtype)
        for _ in range(2):
            assert agrees(dense(x), dense, x, dtype)


@needs_kernels
def test_a_dense_layer_has_gradients_as_torchs_has():
    dense, plain = dense_layer(), dense_layer()
    plain.__class__ = nn.Linear
    with torch.no_grad():
        dense(inputs(2, 40))
    found = []
    for one in (dense, plain):
        x = inputs(2, 40).requires_grad_()
        one(x).square().sum().backward()
        found.append([x.grad, one.weight.grad, one.bias.grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    with torch.no_grad():
        torch.optim.SGD(dense.parameters(), 0.1).step()
        assert agrees(dense(inputs(2, 40)), dense, inputs(2, 40))


@needs_kernels
@pytest.mark.parametrize("how", [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))])
def test_a_dense_layer_is_copied_with_weights_of_its_own(how):
    dense, x = dense_layer(), inputs(2, 40)
    with torch.no_grad():
        expected = dense(x)
        other = how(dense)
        assert type(other) is KernelLinear and other.training
        dense.weight.zero_()
        assert torch.equal(other(x), expected)


@needs_kernels
@pytest.mark.parametrize("how", [copy.deepcopy, pickle.dumps])
def test_a_dense_layer_that_is_torchs_again_can_be_copied(how, faster):
    model = nn.Sequential(nn.Linear(40, 24))
    faster(True, dense=True)
    secateur.optimize(model)
    with torch.no_grad():
        model(inputs(2, 40))
    faster(True)
    secateur.optimize(model)
    assert type(model[0]) is nn.Linear
    how(model)


@needs_kernels
def test_a_dense_layer_opened_where_there_are_no_kernels_computes_by_torch(no_kernels):
    dense = pickle.loads(pickle.dumps(dense_layer()))
    with torch.no_grad():
        assert agrees(dense(inputs(2, 40)), dense, inputs(2, 40))


@needs_kernels
def test_a_dense_layer_lets_its_former_weights_go_when_it_is_moved():
    dense = dense_layer()
    with torch.no_grad():
        dense(inputs(2, 40))
    held = weakref.ref(dense.kernel())
    dense.to("meta")
    assert held() is None


@needs_kernels
def test_wrong_inputs_of_a_dense_layer_are_errors_as_torchs_are():
    dense = dense_layer()
    with torch.no_grad():
        for x in (inputs(2, 39), inputs(4, 20), inputs(80, 2), inputs(2, 40).double(), inputs(2, 40).bfloat16()):
            with pytest.raises(RuntimeError):
                dense(x)


@needs_kernels
def test_a_dense_layer_under_autocast_gives_the_dtype_that_torchs_gives():
    dense = dense_layer()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert agrees(dense(inputs(2, 40)), dense, inputs(2, 40), "bfloat16")


DANGEROUS = """
import sys, torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from secateur.models.formats import pack
from secateur.runtime.linear import KernelLinear, PackedLinear
torch.set_grad_enabled(False)
dense = nn.Linear(32, 32)
dense.__class__ = KernelLinear
packed = PackedLinear(pack("w", torch.eye(32), "bitmask")[0], None)
for suffix, part in pack("w", torch.eye(32), "bitmask")[1].items():
    getattr(packed, "weight" + suffix).copy_(part)
x = torch.randn(2, 32)
if sys.argv[1] == "wrapped":
    dense.weight = nn.Parameter(TwoTensor(dense.weight.data, dense.weight.data), requires_grad=False)
    assert type(dense(x)) is TwoTensor
else:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in (dense, packed):
            assert module(mode.from_tensor(x)).shape == (2, 32) and module(x).shape == (2, 32)
"""


@needs_kernels
@pytest.mark.parametrize("what", ["wrapped", "fake"])
def test_tensors_without_memory_of_their_own_are_left_to_torch(what):
    done = subprocess.run([sys.executable, "-c", DANGEROUS, what], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# A packed layer whose parts change.


def half_zero(rows_, columns, seed=0):
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(rows_, columns, generator=g)
    W.view(-1)[torch.randperm(W.numel(), generator=g)[: W.numel() // 2]] = 0
    return W


def layer(W_OI, format="bitmask", values=None, bias=None):
    packing, parts = pack("w", W_OI, format, values)
    found = PackedLinear(packing, bias)
    for suffix, part in parts.items():
        getattr(found, f"weight{suffix}").copy_(part)
    return found


def weights(packed):
    """What its parts say now, by the reference."""
    return unpack(packed.packing, packed.parts).float()


OTHER = half_zero(32, 32, seed=9)  # as many values, at other places


def other_parts():
    return {f"weight{suffix}": part for suffix, part in pack("w", OTHER, "bitmask")[1].items()}


def replaced(packed):
    for name, part in other_parts().items():
        setattr(packed, name, part)


def other_data(packed):
    for name, part in other_parts().items():
        getattr(packed, name).data = part


def copied(packed):
    for name, part in other_parts().items():
        getattr(packed, name).copy_(part)


def from_meta(packed):
    packed.to("meta").to_empty(device="cpu").load_state_dict(other_parts())


PART_CHANGES = {
    "values in place": lambda p: p.weight.mul_(2),
    "other values": lambda p: setattr(p.weight, "data", p.weight * 3),
    "parts replaced": replaced,
    "parts' data": other_data,
    "parts in place": copied,
    "a state": lambda p: p.load_state_dict(other_parts()),
    "a state assigned": lambda p: p.load_state_dict(other_parts(), assign=True),
    "meta and back": from_meta,
    "shared memory": lambda p: p.share_memory(),
    "bfloat16": lambda p: p.to(torch.bfloat16),
    "float64 and back": lambda p: p.to(torch.float64).to(torch.float32),
}


@pytest.mark.parametrize("change", PART_CHANGES)
@pytest.mark.parametrize("library", [pytest.param(True, marks=needs_kernels), False])
def test_a_packed_layer_sees_its_parts_change(change, library, request, monkeypatch):
    if not library:
        request.getfixturevalue("no_kernels")
    monkeypatch.setattr("secateur.runtime.linear.TILE_BYTES", 4 * 32 * 8)  # several tiles
    packed, x = layer(half_zero(32, 32)), inputs(2, 32)
    with torch.no_grad():
        packed(x), packed(x.repeat(9, 1))
        PART_CHANGES[change](packed)
        W = unpack(packed.packing_now(), packed.parts).float()
        for few in (x, x.repeat(9, 1)):
            assert torch.allclose(packed(few), few @ W.T, rtol=1e-5, atol=1e-5)


@needs_kernels
def test_a_packed_layer_lets_its_former_weights_go_when_it_is_moved():
    packed = layer(half_zero(32, 32))
    held = weakref.ref(packed.kernel())
    packed.to("meta")
    assert held() is None and packed.kernel() is None


@needs_kernels
@pytest.mark.parametrize("how", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_packed_layer_is_copied_after_it_has_computed(how):
    packed, x = layer(half_zero(32, 32), bias=torch.ones(32)), inputs(2, 32)
    with torch.no_grad():
        expected = packed(x)
        other = how(packed)
        assert torch.equal(other(x), expected)
        replaced(packed)
        assert torch.equal(other(x), expected) and not torch.equal(packed(x), expected)


@pytest.mark.parametrize("library", [pytest.param(True, marks=needs_kernels), False])
@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("values", [None, "int8"])
def test_gradients_reach_inputs_bias_and_an_adapter_beside_it(count, values, library, request):
    if not library:
        request.getfixturevalue("no_kernels")
    packed = layer(half_zero(32, 32), values=values, bias=torch.zeros(32))
    packed.bias.requires_grad_()
    W, bias = weights(packed), packed.bias.detach().clone().requires_grad_()
    A, B = inputs(4, 32, seed=5).requires_grad_(), inputs(32, 4, seed=6).requires_grad_()
    found = []
    for frozen, b in ((packed, packed.bias), (lambda x: nn.functional.linear(x, W, bias), bias)):
        x = inputs(count, 32).requires_grad_()
        (frozen(x) + x @ A.T @ B.T).square().sum().backward()
        found.append([x.grad, b.grad, A.grad, B.grad])
        A.grad = B.grad = None
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*found, strict=True))


def test_a_bias_has_gradients_even_where_inputs_have_none():
    packed = layer(half_zero(32, 32), bias=torch.zeros(32))
    packed.bias.requires_grad_()
    packed(inputs(2, 32)).sum().backward()
    assert torch.equal(packed.bias.grad, torch.full((32,), 2.0))


@needs_kernels
@pytest.mark.parametrize("unpacked", [False, True])
def test_gradients_flow_through_a_model_to_few_rows_of_inputs(unpacked, directories, faster):
    dense, packed = (opened(d) for d in directories())
    faster(narrow if unpacked else True, dense=True)
    secateur.optimize(packed, prefer="speed")
    found = []
    for model in (packed, dense):
        x = model.get_input_embeddings()(FEW).detach().requires_grad_()
        model(inputs_embeds=x).logits.square().sum().backward()
        found.append(x.grad)
    assert torch.allclose(*found, rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for name, p in packed.named_parameters() if name.endswith("_proj.weight"))


@needs_kernels
@pytest.mark.parametrize("kind", ["packed", "dense"])
def test_forward_derivatives_are_not_lost(kind):
    import torch.autograd.forward_ad as forward

    module = layer(half_zero(32, 32)) if kind == "packed" else dense_layer(32, 32)
    W = weights(module) if kind == "packed" else module.weight
    x, direction = inputs(2, 32), inputs(2, 32, seed=8)
    with forward.dual_level():
        tangent = forward.unpack_dual(module(forward.make_dual(x, direction))).tangent
    assert tangent is not None and torch.allclose(tangent, direction @ W.T, rtol=1e-4, atol=1e-4)


# A whole model at work.


@needs_kernels
@pytest.mark.parametrize("family", PACKED)
@pytest.mark.parametrize("arranged", ["packed", "mixed"])
def test_it_writes_what_the_dense_model_writes(family, arranged, directories, faster):
    dense, packed = (opened(d) for d in directories(family))
    faster(True if arranged == "packed" else narrow, dense=True)
    secateur.optimize(packed, prefer="speed")
    ids, mask = rows(3, 7), torch.ones(3, 7, dtype=torch.long)
    for row, padding in ((0, 3), (1, 1)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    for count, beams in ((1, 1), (3, 1), (2, 3)):
        settings = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "attention_mask": mask[:count]}
        settings |= {"pad_token_id": 0, "use_cache": True}
        assert torch.equal(packed.generate(ids[:count], **settings), dense.generate(ids[:count], **settings))


@needs_kernels
def test_several_threads_write_from_one_model_at_once(directories, faster):
    packed = opened(directories()[1])
    faster(True, dense=True)
    secateur.optimize(packed)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}

    def write(ids):
        return packed.generate(ids, attention_mask=torch.ones_like(ids), **settings)

    prompts = [rows(1, 5, seed=seed) for seed in range(4)]
    expected = [write(ids) for ids in prompts]
    for module in packed.modules():
        module._kernel = None  # so that all begin by making what kernels need
    found: dict[int, list] = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: [write(prompts[n]) for _ in range(2)]})) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, expected[n]) for n in range(4) for one in found[n])


@needs_kernels
def test_a_layer_that_another_thread_makes_ready_too_does_not_lose_its_kernel():
    class Raced(PackedLinear):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "_kernel" and value is not None:  # the other thread begins just now
                super().__setattr__(name, None)

    raced = layer(half_zero(32, 32))
    raced.__class__ = Raced
    assert raced.kernel() is not None


@needs_kernels
def test_a_model_with_unpacked_layers_is_not_pruned_in_memory_and_stays_what_it_was(directories, faster):
    model = opened(directories()[1])
    faster(narrow)
    secateur.optimize(model, prefer="speed")
    former = logits(model)
    with pytest.raises(secateur.ModelError, match="packed"):
        secateur.prune(model, method="magnitude")
    assert torch.equal(logits(model), former)


@needs_kernels
def test_a_model_with_unpacked_layers_is_evaluated_as_the_dense_one_is(directories, faster, tokenizer, tmp_path):
    dense, packed = directories()
    (tmp_path / "text.txt").write_text(TEXT * 3)
    options = {"text": str(tmp_path / "text.txt"), "seqlen": 16, "windows": 3, "tokenizer": tokenizer}
    expected = secateur.evaluate(dense, **options)
    model = opened(packed)
    faster(narrow, dense=True)
    secateur.optimize(model, prefer="speed")
    former = logits(model, FEW)
    assert secateur.evaluate(model, **options)["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert torch.equal(logits(model, FEW), former)


# Without kernels.


@pytest.mark.parametrize("values", [None, "int8"])
@pytest.mark.parametrize("prefer", ["speed", "memory"])
def test_without_kernels_speed_unpacks_what_it_may_and_memory_nothing(
    prefer, values, directories, no_kernels, monkeypatch, tmp_path
):
    dense, packed = directories(values=values)
    monkeypatch.setenv("SECATEUR_PREFER", prefer)
    model = opened(packed)
    unpacked = prefer == "speed" and values is None
    assert len(of_class(model, UnpackedLinear)) == (PACKED["llama"] if unpacked else 0)
    assert not of_class(model, KernelLinear) and arrangement.arrangement(model)["kernels"] is None
    if values is None:
        assert torch.allclose(logits(model, FEW), logits(opened(dense), FEW), rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    assert same_bytes(tensors_of(tmp_path / "again"), tensors_of(packed))


def test_without_kernels_it_is_said_once(directories, monkeypatch, messages, tmp_path):
    monkeypatch.setattr(kernels, "FILE", tmp_path / "_kernels.so")
    monkeypatch.setenv("SECATEUR_PREFER", "speed")
    kernels.library.cache_clear(), kernels.native_bfloat16.cache_clear()
    try:
        for _ in range(2):
            model = opened(directories()[1])
            logits(model, FEW)
            secateur.optimize(model, prefer="memory")
            logits(model, FEW)
    finally:
        kernels.library.cache_clear(), kernels.native_bfloat16.cache_clear()
    assert len([said for said in messages if "kernels" in said]) == 1


def test_a_library_that_cannot_be_loaded_is_as_good_as_none(monkeypatch, messages, tmp_path):
    (tmp_path / "_kernels.so").write_bytes(b"no library")
    monkeypatch.setattr(kernels, "FILE", tmp_path / "_kernels.so")
    kernels.library.cache_clear()
    try:
        assert kernels.library() is None and kernels.use() is None
    finally:
        kernels.library.cache_clear()
    assert len(messages) == 1 and str(tmp_path) in messages[0]


# Compiled and traced.


@pytest.fixture
def no_leftovers():
    """Memory that nobody wrote to holds NaN, and not by chance what it should."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield lambda module: torch.compile(module, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()


@needs_kernels
@pytest.mark.parametrize("kind", ["packed", "dense"])
def test_a_compiled_layer_computes_the_same_and_a_copy_has_its_own_weights(kind, compiled):
    module = layer(half_zero(32, 32)) if kind == "packed" else dense_layer(32, 32)
    x = inputs(2, 32)
    with torch.no_grad():
        expected = module(x)
        assert torch.allclose(compiled(module)(x), expected, rtol=1e-5, atol=1e-5)
        other = compiled(copy.deepcopy(module))
        assert torch.allclose(other(x), expected, rtol=1e-5, atol=1e-5)
        module.weight.zero_()
        assert torch.allclose(other(x), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(compiled(module)(x), module(x)) and not torch.allclose(module(x), expected)


@needs_kernels
def test_a_compiled_model_computes_the_same_after_it_is_copied_and_arranged_anew(directories, compiled, faster):
    model = opened(directories()[1], attn_implementation="eager")
    model.config.use_cache = False
    faster(narrow, dense=True)
    expected = logits(model, FEW)
    assert torch.allclose(logits(compiled(model), FEW), expected, rtol=1e-5, atol=1e-5)
    other = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.weight.zero_()
    assert torch.allclose(logits(compiled(other), FEW), expected, rtol=1e-5, atol=1e-5)
    secateur.optimize(other, prefer="speed")
    assert of_class(other, UnpackedLinear)
    assert torch.allclose(logits(compiled(other), FEW), expected, rtol=1e-5, atol=1e-5)


@needs_kernels
def test_what_was_compiled_does_not_answer_with_zeros_for_gradients(compiled):
    """Gradients through a compiled packed layer are right, or refused."""
    module, x = layer(half_zero(32, 32)), inputs(2, 32).requires_grad_()
    with pytest.raises(RuntimeError, match="autograd"):
        compiled(module)(x).sum().backward()


@needs_kernels
@pytest.mark.parametrize("kind", ["packed", "dense"])
@pytest.mark.parametrize("count", [2, 12])
def test_a_traced_layer_computes_from_its_inputs(kind, count, no_leftovers):
    module = layer(half_zero(32, 32)) if kind == "packed" else dense_layer(32, 32)
    with torch.no_grad():
        traced = torch.jit.trace(module, inputs(count, 32))
        x = inputs(count, 32, seed=11)
        assert torch.allclose(traced(x), module(x), rtol=1e-5, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize(("kind", "count"), [("packed", 2), ("packed", 12), ("dense", 2), ("dense", 12)])
def test_a_graph_of_a_layer_computes_from_its_inputs(kind, count, no_leftovers):
    from torch.fx.experimental.proxy_tensor import make_fx

    module = layer(half_zero(32, 32)) if kind == "packed" else dense_layer(32, 32)
    with torch.no_grad():
        graph = make_fx(module)(inputs(count, 32))
        x = inputs(count, 32, seed=11)
        assert torch.allclose(graph(x), module(x), rtol=1e-5, atol=1e-5)


@needs_kernels
def test_an_exported_layer_computes_from_its_inputs():
    module, x = layer(half_zero(32, 32)), inputs(2, 32, seed=11)
    assert torch.allclose(torch.export.export(module, (inputs(2, 32),)).module()(x), module(x), rtol=1e-5, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("depth", [1, 2])
def test_modes_that_look_at_operations_change_nothing(depth, directories, faster):
    from torch.utils.flop_counter import FlopCounterMode

    model = opened(directories()[1])
    faster(narrow, dense=True)
    secateur.optimize(model, prefer="speed")
    expected = logits(model, FEW)
    with ExitStack() as stack:
        for _ in range(depth):
            stack.enter_context(FlopCounterMode(display=False))
        assert torch.allclose(logits(model, FEW), expected, rtol=1e-5, atol=1e-5)
