"""Models with adapters of peft: merged to what they compute, named where they cannot be, and refused elsewhere."""

import copy
import re
from types import SimpleNamespace

import peft
import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import secateur
from secateur.models.in_memory import of_peft
from secateur.training.masks import Masks, model_matrices
from sparse_training import IDS, same_zeros, zeros
from tiny import files_below, rows, tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]
CALIBRATION = rows(4, 16)
BOTH = ["embed_tokens", "lm_head"]


def lora(**options):
    return LoraConfig(**{"target_modules": ["q_proj", "down_proj"], "r": 4, **options})


KINDS = {
    "lora": lora,
    "of all layers": lambda: lora(target_modules="all-linear"),
    "rslora": lambda: lora(use_rslora=True),
    "dora": lambda: lora(use_dora=True),
    "bias": lambda: lora(bias="all"),
    "lora of embeddings and head": lambda: lora(target_modules=[*BOTH, "q_proj"]),
    "modules_to_save": lambda: lora(modules_to_save=BOTH),
    "modules_to_save of a matrix": lambda: lora(modules_to_save=["up_proj"]),
    "modules_to_save of an MLP": lambda: lora(target_modules=["q_proj", "up_proj"], modules_to_save=["mlp"]),
    "modules_to_save of a norm": lambda: lora(modules_to_save=["input_layernorm"]),
    "tokens": lambda: lora(trainable_token_indices=[5, 6]),
    "tokens alone": lambda: peft.TrainableTokensConfig(token_indices=[5, 6], target_modules=["embed_tokens"]),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(target_modules=["q_proj"], r=4),
    "lokr": lambda: peft.LoKrConfig(target_modules=["q_proj"], r=4),
    "vera": lambda: peft.VeraConfig(target_modules=["q_proj"], r=4),
    "oft": lambda: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4, r=0),
    "boft": lambda: peft.BOFTConfig(target_modules=["q_proj"], boft_block_size=4),
    "hra": lambda: peft.HRAConfig(target_modules=["q_proj"], r=4),
    "fourier": lambda: peft.FourierFTConfig(target_modules=["q_proj"], n_frequency=10),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
}
PARAMETERS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def by_peft(model, config):
    return peft.get_peft_model(model, config)


def by_transformers(model, config):
    model.add_adapter(config)
    return model


def by_injection(model, config):
    return peft.inject_adapter_in_model(config, model)


WAYS = {"get_peft_model": by_peft, "add_adapter": by_transformers, "inject": by_injection}


def learnt(model):
    """As if it had been trained."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.2)
    return model.eval()


def pruned(family="llama", **changes):
    model = secateur.prune(tiny_model(family, **changes), method="magnitude", pattern="2:4").model
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = 0  # zeros that no pruning made
        if not model.config.tie_word_embeddings:
            model.get_output_embeddings().weight[9] = 0
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def reopened(model, folder):
    model.save_pretrained(folder)
    assert not (folder / "adapter_config.json").exists()
    return AutoModelForCausalLM.from_pretrained(folder)


def check_whole(merged, folder):
    """No trace of adapters, and the file holds what is in memory."""
    assert not any(of_peft(module) for module in merged.modules())
    assert not getattr(merged, "_hf_peft_config_loaded", False) and "peft_config" not in merged.__dict__
    assert torch.equal(logits(reopened(merged, folder)), logits(merged))


EVERY = [(kind, way) for kind in KINDS for way in WAYS if kind != "vera" or way == "get_peft_model"]  # peft refuses


@pytest.mark.parametrize(("kind", "way"), EVERY)
def test_a_dense_model_is_merged_as_by_peft(kind, way, tmp_path):
    model = learnt(WAYS[way](tiny_model("llama"), KINDS[kind]()))
    before = logits(model)
    expected = peft.get_peft_model(tiny_model("llama"), KINDS[kind]())
    with torch.no_grad():
        values = {name.removeprefix("base_model.model."): p for name, p in expected.named_parameters()}
        for name, parameter in model.named_parameters():
            values[name.removeprefix("base_model.model.")].copy_(parameter)
    # what is no parameter, such as VeRA's random projections, is the same by its seed
    expected = expected.merge_and_unload()
    merged = secateur.merge_lora(model)
    for (name, found), wanted in zip(merged.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, wanted), name
    torch.testing.assert_close(logits(merged), before, rtol=1e-3, atol=1e-3)
    check_whole(merged, tmp_path / "merged")
    assert secateur.prune(merged, method="magnitude").report["sparsity"] == 0.5


@pytest.mark.parametrize(("kind", "way"), EVERY)
def test_a_sparse_model_keeps_the_zeros_of_its_matrices_and_of_nothing_else(kind, way, tmp_path):
    sparse = pruned()
    gone = {m.parameter: m.weight.detach() == 0 for m in model_matrices(sparse).values()}
    model = learnt(WAYS[way](sparse, KINDS[kind]()))
    expected = copy.deepcopy(model)
    if way == "get_peft_model":
        expected = expected.merge_and_unload()
    merged = secateur.merge_lora(model)
    for name, zero in gone.items():
        weight = dict(merged.named_parameters())[name]
        assert (weight[zero] == 0).all() and (weight[~zero] != 0).all(), name
    if way == "get_peft_model":
        for (name, found), wanted in zip(merged.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(found, torch.where(gone[name], 0, wanted) if name in gone else wanted), name
    check_whole(merged, tmp_path / "merged")


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_an_adapters_directory(family, tmp_path):
    """What from_pretrained(ADAPTER_DIR) opens is merged to a whole model."""
    pruned(family).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trained = {"target_modules": ["c_attn" if family == "gpt2" else "q_proj"], "task_type": "CAUSAL_LM"}
    trained |= {"modules_to_save": ["ln_f"], "fan_in_fan_out": True} if family == "gpt2" else {"modules_to_save": BOTH}
    wrapped = learnt(peft.get_peft_model(base, lora(**trained)))
    wrapped.save_pretrained(tmp_path / "adapter")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(opened), logits(wrapped))
    merged, expected = secateur.merge_lora(opened), secateur.merge_lora(wrapped)
    assert torch.equal(logits(merged), logits(expected))
    assert same_zeros(zeros(AutoModelForCausalLM.from_pretrained(tmp_path / "base")), zeros(merged))
    check_whole(merged, tmp_path / "merged")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fused_experts(dtype, tmp_path):
    model = secateur.prune(tiny_model("mixtral", dtype), method="magnitude", pattern="2:4").model
    gone = {m.name: m.read() == 0 for m in model_matrices(model).values()}
    wrapped = learnt(peft.get_peft_model(model, lora(target_modules=["q_proj"], **PARAMETERS)))
    expected = copy.deepcopy(wrapped).merge_and_unload()
    merged = secateur.merge_lora(wrapped)
    theirs = model_matrices(expected)
    for name, matrix in model_matrices(merged).items():
        wanted = torch.where(gone[name], 0, theirs[name].read())
        assert torch.equal(matrix.read(), wanted) and gone[name].any(), name
    assert any(not torch.equal(gone[name], matrix.read() == 0) for name, matrix in theirs.items())
    again = dict(reopened(merged, tmp_path / "merged").named_parameters())
    assert all(torch.equal(again[name], parameter) for name, parameter in merged.named_parameters())


def test_several_adapters_are_merged_together():
    model = peft.get_peft_model(tiny_model("llama"), lora())
    model.add_adapter("second", lora(target_modules=["up_proj", "q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    learnt(model)
    before = logits(model)
    merged = secateur.merge_lora(model)
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-4)


def test_only_active_adapters_are_merged():
    model = peft.get_peft_model(tiny_model("llama"), lora(modules_to_save=["lm_head"]))
    model.add_adapter("second", lora())
    learnt(model)
    model.set_adapter("second")
    learnt(model)
    before = logits(model)
    assert torch.equal(secateur.merge_lora(model).lm_head.weight, tiny_model("llama").lm_head.weight)
    torch.testing.assert_close(logits(model.get_base_model()), before, rtol=1e-4, atol=1e-4)


def test_adapters_that_are_merged_already_are_taken_out(tmp_path):
    model = learnt(peft.get_peft_model(pruned(), lora(trainable_token_indices=[5])))
    model.merge_adapter()
    before = logits(model)
    merged = secateur.merge_lora(model)
    assert torch.equal(logits(merged), before)
    check_whole(merged, tmp_path / "merged")


def test_adapters_that_were_deleted_leave_a_whole_model(tmp_path):
    model = by_transformers(tiny_model("llama"), lora())
    model.delete_adapter("default")
    merged = secateur.merge_lora(model)
    assert torch.equal(logits(merged), logits(tiny_model("llama")))
    check_whole(merged, tmp_path / "merged")


def test_a_mark_without_layers_is_taken_away(tmp_path):
    model = tiny_model("llama")
    model._hf_peft_config_loaded = True
    with pytest.raises(secateur.ModelError, match=r"^LlamaForCausalLM: carries adapters of peft; merge them first"):
        secateur.prune(model, method="magnitude")
    check_whole(secateur.merge_lora(model), tmp_path / "merged")


# Tied embeddings.

TIED = {
    "lora of the head": (lora(target_modules=["lm_head", "q_proj"]), False),
    "lora of the embeddings": (lora(target_modules=["embed_tokens", "q_proj"]), False),
    "lora of both": (lora(target_modules=BOTH), False),
    "lora of both, tied": (lora(target_modules=BOTH, ensure_weight_tying=True), True),
    "trained embeddings": (lora(modules_to_save=["embed_tokens"]), False),
    "trained head": (lora(modules_to_save=["lm_head"]), False),
    "both trained": (lora(modules_to_save=BOTH), False),
    "both trained, tied": (lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True), True),
    "tokens": (lora(trainable_token_indices=[5, 6]), True),
    "neither": (lora(), True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", TIED)
def test_tied_embeddings(what, way, tmp_path, messages):
    config, tied = TIED[what]
    model = learnt(WAYS[way](tiny_model("llama-tied"), copy.deepcopy(config)))
    before = logits(model)
    merged = secateur.merge_lora(model)
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-4)
    assert merged.config.tie_word_embeddings == tied
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    assert sum("tie_word_embeddings is False now" in line for line in messages) == (not tied)
    merged.tie_weights()
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-4)
    check_whole(merged, tmp_path / "merged")


# What cannot be merged.

UNMERGEABLE = {
    "replicated blocks": (
        lambda: lora(layer_replication=[[0, 2], [1, 3]]),
        "LlamaForCausalLM: its blocks were replica",
    ),
    "poly": (lambda: peft.PolyConfig(target_modules=["q_proj"], n_tasks=2, n_skills=2), "q_proj: an adapter"),
    "adaption prompt": (
        lambda: peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM"),
        "self_attn: an adapter \\(AdaptedAttention\\) that cannot be merged",
    ),
    "activated lora": (
        lambda: lora(alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM"),
        "outside the model's layers",
    ),
}
PROMPTS = {
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}
ENTRIES = {
    "prune": lambda given, out: secateur.prune(given, method="wanda", calibration=CALIBRATION),
    "prune to a directory": lambda given, out: secateur.prune(given, out, method="wanda", calibration=CALIBRATION),
    "GradualPruning": lambda given, out: secateur.GradualPruning(final=0.5).on_train_begin(
        None, SimpleNamespace(max_steps=3, global_step=0), None, model=given
    ),
    "gradual": lambda given, out: secateur.gradual(given, final=0.5, steps=3),
    "masked_lora": lambda given, out: secateur.masked_lora(given),
}


def refused(function, given, folder, said):
    """One line, and nothing touched or written."""
    before = {name: parameter.detach().clone() for name, parameter in given.named_parameters()}
    trained = {name for name, parameter in given.named_parameters() if parameter.requires_grad}
    with pytest.raises(secateur.ModelError, match=said) as caught:
        function(given, folder / "out")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    after = dict(given.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert trained == {name for name, parameter in given.named_parameters() if parameter.requires_grad}
    assert files_below(folder) == {}


@pytest.mark.parametrize("what", UNMERGEABLE)
def test_what_cannot_be_merged_is_named(what, tmp_path):
    config, said = UNMERGEABLE[what]
    refused(
        lambda given, out: secateur.merge_lora(given), learnt(by_peft(tiny_model("llama"), config())), tmp_path, said
    )


def test_nothing_is_merged_where_one_adapter_cannot_be(tmp_path):
    model = learnt(by_peft(tiny_model("llama"), lora()))
    layer = model.base_model.model.model.layers[2].self_attn.q_proj

    class Stubborn(type(layer)):
        def merge(self, *args, **kwargs):
            raise ValueError("two\nlines of\treasons")

    layer.__class__ = Stubborn
    said = r"layers\.2\.self_attn\.q_proj: an adapter \(Stubborn\) that cannot be merged \(two lines of reasons\)"
    refused(lambda given, out: secateur.merge_lora(given), model, tmp_path, said)


@pytest.mark.parametrize("what", PROMPTS)
@pytest.mark.parametrize("entry", [*ENTRIES, "evaluate", "merge_lora"])
def test_prompts_would_be_lost(what, entry, tmp_path):
    more = {
        "evaluate": lambda given, out: secateur.evaluate(given, text="wikitext2"),
        "merge_lora": lambda given, out: secateur.merge_lora(given),
    }
    given = peft.get_peft_model(tiny_model("llama"), PROMPTS[what]())
    said = r"PeftModelForCausalLM: what it has learnt \([A-Z_]+\) lies outside.*give the model without it"
    refused({**ENTRIES, **more}[entry], given, tmp_path, said)


# Where adapters are in the way.


def masked(model, config):
    return secateur.masked_lora(model, rank=2)


def merged_in_place(model, config):
    wrapped = peft.get_peft_model(model, config)
    wrapped.merge_adapter()
    return wrapped


def in_compiled(model, config):
    return torch.compile(peft.get_peft_model(model, config), backend="eager")


CARRIERS = {**WAYS, "masked_lora": masked, "merge_adapter": merged_in_place, "compiled": in_compiled}
CARRIERS["DataParallel"] = lambda model, config: nn.DataParallel(by_peft(model, config))


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("way", CARRIERS)
def test_adapters_are_refused_before_anything_is_touched(way, entry, tmp_path):
    given = CARRIERS[way](tiny_model("llama"), lora())
    said = r"^model\.layers\.0\.self_attn\.q_proj: carries adapters of peft; merge them first: .*merge_lora\(model\)$"
    refused(ENTRIES[entry], given, tmp_path, said)


@pytest.mark.parametrize("kind", ["modules_to_save", "tokens", "tokens alone", "norms", "ia3"])
def test_every_kind_of_adapter_is_refused(kind, tmp_path):
    given = by_transformers(tiny_model("llama"), KINDS[kind]())
    refused(ENTRIES["prune to a directory"], given, tmp_path, "carries adapters of peft; merge them first")


@pytest.mark.parametrize("way", CARRIERS)
def test_what_was_merged_is_pruned_like_a_bare_model(way):
    given = CARRIERS[way](tiny_model("llama"), lora(init_lora_weights=False))
    merged = secateur.merge_lora(given)
    bare = tiny_model("llama")
    bare.load_state_dict(merged.state_dict())
    found = secateur.prune(given, method="wanda", calibration=CALIBRATION)
    expected = secateur.prune(bare, method="wanda", calibration=CALIBRATION)
    assert found.report["matrices"] and found.model is merged
    for (name, mine), theirs in zip(found.model.named_parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("kind", ["lora", "dora", "modules_to_save", "modules_to_save of an MLP", "tokens", "ia3"])
@pytest.mark.parametrize("way", WAYS)
def test_a_model_is_measured_with_its_adapters(kind, way, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(f'{{"input_ids": {row}}}' for row in rows(2, 16).tolist()), encoding="utf-8")
    given = learnt(WAYS[way](tiny_model("llama"), KINDS[kind]()))
    found = secateur.evaluate(given, text=str(text), seqlen=16)["loss"]
    dense = secateur.evaluate(tiny_model("llama"), text=str(text), seqlen=16)["loss"]
    merged = secateur.evaluate(secateur.merge_lora(given), text=str(text), seqlen=16)["loss"]
    assert found == pytest.approx(merged, rel=1e-4) and abs(found - dense) > 1e-3


# Masks beside adapters.


@pytest.mark.parametrize("way", WAYS)
def test_masks_of_the_bare_model_fit_it_with_adapters(way):
    bare = pruned()
    keep = {m.parameter: m.weight.detach() != 0 for m in model_matrices(bare).values()}
    expected = Masks.of(bare).zeros
    model = WAYS[way](bare, lora())
    for masks in (Masks(model, keep), Masks.of(model)):
        assert masks.zeros == expected and len(masks.parameters) == 21
        assert "model.layers.0.self_attn.q_proj.base_layer.weight" in masks.parameters
    with pytest.raises(secateur.OptionError, match=re.escape("did you mean model.layers.0.mlp.down_proj.weight")):
        Masks(model, {"model.layers.0.mlp.down.weight": torch.ones(2, 2)})


def test_a_mask_holds_the_frozen_matrix_and_its_trained_copy():
    model = peft.get_peft_model(pruned(), lora(modules_to_save=["up_proj"]))
    names = [name for name in Masks.of(model).parameters if "layers.1.mlp.up_proj" in name]
    assert [name.split("up_proj.")[1] for name in names] == [
        "original_module.weight", "modules_to_save.default.weight",
    ]  # fmt: skip
    weight = model.base_model.model.model.layers[1].mlp.up_proj.original_module.weight
    assert list(Masks(model, {"model.layers.1.mlp.up_proj.weight": weight != 0}).parameters) == names


@pytest.mark.parametrize("kind", ["lora", "modules_to_save of a matrix", "bias"])
def test_a_trainer_keeps_zeros_of_a_peft_model(kind, tmp_path):
    before = zeros(pruned())
    model = peft.get_peft_model(pruned(), KINDS[kind]())
    args = TrainingArguments(
        str(tmp_path), max_steps=3, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
        dataloader_pin_memory=False, learning_rate=0.01,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in IDS]
    Trainer(model, args, train_dataset=data, callbacks=[secateur.KeepSparsity()]).train()
    copies = {n: p for n, p in model.named_parameters() if "modules_to_save" in n}
    assert all(float((p == 0).float().mean()) == 0.5 for p in copies.values())
    assert same_zeros(before, zeros(secateur.merge_lora(model)))
