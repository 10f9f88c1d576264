"""A packed model made dense in memory, and what peft says of one that is not."""

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import secateur
from secateur.runtime.linear import KernelLinear, PackedLinear, UnpackedLinear
from secateur.training.masks import Masks
from sparse_models import made_once
from sparse_training import IDS, same_zeros, train_step, zeros
from tiny import bytes_of, rows, same_bytes, tensors_of

FAMILIES = {"llama": "bfloat16", "llama-tied": "float32", "gpt2": "float32", "qwen2": "float16", "mixtral": "float32"}
ADAPTERS = {
    "get_peft_model": lambda model: peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])),
    "add_adapter": lambda model: model.add_adapter(peft.LoraConfig(target_modules=["q_proj"])),
    "ia3": lambda model: peft.get_peft_model(model, peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return made_once(tmp_path_factory, FAMILIES.__getitem__)


def opened(directory, **options):
    return AutoModelForCausalLM.from_pretrained(directory, **{"dtype": "auto", **options}).eval()


@pytest.mark.parametrize("prefer", ["memory", "speed"])
@pytest.mark.parametrize("values", [None, "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dequantize_gives_the_unpacked_model(family, values, prefer, directories, tmp_path):
    packed = directories(family, "bitmask", values)[1]
    secateur.unpack(packed, tmp_path / "unpacked")
    model = opened(packed)
    secateur.optimize(model, prefer=prefer)
    assert model.dequantize() is model
    expected = opened(tmp_path / "unpacked")
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in expected.named_parameters()]
    for (name, found), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert found.dtype == wanted.dtype and bytes_of(found) == bytes_of(wanted), name
        assert found.requires_grad
    for module in model.modules():
        assert not isinstance(module, (PackedLinear, UnpackedLinear, KernelLinear))
    layer = model.transformer.h[0].mlp.c_fc if family == "gpt2" else model.model.layers[0].self_attn.q_proj
    assert type(layer) is (Conv1D if family == "gpt2" else nn.Linear)
    with torch.no_grad():
        assert torch.equal(model(rows(2, 12)).logits, expected(rows(2, 12)).logits)
    model.save_pretrained(tmp_path / "saved")
    assert same_bytes(tensors_of(tmp_path / "saved"), tensors_of(tmp_path / "unpacked"))
    assert not hasattr(model.config, "quantization_config")
    assert "quantization_config" not in (tmp_path / "saved" / "config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_to_another_dtype(dtype, directories):
    packed = directories("llama")[1]
    exact = opened(packed, dtype=torch.float32).dequantize()
    model = opened(packed)
    model.dequantize(dtype=dtype)
    for (name, found), wanted in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert torch.equal(found, wanted.to(dtype)), name
    model(rows(2, 12))


def test_what_was_dequantized_is_trained_pruned_and_adapted(directories):
    model = opened(directories("llama")[1], dtype=torch.float32)
    with pytest.raises(secateur.ModelError, match="is packed"):
        secateur.prune(model, method="magnitude")
    model.dequantize()
    before = zeros(model)
    with Masks.of(model).held():
        train_step(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    assert same_zeros(before, zeros(model))
    secateur.masked_lora(model, rank=2)
    assert same_zeros(before, zeros(secateur.merge_lora(model)))
    assert secateur.prune(model, method="magnitude", sparsity=0.75).report["sparsity"] == 0.75


@pytest.mark.parametrize("how", ADAPTERS)
def test_peft_says_how_a_packed_layer_becomes_dense(how, directories):
    model = opened(directories("llama")[1])
    with pytest.raises(ValueError, match=r"Target module PackedLinear.*secateur unpack.* is not supported") as caught:
        ADAPTERS[how](model)
    assert "\n" not in str(caught.value)


def test_adapters_beside_layers_that_were_unpacked(directories, tmp_path):
    """Where a packed matrix runs dense, peft takes it; merged, it is packed again when it is saved."""
    model = opened(directories("llama")[1], dtype=torch.float32)
    for layer in model.model.layers:
        packed = layer.self_attn.q_proj
        dense = UnpackedLinear(packed.in_features, packed.out_features, bias=False)
        dense.weight = nn.Parameter(packed.rows(0, packed.out_features), requires_grad=False)
        dense.packing = packed.packing
        layer.self_attn.q_proj = dense
    gone = [layer.self_attn.q_proj.weight == 0 for layer in model.model.layers]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    merged = secateur.merge_lora(wrapped)
    for layer, zero in zip(merged.model.layers, gone, strict=True):
        assert torch.equal(layer.self_attn.q_proj.weight == 0, zero) and type(layer.self_attn.q_proj) is UnpackedLinear
    merged.save_pretrained(tmp_path / "merged")
    again = opened(tmp_path / "merged", dtype=torch.float32)
    assert isinstance(again.model.layers[0].self_attn.q_proj, PackedLinear)
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, merged(IDS).logits)
