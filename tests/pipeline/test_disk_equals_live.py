"""The same weights, bit for bit, whether a model is pruned on disk or in memory; and all else as in the source."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import secateur
from secateur.pruning import NM, Block, Matrix, Row, parse_pattern
from tiny import (
    DTYPES,
    FAMILIES,
    bytes_of,
    edit_json,
    files_below,
    rows,
    same_bytes,
    save_tiny,
    tensors_of,
    tiny_model,
)

METHODS = ["magnitude", "wanda", "ria", "sparsegpt"]
PATTERNS = ["row", "matrix", "2:4", "block:4x8"]
WAYS = [*((m, "2:4", "llama") for m in METHODS), *(("wanda", p, "llama") for p in PATTERNS if p != "2:4")]
WAYS += [("sparsegpt", "matrix", family) for family in FAMILIES] + [("sparsegpt", "block:4x8", "gpt2")]


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto")


def expected_zeros(shape, pattern, sparsity):
    rows_, columns = shape
    if isinstance(pattern, Row):
        return rows_ * round(sparsity * columns)
    if isinstance(pattern, Matrix):
        return round(sparsity * rows_ * columns)
    if isinstance(pattern, NM):
        assert columns % pattern.m == 0
        return rows_ * columns * (pattern.m - pattern.n) // pattern.m
    assert isinstance(pattern, Block) and rows_ % 4 == 0 and columns % 8 == 0
    return 32 * round(sparsity * (rows_ // 4) * (columns // 8))


def check_pattern(W_OI, pattern):
    kept = W_OI != 0
    if isinstance(pattern, Row):
        assert (kept.sum(1) == kept.sum(1)[0]).all()
    elif isinstance(pattern, NM):
        assert (kept.reshape(-1, pattern.m).sum(1) == pattern.n).all()
    elif isinstance(pattern, Block):
        tiles = kept.reshape(kept.shape[0] // pattern.height, pattern.height, -1, pattern.width).sum((1, 3))
        assert set(tiles.unique().tolist()) <= {0, pattern.height * pattern.width}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("method", "pattern", "family"), WAYS)
def test_disk_equals_live(tmp_path, model_directory, method, pattern, family, dtype):
    source, out = model_directory(family, dtype), tmp_path / "out"
    options = {"method": method, "pattern": pattern, "calibration": rows(6, 24)}
    report = secateur.prune(source, out, **options).report
    live = secateur.prune(load(source), **options)
    written, former = tensors_of(out), tensors_of(source)

    # the same in memory, as loaded again, and in the reports
    again = load(out).state_dict()
    for name, weight in live.model.state_dict().items():
        assert weight.dtype == again[name].dtype == DTYPES[dtype]
        assert bytes_of(weight) == bytes_of(again[name]), name
    assert report["matrices"] == live.report["matrices"]
    assert report["sparsity"] == live.report["sparsity"]

    # everything that is not a pruned matrix is the source's, byte for byte
    pruned = {row["name"] + ".weight": row for row in report["matrices"]}
    assert written.keys() == former.keys()
    for name, tensor in written.items():
        assert tensor.dtype == former[name].dtype and tensor.shape == former[name].shape
        assert (bytes_of(tensor) == bytes_of(former[name])) == (name not in pruned)

    # exact counts, on disk and in the report
    shape = parse_pattern(pattern)
    for name, row in pruned.items():
        W_OI = written[name].T if family == "gpt2" else written[name]
        zeros = int((W_OI == 0).sum())
        assert zeros == row["zeros"] == row["pruned"] == expected_zeros(W_OI.shape, shape, 0.5)
        assert not W_OI[W_OI == 0].signbit().any()
        assert row["shape"] == list(W_OI.shape) and row["sparsity"] == zeros / W_OI.numel()
        check_pattern(W_OI, shape)
    assert report["weights"] == sum(written[name].numel() for name in pruned)
    assert report["zeros"] == sum(row["zeros"] for row in pruned.values())
    assert report == json.loads((out / "secateur.json").read_text())
    assert not out.with_name("out.secateur").exists()


def test_the_small_files_come_along(tmp_path, model_directory):
    source, out = model_directory("llama"), tmp_path / "out"
    secateur.prune(source, out, method="magnitude")
    before, after = files_below(source), files_below(out)
    assert after.keys() - before.keys() == {"secateur.json", "README.md"}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"model.safetensors"}


def test_a_sharded_source_keeps_its_shards(tmp_path, sharded, model_directory):
    out, whole = tmp_path / "out", tmp_path / "whole"
    secateur.prune(sharded, out, calibration=rows())
    secateur.prune(model_directory("llama"), whole, calibration=rows())
    index = "model.safetensors.index.json"
    assert (
        json.loads((out / index).read_text())["weight_map"] == json.loads((sharded / index).read_text())["weight_map"]
    )
    assert sorted(p.name for p in out.glob("*.safetensors")) == sorted(p.name for p in sharded.glob("*.safetensors"))
    assert same_bytes(tensors_of(out), tensors_of(whole))
    assert torch.equal(load(out).lm_head.weight, load(whole).lm_head.weight)


def lying_anywhere(model, offset):
    """The same model, in memory that is not aligned, its matrices transposed in it; it wants all gradients."""
    for parameter in model.parameters():
        raw = torch.empty(parameter.numel() * parameter.element_size() + 128, dtype=torch.uint8)
        start = -raw.data_ptr() % 64 + offset
        laid = raw[start : start + parameter.numel() * parameter.element_size()].view(parameter.dtype)
        laid = laid.view(parameter.shape[::-1]).permute(*range(parameter.ndim - 1, -1, -1))
        parameter.data = laid.copy_(parameter.data)
    return model.requires_grad_(True)


@pytest.mark.usefixtures("other_processor")
@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba"])
def test_it_does_not_matter_where_and_how_a_model_lies_in_memory(tmp_path, family):
    source, out = tmp_path / "source", tmp_path / "out"
    model = tiny_model(family)
    model.save_pretrained(source)
    options = {"method": "sparsegpt", "calibration": rows(6, 24)}
    secateur.prune(source, out, **options)
    expected = load(out).state_dict()
    for offset in (0, 4, 8, 32):
        live = lying_anywhere(copy.deepcopy(model), offset)
        strides = [parameter.stride() for parameter in live.parameters()]
        secateur.prune(live, **options)
        assert [parameter.stride() for parameter in live.parameters()] == strides
        assert all(parameter.requires_grad for parameter in live.parameters())
        assert all(torch.equal(weight, expected[name]) for name, weight in live.state_dict().items())


def test_one_shard_with_an_index(tmp_path, model_directory):
    """Some models have a single shard that is not called model.safetensors."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(model_directory("llama"), source)
    shard = "model-00001-of-00001.safetensors"
    (source / "model.safetensors").rename(source / shard)
    weight_map = dict.fromkeys(tensors_of(source), shard)
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    secateur.prune(source, out, method="magnitude")
    assert tensors_of(out).keys() == load(out).state_dict().keys()


def test_names_without_the_models_prefix(tmp_path):
    """GPT-2 on the hub was saved without its head: h.0.attn.c_attn.weight, not transformer.h.0.attn.c_attn.weight."""
    source, out = tmp_path / "source", tmp_path / "out"
    model = tiny_model("gpt2")
    model.transformer.save_pretrained(source)
    edit_json(source / "config.json", architectures=["GPT2LMHeadModel"])
    tensors = tensors_of(source) | {"h.0.attn.bias": torch.ones(1, 1, 64, 64)}  # it has this old buffer too
    assert "h.0.attn.c_attn.weight" in tensors
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    secateur.prune(source, out, calibration=rows())
    secateur.prune(model, calibration=rows())
    assert tensors_of(out).keys() == tensors_of(source).keys()
    again = load(out).state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    ("dtype", "source"), [("bfloat16", "float32"), ("float16", "float32"), ("float32", "bfloat16")]
)
def test_dtype_casts_and_says_so(tmp_path, model_directory, dtype, source):
    directory, out = model_directory("llama", source), tmp_path / "out"
    report = secateur.prune(directory, out, calibration=rows(), dtype=dtype, method="wanda").report
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    written, former = tensors_of(out), tensors_of(directory)
    assert {tensor.dtype for tensor in written.values()} == {DTYPES[dtype]}
    pruned = {row["name"] + ".weight" for row in report["matrices"]}
    for name, tensor in written.items():
        kept = tensor != 0 if name in pruned else torch.ones_like(tensor, dtype=torch.bool)
        assert torch.equal(tensor[kept], former[name].to(DTYPES[dtype])[kept])
    assert load(out).dtype == DTYPES[dtype]
    assert {row["zeros"] / row["pruned"] for row in report["matrices"]} == {1.0}


def test_what_a_dtype_cannot_hold_is_refused(tmp_path):
    directory = save_tiny(tmp_path / "m", "llama")
    tensors = tensors_of(directory)
    tensors["model.embed_tokens.weight"][3, 3] = 1e6
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(secateur.SecateurError, match=r"model\.embed_tokens\.weight"):
        secateur.prune(directory, tmp_path / "out", method="magnitude", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_integer_tensors_and_strangers_are_copied(tmp_path):
    directory = save_tiny(tmp_path / "m", "llama")
    tensors = tensors_of(directory) | {"stranger": torch.arange(5), "model.layers.9.mlp.up_proj.weight": torch.ones(2)}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    secateur.prune(directory, tmp_path / "out", method="magnitude", dtype="bfloat16")
    written = tensors_of(tmp_path / "out")
    assert written.keys() == tensors.keys()
    assert torch.equal(written["stranger"], torch.arange(5))
    assert written["model.layers.9.mlp.up_proj.weight"].dtype == torch.bfloat16


def test_a_path_without_output_gives_a_live_model(tmp_path, model_directory):
    result = secateur.prune(model_directory("llama", "bfloat16"), calibration=rows())
    assert result.path is None and result.model.dtype == torch.bfloat16
    secateur.prune(model_directory("llama", "bfloat16"), tmp_path / "out", calibration=rows())
    again = load(tmp_path / "out").state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in result.model.state_dict().items())


def test_a_live_model_can_be_written_too(tmp_path, model_directory):
    model = load(model_directory("llama"))
    result = secateur.prune(model, tmp_path / "out", calibration=rows())
    assert result.model is model and result.path == tmp_path / "out"
    again = load(tmp_path / "out").state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in model.state_dict().items())
    assert json.loads((tmp_path / "out" / "secateur.json").read_text()) == result.report
    assert (tmp_path / "out" / "tokenizer.json").exists()
    with pytest.raises(secateur.OutputError, match="not empty"):
        secateur.prune(load(model_directory("llama")), tmp_path / "out", calibration=rows())
