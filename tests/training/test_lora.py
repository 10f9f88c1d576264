"""LoRA under a mask: the merge keeps zeros and function."""

import sys

import pytest
import torch

import secateur
from sparse_training import IDS, same_zeros, train_step, zeros
from tiny import tiny_model


def adapted(model):
    """With adapters that were trained for a few steps."""
    wrapped = secateur.masked_lora(model, rank=4)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.01)
    losses = [train_step(wrapped, optimizer) for _ in range(4)]
    assert losses[-1] < losses[0]
    return wrapped.eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_merged_model_has_the_same_zeros_and_the_same_function(family, dtype):
    model = secateur.prune(tiny_model(family), method="magnitude", pattern="2:4").model.to(dtype)
    before = {n: p.detach() == 0 for n, p in model.named_parameters() if ("layers." in n or ".h." in n) and p.ndim > 1}
    wrapped = adapted(model)
    with torch.no_grad():
        unmerged = wrapped(input_ids=IDS).logits
        merged = secateur.merge_lora(wrapped)
        assert torch.equal(merged(input_ids=IDS).logits, unmerged)
    assert all(torch.equal(p.detach() == 0, before[n]) for n, p in merged.named_parameters() if n in before)


def test_it_computes_with_w_plus_masked_ba(sparse):
    wrapped = adapted(sparse)
    layer = wrapped.model.layers[1].mlp.up_proj
    W, A, B = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, 32)
    expected = x @ (W + (W != 0) * (B @ A) * 2).T  # alpha is twice the rank
    torch.testing.assert_close(layer(x), expected)
    layer.enable_adapters(enabled=False)
    torch.testing.assert_close(layer(x), x @ W.T)


def test_only_adapters_are_trained(sparse):
    former = {n: p.detach().clone() for n, p in sparse.named_parameters()}
    wrapped = adapted(sparse)
    assert {n.split(".")[-3] for n, p in wrapped.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    for name, parameter in wrapped.named_parameters():
        if "lora" not in name:
            assert torch.equal(parameter, former[name.replace("base_layer.", "")])


def test_plain_lora_is_merged_under_the_mask_too(sparse):
    import peft

    before = zeros(sparse)
    wrapped = peft.get_peft_model(
        sparse, peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    merged = secateur.merge_lora(wrapped)
    assert same_zeros(before, zeros(merged))


def test_without_us_the_merge_fills_the_zeros(sparse):
    import peft

    before = zeros(sparse)
    wrapped = peft.get_peft_model(sparse, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert not same_zeros(before, zeros(wrapped.merge_and_unload()))


def test_what_cannot_be(sparse, monkeypatch):
    with pytest.raises(secateur.OptionError, match="rank 0: at least 1"):
        secateur.masked_lora(sparse, rank=0)
    with pytest.raises(secateur.ModelError, match="no adapters of LoRA"):
        secateur.merge_lora(sparse)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(secateur.OptionError, match="LoRA needs peft: pip install peft"):
        secateur.masked_lora(sparse)


def test_a_trainer_keeps_zeros_beside_adapters(sparse, tmp_path):
    """An adapter's B is all zeros at first, which are none to be kept."""
    from transformers import Trainer, TrainingArguments

    before = zeros(sparse)
    wrapped = secateur.masked_lora(sparse, rank=4)
    args = TrainingArguments(
        str(tmp_path), max_steps=3, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"
    )
    data = [{"input_ids": row, "labels": row} for row in IDS]
    Trainer(wrapped, args, train_dataset=data, callbacks=[secateur.KeepSparsity()]).train()
    assert all((p != 0).any() for name, p in wrapped.named_parameters() if "lora_B" in name)
    assert same_zeros(before, zeros(secateur.merge_lora(wrapped)))
