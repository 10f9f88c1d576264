"""Where a model lies: on one device, spread over several by accelerate, or in part on disk."""

import copy

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from transformers import AutoConfig, AutoModelForCausalLM

import secateur
from families import FAMILIES
from secateur.errors import ModelError
from secateur.models.disk_host import DiskHost
from secateur.models.source import open_checkpoint
from tiny import bytes_of, rows, save_tiny, tensors_of, tiny_model

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: not measured")
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
ROWS = [*rows(3, 24), *rows(3, 17)]
PARTS = ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", *(f"model.layers.{i}" for i in range(3))]
METHODS = ["wanda", "sparsegpt"]


@pytest.fixture(autouse=True)
def no_timing(monkeypatch):
    """An estimate measures the machine; no test needs that."""
    monkeypatch.setattr("secateur.pipeline.estimate._operations_per_second", lambda: 1e9)


def weights_of(model):
    return {name: weight.detach().cpu().clone() for name, weight in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(bytes_of(a[name]) == bytes_of(b[name]) for name in a)


def hooks_of(model):
    """Everything that accelerate left in a model."""
    return {
        name: (id(vars(module).get("_hf_hook")), id(vars(module).get("forward")), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }


def spread(model, parts):
    """Give a model its hooks; `parts` says what lies elsewhere than the rest, which is on the CPU."""
    return dispatch_model(model, {name: parts.get(name, "cpu") for name in PARTS}, main_device="cpu", force_hooks=True)


def one_by_one(model):
    """Hooks on blocks alone, of their own making."""
    for block in model.model.layers:
        add_hook_to_module(block, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    return model


HOOKED = {
    "whole": lambda model: dispatch_model(model, {"": "cpu"}, force_hooks=True),
    "parts": lambda model: spread(model, {}),
    "blocks": one_by_one,
}


@pytest.mark.parametrize("propagate", ["block", "sequential"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", HOOKED)
def test_hooks_change_nothing_and_stay(way, dtype, propagate):
    plain, hooked = tiny_model("llama", dtype), HOOKED[way](tiny_model("llama", dtype))
    before, own = hooks_of(hooked), {name: id(p) for name, p in hooked.named_parameters()}
    assert len({hook for hook, *_ in before.values()}) > (3 if way != "whole" else 1)
    options = {"calibration": ROWS, "method": "sparsegpt", "propagate": propagate}
    assert secateur.prune(hooked, **options).report["matrices"] == secateur.prune(plain, **options).report["matrices"]
    assert same(weights_of(hooked), weights_of(plain))
    assert hooks_of(hooked) == before
    assert {name: id(p) for name, p in hooked.named_parameters()} == own
    ids = rows(2, 9)
    with torch.no_grad():
        assert torch.equal(hooked(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_a_hooked_model_is_measured_as_the_plain_one(tmp_path, tokenizer):
    text = tmp_path / "text.txt"
    text.write_text("A good cut is small, clean and made just above a bud. " * 20)
    options = {"text": str(text), "seqlen": 16, "tokenizer": tokenizer}
    hooked = HOOKED["parts"](tiny_model("llama"))
    before = hooks_of(hooked)
    assert secateur.evaluate(hooked, **options) == secateur.evaluate(tiny_model("llama"), **options)
    assert hooks_of(hooked) == before


@pytest.mark.parametrize("elsewhere", ["model.layers.1", "lm_head", "model.layers.0.mlp"])
def test_what_was_left_on_disk_is_refused_by_name(tmp_path, elsewhere, tokenizer):
    model = tiny_model("llama")
    parts = dict.fromkeys(PARTS, "cpu")
    if elsewhere not in parts:
        del parts["model.layers.0"]
        parts |= {f"model.layers.0.{name}": "cpu" for name in ("self_attn", "input_layernorm")}
        parts |= {"model.layers.0.post_attention_layernorm": "cpu"}
    model = dispatch_model(model, {**parts, elsewhere: "disk"}, offload_dir=tmp_path)
    before, hooks, ids = copy.deepcopy(dict(model.named_parameters())), hooks_of(model), rows(2, 9)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    text = tmp_path / "text.txt"
    text.write_text("A good cut is small. " * 20)
    for use in (
        lambda: secateur.prune(model, calibration=ROWS),
        lambda: secateur.prune(model, method="magnitude"),
        lambda: secateur.prune(model, tmp_path / "out", method="magnitude"),
        lambda: secateur.evaluate(model, text=str(text), seqlen=16, tokenizer=tokenizer),
    ):
        with pytest.raises(ModelError) as caught:
            use()
        name, _, said = str(caught.value).partition(": ")
        assert name.startswith(elsewhere) and before[name].device.type == "meta"
        assert "on disk" in said and "directory" in said and "\n" not in said
    assert hooks_of(model) == hooks
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, parameter in before.items():
        assert after[name].device == parameter.device
        assert parameter.device.type == "meta" or torch.equal(after[name], parameter)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, logits)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.secateur").exists()


# On each device.


def close(a, b):
    """The same weights but for float noise, which may change the choice between weights of nearly equal score."""
    zeros = sum(int((a[name] == 0).ne(b[name] == 0).sum()) for name in a)
    far = max(float((a[name] - b[name]).norm() / b[name].norm()) for name in a)
    return far <= 0.05 and zeros <= 0.02 * sum(weight.numel() for weight in a.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("device", DEVICES)
def test_hidden_states_that_become_float32(tmp_path, device, dtype, tokenizer):
    """Mamba's embeddings have the weights' dtype, and what its blocks return is float32."""
    model = tiny_model("mamba", dtype, state_size=4)
    assert model.config.residual_in_fp32
    text = tmp_path / "text.txt"
    text.write_text("A good cut is small, clean and made just above a bud. " * 40)
    options = {"text": str(text), "seqlen": 16, "tokenizer": tokenizer}
    expected = secateur.evaluate(model, **options)["perplexity"]
    assert secateur.evaluate(model.to(device), **options)["perplexity"] == pytest.approx(expected, rel=0.02)
    assert secateur.prune(model, calibration=ROWS).report["sparsity"] > 0


@pytest.mark.parametrize("propagate", ["block", "sequential"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_live_model_is_pruned_where_it_is(device, kind, method, propagate):
    model, reference = tiny_model(kind).to(device), tiny_model(kind)
    options = {"calibration": ROWS, "method": method, "pattern": "row", "propagate": propagate}
    report = secateur.prune(model, **options).report
    secateur.prune(reference, **options)
    assert report["plan"]["device"].split(":")[0] == device
    assert report["sparsity"] == 0.5
    assert {p.device.type for p in model.parameters()} == {device}
    assert close(weights_of(model), weights_of(reference))
    assert torch.isfinite(model(input_ids=ROWS[0][None].to(device)).logits).all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_block_from_disk_has_the_dtypes_of_a_live_one(tmp_path, device):
    """Some parameters stay float32 in a model of bfloat16; on a CPU all are float32."""
    config = AutoConfig.for_model("ernie4_5_moe", **copy.deepcopy(FAMILIES["ernie4_5_moe"]))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    live = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32" if device == "cpu" else "auto")
    expected = {name: parameter.dtype for name, parameter in live.model.layers[1].named_parameters()}
    assert len(set(expected.values())) == (1 if device == "cpu" else 2)
    with DiskHost(open_checkpoint(tmp_path), torch.device(device)).block(1) as block:
        assert {name: parameter.dtype for name, parameter in block.named_parameters()} == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", DEVICES)
def test_from_disk_to_disk(tmp_path, device, dtype):
    source = save_tiny(tmp_path / "source", "llama", dtype)
    options = {"calibration": ROWS, "method": "sparsegpt"}
    report = secateur.prune(source, tmp_path / "out", **options, device=device).report
    live = AutoModelForCausalLM.from_pretrained(source, dtype="auto").to(device)
    secateur.prune(live, **options)
    assert report["plan"]["device"].split(":")[0] == device
    assert same(tensors_of(tmp_path / "out"), weights_of(live))
    assert {weight.device.type for weight in live.state_dict().values()} == {device}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_live_model_is_measured_as_from_disk(tmp_path, device, dtype, tokenizer):
    """Far from the start a coarse rotary frequency would show."""
    source = save_tiny(tmp_path / "source", "llama", dtype, tokenizer=tokenizer, max_position_embeddings=1024)
    text = tmp_path / "text.txt"
    text.write_text("A good cut is small, clean and made just above a bud. " * 100)
    options = {"text": str(text), "seqlen": 1024, "windows": 1}
    live = AutoModelForCausalLM.from_pretrained(source, dtype="auto").to(device)
    found = secateur.evaluate(live, tokenizer=tokenizer, **options)["perplexity"]
    assert found == pytest.approx(secateur.evaluate(source, device=device, **options)["perplexity"], rel=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_a_path_without_output_is_loaded_there(tmp_path, device):
    source = save_tiny(tmp_path / "source", "llama")
    model = secateur.prune(source, calibration=ROWS, device=device).model
    assert {p.device.type for p in model.parameters()} == {device}


MIXTURES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("device", DEVICES)
def test_a_mixture(tmp_path, device, kind, dtype):
    """On a GPU its experts run by another kernel inside the model than while they are watched."""
    model = tiny_model(kind, dtype, **MIXTURES[kind])
    model.save_pretrained(tmp_path / "source")
    report = secateur.prune(tmp_path / "source", tmp_path / "out", calibration=ROWS, device=device).report
    assert report["sparsity"] == pytest.approx(0.5)
    assert secateur.prune(model.to(device), calibration=ROWS).report["sparsity"] == pytest.approx(0.5)


@pytest.mark.parametrize("parts", [["model.layers.1"], ["model.layers.1", "model.layers.2", "model.norm", "lm_head"]])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_model_spread_over_two_devices(device, method, parts):
    """Some blocks on the CPU and others on the device, each pruned where it lies."""
    model, reference = spread(tiny_model("llama"), dict.fromkeys(parts, device)), tiny_model("llama")
    places, hooks = {name: p.device for name, p in model.named_parameters()}, hooks_of(model)
    assert {place.type for place in places.values()} == {"cpu", device}
    options = {"calibration": ROWS, "method": method}
    report = secateur.prune(model, **options).report
    secateur.prune(reference, **options)
    assert report["sparsity"] == 0.5
    assert {name: p.device for name, p in model.named_parameters()} == places
    assert hooks_of(model) == hooks
    assert close(weights_of(model), weights_of(reference))
    if device == "cpu":
        assert same(weights_of(model), weights_of(reference))


@pytest.mark.parametrize("device", DEVICES)
def test_large_hidden_states_in_float16(device):
    """Their norm is more than float16 holds; the block's error is told all the same."""
    model = tiny_model("llama", "float16").to(device)
    model.model.embed_tokens.weight.data[:, 0] = 3000
    blocks = secateur.prune(model, calibration=rows(24, 60)).report["blocks"]
    assert all(block["output_error"] > 0 for block in blocks)


@pytest.mark.parametrize("device", DEVICES)
def test_perplexity(tmp_path, device, tokenizer):
    source = save_tiny(tmp_path / "source", "llama", tokenizer=tokenizer)
    text = tmp_path / "text.txt"
    text.write_text("A good cut is small, clean and made just above a bud. " * 40)
    options = {"text": str(text), "seqlen": 16}
    expected = secateur.evaluate(source, **options, device="cpu")["perplexity"]
    live = tiny_model("llama").to(device)
    for model, more in ((source, {"device": device}), (live, {"tokenizer": tokenizer})):
        found = secateur.evaluate(model, **options, **more)
        assert found["perplexity"] == pytest.approx(expected, rel=1e-3)
    assert {p.device.type for p in live.parameters()} == {device}
