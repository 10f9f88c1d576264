"""Checkpoints as other tools leave them: which weights are the model's, what they hold, and how they are named."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import secateur
from secateur.models.checkpoint import config_of, shard_names
from secateur.models.shards import read_header
from secateur.models.source import quantises
from secateur.progress import Silent
from tiny import TEXT, edit_json, rows, same_bytes, save_tiny, tensors_of

SAVED = "model.safetensors"
UP = "model.layers.0.mlp.up_proj.weight"
IDS = rows(6, 20)


@pytest.fixture
def source(model_directory, tmp_path) -> Path:
    return Path(shutil.copytree(model_directory("llama", "bfloat16"), tmp_path / "source"))


@pytest.fixture
def text(tmp_path) -> str:
    (tmp_path / "text.txt").write_text(TEXT * 10, encoding="utf-8")
    return str(tmp_path / "text.txt")


def prune(model: Path, **options: Any) -> dict[str, torch.Tensor]:
    out = model.with_name("out")
    secateur.prune(model, out, method="magnitude", progress=Silent(), **options)
    return tensors_of(out)


def every_command(model: Path, text: str) -> dict[str, Any]:
    """What each command makes of a model's directory, but for `bench`, whose processes take seconds."""
    quiet, folder = {"progress": Silent()}, model.parent
    return {
        "prune": lambda: prune(model),
        "pack": lambda: secateur.pack(model, folder / "packed", **quiet),
        "shrink": lambda: secateur.shrink(model, folder / "small", layers=[0], **quiet),
        "finetune": lambda: secateur.finetune(
            model, folder / "tuned", IDS, steps=2, method="magnitude", sparsity=0.5, **quiet
        ),
        "eval": lambda: secateur.evaluate(model, text=text, seqlen=16, **quiet),
        "inspect": lambda: secateur.inspect(model, **quiet),
        "generate": lambda: secateur.generate(model, "The gardener", tokens=2),
        "prune in memory": lambda: secateur.prune(model, method="magnitude", **quiet),
    }


def refused(model: Path, text: str, *words: str, by: tuple[str, ...] = ()) -> None:
    for name, command in every_command(model, text).items():
        if by and name not in by:
            continue
        with pytest.raises(secateur.ModelError) as error:
            command()
        line = str(error.value)
        assert "\n" not in line and all(word in line for word in words), (name, line)
    assert not (model.parent / "out").exists()


def in_halves(model: Path, prefix: str = "model-0000", index: str = "model.safetensors.index.json") -> Path:
    """Write a model's one file as two shards and an index; the one file stays."""
    tensors = load_file(model / SAVED)
    names = sorted(tensors)
    where = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"{prefix}{number}.safetensors"
        save_file({name: tensors[name] for name in part}, model / shard, metadata={"format": "pt"})
        where |= dict.fromkeys(part, shard)
    (model / index).write_text(json.dumps({"metadata": {}, "weight_map": where}), encoding="utf-8")
    return model


def all_of(value: float, model: Path, name: str = SAVED) -> None:
    tensors = {key: torch.full_like(tensor, value) for key, tensor in load_file(model / SAVED).items()}
    save_file(tensors, model / name, metadata={"format": "pt"})


def opened(model: Path) -> set[float]:
    return set(AutoModelForCausalLM.from_pretrained(model).model.layers[0].mlp.up_proj.weight.flatten().tolist())


# Which weights are the model's


def test_the_single_file_comes_before_an_index(source, text):
    in_halves(source)
    all_of(0.5, source)
    assert shard_names(source) == [SAVED]
    assert opened(source) == {0.5}
    found = prune(source)
    assert set(found[UP].flatten().tolist()) == {0.0, 0.5}
    assert {path.name for path in source.with_name("out").glob("model*")} == {SAVED}
    assert secateur.evaluate(source, text=text, seqlen=16, progress=Silent())["loss"] == pytest.approx(
        torch.tensor(128.0).log().item(), abs=1e-3
    )


def test_an_index_without_the_single_file(source):
    expected = prune(source)
    shutil.rmtree(source.with_name("out"))
    in_halves(source)
    (source / SAVED).unlink()
    assert shard_names(source) == ["model-00001.safetensors", "model-00002.safetensors"]
    assert same_bytes(prune(source), expected)


@pytest.mark.parametrize("kind", ["file", "index"])
def test_what_the_config_names_comes_first(kind, source, messages):
    all_of(0.25, source, "other.safetensors")
    edit_json(source / "config.json", transformers_weights="other.safetensors")
    if kind == "index":
        shutil.copy(source / SAVED, source / "kept.safetensors")
        shutil.copy(source / "other.safetensors", source / SAVED)
        in_halves(source, "other-", "other.safetensors.index.json")
        (source / "kept.safetensors").rename(source / SAVED)
        edit_json(source / "config.json", transformers_weights="other.safetensors.index.json")
    assert opened(source) == {0.25}
    found = prune(source)
    assert set(found[UP].flatten().tolist()) == {0.0, 0.25}
    assert opened(source.with_name("out")) == {0.0, 0.25}
    assert "transformers_weights" not in config_of(source.with_name("out"))
    assert any("left out" in line and SAVED in line for line in messages)


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.safetensors", 3, "none.safetensors"])
def test_what_the_config_names_lies_in_the_directory(name, source):
    edit_json(source / "config.json", transformers_weights=name)
    with pytest.raises(secateur.ModelError, match=r"outside the model's directory|is missing"):
        prune(source)


# Adapters on disk


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a model"])
def test_an_adapter_is_to_be_merged_first(beside, source, text, tmp_path):
    import peft

    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", r=4)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(source), config)
    run = tmp_path / "run"
    model.save_pretrained(run)
    if beside:
        model.merge_and_unload().save_pretrained(run)
    refused(run, text, "merge it first", "merge_and_unload")


# What the files hold


DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
}


def add_raw(path: Path, name: str, code: str, shape: list[int], data: bytes) -> None:
    """Put a tensor of any dtype into a safetensors file."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    header[name] = {"dtype": code, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + body + data)


def raw_bytes(directory: Path, name: str) -> tuple[str, tuple[int, ...], bytes]:
    info = read_header(directory / SAVED)[0][name]
    return info.code, info.shape, info.path.read_bytes()[info.begin : info.end]


@pytest.mark.parametrize("dtype", ["auto", "float16"])
@pytest.mark.parametrize(
    ("code", "bits"), [*((c, 8 * d.itemsize) for c, d in DTYPES.items()), ("F8_E8M0", 8), ("F4", 4), ("F6_E2M3", 6)]
)
def test_a_tensor_of_any_dtype_that_is_none_of_the_models_comes_along(code, bits, dtype, source):
    data = bytes(range(8 * bits // 8))
    add_raw(source / SAVED, "extra.table", code, [8], data)
    secateur.prune(source, source.with_name("out"), method="magnitude", dtype=dtype, progress=Silent())
    assert raw_bytes(source.with_name("out"), "extra.table") == (code, (8,), data)


@pytest.mark.parametrize("code", [*DTYPES, "I8"])
def test_weights_that_cannot_be_pruned_are_named_by_their_dtype(code, source, text):
    dtype = DTYPES.get(code, torch.int8)
    tensors = load_file(source / SAVED)
    tensors[UP] = tensors[UP].to(torch.float32).to(dtype)
    save_file(tensors, source / SAVED, metadata={"format": "pt"})
    refused(
        source, text, UP, str(dtype).removeprefix("torch."), "16-bit", by=("prune", "pack", "shrink", "eval", "inspect")
    )


def test_metadata_of_null_is_none(source):
    expected = prune(source)
    shutil.rmtree(source.with_name("out"))
    raw = (source / SAVED).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    head = json.dumps({**json.loads(raw[8 : 8 + length]), "__metadata__": None}).encode()
    (source / SAVED).write_bytes(struct.pack("<Q", len(head)) + head + raw[8 + length :])
    assert same_bytes(prune(source), expected)


SPARSE = {
    "version": "0.12.2",
    "quant_method": "compressed-tensors",
    "sparsity_config": {"format": "dense", "global_sparsity": 0.5, "sparsity_structure": "2:4", "targets": ["Linear"]},
}


def test_a_model_that_llm_compressor_pruned_is_not_quantised(source, text):
    edit_json(source / "config.json", quantization_config=SPARSE)
    for name, command in every_command(source, text).items():
        if name != "pack":  # of a dense model nothing would shrink
            command()
        for out in ("out", "small", "tuned"):
            assert "quantization_config" not in config_of(source.with_name(out))
    edit_json(source.with_name("out") / "config.json", quantization_config=SPARSE)
    packed = source.with_name("packed again")
    secateur.pack(source.with_name("out"), packed, progress=Silent())
    assert config_of(packed)["quantization_config"]["quant_method"] == "secateur"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (None, False),
        ({}, False),
        (SPARSE, False),
        ({**SPARSE, "config_groups": {}}, False),
        ({**SPARSE, "config_groups": {"group_0": {}}}, True),
        ({**SPARSE, "sparsity_config": {"format": "sparse-24-bitmask"}}, True),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {}}}, True),
        ({"quant_method": "bitsandbytes", "_load_in_4bit": False, "_load_in_8bit": False}, False),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, True),
        ({"quant_method": "fp8"}, True),
        ({"quant_method": "gptq", "bits": 4}, True),
    ],
)
def test_what_quantises(settings, expected):
    assert quantises(settings) == expected


def test_numbers_that_do_not_fit_are_found_before_the_work(source):
    class Counts(Silent):
        tasks: ClassVar[list[str]] = []

        def start(self, task: str, total: float, done: float = 0) -> None:
            self.tasks.append(task)

    tensors = load_file(source / SAVED)
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, source / SAVED, metadata={"format": "pt"})
    with pytest.raises(secateur.NumericsError, match=r"model\.norm\.weight: does not fit torch\.float16"):
        secateur.prune(source, source.with_name("out"), method="magnitude", dtype="float16", progress=Counts())
    with pytest.raises(secateur.NumericsError, match=r"model\.norm\.weight: does not fit torch\.float16"):
        secateur.shrink(source, source.with_name("out"), layers=[0], dtype="float16", progress=Counts())
    assert set(Counts.tasks) == {"reading the model"}
    assert not source.with_name("out.secateur").exists()


# How tensors are named, and small faults


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "base_model.model.", "_fsdp_wrapped_module."], ids=lambda text: text.strip(".")
)
def test_names_of_a_wrapper_are_told(prefix, source, text):
    save_file({prefix + name: t for name, t in load_file(source / SAVED).items()}, source / SAVED)
    refused(source, text, f"{prefix}", "wrapper", "save the model itself")


def test_names_of_blocks_that_were_compiled_one_by_one(source, text):
    tensors = load_file(source / SAVED)
    save_file({name.replace(".mlp.", "._orig_mod.mlp."): t for name, t in tensors.items()}, source / SAVED)
    refused(source, text, "_orig_mod", "wrapper")


def test_a_pad_token_outside_of_the_vocabulary(source, text):
    edit_json(source / "config.json", pad_token_id=128)
    refused(source, text, "pad_token_id 128 is outside of the vocabulary of 128")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize("name", ["config.json", SAVED, "model.safetensors.index.json"])
def test_pointers_of_git_lfs(name, source, text):
    if name.endswith("index.json"):
        (source / SAVED).unlink()
    (source / name).write_text(POINTER, encoding="utf-8")
    refused(source, text, name, "git lfs pull")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_is_a_pointer_is_named_and_needed_for_text_alone(
    name, model_directory, tmp_path, text, messages
):
    source = Path(shutil.copytree(model_directory(), tmp_path / "source"))
    (source / name).write_text(POINTER, encoding="utf-8")
    with pytest.raises(secateur.DataError, match="tokenizer"):
        secateur.prune(source, tmp_path / "out", method="wanda", calibration=text, progress=Silent())
    assert any(name in line and "git lfs pull" in line for line in messages)
    secateur.prune(source, tmp_path / "out", method="wanda", calibration=IDS, progress=Silent())


def test_what_is_never_pruned_may_be_excluded(source, messages):
    expected = prune(source)
    shutil.rmtree(source.with_name("out"))
    found = prune(source, exclude=["lm_head", "embed_tokens"], allocation={"lm_head": 0})
    assert same_bytes(found, expected)
    assert sum("never pruned" in line for line in messages) == 3
    with pytest.raises(secateur.OptionError, match="lm_head is never pruned"):
        prune(source, include="lm_head")
    with pytest.raises(secateur.OptionError, match="found in no matrix name"):
        prune(source, exclude="lm_haed")
    with pytest.raises(secateur.OptionError, match="lm_head"):
        prune(source, allocation={"lm_head": 0.5})


def test_a_class_of_the_config_without_a_head_of_its_own(tmp_path):
    """Published reward models and classifiers keep their class and their tensors."""
    model = save_tiny(tmp_path / "source", "llama", tie_word_embeddings=True)
    tensors = load_file(model / SAVED) | {"score.weight": torch.ones(2, 32)}
    save_file(tensors, model / SAVED, metadata={"format": "pt"})
    edit_json(model / "config.json", architectures=["LlamaForSequenceClassification"], num_labels=2)
    found = prune(model)
    assert torch.equal(found["score.weight"], torch.ones(2, 32))
    secateur.shrink(model, tmp_path / "small", neurons=0.5, round=8, calibration=IDS, progress=Silent())
    from transformers import LlamaForSequenceClassification

    for out in ("out", "small"):
        again, info = LlamaForSequenceClassification.from_pretrained(tmp_path / out, output_loading_info=True)
        assert not info["missing_keys"] and not info["mismatched_keys"]
        assert torch.equal(again.score.weight, torch.ones(2, 32))
