"""Blocks from disk are those of from_pretrained; a live model leaves as it came."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import secateur
from secateur.errors import NumericsError
from secateur.models.disk_host import DiskHost
from secateur.models.hosts import block_matrices
from secateur.models.live_host import LiveHost
from secateur.models.source import open_checkpoint
from secateur.pruning import SUMSQ, Method
from tiny import DTYPES, FAMILIES, as_read, bytes_of, rows, save_tiny, tensors_of, tiny_model

every_family = pytest.mark.parametrize("family", FAMILIES)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
CPU = torch.device("cpu")


def disk(directory, dtype=None):
    return DiskHost(open_checkpoint(directory), CPU, dtype)


def run(host, ids):
    """All blocks one after the other: hidden states and logits."""
    hidden, calls = host.skeleton.record(ids)
    states = []
    with torch.no_grad():
        for index, call in enumerate(calls):
            with host.block(index) as block:
                hidden = call.run(block, hidden)
            states.append(hidden)
    return states, host.skeleton.logits(ids, hidden)


@every_family
@every_dtype
def test_blocks_from_disk_are_those_of_the_whole_model(model_directory, family, dtype):
    directory, ids = model_directory(family, dtype), rows(2, 17)
    whole = as_read(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval())
    host = disk(directory)
    for index, real in enumerate(LiveHost(whole).skeleton.real):
        with host.block(index) as block:
            expected, found = real.state_dict(), block.state_dict()
            assert expected.keys() == found.keys()
            assert all(torch.equal(expected[name], found[name]) for name in expected)
            assert not block.training
    states, logits = run(host, ids)
    with torch.no_grad():
        own = whole(input_ids=ids, use_cache=False, output_hidden_states=True)
    for state, expected in zip(states[:-1], own.hidden_states[1:-1], strict=True):
        assert torch.equal(state, expected)
    assert torch.equal(logits, own.logits)


@every_family
def test_a_block_is_in_memory_only_while_it_is_used(model_directory, family):
    host = disk(model_directory(family))

    def where():
        return [{p.device.type for p in block.parameters()} for block in host.skeleton.real]

    assert where() == [{"meta"}] * 3
    with host.block(1):
        assert where() == [{"meta"}, {"cpu"}, {"meta"}]
    with pytest.raises(ZeroDivisionError), host.block(2):
        1 / 0  # noqa: B018
    assert where() == [{"meta"}] * 3
    assert all(t.device.type == "cpu" for module in host.skeleton.outside for t in module.parameters(recurse=False))


@every_family
@every_dtype
def test_names_and_bytes_come_back(model_directory, family, dtype):
    directory = model_directory(family, dtype)
    host, source = disk(directory), tensors_of(directory)
    found = {}
    for index in range(3):
        matrices = block_matrices(host, index)
        with host.block(index):
            changed = {m.parameter: m.weight.detach().to(host.written_dtype(m)) for m in matrices.values()}
            found |= host.on_disk(changed)
    assert len(found) == (21 if family != "gpt2" else 12)
    assert all(bytes_of(tensor) == bytes_of(source[name]) for name, tensor in found.items())
    assert {tensor.dtype for tensor in found.values()} == {DTYPES[dtype]}


def test_blocks_that_lie_in_several_shards(sharded, model_directory):
    ids = rows(1, 9)
    assert torch.equal(run(disk(sharded), ids)[1], run(disk(model_directory()), ids)[1])


def test_written_tensors_stand_in_for_the_sources(model_directory):
    host = disk(model_directory())
    name = "model.layers.1.mlp.up_proj.weight"
    with host.block(1, {name: torch.full((48, 32), 0.5, dtype=torch.bfloat16)}) as block:
        assert (block.mlp.up_proj.weight == 0.5).all() and block.mlp.up_proj.weight.dtype == torch.float32
        assert not (block.mlp.gate_proj.weight == 0.5).any()
    with host.block(1) as block:
        assert torch.equal(block.mlp.up_proj.weight, tensors_of(model_directory())[name])


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.bfloat16), (torch.float16, torch.float16)])
def test_written_dtype(model_directory, dtype, expected):
    host = disk(model_directory("llama", "bfloat16"), dtype)
    assert {host.written_dtype(m) for m in block_matrices(host, 0).values()} == {expected}


@pytest.mark.parametrize("config", ["llama", "llama-tied"])
def test_a_head_on_disk_is_used_unless_it_is_tied(tmp_path, config):
    from safetensors.torch import save_file

    directory = save_tiny(tmp_path / "m", config)
    tensors = tensors_of(directory)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    ids = rows(1, 9)
    whole = as_read(AutoModelForCausalLM.from_pretrained(directory).eval())
    assert torch.equal(run(disk(directory), ids)[1], whole(ids).logits)


# A live model leaves as it came.


def lived_in(family, dtype="float32"):
    """A model in a state that nobody would guess: partly frozen, partly in training mode."""
    model = tiny_model(family, dtype)
    model.train()
    first = LiveHost(model).skeleton.real[0]
    first.eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 != 0)
    model.register_forward_hook(lambda *args: None)
    return model


def state(model):
    """Everything of a model but the numbers in it."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {
        "config": model.config.to_dict(),
        "tensors": [
            (name, id(t), t.data_ptr(), t.dtype, t.device, t.requires_grad, t.stride(), sorted(vars(t)))
            for name, t in tensors
        ],
        "modules": [
            (name, id(m), m.training, sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
            for name, m in model.named_modules()
        ],
    }


def changed_tensors(model, before):
    return sorted(name for name, p in model.state_dict().items() if bytes_of(p) != before[name])


def numbers(model):
    return {name: bytes_of(p) for name, p in model.state_dict().items()}


@every_family
@every_dtype
def test_a_live_model_leaves_as_it_came_but_for_its_zeros(family, dtype):
    model = lived_in(family, dtype)
    host = LiveHost(model)
    parameters = [m.parameter for i in range(3) for m in block_matrices(host, i).values()]
    before, former = state(model), numbers(model)
    result = secateur.prune(model, calibration=rows(), pattern="2:4")
    assert result.model is model and result.path is None
    assert state(model) == before
    assert changed_tensors(model, former) == sorted(parameters)
    for name in parameters:
        assert 0.49 < float((model.state_dict()[name] == 0).float().mean()) < 0.51


@pytest.mark.parametrize("error", [NumericsError, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("calls", [1, 3, 10])
def test_a_live_model_leaves_as_it_came_after_an_error(error, dtype, calls):
    model = lived_in("llama", dtype)
    before, former = state(model), numbers(model)
    heard = []

    def breaks(W_OI, statistics, sparsity, pattern):
        heard.extend([] if W_OI.shape == (8, 8) else [1])  # such an example may come first
        if len(heard) == calls:
            raise error("so it is")
        return W_OI * 0, torch.zeros_like(W_OI, dtype=torch.bool)

    with pytest.raises(error) as caught:
        secateur.prune(model, method=Method(breaks, frozenset({SUMSQ})), calibration=rows())
    assert state(model) == before
    pruned = changed_tensors(model, former)
    assert len(pruned) == (7 if calls == 10 else 0)
    assert all(name.startswith("model.layers.0.") for name in pruned)
    if error is NumericsError:
        assert ("blocks 0 to 0 are already pruned" in str(caught.value)) == (calls == 10)


def test_a_live_model_leaves_as_it_came_when_evaluated(tmp_path, tokenizer):
    (tmp_path / "text.txt").write_text("A good cut is small. " * 20)
    model = lived_in("llama", "bfloat16")
    before, former = state(model), numbers(model)
    secateur.evaluate(model, text=str(tmp_path / "text.txt"), tokenizer=tokenizer, seqlen=16, windows=2)
    assert state(model) == before and numbers(model) == former
    with pytest.raises(secateur.OptionError):
        secateur.evaluate(model, text=str(tmp_path / "text.txt"), tokenizer=tokenizer, seqlen=10_000)
    assert state(model) == before


def test_a_model_in_bfloat16_is_computed_in_float32():
    """The same masks as for the same weights held in float32, and kept weights as they were."""
    half = tiny_model("llama", "bfloat16")
    former = {name: p.clone() for name, p in half.state_dict().items()}
    full = tiny_model("llama", "bfloat16").float()
    secateur.prune(half, calibration=rows(), method="wanda")
    secateur.prune(full, calibration=rows(), method="wanda")
    for name, weight in half.state_dict().items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight.float(), full.state_dict()[name])
        assert torch.equal(weight[weight != 0], former[name][weight != 0])


def test_torch_is_left_as_it_was():
    settings = torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(), torch.random.get_rng_state()
    secateur.prune(tiny_model("llama"), method="magnitude", threads=2)
    assert (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()) == settings[:3]
    assert torch.equal(torch.random.get_rng_state(), settings[3])


def test_gradients_stay():
    model = tiny_model("llama", "bfloat16")
    model(input_ids=rows(1, 8), labels=rows(1, 8)).loss.backward()
    gradients = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters()}
    secateur.prune(model, calibration=rows())
    for name, p in model.named_parameters():
        assert p.grad is gradients[name][0] and torch.equal(p.grad, gradients[name][1])
