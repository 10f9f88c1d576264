"""Whatever a model in memory comes in, every function finds the model in it, or says in one line why not."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import secateur
from secateur.models.in_memory import eager, model_in_memory, plain_name
from secateur.training.masks import Masks
from sparse_training import IDS, train_step
from tiny import files_below, rows, same_bytes, tensors_of, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of torch.compile's own
CALIBRATION = rows(4, 16)


@pytest.fixture(scope="module", autouse=True)
def text(tmp_path_factory):
    """Rows of tokens, for models without a tokenizer."""
    global TEXT
    TEXT = str(tmp_path_factory.mktemp("text") / "rows.jsonl")
    Path(TEXT).write_text("\n".join(json.dumps({"input_ids": row}) for row in rows(2, 16).tolist()), "utf-8")


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def with_compiled_blocks(model):
    for block in model.model.layers:
        block.compile(backend="eager")
    return model


def with_wrapped_blocks(model):
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = compiled(block)
    return model


def with_compiled_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def compiled_by_regions(model):
    from accelerate.utils import compile_regions

    return compile_regions(model, backend="eager")


def prepared(model):
    """As by accelerate: its forward casts to bfloat16."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    try:
        return Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()


def merged_by_peft(model):
    """What is left of a PeftModel when its adapters are merged."""
    import peft

    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    wrapped.merge_and_unload()
    return wrapped.requires_grad_()


WRAPPERS = {
    "none": lambda model: model,
    "torch.compile": compiled,
    "model.compile": compiled_in_place,
    "block.compile": with_compiled_blocks,
    "compiled blocks": with_wrapped_blocks,
    "compiled forward": with_compiled_forward,
    "compiled regions": compiled_by_regions,
    "DataParallel": nn.DataParallel,
    "accelerate": prepared,
    "accelerate, compiled": lambda model: compiled(prepared(model)),
    "DDP": lambda model: nn.parallel.DistributedDataParallel(model),
    "DDP of compiled": lambda model: nn.parallel.DistributedDataParallel(compiled(model)),
    "compiled DDP": lambda model: compiled(nn.parallel.DistributedDataParallel(model)),
    "DataParallel of compiled blocks": lambda model: nn.DataParallel(with_wrapped_blocks(model)),
    "merged PeftModel": merged_by_peft,
}


@pytest.fixture
def group(tmp_path):
    """A group of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Code that torch compiled for another model of the same class would be run again."""
    torch._dynamo.reset()


@pytest.fixture(params=WRAPPERS)
def wrap(request):
    if "DDP" in request.param:
        request.getfixturevalue("group")
    return WRAPPERS[request.param]


def state(model):
    """A model's weights, by the names of the bare model."""
    return {plain_name(f".{name}")[1:]: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def compiled_parts(model):
    """What a model is compiled by: objects that must be the same afterwards."""
    keys = ("_compiled_call_impl", "forward")
    return [(name, id(module), *map(module.__dict__.get, keys)) for name, module in model.named_modules()]


def test_prune_prunes_the_model_inside_and_leaves_the_wrapper_as_it_came(wrap, tmp_path):
    expected = secateur.prune(tiny_model("llama"), method="wanda", calibration=CALIBRATION)
    given = wrap(tiny_model("llama"))
    former = compiled_parts(given)
    found = secateur.prune(given, tmp_path / "out", method="wanda", calibration=CALIBRATION)
    assert type(found.model).__name__ == "LlamaForCausalLM" and same(state(found.model), state(expected.model))
    assert [m["name"] for m in found.report["matrices"]] == [m["name"] for m in expected.report["matrices"]]
    assert compiled_parts(given) == former
    expected.model.save_pretrained(tmp_path / "expected")
    assert same_bytes(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "expected"))
    torch.testing.assert_close(given(input_ids=IDS).logits.float(), expected.model(IDS).logits, rtol=0.1, atol=0.1)


def test_evaluate_measures_the_model_inside(wrap):
    expected = secateur.evaluate(tiny_model("llama"), text=TEXT, seqlen=16)
    given = wrap(tiny_model("llama"))
    former = compiled_parts(given)
    assert secateur.evaluate(given, text=TEXT, seqlen=16)["loss"] == expected["loss"]
    assert compiled_parts(given) == former


def test_masks_have_the_names_of_the_model(wrap):
    sparse = secateur.prune(tiny_model("llama"), method="magnitude").model
    expected = Masks.of(sparse)
    given = wrap(secateur.prune(tiny_model("llama"), method="magnitude").model)
    found = Masks.of(given)
    assert list(found.parameters) == list(expected.parameters) and found.zeros == expected.zeros
    bare = {name: parameter != 0 for name, parameter in sparse.named_parameters() if name in expected.parameters}
    wrapped = {n: p != 0 for n, p in given.named_parameters() if n.endswith("mlp.up_proj.weight")}
    assert list(Masks(given, bare).parameters) == list(expected.parameters)
    assert list(Masks(given, wrapped).parameters) == [n for n in expected.parameters if n.endswith("up_proj.weight")]


@pytest.mark.parametrize(
    "wrap", ["none", "torch.compile", "block.compile", "compiled regions", "accelerate", "DDP"], indirect=True
)
def test_gradual_prunes_what_the_wrapper_trains(wrap):
    def trained(given):
        model = model_in_memory(given)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in secateur.gradual(given, final=0.5, steps=3, method="wanda", include="mlp"):
            train_step(given, optimizer)
        return {name: weight == 0 for name, weight in state(model).items()}

    given = wrap(tiny_model("llama").train())
    bfloat16 = hasattr(model_in_memory(given), "_original_forward")  # another training, another mask
    found, expected = trained(given), trained(tiny_model("llama").train())
    assert bfloat16 or same(found, expected)
    assert {float(zero.float().mean()) for name, zero in found.items() if "mlp" in name} == {0.5}


def test_lora_is_put_in_and_merged(wrap):
    sparse = secateur.prune(tiny_model("llama"), method="magnitude", pattern="2:4").model
    given = wrap(secateur.prune(tiny_model("llama"), method="magnitude", pattern="2:4").model)
    former = state(model_in_memory(given))
    model = secateur.masked_lora(given, rank=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    with eager(model), torch.no_grad():
        before = model(IDS).logits
    merged = secateur.merge_lora(given)
    assert state(merged).keys() == former.keys() and not same(state(merged), former)
    zeros = {name: weight == 0 for name, weight in state(sparse).items() if "layers" in name}
    assert same({n: w == 0 for n, w in state(merged).items() if n in zeros}, zeros)
    with eager(model), torch.no_grad():
        assert torch.equal(merged(IDS).logits, before)


def test_a_model_that_is_compiled_and_has_run_shows_gradual_no_inputs():
    model = compiled(tiny_model("llama").train())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    train_step(model, optimizer)
    steps = secateur.gradual(model, final=0.5, steps=3, method="wanda")
    next(steps)
    train_step(model, optimizer)
    with pytest.raises(secateur.ModelError, match=r"no matrix saw an input in 1 steps.*_dynamo\.reset\(\)"):
        next(steps)
    torch._dynamo.reset()
    for _ in secateur.gradual(model, final=0.5, steps=3, method="wanda"):
        train_step(model, optimizer)
    assert Masks.of(model).sparsity == 0.5


@pytest.mark.parametrize("callback", [secateur.KeepSparsity(), secateur.GradualPruning(final=0.5, method="wanda")])
def test_a_trainer_that_compiles(callback, tmp_path):
    model = tiny_model("llama")
    if type(callback) is secateur.KeepSparsity:
        secateur.prune(model, method="magnitude")
    args = TrainingArguments(
        str(tmp_path), max_steps=3, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
        dataloader_pin_memory=False, torch_compile=True, torch_compile_backend="eager",
    )  # fmt: skip
    Trainer(model, args, train_dataset=[{"input_ids": i, "labels": i} for i in IDS], callbacks=[callback]).train()
    assert Masks.of(model).sparsity == 0.5


def test_optimize_arranges_a_wrapped_model(tmp_path, model_directory):
    secateur.prune(model_directory("llama"), tmp_path / "packed", method="magnitude", format="bitmask")
    expected = secateur.optimize(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), prefer="memory")
    assert expected["packed"] == 21
    for wrapped in (compiled, nn.DataParallel, with_wrapped_blocks):
        model = wrapped(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"))
        assert secateur.optimize(model, prefer="memory") == expected


def test_what_was_exchanged_under_a_compiled_module_stays_exchanged():
    model = tiny_model("llama")
    model.lm_head = compiled(model.lm_head)
    wrapped, new = model.model.layers[0], nn.Linear(32, 128, bias=False)
    with eager(model):
        assert type(model.lm_head) is nn.Linear
        model.lm_head = new
    assert model.lm_head is new and model.model.layers[0] is wrapped


# What is refused.

ENTRIES = {
    "prune": lambda given, out: secateur.prune(given, method="wanda", calibration=CALIBRATION),
    "prune to a directory": lambda given, out: secateur.prune(given, out, method="wanda", calibration=CALIBRATION),
    "evaluate": lambda given, out: secateur.evaluate(given, text=TEXT, seqlen=16),
    "Masks": lambda given, out: Masks(given, {}),
    "Masks.of": lambda given, out: Masks.of(given),
    "KeepSparsity": lambda given, out: secateur.KeepSparsity().on_train_begin(None, None, None, model=given),
    "GradualPruning": lambda given, out: secateur.GradualPruning(final=0.5).on_train_begin(
        None, SimpleNamespace(max_steps=3, global_step=0), None, model=given
    ),
    "gradual": lambda given, out: secateur.gradual(given, final=0.5, steps=3),
    "masked_lora": lambda given, out: secateur.masked_lora(given),
    "merge_lora": lambda given, out: secateur.merge_lora(given),
}
BY_NAME = {
    "pack": lambda given, out: secateur.pack(given, out),
    "unpack": lambda given, out: secateur.unpack(given, out),
    "shrink": lambda given, out: secateur.shrink(given, out, neurons=0.5),
    "finetune": lambda given, out: secateur.finetune(given, out, TEXT),
    "compare": lambda given, out: secateur.compare(given, output=out),
    "compare several": lambda given, out: secateur.compare([given], output=out),
    "inspect": lambda given, out: secateur.inspect(given),
    "generate": lambda given, out: secateur.generate(given, "a"),
    "bench": lambda given, out: secateur.bench(given),
    "sensitivity": lambda given, out: secateur.sensitivity(given),
    "report": lambda given, out: secateur.report(given, output=out),
}


def refused(function, given, out, said):
    """One short line, and nothing touched or written."""
    before = files_below(out.parent)
    weights = state(given) if isinstance(given, nn.Module) else {}
    with pytest.raises(secateur.SecateurError, match=said) as caught:
        function(given, out)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 300, text
    assert files_below(out.parent) == before
    assert not isinstance(given, nn.Module) or same(weights, state(given))


class Pipeline:
    """Like transformers' own: holds a model, and a long repr."""

    def __init__(self):
        self.model = tiny_model("llama")

    def __repr__(self):
        return "long\n" * 1000


NO_MODELS = {
    "None": lambda: None,
    "a layer": lambda: nn.Linear(4, 4),
    "a state dict": lambda: tiny_model("llama").state_dict(),
    "a list": lambda: [tiny_model("llama")],
    "a pipeline": Pipeline,
    "a compiled layer": lambda: compiled(nn.Linear(4, 4)),
    "bytes": lambda: b"model",
    "a number": lambda: 3,
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("what", NO_MODELS)
def test_what_is_no_model_is_named_by_its_type(entry, what, tmp_path):
    refused(ENTRIES[entry], NO_MODELS[what](), tmp_path / "out", "is no model of transformers; give")


def test_the_model_inside_is_pointed_at(tmp_path):
    refused(ENTRIES["prune"], Pipeline(), tmp_path / "out", r"^Pipeline: is no model of transformers; .* its \.model$")


@pytest.mark.parametrize("entry", BY_NAME)
def test_where_a_name_is_needed_a_model_is_refused(entry, tmp_path):
    refused(BY_NAME[entry], tiny_model("llama"), tmp_path / "out", r"^LlamaForCausalLM: is a model in memory; save_pre")
    if not entry.startswith("compare"):
        refused(BY_NAME[entry], Pipeline(), tmp_path / "out", "^Pipeline: names no model")


def test_other_models_beside_it_are_named_too(model_directory, tmp_path):
    with pytest.raises(secateur.ModelError, match=r"^LlamaForCausalLM: is a model in memory"):
        secateur.evaluate(model_directory(), text=TEXT, seqlen=16, against=tiny_model("llama"))
    with pytest.raises(secateur.ModelError, match=r"^LlamaForCausalLM: is a model in memory"):
        secateur.finetune(model_directory(), tmp_path / "out", TEXT, teacher=tiny_model("llama"))
    with pytest.raises(secateur.OutputError, match=r"^dict: is no directory's name"):
        secateur.prune(tiny_model("llama"), {})


def fsdp(model):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def with_fsdp_blocks(model):
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = fsdp(block)
    return model


def mesh():
    return torch.distributed.device_mesh.init_device_mesh("cpu", (1,))


def fsdp2(model):
    from torch.distributed.fsdp import fully_shard

    for block in model.model.layers:
        fully_shard(block, mesh=mesh())
    return fully_shard(model, mesh=mesh())


def tensor_parallel(model):
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    return parallelize_module(model, mesh(), {"model.layers.0.mlp.up_proj": ColwiseParallel()})


class DeepSpeedEngine(nn.Module):
    """By its name, which is all that is asked."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def zero3(model):
    for parameter in model.parameters():
        parameter.ds_numel = parameter.numel()
    return model


SPLITS = {
    "FullyShardedDataParallel": fsdp,
    "FullyShardedDataParallel of blocks": with_fsdp_blocks,
    "FSDPModule": fsdp2,
    "model.layers.0.mlp.up_proj.weight": tensor_parallel,
    "DeepSpeedEngine": DeepSpeedEngine,
    "model.embed_tokens.weight": zero3,
}


@pytest.mark.filterwarnings("ignore:FSDP is switching")
@pytest.mark.parametrize("what", SPLITS)
def test_weights_that_are_split_over_processes(what, group, tmp_path):
    given = SPLITS[what](tiny_model("llama"))
    for entry in ENTRIES.values():
        with pytest.raises(
            secateur.ModelError, match=f"^{what.split()[0]}: (is split|splits).*gather the model"
        ) as said:
            entry(given, tmp_path / "out")
        assert len(str(said.value)) < 300 and not (tmp_path / "out").exists()


def with_weight(parameter):
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight = parameter
    return model


class Int8Params(nn.Parameter):
    """Like a library's own."""


class Packed(torch.Tensor):
    """A tensor whose numbers lie elsewhere."""


def quantised_by(method):
    model = tiny_model("llama")
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method=method))
    return model


UP = "model.layers.1.mlp.up_proj.weight"
QUANTISED = {
    f"{UP}: is quantised (int8)": lambda: with_weight(
        nn.Parameter(torch.ones(48, 32, dtype=torch.int8), requires_grad=False)
    ),
    f"{UP}: is quantised (float8_e4m3fn)": lambda: with_weight(
        nn.Parameter(torch.ones(48, 32).to(torch.float8_e4m3fn), requires_grad=False)
    ),
    f"{UP}: is quantised (Int8Params)": lambda: with_weight(Int8Params(torch.ones(48, 32))),
    f"{UP}: is quantised (Packed)": lambda: with_weight(nn.Parameter(torch.ones(48, 32).as_subclass(Packed))),
    "LlamaForCausalLM: its weights are quantised (fp8)": lambda: quantised_by("fp8"),
    "LlamaForCausalLM: its weights are quantised (bitsandbytes)": lambda: quantised_by(
        SimpleNamespace(value="bitsandbytes")
    ),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("what", QUANTISED)
def test_quantised_weights(entry, what, tmp_path):
    refused(ENTRIES[entry], QUANTISED[what](), tmp_path / "out", re.escape(what) + "; take the original 16-bit model")


def test_nothing_of_peft_is_imported():
    """A model is asked for wrappers and adapters without their libraries."""
    script = (
        "import sys, secateur, torch; sys.path.insert(0, 'tests'); from tiny import tiny_model\n"
        "from secateur.models import in_memory as door\n"
        "model = torch.nn.DataParallel(torch.compile(tiny_model('llama'), backend='eager'))\n"
        "door.refuse_adapters(model); door.names_of(model); door.refuse_quantised(door.model_in_memory(model))\n"
        "assert not {'peft', 'deepspeed'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_report_of_a_wrapped_model_is_that_of_the_bare_one(tmp_path):
    secateur.prune(with_wrapped_blocks(tiny_model("llama")), tmp_path / "out", method="magnitude", include="mlp")
    report = json.loads((tmp_path / "out" / "secateur.json").read_text())
    assert "model.layers.0.mlp.up_proj" in {matrix["name"] for matrix in report["matrices"]}
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert float((reopened.model.layers[0].mlp.up_proj.weight == 0).float().mean()) == 0.5
