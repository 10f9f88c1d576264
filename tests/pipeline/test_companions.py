"""All that belongs to a checkpoint comes along, from disk and from memory, and nothing that no longer fits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from secateur.models.checkpoint import config_of
from secateur.progress import Silent
from test_families import family_model
from tiny import edit_json, rows, save_tiny, tensors_of

SAVED = "model.safetensors"
IDS = rows(8, 20)
BELONGS = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "generation_config.json",
    "tokenizer.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "tokenizer.model.v3",
    "LICENSE.md", "license", "NOTICE", "USE_POLICY.md", "vocab.bpe", "heads.safetensors",
)  # fmt: skip
STALE = (
    "consolidated.safetensors", "params.json", "model-00001-of-00002.safetensors", "adapter_model.safetensors",
    "hf_quant_config.json", "quantize_config.json", "trainer_state.json", "eval_results.json",
)  # fmt: skip


@pytest.fixture
def source(tokenizer, tmp_path) -> Path:
    """A sparse model with all that a published one may have beside it."""
    source = save_tiny(tmp_path / "dense", "llama", tokenizer=tokenizer)
    secateur.prune(source, tmp_path / "source", method="magnitude", pattern="2:4", progress=Silent())
    source = tmp_path / "source"
    (source / "secateur.json").unlink()
    for name in (*BELONGS, *STALE):
        path = source / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_text("{}" if name.endswith(".json") else name, encoding="utf-8")
    save_file({"head.weight": torch.arange(3.0)}, source / "heads.safetensors")
    save_file({"layers.0.weight": torch.ones(2)}, source / "consolidated.safetensors")
    save_file({"q.lora_A.weight": torch.ones(2)}, source / "adapter_model.safetensors")
    shutil.copy(source / SAVED, source / "model-00001-of-00002.safetensors")
    (source / "notes").mkdir()
    return source


MAKING: dict[str, Any] = {
    "prune": lambda source, out: secateur.prune(source, out, method="magnitude", progress=Silent()),
    "finetune": lambda source, out: secateur.finetune(source, out, IDS, steps=1, train="full", progress=Silent()),
    "pack": lambda source, out: secateur.pack(source, out, progress=Silent()),
    "shrink": lambda source, out: secateur.shrink(source, out, layers=[1], progress=Silent()),
}


@pytest.mark.parametrize("make", MAKING)
def test_what_belongs_comes_along_and_what_does_not_is_said(make, source, tmp_path, messages):
    out = tmp_path / "out"
    MAKING[make](source, out)
    gone = {"heads.safetensors"} if make == "shrink" else set()
    for name in set(BELONGS) - gone - {"generation_config.json"}:
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    assert not [name for name in (*STALE, *gone) if (out / name).exists()]
    said = next(line for line in messages if "left out" in line and "other weights" in line)
    assert all(name in said for name in (*STALE, *gone))
    assert AutoModelForCausalLM.from_pretrained(out).config.model_type == "llama"
    assert set(AutoTokenizer.from_pretrained(out).chat_template) == {"default", "tool_use"}


def test_from_memory_what_transformers_does_not_save_comes_along(source, tmp_path):
    model, out = AutoModelForCausalLM.from_pretrained(source), tmp_path / "out"
    secateur.prune(model, out, method="magnitude", progress=Silent())
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "LICENSE.md"):
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    assert not [name for name in STALE if (out / name).exists()]
    assert set(AutoTokenizer.from_pretrained(out).chat_template) == {"default", "tool_use"}


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.5, "do_sample": False}, {"num_beams": 1, "early_stopping": True}]
)
def test_a_generation_config_that_transformers_does_not_save_is_saved(sampling, model_directory, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_directory())
    for name, value in sampling.items():
        setattr(model.generation_config, name, value)
    own = model.generation_config
    secateur.prune(model, tmp_path / "out", method="magnitude", progress=Silent())
    assert model.generation_config is own
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {name: getattr(again.generation_config, name) for name in sampling} == sampling
    assert torch.equal(again.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)


def test_what_cannot_be_saved_leaves_the_pruned_model_and_says_so(model_directory, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_directory())
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[0].mlp.gate_proj.weight  # nobody declared it
    with pytest.raises(secateur.OutputError, match="the model in memory is pruned") as error:
        secateur.prune(model, tmp_path / "out", method="magnitude", progress=Silent())
    assert "\n" not in str(error.value)
    assert float((model.model.layers[0].mlp.down_proj.weight == 0).float().mean()) == 0.5
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_found_out_before_the_work(model_directory, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("", encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(model_directory())
    with pytest.raises(secateur.OutputError):
        secateur.prune(model, tmp_path / "file" / "out", method="magnitude", progress=Silent())
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(secateur.OutputError, match="make room"):
        secateur.prune(model, tmp_path / "out", method="magnitude", progress=Silent())
    assert not bool((model.model.layers[0].mlp.down_proj.weight == 0).any())


# Heads that predict further tokens


def with_predictor(folder: Path, kind: str, prefix: str, counter: str) -> Path:
    """A model with a head like its last block, which transformers does not load."""
    family_model(kind).save_pretrained(folder)
    tensors = load_file(folder / SAVED)
    last = config_of(folder)["num_hidden_layers"] - 1
    block = {name.split(f".layers.{last}.")[1]: t for name, t in tensors.items() if f".layers.{last}." in name}
    tensors |= {f"{prefix}layers.0.{name}": t.clone() for name, t in block.items()}
    tensors |= {f"{prefix}norm.weight": torch.ones(32), f"{prefix}fc.weight": torch.ones(32, 64)}
    save_file(tensors, folder / SAVED, metadata={"format": "pt"})
    edit_json(folder / "config.json", **{counter: 1})
    return folder


HEADS = [
    ("qwen3_next", "mtp.", "mtp_num_hidden_layers"),
    ("qwen3_5_text", "mtp.", "mtp_num_hidden_layers"),
    ("qwen3_5_moe_text", "mtp.", "mtp_num_hidden_layers"),
    ("qwen3", "model.mtp.", "num_nextn_predict_layers"),
    ("ernie4_5", "model.mtp_", "num_nextn_predict_layers"),
    ("llama", "model.nextn.", "num_nextn_predict_layers"),
    ("llama", "drafter.", "num_mtp_layers"),
]


@pytest.mark.parametrize(("kind", "prefix", "counter"), HEADS)
def test_shrink_leaves_out_heads_that_nobody_cuts(kind, prefix, counter, tmp_path, messages):
    source = with_predictor(tmp_path / "source", kind, prefix, counter)
    how = {"experts": 0.5} if "moe" in kind or "next" in kind else {"neurons": 0.5, "round": 8}
    secateur.shrink(source, tmp_path / "out", calibration=IDS, progress=Silent(), **how)
    after = tensors_of(tmp_path / "out")
    assert not [name for name in after if name.startswith(f"{prefix}layers")]
    if prefix != "drafter.":
        assert not [name for name in after if name.startswith(prefix)]
    assert config_of(tmp_path / "out")[counter] == 0
    assert any("predict further tokens" in line and "left out" in line for line in messages)


@pytest.mark.parametrize(("kind", "prefix", "counter"), HEADS)
def test_prune_keeps_them_byte_for_byte(kind, prefix, counter, tmp_path):
    source = with_predictor(tmp_path / "source", kind, prefix, counter)
    secateur.prune(source, tmp_path / "out", method="magnitude", progress=Silent())
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    heads = [name for name in before if name.startswith(prefix)]
    assert heads and all(torch.equal(before[name], after[name]) for name in heads)
    assert config_of(tmp_path / "out")[counter] == 1
